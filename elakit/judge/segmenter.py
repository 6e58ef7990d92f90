"""The judge's network: picture -> class of every pixel (background or one of the 24 nouns)."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from elakit.errors import ModelError
from elakit.resources import data_path
from elakit.world.vocabulary import NOUNS

CLASSES = 1 + len(NOUNS)
CHANNELS = (32, 64, 96, 128)


class Segmenter(nn.Module):
    """A small U-Net that works at half resolution and answers at full.

    Parameters
    ----------
    channels : tuple of int
        Widths at 1/2, 1/4, 1/8, ... of the picture's side.
    """

    def __init__(self, channels: tuple[int, ...] = CHANNELS) -> None:
        super().__init__()
        self.stem = _convolve(3, channels[0], stride=2)
        self.down = nn.ModuleList(
            nn.Sequential(_convolve(a, b, stride=2), _convolve(b, b)) for a, b in pairwise(channels)
        )
        self.up = nn.ModuleList(_convolve(a + b, b) for a, b in zip(channels[:0:-1], channels[-2::-1], strict=True))
        self.head = nn.Conv2d(channels[0], CLASSES, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        """Class scores.

        Parameters
        ----------
        pictures : Tensor, (n, 3, h, w)
            In [-1, 1]; sides are multiples of 16.

        Returns
        -------
        Tensor, (n, 25, h, w)
        """
        x = self.stem(pictures)
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(x)
        for up, skip in zip(self.up, reversed(skips), strict=True):
            x = up(torch.cat([F.interpolate(x, size=skip.shape[-2:], mode="nearest"), skip], 1))
        return F.interpolate(self.head(x), size=pictures.shape[-2:], mode="bilinear", align_corners=False)


@lru_cache(maxsize=1)
def load_segmenter() -> Segmenter:
    """The shipped judge.

    Raises
    ------
    ModelError
        Its weights are missing.
    """
    path = data_path("picture-world", "judge", "model.safetensors")
    if not path.exists():
        raise ModelError(
            f"The judge's weights are missing ({path.name}). Train them: python -m elakit.world.train --stage judge."
        )
    model = Segmenter()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval()


def _convolve(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU(inplace=True)
    )
