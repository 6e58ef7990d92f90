"""Preparation of the next run: its arguments from the user's choices, or the errors that prevent its start."""

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
    """Errors that prevent the start of the next run, by name of the invalid choice.

    Parameters
    ----------
    choices : Choices
        The user's choices.

    Returns
    -------
    dict of str to ElakitError
        One error per invalid choice; empty if the run can start. Possible keys are "prompt", "seed", "steps",
        "guidance_scale", "options" and "regions", in this order.

    Examples
    --------
    The seed is negative, and the method needs a region for the bird, too:

    >>> import elakit
    >>> prompt = elakit.parse("a [red car] and a [bird]", elakit.load("picture-world"))
    >>> choices = Choices(seed=-1, steps=4, guidance_scale=3.0).with_prompt(prompt).with_method("boxdiff")
    >>> for name, problem in problems(choices.with_region("car", (0, 0, 0.5, 1))).items():
    ...     print(f"{name}: {problem}")
    seed: seed=-1: must be a whole number from 0 to 9007199254740991.
    regions: boxdiff needs a region for each entity; bird has none. Draw each missing region ...
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
    """Arguments of `elakit.generate` for the next run, by name of the argument. The pipeline is not included.

    Parameters
    ----------
    choices : Choices
        The user's choices.

    Raises
    ------
    ElakitError
        A choice is invalid. If several choices are invalid, the first error of `problems` is raised.
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
        The user's choices.

    Raises
    ------
    SettingError
        An option is invalid, or an entity has no region although the method needs a region for each entity.
    """
    if choices.method == PLAIN:
        return None
    options = choices.options()
    _check_regions(choices)
    return _built(choices, options, choices.layout())


def guided_steps(choices: Choices) -> list[int]:
    """Indices of the steps that the guidance method will guide in the next run, counted from 0.

    The list is empty if the run is plain or a choice is invalid.

    Parameters
    ----------
    choices : Choices
        The user's choices.
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
        has = "has" if len(missing) == 1 else "have"
        raise SettingError(
            f"{choices.method} needs a region for each entity; {', '.join(missing)} {has} none. Draw each missing "
            "region on the image, or call panel.draw(entity, region)."
        )


def _built(choices: Choices, options: Mapping[str, Any], layout: Layout | None) -> Method:
    regions = {REGIONS: layout} if choices.takes_regions else {}
    method: Method = build(METHODS[choices.method], {**options, **regions})
    return method
