"""One layer of a Llama on a device: forward, and backward.  What it computes: specs/models.md.

A linear layer is three products: x Wᵀ, z = (x∘mask)Aᵀ, and s·z Bᵀ added on; weights and adapters are read where
they lie. Of norms, gates and masks nothing is kept: they are computed again in the backward, to the same bits.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ...backend import cast, dtype_name
from ...config import Site
from ...params import Adapter
from ...random import DropoutKey, site_key
from ..gpu_arrays import Device, column_sums
from .attention import Lie, heads_of
from .kernels import Kernels, Places


class Step(NamedTuple):
    """What all layers read in one step."""

    where: Places
    adapters: Mapping[str, Adapter]
    dropout: tuple[int, int] | None  # seed, step


class Saved(NamedTuple):
    """What the backward of a layer reads."""

    h: Device  # (N, d)  residual stream before the layer
    h2: Device  # (N, d)  and before its MLP
    qkv: Device  # (N, d_q + 2 d_kv)  turned
    o: Device  # (N, d_q)
    L: Device  # (N, H)
    gu: Device  # (N, 2 ff)
    z: Mapping[str, Device | None]  # (N, r) of each site


class Layer:
    """The weights of one layer, and its two passes."""

    def __init__(
        self, i: int, weights: Mapping[str, Device], sites: Mapping[str, Site], shape: Any, kernels: Kernels
    ) -> None:
        """weights : all of the model's; those of this layer are held."""
        at = f"model.layers.{i}."
        self.own = {name[len(at) :]: weights[name] for name in weights if name.startswith(at)}
        self.sites = {name[len(at) :]: site for name, site in sites.items() if name.startswith(at)}
        self.at, self.shape, self.k = at, shape, kernels
        self.heads = heads_of(kernels.lib, kernels.dtype, shape.H, shape.K, shape.D)
        self.rule: dict[str, Any] = {"scale": shape.D**-0.5, "both": False, "window": shape.windows[i]}
        self.before, self.between = (
            self.own[f"{norm}.weight"] for norm in ("input_layernorm", "post_attention_layernorm")
        )

    # ---- forward -------------------------------------------------------------------------------------------

    def forward(self, h: Device, x: Device, step: Step) -> tuple[Device, Saved]:
        """h : (N, d), and x its norm -> what down_proj adds to h2, and the activations."""
        s, k, N, z = self.shape, self.k, h.shape[0], dict[str, Any]()
        qkv, y = k.empty(N, s.d_q + 2 * s.d_kv), k.empty(N, s.d)
        for word, columns in self._columns().items():
            z[word] = self._linear(f"self_attn.{word}_proj", x, qkv[:, columns], step)
        k.turn(qkv, step.where)
        o, L = self.heads.forward(self._lie(qkv), step.where.starts, step.where.longest, **self.rule)
        z["o"] = self._linear("self_attn.o_proj", o, y, step)
        h2, x = k.add_rms(h, y, self.between)
        gu = k.empty(N, 2 * s.ff)
        z["gate"] = self._linear("mlp.gate_proj", x, gu[:, : s.ff], step)
        z["up"] = self._linear("mlp.up_proj", x, gu[:, s.ff :], step)
        z["down"] = self._linear("mlp.down_proj", k.swiglu(gu), y, step)
        return y, Saved(h, h2, qkv, o, L, gu, z)

    def _lie(self, qkv: Device) -> Lie:
        d_q, d_kv = self.shape.d_q, self.shape.d_kv
        return Lie(qkv, qkv, qkv, d_q, d_q + d_kv)

    def _columns(self) -> dict[str, slice]:
        d_q, d_kv = self.shape.d_q, self.shape.d_kv
        return {"q": slice(0, d_q), "k": slice(d_q, d_q + d_kv), "v": slice(d_q + d_kv, d_q + 2 * d_kv)}

    def _linear(self, name: str, x: Device, y: Device, step: Step) -> Device | None:
        """y ← x Wᵀ + b + s·(x∘mask)Aᵀ Bᵀ; returns z = (x∘mask)Aᵀ where there is an adapter."""
        adapter, b = step.adapters.get(self.at + name), self.own.get(f"{name}.bias")
        b = b if adapter is None or adapter.b is None else adapter.b
        if adapter is not None and adapter.bB is not None:
            bB = self._scaling(name, adapter) * adapter.bB
            b = bB if b is None else b + bB
        if b is not None:
            y[...] = b
        self.k.times_t(x, self.own[f"{name}.weight"], y, 1.0, 0.0 if b is None else 1.0)
        if adapter is None or adapter.A is None or adapter.B is None:
            return None
        drop, factor = self._drop(name, step)
        z = self.k.empty(x.shape[0], adapter.A.shape[0])
        xd = x if drop is None else self.k.keep(x, step.where, drop)
        self.k.times_t(xd, adapter.A, z, factor)
        self.k.times_t(z, adapter.B, y, self._scaling(name, adapter), 1.0)
        return z

    def _scaling(self, name: str, adapter: Adapter) -> float:
        """s of a site; 1 where a bias alone trains."""
        return 1.0 if adapter.A is None else self.sites[name].scaling

    def _drop(self, name: str, step: Step) -> tuple[DropoutKey | None, float]:
        """The key of a site's masks, and 1/(1 − p) as the adapter's dtype holds it."""
        p = self.sites[name].p
        if step.dropout is None or not p:
            return None, 1.0
        key = DropoutKey(p, *step.dropout, site_key(self.at + name)).checked()
        return key, float(self.k.type(key.scale))

    # ---- backward ------------------------------------------------------------------------------------------

    def backward(self, g: Device, saved: Saved, step: Step, found: dict[str, Adapter], *, below: bool) -> None:
        """g : (N, d), the gradient by the stream after the layer, becomes that by the stream before it.

        found : takes the adapters' gradients;  below : whether anybody asks for g
        What was saved is written over.
        """
        s, k, N, z = self.shape, self.k, g.shape[0], saved.z
        gy = k.empty(N, s.ff)
        self._back("mlp.down_proj", g, k.swiglu(saved.gu), z["down"], gy, step, found)
        k.swiglu_back(saved.gu, gy)
        x, gx = k.add_rms(saved.h2, None, self.between)[1], k.empty(N, s.d)
        self._back("mlp.gate_proj", saved.gu[:, : s.ff], x, z["gate"], gx, step, found)
        self._back("mlp.up_proj", saved.gu[:, s.ff :], x, z["up"], gx, step, found, beta=1.0)
        k.rms_back(g, gx, saved.h2, self.between)
        go = k.empty(N, s.d_q)
        self._back("self_attn.o_proj", g, saved.o, z["o"], go, step, found)
        gqkv = k.empty(*saved.qkv.shape)
        given = go, saved.o, saved.L, self._lie(saved.qkv), step.where.starts, step.where.longest
        self.heads.backward(self._lie(gqkv), *given, **self.rule)
        k.turn(gqkv, step.where, back=True)
        x, beta = k.add_rms(saved.h, None, self.before)[1], 0.0
        for word, columns in self._columns().items():
            out = gx if below else None
            self._back(f"self_attn.{word}_proj", gqkv[:, columns], x, z[word], out, step, found, beta=beta)
            beta = 1.0
        if below:
            k.rms_back(g, gx, saved.h, self.before)

    def _back(
        self,
        name: str,
        gy: Device,
        x: Device,
        z: Device | None,
        gx: Device | None,
        step: Step,
        found: dict[str, Adapter],
        beta: float = 0.0,
    ) -> None:
        """Adjoint of _linear: gx ← that by x + β·gx, where gx is given."""
        adapter, W = step.adapters.get(self.at + name), self.own[f"{name}.weight"]
        if gx is not None:
            self.k.times(gy, W, gx, 1.0, beta)  # (linear.3)
        if adapter is None:
            return
        scaling, gA, gB = self._scaling(name, adapter), None, None
        if z is not None and adapter.A is not None and adapter.B is not None:
            gz, gA, gB = (self.k.empty(*like.shape) for like in (z, adapter.A, adapter.B))
            self.k.times(gy, adapter.B, gz, scaling)  # (lora.5), (lora.7)
            self.k.t_times(gy, z, gB, scaling)  # (lora.6)
            xd, factor = self._under(name, adapter.A, gz, x, gx, step)
            self.k.t_times(gz, xd, gA, factor)  # (lora.8)
        if adapter.b is None and adapter.bB is None:
            found[self.at + name] = Adapter(gA, gB)
            return
        gb: Any = cast(column_sums(gy), dtype_name(gy))  # (linear.5), (lora.10)
        b, bB = None if adapter.b is None else gb, None if adapter.bB is None else scaling * gb
        found[self.at + name] = Adapter(gA, gB, b=b, bB=bB)

    def _under(
        self, name: str, A: Device, gz: Device, x: Device, gx: Device | None, step: Step
    ) -> tuple[Device, float]:
        """gx += (gz A)∘mask, where gx is given; returns x∘mask, both without the factor, and the factor."""
        drop, factor = self._drop(name, step)
        if drop is None:
            if gx is not None:
                self.k.times(gz, A, gx, 1.0, 1.0)  # (lora.9)
            return x, factor
        if gx is None:
            return self.k.keep(x, step.where, drop), factor
        t = self.k.empty(*x.shape)
        self.k.times(gz, A, t, factor)
        return self.k.keep_back(gx, t, x, step.where, drop), factor  # (dropout.2)
