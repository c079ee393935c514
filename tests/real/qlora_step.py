"""A training step of SmolLM2 on a base in few bits, alone in a process, and the memory that it took.

python -m tests.real.qlora_step FILE.gguf WAY WORKERS

WAY : none, nf4, int8 or bf16;  WORKERS : 0 for the general pass

4 sequences of 256 tokens, r = 16 on all seven projections, p = 0.05, checkpointing, AdamW. Prints JSON.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

import lorax_np as lx
from lorax_np.models.quantised import Quantised, let_go
from lorax_np.models.records import Batch, Dropout, Model, Trained
from lorax_np.models.tasks import loss_and_gradients
from lorax_np.optim import adamw_flat_start, adamw_flat_step, clip_into
from lorax_np.tree import flatten, layout, leaves, unflatten, with_leaves

SITES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STARTS = 0, 256, 512, 768, 1024


def passes(model: Model, sites, adapters, workers: int):
    """Adapters, and the number of a step, to the loss and gradients."""
    ids = np.random.default_rng(0).integers(0, model.config["vocab_size"], STARTS[-1])
    labels = np.roll(ids, -1)
    labels[np.array(STARTS[1:]) - 1] = -100
    b, n = Batch(ids, STARTS, labels, (0, 1, 2, 3)), len(ids) - 4
    if workers == 0:
        how = {"task": "CAUSAL_LM", "n": n, "checkpoint": True}
        return lambda a, t: loss_and_gradients(model, sites, Trained(a, {}), b, dropout=Dropout(0, t), **how)
    plan = lx.fast.llama_plan(model.weights, model.config, adapters, sites, workers=workers, checkpoint=True)
    let_go(model.weights)

    def planned(a, t):
        where = b.ids, b.starts, b.index, b.labels
        value, found, _ = plan.loss_and_gradients(a, {}, *where, n=n, dropout=Dropout(0, t))
        return value, Trained(found, {})

    return planned


def main(file: str, way: str, workers: int) -> dict[str, float]:
    model = lx.load_model(file, task="CAUSAL_LM")
    model = model if way == "none" else lx.quantised(model, way)
    config = lx.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=SITES)
    _, adapters, sites = lx.inject(model.weights, config, lx.torch_generator(0))
    where = layout(leaves(adapters))
    p = flatten(leaves(adapters))
    adapters = with_leaves(adapters, unflatten(p, where))
    state, step = adamw_flat_start(p), passes(model, sites, adapters, workers)
    value, found = step(adapters, 0)
    g = leaves(found.adapters)
    del found
    clip_into(g, 1.0)
    adamw_flat_step(p, flatten(g), state, where=where, lr=2e-4)
    held = model.weights.nbytes if isinstance(model.weights, Quantised) else 0
    return {"peak": memory("VmHWM"), "held": held, "loss": float(value)}


def memory(name: str) -> int:
    """Bytes that the system counts for this process, under a name of its own."""
    about = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", about)[1])


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
