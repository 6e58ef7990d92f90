"""Compact binary format of attention maps, in which the explorer widget sends them to the browser.

A map has one byte per location and one scale: probability = byte / 255 x scale. The bytes of a layer have the
dimensions (step, head, word, y, x), and its scales have the dimensions (step, head, word). Instead of the bytes of a
step, their differences from the previous step are stored, modulo 256. Only the first step is stored as it is.

The buffer contains the scales of all layers as little-endian float32, and then all bytes. It is compressed with zlib.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from elakit.measures.arrays import area_mean
from elakit.plot.style import pick_steps
from elakit.widgets.shared.quantize import quantize

# Bytes of all maps before compression. Compression never enlarges them and base64 adds a third, so that a page with
# code and images stays below 12 MB whatever the maps are.
BUDGET = 8_700_000
_SIDES = (32, 16)
# Bytes of a recording, which may be larger than memory, that are read at once.
_BLOCK = 2**25


@dataclass(frozen=True)
class Fit:
    """Reduction of attention maps: how far maps are downsampled, and which share of the steps is kept.

    `fit_to` returns the reduction with which the maps stay within a given number of bytes.

    Attributes
    ----------
    side : int or None
        Largest length of the longer side of a map, in locations. Larger maps are downsampled to this length by area
        means. None means that no map is downsampled.
    share : float
        Share of the steps that is kept, 0 to 1. The kept steps are evenly spaced, and include the first and the last
        step.
    """

    side: int | None = None
    share: float = 1.0

    def size(self, rows: int, columns: int) -> tuple[int, int]:
        """Size of a map after the reduction, as (rows, columns). `rows` and `columns` are the recorded size.

        Examples
        --------
        With a limit of 32, 64 x 48 locations become 32 x 24, and 16 x 16 remain. Without a limit, every size remains:

        >>> Fit(32).size(64, 48), Fit(32).size(16, 16), Fit().size(128, 128)
        ((32, 24), (16, 16), (128, 128))
        """
        if self.side is None or max(rows, columns) <= self.side:
            return rows, columns
        factor = self.side / max(rows, columns)
        return max(1, round(rows * factor)), max(1, round(columns * factor))

    def positions(self, steps: int) -> list[int]:
        """Positions of the steps that the reduction keeps, counted from 0.

        `steps` is the number of recorded steps. The reduction keeps the fraction `self.share` of these steps, rounded
        down. The first and the last step are always kept. The kept steps are evenly spaced, up to rounding.

        Examples
        --------
        With a share of 0.5, four of nine steps are kept:

        >>> Fit(share=0.5).positions(9)
        [0, 3, 5, 8]

        By default, all steps are kept:

        >>> Fit().positions(3)
        [0, 1, 2]
        """
        return list(range(steps)) if self.share >= 1 else pick_steps(range(steps), max(2, int(steps * self.share)))


@dataclass(frozen=True)
class Source:
    """Recorded maps of one run, and the words whose maps are sent to the browser.

    Attributes
    ----------
    nodes : tuple of xarray.Dataset
        Recorded maps as `Recording.nodes` returns them: one dataset per map size, largest maps first.
    words : tuple of tuple of int
        One tuple per word: the positions of the word's tokens along the dimension ``token``. The maps of these tokens
        are averaged.
    """

    nodes: tuple[xr.Dataset, ...]
    words: tuple[tuple[int, ...], ...]

    def nbytes(self, fit: Fit) -> int:
        """Number of bytes of the maps after the reduction `fit`, before compression."""
        values = sum(
            node.sizes["layer"] * node.sizes["head"] * int(np.prod(fit.size(node.sizes["y"], node.sizes["x"])))
            for node in self.nodes
        )
        return len(fit.positions(self.nodes[0].sizes["step"])) * len(self.words) * values


@dataclass
class Buffer:
    """Attention maps and regions that are collected for the browser, as bytes.

    Each map has a scale, with which the browser turns the bytes of the map back into values. Regions have no scale.

    Attributes
    ----------
    scales : list of numpy.ndarray
        Scales of the maps, one array per call of `add_scales`.
    parts : list of numpy.ndarray
        Bytes of the maps and regions, one array per call of `add`.
    """

    scales: list[np.ndarray] = field(default_factory=list)
    parts: list[np.ndarray] = field(default_factory=list)

    def add_scales(self, values: np.ndarray) -> int:
        """Append scales of maps, and return the number of scales that the buffer had before.

        `values` is an array of any shape, with one scale per map. The returned number is the index of the first new
        scale.
        """
        at = self.scale_count
        self.scales.append(np.ravel(values).astype("<f4"))
        return at

    def add(self, values: np.ndarray) -> int:
        """Append bytes of maps or regions, and return the number of bytes that were added before.

        `values` is an array of any shape, with whole numbers from 0 to 255. The returned number is the index of the
        first new byte.
        """
        at = sum(part.size for part in self.parts)
        self.parts.append(np.ravel(values).astype(np.uint8, copy=False))
        return at

    @property
    def scale_count(self) -> int:
        """Number of scales added so far."""
        return sum(part.size for part in self.scales)

    def deflated(self) -> bytes:
        """All scales, followed by all bytes, compressed in zlib's format, which browsers call "deflate"."""
        squeezer = zlib.compressobj(6)
        squeezed = [squeezer.compress(part.tobytes()) for part in (*self.scales, *self.parts)]
        return b"".join([*squeezed, squeezer.flush()])


def fit_to(sources: Sequence[Source], budget: int) -> Fit:
    """Weakest reduction that keeps the maps of several runs within a budget of bytes.

    Maps within the budget are not reduced. Otherwise the longer side of each map is limited to 32 or, if this is not
    enough, to 16. If this is still not enough, steps are omitted, too. The first and the last step of each recording
    are always kept, even if their maps exceed the budget.

    Parameters
    ----------
    sources : sequence of Source
        Recorded maps of each run.
    budget : int
        Largest number of bytes of all maps together, before compression.

    Returns
    -------
    Fit
        Limit of the maps' longer side, and the share of the steps that is kept.
    """
    for side in (None, *_SIDES):
        fit = Fit(side)
        total = sum(source.nbytes(fit) for source in sources)
        if total <= budget:
            return fit
    return Fit(_SIDES[-1], budget / total)


def pack(source: Source, fit: Fit, buffer: Buffer) -> list[dict[str, Any]]:
    """Reduce and quantize the recorded maps of a run, add the maps to a buffer, and describe the layers of the run.

    Parameters
    ----------
    source : Source
        Recorded maps of the run.
    fit : Fit
        Reduction of the maps.
    buffer : Buffer
        Buffer to which the maps are added.

    Returns
    -------
    list of dict
        One dict per layer, in the order in which the denoiser calls the layers. The keys are:

        - "name": full name of the layer.
        - "short": short name of the layer.
        - "place": part of the network, such as "up".
        - "recorded": list of two ints, the rows and columns of the recorded maps.
        - "size": map size, the larger number in "recorded".
        - "rows" and "columns": rows and columns of the reduced maps.
        - "heads": indices of the recorded heads, or ["mean"] if only the mean over the heads was recorded.
        - "at": index in the buffer of the first byte of the layer's maps.
        - "scales": index in the buffer of the first scale of the layer's maps.
    """
    found = []
    for node in source.nodes:
        levels, tops = _packed(node, source.words, fit)
        rows, columns = levels.shape[-2:]
        heads = [str(head) if str(head) == "mean" else int(head) for head in node["head"].values]
        for i, name in enumerate(node["layer"].values):
            changes = levels[i].copy()
            changes[1:] -= levels[i][:-1]
            layer = {
                "name": str(name),
                "place": str(node["place"].values[i]),
                "size": max(node.sizes["y"], node.sizes["x"]),
                "recorded": [node.sizes["y"], node.sizes["x"]],
                "rows": rows,
                "columns": columns,
                "heads": heads,
                "at": buffer.add(changes),
                "scales": buffer.add_scales(tops[i]),
            }
            found.append((int(node["order"].values[i]), layer))
    layers = [layer for _, layer in sorted(found, key=lambda pair: pair[0])]
    for layer, short in zip(layers, short_names([(each["place"], each["name"]) for each in layers]), strict=True):
        layer["short"] = short
    return layers


def short_names(layers: Sequence[tuple[str, str]]) -> list[str]:
    """Short, distinct names of layers, such as "up 1.0".

    A short name consists of the part of the network and the first two numbers in the full name of the layer. If two
    layers would have the same short name, all numbers are used. If short names are still equal, the full names are
    returned.

    Parameters
    ----------
    layers : sequence of (str, str)
        For each layer, the part of the network, such as "up", and the full name.

    Returns
    -------
    list of str

    Examples
    --------
    >>> short_names([
    ...     ("up", "up_blocks.1.attentions.0.transformer_blocks.0.attn2"),
    ...     ("up", "up_blocks.1.attentions.1.transformer_blocks.0.attn2"),
    ... ])
    ['up 1.0', 'up 1.1']
    >>> short_names([("single", "single_transformer_blocks.7.attn")])
    ['single 7']
    """
    numbers = [re.findall(r"(?<=\.)\d+(?=\.|$)", name) for _, name in layers]
    for most in (2, None):
        short = [f"{place} {'.'.join(each[:most])}".strip() for (place, _), each in zip(layers, numbers, strict=True)]
        if len(set(short)) == len(short):
            return short
    return [name for _, name in layers]


def _packed(node: xr.Dataset, words: Sequence[Sequence[int]], fit: Fit) -> tuple[np.ndarray, np.ndarray]:
    """Quantized maps (layer, step, head, word, y, x) of one map size, and their scales (layer, step, head, word)."""
    positions = fit.positions(node.sizes["step"])
    size = fit.size(node.sizes["y"], node.sizes["x"])
    mean = np.zeros((node.sizes["token"], len(words)), np.float32)
    for word, pieces in enumerate(words):
        mean[list(pieces), word] = 1 / len(pieces)
    shape = node.sizes["layer"], len(positions), node.sizes["head"], len(words)
    levels, tops = np.empty((*shape, *size), np.uint8), np.empty(shape, np.float32)
    values = node["probability"].isel(image=0)
    block = max(1, _BLOCK * node.sizes["step"] // max(values.nbytes, 1))
    for first in range(0, len(positions), block):
        chosen = values.isel(step=positions[first : first + block]).values  # (step, layer, head, y, x, token)
        maps = np.moveaxis(chosen.astype(np.float32, copy=False) @ mean, -1, 3)
        if maps.shape[-2:] != size:
            maps = area_mean(maps, size)
        some, scale = quantize(maps)
        levels[:, first : first + block], tops[:, first : first + block] = some.swapaxes(0, 1), scale.swapaxes(0, 1)
    return levels, tops
