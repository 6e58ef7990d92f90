"""Base class of most methods: they read maps of one size and step along the raw gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from elakit.attention.spec import select_layers
from elakit.guidance.method import layers_of_size
from elakit.guidance.preprocess import NATIVE_SIZE
from elakit.models import AttentionLayer
from elakit.prompt import Prompt


@dataclass(frozen=True, kw_only=True)
class ReadsOneSize:
    """Base class of methods that read layers of one map size, keep no state, and step along the raw gradient.

    Parameters
    ----------
    layers : str
        Layers read: "all", "up" (decoder), "down", "mid" or a name pattern.
    size : int, optional
        Longer side of the maps read; by default 16, or the nearest size that the model has.
    """

    layers: str = "all"
    size: int | None = None

    reads_self: ClassVar[bool] = False
    takes_regions: ClassVar[bool] = False
    needs_regions: ClassVar[bool] = False
    steerable: ClassVar[bool] = False

    def select(self, layers: Sequence[AttentionLayer], latent: tuple[int, int]) -> tuple[AttentionLayer, ...]:
        """The chosen layers whose maps have the chosen size."""
        return layers_of_size(select_layers(layers, self.layers), latent, self.size, NATIVE_SIZE, type(self).__name__)

    def begin(self, prompt: Prompt, steps: int) -> Any:
        """No state."""
        return None

    def direction(self, gradient: Tensor) -> Tensor:
        """The raw gradient."""
        return gradient
