"""Runs: generated images with their recorded attention.

A run can be measured, saved to a folder, opened again, and compared with other runs.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from PIL import Image

import elakit
from elakit import files
from elakit.attention import Recording, open_recording
from elakit.bleeding import Bleeding, measure
from elakit.errors import ElakitError, OutputError, RecordingError, clause
from elakit.guidance import FromMaps, Trace
from elakit.judge import Verdict, is_black, judge, knows
from elakit.models import EMBEDDED
from elakit.numbering import number_of, plural
from elakit.prompt import Prompt
from elakit.regions import localize_steps

# Version of the layout of a run's folder, written to run.json.
FORMAT = 2

# Limits for files that are opened: a small compressed file may claim to contain an array of many gigabytes.
MAX_PIXELS = 2**26
MAX_REGION_BYTES = 2**29


@dataclass(repr=False)
class Run:
    """A generated image with its prompt, its settings and its recorded attention.

    Attributes
    ----------
    image : PIL.Image.Image
        The generated image.
    prompt : Prompt
        The prompt, with its entities and tokens.
    seed : int
        Seed of the initial noise.
    settings : dict
        Settings by name: model, variant, lora, scheduler, steps, guidance_scale, height, width, negative_prompt and
        method (None for a plain run). Three more settings exist only in some runs. "call" is the argument `call` of
        `elakit.generate`, as text. "stopped" is the number of completed steps if a function `stop_if` ended the run.
        "guided" is True or False: whether a function `guide_if` decided to guide the image.
    recording : Recording or None
        Recorded attention; None if the run was not recorded.
    guidance : Trace or None
        Losses, regions and other values of each guided step; None for a plain run.
    nsfw : bool
        True if the pipeline's safety checker replaced the image. A replaced image is not judged.
    predicted : tuple of PIL.Image.Image or None
        One image per step, decoded from the clean latents that the step predicts. None if the run was generated without
        ``predicted=True``, or if the safety checker replaced the final image.

    Raises
    ------
    RecordingError
        Raised when `recording` is the recording of a video.

    Examples
    --------
    A plain run of 2 steps and 2 entities, with the defaults of picture-world: 128 x 128 pixels and a guidance scale of
    4. The maps have the dimensions (step, token, y, x):

    >>> import elakit
    >>> run = elakit.generate(elakit.load("picture-world"), "a [cat] and a [lion]", steps=2, progress=False)
    >>> run.label, run.image.size, run.settings["guidance_scale"], run.entity_maps().shape
    ('plain', (128, 128), 4.0, (2, 2, 16, 16))
    """

    image: Image.Image
    prompt: Prompt
    seed: int
    settings: dict[str, Any]
    recording: Recording | None = None
    guidance: Trace | None = None
    nsfw: bool = False
    predicted: tuple[Image.Image, ...] | None = None

    def __post_init__(self) -> None:
        if self.recording is not None and self.recording.frames:
            raise RecordingError(
                f"A run has one image, but the recording has videos of {number_of(self.recording.frames, 'frame')}. "
                "Pass one frame as the image, and the maps of this frame as the recording: `recording.frame(index)`."
            )

    @property
    def label(self) -> str:
        """Short name of the run: the name of its guidance method, or "plain"."""
        return self.guidance.method if self.guidance else "plain"

    def entity_maps(self) -> xr.DataArray:
        """Raw attention maps of the entities, (step, token, y, x), from which regions and measures are computed.

        Each map is a mean over layers of the decoder. If the model has no decoder (PixArt, Stable Diffusion 3, FLUX),
        each map is a mean over layers of the whole transformer. Only layers with the map size nearest to 16 are
        included. The coordinate ``token`` contains the labels of the entities.

        Raises
        ------
        RecordingError
            Raised when the run was not recorded, or its recording lacks the entities.
        """
        return self._maps("entities")

    @cached_property
    def regions(self) -> xr.DataArray:
        """Region of each entity at each step, boolean (step, entity, y, x). The regions of one step are disjoint.

        The regions are localized in the recorded maps by the default rules of `elakit.ELA`, `elakit.guidance.FromMaps`.
        If a guidance method used regions during the run, those regions are in ``run.guidance.regions``.

        Raises
        ------
        RecordingError
            Raised when the run was not recorded.
        """
        return localize_steps(self.entity_maps(), self._special_maps().sum("token"), **FromMaps().rule())

    @cached_property
    def verdict(self) -> Verdict | None:
        """Verdict of the built-in judge on the image; None if the built-in judge cannot judge the image.

        The built-in judge can judge images of picture-world whose prompt uses only the nouns and colors of
        picture-world. Judge other images with `elakit.judge.judge` and a detector, and pass the verdict to `measure`.
        The verdict is also None if the image is entirely black, or if the pipeline's safety checker replaced the image.
        """
        known = self.settings.get("model") in EMBEDDED and knows(self.prompt)
        if self.nsfw or not known or is_black(self.image):
            return None
        return judge(self.image, self.prompt)

    @cached_property
    def bleeding(self) -> Bleeding:
        """Measures of bleeding at each step, and their means over the steps: ``run.measure(run.verdict)``.

        If the built-in judge can judge the image, the measures also compare the attention with the image.
        """
        return self.measure(self.verdict)

    def measure(self, truth: Verdict | xr.DataArray | None = None) -> Bleeding:
        """Measure bleeding in the recorded attention; with `truth`, also compare the attention with the finished image.

        Parameters
        ----------
        truth : Verdict or xarray.DataArray of bool, (entity, y, x), optional
            Position of each entity in the finished image: a verdict on the image, or one mask per entity. A mask covers
            the whole image, at any resolution, and is True where the entity is. The mask of an absent entity is False
            everywhere. By default, the attention is not compared with the image.

        Returns
        -------
        Bleeding
            All measures of bleeding, at each step.

        Raises
        ------
        RecordingError
            Raised when the run was not recorded.
        SettingError
            Raised when `truth` has other entities than the prompt, or another aspect ratio than the image.
        """
        mass = self._special_maps().mean(("y", "x"))
        available = mass.token.values.tolist()
        attributes, owners = None, None
        if any(entity.attributes for entity in self.prompt.entities):
            attributes = self._maps("attributes")
            owners = dict(zip(attributes.token.values.tolist(), attributes.entity.values.tolist(), strict=True))
        return measure(
            self.entity_maps(),
            self.regions,
            attributes,
            owners,
            start=mass.sel(token="<start>", drop=True) if "<start>" in available else None,
            end=mass.sel(token="<end>", drop=True),
            truth=truth,
        )

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write image, prompt, settings, recording and trace to a folder, completely or not at all.

        Parameters
        ----------
        folder : str or pathlib.Path
            Folder to write; missing parents are created.
        overwrite : bool
            True replaces an existing run. A folder that is not a run is never replaced.

        Returns
        -------
        pathlib.Path
            The folder that was written.

        Raises
        ------
        OutputError
            Raised when the folder cannot be written, when it contains a run and `overwrite` is False, or when it exists
            and is not a run.
        """
        folder = Path(folder)
        if os.path.lexists(folder) and not (overwrite and os.path.isfile(folder / "run.json")):
            remedy = "pass overwrite=True or " if os.path.isfile(folder / "run.json") else ""
            raise OutputError(f"{folder} already exists; {remedy}choose another folder.")
        with files.replace_folder(folder) as new:
            self.image.save(new / "image.png")
            if self.predicted is not None:
                os.mkdir(new / "predicted")
                for step, image in enumerate(self.predicted):
                    image.save(new / "predicted" / f"{step:04d}.png")
            if self.recording is not None:
                self.recording.save(new / "recording.zarr")
            if self.guidance is not None and self.guidance.regions is not None:
                regions = self.guidance.regions
                np.savez_compressed(new / "regions.npz", masks=regions.values, steps=regions.step.values)
            parts = [name for name in ("recording.zarr", "regions.npz") if os.path.exists(new / name)]
            parts += [f"predicted/{path.name}" for path in sorted((new / "predicted").glob("*"))]
            files.write_json(new / "run.json", self._to_dict() | {"parts": parts})
        return folder

    def _to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "elakit": elakit.__version__,
            "prompt": self.prompt.to_dict(),
            "seed": self.seed,
            "settings": self.settings,
            "nsfw": self.nsfw,
            "guidance": self.guidance.to_dict() if self.guidance is not None else None,
        }

    def _recorded(self) -> Recording:
        if self.recording is None:
            raise RecordingError(
                f"The {self.label} run with seed {self.seed} was not recorded. Generate it again with record=True."
            )
        return self.recording

    def _maps(self, tokens: str | Sequence[str]) -> xr.DataArray:
        """Raw attention maps of the given tokens, (step, token, y, x).

        Each map is a mean over layers of the decoder, or over layers of the whole transformer if there is no decoder.
        Only layers with the map size nearest to 16 are included.
        """
        recording = self._recorded()
        return recording.maps(tokens, recording.decoder, recording.usual_size())

    def _special_maps(self) -> xr.DataArray:
        """Raw attention maps of the tokens "<start>" and "<end>", (step, token, y, x).

        "<start>" is start-of-text; its map is left out if the text encoder has no start-of-text. "<end>" is the sum of
        end-of-text and padding.
        """
        recorded = self._recorded().tokens
        return self._maps([token for token in ("<start>", "<end>") if token in recorded])

    def __repr__(self) -> str:
        text = self.prompt.text if len(self.prompt.text) <= 60 else f"{self.prompt.text[:59]}…"
        steps: Any = self.settings.get("steps")
        parts = [repr(text), f"seed={self.seed}", self.label, f"{steps} {plural('step', steps)}"]
        parts.append(f"{self.image.width} x {self.image.height} pixels")
        parts.append("recorded" if self.recording is not None else "not recorded")
        return f"Run({', '.join(parts)}{', hidden by the safety checker' if self.nsfw else ''})"


def open_run(folder: str | Path) -> Run:
    """Open a run that `Run.save` wrote.

    Attention maps are not loaded at once. Each map is read from the folder when it is used.

    Parameters
    ----------
    folder : str or pathlib.Path
        Folder that `Run.save` wrote.

    Returns
    -------
    Run

    Raises
    ------
    OutputError
        Raised when the folder is not a run, is damaged, or has the format of an older or newer version of elakit.
    RecordingError
        Raised when the run's recording is damaged.

    Examples
    --------
    >>> import elakit
    >>> from tempfile import TemporaryDirectory
    >>> run = elakit.generate(elakit.load("picture-world"), "a [red car]", seed=3, steps=1, progress=False)
    >>> with TemporaryDirectory() as folder:
    ...     open_run(run.save(f"{folder}/car")).seed
    3
    """
    folder = Path(folder)
    if not os.path.isfile(folder / "run.json"):
        aside = files.leftovers(folder)
        kept = f" An interrupted save kept the replaced run in {aside[-1]}; rename it to {folder}." if aside else ""
        raise OutputError(
            f"{folder} contains no elakit run: there is no run.json. Give a folder written by `Run.save`.{kept}"
        )
    table = files.read_json(folder / "run.json")
    with _intact(folder / "run.json"):
        _check_format(table, folder)
        prompt = Prompt.from_dict(table["prompt"])
        seed, settings, traced, nsfw = table["seed"], table["settings"], table["guidance"], table["nsfw"]
        parts = table.get("parts", [])
        _check_types(seed, settings, nsfw, parts)
    for name in parts:  # absent parts would read as a run that was not recorded or has no regions
        if not os.path.exists(folder / name):
            raise OutputError(f"{folder / name} is missing. Restore the run's folder, or generate the run again.")
    with _intact(folder / "image.png"):
        image = _read_image(folder / "image.png")
    predicted = None
    if os.path.isdir(folder / "predicted"):
        with _intact(folder / "predicted"):
            predicted = tuple(_read_image(path) for path in sorted((folder / "predicted").iterdir()))
    trace = None if traced is None else _read_trace(folder, traced)
    recording = None
    if os.path.exists(folder / "recording.zarr"):
        with _intact(folder / "recording.zarr"):
            recording = open_recording(folder / "recording.zarr")
    return Run(
        image=image,
        prompt=prompt,
        seed=seed,
        settings=settings,
        recording=recording,
        guidance=trace,
        nsfw=nsfw,
        predicted=predicted,
    )


def compare(runs: Sequence[Run]) -> pd.DataFrame:
    """Return a table with the measures of bleeding of several runs, averaged over the steps; each run is a column.

    Parameters
    ----------
    runs : sequence of Run
        Runs of one prompt.

    Returns
    -------
    pandas.DataFrame
        A row is one value of one measure. The index has three levels. "measure" is the name of the measure. "entity" is
        the label of the measured entity or attribute. "other" is the label of a region or of a second entity. "entity"
        and "other" are "" in measures that have none. A column is one run. Its name has the method and the seed, such
        as "plain (seed 7)". A second run with this method and seed is named "plain (seed 7)#2".

    Raises
    ------
    RecordingError
        Raised when a run was not recorded.

    Examples
    --------
    >>> import elakit
    >>> pipe = elakit.load("picture-world")
    >>> runs = elakit.generate(pipe, "a [cat] and a [lion]", seed=[1, 2], steps=1, progress=False)
    >>> compare(runs).columns.tolist()
    ['plain (seed 1)', 'plain (seed 2)']
    """
    columns: dict[str, pd.Series] = {}
    seen = Counter[str]()
    for run in runs:
        name = f"{run.label} (seed {run.seed})"
        seen[name] += 1
        column = run.bleeding.overall().set_index(["measure", "entity", "other"])["value"]
        columns[name if seen[name] == 1 else f"{name}#{seen[name]}"] = column
    return pd.DataFrame(columns)


@contextmanager
def _intact(path: Path) -> Iterator[None]:
    """Context manager for reading the file `path`. An error becomes an OutputError: the file is damaged.

    An error of elakit that already names the file or its folder is not changed. All other exceptions are caught,
    because libraries do not document the exceptions that damaged data cause. For example, zlib, zipfile, PIL and zarr
    raise a dozen kinds.
    """
    try:
        yield
    except ElakitError as error:
        if str(path) in str(error) or str(path.parent) in str(error):
            raise
        raise OutputError(
            f"{path} is damaged: {clause(error)}. Restore the run's folder, or generate the run again."
        ) from error
    except Exception as error:
        reason = clause(error) or type(error).__name__
        raise OutputError(
            f"{path} is damaged: {reason}. Restore the run's folder, or generate the run again."
        ) from error


def _check_format(table: Any, folder: Path) -> None:
    """Raise an OutputError if another version of elakit saved the run in another format.

    `table` is the content of run.json in the folder of the run.
    """
    if not isinstance(table, dict):
        raise ValueError("it is not a JSON object")
    found = table.get("format", 1)
    if type(found) is not int:
        raise ValueError(f"its format is {found!r}, which is not a whole number")
    if found != FORMAT:
        newer = isinstance(found, int) and found > FORMAT
        step = (
            "Update elakit to open it" if newer else "Generate the run again, with the same prompt, seed and settings"
        )
        raise OutputError(
            f"{folder} was written by {'a newer' if newer else 'an older'} version of elakit: its format is {found!r}, "
            f"and this version reads format {FORMAT}. {step}."
        )


def _check_types(seed: Any, settings: Any, nsfw: Any, parts: Any) -> None:
    """Raise a ValueError if a value that was read from run.json has a wrong type.

    `parts` is the list of the other files of the run, such as "recording.zarr".
    """
    rules = {
        "seed": ("a whole number", type(seed) is int),
        "settings": ("an object", isinstance(settings, dict)),
        "nsfw": ("true or false", isinstance(nsfw, bool)),
        "parts": ("a list of text", isinstance(parts, list) and all(isinstance(name, str) for name in parts)),
    }
    for name, (rule, fits) in rules.items():
        if not fits:
            raise ValueError(f"{name} is not {rule}")
    for name, value in settings.items():
        if not isinstance(value, str | int | float | bool | None):
            raise ValueError(f"the setting {name} is not text, a number, true, false or null")


def _read_trace(folder: Path, traced: Any) -> Trace:
    """Read the trace of a saved run, with its regions.

    `traced` is the trace as stored in run.json. The regions are read from the file regions.npz in the folder of the
    run. If this file does not exist, the trace has no regions.
    """
    masks: dict[int, np.ndarray] = {}
    if os.path.exists(folder / "regions.npz"):
        with _intact(folder / "regions.npz"):
            masks = _read_regions(folder / "regions.npz")
    with _intact(folder / "run.json"):
        trace = Trace.from_dict(traced, masks)
        if any(len(regions) != len(trace.entities) for regions in masks.values()):
            raise ValueError(
                f"it has {number_of(len(trace.entities), 'entity')}, but regions.npz has "
                f"{number_of(len(next(iter(masks.values()))), 'region')} per step"
            )
    return trace


def _read_image(path: Path) -> Image.Image:
    with Image.open(path, formats=("PNG",)) as file:
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(
                f"the image has {file.width} x {file.height} pixels; at most {MAX_PIXELS:,} pixels are allowed"
            )
        return file.copy()


def _read_regions(path: Path) -> dict[int, np.ndarray]:
    """Read the masks of the regions from regions.npz: a dict from step to masks, bool (entity, y, x).

    The sizes of the arrays are read from their headers, and checked before the arrays are decompressed.
    """
    with zipfile.ZipFile(path) as archive:
        for name in ("masks.npy", "steps.npy"):
            with archive.open(name) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
            size = math.prod(shape) * dtype.itemsize
            if dtype.kind not in "biu" or size > MAX_REGION_BYTES:
                raise ValueError(
                    f"{name} contains {size:,} bytes of {dtype}; at most {MAX_REGION_BYTES:,} bytes of booleans or "
                    "integers are allowed"
                )
    with np.load(path, allow_pickle=False) as arrays:
        masks, steps = arrays["masks"], arrays["steps"]
    if masks.ndim != 4 or masks.dtype != bool or steps.shape != masks.shape[:1]:
        raise ValueError(
            f"the array masks is {masks.dtype} of shape {masks.shape}, and the array steps has shape {steps.shape}. "
            "Expected: boolean masks of shape (step, entity, y, x), and one number per step in the array steps"
        )
    return dict(zip(steps.tolist(), masks, strict=True))
