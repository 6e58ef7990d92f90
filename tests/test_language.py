# ruff: noqa: E501
"""Prose in code, pages and notebooks is standard technical English: patterns of the style page's "before" column.

The rules are in ``docs/developing/style.md``. A match is an error of the text; where a pattern matches correct English,
correct the pattern. ``python tests/test_language.py FILE...`` lists the matches in files (by default in all).
"""

from __future__ import annotations

import ast
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]


class Rule(NamedTuple):
    """A banned pattern, and what to write instead."""

    pattern: str
    instead: str
    where: str = "any"  # "any", "docstring" (its beginning) or "code" (all but pages and notebooks)
    flags: int = re.IGNORECASE
    paths: str = ""  # pattern of the files that the rule is for


# Words before "a(n)" that make the article mean "per": "one map an entity", "5 s an image", "rows a prompt".
_UNITS = (
    "entity|entities|prompt|step|image|run|layer|head|token|word|method|seed|row|line|chunk|core|pair|call|unit|side|"
    "second|minute|architecture|kind|size|batch|cause|failure|process|worker|page|figure|location|map|case|node|family"
)
_COUNTED = (
    "one|two|three|four|five|six|seven|eight|nine|ten|\\d+|map|row|column|file|mask|color|box|region|line|entry|value|"
    "number|list|name|image|seed|thread|process|page|bar|point|panel|dict|frame|answer|score|table|key|chunk|weight|"
    "trial|label|title|step|share|curve|index|pass|call|second|minute|ms|s|MB|KB"
)

RULES = [
    # spelling
    Rule(r"\b\w*(?:colour|grey(?!hound)|behaviour|neighbour|favour|honour)\w*", "American spelling: color, gray, behavior, neighbor"),
    Rule(r"\b\w*(?:local|binar|normal|real|recogn|visual|initial|optim|minim|maxim|general|organ|summar|emphas|serial|"
         r"quant|util|analog|character|regular|random|final|categor|special|standard|parallel|synchron|token|vector)is(?:e|es|ed|ing|ation|ations|er|able)\b",
         "American spelling: -ize"),
    Rule(r"\b(?:analys(?:e|ed|es(?= (?:the|a|an|it))|ing|er)|catalogue\w*|centre\w*|metre\w*|fibre\w*|artefact\w*|licence\w*|defence|offence|"
         r"programme\w*|cancell(?:ed|ing)|labell(?:ed|ing)|modell(?:ed|ing)|travell\w+|fulfil|whilst|amongst|towards|judgement\w*|learnt|"
         r"burnt|spelt|dreamt|ageing|sceptic\w*|aeroplane\w*)\b", "American spelling"),
    # word order and words of other languages
    Rule(r"\b(?:exists|is (?:a|an|being) \w+) already\b", "already exists, is already a ..."),
    Rule(r"(?<!there )\b(?:is|are) no (?:valid|entity|hybrid|method|predictor|error|guidance method)\b", "is not a ..."),
    Rule(r"\bwould pass (?:the|its) budget\b", "would exceed the budget"),
    Rule(r"\blikeliest\b", "most likely"),
    # numbers
    Rule(r"(?:\A|(?<=[0-9]))[ \u00a0]%(?=[\s.,;:)\"'|]|\Z)", "95%: no space before the percent sign"),
    Rule(r"\bsteps? \d+(?: of \d+)?,? counted from 0", "step 1 of 25: steps count from 1 in text"),
    # words of the former private dialect
    Rule(r"\bembedded (?:models?|judge)\b", "built-in model, built-in judge", paths=r"^(?!elakit/world|data)"),
    Rule(r"\bpictures?\b(?![- ]?world)", "image (picture only in the name picture-world)", paths=r"^(?!elakit/world/scenes)"),
    Rule(r"\bpictured?\b(?=s)|\bpictured\b", "image"),
    Rule(r"\bfor(?:e)?(?:tell|tells|told|telling|teller)\b(?<!\bfor)", "predict, prediction"),
    Rule(r"\b(?:un)?mend(?:s|ed|ing)?\b", "fix, fixed"),
    Rule(r"\b(?:un)?harm(?:s|ed)\b", "broken"),
    Rule(r"\banew\b", "again"),
    Rule(r"\bhow (?:un)?sure\b", "confidence, score"),
    Rule(r"\b\d+ ?% sure\b", "with a confidence of ..."),
    Rule(r"\bso (?:many|much)\b(?! (?:that|as|faster|smaller|larger|more|less|better|for)\b)", "a number: at most N, N times, how many"),
    Rule(r"\bthe manieth\b|\bmanieth\b", "n-th"),
    Rule(r"\b(?:a|an) (?:word|saying|say) on\b", "information on"),
    Rule(r"\b(?:is|are|was|were|be|been|being|has|have|had) told\b|\btold (?:of|in|as|by|with)\b|\btells (?:no|of|how sure)\b",
         "reported, named, described"),
    Rule(r"\bwell[- ]kept\b|\bkept well\b", "maintained"),
    Rule(r"\bgo(?:es|ne)? on with\b|\bgone on\b", "resumed, continued"),
    Rule(r"\bleft alone\b", "unchanged, not guided"),
    Rule(r"\bneeds? no(?:thing|body)\b(?= (?:but|else))", "requires only"),
    Rule(r"\b(?:nobody|no one) (?:asked|needs|uses|reads)\b", "passive voice: not requested, not needed"),
    Rule(r"\basked for no longer\b|\bas it should be\b|\bso it does\b|\bwithout further ado\b", "say it plainly"),
    Rule(r"\bat every door\b|\bunder way\b|\bby and by\b|\bhither\b|\bthither\b|\bthereof\b|\bwhereof\b|\bwherein\b|\btherein\b", "say it plainly"),
    Rule(r"\bit is said\b|\bis said\b|\bsays? so\b", "is stated, is reported"),
    Rule(r"\bwhat (?:is|was) drawn\b|\bdraw(?:s|n|ing)?\b (?:an |the |a |of |in |one |all |more |these |those |its |plain |guided )*(?:images?|pictures?|prompts?|runs?)\b",
         "generate, generated"),
    Rule(r"\b(?:images?|pictures?|prompts?|runs?|entit(?:y|ies)) (?:that )?(?:is|are|was|were|to be|being|been|has been|have been)(?: \w+)? drawn\b",
         "generated"),
    Rule(r"\b(?:drawn|draws|draw) (?:plainly|alone|anew|again|so|by the model)\b", "generated"),
    Rule(r"\bworkers? that draws?\b|\bprocesses that draw\b|\bwhose workers draw\b", "generate"),
    Rule(r"\bcells?\b(?<!notebook cell)(?<!notebook cells)(?<!table cell)(?<!table cells)(?<!code cell)(?<!code cells)(?! phone)",
         "location (map), patch (transformer); table cell, notebook cell", paths=r"^(?!tests/lab|tests/test_notebooks|benchmarks/notebooks)"),
    Rule(r"\b(?:drawn|draws|draw|drawing)\b(?! (?:from|at random|an? (?:box|line|region|figure|bar|curve)|the (?:box|line|region|figure|bar|curve)))",
         "generate, generated; sample (random numbers)", paths=r"^elakit/(?:sweep|diagnosis|causes|prediction|guidance|models|judge|attention|cli|generation|run|bleeding)"),
    # "a" in the sense of "per"
    Rule(rf"\b(?:{_COUNTED})s? an? (?:{_UNITS})\b(?! (?:of|that|is|has|in|at|with|from|to)\b)", "per, for each"),
    Rule(rf"\bone an? (?:guided |denoising )?(?:{_UNITS})\b", "one per ..."),
    Rule(r"\bone each\b", "one for each ..."),
    # fragments
    Rule(r"\A(?:Of|That|Such as|What|Which|Whether|Whose|As (?!a\b)|Else|Those|And|But|Or)\b", "a sentence or noun phrase that stands alone", "docstring", 0),
    Rule(r"(?:^|(?<=[.!?] ))Such as\b", "a full sentence: For example, ...", "any", re.MULTILINE),
    Rule(r"^ {4,}(?:Of|That|Those|Which|Whose|What|Else)\b (?!is (?:the|a|an)\b)", "a parameter's description is a noun phrase or sentence", "parameters", re.MULTILINE),
]  # fmt: skip


def code_prose(path: Path) -> Iterator[tuple[int, str, str]]:
    """Docstrings, comments and text of a Python file: (line, kind, text)."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {}
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for before, statement in zip([None, *body], body, strict=False):
            text = statement.value if isinstance(statement, ast.Expr) else None
            # of a module, class or function, or of the attribute above
            described = (isinstance(node, documented) and before is None) or isinstance(
                before, ast.Assign | ast.AnnAssign
            )
            if described and isinstance(text, ast.Constant) and isinstance(text.value, str):
                docstrings[id(text)] = text
    for text in docstrings.values():
        doc = "\n".join(line for line in without_examples(text.value))
        yield text.lineno, "docstring", doc.strip("\n")
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) and id(node) not in docstrings else None
        # text of several words, not keys, paths and code
        if isinstance(text, str) and re.search(r"[A-Za-z]{2,} [a-z]{2,}", text):
            yield node.lineno, "string", text
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not re.match(r"#\s*(?:noqa|type:|fmt:|mypy|!)", token.string):
            yield token.start[0], "comment", token.string.lstrip("# ")


def without_examples(doc: str) -> Iterator[str]:
    """Lines of a docstring, with those of its examples blank."""
    inside = False
    for line in doc.splitlines():
        inside = line.strip() != "" and (inside or line.strip().startswith(">>>"))
        yield "" if inside else re.sub(r"``.*?``|`[^`]*`", "`code`", line)


def page_prose(path: Path) -> Iterator[tuple[int, str, str]]:
    """Paragraphs of a Markdown page, without code: (line, kind, text)."""
    yield from markdown(path.read_text(encoding="utf-8"))


def notebook_prose(path: Path) -> Iterator[tuple[int, str, str]]:
    """Markdown and comments of a notebook: (cell, kind, text)."""
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield from ((number, kind, text) for _, kind, text in markdown(source))
        else:
            yield from ((number, "comment", found) for found in re.findall(r"^\s*#+ ?(.+)$", source, re.MULTILINE))


def markdown(text: str) -> Iterator[tuple[int, str, str]]:
    """Lines of Markdown outside code blocks, with code and addresses removed."""
    fenced = False
    for number, line in enumerate(text.splitlines(), start=1):
        if re.match(r"\s*(?:```|~~~)", line):
            # directives of MyST contain prose, code blocks do not
            fenced = not fenced and not re.match(r"\s*(?:```|:::)\{(?:glossary|note|tip|warning|admonition)", line)
            continue
        if not fenced:
            yield number, "page", re.sub(r"`[^`]*`|\]\([^)]*\)|https?://\S+|<[^>]+>", " `code` ", line)


def prose(path: Path) -> Iterator[tuple[int, str, str]]:
    """All prose of a file."""
    readers = {".py": code_prose, ".pyi": code_prose, ".md": page_prose, ".ipynb": notebook_prose}
    return readers[path.suffix](path)


@lru_cache(maxsize=1)
def files() -> list[Path]:
    """Files whose prose is checked: all but this one and the style page, which quote what is wrong."""
    patterns = ["elakit/**/*.py", "tests/**/*.py", "benchmarks/**/*.py", "docs/**/*.md", "*.md", "notebooks/*.ipynb"]
    found = {path for pattern in patterns for path in ROOT.glob(pattern)}
    exempt = {Path(__file__), ROOT / "docs" / "developing" / "style.md"}
    return sorted(
        p for p in found - exempt if not {"_build", "jupyter_execute", "_notebooks", "generated"} & set(p.parts)
    )


def matches(path: Path) -> list[str]:
    """Banned patterns in a file: where, what, and what to write instead."""
    found = []
    for line, kind, text in prose(path):
        for rule in RULES:
            if not re.search(rule.paths, path.relative_to(ROOT).as_posix()):
                continue
            if rule.where != "any" and kind != "docstring":
                continue
            if rule.where == "parameters" and "----" not in text:
                continue
            for match in re.finditer(rule.pattern, text, rule.flags):
                at = line + text.count("\n", 0, match.start()) if kind == "docstring" else line
                found.append(f"{path.relative_to(ROOT)}:{at}: {match[0].strip()!r} in a {kind}: {rule.instead}")
    return found


def package(path: Path) -> str:
    """First two folders of a file: "elakit/models", "docs/howto", or "" for a page of the repository."""
    return "/".join(path.relative_to(ROOT).parent.parts[:2])


@pytest.mark.parametrize("folder", sorted({package(path) for path in files()}))
def test_prose_is_standard_technical_english(folder: str) -> None:
    found = [match for path in files() if package(path) == folder for match in matches(path)]
    assert not found, "\n" + "\n".join(found)


def test_the_patterns_match_what_the_style_page_bans() -> None:
    banned = [
        "Of the run.",
        "That is generated.",
        "One map an entity.",
        "every so manieth step",
        "A failure foretold.",
        "the picture",
        "How sure the judge is",
        "mended",
        "The cells of the map",
        "The centre's colour",
        "so many steps",
        "95 % interval",
        "at step 4 of 25, counted from 0",
        "the embedded judge",
    ]
    for text in banned:
        assert any(re.search(rule.pattern, text, rule.flags) for rule in RULES), text
    good = [
        "One map per entity.",
        "The picture-world model",
        "so that",
        "A mask of the image.",
        "size of a map",
        "so many that",
        "95% interval",
        "at step 5 of 25",
    ]
    for text in good:
        assert not any(re.search(rule.pattern, text, rule.flags) for rule in RULES if not rule.paths), text


def test_widgets_and_reports_write_percentages_like_the_rest() -> None:
    shown = [path for kind in ("js", "jinja") for path in (ROOT / "elakit").rglob(f"*.{kind}")]
    assert len(shown) > 5
    for path in shown:
        spaced = re.findall(r".*[0-9}] %(?=[\s.,;)\"`<]).*", path.read_text(encoding="utf-8"))
        assert not spaced, f"{path.name}: no space before the percent sign: {spaced}"


if __name__ == "__main__":
    asked = [Path(name).resolve() for name in sys.argv[1:]] or files()
    print("\n".join(match for path in asked for match in matches(path)))
