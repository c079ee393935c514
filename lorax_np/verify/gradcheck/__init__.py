"""gradcheck, for any hand-written forward and backward.  Derivation: specs/gradcheck.md."""

from .check import GradcheckError, GradcheckResult, gradcheck

__all__ = ["GradcheckError", "GradcheckResult", "gradcheck"]
