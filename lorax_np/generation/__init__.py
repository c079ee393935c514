"""Texts that a model writes: decoding with kept keys, and tokens by a draw.  specs/generation.md."""

from .sampling import Sampling
from .write import Written, generate, token_stream

__all__ = ["Sampling", "Written", "generate", "token_stream"]
