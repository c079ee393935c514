"""A llama with a mixture of experts in the place of each perceptron: mixtral, qwen3_moe.

Derivation: specs/moe.md.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, from_host, namespace_of, to_host
from ..layers.experts import Experts, lora_experts_backward, lora_experts_forward
from ..ops.activation import SwigluSaved, swiglu_backward, swiglu_forward
from ..ops.linear import linear_backward_W, linear_backward_x, linear_forward
from ..ops.norm import NormSaved
from ..ops.router import (
    RouterSaved,
    softmax_topk_backward,
    softmax_topk_forward,
    topk_softmax_backward,
    topk_softmax_forward,
)
from .llama import Half, LlamaSaved, llama_backward, llama_forward
from .moe_config import DOWN, GATE_UP
from .passes import Pass
from .records import Batch, Gradients, Rows


class Order(NamedTuple):
    """Pairs of a token and an expert, token by token, and the same expert by expert."""

    order: Any  # (N·k,)  on the host: the pair that stands there when experts come one after another
    back: Any  # (N·k,)  where each pair has gone
    counts: tuple[int, ...]  # E: how many pairs each expert has


class MixtureHalf(NamedTuple):
    """Activations of a block's second half."""

    norm: NormSaved
    gate: Any
    router: RouterSaved
    order: Order
    gate_up: Any
    swiglu: SwigluSaved
    down: Any
    e: Array  # (N, k, d)  what each of a token's experts made of it


def moe_forward(at: Pass, batch: Batch, keep: str = "all") -> tuple[Array, LlamaSaved]:
    """As llama_forward, with experts in each block: h : (N, d), as a head reads it, and what was saved."""
    return llama_forward(at, batch.ids, batch.rows, keep=keep, half=EXPERTS)


def moe_backward(gh: Array, saved: LlamaSaved, at: Pass, gradients: Gradients) -> None:
    """Adjoint of moe_forward: gh : (N, d); adds the gradients by all that trains."""
    llama_backward(gh, saved, at, gradients, half=EXPERTS)


# ---- the second half of a block ----------------------------------------------------------------------------


def mixture_forward(at: Pass, i: int, h: Array, rows: Rows) -> tuple[Array, MixtureHalf]:
    """Each row through the k experts that a router chooses for it, added up by the router's weights.

    h : (N, d) -> h + Σ_j w_j·expert_j(b), b the norm of h. Source: Jiang et al. 2024, arXiv:2401.04088, section
    2.1; specs/moe.md.
    """
    block, name, k = f"model.layers.{i}", f"model.layers.{i}.mlp", at.config["num_experts_per_tok"]
    xp, (N, d), ff = namespace_of(h=h), h.shape, at.config["intermediate_size"]
    b, norm = at.rms_norm(f"{block}.post_attention_layernorm", h, at.config["rms_norm_eps"])
    z, gate = _gate(at, name, b, rows)  # (N, E)  (moe.1)
    forward = topk_softmax_forward if at.config["norm_topk_prob"] else softmax_topk_forward
    ids, w, router = forward(z, k)  # (N, k)  (moe.2)
    order = ordered(to_host(ids), at.config["num_local_experts"])
    x = xp.take(b, from_host(order.order // k, b), axis=0)  # (N·k, d)  (moe.3)
    t, gate_up = experts_forward(at, f"{name}.{GATE_UP}", x, order.counts)  # (N·k, 2ff)  (moe.4)
    f, swiglu = swiglu_forward(t[:, :ff], t[:, ff:])  # (N·k, ff)  (moe.5)
    y, down = experts_forward(at, f"{name}.{DOWN}", f, order.counts)  # (N·k, d)  (moe.6)
    e = xp.reshape(xp.take(y, from_host(order.back, y), axis=0), (N, k, d))  # (N, k, d)  (moe.7)
    m = xp.sum(w[:, :, None] * e, axis=1)  # (N, d)  (moe.8)
    return h + m, MixtureHalf(norm, gate, router, order, gate_up, swiglu, down, e)


def mixture_backward(at: Pass, i: int, g: Array, saved: MixtureHalf, gradients: Gradients) -> Array:
    """Adjoint of mixture_forward: g : (N, d) -> gh : (N, d)."""
    block, name, order = f"model.layers.{i}", f"model.layers.{i}.mlp", saved.order
    xp, (N, k, d), w = namespace_of(g=g), saved.e.shape, saved.router.w
    gw = xp.sum(g[:, None, :] * saved.e, axis=2)  # (N, k)  (moe.9)
    ge = xp.reshape(w[:, :, None] * g[:, None, :], (N * k, d))
    gy = xp.take(ge, from_host(order.order, ge), axis=0)  # (N·k, d)  (moe.10)
    gf = experts_backward(at, f"{name}.{DOWN}", gy, saved.down, order.counts, gradients)  # (N·k, ff)
    gt = xp.concat(swiglu_backward(gf, saved.swiglu), axis=1)  # (N·k, 2ff)  (moe.11)
    gx = experts_backward(at, f"{name}.{GATE_UP}", gt, saved.gate_up, order.counts, gradients)
    each = xp.reshape(xp.take(gx, from_host(order.back, gx), axis=0), (N, k, d))
    backward = topk_softmax_backward if at.config["norm_topk_prob"] else softmax_topk_backward
    gz = backward(gw, saved.router)  # (N, E)  (moe.12)
    gb = xp.sum(each, axis=1) + _gate_back(at, name, gz, saved.gate, gradients)  # (N, d)  (moe.13)
    return g + at.rms_norm_back(f"{block}.post_attention_layernorm", gb, saved.norm, gradients)  # (moe.14)


EXPERTS = Half(mixture_forward, mixture_backward)


def ordered(ids: Any, experts: int) -> Order:
    """Pairs sorted by expert, those of one expert in the order of tokens: ids : (N, k), on the host.

    >>> ordered(np.array([[1, 0], [2, 1]]), 3)
    Order(order=array([1, 0, 3, 2]), back=array([1, 0, 3, 2]), counts=(1, 2, 1))
    """
    flat = ids.reshape(-1)
    order = np.argsort(flat, kind="stable")
    counts = np.bincount(flat, minlength=experts)
    return Order(order, np.argsort(order, kind="stable"), tuple(counts.tolist()))


def _gate(at: Pass, name: str, b: Array, rows: Rows) -> tuple[Array, Any]:
    """The router's logits: its weight is a parameter, which adapters name as one, or a linear layer's."""
    if f"{name}.gate.weight" in at.trained.adapters:
        return experts_forward(at, f"{name}.gate.weight", b, (b.shape[0],))
    return at.linear(f"{name}.gate", b, rows)


def _gate_back(at: Pass, name: str, gz: Array, saved: Any, gradients: Gradients) -> Array:
    if f"{name}.gate.weight" in at.trained.adapters:
        return experts_backward(at, f"{name}.gate.weight", gz, saved, (gz.shape[0],), gradients)
    return at.linear_back(f"{name}.gate", gz, saved, gradients)


# ---- a parameter of experts --------------------------------------------------------------------------------


def experts_forward(at: Pass, name: str, x: Array, counts: tuple[int, ...]) -> tuple[Array, Any]:
    """Rows through the weights of their experts, with the parameter's adapter where it has one.

    x : (n, d_in)   rows of expert 0, then those of expert 1, and so on, counts of them

    Returns y : (n, d_out), and what experts_backward reads.
    """
    base, adapter = Experts(at.weight(name)), at.trained.adapters.get(name)
    if adapter is not None:
        return lora_experts_forward(x, base, adapter, scaling=at.scaling(name), counts=counts)  # type: ignore[arg-type]
    parts = [linear_forward(x_e, W) for x_e, W in zip(_parts(x, counts), base.weights(), strict=True)]
    y: Array = namespace_of(x=x).concat(parts, axis=0)
    return y, x if at.whole(name) else None


def experts_backward(
    at: Pass, name: str, gy: Array, saved: Any, counts: tuple[int, ...], gradients: Gradients
) -> Array:
    """Adjoint of experts_forward: gy : (n, d_out) -> gx : (n, d_in); adds what trains there to gradients."""
    base, adapter, xp = Experts(at.weight(name)), at.trained.adapters.get(name), namespace_of(gy=gy)
    if adapter is not None:
        gx, g = lora_experts_backward(gy, saved, base, adapter, scaling=at.scaling(name))  # type: ignore[arg-type]
        gradients.add(name, g)
        return gx
    parts = _parts(gy, counts)
    if at.whole(name):
        gW = [linear_backward_W(g_e, x_e) for g_e, x_e in zip(parts, _parts(saved, counts), strict=True)]
        at.add_saved(name, base.of(gW).W, gradients)
    found: Array = xp.concat(
        [linear_backward_x(g_e, W) for g_e, W in zip(parts, base.weights(), strict=True)], axis=0
    )
    return found


def _parts(x: Array, counts: tuple[int, ...]) -> list[Array]:
    """The rows of each expert."""
    bounds = np.cumsum((0, *counts)).tolist()
    return [x[begin:end, :] for begin, end in pairwise(bounds)]
