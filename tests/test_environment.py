"""The two ways to set elakit up describe the same thing, and the README's commands are those that CI runs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
CONDA_NAMES = {"lazy-loader": "lazy_loader", "torch": "pytorch", "huggingface-hub": "huggingface_hub"}


def split(requirement: str) -> tuple[str, str]:
    name, versions = re.match(r"([A-Za-z0-9_.-]+?)((?:[<>=!~].*)?)$", requirement.replace(" ", "")).groups()
    return name, versions


def test_environment_yml_lists_what_pyproject_requires() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {CONDA_NAMES.get(n, n): v for n, v in map(split, project["dependencies"])}
    wanted["python"] = project["requires-python"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    listed = dict(map(split, (d for d in environment["dependencies"] if isinstance(d, str))))
    assert listed.pop("pip") == ""
    assert listed.pop("spacy-model-en_core_web_sm") == ""  # the extra "english" of pyproject
    assert listed == wanted


def test_ci_runs_the_readmes_test_command() -> None:
    readme = (ROOT / "README.md").read_text()
    command = re.search(r"<!-- tests -->\n```bash\n(.+?)\n```", readme, re.S).group(1)
    assert command.endswith("python -m pytest")
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
