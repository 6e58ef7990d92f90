"""Train the embedded model: ``python -m elakit.world.train``. Killed and started again, it goes on where it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
import typer

from elakit.world.training.autoencoder import psnr, train_autoencoder, train_decoder
from elakit.world.training.config import read_config
from elakit.world.training.data import compose_scenes

STAGES = ("vae", "decoder", "denoiser", "judge")


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, sample sheets and the finished model.")] = Path(
        "work/picture-world"
    ),
    config: Annotated[Path | None, typer.Option(help="Settings (TOML); by default those of the shipped model.")] = None,
    stage: Annotated[str, typer.Option(help=f"One of {', '.join(STAGES)}, or all of them in this order.")] = "all",
    device: Annotated[str, typer.Option(help="cpu or cuda; by default cuda where there is one.")] = "",
) -> None:
    """Train picture-world: autoencoder, its decoder once more (with ``polish``), text encoder with denoiser, judge."""
    if stage not in (*STAGES, "all"):
        raise typer.BadParameter(f"{stage!r} is no stage; choose from {', '.join(STAGES)}, all.", param_hint="--stage")
    settings = read_config(config)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(0)
    if stage in ("vae", "decoder", "all"):
        # three entities a scene: more drawing, less background
        crowded = dataclasses.replace(settings.world, entities=(0.1, 0.3, 0.6))
        scenes = compose_scenes(crowded, settings.vae.scenes, seed=1)
        test = compose_scenes(settings.world, 256, seed=1_000_001)
        for name, part in (("vae", train_autoencoder), ("decoder", train_decoder)):
            if stage in (name, "all") and (name == "vae" or settings.vae.polish):
                vae = part(settings, scenes, out, where)
                print(f"{name}: PSNR {psnr(vae, test):.1f} dB on 256 new scenes")
    if stage in ("denoiser", "all"):
        from elakit.world.training.denoiser import train_denoiser

        train_denoiser(settings, out, where)
    if stage in ("judge", "all"):
        from elakit.world.training.judge import train_judge

        train_judge(settings, out, where)


if __name__ == "__main__":
    typer.run(main)
