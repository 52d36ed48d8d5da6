"""The plugin `byzantine`: descriptions only, importable without any heavy library."""

from __future__ import annotations

from tenfold import ComponentSpec, Param, PluginInfo, hookimpl

_EXTRAS = ("tenfold-byzantine",)
_HEAVY = ("numpy",)
_PRESETS = ("paper-q1", "paper-q2", "prompts-q3", "smoke")
_TAXONOMIES = ("full", "paper-text", "paper-figures")
_KEEP = Param(
    "keep_prompts", "str", "hash", "what event logs keep of prompts",
    choices=("full", "hash", "none"), identity=False,
)  # fmt: skip


@hookimpl
def tenfold_plugin() -> PluginInfo:
    """Who we are."""
    return PluginInfo(
        name="byzantine",
        summary="Consensus games of language-model agents with faulty players",
        paper="arXiv:2603.01213",
    )


@hookimpl
def tenfold_datasets() -> list[ComponentSpec]:
    """Games to be played."""
    return [
        ComponentSpec(
            "games",
            "tenfold_byzantine.games:Games",
            "Games of a file, a preset or given settings, times a grid, times replicates",
            params=(
                Param("file", "path", None, "game file or sweep file"),
                Param("preset", "str", None, "an experiment instead of a file", choices=_PRESETS),
                Param("game", "table", None, "settings of the game, over those of the file"),
                Param("honest", "table", None, "settings of the honest side, the same way"),
                Param("byzantine", "table", None, "settings of the Byzantine side, the same way"),
                Param("grid", "table", None, '"game.n_byzantine" = [0, 1, 2] and the like'),
                Param("replicates", "int", None, "games per cell; left out: the file's, else 1",
                      minimum=1),
                Param("seed", "int", None, "of the games; left out: the run's"),
                Param("paired", "bool", None, "one seed per replicate in all cells; left out: yes"),
                Param("limit", "int", None, "at most this many games", minimum=1),
                Param("shuffle_seed", "int", None, "order by this seed"),
            ),
            provides=("game",),
            tags=("games", "consensus"),
        ),
    ]  # fmt: skip


@hookimpl
def tenfold_evaluators() -> list[ComponentSpec]:
    """What plays them."""
    generates = ("generate",)
    return [
        ComponentSpec(
            "consensus",
            "tenfold_byzantine.consensus:Consensus",
            "Plays games of scripted and language-model agents; how they ended, per cell",
            params=(
                Param("honest", "str", None, "policy of all honest agents, e.g. low-median, "
                      "instead of the games' own; llm takes the model of the role"),
                Param("byzantine", "str", None, "the same for Byzantine agents, e.g. "
                      "collude:v=25"),
                Param("width", "int", 64, "games played side by side", minimum=1, identity=False),
                Param("taxonomy", "str", "full", "how outcomes are grouped", choices=_TAXONOMIES,
                      identity=False),
                Param("base", "str", "", "label of the cell that others are compared with; "
                      "left out: the first", identity=False),
                Param("reference", "str", None, "published rates to show beside ours",
                      choices=_PRESETS, identity=False),
                Param("events", "bool", True, "keep an event log per game", identity=False),
                _KEEP,
                Param("stories", "int", 6, "games that the report shows in full", minimum=0,
                      identity=False),
                Param("unsafe", "bool", False, "run algorithms outside of their bounds"),
            ),
            requires={"honest?": generates, "byzantine?": generates, "*?": generates},
            data={"games": ("game",)},
            modules=_HEAVY,
            extras=_EXTRAS,
            tags=("games", "consensus"),
        ),
    ]  # fmt: skip
