"""Implementations to judge: the engine itself, PEFT's layers, and anything that offers two methods."""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..cases import Case


@dataclass(frozen=True)
class Spec:
    """What a subject says of itself, beyond the methods it has.

    norm_gradient : the DoRA norms it differentiates: (False,) detached, (True,) full, or both
    strided : whether it takes arrays that are not contiguous, and read-only ones
    """

    norm_gradient: tuple[bool, ...] = (False,)
    strided: bool = False


class NoSubject(LookupError):
    """There is no subject of that name; what the named module itself raises is never one."""


class Subject(Protocol):
    """Anything with these two methods. Arrays of any library may come back; NumPy arrays go in.

    Besides, where it has them: spec : Spec;  run(case, gy) -> (y, gradients) instead of the two;
    init(W, config, seed) -> {"A", "B", and "W", "m", "bB" where they apply};  merge(case) -> {"W", and "b"}.
    A method that meets a case it does not cover raises NotImplementedError: that is not run, never passed.
    """

    def forward(self, case: Case) -> Any:
        """Return y."""

    def backward(self, case: Case, gy: Any) -> dict[str, Any]:
        """Return gradients by name: x, A, B; m, b, bB where case.wanted has them; W if it likes."""


def load(name: str, xp: Any = None) -> Any:
    """Return a subject by name: reference, peft, or module:attribute, a class there being called first.

    Raises LookupError where there is no such subject; what the module itself raises comes through.
    """
    if name == "reference":
        return reference(xp)
    if name == "peft":
        return peft()
    module_name, _, attribute = name.partition(":")
    if not attribute or not all(part.isidentifier() for part in module_name.split(".")):
        raise NoSubject(f"SUBJECT: expected reference, peft or module:attribute, got {name!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise NoSubject(f"SUBJECT: expected a module that can be imported, got {name!r}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise NoSubject(f"SUBJECT: expected {attribute!r} in module {module_name}, got none")
        found = getattr(found, part)
    subject = found() if isinstance(found, type) else found
    if not hasattr(subject, "run") and not (hasattr(subject, "forward") and hasattr(subject, "backward")):
        raise NoSubject(f"SUBJECT: expected methods forward and backward, or run, got {type(subject).__name__}")
    return subject


def reference(xp: Any = None) -> Any:
    """The engine's own layer, in the given array library or NumPy."""
    from .engine import Reference

    return Reference(xp)


def peft(config: Any = None) -> Any:
    """PEFT's real layers under torch's autograd; with a LoraConfig, only the cases of its DoRA, rsLoRA and bB.

    Raises LookupError naming the extra where torch or PEFT is missing.
    """
    try:
        from .peft_layer import Peft
    except ImportError as error:
        raise NoSubject(f"peft: expected torch and PEFT, got: {error}; pip install 'lorax-np[peft]'") from error
    return Peft(config)
