"""The harness: give it an implementation of a LoRA linear layer, and it says right or wrong.

>>> import lorax_np as lx
>>> lx.verify.verify("reference", level="quick").passed
True
"""

from . import strategies, subjects
from .batteries.lattice import lattice_cases
from .batteries.probes import infer_precision
from .batteries.secant import norm_of
from .cases import Case
from .conformance import assert_case, assert_conforms
from .conventions import Spec
from .diagnosis.smallest import smallest
from .gradcheck import GradcheckError, GradcheckResult, gradcheck
from .precision import Precision
from .report import Check, Report
from .subjects import Subject
from .verdict import verify

__all__ = [
    "Case",
    "Check",
    "GradcheckError",
    "GradcheckResult",
    "Precision",
    "Report",
    "Spec",
    "Subject",
    "assert_case",
    "assert_conforms",
    "gradcheck",
    "infer_precision",
    "lattice_cases",
    "norm_of",
    "smallest",
    "strategies",
    "subjects",
    "verify",
]
