"""The engine's own layers as subjects: the reference in any array library, and the fast one."""

from dataclasses import replace
from typing import Any

import numpy as np

from ... import (
    AdaLoraAdapter,
    Adapter,
    Conv,
    ConvAdapter,
    Embedding,
    Linear,
    LoraConfig,
    TokenRows,
    VeraAdapter,
    VeraShared,
    adalora_linear_backward,
    adalora_linear_forward,
    combine,
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
    token_rows_backward,
    token_rows_forward,
    torch_generator,
    unmerge,
    vera_linear_backward,
    vera_linear_forward,
)
from ..batteries.blending import METHODS, BlendCase
from ..batteries.conv_case import ConvCase
from ..batteries.embedding_case import EmbeddingCase
from ..batteries.experts import ExpertsReference
from ..batteries.packed import PackedReference
from ..batteries.related_case import RelatedCase
from ..cases import Case
from ..conventions import Spec
from .ops import OpsFast, OpsReference


class Layer:
    """lora_linear_forward and its two adjoints, start and merge."""

    spec = Spec(norm_gradient=(False, True), strided=True)

    def __init__(self, xp: Any = None) -> None:
        """xp : the array library to compute in; None for NumPy."""
        self.xp = np if xp is None else xp

    def _records(self, case: Case) -> tuple[Any, Linear, Adapter, Any]:
        v = {name: value if self.xp is np else self.xp.asarray(value) for name, value in case.arrays().items()}
        base = Linear(v["W"], None if case.train_b else v.get("b"))
        adapter = Adapter(v["A"], v["B"], v.get("m"), v.get("b") if case.train_b else None, v.get("bB"))
        return v["x"], base, adapter, v.get("mask")

    def run(self, case: Case, gy: Any) -> tuple[Any, dict[str, Any]]:
        """y and all gradients."""
        x, base, adapter, mask = self._records(case)
        gy = gy if self.xp is np else self.xp.asarray(gy)
        y, saved = lora_linear_forward(x, base, adapter, scaling=case.scaling, mask=mask)
        how: Any = {"scaling": case.scaling, "norm_gradient": case.norm_gradient}
        gx, g = lora_linear_backward(gy, saved, base, adapter, **how)
        found = {"x": gx, "A": g.A, "B": g.B, "m": g.m, "b": g.b, "bB": g.bB}
        found["W"] = lora_linear_backward_base(gy, saved, base, adapter, **how).W
        return y, {name: value for name, value in found.items() if value is not None}

    def init(self, W: Any, config: LoraConfig, seed: int) -> dict[str, Any]:
        """The start of an adapter at W."""
        W = W if self.xp is np else self.xp.asarray(W)
        base, adapter = init_adapter(Linear(W), config, rng=torch_generator(seed))
        found = {"W": base.W, "A": adapter.A, "B": adapter.B, "m": adapter.m, "bB": adapter.bB}
        return {name: value for name, value in found.items() if value is not None}

    def init_from(self, W: Any, config: LoraConfig, seed: int, given: dict[str, Any]) -> dict[str, Any]:
        """The start of an adapter at W, of the layer's inputs or the loss's gradient where it takes them."""
        there = {name: value if self.xp is np else self.xp.asarray(value) for name, value in given.items()}
        W, rng = W if self.xp is np else self.xp.asarray(W), torch_generator(seed)
        handed: Any = {"inputs": there.get("inputs"), "gradient": there.get("gradient")}
        base, adapter = init_adapter(Linear(W), config, rng=rng, **handed)
        found = {"W": base.W, "A": adapter.A, "B": adapter.B, "m": adapter.m}
        return {name: value for name, value in found.items() if value is not None}

    def merge(self, case: Case) -> dict[str, Any]:
        """The merged weight and bias."""
        _, base, adapter, _ = self._records(case)
        linear = merge(base, adapter, scaling=case.scaling)
        return {"W": linear.W} | ({} if linear.b is None else {"b": linear.b})

    def unmerge(self, case: Case, merged: dict[str, Any]) -> dict[str, Any]:
        """W and b again of the merged ones; under DoRA with the row norms from before."""
        _, base, adapter, _ = self._records(replace(case, train_b=False))  # the merged bias is the base's
        there = {name: value if self.xp is np else self.xp.asarray(value) for name, value in merged.items()}
        n = None if adapter.m is None else row_norms(base, adapter, scaling=case.scaling)
        linear = unmerge(Linear(there["W"], there.get("b")), adapter, scaling=case.scaling, n=n)
        return {"W": linear.W} | ({} if linear.b is None else {"b": linear.b})


class Related:
    """The engine's related forms, and its combination of adapters, on NumPy."""

    def vera_forward(self, case: RelatedCase) -> Any:
        """y of VeRA."""
        return vera_linear_forward(case.at["x"], *_vera(case), mask=case.at.get("mask"))[0]

    def vera_backward(self, case: RelatedCase, gy: Any) -> dict[str, Any]:
        """The gradients by x and by both vectors."""
        _, saved = vera_linear_forward(case.at["x"], *_vera(case), mask=case.at.get("mask"))
        gx, g = vera_linear_backward(gy, saved, *_vera(case))
        return {"x": gx, "lambda_d": g.lambda_d, "lambda_b": g.lambda_b}

    def adalora_forward(self, case: RelatedCase) -> Any:
        """y of AdaLoRA."""
        how: Any = {"alpha": case.alpha, "rank": case.rank}
        return adalora_linear_forward(case.at["x"], *_adalora(case), **how, mask=case.at.get("mask"))[0]

    def adalora_backward(self, case: RelatedCase, gy: Any) -> dict[str, Any]:
        """The gradients by x, A, B and E."""
        how: Any = {"alpha": case.alpha, "rank": case.rank}
        _, saved = adalora_linear_forward(case.at["x"], *_adalora(case), **how, mask=case.at.get("mask"))
        gx, g = adalora_linear_backward(gy, saved, *_adalora(case), **how)
        return {"x": gx, "A": g.A, "B": g.B, "E": g.E}

    def tokens_forward(self, case: RelatedCase) -> Any:
        """y of trained rows."""
        return token_rows_forward(case.at["ids"], *_tokens(case))[0]

    def tokens_backward(self, case: RelatedCase, gy: Any) -> dict[str, Any]:
        """The gradient by the rows."""
        _, saved = token_rows_forward(case.at["ids"], *_tokens(case))
        return {"T": token_rows_backward(gy, saved, *_tokens(case)).rows}

    def blend(self, case: BlendCase) -> dict[str, Any]:
        """A and B of the combination, whose scaling is 1."""
        of, keeps, elects = METHODS[case.method]
        told: dict[str, Any] = {} if keeps == "all" else {"density": case.density}
        told |= {"majority_sign_method": case.majority} if elects else {}
        told |= {"rank": case.rank} if of == "update" else {}
        told |= {} if case.masks is None else {"rng": _Told(case)}
        names = [str(i) for i in range(len(case.pairs))]
        adapters = {name: Adapter(A, B) for name, (A, B) in zip(names, case.pairs, strict=True)}
        numbers = (dict(zip(names, v, strict=True)) for v in (case.weights, case.scalings))
        found, _ = combine(adapters, *numbers, method=case.method, **told)
        return {"A": found.A, "B": found.B}


class _Told(np.random.Generator):
    """Draws what a case's masks say: below every density where they keep, and above where they drop."""

    def __init__(self, case: BlendCase) -> None:
        super().__init__(np.random.PCG64(0))
        masks = case.masks or ()
        self._left = [mask[i] for i in range(len(masks[0])) for mask in masks]  # every A's, then every B's

    def random(self, *shape: Any) -> Any:  # type: ignore[override]
        return np.where(self._left.pop(0), 0.0, 2.0)


def _vera(case: RelatedCase) -> tuple[Linear, VeraShared, VeraAdapter]:
    v = case.at
    return Linear(v["W"]), VeraShared(v["A"], v["B"]), VeraAdapter(v["lambda_d"], v["lambda_b"])


def _adalora(case: RelatedCase) -> tuple[Linear, AdaLoraAdapter]:
    return Linear(case.at["W"]), AdaLoraAdapter(case.at["A"], case.at["B"], case.at["E"])


def _tokens(case: RelatedCase) -> tuple[Embedding, TokenRows]:
    return Embedding(case.at["W"], case.padding), TokenRows(case.at["index"], case.at["T"])


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

    def _placed(self, case: EmbeddingCase | ConvCase) -> dict[str, Any]:
        return {n: value if self.xp is np else self.xp.asarray(value) for n, value in case.arrays().items()}

    def _table(self, case: EmbeddingCase) -> tuple[Any, Embedding, Adapter]:
        v = self._placed(case)
        base = Embedding(v["W"], case.padding, case.embed_scale, case.by_frequency)
        return v["ids"], base, Adapter(v["A"], v["B"], v.get("m"))

    def embedding_forward(self, case: EmbeddingCase) -> Any:
        """y of the ids."""
        ids, base, adapter = self._table(case)
        return lora_embedding_forward(ids, base, adapter, scaling=case.scaling)[0]

    def embedding_backward(self, case: EmbeddingCase, gy: Any) -> dict[str, Any]:
        """The gradients by A, B, W and m."""
        ids, base, adapter = self._table(case)
        gy = gy if self.xp is np else self.xp.asarray(gy)
        _, saved = lora_embedding_forward(ids, base, adapter, scaling=case.scaling)
        how: Any = {"scaling": case.scaling, "norm_gradient": case.norm_gradient}
        g = lora_embedding_backward(gy, saved, base, adapter, **how)
        found = {"A": g.A, "B": g.B, "m": g.m}
        found["W"] = lora_embedding_backward_base(gy, saved, base, adapter, **how).W
        return {name: value for name, value in found.items() if value is not None}

    def embedding_merge(self, case: EmbeddingCase) -> dict[str, Any]:
        """The merged table."""
        _, base, adapter = self._table(case)
        return {"W": merge_embedding(base, adapter, scaling=case.scaling).W}

    def embedding_init(self, W: Any, config: LoraConfig, seed: int) -> dict[str, Any]:
        """The start of an adapter at W."""
        base = Embedding(W if self.xp is np else self.xp.asarray(W))
        _, adapter = init_embedding_adapter(base, config, rng=torch_generator(seed))
        return {"A": adapter.A, "B": adapter.B}

    def _kernel(self, case: ConvCase) -> tuple[Any, Conv, ConvAdapter, Any]:
        v = self._placed(case)
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
        gy = gy if self.xp is np else self.xp.asarray(gy)
        _, saved = lora_conv_forward(x, base, adapter, scaling=case.scaling, mask=mask)
        how: Any = {"scaling": case.scaling, "norm_gradient": case.norm_gradient}
        gx, g = lora_conv_backward(gy, saved, base, adapter, **how)
        gbase = lora_conv_backward_base(gy, saved, base, adapter, **how)
        found = {"x": gx, "A": g.A, "B": g.B, "m": g.m, "bB": g.bB, "W": gbase.W, "b": gbase.b}
        return {name: value for name, value in found.items() if value is not None}

    def conv_merge(self, case: ConvCase) -> dict[str, Any]:
        """The merged weight and bias."""
        _, base, adapter, _ = self._kernel(case)
        found = merge_conv(base, adapter, scaling=case.scaling)
        return {"W": found.W} | ({} if found.b is None else {"b": found.b})

    def conv_init(self, W: Any, config: LoraConfig, seed: int) -> dict[str, Any]:
        """The start of an adapter at W."""
        base = Conv(W if self.xp is np else self.xp.asarray(W))
        _, adapter = init_conv_adapter(base, config, rng=torch_generator(seed))
        return {"A": adapter.A, "B": adapter.B}


def _scalings(cases: list[Case]) -> dict[str, float]:
    return {str(i): case.scaling for i, case in enumerate(cases)}


class Fast(Layer, OpsFast):
    """lx.fast on NumPy or CuPy: layers, merges, ops of its own; starts and unmerging are the reference's."""

    spec = Spec(norm_gradient=(False, True), strided=True)

    def run(self, case: Case, gy: Any) -> tuple[Any, dict[str, Any]]:
        """y and all gradients but W's, which the fast engine does not offer."""
        x, base, adapter, mask = self._records(case)
        gy = gy if self.xp is np else self.xp.asarray(gy)
        y, saved = fast.lora_linear_forward(x, base, adapter, scaling=case.scaling, dropout=mask)
        how: Any = {"scaling": case.scaling, "norm_gradient": case.norm_gradient}
        gx, g = fast.lora_linear_backward(gy, saved, base, adapter, **how)
        found = {"x": gx, "A": g.A, "B": g.B, "m": g.m, "b": g.b, "bB": g.bB}
        return y, {name: value for name, value in found.items() if value is not None}

    def merge(self, case: Case) -> dict[str, Any]:
        """The merged weight and bias, merged in place into a copy."""
        _, base, adapter, _ = self._records(case)
        linear = fast.merge_into(Linear(self.xp.array(base.W), base.b), adapter, scaling=case.scaling)
        return {"W": linear.W} | ({} if linear.b is None else {"b": linear.b})
