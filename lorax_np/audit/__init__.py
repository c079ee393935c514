"""The adapter auditor: what is wrong, doubtful or not portable in an adapter directory.  See specs/audit.md."""

from .report import Audit, Finding, Row
from .run import audit

__all__ = ["Audit", "Finding", "Row", "audit"]
