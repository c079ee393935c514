"""lorax-np train on a model directory: what it prints, what it writes, how it is refused, how it goes on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers as hf
from often import one_in
from small_run import CONFIG, weights
from tokenizers import models, pre_tokenizers, processors

import lorax_np as lx
from lorax_np.cli import main
from lorax_np.models.families import FAMILIES
from lorax_np.train import lines, output
from lorax_np.train.log import records

SENTENCE = "the cat sat on a mat and then it ran to see who was there now again"
WORDS = SENTENCE.split()


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(output, "picture", lambda rows: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model's directory, its tokenizer, and rows."""
    folder = tmp_path_factory.mktemp("model")
    lx.write_safetensors(folder / "model.safetensors", weights())
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[END]", *WORDS])}
    assert len(vocabulary) <= CONFIG["vocab_size"]
    (folder / "config.json").write_text(json.dumps(CONFIG))
    made = hf.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["[END]"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[END]", "unk_token": "[UNK]"}))
    rng = np.random.default_rng(0)
    for name, count in (("train", 20), ("valid", 5)):
        rows = []
        for _ in range(count):
            at = int(rng.integers(0, 8))
            rows.append(
                {"prompt": " ".join(WORDS[at : at + 2]), "completion": " " + " ".join(WORDS[at + 2 : at + 6])}
            )
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def flags(place, out, *more):
    given = [
        "--model",
        place,
        "--data",
        place,
        "--adapter-path",
        out,
        "--iters",
        4,
        "--batch-size",
        2,
        "--r",
        3,
    ]
    return ["train", *map(str, [*given, "--max-seq-length", 16, "--seed", 5, "--steps-per-report", 2, *more])]


def test_a_run_from_beginning_to_end(place, tmp_path, capsys):
    out = tmp_path / "run"
    more = [
        "--learning-rate",
        "1e-2",
        "--lora-alpha",
        "5",
        "--steps-per-eval",
        "2",
        "--target-modules",
        "q_proj,down_proj",
    ]
    assert main(flags(place, out, *more)) == 0
    said = capsys.readouterr().out
    for line in (
        "trainable params: ",
        "train: train.jsonl: 20 rows",
        "valid: valid.jsonl: 5 rows",
        "first example",
        "down_proj  2      20 → 12  r 3, s 1.667, p 0.05",
        "eval at step 0, 5 rows of valid: loss ",
        "step 2/4  loss ",
        "eval at step 2",
        "step 4/4  loss ",
        "perplexity: ",
        f"saved at {out}",
        "next: lorax-np evaluate",
    ):
        assert line in said, line
    names = {path.name for path in out.iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "loss.csv",
        "metrics.jsonl",
        "run.json",
        "state",
    }
    found = records(out / "metrics.jsonl")
    assert [(r["event"], r["step"]) for r in found] == [
        ("start", 0),
        ("eval", 0),
        ("train", 2),
        ("eval", 2),
        ("train", 4),
        ("eval", 4),
    ]
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (3, 5, "CAUSAL_LM")
    assert config["base_model_name_or_path"] == str(place)
    files = lx.load_adapter(out, weights=lx.load_model(place).weights)
    assert any(np.any(np.asarray(adapter.B) != 0) for adapter in files.adapters.values())
    card = (out / "README.md").read_text()
    for line in (
        "## Base and data",
        "## Before and after",
        "| lorax-np | ",
        "| learning_rate | 0.01 |",
        "as typed",
    ):
        assert line in card, line
    assert (out / "loss.csv").read_text().splitlines()[
        0
    ] == "step,train_loss,valid_loss,lr,grad_norm,tokens_per_second"
    with pytest.raises(SystemExit):
        main(flags(place, out, "--rank", "3"))
    assert main(flags(place, out)) == 2
    assert "expected a new directory, or resume, got one with state in it" in capsys.readouterr().err


def test_a_config_file_and_json(place, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {place}\ndata: {place}/train.jsonl\niters: 2\nr: 2\nmax_seq_length: 16\nlora_dropout: 0\n"
    )
    out = tmp_path / "run"
    assert main(["train", "-c", str(file), "--adapter-path", str(out), "--r", "4", "--json", "-"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (found["ended"], found["step"]) == ("done", 2)
    assert set(found["before"]) == set(found["after"]) >= {"loss", "perplexity"}
    assert "step 2/2" in said.err
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4
    file.write_text("modle: x\n")
    assert main(["train", "-c", str(file)]) == 2
    assert f"{file}: expected a known name, got 'modle' (did you mean 'model'?)" in capsys.readouterr().err


def test_a_run_goes_on_without_being_told_again(place, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["--quiet", "--save-every", "2", "--iters"]
    assert main(flags(place, whole, *more, "6")) == 0
    assert main(flags(place, parts, *more, "4")) == 0
    assert main(["train", "--resume", "--adapter-path", str(parts), "--quiet", "--iters", "6"]) == 0
    assert capsys.readouterr().out == ""
    losses = [
        [r["loss"] for r in records(run / "metrics.jsonl") if r["event"] == "train"] for run in (whole, parts)
    ]
    assert losses[0][0] == losses[1][0]  # the schedule is another, the masks and the order are not
    assert len(losses[1]) == 3
    assert main(["train", "--resume", "--adapter-path", str(parts), "--r", "5"]) == 2
    assert "r: expected 3, as the run began, got 5" in capsys.readouterr().err
    assert main(["train", "--resume", "--adapter-path", str(tmp_path / "nowhere")]) == 2
    assert "--resume: expected the directory of a run as --adapter-path" in capsys.readouterr().err


def test_kernels_that_are_narrower_than_the_processor_are_noted(place, tmp_path, capsys, monkeypatch):
    """In lines that a terminal has room for; where there is nothing to say, nothing is said."""
    for advice in (
        "kernels for Haswell on a processor with AVX-512: OPENBLAS_CORETYPE=SkylakeX takes wider ones",
        "",
    ):
        monkeypatch.setattr(lines, "engine", lambda advice=advice: SimpleNamespace(advice=advice))
        assert main(flags(place, tmp_path / "never", "--dry-run")) == 0
        said = capsys.readouterr().out.splitlines()
        at = [i for i, line in enumerate(said) if line.startswith("note: products are by kernels")]
        assert len(at) == bool(advice)
        for i in at:
            assert max(len(said[i]), len(said[i + 1])) <= 80
            assert f"{said[i]} {said[i + 1].strip()}" == f"note: products are by {advice}"


def test_an_adapter_is_trained_on(place, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(flags(place, first, "--quiet", "--use-rslora")) == 0
    assert main(flags(place, second, "--resume-adapter-file", first)) == 0
    said = capsys.readouterr().out
    before, after = (
        next(r["loss"] for r in records(run / "metrics.jsonl")[::step] if r["event"] == "eval")
        for run, step in ((second, 1), (first, -1))
    )
    assert before == after
    assert "note: r, α and targets are those of the adapter to train on" in said
    assert json.loads((second / "adapter_config.json").read_text())["use_rslora"] is True


@pytest.mark.parametrize(
    "more", one_in(2, [["--quantize", "nf4", "--init-lora-weights", "loftq"], ["--quantize", "int8"]])
)
def test_a_base_in_few_bits(place, tmp_path, capsys, more):
    """It trains beside the numbers that the codes stand for; the same again gives the same bytes."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(flags(place, whole, *more, "--learning-rate", "1e-2", "--save-every", "2")) == 0
    said = capsys.readouterr().out
    assert f"note: linear layers of the base as {more[1]}: " in said
    losses = [r["loss"] for r in records(whole / "metrics.jsonl") if r["event"] == "eval"]
    assert losses[-1] < losses[0]
    assert main(flags(place, parts, *more, "--learning-rate", "1e-2", "--save-every", "2", "--quiet")) == 0
    for name in ("adapter_model.safetensors", "state/step-4/tensors.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()


@pytest.mark.parametrize("more", [["--dry-run"], ["--iters", "1"]], ids=["dry", "wet"])
@pytest.mark.parametrize("dora", [True, False])
def test_which_pass_computes_it_is_said_once_and_why(place, tmp_path, capsys, more, dora):
    flag = ["--use-dora"] if dora else []
    assert (
        main(
            flags(place, tmp_path / "run", "--workers", "1", "--target-modules", "q_proj,o_proj", *more, *flag)
        )
        == 0
    )
    said = " ".join(capsys.readouterr().out.split())
    why = "general pass, engine fast, since model.layers.0.self_attn.q_proj: m: expected no magnitude in"
    assert said.count(why if dora else "planned Llama pass, workers 1") == 1
    assert said.count("general pass") == dora


def test_a_dry_run_writes_nothing(place, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(flags(place, out, "--dry-run")) == 0
    said = capsys.readouterr().out
    assert "trainable params" in said
    assert not out.exists()
    about = said[said.index("expected: ") :].splitlines()
    assert max(map(len, about)) <= 80  # the width of a terminal
    parts = [line.split()[0] for line in about if line.startswith("  ")]
    assert {"base", "activations", "logits", "gradients", "optimiser"} <= set(parts)


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (["--model", "nowhere"], "nowhere"),
        (["--iters", "0"], "iters: expected an int of at least 1"),
        (["--task", "causal"], "task: expected one of causal-lm"),
        (["--task", "question-ans"], "task: expected one of CAUSAL_LM, SEQ_CLS"),
        (["--num-layers", "9"], "num_layers: expected 1 to 2, the model's layers, got 9"),
        (
            ["--num-layers", "1", "--layers-to-transform", "0"],
            "num_layers: expected None beside layers_to_transform",
        ),
        (["--target-modules", "q_prj"], "target_modules"),
        (
            ["--quantize", "nf5"],
            "got 'nf5' (did you mean 'nf4'?)",
        ),
    ],
)
def test_refusals_are_one_line(place, tmp_path, capsys, more, wanted):
    out = tmp_path / "run"
    assert main(flags(place, out, *more)) == 2
    said = capsys.readouterr()
    line = said.err.strip().splitlines()
    assert len(line) == 1, said.err
    assert line[0].startswith("lorax-np: ")
    assert wanted in line[0]
    assert not out.exists()


def test_an_unknown_flag_is_refused_with_the_nearest(place, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--learnin-rate", "1"])
    assert ended.value.code == 2
    assert "--learnin-rate: expected a known flag (did you mean '--learning-rate'?)" in capsys.readouterr().err


def test_a_row_that_is_damaged_is_named(place, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the cat"}\n{"text": 3}\n')
    assert main(flags(place, tmp_path / "run", "--data", rows)) == 2
    assert f"{rows}:2" in capsys.readouterr().err


def test_classes_get_a_head(place, tmp_path, capsys):
    rows = [{"text": " ".join(WORDS[i : i + 3]), "label": "end" if i > 6 else "begin"} for i in range(12)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    more = [
        "--data",
        data,
        "--task",
        "seq-cls",
        "--iters",
        "12",
        "--learning-rate",
        "0.02",
        "--lora-dropout",
        "0",
    ]
    assert main(flags(place, out, *more)) == 0
    said = capsys.readouterr().out
    assert "note: a new head for SEQ_CLS, 2 outputs" in said
    assert "accuracy: " in said
    assert json.loads((out / "labels.json").read_text())["label2id"] == {"begin": 0, "end": 1}
    files = lx.load_adapter(out)
    assert "score.weight" in files.saved
    found = [r for r in records(out / "metrics.jsonl") if r["event"] == "eval"]
    assert found[-1]["loss"] < found[0]["loss"]


def test_a_pooler_that_a_task_does_not_read_gets_no_adapter(place, tmp_path, capsys):
    """all-linear is all that the task computes: of a BERT for sentence vectors, not its pooler."""
    config = {"model_type": "bert", "vocab_size": CONFIG["vocab_size"], "hidden_size": 12}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 20}
    bert, rng = FAMILIES["bert"], np.random.default_rng(0)
    shapes = bert.shapes(bert.settings(config, "config"))
    shapes |= {"bert.pooler.dense.weight": (12, 12), "bert.pooler.dense.bias": (12,)}
    folder = tmp_path / "bert"
    folder.mkdir()
    drawn = {name: rng.standard_normal(shape).astype("float32") for name, shape in shapes.items()}
    lx.write_safetensors(folder / "model.safetensors", drawn)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((place / name).read_bytes())
    rows = [{"text": WORDS[i], "text_pair": " ".join(WORDS[i + 1 : i + 3])} for i in range(8)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--model", folder, "--data", data, "--task", "feature-extraction"]
    assert main(flags(place, tmp_path / "run", *more)) == 0
    assert "recall@1: " in capsys.readouterr().out
    sites = lx.load_adapter(tmp_path / "run").sites
    assert not any("pooler" in site for site in sites)
    assert "encoder.layer.0.output.dense" in sites  # as it is called in the encoder alone, which PEFT then has
    again = ["evaluate", "--batch-size", 2, "--model", folder, "--data", data, "--task", "feature-extraction"]
    assert main([*map(str, again), "--adapter-path", str(tmp_path / "run"), "--json", "-"]) == 0
    found = [r for r in records(tmp_path / "run" / "metrics.jsonl") if r["event"] == "eval"]
    told = json.loads(capsys.readouterr().out)["metrics"]
    assert found[-1]["loss"] != found[0]["loss"]
    assert abs(told["loss"] - found[-1]["loss"]) < 1e-6


def test_ctrl_c_ends_with_130(place, tmp_path):
    out = tmp_path / "run"
    argv = [
        sys.executable,
        "-m",
        "lorax_np",
        *flags(place, out, "--iters", "100000", "--steps-per-report", "1"),
    ]
    child = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    for line in child.stdout:
        if line.startswith("step 3/"):
            child.send_signal(signal.SIGINT)
            break
    rest, _ = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "stopped after step" in rest
    assert "next: lorax-np train --resume" in rest
    last = int(rest.split("stopped after step ")[1].split(",")[0])
    assert (out / "state" / "latest").read_text() == f"step-{last}\n"
    assert time.time() - (out / "adapter_model.safetensors").stat().st_mtime < 60


@pytest.mark.parametrize(
    "how",
    one_in(2, [["--quantize", "int8"], ["--quantize", "nf4", "--init-lora-weights", "loftq"]]),
    ids=["int8", "loftq"],
)
def test_what_was_trained_on_few_bits_is_judged_and_trained_on_there(place, tmp_path, capsys, how):
    """evaluate --quantize gives the run's last figure, and a run on the same adapter begins at it."""
    out, rows, q = tmp_path / "a", place / "valid.jsonl", how[:2]
    assert main(flags(place, out, *how, "--learning-rate", "1e-2", "--quiet")) == 0
    last = records(out / "metrics.jsonl")[-1]
    assert last["event"] == "eval"
    capsys.readouterr()
    asked = [
        "evaluate",
        "--model",
        str(place),
        "--data",
        str(rows),
        "--adapter-path",
        str(out),
        "--json",
        "--quiet",
    ]
    assert main([*asked, *q]) == 0
    loss = json.loads(capsys.readouterr().out)["metrics"]["loss"]
    assert loss == pytest.approx(last["loss"], rel=1e-6)
    assert main(asked) == 0
    plain = json.loads(capsys.readouterr().out)["metrics"]["loss"]
    assert (abs(plain - loss) > 1e-6 * loss) == ("loftq" not in how)  # LoftQ's rest lies beside its adapter
    more = "--resume-adapter-file", str(out), *q, "--quiet"
    assert main(flags(place, tmp_path / "b", *more)) == 0
    first = records(tmp_path / "b" / "metrics.jsonl")[1]
    assert first["event"] == "eval"
    assert first["loss"] == pytest.approx(loss, rel=1e-6)
    capsys.readouterr()
    asked = [
        "generate",
        "--model",
        str(place),
        "--prompt",
        "the cat",
        "--adapter-path",
        str(out),
        "--max-tokens",
        "3",
    ]
    assert main([*asked, "--quiet", *q]) == 0
    assert capsys.readouterr().out.strip()


def test_a_tokenizers_types_are_not_trained_on_where_a_model_has_none(place, tmp_path):
    """A llama's tokenizer counts a second text as type 1, which no llama reads."""
    folder = tmp_path / "llama"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer_config.json"):
        (folder / name).write_bytes((place / name).read_bytes())
    words = hf.Tokenizer.from_file(str(place / "tokenizer.json"))
    words.post_processor = processors.TemplateProcessing(single="$A", pair="$A:0 $B:1", special_tokens=[])
    words.save(str(folder / "tokenizer.json"))
    rows = [{"text": WORDS[i], "text_pair": WORDS[i + 1], "label": "ab"[i % 2]} for i in range(4)]
    (data := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--model", folder, "--data", data, "--task", "seq-cls", "--iters", 1, "--quiet"]
    assert main(flags(place, tmp_path / "run", *more)) == 0
