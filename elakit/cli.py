"""The command line: ``elakit diagnose``, ``run``, ``sweep``, ``predict``, ``models`` and ``lab``."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import elakit
from elakit.errors import ElakitError, OutputError, SettingError
from elakit.files import write_file
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

# backslashes: rich, which shows the help, would take the brackets for markup
PROMPT = r'Such as "a cat and a lion"; brackets override: "a \[red car] and a \[bird]".'
Prompt = Annotated[str, typer.Argument(help=PROMPT)]
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
    prompt: Annotated[str | None, typer.Argument(help=f"{PROMPT} Or give --prompts.")] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds: 0, 1, ...")] = 4,
    first_seed: Annotated[int, typer.Option(help="The first of them.")] = 0,
    method: Method = "ela",
    remedies: Annotated[
        str,
        typer.Option(
            help="What else to try where an image is wrong: all, none, or some of the methods, another-seed, swapped, "
            "next-to, regions, with commas between them."
        ),
    ] = "all",
    model: Model = "picture-world",
    steps: Steps = None,
    scale: Scale = None,
    device: Device = None,
    dtype: Dtype = None,
    predictor: Annotated[
        Path | None, typer.Option(help="Foretells failures: a file that `elakit predict fit` wrote.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The HTML report to write, by default report.html; with --prompts a folder.")
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(help="Folder to keep all runs in as they are drawn; what is there is not drawn again."),
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Also write what was found as JSON, for programs.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Diagnose a text file of prompts, one a line, into the folder --out; resumable.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="With --prompts: processes that draw.")] = None,
) -> None:
    """Draw a prompt over a few seeds; report what goes wrong, why, and which remedy fixes it."""
    from elakit.diagnosis import report
    from elakit.diagnosis.remedies import check
    from elakit.prediction import load_predictor

    if seeds < 1:
        raise SettingError(f"--seeds {seeds}: give 1 or more.")
    if first_seed < 0:
        raise SettingError(f"--first-seed {first_seed}: give 0 or more.")
    asked = _remedies(remedies)
    check(asked)
    if (prompt is None) == (prompts is None):
        raise SettingError('Give one prompt, such as "a cat and a lion", or a file of prompts with --prompts.')
    if prompts is not None:
        _diagnose_many(
            prompts, out or Path("diagnoses"), seeds=list(range(first_seed, first_seed + seeds)), method=method,
            remedies=asked, model=model, steps=steps, guidance_scale=scale, device=device, dtype=dtype,
            predictor=predictor, workers=workers,
        )  # fmt: skip
        return
    assert prompt is not None
    target = report.check_path(out or Path("report.html"))
    if json_out is not None:
        report.check_path(json_out)
    predict = None if predictor is None else load_predictor(predictor)
    pipe = _load(model, device, dtype)
    parsed = elakit.parse(prompt, pipe)
    with typer.progressbar(length=100, label="drawing", file=sys.stderr, show_eta=False) as bar:

        def show(done: int, total: int, what: str) -> None:
            bar.label = f"{done} of {total} images, {what}"
            bar.update(100 * done // max(total, 1) - bar.pos)
            bar.render_progress()

        found = elakit.diagnose(
            pipe, parsed, seeds=list(range(first_seed, first_seed + seeds)), method=method, remedies=asked, steps=steps,
            guidance_scale=scale, predictor=predict, folder=keep, on_progress=show,
        )  # fmt: skip
        bar.label = "done"
        bar.update(100 - bar.pos)
    path = report.write(found, target, shlex.join(["elakit", *sys.argv[1:]]))
    typer.echo(f'"{found.prompt.text}", {seeds} seed{"s" * (seeds > 1)}, {found.seconds:.0f} s')
    for sentence in report.summary(found):
        typer.echo(sentence)
    if json_out is not None:
        write_file(json_out.absolute(), json.dumps(found.to_dict(), indent=1).encode())
        typer.echo(f"JSON: {json_out.absolute()}")
    if keep is not None:
        typer.echo(f"Runs: {keep.absolute()}")
    typer.echo(f"Report: {path}")


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
    """Entry point: errors a user can act on end as one line, not as a traceback."""
    try:
        app()
    except ElakitError as error:
        typer.secho(f"elakit: {error}", fg="red", err=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        typer.secho("elakit: interrupted", fg="red", err=True)
        raise SystemExit(130) from None


def _diagnose_many(file: Path, out: Path, **settings: Any) -> None:
    from tqdm.auto import tqdm

    from elakit.diagnosis.survey import diagnose_many
    from elakit.sweep.suites import read_prompts

    texts = read_prompts(file)
    again = shlex.join(["elakit", *sys.argv[1:]])
    try:
        with tqdm(total=len(texts), unit="prompt", dynamic_ncols=True) as bar:
            done = diagnose_many(texts, out, on_progress=lambda done, _: bar.update(done - bar.n), **settings)
    except KeyboardInterrupt:
        typer.echo(f"Interrupted; what is finished is kept in {out}. Go on with\n  {again}", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{done.there + done.done} of {len(texts)} prompts are diagnosed.")
    for prompt, error in list(done.failed.items())[:5]:
        typer.echo(f"{prompt!r} failed: {error.splitlines()[0]}", err=True)
    typer.echo(f"Summary: {done.page}")
    if done.failed:
        typer.echo(f"{len(done.failed)} failed; try them again with\n  {again}", err=True)
        raise typer.Exit(1)


def _remedies(text: str) -> bool | list[str]:
    if text in ("all", "none"):
        return text == "all"
    return [name.strip() for name in text.split(",") if name.strip()]


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
