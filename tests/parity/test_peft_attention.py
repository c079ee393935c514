"""An attention module with q, k and v in one parameter, adapted as PEFT adapts nn.MultiheadAttention."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from peft_layers import nn, peft, torch

import lorax_np as lx
from lorax_np.inject import inject, plan, saved_tensors
from lorax_np.io.checkpoint import open_checkpoint
from lorax_np.io.peft import load_adapter, save_adapter
from lorax_np.io.writer import write_safetensors
from lorax_np.stream.init import init_checkpoint
from lorax_np.stream.merge import merge_checkpoint, unmerge_checkpoint

pytestmark = pytest.mark.peft
D = 12

CASES = [
    {"target_modules": ["up", "attn", "down"]},
    {"target_modules": ["attn"], "bias": "lora_only", "use_rslora": True},
    {"target_modules": ["attn", "down"], "rank_pattern": {"attn": 2}, "alpha_pattern": {"attn": 7}},
    {"target_modules": ["attn", "up"], "init_lora_weights": False, "bias": "all"},
    {"target_modules": r".*\.0\.attn|up", "layers_to_transform": None},
    {"target_modules": "all-linear"},
]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(D, 2, batch_first=True)
        self.norm = nn.LayerNorm(D)

    def forward(self, x):
        return self.norm(x + self.attn(x, x, x, need_weights=False)[0])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(5, D)
        self.layers = nn.ModuleList([Block(), Block()])
        self.down = nn.Linear(D, 3, bias=False)

    def forward(self, x):
        x = self.up(x)
        for layer in self.layers:
            x = layer(x)
        return self.down(x)


def pair(fields, seed=4):
    """A net, its weights, and the same net under PEFT, whose adapters are drawn from that seed."""
    torch.manual_seed(0)
    net = Net()
    for parameter in net.parameters():
        nn.init.normal_(parameter.data, std=0.4)
    weights = {name: value.numpy().copy() for name, value in net.state_dict().items()}
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(r=4, lora_alpha=6, **fields))
    return net, weights, adapted.eval()


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_places_counts_and_bits_are_those_of_peft(tmp_path, fields):
    _, weights, adapted = pair(fields)
    config = lx.LoraConfig(r=4, lora_alpha=6, **fields)
    found = plan(weights, config)
    assert (found.trainable, found.total) == adapted.get_nb_trainable_parameters()
    _, adapters, sites = inject(weights, config, lx.torch_generator(4))
    save_adapter(tmp_path / "ours", adapters, config, sites=sites, saved=saved_tensors(weights, found))
    adapted.save_pretrained(tmp_path / "peft")
    ours, theirs = (lx.open_safetensors(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "peft"))
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        assert np.array_equal(ours[key], value), key
    again = load_adapter(tmp_path / "peft", weights=weights)
    assert again.sites == sites


def test_started_on_a_checkpoint_trained_saved_merged_and_back(tmp_path):
    """PEFT's forward adds out_proj's update twice (peft-0.21.2/attention-out-twice): torch alone judges."""
    net, weights, _ = pair({"target_modules": ["attn"]})
    (tmp_path / "base").mkdir()
    write_safetensors(tmp_path / "base" / "model.safetensors", weights)
    config = lx.LoraConfig(r=4, lora_alpha=6, target_modules=["attn", "up"])
    init_checkpoint(tmp_path / "base", config, tmp_path / "start", seed=4)
    files = load_adapter(tmp_path / "start", weights=weights)
    rng = np.random.default_rng(1)
    adapters = {
        name: lx.Adapter(adapter.A, rng.standard_normal(adapter.B.shape).astype("float32"))
        for name, adapter in files.adapters.items()
    }
    assert adapters["layers.1.attn"].B.shape == (3 * D, 4)
    said = replace(files.config, base_model_name_or_path=None)
    save_adapter(tmp_path / "adapter", adapters, said, sites=files.sites)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = {name: torch.from_numpy(np.array(v)) for name, v in open_checkpoint(tmp_path / "merged").items()}
    with torch.no_grad():
        for name, adapter in adapters.items():
            weight = dict(net.named_parameters())[files.sites[name].weight]
            weight += 1.5 * torch.from_numpy(adapter.B.astype("float64") @ adapter.A.astype("float64"))
    for name, value in net.state_dict().items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=2e-6)
    unmerge_checkpoint(tmp_path / "merged", tmp_path / "adapter", tmp_path / "back", original=tmp_path / "base")
    raw = [(tmp_path / place / "model.safetensors").read_bytes() for place in ("base", "back")]
    assert raw[0] == raw[1]
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path / "adapter")
    for name, value in peft.get_peft_model_state_dict(loaded).items():
        key = name.removeprefix("base_model.model.").replace("base_layer.", "")
        site, part = key.split(".lora_")
        assert np.array_equal(getattr(adapters[site], part[0]), value.numpy())


@pytest.mark.parametrize(
    ("more", "theirs"),
    [({"use_dora": True}, "does not support DoRA"), ({"modules_to_save": ["out_proj"]}, "is a child of")],
)
def test_what_peft_refuses(more, theirs):
    fields = {"target_modules": ["attn"], **more}
    with pytest.raises(ValueError, match=theirs):
        pair(fields)
    with pytest.raises(lx.ConfigError, match=f"^{next(iter(more))}: expected .* an attention module"):
        plan({n: v.detach().numpy() for n, v in Net().state_dict().items()}, lx.LoraConfig(r=4, **fields))


def test_a_pattern_that_names_the_output_is_not_asked(tmp_path):
    """PEFT warns and gives the output its module's rank; ours refuses to start so, and loads what is there."""
    fields = {"target_modules": ["attn"], "rank_pattern": {"out_proj": 2}}
    with pytest.warns(RuntimeWarning, match=r"rank_pattern keys did not match .*'out_proj'"):
        _, weights, adapted = pair(fields)
    with pytest.raises(lx.ConfigError, match="rank_pattern: expected keys that fit sites, got 'out_proj'"):
        plan(weights, lx.LoraConfig(r=4, lora_alpha=6, **fields))
    adapted.save_pretrained(tmp_path)
    files = load_adapter(tmp_path, weights=weights)
    assert {(site.r, site.scaling) for site in files.sites.values()} == {(4, 1.5)}
    assert files.adapters["layers.0.attn.out_proj"].A.shape == (4, D)
