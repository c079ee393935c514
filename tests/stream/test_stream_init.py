"""A start for a whole checkpoint, against lorax_np.inject of all of it at once."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from making import content, read, weights, write_checkpoint

import lorax_np as lx
from lorax_np.config import LoraConfig
from lorax_np.inject import inject
from lorax_np.inject import plan as plan_of
from lorax_np.io.checkpoint import open_checkpoint
from lorax_np.io.peft import load_adapter
from lorax_np.io.writer import write_safetensors
from lorax_np.stream.init import init_checkpoint
from lorax_np.stream.merge import merge_checkpoint

STARTS = [True, "gaussian", "pissa", "pissa_niter_2", "olora", "orthogonal"]


@pytest.mark.parametrize("start", STARTS, ids=str)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_arrays_are_those_of_inject(tmp_path, start, shards, dora):
    tensors = weights(np.random.default_rng(0), "float32")
    base = write_checkpoint(tmp_path / "base", tensors, shards=shards)
    config = LoraConfig(4, 6, target_modules="all-linear", init_lora_weights=start, use_dora=dora)
    seen = []
    found = init_checkpoint(
        base, config, tmp_path / "out", seed=3, progress=lambda done, total: seen.append((done, total))
    )
    new, adapters, sites = inject(open_checkpoint(base), config, lx.torch_generator(3))
    residual = start in ("pissa", "pissa_niter_2", "olora")
    got = load_adapter(tmp_path / "out", residual_base=residual)
    assert got.sites == sites
    for name, adapter in adapters.items():
        for part in ("A", "B", "m"):
            want, have = getattr(adapter, part), getattr(got.adapters[name], part)
            assert (want is None) == (have is None)
            assert want is None or np.array_equal(want, have)
    assert (found.base is not None) == residual
    if residual:
        left = read(tmp_path / "out" / "base")
        assert all(np.array_equal(left[name], new[name]) for name in tensors)
        assert {*content(tmp_path / "out" / "base")} == {*content(base)}
        assert got.config.base_model_name_or_path == str((tmp_path / "out" / "base").resolve())
    else:
        assert not (tmp_path / "out" / "base").exists()
        assert got.config.base_model_name_or_path == str(base)
    assert seen[-1][0] == seen[-1][1]
    assert len(seen) == len(sites) == found.sites
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_rest_and_the_adapter_merge_to_the_base(tmp_path, start):
    """The residual checkpoint says itself what it is, and what is merged from it no longer does."""
    tensors = weights(np.random.default_rng(1), "float32")
    base = write_checkpoint(tmp_path / "base", tensors, shards=2)
    init_checkpoint(
        base, LoraConfig(4, 6, target_modules=["q_proj"], init_lora_weights=start), tmp_path / "out"
    )
    with pytest.raises(lx.FormatError, match="expected the base weights that this start"):
        merge_checkpoint(base, tmp_path / "out", tmp_path / "wrong")
    merge_checkpoint(tmp_path / "out" / "base", tmp_path / "out", tmp_path / "merged")
    for name, value in read(tmp_path / "merged").items():
        np.testing.assert_allclose(value, tensors[name], rtol=0, atol=2**-23)
    assert all(
        file.metadata == {"format": "pt"} for file in open_checkpoint(tmp_path / "merged").shards.values()
    )
    with pytest.raises(lx.FormatError, match="expected the base weights"):
        merge_checkpoint(tmp_path / "merged", tmp_path / "out", tmp_path / "again")


def test_what_trains_beside_the_adapters(tmp_path):
    tensors = weights(np.random.default_rng(2), "float32")
    base = write_checkpoint(tmp_path / "base", tensors)
    config = LoraConfig(
        2,
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
        bias="lora_only",
        trainable_token_indices=[5, 2],
    )
    init_checkpoint(base, config, tmp_path / "out")
    got = load_adapter(tmp_path / "out")
    assert np.array_equal(got.saved["lm_head.weight"], tensors["lm_head.weight"])
    rows = got.saved["model.embed_tokens.token_adapter.trainable_tokens_delta"]
    assert np.array_equal(rows, tensors["model.embed_tokens.weight"][[5, 2]])
    q = "model.layers.1.self_attn.q_proj"
    assert np.array_equal(got.adapters[q].b, tensors[f"{q}.bias"])
    merge_checkpoint(base, tmp_path / "out", tmp_path / "same")
    assert content(tmp_path / "same")["model.safetensors"] == content(base)["model.safetensors"]


def test_nothing_is_left_of_a_start_that_fails(tmp_path):
    tensors = weights(np.random.default_rng(3), "float32")
    tensors["model.layers.1.mlp.down_proj.weight"][3] = np.inf
    base = write_checkpoint(tmp_path / "base", tensors)
    config = LoraConfig(2, target_modules="all-linear", init_lora_weights="pissa")
    with pytest.raises(lx.ConfigError, match=r"layers\.1\.mlp\.down_proj: "):
        init_checkpoint(base, config, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    dry = init_checkpoint(base, config, tmp_path / "out", dry_run=True)
    assert dry.dry
    assert json.dumps(dry.to_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    for place in (base, base / "x"):
        with pytest.raises(lx.ConfigError, match="out: expected a place outside"):
            init_checkpoint(base, config, place)


# ---- going on ----------------------------------------------------------------------------------------------


class Stop(BaseException):
    """As an interrupt: no Exception."""


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """What stops a start after so many sites, each recorded at once; and the bytes of one that goes through."""
    monkeypatch.setattr("lorax_np.stream.begun.EVERY", 0.0)
    monkeypatch.setattr("os.fsync", lambda file: None)  # the machine goes on, and the tests are faster
    base = write_checkpoint(tmp_path / "base", weights(np.random.default_rng(0), "float32"), shards=2)

    def stop(after, start, **more):
        config = LoraConfig(4, 6, target_modules="all-linear", init_lora_weights=start, bias="all")
        init_checkpoint(base, config, tmp_path / "out", **more)
        want = content(tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
        seen = []

        def progress(done, total):
            seen.append(done)
            if len(seen) == after:
                raise Stop

        with pytest.raises(Stop):
            init_checkpoint(base, config, tmp_path / "out", progress=progress, **more)
        return base, config, tmp_path / "out", want

    return stop


@pytest.mark.parametrize("start", STARTS, ids=str)
def test_after_an_interrupt_it_goes_on_after_the_sites_that_were_started(tmp_path, interrupted, start):
    """With the numbers that the source of random values would have given next."""
    base, config, out, want = interrupted(5, start, seed=7)
    assert {path.name for path in tmp_path.iterdir()} == {"base", ".out.part"}
    seen = []
    found = init_checkpoint(base, config, out, seed=7, progress=lambda done, total: seen.append((done, total)))
    assert found.resumed == 5
    assert content(out) == want
    assert len(seen) == found.sites - 5
    assert seen[-1][0] == seen[-1][1]
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ("seed", 0),
        ("config", 0),
        ("base", 0),
        ("no resume", 0),
        ("sites", 2),
        ("rest", 3),
        ("cut line", 4),
        ("line", 5),
    ],
)
def test_what_was_started_is_trusted_only_as_far_as_it_is_the_same(interrupted, change, kept):
    base, config, out, want = interrupted(5, "pissa")
    begun, more = out.parent / ".out.part" / "begun", {}
    sites = list(plan_of(open_checkpoint(base), config).sites)
    if change == "seed":
        more = {"seed": 1}
    elif change == "config":
        config = replace(config, lora_alpha=7)
    elif change == "base":
        os.utime(next(base.glob("*1-of*.safetensors")), ns=(1, 1))
    elif change == "no resume":
        more = {"resume": False}
    elif change == "sites":
        flip(begun / "sites-000002.safetensors", -1)
    elif change == "rest":
        name = f"{sites[3]}.weight"
        shard = open_checkpoint(base).shard(name)
        flip(begun / shard.path.name, place_in(out, want, shard.path.name, name))
    elif change == "line":
        with (begun / "sites.record").open("a") as file:
            file.write('{"sites": 3, "file": "sites-000004.safetensors", "rng": null}\n{"sites": null}\n')
    else:
        (begun / "sites.record").write_bytes((begun / "sites.record").read_bytes()[:-1])
    found = init_checkpoint(base, config, out, **more)
    assert found.resumed == kept
    if change in ("seed", "config"):
        shutil.rmtree(out)
        init_checkpoint(base, config, out, **more)
        assert found.resumed == 0
    else:
        assert content(out) == want


def test_another_start_at_the_same_place_finds_nothing_of_the_first(interrupted):
    base, config, out, _ = interrupted(5, "pissa")
    assert (out.parent / ".out.part" / "whole" / "base").is_dir()
    found = init_checkpoint(base, replace(config, init_lora_weights=True), out)
    assert (found.base, found.resumed) == (None, 0)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def flip(path, at):
    """Change a bit of one byte of a file."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def place_in(out, want, file, name):
    """Where a tensor begins in a file of the rest, whose header has a word more than the base's."""
    whole = out.parent / "whole"
    whole.mkdir()
    (whole / file).write_bytes(want[f"base/{file}"])
    found = open_checkpoint(whole / file).shard(name).place(name)[0]
    shutil.rmtree(whole)
    return found


@pytest.mark.parametrize("kind", ["arrays", "file", "batches"])
def test_data_is_known_again_where_it_can_be(tmp_path, interrupted, kind):
    rng = np.random.default_rng(1)
    base = tmp_path / "base"
    shapes = {n: a.shape for n, a in weights(np.random.default_rng(0), "float32").items()}
    names = [n.removesuffix(".weight") for n in shapes if n.endswith("_proj.weight")]
    arrays = {n: rng.standard_normal((40, shapes[f"{n}.weight"][1])).astype("float32") for n in names}
    write_safetensors(tmp_path / "data", arrays)
    given = {
        "arrays": lambda: arrays,
        "file": lambda: lx.open_safetensors(tmp_path / "data"),
        "batches": lambda: Fresh(arrays),
    }[kind]
    base, config, out, want = interrupted(5, "eva", inputs=given())
    found = init_checkpoint(base, config, out, inputs=given())
    assert found.resumed == (0 if kind == "batches" else 5)
    assert content(out) == want


class Fresh(dict):
    """Batches by site, which can be read once: new ones at each look."""

    def __getitem__(self, name):
        return iter(np.split(super().__getitem__(name), 2))

    def get(self, name, default=None):
        return self[name] if name in self.keys() else default

    def items(self):
        return ((name, self[name]) for name in self)


def test_other_numbers_in_the_data_are_other_work(tmp_path, interrupted):
    shapes = {n: a.shape for n, a in weights(np.random.default_rng(0), "float32").items()}
    names = [n.removesuffix(".weight") for n in shapes if n.endswith("_proj.weight")]
    rng = np.random.default_rng(1)
    arrays = {n: rng.standard_normal((40, shapes[f"{n}.weight"][1])).astype("float32") for n in names}
    base, config, out, want = interrupted(5, "eva", inputs=arrays)
    arrays[names[-1]][3, 1] += 1
    assert init_checkpoint(base, config, out, inputs=arrays).resumed == 0
    assert content(out) != want


def test_a_place_that_holds_something_is_refused(tmp_path):
    base = write_checkpoint(tmp_path / "base", weights(np.random.default_rng(0), "float32"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(lx.ConfigError, match="which holds something"):
        init_checkpoint(base, LoraConfig(2, target_modules=["q_proj"]), tmp_path / "out")
    assert content(tmp_path / "out") == {"mine": b"x"}
    assert init_checkpoint(base, LoraConfig(2, target_modules=["q_proj"]), tmp_path / "new" / "out").sites == 2
