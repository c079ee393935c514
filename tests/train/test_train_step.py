"""One step: labels counted over all of it, gradients summed, updates as the optimisers have them.

specs/training.md, (training.1) to (training.4).
"""

import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from small_run import examples, settings, started

from lorax_np.config import Site
from lorax_np.errors import ConfigError
from lorax_np.models.records import Dropout, Trained
from lorax_np.models.tasks import count
from lorax_np.optim import adamw_start, adamw_step, clip, group_rates, lora_fa_gradients
from lorax_np.parallel import Alone
from lorax_np.text.batches import START
from lorax_np.train import Passes, train_step
from lorax_np.train.held import Held
from lorax_np.train.run import groups_of
from lorax_np.train.step import packed, parameters, start, update, widened, with_parameters
from lorax_np.tree import layout, unflatten


def stepped(dtype="float64", lr=1.0, rows=8, step=4, **more):
    """One step from the same parameters on the same sequences: what trained before, after, and the outcome."""
    base, adapters, sites, _ = started(dtype=dtype)
    given = {"optimizer": "sgd", "max_grad_norm": 0.0, "learning_rate": 1.0, "shuffle": False, **more}
    config = settings(**given)
    passes = Passes(base, sites, Trained(adapters, {}), task="CAUSAL_LM", config=config)
    trained = widened(Trained(adapters, {}))
    for value in parameters(trained).values():
        value.flags.writeable = False
    feed = config.feed(examples(rows), "CAUSAL_LM")
    rates = dict.fromkeys(parameters(trained), lr), dict.fromkeys(parameters(trained), 0.0)
    work = feed.step(START)
    return trained, *train_step(passes, trained, start(trained, config), work.batches, step=step, rates=rates)


def gradient(before, after):
    """What a step of rate 1 subtracted, as one array."""
    old, new = parameters(before), parameters(after)
    return np.concatenate([(old[name] - new[name]).reshape(-1) for name in old])


@pytest.mark.parametrize(("dtype", "most"), [("float64", 1e-13), ("float32", 1e-6)])
def test_micro_batches_do_not_change_the_step(dtype, most):
    """(training.3): eight sequences as 1 × 8, 2 × 4 and 8 × 1, whose means of means would be others."""
    runs = [stepped(dtype, batch_size=size, grad_accumulation_steps=8 // size) for size in (8, 4, 2, 1)]
    found = [gradient(before, after) for before, after, _, _ in runs]
    scale = np.abs(found[0]).max()
    for other in found[1:]:
        assert np.abs(other - found[0]).max() <= most * scale
    losses = [outcome.loss for *_, outcome in runs]
    np.testing.assert_allclose(losses, losses[0], rtol=most)
    assert {outcome.labels for *_, outcome in runs} == {sum(e.kept for e in examples(8))}
    assert {outcome.tokens for *_, outcome in runs} == {sum(e.tokens for e in examples(8))}
    parts = [stepped(dtype, rows=8, batch_size=8, grad_accumulation_steps=1)]
    means = np.mean([gradient(b, a) for b, a, *_ in (one_row(dtype, i) for i in range(8))], axis=0)
    assert np.abs(means - gradient(*parts[0][:2])).max() > 0.01 * scale  # the test could see it


def one_row(dtype, i):
    """The step of one sequence alone, which keeps its number and so its masks."""
    base, adapters, sites, _ = started(dtype=dtype)
    config = settings(optimizer="sgd", max_grad_norm=0.0)
    passes = Passes(base, sites, Trained(adapters, {}), task="CAUSAL_LM", config=config)
    trained = widened(Trained(adapters, {}))
    rates = dict.fromkeys(parameters(trained), 1.0), dict.fromkeys(parameters(trained), 0.0)
    work = config.feed([examples(8)[i]], "CAUSAL_LM").step(START)
    batch = replace(work.batches[0], index=(i,))
    return trained, *train_step(passes, trained, start(trained, config), [batch], step=4, rates=rates)


def test_mean_over_sequences():
    """(training.4): each sequence that has labels weighs the same, however many they are."""
    before, after, _, outcome = stepped(loss_mean="sequence", batch_size=4, grad_accumulation_steps=2)
    rows = [one_row("float64", i) for i in range(8)]
    want = np.mean([gradient(b, a) for b, a, *_ in rows], axis=0)
    np.testing.assert_allclose(gradient(before, after), want, rtol=0, atol=1e-13 * np.abs(want).max())
    assert outcome.loss == pytest.approx(np.mean([o.loss for *_, o in rows]), rel=1e-13)


def test_the_step_descends_the_loss_it_reports():
    """⟨g, v⟩ is the slope of the reported loss along v, masks and all: central differences in float64."""
    before, after, _, _ = stepped()
    g, rng, h = gradient(before, after), np.random.default_rng(5), 2.0**-17
    base, adapters, sites, _ = started(dtype="float64")
    config = settings(shuffle=False)
    passes = Passes(base, sites, Trained(adapters, {}), task="CAUSAL_LM", config=config)
    work = config.feed(examples(8), "CAUSAL_LM").step(START)
    n = sum(count("CAUSAL_LM", b.labels, b.starts) for b in work.batches)
    params = parameters(before)
    v = {name: rng.standard_normal(value.shape) for name, value in params.items()}

    def loss(t):
        moved = with_parameters(before, {name: value + t * v[name] for name, value in params.items()})
        parts = (passes.gradients(moved, b, n=n, dropout=Dropout(config.seed, 4)) for b in work.batches)
        return sum(float(part) for part, _ in parts)

    flat = np.concatenate([value.reshape(-1) for value in v.values()])
    near, far = (loss(h) - loss(-h)) / (2 * h), (loss(2 * h) - loss(-2 * h)) / (4 * h)
    assert abs(g @ flat - near) <= abs(far - near) + 1e-9 * np.abs(g) @ np.abs(flat)


def test_clip_and_adamw_are_the_optimisers():
    """A step is clip and adamw_step of the summed gradient, to the last bit."""
    before, after, _, first = stepped("float32")
    assert first.norm == pytest.approx(np.linalg.norm(gradient(before, after).astype("float64")), rel=1e-5)
    _, new, state, outcome = stepped("float32", lr=0.5, optimizer="adamw", max_grad_norm=0.01, beta2=0.99)
    config = settings(shuffle=False)
    base, adapters, sites, _ = started()
    passes = Passes(base, sites, Trained(adapters, {}), task="CAUSAL_LM", config=config)
    trained = widened(Trained(adapters, {}))
    work, total = config.feed(examples(8), "CAUSAL_LM").step(START), None
    n = sum(count("CAUSAL_LM", b.labels, b.starts) for b in work.batches)
    params = parameters(trained)
    for batch in work.batches:
        loss, found = passes.gradients(trained, batch, n=n, dropout=Dropout(3, 4))
        part = packed(parameters(found), loss, params)
        total = part if total is None else total + part
    grads, norm = clip(unflatten(total[:-1], layout(params)), 0.01)
    want, moments = adamw_step(params, grads, adamw_start(params), lr=0.5, betas=(0.9, 0.99))
    assert outcome.norm == norm == first.norm
    assert outcome.loss == float(total[-1])
    for name in params:
        assert np.array_equal(parameters(new)[name], want[name])
        assert np.array_equal(state[f"v.{name}"], moments[f"v.{name}"])


def test_lora_fa_holds_every_A():
    before, after, _, outcome = stepped("float32", optimizer="lora-fa", lr=0.01)
    assert outcome.applied
    for name, value in parameters(before).items():
        assert np.array_equal(value, parameters(after)[name]) == name.endswith(".A"), name


def test_of_lora_fa_the_norm_is_that_of_what_steps():
    """A has no gradient there, so it takes no part in how far the others are clipped."""
    before, after, _, plain = stepped("float64", lr=1.0)
    old, new = parameters(before), parameters(after)
    norm = np.sqrt(sum(((old[name] - new[name]) ** 2).sum() for name in old if not name.endswith(".A")))
    _, _, _, outcome = stepped("float64", optimizer="lora-fa")
    assert norm < 0.9 * plain.norm  # the test could see it
    assert outcome.norm == pytest.approx(norm, rel=1e-12)
    moments = stepped("float64", optimizer="lora-fa", max_grad_norm=0.01 * norm)[2]
    whole = stepped("float64", optimizer="lora-fa")[2]
    for name in new:
        if name.endswith(".B"):  # m is a share of the clipped gradient, corrected
            np.testing.assert_allclose(moments[f"m.{name}"], 0.01 * whole[f"m.{name}"], rtol=1e-5)


def test_lora_fa_takes_fused_experts_one_by_one():
    rng, sites = np.random.default_rng(0), {"e": Site("e", "e", "experts", r=2, alpha=1.0, scaling=0.5)}
    params = {"adapters.e.A": rng.standard_normal((6, 5)), "adapters.e.B": rng.standard_normal((4, 6))}
    grads = {name: rng.standard_normal(value.shape) for name, value in params.items()}
    rates, config = (dict.fromkeys(params, 0.1), dict.fromkeys(params, 0.0)), settings(optimizer="lora-fa")
    _, state = update(params, grads, adamw_start(params), rates, config, sites)
    want = lora_fa_gradients(params, grads, {"adapters.e": 0.5}, ranks={"adapters.e": 2})["adapters.e.B"]
    np.testing.assert_allclose(state["m.adapters.e.B"], (1 - config.beta1) * want, rtol=1e-12)


def test_groups_have_their_rates():
    """LoRA+: B learns so many times as fast as A; one-dimensional parameters do not decay."""
    _, adapters, sites, _ = started()
    trained = Trained(adapters, {"head.bias": np.zeros(3, "float32")})
    config = settings(loraplus_lr_ratio=16, weight_decay=0.1)
    rates = {g.label: (g.lr, g.weight_decay) for g in groups_of(trained, config, sites)}
    assert rates == {"A": (0.01, 0.1), "B": (0.16, 0.1), "one axis": (0.16, 0.0)}


def test_a_step_without_a_label_is_refused():
    base, adapters, sites, _ = started()
    rows = [example._replace(labels=np.full_like(example.labels, -100), kept=0) for example in examples(4)]
    config = settings()
    passes = Passes(base, sites, Trained(adapters, {}), task="CAUSAL_LM", config=config)
    trained = widened(Trained(adapters, {}))
    work = config.feed(rows, "CAUSAL_LM").step(START)
    with pytest.raises(ConfigError, match="step 5: expected a label that counts in its rows, got none"):
        train_step(passes, trained, start(trained, config), work.batches, step=4, rates=({}, {}))


def test_what_is_stored_narrow_trains_wide():
    half = {"head.weight": np.ones((2, 3), "float16"), "head.bias": np.ones(2, "float64")}
    assert {v.dtype.name for v in parameters(widened(Trained({}, half))).values()} == {"float32"}
    assert parameters(widened(Trained({}, {"b": np.ones(2)})))["saved.b"].dtype == "float64"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lora-fa"])
def test_steps_that_write_over_what_trains_are_train_steps_to_the_bit(optimizer):
    """Held: what it is given stays as it is; AdamW's arrays are the same ones after each step."""
    base, adapters, sites, _ = started()
    config = settings(optimizer=optimizer, weight_decay=0.1, max_grad_norm=0.5, learning_rate=0.01)
    trained = Trained(adapters, {})
    for value in parameters(trained).values():
        value.flags.writeable = False
    passes = Passes(base, sites, trained, task="CAUSAL_LM", config=config)
    state, held, position = start(trained, config), Held(trained, config, sites), START
    feed, rates = config.feed(examples(), "CAUSAL_LM"), group_rates(groups_of(trained, config, sites), 0.7)
    before = [id(value.base) for value in parameters(held.trained).values()]
    for step in range(3):
        work = feed.step(position)
        position = work.next
        trained, state, want = train_step(passes, trained, state, work.batches, step=step, rates=rates)
        assert held.step(passes, work.batches, step=step, rates=rates, ranks=Alone()) == want
        got = parameters(held.trained) | held.state
        for name, value in {**parameters(trained), **state}.items():
            assert np.asarray(got[name]).tobytes() == np.asarray(value).tobytes(), name
    assert ([id(v.base) for v in parameters(held.trained).values()] == before) == (optimizer == "adamw")


def test_a_step_of_adamw_holds_no_second_copy():
    """Beside p, m and v a step has one flat gradient and what rounds in parts, not p, m and v once more."""
    _, adapters, sites, _ = started()
    big = {"head": np.zeros((4000, 1000), "float32")}
    config, trained = settings(grad_accumulation_steps=1), Trained(adapters, big)
    held = Held(trained, config, sites)
    given = Trained({}, {"head": np.ones_like(big["head"])})
    passes = SimpleNamespace(config=config, task="CAUSAL_LM", gradients=lambda *_, **__: (1.0, given))
    rates = dict.fromkeys(parameters(trained), 0.1), dict.fromkeys(parameters(trained), 0.0)
    batches = config.feed(examples(), "CAUSAL_LM").step(START).batches
    tracemalloc.start()
    held.step(passes, batches, step=0, rates=rates, ranks=Alone())
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1.6 * big["head"].nbytes


def test_what_the_plan_refuses_for_its_dtype_the_general_pass_is_asked_for():
    """One float64 tensor in a float32 base: what then is wrong the general pass says, or computes."""
    base, adapters, sites, _ = started()
    name = "model.layers.1.mlp.up_proj.weight"
    mixed = replace(base, weights={**base.weights, name: base.weights[name].astype("float64")})
    passes = Passes(mixed, sites, Trained(adapters, {}), task="CAUSAL_LM", config=settings(engine="fast"))
    assert not passes.planned
    assert passes.what.startswith(f"general pass, engine fast, since {name}: expected float32")
