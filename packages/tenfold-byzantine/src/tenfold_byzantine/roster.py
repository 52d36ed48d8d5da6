"""From the settings of a game to the policies that play it.

Scripted policies come from their texts, language models from the run that the game is part of. A
`Roster` makes each policy once, however many cells use it, so that all their games share calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from tenfold.errors import ComponentError, nearest
from tenfold.seeds import content_hash

from tenfold_byzantine.cast import Cast
from tenfold_byzantine.contracts import Policy, Role
from tenfold_byzantine.play import players
from tenfold_byzantine.policies.registry import policy, with_filter
from tenfold_byzantine.rules import GameConfig, Group

LLM = "llm"
ModelOf = Callable[[Group, Role, GameConfig], Any]
"""The model of a group."""


class NoModelError(ComponentError):
    """Agents are language models, and there is no model for them; no game can be played."""


class Roster:
    """Policies by what they are made of.

    Args:
        model_of: gives the model of a group that plays as `llm`; None: there is none.
        unsafe: run algorithms outside of their bounds.
    """

    def __init__(self, model_of: ModelOf | None = None, *, unsafe: bool = False) -> None:
        self._model_of = model_of
        self._unsafe = unsafe
        self._made: dict[tuple[Any, ...], Policy] = {}
        self._casts: dict[str, Cast] = {}

    def cast(self, config: GameConfig) -> Cast:
        """The players of a game, checked against its rules; shared by games of these settings.

        Raises:
            ConfigError: an unknown policy, or one outside of its bounds.
            NoModelError: a model is missing.
        """
        key = config.canonical
        if key not in self._casts:
            found = players(config, build=lambda group, role: self._policy(group, role, config))
            self._casts[key] = Cast(config, found)
        return self._casts[key]

    def _policy(self, group: Group, role: Role, config: GameConfig) -> Policy:
        if group.use != LLM:
            key: tuple[Any, ...] = (role, group.use, group.filter)
            if key not in self._made:
                made = policy(group.use, role=role, unsafe=self._unsafe)
                self._made[key] = with_filter(made, group.filter)
            return self._made[key]
        if self._model_of is None:
            raise NoModelError(
                f"the {role} agents are language models, but there is no model",
                hint=f"give one ([models.{role}] in a run file, [backend] in a game file), or "
                f'name a scripted policy: [{role}] use = "low-median"',
            )
        model = self._model_of(group, role, config)
        settings = {k: v for k, v in asdict(group).items() if k != "count"}
        key = (role, id(model), content_hash(settings, 64))
        if key not in self._made:
            made = language_policy(model, group, role)
            self._made[key] = with_filter(made, group.filter)
        return self._made[key]


def by_role(models: Mapping[str, Any]) -> ModelOf:
    """Models by the roles of a run file.

    A group takes the role that its `backend = { role = "..." }` names, else its side's (`honest`,
    `byzantine`), else `model`.
    """

    def model_of(group: Group, role: Role, config: GameConfig) -> Any:
        named = group.backend.get("role")
        if named is not None:
            if named not in models:
                raise NoModelError(
                    f"a {role} group asks for the model role {named!r}, which the run does not "
                    f"have{nearest(str(named), models)} (it has: {', '.join(models) or 'none'})"
                )
            return models[named]
        for name in (role, "model"):
            if name in models:
                return models[name]
        raise NoModelError(
            f"the {role} agents are language models, but the run has no model for them "
            f"(models: {', '.join(models) or 'none'})",
            hint=f'add [models.{role}], or a scripted policy: {role} = "low-median"',
        )

    return model_of


def language_policy(model: Any, group: Group, role: Role) -> Policy:
    """The language-model policy of a group.

    Raises:
        ConfigError: settings that it cannot follow.
    """
    from tenfold_byzantine.language import from_group

    return from_group(model, group, role)


def needs_model(config: GameConfig) -> bool:
    """Whether any agent is a language model."""
    return any(group.use == LLM for group in (*config.honest, *config.byzantine))
