"""AdamW over one flat buffer, in place and block by block: the bits of adamw_step.  See specs/optim.md."""

from typing import Any

from ..backend import Array, dtype_name, namespace_of
from ..errors import DtypeError, ShapeError
from ..tree import Layout, flatten, unflatten
from .adamw import adamw, factors
from .state import Rate, State, rate

BLOCK = 12_288  # numbers worked on at once: what is in between stays in a cache, and in memory that is kept
ON_DEVICE = 1 << 20  # on a device, where it is in memory: 40 MB, not half a gigabyte for 5 million parameters


def adamw_flat_start(p: Array) -> State:
    """Return the state before the first step of a flat buffer p : (size,): t, m and v, zeros like p."""
    if dtype_name(p) not in ("float32", "float64"):
        raise DtypeError(f"p: expected float32 or float64 to train, got {dtype_name(p)}")
    zeros_like = namespace_of(p=p).zeros_like
    return {"t": 0, "m": zeros_like(p), "v": zeros_like(p)}


def adamw_flat_step(
    p: Any,
    g: Array,
    state: State,
    *,
    where: Layout,
    lr: Rate,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Rate = 0.0,
    block: int | None = None,
) -> None:
    """One step of AdamW that writes over p and the state's m, v and t. Every bit is adamw_step's.

    p, g             : (size,) parameters and gradients in the layout's order
    lr, weight_decay : one number for all, or one for each of the layout's names
    block            : numbers worked on at once; None for 12288 on the host, a million on a device

    Source: specs/optim.md.

    >>> import numpy as np
    >>> from lorax_np.tree import layout
    >>> p = np.array([1.0, 2.0])
    >>> adamw_flat_step(p, np.array([0.5, -3.0]), adamw_flat_start(p), where=layout({"B": p}), lr=0.1)
    >>> p.round(6).tolist()
    [0.9, 2.1]
    """
    m, v = state["m"], state["v"]
    for name, x in (("p", p), ("g", g), ("m", m), ("v", v)):
        if tuple(x.shape) != (where.size,):
            raise ShapeError(f"{name}: expected ({where.size},), set by the layout, got {tuple(x.shape)}")
        if dtype_name(x) != dtype_name(p):
            raise DtypeError(f"{name}: expected {dtype_name(p)}, set by p, got {dtype_name(x)}")
    on_host = namespace_of(p=p, g=g, m=m, v=v).__name__ == "numpy"
    t = state["t"] + 1
    for a, b, rates in _stretches(where, lr, weight_decay):
        how, size = factors(t, *rates, betas, eps), block or (BLOCK if on_host else ON_DEVICE)
        for i in range(a, b, max(size, 1)):
            here = slice(i, min(i + size, b))
            p[here], m[here], v[here] = adamw(p[here], g[here], m[here], v[here], how)
    state["t"] = t


def _stretches(where: Layout, lr: Rate, weight_decay: Rate) -> list[tuple[int, int, tuple[float, float]]]:
    """Begin, end and rates of the stretches of the buffer that are stepped alike."""
    found: list[tuple[int, int, tuple[float, float]]] = []
    for name, a, b in zip(where.names, where.bounds, where.bounds[1:], strict=False):
        rates = rate(lr, name, "lr"), rate(weight_decay, name, "weight_decay")
        if found and found[-1][2] == rates:
            found[-1] = found[-1][0], b, rates
        else:
            found.append((a, b, rates))
    return found


def named_state(state: State, where: Layout) -> State:
    """Return a flat state as adamw_step's: t, and views as m.NAME, v.NAME."""
    named: State = {"t": state["t"]}
    for letter in ("m", "v"):
        named |= {f"{letter}.{name}": x for name, x in unflatten(state[letter], where).items()}
    return named


def flat_state(named: State, where: Layout) -> State:
    """Return adamw_step's state in flat buffers of their own, in the layout's order."""
    flat: State = {"t": named["t"]}
    for letter in ("m", "v"):
        flat[letter] = flatten({name: named[f"{letter}.{name}"] for name in where.names}, where)
    return flat
