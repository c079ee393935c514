"""The layer as an honest implementation computes it, in any profile and in many orders of evaluation.

Arrays are float64 that hold numbers of the profile's formats only. Products of stored numbers are exact in
float64 but for its own profile, so a sum is rounded where the profile says: by the hardware itself for float32
to nearest, by cutting bits after every single addition for the rest. That is the longest chain of roundings a
bfloat16 accumulator can have; hardware that adds in blocks has fewer.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..cases import Case, HostArray
from ..precision import Precision

_BITS = {2.0**-8: 8, 2.0**-11: 11, 2.0**-24: 24, 2.0**-53: 53}  # of the significand, by unit roundoff


def to_bits(value: HostArray, bits: int, toward_zero: bool = False) -> HostArray:
    """Round float64 numbers to a significand of so many bits: to nearest, ties to even, or toward zero.

    >>> import numpy as np
    >>> to_bits(np.array([1 + 2**-8, 1 + 3 * 2**-8]), 8).tolist(), to_bits(np.array([-1.999]), 8, True).tolist()
    ([1.0, 1.015625], [-1.9921875])
    """
    if bits >= 53:
        return np.asarray(value, dtype=np.float64)
    drop = 53 - bits
    word = np.ascontiguousarray(value, dtype=np.float64).view(np.uint64)
    if not toward_zero:
        word = word + np.uint64((1 << (drop - 1)) - 1) + ((word >> np.uint64(drop)) & np.uint64(1))
    return (word & np.uint64((1 << 64) - (1 << drop))).view(np.float64).reshape(np.shape(value))


@dataclass(frozen=True)
class Order:
    """One of the right ways to evaluate the layer.

    first : which product of three factors is formed first: "z" = xd Aᵀ and gz, or "BA" and gyᵀxd
    scale : where s is applied: to a result, or to A, B, gy, or to the mask
    sums : whole, in two halves, in blocks of tokens, or with the terms reversed
    fused : the update is added inside the accumulators of the base product
    reused : b is added first, and taken off where DoRA without a mask reads P from the base's output
    wide : everything in float64, results rounded once
    """

    first: Literal["z", "BA"] = "z"
    scale: Literal["result", "A", "B", "gy", "mask"] = "result"
    sums: Literal["whole", "halves", "blocks", "reversed"] = "whole"
    fused: bool = False
    reused: bool = False
    wide: bool = False


ORDERS: dict[str, Order] = {
    "z first": Order(),
    "BA first": Order("BA"),
    "s in A": Order(scale="A"),
    "s in B": Order(scale="B"),
    "s in gy": Order(scale="gy"),
    "s in the mask": Order(scale="mask"),
    "halves": Order(sums="halves"),
    "blocks": Order(sums="blocks"),
    "reversed": Order(sums="reversed", first="BA"),
    "fused": Order(fused=True, scale="B"),
    "b first": Order(reused=True),
    "wide": Order(wide=True),
}


class Machine:
    """Arithmetic of one profile and one way to sum."""

    def __init__(self, precision: Precision, order: Order) -> None:
        """Count the bits of what is summed, stored and multiplied."""
        self.p, self.sums = precision, order.sums
        self.wide = order.wide
        self.bits, self.store_bits = _BITS[precision.accumulate], _BITS[precision.store]
        self.operand_bits = _BITS[precision.operand] if precision.operand else 53
        self.truncates = precision.rounding == "toward zero"

    def stored(self, value: HostArray | float) -> HostArray:
        """A number as the profile stores an intermediate."""
        value = np.asarray(value, dtype=np.float64)
        return value if self.wide else self.result(value)

    def result(self, value: HostArray) -> HostArray:
        """A number in the dtype of the answer."""
        if self.p.dtype == "float16" and self.store_bits == 11:
            return value.astype(np.float16).astype(np.float64)
        return to_bits(value, self.store_bits)

    def constant(self, value: float) -> float:
        """A constant as arithmetic holds it: in the accumulator's format, at least float32."""
        return value if self.wide or self.bits == 53 else float(np.float32(value))

    def factors(self, mask: HostArray, s: float) -> HostArray:
        """A mask that holds s too, as arithmetic holds constants."""
        return mask * s if self.wide else to_bits(mask * s, max(self.bits, 24))

    def add(self, value: HostArray, other: HostArray) -> HostArray:
        """One addition in an accumulator."""
        return to_bits(value + other, self.bits, self.truncates)

    def matmul(self, a: HostArray, b: HostArray, start: HostArray | None = None) -> HostArray:
        """The sum of products, rounded after each addition, and not yet stored."""
        if self.wide:
            out: HostArray = a @ b if start is None else start + a @ b
            return out
        a, b = to_bits(a, self.operand_bits), to_bits(b, self.operand_bits)
        if self.sums == "reversed":
            a, b = np.ascontiguousarray(a[:, ::-1]), np.ascontiguousarray(b[::-1])
        if self.sums == "halves" and a.shape[1] > 1:
            half = a.shape[1] // 2
            out = self.add(self._product(a[:, :half], b[:half], start), self._product(a[:, half:], b[half:]))
        elif self.sums == "blocks" and a.shape[1] > 3:
            out = self._product(a[:, :3], b[:3], start)
            for at in range(3, a.shape[1], 3):
                out = self.add(out, self._product(a[:, at : at + 3], b[at : at + 3]))
        else:
            out = self._product(a, b, start)
        return out

    def _product(self, a: HostArray, b: HostArray, start: HostArray | None = None) -> HostArray:
        if self.bits == 53:
            out: HostArray = a @ b if start is None else start + a @ b
        elif self.bits == 24 and not self.truncates and start is None:
            out = (a.astype(np.float32) @ b.astype(np.float32)).astype(np.float64)
        else:
            out = np.zeros((a.shape[0], b.shape[1])) if start is None else start
            for i in range(a.shape[1]):
                out = self.add(out, a[:, i : i + 1] * b[i])
        return out

    def total(self, value: HostArray, axis: int) -> HostArray:
        """A sum along one axis."""
        value = value if axis == 0 else value.T
        operand, self.operand_bits = self.operand_bits, 53
        out: HostArray = self.matmul(np.ones((1, len(value))), value)[0]
        self.operand_bits = operand
        return out

    def squares(self, V: HostArray) -> HostArray:
        """Sums of squares by rows; in float16, which ends at 65504, they stay in the accumulator's format."""
        if self.p.dtype == "float16":
            return self.total(V * V, 1)
        return self.stored(self.total(self.stored(V * V), 1))


def layer(case: Case, precision: Precision, order: Order) -> tuple[HostArray, dict[str, HostArray]]:
    """y and all gradients of a case as float64 arrays of the profile's numbers."""
    v = {name: value.astype(np.float64) for name, value in case.arrays().items()}
    machine = Machine(precision, order)
    x, G = (v[name].reshape(-1, v[name].shape[-1]) for name in ("x", "gy"))
    y, found = _evaluate(machine, order, case, v, x, G)
    found = {name: machine.result(value) for name, value in found.items()}
    found["x"] = found["x"].reshape(case.x.shape)
    return machine.result(y).reshape(case.gy.shape), found


def _evaluate(  # the whole layer, line by line: a stored array is q(...), a product at(...)
    machine: Machine,
    order: Order,
    case: Case,
    v: dict[str, HostArray],
    x: HostArray,
    G: HostArray,
) -> tuple[HostArray, dict[str, HostArray]]:
    q, at, dora = machine.stored, machine.matmul, "m" in v
    W, A, B, s = v["W"], v["A"], v["B"], machine.constant(case.scaling)
    mask, other, out = (
        None if value is None else value.astype(np.float64).reshape(len(x), value.shape[-1])
        for value in (case.input_mask, case.product_mask, case.output_mask)
    )
    xd = x if mask is None else q(x * mask)
    xp = xd if case.dora == "peft" else x if other is None else q(x * other)
    where = order.scale
    xs = q(x * (s if mask is None else machine.factors(mask, s))) if where == "mask" else xd
    As, Bs = (q(s * A) if where == "A" else A), (q(s * B) if where == "B" else B)
    rest = 1.0 if where in ("A", "B", "mask") else s  # what is left to apply to a result
    D = q(s * q(at(B, A))) if order.first == "BA" or dora else np.zeros_like(W)

    # ---- forward
    base = at(x, W.T)
    k = c = np.ones(len(W))
    first = order.reused and "b" in v and not case.scales_bias
    taken_off = first and dora and other is None
    if order.fused and not dora and out is None:
        z = q(at(xs, As.T))
        y = at(z, Bs.T, base)
    else:
        y0 = q(q(base) + v["b"]) if first else q(base)
        if order.first == "BA":
            z, L = np.zeros((len(x), len(A))), q(at(xd, D.T))
        else:
            z = q(at(xs, As.T))
            L = q(rest * q(at(z, Bs.T)))
        L = L if out is None else q(L * out)
        y = q(y0 + L)
    if dora:
        V = q(W + D)
        n = q(np.sqrt(machine.squares(V)))
        k = q(v["m"] / n)
        c = q(q(v["m"] - n) / n) if where == "result" else q(k - 1)
        P = q(at(xp, W.T)) if other is not None else q(y0 - v["b"]) if taken_off else y0
        P = q(P + v["b"]) if case.scales_bias and "b" in v else P
        if other is None and where == "gy":
            y = q(k * q(P + L))
        elif order.sums == "reversed":
            y = q(q(y0 + q(c * P)) + q(k * L))
        else:
            y = q(y0 + q(q(c * P) + q(k * L)))
    if "bB" in v:
        y = q(y + q(q(s * v["bB"]) * (1.0 if out is None else out)))
    if "b" in v and not first and not (case.scales_bias and other is None and where == "gy"):
        y = q(y + v["b"])

    # ---- backward
    Gk = q(G * k) if dora else G
    scaled, Gk = Gk, Gk if out is None else q(Gk * out)
    gu = q(s * Gk) if where == "gy" else Gk
    rest = 1.0 if where == "gy" else rest
    found: dict[str, HostArray] = {}
    if order.first == "BA":
        M = q(at(Gk.T, xd))
        gB, gA, lo = q(s * q(at(M, A.T))), q(s * q(at(B.T, M))), q(at(Gk, D))
    else:
        gz = q(at(gu, Bs))
        gB = q(at(gu.T, z)) if where in ("A", "mask", "gy") else q(s * q(at(gu.T, z)))
        gA = q(at(gz.T, xs)) if where in ("B", "mask", "gy") else q(s * q(at(gz.T, xd)))
        lo = q(at(gz, As)) if where in ("A", "B", "gy", "mask") else q(s * q(at(gz, A)))
    back = np.ones(1) if mask is None else mask
    if where == "mask":
        back = machine.factors(back, s)
    base = at(G, W)
    if taken_off:
        Gb = q(G * c)  # by P, which goes back into the base's output
        Gy = q(G + Gb)
        gx = q(q(at(Gy, W)) + q(back * lo))
    elif order.fused and not dora and mask is None:
        gx = at(gz, As, base)
    elif dora:
        side = q(at(q(G * c), W))
        plain = 1.0 if other is None else other
        gx = q(q(base) + q(q(plain * side) + q(back * lo)))
    else:
        gx = q(q(base) + q(back * lo))
    found["x"], found["W"] = gx, q(at(G.T, x))
    if dora:
        if taken_off:
            found["W"] = q(at(Gy.T, x))
        else:
            found["W"] = q(found["W"] + q(at(q(G * c).T, xp)))
        gk = q(machine.total(q(G * q(P + L)), 0))
        if order.first == "BA" and case.dora == "peft" and out is None:
            gk = q(machine.total(q(q(at(G.T, xd)) * V), 1))
        found["m"] = q(gk / n)
        if case.norm_gradient:
            gn = q(q(-found["m"] * v["m"]) / n)
            gV = q(q(gn / n)[:, None] * V)
            found["W"] = q(found["W"] + gV)
            gA = q(gA + (q(at(Bs.T, gV)) if where == "B" else q(s * q(at(B.T, gV)))))
            gB = q(gB + (q(at(gV, As.T)) if where == "A" else q(s * q(at(gV, A.T)))))
    found |= {"A": gA, "B": gB}
    if case.train_b:
        found["b"] = q(machine.total(scaled if case.scales_bias else G, 0))
        if taken_off:
            found["b"] = q(q(machine.total(Gy, 0)) - q(machine.total(Gb, 0)))
    if "bB" in v:
        Go = G if out is None else q(G * out)
        found["bB"] = machine.total(q(s * Go), 0) if where == "gy" else q(s * q(machine.total(Go, 0)))
    return y, found
