"""Checkpoints opened whole: files, directories, shards behind an index, and what an index may not say."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from lorax_np.errors import FormatError
from lorax_np.io.checkpoint import open_checkpoint
from lorax_np.io.gguf_writer import write_gguf
from lorax_np.io.writer import write_safetensors

A, B, C = (np.arange(n, dtype=np.float32).reshape(n // 2, 2) for n in (2, 4, 6))
MAP = {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}
INDEX = {"metadata": {"total_size": 48}, "weight_map": MAP}


def sharded(folder, index=INDEX, raw=None):
    write_safetensors(folder / "m-1.safetensors", {"a": A, "b": B})
    write_safetensors(folder / "m-2.safetensors", {"c": C})
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index) if raw is None else raw, encoding="utf-8")
    return path


def refusal(path):
    with pytest.raises(FormatError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "expected" in message
    assert "got" in message
    assert message.isprintable()
    assert len(message) < 700
    return message


def check(found):
    assert {name: array.tolist() for name, array in found.items()} == {
        "a": A.tolist(),
        "b": B.tolist(),
        "c": C.tolist(),
    }
    assert "a" in found
    assert "z" not in found
    assert len(found) == 3
    assert found.shape("c") == (3, 2)
    with pytest.raises(KeyError, match="no tensor named 'z'"):
        found["z"]


# ---- what is opened ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors"])
def test_a_file_and_a_directory_with_one(tmp_path, name):
    path = tmp_path / name
    write_safetensors(path, {"a": A, "b": B, "c": C})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for given in (path, tmp_path, str(tmp_path)):
        found = open_checkpoint(given)
        check(found)
        assert found.config == {"model_type": "llama"}
        assert found.files == (path,)
        assert found.folder == tmp_path
        assert found.index is None


def test_shards_behind_an_index(tmp_path):
    path = sharded(tmp_path)
    for given in (tmp_path, path):
        found = open_checkpoint(given)
        check(found)
        assert found.config == {}
        assert found.index == INDEX
        assert found.files == (tmp_path / "m-1.safetensors", tmp_path / "m-2.safetensors")
        assert found.shard("c").path == tmp_path / "m-2.safetensors"
        assert found.folder == tmp_path


def test_an_index_without_metadata_or_total(tmp_path):
    for metadata in ({}, {"metadata": None}, {"metadata": {}}, {"metadata": {"total_parameters": 3}}):
        check(open_checkpoint(sharded(tmp_path, {**metadata, "weight_map": MAP})))


def test_model_safetensors_goes_before_an_index(tmp_path):
    sharded(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", {"z": A})
    assert list(open_checkpoint(tmp_path)) == ["z"]


def test_shards_may_be_links_elsewhere(tmp_path):
    """A cache keeps files by their hash, and a snapshot's directory links to them."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir(), snapshot.mkdir()
    sharded(snapshot)
    for name in set(MAP.values()):
        (snapshot / name).rename(blobs / name)
        (snapshot / name).symlink_to(blobs / name)
    check(open_checkpoint(snapshot))


# ---- what is refused ---------------------------------------------------------------------------------------

WRONG = {
    "path up": ({"weight_map": {"a": "../m-1.safetensors"}}, "names of .safetensors files beside the index"),
    "path down": ({"weight_map": {"a": "sub/m-1.safetensors"}}, "beside the index, got 'sub/m-1"),
    "absolute path": ({"weight_map": {"a": "/etc/passwd"}}, "got '/etc/passwd'"),
    "backslash": ({"weight_map": {"a": "..\\m-1.safetensors"}}, "beside the index"),
    "NUL": ({"weight_map": {"a": "m\0.safetensors"}}, "beside the index"),
    "another kind": ({"weight_map": {"a": "m-1.bin"}}, "names of .safetensors files"),
    "no name": ({"weight_map": {"a": ""}}, "names of .safetensors files"),
    "dots": ({"weight_map": {"a": ".."}}, "names of .safetensors files"),
    "steers a terminal": ({"weight_map": {"a": "\x1b[2J\n/"}}, r"got '\x1b[2J\n/'"),
    "no map": ({}, "weight_map: expected file names by tensor, at least one, got None"),
    "empty map": ({"weight_map": {}}, "at least one, got {}"),
    "map of numbers": ({"weight_map": {"a": 1}}, "expected file names by tensor"),
    "map is a list": ({"weight_map": ["a"]}, "expected file names by tensor"),
    "missing shard": ({"weight_map": {**MAP, "d": "m-3.safetensors"}}, "the shard 'm-3.safetensors' beside"),
    "tensor nowhere": (
        {"weight_map": {**MAP, "d": "m-1.safetensors"}},
        "'d' in 'm-1.safetensors', as",
    ),
    "tensor elsewhere": ({"weight_map": {**MAP, "c": "m-1.safetensors"}}, "the tensor 'c' in 'm-1"),
    "unlisted": ({"weight_map": {"a": MAP["a"], "c": MAP["c"]}}, "every tensor in the index, 'b' of m-1"),
    "total too small": ({**INDEX, "metadata": {"total_size": 47}}, "total_size: expected 48, the bytes"),
    "total true": ({**INDEX, "metadata": {"total_size": True}}, "total_size: expected 48"),
    "total text": ({**INDEX, "metadata": {"total_size": "48"}}, "got '48'"),
}


@pytest.mark.parametrize(("index", "words"), WRONG.values(), ids=WRONG)
def test_an_index_that_is_wrong(tmp_path, index, words):
    assert words in refusal(sharded(tmp_path, index))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("[]", "expected a JSON object, got []"),
        ("{", "expected a JSON object in UTF-8"),
        ('{"a": ' * 10**5, "JSON nested too deep"),
        ('{"weight_map": {"a": "m-1.safetensors", "a": "m-2.safetensors"}}', "the key 'a' twice"),
    ],
)
def test_an_index_that_is_no_object(tmp_path, raw, words):
    assert words in refusal(sharded(tmp_path, raw=raw))


def test_one_tensor_in_two_shards(tmp_path):
    path = sharded(tmp_path)
    write_safetensors(tmp_path / "m-2.safetensors", {"c": C, "a": A})
    assert "each tensor in one shard, 'a' in m-1.safetensors, got it in m-2.safetensors too" in refusal(path)


def test_a_shard_that_is_damaged_is_named(tmp_path):
    path = sharded(tmp_path)
    (tmp_path / "m-2.safetensors").write_bytes(b"x" * 20)
    assert "m-2.safetensors: header length" in refusal(path)


def test_directories_that_hold_no_checkpoint(tmp_path):
    assert "got no such file" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\3\4")
    assert "but the pickle 'pytorch_model.bin', which can run code" in refusal(tmp_path)
    write_safetensors(tmp_path / "x.safetensors", {"a": A})
    write_safetensors(tmp_path / "y.safetensors", {"a": A})
    assert "or one *.safetensors, got 2 of them: x.safetensors, y.safetensors" in refusal(tmp_path)


def test_a_config_that_is_no_object(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"a": A})
    (tmp_path / "config.json").write_text("[1]")
    assert "config.json: expected a JSON object, got [1]" in refusal(tmp_path)


def test_a_missing_path_is_the_systems_own_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "no")


# ---- pages that are let go of ------------------------------------------------------------------------------


def resident(path):
    """Bytes of a file's pages that this process has, as the system counts them; None where it does not say."""
    about = Path("/proc/self/smaps")
    if not about.is_file():
        return None
    found = re.findall(
        rf"^\S+ \S+ \S+ \S+ \S+ +{re.escape(str(path))}\n(?:\w+: .*\n)*?Rss: +(\d+)", about.read_text(), re.M
    )
    return 1024 * sum(map(int, found))


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_pages_that_were_read_are_let_go_of_and_read_again(tmp_path, kind):
    W = np.arange(2**20, dtype=np.float32).reshape(1024, 1024)
    path = tmp_path / f"model.{kind}"
    if kind == "gguf":
        sizes = (
            "embedding_length",
            "feed_forward_length",
            "block_count",
            "context_length",
            "attention.head_count",
        )
        about = {f"llama.{size}": ("uint32", 4) for size in sizes} | {
            "general.architecture": ("string", "llama")
        }
        about["llama.attention.layer_norm_rms_epsilon"] = ("float32", 1e-5)
        write_gguf(path, about, {"blk.0.ffn_up.weight": W})
        name = "model.layers.0.mlp.up_proj.weight"
    else:
        write_safetensors(path, {"w": W})
        name = "w"
    found = open_checkpoint(path)
    array = found[name]
    assert array.sum(dtype="float64") == W.sum(dtype="float64")
    before = resident(path)
    found.release()
    after = resident(path)
    assert before is None or (before >= W.nbytes and after < W.nbytes // 8)
    assert np.array_equal(array, W)
