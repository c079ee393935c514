"""An adapter file held against its config, by names and shapes alone: nothing is read before it fits."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from ...config import LoraConfig, start_name
from ...config.fields import MARK
from ...errors import FormatError
from ..safetensors import show
from .keys import Keys, some
from .notes import notes_on
from .sites import PAIRS, Names, Place, Resolver, Shape, hint, targeted

FLOATS = "F16", "BF16", "F32", "F64"
# PEFT adds these to modules_to_save by the task, whether the model has them or not.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# Embeddings and heads, which PEFT saves whole where they are targeted, or the vocabulary has grown.
EMBEDDINGS = (
    *("embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out"),
    *("tok_embeddings", "token_embedding"),
)
ROWS = "token_adapter.trainable_tokens_delta"
# These starts take their part out of the base: the adapter is right beside what they left, and only there.
RESIDUAL = "pissa", "pissa_niter_k", "olora", "corda", "lora_ga", "loftq"
AGAIN = "pissa", "olora"  # the same residual comes out whenever they are computed


def check_file(
    path: Path,
    config: LoraConfig,
    resolver: Resolver,
    dtypes: Mapping[str, str],
    *,
    left: str,
    residual_base: bool,
) -> tuple[dict[str, Place], list[str]]:
    """Return the places in a file, and notes.

    left : the start that the file's metadata name, where its adapter belongs to the base that this start left

    Raises FormatError, one line that names the first few at fault: keys that are missing or that nothing asks
    for, shapes that are not those of the config's ranks, dtypes that are none of an adapter's.
    """
    keys = resolver.keys
    _check_sizes(path, config, keys)
    places = resolver.places()
    if not places and not keys.plain:
        raise FormatError(f"{path}: expected the tensors of an adapter, got none")
    _check_parts(path, config, places)
    for place in places.values():
        _check_shapes(path, place, resolver.shapes)
        for part, key in place.wrapper.keys.items():
            if dtypes[key] not in FLOATS:
                wanted = f"{part} in {', '.join(FLOATS)}"
                raise FormatError(f"{path}: {show(key)}: expected {wanted}, got {dtypes[key]}")
    _check_targets(path, config, places)
    _check_layers(path, config, places)
    _check_plain(path, config, keys, places, resolver.shapes)
    if not residual_base:
        _check_residual(path, config, keys, places, left)
    return places, notes_on(config, keys, places, resolver)


def _check_sizes(path: Path, config: LoraConfig, keys: Keys) -> None:
    """Lists of names are held against every key: their sizes are a file's that somebody trained."""
    tokens = config.trainable_token_indices
    lists = config.modules_to_save, config.target_parameters, tokens if isinstance(tokens, Mapping) else ()
    most, count = max(len(tuple(names or ())) for names in lists), len(keys.plain) + len(keys.wrappers)
    if most * count > PAIRS:
        raise FormatError(f"{path}: expected shorter lists of names beside {count} tensors, got {most} names")


# ---- sites -------------------------------------------------------------------------------------------------


def _check_parts(path: Path, config: LoraConfig, places: Mapping[str, Place]) -> None:
    """Magnitudes and biases of B are at every site, or at none, as the config says."""
    for part, said, field in (("m", config.use_dora, "use_dora"), ("bB", config.lora_bias, "lora_bias")):
        for wanted in (True, False):
            wrong = [
                place.site.name
                for place in places.values()
                if (part in place.wrapper.keys) != wanted and (said and place.site.kind != "experts") == wanted
            ]
            if wrong:
                what = f"{'a' if wanted else 'no'} {'magnitude' if part == 'm' else 'bias of B'} at every site"
                came = "none" if wanted else "one"
                raise FormatError(f"{path}: expected {what}, with {field}={said}, got {came} at {some(wrong)}")


def _check_shapes(path: Path, place: Place, shapes: Mapping[str, Shape]) -> None:
    """A, B and what stands beside them, against the site's rank and each other."""
    site, keys = place.site, place.wrapper.keys
    A, B, r = shapes[keys["A"]], shapes[keys["B"]], site.r
    if len(A) not in ((3, 4, 5) if site.kind == "conv" else (2,)) or 0 in A + B:
        _refuse(path, keys["A"], "(r, d_in) without axes of 0", A)
    if site.kind == "experts":
        if A[0] % r:
            _refuse(path, keys["A"], f"(E·r, d_in) with r={r}", A)
        r = A[0]
    elif A[0] != r:
        _refuse(path, keys["A"], f"{r} rows, the rank of {show(site.name)} by the config", A)
    if site.kind == "conv":
        good = len(B) == len(A) and B[2:] == (1,) * len(A[2:]) and r % B[1] == 0
        wanted = f"(d_out, r // groups, {', '.join('1' * len(A[2:]))}) with r={r}"
    else:
        good = len(B) == 2 and B[1] == r
        wanted = f"(d_out, {r})"
    if not good:
        _refuse(path, keys["B"], wanted, B)
    if "bB" in keys and shapes[keys["bB"]] != B[:1]:
        _refuse(path, keys["bB"], f"{B[:1]}", shapes[keys["bB"]])
    if "m" in keys:
        want = (1, B[0], *[1] * len(A[2:])) if site.kind == "conv" else B[:1]
        if shapes[keys["m"]] != want:
            _refuse(path, keys["m"], f"{want}", shapes[keys["m"]])


def _refuse(path: Path, key: str, wanted: str, came: Shape) -> None:
    raise FormatError(f"{path}: {show(key)}: expected {wanted}, got {came}")


def _check_targets(path: Path, config: LoraConfig, places: Mapping[str, Place]) -> None:
    """No site that the config does not mean: PEFT would make none there, and ignore the tensors."""
    targets, exclude = targeted(config), Names(config.exclude_modules)
    modules = {place.module for place in places.values() if place.site.kind != "experts"}
    modules -= {m for m in modules if m.endswith(".out_proj") and m.removesuffix(".out_proj") in modules}
    for field, wrong in (
        ("target_modules", [m for m in modules if targets is not None and not targets.mean(m)]),
        ("exclude_modules", [m for m in modules if exclude.mean(m)]),
    ):
        if wrong:
            near = targets.listed if targets is not None and field == "target_modules" else ()
            raise FormatError(
                f"{path}: expected adapters where {field} has them, got {some(wrong)}{hint(wrong[0], near)}"
            )


def _check_layers(path: Path, config: LoraConfig, places: Mapping[str, Place]) -> None:
    """No site outside of layers_to_transform: by the first number, or that after a name of layers_pattern."""
    said, patterns = config.layers_to_transform, config.layers_pattern
    layers = {said} if isinstance(said, int) else set(said or ())
    names = (patterns,) if isinstance(patterns, str) else tuple(patterns or ())
    modules = [p.module for p in places.values() if p.site.kind != "experts"]  # of parameters it says nothing
    wrong = [module for module in modules if layers and _layer(module.split("."), names) not in layers]
    if wrong:
        raise FormatError(f"{path}: expected adapters in the layers_to_transform alone, got {some(wrong)}")


def _layer(parts: list[str], names: tuple[str, ...]) -> int | None:
    """The layer that a module lies in, whose name goes on after the number."""
    for i, part in enumerate(parts[:-1]):
        before = ".".join(parts[:i])
        if part.isdecimal() and (not names or any(f".{before}".endswith(f".{n}") for n in names)):
            return int(part)
    return None


# ---- what stands beside ------------------------------------------------------------------------------------


def _check_plain(
    path: Path, config: LoraConfig, keys: Keys, places: Mapping[str, Place], shapes: Mapping[str, Shape]
) -> None:
    """Tensors that are no part of an adapter: each has to be asked for."""
    heads = (*(config.modules_to_save or ()), *HEADS.get(config.task_type or "", ()))
    whole = tuple(dict.fromkeys(heads))
    weights = {place.site.weight for place in places.values()}
    modules = {place.module for place in places.values()}
    rows, wrong = token_rows(config), []
    for name, key in keys.plain.items():
        module, _, last = name.rpartition(".")
        if name.endswith(f".{ROWS}"):
            _check_rows(path, rows, name.removesuffix(f".{ROWS}"), key, shapes[key])
            continue
        bias = last == "bias" and (config.bias == "all" or (config.bias == "lora_only" and module in modules))
        embedding = module.rpartition(".")[2] in EMBEDDINGS and last in ("weight", "bias")
        if not (bias or embedding or name in weights or _saved(name, whole)):
            wrong.append(key)
    if wrong:
        near = [*whole, *(name for place in places.values() for name in place.wrapper.keys.values())]
        wanted = "no keys but those that the config asks for"
        raise FormatError(f"{path}: expected {wanted}, got {some(wrong, near)}")
    missing = [name for name in rows or () if name and not _listed(name, keys.plain, ROWS)]
    if missing:
        raise FormatError(f"{path}: expected the rows of trainable_token_indices, got none of {some(missing)}")


def _saved(name: str, whole: Iterable[str]) -> bool:
    """Whether a tensor lies in a module whose name ends as modules_to_save says: PEFT asks for no dot."""
    parts = name.split(".")
    modules = [".".join(parts[:i]) for i in range(1, len(parts))]
    suffixes = tuple(whole)
    return bool(suffixes) and any(module.endswith(suffixes) for module in modules)


def token_rows(config: LoraConfig) -> dict[str, int] | None:
    """How many rows train, by the embedding's name, "" where there is no name; None where none train."""
    said = config.trainable_token_indices
    if not said:
        return None
    return {k: len(v) for k, v in said.items()} if isinstance(said, Mapping) else {"": len(tuple(said))}


def _listed(name: str, plain: Mapping[str, str], end: str) -> bool:
    return any(known.endswith(f"{name}.{end}") for known in plain)


def _check_rows(path: Path, rows: dict[str, int] | None, module: str, key: str, shape: Shape) -> None:
    found = [n for name, n in (rows or {}).items() if not name or module == name or module.endswith(f".{name}")]
    if not found:
        wanted = "no trained rows without trainable_token_indices"
        raise FormatError(f"{path}: expected {wanted}, got {show(key)}")
    if len(shape) != 2 or shape[0] != found[0]:
        _refuse(path, key, f"({found[0]}, dim), a row for each of trainable_token_indices", shape)


def _check_residual(path: Path, config: LoraConfig, keys: Keys, places: Mapping[str, Place], left: str) -> None:
    """An adapter that is right only beside the base that its start left comes with that base."""
    start = start_name(left or config.init_lora_weights)
    if start not in RESIDUAL:
        return
    alone = [place.site.name for place in places.values() if place.site.weight not in keys.plain]
    if alone:
        again = ", compute it again" if start in AGAIN else ""
        said = f"metadata: {MARK}={left!r}" if left else f"init_lora_weights={config.init_lora_weights!r}"
        raise FormatError(
            f"{path}: {said}: expected the base weights that this start left, got none at {some(alone)}: "
            "beside the original ones the adapter is wrong; convert it to a plain one of rank 2r, save the "
            f"base with it{again}, or say residual_base=True"
        )
