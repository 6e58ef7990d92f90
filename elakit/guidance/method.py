"""Interface of guidance methods: a method reads attention, computes a loss, and says how far the latent moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from elakit.attention.rescoring import Change, Scores, Site
from elakit.errors import SettingError
from elakit.measures.arrays import nearest_size
from elakit.models import Adapter, AttentionLayer, Conditioning
from elakit.prompt import Prompt


@dataclass(frozen=True)
class Attention:
    """Attention of one image in one forward pass, differentiable.

    Attributes
    ----------
    cross : tuple of Tensor, each (head, token, y, x)
        Raw probabilities of the selected layers, in forward order: the share of a location's attention that each token
        gets.
    own : tuple of Tensor, each (head, y, x, y, x)
        Self-attention of the same blocks, for methods that ask for it (``reads_self``): from one location to all.

    Examples
    --------
    >>> layer = torch.tensor([[[[0.2]], [[0.8]]], [[[0.4]], [[0.6]]]])  # two heads, two tokens, one location
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
    """Loss of a method on the attention of one image.

    Attributes
    ----------
    total : Tensor, scalar
        Total loss, with its graph.
    terms : dict of str to float
        Named parts of the loss, for the trace.
    regions : ndarray, bool, (entity, y, x), optional
        Regions that the loss anchors to.
    goal : float, optional
        Value that refinement brings down to `Update.until`; by default the total.
    refinement : Tensor, scalar, optional
        Loss that the updates of a refinement follow; by default the total.
    enough : bool
        Whether nothing is left to fix: the image is not guided from this step on, and costs no more passes.
    """

    total: Tensor
    terms: dict[str, float]
    regions: np.ndarray | None = None
    goal: float | None = None
    refinement: Tensor | None = None
    enough: bool = False


@dataclass(frozen=True)
class Update:
    """Move of the latent before one denoising step.

    Attributes
    ----------
    size : float
        Step size along the method's direction; 0 for a step that is not guided.
    repeats : int
        Maximum number of further steps of that size before (refinement), each with a new gradient.
    until : float, optional
        Refinement ends once the loss (its `goal`, if it has one) is at most this value.
    final : bool
        Whether one step follows the refinement, whatever the loss is.
    hold : bool
        Whether attention scores are edited in the step (see `EditsScores`).
    """

    size: float
    repeats: int = 0
    until: float | None = None
    final: bool = True
    hold: bool = False


@dataclass(frozen=True, eq=False)
class ScoreEdit:
    """Edit of the attention scores of one image in one denoising step.

    Attributes
    ----------
    change : callable
        ``change(site, scores)`` returns the change of one layer's scores, or None; it is called as each layer runs, see
        `elakit.attention.rescoring.rescored`.
    regions : ndarray, bool, (entity, y, x), optional
        Regions for the trace; by default those of the loss.
    """

    change: Callable[[Site, Scores], Change | None]
    regions: np.ndarray | None = None


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
        """Layers that the loss reads, in forward order; latent is (h, w)."""

    def begin(self, prompt: Prompt, steps: int) -> Any:
        """State of one image in a run of `steps` steps (such as locked regions), passed to every call of `loss`."""

    def plan(self, noise: Sequence[float], prompt: Prompt) -> Sequence[Update]:
        """Moves before each step; `noise` is each step's ratio of noise to signal (standard deviations)."""

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: Any) -> Loss:
        """Loss on the attention of one image."""

    def direction(self, gradient: Tensor) -> Tensor:
        """Direction of the step of one image, given its gradient (raw, or normalized)."""


@runtime_checkable
class EditsScores(Protocol):
    """A method that also edits attention scores, in the steps whose `Update.hold` is True."""

    def hold(
        self, attention: Attention | None, size: tuple[int, int], prompt: Prompt, step: int, state: Any
    ) -> ScoreEdit | None:
        """Edit in one step for one image, or None, given the attention of the previous pass.

        It acts in the denoiser's own pass, and in the passes from which the step's gradient is taken, if there are any
        (`Site.gradient`). Before the first pass there is no attention; size is (rows, columns) of the maps that are
        read. `Method.loss` is called afterwards, with the attention of the edited pass.
        """


@runtime_checkable
class Encodes(Protocol):
    """A method that changes the text states of the whole run."""

    def encode(self, adapter: Adapter, prompt: Prompt, conditioning: Conditioning) -> Conditioning:
        """The prompt's text states as the method uses them, given those of the plain run."""


@runtime_checkable
class Rehearses(Protocol):
    """A method that looks at the first steps of a plain run, which then starts again from the same noise.

    Attributes
    ----------
    steps : int
        Number of plain steps.
    """

    @property
    def steps(self) -> int:
        """Number of plain steps."""

    def rehearse(self, passes: Sequence[Attention], prompt: Prompt, state: Any) -> None:
        """Note what one image's plain passes show; each has the mean over heads, self-attention if `reads_self`."""


@runtime_checkable
class NoiseSearch(Protocol):
    """A method that also chooses the initial noise of a run."""

    def search(
        self, noise: Tensor, attend: Callable[[Tensor], Attention], prompt: Prompt
    ) -> tuple[Tensor, Iterable[dict[str, Any]]]:
        """Better noise, one row of unit variance, and one row per trial for the trace.

        `attend` returns the attention of a pass from given noise at the first timestep, differentiable.
        """


def editor_of(method: Method, updates: Sequence[Update]) -> EditsScores | None:
    """The method, if its plan edits attention scores.

    Raises
    ------
    TypeError
        The plan edits scores, and the method does not say how.

    Examples
    --------
    >>> from elakit.guidance import RegionalAttention
    >>> method = RegionalAttention()
    >>> editor_of(method, [Update(0.0)]) is None, editor_of(method, [Update(0.0, hold=True)]) is method
    (True, True)
    """
    if not any(update.hold for update in updates):
        return None
    if not isinstance(method, EditsScores):
        raise TypeError(
            f"The plan of {type(method).__name__} has updates with hold=True, but the class has no method `hold`: add "
            "it (see elakit.guidance.method.EditsScores)."
        )
    return method


def layers_of_size(
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
    # Authors read the downward and upward layers; the middle block joins in where its maps have the same size.
    outer = {layer.factor for layer in layers if layer.place != "mid"} or set(sides)
    side = nearest_size((sides[factor] for factor in outer), native) if size is None else size
    factor = min(factor for factor in sides if sides[factor] == side)
    return tuple(layer for layer in layers if layer.factor == factor)
