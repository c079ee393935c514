"""The tokens of a step, on the host and checked."""

from typing import Any, NamedTuple

import numpy as np

from ...backend import HostArray, dtype_name, on_device, to_host
from ...errors import ConfigError, DtypeError, ShapeError
from .head import IGNORED
from .room import Run


class Batch(NamedTuple):
    """The tokens of a step, on the host."""

    ids: HostArray  # (N,)
    labels: HostArray  # (N,)
    bounds: list[int]
    numbers: list[int]  # of each sequence in the whole step

    def rows(self, run: Run) -> HostArray:
        """Which rows a run has."""
        return np.concatenate([np.arange(self.bounds[i], self.bounds[i + 1]) for i in run.places])


def batch_of(ids: Any, starts: Any, index: Any, labels: Any, n: int, V: int) -> Batch:
    """The batch, checked: ConfigError, ShapeError and DtypeError where its parts do not fit."""
    ids, labels = (to_host(x) if on_device(x) else np.asarray(x) for x in (ids, labels))
    bounds, numbers = [int(at) for at in starts], [int(i) for i in index]
    for name, values in (("ids", ids), ("labels", labels)):
        if values.dtype.kind not in "iu" and values.size:
            raise DtypeError(f"{name}: expected integers, got {dtype_name(values)}")
    if ids.ndim != 1 or ids.shape != labels.shape:
        raise ShapeError(f"labels: expected {ids.shape}, set by ids, got {labels.shape}")
    if not bounds or bounds[0] != 0 or bounds[-1] != len(ids) or sorted(bounds) != bounds:
        raise ShapeError(f"starts: expected bounds from 0 to {len(ids)}, set by ids, got {bounds[:8]}")
    if len(numbers) != len(bounds) - 1:
        raise ShapeError(f"index: expected {len(bounds) - 1} numbers, set by starts, got {len(numbers)}")
    if isinstance(n, bool) or not n >= 1:
        raise ConfigError(f"n: expected at least one label that counts, got {n}")
    for name, values in (("ids", ids), ("labels", labels[labels != IGNORED])):
        if len(values) and not (values.min() >= 0 and values.max() < V):
            raise ConfigError(
                f"{name}: expected tokens from 0 to {V - 1}, got {values.min()} to {values.max()}"
            )
    return Batch(ids, labels, bounds, numbers)
