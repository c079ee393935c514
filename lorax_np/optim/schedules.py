"""How the rate of learning changes over the steps.  See specs/optim.md."""

from math import cos, pi

from ..errors import ConfigError

SCHEDULES = ("constant", "linear", "cosine")


def schedule(name: str, step: int, total: int, warmup: int = 0) -> float:
    """Return the factor from 0 to 1 on every rate at a step, counted from 0.

    name   : constant, linear or cosine
    step   : 0 to total − 1; total itself is allowed, and is where linear and cosine end
    total  : steps of the whole run
    warmup : steps in which the factor rises from 0, not reaching 1 before they are over

    With a warm-up the first step has the factor 0, as in transformers. Source: specs/optim.md.

    >>> [round(schedule("cosine", step, 6, 2), 3) for step in range(7)]
    [0.0, 0.5, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if name not in SCHEDULES:
        raise ConfigError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {name!r}")
    if not 0 <= warmup <= total:
        raise ConfigError(f"warmup: expected 0 to {total}, the number of steps, got {warmup}")
    if not 0 <= step <= total:
        raise ConfigError(f"step: expected 0 to {total}, the number of steps, got {step}")
    if step < warmup:
        return step / warmup  # (optim.13)
    span = max(1, total - warmup)
    if name == "linear":
        return (total - step) / span  # (optim.14)
    return 0.5 * (1 + cos(pi * ((step - warmup) / span))) if name == "cosine" else 1.0  # (optim.15)
