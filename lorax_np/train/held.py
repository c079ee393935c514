"""What trains and its optimiser's state, which a run's steps write over.  See specs/training.md."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..backend import Array
from ..config import Site
from ..models.records import Batch, Trained
from ..optim import State, adamw_flat_start, adamw_flat_step, flat_state, named_state
from ..parallel import Communicator
from ..tree import flatten, layout, unflatten
from .config import TrainConfig
from .passes import Passes
from .step import Outcome, Rates, gradient, inverses_of, parameters, start, update, with_parameters


class Held:
    """Parameters and an optimiser's state, arrays of their own.

    AdamW's are three flat buffers, of which all that is named are views, and a step writes over them: it needs
    no second p, m and v. Other optimisers return new arrays, which take the place of the old ones.

    trained : what trains, as it is now
    """

    def __init__(self, given: Trained, config: TrainConfig, sites: Mapping[str, Site]) -> None:
        """Begin at what is given, which is copied."""
        params = parameters(given)
        self.config, self.sites, self.where = config, sites, layout(params)
        self._p: Any = flatten(params, self.where)  # (P,)
        self.trained = with_parameters(given, unflatten(self._p, self.where))
        self._flat: State | None = adamw_flat_start(self._p) if config.optimizer == "adamw" else None
        self._named: State = {} if self._flat is not None else start(self.trained, config)
        self._inverses = inverses_of(parameters(self.trained), config, sites)

    @property
    def state(self) -> State:
        """The optimiser's state by name, as its step functions have it."""
        return self._named if self._flat is None else named_state(self._flat, self.where)

    def step(
        self, passes: Passes, batches: Sequence[Batch], *, step: int, rates: Rates, ranks: Communicator
    ) -> Outcome:
        """As train_step, to the bit, but what it returns stands here afterwards."""
        g, outcome = gradient(passes, self.trained, batches, step=step, ranks=ranks)
        if not outcome.applied:
            return outcome
        if self._flat is None:
            grads = unflatten(g, self.where)
            args = parameters(self.trained), grads, self._named, rates, self.config, self.sites
            new, self._named = update(*args, self._inverses)
            self.trained = with_parameters(self.trained, new)
        else:
            c, (lr, decay) = self.config, rates
            how: Any = {"betas": (c.beta1, c.beta2), "eps": c.eps, "lr": lr, "weight_decay": decay}
            adamw_flat_step(self._p, g, self._flat, where=self.where, **how)
        return outcome

    def put(self, params: Mapping[str, Array], state: Mapping[str, Any] | None = None) -> None:
        """Stand at other parameters, and at a state where one is given, both by name; they are copied."""
        if self._flat is None:
            self.trained = with_parameters(self.trained, params)
            self._named = {**self._named, **(state or {})}
            self._inverses = inverses_of(params, self.config, self.sites)
            return
        self._p[...] = flatten(params, self.where)
        if state is not None:
            self._flat.update(flat_state(dict(state), self.where))
