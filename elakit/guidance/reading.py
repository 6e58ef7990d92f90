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
    """Base class of guidance methods that read layers whose maps have one size.

    By default, these methods keep no state, and their latent steps follow the raw gradient.

    Parameters
    ----------
    layers : str
        Layers that are read: "all" (default), "up" (decoder), "down", "mid" or a glob on layer names such as
        "up_blocks.1.*".
    size : int, optional
        Size of the maps that are read: the number of locations along their longer side. By default, the available size
        that is nearest to 16.
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
        """State of an image at the start of a run: None, because the method keeps no state."""
        return None

    def direction(self, gradient: Tensor) -> Tensor:
        """Direction of a latent step: the gradient itself, unchanged."""
        return gradient


@dataclass(frozen=True, kw_only=True)
class ReadsFirstBlocks:
    """Base class of guidance methods that read the middle block and the first upward block of a U-Net.

    The latent steps of these methods follow the raw gradient.

    Parameters
    ----------
    layers : str, optional
        Layers that are read: "up", "down", "mid", "all" or a glob on layer names such as "up_blocks.1.*". By default,
        the layers in two blocks are read: the middle block, and the first upward block that has cross-attention. In a
        model without these blocks (PixArt, Stable Diffusion 3, FLUX), all layers are read by default.
    """

    layers: str | None = None

    def select(self, layers: Sequence[AttentionLayer], latent: tuple[int, int]) -> tuple[AttentionLayer, ...]:
        """Layers that the option `layers` selects; `latent` is not used.

        By default, the layers in the middle block and in the first upward block with cross-attention are selected.
        """
        return first_blocks(layers) if self.layers is None else select_layers(layers, self.layers)

    def direction(self, gradient: Tensor) -> Tensor:
        """Direction of a latent step: the gradient itself, unchanged."""
        return gradient


class EditsFirstSteps:
    """Base class of guidance methods that edit attention scores in the first steps and do not move the latent.

    Attributes
    ----------
    guided : float
        Share of the denoising steps in which scores are edited, beginning with the first step.
    """

    guided: float = 1.0

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """One update per step in which scores are edited, beginning with the first step.

        The list is empty for a prompt of one entity. `noise` holds the ratio of noise to signal before each denoising
        step; only its length is used.
        """
        if len(prompt.entities) < 2:
            return []
        return [Update(0.0, hold=True)] * round(self.guided * len(noise))


def first_blocks(layers: Sequence[AttentionLayer]) -> tuple[AttentionLayer, ...]:
    """Layers in two blocks of a U-Net: the middle block, and the first upward block that has cross-attention.

    If the model has neither of the two blocks, the result contains all layers.

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
