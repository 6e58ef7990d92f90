"""Interface of guidance methods: a method reads attention, computes a loss, and plans the latent steps."""

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
    """Attention maps of one image in one denoiser call, as differentiable tensors.

    Attributes
    ----------
    cross : tuple of Tensor, each (head, token, y, x)
        Raw probabilities of the selected layers, in forward order: the share of a location's attention that each token
        receives.
    own : tuple of Tensor, each (head, y, x, y, x)
        Self-attention of the same blocks: from each location (first y, x) to all locations (last y, x). Empty unless
        the method's `reads_self` is True.

    Raises
    ------
    SettingError
        `mean` or `own_mean` is read, and the layers have maps of different sizes.

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
        """Cross-attention averaged over heads, then over layers; (token, y, x)."""
        return _mean(self.cross, 2)

    @cached_property
    def own_mean(self) -> Tensor:
        """Self-attention averaged over heads, then over layers; (y, x, y, x)."""
        return _mean(self.own, 2)


def _mean(layers: Sequence[Tensor], spatial: int) -> Tensor:
    sizes = {tuple(layer.shape[-spatial:]) for layer in layers}
    if len(sizes) != 1:
        raise SettingError(
            f"The layers read by guidance have maps of different sizes: {sorted(sizes)}. Set the method's option "
            "`size`."
        )
    return torch.stack([layer.mean(0) for layer in layers]).mean(0)


@dataclass(frozen=True)
class Loss:
    """Loss of a method on the attention of one image.

    Attributes
    ----------
    total : Tensor, scalar
        Total loss, with its autograd graph.
    terms : dict of str to float
        Named parts of the loss, for the trace.
    regions : ndarray, bool, (entity, y, x), optional
        Regions of the entities, for the trace; None if the method has none.
    goal : float, optional
        Value that is compared with `Update.until`: refinement ends as soon as `goal` is at most `until`. By default
        `total` is compared.
    refinement : Tensor, scalar, optional
        Loss whose gradient the latent steps of a refinement follow; by default the total.
    enough : bool
        Whether the image needs no more guidance. If True, it is not guided from this step on, and needs no further
        gradient passes.
    """

    total: Tensor
    terms: dict[str, float]
    regions: np.ndarray | None = None
    goal: float | None = None
    refinement: Tensor | None = None
    enough: bool = False


@dataclass(frozen=True)
class Update:
    """Guidance of one denoising step: latent steps before it, edits of attention scores in it, or both.

    Attributes
    ----------
    size : float
        Step size: each latent step subtracts `size` times `Method.direction` from the latent. 0 if the latent is not
        moved.
    repeats : int
        Largest number of latent steps of the refinement, each with a new gradient; 0 for no refinement.
    until : float, optional
        Value of the loss (of `Loss.goal`, if there is one) at or below which refinement ends. By default it ends after
        `repeats` latent steps.
    final : bool
        Whether one more latent step follows the refinement, whatever the loss is. Without refinement, this latent step
        is the only one before the denoising step.
    hold : bool
        Whether attention scores are edited in the denoising step (see `EditsScores`).
    raw : bool
        Whether latent steps follow the raw gradient instead of the method's `direction`.
    """

    size: float
    repeats: int = 0
    until: float | None = None
    final: bool = True
    hold: bool = False
    raw: bool = False


@dataclass(frozen=True, eq=False)
class ScoreEdit:
    """Edit of the attention scores of one image in one denoising step.

    Attributes
    ----------
    change : callable
        ``change(site, scores)`` returns the change of one layer's scores, or None for no change. It is called each time
        a layer runs; see `elakit.attention.rescoring.rescored`.
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
        """Layers that the loss reads, of all `layers` and in their order; `latent` is (height, width) of the latent."""

    def begin(self, prompt: Prompt, steps: int) -> Any:
        """Initial state of one image in a run of `steps` steps, such as locked regions; each call of `loss` gets it."""

    def plan(self, noise: Sequence[float], prompt: Prompt) -> Sequence[Update]:
        """One update per denoising step, from the first on; steps after the last update are not guided.

        `noise` has one item per step of the run: the ratio of the standard deviations of noise and signal before that
        step.
        """

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: Any) -> Loss:
        """Loss on the attention of one image at a step, counted from 0; `state` is from `begin`."""

    def direction(self, gradient: Tensor) -> Tensor:
        """Direction of a latent step: `Update.size` times this vector is subtracted from one image's latent.

        The latent is scaled to unit variance, and `gradient` is the gradient of the loss with respect to this scaled
        latent. Methods return the gradient itself, or normalize it.
        """


@runtime_checkable
class EditsScores(Protocol):
    """Method that also edits attention scores, in the steps whose `Update.hold` is True."""

    def hold(
        self, attention: Attention | None, size: tuple[int, int], prompt: Prompt, step: int, state: Any
    ) -> ScoreEdit | None:
        """Edit of one image's scores in one step; None for no edit.

        The edit acts in the pipeline's denoiser call and in the passes from which the step's gradient is computed, if
        there are any (`Site.gradient` is True in these). `attention` is that of the previous denoiser call, None before
        the first one; `size` is (rows, columns) of the maps that are read. If the step does not move the latent,
        `Method.loss` is called after the denoiser call, with the attention of the edited call.
        """


@runtime_checkable
class Encodes(Protocol):
    """Method that changes the text states of the whole run."""

    def encode(self, adapter: Adapter, prompt: Prompt, conditioning: Conditioning) -> Conditioning:
        """Text states of the prompt for a run with this method; `conditioning` has those of a plain run."""


@runtime_checkable
class Rehearses(Protocol):
    """Method that first observes some steps of a plain run, before the guided run starts from the same noise.

    Attributes
    ----------
    steps : int
        Number of plain steps.
    """

    @property
    def steps(self) -> int:
        """Number of plain steps."""

    def rehearse(self, passes: Sequence[Attention], prompt: Prompt, state: Any) -> None:
        """Change `state`, that of one image, according to the attention of its plain steps.

        Each item of `passes` is the attention of one step, averaged over heads, with self-attention if `reads_self`.
        """


@runtime_checkable
class NoiseSearch(Protocol):
    """Method that also chooses the initial noise of a run."""

    def search(
        self, noise: Tensor, attend: Callable[[Tensor], Attention], prompt: Prompt
    ) -> tuple[Tensor, Iterable[dict[str, Any]]]:
        """Find the initial noise for one image; return it, and one dictionary per trial for the trace.

        `noise` is a batch of one image, of unit variance, and so is the result. ``attend(noise)`` returns the
        differentiable attention that this noise gives at the first timestep.
        """


def editor_of(method: Method, updates: Sequence[Update]) -> EditsScores | None:
    """Return the method if its plan edits attention scores, else None.

    Raises
    ------
    TypeError
        The plan edits scores, but the method has no `hold`.

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
    """Layers that a method reads: those with maps of a given size, by default the size nearest to the paper's.

    The size of a map is the number of locations along its longer side: the longer side of the latent divided by the
    layer's `factor`. For a latent of 64 x 96, a layer with factor 2 has maps of 32 x 48 locations, so their size is 48.

    The default size is chosen among the sizes in the downward and upward blocks of a U-Net. The middle block is read
    only if its maps have the chosen size, or if `layers` has no other layers. For example, the maps of Stable Diffusion
    2.x at 768 pixels have sizes 96, 48 and 24 in the downward and upward blocks and 12 in the middle block. The default
    for `native` 16 is then 24, as in the authors' code, although 12 is nearer to 16.

    Parameters
    ----------
    layers : sequence of AttentionLayer
        Layers to choose from.
    latent : tuple of int
        (height, width) of the latent.
    size : int, optional
        Size of the maps to read. By default, of the sizes in the downward and upward blocks, the one nearest to
        `native` is read.
    native : int
        Size of the maps that the method's paper reads.
    who : str
        Name of the method's class, for the message of the error.

    Returns
    -------
    tuple of AttentionLayer

    Raises
    ------
    SettingError
        None of the layers has maps of the given size; the message lists the sizes that there are.
    """
    sides = {layer.factor: -(-max(latent) // layer.factor) for layer in layers}
    if size is not None and size not in sides.values():
        *most, last = map(str, sorted(set(sides.values())))
        found = f"{', '.join(most)} or {last}" if most else last
        raise SettingError(
            f"{who}(size={size}): with this model and image size, the attention maps that the method can read have "
            f"{found} locations along their longer side. Set size to {'one of these numbers' if most else found}, or "
            "leave it out."
        )
    # Authors read the downward and upward layers; the middle block joins in where its maps have the same size.
    outer = {layer.factor for layer in layers if layer.place != "mid"} or set(sides)
    side = nearest_size((sides[factor] for factor in outer), native) if size is None else size
    factor = min(factor for factor in sides if sides[factor] == side)
    return tuple(layer for layer in layers if layer.factor == factor)


def check_method(value: Any, name: str = "guidance") -> Method:
    """Check that a value is a guidance method, and return it.

    Parameters
    ----------
    value : object
    name : str
        Name of the argument, for the message.

    Raises
    ------
    SettingError
        The value is the class or the name of a method, or has no loss, plan or selection of layers.

    Examples
    --------
    >>> check_method("ela")
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: guidance='ela' is not a guidance method; pass an instance, such as elakit.ELA().
    """
    if isinstance(value, type) or not all(hasattr(value, part) for part in ("loss", "plan", "select", "name")):
        raise SettingError(f"{name}={value!r} is not a guidance method; pass an instance, such as elakit.ELA().")
    method: Method = value
    return method
