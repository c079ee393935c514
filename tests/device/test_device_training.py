"""Whole runs on a device's arrays: they come to what they come to on the host, and a step waits once."""

import json
from threading import Thread

import numpy as np
import pytest
from cupy_like import reads

import lorax_np as lx
from lorax_np.backend import to_host
from lorax_np.cli import main
from lorax_np.generation import token_stream
from lorax_np.models.records import Trained
from lorax_np.models.watching import site_gradients, site_inputs
from lorax_np.optim import clip_into
from lorax_np.parallel import threads
from lorax_np.train import Passes
from lorax_np.train import step as step_file
from lorax_np.train.held import Held
from lorax_np.train.log import records
from lorax_np.train.step import parameters
from tests.device import cases, runs
from tests.device.runs import assert_near, on


@pytest.fixture
def waits(monkeypatch):
    """How often the host waited in each step."""
    found, plain = [], Held.step

    def counted(self, *args, **how):
        before = len(reads)
        outcome = plain(self, *args, **how)
        found.append(len(reads) - before)
        return outcome

    monkeypatch.setattr(Held, "step", counted)
    return found


HOW = {
    "AdamW": {},
    "AdamW, decayed": {"weight_decay": 0.1, "loraplus_lr_ratio": 4.0},
    "SGD": {"optimizer": "sgd", "momentum": 0.9},
    "LoRA-FA": {"optimizer": "lora-fa"},
    "no clipping": {"max_grad_norm": 0.0},
    "sequences": {"loss_mean": "sequence"},
    "checkpoints": {"grad_checkpoint": "on"},
    "the reference": {"engine": "reference"},
}


@pytest.mark.parametrize("how", HOW)
def test_a_run_of_a_llama(cupy, waits, how):
    want, got = runs.llama(np, **HOW[how]), runs.llama(cupy, **HOW[how])
    assert waits == [0] * 4 + [1] * 4
    assert_near(got, want)


@pytest.mark.parametrize("kind", runs.TASKS)
def test_a_run_of_every_task(cupy, waits, kind):
    """With an evaluation before it and one behind."""
    want, got = runs.task(kind, np), runs.task(kind, cupy)
    assert waits == [0, 0, 1, 1]
    assert_near(got, want)


def test_experts_wait_for_their_routers_besides(cupy, waits):
    assert_near(runs.moe(cupy), runs.moe(np))
    assert waits == [1 + 2 * 2] * 2 + [0] * 2  # two blocks, two micro-batches


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lora-fa"])
def test_a_run_that_goes_on_is_the_run_that_never_stopped(cupy, tmp_path, optimizer):
    how = {"optimizer": optimizer, "engine": "fast"}
    whole = runs.llama(cupy, out=tmp_path / "whole", **how)
    assert runs.llama(cupy, out=tmp_path / "part", stop=2, **how).step == 2
    rest = runs.llama(cupy, out=tmp_path / "part", resume=True, **how)
    for name, value in parameters(whole.trained).items():
        assert type(value) is cupy.ndarray
        assert parameters(rest.trained)[name].host.tobytes() == value.host.tobytes(), name
    for file in ("adapter_model.safetensors", "state/step-4/tensors.safetensors"):
        assert (tmp_path / "part" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_two_ranks_are_one(cupy):
    """Each has a device's arrays, and what they exchange goes through the host."""
    whole, found = runs.llama(cupy, iters=2, grad_accumulation_steps=2), [None, None]

    def work(ranks):
        found[ranks.rank] = runs.llama(cupy, iters=2, grad_accumulation_steps=1, ranks=ranks)

    started = [Thread(target=work, args=(ranks,)) for ranks in threads(2)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(60)
    for name, value in parameters(whole.trained).items():
        for one in found:
            assert parameters(one.trained)[name].host.tobytes() == value.host.tobytes(), name


def test_what_is_saved_is_what_trained(cupy, tmp_path):
    """A directory that the host loads; and a start such as PiSSA's, which leaves another base."""
    found = runs.llama(cupy, out=tmp_path / "run", modules_to_save=["lm_head"])
    saved = lx.load_adapter(tmp_path / "run")
    for name, adapter in found.trained.adapters.items():
        assert np.array_equal(saved.adapters[name].A, adapter.A.host)
        assert np.array_equal(saved.adapters[name].B, adapter.B.host)
    assert np.array_equal(saved.saved["lm_head.weight"], found.trained.saved["lm_head.weight"].host)
    runs.llama(cupy, out=tmp_path / "pissa", init_lora_weights="pissa")
    runs.llama(np, out=tmp_path / "beside", init_lora_weights="pissa")
    one, other = (lx.load_adapter(tmp_path / name).adapters for name in ("pissa", "beside"))
    for name, adapter in other.items():
        product = adapter.B @ adapter.A
        assert np.abs(one[name].B @ one[name].A - product).max() <= 1e-9 * np.abs(product).max()


def test_a_run_that_comes_to_nothing_ends_as_on_the_host(cupy, tmp_path):
    """The module where it went wrong is looked for on the device."""
    how = {"size": 1e200, "iters": 8}
    ends = [runs.llama(xp, out=tmp_path / xp.__name__, **how).ended for xp in (np, cupy)]
    assert ends == ["not finite"] * 2
    bad = [
        [r for r in records(tmp_path / name / "metrics.jsonl") if r["event"] == "bad"]
        for name in ("numpy", "cupy")
    ]
    assert bad[0] == bad[1] != []


def test_the_norm_is_not_read_where_gradients_are_clipped(cupy):
    for values in ([3.0, 4.0], [3e-9, 0.0], [np.inf, 1.0], [np.nan, 1.0]):
        here, there = np.array(values), cupy.asarray(np.array(values))
        N, want = clip_into({"": there}, 1.0), clip_into({"": here}, 1.0)
        assert N.host.tobytes() == want.tobytes()
        assert there.host.tobytes() == here.tobytes()
    assert not reads


def test_a_second_read_would_be_seen(cupy, waits, monkeypatch):
    monkeypatch.setattr(step_file, "read_together", lambda *both: [float(value[0]) for value in both])
    runs.llama(cupy)
    assert waits == [2] * 4


@pytest.mark.parametrize("engine", ["reference", "fast"])
@pytest.mark.parametrize("kind", runs.WRITERS)
def test_texts_are_written_there(cupy, kind, engine):
    """Token by token, with keys that stay on the device; one read a token, of its logits."""
    model, sites, trained = runs.writer(kind)
    how = {"sites": sites, "most": 4, "engine": engine}
    want = list(token_stream(model, [4, 9, 2, 11], trained=trained, **how))
    model, trained = on(cupy, model, trained)
    reads.clear()
    assert list(token_stream(model, [4, 9, 2, 11], trained=trained, **how)) == want
    assert len(reads) == 4 + 2 * 4 * (kind == "moe")


def test_a_base_alone_is_judged_there(cupy):
    """By one thread, as any other of a device's."""
    base, rows = runs.model("llama", "CAUSAL_LM"), runs.rows("CAUSAL_LM")
    there, nothing = on(cupy, base, Trained({}, {}))
    assert Passes(there, {}, nothing, task="CAUSAL_LM").workers == 1
    want = lx.evaluate(base, {}, nothing, rows, "CAUSAL_LM")["loss"]
    assert lx.evaluate(there, {}, nothing, rows, "CAUSAL_LM")["loss"] == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("start", ["eva", "lora_ga"])
def test_starts_that_look_at_rows(cupy, start):
    step = cases.step_of(*cases.KINDS["llama"])
    config = lx.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", init_lora_weights=start)
    found = []
    for one in (step, step.moved(cupy.asarray)):
        args = one.model, one.sites, [one.batch]
        looks = site_inputs(*args) if start == "eva" else site_gradients(*args, task=one.task)
        given = {"inputs" if start == "eva" else "gradients": looks}
        found.append(lx.inject(one.model.weights, config, np.random.default_rng(0), **given)[1])
    for name, adapter in found[0].items():
        want, there = adapter.B @ adapter.A, to_host(found[1][name].B) @ to_host(found[1][name].A)
        assert np.abs(there - want).max() <= 1e-12 * max(np.abs(want).max(), 1)


def test_the_command(cupy, tmp_path, capsys):
    """lorax-np train --backend cupy, from files to files; and evaluate, generate, on what it left."""
    place = runs.files(tmp_path)
    given = ["--model", place, "--data", place, "--backend", "cupy"]
    more = [
        "--iters",
        2,
        "--batch-size",
        2,
        "--r",
        2,
        "--max-seq-length",
        16,
        "--adapter-path",
        tmp_path / "out",
    ]
    assert main(["train", *map(str, [*given, *more])]) == 0
    said = capsys.readouterr().out
    assert said.startswith("backend cupy (--backend cupy)\nCuPy 14.2.0 on a stand-in\n")
    assert "\nexpected: 2 steps of " in said  # its rates are not the host's
    beside = [str(tmp_path / "host") if word == tmp_path / "out" else str(word) for word in [*given, *more]]
    assert main(["train", *["numpy" if word == "cupy" else word for word in beside]]) == 0
    one, other = (lx.load_adapter(tmp_path / name).adapters for name in ("out", "host"))
    for name, adapter in other.items():
        assert np.abs(one[name].A - adapter.A).max() <= 1e-4 * np.abs(adapter.A).max()
    capsys.readouterr()
    judge = ["--model", place, "--data", place, "--adapter-path", tmp_path / "out", "--json"]
    losses = []
    for backend in ("numpy", "cupy"):
        assert main(["evaluate", *map(str, judge), "--backend", backend]) == 0
        losses.append(json.loads(capsys.readouterr().out)["metrics"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_without_it_the_command_says_so(tmp_path, capsys):
    place = runs.files(tmp_path)
    words = ["--model", place, "--data", place, "--adapter-path", tmp_path / "out", "--backend", "cupy"]
    if runs.works("cupy"):
        pytest.skip("not refused: CuPy works here")
    assert main(["train", *map(str, words)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "backend: expected a working cupy, got: " in said[0]


def test_a_plan_reads_the_base_where_it_lies(cupy):
    """No copy is made of it, so nothing is let go of."""
    base, trained, sites, _ = runs.given(runs.model("llama", "CAUSAL_LM"), "CAUSAL_LM")
    base, trained = on(cupy, base, trained)
    passes = Passes(base, sites, trained, task="CAUSAL_LM")
    assert passes.what == "planned Llama pass, on a device"
    assert not passes.copied
    layer = passes._plan.layers[0]
    assert layer.own["mlp.up_proj.weight"] is base.weights["model.layers.0.mlp.up_proj.weight"]


@pytest.mark.parametrize("there", [True, False])
def test_the_memory_told_is_that_of_where_it_trains(cupy, there):
    told = []
    base, trained, sites, _ = runs.given(runs.model("llama", "CAUSAL_LM"), "CAUSAL_LM")
    base, trained = on(cupy if there else np, base, trained)
    how = {"sites": sites, "task": "CAUSAL_LM", "callbacks": [lambda record: told.append(record)]}
    lx.train(base, trained, runs.rows("CAUSAL_LM"), lx.TrainConfig(iters=1), **how)
    found = [record["peak_bytes"] for record in told if record["event"] == "train"]
    assert len(found) == 1
    assert (found[0] == 12345) == there
    assert found[0] > 10_000
