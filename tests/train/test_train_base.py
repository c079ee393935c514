"""An adapter laid over another base than it was trained beside is noticed, and no base but another is."""

import json

import numpy as np
import pytest
from writers import CONFIGS, LLAMA, directory

import lorax_np as lx
from lorax_np.cli import main
from lorax_np.io.peft import load_adapter, save_adapter
from lorax_np.models.vectors import vectors_digest
from lorax_np.train import output

NOTE = "was trained beside another base: norms and biases of"


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"abc {i}"}) + "\n" for i in range(4)))
    return file


@pytest.fixture
def said(monkeypatch, capsys, rows):
    """What a command says, on both streams."""
    monkeypatch.setattr(output, "picture", lambda rows: None)

    def go(verb, model, *flags):
        data = [] if verb == "generate" else ["--data", str(rows)]
        assert main([verb, "--model", str(model), *data, *map(str, flags)]) == 0
        return "".join(capsys.readouterr())

    return go


@pytest.mark.parametrize("config", [LLAMA, CONFIGS["gpt2"]], ids=["llama", "gpt2"])
def test_another_base_of_the_same_shapes_is_said(tmp_path, said, config):
    own, other = directory(tmp_path / "own", config), directory(tmp_path / "other", config, seed=5)
    out = tmp_path / "adapter"
    said("train", own, "--adapter-path", out, "--iters", "1", "--r", "2", "--bias", "all")
    more = ("--adapter-path", tmp_path / "more", "--iters", 1, "--bias", "all", "--dry-run")
    ways = {
        "evaluate": ("--adapter-path", out),
        "generate": ("--adapter-path", out, "--prompt", "abc", "--max-tokens", 2),
        "train": ("--resume-adapter-file", out, *more),
    }
    for verb, flags in ways.items():
        assert NOTE not in said(verb, own, *flags)
        assert f"{out} {NOTE} {other}" in said(verb, other, *flags)
    assert NOTE not in said("evaluate", own, *ways["evaluate"], "--quantize", "nf4")
    files = load_adapter(out)
    save_adapter(out, files.adapters, files.config, sites=files.sites, saved=files.saved)
    assert NOTE not in said("evaluate", other, *ways["evaluate"])  # nothing is known of what others made


def test_one_number_of_one_block_makes_another_base(tmp_path):
    place = directory(tmp_path / "own")
    before = vectors_digest(lx.load_model(place))
    held = dict(lx.open_checkpoint(place))
    for name, same in (("model.embed_tokens.weight", True), ("model.layers.1.input_layernorm.weight", False)):
        changed = np.array(held[name])
        changed[-1] += 0.5
        lx.write_safetensors(place / "model.safetensors", {**held, name: changed})
        assert (vectors_digest(lx.load_model(place)) == before) == same
        assert vectors_digest(lx.load_model(place)) == vectors_digest(lx.load_model(place, dtype="float64"))
