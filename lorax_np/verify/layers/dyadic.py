"""Integers times powers of two that know how wide their partial sums can get; and the layer worked in them."""

from dataclasses import dataclass, field

import numpy as np

from ..cases import Case, HostArray

ANY = 99  # the power of two that divides 0: none is too large


@dataclass(frozen=True, eq=False)
class Dyadic:
    """An array of dyadic rationals, exact.

    value : int64, in units of 2^−shift
    size : int64, in the same units: the sum of the absolute terms, which bounds every partial sum
    unit : int64, for each entry the exponent of a power of two of which all its terms are multiples
    bits : of the widest number met so far: log2(size/2^unit), at most                   (lattice.1)
    """

    value: HostArray
    size: HostArray
    unit: HostArray
    shift: int
    before: int = 0
    bits: int = field(init=False)

    def __post_init__(self) -> None:
        """Measure the widest entry; the proof itself must not overflow."""
        steps = self.size.astype(np.float64) * 2.0 ** (-self.shift - np.minimum(self.unit, ANY))
        widest = float(steps.max(initial=0.0))
        if float(self.size.max(initial=0)) >= 2.0**62:
            raise OverflowError("size: expected less than 2**62 units")
        object.__setattr__(self, "bits", max(self.before, int(np.floor(np.log2(max(widest, 0.5)))) + 1))

    @classmethod
    def of(cls, array: HostArray) -> "Dyadic":
        """Take floats as they are. Raises ValueError where one is no multiple of 2^−30."""
        wide = np.asarray(array, dtype=np.float64)
        shift = next((e for e in range(31) if np.all(wide * 2.0**e == np.rint(wide * 2.0**e))), None)
        if shift is None:
            raise ValueError("array: expected multiples of 2**-30")
        value = (wide * 2.0**shift).astype(np.int64)
        low = value & -value  # the lowest bit that is set
        unit = np.where(value == 0, ANY, np.log2(np.maximum(low, 1)).astype(np.int64) - shift)
        return cls(value, np.abs(value), unit, shift)

    def float(self) -> HostArray:
        """The numbers themselves."""
        return self.value * 2.0**-self.shift

    def _with(self, change: str, *arguments: object) -> "Dyadic":
        value, size, unit = (
            getattr(np, change)(part, *arguments) for part in (self.value, self.size, self.unit)
        )
        return Dyadic(value, size, unit, self.shift, self.bits)

    @property
    def T(self) -> "Dyadic":
        """Transposed."""
        return self._with("transpose")

    def rows(self) -> "Dyadic":
        """Leading axes folded into one."""
        shape = self.value.shape
        return self._with("reshape", (int(np.prod(shape[:-1])), shape[-1]))

    def column(self) -> "Dyadic":
        """(d,) as (d, 1)."""
        return self._with("expand_dims", 1)

    def __mul__(self, other: "Dyadic") -> "Dyadic":
        """Entry by entry."""
        parts = self.value * other.value, self.size * other.size, self.unit + other.unit
        return Dyadic(*parts, shift=self.shift + other.shift, before=max(self.bits, other.bits))

    def __add__(self, other: "Dyadic") -> "Dyadic":
        """Entry by entry; the terms of both count."""
        shift = max(self.shift, other.shift)
        a, b = 1 << (shift - self.shift), 1 << (shift - other.shift)
        parts = (
            a * self.value + b * other.value,
            a * self.size + b * other.size,
            np.minimum(self.unit, other.unit),
        )
        return Dyadic(*parts, shift=shift, before=max(self.bits, other.bits))

    def __matmul__(self, other: "Dyadic") -> "Dyadic":
        """A product of matrices: sizes multiply as absolute values do, units are the least of a sum's terms."""
        least = (self.unit[:, :, None] + other.unit[None]).min(axis=1, initial=2 * ANY)
        parts = self.value @ other.value, self.size @ other.size, least
        return Dyadic(*parts, shift=self.shift + other.shift, before=max(self.bits, other.bits))

    def sum(self) -> "Dyadic":
        """Over the first axis."""
        parts = self.value.sum(axis=0), self.size.sum(axis=0), self.unit.min(axis=0, initial=2 * ANY)
        return Dyadic(*parts, shift=self.shift, before=self.bits)


def solve(case: Case) -> tuple[dict[str, HostArray], int]:
    """The exact answer, and how many bits the widest intermediate of any order of evaluation needs.

    Every sub-product that an implementation may form is formed here, in integers, together with the sum of its
    absolute terms and the power of two that divides them all.
    """
    v = {name: Dyadic.of(value) for name, value in case.arrays().items()}
    W, A, B, s = v["W"], v["A"], v["B"], Dyadic.of(np.array(case.scaling))
    x, G = v["x"].rows(), v["gy"].rows()
    xd = x if case.input_mask is None else x * v["mask"].rows()
    xp = xd if case.dora == "peft" else x * v["base_mask"].rows() if case.product_mask is not None else x
    out = v["mask"].rows() if case.output_mask is not None else Dyadic.of(np.ones((1, 1)))
    Go = G * out  # what reaches the update
    BA, GX = s * (B @ A), s * (Go.T @ xd)  # the other orders: (xd(BA)ᵀ), gyᵀxd first
    z, V = s * (xd @ A.T), W + BA
    P, Q, y = xp @ W.T, (z @ B.T) * out, x @ W.T
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
        square, n = (V * V).T.sum(), np.sqrt((V.float() ** 2).sum(axis=1))
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
