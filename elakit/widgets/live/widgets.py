"""The panel's own components: the prompt's words, and the stage on which regions are drawn."""

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
from elakit.widgets.explorer.colors import TABLES
from elakit.widgets.explorer.widget import HERE as EXPLORER
from elakit.widgets.explorer.widget import RefusedError
from elakit.widgets.live.frames import Frame

HERE = Path(__file__).parent
MASK_SIDE = 32  # of masks as the browser outlines them


def _code(*paths: Path) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in paths)


class Words(anywidget.AnyWidget):
    """The prompt's words as chips.

    Parameters
    ----------
    on_click : callable
        Called with the position of a word that is clicked, counted from 0.
    """

    _esm = _code(EXPLORER / "plot.js", HERE / "words.js")
    _css = _code(EXPLORER / "explorer.css", HERE / "live.css")

    _words: t.List[Any] = t.List().tag(sync=True)
    _locked = t.Bool(False).tag(sync=True)

    def __init__(self, on_click: Callable[[int], None]) -> None:
        super().__init__()
        self.on_msg(lambda _widget, message, _buffers: on_click(int(message["click"])))

    def show(self, words: Sequence[dict[str, Any]], locked: bool) -> None:
        """Show these words, as `elakit.widgets.live.words.chips` gives them."""
        self._words, self._locked = list(words), locked


class Stage(anywidget.AnyWidget):
    """The image as it is being drawn, with attention, regions, and boxes that can be drawn and dragged.

    Parameters
    ----------
    on_boxes : callable
        Called with nothing when a box was drawn, dragged or taken away, in the browser or from Python.
    on_clear : callable
        Called with the position of an entity whose region is to be given up, None for all.

    Attributes
    ----------
    boxes : list of (left, top, right, bottom) or None
        One an entity, in shares of the image.
    entity : int
        The one that is drawn next, by its place in the prompt.
    token : str
        Word whose attention is shown large; "" for the image.
    """

    _esm = _code(EXPLORER / "maps.js", EXPLORER / "plot.js", HERE / "stage.js")
    _css = _code(EXPLORER / "explorer.css", HERE / "live.css")

    _colors = t.Unicode(TABLES["viridis"], read_only=True).tag(sync=True)
    _size = t.List([1, 1]).tag(sync=True)  # width and height of images to come
    _entities: t.List[Any] = t.List().tag(sync=True)
    _masks: t.List[Any] = t.List().tag(sync=True)
    _frame = t.Dict().tag(sync=True)
    _guidance = t.Dict().tag(sync=True)

    boxes: t.List[Any] = t.List().tag(sync=True)
    entity = t.Int(0).tag(sync=True)
    token = t.Unicode("").tag(sync=True)

    def __init__(self, on_boxes: Callable[[], None], on_clear: Callable[[int | None], None]) -> None:
        self._lock = RLock()  # runs show their frames from a thread of their own
        super().__init__()
        self.observe(lambda _change: on_boxes(), "boxes")
        self.on_msg(lambda _widget, message, _buffers: on_clear(message["clear"]))

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """Take what the browser sends."""
        with self._lock:
            super().set_state(sync_data)

    def show(self, frame: Frame | None) -> None:
        """Show a run after a step; None for nothing."""
        with self._lock:
            self._frame = {} if frame is None else {"about": frame.about, "maps": frame.maps}

    def guide(self, told: dict[str, Any]) -> None:
        """Say what guidance does with regions: takes, needs, note, quiet, guided, steps, state."""
        with self._lock:
            self._guidance = told

    def name(self, entities: Sequence[tuple[str, str]], regions: Sequence[Box | np.ndarray | None]) -> None:
        """Show these entities, (label, color) each, and their regions."""
        with self._lock:
            if len(entities) != len(self._entities):
                self.boxes = []  # their number is checked against the entities'
            self._entities = [{"label": label, "color": color} for label, color in entities]
            self.entity = min(self.entity, max(0, len(entities) - 1))
            self._masks = [_cells(region) if isinstance(region, np.ndarray) else None for region in regions]
            self.boxes = [None if region is None or isinstance(region, np.ndarray) else region for region in regions]

    @t.validate("boxes")
    def _check_boxes(self, proposal: Any) -> list[list[float] | None]:
        boxes = proposal["value"]
        if boxes and len(boxes) != len(self._entities):
            raise RefusedError(f"boxes: there are {len(self._entities)} entities; give one box, or None, for each.")
        try:
            checked = check_layout(boxes, "boxes", partial=True)
        except SettingError as error:
            raise RefusedError(str(error)) from error
        return [None if box is None else [float(side) for side in box] for box in checked]


def _cells(mask: np.ndarray) -> dict[str, Any]:
    """A mask as the browser outlines it."""
    size = (min(MASK_SIDE, mask.shape[0]), min(MASK_SIDE, mask.shape[1]))
    cells = downscale(mask[None], size)[0]
    return {"rows": size[0], "columns": size[1], "cells": cells.astype(int).ravel().tolist()}
