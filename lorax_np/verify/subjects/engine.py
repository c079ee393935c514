"""The engine's own layers as subjects: the reference in any array library, and the fast one."""

from dataclasses import replace
from typing import Any

import numpy as np

from ... import (
    Adapter,
    Conv,
    ConvAdapter,
    Embedding,
    Linear,
    LoraConfig,
    fast,
    init_adapter,
    init_conv_adapter,
    init_embedding_adapter,
    lora_conv_backward,
    lora_conv_backward_base,
    lora_conv_forward,
    lora_embedding_backward,
    lora_embedding_backward_base,
    lora_embedding_forward,
    lora_linear_backward,
    lora_linear_backward_base,
    lora_linear_forward,
    lora_mixed_forward,
    lora_several_backward,
    lora_several_forward,
    merge,
    merge_conv,
    merge_embedding,
    row_norms,
    torch_generator,
    unmerge,
)
from ..batteries.conv_case import ConvCase
from ..batteries.embedding_case import EmbeddingCase
from ..batteries.experts import ExpertsReference
from ..batteries.packed import PackedReference
from ..cases import Case
from ..conventions import Spec
from .ops import OpsFast, OpsReference
from .related import Related


def _present(found: dict[str, Any]) -> dict[str, Any]:
    """What the case has of these."""
    return {name: value for name, value in found.items() if value is not None}


class Layer:
    """lora_linear_forward and its two adjoints, start and merge."""

    spec = Spec(norm_gradient=(False, True), strided=True)

    def __init__(self, xp: Any = None) -> None:
        """xp : the array library to compute in; None for NumPy."""
        self.xp = np if xp is None else xp

    def _placed(self, value: Any) -> Any:
        """An array of NumPy where it is computed."""
        return value if self.xp is np else self.xp.asarray(value)

    def _records(self, case: Case) -> tuple[Any, Linear, Adapter, Any]:
        v = {name: self._placed(value) for name, value in case.arrays().items()}
        base = Linear(v["W"], None if case.train_b else v.get("b"))
        adapter = Adapter(v["A"], v["B"], v.get("m"), v.get("b") if case.train_b else None, v.get("bB"))
        return v["x"], base, adapter, v.get("mask")

    def run(self, case: Case, gy: Any) -> tuple[Any, dict[str, Any]]:
        """y and all gradients."""
        x, base, adapter, mask = self._records(case)
        gy = self._placed(gy)
        y, saved = lora_linear_forward(x, base, adapter, scaling=case.scaling, mask=mask)
        how: Any = {"scaling": case.scaling, "norm_gradient": case.norm_gradient}
        gx, g = lora_linear_backward(gy, saved, base, adapter, **how)
        found = {"x": gx, "A": g.A, "B": g.B, "m": g.m, "b": g.b, "bB": g.bB}
        found["W"] = lora_linear_backward_base(gy, saved, base, adapter, **how).W
        return y, _present(found)

    def init(self, W: Any, config: LoraConfig, seed: int) -> dict[str, Any]:
        """The start of an adapter at W."""
        W = self._placed(W)
        base, adapter = init_adapter(Linear(W), config, rng=torch_generator(seed))
        found = {"W": base.W, "A": adapter.A, "B": adapter.B, "m": adapter.m, "bB": adapter.bB}
        return _present(found)

    def init_from(self, W: Any, config: LoraConfig, seed: int, given: dict[str, Any]) -> dict[str, Any]:
        """The start of an adapter at W, of the layer's inputs or the loss's gradient where it takes them."""
        there = {name: self._placed(value) for name, value in given.items()}
        W, rng = self._placed(W), torch_generator(seed)
        handed: Any = {"inputs": there.get("inputs"), "gradient": there.get("gradient")}
        base, adapter = init_adapter(Linear(W), config, rng=rng, **handed)
        found = {"W": base.W, "A": adapter.A, "B": adapter.B, "m": adapter.m}
        return _present(found)

    def merge(self, case: Case) -> dict[str, Any]:
        """The merged weight and bias."""
        _, base, adapter, _ = self._records(case)
        linear = merge(base, adapter, scaling=case.scaling)
        return {"W": linear.W} | ({} if linear.b is None else {"b": linear.b})

    def unmerge(self, case: Case, merged: dict[str, Any]) -> dict[str, Any]:
        """W and b again of the merged ones; under DoRA with the row norms from before."""
        _, base, adapter, _ = self._records(replace(case, train_b=False))  # the merged bias is the base's
        there = {name: self._placed(value) for name, value in merged.items()}
        n = None if adapter.m is None else row_norms(base, adapter, scaling=case.scaling)
        linear = unmerge(Linear(there["W"], there.get("b")), adapter, scaling=case.scaling, n=n)
        return {"W": linear.W} | ({} if linear.b is None else {"b": linear.b})


class Reference(Layer, Related, PackedReference, ExpertsReference, OpsReference):
    """All that the engine has, judged like a stranger's; several adapters on NumPy."""

    def together(self, cases: list[Case], gy: Any) -> tuple[Any, dict[str, Any]]:
        """y, and the gradients by x and by each adapter's A and B, named A0, B0, A1, B1."""
        adapters = {str(i): Adapter(case.A, case.B) for i, case in enumerate(cases)}
        scalings, base = _scalings(cases), Linear(cases[0].W, cases[0].b)
        masks = {str(i): case.mask for i, case in enumerate(cases)}
        y, saved = lora_several_forward(cases[0].x, base, adapters, scalings=scalings, masks=masks)
        gx, g = lora_several_backward(gy, saved, base, adapters, scalings=scalings)
        return y, {"x": gx} | {f"{name}{i}": getattr(g[i], name) for i in adapters for name in ("A", "B")}

    def mixed(self, cases: list[Case], ids: list[int]) -> Any:
        """y of a batch whose samples each have one of these adapters, or none where the id is −1."""
        adapters = {str(i): Adapter(case.A, case.B) for i, case in enumerate(cases)}
        names = ["__base__" if i < 0 else str(i) for i in ids]
        base = Linear(cases[0].W, cases[0].b)
        return lora_mixed_forward(cases[0].x, base, adapters, names, scalings=_scalings(cases))

    # ---- embeddings and convolutions -------------------------------------------------------------------------

    def _table(self, case: EmbeddingCase) -> tuple[Any, Embedding, Adapter]:
        v = {name: self._placed(value) for name, value in case.arrays().items()}
        base = Embedding(v["W"], case.padding, case.embed_scale, case.by_frequency)
        return v["ids"], base, Adapter(v["A"], v["B"], v.get("m"))

    def embedding_forward(self, case: EmbeddingCase) -> Any:
        """y of the ids."""
        ids, base, adapter = self._table(case)
        return lora_embedding_forward(ids, base, adapter, scaling=case.scaling)[0]

    def embedding_backward(self, case: EmbeddingCase, gy: Any) -> dict[str, Any]:
        """The gradients by A, B, W and m."""
        ids, base, adapter = self._table(case)
        gy = self._placed(gy)
        _, saved = lora_embedding_forward(ids, base, adapter, scaling=case.scaling)
        how: Any = {"scaling": case.scaling, "norm_gradient": case.norm_gradient}
        g = lora_embedding_backward(gy, saved, base, adapter, **how)
        found = {"A": g.A, "B": g.B, "m": g.m}
        found["W"] = lora_embedding_backward_base(gy, saved, base, adapter, **how).W
        return _present(found)

    def embedding_merge(self, case: EmbeddingCase) -> dict[str, Any]:
        """The merged table."""
        _, base, adapter = self._table(case)
        return {"W": merge_embedding(base, adapter, scaling=case.scaling).W}

    def embedding_init(self, W: Any, config: LoraConfig, seed: int) -> dict[str, Any]:
        """The start of an adapter at W."""
        base = Embedding(self._placed(W))
        _, adapter = init_embedding_adapter(base, config, rng=torch_generator(seed))
        return {"A": adapter.A, "B": adapter.B}

    def _kernel(self, case: ConvCase) -> tuple[Any, Conv, ConvAdapter, Any]:
        v = {name: self._placed(value) for name, value in case.arrays().items()}
        steps = (case.stride, case.padding, case.dilation, case.groups, case.mode)
        adapter = ConvAdapter(v["A"], v["B"], v.get("m"), None, v.get("bB"))
        return v["x"], Conv(v["W"], v.get("b"), *steps), adapter, v.get("mask")

    def conv_forward(self, case: ConvCase) -> Any:
        """y : (N, d_out, *P)."""
        x, base, adapter, mask = self._kernel(case)
        return lora_conv_forward(x, base, adapter, scaling=case.scaling, mask=mask)[0]

    def conv_backward(self, case: ConvCase, gy: Any) -> dict[str, Any]:
        """The gradients by all that the case has."""
        x, base, adapter, mask = self._kernel(case)
        gy = self._placed(gy)
        _, saved = lora_conv_forward(x, base, adapter, scaling=case.scaling, mask=mask)
        how: Any = {"scaling": case.scaling, "norm_gradient": case.norm_gradient}
        gx, g = lora_conv_backward(gy, saved, base, adapter, **how)
        gbase = lora_conv_backward_base(gy, saved, base, adapter, **how)
        found = {"x": gx, "A": g.A, "B": g.B, "m": g.m, "bB": g.bB, "W": gbase.W, "b": gbase.b}
        return _present(found)

    def conv_merge(self, case: ConvCase) -> dict[str, Any]:
        """The merged weight and bias."""
        _, base, adapter, _ = self._kernel(case)
        found = merge_conv(base, adapter, scaling=case.scaling)
        return {"W": found.W} | ({} if found.b is None else {"b": found.b})

    def conv_init(self, W: Any, config: LoraConfig, seed: int) -> dict[str, Any]:
        """The start of an adapter at W."""
        base = Conv(self._placed(W))
        _, adapter = init_conv_adapter(base, config, rng=torch_generator(seed))
        return {"A": adapter.A, "B": adapter.B}


def _scalings(cases: list[Case]) -> dict[str, float]:
    return {str(i): case.scaling for i, case in enumerate(cases)}


class FastLayer(Layer):
    """lx.fast on NumPy or CuPy: layers and merges; starts and unmerging are the reference's."""

    spec = Spec(norm_gradient=(False, True), strided=True)

    def run(self, case: Case, gy: Any) -> tuple[Any, dict[str, Any]]:
        """y and all gradients but W's, which the fast engine does not offer."""
        x, base, adapter, mask = self._records(case)
        gy = self._placed(gy)
        y, saved = fast.lora_linear_forward(x, base, adapter, scaling=case.scaling, dropout=mask)
        how: Any = {"scaling": case.scaling, "norm_gradient": case.norm_gradient}
        gx, g = fast.lora_linear_backward(gy, saved, base, adapter, **how)
        found = {"x": gx, "A": g.A, "B": g.B, "m": g.m, "b": g.b, "bB": g.bB}
        return y, _present(found)

    def merge(self, case: Case) -> dict[str, Any]:
        """The merged weight and bias, merged in place into a copy."""
        _, base, adapter, _ = self._records(case)
        linear = fast.merge_into(Linear(self.xp.array(base.W), base.b), adapter, scaling=case.scaling)
        return {"W": linear.W} | ({} if linear.b is None else {"b": linear.b})


class Fast(FastLayer, OpsFast):
    """lx.fast on the host, with the ops it has of its own; on a device those of a model are the reference's."""
