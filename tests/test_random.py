"""Philox words, dropout masks and torch's stream: known answers, one mask in every library, and refusals."""

from math import log, sqrt

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import LIBRARIES, seeds

from lorax_np.errors import BackendError, ConfigError, DtypeError
from lorax_np.random import (
    DropoutKey,
    dropout_mask,
    kept_lanes,
    philox,
    site_key,
    skip,
    torch_generator,
    uniform,
    word,
)

ONES = 2**64 - 1
SITE = "model.layers.0.self_attn.q_proj"
WHOLE = {"seed": 42, "site": 0xE477A328DEA3156C, "step": 7, "c2": 1}  # micro-batch 1, rank 0, adapter 0, call 0
LIBRARY = pytest.mark.parametrize(
    "library", [x for x in LIBRARIES if x.name != "guarded"], ids=lambda x: x.name
)

ANSWERS = [
    ((0, 0, 0, 0), (0, 0), "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
    ((ONES,) * 4, (ONES,) * 2, "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
    (
        (0, 7, 1, 0),
        (42, WHOLE["site"]),
        "5457b1bce1464221 2cb152af9b13b795 106322cff399d6b0 9d3a2e4c2344441b",
    ),
]
LANES = "4221 e146 b1bc 5457 b795 9b13 52af 2cb1 d6b0 f399 22cf 1063 441b 2344 2e4c 9d3a"


def bits(mask):
    return "".join("01"[int(v > 0)] for v in np.asarray(mask).ravel())


def by_integers(counter, key):
    """Ten rounds of Philox4x64 in Python's integers: (dropout.4)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        one, two = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(two >> 64) ^ c[1] ^ k[0], two & ONES, (one >> 64) ^ c[3] ^ k[1], one & ONES]
        k = [(k[0] + 0x9E3779B97F4A7C15) & ONES, (k[1] + 0xBB67AE8584CAA73B) & ONES]
    return c


# ---- words --------------------------------------------------------------------------------------------------


@LIBRARY
@pytest.mark.parametrize(("counter", "key", "answer"), ANSWERS)
def test_philox_has_its_known_answers(library, counter, key, answer):
    """(dropout.4): the published words, those of all ones, and those of the whole recipe."""
    want = [int(w, 16) for w in answer.split()]
    assert by_integers(counter, key) == want
    words = philox([library.place(np.array([c], dtype="uint64")) for c in counter], key)
    assert [int(library.host(w)[0]) for w in words] == want


@LIBRARY
@given(c=st.tuples(*[st.integers(0, ONES)] * 4), k=st.tuples(*[st.integers(0, ONES)] * 2))
def test_philox_is_its_integers(library, c, k):
    """(dropout.4) in halves of 32 bits is the product of 128 bits."""
    words = philox([library.place(np.array([v], dtype="uint64")) for v in c], k)
    assert [int(library.host(w)[0]) for w in words] == by_integers(c, k)


def test_the_lanes_of_the_whole_recipe():
    """(dropout.5): lane i is bits 16·(i%4) of word (i//4)%4, low bits first."""
    words = [int(w, 16) for w in ANSWERS[2][2].split()]
    assert [f"{(words[i // 4] >> 16 * (i % 4)) & 0xFFFF:04x}" for i in range(16)] == LANES.split()


def test_the_key_of_a_site():
    assert site_key(SITE) == WHOLE["site"]
    assert site_key("") == int.from_bytes(bytes.fromhex("e3b0c44298fc1c14"), "little")
    assert site_key("ü") != site_key("u")


# ---- masks --------------------------------------------------------------------------------------------------


@LIBRARY
@pytest.mark.parametrize(
    ("p", "how", "kept"),
    [
        (0.5, {}, "01000011010111101010110000001001"),
        (0.5, WHOLE, "01101100110000011111001001111110"),
        (0.1, WHOLE, "11111111111011111111111011111110"),
    ],
)
def test_masks_have_their_known_answers(library, p, how, kept):
    """(dropout.3) to (dropout.6), from seed to mask, with p = 6554/65536 for 0.1."""
    mask = library.host(dropout_mask(32, p, xp=library.xp, **how))
    assert bits(mask) == kept
    assert set(mask.tolist()) == {0.0, float(np.float32(65536 / (65536 - round(p * 65536))))}


@given(
    shape=st.lists(st.integers(0, 9), max_size=3),
    p=st.floats(0, 0.99),
    words=st.tuples(*[st.integers(0, ONES)] * 5),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_every_library_makes_the_same_mask(shape, p, words, dtype):
    """(dropout.3) to (dropout.6): bits, values, shape and dtype, for words past 2⁶³ too, as by integers."""
    how = dict(zip(("seed", "site", "step", "c2", "c3"), words, strict=True))
    want = dropout_mask(shape, p, dtype=dtype, **how)
    assert want.shape == tuple(shape)
    assert want.dtype == dtype
    for library in LIBRARIES:
        got = dropout_mask(shape, p, dtype=dtype, xp=library.xp, **how)
        assert got.shape == want.shape
        assert np.array_equal(library.host(got), want)
    T = round(p * 65536)
    flat = want.ravel()
    for i in (i for i in (0, 1, 15, 16, 17, flat.size - 1) if 0 <= i < flat.size):
        block = by_integers((i // 16, words[2], words[3], words[4]), (words[0], words[1]))
        lane = (block[(i // 4) % 4] >> 16 * (i % 4)) & 0xFFFF
        assert flat[i] == (np.array(65536 / (65536 - T)).astype(dtype) if lane >= T else 0)


@LIBRARY
def test_a_longer_mask_begins_with_the_shorter_one(library):
    """(dropout.5): an element's bits depend on its place alone, not on the shape."""
    long = library.host(dropout_mask(1000, 0.3, 5, 6, 7, xp=library.xp))
    for n in (0, 1, 3, 15, 16, 17, 31, 64, 999):
        assert np.array_equal(library.host(dropout_mask(n, 0.3, 5, 6, 7, xp=library.xp)), long[:n])
    folded = dropout_mask((10, 20, 5), 0.3, 5, 6, 7, xp=library.xp)
    assert np.array_equal(library.host(folded).ravel(), long)


def test_each_word_of_the_address_counts():
    """seed, step, site, c2 and c3 each give another mask, and none is another's: no two words are added up."""
    names = ("seed", "step", "site", "c2", "c3")
    masks = {bits(dropout_mask(256, 0.5))}
    for name in names:
        for value in (1, 2, 2**32, 2**63, ONES):
            masks.add(bits(dropout_mask(256, 0.5, **{name: value})))
    for one, other in zip(names, names[1:] + names[:1], strict=True):
        masks.add(bits(dropout_mask(256, 0.5, **{one: 3, other: 5})))
        masks.add(bits(dropout_mask(256, 0.5, **{one: 5, other: 3})))
    assert len(masks) == 1 + 25 + 10


@given(seed=seeds, p=st.sampled_from([0.001, 0.05, 0.1, 0.5, 0.9, 0.999]))
def test_the_share_of_kept_elements_is_binomial(seed, p):
    """(dropout.7): within Bernstein's bound for one false alarm in 10⁹; neighbours are independent."""
    n, q = 1 << 14, kept_lanes(p) / 65536
    kept = dropout_mask(n, p, seed) > 0

    def allowed(n, q):
        return sqrt(2 * n * q * (1 - q) * log(2e9)) + log(2e9)

    assert abs(np.sum(kept) - n * q) <= allowed(n, q)
    for lag in (1, 4, 16):
        both = np.sum(kept[:-lag] & kept[lag:])  # two sums of independent terms: every second block of lag
        assert abs(both - (n - lag) * q * q) <= 2 * allowed((n - lag) / 2, q * q)


def test_the_mean_of_a_mask_is_one():
    """(dropout.7): the scale is the inverse of the share of lanes kept, so a mask keeps the expectation."""
    for p in (0.1, 0.25, 0.7):
        kept = kept_lanes(p)
        mask = dropout_mask(16, p, dtype="float64")
        assert mask.max() == 65536 / kept
    mean = dropout_mask(1 << 20, 0.3, 9, dtype="float64").mean()
    assert abs(mean - 1) <= sqrt(0.3 / 0.7 * 2 * log(2e9) / (1 << 20)) + 1e-4


@pytest.mark.parametrize(
    ("p", "kept"),
    [
        (0, 65536),
        (0.0, 65536),
        (2.0**-18, 65536),
        (2.0**-17, 65536),  # half a lane, to the even number of dropped ones
        (3 * 2.0**-17, 65534),
        (2.0**-16, 65535),
        (0.1, 58982),
        (0.5, 32768),
        (np.float32(0.5), 32768),
        (0.9, 6554),
        (1 - 2.0**-16, 1),
    ],
)
def test_p_is_a_whole_number_of_lanes(p, kept):
    """(dropout.3): T = round(65536 p), ties to even."""
    assert kept_lanes(p) == kept
    mask = dropout_mask(64, p, dtype="float64")
    assert set(mask.tolist()) <= {0.0, 65536 / kept}
    if kept == 65536:
        assert mask.tolist() == [1.0] * 64


@pytest.mark.parametrize(
    "p", [1, 1.0, 1 - 2.0**-18, 1 - 2.0**-17, -0.1, -1e-9, 1.5, np.nan, np.inf, "0.5", None, True, 1j]
)
def test_a_p_that_keeps_no_lane_is_refused(p):
    with pytest.raises(ConfigError) as caught:
        dropout_mask(4, p)
    assert str(caught.value) == f"p: expected 0 <= p < 1, with some of the 65536 lanes kept, got {p!r}"


def test_masks_of_every_dtype():
    """(dropout.6): computed in float64, cast once."""
    for dtype, kind in (
        ("float16", "float16"),
        ("bfloat16", ml_dtypes.bfloat16),
        ("float32", "float32"),
        ("float64", "float64"),
    ):
        mask = dropout_mask(64, 0.3, dtype=dtype)
        assert mask.dtype == np.dtype(kind)
        assert mask.max() == np.float64(65536 / kept_lanes(0.3)).astype(kind)
        assert bits(mask) == bits(dropout_mask(64, 0.3))
    assert dropout_mask(3, 0.3, dtype=np.float64).dtype == "float64"
    for wrong in ("int32", "complex128", "float8_e4m3", "float"):
        with pytest.raises(
            DtypeError, match=r"^dtype: expected one of float16, bfloat16, float32, float64, got "
        ):
            dropout_mask(4, 0.3, dtype=wrong)


@pytest.mark.parametrize("name", ["seed", "step", "site", "c2", "c3"])
@pytest.mark.parametrize("value", [-1, 2**64, 1.0, "1", None, True])
def test_a_word_out_of_range_is_named(name, value):
    with pytest.raises(ConfigError) as caught:
        dropout_mask(4, 0.5, **{name: value})
    assert str(caught.value) == f"{name}: expected an integer from 0 to 2**64 - 1, got {value!r}"


@pytest.mark.parametrize("shape", [-1, (2, -1), (2.0, 3), (True,), "ab", (None,)])
def test_a_shape_that_is_none_is_named(shape):
    with pytest.raises(ConfigError, match=r"^shape: expected integers of at least 0, got "):
        dropout_mask(shape, 0.5)


def test_integers_of_numpy_are_integers():
    want = dropout_mask((2, 3), 0.5, 7, 8, 9)
    size = np.int64(2), np.int32(3)
    assert np.array_equal(dropout_mask(size, 0.5, np.uint64(7), np.int8(8), np.uint64(9)), want)
    assert np.array_equal(dropout_mask(np.int64(6), 0.5, 7, 8, 9), want.ravel())
    assert word("seed", np.uint64(ONES)) == ONES


def test_where_a_mask_is_made():
    with pytest.raises(BackendError, match=r"^xp: expected one of numpy, cupy, auto, got 'torch'$"):
        dropout_mask(4, 0.5, xp="torch")
    with pytest.raises(TypeError, match=r"^xp: expected numpy, cupy or an array-standard module, got "):
        dropout_mask(4, 0.5, xp=3)
    assert isinstance(dropout_mask(4, 0.5, xp="NumPy "), np.ndarray)


# ---- torch's stream ----------------------------------------------------------------------------------------

# torch.manual_seed(seed); torch.rand(4).double() * 2**24, as torch 2.13.0+cpu gives them
TORCH = {
    0: [8325804, 12888623, 1484405, 2215104],
    1: [12710949, 4686059, 6762380, 12325960],
    42: [14802022, 15351219, 6423388, 16094478],
}


@pytest.mark.parametrize("seed", TORCH)
def test_torch_generator_has_torchs_words(seed):
    """Its uniforms take the low 24 of 32 bits; a seed past 32 bits is cut there, as torch does."""
    for same in (seed, seed + 2**32):
        raw = torch_generator(same).bit_generator.random_raw(4)
        assert raw.max() < 2**32
        assert (raw & 0xFFFFFF).tolist() == TORCH[seed]


def test_torch_generator_refuses_what_is_no_seed():
    for seed in (-1, 2**64, 1.5, None, True):
        with pytest.raises(ConfigError, match=r"^seed: expected an integer from 0 to"):
            torch_generator(seed)


def test_skipping_passes_over_torchs_words_only():
    """(init.13): one 32-bit word an element, of a Mersenne twister; other generators spend none."""
    rng, whole = torch_generator(3), torch_generator(3).bit_generator.random_raw(20)
    skip(rng, 7)
    assert np.array_equal(rng.bit_generator.random_raw(13), whole[7:])
    other = np.random.default_rng(3)
    skip(other, 7)
    assert other.random() == np.random.default_rng(3).random()


def test_uniform_of_the_mersenne_twister_spends_a_word_an_element():
    """(init.11), (init.12): 24 bits a word, shape by shape, and nothing left over between calls."""
    rng, raw = torch_generator(5), torch_generator(5).bit_generator.random_raw(10)
    got = np.concatenate([uniform(rng, (2, 3), 0.25).ravel(), uniform(rng, (4,), 0.25)])
    assert got.dtype == "float32"
    assert np.array_equal(got, ((raw & 0xFFFFFF) / 2.0**24 * 0.5 - 0.25).astype("float32"))


def test_uniform_of_any_other_generator():
    got = uniform(np.random.default_rng(5), (2, 3), 0.3)
    want = ((2 * np.random.default_rng(5).random((2, 3)) - 1) * 0.3).astype("float32")
    assert np.array_equal(got, want)


def test_a_generator_used_before_gives_the_same_mask():
    """Its own numbers are forgotten: words left of a block, halves of words, key and counter."""
    used = np.random.Philox(key=5, counter=9)
    for drop in (DropoutKey(0.3, 1, 2, 3, 4, 5), DropoutKey(0.3, 2, 2, 3), DropoutKey(0.6)):
        want, got = np.empty((5, 7)), np.empty((5, 7))
        drop.blocks()(want)
        np.random.Generator(used).integers(0, 9, 3, dtype="uint32")
        used.random_raw(2)
        drop.blocks(used)(got)
        np.testing.assert_array_equal(got, want)
