"""Losses and gradients equal those that the authors' released code gives on the same attention tensors.

The tensors and values in ``tests/data/parity`` were computed in float64 with the loss functions of the official
repositories (commits in its README); nothing of their code is used here.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from elakit import guidance
from elakit.guidance import initno
from elakit.guidance.method import Attention
from elakit.prompt import Entity, Prompt, Token

DATA = Path(__file__).parents[1] / "data" / "parity"
REFERENCE = json.loads((DATA / "reference.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-6  # relative
CROSS16, SELF16 = ("cross_2_down16", "cross_4_up16"), ("self_down16", "self_up16")
BEFORE = ("before_2_down16", "before_4_up16")
FINE = ("cross_0_down64", "cross_1_down32", "cross_2_down16", "cross_4_up16", "cross_5_up32")
STEPS = 50


def prompt_of(case: dict[str, Any]) -> Prompt:
    tokens = [
        Token(index, word, word if len(indices) == 1 else f"{word}/{piece}", number)
        for number, (word, indices) in enumerate(case["words"])
        for piece, index in enumerate(indices, start=1)
    ]
    entities = []
    for entity in case["entities"]:
        noun, indices = case["words"][entity["noun"]]
        attributes = [case["words"][number] for number in entity["attributes"]]
        entities.append(
            Entity(
                text=" ".join([*(word for word, _ in attributes), noun]),
                noun=noun,
                attributes=tuple(word for word, _ in attributes),
                token_indices=tuple(indices),
                attribute_indices=tuple(index for _, pieces in attributes for index in pieces),
                label=noun,
            )
        )
    return Prompt(case["prompt"], tuple(entities), tuple(tokens), max(t.index for t in tokens) + 1, REFERENCE["tokens"])


@cache
def arrays(case: int) -> dict[str, np.ndarray]:
    with np.load(DATA / f"case{case}.npz") as stored:
        return {name: stored[name].astype(np.float64) for name in stored}


def read(leaves: dict[str, Tensor]) -> Attention:
    """The input of a method: cross-attention maps, and self-attention as (head, y, x, y, x)."""
    own = tuple(leaf.unflatten(1, (16, 16)).unflatten(3, (16, 16)) for name, leaf in leaves.items() if "self" in name)
    return Attention(tuple(leaf for name, leaf in leaves.items() if "self" not in name), own)


def boxes(note: str) -> Any:
    return ast.literal_eval(note[note.index("[") : note.index("]") + 1])


def conform_state(prompt: Prompt, case: int) -> Any:
    method = guidance.CONFORM()
    state = method.begin(prompt, STEPS)
    method.loss(read({name: torch.from_numpy(arrays(case)[name]) for name in BEFORE}), prompt, 0, state)
    return state


def total(method: Any, step: int = 0) -> Callable[[Attention, Prompt, int], Tensor]:
    return lambda seen, prompt, case: method.loss(seen, prompt, step, method.begin(prompt, STEPS)).total


def overlap_alone(method: Any) -> Callable[[Attention, Prompt, int], Tensor]:
    """The self-cross term: what the loss gains from it."""
    without = guidance.SelfCross(top=method.top, weight=0)
    return lambda seen, prompt, case: total(method)(seen, prompt, case) - total(without)(seen, prompt, case)


def computed(row: dict[str, Any]) -> tuple[Callable[[Attention, Prompt, int], Tensor], tuple[str, ...]]:
    """How elakit computes a row of the reference, and the tensors whose gradients the row gives."""
    method, note = row["method"], row["note"]
    if method == "attend-and-excite":
        return total(guidance.AttendAndExcite(normalize_eot="normalize_eot" in note)), CROSS16
    if method == "syngen":
        return total(guidance.SynGen(lone_nouns="include_entities" in note)), CROSS16
    if method == "ebama":
        return total(guidance.EBAMA()), CROSS16
    if method == "conform":
        if "before" not in note:
            return total(guidance.CONFORM()), CROSS16
        return (
            lambda seen, prompt, case: guidance.CONFORM().loss(seen, prompt, 1, conform_state(prompt, case)).total
        ), CROSS16
    if method == "initno":
        term = next(name for name in ("search", "cross", "conflict") if name in note.split()[0])
        if term == "search":
            return lambda seen, prompt, case: initno._scores(seen, prompt).objective(), CROSS16 + SELF16
        return lambda seen, prompt, case: getattr(initno._scores(seen, prompt), term), CROSS16 + SELF16
    if method == "self-cross":
        self_cross = guidance.SelfCross(top=int(note.split(":")[0].removeprefix("K=")))
        return (overlap_alone if "alone" in note else total)(self_cross), CROSS16 + SELF16
    if method == "boxdiff":
        return total(guidance.BoxDiff(boxes(note))), CROSS16
    if method == "layout-guidance":
        return total(guidance.LayoutGuidance(boxes(note))), ("cross_3_mid8", "cross_4_up16")
    variation = "released" if "released" in note else "repaired"
    return total(guidance.DivideAndBind(variation=variation), int(note.split(",")[0].removeprefix("step "))), FINE


def test_every_method_with_public_code_is_compared() -> None:
    assert {row["method"] for row in REFERENCE["rows"]} == {
        "attend-and-excite", "boxdiff", "conform", "divide-and-bind", "ebama", "initno", "layout-guidance",
        "self-cross", "syngen",
    }  # fmt: skip


@pytest.mark.parametrize("row", REFERENCE["rows"], ids=lambda row: f"{row['method']}-{row['case']}-{row['note'][:24]}")
def test_loss_and_gradient_are_those_of_the_released_code(row: dict[str, Any]) -> None:
    function, names = computed(row)
    prompt = prompt_of(REFERENCE["cases"][row["case"]])
    leaves = {name: torch.from_numpy(arrays(row["case"])[name]).requires_grad_() for name in names}
    loss = function(read(leaves), prompt, row["case"])
    assert loss.item() == pytest.approx(row["loss"], rel=TOLERANCE)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for name, gradient, reference in zip(leaves, gradients, row["grad"], strict=True):
        if reference is None:
            assert gradient is None or not gradient.any(), name
            continue
        norm, largest, every_97th = reference
        assert gradient is not None, name
        assert gradient.norm().item() == pytest.approx(norm, rel=TOLERANCE), name
        assert gradient.abs().max().item() == pytest.approx(largest, rel=TOLERANCE), name
        assert gradient.flatten()[::97].sum().item() == pytest.approx(every_97th, abs=TOLERANCE * norm), name
