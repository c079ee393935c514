"""The demonstrations' own parts: files of translations, rows held out, and figures outside of their ranges."""

from dataclasses import replace

import pytest

from bench.demos import table, texts
from bench.demos.run import flags, main, settings_of
from bench.demos.tasks import DEMOS
from lorax_np.text.rows import TASKS

PO = """msgid ""
msgstr "Content-Type: text/plain\\n"

msgid "Yes"
msgstr "Ja"

#, fuzzy
msgid "Maybe"
msgstr "Nein"

msgid "one"
msgid_plural "many"
msgstr[0] "eins"
msgstr[1] "viele"

#. a note
#: a/file.py:3
msgid ""
"Two "
"\\"lines\\""
msgstr ""
"Zwei "
"Zeilen"

#~ msgid "Gone"
#~ msgstr "Weg"
"""


def test_a_file_of_translations():
    assert list(texts.entries(PO)) == [("Yes", "Ja"), ('Two "lines"', "Zwei Zeilen")]


def test_no_row_is_learned_and_held_out():
    rows = [{"text": str(i)} for i in range(50)]
    train, valid = texts.split(rows, 30, 20)
    assert sorted(int(row["text"]) for row in train + valid) == list(range(50))
    assert texts.split(rows, 30, 20) == (train, valid)
    with pytest.raises(RuntimeError, match="expected at least 51, got 50"):
        texts.split(rows, 31, 20)


def test_every_task_has_a_demonstration(tmp_path):
    assert {demo.task for demo in DEMOS.values()} == set(TASKS.values())
    for demo in DEMOS.values():
        assert set(demo.ranges) <= set(demo.figures)
        assert set(demo.apart) <= set(demo.figures)
        told = flags(settings_of(replace(demo, base=lambda cache: cache), tmp_path, tmp_path))
        assert told[::2] == [word for word in told if word.startswith("--")]


def _found(**after):
    figures = {"loss": 1.0, "accuracy": 0.97, "macro F1": 0.97} | after
    ours = {"before": figures, "after": figures, "losses": [2.0, 1.0]}
    return {"name": "news", "ours": ours, "evaluate": dict(figures)}


def test_figures_outside_of_their_ranges_are_named():
    demo = replace(DEMOS["news"], ranges={"accuracy": (0.95, 1.0)}, apart={"accuracy": 0.01}, curve=0.001)
    assert table.outside(demo, _found()) == []
    low = _found(accuracy=0.5)
    assert table.outside(demo, low) == ["news: accuracy: expected 0.95 to 1 after training, got 0.5000"]
    other = _found()
    other["evaluate"]["accuracy"] = 0.96
    assert table.outside(demo, other) == [
        "news: accuracy: expected 0.970000 of the saved adapter, got 0.960000"
    ]
    beside = _found() | {"peft": {"after": {"accuracy": 0.99}, "losses": [2.0, 1.1]}}
    assert table.outside(demo, beside) == [
        "news: accuracy: expected PEFT within 0.01, got 0.0200",
        "news: loss: expected PEFT within 0.001 in the first 10 steps, got 0.1",
    ]
    unknown = _found(accuracy=float("nan"))
    assert len(table.outside(demo, unknown)) == 2


def test_an_unknown_name(capsys):
    assert main(["newz"]) == 2
    assert "expected names of fortunes" in capsys.readouterr().err
