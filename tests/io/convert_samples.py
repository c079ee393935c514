"""Adapters and a small base to convert: every tensor drawn, α ≠ r, sizes that all differ."""

import json
from dataclasses import fields, replace

import numpy as np

from lorax_np.backend import to_host
from lorax_np.config import LoraConfig, site_at
from lorax_np.io.convert.model import AdapterFiles
from lorax_np.io.peft import save_adapter
from lorax_np.io.writer import write_safetensors
from lorax_np.params import Adapter, ConvAdapter

HEADS, KV, HEAD, D, FF, VOCAB, LAYERS = 4, 2, 6, 10, 14, 17, 3
CONFIG = {
    "model_type": "llama",
    "hidden_size": D,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": HEAD,
    "num_hidden_layers": LAYERS,
    "tie_word_embeddings": False,
}
LINEAR = {
    "self_attn.q_proj": (HEADS * HEAD, D),
    "self_attn.k_proj": (KV * HEAD, D),
    "self_attn.v_proj": (KV * HEAD, D),
    "self_attn.o_proj": (D, HEADS * HEAD),
    "mlp.gate_proj": (FF, D),
    "mlp.up_proj": (FF, D),
    "mlp.down_proj": (D, FF),
}
SHAPES = {f"model.layers.{n}.{name}": shape for n in range(LAYERS) for name, shape in LINEAR.items()}
SHAPES |= {"lm_head": (VOCAB, D)}
EMBED = "model.embed_tokens"


def base(folder, **changes):
    """A checkpoint of a small llama, whose config may be changed; None takes a key away."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(9)
    arrays = {f"{name}.weight": rng.standard_normal(shape) for name, shape in SHAPES.items()}
    arrays[f"{EMBED}.weight"] = rng.standard_normal((VOCAB, D))
    arrays["model.norm.weight"] = rng.standard_normal(D)
    bias = changes.pop("bias", None)
    if bias:
        arrays[f"{bias}.bias"] = rng.standard_normal(SHAPES[bias][0])
    write_safetensors(folder / "model.safetensors", {k: v.astype(np.float32) for k, v in arrays.items()})
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def files(names, config, *, dtype=np.float32, seed=0, embedding=False):
    """Adapters at these names of the base, as the config says."""
    draw = np.random.default_rng(seed).standard_normal
    config = replace(config, target_modules=[*names, *([EMBED] if embedding else [])])
    adapters, sites = {}, {}
    for name in names:
        site = site_at(config, name)
        d_out, d_in = SHAPES[name]
        m = np.abs(draw(d_out)).astype(dtype) + dtype(0.5) if config.use_dora else None
        adapters[name] = Adapter(draw((site.r, d_in)).astype(dtype), draw((d_out, site.r)).astype(dtype), m=m)
        sites[name] = site
    if embedding:
        sites[EMBED] = site_at(config, EMBED, kind="embedding")
        r = sites[EMBED].r
        adapters[EMBED] = Adapter(draw((r, VOCAB)).astype(dtype), draw((D, r)).astype(dtype))
    return AdapterFiles(adapters, config, sites, {}, {})


def conv_files(shapes, config, dtype=np.float32):
    """Adapters of convolutions, W : (d_out, d_in, *kernel), and of linear layers."""
    draw = np.random.default_rng(1).standard_normal
    config = replace(config, target_modules=list(shapes))
    adapters, sites = {}, {}
    for name, shape in shapes.items():
        kind = "conv" if len(shape) > 2 else "linear"
        sites[name] = site_at(config, name, kind=kind)
        r = sites[name].r
        A = draw((r, *shape[1:])).astype(dtype)
        B = draw((shape[0], r, *(1,) * (len(shape) - 2))).astype(dtype)
        adapters[name] = ConvAdapter(A, B) if kind == "conv" else Adapter(A, B)
    return AdapterFiles(adapters, config, sites, {}, {})


def saved(folder, what):
    """The files as PEFT has them."""
    save_adapter(folder, what.adapters, what.config, sites=what.sites, saved=what.saved)
    return folder


def assert_same(got, want, *, scalings=True):
    """The same sites, the same bits of every part, the same s."""
    assert set(got.adapters) == set(want.adapters)
    for name, adapter in want.adapters.items():
        assert type(got.adapters[name]) is type(adapter)
        for field in fields(adapter):
            ours, theirs = getattr(got.adapters[name], field.name), getattr(adapter, field.name)
            assert (ours is None) == (theirs is None), (name, field.name)
            if theirs is not None:
                assert ours.dtype == theirs.dtype
                assert ours.shape == theirs.shape, (name, field.name)
                assert to_host(ours).tobytes() == np.ascontiguousarray(theirs).tobytes(), (name, field.name)
        assert got.sites[name].kind == want.sites[name].kind
        assert got.sites[name].r == want.sites[name].r
        if scalings:
            assert got.sites[name].scaling == want.sites[name].scaling, name


def delta(what, name):
    """s·BA in float64, as W lies: (vocab, dim) for an embedding, W's own shape for a convolution."""
    adapter, site = what.adapters[name], what.sites[name]
    A, B = to_host(adapter.A).astype(np.float64), to_host(adapter.B).astype(np.float64)
    if A.ndim > 2:
        return site.scaling * np.tensordot(B.reshape(B.shape[:2]), A, axes=1)
    found = site.scaling * B @ A
    return found.T if site.kind == "embedding" else found


def default_config(**changes):
    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], **changes})
