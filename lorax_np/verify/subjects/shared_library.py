"""Machine code as a subject: two functions of a shared library, called on guarded memory.

The forward function writes y, and may write z and n for the backward function, which writes the gradients. All
arrays are row-major and of one floating type, with tokens as N rows.  specs/subjects.md has the signatures.
"""

import ctypes
import mmap
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ... import ConfigError
from ..cases import Case, HostArray
from ..conventions import Spec
from . import NoSubject

FORWARD = "N d_in d_out r s x mask W A B b y z"
BACKWARD = "N d_in d_out r s x mask W A B z gy gx gA gB gb"
SIZES = ("N", "d_in", "d_out", "r")
OPTIONAL = ("mask", "b", "bB", "m")  # NULL where a case has none
SAVED = {"y": "N d_out", "z": "N r", "n": "d_out"}  # written by forward, read by backward
GRADIENTS = {"gx": "N d_in", "gA": "r d_in", "gB": "d_out r", "gb": "d_out", "gbB": "d_out", "gm": "d_out"}
GRADIENTS |= {"gW": "d_out d_in"}
INPUTS = ("x", "W", "A", "B", *OPTIONAL)
REALS: dict[str, Any] = {"float32": ctypes.c_float, "float64": ctypes.c_double}
SENTINEL = 0x7FA5_C3E1  # a NaN of either type, when it stands in both halves
MARGIN = 256  # bytes of sentinels on each side
PLACES = ("sentinels", "end", "start")


class StrayWrite(Exception):
    """The library wrote where it should not; the message names the function and the array."""


class SharedLibrary:
    """A forward and a backward function of a library, called through ctypes.

    Its functions can take the process down, so the harness runs it in another one.
    """

    native = True

    def __init__(
        self,
        path: str | Path,
        fwd: str = "lora_fwd",
        bwd: str = "lora_bwd",
        order: str = FORWARD,
        bwd_order: str = BACKWARD,
        dtype: str = "float32",
        spec: Spec | None = None,
    ) -> None:
        """order, bwd_order : the arguments by name;  dtype : float32 or float64, of every real number."""
        self.path = Path(path).absolute()
        if not self.path.is_file():
            raise NoSubject(f"path: expected a shared library, got {path}")
        if dtype not in REALS:
            raise ConfigError(f"dtype: expected one of {', '.join(REALS)}, got {dtype!r}")
        known = {*SIZES, "s", *INPUTS, *SAVED}
        self.order, self.bwd_order = (
            _names("order", order, known),
            _names("bwd_order", bwd_order, known | {"gy", *GRADIENTS}),
        )
        given = tuple(name[1:] for name in GRADIENTS if name in self.bwd_order)
        self.fwd, self.bwd, self.dtype, self.spec = fwd, bwd, dtype, spec or Spec()
        if self.spec.gradients is None:
            self.spec = replace(self.spec, gradients=given)

    def run(self, case: Case, gy: Any) -> tuple[HostArray, dict[str, HostArray]]:
        """y and the gradients. Raises StrayWrite for a write outside an array, or into an input."""
        if case.x.dtype != self.dtype:
            raise NotImplementedError(f"the library computes in {self.dtype}")
        for name in OPTIONAL:
            if getattr(case, name) is not None and name not in self.order:
                raise NotImplementedError(f"{self.fwd} takes no {name}")
        given = case.arrays() | {"gy": np.asarray(gy)}
        rows = {
            name: value.reshape(-1, value.shape[-1]) if name in ("x", "mask", "gy") else value
            for name, value in given.items()
        }
        sizes = {
            "N": rows["x"].shape[0],
            "d_in": case.W.shape[1],
            "d_out": case.W.shape[0],
            "r": case.A.shape[0],
        }
        place = PLACES[zlib.crc32(case.id.encode()) % len(PLACES)]  # the same for a case in every run

        def empty(shapes: dict[str, str], names: tuple[str, ...]) -> dict[str, HostArray]:
            there = {
                name: [sizes[axis] for axis in shape.split()] for name, shape in shapes.items() if name in names
            }
            return {name: np.full(shape, np.nan, self.dtype) for name, shape in there.items()}

        saved = self._call(self.fwd, self.order, sizes, case.scaling, rows, empty(SAVED, self.order), place)
        wanted = tuple(f"g{name}" for name in (*case.wanted, "W"))
        results = empty(GRADIENTS, tuple(name for name in self.bwd_order if name in wanted))
        found = self._call(self.bwd, self.bwd_order, sizes, case.scaling, rows | saved, results, place)
        gradients = {name[1:]: value for name, value in found.items()}
        if "x" in gradients:
            gradients["x"] = gradients["x"].reshape(case.x.shape)
        return saved["y"].reshape(given["gy"].shape), gradients

    def _call(
        self,
        function: str,
        order: tuple[str, ...],
        sizes: dict[str, int],
        s: float,
        inputs: dict[str, HostArray],
        outputs: dict[str, HostArray],
        place: str,
    ) -> dict[str, HostArray]:
        """Call one function, and return what it wrote to its outputs, once nothing else proves changed."""
        library = ctypes.CDLL(str(self.path))
        if not hasattr(library, function):
            raise LookupError(f"expected a function {function} in {self.path.name}, got none")
        call = getattr(library, function)
        call.restype = None
        fences = {name: Fence(value, place) for name, value in (inputs | outputs).items() if name in order}
        arguments: list[Any] = []
        for name in order:
            if name in SIZES:
                arguments.append(ctypes.c_int64(sizes[name]))
            elif name == "s":
                arguments.append(REALS[self.dtype](s))
            else:
                arguments.append(ctypes.c_void_p(fences[name].address if name in fences else None))
        call(*arguments)
        for name, fence in fences.items():
            if damage := fence.damage(written=name in outputs):
                raise StrayWrite(f"{function} wrote {damage} {name}")
        return {name: fences[name].array.copy() if name in fences else value for name, value in outputs.items()}


def _names(argument: str, order: str, known: set[str]) -> tuple[str, ...]:
    names = tuple(order.split())
    unknown = [name for name in names if name not in known]
    if unknown or len(set(names)) < len(names):
        raise ConfigError(f"{argument}: expected names once each, of {', '.join(sorted(known))}, got {order!r}")
    return names


class Fence:
    """A copy of an array whose surroundings are watched.

    place : end puts it against a page that may be neither read nor written, start behind one, and sentinels
    between two rows of words that a stray write changes, which names the culprit, as a fault does not. Where
    pages cannot be protected it is always the last.
    """

    def __init__(self, value: HostArray, place: str = "end") -> None:
        """value : the array to copy;  place : one of PLACES."""
        size, page = value.nbytes, mmap.PAGESIZE
        protect = _mprotect()
        room = size + (2 * MARGIN if place == "sentinels" or protect is None else 0)
        inner = max(1, -(-room // page)) * page
        self._memory = mmap.mmap(-1, inner + 2 * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        whole = np.frombuffer(self._memory, np.uint8)
        words = whole[page : page + inner].view(np.uint32)
        words[...] = SENTINEL
        begin = page + (MARGIN if room > size else 0 if place == "start" else inner - size)
        self.address = base + begin
        self.array: HostArray = whole[begin : begin + size].view(value.dtype).reshape(value.shape)
        self._before, self._after = whole[page:begin], whole[begin + size : page + inner]
        self.array[...] = value
        self._value = value
        if protect is not None:
            for guard in (base, base + page + inner):
                if protect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0):
                    raise OSError(ctypes.get_errno(), "mprotect failed")

    def damage(self, *, written: bool) -> str:
        """Where something was written that should not have been: before, past the end of, into; or nothing."""
        for where, part in (("before", self._before), ("past the end of", self._after)):
            if (part.view(np.uint32) != SENTINEL).any():
                return where
        same = written or self.array.tobytes() == np.ascontiguousarray(self._value).tobytes()
        return "" if same else "into"


def _mprotect() -> Any:
    """The system's mprotect, or None where there is none."""
    if sys.platform == "win32":
        return None
    function: Any = getattr(ctypes.CDLL(None, use_errno=True), "mprotect", None)
    return function
