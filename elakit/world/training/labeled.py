"""Generated images that were labeled by eye, as examples for the training of the judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from elakit.errors import SettingError
from elakit.judge.labels import named_nouns, open_image, read_images
from elakit.judge.segmenter import CLASSES
from elakit.world.vocabulary import NOUNS

SLOTS = 2  # entities per image at most
# The following values, and the weight 0.3 in `labeled_loss`, were chosen, not measured.
# Share of the image in which the judge must see a noun, for its label to say something about these pixels.
LEAST_SEEN = 0.01
# Share of the image that a nameable thing covers at least.
LEAST_SHOWN = 0.02


@dataclass(frozen=True)
class Labeled:
    """Generated images that were labeled by eye.

    Attributes
    ----------
    images : Tensor, uint8, (n, 3, size, size)
    nouns : Tensor, int64, (n, 2)
        Classes of the entities that the prompt names: 1 + index of the noun in ``NOUNS``. If there is no second entity,
        the second class is 0.
    nameable : Tensor, bool, (n, 2)
        True if a person would name the entity as the prompt does. If there is no second entity, the second value is
        False.
    hybrid, extra : Tensor, bool, (n,)
        `hybrid` is True if two things are fused. `extra` is True if the image shows a thing that the prompt does not
        name, or shows a named thing more often than the prompt asks.
    """

    images: Tensor
    nouns: Tensor
    nameable: Tensor
    hybrid: Tensor
    extra: Tensor

    def __len__(self) -> int:
        return len(self.nouns)

    def rows(self, index: Tensor) -> Labeled:
        """Labeled images at the given indices."""
        return Labeled(*(value[index] for value in vars(self).values()))

    def to(self, device: torch.device) -> Labeled:
        """Copy of the labeled images on another device."""
        return Labeled(*(value.to(device) for value in vars(self).values()))


def read_labeled(folders: Sequence[Path], size: int) -> Labeled:
    """Read folders of labeled images, as `elakit.judge.labels` defines them.

    Parameters
    ----------
    folders : sequence of Path
        Folders of labeled images. Images without labels are left out.
    size : int
        Side in pixels to which each image is resized.

    Raises
    ------
    SettingError
        `elakit.judge.labels.read_images` refuses a folder, or none of the images is labeled.
    """
    found = [one for folder in folders for one in read_images(folder)]
    if not found:
        raise SettingError(
            f"No image in {', '.join(map(str, folders))} is labeled. Fill in labels.csv in "
            f"{'this folder' if len(folders) == 1 else 'at least one of these folders'}."
        )
    images = [np.array(open_image(one.path).resize((size, size))) for one in found]
    nouns = [([1 + NOUNS.index(noun) for noun in named_nouns(one.prompt)] + [0])[:SLOTS] for one in found]
    nameable = [([*one.label.nameable, False])[:SLOTS] for one in found]
    return Labeled(
        images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        nouns=torch.tensor(nouns),
        nameable=torch.tensor(nameable),
        hybrid=torch.tensor([one.label.hybrid for one in found]),
        extra=torch.tensor([one.label.extra for one in found]),
    )


def labeled_loss(scores: Tensor, labels: Labeled) -> Tensor:
    """Loss of the judge on labeled images, in which the locations of the things are not known.

    The loss is low if the judge's output agrees with the labels:

    - Every pixel is background or a noun of the prompt, unless the image has extra things.
    - Each nameable entity covers at least a small share of the image.
    - Where the judge sees a nameable entity, the pixels are recognizable. Where the judge sees an entity that is not
      nameable, the pixels are unrecognizable.
    - Where the judge sees a nameable entity, the pixels belong to a hybrid if, and only if, the image has a hybrid.

    Parameters
    ----------
    scores : Tensor, (n, 27, h, w)
        Logits of the judge at each pixel: 25 for the classes, one for "hybrid" and one for "unrecognizable".
    labels : Labeled
    """
    log = scores[:, :CLASSES].log_softmax(1)
    asked = labels.nouns > 0
    one_hot = F.one_hot(labels.nouns, CLASSES).amax(1).bool()
    one_hot[:, 0] = True
    allowed = log.masked_fill(~one_hot[:, :, None, None], -torch.inf).logsumexp(1).mean((1, 2))
    total = -(allowed * ~labels.extra).mean()
    slots = log.gather(1, labels.nouns[:, :, None, None].expand(-1, -1, *log.shape[2:]))  # (n, 2, h, w)
    surest = slots.flatten(2).topk(int(LEAST_SHOWN * slots[0, 0].numel()), 2).values.mean(2)
    total = total - 0.3 * (surest * (asked & labels.nameable)).sum() / len(scores)
    seen = slots.detach().exp() * asked[:, :, None, None]
    area = seen.mean((2, 3), keepdim=True)
    weight = seen / area.clamp(min=1e-6) * (area > LEAST_SEEN)
    marks = scores[:, CLASSES:, None]
    spoiled = F.binary_cross_entropy_with_logits(
        marks[:, 1].expand_as(weight), (~labels.nameable)[:, :, None, None].expand_as(weight).float(), reduction="none"
    )
    fused = F.binary_cross_entropy_with_logits(
        marks[:, 0].expand_as(weight), labels.hybrid[:, None, None, None].expand_as(weight).float(), reduction="none"
    )
    both = spoiled + fused * labels.nameable[:, :, None, None]
    return total + (both * weight).mean((2, 3)).sum() / len(scores)
