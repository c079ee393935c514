"""lorax-np convert: what it prints, what it writes, how it refuses."""

import argparse
import json
import re

import numpy as np
import pytest

from lorax_np.commands import convert
from lorax_np.config import LoraConfig, site_at
from lorax_np.errors import FormatError
from lorax_np.io.peft import save_adapter
from lorax_np.params import Adapter

NAME = "model.layers.0.mlp.up_proj"


def command(*argv):
    parser = argparse.ArgumentParser(prog="lorax-np")
    convert.add(parser.add_subparsers(required=True))
    arguments = parser.parse_args(["convert", *map(str, argv)])
    return arguments.run(arguments)


@pytest.fixture
def adapter(tmp_path):
    config = LoraConfig(r=2, lora_alpha=3, lora_dropout=0.25, target_modules=[NAME])
    made = {NAME: Adapter(np.ones((2, 3), "f4"), np.ones((4, 2), "f4"))}
    save_adapter(tmp_path / "peft", made, config, sites={NAME: site_at(config, NAME)})
    return tmp_path / "peft"


def test_it_says_what_it_wrote(adapter, tmp_path, capsys):
    assert command(adapter, tmp_path / "a.safetensors", "--to", "loralib") == 0
    assert capsys.readouterr().out.splitlines() == [
        "peft -> loralib: 1 sites",
        f"wrote {tmp_path / 'a.safetensors'}",
        "note: loralib keeps no α in its files: make its layers with lora_alpha=3",
        "note: lora_dropout 0.25 is left out, which its layers are made with",
    ]
    assert (tmp_path / "a.safetensors").is_file()


def test_there_and_back_through_a_table_of_names(adapter, tmp_path, capsys):
    (tmp_path / "names.json").write_text(json.dumps({NAME.replace(".", "_"): NAME}))
    assert command(adapter, tmp_path / "k.safetensors", "--to", "kohya", "--prefix", "lora_te1", "--quiet") == 0
    assert capsys.readouterr().out == ""
    back = tmp_path / "back"
    found = command(
        tmp_path / "k.safetensors", back, "--to", "peft", "--names", tmp_path / "names.json", "--json"
    )
    assert found == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["source_format"], told["target_format"], told["sites"]) == ("kohya", "peft", 1)
    assert all(name.startswith(str(back)) for name in told["files"])
    name = "adapter_model.safetensors"
    assert (back / name).read_bytes() == (adapter / name).read_bytes()


def test_a_dry_run_writes_nothing(adapter, tmp_path, capsys):
    assert command(adapter, tmp_path / "out", "--to", "mlx", "--dry-run") == 0
    assert f"would write {tmp_path / 'out' / 'adapters.safetensors'}" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


def test_refusals_are_format_errors(adapter, tmp_path):
    with pytest.raises(FormatError, match=re.escape("gguf: expected a base (--base)")):
        command(adapter, tmp_path / "a.gguf", "--to", "gguf")
    with pytest.raises(FormatError, match=r"lora_parameters: expected an object"):
        command(adapter, tmp_path / "out", "--to", "peft", "--from", "mlx")
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--to", "ggml"], "invalid choice: 'ggml'"),
        (["--to", "peft", "--enable-lora", "1,2"], "expected zeros and ones between commas, got '1,2'"),
        (["--to", "peft", "--enable-lora", ""], "expected zeros and ones between commas, got ''"),
        ([], "the following arguments are required: --to"),
    ],
)
def test_bad_usage_is_told(adapter, tmp_path, words, told, capsys):
    with pytest.raises(SystemExit) as caught:
        command(adapter, tmp_path / "out", *words)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


def test_the_formats_are_the_libraries():
    from lorax_np.io.convert import FORMATS

    assert FORMATS == convert.FORMATS
