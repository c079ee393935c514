"""[mpiexec -n 2] python tests/train/mpi_train.py OUT ACCUMULATION: a run over ranks."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

if __name__ == "__main__":
    from small_run import examples, settings, started

    from lorax_np import parallel
    from lorax_np.parallel import world
    from lorax_np.train import train

    parallel.MOST = 1000  # so that buffers go in pieces, as those past 2 GiB do
    ranks = world()
    base, adapters, sites, lora = started()
    config = settings(iters=4, grad_accumulation_steps=int(sys.argv[2]))
    found = train(base, adapters, examples(), config, sites=sites, lora=lora, out=sys.argv[1], ranks=ranks)
    print(f"rank {ranks.rank} of {ranks.size}: step {found.step}", flush=True)
