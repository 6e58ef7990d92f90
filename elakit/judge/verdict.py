"""Verdict on an image: whether every entity of the prompt is present, separate, and in its color."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from elakit.errors import PromptError, SettingError
from elakit.judge.color import name_pixels
from elakit.judge.segmenter import find_things
from elakit.judge.things import Detector, Thing
from elakit.prompt import Entity, Prompt
from elakit.world.recolor import PAINTS
from elakit.world.vocabulary import COLORS, NOUNS, USUAL_COLORS

# Kinds of failure in a verdict.
FAILURES = ("neglect", "mixture", "wrong color")


@dataclass(frozen=True, eq=False)
class Verdict:
    """The judge's assessment of one image.

    Attributes
    ----------
    entities : tuple of str
        Labels of the prompt's entities. All dicts below have these labels as keys.
    present : dict of str to bool
        True for each entity that was found in the image as a recognizable thing, possibly as part of a hybrid. If
        several entities have the same noun, each needs a thing of its own.
    colors : dict of str to str or None
        Color of each entity; None if the entity is absent. The color is the most frequent color of a thing with the
        entity's noun. Of several such things, a thing in the color that the prompt names is preferred.
    asked : dict of str to str or None
        Color that the prompt names for each entity; None if the prompt names no color for the entity.
    masks : ndarray, bool, (entity, y, x)
        Mask of each entity, at the size of the image: the union of all recognizable things of the entity's noun. If
        several entities have the same noun, each gets only one of these things. A thing in the color that the prompt
        names is preferred. Otherwise, whole things are preferred to parts of hybrids, and large things to small ones.
    leak : dict of str to float
        Share of each entity's pixels that have a color named in the prompt for another entity, 0 to 1. The color that
        the prompt names for the entity itself does not count. The share is 0 if the entity is absent.
    mixtures : tuple of tuple of str
        Nouns of each hybrid in the image, such as ("cat", "lion") for a cat that is fused with a lion.
    things : tuple of Thing
        All things that were found, including those that the prompt does not name and unrecognizable shapes.
    nouns : dict of str to str
        Noun of each entity, in lower case.
    """

    entities: tuple[str, ...]
    present: dict[str, bool]
    colors: dict[str, str | None]
    asked: dict[str, str | None]
    masks: np.ndarray
    leak: dict[str, float] = field(default_factory=dict)
    mixtures: tuple[tuple[str, ...], ...] = ()
    things: tuple[Thing, ...] = ()
    nouns: dict[str, str] = field(default_factory=dict)

    @property
    def mixture(self) -> bool:
        """True if the image contains a hybrid: two or more things that are fused into one."""
        return bool(self.mixtures)

    @property
    def counts(self) -> dict[str, int]:
        """Number of things found for each noun; parts of hybrids count, unrecognizable shapes do not."""
        return dict(Counter(thing.noun for thing in self.things if thing.recognizable))

    @property
    def unrecognizable(self) -> int:
        """Number of unrecognizable shapes in the image."""
        return sum(not thing.recognizable for thing in self.things)

    @property
    def extra(self) -> tuple[str, ...]:
        """Noun of each surplus thing in the image, that is, of each thing that the prompt does not ask for.

        For example, if the prompt asks for one cat and the image has three cats and a dog, "cat" occurs twice and "dog"
        once. Parts of hybrids and unrecognizable shapes do not count.
        """
        found = Counter(thing.noun for thing in self.things if thing.recognizable and not thing.mixed_with)
        return tuple((found - Counter(self.nouns.values())).elements())

    @property
    def right_color(self) -> dict[str, bool]:
        """True for each entity that is present and has no wrong color.

        If the prompt names a color for the entity, every other color is wrong. If the prompt names no color for the
        entity, a color is wrong under two conditions: the prompt names this color for another entity, and the color is
        unusual for the noun. For "a bird and a red chair", a red bird is wrong and a green bird is right. Usual colors
        are known only for the nouns of picture-world. For other nouns, no color counts as unusual.
        """
        return {e: self.present[e] and not self._miscolored(e) for e in self.entities}

    @property
    def failures(self) -> tuple[str, ...]:
        """Kinds of failure in the image, out of "neglect", "mixture" and "wrong color".

        "neglect": an entity is absent, and its noun is in no hybrid either. "mixture": the image contains a hybrid.
        "wrong color": an entity is present, but in a wrong color.
        """
        fused = {noun for mixture in self.mixtures for noun in mixture}
        missing = any(not self.present[e] and self.nouns.get(e) not in fused for e in self.entities)
        painted = any(self.present[e] and self._miscolored(e) for e in self.entities)
        return tuple(name for name, wrong in zip(FAILURES, (missing, self.mixture, painted), strict=True) if wrong)

    @property
    def success(self) -> bool:
        """True if all entities are present and in their colors (`right_color`), and the image has no hybrid.

        An image with additional things can be a success.
        """
        return all(self.right_color.values()) and not self.mixture

    def _miscolored(self, entity: str) -> bool:
        asked, seen = self.asked[entity], self.colors[entity]
        if asked is not None:
            return asked != seen
        others = {color for other, color in self.asked.items() if other != entity}
        usual = USUAL_COLORS.get(self.nouns.get(entity, ""))
        return usual is not None and seen in others and seen not in usual

    def findings(self) -> tuple[tuple[str, bool], ...]:
        """Statements about each entity and each hybrid, such as ("car: red", True) or ("bird: missing", False).

        The second element of each pair is True if the statement agrees with the prompt. The color of an entity is
        stated if the prompt names a color for the entity, or if the entity took the color of another entity. If an
        entity is absent and the image has an unrecognizable shape, one more statement reports the shape.
        """
        statements = []
        for entity in self.entities:
            color, asked = self.colors[entity], self.asked[entity]
            if not self.present[entity]:
                statements.append((f"{entity}: missing", False))
            elif not self._miscolored(entity):
                statements.append((f"{entity}: {color if asked and color else 'present'}", True))
            elif asked is not None:
                statements.append((f"{entity}: {color or 'no color'} instead of {asked}", False))
            else:
                owners = " and ".join(other for other in self.entities if self.asked[other] == color)
                statements.append((f"{entity}: {color}, the color of {owners}", False))
        statements += [(f"hybrid of {' and '.join(mixture)}", False) for mixture in self.mixtures]
        if self.unrecognizable and not all(self.present.values()):
            statements.append(("an unrecognizable shape", False))
        return tuple(statements)

    def __str__(self) -> str:
        """Statements of `findings` in one line, such as "car: red; bird: missing"."""
        return "; ".join(text for text, _ in self.findings())


def knows(prompt: Prompt) -> bool:
    """True if the built-in judge knows every noun and every attribute of a prompt.

    The built-in judge knows the nouns and the colors of picture-world.

    Parameters
    ----------
    prompt : Prompt

    Returns
    -------
    bool

    Examples
    --------
    The judge knows "red" and "car", but not "zebra":

    >>> import elakit
    >>> pipe = elakit.load("picture-world")
    >>> knows(elakit.parse("a [red car]", pipe)), knows(elakit.parse("a [red zebra]", pipe))
    (True, False)
    """
    return not _unknown(prompt)


def is_black(image: Image.Image) -> bool:
    """True if every pixel of an image is black.

    A safety checker replaces an unsafe image by a black image.

    Parameters
    ----------
    image : PIL.Image.Image

    Returns
    -------
    bool

    Examples
    --------
    >>> is_black(Image.new("RGB", (8, 8))), is_black(Image.new("RGB", (8, 8), "navy"))
    (True, False)
    """
    return not np.asarray(image.convert("RGB")).any()


def judge(image: Image.Image, prompt: Prompt, detector: Detector | None = None) -> Verdict:
    """Judge whether an image shows the entities of a prompt, separately and in their colors.

    Parameters
    ----------
    image : PIL.Image.Image
    prompt : Prompt
    detector : Detector, optional
        Callable that finds the things in the image. By default the built-in judge, which was trained on images of
        picture-world. For images of other models, pass a detector from `elakit.judge.detectors`.

    Returns
    -------
    Verdict
        Assessment of the image; its masks have the size of the image.

    Raises
    ------
    PromptError
        No detector is given, and the prompt has a noun or an attribute that picture-world does not know.
    SettingError
        The image is entirely black. A safety checker replaces an unsafe image by a black image.

    Notes
    -----
    The state of torch's random number generator does not change.

    Examples
    --------
    The scene contains a lion and a blue car, as the prompt asks:

    >>> import elakit
    >>> from elakit.world.scenes import Subject, World, compose
    >>> world, rng = World(artists=("noto",)), np.random.default_rng(5)
    >>> scene = compose((Subject("lion"), Subject("car", "blue")), world, rng, "row")
    >>> prompt = elakit.parse("a [lion] and a [blue car]", elakit.load("picture-world"))
    >>> verdict = judge(Image.fromarray(scene.image), prompt)
    >>> verdict.present, verdict.success, verdict.counts
    ({'lion': True, 'car': True}, True, {'lion': 1, 'car': 1})
    """
    if detector is None and (unknown := _unknown(prompt)):
        raise PromptError(
            f"The built-in judge cannot judge images of {prompt.text!r}: it does not know "
            f"{', '.join(map(repr, unknown))}. It knows only the nouns {', '.join(NOUNS)} and the colors "
            f"{', '.join(COLORS)}. For other words, pass a detector (elakit.judge.detectors.load_detector). Measures "
            "of attention, such as run.bleeding, need no judge."
        )
    if is_black(image):
        raise SettingError(
            "The image is entirely black, as a safety checker leaves it, and cannot be judged. Load the pipeline with "
            "safety_checker=None, or leave this image out."
        )
    rgb = np.asarray(image.convert("RGB"))
    nouns = [_noun(entity) for entity in prompt.entities]
    with torch.random.fork_rng(devices=[]):  # building the judge's network samples initial weights
        found = (detector or find_things)(image, tuple(dict.fromkeys(nouns)))
    things = [thing for thing in found if thing.recognizable]
    masks = np.zeros((len(nouns), *rgb.shape[:2]), bool)
    colors: list[str | None] = [None] * len(nouns)
    for noun in dict.fromkeys(nouns):
        owners = [i for i, other in enumerate(nouns) if other == noun]
        _assign(masks, colors, [thing for thing in things if thing.noun == noun], owners, prompt)
    labels = [entity.label for entity in prompt.entities]
    asked = [_color(entity) for entity in prompt.entities]
    return Verdict(
        entities=tuple(labels),
        present={label: bool(mask.any()) for label, mask in zip(labels, masks, strict=True)},
        colors=dict(zip(labels, colors, strict=True)),
        asked=dict(zip(labels, asked, strict=True)),
        masks=masks,
        leak={label: _leak(rgb[mask], asked, i) for i, (label, mask) in enumerate(zip(labels, masks, strict=True))},
        mixtures=_mixtures(things),
        things=tuple(found),
        nouns=dict(zip(labels, nouns, strict=True)),
    )


def _assign(
    masks: np.ndarray, colors: list[str | None], things: list[Thing], owners: list[int], prompt: Prompt
) -> None:
    """Assign the things of one noun to the entities of this noun, by changing `masks` and `colors` in place.

    `owners` contains the indices of the entities. If there is only one entity, its mask is the union of all things. If
    there are several entities, each entity gets at most one thing. Entities for which the prompt names a color choose
    first, and take a thing in this color if possible. Otherwise, whole things are preferred to parts of hybrids, and
    large things to small ones.
    """
    things = sorted(things, key=lambda thing: (bool(thing.mixed_with), -thing.area))
    if len(owners) == 1:
        i, asked = owners[0], _color(prompt.entities[owners[0]])
        for thing in things:
            masks[i] |= thing.mask
        if things:
            whole = [thing for thing in things if not thing.mixed_with] or things
            # Of several things of one noun, the one in the right color represents the entity.
            colors[i] = next((t.color for t in whole if t.color == asked), whole[0].color)
        return
    left = list(things)
    for i in sorted(owners, key=lambda i: _color(prompt.entities[i]) is None):
        asked = _color(prompt.entities[i])
        chosen = next((t for t in left if asked is not None and t.color == asked), next(iter(left), None))
        if chosen is not None:
            masks[i], colors[i] = chosen.mask, chosen.color
            left = [thing for thing in left if thing is not chosen]


def _mixtures(things: list[Thing]) -> tuple[tuple[str, ...], ...]:
    """Nouns of each hybrid, the noun of the largest thing first; several hybrids of the same nouns are listed once."""
    found: dict[frozenset[str], tuple[str, ...]] = {}
    for thing in sorted(things, key=lambda thing: -thing.area):
        if thing.mixed_with:
            nouns = (thing.noun, *thing.mixed_with)
            found.setdefault(frozenset(nouns), nouns)
    return tuple(found.values())


def _leak(pixels: np.ndarray, asked: list[str | None], own: int) -> float:
    others = {color for i, color in enumerate(asked) if i != own and color is not None and color != asked[own]}
    if not len(pixels) or not others:
        return 0.0
    return float(np.isin(name_pixels(pixels), [list(PAINTS).index(color) for color in others]).mean())


def _unknown(prompt: Prompt) -> list[str]:
    """Nouns and attributes of a prompt that the built-in judge does not know."""
    words = [
        word
        for entity in prompt.entities
        for word in (
            *(each for each in entity.attributes if each.lower() not in COLORS),
            *([] if _noun(entity) in NOUNS else [entity.noun]),
        )
    ]
    return list(dict.fromkeys(words))


def _noun(entity: Entity) -> str:
    return entity.noun.lower()


def _color(entity: Entity) -> str | None:
    """Color that the prompt names for an entity: the last color among the entity's attributes, None without a color."""
    return next((a.lower() for a in reversed(entity.attributes) if a.lower() in COLORS), None)
