"""Network of the built-in judge, and the things that the judge finds with the network.

For each pixel of an image, the network predicts a class: the background or a noun. The network also predicts the
probability that the pixel belongs to a hybrid, and the probability that the pixel belongs to an unrecognizable shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.ndimage import binary_dilation
from skimage.measure import label
from torch import Tensor, nn
from torch.nn import functional as F

from elakit.errors import ModelError
from elakit.judge.color import thing_color
from elakit.judge.things import Thing
from elakit.resources import data_path
from elakit.world.vocabulary import NOUNS

CLASSES = 1 + len(NOUNS)
CHANNELS = (16, 48, 96, 160, 224)
SIZE = 128  # pixels; images of another size are resized to what the judge was trained on
# A thing is present if one connected component of its class covers this share of the image. In the world's scenes the
# smallest (glasses among three) covers about 1.5%.
LEAST_AREA = 0.008
# A component that covers less than this share of a larger one that it touches is noise, not a thing.
SPECK = 0.15
# A component is part of a hybrid if the mean probability over its pixels is larger. Chosen on 300 composed hybrids,
# 300 pairs and 288 images of single things, with seeds used for nothing else.
MIXED = 0.3
# A component is unrecognizable if the mean probability over its pixels is larger.
UNRECOGNIZABLE = 0.5


class Segmenter(nn.Module):
    """Small U-Net that returns logits for each pixel of an image.

    The logits are computed at half resolution and interpolated to the resolution of the image.

    Parameters
    ----------
    channels : tuple of int
        Number of channels at each level of the U-Net. The first level has 1/2 of the resolution of the image, the
        second 1/4, and so on.
    outputs : int
        Number of logits per pixel. The default is 27: one for the background, one for each of the 24 nouns of
        picture-world, one for hybrids and one for unrecognizable shapes. A network that does not predict unrecognizable
        shapes has 26.
    """

    def __init__(self, channels: tuple[int, ...] = CHANNELS, outputs: int = CLASSES + 2) -> None:
        super().__init__()
        self.stem = _convolve(3, channels[0], stride=2)
        self.down = nn.ModuleList(
            nn.Sequential(_convolve(a, b, stride=2), _convolve(b, b)) for a, b in pairwise(channels)
        )
        self.up = nn.ModuleList(_convolve(a + b, b) for a, b in zip(channels[:0:-1], channels[-2::-1], strict=True))
        self.head = nn.Conv2d(channels[0], outputs, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of each pixel for the classes, for hybrids and for unrecognizable shapes.

        Parameters
        ----------
        images : Tensor, (n, 3, h, w)
            Pixel values in [-1, 1]; h and w are multiples of 32.

        Returns
        -------
        Tensor, (n, outputs, h, w)
            Logits of the background, of each noun in `elakit.world.vocabulary.NOUNS`, of a hybrid and of an
            unrecognizable shape, in this order. A network with 26 outputs has no logit of an unrecognizable shape.
        """
        return F.interpolate(self.halved(images), size=images.shape[-2:], mode="bilinear", align_corners=False)

    def halved(self, images: Tensor) -> Tensor:
        """Logits of images (n, 3, h, w) at half resolution, before interpolation: (n, outputs, h / 2, w / 2)."""
        x = self.stem(images)
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(x)
        for up, skip in zip(self.up, reversed(skips), strict=True):
            x = up(torch.cat([F.interpolate(x, size=skip.shape[-2:], mode="nearest"), skip], 1))
        return self.head(x)


@lru_cache(maxsize=1)
def load_segmenter(model: Path | None = None) -> Segmenter:
    """Load the network of a judge; the network that was loaded last is kept in memory.

    Parameters
    ----------
    model : Path, optional
        Folder that contains the weights, ``judge/model.safetensors``. By default the folder of the built-in model.

    Raises
    ------
    ModelError
        The weights are missing or do not fit this version of elakit.
    """
    path = (model or data_path("picture-world")) / "judge" / "model.safetensors"
    remedy = "Train them: python -m elakit.world.train --stage judge, and copy judge/ to data/picture-world/."
    if not path.exists():
        raise ModelError(f"The judge's weights are missing ({path.name if model is None else path}). {remedy}")
    weights = {name: value.float() for name, value in load_file(path).items()}
    try:
        network = Segmenter(outputs=len(weights["head.weight"]))
        network.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise ModelError(f"The judge's weights ({path.name}) do not fit this version of elakit. {remedy}") from error
    return network.eval()


@dataclass(frozen=True)
class Seen:
    """Output of the judge's network for some images.

    Attributes
    ----------
    classes : ndarray of int, (n, size, size)
        Most probable class of each pixel: 0 for the background, or 1 plus the index of the noun in
        `elakit.world.vocabulary.NOUNS`.
    probabilities : ndarray, float32, (n, 25, size, size)
        Probability of each class: the background and the 24 nouns.
    mixed : ndarray, float32, (n, size, size)
        Probability that each pixel belongs to a hybrid.
    unrecognizable : ndarray, float32, (n, size, size)
        Probability that each pixel belongs to an unrecognizable shape; 0 if the network does not predict such shapes.
    """

    classes: np.ndarray
    probabilities: np.ndarray
    mixed: np.ndarray
    unrecognizable: np.ndarray


@dataclass(frozen=True, eq=False)
class Component:
    """Connected region of pixels that show the same noun in an image; `decide` makes a thing of each component.

    Attributes
    ----------
    thing : Thing
        The component as a thing. `mixed_with` is still empty and `recognizable` is still True; `decide` returns a copy
        of the thing with the final values.
    mixed : float
        Probability that a pixel belongs to a hybrid, averaged over the component.
    unrecognizable : float
        Probability that a pixel belongs to an unrecognizable shape, averaged over the component.
    second : str
        The second most probable noun of the component.
    blobs : frozenset of int
        Set with a single element: the index of the blob that contains the component. A blob is a connected region of
        pixels that are not background, and may contain several nouns. Components in the same blob are connected.
    """

    thing: Thing
    mixed: float
    unrecognizable: float
    second: str
    blobs: frozenset[int]


@torch.no_grad()
def segment(images: np.ndarray, model: Path | None = None) -> Seen:
    """Classify every pixel of some images with the network of a judge.

    Parameters
    ----------
    images : ndarray, uint8, (n, size, size, 3)
        `size` is a multiple of 32.
    model : Path, optional
        Folder that contains the weights, ``judge/model.safetensors``. By default the folder of the built-in model.

    Returns
    -------
    Seen
        Class and probabilities of each pixel.

    Examples
    --------
    The scene contains a frog. The class of a noun is 1 plus the index of the noun in `NOUNS`, so 1 is subtracted from
    the median class of the frog's pixels:

    >>> from elakit.world.scenes import Subject, World, compose
    >>> scene = compose((Subject("frog"),), World(artists=("noto",)), np.random.default_rng(0))
    >>> classes = segment(scene.image[None]).classes[0]
    >>> NOUNS[int(np.median(classes[scene.entities[0].mask])) - 1]
    'frog'
    """
    pixels = torch.tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    network = load_segmenter(model)
    # mean over the image and its mirror image
    scores = (network(pixels) + network(pixels.flip(-1)).flip(-1)) / 2
    probabilities = scores[:, :CLASSES].softmax(1)
    mixed, spoiled = scores[:, CLASSES].sigmoid(), scores[:, CLASSES + 1 :].sigmoid()
    unrecognizable = spoiled[:, 0] if spoiled.shape[1] else torch.zeros_like(mixed)
    return Seen(probabilities.argmax(1).numpy(), probabilities.numpy(), mixed.numpy(), unrecognizable.numpy())


def find_things(image: Image.Image, nouns: Sequence[str] = ()) -> list[Thing]:
    """Find all things of picture-world in an image with the built-in judge, the largest first.

    Parameters
    ----------
    image : PIL.Image.Image
    nouns : sequence of str
        Ignored: the judge searches for all nouns of picture-world, and also finds things that the prompt does not name.

    Returns
    -------
    list of Thing
        The `score` of a thing is the mean probability of its noun over its pixels, and is low for a deformed thing.
        Unrecognizable shapes are included, with their most probable noun and with ``recognizable=False``.

    Examples
    --------
    The scene contains a green apple, which is not fused with another thing:

    >>> from elakit.world.scenes import Subject, World, compose
    >>> scene = compose((Subject("apple", "green"),), World(artists=("noto",)), np.random.default_rng(0))
    >>> [(thing.noun, thing.color, thing.mixed_with) for thing in find_things(Image.fromarray(scene.image))]
    [('apple', 'green', ())]
    """
    return decide(find_components(image))


def find_components(image: Image.Image, model: Path | None = None) -> list[Component]:
    """Find the components of an image that are large enough to be things, the largest component first.

    A component is a connected region of pixels that show the same noun. `decide` makes a thing of each component.

    Parameters
    ----------
    image : PIL.Image.Image
    model : Path, optional
        Folder that contains the weights, ``judge/model.safetensors``. By default the folder of the built-in model.

    Returns
    -------
    list of Component
        Components that cover at least the share ``LEAST_AREA`` (0.008) of the image.
    """
    rgb = image.convert("RGB")
    way = Image.Resampling.BOX if min(rgb.size) >= SIZE else Image.Resampling.BICUBIC
    pixels = np.asarray(rgb.resize((SIZE, SIZE), way))
    seen = segment(pixels[None], model)
    classes, probabilities = seen.classes[0], seen.probabilities[0]
    blobs = label(classes > 0, connectivity=2)
    components = []
    for value, mask in _components(_without_specks(classes)):
        if mask.mean() < LEAST_AREA:
            continue
        mean = probabilities[:, mask].mean(1)
        mean[[0, value]] = 0
        thing = Thing(
            noun=NOUNS[value - 1],
            mask=np.asarray(Image.fromarray(mask).resize(rgb.size, Image.Resampling.NEAREST)),
            score=float(probabilities[value][mask].mean()),
            color=thing_color(pixels, mask, NOUNS[value - 1]),
        )
        components.append(
            Component(
                thing=thing,
                mixed=float(seen.mixed[0][mask].mean()),
                unrecognizable=float(seen.unrecognizable[0][mask].mean()),
                second=NOUNS[int(mean.argmax()) - 1],
                blobs=frozenset(np.unique(blobs[mask]).tolist()),
            )
        )
    return components


def decide(
    components: Sequence[Component], mixed: float = MIXED, unrecognizable: float = UNRECOGNIZABLE
) -> list[Thing]:
    """Make things of the components of an image, and decide which things are unrecognizable or parts of hybrids.

    Parameters
    ----------
    components : sequence of Component
        All components of an image.
    mixed : float
        Threshold for the attribute `mixed` of a component. Above the threshold, the component is part of a hybrid.
    unrecognizable : float
        Threshold for the attribute `unrecognizable` of a component. Above the threshold, the component is
        unrecognizable.

    Returns
    -------
    list of Thing
        One thing per component, in the same order. If the component is part of a hybrid, `mixed_with` contains the
        nouns of its partners. Partners are components with other nouns that are connected to this component and are
        parts of a hybrid, too. Without a partner, `mixed_with` contains the component's second most probable noun.
    """
    things = []
    for one in components:
        partners: list[str] = []
        if one.mixed > mixed:
            noun = one.thing.noun
            partners = [
                other.thing.noun
                for other in components
                if other.mixed > mixed and other.thing.noun != noun and one.blobs & other.blobs
            ]
            partners = partners or [one.second]  # without partners, every pixel of the component shows both things
        things.append(
            replace(
                one.thing,
                mixed_with=tuple(dict.fromkeys(partners)),
                recognizable=one.unrecognizable <= unrecognizable,
            )
        )
    return things


def _components(classes: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Connected components of every class except the background, as pairs (class, mask), the largest area first."""
    found: list[tuple[int, np.ndarray]] = []
    for value in np.unique(classes[classes > 0]):
        labeled, count = label(classes == value, return_num=True, connectivity=2)
        found += [(int(value), labeled == i) for i in range(1, count + 1)]
    return sorted(found, key=lambda one: -int(one[1].sum()))


def _without_specks(classes: np.ndarray) -> np.ndarray:
    """Copy of `classes`, the class of each pixel, in which each speck takes the class of a larger neighbor.

    The neighbor of a component is the largest component within a distance of two pixels. The component is a speck if
    its area is less than the share ``SPECK`` (0.15) of the area of the neighbor.
    """
    classes = classes.copy()
    found = _components(classes)
    for i in range(len(found) - 1, 0, -1):
        speck = found[i][1]
        around = binary_dilation(speck, iterations=2)
        host = next((value for value, mask in found[:i] if (mask & around).any()), None)
        area = max((int(m.sum()) for v, m in found[:i] if v == host and (m & around).any()), default=0)
        if host is not None and speck.sum() < SPECK * area:
            classes[speck] = host
    return classes


def _convolve(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU(inplace=True)
    )
