"""Conduct over calls, layouts, updates and merges, and laws between tensors: each law kept, each fault seen."""

from dataclasses import replace

import numpy as np
import pytest
from often import once_each, one_in

import lorax_np as lx
from lorax_np.verify.batteries.conduct import battery_conduct, laws_of
from lorax_np.verify.batteries.forms import VIEWS, battery_views
from lorax_np.verify.layers import plain
from lorax_np.verify.layers.plain import BACKWARD, FORWARD

REFERENCE = lx.verify.subjects.reference()


def run(subject, profile="fp32", seed=0, level="full", only=""):
    return [check for checks in battery_conduct(subject, profile, seed, level, only) for check in checks]


def wrong(checks):
    return [check for check in checks if check.verdict in ("fail", "crash")]


class Two:
    """A right layer of two methods, which keeps nothing between them; it merges and unmerges."""

    spec = lx.verify.Spec(norm_gradient=(False, True), strided=True, interleaves=True)

    def forward(self, case):
        return plain.run(case, case.gy)[0]

    def backward(self, case, gy):
        return plain.run(case, gy)[1]

    def merge(self, case):
        return REFERENCE.merge(case)

    def unmerge(self, case, merged):
        delta = case.scaling * case.B @ case.A
        W = merged["W"]
        if case.m is not None:
            W = W / (case.m / np.linalg.norm(case.W + delta, axis=1))[:, None]
        found = {"W": W - delta}
        if case.b is not None:
            found["b"] = merged["b"] - (0 if case.bB is None else case.scaling * case.bB)
        return {name: value.astype(case.W.dtype) for name, value in found.items()}


@pytest.mark.parametrize(
    ("subject", "profile"),
    once_each([REFERENCE, plain.Plain(), Two()], ["fp32", "fp64"]),
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_right_subjects_keep_every_law(subject, profile):
    for seed in range(5):
        checks = run(subject, profile, seed)
        assert {check.verdict for check in checks} == {"pass"}, wrong(checks)
        assert len({check.id for check in checks}) == len(checks)


def test_no_law_is_left_out_of_a_subject_that_has_everything():
    seen = {check.tensor for check in run(Two())}
    case = lx.verify.cases.draw("", "dora", (5, 7, 3, (2, 2)), "float32", (1,))
    assert seen == set(laws_of(Two(), case, 2.0**-24))


@pytest.mark.parametrize("seeds", [range(12), pytest.param(range(12, 50), marks=pytest.mark.thorough)], ids=str)
def test_300_right_layers_raise_no_alarm(seeds):
    count = 0
    for seed in seeds:
        for profile in ("fp32", "fp64"):
            checks = run(plain.Plain(), profile, 1000 + seed)
            assert not wrong(checks), wrong(checks)
            count += len(checks)
    print(f"{count} laws")


@pytest.mark.peft
def test_peft_keeps_the_laws():
    """Its module is in the mode that a case's mask says: without one it evaluates, whatever p is."""
    from lorax_np.verify.subjects.peft_layer import Peft

    class Moded(Peft):
        def layer(self, case):
            layer, parameters = super().layer(case)
            return layer.train(case.mask is not None), parameters

    checks = run(Moded(), level="quick")
    assert not wrong(checks), wrong(checks)
    assert sum(check.verdict == "pass" for check in checks) > 20


# ---- faults of conduct ---------------------------------------------------------------------------------------


class Stale(Two):
    """Backward takes the activations of the last forward, whatever case it is given."""

    def forward(self, case):
        self.last = case
        return super().forward(case)

    def backward(self, case, gy):
        return super().backward(self.last, gy)


class UsedUp(Two):
    """The first backward frees what the second needs."""

    def forward(self, case):
        self.free = False
        return super().forward(case)

    def backward(self, case, gy):
        if self.free:
            raise RuntimeError("nothing is saved")
        self.free = True
        return super().backward(case, gy)


class Accumulates(Two):
    """Gradients add up until the next forward."""

    def forward(self, case):
        self.held = {}
        return super().forward(case)

    def backward(self, case, gy):
        for name, value in super().backward(case, gy).items():
            self.held[name] = self.held.get(name, 0) + value
        return dict(self.held)


class Stacked(Two):
    """Each forward pushes; a second one before backward leaves a wrong top."""

    def forward(self, case):
        self.count = getattr(self, "count", 0) + 1
        return super().forward(case)

    def backward(self, case, gy):
        count, self.count = self.count, 0
        return {name: value * count for name, value in super().backward(case, gy).items()}


class Race(plain.Plain):
    """A sum in an order that changes from run to run."""

    calls = 0

    def run(self, case, gy):
        self.calls += 1
        y, g = super().run(case, gy)
        return y, g | {"A": np.nextafter(g["A"], self.calls % 3 * np.inf if self.calls % 3 else g["A"])}


class Reorders(plain.Plain):
    """A sum in an order that changes from run to run: its roundings do, and no more."""

    calls = 0

    def run(self, case, gy):
        self.calls += 1
        y, g = super().run(case, gy)
        return y, g | {"A": g["A"] * g["A"].dtype.type(1 + self.calls % 3 * np.finfo(g["A"].dtype).eps)}


class OneBuffer(plain.Plain):
    """Every call returns the same buffer of gA."""

    def run(self, case, gy):
        y, g = super().run(case, gy)
        if getattr(self, "buffer", None) is None or self.buffer.shape != g["A"].shape:
            self.buffer = np.empty_like(g["A"])
        self.buffer[...] = g["A"]
        return y, g | {"A": self.buffer}


class WritesGy(Two):
    """Scales gy in place."""

    def backward(self, case, gy):
        found = super().backward(case, gy)
        gy *= case.scaling
        return found


class TurnsGy(Two):
    """Turns the sign of gy in place: a second backward turns it back."""

    def backward(self, case, gy):
        found = super().backward(case, gy.copy())
        gy *= -1
        return found


class WritesItsOwnGy(Two):
    """Leaves the argument gy alone, and scales the gy that the case holds."""

    def backward(self, case, gy):
        found = super().backward(case, gy.copy())
        case.gy *= 2
        return found


class Wobbles(plain.Plain):
    """The second call gives another gA altogether."""

    calls = 0

    def run(self, case, gy):
        self.calls += 1
        y, g = super().run(case, gy)
        return y, g | {"A": g["A"] * (1 + self.calls % 2)}


class EverySecond(plain.Plain):
    """Takes an array's memory for whole: of a view it reads the start of what is viewed."""

    def run(self, case, gy):
        def whole(value):
            whole = value.ndim and value.strides[-1] == 2 * value.itemsize
            return np.resize(value.base.reshape(-1), value.shape) if whole else value

        return super().run(replace(case, **{name: whole(value) for name, value in case.arrays().items()}), gy)


class LastAxisOnly(plain.Plain):
    """Sees the tokens of the first leading index alone."""

    def run(self, case, gy):
        y, g = super().run(case, gy)
        if case.x.ndim == 3 and len(case.x):
            first = replace(case, x=case.x[0], mask=None if case.mask is None else case.mask[0])
            g |= {"B": super().run(first, gy[0])[1]["B"]}
        return y, g


class EmptyIsOne(plain.Plain):
    """No token under a leading axis of 2 gives a gB of 1."""

    def run(self, case, gy):
        y, g = super().run(case, gy)
        return y, g | ({"B": g["B"] + 1} if case.x.shape[:-1] == (2, 0) else {})


class DropsInEval(plain.Plain):
    """Takes p from the config where no mask is given."""

    def run(self, case, gy):
        p = case.config.lora_dropout
        if case.mask is None and p:
            keep = np.arange(case.x.size).reshape(case.x.shape) % 3 > 0
            case = replace(case, mask=(keep / (1 - p)).astype(case.x.dtype))
        return super().run(case, gy)


class NormKept(plain.Plain):
    """The row norms of the first call serve every later one of that shape."""

    def __init__(self):
        super().__init__()
        self.norms = {}
        self.changed = {"n": lambda t: self.norms.setdefault(t.W.shape + t.A.shape, FORWARD["n"](t))}


class NormKeptById(plain.Plain):
    """The row norms are kept as long as the arrays are the same objects."""

    def run(self, case, gy):
        if getattr(self, "key", None) is not case.A:
            self.key, self.norms = case.A, None

        def n(t):
            self.norms = FORWARD["n"](t) if self.norms is None else self.norms
            return self.norms

        return plain.run(case, gy, {"n": n})


class Flat(plain.Plain):
    """Reads memory from its start, as a kernel that ignores strides does."""

    def run(self, case, gy):
        def flat(value):
            base = value if value.base is None else value.base
            return np.array(np.resize(np.asarray(base).reshape(-1, order="A"), value.shape), value.dtype)

        return super().run(replace(case, **{name: flat(value) for name, value in case.arrays().items()}), gy)


class IgnoresOrder(plain.Plain):
    """Takes the memory of a transposed array for rows."""

    def run(self, case, gy):
        def memory(value):
            order = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
            return value.reshape(-1, order=order).reshape(value.shape)

        return super().run(replace(case, **{name: memory(value) for name, value in case.arrays().items()}), gy)


class Tiles(plain.Plain):
    """Handles tokens in pairs, and loses an odd one."""

    def run(self, case, gy):
        y, g = super().run(case, gy)
        if case.x.ndim > 1 and case.x.shape[-2] % 2:
            y[..., -1, :] = 0
        return y, g


class Recent(plain.Plain):
    """The last token weighs twice."""

    def __init__(self):
        super().__init__(
            {"gB": lambda t: BACKWARD["gB"](t) + np.outer(t.gu[-1], t.z[-1]) if len(t.x) else 0 * t.B}
        )


class MergesWithoutS(Two):
    """The update is merged without s."""

    def merge(self, case):
        return super().merge(
            replace(case, config=replace(case.config, lora_alpha=case.config.r, use_rslora=False))
        )


class MergesWithoutM(Two):
    """DoRA is merged without its magnitude."""

    def merge(self, case):
        return super().merge(replace(case, m=None))


class ForgetsBias(Two):
    """b' lacks s·bB."""

    def merge(self, case):
        return super().merge(replace(case, bB=None))


class UnmergesByAdding(Two):
    """Unmerge adds the update once more."""

    def unmerge(self, case, merged):
        return super().unmerge(replace(case, B=-case.B), merged)


def clipped(t):
    return FORWARD["z"](t) * (np.arange(t.A.shape[0]) < min(t.W.shape))


CONDUCT = {
    "G6 stale activations": (Stale(), {"two cases interleaved"}),
    "used up by one backward": (UsedUp(), {"a second backward gives the same"}),
    "accumulates": (Accumulates(), {"a second backward gives the same"}),
    "forwards are counted": (Stacked(), {"two forwards before a backward", "two cases interleaved"}),
    "race": (Race(), {"three runs give the same bits"}),
    "G6 one buffer": (OneBuffer(), {"what was returned stays as it was"}),
    "G7 gy written": (WritesGy(), {"nothing that is given is written to"}),
    "gy turned and turned back": (TurnsGy(), {"nothing that is given is written to"}),
    "the case's gy written": (WritesItsOwnGy(), {"nothing that is given is written to"}),
    "another answer each time": (Wobbles(), {"three runs give the same bits"}),
    "memory of every second": (EverySecond(), {"strided, transposed, offset and repeated arrays"}),
    "first leading index alone": (LastAxisOnly(), {"leading axes only stack tokens"}),
    "no token under an axis": (EmptyIsOne(), {"zero tokens in any shape"}),
    "D9 dropout in eval": (DropsInEval(), {"without a mask nothing is dropped, whatever p is"}),
    "R11 norm kept": (NormKept(), {"updates of the parameters are seen"}),
    "R11 norm kept by object": (NormKeptById(), {"updates of the parameters are seen"}),
    "Z2 memory from its start": (Flat(), {"strided, transposed, offset and repeated arrays"}),
    "Z2 transposed memory": (IgnoresOrder(), {"strided, transposed, offset and repeated arrays"}),
    "odd token lost": (Tiles(), {"one token, as a row and without axis"}),
    "last token twice": (Recent(), {"tokens in another order"}),
    "Z3 rank clipped": (plain.Plain({"z": clipped}), {"rank past both sides"}),
    "Z1 NaN for no token": (
        plain.Plain({"gA": lambda t: BACKWARD["gA"](t) if len(t.x) else t.A * np.nan}),
        {"zero tokens in any shape"},
    ),
    "M1 merged without s": (MergesWithoutS(), {"merged weights compute the same"}),
    "M3 merged without m": (MergesWithoutM(), {"merged weights compute the same"}),
    "M bias of B not merged": (ForgetsBias(), {"merged weights compute the same"}),
    "M4 unmerge adds": (UnmergesByAdding(), {"unmerging gives W and b back"}),
    "S4 gA misses s": (plain.Plain({"gA": lambda t: BACKWARD["gA"](t) / t.s}), {"BᵀgB = gA Aᵀ"}),
    "S5 gB misses s": (
        plain.Plain({"gB": lambda t: BACKWARD["gB"](t) / t.s}),
        {"BᵀgB = gA Aᵀ", "s·dL/ds = ⟨B, gB⟩"},
    ),
    "T1 gA reshaped": (plain.Plain({"gA": lambda t: (t.xd.T @ t.gz).reshape(t.A.shape)}), {"BᵀgB = gA Aᵀ"}),
    "G9 sign of gA": (plain.Plain({"gA": lambda t: -BACKWARD["gA"](t)}), {"BᵀgB = gA Aᵀ"}),
    "D6 gA from undropped x": (plain.Plain({"gA": lambda t: t.gz.T @ t.x}), {"BᵀgB = gA Aᵀ"}),
    "D7 gB from undropped x": (plain.Plain({"gB": lambda t: t.gu.T @ (t.x @ t.A.T)}), {"BᵀgB = gA Aᵀ"}),
    "one gate for all ranks": (
        plain.Plain({"z": lambda t: FORWARD["z"](t) * (np.abs(t.A).max(axis=1) > 0.9 * np.abs(t.A).max())}),
        {"A → TA, B → BT⁻¹ moves nothing else"},
    ),
    "both gradients of s missing": (
        plain.Plain({"gA": lambda t: BACKWARD["gA"](t) / t.s, "gB": lambda t: BACKWARD["gB"](t) / t.s}),
        {"s·dL/ds = ⟨B, gB⟩"},
    ),
    "R2 gm lacks 1/n": (plain.Plain({"gm": lambda t: t.gk}), {"m∘gm = Σ gy∘(y − b)"}),
    "R5 bias scaled": (
        plain.Plain({"y": lambda t: FORWARD["y"](t) + (0 if t.m is None or t.b is None else (t.k - 1) * t.b)}),
        {"m∘gm = Σ gy∘(y − b)"},
    ),
    "R9 gm lacks the adapter": (
        plain.Plain({"gk": lambda t: (t.G * t.P).sum(axis=0)}),
        {"m∘gm = Σ gy∘(y − b)"},
    ),
    "R8 sign of the norm gradient": (
        plain.Plain({"gV": lambda t: -BACKWARD["gV"](t)}),
        {"⟨B, gB⟩ by rows where W = 0: 0, or m∘gm"},
    ),
}


@pytest.mark.parametrize("name", one_in(2, CONDUCT))
def test_each_fault_breaks_its_law(name):
    subject, laws = CONDUCT[name]
    found = {check.tensor: check for check in wrong(run(subject))}
    assert laws <= set(found), sorted(found)
    assert all(check.note for check in found.values())


def viewed(subject, profile="fp32", seed=0):
    return [check for checks in battery_views(subject, profile, seed, "full", "") for check in checks]


@pytest.mark.parametrize("profile", ["fp32", "fp64"])
def test_views_of_each_array_are_read_right_by_right_layers(profile):
    for subject in (REFERENCE, plain.Plain(), Two()):
        for seed in range(5):
            checks = viewed(subject, profile, seed)
            assert {check.verdict for check in checks} == {"pass"}, wrong(checks)
            names = {check.id.rpartition("/")[2] for check in checks}
            assert names == {"x", "W", "b", "A", "B", "m", "gy"}


@pytest.mark.parametrize("name", ["x", "W", "A", "B", "m", "gy"])
@pytest.mark.parametrize("view", VIEWS)
def test_an_array_whose_layout_is_misread_is_named(name, view):
    """One array is taken for memory in rows, whatever its strides say."""

    class Misreads(plain.Plain):
        def run(self, case, gy):
            value = getattr(case, name)
            if value is None or (value.flags.c_contiguous and value.base is None):
                return super().run(case, gy)
            base = value if value.base is None else value.base
            memory = base.reshape(-1, order="A").copy()[: value.size]
            spoiled = replace(case, **{name: memory.reshape(value.shape)})
            return super().run(spoiled, spoiled.gy)

    bad = wrong(viewed(Misreads()))
    assert {check.id.rpartition("/")[2] for check in bad} == {name}
    assert {check.kind for check in bad} == ({"dora"} if name == "m" else {"lora", "dora"})


def test_views_are_not_asked_of_who_takes_none():
    class Whole(Two):
        spec = lx.verify.Spec(strided=False)

    assert viewed(Whole()) == []


def test_another_order_of_sums_is_told_from_another_answer():
    law = "three runs give the same bits"
    found = {
        name: [c.note for c in wrong(run(s)) if c.tensor == law]
        for name, s in (("reorders", Reorders()), ("wobbles", Wobbles()))
    }
    assert set(found["reorders"]) == {"A differs, by no more than roundings"}
    assert set(found["wobbles"]) == {"A differs"}


def test_the_norm_taken_the_other_way_breaks_a_law():
    class Otherwise(plain.Plain):
        def run(self, case, gy):
            return plain.run(replace(case, norm_gradient=not case.norm_gradient), gy)

    found = {(check.kind, check.tensor) for check in wrong(run(Otherwise()))}
    assert {kind for kind, _ in found} == {"dora, dropout", "dora full norm, dropout"}
    assert "⟨B, gB⟩ by rows where W = 0: 0, or m∘gm" in {law for _, law in found}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_tensors_of_wrong_shape_or_kind_never_escape():
    """Whatever comes back, a law is a check with a verdict."""

    class Odd(plain.Plain):
        def __init__(self, change):
            super().__init__()
            self.change = change

        def run(self, case, gy):
            return self.change(*super().run(case, gy))

    changes = (
        lambda y, g: (y.reshape(-1), g),
        lambda y, g: (y, {name: value[..., :1] for name, value in g.items()}),
        lambda y, g: (y[..., None], {name: value.T for name, value in g.items()}),
        lambda y, g: (y, {}),
        lambda y, g: (y, None),
        lambda y, g: (None, g),
        lambda y, g: y,
        lambda y, g: (y.astype(complex), {name: value.astype(int) for name, value in g.items()}),
        lambda y, g: (y * np.nan, {name: value * np.nan for name, value in g.items()}),
    )
    for change in changes:
        checks = run(Odd(change))
        assert len(checks) > 40
        assert {check.verdict for check in checks} - {"pass"}


def test_what_is_declined_is_not_run():
    class Later:
        spec = plain.Plain().spec

        def run(self, case, gy):
            raise NotImplementedError("later")

    assert {check.verdict for check in run(Later())} == {"not run"}


def test_quick_leaves_the_last_kind_out():
    assert {check.kind for check in run(plain.Plain(), level="quick")} == {"lora, dropout", "dora, dropout"}
