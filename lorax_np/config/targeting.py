"""Which modules and parameters of a model a config means: all matching of names is here."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from ..errors import ConfigError
from ..kinds import nearest
from .families import HEADS, HEADS_OF_TASKS, INPUT_EMBEDDINGS, MAMBA, PAST_THE_MODULE, TARGETS
from .lora import LoraConfig
from .site import FUSED, OUT
from .tree import Tree, fits

ALL_LINEAR = "all-linear"
Names = str | Collection[str] | None


def targeted(config: LoraConfig, tree: Tree) -> list[str]:
    """Return the names of the modules to adapt, in the order in which the model makes them.

    Raises ConfigError where a name, a regular expression or a layer fits nothing, where a module is meant that
    no adapter can stand beside, and where no target_modules are known for the model's type.
    """
    targets = _targets(config, tree)
    if targets is None or (targets == () and config.target_parameters):
        return []
    if isinstance(targets, str):
        found = [name for name in tree.modules if name and re.fullmatch(targets, name)]
        if not found:
            raise ConfigError(_nothing("target_modules", targets, tree))
    else:
        found = _listed("target_modules", targets, tree)
    kept = _in_layers(config, tree, _kept(config, tree, found))
    for name in kept:
        _check_place(tree, name)
    return kept


def parameters(config: LoraConfig, tree: Tree) -> list[str]:
    """Return the checkpoint's names of the parameters in target_parameters, in the model's order."""
    keys = config.target_parameters or ()
    tensors = [tensor for module in tree.modules.values() if module.name for tensor in module.tensors.values()]
    for key in keys:
        if not any(fits(key, tensor) for tensor in tensors):
            raise ConfigError(_nothing("target_parameters", key, tree, tensors))
    found = [tensor for tensor in tensors if any(fits(key, tensor) for key in keys)]
    for tensor in found:
        if len(tree.shape(tensor)) not in (2, 3):
            raise ConfigError(f"target_parameters: expected 2 or 3 axes, got {tensor} of {tree.shape(tensor)}")
    return found


def saved_modules(config: LoraConfig, tree: Tree) -> list[str]:
    """Return the names of the modules trained whole: those of modules_to_save, and the task's heads."""
    for key in config.modules_to_save or ():
        if not any(fits(key, name) for name in tree.modules):
            raise ConfigError(_nothing("modules_to_save", key, tree))
    keys = (*(config.modules_to_save or ()), *HEADS_OF_TASKS.get(config.task_type or "", ()))
    return [name for name in tree.modules if name and any(fits(key, name) for key in keys)]


def within(name: str, modules: Iterable[str]) -> bool:
    """Whether a module or tensor is one of these modules, or below one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def token_rows(config: LoraConfig, tree: Tree) -> dict[str, tuple[int, ...]]:
    """Return the rows to train of each embedding, by its module's name."""
    said = config.trainable_token_indices
    if not said:
        return {}
    if not isinstance(said, Mapping):
        home = [n for key in INPUT_EMBEDDINGS for n in tree.modules if fits(key, n) and tree.weight(n)]
        if not home:
            raise ConfigError(
                f"trainable_token_indices: expected a mapping from the embedding's name, since none of "
                f"{', '.join(INPUT_EMBEDDINGS)} is there, got a list"
            )
        said = {home[0]: said}
    found: dict[str, tuple[int, ...]] = {}
    for key, rows in said.items():
        names = [name for name in tree.modules if fits(key, name) and tree.weight(name)]
        if not names:
            raise ConfigError(_nothing("trainable_token_indices", key, tree))
        found |= dict.fromkeys(names, tuple(rows))
    return found


# ---- target_modules ----------------------------------------------------------------------------------------


def _targets(config: LoraConfig, tree: Tree) -> str | Sequence[str] | None:
    """What target_modules says, None and all-linear spelled out; None where target_parameters stand alone."""
    targets: Names = config.target_modules
    if targets is None:
        if config.target_parameters:
            return None
        if tree.model_type not in TARGETS:
            raise ConfigError(
                f"target_modules: expected names, or 'all-linear', among {len(tree.sites())} modules, as none "
                f"are known for model_type {tree.model_type!r}{nearest(tree.model_type, TARGETS)}, got None"
            )
        targets = TARGETS[str(tree.model_type)]
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        linear = tuple(name for name in tree.modules if tree.kind(name) == "linear" and name not in HEADS)
        if not linear:
            raise ConfigError(
                f"target_modules: expected linear modules beside the head, got none of {len(tree.modules)}"
            )
        return linear
    return targets if isinstance(targets, str) else tuple(targets)


def _listed(field: str, keys: Collection[str], tree: Tree) -> list[str]:
    """The modules that a list of keys means; by the ends of names, so that thousands of both are quick."""
    wanted, used = set(keys), set()
    found = []
    for name in tree.modules:
        if hits := wanted.intersection(_ends(name)):
            used |= hits
            found.append(name)
    for key in keys:
        if key not in used:
            raise ConfigError(_nothing(field, key, tree))
    return found


def _ends(name: str) -> Iterable[str]:
    """A dotted name and what follows each of its dots."""
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(len(parts)))


def _kept(config: LoraConfig, tree: Tree, found: Sequence[str]) -> list[str]:
    """Less what exclude_modules means, and what is trained whole."""
    exclude: Names = config.exclude_modules
    out: set[str] = set()
    if isinstance(exclude, str):
        out = {name for name in tree.modules if name and re.fullmatch(exclude, name)}
        if not out:
            raise ConfigError(_nothing("exclude_modules", exclude, tree))
    elif exclude:
        out = set(_listed("exclude_modules", exclude, tree))
    whole = saved_modules(config, tree)
    kept = [name for name in found if name not in out and not within(name, whole)]
    for name in kept:
        _check_attention(tree, name, {"target_modules": kept, "exclude_modules": out, "modules_to_save": whole})
    if not kept:
        raise ConfigError(
            f"target_modules: expected some module to be left, got {len(found)} that exclude_modules or "
            "modules_to_save takes away"
        )
    return kept


def _in_layers(config: LoraConfig, tree: Tree, found: list[str]) -> list[str]:
    """Those in layers_to_transform: by the first number with more behind it, or that after a layers_pattern."""
    said = config.layers_to_transform
    layers = {said} if isinstance(said, int) else set(said or ())
    if not layers:
        return found
    patterns = (
        (config.layers_pattern,) if isinstance(config.layers_pattern, str) else config.layers_pattern or ()
    )
    for pattern in patterns:
        if not any(re.match(_layer(pattern), name) for name in tree.modules):
            raise ConfigError(_nothing("layers_pattern", pattern, tree))
    expressions = [_layer(pattern) for pattern in patterns] or [r"(?:.*?\.)??(\d+)\."]
    index = {}
    for name in found:
        hits = (re.match(expression, name) for expression in expressions)
        index[name] = next((int(hit[1]) for hit in hits if hit), None)
    there = {layer for layer in index.values() if layer is not None}
    if unused := sorted(layers - there):
        most = f"0 to {max(there)}" if there else "of which no target has one"
        raise ConfigError(f"layers_to_transform: expected numbers of layers, {most}, got {unused}")
    return [name for name in found if index[name] in layers]


def _layer(pattern: str) -> str:
    return rf"(?:.*?\.)??{re.escape(pattern)}\.(\d+)\."


def _check_place(tree: Tree, name: str) -> None:
    """Refuse a target that no adapter can stand beside."""
    module, last = tree.modules[name], name.rpartition(".")[2]
    if tree.model_type in MAMBA and last in PAST_THE_MODULE:
        raise ConfigError(
            f"target_modules: expected no {last} of {tree.model_type}, whose kernel reads its weight past an "
            f"adapter, got {name}"
        )
    if tree.kind(name) is not None or tree.attention(name):
        return
    weight = tree.weight(name)
    got = (
        f"{name}, whose weight has {len(tree.shape(weight))} axes" if weight else f"{name}, which has no weight"
    )
    if FUSED in module.tensors:
        got = f"{name}, an attention module without its {OUT}"
    below = [child for child in tree.sites() if child.startswith(f"{name}.")]
    hint = f" (below it: {', '.join(below[:3])}{', ...' * (len(below) > 3)})" if below else ""
    raise ConfigError(f"target_modules: expected linear modules, embeddings or convolutions, got {got}{hint}")


def _check_attention(tree: Tree, name: str, said: Mapping[str, Collection[str]]) -> None:
    """Refuse what says something else of an attention module's output, which is adapted with the module."""
    out = f"{name}.{OUT}"
    for field, names in said.items():
        if tree.attention(name) and out in names:
            raise ConfigError(
                f"{field}: expected no {out}, which is adapted with {name}, an attention module, got it"
            )


def _nothing(field: str, key: str, tree: Tree, names: Collection[str] = ()) -> str:
    """The sentence on a key that fits nothing, with the name nearest to it, and how many there are."""
    names = names or [name for name in tree.modules if name]
    by_end = {name.rpartition(".")[2]: name for name in reversed(list(names))}
    if key in by_end:  # a regular expression has to match the whole name
        hint = f" (did you mean the list [{key!r}], or r'.*\\.{key}'?)"
    else:
        hint = nearest(key, [*by_end, *names])
    what = "parameters" if field == "target_parameters" else "modules"
    return f"{field}: expected names of {what}, got {key!r}, which fits none of {len(names)}{hint}"
