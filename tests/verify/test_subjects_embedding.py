"""Embeddings: what is right passes in every order of evaluation, what is wrong is refused where it shows."""

from dataclasses import replace

import numpy as np
import pytest
from often import once_each

import lorax_np as lx
from lorax_np.verify.batteries import embedding_case as embedding
from lorax_np.verify.batteries.embedding import LAYOUTS, EmbeddingReference, battery_embedding, draw
from lorax_np.verify.batteries.embedding_case import ratio
from lorax_np.verify.precision import PRECISIONS

PROFILES = "fp32", "fp64", "bf16", "fp16"
KINDS = frozenset(f"embedding, {layout[0]}" for layout in LAYOUTS if "full" not in layout[0])
FULL = "embedding, dora full norm"  # for subjects that differentiate the norm
PADDED = frozenset(kind for kind in KINDS if "padding" in kind)
OFTEN = KINDS - {"embedding, one id", "embedding, no token"}  # kinds in which ids come twice


def judged(subject, profile="fp32", level="full", only="", seed=0):
    pytest.importorskip("ml_dtypes")
    with np.errstate(all="ignore"):
        return [check for checks in battery_embedding(subject, profile, seed, level, only) for check in checks]


def bad(checks):
    return {(check.kind, check.tensor) for check in checks if check.verdict != "pass"}


class OneHot(EmbeddingReference):
    """The same by products with one-hot rows, delta first, everything in the dtype of the arrays."""

    def embedding_forward(self, case):
        delta = case.scaling * (case.B.astype(np.float32) @ case.A.astype(np.float32)).T
        whole = case.W + delta.astype(case.W.dtype)
        k = 1.0 if case.m is None else self.ratio(case)[0]
        return (case.embed_scale * k * whole[case.ids]).astype(case.W.dtype)

    def ratio(self, case):
        W, A, B, m = (value.astype(np.float32) for value in (case.W, case.A, case.B, case.m))
        n = np.linalg.norm(W.T + np.float32(case.scaling) * (B @ A), axis=1)
        return m / n, n

    def embedding_backward(self, case, gy):
        x = np.eye(len(case.W), dtype=np.float32)[case.ids.reshape(-1)]
        gu = case.scaling * case.embed_scale * gy.reshape(-1, case.W.shape[1]).astype(np.float32)
        found = {}
        if case.m is not None:
            k, n = self.ratio(case)
            whole = case.W.astype(np.float32) + case.scaling * (case.B.astype(np.float32) @ case.A).T
            G = case.embed_scale * gy.reshape(-1, case.W.shape[1]).astype(np.float32)
            found["m"] = (np.sum(G * (x @ whole), axis=0) / n).astype(case.m.dtype)
            gu = gu * k
        live = np.arange(len(case.W)) != (-1 if case.padding is None else case.padding)
        share = live / np.maximum(case.counts if case.by_frequency else 1, 1)
        gA = case.B.T.astype(np.float32) @ (gu.T @ x) * share
        gB = (gu.T @ x) @ case.A.T.astype(np.float32)
        return {"A": gA.astype(case.A.dtype), "B": gB.astype(case.B.dtype)} | found


class Differentiated(EmbeddingReference):
    spec = lx.verify.Spec(norm_gradient=(False, True))


@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 8), marks=pytest.mark.thorough)], ids=str)
@pytest.mark.parametrize(
    ("right", "profile"),
    once_each([EmbeddingReference, Differentiated, OneHot, lx.verify.subjects.reference], PROFILES),
)
def test_the_right_pass(right, profile, seeds):
    if right is OneHot and profile == "fp64":
        return  # it computes in float32
    for seed in seeds:
        checks = judged(right(), profile, seed=seed)
        assert bad(checks) == set()
        assert max(check.ratio for check in checks if check.ratio is not None) < 0.6
    full = right in (Differentiated, lx.verify.subjects.reference)
    assert {check.kind for check in checks} == KINDS | {"start"} | ({FULL} if full else set())
    assert len({check.id for check in checks}) == len(checks)
    assert 0 < len(judged(right(), profile, "quick")) < len(checks) / 2
    assert {c.id.split("/")[1] for c in judged(right(), only="embedding/first-padding/1")} == {"first-padding"}


def test_the_truth_is_the_definition():
    """Token by token, in plain loops."""
    for layout in range(len(LAYOUTS)):
        case = draw("", layout, "float64", (3, layout))
        y, g = np.zeros(case.gy.shape), {name: np.zeros(getattr(case, name).shape) for name in ("A", "B", "W")}
        k, V = np.ones(len(case.B)), case.W.T + case.scaling * case.B @ case.A
        if case.m is not None:
            n = np.array([sum(v * v for v in row) ** 0.5 for row in V])
            k, g["m"] = case.m / n, np.zeros(len(n))
        for at in np.ndindex(case.ids.shape):
            v, G = case.ids[at], case.embed_scale * case.gy[at]
            Z, gu = case.W[v] + case.scaling * case.B @ case.A[:, v], G * k
            y[at] = case.embed_scale * k * Z
            if case.m is not None:
                g["m"] += G * Z / n
            g["B"] += case.scaling * np.outer(gu, case.A[:, v])
            part = 1 / case.counts[v] if case.by_frequency else 1.0
            if v != case.padding:
                g["A"][:, v] += part * case.scaling * case.B.T @ gu
                g["W"][v] += part * gu
        if case.norm_gradient:
            gV = -(g["m"] * case.m / n**2)[:, None] * V
            g["A"] += case.scaling * case.B.T @ gV
            g["B"] += case.scaling * gV @ case.A.T
            g["W"] += gV.T
        want = embedding.truth(case)
        for name, value in {"y": y, **g}.items():
            assert np.abs(want[name] - value).max(initial=0.0) < 1e-12, (case.kind, name)
        assert want["A"].any() or not case.ids.size
        assert case.config.scaling != 1


def test_what_a_case_asks():
    """Ids that repeat, ids that never come, padding among the tokens."""
    for layout, (kind, lead, _, _, padding, *_) in enumerate(LAYOUTS):
        case = draw("", layout, "float32", (0, layout))
        assert case.ids.shape == lead
        assert (case.counts == 0).any() or kind == "axes"
        assert (case.counts > 1).any() or f"embedding, {kind}" not in OFTEN or kind in ("plain", "scaled")
        assert padding is None or case.counts[padding] > 0
        assert all(value.size == 0 or np.any(value) for value in (case.A, case.B))


# ---- what is wrong -----------------------------------------------------------------------------------------


class Assigned(EmbeddingReference):
    """gA by = and not by +=."""

    def embedding_backward(self, case, gy):
        g = super().embedding_backward(case, gy)
        gu = case.scaling * case.embed_scale * gy.reshape(-1, gy.shape[-1])
        gu = gu * ratio(case)
        gA = np.zeros_like(case.A.T)
        gA[case.ids.reshape(-1)] = (gu @ case.B).astype(gA.dtype)
        return g | {"A": np.where(g["A"] != 0, gA.T, 0)}


class PaddingTrains(EmbeddingReference):
    def embedding_backward(self, case, gy):
        return super().embedding_backward(replace(case, padding=None), gy)


class PaddingForgotten(EmbeddingReference):
    """Tokens of padding are left out of gB too."""

    def embedding_backward(self, case, gy):
        g = super().embedding_backward(case, gy)
        kept = (case.ids != case.padding)[..., None]
        return g | {"B": super().embedding_backward(case, (gy * kept).astype(gy.dtype))["B"]}


class WithoutScale(EmbeddingReference):
    def embedding_forward(self, case):
        return super().embedding_forward(unscaled(case))

    def embedding_backward(self, case, gy):
        return super().embedding_backward(unscaled(case), gy)


def unscaled(case):
    return replace(case, config=lx.LoraConfig(r=case.config.r, lora_alpha=case.config.r))


class ScaleOff(EmbeddingReference):
    def embedding_backward(self, case, gy):
        g = super().embedding_backward(case, gy)
        return g | {"A": (g["A"] * 1.001).astype(g["A"].dtype)}


class FrequencyIgnored(EmbeddingReference):
    def embedding_backward(self, case, gy):
        return super().embedding_backward(replace(case, by_frequency=False), gy)


class EmbedScaleNotInUpdate(EmbeddingReference):
    """The base's factor is left out of the update."""

    def embedding_forward(self, case):
        plain = super().embedding_forward(replace(case, embed_scale=1.0))
        return plain + ((case.embed_scale - 1) * case.W[case.ids]).astype(plain.dtype)


class EmbedScaleNotBackward(EmbeddingReference):
    def embedding_backward(self, case, gy):
        return super().embedding_backward(replace(case, embed_scale=1.0), gy)


class OneTooFar(EmbeddingReference):
    """Ids counted from 1."""

    def embedding_forward(self, case):
        return super().embedding_forward(replace(case, ids=(case.ids + 1) % len(case.W)))


class NeverUsedTrain(EmbeddingReference):
    def embedding_backward(self, case, gy):
        g = super().embedding_backward(case, gy)
        g["A"][:, case.counts == 0] = 1e-30
        return g


class RowsNotColumns(EmbeddingReference):
    """gA in the shape that looking up likes."""

    def embedding_backward(self, case, gy):
        g = super().embedding_backward(case, gy)
        return g | {"A": g["A"].T}


TRAINED = KINDS - {"embedding, no token"}
SCALED = frozenset(kind for kind in KINDS if "scaled" in kind)
FAULTS = [
    (Assigned, {"A"}, OFTEN - {"embedding, plain", "embedding, scaled", "embedding, rank one"}),
    (PaddingTrains, {"A", "W"}, PADDED),
    (PaddingForgotten, {"B"}, PADDED),
    (WithoutScale, {"y", "A", "B", "W", "m"}, TRAINED),
    (ScaleOff, {"A"}, TRAINED),
    (FrequencyIgnored, {"A", "W"}, {"embedding, frequency", "embedding, frequency, padding"}),
    (EmbedScaleNotInUpdate, {"y"}, SCALED),
    (EmbedScaleNotBackward, {"A", "B", "W", "m"}, SCALED),
    (OneTooFar, {"y"}, TRAINED),
    (RowsNotColumns, {"A"}, TRAINED),
]


@pytest.mark.parametrize(
    ("wrong", "tensors", "kinds", "profile"),
    once_each(FAULTS, PROFILES),
    ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else ""),
)
def test_a_fault_is_refused_by_name(wrong, tensors, kinds, profile):
    found = bad(judged(wrong(), profile))
    laws = {tensor for _, tensor in found} - {"y", "A", "B", "W", "m"}
    if wrong is ScaleOff and PRECISIONS[profile].dtype.endswith("16"):
        return  # a thousandth is below what 16 bits explain
    assert {tensor for _, tensor in found} - laws == tensors
    assert {kind for kind, tensor in found if tensor in tensors} >= kinds - {"embedding, one id"}
    assert laws <= {"gradients by ids without a token, and by padding, are 0"}
    assert bool(laws) == (wrong in (PaddingTrains, RowsNotColumns))


def test_what_no_token_trains_is_0_exactly():
    found = bad(judged(NeverUsedTrain(), "bf16"))
    law = "gradients by ids without a token, and by padding, are 0"
    assert {kind for kind, tensor in found if tensor == law} == KINDS - {"embedding, axes"}


# ---- the start ---------------------------------------------------------------------------------------------


class Swapped(EmbeddingReference):
    """B = 0, as in a linear layer."""

    def embedding_init(self, W, config, seed):
        g = super().embedding_init(W.T, config, seed)
        return {"A": g["B"].T, "B": g["A"].T}


class Narrow(EmbeddingReference):
    def embedding_init(self, W, config, seed):
        g = super().embedding_init(W, config, seed)
        return g | {"B": (g["B"] / 2).astype(W.dtype)}


class Both(EmbeddingReference):
    def embedding_init(self, W, config, seed):
        g = super().embedding_init(W, config, seed)
        return g | {"B": 0 * g["B"]}


@pytest.mark.parametrize("profile", PROFILES)
def test_the_start_has_the_role_that_is_declared(profile):
    def notes(subject):
        return {check.note for check in judged(subject, profile, only="embedding/start")}

    assert notes(EmbeddingReference()) == {""}
    assert notes(Swapped()) == {"A is not 0; B is, the other role: declare Spec(embedding='B')"}
    declared = Swapped()
    declared.spec = lx.verify.Spec(embedding="B")
    assert notes(declared) == {""}
    wrong = EmbeddingReference()
    wrong.spec = lx.verify.Spec(embedding="B")
    assert notes(wrong) == {"B is not 0; A is, the other role: declare Spec(embedding='A')"}
    assert all(note.startswith("B is 0.") for note in notes(Both()))
    assert all(note.startswith("B is 0.1") for note in notes(Narrow()))


# ---- what does not fit -------------------------------------------------------------------------------------


def test_what_is_not_covered_and_what_breaks():
    class Plain(EmbeddingReference):
        def embedding_forward(self, case):
            if case.padding is not None:
                raise NotImplementedError("no padding here")
            if not case.ids.size:
                raise ValueError("no tokens")
            return super().embedding_forward(case)

    found = {(c.kind, c.verdict, c.note) for c in judged(Plain()) if c.verdict != "pass"}
    assert {
        kind for kind, verdict, note in found if (verdict, note) == ("not run", "no padding here")
    } == PADDED
    assert ("embedding, no token", "crash", "ValueError: no tokens") in found
    assert judged(object()) == []


# ---- PEFT --------------------------------------------------------------------------------------------------


@pytest.mark.peft
@pytest.mark.parametrize("profile", PROFILES)
def test_peft_s_embedding_is_right(profile):
    for autocast in (True, False):
        subject = lx.verify.subjects.peft(autocast_adapter_dtype=autocast)
        checks = [check for seed in range(3) for check in judged(subject, profile, seed=seed)]
        assert bad(checks) == set()
        assert {check.kind for check in checks} == KINDS | {"start"}
        assert {check.tensor for check in checks} >= {"y", "A", "B", "W"}


@pytest.mark.peft
@pytest.mark.parametrize("profile", ["fp32", "bf16"])
def test_a_fault_in_peft_s_embedding_is_refused(profile):
    from lorax_np.verify.subjects.peft_layer import Peft

    class Changed(Peft):
        def embedding(self, case):
            layer, parts = super().embedding(case)
            layer.scaling["default"] *= 1.3
            layer.base_layer.padding_idx = None  # which PEFT reads at each call
            return layer, parts

    found = bad(judged(Changed(), profile))
    assert {tensor for _, tensor in found} >= {"y", "A", "B", "W"}
    assert {kind for kind, tensor in found if tensor.startswith("gradients by ids")} == PADDED
