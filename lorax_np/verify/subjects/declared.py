"""A subject under the conventions that it declares, or that others do.  Spec: specs/conventions.md."""

from dataclasses import replace
from typing import Any

import numpy as np

from ..cases import Case, HostArray
from ..conventions import Spec, spec_of

TURNED = "run", "forward", "backward", "merge", "unmerge", "init", "accumulate"  # take or give matrices


class Declared:
    """Hands a subject W, A and B in the layout of its spec, and turns what comes back; the rest is its own."""

    def __init__(self, subject: Any, spec: Spec) -> None:
        """spec : takes the place of the subject's own."""
        self._subject, self.spec = subject, spec

    def __getattr__(self, name: str) -> Any:
        if name == "backward" and self.spec.gradients == ():
            return lambda case, gy: {}
        if name in ("merges", "init_from") and self.spec.transposed:
            raise AttributeError(f"{name}: only what is turned")
        method = getattr(self._subject, name)
        return getattr(self, f"_{name}") if name in TURNED and self.spec.transposed else method

    def _run(self, case: Case, gy: Any) -> Any:
        given = self._given(case)
        found = self._subject.run(given, gy)
        self._written(given, case)
        whole = isinstance(found, tuple | list) and len(found) == 2
        return (found[0], self._turned(found[1])) if whole else found

    def _forward(self, case: Case) -> Any:
        given = self._given(case)
        y = self._subject.forward(given)
        self._written(given, case)
        return y

    def _backward(self, case: Case, gy: Any) -> Any:
        given = self._given(case)
        found = self._subject.backward(given, gy)
        self._written(given, case)
        return self._turned(found)

    def _merge(self, case: Case) -> Any:
        return self._turned(self._subject.merge(self._given(case)))

    def _unmerge(self, case: Case, merged: dict[str, HostArray]) -> Any:
        return self._turned(self._subject.unmerge(self._given(case), self._turned(merged)))

    def _init(self, W: HostArray, config: Any, seed: int) -> Any:
        return self._turned(self._subject.init(self._turned({"W": W})["W"], config, seed))

    def _accumulate(self, case: Case, gy: Any, into: dict[str, Any]) -> Any:
        return self._turned(self._subject.accumulate(self._given(case), gy, self._turned(into)))

    def _given(self, case: Case) -> Case:
        matrices: Any = self._turned({name: getattr(case, name) for name in self.spec.transposed})
        return replace(case, **matrices)

    def _written(self, given: Case, case: Case) -> None:
        """What the subject wrote into a turned matrix is written into the case's own, so that it is seen."""
        for name in self.spec.transposed:
            mine, after = getattr(case, name), getattr(given, name).T
            if mine.flags.writeable and mine.tobytes() != after.tobytes():
                mine[...] = after

    def _turned(self, found: Any) -> Any:
        """Matrices by name transposed, in C order; what is no matrix as it is, to be refused by its shape."""
        if not isinstance(found, dict):
            return found
        names = [name for name in self.spec.transposed if getattr(found.get(name), "ndim", 0) == 2]
        turned = {name: found[name].T for name in names}
        return found | {
            n: np.ascontiguousarray(v) if isinstance(v, np.ndarray) else v for n, v in turned.items()
        }


def declared(subject: Any, spec: Spec | None = None) -> Any:
    """The subject under a spec, or under its own; itself where nothing has to be done for that.

    A subject that has a forward alone gives no gradients. Raises ConfigError for a spec that is none.
    """
    own = spec_of(subject)
    wanted = own if spec is None else spec
    if not hasattr(subject, "run") and not hasattr(subject, "backward"):
        return Declared(subject, replace(wanted, gradients=()))
    return subject if wanted == own and not own.transposed else Declared(subject, wanted)
