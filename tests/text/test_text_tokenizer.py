"""Tokenizers: ids, characters, special tokens, GGUF against tokenizer.json, hostile files."""

import json
import random
import sys

import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from text_samples import CONTROLS, WORDS, bpe, bytes_vocabulary, gguf, loaded, saved, t5_like, wordpiece
from tokenizers import processors

from lorax_np.errors import BackendError, FormatError
from lorax_np.text.template import Template
from lorax_np.text.tokenizer import load_tokenizer

TEXTS = (
    "the  cat abc 1212",
    "Zwölf Boxkämpfer 😀😁 — ﷽ नमस्ते\u200d\n\n\tdef f(x):\r\n        return {x: 1}",
    "<|im_start|>user\nthe<|im_end|>\n",
    "",
    "\x00\u2028 ",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def byte_level(folder):
    return loaded(bpe, folder / "bpe")


@pytest.fixture(scope="module")
def bert(folder):
    return loaded(wordpiece, folder / "bert")


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_go_through_unchanged_and_every_character_has_a_token(byte_level, text):
    ids, offsets = byte_level.encode(text)
    assert byte_level.decode(ids) == text
    assert sorted({i for begin, end in offsets for i in range(begin, end)}) == list(range(len(text)))


@settings(max_examples=15)
@given(st.text(max_size=30))
def test_any_text_goes_through_unchanged(byte_level, text):
    assert byte_level.decode(byte_level.encode(text).ids) == text


@pytest.mark.parametrize("bos", [False, True])
def test_a_gguf_file_gives_the_ids_of_the_directory(folder, bos):
    ours = load_tokenizer(gguf(folder / f"{bos}.gguf", add_bos_token=("bool", bos)))
    theirs = loaded(bpe, folder / f"bos {bos}", bos=bos)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
    assert ours.template[:4] == theirs.template[:4]
    assert ours.specials == theirs.specials
    assert ours.names == theirs.names == dict(enumerate(CONTROLS))
    assert ours.rows == theirs.rows
    assert ours.template.start == ((1,) if bos else ())


def test_padding_and_truncation_of_the_file_are_dropped(bert):
    assert len(bert.encode("the cat " * 50).ids) == 100


def test_special_tokens_and_the_template_of_two_texts(bert):
    cls, sep = WORDS.index("[CLS]"), WORDS.index("[SEP]")
    assert bert.template == Template((cls,), (sep,), (sep,), (sep,), ((0,), (0,), (0,), (1,), (1,)))
    assert bert.template.typed
    assert bert.specials._asdict() == {
        **{"bos": None, "eos": None, "pad": 0, "unk": 1, "cls": cls, "sep": sep, "mask": None}
    }
    a, b = bert.encode("the cat sat").ids, bert.encode("on mat").ids
    whole = bert._library.encode("the cat sat", "on mat")
    ids, types, first = bert.template.two(a, b)
    assert (ids, types) == (whole.ids, whole.type_ids)
    assert ids[first : first + len(b)] == b
    assert bert.template.one(a) == bert._library.encode("the cat sat").ids


def test_a_template_that_ends_each_text(folder):
    t5 = loaded(t5_like, folder / "t5")
    assert t5.template == Template((), (1,), (1,), (1,), ((), (0,), (0,), (0,), (0,)))
    assert not t5.template.typed


def test_a_template_with_two_tokens_between_and_another_end(folder):
    made = hf.Tokenizer.from_file(str(bpe(folder / "roberta") / "tokenizer.json"))
    made.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair="<|im_start|> $A <|im_end|> <|im_end|> $B <|endoftext|>",
        special_tokens=[(token, i) for i, token in enumerate(CONTROLS)],
    )
    template = load_tokenizer(saved(folder / "roberta", made, {})).template
    assert template[:4] == ((1,), (2,), (2, 2), (0,))
    assert (template.around, template.around_two, template.typed) == (2, 4, False)
    assert template.two([7], [8, 9]) == ([1, 7, 2, 2, 8, 9, 0], [0] * 7, 4)


def test_tokens_of_the_models_makers_are_no_special_tokens(folder):
    kinds = [3 if token in CONTROLS else 4 if token == "France" else 1 for token in bytes_vocabulary()]
    found = load_tokenizer(gguf(folder / "own.gguf", token_type=("array of int32", kinds)))
    assert sorted(found.names.values()) == sorted(CONTROLS)
    assert found.decode(found.encode("France<|im_end|>").ids, specials=False) == "France"


def test_pre_tokenizers_by_name_cut_digits_or_do_not(folder):
    apart = load_tokenizer(gguf(folder / "apart.gguf"))
    whole = load_tokenizer(gguf(folder / "whole.gguf", pre=("string", "gpt-2")))
    assert [len(one.encode("12").ids) for one in (apart, whole)] == [2, 1]
    assert [len(one.encode("  1").ids) for one in (apart, whole)] == [2, 3]


def test_trimmed_characters_are_made_whole(folder):
    """A file that trims spaces off a token's characters would leave characters without a token."""
    found = loaded(bpe, folder / "trimmed", bos=True)
    assert found.encode("abc the").offsets[-1] == (3, 7)
    assert json.loads((folder / "trimmed" / "tokenizer.json").read_text())["post_processor"]["processors"][0][
        "trim_offsets"
    ]


def test_an_embedding_with_too_few_rows_is_refused(folder, byte_level):
    rows = byte_level.rows
    assert load_tokenizer(folder / "bpe", vocab_size=rows).rows == rows
    with pytest.raises(FormatError, match=rf"bpe: expected token ids below {rows - 1}.*got id {rows - 1}$"):
        load_tokenizer(folder / "bpe", vocab_size=rows - 1)


def test_half_a_surrogate_is_refused(byte_level):
    with pytest.raises(FormatError, match="surrogate pair at character 1"):
        byte_level.encode("a\ud800")


def test_without_the_library_the_extra_is_named(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(BackendError, match=r"pip install 'lorax-np\[text\]'"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": ("string", "llama")}, "tokenizer.ggml.model: expected gpt2, byte-level BPE, got 'llama'"),
        ({"model": None}, "tokenizer.ggml.model: expected a tokenizer's metadata, got none"),
        ({"pre": ("string", "tekken")}, r"known here \(smollm, gpt-2\), got 'tekken'"),
        ({"pre": ("uint32", 3)}, "tokenizer.ggml.pre: expected"),
        ({"tokens": None}, "tokenizer.ggml.tokens: expected a list, got none"),
        ({"tokens": ("array of string", ["a"] * 273)}, "each token once, got 272 repeated"),
        ({"token_type": ("array of int32", [1])}, "expected 273 entries, as many as tokens, got 1"),
        ({"merges": ("array of string", ["a b c"])}, "two tokens with a space between, got 'a b c'"),
        ({"merges": ("array of string", ["a z"])}, "that the library tokenizers can read"),
        ({"merges": ("array of uint32", [1])}, "merges: expected two tokens"),
        ({"bos_token_id": ("uint32", 5000)}, "bos: expected a token of the vocabulary, got 5000"),
        ({"bos_token_id": ("string", "a")}, "bos_token_id: expected a token's number"),
        ({"bos_token_id": None, "add_bos_token": ("bool", True)}, "since one is added, got None"),
        ({"bos_token_id": ("int32", -1)}, "bos"),
    ],
)
def test_gguf_files_that_are_refused(tmp_path, changed, said):
    with pytest.raises(FormatError, match=said) as refused:
        load_tokenizer(gguf(tmp_path / "a.gguf", **changed))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("tokenizer.json", "{", "JSON object"),
        ("tokenizer.json", "{}", "that the library tokenizers can read"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "can read"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token: expected a token's text, got 3"),
        (
            "tokenizer_config.json",
            '{"eos_token": "</s>"}',
            "eos: expected a token of the vocabulary, got '</s>'",
        ),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template: expected a text, got 3"),
    ],
)
def test_directories_that_are_refused(tmp_path, file, content, said):
    (bpe(tmp_path) / file).write_text(content)
    with pytest.raises(FormatError, match=said) as refused:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refused.value)


def test_places_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FormatError, match=r"expected tokenizer\.json in the directory, got no such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(FormatError, match="got sentencepiece's own format alone"):
        load_tokenizer(tmp_path)


def test_mutated_files_are_read_or_refused_in_one_line(tmp_path):
    """300 files with a few bytes changed: never anything but a tokenizer or a FormatError."""
    good = (bpe(tmp_path / "good", bos=True) / "tokenizer.json").read_bytes()
    draw, refused = random.Random(0), 0
    file = tmp_path / "tokenizer.json"
    for _ in range(300):
        raw = bytearray(good)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(raw))
            raw[at : at + draw.choice((0, 1, 40))] = draw.choice(
                (b"", b"null", b'"', b"}", b"-1", b"[", b"\xff")
            )
        file.write_bytes(raw)
        said = ""
        try:
            load_tokenizer(file)
        except FormatError as error:
            refused, said = refused + 1, str(error)
        assert "\n" not in said
    assert refused > 100
