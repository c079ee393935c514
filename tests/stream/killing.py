"""A merge in a process of its own, to be killed: of a dozen shards or of one file, and what is left of it."""

import json
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
from lorax_np.stream import begun
from lorax_np.stream.merge import merge_checkpoint
begun.EVERY = float(sys.argv[6])
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


def start(base, adapter, out, jobs=2, every=1.0):
    """Start a merge that waits for a line; every: seconds between two marks within a file."""
    arguments = [str(ROOT), str(base), str(adapter), str(out), str(jobs), str(every)]
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
    """The pieces that a record names: name, start, size and hash."""
    lines = [json.loads(line) for line in record.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return [tuple(piece) for line in lines[1:] for piece in line["pieces"]]


def killed_at_random(folder, times, seed=0, shards=12, say=lambda line: None):
    """Kill so many merges, each at a moment of its own, and check what is left: nothing, or all of it.

    Returns how many were whole before the kill, and how many went on: after finished files, or within one.
    """
    base, adapter = prepare(folder, shards=shards)
    merge_checkpoint(base, adapter, folder / "want")
    want, out, whole_file = content(folder / "want"), folder / "out", folder / ".out.part" / "whole"
    process = start(base, adapter, folder / "timed", every=0)
    begun = time.perf_counter()
    go(process)
    assert process.stdout.readline() == b"done\n"
    long = time.perf_counter() - begun
    process.communicate()
    rng, whole, resumed = random.Random(seed), 0, 0
    for i in range(times):
        process = start(base, adapter, out, every=0)
        go(process)
        time.sleep(rng.uniform(0, 1.1) * long)
        process.kill()
        process.communicate()
        if out.exists():
            whole += 1
            assert content(out) == want, "a folder that is there, and not whole"
        else:
            records = list((folder / ".out.part" / "begun").glob("*.record"))
            begun = sum(size for record in records for _, _, size, _ in recorded(record))
            found = merge_checkpoint(base, adapter, out)
            resumed += bool(found.kept)
            assert content(out) == want, "other bytes after going on"
            assert found.kept >= begun, "less taken up than was recorded"
            say(f"{i + 1}: {found.kept / 1e6:.1f} MB were there, {len(found.resumed)} files among them")
        left = sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
        assert left in ([], [".out.part"]), left
        for path in out.iterdir():
            path.unlink()
        out.rmdir()
        if left:  # killed between the last rename and tidying up: the next merge takes it for another's work
            assert not whole_file.exists()
    return whole, resumed
