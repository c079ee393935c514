"""Implementations to judge: the engine itself, PEFT's layers, and anything that offers two methods."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..cases import Case
from ..conventions import Spec

GROUP = "lorax_np.subjects"  # of entry points


class NoSubject(LookupError):
    """There is no subject of that name; what the named module itself raises is never one."""


class Subject(Protocol):
    """Anything with these methods, or forward alone, or ops of a model alone.

    Arrays of any library may come back; NumPy arrays go in.

    Besides, where it has them: spec : Spec;  run(case, gy) -> (y, gradients) instead of the two;
    init(W, config, seed) -> {"A", "B", and "W", "m", "bB" where they apply};  merge(case) -> {"W", and "b"};
    init_from(W, config, seed, given), as init for the other starts, with "inputs" or "gradient" in given;
    and an op of a model for each method that is named so, as rms_norm(case, gy) -> (y, {"x", "w"}).
    A method that meets a case it does not cover raises NotImplementedError: that is not run, never passed.
    """

    def forward(self, case: Case) -> Any:
        """Return y."""

    def backward(self, case: Case, gy: Any) -> dict[str, Any]:
        """Return gradients by name: x, A, B; m, b, bB where case.wanted has them; W if it likes."""


def load(name: str, xp: Any = None) -> Any:
    """Return a subject by name: reference, fast, peft, module:attribute, or one that a package registers.

    A package registers a subject under the entry-point group lorax_np.subjects. A class is called first.
    Raises LookupError where there is no such subject; what the module itself raises comes through.
    """
    if name == "reference":
        return reference(xp)
    if name == "fast":
        return fast(xp)
    if name == "peft":
        return peft()
    found = _attribute(name) if ":" in name else _registered(name)
    subject = found() if isinstance(found, type) else found
    from ..batteries.op_case import offered

    if not hasattr(subject, "run") and not hasattr(subject, "forward") and not any(offered(subject)):
        raise NoSubject(f"SUBJECT: expected methods forward and backward, or run, got {type(subject).__name__}")
    return subject


def _attribute(name: str) -> Any:
    """What stands under module:attribute, the folder that one is in being searched first."""
    module_name, _, attribute = name.partition(":")
    if not attribute or not all(part.isidentifier() for part in module_name.split(".")):
        raise NoSubject(f"SUBJECT: expected reference, fast, peft or module:attribute, got {name!r}")
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
    return found


def _registered(name: str) -> Any:
    """What an installed package registers under a name."""
    from importlib.metadata import entry_points

    points = {point.value: point for point in entry_points(group=GROUP) if point.name == name}
    if len(points) > 1:
        values = " and ".join(sorted(points))
        raise NoSubject(f"SUBJECT: expected {name!r} to be registered once, got {values}; name one of these")
    if not points:
        raise NoSubject(f"SUBJECT: expected reference, fast, peft or module:attribute, got {name!r}")
    (point,) = points.values()
    return point.load()


def reference(xp: Any = None) -> Any:
    """The engine's own layer, in the given array library or NumPy."""
    from .engine import Reference

    return Reference(xp)


def fast(xp: Any = None) -> Any:
    """The fast engine, lx.fast, on NumPy, or on a device with CuPy as the given library."""
    from .engine import Fast, FastLayer

    return Fast() if xp is None or xp is np else FastLayer(xp)


def peft(config: Any = None, *, autocast_adapter_dtype: bool = True, safe_merge: bool = False) -> Any:
    """PEFT's real layers under torch's autograd; with a LoraConfig, only the cases of its DoRA, rsLoRA and bB.

    autocast_adapter_dtype : as in get_peft_model: adapters beside a base of 16 bits are float32, and their
        gradients are rounded once as they are handed back;  False: they are of the base's dtype
    safe_merge : as in merge_and_unload

    Raises LookupError naming the extra where torch or PEFT is missing.
    """
    try:
        from .peft_layer import Peft
    except ImportError as error:
        raise NoSubject(f"peft: expected torch and PEFT, got: {error}; pip install 'lorax-np[peft]'") from error
    return Peft(config, autocast_adapter_dtype=autocast_adapter_dtype, safe_merge=safe_merge)


def torch_module(
    module: Any,
    params: Mapping[str, str],
    dropout: str | None = None,
    scaling: str | None = None,
    spec: Spec | None = None,
) -> Any:
    """Any torch module, by autograd.

    module : torch.nn.Module, whose parameters take the shapes of each case; or make(case) -> torch.nn.Module
    params : dotted paths of parameters by our names, {"W": "base_layer.weight", "A": ..., "B": ...}
    dropout : path of the dropout module, for which the case's mask stands in;  None: it keeps its own, and a
              case with a mask is not run
    scaling : path of the number s, which is set;  None: the module has it right
    spec : which DoRA norms it differentiates, and whether it takes strided arrays

    Raises LookupError naming the extra where torch is missing, ConfigError for anything else given wrongly.
    """
    from .torch_layer import TorchModule

    return TorchModule(module, params, dropout, scaling, spec)


def jax_fn(f: Callable[..., Any], argnames: Sequence[str], spec: Spec | None = None) -> Any:
    """Any JAX function f(*arguments) -> y, by jax.vjp; in float64 within jax.enable_x64.

    argnames : its arguments in order, of x, W, b, A, B, bB, m, mask (arrays, None where a case has none), and
               s, r, alpha (Python numbers).  A case with an array that is not among them is not run.

    Raises LookupError where JAX is missing, ConfigError for other names.
    """
    from .jax_function import JaxFunction

    return JaxFunction(f, argnames, spec)


def ctypes(
    path: str | Path,
    fwd: str = "lora_fwd",
    bwd: str = "lora_bwd",
    order: str = "N d_in d_out r s x mask W A B b y z",
    bwd_order: str = "N d_in d_out r s x mask W A B z gy gx gA gB gb",
    dtype: str = "float32",
    spec: Spec | None = None,
) -> Any:
    """Two functions of a shared library, on guarded memory: specs/subjects.md has their signatures.

    order, bwd_order : their arguments; an array that a case lacks, or nobody asked for, is NULL
    dtype : float32 or float64, of all arrays and of s.  Sizes are int64_t.

    Raises LookupError where there is no such file, ConfigError for unknown names.
    """
    from .shared_library import SharedLibrary

    return SharedLibrary(path, fwd, bwd, order, bwd_order, dtype, spec)


def command(
    argv: Sequence[str | Path], timeout: float = 60.0, dtype: str = "float32", spec: Spec | None = None
) -> Any:
    """A program in any language, run on a file that holds the case; it writes one that holds the answer.

    argv : the program and its arguments, behind which come the two paths;  timeout : seconds a case
    dtype : float32 or float64, of the cases that it takes

    Raises LookupError where there is no such program, ConfigError for anything else given wrongly.
    """
    from .program import Command

    return Command(argv, timeout, dtype, spec)
