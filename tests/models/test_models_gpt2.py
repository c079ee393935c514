"""GPT-2: every gradient against a complex step, its tied head and other tasks' heads.  See specs/gpt.md."""

from dataclasses import replace

import family_laws as laws
import numpy as np
import pytest
from whole import AGREES, STARTS, Step, adapted, all_whole, batch_of, model_of, worst

from lorax_np.errors import ConfigError
from lorax_np.models import gpt2
from lorax_np.models.families import FAMILIES
from lorax_np.models.pairs import PAIRS
from lorax_np.models.passes import Pass
from lorax_np.models.records import Dropout, Model, Trained
from lorax_np.models.tasks import outputs
from tests.strategies import LIBRARIES

CONFIG = {
    "model_type": "gpt2",
    "n_embd": 12,
    "n_head": 3,
    "n_layer": 2,
    "n_inner": 10,
    "n_positions": 6,
    "vocab_size": 11,
    "layer_norm_epsilon": 1e-3,
    "tie_word_embeddings": False,
}
N = STARTS[-1]
NEXT = np.array([4, 7, -100, -100, 1, 9, 0, 3, -100])  # the single token of the second sequence has no next
TASKS = {
    "next token": ("CAUSAL_LM", NEXT),
    "classes": ("SEQ_CLS", np.array([2, 1, 0])),
    "tokens": ("TOKEN_CLS", np.array([0, -100, 2, 1, 1, -100, 0, 2, 2])),
    "spans": ("QUESTION_ANS", np.array([[0, 2], [0, 0], [3, 1]])),
}
SITES = ["c_attn", "c_proj", "c_fc", "wte", "wpe"]


def step_of(what: str, *, config=CONFIG, whole=False, p=0.3, **options) -> Step:
    task, labels = TASKS[what]
    model = model_of(config, task)
    batch = batch_of(11, labels)
    if whole:
        return Step(model, {}, all_whole(model), batch, task)
    trained, sites = adapted(model, targets=SITES, lora_dropout=p, **options)
    return Step(model, sites, trained, batch, task, Dropout(seed=4, step=9))


@pytest.mark.parametrize("what", TASKS)
def test_every_tensor_of_a_model_that_trains_whole(what):
    off, name = worst(step_of(what, whole=True))
    assert off <= AGREES, name


@pytest.mark.parametrize("bias", ["none", "all"])
def test_every_adapter_under_dropout(bias):
    step = step_of("next token", bias=bias)
    fused = step.trained.adapters["transformer.h.0.attn.c_attn"]
    assert (fused.A.shape, fused.B.shape) == ((3, 12), (36, 3))
    assert step.sites["transformer.h.0.attn.c_attn"].transposed
    off, name = worst(step)
    assert off <= AGREES, name


@pytest.mark.parametrize(
    "change",
    [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}, {"activation_function": "relu"}],
    ids=lambda change: next(iter(change)),
)
def test_other_settings(change):
    step, plain = step_of("next token", config={**CONFIG, **change}), step_of("next token")
    off, name = worst(step)
    assert off <= AGREES, name
    assert abs(float(step.gradients()[0]) - float(plain.gradients()[0])) > 1e-4


def test_what_scores_are_multiplied_by():
    said = {"scale_attn_by_inverse_layer_idx": True}
    for change, want in (
        ({}, (0.5, 0.5)),
        (said, (0.5, 0.25)),
        (said | {"scale_attn_weights": False}, (1.0, 0.5)),
    ):
        model = model_of({**CONFIG, **change}, "CAUSAL_LM")  # heads of 4
        assert gpt2.gpt2_of(Pass(model, {}, Trained({}, {}))).scales == want


def tied(model: Model) -> Model:
    """The same, its head being its table under a second name."""
    weights = {**model.weights, "lm_head.weight": model.weights["transformer.wte.weight"]}
    return Model("", "gpt2", {**model.config, "tied": "transformer.wte"}, weights)


def test_a_tied_head_reads_the_table():
    step = step_of("next token", p=0.0)
    both = step._replace(model=tied(step.model))
    off, name = worst(both)
    assert off <= AGREES, name
    at = {name: g for name, g in both.trained.adapters.items() if name != "transformer.wte"}
    some = both._replace(trained=both.trained._replace(adapters=at))  # of no adapted table z = h Eᵀ
    z = outputs(some.model, some.sites, some.trained, some.batch, task="CAUSAL_LM")
    h = hidden(some)
    assert np.abs(z - h @ some.model.weights["transformer.wte.weight"].T).max() <= 1e-13 * np.abs(z).max()


def hidden(step: Step):
    at = Pass(step.model, step.sites, step.trained)
    return FAMILIES["gpt2"].forward(at, step.batch, "nothing")[0]


def test_blocks_computed_again_give_the_same_bits_under_dropout():
    laws.assert_computed_again(step_of("next token", bias="all"))


def test_engines_agree():
    laws.assert_engines_agree(step_of("next token"))


@pytest.mark.parametrize("engine", PAIRS)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(
    "targets", [["c_attn"], ["c_proj"], ["c_fc", "wte"], r".*h\.1\.mlp\.c_.*", ["classifier"]], ids=str
)
def test_what_is_kept_is_what_was_counted(engine, p, targets):
    """(bert.14) and (bert.15), to the number."""
    step = step_of("tokens", p=0.0)
    trained, sites = adapted(step.model, targets=targets, lora_dropout=p)
    laws.assert_kept_is_counted(step._replace(trained=trained, sites=sites), engine, gpt2.gpt2_forward)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
@pytest.mark.parametrize("what", ["next token", "classes"])
def test_any_array_library_computes_it(library, what):
    laws.assert_any_library(step_of(what), library)


def test_micro_batches_add_up_and_no_token_sees_a_later_one():
    step = step_of("next token")
    laws.assert_adds_up(step, laws.alone(step.batch, by_row=True))
    h = hidden(step._replace(batch=replace(step.batch, ids=np.array([2, 3, 4, 5, 6, 7, 8, 9, 10]))))
    other = hidden(step._replace(batch=replace(step.batch, ids=np.array([2, 3, 9, 5, 6, 7, 8, 2, 10]))))
    same = np.abs(h - other).max(axis=1) == 0
    assert same.tolist() == [True, True, False, True, True, True, True, False, False]


@pytest.mark.parametrize(
    ("name", "place"), [*(("attention_backward", i) for i in range(3)), ("block_backward", 0)]
)
def test_a_line_wrong_by_a_thousandth_is_refused(monkeypatch, name, place):
    right = getattr(gpt2, name)

    def broken(*args, **options):
        found = right(*args, **options)
        if not isinstance(found, tuple):
            return found * 1.001
        return tuple(g if i != place else g * 1.001 for i, g in enumerate(found))

    monkeypatch.setattr(gpt2, name, broken)
    off, _ = worst(step_of("next token", whole=True))
    assert off > 1e6 * AGREES


def test_keys_and_values_that_change_places_are_refused(monkeypatch):
    right = gpt2.attention_backward

    def turned(*args, **options):
        gq, gk, gv, gR = right(*args, **options)
        return gq, gv, gk, gR

    monkeypatch.setattr(gpt2, "attention_backward", turned)
    off, _ = worst(step_of("next token", whole=True))
    assert off > 0.01


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"add_cross_attention": True}, "add_cross_attention: expected False"),
        ({"n_embd": 13}, "n_embd: expected a multiple of n_head=3, got 13"),
        ({"activation_function": "quick_gelu"}, "activation_function: expected one of gelu, "),
        ({"n_inner": 0}, "n_inner: expected a whole number of at least 1, got 0"),
    ],
)
def test_configs_that_are_refused(change, match):
    with pytest.raises(ConfigError, match=f"config.json: {match}"):
        model_of({**CONFIG, **change}, "CAUSAL_LM")


def test_other_names_of_sizes_and_an_inner_size_of_none():
    names = {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 2, "max_position_embeddings": 6}
    config = {"model_type": "gpt2", "vocab_size": 11, "n_inner": None, **names}
    found = FAMILIES["gpt2"].settings(config, "")
    assert [found[name] for name in ("n_embd", "n_head", "n_layer", "n_positions", "n_inner")] == [
        12,
        3,
        2,
        6,
        48,
    ]


def test_refusals():
    step = step_of("next token", p=0.0)
    for batch, match in (
        (replace(step.batch, ids=step.batch.ids - 20), "ids: expected numbers from 0 to 10"),
        (
            batch_of(11, None, starts=(0, 2, 9)),
            "at most 6 tokens, set by the model's positions, got 7 in sequence 1",
        ),
    ):
        with pytest.raises(ConfigError, match=match):
            outputs(step.model, step.sites, step.trained, batch, task="CAUSAL_LM")
