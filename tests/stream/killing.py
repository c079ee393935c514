"""A merge in a process of its own, to be killed: a checkpoint of a dozen shards, and what is left of it."""

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from making import content, factors, weights, write_adapter, write_checkpoint

from lorax_np.stream.merge import merge_checkpoint

ROOT = Path(__file__).parents[2]
CHILD = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
import sys
sys.path.insert(0, sys.argv[1])
from lorax_np.stream.merge import merge_checkpoint
print("ready", flush=True)
sys.stdin.readline()
merge_checkpoint(*sys.argv[2:5], jobs=int(sys.argv[5]))
print("done", flush=True)
"""


def prepare(folder, *, d=256, layers=3, shards=12):
    """A base and an adapter on all its projections."""
    rng = np.random.default_rng(0)
    tensors = weights(rng, layers=layers, d=d, ff=3 * d, vocab=8 * d)
    sites = [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]
    parts = {site: factors(rng, tensors[f"{site}.weight"].shape, 3) for site in sites}
    base = write_checkpoint(folder / "base", tensors, shards=shards)
    return base, write_adapter(folder / "adapter", parts)


def start(base, adapter, out, jobs=2):
    """Start a merge that waits for a line."""
    arguments = [str(ROOT), str(base), str(adapter), str(out), str(jobs)]
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    return process


def go(process):
    """Let it merge."""
    process.stdin.write(b"\n")
    process.stdin.flush()


def killed_at_random(folder, times, seed=0, say=lambda line: None):
    """Kill so many merges, each at a moment of its own, and check what is left: nothing, or all of it.

    Returns how many were whole before the kill, and how many went on after finished files.
    """
    base, adapter = prepare(folder)
    merge_checkpoint(base, adapter, folder / "want")
    want, out = content(folder / "want"), folder / "out"
    begun = time.perf_counter()
    process = start(base, adapter, folder / "timed")
    begun = time.perf_counter()
    go(process)
    assert process.stdout.readline() == b"done\n"
    long = time.perf_counter() - begun
    process.communicate()
    rng, whole, resumed = random.Random(seed), 0, 0
    for i in range(times):
        process = start(base, adapter, out)
        go(process)
        time.sleep(rng.uniform(0, 1.1) * long)
        process.kill()
        process.communicate()
        if out.exists():
            whole += 1
            assert content(out) == want, "a folder that is there, and not whole"
        else:
            found = merge_checkpoint(base, adapter, out)
            resumed += bool(found.resumed)
            assert content(out) == want, "other bytes after going on"
        left = sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
        assert left in ([], [".out.part"]), left
        say(f"{i + 1}: {'whole' if i < 0 else 'right'}, {whole} whole, {resumed} went on")
        for path in out.iterdir():
            path.unlink()
        out.rmdir()
        if left:  # killed between the last rename and tidying up: the next merge takes it for another's work
            assert not (folder / ".out.part" / "whole").exists()
    return whole, resumed
