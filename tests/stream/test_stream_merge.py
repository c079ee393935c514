"""A checkpoint merged file by file, against lorax_np.merge of each weight as a whole."""

import numpy as np
import pytest
from making import DTYPES, content, factors, read, weights, write_adapter, write_checkpoint

import lorax_np as lx
from lorax_np.stream import work
from lorax_np.stream.merge import merge_checkpoint

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
S = 5 / 3


def sites(tensors, ends=PROJECTIONS):
    return [
        name.removesuffix(".weight") for name in tensors if name.endswith(tuple(f"{e}.weight" for e in ends))
    ]


def same(got, want):
    """Equal, bit for bit, dtype included."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    return got.tobytes() == np.ascontiguousarray(want).tobytes()


def pair(
    tmp_path, dtype="bfloat16", *, seed=0, shards=1, dora=False, bB=False, adapter_dtype=np.float32, **more
):
    """A checkpoint, an adapter on all its projections, and what merge makes of them."""
    rng = np.random.default_rng(seed)
    tensors = weights(rng, dtype, **more)
    parts = {
        site: factors(
            rng,
            tensors[f"{site}.weight"].shape,
            3,
            dtype=adapter_dtype,
            dora=dora,
            bB=bB,
        )
        for site in sites(tensors)
    }
    base = write_checkpoint(tmp_path / "base", tensors, shards=shards)
    adapter = write_adapter(
        tmp_path / "adapter", parts, target_modules=PROJECTIONS, use_dora=dora, lora_bias=bB, lora_alpha=5
    )
    want = dict(tensors)
    for site, part in parts.items():
        record = lx.Adapter(
            part["lora_A.weight"],
            part["lora_B.weight"],
            m=part.get("lora_magnitude_vector"),
            bB=part.get("lora_B.bias"),
        )
        merged = lx.merge(lx.Linear(tensors[f"{site}.weight"], tensors.get(f"{site}.bias")), record, scaling=S)
        want[f"{site}.weight"] = merged.W
        if f"{site}.bias" in tensors:
            want[f"{site}.bias"] = merged.b
    return base, adapter, want


@pytest.fixture(params=[1 << 17, 200], ids=["whole", "blocks"])
def blocks(request, monkeypatch):
    """Weights in one block, and in blocks of a few rows, several to a unit."""
    monkeypatch.setattr(work, "BLOCK", request.param)
    monkeypatch.setattr(work, "UNIT", 4 * request.param if request.param < 1000 else work.UNIT)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_values_are_those_of_merge(tmp_path, blocks, dtype, dora, shards):
    base, adapter, want = pair(tmp_path, dtype, dora=dora, bB=not dora, shards=shards)
    before = content(base)
    found = merge_checkpoint(base, adapter, tmp_path / "out")
    got = read(tmp_path / "out")
    assert list(got) == list(read(base))
    assert [name for name in want if not same(got[name], want[name])] == []
    assert content(base) == before
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == set(before) == set(found.files)
    for name in ("config.json", "tokenizer.json"):
        assert content(tmp_path / "out")[name] == before[name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]
