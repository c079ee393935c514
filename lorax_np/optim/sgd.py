"""Stochastic gradient descent with momentum.  Derivation: specs/optim.md."""

from collections.abc import Mapping

from ..backend import Array
from ..errors import ConfigError
from ..tree import Leaves
from .state import Rate, State, check_gradients, fma, rate, zeros


def sgd_start(params: Mapping[str, Array]) -> State:
    """Return the state before the first step: t = 0 and zeros as u.NAME like each parameter."""
    return zeros(params, "u")


def sgd_step(
    params: Mapping[str, Array],
    grads: Mapping[str, Array],
    state: State,
    *,
    lr: Rate,
    momentum: float = 0.0,
    weight_decay: Rate = 0.0,
) -> tuple[Leaves, State]:
    """One step of gradient descent with momentum: new parameters and a new state; nothing is written to.

    params, grads    : arrays by name; a parameter without a gradient stays as it is, its state too
    lr, weight_decay : one number for all, or one for each name
    momentum         : share of the last direction that is kept, from 0 to below 1

    In float32 every bit is torch's. Raises as adamw_step. Source: specs/optim.md.

    >>> import numpy as np
    >>> params, grads = {"B": np.array([1.0])}, {"B": np.array([0.5])}
    >>> state = sgd_start(params)
    >>> for _ in range(2):
    ...     params, state = sgd_step(params, grads, state, lr=0.5, momentum=0.5)
    >>> params["B"].tolist()
    [0.375]
    """
    check_gradients(params, grads, state, "u")
    if not 0 <= momentum < 1:
        raise ConfigError(f"momentum: expected a number from 0 to below 1, got {momentum!r}")
    mu = float(momentum)
    new, after = dict(params), dict(state) | {"t": state["t"] + 1}
    for name, g in grads.items():
        p, decay = params[name], rate(weight_decay, name, "weight_decay")
        d = fma(p, decay, g) if decay else g  # (optim.7)
        u = mu * state[f"u.{name}"] + d if mu and state["t"] else d  # (optim.8)
        new[name] = fma(u, -rate(lr, name, "lr"), p)  # (optim.9)
        after[f"u.{name}"] = u
    return new, after
