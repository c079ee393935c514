"""Attention by blocks: the definition, every gradient by a complex step, and what a query may see."""

import numpy as np
import pytest
from checkers import assert_close, pairing
from strategies import LIBRARIES, normals

from lorax_np.errors import ShapeError
from lorax_np.ops.attention import attention_backward, attention_forward
from lorax_np.ops.relative import Relative, relative_buckets

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
EPS = 2.0**-52
H, K, D, E, BUCKETS = 6, 2, 4, 3, 8
CASES = {
    "all": {"causal": False},
    "causal": {"causal": True},
    "causal, window": {"causal": True, "window": 3},
    "window": {"causal": False, "window": 2},
    "cross": {"causal": False, "key_starts": [0, 3, 4, 4, 9]},
    "cached": {"causal": True, "key_starts": [0, 3, 5, 5, 13]},
    "cached, window": {"causal": True, "window": 2, "key_starts": [0, 3, 5, 5, 13]},
}
STARTS = [0, 3, 4, 4, 11]  # unequal, one of them empty
cases = pytest.mark.parametrize("case", CASES)


def drawn(name, seed=0, library=LIBRARIES[0], relative=False):
    draw, options = normals(seed, library), {"starts": STARTS, "scale": 0.7, "block": 3, **CASES[name]}
    N, M = STARTS[-1], options.get("key_starts", STARTS)[-1]
    at = {"q": draw(N, H, D), "k": draw(M, K, D), "v": draw(M, K, E)}
    if relative:
        at["R"] = draw(BUCKETS, H)
    return at, options, draw(N, H, E)


def forward(at, options, bidirectional=False):
    table = {"relative": Relative(at["R"], bidirectional, 12)} if "R" in at else {}
    return attention_forward(at["q"], at["k"], at["v"], **options, **table)


def backward(go, saved, at, options, bidirectional=False):
    table = {"relative": Relative(at["R"], bidirectional, 12)} if "R" in at else {}
    gq, gk, gv, gR = attention_backward(go, saved, **options, **table)
    return {"q": gq, "k": gk, "v": gv, **({"R": gR} if table else {})}


def dense(at, options):
    """The definition, one query and one head at a time."""
    q, k, v = at["q"], at["k"], at["v"]
    o, bounds = np.zeros((*q.shape[:2], v.shape[2])), options.get("key_starts", STARTS)
    for a, b, c, d in zip(STARTS, STARTS[1:], bounds, bounds[1:], strict=False):
        ahead = d - c - (b - a) if options["causal"] else 0
        for t in range(b - a):
            keys = [s for s in range(d - c) if not options["causal"] or s <= t + ahead]
            keys = [s for s in keys if "window" not in options or t + ahead - s < options["window"]]
            for h in range(H):
                S = np.array([options["scale"] * (q[a + t, h] @ k[c + s, h // (H // K)]) for s in keys])
                if "R" in at:
                    bucket = [
                        relative_buckets(
                            s - t - ahead,
                            s - t - ahead + 1,
                            buckets=BUCKETS,
                            bidirectional=False,
                            max_distance=12,
                        )[0]
                        for s in keys
                    ]
                    S = S + at["R"][bucket, h]
                P = np.exp(S - S.max())
                o[a + t, h] = (P / P.sum()) @ np.array([v[c + s, h // (H // K)] for s in keys])
    return o


@libraries
@cases
@pytest.mark.parametrize("relative", [False, True])
def test_the_blocks_are_the_definition(library, case, relative):
    at, options, _ = drawn(case, 1, library, relative)
    o, saved = forward(at, options)
    assert saved.L.shape == (STARTS[-1], H)
    host = {name: library.host(value) for name, value in at.items()}
    assert_close("o", library.host(o), dense(host, options), 64 * EPS * np.abs(host["v"]).max())


@cases
def test_every_gradient_is_a_complex_step(case):
    at, options, go = drawn(case, 2, relative=True)
    _, saved = forward(at, options)
    got = backward(go, saved, at, options)
    for name, value in at.items():
        want = np.empty(value.shape)
        for i in np.ndindex(value.shape):
            stepped = value.astype("complex128")
            stepped[i] += 1e-30j
            want[i] = pairing(go, np.imag(forward({**at, name: stepped}, options)[0]) / 1e-30)
        assert got[name].shape == value.shape
        assert_close(f"g{name}", got[name], want, 256 * EPS * np.abs(want).max())


@libraries
@cases
def test_libraries_agree_on_gradients(library, case):
    at, options, go = drawn(case, 3, relative=True)
    _, saved = forward(at, options)
    want = backward(go, saved, at, options)
    at, options, go = drawn(case, 3, library, relative=True)
    _, saved = forward(at, options)
    for name, g in backward(go, saved, at, options).items():
        assert_close(f"g{name}", library.host(g), want[name], 64 * EPS * np.abs(want[name]).max())


def test_a_query_without_a_key_is_refused():
    at, options, _ = drawn("all")
    for change, message in (
        ({"key_starts": [0, 0, 1, 1, 11]}, "key_starts: expected 1 keys at least for sequence 0, got 0"),
        ({"starts": [0, 3, 11]}, None),
        ({"starts": [0, 4, 3, 11]}, "starts: expected bounds that rise from 0 to the number of rows, 11"),
        (
            {"causal": True, "key_starts": [0, 2, 4, 4, 11]},
            "key_starts: expected 3 keys at least for sequence 0",
        ),
        ({"window": 0}, "window: expected 1 key at least, got 0"),
    ):
        if message is None:
            forward(at, {**options, **change})
            continue
        with pytest.raises(ShapeError) as caught:
            forward(at, {**options, **change})
        assert str(caught.value).startswith(message)
