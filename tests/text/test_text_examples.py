"""Rows as examples: which token is learned where, what is cut, and what is counted."""

import re
import sys

import numpy as np
import pytest
from text_samples import CONTROLS, WORDS, bpe, bytes_vocabulary, gguf, loaded, rows_file, t5_like, wordpiece

from lorax_np.errors import BackendError, ConfigError, FormatError
from lorax_np.text.data import encode_rows, load_data
from lorax_np.text.examples import Settings, text_bytes
from lorax_np.text.heads import first_tokens, shared_room
from lorax_np.text.labels import Labels
from lorax_np.text.questions import answers, best_answer, windows
from lorax_np.text.rows import read_rows
from lorax_np.text.showing import shown
from lorax_np.text.tokenizer import load_tokenizer

END = CONTROLS.index("<|im_end|>")
START = CONTROLS.index("<|im_start|>")
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM = (  # as SmolLM2's
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "the mat "},
    {"role": "user", "content": "abc"},
    {"role": "assistant", "content": " 12"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def byte_level(folder):
    return loaded(bpe, folder / "bpe")


@pytest.fixture(scope="module")
def starting(folder):
    return loaded(bpe, folder / "bos", bos=True)


@pytest.fixture(scope="module")
def bert(folder):
    return loaded(wordpiece, folder / "bert")


def data(folder, tokenizer, task, *rows, labels=None, **settings):
    file = rows_file(folder / "train.jsonl", *rows)
    return load_data(file, tokenizer, task=task, settings=Settings(**settings), labels=labels)["train"]


def learned(example, tokenizer):
    """The text that labels spell, read in a loop of one's own."""
    ids, labels = example.sequences[0].ids, example.labels
    assert len(labels) == len(ids)
    assert labels[-1] == -100
    for t, label in enumerate(labels[:-1]):
        assert label in (-100, ids[t + 1])
    assert example.kept == (labels != -100).sum()
    return tokenizer.decode([i for i in labels if i != -100])


# ---- causal models -----------------------------------------------------------------------------------------


def test_every_token_of_a_text_is_learned_but_the_first(tmp_path, byte_level, starting):
    row = {"text": "the cat abc\n"}
    (example,) = data(tmp_path, byte_level, "causal-lm", row).examples
    assert byte_level.decode(example.sequences[0].ids) == "the cat abc\n<|im_end|>"
    assert learned(example, byte_level) == "he cat abc\n<|im_end|>"
    assert example.nbytes == len("he cat abc\n")
    (example,) = data(tmp_path, starting, "causal-lm", row).examples
    assert learned(example, starting) == "the cat abc\n<|im_end|>"
    assert example.nbytes == len("the cat abc\n")


@pytest.mark.parametrize("prompt", ["the ", "the", "th", "Fr", "ab", "", "😀"])
def test_all_of_a_completion_is_learned_and_nothing_before_its_first_token(tmp_path, starting, prompt):
    completion = "ance c 12 😀"
    (example,) = data(tmp_path, starting, "causal-lm", {"prompt": prompt, "completion": completion}).examples
    found, alone = learned(example, starting), starting.encode(prompt).ids
    whole = prompt + completion + "<|im_end|>"
    assert whole.endswith(found)
    assert found.endswith(completion + "<|im_end|>")
    joint = starting.encode(prompt + completion).ids
    if joint[: len(alone)] == alone:  # the two ways of masking agree where there are two
        assert list(example.labels[len(alone) :]) == [*joint[len(alone) :], END, -100]
    else:
        assert len(found) > len(completion + "<|im_end|>")


def test_a_token_across_the_border_is_counted(tmp_path, starting):
    rows = [{"prompt": "Fr", "completion": "ance"}, {"prompt": "a", "completion": " b"}]
    found = data(tmp_path, starting, "causal-lm", *rows)
    assert found.report.counts["tokens across a prompt's border"] == 1
    assert [learned(one, starting) for one in found.examples] == ["France<|im_end|>", " b<|im_end|>"]
    assert [one.nbytes for one in found.examples] == [6, 2]


def test_unmasked_prompts_are_learned(tmp_path, starting):
    rows = {"prompt": "the ", "completion": "cat"}, {"messages": TALK}
    found = [data(tmp_path, starting, "causal-lm", row, mask_prompt=False).examples[0] for row in rows]
    assert learned(found[0], starting) == "the cat<|im_end|>"
    assert learned(found[1], starting).count("<|im_end|>") == 4


@pytest.mark.parametrize("template", [None, SYSTEM, PLAIN], ids=["none", "with a system turn", "Jinja's"])
def test_the_assistants_turns_are_learned_with_their_end_tokens(tmp_path, template):
    tokenizer = loaded(bpe, tmp_path / "made", template=template)
    assert tokenizer.chat.chatml == {None: "", SYSTEM: "Be good.", PLAIN: None}[template]
    found = data(tmp_path, tokenizer, "causal-lm", {"messages": TALK})
    assert learned(found.examples[0], tokenizer) == "the mat <|im_end|> 12<|im_end|>"
    assert found.examples[0].nbytes == len("the mat  12")
    text = tokenizer.decode(found.examples[0].sequences[0].ids)
    begins = "<|im_start|>system\nBe good.<|im_end|>\n" if template == SYSTEM else ""
    assert text.startswith(
        f"{begins}<|im_start|>user\nthe cat?<|im_end|>\n<|im_start|>assistant\nthe mat <|im_end|>\n"
    )
    assert tokenizer.chat.render(TALK[:1], generation=True).text.endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize("system", [False, True])
def test_chatml_is_what_jinja_makes_of_its_template(tmp_path, system, generation):
    ours = loaded(bpe, tmp_path / "a", template=SYSTEM).chat
    jinja = loaded(bpe, tmp_path / "b", template=SYSTEM + "{# apart #}").chat
    assert jinja.chatml is None
    messages = [{"role": "system", "content": "Go."}] * system + TALK
    assert ours.render(messages, generation=generation) == jinja.render(messages, generation=generation)


def test_what_templates_use_besides_jinjas_own(tmp_path):
    """Marks of the assistant's part, leaving a loop, JSON for people."""
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{% break %}{% endif %}<|im_start|>{{ m.role }}\n"
        "{%- generation %}{{ m.content | tojson }}{%- endgeneration %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    tokenizer = loaded(bpe, tmp_path / "made", template=template)
    talk = [{"role": "user", "content": "é<"}, {"role": "assistant", "content": "a'b"}]
    text, turns = tokenizer.chat.render([*talk, {"role": "tool", "content": "x"}])
    assert text == '<|im_start|>user"é<"<|im_end|>\n<|im_start|>assistant"a\'b"<|im_end|>\n'
    assert [text[begin:end] for begin, end in turns] == ['"a\'b"<|im_end|>']


def test_messages_that_spell_a_special_token_are_counted(tmp_path, byte_level):
    talk = [{"role": "user", "content": "a<|im_end|>b"}, {"role": "assistant", "content": "c"}]
    found = data(tmp_path, byte_level, "causal-lm", {"messages": talk}, {"messages": TALK})
    assert found.report.counts["rows whose messages spell a special token"] == 1
    assert learned(found.examples[0], byte_level) == "c<|im_end|>"


def test_a_chat_template_of_its_own_file_comes_first(tmp_path):
    (bpe(tmp_path, template=SYSTEM) / "chat_template.jinja").write_text(PLAIN)
    assert load_tokenizer(tmp_path).chat.template == PLAIN
    (tmp_path / "chat_template.jinja").unlink()
    assert load_tokenizer(tmp_path).chat.template == SYSTEM


def test_of_several_templates_the_default_is_taken(tmp_path):
    bpe(tmp_path, chat_template=[{"name": "tools", "template": "x"}, {"name": "default", "template": PLAIN}])
    assert load_tokenizer(tmp_path).chat.template == PLAIN


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for", "expected a Jinja template, got"),
        ("{{ raise_exception('no system turn') }}", "that the chat template can write, got no system turn"),
        ("{{ messages.__class__.__mro__ }}", "that the chat template can write, got access to attribute"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "that the chat template can write, got"),
        ("{% for i in range(10**9) %}x{% endfor %}", "that the chat template can write, got Range too big"),
        ("{{ messages.append(1) }}", "that the chat template can write, got"),
        (
            "{{ messages | length }}",
            "a template whose text of messages 1 to 2 begins its text of all, got another",
        ),
        ("{% for m in messages %}", "expected a Jinja template, got"),
    ],
)
def test_templates_that_are_refused(tmp_path, template, said):
    tokenizer = loaded(bpe, tmp_path / "made", template=template)
    with pytest.raises(FormatError, match=rf"train\.jsonl:1: messages: .*{re.escape(said)}") as refused:
        data(tmp_path, tokenizer, "causal-lm", {"messages": TALK})
    assert "\n" not in str(refused.value)


def test_without_jinja_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    tokenizer = loaded(bpe, tmp_path / "made", template=PLAIN)
    with pytest.raises(BackendError, match=r"pip install 'lorax-np\[chat\]'"):
        data(tmp_path, tokenizer, "causal-lm", {"messages": TALK})
    assert data(tmp_path, loaded(bpe, tmp_path / "b", template=SYSTEM), "causal-lm", {"messages": TALK})


def test_messages_need_a_template(tmp_path, bert):
    with pytest.raises(
        FormatError, match=r"train\.jsonl:1: messages: expected a tokenizer with a chat template"
    ):
        data(tmp_path, bert, "causal-lm", {"messages": TALK})
    endless = loaded(bpe, tmp_path / "endless", eos_token=None)
    assert data(tmp_path, endless, "causal-lm", {"messages": TALK}).examples
    with pytest.raises(FormatError, match="an end token, eos_token, with which texts end, got none"):
        data(tmp_path, endless, "causal-lm", {"text": "the"})


@pytest.mark.parametrize("text", ["the", "<|im_start|>the", "the<|im_end|>", "<|im_start|>the<|im_end|>"])
def test_exactly_one_start_and_one_end_token(tmp_path, starting, text):
    found = data(tmp_path, starting, "causal-lm", {"text": text})
    ids = list(found.examples[0].sequences[0].ids)
    assert (ids.count(START), ids.count(END), ids[0], ids[-1]) == (1, 1, START, END)
    assert found.report.counts["sequences with 1 start tokens"] == 1
    assert not [line for line in found.report.lines() if line.startswith("warning")]


def test_doubled_start_and_end_tokens_are_warned_of(tmp_path, starting):
    found = data(tmp_path, starting, "causal-lm", {"text": "<|im_start|><|im_start|>a<|im_end|><|im_end|>"})
    lines = found.report.lines()
    assert "warning: train.jsonl: sequences with two start tokens side by side: 1" in lines
    assert "warning: train.jsonl: sequences with two end tokens side by side: 1" in lines


def test_a_gguf_file_that_adds_tokens(tmp_path):
    made = gguf(tmp_path / "a.gguf", add_bos_token=("bool", True), add_eos_token=("bool", True))
    tokenizer = load_tokenizer(made)
    (example,) = data(tmp_path, tokenizer, "causal-lm", {"text": "the"}).examples
    assert tokenizer.decode(example.sequences[0].ids) == "<|im_start|>the<|im_end|>"


def test_what_is_cut_is_counted_and_has_no_end(tmp_path, starting):
    rows = {"text": "c" * 20}, {"prompt": "d" * 9, "completion": "c"}, {"text": "c" * 6}
    found = [data(tmp_path, starting, "causal-lm", row, max_length=8, stride=0) for row in rows]
    assert [list(one.examples[0].sequences[0].ids).count(END) for one in found] == [0, 0, 1]
    assert [one.examples[0].tokens for one in found] == [8, 8, 8]
    assert [one.report.counts["tokens cut"] for one in found] == [14, 4, 0]
    assert [one.report.counts["rows cut to the maximal length"] for one in found] == [1, 1, 0]
    assert found[0].examples[0].nbytes == 7
    assert "train.jsonl: tokens cut: 14" in found[0].report.lines()
    assert found[1].examples[0].kept == 0
    assert found[1].report.lines()[-1].startswith("warning: train.jsonl: 1 rows without a label, first ")


def test_a_character_that_no_token_spells_is_counted(tmp_path):
    """As SmolLM2's vocabulary, which lacks 21 bytes, six control characters among them."""
    tokens = bytes_vocabulary(without="z")
    kinds = [3 if token in CONTROLS else 1 for token in tokens]
    made = gguf(tmp_path / "a.gguf", tokens=("array of string", tokens), token_type=("array of int32", kinds))
    found = data(tmp_path, load_tokenizer(made), "causal-lm", {"text": "azb"}, {"text": "ab"})
    assert found.report.counts["rows whose tokens do not give their text back"] == 1
    assert "train.jsonl: rows whose tokens do not give their text back: 1" in found.report.lines()


def test_repeated_rows_and_keys_that_nothing_reads_are_reported(tmp_path, starting):
    rows = [{"text": "a"}] * 3 + [{"text": "b", "id": 1}]
    lines = data(tmp_path, starting, "causal-lm", *rows).report.lines()
    assert "train.jsonl: keys not read: 'id'" in lines
    assert not [line for line in lines if "repeat" in line]
    lines = data(tmp_path, starting, "causal-lm", *rows[:3]).report.lines()
    assert "warning: train.jsonl: 2 of 3 rows repeat an earlier one" in lines
    assert lines[0] == "train.jsonl: 3 rows, 3 examples, 9 tokens, 6 labels (66.7%)"


@pytest.mark.parametrize(
    ("settings", "said"), [({"max_length": 7}, "max_length"), ({"stride": 1024}, "stride")]
)
def test_settings_that_leave_no_room(tmp_path, starting, settings, said):
    with pytest.raises(ConfigError, match=f"^{said}: expected"):
        data(tmp_path, starting, "causal-lm", {"text": "a"}, **settings)


def test_training_names_the_classes_for_all_splits(tmp_path, bert):
    rows_file(tmp_path / "train.jsonl", {"text": "a", "label": "x"}, {"text": "a", "label": "y"})
    rows_file(tmp_path / "valid.jsonl", {"text": "a", "label": "y"}, {"text": "a", "label": "z"})
    with pytest.raises(FormatError, match=r"valid\.jsonl:2: label: expected one of x, y, got 'z'"):
        load_data(tmp_path, bert, task="seq-cls")
    rows_file(tmp_path / "valid.jsonl", {"text": "a", "label": "y"})
    found = load_data(tmp_path, bert, task="SEQ_CLS")
    assert found["valid"].examples[0].labels == 1
    assert found["valid"].labels == Labels("single", ("x", "y"))


def test_classes_are_for_tasks_that_have_them(tmp_path, starting):
    file, known = rows_file(tmp_path / "train.jsonl", {"text": "a"}), Labels("single", ("x", "y"))
    assert load_data(file, starting, task="causal-lm", labels=known)["train"].labels is None
    with pytest.raises(ConfigError, match="labels: expected the classes of SEQ_CLS, got none"):
        encode_rows(read_rows(file, "causal-lm"), starting, task="SEQ_CLS", settings=Settings(), labels=None)


# ---- heads -------------------------------------------------------------------------------------------------


def test_a_text_and_two_texts_with_their_types(tmp_path, bert):
    rows = (
        {"text": "the cat", "text_pair": "on mat", "label": "x"},
        {"text": "a", "text_pair": "b", "label": "y"},
    )
    example = data(tmp_path, bert, "seq-cls", *rows).examples[0]
    assert bert.decode(example.sequences[0].ids) == "[CLS] the cat [SEP] on mat [SEP]"
    assert example.sequences[0].types.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert data(tmp_path, bert, "seq-cls", *rows, typed=False).examples[0].sequences[0].types is None
    alone = data(tmp_path, bert, "seq-cls", {"text": "the", "label": 0.5}).examples[0]
    assert (alone.labels, alone.sequences[0].types, alone.tokens) == (0.5, None, 3)


def test_two_texts_are_cut_as_the_library_cuts_them(bert):
    made = bert._library
    for room in (5, 6, 7):
        made.enable_truncation(room + 3)
        for a in range(1, 12):
            for b in range(1, 12):
                kinds = made.encode("the " * a, "cat " * b).sequence_ids
                assert shared_room(a, b, room) == (kinds.count(0), kinds.count(1)), (a, b, room)
    made.no_truncation()


def test_several_classes_at_once(tmp_path, bert):
    found = data(tmp_path, bert, "seq-cls", {"text": "a", "label": ["x", "z"]}, {"text": "a", "label": ["y"]})
    assert [example.labels.tolist() for example in found.examples] == [[1, 0, 1], [0, 1, 0]]


def test_a_words_tag_stands_at_its_first_token(tmp_path, bert, byte_level):
    words, tags = ["the", "Unbelievable", "\u200b", "paris!", ""], ["O", "B-X", "O", "B-P", "O"]
    for tokenizer in (bert, byte_level):
        found = data(tmp_path, tokenizer, "token-cls", {"tokens": words, "tags": tags})
        example, lost = found.examples[0], found.report.counts["words without a tag, for want of a token"]
        at = np.flatnonzero(example.labels != -100)
        names = [found.labels.names[i] for i in example.labels[at]]
        tokens = [tokenizer.decode([i]).strip(" #") for i in example.sequences[0].ids[at]]
        if tokenizer is bert:
            assert (names, tokens, lost) == (["O", "B-X", "B-P"], ["the", "un", "paris"], 2)
        else:
            assert (names, lost, example.kept) == (["O", "B-X", "O", "B-P"], 1, 4)
            assert [tokens[i] for i in (0, 1, 3)] == ["t", "U", "p"] or tokens[0] == "t"


def test_a_token_of_two_words_is_the_first_ones():
    assert first_tokens(["a", "b", "c"], [(0, 3), (3, 5)]) == [0, None, 1]
    assert first_tokens(["a", "b"], [(0, 3), (2, 3)]) == [0, 1]


def test_a_characters_bytes_count_where_its_first_token_is_learned():
    offsets = [(0, 1), (1, 2), (1, 2), (2, 3)]  # the middle one, of four bytes, has two tokens
    counted = [text_bytes("a😀b", offsets, [i >= first for i in range(4)]) for first in range(5)]
    assert counted == [6, 5, 1, 1, 0]


def test_first_tokens_are_those_of_words_given_apart(bert):
    words = ["unbelievable", "cat", "d?", "the", "", "Paris"]
    apart = bert._library.encode(words, is_pretokenized=True, add_special_tokens=False).word_ids
    theirs = [apart.index(i) if i in apart else None for i in range(len(words))]
    assert first_tokens(words, bert.encode(" ".join(words)).offsets) == theirs


def test_tags_that_are_cut_off_are_counted(tmp_path, bert):
    row = {"tokens": ["the"] * 10, "tags": [0] * 9 + [1]}
    found = data(tmp_path, bert, "token-cls", row, max_length=8, stride=0)
    assert found.examples[0].labels.tolist() == [-100, *[0] * 6, -100]
    assert found.report.counts["words without a tag, for want of a token"] == 4
    with pytest.raises(FormatError, match=r"train\.jsonl:1: tags: tag 10: expected an index below 1, got 1"):
        data(tmp_path, bert, "token-cls", row, labels=Labels("single", ("only",)))


def test_the_decoder_reads_what_it_is_to_write_one_token_late(tmp_path, folder):
    t5 = loaded(t5_like, folder / "t5")
    rows = {"source": "the cat", "target": "le chat"}, {"source": "the", "target": "le </s>"}
    found = data(tmp_path, t5, "seq2seq-lm", *rows)
    first, second = found.examples
    assert (first.sequences[0].ids.tolist(), first.labels.tolist()) == ([3, 4, 1], [5, 6, 1])
    assert (first.decoder.tolist(), first.kept, first.nbytes) == ([0, 5, 6], 3, 7)
    assert (second.labels.tolist(), second.decoder.tolist()) == ([5, 1], [0, 5])
    assert data(tmp_path, t5, "seq2seq-lm", rows[0], decoder_start=4).examples[0].decoder.tolist() == [4, 5, 6]
    long = {"source": "the " * 20, "target": "le " * 20}
    cut = data(tmp_path, t5, "seq2seq-lm", long, max_length=8, stride=0)
    assert (cut.examples[0].tokens, len(cut.examples[0].labels)) == (8, 8)
    assert cut.examples[0].sequences[0].ids[-1] == 1
    assert cut.report.counts["tokens cut"] == 13 + 13
    assert cut.examples[0].nbytes == len("le " * 8) - 1


def test_a_decoder_needs_a_first_token(tmp_path, folder):
    bare = loaded(bpe, folder / "bare", pad_token=None)
    with pytest.raises(ConfigError, match="got no decoder_start"):
        data(tmp_path, bare, "seq2seq-lm", {"source": "a", "target": "b"})


def test_pairs_are_two_sequences(tmp_path, bert):
    rows = {"text": "the cat", "text_pair": "a", "score": 1}
    (example,) = data(tmp_path, bert, "feature-extraction", rows).examples
    assert [bert.decode(one.ids) for one in example.sequences] == ["[CLS] the cat [SEP]", "[CLS] a [SEP]"]
    assert example.labels == 1.0
    assert (
        data(tmp_path, bert, "feature-extraction", {"text": "a", "text_pair": "b"}).examples[0].labels is None
    )


def test_a_text_without_a_token_is_refused(tmp_path, byte_level):
    with pytest.raises(FormatError, match=r"train\.jsonl:1: expected at least one token, got none"):
        data(tmp_path, byte_level, "feature-extraction", {"text": "", "text_pair": "b"})


# ---- questions ---------------------------------------------------------------------------------------------

CONTEXT = "the cat sat on the mat . paris is a b c d , where in paris ? the cat is on the mat !"


def test_windows_share_a_stride_and_cover_all(bert):
    for length in (1, 7, 8, 9, 30):
        for room, stride in ((8, 3), (8, 0), (3, 2)):
            begins = windows(length, room, stride)
            made = bert._library.encode("the " * length, add_special_tokens=False)
            made.truncate(room, stride)
            theirs = [made, *made.overflowing]
            assert [min(room, length - begin) for begin in begins] == [len(one.ids) for one in theirs]
            assert [4 * begin for begin in begins] == [one.offsets[0][0] for one in theirs]


@pytest.mark.parametrize("text", ["paris", "the mat", "mat !", "the cat sat", "Mat"])
def test_an_answer_is_where_its_rows_say(tmp_path, bert, text):
    context = CONTEXT.replace("mat !", "Mat !") if text == "Mat" else CONTEXT
    row = {"question": "where ?", "context": context, "answer": {"text": text, "start": context.rindex(text)}}
    found = data(tmp_path, bert, "question-ans", row, max_length=16, stride=4)
    assert len(found.examples) == found.report.counts["windows"] == 3
    with_answer = [example for example in found.examples if example.labels.any()]
    assert with_answer
    assert found.report.counts["windows without the answer"] == 3 - len(with_answer)
    for example in with_answer:
        first, last = example.labels
        assert bert.decode(example.sequences[0].ids[first : last + 1]) == text.lower().replace(" !", "!")
        assert example.sequences[0].types[first : last + 1].all()
        z = np.zeros((example.tokens, 2))
        z[first, 0] = z[last, 1] = 1.0
        assert best_answer(example.window, z).text == text
    sizes = [example.tokens for example in found.examples]
    assert max(sizes) == 16
    zs = [np.zeros((example.tokens, 2)) for example in found.examples]
    for example, z in zip(found.examples, zs, strict=True):
        if example is with_answer[-1]:
            z[example.labels[0], 0] = z[example.labels[1], 1] = 1.0
    assert list(answers(found.examples, zs).values()) == [(text, text)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_window_has_an_answer_if_it_has_all_its_tokens(tmp_path, bert, size):
    """Every run of tokens as an answer, tokens without a space between among them."""
    context = "the cat,sat.on the mat!paris is,a b?c d the cat"
    offsets = bert.encode(context).offsets
    rows = [
        {"question": "where", "context": context, "answer": {"text": context[begin:end], "start": begin}}
        for (begin, _), (_, end) in zip(offsets, offsets[size - 1 :], strict=False)
    ]
    found = data(tmp_path, bert, "question-ans", *rows, max_length=11, stride=3)
    begins = windows(len(offsets), 11 - 4, 3)
    assert len(found.examples) == len(rows) * len(begins)
    for i, example in enumerate(found.examples):
        first, begin = i // len(begins), begins[i % len(begins)]
        there = first >= begin and first + size <= min(begin + 7, len(offsets))
        rows_of_it = (3 + first - begin, 3 + first + size - 1 - begin) if there else (0, 0)
        assert tuple(example.labels) == rows_of_it


def test_a_part_of_a_token_is_that_token(tmp_path, starting):
    """Byte-level tokens begin with a space, which an answer does not."""
    row = {"question": "?", "context": "in France 😀", "answer": {"text": "rance", "start": 4}}
    (example,) = data(tmp_path, starting, "question-ans", row).examples
    first, last = example.labels
    assert starting.decode(example.sequences[0].ids[first : last + 1]) == "France"
    row["answer"] = {"text": "😀", "start": 10}
    (example,) = data(tmp_path, starting, "question-ans", row).examples
    assert starting.decode(example.sequences[0].ids[example.labels[0] : example.labels[1] + 1]).strip() == "😀"


def test_answers_that_no_window_holds_are_counted(tmp_path, bert):
    row = {"question": "?", "context": CONTEXT, "answer": {"text": CONTEXT[:60], "start": 0}}
    found = data(tmp_path, bert, "question-ans", row, max_length=12, stride=2)
    assert found.report.counts["answers in no window"] == 1
    assert not any(example.labels.any() for example in found.examples)


def test_questions_and_answers_that_are_refused(tmp_path, bert):
    row = {"question": "the " * 9, "context": "\u200b a", "answer": {"text": "a", "start": 2}}
    with pytest.raises(FormatError, match=r"train\.jsonl:1: question: expected at most 8 tokens .* got 9"):
        data(tmp_path, bert, "question-ans", row, max_length=16, stride=4)
    row = {"question": "the", "context": "\u200b a", "answer": {"text": "\u200b", "start": 0}}
    with pytest.raises(FormatError, match=r"train\.jsonl:1: answer: expected a text of at least one token"):
        data(tmp_path, bert, "question-ans", row)


def test_the_best_answer_is_the_best_of_all_pairs(tmp_path, bert):
    row = {
        "question": "where ?",
        "context": CONTEXT,
        "answer": {"text": "paris", "start": CONTEXT.index("paris")},
    }
    (example,) = data(tmp_path, bert, "question-ans", row).examples
    z = np.random.default_rng(0).normal(size=(example.tokens, 2))
    z[0] = 99.0  # outside the context: no answer
    first, n = example.window.first, len(example.window.offsets)
    pairs = [(z[first + i, 0] + z[first + j, 1], i, j) for i in range(n) for j in range(i, min(n, i + 5))]
    score, i, j = max(pairs)
    found = best_answer(example.window, z, longest=5)
    offsets = example.window.offsets
    assert found.score == pytest.approx(score, abs=1e-12)
    assert found.text == CONTEXT[offsets[i][0] : offsets[j][1]]
    z[:] = 0.0
    z[first, 0] = z[first + 5, 1] = 9.0  # the best pair is six tokens long
    assert best_answer(example.window, z, longest=6).score == 18.0
    assert best_answer(example.window, z, longest=5).score == 9.0


# ---- what a person sees ------------------------------------------------------------------------------------


def test_a_first_example_shows_what_is_learned(tmp_path, starting, bert, folder):
    (example,) = data(tmp_path, starting, "causal-lm", {"prompt": "the ", "completion": "cat"}).examples
    head, text = shown(example, starting, task="CAUSAL_LM").split("\n", 1)
    assert head == f"first example, {example.where}: 4 of 8 tokens are learned"
    assert text == "⟦<|im_start|>the ⟧cat<|im_end|>"
    assert "\x1b[2m<|im_start|>the \x1b[0mcat" in shown(example, starting, task="CAUSAL_LM", colour=True)
    cases = {
        "token-cls": ({"tokens": ["the", "cat"], "tags": ["O", "B-X"]}, "[CLS]/· the/O cat/B-X [SEP]/·"),
        "question-ans": (
            {"question": "a", "context": "the cat", "answer": {"text": "cat", "start": 4}},
            "answer: 'cat', rows 4 to 4\n[CLS] a [SEP] the cat [SEP]",
        ),
        "feature-extraction": ({"text": "a", "text_pair": "b"}, "a pair\n[CLS] a [SEP] ↔ [CLS] b [SEP]"),
        "seq-cls": ({"text": "a", "label": ["x", "y"]}, "label: x, y\n[CLS] a [SEP]"),
    }
    for task, (row, wanted) in cases.items():
        found = data(tmp_path, bert, task, row)
        assert wanted in shown(found.examples[0], bert, task=found.report.task, labels=found.labels), task
    t5 = loaded(t5_like, folder / "t5 shown")
    found = data(tmp_path, t5, "seq2seq-lm", {"source": "the", "target": "le"})
    assert "2 tokens are learned, 2 read\nthe </s> → le </s>" in shown(
        found.examples[0], t5, task="SEQ_2_SEQ_LM"
    )


def test_words_of_the_samples_are_what_they_seem():
    assert len(set(WORDS)) == len(WORDS)
