"""Attention of heads that lie in rows, by the kernels, and as a twin of the operation of ops/.

Equations: specs/attention.md; how: specs/training_speed.md.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ...backend import dtype_name, from_host, namespace_of
from ...ops import attention as plain
from ...ops.attention import AttentionSaved, Rule, check
from ...ops.relative import Relative
from ...shapes import bind
from ..gpu_arrays import Device, contiguous, empty, functions_of, u32
from ..gpu_kernels import THREADS as BLOCK
from ..gpu_kernels import name_of
from . import attention_source
from .attention_source import THREADS, chunks_of, height_of

NO_WINDOW = 2**32 - 1


class Lie(NamedTuple):
    """Queries, keys and values of N rows, heads beside one another; they may be columns of one array."""

    q: Device  # (N, wide_q), queries from its first column on
    k: Device  # (N, wide_k), keys from column at_k on
    v: Device  # (N, wide_k), values from column at_v on
    at_k: int
    at_v: int


class Heads:
    """Attention of H query heads, of D columns each, on K key heads, in one dtype."""

    def __init__(self, lib: Any, dtype: str, H: int, K: int, D: int) -> None:
        """D has to fit a kernel of chunks_of."""
        size = np.dtype(dtype).itemsize
        C = chunks_of(D, size) or 0
        self.lib, self.type, self.H, self.K, self.D = lib, np.dtype(dtype).type, H, K, D
        names = tuple(name_of(name, dtype, str(C)) for name in attention_source.NAMES)
        self.kernels, self.height = functions_of(lib, attention_source.SOURCE, names), height_of(C, size)

    def forward(
        self, at: Lie, starts: Device, longest: int, *, scale: float, both: bool, window: int | None
    ) -> tuple[Device, Device]:
        """o : (N, H·D) and L : (N, H).

        starts : (S + 1,) uint32 on the device, the longest sequence's rows being known on the host
        both : whether keys after a query are seen too;  window : keys with t − s < window alone
        """
        N, rule = at.q.shape[0], (scale, both, window)
        o, L = (self.lib.empty((N, n), dtype=self.type) for n in (self.H * self.D, self.H))
        self._by_tile("attend", at, starts, longest, rule, o, L)
        return o, L

    def backward(
        self, g: Lie, go: Device, o: Device, L: Device, at: Lie, starts: Device, longest: int, **rule: Any
    ) -> None:
        """Write the gradients by q, k and v, which lie in g as those in at, from that by o : (N, H·D)."""
        N, how = at.q.shape[0], (rule["scale"], rule["both"], rule["window"])
        delta = self.lib.empty((N, self.H), dtype=self.type)
        parts = self.lib.empty((N, self.H, 2 * self.D), dtype=self.type)
        self._by_tile("attend_back_q", at, starts, longest, how, g.q, delta, go, o, L)
        self._by_tile("attend_back_kv", at, starts, longest, how, parts, delta, go, L)
        count = N * self.K * 2 * self.D
        if count:
            sizes = map(u32, (g.at_k, g.at_v, g.k.shape[1], self.H, self.K, self.D))
            arguments = (g.k, g.v, parts, *sizes, np.uint64(count))
            self.kernels["gather_kv"]((-(-count // BLOCK),), (BLOCK,), arguments)

    def _by_tile(self, name: str, at: Lie, starts: Device, longest: int, rule: Any, *arrays: Device) -> None:
        tiles, (scale, both, window) = -(-longest // self.height), rule
        if tiles:
            where = map(u32, (at.at_k, at.at_v, at.q.shape[1], at.k.shape[1]))
            seen = NO_WINDOW if window is None else window, both
            sizes = map(u32, (tiles, self.H, self.K, self.D, *seen))
            arguments = (*arrays, at.q, at.k, at.v, *where, starts, *sizes, self.type(scale))
            self.kernels[name]((tiles * self.H * (starts.shape[0] - 1),), (THREADS,), arguments)


@cache
def heads_of(lib: Any, dtype: str, H: int, K: int, D: int) -> Heads:
    """The functions for one shape; their kernels are compiled once."""
    return Heads(lib, dtype, H, K, D)


# ---- in the place of ops' ----------------------------------------------------------------------------------


def attention_forward(
    q: Any,
    k: Any,
    v: Any,
    *,
    starts: Sequence[int],
    key_starts: Sequence[int] | None = None,
    scale: float,
    causal: bool,
    window: int | None = None,
    relative: Relative | None = None,
    block: int = 128,
) -> tuple[Any, AttentionSaved]:
    """ops.attention_forward on a device, to rounding; arguments, results and errors as there.

    What the kernels do not have, a bias by distance or keys of other sequences, is computed by ops.
    """
    how: dict[str, Any] = {"scale": scale, "causal": causal, "window": window, "relative": relative}
    check(q, k, v, Rule(**how))
    if not _kernels_have(q, v, key_starts, relative):
        return plain.attention_forward(q, k, v, starts=starts, key_starts=key_starts, block=block, **how)
    N, H, D = q.shape
    bounds, longest = _bounds(starts, q, k)
    q, k, v = (contiguous(x) for x in (q, k, v))
    o, L = _heads(q, k).forward(_lie(q, k, v), bounds, longest, scale=scale, both=not causal, window=window)
    o = o.reshape(N, H, D)
    return o, AttentionSaved(q, k, v, o, L)


def attention_backward(
    go: Any,
    saved: AttentionSaved,
    *,
    starts: Sequence[int],
    key_starts: Sequence[int] | None = None,
    scale: float,
    causal: bool,
    window: int | None = None,
    relative: Relative | None = None,
    block: int = 128,
) -> tuple[Any, Any, Any, Any]:
    """Adjoint of attention_forward, as ops.attention_backward."""
    q, k, v, o, L = saved
    check(q, k, v, Rule(scale, causal, window, relative))
    bind(o=(o, "... H D"), go=(go, "... H D"))
    if not _kernels_have(q, v, key_starts, relative):
        how: dict[str, Any] = {"scale": scale, "causal": causal, "window": window, "relative": relative}
        return plain.attention_backward(go, saved, starts=starts, key_starts=key_starts, block=block, **how)
    bounds, longest = _bounds(starts, q, k)
    gq, gk, gv = (empty(x, x.shape, dtype_name(x)) for x in (q, k, v))
    go, o = (contiguous(x).reshape(x.shape[0], x.shape[1] * x.shape[2]) for x in (go, o))
    rule: dict[str, Any] = {"scale": scale, "both": not causal, "window": window}
    _heads(q, k).backward(_lie(gq, gk, gv), go, o, L, _lie(q, k, v), bounds, longest, **rule)
    return gq, gk, gv, None


def _kernels_have(q: Any, v: Any, key_starts: Sequence[int] | None, relative: Relative | None) -> bool:
    """Whether the kernels compute it: sequences that attend to themselves, heads of one width, no bias."""
    kind = dtype_name(q)
    if key_starts is not None or relative is not None or q.shape[2] != v.shape[2]:
        return False
    return kind in ("float32", "float64") and chunks_of(q.shape[2], np.dtype(kind).itemsize) is not None


def _heads(q: Any, k: Any) -> Heads:
    return heads_of(namespace_of(q=q), dtype_name(q), q.shape[1], k.shape[1], q.shape[2])


def _lie(q: Any, k: Any, v: Any) -> Lie:
    """Arrays (N, heads, D) as rows."""
    q, k, v = (x.reshape(x.shape[0], x.shape[1] * x.shape[2]) for x in (q, k, v))
    return Lie(q, k, v, 0, 0)


def _bounds(starts: Sequence[int], q: Any, k: Any) -> tuple[Device, int]:
    """Bounds of sequences on the device, and how long the longest is; those of queries are those of keys."""
    found = plain.bounds("starts", starts, q.shape[0])
    plain.bounds("key_starts", starts, k.shape[0])
    return _moved(namespace_of(q=q), tuple(found)), max((b - a for a, b in pairwise(found)), default=0)


@lru_cache(maxsize=8)
def _moved(lib: Any, starts: tuple[int, ...]) -> Device:
    """Bounds on the device; all layers of a step have the same."""
    return from_host(np.array(starts, "uint32"), lib)
