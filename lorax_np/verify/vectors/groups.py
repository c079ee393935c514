"""The layers of a vectors directory, by group, from a seed.  Format: specs/vectors.md."""

from collections.abc import Iterator
from dataclasses import replace

from ..batteries.lattice import lattice
from ..cases import ALPHAS, DROPS, KINDS, Case, draw
from .case import Group, Vector, from_case, from_lattice
from .special import convention_group, invalid_group, merge_group, of_8_bits, rounding_group

#         d_out d_in r  lead; small, so that exact arithmetic takes no time
SHAPES = (
    (5, 7, 3, (2, 2)),
    (3, 11, 5, (3,)),
    (4, 3, 6, (3,)),
    (7, 5, 1, ()),
    (1, 9, 2, (1, 4)),
    (2, 6, 4, (5,)),
)
BIASES = ("absent", "frozen", "trained")
SHORT_DROPS = (0.2, 0.6)  # 1/(1 − p) is 1.25 and 2.5: a mask of 8 bits


def lattice_groups(seed: int) -> Iterator[Group]:
    """Data on which every order of summation is exact: the truth has no tolerance."""
    kinds: dict[str, list[Vector]] = {"lattice-lora": [], "lattice-dora": [], "lattice-dora-full": []}
    for item in lattice(seed):
        name = "lattice-lora" if item.case.m is None else "lattice-dora" + "-full" * item.case.norm_gradient
        kinds[name].append(from_lattice(item))
    for name, vectors in kinds.items():
        for i, part in enumerate(_parts(vectors)):
            yield Group(f"{name}-{i}" if i else name, tuple(part), "bitwise", text=True)


def _parts(vectors: list[Vector], most: int = 900_000) -> Iterator[list[Vector]]:
    """The tests in runs of less than a megabyte."""
    part: list[Vector] = []
    size = 0
    for vector in vectors:
        mine = sum(v.nbytes + 120 for v in (*vector.inputs.values(), *vector.outputs.values()))
        if part and size + mine > most:
            yield part
            part, size = [], 0
        part.append(vector)
        size += mine
    if part:
        yield part


def generic_group(seed: int) -> Group:
    """Normal data in all 24 bits, for float32 arithmetic and for matrix units of 11 bits."""
    cases = [_generic("generic", i, seed) for i in range(3 * len(KINDS))]
    return Group("generic", tuple(from_case(c, ("Generic",), ("fp32", "tf32")) for c in cases), "sigma")


#                 kind, shape: what generic data avoid, since it hides or divides
CORNERS = {
    "square": ("lora, dropout", (6, 6, 4, (3,)), "Square"),
    "square-A": ("lora, dropout", (5, 7, 7, (3,)), "Square"),
    "square-B": ("lora", (6, 4, 6, (3,)), "Square"),
    "all-square": ("lora", (5, 5, 5, (5,)), "Square"),
    "dora-square": ("dora, dropout", (6, 6, 4, (3,)), "Square"),
    "dora-full-square": ("dora full norm", (6, 6, 4, (3,)), "Square"),
    "dora-m-0": ("dora, dropout", (5, 7, 3, (4,)), "MagnitudeZero"),
    "dora-full-m-0": ("dora full norm", (5, 7, 3, (4,)), "MagnitudeZero"),
    "dora-m-negative": ("dora full norm, dropout", (5, 7, 3, (4,)), "MagnitudeNegative"),
}


def corner_group(seed: int) -> Group:
    """Square matrices, on which a transposition runs, and magnitudes of 0 and below."""
    vectors = []
    for i, (name, (kind, shape, flag)) in enumerate(CORNERS.items()):
        case = draw(f"corner/{name}", kind, shape, "float32", (seed, 14, i), alpha=5.3, bias="trained")
        if case.m is not None and flag != "Square":
            m = case.m.copy()
            m[1] = 0.0 if flag == "MagnitudeZero" else -m[1]
            case = replace(case, m=m)
        vectors.append(from_case(case, ("Generic", flag), ("fp32", "tf32")))
    return Group("corners", tuple(vectors), "sigma")


def half_group(seed: int) -> Group:
    """Normal data of 8 bits, which bfloat16 and float16 hold exactly: their subjects start from the same."""
    cases = []
    for i in range(2 * len(KINDS)):
        case = _generic("half", i, seed, SHORT_DROPS)
        arrays = {name: of_8_bits(value) for name, value in case.arrays().items()}
        cases.append(replace(case, **arrays))  # type: ignore[arg-type]
    return Group(
        "half", tuple(from_case(c, ("Generic", "EightBits"), ("bf16", "fp16", "fp32")) for c in cases), "sigma"
    )


def _generic(name: str, i: int, seed: int, drops: tuple[float, ...] = DROPS) -> Case:
    kind = KINDS[i % len(KINDS)]
    return draw(
        f"{name}/{kind.replace(', ', '-').replace(' ', '-')}/{i // len(KINDS)}",
        kind,
        SHAPES[(i + i // len(KINDS)) % len(SHAPES)],
        "float32",
        (seed, 8, len(name), i),
        alpha=ALPHAS[i % len(ALPHAS)],
        p=drops[(i + i // len(KINDS)) % len(drops)],
        bias=BIASES[(i + i // len(KINDS)) % 3],
        rslora=i % 4 == 1,
        lora_bias=i // len(KINDS) % 2 == 0,
    )


def groups(seed: int) -> Iterator[Group]:
    """All groups of a directory but those of known faults, in the order of the manifest."""
    yield from lattice_groups(seed)
    yield generic_group(seed)
    yield corner_group(seed)
    yield half_group(seed)
    yield convention_group(seed)
    yield merge_group(seed)
    yield rounding_group(seed)
    yield invalid_group(seed)
