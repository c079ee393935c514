"""From PiSSA and its like to plain adapters of twice the rank."""

import ml_dtypes
import numpy as np
import pytest
from checkers import assert_close
from hypothesis import given
from hypothesis import strategies as st
from strategies import LIBRARIES, normals, ranks, seeds, sizes

import lorax_np as lx
from lorax_np.config import site_at
from lorax_np.config.fields import RESIDUAL
from lorax_np.errors import ConfigError, DtypeError, ShapeError
from lorax_np.plain import plain, plain_config

EPS = 2.0**-52
libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)


def linear(draw, d_out, d_in, r, **more):
    return lx.Adapter(draw(r, d_in), draw(d_out, r), **more)


def absolute(v):
    return type(v)(abs(v.A), abs(v.B))


@libraries
@given(seed=seeds, d_in=sizes, d_out=sizes, r=ranks)
def test_the_update_is_the_difference_of_the_two(library, seed, d_in, d_out, r):
    """(plain.1), (plain.2): B'A' = BA − B₀A₀ of the same numbers, none of them rounded."""
    draw, host = normals(seed, library), library.host
    now, start = linear(draw, d_out, d_in, r), linear(draw, d_out, d_in, r)
    found = plain(now, start)
    (A, B), (A0, B0), (A2, B2) = ((host(v.A), host(v.B)) for v in (now, start, found))
    assert (np.concatenate([A, A0]) == A2).all()
    assert (np.concatenate([B, -B0], axis=1) == B2).all()
    size = abs(B) @ abs(A) + abs(B0) @ abs(A0)
    assert_close("delta", B2 @ A2, B @ A - B0 @ A0, 64 * EPS * size)


@given(seed=seeds, groups=st.integers(1, 3), axes=st.integers(1, 3))
def test_a_convolution_keeps_its_groups(seed, groups, axes):
    """Rows of A beside those of the same group: the delta of each output is the difference of its two."""
    draw, (rho, per, d_in) = normals(seed), (2, 3, 4)
    kernel, one = (3, 2, 2)[:axes], (1,) * axes

    def adapter():
        return lx.ConvAdapter(
            draw(groups * rho, d_in, *kernel), draw(groups * per, rho, *one), bB=draw(groups * per)
        )

    def delta(v):
        r_group = v.B.shape[1]
        A, B = v.A.reshape(groups, r_group, -1), v.B.reshape(groups, per, r_group)
        return np.einsum("gor,gri->goi", B, A).reshape(groups * per, d_in, *kernel)

    now, start = adapter(), adapter()
    found = plain(now, start)
    assert found.A.shape[0] == 2 * groups * rho
    assert found.bB is now.bB
    size = delta(absolute(now)) + delta(absolute(start))
    assert_close("delta", delta(found), delta(now) - delta(start), 64 * EPS * size)


@given(seed=seeds, experts=st.integers(1, 4))
def test_experts_keep_theirs(seed, experts):
    """A is expert-slowest and B expert-fastest, before and after."""
    draw, (r, d_in, d_out) = normals(seed), (2, 5, 3)

    def deltas(v):
        rank = v.A.shape[0] // experts
        A, B = v.A.reshape(experts, rank, d_in), v.B.reshape(d_out, rank, experts)
        return np.einsum("ore,eri->eoi", B, A)

    now, start = (lx.Adapter(draw(experts * r, d_in), draw(d_out, r * experts)) for _ in range(2))
    found = plain(now, start, experts=experts)
    size = deltas(absolute(now)) + deltas(absolute(start))
    assert_close("delta", deltas(found), deltas(now) - deltas(start), 64 * EPS * size)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2"])
@pytest.mark.parametrize("use_rslora", [False, True])
@given(seed=seeds)
def test_a_trained_pissa_layer_moves_to_the_original_weight(start, use_rslora, seed):
    """The two layers' outputs, with a mask for neither; α ≠ r, and the scaling from the two configs."""
    config = lx.LoraConfig(r=3, lora_alpha=5, use_rslora=use_rslora, init_lora_weights=start, bias="all")
    draw = normals(seed)
    W, b = draw(6, 5), draw(6)
    base, first = lx.init_adapter(lx.Linear(W, b), config, rng=np.random.default_rng(seed))
    now = lx.Adapter(first.A + draw(3, 5), first.B + draw(6, 3), b=first.b + draw(6))
    found, s = plain(now, first), plain_config(config).scaling
    assert abs(s / config.scaling - 1) <= 4 * EPS
    assert found.b is now.b
    x = draw(7, 5)
    y, _ = lx.lora_linear_forward(x, base, now, scaling=config.scaling)
    got, _ = lx.lora_linear_forward(x, lx.Linear(W, b), found, scaling=s)
    size = abs(x) @ (abs(W) + s * (abs(now.B) @ abs(now.A) + 2 * abs(first.B) @ abs(first.A))).T + abs(now.b)
    assert_close("y", got, y, 64 * EPS * size)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_numbers_are_copied_in_any_dtype(dtype):
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    now, start = (linear(normals(i), 3, 4, 2) for i in (0, 1))
    now, start = (lx.Adapter(v.A.astype(kind), v.B.astype(kind)) for v in (now, start))
    found = plain(now, start)
    assert found.A.dtype == found.B.dtype == now.A.dtype
    assert (found.B[:, 2:] == -start.B).all()


# ---- DoRA ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_gradient", [False, True])
@given(seed=seeds)
def test_a_magnitude_stands_beside_the_same_matrix(norm_gradient, seed):
    """(plain.4): outputs, gm, gx and the gradients of A and B, and what is merged, beside either base."""
    config = lx.LoraConfig(r=2, lora_alpha=3, init_lora_weights="pissa", use_dora=True, bias="all")
    draw = normals(seed)
    W, b = draw(6, 5), draw(6)
    base, first = lx.init_adapter(lx.Linear(W, b), config)
    now = lx.Adapter(first.A + draw(2, 5), first.B + draw(6, 2), m=first.m * 2 + draw(6), b=first.b + draw(6))
    found, after = plain(now, first), plain_config(config)
    assert found.m is now.m
    assert after.use_dora
    s, x, gy = after.scaling, draw(7, 5), draw(7, 6)
    y, saved = lx.lora_linear_forward(x, base, now, scaling=config.scaling)
    got, saved2 = lx.lora_linear_forward(x, lx.Linear(W, b), found, scaling=s)
    V = base.W + s * (now.B @ now.A)
    E = 64 * EPS * (abs(W) + s * (abs(now.B) @ abs(now.A) + 2 * abs(first.B) @ abs(first.A)))  # of V
    n, e = np.linalg.norm(V, axis=1), np.linalg.norm(E, axis=1)
    k = abs(now.m) / n
    assert_close("y", got, y, abs(x) @ (k[:, None] * (E + abs(V) * (e / n)[:, None])).T + 4 * EPS * abs(now.b))
    W1 = lx.merge(base, now, scaling=s).W
    W2 = lx.merge(lx.Linear(W, b), found, scaling=s).W
    assert_close("merged", W2, W1, k[:, None] * (E + abs(V) * (e / n)[:, None]))
    gx, g = lx.lora_linear_backward(gy, saved, base, now, scaling=s, norm_gradient=norm_gradient)
    gx2, g2 = lx.lora_linear_backward(
        gy, saved2, lx.Linear(W, b), found, scaling=s, norm_gradient=norm_gradient
    )
    norm, c = np.linalg.norm, np.linalg.norm(V) / n.min()
    q, worst = norm(k * gy) * c * (1 + norm_gradient * c), 8 * (e / n).max()  # of a gradient by y, and relative
    for name, one, two, size in (
        ("gx", gx, gx2, q * norm(V)),
        ("gA", g.A, g2.A[:2], s * q * norm(x) * norm(now.B)),
        ("gB", g.B, g2.B[:, :2], s * q * norm(x) * norm(now.A)),
        ("gm", g.m, g2.m, norm(gy) * norm(x) * c),
    ):
        assert norm(two - one) <= worst * size, name


def test_a_convolution_and_an_embedding_with_magnitudes():
    """(plain.4), by rows of a kernel and by columns of a table."""
    draw, s = normals(3), 1.5
    for make, A, B, m in (
        (lx.ConvAdapter, (2, 3, 3, 2), (4, 2, 1, 1), 4),
        (lx.Adapter, (2, 9), (5, 2), 5),
    ):
        now, start = (make(draw(*A), draw(*B)) for _ in range(2))
        now = make(now.A, now.B, m=abs(draw(m)) + 0.5)
        found = plain(now, start)
        assert found.m is now.m
        delta = lambda v: v.B.reshape(len(v.B), -1) @ v.A.reshape(len(v.A), -1)  # noqa: E731
        W = draw(*A[1:]) if make is lx.ConvAdapter else draw(9, 5)
        W = draw(4, *A[1:]) if make is lx.ConvAdapter else W
        taken = s * delta(start)
        rest = W - (taken.reshape(W.shape) if make is lx.ConvAdapter else taken.T)
        merge = lx.merge_conv if make is lx.ConvAdapter else lx.merge_embedding
        base = lx.Conv if make is lx.ConvAdapter else lx.Embedding
        one, two = merge(base(rest), now, scaling=s).W, merge(base(W), found, scaling=s).W
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-12)


# ---- the config ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True])
def test_every_site_keeps_its_scaling(use_rslora):
    """(plain.3), patterns alike."""
    config = lx.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=use_rslora,
        init_lora_weights="olora",
        rank_pattern={"q": 2, "both": 3},
        alpha_pattern={"k": 5, "both": 7.5},
    )
    after = plain_config(config)
    for name in ("m.q", "m.k", "m.both", "m.other"):
        one, two = site_at(config, name), site_at(after, name)
        assert two.r == 2 * one.r
        assert abs(two.scaling / one.scaling - 1) <= 4 * EPS
    assert after.init_lora_weights is True
    assert isinstance(after.lora_alpha, float if use_rslora else int)
    assert plain_config(lx.LoraConfig(init_lora_weights="pissa", rank_pattern=None)).rank_pattern is None


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva", "loftq"])
def test_starts_that_leave_or_quantise_the_base_are_refused(start):
    more = {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}} if start == "loftq" else {}
    with pytest.raises(ConfigError, match=r"^init_lora_weights: expected one of pissa, .* got "):
        plain_config(lx.LoraConfig(init_lora_weights=start, **more))


def test_the_starts_with_a_residual_are_known():
    for start in RESIDUAL:
        assert plain_config(lx.LoraConfig(init_lora_weights=start.replace("_k", "_3"))).r == 16


# ---- refusals -----------------------------------------------------------------------------------------------


def test_dora_is_refused_with_dropout():
    config = lx.LoraConfig(use_dora=True, lora_dropout=0.1, init_lora_weights="pissa")
    with pytest.raises(
        ConfigError, match=r"^lora_dropout: expected 0.0 with use_dora, .* got 0.1; set it to 0.0"
    ):
        plain_config(config)
    assert plain_config(lx.LoraConfig(lora_dropout=0.1, init_lora_weights="pissa")).lora_dropout == 0.1
    assert plain_config(lx.LoraConfig(use_dora=True, init_lora_weights="pissa")).use_dora


@pytest.mark.parametrize(
    ("adapter", "initial", "error", "message"),
    [
        (linear(normals(0), 3, 4, 2), linear(normals(0), 3, 4, 1), ShapeError, "initial.A: expected (2, 4)"),
        (linear(normals(0), 3, 4, 2), linear(normals(0), 5, 4, 2), ShapeError, "initial.B: expected (3, 2)"),
        (lx.Adapter(None, None, b=np.ones(3)), linear(normals(0), 3, 4, 2), ConfigError, "adapter: expected A"),
        (
            linear(normals(0), 3, 4, 2),
            lx.ConvAdapter(np.ones((2, 4, 1)), np.ones((3, 2, 1))),
            TypeError,
            "initial: expected Adapter, got ConvAdapter",
        ),
        (
            linear(normals(0), 3, 4, 2),
            linear(normals(0, dtype="float32"), 3, 4, 2),
            DtypeError,
            "A0: expected float64, set by A, got float32",
        ),
        (None, None, TypeError, "adapter: expected Adapter or ConvAdapter, got NoneType"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(adapter, initial, error, message):
    with pytest.raises(error) as caught:
        plain(adapter, initial)
    assert str(caught.value).startswith(message)


def test_a_number_of_experts_that_does_not_divide_is_named():
    v = linear(normals(0), 3, 4, 2)
    with pytest.raises(ConfigError, match=r"^experts: expected a divisor of 2, the rows of A, got 3$"):
        plain(v, v, experts=3)
