"""Gradients of SmolLM2 by several micro-batches beside those of one, as lorax-np train adds them up."""

from typing import Any

import numpy as np

from .training_models import SEED, model_path, start

PARTS = (8, 4, 2, 1)  # sequences of a micro-batch; the first is all of them


class Micro:
    """The planned pass in float32 or float64, with masks."""

    def open(self, p: float, dtype: str, checkpoint: bool = False) -> dict[str, Any]:
        import lorax_np as lx
        from lorax_np.config import Site
        from lorax_np.models.records import Trained
        from lorax_np.train import Passes, TrainConfig

        model = lx.load_model(model_path(), task="CAUSAL_LM", dtype=dtype)
        given = start(model.weights, model.config["num_hidden_layers"])
        adapters = {site: lx.Adapter(*(part.astype(dtype) for part in pair)) for site, pair in given.items()}
        about = {"kind": "linear", "r": len(next(iter(given.values()))[0]), "alpha": 32, "scaling": 2.0, "p": p}
        sites = {site: Site(name=site, weight=f"{site}.weight", **about) for site in given}
        config = TrainConfig(seed=SEED)
        self.trained = Trained(adapters, {})
        self.passes = Passes(model, sites, self.trained, task="CAUSAL_LM", config=config)
        return {"engine": f"lorax_np {lx.__version__}, {self.passes.what}"}

    def compare(self, ids: list[list[int]], labels: list[list[int]]) -> dict[str, Any]:
        """How far gradients in parts are from those at once: the worst entry, of its tensor's largest."""
        whole, *others = (self.gradients(ids, labels, each) for each in PARTS)
        gaps = {}
        for each, found in zip(PARTS[1:], others, strict=True):
            worst = (np.abs(found[name] - g).max() / np.abs(g).max() for name, g in whole.items())
            gaps[f"{len(ids) // each}x{each}"] = float(max(worst))
        return {"gaps": gaps}

    def gradients(self, ids: list[list[int]], labels: list[list[int]], each: int) -> dict[str, np.ndarray]:
        """Gradients of all sequences by micro-batches of so many, as a step has them."""
        from lorax_np.models.records import Batch, Dropout
        from lorax_np.parallel import Alone, summed
        from lorax_np.train.step import packed, parameters
        from lorax_np.tree import layout, unflatten

        params, n, parts = parameters(self.trained), sum(len(row) - 1 for row in ids), []
        for at in range(0, len(ids), each):
            some = slice(at, at + each)
            starts = tuple(int(i) for i in np.cumsum([0, *map(len, ids[some])]))
            index = tuple(range(len(ids))[some])
            batch = Batch(np.concatenate(ids[some]), starts, np.concatenate(labels[some]), index)
            loss, found = self.passes.gradients(self.trained, batch, n=n, dropout=Dropout(SEED, 0))
            parts.append(packed(parameters(found), loss, params))
        return dict(unflatten(summed(Alone(), parts)[:-1], layout(params)))
