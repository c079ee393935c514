"""What every start is made from and what it makes, and the checks that several share."""

from typing import Any, NamedTuple

import numpy as np

from ..backend import HostArray
from ..errors import ConfigError
from .moments import Moments


class Given(NamedTuple):
    """What a start is made from, on the host."""

    W: HostArray  # (d_out, d_in)  float32 or float64
    r: int
    s: float
    settings: dict[str, Any]  # of the start's own field of the config, whole
    rng: np.random.Generator | None = None
    inputs: Moments | None = None
    gradient: HostArray | None = None  # (d_out, d_in), in W's dtype


class Start(NamedTuple):
    """What an adapter begins with, and what becomes of the base: W, or the residual W − s·BA, or another."""

    A: HostArray  # (r, d_in)
    B: HostArray  # (d_out, r)
    residual: bool = False  # whether s·BA is taken out of W, once A and B are rounded
    W: HostArray | None = None  # (d_out, d_in), where neither of these


def generator(rng: object) -> np.random.Generator:
    """The source of random values; ConfigError where there is none."""
    if not isinstance(rng, np.random.Generator):
        raise ConfigError(
            "rng: expected a numpy.random.Generator, such as lorax_np.torch_generator(seed), "
            f"got {type(rng).__name__}"
        )
    return rng


def check_rank(r: int, most: int, who: str, start: object) -> None:
    """Raise ConfigError where a start has no r directions to take."""
    if r > most:
        raise ConfigError(f"r: expected at most {who}, for init_lora_weights={start!r}, got {r}")


def signed(V: HostArray) -> HostArray:
    """The sign of each row's largest entry, (r, 1): a singular vector's own is nobody's choice."""
    top = np.take_along_axis(V, np.abs(V).argmax(axis=1)[:, None], axis=1)
    found: HostArray = np.where(top < 0, -1.0, 1.0)
    return found
