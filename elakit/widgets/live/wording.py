"""Texts that a panel shows about its choices and its run: status line, hints about regions, errors."""

from __future__ import annotations

from typing import Any

from elakit.errors import ElakitError
from elakit.guidance import METHODS, method_title
from elakit.widgets.live import next_run
from elakit.widgets.live.choices import PLAIN, Choices
from elakit.widgets.live.run_state import RunState, State

_STATUS: dict[State, str] = {
    "idle": "",
    "running": "Generating…",
    "paused": "Paused: regions can be drawn or moved now.",
    "done": "Done.",
    "canceled": "Canceled; the partial run is kept.",
    "failed": "Failed; the partial run is kept.",
}


def status(now: RunState) -> str:
    """Status line of the panel for the state of a run; "" before the first run.

    Examples
    --------
    >>> status(RunState().start())
    'Generating…'
    """
    if now.state == "failed" and now.run is None:
        return "Failed; no partial run could be kept."
    preview = "" if now.no_preview is None else f" No preview could be shown: {now.no_preview}"
    return _STATUS[now.state] + preview


def message(error: Exception | None) -> str:
    """Text of an error as the panel shows it; "" if there is no error.

    The text begins with the name of the error's class, except for an `ElakitError`.

    Examples
    --------
    >>> message(MemoryError("out of memory"))
    'MemoryError: out of memory'
    """
    kind = "" if error is None or isinstance(error, ElakitError) else f"{type(error).__name__}: "
    return "" if error is None else f"{kind}{error}"


def guidance(choices: Choices, now: RunState) -> dict[str, Any]:
    """Data on the chosen guidance method that the widget `Stage` shows, as a dict for `Stage.guide`.

    Parameters
    ----------
    choices : Choices
        The user's choices, among them the method and the number of steps.
    now : RunState
        State of the current or the last run.

    Returns
    -------
    dict
        "takes" is True if the method can use regions given by hand. "needs" is True if the method needs a region given
        by hand for each entity. "note" is a hint on the use of regions, as `note` returns it. "quiet" is the text that
        the widget shows as long as the run has no loss. "guided" lists the steps that the method guides,
        counted from 0. "steps" is the number of all steps. "state" is the name of the run's state, such as "running".

    Examples
    --------
    >>> shown = guidance(Choices(seed=0, steps=4, guidance_scale=3.0), RunState())  # plain, and before the first run
    >>> shown["takes"], shown["guided"], shown["state"]
    (False, [], 'idle')
    """
    guided = next_run.guided_steps(choices)
    return {
        "takes": choices.takes_regions,
        "needs": choices.needs_regions,
        "note": note(choices, now, guided),
        "quiet": "A plain run has no loss." if choices.method == PLAIN else "No guided step yet.",
        "guided": guided,
        "steps": choices.steps,
        "state": now.state,
    }


def note(choices: Choices, now: RunState, guided: list[int]) -> str:
    """Hint on how the chosen method uses regions given by hand; "" if no hint is needed.

    Parameters
    ----------
    choices : Choices
        The user's choices, among them the method.
    now : RunState
        State of the current or the last run.
    guided : list of int
        Steps that the method guides, counted from 0, as `elakit.widgets.live.next_run.guided_steps` returns them.
    """
    name = method_title(choices.method)
    if not choices.takes_regions:
        able = [method_title(each) for each in METHODS if METHODS[each].takes_regions]
        who = "A plain run" if choices.method == PLAIN else name
        return f"{who} takes no regions. Methods with regions: {', '.join(able)}."
    if not now.going:
        if choices.needs_regions:
            return f"{name} needs a region for each entity."
        alone = choices.prompt is not None and len(choices.prompt.entities) == 1 and choices.layout() is None
        return f"{name} does not guide a single entity unless its region is drawn." if alone else ""
    if not METHODS[choices.method].steerable:
        return f"{name} keeps the regions it started with: changes apply from the next run on."
    if not guided or now.made > guided[-1]:
        return "The guided steps of this run are over: changes apply from the next run on."
    return "Changes apply from the next guided step on."
