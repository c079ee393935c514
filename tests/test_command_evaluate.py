"""lorax-np evaluate on small directories: figures against their definitions, refusals by file and line."""

import json

import numpy as np
import pytest
import tokenizers as hf
import writers
from tokenizers import processors
from writers import BERT, LLAMA, adapter_directory, directory

import lorax_np as lx
from lorax_np import cli
from lorax_np.commands import evaluate
from lorax_np.models.adapted import with_adapter
from lorax_np.models.new_head import with_head
from lorax_np.models.records import Batch
from lorax_np.models.tasks import outputs
from lorax_np.text.tokenizer import load_tokenizer
from lorax_np.train.passes import Passes

TEXTS = "Hello", "ab é", "x", "the cat sat on the mat"
CLASSES = {"id2label": {"0": "ham", "1": "eggs", "2": "spam"}, "num_labels": 3}


@pytest.fixture(autouse=True)
def listed(monkeypatch):
    monkeypatch.setattr(cli, "COMMANDS", tuple(dict.fromkeys((*cli.COMMANDS, evaluate))))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Directories of models by task."""
    folder = tmp_path_factory.mktemp("places")
    made = {"CAUSAL_LM": directory(folder / "causal")}
    for task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"):
        more = CLASSES if task in ("SEQ_CLS", "TOKEN_CLS") else {}
        made[task] = directory(folder / task.lower(), BERT, task=task, **more)
    return made


def file_of(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture
def run(capsys):
    def go(place, data, *flags):
        code = cli.main(["evaluate", "--model", str(place), "--data", str(data), *map(str, flags)])
        return code, *capsys.readouterr()

    return go


@pytest.fixture
def figures(run):
    """What --json says."""

    def go(*given):
        code, out, err = run(*given, "--json", "--quiet")
        assert (code, err) == (0, "")
        return json.loads(out)

    return go


@pytest.fixture
def refused(run):
    def go(*given):
        code, out, err = run(*given)
        assert (code, out) == (2, "")
        assert err.splitlines()[-1].startswith("lorax-np: ")
        return err.splitlines()[-1].removeprefix("lorax-np: ")

    return go


def nll(place, texts, adapter=None):
    """Σ −log p over all tokens but the first, the end token among them, from logits of one text at a time."""
    beside, words = with_adapter(lx.load_model(place), adapter, "CAUSAL_LM"), load_tokenizer(place)
    total, count, size = 0.0, 0, 0
    for text in texts:
        ids = [*words.encode(text).ids, 0]
        batch = Batch(np.array(ids), (0, len(ids)), None, (0,))
        z = outputs(beside.model, beside.sites, beside.trained, batch, task="CAUSAL_LM").astype("float64")
        logs = z - z.max(axis=1, keepdims=True)
        logs = logs - np.log(np.exp(logs).sum(axis=1, keepdims=True))
        total -= sum(logs[t, ids[t + 1]] for t in range(len(ids) - 1))
        count, size = count + len(ids) - 1, size + len(text.encode()[1:])
    return total, count, size


@pytest.mark.parametrize("size", [1, 3, 9])
def test_the_likelihood_of_texts(places, figures, tmp_path, size):
    place, data = places["CAUSAL_LM"], file_of(tmp_path / "d.jsonl", *({"text": text} for text in TEXTS))
    found = figures(place, data, "--batch-size", size)
    total, count, nbytes = nll(place, TEXTS)
    metrics = found["metrics"]
    assert metrics["labels"] == count
    assert metrics["rows"] == 4
    for name, want in (
        ("loss", total / count),
        ("nll per token", total / count),
        ("perplexity", np.exp(total / count)),
        ("bits per byte", total / np.log(2) / nbytes),
    ):
        assert metrics[name] == pytest.approx(want, rel=1e-5)  # float32, a few hundred roundings of 1e-7
    assert (found["task"], found["data"], found["adapter"]) == ("CAUSAL_LM", str(data), None)
    assert found["tokens"] == sum(len(text.encode()) + 1 for text in TEXTS)
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["seconds"])


def test_an_adapter_is_evaluated_beside_the_base(places, figures, tmp_path):
    place, data = places["CAUSAL_LM"], file_of(tmp_path / "d.jsonl", *({"text": text} for text in TEXTS))
    adapter = adapter_directory(tmp_path / "a", lx.load_model(place))
    total, count, _ = nll(place, TEXTS, adapter)
    loss = figures(place, data, "--adapter-path", adapter)["metrics"]["loss"]
    assert loss == pytest.approx(total / count, rel=1e-5)
    assert abs(loss - figures(place, data)["metrics"]["loss"]) > 1e-3


def test_a_table_and_what_was_read(places, run, tmp_path):
    data = file_of(tmp_path / "d.jsonl", *({"text": text} for text in TEXTS))
    code, out, err = run(places["CAUSAL_LM"], data)
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == f"CAUSAL_LM on {data}"
    assert [line.rpartition("  ")[0].rstrip() for line in lines[1:]] == [
        *("loss", "rows", "labels", "nll per token", "perplexity", "bits per byte"),
        *("tokens", "seconds", "tokens/s"),
    ]
    assert "d.jsonl: 4 rows, 4 examples, 37 tokens, 33 labels" in err
    assert run(places["CAUSAL_LM"], data, "--quiet")[2] == ""


def test_prompts_are_masked_unless_asked_for(places, figures, tmp_path):
    data = file_of(tmp_path / "d.jsonl", {"prompt": "Hello", "completion": " you"})
    masked, whole = (figures(places["CAUSAL_LM"], data, *more) for more in ((), ("--no-mask-prompt",)))
    assert (masked["metrics"]["labels"], whole["metrics"]["labels"]) == (5, 9)


def test_the_split_of_a_directory(places, figures, refused, tmp_path):
    folder, place = tmp_path / "d", places["CAUSAL_LM"]
    for i, name in enumerate(("train", "valid", "test"), 1):
        file_of(folder / f"{name}.jsonl", *[{"text": "Hello"}] * i)
    assert figures(place, folder)["metrics"]["rows"] == 3
    assert figures(place, folder, "--split", "train")["metrics"]["rows"] == 1
    assert figures(place, folder, "--limit", 2)["metrics"]["rows"] == 2
    (folder / "test.jsonl").unlink()
    assert figures(place, folder)["data"] == str(folder / "valid.jsonl")
    (folder / "valid.jsonl").unlink()
    assert figures(place, folder)["metrics"]["rows"] == 1
    wanted = f"{folder}: expected test.jsonl in the directory, got train.jsonl"
    assert refused(place, folder, "--split", "test") == wanted
    assert refused(place, folder / "train.jsonl", "--split", "test") == (
        "--split: expected none for a file, got test"
    )


def test_texts_are_cut_to_the_model_s_positions(places, figures, refused, tmp_path):
    data = file_of(tmp_path / "d.jsonl", {"text": "x" * 500})
    assert figures(places["CAUSAL_LM"], data)["tokens"] == 96
    assert figures(places["CAUSAL_LM"], data, "--max-seq-length", 20)["tokens"] == 20
    wanted = f"{data}:1: expected at most 96 tokens, as many as the model has positions for, got 120"
    assert refused(places["CAUSAL_LM"], data, "--max-seq-length", 120).startswith(wanted)


# ---- tasks with heads --------------------------------------------------------------------------------------


def test_classes_by_their_names(places, figures, tmp_path):
    """Rows labelled with what the model says are all right; with others, none."""
    place = places["SEQ_CLS"]
    model, words = lx.load_model(place, task="SEQ_CLS"), load_tokenizer(place)
    names, rows = list(CLASSES["id2label"].values()), []
    for text in TEXTS:
        ids = words.encode(text).ids
        batch = Batch(np.array(ids), (0, len(ids)), None, (0,), types=np.zeros(len(ids), "int64"))
        z = outputs(model, {}, writers.Trained({}, {}), batch, task="SEQ_CLS")
        rows.append({"text": text, "label": names[int(z[0].argmax())]})
    right = figures(place, file_of(tmp_path / "r.jsonl", *rows), "--task", "seq-cls")["metrics"]
    assert (right["accuracy"], right["macro F1"]) == (1.0, 1.0)
    for row in rows:
        row["label"] = names[(names.index(row["label"]) + 1) % 3]
    wrong = figures(place, file_of(tmp_path / "w.jsonl", *rows), "--task", "seq-cls")["metrics"]
    assert wrong["accuracy"] == 0.0
    assert wrong["loss"] > right["loss"]


@pytest.mark.parametrize(
    ("task", "row", "scores"),
    [
        ("token-cls", {"tokens": ["a", "b"], "tags": ["ham", "spam"]}, {"accuracy", "macro F1"}),
        (
            "question-ans",
            {"question": "where", "context": "in Paris", "answer": {"text": "Paris", "start": 3}},
            {"exact match", "token F1"},
        ),
        ("feature-extraction", {"text": "a", "text_pair": "b"}, {"recall@1"}),
        ("feature-extraction", {"text": "ab", "text_pair": "b", "score": 0.5}, {"recall@1", "Spearman"}),
    ],
)
def test_every_task_has_its_scores(places, figures, tmp_path, task, row, scores):
    name = {"token-cls": "TOKEN_CLS", "question-ans": "QUESTION_ANS"}.get(task, "FEATURE_EXTRACTION")
    data = file_of(tmp_path / "d.jsonl", row, row, row)
    found = figures(places[name], data, "--task", task)
    assert set(found["metrics"]) >= {"loss", "rows", "labels", *scores}
    assert found["metrics"]["rows"] == 3


def test_a_head_that_the_adapter_brings(places, run, figures, tmp_path):
    """Of a base without one; classes are those beside the adapter, else they are numbered."""
    place = places["CAUSAL_LM"]
    base = with_head(lx.load_model(place), "SEQ_CLS", 3, np.random.default_rng(3))
    found, _, config = writers.adapted(base, task_type="SEQ_CLS", modules_to_save=["score"])
    adapter, score = tmp_path / "a", base.weights["score.weight"]
    lx.save_adapter(adapter, found.adapters, config, saved={"score.weight": score})
    data = file_of(tmp_path / "d.jsonl", {"text": "a", "label": 0}, {"text": "b", "label": 2})
    flags = "--task", "seq-cls", "--adapter-path", adapter
    numbered = figures(place, data, *flags)["metrics"]
    labels = {"id2label": {"0": "x", "1": "y", "2": "z"}}
    (adapter / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
    named = file_of(tmp_path / "n.jsonl", {"text": "a", "label": "x"}, {"text": "b", "label": "z"})
    assert figures(place, named, *flags)["metrics"] == numbered
    beside = with_adapter(lx.load_model(place), adapter, "SEQ_CLS")
    assert beside.trained.saved["score.weight"].tolist() == score.tolist()


def test_half_a_head_that_the_adapter_brings(places, tmp_path):
    """A pooler below a classifier that the base has, which says how many classes there are."""
    whole = lx.load_model(places["SEQ_CLS"])
    weights = {name: np.array(value) for name, value in whole.weights.items() if "pooler" not in name}
    place = directory(tmp_path / "bare", BERT, task="SEQ_CLS")
    lx.write_safetensors(place / "model.safetensors", weights)
    found, _, config = writers.adapted(
        whole, targets=["query"], task_type="SEQ_CLS", modules_to_save=["classifier", "pooler"]
    )
    names = [name for name in whole.weights if "pooler" in name or "classifier" in name]
    assert len(names) == 4
    lx.save_adapter(tmp_path / "a", found.adapters, config, saved={name: whole.weights[name] for name in names})
    batch = Batch(np.array([3, 5, 4]), (0, 2, 3), None, (0, 1))
    bare, full = (
        with_adapter(lx.load_model(at), tmp_path / "a", "SEQ_CLS") for at in (place, places["SEQ_CLS"])
    )
    one, other = (outputs(b.model, b.sites, b.trained, batch, task="SEQ_CLS") for b in (bare, full))
    assert one.shape == (2, 3)
    assert np.array_equal(one, other)


def test_numbers_that_are_no_loss_end_with_1(places, run, tmp_path, monkeypatch):
    monkeypatch.setattr(Passes, "loss", lambda *_, **__: float("nan"))
    data = file_of(tmp_path / "d.jsonl", {"text": "Hello"})
    code, out, _ = run(places["CAUSAL_LM"], data, "--json")
    assert code == 1
    assert json.loads(out)["metrics"]["loss"] is None


# ---- refusals ----------------------------------------------------------------------------------------------


def test_rows_are_refused_by_file_and_line(places, refused, tmp_path):
    causal, classes = places["CAUSAL_LM"], places["SEQ_CLS"]
    bad = file_of(tmp_path / "bad.jsonl", {"text": "a"}, '{"text": \n')
    assert refused(causal, bad).startswith(f"{bad}:2: expected one JSON object on the line")
    keys = file_of(tmp_path / "keys.jsonl", {"txt": "a"})
    assert refused(causal, keys).startswith(f"{keys}:1: expected the keys of one format, {{text}} or")
    unknown = file_of(tmp_path / "u.jsonl", {"text": "a", "label": "ham"}, {"text": "a", "label": "jam"})
    assert refused(classes, unknown, "--task", "seq-cls") == (
        f"{unknown}:2: label: expected one of ham, eggs, spam, got 'jam'"
    )
    empty = file_of(tmp_path / "empty.jsonl", "\n")
    assert refused(causal, empty) == f"{empty}: expected at least one row, got none"
    assert "No such file" in refused(causal, tmp_path / "none.jsonl")


def test_what_does_not_fit_is_refused(places, refused, tmp_path):
    causal, data = places["CAUSAL_LM"], file_of(tmp_path / "d.jsonl", {"text": "a", "label": 1})
    assert refused(causal, data, "--task", "sql").startswith("task: expected one of causal-lm, seq-cls")
    assert "score.weight for SEQ_CLS, got none" in refused(causal, data, "--task", "seq-cls")
    assert "expected one of" in refused(places["SEQ_CLS"], data)
    assert refused(causal, data, "--limit", 0) == "--limit: expected at least 1, got 0"
    assert refused(causal, data, "--batch-size", 0) == "--batch-size: expected at least 1, got 0"
    assert refused(causal, data, "--max-seq-length", 3) == "--max-seq-length: expected at least 8, got 3"
    assert refused(causal, data, "--max-seq-length", 0) == "--max-seq-length: expected at least 8, got 0"
    other = adapter_directory(tmp_path / "a", lx.load_model(causal), task_type="CAUSAL_LM")
    assert refused(causal, data, "--task", "seq-cls", "--adapter-path", other) == (
        f"{other}: task_type: expected SEQ_CLS, got CAUSAL_LM"
    )
    free = adapter_directory(tmp_path / "free", lx.load_model(causal))
    assert refused(causal, data, "--task", "seq-cls", "--adapter-path", free) == (
        f"{free}: expected a model or an adapter with score.weight, the head of SEQ_CLS, got neither"
    )
    two = {"id2label": {"0": "x", "1": "y"}}
    folder = directory(tmp_path / "two", BERT, task="SEQ_CLS", **two)
    assert refused(folder, data, "--task", "seq-cls") == (
        "id2label: expected 3 classes, the outputs of the head, got 2"
    )


def test_what_training_says_at_its_end_is_what_is_evaluated(places, figures, capsys, tmp_path):
    """A new head, classes by name, and adapters, all from the directory that training left."""
    place, folder = places["CAUSAL_LM"], tmp_path / "data"
    rows = [{"text": text, "label": ("short", "long")[len(text) > 4]} for text in TEXTS]
    for name in ("train", "valid"):
        file_of(folder / f"{name}.jsonl", *rows)
    given = {"model": place, "data": folder, "task": "seq-cls", "adapter-path": tmp_path / "out", "iters": 2}
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    assert cli.main(["train", *flags, "--r", "2", "--json", "-", "--learning-rate", "0.01"]) == 0
    after = json.loads(capsys.readouterr().out)["after"]
    found = figures(place, folder, "--task", "seq-cls", "--adapter-path", tmp_path / "out")
    assert found["data"] == str(folder / "valid.jsonl")
    for name, value in found["metrics"].items():
        assert value == pytest.approx(after[name], rel=1e-5), name


def test_a_tokenizers_types_are_not_for_a_model_that_has_none(figures, tmp_path):
    """A llama's tokenizer counts a second text as type 1, which no llama reads."""
    place = directory(tmp_path / "llama", LLAMA, task="SEQ_CLS", **CLASSES)
    words = hf.Tokenizer.from_file(str(place / "tokenizer.json"))
    words.post_processor = processors.TemplateProcessing(single="$A", pair="$A:0 $B:1", special_tokens=[])
    words.save(str(place / "tokenizer.json"))
    assert load_tokenizer(place).template.typed
    two = file_of(tmp_path / "two.jsonl", {"text": "Hel", "text_pair": "lo", "label": "eggs"})
    one = file_of(tmp_path / "one.jsonl", {"text": "Hello", "label": "eggs"})
    found = [figures(place, data, "--task", "seq-cls")["metrics"]["loss"] for data in (two, one)]
    assert found[0] == found[1]
