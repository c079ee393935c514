"""Llamas here against transformers with PEFT, in float64: losses, logits, and every gradient."""

from dataclasses import replace

import numpy as np
import pytest

from lorax_np.models.records import Dropout, Trained
from lorax_np.models.tasks import count, loss, loss_and_gradients, outputs
from tests.parity import llama_oracle as oracle

pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore:.*:UserWarning:peft")]

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTHS = 7, 1, 12, 5
CLOSE = 1e-12  # of each tensor's largest entry
LORA = {"r": 3, "lora_alpha": 5, "target_modules": ALL}

CASES = {
    "llama": ({}, LORA),
    "tied": ({"tie_word_embeddings": True}, LORA),
    "biases": ({"attention_bias": True, "mlp_bias": True}, LORA | {"bias": "all"}),
    "biases of sites": ({"attention_bias": True}, LORA | {"bias": "lora_only", "target_modules": ["v_proj"]}),
    "dora": ({}, LORA | {"use_dora": True}),
    "rslora, bias of B": ({}, LORA | {"use_rslora": True, "lora_bias": True}),
    "head whole": ({}, LORA | {"modules_to_save": ["lm_head"]}),
    "tied head whole": ({"tie_word_embeddings": True}, LORA | {"modules_to_save": ["lm_head"]}),
    "norms and table whole": (
        {},
        LORA | {"modules_to_save": ["embed_tokens", "input_layernorm", "model.norm"]},
    ),
    "tied table whole": ({"tie_word_embeddings": True}, LORA | {"modules_to_save": ["embed_tokens"]}),
    "adapted head and table": ({}, LORA | {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "adapted tied head": ({"tie_word_embeddings": True}, LORA | {"target_modules": ["lm_head", "up_proj"]}),
    "last layer": ({}, LORA | {"layers_to_transform": [2], "layers_pattern": "layers"}),
    "rows": ({}, LORA | {"trainable_token_indices": [2, 5, 11]}),
    "rows, tied": ({"tie_word_embeddings": True}, LORA | {"trainable_token_indices": [2, 5, 11]}),
    "padding": ({"pad_token_id": 5}, LORA | {"modules_to_save": ["embed_tokens"]}),
    "padding, tied": (
        {"pad_token_id": 5, "tie_word_embeddings": True},
        LORA | {"modules_to_save": ["embed_tokens"]},
    ),
    "padding, adapted table": ({"pad_token_id": 5}, LORA | {"target_modules": ["q_proj", "embed_tokens"]}),
    "padding, rows": ({"pad_token_id": 5}, LORA | {"trainable_token_indices": [5, 8, 18]}),
    "padding, rows, tied": (
        {"pad_token_id": 5, "tie_word_embeddings": True},
        LORA | {"trainable_token_indices": [5, 8, 18]},
    ),
    "mistral": ({"kind": "mistral", "sliding_window": 4}, LORA),
    "qwen2": ({"kind": "qwen2"}, LORA | {"bias": "all"}),
    "qwen2, windows": (
        {"kind": "qwen2", "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
        LORA,
    ),
    "qwen3": ({"kind": "qwen3"}, LORA | {"modules_to_save": ["q_norm", "k_norm"]}),
}


def run(model, folder, b, options, **how):
    """Loss and gradients here, of what PEFT saved."""
    sites, trained = oracle.trained(folder)
    rows = options.get("trainable_token_indices")
    tokens = {"model.embed_tokens": rows} if rows else None
    n = count("CAUSAL_LM", b.labels)
    return loss_and_gradients(model, sites, trained, b, task="CAUSAL_LM", n=n, tokens=tokens, **how)


@pytest.mark.parametrize("name", CASES)
def test_every_gradient_is_pefts(tmp_path, name):
    changed, options = CASES[name]
    theirs = oracle.tiny(**changed)
    model = oracle.ours(theirs)
    theirs = oracle.adapted(theirs, tmp_path, **options, task_type="CAUSAL_LM")
    b = oracle.batch(LENGTHS, 29)
    n = count("CAUSAL_LM", b.labels)
    want = oracle.causal(theirs, b, n)
    want.backward()
    got, gradients = run(model, tmp_path, b, options, engine="reference")
    assert abs(float(got) / want.item() - 1) <= 1e-14
    worst(name, gradients, theirs, CLOSE)


@pytest.mark.parametrize("name", ["tied", "dora", "qwen3", "adapted head and table"])
def test_every_gradient_is_pefts_under_its_masks(tmp_path, name):
    """Masks are by site and by the sequence's number in the step; a pass computed again has the same."""
    changed, options = CASES[name]
    theirs = oracle.tiny(**changed)
    model = oracle.ours(theirs)
    theirs = oracle.adapted(theirs, tmp_path, **options, lora_dropout=0.3)
    b = oracle.batch(LENGTHS, 29)
    oracle.put_masks(theirs, b, oracle.trained(tmp_path)[0], seed=4, step=9)
    want = oracle.causal(theirs, b, count("CAUSAL_LM", b.labels))
    want.backward()
    for engine in ("reference", "fast"):
        for checkpoint in (False, True):
            how = {"engine": engine, "checkpoint": checkpoint, "dropout": Dropout(4, 9)}
            got, gradients = run(model, tmp_path, b, options, **how)
            assert abs(float(got) / want.item() - 1) <= 1e-13
            worst(f"{name}, {engine}, {checkpoint}", gradients, theirs, CLOSE)
    got, gradients = run(model, tmp_path, b, options, engine="reference", dropout=Dropout(4, 8))
    with pytest.raises(AssertionError):  # the masks of another step
        worst("another step", gradients, theirs, 0.01)


def worst(name, gradients, theirs, close):
    far = oracle.same(gradients, oracle.gradients(theirs))
    at = max(far, key=far.get)
    print(f"{name}: {len(far)} tensors, worst {far[at]:.1e} at {at}")
    assert far[at] <= close, at


def test_logits_and_losses_are_pefts(tmp_path):
    """outputs and loss, which keep nothing, say what loss_and_gradients and PEFT say."""
    changed, options = CASES["adapted head and table"]
    theirs = oracle.tiny(**changed)
    model = oracle.ours(theirs)
    theirs = oracle.adapted(theirs, tmp_path, **options)
    b, (sites, trained) = oracle.batch(LENGTHS, 29), oracle.trained(tmp_path)
    want = oracle.logits(theirs, b).detach().numpy()
    for engine in ("reference", "fast"):
        got = outputs(model, sites, trained, b, task="CAUSAL_LM", engine=engine)
        assert np.abs(got - want).max() <= 1e-13 * np.abs(want).max()
        one = loss(model, sites, trained, b, task="CAUSAL_LM", n=7, engine=engine)
        assert abs(float(one) / oracle.causal(theirs, b, 7).item() - 1) <= 1e-14


@pytest.mark.parametrize("kind", ["classes", "several classes", "a number"])
def test_classes_of_sequences_are_pefts(tmp_path, kind):
    """SEQ_CLS of a decoder: `score`, which trains whole, at each sequence's last token."""
    C = 1 if kind == "a number" else 3
    theirs = oracle.tiny(head="ForSequenceClassification", num_labels=C, pad_token_id=0)
    model = oracle.ours(theirs, task="SEQ_CLS")
    theirs = oracle.adapted(theirs, tmp_path, **LORA, task_type="SEQ_CLS")
    b, rng = oracle.batch(LENGTHS, 29), np.random.default_rng(3)
    b = replace(b, ids=np.where(b.ids == 0, 1, b.ids), labels={
        "classes": np.array([2, 0, -100, 1]), "several classes": rng.random((4, C)), "a number": rng.random(4)
    }[kind])  # fmt: skip
    n = count("SEQ_CLS", b.labels)
    assert n == {"classes": 3, "several classes": 12, "a number": 4}[kind]
    p, y = oracle.Padded.of(b), oracle.torch.from_numpy(b.labels)
    z = theirs(input_ids=p.ids, attention_mask=p.mask).logits
    F = oracle.torch.nn.functional
    want = {
        "classes": lambda: F.cross_entropy(z, y, ignore_index=-100),
        "several classes": lambda: F.binary_cross_entropy_with_logits(z, y),
        "a number": lambda: F.mse_loss(z[:, 0], y),
    }[kind]()
    want.backward()
    sites, trained = oracle.trained(tmp_path)
    assert list(trained.saved) == ["score.weight"]
    got, gradients = loss_and_gradients(model, sites, trained, b, task="SEQ_CLS", n=n, engine="reference")
    assert abs(float(got) / want.item() - 1) <= 1e-13
    worst(kind, gradients, theirs, CLOSE)
    mine = outputs(model, sites, trained, b, task="SEQ_CLS")
    assert np.abs(mine - z.detach().numpy()).max() <= 1e-13 * np.abs(mine).max()
    assert float(loss(model, sites, trained, b, task="SEQ_CLS", n=n)) == pytest.approx(want.item(), rel=1e-13)


def test_classes_of_tokens_are_pefts(tmp_path):
    """TOKEN_CLS: `score` and its bias, which train whole, at every token."""
    theirs = oracle.tiny(head="ForTokenClassification", num_labels=5)
    model = oracle.ours(theirs, task="TOKEN_CLS")
    theirs = oracle.adapted(theirs, tmp_path, **LORA, task_type="TOKEN_CLS")
    b = oracle.batch(LENGTHS, 29)
    b = replace(b, labels=np.where(b.labels < 0, -100, b.labels % 5))
    n = count("TOKEN_CLS", b.labels)
    want = oracle.causal(theirs, b, n)
    want.backward()
    sites, trained = oracle.trained(tmp_path)
    assert set(trained.saved) == {"score.weight", "score.bias"}
    got, gradients = loss_and_gradients(model, sites, trained, b, task="TOKEN_CLS", n=n)
    assert abs(float(got) / want.item() - 1) <= 1e-14
    worst("classes of tokens", gradients, theirs, CLOSE)


def test_the_oracle_is_float64(tmp_path):
    """Left as it is, transformers rounds to float32 on the way: then agreement ends a million times sooner."""
    theirs = oracle.tiny()
    model = oracle.ours(theirs)
    b, n = oracle.batch(LENGTHS, 29), 5
    want = oracle.causal(theirs, b, n).item()  # its norms and positions not replaced
    exact = oracle.causal(oracle.exact(theirs), b, n).item()
    got = float(loss(model, {}, Trained({}, {}), b, task="CAUSAL_LM", n=n))
    assert abs(got / exact - 1) <= 1e-14
    assert abs(got / want - 1) > 1e-9


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_scaled_positions_are_those_of_transformers(rope):
    """In float32 as there: every position scaled as the config says, to logits."""
    changed = {"head_dim": 8, "max_position_embeddings": 128}
    theirs = oracle.tiny(rope_parameters={"rope_theta": 500.0, **rope}, **changed)
    model = oracle.ours(theirs)
    b = oracle.batch((40, 3), 29)
    want = oracle.logits(theirs, b).detach().numpy()
    got = outputs(model, {}, Trained({}, {}), b, task="CAUSAL_LM")
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()
    plain = oracle.ours(oracle.tiny(rope_parameters={"rope_theta": 500.0, "rope_type": "default"}, **changed))
    other = outputs(plain, {}, Trained({}, {}), b, task="CAUSAL_LM")
    assert np.abs(other - want).max() > 0.01 * np.abs(want).max()
