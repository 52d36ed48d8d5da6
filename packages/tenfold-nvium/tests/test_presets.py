"""Parameter formulas, the paper's grid, and the matched dense twins."""

from __future__ import annotations

import pytest
import torch
from nvium_cases import tiny_config
from tenfold.errors import ConfigError
from tenfold_nvium.modeling import NviumForCausalLM
from tenfold_nvium.presets import (
    GRID,
    PRESETS,
    dense_parameters,
    dense_twin,
    matched_intermediate_size,
    nvium_parameters,
    preset,
)

MATCHED = {
    128: (432, 392, 368, 360, 360),
    256: (864, 776, 736, 720, 712),
    512: (1712, 1544, 1456, 1432, 1416),
    768: (2568, 2312, 2184, 2136, 2120),
    1024: (3424, 3080, 2912, 2856, 2824),
    1536: (5120, 4608, 4352, 4272, 4224),
}
LAYERS = (6, 12, 24, 36, 48)


def counted(config) -> int:
    with torch.device("meta"):
        model = NviumForCausalLM(config)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"exit_head_tying": "none"},
        {"tie_word_embeddings": True, "adapter_size": 5, "final_adapter": False},
        {"num_key_value_heads": 1, "router_num_layers": 3, "exit_layers": [2]},
        {"head_dim": 12, "router_hidden_size": 7, "router_intermediate_size": 9},
    ],
)
def test_the_parameter_formula_counts_the_model(changes):
    config = tiny_config(**changes)
    assert nvium_parameters(config) == counted(config)
    twin = dense_twin(config)
    assert dense_parameters(twin) == counted(twin)


@pytest.mark.parametrize("hidden", sorted(MATCHED))
def test_all_thirty_cells_have_the_papers_matched_mlp(hidden):
    for layers, wanted in zip(LAYERS, MATCHED[hidden], strict=True):
        config = GRID[f"h{hidden}-l{layers}"].config()
        assert matched_intermediate_size(config) == wanted
        size = nvium_parameters(config)
        assert dense_parameters(config, wanted) >= size > dense_parameters(config, wanted - 8)


@pytest.mark.parametrize(
    ("name", "millions", "dense"),
    [
        ("h128-l24", 13.14, None),
        ("h256-l24", 36.17, None),
        ("h512-l24", 111.55, None),
        ("h768-l24", 226.15, 226.58),
        ("h1024-l24", 380.60, None),
        ("h1536-l24", 806.12, None),
        ("h1536-l48", 1485.67, 1485.72),
    ],
)
def test_sizes_are_those_published(name, millions, dense):
    config = GRID[name].config()
    assert nvium_parameters(config) / 1e6 == pytest.approx(millions, abs=0.006)
    if dense:
        assert dense_parameters(dense_twin(config)) / 1e6 == pytest.approx(dense, abs=0.006)


def test_every_cell_trains_on_twenty_tokens_per_parameter():
    """Steps are counted so that the budget is met with whole batches."""
    for cell in GRID.values():
        tokens = cell.steps * cell.batch_size * cell.context_length
        assert tokens / nvium_parameters(cell.config()) == pytest.approx(20, rel=0.002)


def test_every_preset_builds_with_its_twin():
    for name, chosen in PRESETS.items():
        config = chosen.config()
        assert len(config.depths) >= 2
        twin = dense_twin(config)
        assert twin.depths == [config.num_hidden_layers]
        excess = dense_parameters(twin) / nvium_parameters(config) - 1
        assert 0 <= excess < 0.05, name


def test_an_unknown_preset_is_named():
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        preset("quickstrat")
