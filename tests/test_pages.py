"""The pages of the documentation name things that exist: public names, files, methods, and errors."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

import elakit.errors
from benchmarks import gallery
from elakit.guidance import METHODS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)


def test_the_reference_lists_names_that_exist() -> None:
    text = (DOCS / "reference" / "index.md").read_text(encoding="utf-8")
    blocks = re.findall(r"currentmodule:: ([\w.]+)(.*?)```", text, flags=re.S)
    named = [(module, name) for module, block in blocks for name in re.findall(r"^   (\w+)$", block, flags=re.M)]
    assert len(named) > 100
    missing = [f"{module}.{name}" for module, name in named if not hasattr(importlib.import_module(module), name)]
    assert not missing


def test_the_page_on_guidance_lists_every_method_once_per_table() -> None:
    text = (DOCS / "howto" / "guide.md").read_text(encoding="utf-8")
    classes = {kind.__name__ for kind in METHODS.values()}
    assert set(re.findall(r"^\| `(\w+)` \| `[\w-]+` \|", text, flags=re.M)) == classes
    rows = re.findall(r"^\| `([a-z][\w-]*)` \|", text, flags=re.M)
    for name in METHODS:
        assert rows.count(name) == 3, f"{name}: one row each for loss, updates and source"


def test_the_gallery_states_the_sweep_of_its_figures() -> None:
    text = " ".join((DOCS / "gallery.md").read_text(encoding="utf-8").split())
    words = re.search(r"`elakit (sweep run [^`]+)`", text)[1].split()
    stated = dict(zip(words[2::2], words[3::2], strict=True))
    assert stated.pop("--out") == re.search(r'sweep\.table\("(.+?)"\)', text)[1]
    assert stated == {
        "--suite": gallery.SUITE,
        "--limit": str(gallery.PROMPTS),
        "--seeds": ",".join(map(str, gallery.SWEEP_SEEDS)),
        "--methods": ",".join(gallery.METHODS),
    }


def test_the_readme_names_every_method() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    methods = " ".join(text[text.index("## Methods") : text.index("## Sweeps")].lower().split())
    for kind in METHODS.values():
        assert kind.title.lower() in methods or f"elakit.{kind.__name__}()".lower() in methods, kind.title


def test_the_page_on_errors_lists_every_error() -> None:
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    kinds = {name for name, kind in vars(elakit.errors).items() if isinstance(kind, type)}
    assert set(re.findall(r"autoexception:: (\w+)", text)) == kinds
    assert set(re.findall(r"^\| `(\w+)` \|", text, flags=re.M)) == kinds - {"ElakitError"}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)(?:#[\w-]+)?\)", text):
        path = page.parent / target.replace("_notebooks/", "../notebooks/")
        assert path.resolve().exists(), target
    for path in re.findall(r"`((?:docs|elakit|tests|notebooks|data)/[\w./-]+\.(?:md|py|ipynb|toml|json))`", text):
        assert (ROOT / path).exists() or path.endswith("separate.py"), path


def test_badges_open_notebooks_of_this_repository() -> None:
    files = [ROOT / "README.md", *PAGES, *sorted((ROOT / "notebooks").glob("*.ipynb"))]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    urls = set(re.findall(r"https://(?:colab\.research\.google\.com/github|mybinder\.org/v2)/[^)\s\"\\]+", text))
    assert {urlsplit(url).netloc for url in urls} == {"colab.research.google.com", "mybinder.org"}
    repositories = set()
    for url in urls:
        parts = urlsplit(url)
        if parts.netloc == "mybinder.org":
            _, _, service, owner, name, branch = parts.path.split("/")
            assert (service, set(parse_qs(parts.query))) == ("gh", {"labpath"}), url
            (path,) = parse_qs(parts.query)["labpath"]
            assert (ROOT / "environment.yml").is_file()  # from which Binder builds
        else:
            _, _, owner, name, kind, branch, path = parts.path.split("/", 6)
            assert (kind, parts.query) == ("blob", ""), url
        assert branch == "main", url
        assert (ROOT / path).is_file(), url
        repositories.add((owner, name))
    assert len(repositories) == 1


def test_every_page_is_in_the_table_of_contents() -> None:
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = {
        line.strip() for block in re.findall(r"```\{toctree\}(.*?)```", text, flags=re.S) for line in block.splitlines()
    }
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in PAGES} - {"index"}
    assert pages - listed == set()
