"""The command line: ``elakit diagnose``, ``run``, ``bench``, ``predict``, ``models`` and ``lab``."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import elakit
from elakit.bench.cli import app as bench
from elakit.errors import ElakitError, OutputError, SettingError
from elakit.guidance import METHODS, without_regions
from elakit.models import EMBEDDED, FAMILIES
from elakit.prediction.cli import app as predict
from elakit.resources import data_path

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="See, measure and mend concept bleeding in text-to-image models.",
)
app.add_typer(bench, name="bench")
app.add_typer(predict, name="predict")

Prompt = Annotated[
    str, typer.Argument(help='Such as "a cat and a lion"; brackets override: "a [red car] and a [bird]".')
]
Model = Annotated[str, typer.Option(help="picture-world (embedded), a folder, or a hub id such as org/model.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; by default float32 on CPU.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps; by default the model's own (picture-world: 25).")]
Scale = Annotated[float | None, typer.Option(help="Classifier-free guidance; by default the model's own.")]
Method = Annotated[str, typer.Option(help=f"Guidance method: {', '.join(METHODS)}.")]


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        typer.echo(f"elakit {elakit.__version__}")
        raise typer.Exit


@app.command()
def diagnose(
    prompt: Prompt,
    seeds: Annotated[int, typer.Option(help="How many seeds: 0, 1, ...")] = 4,
    first_seed: Annotated[int, typer.Option(help="The first of them.")] = 0,
    method: Method = "ela",
    model: Model = "picture-world",
    steps: Steps = None,
    scale: Scale = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[Path, typer.Option(help="The HTML report to write.")] = Path("report.html"),
) -> None:
    """Draw a prompt plainly and guided over a few seeds, and write a report of what bleeds and what mends it."""
    from elakit import report

    if seeds < 1:
        raise SettingError(f"--seeds {seeds}: give 1 or more.")
    report.check_path(out)
    pipe = _load(model, device, dtype)
    parsed = elakit.parse(prompt, pipe)
    with typer.progressbar(length=2 * seeds, label="drawing", file=sys.stderr) as bar:

        def show(done: int, total: int, what: str) -> None:
            bar.label = what
            bar.update(done - bar.pos)

        found = elakit.diagnose(
            pipe, parsed, seeds=list(range(first_seed, first_seed + seeds)), method=method, steps=steps,
            guidance_scale=scale, on_progress=show,
        )  # fmt: skip
        bar.update(2 * seeds - bar.pos)
    command = shlex.join(["elakit", *sys.argv[1:]])
    path = report.write(found, out, command)
    typer.echo(f'"{found.prompt.text}", {seeds} seed{"s" * (seeds > 1)}, {found.seconds:.0f} s')
    for sentence in report.summary(found):
        typer.echo(sentence)
    typer.echo(f"Report: {path}")


@app.command()
def run(
    prompt: Prompt,
    out: Annotated[Path, typer.Option(help="Folder for picture, recording and settings.")],
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    method: Annotated[str, typer.Option(help=f"plain, or a guidance method: {', '.join(METHODS)}.")] = "plain",
    model: Model = "picture-world",
    steps: Steps = None,
    scale: Scale = None,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a run that is there.")] = False,
) -> None:
    """Draw one picture, record its attention, and save both; open it again with elakit.open_run."""
    if method not in ("plain", *METHODS):
        raise SettingError(f"--method {method}: choose from plain, {', '.join(METHODS)}.")
    if not out.absolute().parent.is_dir():
        raise OutputError(
            f"--out {out}: there is no folder {out.parent}. Create it (mkdir -p), or choose one that exists."
        )
    if out.exists() and not (overwrite and (out / "run.json").exists()):
        raise OutputError(f"--out {out} exists already. Choose another folder, or --overwrite a run that is there.")
    pipe = _load(model, device, dtype)
    guidance = None if method == "plain" else without_regions(method)
    drawn = elakit.generate(pipe, prompt, seed=seed, steps=steps, guidance_scale=scale, guidance=guidance)
    path = drawn.save(out, overwrite=overwrite)
    typer.echo(repr(drawn.bleeding))
    typer.echo(f"Run: {path.resolve()}")


@app.command()
def models() -> None:
    """List the models that need no network, and say what else can be given."""
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
    """Entry point: errors a user can act on end as one line, not as a traceback."""
    try:
        app()
    except ElakitError as error:
        typer.secho(f"elakit: {error}", fg="red", err=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        typer.secho("elakit: interrupted", fg="red", err=True)
        raise SystemExit(130) from None


def _load(model: str, device: str | None, dtype: str | None) -> Any:
    import diffusers
    import transformers

    # their loading bars would hide ours, and say nothing a user needs
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    return elakit.load(model, device=device, dtype=dtype)


if __name__ == "__main__":
    main()
