"""The reference and the fast plan on a device, by CuPy."""

from typing import Any

import numpy as np

import lorax_np as lx
from lorax_np.backend import namespace
from lorax_np.fast import gpu, gpu_graph

from ..cases import SCALING, SEED, SITE, STEP, Arrays, Case
from . import BURST, Unavailable, by_numpy

VERSIONS = {"lorax_np": lx.__version__}


def _library() -> Any:
    try:
        lib = namespace("cupy")
    except lx.BackendError as error:
        raise Unavailable(f"not run on a GPU: {error}") from error
    VERSIONS.update(cupy=lib.__version__, device=lx.backend_info()["cupy"])
    return lib


class Reference(by_numpy.Reference):
    """lx.lora_linear_forward and its backward on CuPy's arrays. Masks are made on the host, and moved."""

    def __init__(self, case: Case, arrays: Arrays, *, dtype: str = "") -> None:
        self.xp = _library()
        self.burst = 1 if case.p and type(self) is Reference else BURST  # a mask from the host takes its time
        super().__init__(case, arrays, dtype=dtype)

    def given(self, value: np.ndarray, dtype: str) -> Any:
        return self.xp.asarray(super().given(value, dtype))

    def host(self, value: Any) -> np.ndarray:
        return np.asarray(self.xp.asnumpy(value)).astype(np.float32)

    def wait(self) -> None:
        self.xp.cuda.get_current_stream().synchronize()

    def peak(self) -> int:
        """Bytes of CuPy's pool that three steps took beside what was in use before."""
        pool = self.xp.get_default_memory_pool()
        pool.free_all_blocks()
        before = pool.used_bytes()
        for _ in range(3):
            self.step()
        return int(pool.total_bytes() - before)


class Fast(Reference):
    """lx.fast's plan for a device; with graph, one captured graph a step."""

    def __init__(self, case: Case, arrays: Arrays, *, dtype: str = "", graph: bool = False) -> None:
        super().__init__(case, arrays, dtype=dtype)
        self.graph = None
        if graph:
            how: dict[str, Any] = {"norm_gradient": case.norm_gradient, "need_gx": case.need_gx}
            self.graph = gpu_graph.Captured(
                self.x, self.gy, self.base, self.adapter, scaling=SCALING, dropout=self._dropout(), **how
            )

    def _dropout(self) -> tuple[float, int, int, int] | None:
        return (self.case.p, SEED, self.at, SITE) if self.case.p else None

    def forward(self) -> tuple[Any, Any]:
        return gpu.forward(self.x, self.base, self.adapter, scaling=SCALING, dropout=self._dropout())

    def backward(self, kept: Any) -> tuple[Any, Any]:
        how: dict[str, Any] = {"norm_gradient": self.case.norm_gradient, "need_gx": self.case.need_gx}
        return gpu.backward(self.gy, kept, self.base, self.adapter, scaling=SCALING, **how)

    def step(self) -> None:
        if self.graph is None:
            super().step()
            return
        self.graph(self.x, self.gy, step=self.at)
        self.at += 1

    def results(self) -> Arrays:
        if self.graph is None:
            return super().results()
        y, gx, g = self.graph(self.x, self.gy, step=STEP)
        found = {"y": y, "gx": gx, "gA": g.A, "gB": g.B, "gm": g.m}
        return {name: self.host(value) for name, value in found.items() if value is not None}
