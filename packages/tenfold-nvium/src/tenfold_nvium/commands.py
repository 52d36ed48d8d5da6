"""`tenfold nvium convert | export | info | generate | verify`.

Each takes `as_json`, prints its result on stdout, and returns an exit code. Training and
evaluation have no verb of their own: `tenfold train` and `tenfold run` do them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tenfold.cli.output import note, print_json, print_table
from tenfold.errors import EXIT_OK, EXIT_RUN_FAILED, ConfigError
from tenfold.progress import Reporter
from tenfold.records import GenerationConfig

from tenfold_nvium.checkpoints import read_config
from tenfold_nvium.configuration import NviumConfig
from tenfold_nvium.convert import CLOSED, convert_folder, gate_log_odds
from tenfold_nvium.export import export_folder
from tenfold_nvium.lm import load
from tenfold_nvium.model_info import describe, info_rows, parameters_by_component, trained_shares
from tenfold_nvium.policies import make_policy
from tenfold_nvium.presets import preset as preset_of
from tenfold_nvium.streaming import TokenStream
from tenfold_nvium.verify import verify as run_checks


def convert(
    base: str,
    out: str,
    exits: Sequence[int] | None = None,
    num_exits: int | None = None,
    gate_init: str = CLOSED,
    head_init: str = "copy_final_norm",
    tying: str = "lm_head",
    adapter_size: int | None = None,
    final_adapter: bool = False,
    compute_penalty: float = 0.15,
    seed: int = 0,
    dtype: str | None = None,
    as_json: bool = False,
) -> int:
    """Converts a dense checkpoint folder; says what was chosen."""
    network = convert_folder(
        base, out, exit_layers=exits, num_exits=num_exits, gate_init=gate_init,
        head_init=head_init, exit_head_tying=tying, adapter_size=adapter_size,
        final_adapter=final_adapter, compute_penalty=compute_penalty, seed=seed, dtype=dtype,
    )  # fmt: skip
    components = parameters_by_component(network.config)
    added = sum(n for name, n in components.items() if name.startswith(("exit", "rout", "adap")))
    closed = gate_init == CLOSED
    odds = gate_log_odds(gate_init)
    facts = {
        "checkpoint": out,
        "base": network.config.base_model_type,
        "layers": network.config.num_hidden_layers,
        "exit_layers": network.config.depths[:-1],
        "gates": CLOSED if closed else odds,
        "parameters": sum(components.values()),
        "added_parameters": added,
    }
    if as_json:
        print_json(facts)
        return EXIT_OK
    print(
        f"{out}: {facts['base']} with {facts['layers']} layers, early exits after "
        f"{', '.join(map(str, network.config.depths[:-1])) or 'none'}, {added:,} new parameters"
    )
    if closed:
        print("gates are closed: same text as the base; to train it, set gate_init")
    else:
        print(f"gates start at log-odds {odds:g}; train them with nvium:finetune")
    return EXIT_OK


def export(checkpoint: str, out: str, as_json: bool = False) -> int:
    """Writes a folder that loads without this package."""
    files = export_folder(checkpoint, out)
    code = [name for name in files if name.endswith(".py")]
    if as_json:
        print_json({"folder": out, "files": files})
        return EXIT_OK
    print(f"{out}: weights and {len(code)} files of code; it loads with")
    print(f"AutoModelForCausalLM.from_pretrained({out!r}, trust_remote_code=True)")
    return EXIT_OK


def info(checkpoint: str | None = None, preset: str | None = None, as_json: bool = False) -> int:
    """Describes a checkpoint, or a named shape."""
    if (checkpoint is None) == (preset is None):
        raise ConfigError("give a checkpoint folder or --preset NAME (one of them)")
    if preset is not None:
        shape = preset_of(preset)
        facts = {"preset": preset, **describe(shape.config(), preset=shape)}
    else:
        folder = Path(str(checkpoint)).expanduser()
        config = read_config(folder)
        if not isinstance(config, NviumConfig):
            raise ConfigError(
                f"{folder} holds a {config.model_type!r} model, not an N-vium",
                hint=f"convert it: `tenfold nvium convert {folder} OUT`",
            )
        shares = trained_shares(folder, len(config.depths))
        facts = {"checkpoint": str(folder), **describe(config, shares=shares)}
    if as_json:
        print_json(facts)
    else:
        print_table(("", str(checkpoint or preset)), info_rows(facts))
    return EXIT_OK


def generate(
    checkpoint: str,
    prompt: str,
    policy: str = "auto",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    warp_scope: str = "head",
    seed: int = 0,
    max_new_tokens: int = 64,
    max_deferred: int | None = None,
    trace: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    as_json: bool = False,
) -> int:
    """Writes one text while it is decoded, coloured by exit on a terminal."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if trace is not None and not Path(trace).expanduser().absolute().parent.is_dir():
        raise ConfigError(f"--trace {trace}: there is no such folder")
    lm = load(
        checkpoint, policy=policy, max_deferred=max_deferred, warp_scope=warp_scope,
        device=device, dtype=dtype,
    )  # fmt: skip
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    stream = TokenStream(lm, lm.prompt_ids(text), config)
    if as_json:
        list(stream)
        print_json({"prompt": text, **stream.result()})
    elif sys.stdout.isatty():
        from tenfold_nvium.terminal import show_coloured

        show_coloured(stream, text)
    else:
        for piece, _ in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        note(_shares(stream))
    if trace is not None:
        parameter = next(lm.model.parameters())
        stream.trace.save(
            Path(trace).expanduser(), policy=stream.policy, model=checkpoint, seed=seed,
            dtype=str(parameter.dtype).removeprefix("torch."), device=str(parameter.device),
        )  # fmt: skip
    return EXIT_OK


def _shares(stream: TokenStream) -> str:
    """Exit shares in one line."""
    depths = stream.lm.model.config.depths
    shares = stream.trace.exit_shares
    parts = [f"layer {d}: {s:.0%}" for d, s in zip(depths, shares, strict=True)]
    return (
        f"{len(stream.tokens)} tokens, {stream.policy}; left after {', '.join(parts)}; "
        f"mean depth {stream.trace.mean_depth:.2f}"
    )


def verify(
    checkpoint: str,
    prompt: str | None = None,
    num_prompts: int = 4,
    max_new_tokens: int = 32,
    policy: str = "sample",
    max_deferred: int | None = None,
    float64: bool = True,
    tolerance: float | None = None,
    draws: int = 4000,
    seed: int = 0,
    dtype: str | None = None,
    as_json: bool = False,
) -> int:
    """Checks that decoding is exact; exit code 1 when something differs."""
    make_policy(policy)
    lm = load(checkpoint, dtype=dtype)
    prompts = [] if prompt is None else [lm.prompt_ids(prompt)]
    if not prompts and num_prompts == 0 and draws <= 0:
        raise ConfigError("nothing to check: give prompts, --num-prompts or --draws above 0")
    with Reporter().bar("checking", len(prompts) + num_prompts + 1, "checks") as bar:
        checks = run_checks(
            lm.model, prompts=prompts, num_prompts=num_prompts, max_new_tokens=max_new_tokens,
            policy=policy, max_deferred=max_deferred, float64=float64, tolerance=tolerance,
            draws=draws, seed=seed, advance=bar.advance,
        )  # fmt: skip
    ok = all(check["ok"] is not False for check in checks)
    if as_json:
        print_json({"checkpoint": checkpoint, "ok": ok, "checks": checks})
    else:
        words = {True: "ok", False: "DIFFERS", None: "not done"}
        rows = [
            (c["check"], words[c["ok"]], _number(c["value"]), _number(c["limit"]), c["note"])
            for c in checks
        ]
        print_table(("check", "result", "value", "limit", "what"), rows)
    return EXIT_OK if ok else EXIT_RUN_FAILED


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
