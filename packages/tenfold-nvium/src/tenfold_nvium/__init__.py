"""N-vium: mixture-of-exits transformers with exact accelerated generation.

Importing the package stays light; the model registers itself with transformers when
`tenfold_nvium.modeling` is imported.
"""

from __future__ import annotations

__version__ = "0.1.0"
