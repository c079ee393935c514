"""python tests/stream/kill_merge.py [TIMES]: merges killed at random moments.

Each is then absent or whole, and goes on to the same bytes.
"""

import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

if __name__ == "__main__":
    from killing import killed_at_random

    times = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    with tempfile.TemporaryDirectory() as folder:
        whole, resumed = killed_at_random(Path(folder), times, seed=1, say=print)
    print(
        f"{times} merges killed: none left damage; {whole} were whole, {resumed} went on after finished files"
    )
