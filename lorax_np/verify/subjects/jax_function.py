"""Any JAX function as a subject: what jax.vjp makes of it."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ... import ConfigError
from ..cases import Case, HostArray
from ..conventions import Spec
from . import NoSubject

ARRAYS = ("x", "W", "b", "A", "B", "bB", "m", "mask")
SCALARS = ("s", "r", "alpha")


class JaxFunction:
    """f(*arguments) -> y, with the arguments of a case in the order of argnames; None for an array it lacks."""

    def __init__(self, f: Callable[..., Any], argnames: Sequence[str], spec: Spec | None = None) -> None:
        """argnames : of x, W, b, A, B, bB, m, mask; s, r, alpha, which are Python numbers."""
        try:
            self._jax: Any = importlib.import_module("jax")
        except ImportError as error:
            raise NoSubject(f"jax_fn: expected jax, got: {error}; pip install jax") from None
        names = tuple(argnames)
        known = {*ARRAYS, *SCALARS}
        if (
            isinstance(argnames, str)
            or not {"x", "A", "B"} <= set(names) <= known
            or len(set(names)) < len(names)
        ):
            raise ConfigError(
                f"argnames: expected x, A, B and others of {', '.join(sorted(known))}, got {argnames!r}"
            )
        self.f, self.argnames, self.spec = f, names, spec or Spec()

    def run(self, case: Case, gy: Any) -> tuple[HostArray, dict[str, HostArray]]:
        """y and the gradients, by one vjp."""
        for name in ARRAYS:
            if getattr(case, name) is not None and name not in self.argnames:
                raise NotImplementedError(f"f takes no {name}")
        if case.x.dtype == np.float64:
            with _double(self._jax):
                return self._run(case, gy)
        return self._run(case, gy)

    def _run(self, case: Case, gy: Any) -> tuple[HostArray, dict[str, HostArray]]:
        to_device = self._jax.numpy.asarray
        scalars: dict[str, Any] = {"s": case.scaling, "r": case.config.r, "alpha": case.config.lora_alpha}
        given = {name: scalars[name] for name in SCALARS}
        for name in ARRAYS:
            value = getattr(case, name)
            given[name] = None if value is None else to_device(np.array(value))
        wanted = [name for name in case.wanted if name in self.argnames]

        def of_wanted(*values: Any) -> Any:
            now = given | dict(zip(wanted, values, strict=True))
            return self.f(*(now[name] for name in self.argnames))

        y, pull = self._jax.vjp(of_wanted, *(given[name] for name in wanted))
        gradients = pull(to_device(np.array(gy)))
        return np.array(y), {name: np.array(g) for name, g in zip(wanted, gradients, strict=True)}


def _double(jax: Any) -> Any:
    """The context in which JAX keeps float64, which it otherwise narrows to float32."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return importlib.import_module("jax.experimental").enable_x64(True)
