"""The house: data flows one way through the packages, without circles, and each name means one thing."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "elakit"

# From the ground up: a module imports from its own layer and from those below.
LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(layer.split())
    for layer in (
        "errors resources files checks numbering seeds statistics cli_options pipeline",
        "tokens english prompt rewording",
        "measures regions",
        "models",
        "attention",
        "guidance judge world",
        "training",  # elakit.world.train and elakit.world.training
        "bleeding run pipeline_call generation",
        "plot",
        "causes prediction",
        "sweep diagnosis",
        "widgets",
        "cli doctor lab saved_notebooks __main__",
    )
)


def name_of(path: Path) -> str:
    """Dotted name of a module file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@lru_cache(maxsize=1)
def modules() -> dict[str, Path]:
    """All modules of the package."""
    return {name_of(path): path for path in PACKAGE.rglob("*.py")}


@cache
def parsed(path: Path) -> ast.Module:
    """Syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


@lru_cache
def stub(package: str) -> dict[str, str]:
    """Public names of a lazy package: the module that each is imported from."""
    path = modules()[package].with_suffix(".pyi") if package in modules() else Path()
    if not path.is_file():
        return {}
    names = {}
    for node in parsed(path).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.name] = f"{package}.{node.module or alias.name}"
    return names


def at_import(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run when a module is imported: not those in functions or for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from (found for child in node.orelse for found in at_import(child))
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from at_import(node)


def resolve(module: str, name: str | None) -> str:
    """Module that ``from module import name`` loads, through the stubs of lazy packages."""
    if name is not None and f"{module}.{name}" in modules() and name not in stub(module):
        return f"{module}.{name}"
    home = stub(module).get(name or "", module)
    return home if home == module else resolve(home, name if f"{module}.{name}" != home else None)


@lru_cache(maxsize=1)
def imports() -> dict[str, set[str]]:
    """Modules of the package that each module imports when it is imported."""
    found: dict[str, set[str]] = {}
    for module, path in modules().items():
        found[module] = set()
        for node in at_import(parsed(path)):
            if isinstance(node, ast.Import):
                targets = {resolve(alias.name, None) for alias in node.names if alias.name.split(".")[0] == "elakit"}
            elif node.module and node.level == 0 and node.module.split(".")[0] == "elakit":
                targets = {resolve(node.module, alias.name) for alias in node.names}
            else:
                targets = set()
            found[module] |= targets - {module}
    return found


def part(module: str) -> str:
    """Subpackage or top-level module that a module belongs to."""
    if module.startswith("elakit.world.train"):
        return "training"
    return module.split(".")[1] if "." in module else ""


def level(module: str) -> int:
    """Layer of a module, counted from the ground."""
    (number,) = (i for i, layer in enumerate(LAYERS) if part(module) in layer)
    return number


def test_every_part_belongs_to_a_layer() -> None:
    parts = {part(module) for module in modules()} - {""}
    assert parts <= frozenset().union(*LAYERS), parts - frozenset().union(*LAYERS)


def test_the_architecture_page_lists_the_same_layers() -> None:
    page = (ROOT / "docs" / "developing" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [a-z ]+ \| ((?:`[\w/]+`(?:, )?)+) \|$", page, re.M)
    listed = [{name.rstrip("/") for name in re.findall(r"`(.+?)`", row)} for row in rows]
    of_part = {"training": {"world/train", "world/training"}}
    assert listed == [set().union(*(of_part.get(part, {part}) for part in layer)) for layer in LAYERS]


def test_no_module_imports_from_a_layer_above() -> None:
    upward = {
        f"{module} -> {target}"
        for module, targets in imports().items()
        for target in targets
        if part(module) and part(target) and level(target) > level(module)
    }
    assert not upward, "\n".join(sorted(upward))


def test_importing_the_package_imports_nothing_else() -> None:
    assert imports()["elakit"] == set()


@pytest.mark.parametrize("grain", ["module", "part"])
def test_there_is_no_import_circle(grain: str) -> None:
    graph: dict[str, set[str]] = {}
    for module, targets in imports().items():
        at = module if grain == "module" else part(module)
        graph.setdefault(at, set()).update(t if grain == "module" else part(t) for t in targets)
        graph[at].discard(at)
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def exported(package: str) -> Iterator[tuple[str, str]]:
    """Names that a package imports from its modules, and the module of each; modules themselves are left out."""
    path = modules()[package]
    path = path.with_suffix(".pyi") if path.with_suffix(".pyi").is_file() else path
    for node in at_import(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            home = f"{package}.{node.module}" if node.level else node.module
            yield from (
                (alias.asname or alias.name, home) for alias in node.names if f"{home}.{alias.name}" not in modules()
            )


def test_no_public_name_hides_a_module() -> None:
    packages = [name for name, path in modules().items() if path.name == "__init__.py"]
    hidden = {
        f"{package}.{name}" for package in packages for name, _ in exported(package) if f"{package}.{name}" in modules()
    }
    assert not hidden, "\n".join(sorted(hidden))


@pytest.mark.parametrize("package", [name for name, path in modules().items() if path.with_suffix(".pyi").is_file()])
def test_a_lazy_package_has_what_its_stub_lists(package: str) -> None:
    for name, home in stub(package).items():
        if home == f"{package}.{name}":
            assert home in modules(), f"{package}/__init__.pyi lists {name}, and there is no such module"
            continue
        tree = parsed(modules()[home])
        defined = {getattr(node, "name", None) for node in tree.body}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                defined |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                defined.add(node.target.id)
            elif isinstance(node, ast.ImportFrom):
                defined |= {alias.asname or alias.name for alias in node.names}
        assert name in defined | set(stub(home)), f"{package}/__init__.pyi takes {name} from {home}, which has none"


def test_every_pipeline_argument_says_what_a_pipeline_is() -> None:
    # diffusers' own classes are `Any` to a type checker, so a pipeline is a Protocol or the class that a script builds
    vague = [
        f"{module}:{argument.lineno}: {argument.arg}: {annotation}"
        for module, path in modules().items()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        if argument.arg == "pipe"
        for annotation in [ast.unparse(argument.annotation) if argument.annotation else "nothing"]
        if "Pipeline" not in annotation
    ]
    assert not vague, "\n".join(vague)


def test_only_one_module_writes_under_a_temporary_name() -> None:
    # a second implementation of whole-or-nothing writing had neither unique names nor a way back
    copies = {
        f"{module}:{node.lineno}"
        for module, path in modules().items()
        if module != "elakit.files"
        for node in ast.walk(parsed(path))
        if (isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.replace", "os.rename", "shutil.move"))
        or (isinstance(node, ast.Constant) and str(node.value).endswith((".tmp", ".part", ".part.npz")))
    }
    assert not copies, "\n".join(sorted(copies))


def test_maps_are_resampled_by_area_in_one_module() -> None:
    # torch's "area" pools whole pixels: a box of one and a half pixels counts two of them in full
    copies = {
        f"{module}:{node.lineno}"
        for module, path in modules().items()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.keyword) and node.arg == "mode" and ast.unparse(node.value) == "'area'"
    }
    assert not copies, "\n".join(sorted(copies))


def takes_a_label_apart(node: ast.AST) -> bool:
    """True for a pattern with ``@\\w``, and for a call such as ``label.partition("@")``."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and r"@\w" in node.value.replace("(", "")
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
        return False
    splits = ("partition", "rpartition", "split", "rsplit", "find", "rfind", "index", "rindex")
    return node.func.attr in splits and isinstance(node.args[0], ast.Constant) and node.args[0].value in ("@", "#")


def test_labels_are_not_taken_apart() -> None:
    # the label of a word is Prompt.word_labels; how tokens are labeled is known in elakit.tokens only
    copies = {
        f"{module}:{node.lineno}"
        for module, path in modules().items()
        if module != "elakit.tokens"
        for node in ast.walk(parsed(path))
        if takes_a_label_apart(node)
    }
    assert not copies, "\n".join(sorted(copies))


def wide_dataclasses() -> dict[tuple[str, str], int]:
    """Number of fields of each dataclass with five or more, by module and name."""
    found = {}
    for module, path in modules().items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(one) for one in node.decorator_list):
                fields = [one for one in node.body if isinstance(one, ast.AnnAssign)]
                found[module, node.name] = sum("ClassVar" not in ast.unparse(one.annotation) for one in fields)
    return {key: count for key, count in found.items() if count >= 5}


def test_wide_dataclasses_are_built_by_keyword() -> None:
    # with four or more values in a row a reader has to count, and a new field in the middle shifts them all
    wide = wide_dataclasses()
    positional = []
    for module, path in modules().items():
        if module.startswith("elakit.world.training"):  # scripts that train picture-world
            continue
        tree = parsed(path)
        known = {name for home, name in wide if home == module}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                homes = {alias.asname or alias.name: resolve(node.module, alias.name) for alias in node.names}
                known |= {name for name, home in homes.items() if (home, name) in wide}
        calls = [(node, known) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        for owner in ast.walk(tree):
            if isinstance(owner, ast.ClassDef) and (module, owner.name) in wide:
                calls += [(node, {"cls"}) for node in ast.walk(owner) if isinstance(node, ast.Call)]
        positional += [
            f"{module}:{node.lineno}: {ast.unparse(node)}"
            for node, names in calls
            if (len(node.args) > 3 or any(isinstance(one, ast.Starred) for one in node.args))
            and ast.unparse(node.func) in names
        ]
    assert wide["elakit.run", "Run"] >= 5
    assert not positional, "\n".join(positional)


# Folders of tests of more than one package, and why they are apart.
SHARED = {
    "cuda": "the same checks on a GPU for several packages",
    "parity": "values of the authors' released code, which several modules of guidance share",
}


def test_no_test_file_imports_another() -> None:
    # a test file can then be renamed, divided or deleted without a look at the others
    tests = Path(__file__).parent
    borrowed = {
        f"{file.relative_to(tests).as_posix()}:{node.lineno}: {ast.unparse(node)}"
        for file in tests.rglob("*.py")
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [*(alias.name for alias in node.names), getattr(node, "module", None) or ""]
        if any(part.startswith("test_") for part in name.split("."))
    }
    assert not borrowed, "move what is shared to a module of its own:\n" + "\n".join(sorted(borrowed))


def test_tests_mirror_the_package() -> None:
    """A file of tests is named after a module of its folder's package, or after the package, and an aspect."""
    tests, strays = Path(__file__).parent, []
    for file in sorted(tests.glob("*/test_*.py")):
        package = file.parent.name
        if package in SHARED:
            continue
        found = [*ROOT.glob(f"elakit/{package}/*"), *ROOT.glob(f"{package}/*")]  # benchmarks is beside elakit
        modules = {package, *(one.stem for one in found if not one.name.startswith("_"))}
        name = file.stem.removeprefix("test_")
        if not found or not any(name == module or name.startswith(f"{module}_") for module in modules):
            strays.append(file.relative_to(tests).as_posix())
    assert not strays, f"name each after a module, as CONTRIBUTING.md says: {strays}"
