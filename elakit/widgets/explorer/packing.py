"""Compact binary format of maps: one byte per location, one scale per map, steps as differences, compressed with zlib.

The uncompressed buffer holds all scales (little-endian float32) and after them all bytes. The maps of a layer are bytes
(step, head, word, y, x); every step except the first is stored as the difference from the previous one, modulo 256. The
scales of a layer are (step, head, word). Once the differences are summed, probability = byte / 255 x scale.
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
    """Reduction of maps and steps that meets a budget of bytes, as `fit_to` returns it.

    Attributes
    ----------
    side : int or None
        Maps whose longer side is larger are downsampled to this longer side by area means; None keeps all sizes.
    share : float
        Share of the steps that is kept. The kept steps are evenly spaced and include the first and the last step.
    """

    side: int | None = None
    share: float = 1.0

    def size(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns, after the reduction, of a map that was recorded with these rows and columns.

        Examples
        --------
        >>> Fit(32).size(64, 48), Fit(32).size(16, 16), Fit().size(128, 128)
        ((32, 24), (16, 16), (128, 128))
        """
        if self.side is None or max(rows, columns) <= self.side:
            return rows, columns
        factor = self.side / max(rows, columns)
        return max(1, round(rows * factor)), max(1, round(columns * factor))

    def positions(self, steps: int) -> list[int]:
        """Positions, counted from 0, of the steps that are kept of a recording with `steps` steps.

        The number of kept steps is `share` x `steps`, rounded down, but at least the first and the last step are kept.
        The positions are evenly spaced from the first step to the last, and rounded to whole numbers.

        Examples
        --------
        >>> Fit(16, 0.5).positions(9), Fit().positions(3)
        ([0, 3, 5, 8], [0, 1, 2])
        """
        return list(range(steps)) if self.share >= 1 else pick_steps(range(steps), max(2, int(steps * self.share)))


@dataclass(frozen=True)
class Source:
    """Recorded maps of one run, and the words whose maps are sent to the browser.

    Attributes
    ----------
    nodes : tuple of xarray.Dataset
        Recorded maps, one dataset per map size, largest maps first (see `Recording.nodes`).
    words : tuple of tuple of int
        For each word, the positions of its tokens along ``token``. The maps of these tokens are averaged.
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
    """Maps collected for the browser: their values as bytes, and the scales that turn the bytes back into values.

    `add` stores the bytes of all maps of a layer and returns their position. `add_scales` stores the scales of these
    maps, one per map, and returns their position. Regions are stored by `add`, without scales.
    """

    scales: list[np.ndarray] = field(default_factory=list)
    parts: list[np.ndarray] = field(default_factory=list)

    def add_scales(self, values: np.ndarray) -> int:
        """Add scales; return the index of the first of them among all scales."""
        at = self.scale_count
        self.scales.append(np.ravel(values).astype("<f4"))
        return at

    def add(self, values: np.ndarray) -> int:
        """Add bytes; return the index of the first of them among the bytes of all calls of `add`."""
        at = sum(part.size for part in self.parts)
        self.parts.append(np.ravel(values).astype(np.uint8, copy=False))
        return at

    @property
    def scale_count(self) -> int:
        """Number of scales added so far."""
        return sum(part.size for part in self.scales)

    def deflated(self) -> bytes:
        """The buffer compressed in zlib's format, which browsers call "deflate"."""
        squeezer = zlib.compressobj(6)
        squeezed = [squeezer.compress(part.tobytes()) for part in (*self.scales, *self.parts)]
        return b"".join([*squeezed, squeezer.flush()])


def fit_to(sources: Sequence[Source], budget: int) -> Fit:
    """Weakest reduction that keeps maps within a budget.

    Maps within the budget are not reduced. Otherwise the longer side of each map is limited to 32 or, if this is not
    enough, to 16. If the maps still exceed the budget, steps are omitted, too. At least the first and the last step of
    each recording are kept, even if they exceed the budget.

    Parameters
    ----------
    sources : sequence of Source
    budget : int
        Largest number of bytes of all maps together, before compression.

    Returns
    -------
    Fit
    """
    for side in (None, *_SIDES):
        fit = Fit(side)
        total = sum(source.nbytes(fit) for source in sources)
        if total <= budget:
            return fit
    return Fit(_SIDES[-1], budget / total)


def pack(source: Source, fit: Fit, buffer: Buffer) -> list[dict[str, Any]]:
    """Add the maps of a recording to a buffer, reduced and quantized, and describe its layers.

    Parameters
    ----------
    source : Source
    fit : Fit
    buffer : Buffer

    Returns
    -------
    list of dict
        One per layer, in forward order. The keys are "name"; "short", a short name; "place", the part of the network;
        "recorded", the rows and columns as recorded; "size", the larger of these; "rows" and "columns", as sent;
        "heads", the indices of the recorded heads, or ["mean"] if only their mean was recorded; and "at" and "scales",
        the positions in the buffer that `Buffer.add` and `Buffer.add_scales` returned.
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
    """Short, distinct names of layers: the part of the network, and the first two numbers in the layer's name.

    If two of these names are equal, all numbers are used; if two are still equal, the full names are returned.

    Parameters
    ----------
    layers : sequence of (str, str)
        For each layer, its place, such as "up", and its name.

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
