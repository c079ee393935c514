"""What the planned Llama pass refuses, by name: the general pass is for it, or it fits nothing."""

import re

import numpy as np
import pytest

from lorax_np import Adapter
from lorax_np.errors import ConfigError, DtypeError, ShapeError
from lorax_np.fast.llama import llama_plan
from tests.fast.plain_llama import CONFIG, Case


def dora(case):
    site, adapter = next(iter(case.adapters.items()))
    case.adapters[site] = Adapter(adapter.A, adapter.B, m=np.ones(adapter.B.shape[0]))


def half(case):
    site, adapter = next(iter(case.adapters.items()))
    case.adapters[site] = Adapter(adapter.A.astype("float32"), adapter.B.astype("float32"))


def wide(case):
    site, adapter = next(iter(case.adapters.items()))
    case.adapters[site] = Adapter(np.ones((2, 9)), adapter.B[:, :2])


def elsewhere(case):
    case.adapters["lm_head"] = case.adapters["model.layers.0.mlp.up_proj"]


def narrow(case):
    case.weights["model.layers.1.mlp.up_proj.weight"] = np.ones((2, 3))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dora, ConfigError, r"q_proj: m: expected no magnitude in the planned Llama pass, got one"),
        (half, ConfigError, r"adapters: expected float64 throughout, as the weights"),
        (wide, ShapeError, r"q_proj: A: expected \(2, 24\), set by the config, got \(2, 9\)"),
        (elsewhere, ConfigError, "lm_head: expected one of self_attn.q_proj"),
        (lambda c: c.sites.clear(), ConfigError, "sites: expected model.layers.0.self_attn.q_proj"),
        (lambda c: c.weights.update({"model.layers.1.self_attn.q_norm.weight": 0}), ConfigError, "q_norm"),
        (lambda c: c.weights.pop("model.norm.weight"), ConfigError, "weights: expected model.norm.weight"),
        (narrow, ShapeError, r"model.layers.1.mlp.up_proj.weight: expected \(40, 24\)"),
        (lambda c: c.config.update(model_type="gemma"), ConfigError, "model_type: expected one of llama"),
        (lambda c: c.config.update(hidden_act="gelu"), ConfigError, "hidden_act: expected 'silu'"),
        (lambda c: c.config.update(rope_scaling={"rope_type": "dynamic"}), ConfigError, "'dynamic'"),
        (lambda c: c.config.update(num_key_value_heads=4), ConfigError, "key heads that divide 6"),
        (lambda c: c.config.pop("hidden_size"), ConfigError, "config: expected hidden_size, got none"),
    ],
)  # fmt: skip
def test_what_the_plan_does_not_compute_is_refused_by_name(change, error, words):
    case = Case(config=dict(CONFIG))
    change(case)
    with pytest.raises(error, match=words):
        case.plan()


def test_adapters_are_refused_before_the_base_is_copied():
    """A base of gigabytes would be copied for nothing: only what says its dtype is read."""
    case = Case(config=dict(CONFIG))
    dora(case)

    class Watched(dict):
        read = ()

        def __getitem__(self, name):
            self.read = (*self.read, name)
            return super().__getitem__(name)

    watched = Watched(case.weights)
    with pytest.raises(ConfigError, match="no magnitude"):
        case.plan(watched)
    assert set(watched.read) == {"model.embed_tokens.weight"}


def test_more_refusals_of_a_plan():
    case = Case(dtype="float32")
    with pytest.raises(
        ConfigError, match=re.escape("lm_head.weight: expected nothing trained beside adapters")
    ):
        llama_plan(case.weights, CONFIG, case.adapters, case.sites, {"lm_head.weight": 0})
    with pytest.raises(ConfigError, match="workers: expected 'auto' or a number"):
        case.plan(workers=0)
    with pytest.raises(ConfigError, match="rows: expected a number"):
        case.plan(rows=0)
    mixed = {**case.weights, "model.norm.weight": np.ones(24)}
    with pytest.raises(DtypeError, match=r"model.norm.weight: expected float32 or narrower"):
        case.plan(mixed)
    loose = {**CONFIG, "tie_word_embeddings": False}
    with pytest.raises(ConfigError, match=r"weights: expected lm_head.weight"):
        llama_plan(case.weights, loose, case.adapters, case.sites)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"ids": [50] * 10}, ConfigError, "ids: expected tokens from 0 to 49, got 50 to 50"),
        ({"labels": [-1] * 10}, ConfigError, "labels: expected tokens"),
        ({"labels": [1] * 9}, ShapeError, r"labels: expected \(10,\)"),
        ({"labels": [1.5] * 10}, DtypeError, "labels: expected integers, got float64"),
        ({"labels": [True] * 10}, DtypeError, "labels: expected integers, got bool"),
        ({"labels": [2**64 - 100] * 10}, ConfigError, "labels: expected tokens from 0 to 49, got 184467"),
        ({"ids": [1.0] * 10}, DtypeError, "ids: expected integers, got float64"),
        ({"starts": [0, 6, 4, 10]}, ShapeError, "starts: expected bounds"),
        ({"starts": [0, 9]}, ShapeError, "starts: expected bounds from 0 to 10"),
        ({"index": [1]}, ShapeError, "index: expected 2 numbers"),
        ({"n": 0}, ConfigError, "n: expected at least one label"),
        ({"saved": {"model.norm.weight": 0}}, ConfigError, "model.norm.weight"),
        ({"adapters": {}}, ShapeError, "no adapter"),
    ],
)
def test_batches_that_do_not_fit_are_refused(change, error, words):
    case = Case()
    given = {"adapters": case.adapters, "saved": {}, "ids": [1] * 10, "starts": [0, 4, 10], "index": [0, 1]}
    with pytest.raises(error, match=words):
        case.plan().loss_and_gradients(**{**given, "labels": [2] * 10, "n": 10, **change})
