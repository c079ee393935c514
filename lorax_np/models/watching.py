"""What a model's linear layers are given, and the gradients by their weights: what some starts are made of.

EVA and CorDA start from inputs, LoRA-GA from gradients, of the frozen model on rows of text.  specs/starts.md.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from ..backend import Array
from ..config import Site
from ..starts.moments import Moments, input_moments, joined
from .pairs import FAST
from .passes import Pass
from .records import Batch, Model, Rows, Trained
from .tasks import count, family_of, loss_and_gradients

NOTHING = Trained({}, {})


class Watch(Pass):
    """A pass over the frozen model that keeps the moments of what linear layers are given."""

    def __init__(self, model: Model, sites: Mapping[str, Site]) -> None:
        """sites : whose inputs are wanted."""
        super().__init__(model, {}, NOTHING, pair=FAST)
        self.wanted = sites
        self.seen: dict[str, Moments] = {}

    def linear(
        self, name: str, x: Array, rows: Rows | None, *, transposed: bool = False, mask: Array | None = None
    ) -> tuple[Array, Any]:
        """As of any pass, once x : (N, d_in) has been counted in."""
        if name in self.wanted and x.shape[0]:
            found = input_moments(x)
            self.seen[name] = joined(self.seen[name], found) if name in self.seen else found
        return super().linear(name, x, rows, transposed=transposed, mask=mask)


def site_inputs(model: Model, sites: Mapping[str, Site], batches: Iterable[Batch]) -> dict[str, Moments]:
    """Return count, mean and scatter of what each site's layer is given: inject's `inputs`.

    d_in² numbers in float64 a site, however many batches there are. No dropout.
    """
    watch = Watch(model, sites)
    for batch in batches:
        family_of(model).forward(watch, batch, "nothing")
    return watch.seen


def site_gradients(
    model: Model, sites: Mapping[str, Site], batches: Iterable[Batch], *, task: str
) -> dict[str, Array]:
    """Return the gradient of the mean loss by each site's W : (d_out, d_in): inject's `gradients`.

    The mean is over all labels that count. As many numbers as the sites' weights have, twice while they are
    added up. No dropout.
    Raises ConfigError as loss_and_gradients does.
    """
    rows = list(batches)
    trained = Trained({}, {site.weight: model.weights[site.weight] for site in sites.values()})
    n = sum(count(task, batch.labels, batch.starts) for batch in rows)
    total: dict[str, Array] = {}
    for batch in rows:
        _, found = loss_and_gradients(model, {}, trained, batch, task=task, n=n)
        for name, g in found.saved.items():
            total[name] = total[name] + g if name in total else g
    return {
        name: total[site.weight].T if site.transposed else total[site.weight] for name, site in sites.items()
    }
