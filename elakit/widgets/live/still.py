"""Static image of the panel for viewers that do not run widgets."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from elakit.guidance.layout import Region, layout_masks
from elakit.plot.style import ENTITY_COLORS, FAINT
from elakit.run import Run
from elakit.widgets.explorer import still

NOTE = "The live panel needs a running notebook; this is the middle step of its last run."
SIDE, MARGIN, SCALE = 240, 14, 2


def png(run: Run | None, names: Sequence[str], regions: Sequence[Region | None]) -> tuple[bytes, int]:
    """Static image of the panel as PNG.

    If there is a run, the PNG shows the run's image, and the attention of the entities at the middle step. Without a
    run, the PNG shows the regions given by hand.

    Parameters
    ----------
    run : Run or None
        The last run; None before the first one has ended.
    names : sequence of str
        Labels of the entities.
    regions : sequence of region or None
        Region given by hand for each entity; None for an entity without a region.

    Returns
    -------
    bytes
        Content of the PNG file.
    int
        Display width in pixels.
    """
    if run is not None and run.recording is not None and run.recording.steps:
        return still.png([run], NOTE)
    width = 2 * MARGIN + SIDE
    canvas = Image.new("RGB", (width * SCALE, (width + 24) * SCALE), "#ffffff")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(13 * SCALE)
    corner, side = MARGIN * SCALE, SIDE * SCALE
    draw.rectangle((corner, corner, corner + side, corner + side), fill="#f0f2f4")
    for i, (name, region) in enumerate(zip(names, regions, strict=True)):
        if region is None:
            continue
        color = ENTITY_COLORS[i % len(ENTITY_COLORS)]
        mask = layout_masks([region], (side, side), 1)[0]
        canvas.paste(color, (corner, corner), Image.fromarray(mask.astype(np.uint8) * 110, "L"))
        rows, columns = np.nonzero(mask)
        draw.text((corner + int(columns.min()) + 8, corner + int(rows.min()) + 6), name, fill="#1f2328", font=font)
    note = "The live panel needs a running notebook."
    draw.text((corner, corner + side + 6 * SCALE), note, fill=FAINT, font=ImageFont.load_default(12 * SCALE))
    out = io.BytesIO()
    canvas.save(out, "PNG", optimize=True)
    return out.getvalue(), width
