"""PEFT's real layers as a subject: what torch's autograd makes of them, with the case's own dropout mask."""

import warnings
from itertools import product
from typing import Any

import peft as library
import torch

from ... import LoraConfig
from ..batteries.embedding_case import EmbeddingCase
from ..cases import Case, HostArray
from ..conventions import Spec
from .torch_arrays import to_array, to_tensor


class _Mask(torch.nn.Module):  # type: ignore[misc]
    """Stands where PEFT has torch's dropout, and multiplies by a given mask."""

    def __init__(self, mask: Any) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Any) -> Any:
        return x * self.mask.to(x.dtype)


class _Scaled(torch.nn.Embedding):  # type: ignore[misc]
    """An embedding that multiplies what it looks up, as Gemma's does."""

    def __init__(self, case: EmbeddingCase) -> None:
        super().__init__(*case.W.shape, padding_idx=case.padding, scale_grad_by_freq=case.by_frequency)
        if case.embed_scale != 1.0:
            scale = torch.tensor(case.embed_scale, dtype=torch.float64)
            self.register_buffer("embed_scale", scale, persistent=False)

    def forward(self, ids: Any) -> Any:
        y = super().forward(ids)
        return y * self.embed_scale.to(y.dtype) if hasattr(self, "embed_scale") else y


class Peft:
    """One PEFT LoRA layer a case. Its DoRA counts the norm as a constant.

    The layer is of the case's dtype, and its adapters of what PEFT makes of that: float32 beside a base of 16
    bits, unless autocast_adapter_dtype is False. A gradient in float32 is rounded once as it is handed back.
    """

    spec = Spec(norm_gradient=(False,), strided=True)

    def __init__(
        self,
        config: LoraConfig | None = None,
        *,
        autocast_adapter_dtype: bool = True,
        safe_merge: bool = False,
    ) -> None:
        """config : judge only the cases with its use_dora, use_rslora and lora_bias;  the rest as in PEFT."""
        self.config, self.safe_merge = config, safe_merge
        self.autocast_adapter_dtype = autocast_adapter_dtype

    def layer(self, case: Case) -> tuple[Any, dict[str, Any]]:
        """The layer with the case's numbers in it, and its parameters by our names."""
        c = case.config
        for name in ("use_dora", "use_rslora", "lora_bias"):
            if self.config is not None and getattr(self.config, name) != getattr(c, name):
                raise NotImplementedError(f"{name}={getattr(c, name)} is outside the given config")
        v = {name: to_tensor(torch, value) for name, value in case.arrays().items()}
        d_out, d_in = case.W.shape
        holder = torch.nn.Module()
        holder.lin = torch.nn.Linear(d_in, d_out, bias=case.b is not None, dtype=v["W"].dtype)
        names = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_bias")
        settings = {name: getattr(c, name) for name in names}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings["bias"] = "all" if case.train_b else "none"
            model = library.LoraModel(holder, library.LoraConfig(target_modules=["lin"], **settings), "default")
        model._cast_adapter_dtype("default", self.autocast_adapter_dtype)  # as get_peft_model does
        layer = model.model.lin
        base, A, B = layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]
        p = {"W": base.weight, "b": base.bias, "A": A.weight, "B": B.weight, "bB": B.bias}
        if case.m is not None:
            p["m"] = layer.lora_magnitude_vector["default"].weight
        p = {name: value for name, value in p.items() if value is not None}
        for name, value in p.items():
            value.data = v[name].to(value.dtype)
        p["W"].requires_grad_(True)
        if case.mask is not None:
            layer.lora_dropout["default"] = _Mask(v["mask"])
        return layer.train(case.mask is not None), p

    def run(self, case: Case, gy: HostArray) -> tuple[HostArray, dict[str, HostArray]]:
        """y and all gradients, by autograd."""
        layer, p = self.layer(case)
        if case.m is not None and case.x.ndim == 1:
            raise NotImplementedError("PEFT's DoRA turns x : (d_in,) into y : (1, d_out)")
        x = to_tensor(torch, case.x).requires_grad_()
        y = layer(x)
        y.backward(to_tensor(torch, gy))
        if case.train_b is False:
            p.pop("b", None)
        return to_array(y), {name: to_array(value.grad, case.x.dtype) for name, value in {"x": x, **p}.items()}

    @property
    def merges(self) -> dict[str, Any]:
        """PEFT's ways to merge, by the settings that decide how often a 16-bit weight is rounded."""
        found = {}
        for autocast, safe in product((True, False), (False, True)):
            other = type(self)(self.config, autocast_adapter_dtype=autocast, safe_merge=safe)
            found[f"safe_merge={safe}" + ", autocast_adapter_dtype=False" * (not autocast)] = other.merge
        return found

    def merge(self, case: Case) -> dict[str, HostArray]:
        """The merged weight and bias."""
        if not self.autocast_adapter_dtype and case.A.dtype != case.W.dtype:
            raise NotImplementedError("autocast_adapter_dtype=False has adapters of the base's dtype")
        if case.bB is not None and case.b is None:
            raise NotImplementedError("PEFT does not merge a bias of B into a layer without bias")
        layer, _ = self.layer(case)
        layer.eval().merge(safe_merge=self.safe_merge)
        bias = layer.base_layer.bias
        return {"W": to_array(layer.base_layer.weight)} | ({} if bias is None else {"b": to_array(bias)})

    # ---- embeddings ------------------------------------------------------------------------------------------

    def embedding(self, case: EmbeddingCase) -> tuple[Any, dict[str, Any]]:
        """An embedding with the case's numbers in it, and its parameters by our names."""
        layer = self._embedded(_Scaled(case).to(to_tensor(torch, case.W).dtype), case.config)
        p = {"A": layer.lora_embedding_A["default"], "B": layer.lora_embedding_B["default"]}
        p["W"] = layer.base_layer.weight.requires_grad_(True)
        if case.m is not None:
            p["m"] = layer.lora_magnitude_vector["default"].weight
        for name, value in p.items():
            value.data = to_tensor(torch, getattr(case, name)).to(value.dtype)
        return layer, p

    def _embedded(self, base: Any, c: LoraConfig) -> Any:
        holder = torch.nn.Module()
        holder.emb = base
        settings = {name: getattr(c, name) for name in ("r", "lora_alpha", "use_rslora", "use_dora")}
        model = library.LoraModel(holder, library.LoraConfig(target_modules=["emb"], **settings), "default")
        model._cast_adapter_dtype("default", self.autocast_adapter_dtype)
        return model.model.emb

    def embedding_forward(self, case: EmbeddingCase) -> HostArray:
        """y of the ids."""
        layer, _ = self.embedding(case)
        return to_array(layer(torch.tensor(case.ids)))

    def embedding_backward(self, case: EmbeddingCase, gy: HostArray) -> dict[str, HostArray]:
        """The gradients by A, B and W, by autograd."""
        layer, p = self.embedding(case)
        layer(torch.tensor(case.ids)).backward(to_tensor(torch, gy))
        return {name: to_array(value.grad, case.W.dtype) for name, value in p.items()}

    def embedding_init(self, W: HostArray, config: LoraConfig, seed: int) -> dict[str, HostArray]:
        """A and B as PEFT draws them."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            base = torch.nn.Embedding(*W.shape, dtype=to_tensor(torch, W).dtype)
            layer = self._embedded(base, config)
        both = {"A": layer.lora_embedding_A["default"], "B": layer.lora_embedding_B["default"]}
        return {name: to_array(value, W.dtype) for name, value in both.items()}
