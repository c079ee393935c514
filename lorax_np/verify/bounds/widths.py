"""The worst case of an entry where one roundoff does for all, and where a profile has three: by one name."""

from ..cases import Case, HostArray
from ..precision import Precision
from . import ceiling, worst

Width = float | Precision  # one unit roundoff, or those of operands, sums and what is stored


def width(precision: Precision) -> Width:
    """One number for the profiles whose arrays NumPy computes in, the three of it for those of 16 bits."""
    three = precision.dtype in ("float16", "bfloat16")
    return precision if three else max(precision.operand, precision.accumulate, precision.store)


def roundoff(u: Width) -> float:
    """The largest of the roundoffs."""
    return u if isinstance(u, float) else max(u.operand, u.accumulate, u.store)


def bounds(case: Case, u: Width, *, y_alone: bool = False) -> dict[str, HostArray]:
    """The most that roundings explain of y and each gradient: (verify.2) to (verify.10), or (bounds.38).

    y_alone : y is all that is looked at
    """
    return worst.bounds(case, u, y_alone=y_alone) if isinstance(u, float) else ceiling.ceiling(case, u)


def merged_bounds(case: Case, u: Width) -> dict[str, HostArray]:
    """The same of a merged weight and bias; (merge.12) in 16 bits."""
    return worst.merged_bounds(case, u) if isinstance(u, float) else ceiling.merged_ceiling(case, u)
