"""Weights in 4 and 8 bits: known bits, nearest levels, ties, shapes, buffers; and what is refused."""

import hashlib
import tracemalloc
from fractions import Fraction
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LIBRARIES, normals

import lorax_np.quant as quant
from lorax_np.errors import ConfigError, DtypeError, ShapeError
from lorax_np.quant import (
    BLOCKS,
    BOUNDS,
    LEVELS,
    NF4,
    compress_absmax,
    dequantise_int8,
    dequantise_nf4,
    dynamic_levels,
    expand_absmax,
    quantise_int8,
    quantise_nf4,
)

DTYPES = {name: np.dtype(name) for name in ("float16", "float32", "float64")}
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)


def codes_of(q):
    """The codes one by one."""
    return np.stack([q.codes >> 4, q.codes & 15], axis=1).reshape(-1)[: np.prod(q.shape)]


def digest(values):
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


# ---- known bits --------------------------------------------------------------------------------------------


def spread(*shape):
    """Numbers spread over ±1, and blocks of 64 of them over powers of 2: of whole numbers alone."""
    i = np.arange(np.prod(shape), dtype=np.uint64)
    u = (i * np.uint64(2654435761) % np.uint64(2**32)).astype("float64") / 2**31 - 1
    return (u * 2.0 ** (i // np.uint64(64) % np.uint64(5))).astype("float32").reshape(shape)


def test_the_levels_have_the_bits_of_bitsandbytes():
    """bitsandbytes 0.50.2, functional.get_4bit_type("nf4"); the bounds are the midpoints, rounded once."""
    assert LEVELS.view(np.uint32).tolist() == [
        *(3212836864, 3207739825, 3204868912, 3200922272, 3197215309, 3191682367, 3183114353, 0),
        *(1034091263, 1042598627, 1048315101, 1051525946, 1054975160, 1058015147, 1060705203, 1065353216),
    ]
    assert BOUNDS.tolist() == [float(np.float32((float(a) + float(b)) / 2)) for a, b in pairwise(LEVELS)]


def test_small_codes_are_those_of_bitsandbytes():
    """bitsandbytes 0.50.2 on torch 2.13.0+cpu: functional.quantize_4bit(spread(3, 47), quant_type="nf4")."""
    q = quantise_nf4(spread(3, 47))
    assert q.codes.tobytes().hex() == (
        "0a2e61c3f91d50b3e71c4f92e60b3e81d50a2e71c4f91d50b3e71d4fa2e61c3f81d50a2e71c4f92e60b3e81d50a2e61c3f91d50b3e71"
        "c4fa2e60b3f81d50a2e71c4f91e50b3f87"
    )
    assert q.absmax.tobytes().hex() == "0000803f636dfd3f8bc66c40"


@pytest.mark.parametrize(
    ("block", "codes", "absmax", "float32", "bfloat16", "float16"),
    [
        (
            64,
            "76cc8b133daf4e71",
            "57ce21ccbe8d046a",
            "ad3d57968a343aa2",
            "27dfb9ab4b70355f",
            "4d3de560750dda47",
        ),
        (
            128,
            "cf6b39d72fd0a29b",
            "f3ba9bf7b33b1c5a",
            "e97144c1b70a0de7",
            "4adc65503f3f1aed",
            "180c04697540979f",
        ),
        (
            4096,
            "26db58284ca9d61f",
            "dd20ce2ffb8fc5e0",
            "74459c1947013aaa",
            "3232de6481468c7a",
            "4d4f6a21db6adeab",
        ),
    ],
)
def test_codes_absmax_and_numbers_are_those_of_bitsandbytes(block, codes, absmax, float32, bfloat16, float16):
    """bitsandbytes 0.50.2 on torch 2.13.0+cpu: quantize_4bit and dequantize_4bit of spread(96, 520)."""
    q = quantise_nf4(spread(96, 520), block=block)
    assert (digest(q.codes), digest(q.absmax)) == (codes, absmax)
    for dtype, want in (("float32", float32), ("bfloat16", bfloat16), ("float16", float16)):
        assert digest(dequantise_nf4(q, dtype=dtype)) == want


def test_absmax_in_8_bits_are_those_of_bitsandbytes():
    """The same with compress_statistics; its mean is summed in float32, which here costs it an ulp."""
    q = compress_absmax(quantise_nf4(spread(96, 520)))
    assert digest(q.absmax.table) == "e732639a65f497b4"
    assert digest(q.absmax.codes) == "e41dce687c81e057"
    assert np.float32(q.absmax.offset) == np.nextafter(
        np.float32(float.fromhex("0x1.89677cp+2")), np.float32(9)
    )
    offset = np.float32(float.fromhex("0x1.89677cp+2"))
    plain = quantise_nf4(spread(96, 520))
    top = np.abs(np.resize(plain.absmax - offset, (4, 256))[:3]).max(axis=1)
    last = np.abs((plain.absmax - offset)[768:]).max()
    theirs = q.absmax._replace(offset=float(offset), absmax=np.append(top, last))
    assert digest(theirs.absmax) == "1b0e0e9682156c9c"
    assert digest(dequantise_nf4(q._replace(absmax=theirs))) == "e6b771b38f1a10b2"


def test_8_bits_by_rows_are_those_of_bitsandbytes():
    """bitsandbytes 0.50.2 on torch 2.13.0+cpu: int8_vectorwise_quant and _dequant of spread(96, 520)."""
    q = quantise_int8(spread(96, 520))
    assert (digest(q.codes), digest(q.absmax)) == ("6bf629ee6f961f9e", "ef63431d2a41571a")
    assert digest(dequantise_int8(q)) == "70490031bd06cd26"


def test_the_dynamic_levels_are_near_their_formula():
    """(quant.7) in exact arithmetic, to an ulp of float32."""
    want = [Fraction(0), Fraction(1)]
    for i in range(7):
        ten = Fraction(10) ** (i - 6)
        middles = [
            ten * (Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * k + 1, 2 ** (i + 1))) for k in range(2**i)
        ]
        want += [*middles, *(-m for m in middles)]
    got = dynamic_levels()
    assert got.size == 256
    assert np.abs(got - np.sort(np.array(want, "float64"))).max() <= 2.0**-24
    assert (np.diff(got) > 0).all()


# ---- what a code is ----------------------------------------------------------------------------------------

shapes = st.one_of(
    st.tuples(st.integers(1, 300)),
    st.tuples(st.integers(1, 9), st.integers(1, 150)),
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 40)),
)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=shapes,
    block=st.sampled_from([32, 64, 256]),
    power=st.integers(-90, 90),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_each_entry_goes_to_the_nearest_level(seed, shape, block, power, dtype):
    """(quant.1) to (quant.4): no level is nearer, by more than the roundings of x/absmax and of the bound."""
    W = np.ldexp(np.random.default_rng(seed).standard_normal(shape), power).astype("float32").astype(dtype)
    q = quantise_nf4(W, block=block)
    flat = W.astype("float64").reshape(-1)
    absmax = np.array([np.abs(flat[i : i + block]).max() for i in range(0, flat.size, block)])
    assert np.array_equal(q.absmax, absmax.astype("float32"))
    top = np.repeat(absmax, block)[: flat.size]
    away = np.abs(flat[:, None] - LEVELS.astype("float64") * top[:, None])
    got = away[np.arange(flat.size), codes_of(q)]
    assert (got <= away.min(axis=1) + 4 * 2.0**-24 * top).all()
    out = dequantise_nf4(q)
    assert out.shape == shape
    assert np.array_equal(out.reshape(-1), LEVELS[codes_of(q)] * top.astype("float32"))


def test_a_tie_goes_to_the_lower_level_and_its_neighbours_to_theirs():
    """(quant.2): all 15 bounds, and the float32 numbers on either side."""
    for i, bound in enumerate(BOUNDS):
        sides = [np.nextafter(bound, np.float32(-9)), bound, np.nextafter(bound, np.float32(9))]
        q = quantise_nf4(np.array([1.0, *sides], "float32"))
        assert codes_of(q).tolist() == [15, i, i, i + 1]


def test_the_search_by_cells_is_a_search_among_the_bounds():
    """At every bound, every edge of a cell, their neighbours, and a million numbers between."""
    edges = (np.arange(2 * quant.nf4.CELLS + 1) / quant.nf4.CELLS - 1).astype("float32")
    x = np.concatenate([BOUNDS, edges, np.random.default_rng(0).uniform(-1, 1, 10**6).astype("float32")])
    x = np.concatenate([x, np.nextafter(x, np.float32(-2)), np.nextafter(x, np.float32(2))])
    assert np.array_equal(quant.nf4._levels(x), np.searchsorted(BOUNDS, np.clip(x, -1, 1)))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shape=shapes, block=st.sampled_from([None, 32, 64]))
def test_8_bits_are_off_by_half_a_step(seed, shape, block):
    """(quant.8) to (quant.10): |W − codes·absmax/127| ≤ absmax/254, and roundings."""
    W = np.random.default_rng(seed).standard_normal(shape).astype("float32")
    q = quantise_int8(W, block=block)
    wide = shape[-1] if block is None else block
    flat = W.reshape(-1).astype("float64")
    absmax = np.array([np.abs(flat[i : i + wide]).max() for i in range(0, flat.size, wide)])
    assert np.array_equal(q.absmax, absmax.astype("float32"))
    assert np.abs(q.codes.astype(int)).max() <= 127
    top = np.repeat(absmax, wide)[: flat.size].reshape(shape)
    off = np.abs(dequantise_int8(q) - W.astype("float64"))
    assert (off <= top / 254 * (1 + 127 * 8 * 2.0**-24)).all()
    full = np.abs(W) == top
    assert (np.abs(q.codes[full].astype(int)) == 127).all()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("nested", [False, True])
def test_what_codes_stand_for_has_those_codes(block, nested):
    """Idempotent: to the bit for absmax in float32; 8 bits of an absmax move it, and what follows, once."""
    W = spread(70, 130)
    q = quantise_nf4(W, block=block)
    q = compress_absmax(q) if nested else q
    again = quantise_nf4(dequantise_nf4(q), block=block)
    assert np.array_equal(again.codes, q.codes)
    if nested:
        stored = expand_absmax(q.absmax)
        assert np.array_equal(again.absmax, stored)
    else:
        assert np.array_equal(again.absmax, q.absmax)


def test_8_bits_again_are_the_same_codes():
    q = quantise_int8(spread(70, 130))
    again = quantise_int8(dequantise_int8(q))
    assert np.array_equal(again.codes, q.codes)
    assert (np.abs(again.absmax / q.absmax - 1) <= 2 * 2.0**-23).all()


def test_zeros_stay_zeros_and_no_block_reads_its_neighbour():
    W = spread(4, 64)
    W[1] = 0.0
    q = quantise_nf4(W)
    assert q.absmax[1] == 0
    assert (codes_of(q).reshape(4, 64)[1] == 7).all()
    assert not dequantise_nf4(q)[1].any()
    q8 = quantise_int8(W)
    assert not q8.codes[1].any()
    assert not dequantise_int8(q8)[1].any()
    other = W.copy()
    other[2] *= 1000
    rest = [0, 1, 3]
    assert np.array_equal(dequantise_nf4(quantise_nf4(other))[rest], dequantise_nf4(q)[rest])


@pytest.mark.parametrize("value", [1e-45, 1e-40, 1e-38, 1e-37, 2.6e36])
def test_numbers_at_either_end_of_float32(value):
    """Below 1e-38 a block has no reciprocal and nearly nothing to lose: an error of at most 1e-38."""
    W = np.array([value, -value / 2, 0.0], "float32")
    for out, step in ((dequantise_nf4(quantise_nf4(W)), 0.16), (dequantise_int8(quantise_int8(W)), 0.005)):
        assert np.isfinite(out).all()
        assert np.abs(out.astype("float64") - W).max() <= step * value + 1.3e-36


@pytest.mark.parametrize("library", [x for x in LIBRARIES if x.name != "guarded"], ids=lambda x: x.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_library_and_dtype(library, dtype):
    """float64 rounds to float32 first; 16 bits widen; the same codes as of those float32 numbers."""
    if library.name != "numpy" and dtype in ("float16", "bfloat16"):
        with pytest.raises(Exception):  # noqa: B017, PT011 - the library has no such arrays to give
            library.xp.asarray(spread(3, 50).astype(DTYPES[dtype]), dtype=getattr(library.xp, dtype))
        return
    W = normals(3)(6, 50).astype(DTYPES[dtype])
    there = library.place(W)
    want = quantise_nf4(W.astype("float32"))
    q = quantise_nf4(there)
    assert np.array_equal(q.codes, want.codes)
    assert np.array_equal(q.absmax, want.absmax)
    assert np.array_equal(quantise_int8(there).codes, quantise_int8(W.astype("float32")).codes)


@pytest.mark.parametrize("quantise", [quantise_nf4, quantise_int8, lambda W: quantise_int8(W, block=64)])
def test_strides_do_not_matter_and_nothing_is_written(quantise):
    W = spread(130, 70)
    want = quantise(W)
    views = [
        np.asfortranarray(W),
        np.repeat(W, 2, axis=1)[:, ::2],
        W[::-1].copy()[::-1],
        np.broadcast_to(W, (2, *W.shape))[1],
    ]
    for view in views:
        view.flags.writeable = False
        before = view.tobytes()
        got = quantise(view)
        assert np.array_equal(got.codes, want.codes)
        assert np.array_equal(got.absmax, want.absmax)
        assert view.tobytes() == before


@pytest.mark.parametrize("shape", [(1, 200_000), (3, 70_001), (2000, 129), (200_003,), (5, 3, 20_001)])
def test_pieces_meet_without_a_seam(shape):
    """Weights of several pieces, whose rows end anywhere in a block, against one code at a time."""
    W = spread(*shape)
    for block in (64, 4096):
        q = quantise_nf4(W, block=block)
        flat = np.append(W.reshape(-1), np.zeros(-W.size % block, "float32")).reshape(-1, block)
        x = flat * (np.float32(1) / np.abs(flat).max(axis=1))[:, None]
        assert np.array_equal(codes_of(q), np.searchsorted(BOUNDS, np.clip(x, -1, 1)).reshape(-1)[: W.size])
        top = np.repeat(q.absmax, block)[: W.size].reshape(shape)
        assert np.array_equal(dequantise_nf4(q), LEVELS[codes_of(q)].reshape(shape) * top)
        q8 = quantise_int8(W, block=block)
        want = q8.codes.astype("float32") * top * np.float32(1 / 127)
        assert np.array_equal(dequantise_int8(q8), want)


# ---- the buffer, and memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("quantise", "back"), [(quantise_nf4, dequantise_nf4), (quantise_int8, dequantise_int8)]
)
def test_one_buffer_serves_many_weights(quantise, back, dtype):
    out = np.full((40, 70), np.nan, DTYPES[dtype])
    for k in range(3):
        q = quantise(spread(40, 70) * np.float32(k))
        assert back(q, out) is out
        assert np.array_equal(out, back(q, dtype=dtype))
        assert np.array_equal(out, back(q).astype(DTYPES[dtype]))


def test_memory_is_the_result_and_a_piece():
    W = np.ones((1024, 1500), "float32")
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        q = quantise_nf4(W)
        peak = tracemalloc.get_traced_memory()[1] - before
        assert peak <= q.codes.nbytes + q.absmax.nbytes + 40 * quant.pieces.PIECE
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        dequantise_nf4(q, W)
        assert tracemalloc.get_traced_memory()[1] - before <= 12 * quant.pieces.PIECE
    finally:
        tracemalloc.stop()


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quantise", [quantise_nf4, quantise_int8])
def test_what_is_not_finite_is_refused(quantise, bad):
    W = spread(400, 400).astype("float64")
    W[-1, -1] = bad
    with pytest.raises(ConfigError, match=r"^W: expected finite numbers, within the range of float32"):
        quantise(W)
    W[-1, -1] = 1e300
    with pytest.raises(ConfigError, match=r"^W: expected finite numbers, within the range of float32"):
        quantise(W)


@pytest.mark.parametrize("quantise", [quantise_nf4, quantise_int8])
def test_what_has_no_rows_of_numbers_is_refused(quantise):
    for W in (np.array(3, "float32"), np.zeros((0, 3)), np.zeros((3, 0))):
        with pytest.raises(ShapeError, match=r"^W: expected \(\.\.\., d\) with axes of at least 1, got \("):
            quantise(W)
    for W in (np.zeros(3, int), np.zeros(3, complex), np.zeros(3, bool)):
        with pytest.raises(DtypeError, match=r"^W: expected one of float16, .* got (int|complex|bool)"):
            quantise(W)
    with pytest.raises(TypeError, match=r"^W: expected an array"):
        quantise([1.0, 2.0])
    assert np.isfinite(dequantise_nf4(quantise_nf4(np.array([3e38, 1.0])))).all()
    with pytest.raises(
        ConfigError, match=r"^W: expected numbers up to 2.7e\+36 to quantise to 8 bits, got 3e\+38$"
    ):
        quantise_int8(np.array([3e38, 1.0]))
    for block in (0, 63, 8192, 64.5, "64"):
        with pytest.raises(ConfigError, match=r"^block: expected "):
            quantise(np.ones(3), block=block)


def test_parts_that_do_not_fit_are_refused():
    q = quantise_nf4(spread(3, 47))
    for bad, error in (
        (q._replace(codes=q.codes[:-1]), ShapeError),
        (q._replace(codes=q.codes.astype("int16")), DtypeError),
        (q._replace(absmax=q.absmax[:-1]), ShapeError),
        (q._replace(absmax=q.absmax.astype("float64")), DtypeError),
        (q._replace(absmax=q.absmax.tolist()), DtypeError),
        (q._replace(shape=(3, 48)), ShapeError),
        (q._replace(shape=()), ShapeError),
    ):
        with pytest.raises(error, match=r"expected .*got "):
            dequantise_nf4(bad)
    nested = compress_absmax(q)
    for name, value in (("codes", nested.absmax.codes[:-1]), ("table", LEVELS), ("absmax", q.absmax[:0])):
        with pytest.raises((ShapeError, DtypeError), match=r"expected .*got "):
            dequantise_nf4(nested._replace(absmax=nested.absmax._replace(**{name: value})))
    q8 = quantise_int8(spread(3, 47))
    for bad in (q8._replace(absmax=q8.absmax[:-1]), q8._replace(block=32), q8._replace(codes=q8.codes * 1.0)):
        with pytest.raises((ShapeError, DtypeError), match=r"expected .*got "):
            dequantise_int8(bad)


def test_a_buffer_that_does_not_fit_is_refused_and_left_alone():
    q = quantise_nf4(spread(3, 47))
    locked = np.zeros((3, 47), "float32")
    locked.flags.writeable = False
    for out in (
        np.zeros((47, 3), "float32"),
        np.zeros((3, 47), int),
        np.zeros((47, 3), "float32").T,
        locked,
        [0.0],
    ):
        with pytest.raises((ShapeError, DtypeError), match=r"^out: expected .*got "):
            dequantise_nf4(q, out)
        assert not np.any(out)
    with pytest.raises(DtypeError, match=r"^out: expected float16, got float32$"):
        dequantise_nf4(q, np.zeros((3, 47), "float32"), dtype="float16")
    for dtype in ("int8", "complex128", "float8"):
        with pytest.raises(DtypeError, match=r"^dtype: expected one of float16"):
            dequantise_nf4(q, dtype=dtype)


def test_compressing_twice_changes_nothing():
    q = compress_absmax(quantise_nf4(spread(96, 520)))
    assert compress_absmax(q) is q
    assert isinstance(q, NF4)
    off = np.abs(expand_absmax(q.absmax) - quantise_nf4(spread(96, 520)).absmax)
    assert off.max() <= 0.0125 * q.absmax.absmax.max()  # half the widest step of the levels
