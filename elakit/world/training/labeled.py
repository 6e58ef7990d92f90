"""Generated images that were labeled by eye, as examples for the training of the judge."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from elakit.errors import SettingError
from elakit.judge.segmenter import CLASSES
from elakit.world.vocabulary import NOUNS

SLOTS = 2  # entities per image at most
# Share of the image in which the judge must see a noun, for its label to say something about these pixels.
LEAST_SEEN = 0.01
# Share of the image that a nameable thing covers at least.
LEAST_SHOWN = 0.02


@dataclass(frozen=True)
class Labeled:
    """Labeled images.

    Attributes
    ----------
    images : Tensor, uint8, (n, 3, size, size)
    nouns : Tensor, int64, (n, 2)
        Classes of the entities that the prompt names, 1 + index in ``NOUNS``; 0 if there is no second entity.
    nameable : Tensor, bool, (n, 2)
        True if a person would name the entity as the prompt does.
    hybrid, extra : Tensor, bool, (n,)
        True if two things are fused, or if there are things that were not asked for.
    """

    images: Tensor
    nouns: Tensor
    nameable: Tensor
    hybrid: Tensor
    extra: Tensor

    def __len__(self) -> int:
        return len(self.nouns)

    def rows(self, index: Tensor) -> Labeled:
        """Some of the images."""
        return Labeled(*(value[index] for value in vars(self).values()))

    def to(self, device: torch.device) -> Labeled:
        """The same on another device."""
        return Labeled(*(value.to(device) for value in vars(self).values()))


def read_labeled(folders: Sequence[Path], size: int) -> Labeled:
    """Read the images and labels of audits, as ``benchmarks.audit`` writes them.

    Parameters
    ----------
    folders : sequence of Path
        Folders with ``key.json`` (the prompt of each image), ``labels.csv`` and ``images/``. Images without labels are
        left out.
    size : int
        Side of the images in pixels.

    Raises
    ------
    SettingError
        A file is missing, or nothing is labeled.
    """
    images, nouns, nameable, rest = [], [], [], []
    for folder in folders:
        try:
            key = json.loads((folder / "key.json").read_text(encoding="utf-8"))
            with (folder / "labels.csv").open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if row["hybrid"]]
        except (OSError, ValueError, KeyError) as error:
            raise SettingError(
                f"Cannot read the labeled images of {folder}: {error!r}. "
                "Its key.json and labels.csv must be those that `python -m benchmarks.audit` writes."
            ) from error
        for row in rows:
            found = next(iter(sorted((folder / "images").glob(f"{int(row['image']):04d}.*"))), None)
            if found is None:
                raise SettingError(f"{folder / 'images'} has no image {row['image']}, which labels.csv names.")
            with Image.open(found) as image:
                images.append(torch.from_numpy(np.array(image.convert("RGB").resize((size, size)))).permute(2, 0, 1))
            words = re.split(" and | with ", key[row["image"]]["prompt"])
            named = [1 + NOUNS.index(each.split()[-1]) for each in words]
            nouns.append(([*named, 0])[:SLOTS])
            nameable.append([row[f"{slot}_nameable"] == "1" for slot in ("first", "second")])
            rest.append([row["hybrid"] == "1", row["extra"] == "1"])
    if not images:
        raise SettingError(f"No image of {', '.join(map(str, folders))} is labeled. Fill in labels.csv.")
    flags = torch.tensor(rest)
    return Labeled(torch.stack(images), torch.tensor(nouns), torch.tensor(nameable), flags[:, 0], flags[:, 1])


def labeled_loss(scores: Tensor, labels: Labeled) -> Tensor:
    """Loss of the judge on labeled images, whose things have no known location.

    Every pixel is background or a noun of the prompt, unless there are other things. A nameable thing is seen
    somewhere. Where the judge sees a noun that is not nameable, the shape is unrecognizable; where it is nameable, it
    is not.

    Parameters
    ----------
    scores : Tensor, (n, 27, h, w)
        Logits of the judge.
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
