"""A run killed again and again, and what is left compared with a run that nobody killed.

python tests/train/killed_run.py [KILLS [SEED]] prints one line a kill and fails where a byte differs.
python tests/train/killed_run.py run OUT goes on with the run in OUT, or begins it.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
STEPS = 30
FIGURES = "step", "epoch", "loss", "lr", "grad_norm", "labels", "tokens", "on", "perplexity"


def go_on(out):
    """Train in OUT, from its last save where there is one; a line on stdout for each thing that happens."""
    from small_run import examples, settings, started

    from lorax_np.train import train

    base, adapters, sites, lora = started()
    config = settings(
        iters=STEPS, save_every=3, steps_per_report=4, steps_per_eval=10, grad_accumulation_steps=1
    )
    say = lambda record: print(record["event"], record["step"], flush=True)  # noqa: E731
    given = {"sites": sites, "lora": lora, "out": out, "valid": examples(6, seed=9), "callbacks": [say]}
    train(base, adapters, examples(), config, **given, resume=True)


def killed(out, rng):
    """Start the run, kill it at a random moment, and return what it said last."""
    child = subprocess.Popen(
        [sys.executable, __file__, "run", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    begin, after, last = rng.randrange(0, 8), rng.random() * 0.06, "nothing"
    for line in child.stdout:
        last = line.strip()
        begin -= 1
        if begin < 0:
            time.sleep(after)
            child.kill()
            break
    code = child.wait()
    assert code in (0, -9), child.stderr.read()
    child.stdout.close()
    child.stderr.close()
    return last


def finished(out):
    """Run to the end, and return all that must not depend on how often it was interrupted."""
    subprocess.run([sys.executable, __file__, "run", str(out)], check=True, capture_output=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    figures = [{name: line[name] for name in FIGURES if name in line} for line in lines]
    files = "adapter_model.safetensors", "adapter_config.json", f"state/step-{STEPS}/tensors.safetensors"
    names = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    return figures, [(out / file).read_bytes() for file in files], names


def compare(folder, kills, seed, say=lambda line: None):
    """Kill a run so often; return whether its end is that of a run that was left alone."""
    rng, out = random.Random(seed), folder / "killed"
    want = finished(folder / "alone")
    done = 0
    while done < kills:
        last = killed(out, rng)
        parts = [path.name for path in (out / "state").glob("*.tmp")] if out.exists() else []
        say(f"kill {done + 1}: after {last!r}{', in the middle of a save' if parts else ''}")
        done += 1
        if last.startswith("end"):  # it was through before it could be killed
            if not same(finished(out), want, say):
                return False
            out = folder / f"killed{done}"
    return same(finished(out), want, say)


def same(found, want, say):
    """Whether two runs ended alike; says what of them did not."""
    for a, b, what in zip(found, want, ("figures", "bytes", "names"), strict=True):
        if a != b:
            more, less = ([x for x in one if x not in other] for one, other in ((a, b), (b, a)))
            say(f"{what} differ: {more!r:.300} for {less!r:.300}")
    return found == want


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        go_on(sys.argv[2])
    else:
        with tempfile.TemporaryDirectory() as place:
            number, seed = (int(word) for word in [*sys.argv[1:], *["50", "0"][len(sys.argv) - 1 :]])
            same = compare(Path(place), number, seed, say=print)
        print("every byte is the same" if same else "bytes differ")
        sys.exit(not same)
