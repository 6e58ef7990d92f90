"""A recording: attention probabilities with named dimensions, to select, aggregate, save and open again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from elakit.attention.aggregate import Normalize, layer_mean, normalized, refined, softmax
from elakit.attention.spec import START, find_tokens, readable_bytes, runs, select_layers
from elakit.attention.store import SELF, is_recording, open_tree, save_tree
from elakit.errors import OutputError, RecordingError, SettingError
from elakit.models.adapter import decoder_side
from elakit.prompt import Entity, Prompt


@dataclass(frozen=True)
class _Layer:
    name: str
    place: str


class Recording:
    """Attention of a run, as a tree of labeled arrays: one node a map size.

    Each node, named by its size such as ``"16x16"`` (rows x columns), holds the variable ``probability`` with
    dimensions (step, image, layer, head, y, x, token) and the coordinates ``step`` (index of the denoiser call),
    ``timestep(step)``, ``sigma(step)`` (nan where the scheduler has none), ``layer`` (names), ``place(layer)``,
    ``order(layer)`` (position in the forward pass), ``head`` (``"mean"``, or numbers), ``token`` (labels) and
    ``token_index(token)`` (position in the text encoder's sequence; -1 for ``"<end>"``).

    ``"<start>"`` is start-of-text and ``"<end>"`` the summed mass of end-of-text and padding, so with every word kept
    the tokens of a position sum to 1 (in joint attention, to the share that the text gets beside the image). Encoders
    without a start-of-text token, such as T5, have no ``"<start>"``. A mean over steps
    (``RecordSpec(accumulate=True)``) stands as one step, the last call's, with the means of timestep and sigma.

    ``RecordSpec(self_attention=16)`` adds a node such as ``"self-16x16"``, the mean self-attention, whose ``token`` are
    the cells that are attended to (``"row,column"``).

    Parameters
    ----------
    source : xarray.DataTree or callable
        The tree, or what gives the tree as it is now (a run in progress).
    """

    def __init__(self, source: xr.DataTree | Callable[[], xr.DataTree]) -> None:
        self._source = source

    @property
    def tree(self) -> xr.DataTree:
        """The arrays; see the class for their layout. Plain xarray, with everything that it offers."""
        return self._source() if callable(self._source) else self._source

    def settle(self, tree: xr.DataTree) -> None:
        """Hold this tree for good (the recorder calls it at the end, so that a recording keeps no model alive)."""
        self._source = tree

    @property
    def prompt(self) -> Prompt:
        """The prompt whose tokens are kept."""
        return Prompt.from_dict(json.loads(self.tree.attrs["prompt"]))

    @property
    def steps(self) -> tuple[int, ...]:
        """Denoiser calls kept, counted from 0."""
        return tuple(int(step) for node in self._nodes()[:1] for step in node["step"].values)

    @property
    def averaged(self) -> int:
        """Steps whose mean is kept as one; 0 where each is kept."""
        return int(self.tree.attrs.get("averaged", 0))

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in forward order."""
        return tuple(layer.name for layer in self._layers())

    @property
    def decoder(self) -> str:
        """Layers in which the image takes shape, as `maps` takes them: "up", or "all" of a model without sides."""
        return decoder_side(layer.place for layer in self._layers())

    @property
    def tokens(self) -> tuple[str, ...]:
        """Labels of the tokens kept, ``"<start>"`` and ``"<end>"`` included."""
        return tuple(str(token) for node in self._nodes()[:1] for token in node["token"].values)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Map sizes (rows, columns), largest first."""
        return tuple(_size(node) for node in self._nodes())

    @property
    def nbytes(self) -> int:
        """Bytes of the probabilities."""
        return sum(node["probability"].nbytes for node in [*self._nodes(), *self._self_nodes().values()])

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
        """Token maps: the mean over layers and heads, one map a step and token.

        Parameters
        ----------
        tokens : str, int, Entity or a sequence of these, optional
            ``"entities"`` (each entity's noun, under the entity's label) and ``"attributes"`` (each attribute word),
            or words, labels, phrases and positions as `Prompt.find` takes them; pieces of one word are averaged.
            Default: everything that was kept, each token by itself.
        layers : str or sequence of str
            As in `select_layers`.
        size : int or sequence of int, optional
            Only maps whose larger side is one of these.
        steps : int, slice or sequence of int, optional
            Denoiser calls: one, several, or a slice of their numbers (negative counts from the last call recorded).
        normalize : {None, "sum", "max", "minmax", "tokens", "start"}
            None: raw probability. ``"sum"``, ``"max"``, ``"minmax"``: over space, each map by itself (a map of zeros
            stays so, as does a constant one under "minmax"). ``"tokens"``: softmax of 100 x the map over all words of
            the prompt, as Attend-and-Excite prepares its maps. ``"start"``: divided by the start-of-text map, where
            there is one.
        image : int
            Which of the images drawn at once.
        refine : int
            Spread the maps so many times along the self-attention that was kept
            (``RecordSpec(self_attention=16)``), and at its size: cells of one object attend to each other. Comes before
            any normalization.

        Returns
        -------
        xarray.DataArray, (step, token, y, x)
            float32, with ``timestep(step)`` and ``sigma(step)``; ``"entities"`` and ``"attributes"`` also have
            ``entity(token)``.

        Raises
        ------
        RecordingError
            When a token, layer, size, step or image was not recorded; the message lists what is there.

        Notes
        -----
        Every layer weighs the same. Layers of one size are averaged first; the mean of each size is then resized to
        the largest selected one: bilinear where it grows, area mean where it shrinks.
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
        images = picked[0].sizes["image"]
        if not -images <= image < images:
            raise RecordingError(f"Image {image} was not recorded; there are {images} (0 to {images - 1}).")
        values = layer_mean(picked, channels, image)  # (step, channel, y, x)
        if refine:
            values = refined(values, self._self_node(picked[0]["step"].values, refine), image, refine)
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
            dims=("step", "token", "y", "x"),
            coords=coords,
            name="probability" if normalize is None else f"attention ({normalize})",
            attrs={"normalize": normalize or "none", "image": image},
        )

    def _groups(self, tokens: Any, normalize: Normalize) -> list[_Group]:
        """What becomes one map each: a label and the channels that are averaged."""
        if tokens is None:
            kept = self._all_words() if normalize == "tokens" else self.tokens
            return [_Group(label, (label,)) for label in kept]
        prompt = self.prompt
        if isinstance(tokens, str) and tokens == "entities":
            groups = [_Group(e.label, self._channels(e.token_indices, e.label), e.label) for e in prompt.entities]
        elif isinstance(tokens, str) and tokens == "attributes":
            groups = [group for entity in prompt.entities for group in self._attribute_groups(prompt, entity)]
        else:
            single = isinstance(tokens, (str, int, Entity))
            groups = [self._group(prompt, which) for which in ([tokens] if single else tokens)]
        if not groups:
            raise RecordingError(f"tokens={tokens!r} names nothing in the prompt {prompt.text!r}.")
        groups = list({group.label: group for group in groups}.values())
        if normalize == "tokens":
            others = {channel for group in groups for channel in group.channels} - set(self._all_words())
            if others:
                raise RecordingError(
                    f"normalize='tokens' is a softmax over words; {', '.join(sorted(others))} takes no part in it."
                )
        return groups

    def _group(self, prompt: Prompt, which: Any) -> _Group:
        if isinstance(which, str) and which in self.tokens:
            return _Group(which, (which,))
        if isinstance(which, Entity):
            return _Group(which.label, self._channels(which.token_indices, which.label), which.label)
        if isinstance(which, int):
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
            # A word of several pieces is labeled "giraffe/1", "giraffe/2"; together they are "giraffe". So are
            # "giraffe@clip" and "giraffe@t5" of a text that is read twice.
            label = pieces[0].label if len(pieces) == 1 else re.sub(r"(?<=.)(/\d+)?(@\w+)?$", "", pieces[0].label)
            groups.append(_Group(label, self._channels([piece.index for piece in pieces], label), entity.label))
        return groups

    def _find(self, prompt: Prompt, which: Any) -> tuple[int, ...]:
        try:
            return find_tokens(prompt, which)
        except RecordingError as error:
            raise RecordingError(f"{error} Recorded: {', '.join(self.tokens)}.") from error

    def _channels(self, indices: Sequence[int], which: Any) -> tuple[str, ...]:
        """Labels of token positions; refuses positions that were not kept."""
        node = self._first()
        pairs = zip(node["token_index"].values, node["token"].values, strict=True)
        by_index = {int(i): str(label) for i, label in pairs}
        missing = [i for i in indices if i not in by_index]
        if missing:
            raise RecordingError(
                f"{which!r} was not recorded (token position {', '.join(map(str, missing))}). Recorded: "
                f"{', '.join(self.tokens)}. Record it with RecordSpec(tokens=...)."
            )
        return tuple(by_index[i] for i in indices)

    def _all_words(self) -> tuple[str, ...]:
        indices = [token.index for token in self.prompt.tokens]
        return self._channels(indices, "normalize='tokens' (a softmax over every word of the prompt)")

    # -- selection -----------------------------------------------------------------------------------------------

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
        """A smaller recording, chosen by labels; every dimension stays.

        Parameters
        ----------
        step, layer, size
            As ``steps``, ``layers`` and ``size`` of `maps`.
        token : str, int, Entity or a sequence of these, optional
            As in `maps`; start-of-text and the end mass go with it only when named.
        head : int or sequence of int, optional
        image : int or sequence of int, optional

        Raises
        ------
        RecordingError
            When something was not recorded; the message lists what is there.
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
                images = list(range(node.sizes["image"]))
                node = node.isel(image=_positions("image", [image] if np.isscalar(image) else image, images))
            nodes[node.attrs["size"]] = node
        kept = next(iter(nodes.values()))["step"].values
        for name, node in self._self_nodes().items():
            node = node.sel(step=kept)
            nodes[name] = node if image is None else node.isel(image=[image] if np.isscalar(image) else image)
        return self._with(nodes)

    def isel(self, **positions: int | slice | Sequence[int]) -> Recording:
        """A smaller recording, chosen by position along ``step``, ``image``, ``head`` or ``token``.

        Layers and cells differ from one map size to the next; choose those with `sel` or on ``tree``.

        Raises
        ------
        RecordingError
            On another dimension, or a position that is not there.
        """
        indexers: dict[str, Any] = {}
        for dimension, where in positions.items():
            if dimension not in ("step", "image", "head", "token"):
                raise RecordingError(
                    f"isel takes step, image, head and token, not {dimension!r}; choose layers and sizes by name with "
                    "sel(layer=..., size=...)."
                )
            indexers[dimension] = [where] if isinstance(where, (int, np.integer)) else where
        try:
            nodes = {node.attrs["size"]: node.isel(indexers) for node in self._nodes()}
            shared = {name: where for name, where in indexers.items() if name in ("step", "image")}
            return self._with(nodes | {name: node.isel(shared) for name, node in self._self_nodes().items()})
        except IndexError as error:
            there = {name: self._first().sizes[name] for name in indexers}
            raise RecordingError(f"Position outside the recording, which has {there}: {positions}.") from error

    def _select(self, *, layers: Any, size: Any, steps: Any) -> list[xr.Dataset]:
        """Nodes with the chosen layers and steps, largest first."""
        self._first()
        names = {layer.name for layer in select_layers(self._layers(), layers)}
        nodes = self._nodes()
        if size is not None:
            wanted = {size} if isinstance(size, (int, np.integer)) else set(size)
            there = {max(_size(node)) for node in nodes}
            if not wanted or wanted - there:
                raise RecordingError(
                    f"Size {', '.join(map(str, sorted(wanted - there))) or 'list is empty'}: not recorded. There are "
                    f"{', '.join(node.attrs['size'] for node in nodes)}; give the larger side, such as {max(there)}."
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
                for node in self._nodes()
                for layer in node["layer"].values
                if str(layer) in names
            )
            raise RecordingError(f"The layers chosen have no maps of size {size}; they are: {elsewhere}.")
        if steps is not None:
            calls = _calls(steps, self.steps)
            chosen = [node.isel(step=_positions("step", calls, list(self.steps))) for node in chosen]
        return chosen

    def _with(self, nodes: dict[str, xr.Dataset]) -> Recording:
        tree = xr.DataTree.from_dict(dict(nodes))
        tree.attrs.update(self.tree.attrs)
        return Recording(tree)

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write the recording as a Zarr store (a folder), whole or not at all.

        Parameters
        ----------
        path : str or pathlib.Path
            Parents are made.
        overwrite : bool
            Replace a recording that is there; anything else is never replaced.

        Returns
        -------
        pathlib.Path

        Raises
        ------
        OutputError
            When the path is taken or cannot be written.
        """
        return save_tree(self.tree, path, overwrite)

    # -- looks ---------------------------------------------------------------------------------------------------

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
        attrs, nodes = self.tree.attrs, self._nodes()
        if not nodes:
            return [("empty", "no step was recorded")]
        calls, expected = attrs["calls"], attrs["expected"]
        cut = f" (cut off: {calls} of {expected} calls ran)" if expected and calls < expected else f" of {calls} calls"
        kept = f"mean of {self.averaged}" if self.averaged else _ranges(self.steps)
        rows = [
            ("steps", kept + cut),
            ("images", str(nodes[0].sizes["image"])),
            ("tokens", " ".join(self.tokens)),
        ]
        for node in nodes:
            places: dict[str, int] = {}
            for place in node["place"].values:
                places[str(place)] = places.get(str(place), 0) + 1
            heads = "head mean" if str(node["head"].values[0]) == "mean" else f"{node.sizes['head']} heads"
            layers = ", ".join(f"{n} {place}" for place, n in places.items())
            rows.append(
                (
                    node.attrs["size"],
                    f"layers {layers}; {heads}; {readable_bytes(node['probability'].nbytes)}",
                )
            )
        rows += [
            (f"self-attention {node.attrs['size']}", readable_bytes(node["probability"].nbytes))
            for node in self._self_nodes().values()
        ]
        return [*rows, ("in all", f"{readable_bytes(self.nbytes)}, {nodes[0]['probability'].dtype}")]

    # -- parts ---------------------------------------------------------------------------------------------------

    def _nodes(self) -> list[xr.Dataset]:
        nodes = [node.to_dataset() for name, node in self.tree.children.items() if not name.startswith(SELF)]
        return sorted(nodes, key=_size, reverse=True)

    def _self_nodes(self) -> dict[str, xr.Dataset]:
        return {name: node.to_dataset() for name, node in self.tree.children.items() if name.startswith(SELF)}

    def _self_node(self, steps: np.ndarray, refine: int) -> xr.Dataset:
        """Self-attention of these steps."""
        if refine < 0:
            raise SettingError(f"refine is {refine}; give 0 for maps as they are, or how often to spread them: 1, 2.")
        for node in self._self_nodes().values():
            return node.sel(step=steps)
        raise RecordingError(
            "No self-attention was recorded, which refine needs; record it with RecordSpec(self_attention=16)."
        )

    def _first(self) -> xr.Dataset:
        nodes = self._nodes()
        if not nodes:
            raise RecordingError("The recording is empty: no step was finished inside the `with record(...)` block.")
        return nodes[0]

    def _layers(self) -> list[_Layer]:
        found = {}
        for node in self._nodes():
            columns = (node["layer"].values, node["place"].values, node["order"].values)
            for name, place, order in zip(*columns, strict=True):
                found[int(order)] = _Layer(str(name), str(place))
        return [found[order] for order in sorted(found)]


@dataclass(frozen=True)
class _Group:
    """One map to come: its label, the token labels it is the mean of, and the entity it belongs to, if any."""

    label: str
    channels: tuple[str, ...]
    entity: str = ""


def open_recording(path: str | Path) -> Recording:
    """Open a recording on disk; values are read when they are used.

    Of a run that was killed while it wrote a store, the recording holds the steps that were finished.

    Parameters
    ----------
    path : str or pathlib.Path

    Raises
    ------
    OutputError
        When nothing is there.
    RecordingError
        When what is there is not a recording.
    """
    source = Path(path).expanduser()
    if not source.exists():
        raise OutputError(f"No recording at {source}: nothing is there.")
    if not is_recording(source):
        raise RecordingError(
            f"{source} is not a recording; give a folder that `Recording.save` or `record(..., store=...)` wrote."
        )
    return Recording(open_tree(source))


def _size(node: xr.Dataset) -> tuple[int, int]:
    return node.sizes["y"], node.sizes["x"]


def _calls(steps: int | slice | Sequence[int], there: Sequence[int]) -> list[int]:
    """Denoiser calls that ``steps`` names; negative numbers count back from the last one recorded."""
    last = max(there)
    if isinstance(steps, slice):
        chosen = set(range(last + 1)[steps])
        calls = [call for call in there if call in chosen]
        if not calls:
            raise RecordingError(f"No recorded step in {steps}; there are {_ranges(there)}.")
        return calls
    wanted = [steps] if isinstance(steps, (int, np.integer)) else list(steps)
    return [int(step) if step >= 0 else last + 1 + int(step) for step in wanted]


def _positions(dimension: str, wanted: Any, there: list[Any]) -> list[int]:
    missing = [each for each in wanted if each not in there]
    if missing or not len(wanted):
        listed = _ranges(there) if all(isinstance(each, (int, np.integer)) for each in there) else ", ".join(there)
        raise RecordingError(
            f"No {dimension} {', '.join(map(str, missing)) or '(empty list)'} in the recording; there are {listed}."
        )
    return [there.index(each) for each in wanted]


def _ranges(numbers: Sequence[int]) -> str:
    """``"0-4, 10, 15"``."""
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs(numbers))
