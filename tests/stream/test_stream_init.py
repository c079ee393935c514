"""A start for a whole checkpoint, against lorax_np.inject of all of it at once."""

import json

import numpy as np
import pytest
from making import content, read, weights, write_checkpoint

import lorax_np as lx
from lorax_np.config import LoraConfig
from lorax_np.inject import inject
from lorax_np.io.checkpoint import open_checkpoint
from lorax_np.io.peft import load_adapter
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
