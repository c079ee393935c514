"""Replays of the plain layer with some steps changed, where only what depends on a change is computed again."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..cases import Case, HostArray
from .plain import BACKWARD, FORWARD, Step, arrays

STEPS: Mapping[str, Step] = {**FORWARD, **BACKWARD}


class _Reader:
    """Hands out the values of a layer, and notes which were asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values, self._read = values, set[str]()

    def __getattr__(self, name: str) -> Any:
        self._read.add(name)
        return self._values[name]


class Replayer:
    """One case with every step of the right layer computed, and which steps each of them reads."""

    def __init__(self, case: Case) -> None:
        """case : in float64."""
        self.case, self.reads = case, dict[str, set[str]]()
        self.values: dict[str, Any] = arrays(case, case.gy)
        for name, step in STEPS.items():
            reader = _Reader(self.values)
            self.values[name] = step(reader)
            self.reads[name] = reader._read

    def run(self, changed: Mapping[str, Step] | None = None) -> dict[str, HostArray]:
        """y and the gradients by name, as plain.run makes them with the same steps changed."""
        t, moved = SimpleNamespace(**self.values), set[str]()
        for name, step in STEPS.items():
            if changed and name in changed:
                setattr(t, name, changed[name](t))
                moved.add(name)
            elif not moved.isdisjoint(self.reads[name]):
                setattr(t, name, step(t))
                moved.add(name)
        found = {
            "y": t.y,
            "x": t.gx_base + t.gx_lora + t.gx_dora,
            "A": t.gA + t.gA_norm,
            "B": t.gB + t.gB_norm,
            "W": t.gW,
        }
        found |= {"m": t.gm} if t.m is not None else {}
        found |= {"b": t.gb} if self.case.train_b else {}
        found |= {"bB": t.gbB} if t.bB is not None else {}
        found["y"] = np.asarray(found["y"]).reshape(self.case.gy.shape)
        found["x"] = found["x"].reshape(self.case.x.shape)
        return found
