"""A hand-written forward and its backward at one point: what goes in, what comes out, how the two behave."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..cases import HostArray
from .quotients import View


class Pair:
    """f and f_backward at their point, called with copies."""

    def __init__(
        self,
        f: Callable[..., Any],
        f_backward: Callable[..., Any],
        inputs: Any,
        has_saved: bool,
        names: Any,
        seed: int,
    ) -> None:
        """Arguments as gradcheck takes them; f is called once, for the shapes of what comes out."""
        self.f, self.f_backward, self.has_saved = f, f_backward, has_saved
        inputs = inputs if isinstance(inputs, tuple | list) else (inputs,)
        self.inputs = tuple(v.copy() if isinstance(v, np.ndarray) else v for v in inputs)
        self.floating = [
            k for k, v in enumerate(self.inputs) if isinstance(v, np.ndarray) and v.dtype.kind in "fcV"
        ]
        for k in self.floating:
            if self.inputs[k].dtype not in (np.float32, np.float64):
                raise TypeError(f"inputs[{k}]: expected float32 or float64, got {self.inputs[k].dtype}")
            if not np.isfinite(self.inputs[k]).all():
                raise ValueError(f"inputs[{k}]: expected finite numbers, got NaN or infinity")
        if not self.floating:
            raise TypeError("inputs: expected at least one array of float32 or float64, got none")
        words = names.replace(",", " ").split() if isinstance(names, str) else names
        self.names = list(words or [f"inputs[{k}]" for k in range(len(inputs))])
        if len(self.names) != len(inputs):
            raise ValueError(f"names: expected {len(inputs)}, one for each input, got {len(self.names)}")
        ys, self.single, _ = self.forward(self.copies())
        rng = np.random.default_rng((seed, 0))
        self.gys = tuple(np.asarray(rng.standard_normal(y.shape), y.dtype) for y in ys)
        self.G = np.concatenate([np.asarray(gy, np.float64).ravel() for gy in self.gys])
        self.eps = max(float(np.finfo(v.dtype).eps) for v in (*(self.inputs[k] for k in self.floating), *ys))

    def forward(self, inputs: Sequence[Any]) -> tuple[tuple[HostArray, ...], bool, Any]:
        """The outputs, whether f returned one bare array, and what it saved."""
        with np.errstate(all="ignore"):  # what is not finite is judged, not warned of
            found = self.f(*inputs)
        saved = None
        if self.has_saved:
            if not isinstance(found, tuple | list) or len(found) != 2:
                raise TypeError(f"f: expected (y, saved) with has_saved, got {type(found).__name__}")
            found, saved = found
        single = not isinstance(found, tuple | list)
        ys = tuple(np.asarray(y) for y in ((found,) if single else found))
        for y in ys:
            if y.dtype.kind not in "fc" or y.dtype.itemsize < 4:
                raise TypeError(f"f: expected float32 or float64 outputs, got {y.dtype}")
        return ys, single, saved

    def view(self, k: int, wide: bool) -> View:
        """f along one argument; in float64 throughout where wide, which complex steps need."""
        held = [v.astype(np.float64) if wide and j in self.floating else v for j, v in enumerate(self.inputs)]

        def f(value: HostArray) -> HostArray:
            inputs = [v.copy() if isinstance(v, np.ndarray) else v for v in held]
            inputs[k] = value.copy()
            with warnings.catch_warnings():
                warnings.simplefilter("error", np.exceptions.ComplexWarning)  # a dropped imaginary part
                ys, _, _ = self.forward(inputs)
            kind = np.complex128 if any(y.dtype.kind == "c" for y in ys) else np.float64
            return np.concatenate([y.astype(kind).ravel() for y in ys])

        return View(f, held[k], self.G, self.eps)

    def conduct(self, nondet_tol: float) -> tuple[list[Any], list[str]]:
        """The gradients by input, and what no pair may do: write to its arguments, or answer anew."""
        faults: list[str] = []
        ys, saved, grads = self.once(faults)
        again, _, grads2 = self.once([])
        for name, one, other in (
            *(
                (f"output {i}" if len(ys) > 1 else "y", a, b)
                for i, (a, b) in enumerate(zip(ys, again, strict=True))
            ),
            *((f"gradient by {self.names[k]}", grads[k], grads2[k]) for k in self.floating),
        ):
            if (off := _apart(one, other)) > nondet_tol:
                faults.append(
                    f"{name} is not repeatable: two calls differ by {off:.2g}, nondet_tol is {nondet_tol:g}"
                )
        if self.has_saved and not faults:
            third = self.backward(saved, self.copies())
            for k in self.floating:
                if _apart(grads[k], third[k]) > nondet_tol:
                    faults.append(
                        f"gradient by {self.names[k]} changes when backward is asked twice: saved is written to"
                    )
        return grads, faults

    def copies(self) -> list[Any]:
        """The inputs, in arrays of their own."""
        return [v.copy() if isinstance(v, np.ndarray) else v for v in self.inputs]

    def once(self, faults: list[str]) -> tuple[tuple[HostArray, ...], Any, list[Any]]:
        """Forward, then backward on the same arrays; what either wrote to becomes a fault."""
        inputs, told = self.copies(), set()
        ys, _, saved = self.forward(inputs)
        ys = tuple(y.copy() for y in ys)
        gys = [gy.copy() for gy in self.gys]
        for who in ("f", "f_backward"):
            grads = [] if who == "f" else self.backward(saved, inputs, gys)
            for name, mine, sent in (
                *zip(self.names, inputs, self.inputs, strict=True),
                *(("gy", a, b) for a, b in zip(gys, self.gys, strict=True)),
            ):
                if isinstance(sent, np.ndarray) and mine.tobytes() != sent.tobytes() and name not in told:
                    told.add(name)
                    faults.append(f"{name} is written to by {who}")
        return ys, saved, grads

    def backward(self, saved: Any, inputs: Sequence[Any], gys: Sequence[HostArray] | None = None) -> list[Any]:
        """One gradient for each input, as NumPy arrays of their own, None where there is none."""
        gys = [gy.copy() for gy in self.gys] if gys is None else gys
        gy = gys[0] if self.single else tuple(gys)
        given = (gy, saved, *inputs) if self.has_saved else (gy, *inputs)
        with np.errstate(all="ignore"):  # as in forward
            found = self.f_backward(*given)
        found = list(found) if isinstance(found, tuple | list) else [found]
        if len(found) == len(self.floating) < len(inputs):  # only those that can have one
            by_input = dict(zip(self.floating, found, strict=True))
            found = [by_input.get(k) for k in range(len(inputs))]
        if len(found) != len(inputs):
            raise ValueError(
                f"f_backward: expected {len(inputs)} gradients, one for each input, got {len(found)}"
            )
        return [None if g is None else np.array(g) for g in found]


def _apart(one: Any, other: Any) -> float:
    """The largest difference of two answers; infinite where they are not even alike."""
    if one is None or other is None:
        return 0.0 if one is other else np.inf
    if one.shape != other.shape or one.dtype != other.dtype:
        return np.inf
    if one.tobytes() == other.tobytes():
        return 0.0
    off = np.abs(one.astype(np.float64) - other.astype(np.float64))
    return float(np.where(np.isnan(off), np.inf, off).max(initial=0.0))
