"""Shares of right, fixed and broken images in the verdicts that the authors of Self-Cross guidance published.

Their repository has the answers of GPT-4o to questions about each image of Stable Diffusion 1.4, with and without
guidance, for the prompts of Attend-and-Excite and 65 seeds (Qiu et al., CVPR 2025, arXiv:2411.18936)::

    git clone https://github.com/mengtang-lab/selfcross-guidance work/selfcross
    git -C work/selfcross checkout 9e54e74206ad7cbaeedfecd168355a032a2cc586
    python -m benchmarks.self_cross_verdicts work/selfcross > data/published/self-cross-verdicts.csv

The definitions are those of `docs/evidence.md`. An image is right if both entities appear, the answer to each question
about an attribute is yes, and the image shows no mixture of both. Whether an entity is well formed is not counted.
"Fixed" and "broken" compare images of one prompt and one seed with and without guidance. Intervals are 95% bootstrap
intervals over prompts. Images for which the answer to any question is missing are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
import yaml

from elakit.errors import SettingError
from elakit.statistics import bootstrap

FOLDERS = {
    "plain": ("sd1", "sd"),
    "CONFORM": ("conform_sd1", "conform"),
    "InitNO": ("initno_sd1", "initno"),
    "InitNO + Self-Cross": ("initno+selfcross_sd1", "selfcross"),
}
# file name and questions about attributes; with an animal, the object's color, or whether the animal wears the object
GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "animals": ("animal-animal", ()),
    "animals-objects": ("animal-object", ("attribute",)),
    "objects": ("object-object", ("A_attribute", "B_attribute")),
}


def outcome(answers: dict[str, bool], attributes: tuple[str, ...]) -> dict[str, bool] | None:
    """Outcome of one image, or None if an answer is missing.

    Parameters
    ----------
    answers : dict
        Answer to each question, by its name.
    attributes : tuple of str
        Names of the questions about attributes; the answer to each must be yes.

    Examples
    --------
    >>> answers = {"A_appear": True, "B_appear": True, "content_mixture": False, "attribute": False}
    >>> outcome(answers, ("attribute",))
    {'right': False, 'neglect': False, 'mixture': False, 'wrong_attribute': True}
    """
    asked = ("A_appear", "B_appear", "content_mixture", *attributes)
    if any(answers.get(question) is None for question in asked):
        return None
    present = answers["A_appear"] and answers["B_appear"]
    agree = all(answers[question] for question in attributes)
    return {
        "right": present and agree and not answers["content_mixture"],
        "neglect": not present,
        "mixture": answers["content_mixture"],
        "wrong_attribute": present and not agree,
    }


def read(folder: Path) -> pd.DataFrame:
    """Outcomes of all images, one row per image.

    The column plain_right states whether the image without guidance of the same prompt and seed is right.

    Parameters
    ----------
    folder : Path
        Clone of the authors' repository.

    Raises
    ------
    SettingError
        Raised when a file of verdicts is missing.
    """
    rows: list[dict[str, Any]] = []
    for method, (name, prefix) in FOLDERS.items():
        for group, (kind, attributes) in GROUPS.items():
            path = folder / "eval_results" / name / f"{prefix}_{kind}.yaml"
            if not path.is_file():
                raise SettingError(f"There is no file {path}: give the folder of a clone of selfcross-guidance.")
            loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
            for key, answers in yaml.load(path.read_text(encoding="utf-8"), Loader=loader).items():
                prompt, _, seed = key.rpartition("_")
                if found := outcome(answers, attributes):
                    rows.append({"method": method, "group": group, "prompt": prompt, "seed": int(seed), **found})
    table = pd.DataFrame(rows)
    key = ["group", "prompt", "seed"]
    plain = table[table["method"] == "plain"].set_index(key)["right"].rename("plain_right")
    return table.join(plain, on=key, how="inner").astype({"plain_right": bool})


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Shares by method, for each group of prompts and for all of them, with intervals of right, fixed and broken.

    Parameters
    ----------
    table : DataFrame
        Outcomes from `read`.
    """
    rows = []
    for group in (*GROUPS, "all"):
        of_group = table if group == "all" else table[table["group"] == group]
        for method in FOLDERS:
            part = of_group[of_group["method"] == method]
            labels = part["group"] + " " + part["prompt"]
            before, now = part["plain_right"], part["right"]
            shares = {"right": (now, before | True)}
            if method != "plain":
                shares |= {"fixed": (now & ~before, ~before), "broken": (~now & before, before)}
            row: dict[str, Any] = {"group": group, "method": method, "prompts": labels.nunique(), "images": len(part)}
            for name in ("right", "fixed", "broken"):
                ends = bootstrap(*shares[name], groups=labels) if name in shares else (None, None, None)
                row |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
            rows.append(row | {name: part[name].mean() for name in ("neglect", "mixture", "wrong_attribute")})
    return pd.DataFrame(rows)


def main(folder: Annotated[Path, typer.Argument(help="Clone of the authors' repository.")]) -> None:
    """Print the table as CSV."""
    print(summary(read(folder)).to_csv(index=False, float_format="%.3f"), end="")


if __name__ == "__main__":
    typer.run(main)
