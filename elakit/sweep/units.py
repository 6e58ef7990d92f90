"""Units of a sweep. A unit consists of one prompt, one method and a batch of seeds, and has one image per seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from elakit import checks
from elakit.errors import SettingError
from elakit.seeds import seed_list
from elakit.sweep.options import CONDITION, PLAIN, build_method, canonical, canonical_options, sweepable

if TYPE_CHECKING:
    from elakit.guidance import Method

# Settings that are part of a unit's key only where they are set, so that sweeps of earlier releases are resumed.
OPTIONAL = ("negative_prompt", "height", "width", "scheduler", "lora", "variant")
MAX_STEPS = 1000  # training steps of the schedulers in diffusers


@dataclass(frozen=True)
class Unit:
    """The smallest part of a sweep that is stored: one prompt, one method with its options, and a batch of seeds.

    A unit has one image per seed.

    Attributes
    ----------
    model : str
        Model name or folder, as in `elakit.load`.
    prompt : str
        Prompt of all images of the unit.
    seeds : tuple of int
        Seeds of the initial noise, one per image.
    method : str
        Name of the guidance method, a key of `elakit.guidance.METHODS`; "plain" for no method.
    options : str
        All options of the method as JSON text, as `elakit.sweep.options.canonical_options` returns them. The text also
        contains the default values. If a later release changes a default value, the unit therefore gets another `key`
        and is generated again.
    steps : int, optional
        Number of denoising steps; None stands for the model's default.
    guidance_scale : float, optional
        Scale of classifier-free guidance; None stands for the model's default.
    suite : str
        Name of the suite that the prompt belongs to.
    device : str, optional
        Device as in `elakit.load`. The device is not part of `key`, so a unit may be generated on any machine.
    dtype : str, optional
        Data type as in `elakit.load`.
    detector : str, optional
        Name of the detector that judges the images, as in `elakit.judge.detectors.load_detector`. None stands for the
        built-in judge.
    negative_prompt : str, optional
        Negative prompt, as in `elakit.generate`.
    height, width : int, optional
        Size of the images in pixels; None stands for the model's default.
    scheduler, lora, variant : str, optional
        As in `elakit.load`.

    Examples
    --------
    The key is a hash of 16 digits. A unit with another device has the same key:

    >>> unit = Unit("picture-world", "a cat and a lion", (1, 3))
    >>> unit.key == Unit("picture-world", "a cat and a lion", (1, 3), device="cuda").key, len(unit.key)
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
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    scheduler: str | None = None
    lora: str | None = None
    variant: str | None = None

    @property
    def key(self) -> str:
        """Key of the unit, after which the unit's files are named: a hash with 16 hexadecimal digits.

        The hash includes all fields except the device, so the key is the same on every machine. The fields
        negative_prompt, height, width, scheduler, lora and variant are included only if they are not None.
        """
        identity = {
            name: value
            for name, value in asdict(self).items()
            if name != "device" and not (name in OPTIONAL and value is None)
        }
        return hashlib.sha256(canonical(identity).encode()).hexdigest()[:16]

    def labels(self) -> dict[str, Any]:
        """Values that are the same in all rows of the unit, by column: the key, and all fields except the seeds."""
        return {name: value for name, value in asdict(self).items() if name != "seeds"} | {"key": self.key}

    def loading(self) -> dict[str, Any]:
        """Keyword arguments with which `elakit.load` loads the model: device, dtype, variant, scheduler and lora."""
        return {name: getattr(self, name) for name in ("device", "dtype", "variant", "scheduler", "lora")}

    def generation(self) -> dict[str, Any]:
        """Settings of the unit that `elakit.generate` and `elakit.diagnose` take as keyword arguments.

        The settings are steps, guidance_scale, negative_prompt, height and width.
        """
        return {name: getattr(self, name) for name in ("steps", "guidance_scale", "negative_prompt", "height", "width")}

    def guidance(self) -> Method | None:
        """Guidance method with its options; None for plain generation."""
        if self.method == PLAIN:
            return None
        options = json.loads(self.options)
        return build_method(self.method, {name: value for name, value in options.items() if name not in CONDITION})

    def condition(self) -> dict[str, float] | None:
        """Condition under which an image of the unit is guided; None if the unit has no condition.

        The condition consists of the arguments "above" and "after" of `elakit.prediction.Predictor.guide_if`. If
        "after" is 0.2, the probability of failure is predicted after 20% of the steps. The image is guided only if this
        probability exceeds "above". The options of the unit contain the two values as "guide_above" and "guide_after".
        """
        options = json.loads(self.options)
        return {name.removeprefix("guide_"): options[name] for name in CONDITION} if CONDITION[0] in options else None


def plan(
    prompts: Sequence[str] | Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    methods: Iterable[str | tuple[str, Mapping[str, Any]]] = (PLAIN, "ela"),
    *,
    model: str = "picture-world",
    steps: int | None = None,
    guidance_scale: float | None = None,
    device: str | None = None,
    dtype: str | None = None,
    detector: str | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    scheduler: str | None = None,
    lora: str | None = None,
    variant: str | None = None,
    batch: int | None = None,
) -> list[Unit]:
    """List the units of a sweep in the order in which they are generated.

    The units of one prompt, with all methods, come before the units of the next prompt. An interrupted sweep thus
    contains images of all methods for its first prompts.

    Parameters
    ----------
    prompts : sequence of str, or mapping of str to sequence of str
        Prompts, or a mapping from the name of each suite to its prompts.
    seeds : sequence of int
        Distinct seeds. Each method generates one image per prompt and seed.
    methods : iterable of str or (str, mapping)
        Guidance methods. Each one is a name in `elakit.guidance.METHODS`, or a pair of such a name and a dict of
        options. The name "plain" stands for generation without guidance. Include "plain", because all guidance methods
        are compared with it.
    model, steps, guidance_scale, device, dtype, detector, negative_prompt, height, width, scheduler, lora, variant
        Settings of all units, as in `Unit`.
    batch : int, optional
        Largest number of seeds per unit; by default, each unit has all seeds. The images of a unit are generated in one
        batch.

    Returns
    -------
    list of Unit
        Distinct units.

    Raises
    ------
    SettingError
        There is no prompt, seed or method; `prompts` or `methods` is a single string; a seed is repeated; a number is
        out of range; a method is unknown; or an option is invalid.

    Examples
    --------
    One prompt and two methods give two units. The option "guide_above" restricts ELA to images that are likely to fail:

    >>> units = plan(["a cat and a lion"], [1, 3], ["plain", ("ela", {"guide_above": 0.2})])
    >>> [(unit.method, unit.seeds) for unit in units]
    [('plain', (1, 3)), ('ela', (1, 3))]
    """
    suites = dict(prompts) if isinstance(prompts, Mapping) else {"": prompts}
    for texts in suites.values():
        check_prompts(texts)
    if not any(suites.values()):
        raise SettingError("There is no prompt to generate. Name a suite or give prompts.")
    numbers = sorted(seed_list(seeds))
    steps, height, width = checked_sizes(steps, height, width)
    if guidance_scale is not None:
        guidance_scale = checks.real_number(guidance_scale, "guidance_scale", 0)
    if batch is not None:
        batch = checks.whole_number(batch, "batch", 1)
    if isinstance(methods, str):
        raise SettingError(f"methods={methods!r} is a single string. Put it in a list: [{methods!r}].")
    pairs: list[tuple[str, Mapping[str, Any]]] = [(one, {}) if isinstance(one, str) else one for one in methods]
    chosen = [(name, canonical_options(name, options)) for name, options in pairs]
    if not chosen:
        raise SettingError(f"No method is given. Choose from {', '.join(sweepable())}.")
    size = batch or len(numbers)
    batches = [tuple(numbers[i : i + size]) for i in range(0, len(numbers), size)]
    units = [
        Unit(
            model=model,
            prompt=prompt,
            seeds=some,
            method=name,
            options=options,
            steps=steps,
            guidance_scale=guidance_scale,
            suite=suite,
            device=device,
            dtype=dtype,
            detector=detector,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            scheduler=scheduler,
            lora=lora,
            variant=variant,
        )
        for suite, texts in suites.items()
        for prompt in texts
        for some in batches
        for name, options in chosen
    ]
    return list(dict.fromkeys(units))


def checked_sizes(steps: int | None, height: int | None, width: int | None) -> list[int | None]:
    """Check the number of steps, the height and the width, and return the three values as a list of integers.

    None stands for the model's default, and is returned as None.

    Raises
    ------
    SettingError
        A value is not a whole number, a value is less than 1, or the number of steps is greater than 1000.
    """
    limits = (("steps", steps, MAX_STEPS), ("height", height, None), ("width", width, None))
    return [None if value is None else checks.whole_number(value, name, 1, high) for name, value, high in limits]


def check_prompts(prompts: Any) -> None:
    """Raise an error if a single string is given instead of a sequence of prompts.

    Parameters
    ----------
    prompts : object
        Value that should be a sequence of prompts.

    Raises
    ------
    SettingError
        `prompts` is a string. Each letter of the string would be used as a prompt.
    """
    if isinstance(prompts, str | bytes):
        raise SettingError(f"prompts={prompts!r} is a single string. Put it in a list: [{prompts!r}].")


def shard(units: Sequence[Unit], index: int, count: int) -> list[Unit]:
    """Divide a sweep into shards, and return the units of one shard.

    Each unit belongs to exactly one shard. Units are assigned to the shards in turn, in the order of their keys. The
    keys are hashes, so every shard has about the same share of each method.

    Parameters
    ----------
    units : sequence of Unit
        All units of the sweep, in any order. The units must be the same for every shard.
    index : int
        Number of the shard, from 1 to `count`.
    count : int
        Number of shards.

    Returns
    -------
    list of Unit

    Raises
    ------
    SettingError
        `index` is not between 1 and `count`.

    Examples
    --------
    Two prompts and the two default methods of `plan` give four units. Three shards have two, one and one of the units:

    >>> units = plan(["a cat and a lion", "a dog and a frog"], [1])
    >>> parts = [shard(units, i, 3) for i in (1, 2, 3)]
    >>> [len(part) for part in parts], set(sum(parts, [])) == set(units)
    ([2, 1, 1], True)
    """
    if not 1 <= index <= count:
        raise SettingError(f"There is no shard {index} of {count}. Give a shard from 1 to the number of shards.")
    mine = {unit.key for unit in sorted(units, key=lambda unit: unit.key)[index - 1 :: count]}
    return [unit for unit in units if unit.key in mine]
