"""Scores against their definitions, computed another way, and against cases worked by hand."""

from math import exp, log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_np.errors import ConfigError
from lorax_np.models.records import Batch
from lorax_np.text.examples import Example, Tokens, Window
from lorax_np.text.labels import Labels
from lorax_np.text.metrics import (
    accuracy,
    answer_score,
    entities,
    entity_score,
    likelihood,
    macro_f1,
    micro_f1,
    plain_answer,
    recall_at_1,
    spearman,
    written_match,
)
from lorax_np.text.scoring import likelihood_of, outputs_by_example, scores

classes = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20)
tags = st.lists(st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y"]), max_size=8)


@settings(max_examples=40)
@given(classes)
def test_macro_f1_is_the_mean_over_classes_of_a_table(pairs):
    predicted, right = zip(*pairs, strict=True)
    table = np.zeros((4, 4), dtype=int)
    for p, r in pairs:
        table[p, r] += 1
    f1s = []
    for c in set(predicted) | set(right):
        precision = table[c, c] / max(table[c].sum(), 1)
        recall = table[c, c] / max(table[:, c].sum(), 1)
        f1s.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    assert macro_f1(predicted, right) == pytest.approx(np.mean(f1s), abs=1e-12)
    assert accuracy(predicted, right) == pytest.approx(np.trace(table) / len(pairs), abs=1e-12)


def test_micro_f1_counts_all_entries():
    predicted, right = np.array([[1, 0, 1], [0, 0, 0]]), np.array([[1, 1, 0], [0, 1, 0]])
    assert micro_f1(predicted, right) == pytest.approx(2 * 1 / (2 + 3))
    assert micro_f1(np.zeros((2, 2)), np.zeros((2, 2))) == 0.0


@settings(max_examples=60)
@given(tags)
def test_entities_are_maximal_runs(found):
    """By another definition: one begins at B, or at I behind none of its type, and runs while I follow."""
    spans = set()
    for begin, tag in enumerate(found):
        before = found[begin - 1] if begin else "O"
        if tag[0] == "B" or (tag[0] == "I" and before[2:] != tag[2:]):
            end = begin + 1
            while end < len(found) and found[end] == f"I-{tag[2:]}":
                end += 1
            spans.add((tag[2:], begin, end))
    assert entities(found) == spans


def test_an_entity_counts_whole():
    right = [["B-X", "I-X", "O", "B-Y"], ["O"]]
    assert entity_score(right, right) == (1.0, 1.0, 1.0)
    assert entity_score([["B-X", "O", "O", "B-Y"], ["O"]], right) == (0.5, 0.5, 0.5)
    assert entity_score([["B-Y", "I-Y", "O", "B-Y"], ["B-X"]], right) == (1 / 3, 0.5, 0.4)
    assert entity_score([["O"] * 4, ["O"]], right) == (0.0, 0.0, 0.0)
    assert entity_score([[], ["B-X"]], [[], ["B-X"]]) == (1.0, 1.0, 1.0)  # a sentence whose words were all cut
    for predicted, wanted in (([["O"]], [["O", "O"]]), ([["O"]], [[]]), ([[]], [["O"]]), ([], [])):
        with pytest.raises(ConfigError, match="expected as many"):
            entity_score(predicted, wanted)


def test_an_entity_may_have_no_type():
    assert entities(["B-", "I-", "O", "B-X", "I-"]) == {("", 0, 2), ("X", 3, 4), ("", 4, 5)}


@pytest.mark.parametrize(
    ("predicted", "right", "exact", "f1"),
    [
        ("The Eiffel Tower.", "eiffel tower", 1.0, 1.0),
        ("in Paris", "Paris", 0.0, 2 / 3),
        ("Rome", "Paris", 0.0, 0.0),
        ("", "Paris", 0.0, 0.0),
        ("the", "a", 1.0, 1.0),
        ("b b c", "b c c", 0.0, 2 / 3),
        ("theatre an", "theatre", 1.0, 1.0),
    ],
)
def test_answers_in_plain_form(predicted, right, exact, f1):
    assert answer_score([predicted], [right]) == (exact, pytest.approx(f1))


def test_plain_answers_keep_words_that_hold_an_article():
    assert plain_answer("A  theatre, an-other") == "theatre another"


def test_likelihood_of_a_uniform_guess():
    """256 equally likely tokens of a byte each: 8 bits a byte, whatever the number of labels."""
    found = likelihood(5 * log(256), 5, 5)
    assert found.nll == pytest.approx(log(256))
    assert found.perplexity == pytest.approx(256)
    assert found.bits_per_byte == pytest.approx(8)
    assert likelihood(10 * log(256), 5, 10).bits_per_byte == pytest.approx(8)  # two bytes a token: the same
    assert likelihood(1.0, 1, 0).bits_per_byte is None
    assert likelihood(1e6, 1, 1).perplexity == float("inf")
    for total, labels in ((1.0, 0), (float("nan"), 1)):
        with pytest.raises(ConfigError, match="likelihood: expected a finite sum"):
            likelihood(total, labels, 1)


def test_recall_at_1_against_a_loop():
    rng = np.random.default_rng(0)
    y1 = rng.normal(size=(20, 3))
    y2 = y1 + rng.normal(size=(20, 3))
    hits = 0
    for i in range(20):
        near = [float(y1[i] @ y2[j]) for j in range(20)]
        hits += all(near[i] > near[j] for j in range(20) if j != i)
    assert 0 < hits < 20
    assert recall_at_1(y1, y2) == hits / 20
    assert recall_at_1(y1[:1], y2[:1]) == 1.0
    assert recall_at_1(np.ones((2, 1)), np.ones((2, 1))) == 0.0  # a tie


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12))
def test_spearman_is_the_correlation_of_mean_ranks(pairs):
    def ranks(values):
        return [sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]

    a, b = (ranks(side) for side in zip(*pairs, strict=True))
    found = spearman(*zip(*pairs, strict=True))
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)


@pytest.mark.parametrize("score", [accuracy, macro_f1, written_match, spearman, answer_score])
def test_nothing_has_no_score(score):
    for predicted, right in (([], []), (["a"], ["a", "b"])):
        with pytest.raises(ConfigError, match="predicted: expected as many as right"):
            score(predicted, right)


# ---- a model's outputs -------------------------------------------------------------------------------------


def example(labels, n=3, **more):
    return Example("a:1", (Tokens(np.arange(n)),), labels, **more)


def batch(starts):
    return Batch(np.zeros(starts[-1]), starts, None, tuple(range(len(starts) - 1)))


def test_outputs_go_to_their_examples():
    z = np.arange(10.0).reshape(5, 2)
    by = list(outputs_by_example("token-cls", batch((0, 2, 5)), z))
    assert [one.tolist() for one in by] == [z[:2].tolist(), z[2:].tolist()]
    assert [one.tolist() for one in outputs_by_example("seq-cls", batch((0, 9, 10)), z[:2])] == z[:2].tolist()
    pairs = list(outputs_by_example("feature-extraction", batch((0, 1, 2, 3, 4)), z[:4]))
    assert [one.tolist() for one in pairs] == [z[[0, 2]].tolist(), z[[1, 3]].tolist()]


def test_scores_of_classes():
    labels = Labels("single", ("a", "b"))
    found = scores("seq-cls", [example(0), example(1), example(1)], np.eye(2)[[0, 1, 0]], labels)
    assert found == {"accuracy": pytest.approx(2 / 3), "macro F1": pytest.approx(2 / 3)}
    multi = Labels("multi", ("a", "b"))
    rights = [example(np.array([1.0, 0.0])), example(np.array([1.0, 1.0]))]
    found = scores("seq-cls", rights, np.array([[0.3, -0.1], [1.0, -3.0]]), multi)
    assert found == {"exact match": 0.5, "micro F1": pytest.approx(2 * 2 / (2 + 3))}
    number = Labels("regression", ("x",))
    found = scores("seq-cls", [example(0.0), example(1.0)], np.array([[0.5], [1.0]]), number)
    assert found == {"mean squared error": 0.125, "Spearman": 1.0}


def test_scores_of_tags_leave_ignored_rows_out():
    labels = Labels("single", ("B-X", "I-X", "O"))
    z = np.eye(3)[[2, 0, 1, 0]]
    found = scores("token-cls", [example(np.array([-100, 0, 1, 2]), 4)], [z], labels)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert (found["entity precision"], found["entity recall"], found["entity F1"]) == (
        0.5,
        1.0,
        pytest.approx(2 / 3),
    )
    bare = example(np.array([-100, -100, -100, -100]), 4, kept=0)
    assert scores("token-cls", [example(np.array([-100, 0, 1, 2]), 4), bare], [z, z], labels) == found
    plain = Labels("single", ("NOUN", "VERB", "X"))
    assert set(scores("token-cls", [example(np.array([-100, 0, 1, 2]), 4)], [z], plain)) == {
        "accuracy",
        "macro F1",
    }


def test_scores_of_answers_pairs_and_words():
    window = Window("in Paris now", 1, ((0, 2), (3, 8), (9, 12)), "Paris")
    z = np.zeros((5, 2))
    z[2] = 1.0
    assert scores("question-ans", [example(np.array([2, 2]), 5, window=window)], [z]) == {
        "exact match": 1.0,
        "token F1": 1.0,
    }
    y = np.stack([np.eye(3), np.eye(3)], axis=1)
    assert scores("feature-extraction", [example(None)] * 3, y) == {"recall@1": 1.0}
    tied = [example(0.5), example(0.1), example(0.2)]
    found = scores("feature-extraction", tied, y * np.array([1.0, 0.2, 0.3])[:, None, None])
    assert found == {"recall@1": 1.0, "Spearman": pytest.approx(1.0)}
    words = [example(None, kept=2, nbytes=6), example(None, kept=1, nbytes=3)]
    assert likelihood_of(words, 3 * log(2)) == {
        "nll per token": pytest.approx(log(2)),
        "perplexity": pytest.approx(exp(log(2))),
        "bits per byte": pytest.approx(1 / 3),
    }


def test_outputs_that_are_refused():
    for task, examples, outputs in [
        ("seq-cls", [], []),
        ("seq-cls", [example(0)], []),
        ("causal-lm", [example(0)], [0]),
    ]:
        with pytest.raises(ConfigError, match=r"outputs: expected one of each|task: expected one with a head"):
            scores(task, examples, outputs)
