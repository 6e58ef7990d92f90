"""The verdict on a picture: is every entity of the prompt there, by itself, and in its colour?"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from elakit.errors import PromptError
from elakit.judge.colour import name_pixels
from elakit.judge.segmenter import find_things
from elakit.judge.things import Detector, Thing
from elakit.prompt import Entity, Prompt
from elakit.world.recolour import PAINTS
from elakit.world.vocabulary import COLOURS, NOUNS, USUAL_COLOURS

# What can be wrong with a picture.
FAILURES = ("neglect", "mixture", "wrong colour")


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the judge sees.

    Attributes
    ----------
    entities : tuple of str
        Labels of the prompt's entities.
    present : dict of str to bool
        Whether each entity is in the picture, be it as part of a hybrid.
    colours : dict of str to str or None
        The colour it has; None where it is absent.
    asked : dict of str to str or None
        The colour the prompt asks for; None where it asks for none.
    masks : ndarray, bool, (entity, y, x)
        Where each entity is; two entities of the same noun share the noun's things, the largest first.
    leak : dict of str to float
        Share of each entity's pixels that have a colour asked for another entity and not for itself; 0 where absent.
    mixtures : tuple of tuple of str
        The nouns of each hybrid in the picture, such as ("cat", "lion").
    things : tuple of Thing
        Everything that was found, asked for or not.
    nouns : dict of str to str
        The noun of each entity.
    """

    entities: tuple[str, ...]
    present: dict[str, bool]
    colours: dict[str, str | None]
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
        return dict(Counter(thing.noun for thing in self.things))

    @property
    def extra(self) -> tuple[str, ...]:
        """Nouns that are there more often than asked for, once for each thing too many, hybrids aside."""
        found = Counter(thing.noun for thing in self.things if not thing.mixed_with)
        return tuple((found - Counter(self.nouns.values())).elements())

    @property
    def right_colour(self) -> dict[str, bool]:
        """Whether each entity is there in its colour.

        Where none was asked for, any is right but one that was asked for another entity and is none that the thing is
        drawn in: a bird that turned red beside "a red chair". Only for nouns whose usual colours are known.
        """
        return {e: self.present[e] and not self._miscoloured(e) for e in self.entities}

    @property
    def failures(self) -> tuple[str, ...]:
        """What is wrong, of "neglect" (a thing is missing, and not hidden in a hybrid), "mixture", "wrong colour"."""
        fused = {noun for mixture in self.mixtures for noun in mixture}
        missing = any(not self.present[e] and self.nouns.get(e) not in fused for e in self.entities)
        painted = any(self.present[e] and self._miscoloured(e) for e in self.entities)
        return tuple(name for name, wrong in zip(FAILURES, (missing, self.mixture, painted), strict=True) if wrong)

    @property
    def success(self) -> bool:
        """All entities present, each in its colour, none fused with another."""
        return all(self.right_colour.values()) and not self.mixture

    def _miscoloured(self, entity: str) -> bool:
        asked, seen = self.asked[entity], self.colours[entity]
        if asked is not None:
            return asked != seen
        others = {colour for other, colour in self.asked.items() if other != entity}
        usual = USUAL_COLOURS.get(self.nouns.get(entity, ""))
        return usual is not None and seen in others and seen not in usual

    def findings(self) -> tuple[tuple[str, bool], ...]:
        """What to say of each entity and of each hybrid, and whether that is as it should be."""
        said = []
        for entity in self.entities:
            seen, asked = self.colours[entity] or "there", self.asked[entity]
            if not self.present[entity]:
                said.append((f"{entity}: missing", False))
            elif self._miscoloured(entity):
                said.append((f"{entity}: {seen} {f'instead of {asked}' if asked else 'as another'}", False))
            else:
                said.append((f"{entity}: {seen}", True))
        said += [(f"a hybrid of {' and '.join(mixture)}", False) for mixture in self.mixtures]
        return tuple(said)

    def __str__(self) -> str:
        """One line, such as "car: red; bird: missing" or "cat: orange; lion: brown; a hybrid of cat and lion"."""
        return "; ".join(text for text, _ in self.findings())


def knows(prompt: Prompt) -> bool:
    """Whether every entity of the prompt is one of the 24 nouns, and every attribute one of the 11 colours."""
    return all(_noun(e) in NOUNS and all(a.lower() in COLOURS for a in e.attributes) for e in prompt.entities)


def judge(image: Image.Image, prompt: Prompt, detector: Detector | None = None) -> Verdict:
    """Judge a picture.

    Parameters
    ----------
    image : PIL.Image.Image
    prompt : Prompt
    detector : Detector, optional
        What finds the things: one of `elakit.judge.detectors` for pictures of other models. Default: the embedded
        judge, which knows pictures of picture-world.

    Returns
    -------
    Verdict
        Masks have the size of the picture.

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
            f"The judge cannot judge {prompt.text!r}: it knows the nouns {', '.join(NOUNS)} and the colours "
            f"{', '.join(COLOURS)}. For other pictures pass a detector (elakit.judge.detectors.load_detector); "
            "measures on attention need no judge: run.bleeding."
        )
    rgb = np.asarray(image.convert("RGB"))
    nouns = [_noun(entity) for entity in prompt.entities]
    things = (detector or find_things)(image, tuple(dict.fromkeys(nouns)))
    masks = np.zeros((len(nouns), *rgb.shape[:2]), bool)
    colours: list[str | None] = [None] * len(nouns)
    for noun in dict.fromkeys(nouns):
        owners = [i for i, other in enumerate(nouns) if other == noun]
        _assign(masks, colours, [thing for thing in things if thing.noun == noun], owners, prompt)
    labels = [entity.label for entity in prompt.entities]
    asked = [_colour(entity) for entity in prompt.entities]
    return Verdict(
        entities=tuple(labels),
        present={label: bool(mask.any()) for label, mask in zip(labels, masks, strict=True)},
        colours=dict(zip(labels, colours, strict=True)),
        asked=dict(zip(labels, asked, strict=True)),
        masks=masks,
        leak={label: _leak(rgb[mask], asked, i) for i, (label, mask) in enumerate(zip(labels, masks, strict=True))},
        mixtures=_mixtures(things),
        things=tuple(things),
        nouns=dict(zip(labels, nouns, strict=True)),
    )


def _assign(
    masks: np.ndarray, colours: list[str | None], things: list[Thing], owners: list[int], prompt: Prompt
) -> None:
    """Give a noun's things to its entities: all to a single one; else one each, those of the asked colour first.

    Whole things go before parts of hybrids.
    """
    things = sorted(things, key=lambda thing: (bool(thing.mixed_with), -thing.area))
    if len(owners) == 1:
        i, asked = owners[0], _colour(prompt.entities[owners[0]])
        for thing in things:
            masks[i] |= thing.mask
        if things:
            whole = [thing for thing in things if not thing.mixed_with] or things
            # several of one noun: the one that is right speaks for the entity
            colours[i] = next((t.colour for t in whole if t.colour == asked), whole[0].colour)
        return
    left = list(things)
    for i in sorted(owners, key=lambda i: _colour(prompt.entities[i]) is None):
        asked = _colour(prompt.entities[i])
        chosen = next((t for t in left if asked is not None and t.colour == asked), next(iter(left), None))
        if chosen is not None:
            masks[i], colours[i] = chosen.mask, chosen.colour
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
    others = {colour for i, colour in enumerate(asked) if i != own and colour is not None and colour != asked[own]}
    if not len(pixels) or not others:
        return 0.0
    return float(np.isin(name_pixels(pixels), [list(PAINTS).index(colour) for colour in others]).mean())


def _noun(entity: Entity) -> str:
    return entity.noun.lower()


def _colour(entity: Entity) -> str | None:
    """The last of an entity's attributes that is a colour."""
    return next((a.lower() for a in reversed(entity.attributes) if a.lower() in COLOURS), None)
