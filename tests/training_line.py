"""A line that one or two processes fit, for tests that start processes.

The processes import this module by name, so it imports torch and no more.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from elakit.world.training.loop import Schedule, rank_and_world, train

EXAMPLES, WANTED = torch.arange(8.0).reshape(4, 2), torch.tensor([1.0, -1.0, 2.0, 0.5])


def fit(folder: Path, batch: int = 4) -> nn.Module:
    """Fit a line to this process's share of four examples."""
    rank, world = rank_and_world()
    torch.manual_seed(0)
    model = nn.Linear(2, 1)

    def loss(step: int) -> torch.Tensor:
        return (model(EXAMPLES[rank::world])[:, 0] - WANTED[rank::world]).pow(2).mean()

    schedule = Schedule(samples=40, batch=batch // world, learning_rate=0.1, warmup=1, processes=world)
    return train(model, loss, schedule, folder, "line")


def fit_together(rank: int, port: int, folder: Path) -> None:
    """Fit as one of two processes, and save the line."""
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(fit(folder).state_dict(), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
