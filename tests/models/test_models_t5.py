"""T5: every gradient against a complex step; two stacks, a head, files, refusals.  See specs/encdec.md."""

from dataclasses import replace
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
from family_laws import (
    assert_adds_up,
    assert_any_library,
    assert_computed_again,
    assert_engines_agree,
    assert_narrow_storage_is_computed_wide,
)
from whole import AGREES, STARTS, TINY, Step, adapted, all_whole, held, leaves, model_of, worst

import lorax_np as lx
from lorax_np.models import load, t5, t5_block
from lorax_np.models.families import FAMILIES
from lorax_np.models.pairs import PAIRS
from lorax_np.models.passes import Pass
from lorax_np.models.records import Batch, Dropout, Rows, Trained
from lorax_np.models.t5 import decoder_input
from lorax_np.models.t5_config import COPIES, t5_settings, t5_shapes
from lorax_np.models.t5_greedy import t5_greedy
from lorax_np.models.t5_kept import t5_kept_of
from lorax_np.models.tasks import kept_numbers, loss, loss_and_gradients, outputs
from tests.strategies import LIBRARIES

CONFIG = {
    "model_type": "t5",
    "d_model": 10,
    "d_kv": 4,
    "d_ff": 14,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 3,
    "vocab_size": 13,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,
    "pad_token_id": 3,
    "decoder_start_token_id": 1,
    "eos_token_id": 2,
    "layer_norm_epsilon": 1e-3,
}
GATED = {**CONFIG, "feed_forward_proj": "gated-gelu"}
SMALL = {**GATED, "num_layers": 1, "num_decoder_layers": 2}
TASK = "SEQ_2_SEQ_LM"
WRITTEN = 0, 5, 12, 14  # the decoder's sequences, none as long as what it reads
EVERY = r".*\.(q|k|v|o|wi|wo|wi_0|wi_1)|.*relative_attention_bias|shared|lm_head"


def batch_of(seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, 13, WRITTEN[-1])
    labels[[2, 7, 13]] = -100
    ids = rng.integers(3, 13, STARTS[-1])
    for array in (ids, labels):
        array.flags.writeable = False
    return Batch(ids, STARTS, labels, (16, 2, 9), decoder_starts=WRITTEN)


def step_of(config=GATED, *, whole=False, p=0.3, targets=EVERY, **options) -> Step:
    model = model_of(config, TASK)
    if whole:
        return Step(model, {}, all_whole(model), batch_of(), TASK)
    trained, sites = adapted(model, targets=targets, lora_dropout=p, **options)
    return Step(model, sites, trained, batch_of(), TASK, Dropout(seed=4, step=9))


@pytest.mark.parametrize("config", [CONFIG, {**GATED, "scale_decoder_outputs": False}], ids=["relu", "gated"])
def test_every_tensor_of_a_model_that_trains_whole(config):
    off, name = worst(step_of(config, whole=True))
    assert off <= AGREES, name


def test_every_adapter_under_dropout():
    """At all linear layers, both tables of biases, the table of ids and the head."""
    step = step_of(SMALL)
    assert {"shared", "lm_head", "decoder.block.0.layer.0.SelfAttention.relative_attention_bias"} < set(
        step.sites
    )
    off, name = worst(step)
    assert off <= AGREES, name


FAULTS = {
    "gm left out": (t5_block, "attention_back", lambda g, gm, gR: (g, None if gm is None else 0 * gm, gR)),
    "gm of one block": (t5_block, "attention_back", lambda g, gm, gR: (g, None if gm is None else gm / 3, gR)),
    "gR": (t5_block, "attention_back", lambda g, gm, gR: (g, gm, None if gR is None else 1.001 * gR)),
    "g": (t5_block, "dense_back", lambda g: 1.001 * g),
    "keys and values": (t5_block, "attention_backward", lambda q, k, v, R: (q, v, k, R)),
    "queries": (t5_block, "attention_backward", lambda q, k, v, R: (1.001 * q, k, v, R)),
    "memory": (t5, "stack_backward", lambda gm: None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault):
    where, name, wrong = FAULTS[fault]
    right = getattr(where, name)

    def broken(*args, **options):
        found = right(*args, **options)
        return wrong(*found) if isinstance(found, tuple) else wrong(found)

    with mock.patch.object(where, name, broken):
        try:
            off, _ = worst(step_of(SMALL, whole=True))
        except lx.ConfigError:  # what trains below is never reached
            return
    assert off > 1e6 * AGREES


def test_the_shared_table_has_a_gradient_from_each_use():
    """With the head tied: from the ids read, from the ids written, and from the logits."""
    model = model_of(CONFIG, TASK)
    tied = {**model.weights, "lm_head.weight": model.weights["shared.weight"]}
    names = "shared.weight", "lm_head.weight"
    step = Step(replace(model, weights=tied), {}, Trained({}, {n: tied[n] for n in names}), batch_of(), TASK)
    _, found = step.gradients()
    whole = found.saved["shared.weight"] + found.saved["lm_head.weight"]
    v = np.random.default_rng(5).standard_normal(whole.shape)
    moved = dict.fromkeys(names, tied["shared.weight"] + TINY * 1j * v)
    want = np.imag(step.loss(Trained({}, moved))) / TINY
    assert abs(np.sum(whole * v) - want) <= 1e-13 * np.linalg.norm(whole) * np.linalg.norm(v)
    unread = sorted(set(range(13)) - set(step.batch.ids.tolist()) - set(written(step).tolist()))
    assert len(unread) > 1
    assert not found.saved["shared.weight"][unread].any()
    assert found.saved["lm_head.weight"][unread].any()


def test_rows_that_train_of_a_tied_table_stand_in_both_stacks_and_in_the_head():
    weights = {
        name: np.array(w) for name, w in model_of(CONFIG, TASK).weights.items() if name != "lm_head.weight"
    }
    model, b, name = read(weights), batch_of(), "shared.token_adapter.trainable_tokens_delta"
    rows, v = np.random.default_rng(8).standard_normal((2, 3, 10))
    how = {"task": TASK, "n": 11, "tokens": {"shared": (1, 5, 12)}, "engine": "reference"}
    _, got = loss_and_gradients(model, {}, Trained({}, {name: rows}), b, **how)
    want = np.imag(loss(model, {}, Trained({}, {name: rows + TINY * 1j * v}), b, **how)) / TINY
    assert abs(np.sum(got.saved[name] * v) - want) <= 1e-13 * np.linalg.norm(got.saved[name]) * np.linalg.norm(
        v
    )
    table = weights["shared.weight"].copy()
    table[[1, 5, 12]] = rows
    same = read({**weights, "shared.weight": table})
    z = outputs(model, {}, Trained({}, {name: rows}), b, task=TASK, tokens=how["tokens"])
    assert np.abs(z - outputs(same, {}, Trained({}, {}), b, task=TASK)).max() <= 1e-14 * np.abs(z).max()


def written(step: Step):
    return decoder_input(Pass(step.model, {}, step.trained), step.batch.labels, step.batch.decoder_rows)


def test_what_the_decoder_reads():
    """A start, then the labels but the last, sequence by sequence; an ignored label is padding's id."""
    step = step_of(whole=True)
    want = []
    for a, b in pairwise(WRITTEN):
        want += [1, *(3 if label == -100 else int(label) for label in step.batch.labels[a : b - 1])]
    assert written(step).tolist() == want
    given = replace(step.batch, decoder_ids=np.array(want))
    assert float(step.gradients()[0]) == float(step._replace(batch=given).gradients()[0])
    at = Pass(step.model, {}, step.trained)
    assert decoder_input(at, np.array([7, 8, 9]), Rows((0, 0, 2, 2, 3), (0, 1, 2, 3))).tolist() == [1, 7, 1]
    with pytest.raises(lx.ConfigError, match="labels: expected 3, one for each row of the decoder, got "):
        decoder_input(at, np.array([7, 8]), Rows((0, 3), (0,)))
    with pytest.raises(lx.ConfigError, match="batch: expected decoder_ids, or labels that say what they are"):
        decoder_input(at, None, Rows((0, 3), (0,)))
    with pytest.raises(lx.ConfigError, match="labels: expected ids or −100, got 18446744073709551516"):
        decoder_input(at, np.array([7, 2**64 - 100, 1], "uint64"), Rows((0, 3), (0,)))
    with pytest.raises(lx.DtypeError, match="labels: expected integers, got float64"):
        decoder_input(at, np.array([7.0, 8.5, 1.0]), Rows((0, 3), (0,)))
    with pytest.raises(lx.ConfigError, match="batch: expected the decoder's sequences"):
        step._replace(batch=replace(step.batch, decoder_starts=None)).gradients()


def hidden(step: Step, **changed):
    at = Pass(step.model, step.sites, step.trained)
    return FAMILIES["t5"].forward(at, replace(step.batch, **changed), "nothing")[0]


def test_who_sees_whom():
    """A row sees earlier ones of its own sequence, and all that its sequence reads; nothing of others."""
    step = step_of()
    ids, out = step.batch.ids.copy(), written(step)
    before = hidden(step, decoder_ids=out)
    other = out.copy()
    other[7] = 5 if out[7] != 5 else 6
    rows = np.abs(hidden(step, decoder_ids=other) - before).max(axis=1) > 0
    assert rows.tolist() == [5 <= i < 12 and i >= 7 for i in range(14)]
    ids[8] = 5 if ids[8] != 5 else 6
    rows = np.abs(hidden(step, ids=ids, decoder_ids=out) - before).max(axis=1) > 0
    assert rows.tolist() == [i >= 12 for i in range(14)]


def test_blocks_computed_again_give_the_same_bits_under_dropout():
    assert_computed_again(step_of())


def test_engines_agree():
    assert_engines_agree(step_of())


def test_float32_stays_float32():
    step = step_of()
    low = replace(step.model, weights={n: w.astype("float32") for n, w in step.model.weights.items()})
    adapters = {
        name: replace(a, A=a.A.astype("float32"), B=a.B.astype("float32"))
        for name, a in step.trained.adapters.items()
    }
    value, got = step._replace(model=low, trained=Trained(adapters, {})).gradients(engine="fast")
    assert value.dtype == np.float32
    assert all(g.dtype == np.float32 for g in leaves(got).values())
    assert float(value) == pytest.approx(float(step.gradients()[0]), rel=1e-5)


@pytest.mark.parametrize(
    ("targets", "blocks"),
    [
        (r"encoder\.block\.1.*\.q", 4),
        (r"decoder\.block\.2.*wo", 1),
        (r"decoder.*EncDecAttention\.v", 3),
        ("lm_head", 0),
        ("shared", 5),
    ],
)
def test_what_lies_below_all_that_trains_is_left_out(targets, blocks):
    """So many blocks have a backward; the gradients are those that the same adapters have among all."""
    step = step_of(p=0.0)
    some = {name: step.trained.adapters[name] for name in adapted(step.model, targets=targets)[0].adapters}
    rest = {name: a for name, a in step.trained.adapters.items() if name not in some}
    want = leaves(step.gradients()[1])
    with mock.patch.object(t5, "block_backward", wraps=t5.block_backward) as called:
        alone = leaves(merged(step, rest)._replace(trained=Trained(some, {})).gradients()[1])
    assert called.call_count == blocks
    assert alone
    for leaf, g in alone.items():
        assert np.abs(g - want[leaf]).max() <= 1e-12 * np.abs(want[leaf]).max(), leaf


def merged(step: Step, adapters) -> Step:
    """The same function, those adapters being in the weights."""
    weights = dict(step.model.weights)
    for name, a in adapters.items():
        site = step.sites[name]
        delta = site.scaling * a.B @ a.A
        weights[site.weight] = weights[site.weight] + (delta.T if site.kind == "embedding" else delta)
    return step._replace(model=replace(step.model, weights=weights))


def test_micro_batches_add_up():
    step, parts = step_of(), []
    for i, ((a, b), (c, d)) in enumerate(zip(pairwise(STARTS), pairwise(WRITTEN), strict=True)):
        ids, labels, index = step.batch.ids[a:b], step.batch.labels[c:d], step.batch.index[i : i + 1]
        parts.append(Batch(ids, (0, b - a), labels, index, decoder_starts=(0, d - c)))
    assert_adds_up(step, parts)


def test_a_batch_of_nothing():
    step = step_of(p=0.0)
    nothing = np.zeros(0, "int64")
    empty = Batch(nothing, (0,), nothing, (), decoder_ids=nothing, decoder_starts=(0,))
    value, got = loss_and_gradients(step.model, step.sites, step.trained, empty, task=TASK, n=4)
    assert float(value) == 0.0
    assert not any(g.any() for g in leaves(got).values())


def test_narrow_storage_is_computed_in_float32():
    assert_narrow_storage_is_computed_wide(step_of(p=0.0))


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_any_array_library_computes_it(library):
    step = step_of()._replace(dropout=None)
    there = assert_any_library(step, library)
    how = {"most": 4, "engine": "reference"}
    assert t5_greedy(*there[:4], **how) == t5_greedy(*step[:4], **how)


@pytest.mark.parametrize(("engine", "p"), [("reference", 0.4), ("fast", 0.4), ("fast", 0.0)])
@pytest.mark.parametrize("config", [CONFIG, GATED], ids=["relu", "gated"])
@pytest.mark.parametrize(
    "targets",
    [
        ["q", "v"],
        ["o", "wo", "shared"],
        r"decoder\.block\.[12].*(k|wi|wi_1)",
        r"encoder\.block\.1.*k",
        ["lm_head"],
    ],
    ids=str,
)
def test_what_is_kept_is_what_was_counted(engine, p, config, targets):
    """(encdec.22) and (encdec.23), to the number, but for biases."""
    step = step_of(config, targets=targets, p=p)
    at = Pass(step.model, step.sites, step.trained, pair=PAIRS[engine], dropout=step.dropout)
    _, saved = t5.t5_forward(at, step.batch)
    biases = held((saved.encoder.relative, saved.decoder.relative))
    M, N = STARTS[-1], WRITTEN[-1]
    assert held(saved) - biases == t5_kept_of(at, M, N, "all")
    _, inputs = t5.t5_forward(at, step.batch, "inputs")
    blocks = (saved.encoder.blocks[i] for i in range(saved.encoder.first, 2)), saved.decoder.blocks
    m = saved.memory.h  # which blocks of the decoder hold as well, where keys are adapted
    one = [held((block, m)) - held(m) for stack in blocks for block in stack if block is not None]
    assert held(inputs) - biases + max(one, default=0) == t5_kept_of(at, M, N, "inputs")
    assert kept_numbers(step.model, step.sites, step.trained, 7, engine="reference") == t5_kept_of(
        Pass(step.model, step.sites, step.trained), 7, 7, "all"
    )


# ---- greedy writing ----------------------------------------------------------------------------------------


def test_greedy_writing_is_the_prefix_computed_again():
    """Keys that are kept change nothing, and what ends a text is not part of it."""
    step = step_of(p=0.0)
    model = replace(step.model, config={**step.model.config, "eos_token_id": [8]})
    texts, S = [[1], [1], [1]], 3
    for _ in range(8):
        starts = tuple(int(n) for n in np.cumsum([0, *map(len, texts)]))
        b = replace(step.batch, labels=None, decoder_ids=np.concatenate(texts), decoder_starts=starts)
        z = outputs(model, step.sites, step.trained, b, task=TASK)
        for i in range(S):
            texts[i].append(int(z[starts[i + 1] - 1].argmax()))
    want = [text[1:] for text in texts]
    got = t5_greedy(replace(model, config={**model.config, "eos_token_id": None}), *step[1:4], most=8)
    assert got == want
    assert len({tuple(text) for text in want}) == 3
    ends = want[0][2]
    cut = [text[: text.index(ends)] if ends in text else text for text in want]
    ended = replace(model, config={**model.config, "eos_token_id": [ends]})
    assert t5_greedy(ended, *step[1:4], most=8) == cut
    assert cut != want
    assert t5_greedy(replace(ended, config={**model.config, "eos_token_id": ends}), *step[1:4], most=1) == [
        text[:1] for text in cut
    ]


def test_what_greedy_writing_refuses():
    step = step_of()
    with pytest.raises(lx.ConfigError, match="most: expected how many tokens to write, at least 1, got 0"):
        t5_greedy(*step[:4], most=0)
    with pytest.raises(lx.ConfigError, match="model: expected one of family t5, got 'gpt2'"):
        t5_greedy(replace(step.model, family="gpt2"), *step[1:4], most=1)
    wrong = replace(step.model, config={**step.model.config, "eos_token_id": "</s>"})
    with pytest.raises(lx.ConfigError, match="eos_token_id: expected an id or a list of ids, got '</s>'"):
        t5_greedy(wrong, *step[1:4], most=1)


# ---- files -------------------------------------------------------------------------------------------------


def tensors(config=CONFIG):
    rng, shapes = np.random.default_rng(0), t5_shapes(t5_settings(config, ""))
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def read(weights, config=CONFIG):
    return load.model_of(weights, config, path="model", file="config.json", task=TASK)


@pytest.mark.parametrize(
    ("said", "scaled"),
    [
        ({}, True),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
        ({"model_type": "mt5", "feed_forward_proj": "relu"}, False),
    ],
    ids=str,
)
def test_the_head_is_the_files_and_the_scale_config_json_s(said, scaled):
    weights = tensors()
    head = np.random.default_rng(1).standard_normal(weights["shared.weight"].shape)
    for own in (False, True):
        model = read(weights | ({"lm_head.weight": head} if own else {}), {**CONFIG, **said})
        assert model.config["tied"] == (None if own else "shared")
        assert model.config["tie_word_embeddings"] is not own
        assert model.config["scale_decoder_outputs"] is scaled
        want = head if own else weights["shared.weight"]
        assert np.array_equal(model.weights["lm_head.weight"], want)
        b = batch_of()
        h = FAMILIES["t5"].forward(Pass(model, {}, Trained({}, {})), b, "nothing")[0]
        z = outputs(model, {}, Trained({}, {}), b, task=TASK)
        assert np.abs(z - (10**-0.5 if scaled else 1.0) * h @ want.T).max() <= 1e-13 * np.abs(z).max()


def test_a_table_under_several_names():
    weights = tensors()
    table = weights["shared.weight"]
    useless = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": np.ones((8, 3))}
    for names in ([*COPIES], [COPIES[1]]):
        model = read({**weights, **dict.fromkeys(names, table), **useless})
        assert not set(model.weights) & {*COPIES, *useless}
    rest = {name: value for name, value in weights.items() if name != "shared.weight"}
    assert np.array_equal(read({**rest, COPIES[0]: table}).weights["shared.weight"], table)
    with pytest.raises(
        lx.FormatError, match=r"model: decoder.embed_tokens.weight: expected the values of shared"
    ):
        read({**weights, COPIES[1]: table + 1})
    with pytest.raises(
        lx.FormatError, match=r"model: expected the tensor shared.weight : \(13, 10\), got none"
    ):
        read(rest)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"is_encoder_decoder": False}, "is_encoder_decoder: expected True, since both stacks are computed"),
        ({"is_decoder": True}, "is_decoder: expected False, got True"),
        ({"feed_forward_proj": "gated"}, "feed_forward_proj: expected one of gelu, "),
        ({"feed_forward_proj": "double-gelu"}, "feed_forward_proj: expected one of gelu, "),
        ({"feed_forward_proj": 3}, "feed_forward_proj: expected one of gelu, "),
        ({"relative_attention_num_buckets": 7}, "relative_attention_num_buckets: expected an even number"),
        ({"relative_attention_max_distance": 4}, "relative_attention_max_distance: expected more than 4"),
        ({"decoder_start_token_id": -1}, "decoder_start_token_id: expected an id, got -1"),
        ({"pad_token_id": None}, "pad_token_id: expected an id, got None"),
        ({"scale_decoder_outputs": 1}, "scale_decoder_outputs: expected true or false, got 1"),
        ({"num_decoder_layers": 0}, "num_decoder_layers: expected a whole number of at least 1, got 0"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: expected none"),
        ({"model_type": "bart"}, "model_type: .*, got 'bart', whose positions are learned or fixed vectors"),
        ({"model_type": "umt5"}, "model_type: .*, got 'umt5', whose blocks each have a table of biases"),
    ],
    ids=str,
)
def test_configs_that_are_refused(change, match):
    with pytest.raises(lx.ConfigError, match=f"^config.json: {match}") as refused:
        read(tensors(), {**CONFIG, **change})
    assert "\n" not in str(refused.value)


def test_defaults_are_t5s_and_mt5s():
    t5, mt5 = (t5_settings({"model_type": kind}, "") for kind in ("t5", "mt5"))
    names = "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers", "vocab_size"
    assert [t5[name] for name in names] == [512, 64, 2048, 8, 6, 6, 32128]
    assert [mt5[name] for name in names] == [512, 64, 1024, 6, 8, 8, 250112]
    assert [(c["dense_act_fn"], c["is_gated_act"]) for c in (t5, mt5)] == [("relu", False), ("gelu_new", True)]
    assert t5["decoder_start_token_id"] == t5["pad_token_id"] == 0


def test_ids_past_the_table_are_refused():
    step = step_of()
    for changed in {"ids": np.full(9, 13)}, {"decoder_ids": np.full(14, -1)}:
        with pytest.raises(lx.ConfigError, match=r"^ids: expected numbers from 0 to 12, got "):
            hidden(step, **changed)
