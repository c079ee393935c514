"""transformers and PEFT as an engine of the bench of training."""

from typing import Any

import numpy as np

from .training_models import ALPHA, LR, RANK, SEED, SEVEN, model_path, start


def versions(*libraries: Any) -> str:
    """Names and versions of libraries, in words."""
    return ", ".join(f"{each.__name__} {each.__version__}" for each in libraries)


class Masks:
    """lorax_np's dropout masks, multiplied with what comes to A: to be called in place of torch's dropout."""

    def __init__(self, torch: Any, site: str, p: float) -> None:
        """site : the name of its module in the model; step and index are told before each forward."""
        self.torch, self.site, self.p = torch, site, p
        self.step, self.index = 0, list[int]()

    def __call__(self, x: Any) -> Any:
        """x∘mask, x : (sequences, T, d_in), each sequence with the mask of its number."""
        import lorax_np as lx

        about = x.shape[1:], self.p, SEED, self.step, lx.site_key(self.site)
        masks = np.stack([lx.dropout_mask(*about, c3=index) for index in self.index])  # (sequences, T, d_in)
        return x * self.torch.from_numpy(masks)


class Peft:
    """transformers and PEFT in float32.

    device : where it computes;  clip : the norm that gradients are clipped to, 0 clips nothing
    """

    device, clip = "cpu", 0.0
    masks: tuple[Masks, ...] = ()
    t = 0

    def weights(self) -> tuple[Any, Any]:
        """The base's tensors by name, and its config."""
        import lorax_np as lx

        found = lx.open_checkpoint(model_path())
        return found, found.config

    def open(
        self, p: float, checkpoint: bool, workers: int | str = "auto", masks: bool = False, rows: int = 0
    ) -> dict[str, Any]:
        """masks : whether lorax_np's stand in for its own;  rows : has all at once"""
        import peft
        import torch
        import transformers

        self.torch = torch
        weights, about = self.weights()
        known = {k: v for k, v in about.items() if k not in ("torch_dtype", "model_type")}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**known))
        tensors = {name: torch.from_numpy(np.array(weights[name], "float32")) for name in weights}
        model.load_state_dict(tensors, strict=False)
        del tensors
        config = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": p, "target_modules": list(SEVEN)}
        if checkpoint:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
            model.config.use_cache = False
        self.model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
        given = start(weights, about["num_hidden_layers"])
        own = dict(self.model.named_modules())
        self.layers = {site: own[f"base_model.model.{site}"] for site in given}
        with torch.no_grad():
            for site, (A, B) in given.items():
                self.layers[site].lora_A["default"].weight.copy_(torch.from_numpy(A))
                self.layers[site].lora_B["default"].weight.copy_(torch.from_numpy(B))
        if masks:
            self._mask(p)
        self.model.to(self.device).train()
        self.free = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(self.free, lr=LR, weight_decay=0.0)
        return {"engine": versions(torch, transformers, peft)}

    def loss(self, ids: list[list[int]], labels: list[list[int]]) -> Any:
        """Padded on the right to the longest; labels come shifted, and transformers shifts by itself."""
        longest = max(map(len, ids))
        fill = {name: np.full((len(ids), longest), value) for name, value in (("ids", 0), ("labels", -100))}
        seen = np.zeros((len(ids), longest), "int64")
        for i, (row, label) in enumerate(zip(ids, labels, strict=True)):
            fill["ids"][i, : len(row)], seen[i, : len(row)] = row, 1
            fill["labels"][i, 1 : len(row)] = label[:-1]
        tensors = [self.torch.from_numpy(x).to(self.device) for x in (fill["ids"], seen, fill["labels"])]
        whole = {} if seen.all() else {"attention_mask": tensors[1]}
        return self.model(input_ids=tensors[0], labels=tensors[2], use_cache=False, **whole).loss

    def _mask(self, p: float) -> None:
        """Put masks where PEFT has its dropout, in every adapter."""
        self.masks = tuple(Masks(self.torch, site, p) for site in self.layers)
        for mask, layer in zip(self.masks, self.layers.values(), strict=True):
            module = self.torch.nn.Module()
            module.forward = mask
            layer.lora_dropout["default"] = module

    def step(self, ids: list[list[int]], labels: list[list[int]]) -> float:
        for mask in self.masks:
            mask.step, mask.index = self.t, list(range(len(ids)))
        self.t += 1
        self.optimizer.zero_grad()
        loss = self.loss(ids, labels)
        loss.backward()
        if self.clip:
            self.torch.nn.utils.clip_grad_norm_(self.free, self.clip)
        self.optimizer.step()
        return float(loss.detach())

    def eval(self, ids: list[list[int]], labels: list[list[int]]) -> float:
        self.model.eval()
        with self.torch.no_grad():
            found = float(self.loss(ids, labels))
        self.model.train()
        return found

    def trained(self) -> np.ndarray:
        """A and B of every site, one behind another."""
        parts = [
            x["default"].weight.detach().cpu().numpy()
            for layer in self.layers.values()
            for x in (layer.lora_A, layer.lora_B)
        ]
        return np.concatenate([part.ravel() for part in parts])
