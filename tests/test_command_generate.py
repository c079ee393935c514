"""lorax-np generate on small directories: what it prints, and how it is refused, in one line each."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import writers
from writers import BERT, CONFIGS, LLAMA, adapter_directory, directory

import lorax_np as lx
from lorax_np import cli
from lorax_np.commands import generate
from lorax_np.generation import token_stream
from lorax_np.models.adapted import with_adapter
from lorax_np.text.tokenizer import load_tokenizer
from lorax_np.tree import tree_map

TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture(autouse=True)
def listed(monkeypatch):
    monkeypatch.setattr(cli, "COMMANDS", tuple(dict.fromkeys((*cli.COMMANDS, generate))))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return directory(tmp_path_factory.mktemp("place") / "model")


@pytest.fixture(scope="module")
def adapter(place):
    return adapter_directory(place.parent / "adapter", lx.load_model(place), task_type="CAUSAL_LM")


@pytest.fixture
def write(place, capsys):
    """Run the command: its code, what it printed, and what it said besides."""

    def run(*flags, model=place):
        code = cli.main(["generate", "--model", str(model), *map(str, flags)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(write):
    """The one line of a refusal, which leaves nothing on standard output."""

    def run(*flags, **more):
        code, out, err = write(*flags, **more)
        assert (code, out, err.count("\n")) == (2, "", 1)
        return err.removeprefix("lorax-np: ").rstrip()

    return run


def expected(place, prompt, adapter=None, most=6):
    beside = with_adapter(lx.load_model(place, dtype="float32"), adapter, "CAUSAL_LM")
    words = load_tokenizer(place)
    ids = words.encode(prompt).ids
    how = {"sites": beside.sites, "trained": beside.trained, "most": most}
    return words.decode(list(token_stream(beside.model, ids, **how)), specials=False)


def test_a_text_and_a_line_of_figures(write, place):
    code, out, err = write("--prompt", "Hello", "--max-tokens", 6)
    assert code == 0
    assert out == expected(place, "Hello") + "\n"
    assert err.startswith("5 tokens read in ")
    assert "6 written in " in err
    assert err.endswith("ended by length\n")
    assert err.count("\n") == 1


def test_streamed_text_is_the_same_text(write):
    flags = "--prompt", "Hello", "--max-tokens", 20, "--temp", 1.3, "--seed", 5
    whole, streamed = write(*flags, "--quiet"), write(*flags, "--quiet", "--stream")
    assert whole == streamed
    assert whole[2] == ""


def test_an_adapter_beside_the_base(write, place, adapter):
    _, with_it, _ = write("--prompt", "Hello", "--max-tokens", 6, "--quiet", "--adapter-path", adapter)
    assert with_it == expected(place, "Hello", adapter) + "\n"
    assert with_it != expected(place, "Hello") + "\n"


def test_adapters_in_float16_and_of_dora(write, place, tmp_path):
    base = lx.load_model(place)
    found, _, config = writers.adapted(base, use_dora=True, task_type="CAUSAL_LM")
    narrow = tree_map(lambda x: x.astype("float16"), found.adapters)
    lx.save_adapter(tmp_path / "d", narrow, config)
    _, out, _ = write("--prompt", "Hello", "--max-tokens", 6, "--quiet", "--adapter-path", tmp_path / "d")
    assert out == expected(place, "Hello", tmp_path / "d") + "\n"


def test_prompts_of_a_file_and_of_standard_input(write, tmp_path, monkeypatch):
    flags = "--max-tokens", 5, "--quiet"
    direct = write("--prompt", "Grüße\n", *flags)
    (tmp_path / "p.txt").write_text("Grüße\n", encoding="utf-8")
    assert write("--prompt-file", tmp_path / "p.txt", *flags) == direct
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO("Grüße\n".encode())))
    assert write("--prompt", "-", *flags) == direct


def test_figures_as_json(write):
    code, out, err = write("--prompt", "Hello", "--max-tokens", 4, "--json", "-")
    found = json.loads(out)
    assert (code, err, found["prompt"], found["ended"], len(found["ids"])) == (0, "", 5, "length", 4)
    assert found["tokens_per_second"] > 0
    assert set(found) == {"text", "ids", "ended", "prompt", "reading", "writing", "tokens_per_second"}


def test_seeds_and_cuts(write):
    flags = "--prompt", "Hello", "--max-tokens", 12, "--quiet", "--temp", 2
    one, other = (write(*flags, "--seed", seed)[1] for seed in (1, 2))
    assert one == write(*flags, "--seed", 1)[1]
    assert one != other
    greedy = write(*flags[:5])[1]
    assert write(*flags, "--top-k", 1)[1] == write(*flags, "--top-p", 1e-6)[1] == greedy


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_other_families(write, tmp_path, kind):
    folder = directory(tmp_path / "m", CONFIGS[kind])
    assert write("--prompt", "Hello", "--quiet", "--max-tokens", 6, model=folder)[1] == (
        expected(folder, "Hello") + "\n"
    )


def test_a_template_of_the_model_is_used_unless_it_is_not_wanted(write, tmp_path):
    pytest.importorskip("jinja2", reason="a template other than ChatML needs Jinja")
    folder = directory(tmp_path / "m", template=TEMPLATE)
    flags = "--prompt", "Hello", "--quiet", "--max-tokens", 6
    answered = expected(folder, "Hello<|im_end|>") + "\n"
    assert write(*flags, model=folder)[1] == write(*flags, "--chat", model=folder)[1] == answered
    assert write(*flags, "--no-chat", model=folder)[1] == expected(folder, "Hello") + "\n" != answered


def test_without_a_template_of_its_own_a_model_writes_on_unless_asked_to_answer(write, place):
    """The tokenizer has ChatML's marks, and no template."""
    said = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    flags = "--prompt", "Hello", "--quiet", "--max-tokens", 6
    assert write(*flags)[1] == expected(place, "Hello") + "\n"
    assert write(*flags, "--chat")[1] == expected(place, said) + "\n"


def test_refusals(refused, place, tmp_path):
    hello = "--prompt", "Hello"
    assert refused("--prompt", "x" * 97) == (
        "prompt: expected at most 96 tokens, as many as the model has positions for, got 97"
    )
    assert refused("--prompt", "") == "prompt: expected a text of one token at least, got none"
    assert refused(*hello, "--temp", -1) == "temperature: expected a number of at least 0, got -1.0"
    assert refused(*hello, "--top-p", 0) == "top_p: expected a number above 0 and at most 1, got 0.0"
    assert refused(*hello, "--max-tokens", 0) == (
        "max_tokens: expected how many tokens to write, at least 1, got 0"
    )
    assert refused(*hello, "--json", "--stream").startswith("--stream: expected none beside --json")
    assert "No such file" in refused("--prompt-file", tmp_path / "none")
    (tmp_path / "p").write_bytes(b"ab\xff")
    assert refused("--prompt-file", tmp_path / "p") == (
        f"{tmp_path / 'p'}: expected text in UTF-8, got another byte at 2"
    )
    bert = directory(tmp_path / "bert", BERT, task="TOKEN_CLS")
    assert "expected a family that writes" in refused(*hello, model=bert)
    headless = writers.weights(LLAMA, dtype="float32")
    del headless["lm_head.weight"]
    folder = directory(tmp_path / "body")
    lx.write_safetensors(folder / "model.safetensors", headless)
    assert "expected a model with lm_head.weight for CAUSAL_LM, got none" in refused(*hello, model=folder)
    (folder / "tokenizer.json").unlink()
    assert refused(*hello, model=tmp_path / "nowhere").endswith(f"'{tmp_path / 'nowhere'}'")


def test_adapters_that_do_not_fit(refused, place, tmp_path):
    other = LLAMA | {"hidden_size": 18, "num_hidden_layers": 1}
    base = lx.load_model(directory(tmp_path / "other", other))
    one = adapter_directory(tmp_path / "shapes", base, task_type="CAUSAL_LM")
    hello = "--prompt", "Hello", "--adapter-path"
    assert "mlp.down_proj.weight of (18, 20), by A and B, got (12, 20)" in refused(*hello, one)
    classes = adapter_directory(tmp_path / "task", lx.load_model(place), task_type="SEQ_CLS")
    assert refused(*hello, classes) == f"{classes}: task_type: expected CAUSAL_LM, got SEQ_CLS"
    assert "No such file" in refused(*hello, tmp_path / "nothing")
    base, pissa = lx.load_model(place), tmp_path / "pissa"
    found, _, config = writers.adapted(base, init_lora_weights="pissa")
    lx.save_adapter(pissa, found.adapters, config, residual_base=True)
    said = refused(*hello, pissa)
    assert "expected an adapter for the original base, got one for REST" in said
    assert said.endswith(f"lorax-np merge --residual-base REST {pissa} NEW makes a model of the two")


def test_weights_that_are_no_numbers(refused, tmp_path):
    folder, found = directory(tmp_path / "m"), writers.weights(LLAMA, dtype="float32")
    found["model.norm.weight"] = found["model.norm.weight"] * np.nan
    lx.write_safetensors(folder / "model.safetensors", found)
    assert refused("--prompt", "Hello", model=folder) == (
        f"{folder}: expected finite logits, got NaN or infinity for token 1"
    )


def test_a_flag_that_there_is_not(place, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["generate", "--model", str(place), "--prompt", "x", "--tempo", "1"])
    assert left.value.code == 2
    assert "--tempo: expected a known flag (did you mean '--temp'?)" in capsys.readouterr().err
