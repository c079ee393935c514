"""The harness: give it an implementation of a LoRA linear layer, and it says right or wrong.

>>> import lorax_np as lx
>>> lx.verify.verify("reference", level="quick").passed
True
"""

from . import subjects
from .cases import Case
from .report import Check, Report
from .subjects import Spec, Subject
from .verdict import verify

__all__ = ["Case", "Check", "Report", "Spec", "Subject", "subjects", "verify"]
