"""Adapters that PEFT 0.21.2 itself trains and saves: the auditor has nothing to say of them."""

import pytest
from peft_layers import peft, torch
from torch import nn

from lorax_np.audit import audit
from lorax_np.io.writer import write_safetensors

pytestmark = [
    pytest.mark.peft,
    pytest.mark.filterwarnings("ignore:Adapter .default..*invalid shape"),  # PEFT warns of every bias of B
]


class Net(nn.Module):
    """A layer of each kind."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(30, 12)
        self.q_proj = nn.Linear(12, 20)
        self.up_proj = nn.Linear(20, 16, bias=False)
        self.conv = nn.Conv1d(16, 10, 3, groups=1)
        self.head = nn.Linear(10, 3)
        self.norm = nn.LayerNorm(20)

    def forward(self, ids):
        h = self.up_proj(self.norm(self.q_proj(self.emb(ids))))
        return self.head(self.conv(h.transpose(1, 2)).mean(-1))


FIELDS = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "r": 4, "lora_alpha": 7},
    {"target_modules": ["q_proj", "up_proj"], "use_rslora": True},
    {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"},
    {"target_modules": ["q_proj", "up_proj"], "bias": "all"},
    {"target_modules": ["q_proj"], "lora_bias": True},
    {"target_modules": ["q_proj"], "modules_to_save": ["head"]},
    {"target_modules": r".*(q|up)_proj", "rank_pattern": {"up_proj": 3}, "alpha_pattern": {"q_proj": 5}},
    {"target_modules": "all-linear"},
    {"target_modules": ["emb", "q_proj"]},
    {"target_modules": ["emb"], "use_dora": True},
    {"target_modules": ["conv"]},
    {"target_modules": ["conv", "q_proj"], "use_dora": True, "r": 5},
    {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal", "r": 6},
    {"target_modules": ["q_proj"], "init_lora_weights": False},
    {"target_modules": ["q_proj"], "trainable_token_indices": {"emb": [1, 5]}},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_nothing_is_said_of_what_peft_saves(tmp_path, fields):
    torch.manual_seed(len(str(fields)))
    model = peft.get_peft_model(Net(), peft.LoraConfig(**fields))
    base = {name: value.detach().numpy() for name, value in Net().state_dict().items()}
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad:
                value.add_(0.01 * torch.randn_like(value))
            elif "base_layer" in name or "lora_" not in name:
                key = name.removeprefix("base_model.model.").replace(".base_layer", "")
                base[key] = value.detach().numpy()
    model.save_pretrained(tmp_path / "adapter")
    write_safetensors(tmp_path / "base.safetensors", base)
    found = audit(tmp_path / "adapter", base)
    assert found.passed, str(found)
    assert len(found.rows) == sum(
        name.endswith(("lora_A", "lora_embedding_A")) and bool(len(m))
        for name, m in model.named_modules()
        if hasattr(m, "__len__")
    )
    assert all(row.relative is not None for row in found.rows)
