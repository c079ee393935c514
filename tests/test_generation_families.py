"""Writing of mixtures of experts, and of an encoder with a decoder: kept keys against whole texts."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tokenizers as hf
from tokenizers import processors
from writers import ROPE, SIZES, VOCAB, adapted, directory, weights

import lorax_np as lx
from lorax_np import cli
from lorax_np.commands import evaluate, generate
from lorax_np.generation import decoders, token_stream
from lorax_np.generation.one_row import OneRow
from lorax_np.models import t5_greedy as greedy
from lorax_np.models.load import model_of
from lorax_np.models.passes import Pass
from lorax_np.models.records import Batch, Trained
from lorax_np.models.t5_greedy import t5_greedy
from lorax_np.models.tasks import outputs
from lorax_np.text.tokenizer import load_tokenizer

AGREES = 1e-12  # float64: a few hundred roundings of 1e-16 between an id and a logit
NOTHING = Trained({}, {})
PROMPT, WRITTEN = [40, 7, 101, 33, 250, 12], [3, 77, 8, 8, 200]
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2, **SIZES, **ROPE}
MIXTURES = {
    "mixtral": {"model_type": "mixtral", "head_dim": 4, **EXPERTS},
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 4, "moe_intermediate_size": 7, **EXPERTS},
}
T5 = {
    "model_type": "t5",
    "d_model": 12,
    "d_kv": 4,
    "d_ff": 20,
    "num_heads": 3,
    "num_layers": 2,
    "vocab_size": VOCAB,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 11,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
    "decoder_start_token_id": 1,
}


@pytest.fixture(autouse=True)
def listed(monkeypatch):
    monkeypatch.setattr(cli, "COMMANDS", tuple(dict.fromkeys((*cli.COMMANDS, generate, evaluate))))


def t5(dtype="float64"):
    return model_of(weights(T5, 0, dtype, "SEQ_2_SEQ_LM"), T5, path="tiny")


def kept(base, trained, sites):
    """Logits at each place of what is written after PROMPT, or in answer to it."""
    writer, at = decoders.writer_of(base), Pass(base, sites, trained, pair=OneRow("fast").pair())
    z, going = writer.begin(base, at, PROMPT)
    found = [z]
    for token in WRITTEN:
        z, going = writer.step(base, at, token, going)
        found.append(z)
    return np.stack(found)


def assert_same(got, want):
    assert got.shape == want.shape == (len(WRITTEN) + 1, VOCAB)
    assert np.abs(got - want).max() <= AGREES * np.abs(want).max()


@pytest.mark.parametrize("kind", MIXTURES)
def test_logits_of_experts_with_kept_keys(kind, monkeypatch):
    """(generation.1), with adapters at attention and beside the experts' and the router's parameters."""
    monkeypatch.setattr(decoders, "CHUNK", 4)
    base = model_of(weights(MIXTURES[kind]), MIXTURES[kind], path="tiny")
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    trained, sites, _ = adapted(base, targets=["q_proj", "v_proj"], target_parameters=parameters)
    ids = [*PROMPT, *WRITTEN]
    batch = Batch(np.array(ids), (0, len(ids)), None, (0,))
    want = outputs(base, sites, trained, batch, task="CAUSAL_LM", engine="reference")
    assert_same(kept(base, trained, sites), want[len(PROMPT) - 1 :])


def test_logits_of_a_decoder_with_an_encoder():
    base = t5()
    trained, sites, _ = adapted(base, targets=["q", "v", "wo"])
    ids = np.array([T5["decoder_start_token_id"], *WRITTEN])
    batch = Batch(np.array(PROMPT), (0, len(PROMPT)), None, (0,), None, ids, (0, len(ids)))
    want = outputs(base, sites, trained, batch, task="SEQ_2_SEQ_LM", engine="reference")
    assert_same(kept(base, trained, sites), want)


def test_greedy_answers_are_those_of_several_at_once():
    base = t5()
    batch = Batch(np.array(PROMPT), (0, len(PROMPT)), None, (0,))
    got = list(token_stream(base, PROMPT, most=8, stop={T5["eos_token_id"]}))
    assert [i for i in got if i != T5["eos_token_id"]] == t5_greedy(base, {}, NOTHING, batch, most=8)[0]


def test_an_answer_from_the_command_line(tmp_path, capsys):
    """The prompt ends as texts do, and the answer does not go on from its characters."""
    folder = directory(tmp_path / "m", T5, task="SEQ_2_SEQ_LM")
    file = folder / "tokenizer.json"
    made = hf.Tokenizer.from_file(str(file))
    made.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>",
        pair="$A <|endoftext|> $B <|endoftext|>",
        special_tokens=[("<|endoftext|>", 0)],
    )
    made.save(str(file))
    given = ["generate", "--model", str(folder), "--prompt", "Hello", "--max-tokens", "7", "--quiet"]
    assert cli.main(given) == 0
    words = load_tokenizer(folder)
    ids = list(token_stream(lx.load_model(folder), [*words.encode("Hello").ids, 0], most=7, stop={0}))
    assert capsys.readouterr().out == words.decode([i for i in ids if i], specials=False) + "\n"


def test_the_likelihood_of_answers(tmp_path, capsys):
    folder, data = directory(tmp_path / "m", T5, task="SEQ_2_SEQ_LM"), tmp_path / "d.jsonl"
    data.write_text(json.dumps({"source": "Hello", "target": "you"}) + "\n", encoding="utf-8")
    given = [
        "evaluate",
        "--model",
        str(folder),
        "--data",
        str(data),
        "--task",
        "seq2seq-lm",
        "--json",
        "--quiet",
    ]
    assert cli.main(given) == 0
    words = load_tokenizer(folder)
    source, target = words.encode("Hello").ids, [*words.encode("you").ids, 0]
    reads = np.array([T5["decoder_start_token_id"], *target[:-1]])
    batch = Batch(np.array(source), (0, len(source)), None, (0,), None, reads, (0, len(reads)))
    z = outputs(t5(), {}, NOTHING, batch, task="SEQ_2_SEQ_LM")
    logs = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    nll = -np.mean([row[i] for row, i in zip(logs, target, strict=True)])
    found = json.loads(capsys.readouterr().out)["metrics"]
    assert found["labels"] == 4
    assert found["loss"] == pytest.approx(nll, rel=1e-5)  # float32


def test_sequences_that_have_ended_are_stepped_no_more(monkeypatch):
    """The others write what they would have written: lengths to read are unequal, and one ends early."""
    base = t5()
    ids, starts = np.array([*PROMPT, *WRITTEN, 9, 4, 61]), (0, 6, 11, 14)
    batch, stepped, plain = Batch(ids, starts, None, (0, 1, 2)), [], greedy.step
    free = replace(base, config={**base.config, "eos_token_id": None})
    texts = t5_greedy(free, {}, NOTHING, batch, most=6)
    ends = [next(i for i in text if i not in texts[1]) for text in texts[:1]]
    want = [text[: text.index(ends[0])] if ends[0] in text else text for text in texts]

    def counted(at, ids, index, seen):
        stepped.append(index)
        return plain(at, ids, index, seen)

    monkeypatch.setattr(greedy, "step", counted)
    ending = replace(base, config={**base.config, "eos_token_id": ends})
    assert t5_greedy(ending, {}, NOTHING, batch, most=6) == want
    assert len({len(text) for text in want}) > 1
    for t, index in enumerate(stepped):
        assert index == tuple(i for i, text in enumerate(want) if len(text) >= t)
