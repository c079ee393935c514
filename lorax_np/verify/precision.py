"""What a subject claims to compute in: the unit roundoffs of its operands, its sums and what it stores."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Precision:
    """One profile.

    dtype : of the arrays that a subject is given and gives back
    operand : unit roundoff to which a product's factors are rounded first; 0 where they are used as stored
    accumulate, store : unit roundoff of sums, and of every intermediate that is stored
    rounding : of the sums; toward zero as in some matrix units
    """

    name: str
    dtype: str
    operand: float
    accumulate: float
    store: float
    rounding: Literal["nearest", "toward zero"] = "nearest"


_F64, _F32, _TF32, _F16, _BF16 = 2.0**-53, 2.0**-24, 2.0**-11, 2.0**-11, 2.0**-8

PRECISIONS: dict[str, Precision] = {
    p.name: p
    for p in (
        Precision("fp64", "float64", 0.0, _F64, _F64),
        Precision("fp32", "float32", 0.0, _F32, _F32),
        Precision("tf32", "float32", _TF32, _F32, _F32),
        Precision("bf16", "bfloat16", 0.0, _F32, _BF16),
        Precision("fp16", "float16", 0.0, _F32, _F16),
        Precision("bf16-pure", "bfloat16", 0.0, _BF16, _BF16),
        Precision("tf32-rz", "float32", _TF32, _F32, _F32, "toward zero"),
        Precision("bf16-rz", "bfloat16", 0.0, _F32, _BF16, "toward zero"),
    )
}
