"""The engine's ops as a subject: each is one method, (case, gy) to y and the gradients."""

from typing import Any

import numpy as np

from ... import fast, ops
from ..batteries.op_case import OpCase

Answer = tuple[Any, dict[str, Any]]


class OpsReference:
    """The ops of a model besides linear maps, in the array library xp."""

    xp: Any = np

    def _at(self, case: OpCase, gy: Any, *names: str) -> list[Any]:
        """Arrays of a case, and gy, where they are computed."""
        values = [*(getattr(case, name) for name in names), gy]
        return values if self.xp is np else [self.xp.asarray(value) for value in values]

    def rms_norm(self, case: OpCase, gy: Any) -> Answer:
        """y, and the gradients by x and w."""
        x, w, gy = self._at(case, gy, "x", "w")
        y, saved = ops.rms_norm_forward(x, w, eps=case.eps)
        return y, {"x": ops.rms_norm_backward(gy, saved, w), "w": ops.rms_norm_backward_w(gy, saved)}

    def layer_norm(self, case: OpCase, gy: Any) -> Answer:
        """y, and the gradients by x, w and b."""
        x, w, b, gy = self._at(case, gy, "x", "w", "b")
        y, saved = ops.layer_norm_forward(x, w, b, eps=case.eps)
        gx, gw = ops.layer_norm_backward(gy, saved, w), ops.layer_norm_backward_w(gy, saved)
        return y, {"x": gx, "w": gw, "b": self.xp.sum(gy, axis=0)}

    def rope(self, case: OpCase, gy: Any) -> Answer:
        """y, and the gradient by x."""
        x, cos, sin, gy = self._at(case, gy, "x", "cos", "sin")
        cos, sin = cos[:, None, :], sin[:, None, :]
        return ops.rope_forward(x, cos, sin), {"x": ops.rope_backward(gy, cos, sin)}

    def attention(self, case: OpCase, gy: Any) -> Answer:
        """y, and the gradients by q, k, v and R."""
        return self._attention(ops.attention_forward, ops.attention_backward, case, gy)

    def _attention(self, forward: Any, backward: Any, case: OpCase, gy: Any) -> Answer:
        q, k, v, gy = self._at(case, gy, "q", "k", "v")
        how: Any = {name: getattr(case, name) for name in ("starts", "key_starts", "scale", "causal", "window")}
        if "R" in case.at:
            (R,) = self._at(case, case.R)
            how["relative"] = ops.Relative(R, case.bidirectional, case.max_distance)
        y, saved = forward(q, k, v, **how, block=4)
        gq, gk, gv, gR = backward(gy, saved, **how, block=3)
        return y, {"q": gq, "k": gk, "v": gv} | ({} if gR is None else {"R": gR})

    def swiglu(self, case: OpCase, gy: Any) -> Answer:
        """y, and the gradients by u and w."""
        u, w, gy = self._at(case, gy, "u", "w")
        y, saved = ops.swiglu_forward(u, w)
        gu, gw = ops.swiglu_backward(gy, saved)
        return y, {"u": gu, "w": gw}

    def gelu(self, case: OpCase, gy: Any) -> Answer:
        """y, and the gradient by u."""
        u, gy = self._at(case, gy, "u")
        return ops.gelu_forward(u), {"u": ops.gelu_backward(gy, u)}

    def gelu_tanh(self, case: OpCase, gy: Any) -> Answer:
        """y, and the gradient by u."""
        u, gy = self._at(case, gy, "u")
        return ops.gelu_tanh_forward(u), {"u": ops.gelu_tanh_backward(gy, u)}

    def cross_entropy(self, case: OpCase, gy: Any) -> Answer:
        """The loss, and the gradient by z."""
        z, labels, gy = self._at(case, gy, "z", "labels")
        loss, saved = ops.cross_entropy_forward(z, labels, n=case.n, smoothing=case.smoothing)
        return loss, {"z": gy * ops.cross_entropy_backward(saved)}

    def lookup(self, case: OpCase, gy: Any) -> Answer:
        """Rows of W, and the gradient by W."""
        W, ids, gy = self._at(case, gy, "W", "ids")
        return ops.lookup_forward(W, ids), {"W": ops.lookup_backward(gy, ids, W, padding=case.padding)}

    def router(self, case: OpCase, gy: Any) -> Answer:
        """Each token's weights where its experts stand, and the gradient by the logits."""
        z, gy = self._at(case, gy, "z")
        forward = ops.topk_softmax_forward if case.normalised else ops.softmax_topk_forward
        backward = ops.topk_softmax_backward if case.normalised else ops.softmax_topk_backward
        ids, w, saved = forward(z, case.k)
        gw = self.xp.take_along_axis(gy, ids, axis=1)
        columns = self.xp.arange(case.z.shape[1])[None, :]
        y = self.xp.zeros_like(z)
        for j in range(case.k):
            y = self.xp.where(columns == ids[:, j : j + 1], w[:, j : j + 1], y)
        return y, {"z": backward(gw, saved)}


class OpsFast(OpsReference):
    """The ops as a pass of the fast engine computes them on the host: three in its own way, others as above."""

    def layer_norm(self, case: OpCase, gy: Any) -> Answer:
        """y, and the gradients by x, w and b."""
        x, w, b, gy = self._at(case, gy, "x", "w", "b")
        y, saved = fast.general.layer_norm_forward(x, w, b, eps=case.eps)
        gx, gw = fast.general.layer_norm_backward(gy, saved, w), ops.layer_norm_backward_w(gy, saved)
        return y, {"x": gx, "w": gw, "b": self.xp.sum(gy, axis=0)}

    def attention(self, case: OpCase, gy: Any) -> Answer:
        """y, and the gradients by q, k, v and R."""
        return self._attention(fast.general.attention_forward, fast.general.attention_backward, case, gy)

    def gelu(self, case: OpCase, gy: Any) -> Answer:
        """y, and the gradient by u."""
        u, gy = self._at(case, gy, "u")
        y, slope = fast.general.gelu_sloped(u)
        return y, {"u": gy * slope}
