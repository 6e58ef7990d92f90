"""Train the embedded model: ``python -m elakit.world.train``. Killed and started again, it continues where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from elakit.world.training.autoencoder import psnr, train_autoencoder, train_decoder
from elakit.world.training.config import read_config
from elakit.world.training.data import cached_crowds, compose_scenes

STAGES = ("vae", "decoder", "denoiser", "judge")


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, sample sheets and the finished model.")] = Path(
        "work/picture-world"
    ),
    config: Annotated[Path | None, typer.Option(help="Settings (TOML); by default those of the shipped model.")] = None,
    stage: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(STAGES)}; or all of them.")] = "all",
    device: Annotated[str, typer.Option(help="cpu or cuda; by default cuda where there is one.")] = "",
    start: Annotated[
        Path | None, typer.Option(help="Folder of an earlier edition whose weights the training starts from.")
    ] = None,
) -> None:
    """Train picture-world: autoencoder, its decoder once more (with ``polish``), text encoder with denoiser, judge."""
    stages = set(STAGES if stage == "all" else stage.split(","))
    if unknown := stages - set(STAGES):
        raise typer.BadParameter(
            f"{', '.join(sorted(unknown))} is no stage; choose from {', '.join(STAGES)}, all.", param_hint="--stage"
        )
    settings = read_config(config)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(0)
    if "vae" in stages or (settings.vae.polish and "decoder" in stages):
        scenes = cached_crowds(settings.world, settings.vae.scenes, 1, out / "crowds.npz")
        if "vae" in stages:
            vae = train_autoencoder(settings, scenes, out, where, start / "vae" if start else None)
        if settings.vae.polish and "decoder" in stages:
            vae = train_decoder(settings, scenes, out, where)
        test = compose_scenes(settings.world, 256, seed=1_000_001)
        print(f"autoencoder: PSNR {psnr(vae, test):.1f} dB on 256 new scenes")
    if "denoiser" in stages:
        from elakit.world.training.denoiser import train_denoiser

        train_denoiser(settings, out, where, start)
    if "judge" in stages:
        from elakit.world.training.judge import train_judge

        train_judge(settings, out, where, start)


if __name__ == "__main__":
    typer.run(main)
