"""Whole sets of sites as one: what each site becomes, and the config that reads it back."""

import numpy as np
import pytest
from checkers import assert_close
from strategies import normals

import lorax_np as lx
from lorax_np.combine import METHODS, CombinedSet, combine, combine_sets
from lorax_np.config import site_at
from lorax_np.errors import ConfigError, ShapeError

EPS = 2.0**-52
W = {"a": 0.7, "b": -1.3}


def linear(draw, r, d_out=4, d_in=5, **more):
    return lx.Adapter(draw(r, d_in), draw(d_out, r), **more)


def one_set(adapters, config, *, kinds=None, saved=None):
    kinds = kinds or {}
    sites = {name: site_at(config, name, kind=kinds.get(name, "linear")) for name in adapters}
    return CombinedSet(adapters, config, sites, saved or {})


def two_sets(**more):
    """Different ranks, α and patterns; a site in the first alone, and one in the second."""
    draw = normals(0)
    config = lx.LoraConfig(
        r=2, lora_alpha=3, target_modules=["q", "k", "only_a"], rank_pattern={"k": 3}, alpha_pattern={"k": 7}
    )
    a = one_set({"m.q": linear(draw, 2), "m.k": linear(draw, 3), "m.only_a": linear(draw, 2)}, config, **more)
    config = lx.LoraConfig(r=4, lora_alpha=5, use_rslora=True, target_modules=["q", "k", "only_b"])
    b = one_set({"m.q": linear(draw, 4), "m.k": linear(draw, 4), "m.only_b": linear(draw, 4)}, config)
    return {"a": a, "b": b}


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_every_site_is_combined_with_its_own_scalings(method):
    sets = two_sets()
    found = combine_sets(sets, W, method=method)
    assert list(found.adapters) == ["m.q", "m.k", "m.only_a", "m.only_b"]
    for name, adapter in found.adapters.items():
        here = {n: one for n, one in sets.items() if name in one.adapters}
        want, _ = combine(
            {n: one.adapters[name] for n, one in here.items()},
            {n: W[n] for n in here},
            {n: one.sites[name].scaling for n, one in here.items()},
            method=method,
        )
        assert (adapter.A == want.A).all()
        assert (adapter.B == want.B).all()
    assert sets["a"].sites["m.k"].scaling == 7 / 3
    assert sets["b"].sites["m.q"].scaling == 5 / 2


@pytest.mark.parametrize("method", METHODS)
def test_the_config_reads_every_site_back(method):
    """The rank that the adapter has, scaling 1, by site_at of the config alone; through its JSON too."""
    sets = two_sets()
    if METHODS[method].of == "factors":  # equal ranks where A and B are summed
        sets["b"] = one_set(
            {n: linear(normals(2), len(v.A)) for n, v in sets["a"].adapters.items()}, sets["a"].config
        )
    told = {} if METHODS[method].keeps == "all" else {"density": 0.5}
    if METHODS[method].keeps == "some":
        told["rng"] = np.random.default_rng(0)
    found = combine_sets(sets, W, method=method, **told)
    config = lx.LoraConfig.from_dict(found.config.to_dict())
    assert config == found.config
    assert config.use_rslora is False
    assert config.init_lora_weights is True
    for name, adapter in found.adapters.items():
        site = site_at(config, name)
        assert site == found.sites[name]
        assert site.r == len(adapter.A)
        assert site.scaling == 1.0
        assert site_at(config, f"deeper.{name}").r == config.r  # a pattern names this site and no other


def test_rank_stabilisation_is_not_inherited():
    """Whichever set comes first: a scaling of 1 is α = r without it."""
    sets = two_sets()
    assert sets["b"].config.use_rslora
    found = combine_sets({name: sets[name] for name in "ba"}, W, method="cat")
    assert found.config.use_rslora is False
    assert {site_at(found.config, name).scaling for name in found.adapters} == {1.0}


def test_targets_stay_where_all_sets_agree_and_else_name_the_sites():
    sets = two_sets()
    assert combine_sets(sets, W, method="cat").config.target_modules == ("m.k", "m.only_a", "m.only_b", "m.q")
    again = {"a": sets["a"], "b": sets["a"]}
    assert combine_sets(again, W, method="cat").config.target_modules == ("k", "only_a", "q")


def test_a_site_of_one_set_keeps_its_weight():
    sets = two_sets()
    found = combine_sets(sets, W, method="cat").adapters["m.only_b"]
    one = sets["b"].adapters["m.only_b"]
    assert_close("delta", found.B @ found.A, W["b"] * 2.5 * one.B @ one.A, 64 * EPS * 1e2)


@pytest.mark.parametrize("method", ["cat", "svd", "linear", "ties_svd"])
def test_each_expert_is_combined_alone(method):
    """A expert-slowest, B expert-fastest, before and after."""
    draw, E, r, d_in, d_out = normals(1), 3, 2, 5, 4
    config = lx.LoraConfig(r=r, lora_alpha=3, target_modules=[], target_parameters=["w"])
    sets = {
        name: one_set({"m": lx.Adapter(draw(E * r, d_in), draw(d_out, r * E))}, config, kinds={"m": "experts"})
        for name in "ab"
    }
    told = {"density": 0.7} if method == "ties_svd" else {}
    found = combine_sets(sets, W, method=method, **told)
    rank = found.sites["m"].r
    assert rank == (2 * r if method == "cat" else r)
    whole = found.adapters["m"]
    A, B = whole.A.reshape(E, rank, d_in), whole.B.reshape(d_out, rank, E)
    for e in range(E):
        each = {
            n: lx.Adapter(
                one.adapters["m"].A.reshape(E, r, d_in)[e], one.adapters["m"].B.reshape(d_out, r, E)[:, :, e]
            )
            for n, one in sets.items()
        }
        want, _ = combine(
            each, W, {n: one.sites["m"].scaling for n, one in sets.items()}, method=method, **told
        )
        assert (A[e] == want.A).all()
        assert (B[:, :, e] == want.B).all()
    assert found.config.target_parameters == ("w",)


def test_biases_and_saved_parameters():
    draw = normals(0)
    plain = lx.LoraConfig(r=2, target_modules=["q"])
    biased = lx.LoraConfig(
        r=2, target_modules=["q"], bias="lora_only", lora_bias=True, modules_to_save=["head"]
    )
    b, head = draw(4), draw(3)
    sets = {
        "a": one_set({"q": linear(draw, 2)}, plain),
        "b": one_set({"q": linear(draw, 2, b=b, bB=draw(4))}, biased, saved={"head.weight": head}),
    }
    found = combine_sets(sets, W, method="cat")
    assert found.adapters["q"].b is b
    assert found.adapters["q"].bB is not None
    assert (found.config.bias, found.config.lora_bias) == ("lora_only", True)
    assert found.config.modules_to_save == ("head",)
    assert found.saved["head.weight"] is head


def test_a_site_with_a_bias_alone_stays_one():
    config = lx.LoraConfig(r=2, target_modules=["q"], bias="all")
    one = one_set({"q": linear(normals(0), 2), "norm": lx.Adapter(None, None, b=np.ones(4))}, config)
    found = combine_sets({"a": one}, {"a": 1.0}, method="linear")
    assert found.adapters["norm"].A is None
    assert found.config.rank_pattern == {}


def _changed(**more):
    config = lx.LoraConfig(r=2, lora_alpha=3, target_modules=["q"], **more)
    m = np.ones(4) if config.use_dora else None
    return one_set({"q": linear(normals(0), 2, m=m)}, config)


@pytest.mark.parametrize(
    ("sets", "error", "message"),
    [
        ({}, ConfigError, "adapters: expected at least one, got none"),
        (
            {"a": _changed(), "b": _changed(init_lora_weights="pissa")},
            ConfigError,
            "b: expected adapters of the original weight, got those of the start 'pissa'",
        ),
        ({"a": _changed(use_dora=True)}, ConfigError, "q: a: expected no m, since a sum of updates"),
        (
            {n: _changed()._replace(saved={"head.weight": np.ones(1)}) for n in "ab"},
            ConfigError,
            "b: expected parameters saved whole by one set alone, since they are no updates, got head.weight",
        ),
        (
            {
                "a": _changed(),
                "b": one_set({"q": linear(normals(0), 2)}, lx.LoraConfig(r=2), kinds={"q": "embedding"}),
            },
            ConfigError,
            "q: expected one kind of site in all sets, got {'a': ('linear', False), 'b': ('embedding', False)}",
        ),
        (
            {"a": _changed(), "b": one_set({"q": linear(normals(0), 2, d_in=9)}, lx.LoraConfig(r=2))},
            ShapeError,
            "q: b: expected A of (r, *axes) with axes (5,), set by a, got (9,)",
        ),
    ],
)
def test_sets_that_do_not_fit_are_named(sets, error, message):
    with pytest.raises(error) as caught:
        combine_sets(sets, dict.fromkeys(sets, 1.0), method="cat")
    assert str(caught.value).startswith(message)


def test_experts_that_do_not_fit_are_named():
    def experts(E, r, rank=2):
        config = lx.LoraConfig(r=rank, target_modules=[], target_parameters=["w"])
        return one_set(
            {"m": lx.Adapter(np.ones((E * r, 5)), np.ones((4, r * E)))}, config, kinds={"m": "experts"}
        )

    with pytest.raises(
        ConfigError, match=r"^m: A: expected one number of experts in all sets, got {'a': 2, 'b': 3}"
    ):
        combine_sets({"a": experts(2, 2), "b": experts(3, 2)}, W, method="cat")
    with pytest.raises(ConfigError, match=r"^m: A: expected experts of rank r=2 each, got \(3, 5\)"):
        combine_sets({"a": experts(3, 1)}, {"a": 1.0}, method="cat")


def test_options_are_checked_before_anything_is_combined():
    with pytest.raises(
        ConfigError, match=r"^density: expected a share in \(0, 1\] with method='ties', got None$"
    ):
        combine_sets(two_sets(), W, method="ties")
    with pytest.raises(ConfigError, match=r"^weights: expected one for each of a, b, got a$"):
        combine_sets(two_sets(), {"a": 1.0}, method="cat")
