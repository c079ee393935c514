"""A llama of transformers with PEFT's adapters, in float64 throughout, as tests compare themselves with it.

transformers computes norms, positions and the loss in float32 even for a float64 model; left as it is,
agreement ends at 1e-6, which a real fault could hide behind. Here norms and positions are replaced by float64
ones, written out again from their definitions, and the loss is taken from the logits; attention is torch's own.

Importing this module skips the tests, with a reason, where torch or PEFT 0.21.2 is not installed.
"""

import types
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

import lorax_np as lx
from lorax_np.models.records import Batch, Trained
from lorax_np.models.tasks import trained_of
from lorax_np.ops.rope import rope_frequencies
from lorax_np.random import site_key
from tests.parity.peft_layers import peft, torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers as T

T.logging.set_verbosity_error()

KINDS = {
    "llama": (T.LlamaConfig, "Llama"),
    "mistral": (T.MistralConfig, "Mistral"),
    "qwen2": (T.Qwen2Config, "Qwen2"),
    "qwen3": (T.Qwen3Config, "Qwen3"),
}
SIZES = {
    "hidden_size": 18,
    "intermediate_size": 22,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 29,
    "max_position_embeddings": 64,
    "attn_implementation": "sdpa",
}


def tiny(kind: str = "llama", head: str = "ForCausalLM", seed: int = 0, **changed: Any) -> Any:
    """A tiny model with random weights, in float64; norms and biases too are random."""
    make, name = KINDS[kind]
    torch.manual_seed(seed)
    model = getattr(T, f"{name}{head}")(make(**SIZES | changed)).double().eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("norm.weight"):
                value.copy_(1 + 0.2 * torch.randn_like(value))
            elif key.endswith("bias"):
                value.normal_(0, 0.2)
            else:
                value.normal_(0, 0.3)
    return model


def exact(model: Any) -> Any:
    """The same model, its norms and positions computed in the dtype it has."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(_norm, module)
        if hasattr(module, "inv_freq"):
            module.forward = types.MethodType(_positions, module)
    return model


def _norm(self: Any, x: Any) -> Any:
    return self.weight * (x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt())


def _positions(self: Any, x: Any, position_ids: Any) -> Any:
    """cos and sin of angles that are rounded to x's dtype, and no sooner."""
    config = self.config
    rope = config.rope_parameters
    frequencies, factor = rope_frequencies(_head_dim(config), theta=rope["rope_theta"], scaling=rope)
    angles = position_ids[..., None].double() * torch.tensor(frequencies, dtype=torch.float64)
    both = torch.cat((angles, angles), dim=-1)
    return (factor * both.cos()).to(x.dtype), (factor * both.sin()).to(x.dtype)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def ours(model: Any, **options: Any) -> lx.Model:
    """The model here, of a torch model's weights and config."""
    from lorax_np.models.load import model_of

    weights = {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return model_of(weights, model.config.to_dict(), **options)


# ---- batches -----------------------------------------------------------------------------------------------


def batch(lengths: tuple[int, ...], vocab: int, seed: int = 0, first: int = 5) -> Batch:
    """Sequences of some lengths; labels are the next ids, with some of them ignored."""
    rng = np.random.default_rng(seed)
    starts = tuple(int(n) for n in np.cumsum((0, *lengths)))
    ids = rng.integers(0, vocab, starts[-1])
    labels = np.where(rng.random(len(ids)) < 0.25, -100, np.roll(ids, -1))
    labels[np.array(starts[1:]) - 1] = -100
    return Batch(ids, starts, labels, tuple(range(first, first + len(lengths))))


class Padded(NamedTuple):
    """The same sequences as transformers takes them: one below another, padded on the right."""

    ids: Any  # (S, T)
    mask: Any  # (S, T)  1 for tokens

    @classmethod
    def of(cls, b: Batch) -> "Padded":
        lengths = b.rows.lengths
        ids = np.zeros((len(lengths), max(lengths)), dtype="int64")
        mask = np.zeros_like(ids)
        for i, n in enumerate(lengths):
            ids[i, :n], mask[i, :n] = b.ids[b.starts[i] : b.starts[i + 1]], 1
        return cls(torch.from_numpy(ids), torch.from_numpy(mask))

    def rows(self, values: Any) -> Any:
        """Of (S, T, ...) the rows of tokens: (N, ...)."""
        return values[self.mask.bool()]


def logits(model: Any, b: Batch) -> Any:
    """(N, V) of tokens, without padding."""
    p = Padded.of(b)
    return p.rows(model(input_ids=p.ids, attention_mask=p.mask).logits)


def causal(model: Any, b: Batch, n: int) -> Any:
    """The loss, summed over labels and divided by n."""
    labels = torch.from_numpy(np.asarray(b.labels))
    return torch.nn.functional.cross_entropy(logits(model, b), labels, ignore_index=-100, reduction="sum") / n


# ---- PEFT --------------------------------------------------------------------------------------------------


def adapted(model: Any, folder: Any, seed: int = 1, size: float = 0.2, **options: Any) -> Any:
    """PEFT's model, everything that trains moved off its start, to float32's numbers, and saved to a folder."""
    dtype = next(model.parameters()).dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = exact(peft.get_peft_model(model, peft.LoraConfig(**options)).to(dtype).eval())
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in found.parameters():
                if value.requires_grad:
                    moved = value.float() + size * torch.randn(value.shape, generator=generator)
                    value.copy_(moved.to(dtype))
        found.save_pretrained(folder)
    return found


def trained(folder: Any) -> tuple[dict[str, lx.Site], Trained]:
    """What PEFT saved, as sites and what trains."""
    files = lx.load_adapter(folder)
    return files.sites, trained_of(files)


PARTS = {
    "lora_A.default.weight": "A",
    "lora_B.default.weight": "B",
    "lora_B.default.bias": "bB",
    "lora_magnitude_vector.default.weight": "m",
    "lora_embedding_A.default": "A",
    "lora_embedding_B.default": "B",
    "base_layer.bias": "b",
}


def gradients(model: Any) -> dict[tuple[str, str], np.ndarray]:
    """PEFT's gradients by (site, part), and by (name, "") for tensors that train whole."""
    found = {}
    for name, value in model.named_parameters():
        if not value.requires_grad:
            continue
        plain = name.removeprefix("base_model.model.")
        g = (torch.zeros_like(value) if value.grad is None else value.grad).numpy()
        end = next((end for end in PARTS if plain.endswith(f".{end}")), None)
        if end is None:
            plain = plain.replace(".modules_to_save.default", "")
            plain = plain.replace(".trainable_tokens_delta.default", ".trainable_tokens_delta")
            found[plain, ""] = g
        else:
            found[plain.removesuffix(f".{end}"), PARTS[end]] = g
    return found


Gradients = Mapping[tuple[str, str], np.ndarray]


def same(got: Trained, want: Gradients) -> dict[tuple[str, str], float]:
    """Distances of all gradients, each relative to the largest entry of its tensor; every one is there."""
    return {key: float(np.abs(g - w).max() / np.abs(w).max()) for key, (g, w) in _pairs(got, want).items()}


def norms(got: Trained, want: Gradients) -> dict[tuple[str, str], float]:
    """The same by Euclid's norm of each tensor."""
    norm = np.linalg.norm
    return {key: float(norm(g - w) / norm(w)) for key, (g, w) in _pairs(got, want).items()}


def _pairs(got: Trained, want: Gradients) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    have = {(name, ""): value for name, value in got.saved.items()}
    for name, adapter in got.adapters.items():
        for part in ("A", "B", "m", "b", "bB"):
            value = getattr(adapter, part)
            alone = part == "b" and (name, "b") not in want  # a module whose bias alone trains
            if value is not None:
                have[(f"{name}.bias", "") if alone else (name, part)] = value
    assert set(have) == set(want), set(have) ^ set(want)
    return {key: (have[key], want[key]) for key in want}


def put_masks(model: Any, b: Batch, sites: Mapping[str, lx.Site], seed: int, step: int) -> None:
    """Give each site of PEFT the masks that are meant here: by its name, and by each sequence's number."""
    model.train()
    for name, site in sites.items():
        if site.kind != "linear" or not site.p:
            continue
        module = model.get_submodule(f"base_model.model.{name}")
        d_in, longest = module.in_features, max(b.rows.lengths)
        mask = np.ones((len(b.index), longest, d_in))
        for i, (n, index) in enumerate(zip(b.rows.lengths, b.index, strict=True)):
            mask[i, :n] = lx.dropout_mask((n, d_in), site.p, seed, step, site_key(name), "float64", c3=index)
        module.lora_dropout["default"] = Masked(mask)


class Masked(torch.nn.Module):
    """Multiplies by a mask that is given."""

    def __init__(self, mask: np.ndarray) -> None:
        super().__init__()
        self.mask = torch.from_numpy(mask)

    def forward(self, x: Any) -> Any:
        return x * self.mask.to(x.dtype)
