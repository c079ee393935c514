"""Fused experts: what is right passes in every order of evaluation, what is wrong is convicted."""

from dataclasses import replace

import numpy as np
import pytest
from often import once_each

import lorax_np as lx
from lorax_np.verify.batteries import experts
from lorax_np.verify.batteries.experts import (
    LAYOUTS,
    ExpertsReference,
    battery_experts,
    battery_routed,
    draw,
)
from lorax_np.verify.isolate import isolated
from lorax_np.verify.mutants.experts import FAULTS, Pieces, Routed, fastest
from lorax_np.verify.subjects import fast, reference

PROFILES = "fp32", "fp64"
KINDS = frozenset(f"experts, {layout[0]}" for layout in LAYOUTS)
ZERO = "gradients of experts without rows are 0"


def judged(subject, profile="fp32", level="full", only="", seed=0, battery=battery_experts):
    with np.errstate(all="ignore"):
        return [check for checks in battery(subject, profile, seed, level, only) for check in checks]


def bad(checks):
    return {(check.kind, check.tensor) for check in checks if check.verdict != "pass"}


class ByEinsum:
    """All experts at once: stored factors as tensors of three axes, weights written out, gathered by rows."""

    def experts_forward(self, case):
        return np.einsum("noi,ni->no", self.whole(case)[case.ids], case.x)

    def experts_backward(self, case, gy):
        A, B, s = self.factors(case)[0], self.factors(case)[1], case.scaling
        one = np.eye(case.experts, dtype=gy.dtype)[case.ids]
        gW = np.einsum("ne,no,ni->eoi", one, gy, case.x)
        gA, gB = np.einsum("ore,eoi->eri", B, gW) * s, np.einsum("eoi,eri->ore", gW, A) * s
        return {
            "x": np.einsum("no,noi->ni", gy, self.whole(case)[case.ids]),
            "A": gA.reshape(case.A.shape).astype(gy.dtype),
            "B": gB.reshape(case.B.shape).astype(gy.dtype),
        }

    def experts_merge(self, case):
        return {"W": case.stored(list(self.whole(case)))}

    def factors(self, case):
        E = case.experts
        return case.A.reshape(E, -1, case.A.shape[1]), case.B.reshape(len(case.B), -1, E)

    def whole(self, case):
        A, B = self.factors(case)
        W = case.W.transpose(0, 2, 1) if case.transposed else case.W
        return (W + case.scaling * np.einsum("ore,eri->eoi", B, A)).astype(W.dtype)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("right", [ExpertsReference, Routed, ByEinsum])
def test_the_right_pass(right, profile):
    for seed in range(12):
        checks = judged(right(), profile, seed=seed)
        assert bad(checks) == set()
        assert max(check.ratio for check in checks if check.ratio is not None) < 0.5
    assert {check.kind for check in checks} == KINDS
    assert {check.tensor for check in checks} == {"y", "x", "A", "B", "W", ZERO}
    assert len({check.id for check in checks}) == len(checks)
    assert 0 < len(judged(right(), profile, "quick")) < len(checks)
    assert {c.id.split("/")[1] for c in judged(right(), only="experts/no-row/0")} == {"no-row"}


def test_the_reference_offers_all_that_the_engine_has():
    for battery in (battery_experts, battery_routed):
        assert bad(judged(reference(), battery=battery)) == set()
        assert judged(reference(), battery=battery)
        assert judged(fast(), battery=battery) == [], "which does not plan for experts"
        assert judged(object(), battery=battery) == []


def test_the_truth_is_the_definition():
    """Row by row and entry by entry, in plain loops over the stored layouts."""
    for layout in range(len(LAYOUTS)):
        case = draw("", layout, "float64", (3, layout))
        E, r, s = case.experts, case.config.r, case.scaling
        W = [w.T if case.transposed else w for w in case.W]
        y, gx, gA, gB = (np.zeros(v.shape) for v in (case.gy, case.x, case.A, case.B))
        gW = np.zeros((E, *W[0].shape))
        for n, e in enumerate(case.ids):
            y[n], gx[n] = W[e] @ case.x[n], W[e].T @ case.gy[n]
            gW[e] += np.outer(case.gy[n], case.x[n])
            for rho in range(r):
                a, b = case.A[e * r + rho], case.B[:, rho * E + e]
                y[n] += s * b * (a @ case.x[n])
                gx[n] += s * a * (b @ case.gy[n])
                gA[e * r + rho] += s * (b @ case.gy[n]) * case.x[n]
                gB[:, rho * E + e] += s * (a @ case.x[n]) * case.gy[n]
        merged = [
            W[e] + s * sum(np.outer(case.B[:, rho * E + e], case.A[e * r + rho]) for rho in range(r))
            for e in range(E)
        ]
        want = experts.truth(case)
        found = {"y": y, "x": gx, "A": gA, "B": gB, "W": case.stored(list(gW)), "merged": case.stored(merged)}
        for name, value in found.items():
            assert np.abs(want[name] - value).max(initial=0.0) < 1e-12, (case.kind, name)
        assert s != 1


def test_what_a_case_asks():
    """E unlike r and E = r, weights stored both ways, experts without rows, rows that are not sorted."""
    cases = [draw("", layout, "float32", (0, layout)) for layout in range(len(LAYOUTS))]
    assert {case.experts == case.config.r for case in cases} == {True, False}
    assert {case.transposed for case in cases} == {True, False}
    assert any(case.W.shape[1] == case.W.shape[2] for case in cases)
    assert any(set(range(case.experts)) - set(case.ids.tolist()) for case in cases if case.ids.size)
    assert any((np.diff(case.ids) < 0).any() for case in cases)
    assert all(case.experts - 1 in case.ids for case in cases if case.ids.size), "the last expert is run"


# ---- what is wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "profile"), once_each(FAULTS, PROFILES), ids=lambda value: getattr(value, "id", value)
)
def test_a_fault_is_refused_by_both_batteries(fault, profile):
    for battery in (battery_experts, battery_routed):
        assert bad(judged(fault.subject(), profile, battery=battery))


def test_a_fault_is_refused_by_the_tensor_that_has_it():
    def tensors(id):
        fault = next(fault for fault in FAULTS if fault.id == id)
        return {tensor for _, tensor in bad(judged(fault.subject()))}

    assert tensors("Y2") == {"y", "x", "A", "B", "W", ZERO}, "W of the merge; B's idle columns are another's"
    assert tensors("Y9") >= {"A"}
    assert tensors("Y9") <= {"A", ZERO}
    assert tensors("Y10") <= {"B", ZERO}
    assert tensors("Y11") == {"A", "B", ZERO}
    assert tensors("Y12") == {"x"}
    assert tensors("Y13") == {"A"}
    assert tensors("Y14") == {"B"}
    assert tensors("Y15") == tensors("Y16") == {"W"}


def test_with_one_rank_or_one_expert_both_orders_are_one():
    """Why r > 1 and E > 1: reading both factors in one order passes where there is nothing to order."""
    wrong = Routed(Pieces(A=fastest))
    assert not bad(judged(wrong, only="experts/one-expert"))
    assert bad(judged(wrong, only="experts/square"))


def test_what_no_row_trains_is_0_exactly():
    class NeverUsed(ExpertsReference):
        def experts_backward(self, case, gy):
            g = super().experts_backward(case, gy)
            for e in set(range(case.experts)) - set(case.ids.tolist()):
                g["A"][case.places(e)[0]] = 1e-30
            return g

    found = bad(judged(NeverUsed()))
    assert {kind for kind, tensor in found if tensor == ZERO} == {
        "experts, idle",
        "experts, last",
        "experts, no row",
    }


# ---- what does not fit -------------------------------------------------------------------------------------


def test_what_is_not_covered_and_what_breaks():
    class Plain(ExpertsReference):
        def experts_forward(self, case):
            if case.transposed:
                raise NotImplementedError("not transposed")
            if not case.ids.size:
                raise ValueError("no rows")
            return super().experts_forward(case)

    found = {(c.kind, c.verdict, c.note) for c in judged(Plain()) if c.verdict != "pass"}
    assert found == {
        ("experts, transposed", "not run", "not transposed"),
        ("experts, transposed square", "not run", "not transposed"),
        ("experts, no row", "crash", "ValueError: no rows"),
    }

    class Forward:
        experts_forward = ExpertsReference.experts_forward

    assert {check.tensor for check in judged(Forward())} == {"y", ZERO}

    class Shapes(ExpertsReference):
        def experts_merge(self, case):
            return {"W": super().experts_merge(replace(case))["W"].reshape(-1)}

    assert {tensor for _, tensor in bad(judged(Shapes()))} == {"W", ZERO}


def test_through_the_pipe():
    subject = isolated(ExpertsReference())
    assert bad(judged(subject, level="quick")) == set()
    subject.close()
    assert lx.verify.Report("", "", 0, "", judged(ExpertsReference())).passed


# ---- PEFT --------------------------------------------------------------------------------------------------


class PeftExperts:
    """PEFT's wrapper of a parameter, over a module that multiplies each row by its expert's weight."""

    def __init__(self, s=1.0):
        """s : what PEFT's scaling is spoiled by."""
        self.s = s

    def model(self, case):
        import peft
        import torch

        class Moe(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.from_numpy(case.W))
                self.is_transposed = case.transposed

            def forward(self, x, ids):
                W = self.weight.transpose(1, 2) if self.is_transposed else self.weight
                return torch.einsum("noi,ni->no", W[ids], x)

        options = {
            "r": case.config.r,
            "lora_alpha": case.config.lora_alpha,
            "use_rslora": case.config.use_rslora,
        }
        config = peft.LoraConfig(target_modules=[], target_parameters=["moe.weight"], **options)
        layer = peft.get_peft_model(torch.nn.ModuleDict({"moe": Moe()}), config).base_model.model["moe"]
        layer.scaling["default"] *= self.s
        parts = {
            "A": layer.lora_A["default"].weight,
            "B": layer.lora_B["default"].weight,
            "W": layer.get_param(),
        }
        with torch.no_grad():
            parts["A"].copy_(torch.from_numpy(case.A))
            parts["B"].copy_(torch.from_numpy(case.B))
        parts["W"].requires_grad_(True)
        parts["x"] = torch.from_numpy(case.x).requires_grad_(True)
        return layer, parts, layer(parts["x"], torch.from_numpy(case.ids))

    def experts_forward(self, case):
        return self.model(case)[2].detach().numpy()

    def experts_backward(self, case, gy):
        import torch

        _, parts, y = self.model(case)
        y.backward(torch.from_numpy(gy))
        return {name: part.grad.numpy() for name, part in parts.items()}

    def experts_merge(self, case):
        layer, _, _ = self.model(case)
        layer.merge()
        return {"W": layer.get_param().detach().numpy()}


@pytest.mark.peft
@pytest.mark.parametrize("profile", PROFILES)
def test_peft_s_experts_are_right(profile):
    for seed in range(2):
        checks = judged(PeftExperts(), profile, seed=seed)
        assert bad(checks) == set()
        assert {check.kind for check in checks} == KINDS


@pytest.mark.peft
def test_a_fault_in_peft_s_experts_is_refused():
    found = bad(judged(PeftExperts(1.001), "fp32", "quick"))
    assert {tensor for _, tensor in found} == {"y", "x", "A", "B", "W"}
