"""AdamW: decay apart from the gradient, two running means, bias corrections.  Derivation: specs/optim.md."""

from collections.abc import Mapping
from math import prod, sqrt
from typing import Any, NamedTuple

from ..backend import Array, namespace_of
from ..errors import ConfigError
from ..tree import Leaves
from .state import PART, Rate, State, check_gradients, fma, rate, zeros


def adamw_start(params: Mapping[str, Array]) -> State:
    """Return AdamW's state before its first step: t = 0 and zeros as m.NAME, v.NAME like each parameter.

    Raises DtypeError for parameters in other dtypes than float32 and float64.
    """
    return zeros(params, "m", "v")


def adamw_step(
    params: Mapping[str, Array],
    grads: Mapping[str, Array],
    state: State,
    *,
    lr: Rate,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Rate = 0.0,
) -> tuple[Leaves, State]:
    """One step of AdamW: new parameters and a new state; nothing is written to.

    params, grads    : arrays by name; a parameter without a gradient stays as it is, its state too
    lr, weight_decay : one number for all, or one for each name

    float32 is stepped with a·b + c rounded once, as torch's vector code does; float64 plainly.
    Raises ConfigError, ShapeError or DtypeError where names, shapes, dtypes or numbers do not fit.
    Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2; specs/optim.md.

    >>> import numpy as np
    >>> params = {"B": np.array([1.0, 2.0])}
    >>> new, state = adamw_step(params, {"B": np.array([0.5, -3.0])}, adamw_start(params), lr=0.1)
    >>> new["B"].round(6).tolist(), state["t"]
    ([0.9, 2.1], 1)
    """
    check_gradients(params, grads, state, "m")
    new, after = dict(params), dict(state) | {"t": state["t"] + 1}
    for name, g in grads.items():
        how = factors(after["t"], rate(lr, name, "lr"), rate(weight_decay, name, "weight_decay"), betas, eps)
        p, m, v = params[name], state[f"m.{name}"], state[f"v.{name}"]
        new[name], after[f"m.{name}"], after[f"v.{name}"] = by_rows(p, g, m, v, how)
    return new, after


class Factors(NamedTuple):
    """The numbers of one step, computed in double precision; each is rounded where it meets an array."""

    decay: float  # 1 − ηλ
    new1: float  # 1 − β1
    new2: float  # 1 − β2
    beta2: float
    step: float  # −η/(1 − β1^t)
    root: float  # √(1 − β2^t)
    eps: float


def factors(t: int, lr: float, weight_decay: float, betas: tuple[float, float], eps: float) -> Factors:
    """Return the numbers of step t, counted from 1."""
    one, two = map(float, betas)
    if not (0 <= one < 1 and 0 <= two < 1):
        raise ConfigError(f"betas: expected two numbers from 0 to below 1, got {betas!r}")
    if not 0 < eps < float("inf"):
        raise ConfigError(f"eps: expected a finite number above 0, got {eps!r}")
    return Factors(
        1 - lr * weight_decay, 1 - one, 1 - two, two, -lr / (1 - one**t), sqrt(1 - two**t), float(eps)
    )


def adamw(p: Array, g: Array, m: Array, v: Array, c: Factors) -> tuple[Array, Array, Array]:
    """The step at one array: p, m and v after it. All in one dtype, (...)."""
    xp = namespace_of(p=p, g=g, m=m, v=v)
    p = p * c.decay  # (optim.2)
    m = fma(g - m, c.new1, m)  # (optim.3)
    v = fma(c.new2 * g, g, c.beta2 * v)  # (optim.4)
    d = xp.sqrt(v) / c.root + c.eps  # (optim.5)
    p = p + (c.step * m) / d  # (optim.6)
    return p, m, v


def by_rows(p: Array, g: Array, m: Array, v: Array, c: Factors) -> tuple[Array, Array, Array]:
    """As adamw, to the bit; a large array some rows at a time, so that little is held besides the result."""
    if prod(p.shape) <= PART or p.shape[0] == 1:
        return adamw(p, g, m, v, c)
    xp = namespace_of(p=p)
    new: tuple[Any, ...] = tuple(xp.zeros_like(x) for x in (p, m, v))
    size = max(1, PART * p.shape[0] // prod(p.shape))
    for i in range(0, p.shape[0], size):
        at = slice(i, min(i + size, p.shape[0])), ...
        for whole, part in zip(new, adamw(p[at], g[at], m[at], v[at], c), strict=True):
            whole[at] = part
    return new[0], new[1], new[2]
