"""gradcheck refuses what is wrong, says where a method does not apply, and passes nothing it could not see."""

import numpy as np
import pytest
from often import once_each

import lorax_np as lx
from lorax_np.verify.gradcheck import GradcheckError, gradcheck, quotients

METHODS = "secant", "complex", "central"
BUGS = "gx ignores mask", "gA from undropped x", "gx without adapter", "gA = 0"
#       d_in, N, size of B: the rows of the table in specs/gradcheck.md
POINTS = ((8, 4, 1e-2), (24, 8, 1e-3), (8, 4, 1e-5))
RATE, S = 0.3, 0.7


def layer(d_in, N, size, bug=None, dtype="float64", seed=0):
    """A LoRA layer with a dropout mask, its backward by x, W, A, B with or without a bug, and its point."""
    draw = np.random.default_rng(seed)
    x, W, A = (draw.standard_normal(shape).astype(dtype) for shape in ((N, d_in), (d_in + 3, d_in), (2, d_in)))
    B = (size * draw.standard_normal((d_in + 3, 2))).astype(dtype)
    mask = np.where(draw.random((N, d_in)) < RATE, 0, 1 / (1 - RATE)).astype(dtype)
    return *rules(mask, bug), (x, W, A, B)


def rules(mask, bug):
    """Forward and backward; only operators, so that torch's tensors pass through too."""

    def f(x, W, A, B):
        return x @ W.T + S * ((x * mask) @ A.T @ B.T)

    def f_backward(gy, x, W, A, B):
        gz, xd = S * (gy @ B), x * mask
        lora = gz @ A if bug == "gx ignores mask" else (gz @ A) * mask
        gx = gy @ W if bug == "gx without adapter" else gy @ W + lora
        gA = gz.T @ (x if bug == "gA from undropped x" else xd)
        return gx, gy.T @ x, 0 * gA if bug == "gA = 0" else gA, S * (gy.T @ (xd @ A.T))

    return f, f_backward


def verdicts(result):
    return {tensor.name: tensor.verdict for tensor in result.tensors}


def check(f, f_backward, inputs, method="secant", **more):
    return gradcheck(f, f_backward, inputs, method, raise_exception=False, **more)


# ---- the table: small gradients, fast mode, B = 0 ----------------------------------------------------------


@pytest.mark.parametrize("fast", [False, True], ids=["slow", "fast"])
@pytest.mark.parametrize(("bug", "method"), once_each(BUGS, METHODS))
@pytest.mark.parametrize("point", POINTS, ids=str)
def test_bugs_behind_small_gradients_are_refused(point, bug, method, fast):
    """rtol = 0 leaves to central what its own differences blur; f is affine, so that its step may be longer."""
    wrong = bug.split()[0][1:]
    result = check(*layer(*point, bug), method, fast_mode=fast, eps=1e-3, rtol=0, names="x W A B")
    assert not result.passed
    assert verdicts(result) == {name: "fail" if name == wrong else "pass" for name in "xWAB"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bug", BUGS)
def test_fast_mode_hides_nothing_in_wider_layers(bug, method):
    result = check(*layer(48, 16, 1e-3, bug), method, fast_mode=True, eps=1e-3, rtol=0, names="x W A B")
    assert [name for name, verdict in verdicts(result).items() if verdict == "fail"] == [bug.split()[0][1:]]


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("point", POINTS, ids=str)
def test_torchs_own_settings_hide_none_of_them_here_entry_by_entry(point, bug):
    assert not check(*layer(*point, bug), "central").passed


@pytest.mark.parametrize("fast", [False, True], ids=["slow", "fast"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bug", [None, *BUGS])
def test_at_b_zero_nothing_passes(bug, method, fast):
    result = check(*layer(8, 4, 0, bug), method, fast_mode=fast, names="x W A B")
    assert not result.passed
    assert verdicts(result)["A"] == "vacuous"
    assert "NOT JUDGED" in str(result)
    assert "zero everywhere" in str(result)


@pytest.mark.parametrize("fast", [False, True], ids=["slow", "fast"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("point", POINTS, ids=str)
def test_the_right_layer_passes_and_says_what_would_have_shown(point, method, fast):
    result = check(*layer(*point), method, fast_mode=fast, eps=1e-3)
    assert result, str(result)
    worst = max(tensor.resolution for tensor in result.tensors)
    assert worst < (1e-4 if method == "central" else 1e-7)


def test_what_a_small_step_cannot_tell_is_vacuous():
    """B is 1e-5 and eps 1e-6: half the digits of gA are lost, and the table says so."""
    result = check(*layer(8, 4, 1e-5), "central", names="x W A B")
    assert verdicts(result) == {"x": "pass", "W": "pass", "A": "vacuous", "B": "pass"}
    assert "or raise eps" in str(result)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("method", METHODS)
def test_no_right_layer_fails(method, dtype):
    if (method, dtype) == ("central", "float32"):
        pytest.skip("central is refused in float32")
    for seed in range(15):
        d_in, N = 1 + seed, 1 + seed % 4
        result = check(
            *layer(d_in, N, 10.0 ** (seed % 5 - 2), dtype=dtype, seed=seed), method, fast_mode=seed % 2 == 0
        )
        assert "fail" not in verdicts(result).values(), str(result)


def test_atol_hides_no_small_gradient():
    """torch's atol is above every entry here."""

    def f(x):
        return 1e-7 * x**3

    x = np.random.default_rng(0).standard_normal(6)
    assert check(f, lambda gy, x: 3e-7 * gy * x**2, x, "central", eps=1e-4)
    wrong = check(f, lambda gy, x: 3.1e-7 * gy * x**2, x, "central", eps=1e-4)
    assert wrong.tensors[0].verdict == "fail"
    assert wrong.tensors[0].factor == pytest.approx(3.1 / 3, rel=1e-4)


def test_what_rtol_allows_is_said():
    f, x = np.sin, np.random.default_rng(0).standard_normal(6)
    result = check(f, lambda gy, x: 1.0005 * gy * np.cos(x), x, "central")
    assert result.passed
    assert "which rtol allows and rounding does not" in str(result)
    assert not check(f, lambda gy, x: 1.0005 * gy * np.cos(x), x, "central", rtol=0)
    assert not check(f, lambda gy, x: 1.0005 * gy * np.cos(x), x, "complex")


# ---- what is said of a wrong one ---------------------------------------------------------------------------


def linear(changed=lambda gx: gx):
    draw = np.random.default_rng(1).standard_normal
    return lambda x, W: x @ W.T, lambda gy, x, W: (changed(gy @ W), gy.T @ x), (draw((4, 3)), draw((5, 3)))


@pytest.mark.parametrize("factor", [0.75, -1, 2, 0])
@pytest.mark.parametrize("method", METHODS)
def test_a_constant_factor_is_named(method, factor):
    with pytest.raises(GradcheckError, match=f"claimed = {factor} × truth in every entry"):
        gradcheck(*linear(lambda gx: factor * gx), method)


@pytest.mark.parametrize("fast", [False, True], ids=["slow", "fast"])
@pytest.mark.parametrize("method", METHODS)
def test_one_wrong_entry_is_found(method, fast):
    def spoil(gx):
        gx = gx.copy()
        gx[2, 1] *= 1.5
        return gx

    result = check(*linear(spoil), method, fast_mode=fast, names=["x", "W"])
    x, W = result.tensors
    assert (x.verdict, x.at, W.verdict) == ("fail", (2, 1), "pass")
    assert x.ratio == pytest.approx(1.5, rel=1e-6)
    assert x.factor is None
    assert "x            (4, 3)         FAIL            at [2, 1]: claimed" in str(result)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (lambda gx: gx.T, r"expected shape \(4, 3\), got \(3, 4\)"),
        (lambda gx: gx.astype(np.float32), "expected dtype float64, got float32"),
        (lambda gx: gx * np.where(gx == gx[1, 2], np.nan, 1), r"not finite at \[1, 2\]: nan"),
    ],
)
def test_shape_dtype_and_nan_are_told_apart(changed, says):
    with pytest.raises(GradcheckError, match=says):
        gradcheck(*linear(changed))


def test_a_gradient_that_is_not_given_is_not_passed():
    result = check(*linear(lambda gx: None), names="x W")
    assert verdicts(result) == {"x": "not given", "W": "pass"}
    assert result.passed
    f, _, inputs = linear()
    assert not check(f, lambda gy, x, W: (None, None), inputs).passed


def test_conduct():
    f, f_backward, inputs = linear()
    calls = []

    def writes(x, W):
        y = f(x, W)
        x[0, 0] = 7
        return y

    def writes_gy(gy, x, W):
        found = f_backward(gy, x, W)
        gy *= 2
        return found

    def wanders(gy, x, W):
        calls.append(1)
        gx, gW = f_backward(gy, x, W)
        return gx, gW * (1 + 1e-9 * len(calls))

    for one, other, says in (
        (writes, f_backward, r"inputs\[0\] is written to by f$"),
        (f, writes_gy, "gy is written to by f_backward"),
        (f, wanders, r"gradient by inputs\[1\] is not repeatable: two calls differ"),
    ):
        with pytest.raises(GradcheckError, match=rf"(?m){says}"):
            gradcheck(one, other, inputs)
    assert not check(f, wanders, inputs, "central").passed
    assert check(f, wanders, inputs, "central", nondet_tol=1e-6).passed
    assert all((a == b).all() for a, b in zip(inputs, linear()[2], strict=True))


def test_saved_activations_may_be_read_twice():
    def f(x):
        return x * x, [x.copy()]

    def right(gy, saved, x):
        return 2 * saved[0] * gy

    def eats(gy, saved, x):
        found = right(gy, saved, x)
        saved[0] *= 0
        return found

    x = np.random.default_rng(0).standard_normal(5)
    assert check(f, right, x, "complex", has_saved=True)
    with pytest.raises(GradcheckError, match="changes when backward is asked twice: saved is written to"):
        gradcheck(f, eats, x, "complex", has_saved=True)


# ---- where a method does not apply, the gradient is not blamed ----------------------------------------------


@pytest.mark.parametrize("bend", [np.exp, np.tanh, np.abs, lambda x: np.maximum(x, 0), lambda x: x**3])
def test_secant_says_not_affine(bend):
    """The point is 0, where odd functions have no second difference of one step."""
    for x in (np.zeros(6), np.random.default_rng(0).standard_normal(6)):
        result = check(bend, lambda gy, x: gy, x)
        assert result.tensors[0].verdict == "not affine", str(result)
        assert not result.passed


@pytest.mark.parametrize(
    "f",
    [
        np.abs,
        lambda x: x * np.conj(x),
        lambda x: x / np.linalg.norm(x),
        lambda x: x * np.abs(x) ** 2,
        lambda x: x.astype(float) ** 2,
        lambda x: x.real**2,
        lambda x: np.hypot(x, 1.0),
    ],
)
def test_complex_says_not_holomorphic(f):
    result = check(f, lambda gy, x: gy, np.random.default_rng(0).standard_normal(6), "complex")
    assert result.tensors[0].verdict == "not holomorphic", str(result)


@pytest.mark.parametrize("method", ["central", "complex"])
def test_a_kink_is_not_judged(method):
    """At 0 the slopes of max(x, 0) are 0 and 1, whatever the step."""

    def f(x):
        return np.where(x.real > 0, x, 0)

    x = np.array([1.5, 0.0, -2.0])
    result = check(f, lambda gy, x: gy * (x > 0), x, method)
    assert result.tensors[0].verdict == "kink", str(result)
    assert check(f, lambda gy, x: gy * (x > 0), np.array([1.5, 0.1, -2.0]), method)
    if method == "central":
        assert "f has a kink here at [1]: slopes" in str(result)


def test_a_step_out_of_the_domain_is_said():
    result = check(lambda x: np.sqrt(x), lambda gy, x: gy / (2 * np.sqrt(x)), np.array([0.5, 1.0]))
    assert result.tensors[0].verdict == "not finite"


@pytest.mark.parametrize("method", ["central", "complex"])
def test_smooth_functions_pass(method):
    draw = np.random.default_rng(3).standard_normal((4, 5))

    def softmax(x):
        e = np.exp(x - x.real.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    def backward(gy, x):
        y = softmax(x)
        return y * (gy - (gy * y).sum(axis=1, keepdims=True))

    assert check(softmax, backward, draw, method), str(check(softmax, backward, draw, method))
    assert not check(softmax, lambda gy, x: softmax(x) * gy, draw, method)


def test_a_complex_product_of_three_real_ones_is_noticed(monkeypatch):
    assert quotients.complex_products_hold()
    monkeypatch.setattr(quotients, "complex_products_hold", lambda: False)
    result = check(*linear(), "complex")
    assert {tensor.verdict for tensor in result.tensors} == {"not holomorphic"}


# ---- the engine's own pair ---------------------------------------------------------------------------------


def engine(norm_gradient, still=False):
    """lora_linear_forward and _backward as a pair over W, A, B, m, x; still: with k = m/n held at the point."""
    draw = np.random.default_rng(5).standard_normal
    W, A, B, m, x = (draw(shape) for shape in ((5, 7), (3, 7), (5, 3), (5,), (4, 7)))
    n = np.asarray(lx.row_norms(lx.Linear(W), lx.Adapter(A, B), scaling=S))

    def f(W, A, B, m, x):
        base = lx.Linear(W)
        if still:
            m = m * np.asarray(lx.row_norms(base, lx.Adapter(A, B), scaling=S)) / n
        return lx.lora_linear_forward(x, base, lx.Adapter(A, B, m), scaling=S)

    def f_backward(gy, saved, W, A, B, m, x):
        adapter = lx.Adapter(A, B, m)
        gx, g = lx.lora_linear_backward(
            gy, saved, lx.Linear(W), adapter, scaling=S, norm_gradient=norm_gradient
        )
        return None, g.A, g.B, g.m, gx

    return f, f_backward, (W, A, B, m, x)


def test_the_engines_pair_passes():
    for method in ("complex", "central"):
        result = check(*engine(True), method, has_saved=True, names="W A B m x")
        assert result, str(result)
    assert verdicts(check(*engine(True), "secant", has_saved=True))["inputs[1]"] == "not affine"


def test_a_constant_norm_passes_once_f_holds_it_too():
    detached = check(*engine(False), "complex", has_saved=True, names="W A B m x")
    assert verdicts(detached) == {"W": "not given", "A": "fail", "B": "fail", "m": "pass", "x": "pass"}
    assert check(*engine(False, still=True), "complex", has_saved=True)
    assert check(*engine(False, still=True), "secant", has_saved=True)


# ---- forms of f, and arguments that make no sense ------------------------------------------------------------


def test_several_outputs_and_inputs_that_are_no_floats():
    table = np.random.default_rng(0).standard_normal((6, 3))
    rows = np.array([0, 5, 5])

    def f(table, rows, factor):
        return table[rows], factor * table.sum(axis=0)

    def f_backward(gy, table, rows, factor):
        found = np.zeros_like(table)
        np.add.at(found, rows, gy[0])
        return found + factor * gy[1], None, None

    def bare(*arguments):
        return f_backward(*arguments)[0]

    def once(gy, table, rows, factor):
        found = np.zeros_like(table)
        found[rows] += gy[0]  # a row that occurs twice is counted once
        return found + factor * gy[1]

    for method in METHODS:
        for right in (f_backward, bare):
            assert check(f, right, (table, rows, 2.5), method)
        found = check(f, once, (table, rows, 2.5), method).tensors[0]
        assert (found.verdict, found.at[0]) == ("fail", 5)


def test_the_result_is_reproducible_and_names_its_seed():
    texts = [str(check(*linear(lambda gx: 0.9 * gx), seed=seed)) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    assert "method secant, seed 3" in texts[0]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"method": "forward"}, ValueError, "method: expected one of secant, complex, central, got 'forward'"),
        ({"eps": 0}, ValueError, "eps: expected"),
        ({"rtol": np.nan}, ValueError, "rtol: expected"),
        ({"names": "x"}, ValueError, "names: expected 2, one for each input, got 1"),
        ({"inputs": (1, 2)}, TypeError, "inputs: expected at least one array"),
        ({"inputs": (np.ones((2, 3), np.float16), np.ones((2, 3)))}, TypeError, r"inputs\[0\]: .* got float16"),
        ({"inputs": (np.full((2, 3), np.inf), np.ones(3))}, ValueError, r"inputs\[0\]: expected finite"),
        ({"f": lambda x, W: np.arange(3)}, TypeError, "f: expected float32 or float64 outputs, got int64"),
        ({"has_saved": True}, TypeError, r"f: expected \(y, saved\) with has_saved"),
        ({"f_backward": lambda gy, x, W: (gy,)}, ValueError, "f_backward: expected 2 gradients"),
        (
            {"method": "central", "inputs": (np.ones((2, 3), np.float32), np.ones((2, 3), np.float32))},
            TypeError,
            "expected float64 for method='central'",
        ),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, error, says):
    f, f_backward, inputs = linear()
    with pytest.raises(error, match=says):
        gradcheck(**({"f": f, "f_backward": f_backward, "inputs": inputs} | arguments))


# ---- torch at the same points: the table of specs/gradcheck.md ----------------------------------------------

HIDDEN = {  # whether torch.autograd.gradcheck passes each bug, in its fast mode and without
    (8, 4, 1e-2): [(True, False), (False, False), (True, False), (False, False)],
    (24, 8, 1e-3): [(True, False), (True, False), (True, False), (True, False)],
    (8, 4, 1e-5): [(True, True), (True, False), (True, True), (True, False)],
    (8, 4, 0): [(True, True), (True, True), (True, True), (True, True)],
}


@pytest.mark.peft
@pytest.mark.parametrize("point", HIDDEN, ids=str)
def test_torchs_gradcheck_passes_them(point):
    import torch

    def passes(bug, fast):
        f, f_backward, inputs = layer(*point, bug)
        mask = f.__closure__[0].cell_contents
        f, f_backward = rules(torch.from_numpy(mask), bug)

        class Layer(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *tensors):
                ctx.save_for_backward(*tensors)
                return f(*tensors)

            @staticmethod
            def backward(ctx, gy):
                return f_backward(gy, *ctx.saved_tensors)

        torch.manual_seed(0)
        x, W, A, B = (torch.from_numpy(value).requires_grad_() for value in inputs)
        W.requires_grad_(False)  # frozen, as in training
        return torch.autograd.gradcheck(Layer.apply, (x, W, A, B), fast_mode=fast, raise_exception=False)

    assert [(passes(bug, True), passes(bug, False)) for bug in BUGS] == HIDDEN[point]
