"""Reduction of maps: the mean over layers and heads, resizing, and normalization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import xarray as xr

from elakit.errors import RecordingError
from elakit.measures.arrays import resize

Normalize = Literal["sum", "max", "minmax", "tokens", "start"] | None

# Number of bytes that are read from a recording on disk at a time.
_BLOCK = 2**26


def layer_mean(nodes: Sequence[xr.Dataset], channels: Sequence[str], image: int) -> np.ndarray:
    """Average maps over the heads and layers of all nodes; every layer has the same weight.

    Parameters
    ----------
    nodes : sequence of xarray.Dataset
        Nodes of a recording. Each node has the maps of one size; all maps are resized to the size of the first node.
    channels : sequence of str
        Labels of the tokens whose maps are returned, in this order.
    image : int
        Index of the image in the batch.

    Returns
    -------
    numpy.ndarray, (step, channel, y, x)
        The averaged maps, float32, at the size of the first node. There is one channel per label.

    Raises
    ------
    RecordingError
        Raised when a node lacks one of the labels.

    Notes
    -----
    The layers of one size are averaged first, and only their mean is resized. The number of resized maps therefore does
    not depend on the number of layers and heads.
    """
    target = nodes[0].sizes["y"], nodes[0].sizes["x"]
    total: np.ndarray | None = None
    for node in nodes:
        resized = resize(_node_mean(node, channels, image), target) * np.float32(node.sizes["layer"])
        total = resized if total is None else total + resized
    assert total is not None
    return total / np.float32(sum(node.sizes["layer"] for node in nodes))


def _node_mean(node: xr.Dataset, channels: Sequence[str], image: int) -> np.ndarray:
    """Return the mean of a node's maps over layers and heads, float32, (step, channel, y, x).

    ``channels`` are the labels of the tokens whose maps are returned, in this order.
    """
    labels = [str(token) for token in node["token"].values]
    if missing := [channel for channel in channels if channel not in labels]:
        raise RecordingError(
            f"The recording is damaged: its maps of size {node.attrs['size']} have no token {missing[0]!r}, which "
            "other maps have. Record the run again, or select maps of one size with the argument `size`."
        )
    where = [labels.index(channel) for channel in channels]
    together = where == list(range(where[0], where[0] + len(where)))
    columns = slice(where[0], where[-1] + 1) if together else where  # a view, where a list would copy
    # In blocks of steps, because recordings on disk may be larger than memory.
    values = node["probability"].isel(image=image)
    steps = values.sizes["step"]
    block = max(1, _BLOCK * steps // max(values.nbytes, 1))
    means = [
        values.isel(step=slice(first, first + block), token=columns).values.mean((1, 2), dtype=np.float32)
        for first in range(0, steps, block)
    ]
    return np.moveaxis(np.concatenate(means), -1, 1)


def refined(maps: np.ndarray, node: xr.Dataset, image: int, times: int) -> np.ndarray:
    """Propagate maps along self-attention: multiply each map by the self-attention matrix, ``times`` times.

    Parameters
    ----------
    maps : numpy.ndarray, (step, channel, y, x)
        Maps of any size; they are first resized to the size of ``node``.
    node : xarray.Dataset
        Node of a recording with the self-attention of the same steps. The matrix of a step is the mean over layers and
        heads. Row i of the matrix is the attention that location i pays to all locations. Each row is normalized to a
        sum of 1.
    image : int
        Index of the image in the batch.
    times : int
        Number of multiplications.

    Returns
    -------
    numpy.ndarray, (step, channel, y, x)
        The propagated maps, at the size of ``node``. Each multiplication replaces the value at a location by a weighted
        mean of the map. The weights are the attention that the location pays to all locations.

    References
    ----------
    Wang et al., "Diffusion model is secretly a training-free open vocabulary semantic segmenter" (DiffSegmenter, 2023)
    """
    size = node.sizes["y"], node.sizes["x"]
    among = node["probability"].isel(image=image)
    values = resize(maps, size).reshape(*maps.shape[:2], -1)  # (step, channel, location)
    spread = np.empty_like(values)
    for step, channels in enumerate(values):
        # (location, attended location)
        matrix = among.isel(step=step).values.mean((0, 1), dtype=np.float32).reshape(values.shape[-1], -1)
        matrix = _divided(matrix, matrix.sum(-1, keepdims=True))
        for _ in range(times):
            channels = channels @ matrix.T
        spread[step] = channels
    return spread.reshape(*maps.shape[:2], *size)


def normalized(maps: np.ndarray, how: Normalize, start: np.ndarray | None) -> np.ndarray:
    """Normalize each map over space, or divide it by the map of start-of-text.

    Parameters
    ----------
    maps : numpy.ndarray, (step, token, y, x)
        One map per step and token.
    how : {None, "sum", "max", "minmax", "tokens", "start"}
        ``"sum"`` and ``"max"`` divide each map by its sum or maximum over space. ``"minmax"`` scales each map to the
        range from 0 to 1. ``"start"`` divides each map by the map of start-of-text. None returns the maps unchanged. So
        does ``"tokens"``, a softmax over tokens, because `Recording.maps` computes this softmax before it calls this
        function.
    start : numpy.ndarray, (step, 1, y, x), optional
        Maps of start-of-text. They are required if ``how`` is ``"start"``.

    Returns
    -------
    numpy.ndarray, (step, token, y, x)
        The normalized maps; 0 where the divisor is 0.

    Examples
    --------
    Two maps of one row and two columns are divided by their sums, 4 and 0:

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
    """Compute the softmax along an axis.

    Examples
    --------
    >>> softmax(np.log([[1.0, 3.0]]), axis=1).round(3).tolist()
    [[0.25, 0.75]]
    """
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def _divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros_like(a), where=np.broadcast_to(b, a.shape) > 0)
