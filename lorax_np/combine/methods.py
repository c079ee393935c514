"""The methods of combination, and what each is told."""

from collections.abc import Mapping
from math import isfinite
from typing import Any, Literal, NamedTuple

import numpy as np

from ..errors import ConfigError
from ..kinds import nearest


class Method(NamedTuple):
    """What a method does: which entries it keeps, whether signs are elected, and of what."""

    keeps: Literal["all", "largest", "some"]
    elects: bool
    of: Literal["stacks", "factors", "update"]


METHODS: Mapping[str, Method] = {
    "cat": Method("all", False, "stacks"),
    "linear": Method("all", False, "factors"),
    "svd": Method("all", False, "update"),
    "ties": Method("largest", True, "factors"),
    "ties_svd": Method("largest", True, "update"),
    "dare_linear": Method("some", False, "factors"),
    "dare_linear_svd": Method("some", False, "update"),
    "dare_ties": Method("some", True, "factors"),
    "dare_ties_svd": Method("some", True, "update"),
    "magnitude_prune": Method("largest", False, "factors"),
    "magnitude_prune_svd": Method("largest", False, "update"),
}


class Choice(NamedTuple):
    """A method with what it was told, checked."""

    name: str
    method: Method
    density: float
    majority: str
    rank: int | None
    clamp: float | None
    rng: np.random.Generator | None


def choose(
    method: str,
    density: float | None,
    majority: str | None,
    rank: int | None,
    clamp: float | None,
    rng: np.random.Generator | None,
) -> Choice:
    """Check a method and its options against each other: none may be missing, and none given and not read."""
    if method not in METHODS:
        wanted = f"one of {', '.join(METHODS)}"
        raise ConfigError(f"method: expected {wanted}, got {method!r}{nearest(str(method), METHODS)}")
    how = METHODS[method]
    reads = {
        "density": how.keeps != "all",
        "majority_sign_method": how.elects,
        "rank": how.of == "update",
        "clamp": how.of == "update",
    }
    given = {"density": density, "majority_sign_method": majority, "rank": rank, "clamp": clamp}
    for name, value in given.items():
        if value is not None and not reads[name]:
            wanted = f"None with method={method!r}, which does not read it"
            raise ConfigError(f"{name}: expected {wanted}, got {value!r}")
    if reads["density"] and not (_number(density) and 0 < float(density or 0) <= 1):
        raise ConfigError(f"density: expected a share in (0, 1] with method={method!r}, got {density!r}")
    if majority not in (None, "total", "frequency"):
        raise ConfigError(f"majority_sign_method: expected total or frequency, got {majority!r}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < 1):
        raise ConfigError(f"rank: expected an int of at least 1, got {rank!r}")
    if clamp is not None and not (_number(clamp) and 0 < clamp <= 1):
        raise ConfigError(f"clamp: expected a quantile in (0, 1], got {clamp!r}")
    if how.keeps == "some" and not isinstance(rng, np.random.Generator):
        raise ConfigError(
            f"rng: expected a numpy.random.Generator with method={method!r}, got {type(rng).__name__}"
        )
    return Choice(
        method, how, 1.0 if density is None else float(density), majority or "total", rank, clamp, rng
    )


def check_numbers(names: Mapping[str, Any], **given: Mapping[str, float]) -> None:
    """Check that each mapping has a finite number for each name, and nothing else."""
    if not names:
        raise ConfigError("adapters: expected at least one, got none")
    for argument, numbers in given.items():
        if not isinstance(numbers, Mapping):
            raise TypeError(f"{argument}: expected a mapping by name, got {type(numbers).__name__}")
        if numbers.keys() != names.keys():
            wanted = f"one for each of {', '.join(names)}"
            raise ConfigError(f"{argument}: expected {wanted}, got {', '.join(map(str, numbers)) or 'none'}")
        for name, value in numbers.items():
            if not _number(value):
                raise ConfigError(f"{argument}[{name!r}]: expected a finite float, got {value!r}")


def _number(value: Any) -> bool:
    good = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return good and isfinite(value)
