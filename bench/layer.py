"""What a layer's forward and backward cost, as ratios to the two products that any engine must make.

    python bench/layer.py [--backend numpy|cupy] [--rounds 15] [--json FILE]

One step is forward and backward with the gradient by x. The yardstick, timed in turn with it in the same
process, is x Wᵀ and gy W alone. Figures are medians; a ratio is the median of the ratios round by round.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np

import lorax_np as lx
from lorax_np.backend import namespace

SIZES = ((512, 576, 576), (1024, 2048, 2048))  # tokens, d_in, d_out
KINDS = {
    "LoRA": (False, 0.0),
    "LoRA, p = 0.05": (False, 0.05),
    "DoRA": (True, 0.0),
    "DoRA, p = 0.05": (True, 0.05),
}
RANK, SCALING = 16, 1.7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("numpy", "cupy"), default="numpy")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    xp = namespace(arguments.backend)

    def seconds(run) -> float:
        start = time.perf_counter()
        run()
        if xp is not np:
            xp.cuda.get_current_stream().synchronize()
        return time.perf_counter() - start

    info = lx.backend_info()
    where = info["cupy"] if xp is not np else f"NumPy {info['numpy']}, {info['blas']}"
    print(f"{where}, float32, r = {RANK}")
    print(f"{'tokens, d_in, d_out':<22}{'kind':<18}{'products ms':>12}{'step ms':>10}{'ratio':>8}")
    rows = []
    for tokens, d_in, d_out in SIZES:
        for kind, (dora, p) in KINDS.items():
            rng = np.random.default_rng(0)

            def draw(*shape: int, rng=rng):
                return xp.asarray(rng.standard_normal(shape, dtype=np.float32))

            x, gy, base = draw(tokens, d_in), draw(tokens, d_out), lx.Linear(draw(d_out, d_in))
            adapter = lx.Adapter(draw(RANK, d_in), draw(d_out, RANK))
            if dora:
                m = xp.asarray(lx.row_norms(base, adapter, scaling=SCALING), dtype=xp.float32)
                adapter = lx.Adapter(adapter.A, adapter.B, m=m)

            def products(x=x, gy=gy, W=base.W) -> None:
                x @ W.T, gy @ W

            def step(x=x, gy=gy, base=base, adapter=adapter, p=p) -> None:
                mask = lx.dropout_mask(x.shape, p, xp=xp) if p else None
                _, saved = lx.lora_linear_forward(x, base, adapter, scaling=SCALING, mask=mask)
                lx.lora_linear_backward(gy, saved, base, adapter, scaling=SCALING)

            seconds(products), seconds(step)
            rounds = [(seconds(products), seconds(step)) for _ in range(arguments.rounds)]
            yard, took = (statistics.median(column) * 1e3 for column in zip(*rounds, strict=True))
            ratio = statistics.median(b / a for a, b in rounds)
            print(f"{f'{tokens}, {d_in}, {d_out}':<22}{kind:<18}{yard:>12.2f}{took:>10.2f}{ratio:>8.2f}")
            rows.append(
                {
                    "size": [tokens, d_in, d_out],
                    "kind": kind,
                    "products_ms": yard,
                    "step_ms": took,
                    "ratio": ratio,
                }
            )
    if arguments.json:
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": platform.platform(),
            "rounds": arguments.rounds,
            **info,
        }
        arguments.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
