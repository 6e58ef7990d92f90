"""The command line: ``elakit run``, ``diagnose``, ``sweep``, ``predict``, ``models``, ``doctor`` and ``lab``."""

from __future__ import annotations

import inspect
import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import elakit
from elakit import checks, files
from elakit.cli_options import (
    Device,
    Dtype,
    Height,
    Lora,
    Model,
    Negative,
    Options,
    Prompt,
    Scale,
    Scheduler,
    Steps,
    Variant,
    Width,
    load_pipeline,
    method_options,
    one_line_errors,
    without_markup,
)
from elakit.diagnosis.cli import diagnose
from elakit.doctor import doctor
from elakit.errors import OutputError, SettingError
from elakit.guidance.registry import METHODS, NEED_REGIONS, TAKE_REGIONS, without_regions
from elakit.lab import lab
from elakit.prediction.cli import app as predict
from elakit.sweep.cli import app as sweep

REGIONS = (
    "One box per entity, in the order of the prompt: left,top,right,bottom as fractions of the image, separated by "
    f'semicolons, such as "0,0,0.5,1;0.5,0,1,1". Required by {", ".join(NEED_REGIONS)}; optional for '
    f"{', '.join(TAKE_REGIONS)}. Other methods take no regions."
)

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
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"elakit {elakit.__version__}")
        raise typer.Exit


@app.command()
def run(
    prompt: Prompt,
    out: Annotated[Path, typer.Option(help="Folder for image, recording and settings.")],
    seed: Annotated[int, typer.Option(help="Seed of the initial noise.")] = 0,
    method: Annotated[
        str,
        typer.Option(
            help=f"plain, or a guidance method: {', '.join(METHODS)}. ela is Entity Localization and Anchoring."
        ),
    ] = "plain",
    options: Options = None,
    regions: Annotated[str | None, typer.Option(help=REGIONS)] = None,
    model: Model = "picture-world",
    steps: Steps = None,
    scale: Scale = None,
    negative_prompt: Negative = None,
    height: Height = None,
    width: Width = None,
    scheduler: Scheduler = None,
    lora: Lora = None,
    variant: Variant = None,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run.")] = False,
) -> None:
    """Generate one image, record its attention, and save both in a folder.

    In Python, elakit.open_run opens the folder.

    Example: elakit run "a cat and a lion" --method ela --seed 3 --out cat-lion
    """
    if method not in ("plain", *METHODS):
        raise SettingError(f"--method {method}: choose from plain, {', '.join(METHODS)}.")
    _check_folder(out, overwrite)
    if method == "plain" and (regions is not None or options):
        given = f"--regions {regions}" if regions is not None else f"--set {(options or [''])[0]}"
        raise SettingError(f"{given}: plain generation has no regions and no options. Add --method ela.")
    checks.seed(seed, "--seed")
    for name, value, low, high in (("steps", steps, 1, 1000), ("height", height, 1, None), ("width", width, 1, None)):
        if value is not None:
            checks.whole_number(value, name, low, high)
    from elakit.judge import is_black  # imports torch

    guidance = None if method == "plain" else _guidance(method, method_options(method, options), regions)
    pipe = load_pipeline(model, device=device, dtype=dtype, variant=variant, scheduler=scheduler, lora=lora)
    made = elakit.generate(
        pipe, prompt, seed=seed, steps=steps, guidance_scale=scale, negative_prompt=negative_prompt, height=height,
        width=width, guidance=guidance,
    )  # fmt: skip
    path = made.save(out, overwrite=overwrite).resolve()
    typer.echo(repr(made.bleeding))
    if made.nsfw:
        typer.echo("Verdict: none, the safety checker replaced the image")
    elif is_black(made.image):
        typer.echo("Verdict: none, the image is entirely black")
    elif made.verdict is None:
        typer.echo("Verdict: none, the built-in judge knows images and words of picture-world only")
    else:
        typer.echo(f"Verdict: {made.verdict}")
    typer.echo(f"Image: {path / 'image.png'}")
    typer.echo(f"Run: {path}")


@app.command()
def models() -> None:
    """List the built-in model, and the supported families of other models."""
    from elakit.models import EMBEDDED, FAMILIES

    for model in EMBEDDED.values():
        typer.echo(f"{model.name:16s}{model.summary}")
    families = ", ".join(family.family for family in FAMILIES)
    typer.echo(
        "Other models are named by a folder that save_pretrained wrote, or by a hub id such as org/model. Supported "
        f"families: {families}."
    )


app.command()(doctor)
app.command(help=without_markup(inspect.cleandoc(lab.__doc__ or "")))(lab)


def main() -> None:
    """Entry point of the command line; errors that a user can act on are printed without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may contain bytes that are not valid text
            stream.reconfigure(errors="backslashreplace")
    with one_line_errors("elakit"):
        app()


def _check_folder(out: Path, overwrite: bool) -> None:
    """Raise an error if a run cannot be saved to the folder `out`; called before the model is loaded.

    An existing folder is accepted only if it contains a run and `overwrite` is True.
    """
    parent = files.check_path(out / "run.json" if os.path.isdir(out) else out, "run", "run").parent
    if os.path.lexists(out) and not (overwrite and os.path.isfile(out / "run.json")):
        replace = "Replace this run with --overwrite, or choose" if os.path.isfile(out / "run.json") else "Choose"
        raise OutputError(f"--out {out} already exists. {replace} another folder.")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"--out {out}: {parent} is not writable. Choose another folder.")


def _guidance(method: str, options: dict[str, Any], regions: str | None) -> Any:
    """Build a guidance method from its name, its options and `regions`, a text with the boxes of the entities."""
    from elakit.guidance.metadata import build

    if regions is None:
        if not options:
            return without_regions(method)
        return build(METHODS[method], options)
    if not METHODS[method].takes_regions:
        able = [name for name, kind in METHODS.items() if kind.takes_regions]
        raise SettingError(f"--regions: {method} takes no regions. Use --method {' or '.join(able)}.")
    try:
        boxes = [tuple(float(side) for side in box.split(",")) for box in regions.split(";")]
    except ValueError:
        raise SettingError(
            f"--regions {regions}: write left,top,right,bottom for each entity, as fractions of the image, and "
            'separate the entities by semicolons, such as "0,0,0.5,1;0.5,0,1,1".'
        ) from None
    return build(METHODS[method], {**options, "regions": boxes})


if __name__ == "__main__":
    main()
