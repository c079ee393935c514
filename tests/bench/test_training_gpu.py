"""Rows of the bench of training on a GPU, the engines: of which all but the device itself is tried here."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import training_gpu, training_kernels, training_race
from bench.training_gpu import PeftGpu
from bench.training_models import ALPHA, LR, RANK, SEED, start, tensors
from bench.training_rows import NoDevice
from lorax_np.arrays import dtype_name
from lorax_np.errors import ShapeError
from tests.bench.small_gpu import LENGTHS, SMALL, Small, SmallPeft, given, opened

# ---- the engine of lorax_np --------------------------------------------------------------------------------


def test_the_first_step_is_adamws_a_rate_by_the_sign():
    engine, said = opened(Small())
    assert said.endswith("NumPy, a given shape with random weights")
    before, (batch,) = engine.trained(), given(1)
    assert 2 < engine.step(**batch) < 6  # the logarithm of 96 is 4.6
    step = engine.trained() - before
    assert before.size == 2 * RANK * (2 * (48 + 48) + 2 * (48 + 16) + 3 * (48 + 64))
    assert np.abs(step).max() == pytest.approx(LR, rel=1e-3)
    assert np.median(np.abs(step)) > 0.9 * LR


def test_masks_and_checkpointing_are_as_asked_for():
    (batch,) = given(1)
    losses = {how: opened(Small(), *how)[0].step(**batch) for how in ((0.0, False), (0.5, False), (0.5, True))}
    plain, dropped, again = losses.values()
    assert plain != dropped
    assert dropped == pytest.approx(again, rel=1e-6)
    engines = [opened(Small(), 0.5, each)[0] for each in (False, True)]
    assert [each.passes.checkpoint for each in engines] == [False, True]


def test_a_step_that_is_not_finite_is_a_failure():
    engine, _ = opened(Small())
    engine.held.trained.adapters["model.layers.0.self_attn.q_proj"].A[...] = np.inf
    with pytest.raises(RuntimeError, match=r"step 1: loss nan, norm"):
        engine.step(**given(1)[0])


def test_drawn_weights_are_the_same_each_time_and_smollm2s_in_shape():
    (one, _, _), (two, config, words) = tensors(SMALL), tensors(SMALL)
    assert words == "a given shape with random weights"
    assert config is SMALL
    assert list(one) == list(two)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert {dtype_name(x) for x in one.values()} == {"float32"}
    assert one["model.layers.1.mlp.up_proj.weight"].std() == pytest.approx(48**-0.5, rel=0.05)
    sites = start(one, 2)
    assert [part.shape for part in sites["model.layers.1.mlp.down_proj"]] == [(RANK, 64), (48, RANK)]


class Pool:
    """A pool that somebody allocates from."""

    now = 10

    def used_bytes(self):
        return self.now

    def total_bytes(self):
        return 64


class Hook:
    """CuPy's, of which only what is on is told."""

    on = None

    def __enter__(self):
        Hook.on = self

    def __exit__(self, *_):
        Hook.on = None


class DeviceSynchronized(RuntimeError):
    pass


def fake_cupy(monkeypatch, *, waits):
    """What of CuPy looks into a pass, over a pass that allocates and perhaps waits."""
    pool, allowed = Pool(), [True]

    class Allow:
        def __init__(self, allow):
            self.allow = allow

        def __enter__(self):
            allowed[0] = self.allow

        def __exit__(self, *_):
            allowed[0] = True

    cupyx = SimpleNamespace(allow_synchronize=Allow, DeviceSynchronized=DeviceSynchronized)
    monkeypatch.setitem(sys.modules, "cupyx", cupyx)

    def a_pass(*args, **how):
        for pool.now in (30, 50, 20):
            if Hook.on is not None:
                Hook.on.malloc_postprocess(size=1, mem_size=512)
        if waits and not allowed[0]:
            raise DeviceSynchronized("waited")

    return SimpleNamespace(cuda=SimpleNamespace(MemoryHook=Hook), get_default_memory_pool=lambda: pool), a_pass


@pytest.mark.parametrize("waits", [False, True])
def test_the_peak_is_the_pools_and_waits_are_told(monkeypatch, waits):
    engine, _ = opened(Small())
    engine.step(**given(1)[0])
    engine.xp, engine.passes.gradients = fake_cupy(monkeypatch, waits=waits)
    found = engine.peak()
    assert found["bytes"] == 64
    assert found["used"] == 50
    if waits:
        assert found["said"].startswith("no wait inside a pass: no, training_gpu.py:")
    else:
        assert found["said"] == "no wait inside a pass: yes"


def test_a_pass_that_fails_after_the_steps_costs_no_figure(monkeypatch):
    engine, _ = opened(Small())
    engine.step(**given(1)[0])
    engine.xp, _ = fake_cupy(monkeypatch, waits=False)

    def broken(*args, **how):
        raise MemoryError("no room")

    engine.passes.gradients = broken
    assert engine.peak() == {"bytes": 64, "used": 0, "said": "another pass failed: MemoryError: no room"}


# ---- beside PEFT -------------------------------------------------------------------------------------------


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpoint", [False, True])
def test_both_engines_train_alike(checkpoint):
    """From one start, on sequences of unequal lengths; gradients have norms of 3 to 4, so clipping shows."""
    ours, theirs = opened(Small(), 0.0, checkpoint)[0], opened(SmallPeft(), 0.0, checkpoint)[0]
    np.testing.assert_array_equal(ours.trained(), theirs.trained())
    for batch in given(4):
        assert ours.step(**batch) == pytest.approx(theirs.step(**batch), abs=5e-6)
    assert training_race.apart(ours.trained(), theirs.trained())["adapters, by norm"] < 1e-5
    assert set(theirs.peak()) == {"bytes", "used"}


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore")
def test_peft_says_what_it_is_and_refuses_a_torch_without_a_device(monkeypatch):
    import torch

    _, said = opened(SmallPeft(), 0.05)
    for word in ("torch 2", "peft 0", "eager, attention sdpa, on cpu, a given shape with random weights"):
        assert word in said
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NoDevice, match=r"torch .* finds no CUDA device"):
        PeftGpu().open(p=0.0, checkpoint=False)


def test_an_error_has_the_line_of_the_librarys_that_it_came_through():
    engine, _ = opened(Small())
    with pytest.raises(ShapeError) as caught:
        engine.step([[1]], [[1, 2]])
    assert training_gpu.place(caught.value).startswith("batch.py:")


# ---- where the time goes -----------------------------------------------------------------------------------


def test_kernels_are_added_by_name_and_by_kind(monkeypatch):
    runs = [
        ("sm90_xmma_gemm_f32", 2.0),
        ("cupy_multiply__float", 0.5),
        ("cupy_multiply__float", 0.25),
        ("cupy_sum", 1.0),
        ("[CUDA memcpy DtoD]", 0.125),
    ]
    monkeypatch.setattr(training_kernels, "seen", lambda do: do() or runs)
    shown = training_kernels.lines(lambda: None)
    assert shown[0] == "kernels        5 runs, 3.9 ms in all"
    assert [line.split() for line in shown[2:6]] == [
        ["2.00", "ms", "1", "products"],
        ["1.00", "ms", "1", "sums"],
        ["0.75", "ms", "2", "elementwise,", "and", "other"],
        ["0.12", "ms", "1", "copies"],
    ]
    assert "cupy_multiply__float" in shown[9]


def test_kernels_that_nobody_sees_are_said_to_be_unseen(monkeypatch):
    monkeypatch.setattr(training_kernels, "seen", lambda do: [])
    assert training_kernels.lines(lambda: None) == ["kernels: not seen: torch's profiler reported none"]
    monkeypatch.setattr(training_kernels, "seen", lambda do: 1 / 0)
    (line,) = training_kernels.lines(lambda: None)
    assert line.startswith("kernels: not seen: ZeroDivisionError")


def test_a_profile_times_the_pass_and_the_step(monkeypatch):
    engine, _ = opened(Small())
    event = SimpleNamespace(record=lambda: None)
    cuda = SimpleNamespace(Event=lambda: event, get_elapsed_time=lambda begin, end: 1.5)
    engine.xp, engine.wait = SimpleNamespace(cuda=cuda), lambda: None
    monkeypatch.setattr(training_gpu, "smollm2_or_drawn_ids", lambda: list(range(90)) * 4)
    monkeypatch.setattr(training_kernels, "seen", lambda do: do() or [])
    before = engine.passes.gradients
    lines = training_gpu.profile(engine, LENGTHS)
    assert [line.split()[0] for line in lines] == ["host", "pass", "step", "kernels:"]
    assert all(line.split()[2] == "1.5" for line in lines[1:3])
    assert float(lines[1].split()[1]) <= float(lines[2].split()[1])
    assert engine.passes.gradients == before
    assert engine.t == training_gpu.WARM + 2


def test_seeds_and_scales_are_the_benchs():
    engine, _ = opened(Small(), 0.05)
    assert engine.passes.config.seed == SEED
    assert {site.scaling for site in engine.passes.sites.values()} == {ALPHA / RANK}
    assert {site.p for site in engine.passes.sites.values()} == {0.05}
    assert engine.passes.config.learning_rate == LR
