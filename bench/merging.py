"""A whole checkpoint merged: beside a plain copy of the same files, and beside PEFT.

    python bench/merging.py [--size 0.5] [--dtype bfloat16] [--targets all] [--rounds 3] [--json FILE]

Makes a llama of the given gigabytes on the spot and an adapter for it, and measures in turn, each in a process
of its own: `cp -r` of the base, the same and `sync` (a merge, too, ends when its files are on the disk), our
merge, and PEFT's merge_and_unload and save_pretrained, loading included. Times are from after the imports;
memory is the most that the process ever had resident; seconds of the processor are what other work on the
machine changes least. Medians, ratios, and JSON; what was made is deleted.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.machine import Gate, about  # noqa: E402
from lorax_np.io.layout import WORDS  # noqa: E402
from lorax_np.io.writer import SafetensorsWriter, write_safetensors  # noqa: E402

D, FF, VOCAB, HEADS, RANK = 2048, 5632, 32000, 16, 16
DTYPES = {"bfloat16": "bfloat16", "float32": "float32", "float16": "float16"}
TARGETS = {"all": ("q", "k", "v", "o", "gate", "up", "down"), "qv": ("q", "v")}
PEAK = """
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        peak = int(line.split()[1]) * 1024
cpu = sum(os.times()[:2]) - before
print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak}))
"""
OURS = (
    """
import json, os, sys, time
from lorax_np.stream.merge import merge_checkpoint
begun, before = time.perf_counter(), sum(os.times()[:2])
merge_checkpoint(*sys.argv[1:4])
seconds = time.perf_counter() - begun
"""
    + PEAK
)
PEFT = (
    """
import json, os, sys, time, warnings
warnings.filterwarnings("ignore")
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
begun, before = time.perf_counter(), sum(os.times()[:2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
model = PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
model.save_pretrained(sys.argv[3])
seconds = time.perf_counter() - begun
"""
    + PEAK
)


def shapes(size: float, width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a llama of about so many bytes."""
    ends = {"model.embed_tokens.weight": (VOCAB, D), "lm_head.weight": (VOCAB, D), "model.norm.weight": (D,)}
    layer = {f"self_attn.{p}_proj.weight": (D, D) for p in "qkvo"}
    layer |= {"mlp.gate_proj.weight": (FF, D), "mlp.up_proj.weight": (FF, D), "mlp.down_proj.weight": (D, FF)}
    layer |= {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
    one = sum(int(np.prod(shape)) for shape in layer.values()) * width
    count = max(1, round((size - sum(int(np.prod(shape)) for shape in ends.values()) * width) / one))
    found = dict(ends)
    for i in range(count):
        found |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return found


def make(folder: Path, size: float, dtype: str, targets: str) -> dict[str, int]:
    """Write the base in files of about 1 GB, and the adapter; say how large they are."""
    import ml_dtypes

    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    rng = np.random.default_rng(0)
    named = shapes(size * 1e9, kind.itemsize)
    values = (rng.standard_normal(1 << 22) * 0.02).astype(kind)
    total = sum(int(np.prod(shape)) for shape in named.values()) * kind.itemsize
    files = max(1, round(total / 1e9)) if size > 1 else 2
    where, seen = {}, 0
    for name, shape in named.items():
        where[name] = f"model-{min(files, 1 + seen * files // total):05d}-of-{files:05d}.safetensors"
        seen += int(np.prod(shape)) * kind.itemsize
    base = folder / "base"
    base.mkdir()
    for file in sorted(set(where.values())):
        mine = {name: (WORDS[kind.name], named[name]) for name in named if where[name] == file}
        with SafetensorsWriter(base / file, mine, {"format": "pt"}) as out:
            for name in out.names:
                count, start = int(np.prod(named[name])), int(rng.integers(1 << 20))
                out.write(name, np.resize(values[start:], count).reshape(named[name]))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (base / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    layers = sum(name.endswith("input_layernorm.weight") for name in named)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": D,
        "vocab_size": VOCAB,
    }
    config |= {"intermediate_size": FF, "num_hidden_layers": layers, "num_attention_heads": HEADS}
    config |= {"num_key_value_heads": HEADS, "tie_word_embeddings": False, "torch_dtype": dtype}
    (base / "config.json").write_text(json.dumps(config, indent=2))
    tensors, touched = {}, 0
    for name, shape in named.items():
        if name.endswith(tuple(f"{p}_proj.weight" for p in TARGETS[targets])):
            site = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{site}.lora_A.weight"] = rng.standard_normal((RANK, shape[1])).astype(np.float32) * 0.02
            tensors[f"{site}.lora_B.weight"] = rng.standard_normal((shape[0], RANK)).astype(np.float32) * 0.02
            touched += int(np.prod(shape)) * kind.itemsize
    (folder / "adapter").mkdir()
    write_safetensors(folder / "adapter" / "adapter_model.safetensors", tensors, {"format": "pt"})
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
    said["target_modules"] = [f"{p}_proj" for p in TARGETS[targets]]
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(said, indent=2))
    largest = max(int(np.prod(shape)) for shape in named.values()) * kind.itemsize
    return {"bytes": total, "touched": touched, "largest": largest, "files": files, "tensors": len(named)}


def copied(folder: Path) -> tuple[float, float, float]:
    """Seconds of a plain copy, of one that is on the disk, and of the processor for the first."""
    begun, before = time.perf_counter(), sum(os.times()[2:4])
    subprocess.run(["cp", "-r", str(folder / "base"), str(folder / "copy")], check=True)
    plain, cpu = time.perf_counter() - begun, sum(os.times()[2:4]) - before
    subprocess.run(["sync", "-f", str(folder / "copy")], check=True)
    return plain, time.perf_counter() - begun, cpu


def child(text: str, folder: Path, name: str) -> dict[str, float]:
    """Run one merge in a process of its own."""
    places = [str(folder / place) for place in ("base", "adapter", name)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", text, *places], env=environment, capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise SystemExit(f"{name}: {run.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def measured(folder: Path, rounds: int, peft: bool, gate: Gate) -> dict[str, list[float]]:
    """Every figure of every round."""
    found: dict[str, list[float]] = {}

    def put(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)
        print(f"  {name}: {value:.2f}", flush=True)

    for i in range(rounds):
        print(f"round {i + 1}", flush=True)
        for name, text in (("ours", OURS), *((("peft", PEFT),) if peft else ())):
            for old in ("copy", "ours", "peft"):
                shutil.rmtree(folder / old, ignore_errors=True)
            os.sync()
            gate.wait()
            if name == "ours":
                plain, whole, cpu = copied(folder)
                put("cp, s", plain)
                put("cp and sync, s", whole)
                put("cp, processor s", cpu)
                shutil.rmtree(folder / "copy")
                os.sync()
            one = child(text, folder, name)
            put(f"{name}, s", one["seconds"])
            put(f"{name}, processor s", one["cpu"])
            put(f"{name}, peak MB", one["peak"] / 1e6)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python bench/merging.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", type=float, default=0.5, help="gigabytes of the checkpoint (0.5)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--targets", choices=TARGETS, default="all", help="all linear layers, or q and v")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--place", type=Path, help="where to make it (the system's temporary folder)")
    parser.add_argument("--without-peft", action="store_true")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds to wait for a quiet machine")
    parser.add_argument(
        "--json", type=Path, help="where the figures go (bench/results/merging-SIZE-DTYPE.json)"
    )
    asked = parser.parse_args()
    peft = not asked.without_peft and all(find_spec(name) for name in ("torch", "peft", "transformers"))
    gate = Gate(asked.patience)
    with tempfile.TemporaryDirectory(dir=asked.place) as name:
        folder = Path(name)
        made = make(folder, asked.size, asked.dtype, asked.targets)
        print(
            f"{made['bytes'] / 1e9:.2f} GB of {asked.dtype} in {made['files']} files, "
            f"{100 * made['touched'] / made['bytes']:.0f} % of it adapted",
            flush=True,
        )
        figures = measured(folder, asked.rounds, peft, gate)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(figures[x], figures[y], strict=True))
        for name, x, y in (
            ("speed of ours to cp", "cp, s", "ours, s"),
            ("speed of ours to cp and sync", "cp and sync, s", "ours, s"),
            ("speed of ours to PEFT", "peft, s", "ours, s"),
            ("memory of ours to PEFT", "ours, peak MB", "peft, peak MB"),
            ("processor time of ours to PEFT", "ours, processor s", "peft, processor s"),
        )
        if x in figures and y in figures
    }
    bound = 2 * made["largest"] / 1e6 + 150
    for title, rows in (("medians", medians), ("ratios", ratios)):
        print(title)
        for name, value in rows.items():
            print(f"  {name:<30}{value:10.2f}")
    print(f"  {'bound of our memory, MB':<30}{bound:10.2f}")
    print(gate.note())
    name = f"merging-{asked.size:g}gb-{asked.dtype}-{asked.targets}.json"
    path = asked.json or ROOT / "bench" / "results" / name
    said = {"asked": {"size": asked.size, "dtype": asked.dtype, "targets": asked.targets}, "made": made}
    said |= {"figures": figures, "medians": medians, "ratios": ratios, "bound_mb": bound}
    command = f"python bench/merging.py --size {asked.size:g} --dtype {asked.dtype} --targets {asked.targets}"
    said |= {"machine": about(gate, {}) | {"command": command}}
    path.write_text(json.dumps(said, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
