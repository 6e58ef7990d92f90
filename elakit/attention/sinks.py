"""Destinations of the finished steps of a recording: memory, a running mean, or a store on disk (`zarr_store`).

For each step, the recorder calls ``reserve``, writes the values into the tensors of ``slots``, and calls ``commit``.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from elakit.attention.layout import Joined, Layout, Moment, Slots
from elakit.attention.spec import readable_bytes
from elakit.errors import RecordingError
from elakit.numbering import number_of


class Sink(Protocol):
    """Destination of the recorded steps of a run. The sink receives one step after the other.

    Attributes
    ----------
    layout : Layout
        Shapes and labels of the values of one step.
    """

    layout: Layout

    def reserve(self, step: int) -> None:
        """Make room for step number ``step``, counted from 0; `RecordingError` if the budget does not allow it."""

    def slots(self) -> Slots:
        """Return the tensors into which the values of the next step are to be written.

        The result is a dict with one tensor for each node of the recording's tree. The keys are the names of the nodes,
        such as ``"16x16"``.
        """

    def commit(self, moment: Moment) -> None:
        """Accept the values in the tensors of `slots` as the recording's next step.

        ``moment`` contains the denoiser call, timestep and sigma of the step. If this method is interrupted, the
        earlier steps remain unchanged.
        """

    def tree(self, calls: int) -> xr.DataTree:
        """Return the recording's tree with the steps so far; ``calls`` is the number of finished denoiser calls."""

    def finish(self, calls: int) -> xr.DataTree:
        """Return the recording's tree with all steps. The sink is not used afterwards.

        ``calls`` is the number of finished denoiser calls.
        """


class Memory:
    """Sink that keeps every step in arrays, on the host or on the model's device.

    Memory is allocated in blocks of several steps. A run that is longer than expected gets further blocks, and existing
    blocks are not copied. If a run ends early, allocated memory that was not written takes no physical memory.

    Parameters
    ----------
    layout : Layout
        Shapes and labels of the values of one step.
    capacity : int
        Number of steps to allocate at first.
    limit : int
        Number of steps that the budget allows.
    device : torch.device
        Device of the arrays.
    """

    def __init__(self, layout: Layout, capacity: int, limit: int, device: torch.device) -> None:
        self.layout = layout
        self.device = device
        self._limit = limit
        self._steps: list[Moment] = []
        self._blocks: list[Slots] = []
        self._starts: list[int] = []  # first step of each block
        self._capacity = 0
        self._add(capacity)

    def _add(self, steps: int) -> None:
        block = {
            name: torch.empty((steps, *node.shape), dtype=self.layout.dtype, device=self.device)
            for name, node in self.layout.nodes.items()
        }
        self._blocks.append(block)
        self._starts.append(self._capacity)
        self._capacity += steps

    def reserve(self, step: int) -> None:
        """Add a block of steps if the run is longer than expected; `RecordingError` if the budget does not allow it.

        ``step`` is the number of the next step, counted from 0.
        """
        if step < self._capacity:
            return
        room = min(max(8, self._capacity // 2), self._limit - self._capacity)
        if room <= 0:
            raise over_budget(self.layout, step, self._limit)
        self._add(room)

    def slots(self) -> Slots:
        """Return the parts of the arrays into which the values of the next step are to be written."""
        step = len(self._steps)
        block = next(i for i in reversed(range(len(self._starts))) if self._starts[i] <= step)
        return {name: values[step - self._starts[block]] for name, values in self._blocks[block].items()}

    def commit(self, moment: Moment) -> None:
        """Accept the values that were written into the tensors of `slots` as the next step of the recording.

        ``moment`` contains the denoiser call, timestep and sigma of the step.
        """
        self._steps.append(moment)

    def tree(self, calls: int) -> xr.DataTree:
        """Return the recording's tree with the steps so far; ``calls`` is the number of finished denoiser calls.

        The values are views of the arrays that keep the steps. If these arrays are not on the host, the
        values are copies.
        """
        values: dict[str, Any] = {}
        for name in self.layout.nodes:
            parts = [
                block[name][: len(self._steps) - start].cpu().numpy()
                for start, block in zip(self._starts, self._blocks, strict=True)
                if start < len(self._steps)
            ]
            if parts:
                values[name] = parts[0] if len(parts) == 1 else Joined(parts)
        return self.layout.tree(values, self._steps, calls)

    def finish(self, calls: int) -> xr.DataTree:
        """Return the recording's tree with all steps; ``calls`` is the number of finished denoiser calls.

        If the arrays that keep the steps are not on the host, they are copied to the host and freed.
        """
        tree = self.tree(calls)
        if self.device.type != "cpu":
            self._blocks.clear()
        return tree


class RunningMean:
    """Sink that keeps only the mean over the steps. The steps are summed in float32 on the model's device.

    Parameters
    ----------
    layout : Layout
        Shapes and labels of the values of one step.
    device : torch.device
        Device of the model.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout = layout
        self._step, self._slots = layout.slots(torch.float32, device=device)
        # Sum and moments change in one assignment, so that an interrupt cannot separate them.
        self._state: tuple[Tensor, tuple[Moment, ...]] = (torch.zeros_like(self._step), ())
        self._spare = torch.empty_like(self._step)

    def reserve(self, step: int) -> None:
        """Do nothing: a mean always has room."""

    def slots(self) -> Slots:
        """Return the tensors into which the next step's values are to be written; `commit` adds them to the sum."""
        return self._slots

    def commit(self, moment: Moment) -> None:
        """Add the values in the tensors of `slots` to the sum over the steps.

        ``moment`` contains the denoiser call, timestep and sigma of the step.
        """
        total, moments = self._state
        torch.add(total, self._step, out=self._spare)
        self._state = (self._spare, (*moments, moment))
        self._spare = total

    def tree(self, calls: int) -> xr.DataTree:
        """Return a tree with a single step, the mean of the steps so far.

        ``calls`` is the number of finished denoiser calls.
        """
        total, moments = self._state
        if not moments:
            return self.layout.tree({}, (), calls)
        mean = (total / len(moments)).to(self.layout.dtype).cpu().numpy()
        values, first = {}, 0
        for name, node in self.layout.nodes.items():
            count = int(np.prod(node.shape))
            values[name] = mean[first : first + count].reshape(1, *node.shape)
            first += count
        _, timesteps, sigmas = zip(*moments, strict=True)
        moment = (moments[-1][0], float(np.mean(timesteps)), float(np.mean(sigmas)))
        return self.layout.tree(values, [moment], calls, averaged=len(moments))

    finish = tree


class Staging:
    """Sink that copies steps from an accelerator to the host, without making the accelerator wait.

    A second sink, on the host, keeps the copied steps. The values of a step are collected in one buffer on the
    accelerator. The copy of this buffer to pinned memory on the host is queued behind the work of the step. The step is
    passed on to the second sink when the copy of the next step has been queued. If the copy of the earlier step is not
    complete by then, which is rare, the host waits.

    If a run is killed, its last step may therefore be missing on disk. If a run ends in an error, no finished step is
    missing.

    Parameters
    ----------
    sink : Sink
        The second sink, which keeps the steps on the host.
    device : torch.device
        The accelerator.
    """

    def __init__(self, sink: Sink, device: torch.device) -> None:
        self.layout = sink.layout
        self._sink = sink
        self._cuda = device.type == "cuda"
        self._flat, self._slots = sink.layout.slots(device=device)
        self._hosts = [sink.layout.slots(pin_memory=self._cuda) for _ in range(2)]
        self._in_transit: list[tuple[Any, Slots, Moment]] = []
        self._count = 0

    def reserve(self, step: int) -> None:
        """Make room for step number ``step``, counted from 0, in the sink on the host.

        The number includes steps that are still being copied to the host.
        """
        self._sink.reserve(step)

    def slots(self) -> Slots:
        """Return the tensors into which the next step is to be written: views of the buffer on the device."""
        return self._slots

    def commit(self, moment: Moment) -> None:
        """Queue the copy of the step to the host, and pass the previous step on to the sink on the host.

        ``moment`` contains the denoiser call, timestep and sigma of the step.
        """
        flat, host = self._hosts[self._count % 2]
        flat.copy_(self._flat, non_blocking=self._cuda)
        arrived = None
        if self._cuda:
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(self._flat.device))
        self._in_transit.append((arrived, host, moment))
        self._count += 1
        self._hand_on(leave=1)

    def _hand_on(self, leave: int) -> None:
        while len(self._in_transit) > leave:
            arrived, host, moment = self._in_transit.pop(0)
            if arrived is not None:
                arrived.synchronize()
            for name, slot in self._sink.slots().items():
                slot.copy_(host[name])
            self._sink.commit(moment)

    def tree(self, calls: int) -> xr.DataTree:
        """Return the recording's tree with the steps so far, after waiting for the steps that are still being copied.

        ``calls`` is the number of finished denoiser calls.
        """
        self._hand_on(leave=0)
        return self._sink.tree(calls)

    def finish(self, calls: int) -> xr.DataTree:
        """Return the recording's tree with all steps, after waiting for the steps that are still being copied.

        ``calls`` is the number of finished denoiser calls. The sink is not used afterwards.
        """
        self._hand_on(leave=0)
        return self._sink.finish(calls)


def over_budget(layout: Layout, step: int, limit: int) -> RecordingError:
    """Build the error for a denoiser call whose step would exceed the budget of the recording.

    ``step`` is the number of this step, counted from 0. ``limit`` is the number of steps that the budget allows.
    ``layout`` gives the number of bytes per step.
    """
    return RecordingError(
        f"This denoiser call would bring the recording to {readable_bytes((step + 1) * layout.step_bytes)}, but its "
        f"budget has room for {number_of(limit, 'step')}. Raise RecordSpec(budget=...), or keep fewer steps, layers "
        "or tokens."
    )
