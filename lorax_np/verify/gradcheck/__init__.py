"""gradcheck, for any hand-written forward and backward.  Derivation: specs/gradcheck.md."""

from .check import gradcheck
from .result import GradcheckError, GradcheckResult

__all__ = ["GradcheckError", "GradcheckResult", "gradcheck"]
