"""Recordings of attention: probabilities with named dimensions, which can be selected, averaged, saved and opened."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from elakit.attention.aggregate import Normalize, layer_mean, normalized, refined, softmax
from elakit.attention.layout import Keys, node_name
from elakit.attention.spec import START, find_tokens, readable_bytes, runs, select_layers
from elakit.attention.zarr_store import is_recording, open_tree, save_tree
from elakit.checks import is_whole
from elakit.errors import OutputError, RecordingError, SettingError
from elakit.measures.arrays import nearest_size
from elakit.models.adapter import decoder_side
from elakit.numbering import an_index, number_of, plural
from elakit.prompt import Entity, Prompt


@dataclass(frozen=True)
class _Layer:
    name: str
    place: str


class Recording:
    """Attention of a run, as a tree of labeled arrays: one node per map size.

    Each node is named by its map size, such as ``"16x16"`` (rows x columns). The node contains the variable
    ``probability``, with dimensions (step, image, layer, head, y, x, token) and these coordinates:

    * ``step`` is the number of the denoiser call. ``timestep(step)`` is its timestep, and ``sigma(step)`` its noise
      level (nan if the scheduler has none).
    * ``layer`` is the name of the layer. ``place(layer)`` is the part of the denoiser, such as ``"up"``, and
      ``order(layer)`` the position in the forward pass.
    * ``head`` is ``"mean"``, or the index of the head.
    * ``token`` is the label of the token. ``token_index(token)`` is its position in the text encoder's sequence (-1 for
      ``"<end>"``).

    The label ``"<start>"`` is start-of-text. ``"<end>"`` is the sum over end-of-text and padding. Encoders without a
    start-of-text token, such as T5, have no ``"<start>"``. If every word is kept, the probabilities of all tokens at a
    location have a fixed sum. In cross-attention, this sum is 1. In joint attention, it is the share of attention that
    the text receives.

    ``RecordSpec(accumulate=True)`` keeps only the mean over the steps. This mean is stored as one step, with the number
    of the last call, the mean timestep and the mean sigma.

    ``RecordSpec(self_attention=16)`` adds a node such as ``"self-16x16"``. The dimension ``token`` of this node
    contains the locations that are attended to, with labels ``"row,column"``.

    A video has maps of each frame of its latent. In the tree, the frames of all videos follow each other along the
    dimension ``image``. The method `maps` returns the frames along a dimension of their own, ``frame``. The method
    `frame` selects one frame.

    Parameters
    ----------
    source : xarray.DataTree or callable
        The tree. For a run in progress, a function that returns the current tree.
    """

    def __init__(self, source: xr.DataTree | Callable[[], xr.DataTree]) -> None:
        self._source = source

    @property
    def tree(self) -> xr.DataTree:
        """The recorded arrays as an `xarray.DataTree`. The docstring of `Recording` describes its layout."""
        return self._source() if callable(self._source) else self._source

    def settle(self, tree: xr.DataTree) -> None:
        """Keep the final tree of a finished run, instead of the function that returned the tree during the run.

        The recording then holds no reference to the model, so that the model's memory can be freed.
        """
        self._source = tree

    @property
    def prompt(self) -> Prompt:
        """The prompt whose tokens are kept."""
        return Prompt.from_dict(json.loads(self.tree.attrs["prompt"]))

    @property
    def steps(self) -> tuple[int, ...]:
        """Numbers of the recorded denoiser calls, counted from 0."""
        return tuple(int(step) for node in self.nodes()[:1] for step in node["step"].values)

    @property
    def averaged(self) -> int:
        """Number of steps whose mean is kept as one step; 0 if every step is kept separately."""
        return int(self.tree.attrs.get("averaged", 0))

    @property
    def frames(self) -> int:
        """Number of frames of each video; 0 if images were recorded."""
        return int(self.tree.attrs.get("frames", 0))

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the recorded layers, in forward order."""
        return tuple(layer.name for layer in self._layers())

    @property
    def decoder(self) -> str:
        """Value of the argument ``layers`` with which `maps` reads only the decoder.

        The value is "up" for a U-Net. It is "all" for a transformer, because a transformer has no decoder.
        """
        return decoder_side(layer.place for layer in self._layers())

    @property
    def tokens(self) -> tuple[str, ...]:
        """Labels of the recorded tokens, including ``"<start>"`` and ``"<end>"``."""
        return tuple(str(token) for node in self.nodes()[:1] for token in node["token"].values)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Sizes of the recorded maps, (rows, columns), largest first."""
        return tuple(_size(node) for node in self.nodes())

    def sizes_of(self, layers: str | Sequence[str]) -> tuple[tuple[int, int], ...]:
        """Return the sizes of the maps of the given layers, (rows, columns), largest first.

        Parameters
        ----------
        layers : str or sequence of str
            ``"all"``, a place such as ``"up"``, a glob on names, or several of these (see `select_layers`).

        Raises
        ------
        RecordingError
            Raised when the recording has no such layer, or is empty.
        """
        return tuple(_size(node) for node in self._select(layers=layers, size=None, steps=None))

    def usual_size(self, layers: str | Sequence[str] | None = None) -> int:
        """Return the map size nearest to 16. Maps of entities and their regions are computed at this size.

        A map size is the longer side of a map. The size that differs from 16 by the smallest factor is the nearest. For
        example, the decoder of Stable Diffusion 1 and 2 has the map sizes 24, 48 and 96 at 768 x 768 pixels, so the
        result is 24.

        Parameters
        ----------
        layers : str or sequence of str, optional
            Layers whose map sizes are compared: ``"all"``, a place such as ``"up"``, a glob on names, or several of
            these (see `select_layers`). Default: the layers of the decoder, or all layers of a transformer.

        Raises
        ------
        RecordingError
            Raised when the recording has no such layer, or is empty.
        """
        return nearest_size(max(size) for size in self.sizes_of(self.decoder if layers is None else layers))

    @property
    def nbytes(self) -> int:
        """Size of all recorded probabilities in bytes, including those of self-attention."""
        return sum(node["probability"].nbytes for node in (*self.nodes(), *self.nodes("image")))

    def nodes(self, keys: Keys = "text") -> tuple[xr.Dataset, ...]:
        """Return the nodes of the tree, largest maps first. A node contains the attention at one map size.

        Parameters
        ----------
        keys : {"text", "image"}
            "text" returns the nodes with the attention to the text. "image" returns the nodes with self-attention.

        Returns
        -------
        tuple of xarray.Dataset
            One dataset per node; empty if no such attention was recorded.
        """
        nodes = [node.to_dataset() for node in self.tree.children.values()]
        return tuple(sorted((node for node in nodes if node.attrs["keys"] == keys), key=_size, reverse=True))

    def heads(self, layer: str) -> tuple[int, ...]:
        """Return the indices of the heads that were kept separately for a layer; empty if only their mean was kept.

        Raises
        ------
        RecordingError
            Raised when the layer was not recorded.
        """
        self._first()
        for node in self.nodes():
            if layer in node["layer"].values:
                return tuple(head for head in node["head"].values.tolist() if head != "mean")
        raise RecordingError(
            f"Layer {layer!r} was not recorded; give one of `recording.layers`, such as {self.layers[0]!r}."
        )

    # -- aggregation ---------------------------------------------------------------------------------------------

    def maps(
        self,
        tokens: Any = None,
        layers: str | Sequence[str] = "all",
        size: int | Sequence[int] | None = None,
        steps: int | slice | Sequence[int] | None = None,
        normalize: Normalize = None,
        image: int = 0,
        refine: int = 0,
    ) -> xr.DataArray:
        """Return the maps of tokens, averaged over layers and heads: one map per step and token.

        Parameters
        ----------
        tokens : str, int, Entity or a sequence of these, optional
            ``"entities"``: the noun of each entity, labeled as the entity. ``"attributes"``: each attribute word.
            Otherwise words, labels, phrases, entities or positions, as `Prompt.find` takes them. If a word, phrase or
            entity has several tokens, their maps are averaged. Default: every recorded token separately; with
            ``normalize="tokens"``, only the tokens of words.
        layers : str or sequence of str
            Layers to average: ``"all"``, a place such as ``"up"``, a glob on names, or several of these (see
            `select_layers`).
        size : int or sequence of int, optional
            Longer sides of the maps to use. Default: all sizes. Maps of several sizes are resized to the largest size.
        steps : int, slice or sequence of int, optional
            Numbers of the denoiser calls to use, counted from 0. Negative numbers count back from the last recorded
            call. Default: all recorded calls.
        normalize : {None, "sum", "max", "minmax", "tokens", "start"}
            None: raw probabilities. ``"sum"``: each map is divided by its sum over all locations. ``"max"``: each map
            is divided by its maximum. ``"minmax"``: each map is scaled to the range from 0 to 1; a constant map becomes
            zero. ``"tokens"``: at each location, the probabilities are multiplied by 100 and replaced by their softmax
            over the tokens of all words. Attend-and-Excite takes this softmax over all tokens but start-of-text.
            ``"start"``: each map is divided by the map of start-of-text. Encoders such as T5 have no start-of-text.
        image : int
            Index of the image, or of the video, in the batch.
        refine : int
            Number of times that the maps are multiplied by the recorded self-attention, before they are normalized.
            The multiplication sharpens the maps, because the locations of one object attend to each other. The result
            has the map size of the self-attention. The recording must contain self-attention
            (``RecordSpec(self_attention=16)``). The default 0 multiplies nothing.

        Returns
        -------
        xarray.DataArray, (step, token, y, x)
            float32, with the coordinates ``timestep(step)`` and ``sigma(step)``. If ``tokens`` is ``"entities"`` or
            ``"attributes"``, or contains `Entity` objects, the coordinate ``entity(token)`` has the labels of the
            entities. For videos, the dimensions are (step, token, frame, y, x).

        Raises
        ------
        RecordingError
            Raised when a token, layer, size, step, image or self-attention was not recorded.
        SettingError
            Raised when ``normalize`` is unknown or ``refine`` is negative.

        References
        ----------
        ``"tokens"``: Chefer et al., "Attend-and-Excite: attention-based semantic guidance for text-to-image diffusion
        models" (SIGGRAPH 2023). ``refine``: Wang et al., "Diffusion model is secretly a training-free open vocabulary
        semantic segmenter" (DiffSegmenter, 2023).

        Notes
        -----
        Every layer has the same weight. The maps of one size are averaged first. Their mean is then resized to the
        largest selected size, by bilinear interpolation.
        """
        if normalize not in (None, "sum", "max", "minmax", "tokens", "start"):
            raise SettingError(f"normalize is {normalize!r}; give None, 'sum', 'max', 'minmax', 'tokens' or 'start'.")
        groups = self._groups(tokens, normalize)
        needed = dict.fromkeys(channel for group in groups for channel in group.channels)
        if normalize == "start":
            needed |= dict.fromkeys(self._group(self.prompt, START).channels)
        elif normalize == "tokens":
            needed |= dict.fromkeys(self._all_words())
        channels = list(needed)
        picked = self._select(layers=layers, size=size, steps=steps)
        frames = [layer_mean(picked, channels, each) for each in self._places(image)]  # each (step, channel, y, x)
        values = np.stack(frames, axis=2) if self.frames else frames[0]
        if refine:
            if refine < 0:
                raise SettingError(
                    f"refine is {refine}; give 0 for unrefined maps, or the number of propagations through "
                    "self-attention, such as 1 or 2."
                )
            values = refined(values, self._self_node().sel(step=picked[0]["step"].values), image, refine)
        column = {channel: i for i, channel in enumerate(channels)}
        start = values[:, [column[START]]] if normalize == "start" else None
        if normalize == "tokens":
            words = [column[word] for word in self._all_words()]
            values[:, words] = softmax(100 * values[:, words], axis=1)
        merged = np.stack([values[:, [column[c] for c in g.channels]].mean(1) for g in groups], axis=1)
        coords: dict[str, Any] = {
            "step": picked[0]["step"],
            "timestep": picked[0]["timestep"],
            "sigma": picked[0]["sigma"],
            "token": [group.label for group in groups],
        }
        if any(group.entity for group in groups):
            coords["entity"] = ("token", [group.entity for group in groups])
        return xr.DataArray(
            normalized(merged, normalize, start),
            dims=("step", "token", "frame", "y", "x") if self.frames else ("step", "token", "y", "x"),
            coords=coords,
            name="probability" if normalize is None else f"attention ({normalize})",
            attrs={"normalize": normalize or "none", "image": image},
        )

    def _groups(self, tokens: Any, normalize: Normalize) -> list[_Group]:
        """Return the groups of recorded tokens that the arguments ``tokens`` and ``normalize`` of `maps` select.

        The maps of the tokens in one group are averaged to one map.
        """
        if tokens is None:
            kept = self._all_words() if normalize == "tokens" else self.tokens
            return [_Group(label, (label,)) for label in kept]
        prompt = self.prompt
        if isinstance(tokens, str) and tokens == "entities":
            groups = [_Group(e.label, self._channels(e.token_indices, e.label), e.label) for e in prompt.entities]
        elif isinstance(tokens, str) and tokens == "attributes":
            groups = [group for entity in prompt.entities for group in self._attribute_groups(prompt, entity)]
        else:
            single = isinstance(tokens, str | Entity) or is_whole(tokens)
            groups = [self._group(prompt, which) for which in ([tokens] if single else tokens)]
        if not groups:
            raise RecordingError(
                f"tokens={tokens!r} selects nothing in the prompt {prompt.text!r}. Give one or more words of the "
                "prompt."
            )
        groups = list({group.label: group for group in groups}.values())
        if normalize == "tokens":
            others = {channel for group in groups for channel in group.channels} - set(self._all_words())
            if others:
                raise RecordingError(
                    f"normalize='tokens' is a softmax over words, but the argument `tokens` includes "
                    f"{', '.join(sorted(others))}. Give only words in `tokens`, or use another normalization."
                )
        return groups

    def _group(self, prompt: Prompt, which: Any) -> _Group:
        if isinstance(which, str) and which in self.tokens:
            return _Group(which, (which,))
        if isinstance(which, Entity):
            return _Group(which.label, self._channels(which.token_indices, which.label), which.label)
        if is_whole(which):
            (label,) = self._channels((which,), which)
            return _Group(label, (label,))
        return _Group(str(which), self._channels(self._find(prompt, which), which))

    def _attribute_groups(self, prompt: Prompt, entity: Entity) -> list[_Group]:
        words: dict[int, list[Any]] = {}
        for token in prompt.tokens:
            if token.index in entity.attribute_indices:
                words.setdefault(token.word, []).append(token)
        groups = []
        for pieces in words.values():
            # The tokens of one word are labeled "giraffe/1", "giraffe/2", and the map of the word "giraffe". The same
            # holds for "giraffe@clip" and "giraffe@t5" of a text that two encoders read.
            label = pieces[0].label if len(pieces) == 1 else prompt.word_labels[pieces[0].word]
            groups.append(_Group(label, self._channels([piece.index for piece in pieces], label), entity.label))
        return groups

    def _find(self, prompt: Prompt, which: Any) -> tuple[int, ...]:
        try:
            return find_tokens(prompt, which)
        except RecordingError as error:
            raise RecordingError(f"{error} Recorded tokens: {', '.join(self.tokens)}.") from error

    def _channels(self, indices: Sequence[int], which: Any) -> tuple[str, ...]:
        """Return the labels of the recorded tokens at the text positions ``indices``.

        A `RecordingError` is raised if a position was not recorded. Its message quotes ``which``: the word, label or
        other argument that stands for these positions, or None for every word of the prompt.
        """
        node = self._first()
        pairs = zip(node["token_index"].values, node["token"].values, strict=True)
        by_index = {int(i): str(label) for i, label in pairs}
        missing = [i for i in indices if i not in by_index]
        if missing:
            what, remedy = f"{which!r} was", "Choose one of these"
            if which is None:
                what = "normalize='tokens' is a softmax over every word of the prompt, but some tokens were"
                remedy = "Choose another value of `normalize`"
            raise RecordingError(
                f"{what} not recorded ({plural('token position', len(missing))} "
                f"{', '.join(map(str, missing))}). Recorded tokens: {', '.join(self.tokens)}. {remedy}, or record the "
                "run again with RecordSpec(tokens=...)."
            )
        return tuple(by_index[i] for i in indices)

    def _all_words(self) -> tuple[str, ...]:
        indices = [token.index for token in self.prompt.tokens]
        return self._channels(indices, None)

    def self_attention(
        self,
        layers: str | Sequence[str] = "all",
        steps: int | slice | Sequence[int] | None = None,
        image: int = 0,
        head: int | None = None,
    ) -> xr.DataArray:
        """Return self-attention, averaged over layers and heads: the attention of each location to every location.

        Parameters
        ----------
        layers : str or sequence of str
            Layers to average: ``"all"``, a place such as ``"up"``, a glob on names, or several of these (see
            `select_layers`). If only the mean of the layers was recorded (``SelfAttention(each_layer=False)``), give
            ``"all"``, which then selects this mean.
        steps : int, slice or sequence of int, optional
            Numbers of the denoiser calls to return, counted from 0. Negative numbers count back from the last recorded
            call. Default: all recorded calls.
        image : int
            Index of the image in the batch.
        head : int, optional
            Index of one head, if the heads were kept separately. Default: the mean over the recorded heads.

        Returns
        -------
        xarray.DataArray, (step, y, x, y_key, x_key)
            float32. Each value is the attention of the location (y, x) to the location (y_key, x_key). The values of
            one location (y, x) sum to 1. In joint attention, these values sum to the share of attention that the image
            receives.

        Raises
        ------
        RecordingError
            Raised when self-attention, or the selected layer, step, head or image, was not recorded.
        """
        node = self._self_node()
        members = [_Layer(str(n), str(p)) for n, p in zip(node["layer"].values, node["place"].values, strict=True)]
        if layers != "all":
            names = [layer.name for layer in select_layers(members, layers)]
            node = node.isel(layer=[i for i, layer in enumerate(members) if layer.name in names])
        if head is not None:
            node = node.isel(head=_positions("head", [head], list(node["head"].values)))
        calls = list(self.steps)
        wanted = calls if steps is None else _calls(steps, calls)
        node = node.isel(step=_positions("step", wanted, calls))
        if not -node.sizes["image"] <= image < node.sizes["image"]:
            raise RecordingError(f"image={image} was not recorded; give {an_index(node.sizes['image'])}.")
        size = _size(node)
        values = node["probability"].isel(image=image).values.mean((1, 2), dtype=np.float32)
        return xr.DataArray(
            values.reshape(len(wanted), *size, *size),
            dims=("step", "y", "x", "y_key", "x_key"),
            coords={name: node[name] for name in ("step", "timestep", "sigma")},
            name="probability",
        )

    # -- selection -----------------------------------------------------------------------------------------------

    def frame(self, number: int) -> Recording:
        """Select one frame of each video; the result is a recording of images, for figures and measures.

        The result has no self-attention, because elakit does not record the self-attention of videos.

        Parameters
        ----------
        number : int
            Frame of the latent, counted from 0; negative numbers count from the last.

        Raises
        ------
        RecordingError
            Raised when images were recorded, or the frame does not exist.
        """
        self._first()
        if not -self.frames <= number < self.frames:
            there = (
                f"give {an_index(self.frames)}"
                if self.frames
                else "the recording is of images, not of videos; use it as it is"
            )
            raise RecordingError(f"There is no frame {number}: {there}.")
        chosen = slice(number % self.frames, None, self.frames)
        nodes = {node.attrs["size"]: node.isel(image=chosen) for node in self.nodes()}
        return self._with(nodes, frames=0)

    def sel(
        self,
        *,
        step: int | slice | Sequence[int] | None = None,
        layer: str | Sequence[str] = "all",
        size: int | Sequence[int] | None = None,
        token: Any = None,
        head: Any = None,
        image: int | Sequence[int] | None = None,
    ) -> Recording:
        """Select a part of the recording by labels.

        The result has all dimensions of the recording. A dimension with only one selected label has length 1. Recorded
        self-attention is selected only by ``step`` and ``image``; the other arguments leave it unchanged.

        Parameters
        ----------
        step : int, slice or sequence of int, optional
            Numbers of denoiser calls, counted from 0. Negative numbers count back from the last recorded call.
            Default: all recorded calls.
        layer : str or sequence of str
            ``"all"``, a place such as ``"up"``, a glob on names, or several of these (see `select_layers`).
        size : int or sequence of int, optional
            Longer sides of maps. Default: all.
        token : str, int, Entity or a sequence of these, optional
            Words, labels, phrases, entities or positions; ``"entities"`` or ``"attributes"``. Such a selection includes
            ``"<start>"`` and ``"<end>"`` only if they are named. Default: all recorded tokens.
        head : int or sequence of int, optional
            Indices of heads that were kept separately. Default: all.
        image : int or sequence of int, optional
            Indices of images, or of videos, in the batch. Default: all.

        Returns
        -------
        Recording

        Raises
        ------
        RecordingError
            Raised when a selected step, layer, size, token, head or image was not recorded. The message lists what was
            recorded.
        """
        labels = None if token is None else {c for group in self._groups(token, None) for c in group.channels}
        nodes = {}
        for node in self._select(layers=layer, size=size, steps=step):
            if labels is not None:
                node = node.isel(token=[i for i, t in enumerate(node["token"].values) if str(t) in labels])
            if head is not None:
                heads = list(node["head"].values)
                node = node.isel(head=_positions("head", [head] if np.isscalar(head) else head, heads))
            if image is not None:
                wanted: Any = [image] if np.isscalar(image) else image
                every = max(self.frames, 1)
                videos = _positions("image", wanted, list(range(node.sizes["image"] // every)))
                node = node.isel(image=[video * every + frame for video in videos for frame in range(every)])
            nodes[node.attrs["size"]] = node
        kept = next(iter(nodes.values()))["step"].values
        for node in self.nodes("image"):
            node = node.sel(step=kept)
            node = node if image is None else node.isel(image=[image] if np.isscalar(image) else image)
            nodes[node_name(_size(node), "image")] = node
        return self._with(nodes)

    def isel(self, **positions: int | slice | Sequence[int]) -> Recording:
        """Select a part of the recording by position along ``step``, ``image``, ``head`` or ``token``.

        Layers and locations cannot be selected by position, because they differ between map sizes. Select layers with
        `sel`, and locations in ``tree``. Recorded self-attention is selected only by ``step`` and ``image``.

        Parameters
        ----------
        **positions : int, slice or sequence of int
            Positions to select, by the name of the dimension. Negative positions count from the end. For videos,
            ``image`` is not allowed: select a video with `sel`, and a frame with `frame`.

        Returns
        -------
        Recording

        Raises
        ------
        RecordingError
            Raised when a dimension is not ``step``, ``image``, ``head`` or ``token``, when a position does not exist,
            or when ``image`` is given for videos.
        """
        indexers: dict[str, Any] = {}
        for dimension, where in positions.items():
            if dimension not in ("step", "image", "head", "token"):
                raise RecordingError(
                    f"isel takes step, image, head and token, not {dimension!r}; select layers and sizes by name with "
                    "sel(layer=..., size=...)."
                )
            if dimension == "image" and self.frames:
                raise RecordingError(
                    f"isel(image={where}) cannot select videos, because the dimension 'image' has all frames of all "
                    "videos. Select a video with sel(image=...), and a frame with frame(...)."
                )
            indexers[dimension] = [where] if is_whole(where) else where
        try:
            nodes = {node.attrs["size"]: node.isel(indexers) for node in self.nodes()}
            shared = {name: where for name, where in indexers.items() if name in ("step", "image")}
            own = {node_name(_size(node), "image"): node.isel(shared) for node in self.nodes("image")}
            return self._with(nodes | own)
        except IndexError as error:
            asked = ", ".join(f"{name}={where}" for name, where in positions.items())
            there = ", ".join(f"{number_of(self._first().sizes[name], 'position')} along {name}" for name in indexers)
            raise RecordingError(
                f"isel({asked}): a position is outside the recording, which has {there}. Positions count from 0; "
                "negative ones count from the end."
            ) from error

    def _select(self, *, layers: Any, size: Any, steps: Any) -> list[xr.Dataset]:
        """Return the recorded maps of the selected layers, map sizes and steps: one dataset per size, largest first."""
        self._first()
        names = {layer.name for layer in select_layers(self._layers(), layers)}
        nodes = list(self.nodes())
        if size is not None:
            wanted = {size} if is_whole(size) else set(size)
            there = {max(_size(node)) for node in nodes}
            if not wanted or wanted - there:
                missing = ", ".join(map(str, sorted(wanted - there)))
                reason = f"no maps of size {missing} were recorded" if missing else "no size is selected"
                raise RecordingError(
                    f"size={size}: {reason}. Give the longer side of recorded maps: "
                    f"{', '.join(node.attrs['size'] for node in nodes)}."
                )
            nodes = [node for node in nodes if max(_size(node)) in wanted]
        chosen = []
        for node in nodes:
            where = [i for i, name in enumerate(node["layer"].values) if str(name) in names]
            if where:
                chosen.append(node.isel(layer=where))
        if not chosen:
            elsewhere = ", ".join(
                f"{layer} ({node.attrs['size']})"
                for node in self.nodes()
                for layer in node["layer"].values
                if str(layer) in names
            )
            raise RecordingError(
                f"size={size}: the selected layers have maps of other sizes only: {elsewhere}. Give the longer side of "
                "these maps, or select other layers."
            )
        if steps is not None:
            calls = _calls(steps, self.steps)
            chosen = [node.isel(step=_positions("step", calls, list(self.steps))) for node in chosen]
        return chosen

    def _with(self, nodes: dict[str, xr.Dataset], **attributes: Any) -> Recording:
        tree = xr.DataTree.from_dict(dict(nodes))
        tree.attrs.update(self.tree.attrs | attributes)
        return Recording(tree)

    def _places(self, image: int) -> range:
        """Indices along the dimension ``image`` that belong to one image or, for videos, to all frames of one video."""
        every = max(self.frames, 1)
        images = self._first().sizes["image"] // every
        if not -images <= image < images:
            raise RecordingError(f"image={image} was not recorded; give {an_index(images)}.")
        first = image % images * every
        return range(first, first + every)

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write the recording as a Zarr store (a folder), whole or not at all.

        Parameters
        ----------
        path : str or pathlib.Path
            Folder to write. Missing parent folders are created.
        overwrite : bool
            True replaces an existing recording. Anything else at the path is never replaced.

        Returns
        -------
        pathlib.Path
            Path of the store.

        Raises
        ------
        OutputError
            Raised when the path cannot be written to, or already exists and may not be replaced.
        """
        return save_tree(self.tree, path, overwrite)

    # -- display ---------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        attrs = self.tree.attrs
        lines = [f"Recording of {self.prompt.text!r} ({attrs['model']})"]
        lines += [f"  {name}: {value}" for name, value in self._coverage()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        attrs = self.tree.attrs
        rows = "".join(
            f"<tr><th style='text-align:left'>{escape(name)}</th><td style='text-align:left'>{escape(value)}</td></tr>"
            for name, value in self._coverage()
        )
        return (
            f"<div><b>Recording</b> of <q>{escape(self.prompt.text)}</q> ({escape(str(attrs['model']))})"
            f"<table>{rows}</table></div>"
        )

    def _coverage(self) -> list[tuple[str, str]]:
        attrs, nodes = self.tree.attrs, self.nodes()
        if not nodes:
            return [("empty", "no step was recorded")]
        calls, expected = attrs["calls"], attrs["expected"]
        cut = (
            f" (cut off: {calls} of {expected} denoiser calls ran)"
            if expected and calls < expected
            else f" of {calls} denoiser calls"
        )
        kept = f"mean of {self.averaged}" if self.averaged else _ranges(self.steps)
        rows = [
            ("steps", kept + cut),
            (
                f"videos of {number_of(self.frames, 'frame')}" if self.frames else "images",
                str(nodes[0].sizes["image"] // max(self.frames, 1)),
            ),
            ("tokens", " ".join(self.tokens)),
        ]
        for node in nodes:
            places: dict[str, int] = {}
            for place in node["place"].values:
                places[str(place)] = places.get(str(place), 0) + 1
            heads = "head mean" if str(node["head"].values[0]) == "mean" else number_of(node.sizes["head"], "head")
            layers = ", ".join(f"{n} {place}" for place, n in places.items())
            rows.append(
                (
                    node.attrs["size"],
                    f"layers {layers}; {heads}; {readable_bytes(node['probability'].nbytes)}",
                )
            )
        rows += [
            (f"self-attention {node.attrs['size']}", readable_bytes(node["probability"].nbytes))
            for node in self.nodes("image")
        ]
        return [*rows, ("total", f"{readable_bytes(self.nbytes)}, {nodes[0]['probability'].dtype}")]

    # -- parts ---------------------------------------------------------------------------------------------------

    def _self_node(self) -> xr.Dataset:
        for node in self.nodes("image"):
            return node
        raise RecordingError(
            "No self-attention was recorded. Record the run again with RecordSpec(self_attention=16), where 16 is the "
            "longer side of the maps."
        )

    def _first(self) -> xr.Dataset:
        nodes = self.nodes()
        if not nodes:
            raise RecordingError(
                "The recording is empty: no step was finished inside the `with record(...)` block. Call the pipeline "
                "inside the block, in the same thread."
            )
        return nodes[0]

    def _layers(self) -> list[_Layer]:
        found = {}
        for node in self.nodes():
            columns = (node["layer"].values, node["place"].values, node["order"].values)
            for name, place, order in zip(*columns, strict=True):
                found[int(order)] = _Layer(str(name), str(place))
        return [found[order] for order in sorted(found)]


@dataclass(frozen=True)
class _Group:
    """Recorded tokens whose maps are averaged to one map.

    Attributes
    ----------
    label : str
        Label of the resulting map.
    channels : tuple of str
        Labels of the tokens.
    entity : str
        Label of the entity, if the tokens were selected as an entity or as an attribute of an entity; otherwise empty.
    """

    label: str
    channels: tuple[str, ...]
    entity: str = ""


def open_recording(path: str | Path) -> Recording:
    """Open a recording on disk; values are read when they are used.

    If the run was killed during the recording, the steps that had been written until then can be read.

    Parameters
    ----------
    path : str or pathlib.Path
        Folder that `Recording.save` or ``record(..., store=...)`` has written.

    Returns
    -------
    Recording

    Raises
    ------
    OutputError
        Raised when nothing exists at the path.
    RecordingError
        Raised when the folder is not a recording, when one of its files is missing or damaged, or when it has the
        format of an older or newer version of elakit.

    Examples
    --------
    >>> import elakit
    >>> from tempfile import TemporaryDirectory
    >>> run = elakit.generate(elakit.load("picture-world"), "a [red car]", steps=1, progress=False)
    >>> with TemporaryDirectory() as folder:
    ...     saved = run.recording.save(f"{folder}/car.zarr")
    ...     open_recording(f"{folder}/car.zarr").steps
    (0,)
    """
    source = Path(path).expanduser()
    if not source.exists():
        raise OutputError(
            f"No recording at {source}: the path does not exist. Give a folder written by `Recording.save` or "
            "`record(..., store=...)`."
        )
    if not is_recording(source):
        raise RecordingError(
            f"{source} is not a recording; give a folder written by `Recording.save` or `record(..., store=...)`."
        )
    return Recording(open_tree(source))


def _size(node: xr.Dataset) -> tuple[int, int]:
    return node.sizes["y"], node.sizes["x"]


def _calls(steps: int | slice | Sequence[int], there: Sequence[int]) -> list[int]:
    """Return the numbers of the denoiser calls that ``steps`` selects. ``there`` contains the recorded calls.

    Negative numbers in ``steps`` count back from the last recorded call.
    """
    last = max(there)
    if isinstance(steps, slice):
        chosen = set(range(last + 1)[steps])
        calls = [call for call in there if call in chosen]
        if not calls:
            raise RecordingError(f"step={steps} selects no recorded step; {_choices(there)}.")
        return calls
    wanted = [steps] if is_whole(steps) else list(steps)
    # A negative number that counts past the first step stays as it is, for the message.
    return [int(step) + (last + 1 if -last - 1 <= step < 0 else 0) for step in wanted]


def _positions(dimension: str, wanted: Any, there: list[Any]) -> list[int]:
    missing = [each for each in wanted if each not in there]
    if missing or not len(wanted):
        shown = ", ".join(map(str, missing))
        reason = "was not recorded" if missing else f"selects no recorded {dimension}"
        raise RecordingError(f"{dimension}={shown if len(missing) == 1 else f'[{shown}]'} {reason}; {_choices(there)}.")
    return [there.index(each) for each in wanted]


def _choices(there: Sequence[Any]) -> str:
    listed = _ranges(there) if all(map(is_whole, there)) else ", ".join(there)
    return f"choose from {listed}" if len(there) > 1 else f"only {listed} was recorded"


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers as text, in which ranges of consecutive numbers are joined: ``"0-4, 10, 15"``."""
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs(numbers))
