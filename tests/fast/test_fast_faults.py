"""Every known fault of a layer, planted in the fast engine, is refused; so are faults that only it can have."""

import numpy as np
import pytest
from test_fast_layer import layers, step
from test_fast_layer import test_a_key_stands_for_the_mask_of_its_numbers as by_key
from test_fast_layer import test_a_weight_changed_in_place_never_meets_a_norm_of_before as changed_in_place
from test_fast_layer import test_mixed_dtypes_round_where_the_reference_does as mixed

import lorax_np as lx
from lorax_np.fast import buffers, cpu, cpu_branch, cpu_dora, norms, weights
from lorax_np.verify.batteries import BATTERIES, suited
from lorax_np.verify.cases import Case
from lorax_np.verify.layers import plain
from lorax_np.verify.mutants import CATALOGUE
from lorax_np.verify.mutants import matrix as kill

OF_A_LAYER = [fault for fault in CATALOGUE.values() if fault.kind in kill.LAYER]
FAST = lx.verify.subjects.fast()


def planted(right):
    """plain.run with the fast engine in its place: a changed step moves the engine's answer by what it moves
    the plain one's, so that a fault of the catalogue becomes a fault of the engine."""

    def run(case: Case, gy, changed=None):
        y, g = FAST.run(case, gy)
        found = {"y": y} | g
        if changed:
            (y_right, g_right), (y_wrong, g_wrong) = right(case, gy), right(case, gy, changed)
            good, bad = {"y": y_right} | g_right, {"y": y_wrong} | g_wrong
            for name, value in found.items():
                if not np.array_equal(good[name], bad[name], equal_nan=True):
                    moved = bad[name].astype(np.float64) - good[name]
                    found[name] = (value + moved).astype(value.dtype)
        return found.pop("y"), found

    return run


@pytest.fixture(scope="module")
def on_fast():
    """The catalogue's subjects compute by the fast engine, for the length of this file."""
    patch = pytest.MonkeyPatch()
    patch.setattr(plain, "run", planted(plain.run))
    patch.setattr(kill, "NAIVE", {})  # which judge nothing here
    yield
    patch.undo()


def test_planted_in_fast_every_fault_of_a_layer_is_refused(on_fast):
    """By some check: what one has refused, the next is not asked about."""
    left = OF_A_LAYER
    for check, battery in BATTERIES.items():
        matrix = kill.kill_matrix(left, checks={check: battery})
        left = [fault for fault in left if not matrix.killers(fault)]
    missed = [fault.id for fault in left]
    assert missed == ["G15"], "whose only fault is in gW, which the fast engine does not offer"
    assert len(OF_A_LAYER) > 60


def test_with_nothing_planted_nothing_is_refused(on_fast):
    """The way of planting is no fault itself."""
    with np.errstate(all="ignore"):
        for profile in ("fp64", "fp32"):
            assert lx.verify.verify(plain.Plain(), profile, "quick").passed


# ---- faults of the plan itself ----------------------------------------------------------------------------


def _gemm(change):
    """gemm with its arguments changed, in every file that calls it."""

    def plant(patch):
        real = cpu_branch.gemm

        def wrong(a, b, out, alpha=1.0, beta=0.0):
            real(*change(a, b, out, alpha, beta))

        for module in (cpu_branch, cpu_dora, norms, weights):
            patch.setattr(module, "gemm", wrong)

    return plant


def _step(module, name, make):
    return lambda patch: patch.setattr(module, name, make(getattr(module, name)))


def _blocks_without_tail(real):
    return lambda x, count=None: [p for p in real(x, count) if p.stop - p.start == 4 or p.start == 0]


def _norms(**change):
    def make(real):
        def wrong(*arguments):
            found = real(*arguments)
            return found._replace(**{name: f(getattr(found, name)) for name, f in change.items()})

        return wrong

    return make


def _another_mask(real):
    """Backward regenerates with another step: every second stream of a layer's two differs."""
    calls = [0]

    def wrong(key):
        calls[0] += 1
        return real(key._replace(step=key.step + calls[0] % 2))

    return wrong


PLAN = {
    "alpha forgotten": _gemm(lambda a, b, out, alpha, beta: (a, b, out, 1.0, beta)),
    "beta forgotten": _gemm(lambda a, b, out, alpha, beta: (a, b, out, alpha, 0.0)),
    "the tail of rows left out": _step(cpu_branch, "row_blocks", _blocks_without_tail),
    "the factor 1/(1 − p) left out": _step(cpu_branch, "factor_of", lambda real: lambda drop, low: 1.0),
    "the mask made again differs": _step(cpu_branch.DropoutKey, "blocks", _another_mask),
    "16 bits not rounded before the sum": _step(cpu_branch, "rounded", lambda real: lambda y, narrow: None),
    "bias of B left out": _step(cpu, "biases", lambda real: lambda b, bB, s, wide, narrow: b),
    "n off by 1e-5": _step(cpu_dora, "row_norms", _norms(n=lambda n: n * (1 + 1e-5))),
    "T off in the full norm": _step(cpu_dora, "row_norms", _norms(T=lambda T: T * 1.001)),
    "the norm's gradient left out": _step(cpu, "add_norm_gradient", lambda real: lambda *a: None),
    "features beyond the first block left out": _step(
        cpu_dora, "back_times", lambda real: lambda G, v, W, out: real(G[:, :3], v[:3], W[:3], out)
    ),
    "gk summed over half the tokens": _step(cpu, "total", lambda real: lambda G, PQ: real(G[::2], PQ[::2])),
    "squares of whole segments only": _step(
        norms, "_squares", lambda real: lambda W: real(W[:, : len(W[0]) // 2])
    ),
}


def refused(patch):
    """Whether the harness refuses what is planted, or layers of dropout by key or of 16 bits beside 32 do."""
    patch.setattr(weights, "ENTRIES", 1)
    with np.errstate(all="ignore"):
        for profile in ("fp32", "fp16"):
            if any(kill.refused(FAST, battery, profile) in "KE" for battery in suited(profile).values()):
                return True
        try:
            for form in ("lora", "lora+bB", "dora full"):
                by_key(form, "float32", 1, patch)
                mixed("bfloat16", "float32", form, False)
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize(
    "name", [name if i % 2 else pytest.param(name, marks=pytest.mark.thorough) for i, name in enumerate(PLAN)]
)
def test_a_fault_of_the_plan_is_refused(name, monkeypatch):
    PLAN[name](monkeypatch)
    assert refused(monkeypatch)


def test_the_plan_without_a_fault_is_not(monkeypatch):
    assert not refused(monkeypatch)


def test_memory_handed_out_while_held_is_refused(monkeypatch):
    """By the layers that come from the pool, one kept while the next is computed."""
    several = list(layers(2))
    alone = [step(*one) for one in several]
    monkeypatch.setattr(buffers, "_holders", lambda blocks, i: buffers.FREE)
    lx.fast.release()
    assert [step(*one) for one in several] != alone
    lx.fast.release()


def test_a_cached_norm_is_refused(monkeypatch):
    """Keyed by where W lies, as a tempting cache would be: the test of a weight changed in place refuses it."""
    real, kept = norms.row_norms, {}
    monkeypatch.setattr(
        cpu_dora, "row_norms", lambda W, *rest: kept.setdefault(W.__array_interface__["data"], real(W, *rest))
    )
    with pytest.raises(AssertionError):
        changed_in_place()
