"""The reference, the fast plan, and the products alone, in NumPy; merges and starts."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

import lorax_np as lx

from ..cases import SCALING, SEED, SITE, STEP, Arrays, Case, Merge
from ..cases import Start as StartCase
from . import Unavailable

VERSIONS = {"numpy": np.__version__, "lorax_np": lx.__version__}


def _fast() -> Any:
    fast = getattr(lx, "fast", None)
    if fast is None:
        raise Unavailable("this copy of lorax_np has no lorax_np.fast")
    return fast


def _on(blas: str) -> AbstractContextManager[Any]:
    """Multiply by the named BLAS from here on, for as long as the process lives and the result is kept."""
    context: AbstractContextManager[Any] = _fast().blas(blas)
    try:
        VERSIONS["blas"] = context.__enter__().what
    except lx.BackendError as error:
        raise Unavailable(str(error)) from error
    return context


class Reference:
    """lx.lora_linear_forward and its backward. A mask is made anew each step, as training would."""

    xp: Any = np

    def __init__(self, case: Case, arrays: Arrays, *, dtype: str = "") -> None:
        self.case, self.at = case, STEP
        v = {name: self.given(value, dtype or case.dtype) for name, value in arrays.items()}
        self.x, self.gy, self.base = v["x"], v["gy"], lx.Linear(v["W"])
        self.adapter = lx.Adapter(v["A"], v["B"], m=v.get("m"))

    def given(self, value: np.ndarray, dtype: str) -> Any:
        """A float32 array in the engine's library and dtype."""
        return value if dtype == "float32" else value.astype(stored(dtype))

    def forward(self) -> tuple[Any, Any]:
        case = self.case
        mask = None
        if case.p:
            mask = lx.dropout_mask(self.x.shape, case.p, seed=SEED, step=self.at, site=SITE, xp=self.xp)
        return lx.lora_linear_forward(self.x, self.base, self.adapter, scaling=SCALING, mask=mask)

    def backward(self, kept: Any) -> tuple[Any, Any]:
        how = {"scaling": SCALING, "norm_gradient": self.case.norm_gradient}
        return lx.lora_linear_backward(self.gy, kept, self.base, self.adapter, **how)

    def step(self) -> None:
        y, kept = self.forward()
        gradients = self.backward(kept)
        self.at += 1
        del y, kept, gradients

    def results(self) -> Arrays:
        self.at = STEP
        y, kept = self.forward()
        gx, g = self.backward(kept)
        found = {"y": y, "gx": gx, "gA": g.A, "gB": g.B, "gm": g.m}
        return {name: self.host(value) for name, value in found.items() if value is not None}

    def host(self, value: Any) -> np.ndarray:
        """A result as a NumPy array, in float32."""
        return np.asarray(value).astype(np.float32)

    def saved(self) -> int:
        y, kept = self.forward()
        del y
        given = {root(part)[0] for part in parts((self.x, self.gy, self.base, self.adapter))}
        found = dict(root(part) for part in parts(kept))
        return sum(size for at, size in found.items() if at not in given)


class Fast(Reference):
    """lx.fast's pair, on one BLAS; dropout by counter, so that nothing has to be kept of the mask."""

    def __init__(self, case: Case, arrays: Arrays, *, dtype: str = "", blas: str) -> None:
        self.fast, self.choice = _fast(), _on(blas)
        super().__init__(case, arrays, dtype=dtype)

    def forward(self) -> tuple[Any, Any]:
        dropout = (self.case.p, SEED, self.at, SITE) if self.case.p else None
        how = {"scaling": SCALING, "dropout": dropout}
        return self.fast.lora_linear_forward(self.x, self.base, self.adapter, **how)

    def backward(self, kept: Any) -> tuple[Any, Any]:
        how = {
            "scaling": SCALING,
            "norm_gradient": self.case.norm_gradient,
            "need_gx": self.case.need_gx,
        }
        return self.fast.lora_linear_backward(self.gy, kept, self.base, self.adapter, **how)

    def release(self) -> None:
        """Let go of the memory that the engine keeps for its next step."""
        self.fast.release()


class Base:
    """x Wᵀ and gy W into arrays that are there already: the own limit of whoever uses this BLAS."""

    def __init__(self, case: Case, arrays: Arrays, *, blas: str = "") -> None:
        self.case, self.x, self.gy, self.W = case, arrays["x"], arrays["gy"], arrays["W"]
        self.y, self.gx = np.empty_like(self.gy), np.empty_like(self.x)
        self.product = np.matmul
        if blas:
            self.choice, self.product = _on(blas), _fast().gemm.gemm

    def step(self) -> None:
        self.product(self.x, self.W.T, self.y)
        if self.case.need_gx:
            self.product(self.gy, self.W, self.gx)

    def results(self) -> Arrays:
        return {}

    def saved(self) -> int:
        return 0


# ---- what is kept ------------------------------------------------------------------------------------------


def parts(value: Any, depth: int = 6) -> Iterator[Any]:
    """Every array within a record, however nested."""
    if hasattr(value, "dtype") and hasattr(value, "nbytes"):
        yield value
    elif depth and value is not None and not isinstance(value, (str, bytes, int, float)):
        if isinstance(value, dict):
            inner = list(value.values())
        elif isinstance(value, (tuple, list)):
            inner = list(value)
        elif is_dataclass(value):
            inner = [getattr(value, field.name) for field in fields(value)]
        else:
            names = [*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())]
            inner = [getattr(value, name, None) for name in names]
        for one in inner:
            yield from parts(one, depth - 1)


def root(array: Any) -> tuple[int, int]:
    """Where the memory of an array begins, and its size; a view counts with all that it keeps alive."""
    while isinstance(getattr(array, "base", None), type(array)):
        array = array.base
    at = array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
    return at, array.nbytes


def stored(dtype: str) -> Any:
    """The dtype by its name; bfloat16 is ml_dtypes'."""
    if dtype != "bfloat16":
        return np.dtype(dtype)
    try:
        import ml_dtypes
    except ImportError as error:
        raise Unavailable("bfloat16 needs ml_dtypes; pip install 'lorax-np[bf16]'") from error
    return np.dtype(ml_dtypes.bfloat16)


# ---- merges ------------------------------------------------------------------------------------------------


class NaiveMerge:
    """W + s(BA), as it is written first."""

    def __init__(self, case: Merge, arrays: Arrays) -> None:
        self.W, self.A, self.B = arrays["W"], arrays["A"], arrays["B"]

    def merged(self) -> np.ndarray:
        """W', in whatever array the engine leaves it."""
        return self.W + np.float32(SCALING) * (self.B @ self.A)

    def step(self) -> None:
        self.merged()

    def results(self) -> Arrays:
        W = self.W.copy()
        found = {"W": self.merged().copy()}
        np.copyto(self.W, W)
        return found

    def saved(self) -> int:
        return 0


class ReferenceMerge(NaiveMerge):
    """lx.merge."""

    def merged(self) -> np.ndarray:
        W: np.ndarray = lx.merge(lx.Linear(self.W), lx.Adapter(self.A, self.B), scaling=SCALING).W
        return W


class FastMerge(NaiveMerge):
    """lx.fast.merge_into, on one BLAS: W itself is written."""

    def __init__(self, case: Merge, arrays: Arrays, *, blas: str) -> None:
        super().__init__(case, arrays)
        self.fast, self.choice = _fast(), _on(blas)
        if not hasattr(self.fast, "merge_into"):
            raise Unavailable("this copy of lorax_np.fast has no merge_into")
        self.base, self.adapter = lx.Linear(self.W), lx.Adapter(self.A, self.B)

    def merged(self) -> np.ndarray:
        self.fast.merge_into(self.base, self.adapter, scaling=SCALING)
        return self.W


class Copy(NaiveMerge):
    """W read and written once: what memory allows."""

    def merged(self) -> np.ndarray:
        self.out = getattr(self, "out", None)
        if self.out is None:
            self.out = np.empty_like(self.W)
        np.copyto(self.out, self.W)
        return self.out

    def results(self) -> Arrays:
        return {}


# ---- starts ------------------------------------------------------------------------------------------------


class Start:
    """lx.init_adapter with a PiSSA start; its A spans the right singular vectors."""

    def __init__(self, case: StartCase, arrays: Arrays, *, niter: int | None = None) -> None:
        word = "pissa" if niter is None else f"pissa_niter_{niter}"
        self.config = lx.LoraConfig(r=case.r, lora_alpha=case.r, init_lora_weights=word)
        self.base = lx.Linear(arrays["W"])

    def _adapter(self) -> lx.Adapter:
        return lx.init_adapter(self.base, self.config, rng=np.random.default_rng(0))[1]

    def step(self) -> None:
        self._adapter()

    def results(self) -> Arrays:
        return {"A": np.asarray(self._adapter().A)}

    def saved(self) -> int:
        return 0
