"""Engine of all guidance methods: it runs gradient passes and moves the latent.

In a gradient pass, the denoiser runs with the prompt up to the last layer that the method reads. Then the gradient of
the method's loss with respect to the latent is computed. The latent is moved along the negative gradient.

A method defines the layers it reads, its loss and its step sizes (`elakit.guidance.method`). This module does the rest
in the same way for every method. The denoiser's weights are frozen, and its fused attention stays in use. Loss and
gradient are computed in at least float32. No gradient is computed outside the guided steps.

Before the first denoising step, the latent is moved through the pipeline's argument ``latents``. Before every later
step, the latent is moved in the pipeline's step callback. No pipeline's ``__call__`` is copied. Methods that edit
attention scores do so through `elakit.guidance.holding`. The edits act in the pipeline's own denoiser calls and in
gradient passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from elakit.attention import paused
from elakit.attention.rescoring import rescored
from elakit.attention.taps import Attend, tap
from elakit.errors import ModelError, SettingError
from elakit.guidance.holding import Holder
from elakit.guidance.metadata import options_of
from elakit.guidance.method import (
    Attention,
    Encodes,
    Loss,
    Method,
    NoiseSearch,
    Rehearses,
    ScoreEdit,
    Update,
    editor_of,
)
from elakit.guidance.trace import Trace
from elakit.models import Adapter, AttentionLayer, Conditioning, adapter_for
from elakit.models.device import compute_dtype
from elakit.pipeline import Pipeline
from elakit.prompt import Prompt

# fp16 gradients of a loss of order one underflow; scaling by a power of two is exact
_FP16_SCALE = 256.0
# smallest signal by which noise is divided
LEAST_SIGNAL = 2**-12  # diffusion; as in the sigmas of diffusers' Euler scheduler at a signal of 0
LEAST_FLOW_SIGNAL = 1e-3


class _Enough(Exception):
    """Raised to end a pass after the last layer that is read."""


ReadAttention = Callable[[Tensor, Tensor, Conditioning], list[Attention]]


@contextmanager
def reading(adapter: Adapter, layers: Sequence[AttentionLayer], *, reads_self: bool = False) -> Iterator[ReadAttention]:
    """Context that yields a function, which runs a conditional denoiser call and returns the attention of `layers`.

    The call ends at the last of `layers`. The attention is differentiable. Gradients must be computed inside the
    context, too, because with gradient checkpointing the backward pass repeats parts of the forward pass.

    Parameters
    ----------
    adapter : Adapter
    layers : sequence of AttentionLayer
        Layers to read, in forward order.
    reads_self : bool
        Whether the self-attention of the layers' blocks is read, too.

    Yields
    ------
    callable
        ``read(latents, timestep, conditioning)`` returns one `Attention` per image, with probabilities in float32 or
        float64. The latents are (n, c, h, w), or packed as the pipeline has them (FLUX), after the scheduler's
        ``scale_model_input``.

    Raises
    ------
    SettingError
        No layer is given; the layers' blocks have no self-attention to read; or gradient checkpointing is enabled for
        a model with layerwise casting.
    """
    if not layers:
        raise SettingError(
            "Guidance reads no attention layer: none of the model's layers matches the method's options `layers` and "
            "`size`. Choose other values, or leave both options out."
        )
    beside = adapter.self_layers(layers) if reads_self else ()
    cross: list[Tensor] = []  # per layer, (n, heads, token, y, x)
    own: list[Tensor] = []  # per layer, (n, heads, y, x, y, x)
    forward = False

    def collect(layer: AttentionLayer, attend: Attend, size: tuple[int, int]) -> None:
        attention = attend(slice(None)).unflatten(2, size)  # (n, heads, y, x, keys)
        if not forward:  # a checkpoint repeats parts of the pass for the backward pass, this attention included
            return
        if layer in beside:
            own.append(attention.unflatten(-1, size))
        else:
            cross.append(attention.movedim(-1, 2))
        if layer is layers[-1]:  # self-attention comes before it in its block
            raise _Enough

    def read(latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> list[Attention]:
        nonlocal forward
        cross.clear()
        own.clear()
        forward = True
        try:
            with suppress(_Enough):
                adapter.denoise(latents, timestep, conditioning)
        finally:
            forward = False
        return [
            Attention(tuple(layer[i] for layer in cross), tuple(layer[i] for layer in own)) for i in range(len(latents))
        ]

    with tap([*beside, *layers], collect), _weights_kept(adapter.denoiser):
        yield read


def _weights_kept(denoiser: nn.Module) -> AbstractContextManager[Any]:
    """Context in which the backward pass uses the same weights as the forward pass.

    With layerwise casting, a layer's weights are replaced by their 8-bit form as soon as the layer has run. Inside this
    context, autograd keeps the original weights for the backward pass.
    """
    if not any(weight.dtype.is_floating_point and weight.dtype.itemsize < 2 for weight in denoiser.parameters()):
        return nullcontext()
    if getattr(denoiser, "is_gradient_checkpointing", False):
        raise SettingError(
            "Gradients of a model with layerwise casting cannot be computed with gradient checkpointing, which repeats "
            "parts of a pass after their weights have been cast back to 8 bits. Guide without gradient checkpointing, "
            "or without layerwise casting."
        )
    return torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda kept: kept)


def gradient(
    adapter: Adapter,
    method: Method,
    prompt: Prompt,
    layers: Sequence[AttentionLayer],
    latents: Tensor,
    timestep: Tensor,
    conditioning: Conditioning,
    *,
    step: int = 0,
    states: Sequence[Any] | None = None,
    refining: Callable[[Loss], bool] | None = None,
) -> tuple[list[Loss], Tensor]:
    """Loss of a method for each image of a batch, and the gradient of each loss with respect to the latents.

    Parameters
    ----------
    adapter : Adapter
    method : Method
    prompt : Prompt
    layers : sequence of AttentionLayer
        Layers that the loss reads, in forward order.
    latents : Tensor, (n, c, h, w), or packed as the pipeline has them (FLUX)
        Latents of the scheduler, before its ``scale_model_input``.
    timestep : Tensor, scalar
    conditioning : Conditioning
    step : int
        Denoising step, counted from 0.
    states : sequence of n objects, optional
        State of each image, as `Method.begin` returns it; by default the state at the start of a run.
    refining : callable, optional
        ``refining(loss)`` returns True for an image whose next latent step belongs to a refinement. For this image, the
        gradient is that of `Loss.refinement`, or of the total loss if `Loss.refinement` is None. By default no latent
        step belongs to a refinement.

    Returns
    -------
    losses : list of Loss
        One per image.
    gradient : Tensor, of the latents' shape
        In float32 (float64 for float64 latents). The gradient of each image depends on this image alone. If no image
        needs more guidance, the gradients of all images are zero.

    Raises
    ------
    SettingError
        The attention of `layers` cannot be read; see `reading`.
    """
    if states is None:
        states = [method.begin(prompt, len(adapter.pipe.scheduler.timesteps)) for _ in latents]
    model_dtype = compute_dtype(adapter.denoiser)
    scale = _FP16_SCALE if model_dtype == torch.float16 else 1.0
    with torch.enable_grad(), reading(adapter, layers, reads_self=method.reads_self) as read:
        z = latents.detach().to(torch.promote_types(latents.dtype, torch.float32)).requires_grad_(True)
        attention = read(_scaled(adapter, z, timestep).to(model_dtype), timestep, conditioning)
        losses = [method.loss(a, prompt, step, state) for a, state in zip(attention, states, strict=True)]
        objectives = [
            loss.refinement if loss.refinement is not None and refining is not None and refining(loss) else loss.total
            for loss in losses
        ]
        total = torch.stack(objectives).sum()
        # A loss may be constant, without a graph.
        wanted = total.requires_grad and not all(loss.enough for loss in losses)
        grad = torch.autograd.grad(total * scale, z)[0] if wanted else torch.zeros_like(z)
    return losses, grad / scale


def _goal(loss: Loss) -> float:
    return float(loss.total.detach()) if loss.goal is None else loss.goal


def _scaled(adapter: Adapter, latents: Tensor, timestep: Tensor) -> Tensor:
    """Latents as the denoiser receives them, scaled by the scheduler; flow-matching schedulers do not scale."""
    scale = getattr(adapter.pipe.scheduler, "scale_model_input", None)
    return latents if scale is None else scale(latents, timestep)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Context in which no weight requires a gradient; the previous state is restored afterwards."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        # inside the try: an interrupt between two weights restores them, too
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def checkpointing(pipe: Pipeline) -> Iterator[None]:
    """Context in which guidance uses gradient checkpointing: less memory, more time.

    This is the gradient checkpointing of diffusers, one residual or transformer block at a time. Its previous state is
    restored afterwards, also after an error. Gradients do not change, and passes without gradients cost the same.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline

    Raises
    ------
    SettingError
        The model does not support gradient checkpointing.

    Examples
    --------
    >>> import elakit
    >>> pipe = elakit.load("picture-world")
    >>> with checkpointing(pipe):
    ...     run = elakit.generate(pipe, "a [bear] and a [red car]", seed=0, steps=4, guidance=elakit.ELA())
    >>> pipe.unet.is_gradient_checkpointing
    False
    """
    denoiser: Any = adapter_for(pipe).denoiser
    switches = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [(module, {name: vars(module).get(name) for name in switches}) for module in denoiser.modules()]
    try:
        denoiser.enable_gradient_checkpointing()
    except (AttributeError, ValueError) as error:
        raise SettingError(
            f"{type(denoiser).__name__} does not support gradient checkpointing: guide without "
            "elakit.guidance.checkpointing(...)."
        ) from error
    try:
        yield
    finally:
        for module, values in before:
            for name in vars(module).keys() & values:
                setattr(module, name, values[name])


def noise_levels(scheduler: Any) -> list[float]:
    """Ratio of noise to signal (standard deviations) at each timestep of a scheduler whose timesteps are set.

    A signal below a smallest value is replaced by this value, so that the ratio is always finite. The smallest value is
    0.001 for flow matching and IPNDM. For all other schedulers it is 1/4096, as in diffusers' own sigmas for a terminal
    signal-to-noise ratio of 0.

    Parameters
    ----------
    scheduler : diffusers.SchedulerMixin

    Returns
    -------
    list of float

    Raises
    ------
    ModelError
        The scheduler has neither sigmas nor the cumulative products of its alphas.

    Examples
    --------
    In flow matching, sigma is the noise, and 1 - sigma is the signal; a signal of 0 counts as 0.001:

    >>> from diffusers import FlowMatchEulerDiscreteScheduler
    >>> scheduler = FlowMatchEulerDiscreteScheduler()
    >>> scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.2])
    >>> [round(level, 2) for level in noise_levels(scheduler)]
    [1000.0, 1.0, 0.25]
    """
    timesteps = scheduler.timesteps
    if hasattr(scheduler, "precondition_outputs"):  # EDM: signal 1, noise sigma
        return [float(sigma) for sigma in scheduler.sigmas[: len(timesteps)]]
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None and not hasattr(scheduler, "sigmas") and hasattr(scheduler, "alphas"):  # IPNDM: noise in betas
        parts = zip(scheduler.betas[: len(timesteps)], scheduler.alphas[: len(timesteps)], strict=True)
        return [float(noise / signal.clamp_min(LEAST_FLOW_SIGNAL)) for noise, signal in parts]
    if alphas is None and not hasattr(scheduler, "sigmas"):
        raise ModelError(
            f"The noise levels of {type(scheduler).__name__} are not known, but guidance needs them. Replace the "
            "pipeline's scheduler, for example with elakit.load(model, scheduler='DDIMScheduler')."
        )
    if alphas is None or getattr(scheduler.config, "use_flow_sigmas", False):
        # Flow matching: signal 1 - sigma, noise sigma.
        return [float(s / (1 - s).clamp_min(LEAST_FLOW_SIGNAL)) for s in scheduler.sigmas[: len(timesteps)]]
    kept = alphas[timesteps.round().long().cpu().clamp(0, len(alphas) - 1)]
    return [float((1 - a).sqrt() / a.sqrt().clamp_min(LEAST_SIGNAL)) for a in kept]


def acts(updates: Sequence[Update]) -> bool:
    """True if a plan moves the latent or edits attention scores at any step."""
    return any(update.size or update.hold for update in updates)


def encoded(method: Method | None, adapter: Adapter, prompt: Prompt, conditioning: Conditioning) -> Conditioning:
    """Conditioning of a run with a method.

    `conditioning` is the conditioning of a plain run. It is returned unchanged, except in one case: the method changes
    text states, and the prompt has at least two entities.
    """
    if isinstance(method, Encodes) and len(prompt.entities) > 1:
        return method.encode(adapter, prompt, conditioning)
    return conditioning


class Guide:
    """Guidance of one run: it moves the latents before each guided step, and keeps one trace per image.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
        Pipeline whose scheduler is set to the run's timesteps.
    method : Method
    prompt : Prompt
    conditioning : Conditioning
    latent : tuple of int
        (height, width) of the latent.
    images : int
        Number of images in the batch.

    Attributes
    ----------
    updates : tuple of Update
        The method's plan.
    traces : list of Trace
        One per image.

    Raises
    ------
    SettingError
        The method's options `layers` and `size` match no layer of the model.
    """

    def __init__(
        self,
        pipe: Pipeline,
        method: Method,
        prompt: Prompt,
        conditioning: Conditioning,
        latent: tuple[int, int],
        images: int = 1,
    ) -> None:
        self.adapter = adapter_for(pipe)
        self.method, self.prompt, self.conditioning = method, prompt, conditioning
        self.layers = method.select(self.adapter.layers(), latent)
        scheduler = self.adapter.pipe.scheduler
        noise = noise_levels(scheduler)
        self.updates = tuple(method.plan(noise, prompt))
        self.images = images
        self.states = [method.begin(prompt, len(scheduler.timesteps)) for _ in range(images)]
        options, labels = options_of(method), tuple(e.label for e in prompt.entities)
        self.traces = [Trace(method.name, options, labels) for _ in range(images)]
        self.done: set[int] = set()  # images that are not guided any more
        self.left_alone: set[int] = set()  # those of them that were never to be guided
        self.editor = editor_of(method, self.updates)
        self.holder = None if self.editor is None else self._holder()
        rows, columns = (-(-side // self.layers[0].factor) for side in latent) if self.layers else (0, 0)
        self.map_size = rows, columns  # of the maps read

    def _holder(self) -> Holder:
        return Holder(self.adapter, self.layers, self.images, reads_self=self.method.reads_self)

    def holding(self) -> AbstractContextManager[None]:
        """Context for the pipeline's call, in which the method edits attention scores."""
        return nullcontext() if self.holder is None else self.holder()

    def rehearse(self, run: Callable[[Callable[[int], bool]], None]) -> bool:
        """Run the plain steps that the method observes before the guided run; return True if there are any.

        If the method observes no plain steps, `run` is not called.

        Parameters
        ----------
        run : callable
            ``run(enough)`` runs plain steps from the initial noise of the run. After each step it calls
            ``enough(step)``, with steps counted from 0. It ends as soon as ``enough(step)`` returns True.
        """
        method = self.method
        if not isinstance(method, Rehearses) or not acts(self.updates):
            return False
        holder = self._holder()
        passes: list[list[Attention]] = [[] for _ in range(self.images)]

        def enough(step: int) -> bool:
            for image, seen in enumerate(passes):
                seen.append(holder.attention(image))
            return step + 1 >= method.steps

        with holder():
            run(enough)
        for seen, state in zip(passes, self.states, strict=True):
            method.rehearse(seen, self.prompt, state)
        if self.holder is not None:
            self.holder.beside = ()  # what self-attention shows is known now
        return True

    def only(self, needed: Sequence[bool]) -> None:
        """From the next guided step on, guide only the images whose item in `needed` is True."""
        self.left_alone = {i for i, one in enumerate(needed) if not one}
        self.done |= self.left_alone

    def start(self, noise: Tensor, scale: float, timestep: Tensor) -> Tensor:
        """Initial noise of a run, changed by the method's search for noise (if any) and by its first latent step.

        Parameters
        ----------
        noise : Tensor, (n, c, h, w), or packed as the pipeline has it (FLUX)
            Noise of unit variance.
        scale : float
            Ratio of the scheduler's initial latents to the noise.
        timestep : Tensor, scalar
            First timestep.

        Returns
        -------
        Tensor, of the noise's shape
            The same object if the noise does not change.
        """
        method = self.method
        if isinstance(method, NoiseSearch) and len(self.prompt.entities) > 1:
            rows = range(len(noise))
            noise = torch.cat([self._search(method, noise[i : i + 1], scale, timestep, i) for i in rows])
        latents = noise * scale
        self._hold(0)
        moved = self.move(latents, 0, timestep)
        return noise if moved is latents else moved / scale

    def move(self, latents: Tensor, step: int, timestep: Tensor) -> Tensor:
        """Move the latents before denoising step `step` (counted from 0), which runs next, and return them.

        If no latent moves, the same object is returned.
        """
        update = self.updates[step] if step < len(self.updates) else Update(0.0)
        self.done -= {i for i in self.done - self.left_alone if getattr(self.states[i], "steered", False)}
        pending = [i for i in range(len(latents)) if i not in self.done]
        if not update.size or not pending:
            return latents
        began = time.perf_counter()
        unit = self._unit(latents, timestep)
        z = latents.detach().to(torch.promote_types(latents.dtype, torch.float32)).clone()
        last: dict[int, tuple[Loss, Tensor]] = {}
        refinements = [0] * len(z)
        part = pending  # images of a gradient pass
        with paused(self.adapter.pipe), frozen(self.adapter.denoiser), self._edited(step, lambda: part):
            for attempt in range(update.repeats + 1):

                def refining(loss: Loss, extra: bool = attempt < update.repeats) -> bool:
                    return extra and not (update.until is not None and _goal(loss) <= update.until)

                # one image per pass in refinement: repeated updates amplify the rounding of batched passes, until an
                # image of a batch differs visibly from that of a single run
                for part in [[i] for i in pending] if update.repeats else [pending]:
                    losses, grads = self._gradient(z[part], step, timestep, part, refining)
                    last |= zip(part, zip(losses, grads, strict=True), strict=True)
                going = []
                for i in pending:
                    loss, grad = last[i]
                    if loss.enough:
                        self.done.add(i)
                        continue
                    if refining(loss) and bool(torch.isfinite(grad).all()):
                        z[i] -= self._change(update, grad, unit)
                        refinements[i] += 1
                        going.append(i)
                pending = going
                if not pending:
                    break
        seconds = time.perf_counter() - began
        for i, (loss, grad) in last.items():
            finite, ended = bool(torch.isfinite(grad).all()), i in self.done
            stepped = update.final and finite and not ended
            if stepped:
                z[i] -= self._change(update, grad, unit)
            moves = stepped or refinements[i] > 0
            row = _row(
                step, timestep, loss, seconds,
                step_size=update.size if moves else 0.0,
                # in a batch, the gradient is also computed for images whose guidance has ended
                gradient_norm=0.0 if ended else float(grad.norm()) / unit,
                moved=float((z[i] - latents[i]).pow(2).mean().sqrt()) * unit,
                refinements=refinements[i],
                guided=moves or self._edits(step, i),
                skipped=not finite,
            )  # fmt: skip
            self.traces[i].add(row, loss.regions)
        # the same object, so that initial noise is not scaled back and forth, which would round it
        return latents if torch.equal(z, latents.to(z.dtype)) else z.to(latents.dtype)

    def _edits(self, step: int, image: int) -> bool:
        """True if the attention scores of an image are edited in a step."""
        return self.holder is not None and self.updates[step].hold and self.holder.held[image] is not None

    def _edited(self, step: int, images: Callable[[], Sequence[int]]) -> AbstractContextManager[None]:
        """Context in which the score edits of denoising step `step` also act in gradient passes.

        ``images()`` returns the indices of the images in the current gradient pass.
        """
        holder = self.holder
        if holder is None or not self.updates[step].hold:
            return nullcontext()
        return rescored(
            self.adapter,
            holder.changeable,
            lambda site, scores: holder.change(images()[site.image], site, scores),
            read=self.layers,
            gradient=True,
        )

    def _unit(self, latents: Tensor, timestep: Tensor) -> float:
        """Factor that scales the scheduler's latents to unit variance.

        The factor is less than 1 for Euler, LMS and Heun, and 1 for most other schedulers.
        """
        return float(_scaled(self.adapter, torch.ones((), device=latents.device), timestep))

    def _change(self, update: Update, gradient: Tensor, unit: float) -> Tensor:
        """Amount to subtract from the scheduler's latents z, whose scaled form u = unit * z has unit variance.

        `gradient` is with respect to z, but the step size is for u. The gradient is therefore divided by `unit`, which
        gives the gradient with respect to u. The resulting change of u is divided by `unit` to give the change of z.
        """
        along = gradient / unit
        return update.size * (along if update.raw else self.method.direction(along)) / unit

    def on_step_end(self, step: int, latents: Tensor) -> Tensor:
        """Return the latents for the next denoising step; they are moved if that step is guided.

        This method must be called after each denoising step. `step` is the step that has just run, counted from 0.
        """
        timesteps = self.adapter.pipe.scheduler.timesteps
        self._held(step, timesteps[step])
        following = step + 1
        if following == len(timesteps):
            return latents
        self._hold(following)
        return self.move(latents, following, timesteps[following])

    def _hold(self, step: int) -> None:
        """Set the edits of attention scores for denoising step `step`, which runs next."""
        if self.holder is None or self.editor is None:
            return
        held: list[ScoreEdit | None] = [None] * self.images
        pending = set(range(self.images)) - self.done
        if step < len(self.updates) and self.updates[step].hold:
            for i in pending:
                seen = self.holder.attention(i) if self.holder.seen else None
                held[i] = self.editor.hold(seen, self.map_size, self.prompt, step, self.states[i])
        # an edited pass is traced, and the pass before it shows where the entities are
        follows = any(update.hold for update in self.updates[step : step + 2])
        self.holder.hold(held, read=follows and bool(pending))

    def _held(self, step: int, timestep: Tensor) -> None:
        """Add a row to the trace of each image whose attention scores were edited in denoising step `step`.

        If the method moves the latents before this step, the trace already has a row for it, and no row is added.
        """
        if self.holder is None:
            return
        for i, one in enumerate(self.holder.held):
            if one is None or self.updates[step].size:  # a step that moved the latent has its row
                continue
            began = time.perf_counter()
            loss = self.method.loss(self.holder.attention(i), self.prompt, step, self.states[i])
            if loss.enough:
                self.done.add(i)
            regions = loss.regions if one.regions is None else one.regions
            self.traces[i].add(_row(step, timestep, loss, time.perf_counter() - began), regions)

    def _gradient(
        self,
        latents: Tensor,
        step: int,
        timestep: Tensor,
        images: Sequence[int],
        refining: Callable[[Loss], bool],
    ) -> tuple[list[Loss], Tensor]:
        return gradient(
            self.adapter, self.method, self.prompt, self.layers, latents, timestep, self.conditioning,
            step=step, states=[self.states[i] for i in images], refining=refining,
        )  # fmt: skip

    def _search(self, method: NoiseSearch, noise: Tensor, scale: float, timestep: Tensor, image: int) -> Tensor:
        model_dtype = compute_dtype(self.adapter.denoiser)
        with (
            paused(self.adapter.pipe),
            frozen(self.adapter.denoiser),
            torch.enable_grad(),
            reading(self.adapter, self.layers, reads_self=self.method.reads_self) as read,
        ):

            def attend(trial: Tensor) -> Attention:
                scaled = _scaled(self.adapter, trial * scale, timestep).to(model_dtype)
                return read(scaled, timestep, self.conditioning)[0]

            found, rows = method.search(noise.detach().float(), attend, self.prompt)
        self.traces[image].searched.extend(rows)
        return found.detach().to(noise.dtype)


def _row(
    step: int,
    timestep: Tensor,
    loss: Loss,
    seconds: float,
    *,
    step_size: float = 0.0,
    gradient_norm: float = 0.0,
    moved: float = 0.0,
    refinements: int = 0,
    guided: bool = True,
    skipped: bool = False,
) -> dict[str, Any]:
    """Row of the trace for one denoising step of one image.

    The defaults are those of a step in which attention scores are edited, but no gradient is computed.
    """
    return {
        "step": step,
        "timestep": float(timestep),
        "step_size": step_size,
        "loss": float(loss.total.detach()),
        **loss.terms,
        "gradient_norm": gradient_norm,
        "moved": moved,
        "refinements": refinements,
        "seconds": seconds,
        "guided": guided,
        "skipped": skipped,
    }
