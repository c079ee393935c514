"""The layers that a subject is judged on: one generic point of every kind, drawn from a seed.

Generic means that nothing hides: B is not 0, m is not n, no two constants are equal (a lost s cannot look like
a lost 1/(1 − p)), gy is random, no matrix is square, and sizes are no multiple of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product
from math import sqrt
from typing import Any

import numpy as np

from .. import LoraConfig
from .conventions import Spec
from .precision import PRECISIONS

HostArray = np.ndarray[Any, np.dtype[Any]]

PROFILES = {name: precision.dtype for name, precision in PRECISIONS.items()}
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24}  # unit roundoff, round to nearest
KINDS = ("lora", "lora, dropout", "dora", "dora, dropout", "dora full norm", "dora full norm, dropout")

#         d_out d_in r  lead     small enough for exact arithmetic; r = 1, r > min(d_in, d_out), d_out = 1
SMALL = ((5, 7, 3, (2, 2)), (1, 4, 2, (3,)), (4, 3, 6, (3,)), (3, 5, 1, (2,)))
#         a middle size, two leading axes, one token, and a rank past both sides
MIDDLE = ((13, 11, 5, (2, 3)), (11, 17, 6, (7,)), (7, 10, 13, (1, 5)), (1, 19, 2, (4,)), (10, 3, 1, ()))
ARRAYS = ("x", "W", "b", "A", "B", "m", "bB", "mask", "base_mask", "gy")
ALPHAS = (3.7, 5.3, 11.9, 0.83, 23.0)
DROPS = (0.3, 0.45, 0.15, 0.6)


@dataclass(frozen=True, eq=False)
class Case:
    """One layer at one point: what a subject is given, and what its answer is judged by.

    x : (*lead, d_in), W : (d_out, d_in), b : (d_out,) or None, A : (r, d_in), B : (d_out, r)
    m : (d_out,) under DoRA, bB : (d_out,) with lora_bias, mask : as x, of 0 and 1/(1 − p), or None
    gy : (*lead, d_out), the gradient by y.  All NumPy arrays in the profile's dtype.
    config : LoraConfig, whose scaling is s;  train_b : whether the base bias is trained
    norm_gradient : under DoRA, whether the gradient runs through the norm
    dora, dropout : the conventions, as a Spec names them. Where dropout is post, mask is as y
    base_mask : a second mask as x, for the base product under k, where the form has one of its own
    """

    id: str
    kind: str
    config: LoraConfig
    x: HostArray
    W: HostArray
    A: HostArray
    B: HostArray
    gy: HostArray
    b: HostArray | None = None
    m: HostArray | None = None
    bB: HostArray | None = None
    mask: HostArray | None = None
    train_b: bool = False
    norm_gradient: bool = False
    dora: str = "peft"
    dropout: str = "pre"
    base_mask: HostArray | None = None

    @property
    def input_mask(self) -> HostArray | None:
        """The mask on the input of A, as x."""
        return self.mask if self.dropout == "pre" else None

    @property
    def output_mask(self) -> HostArray | None:
        """The mask on the update, as y."""
        return self.mask if self.dropout == "post" else None

    @property
    def product_mask(self) -> HostArray | None:
        """The mask on the input of DoRA's base product P, as x."""
        return {"peft": self.input_mask, "two_masks": self.base_mask}.get(self.dora)

    @property
    def scales_bias(self) -> bool:
        """Whether k multiplies b too."""
        return self.m is not None and self.dora == "scaled_bias"

    @property
    def scaling(self) -> float:
        """The factor s of the update."""
        return self.config.scaling

    @property
    def wanted(self) -> tuple[str, ...]:
        """Names of the arrays by which a gradient is asked; W's is judged where it is offered."""
        present = {"x": True, "A": True, "B": True, "m": self.m is not None}
        present |= {"b": self.train_b, "bB": self.bB is not None}
        return tuple(name for name, there in present.items() if there)

    def arrays(self) -> dict[str, HostArray]:
        """Every array that is there, by name."""
        fields = self.__dict__
        return {name: value for name in ARRAYS if (value := fields[name]) is not None}

    def undropped(self, p: float = 0.0) -> "Case":
        """The same layer with no mask; p : the rate that its configuration goes on naming."""
        return replace(self, mask=None, base_mask=None, config=replace(self.config, lora_dropout=p))

    def copy(self) -> "Case":
        """The same case in arrays of its own, so that a subject that writes into them harms only itself."""
        twin = object.__new__(type(self))  # what replace does, in a tenth of its time
        twin.__dict__.update(self.__dict__, **{name: value.copy() for name, value in self.arrays().items()})
        return twin


def draw(
    name: str,
    kind: str,
    shape: tuple[int, int, int, tuple[int, ...]],
    dtype: str,
    seed: tuple[int, ...],
    *,
    alpha: float = 3.7,
    p: float = 0.3,
    rslora: bool = False,
    lora_bias: bool = False,
    bias: str = "none",
    weight: HostArray | None = None,
    base_bias: HostArray | None = None,
) -> Case:
    """Draw one case. bias is absent, frozen or trained; weight and base_bias stand in for drawn ones."""
    d_out, d_in, r, lead = shape
    dora, dropout = kind.startswith("dora"), kind.endswith("dropout")
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=p if dropout else 0.0,
        bias="all" if bias == "trained" else "none",
        use_rslora=rslora,
        use_dora=dora,
        lora_bias=lora_bias and not dora,
    )
    _assert_distinct(config, p, lead)
    rng = np.random.default_rng(seed)

    def normal(*size: int, scale: float = 1.0) -> HostArray:
        return (scale * rng.standard_normal(size)).astype(dtype)

    W = normal(d_out, d_in) if weight is None else weight.astype(dtype)
    size = (
        float(np.sqrt(np.mean(np.square(W, dtype=np.float64)))) or 1.0
    )  # the update is of the weight's own size
    A, B = normal(r, d_in), normal(d_out, r, scale=size / (config.scaling * sqrt(r)))
    m = mask = b = None
    if dora:
        V = W.astype(np.float64) + config.scaling * B.astype(np.float64) @ A.astype(np.float64)
        m = (np.linalg.norm(V, axis=1) * rng.uniform(0.5, 2.0, d_out)).astype(dtype)
    if dropout:
        kept = rng.random((*lead, d_in)) >= p
        kept.reshape(-1)[:2] = False, True  # both values occur, however few elements there are
        mask = np.where(kept, 1 / (1 - p), 0.0).astype(dtype)
    if bias != "absent":
        b = normal(d_out, scale=size) if base_bias is None else base_bias.astype(dtype)
    return Case(
        id=name,
        kind=kind,
        config=config,
        x=normal(*lead, d_in),
        W=W,
        A=A,
        B=B,
        gy=normal(*lead, d_out),
        b=b,
        m=m,
        bB=normal(d_out, scale=size) if config.lora_bias else None,
        mask=mask,
        train_b=bias == "trained",
        norm_gradient="full" in kind,
    )


def under(case: Case, spec: Spec) -> Case:
    """The same layer under a subject's conventions, with masks of the shapes and on the places that they want.

    Those are made of the one that is there: columns of it for a mask as y, its entries moved on for a second.
    """
    case = replace(case, dora=spec.dora if case.m is not None else "peft", dropout=spec.dropout)
    mask = case.mask
    if mask is None:
        return case
    if case.dropout == "post":
        return replace(case, mask=mask[..., np.arange(case.W.shape[0]) % mask.shape[-1]])
    moved = np.roll(mask.reshape(-1), 1).reshape(mask.shape) if case.dora == "two_masks" else None
    return replace(case, base_mask=moved)


def _assert_distinct(config: LoraConfig, p: float, lead: tuple[int, ...]) -> None:
    """Two equal constants would let one error pass for another: refuse such a layer."""
    s, r, alpha, N = config.scaling, config.r, config.lora_alpha, int(np.prod(lead))
    constants = [s, s * s, 1 / s, 1 - p, 1 / (1 - p)]
    if r > 1:  # at rank 1 these are s, or 1, whoever computes them
        constants += [alpha, sqrt(r)] + [alpha / r] * config.use_rslora
    for one, other in combinations(sorted(constants), 2):
        if abs(one - other) < 1e-6 * abs(other) and N > 0:
            raise ValueError(f"alpha={alpha}, r={r}, p={p}: expected pairwise distinct constants")


def grid(
    battery: str,
    shapes: tuple[tuple[int, int, int, tuple[int, ...]], ...],
    profile: str,
    spec: Spec,
    seed: int,
    level: str,
) -> Iterator[Case]:
    """Every kind with every way to treat biases and scale, over the shapes in turn; when quick, a third."""
    i = 0
    for kind in KINDS:
        if kind.startswith("dora") and ("full" in kind) not in spec.norm_gradient:
            continue
        choices = product(("absent", "frozen", "trained"), (False, True), (False, True))
        if kind.startswith("dora"):
            choices = product(("absent", "frozen", "trained"), (False, True), (False,))
        for j, (bias, rslora, lora_bias) in enumerate(choices):
            i += 1
            if level == "quick" and j % 3 != len(kind) % 3:
                continue
            case = draw(
                f"{battery}/{kind.replace(', ', '-').replace(' ', '-')}/{j}",
                kind,
                shapes[i % len(shapes)],
                PROFILES[profile],
                (seed, i),
                alpha=ALPHAS[i % len(ALPHAS)],
                p=DROPS[i % len(DROPS)],
                bias=bias,
                rslora=rslora,
                lora_bias=lora_bias,
            )
            yield under(case, spec)
