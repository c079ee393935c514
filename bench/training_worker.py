"""One engine that trains SmolLM2 in a process of its own: commands as JSON lines in, answers out.

python -m bench.training_worker ENGINE     ours, mkl, peft; gemm, gemm mkl: the products nobody avoids;
                                           minilm, minilm mkl, minilm peft; micro: gradients, no training;
                                           cupy, peft gpu: on a device

open {p, checkpoint, workers, bits, rows}   the model, and LoRA of rank 16 on all seven linear layers
step {ids, labels}                     a list of rows each; forward, backward, AdamW: {seconds, loss}
eval {ids, labels}                     the loss alone
compare {ids, labels}                  of micro: gaps between its gradients by parts
adapters {path}                        what trains, in one order for every engine, into a file of NumPy's
peak                                   most bytes resident since the model was there, or of a device: bytes of
                                       its pool, those used, and what is said of the passes
"""

import json
import os
import sys
import time
from typing import Any

import numpy as np

from .training_gpu import Cupy, PeftGpu, place
from .training_micro import Micro
from .training_minilm import Ours as MiniLM
from .training_minilm import OursMkl as MiniLMMkl
from .training_minilm import Peft as MiniLMPeft
from .training_models import ALPHA, LR, RANK, SEED, model_path, start
from .training_peft import Peft
from .training_rows import NoDevice
from .worker import CLEAR, _resident


class Ours:
    """lorax_np's planned pass, and AdamW over one array."""

    blas = "openblas"

    def open(
        self,
        p: float,
        checkpoint: bool,
        workers: int | str = "auto",
        bits: str = "",
        masks: bool = False,
        rows: int = 512,
    ) -> dict[str, Any]:
        """masks : its own are meant, which it has anyhow;  rows : that a worker has at once"""
        import lorax_np as lx
        from lorax_np.config import Site
        from lorax_np.fast.llama import llama_plan

        self.context = lx.fast.blas(self.blas)
        engine = self.context.__enter__()
        model = lx.load_model(model_path(), task="CAUSAL_LM")
        if bits:
            from lorax_np.models.quantised import quantised

            model = quantised(model, bits)
        weights = model.weights
        given = start(weights, model.config["num_hidden_layers"])
        self.flat = np.concatenate([part.ravel() for pair in given.values() for part in pair])
        self.moments, self.t, at, self.adapters = np.zeros((2, self.flat.size), "float32"), 0, 0, {}
        for site, pair in given.items():
            parts = []
            for part in pair:
                parts.append(self.flat[at : at + part.size].reshape(part.shape))
                at += part.size
            self.adapters[site] = lx.Adapter(*parts)
        about = {"kind": "linear", "r": RANK, "alpha": ALPHA, "scaling": ALPHA / RANK, "p": p}
        sites = {site: Site(name=site, weight=f"{site}.weight", **about) for site in given}
        how = {"workers": workers, "checkpoint": checkpoint, "rows": rows}
        self.p, self.plan = p, llama_plan(weights, model.config, self.adapters, sites, {}, **how)
        return {"engine": f"lorax_np {lx.__version__}, {engine.what}"}

    def batch(self, ids: list[list[int]], labels: list[list[int]]) -> dict[str, Any]:
        flat = {"ids": np.concatenate(ids), "labels": np.concatenate(labels).astype("int64")}
        starts, n = np.cumsum([0, *map(len, ids)]), int((flat["labels"] != -100).sum())
        return {**flat, "starts": starts, "index": range(len(ids)), "n": n, "saved": {}}

    def step(self, ids: list[list[int]], labels: list[list[int]]) -> float:
        drop = (SEED, self.t) if self.p else None
        loss, found, _ = self.plan.loss_and_gradients(self.adapters, **self.batch(ids, labels), dropout=drop)
        self.update(np.concatenate([part.ravel() for g in found.values() for part in (g.A, g.B)]))
        return loss

    def update(self, g: np.ndarray) -> None:
        """AdamW as torch's, without decay, in blocks that stay in the cache."""
        self.t += 1
        b1, b2, eps = 0.9, 0.999, 1e-8
        rate, root = LR / (1 - b1**self.t), np.sqrt(1 - b2**self.t)
        for at in range(0, g.size, 1 << 16):
            here = slice(at, at + (1 << 16))
            m, v, x = self.moments[0, here], self.moments[1, here], g[here]
            m += np.float32(1 - b1) * (x - m)
            v *= np.float32(b2)
            v += np.float32(1 - b2) * x * x
            self.flat[here] -= np.float32(rate) * m / (np.sqrt(v) / np.float32(root) + np.float32(eps))

    def eval(self, ids: list[list[int]], labels: list[list[int]]) -> float:
        return self.plan.loss(self.adapters, **self.batch(ids, labels))

    def trained(self) -> np.ndarray:
        """A and B of every site, one behind another."""
        return self.flat


class OursMkl(Ours):
    """The same with MKL behind gemm."""

    blas = "mkl"


class Gemm:
    """The frozen products and the head's alone, at their shapes: what no engine of this BLAS goes below."""

    blas = "openblas"

    def open(self, p: float, checkpoint: bool, workers: int | str = "auto") -> dict[str, Any]:
        import lorax_np as lx
        from lorax_np.fast.llama.threads import worker_count

        self.context = lx.fast.blas(self.blas)
        engine = self.context.__enter__()
        weights = lx.open_checkpoint(model_path())
        c = weights.config
        d, ff, kv = c["hidden_size"], c["intermediate_size"], c["num_key_value_heads"] * c["head_dim"]
        d_q = c["num_attention_heads"] * c["head_dim"]
        rng = np.random.default_rng(0)
        shapes = ((d_q + 2 * kv, d), (d, d_q), (2 * ff, d), (d, ff))
        self.layers = [
            [rng.standard_normal(shape, "float32") for shape in shapes] for _ in range(c["num_hidden_layers"])
        ]
        self.E, self.count = rng.standard_normal((c["vocab_size"], d), "float32"), worker_count(workers, 99)
        self.room: list[dict[Any, np.ndarray]] = [{} for _ in range(self.count)]
        return {"engine": engine.what}

    def step(self, ids: list[list[int]], labels: list[list[int]]) -> float:
        from lorax_np.fast.gemm import gemm
        from lorax_np.fast.llama.threads import in_threads

        def work(who: int, rows: int) -> None:
            def array(*shape: int) -> np.ndarray:
                return self.room[who].setdefault(shape, np.ones(shape, "float32"))

            for layer in self.layers:
                for W in layer:
                    gemm(array(rows, W.shape[1]), W.T, array(rows, W.shape[0] + 1)[:, :-1])
            for at in range(0, rows, 256):
                z = array(min(256, rows - at), len(self.E))
                gemm(array(len(z), self.E.shape[1]), self.E.T, z)
                gemm(z, self.E, array(len(z), self.E.shape[1] + 1)[:, :-1])
            for layer in reversed(self.layers):
                for W in layer:
                    gemm(array(rows, W.shape[0]), W, array(rows, W.shape[1] + 1)[:, :-1])

        N = sum(map(len, ids))
        in_threads(work, [N // self.count] * self.count)
        return 0.0


class GemmMkl(Gemm):
    """The same by MKL."""

    blas = "mkl"


ENGINES = {
    "ours": Ours, "mkl": OursMkl, "peft": Peft, "gemm": Gemm, "gemm mkl": GemmMkl,
    "minilm": MiniLM, "minilm mkl": MiniLMMkl, "minilm peft": MiniLMPeft, "micro": Micro,
    "cupy": Cupy, "peft gpu": PeftGpu,
}  # fmt: skip


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine: Any = ENGINES[sys.argv[1]]()
    for line in sys.stdin:
        command = json.loads(line)
        do, answer = command.pop("do"), dict[str, Any]()
        try:
            device = hasattr(engine, "peak")
            if do == "peak":
                answer = engine.peak() if device else {"bytes": _resident("VmHWM")}
            elif do == "open":
                answer = engine.open(**command)
                if not device:
                    CLEAR.write_text("5")  # what is resident now is where the peak begins
            elif do == "adapters":
                np.save(command["path"], engine.trained())
            else:
                begun = time.perf_counter()
                found = getattr(engine, do)(**command)
                answer = found if isinstance(found, dict) else {"loss": found}
                answer["seconds"] = time.perf_counter() - begun
        except Exception as error:
            meant = type(error) in (RuntimeError, NoDevice)  # which say all that there is to say
            where = "" if meant else f" ({place(error)})"
            answer = {"failed": f"{type(error).__name__}: {error}{where}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
