"""A merge or a start in a process of its own, to be killed, and what is left of it."""

import json
import random
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
from making import content, factors, weights, write_adapter, write_checkpoint

from lorax_np.config import LoraConfig
from lorax_np.stream.init import init_checkpoint
from lorax_np.stream.merge import merge_checkpoint

ROOT = Path(__file__).parents[2]
CHILD = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests/stream']
from pathlib import Path
import killing
from lorax_np.stream import begun
begun.EVERY = float(sys.argv[6])
print("ready", flush=True)
sys.stdin.readline()
killing.WORKS[sys.argv[7]](*map(Path, sys.argv[2:5]), int(sys.argv[5]))
print("done", flush=True)
"""


def _merge(base, adapter, out, jobs):
    return merge_checkpoint(base, adapter, out, jobs=jobs)


def _init(base, adapter, out, jobs, start=True):
    config = LoraConfig(4, 6, target_modules="all-linear", init_lora_weights=start)
    return init_checkpoint(base, config, out, seed=3)


WORKS = {"merge": _merge, "init": _init, "pissa": partial(_init, start="pissa")}


def prepare(folder, *, d=256, layers=3, shards=12):
    """A base and an adapter on all its projections."""
    rng = np.random.default_rng(0)
    tensors = weights(rng, layers=layers, d=d, ff=3 * d, vocab=8 * d)
    sites = [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]
    parts = {site: factors(rng, tensors[f"{site}.weight"].shape, 3) for site in sites}
    base = write_checkpoint(folder / "base", tensors, shards=shards)
    return base, write_adapter(folder / "adapter", parts)


def start(base, adapter, out, jobs=2, every=1.0, work="merge"):
    """Start work that waits for a line; every: seconds between two marks within a file."""
    arguments = [*map(str, (ROOT, base, adapter, out, jobs, every)), work]
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    return process


def go(process):
    """Let it merge."""
    process.stdin.write(b"\n")
    process.stdin.flush()


def recorded(record):
    """The pieces that a record names: name, start, size and hash; of the record of sites, their names."""
    lines = [json.loads(line) for line in record.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return [entry for line in lines[1:] for entry in line.get("pieces", line.get("sites"))]


def killed_at_random(folder, times, seed=0, shards=12, work="merge", say=lambda line: None):
    """Kill so much work, each at a moment of its own, and check what is left: nothing, or all of it.

    Returns how often it was whole before the kill, and how often it went on: after finished files, or within.
    """
    base, adapter = prepare(folder, shards=shards, **({} if work == "merge" else {"d": 96}))
    out, part = folder / "out", folder / ".out.part"
    WORKS[work](base, adapter, out, 2)
    want = content(out)
    shutil.rmtree(out)
    process = start(base, adapter, out, every=0, work=work)
    begun = time.perf_counter()
    go(process)
    assert process.stdout.readline() == b"done\n"
    long = time.perf_counter() - begun
    process.communicate()
    shutil.rmtree(out)
    rng, whole, resumed = random.Random(seed), 0, 0
    for i in range(times):
        process = start(base, adapter, out, every=0, work=work)
        go(process)
        time.sleep(rng.uniform(0, 1.1) * long)
        process.kill()
        process.communicate()
        if out.exists():
            whole += 1
            assert content(out) == want, "a folder that is there, and not whole"
        else:
            found, there = went_on(base, adapter, out, work)
            resumed += bool(there)
            assert content(out) == want, "other bytes after going on"
            say(f"{i + 1}: {there:,} {'bytes' if work == 'merge' else 'sites'} were there, of {found:,}")
        left = sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
        assert left in ([], [part.name]), left
        shutil.rmtree(out)
        if left:  # killed between the last rename and tidying up: the next one takes it for another's work
            assert not (part / "whole").exists()
    return whole, resumed


def went_on(base, adapter, out, work):
    """Do killed work again; say how much it is, and how much of it was there: all that was recorded."""
    begun = out.parent / ".out.part" / "begun"
    if work == "merge":
        named = sum(size for record in begun.glob("*.record") for _, _, size, _ in recorded(record))
        found = merge_checkpoint(base, adapter, out)
        assert found.kept >= named, "less taken up than was recorded"
        return found.nbytes, found.kept
    record = begun / "sites.record"
    named = recorded(record) if record.exists() else []
    found = WORKS[work](base, adapter, out, 2)
    assert found.resumed == len(named)
    return found.sites, found.resumed
