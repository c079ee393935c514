"""Adapter directories beside the base that they are for."""

import numpy as np
import pytest
from adapter_samples import PREFIX, SAMPLES, experts, linear, sample, write

import lorax_np as lx
from lorax_np.io.peft import load_adapter

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"


def refused(folder, pattern, error=lx.FormatError, **given):
    with pytest.raises(error, match=pattern) as caught:
        load_adapter(folder, **given)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def ones(*shape):
    return np.ones(shape, "float32")


BASE = {"m.layers.0.q.weight": ones(4, 5), "m.layers.0.v.weight": ones(3, 5), "m.layers.1.q.weight": ones(4, 5)}


@pytest.mark.parametrize("start", ["", "m.", "x.m.", "deeper.still.m."])
def test_a_missing_prefix_is_found(tmp_path, start):
    weights = {f"{start}{name.removeprefix('m.')}": array for name, array in BASE.items()}
    files = load_adapter(sample(tmp_path, "linear"), weights=weights)
    assert {site.weight for site in files.sites.values()} == set(weights)
    assert list(files.adapters) == list(files.sites)
    assert files.notes == (() if not start else (f"names: the base's, with {start} in front",))


def test_a_prefix_too_many_is_found(tmp_path):
    tensors = {key.replace(PREFIX, f"{PREFIX}model."): a for key, a in SAMPLES["linear"][1].items()}
    folder = write(tmp_path, SAMPLES["linear"][0], tensors)
    files = load_adapter(folder, weights={name.removeprefix("m."): array for name, array in BASE.items()})
    assert files.notes == ("names: the base's, without model.",)
    assert "layers.0.q" in files.adapters


def test_two_places_for_an_adapter_are_refused(tmp_path):
    twice = {
        name.replace("m.", half): array for half in ("encoder.", "decoder.") for name, array in BASE.items()
    }
    folder = sample(tmp_path, "linear")
    refused(folder, r"names of one place in the base, got 'with decoder. .*encoder", weights=twice)
    fitting = twice | {"decoder.layers.0.v.weight": ones(2, 5)}  # only one of them has the shapes
    assert load_adapter(folder, weights=fitting).notes == ("names: the base's, with encoder. in front",)


def test_sites_that_the_base_lacks_are_named(tmp_path):
    folder = sample(tmp_path, "linear")
    less = {name: array for name, array in BASE.items() if "1.q" not in name}
    refused(folder, r"every site in the base, got 3 of 3 that are not there", weights=less)
    bare = {name.removeprefix("m."): array for name, array in less.items()}
    refused(folder, r"1 of 3 that are not there: 'layers.1.q.weight' \(did you mean", weights=bare)


def test_shapes_of_the_base_have_to_fit(tmp_path):
    wrong = {name.removeprefix("m."): array for name, array in BASE.items()} | {"layers.0.v.weight": ones(3, 6)}
    refused(
        sample(tmp_path, "linear"),
        r"'layers.0.v': expected layers.0.v.weight of \(3, 5\), by A and B, got \(3, 6\)",
        weights=wrong,
    )


def test_weights_that_lie_the_other_way_are_seen(tmp_path):
    turned = {name.removeprefix("m."): array.T for name, array in BASE.items()}
    files = load_adapter(sample(tmp_path, "linear"), weights=turned)
    assert all(site.transposed for site in files.sites.values())
    assert files.notes == ("3 weights lie the other way than the config says, 'layers.0.q' the first",)


def test_a_square_weight_lies_as_its_neighbours_do(tmp_path):
    tensors = linear("h.0.c") | linear("h.0.s", d_in=4, d_out=4) | linear("top", d_in=4, d_out=3)
    folder = write(tmp_path, {"target_modules": ["c", "s", "top"]}, tensors)
    weights = {"h.0.c.weight": ones(5, 4), "h.0.s.weight": ones(4, 4), "top.weight": ones(3, 4)}
    sites = load_adapter(folder, weights=weights).sites
    assert (sites["h.0.c"].transposed, sites["h.0.s"].transposed, sites["top"].transposed) == (
        True,
        True,
        False,
    )
    flat = {key.replace("h.0.", ""): array for key, array in tensors.items()}
    folder = write(tmp_path / "flat", {"target_modules": ["c", "s", "top"]}, flat)
    weights = {name.replace("h.0.", ""): array for name, array in weights.items()}
    refused(folder, "neighbours that tell how this square weight lies", weights=weights)


def test_the_order_of_parameters_is_found_by_shapes(tmp_path):
    said = {"target_modules": [], "target_parameters": ["e.outer", "e.inner"]}  # declared the other way round
    folder = write(tmp_path, said, experts("e"))
    weights = {"e.inner": ones(3, 8, 5), "e.outer": ones(3, 5, 4)}
    files = load_adapter(folder, weights=weights)
    assert files.adapters["e.inner"].A.shape == (6, 5)
    assert files.adapters["e.outer"].A.shape == (6, 4)


def test_rows_without_direction_are_counted_under_dora(tmp_path):
    tensors = linear("q", lora_magnitude_vector=ones(4))
    tensors[f"{PREFIX}q.lora_B.weight"] = np.array([[0, 0], [1, 2], [0, 0], [3, 1]], "float32")
    W = ones(4, 5)
    W[[0, 2]] = 0
    folder = write(tmp_path, {"target_modules": ["q"], "use_dora": True}, tensors)
    with pytest.raises(lx.ConfigError, match=r"^q: .*got 2 rows of zeros \(first: 0, 2\).*exclude_modules"):
        load_adapter(folder, weights={"q.weight": W})
    assert load_adapter(folder, weights={"q.weight": ones(4, 5)}).sites


def test_a_checkpoint_is_a_base(tmp_path):
    from lorax_np.io.checkpoint import open_checkpoint
    from lorax_np.io.writer import write_safetensors

    write_safetensors(tmp_path / "model.safetensors", {k.removeprefix("m."): v for k, v in BASE.items()})
    with_base = load_adapter(sample(tmp_path / "a", "linear"), weights=open_checkpoint(tmp_path))
    assert with_base.sites == load_adapter(tmp_path / "a").sites


SAVED = {"layers.0.q.weight": ones(4, 5), "layers.0.v.weight": ones(4, 5), "embed.weight": ones(7, 5)}


def test_what_stands_beside_has_the_bases_shapes(tmp_path):
    folder = sample(tmp_path, "saved")
    assert load_adapter(folder, weights=SAVED | {"head.weight": ones(3, 5)}).notes == ()
    refused(
        folder, r"'head.weight': expected \(3, 6\), the base's", weights=SAVED | {"head.weight": ones(3, 6)}
    )
    refused(folder, r"expected rows as of embed.weight \(7, 6\)", weights=SAVED | {"embed.weight": ones(7, 6)})
    (note,) = load_adapter(folder, weights=SAVED).notes  # a head that the base never had
    assert note.startswith("1 saved tensors are not in the base: 'head.weight'")


def test_a_vocabulary_may_have_grown(tmp_path):
    tensors = linear("q") | {f"{PREFIX}embed_tokens.weight": ones(9, 5), f"{PREFIX}lm_head.weight": ones(9, 5)}
    folder = write(tmp_path, {"target_modules": ["q"]}, tensors)
    weights = {"q.weight": ones(4, 5), "embed_tokens.weight": ones(7, 5), "lm_head.weight": ones(7, 5)}
    assert set(load_adapter(folder, weights=weights).saved) == {"embed_tokens.weight", "lm_head.weight"}
    refused(folder, "the base's", weights=weights | {"lm_head.weight": ones(7, 6)})


def test_a_trained_bias_has_the_bases_shape(tmp_path):
    weights = {"q.weight": ones(4, 5), "norm.bias": ones(6), "q.bias": ones(5)}
    refused(sample(tmp_path, "biases"), r"'q': expected q.bias of \(4,\), got \(5,\)", weights=weights)


def test_a_head_stands_where_the_prefix_does_not_reach(tmp_path):
    tensors = linear("layers.0.q") | {f"{PREFIX}head.weight": ones(3, 5), f"{PREFIX}pool.weight": ones(2, 2)}
    folder = write(tmp_path, {"target_modules": ["q"], "modules_to_save": ["head", "pool"]}, tensors)
    weights = {"m.layers.0.q.weight": ones(4, 5), "head.weight": ones(3, 5), "m.pool.weight": ones(2, 2)}
    assert set(load_adapter(folder, weights=weights).saved) == {"head.weight", "m.pool.weight"}
