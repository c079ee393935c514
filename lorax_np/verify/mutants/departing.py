"""Layers that are not linear, right but for what a fault replaces: on the way in, or of what comes of it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

from ..cases import HostArray
from .fault import Fault, Faulty, Kind

Grads = dict[str, HostArray]


class Departing(Faulty):
    """A kind of layer by its reference, but for what is replaced. Each gives these methods its own names."""

    kind: ClassVar[Kind]
    reference: ClassVar[Any]

    def __init__(
        self,
        given: Callable[[Any], Any] | None = None,
        forward: Callable[[Any, HostArray], HostArray] | None = None,
        backward: Callable[[Any, Grads], Grads] | None = None,
        merge: Callable[[Any], HostArray] | None = None,
        start: Callable[[Grads, int], Grads] | None = None,
    ) -> None:
        """given : changes the case, both ways;  the others : what comes of it."""
        super().__init__()
        self.given = given or (lambda case: case)
        self.forwards, self.backwards, self.merges_as, self.starts = forward, backward, merge, start

    def _right(self, what: str, *arguments: Any) -> Any:
        return getattr(self.reference, f"{self.kind}_{what}")(*arguments)

    def layer_forward(self, case: Any) -> HostArray:
        """y."""
        y: HostArray = self._right("forward", self.given(case))
        return y if self.forwards is None else self.forwards(case, y).astype(y.dtype)

    def layer_backward(self, case: Any, gy: HostArray) -> Grads:
        """The gradients by all that the case has."""
        given = replace(self.given(case), gy=gy)
        g: Grads = self._right("backward", given, gy)
        found = g if self.backwards is None else self.backwards(given, g)
        return {name: value.astype(case.W.dtype) for name, value in found.items()}

    def layer_merge(self, case: Any) -> Grads:
        """What the reference merges, its weight replaced."""
        found: Grads = self._right("merge", case)
        return found if self.merges_as is None else found | {"W": self.merges_as(case).astype(case.W.dtype)}

    def layer_init(self, W: HostArray, config: Any, seed: int) -> Grads:
        """The start of an adapter at W."""
        found: Grads = self._right("init", W, config, seed)
        return found if self.starts is None else self.starts(found, seed)


def departure(
    layer: type[Departing],
    id: str,
    title: str,
    line: str,
    *,
    given: Any = None,
    forward: Any = None,
    backward: Any = None,
    merge: Any = None,
    start: Any = None,
) -> Fault:
    """A fault of one kind of layer, by what is replaced of it."""
    return Fault(id, title, layer.kind, (), line, make=lambda: layer(given, forward, backward, merge, start))
