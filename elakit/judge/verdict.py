"""The verdict on an image: is every entity of the prompt there, by itself, and in its color?"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from elakit.errors import PromptError
from elakit.judge.color import name_pixels
from elakit.judge.segmenter import find_things
from elakit.judge.things import Detector, Thing
from elakit.prompt import Entity, Prompt
from elakit.world.recolor import PAINTS
from elakit.world.vocabulary import COLORS, NOUNS, USUAL_COLORS

# What can be wrong with an image.
FAILURES = ("neglect", "mixture", "wrong color")


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the judge sees.

    Attributes
    ----------
    entities : tuple of str
        Labels of the prompt's entities.
    present : dict of str to bool
        Whether each entity is in the image, be it as part of a hybrid.
    colors : dict of str to str or None
        The color it has; None where it is absent.
    asked : dict of str to str or None
        The color the prompt asks for; None where it asks for none.
    masks : ndarray, bool, (entity, y, x)
        Where each entity is; two entities of the same noun share the noun's things, the largest first.
    leak : dict of str to float
        Share of each entity's pixels that have a color asked for another entity and not for itself; 0 where absent.
    mixtures : tuple of tuple of str
        The nouns of each hybrid in the image, such as ("cat", "lion").
    things : tuple of Thing
        Everything that was found, asked for or not, shapes that cannot be named included.
    nouns : dict of str to str
        The noun of each entity.
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
        """Whether two things share one place: a hybrid."""
        return bool(self.mixtures)

    @property
    def counts(self) -> dict[str, int]:
        """How many there are of every noun that was found."""
        return dict(Counter(thing.noun for thing in self.things if thing.recognizable))

    @property
    def unrecognizable(self) -> int:
        """Number of shapes that cannot be named."""
        return sum(not thing.recognizable for thing in self.things)

    @property
    def extra(self) -> tuple[str, ...]:
        """Nouns that are there more often than asked for, once for each thing too many, hybrids aside."""
        found = Counter(thing.noun for thing in self.things if thing.recognizable and not thing.mixed_with)
        return tuple((found - Counter(self.nouns.values())).elements())

    @property
    def right_color(self) -> dict[str, bool]:
        """Whether each entity is there in its color.

        Where none was asked for, any is right but one that was asked for another entity and is none that the thing is
        drawn in: a bird that turned red beside "a red chair". Only for nouns whose usual colors are known.
        """
        return {e: self.present[e] and not self._miscolored(e) for e in self.entities}

    @property
    def failures(self) -> tuple[str, ...]:
        """What is wrong, of "neglect" (a thing is missing, and not hidden in a hybrid), "mixture", "wrong color"."""
        fused = {noun for mixture in self.mixtures for noun in mixture}
        missing = any(not self.present[e] and self.nouns.get(e) not in fused for e in self.entities)
        painted = any(self.present[e] and self._miscolored(e) for e in self.entities)
        return tuple(name for name, wrong in zip(FAILURES, (missing, self.mixture, painted), strict=True) if wrong)

    @property
    def success(self) -> bool:
        """All entities present, each in its color, none fused with another."""
        return all(self.right_color.values()) and not self.mixture

    def _miscolored(self, entity: str) -> bool:
        asked, seen = self.asked[entity], self.colors[entity]
        if asked is not None:
            return asked != seen
        others = {color for other, color in self.asked.items() if other != entity}
        usual = USUAL_COLORS.get(self.nouns.get(entity, ""))
        return usual is not None and seen in others and seen not in usual

    def findings(self) -> tuple[tuple[str, bool], ...]:
        """What to say of each entity and of each hybrid, and whether that is as it should be."""
        said, missing = [], not all(self.present.values())
        for entity in self.entities:
            seen, asked = self.colors[entity] or "there", self.asked[entity]
            if not self.present[entity]:
                said.append((f"{entity}: missing", False))
            elif self._miscolored(entity):
                said.append((f"{entity}: {seen} {f'instead of {asked}' if asked else 'as another'}", False))
            else:
                said.append((f"{entity}: {seen}", True))
        said += [(f"a hybrid of {' and '.join(mixture)}", False) for mixture in self.mixtures]
        if missing and self.unrecognizable:
            said.append(("an unrecognizable shape", False))
        return tuple(said)

    def __str__(self) -> str:
        """One line, such as "car: red; bird: missing" or "cat: orange; lion: brown; a hybrid of cat and lion"."""
        return "; ".join(text for text, _ in self.findings())


def knows(prompt: Prompt) -> bool:
    """Whether every entity of the prompt is one of the 24 nouns, and every attribute one of the 11 colors."""
    return all(_noun(e) in NOUNS and all(a.lower() in COLORS for a in e.attributes) for e in prompt.entities)


def judge(image: Image.Image, prompt: Prompt, detector: Detector | None = None) -> Verdict:
    """Judge an image.

    Parameters
    ----------
    image : PIL.Image.Image
    prompt : Prompt
    detector : Detector, optional
        What finds the things: one of `elakit.judge.detectors` for images of other models. Default: the embedded
        judge, which knows images of picture-world.

    Returns
    -------
    Verdict
        Masks have the size of the image.

    Raises
    ------
    PromptError
        The prompt has a noun or an attribute that picture-world does not know, and no detector is given.

    Examples
    --------
    >>> import elakit
    >>> from elakit.world.scenes import Subject, World, compose
    >>> world, rng = World(artists=("noto",)), np.random.default_rng(5)
    >>> scene = compose((Subject("lion"), Subject("car", "blue")), world, rng)
    >>> prompt = elakit.parse("a [lion] and a [blue car]", elakit.load("picture-world"))
    >>> verdict = judge(Image.fromarray(scene.image), prompt)
    >>> verdict.present, verdict.success, verdict.counts
    ({'lion': True, 'car': True}, True, {'lion': 1, 'car': 1})
    """
    if detector is None and not knows(prompt):
        raise PromptError(
            f"The judge cannot judge {prompt.text!r}: it knows the nouns {', '.join(NOUNS)} and the colors "
            f"{', '.join(COLORS)}. For other images pass a detector (elakit.judge.detectors.load_detector); "
            "measures on attention need no judge: run.bleeding."
        )
    rgb = np.asarray(image.convert("RGB"))
    nouns = [_noun(entity) for entity in prompt.entities]
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
    """Give a noun's things to its entities: all to a single one; else one each, those of the asked color first.

    Whole things go before parts of hybrids.
    """
    things = sorted(things, key=lambda thing: (bool(thing.mixed_with), -thing.area))
    if len(owners) == 1:
        i, asked = owners[0], _color(prompt.entities[owners[0]])
        for thing in things:
            masks[i] |= thing.mask
        if things:
            whole = [thing for thing in things if not thing.mixed_with] or things
            # several of one noun: the one that is right speaks for the entity
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
    """Every hybrid once, its nouns in the order of their size."""
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


def _noun(entity: Entity) -> str:
    return entity.noun.lower()


def _color(entity: Entity) -> str | None:
    """The last of an entity's attributes that is a color."""
    return next((a.lower() for a in reversed(entity.attributes) if a.lower() in COLORS), None)
