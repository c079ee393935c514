"""BERT and the heads of encoders: every gradient against a complex step.  See specs/bert.md and heads.md."""

from dataclasses import replace

import family_laws as laws
import numpy as np
import pytest
from whole import AGREES, LENGTHS, STARTS, Step, adapted, all_whole, batch_of, leaves, model_of, worst

from lorax_np.errors import ConfigError, ShapeError
from lorax_np.models import bert, encoder_heads
from lorax_np.models.pairs import PAIRS
from lorax_np.models.passes import Pass
from lorax_np.models.records import Dropout, Gradients, Trained
from lorax_np.models.tasks import count, loss, loss_and_gradients, outputs
from tests.strategies import LIBRARIES

CONFIG = {
    "model_type": "bert",
    "hidden_size": 12,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "intermediate_size": 10,
    "vocab_size": 11,
    "max_position_embeddings": 7,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-3,
}
ROBERTA = {**CONFIG, "model_type": "roberta", "max_position_embeddings": 9, "type_vocab_size": 1}
N, S = STARTS[-1], len(LENGTHS)
PAIRED = (*STARTS, 11)  # a fourth sequence
LINEAR = ["query", "key", "value", "dense"]
TASKS = {
    "classes": ("SEQ_CLS", np.array([2, -100, 0]), STARTS),
    "several classes": ("SEQ_CLS", np.array([[1.0, 0.0, 0.3], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]), STARTS),
    "tokens": ("TOKEN_CLS", np.array([0, -100, 2, 1, 1, -100, 0, 2, 2]), STARTS),
    "spans": ("QUESTION_ANS", np.array([[0, 2], [5, 0], [3, 1]]), STARTS),  # of which one start lies outside
    "pairs": ("FEATURE_EXTRACTION", None, PAIRED),
    "scored pairs": ("FEATURE_EXTRACTION", np.array([0.3, -0.7]), PAIRED),
}


def step_of(what: str, *, config=CONFIG, whole=False, p=0.3, **options) -> Step:
    task, labels, starts = TASKS[what]
    model = model_of(config, task)
    batch = batch_of(11, labels, types=config["type_vocab_size"], starts=starts)
    if whole:
        return Step(model, {}, all_whole(model), batch, task)
    targets = [*LINEAR, "word_embeddings", "token_type_embeddings", "position_embeddings"]
    trained, sites = adapted(model, targets=targets, lora_dropout=p, **options)
    return Step(model, sites, trained, batch, task, Dropout(seed=4, step=9))


@pytest.mark.parametrize("what", TASKS)
def test_every_tensor_of_a_model_that_trains_whole(what):
    off, name = worst(step_of(what, whole=True))
    assert off <= AGREES, name


@pytest.mark.parametrize("what", ["classes", "spans"])
def test_every_adapter_under_dropout(what):
    off, name = worst(step_of(what, bias="lora_only"))
    assert off <= AGREES, name


def test_biases_of_all_modules():
    step = step_of("classes", bias="all", use_rslora=True)
    assert "bert.embeddings.LayerNorm" in step.trained.adapters
    off, name = worst(step)
    assert off <= AGREES, name


@pytest.mark.parametrize("what", ["classes", "tokens"])
def test_roberta(what):
    off, name = worst(step_of(what, config=ROBERTA, whole=True))
    assert off <= AGREES, name


@pytest.mark.parametrize("act", ["gelu_new", "relu", "silu", "tanh"])
def test_other_activations(act):
    off, name = worst(step_of("classes", config={**CONFIG, "hidden_act": act, "num_hidden_layers": 1}, p=0.0))
    assert off <= AGREES, name


def test_a_number_for_each_sequence():
    model = model_of(CONFIG, "SEQ_CLS", labels=1)
    batch = batch_of(11, np.array([0.5, -1.0, 2.0]), types=2)
    off, name = worst(Step(model, {}, all_whole(model), batch, "SEQ_CLS"))
    assert off <= AGREES, name
    z = outputs(model, {}, all_whole(model), batch, task="SEQ_CLS")
    want = np.mean((z[:, 0] - batch.labels) ** 2)
    assert loss(model, {}, all_whole(model), batch, task="SEQ_CLS", n=3) == pytest.approx(want)


# ---- what has to be the same --------------------------------------------------------------------------------


def test_blocks_computed_again_give_the_same_bits_under_dropout():
    laws.assert_computed_again(step_of("classes", bias="all"))


def test_engines_agree():
    laws.assert_engines_agree(step_of("tokens", bias="lora_only"), least=1e-15)


@pytest.mark.parametrize("engine", PAIRS)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(
    "targets",
    [["query", "value"], ["dense"], ["key", "word_embeddings"], r".*layer\.1.*output\.dense", ["classifier"]],
    ids=str,
)
def test_what_is_kept_is_what_was_counted(engine, p, targets):
    """(bert.14) and (bert.15), to the number."""
    step = step_of("tokens", p=0.0)
    trained, sites = adapted(step.model, targets=targets, lora_dropout=p)
    laws.assert_kept_is_counted(step._replace(trained=trained, sites=sites), engine, bert.bert_forward)


def test_cosines_are_finite():
    step = step_of("scored pairs")
    batch = replace(step.batch, labels=np.array([0.3, np.nan]))
    with pytest.raises(ConfigError, match="labels: expected finite numbers, got NaN or infinity"):
        step._replace(batch=batch).gradients()


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
@pytest.mark.parametrize("what", ["classes", "several classes", "spans", "pairs", "scored pairs"])
def test_any_array_library_computes_it(library, what):
    laws.assert_any_library(step_of(what), library)


@pytest.mark.parametrize("what", ["classes", "tokens", "spans"])
def test_micro_batches_add_up(what):
    step = step_of(what)
    laws.assert_adds_up(step, laws.alone(step.batch, by_row=what == "tokens"))


def test_frozen_blocks_below_are_passed_over(monkeypatch):
    """Where only the last block's adapters train, the first block's backward is not run."""
    step = step_of("tokens", p=0.0)
    upper = {name: g for name, g in step.trained.adapters.items() if ".layer.1." in name}
    some = step._replace(trained=step.trained._replace(adapters=upper))
    _, want = some.gradients()
    ran = []
    backward = bert.block_backward
    monkeypatch.setattr(
        bert, "block_backward", lambda at, name, *rest: ran.append(name) or backward(at, name, *rest)
    )
    _, got = some.gradients()
    assert ran == ["bert.encoder.layer.1"]
    assert laws.bits(got) == laws.bits(want)
    off, name = worst(some)
    assert off <= AGREES, name


def test_ids_and_types_matter_and_types_are_0_by_default():
    step = step_of("classes", p=0.0)
    z = outputs(step.model, step.sites, step.trained, step.batch, task="SEQ_CLS")
    none = outputs(step.model, step.sites, step.trained, replace(step.batch, types=None), task="SEQ_CLS")
    zero = replace(step.batch, types=np.zeros(N, "int64"))
    assert np.array_equal(none, outputs(step.model, step.sites, step.trained, zero, task="SEQ_CLS"))
    assert np.abs(z - none).max() > 0.01


def test_weights_that_are_stored_narrow_are_computed_wide():
    """float16 as storage: the outputs of the same values in float32, bit for bit."""
    model = model_of(CONFIG, "SEQ_CLS", dtype="float16")
    wide = replace(model, weights={name: w.astype("float32") for name, w in model.weights.items()})
    batch = batch_of(11, None, types=2)
    one, other = (outputs(m, {}, Trained({}, {}), batch, task="SEQ_CLS") for m in (model, wide))
    assert one.dtype == np.float32
    assert np.array_equal(one, other)


def test_a_backward_needs_what_a_forward_kept():
    step = step_of("tokens", p=0.0)
    at = Pass(step.model, step.sites, step.trained)
    h, saved = bert.bert_forward(at, step.batch, "nothing")
    with pytest.raises(TypeError, match="got that of keep='nothing'"):
        bert.bert_backward(h, saved, at, Gradients())


@pytest.mark.parametrize("what", TASKS)
def test_no_sequence_at_all(what):
    """The share of a rank that has none left in a step."""
    step = step_of(what)
    labels = None if step.batch.labels is None else step.batch.labels[:0]
    none = replace(step.batch, ids=step.batch.ids[:0], types=None, starts=(0,), index=(), labels=labels)
    assert step._replace(batch=none).n == 0
    value, g = loss_and_gradients(
        step.model, step.sites, step.trained, none, task=step.task, n=4, dropout=step.dropout
    )
    assert float(value) == 0.0
    assert leaves(g).keys() == leaves(step.trained).keys()
    assert not any(part.any() for part in leaves(g).values())


# ---- what a wrong line does ---------------------------------------------------------------------------------


def scaled(function, place):
    """The function with one of its results wrong by 0.1 %."""

    def broken(*args, **options):
        found = function(*args, **options)
        if not isinstance(found, tuple):
            return found * 1.001
        return tuple(g * 1.001 if i == place else g for i, g in enumerate(found))

    return broken


@pytest.mark.parametrize(
    ("module", "name", "place", "what"),
    [
        (bert, "attention_backward", 0, "classes"),
        (bert, "attention_backward", 1, "classes"),
        (bert, "attention_backward", 2, "classes"),
        (bert, "tanh_backward", 0, "classes"),
        (bert, "pick_backward", 0, "classes"),
        (encoder_heads, "pooler_backward", 0, "classes"),
        (bert, "block_backward", 0, "tokens"),
        (encoder_heads, "unit_backward", 0, "pairs"),
        (encoder_heads, "mean_pool_backward", 0, "pairs"),
        (encoder_heads, "contrastive_backward", 1, "pairs"),
        (encoder_heads, "cosine_mse_backward", 0, "scored pairs"),
        (encoder_heads, "span_backward", 0, "spans"),
    ],
)
def test_a_line_wrong_by_a_thousandth_is_refused(monkeypatch, module, name, place, what):
    monkeypatch.setattr(module, name, scaled(getattr(module, name), place))
    off, _ = worst(step_of(what, whole=True))
    assert off > 1e6 * AGREES


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("linear_back", lambda found, name: 0.0 * found if name.endswith("intermediate.dense") else found),
        ("linear_back", lambda found, name: 0.0 * found if name.endswith("self.key") else found),
        (
            "layer_norm_back",
            lambda found, name: found * 1.001 if name.endswith("attention.output.LayerNorm") else found,
        ),
    ],
    ids=["a branch of the perceptron is lost", "keys are lost", "a norm"],
)
def test_a_branch_that_is_lost_is_refused(monkeypatch, name, wrong):
    right = getattr(Pass, name)
    monkeypatch.setattr(
        Pass, name, lambda at, module, *rest, **how: wrong(right(at, module, *rest, **how), module)
    )
    off, _ = worst(step_of("tokens"))
    assert off > 1e6 * AGREES


def test_the_row_of_padding_does_not_train():
    """As in torch: its id may occur, and its gradient is 0; so is that of its column of an adapter."""
    for config, pad in ((CONFIG, 0), (ROBERTA, 1)):
        for whole in (True, False):
            step = step_of("tokens", config=config, whole=whole, p=0.0)
            ids = np.where(np.arange(N) % 2 == 0, pad, step.batch.ids)
            _, g = step._replace(batch=replace(step.batch, ids=ids)).gradients()
            name = "roberta." if config is ROBERTA else "bert."
            name += "embeddings.word_embeddings"
            rows = g.saved[f"{name}.weight"] if whole else g.adapters[name].A.T
            assert not rows[pad].any()
            assert rows[ids[1]].any()


# ---- refusals -----------------------------------------------------------------------------------------------


def test_refusals():
    step = step_of("classes", p=0.0)

    def refused(batch, match, task="SEQ_CLS", kind=ConfigError):
        with pytest.raises(kind, match=match):
            outputs(step.model, step.sites, step.trained, batch, task=task)

    b = step.batch
    refused(replace(b, ids=b.ids + 11), r"ids: expected numbers from 0 to 10, got \d+ in row 0")
    refused(replace(b, types=b.types + 2), "types: expected numbers from 0 to 1, set by type_vocab_size")
    refused(replace(b, types=b.types[1:]), r"types: expected \(N,\) with N=9 set by starts", kind=ShapeError)
    long = batch_of(11, None, starts=(0, 8))
    refused(long, "sequences of at most 7 tokens, set by the model's positions, got 8 in sequence 0")
    with pytest.raises(ShapeError, match="as many pairs as texts, got 3 sequences"):
        step_of("pairs")._replace(batch=replace(b, labels=None)).gradients()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"is_decoder": True}, "is_decoder: expected False, since tokens look both ways, got True"),
        ({"add_cross_attention": True}, "add_cross_attention: expected False"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type: expected 'absolute'"),
        ({"hidden_size": 13}, "hidden_size: expected a multiple of num_attention_heads=3, got 13"),
        ({"hidden_act": "gelu_fast"}, "hidden_act: expected one of gelu, "),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected a whole number of at least 1, got 0"),
        ({"pad_token_id": "0"}, "pad_token_id: expected an id"),
    ],
)
def test_configs_that_are_refused(change, match):
    with pytest.raises(ConfigError, match=f"config.json: {match}"):
        model_of({**CONFIG, **change}, "SEQ_CLS")


def test_roberta_counts_positions_past_padding():
    model, other = (model_of({**ROBERTA, "pad_token_id": pad}, "TOKEN_CLS") for pad in (1, 2))
    assert model.config["first_position"] == 2
    trained = all_whole(model)
    batch = batch_of(11, None)
    one, two = (outputs(m, {}, trained, batch, task="TOKEN_CLS") for m in (model, other))
    assert np.abs(one - two).max() > 0.01
    with pytest.raises(ConfigError, match="at most 7 tokens"):
        outputs(model, {}, trained, batch_of(11, None, starts=(0, 8)), task="TOKEN_CLS")


def test_counts():
    assert [count(task, labels, np.array(starts)) for task, labels, starts in TASKS.values()] == [
        2,
        9,
        7,
        5,
        2,
        2,
    ]
