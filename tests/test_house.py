"""The house, enforced: which room may import which, and what no room may do.  All by reading the source.

Each rule is a function from source text to the places where it is broken, so that it can be shown a fault.
"""

import ast
import inspect
import re
import subprocess
from functools import cache
from pathlib import Path

import array_api_strict
import numpy as np
import pytest

import lorax_np as lx

PACKAGE = Path(lx.__file__).parent
ROOT = PACKAGE.parent
APART = {"verify/plugin/entry.py"}  # installed beside the package, which it therefore calls by its name
FILES = {
    str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8")
    for path in sorted(PACKAGE.rglob("*.py"))
    if str(path.relative_to(PACKAGE)) not in APART
}

# Floor 0 imports in the order listed. A folder is one room, whose files may import each other.
FLOORS = (
    ("errors.py", "kinds.py", "arrays.py", "backend.py", "shapes.py", "blocks.py", "tree.py", "random.py"),
    ("ops/", "params.py", "config/", "singular.py", "quant/"),
    ("starts/",),
    ("init.py", "layer.py", "fast/", "merge.py", "combine/"),
    ("layers/", "plain.py", "spectra.py"),
    ("optim/",),
    ("inject.py", "io/", "parallel.py"),
    ("models/",),
    ("text/",),
    ("stream/", "audit/", "train/", "generation/"),
    ("__init__.py",),
    ("verify/",),
    ("commands/",),
    ("cli.py",),
    ("__main__.py",),
)
FACE_ONLY = "verify/", "commands/", "cli.py", "__main__.py"  # these see the public face, and what stands here
SEEN_BESIDES = {
    "commands/": {
        *("backend.py", "verify/", "io/", "stream/", "audit/", "inject.py", "spectra.py"),
        *("kinds.py", "parallel.py", "train/", "generation/", "models/", "text/"),
    },
    "cli.py": {"commands/"},
    "__main__.py": {"cli.py"},
}

# What arrays' own libraries are asked for by the engine, as a namespace `xp`; specs/backend.md.
# CuPy 14.2's namespace, restricted to what we use: look a new name up in CuPy's reference before adding it.
CUPY = {
    *("abs", "all", "arange", "asarray", "concat", "float64", "full_like", "isfinite", "max", "ones"),
    *("abs", "all", "any", "arange", "asarray", "concat", "float64", "full_like", "isfinite", "max", "ones"),
    *("permute_dims", "real", "reshape", "sqrt", "stack", "sum", "take", "uint64", "where", "zeros_like"),
    *("abs", "all", "arange", "asarray", "float64", "full_like", "isfinite", "max", "ones", "real", "reshape"),
    *("sqrt", "stack", "sum", "take", "uint64", "where", "zeros_like"),
    *("any",),  # rows of tokens
    *("clip", "cos", "empty_like", "exp", "log", "ones_like", "sin", "tanh"),  # models
    *("argmax", "exp", "log", "log1p", "ones_like", "take_along_axis", "zeros"),  # losses, pooling and routers
    *("broadcast_to",),  # experts that are alike
}
BRANCHES = {  # in backend.py alone, in the branch of the one library that has it
    "asnumpy": "CuPy",
    "array": "NumPy and CuPy",
    "astype": "the array standard",
    "__array_namespace_info__": "the array standard",
    "__name__": "any module",
}
NAMESPACES = "xp", "library"  # the names under which a namespace goes
MAKERS_OF_NAMESPACES = "namespace_of", "namespace"


def room(file):
    """The floor and the place on it of a file, and the name of its room."""
    for floor, rooms in enumerate(FLOORS):
        for place, name in enumerate(rooms):
            if file == name or (name.endswith("/") and file.startswith(name)):
                return floor, place, name
    raise AssertionError(f"{file}: no floor of the house has this room")


parsed = cache(ast.parse)  # one rule after another looks at the same files


@cache
def nodes(source):
    return tuple(ast.walk(parsed(source)))


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """Trees take much memory: they go with this file."""
    yield
    parsed.cache_clear()
    nodes.cache_clear()


def imports(file, found):
    """The package's own files that nodes of a file import, each with the names taken from it and the line."""
    folder = Path(file).parent.parts
    for node in found:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "lorax_np":
                    yield node.lineno, "by its absolute name", set()
        elif (
            isinstance(node, ast.ImportFrom)
            and not node.level
            and (node.module or "").split(".")[0] == "lorax_np"
        ):
            yield node.lineno, "by its absolute name", set()
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) - node.level + 1]
            parts = (*base, *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                own = bool(parts) or file == "__init__.py" or alias.name not in lx.__all__
                deeper = file_of((*parts, alias.name)) if own else None
                yield (
                    node.lineno,
                    deeper or file_of(parts) or "/".join(parts),
                    set() if deeper else {alias.name},
                )


def file_of(parts):
    """The file of a module by its parts, or None where there is none."""
    for candidate in ("/".join(parts) + ".py", "/".join((*parts, "__init__.py"))):
        if candidate.lstrip("/") in FILES:
            return candidate.lstrip("/")
    return None


def at_once(source):
    """The nodes of the statements that run when a file is imported."""
    tree = ast.parse(source)

    def waits(node):
        return isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        )

    for owner in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
        owner.body = [node for node in owner.body if not waits(node)]
    return ast.walk(tree)


# ---- the rules ---------------------------------------------------------------------------------------------


def wrong_imports(file, source):
    """Upward or sideways imports, and what sees more than the public face."""
    floor, place, name = room(file)
    for line, target, names in imports(file, nodes(source)):
        if target not in FILES:
            yield f"{file}:{line} imports lorax_np {target}"
            continue
        its_floor, its_place, its_name = room(target)
        if its_name == name and name.endswith("/"):
            continue
        if its_floor > floor or (its_floor == floor and (floor or its_place >= place)):
            yield f"{file}:{line} imports {target}, which is no lower floor"
        if name in FACE_ONLY and its_name not in SEEN_BESIDES.get(name, set()):
            if target != "__init__.py":
                yield f"{file}:{line} imports {target}, past the public face"
            elif hidden := names - set(lx.__all__) - {"__version__"}:
                yield f"{file}:{line} imports {', '.join(sorted(hidden))}, which the public face does not have"


def environment_or_cupy(file, source):
    """Outside backend.py: CuPy by name, or the environment."""
    if file == "backend.py":
        return
    for node in nodes(source):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            names = [str(node.args[0].value)] if called in ("import_module", "__import__") else []
        for name in names:
            if {"cupy", "environ", "getenv", "environb"} & set(name.split(".")):
                yield f"{file}:{node.lineno} names {name}"


def array_libraries(file, source):
    """In ops/: an array library imported."""
    if not file.startswith("ops/"):
        return
    for node in nodes(source):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module]
        for module in modules:
            if module.split(".")[0] not in ("typing", "math", "collections", "itertools"):
                yield f"{file}:{node.lineno} imports {module}"


def spellings(file, source):
    """In the engine: names asked of a namespace that one of the three libraries does not have."""
    if file.startswith("verify/"):
        return
    for line, name in asked(source):
        if name == "__name__" or (file == "backend.py" and name in BRANCHES):
            continue
        for library, has in (
            ("NumPy", hasattr(np, name)),
            ("the array standard", hasattr(array_api_strict, name)),
            ("CuPy", name in CUPY),
        ):
            if not has:
                yield f"{file}:{line} uses {name}, which {library} does not have"


def asked(source):
    """Lines and names asked of a namespace: xp.name, or namespace_of(...).name."""
    for node in nodes(source):
        if isinstance(node, ast.Attribute):
            of = node.value.func if isinstance(node.value, ast.Call) else node.value
            known = MAKERS_OF_NAMESPACES if isinstance(node.value, ast.Call) else NAMESPACES
            if isinstance(of, ast.Name) and of.id in known:
                yield node.lineno, node.attr


def bare_asserts(file, source):
    for node in nodes(source):
        if isinstance(node, ast.Assert):
            yield f"{file}:{node.lineno} asserts"


def passed_along(file, source):
    """**kwargs handed on. Named arrays (Array, Named) are data, not options: those may be."""
    for node in nodes(source):
        if not isinstance(node, ast.FunctionDef | ast.Lambda) or not node.args.kwarg:
            continue
        taken, kind = node.args.kwarg.arg, node.args.kwarg.annotation
        if kind is not None and re.match(r"Array\b|Named\b", ast.unparse(kind)):
            continue
        for call in ast.walk(node):
            if isinstance(call, ast.Call):
                for word in call.keywords:
                    if word.arg is None and isinstance(word.value, ast.Name) and word.value.id == taken:
                        yield f"{file}:{call.lineno} passes **{taken} along"


def undocumented(file, source):
    """Public functions, classes and methods without a docstring or without full annotations."""

    def visit(body, owner):
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if isinstance(node, ast.FunctionDef):
                if any(ast.unparse(mark).endswith("overload") for mark in node.decorator_list):
                    continue
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                given = given[1:] if owner and not static(node) else given
                given += [extra for extra in (node.args.vararg, node.args.kwarg) if extra]
                if node.returns is None or any(argument.annotation is None for argument in given):
                    yield f"{file}:{node.lineno} {owner}{node.name} lacks an annotation"
            if not ast.get_docstring(node) and not protocol(node, owner):
                yield f"{file}:{node.lineno} {owner}{node.name} lacks a docstring"
            if isinstance(node, ast.ClassDef):
                yield from visit(node.body, f"{node.name}.")

    def static(node):
        return any(ast.unparse(mark) == "staticmethod" for mark in node.decorator_list)

    def protocol(node, owner):  # one line of dots, whose class says what it is
        return bool(owner) and ast.unparse(node.body[-1]) == "..."

    yield from visit(parsed(source).body, "")


def without_source(file, source):
    """In ops/ and layer.py: public functions that cite neither a spec nor an equation."""
    if not file.startswith("ops/") and file != "layer.py":
        return
    for node in parsed(source).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            lines = "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])
            if not re.search(r"specs/\w+\.md|\(\w+\.\d+\)", lines):
                yield f"{file}:{node.lineno} {node.name} cites no spec"


RULES = (
    wrong_imports,
    environment_or_cupy,
    array_libraries,
    spellings,
    bare_asserts,
    passed_along,
    undocumented,
    without_source,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule):
    assert not [fault for file, source in FILES.items() for fault in rule(file, source)]


@pytest.mark.parametrize(
    ("rule", "file", "source"),
    [
        (wrong_imports, "ops/lora.py", "from ..layer import lora_linear_forward"),
        (wrong_imports, "ops/lora.py", "from .. import Linear"),
        (wrong_imports, "params.py", "from .config import LoraConfig"),
        (wrong_imports, "params.py", "def f():\n    from . import layer"),
        (wrong_imports, "layer.py", "from .merge import merge"),
        (wrong_imports, "errors.py", "from .shapes import bind"),
        (wrong_imports, "backend.py", "from . import random"),
        (wrong_imports, "layer.py", "from lorax_np.errors import ShapeError"),
        (wrong_imports, "layer.py", "import lorax_np"),
        (wrong_imports, "layer.py", "from .nowhere import thing"),
        (wrong_imports, "__init__.py", "from .verify import verify"),
        (wrong_imports, "verify/cases.py", "from ..layer import lora_linear_forward"),
        (wrong_imports, "verify/subjects/engine.py", "from ...layer import lora_linear_forward"),
        (wrong_imports, "verify/cases.py", "from .. import namespace_of"),
        (wrong_imports, "verify/cases.py", "from .. import cli"),
        (wrong_imports, "cli.py", "from .config import LoraConfig"),
        (environment_or_cupy, "layer.py", "import cupy"),
        (environment_or_cupy, "layer.py", "from cupy import asarray"),
        (environment_or_cupy, "layer.py", "import importlib\nimportlib.import_module('cupy.linalg')"),
        (environment_or_cupy, "random.py", "import os\nseed = os.environ['SEED']"),
        (environment_or_cupy, "random.py", "from os import getenv"),
        (array_libraries, "ops/lora.py", "import numpy as np"),
        (array_libraries, "ops/dora.py", "from numpy import sqrt"),
        (spellings, "ops/dora.py", "def f(xp, V):\n    return xp.linalg.norm(V)"),
        (spellings, "ops/dora.py", "def f(xp, V):\n    return xp.amax(V)"),
        (spellings, "random.py", "def f(library):\n    return library.asnumpy"),
        (spellings, "layer.py", "def f(x):\n    return namespace_of(x=x).linalg"),
        (spellings, "ops/dora.py", "def f(xp, V):\n    return xp.matrix_transpose(V)"),
        (bare_asserts, "layer.py", "def f(x):\n    assert x"),
        (passed_along, "layer.py", "def f(**kwargs):\n    return g(**kwargs)"),
        (passed_along, "layer.py", "def f(**options: Any):\n    return g(1, **options)"),
        (undocumented, "layer.py", "def f(x: int) -> int:\n    return x"),
        (undocumented, "layer.py", "def f(x) -> int:\n    '''.'''"),
        (undocumented, "layer.py", "def f(*x) -> int:\n    '''.'''"),
        (undocumented, "layer.py", "def f(x: int):\n    '''.'''"),
        (undocumented, "layer.py", "class C:\n    '''.'''\n    def f(self) -> int:\n        return 1"),
        (without_source, "ops/lora.py", "def f(x: int) -> int:\n    '''Nothing is cited.'''"),
    ],
)
def test_each_rule_sees_its_fault(rule, file, source):
    assert list(rule(file, source))


def test_imports_make_no_cycle():
    """Among files, by what is imported when a file is; an import inside a function waits till all are there."""
    graph = {
        file: {target for _, target, _ in imports(file, at_once(source))} for file, source in FILES.items()
    }
    done, path = set(), []

    def visit(file):
        if file in path:
            raise AssertionError("cycle: " + " -> ".join([*path[path.index(file) :], file]))
        if file in done:
            return
        path.append(file)
        for target in graph.get(file, ()):
            if target != file:
                visit(target)
        path.pop()
        done.add(file)

    for file in graph:
        visit(file)
    assert done >= set(FILES)


def test_every_file_has_a_room():
    assert {room(file)[2] for file in FILES} <= {name for rooms in FLOORS for name in rooms}
    with pytest.raises(AssertionError, match="no floor"):
        room("utils.py")


def test_what_is_listed_of_cupy_is_used():
    used = {
        name for file, source in FILES.items() if not file.startswith("verify/") for _, name in asked(source)
    }
    assert used - CUPY == set(BRANCHES)
    assert used >= CUPY


# ---- the public face ---------------------------------------------------------------------------------------

FACE = {
    *(
        "Adapter",
        "BackendError",
        "ConfigError",
        "DtypeError",
        "FormatError",
        "Linear",
        "LoraConfig",
        "ShapeError",
    ),
    *("backend_info", "dropout_mask", "init_adapter", "lora_linear_backward", "lora_linear_forward", "merge"),
    *("param_count", "torch_generator", "unmerge", "verify"),
}


def test_the_public_face_is_whole():
    assert set(lx.__all__) >= FACE
    assert lx.__all__ == sorted(lx.__all__)
    assert len(set(lx.__all__)) == len(lx.__all__)
    for name in lx.__all__:
        value = getattr(lx, name)
        assert (value.__doc__ or "").strip(), name
        assert inspect.ismodule(value) or value.__module__.startswith("lorax_np")
    for name in ("from_dict", "to_dict", "from_swift", "scaling"):
        assert hasattr(lx.LoraConfig, name)
    assert lx.verify.__all__ == sorted(lx.verify.__all__, key=lambda name: (name.islower(), name))
    assert all(hasattr(lx.verify, name) for name in ("verify", "subjects", "Spec", "Subject", "Case"))
    assert all(hasattr(lx.verify.Report, name) for name in ("passed", "diagnosis", "to_json", "__str__"))
    assert {"checks"} <= set(lx.verify.Report.__dataclass_fields__)
    with pytest.raises(AttributeError, match=r"^module 'lorax_np' has no attribute 'nothing'$"):
        _ = lx.nothing


def test_the_signatures_that_face_md_shows():
    """Names and defaults as people type them."""

    def shown(function):
        return {
            name: None if parameter.default is parameter.empty else parameter.default
            for name, parameter in inspect.signature(function).parameters.items()
        }

    assert list(shown(lx.Linear)) == ["W", "b"]
    assert list(shown(lx.Adapter)) == ["A", "B", "m", "b", "bB"]
    assert list(shown(lx.init_adapter)) == ["base", "config", "rng", "inputs", "gradient"]
    assert list(shown(lx.lora_linear_forward)) == ["x", "base", "adapter", "scaling", "mask"]
    assert list(shown(lx.lora_linear_backward)) == [
        "gy",
        "saved",
        "base",
        "adapter",
        "scaling",
        "norm_gradient",
    ]
    assert shown(lx.lora_linear_backward)["norm_gradient"] is False
    assert list(shown(lx.merge)) == ["base", "adapter", "scaling"]
    mask = {"shape": None, "p": None, "seed": 0, "step": 0, "site": 0, "dtype": "float32", "xp": None}
    assert list(shown(lx.dropout_mask).items())[: len(mask)] == list(mask.items())
    judge = {"subject": None, "profile": "fp32", "level": "full", "conventions": None, "weights": None}
    assert list(shown(lx.verify.verify).items())[: len(judge)] == list(judge.items())
    fast = {"x": None, "base": None, "adapter": None, "scaling": None, "dropout": None}
    assert shown(lx.fast.lora_linear_forward) == fast
    back = list(shown(lx.fast.lora_linear_backward).items())
    assert back[3:] == [("adapter", None), ("scaling", None), ("norm_gradient", False), ("need_gx", True)]
    assert list(shown(lx.fast.merge_into)) == ["base", "adapter", "scaling"]
    for function, first in {
        lx.load_model: ["path"],
        lx.inject: ["weights", "config", "rng"],
        lx.save_adapter: ["dir", "adapters", "config"],
        lx.load_adapter: ["dir"],
        lx.train: ["model", "adapters", "data", "config"],
        lx.verify.gradcheck: ["f", "f_backward", "inputs", "method"],
        lx.verify.subjects.peft: ["config"],
        lx.verify.subjects.torch_module: ["module", "params"],
        lx.verify.subjects.jax_fn: ["f", "argnames"],
        lx.verify.subjects.ctypes: ["path"],
        lx.verify.subjects.command: ["argv"],
    }.items():
        assert list(shown(function))[: len(first)] == first
    assert "callbacks" in shown(lx.train)
    assert shown(lx.verify.gradcheck)["method"] == "secant"
    defaults = {
        "r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }
    defaults |= {"lora_bias": False, "init_lora_weights": True, "fan_in_fan_out": False, "target_modules": None}
    assert {name: getattr(lx.LoraConfig(), name) for name in defaults} == defaults


# ---- what stands in the files ------------------------------------------------------------------------------

TEXT = {".py", ".md", ".toml", ".yml", ".yaml", ".cfg", ".txt", ".json", ""}
OF_ONE_MACHINE = "tm_p|wor_k|roo_t|home|Users".replace("_", "")  # apart, so that this file does not hold them
MAKERS = "chat_gpt|cla_ude|anthro_pic|open_ai|copi_lot|ll_m-written".replace("_", "")
MAKING = "sub-?age_nts?|(?:this|another|previous|my) sess_ion|context win_dow|the br_ief|as an a_i".replace(
    "_", ""
)
UNDONE = "TO_DO|FIX_ME|X_XX".replace("_", "")
FORBIDDEN = {  # what it is: how it looks
    "a path of one machine": rf"(?<![\w.$}}/])/(?:{OF_ONE_MACHINE})/\w[\w/]",
    "a page that is not shipped": r"\b(?:house|face|semantics|verification|platform|performance)\.md\b",
    "who typed it": rf"(?i)\b(?:{MAKERS})\b",
    "how it was made": rf"(?i)\b(?:{MAKING})\b",
    "what is left to do": rf"\b(?:{UNDONE})\b",
    "a conflict": r"^(?:<{7}|>{7}) ",
}


def tracked():
    """The files that git would ship, or, away from git, those of the package and its tests."""
    found = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if found.returncode == 0 and (ROOT / ".git").exists():
        return [ROOT / name for name in found.stdout.splitlines()]
    return [path for folder in ("lorax_np", "tests", "specs", "bench") for path in (ROOT / folder).rglob("*")]


def forbidden(text):
    for what, pattern in FORBIDDEN.items():
        for hit in re.finditer(pattern, text, re.M):
            yield what, hit.group(), text[: hit.start()].count("\n") + 1


def test_no_file_says_where_or_how_it_was_made():
    found = []
    for path in tracked():
        if path.suffix in TEXT and path.is_file() and path.name != "LICENSE":
            text = path.read_text(encoding="utf-8")
            found += [f"{path.relative_to(ROOT)}:{line} {what}: {hit}" for what, hit, line in forbidden(text)]
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        "in /wor" + "k/main",
        "cd /tm" + "p/xy",
        "as Cla" + "ude said",
        "in this sess" + "ion",
        "# TO" + "DO: later",
    ],
)
def test_the_forbidden_are_seen(text):
    assert list(forbidden(text))


@pytest.mark.parametrize(
    "text", ["https://a.b/tmp/x", "scope='session'", "a helper", "$work/dev", "tmp_path / 'a'"]
)
def test_the_harmless_are_not(text):
    assert not list(forbidden(text))


def test_long_files_are_listed():
    """Past 300 lines, look for the second idea. A list, not a fault."""
    long = {file: len(source.splitlines()) for file, source in FILES.items()}
    for file, lines in sorted(long.items(), key=lambda item: -item[1]):
        if lines > 300:
            print(f"lorax_np/{file}: {lines} lines")
