"""lorax-np train: adapters trained on a real model, into a PEFT directory."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .common import Parsers

CODES = {"done": 0, "interrupted": 130, "not finite": 1}
HELD = "none", "nf4", "int8", "bf16"  # ways to hold a base, as --quantize names them
RUN_FILE, LABELS_FILE = "run.json", "labels.json"
ABOUT = (
    "Train adapters beside a model on rows of text, and save them as a PEFT directory, with the record of the "
    "run. Names are those of PEFT and mlx-lm; each may stand in a file too, which flags override."
)


class Strict(argparse.ArgumentParser):
    """Refuses in one line, and a flag that there is not with the nearest, whatever else is missing."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, where nothing unknown is left."""
        from ..kinds import nearest
        from ..train.settings import THEIRS

        known = [flag for action in self._actions for flag in action.option_strings]
        flags = [word.partition("=")[0] for word in args or () if word.startswith("--") and word != "--"]
        if wrong := [flag for flag in flags if flag not in known]:
            theirs = THEIRS.get(wrong[0].removeprefix("--").replace("-", "_"), "")
            ours = f"--{theirs.replace('_', '-')}"
            hint = f" (did you mean {ours!r}?)" if ours in known else nearest(wrong[0], known)
            self.error(f"{wrong[0]}: expected a known flag{hint}")
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"expected flags alone, got {rest[0]!r}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """End with one line; what there is, -h says."""
        self.exit(2, f"{self.prog}: {message}\n")


def choice(words: Sequence[str]) -> str:
    """Words to choose from, as a person lists them."""
    return f"{', '.join(words[:-1])} or {words[-1]}"


def add(commands: Parsers) -> None:
    """Declare the command and its arguments; what they may hold is checked where files are, by their names."""
    from ..train.settings import LORA, RUN, TRAIN

    parser = commands.add_parser(
        "train", help="train adapters beside a real model", description=ABOUT, allow_abbrev=False
    )
    parser.__class__ = Strict
    for title, settings in (("what", RUN), ("adapters", LORA), ("training", TRAIN)):
        group = parser.add_argument_group(title)
        for name, setting in settings.items():
            action = {"action": argparse.BooleanOptionalAction} if setting.flag else {"metavar": "VALUE"}
            silent = setting.default is None or setting.default is False
            default = "" if silent else f" (default: {setting.default})"
            words = f": {choice(setting.words)}" if len(setting.words) > 1 else ""
            about = f"{setting.about}{words}{default}".replace("%", "%%")
            group.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=about, **action)
    parser.add_argument("-c", "--config", metavar="FILE", help="names and values in YAML or JSON")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --adapter-path")
    parser.add_argument("--dry-run", action="store_true", help="say what it would take, and train nothing")
    parser.add_argument("--json", nargs="?", const="-", choices=("-",), help="print what it came to as JSON")
    parser.add_argument("--quiet", action="store_true", help="no lines but errors")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, and say how it goes."""
    from ..parallel import world

    ranks = world()
    try:
        return _run(arguments, ranks)
    except BaseException as error:
        if ranks.size > 1:  # the others wait for this one
            print(f"lorax-np: rank {ranks.rank}: {error}", file=sys.stderr, flush=True)
            ranks.abort(2)
        raise


def _run(arguments: argparse.Namespace, ranks: Any) -> int:
    from .. import ConfigError, train
    from ..train import Passes
    from ..train.estimate import decide, estimated
    from ..train.lines import Lines, estimate_lines, first_lines
    from ..train.output import check_free
    from ..train.prepare import prepared
    from ..train.run import Run
    from ..train.settings import SETTINGS, changed, resolved, stored
    from ..train.told import read_file
    from ..train.work import work_of

    given = {name: value for name, value in vars(arguments).items() if name in SETTINGS}
    said = [] if arguments.config is None else [(arguments.config, read_file(Path(arguments.config)))]
    said.append(("the command line", given))
    out = Path(resolved(*said)["adapter_path"])
    if arguments.resume:
        if not out.is_dir():
            raise ConfigError(f"--resume: expected the directory of a run as --adapter-path, got {out}")
        if (file := out / RUN_FILE).is_file():
            before = resolved((str(file), read_file(file)))
            said.insert(0, (str(file), before))
            changed(before, resolved(*said), but=("adapter_path", "backend", "valid"))
        elif None in (resolved(*said)["model"], resolved(*said)["data"]):
            raise ConfigError(f"--resume: expected {file}, or --model and --data, got neither")
    settings = resolved(*said)
    if not arguments.resume and not arguments.dry_run and ranks.rank == 0:
        check_free(out, settings["model"] or "")
    say = _printer(arguments, ranks.rank)
    work = prepared(settings)
    for line in first_lines(work, colour=sys.stdout.isatty()):
        say(line)
    passes = Passes(
        work.model, work.sites, work.trained, task=work.task, config=work.config, tokens=work.plan.tokens
    )
    size = work_of(passes, work.trained, work.data["train"].examples)
    if decide(size):
        say("blocks are computed again in the backward, to save memory (--grad-checkpoint off keeps them)")
    if arguments.dry_run:  # a run says so as it starts
        Lines(say).wrapped(passes.what)
    for line in estimate_lines(work, size, ranks.size):
        say(line)
    rows, valid = work.data["train"].examples, work.data["valid"].examples if "valid" in work.data else ()
    if arguments.dry_run:
        would = Run(passes, work.trained, rows, ranks, (), dry=True)  # all that the run is refused for
        would.judged_on(valid, work.labels)
        if arguments.json and ranks.rank == 0:
            found = estimated(size)
            print(json.dumps({"steps": would.steps, "nbytes": found.nbytes, **found._asdict()}))
        return 0

    def keep(record: Mapping[str, Any]) -> None:
        """What the directory has to tell a run that goes on, and whoever evaluates."""
        if record["event"] == "start":
            (out / RUN_FILE).write_bytes(stored(settings))
            if work.labels is not None:
                (out / LABELS_FILE).write_text(
                    json.dumps(work.labels.to_config(), indent=1) + "\n", encoding="utf-8"
                )

    came = train(
        work.model,
        work.trained,
        rows,
        work.config,
        sites=work.sites,
        task=work.task,
        valid=valid,
        labels=work.labels,
        lora=work.lora,
        out=out,
        resume=arguments.resume,
        ranks=ranks,
        callbacks=[keep, Lines(say)],
        tables=_tables(settings),
        tokens=work.plan.tokens,
        passes=passes,
    )
    if ranks.rank == 0:
        _told(came, settings, out, arguments, say)
    return CODES[came.ended]


def _printer(arguments: argparse.Namespace, rank: int) -> Any:
    """What is done with a line: printed, on standard error where JSON goes to standard output, or nothing."""
    if arguments.quiet or rank:
        return lambda line: None
    file = sys.stderr if arguments.json else sys.stdout
    return lambda line: print(line, file=file, flush=True)


def _tables(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the card says besides: where things came from, and which programs made it."""
    from .. import __version__, backend_info

    info = backend_info()
    names = "model", "data", "valid", "resume_adapter_file", "quantize", "mask_prompt"
    return {
        "Base and data": {name: settings[name] for name in names if settings[name] is not None},
        "Versions": {
            "lorax-np": __version__,
            "Python": info["python"],
            "NumPy": info["numpy"],
            "BLAS": info["blas"],
        },
        "Command": {"as typed": " ".join(["lorax-np", *map(_quoted, sys.argv[1:])])},
    }


def _quoted(word: str) -> str:
    import shlex

    return shlex.quote(word)


def _judged(settings: Mapping[str, Any]) -> str:
    """The flags by which evaluate judges as the run did."""
    from ..train.settings import SETTINGS

    where = {
        "model": settings["model"],
        "data": settings["valid"] or settings["data"],
        "task": settings["task"],
    }
    if settings["quantize"] != HELD[0]:
        where["quantize"] = settings["quantize"]
    if settings["max_seq_length"] != SETTINGS["max_seq_length"].default:
        where["max-seq-length"] = str(settings["max_seq_length"])
    said = " ".join(f"--{name} {_quoted(word)}" for name, word in where.items())
    return said if settings["mask_prompt"] else f"{said} --no-mask-prompt"


def _told(found: Any, settings: Mapping[str, Any], out: Path, arguments: argparse.Namespace, say: Any) -> None:
    """The last lines: what it came to, and what comes next."""
    from ..train.lines import PLACE

    if arguments.json:
        content = {"out": str(out), "ended": found.ended, "step": found.step}
        print(json.dumps(content | {"before": found.before, "after": found.after}))
    if found.ended == "done":
        shared = [name for name in found.before if name in found.after and name not in PLACE]
        for name in shared:
            say(f"{name}: {found.before[name]:.4f} before, {found.after[name]:.4f} after")
        say(f"saved at {out}")
        say(f"next: lorax-np evaluate {_judged(settings)} --adapter-path {_quoted(str(out))}")
    elif found.ended == "interrupted":
        say(f"stopped after step {found.step}, saved at {out}")
        say(f"next: lorax-np train --resume --adapter-path {_quoted(str(out))}")
    else:
        say(f"three steps in a row were not finite: stopped after step {found.step}")
        say(f"see {out / 'bad-batch.jsonl'}")
