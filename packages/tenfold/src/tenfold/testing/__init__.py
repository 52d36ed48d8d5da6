"""Tests for plugins: the conformance kit, and a context for unit tests.

from tenfold.testing import check_plugin

def test_plugin_conforms():
    assert not [f.line() for f in check_plugin("my-plugin") if f.status == "fail"]
"""

from __future__ import annotations

from tenfold.testing.context import FakeContext, RecordedBar
from tenfold.testing.findings import Finding
from tenfold.testing.kit import check_model, check_plugin
from tenfold.testing.processes import launch

__all__ = ["FakeContext", "Finding", "RecordedBar", "check_model", "check_plugin", "launch"]
