"""Llama's passes, without torch: each gradient by a complex step over the model, and the laws of batches."""

import re
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from whole import held

from lorax_np import layer
from lorax_np.errors import ConfigError, ShapeError
from lorax_np.models import llama
from lorax_np.models.pairs import PAIRS
from lorax_np.models.passes import Pass
from lorax_np.models.records import Gradients, Trained
from lorax_np.models.tasks import count, kept_numbers, loss, loss_and_gradients, outputs
from lorax_np.ops.rope import rope_forward
from lorax_np.tree import tree_add, tree_map
from tests.checkers import TINY, Refused, assert_close, pairing, total
from tests.models import tiny
from tests.strategies import LIBRARIES

LM = {"task": "CAUSAL_LM"}
# A pairing sums up to 10⁴ products; on the longest way through three blocks there are some 200 roundings, of
# numbers that may be ten times what is left of them.
NEAR = 2000 * 2.0**-53

WHOLE = ["lm_head", "norm", "input_layernorm", "post_attention_layernorm", "embed_tokens"]
SETUPS = {
    "all sites, norms, table and head whole": ({}, {"modules_to_save": WHOLE}),
    "dora": ({}, {"use_dora": True}),
    "biases, rslora": ({"attention_bias": True, "mlp_bias": True}, {"bias": "all", "use_rslora": True}),
    "table and head adapted": ({}, {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "tied rows": ({"tie_word_embeddings": True}, {"trainable_token_indices": [1, 4]}),
    "qwen3, windows": (
        {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
        {"modules_to_save": ["q_norm", "k_norm"], "lora_bias": True},
    ),
}


def check_every_gradient(name):
    """⟨g, v⟩ against Im φ(θ + 1e-30·iv)/1e-30, for a v for each array that trains; DoRA's norms constant."""
    changed, options = SETUPS[name]
    model = tiny.model(**changed)
    sites, trained, tokens = tiny.start(model, **options)
    b = tiny.batch()
    n, rng = count("CAUSAL_LM", b.labels), np.random.default_rng(5)
    how = {**LM, "n": n, "tokens": tokens, "engine": "reference"}
    _, gradients = loss_and_gradients(model, sites, trained, b, **how)
    got, norm = tiny.tensors(gradients), layer.row_norm_forward
    with mock.patch.object(layer, "row_norm_forward", lambda V: norm(np.real(V))):
        for key, value in tiny.tensors(trained).items():
            v = rng.standard_normal(value.shape)
            y = loss(model, sites, tiny.changed(trained, key, value + TINY * 1j * v), b, **how)
            assert got[key].dtype == value.dtype
            assert_close(f"<g{key}, v>", pairing(got[key], v), np.imag(y) / TINY, NEAR * total(got[key], v))


@pytest.mark.parametrize("name", SETUPS)
def test_every_gradient_by_a_complex_step(name):
    check_every_gradient(name)


def _swapped(backward):
    return lambda *at, **options: (lambda a, b, *more: (b, a, *more))(*backward(*at, **options))


def _last_two(backward):
    return lambda *at, **options: (lambda q, k, v, R: (q, v, k, R))(*backward(*at, **options))


FAULTS = {
    "rope_backward": rope_forward,
    "swiglu_backward": _swapped(llama.swiglu_backward),
    "attention_backward": _last_two(llama.attention_backward),
    "first_block": lambda at: 1,
    "_head_norm_back": lambda at, name, gy, saved, gradients: gy,
    "_attention_back": lambda at, i, g, *more: 0.999 * _attention_back(at, i, g, *more),
    "_gated_back": lambda at, i, g, *more: _gated_back(at, i, g, *more) - g,  # the residual gradient left out
}
_attention_back, _gated_back = llama._attention_back, llama._gated_back


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_seen(name):
    with mock.patch.object(llama, name, FAULTS[name]), pytest.raises((Refused, ConfigError)):
        check_every_gradient("qwen3, windows")


# ---- what may not matter -----------------------------------------------------------------------------------


def far(got, want):
    """The largest distance of two sets of gradients, relative to each tensor's largest entry."""
    got, want = tiny.tensors(got), tiny.tensors(want)
    assert list(got) == list(want)
    return max(np.abs(got[key] - want[key]).max() / np.abs(want[key]).max() for key in want)


def one_rounding(model, sites, trained, batch, how):
    """How far gradients move, in float64, when every weight is rounded once more to float32."""
    rng, found = np.random.default_rng(0), []
    wide = tree_map(lambda x: x.astype("float64"), trained)
    for change in (0.0, 2.0**-24):
        weights = {
            name: x.astype("float64") * (1 + change * rng.choice([-1, 1], x.shape))
            for name, x in model.weights.items()
        }
        n = count("CAUSAL_LM", batch.labels)
        found.append(loss_and_gradients(replace(model, weights=weights), sites, wide, batch, n=n, **how)[1])
    return far(*found)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("engine", PAIRS)
def test_micro_batches_of_one_step_add_up(dtype, engine):
    """Eight sequences of unequal length as 1×8, 2×4 and 8×1, under dropout: the same loss and gradients.

    A label's share is 1/n of the whole step; with each micro-batch's own n, the mean of means, it is not. How
    far float32 may be is what a relative change of 2^-24 of every weight does, a rounding of each, 16 times.
    """
    model = tiny.model(dtype=dtype)
    sites, trained, _ = tiny.start(model, lora_dropout=0.25, modules_to_save=["lm_head"])
    whole = tiny.batch((5, 1, 8, 3, 2, 9, 4, 6), first=11)
    how = {**LM, "dropout": tiny.DROPOUT, "engine": engine}

    def step(parts, own=False):
        found, value = None, 0.0
        for b in tiny.split(whole, parts):
            n = max(count("CAUSAL_LM", b.labels), 1) * parts if own else count("CAUSAL_LM", whole.labels)
            one, g = loss_and_gradients(model, sites, trained, b, n=n, **how)
            found, value = g if found is None else tree_add(found, g), value + float(one)
        return value, found

    value, want = step(1)
    near = 1e-13 if dtype == "float64" else 16 * one_rounding(model, sites, trained, whole, how)
    for parts in (2, 8):
        other, got = step(parts)
        assert abs(other / value - 1) <= near
        assert far(got, want) <= near
    assert far(step(8, own=True)[1], want) > 0.01


@pytest.mark.parametrize("engine", PAIRS)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"target_modules": ["up_proj", "embed_tokens"]}])
def test_blocks_computed_again_give_the_same_bits(engine, options):
    model = tiny.model(dtype="float32", attention_bias=True)
    sites, trained, _ = tiny.start(model, lora_dropout=0.25, bias="all", **options)
    b = tiny.batch()
    how = {**LM, "n": 9, "dropout": tiny.DROPOUT, "engine": engine}
    one, want = loss_and_gradients(model, sites, trained, b, **how)
    two, got = loss_and_gradients(model, sites, trained, b, checkpoint=True, **how)
    assert one == two
    assert far(got, want) == 0.0
    assert far(loss_and_gradients(model, sites, trained, b, **{**how, "dropout": None})[1], want) > 0.01


def test_sequences_do_not_see_each_other():
    """One after another, or each alone: the same logits, up to the order in which products are added up."""
    model = tiny.model()
    sites, trained, _ = tiny.start(model)
    b = tiny.batch()
    together = outputs(model, sites, trained, b, **LM)
    alone = [outputs(model, sites, trained, one, **LM) for one in tiny.split(b, 4)]
    assert [len(z) for z in alone] == list(tiny.LENGTHS)
    assert_close("z", np.concatenate(alone), together, NEAR * np.abs(together).max())
    later = replace(
        b, ids=np.where(np.arange(len(b.ids)) == 4, (b.ids + 1) % 13, b.ids)
    )  # the last of the first
    moved = np.abs(outputs(model, sites, trained, later, **LM) - together).max(axis=1)
    assert moved[4] > 1e-3
    assert moved[:4].max() == moved[5:].max() == 0.0


@pytest.mark.parametrize("engine", PAIRS)
def test_a_micro_batch_without_tokens_gives_zeros(engine):
    """A rank or a micro-batch may have nothing to do; it adds nothing, in every shape."""
    model = tiny.model()
    sites, trained, _ = tiny.start(model, lora_dropout=0.25, modules_to_save=["lm_head", "norm"])
    for b in (tiny.batch(()), tiny.batch((0, 0))):
        value, got = loss_and_gradients(
            model, sites, trained, b, n=3, dropout=tiny.DROPOUT, engine=engine, **LM
        )
        assert float(value) == 0.0
        for key, want in tiny.tensors(trained).items():
            g = tiny.tensors(got)[key]
            assert g.shape == want.shape
            assert not g.any()


def test_a_step_repeats_its_bits():
    """Nothing is written to, and nothing is carried from one step to the next; base and batch are read-only."""
    model = tiny.model(dtype="float32")
    sites, trained, _ = tiny.start(model, lora_dropout=0.25)
    b = tiny.batch()
    assert not model.weights["model.norm.weight"].flags.writeable
    for engine in PAIRS:
        how = {**LM, "n": 9, "dropout": tiny.DROPOUT, "engine": engine}
        one, two = (loss_and_gradients(model, sites, trained, b, **how) for _ in range(2))
        assert one[0] == two[0]
        assert far(one[1], two[1]) == 0.0


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_any_array_library_computes_it(library):
    """The same numbers, none of them read on the host in between; ids and labels may stay there."""
    model, b = tiny.model(), tiny.batch()
    sites, trained, _ = tiny.start(model, modules_to_save=["lm_head", "embed_tokens"])
    how = {**LM, "n": 9, "engine": "reference"}
    _, want = loss_and_gradients(model, sites, trained, b, **how)
    there = replace(model, weights={name: library.place(np.array(w)) for name, w in model.weights.items()})
    placed = tree_map(lambda x: library.place(np.array(x)), trained)
    _, got = loss_and_gradients(there, sites, placed, b, **how)
    assert far(tree_map(library.host, got), want) <= 1e-13


# ---- what is kept ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", PAIRS)
@pytest.mark.parametrize("dropout", [None, tiny.DROPOUT], ids=["", "dropout"])
@pytest.mark.parametrize(
    ("changed", "options"),
    [
        ({}, {}),
        ({}, {"target_modules": ["q_proj"], "lora_dropout": 0.5}),
        ({}, {"target_modules": ["o_proj", "down_proj"], "lora_dropout": 0.5}),
        ({}, {"target_modules": ["gate_proj", "lm_head"], "modules_to_save": ["k_proj"]}),
        ({}, {"target_modules": ["embed_tokens", "v_proj"], "lora_dropout": 0.5}),
        ({"model_type": "qwen3"}, {"target_modules": r".*\.1\..*up_proj"}),
        ({"attention_bias": True}, {"bias": "all", "target_modules": r".*\.2\..*v_proj"}),
    ],
)
def test_what_is_kept_is_what_was_counted(engine, dropout, changed, options):
    """(models.26) and (models.27), to the number."""
    model, b = tiny.model(**changed), tiny.batch()
    sites, trained, _ = tiny.start(model, **options)
    N = len(b.ids)
    at = Pass(model, sites, trained, pair=PAIRS[engine], dropout=dropout)
    how = {"engine": engine, "dropout": dropout}
    _, saved = llama.llama_forward(at, b.ids, b.rows)
    assert held(saved) == kept_numbers(model, sites, trained, N, **how)
    blocks = [held(block) for block in saved.blocks]
    _, inputs = llama.llama_forward(at, b.ids, b.rows, keep="inputs")
    again = kept_numbers(model, sites, trained, N, checkpoint=True, **how)
    assert held(inputs) + max(blocks, default=0) == again
    assert len(inputs.blocks) == len(blocks) == 3 - llama.first_block(at)


def test_dora_keeps_two_products_more():
    model, b = tiny.model(), tiny.batch()
    sites, trained, _ = tiny.start(model, use_dora=True, target_modules=["o_proj", "embed_tokens"])
    at = Pass(model, sites, trained)
    _, saved = llama.llama_forward(at, b.ids, b.rows)
    assert held(saved) == kept_numbers(model, sites, trained, len(b.ids), engine="reference")


@pytest.mark.parametrize(("padding", "row"), [(4, 4), (-9, 4), (13, None), (None, None)])
def test_the_row_of_padding_gets_nothing_from_ids(padding, row):
    """(models.18): other rows as without it; numbers below 0 count from the end, and 13 is no row of 13."""
    b, n = tiny.batch(), 9
    assert row is None or row in b.ids
    found = []
    for changed in ({}, {"pad_token_id": padding}):
        model = tiny.model(**changed)
        sites, trained, _ = tiny.start(model, modules_to_save=["embed_tokens"])
        found.append(
            loss_and_gradients(model, sites, trained, b, n=n, **LM)[1].saved["model.embed_tokens.weight"]
        )
    want = found[0].copy()
    if row is not None:
        assert want[row].any()
        want[row] = 0
    np.testing.assert_array_equal(found[1], want)


# ---- refusals ----------------------------------------------------------------------------------------------


def test_what_nothing_would_train_is_refused():
    model, b = tiny.model(), tiny.batch()
    sites, trained, tokens = tiny.start(model, target_modules=["v_proj"], trainable_token_indices=[3])
    go = {"n": 5, "tokens": tokens, **LM}
    loss_and_gradients(model, sites, trained, b, **go)
    for bad, options, message in (
        (Trained(trained.adapters, {"score.weight": np.ones((2, 10))}), {}, "score.weight: expected a place"),
        (trained, {"tokens": None}, "tokens: expected which rows of model.embed_tokens train, got nothing"),
        (trained, {"task": "SEQ_2_SEQ_LM"}, "task: expected one of CAUSAL_LM, SEQ_CLS"),
        (trained, {"engine": "quick"}, "engine: expected one of reference, fast, got 'quick'"),
        (trained, {"n": 0}, "n: expected the number of labels of the whole step, at least 1, got 0"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            loss_and_gradients(model, sites, bad, b, **{**go, **options})
    for beyond in (13, -1):
        ids = np.where(np.arange(len(b.ids)) == 6, beyond, b.ids)
        with pytest.raises(ConfigError, match=f"ids: expected numbers from 0 to 12, got {beyond} in row 6"):
            loss_and_gradients(model, sites, trained, replace(b, ids=ids), **go)
    with pytest.raises(ConfigError, match="sites: expected one for the adapter at model"):
        loss_and_gradients(model, {}, trained, b, **go)
    both = Trained(trained.adapters, {"model.layers.1.self_attn.v_proj.weight": np.ones((8, 10))})
    with pytest.raises(ConfigError, match=r"saved: expected none of model\.layers\.1"):
        loss_and_gradients(model, sites, both, b, **go)
    at = Pass(model, sites, trained, tokens=tokens)
    h, saved = llama.llama_forward(at, b.ids, b.rows, keep="nothing")
    with pytest.raises(TypeError, match="saved: expected what llama_forward kept for a backward"):
        llama.llama_backward(h, saved, at, Gradients())
    model = tiny.model(tie_word_embeddings=True)
    sites, trained, tokens = tiny.start(model, target_modules=["lm_head"], trainable_token_indices=[3])
    with pytest.raises(ConfigError, match="expected nothing else to train in lm_head, which is tied to model"):
        loss_and_gradients(model, sites, trained, b, **{**go, "tokens": tokens})
    with pytest.raises(ConfigError, match="task: expected one of CAUSAL_LM, "):
        count("causal-lm", b.labels)
    with pytest.raises(ConfigError, match="starts: expected row bounds"):
        count("QUESTION_ANS", np.zeros((1, 2), dtype="int64"))


@pytest.mark.parametrize("many", [9, 18])
def test_labels_of_other_rows_are_refused_in_evaluation_too(many):
    """Too few would otherwise be those of the first rows, and a loss of fewer labels than was asked for."""
    model, b = tiny.model(), tiny.batch()
    short = replace(b, labels=np.resize(b.labels, many))
    with pytest.raises(
        ShapeError, match=rf"labels: expected \(N,\) with N=17 set by the rows, got \({many},\)"
    ):
        loss(model, {}, Trained({}, {}), short, n=5, **LM)


def test_labels_are_counted_by_task():
    spans = np.array([[0, 2], [-100, 1]])
    assert count("QUESTION_ANS", spans, (0, 3, 4)) == 2
    assert count("FEATURE_EXTRACTION", None, (0, 3, 4, 6, 9)) == 2
    assert count("FEATURE_EXTRACTION", np.ones(2)) == 2
    assert count("SEQ_CLS", np.array([1, -100, 0])) == 2
    assert count("SEQ_CLS", np.ones(4, dtype="float32")) == 4
