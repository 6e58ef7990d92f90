"""What a sweep is made of: a unit is one prompt drawn by one method from a few seeds."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from elakit.errors import SettingError
from elakit.guidance import METHODS, Method, build, method_options
from elakit.guidance.metadata import options_of

PLAIN = "plain"
# Options beside a method's own: guide only images whose probability of failure, predicted by the shipped predictor
# after `guide_after` of the steps (default .2), is above `guide_above`.
ONLY_IF = ("guide_above", "guide_after")


@dataclass(frozen=True)
class Unit:
    """One prompt, drawn by one method from some seeds in one batch: what a worker is given.

    Attributes
    ----------
    model : str
        As `elakit.load` takes it.
    prompt : str
    seeds : tuple of int
    method : str
        "plain", or a name in `elakit.guidance.METHODS`.
    options : str
        All of the method's options, those by default too, as canonical JSON: a default that changes makes another unit.
    steps, guidance_scale : optional
        None leaves them to the model.
    suite : str
        Where the prompt is from.
    device, dtype : str, optional
        As `elakit.load` takes them.
    detector : str, optional
        As `elakit.judge.detectors.load_detector` takes it; None: the embedded judge.

    Examples
    --------
    >>> unit = Unit("picture-world", "a cat and a lion", (1, 3))
    >>> unit.key == Unit("picture-world", "a cat and a lion", (1, 3)).key, len(unit.key)
    (True, 16)
    """

    model: str
    prompt: str
    seeds: tuple[int, ...]
    method: str = PLAIN
    options: str = "{}"
    steps: int | None = None
    guidance_scale: float | None = None
    suite: str = ""
    device: str | None = None
    dtype: str | None = None
    detector: str | None = None

    @property
    def key(self) -> str:
        """Name of the unit in its folder: equal for equal units, in every process and on every machine."""
        return hashlib.sha256(canonical(asdict(self)).encode()).hexdigest()[:16]

    def labels(self) -> dict[str, Any]:
        """The columns of its rows that are known before it is drawn: all fields but the seeds, and the key."""
        return {name: value for name, value in asdict(self).items() if name != "seeds"} | {"key": self.key}

    def guidance(self) -> Method | None:
        """Its method with its options; None where it is drawn plainly."""
        if self.method == PLAIN:
            return None
        options = json.loads(self.options)
        return _build(self.method, {name: value for name, value in options.items() if name not in ONLY_IF})

    def only_if(self) -> dict[str, float] | None:
        """`above` and `after` of `elakit.prediction.Predictor.guide_if`; None where every image is guided."""
        options = json.loads(self.options)
        return {name.removeprefix("guide_"): options[name] for name in ONLY_IF} if ONLY_IF[0] in options else None


def canonical(value: Any) -> str:
    """JSON that is the same for equal values, whatever the order of their keys.

    Examples
    --------
    >>> canonical({"b": (1, 2), "a": None})
    '{"a":null,"b":[1,2]}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def settle(method: str, options: Mapping[str, Any]) -> str:
    """A method's options, those by default too, as canonical JSON.

    Parameters
    ----------
    method : str
    options : mapping of str
        Those that are not left at their defaults, and those of `ONLY_IF`.

    Raises
    ------
    SettingError
        The method is unknown or needs regions, it has no such option, or the value is refused.

    Examples
    --------
    >>> settle("ela", {}) == settle("ela", {"anchor.step_size": 0.1}), settle("plain", {})
    (True, '{}')
    >>> settle("ela", {"alpha": 1})
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: ELA has no option 'alpha'. It has localize.differentiation, ...
    """
    if method == PLAIN:
        if options:
            raise SettingError(f"plain has no options, but {', '.join(options)} is given; set those of a method.")
        return "{}"
    if method in METHODS and method not in sweepable():
        raise SettingError(
            f"{method} needs regions, one for each entity, and a suite of prompts has none. Draw it with "
            f"elakit.generate, or choose from {', '.join(sweepable())}."
        )
    if method not in METHODS:
        raise SettingError(f"There is no method {method!r}. Choose from {', '.join(sweepable())}.")
    only_if = _only_if(method, options)
    options = {name: value for name, value in options.items() if name not in ONLY_IF}
    defaults = {option.name: option.default for option in method_options(METHODS[method])}
    # 1 and 1.0 are the same setting, and must make the same key
    given = {
        name: float(value) if isinstance(defaults.get(name), float) and type(value) is int else value
        for name, value in options.items()
    }
    try:
        text = canonical(options_of(build(METHODS[method], given)))
        # a worker builds the method from this text, so what JSON cannot hold is refused here
        unchanged = canonical(options_of(_build(method, json.loads(text)))) == text
    except SettingError:
        raise
    except (TypeError, ValueError) as error:
        raise SettingError(f"{method}: the options {dict(options)} are refused: {error}.") from error
    if not unchanged:
        raise SettingError(
            f"{method}: the options {dict(options)} cannot be kept as JSON; use numbers, text and lists."
        )
    return canonical(json.loads(text) | only_if)


def _only_if(method: str, options: Mapping[str, Any]) -> dict[str, float]:
    """The options of `ONLY_IF`, both or none of them."""
    given = {name: options[name] for name in ONLY_IF if name in options}
    if not given:
        return {}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise SettingError(f"{method}.{name}={value!r}: give a number from 0 to 1.")
    if ONLY_IF[0] not in given:
        raise SettingError(f"{method}.{ONLY_IF[1]} says when to ask; give {method}.{ONLY_IF[0]} too, such as 0.2.")
    return {ONLY_IF[1]: 0.2} | {name: float(value) for name, value in given.items()}


def plan(
    prompts: Sequence[str] | Mapping[str, Sequence[str]],
    seeds: Iterable[int],
    methods: Iterable[str | tuple[str, Mapping[str, Any]]] = (PLAIN, "ela"),
    *,
    model: str = "picture-world",
    steps: int | None = None,
    guidance_scale: float | None = None,
    device: str | None = None,
    dtype: str | None = None,
    detector: str | None = None,
    batch: int | None = None,
) -> list[Unit]:
    """The units of a sweep, prompt by prompt, so that what is there of one that goes on compares the methods already.

    Parameters
    ----------
    prompts : sequence of str, or mapping of str to sequence of str
        Those of each suite; prompts alone are of the suite "".
    seeds : iterable of int
        Each once.
    methods : iterable of str or (str, mapping)
        "plain", and names in `elakit.guidance.METHODS`, with their options. Leave plain in: the others are compared
        to it.
    model, steps, guidance_scale, device, dtype, detector
        As in `Unit`.
    batch : int, optional
        Most seeds drawn at a time; by default all of them.

    Returns
    -------
    list of Unit
        Each once.

    Raises
    ------
    SettingError
        No prompt, seed or method; a seed given twice; a number outside its range; what `settle` refuses.

    Examples
    --------
    >>> units = plan(["a cat and a lion"], [1, 3], ["plain", ("ela", {"anchor.step_size": 0.2})])
    >>> [(unit.method, unit.seeds) for unit in units]
    [('plain', (1, 3)), ('ela', (1, 3))]
    """
    suites = dict(prompts) if isinstance(prompts, Mapping) else {"": prompts}
    if not any(suites.values()):
        raise SettingError("There is no prompt to draw; name a suite or give prompts.")
    numbers = sorted(int(seed) for seed in seeds)
    if not numbers or numbers[0] < 0 or len(set(numbers)) < len(numbers):
        raise SettingError(f"seeds={numbers}: give one or more whole numbers of 0 or more, each once.")
    if steps is not None and steps < 1:
        raise SettingError(f"steps={steps}: must be 1 or more.")
    if guidance_scale is not None and not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise SettingError(f"guidance_scale={guidance_scale}: must be a number of 0 or more.")
    if batch is not None and batch < 1:
        raise SettingError(f"batch={batch}: must be 1 seed or more.")
    pairs: list[tuple[str, Mapping[str, Any]]] = [(one, {}) if isinstance(one, str) else one for one in methods]
    settled = [(name, settle(name, options)) for name, options in pairs]
    if not settled:
        raise SettingError(f"There is no method to draw by. Choose from {', '.join(sweepable())}.")
    size = batch or len(numbers)
    batches = [tuple(numbers[i : i + size]) for i in range(0, len(numbers), size)]
    scale = None if guidance_scale is None else float(guidance_scale)
    units = [
        Unit(model, prompt, some, name, options, steps, scale, suite, device, dtype, detector)
        for suite, texts in suites.items()
        for prompt in texts
        for some in batches
        for name, options in settled
    ]
    return list(dict.fromkeys(units))


def sweepable() -> list[str]:
    """The methods that a sweep can draw by: plain, and those that need no option, such as a region an entity.

    Examples
    --------
    >>> sweepable()[0], "ela" in sweepable()
    ('plain', True)
    """
    return [PLAIN, *(name for name, kind in METHODS.items() if not kind.needs_regions)]


def _build(method: str, options: Mapping[str, Any]) -> Method:
    """A method of options that were JSON; those that are as by default keep the types JSON cannot hold."""
    usual = json.loads(canonical(options_of(METHODS[method]())))
    changed = {name: _tuples(value) for name, value in options.items() if name not in usual or value != usual[name]}
    made: Method = build(METHODS[method], changed)
    return made


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
