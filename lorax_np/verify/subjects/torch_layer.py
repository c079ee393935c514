"""Any torch module as a subject: what autograd makes of it, with a case's tensors in its named parameters."""

import importlib
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from ... import ConfigError
from ..cases import Case, HostArray
from ..conventions import Spec
from . import NoSubject
from .torch_arrays import to_array, to_tensor

PARAMETERS = ("W", "b", "A", "B", "bB", "m")


class TorchModule:
    """A module, or a function that makes one for each case. W stays frozen, as a base layer is.

    In a call the parameters are replaced by the case's, of whatever shape, and put back afterwards. A case that
    needs a parameter without a path, or a mask without a dropout module to stand for, is not run.
    """

    def __init__(
        self,
        module: Any,
        params: Mapping[str, str],
        dropout: str | None = None,
        scaling: str | None = None,
        spec: Spec | None = None,
    ) -> None:
        """module : torch.nn.Module, or make(case) -> torch.nn.Module;  the rest are dotted paths in it."""
        try:
            self._torch: Any = importlib.import_module("torch")
        except ImportError as error:
            raise NoSubject(
                f"torch_module: expected torch, got: {error}; pip install 'lorax-np[peft]'"
            ) from None
        if not isinstance(params, Mapping) or not params or not set(params) <= set(PARAMETERS):
            raise ConfigError(f"params: expected paths by names among {', '.join(PARAMETERS)}, got {params!r}")
        if not callable(module):
            raise ConfigError(f"module: expected a torch.nn.Module or make(case), got {type(module).__name__}")
        self.module, self.params, self.dropout, self.scaling = module, dict(params), dropout, scaling
        self.spec = spec or Spec()

    def run(self, case: Case, gy: Any) -> tuple[HostArray, dict[str, HostArray]]:
        """y and the gradients, by autograd."""
        for name in PARAMETERS:
            if getattr(case, name) is not None and name not in self.params:
                raise NotImplementedError(f"no path is given for the parameter {name}")
        if case.mask is not None and self.dropout is None:
            raise NotImplementedError("no path is given for the dropout module")
        fixed = isinstance(self.module, self._torch.nn.Module)
        module = self.module if fixed else self.module(case)
        if not isinstance(module, self._torch.nn.Module):
            raise TypeError(f"make(case): expected a torch.nn.Module, got {type(module).__name__}")
        device = next((p.device for p in module.parameters()), None)
        with self._holding(module, case, device) as parameters:
            x = self._tensor(case.x, device).requires_grad_()
            y = module(x)
            wanted = {"x": x} | {name: parameters[name] for name in case.wanted if name in parameters}
            gradients = self._torch.autograd.grad(
                y, list(wanted.values()), self._tensor(gy, device), allow_unused=True
            )
        found = {}
        for (name, value), g in zip(wanted.items(), gradients, strict=True):
            found[name] = to_array(
                self._torch.zeros_like(value) if g is None else g
            )  # unused: it does not train
        return to_array(y), found

    @contextmanager
    def _holding(self, module: Any, case: Case, device: Any) -> Iterator[dict[str, Any]]:
        """The module with a case's numbers in it, and those parameters by our names; put back afterwards."""
        nn, places, found = self._torch.nn, dict[str, Any](), dict[str, Any]()
        for name, path in self.params.items():
            value = getattr(case, name)
            if value is not None:
                trained = name in case.wanted
                found[name] = nn.Parameter(self._tensor(value, device), requires_grad=trained)
            if value is not None or _is_there(module, path):
                places[path] = found.get(name)
        if self.dropout is not None:
            mask = None if case.mask is None else self._tensor(case.mask, device)
            places[self.dropout] = nn.Identity() if mask is None else _masking(self._torch, mask)
        if self.scaling is not None:
            places[self.scaling] = case.scaling
        before, training = {path: _get(module, path) for path in places}, module.training
        try:
            for path, thing in places.items():
                _set(module, path, thing)
            module.train()  # no dropout but the mask's; some layers merge when they are told to evaluate
            yield found
        finally:
            for path, thing in before.items():
                _set(module, path, thing)
            module.train(training)

    def _tensor(self, value: HostArray, device: Any) -> Any:
        return to_tensor(self._torch, value, device)


def _masking(torch: Any, mask: Any) -> Any:
    """A module that multiplies by a mask."""

    class Masking(torch.nn.Module):  # type: ignore[misc]
        """Not an nn.Identity, by which some layers tell that there is no dropout."""

        def forward(self, x: Any) -> Any:
            """Return x∘mask."""
            return x * mask

    return Masking()


def _owner(module: Any, path: str) -> tuple[Any, str]:
    """What holds the last part of a dotted path, and that part."""
    *parts, last = path.split(".")
    for part in parts:
        module = _part(module, part, path)
    return module, last


def _part(thing: Any, part: str, path: str) -> Any:
    if isinstance(thing, Mapping) or hasattr(thing, "keys"):  # ModuleDict, ParameterDict, dict
        if part in thing:
            return thing[part]
    elif hasattr(thing, part):
        return getattr(thing, part)
    elif part.isdigit() and hasattr(thing, "__getitem__"):
        return thing[int(part)]
    raise LookupError(f"{path}: expected {part!r} in {type(thing).__name__}, got none")


def _get(module: Any, path: str) -> Any:
    return _part(*_owner(module, path), path)


def _is_there(module: Any, path: str) -> bool:
    try:
        _get(module, path)
    except LookupError:
        return False
    return True


def _set(module: Any, path: str, value: Any) -> None:
    owner, last = _owner(module, path)
    if isinstance(owner, MutableMapping) or hasattr(owner, "keys"):
        owner[last] = value
    elif last.isdigit() and not hasattr(owner, last):
        owner[int(last)] = value
    else:
        if value is not None and type(value) is not type(getattr(owner, last)):
            delattr(owner, last)  # torch takes no plain tensor in place of a parameter
        setattr(owner, last, value)
