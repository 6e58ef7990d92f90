"""Animations of a run as files: GIF (Pillow) or MP4 (imageio-ffmpeg)."""

from __future__ import annotations

import importlib.util
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from elakit.checks import real_number, whole_number
from elakit.errors import OutputError
from elakit.files import write_file
from elakit.numbering import step_name
from elakit.plot import style
from elakit.plot.image_figures import light_gray
from elakit.plot.regions import Source, animated_steps, chosen_regions

if TYPE_CHECKING:
    import xarray as xr

    from elakit.run import Run

_MARGIN, _TEXT = 12, 14  # pixels
_OPACITY = 0.55  # of a region on the image


def save_animation(
    run: Run,
    path: str | Path,
    *,
    source: Source = "recording",
    steps: int | Sequence[int] | None = None,
    speed: float = 4,
    panel: int = 256,
) -> Path:
    """Write a file with an animation of the entities' attention maps and regions over the steps.

    Each frame shows one step. The left panel shows the attention maps, each in the color of its entity. The maps of an
    entity are divided by their maximum over all steps. The right panel shows the regions over the finished image in
    gray.

    Parameters
    ----------
    run : Run
        A recorded run.
    path : str or Path
        File to write; the suffix is ``.gif`` or ``.mp4``. A file that exists is replaced.
    source : {"recording", "guidance"}
        Source of the regions. "recording": regions localized in the recorded maps. "guidance": the regions that the
        guidance method used.
    steps : int or sequence of int, optional
        An int is the number of steps to show, evenly spaced from the first to the last. If fewer steps are available,
        all are shown. A list names the steps to show, counted from 0. Default: all steps.
    speed : float
        Number of steps shown per second, from 0.1 to 50.
    panel : int
        Width of a panel in pixels, from 32 to 2048.

    Returns
    -------
    Path
        Path of the file.

    Raises
    ------
    RecordingError
        The run was not recorded.
    SettingError
        An option is invalid, a step was not recorded, or the requested regions of guidance do not exist.
    OutputError
        The path has another suffix, imageio-ffmpeg is not installed (for MP4), or the file cannot be written.

    Examples
    --------
    >>> import tempfile, elakit
    >>> run = elakit.generate(elakit.load("picture-world"), "a [cat] and a [lion]", steps=3, progress=False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.open(save_animation(run, f"{folder}/regions.gif")).n_frames
    3
    """
    target = Path(path)
    if target.suffix.lower() not in (".gif", ".mp4"):
        raise OutputError(f"{path}: the suffix is {target.suffix!r}; give a file name that ends in .gif or .mp4.")
    if target.suffix.lower() == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise OutputError(f"{path}: MP4 needs imageio-ffmpeg. Run `pip install 'elakit[video]'`, or write a GIF.")
    speed = real_number(speed, "speed", low=0.1, high=50)
    panel = whole_number(panel, "panel", low=32, high=2048)
    maps, regions = run.entity_maps(), chosen_regions(run, source)
    chosen = animated_steps(regions, maps, steps)
    frames = [_frame(run, maps, regions, step, panel) for step in chosen]
    write_file(target, _gif(frames, speed) if target.suffix.lower() == ".gif" else _mp4(frames, speed))
    return target


def _frame(run: Run, maps: xr.DataArray, regions: xr.DataArray, step: int, panel: int) -> Image.Image:
    colors = style.entity_colors([str(label) for label in regions.entity.values])
    width, height = panel, round(panel * run.image.height / run.image.width)
    legend = [f"■ {style.shorten(label, 24)}" for label in colors]
    font = ImageFont.load_default(size=_TEXT)
    lines = _lines(legend, 2 * panel, font)
    size = 3 * _MARGIN + 2 * width, 3 * _MARGIN + height + (1 + len(lines)) * (_TEXT + 6)
    canvas = Image.new("RGB", (size[0] + size[0] % 2, size[1] + size[1] % 2), "white")  # MP4 needs even sides
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, _MARGIN), step_name(step), fill=style.INK, font=font)
    draw.text((2 * _MARGIN + width, _MARGIN), f"{style.run_name(run)}, seed {run.seed}", fill=style.INK, font=font)
    top = 2 * _MARGIN + _TEXT
    white = Image.new("RGB", (width, height), "white")
    values = maps.sel(step=step)
    for label, color in colors.items():
        share = values.sel(token=label).values / (float(maps.sel(token=label).max()) or 1.0)
        white.paste(color, mask=_mask(share, (width, height)))
    base = light_gray(run.image).convert("RGB").resize((width, height))
    for label, color in colors.items():
        base.paste(color, mask=_mask(_OPACITY * regions.sel(step=step, entity=label).values, (width, height)))
    for left, image in ((_MARGIN, white), (2 * _MARGIN + width, base)):
        canvas.paste(image, (left, top))
        draw.rectangle((left - 1, top - 1, left + width, top + height), outline=style.FAINT)
    for i, line in enumerate(lines):
        x = float(_MARGIN)
        for label in line:
            color = list(colors.values())[legend.index(label)]
            draw.rectangle((x, top + height + 10 + i * (_TEXT + 6), x + 10, top + height + 20 + i * (_TEXT + 6)), color)
            text = label.removeprefix("■ ")
            draw.text((x + 16, top + height + 6 + i * (_TEXT + 6)), text, fill=style.INK, font=font)
            x += 34 + draw.textlength(text, font=font)
    return canvas


def _lines(labels: Sequence[str], width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[list[str]]:
    """Labels of the legend, distributed over lines of at most `width` pixels."""
    lines: list[list[str]] = [[]]
    used = 0.0
    for label in labels:
        length = 34 + font.getlength(label)
        if lines[-1] and used + length > width:
            lines.append([])
            used = 0.0
        lines[-1].append(label)
        used += length
    return lines


def _mask(share: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Convert an array of opacities, from 0 to 1, to a grayscale image.

    The image is resized to `size`, (width, height) in pixels, without smoothing.
    """
    return Image.fromarray(np.rint(255 * np.asarray(share, float)).astype(np.uint8)).resize(
        size, Image.Resampling.NEAREST
    )


def _gif(frames: Sequence[Image.Image], speed: float) -> bytes:
    # One palette for all frames, so that colors do not flicker.
    palette = Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames])).quantize(256)
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=round(1000 / speed), loop=0)
    return buffer.getvalue()


def _mp4(frames: Sequence[Image.Image], speed: float) -> bytes:
    import imageio_ffmpeg

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "animation.mp4")
        writer = imageio_ffmpeg.write_frames(str(path), frames[0].size, fps=speed, macro_block_size=2, codec="libx264")
        writer.send(None)
        for frame in frames:
            writer.send(np.asarray(frame).tobytes())
        writer.close()
        return path.read_bytes()
