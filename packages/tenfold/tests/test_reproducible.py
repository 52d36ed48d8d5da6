"""Global state that libraries use is set by name, not by order."""

from __future__ import annotations

import os
import random

import pytest
from tenfold import reproducible

SETTINGS = {"threads": 1, "deterministic": True}


def test_equal_seeds_give_equal_global_draws():
    numpy = pytest.importorskip("numpy")
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()

    def draws(seed):
        reproducible.settle(SETTINGS, seed)
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    try:
        assert draws(1) == draws(1)
        assert len({*draws(1), *draws(2)}) == 6
        assert torch.get_num_threads() == 1
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


def test_thread_count_reaches_libraries_before_their_import(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    reproducible.prepare({"threads": 0, "deterministic": False})
    assert os.environ["OMP_NUM_THREADS"] == "7"
    reproducible.prepare(SETTINGS)
    assert os.environ["OMP_NUM_THREADS"] == "1"
