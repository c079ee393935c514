"""Checkpoints of BERT and GPT-2 as files have them: prefixes, old names, other heads; and drawn heads."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
from whole import batch_of

import lorax_np as lx
from lorax_np.config.plan import Plan
from lorax_np.inject import plan, saved_tensors
from lorax_np.models.families import FAMILIES
from lorax_np.models.load import model_of
from lorax_np.models.new_head import with_head
from lorax_np.models.records import Trained
from lorax_np.models.tasks import loss, loss_and_gradients, outputs

BERT = {
    "model_type": "bert",
    "hidden_size": 6,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 8,
    "vocab_size": 11,
    "max_position_embeddings": 7,
}
GPT2 = {"model_type": "gpt2", "n_embd": 6, "n_head": 2, "n_layer": 2, "n_positions": 7, "vocab_size": 11}
RNG = np.random.default_rng


def checkpoint(config, *, prefix=True, **more):
    """Arrays under the names of a file: all but heads, with what stands before them or without; and more."""
    family = FAMILIES[config["model_type"]]
    rng = RNG(0)
    shapes = family.shapes(family.settings(config, ""))
    if config is BERT:
        shapes |= {"bert.pooler.dense.weight": (6, 6), "bert.pooler.dense.bias": (6,)}
    named = {name if prefix else name.removeprefix(family.prefix): shape for name, shape in shapes.items()}
    return {name: rng.standard_normal(shape) * 0.3 for name, shape in named.items()} | more


def test_a_checkpoint_without_a_prefix_is_the_same_model():
    batch = batch_of(11, None)
    for config, task in ((BERT, "FEATURE_EXTRACTION"), (GPT2, "CAUSAL_LM")):
        one, other = (model_of(checkpoint(config, prefix=p), config, task=task) for p in (True, False))
        assert list(one.weights) == list(other.weights)
        a, b = (outputs(model, {}, Trained({}, {}), batch, task=task) for model in (one, other))
        assert np.array_equal(a, b)


def test_the_first_names_of_layer_norms():
    weights = checkpoint(BERT)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in weights.items()
    }
    assert sum("gamma" in name for name in old) == 5
    model = model_of(old, BERT)
    assert set(model.weights) == set(weights)
    assert np.array_equal(
        model.weights["bert.embeddings.LayerNorm.weight"], weights["bert.embeddings.LayerNorm.weight"]
    )


def test_what_no_task_reads_is_left_aside():
    more = {"cls.predictions.bias": np.ones(11), "cls.seq_relationship.weight": np.ones((2, 6))}
    model = model_of(checkpoint(BERT, **more, **{"bert.embeddings.position_ids": np.arange(7)[None]}), BERT)
    assert not any(name.startswith("cls.") or name.endswith("_ids") for name in model.weights)
    with pytest.raises(lx.FormatError, match=r"no tensor that a bert .* got bert\.encoder\.layer\.0\.x"):
        model_of(checkpoint(BERT, **{"bert.encoder.layer.0.x": np.ones(2)}), BERT)
    roberta = BERT | {"model_type": "roberta"}
    more = {"lm_head.dense.weight": np.ones((6, 6)), "roberta.pooler.dense.weight": np.ones((6, 6))}
    assert not any(
        "pooler" in n or "lm_head" in n for n in model_of(checkpoint(roberta, **more), roberta).weights
    )


def test_a_mask_is_no_bias():
    """GPT-2's files hold its triangle of ones as attn.bias; c_attn.bias ends with the same letters."""
    more = {"transformer.h.0.attn.bias": np.ones((1, 1, 7, 7)), "transformer.h.0.attn.masked_bias": np.ones(())}
    model = model_of(checkpoint(GPT2, **more), GPT2)
    biases = [name for name in model.weights if name.startswith("transformer.h.0.") and "bias" in name]
    assert biases == [
        f"transformer.h.0.{m}.bias"
        for m in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    ]


# ---- heads of tasks -----------------------------------------------------------------------------------------

HEADS = {
    "SEQ_CLS": ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"],
    "TOKEN_CLS": ["classifier.weight", "classifier.bias"],
    "QUESTION_ANS": ["qa_outputs.weight", "qa_outputs.bias"],
    "FEATURE_EXTRACTION": [],
}


@pytest.mark.parametrize("task", HEADS)
def test_a_task_has_its_own_head_and_no_other(task):
    base = model_of(checkpoint(BERT, prefix=False), BERT)
    model = with_head(base, task, 3, RNG(0))
    body = FAMILIES["bert"].shapes(base.config)
    assert sorted(model.weights) == sorted([*body, *HEADS[task]])
    assert len(model.weights) == len(list(model.weights))
    again = model_of(dict(model.weights), BERT, task=task)
    assert set(again.weights) == set(model.weights)
    found = plan(model.weights, lx.LoraConfig(target_modules=["dense"], task_type=task))
    assert ("bert.pooler.dense" in found.sites) == (task == "SEQ_CLS")


def test_a_drawn_head_is_small_repeats_itself_and_trains_whole():
    base = model_of(checkpoint(BERT), BERT | {"initializer_range": 0.5}, dtype="float32")
    one, other = (with_head(base, "SEQ_CLS", 40, RNG(3)) for _ in range(2))
    W = one.weights["classifier.weight"]
    assert W.dtype == np.float32
    assert W.shape == (40, 6)
    assert 0.4 < W.std() < 0.6
    assert np.array_equal(W, other.weights["classifier.weight"])
    assert not one.weights["classifier.bias"].any()
    assert one.weights["bert.pooler.dense.weight"] is base.weights["bert.pooler.dense.weight"]

    config = lx.LoraConfig(2, target_modules=["query", "value"], task_type="SEQ_CLS")
    _, adapters, sites = lx.inject(one.weights, config, RNG(0))
    saved = saved_tensors(one.weights, plan(one.weights, config))
    assert list(saved) == ["classifier.weight", "classifier.bias"]
    batch = batch_of(11, np.array([0, 39, 5]))
    _, g = loss_and_gradients(one, sites, Trained(adapters, saved), batch, task="SEQ_CLS", n=3)
    assert g.saved["classifier.weight"].dtype == np.float32
    assert g.saved["classifier.bias"].any()
    assert not any(a.A.any() for a in g.adapters.values())  # since B is 0 before the first step


def test_a_head_that_is_there_is_kept_and_not_drawn_again():
    weights = checkpoint(BERT, **{"classifier.weight": np.ones((3, 6)), "classifier.bias": np.zeros(3)})
    model = model_of(weights, BERT, task="SEQ_CLS")
    assert model.weights["classifier.weight"].shape == (3, 6)
    with pytest.raises(lx.ConfigError, match=r"no head for, since it has classifier\.bias, got SEQ_CLS"):
        with_head(model, "SEQ_CLS", 3, RNG(0))
    with pytest.raises(lx.FormatError, match=r"the tensor qa_outputs\.weight for QUESTION_ANS"):
        model_of(weights, BERT, task="QUESTION_ANS")
    with pytest.raises(
        lx.FormatError, match=r"classifier.weight: expected \(3, 6\), set by the config, got \(3, 5\)"
    ):
        model_of(weights | {"classifier.weight": np.ones((3, 5))}, BERT)


def test_gpt2s_heads():
    base = model_of(checkpoint(GPT2), GPT2)
    assert "lm_head.weight" in base.weights  # the table's second name
    classes, tokens = with_head(base, "SEQ_CLS", 3, RNG(0)), with_head(base, "TOKEN_CLS", 3, RNG(0))
    assert list(classes.weights)[-1] == "score.weight"
    assert list(tokens.weights)[-2:] == ["classifier.weight", "classifier.bias"]
    assert "lm_head.weight" not in classes.weights
    found: Plan = plan(classes.weights, lx.LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    assert {name.rpartition(".")[2] for name in found.sites} == {"c_attn", "c_proj", "c_fc"}
    assert all(site.transposed for site in found.sites.values())


# ---- heads of other tasks -----------------------------------------------------------------------------------


def test_half_of_another_tasks_head_is_no_head():
    """A llama's score has a bias for TOKEN_CLS: without it, it would be another head for SEQ_CLS."""
    weights = tiny.weights(head=False) | {"score.weight": np.ones((3, 10)), "score.bias": np.ones(3)}
    assert "score.bias" in model_of(weights, tiny.CONFIG, task="TOKEN_CLS").weights
    with pytest.raises(lx.FormatError, match=r"there: expected the head of SEQ_CLS, which has no score\.bias"):
        model_of(weights, tiny.CONFIG, path="there", task="SEQ_CLS")
    both = model_of(weights, tiny.CONFIG)
    with pytest.raises(
        lx.ConfigError, match=r"task: expected a model whose head has no score\.bias for SEQ_CLS"
    ):
        outputs(both, {}, Trained({}, {}), tiny.batch(), task="SEQ_CLS")
    assert outputs(both, {}, Trained({}, {}), tiny.batch(), task="TOKEN_CLS").shape == (17, 3)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_what_a_model_has_of_a_head_says_how_many_classes(kind):
    """BERT's tasks share a classifier, which SEQ_CLS has a pooler below; llama's share a weight."""
    if kind == "bert":
        more = {"classifier.weight": np.ones((5, 6)), "classifier.bias": np.ones(5)}
        weights = {n: W for n, W in checkpoint(BERT, **more).items() if "pooler" not in n}
        base, task, drawn = model_of(weights, BERT), "SEQ_CLS", "bert.pooler.dense.weight"
    else:
        weights = tiny.weights(head=False) | {"score.weight": np.ones((5, 10))}
        base, task, drawn = model_of(weights, tiny.CONFIG), "TOKEN_CLS", "score.bias"
    with pytest.raises(lx.ConfigError, match=r"labels: expected 5, the rows of (classifier|score)\.weight"):
        with_head(base, task, 3, RNG(0))
    made = with_head(base, task, 5, RNG(0))
    assert drawn in made.weights
    assert outputs(made, {}, Trained({}, {}), tiny.batch((2, 3)), task=task).shape[1] == 5


@pytest.mark.parametrize(
    ("rows_of_head", "labels", "error", "told"),
    [
        (3, np.full((4, 3), 1.5), lx.ConfigError, "y: expected labels from 0 to 1, got 1.5 in row 0"),
        (3, np.full((4, 3), np.nan), lx.ConfigError, "labels: expected finite numbers, got NaN or infinity"),
        (1, np.array([0.5, 1, np.inf, 0]), lx.ConfigError, "labels: expected finite numbers, got NaN or inf"),
        (1, np.array([0, 0, -100, 0]), lx.ConfigError, "labels: expected at least two outputs for integers, "),
        (1, np.array(["a"] * 4), lx.DtypeError, "labels: expected integers or real numbers, got str"),
        (1, np.ones(4, complex), lx.DtypeError, "labels: expected integers or real numbers, got complex128"),
        (3, np.full(4, 2**64 - 100), lx.ConfigError, "labels: expected 0 to 2 or −100, got 184467"),
    ],
)
def test_labels_that_a_loss_has_no_meaning_for(rows_of_head, labels, error, told):
    model = with_head(tiny.model(), "SEQ_CLS", rows_of_head, RNG(0))
    batch = replace(tiny.batch(), labels=labels)
    with pytest.raises(error, match=told):
        loss_and_gradients(model, {}, Trained({}, {}), batch, task="SEQ_CLS", n=4)


def test_multi_hot_labels_may_be_truths():
    model, hot = with_head(tiny.model(), "SEQ_CLS", 3, RNG(0)), np.eye(4, 3)
    one, other = (
        loss(model, {}, Trained({}, {}), replace(tiny.batch(), labels=y), task="SEQ_CLS", n=12)
        for y in (hot, hot > 0)
    )
    assert one == other
