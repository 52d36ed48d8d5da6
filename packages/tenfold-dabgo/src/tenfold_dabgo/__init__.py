"""Training-data attribution by bidirectional gradient optimization (DABGO)."""

__version__ = "0.1.0"
