"""python tests/stream/kill_merge.py [TIMES [SHARDS [merge | init | pissa]]]: killed at random moments.

Each is then absent or whole, and goes on to the same bytes: after the files that were finished, and within the
one that was begun, which SHARDS of 1 has alone.
"""

import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

if __name__ == "__main__":
    from killing import killed_at_random

    times = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    shards = int(sys.argv[2]) if len(sys.argv) > 2 else 12
    work = sys.argv[3] if len(sys.argv) > 3 else "merge"
    with tempfile.TemporaryDirectory() as folder:
        whole, resumed = killed_at_random(Path(folder), times, 1, shards, work, say=print)
    print(
        f"{work} killed {times} times: none left damage; {whole} were whole, {resumed} went on where they were"
    )
