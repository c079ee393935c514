"""MiniLM as a classifier, trained by lorax_np's general pass and by transformers and PEFT."""

from typing import Any

import numpy as np

from .training_models import CLASSES, LR, SEED, SMALL_RANK, minilm_path
from .training_peft import versions

LORA = {
    "r": SMALL_RANK,
    "lora_alpha": 2 * SMALL_RANK,
    "target_modules": ["query", "value"],
    "task_type": "SEQ_CLS",
}


class Ours:
    """As lorax-np train runs it: masks, the general pass, clipping, AdamW."""

    blas = "openblas"

    def open(self, p: float, checkpoint: bool, workers: int | str = "auto") -> dict[str, Any]:
        import lorax_np as lx
        from lorax_np.inject import saved_tensors
        from lorax_np.models.new_head import with_head
        from lorax_np.models.records import Trained
        from lorax_np.train import Passes, TrainConfig
        from lorax_np.train.step import start

        self.context = lx.fast.blas(self.blas)
        engine, rng = self.context.__enter__(), np.random.default_rng(7)
        model = with_head(lx.load_model(minilm_path()), "SEQ_CLS", CLASSES, rng)
        lora = lx.LoraConfig(**LORA, lora_dropout=p)
        _, adapters, sites = lx.inject(model.weights, lora, rng)
        self.trained = Trained(adapters, saved_tensors(model.weights, lx.plan(model.weights, lora)))
        config = TrainConfig(learning_rate=LR, seed=SEED, workers=workers, grad_checkpoint="off")
        self.passes = Passes(model, sites, self.trained, task="SEQ_CLS", config=config)
        self.state, self.t = start(self.trained, config), 0
        return {"engine": f"lorax_np {lx.__version__}, {self.passes.what}, {engine.what}"}

    def step(self, ids: list[list[int]], labels: list[int]) -> float:
        from lorax_np.models.records import Batch
        from lorax_np.train.step import parameters, train_step

        starts = tuple(int(n) for n in np.cumsum([0, *map(len, ids)]))
        batch = Batch(np.concatenate(ids), starts, np.array(labels), tuple(range(len(ids))))
        names = parameters(self.trained)
        rates = dict.fromkeys(names, LR), dict.fromkeys(names, 0.0)
        how = {"step": self.t, "rates": rates}
        self.trained, self.state, outcome = train_step(self.passes, self.trained, self.state, [batch], **how)
        self.t += 1
        return outcome.loss


class OursMkl(Ours):
    """The same with MKL behind gemm."""

    blas = "mkl"


class Peft:
    """transformers and PEFT in float32; the model's own dropout is off, as it is in lorax_np."""

    def open(self, p: float, checkpoint: bool, workers: int | str = "auto") -> dict[str, Any]:
        import peft
        import torch
        import transformers

        self.torch = torch
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "dtype": torch.float32}
        torch.manual_seed(7)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            minilm_path(), num_labels=CLASSES, **off
        )
        self.model = peft.get_peft_model(model, peft.LoraConfig(**LORA, lora_dropout=p))
        self.model.train()
        self.trained = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LR, weight_decay=0.0)
        return {"engine": versions(torch, transformers, peft)}

    def step(self, ids: list[list[int]], labels: list[int]) -> float:
        self.optimizer.zero_grad()
        longest = max(map(len, ids))  # padded on the right to it
        tensors = {
            "input_ids": self.torch.tensor([row + [0] * (longest - len(row)) for row in ids]),
            "labels": self.torch.tensor(labels),
        }
        if any(len(row) < longest for row in ids):
            seen = [[1] * len(row) + [0] * (longest - len(row)) for row in ids]
            tensors["attention_mask"] = self.torch.tensor(seen)
        loss = self.model(**tensors).loss
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return float(loss.detach())
