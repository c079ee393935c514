"""What has no place in another format is refused by name."""

from dataclasses import replace

import numpy as np
import pytest
from convert_samples import base, conv_files, default_config, files
from converting import EVERY, NAMES, ONE, ROWS, options, refusal, there

from lorax_np.io.convert import plan_adapter

# ---- what has no place -------------------------------------------------------------------------------------


def with_part(**parts):
    what = files([ONE], default_config())
    return what._replace(adapters={ONE: replace(what.adapters[ONE], **parts)})


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize(
    ("what", "words"),
    [
        (with_part(bB=np.ones(ROWS, "f4")), f"{ONE}: expected no bias of B, for which the format has no place"),
        (
            files([ONE], default_config())._replace(saved={"lm_head.weight": np.ones((17, 10), "f4")}),
            "got 'lm_head.weight' besides",
        ),
    ],
)
def test_biases_and_saved_modules_have_no_place(tmp_path, target, what, words):
    refusal(lambda: plan_adapter(what, target, options(base(tmp_path / "base"))), words)


@pytest.mark.parametrize("target", sorted(set(EVERY) - {"loralib"}))
def test_trained_biases_have_a_place_in_loralib_alone(tmp_path, target):
    what = with_part(b=np.ones(ROWS, "f4"))
    words = f"{ONE}: expected no trained bias, for which the format has no place"
    refusal(lambda: plan_adapter(what, target, options(base(tmp_path / "base"))), words)


@pytest.mark.parametrize("target", ["gguf", "kohya", "loralib"])
def test_dora_has_no_place(tmp_path, target):
    what = files([ONE], default_config(use_dora=True))
    words = f"{target}: {ONE}: expected no magnitude, for which the format has no place, got DoRA's m"
    refusal(lambda: there(tmp_path, what, target, base=base(tmp_path / "base")), words)


@pytest.mark.parametrize("target", ["mlx", "torchtune", "gguf"])
def test_convolutions_have_no_place(tmp_path, target):
    what = conv_files({"net.0": (4, 5, 3, 3)}, default_config())
    words = "got conv, for which the format has no place"
    refusal(lambda: there(tmp_path, what, target, base=base(tmp_path / "base")), words)


@pytest.mark.parametrize("target", ["kohya", "torchtune"])
def test_embeddings_have_no_place(tmp_path, target):
    what = files([ONE], default_config(), embedding=True)
    words = "got embedding, for which the format has no place"
    refusal(lambda: there(tmp_path, what, target, base=base(tmp_path / "base")), words)


@pytest.mark.parametrize("target", ["mlx", "torchtune"])
def test_several_ranks_have_no_place(tmp_path, target):
    what = files(NAMES, default_config(rank_pattern={"lm_head": 2}))
    words = f"{target}: lm_head: expected rank 3 for all sites, as the format has one, got 2"
    refusal(lambda: there(tmp_path, what, target, base=base(tmp_path / "base")), words)


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
def test_factors_of_a_changed_base_do_not_travel(tmp_path, target, start):
    what = files([ONE], default_config())
    what = what._replace(config=replace(what.config, init_lora_weights=start))
    words = f"{target}: init_lora_weights: expected a start that leaves the base as it is, got '{start}'"
    refusal(lambda: plan_adapter(what, target, options(base(tmp_path / "base"))), words)


@pytest.mark.parametrize(
    ("target", "changes", "words"),
    [
        (
            "gguf",
            None,
            "gguf: expected a base (--base), for its architecture and the heads of Q and K, got none",
        ),
        (
            "gguf",
            {"model_type": "gemma"},
            "model_type of the base: expected one of llama, mistral, qwen2, qwen3",
        ),
        ("gguf", {"num_attention_heads": None}, "got one that does not say its num_attention_heads"),
        ("gguf", {"num_attention_heads": 5}, "rows: expected 5 heads of one even size, got 24 rows"),
        ("torchtune", None, f"torchtune: {ONE}: expected a base of llama, mistral, qwen2, whose order"),
        ("torchtune", {"model_type": "phi3"}, "got 'phi3'"),
    ],
)
def test_rows_of_q_need_a_base_that_is_known(tmp_path, target, changes, words):
    checkpoint = None if changes is None else base(tmp_path / "base", **changes)
    refusal(lambda: there(tmp_path, files([ONE], default_config()), target, base=checkpoint), words)


@pytest.mark.parametrize("target", ["mlx", "gguf"])
@pytest.mark.parametrize(("tied", "came"), [(True, "one that is tied"), (None, "a base that does not say")])
def test_a_tied_embedding_means_another_model_there(tmp_path, target, tied, came):
    what = files([ONE], default_config(), embedding=True)
    checkpoint = base(tmp_path / "base", tie_word_embeddings=tied)
    refusal(lambda: there(tmp_path, what, target, base=checkpoint), f"got {came}")


def test_torchtune_scales_biases_that_peft_does_not(tmp_path):
    what = files([ONE], default_config(use_dora=True))
    checkpoint = base(tmp_path / "base", bias=ONE)
    words = (
        "expected a layer without a bias, which torchtune's DoRA scales and PEFT's does not, got one with it"
    )
    refusal(lambda: there(tmp_path, what, "torchtune", base=checkpoint), words)


@pytest.mark.parametrize("target", ["torchtune", "gguf"])
def test_names_outside_the_tables_are_refused(tmp_path, target):
    what = files([ONE], default_config())
    what = what._replace(
        adapters={"h.0.attn": what.adapters[ONE]}, sites={"h.0.attn": replace(what.sites[ONE], name="h.0.attn")}
    )
    refusal(
        lambda: plan_adapter(what, target, options(base(tmp_path / "base"))), "h.0.attn: expected a module of"
    )


def test_gguf_has_no_float64(tmp_path):
    what = files([ONE], default_config(), dtype=np.float64)
    words = "expected one of float32, float16, bfloat16, got float64, which would be rounded"
    refusal(lambda: there(tmp_path, what, "gguf", base=base(tmp_path / "base")), words)
