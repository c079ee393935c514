"""A training step on a GPU: lorax_np by CuPy, and transformers and PEFT by torch, as engines of the bench.

    python -m bench.training_gpu profile [--p 0.05] [--checkpoint] [--padded]

profile prints where the time of one of lorax_np's steps goes. The two race in bench.training's rows "gpu ...".
"""

import argparse
import importlib
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from . import training_kernels
from .training_models import ALPHA, LR, RANK, SEED, batches, next_tokens, smollm2_or_drawn_ids, start, tensors
from .training_peft import Peft
from .training_rows import SEQUENCES, UNEVEN, WIDTH, NoDevice

CLIP = 1.0
WARM = 3  # steps before one is looked at


def library() -> Any:
    """CuPy. NoDevice, one line, where it does not work."""
    from lorax_np.backend import namespace
    from lorax_np.errors import BackendError

    try:
        return namespace("cupy")
    except BackendError as error:
        raise NoDevice(f"not run on a GPU: {error}") from error


def about() -> dict[str, str]:
    """The device, its driver and CUDA, as a record has them."""
    runtime, ask = library().cuda.runtime, ["nvidia-smi", "--query-gpu=driver_version,memory.total"]
    try:
        how: Any = {"capture_output": True, "text": True, "check": True}
        told = subprocess.run([*ask, "--format=csv,noheader"], **how).stdout
    except (OSError, subprocess.CalledProcessError):
        told = "unknown, unknown"
    driver, _, memory = told.strip().partition("\n")[0].partition(", ")
    number = runtime.runtimeGetVersion()
    name = runtime.getDeviceProperties(library().cuda.Device().id)["name"].decode()
    cuda = f"{number // 1000}.{number % 1000 // 10}"
    return {"name": name, "memory": memory, "driver": driver, "CUDA": cuda}


# ---- engines -----------------------------------------------------------------------------------------------


class Cupy:
    """lorax_np as a run of lorax-np train has it: Passes, and steps of Held, with the base on the device.

    xp : the library, CuPy where it is None;  shape : a config whose weights are drawn, else SmolLM2
    """

    xp: Any = None
    shape: dict[str, Any] | None = None

    def open(self, p: float, checkpoint: bool, workers: int | str = "auto") -> dict[str, Any]:
        """workers : for engines on the host; a device has one"""
        import lorax_np as lx
        from lorax_np.config import Site
        from lorax_np.models.load import model_of
        from lorax_np.models.records import Trained
        from lorax_np.train import Passes, TrainConfig
        from lorax_np.train.held import Held
        from lorax_np.train.step import parameters

        self.xp = self.xp or library()
        weights, about, words = tensors(self.shape)
        model = model_of(weights, about, task="CAUSAL_LM", xp=self.xp)  # as load_model has it
        given = start(model.weights, model.config["num_hidden_layers"])
        trained = Trained({site: lx.Adapter(*map(self.xp.asarray, pair)) for site, pair in given.items()}, {})
        how: Any = {"kind": "linear", "r": RANK, "alpha": ALPHA, "scaling": ALPHA / RANK, "p": p}
        sites = {site: Site(name=site, weight=f"{site}.weight", **how) for site in given}
        config = TrainConfig(
            learning_rate=LR, max_grad_norm=CLIP, seed=SEED, grad_checkpoint="on" if checkpoint else "off"
        )
        self.passes = Passes(model, sites, trained, task="CAUSAL_LM", config=config)
        self.held = Held(trained, config, sites)
        self.passes.settle()
        names = parameters(trained)
        self.rates, self.t = (dict.fromkeys(names, LR), dict.fromkeys(names, 0.0)), 0
        runs = lx.backend_info()["cupy"] if self.xp is not np else "NumPy"
        return {"engine": f"lorax_np {lx.__version__}, {self.passes.what}, {runs}, {words}"}

    def step(self, ids: list[list[int]], labels: list[list[int]]) -> float:
        """The loss, once the device is done with all of the step."""
        from lorax_np.models.records import Batch
        from lorax_np.parallel import Alone

        starts = tuple(int(n) for n in np.cumsum([0, *map(len, ids)]))
        self.batch = Batch(np.concatenate(ids), starts, np.concatenate(labels), tuple(range(len(ids))))
        how: Any = {"step": self.t, "rates": self.rates, "ranks": Alone()}
        outcome = self.held.step(self.passes, [self.batch], **how)
        self.t += 1
        self.wait()
        if not outcome.applied:
            raise RuntimeError(f"step {self.t}: loss {outcome.loss}, norm {outcome.norm}")
        return outcome.loss

    def wait(self) -> None:
        """Until the device is done."""
        if self.xp is not np:
            self.xp.cuda.get_current_stream().synchronize()

    def gradients(self) -> None:
        """One pass over the last batch; nothing is trained."""
        from lorax_np.models.records import Dropout

        n = int((self.batch.labels != -100).sum())
        self.passes.gradients(self.held.trained, self.batch, n=n, dropout=Dropout(SEED, self.t))

    def peak(self) -> dict[str, Any]:
        """Bytes that the pool holds, which gives none back by itself; those in use at most in another pass, and
        whether the host waits for the device in it."""
        held = int(self.xp.get_default_memory_pool().total_bytes())
        try:
            used, where = most_used(self.xp, self.gradients), waits(self.gradients)
            said = f"no wait inside a pass: {f'no, {where}' if where else 'yes'}"
        except Exception as error:  # the steps were timed, whatever two more passes come to
            used, said = 0, f"another pass failed: {type(error).__name__}: {error}"
        return {"bytes": held, "used": used, "said": said}

    def trained(self) -> np.ndarray:
        """A and B of every site, one behind another."""
        from lorax_np.backend import to_host

        parts = [x for adapter in self.held.trained.adapters.values() for x in (adapter.A, adapter.B)]
        return np.concatenate([to_host(part).ravel() for part in parts])


class PeftGpu(Peft):
    """transformers and PEFT in float32 on the device, as torch has it by default: eager, without TF32."""

    device, clip = "cuda", CLIP
    shape: dict[str, Any] | None = None

    def weights(self) -> tuple[Any, Any]:
        weights, about, self.words = tensors(self.shape)
        return weights, about

    def open(self, p: float, checkpoint: bool, workers: int | str = "auto") -> dict[str, Any]:
        import torch

        if self.device == "cuda" and not torch.cuda.is_available():
            raise NoDevice(f"torch {torch.__version__} finds no CUDA device")
        found = super().open(p, checkpoint)["engine"]
        runs = torch.cuda.get_device_name() if self.device == "cuda" else self.device
        attention = self.model.config._attn_implementation
        return {"engine": f"{found}, eager, attention {attention}, on {runs}, {self.words}"}

    def step(self, ids: list[list[int]], labels: list[list[int]]) -> float:
        loss = super().step(ids, labels)
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        return loss

    def peak(self) -> dict[str, Any]:
        """Bytes that torch reserved at most, and those in use at most."""
        cuda = self.torch.cuda
        return {"bytes": cuda.max_memory_reserved(), "used": cuda.max_memory_allocated()}


def most_used(lib: Any, do: Callable[[], object]) -> int:
    """Bytes of CuPy's pool that are in use at most while `do()` runs."""
    pool = lib.get_default_memory_pool()

    class Watch(lib.cuda.MemoryHook):
        name, most = "Watch", int(pool.used_bytes())

        def malloc_postprocess(self, **_: Any) -> None:
            self.most = max(self.most, int(pool.used_bytes()))

    watch = Watch()
    with watch:
        do()
    return watch.most


def waits(do: Callable[[], object]) -> str:
    """Where the host first waits for the device while `do()` runs, as CuPy sees it; nothing if it does not."""
    cupyx = importlib.import_module("cupyx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with cupyx.allow_synchronize(False):
                do()
        except cupyx.DeviceSynchronized as error:
            return place(error)
    return ""


def place(error: BaseException) -> str:
    """File and line of the innermost of lorax_np's lines, or the bench's, that an error came through."""
    import lorax_np as lx

    homes = {Path(__file__).parent, Path(lx.__file__).parent}
    frames = traceback.extract_tb(error.__traceback__)
    frame = ([each for each in frames if homes & {*Path(each.filename).parents}] or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


# ---- where the time goes -----------------------------------------------------------------------------------


def profile(engine: Any, lengths: tuple[int, ...]) -> list[str]:
    """Lines on one step of an open engine: a pass and the whole, on host and device, and kernels by kind."""
    given = batches(smollm2_or_drawn_ids(), lengths, WARM + 2, next_tokens)
    for batch in given[:WARM]:
        engine.step(**batch)
    lib, marks, took, gradients = engine.xp, list[Any](), list[float](), engine.passes.gradients

    def clocked(do: Callable[..., Any], *args: Any, **how: Any) -> Any:
        begin, end = lib.cuda.Event(), lib.cuda.Event()
        begin.record()
        at = time.perf_counter()
        found = do(*args, **how)
        took.append(time.perf_counter() - at)
        end.record()
        marks.append((begin, end))
        return found

    engine.passes.gradients = lambda *args, **how: clocked(gradients, *args, **how)
    try:
        clocked(engine.step, **given[WARM])
    finally:
        engine.passes.gradients = gradients
    engine.wait()
    lines = [f"{'':10}{'host ms':>10}{'device ms':>11}, waiting for the host included"]
    for name, seconds, (begin, end) in zip(("pass", "step"), took, marks, strict=True):
        lines.append(f"{name:<10}{1e3 * seconds:10.1f}{lib.cuda.get_elapsed_time(begin, end):11.1f}")
    return lines + training_kernels.lines(lambda: engine.step(**given[WARM + 1]))


def main(words: list[str] | None = None) -> int:
    """0, or 1 where there is no device."""
    raw = argparse.RawDescriptionHelpFormatter
    prog = "python -m bench.training_gpu"
    known = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=raw)
    known.add_argument("do", choices=["profile"])
    known.add_argument("--p", type=float, default=0.05, help="of dropout (0.05)")
    known.add_argument("--checkpoint", action="store_true", help="compute blocks again in the backward")
    known.add_argument("--padded", action="store_true", help="sequences of uneven lengths")
    asked, engine = known.parse_args(words), Cupy()
    try:
        print(engine.open(asked.p, asked.checkpoint)["engine"])
    except NoDevice as error:
        print(f"bench.training_gpu: {error}", file=sys.stderr)
        return 1
    print("\n".join(profile(engine, UNEVEN if asked.padded else (WIDTH,) * SEQUENCES)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
