"""An adapter's update as a matrix laid like the stored weight, some rows at a time.  specs/checkpoints.md.

The sums are those of lorax_np.merge, in float64 and in its order, so that the bits are its bits.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from math import frexp, prod
from typing import Any, NamedTuple

import numpy as np

from ..backend import HostArray, cast, quiet, to_host
from ..config import Site
from ..errors import BackendError, ConfigError, ShapeError
from ..fast.cblas import Multiply
from ..fast.gemm import blas
from ..ops.dora import row_norm_forward
from ..params import AnyAdapter, check_direction

WIDE = "float64"
HALF = 0x8000  # half an ulp of bfloat16, in the bits of a float32
OVER = np.float32((2 - 2.0**-8) * 2.0**127)  # from here on bfloat16 has infinity
LARGE = np.float32(1e38)  # a sum of squares below it has no term, and so no entry, at which bfloat16 ends
ALL_PAST = np.uint64(0x0101010101010101)  # eight bools, all true
DEEPEST = 128  # rank up to which a product is one sum for every BLAS, and so may be added where it is made
MANY = 100  # entries midway in one block, from which on all of it is rounded again at once


class Part(NamedTuple):
    """Rows of the stored weight whose update is one product: s·LR."""

    start: int
    stop: int
    L: HostArray  # (stop - start, r)
    R: HostArray  # (r, cols)


@dataclass(frozen=True, eq=False, slots=True)
class Update:
    """The update of one stored weight, seen as (rows, cols).

    s : float         s = α/r or α/√r; negative to take the update out
    m : (rows,) or (cols,), or None   DoRA's magnitude, of the rows where by_rows, else of the columns
    """

    site: str
    parts: tuple[Part, ...]
    s: float
    m: HostArray | None
    by_rows: bool

    def add(self, V: HostArray, first: int, scratch: "Scratch") -> None:
        """V ← V + s·LR : (rows, cols) float64; V begins at that row of the weight."""
        for part in self.parts:
            a, b = max(first, part.start), min(first + len(V), part.stop)
            if a < b:
                L = part.L[a - part.start : b - part.start].astype(WIDE)
                here, R = V[a - first : b - first], _wide(part.R)
                exact = frexp(abs(self.s))[0] == 0.5  # a power of two may be on either side of the product
                if exact and min(here.shape) > 1 and len(R) <= DEEPEST and (add := adding()) is not None:
                    add(self.s * L, R, here, 1.0, 1.0)  # (merge.1)
                    continue
                product = scratch("D", here.shape, WIDE)
                np.matmul(self.s * L if exact else L, R, out=product)
                if not exact:
                    np.multiply(product, self.s, out=product)
                np.add(here, product, out=here)  # (merge.1)

    def scale_rows(self, V: HostArray, first: int) -> None:
        """V ← (m/n)∘V by rows, n the norms of V: (merge.2), where each row is whole."""
        if self.m is not None and self.by_rows:
            with np.errstate(all="ignore"):
                n = to_host(row_norm_forward(V))
            if np.isnan(n).any():  # of a row of zeros, or of one that is not finite, which is refused later
                try:
                    check_direction(V)
                except ConfigError as error:
                    raise ConfigError(f"{self.site}: rows from {first} on: {error}") from None
            k = self.m[first : first + len(V)].astype(WIDE) / n
            np.multiply(k[:, None], V, out=V)

    def ratio_of_columns(self, blocks: "Blocks") -> HostArray | None:
        """k = m/n by columns, which takes all rows, twice; None where there is nothing to scale so."""
        if self.m is None or self.by_rows:
            return None
        largest = np.zeros(len(self.m))
        for V in blocks():
            np.maximum(largest, np.abs(V).max(axis=0), out=largest)  # (dora.1)
        if not largest.all():
            zero = np.flatnonzero(largest == 0)
            raise ConfigError(
                f"{self.site}: W + s·BA: expected a direction in every output under DoRA, "
                f"got {len(zero)} of zeros, the first at {zero[0]}"
            )
        squares = np.zeros(len(self.m))
        for V in blocks():
            squares += ((V / largest) ** 2).sum(axis=0)
        return np.asarray(self.m.astype(WIDE) / (largest * np.sqrt(squares)))


@cache
def adding() -> Multiply | None:
    """What adds a product to an array in one call; None where its bits may not be those of matmul and add."""
    try:
        with blas("openblas") as engine:
            multiply = engine.multiply
    except BackendError:
        return None
    draw = np.random.default_rng(0).standard_normal
    for m, r, n in ((8, 1, 33), (41, 16, 130), (16, DEEPEST, 64)):
        L, R, V = draw((m, r)), draw((r, n)), draw((m, n))
        want = V + L @ R
        multiply(L, R, V, 1.0, 1.0)
        if not np.array_equal(V, want):
            return None
    return multiply


class Blocks:
    """All rows of W + s·BA, from the start as often as they are asked for."""

    def __init__(self, make: Any) -> None:
        """Take what makes an iterator over them."""
        self._make = make

    def __call__(self) -> Iterable[HostArray]:
        """From the first row again."""
        found: Iterable[HostArray] = self._make()
        return found


def matrix_shape(shape: tuple[int, ...], kind: str) -> tuple[int, int]:
    """How a stored weight is seen: experts one below the other, a kernel beside its channels."""
    if kind == "experts" and len(shape) == 3:
        return shape[0] * shape[1], shape[2]
    return shape[0], prod(shape[1:])


def update_of(adapter: AnyAdapter, site: Site, shape: tuple[int, ...], *, sign: float = 1.0) -> Update | None:
    """Lay out an adapter's update as its weight is stored; None where it has no A and B.

    shape : of the stored weight

    Raises ShapeError where the factors do not fit that shape, naming the site; ConfigError for a convolution
    in groups, whose update has no place in the weight.
    """
    if adapter.A is None or adapter.B is None:
        return None
    A, B, s = to_host(adapter.A), to_host(adapter.B), sign * site.scaling
    m = None if adapter.m is None else to_host(adapter.m)
    if site.kind == "experts" and len(shape) == 3:
        return Update(site.name, _experts(A, B, site, shape), s, m, True)
    turned = site.kind == "embedding" or site.transposed
    if site.kind == "conv":
        if A.shape[1:] != shape[1:] and A.shape[2:] == shape[2:]:
            raise ConfigError(
                f"{site.name}: groups: expected 1 to merge, since the update reaches channels of all groups, "
                f"got {A.shape[1] // max(shape[1], 1)}"
            )
        A, B = A.reshape(len(A), -1), B.reshape(len(B), -1)
    rows, cols = matrix_shape(shape, site.kind)
    d_out, d_in = (cols, rows) if turned else (rows, cols)
    _fit(site, "A", A, (B.shape[1], d_in))
    _fit(site, "B", B, (d_out, A.shape[0]))
    L, R = (A.T, B.T) if turned else (B, A)
    return Update(site.name, (Part(0, rows, L, _wide(R)),), s, m, not turned)


def _experts(A: HostArray, B: HostArray, site: Site, shape: tuple[int, ...]) -> tuple[Part, ...]:
    """A : (E·r, d_in) holds expert after expert, B : (d_out, r·E) one column of each expert in turn."""
    E, rows, cols = shape
    d_out, d_in = (cols, rows) if site.transposed else (rows, cols)
    r = len(A) // E
    _fit(site, "A", A, (r * E, d_in))
    _fit(site, "B", B, (d_out, r * E))
    parts = []
    for e in range(E):
        A_e, B_e = A[e * r : (e + 1) * r], B[:, e::E]
        L, R = (A_e.T, B_e.T) if site.transposed else (B_e, A_e)
        parts.append(Part(e * rows, (e + 1) * rows, L, R))
    return tuple(parts)


def _fit(site: Site, name: str, array: HostArray, want: tuple[int, ...]) -> None:
    if array.shape != want:
        raise ShapeError(f"{site.name}: {name}: expected {want}, set by {site.weight}, got {array.shape}")


def _wide(x: HostArray) -> HostArray:
    return np.ascontiguousarray(to_numpy(x, WIDE))


# ---- one rounding ------------------------------------------------------------------------------------------


class Scratch:
    """Memory for one thread's blocks, made once: fresh memory for each would cost more than the sums in it."""

    def __init__(self) -> None:
        """Nothing yet; each purpose gets its memory when it first asks."""
        self._arrays: dict[str, HostArray] = {}

    def __call__(self, what: str, shape: tuple[int, int], dtype: Any) -> HostArray:
        """An array for one purpose, which holds whatever it held. A purpose has one dtype."""
        count = shape[0] * shape[1]
        flat = self._arrays.get(what)
        if flat is None or flat.size < count or flat.dtype != dtype:
            flat = self._arrays[what] = np.zeros(-(-count // 8) * 8, dtype)
        return flat[:count].reshape(shape)

    def eights(self, what: str, count: int) -> HostArray:
        """So many bytes of a purpose, eight at a time; those past the count are set to 1."""
        flat, whole = self._arrays[what], -(-count // 8) * 8
        flat[count:whole] = 1
        return flat[:whole].view(np.uint64)


def rounded(V: HostArray, dtype: str, where: str, scratch: Scratch, *, new_only: bool = False) -> HostArray:
    """V : (rows, cols) float64 in a stored dtype, rounded once, as lorax_np.backend.cast does.

    The result may lie in the scratch, or be V itself. Raises ConfigError where an entry is not finite; with
    new_only, where it was in V.
    """
    with quiet():
        if dtype == WIDE:
            found = V
        elif dtype == "bfloat16":
            finite = _to_bfloat16(V, scratch)
            if finite is not None:
                return finite
            found = to_numpy(V, dtype)
        else:
            found = scratch("found", V.shape, dtype)
            np.copyto(found, V, casting="unsafe")
    if not _finite(found, scratch) and not (new_only and _as_finite(found, V)):
        raise ConfigError(f"{where}: expected finite numbers, got NaN or infinity")
    return found


def _to_bfloat16(V: HostArray, scratch: Scratch) -> HostArray | None:
    """V in bfloat16, the upper half of a float32: half an ulp is added, and the lower half cut off.

    None where an entry is not finite, or would round to infinity.

    Two roundings, to float32 and on, differ from one only where the first ends midway between two numbers of
    bfloat16. Half an ulp lifts those to a lower half of zeros; they, with their neighbours, are rounded again,
    to odd first.
    """
    near, found = scratch("near", V.shape, np.float32), scratch("found", V.shape, bfloat16())
    past = scratch("past", V.shape, np.bool_)  # whether the lower half is more than 0
    bits = near.view(np.uint32)
    np.copyto(near, V, casting="unsafe")
    flat = near.reshape(-1)
    if not np.dot(flat, flat) < LARGE and not (flat.max(initial=0.0) < OVER and flat.min(initial=0.0) > -OVER):
        return None  # NaN is not less either
    np.add(bits, HALF, out=bits)
    np.bitwise_and(bits, 0xFFFF, out=past, dtype=np.uint32, casting="unsafe")
    np.right_shift(bits, 16, out=found.view(np.uint16), dtype=np.uint32, casting="unsafe")
    eights = np.flatnonzero(scratch.eights("past", V.size) != ALL_PAST)
    if len(eights) > MANY:
        return to_numpy(V, "bfloat16")
    if len(eights):
        places = (eights[:, None] * 8 + np.arange(8)).reshape(-1)
        places = places[places < V.size]
        found.reshape(-1)[places] = to_numpy(V.reshape(-1)[places], "bfloat16")
    return found


def _finite(x: HostArray, scratch: Scratch) -> bool:
    """Whether x holds neither NaN nor infinity."""
    if x.itemsize > 2:
        return bool(np.isfinite(x.max(initial=0.0)) and np.isfinite(x.min(initial=0.0)))
    ones = 0x7C00 if x.dtype == np.float16 else 0x7F80  # an exponent of all ones
    powers = np.bitwise_and(x.view(np.uint16), ones, out=scratch("powers", x.shape, np.uint16))
    return int(powers.max(initial=0)) < ones


def _as_finite(x: HostArray, V: HostArray) -> bool:
    """Whether x is finite wherever V is."""
    return bool((np.isfinite(to_numpy(x, WIDE)) == np.isfinite(V)).all())


@cache
def bfloat16() -> np.dtype[Any]:
    """The dtype, of ml_dtypes. Raises DtypeError without that package."""
    return to_numpy(np.zeros(0), "bfloat16").dtype


def to_numpy(x: HostArray, dtype: str) -> HostArray:
    """x in a stored dtype."""
    found: Any = cast(x, dtype)
    return np.asarray(found)
