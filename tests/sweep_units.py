"""Units of a sweep and functions that pretend to generate them, for tests that start processes.

Worker processes import this module by name, so it must not import torch.
"""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from elakit.sweep import Unit, plan

PROMPTS = [f"a cat and a {noun}" for noun in ("dog", "frog", "lion", "bear", "bird")]


def units(**settings: Any) -> list[Unit]:
    return plan(PROMPTS, [1, 3], ["plain", "ela"], **settings)


def pretend(unit: Unit) -> list[dict[str, Any]]:
    """Rows that depend on the unit alone, except for the seconds."""
    rng = np.random.default_rng(int(unit.key, 16))
    return [
        {**unit.labels(), "seed": seed, "success": bool(rng.random() < 0.5), "neglect": False, "mixture": False}
        | {"wrong_color": False, "extra": 0, "score": float(rng.random()), "seconds": time.perf_counter()}
        for seed in unit.seeds
    ]


def stall(unit: Unit) -> list[dict[str, Any]]:
    """Like `pretend`, but for a prompt with a lion hold a lock until the process ends."""
    if "lion" not in unit.prompt:
        return pretend(unit)
    with Path(os.environ["ELAKIT_TEST_LOCK"]).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("held")
        file.flush()
        threading.Event().wait()
    raise AssertionError


def die_once(unit: Unit) -> list[dict[str, Any]]:
    """Like `pretend`, but the first process that gets a prompt with a lion dies."""
    if "lion" in unit.prompt:
        try:
            Path(os.environ["ELAKIT_TEST_MARK"]).touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    return pretend(unit)
