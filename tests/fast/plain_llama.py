"""A Llama's loss written out plainly, in float64 or complex128: so that a step of 1e-30 i differentiates it."""

from types import SimpleNamespace

import numpy as np
from checkers import EPS, TINY

from lorax_np import Adapter, dropout_mask
from lorax_np.config import Site
from lorax_np.fast.llama import llama_plan
from lorax_np.random import site_key

LENGTHS = 7, 3, 131, 1, 12  # a block of queries and some more, and a single token
ROUNDING = 4096  # eps64 of a tensor's largest entry: 1e-12, some hundred roundings through three layers
DROPOUT = 5, 3  # seed, step
PARTS = "A", "B", "b", "bB"
CONFIG = {
    "model_type": "llama", "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40, "vocab_size": 50, "rms_norm_eps": 1e-5,
    "rope_theta": 1000.0, "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip


def shapes(config):
    d, D, ff = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    q, kv = config["num_attention_heads"] * D, config["num_key_value_heads"] * D
    return {
        "self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q), "mlp.gate_proj": (ff, d), "mlp.up_proj": (ff, d), "mlp.down_proj": (d, ff),
    }  # fmt: skip


def draw(config, seed=0, *, p=0.0, where=lambda layer, site: True, biases=False, head=False, dtype="float64"):
    """Weights, adapters and sites: B of order 0.3, ranks 2 to 4, α = 5, every array write-protected."""
    rng, d, V = np.random.default_rng(seed), config["hidden_size"], config["vocab_size"]

    def normal(*shape, scale=1.0, about=0.0):
        value = (about + scale * rng.standard_normal(shape)).astype(dtype)
        value.flags.writeable = False
        return value

    weights = {"model.embed_tokens.weight": normal(V, d), "model.norm.weight": normal(d, scale=0.3, about=1)}
    if head:
        weights["lm_head.weight"] = normal(V, d)
    adapters, sites = {}, {}
    for i in range(config["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{i}.{norm}.weight"] = normal(d, scale=0.3, about=1)
        for word, (d_out, d_in) in shapes(config).items():
            site, r = f"model.layers.{i}.{word}", 2 + len(word) % 3
            weights[f"{site}.weight"] = normal(d_out, d_in, scale=d_in**-0.5)
            if biases and word[10:11] in "qkv":
                weights[f"{site}.bias"] = normal(d_out)
            if where(i, word):
                b, bB = (normal(d_out) if biases and len(word) % 2 == odd else None for odd in (0, 1))
                factors = normal(r, d_in, scale=d_in**-0.5), normal(d_out, r, scale=0.3)
                adapters[site] = Adapter(*factors, b=b, bB=bB)
                sites[site] = Site(site, f"{site}.weight", "linear", r, 5.0, 5.0 / r**0.5, p)
    return weights, adapters, sites


def batch(config, lengths, seed=1):
    """ids, starts, index, labels, n: 30 % of rows without a label, n past those that count."""
    rng, N = np.random.default_rng(seed), sum(lengths)
    ids, labels = rng.integers(0, config["vocab_size"], (2, N))
    labels[rng.random(N) < 0.3] = -100
    index = [3, 9, 4, 0, 7, 2][: len(lengths)]
    return ids, np.cumsum([0, *lengths]), index, labels, int((labels != -100).sum()) + 3


def loss(config, weights, adapters, sites, ids, starts, index, labels, n, dropout=None):
    """Σ over sequences and rows, by the definitions."""
    total = 0
    for number, a, end in zip(index, starts[:-1], starts[1:], strict=True):
        if end > a:
            drop = (*dropout, number) if dropout else None
            total = total + _sequence(config, weights, adapters, sites, ids[a:end], labels[a:end], drop)
    return total / n


def _sequence(config, weights, adapters, sites, ids, labels, drop):
    H, K, D = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    T, window = len(ids), config.get("sliding_window") or len(ids)

    def linear(name, x):
        adapter = adapters.get(name)
        b = weights.get(f"{name}.bias")
        b = adapter.b if adapter is not None and adapter.b is not None else b
        y = x @ weights[f"{name}.weight"].T + (0 if b is None else b)
        if adapter is None:
            return y
        xd, s = x, sites[name].scaling
        if drop and sites[name].p:
            seed, step, number = drop
            key = site_key(name)
            xd = x * dropout_mask(x.shape, sites[name].p, seed, step, key, "float64", c3=number)
        y = y + s * (xd @ adapter.A.T @ adapter.B.T)
        return y if adapter.bB is None else y + s * adapter.bB

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weights[f"{name}.weight"]

    def turn(x):
        angle = np.arange(T)[:, None, None] * config["rope_theta"] ** (-np.arange(0, D, 2) / D)
        one, two, c, s = x[..., : D // 2], x[..., D // 2 :], np.cos(angle), np.sin(angle)
        return np.concatenate([one * c - two * s, two * c + one * s], axis=-1)

    t, s = np.arange(T)[:, None], np.arange(T)
    seen = (s <= t) & (t - s < window)
    h = weights["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        x = norm(h, f"{at}.input_layernorm")
        q, k, v = (linear(f"{at}.self_attn.{w}_proj", x).reshape(T, -1, D) for w in "qkv")
        q, k, o = turn(q), turn(k), []
        for head in range(H):
            S = q[:, head] @ k[:, head // (H // K)].T * D**-0.5
            P = np.where(seen, np.exp(S - np.where(seen, S.real, -np.inf).max(1, keepdims=True)), 0)
            o.append(P / P.sum(1, keepdims=True) @ v[:, head // (H // K)])
        h = h + linear(f"{at}.self_attn.o_proj", np.concatenate(o, axis=1))
        x = norm(h, f"{at}.post_attention_layernorm")
        u, w = linear(f"{at}.mlp.gate_proj", x), linear(f"{at}.mlp.up_proj", x)
        h = h + linear(f"{at}.mlp.down_proj", u / (1 + np.exp(-u)) * w)
    z = norm(h, "model.norm") @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T
    kept = labels != -100
    shifted = z[kept] - z[kept].real.max(1, keepdims=True)
    return (np.log(np.exp(shifted).sum(1)) - shifted[np.arange(kept.sum()), labels[kept]]).sum()


# ---- a plan beside it --------------------------------------------------------------------------------------


class Case:
    """A model, a batch, and a plan's answer beside the definitions'."""

    def __init__(self, seed=0, *, config=CONFIG, lengths=LENGTHS, dtype="float64", **how):
        self.config, self.p = config, how.get("p", 0.0)
        self.weights, self.adapters, self.sites = draw(config, seed, dtype=dtype, **how)
        self.batch = batch(config, lengths)
        self.drop = DROPOUT if self.p else None

    def plan(self, weights=None, **how):
        given = self.weights if weights is None else weights
        return llama_plan(given, self.config, self.adapters, self.sites, {}, **{"workers": 2, **how})

    def gradients(self, plan=None, **how):
        *where, n = self.batch
        given = {"n": n, "dropout": self.drop}
        return (plan or self.plan(**how)).loss_and_gradients(self.adapters, {}, *where, **given)[:2]

    def plain(self, adapters=None):
        given = adapters or self.adapters
        return loss(self.config, self.weights, given, self.sites, *self.batch, self.drop)

    def assert_right(self, found, seed=2):
        """⟨g, v⟩ of every array along a random v, by a complex step through the definitions."""
        total, gradients = found
        want = self.plain()
        assert abs(total - want) <= ROUNDING * EPS["float64"] * abs(want)
        assert list(gradients) == list(self.adapters)
        rng = np.random.default_rng(seed)
        largest = max(np.abs(g.B).max() for g in gradients.values())
        for site, adapter in self.adapters.items():
            for part in PARTS:
                value, g = getattr(adapter, part), getattr(gradients[site], part)
                assert (value is None) == (g is None), (site, part)
                if value is not None:
                    v = rng.standard_normal(value.shape)
                    parts = {name: getattr(adapter, name) for name in PARTS} | {part: value + TINY * 1j * v}
                    slope = self.plain({**self.adapters, site: SimpleNamespace(**parts)}).imag / TINY
                    size = np.sum(np.abs(g * v)) + 1e-3 * largest
                    assert g.shape == value.shape
                    assert abs(np.sum(g * v) - slope) <= ROUNDING * EPS["float64"] * size, (site, part)


def assert_explained(narrow, wide, moved):
    """float32's gradients are as far from float64's as some dozens of roundings of every weight explain.

    wide and moved become narrow in float64, moved with every weight changed by 2^-24 of it.
    """
    rng = np.random.default_rng(0)
    for case, change in ((wide, 0.0), (moved, 2.0**-24)):
        case.weights = {
            name: value.astype("float64") * (1 + change * rng.choice([-1, 1], value.shape))
            for name, value in narrow.weights.items()
        }
        case.adapters = {
            site: Adapter(a.A.astype("float64"), a.B.astype("float64")) for site, a in narrow.adapters.items()
        }
    got, want, off = (case.gradients() for case in (narrow, wide, moved))
    assert abs(got[0] - want[0]) <= 64 * 2.0**-24 * abs(want[0])
    for site, g in want[1].items():
        for part in "AB":
            right, found = getattr(g, part), getattr(got[1][site], part)
            assert found.dtype == np.float32
            unit = np.linalg.norm(getattr(off[1][site], part) - right)
            assert 0 < np.linalg.norm(found - right) <= 64 * unit, (site, part)
