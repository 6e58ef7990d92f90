"""The command line: ``elakit diagnose``, ``run``, ``sweep``, ``predict``, ``models`` and ``lab``."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import elakit
from elakit.cli_options import Device, Dtype, Model, Prompt, Scale, Steps
from elakit.diagnosis.cli import diagnose
from elakit.errors import ElakitError, OutputError, SettingError
from elakit.guidance.registry import METHODS, without_regions
from elakit.prediction.cli import app as predict
from elakit.resources import data_path
from elakit.sweep.cli import app as sweep

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="See, measure and fix concept bleeding in text-to-image models.",
)
app.add_typer(sweep, name="sweep")
app.add_typer(predict, name="predict")

app.command()(diagnose)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        typer.echo(f"elakit {elakit.__version__}")
        raise typer.Exit


@app.command()
def run(
    prompt: Prompt,
    out: Annotated[Path, typer.Option(help="Folder for image, recording and settings.")],
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    method: Annotated[str, typer.Option(help=f"plain, or a guidance method: {', '.join(METHODS)}.")] = "plain",
    regions: Annotated[
        str | None,
        typer.Option(
            help="A box for each entity, for methods that take regions: left,top,right,bottom in shares of the "
            'image, with semicolons between them, such as "0,0,0.5,1;0.5,0,1,1".'
        ),
    ] = None,
    model: Model = "picture-world",
    steps: Steps = None,
    scale: Scale = None,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a run that is there.")] = False,
) -> None:
    """Draw one image, record its attention, and save both; open it again with elakit.open_run."""
    if method not in ("plain", *METHODS):
        raise SettingError(f"--method {method}: choose from plain, {', '.join(METHODS)}.")
    if not out.absolute().parent.is_dir():
        raise OutputError(
            f"--out {out}: there is no folder {out.parent}. Create it (mkdir -p), or choose one that exists."
        )
    if out.exists() and not (overwrite and (out / "run.json").exists()):
        raise OutputError(f"--out {out} exists already. Choose another folder, or --overwrite a run that is there.")
    if method == "plain" and regions is not None:
        raise SettingError(f"--regions {regions}: plain drawing takes no regions; add --method ela.")
    guidance = None if method == "plain" else _guidance(method, regions)
    pipe = _load(model, device, dtype)
    drawn = elakit.generate(pipe, prompt, seed=seed, steps=steps, guidance_scale=scale, guidance=guidance)
    path = drawn.save(out, overwrite=overwrite)
    typer.echo(repr(drawn.bleeding))
    typer.echo(f"Run: {path.resolve()}")


@app.command()
def models() -> None:
    """List the models that need no network, and say what else can be given."""
    from elakit.models import EMBEDDED, FAMILIES

    for model in EMBEDDED.values():
        typer.echo(f"{model.name:16s}{model.summary}")
    families = ", ".join(family.family for family in FAMILIES)
    typer.echo(f"Also: a folder that save_pretrained wrote, or a hub id such as org/model; families: {families}.")


@app.command()
def lab() -> None:
    """Open the notebooks in JupyterLab."""
    notebooks = data_path().parent / "notebooks"
    if not notebooks.is_dir():
        raise OutputError("The notebooks come with a checkout of the repository, not with the installed package.")
    raise typer.Exit(subprocess.call([sys.executable, "-m", "jupyterlab", str(notebooks)]))


def main() -> None:
    """Entry point: errors that a user can act on are printed as one line, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may contain bytes that are not valid text
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except ElakitError as error:
        typer.secho(f"elakit: {error}", fg="red", err=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        typer.secho("elakit: interrupted", fg="red", err=True)
        raise SystemExit(130) from None


def _guidance(method: str, regions: str | None) -> Any:
    """A method, with the boxes it is to hold the entities in."""
    if regions is None:
        return without_regions(method)
    if not METHODS[method].takes_regions:
        raise SettingError(f"--regions: {method} takes no regions; use ela, layout-guidance or boxdiff.")
    try:
        boxes = [tuple(float(side) for side in box.split(",")) for box in regions.split(";")]
    except ValueError:
        raise SettingError(
            f'--regions {regions}: write left,top,right,bottom for each entity, such as "0,0,0.5,1;0.5,0,1,1".'
        ) from None
    return METHODS[method](regions=boxes)


def _load(model: str, device: str | None, dtype: str | None) -> Any:
    import diffusers
    import transformers

    # their loading bars would hide ours, and say nothing a user needs
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    return elakit.load(model, device=device, dtype=dtype)


if __name__ == "__main__":
    main()
