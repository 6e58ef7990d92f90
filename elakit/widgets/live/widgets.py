"""Custom widgets of the panel: the prompt's words, and the stage on which regions are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from threading import RLock
from typing import Any

import anywidget
import numpy as np
import traitlets as t

from elakit.errors import SettingError
from elakit.guidance.layout import Box, check_layout
from elakit.measures.masks import downscale
from elakit.numbering import number_of
from elakit.widgets.live.frames import Frame
from elakit.widgets.shared.assets import SHARED, source
from elakit.widgets.shared.colors import TABLES
from elakit.widgets.shared.traits import RefusedError

HERE = Path(__file__).parent
MASK_SIDE = 32  # side of the masks that the browser outlines


class Words(anywidget.AnyWidget):
    """The prompt's words as clickable chips.

    Parameters
    ----------
    on_click : callable
        Called with the index of the word that was clicked, counted from 0.
    """

    _esm = source(SHARED / "plot.js", HERE / "words.js")
    _css = source(SHARED / "style.css", HERE / "live.css")

    _words: t.List[Any] = t.List().tag(sync=True)
    _locked = t.Bool(False).tag(sync=True)

    def __init__(self, on_click: Callable[[int], None]) -> None:
        super().__init__()
        self.on_msg(lambda _widget, message, _buffers: on_click(int(message["click"])))

    def show(self, words: Sequence[dict[str, Any]]) -> None:
        """Show the words of a prompt, given as the dicts that `elakit.widgets.live.words.chips` returns."""
        self._words = list(words)

    def lock(self, locked: bool) -> None:
        """Lock the words against clicks, or unlock them."""
        self._locked = locked


class Stage(anywidget.AnyWidget):
    """The image of the current or the last run, with attention, regions, and boxes that can be drawn and dragged.

    Parameters
    ----------
    size : (width, height)
        Size, in pixels, of the images that the pipeline generates. It sets the shape of the stage before the first
        image.
    on_boxes : callable
        Called with all `boxes` when a box is drawn, moved or removed, in the browser or from Python.
    on_clear : callable
        Called when the user removes regions. The argument is the index of the entity that loses its region, or None
        if all entities lose theirs.

    Attributes
    ----------
    lock : RLock
        The stage holds the lock while changes from the browser are applied. The run's thread must hold the lock while
        changing widgets.
    boxes : list of (left, top, right, bottom) or None
        One box per entity, with sides as fractions of the image; None for an entity without a box.
    entity : int
        Index of the entity whose region the user draws next.
    token : str
        Label of the word whose attention lies over the image; "" for the image alone.
    """

    _esm = source(SHARED / "maps.js", SHARED / "plot.js", HERE / "stage.js")
    _css = source(SHARED / "style.css", HERE / "live.css")

    _colors = t.Unicode(TABLES["viridis"], read_only=True).tag(sync=True)
    _size = t.List([1, 1]).tag(sync=True)  # width and height of the next images
    _entities: t.List[Any] = t.List().tag(sync=True)
    _masks: t.List[Any] = t.List().tag(sync=True)
    _frame = t.Dict().tag(sync=True)
    _guidance = t.Dict().tag(sync=True)

    boxes: t.List[Any] = t.List().tag(sync=True)
    entity = t.Int(0).tag(sync=True)
    token = t.Unicode("").tag(sync=True)

    def __init__(
        self,
        size: tuple[int, int],
        on_boxes: Callable[[list[Box | None]], None],
        on_clear: Callable[[int | None], None],
    ) -> None:
        self.lock = RLock()
        super().__init__(_size=list(size))
        self.observe(lambda change: on_boxes(change["new"]), "boxes")
        self.on_msg(lambda _widget, message, _buffers: on_clear(message["clear"]))

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """Apply changes from the browser: `sync_data` maps names of the widget's traits to new values."""
        with self.lock:
            super().set_state(sync_data)

    def show(self, frame: Frame | None) -> None:
        """Show a frame, that is, the data of a run after one step; None clears the stage."""
        with self.lock:
            self._frame = {} if frame is None else {"about": frame.about, "maps": frame.maps}

    def guide(self, guidance: dict[str, Any]) -> None:
        """Show the steps that the chosen method guides, and a hint on the use of regions.

        `guidance` is the dict that `elakit.widgets.live.wording.guidance` returns.
        """
        with self.lock:
            self._guidance = guidance

    def name(self, entities: Sequence[tuple[str, str]], regions: Sequence[Box | np.ndarray | None]) -> None:
        """Show the entities: their labels, their colors, and the regions given by hand.

        Parameters
        ----------
        entities : sequence of (str, str)
            Label and color of each entity, such as ("car", "#E69F00").
        regions : sequence of region or None
            One item per entity. It is a box (left, top, right, bottom) as fractions of the image, a boolean mask
            (y, x), or None for an entity without a region given by hand.
        """
        with self.lock:
            if len(entities) != len(self._entities):
                self.boxes = []  # the number of boxes is validated against the number of entities
            self._entities = [{"label": label, "color": color} for label, color in entities]
            self.entity = min(self.entity, max(0, len(entities) - 1))
            self._masks = [_outlined(region) if isinstance(region, np.ndarray) else None for region in regions]
            self.boxes = [None if region is None or isinstance(region, np.ndarray) else region for region in regions]

    @t.validate("boxes")
    def _check_boxes(self, proposal: Any) -> list[list[float] | None]:
        boxes = proposal["value"]
        if boxes and len(boxes) != len(self._entities):
            raise RefusedError(
                f"boxes has {number_of(len(boxes), 'entry')} for {number_of(len(self._entities), 'entity')}; give one "
                "entry per entity: a box, or None for no box."
            )
        try:
            checked = check_layout(boxes, "boxes", partial=True)
        except SettingError as error:
            raise RefusedError(str(error)) from error
        return [None if box is None else [float(side) for side in box] for box in checked]


def _outlined(mask: np.ndarray) -> dict[str, Any]:
    """Reduce a mask to at most 32 rows and 32 columns for the browser, which draws the outline of the mask.

    The result is a dict. "rows" and "columns" are the numbers of rows and columns of the reduced mask. ``"cells"``
    lists the values of the reduced mask, 0 or 1, row by row.
    """
    size = (min(MASK_SIDE, mask.shape[0]), min(MASK_SIDE, mask.shape[1]))
    cells = downscale(mask[None], size)[0]
    return {"rows": size[0], "columns": size[1], "cells": cells.astype(int).ravel().tolist()}
