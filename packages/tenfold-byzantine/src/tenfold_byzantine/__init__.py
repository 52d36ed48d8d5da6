"""Consensus games of language-model agents with Byzantine members (arXiv:2603.01213).

Importing the package stays light.
"""

from __future__ import annotations

__version__ = "0.1.0"
