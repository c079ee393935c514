"""Steps: every example once an epoch, the same on any number of ranks and from any place, counted before."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_samples import bpe, loaded, rows_file, t5_like, wordpiece

from lorax_np.errors import ConfigError
from lorax_np.models.records import Batch
from lorax_np.models.tasks import count
from lorax_np.text.batches import Feed, Position, batch_of, size
from lorax_np.text.data import load_data
from lorax_np.text.examples import Example, Settings, Tokens
from lorax_np.text.order import order
from lorax_np.text.rows import task_name


def ints(*values):
    return np.asarray(values, dtype=np.int64)


def causal(lengths):
    """Examples whose ids say which example and which row they are."""
    made = []
    for i, n in enumerate(lengths):
        ids = 1000 * i + np.arange(n)
        labels = np.append(ids[1:], -100)
        labels[: i % 3] = -100
        made.append(Example(f"a:{i}", (Tokens(ids),), labels, kept=int((labels != -100).sum())))
    return made


LENGTHS = [3, 1, 7, 2, 5, 4, 6, 3, 2, 8, 1]


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "ranks", "tokens"),
    [*product((1, 2, 4), (1, 3), (1, 2, 3), (None,)), *product((1,), (1, 2, 3), (1, 2, 3), (8, 12))],
)
def test_an_epoch_has_every_example_once_on_any_ranks(batch_size, accumulation, ranks, tokens):
    examples = causal(LENGTHS)
    feeds = [
        Feed(examples, "causal-lm", batch_size, accumulation, ranks, rank, seed=3, max_tokens=tokens)
        for rank in range(ranks)
    ]
    seen = []
    epochs = [list(feed.epoch(2)) for feed in feeds]
    assert {len(epoch) for epoch in epochs} == {feeds[0].steps(2)}
    for steps in zip(*epochs, strict=True):
        one = steps[0]
        assert all((step.n, step.examples, step.tokens, step.next) == one[1:] for step in steps)
        assert {len(step.batches) for step in steps} == {accumulation}
        numbers = {}
        for rank, step in enumerate(steps):
            places = [place for batch in step.batches for place in batch.index]
            assert places == list(range(rank, len(one.examples), ranks))
            for batch in step.batches:
                if tokens:
                    assert len(batch.ids) <= tokens
                else:
                    assert len(batch.index) <= batch_size
                for place, begin in zip(batch.index, batch.starts, strict=False):
                    numbers[place] = batch.ids[begin] // 1000
        assert [numbers[place] for place in range(len(one.examples))] == list(one.examples)
        labels = [batch.labels for step in steps for batch in step.batches]
        assert one.n == sum(int((found != -100).sum()) for found in labels)
        assert one.tokens == sum(len(found) for found in labels)
        seen += one.examples
    assert seen == order(len(examples), seed=3, epoch=2).tolist()


def test_one_large_batch_is_the_same_sequences_as_many_small_ones():
    """1 × 8 = 2 × 4 = 8 × 1, on one rank and on two: ids, labels, numbers in the step and the divisor."""
    examples = causal(LENGTHS[:8])

    def laid(*shape):
        batch_size, accumulation, ranks = shape
        found, divisors = {}, set()
        for rank in range(ranks):
            step = Feed(examples, "CAUSAL_LM", batch_size, accumulation, ranks, rank).step()
            divisors.add(step.n)
            for batch in step.batches:
                for number, begin, end in zip(batch.index, batch.starts, batch.starts[1:], strict=False):
                    found[number] = (batch.ids[begin:end].tolist(), batch.labels[begin:end].tolist())
        return dict(sorted(found.items())), divisors

    assert laid(8, 1, 1) == laid(4, 2, 1) == laid(1, 8, 1) == laid(2, 2, 2) == laid(1, 4, 2)


def test_a_resumed_epoch_goes_on_where_it_stopped():
    feed = Feed(causal(LENGTHS), "causal-lm", 2, seed=1)
    position, whole = Position(), []
    for _ in range(14):
        step = feed.step(position)
        whole.append(step.examples)
        position = step.next
        again = Feed(causal(LENGTHS), "causal-lm", 2, seed=1).step(position)
        assert again.examples == feed.step(position).examples
    assert position == Position(2, 4)
    assert whole[:6] == [step.examples for step in feed.epoch(0)]
    assert [len(examples) for examples in whole[:6]] == [2, 2, 2, 2, 2, 1]


def test_a_last_step_may_leave_ranks_without_work():
    step = Feed(causal([2, 3, 4]), "causal-lm", 1, 2, 2, 1, shuffle=False).step()
    assert [batch.index for batch in step.batches] == [(1,), ()]
    empty = step.batches[1]
    assert (empty.starts, empty.ids.shape, empty.labels.shape) == ((0,), (0,), (0,))
    assert empty.ids.dtype == empty.labels.dtype == np.int64
    assert step.n == (2 - 1) + (3 - 1 - 1) + (4 - 1 - 2)


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    ranks=st.integers(1, 3),
    accumulation=st.integers(1, 3),
)
def test_packing_ends_a_step_no_earlier_than_it_must(lengths, ranks, accumulation):
    examples = causal(lengths)
    feed = Feed(examples, "causal-lm", 1, accumulation, ranks, max_tokens=9, shuffle=False)
    step = feed.step()
    taken = len(step.examples)
    if taken < len(lengths):  # one more would not have gone into its rank's last micro-batch
        rank = taken % ranks
        mine = Feed(examples, "causal-lm", 1, accumulation, ranks, rank, max_tokens=9, shuffle=False).step()
        assert all(batch.index for batch in mine.batches)
        assert len(mine.batches[-1].ids) + lengths[taken] > 9


def test_the_order_is_a_permutation_that_changes_with_seed_and_epoch():
    found = {(seed, epoch): tuple(order(50, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(found.values())) == 4
    assert all(sorted(one) == list(range(50)) for one in found.values())
    assert order(0).tolist() == []
    assert order(1).tolist() == [0]


def test_no_place_is_preferred():
    """Of 1,200 orders of four, each of the 24 comes 50 times, within five standard deviations of 6.9."""
    counts = {}
    for epoch in range(1200):
        one = tuple(order(4, seed=7, epoch=epoch))
        counts[one] = counts.get(one, 0) + 1
    assert len(counts) == 24
    assert max(abs(n - 50) for n in counts.values()) < 5 * 6.9


@pytest.mark.parametrize(
    "arguments", [{"count": -1}, {"count": 1.5}, {"count": 3, "seed": -1}, {"count": 3, "epoch": 2**64}]
)
def test_orders_that_are_refused(arguments):
    count = arguments.pop("count")
    with pytest.raises(ConfigError, match="expected"):
        order(count, **arguments)


TASKS = {
    "causal-lm": (bpe, [{"prompt": "ab", "completion": "c d"}, {"prompt": "ab" * 30, "completion": "c"}]),
    "seq-cls": (wordpiece, [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]),
    "seq-cls, several": (wordpiece, [{"text": "a", "label": ["x"]}, {"text": "b", "label": ["y", "z"]}]),
    "seq-cls, a number": (wordpiece, [{"text": "a", "label": 0.5}, {"text": "b", "label": 2}]),
    "token-cls": (wordpiece, [{"tokens": ["a", "unbelievable"], "tags": ["O", "B-X"]}]),
    "question-ans": (
        wordpiece,
        [{"question": "a", "context": "the cat " * 30, "answer": {"text": "cat", "start": 4}}],
    ),
    "seq2seq-lm": (t5_like, [{"source": "the cat", "target": "le chat"}]),
    "feature-extraction": (wordpiece, [{"text": "a", "text_pair": "b"}] * 3),
    "feature-extraction, scored": (wordpiece, [{"text": "a", "text_pair": "b", "score": 0.5}] * 3),
}


@pytest.mark.parametrize("name", TASKS)
def test_the_divisor_is_what_the_models_count(tmp_path, name):
    (make, rows), task = TASKS[name], name.split(",")[0]
    tokenizer = loaded(make, tmp_path / "model")
    file = rows_file(tmp_path / "train.jsonl", *rows)
    found = load_data(file, tokenizer, task=task, settings=Settings(max_length=40, stride=4))["train"]
    step = Feed(found.examples, task, 2, 3).step()
    assert step.n == sum(count(task_name(task), batch.labels, batch.starts) for batch in step.batches)
    assert step.n == found.report.labelled


# ---- a batch of each task ----------------------------------------------------------------------------------


def test_tags_rows_and_classes():
    ids, types = Tokens(ints(1, 2, 3), ints(0, 0, 1)), Tokens(ints(4, 5), ints(0, 1))
    tags = [Example("a:1", (ids,), ints(-100, 1, 2)), Example("a:2", (types,), ints(0, -100))]
    batch = batch_of([(0, tags[0]), (2, tags[1])], "TOKEN_CLS", tags[0])
    assert batch.ids.tolist() == [1, 2, 3, 4, 5]
    assert batch.types.tolist() == [0, 0, 1, 0, 1]
    assert batch.labels.tolist() == [-100, 1, 2, 0, -100]
    assert (batch.starts, batch.index) == ((0, 3, 5), (0, 2))
    assert batch.rows.lengths == (3, 2)
    for labels, wanted in [
        ((1, 0), ints(1, 0)),
        ((0.5, 2.0), np.array([0.5, 2.0])),
        ((np.array([1.0, 0.0]), np.array([0.0, 0.0])), np.array([[1.0, 0.0], [0.0, 0.0]])),
        ((ints(1, 2), ints(0, 0)), ints([1, 2], [0, 0])),
    ]:
        examples = [Example("a:1", (ids,), one) for one in labels]
        task = "QUESTION_ANS" if wanted.shape == (2, 2) and wanted.dtype == np.int64 else "SEQ_CLS"
        found = batch_of(list(enumerate(examples)), task, examples[0]).labels
        assert found.tolist() == wanted.tolist()
        assert found.dtype == wanted.dtype
        none = batch_of([], task, examples[0])
        assert (none.labels.shape, none.labels.dtype) == ((0, *wanted.shape[1:]), wanted.dtype)
        assert none.types.shape == (0,)


def test_pairs_stand_in_two_halves_and_keep_their_numbers():
    def pair(i, score):
        return Example(f"a:{i}", (Tokens(ints(i)), Tokens(ints(10 * i, i))), score)

    batch = batch_of([(1, pair(1, 0.5)), (3, pair(2, -1.0))], "FEATURE_EXTRACTION", pair(1, 0.5))
    assert batch.ids.tolist() == [1, 2, 10, 1, 20, 2]
    assert batch.starts == (0, 1, 2, 4, 6)
    assert batch.index == (2, 6, 3, 7)
    assert batch.labels.tolist() == [0.5, -1.0]
    assert batch_of([(0, pair(1, None))], "FEATURE_EXTRACTION", pair(1, None)).labels is None
    steps = [
        Feed([pair(i, 0.0) for i in range(1, 6)], "feature-extraction", 2, 1, 2, rank).step() for rank in (0, 1)
    ]
    numbers = [number for step in steps for batch in step.batches for number in batch.index]
    assert sorted(numbers) == list(range(8))


def test_a_decoder_has_rows_of_its_own():
    one = Example("a:1", (Tokens(ints(1, 2)),), ints(7, 8, 9), ints(0, 7, 8), kept=3)
    two = Example("a:2", (Tokens(ints(3)),), ints(9), ints(0), kept=1)
    batch = batch_of([(0, one), (1, two)], "SEQ_2_SEQ_LM", one)
    assert isinstance(batch, Batch)
    assert batch.decoder_ids.tolist() == [0, 7, 8, 0]
    assert (batch.decoder_starts, batch.labels.tolist()) == ((0, 3, 4), [7, 8, 9, 9])
    assert batch.decoder_rows.index == (0, 1)
    assert (size(one), one.tokens) == (5, 2)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"accumulation": 0}, "accumulation: expected at least 1"),
        ({"ranks": 0}, "ranks: expected at least 1"),
        ({"ranks": 2, "rank": 2}, "rank: expected 0 <= rank < ranks=2, got 2"),
        ({"max_tokens": 3}, "max_tokens: expected room for the longest example, got 3 for 8 tokens at a:9"),
        ({"examples": []}, "examples: expected at least one, got none"),
        ({"task": "causal"}, "task: expected one of"),
    ],
)
def test_feeds_that_are_refused(changed, said):
    with pytest.raises(ConfigError, match=said):
        Feed(**{"examples": causal(LENGTHS), "task": "causal-lm", **changed})


@pytest.mark.parametrize("position", [Position(0, 11), Position(0, -1)])
def test_positions_that_are_refused(position):
    with pytest.raises(ConfigError, match="position: expected fewer than 11 examples used"):
        Feed(causal(LENGTHS), "causal-lm").step(position)
