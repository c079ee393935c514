"""What is measured: sizes, ranks, dropout, DoRA, and the arrays that a case is made of."""

from collections.abc import Iterable
from math import sqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np

import lorax_np as lx

Arrays = dict[str, np.ndarray]

SCALING = 1.7  # no engine may take it for 1
SEED, STEP, SITE = 3, 5, 7  # of the masks that are made by position


class Case(NamedTuple):
    """One layer, and what is asked of it. dtype is that of the frozen base; threads 0 means all cores."""

    tokens: int
    d_in: int
    d_out: int
    r: int = 16
    p: float = 0.0
    dora: bool = False
    norm_gradient: bool = False
    need_gx: bool = True
    dtype: str = "float32"
    threads: int = 0

    @property
    def label(self) -> str:
        """How a table names it."""
        words = [f"{self.tokens}, {self.d_in}, {self.d_out}", f"r{self.r}"]
        words += ["bf16"] if self.dtype == "bfloat16" else []
        words += ["DoRA"] if self.dora else []
        words += [f"p {self.p:g}"] if self.p else []
        words += ["full norm"] if self.norm_gradient else []
        words += [] if self.need_gx else ["no gx"]
        words += [f"{self.threads} threads" if self.threads > 1 else "1 thread"] if self.threads else []
        return " ".join(words)

    @property
    def flops(self) -> int:
        """Of the two frozen products, or of the one where gx is not asked for."""
        return 2 * self.tokens * self.d_in * self.d_out * (2 if self.need_gx else 1)


class Merge(NamedTuple):
    """One weight, and the update folded into it."""

    d_out: int
    d_in: int
    r: int = 16
    threads: int = 0

    @property
    def label(self) -> str:
        """How a table names it."""
        return f"{self.d_out} x {self.d_in} r{self.r}"


class Start(NamedTuple):
    """One square weight whose singular values are i**-power, to start PiSSA from."""

    n: int
    power: float
    r: int = 16
    threads: int = 0

    @property
    def label(self) -> str:
        """How a table names it."""
        return f"{self.n} x {self.n} r{self.r}, s_i = i^-{self.power:g}"


AnyCase = Case | Merge | Start
KINDS: dict[str, type[AnyCase]] = {kind.__name__: kind for kind in (Case, Merge, Start)}

SIZES = ((512, 576, 576), (512, 576, 1536), (1024, 2048, 2048), (2048, 2048, 5632), (1024, 4096, 4096))
SQUARES = SIZES[0], SIZES[2], SIZES[4]

TABLES: dict[str, tuple[AnyCase, ...]] = {
    "LoRA": tuple(Case(*size, p=p) for size in SIZES for p in (0.0, 0.05)),
    "ranks": tuple(Case(*size, r=r) for size in SQUARES for r in (8, 64)),
    "no gx": tuple(Case(*size, p=p, need_gx=False) for size in SQUARES[:2] for p in (0.0, 0.05)),
    "DoRA": (
        *(Case(*size, dora=True) for size in SQUARES),
        *(Case(*size, dora=True, norm_gradient=True) for size in SQUARES),
        *(Case(*size, dora=True, p=0.05) for size in SQUARES[:2]),
    ),
    "memory": tuple(
        Case(*size, p=p, dora=dora)
        for dora in (False, True)
        for size in (*SQUARES, *(SIZES[3:4] if not dora else ()))
        for p in (0.0, 0.05)
    ),
    "bf16": tuple(Case(*size, dtype="bfloat16") for size in SQUARES),
    "merge": (
        *(Merge(n, n) for n in (576, 2048, 4096)),
        Merge(4096, 4096, 64),
        Merge(14336, 4096),
    ),
    "PiSSA": tuple(Start(n, power) for n in (576, 2048, 4096) for power in (1.0, 0.5)),
    "tokens": tuple(Case(n, 1024, 1024, threads=t) for t in (1, 2) for n in (16, 64, 256, 1024, 4096)),
    "width": tuple(Case(512, d, d, threads=t) for t in (1, 2) for d in (256, 512, 1024, 2048, 4096)),
    "rank": tuple(Case(512, 1024, 1024, r=r, threads=t) for t in (1, 2) for r in (4, 16, 64, 256)),
    "gpu": tuple(Case(n, 4096, 4096, p=p, dtype="bfloat16") for n in (512, 8192) for p in (0.0, 0.05)),
    "gpu, DoRA": tuple(Case(8192, 4096, 4096, dora=True, dtype=d) for d in ("float32", "bfloat16")),
}


def table(name: str, *, quick: bool = False) -> tuple[AnyCase, ...]:
    """The cases of a table; with quick, its first and its last, each axis an eighth as long."""
    every = TABLES[name]
    return tuple(dict.fromkeys(map(smaller, (every[0], every[-1])))) if quick else every


def smaller(case: AnyCase) -> AnyCase:
    """A case with axes an eighth as long, of at least 16."""
    axes = {name: max(16, getattr(case, name) // 8) for name in AXES if name in case._fields}
    return case._replace(**axes, r=min(case.r, *(n for name, n in axes.items() if name != "tokens")))


AXES = "tokens", "d_in", "d_out", "n"


# ---- arrays ------------------------------------------------------------------------------------------------


def draw(case: AnyCase) -> Arrays:
    """Random arrays of a case in float32."""
    if isinstance(case, Start):
        return _spectrum(case)
    return _merge(case) if isinstance(case, Merge) else _layer(case)


def _normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)


def _layer(case: Case) -> Arrays:
    """W and s·BA are of one size; under DoRA m is not the row norms. A bfloat16 case holds numbers it has."""
    tokens, d_in, d_out, r = case[:4]
    rng = np.random.default_rng((tokens, d_in, d_out, r))
    arrays = {"x": _normal(rng, tokens, d_in), "gy": _normal(rng, tokens, d_out)} | _weights(
        rng, d_out, d_in, r
    )
    if case.dtype == "bfloat16":
        arrays = {name: to_bits(value, 8) for name, value in arrays.items()}
    if case.dora:
        base, adapter = lx.Linear(arrays["W"]), lx.Adapter(arrays["A"], arrays["B"])
        norms = lx.row_norms(base, adapter, scaling=SCALING)
        m = (norms * rng.uniform(0.5, 2.0, d_out)).astype(np.float32)
        arrays["m"] = to_bits(m, 8) if case.dtype == "bfloat16" else m
    return arrays


def _weights(rng: np.random.Generator, d_out: int, d_in: int, r: int) -> Arrays:
    return {
        "W": _normal(rng, d_out, d_in, scale=1 / sqrt(d_in)),
        "A": _normal(rng, r, d_in, scale=1 / sqrt(d_in)),
        "B": _normal(rng, d_out, r, scale=1 / (SCALING * sqrt(r))),
    }


def _merge(case: Merge) -> Arrays:
    return _weights(np.random.default_rng(case[:3]), *case[:3])


def _spectrum(case: Start) -> Arrays:
    """W = U·diag(s)·Vh, where U and Vh are products of reflections, in float64; and Vh's first r rows."""
    rng = np.random.default_rng((case.n, round(8 * case.power)))
    W = np.diag(np.arange(1, case.n + 1.0) ** -case.power)
    Vh = np.eye(case.r, case.n)
    for _ in range(REFLECTIONS):
        u, v = (w / np.linalg.norm(w) for w in rng.standard_normal((2, case.n)))
        W -= 2 * np.outer(u, u @ W)
        W -= 2 * np.outer(W @ v, v)
        Vh -= 2 * np.outer(Vh @ v, v)
    return {"W": W.astype(np.float32), "Vh": Vh}


REFLECTIONS = 8


def to_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Round float32 values to so many significant bits."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits).astype(np.float32)


def mask(case: Case) -> np.ndarray | None:
    """The mask of engines that make it by position, or None without dropout."""
    if not case.p:
        return None
    return lx.dropout_mask((case.tokens, case.d_in), case.p, seed=SEED, step=STEP, site=SITE, xp="numpy")


def write(folder: Path, arrays: Arrays) -> None:
    """Put arrays where a worker finds them."""
    for name, value in arrays.items():
        np.save(folder / f"{name}.npy", value)


def read(folder: Path, names: Iterable[str] | None = None) -> Arrays:
    """The arrays of a folder by name, all or those named."""
    files = sorted(folder.glob("*.npy"))
    return {file.stem: np.load(file) for file in files if names is None or file.stem in names}
