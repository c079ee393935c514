"""A T5 of transformers with PEFT's adapters, in float64 throughout, as tests compare themselves with it.

Of what it computes only the norm is in float32 where the model is float64: it is replaced by one written out
again from its definition. The loss is taken from the logits. Both sides are padded there, and laid end to end
here.

Importing this module skips the tests, with a reason, where torch or PEFT 0.21.2 is not installed.
"""

import types
from collections.abc import Mapping
from typing import Any

import numpy as np

import lorax_np as lx
from lorax_np.models.load import model_of
from lorax_np.models.records import Batch
from lorax_np.random import site_key
from tests.parity.llama_oracle import Masked, Padded, T
from tests.parity.peft_layers import torch

SIZES = {
    "d_model": 18,
    "d_kv": 4,
    "d_ff": 22,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 3,
    "vocab_size": 29,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,
    "decoder_start_token_id": 0,
    "attn_implementation": "eager",
}
START, PAD = 0, 0


def tiny(seed: int = 0, untied: bool = False, kind: str = "t5", **changed: Any) -> Any:
    """A tiny model with random weights, in float64. transformers ties each, so an own head is put in after."""
    make, whole = {
        "t5": (T.T5Config, T.T5ForConditionalGeneration),
        "mt5": (T.MT5Config, T.MT5ForConditionalGeneration),
    }[kind]
    torch.manual_seed(seed)
    model = whole(make(**SIZES | changed)).double().eval()
    if untied:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
        model.config.tie_word_embeddings = False
    with torch.no_grad():
        for key, value in model.named_parameters():
            norm = key.endswith("norm.weight")
            value.copy_((1 if norm else 0) + (0.2 if norm else 0.3) * torch.randn_like(value))
    return exact(model)


def exact(model: Any) -> Any:
    """The same model, its norms computed in the dtype it has."""
    for module in model.modules():
        if type(module).__name__.endswith("LayerNorm"):
            module.forward = types.MethodType(_norm, module)
    return model


def _norm(self: Any, x: Any) -> Any:
    return self.weight * (x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt())


def ours(model: Any, **options: Any) -> lx.Model:
    """The model here, of a torch model's weights and config: as a file has them, a tied tensor once."""
    found, seen = {}, set()
    for name, value in model.state_dict().items():
        if value.data_ptr() not in seen:
            found[name] = value.detach().numpy().copy()
        seen.add(value.data_ptr())
    return model_of(found, model.config.to_dict(), **options)


def batch(
    lengths: tuple[int, ...] = (3, 1, 9, 2), written: tuple[int, ...] = (2, 7, 1, 3), seed: int = 7
) -> Batch:
    """Sequences to read and to write, of unequal lengths; some labels are ignored."""
    rng = np.random.default_rng(seed)
    bounds = [tuple(int(n) for n in np.cumsum((0, *some))) for some in (lengths, written)]
    labels = rng.integers(2, 29, bounds[1][-1])
    labels[rng.random(len(labels)) < 0.25] = -100
    index = tuple(range(5, 5 + len(lengths)))[::-1]
    return Batch(rng.integers(2, 29, bounds[0][-1]), bounds[0], labels, index, decoder_starts=bounds[1])


def written(b: Batch) -> Batch:
    """The decoder's side as a batch of its own."""
    return Batch(b.labels, b.decoder_starts, None, b.index)


def logits(model: Any, b: Batch) -> Any:
    """(N, V) of the decoder's tokens, by transformers' own shift of padded labels."""
    p, q = Padded.of(b), Padded.of(written(b))
    labels = torch.where(q.mask.bool(), q.ids, torch.full_like(q.ids, -100))
    found = model(input_ids=p.ids, attention_mask=p.mask, labels=labels)
    return q.rows(found.logits)


def their_loss(model: Any, b: Batch, n: int) -> Any:
    """The loss, summed over labels and divided by n."""
    labels = torch.from_numpy(np.asarray(b.labels))
    return torch.nn.functional.cross_entropy(logits(model, b), labels, ignore_index=-100, reduction="sum") / n


def put_masks(model: Any, b: Batch, sites: Mapping[str, lx.Site], seed: int, step: int) -> None:
    """Give each site of PEFT the masks that are meant here: keys and values of the memory have its rows."""
    for name, site in sites.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        d_in = layer.lora_A["default"].weight.shape[1]
        read = name.startswith("encoder.") or name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        lengths = (b.rows if read else b.decoder_rows).lengths
        mask, key = np.ones((len(lengths), max(lengths), d_in)), site_key(name)
        for i, (n, index) in enumerate(zip(lengths, b.index, strict=True)):
            mask[i, :n] = lx.dropout_mask((n, d_in), site.p, seed, step, key, "float64", c3=index)
        layer.lora_dropout["default"] = Masked(mask)
        layer.training = True  # else PEFT's DoRA drops nothing
