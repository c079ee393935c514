"""Convolutions: what is right passes however it is computed, what is wrong is refused where it shows."""

import warnings
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from often import once_each

from lorax_np.verify.batteries import conv_case as conv
from lorax_np.verify.batteries.conv import LAYOUTS, ConvReference, battery_conv, draw
from lorax_np.verify.batteries.conv_case import as_linear, unwindowed, windows
from lorax_np.verify.batteries.conv_laws import battery_conv_laws, battery_conv_spread, battery_conv_start
from lorax_np.verify.subjects import reference

PROFILES = "fp32", "fp64"
KINDS = frozenset(f"conv, {layout[0]}" for layout in LAYOUTS)
FULL = frozenset(kind for kind in KINDS if "full" in kind)  # for subjects that differentiate the norm
GRADIENTS = {"x", "A", "B"}


def judged(subject, profile="fp32", level="full", only="", seed=0, battery=battery_conv):
    with np.errstate(all="ignore"):
        return [check for checks in battery(subject, profile, seed, level, only) for check in checks]


def bad(checks):
    return {(check.kind, check.tensor) for check in checks if check.verdict != "pass"}


def kinds(*words):
    return {kind for kind in KINDS if any(word in kind for word in words)}


# ---- what is right -----------------------------------------------------------------------------------------


class Direct(ConvReference):
    """Place by place and entry by entry of the kernel, channels by einsum; the other order of every sum."""

    def parts(self, case):
        """For each entry of the kernel, its index and the slices of a padded x that it meets."""
        for t in product(*map(range, case.kernel)):
            first = [t[a] * case.dilation[a] for a in range(len(t))]
            yield (
                t,
                [
                    slice(first[a], first[a] + (P - 1) * case.stride[a] + 1, case.stride[a])
                    for a, P in enumerate(case.gy.shape[2:])
                ],
            )

    def padded(self, case, x):
        mode = conv.PADS[case.mode]
        return np.pad(x, [(0, 0), (0, 0), *((p, p) for p in case.padding)], mode=mode)

    def conv_forward(self, case):
        if case.m is not None:
            raise NotImplementedError("no DoRA here")
        k, G = len(case.kernel), case.groups
        x, xd = (self.padded(case, x) for x in (case.x, case.x if case.mask is None else case.x * case.mask))
        y = np.zeros(case.gy.shape, case.x.dtype)
        z = np.zeros((len(case.x), len(case.A), *case.gy.shape[2:]), case.x.dtype)
        for t, spans in self.parts(case):
            at = (slice(None), slice(None), *t)
            for w, part, out in zip(
                np.split(case.W[at], G),
                np.split(x[(slice(None), slice(None), *spans)], G, axis=1),
                np.split(y, G, axis=1),
                strict=True,
            ):
                out += np.einsum("oi,ni...->no...", w, part)
            z += np.einsum("ri,ni...->nr...", case.A[at], xd[(slice(None), slice(None), *spans)])
        B = case.B.reshape(len(case.B), -1)
        u = [
            np.einsum("or,nr...->no...", b, part)
            for b, part in zip(np.split(B, G), np.split(z, G, axis=1), strict=True)
        ]
        y += case.x.dtype.type(case.scaling) * np.concatenate(u, axis=1)
        for bias, factor in ((case.b, 1.0), (case.bB, case.scaling)):
            if bias is not None:
                y += case.x.dtype.type(factor) * bias.reshape(-1, *(1,) * k)
        return y


@pytest.mark.parametrize("seeds", [range(1), pytest.param(range(1, 3), marks=pytest.mark.thorough)], ids=str)
@pytest.mark.parametrize(("right", "profile"), once_each([ConvReference, reference, Direct], PROFILES))
def test_the_right_pass(right, profile, seeds):
    for seed in seeds:
        checks = judged(right(), profile, seed=seed)
        assert {check.verdict for check in checks} <= {"pass", "not run"}
        if right is not Direct:
            assert bad(checks) == set()
            assert max(check.ratio for check in checks if check.ratio is not None) < 0.5
    left = {check.kind for check in checks if check.verdict == "not run"}
    assert left == (kinds("dora") - FULL if right is Direct else set())
    assert {check.kind for check in checks} == (KINDS if right is reference else KINDS - FULL)
    assert len({check.id for check in checks}) == len(checks)
    assert 0 < len(judged(right(), profile, "quick")) < len(checks) / 2
    for battery in (battery_conv_laws, battery_conv_start, battery_conv_spread):
        for seed in range(2):
            found = judged(right(), profile, seed=seed, battery=battery)
            assert found
            assert all(check.verdict in ("pass", "not run") for check in found), bad(found)


def test_the_truth_is_the_definition():
    """Output by output, place by place, entry by entry, in plain loops; gradients by steps of a quadratic φ."""
    for layout in range(len(LAYOUTS)):
        case = draw("", layout, "float64", (3, layout))
        if case.m is not None or not len(case.x):
            continue
        y, k, G = np.zeros(case.gy.shape), len(case.kernel), case.groups
        wide = np.pad(case.x, [(0, 0), (0, 0), *((p, p) for p in case.padding)], mode=conv.PADS[case.mode])
        mask = np.ones_like(case.x) if case.mask is None else case.mask
        drop = np.pad(
            case.x * mask, [(0, 0), (0, 0), *((p, p) for p in case.padding)], mode=conv.PADS[case.mode]
        )
        d_group, r_group = case.W.shape[1], case.B.shape[1]
        for n, o, *at in np.ndindex(y.shape):
            g = o // (len(case.W) // G)
            total = case.b[o] + (0.0 if case.bB is None else case.scaling * case.bB[o])
            for t in np.ndindex(case.kernel):
                here = tuple(at[a] * case.stride[a] + t[a] * case.dilation[a] for a in range(k))
                total += sum(case.W[(o, i, *t)] * wide[(n, g * d_group + i, *here)] for i in range(d_group))
                for rho in range(r_group):
                    z = sum(
                        case.A[(g * r_group + rho, i, *t)] * drop[(n, i, *here)] for i in range(case.x.shape[1])
                    )
                    total += case.scaling * case.B[(o, rho, *(0,) * k)] * z
            y[(n, o, *at)] = total
        want = conv.truth(case)
        assert np.abs(want["y"] - y).max() < 1e-12, case.kind
        rng = np.random.default_rng(layout)
        for name in ("x", "A", "B", "W"):
            v = rng.standard_normal(getattr(case, name).shape)
            ends = [
                conv.truth(replace(case, **{name: getattr(case, name) + sign * v}))["y"] for sign in (1, -1)
            ]
            moved = np.sum(case.gy * (ends[0] - ends[1])) / 2
            assert abs(moved - np.sum(want[name] * v)) < 1e-10 * (1 + np.sum(np.abs(want[name] * v))), (
                case.kind,
                name,
            )


def test_windows_and_their_adjoint():
    for layout in range(len(LAYOUTS)):
        case = draw("", layout, "float64", (4, layout))
        whole = replace(case, x=np.rint(3 * case.x))
        rows = windows(whole, whole.x)
        G = np.rint(3 * np.random.default_rng(layout).standard_normal(rows.shape))
        assert np.sum(G * rows) == np.sum(unwindowed(whole, G) * whole.x)


def test_what_a_case_asks():
    """Options that differ from what they are without, and a mode that shows."""
    for layout in range(len(LAYOUTS)):
        case = draw("", layout, "float32", (0, layout))
        assert case.scaling != 1
        assert all(value.size == 0 or np.any(value) for value in case.arrays().values())
        assert (case.mode == "zeros") or (case.places > 0).all()
        flat = as_linear(case)
        if case.m is not None:
            n = np.linalg.norm(flat.W + case.scaling * flat.B @ flat.A, axis=1)
            assert (np.abs(case.m / n - 1) > 0.01).all()


# ---- what is wrong -----------------------------------------------------------------------------------------


class Undilated(ConvReference):
    """Dilation read as 1, where that gives as many windows: PEFT's A, in base and adapter alike."""

    def conv_forward(self, case):
        y = super().conv_forward(replace(case, dilation=tuple(1 for _ in case.kernel)))
        return y[tuple(slice(0, size) for size in case.gy.shape)]


class Ungrouped(ConvReference):
    """Groups read in the other order."""

    def conv_forward(self, case):
        if case.groups == 1:
            return super().conv_forward(case)
        return super().conv_forward(replace(case, W=np.roll(case.W, len(case.W) // case.groups, axis=0)))


class ScaleOff(ConvReference):
    def conv_backward(self, case, gy):
        g = super().conv_backward(case, gy)
        return g | {"A": (g["A"] * 1.001).astype(gy.dtype)}


class Stray(ConvReference):
    """Something where no window is."""

    def conv_backward(self, case, gy):
        g = super().conv_backward(case, gy)
        held = np.bincount(case.places.ravel(), minlength=int(np.prod(case.x.shape[2:])) + 1)[1:] > 0
        gx = g["x"].reshape(*case.x.shape[:2], held.size)
        gx[:, :, ~held] = 1e-30
        return g | {"x": gx.reshape(case.x.shape)}


class Unbiased(ConvReference):
    def conv_merge(self, case):
        return super().conv_merge(replace(case, b=0 * case.b))


LAW = "gradients where no window and no item reaches are 0"
FAULTS = [
    (Undilated, {"y"}, {"conv, dilation", "conv, dora, dropout"}),
    (Ungrouped, {"y"}, {"conv, groups", "conv, dora, groups"}),
    (ScaleOff, {"A"}, KINDS - FULL - {"conv, no item"}),
    (Stray, {"x", LAW}, {"conv, stride", "conv, dora, dropout"}),
    (Unbiased, {"b"}, KINDS - FULL - kinds("groups")),
]


@pytest.mark.parametrize(
    ("wrong", "tensors", "where", "profile"),
    once_each(FAULTS, PROFILES),
    ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else ""),
)
def test_a_fault_is_refused_by_name(wrong, tensors, where, profile):
    found = bad(judged(wrong(), profile))
    assert {tensor for _, tensor in found} - {LAW} == tensors - {LAW}
    assert {kind for kind, tensor in found if tensor in tensors} == where


def test_what_is_not_covered_and_what_breaks():
    class Plain(ConvReference):
        def conv_forward(self, case):
            if case.groups > 1:
                raise NotImplementedError("no groups here")
            if not len(case.x):
                raise ValueError("no items")
            return super().conv_forward(case)

    found = {(c.kind, c.verdict, c.note) for c in judged(Plain()) if c.verdict != "pass"}
    assert {kind for kind, verdict, note in found if (verdict, note) == ("not run", "no groups here")} == kinds(
        "groups"
    )
    assert ("conv, no item", "crash", "ValueError: no items") in found
    for battery in (battery_conv, battery_conv_laws, battery_conv_start, battery_conv_spread):
        assert judged(object(), battery=battery) == []


def test_other_shapes_are_refused_and_do_not_crash():
    class Turned(ConvReference):
        def conv_backward(self, case, gy):
            g = super().conv_backward(case, gy)
            return g | {"A": np.moveaxis(g["A"], 0, 1)}

    found = judged(Turned())
    assert {check.verdict for check in found} == {"pass", "fail"}
    assert {tensor for _, tensor in bad(found)} == {"A", LAW}
    laws = judged(Turned(), battery=battery_conv_laws)
    assert {check.verdict for check in laws} == {"pass", "fail"}


# ---- PEFT --------------------------------------------------------------------------------------------------


def of_peft():
    """PEFT's convolutions as a subject."""
    pytest.importorskip("peft")
    from peft import LoraConfig, LoraModel

    torch = pytest.importorskip("torch")
    layers = torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d

    class PeftConv:
        def layer(self, case):
            holder = torch.nn.Module()
            steps = {n: getattr(case, n) for n in ("stride", "padding", "dilation", "groups")}
            d_in, d_out = case.x.shape[1], len(case.W)
            module = layers[len(case.kernel) - 1](d_in, d_out, case.kernel, padding_mode=case.mode, **steps)
            holder.site = module.to(torch.float64)
            c = case.config
            options = {"r": c.r, "lora_alpha": c.lora_alpha, "use_rslora": c.use_rslora, "use_dora": c.use_dora}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = LoraConfig(target_modules=["site"], lora_bias=case.bB is not None, **options)
                found = LoraModel(holder, config, "default").model.site
            A, B = found.lora_A["default"], found.lora_B["default"]
            p = {"W": module.weight, "b": module.bias, "A": A.weight, "B": B.weight}
            p |= {} if case.bB is None else {"bB": B.bias}
            p |= {} if case.m is None else {"m": found.lora_magnitude_vector["default"].weight}
            for name, value in p.items():
                value.data = torch.tensor(getattr(case, name)).reshape(value.shape)
                value.requires_grad_(True)
            if case.mask is not None:
                mask = torch.tensor(case.mask)
                found.lora_dropout["default"].forward = lambda x: x * mask
            return found, p

        def conv_forward(self, case):
            return self.layer(case)[0](torch.tensor(case.x)).detach().numpy()

        def conv_backward(self, case, gy):
            layer, p = self.layer(case)
            p = {"x": torch.tensor(case.x, requires_grad=True), **p}
            layer(p["x"]).backward(torch.tensor(gy))
            return {name: value.grad.numpy().reshape(getattr(case, name).shape) for name, value in p.items()}

        def conv_merge(self, case):
            layer, _ = self.layer(case)
            layer.merge()
            return {"W": layer.base_layer.weight.detach().numpy(), "b": layer.base_layer.bias.detach().numpy()}

    return PeftConv()


@pytest.mark.peft
def test_peft_s_convolutions_but_for_what_is_known():
    """Right: strides, paddings of zeros, groups, one to three axes, DoRA. Wrong, by name: specs/conv.md."""
    found = judged(of_peft(), "fp64", "quick")
    wrong = {kind for kind, _ in bad(found)}
    known = {
        *kinds("reflect", "replicate", "circular"),  # peft-0.21.2/conv-padding-mode
        *("conv, dilation", "conv, dora, dropout"),  # peft-0.21.2/conv-dilation
        "conv, dora, groups",  # peft-0.21.2/conv-dora-groups
    }
    assert wrong - {"conv, no item"} <= known
    assert known - wrong == set()
    assert {check.kind for check in found if check.verdict == "pass"} >= kinds(
        "one axis", "stride", "three axes", "square"
    )
