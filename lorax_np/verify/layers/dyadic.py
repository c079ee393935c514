"""Integers times powers of two that know how wide their partial sums can get; and the layer worked in them."""

from dataclasses import dataclass
from math import frexp, prod

import numpy as np

from ..cases import Case, HostArray

ANY = 99  # the power of two that divides 0: none is too large
WIDEST = 62  # bits of a number in units of 2^−shift: int64 holds it, and the proof itself does not overflow


class TooWide(ArithmeticError):
    """A number takes more bits than were asked for."""


@dataclass(frozen=True, eq=False)
class Dyadic:
    """An array of dyadic rationals, exact.

    value : int64, in units of 2^−shift
    size : int64, in the same units: the sum of the absolute terms, which bounds every partial sum
    unit : int64, for each entry the exponent of a power of two of which all its terms are multiples
    bits : of the widest number met so far: log2(size/2^unit), at most                   (lattice.1)
    most : bits that may be met. Raises TooWide for more, OverflowError for a size of WIDEST bits or more
    """

    value: HostArray
    size: HostArray
    unit: HostArray
    shift: int
    bits: int = 0
    most: int = WIDEST

    def __post_init__(self) -> None:
        """Measure the widest entry."""
        if float(self.size.max(initial=0)) >= 2.0**WIDEST:
            raise OverflowError(f"size: expected less than 2**{WIDEST} units")
        steps = np.ldexp(self.size.astype(np.float64), -self.shift - np.minimum(self.unit, ANY))
        bits = max(self.bits, frexp(max(float(steps.max(initial=0.0)), 0.5))[1])
        if bits > self.most:
            raise TooWide(f"expected at most {self.most} bits, got {bits}")
        object.__setattr__(self, "bits", bits)

    @classmethod
    def of(cls, array: HostArray, most: int = WIDEST) -> "Dyadic":
        """Take floats as they are. Raises ValueError where one is no multiple of 2^−30."""
        wide = np.asarray(array, dtype=np.float64)
        if not np.isfinite(wide).all():
            raise ValueError("array: expected finite numbers")
        fraction, exponent = np.frexp(wide)
        whole = np.ldexp(fraction, 53).astype(np.int64)  # the number is whole·2^(exponent − 53)
        low = np.frexp((whole & -whole).astype(np.float64))[1]  # one more than the place of the lowest bit set
        unit = np.where(whole == 0, ANY, exponent + low.astype(np.int64) - 54)
        shift = max(0, -int(unit.min(initial=0)))
        if shift > 30:
            raise ValueError("array: expected multiples of 2**-30")
        value = np.ldexp(wide, shift).astype(np.int64)
        return cls(value, np.abs(value), unit, shift, most=most)

    def float(self) -> HostArray:
        """The numbers themselves."""
        return self.value * 2.0**-self.shift

    def _then(self, by: "Dyadic", value: HostArray, size: HostArray, unit: HostArray, shift: int) -> "Dyadic":
        """What comes of two, which may be as wide as both may."""
        return Dyadic(value, size, unit, shift, max(self.bits, by.bits), min(self.most, by.most))

    def _seen(self, change: str, *arguments: object) -> "Dyadic":
        """The same entries in another shape: there is nothing new to measure."""
        seen = object.__new__(Dyadic)
        parts = {part: getattr(getattr(self, part), change)(*arguments) for part in ("value", "size", "unit")}
        seen.__dict__.update(self.__dict__ | parts)
        return seen

    @property
    def T(self) -> "Dyadic":
        """Transposed."""
        return self._seen("transpose")

    def rows(self) -> "Dyadic":
        """Leading axes folded into one."""
        shape = self.value.shape
        return self._seen("reshape", prod(shape[:-1]), shape[-1])

    def column(self) -> "Dyadic":
        """(d,) as (d, 1)."""
        return self._seen("reshape", -1, 1)

    def __mul__(self, other: "Dyadic") -> "Dyadic":
        """Entry by entry."""
        parts = self.value * other.value, self.size * other.size, self.unit + other.unit
        return self._then(other, *parts, shift=self.shift + other.shift)

    def __add__(self, other: "Dyadic") -> "Dyadic":
        """Entry by entry; the terms of both count."""
        shift = max(self.shift, other.shift)
        a, b = 1 << (shift - self.shift), 1 << (shift - other.shift)
        parts = (
            a * self.value + b * other.value,
            a * self.size + b * other.size,
            np.minimum(self.unit, other.unit),
        )
        return self._then(other, *parts, shift=shift)

    def __matmul__(self, other: "Dyadic") -> "Dyadic":
        """A product of matrices: sizes multiply as absolute values do, units are the least of a sum's terms."""
        least = (self.unit[:, :, None] + other.unit[None]).min(axis=1, initial=2 * ANY)
        parts = self.value @ other.value, self.size @ other.size, least
        return self._then(other, *parts, shift=self.shift + other.shift)

    def sum(self) -> "Dyadic":
        """Over the first axis."""
        parts = self.value.sum(axis=0), self.size.sum(axis=0), self.unit.min(axis=0, initial=2 * ANY)
        return self._then(self, *parts, shift=self.shift)


def solve(case: Case, most: int = WIDEST) -> tuple[dict[str, HostArray], int]:
    """The exact answer, and how many bits the widest intermediate of any order of evaluation needs.

    Raises TooWide at the first intermediate of more than `most` bits.

    Every sub-product that an implementation may form is formed here, in integers, together with the sum of its
    absolute terms and the power of two that divides them all.
    """
    v = {name: Dyadic.of(value, most) for name, value in case.arrays().items()}
    W, A, B, s = v["W"], v["A"], v["B"], Dyadic.of(np.array(case.scaling))
    x, G = v["x"].rows(), v["gy"].rows()
    xd = x if case.input_mask is None else x * v["mask"].rows()
    xp = xd if case.dora == "peft" else x * v["base_mask"].rows() if case.product_mask is not None else x
    out = v["mask"].rows() if case.output_mask is not None else Dyadic.of(np.ones((1, 1)))
    Go = G * out  # what reaches the update
    BA, GX = s * (B @ A), s * (Go.T @ xd)  # the other orders: (xd(BA)ᵀ), gyᵀxd first
    z, V = s * (xd @ A.T), W + BA
    Q, y = (z @ B.T) * out, x @ W.T
    if "b" in v and not case.scales_bias:
        y = y + v["b"]
    gx, gW, seen = G @ W, G.T @ x, [BA, GX, V]
    found = {"b": G.sum()} if case.train_b else {}
    if case.m is None:
        gz = s * (Go @ B)
        back, side, gA, gB = gz @ A, None, gz.T @ xd, Go.T @ z
        y = y + Q
        if "bB" in v:
            y, found["bB"] = y + s * v["bB"] * out, s * Go.sum()
    else:
        P, square, n = xp @ W.T, (V * V).T.sum(), np.sqrt((V.float() ** 2).sum(axis=1))
        k = Dyadic.of(case.m.astype(np.float64) / n)
        over = k + Dyadic.of(np.array(-1.0))
        gz, whole = s * ((Go * k) @ B), P + Q
        back, side, gA, gB = gz @ A, (G * over) @ W, gz.T @ xd, (Go * k).T @ z
        y = y + over * P + k * Q
        gW = gW + (G * over).T @ xp
        if case.scales_bias and "b" in v:
            y, whole = y + k * v["b"], whole + v["b"]
            found |= {"b": (G * k).sum()} if case.train_b else {}
        gk = (G * whole).sum()
        seen += [] if case.dora == "peft" else [k * whole]
        found["m"] = gk * Dyadic.of(1 / n)
        seen.append(square)
        if case.norm_gradient:
            gV = (gk * Dyadic.of(-case.m.astype(np.float64) / n**3)).column() * Dyadic.of(V.float())
            gA, gB, gW = gA + s * (B.T @ gV), gB + s * (gV @ A.T), gW + gV
    if side is not None and case.dora != "peft":
        gx = gx + (side if case.product_mask is None else side * v["base_mask"].rows())
    elif side is not None:
        back = back + side
    gx = gx + (back if case.input_mask is None else back * v["mask"].rows())
    found |= {"y": y, "x": gx, "A": gA, "B": gB, "W": gW}
    shapes = {name: value.shape for name, value in case.arrays().items()} | {"y": case.gy.shape}
    want = {name: value.float().reshape(shapes[name]) for name, value in found.items()}
    return want, max(value.bits for value in (*found.values(), *seen, z, gz))
