"""Models loaded from files: what is read, what is refused, in which words, and heads that are new."""

import json
import re

import numpy as np
import pytest

import lorax_np as lx
from lorax_np.io.gguf_names import ggml_module, heads_of, to_ggml_rows
from lorax_np.io.gguf_writer import write_gguf
from lorax_np.models.load import check_head, model_of
from lorax_np.models.new_head import with_head
from lorax_np.models.records import Trained
from lorax_np.models.tasks import loss_and_gradients, outputs
from tests.models import tiny

LM = {"task": "CAUSAL_LM"}
NOTHING = Trained({}, {})


def saved(folder, weights, **changed):
    """A directory as Hugging Face has it."""
    config = {name: value for name, value in (tiny.CONFIG | changed).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    lx.write_safetensors(folder / "model.safetensors", weights)
    return folder


def test_a_directory_is_a_model(tmp_path):
    weights = tiny.weights(dtype="float32")
    model = lx.load_model(saved(tmp_path, weights))
    assert model.family == "llama"
    assert (model.path, model.config["head_dim"], model.config["tied"]) == (str(tmp_path), 4, None)
    assert set(model.weights) == set(weights)
    b = tiny.batch()
    want = outputs(tiny.model(dtype="float32"), {}, NOTHING, b, **LM)
    assert (outputs(model, {}, NOTHING, b, **LM) == want).all()
    assert repr(model.weights) == "<30 tensors, 30 held>"
    assert model.weights["lm_head.weight"] is model.weights["lm_head.weight"]
    with pytest.raises(ValueError, match="read-only"):
        model.weights["lm_head.weight"][0] = 0
    model.weights.release()
    assert repr(model.weights) == "<30 tensors, 0 held>"
    assert (outputs(model, {}, NOTHING, b, **LM) == want).all()


@pytest.mark.parametrize(
    ("kind", "tied"), [("llama", True), ("llama", False), ("qwen2", False), ("qwen3", True)]
)
def test_a_gguf_file_is_a_model(tmp_path, kind, tied):
    """The same numbers under ggml's names, in its order of rows: the same bits come out."""
    changed = {"model_type": kind, "tie_word_embeddings": tied}
    weights, arrays = tiny.weights(dtype="float32", **changed), {}
    for name, w in weights.items():
        module, _, part = name.rpartition(".")
        heads = heads_of(module, tiny.CONFIG) if kind == "llama" else None
        arrays[f"{ggml_module(module)}.{part}"] = w if heads is None else to_ggml_rows(w, heads)
    sizes = {"embedding_length": 10, "feed_forward_length": 14, "block_count": 3, "context_length": 64}
    sizes |= {"attention.head_count": 6, "attention.head_count_kv": 2, "attention.key_length": 4}
    metadata = {f"{kind}.{name}": ("uint32", n) for name, n in sizes.items()}
    metadata[f"{kind}.attention.layer_norm_rms_epsilon"] = ("float32", 1e-5)
    write_gguf(tmp_path / "m.gguf", {"general.architecture": ("string", kind), **metadata}, arrays)
    for path in (tmp_path / "m.gguf", tmp_path):
        model, b = lx.load_model(path, task="CAUSAL_LM"), tiny.batch()
        want = outputs(model_of(weights, tiny.CONFIG | changed), {}, NOTHING, b, **LM)
        assert (outputs(model, {}, NOTHING, b, **LM) == want).all()


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_weights_may_be_stored_narrow(tmp_path, stored):
    """They are widened where they are used, or when they are read."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtype = getattr(ml_dtypes, stored, stored)
    narrow = {name: w.astype(dtype) for name, w in tiny.weights(dtype="float32").items()}
    folder, b = saved(tmp_path, narrow), tiny.batch()
    model, wide = lx.load_model(folder), lx.load_model(folder, dtype="float32")
    assert model.weights["lm_head.weight"].dtype == np.dtype(dtype)
    assert wide.weights["lm_head.weight"].dtype == np.float32
    got, want = (outputs(m, {}, NOTHING, b, **LM) for m in (model, wide))
    assert got.dtype == np.float32
    assert (got == want).all()
    sites, trained, _ = tiny.start(wide, target_modules=["v_proj", "embed_tokens"])
    one, two = (loss_and_gradients(m, sites, trained, b, n=9, **LM) for m in (model, wide))
    assert one[0] == two[0]
    assert all((g == tiny.tensors(two[1])[key]).all() for key, g in tiny.tensors(one[1]).items())


def test_a_tied_head_is_the_table(tmp_path):
    """lm_head.weight is there under its name, whether the file has it or not, and is held once."""
    weights = tiny.weights(dtype="float32", tie_word_embeddings=True)
    assert "lm_head.weight" not in weights
    model = lx.load_model(saved(tmp_path, weights, tie_word_embeddings=True), **LM)
    assert model.weights["lm_head.weight"] is model.weights["model.embed_tokens.weight"]
    table = weights["model.embed_tokens.weight"]
    again = model_of({**weights, "lm_head.weight": table.copy()}, tiny.CONFIG | {"tie_word_embeddings": True})
    assert again.weights["lm_head.weight"] is again.weights["model.embed_tokens.weight"]
    with pytest.raises(lx.FormatError, match=r"expected lm_head\.weight equal to model\.embed_tokens\.weight"):
        model_of({**weights, "lm_head.weight": table + 1}, tiny.CONFIG | {"tie_word_embeddings": True})
    plan = lx.plan(model.weights, lx.LoraConfig(target_modules="all-linear"))
    assert "lm_head" not in plan.sites
    assert plan.total - plan.trainable == sum(w.size for w in weights.values())


def test_a_checkpoint_without_a_head_has_other_names():
    weights = {n.removeprefix("model."): w for n, w in tiny.weights(head=False).items()}
    model = model_of(
        {**weights, "layers.0.self_attn.rotary_emb.inv_freq": np.ones(2)}, tiny.CONFIG, path="there"
    )
    assert (model.weights["model.norm.weight"] == weights["norm.weight"]).all()
    assert set(model.weights) == set(tiny.weights(head=False))
    with pytest.raises(lx.FormatError, match=r"there: expected the tensor lm_head\.weight for CAUSAL_LM"):
        check_head(model, "CAUSAL_LM")
    with pytest.raises(lx.ConfigError, match=r"task: expected one of CAUSAL_LM, SEQ_CLS.* for llama, got 'X'"):
        check_head(model, "X")
    with pytest.raises(lx.ConfigError, match=r"task: expected a model with lm_head\.weight for CAUSAL_LM, got"):
        outputs(model, {}, NOTHING, tiny.batch(), **LM)
    with pytest.raises(lx.FormatError, match=r"expected the tensor score\.weight for SEQ_CLS"):
        model_of(weights, tiny.CONFIG, task="SEQ_CLS")


def test_a_new_head():
    """Drawn small, beside a model whose own tensors stay where they are; trained whole by its task."""
    model = tiny.model(head=False, initializer_range=0.5)
    new = with_head(model, "SEQ_CLS", 7, np.random.default_rng(0))
    assert new.weights["model.norm.weight"] is model.weights["model.norm.weight"]
    assert list(new.weights)[-1] == "score.weight"
    assert "score.weight" not in model.weights
    assert len(new.weights) == len(model.weights) + 1
    score = new.weights["score.weight"]
    assert (score.shape, score.dtype, new.config["num_labels"]) == ((7, 10), np.float64, 7)
    assert 0.3 < score.std() < 0.7
    sites, trained, _ = tiny.start(new, task_type="SEQ_CLS", target_modules=["q_proj"])
    b = tiny.batch()
    labels = np.array([3, 0, 6, 2])
    some = type(b)(b.ids, b.starts, labels, b.index)
    _, got = loss_and_gradients(new, sites, trained, some, task="SEQ_CLS", n=4)
    assert got.saved["score.weight"].shape == (7, 10)
    for bad, message in (
        ((new, "SEQ_CLS", 7), "score.weight"),
        ((model, "SEQ_CLS", 0), "labels: expected how"),
    ):
        with pytest.raises(lx.ConfigError, match=message):
            with_head(*bad, np.random.default_rng(0))


REFUSED = [
    ({"model_type": "gpt_neox"}, "model_type: expected one of llama, "),
    ({"model_type": ...}, "model_type: expected one of llama, "),
    ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
    (
        {"attention_dropout": 0.1},
        "attention_dropout: expected 0.0, since attention drops nothing here, got 0.1",
    ),
    ({"pretraining_tp": 2}, "pretraining_tp: expected 1, since no product is cut in slices, got 2"),
    ({"num_key_value_heads": 4}, "num_key_value_heads: expected a divisor of num_attention_heads=6, got 4"),
    ({"head_dim": 5}, "head_dim: expected an even number, since halves of a head turn together, got 5"),
    ({"hidden_size": ...}, "hidden_size: expected a whole number of at least 1, got None"),
    ({"num_hidden_layers": 2.5}, "num_hidden_layers: expected a whole number of at least 1, got 2.5"),
    ({"rms_norm_eps": -1}, "rms_norm_eps: expected a finite number above 0, got -1"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings: expected true or false, got 1"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: expected one of default, linear, "),
    ({"rope_scaling": {"rope_type": "gguf"}}, "rope_scaling: expected one of default, linear, "),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: expected a number"),
    ({"rope_scaling": "linear"}, "rope_parameters: expected an object, got 'linear'"),
    ({"rope_parameters": {"rope_theta": "x"}}, "rope_parameters: rope_theta: expected a finite number"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: expected 1.0"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1.0, since whole heads turn, got 0.5"),
    (
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config: expected none, since weights are ",
    ),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window: expected a whole number of at least 1"),
    (
        {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]},
        "layer_types: expected 3 of full_attention, sliding_attention, got ['full_attention']",
    ),
    (
        {"model_type": "qwen2", "use_sliding_window": True, "layer_types": [["full_attention"]] * 3},
        "layer_types: expected 3 of full_attention, sliding_attention, got [['full_attention']",
    ),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps: expected a finite number above 0, got 1000"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 10**400}}, "expected a number above 0 at 'factor'"),
    (
        {"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "max_position_embeddings": 9},
        "theta: expected a number above 1 for yarn, got 1.0",
    ),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_not_computed_is_refused(tmp_path, changed, message):
    """The file and the value, in one line."""
    with pytest.raises(lx.ConfigError) as refused:
        lx.load_model(saved(tmp_path, tiny.weights(), **changed))
    assert str(refused.value).startswith(str(tmp_path / "config.json"))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.layers.1.mlp.up_proj.weight": None},
            "expected the tensor model.layers.1.mlp.up_proj.weight : ",
        ),
        ({"model.norm.weight": np.ones(9)}, "model.norm.weight: expected (10,), set by the config, got (9,)"),
        (
            {"lm_head.weight": np.ones((13, 9))},
            "lm_head.weight: expected (13, 10), set by the config, got (13, 9)",
        ),
        (
            {"model.layers.0.self_attn.q_proj.bias": np.ones(24)},
            "does not have, got model.layers.0.self_attn.q_p",
        ),
        ({"model.layers.3.mlp.up_proj.weight": np.ones((14, 10))}, "got model.layers.3.mlp.up_proj.weight"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    weights = {name: w for name, w in (tiny.weights() | change).items() if w is not None}
    with pytest.raises(lx.FormatError, match=re.escape(message)) as refused:
        lx.load_model(saved(tmp_path, weights))
    assert str(refused.value).startswith(str(tmp_path))


def test_other_refusals(tmp_path):
    lx.write_safetensors(tmp_path / "model.safetensors", tiny.weights())
    with pytest.raises(lx.FormatError, match=r"expected a config\.json beside the weights, got none"):
        lx.load_model(tmp_path)
    with pytest.raises(lx.ConfigError, match="dtype: expected one of float32, float64, or None, got 'float16'"):
        lx.load_model(saved(tmp_path, tiny.weights()), dtype="float16")


def test_windows_and_positions():
    def config(**changed):
        return tiny.llama_settings(tiny.CONFIG | changed, "")

    assert config()["windows"] == (None,) * 3
    assert config(model_type="mistral")["windows"] == (4096,) * 3
    assert config(model_type="mistral", sliding_window=None)["windows"] == (None,) * 3
    assert config(model_type="qwen2", sliding_window=5)["windows"] == (None,) * 3
    use = {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 5}
    assert config(**use, max_window_layers=2)["windows"] == (None, None, 5)
    assert config(**use, max_window_layers=0)["windows"] == (5, 5, 5)
    assert config(**use | {"sliding_window": None}, max_window_layers=0)["windows"] == (None,) * 3  # no 4096
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert config(**use, layer_types=kinds)["windows"] == (5, None, 5)
    assert config(rope_theta=5.0)["rope_parameters"] == {"rope_type": "default", "rope_theta": 5.0}
    old = config(rope_theta=5.0, rope_scaling={"type": "linear", "factor": 2.0})["rope_parameters"]
    assert (old["rope_type"], old["rope_theta"], old["factor"]) == ("linear", 5.0, 2.0)
    yarn = config(rope_scaling={"rope_type": "yarn", "factor": 2.0}, max_position_embeddings=64)
    assert yarn["rope_parameters"]["original_max_position_embeddings"] == 64
