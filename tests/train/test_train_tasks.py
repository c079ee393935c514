"""Every task on a family that has it: a run learns, has the task's figures, and is the same on two ranks."""

import numpy as np
import pytest
from small_run import settings
from test_train_parallel import on_all

import lorax_np as lx
from lorax_np.models.families import FAMILIES, MODEL_TYPES
from lorax_np.models.load import model_of
from lorax_np.models.new_head import with_head
from lorax_np.models.records import Batch, Trained
from lorax_np.models.t5_greedy import t5_greedy
from lorax_np.models.tasks import family_of
from lorax_np.parallel import Alone
from lorax_np.text.examples import Example, Tokens, Window
from lorax_np.text.labels import Labels
from lorax_np.train import train
from lorax_np.train.step import parameters

V = 26
SIZES = {"vocab_size": V, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
CONFIGS = {
    "bert": {**SIZES, "model_type": "bert", "intermediate_size": 20, "max_position_embeddings": 32},
    "gpt2": {"model_type": "gpt2", "vocab_size": V, "n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 32},
    "t5": {
        **{"model_type": "t5", "vocab_size": V, "d_model": 12, "d_kv": 4, "d_ff": 20, "num_layers": 2},
        **{"num_heads": 3, "feed_forward_proj": "relu", "decoder_start_token_id": 0, "pad_token_id": 0},
    },
}
NAMES = Labels("single", ("O", "B-X", "I-X"))


def tiny(kind, task, labels=3):
    config = CONFIGS[kind]
    family = FAMILIES[MODEL_TYPES[kind]]
    shapes, rng = family.shapes(family.settings(config, "config")), np.random.default_rng(0)
    drawn = {n: rng.standard_normal(s) / np.sqrt(s[-1]) + (len(s) == 1) for n, s in shapes.items()}
    made = model_of({n: value.astype("float32") for n, value in drawn.items()}, config, path="tiny")
    head = family_of(made).heads[task].shapes(made.config, labels)
    return made if all(n in made.weights for n in head) else with_head(made, task, labels, rng)


def rows(task, count=12):
    """Rows whose labels the tokens tell: what is above V/2 is of one kind."""
    rng, found = np.random.default_rng(1), []
    for i in range(count):
        T = int(rng.integers(4, 9))
        ids = rng.integers(0, V // 2, T) + (V // 2) * int(rng.integers(2))
        one, high = (Tokens(ids),), int(ids[0] >= V // 2)
        where = f"rows:{i + 1}"
        if task == "SEQ_CLS":
            found.append(Example(where, one, high))
        elif task == "TOKEN_CLS":
            tags = np.where(ids >= V // 2, 1, 0)
            tags[0] = -100
            found.append(Example(where, one, tags, kept=T - 1))
        elif task == "QUESTION_ANS":
            first = int(rng.integers(1, T - 1))
            offsets = tuple((2 * t, 2 * t + 1) for t in range(T))
            window = Window(" ".join("abcdefghi"[:T]), 0, offsets, "abcdefghi"[first])
            found.append(Example(where, one, np.array([first, first]), window=window))
        elif task == "FEATURE_EXTRACTION":
            found.append(Example(where, (Tokens(ids), Tokens((ids + 1) % V)), None))
        else:
            target = ids[:3]
            decoder = np.append(0, target[:-1])
            found.append(Example(where, one, target, decoder=decoder, kept=3, nbytes=3))
    return found


CASES = [
    ("bert", "SEQ_CLS", "accuracy"),
    ("bert", "TOKEN_CLS", "entity F1"),
    ("bert", "QUESTION_ANS", "token F1"),
    ("bert", "FEATURE_EXTRACTION", "recall@1"),
    ("gpt2", "SEQ_CLS", "macro F1"),
    ("t5", "SEQ_2_SEQ_LM", "exact match"),
]


@pytest.mark.parametrize(("kind", "task", "figure"), CASES, ids=lambda value: value)
def test_a_task_from_start_to_figures(kind, task, figure):
    labels = {"SEQ_CLS": Labels("single", ("low", "high")), "TOKEN_CLS": NAMES}.get(task)
    base = tiny(kind, task, labels.count if labels else 2)
    config = lx.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type=task, lora_dropout=0.1)
    found = lx.plan(base.weights, config)
    _, adapters, sites = lx.inject(base.weights, config, lx.torch_generator(0))
    given = Trained(adapters, lx.saved_tensors(base.weights, found))

    def run(ranks, turns, **more):
        how = settings(**{"iters": 3, "grad_accumulation_steps": turns, "learning_rate": 0.02, **more})
        return train(base, given, rows(task), how, sites=sites, task=task, labels=labels, ranks=ranks)

    one = run(Alone(), 2)
    for many in on_all(2, lambda ranks: run(ranks, 1)):
        for name, value in parameters(one.trained).items():
            assert np.array_equal(parameters(many.trained)[name], value), name
    assert figure in one.before
    long = run(Alone(), 3, iters=20, eval_rows=12)
    print(f"{kind} {task}: loss {long.before['loss']:.4f} to {long.after['loss']:.4f}")
    assert long.after["loss"] < long.before["loss"] - 0.03


def test_exact_match_is_what_greedy_writing_gives():
    """(data.6): of texts that the model writes, of others, of one cut short; in batches of any size."""
    base, end = tiny("t5", "SEQ_2_SEQ_LM"), CONFIGS["t5"].get("eos_token_id", 1)
    trained, found, hits = Trained({}, {}), [], []
    for i, row in enumerate(rows("SEQ_2_SEQ_LM")):
        ids = row.sequences[0].ids
        one = t5_greedy(base, {}, trained, Batch(ids, (0, len(ids)), None, (0,)), most=5)[0]
        one = np.array([*one, *[end] * (len(one) < 5)])
        if i % 3 == 1:
            one[i % len(one)] = (one[i % len(one)] + 1) % V
        elif i % 3 == 2:
            one = one[: 1 + i % len(one)]
        found.append(row._replace(labels=one, decoder=np.append(0, one[:-1]), kept=len(one)))
        hits.append(i % 3 != 1)
    assert 0 < sum(hits) < len(hits)
    for size in (1, 5):
        figures = lx.evaluate(base, {}, trained, found, "SEQ_2_SEQ_LM", batch_size=size)
        assert figures["exact match"] == sum(hits) / len(hits)
