"""Checks of an adapter's config against its keys, and of the tensors that stand beside the factors."""

import numpy as np

from ..backend import HostArray
from ..config import start_name
from ..errors import ConfigError
from ..io.peft.sites import targeted
from ..kinds import nearest, shown
from .keys import EMBEDDINGS, SCALES, Read, expected_or_none

LOST_STARTS = "pissa_niter_k", "corda", "lora_ga"  # PEFT draws these anew, or not at all, when it loads
BASE_STARTS = "pissa", "olora", "loftq"  # PEFT computes these again from the base it is given
HEADS = "classifier", "score", "qa_outputs"  # PEFT adds these to modules_to_save by the task, there or not


def check_config(found: Read, left: str) -> None:
    """The start, and names and patterns without a site, or sites without a name.

    left : the start whose rest the base at hand is, or ""
    """
    config, say = found.config, found.say
    names = [name.removesuffix(".base_layer") for name in found.places]
    named = found.left or config.init_lora_weights
    start = start_name(named)
    if start and start == start_name(left):
        pass  # the base is the one that this start left
    elif start in LOST_STARTS:
        say("start", f"{named!r}: convert to a plain adapter of rank 2r, or merge into the base that it left")
    elif start in BASE_STARTS:
        say("start-base", f"{named!r}: convert, or take the base that it left")
    _check_scales(found)
    for field, keys in found.numbers.unused().items() if names else ():  # by now every site has been looked up
        for key in keys:
            say("pattern", f"{field}: {key!r} fits none of {len(names)} sites")
    try:
        _check_targets(found, names)
    except ConfigError as error:  # of a regular expression that cannot be matched in bounded time
        say("config", str(error))


def _check_targets(found: Read, names: list[str]) -> None:
    wanted, last = targeted(found.config), {name.rpartition(".")[2] for name in names}
    if wanted is None:
        return  # all linear ones, or the table of the model's type
    for target in wanted.without(names) if names else ():
        found.say("target", f"{target!r} has none of {len(names)} sites{nearest(target, last)}")
    for place in found.places.values():
        if place.kind != "experts" and not wanted.mean(place.attention or place.name):
            found.say("untargeted", f"target_modules={shown(found.config.target_modules)}", place.name)


def _check_scales(found: Read) -> None:
    """A scale or α stated a second time: in the config, or beside the factors as kohya does."""
    config = found.config
    places = {name: expected_or_none(found, place) for name, place in found.places.items()}
    first = next((value for value in places.values() if value), None)
    for name in SCALES:
        value = config.extra.get(name)
        if first and isinstance(value, (int, float)) and not np.isclose(value, first[2]):
            ignored = config.use_rslora and np.isclose(value, first[1] / first[0])
            text = f"{name}: expected s={first[2]:.6g} by the other fields, got {value}"
            found.say("rslora-ignored" if ignored else "scale", text)
    for key in [key for key in found.others if key.endswith(".alpha")]:
        site, value = key.removesuffix(".alpha"), found.others[key]
        known = places.get(site)
        if known is None or value.size != 1:
            continue
        del found.others[key]
        r, alpha, s = known
        stated = float(value.reshape(()))
        if not np.isclose(stated / r, s):
            ignored = config.use_rslora and np.isclose(stated, alpha)
            text = f"{key}: expected {s * r:.6g}, for s={s:.6g} by the config, got {stated:.6g}"
            found.say("rslora-ignored" if ignored else "scale", text, site)


def check_others(found: Read) -> None:
    """Saved modules, biases of the base, token rows, and what nothing asks for."""
    config, say = found.config, found.say
    biases, here = [], set()
    for key, value in found.others.items():
        module, _, last = key.rpartition(".")
        owners = {name for name in config.modules_to_save or () if f".{name}." in f".{key}"}
        here |= owners
        if last == "bias" and not owners:
            biases.append(key)
        elif not owners and not _embedding(key) and not _token_rows(found, last):
            say("unexpected", f"{key}: {value.dtype} {value.shape}")
        if not _finite(value):
            say("not-finite", key, module)
    for name in config.modules_to_save or ():
        if name not in here and name not in HEADS:
            say("saved", f"{name!r}{nearest(name, {key.split('.')[-2] for key in found.others if '.' in key})}")
    if biases and config.bias == "none":
        say("unexpected", f"{len(biases)} biases with bias='none', such as {biases[0]}")
    elif biases:
        say("base-bias", f"{len(biases)} of them, bias={config.bias!r}")
    elif config.bias == "all":
        say("no-bias", f"bias={config.bias!r}")


def _embedding(key: str) -> bool:
    """PEFT saves embeddings whole where they are targeted, or their number of rows has changed."""
    segments = key.split(".")
    return segments[-1] == "weight" and any(name in EMBEDDINGS for name in segments[-3:-1])


def _token_rows(found: Read, last: str) -> bool:
    return last == "trainable_tokens_delta" and found.config.trainable_token_indices is not None


def _finite(value: HostArray) -> bool:
    return value.dtype.kind in "iub" or bool(np.isfinite(value.astype(np.float64)).all())
