"""Where the finished steps of a recording go: memory, a running mean, or a Zarr store that grows with the run.

A store is plain Zarr (version 2), as `xarray.open_datatree` or any other reader of Zarr takes it: a group a map size
with the arrays that `Recording` describes. What makes a step part of it is one file, the consolidated metadata, which
is replaced as a whole after all the step's values are there; so whenever a run is killed, its store holds the steps
that were finished.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
import xarray as xr
from numcodecs import Blosc
from torch import Tensor

from elakit.attention.spec import readable_bytes, size_name
from elakit.errors import OutputError, RecordingError
from elakit.prompt import Prompt

DIMENSIONS = ("step", "image", "layer", "head", "y", "x", "token")
FORMAT = "elakit recording 1"
SELF = "self-"  # begins the name of a node of self-attention, whose tokens are the cells of the map

Size: TypeAlias = tuple[int, int]
Moment: TypeAlias = tuple[int, float, float]  # call, timestep, sigma
Slots: TypeAlias = dict[str, Tensor]  # of each node (image, layer, head, y, x, token)

# Steps whose call, timestep and sigma share a file.
_STEPS = 512
_CODEC = Blosc(cname="lz4", clevel=5, shuffle=Blosc.SHUFFLE)


# -- the tree ----------------------------------------------------------------------------------------------------------


def build_node(
    values: np.ndarray,
    *,
    steps: Sequence[Moment],
    layers: Sequence[tuple[str, str, int]],
    tokens: Sequence[tuple[str, int]],
    heads: str | Sequence[int],
) -> xr.Dataset:
    """One node of a recording's tree.

    Parameters
    ----------
    values : numpy.ndarray, (step, image, layer, head, y, x, token)
    steps : sequence of (call, timestep, sigma)
    layers : sequence of (name, place, position in the forward pass)
    tokens : sequence of (label, token position)
    heads : {"mean", "all"} or sequence of int
        Their numbers, where not all are kept.
    """
    calls, timesteps, sigmas = zip(*steps, strict=True)
    names, places, order = zip(*layers, strict=True)
    labels, indices = zip(*tokens, strict=True)
    numbers: Any = ["mean"] if heads == "mean" else range(values.shape[3]) if heads == "all" else list(heads)
    return xr.Dataset(
        {"probability": (DIMENSIONS, values)},
        coords={
            "step": np.asarray(calls, dtype=np.int64),
            "timestep": ("step", np.asarray(timesteps, dtype=np.float64)),
            "sigma": ("step", np.asarray(sigmas, dtype=np.float64)),
            "layer": np.asarray(names, dtype=str),
            "place": ("layer", np.asarray(places, dtype=str)),
            "order": ("layer", np.asarray(order, dtype=np.int64)),
            "head": np.asarray(numbers),
            "token": np.asarray(labels, dtype=str),
            "token_index": ("token", np.asarray(indices, dtype=np.int64)),
        },
        attrs={"size": size_name((values.shape[4], values.shape[5]))},
    )


def build_tree(
    nodes: dict[str, xr.Dataset],
    *,
    prompt: Prompt,
    family: str,
    model: str,
    calls: int,
    expected: int | None,
    averaged: int = 0,
) -> xr.DataTree:
    """A recording's tree: nodes by size name, and what holds for the whole run as attributes.

    Parameters
    ----------
    nodes : dict of str to xarray.Dataset
    prompt : Prompt
    family, model : str
    calls : int
        Calls of the denoiser that were finished.
    expected : int, optional
        Calls that the run was to have.
    averaged : int
        Steps whose mean is kept; 0 where each is kept.
    """
    tree = xr.DataTree.from_dict(dict(nodes))
    tree.attrs = {
        "format": FORMAT,
        "prompt": json.dumps(prompt.to_dict(), ensure_ascii=False),
        "family": family,
        "model": model,
        "calls": calls,
        "expected": expected or 0,
        "averaged": averaged,
        "elakit": _version(),
    }
    return tree


@dataclass(frozen=True)
class Layout:
    """What a step of a recording consists of, known before the first one.

    Attributes
    ----------
    shapes : dict of str to shape
        (image, layer, head, y, x, token) of each node.
    layers : dict of str to list of (name, place, position in the forward pass)
    tokens : dict of str to list of (label, position)
    heads : {"mean", "all"} or sequence of int
    dtype : torch.dtype
    about : dict
        Prompt, family, model and expected calls, as `build_tree` takes them.
    """

    shapes: dict[str, tuple[int, ...]]
    layers: dict[str, list[tuple[str, str, int]]]
    tokens: dict[str, list[tuple[str, int]]]
    heads: str | Sequence[int]
    dtype: torch.dtype
    about: dict[str, Any] = field(repr=False)

    def slots(self, dtype: torch.dtype | None = None, **options: Any) -> tuple[Tensor, Slots]:
        """Room for one step: one flat tensor, so that one copy moves it all, and its parts by node."""
        counts = [int(np.prod(shape)) for shape in self.shapes.values()]
        flat = torch.empty(sum(counts), dtype=dtype or self.dtype, **options)
        parts = zip(self.shapes.items(), flat.split(counts), strict=True)
        return flat, {name: part.view(shape) for (name, shape), part in parts}

    def tree(self, values: dict[str, np.ndarray], steps: Sequence[Moment], calls: int, averaged: int = 0) -> Any:
        """The recording's tree; ``values`` of each node, (step, image, layer, head, y, x, token)."""
        nodes = {
            name: build_node(
                array,
                steps=steps,
                layers=self.layers[name],
                tokens=self.tokens[name],
                heads="mean" if name.startswith(SELF) else self.heads,
            )
            for name, array in values.items()
            if steps
        }
        return build_tree(nodes, calls=calls, averaged=averaged, **self.about)


# -- sinks -------------------------------------------------------------------------------------------------------------


class Sink(Protocol):
    """Takes a run's steps, one after the other."""

    def reserve(self, step: int) -> None:
        """Make sure that there is room for so many steps and one more; `RecordingError` when there must not be."""

    def slots(self) -> Slots:
        """Where the values of the next step are to be put."""

    def commit(self, moment: Moment) -> None:
        """Take the values in the slots as the next step; interrupted, it leaves the steps before as they are."""

    def tree(self, calls: int) -> xr.DataTree:
        """The steps taken so far."""

    def finish(self, calls: int) -> xr.DataTree:
        """The steps for good."""


class Memory:
    """Keeps every step in one array a size, on the host or on the model's device.

    Parameters
    ----------
    layout : Layout
    capacity : int
        Steps to make room for.
    most : int
        Steps that the budget allows.
    device : torch.device
    """

    def __init__(self, layout: Layout, capacity: int, most: int, device: torch.device) -> None:
        self.layout = layout
        self.device = device
        self._most = most
        self._capacity = capacity
        self._steps: list[Moment] = []
        self._values = self._room(capacity)

    def _room(self, capacity: int) -> Slots:
        return {
            name: torch.empty((capacity, *shape), dtype=self.layout.dtype, device=self.device)
            for name, shape in self.layout.shapes.items()
        }

    def reserve(self, step: int) -> None:
        """Double the room of a run that is longer than expected, as far as the budget goes."""
        if step < self._capacity:
            return
        capacity = min(max(8, 2 * self._capacity), self._most)
        if step >= capacity:
            raise _over_budget(self.layout, step, self._most)
        longer, taken = self._room(capacity), len(self._steps)
        for name, values in self._values.items():
            longer[name][:taken] = values[:taken]
        self._values, self._capacity = longer, capacity

    def slots(self) -> Slots:
        """The next step's own place in the arrays."""
        return {name: values[len(self._steps)] for name, values in self._values.items()}

    def commit(self, moment: Moment) -> None:
        """Count the step whose values are in place."""
        self._steps.append(moment)

    def tree(self, calls: int) -> xr.DataTree:
        """A view of the arrays (a copy where they are not on the host)."""
        taken = {name: values[: len(self._steps)].cpu().numpy() for name, values in self._values.items()}
        return self.layout.tree(taken, self._steps, calls)

    def finish(self, calls: int) -> xr.DataTree:
        """The arrays, without the room that a run cut off did not fill."""
        full = len(self._steps) == self._capacity
        self._values = {
            name: values[: len(self._steps)].to("cpu", copy=not full) for name, values in self._values.items()
        }
        return self.tree(calls)


class RunningMean:
    """Keeps only the mean of the steps, summed in float32 on the model's device.

    Parameters
    ----------
    layout : Layout
    device : torch.device
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout = layout
        self._step, self._slots = layout.slots(torch.float32, device=device)
        # Sum and moments change in one assignment, so that an interrupt cannot part them.
        self._state: tuple[Tensor, tuple[Moment, ...]] = (torch.zeros_like(self._step), ())
        self._spare = torch.empty_like(self._step)

    def reserve(self, step: int) -> None:
        """A mean has always room."""

    def slots(self) -> Slots:
        """Where the next step is put before it is added."""
        return self._slots

    def commit(self, moment: Moment) -> None:
        """Add the step to the sum."""
        total, moments = self._state
        torch.add(total, self._step, out=self._spare)
        self._state = (self._spare, (*moments, moment))
        self._spare = total

    def tree(self, calls: int) -> xr.DataTree:
        """The mean of the steps so far, as one step."""
        total, moments = self._state
        if not moments:
            return self.layout.tree({}, (), calls)
        mean = (total / len(moments)).to(self.layout.dtype).cpu().numpy()
        values, first = {}, 0
        for name, shape in self.layout.shapes.items():
            count = int(np.prod(shape))
            values[name] = mean[first : first + count].reshape(1, *shape)
            first += count
        _, timesteps, sigmas = zip(*moments, strict=True)
        moment = (moments[-1][0], float(np.mean(timesteps)), float(np.mean(sigmas)))
        return self.layout.tree(values, [moment], calls, averaged=len(moments))

    finish = tree


class ZarrStore:
    """Writes every step to a Zarr store when it is finished; holds one step in memory.

    Parameters
    ----------
    layout : Layout
    path : pathlib.Path
        Must not be there; it appears, whole, with the first step.
    most : int
        Steps that the budget allows.
    """

    def __init__(self, layout: Layout, path: Path, most: int) -> None:
        self.layout = layout
        self.path = path
        self._most = most
        _, self._slots = layout.slots()
        self._steps: list[Moment] = []
        self._metadata: dict[str, Any] = {}

    def reserve(self, step: int) -> None:
        """A disk has room as far as the budget goes."""
        if step >= self._most:
            raise _over_budget(self.layout, step, self._most)

    def slots(self) -> Slots:
        """The one step in memory."""
        return self._slots

    def commit(self, moment: Moment) -> None:
        """Write the step, then the metadata that make it part of the store."""
        try:
            if not self._steps:
                values = {name: slot.numpy()[None] for name, slot in self._slots.items()}
                write_whole(self.layout.tree(values, [moment], moment[0] + 1), self.path, step_chunk=1)
                self._metadata = json.loads((self.path / ".zmetadata").read_text(encoding="utf-8"))
            else:
                self._append([*self._steps, moment])
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self._steps.append(moment)

    def _append(self, steps: list[Moment]) -> None:
        metadata = json.loads(json.dumps(self._metadata))
        described = metadata["metadata"]
        for node, slot in self._slots.items():
            folder = self.path / node
            for image, values in enumerate(slot.numpy()):
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
        _write_json(self.path / ".zmetadata", metadata)  # last: from here on the step is there
        self._metadata = metadata

    def tree(self, calls: int) -> xr.DataTree:
        """The store as it is now, opened lazily."""
        return open_tree(self.path) if self._steps else self.layout.tree({}, (), calls)

    def finish(self, calls: int) -> xr.DataTree:
        """Note how many calls there were, and open the store."""
        if not self._metadata:
            if self.path.exists():  # taken by somebody else in the meantime, which has raised an error
                return self.layout.tree({}, (), calls)
            try:
                write_whole(self.layout.tree({}, (), calls), self.path)
            except OSError as error:
                raise _unwritable(self.path, error) from error
            return open_tree(self.path)
        with suppress(OSError):  # a full disk ended the run; its steps are there all the same
            # From the file: an interrupt may have come when it was ahead of what is noted here.
            metadata = json.loads((self.path / ".zmetadata").read_text(encoding="utf-8"))
            metadata["metadata"][".zattrs"]["calls"] = calls
            _write_json(self.path / ".zattrs", metadata["metadata"][".zattrs"])
            _write_json(self.path / ".zmetadata", metadata)
        return open_tree(self.path)


class Staging:
    """Carries steps from an accelerator to a sink on the host, without the accelerator waiting for it.

    A step is put together in one buffer on the device and leaves it in one copy to pinned memory, queued behind the
    step's own work. It is handed on when the step after it has been queued: by then it has arrived, or nearly.
    So a run that is killed may leave one step less on disk than it had finished; one that ends in an error does not.

    Parameters
    ----------
    sink : Memory or ZarrStore
    device : torch.device
    """

    def __init__(self, sink: Memory | ZarrStore, device: torch.device) -> None:
        self._sink = sink
        self._cuda = device.type == "cuda"
        self._flat, self._slots = sink.layout.slots(device=device)
        self._hosts = [sink.layout.slots(pin_memory=self._cuda) for _ in range(2)]
        self._under_way: list[tuple[Any, Slots, Moment]] = []
        self._count = 0

    def reserve(self, step: int) -> None:
        """The sink's room; everything under way is counted in ``step``."""
        self._sink.reserve(step)

    def slots(self) -> Slots:
        """The buffer on the device."""
        return self._slots

    def commit(self, moment: Moment) -> None:
        """Send the step off, and hand on the one before."""
        flat, host = self._hosts[self._count % 2]
        flat.copy_(self._flat, non_blocking=self._cuda)
        arrived = None
        if self._cuda:
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(self._flat.device))
        self._under_way.append((arrived, host, moment))
        self._count += 1
        self._hand_on(leave=1)

    def _hand_on(self, leave: int) -> None:
        while len(self._under_way) > leave:
            arrived, host, moment = self._under_way.pop(0)
            if arrived is not None:
                arrived.synchronize()
            for name, slot in self._sink.slots().items():
                slot.copy_(host[name])
            self._sink.commit(moment)

    def tree(self, calls: int) -> xr.DataTree:
        """All steps, those under way included."""
        self._hand_on(leave=0)
        return self._sink.tree(calls)

    def finish(self, calls: int) -> xr.DataTree:
        """Wait for what is under way."""
        self._hand_on(leave=0)
        return self._sink.finish(calls)


def _over_budget(layout: Layout, step: int, most: int) -> RecordingError:
    each = sum(int(np.prod(shape)) for shape in layout.shapes.values()) * layout.dtype.itemsize
    return RecordingError(
        f"This call would take the recording to {readable_bytes((step + 1) * each)}, past its budget, which has room "
        f"for {most} steps. Raise RecordSpec(budget=...), or keep fewer steps, layers or tokens."
    )


# -- files -------------------------------------------------------------------------------------------------------------


def is_recording(path: Path) -> bool:
    """Whether a folder holds a recording."""
    try:
        return bool(json.loads((path / ".zattrs").read_text(encoding="utf-8")).get("format") == FORMAT)
    except (OSError, ValueError, AttributeError):
        return False


def open_tree(path: Path) -> xr.DataTree:
    """A recording's tree, its labels read and its values left on disk until they are used."""
    tree = xr.open_datatree(path, engine="zarr", consolidated=True, chunks=None)
    for node in tree.children.values():
        for coordinate in node.coords.values():
            coordinate.load()
    return tree


def free_path(path: str | Path) -> Path:
    """The path of a store to be written by a run; refused before the run when it cannot be.

    Raises
    ------
    OutputError
        Something is there already, or its folder cannot be written to.
    """
    target = Path(path).expanduser()
    if target.exists() or target.is_symlink():
        raise OutputError(
            f"{target} exists already; a run is written to a path that is free. Choose another, or move it."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(target, error) from error
    if not os.access(target.parent, os.W_OK):
        raise OutputError(
            f"{target} cannot be written: no permission to write to {target.parent}. Choose another path."
        )
    return target


def save_tree(tree: xr.DataTree, path: str | Path, overwrite: bool) -> Path:
    """Write a recording, whole or not at all; see `Recording.save`."""
    target = Path(path).expanduser()
    if target.exists() or target.is_symlink():
        if not is_recording(target):
            raise OutputError(f"{target} exists and is not a recording; choose another path.")
        if not overwrite:
            raise OutputError(f"{target} holds a recording already; choose another path or give overwrite=True.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(tree, target, replace=overwrite)
    except OSError as error:
        raise _unwritable(target, error) from error
    return target


def write_whole(tree: xr.DataTree, target: Path, step_chunk: int | None = None, replace: bool = False) -> None:
    """Write a store beside ``target`` and move it there, if asked in place of what was there."""
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    old = part.with_suffix(".old")
    try:
        _write_tree(tree, part, step_chunk)
        if replace and target.exists():
            target.rename(old)
        part.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _write_tree(tree: xr.DataTree, path: Path, step_chunk: int | None) -> None:
    """All files of a store, in the layout that xarray gives its own (version 2, whose text arrays are settled)."""
    described: dict[str, Any] = {".zgroup": {"zarr_format": 2}, ".zattrs": dict(tree.attrs)}
    path.mkdir()
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
    # One image a chunk, and one step in a store that grows; else a few megabytes, so that files are few.
    step = int(np.prod(rest)) * variable.dtype.itemsize
    return (step_chunk or min(variable.shape[0], max(1, 2**22 // step)), 1, *rest)


def _write_array(folder: Path, variable: xr.Variable, chunks: tuple[int, ...]) -> None:
    """Every chunk of an array; only the first two dimensions have more than one."""
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
    name = ".".join(map(str, place))
    _replace(folder / name, _CODEC.encode(np.ascontiguousarray(values)))


def _write_json(path: Path, value: Any) -> None:
    _replace(path, json.dumps(value, ensure_ascii=False, allow_nan=False).encode())


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole, in place of what was there; its folder is made."""
    part = path.with_name(f".{path.name}.part")
    try:
        file = part.open("wb")
    except FileNotFoundError:
        path.parent.mkdir(parents=True)
        file = part.open("wb")
    with file:
        file.write(content)
    part.replace(path)


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"The recording cannot be written to {path}: {error.strerror or error}. Choose a folder you may write to, with "
        "room enough."
    )


def _version() -> str:
    try:
        return importlib.metadata.version("elakit")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
