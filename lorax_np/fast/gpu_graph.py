"""One step of a layer as one CUDA graph, for few tokens, where starting kernels takes longer than they do."""

from typing import Any

import numpy as np

from ..backend import Array, dtype_name, namespace_of
from ..errors import ConfigError
from ..params import Adapter, Linear
from .checks import Dropout
from .gpu import backward, forward
from .gpu_products import Cublas, products_by


class Captured:
    """A step as one CUDA graph: called with new x and gy of the same shapes, it launches all kernels at once.

    The arrays that it returns are its own, and the next call writes into them. base and adapter are read where
    they lie at each call, so that an optimiser may update them in place. Its memory is from a pool of its own.
    """

    def __init__(
        self,
        x: Array,
        gy: Array,
        base: Linear,
        adapter: Adapter,
        *,
        scaling: float,
        dropout: Dropout | None = None,
        norm_gradient: bool = False,
        need_gx: bool = True,
    ) -> None:
        """Run the step twice, so that kernels are compiled and memory is there, then capture it."""
        lib = namespace_of(x=x, gy=gy)
        self.lib, self.stream = lib, lib.cuda.Stream(non_blocking=True)
        self.pool = lib.cuda.MemoryPool()
        self.keyed = isinstance(dropout, tuple)
        lib.cuda.get_current_stream().synchronize()  # once, for what the arguments still wait for
        self.cublas = Cublas(lib, self.stream)
        with self.stream, lib.cuda.using_allocator(self.pool.malloc), products_by(self.cublas):
            self.x, self.gy = lib.array(x), lib.array(gy)
            self.at = lib.zeros((1,), dtype=np.uint64)

            def step() -> Any:
                y, saved = forward(
                    self.x, base, adapter, scaling=scaling, dropout=dropout, at=self.at if self.keyed else None
                )
                how: dict[str, Any] = {"scaling": scaling, "norm_gradient": norm_gradient, "need_gx": need_gx}
                return y, *backward(self.gy, saved, base, adapter, **how), saved

            for _ in range(2):
                step()
            self.stream.begin_capture()
            self.kept = step()  # results and what is saved stay where the graph writes them
            self.graph = self.stream.end_capture()

    def __call__(self, x: Array, gy: Array, *, step: int = 0) -> tuple[Any, Any, Adapter]:
        """Return y, gx and the gradients of the adapter, of this x and gy and, with dropout, of this step.

        Runs on the graph's own stream; the current stream waits for it, the host does not.
        """
        for name, given, own in (("x", x, self.x), ("gy", gy, self.gy)):
            if given.shape != own.shape or dtype_name(given) != dtype_name(own):
                raise ConfigError(
                    f"{name}: expected {own.shape} {dtype_name(own)}, set by the capture, "
                    f"got {given.shape} {dtype_name(given)}"
                )
        here = self.lib.cuda.get_current_stream()
        self.stream.wait_event(here.record())
        with self.stream:
            self.x[...] = x
            self.gy[...] = gy
            if self.keyed:
                self.at.fill(np.uint64(step))
            self.graph.launch(self.stream)
        here.wait_event(self.stream.record())
        y, gx, g, _ = self.kept
        return y, gx, g
