"""Base classes of methods: they choose the layers that are read, or the steps in which scores are edited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from elakit.attention.spec import select_layers
from elakit.guidance.method import Update, layers_of_size
from elakit.guidance.preprocess import NATIVE_SIZE
from elakit.models import AttentionLayer
from elakit.prompt import Prompt


@dataclass(frozen=True, kw_only=True)
class ReadsOneSize:
    """Base class of methods that read layers of one map size, keep no state, and follow the raw gradient.

    Parameters
    ----------
    layers : str
        Layers read: "all" (default), "up" (decoder), "down", "mid" or a glob on layer names such as "up_blocks.1.*".
    size : int, optional
        Number of locations along the longer side of the maps that are read; by default 16, or the nearest that the
        model has.
    """

    layers: str = "all"
    size: int | None = None

    reads_self: ClassVar[bool] = False
    takes_regions: ClassVar[bool] = False
    needs_regions: ClassVar[bool] = False
    steerable: ClassVar[bool] = False

    def select(self, layers: Sequence[AttentionLayer], latent: tuple[int, int]) -> tuple[AttentionLayer, ...]:
        """Layers that the options `layers` and `size` select; `latent` is the (height, width) of the latent."""
        return layers_of_size(select_layers(layers, self.layers), latent, self.size, NATIVE_SIZE, type(self).__name__)

    def begin(self, prompt: Prompt, steps: int) -> Any:
        """None: the method has no state."""
        return None

    def direction(self, gradient: Tensor) -> Tensor:
        """The raw gradient."""
        return gradient


@dataclass(frozen=True, kw_only=True)
class ReadsFirstBlocks:
    """Base class of methods that read the middle and the first upward block of a U-Net, and follow the raw gradient.

    Parameters
    ----------
    layers : str, optional
        Layers read: "up", "down", "mid", "all" or a glob on layer names such as "up_blocks.1.*". By default the
        middle block and the first upward block that has cross-attention; in a model without these blocks (PixArt,
        Stable Diffusion 3, FLUX), all layers.
    """

    layers: str | None = None

    def select(self, layers: Sequence[AttentionLayer], latent: tuple[int, int]) -> tuple[AttentionLayer, ...]:
        """Layers that the option `layers` selects; by default those of the middle and the first upward block."""
        return first_blocks(layers) if self.layers is None else select_layers(layers, self.layers)

    def direction(self, gradient: Tensor) -> Tensor:
        """The raw gradient."""
        return gradient


class EditsFirstSteps:
    """Base class of methods that edit attention scores in the first steps and do not move the latent.

    Attributes
    ----------
    guided : float
        Share of the denoising steps in which scores are edited, from the first.
    """

    guided: float = 1.0

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """One edit of scores for each of the first steps; none for a prompt with one entity.

        `noise` holds the ratio of noise to signal before each denoising step; only the number of steps is used.
        """
        if len(prompt.entities) < 2:
            return []
        return [Update(0.0, hold=True)] * round(self.guided * len(noise))


def first_blocks(layers: Sequence[AttentionLayer]) -> tuple[AttentionLayer, ...]:
    """Layers of the middle block and of the first upward block with cross-attention.

    If the model has neither of these blocks, the result contains all layers.

    Parameters
    ----------
    layers : sequence of AttentionLayer
        All cross-attention layers of a model, in forward order.
    """
    block = next((_block(layer) for layer in layers if layer.place == "up"), None)
    return tuple(layer for layer in layers if layer.place == "mid" or _block(layer) == block) or tuple(layers)


def _block(layer: AttentionLayer) -> tuple[str, ...]:
    """The block of a U-Net that a layer is in, such as ("up_blocks", "1")."""
    return tuple(layer.name.split(".")[:2])
