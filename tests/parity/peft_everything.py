"""One model with every kind of layer that PEFT adapts, and what an adapter's files make of its weights.

Importing this module skips the tests, with a reason, where torch or PEFT 0.21.2 is not installed.
"""

import copy
from typing import Any

import numpy as np
from peft_layers import Conv1D, nn, peft, torch

VOCAB, DIM = 11, 6


class Experts(nn.Module):
    """Fused experts as transformers has them: two parameters of three axes in one module."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed
        sizes = ((3, 8, DIM), (3, DIM, 4))
        self.gate_up_proj, self.down_proj = (
            nn.Parameter(torch.randn(e, *((b, a) if transposed else (a, b)))) for e, a, b in sizes
        )

    def forward(self, x: Any) -> Any:
        y = 0
        for gate_up, down in zip(self.gate_up_proj, self.down_proj, strict=True):
            if self.is_transposed:
                gate_up, down = gate_up.T, down.T
            gate, up = (x @ gate_up.T).chunk(2, -1)
            y = y + (torch.tanh(gate) * up) @ down.T
        return y


class Everything(nn.Module):
    """Each layer of the model changes the output."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.up = nn.Linear(DIM, 10)
        self.square = nn.Linear(10, 10, bias=False)
        self.gpt = Conv1D(7, 10)
        self.line = nn.Conv1d(7, 5, 3, padding=1, stride=2)
        self.plane = nn.Conv2d(1, 4, (3, 2), padding=1, bias=False)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.space = nn.Conv3d(1, 2, (2, 1, 2))
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)
        self.experts = Experts(transposed)
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, 3)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, ids: Any) -> Any:
        e = self.embed(ids)  # (N, T, dim)
        h = self.gpt(self.square(torch.tanh(self.up(e))))  # (N, T, 7)
        u = self.line(h.transpose(1, 2))  # (N, 5, T')
        v = self.grouped(self.plane(u.unsqueeze(1)))
        w = self.space(v.unsqueeze(1))
        a, _ = self.attention(e, e, e, need_weights=False)
        outs = (h, u, v, w, a, self.experts(e), self.head(self.norm(e)))
        return torch.cat([out.reshape(len(ids), -1) for out in outs], 1)


def base(seed: int = 0, dtype: str = "float64", transposed: bool = False) -> Any:
    """A model whose every parameter is drawn, those that torch starts at 0 or 1 too."""
    generator = torch.Generator().manual_seed(seed)
    model = Everything(transposed).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model.eval()


def ids() -> Any:
    return torch.arange(4 * 6).reshape(4, 6) % VOCAB


def trained(config: Any, name: str = "default", seed: int = 1, **given: Any) -> tuple[Any, Any]:
    """The base that stays, and PEFT's model over a copy of it, every trainable tensor away from its start."""
    model = base(**given)
    adapted = peft.get_peft_model(copy.deepcopy(model), config, adapter_name=name).eval()
    for module in adapted.modules():  # PEFT makes factors in float32 whatever the base is
        if hasattr(module, "lora_A"):
            module.to(next(model.parameters()).dtype)
    move(adapted, seed)
    return model, adapted


def move(adapted: Any, seed: int) -> None:
    """Add noise to every tensor that trains, of order one where it is a factor."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                size = 0.5 if "lora_" in name else 0.1
                noise = torch.randn(parameter.shape, generator=generator) * size
                parameter.add_(noise.to(parameter.dtype))


def weights_of(model: Any) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def applied(files: Any, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The base's weights with an adapter folded in: written out here, in float64, from the spec's table."""
    new = {name: array.astype("float64") for name, array in weights.items()}
    for name, array in files.saved.items():
        if name.endswith(".token_adapter.trainable_tokens_delta"):
            module = name.removesuffix(".token_adapter.trainable_tokens_delta")
            rows = files.config.trainable_token_indices
            rows = rows if isinstance(rows, tuple) else next(iter(rows.values()))
            new[f"{module}.weight"][list(rows)] = array
        else:
            new[name] = array.astype("float64")
    for name, adapter in files.adapters.items():
        site = files.sites[name]
        bias = f"{name}.bias"
        if adapter.b is not None:
            new[bias] = adapter.b.astype("float64")
        if adapter.bB is not None:
            new[bias] = new.get(bias, 0) + site.scaling * adapter.bB.astype("float64")
        new[site.weight] = folded(site, adapter, new[site.weight])
    return new


def folded(site: Any, adapter: Any, W: np.ndarray) -> np.ndarray:
    A, B, s = adapter.A.astype("float64"), adapter.B.astype("float64"), site.scaling
    if site.kind == "experts":
        E = W.shape[0] if W.ndim == 3 else 1
        delta = np.stack([B[:, e::E] @ A[e * site.r : (e + 1) * site.r] for e in range(E)])
        delta = delta if W.ndim == 3 else delta[0]
        return W + s * (np.swapaxes(delta, -1, -2) if site.transposed else delta)
    if site.kind == "embedding":
        V = W + s * (B @ A).T
        return V if adapter.m is None else V * (adapter.m / np.linalg.norm(V, axis=0))
    W2 = (W.T if site.transposed else W).reshape(B.shape[0], -1)
    V = W2 + s * B.reshape(B.shape[0], -1) @ A.reshape(A.shape[0], -1)
    if adapter.m is not None:
        V = V * (adapter.m / np.linalg.norm(V, axis=1))[:, None]
    return V.T if site.transposed else V.reshape(W.shape)


def output(model: Any, weights: dict[str, np.ndarray]) -> np.ndarray:
    """What the plain model gives with other weights, in float64."""
    wide = copy.deepcopy(model).double()
    wide.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    with torch.no_grad():
        return wide(ids()).numpy()
