"""The verdict on a picture: is every entity of the prompt there, and in its colour?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from skimage.measure import label as components

from elakit.errors import PromptError
from elakit.judge.colour import name_colour
from elakit.judge.segmenter import load_segmenter
from elakit.prompt import Entity, Prompt
from elakit.world.vocabulary import COLOURS, NOUNS

# An entity is there if one connected patch of it covers this share of the picture. In the world's scenes the smallest
# thing (glasses in a pair) covers about 2 %.
LEAST_AREA = 0.012
JUDGED_SIZE = 64  # pixels; pictures of another size are resized to what the judge was trained on


@dataclass(frozen=True)
class Verdict:
    """What the judge sees.

    Attributes
    ----------
    entities : tuple of str
        Labels of the prompt's entities.
    present : dict of str to bool
        Whether each entity is in the picture.
    colours : dict of str to str or None
        The colour it has; None where it is absent.
    asked : dict of str to str or None
        The colour the prompt asks for; None where it asks for none.
    masks : ndarray, bool, (entity, y, x)
        Where each entity is; two entities of the same noun share the noun's patches, the largest first.
    """

    entities: tuple[str, ...]
    present: dict[str, bool]
    colours: dict[str, str | None]
    asked: dict[str, str | None]
    masks: np.ndarray

    @property
    def right_colour(self) -> dict[str, bool]:
        """Whether each entity is there in the colour it was asked for (any, where none was asked)."""
        return {e: self.present[e] and self.asked[e] in (None, self.colours[e]) for e in self.entities}

    @property
    def success(self) -> bool:
        """All entities present, each in its colour."""
        return all(self.right_colour.values())

    def __str__(self) -> str:
        """One line, such as "car: red; bird: missing"."""
        parts = []
        for entity in self.entities:
            seen = (self.colours[entity] or "there") if self.present[entity] else "missing"
            wrong = self.present[entity] and not self.right_colour[entity]
            parts.append(f"{entity}: {seen}" + (f" instead of {self.asked[entity]}" if wrong else ""))
        return "; ".join(parts)


def knows(prompt: Prompt) -> bool:
    """Whether every entity of the prompt is one of the 24 nouns, and every attribute one of the 11 colours."""
    return all(_noun(e) in NOUNS and all(a.lower() in COLOURS for a in e.attributes) for e in prompt.entities)


def judge(image: Image.Image, prompt: Prompt) -> Verdict:
    """Judge a picture of the embedded model.

    Parameters
    ----------
    image : PIL.Image.Image
    prompt : Prompt

    Returns
    -------
    Verdict
        Masks have the size of the picture.

    Raises
    ------
    PromptError
        The prompt has a noun or an attribute that picture-world does not know.

    Examples
    --------
    >>> import elakit
    >>> from elakit.world.scenes import Subject, World, compose
    >>> world, rng = World(artists=("fluent-3d",)), np.random.default_rng(5)
    >>> scene = compose((Subject("lion"), Subject("car", "blue")), world, rng)
    >>> prompt = elakit.parse("a [lion] and a [blue car]", elakit.load("picture-world"))
    >>> judge(Image.fromarray(scene.image), prompt).present
    {'lion': True, 'car': True}
    """
    if not knows(prompt):
        raise PromptError(
            f"The judge cannot judge {prompt.text!r}: it knows the nouns {', '.join(NOUNS)} and the colours "
            f"{', '.join(COLOURS)}. Measures on attention need no judge: run.bleeding."
        )
    rgb = image.convert("RGB")
    small = np.asarray(rgb.resize((JUDGED_SIZE, JUDGED_SIZE), Image.Resampling.BOX))
    classes = segment(small[None])[0]
    masks = np.zeros((len(prompt.entities), JUDGED_SIZE, JUDGED_SIZE), bool)
    for noun in {_noun(entity) for entity in prompt.entities}:
        owners = [i for i, entity in enumerate(prompt.entities) if _noun(entity) == noun]
        patches = _patches(classes == 1 + NOUNS.index(noun))
        _assign(masks, patches, owners, small, prompt)
    present, colours, asked = {}, {}, {}
    for entity, mask in zip(prompt.entities, masks, strict=True):
        present[entity.label] = bool(mask.any())
        colours[entity.label] = name_colour(small[mask])
        asked[entity.label] = _colour(entity)
    full = np.stack([np.asarray(Image.fromarray(m).resize(rgb.size, Image.Resampling.NEAREST)) for m in masks])
    return Verdict(tuple(present), present, colours, asked, full)


@torch.no_grad()
def segment(pictures: np.ndarray) -> np.ndarray:
    """Class of every pixel: 0 background, 1 + index in ``NOUNS`` elsewhere.

    Parameters
    ----------
    pictures : ndarray, uint8, (n, size, size, 3)

    Returns
    -------
    ndarray of int, (n, size, size)
    """
    pixels = torch.tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return load_segmenter()(pixels).argmax(1).numpy()


def _patches(mask: np.ndarray) -> list[np.ndarray]:
    """Connected patches large enough to be a thing, the largest first."""
    labelled, count = components(mask, return_num=True, connectivity=2)
    patches = [labelled == i for i in range(1, count + 1)]
    return sorted((p for p in patches if p.mean() >= LEAST_AREA), key=lambda p: -int(p.sum()))


def _assign(
    masks: np.ndarray, patches: list[np.ndarray], owners: list[int], pixels: np.ndarray, prompt: Prompt
) -> None:
    """Give a noun's patches to its entities: all to a single one; else one each, those of the asked colour first."""
    if len(owners) == 1:
        for patch in patches:
            masks[owners[0]] |= patch
        return
    left = list(patches)
    for i in sorted(owners, key=lambda i: _colour(prompt.entities[i]) is None):
        asked = _colour(prompt.entities[i])
        match = next((p for p in left if asked is not None and name_colour(pixels[p]) == asked), None)
        chosen = match if match is not None else next(iter(left), None)
        if chosen is not None:
            masks[i] = chosen
            left = [p for p in left if p is not chosen]


def _noun(entity: Entity) -> str:
    return entity.noun.lower()


def _colour(entity: Entity) -> str | None:
    return entity.attributes[-1].lower() if entity.attributes else None
