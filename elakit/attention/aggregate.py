"""From many maps to few: the mean over layers and heads, resizing, and normalization."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import xarray as xr

Normalize = Literal["sum", "max", "minmax", "tokens", "start"] | None

# Bytes of maps that are read at a time of a recording on disk.
_BLOCK = 2**26


def layer_mean(nodes: Sequence[xr.Dataset], channels: Sequence[str], image: int) -> np.ndarray:
    """Mean over heads and layers of all nodes, every layer alike, at the size of the first node.

    Parameters
    ----------
    nodes : sequence of xarray.Dataset
        As in `Recording`, one a map size.
    channels : sequence of str
        Labels along ``token``.
    image : int

    Returns
    -------
    numpy.ndarray, (step, channel, y, x)
        float32.

    Notes
    -----
    Layers of one size are averaged before they are resized, so that one map a size, step and token is resized however
    many layers and heads there are.
    """
    target = nodes[0].sizes["y"], nodes[0].sizes["x"]
    total: np.ndarray | None = None
    for node in nodes:
        resized = resize(_node_mean(node, channels, image), target) * np.float32(node.sizes["layer"])
        total = resized if total is None else total + resized
    assert total is not None
    return total / np.float32(sum(node.sizes["layer"] for node in nodes))


def _node_mean(node: xr.Dataset, channels: Sequence[str], image: int) -> np.ndarray:
    """Mean over the layers and heads of one node; (step, channel, y, x), float32."""
    labels = [str(token) for token in node["token"].values]
    where = [labels.index(channel) for channel in channels]
    together = where == list(range(where[0], where[0] + len(where)))
    columns = slice(where[0], where[-1] + 1) if together else where  # a view, where a list would copy
    # In blocks of steps, as recordings on disk may be larger than memory.
    values = node["probability"].isel(image=image)
    steps = values.sizes["step"]
    block = max(1, _BLOCK * steps // max(values.nbytes, 1))
    means = [
        values.isel(step=slice(first, first + block), token=columns).values.mean((1, 2), dtype=np.float32)
        for first in range(0, steps, block)
    ]
    return np.moveaxis(np.concatenate(means), -1, 1)


def refined(maps: np.ndarray, node: xr.Dataset, image: int, times: int) -> np.ndarray:
    """Maps spread over cells that attend to each other: ``times`` x the self-attention matrix, applied to each.

    Parameters
    ----------
    maps : numpy.ndarray, (step, channel, y, x)
    node : xarray.Dataset
        Of self-attention, with the same steps.
    image, times : int

    Returns
    -------
    numpy.ndarray, (step, channel, rows, columns)
        At the size of the self-attention; a cell's value is the mean of those it attends to, by its attention.

    References
    ----------
    Wang et al., "Diffusion model is secretly a training-free open vocabulary semantic segmenter" (DiffSegmenter, 2023)
    """
    size = node.sizes["y"], node.sizes["x"]
    among = node["probability"].isel(image=image, layer=0, head=0)
    values = resize(maps, size).reshape(*maps.shape[:2], -1)  # (step, channel, cell)
    spread = np.empty_like(values)
    for step, channels in enumerate(values):
        matrix = among.isel(step=step).values.reshape(values.shape[-1], -1).astype(np.float32)  # (cell, attended cell)
        for _ in range(times):
            channels = channels @ matrix.T
        spread[step] = channels
    return spread.reshape(*maps.shape[:2], *size)


def resize(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize maps as densities: bilinear along sides that grow, area mean along sides that shrink.

    Parameters
    ----------
    maps : numpy.ndarray, (..., y, x)
    size : (int, int)
        Rows and columns wanted.

    Returns
    -------
    numpy.ndarray, (..., rows, columns)
        A map that shrinks keeps its mean, also where a cell is cut in two.

    Examples
    --------
    >>> resize(np.array([[0.0, 4.0], [8.0, 0.0]]), (1, 1))
    array([[3.]])
    >>> resize(np.array([[0.0, 6.0, 0.0]]), (1, 2))
    array([[2., 2.]])
    >>> resize(np.ones((2, 3, 3)), (6, 5)).shape
    (2, 6, 5)
    """
    rows, columns = maps.shape[-2:]
    if columns != size[1]:
        maps = maps @ _weights(columns, size[1]).T.astype(maps.dtype)
    if rows != size[0]:
        maps = _weights(rows, size[0]).astype(maps.dtype) @ maps
    return maps


@lru_cache(maxsize=64)
def _weights(old: int, new: int) -> np.ndarray:
    """Share of each old cell in each new one, (new, old); rows sum to 1."""
    if new < old:  # overlap of the intervals [j, j + 1] of old cells and [i, i + 1] * old / new of new ones
        edges = np.arange(new + 1) * (old / new)
        cells = np.arange(old)
        overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
        return overlap.clip(0) * (new / old)
    centers = ((np.arange(new) + 0.5) * (old / new) - 0.5).clip(0, old - 1)
    left = np.minimum(centers.astype(int), max(old - 2, 0))
    share = centers - left
    weights = np.zeros((new, old))
    weights[np.arange(new), left] = 1 - share
    weights[np.arange(new), np.minimum(left + 1, old - 1)] += share
    return weights


def normalized(maps: np.ndarray, how: Normalize, start: np.ndarray | None) -> np.ndarray:
    """Normalize over space; (step, token, y, x), ``start`` (step, 1, y, x).

    Examples
    --------
    >>> normalized(np.array([[[[1.0, 3.0]], [[0.0, 0.0]]]]), "sum", None).tolist()
    [[[[0.25, 0.75]], [[0.0, 0.0]]]]
    """
    space = (-2, -1)
    if how == "start":
        assert start is not None
        return _divided(maps, np.broadcast_to(start, maps.shape))
    if how == "sum":
        return _divided(maps, maps.sum(space, keepdims=True))
    if how == "max":
        return _divided(maps, maps.max(space, keepdims=True))
    if how == "minmax":
        low = maps.min(space, keepdims=True)
        return _divided(maps - low, maps.max(space, keepdims=True) - low)
    return maps


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    """Exponentials that sum to 1 along an axis.

    Examples
    --------
    >>> softmax(np.log([[1.0, 3.0]]), axis=1).round(3).tolist()
    [[0.25, 0.75]]
    """
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def _divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros_like(a), where=np.broadcast_to(b, a.shape) > 0)
