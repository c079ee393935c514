"""A base in few bits: its numbers are its codes', its gradients those of a dense base of these numbers, bit for
bit; memory as it is counted; and starts that leave what lies on the codes' grid."""

import gc
import json
import threading
import tracemalloc
import weakref
from dataclasses import replace
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
import test_models_bert
import test_models_gpt2
import test_models_moe
import test_models_t5
import whole

import lorax_np as lx
from lorax_np.errors import ConfigError, DtypeError, ShapeError
from lorax_np.inject import plan
from lorax_np.io.writer import write_safetensors
from lorax_np.models.codes import code_bytes, decode, encode
from lorax_np.models.load import load_model
from lorax_np.models.quantised import coded_names, quantised, quantised_start
from lorax_np.models.tasks import count, loss, loss_and_gradients
from lorax_np.quant import (
    compress_absmax,
    dequantise_int8,
    dequantise_nf4,
    quantise_int8,
    quantise_nf4,
)
from tests.models import tiny
from tests.strategies import LIBRARIES

LM = {"task": "CAUSAL_LM"}
KINDS = [("nf4", False), ("nf4", True), ("int8", False), ("bf16", False)]
IDS = ["nf4", "nf4 double", "int8", "bf16"]


def codec(W, way, double):
    """What quant/, or bfloat16, makes of W : (d_out, d_in), in float32; and its bytes."""
    if way == "bf16":
        held = W.astype("float32").astype(ml_dtypes.bfloat16)
        return held.astype("float32"), held.nbytes
    if way == "int8":
        q = quantise_int8(W)
        return dequantise_int8(q), q.codes.nbytes + q.absmax.nbytes
    q = quantise_nf4(W)
    if not double:
        return dequantise_nf4(q), q.codes.nbytes + q.absmax.nbytes
    q = compress_absmax(q)
    return dequantise_nf4(q), q.codes.nbytes + q.absmax.codes.nbytes + q.absmax.absmax.nbytes + 4


def bits(x):
    return np.ascontiguousarray(x).tobytes()


def same(one, other):
    """Two losses and gradients have the same bits."""
    assert bits(one[0]) == bits(other[0])
    a, b = tiny.tensors(one[1]), tiny.tensors(other[1])
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.dtype == b[key].dtype, key
        assert bits(value) == bits(b[key]), key


# ---- numbers and bytes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "double"), KINDS, ids=IDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numbers_and_bytes_are_the_codecs(way, double, dtype):
    """Linear layers alone are in few bits; all else is the very array that it was."""
    dense = tiny.model(dtype=dtype, attention_bias=True)
    few = quantised(dense, way, double=double).weights
    linear = {n for n in dense.weights if n.endswith("proj.weight")}
    assert set(few.codes) == linear
    assert len(linear) == 21
    total = 0
    for name, W in dense.weights.items():
        if name not in linear:
            assert few[name] is W
            continue
        want, nbytes = codec(W, way, double)
        found = few[name]
        assert found.dtype == dtype
        assert not found.flags.writeable
        assert few.shape(name) == W.shape
        assert bits(found) == bits(want.astype(dtype))
        assert few.codes[name].nbytes == nbytes == code_bytes(W.shape, way, double=double)
        total += nbytes
        for kind in ("float32", "float64"):
            out = np.full(W.shape, np.nan, kind)
            assert few.into(name, out) is out
            assert bits(out) == bits(want.astype(kind))
    assert few.nbytes == total
    assert list(few) == list(dense.weights)
    assert len(few) == len(dense.weights)
    assert "x" not in few
    out = np.empty(few.shape("model.norm.weight"))
    assert bits(few.into("model.norm.weight", out)) == bits(
        dense.weights["model.norm.weight"].astype("float64")
    )


@pytest.mark.parametrize(("way", "double"), KINDS, ids=IDS)
def test_weights_stored_the_other_way_are_held_by_outputs(way, double):
    """A Conv1D's (d_in, d_out) has the codes of its transpose, and is given as it is stored."""
    W = np.random.default_rng(0).standard_normal((9, 14)).astype("float32")
    code = encode(W, way, transposed=True, double=double)
    want, nbytes = codec(W.T, way, double)
    assert code.shape == W.shape
    assert code.nbytes == nbytes
    assert bits(decode(code)) == bits(want.T)
    assert bits(decode(code, np.empty(W.shape, "float64"))) == bits(want.T.astype("float64"))
    with pytest.raises(ShapeError, match=r"^out: expected \(9, 14\), set by the weight, got \(14, 9\)$"):
        decode(code, np.empty((14, 9), "float32"))


def test_bfloat16_as_it_is_stored_is_not_copied():
    W = np.random.default_rng(0).standard_normal((9, 14)).astype(ml_dtypes.bfloat16)
    assert encode(W, "bf16").held is W


# ---- passes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "double"), KINDS, ids=IDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("engine", ["reference", "fast"])
def test_gradients_are_those_of_a_dense_base_of_the_same_numbers(way, double, dtype, engine):
    """Bit for bit, masks and all, with checkpointing too: gx flows through what the codes stand for."""
    stored = tiny.model(dtype=dtype)
    few = quantised(stored, way, double=double)
    dense = replace(stored, weights={name: np.array(W) for name, W in few.weights.items()})
    sites, trained, _ = tiny.start(stored, lora_dropout=0.3, modules_to_save=["norm"])
    b = tiny.batch()
    how = {**LM, "n": count("CAUSAL_LM", b.labels), "dropout": tiny.DROPOUT, "engine": engine}
    want = loss_and_gradients(dense, sites, trained, b, **how)
    same(loss_and_gradients(few, sites, trained, b, **how), want)
    same(loss_and_gradients(few, sites, trained, b, **how, checkpoint=True), want)
    other = loss_and_gradients(stored, sites, trained, b, **how)
    assert bits(other[0]) != bits(want[0])  # the codes are not the weights


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("engine", ["reference", "fast"])
def test_one_layer_is_written_out_at_a_time(engine, checkpoint):
    """Nothing that a pass keeps holds a weight that was written out."""
    stored = tiny.model(dtype="float32")
    few = quantised(stored)
    sites, trained, _ = tiny.start(stored, use_dora=True)
    b, live, most = tiny.batch(), set(), [0]

    def watched(code, out=None):
        found = decode(code, out)
        live.add(key := object())
        weakref.finalize(found, live.discard, key)
        gc.collect(0)
        most[0] = max(most[0], len(live))
        return found

    with mock.patch("lorax_np.models.quantised.decode", watched):
        loss_and_gradients(few, sites, trained, b, **LM, n=20, engine=engine, checkpoint=checkpoint)
    assert most == [1]
    assert not live


def test_many_threads_write_out_at_once():
    weights = quantised(tiny.model(hidden_size=512, intermediate_size=300, dtype="float32")).weights
    names = sorted(weights.codes)
    want = {name: bits(weights[name]) for name in names}
    wrong = []

    def ask(names):
        outs = {weights.shape(name): np.empty(weights.shape(name), "float32") for name in names}
        for name in names:
            if bits(weights.into(name, outs[weights.shape(name)])) != want[name]:
                wrong.append(name)

    threads = [threading.Thread(target=ask, args=(names[i:] + names[:i],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- other families ----------------------------------------------------------------------------------------

NEXT = np.array([4, 7, -100, -100, 1, 9, 0, 3, -100])
GATES = {f"model.layers.{i}.mlp.gate" for i in (0, 1)}
T5_LEFT = {f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias" for stack in ("encoder", "decoder")}
FAMILIES = {  # config, task, batch, modules whose matrices stay as they are
    "bert": (test_models_bert.CONFIG, "TOKEN_CLS", None, {"classifier"}),
    "gpt2": (test_models_gpt2.CONFIG, "CAUSAL_LM", None, {"lm_head"}),
    "t5": (test_models_t5.GATED, "SEQ_2_SEQ_LM", test_models_t5.batch_of(), {"lm_head", "shared", *T5_LEFT}),
    "moe": (
        test_models_moe.CONFIG,
        "CAUSAL_LM",
        None,
        {"lm_head", *GATES},
    ),
}


@pytest.mark.parametrize("way", ["nf4", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_have_the_gradients_of_a_dense_base(family, way):
    """Conv1D among them, which is held the other way round, and experts fused into one tensor."""
    config, task, batch, left = FAMILIES[family]
    stored = whole.model_of(config, task)
    few = quantised(stored, way)
    matrices = {name for name, W in stored.weights.items() if W.ndim > 1 and "embed" not in name}
    tables = {"transformer.wte.weight", "transformer.wpe.weight"}
    assert set(few.weights.codes) == matrices - tables - {f"{name}.weight" for name in left}
    dense = replace(stored, weights={name: np.array(W) for name, W in few.weights.items()})
    assert all(code.transposed == (family == "gpt2") for code in few.weights.codes.values())
    parameters = {"target_parameters": ["experts.gate_up_proj"]} if family == "moe" else {}
    trained, sites = whole.adapted(stored, targets="all-linear", **parameters)
    batch = batch or whole.batch_of(11, NEXT % 3 if family == "bert" else NEXT, types=2 * (family == "bert"))
    how = {"task": task, "n": 6, "dropout": tiny.DROPOUT}
    want = loss_and_gradients(dense, sites, trained, batch, **how)
    same(loss_and_gradients(few, sites, trained, batch, **how, checkpoint=True), want)
    assert bits(loss(stored, sites, trained, batch, task=task, n=6)) != bits(want[0])


# ---- memory ------------------------------------------------------------------------------------------------


def test_memory_is_that_of_the_codes_and_one_tensor(tmp_path):
    """Of a file in bfloat16, which is widened as it is read: 21 tensors, of which one is there at a time."""
    changed = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32}
    tensors = {n: W.astype(ml_dtypes.bfloat16) for n, W in tiny.weights(dtype="float32", **changed).items()}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(tiny.CONFIG | changed))
    del tensors
    model = load_model(tmp_path, dtype="float32")
    largest = 4 * 256 * 512
    tracemalloc.start()
    try:
        few = quantised(model)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    n = sum(np.prod(few.weights.shape(name)) for name in few.weights.codes)
    print(
        f"{n} weights: {few.weights.nbytes} bytes counted, {held} held, {peak} at most, {largest} the largest"
    )
    assert few.weights.nbytes == n / 2 + 4 * n / 64
    assert few.weights.nbytes <= held <= few.weights.nbytes + 40_000
    # beside the largest tensor, what one is quantised by: pieces of 65,536 entries
    assert peak <= few.weights.nbytes + largest + 40_000 + 32 * 65_536
    assert "0 held" in repr(model.weights)
    config = lx.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights="olora")
    quantised_start(model, config, np.random.default_rng(0))
    assert "0 held" in repr(model.weights)


# ---- starts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "n_bits"), [("nf4", 4), ("int8", 8)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_loftq_leaves_is_held_without_loss(way, n_bits, dtype):
    """Its residual lies on the codes' grid: the base is the one that the adapters were fitted to.

    In 8 bits the codes are, and their scales within the roundings of 127 and its reciprocal.
    """
    dense = tiny.model(dtype=dtype)
    names = ["q_proj", "down_proj"]
    config = lx.LoraConfig(
        r=2,
        target_modules=names,
        init_lora_weights="loftq",
        loftq_config={"loftq_bits": n_bits, "loftq_iter": 3},
    )
    weights, adapters, sites = lx.inject(dense.weights, config, np.random.default_rng(0))
    few, mine, places, found = quantised_start(dense, config, np.random.default_rng(0), way=way)
    assert places == sites
    assert list(mine) == list(adapters)
    assert found == plan(dense.weights, config)
    for name, site in sites.items():
        assert bits(mine[name].A) == bits(adapters[name].A)
        assert bits(mine[name].B) == bits(adapters[name].B)
        held, rest = few.weights[site.weight], weights[site.weight]
        if way == "nf4":
            assert bits(held) == bits(rest)
        else:  # absmax·127/127 is absmax but for three roundings
            assert bits(few.weights.codes[site.weight].held.codes) == bits(quantise_int8(rest).codes)
            np.testing.assert_allclose(held, rest, rtol=6 * 2.0**-24, atol=0)
        assert not np.allclose(held, quantised(dense, way).weights[site.weight], rtol=1e-4)
    assert len(few.weights.codes) == 21


def test_starts_that_read_no_weight_are_injects_and_dora_reads_the_codes():
    dense = tiny.model(dtype="float32")
    config = lx.LoraConfig(r=2, target_modules=["v_proj"], use_dora=True, modules_to_save=["up_proj"])
    few, adapters, _, _ = quantised_start(dense, config, lx.torch_generator(3), way="int8")
    _, plain, _ = lx.inject(dense.weights, config, lx.torch_generator(3))
    for name, adapter in adapters.items():
        assert bits(adapter.A) == bits(plain[name].A)
        W = few.weights[f"{name}.weight"]
        np.testing.assert_allclose(adapter.m, np.sqrt((W.astype("float64") ** 2).sum(axis=1)), rtol=1e-6)
    whole = [name for name in dense.weights if "up_proj" in name]
    assert len(whole) == 3
    assert all(few.weights[name] is dense.weights[name] for name in whole)


def test_the_rest_that_pissa_leaves_is_what_is_held():
    dense = tiny.model(dtype="float32")
    config = lx.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights="pissa")
    weights, adapters, sites = lx.inject(dense.weights, config)
    few, mine, _, _ = quantised_start(dense, config, way="nf4")
    for name, site in sites.items():
        assert bits(mine[name].A) == bits(adapters[name].A)
        assert bits(few.weights[site.weight]) == bits(codec(weights[site.weight], "nf4", False)[0])


def test_a_rest_that_is_left_in_a_head_stays_dense():
    dense = tiny.model(dtype="float32")
    config = lx.LoraConfig(r=2, target_modules=["lm_head", "o_proj"], init_lora_weights="pissa")
    weights, _, _ = lx.inject(dense.weights, config)
    few, _, _, _ = quantised_start(dense, config, way="int8")
    assert "lm_head.weight" not in few.weights.codes
    assert bits(few.weights["lm_head.weight"]) == bits(weights["lm_head.weight"])
    assert few.weights["model.norm.weight"] is dense.weights["model.norm.weight"]


# ---- other libraries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", [lib for lib in LIBRARIES if lib.name != "numpy"], ids=lambda lib: lib.name)
@pytest.mark.parametrize(("way", "double"), KINDS[:3], ids=IDS[:3])
def test_codes_that_lie_on_a_device_stand_for_the_same_bits(library, way, double):
    for shape in ((7, 9), (3, 64), (130, 129), (3, 5, 7)):
        W = np.random.default_rng(0).standard_normal(shape).astype("float32")
        code = encode(library.place(W), way, double=double)
        found = decode(code)
        assert type(found) is type(library.place(W)) or library.name == "guarded"
        assert bits(library.host(found)) == bits(codec(W, way, double)[0])


@pytest.mark.parametrize(
    "library", [lib for lib in LIBRARIES if lib.name == "array_api_strict"], ids=lambda lib: lib.name
)
def test_a_pass_over_codes_in_another_library(library):
    dense = tiny.model(dtype="float32", xp=library.xp)
    few = quantised(dense, "nf4", double=True)
    b = tiny.batch()
    value = loss(few, {}, lx_trained(), b, **LM, n=20, engine="reference")
    host = quantised(tiny.model(dtype="float32"), "nf4", double=True)
    want = loss(host, {}, lx_trained(), b, **LM, n=20, engine="reference")
    assert abs(float(value) - float(want)) < 1e-5 * float(want)


def lx_trained():
    return tiny.Trained({}, {})


# ---- refusals ----------------------------------------------------------------------------------------------


def test_what_is_refused():
    dense = tiny.model(dtype="float32")
    with pytest.raises(
        ConfigError, match=r"^way: expected one of nf4, int8, bf16, got 'nf5' \(did you mean 'nf4'\?\)$"
    ):
        quantised(dense, "nf5")
    with pytest.raises(ConfigError, match=r"^double: expected nf4, whose absmax it quantises, got int8$"):
        quantised(dense, "int8", double=True)
    with pytest.raises(ConfigError, match=r"q_proj.weight: block: expected one of 32, 64, .*, got 48$"):
        quantised(dense, block=48)
    with pytest.raises(ConfigError, match=r"^model: expected weights as they are stored, got some in few bits"):
        quantised(quantised(dense), "int8")
    name = "model.layers.1.mlp.up_proj.weight"
    broken = np.array(dense.weights[name])
    broken[0, 0] = np.nan
    with pytest.raises(ConfigError, match=rf"^{name}: W: expected finite numbers"):
        quantised(replace(dense, weights={**dense.weights, name: broken}))
    weights = quantised(dense).weights
    with pytest.raises(KeyError):
        weights["x"]
    with pytest.raises(ShapeError, match=r"^out: expected \(14, 10\) set by q, got \(10, 14\)$"):
        weights.into(name, np.empty((10, 14), "float32"))
    with pytest.raises(DtypeError, match=r"^out: expected a floating dtype, got int32$"):
        weights.into(name, np.empty((14, 10), "int32"))
    weights = quantised(dense, "bf16").weights
    with pytest.raises(DtypeError, match=r"^out: expected a floating dtype, got int32$"):
        weights.into(name, np.empty((14, 10), "int32"))
    with pytest.raises(ShapeError, match=r"^out: expected \(14, 10\), set by the weight, got \(10, 14\)$"):
        weights.into(name, np.empty((10, 14), "float32"))
    assert coded_names(dense, [name]).keys() == coded_names(dense).keys() - {name}
