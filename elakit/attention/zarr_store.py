"""Recordings on disk: a Zarr store that grows with the run, and strict reading of such a store.

Recordings are stored in Zarr version 2, readable with `xarray.open_datatree` or any other Zarr reader. A store has one
group per map size, and one for self-attention if this is recorded. `Recording` describes the arrays of a group.

This module writes and reads the files itself instead of using zarr-python, for three reasons:

* **A killed run must leave a valid store.** The values of a step are written first. The step belongs to the store only
  when one small file, the consolidated metadata, has been replaced. Each file is written under another name, then
  renamed. zarr-python would resize an array before it writes the values. A process that is killed in between would
  leave arrays of different lengths, or steps without values.
* **A missing file must be an error.** zarr-python reads a missing chunk as fill values, so a part of a damaged
  recording would look like attention of zero.
* **Opening must not run code.** The metadata of an array names a codec, and some codecs (pickle) execute what they
  decode. This module decodes only arrays of numbers or text that were compressed with Blosc. All other arrays are
  refused before a byte is decoded.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numcodecs import Blosc
from torch import Tensor

from elakit.attention.layout import DIMENSIONS, FORMAT, Layout, LazyArray, Moment, Slots
from elakit.attention.sinks import over_budget
from elakit.errors import OutputError, PromptError, RecordingError
from elakit.files import read_json, replace_folder, unwritable, write_file
from elakit.numbering import number_of
from elakit.prompt import Prompt

# Number of steps whose call, timestep and sigma share a file.
_STEPS = 512
_CODEC = Blosc(cname="lz4", clevel=5, shuffle=Blosc.SHUFFLE)

_NODE = re.compile(r"(self-)?\d+x\d+", re.ASCII)
_DTYPE = re.compile(r"(?P<kind>[<|>][fi](?P<bytes>[1248])|[<>]U(?P<characters>\d{1,4}))", re.ASCII)
_COORDINATES = {
    "step": "step",
    "timestep": "step",
    "sigma": "step",
    "layer": "layer",
    "place": "layer",
    "order": "layer",
    "head": "head",
    "token": "token",
    "token_index": "token",
}


class ZarrStore:
    """Sink of a recording that writes each finished step to a Zarr store on disk, and keeps one step in memory.

    Parameters
    ----------
    layout : Layout
        Shapes and labels of the values of a step.
    path : pathlib.Path
        Folder of the store. The folder must not exist; the first step creates it with all metadata.
    limit : int
        Largest number of steps in the store. This number follows from the largest size of a recording in bytes,
        ``RecordSpec(budget=...)``.
    """

    def __init__(self, layout: Layout, path: Path, limit: int) -> None:
        self.layout = layout
        self.path = path
        self._limit = limit
        _, self._slots = layout.slots()
        self._steps: list[Moment] = []
        self._metadata: dict[str, Any] = {}

    def reserve(self, step: int) -> None:
        """Raise a `RecordingError` if the store has no room for step number ``step``, counted from 0."""
        if step >= self._limit:
            raise over_budget(self.layout, step, self._limit)

    def slots(self) -> Slots:
        """Return the tensors, in memory, into which the values of the next step are to be written."""
        return self._slots

    def commit(self, moment: Moment) -> None:
        """Write the values in the tensors of `slots` to the store as the next step, then update the metadata.

        ``moment`` contains the denoiser call, the timestep and the sigma of the step.
        """
        if not self._steps:
            values = {name: _array(slot)[None] for name, slot in self._slots.items()}
            write_whole(self.layout.tree(values, [moment], moment[0] + 1), self.path, step_chunk=1)
            self._metadata = read_json(self.path / ".zmetadata")
        else:
            self._append([*self._steps, moment])
        self._steps.append(moment)

    def _append(self, steps: list[Moment]) -> None:
        metadata = json.loads(json.dumps(self._metadata))
        described = metadata["metadata"]
        for node, slot in self._slots.items():
            folder = self.path / node
            for image, values in enumerate(_array(slot)):
                _write_chunk(folder / "probability", (len(steps) - 1, image, 0, 0, 0, 0, 0), values)
            nth = (len(steps) - 1) // _STEPS
            columns = zip(*steps[nth * _STEPS :], strict=True)
            for name, dtype, column in zip(("step", "timestep", "sigma"), ("<i8", "<f8", "<f8"), columns, strict=True):
                padded = np.zeros(_STEPS, dtype)
                padded[: len(column)] = column
                _write_chunk(folder / name, (nth,), padded)
            for name in ("probability", "step", "timestep", "sigma"):
                array = described[f"{node}/{name}/.zarray"]
                array["shape"][0] = len(steps)
                _write_json(folder / name / ".zarray", array)
        described[".zattrs"]["calls"] = steps[-1][0] + 1
        _write_json(self.path / ".zattrs", described[".zattrs"])
        _write_json(self.path / ".zmetadata", metadata)  # last: from here on the step belongs to the store
        self._metadata = metadata

    def tree(self, calls: int) -> xr.DataTree:
        """Return the recording's tree with the steps written so far; values stay on disk until they are used.

        ``calls`` is the number of finished denoiser calls.
        """
        return open_tree(self.path) if self._steps else self.layout.tree({}, (), calls)

    def finish(self, calls: int) -> xr.DataTree:
        """Write ``calls``, the number of finished denoiser calls, to the store, and return the recording's tree."""
        if not self._metadata:
            if self.path.exists():  # someone else took the path in the meantime, which has raised an error
                return self.layout.tree({}, (), calls)
            write_whole(self.layout.tree({}, (), calls), self.path)
            return open_tree(self.path)
        with suppress(OSError):  # a full disk ended the run; the steps before are in the store
            # From the file: an interrupt may have come when the file was ahead of ``self._metadata``.
            metadata = read_json(self.path / ".zmetadata")
            metadata["metadata"][".zattrs"]["calls"] = calls
            _write_json(self.path / ".zattrs", metadata["metadata"][".zattrs"])
            _write_json(self.path / ".zmetadata", metadata)
        return open_tree(self.path)


def _array(tensor: Tensor) -> np.ndarray:
    values: np.ndarray = tensor.numpy()
    return values


# -- reading -----------------------------------------------------------------------------------------------------------


def is_recording(path: Path) -> bool:
    """Return whether a folder is a recording of this or any other version of elakit."""
    try:
        found = json.loads((path / ".zattrs").read_text(encoding="utf-8-sig")).get("format")
        return isinstance(found, str) and found.startswith("elakit recording ")
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def open_tree(path: Path) -> xr.DataTree:
    """Open the recording in a folder, and return its tree.

    Labels are read at once. The attention stays on disk until it is used.

    Raises
    ------
    RecordingError
        Raised when a file is missing or damaged; the message names the file. Raised when the recording has a format
        that this version of elakit does not read. Also raised later, when values are used after the folder has been
        deleted or replaced.
    """
    metadata = _read_json(path / ".zmetadata")
    try:
        described = metadata["metadata"]
        attributes = _root_attributes(described[".zattrs"], path)
        names = [key.removesuffix("/.zgroup") for key in described if key.endswith("/.zgroup")]
        if bad := [name for name in names if not _NODE.fullmatch(name)]:
            raise _damaged(path / ".zmetadata", f"it names a group {bad[0]!r}, which no recording has")
        nodes = {name: _open_node(path, name, described) for name in sorted(names)}
    except RecordingError:  # a ValueError, which names its own file
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise _damaged(path / ".zmetadata", f"{type(error).__name__}: {error}") from error
    tree = xr.DataTree.from_dict(nodes)
    tree.attrs = attributes
    return tree


def _root_attributes(attributes: Any, path: Path) -> dict[str, Any]:
    """Check the Zarr attributes of a whole recording (format, prompt, model and others), and return a copy of them.

    ``path`` is the folder of the recording, for error messages.
    """
    file = path / ".zmetadata"
    if attributes["format"] != FORMAT:
        raise RecordingError(
            f"{path} was written by another version of elakit ({attributes['format']!r}; this version reads "
            f"{FORMAT!r}). Record the run again, or open the folder with the version that wrote it."
        )
    for name, kind in (("family", str), ("model", str), ("calls", int), ("expected", int), ("averaged", int)):
        if not isinstance(attributes[name], kind):
            raise _damaged(file, f"{name} is {attributes[name]!r}, not {'text' if kind is str else 'a whole number'}")
    if not isinstance(attributes.get("frames", 0), int) or attributes.get("frames", 0) < 0:
        raise _damaged(file, f"frames is {attributes['frames']!r}, not a whole number, 0 or more")
    try:
        Prompt.from_dict(json.loads(attributes["prompt"]))
    except PromptError as error:
        raise _damaged(file, str(error)) from error
    return dict(attributes)


def _open_node(path: Path, name: str, described: Mapping[str, Any]) -> xr.Dataset:
    stored = {
        variable: _StoredArray(path, f"{name}/{variable}", described[f"{name}/{variable}/.zarray"])
        for variable in ("probability", *_COORDINATES)
    }
    shape = dict(zip(DIMENSIONS, stored["probability"].shape, strict=True))
    coordinates: dict[str, Any] = {}
    for variable, dimension in _COORDINATES.items():
        values = stored[variable].whole()
        if values.shape != (shape[dimension],):
            raise _damaged(
                path / name / variable / ".zarray",
                f"its array has {number_of(len(values), 'value')} instead of {shape[dimension]}",
            )
        if values.dtype.kind == "U":
            _check_text(values, stored[variable])
        coordinates[variable] = (dimension, values)
    attributes = described[f"{name}/.zattrs"]
    if attributes["size"] != f"{shape['y']}x{shape['x']}" or attributes["keys"] not in ("text", "image"):
        raise _damaged(
            path / name / ".zattrs",
            f"size is {attributes['size']!r} and keys is {attributes['keys']!r}; the size of the maps is "
            f"'{shape['y']}x{shape['x']}', and keys must be 'text' or 'image'",
        )
    lazy = xr.core.indexing.LazilyIndexedArray(stored["probability"])
    return xr.Dataset({"probability": (DIMENSIONS, lazy)}, coords=coordinates, attrs=dict(attributes))


def _check_text(values: np.ndarray, stored: _StoredArray) -> None:
    """Raise a `RecordingError` if labels of a recording are not valid Unicode; the message names the file.

    Labels are checked when the recording is opened, because an error at a later use would not name the file.

    Parameters
    ----------
    values : ndarray of str
        The labels.
    stored : _StoredArray
        Array from which the labels were read.
    """
    codes = np.ascontiguousarray(values).view(np.uint32)
    wrong = (codes > sys.maxunicode) | ((codes >= 0xD800) & (codes <= 0xDFFF))
    if wrong.any():
        label = int(wrong.argmax()) * len(values) // len(codes)
        raise _damaged(stored.file_of(label), "its labels are not valid Unicode")


class _StoredArray(LazyArray):
    """One array of a store, which is divided into chunks along its first two dimensions only.

    Parameters
    ----------
    store : pathlib.Path
        Folder of the store.
    name : str
        Path of the array within the store.
    described : mapping
        Zarr metadata of the array (the content of its ``.zarray``).
    """

    def __init__(self, store: Path, name: str, described: Mapping[str, Any]) -> None:
        self._store = store
        self._folder = store / name
        file = self._folder / ".zarray"
        compressor = described["compressor"]
        rules = {
            "zarr_format": ("2", described["zarr_format"] == 2),
            "dtype": ("numbers (f, i) or text (U)", _DTYPE.fullmatch(str(described["dtype"])) is not None),
            "order": ("'C'", described["order"] == "C"),
            "filters": ("None", not described["filters"]),
            "compressor": ("Blosc", isinstance(compressor, dict) and compressor.get("id") == "blosc"),
        }
        wrong = [f"{key} is {described[key]!r}, not {rule}" for key, (rule, fits) in rules.items() if not fits]
        if wrong:
            raise RecordingError(
                f"{file} was not written by elakit: {'; '.join(wrong)}. For safety, its array is not decoded, because "
                "decoding can run code. Record the run again."
            )
        self.dtype = np.dtype(str(described["dtype"]))
        self.shape, self._chunks = (tuple(described[key]) for key in ("shape", "chunks"))
        sides = (*self.shape, *self._chunks)
        if len(self.shape) != len(self._chunks) or not all(type(side) is int and 0 <= side < 2**40 for side in sides):
            raise _damaged(file, f"shape is {self.shape} and chunks is {self._chunks}, not equally many whole numbers")
        if 0 in self._chunks or self._chunks[2:] != self.shape[2:] or (len(sides) > 2 and self._chunks[1] != 1):
            raise _damaged(file, f"its chunks {self._chunks} do not fit its shape {self.shape}")
        self._identity = self._identify()
        self._check_files()

    def _identify(self) -> tuple[int, int, int]:
        """Device, inode and modification time of the store's file ``.zgroup``, as a fingerprint of the store.

        The fingerprint changes when the folder of the store is replaced. It stays the same when the store grows.
        """
        try:
            found = os.stat(self._store / ".zgroup")
        except OSError as error:
            raise RecordingError(
                f"The recording's file {self._store / '.zgroup'} is gone: its folder was deleted or moved. Open the "
                "recording where it is now, or record the run again."
            ) from error
        return found.st_dev, found.st_ino, found.st_mtime_ns

    def _check_files(self) -> None:
        try:
            there = set(os.listdir(self._folder))
        except OSError as error:
            raise _missing(self._folder) from error
        counts = [-(-side // chunk) for side, chunk in zip(self.shape, self._chunks, strict=True)]
        if math.prod(counts) > len(there):
            missing = next(place for place in np.ndindex(*counts) if _chunk_name(place) not in there)
            raise _missing(self._folder / _chunk_name(missing))
        for place in np.ndindex(*counts):
            if _chunk_name(place) not in there:
                raise _missing(self._folder / _chunk_name(place))

    def fetch(self, steps: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Return the values of some steps and images, (len(steps), len(images), ...).

        ``steps`` and ``images`` are positions along the first and the second dimension of the array.
        """
        values = np.empty((len(steps), len(images), *self.shape[2:]), self.dtype)
        if not values.size:
            return values
        for nth in np.unique(steps // self._chunks[0]):
            where = np.flatnonzero(steps // self._chunks[0] == nth)
            for at, image in enumerate(images):
                chunk = self._chunk((int(nth), int(image), *(0,) * (len(self.shape) - 2)))
                values[where, at] = chunk[steps[where] - nth * self._chunks[0], 0]
        return values

    def whole(self) -> np.ndarray:
        """Return all values of the array, which must have one dimension."""
        (length,), (chunk,) = self.shape, self._chunks
        parts = [self._chunk((nth,)) for nth in range(-(-length // chunk))]
        return np.concatenate(parts)[:length] if parts else np.empty(0, self.dtype)

    def file_of(self, position: int) -> Path:
        """Path of the file that contains the value at ``position``; the array must have one dimension."""
        return self._folder / _chunk_name((position // self._chunks[0],))

    def _chunk(self, place: tuple[int, ...]) -> np.ndarray:
        if self._identify() != self._identity:
            raise RecordingError(
                f"The recording in {self._store} was replaced by another one after it had been opened. Open it again."
            )
        file = self._folder / _chunk_name(place)
        try:
            content = file.read_bytes()
        except OSError as error:
            raise _missing(file) from error
        wanted = math.prod(self._chunks) * self.dtype.itemsize
        # Blosc's header states the sizes: what does not fit is not decoded, however large it claims to be.
        if len(content) < 16 or struct.unpack("<4xI4xI", content[:16]) != (wanted, len(content)):
            raise _damaged(file, "its length or header does not fit the array")
        try:
            decoded = np.frombuffer(_CODEC.decode(content), self.dtype)
            return decoded.reshape(self._chunks)
        except (RuntimeError, ValueError) as error:
            raise _damaged(file, str(error)) from error


def _chunk_name(place: Sequence[int]) -> str:
    return ".".join(map(str, place))


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise _missing(file) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(file, str(error)) from error


def _missing(file: Path) -> RecordingError:
    return RecordingError(
        f"The recording's file {file} is missing or cannot be read, so the recording is incomplete. Restore the "
        "file, or record the run again."
    )


def _damaged(file: Path, why: str) -> RecordingError:
    return RecordingError(
        f"The recording's file {file} is damaged ({why}). Restore the folder from a copy, or record the run again."
    )


# -- writing -----------------------------------------------------------------------------------------------------------


def free_path(path: str | Path) -> Path:
    """Check, before a run, that a recording can be written to ``path``, and create missing parent folders.

    Returns
    -------
    pathlib.Path
        The path, with ``~`` expanded.

    Raises
    ------
    OutputError
        Raised when the path already exists, or its parent folder cannot be created or written to.
    """
    target = Path(path).expanduser()
    if target.exists() or target.is_symlink():
        raise OutputError(
            f"{target} already exists; a run is only written to a new path. Choose another path, or move what is there."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(target, error) from error
    if not os.access(target.parent, os.W_OK):
        raise OutputError(
            f"{target} cannot be written: no permission to write to {target.parent}. Choose another path."
        )
    return target


def save_tree(tree: xr.DataTree, path: str | Path, overwrite: bool) -> Path:
    """Write a recording as a Zarr store, whole or not at all, and return the path of the store.

    ``overwrite=True`` replaces an existing recording at this path. A path that is not a recording is never replaced.

    Raises
    ------
    OutputError
        Raised when the path cannot be written to. Raised when the path exists, unless ``overwrite`` is True and the
        path is a recording.
    """
    target = Path(path).expanduser()
    if target.exists() or target.is_symlink():
        if not is_recording(target):
            raise OutputError(f"{target} exists and is not a recording; choose another path.")
        if not overwrite:
            raise OutputError(f"{target} is already a recording; choose another path or pass overwrite=True.")
    write_whole(tree, target, replace=overwrite)
    return target


def write_whole(tree: xr.DataTree, target: Path, step_chunk: int | None = None, replace: bool = False) -> None:
    """Write a recording as a Zarr store, whole or not at all.

    The store is written to a temporary folder, which is then renamed to ``target``.

    Parameters
    ----------
    tree : xarray.DataTree
        Tree of the recording.
    target : pathlib.Path
        Folder of the store.
    step_chunk : int, optional
        Number of steps in each file of attention values. Default: as many as fit into 4 MB, but at least one.
    replace : bool
        If True, an existing folder is replaced. If False, an existing folder is an error, unless it is empty.
    """
    with replace_folder(target, overwrite=replace) as part:
        _write_tree(tree, part, step_chunk)


def _write_tree(tree: xr.DataTree, path: Path, step_chunk: int | None) -> None:
    """Write all files of a store to the folder ``path``; ``step_chunk`` is explained in `write_whole`.

    The files have the format Zarr version 2, in which arrays of text are a part of the standard.
    """
    described: dict[str, Any] = {".zgroup": {"zarr_format": 2}, ".zattrs": dict(tree.attrs)}
    for group, child in tree.children.items():
        node = child.to_dataset()
        described |= {f"{group}/.zgroup": {"zarr_format": 2}, f"{group}/.zattrs": dict(node.attrs)}
        for name, variable in node.variables.items():
            if variable.dtype.kind not in "iuf":
                variable = variable.astype(str)
            chunks = _chunks(variable, step_chunk)
            attributes: dict[str, Any] = {"_ARRAY_DIMENSIONS": list(variable.dims)}
            if name == "probability":
                attributes["coordinates"] = " ".join(sorted(str(c) for c in node.coords if c not in node.dims))
            described[f"{group}/{name}/.zattrs"] = attributes
            described[f"{group}/{name}/.zarray"] = {
                "zarr_format": 2,
                "shape": list(variable.shape),
                "chunks": list(chunks),
                "dtype": variable.dtype.str,
                "fill_value": None,
                "order": "C",
                "filters": None,
                "compressor": _CODEC.get_config(),
                "dimension_separator": ".",
            }
            _write_array(path / group / str(name), variable, chunks)
    for key, value in described.items():
        _write_json(path / key, value)
    _write_json(path / ".zmetadata", {"zarr_consolidated_format": 1, "metadata": described})


def _chunks(variable: xr.Variable, step_chunk: int | None) -> tuple[int, ...]:
    if variable.dims == ("step",):
        return (_STEPS,)
    if variable.dims != DIMENSIONS:
        return variable.shape
    rest = variable.shape[2:]
    # One image per chunk, and one step in a store that grows; else a few megabytes, so that there are few files.
    step = int(np.prod(rest)) * variable.dtype.itemsize
    return (step_chunk or min(variable.shape[0], max(1, 2**22 // step)), 1, *rest)


def _write_array(folder: Path, variable: xr.Variable, chunks: tuple[int, ...]) -> None:
    """Write an array into a folder: one file per chunk.

    ``chunks`` is the shape of a chunk. The array is divided along its first two dimensions only.
    """
    folder.mkdir(parents=True)
    counts = [-(-side // chunk) for side, chunk in zip(variable.shape, chunks, strict=True)]
    for place in np.ndindex(*counts):
        where = tuple(slice(at * chunk, (at + 1) * chunk) for at, chunk in zip(place, chunks, strict=True))
        values = np.asarray(variable[where].values)
        if values.shape != chunks:
            whole = np.zeros(chunks, values.dtype)
            whole[tuple(map(slice, values.shape))] = values
            values = whole
        _write_chunk(folder, place, values)


def _write_chunk(folder: Path, place: Sequence[int], values: np.ndarray) -> None:
    # A step has dozens of files: to wait for the disk at each would slow the run down.
    write_file(folder / _chunk_name(place), _CODEC.encode(np.ascontiguousarray(values)), sync=False)


def _write_json(path: Path, value: Any) -> None:
    write_file(path, json.dumps(value, ensure_ascii=False, allow_nan=False).encode(), sync=False)
