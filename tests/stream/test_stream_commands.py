"""The commands merge, unmerge and init, as they are typed."""

import argparse
import json
import sys

import numpy as np
import pytest
from making import content, factors, read, weights, write_adapter, write_checkpoint

from lorax_np.commands import init, merge, streaming, unmerge
from lorax_np.errors import ConfigError, FormatError
from lorax_np.io.checkpoint import open_checkpoint
from lorax_np.io.peft import load_adapter
from lorax_np.io.writer import write_safetensors
from lorax_np.stream.merge import merge_checkpoint

Q = "model.layers.0.self_attn.q_proj"


def typed(*words):
    """Parse and run one command."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    for command in (init, merge, unmerge):
        command.add(commands)
    arguments = parser.parse_args([str(word) for word in words])
    return arguments.run(arguments)


@pytest.fixture
def made(tmp_path):
    rng = np.random.default_rng(0)
    base = write_checkpoint(tmp_path / "base", weights(rng), shards=2)
    adapter = write_adapter(tmp_path / "adapter", {Q: factors(rng, (24, 24), 3)}, target_modules=[Q])
    return base, adapter, tmp_path / "out"


@pytest.mark.parametrize("verb", ["merge", "fuse"])
def test_merge_and_unmerge(made, capsys, verb):
    base, adapter, out = made
    assert typed(verb, base, adapter, out, "--jobs", 1) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("merged 1 sites, 1 of 30 tensors: 5 files, 2")
    assert lines[-2].endswith(f" s, at {out}")
    assert lines[-1] == f"next: lorax-np inspect {out}"
    merge_checkpoint(base, adapter, out.with_name("want"))
    assert content(out) == content(out.with_name("want"))
    assert typed("unmerge", out, adapter, out.with_name("back"), "--original", base, "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert content(out.with_name("back")) == content(base)
    assert typed("unmerge", out, adapter, out.with_name("lossy")) == 0
    said = capsys.readouterr().out
    assert "note: by subtraction" in said
    assert "unmerged 1 sites" in said


def test_a_dry_run_and_json(made, capsys):
    base, adapter, out = made
    assert typed("merge", base, adapter, out, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"would merge 1 sites, 1 of 30 tensors, into {out}"
    assert {line.split()[-1] for line in lines[:-1]} == set(content(base))
    assert typed("merge", base, adapter, out, "--dry-run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["changed"] == [f"{Q}.weight"]
    assert found["dry"]
    assert not out.exists()
    options = ("--dtype", "float32", "--max-shard-size", "9kB", "--no-resume", "--json")
    assert typed("merge", base, adapter, out, *options) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == sum(found["files"].values())
    assert set(found["files"]) == set(content(out))
    assert read(out)[f"{Q}.weight"].dtype == np.float32


def test_init(made, capsys):
    base, _, out = made
    assert (
        typed(
            "init", base, out, "-r", 4, "--alpha", 6, "--start", "pissa", "--target-modules", "q_proj", "k_proj"
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("trainable params: 768 || all params: ")
    assert lines[1].startswith("started 4 sites as pissa in ")
    assert lines[2] == f"next: lorax-np check {out} --base {out / 'base'}"
    found = load_adapter(out, residual_base=True)
    assert (found.config.r, found.config.lora_alpha, found.config.init_lora_weights) == (4, 6, True)
    assert found.metadata["lorax_np.residual"] == "pissa"  # so that PEFT starts nothing anew, and we still know
    with pytest.raises(FormatError, match="expected the base weights that this start left"):
        load_adapter(out)
    again = out.with_name("again")
    assert typed("init", base, again, "--config", out, "--start", "true", "--dora", "--rslora", "--json") == 0
    assert json.loads(capsys.readouterr().out)["start"] == "true"
    config = load_adapter(again).config
    assert (config.r, config.use_dora, config.use_rslora, config.init_lora_weights) == (4, True, True, True)
    assert typed("init", base, again.with_name("dry"), "--dry-run") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("would start 12 sites as true")
    for start in ("true", "pissa"):  # a dry run counts the tensors that are written
        place = again.with_name(start)
        how = ("init", base, place, "-r", 4, "--start", start, "--json")
        assert typed(*how, "--dry-run", "--no-resume") == 0
        dry = json.loads(capsys.readouterr().out)["bytes"]
        assert typed(*how) == 0
        wet = json.loads(capsys.readouterr().out)["bytes"]
        files = [open_checkpoint(place / "adapter_model.safetensors")]
        files += [open_checkpoint(place / "base")] if start == "pissa" else []
        assert dry == sum(file.nbytes for file in files) < wet
    with pytest.raises(ConfigError, match="--seed: expected less than"):
        typed("init", base, again.with_name("dry"), "--seed", 1 << 32)


@pytest.mark.parametrize("start", ["eva", "corda", "lora_ga"])
def test_init_from_data(made, tmp_path, start):
    """Starts of inputs or gradients take them from files, a tensor for each site."""
    base, _, out = made
    rng = np.random.default_rng(3)
    names = [name for name in open_checkpoint(base) if name.endswith("q_proj.weight")]
    shape = {"lora_ga": (24, 24)}.get(start, (60, 24))
    given = {name.removesuffix(".weight"): rng.standard_normal(shape).astype("f4") for name in names}
    write_safetensors(tmp_path / "data.safetensors", given)
    how = ("-r", 4, "--start", start, "--target-modules", "q_proj")
    with pytest.raises(ConfigError, match="gradient" if start == "lora_ga" else "inputs"):
        typed("init", base, out, *how)
    assert not out.exists()
    flag = "--gradients" if start == "lora_ga" else "--inputs"
    assert typed("init", base, out, *how, flag, tmp_path / "data.safetensors") == 0
    files = load_adapter(out, residual_base=True)
    assert len(files.adapters) == len(names)
    rest = open_checkpoint(out / "base") if start != "eva" else open_checkpoint(base)
    for name in names:
        a, s = files.adapters[name.removesuffix(".weight")], files.sites[name.removesuffix(".weight")].scaling
        W, left = (np.asarray(v[name], float) for v in (open_checkpoint(base), rest))
        off = np.abs(left + s * a.B.astype(float) @ a.A - W)
        assert off.max() <= 2.0**-9 * np.exp2(np.ceil(np.log2(np.abs(left).max()))), "one rounding to bfloat16"


class Screen:
    """Standard error, as a terminal or not."""

    def __init__(self, terminal):
        self.text, self.terminal = "", terminal

    def isatty(self):
        return self.terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(monkeypatch, terminal):
    screen, now = Screen(terminal), iter([0.0, 1.0, 7.0, 7.05, 13.0])
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(streaming.time, "monotonic", lambda: next(now))
    rate = streaming.Rate("merge", "MB", 1e6, quiet=False)
    for done in (100e6, 700e6, 710e6, 1_300e6):
        rate(int(done), int(7_300e6))
    rate.done()
    one = "merge  10 %, 700 of 7300 MB, 100 MB/s, 1:06 left"
    two = "merge  18 %, 1300 of 7300 MB, 100 MB/s, 1:00 left"
    start = "\r\033[Kmerge   1 %, 100 of 7300 MB, 0 MB/s"
    want = f"{start}\r\033[K{one}\r\033[K{two}\r\033[K" if terminal else f"{one}\n{two}\n"
    assert screen.text == want


def test_clock_and_sizes():
    assert [streaming._clock(s) for s in (0.4, 61, 3600, 7325)] == ["0:00", "1:01", "1:00:00", "2:02:05"]
    assert [streaming.size(n) for n in (999, 1500, 2 * 10**6, 3 * 10**9)] == [
        "999 bytes",
        "1.50 kB",
        "2.00 MB",
        "3.00 GB",
    ]
