"""Writing: kept keys against the whole text computed again, choices against definitions, pieces of text."""

from fractions import Fraction
from hashlib import sha256

import array_api_strict
import numpy as np
import pytest
import writers
from writers import CONFIGS, VOCAB, adapted, directory, model

from lorax_np import ConfigError, FormatError, Sampling, ShapeError, generate, load_model, lora_linear_forward
from lorax_np.backend import dtype_name, from_host
from lorax_np.generation import decoders, token_stream, write
from lorax_np.generation.cache import FIRST, Cache
from lorax_np.generation.one_row import OneRow
from lorax_np.generation.prompts import Told, end_ids, prompt_ids
from lorax_np.generation.sampling import choose, draw, probabilities
from lorax_np.models.adapted import with_adapter
from lorax_np.models.load import model_of
from lorax_np.models.pairs import PAIRS
from lorax_np.models.passes import Pass
from lorax_np.models.records import Batch, Trained
from lorax_np.models.tasks import outputs
from lorax_np.params import Adapter, Linear
from lorax_np.text.tokenizer import load_tokenizer
from lorax_np.tree import leaves, tree_map

NOTHING = Trained({}, {})
PROMPT = [40, 7, 101, 33, 250, 12, 12, 90]
TEXT = [*PROMPT, 3, 77, 8, 8, 200]
AGREES = 1e-12  # float64: a few hundred roundings of 1e-16 between an id and a logit


def whole(base, ids, trained=NOTHING, sites=None, engine="reference"):
    """Logits behind a text, all of it computed at once."""
    batch = Batch(np.array(ids), (0, len(ids)), None, (0,))
    return outputs(base, sites or {}, trained, batch, task="CAUSAL_LM", engine=engine)[-1]


def kept(base, ids, prompt, trained=NOTHING, sites=None, engine="reference"):
    """Logits at each place behind a prompt, with kept keys."""
    writer, at = decoders.writer_of(base), Pass(base, sites or {}, trained, pair=OneRow(engine).pair())
    z, going = writer.begin(base, at, ids[:prompt])
    found = [z]
    for token in ids[prompt:]:
        z, going = writer.step(base, at, token, going)
        found.append(z)
    return found


def assert_same(got, want):
    assert got.shape == want.shape == (VOCAB,)
    assert np.abs(got - want).max() <= AGREES * np.abs(want).max()


# ---- kept keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", PAIRS)
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_with_kept_keys_are_those_of_the_whole_text(kind, dora, engine, monkeypatch):
    """(generation.1), at every place behind a prompt in chunks of three, adapters beside every layer."""
    monkeypatch.setattr(decoders, "CHUNK", 3)
    base = model(kind)
    trained, sites, _ = adapted(base, use_dora=dora)
    for i, z in enumerate(kept(base, TEXT, len(PROMPT), trained, sites, engine)):
        assert_same(z, whole(base, TEXT[: len(PROMPT) + i], trained, sites))


@pytest.mark.parametrize("chunk", [1, 2, 5, 8, 9, 512])
def test_every_way_to_cut_a_prompt_gives_the_same(chunk, monkeypatch):
    base = model("mistral")
    monkeypatch.setattr(decoders, "CHUNK", chunk)
    assert_same(kept(base, PROMPT, len(PROMPT))[0], whole(base, PROMPT))


def test_a_text_longer_than_the_first_room():
    """Rows that are moved into more room stay what they were."""
    base, rng = model("llama"), np.random.default_rng(5)
    ids = rng.integers(3, VOCAB, FIRST + 9).tolist()
    assert_same(kept(base, ids, FIRST - 2)[-1], whole(base, ids))


def test_the_law_sees_a_position_that_does_not_count_on(monkeypatch):
    right = decoders._turn
    monkeypatch.setattr(decoders, "_turn", lambda at, first, new: right(at, max(first - 1, 0), new))
    with pytest.raises(AssertionError):
        assert_same(kept(model("llama"), TEXT, 8)[-1], whole(model("llama"), TEXT))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_greedy_tokens_are_those_of_the_whole_text(kind):
    base = model(kind)
    trained, sites, _ = adapted(base)
    found = list(token_stream(base, PROMPT, sites=sites, trained=trained, most=12))
    text = list(PROMPT)
    for token in found:
        assert token == int(whole(base, text, trained, sites).argmax())
        text.append(token)
    assert len(found) == 12
    assert len(set(found)) > 1  # generic, not one letter again and again


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_other_array_libraries_write_the_same(kind, dora):
    """Logits come back to the host, where tokens are chosen."""
    base = model(kind)
    trained, sites, _ = adapted(base, use_dora=dora)
    strict = model_of(writers.weights(CONFIGS[kind]), CONFIGS[kind], xp=array_api_strict)
    theirs = tree_map(lambda x: from_host(x, array_api_strict), trained)
    want = kept(base, TEXT, len(PROMPT), trained, sites)[-1]
    got = kept(strict, TEXT, len(PROMPT), theirs, sites)[-1]
    assert isinstance(got, np.ndarray)
    assert_same(got, want)


def test_an_adapter_of_a_directory_is_in_the_model_s_library_and_dtype(tmp_path):
    folder = directory(tmp_path / "m")
    adapter = writers.adapter_directory(tmp_path / "a", load_model(folder))
    for xp in (np, array_api_strict):
        for dtype in ("float32", "float64"):
            base = load_model(folder, dtype=dtype, xp=xp)
            beside = with_adapter(base, adapter, "CAUSAL_LM")
            for value in leaves(beside.trained).values():
                assert type(value) is type(base.weights["model.norm.weight"])
                assert dtype_name(value) == dtype
            how = {"sites": beside.sites, "trained": beside.trained, "engine": "reference"}
            assert len(list(token_stream(base, PROMPT, most=2, **how))) == 2


def test_nothing_that_is_given_is_written_to():
    """Weights of the models here are write-protected; twice the same text comes out."""
    base = model("llama")
    trained, sites, _ = adapted(base)
    for adapter in trained.adapters.values():
        adapter.A.flags.writeable = adapter.B.flags.writeable = False
    how = {"sites": sites, "trained": trained, "most": 5}
    assert list(token_stream(base, PROMPT, **how)) == list(token_stream(base, PROMPT, **how))


def test_rows_of_a_cache():
    cache, k = Cache(), np.arange(12.0).reshape(3, 2, 2)
    k1, v1 = cache.extend(0, k, -k)
    assert k1.tolist() == k.tolist()
    assert v1.tolist() == (-k).tolist()
    cache.advance(3)
    k2, _ = cache.extend(0, k[:1], k[:1])
    assert k2.tolist() == [*k.tolist(), k[0].tolist()]
    with pytest.raises(ShapeError, match=r"^k, v: expected rows \(2, 2\), as before, got \(2, 1\)$"):
        cache.extend(0, k[:1, :, :1], k[:1])


# ---- one row -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("parts", [(), ("b",), ("bB",), ("m",), ("m", "b")])
def test_one_row_has_the_reference_s_bits(parts, dtype):
    rng = np.random.default_rng(3)

    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)

    base = Linear(draw(7, 5), draw(7) if "bB" not in parts else None)
    adapter = Adapter(draw(3, 5), draw(7, 3), **{part: draw(7) for part in parts})
    pair = OneRow("fast")
    for rows in (1, 1, 4):
        x = draw(rows, 5)
        got, _ = pair.forward(x, base, adapter, scaling=1.7, mask=None)
        want, _ = lora_linear_forward(x, base, adapter, scaling=1.7)
        assert got.dtype == want.dtype
        if rows == 1:
            assert got.tobytes() == want.tobytes()
        else:
            assert np.allclose(got, want, rtol=64 * np.finfo(dtype).eps, atol=64 * np.finfo(dtype).eps)


def test_norms_of_two_adapters_of_one_layer_are_two():
    rng = np.random.default_rng(4)
    base, pair, x = Linear(rng.standard_normal((6, 5))), OneRow("reference"), rng.standard_normal((1, 5))
    for _ in range(2):
        for seed in (0, 1):
            r = np.random.default_rng(seed)
            one = Adapter(r.standard_normal((2, 5)), r.standard_normal((6, 2)), r.standard_normal(6) + 3)
            got, _ = pair.forward(x, base, one, scaling=0.5, mask=None)
            assert got.tobytes() == lora_linear_forward(x, base, one, scaling=0.5)[0].tobytes()


def test_one_row_of_an_adapter_in_another_dtype():
    rng = np.random.default_rng(6)
    base = Linear(rng.standard_normal((6, 5)))
    one = Adapter(*(rng.standard_normal(shape).astype("float32") for shape in ((2, 5), (6, 2))))
    x = rng.standard_normal((1, 5))
    got, _ = OneRow("fast").forward(x, base, one, scaling=0.5, mask=None)
    assert got.tobytes() == lora_linear_forward(x, base, one, scaling=0.5)[0].tobytes()
    with pytest.raises(TypeError, match=r"^backward: expected none of a text"):
        OneRow("fast").pair().backward(got)


# ---- choices -----------------------------------------------------------------------------------------------


def by_loop(z, how):
    """(generation.4) to (generation.6), token by token."""
    e = [np.exp((float(v) - float(max(z))) / how.temperature) for v in z]
    p = [v / sum(e) for v in e]
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    left = order[: how.top_k] if how.top_k else order
    mass, held = sum(p[i] for i in left), []
    for i in left:
        if sum(p[j] for j in held) < how.top_p * mass:
            held.append(i)
    return np.array([p[i] / sum(p[j] for j in held) if i in held else 0.0 for i in range(len(p))])


@pytest.mark.parametrize("top_k", [0, 1, 4, 50])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 1.0])
def test_probabilities_are_those_of_a_loop(top_k, top_p):
    rng = np.random.default_rng(top_k)
    for temperature in (0.3, 1.0, 2.5):
        z = rng.standard_normal(11)
        z[7] = z[2]  # equals
        how = Sampling(temperature, top_k, top_p)
        p = probabilities(z, how)
        assert np.abs(p - by_loop(z, how)).max() < 1e-15
        assert p.argmax() == z.argmax()


def test_of_equal_logits_the_first_is_taken_and_the_lower_id_kept():
    z = np.array([0.0, 5.0, 1.0, 5.0, 5.0])
    assert choose(z, Sampling(), 0) == 1
    assert probabilities(z, Sampling(1.0, top_k=2)).nonzero()[0].tolist() == [1, 3]
    assert choose(z.astype("float32"), Sampling(1e-3, top_k=1), 3) == 1


def test_cuts_and_draws_at_their_very_edges(monkeypatch):
    """Quarters are exact: of two that are a half no third is kept, and u = ¼ is past the first."""
    z = np.zeros(4)
    assert probabilities(z, Sampling(1.0, top_p=0.5)).tolist() == [0.5, 0.5, 0.0, 0.0]
    for u, chosen in ((0.0, 0), (0.25, 1), (0.5, 2), (0.75, 3)):
        monkeypatch.setattr("lorax_np.generation.sampling.draw", lambda seed, t, u=u: u)
        assert choose(z, Sampling(1.0), 0) == chosen
    monkeypatch.setattr("lorax_np.generation.sampling.draw", lambda seed, t: 0.0)
    assert choose(np.array([0.0, 1.0]), Sampling(1.0, top_k=1), 0) == 1


def test_a_temperature_next_to_nothing_is_greedy():
    assert choose(np.array([0.0, 3.0, 2.9, -1e4]), Sampling(5e-324), 0) == 1


def test_logits_far_apart_neither_overflow_nor_vanish():
    z = np.array([1e4, -1e4, 1e4 - 1.0])
    assert probabilities(z, Sampling(0.5)).round(4).tolist() == [0.8808, 0.0, 0.1192]


def test_a_draw_is_a_word_of_philox():
    """(generation.7), by NumPy's own Philox, which counts up before its first block."""
    for seed, t in ((0, 0), (3, 5), (2**64 - 1, 2**32)):
        key = [seed, int.from_bytes(sha256(b"generation").digest()[:8], "little")]
        before = [
            t - 1 if t else 2**64 - 1,
            0 if t else 2**64 - 1,
            0 if t else 2**64 - 1,
            0 if t else 2**64 - 1,
        ]
        philox = np.random.Philox(counter=np.array(before, "uint64"), key=np.array(key, "uint64"))
        assert Fraction(draw(seed, t)) == Fraction(int(philox.random_raw()) >> 11, 2**53)


def test_frequencies_of_draws_are_p():
    """Each count is within five standard deviations; ids are gone through in their order, (generation.8)."""
    z, n = np.log(np.array([0.1, 0.4, 1e-9, 0.2, 0.3])), 1000
    how = Sampling(1.0, seed=11)
    found = [choose(z, how, t) for t in range(n)]
    p = probabilities(z, how)
    counts = np.bincount(found, minlength=5)
    assert (np.abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1e-3).all()
    up_to = np.cumsum(p)
    assert all((up_to[i - 1] if i else 0.0) <= draw(11, t) < up_to[i] for t, i in enumerate(found[:500]))


def test_a_draw_of_nearly_one_stays_among_those_that_can_be_drawn(monkeypatch):
    monkeypatch.setattr("lorax_np.generation.sampling.draw", lambda seed, t: 1 - 2.0**-53)
    assert choose(np.array([0.0, 1.0, -np.inf, -900.0]), Sampling(1.0), 0) == 1


def test_one_seed_writes_one_text():
    base = model("llama")

    def text(seed, **how):
        return list(token_stream(base, PROMPT, most=12, sampling=Sampling(1.5, seed=seed, **how)))

    assert text(1) == text(1) == text(1, top_p=1.0)
    assert text(1) != text(2)
    assert text(1)[:5] == list(token_stream(base, PROMPT, most=5, sampling=Sampling(1.5, seed=1)))
    assert text(1, top_k=1) == list(token_stream(base, PROMPT, most=12))
    logits = kept(base, [*PROMPT, *text(1)[:-1]], len(PROMPT))
    assert text(1) == [choose(z, Sampling(1.5, seed=1), t) for t, z in enumerate(logits)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temperature": -1.0}, "temperature: expected a number of at least 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature: expected a number of at least 0, got nan"),
        ({"temperature": True}, "temperature: expected a number of at least 0, got True"),
        ({"top_p": 0.0}, "top_p: expected a number above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p: expected a number above 0 and at most 1, got 1.5"),
        ({"top_k": -1}, "top_k: expected how many tokens, 0 for all, got -1"),
        ({"seed": 2**64}, "seed: expected an integer from 0 to 2**64 - 1, got 18446744073709551616"),
    ],
)
def test_numbers_without_a_meaning_are_refused(given, said):
    with pytest.raises(ConfigError) as error:
        Sampling(**given)
    assert str(error.value) == said


# ---- where a text ends -------------------------------------------------------------------------------------


def test_a_text_ends_with_a_stop_token_or_where_positions_do():
    base = model("llama")
    found = list(token_stream(base, PROMPT, most=12))
    stop = found[3]
    assert list(token_stream(base, PROMPT, most=12, stop={stop})) == found[: found.index(stop) + 1]
    longest = CONFIGS["llama"]["max_position_embeddings"]
    near = (PROMPT * 12)[: longest - 2]
    assert len(list(token_stream(base, near, most=9))) == 3
    full = (PROMPT * 12)[:longest]
    assert list(token_stream(base, full, most=9)) == [int(whole(base, full).argmax())]


def test_what_cannot_be_written_is_refused():
    base = model("llama")

    def refused(said, *given, **how):
        with pytest.raises((ConfigError, FormatError)) as error:
            list(token_stream(*given, **how))
        assert str(error.value) == said

    many = "prompt: expected at most 96 tokens, as many as the model has positions for, got 97"
    refused(many, base, [5] * 97)
    refused("prompt: expected one token at least, got none", base, [])
    refused("max_tokens: expected how many tokens to write, at least 1, got 0", base, PROMPT, most=0)
    refused("engine: expected one of reference, fast, got 'slow'", base, PROMPT, engine="slow")
    refused(f"ids: expected numbers from 0 to {VOCAB - 1}, got {VOCAB} in row 1", base, [5, VOCAB])
    bert = model_of(writers.weights(writers.BERT, task="TOKEN_CLS"), writers.BERT, path="b")
    wanted = ", ".join(decoders.WRITERS)
    refused(f"model: expected a family that writes, one of {wanted}, got bert, which only reads", bert, PROMPT)
    tensors = writers.weights(CONFIGS["llama"])
    broken = {**tensors, "model.norm.weight": tensors["model.norm.weight"] * np.nan}
    nan = model_of(broken, CONFIGS["llama"], path="tiny")
    refused("tiny: expected finite logits, got NaN or infinity for token 1", nan, PROMPT)


# ---- text --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return directory(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def words(place):
    return load_tokenizer(place)


def test_pieces_join_to_the_text(words):
    """Characters of two, three and four bytes, a byte that is none, and special tokens, which say nothing."""
    text = "é€ 😀!"
    ids = [*words.encode(text).ids, 0, words.id_of("Ã"), *words.encode("ab").ids, words.id_of("ð")]
    told = Told(words, words.encode("Hello").ids)
    pieces = [told.add(i) for i in ids] + [told.rest()]
    assert "".join(pieces) == told.text == text + "\ufffdab\ufffd"
    assert pieces[:2] == ["", "é"]
    assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])


def test_the_space_of_a_first_word_is_kept(tmp_path):
    """Of a tokenizer whose decoder strips it from the first token, as sentencepiece's does."""
    import json

    import tokenizers as hf
    from tokenizers import decoders as d
    from tokenizers import models as m
    from tokenizers import pre_tokenizers as p

    made = hf.Tokenizer(m.WordLevel({"[UNK]": 0, "▁a": 1, "▁b": 2}, unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = p.Metaspace(), d.Metaspace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({}))
    told = Told(load_tokenizer(tmp_path), [1])
    assert [told.add(2), told.add(1), told.rest()] == [" b", " a", ""]


def test_generate_gives_text_pieces_and_figures(place, words):
    base, pieces = model("llama", dtype="float32"), []
    found = generate(base, words, "Hello", most=9, on_text=pieces.append)
    assert found.ids == tuple(token_stream(base, words.encode("Hello").ids, most=9))
    assert "".join(pieces) == found.text == words.decode(found.ids, specials=False)
    assert (found.ended, found.prompt) == ("length", 5)
    assert found.reading > 0
    assert found.rate == 8 / found.writing


def test_how_a_text_ended_is_said(words, monkeypatch):
    base = model("llama", dtype="float32")
    found = generate(base, words, "Hello", most=9)
    monkeypatch.setattr(write, "end_ids", lambda *_, **__: {found.ids[2]})
    ended = generate(base, words, "Hello", most=9)
    assert (ended.ended, ended.ids) == ("stop", found.ids[: found.ids.index(found.ids[2])])
    monkeypatch.undo()
    assert generate(base, words, "x" * 94, most=9).ended == "context"


def test_prompts_and_ends(place, words):
    base = model("llama")
    assert prompt_ids(words, "ab", chat=False) == words.encode("ab").ids
    said = "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_ids(words, "ab", chat=True) == words.encode(said).ids
    assert end_ids(base, words) == {0}
    assert end_ids(base, words, chat=True) == {0, 2}
    with pytest.raises(ConfigError, match=r"^prompt: expected a text of one token at least, got none$"):
        prompt_ids(words, "", chat=False)


def test_end_tokens_of_the_model_s_files(tmp_path):
    folder = directory(tmp_path / "m", eos_token_id=7)
    (folder / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert end_ids(load_model(folder)) == {7, 8, 9}
    (folder / "generation_config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(FormatError, match=r"eos_token_id: expected an id or a list of ids, got 'end'$"):
        end_ids(load_model(folder))
