"""Plain adapters from PiSSA's against PEFT's conversion, and what that drops."""

import json
import warnings

import numpy as np
import pytest
from peft_layers import Sites, peft, to_numpy, to_torch, torch
from safetensors.numpy import load_file

import lorax_np as lx
from lorax_np.config import LoraConfig, site_at
from lorax_np.plain import plain, plain_config

pytestmark = pytest.mark.peft

PREFIX = "base_model.model."
MODULES = {
    "lin": lambda: torch.nn.Linear(7, 6),
    "conv": lambda: torch.nn.Conv2d(3, 4, (3, 2)),
    "emb": lambda: torch.nn.Embedding(9, 5),
    "head": lambda: torch.nn.Linear(4, 2),
}


class Converted:
    """A PEFT adapter saved at its start, trained (every trainable number moved), and saved again, converted."""

    def __init__(self, path, names, **options):
        torch.manual_seed(0)
        targets = [name for name in names if name != "head"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, **options)
            self.model = peft.get_peft_model(Sites(**{name: MODULES[name]() for name in names}), config)
            self.config = LoraConfig.from_dict(json.loads(json.dumps(config.to_dict(), default=list)))
            self.model.peft_config["default"].init_lora_weights = True
            self.model.save_pretrained(path / "start")
            rng = np.random.default_rng(0)
            with torch.no_grad():
                for parameter in self.model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(to_torch(rng.standard_normal(tuple(parameter.shape)).astype("float32")))
            self.model.save_pretrained(path / "now")
            self.start, self.now = (load_file(path / d / "adapter_model.safetensors") for d in ("start", "now"))
            self.model.save_pretrained(
                path / "plain", path_initial_model_for_weight_conversion=str(path / "start")
            )
        self.found = load_file(path / "plain" / "adapter_model.safetensors")
        self.after = json.loads((path / "plain" / "adapter_config.json").read_text())


def record(tensors, name):
    if name == "emb":
        return lx.Adapter(*(tensors[f"{PREFIX}emb.lora_embedding_{part}"] for part in "AB"))
    kind = lx.ConvAdapter if name == "conv" else lx.Adapter
    m = tensors.get(f"{PREFIX}{name}.lora_magnitude_vector")
    return kind(*(tensors[f"{PREFIX}{name}.lora_{part}.weight"] for part in "AB"), m=m)


def delta(adapter, s):
    A, B = (np.asarray(v, "float64") for v in (adapter.A, adapter.B))
    return s * B.reshape(len(B), -1) @ A.reshape(len(A), -1)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("names", [["lin"], ["lin", "conv"]], ids=str)
def test_linear_layers_and_convolutions_are_pefts_to_the_bit(tmp_path, names, use_rslora):
    """PiSSA on the linear layer; PEFT starts a convolution as usual, so its conversion takes 0 off."""
    start = "pissa" if names == ["lin"] else True
    case = Converted(tmp_path, names, init_lora_weights=start, use_rslora=use_rslora)
    for name in names:
        ours, theirs = plain(record(case.now, name), record(case.start, name)), record(case.found, name)
        assert (ours.A == theirs.A).all()
        assert (ours.B == theirs.B).all()
    if names == ["lin"]:
        ours = plain_config(case.config)
        assert (ours.r, ours.lora_alpha) == (case.after["r"], case.after["lora_alpha"])
        assert ours.init_lora_weights is case.after["init_lora_weights"] is True


def test_embeddings_are_dropped_by_peft(tmp_path):
    """peft-0.21.2/pissa-convert: no key of an embedding survives."""
    case = Converted(tmp_path, ["lin", "emb"])
    assert any("embedding" in key for key in case.now)
    assert not any("embedding" in key for key in case.found)
    now, start = record(case.now, "emb"), record(case.start, "emb")
    change = delta(now, 1.5) - delta(start, 1.5)
    ours = delta(plain(now, start), 1.5)
    print(f"peft-0.21.2/pissa-convert: an embedding's update of norm {np.linalg.norm(change):.2g} becomes 0")
    assert np.abs(ours - change).max() <= 64 * 2.0**-52 * 100


def test_the_magnitude_is_dropped_by_peft(tmp_path):
    """peft-0.21.2/pissa-convert: a DoRA adapter comes out with use_dora and no magnitude; ours keeps it."""
    case = Converted(tmp_path, ["lin"], init_lora_weights="pissa", use_dora=True)
    assert case.after["use_dora"] is True
    assert any("magnitude" in key for key in case.now)
    assert not any("magnitude" in key for key in case.found)
    now = record(case.now, "lin")
    assert plain(now, record(case.start, "lin")).m is now.m
    assert plain_config(case.config).use_dora is True


@pytest.mark.parametrize("more", [{"modules_to_save": ["head"]}, {"bias": "all"}], ids=str)
def test_what_is_not_A_or_B_fails_or_is_dropped_in_peft(tmp_path, more):
    """peft-0.21.2/pissa-convert: saved modules and biases; ours passes b through."""
    try:
        case = Converted(tmp_path, ["lin", "head"], init_lora_weights="pissa", **more)
        kept = sorted(key for key in case.now if "lora_" not in key and key in case.found)
        found = f"kept {kept}"
        assert not kept
    except (KeyError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
    print(f"peft-0.21.2/pissa-convert {more}: {found}")
    draw = np.random.default_rng(0).standard_normal
    b = draw(6)
    one, two = (lx.Adapter(draw((2, 7)), draw((6, 2)), b=b) for _ in range(2))
    assert plain(one, two).b is b


def test_patterns_under_rank_stabilisation(tmp_path):
    """peft-0.21.2/pissa-convert: PEFT raises; ours gives every site its scaling."""
    more = {"use_rslora": True, "rank_pattern": {"lin": 3}, "init_lora_weights": "pissa"}
    with pytest.raises(ValueError, match="is not supported when using `rank_pattern`"):
        Converted(tmp_path, ["lin"], **more)
    config = LoraConfig(r=2, lora_alpha=3, **more)
    after = plain_config(config)
    one, two = site_at(config, "lin"), site_at(after, "lin")
    assert two.r == 6
    assert abs(two.scaling - one.scaling) <= 4 * 2.0**-52 * one.scaling


def test_a_magnitude_fits_the_original_weight(tmp_path):
    """V is the same matrix, so m is right for both, without dropout: what PEFT loses is m alone."""
    case = Converted(tmp_path, ["lin"], init_lora_weights="pissa", use_dora=True)
    now, start = record(case.now, "lin"), record(case.start, "lin")
    residual = to_numpy(case.model.base_model.model.lin.base_layer.weight)
    W = residual + 1.5 * start.B @ start.A
    twice = plain(lx.Adapter(now.A, now.B), lx.Adapter(start.A, start.B))
    x = np.random.default_rng(0).standard_normal((5, 7)).astype("float32")
    y, _ = lx.lora_linear_forward(x, lx.Linear(residual), now, scaling=1.5)
    kept, _ = lx.lora_linear_forward(x, lx.Linear(W), lx.Adapter(twice.A, twice.B, m=now.m), scaling=1.5)
    fresh = np.linalg.norm(W, axis=1)  # what a loader finds where the file has no m
    lost, _ = lx.lora_linear_forward(x, lx.Linear(W), lx.Adapter(twice.A, twice.B, m=fresh), scaling=1.5)
    off = np.linalg.norm(lost - y) / np.linalg.norm(y)
    print(f"peft-0.21.2/pissa-convert: without the magnitude the output is off by {off:.2g}")
    assert np.linalg.norm(kept - y) <= 1e-5 * np.linalg.norm(y)
    assert off > 0.01
