"""Files of rows: every format, every refusal by file and line, and files that were damaged."""

import json
import random

import pytest
from text_samples import bpe, rows_file

from lorax_np.errors import ConfigError, FormatError
from lorax_np.text.batches import Feed
from lorax_np.text.data import load_data
from lorax_np.text.labels import Labels, labels_of, labels_of_config
from lorax_np.text.rows import FORMATS, TASKS, data_files, read_rows, task_name
from lorax_np.text.tokenizer import load_tokenizer

TURN = {"role": "user", "content": "Hi"}
GOOD = {  # a row of each format
    ("causal-lm", "text"): {"text": "a"},
    ("causal-lm", "prompt"): {"prompt": "a", "completion": "b"},
    ("causal-lm", "messages"): {"messages": [TURN]},
    ("seq-cls", "one"): {"text": "a", "label": "x"},
    ("seq-cls", "two"): {"text": "a", "text_pair": "b", "label": 1},
    ("token-cls", "tags"): {"tokens": ["a", "b"], "tags": ["O", "B-X"]},
    ("question-ans", "answer"): {"question": "a?", "context": "b c", "answer": {"text": "c", "start": 2}},
    ("seq2seq-lm", "target"): {"source": "a", "target": "b"},
    ("feature-extraction", "pair"): {"text": "a", "text_pair": "b"},
    ("feature-extraction", "score"): {"text": "a", "text_pair": "b", "score": 0.5},
}
BAD = [  # a task, what is changed in its row, and what is said
    ("causal-lm", {"text": 3}, "text: expected a text, got 3"),
    ("causal-lm", {"text": None}, "text: expected a text, got None"),
    ("causal-lm", {"text": "\ud800"}, "text: expected Unicode, got half of a surrogate pair at character 0"),
    ("causal-lm", {"prompt": "a"}, r"expected the keys text, as in line 1, got 'prompt'"),
    ("seq-cls", {"label": True}, "label: expected a class by name or index, a list of classes, or a number"),
    ("seq-cls", {"label": None}, "label: expected a class"),
    ("seq-cls", {"label": {}}, "label: expected a class"),
    ("seq-cls", {"label": [0.5]}, "label: expected a class"),
    ("seq-cls", {"label": [["x"]]}, "label: expected a class"),
    ("seq-cls", {"label": 10**300}, "label: expected a class"),
    ("token-cls", {"tokens": []}, r"tokens: expected a list of words, got \[\]"),
    ("token-cls", {"tokens": "ab"}, "tokens: expected a list of words, got 'ab'"),
    ("token-cls", {"tokens": ["a", 1]}, "tokens: word 2: expected a text, got 1"),
    ("token-cls", {"tags": ["O"]}, "tags: expected 2 tags, one a word, got 1"),
    ("token-cls", {"tags": ["O", 0.5]}, "tags: tag 2: expected a class by name or index, got 0.5"),
    ("token-cls", {"tags": ["O", ["O"]]}, "tags: tag 2: expected a class"),
    ("question-ans", {"answer": "c"}, "answer: expected an object with text and start, in characters, got 'c'"),
    (
        "question-ans",
        {"answer": {"text": "c", "start": 1}},
        "answer: expected 'c' at character 1 of the context, got ' '; .* at 2",
    ),
    ("question-ans", {"answer": {"text": "d", "start": 2}}, ".* got 'c'; it stands nowhere in it"),
    ("question-ans", {"answer": {"text": "c", "start": 9}}, ".*at character 9 of the context, got ''"),
    (
        "question-ans",
        {"answer": {"text": "c", "start": -1}},
        "answer: start: expected a character's number, from 0, got -1",
    ),
    ("question-ans", {"answer": {"text": "c", "start": 2.0}}, "answer: start: expected a character's number"),
    (
        "question-ans",
        {"answer": {"text": " ", "start": 1}},
        "answer: text: expected a piece of the context, got ' '",
    ),
    ("seq2seq-lm", {"target": ["b"]}, "target: expected a text"),
    ("feature-extraction", {"text_pair": 1}, "text_pair: expected a text, got 1"),
]
MESSAGES = [
    ([], r"expected a list of messages, each with a role and a content, got \[\]"),
    ("Hi", "expected a list of messages"),
    ([TURN, "Hi"], "message 2: expected an object with role and content, got 'Hi'"),
    ([{"role": "user"}], "message 1: expected an object with role and content"),
    ([{"role": "usr", "content": ""}], "message 1: role: expected one of system, user, assistant.*got 'usr'"),
    ([{"role": ["user"], "content": ""}], "message 1: role: expected one of"),
    ([{"role": "user", "content": [{"type": "text"}]}], "message 1: content: expected a text"),
]


@pytest.mark.parametrize(("task", "row"), [(task, row) for (task, _), row in GOOD.items()])
def test_each_format_is_known_by_its_keys(tmp_path, task, row):
    found = read_rows(rows_file(tmp_path / "a.jsonl", row, "", {**row, "id": 7}), task)
    assert set(found.keys) == set(row)
    assert [one.fields for one in found.rows] == [row, row]
    assert [one.where.rpartition(":")[2] for one in found.rows] == ["1", "3"]
    assert found.ignored == ("id",)


def test_the_samples_have_every_format():
    assert {keys for formats in FORMATS.values() for keys in formats} == {tuple(row) for row in GOOD.values()}
    assert {TASKS[task] for task, _ in GOOD} == set(FORMATS)


@pytest.mark.parametrize(("task", "changed", "said"), BAD)
def test_a_bad_value_is_named_by_file_and_line(tmp_path, task, changed, said):
    good = next(row for (of, _), row in GOOD.items() if of == task)
    bad = changed if changed == {"prompt": "a"} else {**good, **changed}
    with pytest.raises(FormatError, match=rf"a\.jsonl:3: {said}") as refused:
        read_rows(rows_file(tmp_path / "a.jsonl", good, "", bad), task)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("messages", "said"), MESSAGES)
def test_bad_messages(tmp_path, messages, said):
    with pytest.raises(FormatError, match=rf"a\.jsonl:1: messages: {said}"):
        read_rows(rows_file(tmp_path / "a.jsonl", {"messages": messages}), "causal-lm")


@pytest.mark.parametrize("score", [1.5, -2, True, "1", None])
def test_a_score_is_a_cosine(tmp_path, score):
    with pytest.raises(FormatError, match="score: expected a number from -1 to 1, as a cosine is"):
        read_rows(
            rows_file(tmp_path / "a.jsonl", {"text": "", "text_pair": "", "score": score}), "feature-extraction"
        )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "one JSON object on the line, got Expecting property name"),
        (b'{"text": "a"} {"text": "b"}', "one JSON object on the line, got Extra data at column 15"),
        (b'["a"]', r"a JSON object, got \['a'\]"),
        (b"3", "a JSON object, got 3"),
        (b'{"text": "\xff"}', "text in UTF-8, got another byte at column 11"),
        (b'{"text": "a", "text": "b"}', "JSON, got"),
        (b'{"text": NaN}', "JSON, got NaN, which JSON does not have"),
        (b'{"text": ' + b"9" * 5000 + b"}", "JSON, got Exceeds the limit"),
        (b"[" * 200_000, "JSON nested too deep|one JSON object"),
        (
            b"{}",
            r"expected the keys of one format, \{text\} or \{prompt, completion\} or \{messages\}, got none",
        ),
        (b'{"txt": "a"}', "keys of one format.*got 'txt'"),
        (b'{"text": "a", "messages": []}', r"keys of one format.*got \{text\} and \{messages\}"),
    ],
)
def test_lines_that_are_no_row(tmp_path, line, said):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n" + line + b"\n")
    with pytest.raises(FormatError, match=rf"a\.jsonl:2: .*{said}") as refused:
        read_rows(file, "causal-lm")
    assert "\n" not in str(refused.value)


def test_lines_end_at_newlines_alone(tmp_path):
    """A text of JSON may hold characters that end lines elsewhere; a file may begin with a byte-order mark."""
    file = tmp_path / "a.jsonl"
    file.write_bytes('\ufeff{"text": "a\u2028b\x85c"}\r\n{"text": "d"}'.encode())
    assert [row.fields["text"] for row in read_rows(file, "causal-lm").rows] == ["a\u2028b\x85c", "d"]


def test_files_and_directories(tmp_path):
    with pytest.raises(FileNotFoundError):
        data_files(tmp_path / "nowhere.jsonl")
    with pytest.raises(FormatError, match=r"expected train\.jsonl in the directory, got no \.jsonl file"):
        data_files(tmp_path)
    rows_file(tmp_path / "valid.jsonl")
    with pytest.raises(FormatError, match=r"expected train\.jsonl in the directory, got valid\.jsonl"):
        data_files(tmp_path)
    rows_file(tmp_path / "train.jsonl", {"text": "a"})
    assert list(data_files(tmp_path)) == ["train", "valid"]
    assert data_files(tmp_path / "valid.jsonl") == {"train": tmp_path / "valid.jsonl"}
    with pytest.raises(FormatError, match=r"valid\.jsonl: expected at least one row, got none"):
        read_rows(tmp_path / "valid.jsonl", "causal-lm")
    (tmp_path / "a.json").touch()
    with pytest.raises(FormatError, match=r"expected a \.jsonl file"):
        data_files(tmp_path / "a.json")
    with pytest.raises(ConfigError, match=r"task: expected one of causal-lm, .* got 'causal'"):
        task_name("causal")


def test_damaged_lines_are_learned_from_or_refused_in_one_line(tmp_path):
    """400 lines of all formats with bytes and values changed: examples, or one line that says what is wrong."""
    tokenizer = load_tokenizer(bpe(tmp_path / "model"))
    draw, file, refused = random.Random(1), tmp_path / "a.jsonl", 0
    values = [None, True, -1, 1e400, "", "\ud800", [], {}, [[]], ["x"], {"text": 1}, 10**20, "\x00"]
    for turn in range(400):
        task, row = draw.choice([(task, row) for (task, _), row in GOOD.items()])
        bad = dict(row)
        if turn % 2:
            bad[draw.choice(list(row))] = draw.choice(values)
        raw = bytearray(json.dumps(bad).encode())
        for _ in range(draw.choice((0, 1, 3)) if turn % 2 else draw.choice((1, 2))):
            at = draw.randrange(len(raw))
            raw[at : at + draw.choice((0, 1, 5))] = draw.choice(
                (b"", b'"', b"}", b"\xc3", b"{", b"\\u", b"1e999")
            )
        file.write_bytes(json.dumps(row).encode() + b"\n" + raw)
        said = ""
        try:
            found = load_data(file, tokenizer, task=task)["train"]
            Feed(found.examples, task).step()
            "".join(found.report.lines()).encode()
        except (FormatError, ConfigError) as error:
            said, refused = str(error), refused + 1
        assert "\n" not in said
        assert not said or f"{file}:" in said or said.startswith("labels: expected at least two classes")
    assert refused > 200


# ---- labels ------------------------------------------------------------------------------------------------


def labels(tmp_path, *found, task="seq-cls"):
    key = "label" if task == "seq-cls" else "tags"
    rows = [
        {"text": "a", key: one} if key == "label" else {"tokens": ["a"] * len(one), key: one} for one in found
    ]
    return labels_of(read_rows(rows_file(tmp_path / "a.jsonl", *rows), task).rows, key)


def test_classes_are_names_in_order_indices_lists_or_numbers(tmp_path):
    assert labels(tmp_path, "b", "a", "b") == Labels("single", ("a", "b"))
    assert labels(tmp_path, 2, 0) == Labels("single", ("LABEL_0", "LABEL_1", "LABEL_2"))
    assert labels(tmp_path, ["b"], [], ["a", "b"]) == Labels("multi", ("a", "b"))
    assert labels(tmp_path, 1, 2.5) == Labels("regression", ("LABEL_0",))
    assert labels(tmp_path, ["O", "B-X"], ["O"], task="token-cls") == Labels("single", ("B-X", "O"))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (("a", 1), r"a\.jsonl:2: label: expected a class by name, as in the first row, got 1"),
        ((1, "a"), r"a\.jsonl:2: label: expected a class by index, as in the first row, got 'a'"),
        (("a", ["a"]), r"a\.jsonl:2: label: expected one class, as in the first row"),
        ((["a"], "a"), r"a\.jsonl:2: label: expected a list of classes, got 'a'"),
        ((1.5, "a"), r"a\.jsonl:2: label: expected a number, as other rows have, got 'a'"),
        ((["a"], [0]), r"a\.jsonl:2: label: expected a class by name"),
        ((-1, 1), r"a\.jsonl:1: label: expected an index from 0 to 65535, got -1"),
        ((0, 70000), r"a\.jsonl:2: label: expected an index from 0 to 65535, got 70000"),
    ],
)
def test_labels_of_two_kinds_are_refused_where_the_second_begins(tmp_path, found, said):
    with pytest.raises(FormatError, match=said):
        labels(tmp_path, *found)


@pytest.mark.parametrize("found", [("a", "a"), (0, 0), ([], [])])
def test_one_class_is_nothing_to_learn(tmp_path, found):
    with pytest.raises(ConfigError, match="at least two classes"):
        labels(tmp_path, *found)


def test_the_map_of_classes_goes_through_a_config():
    for made in (Labels("single", ("a", "b")), Labels("multi", ("a",)), Labels("regression", ("LABEL_0",))):
        assert labels_of_config(json.loads(json.dumps(made.to_config()))) == made
    assert labels_of_config({}) is None
    assert labels_of_config({"id2label": {"1": "b", "0": "a"}}) == Labels("single", ("a", "b"))
    for bad in ({"id2label": ["a"]}, {"id2label": {"1": "a"}}, {"id2label": {"x": "a"}}, {"id2label": {}}):
        with pytest.raises(ConfigError, match="id2label: expected names by index from 0"):
            labels_of_config(bad)
    with pytest.raises(ConfigError, match="problem_type: expected one of"):
        labels_of_config({"id2label": {"0": "a"}, "problem_type": "ranking"})


def test_values_of_labels():
    single, multi, number = (
        Labels("single", ("a", "b")),
        Labels("multi", ("a", "b", "c")),
        Labels("regression", ("x",)),
    )
    assert (single.value("f:1", "b"), single.value("f:1", 0)) == (1, 0)
    assert multi.value("f:1", ["c", 0]).tolist() == [1.0, 0.0, 1.0]
    assert multi.value("f:1", []).tolist() == [0.0, 0.0, 0.0]
    assert number.value("f:1", 2) == 2.0
    for made, label, said in [
        (single, "z", "one of a, b, got 'z'"),
        (single, 2, "an index below 2, got 2"),
        (single, ["a"], "one class by name or index"),
        (single, 0.5, "one class by name or index"),
        (multi, "a", "a list of classes"),
        (number, "a", "a number"),
    ]:
        with pytest.raises(FormatError, match=rf"^f:1: expected {said}"):
            made.value("f:1", label)
