"""The adapter auditor, and what is in a file or directory of tensors.  See specs/audit.md."""

from .contents import Contents, Group, contents
from .report import Audit, Finding, Row
from .run import audit

__all__ = ["Audit", "Contents", "Finding", "Group", "Row", "audit", "contents"]
