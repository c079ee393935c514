"""A mixture of experts of transformers with PEFT's adapters, in float64 throughout.

Norms and positions are replaced as in llama_oracle, and the router's softmax, which transformers computes in
float32, by one in the model's dtype.

Importing this module skips the tests, with a reason, where torch or PEFT 0.21.2 is not installed.
"""

import types
from typing import Any

from tests.parity import llama_oracle
from tests.parity.llama_oracle import T
from tests.parity.peft_layers import torch

KINDS = {"mixtral": (T.MixtralConfig, "Mixtral"), "qwen3_moe": (T.Qwen3MoeConfig, "Qwen3Moe")}
SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 14},
}


def tiny(kind: str, seed: int = 0, **changed: Any) -> Any:
    """A tiny model with random weights, in float64; norms too are random."""
    llama_oracle.KINDS[kind] = KINDS[kind]
    options = {"experts_implementation": "eager"} | SIZES[kind] | changed
    return exact(llama_oracle.tiny(kind, seed=seed, **options))


def exact(model: Any) -> Any:
    """The same model, its norms, positions and routers computed in the dtype it has."""
    for module in llama_oracle.exact(model).modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.forward = types.MethodType(_router, module)
    return model


def _router(self: Any, x: Any) -> Any:
    z = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), self.weight)
    w, ids = torch.topk(z.softmax(dim=-1), self.top_k, dim=-1)
    if getattr(self, "norm_topk_prob", True):
        w = w / w.sum(dim=-1, keepdim=True)
    return z, w, ids
