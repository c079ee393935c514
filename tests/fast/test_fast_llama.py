"""The planned Llama pass: loss and gradients against the definitions and the general pass, bits, workers."""

import threading

import numpy as np
import pytest
from checkers import EPS

import lorax_np as lx
from lorax_np import Adapter
from lorax_np.fast.gemm import engine
from lorax_np.fast.llama import attention, branches, elementwise, head, llama_plan, plan, room, threads
from lorax_np.models.tasks import count, loss_and_gradients
from lorax_np.models.tasks import loss as model_loss
from tests.fast.plain_llama import (
    CONFIG,
    DROPOUT,
    LENGTHS,
    PARTS,
    ROUNDING,
    Case,
    assert_explained,
    batch,
    loss,
)
from tests.models import tiny

MISTRAL = CONFIG | {"model_type": "mistral", "sliding_window": 5}
CASES = {
    "plain": {},
    "dropout": {"p": 0.1},
    "biases": {"biases": True, "p": 0.1},
    "own head": {"head": True},
    "one head each": {"config": CONFIG | {"num_key_value_heads": 6}},
    "window": {"config": MISTRAL},
    "wide window": {"config": MISTRAL | {"sliding_window": 100, "num_hidden_layers": 2}, "lengths": (150, 5)},
    "last layer": {"where": lambda i, site: i == 2},
    "from down": {"where": lambda i, site: i > 1 or (i, site) == (1, "mlp.down_proj"), "p": 0.2},
    "from up": {"where": lambda i, site: i > 1 or (i, site) == (1, "mlp.up_proj"), "p": 0.2},
    "from o": {"where": lambda i, site: i > 1 or (i, site) == (1, "self_attn.o_proj"), "p": 0.2},
    "from v, few": {"where": lambda i, site: site[10:] in ("v_proj", "k_proj"), "p": 0.2},
}


def same_bits(one, other):
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for site, g in one[1].items():
        for part in PARTS:
            np.testing.assert_array_equal(getattr(g, part), getattr(other[1][site], part))


def close(one, other, units=ROUNDING, dtype="float64"):
    """Within so many eps of the largest entry of each tensor, or of a thousandth of the largest of all."""
    assert abs(one[0] - other[0]) <= units * EPS[dtype] * abs(other[0])
    largest = max(np.abs(g.B).max() for g in other[1].values() if g.B is not None)
    for site, g in other[1].items():
        for part in PARTS:
            want = getattr(g, part)
            if want is not None:
                gap = np.abs(getattr(one[1][site], part) - want).max()
                assert gap <= units * EPS[dtype] * max(np.abs(want).max(), 1e-3 * largest), (site, part)


# ---- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.thorough) if name in ("from up", "from o") else name
        for name in CASES
    ],
)
def test_loss_and_every_gradient_are_the_definitions(name):
    case = Case(**CASES[name])
    case.assert_right(case.gradients())


FAULTS = {
    "a key too many": lambda patch: patch.setattr(attention, "hide", lambda *a: None),
    "the norm's second term": lambda patch: patch.setattr(
        elementwise, "rms_back", lambda gx, h, rho, g, room: np.add(g, gx * rho, out=g)
    ),
    "1/(1 - p)": lambda patch: patch.setattr(branches, "factor_of", lambda *a: 1.0),
    "another call's mask": lambda patch: patch.setattr(
        room.Run,
        "sequences",
        lambda self: [(a, b, 0) for a, b in zip(self.bounds, self.bounds[1:])],  # noqa: B905
    ),
    "no slope of the gate": lambda patch: patch.setattr(
        elementwise,
        "swiglu_back",
        lambda gy, gu, sigma, a, out: out.__setitem__(..., np.hstack([gy * 0, gy * a])),
    ),
    "scores without scale": lambda patch: patch.setattr(
        attention, "angles", lambda *a, made=attention.angles: attention.Angles(made(*a).k, made(*a).k)
    ),
    "logits for a gradient": lambda patch: patch.setattr(
        head, "_softmax", lambda z, n: np.log(np.exp(z).sum(1))
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault, monkeypatch):
    case = Case(p=0.1)
    FAULTS[fault](monkeypatch)
    with pytest.raises(AssertionError):
        case.assert_right(case.gradients())


def test_float32_is_as_far_from_float64_as_its_roundings_explain():
    """A relative change of 2^-24 of every weight is what one rounding of each does; a pass has some dozens."""
    assert_explained(Case(p=0.1, dtype="float32"), Case(p=0.1), Case(p=0.1))


def test_masks_are_those_of_each_sequences_number():
    """A sequence has the same masks wherever it lies; with another number it has others."""
    case = Case(p=0.3, lengths=(9, 14))
    ids, starts, index, labels, n = case.batch
    order = np.r_[9:23, 0:9]
    turned = (ids[order], [0, 14, 23], index[::-1], labels[order])
    how = {"n": n, "dropout": DROPOUT}
    want = case.gradients(workers=1)
    close(case.plan(workers=1).loss_and_gradients(case.adapters, {}, *turned, **how)[:2], want)
    other = case.plan(workers=1).loss_and_gradients(case.adapters, {}, ids, starts, [3, 4], labels, **how)
    assert abs(other[0] - want[0]) > 1e-6


def test_micro_batches_add_up_to_the_whole():
    case = Case(p=0.1, lengths=(20, 3, 40, 8))
    ids, starts, index, labels, n = case.batch
    whole, parts = case.gradients(), []
    for a, b in ((0, 1), (1, 3), (3, 4)):
        rows = slice(starts[a], starts[b])
        where = (ids[rows], starts[a : b + 1] - starts[a], index[a:b], labels[rows])
        parts.append(case.plan().loss_and_gradients(case.adapters, {}, *where, n=n, dropout=DROPOUT))
    total = {
        site: Adapter(sum(g[site].A for _, g, _ in parts), sum(g[site].B for _, g, _ in parts))
        for site in case.adapters
    }
    close((sum(part[0] for part in parts), total), whole)


def test_the_loss_alone():
    case = Case(biases=True)
    *where, n = case.batch
    assert case.plan().loss(case.adapters, {}, *where, n=n) == case.gradients()[0]
    bare = llama_plan(case.weights, CONFIG, {}, {})
    want = loss(CONFIG, case.weights, {}, {}, *case.batch)
    assert abs(bare.loss({}, {}, *where, n=n) - want) <= ROUNDING * EPS["float64"] * want
    assert bare.loss_and_gradients({}, {}, *where, n=n)[1:] == ({}, {})


SETUPS = {
    "llama": ({}, {}),
    "biases, rslora": ({"attention_bias": True, "mlp_bias": True}, {"bias": "all", "use_rslora": True}),
    "a bias beside few sites": ({"attention_bias": True}, {"bias": "all", "target_modules": ["v_proj"]}),
    "bias of B, last layer": ({}, {"lora_bias": True, "layers_to_transform": [2], "layers_pattern": "layers"}),
    "tied": ({"tie_word_embeddings": True}, {"target_modules": ["o_proj", "up_proj"]}),
    "mistral": ({"model_type": "mistral", "sliding_window": 3}, {}),
    "qwen2, windows": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}, {},
    ),
    "llama3": (
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4,
                             "original_max_position_embeddings": 8, "rope_theta": 500.0}}, {},
    ),
    "yarn": ({"rope_parameters": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 8}}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", SETUPS)
def test_it_is_the_general_pass(name):
    changed, options = SETUPS[name]
    model = tiny.model(**changed)
    sites, trained, _ = tiny.start(model, **{"lora_dropout": 0.2, **options})
    b = tiny.batch((*tiny.LENGTHS, 0))
    n = count("CAUSAL_LM", b.labels)
    how = {"task": "CAUSAL_LM", "n": n, "engine": "reference"}
    want = loss_and_gradients(model, sites, trained, b, dropout=tiny.DROPOUT, **how)
    planned = llama_plan(model.weights, model.config, trained.adapters, sites, trained.saved)
    where = (trained.adapters, {}, b.ids, b.starts, b.index, b.labels)
    found, gradients, rest = planned.loss_and_gradients(*where, n=n, dropout=tiny.DROPOUT)
    assert rest == {}
    close((found, gradients), (float(want[0]), want[1].adapters))
    assert abs(planned.loss(*where, n=n) - model_loss(model, sites, trained, b, **how)) < 1e-12


# ---- bits ----------------------------------------------------------------------------------------------------


def test_checkpointing_a_second_step_and_what_memory_held_change_no_bit(monkeypatch):
    case = Case(p=0.1, biases=True)
    planned = case.plan()
    want = case.gradients(planned)
    same_bits(case.gradients(planned), want)
    same_bits(case.gradients(checkpoint=True), want)
    made = room.fresh

    def poisoned(shape, dtype):
        array = made(shape, dtype)
        array.reshape(-1).view(np.uint8)[...] = 255  # NaN
        return array

    monkeypatch.setattr(room, "fresh", poisoned)
    monkeypatch.setattr(plan, "fresh", poisoned)
    same_bits(case.gradients(), want)
    same_bits(case.gradients(checkpoint=True), want)


def test_a_step_of_another_size_in_between_changes_no_bit():
    case = Case(p=0.1)
    planned, small = case.plan(), batch(CONFIG, (5, 150, 2))
    want = case.gradients(planned)
    *where, n = small
    planned.loss_and_gradients(case.adapters, {}, *where, n=n)
    same_bits(case.gradients(planned), want)


def test_workers_and_runs_change_the_order_of_sums_alone():
    case = Case(p=0.1)
    want = case.gradients(workers=1)
    for workers in (2, 3, 7, "auto"):
        close(case.gradients(workers=workers), want)
    assert len(threads.shares(list(LENGTHS), 1, 20)[0]) > 2
    close(case.gradients(workers=1, rows=20), want)


def test_weights_written_out_by_layer_give_the_same_bits():
    case = Case(p=0.1, biases=True)

    class Packed(dict):
        def __getitem__(self, name):
            if name.endswith("_proj.weight"):
                raise AssertionError(f"{name} was read whole")
            return super().__getitem__(name)

        def into(self, name, out):
            out[...] = super().__getitem__(name)

    packed = case.plan(Packed(case.weights))
    assert packed.weights.by_layer
    same_bits(case.gradients(packed), case.gradients())


@pytest.mark.parametrize("name", lx.fast.engines())
def test_every_blas(name):
    case = Case(p=0.1, lengths=(30, 9))
    with lx.fast.blas(name):
        case.assert_right(case.gradients())


def test_each_worker_has_one_thread_of_blas_and_its_own_context():
    control = engine().threads
    if control is None:
        pytest.skip("this BLAS cannot be told its threads")
    before, seen = control.get(), {}

    def work(who, given):
        seen[threading.get_ident()] = control.get(), engine().name
        return given

    with lx.fast.blas("openblas"):
        assert threads.in_threads(work, [4, 5]) == [4, 5]
    assert set(seen.values()) == {(1, "openblas")}
    assert threading.get_ident() not in seen
    assert control.get() == before

    def fails(who, given):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        threads.in_threads(fails, [1, 2])
    assert control.get() == before


def test_a_batch_without_rows_or_labels():
    case = Case()
    loss_, found = case.plan().loss_and_gradients(case.adapters, {}, [], [0, 0], [1], [], n=4)[:2]
    assert loss_ == 0
    ids, starts, index, labels, n = case.batch
    none = case.plan().loss_and_gradients(case.adapters, {}, ids, starts, index, labels * 0 - 100, n=n)[:2]
    same_bits(none, (loss_, found))
    assert not any(np.any(g.A) or np.any(g.B) for g in found.values())
