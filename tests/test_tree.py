"""Records and dotted names, sums of trees, and one buffer of all arrays."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LIBRARIES, normals, seeds

from lorax_np.errors import ConfigError, DtypeError, ShapeError
from lorax_np.params import Adapter
from lorax_np.tree import flatten, layout, leaves, tree_add, tree_map, unflatten, with_leaves

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
few = settings(max_examples=8)


class Both(NamedTuple):
    adapters: dict
    saved: dict


def tree_of(draw):
    """Adapters with and without m and b, a bias alone, saved weights, and nothing at all."""
    return Both(
        {
            "layers.0.q_proj": Adapter(draw(2, 5), draw(3, 2), m=draw(3)),
            "layers.1.up": Adapter(draw(2, 3), draw(4, 2), b=draw(4)),
            "layers.1.down": Adapter(None, None, b=draw(3)),
            "nothing": {},
        },
        {"score.weight": draw(2, 3), "score.bias": None},
    )


NAMES = [
    *("adapters.layers.0.q_proj.A", "adapters.layers.0.q_proj.B", "adapters.layers.0.q_proj.m"),
    *("adapters.layers.1.up.A", "adapters.layers.1.up.B", "adapters.layers.1.up.b"),
    *("adapters.layers.1.down.b", "saved.score.weight"),
]


@libraries
def test_names_are_paths_and_lead_back(library):
    tree = tree_of(normals(1, library))
    found = leaves(tree)
    assert list(found) == NAMES
    assert found["adapters.layers.0.q_proj.B"] is tree.adapters["layers.0.q_proj"].B
    again = with_leaves(tree, dict(reversed(found.items())))
    assert type(again) is Both
    assert type(again.adapters["layers.1.up"]) is Adapter
    assert again.adapters["layers.1.down"].A is None
    assert again.saved["score.bias"] is None
    assert list(leaves(again)) == NAMES
    assert all(value is found[name] for name, value in leaves(again).items())


@libraries
def test_maps_and_sums_go_by_name(library):
    a, b = tree_of(normals(1, library)), tree_of(normals(2, library))
    total = tree_add(a, b)
    for name, value in leaves(total).items():
        want = library.host(leaves(a)[name]) + library.host(leaves(b)[name])
        assert np.array_equal(library.host(value), want)
    three = tree_map(lambda x, y, z: x + y * z, a, b, a)
    name = "adapters.layers.1.up.B"
    x, y = (library.host(leaves(t)[name]) for t in (a, b))
    assert np.array_equal(library.host(leaves(three)[name]), x + y * x)


@libraries
@few
@given(seed=seeds, shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5))
def test_one_buffer_and_back(library, seed, shapes):
    """Zero-sized arrays and single numbers too; strided inputs; a view for each name."""
    draw = normals(seed)
    arrays = {f"x.{i}": library.place(np.array(draw(*shape))) for i, shape in enumerate(shapes)}
    where = layout(arrays)
    flat = flatten(arrays)
    assert flat.shape == (where.size,) == (sum(int(np.prod(shape)) for shape in shapes),)
    want = np.concatenate([library.host(value).reshape(-1) for value in arrays.values()])
    assert np.array_equal(library.host(flat), want)
    back = unflatten(flat, where)
    assert list(back) == list(arrays)
    for name, value in arrays.items():
        assert back[name].dtype == value.dtype
        assert np.array_equal(library.host(back[name]), library.host(value))


def test_views_write_through_and_the_order_is_the_layouts():
    arrays = {"a": np.arange(6.0).reshape(3, 2).T, "b": np.full(2, 9.0)}
    where = layout(arrays)
    assert flatten(arrays).tolist() == [0, 2, 4, 1, 3, 5, 9, 9]
    flat = flatten(dict(reversed(arrays.items())), where)
    assert flat.tolist() == [0, 2, 4, 1, 3, 5, 9, 9]
    views = unflatten(flat, where)
    views["a"][1, 0] = 70
    flat[7] = 80
    assert flat[3] == 70
    assert views["b"].tolist() == [9, 80]


def test_what_does_not_fit_is_refused():
    one = {"a": np.ones(2)}
    with pytest.raises(ConfigError, match=r"^a\.b: expected one array of this name, got two$"):
        leaves({"a.b": np.ones(1), "a": {"b": np.ones(1)}})
    for tree in (np.ones(2), {"a": 3}, {"a": [np.ones(2)]}):
        with pytest.raises(TypeError, match=r"expected a record or mapping of arrays, got"):
            leaves(tree)
    with pytest.raises(ConfigError, match=r"^a: expected an array of this name, got none$"):
        with_leaves(one, {"b": np.ones(2)})
    with pytest.raises(ConfigError, match=r"^b: expected no array of this name, got one$"):
        tree_map(lambda x, y: x, one, {**one, "b": np.ones(2)})
    with pytest.raises(ShapeError, match=r"^b: expected \(2,\), set by a, got \(1,\)$"):
        tree_add(one, {"a": np.ones(1)})
    with pytest.raises(DtypeError, match=r"^b: expected float64, set by a, got float32$"):
        flatten({**one, "b": np.ones(2, "float32")})
    with pytest.raises(ConfigError, match=r"^arrays: expected at least one, got none$"):
        flatten({})
    with pytest.raises(ShapeError, match=r"^a: expected \(2,\), set by the layout, got \(3,\)$"):
        flatten({"a": np.ones(3)}, layout(one))
    with pytest.raises(ShapeError, match=r"^flat: expected \(2,\), set by the layout, got \(3,\)$"):
        unflatten(np.ones(3), layout(one))
