"""What the diagnosis calls each known fault: alone, in pairs, and with its own name out of the catalogue.

    python bench/diagnosis.py [--profiles fp32,bf16] [--pairs 200|all] [--seed 0] [--json FILE]

Goals, counting faults that hide below the roundings of a profile as found where they are printed with the right
layer: fp32 99 %, bf16 95 %, pairs 90 %, and no name for a fault that is not in the catalogue.
"""

import argparse
import json
import random
import time
from collections import Counter
from itertools import combinations
from pathlib import Path

from lorax_np.verify.diagnosis.dictionary import faults
from lorax_np.verify.diagnosis.trials import Trial, pair, single

FOUND = ("named", "class", "hidden")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", default="fp32,bf16")
    parser.add_argument("--pairs", default="200")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    data = {}
    for profile in arguments.profiles.split(","):
        start = time.perf_counter()
        alone = [single(id, profile) for id in faults()]
        print(f"{profile}, {len(alone)} faults, each planted alone ({time.perf_counter() - start:.1f} s)")
        show(alone)
        for trial in alone:
            if trial.outcome not in ("named", "hidden"):
                print(f"    {trial.planted[0]}: {trial.outcome}: {', '.join(trial.names)}")
        invented = {trial.planted[0]: trial.invented for trial in alone if trial.invented}
        print(f"    left out of the catalogue, called something else: {len(invented)} {invented or ''}")
        start = time.perf_counter()
        both = list(two(profile, arguments.pairs, arguments.seed))
        print(f"{profile}, {len(both)} pairs ({time.perf_counter() - start:.1f} s)")
        show(both)
        for trial in both:
            if trial.outcome in ("several", "unnamed", "wrong"):
                print(f"    {' + '.join(trial.planted)}: {trial.outcome}: {', '.join(trial.names[:6])}")
        data[profile] = {"alone": [vars(t) for t in alone], "pairs": [vars(t) for t in both]}
    if arguments.json:
        arguments.json.write_text(json.dumps(data, indent=1), encoding="utf-8")


def two(profile: str, count: str, seed: int):
    """Trials of all pairs of faults made of steps, or of so many at random."""
    some = [id for id, fault in faults().items() if fault.steps is not None]
    every = list(combinations(some, 2))
    random.Random(seed).shuffle(every)
    left = len(every) if count == "all" else int(count)
    for one, other in every:
        trial = pair(one, other, profile)
        if trial is not None and left > 0:
            left -= 1
            yield trial
        if left == 0:
            return


def show(trials: list[Trial]) -> None:
    """Counts of the outcomes, and the share that was found; masked pairs count in neither."""
    counts = Counter(trial.outcome for trial in trials)
    asked = len(trials) - counts["masked"]
    found = sum(counts[word] for word in FOUND)
    print("    " + ", ".join(f"{count} {word}" for word, count in counts.most_common()))
    print(f"    found {found} of {asked}: {100 * found / max(asked, 1):.1f} %")


if __name__ == "__main__":
    main()
