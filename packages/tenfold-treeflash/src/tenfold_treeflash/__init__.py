"""TreeFlash: tree speculative decoding with a one-shot drafter that approximates autoregression.

Importing the package stays light.
"""

from __future__ import annotations

__version__ = "0.1.0"
