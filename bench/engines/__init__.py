"""The engines that are compared: for each a module, a class in it, and how it is made.

A module is imported in the engine's own process alone, so that torch and NumPy's BLAS are never timed in one.
"""

from importlib import import_module
from typing import Any, NamedTuple, Protocol

from ..cases import AnyCase, Arrays


class Engine(Protocol):
    """One engine over one case's arrays."""

    def __init__(self, case: AnyCase, arrays: Arrays, **options: Any) -> None: ...

    def step(self) -> None:
        """Forward and backward once, or one merge, or one start.

        An engine on a device has besides `burst`, how many steps are timed together, and `wait()` until they
        are done; one without has its step done on return.
        """

    def results(self) -> Arrays:
        """What it computes, as NumPy arrays: y, gx, gA, gB, gm of a layer; W of a merge; A of a start."""

    def saved(self) -> int:
        """Bytes that it keeps between forward and backward beside x and the parameters."""


class Entry(NamedTuple):
    """Where an engine is, what it is made with, and what a table says of it."""

    module: str
    maker: str
    options: dict[str, Any]
    about: str
    draws: bool = False  # it draws dropout for itself, and its results tell what was kept
    unit: str = ""  # the dtype whose roundoff its stored intermediates have; "" for the case's


ENGINES: dict[str, Entry] = {
    "peft": Entry("by_torch", "Peft", {}, "PEFT's layer, eager", draws=True),
    "compiled": Entry("by_torch", "Peft", {"compile": True}, "the same under torch.compile", draws=True),
    "torch base": Entry("by_torch", "Base", {}, "the frozen products alone, torch"),
    "numpy base": Entry("by_numpy", "Base", {}, "the frozen products alone, NumPy's BLAS"),
    "mkl base": Entry("by_numpy", "Base", {"blas": "mkl"}, "the frozen products alone, MKL"),
    "reference": Entry("by_numpy", "Reference", {}, "lorax_np's reference"),
    "fast": Entry(
        "by_numpy", "Fast", {"blas": "openblas"}, "lorax_np.fast on the BLAS that NumPy itself loaded"
    ),
    "fast scipy": Entry("by_numpy", "Fast", {"blas": "scipy"}, "lorax_np.fast on SciPy's BLAS"),
    "fast numpy": Entry(
        "by_numpy", "Fast", {"blas": "numpy"}, "lorax_np.fast on NumPy's matmul, and additions"
    ),
    "fast mkl": Entry("by_numpy", "Fast", {"blas": "mkl"}, "lorax_np.fast on MKL"),
    "peft bf16": Entry("by_torch", "Peft", {"dtype": "bfloat16"}, "PEFT's layer in bfloat16", draws=True),
    "torch base bf16": Entry("by_torch", "Base", {"dtype": "bfloat16"}, "the frozen products, torch, bfloat16"),
    "peft f32": Entry("by_torch", "Peft", {"dtype": "float32"}, "PEFT's layer in float32", draws=True),
    "fast bf16": Entry(
        "by_numpy", "Fast", {"dtype": "bfloat16", "blas": "openblas"}, "lorax_np.fast, all stored in bfloat16"
    ),
    "fast bf16 mkl": Entry(
        "by_numpy", "Fast", {"dtype": "bfloat16", "blas": "mkl"}, "the same with MKL's bfloat16 products"
    ),
    "fast split3 mkl": Entry(
        "by_numpy",
        "Fast",
        {"dtype": "float32", "blas": "mkl-split3"},
        "lorax_np.fast in float32, large products by three of bfloat16",
        unit="split3",
    ),
    "merge peft": Entry("by_torch", "Merge", {}, "W += s(BA) as PEFT writes it"),
    "merge naive": Entry("by_numpy", "NaiveMerge", {}, "W + s(BA) in NumPy"),
    "merge reference": Entry("by_numpy", "ReferenceMerge", {}, "lorax_np.merge, in float64"),
    "merge fast": Entry("by_numpy", "FastMerge", {"blas": "openblas"}, "lorax_np.fast.merge_into"),
    "merge fast mkl": Entry("by_numpy", "FastMerge", {"blas": "mkl"}, "the same on MKL"),
    "copy": Entry("by_numpy", "Copy", {}, "W read and written once"),
    "svd_lowrank 16": Entry(
        "by_torch", "Lowrank", {"niter": 16}, "torch.svd_lowrank, as PEFT's pissa_niter_16"
    ),
    "svd_lowrank 4": Entry("by_torch", "Lowrank", {"niter": 4}, "torch.svd_lowrank, as PEFT's pissa_niter_4"),
    "svd": Entry("by_torch", "Svd", {}, "torch.linalg.svd, as PEFT's pissa"),
    "start niter 4": Entry("by_numpy", "Start", {"niter": 4}, "lorax_np, pissa_niter_4"),
    "start niter 16": Entry("by_numpy", "Start", {"niter": 16}, "lorax_np, pissa_niter_16"),
    "start exact": Entry("by_numpy", "Start", {}, "lorax_np, pissa"),
    "gpu peft": Entry("by_torch", "Peft", {"device": "cuda"}, "PEFT's layer on the device", draws=True),
    "gpu compiled": Entry(
        "by_torch", "Peft", {"device": "cuda", "compile": True}, "the same under torch.compile", draws=True
    ),
    "gpu torch base": Entry("by_torch", "Base", {"device": "cuda"}, "the frozen products alone, torch"),
    "gpu triton": Entry("by_triton", "Triton", {}, "a LoRA layer fused by hand in Triton", draws=True),
    "gpu reference": Entry("by_cupy", "Reference", {}, "lorax_np's reference on CuPy"),
    "gpu fast": Entry("by_cupy", "Fast", {}, "lorax_np.fast on CuPy"),
    "gpu fast graph": Entry("by_cupy", "Fast", {"graph": True}, "the same, one captured graph a step"),
}

STOCK = ("peft", "compiled", "torch base", "numpy base", "reference", "fast", "fast mkl", "mkl base")
BY_TABLE: dict[str, tuple[str, ...]] = {
    "LoRA": STOCK,
    "ranks": STOCK,
    "no gx": STOCK,
    "DoRA": STOCK,
    "memory": ("peft", "compiled", "reference", "fast", "fast mkl"),
    "tokens": ("peft", "torch base", "numpy base", "reference", "fast"),
    "width": ("peft", "torch base", "numpy base", "reference", "fast"),
    "rank": ("peft", "torch base", "numpy base", "reference", "fast"),
    "merge": ("merge peft", "merge naive", "merge reference", "merge fast", "merge fast mkl", "copy"),
    "PiSSA": ("svd_lowrank 16", "svd_lowrank 4", "start niter 4", "start niter 16", "start exact", "svd"),
    "bf16": ("peft f32", "peft bf16", "torch base bf16", "fast bf16", "fast bf16 mkl", "fast split3 mkl"),
    "gpu": (
        "gpu peft",
        "gpu compiled",
        "gpu torch base",
        "gpu triton",
        "gpu reference",
        "gpu fast",
        "gpu fast graph",
    ),
    "gpu, DoRA": ("gpu peft", "gpu compiled", "gpu torch base", "gpu reference", "gpu fast"),
}


BURST = 10  # steps that a device is given before anyone waits for them


class Unavailable(Exception):
    """An engine that cannot run here, with the reason."""


def load(name: str) -> type[Engine]:
    """Import what an engine needs. Unavailable where something is missing."""
    entry = ENGINES[name]
    try:
        maker: type[Engine] = getattr(import_module(f".{entry.module}", __package__), entry.maker)
    except ImportError as error:
        raise Unavailable(str(error)) from error
    return maker


def make(name: str, case: AnyCase, arrays: Arrays) -> Engine:
    """Make an engine over a case's arrays, in this process."""
    return load(name)(case, arrays, **ENGINES[name].options)
