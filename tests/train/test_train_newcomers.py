"""What people type wrong and have lying about: each is one line before the first step, or is right."""

import json

import numpy as np
import pytest
from writers import BERT, ROPE, SIZES, directory

import lorax_np as lx
from lorax_np.cli import main
from lorax_np.train import output
from lorax_np.train.log import records
from lorax_np.train.settings import names

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran"]
TEXTS = [{"text": " ".join(WORDS[i : i + 4])} for i in range(6)]
EXPERTS = {"model_type": "mixtral", "head_dim": 4, "num_local_experts": 3, "num_experts_per_tok": 2}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(output, "picture", lambda rows: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models' directories: a llama, and a BERT with a head of three outputs."""
    folder = tmp_path_factory.mktemp("models")
    directory(folder / "llama")
    directory(folder / "bert", BERT, task="SEQ_CLS")
    return folder


@pytest.fixture
def rows(tmp_path):
    """A file of rows."""

    def write(*found, name="rows.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        return tmp_path / name

    return write


@pytest.fixture
def run(place, rows, tmp_path, capsys):
    """lorax-np train into tmp_path/out: its code, what it printed, what it said besides."""

    def go(*more, model="llama", data=None):
        given = ["--model", place / model, "--data", data or rows(*TEXTS), "--adapter-path", tmp_path / "out"]
        given += ["--iters", 2, "--batch-size", 2, "--r", 2, "--max-seq-length", 64]
        return main(["train", *map(str, [*given, *more])]), *capsys.readouterr()

    return go


@pytest.fixture
def refused(run, tmp_path):
    """The one line of a refusal, which leaves nothing."""

    def go(*more, **options):
        code, _, err = run(*more, "--quiet", **options)
        assert (code, err.count("\n")) == (2, 1), err
        assert not (tmp_path / "out").exists()
        return err.removeprefix("lorax-np: ").rstrip()

    return go


# ---- settings ----------------------------------------------------------------------------------------------


def test_one_name_is_a_name_and_not_an_expression(run, tmp_path):
    """PEFT's expression would have to fit the whole of a module's name, which a name alone never does."""
    assert run("--target-modules", "q_proj", "--exclude-modules", "0.self_attn.q_proj", "--quiet")[0] == 0
    assert list(lx.load_adapter(tmp_path / "out").sites) == ["model.layers.1.self_attn.q_proj"]


def test_an_expression_stays_one(run, tmp_path):
    assert run("--target-modules", r".*1\.self_attn\.[qk]_proj", "--quiet")[0] == 0
    assert len(lx.load_adapter(tmp_path / "out").sites) == 2
    assert (names(r".*q"), names("All-Linear"), names("a.q_proj")) == (r".*q", "all-linear", ["a.q_proj"])


@pytest.mark.thorough
def test_parameters_without_a_word_on_dropout(run, place, tmp_path):
    """They have none; what was not asked for is not refused."""
    directory(place / "moe", EXPERTS | SIZES | ROPE)
    assert run("--target-parameters", "experts.down_proj", "--target-modules", "v_proj", model="moe")[0] == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_dropout"] == 0.0


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (
            ["--layers-to-transform", "0-99999999999"],
            "layers_to_transform: expected layers as in 3,5,7 or 20-29",
        ),
        (["--layers-to-transform", "1,5-3"], "layers_to_transform: expected layers as in 3,5,7 or 20-29"),
        (["--r", "0"], "r: expected an int of at least 1 (and below 2**63), got 0"),
        (["--r", "10000000000"], "r: expected a whole number below 65536, got '10000000000'"),
        (["--backend", "torch"], "backend: expected one of numpy, cupy, auto, got 'torch'"),
        (["--lora-dtype", "float64"], "lora_dtype: expected one of float32, float16, bfloat16, got 'float64'"),
        (["--max-seq-length", "4"], "max_seq_length: expected at least 8 tokens, got 4"),
        (
            ["--init-lora-weights", "eva"],
            "init_lora_weights: expected a start that is made of the weights alone",
        ),
        (["--learning-rate", "1e39"], "learning_rate: expected a number from 1.2e-38 to 3.4e+38"),
        (["--eps", "1e-50"], "eps: expected a number from 1.2e-38 to 3.4e+38"),
        (["--weight-decay", "1e300"], "weight_decay: expected 0, or a number from 1.2e-38 to 3.4e+38"),
        (["--adapter-path", ""], "adapter_path: expected a word, got ''"),
        (["--data", ""], "data: expected a word, got ''"),
    ],
)
def test_values_without_a_meaning(refused, more, wanted):
    said = refused(*more)
    assert said.removeprefix("the command line: ").startswith(wanted)
    assert said.count("expected") == 1


def test_a_library_that_is_not_there_is_named_as_it_was_asked_for(refused, rows, place, monkeypatch, capsys):
    monkeypatch.setattr("lorax_np.backend._cupy", lambda: (None, "no such package"))
    wanted = "backend: expected a working cupy, got: no such package"
    assert refused("--backend", "cupy") == wanted
    for command, more in (("evaluate", ["--data", rows(*TEXTS)]), ("generate", ["--prompt", "x"])):
        asked = [command, "--model", place / "llama", "--backend", "cupy", *more]
        assert main([*map(str, asked)]) == 2
        assert capsys.readouterr().err == f"lorax-np: --{wanted}\n"


def test_a_name_twice_in_a_file(refused, tmp_path):
    """YAML would take the last."""
    file = tmp_path / "run.yaml"
    file.write_text("r: 3\nseed: 1\nr: 4\n")
    assert refused("-c", file) == f"{file}:3: expected each name once, got 'r' again"
    file.write_text("lora-alpha: 3\nlora_alpha: 4\n")
    assert refused("-c", file) == f"{file}: expected each name once, got lora_alpha with hyphens and without"
    file.write_text("layers_to_transform: [[0], [1]]\n")
    assert "expected layers as in 3,5,7 or 20-29" in refused("-c", file)


# ---- rows --------------------------------------------------------------------------------------------------


def test_a_step_without_a_label_is_seen_before_the_first(refused, rows):
    file = rows({"text": "the cat"}, {"text": ""}, {"text": "a mat"}, {"text": ""})
    said = refused("--batch-size", 1, "--iters", 8, data=file)
    assert said.startswith("step ")
    assert ": expected a label that counts in its rows, got none in " in said
    assert f"{file}:2" in said or f"{file}:4" in said


def test_a_row_without_a_label_beside_others_is_no_matter(run, rows):
    assert run(data=rows({"text": "the cat"}, {"text": ""}))[0] == 0


def test_rows_to_evaluate_on_have_labels_and_fit(refused, rows):
    """A loss over nothing would be said to be 0."""
    file = rows({"text": ""}, name="valid.jsonl")
    assert refused("--valid", file) == (
        f"valid: expected a label that counts in some row of CAUSAL_LM, got none in 1 rows, first {file}:1"
    )
    file = rows({"text": "the cat " * 40}, name="valid.jsonl")
    assert f"{file}:1: expected at most 96 tokens" in refused("--valid", file, "--max-seq-length", 200)
    assert refused("--valid", file.parent) == f"valid: expected a .jsonl file, got the directory {file.parent}"


def test_pairs_are_told_from_others_of_their_batch(refused, rows, place, tmp_path, capsys):
    """Of one pair alone the loss is 0, whatever the model."""
    file = rows(*({"text": word, "text_pair": word * 2} for word in WORDS))
    task = "--task", "feature-extraction"
    wanted = "expected at least 2, since a pair is told from the others of its micro-batch, got 1"
    assert refused(*task, "--batch-size", 1, model="bert", data=file) == f"batch_size: {wanted}"
    said = refused(*task, "--loss-mean", "sequence", model="bert", data=file)
    assert said.startswith("loss_mean: expected token, since a pair is told from the others")
    asked = ["evaluate", "--model", place / "bert", "--data", file, *task, "--batch-size", 1, "--quiet"]
    assert main([*map(str, asked)]) == 2
    assert capsys.readouterr().err == f"lorax-np: batch_size: {wanted}\n"


def test_classes_are_as_many_as_the_head_has_outputs(refused, run, rows, tmp_path):
    def labelled(*labels):
        return rows(*({"text": "the cat", "label": label} for label in labels))

    task = {"model": "bert"}
    for labels, came in (
        (["a", "b"], "2: a, b"),
        ([0, 1000], "1001: LABEL_0, LABEL_1"),
        ([0.5, 1], "1: LABEL_0"),
    ):
        said = refused("--task", "seq-cls", data=labelled(*labels), **task)
        assert said.startswith("labels: expected 3 classes, as many as the head in ")
        assert f"got {came}" in said
    assert run("--task", "seq-cls", "--quiet", data=labelled(0, 1), **task)[0] == 0
    assert json.loads((tmp_path / "out" / "labels.json").read_text())["num_labels"] == 3


def test_a_dry_run_is_refused_for_what_the_run_would_be(refused, run, rows):
    assert refused("--dry-run", "--warmup", 9) == "warmup: expected 0 to 2, the steps of the run, got 9"
    file = rows({"text": ""}, name="valid.jsonl")
    assert refused("--dry-run", "--valid", file).startswith("valid: expected a label that counts")
    code, out, _ = run("--dry-run", "--json")
    found = json.loads(out)
    assert (code, found["steps"], found["nbytes"]) == (0, 2, sum(found["parts"].values()))


def test_what_comes_next_is_judged_as_the_run_was(run, rows, tmp_path, capsys):
    """Typed as it is said, it gives the run's last loss: on the same rows, cut and labelled alike."""
    import shlex

    found = [{"prompt": word * 3, "completion": " the cat sat" * 2} for word in WORDS]
    valid, data = rows(*found[:4], name="valid.jsonl"), rows(*found[4:])
    more = "--valid", valid, "--no-mask-prompt", "--max-seq-length", 12, "--learning-rate", "1e-2"
    _, out, _ = run(*more, data=data)
    typed = out.splitlines()[-1].removeprefix("next: lorax-np ")
    assert main([*shlex.split(typed), "--json", "--quiet"]) == 0
    loss = json.loads(capsys.readouterr().out)["metrics"]["loss"]
    last = records(tmp_path / "out" / "metrics.jsonl")[-1]
    assert (last["on"], loss) == ("valid", pytest.approx(last["loss"], rel=1e-6))


# ---- where it goes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["README.md", "adapter_model.safetensors", "loss.csv", "labels.json", "run.json"]
)
def test_what_somebody_else_wrote_is_not_written_over(run, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    code, _, err = run("--quiet")
    wanted = f"lorax-np: {tmp_path / 'out'}: expected a new directory, or resume, got one with {name} in it\n"
    assert (code, err) == (2, wanted)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_not_into_the_base(run, place):
    """Whoever loads the model would find the adapter there."""
    before = sorted(place.joinpath("llama").iterdir())
    code, _, err = run("--quiet", "--adapter-path", place / "llama")
    assert (code, err) == (
        2,
        f"lorax-np: {place / 'llama'}: expected another directory than the model's, got it\n",
    )
    assert sorted(place.joinpath("llama").iterdir()) == before


def test_a_place_that_can_be_written_to(run, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("mine")
    code, out, err = run("--quiet", "--adapter-path", file / "sub" / "deep")
    assert (code, out, err) == (
        2,
        "",
        f"lorax-np: {file / 'sub' / 'deep'}: expected a place below a directory, got the file {file}\n",
    )
    monkeypatch.setattr("os.access", lambda path, mode: False)
    code, out, err = run("--quiet")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{tmp_path / 'out'}: expected leave to write in {tmp_path}, got none" in err


def test_numbers_that_ran_away_are_not_saved(run, tmp_path, monkeypatch):
    """The save before stays the last; the place says what is wrong, and nothing else is said."""
    more = (
        "--save-every",
        1,
        "--iters",
        3,
        "--learning-rate",
        "3e38",
        "--loraplus-lr-ratio",
        "3e38",
        "--warmup",
        0,
    )
    code, _, err = run(*more, "--quiet")
    assert (code, err.count("\n")) == (2, 1), err
    assert "step 1: expected finite numbers to save, got NaN or infinity in adapters." in err
    assert err.rstrip().endswith("; nothing is saved, and the rate, or the weight decay, is too large")
    assert not (tmp_path / "out" / "state" / "latest").exists()
    assert all(np.isfinite(a.B).all() for a in lx.load_adapter(tmp_path / "out").adapters.values())


def test_a_file_that_has_no_room_is_named(tmp_path, monkeypatch):
    from lorax_np.train import state

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/loss.csv'"):
        state.write_whole(tmp_path / "loss.csv", b"1")
    assert not list(tmp_path.iterdir())


# ---- going on ----------------------------------------------------------------------------------------------


def resume(out, *more):
    return main(["train", "--resume", "--adapter-path", str(out), "--quiet", *map(str, more)])


def test_a_run_that_ended_is_not_begun_again_over_its_adapter(run, tmp_path, capsys):
    """Somebody removed the state, which is large."""
    import shutil

    out = tmp_path / "out"
    assert run("--quiet", "--learning-rate", "1e-2")[0] == 0
    before = (out / "adapter_model.safetensors").read_bytes()
    assert resume(out, "--iters", 1) == 2
    assert "iters: expected at least 2, the steps that are done, got 1" in capsys.readouterr().err
    shutil.rmtree(out / "state")
    assert resume(out) == 2
    assert capsys.readouterr().err == (
        f"lorax-np: {out / 'state'}: expected a save to go on from, got none beside a run that ended; "
        "--resume-adapter-file trains its adapter on\n"
    )
    assert (out / "adapter_model.safetensors").read_bytes() == before
    (out / "run.json").unlink()
    assert resume(out) == 2
    wanted = f"expected {out / 'run.json'}, or --model and --data, got neither"
    assert capsys.readouterr().err == f"lorax-np: --resume: {wanted}\n"
    (out / "run.json").write_text('{"rank": 3}')
    assert resume(out) == 2
    assert capsys.readouterr().err.startswith(
        f"lorax-np: {out / 'run.json'}: expected a known name, got 'rank'"
    )


CHANGES = (
    {"counters": {"a": 1}},
    {"counters": {"labels": "x"}},
    {"position": {"epoch": "x", "used": 1}},
    {"position": {"epoch": 0, "used": 99}},
    {"position": {"epoch": 0, "used": -1}},
)


@pytest.mark.thorough
def test_a_damaged_state_is_refused_by_its_file(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--quiet")[0] == 0
    file, tensors = (out / "state" / "step-2" / name for name in ("state.json", "tensors.safetensors"))
    whole = json.loads(file.read_text())
    for change in CHANGES:
        file.write_text(json.dumps(whole | change))
        assert resume(out, "--iters", 3) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"lorax-np: {file}: {next(iter(change))}: expected ")
        assert err.count("\n") == 1
    file.write_text(json.dumps(whole))
    found = lx.open_safetensors(tensors)
    arrays = {name: np.array(found[name]) for name in found.names}
    name = next(name for name in arrays if name.startswith("p."))
    arrays[name][0] = np.nan
    lx.write_safetensors(tensors, arrays)
    assert resume(out, "--iters", 3) == 2
    wanted = f"{tensors}: {name}: expected finite numbers, got NaN or infinity"
    assert capsys.readouterr().err == f"lorax-np: {wanted}\n"


@pytest.mark.thorough
def test_what_is_said_of_an_adapter_that_is_there(run, tmp_path):
    assert run("--quiet")[0] == 0
    first = (tmp_path / "out").rename(tmp_path / "first")
    more = "--resume-adapter-file", first
    code, _, err = run(*more, "--quiet", "--r", 5, "--use-dora")
    assert (code, err) == (
        2,
        "lorax-np: r: expected 2, set by the adapter to train on, or nothing, got 5; "
        "use_dora: expected False, set by the adapter to train on, or nothing, got True\n",
    )
    assert run(*more, "--quiet")[0] == 0


def test_a_start_that_left_another_base(run, place, tmp_path, capsys):
    """The line says what to type; DoRA's comes with that base, and is judged and trained on beside it."""
    begun = tmp_path / "begun"
    assert main(["init", str(place / "llama"), str(begun), "--start", "pissa", "-r", "2", "--quiet"]) == 0
    code, _, err = run("--quiet", "--resume-adapter-file", begun)
    assert code == 2
    assert "resume_adapter_file: expected an adapter for the original base, got one for REST, what " in err
    assert err.endswith(f"lorax-np merge --residual-base REST {begun} NEW makes a model of the two\n")
    typed = ["merge", "--residual-base", begun / "base", begun, tmp_path / "new", "--quiet"]
    assert main([*map(str, typed)]) == 0
    capsys.readouterr()
    code, _, err = run("--quiet", "--init-lora-weights", "pissa", "--use-dora", model="llama")
    assert (code, err) == (0, "")
    last = records(tmp_path / "out" / "metrics.jsonl")[-1]
    asked = ["evaluate", "--model", place / "llama", "--data", tmp_path / "rows.jsonl", "--json", "--quiet"]
    assert main([*map(str, asked), "--adapter-path", str(tmp_path / "out")]) == 0
    loss = json.loads(capsys.readouterr().out)["metrics"]["loss"]
    assert (last["event"], loss) == ("eval", pytest.approx(last["loss"], rel=1e-6))
    first = (tmp_path / "out").rename(tmp_path / "first")
    assert run("--quiet", "--resume-adapter-file", first)[0] == 0
    assert records(tmp_path / "out" / "metrics.jsonl")[1]["loss"] == pytest.approx(loss, rel=1e-6)


# ---- the command line --------------------------------------------------------------------------------------


def ended(argv, capsys):
    """What argparse refuses: its code, and what it said."""
    with pytest.raises(SystemExit) as left:
        main([*map(str, argv)])
    said = capsys.readouterr()
    assert said.out == ""
    return left.value.code, said.err


@pytest.mark.parametrize("command", ["train", "evaluate", "generate"])
def test_a_wrong_flag_is_one_line_whatever_else_is_missing(capsys, command):
    wanted = f"lorax-np {command}: --modle: expected a known flag (did you mean '--model'?)\n"
    assert ended([command, "--modle", "x"], capsys) == (2, wanted)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("lr", "learning-rate"), ("rank", "r"), ("max-steps", "iters"), ("output-dir", "adapter-path")],
)
def test_what_other_programs_call_it(refused, capsys, tmp_path, theirs, ours):
    """By its letters alone lr would be r, and a rate a rank."""
    wanted = f"lorax-np train: --{theirs}: expected a known flag (did you mean '--{ours}'?)\n"
    assert ended(["train", f"--{theirs}", "1"], capsys) == (2, wanted)
    file, name, own = tmp_path / "run.yaml", theirs.replace("-", "_"), ours.replace("-", "_")
    file.write_text(f"{name}: 1\n")
    assert refused("-c", file) == f"{file}: expected a known name, got {name!r} (did you mean {own!r}?)"


def test_a_word_that_belongs_to_no_flag(capsys):
    assert ended(["train", "--r", "3", "rows.jsonl"], capsys) == (
        2,
        "lorax-np train: expected flags alone, got 'rows.jsonl'\n",
    )
    code, err = ended(["train", "--use-dora=maybe"], capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert "--use-dora" in err


def test_help_says_what_there_is_to_choose_from_and_what_it_is_else(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "causal-lm, seq-cls, token-cls, question-ans, seq2seq-lm or feature-extraction (default: causal-lm)",
        "numpy, cupy or auto",
        "none, nf4, int8 or bf16 (default: none)",
        "constant, linear or cosine (default: cosine)",
        "none, all or lora_only (default: none)",
        "of starts, order and dropout (default: 0)",
        "of matrices; magnitudes and biases have none (default: 0.0)",
    ):
        assert part in said, part
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert "causal-lm, seq-cls, token-cls" in " ".join(capsys.readouterr().out.split())


@pytest.mark.thorough
def test_json_needs_no_dash(run):
    code, out, _ = run("--json")
    assert (code, json.loads(out)["ended"]) == (0, "done")


@pytest.mark.thorough
def test_without_a_standard_output(run, monkeypatch):
    """As a shell's >&- has it."""
    monkeypatch.setattr("sys.stdout", None)
    assert run()[0] == 0


def test_a_full_disk_and_too_little_memory(run, monkeypatch):
    from lorax_np.commands import train

    def fails(error):
        def go(*_):
            raise error

        monkeypatch.setattr(train, "_run", go)
        code, out, err = run()
        assert (code, out) == (2, "")
        return err

    assert fails(OSError(28, "No space left on device")) == (
        "lorax-np: expected room for what is written, got: No space left on device\n"
    )
    assert fails(MemoryError("Unable to allocate 4 TiB")) == (
        "lorax-np: expected memory for it, got: Unable to allocate 4 TiB\n"
    )
