"""Pairs of targets and drafters that cannot work together: one clear error each."""

from __future__ import annotations

import pytest
from tenfold.errors import ConfigError
from tenfold_treeflash.configuration import TreeFlashConfig
from tenfold_treeflash.decoding import DraftSettings, SpeculativeDecoder
from tenfold_treeflash.target import Target
from treeflash_cases import drafter_for, llama


def test_layers_that_the_target_does_not_have_are_named():
    drafter = drafter_for(llama(layers=6))
    drafter.config.num_target_layers = None
    with pytest.raises(ConfigError, match="reads layer 4; the target has layers 0 to 3"):
        Target(llama(layers=4)).check_drafter(drafter.config)


def test_layer_ids_beyond_the_stated_number_are_named():
    with pytest.raises(ConfigError, match=r"\[1, 9\] must increase and lie in 0\.\.3"):
        TreeFlashConfig(num_target_layers=4, dflash_config={"target_layer_ids": [1, 9]})


def test_another_device_is_named():
    model = llama()
    drafter = drafter_for(model).to("meta")
    with pytest.raises(ConfigError, match=r"device is meta, the target's cpu; move one of them"):
        SpeculativeDecoder(Target(model), drafter, DraftSettings())
