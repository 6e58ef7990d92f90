"""The next run, as its choices determine it: its method and arguments, or the problems that prevent its start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from elakit.errors import ElakitError, PromptError, SettingError
from elakit.guidance import METHODS, Method, build
from elakit.guidance.layout import Layout
from elakit.widgets.live.choices import NUMBERS, PLAIN, Choices
from elakit.widgets.live.options import REGIONS

_HALVES = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))


def problems(choices: Choices) -> dict[str, ElakitError]:
    """Errors of the inputs that prevent the start of a run, by input; empty if the run can start.

    Parameters
    ----------
    choices : Choices

    Returns
    -------
    dict of str to ElakitError
        Keys are among "prompt", "seed", "steps", "guidance_scale", "options" and "regions", in this order.

    Examples
    --------
    >>> import elakit
    >>> prompt = elakit.parse("a [red car] and a [bird]", elakit.load("picture-world"))
    >>> choices = Choices(seed=-1, steps=4, guidance_scale=3.0).with_prompt(prompt).with_method("boxdiff")
    >>> for name, problem in problems(choices.with_region("car", (0, 0, 0.5, 1))).items():
    ...     print(f"{name}: {problem}")
    seed: seed=-1: must be a whole number from 0 to 9007199254740991.
    regions: boxdiff needs a region for each entity; missing: bird. Draw a box for ...
    """
    checks: dict[str, Callable[[], object]] = {
        "prompt": partial(_check_prompt, choices),
        **{name: partial(check, getattr(choices, name)) for name, check in NUMBERS.items()},
        "options": partial(_check_options, choices),
        "regions": partial(_check_regions, choices),
    }
    found: dict[str, ElakitError] = {}
    for name, check in checks.items():
        try:
            check()
        except ElakitError as error:
            found[name] = error
    return found


def call(choices: Choices) -> dict[str, Any]:
    """Arguments of `elakit.generate` for the next run, by name, without the pipeline.

    Parameters
    ----------
    choices : Choices

    Raises
    ------
    ElakitError
        The first of the `problems`.
    """
    for problem in problems(choices).values():
        raise problem
    numbers = {name: getattr(choices, name) for name in NUMBERS}
    return {"prompt": choices.prompt, "guidance": guidance(choices), **numbers}


def guidance(choices: Choices) -> Method | None:
    """The guidance method of the next run, with its options and regions; None for a plain run.

    Parameters
    ----------
    choices : Choices

    Raises
    ------
    SettingError
        An option is invalid, or the method needs regions and one is missing.
    """
    if choices.method == PLAIN:
        return None
    options = choices.options()
    _check_regions(choices)
    return _built(choices, options, choices.layout())


def guided_steps(choices: Choices) -> list[int]:
    """Steps that the method will guide, counted from 0; an empty list if the run is plain or a choice is invalid.

    Parameters
    ----------
    choices : Choices
    """
    try:
        method = guidance(choices)
        updates = method.plan([1.0] * choices.steps, choices.prompt) if method and choices.prompt else ()
    except ElakitError:
        return []
    return [step for step, update in enumerate(updates[: choices.steps]) if update.size or update.hold]


def _check_prompt(choices: Choices) -> None:
    if choices.prompt is None:
        raise choices.unreadable or PromptError(
            "There is no prompt yet: enter one, such as 'a red car and a blue bird'."
        )


def _check_options(choices: Choices) -> None:
    if choices.method != PLAIN:  # with regions that are valid, so that only the options can be refused
        _built(choices, choices.options(), _HALVES if choices.needs_regions else None)


def _check_regions(choices: Choices) -> None:
    missing = [label for label, region in choices.regions().items() if region is None]
    if choices.needs_regions and missing:
        raise SettingError(
            f"{choices.method} needs a region for each entity; missing: {', '.join(missing)}. "
            "Draw a box for each missing one on the image, or call panel.draw(entity, region)."
        )


def _built(choices: Choices, options: Mapping[str, Any], layout: Layout | None) -> Method:
    regions = {REGIONS: layout} if choices.takes_regions else {}
    method: Method = build(METHODS[choices.method], {**options, **regions})
    return method
