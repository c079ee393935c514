"""Losses, pooling and routers against torch's autograd and transformers' own.  See specs/loss.md, router.md."""

import itertools

import numpy as np
import pytest

from lorax_np.ops.loss import (
    bce_backward,
    bce_forward,
    cross_entropy_backward,
    cross_entropy_forward,
    head_cross_entropy,
    mse_backward,
    mse_forward,
)
from lorax_np.ops.pooling import (
    contrastive_backward,
    contrastive_forward,
    mean_pool_backward,
    mean_pool_forward,
    unit_backward,
    unit_forward,
)
from lorax_np.ops.router import (
    softmax_topk_backward,
    softmax_topk_forward,
    topk_sigmoid_backward,
    topk_sigmoid_forward,
    topk_softmax_backward,
    topk_softmax_forward,
)
from lorax_np.ops.span import count_spans, span_backward, span_forward
from lorax_np.ops.targets import count_kept

torch = pytest.importorskip("torch")
F = torch.nn.functional
pytestmark = pytest.mark.peft
EXACT = 1e-14  # float64, of numbers of order one


def draw(*shape, seed=0):
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape)


def leaf(value):
    return torch.from_numpy(np.array(value)).requires_grad_()


def close(got, want, bound=EXACT):
    want = want.detach().numpy() if isinstance(want, torch.Tensor) else want
    assert np.abs(np.asarray(got) - want).max() <= bound


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torch_s(smoothing):
    """Whole and chunked; torch's mean is over the kept labels, so n is their number."""
    h, E = leaf(draw(9, 5)), leaf(draw(13, 5))
    labels = np.array([3, -100, 0, 12, -100, 7, 7, 1, -100])
    z = h @ E.T
    z.retain_grad()
    want = F.cross_entropy(z, torch.from_numpy(labels), label_smoothing=smoothing)
    want.backward()
    n = count_kept(labels)
    loss, saved = cross_entropy_forward(z.detach().numpy(), labels, n=n, smoothing=smoothing)
    close(loss, want)
    close(cross_entropy_backward(saved), z.grad)
    arrays = h.detach().numpy(), E.detach().numpy()
    loss, gh, gE = head_cross_entropy(*arrays, labels, n=n, rows=2, smoothing=smoothing, need_gE=True)
    close(loss, want)
    close(gh, h.grad)
    close(gE, E.grad)


def test_smoothing_is_that_of_transformers_trainer():
    transformers = pytest.importorskip("transformers")
    z, labels = draw(1, 6, 11), np.array([[3, -100, 0, 10, -100, 7]])
    smoother = transformers.trainer_pt_utils.LabelSmoother(epsilon=0.1)
    want = smoother({"logits": torch.from_numpy(z)}, torch.from_numpy(labels))
    loss, _ = cross_entropy_forward(z[0], labels[0], n=4, smoothing=0.1)
    close(loss, want, 1e-6)  # it adds up in float32


def test_a_row_without_a_label_that_holds_nan_has_no_gradient_here():
    """torch leaves it out of the loss, and gives its logits the gradient NaN."""
    z, labels = draw(3, 4), np.array([1, -100, 2])
    z[1] = np.nan
    theirs = leaf(z)
    F.cross_entropy(theirs, torch.from_numpy(labels)).backward()
    loss, saved = cross_entropy_forward(z, labels, n=2)
    assert np.isfinite(loss)
    gz = cross_entropy_backward(saved)
    assert not gz[1].any()
    assert torch.isnan(theirs.grad[1]).all()
    close(gz[[0, 2]], theirs.grad[[0, 2]])


def test_spans_are_those_of_transformers():
    """On sequences of one length, all kept, then some past the end: one n where theirs are two means."""
    losses = pytest.importorskip("transformers.loss.loss_utils")
    z = draw(4 * 6, 2)
    for spans, same in (([[1, 3], [0, 5], [2, 2], [5, 5]], True), ([[1, 9], [0, 5], [2, 2], [5, 6]], False)):
        theirs = leaf(z)
        starts, ends = theirs.reshape(4, 6, 2).unbind(-1)
        first, last = torch.tensor(spans).unbind(-1)
        want = losses.ForQuestionAnsweringLoss(starts, ends, first, last)
        want.backward()
        bounds = (0, 6, 12, 18, 24)
        loss, saved = span_forward(z, bounds, np.array(spans), n=count_spans(np.array(spans), bounds))
        apart = abs(float(loss) - want.item())
        assert apart <= EXACT if same else apart > 1e-3
        if same:
            close(span_backward(saved), theirs.grad)


def test_squares_and_sigmoids_are_torch_s():
    z, y = draw(3, 4), draw(3, 4, seed=1)
    for forward, backward, name, target in (
        (mse_forward, mse_backward, "mse_loss", y),
        (bce_forward, bce_backward, "binary_cross_entropy_with_logits", (y > 0).astype(float)),
    ):
        theirs = leaf(5 * z)
        want = getattr(F, name)(theirs, torch.from_numpy(target))
        want.backward()
        loss, saved = forward(5 * z, target, n=12)
        close(loss, want)
        close(backward(saved), theirs.grad)


def test_pooled_and_contrasted_pairs_are_torch_s():
    """Two texts and their pairs, of unequal lengths: mean, length 1, cross entropy over 20·cosine."""
    h, starts = draw(11, 5), (0, 2, 5, 10, 11)
    theirs = leaf(h)
    means = torch.stack([theirs[a:b].mean(0) for a, b in itertools.pairwise(starts)])
    unit = F.normalize(means, dim=1)
    want = F.cross_entropy(20 * unit[:2] @ unit[2:].T, torch.arange(2))
    want.backward()
    y, saved_unit = unit_forward(mean_pool_forward(h, starts))
    loss, saved = contrastive_forward(y[:2], y[2:], n=2)
    gy = np.concatenate(contrastive_backward(saved))
    close(loss, want, 20 * EXACT)
    close(mean_pool_backward(unit_backward(gy, saved_unit), starts), theirs.grad, 20 * EXACT)


# ---- routers -----------------------------------------------------------------------------------------------


def theirs_of(router, z, k, **settings):
    """transformers' router with a unit matrix for its weight, so that its logits are z."""
    from types import SimpleNamespace

    E = z.shape[1]
    config = SimpleNamespace(
        num_experts_per_tok=k, num_local_experts=E, num_experts=E, hidden_size=E, **settings
    )
    made = router(config).double()
    made.weight.data = torch.eye(E, dtype=torch.float64)
    at = leaf(z)
    return made, at


@pytest.mark.parametrize("norm", [True, False])
def test_softmax_routers_are_transformers(norm):
    """Mixtral's, and Qwen's with and without the division by the sum. They compute in float32."""
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    qwen = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    z, gw = draw(7, 6), draw(7, 3)
    routers = [(qwen.Qwen3MoeTopKRouter, {"norm_topk_prob": norm})]
    routers += [(mixtral.MixtralTopKRouter, {})] if norm else []
    forward, backward = (
        (topk_softmax_forward, topk_softmax_backward) if norm else (softmax_topk_forward, softmax_topk_backward)
    )
    ids, w, saved = forward(z, 3)
    for router, settings in routers:
        made, at = theirs_of(router, z, 3, **settings)
        _, weights, chosen = made(at)
        assert np.array_equal(chosen.numpy(), ids)
        close(w, weights, 2e-7)
        (weights.double() * torch.from_numpy(gw)).sum().backward()
        close(backward(gw, saved), at.grad, 2e-6)


def test_deepseek_s_router_is_transformers():
    """With a bias for choosing, groups, and a scale."""
    module = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    z, gw, bias = draw(9, 8), draw(9, 3), 0.2 * draw(8)
    settings = {"routed_scaling_factor": 2.5, "n_group": 4, "topk_group": 2, "norm_topk_prob": True}
    made, at = theirs_of(module.DeepseekV3TopkRouter, z, 3, **settings)
    made.e_score_correction_bias = torch.from_numpy(bias)
    _, weights, chosen = made(at)
    ids, w, saved = topk_sigmoid_forward(z, 3, bias=bias, scale=2.5, groups=4, keep_groups=2)
    order = np.argsort(chosen.numpy(), axis=1)
    mine = np.argsort(ids, axis=1)
    assert np.array_equal(np.take_along_axis(chosen.numpy(), order, 1), np.take_along_axis(ids, mine, 1))
    by_id = torch.gather(weights, 1, torch.from_numpy(order))
    close(np.take_along_axis(w, mine, 1), by_id, 1e-6)
    (by_id.double() * torch.from_numpy(np.take_along_axis(gw, mine, 1))).sum().backward()
    close(topk_sigmoid_backward(gw, saved), at.grad, 1e-5)
