"""Merging and unmerging: against the forward, against exact rationals, and within the bound of the rounding."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from checkers import STEP, assert_close, nearest, norms, sizes
from hypothesis import given
from hypothesis import strategies as st
from strategies import LIBRARIES, leads, normals, ranks, scalings, seeds
from strategies import sizes as axis

from lorax_np.errors import ConfigError, DtypeError, ShapeError
from lorax_np.layer import lora_linear_forward
from lorax_np.merge import merge, row_norms, unmerge
from lorax_np.params import Adapter, Linear

# not the guarded one: that the result is finite is asked on the host
READABLE = [x for x in LIBRARIES if x.name != "guarded"]
libraries = pytest.mark.parametrize("library", READABLE, ids=lambda x: x.name)
DTYPES = {name: np.dtype(name) for name in ("float16", "float32", "float64")}
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
FORMS = "lora", "lora+bB", "dora"


def parts(seed, d_out, d_in, r, form, bias, s):
    """A base and an adapter of float64 on the host, by name: b0 is Linear.b, b is Adapter.b."""
    rng = np.random.default_rng(seed)
    at = {"W": (d_out, d_in), "A": (r, d_in), "B": (d_out, r)}
    at = {k: rng.standard_normal(shape) for k, shape in at.items()}
    if bias != "none":
        at["b0"] = rng.standard_normal(d_out)
    if bias == "trained":
        at["b"] = rng.standard_normal(d_out)
    if form == "lora+bB":
        at["bB"] = rng.standard_normal(d_out)
    if form == "dora":
        at["m"] = norms(at, s) * rng.uniform(0.3, 3, d_out) * rng.choice([-1, 1], d_out)
    return at


def records(at, place=lambda v: v, narrow=None, low=None):
    def put(name, dtype):
        value = at.get(name)
        return None if value is None else place(value if dtype is None else value.astype(DTYPES[dtype]))

    base = Linear(put("W", narrow), put("b0", narrow))
    return base, Adapter(put("A", low), put("B", low), put("m", low), put("b", narrow), put("bB", low))


def half_ulp(v):
    """Half the distance from |v| to the next number of its dtype."""
    up = np.nextafter(np.abs(v), np.array(np.inf, v.dtype))
    return (up.astype("float64") - np.abs(v).astype("float64")) / 2


@libraries
@given(
    seed=seeds,
    lead=leads,
    d_in=axis,
    d_out=axis,
    r=ranks,
    s=scalings,
    form=st.sampled_from(FORMS),
    bias=st.sampled_from(["none", "frozen", "trained"]),
)
def test_merged_computes_what_the_two_compute(library, seed, lead, d_in, d_out, r, s, form, bias):
    """(merge.1) to (merge.3): the outputs agree to the rounding of their terms; no array is written to."""
    at = parts(seed, d_out, d_in, r, form, bias, s)
    base, adapter = records(at, library.place)
    x = np.random.default_rng(seed).standard_normal((*lead, d_in))
    want, _ = lora_linear_forward(library.place(x), base, adapter, scaling=s)
    merged = merge(base, adapter, scaling=s)
    assert merged.W.shape == base.W.shape
    assert type(merged.W) is type(base.W)
    assert getattr(merged.W, "device", None) == getattr(base.W, "device", None)
    assert (merged.b is None) == (bias == "none" and form != "lora+bB")
    got = x @ library.host(merged.W).T + (0 if merged.b is None else library.host(merged.b))
    size = sizes({**at, "x": x}, np.ones((*lead, d_out)), None, s, False)["y"]
    assert_close("y", got, library.host(want), STEP * 2.0**-52 * size)
    for name, value in (
        ("W", base.W),
        ("b0", base.b),
        *((k, getattr(adapter, k)) for k in ("A", "B", "m", "b", "bB")),
    ):
        assert value is None or np.array_equal(library.host(value), at[name])


@pytest.mark.parametrize("s", [0.75, 0.7])
@pytest.mark.parametrize("low", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("narrow", ["float16", "bfloat16", "float32"])
def test_every_entry_is_correctly_rounded(narrow, low, s):
    """(merge.1), (merge.3) against exact rationals: one rounding, to nearest, of W + s·BA and of b + s·bB.

    With 16-bit factors and s = 3/4 float64 holds the sum, and each entry is the nearest one. Else it may be the
    other of two whose distances differ by float64's roundings: with s = 0.7 every fifth sum is all but a tie.
    """
    for seed in range(3):
        base, adapter = records(parts(seed, 5, 7, 4, "lora+bB", "frozen", s), narrow=narrow, low=low)
        merged = merge(base, adapter, scaling=s)
        assert merged.W.dtype == merged.b.dtype == DTYPES[narrow]

        def exact(v):
            return np.vectorize(lambda e: Fraction(float(e)), otypes=[object])(v)

        V = exact(base.W) + Fraction(s) * (exact(adapter.B) @ exact(adapter.A))
        b = exact(base.b) + Fraction(s) * exact(adapter.bB)
        for got, want in ((merged.W, V), (merged.b, b)):
            for i in np.ndindex(want.shape):
                best = nearest(want[i], narrow)
                if s == 0.75 and low in ("float16", "bfloat16"):
                    assert float(got[i]) == best, (i, float(want[i]))
                away, least = (abs(Fraction(float(v)) - want[i]) for v in (got[i], best))
                assert away <= least + Fraction(2.0**-48), (i, float(want[i]))


@pytest.mark.parametrize("narrow", ["float16", "bfloat16", "float32"])
def test_every_entry_is_correctly_rounded_under_dora(narrow):
    """(merge.2), with W' formed in float64 apart from the product's code: half an ulp, and float64's own."""
    for seed in range(5):
        base, adapter = records(parts(seed, 5, 7, 4, "dora", "none", 1.3), narrow=narrow, low="float32")
        W, A, B, m = (v.astype("longdouble") for v in (base.W, adapter.A, adapter.B, adapter.m))
        V = W + np.longdouble(1.3) * (B @ A)
        want = (m / np.sqrt(np.sum(V * V, axis=1)))[:, None] * V
        got = merge(base, adapter, scaling=1.3).W
        assert_close("W", got, want, 1.00001 * half_ulp(got))


def test_delta_is_not_rounded_before_the_sum():
    """One rounding, not two: 1 + (2⁻⁹ + 2⁻¹⁸) rounds up in bfloat16, while delta alone rounds to a tie."""
    bf = DTYPES["bfloat16"]
    base = Linear(np.array([[1.0]]).astype(bf))
    delta = np.float32(2.0**-8 + 2.0**-17)  # in bfloat16 2⁻⁸, and 1 + 2⁻⁸ is a tie that goes to even, to 1
    adapter = Adapter(np.ones((1, 1), "float32"), np.full((1, 1), delta))
    assert merge(base, adapter, scaling=1.0).W.tolist() == [[1 + 2.0**-7]]
    assert (base.W + np.array([[delta]]).astype(bf)).astype(bf).tolist() == [[1.0]]


@pytest.mark.parametrize("narrow", DTYPES)
@given(seed=seeds, d_in=axis, d_out=axis, r=ranks, s=scalings, form=st.sampled_from(FORMS))
def test_unmerging_loses_no_more_than_its_roundings(narrow, seed, d_in, d_out, r, s, form):
    """(merge.4) to (merge.8), entry by entry, and the few roundings of float64 where they count."""
    at = parts(seed, d_out, d_in, r, form, "frozen", s)
    base, adapter = records(at, narrow=narrow, low="float64")
    n = row_norms(base, adapter, scaling=s) if form == "dora" else None
    merged = merge(base, adapter, scaling=s)
    back = unmerge(merged, adapter, scaling=s, n=n)
    assert back.W.dtype == back.b.dtype == base.W.dtype
    W, W1, W2, b, b1, b2 = (v.astype("float64") for v in (base.W, merged.W, back.W, base.b, merged.b, back.b))
    ratio = np.ones((d_out, 1)) if n is None else np.abs(n / at["m"])[:, None]
    D = np.abs(s * (at["B"] @ at["A"]))
    more = 8 * 2.0**-53 * (np.abs(W) + D + ratio * np.abs(W1))
    lost = ratio * half_ulp(merged.W)
    assert_close("W by (merge.7)", W2, W, lost + half_ulp(back.W) + more)
    if narrow == "float64" and n is None:
        assert_close("W by (merge.7)", W2, W, lost + half_ulp(back.W))  # nothing else is rounded
    assert_close("W by (merge.8)", W2, W, 2 * lost + more)
    if form == "lora+bB":
        more = 8 * 2.0**-53 * (np.abs(b) + np.abs(s * at["bB"]) + np.abs(b1))
        assert_close("b", b2, b, half_ulp(merged.b) + half_ulp(back.b) + more)
    else:
        assert np.array_equal(b, b2)


def test_unmerging_gives_back_a_hidden_bias():
    """Where Adapter.b stood in for the base's, its bias comes from the caller, as it was."""
    at = parts(0, 4, 5, 2, "lora+bB", "trained", 0.7)
    base, adapter = records(at)
    merged = merge(base, adapter, scaling=0.7)
    assert np.array_equal(merged.b, at["b"] + 0.7 * at["bB"])
    back = unmerge(merged, adapter, scaling=0.7, b=base.b)
    assert np.array_equal(back.b, base.b)


def test_an_adapter_of_only_a_bias():
    W, b = normals(0)(4, 5), normals(1)(4)
    adapter = Adapter(None, None, b=b)
    for base in (Linear(W), Linear(W, 2 * b)):
        merged = merge(base, adapter, scaling=0.7)
        assert np.array_equal(merged.W, W)
        assert np.array_equal(merged.b, b)
    assert np.array_equal(unmerge(merged, adapter, scaling=0.7, b=2 * b).b, 2 * b)


def test_a_bias_is_made_where_only_the_adapter_has_one():
    """b' = s·bB in W's dtype, whatever the adapter's."""
    at = parts(0, 4, 5, 2, "lora+bB", "none", 0.7)
    base, adapter = records(at, narrow="bfloat16", low="float64")
    merged = merge(base, adapter, scaling=0.7)
    assert merged.b.dtype == base.W.dtype
    assert merged.b.tolist() == [nearest(Fraction(v), "bfloat16") for v in (0.7 * at["bB"]).tolist()]


def test_row_norms_are_of_the_whole_update():
    """(dora.3) in float64, whatever the dtypes."""
    at = parts(3, 6, 5, 2, "dora", "none", 0.7)
    base, adapter = records(at, narrow="float32", low="float16")
    n = row_norms(base, adapter, scaling=0.7)
    assert n.dtype == "float64"
    stored = {"W": base.W, "A": adapter.A, "B": adapter.B}
    assert_close("n", n, norms(stored, 0.7), 16 * 2.0**-52 * n)


def test_a_merged_layer_can_be_merged_into_again():
    """Two adapters one after the other: W + s₁B₁A₁ + s₂B₂A₂, in either order."""
    one, two = (parts(seed, 4, 5, 3, "lora", "none", 0.7) for seed in (1, 2))
    base, first = records(one)
    _, second = records(two)
    a = merge(merge(base, first, scaling=0.7), second, scaling=1.3).W
    b = merge(merge(base, second, scaling=1.3), first, scaling=0.7).W
    want = one["W"] + 0.7 * one["B"] @ one["A"] + 1.3 * two["B"] @ two["A"]
    assert_close("W", a, b, 1e-14 * np.ones_like(a))
    assert_close("W", a, want, 1e-14 * np.ones_like(a))


def test_a_float16_overflow_is_refused_without_a_warning():
    """60000 + 10000 is past 65504: named, and not stored as infinity."""
    base = Linear(np.full((1, 1), 60000, "float16"))
    adapter = Adapter(np.ones((1, 1), "float32"), np.full((1, 1), 10000, "float32"))
    with pytest.raises(ConfigError) as caught:
        merge(base, adapter, scaling=1.0)
    assert str(caught.value) == "W: expected finite numbers once merged, got NaN or infinity"
    assert np.isfinite(merge(base, adapter, scaling=0.5).W).all()
    with pytest.raises(ConfigError, match=r"^W: expected finite numbers once unmerged, got NaN or infinity$"):
        unmerge(base, adapter, scaling=-1.0)


def test_what_was_not_finite_is_refused():
    for name in ("W", "A", "B", "bB", "b0"):
        for bad in (np.nan, np.inf):
            at = parts(0, 4, 5, 2, "lora+bB", "frozen", 0.7)
            at[name].flat[0] = bad
            with (
                np.errstate(invalid="ignore"),
                pytest.raises(ConfigError, match=r"^[Wb]: expected finite numbers"),
            ):
                merge(*records(at), scaling=0.7)


@libraries
def test_a_row_of_zeros_is_refused_under_dora(library):
    """A row without direction: counted, listed, and the remedy named; without m it merges."""
    at = parts(0, 9, 4, 2, "dora", "none", 0.7)
    for row in (1, 3, 4, 5, 6, 8):
        at["W"][row] = 0.0
        at["B"][row] = 0.0
    base, adapter = records(at, library.place)
    for call in (merge, row_norms):
        with pytest.raises(ConfigError) as caught:
            call(base, adapter, scaling=0.7)
        assert str(caught.value) == (
            "W + s·BA: expected a direction in every row under DoRA, got 6 rows of zeros "
            "(first: 1, 3, 4, 5, 6); leave this layer out of DoRA with exclude_modules"
        )
    merge(base, Adapter(adapter.A, adapter.B), scaling=0.7)


@pytest.mark.parametrize(
    ("form", "bias", "given_", "message"),
    [
        ("dora", "frozen", {}, "n: expected row_norms of before the merge, got None"),
        ("lora", "frozen", {"n": np.ones(4)}, "n: expected None, since the adapter has no m, got an array"),
        ("lora", "trained", {}, "b: expected the base bias it hid, got None"),
        (
            "lora",
            "frozen",
            {"b": np.ones(4)},
            "b: expected None, since the adapter hid no base bias, got an array",
        ),
    ],
)
def test_unmerging_wants_what_the_merge_lost(form, bias, given_, message):
    base, adapter = records(parts(0, 4, 5, 2, form, bias, 0.7))
    merged = merge(base, adapter, scaling=0.7)
    with pytest.raises(ConfigError) as caught:
        unmerge(merged, adapter, scaling=0.7, **given_)
    assert str(caught.value) == message


def test_a_magnitude_of_zero_merges_and_does_not_unmerge():
    """Its row of W is lost; said with how many there are."""
    at = parts(0, 4, 5, 2, "dora", "none", 0.7)
    at["m"][[0, 2]] = 0.0
    base, adapter = records(at)
    merged = merge(base, adapter, scaling=0.7)
    assert not merged.W[[0, 2]].any()
    with pytest.raises(ConfigError, match=r"^m: expected no zero, since its row of W is lost, got 2 of them$"):
        unmerge(merged, adapter, scaling=0.7, n=row_norms(base, adapter, scaling=0.7))


def test_arguments_that_do_not_fit_are_named():
    base, adapter = records(parts(0, 4, 5, 2, "dora", "frozen", 0.7))
    narrow, _ = records(parts(0, 4, 6, 2, "dora", "frozen", 0.7))
    strict = next(x for x in LIBRARIES if x.name == "array_api_strict")
    for call in (merge, row_norms):
        with pytest.raises(ShapeError, match=r"^A: expected \(r, d_in\) with d_in=6 set by W, got \(2, 5\)$"):
            call(narrow, adapter, scaling=0.7)
        with pytest.raises(ConfigError, match=r"^scaling: expected a finite float, got nan$"):
            call(base, adapter, scaling=float("nan"))
        with pytest.raises(TypeError, match=r"^base: expected Linear, got Adapter$"):
            call(adapter, base, scaling=0.7)
        with pytest.raises(
            TypeError, match=r"^arrays must share one library, got W in array_api_strict, A in numpy$"
        ):
            call(Linear(strict.place(base.W)), adapter, scaling=0.7)
    with pytest.raises(ShapeError, match=r"^n: expected \(d_out,\) with d_out=4 set by W, got \(5,\)$"):
        unmerge(base, adapter, scaling=0.7, n=np.ones(5))
    with pytest.raises(DtypeError, match=r"^n: expected one of .*, got int64$"):
        unmerge(base, adapter, scaling=0.7, n=np.ones(4, int))
