"""One sweep on several machines: shards, devices, GPUs and Dask workers."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from commands import call

from elakit.errors import SettingError
from elakit.sweep import plan, run, shard, table, workers

PROMPTS = [f"a cat and a {noun}" for noun in ("dog", "frog", "lion", "bear", "bird")]

# A process that generates one shard with rows that depend on the unit alone, without importing a model.
PROCESS = """
import sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from elakit.sweep.sweep import run
from elakit.sweep.units import plan

def pretend(unit):
    rng = np.random.default_rng(int(unit.key, 16))
    return [{**unit.labels(), "seed": seed, "success": bool(rng.random() < 0.5)} for seed in unit.seeds]

prompts = [f"a cat and a {noun}" for noun in ("dog", "frog", "lion", "bear", "bird")]
index = int(sys.argv[2])
with ThreadPoolExecutor(1) as pool:
    units = plan(prompts, [1, 3], ["plain"], batch=1)
    run(units, sys.argv[1], pool, generate=pretend, shard=(index, 3) if index else None)
"""


def test_three_shards_in_three_processes_give_the_table_of_one(tmp_path: Path) -> None:
    jobs = [(tmp_path / "sharded", index) for index in (1, 2, 3)] + [(tmp_path / "whole", 0)]
    command = [sys.executable, "-c", PROCESS]
    processes = [subprocess.Popen([*command, str(folder), str(index)]) for folder, index in jobs]
    assert [process.wait() for process in processes] == [0] * 4
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "units").iterdir()}
    assert len(files) == 10
    assert {path.name: path.read_bytes() for path in (tmp_path / "sharded" / "units").iterdir()} == files
    for name in ("sharded", "whole"):
        table(tmp_path / name).to_parquet(tmp_path / f"{name}.parquet")
    assert (tmp_path / "sharded.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert (tmp_path / "sharded" / "sweep.json").read_text() == (tmp_path / "whole" / "sweep.json").read_text()


@pytest.mark.slow
def test_the_command_with_three_shards_generates_the_table_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole sweep in a worker process, as users run it; the shards in this one, which has imported torch."""
    (tmp_path / "prompts.txt").write_text("a [cat]\na [red car] and a [dog]\na [frog]\n")
    words = f"sweep run --prompts {tmp_path / 'prompts.txt'} --seeds 1 --methods plain --steps 2 --device cpu".split()
    command = [sys.executable, "-m", "elakit", *words, "--workers", "1", "--threads", "1"]
    done = subprocess.run([*command, "--out", str(tmp_path / "whole")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr("elakit.sweep.cli._executor", lambda _: ThreadPoolExecutor(1))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for index in (1, 2, 3):
            assert call(monkeypatch, *words, "--out", str(tmp_path / "sharded"), "--shard", f"{index}/3") == 0
            assert len(list((tmp_path / "sharded" / "units").iterdir())) == index
    finally:
        torch.set_num_threads(before)
    sharded, whole = (table(tmp_path / name).drop(columns=["seconds"]) for name in ("sharded", "whole"))
    assert len(whole) == 3
    pd.testing.assert_frame_equal(sharded, whole)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_shards_are_disjoint_cover_all_units_and_differ_by_one_unit_at_most(count: int) -> None:
    units = plan(PROMPTS, [1, 3])
    parts = [shard(units, index, count) for index in range(1, count + 1)]
    assert sorted(unit.key for part in parts for unit in part) == sorted(unit.key for unit in units)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert shard(units[::-1], 1, count) == parts[0][::-1]


@pytest.mark.parametrize(("index", "count"), [(0, 3), (4, 3), (1, 0)])
def test_a_shard_that_does_not_exist_is_refused(index: int, count: int) -> None:
    with pytest.raises(SettingError, match=f"no shard {index} of {count}"):
        shard(plan(PROMPTS, [1]), index, count)


def test_the_device_is_not_part_of_a_unit(tmp_path: Path) -> None:
    def pretend(unit: Any) -> list[dict[str, Any]]:
        return [{**unit.labels(), "seed": seed, "device": unit.device} for seed in unit.seeds]

    units = plan(PROMPTS, [1], device="cpu")
    elsewhere = [replace(unit, device="cuda:1") for unit in units]
    assert [unit.key for unit in units] == [unit.key for unit in elsewhere]
    with ThreadPoolExecutor(1) as pool:
        run(units[:4], tmp_path, pool, generate=pretend)
        outcome = run(elsewhere, tmp_path, pool, generate=pretend)
    assert (outcome.earlier, outcome.generated) == (4, 6)
    assert set(table(tmp_path)["device"]) == {"cpu", "cuda:1"}  # the device that was used, for comparing times


def test_each_worker_process_sees_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import multiprocessing
    import signal

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(workers, "_end_with", lambda _: None)  # would end this process with its parent
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert workers.visible_gpus(None) == workers.visible_gpus("cuda") == ("0", "1", "2")
    assert workers.visible_gpus("cuda:1") == workers.visible_gpus("cpu") == ()
    assert workers.default_workers("cuda", 1) == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-ab,6")
    gpus = workers.visible_gpus("cuda")
    assert gpus == ("4", "GPU-ab", "6")
    started = multiprocessing.get_context("spawn").Value("i", 0)
    seen = []
    for _ in range(4):
        workers._prepare(None, started, gpus)  # type: ignore[arg-type]
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["4", "GPU-ab", "6", "4"]


class Cluster:
    """Stands in for a Dask client."""

    def __init__(self, threads: dict[str, int]) -> None:
        self.threads = threads
        self.scheduler = type("Scheduler", (), {"address": "tcp://host:8786"})

    def wait_for_workers(self, count: int, timeout: float) -> None:
        if len(self.threads) < count:
            raise TimeoutError

    def nthreads(self) -> dict[str, int]:
        return self.threads


def test_a_dask_scheduler_without_workers_gives_a_message() -> None:
    with pytest.raises(SettingError, match=r"tcp://host:8786 has no worker.*dask worker tcp://host:8786 --nthreads 1"):
        workers.check_dask_workers(Cluster({}), wait=0)


def test_dask_workers_with_several_threads_are_refused(tmp_path: Path) -> None:
    workers.check_dask_workers(Cluster({"tcp://a:1": 1, "tcp://b:2": 1}))
    crowded = Cluster({"tcp://a:1": 1, "tcp://b:2": 8})
    with pytest.raises(SettingError, match=r"tcp://b:2 has 8 threads.*--nthreads 1"):
        workers.check_dask_workers(crowded)
    executor = ThreadPoolExecutor(1)
    executor._client = crowded  # type: ignore[attr-defined]
    with executor, pytest.raises(SettingError, match="8 threads"):
        run(plan(PROMPTS, [1]), tmp_path, executor, generate=lambda unit: [])
