"""A step's loss and gradients on a device's arrays are those of the host, and nothing waits in between.

What stands for the device is cupy_like.py, as strict as CuPy; tests/test_gpu_training.py has a real one.
"""

import numpy as np
import pytest
from cupy_like import reads

from lorax_np.models import masks, passes
from lorax_np.models.quantised import WAYS, quantised
from lorax_np.random import DropoutKey, dropout_mask
from tests.device import cases
from tests.device.cases import far
from tests.models.tiny import tensors

ENGINES = "reference", "fast"
AGREES = 1e-12  # float64: a few hundred roundings of 1e-16 between a weight and the loss
engines = pytest.mark.parametrize("engine", ENGINES)


def there(cupy, step, **how):
    """Loss and gradients on the device, brought back, and how often the host waited."""
    step = step.moved(cupy.asarray)
    reads.clear()
    value, found = step.gradients(**how)
    waited, arrays = len(reads), tensors(found)
    assert type(value) is cupy.ndarray
    assert all(type(g) is cupy.ndarray for g in arrays.values())
    return value.host, {name: g.host for name, g in arrays.items()}, waited


def assert_same(cupy, step, waits=0, **how):
    (value, want), (got_value, got, waited) = step.gradients(**how), there(cupy, step, **how)
    assert abs(got_value - value) <= AGREES * abs(value)
    assert far(got, tensors(want)) <= AGREES
    assert {n: g.dtype for n, g in got.items()} == {n: g.dtype for n, g in tensors(want).items()}
    assert waited == waits
    return got


def routed(kind):
    """Blocks in which a router says how many rows each expert has, for which the host waits."""
    return 2 if kind.startswith("moe") else 0


@engines
@pytest.mark.parametrize("kind", cases.KINDS)
def test_every_task_of_every_family(cupy, kind, engine):
    assert_same(cupy, cases.step_of(*cases.KINDS[kind]), waits=routed(kind), engine=engine)


OPTIONS = {
    "DoRA": ("llama", {"use_dora": True}),
    "DoRA, an encoder": ("bert, spans", {"use_dora": True}),
    "biases": ("bert, classes", {"bias": "all"}),
    "biases of adapters": ("gpt2", {"bias": "lora_only"}),
    "a bias on B": ("bert, tokens", {"lora_bias": True}),
    "a head": ("bert, classes", {"modules_to_save": ["classifier"]}),
    "norms": ("bert, tokens", {"modules_to_save": ["LayerNorm"]}),
    "the output table": ("llama", {"modules_to_save": ["lm_head"]}),
    "the input table": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "an adapted table": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "an adapted table, DoRA": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "both adapted tables": ("gpt2", {"target_modules": ["c_attn", "c_fc", "wte", "wpe"]}),
    "an adapted head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "rows of a table": ("llama", {"trainable_token_indices": [1, 4]}),
    "rows of a tied table": ("llama, tied", {"trainable_token_indices": [1, 4]}),
    "experts and routers": ("moe", cases.EXPERTS),
    "tables of biases": ("t5", {"target_modules": cases.EVERY_T5}),
}


@pytest.mark.parametrize("engine", ["fast", pytest.param("reference", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("what", OPTIONS)
def test_whatever_trains(cupy, what, engine):
    """And where blocks are computed again, with the same bits."""
    kind, options = OPTIONS[what]
    step = cases.step_of(*{**cases.KINDS, "llama, tied": cases.TIED}[kind], **options)
    got = assert_same(cupy, step, waits=routed(kind), engine=engine)
    _, again, waited = there(cupy, step, engine=engine, checkpoint=True)
    assert waited == 2 * routed(kind)
    assert {n: g.tobytes() for n, g in again.items()} == {n: g.tobytes() for n, g in got.items()}


@engines
@pytest.mark.parametrize("kind", ["llama", "bert, tokens", "roberta", "gpt2", "t5", "moe"])
def test_in_float32(cupy, kind, engine):
    """No farther from float64 than a few times as far as NumPy's float32 is."""
    of = cases.KINDS[kind]
    _, exact = cases.step_of(*of).narrowed().gradients(engine="reference")
    step = cases.step_of(*of, dtype="float32")
    truth, near = tensors(exact), far(tensors(step.gradients(engine="reference")[1]), tensors(exact))
    got = there(cupy, step, engine=engine)[1]
    assert 0 < near < 1e-4
    assert far(got, truth) <= 4 * near
    for run in (lambda **how: there(cupy, step, **how)[1], lambda **how: tensors(step.gradients(**how)[1])):
        kept, again = (run(engine=engine, checkpoint=checkpoint) for checkpoint in (False, True))
        assert all(g.tobytes() == again[name].tobytes() for name, g in kept.items())


@pytest.mark.parametrize("kind", ["llama", "gpt2", pytest.param("moe", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("way", WAYS)
def test_on_a_base_in_few_bits(cupy, kind, way):
    """Codes live on the device as they do on the host."""
    step = cases.step_of(*cases.KINDS[kind])
    here = step._replace(model=quantised(step.model, way))
    moved = step.moved(cupy.asarray)
    moved = moved._replace(model=quantised(moved.model, way))
    reads.clear()
    _, found = moved.gradients()
    assert len(reads) == routed(kind)
    _, want = here.gradients()
    assert far({n: g.host for n, g in tensors(found).items()}, tensors(want)) <= AGREES


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_masks_are_the_same_bits(cupy, dtype):
    keys = [DropoutKey(0.3, 2**63, 5, 7, c3=i) for i in (3, 0, 9)] + [DropoutKey(0.9)]
    got = masks.dropout_masks(keys, (5, 0, 16, 3), 7, dtype=dtype, xp=cupy)
    assert not reads
    want = masks.dropout_masks(keys, (5, 0, 16, 3), 7, dtype=dtype, xp=np)
    assert got.host.tobytes() == want.tobytes()
    assert want[:5].tobytes() == dropout_mask((5, 7), *keys[0][:4], c3=3, dtype=dtype).tobytes()


FAULTS = {
    "masks of the host": (passes, "dropout_masks", lambda right: lambda *a, xp, **how: right(*a, xp=np, **how)),
    "of a device, another scale": (masks, "_drop", lambda right: lambda x, key: right(x, key) or x.fill(0.5)),
    "ids that were moved": (
        passes,
        "lookup_backward",
        lambda right: lambda gy, ids, *a, **how: right(gy, passes.beside(ids, gy), *a, **how),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(cupy, monkeypatch, fault):
    where, name, plant = FAULTS[fault]
    step = cases.step_of(*cases.KINDS["llama"], modules_to_save=["embed_tokens"])
    right = getattr(where, name)
    monkeypatch.setattr(where, name, plant(right))
    with pytest.raises((AssertionError, TypeError)):
        assert_same(cupy, step, engine="reference")
