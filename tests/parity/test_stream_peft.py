"""Whole checkpoints merged by PEFT 0.21.2 and by us, of the same files: a llama, tied ends, a GPT-2."""

import numpy as np
import pytest

from lorax_np.io.checkpoint import open_checkpoint
from lorax_np.stream.merge import merge_checkpoint

pytestmark = [
    pytest.mark.peft,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT's, of tied ends and of where Conv1D lies
]
torch = pytest.importorskip("torch", reason="PEFT needs torch")
peft = pytest.importorskip("peft", reason="PEFT is the peer of these tests")
transformers = pytest.importorskip("transformers", reason="the models are transformers'")


def llama(tied):
    config = transformers.LlamaConfig(
        vocab_size=41,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=41, n_embd=24, n_layer=2, n_head=3))


CASES = {
    "linear": (lambda: llama(False), {"target_modules": "all-linear"}),
    "dora": (lambda: llama(False), {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "rslora, patterns": (
        lambda: llama(False),
        {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    ),
    "embedding and saved head": (
        lambda: llama(False),
        {"target_modules": ["embed_tokens", "v_proj"], "modules_to_save": ["lm_head"]},
    ),
    "Conv1D": (lambda: gpt2(), {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "token rows": (
        lambda: llama(False),
        {"target_modules": ["v_proj"], "trainable_token_indices": [7, 3]},
    ),
}


def pair(tmp_path, make, settings, dtype):
    """The base and the adapter as files, and PEFT's model with every trainable tensor moved."""
    torch.manual_seed(0)
    model = make().to(dtype)
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **settings)
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    wrapped.save_pretrained(tmp_path / "adapter")
    return wrapped.eval()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("make", "settings"), CASES.values(), ids=CASES)
def test_tensors_and_logits(tmp_path, make, settings, dtype):
    wrapped = pair(tmp_path, make, settings, getattr(torch, dtype))
    ids = torch.tensor([[7, 3, 12, 40, 0]])
    before = wrapped(ids).logits.detach().numpy()
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    ours = open_checkpoint(tmp_path / "out")
    theirs = wrapped.merge_and_unload().state_dict()
    eps = {"float64": 2.0**-52, "float32": 2.0**-23}[dtype]
    for name in ours:
        key = name if name in theirs else f"transformer.{name}"
        want, got = theirs[key].numpy(), ours[name]
        assert got.dtype == want.dtype
        # PEFT: a product over r = 3, a scaling, a sum, all in dtype; DoRA a norm of 40 squares, and two steps
        bound = 60 * eps * (np.abs(want).max() + 1)
        assert np.abs(got - want).max() <= (min(bound, 1e-12 * 60) if dtype == "float64" else bound), name
    again = type(make()).from_pretrained(tmp_path / "out", dtype=getattr(torch, dtype)).eval()
    after = again(ids).logits.detach().numpy()
    assert np.abs(after - before).max() <= 1000 * eps * (np.abs(before).max() + 1)


@pytest.mark.parametrize("end", ["embed_tokens", "lm_head"])
def test_two_ends_that_are_one_tensor(tmp_path, end):
    """peft-0.21.2/tied-merge: PEFT merges into both ends, so that its merged model computes something else."""
    wrapped = pair(tmp_path, lambda: llama(True), {"target_modules": [end, "v_proj"]}, torch.float64)
    ids = torch.tensor([[7, 3, 12, 40, 0]])
    before = wrapped(ids).logits.detach().numpy()
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
    assert np.abs(again(ids).logits.detach().numpy() - before).max() <= 1e-12 * (np.abs(before).max() + 1)
    theirs = wrapped.merge_and_unload().eval()
    assert np.abs(theirs(ids).logits.detach().numpy() - before).max() > 1e-2
