"""Embeddings against autograd through PEFT's own layer, merged and not; starts.  See specs/embedding.md."""

import warnings
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
from peft_layers import (
    SITE,
    Arrays,
    Case,
    assert_within,
    bounds,
    inject,
    nn,
    relative,
    terms,
    to_numpy,
    to_torch,
    torch,
    widen,
)

import lorax_np as lx

pytestmark = pytest.mark.peft

EXACT = 1e-12  # float64: of the tensor's largest sum of absolute terms


class Table(NamedTuple):
    """One embedding: PEFT's choices and the base's."""

    use_dora: bool
    use_rslora: bool
    padding: int | None
    by_frequency: bool
    e: float | None
    shape: tuple[int, int, int, tuple[int, ...]]  # vocab, dim, r, shape of ids

    @property
    def scaling(self) -> float:
        return lx.LoraConfig(r=self.shape[2], lora_alpha=5, use_rslora=self.use_rslora).scaling

    def __str__(self) -> str:
        words = [word for word in ("use_dora", "use_rslora", "by_frequency") if getattr(self, word)]
        return "-".join([*words, f"pad {self.padding}", f"e {self.e}", str(self.shape)])


SHAPES = (
    (7, 5, 3, (2, 4)),
    (4, 6, 9, (11,)),
    (5, 1, 2, ()),
    (1, 3, 2, (3,)),
    (9, 8, 1, (0, 2)),
    (33, 24, 8, (3, 20)),
)
TABLES = [
    Table(dora, rslora, 0 if pad else None, often, e, shape)
    for dora, rslora, pad, often, e, shape in product(
        (False, True), (False, True), (False, True), (False, True), (None, 2.5), SHAPES
    )
]


def draw(table: Table, dtype: str) -> Arrays:
    vocab, dim, r, lead = table.shape
    rng = np.random.default_rng([vocab, dim, r, *lead])
    v = {
        name: rng.standard_normal(shape).astype(dtype)
        for name, shape in {
            "W": (vocab, dim),
            "A": (r, vocab),
            "B": (dim, r),
            "m": (dim,),
            "gy": (*lead, dim),
        }.items()
    }
    v["ids"] = rng.integers(0, max(1, vocab - 1), lead)
    return v if table.use_dora else {name: value for name, value in v.items() if name != "m"}


def ours(table: Table, v: Arrays) -> Arrays:
    base = lx.Embedding(v["W"], table.padding, table.e, table.by_frequency)
    adapter = lx.Adapter(v["A"], v["B"], m=v.get("m"))
    y, saved = lx.lora_embedding_forward(v["ids"], base, adapter, scaling=table.scaling)
    g = lx.lora_embedding_backward(v["gy"], saved, base, adapter, scaling=table.scaling)
    gW = lx.lora_embedding_backward_base(v["gy"], saved, base, adapter, scaling=table.scaling).W
    merged = lx.merge_embedding(base, adapter, scaling=table.scaling).W
    found = {"y": y, "A": g.A, "B": g.B, "m": g.m, "W": gW, "merged": merged}
    return {name: value for name, value in found.items() if value is not None}


class Scaled(nn.Embedding):
    """As Gemma's: what is looked up is multiplied by a number that the layer carries."""

    embed_scale = torch.tensor(1.0)

    def forward(self, ids: Any) -> Any:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


def peft_layer(table: Table, v: Arrays, **options: Any) -> tuple[Any, dict[str, Any]]:
    vocab, dim, r, _ = table.shape
    module = Scaled(vocab, dim, table.padding, scale_grad_by_freq=table.by_frequency, **options)
    if table.e is not None:
        module.embed_scale = torch.tensor(table.e, dtype=torch.float64)
    module.to(to_torch(v["W"]).dtype)
    how = {"r": r, "lora_alpha": 5, "use_rslora": table.use_rslora, "use_dora": table.use_dora}
    _, (layer,) = inject(module, **how)
    parts = {"W": layer.base_layer.weight, "A": layer.lora_embedding_A[SITE], "B": layer.lora_embedding_B[SITE]}
    if table.use_dora:
        parts["m"] = layer.lora_magnitude_vector[SITE].weight
    with torch.no_grad():
        for name, part in parts.items():
            part.copy_(to_torch(v[name]).reshape(part.shape))
            part.requires_grad_(True)
    return layer, parts


def theirs(table: Table, v: Arrays) -> Arrays:
    layer, parts = peft_layer(table, v)
    y = layer(torch.from_numpy(v["ids"]))
    y.backward(to_torch(v["gy"]))
    found = {name: to_numpy(part.grad) for name, part in parts.items()}
    layer.merge(safe_merge=True)
    return {"y": to_numpy(y), **found, "merged": to_numpy(layer.base_layer.weight)}


def linear(table: Table, v: Arrays) -> tuple[Case, Arrays]:
    """The same as a linear layer on one-hot rows: what bounds its roundings."""
    vocab, dim, r, lead = table.shape
    case = Case(False, "none", False, table.use_rslora, table.use_dora, shape=(dim, vocab, r, lead))
    x = np.eye(vocab, dtype=v["W"].dtype)[v["ids"]]
    e = 1.0 if table.e is None else table.e
    return case, {**v, "x": x, "W": v["W"].T, "gy": np.asarray(e * v["gy"], dtype=v["W"].dtype)}


def sizes(table: Table, v: Arrays, of: Any) -> Arrays:
    """`of` the linear layer, for the tensors of an embedding; merged, terms are those of y at every id."""
    case, flat = linear(table, v)
    found = of(case, flat)
    found = {
        "y": (table.e or 1.0) * found["y"],
        **{name: found[name] for name in ("A", "B", "W", "m") if name in found},
    }
    found["W"] = found["W"].T
    every = {**v, "ids": np.arange(table.shape[0]), "gy": v["W"]}
    case, flat = linear(table._replace(shape=(*table.shape[:3], (table.shape[0],)), e=None), every)
    return {**found, "merged": of(case, flat)["y"]}


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_float64_equals_peft_to_1e_12(table: Table) -> None:
    v = draw(table, "float64")
    got, want, T = ours(table, v), theirs(table, v), sizes(table, v, terms)
    assert got.keys() == want.keys() == T.keys()
    for name in got:
        assert got[name].shape == want[name].shape
        assert got[name].dtype == want[name].dtype == np.float64
        assert relative(got[name], want[name], T[name]) <= EXACT, name


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_float32_is_within_its_roundings_of_peft_in_float64(table: Table) -> None:
    v = draw(table, "float32")
    wide = {**widen(v), "ids": v["ids"]}
    bound = sizes(table, v, lambda case, flat: bounds(case, flat, "float32"))
    truth = theirs(table, wide)
    assert_within(ours(table, v), truth, bound)
    assert_within(theirs(table, v), truth, bound)


def test_peft_shortens_the_columns_of_A() -> None:
    """peft-0.21.2/max-norm: merging gives another layer, by a fifth of its largest output and more."""
    table = Table(False, False, None, False, None, (7, 5, 3, (2, 4)))
    v = draw(table, "float64")
    layer, _ = peft_layer(table, v, max_norm=1.0)
    ids = torch.from_numpy(v["ids"])
    with torch.no_grad():
        before = to_numpy(layer(ids))
        norms = np.linalg.norm(to_numpy(layer.lora_embedding_A[SITE]), axis=0)
    assert (norms[np.unique(v["ids"])] <= 1 + 1e-6).all(), "A itself was changed"
    assert np.linalg.norm(v["A"], axis=0)[np.unique(v["ids"])].max() > 1
    layer.merge()
    after = to_numpy(layer(ids))
    apart = np.abs(after - before).max() / np.abs(before).max()
    print(f"max-norm: merge and forward part by {apart:.2f} of the largest y")
    assert apart > 0.1
    with pytest.raises(lx.ConfigError, match="max_norm: expected None"):
        lx.Embedding(v["W"], max_norm=1.0)


def test_peft_never_drops() -> None:
    """peft-0.21.2/embedding-dropout: a probability of 0.9 changes nothing."""
    table = Table(False, False, None, False, None, (7, 5, 3, (2, 4)))
    v = draw(table, "float64")
    module = nn.Embedding(7, 5).to(torch.float64)
    _, (layer,) = inject(module, r=3, lora_dropout=0.9)
    layer.train()
    ids = torch.from_numpy(v["ids"])
    with torch.no_grad():
        layer.lora_embedding_A[SITE].normal_()
        assert torch.equal(layer(ids), layer(ids))
        assert not torch.equal(layer(ids), layer.base_layer(ids))
    assert lx.Site("emb", "emb.weight", "embedding", 3, 8.0, 8 / 3).p == 0.0


def test_peft_takes_an_unknown_start_for_the_default() -> None:
    """peft-0.21.2/embedding-start: of the starts that an embedding does not have, PiSSA for one."""
    module = nn.Embedding(7, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, (layer,) = inject(module, r=3, init_lora_weights="pissa")
    assert not layer.lora_embedding_A[SITE].any()
    config = lx.LoraConfig(r=3, init_lora_weights="pissa")
    with pytest.raises(
        lx.ConfigError, match=r"^init_lora_weights: expected True, False or 'gaussian' at an embedding"
    ):
        lx.init_embedding_adapter(lx.Embedding(np.ones((7, 5))), config, rng=lx.torch_generator(0))


# ---- starts -------------------------------------------------------------------------------------------------

WITH_AVX = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@pytest.mark.parametrize("start", [True, False, "gaussian"])
@pytest.mark.parametrize("seed", [0, 1, 1234, 2**32 - 1])
def test_a_start_has_the_bits_of_pefts(seed: int, start: Any) -> None:
    """Sizes below, at and above the 16 from which torch draws in blocks; what follows has its words as well."""
    shapes = [(40, 30, 6), (3, 2, 2), (5, 3, 1), (4, 4, 4), (1, 1, 1), (17, 9, 3), (3, 5, 4)]
    modules = [nn.Embedding(vocab, dim) for vocab, dim, _ in shapes]
    for (vocab, dim, r), module in zip(shapes, modules, strict=True):
        last = nn.Linear(6, 4)
        _, (layer, after) = inject(module, last, seed=seed, r=r, init_lora_weights=start)
        rng, config = lx.torch_generator(seed), lx.LoraConfig(r=r, init_lora_weights=start)
        _, adapter = lx.init_embedding_adapter(lx.Embedding(np.ones((vocab, dim), "float32")), config, rng=rng)
        A, B = to_numpy(layer.lora_embedding_A[SITE]), to_numpy(layer.lora_embedding_B[SITE])
        for got, want in ((adapter.A, A), (adapter.B, B)):
            assert got.dtype == want.dtype
            if WITH_AVX:
                assert got.tobytes() == want.tobytes(), (vocab, dim, r)
            else:  # torch's other kernels
                assert np.abs(got - want).max() < 2e-6
        if start != "gaussian" and WITH_AVX:  # a normal start of a linear layer follows NumPy's stream
            _, one = lx.init_adapter(lx.Linear(np.ones((4, 6), "float32")), config, rng=rng)
            assert one.A.tobytes() == to_numpy(after.lora_A[SITE].weight).tobytes()
