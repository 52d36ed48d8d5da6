"""Conversion of a Llama, Mistral, Qwen2 or Qwen3 checkpoint into an N-vium (paper
"Conversion").

The base's weights stay as they are; every early exit starts with a copy of the final norm, an
adapter that is the identity, the base's own output head, and a router that says the same for
every token: `s_k = gate_init`. *Closed* gates (`s_k = -10000`) have probability 0 exactly, so
the converted model is the base bit for bit, and cannot be trained open: their gradient is 0,
too. For training take finite log-odds such as -4, which is 1.8 % of exits.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tenfold.errors import ConfigError
from torch import Tensor, nn

from tenfold_nvium.backbone import RotaryTable, base_class
from tenfold_nvium.checkpoints import (
    check_new,
    copy_tokenizer,
    new_folder,
    read_config,
    read_weights,
)
from tenfold_nvium.configuration import NviumConfig
from tenfold_nvium.exits import CONTINUE, EXIT, NviumExit
from tenfold_nvium.modeling import NviumForCausalLM
from tenfold_nvium.supported_bases import check_base, chosen_exits, nvium_config

CLOSED = "closed"
CLOSED_LOG_ODDS = -1e4
TRAINING_LOG_ODDS = -4.0
"""Gates that training can open: each exit starts with 1.8 % of what reaches it."""

_NO_GRADIENT = -88.0
"""Below these log-odds a probability is no normal fp32 number."""

NORM_STARTS = ("copy_final_norm", "ones")
_SAMPLING_ONLY = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
)  # fmt: skip


def convert(
    model_or_path: Any,
    exit_layers: Sequence[int] | None = None,
    num_exits: int | None = None,
    gate_init: str | float = CLOSED,
    head_init: str = "copy_final_norm",
    *,
    exit_head_tying: str = "lm_head",
    adapter_size: int | None = None,
    final_adapter: bool = False,
    compute_penalty: float = 0.15,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
) -> NviumForCausalLM:
    """An N-vium from a dense causal language model.

    Args:
        model_or_path: a checkpoint folder, or a loaded model of a supported architecture (its
            weights are copied, it stays as it is).
        exit_layers: depths of the early exits in layers; None spreads `num_exits` heads evenly.
        num_exits: number of heads, the last one included; default 4.
        gate_init: `closed`, or the routers' log-odds of leaving; -4 is a good start for
            training.
        head_init: early norms start as a copy of the final norm (`copy_final_norm`) or as
            `ones`.
        exit_head_tying: as in `NviumConfig`; untied heads start as copies of the base's.
        adapter_size: inner width of the exits' adapters; None: the hidden size, 0: none.
        final_adapter: give the last exit an adapter, too (the identity at the start).
        compute_penalty: beta of later training, kept in the configuration.
        seed: of the routers' and adapters' random weights.
        dtype: number type to load a folder in; None: the checkpoint's own.

    Raises:
        ConfigError: no such checkpoint, one that cannot be converted, or impossible exits.
        ComponentError: transformers cannot load it.
    """
    odds = gate_log_odds(gate_init)
    if head_init not in NORM_STARTS:
        raise ConfigError(f"head_init {head_init!r} must be one of {', '.join(NORM_STARTS)}")
    method = {
        "exit_head_tying": exit_head_tying, "adapter_size": adapter_size,
        "final_adapter": final_adapter, "compute_penalty": compute_penalty,
    }  # fmt: skip
    if isinstance(model_or_path, str | Path):
        folder = Path(model_or_path).expanduser()
        base_config, where = base_config_of(folder), str(folder)
    else:
        folder, base_config = None, model_or_path.config
        where = f"the {type(model_or_path).__name__}"
        check_base(base_config, where)
    exits = chosen_exits(base_config.num_hidden_layers, exit_layers, num_exits)
    config = nvium_config(base_config, exits, **method)
    base = model_or_path if folder is None else read_weights(folder, dtype)
    _check_weights(base, where)
    config._attn_implementation = base.config._attn_implementation
    network = _with_weights_of(base, config, shared=folder is not None)
    _start_exits(network, odds, head_init, seed)
    network.generation_config = _generation_settings(base)
    return network.eval()


def convert_folder(base: str | Path, out: str | Path, **settings: Any) -> NviumForCausalLM:
    """Converts a checkpoint folder into another, tokenizer included; settings as in `convert`.

    The new folder appears complete or not at all. The weights are in memory once.

    Raises:
        ConfigError: as `convert`; or `out` exists and is not an empty folder.
    """
    source, target = Path(base).expanduser(), Path(out).expanduser()
    check_new(target)
    network = convert(source, **settings)
    with new_folder(target) as folder:
        network.save_pretrained(folder)
        copy_tokenizer(source, folder)
    return network


def gate_log_odds(gate_init: str | float) -> float:
    """The log-odds that `gate_init` stands for.

    Raises:
        ConfigError: neither `closed` nor a finite number.
    """
    if gate_init == CLOSED:
        return CLOSED_LOG_ODDS
    try:
        odds = float(gate_init)
    except (TypeError, ValueError):
        odds = float("nan")
    if not abs(odds) < float("inf"):
        raise ConfigError(
            f"gate_init is {gate_init!r}; it must be {CLOSED!r} or a finite number, the log-odds "
            f"of leaving (such as {TRAINING_LOG_ODDS:g} for training)"
        )
    return odds


def _exits(network: NviumForCausalLM) -> list[NviumExit]:
    """The early exits."""
    return cast(list[NviumExit], list(network.exits))


@torch.no_grad()
def set_gates(network: NviumForCausalLM, log_odds: float) -> None:
    """Lets every router answer `log_odds` for every token; its inner weights stay."""
    for exit_ in _exits(network):
        head = exit_.router.head
        head.weight.zero_()
        head.bias[CONTINUE] = 0.0
        head.bias[EXIT] = log_odds * network.config.router_temperature


@torch.no_grad()
def gates_are_closed(network: NviumForCausalLM) -> bool:
    """Whether some router answers a constant so low that its gradient is 0 in fp32."""
    heads = [exit_.router.head for exit_ in _exits(network)]
    return any(
        not bool(head.weight.any()) and float(head.bias[EXIT] - head.bias[CONTINUE]) < _NO_GRADIENT
        for head in heads
    )


def base_config_of(folder: Path) -> Any:
    """The configuration of a base checkpoint, checked.

    Raises:
        ConfigError: there is no checkpoint, or one that cannot be converted.
    """
    config = read_config(folder)
    check_base(config, str(folder))
    return config


def _check_weights(base: Any, where: str) -> None:
    """Raises ConfigError for quantised weights, or a model without a language head."""
    integers = [name for name, p in base.named_parameters() if not p.is_floating_point()]
    if integers or getattr(base, "is_quantized", False):
        raise ConfigError(
            f"{where} has quantised weights; convert the checkpoint that they were made from"
        )
    if getattr(base, "lm_head", None) is None:
        raise ConfigError(f"{where} has no language-model head; give a ...ForCausalLM model")


def _with_weights_of(base: Any, config: NviumConfig, *, shared: bool) -> NviumForCausalLM:
    """The network with the base's own tensors (or copies), and empty exits.

    It is built without memory first, so that the weights exist once.
    """
    state: dict[str, Tensor] = base.state_dict()
    if not shared:
        state = {name: tensor.detach().clone() for name, tensor in state.items()}
    with torch.device("meta"):
        network = NviumForCausalLM(config)
    report = network.load_state_dict(state, strict=False, assign=True)
    own = ("exits.", "final_adapter.")
    lost = [name for name in report.missing_keys if not name.startswith(own)]
    if lost or report.unexpected_keys:
        names = ", ".join([*lost, *report.unexpected_keys][:3])
        raise ConfigError(f"the base's weights do not fit {config.base_model_type!r}: {names}")
    device = base.lm_head.weight.device
    for part in (network.exits, network.final_adapter):
        part.to_empty(device=device).to(base.lm_head.weight.dtype)
    rotary = base_class(config.base_model_type, "RotaryEmbedding")(config=config).to(device)
    network.model.rotary_emb, network.model.rotary = rotary, RotaryTable(rotary)
    network.tie_weights()
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    return network


def _generation_settings(base: Any) -> Any:
    """The base's generation settings. Some old ones name sampling settings beside greedy
    decoding; transformers ignores those and refuses to save them, so they are dropped."""
    settings = copy.deepcopy(base.generation_config)
    if settings is not None and not settings.do_sample:
        for name in _SAMPLING_ONLY:
            setattr(settings, name, None)
    return settings


@torch.no_grad()
def _start_exits(network: NviumForCausalLM, log_odds: float, head_init: str, seed: int) -> None:
    """Gives every exit its first weights; see the module."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in (network.exits, network.final_adapter):
            for module in part.modules():
                _initialise(network, module)
    for exit_ in _exits(network):
        if head_init == "copy_final_norm":
            exit_.norm.weight.copy_(network.model.norm.weight)
        if exit_.head is not None:
            exit_.head.weight.copy_(network.lm_head.weight)
    set_gates(network, log_odds)


def _initialise(network: NviumForCausalLM, module: nn.Module) -> None:
    """One module's own parameters by the model's rules."""
    if any(True for _ in module.parameters(recurse=False)):
        network._init_weights(module)
