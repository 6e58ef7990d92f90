"""Maps of concepts that are not in the prompt: words that the image is compared with while it is generated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import xarray as xr
from torch import Tensor

from elakit.attention.concept_readers import AtCall, Cross, Reader, Stream, TextPass
from elakit.attention.hooks import Hooks
from elakit.attention.layout import Size
from elakit.attention.spec import select_layers
from elakit.errors import RecordingError, SettingError
from elakit.measures.arrays import resize
from elakit.models import Adapter, AttentionLayer, adapter_for
from elakit.numbering import an_index
from elakit.pipeline import Pipeline
from elakit.prompt import Prompt


class ConceptMaps:
    """Maps of concepts (words that need not be in the prompt), from all runs inside one `map_concepts` block.

    `map_concepts` creates this object. The argument ``layers`` is the number of layers from which each denoiser call
    adds maps.

    Attributes
    ----------
    concepts : tuple of str
        The words that were given to `map_concepts`.
    kind : {"probability", "similarity"}
        Kind of the values. ``"probability"`` (cross-attention): the attention that a concept would get if it were
        appended to the prompt. ``"similarity"`` (joint attention): how similar the image is to a concept at a location,
        relative to the other concepts.
    """

    def __init__(self, concepts: Sequence[str], kind: str, layers: int) -> None:
        self.concepts = tuple(concepts)
        self.kind = kind
        self._layers = layers  # a denoiser call with fewer maps was interrupted
        self._timesteps: list[float] = []
        self._sums: list[dict[Size, tuple[np.ndarray, int]]] = []  # per step and size: sum over layers, their number

    def maps(self, image: int = 0, size: int | None = None) -> xr.DataArray:
        """Return one map per step and concept, the mean over the layers.

        Parameters
        ----------
        image : int
            Index of the image in the batch.
        size : int, optional
            Map size: number of locations along the longer side. Only layers with maps of this size are used. Default:
            all layers, resized to the largest map.

        Returns
        -------
        xarray.DataArray, (step, concept, y, x)
            float32, with the coordinate ``timestep(step)``. ``step`` counts the finished denoiser calls of the block
            from 0.

        Raises
        ------
        RecordingError
            Raised when no step was finished; when no map has this size; when the batch has no such image; or when the
            runs in the block have different numbers of images.
        """
        calls = [
            (timestep, found)
            for timestep, found in zip(self._timesteps, self._sums, strict=True)
            if sum(count for _, count in found.values()) == self._layers
        ]
        if not calls:
            raise RecordingError(
                "No maps of concepts were recorded: no step was finished inside the `with map_concepts(...)` block. "
                "Call the pipeline inside the block."
            )
        sizes = sorted((one for one in calls[0][1] if size is None or max(one) == size), reverse=True)
        if not sizes:
            there = ", ".join(f"{y}x{x}" for y, x in calls[0][1])
            raise RecordingError(
                f"size={size}: no maps of this size were recorded. Give the longer side of recorded maps: {there}."
            )
        batches = {len(total) for _, found in calls for total, _ in found.values()}
        if len(batches) > 1:
            raise RecordingError(
                f"The runs in the block have different numbers of images ({', '.join(map(str, sorted(batches)))}). Use "
                "one `with map_concepts(...)` block for each call of the pipeline."
            )
        images = batches.pop()
        if not -images <= image < images:
            raise RecordingError(f"image={image} was not recorded; give {an_index(images)}.")
        steps = []
        for _, found in calls:
            layers = sum(found[one][1] for one in sizes)
            steps.append(sum(resize(found[one][0][image], sizes[0]) for one in sizes) / np.float32(layers))
        return xr.DataArray(
            np.stack(steps),
            dims=("step", "concept", "y", "x"),
            coords={
                "step": np.arange(len(steps)),
                "timestep": ("step", [timestep for timestep, _ in calls]),
                "concept": list(self.concepts),
            },
            name=f"concept {self.kind}",
        )

    def begin(self, timestep: float) -> None:
        """Start collecting the maps of a new denoiser call, whose timestep is given."""
        self._timesteps.append(timestep)
        self._sums.append({})

    def add(self, maps: Tensor, size: Size) -> None:
        """Add the maps of one layer, (image, concept, h*w), to the denoiser call in progress; ``size`` is (h, w)."""
        values = maps.float().cpu().numpy().reshape(*maps.shape[:2], *size)
        total, count = self._sums[-1].get(size, (0, 0))
        self._sums[-1][size] = (total + values, count + 1)


@contextmanager
def map_concepts(
    pipe: Pipeline, prompt: Prompt | str, words: Sequence[str], *, layers: str | Sequence[str] = "all"
) -> Iterator[ConceptMaps]:
    """Compute maps of concepts for the runs inside the ``with`` block.

    Concepts are words or short phrases that need not be in the prompt. They do not influence the run: the image is the
    same, bit for bit, as without the block.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
        Pipeline of a supported family.
    prompt : Prompt or str
        The prompt that the pipeline is called with.
    words : sequence of str
        The concepts. Families with joint attention need at least two.
    layers : str or sequence of str
        Layers to average: ``"all"``, a place such as ``"up"``, a pattern of names, or several of these. `select_layers`
        describes them. If the model has double-stream blocks, its other layers are left out.

    Yields
    ------
    ConceptMaps
        The maps, which are complete at the end of the block. The run has no tokens for the concepts, so the values are
        not attention of the run. There are two kinds of values:

        * Cross-attention has the kind "probability". The value is the attention that a token of the concept would get
          if it were appended to the prompt: ``exp(s_c) / (sum_t exp(s_t) + exp(s_c))``. Here, ``s_c`` is the attention
          score of this token, and ``s_t`` are the scores of the prompt's tokens. The value is averaged over the heads
          and over the tokens of the concept.
        * Joint attention has the kind "similarity", computed by ConceptAttention. The concepts are a second text, which
          attends to itself and to the image. At each location, the dot product of the image's attention output with the
          attention output of each concept is computed, over all heads together. The values are the softmax of these
          products over the concepts.

    Raises
    ------
    SettingError
        Raised when no concept is given; when a family with joint attention is given only one concept; or when a concept
        is empty or contains brackets.
    RecordingError
        Raised when elakit cannot encode prompts for the pipeline's family; when a model has double-stream blocks, but
        ``layers`` selects none of them; and for the reasons listed in `elakit.record`.
    PromptError
        Raised when the prompt or a concept cannot be parsed.
    ModelError
        Raised when the pipeline's family is not supported.

    Notes
    -----
    In FLUX.1 and Stable Diffusion 3, a hook on each double-stream block computes the states of the concepts. In other
    families with joint attention, the denoiser runs a second time after each denoiser call, with the concepts as its
    text. In the second pass, the concepts attend to the image's keys and values from the first pass. The image that the
    second pass receives is therefore only a placeholder of one patch (in Qwen-Image, one row of patches).

    ConceptAttention was published for double-stream blocks. Z-Image, Lumina 2, CogView3-Plus and CogView4 have only
    single-stream blocks. For them, the definition is the same, with the projections that image and text share.

    References
    ----------
    Helbling et al., "ConceptAttention: diffusion transformers learn highly interpretable features" (ICML 2025)

    Examples
    --------
    >>> import elakit
    >>> from elakit.attention import map_concepts
    >>> pipe = elakit.load("picture-world")
    >>> prompt = elakit.parse("a [red car]", pipe)
    >>> with map_concepts(pipe, prompt, ["frog", "clock"]) as found:
    ...     image = pipe(prompt.text, num_inference_steps=2).images[0]
    >>> found.maps(size=16).sizes
    Frozen({'step': 2, 'concept': 2, 'y': 16, 'x': 16})
    """
    adapter = adapter_for(pipe)
    if not adapter.encodes:
        raise RecordingError(
            f"`map_concepts` does not support {adapter.family} yet. Put the concepts into the prompt, and record the "
            "run with `elakit.record`."
        )
    words = [words] if isinstance(words, str) else list(words)
    chosen = select_layers(adapter.layers(), layers)
    cross = all(layer.kind == "cross" for layer in chosen)
    if not words or (not cross and len(words) < 2):
        raise SettingError(
            f"words={words!r}: give at least {'one concept' if cross else 'two concepts, which are compared'}, such as "
            "['sky', 'tree']."
        )
    for word in words:
        if not word.strip() or any(bracket in word for bracket in "[]"):
            raise SettingError(f"words contains {word!r}; give words or short phrases without brackets, such as 'sky'.")
    kind, read = _reader_of(adapter, chosen, layers)
    found = ConceptMaps(words, "probability" if cross else "similarity", len(read))
    reader = kind(adapter, prompt, words, found.begin, found.add)
    with ExitStack() as stack:
        stack.callback(reader.close)
        hooks = stack.enter_context(Hooks())
        hooks.before(adapter.denoiser, reader.before_call)
        reader.place(read, hooks, stack)
        yield found


def _reader_of(
    adapter: Adapter, chosen: Sequence[AttentionLayer], asked: str | Sequence[str]
) -> tuple[type[Reader], Sequence[AttentionLayer]]:
    """Choose the class that computes the maps of concepts, and the layers that it reads.

    The layers are those of ``chosen``. If the model has double-stream blocks, all other layers are dropped. If none
    remains, a `RecordingError` is raised; its message quotes ``asked``, the selection of layers that the user gave.
    """
    at_call = any(layer.layout is not None for layer in chosen)
    if all(layer.kind == "cross" for layer in chosen):
        return (AtCall if at_call else Cross), chosen
    if any(layer.kind == "joint" for layer in adapter.layers()):
        chosen = [layer for layer in chosen if layer.kind == "joint"]
    if not chosen:
        example = next(layer.name for layer in adapter.layers() if layer.kind == "joint")
        raise RecordingError(
            f"{adapter.family} with layers={asked!r}: no double-stream block is selected, but in this model concepts "
            "are mapped in double-stream blocks only. Use layers='double', or names of layers in these blocks, such as "
            f"{example!r}."
        )
    return (TextPass if at_call else Stream), chosen
