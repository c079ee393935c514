"""What a run will take: counts of (training.10) where they can be done by hand.  specs/training.md."""

from collections import Counter
from dataclasses import replace
from math import prod

import numpy as np
import pytest
from small_run import CONFIG, examples, lora, settings, started, weights

import lorax_np as lx
from lorax_np.fast.llama.head import CHUNK
from lorax_np.models.load import model_of
from lorax_np.models.new_head import with_head
from lorax_np.models.records import Dropout, Trained
from lorax_np.models.tasks import kept_numbers
from lorax_np.parallel import Alone
from lorax_np.text.examples import Example, Tokens
from lorax_np.train import Passes, duration, train
from lorax_np.train import work as of_work
from lorax_np.train.estimate import estimated
from lorax_np.train.memory import memory_of
from lorax_np.train.run import Run
from lorax_np.train.step import parameters
from lorax_np.train.work import work_of
from tests.models import whole


def work(task="CAUSAL_LM", block="", saved=(), **more):
    """What a small run's steps are made of, whose adapters stand in one block, or in both."""
    base, adapters, sites, _ = started()
    if task != "CAUSAL_LM":
        base = with_head(base, task, 3, np.random.default_rng(0))
    adapters = {name: adapter for name, adapter in adapters.items() if block in name}
    trained = Trained(adapters, {name: base.weights[name] for name in saved})
    config = settings(**{"engine": "fast", "workers": 2, **more})
    passes = Passes(base, {name: sites[name] for name in adapters}, trained, task=task, config=config)
    return work_of(passes, trained, examples(longest=200))


def counted(**more):
    """The parts of the estimate of a small run, and the bytes of what trains."""
    run = work(**more)
    return memory_of(run), sum(4 * prod(value.shape) for value in parameters(run.trained).values())


@pytest.mark.parametrize(
    ("more", "gradients", "optimiser"),
    [
        ({"grad_accumulation_steps": 1}, 4, 3),  # of two workers, by name, flat; p, m and v
        ({"engine": "reference", "grad_accumulation_steps": 1}, 4, 3),  # the general pass has workers too
        ({"engine": "reference", "grad_accumulation_steps": 1, "workers": 1}, 2, 3),
        ({}, 5, 3),  # and those of the micro-batch before
        ({"optimizer": "sgd"}, 5, 2),  # p, old and new
        ({"optimizer": "sgd", "momentum": 0.5}, 5, 4),
        ({"optimizer": "lora-fa"}, 5, 6),
    ],
)
def test_copies_of_what_trains(more, gradients, optimiser):
    found, P = counted(**more)
    assert found["adapters"] == P
    assert (found["gradients"], found["optimiser"]) == (gradients * P, optimiser * P)


def test_logits_are_those_of_a_chunk():
    """As many rows as the plan's head has at once, of each worker."""
    found, _ = counted(batch_size=24)
    assert found["logits"] == 2 * CHUNK * 23 * 4
    general, _ = counted(batch_size=24, engine="reference")
    assert general["logits"] == 2 * 2 * CHUNK * 23 * 4  # and their gradient
    classes, _ = counted(batch_size=24, task="SEQ_CLS")
    assert "logits" not in classes


@pytest.mark.parametrize(("checkpoint", "blocks"), [("off", 2), ("on", 1)])
@pytest.mark.parametrize("workers", [1, 2])
def test_what_dora_has_besides(checkpoint, blocks, workers):
    """WAᵀ of each site that is kept, in every worker; of each row, what goes back through W in the widest."""
    base, adapters, sites, _ = started()
    how = settings(engine="fast", workers=workers, grad_checkpoint=checkpoint, batch_size=24)
    bytes_of = {}
    for dora in (False, True):
        given = {
            name: replace(a, m=np.ones(len(a.B), "float32") if dora else None) for name, a in adapters.items()
        }
        trained = Trained(given, {})
        passes = Passes(base, sites, trained, task="CAUSAL_LM", config=how)
        passes._plan = None  # the general pass, of either
        run = work_of(passes, trained, examples(longest=200))
        rows = round(run.mean * 24)
        again = checkpoint == "on"
        kept = kept_numbers(base, sites, trained, rows, dropout=Dropout(0, 0), checkpoint=again)
        bytes_of[dora] = memory_of(run)["activations"] - 4 * kept
    norms = workers * blocks * 3 * (24 + 8 + 12 + 20 + 12)  # of q, v, o, gate and down
    assert bytes_of[True] - bytes_of[False] == 4 * (norms + rows * (24 + 12))  # q's or o's, by 12 to 24


class File(dict):
    """Tensors of which it is counted how often each is read, and how often pages are let go of."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.reads, self.released = Counter(), 0

    def __getitem__(self, name):
        self.reads[name] += 1
        return super().__getitem__(name)

    def shape(self, name):
        return self.get(name).shape

    def release(self):
        self.released += 1


@pytest.mark.parametrize("dora", [True, False])
def test_the_base_is_there_once(dora):
    """Workers of the general pass have it from where it was looked at, a plan in its own form."""
    file = File(weights(dtype="float64"))  # held in float32, so each is a copy
    base, config = model_of(file, CONFIG, dtype="float32"), lora(use_dora=dora)
    _, adapters, sites = lx.inject(base.weights, config, lx.torch_generator(0))
    how = settings(engine="fast", workers=2, iters=2, eval_rows=4)
    passes = Passes(base, sites, Trained(adapters, {}), task="CAUSAL_LM", config=how)
    assert passes.planned != dora
    file.reads.clear()
    Run(passes, Trained(adapters, {}), examples(), Alone(), (), dry=True)
    assert file.reads
    assert "0 held" in repr(base.weights)  # by who looks and takes no step
    file.reads.clear()
    train(base, adapters, examples(), how, sites=sites, lora=config, passes=passes)
    assert file.released > len(file)  # pages of the file, of either
    assert set(file.reads) == set(file)
    if dora:
        assert set(file.reads.values()) == {1}
    else:
        assert "0 held" in repr(base.weights)


# ---- seconds -----------------------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch):
    """What products are timed for; each takes a second a row, beside which passes over arrays are nothing."""
    asked = []

    def product_seconds(shapes, rows, workers):
        asked.append((shapes, rows, workers))
        return dict.fromkeys(shapes, 1.0)

    monkeypatch.setattr(duration, "product_seconds", product_seconds)
    monkeypatch.setattr(of_work, "mean_keys", lambda lengths, keys: 0.0)  # no attention
    return asked


@pytest.mark.parametrize("engine", ["fast", "reference"])
@pytest.mark.parametrize(("workers", "sequences"), [(1, 1), (2, 2), (5, 4)])
def test_products_are_timed_as_workers_have_them(timed, engine, workers, sequences):
    """Both passes share a micro-batch of four among threads, and time products of as many at once."""
    run = work(engine=engine, workers=workers, batch_size=4)
    duration.seconds_of(run, 10.0, 5.0)
    assert run.passes.planned == (engine == "fast")
    _, rows, at_once = timed[0]
    assert (rows, at_once) == (max(8, round(min(512, 4 * run.mean / sequences))), sequences)


def test_losses_that_compare_sequences_have_one_worker():
    config = {"model_type": "bert", "hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 1}
    base = whole.model_of({**config, "intermediate_size": 10, "vocab_size": 23}, "FEATURE_EXTRACTION")
    trained, sites = whole.adapted(base, targets=["query"])
    config = settings(workers=2, engine="fast")
    assert Passes(base, sites, trained, task="FEATURE_EXTRACTION", config=config).threads(4) == 1


PRODUCTS = 2 * 7  # of both blocks


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
@pytest.mark.parametrize(
    ("block", "saved", "share"),
    [
        ("", (), 1.0),
        (".1.", (), 0.5),
        (".1.", ("model.embed_tokens.weight",), 1.0),
        (".1.", ("score.weight",), 0.5),
    ],
)
def test_what_is_below_the_first_adapted_block_is_not_computed_again(timed, task, block, saved, share):
    """Nor has it a gradient; a head that trains stands above all blocks, a table below."""
    if "score.weight" in saved and task == "CAUSAL_LM":
        saved = ()
    tokens, labels, seconds = 10.0, 5.0, []
    for again in (False, True):
        run = work(task, block, saved, grad_checkpoint="on" if again else "off")
        less = 6 * sum(prod(value.shape) for value in parameters(run.trained).values()) * tokens / 0.4
        less *= PRODUCTS / (2 * sum(prod(shape) for _, shape in duration.products(run.model)))  # low rank
        seconds.append(duration.seconds_of(run, tokens, labels) - less)
    head = 2 * labels if task == "CAUSAL_LM" else 0
    assert seconds[0] == pytest.approx(PRODUCTS * tokens * (1 + share) + head, rel=1e-5)
    assert seconds[1] - seconds[0] == pytest.approx(PRODUCTS * tokens * share, rel=1e-5)


def test_a_token_is_multiplied_with_its_own_experts_alone():
    config = {"model_type": "mixtral", "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 23}
    base = whole.model_of({**config, "num_local_experts": 4, "num_experts_per_tok": 2}, "CAUSAL_LM")
    one = [(12, 12), (4, 12), (4, 12), (12, 12), (4, 12)] + 2 * [
        (20, 12),
        (12, 10),
    ]  # four, the router, experts
    assert sorted(shape for _, shape in duration.products(base)) == sorted(2 * one)


# ---- both stacks of a T5, and heads of their own width -----------------------------------------------------


def read_and_written(lengths, written):
    """Rows of a T5, by their tokens."""
    return [
        Example("", (Tokens(np.zeros(M, "int64")),), np.zeros(N, "int64"), np.zeros(N, "int64"), kept=N)
        for M, N in zip(lengths, written, strict=True)
    ]


@pytest.mark.parametrize(
    ("targets", "encoder", "decoder"),  # how often each stack goes back: not below the first that trains
    [
        (r"decoder.*\.1\.layer.*\.q", 0, 1 / 2),
        (r"decoder.*\.0\.layer.0.*\.q", 0, 1),
        (r"encoder.*\.2\..*\.q", 1 / 3, 1),
    ],
)
def test_each_stack_of_a_t5_has_its_own_tokens(timed, targets, encoder, decoder):
    """Keys and values of what was read are made of the encoder's tokens, all else of the decoder of its own."""
    config = {"model_type": "t5", "d_model": 8, "d_kv": 2, "d_ff": 12, "num_heads": 3, "vocab_size": 23}
    config |= {"num_layers": 3, "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu"}
    base = whole.model_of(config, "SEQ_2_SEQ_LM", dtype="float32")
    trained, sites = whole.adapted(base, targets=targets)
    passes = Passes(base, sites, trained, task="SEQ_2_SEQ_LM", config=settings(engine="fast", workers=1))
    run = work_of(passes, trained, read_and_written([4, 6], [1, 2]))
    found, tokens = estimated(run), 2 * 2 * (5 + 1.5)  # two rows of two micro-batches
    assert (found.tokens, found.labels) == (tokens, 2 * 2 * 1.5)
    read, written = 2 * 2 * 5, 2 * 2 * 1.5
    blocks = 3 * 7 * read * (1 + encoder) + 2 * (9 * written + 2 * read) * (1 + decoder)
    per = sum(2 * m * n * (read if fed else written) for m, n, fed in matrices_of_t5())
    rate = per / (3 * 7 * read + 2 * (9 * written + 2 * read))
    low = {name: sum(v.size for v in (a.A, a.B)) for name, a in trained.adapters.items()}
    low_rank = sum(6 * n * (read if "encoder" in name else written) for name, n in low.items()) / (0.4 * rate)
    assert found.seconds == pytest.approx(blocks + 2 * found.labels + low_rank, rel=1e-4)


def matrices_of_t5():
    """(d_out, d_in, whether it is given what is read), of three blocks that read and two that write."""
    attention, dense = 3 * [(6, 8)] + [(8, 6)], [(12, 8), (12, 8), (8, 12)]
    read = [(*shape, True) for shape in attention + dense]
    own = [(*shape, False) for shape in attention + dense]
    cross = [(6, 8, False), (6, 8, True), (6, 8, True), (8, 6, False)]
    return 3 * read + 2 * (own + cross)


@pytest.mark.parametrize(
    ("kind", "heads", "width", "seen"),
    [("qwen3", 6, 6 * 4, 0.6), ("llama", 6, 6 * 4, 0.6), ("bert", 3, 12, 1.0)],
)
def test_attention_is_as_wide_as_its_heads(monkeypatch, kind, heads, width, seen):
    """Seven products a step of all queries with the keys that they see, at half the rate of the matrices."""
    monkeypatch.setattr(duration, "product_seconds", lambda shapes, rows, workers: dict.fromkeys(shapes, 1.0))
    config = {"model_type": kind, "hidden_size": 12, "intermediate_size": 10, "num_attention_heads": heads}
    config |= {"num_hidden_layers": 1, "vocab_size": 23}
    config |= {} if kind == "bert" else {"num_key_value_heads": 2, "head_dim": 4}
    base = whole.model_of(config, "TOKEN_CLS", dtype="float32")
    trained, sites = whole.adapted(base, targets=["query" if kind == "bert" else "q_proj"])
    passes = Passes(base, sites, trained, task="TOKEN_CLS", config=settings(engine="fast", workers=1))
    rows = [Example("", (Tokens(np.zeros(T, "int64")),), np.zeros(T, "int64"), kept=T) for T in (2, 6)]
    run, tokens, found = work_of(passes, trained, rows), 10.0, []
    for keys in (of_work.mean_keys, lambda lengths, keys: 0.0):
        monkeypatch.setattr(of_work, "mean_keys", keys)
        found.append(duration.seconds_of(run, tokens, 5.0))
    rate = np.mean([2 * prod(shape) for _, shape in duration.products(base)])
    keys = seen * (2 * 2 + 6 * 6) / (2 + 6)
    assert found[0] - found[1] == pytest.approx(7 * 2 * width * keys * tokens / (0.5 * rate), rel=1e-5)
