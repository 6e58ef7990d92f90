"""Destinations of steps: a store on disk that grows with the run, memory, and running means."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_flux, tiny_pipeline, tiny_pixart, tiny_sd3, tiny_sdxl
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from elakit.attention import RecordSpec, open_recording, record, zarr_store
from elakit.attention.layout import Layout, NodeLayout
from elakit.attention.sinks import Memory, RunningMean, Staging
from elakit.attention.zarr_store import ZarrStore
from elakit.errors import OutputError, RecordingError, SettingError
from elakit.models import adapter_for
from elakit.prompt import Prompt, Token, parse

TEXT = "a [red car] and a [blue bird]"


def draw(pipe: Any, text: str, steps: int = 3, **options: Any) -> torch.Tensor:
    """Generate the latents of an image from a fixed seed."""
    options = {"generator": torch.Generator().manual_seed(7), "output_type": "latent"} | options
    return pipe(text, num_inference_steps=steps, **options).images


def stop_at(pipe: Any, call: int, error: BaseException) -> Any:
    """Raise an error in the middle of a denoiser call, after some of its layers have run."""
    calls = 0

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise error

    return pipe.unet.up_blocks[1].attentions[0].register_forward_pre_hook(hook)


@pytest.fixture(scope="module")
def shared_pipe() -> Any:
    return tiny_pipeline()


# -- a store that grows with the run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["ddim", "heun"])
def test_a_store_holds_what_memory_would(scheduler: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(scheduler=scheduler)
    prompt = parse(TEXT, pipe)
    spec = RecordSpec(heads="all", dtype="float16")
    with record(pipe, prompt, spec) as kept:
        plain = draw(pipe, prompt.text, num_images_per_prompt=2)
    with record(pipe, prompt, spec, store=tmp_path / "runs" / "a run.zarr") as written:
        seen = draw(pipe, prompt.text, num_images_per_prompt=2)
    assert torch.equal(plain, seen)
    assert written.steps == kept.steps == tuple(range(5 if scheduler == "heun" else 3))
    opened = open_recording(tmp_path / "runs" / "a run.zarr")
    for recording in (written, opened):
        assert recording.tree.attrs == kept.tree.attrs
        assert repr(recording) == repr(kept)
        for name, node in kept.tree.children.items():
            xr.testing.assert_identical(recording.tree[name].to_dataset().load(), node.to_dataset())
    xr.testing.assert_identical(opened.maps("entities", normalize="start"), kept.maps("entities", normalize="start"))
    # A recording saved from memory, from the store, or from a part of it has the same format.
    again = open_recording(opened.sel(step=[0, 2], token="car").save(tmp_path / "part"))
    assert again.steps == (0, 2)
    np.testing.assert_array_equal(again.maps("car"), kept.maps("car", steps=[0, 2]))


def test_a_store_is_read_without_elakit(pipe: Any, prompt: Prompt, tmp_path: Path) -> None:
    with record(pipe, prompt, RecordSpec(dtype="float32"), store=tmp_path / "run.zarr") as recording:
        draw(pipe, prompt.text)
    tree = xr.open_datatree(tmp_path / "run.zarr", engine="zarr")
    assert json.loads(tree.attrs["prompt"])["text"] == prompt.text
    seen = tree["8x8"]["probability"].sel(token="car", step=2).mean(("layer", "head")).squeeze("image", drop=True)
    np.testing.assert_allclose(seen, recording.maps("car", size=8)[-1, 0], rtol=1e-6)
    # Also for readers without consolidated metadata: the file of every array has the same shape.
    for path in (tmp_path / "run.zarr").rglob(".zarray"):
        described = json.loads(path.read_text())
        assert described["shape"] == list(tree[path.parent.parent.name][path.parent.name].shape)


def test_a_store_is_a_step_a_chunk_and_can_be_read_while_it_grows(pipe: Any, prompt: Prompt, tmp_path: Path) -> None:
    path, seen = tmp_path / "run.zarr", []

    def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(open_recording(path).maps("car").values)
        return tensors

    with record(pipe, prompt, RecordSpec(dtype="float32"), store=path) as recording:
        assert not path.exists()
        draw(pipe, prompt.text, callback_on_step_end=look)
    final = recording.maps("car").values
    assert [len(maps) for maps in seen] == [1, 2, 3]
    for maps in seen:
        np.testing.assert_array_equal(maps, final[: len(maps)])
    assert len(list((path / "8x8" / "probability").glob("[0-9]*"))) == 3


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), KeyboardInterrupt()])
def test_a_run_cut_off_leaves_its_full_steps_on_disk(
    error: BaseException, pipe: Any, prompt: Prompt, tmp_path: Path
) -> None:
    with record(pipe, prompt) as whole:
        draw(pipe, prompt.text, steps=4)
    handle = stop_at(pipe, 2, error)
    with pytest.raises(type(error)), record(pipe, prompt, store=tmp_path / "run.zarr") as recording:
        draw(pipe, prompt.text, steps=4)
    handle.remove()
    for cut in (recording, open_recording(tmp_path / "run.zarr")):
        assert "cut off: 2 of 4" in repr(cut)
        xr.testing.assert_identical(cut.maps(), whole.maps(steps=slice(0, 2)))
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.zarr"]


_KILLED = """
import sys
sys.path.insert(0, {tests!r})
import torch
from tiny import tiny_pipeline
from elakit.attention import RecordSpec, record
from elakit.prompt import parse
pipe = tiny_pipeline()
prompt = parse({text!r}, pipe)
with record(pipe, prompt, RecordSpec(dtype="float32"), store={path!r}):
    pipe(prompt.text, num_inference_steps=900, generator=torch.Generator().manual_seed(7), output_type="latent")
"""


def test_a_run_that_is_killed_leaves_a_store_that_opens(pipe: Any, prompt: Prompt, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    code = _KILLED.format(tests=str(Path(__file__).parents[1]), text=TEXT, path=str(path))
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 600
        while not (path / "8x8" / "probability" / "5.0.0.0.0.0.0").exists():
            assert process.poll() is None, "the run ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    cut = open_recording(path)
    assert len(cut.steps) >= 5
    assert cut.steps == tuple(range(len(cut.steps)))
    assert "cut off" in repr(cut)
    np.testing.assert_allclose(cut.maps().sum("token"), 1, atol=1e-5)
    with record(pipe, prompt, RecordSpec(steps=slice(0, 5), dtype="float32")) as whole:
        handle = stop_at(pipe, 5, RuntimeError("enough"))
        with pytest.raises(RuntimeError, match="enough"):
            draw(pipe, prompt.text, steps=900)
        handle.remove()
    np.testing.assert_allclose(cut.maps(steps=slice(0, 5)), whole.maps(), atol=1e-6)


def layout(images: int = 1, dtype: torch.dtype = torch.float32) -> Layout:
    """Two sizes, three layers, two tokens."""
    prompt = Prompt("car", (), (Token(1, "car", "car", 0),), 2, 4)
    tokens = [("<start>", 0), ("<end>", -1)]
    large = NodeLayout(
        shape=(images, 2, 1, 2, 3, 2), layers=[("a", "down", 0), ("c", "up", 2)], tokens=tokens, heads="mean"
    )
    small = NodeLayout(shape=(images, 1, 1, 1, 1, 2), layers=[("b", "mid", 1)], tokens=tokens, heads="mean")
    return Layout(
        nodes={"2x3": large, "1x1": small},
        dtype=dtype,
        about={"prompt": prompt, "family": "test", "model": "Test", "expected": 9},
    )


def fill(sink: Any, step: int) -> None:
    """Give a sink a step whose values encode step, size and position."""
    sink.reserve(step)
    for name, slot in sink.slots().items():
        slot.copy_((torch.arange(slot.numel()) + 100 * step + 10 * int(name[0])).view(slot.shape))
    sink.commit((2 * step, 900.0 - step, 0.5))


@pytest.mark.parametrize("broken", ["8.0.0.0.0.0.0", "step", ".zarray", ".zattrs", ".zmetadata"])
def test_a_write_that_breaks_off_anywhere_leaves_the_steps_before(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = ZarrStore(layout(), tmp_path / "run.zarr", limit=99)
    for step in range(8):
        fill(sink, step)
    replace = os.replace

    def fail(part: Path, path: Path) -> None:
        if broken in (path.name, path.parent.name):
            raise OSError(28, "No space left on device")
        replace(part, path)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match="No space left"):
        fill(sink, 8)
    killed = open_recording(tmp_path / "run.zarr")
    assert killed.steps == tuple(range(0, 16, 2))
    assert killed.tree["2x3"]["probability"].values[7].ravel().tolist() == [720 + i for i in range(24)]
    sink.finish(calls=17)
    assert len(open_recording(tmp_path / "run.zarr").steps) == 8


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.integers(0, 12),
    images=st.integers(1, 3),
    capacity=st.integers(1, 13),
    half=st.booleans(),
    chunk=st.sampled_from([3, 512]),
    kind=st.sampled_from(["memory", "staged memory", "zarr", "staged zarr"]),
)
def test_every_sink_gives_back_what_it_was_given(
    steps: int,
    images: int,
    capacity: int,
    half: bool,
    chunk: int,
    kind: str,
    tmp_path_factory: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(zarr_store, "_STEPS", chunk)  # a run may fill several files of step coordinates
    shape, cpu = layout(images, torch.float16 if half else torch.float32), torch.device("cpu")
    path = tmp_path_factory.mktemp("sink") / "run.zarr"
    inner: Any = ZarrStore(shape, path, limit=12) if "zarr" in kind else Memory(shape, capacity, 12, cpu)
    sink = Staging(inner, cpu) if "staged" in kind else inner
    for step in range(steps):
        fill(sink, step)
    tree = sink.finish(calls=40)
    if not steps:
        assert not tree.children
        return
    for size, where in {"2x3": 20, "1x1": 10}.items():
        values = tree[size]["probability"].values
        count = values[0].size
        assert values.reshape(steps, count).tolist() == [
            [100 * step + where + i for i in range(count)] for step in range(steps)
        ]
        assert tree[size]["step"].values.tolist() == list(range(0, 2 * steps, 2))
        assert tree[size]["timestep"].values.tolist() == [900.0 - step for step in range(steps)]
    assert tree.attrs["calls"] == 40


@pytest.mark.parametrize("runs", [(3,), (10, 10), (10, 14), (24,)])
def test_memory_never_takes_more_than_its_steps(runs: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a run that ends early nor several runs in a block need room for a second copy."""
    allocated = 0
    empty = torch.empty

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal allocated
        made = empty(*args, **kwargs)
        allocated += made.nbytes
        return made

    monkeypatch.setattr(torch, "empty", counted)
    planned, most = 10, 24
    sink = Memory(layout(), planned, most, torch.device("cpu"))
    for step in range(sum(runs)):
        fill(sink, step)
    blocks = [block["2x3"] for block in sink._blocks]
    tree = sink.finish(calls=sum(runs))
    assert allocated <= most * layout().step_bytes
    values = tree["2x3"]["probability"]
    if sum(runs) <= planned:
        assert np.shares_memory(values.values, blocks[0].numpy())
    assert values.values[:, 0, 0, 0, 0, 0, 0].tolist() == [100 * step + 20 for step in range(sum(runs))]
    np.testing.assert_array_equal(values.isel(step=-1).values, values.values[-1])
    if sum(runs) == most:
        with pytest.raises(RecordingError, match="room for 24 steps"):
            fill(sink, most)


# -- on an accelerator, as far as a processor can tell -----------------------------------------------------------------


class OnHost(Layout):
    """Allocates on the host, whatever the device."""

    def slots(self, dtype: torch.dtype | None = None, **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return super().slots(dtype)


class Copies(TorchFunctionMode):
    """Logs every copy into an existing tensor, and whether it waits."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            self.log.append("copy that waits for nothing" if (kwargs or {}).get("non_blocking") else "copy")
        return func(*args, **(kwargs or {}))


def test_a_step_leaves_the_accelerator_in_one_copy_that_nothing_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def record(self, stream: Any) -> None:
            log.append("event")

        def synchronize(self) -> None:
            log.append("wait")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    known = layout()
    sink = Memory(OnHost(**vars(known)), capacity=3, limit=9, device=torch.device("cpu"))
    staging = Staging(sink, torch.device("cuda"))
    for step in range(3):
        staging.reserve(step)
        for slot in staging.slots().values():
            slot.fill_(step)
        with Copies(log):
            staging.commit((step, 0.0, 0.0))
    to_the_host, into_the_recording = ["copy that waits for nothing", "event"], ["wait", "copy", "copy"]
    assert log == [
        *to_the_host,
        *(to_the_host + into_the_recording) * 2,
    ]  # each step is handed on after the next one has been sent
    tree = staging.finish(calls=3)
    for size in known.nodes:
        assert [set(values.ravel()) for values in tree[size]["probability"].values] == [{0.0}, {1.0}, {2.0}]


class Waits(TorchDispatchMode):
    """Counts operations that would make a host wait for its accelerator."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "item")
        self.count += func.__name__.split(".")[0] in names
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl, tiny_pixart, tiny_sd3, tiny_flux])
def test_no_layer_makes_the_host_wait(make: Any) -> None:
    pipe = make()
    options: dict[str, Any] = {"use_resolution_binning": False} if make is tiny_pixart else {}
    options |= {"height": 32, "width": 32} if make is tiny_flux else {}
    prompt = parse(TEXT, pipe)
    names = [layer.name for layer in adapter_for(pipe).layers()]
    counts = []
    for spec in (RecordSpec(layers=names[:1]), RecordSpec(), RecordSpec(heads=[1, 0])):
        with Waits() as waits, record(pipe, prompt, spec) as recording:
            draw(pipe, prompt.text, steps=2, **options)
        counts.append(waits.count)
        assert len(recording.layers) == (1 if spec.layers != "all" else len(names))
    assert counts[0] == counts[1] == counts[2]


def test_a_path_that_is_taken_is_refused_before_the_run(pipe: Any, prompt: Prompt, tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("years of work")
    for path in (tmp_path / "thesis", tmp_path / "thesis" / "run.zarr"):
        with pytest.raises(OutputError, match="thesis"), record(pipe, prompt, store=path):
            draw(pipe, prompt.text)
    assert (tmp_path / "thesis").read_text() == "years of work"
    both = record(pipe, prompt, RecordSpec(device="model"), store=tmp_path / "run.zarr")
    with pytest.raises(SettingError, match="Leave out device='model', or"), both:
        draw(pipe, prompt.text)
    with record(pipe, prompt, store=tmp_path / "empty.zarr"):
        pass  # no run
    assert open_recording(tmp_path / "empty.zarr").steps == ()


def test_another_recording_that_came_first_is_never_replaced(pipe: Any, prompt: Prompt, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    with record(pipe, prompt) as other:
        draw(pipe, prompt.text, steps=1)

    def meanwhile(*_: Any) -> None:
        other.save(path)

    pipe.unet.conv_in.register_forward_hook(meanwhile)
    with pytest.raises(OutputError, match="already exists"), record(pipe, prompt, store=path):
        draw(pipe, prompt.text, steps=2)
    assert open_recording(path).steps == (0,)
    assert open_recording(path).tree.attrs == other.tree.attrs


def test_a_store_keeps_to_the_budget(pipe: Any, prompt: Prompt, tmp_path: Path) -> None:
    adapter = adapter_for(pipe)
    embeds = adapter.encode(prompt.text, guided=False)
    one = RecordSpec().plan(pipe, prompt, steps=1).bytes
    spec = RecordSpec(budget=3 * one)
    with record(pipe, prompt, spec, store=tmp_path / "run.zarr") as recording, torch.no_grad():
        for step in range(3):
            adapter.denoise(torch.zeros(1, 4, 8, 8), 1000 - step, embeds)
        with pytest.raises(RecordingError, match="room for 3 steps"):
            adapter.denoise(torch.zeros(1, 4, 8, 8), 997, embeds)
    assert recording.steps == (0, 1, 2)


# -- means -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["euler", "heun"])
def test_a_mean_is_the_mean_of_what_is_kept(scheduler: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(scheduler=scheduler)
    prompt = parse(TEXT, pipe)
    with record(pipe, prompt, RecordSpec(steps=2, dtype="float32")) as each:
        plain = draw(pipe, prompt.text, steps=5)
    spec = RecordSpec(dtype="float32", steps=2, accumulate=True)
    with record(pipe, prompt, spec, store=tmp_path / "mean.zarr") as mean:
        assert torch.equal(plain, draw(pipe, prompt.text, steps=5))
    for recording in (mean, open_recording(tmp_path / "mean.zarr")):
        assert recording.averaged == len(each.steps)
        assert recording.steps == each.steps[-1:]
        assert f"mean of {len(each.steps)} of" in repr(recording)
        for name, node in each.tree.children.items():
            kept = recording.tree[name].to_dataset()
            np.testing.assert_allclose(kept["probability"][0], node["probability"].mean("step"), atol=1e-6)
            np.testing.assert_allclose(kept["sigma"], node["sigma"].mean())
            np.testing.assert_allclose(kept["timestep"], node["timestep"].mean())
        np.testing.assert_allclose(
            recording.maps("entities", layers="up"),
            each.maps("entities", layers="up").mean("step").expand_dims("step"),
            atol=1e-6,
        )
    assert each.averaged == 0


def test_a_mean_takes_the_bytes_of_one_step_and_says_so(shared_pipe: Any) -> None:
    prompt = parse(TEXT, shared_pipe)
    one = RecordSpec().plan(shared_pipe, prompt, steps=1)
    plan = RecordSpec(accumulate=True, budget=one.bytes).plan(shared_pipe, prompt, steps=50)
    assert plan.bytes == plan.step_bytes == one.bytes
    assert "mean of 50 steps" in str(plan)
    with pytest.raises(RecordingError, match="accumulate=True"):
        RecordSpec(budget=one.bytes).plan(shared_pipe, prompt, steps=2)
    with record(shared_pipe, prompt, RecordSpec(accumulate=True, budget=one.bytes)) as recording:
        draw(shared_pipe, prompt.text, steps=4)
    assert recording.nbytes == plan.bytes


def test_a_mean_cut_off_is_that_of_the_full_steps(pipe: Any, prompt: Prompt) -> None:
    with record(pipe, prompt, RecordSpec(dtype="float32")) as whole:
        draw(pipe, prompt.text, steps=4)
    stop_at(pipe, 3, KeyboardInterrupt())
    with (
        pytest.raises(KeyboardInterrupt),
        record(pipe, prompt, RecordSpec(accumulate=True, dtype="float32")) as recording,
    ):
        draw(pipe, prompt.text, steps=4)
    assert recording.averaged == 3
    np.testing.assert_allclose(recording.maps()[0], whole.maps(steps=slice(0, 3)).mean("step"), atol=1e-6)


@settings(deadline=None, max_examples=9)
@given(steps=st.integers(1, 9))
def test_a_running_mean_can_be_looked_at_at_any_step(steps: int) -> None:
    sink = RunningMean(layout(), torch.device("cpu"))
    for step in range(steps):
        fill(sink, step)
        tree = sink.tree(calls=2 * step + 1)
        assert tree["1x1"]["probability"].values.ravel().tolist() == [50 * step + 10, 50 * step + 11]
        assert tree.attrs["averaged"] == step + 1


# -- what is kept ------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    side=st.tuples(st.sampled_from([24, 32]), st.sampled_from([32, 48])),
    tokens=st.one_of(
        st.sampled_from(["words", "entities", "all"]),
        st.lists(st.integers(0, 19), min_size=1, max_size=5),
        st.lists(st.sampled_from(["car", "red", "bird", "blue bird"]), min_size=1, max_size=3),
    ),
    heads=st.sampled_from(["mean", [0], [1, 0]]),
    layers=st.sampled_from(["all", "up", ["mid", "down"]]),
    device=st.sampled_from(["cpu", "model"]),
    every=st.sampled_from([None, 2, slice(1, None)]),
)
def test_whatever_is_asked_for_is_a_part_of_everything(
    side: tuple[int, int], tokens: Any, heads: Any, layers: Any, device: Any, every: Any, shared_pipe: Any
) -> None:
    prompt = parse(TEXT, shared_pipe)
    size = {"height": side[0], "width": side[1]}
    with record(shared_pipe, prompt, RecordSpec(tokens="all", heads="all", dtype="float32")) as everything:
        draw(shared_pipe, prompt.text, steps=2, **size)
    spec = RecordSpec(tokens=tokens, heads=heads, layers=layers, device=device, steps=every, dtype="float32")
    with record(shared_pipe, prompt, spec) as some:
        draw(shared_pipe, prompt.text, steps=2, **size)
    assert some.nbytes == spec.plan(shared_pipe, prompt, steps=2, **size).bytes
    for name, node in some.tree.children.items():
        whole = everything.tree[name].to_dataset()["probability"]
        whole = whole.sel(step=node["step"], layer=node["layer"])
        index = [list(whole["token_index"].values).index(i) for i in node["token_index"].values]
        whole = whole.isel(token=index)
        whole = whole.mean("head", keepdims=True) if heads == "mean" else whole.sel(head=heads)
        np.testing.assert_allclose(node["probability"], whole, atol=1e-6)
        assert node["head"].values.tolist() == (["mean"] if heads == "mean" else heads)


def test_a_head_that_is_not_there_is_named(shared_pipe: Any) -> None:
    prompt = parse(TEXT, shared_pipe)
    count = min(layer.heads for layer in adapter_for(shared_pipe).layers())
    with pytest.raises(
        RecordingError, match=rf"heads=\[0, {count}\]: .* have only {count} heads?. Give indices below {count}"
    ):
        RecordSpec(heads=[0, count]).plan(shared_pipe, prompt, steps=1)
