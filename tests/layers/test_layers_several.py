"""Several adapters at one linear layer: all active, one a sample, merged."""

from itertools import permutations

import numpy as np
import pytest
from checkers import COMPLEX, EPS, TINY, assert_adjoint, assert_close, pairing, total
from hypothesis import given
from hypothesis import strategies as st
from strategies import LIBRARIES, leads, mask_of, normals, seeds

import lorax_np as lx
from lorax_np.errors import ConfigError, ShapeError
from lorax_np.layers.several import (
    lora_mixed_forward,
    lora_several_backward,
    lora_several_forward,
    merge_several,
)

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
small = st.integers(1, 5)
NAMES = ("one", "two", "three")
SCALINGS = dict(zip(NAMES, (0.7, -1.3, 2.9), strict=True))


def drawn(seed, library=LIBRARIES[0], *, d_in=4, d_out=5, lead=(3, 2), kind="bB", dtype="float64"):
    """x, base, three adapters of unequal rank, their masks, gy. kind: bB, dora, plain, b."""
    draw = normals(seed, library, dtype)
    adapters = {}
    for i, name in enumerate(NAMES):
        more = {"bB": draw(d_out)} if kind == "bB" and i != 1 else {}
        more |= {"m": draw(d_out)} if kind == "dora" and i == 1 else {}
        more |= {"b": draw(d_out)} if kind == "b" and i == 1 else {}
        adapters[name] = lx.Adapter(draw(i + 1, d_in), draw(d_out, i + 1), **more)
    masks = {name: mask_of((*lead, d_in), 0.4, seed + i, library) for i, name in enumerate(NAMES[:2])}
    return draw(*lead, d_in), lx.Linear(draw(d_out, d_in), draw(d_out)), adapters, masks, draw(*lead, d_out)


def definition(x, base, adapters, masks, scalings=SCALINGS):
    """(several.1) with the update written out as a matrix; of magnitudes, k∘(xVᵀ) without masks alone."""
    y = x @ base.W.T + next((a.b for a in adapters.values() if a.b is not None), base.b)
    for name, a in adapters.items():
        delta, xd = scalings[name] * a.B @ a.A, x * masks.get(name, 1.0)
        if a.m is not None:
            V = base.W + delta
            k = a.m / np.sqrt(np.sum(V * V, axis=1))
            y = y + (k - 1) * (xd @ base.W.T) + k * (xd @ delta.T)
        else:
            y = y + xd @ delta.T + scalings[name] * (0.0 if a.bB is None else a.bB)
    return y


@libraries
@given(seed=seeds, d_in=small, d_out=small, lead=leads)
def test_the_forward_is_the_definition_and_the_backward_its_adjoint(library, seed, d_in, d_out, lead):
    """(several.1), (several.2): affine in each argument alone, so that a step of order one is exact."""
    x, base, adapters, masks, gy = drawn(seed, library, d_in=d_in, d_out=d_out, lead=lead)
    host = library.host
    y, saved = lora_several_forward(x, base, adapters, scalings=SCALINGS, masks=masks)
    gx, g = lora_several_backward(gy, saved, base, adapters, scalings=SCALINGS)
    hbase = lx.Linear(host(base.W), host(base.b))
    hmasks = {name: host(mask) for name, mask in masks.items()}
    at = {"x": host(x)}
    for name, a in adapters.items():
        parts = {"A": a.A, "B": a.B} | ({} if a.bB is None else {"bB": a.bB})
        at |= {(name, key): host(value) for key, value in parts.items()}

    def at_values(values, base=hbase, scalings=SCALINGS):
        there = {
            name: lx.Adapter(values[name, "A"], values[name, "B"], bB=values.get((name, "bB")))
            for name in NAMES
        }
        return definition(values["x"], base, there, hmasks, scalings)

    absolute = lx.Linear(np.abs(hbase.W), np.abs(hbase.b)), {name: abs(s) for name, s in SCALINGS.items()}
    size = at_values({key: np.abs(value) for key, value in at.items()}, *absolute)
    assert_close("y", host(y), at_values(at), 64 * EPS["float64"] * size)
    rng = np.random.default_rng(seed)
    for key, value in at.items():
        got = gx if key == "x" else getattr(g[key[0]], key[1])
        v = rng.standard_normal(value.shape)
        up, down = {**at, key: value + v}, {**at, key: value - v}
        terms = sum(
            total(host(gy), at_values({k: np.abs(w) for k, w in end.items()}, *absolute)) for end in (up, down)
        )
        assert_adjoint(
            2 * host(got), v, host(gy), at_values(up) - at_values(down), terms + total(host(got), v), str(key)
        )


@pytest.mark.parametrize("kind", ["plain", "bB", "dora", "b"])
def test_every_element_by_complex_steps(kind):
    """Im φ(θ + 1e-30i)/1e-30 through the forward itself; the gradient through the norm, under a magnitude."""
    x, base, adapters, masks, gy = drawn(3, kind=kind)
    _, saved = lora_several_forward(x, base, adapters, scalings=SCALINGS, masks=masks)
    how = {"scalings": SCALINGS, "norm_gradient": True}
    gx, g = lora_several_backward(gy, saved, base, adapters, **how)
    found = {("x", ""): gx} | {(n, k): getattr(g[n], k) for n in NAMES for k in ("A", "B", "m", "b", "bB")}
    for (name, field), got in found.items():
        value = x if name == "x" else getattr(adapters[name], field)
        assert (got is None) == (value is None)
        if value is None:
            continue
        want, size = np.empty(value.shape), 1.0
        for i in np.ndindex(value.shape):
            moved = value.astype("complex128")
            moved[i] += TINY * 1j
            here = dict(adapters)
            if name != "x":
                a = adapters[name]
                fields = {k: getattr(a, k) for k in ("A", "B", "m", "b", "bB")} | {field: moved}
                here[name] = lx.Adapter(**fields)
            y, _ = lora_several_forward(moved if name == "x" else x, base, here, scalings=SCALINGS, masks=masks)
            want[i], size = pairing(gy, np.imag(y) / TINY), max(size, total(gy, np.imag(y) / TINY))
        assert_close(f"{name} {field}", got, want, 64 * COMPLEX * EPS["float64"] * size)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["bB", "dora", "b"])
@pytest.mark.parametrize("full", [False, True])
def test_one_adapter_alone_is_the_linear_layer_bit_for_bit(kind, dtype, full):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    narrow = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    x, base, adapters, masks, gy = drawn(4, kind=kind)
    x, gy, base = x.astype(narrow), gy.astype(narrow), lx.Linear(base.W.astype(narrow), base.b.astype(narrow))
    for name in NAMES[:2]:
        one = {name: adapters[name]}
        how = {"scaling": SCALINGS[name]}
        y, saved = lora_several_forward(
            x, base, one, scalings={name: SCALINGS[name]}, masks={name: masks[name]}
        )
        want, saved2 = lx.lora_linear_forward(x, base, adapters[name], mask=masks[name], **how)
        gx, g = lora_several_backward(gy, saved, base, one, scalings={name: SCALINGS[name]}, norm_gradient=full)
        gx2, g2 = lx.lora_linear_backward(gy, saved2, base, adapters[name], norm_gradient=full, **how)
        pairs = [(y, want), (gx, gx2)]
        pairs += [(getattr(g[name], k), getattr(g2, k)) for k in ("A", "B", "m", "b", "bB")]
        for got, expected in pairs:
            assert (got is None) == (expected is None)
            if got is not None:
                assert got.dtype == expected.dtype
                assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("narrow", ["bfloat16", "float16"])
def test_y_and_gx_are_rounded_once_whatever_the_number_of_adapters(narrow):
    """The rounded base product, then every update in float32, then one rounding: written out here."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtype = {"bfloat16": ml_dtypes.bfloat16}.get(narrow, narrow)
    x, base, adapters, _, gy = drawn(11, lead=(40,), dtype="float32")
    x, gy, base = x.astype(dtype), gy.astype(dtype), lx.Linear(base.W.astype(dtype), base.b.astype(dtype))
    y, saved = lora_several_forward(x, base, adapters, scalings=SCALINGS)
    gx, _ = lora_several_backward(gy, saved, base, adapters, scalings=SCALINGS)
    wide, gwide, W = x.astype("float32"), gy.astype("float32"), base.W.astype("float32")
    want, gwant = (wide @ W.T + base.b.astype("float32")).astype(dtype).astype("float32"), gwide @ W
    for name, a in adapters.items():
        s = SCALINGS[name]
        u = (wide @ a.A.T) @ a.B.T
        want = want + s * (u if a.bB is None else u + a.bB)
        gwant = gwant + ((s * gwide) @ a.B) @ a.A
    assert y.dtype == gx.dtype == np.dtype(dtype)
    assert y.tobytes() == want.astype(dtype).tobytes()
    assert gx.tobytes() == gwant.astype(dtype).tobytes()


def test_no_adapter_is_the_base():
    x, base, _, _, gy = drawn(5)
    y, saved = lora_several_forward(x, base, {}, scalings={})
    gx, g = lora_several_backward(gy, saved, base, {}, scalings={})
    assert g == {}
    assert_close("y", y, x @ base.W.T + base.b, 64 * EPS["float64"] * (1 + np.abs(y)))
    assert_close("gx", gx, gy @ base.W, 64 * EPS["float64"] * (1 + np.abs(gx)))


@pytest.mark.parametrize("kind", ["bB", "dora", "b"])
def test_the_order_of_adapters_says_nothing(kind):
    """y and gx within the rounding of a sum; each adapter's gradients bit for bit."""
    x, base, adapters, masks, gy = drawn(6, kind=kind)
    found = []
    for names in permutations(NAMES):
        there = {name: adapters[name] for name in names}
        y, saved = lora_several_forward(x, base, there, scalings=SCALINGS, masks=masks)
        gx, g = lora_several_backward(gy, saved, base, there, scalings=SCALINGS)
        assert list(g) == list(names)
        found.append((y, gx, g))
    for y, gx, g in found[1:]:
        assert_close("y", y, found[0][0], 64 * EPS["float64"] * 64)
        assert_close("gx", gx, found[0][1], 64 * EPS["float64"] * 64)
        for name in NAMES:
            assert np.array_equal(g[name].A, found[0][2][name].A)
            assert np.array_equal(g[name].B, found[0][2][name].B)


@pytest.mark.parametrize("kind", ["plain", "bB", "dora", "b"])
def test_merging_all_is_the_forward_with_all(kind):
    """(several.3): on outputs, and any order of the dictionary gives the same weight to rounding."""
    x, base, adapters, _, _ = drawn(7, kind=kind)
    y, _ = lora_several_forward(x, base, adapters, scalings=SCALINGS)
    merged = merge_several(base, adapters, scalings=SCALINGS)
    assert_close("y", x @ merged.W.T + merged.b, y, 64 * EPS["float64"] * 64)
    turned = {name: adapters[name] for name in reversed(NAMES)}
    again = merge_several(base, turned, scalings=SCALINGS)
    assert_close("W", again.W, merged.W, 64 * EPS["float64"] * 16)
    alone = merge_several(base, {"two": adapters["two"]}, scalings={"two": SCALINGS["two"]})
    want = lx.merge(base, adapters["two"], scaling=SCALINGS["two"])
    assert np.array_equal(alone.W, want.W)
    assert np.array_equal(alone.b, want.b)


def test_a_merge_is_rounded_once():
    """float32: three updates, and each entry the number nearest to the sum in float64."""
    _, base, adapters, _, _ = drawn(8, kind="bB", dtype="float32")
    merged = merge_several(base, adapters, scalings=SCALINGS)
    W, b = base.W.astype("float64"), base.b.astype("float64")
    for name, a in adapters.items():
        W = W + SCALINGS[name] * (a.B.astype("float64") @ a.A.astype("float64"))
        b = b + SCALINGS[name] * (0 if a.bB is None else a.bB.astype("float64"))
    assert merged.W.dtype == merged.b.dtype == np.float32
    assert np.array_equal(merged.W, W.astype("float32"))
    assert np.array_equal(merged.b, b.astype("float32"))
    with pytest.raises(ConfigError, match="W: expected finite numbers once merged"):
        merge_several(lx.Linear(np.full((5, 4), np.inf)), {"two": adapters["two"]}, scalings={"two": 1.0})
    unchanged = merge_several(base, {}, scalings={})
    assert np.array_equal(unchanged.W, base.W)


# ---- a mixed batch -----------------------------------------------------------------------------------------


@libraries
@given(seed=seeds, lead=st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple))
def test_adapter_by_adapter_is_sample_by_sample(library, seed, lead):
    """(several.4): each sample as lora_linear_forward gives it alone, whatever else the batch holds."""
    x, base, adapters, _, _ = drawn(seed, library, lead=lead)
    host, rng = library.host, np.random.default_rng(seed)
    names = [("__base__", *NAMES)[i] for i in rng.integers(0, 4, lead[0])]
    y = lora_mixed_forward(x, base, adapters, names, scalings=SCALINGS)
    assert y.shape == (*lead, 5)
    for i, name in enumerate(names):
        none = {} if name == "__base__" else {name: adapters[name]}
        alone, _ = lora_several_forward(x[i : i + 1, ...], base, none, scalings={n: SCALINGS[n] for n in none})
        size = 1 + np.abs(host(alone)).max(initial=0.0) * 64
        assert_close("y", host(y)[i], host(alone)[0], 64 * EPS["float64"] * size)


def test_a_batch_permutes():
    x, base, adapters, _, _ = drawn(9, lead=(6, 2))
    names = ["two", "__base__", "one", "two", "three", "one"]
    y = lora_mixed_forward(x, base, adapters, names, scalings=SCALINGS)
    order = [3, 5, 0, 2, 1, 4]
    again = lora_mixed_forward(x[order], base, adapters, [names[i] for i in order], scalings=SCALINGS)
    assert_close("y", again, y[order], 64 * EPS["float64"] * 64)


# ---- what does not fit -------------------------------------------------------------------------------------


def test_what_does_not_fit_is_named():
    x, base, adapters, _, gy = drawn(10)
    names, m, b = ["one"] * 3, np.ones(5), np.ones(5)
    two = {"one": adapters["one"], "two": lx.Adapter(adapters["two"].A, adapters["two"].B, m=m)}
    magnitudes = {"one": lx.Adapter(adapters["one"].A, adapters["one"].B, m=m), "two": two["two"]}
    biases = {n: lx.Adapter(adapters[n].A, adapters[n].B, b=b) for n in ("one", "two")}
    s = {"one": 1.0, "two": 2.0}
    _, saved = lora_several_forward(x, base, adapters, scalings=SCALINGS)

    def several(adapters, scalings=s, **more):
        return lambda: lora_several_forward(x, base, adapters, scalings=scalings, **more)

    def mixed(names, adapters=two, x=x, scalings=s):
        return lambda: lora_mixed_forward(x, base, adapters, names, scalings=scalings)

    for call, error, message in (
        (
            several(magnitudes),
            ConfigError,
            "adapters: expected one with m at most active at a layer, got one, two",
        ),
        (several(biases), ConfigError, "adapters: expected one with b at most active at a layer, got one, two"),
        (several(two, {"one": 1.0}), ConfigError, "scalings: expected one for each adapter, got none for two"),
        (several(two, {**s, "x": 1.0}), ConfigError, "scalings: expected names among one, two, got x"),
        (several(two, masks={"x": None}), ConfigError, "masks: expected names among one, two, got x"),
        (several({}, {}, masks={"x": None}), ConfigError, "masks: expected names among none, got x"),
        (several({"one": 3}, {"one": 1.0}), TypeError, "adapters['one']: expected Adapter, got int"),
        (several(two, {"one": 1.0, "two": np.nan}), ConfigError, "scaling: expected a finite float, got nan"),
        (mixed(["one"]), ConfigError, "names: expected 3 of them, one for each sample, got 1"),
        (mixed("one"), ConfigError, "names: expected 3 of them, one for each sample, got 'one'"),
        (mixed(["one", "x", "one"]), ConfigError, "names: expected names among __base__, one, two, got x"),
        (mixed(["one", "two", "one"]), ConfigError, "adapters: expected none with m in a mixed batch, got two"),
        (
            mixed(names, {"__base__": two["one"]}, scalings={"__base__": 1.0}),
            ConfigError,
            "adapters: expected names",
        ),
        (mixed(names, x=np.ones(4)), ShapeError, "x: expected (batch, ..., d_in), got (4,)"),
        (
            mixed(names, x=np.ones((3, 5))),
            ShapeError,
            "x: expected (..., d_in) with d_in=4 set by W, got (3, 5)",
        ),
        (
            lambda: lora_several_backward(gy, saved, base, two, scalings=s),
            ConfigError,
            "saved: expected those of one, two, got one, two, three",
        ),
        (
            lambda: merge_several(base, magnitudes, scalings=s),
            ConfigError,
            "adapters: expected one with m at most",
        ),
        (lambda: merge_several(base, biases, scalings=s), ConfigError, "adapters: expected one with b at most"),
    ):
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value).startswith(message), str(caught.value)
    assert lora_mixed_forward(x, base, two, names, scalings=s).shape == (3, 2, 5), (
        "an idle magnitude hurts nobody"
    )
