"""The base again: from the original, to the byte; or by subtraction, to the bits of lorax_np.unmerge."""

import numpy as np
import pytest
from making import DTYPES, content, factors, read, weights, write_adapter, write_checkpoint

import lorax_np as lx
from lorax_np.io.checkpoint import open_checkpoint
from lorax_np.stream.merge import merge_checkpoint, unmerge_checkpoint

S = 5 / 3
Q = "model.layers.0.self_attn.q_proj"


def made(tmp_path, dtype="bfloat16", *, dora=False, bB=False, more=(), config=(), **kinds):
    rng = np.random.default_rng(0)
    tensors = weights(rng, dtype, **kinds)
    sites = [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]
    parts = {site: factors(rng, tensors[f"{site}.weight"].shape, 3, dora=dora, bB=bB) for site in sites}
    base = write_checkpoint(tmp_path / "base", tensors, shards=2)
    said = {"target_modules": "all-linear", "use_dora": dora, "lora_bias": bB, **dict(config)}
    adapter = write_adapter(tmp_path / "adapter", parts | dict(more), **said)
    merge_checkpoint(base, adapter, tmp_path / "merged")
    return base, adapter, tmp_path / "merged", parts


@pytest.mark.parametrize("dtype", DTYPES)
def test_by_subtraction(tmp_path, dtype):
    base, adapter, merged, parts = made(tmp_path, dtype, bB=True)
    found = unmerge_checkpoint(merged, adapter, tmp_path / "out")
    got, there, old = read(tmp_path / "out"), read(merged), read(base)
    for site, part in parts.items():
        record = lx.Adapter(part["lora_A.weight"], part["lora_B.weight"], bB=part["lora_B.bias"])
        W = lx.Linear(there[f"{site}.weight"], there[f"{site}.bias"])
        want = lx.unmerge(W, record, scaling=S)
        assert got[f"{site}.weight"].tobytes() == np.ascontiguousarray(want.W).tobytes()
        assert got[f"{site}.bias"].tobytes() == np.asarray(want.b).tobytes()
        lost = np.abs(got[f"{site}.weight"].astype(float) - old[f"{site}.weight"].astype(float))
        bits = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}[dtype]
        sizes = np.abs(W.W.astype(float)) + np.abs(old[f"{site}.weight"].astype(float))
        assert (lost <= sizes * 2.0**-bits + 2.0**-24).all()  # (merge.7)
    assert got["model.rotary.ids"].tobytes() == old["model.rotary.ids"].tobytes()
    assert any("(merge.7)" in note for note in found.notes)


@pytest.mark.parametrize("dora", [False, True])
def test_from_the_original(tmp_path, dora):
    base, adapter, merged, _ = made(tmp_path, dora=dora)
    unmerge_checkpoint(merged, adapter, tmp_path / "out", original=base)
    assert content(tmp_path / "out") == content(base)


def test_from_the_original_with_ends_that_became_two(tmp_path):
    rng = np.random.default_rng(1)
    tensors = weights(rng, head=False)
    base = write_checkpoint(tmp_path / "base", tensors, config={"tie_word_embeddings": True})
    adapter = write_adapter(
        tmp_path / "adapter", {"lm_head": factors(rng, (56, 24), 3)}, target_modules=["lm_head"]
    )
    merge_checkpoint(base, adapter, tmp_path / "merged")
    assert "lm_head.weight" in read(tmp_path / "merged")
    found = unmerge_checkpoint(tmp_path / "merged", adapter, tmp_path / "out", original=base)
    assert content(tmp_path / "out")["model.safetensors"] == content(base)["model.safetensors"]
    assert open_checkpoint(tmp_path / "out").config == open_checkpoint(base).config
    assert any("lm_head.weight is left out" in note for note in found.notes)


LOST = {
    "dora": ({"dora": True}, "the norms of DoRA are those of before"),
    "bias": (
        {
            "more": {f"{Q}.base_layer.bias": np.ones(24, np.float32)},
            "config": {"bias": "lora_only"},
        },
        "a trained bias took its place",
    ),
    "saved": (
        {"more": {"lm_head.weight": np.ones((56, 24), np.float32)}, "config": {"modules_to_save": ["lm_head"]}},
        "the adapter's own tensor took its place",
    ),
}


@pytest.mark.parametrize(("how", "words"), LOST.values(), ids=LOST)
def test_what_subtraction_cannot_bring_back(tmp_path, how, words):
    base, adapter, merged, _ = made(tmp_path, **how)
    with pytest.raises(lx.ConfigError, match=f"original: expected the base of before for .*{words}"):
        unmerge_checkpoint(merged, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    unmerge_checkpoint(merged, adapter, tmp_path / "out", original=base)
    assert content(tmp_path / "out") == content(base)
