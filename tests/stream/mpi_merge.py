"""mpiexec -n 2 python -m mpi4py.futures tests/stream/mpi_merge.py BASE ADAPTER OUT: a merge over ranks."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]

if __name__ == "__main__":
    from mpi4py import MPI
    from mpi4py.futures import MPIPoolExecutor

    from lorax_np.stream.merge import merge_checkpoint

    with MPIPoolExecutor() as executor:
        found = merge_checkpoint(*sys.argv[1:4], executor=executor)
    print(f"{MPI.COMM_WORLD.Get_size()} ranks, {len(found.files)} files")
