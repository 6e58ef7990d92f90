"""The arrays of a recording: their names, dimensions and labels, and the memory that one step needs."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from xarray.backends import BackendArray
from xarray.core import indexing

from elakit.attention.spec import size_name
from elakit.prompt import Prompt

DIMENSIONS = ("step", "image", "layer", "head", "y", "x", "token")
FORMAT = "elakit recording 2"

Keys: TypeAlias = Literal["text", "image"]
Size: TypeAlias = tuple[int, int]
Moment: TypeAlias = tuple[int, float, float]  # denoiser call, timestep, sigma
Slots: TypeAlias = dict[str, Tensor]  # per node: (image, layer, head, y, x, token)


def node_name(size: Size, keys: Keys = "text") -> str:
    """Return the name of a node in a recording's tree.

    A node contains the maps of one size (``keys="text"``), or the self-attention of one size (``keys="image"``).

    Examples
    --------
    >>> node_name((16, 12)), node_name((16, 12), "image")
    ('16x12', 'self-16x12')
    """
    return ("self-" if keys == "image" else "") + size_name(size)


def location_labels(size: Size) -> list[tuple[str, int]]:
    """Return a label ``"row,column"`` and a number, counted row by row from 0, for each location of a map.

    The locations are the keys of self-attention, so these labels take the place of token labels.

    Examples
    --------
    >>> location_labels((1, 2))
    [('0,0', 0), ('0,1', 1)]
    """
    rows, columns = size
    return [(f"{i // columns},{i % columns}", i) for i in range(rows * columns)]


def build_node(
    values: np.ndarray | LazyArray,
    *,
    steps: Sequence[Moment],
    layers: Sequence[tuple[str, str, int]],
    tokens: Sequence[tuple[str, int]],
    heads: str | Sequence[int],
    keys: Keys = "text",
) -> xr.Dataset:
    """Build one node of a recording's tree: a dataset with the layout that `Recording` describes.

    Parameters
    ----------
    values : numpy.ndarray or LazyArray, (step, image, layer, head, y, x, token)
        Attention probabilities. A `LazyArray` is read only when its values are used.
    steps : sequence of (call, timestep, sigma)
        One tuple per step: the number of the denoiser call, its timestep and its noise level.
    layers : sequence of (name, place, position in the forward pass)
        One tuple per layer. The place is the part of the denoiser, such as ``"up"``.
    tokens : sequence of (label, token position)
        One tuple per token, or in self-attention one per location that is attended to.
    heads : {"mean", "all"} or sequence of int
        Content of the dimension ``head``: the mean over the heads, every head, or the heads with these indices.
    keys : {"text", "image"}
        ``"text"`` if the node contains maps, ``"image"`` if it contains self-attention.

    Returns
    -------
    xarray.Dataset
    """
    calls, timesteps, sigmas = zip(*steps, strict=True)
    names, places, order = zip(*layers, strict=True)
    labels, indices = zip(*tokens, strict=True)
    numbers: Any = ["mean"] if heads == "mean" else range(values.shape[3]) if heads == "all" else list(heads)
    lazy = isinstance(values, LazyArray)
    data = xr.Variable(DIMENSIONS, indexing.LazilyIndexedArray(values) if lazy else values)
    return xr.Dataset(
        {"probability": data},
        coords={
            "step": np.asarray(calls, dtype=np.int64),
            "timestep": ("step", np.asarray(timesteps, dtype=np.float64)),
            "sigma": ("step", np.asarray(sigmas, dtype=np.float64)),
            "layer": np.asarray(names, dtype=str),
            "place": ("layer", np.asarray(places, dtype=str)),
            "order": ("layer", np.asarray(order, dtype=np.int64)),
            "head": np.asarray(numbers),
            "token": np.asarray(labels, dtype=str),
            "token_index": ("token", np.asarray(indices, dtype=np.int64)),
        },
        attrs={"size": size_name((values.shape[4], values.shape[5])), "keys": keys},
    )


def build_tree(
    nodes: Mapping[str, xr.Dataset],
    *,
    prompt: Prompt,
    family: str,
    model: str,
    calls: int,
    expected: int | None,
    averaged: int = 0,
    frames: int = 0,
) -> xr.DataTree:
    """Build a recording's tree: the nodes by name, and facts about the whole run as attributes.

    Parameters
    ----------
    nodes : mapping of str to xarray.Dataset
        Nodes, by the names that `node_name` gives.
    prompt : Prompt
        The prompt whose tokens were recorded.
    family, model : str
        Name of the model family, and name of the pipeline's class.
    calls : int
        Number of finished denoiser calls.
    expected : int, optional
        Number of denoiser calls that the run should have; None if it is unknown.
    averaged : int
        Number of steps that were averaged, if only their mean is kept; 0 if every step is kept.
    frames : int
        Number of frames of each video; 0 for images. The frames of all videos follow each other along ``image``.

    Returns
    -------
    xarray.DataTree
    """
    tree = xr.DataTree.from_dict(dict(nodes))
    tree.attrs = {
        "format": FORMAT,
        "prompt": json.dumps(prompt.to_dict(), ensure_ascii=False),
        "family": family,
        "model": model,
        "calls": calls,
        "expected": expected or 0,
        "averaged": averaged,
        "frames": frames,
        "elakit": _version(),
    }
    return tree


@dataclass(frozen=True, kw_only=True)
class NodeLayout:
    """Shape and labels of one node of a recording, which are known before the first step.

    Attributes
    ----------
    shape : tuple of int
        Shape of the values of one step, (image, layer, head, y, x, token).
    layers : sequence of (name, place, position in the forward pass)
        One tuple per layer. The place is the part of the denoiser, such as ``"up"``.
    tokens : sequence of (label, token position)
        One tuple per token, or in self-attention one per location that is attended to.
    heads : {"mean", "all"} or sequence of int
        Content of the dimension ``head``: the mean over the heads, every head, or the heads with these indices.
    keys : {"text", "image"}
        ``"text"`` if the node contains maps, ``"image"`` if it contains self-attention.
    """

    shape: tuple[int, ...]
    layers: Sequence[tuple[str, str, int]]
    tokens: Sequence[tuple[str, int]]
    heads: str | Sequence[int]
    keys: Keys = "text"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Shapes and labels of all values that one step adds to a recording.

    Shapes and labels are known before the first step.

    Attributes
    ----------
    nodes : dict of str to NodeLayout
        Layout of each node of the recording, by the node's name.
    dtype : torch.dtype
        Data type of the stored values.
    about : dict
        Arguments of `build_tree` that are the same for the whole run: prompt, family, model, expected and frames.
    """

    nodes: dict[str, NodeLayout]
    dtype: torch.dtype
    about: dict[str, Any] = field(repr=False)

    @property
    def step_bytes(self) -> int:
        """Size of the values of one step, in bytes."""
        return sum(int(np.prod(node.shape)) for node in self.nodes.values()) * self.dtype.itemsize

    def slots(self, dtype: torch.dtype | None = None, **options: Any) -> tuple[Tensor, Slots]:
        """Allocate memory for the values of one step.

        The result is one flat tensor, and a dict that gives each node a view of its part of this tensor. The flat
        tensor can be copied to another device in a single operation. ``dtype`` is by default that of the layout.
        ``options``, such as ``device``, are passed to `torch.empty`.
        """
        counts = [int(np.prod(node.shape)) for node in self.nodes.values()]
        flat = torch.empty(sum(counts), dtype=dtype or self.dtype, **options)
        parts = zip(self.nodes.items(), flat.split(counts), strict=True)
        return flat, {name: part.view(node.shape) for (name, node), part in parts}

    def tree(
        self, values: Mapping[str, np.ndarray | LazyArray], steps: Sequence[Moment], calls: int, averaged: int = 0
    ) -> xr.DataTree:
        """Build the recording's tree from the values of its nodes.

        Parameters
        ----------
        values : mapping of str to numpy.ndarray or LazyArray
            Values of each node, (step, image, layer, head, y, x, token), by the node's name.
        steps : sequence of (call, timestep, sigma)
            One tuple per step: the number of the denoiser call, its timestep and its noise level.
        calls : int
            Number of finished denoiser calls.
        averaged : int
            Number of steps that were averaged, if only their mean is kept; 0 if every step is kept.

        Returns
        -------
        xarray.DataTree
        """
        nodes = {}
        for name, array in values.items() if steps else ():
            node = self.nodes[name]
            nodes[name] = build_node(
                array, steps=steps, layers=node.layers, tokens=node.tokens, heads=node.heads, keys=node.keys
            )
        return build_tree(nodes, calls=calls, averaged=averaged, **self.about)


class LazyArray(BackendArray):
    """An array (step, image, ...) whose values are fetched when they are used, some steps and images at a time.

    Subclasses set ``shape`` and ``dtype`` and implement `fetch`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def fetch(self, steps: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Return the values of some steps and images, (len(steps), len(images), ...).

        ``steps`` and ``images`` are positions along the first and the second dimension of the array.
        """
        raise NotImplementedError

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        leading = [np.arange(length)[where] for length, where in zip(self.shape, key[:2], strict=False)]
        values = self.fetch(*(np.atleast_1d(where) for where in leading))
        places = [0 if where.ndim == 0 else slice(None) for where in leading] + list(key[2:])
        for axis in reversed(range(len(places))):  # last axis first, because an integer removes its axis
            values = values[(slice(None),) * axis + (places[axis],)]
        return np.asarray(values)


class Joined(LazyArray):
    """Lazy concatenation of arrays along the first dimension; only the values that are read are copied.

    Parameters
    ----------
    parts : sequence of numpy.ndarray, (step, image, ...)
        Arrays to concatenate.

    Examples
    --------
    >>> joined = Joined([np.zeros((2, 1, 3)), np.ones((1, 1, 3))])
    >>> joined.shape, joined.fetch(np.array([1, 2]), np.array([0]))[:, 0, 0].tolist()
    ((3, 1, 3), [0.0, 1.0])
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.shape = (int(self._ends[-1]), *parts[0].shape[1:])
        self.dtype = parts[0].dtype

    def fetch(self, steps: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Return the values of some steps and images, (len(steps), len(images), ...).

        ``steps`` and ``images`` are positions along the first and the second dimension of the array.
        """
        values = np.empty((len(steps), len(images), *self.shape[2:]), self.dtype)
        for at, step in enumerate(steps):
            part = int(np.searchsorted(self._ends, step, side="right"))
            values[at] = self._parts[part][step - self._ends[part]][images]
        return values


def _version() -> str:
    try:
        return importlib.metadata.version("elakit")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
