"""lorax-np init: an adapter started on a checkpoint, as a PEFT directory."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import Parsers, seed
from .streaming import Rate, options

if TYPE_CHECKING:
    from .. import LoraConfig

LOFTQ = {"loftq_bits": 4, "loftq_iter": 1}  # as PEFT's LoftQConfig has them


def add(commands: Parsers) -> None:
    """Declare the command and its arguments."""
    init = commands.add_parser(
        "init",
        help="start an adapter on a checkpoint, site by site",
        description="Start the adapters that a config means and save them as a PEFT directory. A start that "
        "takes something out of the weights, as PiSSA does, leaves the rest as a checkpoint in DEST/base.",
    )
    init.add_argument("base", metavar="BASE", help="a checkpoint: a directory, a .safetensors or a .gguf file")
    init.add_argument("dest", metavar="DEST", help="a directory that is not there yet, or empty")
    init.add_argument("--config", metavar="JSON", help="an adapter_config.json, in PEFT's names")
    init.add_argument("-r", "--rank", type=int, help="r (default: 8, or the config's)")
    init.add_argument("--alpha", type=float, help="α (default: 8, or the config's)")
    init.add_argument(
        "--start", metavar="NAME", help="init_lora_weights: true, gaussian, pissa, pissa_niter_4, olora, ..."
    )
    init.add_argument(
        "--target-modules",
        metavar="NAME",
        nargs="+",
        help="ends of modules' names, or all-linear (default: all-linear, or the config's)",
    )
    init.add_argument("--dora", action="store_true", help="with a magnitude a row")
    init.add_argument("--rslora", action="store_true", help="s = α/√r")
    init.add_argument("--bits", type=int, choices=(4, 8), help="of LoftQ's base (default: 4, or the config's)")
    init.add_argument("--inputs", metavar="FILE", help="safetensors of inputs (rows, d_in) by site: eva, corda")
    init.add_argument("--gradients", metavar="FILE", help="safetensors of gradients like W by site: lora_ga")
    init.add_argument("--data", metavar="FILE", help="rows of JSONL to take inputs or gradients from, instead")
    init.add_argument("--task", default="causal-lm", help="what the rows are for (default: causal-lm)")
    init.add_argument("--limit", type=int, default=64, help="how many of the rows (default: 64)")
    init.add_argument("--seed", type=seed, default=0, help="of every draw (default: 0)")
    options(init, files=False)
    init.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Start, and print what was started."""
    from .. import ConfigError, LoraConfig, open_safetensors
    from ..io.checkpoint import read_json
    from ..stream.init import init_checkpoint

    said: dict[str, Any] = {"target_modules": "all-linear"}
    if arguments.config:
        path = Path(arguments.config)
        said = read_json(path / "adapter_config.json" if path.is_dir() else path)
    words: dict[str, Any] = {"true": True, "false": False}
    targets = arguments.target_modules
    given = {
        "r": arguments.rank,
        "lora_alpha": arguments.alpha,
        "init_lora_weights": words.get(str(arguments.start).lower(), arguments.start),
        "target_modules": "all-linear" if targets == ["all-linear"] else targets,
        "use_dora": arguments.dora or None,
        "use_rslora": arguments.rslora or None,
    }
    if arguments.bits is not None or (arguments.start == "loftq" and not said.get("loftq_config")):
        said["loftq_config"] = {**LOFTQ, **(said.get("loftq_config") or {})}
        said["loftq_config"] |= {} if arguments.bits is None else {"loftq_bits": arguments.bits}
    config = LoraConfig.from_dict(said | {name: value for name, value in given.items() if value is not None})
    if arguments.seed >= 1 << 32:
        raise ConfigError(f"--seed: expected less than 2**32, got {arguments.seed}")
    seen = {} if arguments.dry_run else _seen(arguments, config)
    progress = Rate("init", "M numbers", 1e6, quiet=arguments.quiet or arguments.json)
    try:
        found = init_checkpoint(
            arguments.base,
            config,
            arguments.dest,
            seed=arguments.seed,
            progress=progress,
            dry_run=arguments.dry_run,
            resume=arguments.resume,
            inputs=open_safetensors(arguments.inputs) if arguments.inputs else seen.get("inputs"),
            gradients=open_safetensors(arguments.gradients) if arguments.gradients else seen.get("gradients"),
        )
    finally:
        progress.done()
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=1, ensure_ascii=False))
    elif not arguments.quiet:
        share = 100 * found.trainable / max(found.total, 1)
        print(
            f"trainable params: {found.trainable:,} || all params: {found.total:,} || trainable%: {share:.4f}"
        )
        if found.dry:
            rest = " and what is left of the base" if found.base else ""
            what = f"{found.nbytes:,} bytes of adapters{rest}"
            print(f"would start {found.sites} sites as {found.start}, at {found.out}: {what}")
            return 0
        rest = f", and what is left of the base at {found.base}" if found.base else ""
        done = f"in {found.seconds:.1f} s, {found.nbytes / 1e6:.4g} MB"
        went_on = f", {found.resumed} of them from before," if found.resumed else ""
        print(f"started {found.sites} sites as {found.start}{went_on} {done}, at {found.out}{rest}")
        print(f"next: lorax-np check {found.out} --base {found.base or arguments.base}")
    return 0


def _seen(arguments: argparse.Namespace, config: "LoraConfig") -> dict[str, Any]:
    """What the start takes of the rows in --data: inputs, or gradients, by site."""
    from .. import ConfigError

    if arguments.data is None:
        return {}
    takes = {"eva": "inputs", "corda": "inputs", "lora_ga": "gradients"}.get(str(config.init_lora_weights))
    if takes is None:
        raise ConfigError(f"--data: expected --start eva, corda or lora_ga, got {config.init_lora_weights}")
    if arguments.inputs or arguments.gradients:
        raise ConfigError("--data: expected alone, got it beside --inputs or --gradients")
    if arguments.limit < 1:
        raise ConfigError(f"--limit: expected at least 1, got {arguments.limit}")
    from ..stream.place import check_free

    check_free(Path(arguments.dest))  # before a model is asked, which takes a while
    from .. import load_model, open_checkpoint, plan
    from ..models.families import FAMILIES
    from ..models.watching import site_gradients, site_inputs
    from ..text.batches import Feed
    from ..text.data import encode_rows
    from ..text.examples import Settings
    from ..text.rows import read_rows, task_name
    from ..text.tokenizer import load_tokenizer
    from ..train.checks import longest_text

    task = task_name(arguments.task)
    model = load_model(arguments.base, dtype="float32")
    tokenizer = load_tokenizer(arguments.base, vocab_size=model.config.get("vocab_size"))
    rows = read_rows(arguments.data, task)
    rows = rows._replace(rows=rows.rows[: arguments.limit])
    longest = min(1024, longest_text(model) or 1024)
    how = Settings(longest, typed=None if FAMILIES[model.family].types else False)
    examples = encode_rows(rows, tokenizer, task=task, settings=how, labels=None).examples
    batches = [batch for step in Feed(examples, task, shuffle=False).epoch(0) for batch in step.batches]
    sites = plan(model.weights, config).sites
    if not (arguments.quiet or arguments.json):
        print(f"init: {takes} of {len(sites)} sites on {len(examples)} rows", file=sys.stderr, flush=True)
    if takes == "inputs":
        found: dict[str, Any] = dict(site_inputs(model, sites, batches))
    else:
        found = dict(site_gradients(model, sites, batches, task=task))
    own, front = open_checkpoint(arguments.base), FAMILIES[model.family].prefix  # which some files leave out
    return {takes: {n if f"{n}.weight" in own else n.removeprefix(front): value for n, value in found.items()}}
