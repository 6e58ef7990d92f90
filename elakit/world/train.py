"""Training of picture-world: ``python -m elakit.world.train``. The same command resumes an interrupted training."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from elakit.cli_options import Device, one_line_errors
from elakit.errors import SettingError
from elakit.models import device_named
from elakit.numbering import number_of
from elakit.world.training.autoencoder import psnr, train_autoencoder, train_decoder
from elakit.world.training.config import Config, read_config
from elakit.world.training.data import cached_crowds, compose_scenes

STAGES = ("vae", "decoder", "denoiser", "judge")
# Parts that a stage reads from the output folder, with the stage that writes each.
NEEDED = {"decoder": {"vae": "vae"}, "denoiser": {"vae": "vae"}, "judge": {"vae": "vae", "model": "denoiser"}}
# File of an earlier model that a stage starts from.
STARTED_FROM = {"vae": "vae/config.json", "denoiser": "model_index.json", "judge": "judge/model.safetensors"}


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, sample sheets and the finished model.")] = Path(
        "work/picture-world"
    ),
    config: Annotated[
        Path | None, typer.Option(help="TOML file of settings. Default: the settings of the built-in model.")
    ] = None,
    stage: Annotated[str, typer.Option(help=f"Comma-separated stages: {', '.join(STAGES)}; or all.")] = "all",
    device: Device = None,
    start: Annotated[
        Path | None, typer.Option(help="Folder of an earlier model, from whose weights the training starts.")
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Number of processes that train the denoiser together, each with its own batch.")
    ] = 1,
    workers: Annotated[
        int,
        typer.Option(
            min=0, help="Number of processes that compose scenes in advance, so that a GPU does not wait for them."
        ),
    ] = 0,
) -> None:
    """Train picture-world in four stages: vae, decoder, denoiser and judge.

    The stage vae trains the autoencoder. The stage decoder trains the VAE decoder further, with a frozen VAE encoder.
    The setting ``polish`` is the number of images of the stage decoder; if ``polish`` is 0, this stage is skipped. The
    stage denoiser trains the denoiser together with the text encoder. The stage judge trains the judge.
    """
    stages = set(STAGES if stage == "all" else stage.split(","))
    if unknown := stages - set(STAGES):
        kind = "is not a stage" if len(unknown) == 1 else "are not stages"
        raise typer.BadParameter(
            f"{', '.join(sorted(unknown))} {kind}; choose from {', '.join(STAGES)}, all.", param_hint="--stage"
        )
    settings = read_config(config)
    devices = process_devices(device, processes)
    where = devices[0]
    check_folders(stages, out, start)
    torch.manual_seed(0)
    if "vae" in stages or (settings.vae.polish and "decoder" in stages):
        scenes = cached_crowds(settings.world, settings.vae.scenes, 1, out / "crowds.npz", workers)
        if "vae" in stages:
            vae = train_autoencoder(settings, scenes, out, where, start / "vae" if start else None)
        if settings.vae.polish and "decoder" in stages:
            vae = train_decoder(settings, scenes, out, where)
        test = compose_scenes(settings.world, 256, seed=1_000_001)
        print(f"autoencoder: PSNR {psnr(vae, test):.1f} dB on 256 new scenes")
    if "denoiser" in stages:
        if processes > 1:
            arguments = (devices, free_port(), settings, out, start, workers)
            torch.multiprocessing.spawn(_train_together, arguments, nprocs=processes)
        else:
            from elakit.world.training.denoiser import train_denoiser

            train_denoiser(settings, out, where, start, workers)
    if "judge" in stages:
        from elakit.world.training.judge import train_judge

        train_judge(settings, out, where, start, workers)


def process_devices(device: str | None, processes: int) -> tuple[torch.device, ...]:
    """Device of each of several processes: the same CPU for all, or a GPU of its own for each.

    Parameters
    ----------
    device : str or None
        Name such as "cpu" or "cuda"; None means CUDA where it is available, otherwise the CPU.
    processes : int
        Number of processes.

    Returns
    -------
    tuple of torch.device
        One device per process.

    Raises
    ------
    SettingError
        Raised when there is no such device on this machine, or there are fewer GPUs than processes.

    Examples
    --------
    >>> process_devices("cpu", 2)
    (device(type='cpu'), device(type='cpu'))
    """
    chosen = device_named(device)
    if processes == 1 or chosen.type == "cpu":
        return (chosen,) * processes
    free = torch.cuda.device_count() if chosen == torch.device("cuda") else 1
    if processes > free:
        raise SettingError(
            f"--processes {processes}: each process needs a GPU of its own, and --device {chosen} gives "
            f"{number_of(free, 'GPU')}. Use --processes {free}, or --device cpu."
        )
    return tuple(torch.device("cuda", rank) for rank in range(processes))


def check_folders(stages: Collection[str], out: Path, start: Path | None) -> None:
    """Check before the training that the folders contain the files that the stages read.

    Parameters
    ----------
    stages : collection of str
        Stages that will run, each one of `STAGES`.
    out : Path
        Folder of this training. The results of stages that will not run are read from this folder, such as ``vae/``.
    start : Path, optional
        Folder of an earlier model, from whose weights the training starts.

    Raises
    ------
    SettingError
        Raised when `out` is not a folder, or a file or subfolder that a stage reads is missing.
    """
    if out.exists() and not out.is_dir():
        raise SettingError(f"--out {out} is a file. Choose a folder.")
    for stage in [one for one in STAGES if one in stages]:
        for part, maker in NEEDED.get(stage, {}).items():
            if maker not in stages and not (out / part).is_dir():
                raise SettingError(
                    f"--stage {stage} reads {out / part}, which does not exist. Run --stage {maker} first, or "
                    "--stage all."
                )
        if start is not None and stage in STARTED_FROM and not (start / STARTED_FROM[stage]).is_file():
            raise SettingError(
                f"--start {start}: there is no {STARTED_FROM[stage]}, which the stage {stage} starts from. Give the "
                "folder of an earlier model, such as data/picture-world."
            )


def free_port() -> int:
    """Number of a TCP port of this machine that is not in use."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _train_together(
    rank: int,
    devices: Sequence[torch.device],
    port: int,
    settings: Config,
    out: Path,
    start: Path | None,
    workers: int,
) -> None:
    """Train the denoiser in one of several processes that train together.

    `rank` is the number of this process, counted from 0. ``devices[rank]`` is the device of this process. The processes
    communicate through the TCP port `port`, and share the CPU cores of the machine.
    """
    from elakit.world.training.denoiser import train_denoiser

    # torch sends SIGINT to a process whose parent is killed; processes that a shell starts in the background ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    processes, device = len(devices), devices[rank]
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    train_denoiser(settings, out, device, start, workers)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with one_line_errors("elakit.world.train"):
        typer.run(main)
