"""LoRA's mathematics, settled: hand-derived forward and backward passes, and a judge for other implementations."""

__version__ = "0.1.0"
