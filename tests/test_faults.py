"""Faults that were once found from outside: each has tests, by the number of its case.

The cases are inputs that failed at an earlier time; docs/developing/faults.md describes them in a line each.
"""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "developing" / "faults.md"
CASES = range(1, 55)


@lru_cache
def rows() -> dict[int, list[str]]:
    """Tests of each case in the table of the page, as FILE::TEST below the folder of tests."""
    found = re.findall(r"^\| (\d+) \|[^|]+\|[^|]+\| ([^|]+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert found
    assert len({number for number, _ in found}) == len(found)
    return {int(number): re.findall(r"`([^`]+)`", tests) for number, tests in found}


@lru_cache
def functions(path: Path) -> set[str]:
    """Names of the tests of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_case_has_tests() -> None:
    assert list(rows()) == list(CASES)
    assert all(rows().values())


@pytest.mark.parametrize("number", CASES)
def test_the_tests_of_a_case_exist(number: int) -> None:
    for test in rows()[number]:
        name, _, function = test.partition("::")
        assert function in functions(TESTS / name), test


def test_the_readme_states_its_source_and_what_was_not_measured() -> None:
    text = " ".join((TESTS.parent / "README.md").read_text(encoding="utf-8").split())
    assert "ICML 2024, PMLR 235" in text
    assert "No real checkpoint has been measured" in text
    assert "step sizes of the rivals are those that their authors chose on Stable Diffusion" in text
    assert 'elakit diagnose "a green apple and a red car"' in text  # swapped colors in plain images
    assert "the extra `fit` installs" in text


@pytest.mark.integration
def test_the_readmes_example_is_wrong_when_plain_and_right_with_ela() -> None:
    import elakit

    text = (TESTS.parent / "README.md").read_text(encoding="utf-8")
    prompt = re.search(r'prompt = elakit.parse\("(.+)", pipe\)', text)[1]
    seeds = {int(seed) for seed in re.findall(r"pipe, prompt, seed=(\d+)", text)}
    assert f'elakit diagnose "{prompt}"' in text
    pipe = elakit.load("picture-world")
    for seed in seeds:
        plain, ela = (
            elakit.generate(pipe, prompt, seed=seed, guidance=guidance, record=False, progress=False)
            for guidance in (None, elakit.ELA())
        )
        assert not plain.verdict.success
        assert ela.verdict.success
