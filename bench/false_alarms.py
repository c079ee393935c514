"""How often the harness's deviations accuse a right layer, of any kind, profile and order of evaluation.

    python bench/false_alarms.py [--cases 100000] [--profile all] [--seed 0] [--json FILE] [--workers 2]

Each case draws sizes, rank, leading axes, scales of 10^±3, dropout, biases, rank stabilisation and DoRA, with
weights that nearly cancel too, conventions, and one order of evaluation; it is computed in the profile's
arithmetic, emulated, and compared with a truth in wider arithmetic (fp64: long doubles, where there are any).
z is the error in deviations: z > 8 of an entry or of a slope is a false alarm; *over*, past the hard ceiling.
Interrupted, it prints what it has. A case is reproduced by `--only PROFILE:NUMBER`.
"""

import argparse
import json
import multiprocessing
import signal
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np

from lorax_np import LoraConfig
from lorax_np.verify.bounds.sigma import THRESHOLD, ceiling, deviations, tolerance
from lorax_np.verify.bounds.slope import counted, redrawn, slopes
from lorax_np.verify.cases import Case, under
from lorax_np.verify.conventions import DORA, DROPOUT, Spec
from lorax_np.verify.layers import plain
from lorax_np.verify.layers.rounding import ORDERS, layer, to_bits
from lorax_np.verify.precision import PRECISIONS, Precision

TENSORS = ("y", "x", "W", "A", "B", "m", "b", "bB")
NAMES = tuple(ORDERS)
FORMS, PLACES = ("peft", "peft", *DORA), ("pre", "pre", *DROPOUT)  # half of the layers under our conventions
BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}  # of a dtype's significand
CHUNK = 50
LONGEST = {"bf16-pure": 100}  # a sum of 1/u terms in accumulators of unit roundoff u means nothing


def draw(profile: str, seed: int, number: int, largest: int = 48) -> tuple[Case, str]:
    """One random layer of a profile, and the order in which to evaluate it. Arrays are float64."""
    p = PRECISIONS[profile]
    rng = np.random.default_rng((seed, list(PRECISIONS).index(profile), number))
    narrow = p.dtype == "float16"
    reach = 0.7 if narrow else 3.0  # decades: float16 would overflow

    def decades() -> float:
        return float(10 ** rng.uniform(-reach, reach))

    def normal(*size: int) -> np.ndarray:
        kind = rng.integers(4)
        values = rng.standard_normal(size)
        if kind == 1:  # of one sign
            values = np.abs(values)
        elif kind == 2:  # with a mean along tokens and features
            values += rng.uniform(0.5, 2)
        elif kind == 3:  # sparse
            values *= rng.random(size) < 0.6
        return values

    def size() -> int:
        return int(np.exp(rng.uniform(0, np.log(largest + 1))))

    d_out, d_in, r, lead = size(), size(), min(size(), 24), rng.choice(4)
    tokens = ((), (size(),), (int(rng.integers(1, 4)), size()), (1, 1, size()))[lead]
    if rng.integers(10) == 0:  # one long axis, the others short
        long = int(np.exp(rng.uniform(np.log(largest), np.log(LONGEST.get(profile, 512)))))
        axis = int(rng.integers(4))
        short = [min(d, 12) for d in (size(), d_out, d_in, r)]
        short[axis] = long
        tokens, (d_out, d_in, r) = (short[0],), short[1:]
    config = LoraConfig(
        r=r, lora_alpha=r * float(10 ** rng.uniform(-1, 1)), use_rslora=bool(rng.integers(2)), use_dora=False
    )
    s, dora = config.scaling, bool(rng.integers(2))
    w = decades()
    a = float(10 ** rng.uniform(-reach, reach)) if rng.integers(2) and not narrow else 1.0
    W, A = normal(d_out, d_in) * w, normal(r, d_in) * a
    B = normal(d_out, r) * w / (s * np.sqrt(r) * a) * 10 ** rng.uniform(-1, 1)
    if dora and rng.integers(3) == 0:  # W + s·BA nearly cancels
        left = {2.0**-8: 1.0, 2.0**-11: 1.5, 2.0**-24: 3.0, 2.0**-53: 3.0}[max(p.store, p.operand)]
        W = -s * B @ A + W * 10 ** -rng.uniform(0, left)
    m = mask = b = None
    drop = float(rng.uniform(0.05, 0.7))
    if rng.integers(2):
        mask = np.where(rng.random((*tokens, d_in)) >= drop, 1 / (1 - drop), 0.0)
    bias = rng.integers(3)
    if bias:
        b = rng.standard_normal(d_out) * w * 10 ** rng.uniform(-1, 1)
    bB = normal(d_out) * w if not dora and rng.integers(2) else None
    x, gy = normal(*tokens, d_in) * decades(), normal(*tokens, d_out) * decades()

    def given(value):
        if value is None:
            return None
        return value.astype(np.float16).astype(np.float64) if narrow else to_bits(value, BITS[p.dtype])

    if dora:
        V = given(W) + s * given(B) @ given(A)
        n = np.linalg.norm(V, axis=1)
        m = (n + (n == 0)) * rng.uniform(0.5, 2.0, d_out) * (1.0 if rng.integers(4) else 1e-3)
    arrays = {"W": W, "A": A, "B": B, "x": x, "gy": gy, "b": b, "bB": bB, "m": m, "mask": mask}
    case = Case(
        id=f"{profile}:{number}",
        kind=("dora" if dora else "lora") + (", dropout" if mask is not None else ""),
        config=config,
        **{name: given(value) for name, value in arrays.items()},
        train_b=bool(bias == 2),
        norm_gradient=bool(dora and rng.integers(2)),
    )
    form, place = FORMS[int(rng.integers(len(FORMS)))], PLACES[int(rng.integers(len(PLACES)))]
    case = under(case, Spec(dora=form, dropout=place))
    return case, NAMES[int(rng.integers(len(NAMES)))]


def truth(case: Case, wide: bool) -> dict[str, np.ndarray]:
    """y and the gradients in float64, or in the widest arithmetic that the host has."""
    dtype = np.longdouble if wide else np.float64
    values = {name: value.astype(dtype) for name, value in case.arrays().items()}
    y, found = plain.run(replace(case, **values), values["gy"])
    return {"y": y, **found}


def computed(case: Case, order: str, p: Precision) -> dict[str, np.ndarray]:
    """y and the gradients in the profile's arithmetic, evaluated in this order."""
    y, found = layer(case, p, ORDERS[order])
    return found | {"y": y}


def part(error: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Of what is allowed; infinite where that is nothing."""
    return np.divide(error, allowed, out=np.where(error > 0, np.inf, 0.0), where=allowed > 0)


def judge(
    case: Case, order: str, profile: str
) -> dict[str, tuple[float, float, float, int, float, float]] | None:
    """By tensor: largest and median z, largest share of the ceiling, entries, Σz², and the slope's z."""
    p = PRECISIONS[profile]
    if case.m is not None:
        V = case.W + case.scaling * case.B @ case.A
        cancelled = (np.abs(case.W) + abs(case.scaling) * np.abs(case.B) @ np.abs(case.A)).max(axis=1)
        if np.any(np.linalg.norm(V, axis=1) < 30 * max(p.store, p.operand) * cancelled):
            return None  # a row of V that is rounding alone has no direction
    found = computed(case, order, p)
    want, allowed, top = truth(case, profile == "fp64"), tolerance(case, p), ceiling(case, p)
    if profile == "fp64":
        allowed = {name: THRESHOLD * value for name, value in deviations(case, p).items()}
    result, leaning = {}, slopes(case, p, found, want)
    for name, got in found.items():
        error = np.abs(np.asarray(got - want[name], dtype=np.float64))
        if not np.isfinite(error).all():
            return None
        if not error.size:
            continue
        z, share, lean = THRESHOLD * part(error, allowed[name]), part(error, top[name]), leaning[name][1]
        lean = abs(lean) if abs(lean) <= THRESHOLD else counted(lean, again(case, order, p, name))
        worst = float(z.max()), float(np.median(z)), float(share.max())
        result[name] = (*worst, z.size, float((z * z).sum()), lean)
    return result


def again(case: Case, order: str, p: Precision, name: str) -> float:
    """The z of one tensor's slope on the same layer at other numbers, as the verdict asks for it."""
    other = redrawn(case)
    arrays = {n: to_bits(v, BITS[p.dtype]) for n, v in other.arrays().items() if "mask" not in n}
    other = replace(other, **arrays)
    found = computed(other, order, p)
    return slopes(other, p, {name: found[name]}, truth(other, p.name == "fp64"))[name][1]


def chunk(job: tuple[str, int, int, int]) -> tuple[str, list]:
    """A row for each case of a chunk: its number, order, kind and what each tensor gave."""
    profile, seed, start, stop = job
    out = []
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for number in range(start, stop):
            case, order = draw(profile, seed, number)
            kind = f"{case.kind}, {case.dora}, {case.dropout}"
            out.append((number, order, kind, case.norm_gradient, judge(case, order, profile)))
    return profile, out


class Tally:
    """What is kept of a profile: sums and the worst cases, whatever the number of cases."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.cases = self.entries = self.alarms = self.over = self.skipped = 0
        self.worst = dict.fromkeys(TENSORS, 0.0)
        self.squares = self.share = self.lean = 0.0
        self.list: list = []
        self.high: list = []  # by share of the ceiling
        self.leaning: list = []  # by the slope's z

    def take(self, rows: list) -> None:
        """Count the rows of a chunk."""
        for number, order, kind, full, result in rows:
            if result is None:
                self.skipped += 1
                continue
            self.cases += 1
            for name, (z, _, share, size, squares, lean) in result.items():
                self.entries += size
                self.alarms += (z > THRESHOLD) + (lean > THRESHOLD)
                self.over += share > 1
                self.worst[name] = max(self.worst[name], z)
                self.share = max(self.share, share)
                self.squares += squares
                self.lean = max(self.lean, lean)
                self.leaning.append((lean, number, order, kind, name))
                self.high.append((share, number, order, kind, name))
                self.list.append((z, number, order, kind + (", full norm" if full else ""), name))
        self.list = sorted(self.list, reverse=True)[:12]
        self.high = sorted(self.high, reverse=True)[:12]
        self.leaning = sorted(self.leaning, reverse=True)[:12]


def table(tallies: dict[str, Tally]) -> str:
    """One line for each profile."""
    names = "".join(f"{name:>6}" for name in TENSORS)
    lines = [f"{'profile':<11}{'cases':>8}{'entries':>11}{'rms z':>7}  max z of {names}"]
    lines[0] += f"{'alarms':>8}{'over':>6}{'ceiling':>9}{'slope z':>9}"
    for profile, t in tallies.items():
        rms = (t.squares / t.entries) ** 0.5 if t.entries else 0.0
        cells = "".join(f"{t.worst[name]:>6.2f}" for name in TENSORS)
        counts = f"{t.alarms:>8}{t.over:>6}{t.share:>9.3f}{t.lean:>9.2f}"
        lines.append(f"{profile:<11}{t.cases:>8}{t.entries:>11}{rms:>7.2f}{'':>11}{cells}{counts}")
    return "\n".join(lines)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _quiet() -> None:
    """Leave an interruption to the process that holds the sums."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--profile", choices=("all", *PRECISIONS), default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help="one case, such as bf16:17")
    arguments = parser.parse_args()
    if arguments.only:
        profile, _, number = arguments.only.partition(":")
        _, ((_, order, kind, full, result),) = chunk((profile, arguments.seed, int(number), int(number) + 1))
        print(f"{order}; {kind}; full norm: {full}")
        for name, (z, median, share, size, _, lean) in (result or {}).items():
            print(
                f"{name:>3}  max z {z:6.2f}  median {median:5.2f}  of the ceiling {share:.3f}"
                f"  slope {lean:5.2f}  {size} entries"
            )
        return 0

    profiles = list(PRECISIONS) if arguments.profile == "all" else [arguments.profile]
    each = -(-arguments.cases // len(profiles))
    tallies = {profile: Tally() for profile in profiles}
    starts = range(0, each, CHUNK)
    jobs = ((profile, arguments.seed, at, min(at + CHUNK, each)) for at in starts for profile in profiles)
    begin, done = time.perf_counter(), 0
    signal.signal(signal.SIGTERM, _stop)
    try:
        with multiprocessing.get_context("spawn").Pool(arguments.workers, _quiet) as pool:
            for profile, rows in pool.imap_unordered(chunk, jobs):
                tallies[profile].take(rows)
                done += len(rows)
                rate = done / (time.perf_counter() - begin)
                said = f"\r{done} of {each * len(profiles)} cases, {rate:.0f}/s"
                print(said, end="", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("\ninterrupted", end="", file=sys.stderr)
    print(file=sys.stderr)
    print(table(tallies))
    for profile, t in tallies.items():
        for z, number, order, kind, name in t.list[:3]:
            print(f"  {z:6.2f}  {profile}:{number}  {name}, {order}, {kind}")
        for lean, number, order, kind, name in t.leaning[:2]:
            print(f"  {lean:6.2f} slope  {profile}:{number}  {name}, {order}, {kind}")
        for share, number, order, kind, name in (row for row in t.high if row[0] > 1):
            print(f"  {share:6.2f} of the ceiling  {profile}:{number}  {name}, {order}, {kind}")
    if arguments.json:
        record = {profile: vars(t) for profile, t in tallies.items()}
        arguments.json.write_text(json.dumps({"seed": arguments.seed, "profiles": record}, indent=1) + "\n")
    return int(any(t.alarms or t.over for t in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
