"""What a guidance method is: it reads attention, says what it loses, and how far the latent goes against that loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from elakit.errors import SettingError
from elakit.models import AttentionLayer
from elakit.prompt import Prompt


@dataclass(frozen=True)
class Attention:
    """Attention of one image in one pass, with its gradient.

    Attributes
    ----------
    cross : tuple of Tensor, each (head, token, y, x)
        Raw probabilities of the selected layers, in forward order: how much of each cell's attention each token gets.
    own : tuple of Tensor, each (head, y, x, y, x)
        Self-attention of the same blocks, for methods that ask for it (``reads_self``): from a cell, to all cells.

    Examples
    --------
    >>> layer = torch.tensor([[[[0.2]], [[0.8]]], [[[0.4]], [[0.6]]]])  # two heads, two tokens, one cell
    >>> Attention((layer,)).mean.flatten()
    tensor([0.3000, 0.7000])
    """

    cross: tuple[Tensor, ...]
    own: tuple[Tensor, ...] = ()

    @cached_property
    def mean(self) -> Tensor:
        """Cross-attention averaged over heads, then layers: (token, y, x)."""
        return _mean(self.cross, 2)

    @cached_property
    def own_mean(self) -> Tensor:
        """Self-attention averaged over heads, then layers: (y, x, y, x)."""
        return _mean(self.own, 2)


def _mean(layers: Sequence[Tensor], spatial: int) -> Tensor:
    sizes = {tuple(layer.shape[-spatial:]) for layer in layers}
    if len(sizes) != 1:
        raise SettingError(f"The layers read by guidance have maps of different sizes: {sorted(sizes)}. Set `size`.")
    return torch.stack([layer.mean(0) for layer in layers]).mean(0)


@dataclass(frozen=True)
class Loss:
    """What a method loses on the attention of one image.

    Attributes
    ----------
    total : Tensor, scalar
        Carries the gradient.
    terms : dict of str to float
        Its named parts, for the trace.
    regions : ndarray, bool, (entity, y, x), optional
        The regions it anchors to.
    goal : float, optional
        Value that refinement brings down to `Update.until`; by default the total.
    refinement : Tensor, scalar, optional
        Loss that the updates of a refinement follow; by default the total.
    enough : bool
        Nothing is left to fix: the image is left alone from here on, and costs no more passes.
    """

    total: Tensor
    terms: dict[str, float]
    regions: np.ndarray | None = None
    goal: float | None = None
    refinement: Tensor | None = None
    enough: bool = False


@dataclass(frozen=True)
class Update:
    """How the latent is moved before one denoising step.

    Attributes
    ----------
    size : float
        Step size along the method's direction; 0 leaves the step alone.
    repeats : int
        Further steps of that size taken first (refinement), each from a new gradient; at most so many.
    until : float, optional
        Refinement ends once the loss (its `goal`, if it has one) is not above this.
    final : bool
        Whether one step follows the refinement, however low the loss is.
    hold : bool
        Whether attention is held in the step's own pass (see `Holds`).
    """

    size: float
    repeats: int = 0
    until: float | None = None
    final: bool = True
    hold: bool = False


@dataclass(frozen=True)
class Hold:
    """Where in an image words may be attended to.

    Attributes
    ----------
    masks : ndarray, bool, (entity, y, x)
        At any resolution; an entity without a cell is not held.
    tokens : tuple of tuple of int
        Positions of each entity's words.
    strength : float
        Amount subtracted from the scores of an entity's words outside its mask.
    """

    masks: np.ndarray
    tokens: tuple[tuple[int, ...], ...]
    strength: float


class Method(Protocol):
    """Interface of a guidance method; methods are frozen dataclasses whose fields are their options.

    Attributes
    ----------
    name : str
        Key in `elakit.guidance.METHODS`, on the command line and in files, such as "attend-and-excite".
    title : str
        Name shown in figures, reports and widgets, such as "Attend-and-Excite".
    takes_regions, needs_regions : bool
        Whether the method has an option ``regions`` (one region per entity, given by hand), and whether that option
        is required.
    steerable : bool
        Whether regions can be changed during a run, through ``steer`` of the state (see `Anchors`).
    reads_self : bool
        Whether the loss reads self-attention, too.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    takes_regions: ClassVar[bool]
    needs_regions: ClassVar[bool]
    steerable: ClassVar[bool]
    reads_self: ClassVar[bool]

    def select(self, layers: Sequence[AttentionLayer], latent: tuple[int, int]) -> tuple[AttentionLayer, ...]:
        """The layers the loss reads, in forward order; latent is (h, w)."""

    def begin(self, prompt: Prompt, steps: int) -> Any:
        """State of one image's run of so many steps (such as locked regions), handed to every `loss` of it."""

    def plan(self, noise: Sequence[float], prompt: Prompt) -> Sequence[Update]:
        """What is done before each step; `noise` is each step's ratio of noise to signal (standard deviations)."""

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: Any) -> Loss:
        """Loss on one image's attention."""

    def direction(self, gradient: Tensor) -> Tensor:
        """The gradient of one image as it is stepped along (raw, or brought to a fixed length)."""


@runtime_checkable
class Holds(Protocol):
    """A method that also changes attention in the denoiser's own passes, where its plan says so."""

    def hold(
        self, attention: Attention | None, size: tuple[int, int], prompt: Prompt, step: int, state: Any
    ) -> Hold | None:
        """What is held in a step's pass of one image, or None, given the attention of the pass before it.

        Before the first pass there is none; size is (rows, columns) of the maps that are read. `Method.loss` is asked
        afterwards, with the attention of the pass that was held.
        """


@runtime_checkable
class NoiseSearch(Protocol):
    """A method that also chooses the noise a run starts from."""

    def search(
        self, noise: Tensor, attend: Callable[[Tensor], Attention], prompt: Prompt
    ) -> tuple[Tensor, Iterable[dict[str, Any]]]:
        """Better noise, one row of unit variance, and a row for the trace per trial.

        `attend` gives the attention of a pass from given noise at the first timestep; gradients flow.
        """


def nearest_size(
    layers: Sequence[AttentionLayer], latent: tuple[int, int], size: int | None, native: int, who: str
) -> tuple[AttentionLayer, ...]:
    """Layers whose maps' longer side is `size`, or by default the size of the outer blocks nearest to `native`.

    The middle block alone is never read by default: at 768 pixels Stable Diffusion's maps have 96, 48 and 24 rows in
    the downward and upward blocks and 12 in the middle one, and the authors' codes read the five layers of 24 rows.

    Parameters
    ----------
    layers : sequence of AttentionLayer
    latent : tuple of int
        (h, w).
    size : int, optional
        Must be there.
    native : int
        Side of the maps that a method's authors read.
    who : str
        Name of the method, for the message.

    Raises
    ------
    SettingError
        No layer has maps of that size.
    """
    sides = {layer.factor: -(-max(latent) // layer.factor) for layer in layers}
    if size is not None and size not in sides.values():
        raise SettingError(f"{who}(size={size}): the layers have maps of size {sorted(set(sides.values()))}.")
    wanted = size or native
    # Authors read the downward and upward layers; the middle block joins in where its maps have the same size.
    outer = {layer.factor for layer in layers if layer.place != "mid"} or set(sides)
    candidates = sides if size is not None else outer
    factor = min(candidates, key=lambda f: (abs(np.log(sides[f] / wanted)), f))
    return tuple(layer for layer in layers if layer.factor == factor)
