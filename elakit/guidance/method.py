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
        Cross-attention of each layer that the method selects, in forward order. The values are raw probabilities: the
        share of a location's attention that each token receives.
    own : tuple of Tensor, each (head, y, x, y, x)
        Self-attention in the blocks of the selected layers: from each location (first y, x) to all locations (last y,
        x). Empty unless the method's attribute `reads_self` is True.

    Raises
    ------
    SettingError
        `mean` or `own_mean` is read, but the layers have maps of different sizes.

    Examples
    --------
    The mean over two heads, for two tokens at one location:

    >>> layer = torch.tensor([[[[0.2]], [[0.8]]], [[[0.4]], [[0.6]]]])
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
        """Self-attention from each location (first y, x) to all locations (last y, x); (y, x, y, x).

        The maps are averaged over heads, then over layers.
        """
        return _mean(self.own, 2)


def _mean(layers: Sequence[Tensor], spatial: int) -> Tensor:
    sizes = {tuple(layer.shape[-spatial:]) for layer in layers}
    if len(sizes) != 1:
        raise SettingError(
            "The layers that the method reads have maps of different sizes: "
            f"{', '.join(f'{y} x {x}' for y, x, *_ in sorted(sizes))} locations. Set the method's option `size` to the "
            f"longer side of the maps to read, such as size={max(min(sizes)[:2])}."
        )
    return torch.stack([layer.mean(0) for layer in layers]).mean(0)


@dataclass(frozen=True)
class Loss:
    """Loss of a method for one image at one step.

    Attributes
    ----------
    total : Tensor, scalar
        Loss whose gradient the latent steps follow, with its autograd graph.
    terms : dict of str to float
        Values of the terms of the loss, by name, for the trace.
    regions : ndarray, bool, (entity, y, x), optional
        Regions of the entities, for the trace; None if the method has no regions.
    goal : float, optional
        Number that ends a refinement as soon as it is at most `Update.until`; by default the value of `total`.
    refinement : Tensor, scalar, optional
        Loss whose gradient the latent steps of a refinement follow; by default `total`.
    enough : bool
        Whether the image needs no more guidance. If True, the guidance of the image ends at once: no further latent
        step is made, in this step or a later step.
    """

    total: Tensor
    terms: dict[str, float]
    regions: np.ndarray | None = None
    goal: float | None = None
    refinement: Tensor | None = None
    enough: bool = False


@dataclass(frozen=True)
class Update:
    """Guidance of one denoising step: latent steps before the denoising step, edits of its attention scores, or both.

    Attributes
    ----------
    size : float
        Step size: each latent step subtracts `size` times `Method.direction` from the latent. With 0, the latent does
        not move.
    repeats : int
        Largest number of latent steps in the refinement, each with a new gradient; 0 for no refinement.
    until : float, optional
        Goal of the refinement, which ends early if the loss is at or below `until`. `Loss.goal`, if given, takes the
        place of the loss. By default, all `repeats` latent steps are made.
    final : bool
        Whether one more latent step follows after the refinement, even if the refinement ended early. Without a
        refinement, this is the only latent step before the denoising step.
    hold : bool
        Whether `EditsScores.hold` edits attention scores in the denoising step.
    raw : bool
        Whether latent steps follow the raw gradient of the loss instead of `Method.direction`.
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
        Function that is called as ``change(site, scores)`` each time a layer runs. The function returns the change of
        the layer's scores, or None for no change; see `elakit.attention.rescoring.rescored`.
    regions : ndarray, bool, (entity, y, x), optional
        Regions that the trace stores for this step; by default the regions of the method's loss.
    """

    change: Callable[[Site, Scores], Change | None]
    regions: np.ndarray | None = None


class Method(Protocol):
    """Interface of a guidance method. A method is a frozen dataclass, and its fields are its options.

    Attributes
    ----------
    name : str
        Key in `elakit.guidance.METHODS`, on the command line and in files, such as "attend-and-excite".
    title : str
        Name shown in figures, reports and widgets, such as "Attend-and-Excite".
    takes_regions : bool
        Whether the method has an option ``regions``, with which the user gives one region per entity.
    needs_regions : bool
        Whether the option ``regions`` is required.
    steerable : bool
        Whether regions can be changed during a run. The state of an image then has a method ``steer``, as in `Anchors`.
    reads_self : bool
        Whether the loss also reads self-attention.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    takes_regions: ClassVar[bool]
    needs_regions: ClassVar[bool]
    steerable: ClassVar[bool]
    reads_self: ClassVar[bool]

    def select(self, layers: Sequence[AttentionLayer], latent: tuple[int, int]) -> tuple[AttentionLayer, ...]:
        """Layers that the loss reads, chosen from all `layers` of the model.

        The result keeps the order of `layers`. `latent` is the (height, width) of the latent.
        """

    def begin(self, prompt: Prompt, steps: int) -> Any:
        """State of one image at the start of a run of `steps` steps; None if the method keeps no state.

        The state may contain, for example, the regions of the entities. Each call of `loss` for the image receives the
        state.
        """

    def plan(self, noise: Sequence[float], prompt: Prompt) -> Sequence[Update]:
        """Plan of a run: one update per denoising step, beginning with the first step.

        Steps after the last update are not guided. `noise` has one number per step of the run: the ratio of noise to
        signal before the step. Noise and signal are measured by their standard deviations.
        """

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: Any) -> Loss:
        """Loss of one image at one step, computed from the attention of the image.

        `step` is the denoising step, counted from 0. `state` is the state of the image, from `begin`.
        """

    def direction(self, gradient: Tensor) -> Tensor:
        """Direction of a latent step of one image, computed from the gradient of the loss.

        A latent step subtracts `Update.size` times the direction from the latent. `gradient` is the gradient of the
        loss with respect to the latent. Direction and gradient refer to the latent scaled to unit variance. Methods
        return the gradient itself, or normalize the gradient.
        """


@runtime_checkable
class EditsScores(Protocol):
    """Interface of methods that also edit attention scores, in the steps whose `Update` has ``hold=True``."""

    def hold(
        self, attention: Attention | None, size: tuple[int, int], prompt: Prompt, step: int, state: Any
    ) -> ScoreEdit | None:
        """Edit of one image's attention scores in one denoising step; None for no edit.

        The edit acts in the pipeline's denoiser call. If the step also moves the latent, the edit acts in the denoiser
        calls that compute the gradient, too; `Site.gradient` is True in these calls. If the step does not move the
        latent, `Method.loss` is called after the pipeline's denoiser call, with the edited attention.

        Parameters
        ----------
        attention : Attention or None
            Attention of the image in the previous denoiser call; None before the first call.
        size : tuple of int
            (rows, columns) of the maps that the method reads.
        prompt : Prompt
        step : int
            Denoising step, counted from 0.
        state : object
            State of the image, from `Method.begin`.
        """


@runtime_checkable
class Encodes(Protocol):
    """Interface of methods that change the text states for the whole run."""

    def encode(self, adapter: Adapter, prompt: Prompt, conditioning: Conditioning) -> Conditioning:
        """Conditioning with the text states for a run with this method.

        `conditioning` has the text states of a plain run.
        """


@runtime_checkable
class Rehearses(Protocol):
    """Interface of methods that first observe some steps of a plain run.

    The guided run then starts from the same noise.

    Attributes
    ----------
    steps : int
        Number of plain steps that the method observes.
    """

    @property
    def steps(self) -> int:
        """Number of plain steps that the method observes before the guided run."""

    def rehearse(self, passes: Sequence[Attention], prompt: Prompt, state: Any) -> None:
        """Change the state of one image according to the attention in its plain steps.

        `passes` has the attention of each plain step, averaged over heads. Self-attention is included if the method's
        attribute `reads_self` is True. `state` is the state of the image, from `Method.begin`.
        `state` is changed in place.
        """


@runtime_checkable
class NoiseSearch(Protocol):
    """Interface of methods that also choose the initial noise of a run."""

    def search(
        self, noise: Tensor, attend: Callable[[Tensor], Attention], prompt: Prompt
    ) -> tuple[Tensor, Iterable[dict[str, Any]]]:
        """Find the initial noise for one image; return the noise, and one dictionary per trial for the trace.

        `noise` is the noise with which the run would start without the search. It is a batch of one image, with unit
        variance. The returned noise has the same shape and scale. ``attend(trial)`` returns the attention at the first
        timestep for the noise ``trial``; the attention is differentiable.
        """


def editor_of(method: Method, updates: Sequence[Update]) -> EditsScores | None:
    """Return the method if its plan edits attention scores, else None.

    Parameters
    ----------
    method : Method
    updates : sequence of Update
        Plan of the method. The plan edits attention scores if any update has ``hold=True``.

    Raises
    ------
    TypeError
        The plan edits attention scores, but the method has no function `hold`.

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
    """Layers that a method reads: all layers whose maps have the size `size`, by default the size nearest to `native`.

    The size of a map is the number of locations along its longer side. For a latent of 64 x 96, a layer with factor 2
    has maps of 32 x 48 locations, so their size is 48.

    The default considers only the downward and upward blocks of a U-Net: the size nearest to `native` is chosen from
    the sizes of the maps in these blocks. Layers of the middle block are read only if their maps have the chosen size.
    If `layers` has layers of the middle block alone, the size of their maps is chosen.

    For example, Stable Diffusion 2.x at 768 pixels has maps of sizes 96, 48 and 24 in the downward and upward blocks,
    and of size 12 in the middle block. For `native` 16, the default is 24, as in the authors' code, although 12 is
    nearer to 16.

    Parameters
    ----------
    layers : sequence of AttentionLayer
        Layers to choose from.
    latent : tuple of int
        (height, width) of the latent.
    size : int, optional
        Size of the maps to read; by default the size nearest to `native`, chosen as described above.
    native : int
        Size of the maps that the authors of the method read.
    who : str
        Name of the method's class, for the error message.

    Returns
    -------
    tuple of AttentionLayer

    Raises
    ------
    SettingError
        No layer has maps of size `size`. The message lists the available sizes.
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
    """Check that a value is a guidance method, and return the method.

    Parameters
    ----------
    value : object
        Value to check.
    name : str
        Name of the argument, for the error message.

    Returns
    -------
    Method
        The same object as `value`.

    Raises
    ------
    SettingError
        The value is a class, or lacks one of the attributes `loss`, `plan`, `select` and `name`.

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
