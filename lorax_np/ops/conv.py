"""A convolution's windows as rows, its groups as blocks: what makes it linear.  Derivation: specs/conv.md."""

from math import prod
from typing import Any, NamedTuple

from ..backend import Array, from_host, namespace_of
from ..errors import ShapeError
from ..shapes import bind


class Window(NamedTuple):
    """How a kernel moves over 1 to 3 axes, one number an axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]  # entries of padding
    after: tuple[int, ...]
    mode: str = "zeros"  # zeros, reflect, replicate or circular

    def stops(self, axis: int, length: int) -> int:
        """At how many places the kernel stands on an axis of that length.  (conv.1)"""
        room = length + self.before[axis] + self.after[axis] - self.dilation[axis] * (self.kernel[axis] - 1)
        return (room - 1) // self.stride[axis] + 1

    def places(self, axis: int, length: int) -> list[int]:
        """For each place, and each entry of the kernel there, the entry of x it meets; `length` for a zero.

        Raises ShapeError where the kernel does not fit, or where the padding wants more than there is.
        """
        count, kernel = self.stops(axis, length), self.kernel[axis]
        if count < 1:
            least = self.dilation[axis] * (kernel - 1) + 1 - self.before[axis] - self.after[axis]
            raise ShapeError(f"x: expected at least {least} entries on spatial axis {axis}, got {length}")
        least = max(self.before[axis], self.after[axis]) + (self.mode == "reflect")
        if self.mode in ("reflect", "circular") and length < least:
            wanted = f"at least {least} entries on spatial axis {axis} for padding_mode={self.mode}"
            raise ShapeError(f"x: expected {wanted}, got {length}")
        found = []
        for p in range(count):
            for t in range(kernel):
                j = p * self.stride[axis] + t * self.dilation[axis] - self.before[axis]  # (conv.2)
                found.append(self._inside(j, length))
        return found

    def _inside(self, j: int, length: int) -> int:
        """The entry that stands at place j of the padded axis.  (conv.3)"""
        if 0 <= j < length:
            return j
        if self.mode == "reflect":
            return -j if j < 0 else 2 * (length - 1) - j
        if self.mode == "replicate":
            return 0 if j < 0 else length - 1
        return j % length if self.mode == "circular" else length


def cols_forward(x: Array, window: Window) -> Array:
    """The windows of x as rows: (..., d_in, *L) -> (..., *P, d_in·∏κ).

    A convolution is then a linear map of rows, y = cols Wᵀ with W : (d_out, d_in·∏κ).
    x may be of any dtype, 16-bit ones included: nothing is computed. Raises ShapeError as Window.places.
    Source: specs/conv.md.

    >>> import numpy as np
    >>> cols_forward(np.array([[1.0, 2.0, 3.0]]), Window((2,), (1,), (1,), (1,), (0,))).tolist()
    [[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]
    """
    k = len(window.kernel)
    lead, d_in, L = _split(x, k)
    xp = namespace_of(x=x)
    cols = xp.reshape(x, (prod(lead), d_in, *L))
    for axis in range(k):
        cols = gather_forward(cols, window.places(axis, L[axis]), axis + 2)  # (conv.4)
    P = tuple(window.stops(axis, L[axis]) for axis in range(k))
    both = tuple(size for pair in zip(P, window.kernel, strict=True) for size in pair)
    cols = xp.reshape(cols, (prod(lead), d_in, *both))
    cols = xp.permute_dims(cols, (0, *range(2, 2 * k + 2, 2), 1, *range(3, 2 * k + 2, 2)))  # (conv.5)
    found: Array = xp.reshape(cols, (*lead, *P, d_in * prod(window.kernel)))
    return found


def cols_backward(gcols: Array, window: Window, L: tuple[int, ...]) -> Array:
    """Adjoint of cols_forward: gcols : (..., *P, d_in·∏κ) -> gx : (..., d_in, *L).

    Every entry of x gets the sum over the windows that hold it, in the order of the windows, one axis after
    another: the bits depend on the arguments alone.
    """
    k, size = len(window.kernel), prod(window.kernel)
    P = tuple(window.stops(axis, L[axis]) for axis in range(k))
    lead, d_in = gcols.shape[: len(gcols.shape) - k - 1], gcols.shape[-1] // size
    if gcols.shape[len(lead) : -1] != P or gcols.shape[-1] % size:
        raise ShapeError(f"gcols: expected (..., *{P}, d_in·{size}), set by L={L}, got {tuple(gcols.shape)}")
    xp = namespace_of(gcols=gcols)
    gx = xp.reshape(gcols, (prod(lead), *P, d_in, *window.kernel))
    gx = xp.permute_dims(gx, (0, k + 1, *(a for i in range(k) for a in (i + 1, k + 2 + i))))  # (conv.6)
    both = tuple(p * t for p, t in zip(P, window.kernel, strict=True))
    gx = xp.reshape(gx, (prod(lead), d_in, *both))
    for axis in reversed(range(k)):
        gx = gather_backward(gx, window.places(axis, L[axis]), axis + 2, L[axis])
    found: Array = xp.reshape(gx, (*lead, d_in, *L))
    return found


def gather_forward(x: Array, places: list[int], axis: int) -> Array:
    """Entries of x along one axis, in the order of places; a place past the end stands for a zero.  (conv.4)"""
    xp, length = namespace_of(x=x), x.shape[axis]
    if max(places) >= length:
        x = xp.concat([x, _zeros(x, axis)], axis=axis)
    found: Array = xp.take(x, _index(places, x), axis=axis)
    return found


def gather_backward(gy: Array, places: list[int], axis: int, length: int) -> Array:
    """Adjoint of gather_forward: each entry of x gets the sum of what was taken from it, in order.  (conv.7)

    The entries are turned round: for each of x, the list of those that hold it. The first column of these
    lists is taken, then the second is added, and so on; a list that has ended brings a zero.
    """
    xp, end = namespace_of(gy=gy), len(places)
    lists: list[list[int]] = [[] for _ in range(length + 1)]
    for j, place in enumerate(places):
        lists[place].append(j)
    lists.pop()  # of the zero, which has no gradient
    gy = xp.concat([gy, _zeros(gy, axis)], axis=axis)
    gx: Array = xp.take(gy, _index([(*one, end)[0] for one in lists], gy), axis=axis)
    for i in range(1, max(len(one) for one in lists)):
        gx = gx + xp.take(gy, _index([one[i] if i < len(one) else end for one in lists], gy), axis=axis)
    return gx


def blocks_forward(W: Array, groups: int) -> Array:
    """Weights of groups as one matrix, blocks along its diagonal: (d_out, d) -> (d_out, groups·d).  (conv.8)

    A grouped map is then an ungrouped one, whose weight is 0 where output and input are of different groups.
    Source: specs/conv.md.

    >>> import numpy as np
    >>> blocks_forward(np.array([[1.0], [2.0]]), 2).tolist()
    [[1.0, 0.0], [0.0, 2.0]]
    """
    if groups == 1:
        return W
    d_out, d = W.shape
    xp = namespace_of(W=W)
    W = xp.reshape(W, (groups, d_out // groups, 1, d))
    dense: Array = xp.where(_same_group(groups, W), W, xp.zeros_like(W))  # (groups, d_out/groups, groups, d)
    return xp.reshape(dense, (d_out, groups * d))  # type: ignore[no-any-return]


def blocks_backward(gW: Array, groups: int) -> Array:
    """Adjoint of blocks_forward, which takes the blocks out: (d_out, groups·d) -> (d_out, d).  (conv.9)"""
    if groups == 1:
        return gW
    o, d = gW.shape[0] // groups, gW.shape[1] // groups
    own = [gW[g * o : (g + 1) * o, g * d : (g + 1) * d] for g in range(groups)]
    found: Array = namespace_of(gW=gW).concat(own, axis=0)
    return found


def _split(x: Array, k: int) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """The leading axes of x, its channels, and its k spatial axes."""
    bind(x=(x, " ".join(("... d_in", "l0", "l1", "l2")[: k + 1])))
    shape = tuple(x.shape)
    return shape[: len(shape) - k - 1], shape[len(shape) - k - 1], shape[len(shape) - k :]


def _zeros(x: Array, axis: int) -> Array:
    """One slice of zeros of x along an axis."""
    found: Array = namespace_of(x=x).zeros_like(x[(slice(None),) * axis + (slice(0, 1), ...)])
    return found


def _index(numbers: Any, like: Array) -> Array:
    found: Array = from_host(numbers, like)
    return found


def _same_group(groups: int, like: Array) -> Array:
    """(groups, 1, groups, 1), true where both are the same."""
    found: Array = from_host([[[[i == j] for j in range(groups)]] for i in range(groups)], like)  # type: ignore
    return found
