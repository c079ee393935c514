"""On a real device: passes of every family, and runs, come to what they do on the host; a step waits once.

Models are tiny, and the host's numbers are lorax_np's own, so that nothing but CuPy is needed.
"""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

import lorax_np as lx
from lorax_np.backend import namespace
from lorax_np.generation import token_stream
from lorax_np.models.quantised import quantised
from lorax_np.train import step as step_file
from lorax_np.train.held import Held
from lorax_np.train.step import parameters

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.device import cases, runs
from tests.models.tiny import tensors

pytestmark = pytest.mark.gpu
NEAR = {"float64": 1e-10, "float32": 5e-4}  # of each tensor's largest entry

# CuPy 14 says that it cannot be sure to see each wait; what it sees would still be one
waits = pytest.mark.filterwarnings("ignore:cupyx.allow_synchronize:UserWarning")


@pytest.fixture(scope="module")
def cupy():
    try:
        return namespace("cupy")
    except lx.BackendError as error:
        pytest.skip(f"not run on a GPU: {error}")


def synchronize(allowed):
    """Within this context the host may wait, or an error says that it would."""
    return importlib.import_module("cupyx").allow_synchronize(allowed)


def assert_same(cupy, step, dtype, *, quiet=True, **how):
    """Twice: the first time kernels are compiled, the second time nothing waits."""
    there = step.moved(cupy.asarray)
    first = there.gradients(**how)
    with synchronize(not quiet):
        value, found = there.gradients(**how)
    want_value, want = step.gradients(**how)
    assert type(value) is cupy.ndarray
    assert abs(value.get() - want_value) <= NEAR[dtype] * abs(want_value)
    got = {name: g.get() for name, g in tensors(found).items()}
    assert cases.far(got, tensors(want)) <= NEAR[dtype]
    again = {name: g.get() for name, g in tensors(first[1]).items()}
    assert all(again[name].tobytes() == g.tobytes() for name, g in got.items())


@waits
@pytest.mark.parametrize("kind", ["llama", "moe", "bert, tokens", "roberta", "gpt2", "t5"])
@pytest.mark.parametrize("dtype", NEAR)
def test_a_pass_of_every_family(cupy, kind, dtype):
    """With dropout, on sequences of unequal lengths. How many rows an expert has is read on the host."""
    step = cases.step_of(*cases.KINDS[kind], dtype=dtype)
    assert_same(cupy, step, dtype, quiet=kind != "moe", engine="fast")


@waits
@pytest.mark.parametrize("dtype", NEAR)
def test_a_pass_by_the_reference(cupy, dtype):
    assert_same(cupy, cases.step_of(*cases.KINDS["llama"], dtype=dtype), dtype, engine="reference")


@waits
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"use_dora": True}),
        ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("llama", {"trainable_token_indices": [1, 4]}),
        ("bert, several classes", {"bias": "all", "modules_to_save": ["classifier"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc", "wte", "wpe"]}),
        ("t5", {"target_modules": cases.EVERY_T5}),
    ],
    ids=str,
)
def test_whatever_trains(cupy, kind, options):
    step = cases.step_of(*cases.KINDS[kind], **options)
    assert_same(cupy, step, "float64", engine="fast", checkpoint=True)


@pytest.mark.parametrize("way", ["nf4", "int8"])
def test_on_a_base_in_few_bits(cupy, way):
    step = cases.step_of(*cases.KINDS["llama"], dtype="float32")
    there = step.moved(cupy.asarray)
    _, found = there._replace(model=quantised(there.model, way)).gradients()
    _, want = step._replace(model=quantised(step.model, way)).gradients()
    assert cases.far({n: g.get() for n, g in tensors(found).items()}, tensors(want)) <= NEAR["float32"]


@waits
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_three_steps_wait_three_times(cupy, kind, monkeypatch):
    """AdamW, dropout, clipping, two micro-batches, evaluations; the host waits for loss and norm, at once."""

    def run(xp):
        return runs.llama(xp, iters=3) if kind == "llama" else runs.task("bert, classes", xp, iters=3)

    read, plain, reads = step_file.read_together, Held.step, []

    def allowed(*values):
        with synchronize(True):
            reads.append(len(values))
            return read(*values)

    def quiet(self, *args, **how):
        with synchronize(False):
            return plain(self, *args, **how)

    want, first = run(np), run(cupy)
    monkeypatch.setattr(step_file, "read_together", allowed)
    monkeypatch.setattr(Held, "step", quiet)
    got = run(cupy)
    assert reads == [2, 2, 2]
    runs.assert_near(got, want, 1e-6)
    for name, value in parameters(first.trained).items():
        assert (parameters(got.trained)[name] == value).all(), name


@pytest.mark.parametrize("optimizer", ["adamw", "lora-fa"])
def test_a_run_that_goes_on_is_the_run_that_never_stopped(cupy, tmp_path, optimizer):
    how = {"iters": 3, "optimizer": optimizer}
    whole = runs.llama(cupy, out=tmp_path / "whole", **how)
    assert runs.llama(cupy, out=tmp_path / "part", stop=2, **how).step == 2
    runs.llama(cupy, out=tmp_path / "part", resume=True, **how)
    for file in ("adapter_model.safetensors", "state/step-3/tensors.safetensors"):
        assert (tmp_path / "part" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    saved = lx.load_adapter(tmp_path / "part").adapters
    for name, adapter in whole.trained.adapters.items():
        assert np.array_equal(saved[name].B, adapter.B.get())


@pytest.mark.parametrize("kind", runs.WRITERS)
def test_texts_are_written_there(cupy, kind):
    model, sites, trained = runs.writer(kind)
    want = list(token_stream(model, [4, 9, 2, 11], sites=sites, trained=trained, most=4))
    model, trained = runs.on(cupy, model, trained)
    assert list(token_stream(model, [4, 9, 2, 11], sites=sites, trained=trained, most=4)) == want
