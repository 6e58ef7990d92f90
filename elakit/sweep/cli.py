"""The command line of sweeps: ``elakit sweep run``, ``report``, ``score``, ``export``, ``suites`` and ``methods``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elakit.cli_options import (
    DTYPES,
    PROMPTS_FILE,
    Device,
    Dtype,
    Height,
    Lora,
    Model,
    Negative,
    Scale,
    Scheduler,
    Steps,
    Variant,
    Width,
    value_of,
)
from elakit.errors import ModelError, SettingError
from elakit.numbering import number_of
from elakit.seeds import parse_seeds

if TYPE_CHECKING:
    from elakit.sweep import Unit

app = typer.Typer(no_args_is_help=True, help="Compare methods over suites of prompts, and summarize the results.")


@app.command("run")
def run(
    out: Annotated[
        Path,
        typer.Option(
            help="Folder of the sweep; an existing sweep is resumed, or extended by other prompts, seeds or methods."
        ),
    ],
    suites: Annotated[
        list[str] | None,
        typer.Option(
            "--suite",
            help="Name of a suite of prompts, see `elakit sweep suites`. Can be repeated, and combined with "
            "--prompts. Default if neither is given: attend-and-excite, the prompts of that paper.",
        ),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help=f"File of prompts: {PROMPTS_FILE}.")] = None,
    seeds: Annotated[
        str,
        typer.Option(help="Seeds and ranges of seeds, separated by commas, such as 0-3. The default is two seeds."),
    ] = "1,3",
    methods: Annotated[str, typer.Option(help="Comma-separated methods, see `elakit sweep methods`.")] = "plain,ela",
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Option of a method as METHOD.OPTION=VALUE, such as ela.anchor.step_size=0.2; `elakit sweep methods` "
            "lists the options. Can be repeated. "
            "METHOD.guide_above=0.2, for picture-world and only in sweeps, lets the method guide only images for which "
            "the included predictor of failures gives a probability above 0.2.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Number of prompts that are taken, at even intervals, from each suite or file. Default: all."
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Generate at most this many seeds of a prompt per batch. Default: all seeds.")
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            help="Generate only one of N parts of the sweep: I/N with I from 1 to N, such as 1/3 in a SLURM array. All "
            "parts use the same --out."
        ),
    ] = None,
    keep_images: Annotated[
        bool,
        typer.Option(
            "--keep-images", help="Store all images as PNG, for `elakit sweep score` and `elakit sweep export`."
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Number of worker processes. Default: one per GPU that is used; on the CPU, the number of cores "
            "divided by --threads. With --dask: the largest number of units (one prompt, one method and a batch of "
            "seeds) in progress at a time; by default there is no limit."
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            help="Number of torch threads per worker. Default: 1; with --dask, the setting of the Dask workers."
        ),
    ] = None,
    dask: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler whose workers are used, such as tcp://host:8786.")
    ] = None,
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
    detector: Annotated[
        str | None,
        typer.Option(
            help="Detector that judges images of models other than picture-world: a folder or hub id, such as "
            "google/owlv2-base-patch16. Without it, such images are measured, but not judged."
        ),
    ] = None,
) -> None:
    """Generate images of many prompts with several methods, judge the images, and measure their attention.

    For the same prompt and seed, all methods start from the same noise.
    The method "plain" is generation without a guidance method.

    Run the same command again to resume an interrupted sweep.

    Example: elakit sweep run --suite animals --limit 10 --methods plain,ela --out results/animals
    """
    from tqdm.auto import tqdm

    from elakit.sweep import plan, read_prompts, spread, suite
    from elakit.sweep.store import check_folder
    from elakit.sweep.sweep import run as run_units

    check_folder(out)
    names = suites or ([] if prompts else ["attend-and-excite"])
    texts = {name: spread(suite(name), limit) for name in names}
    if prompts is not None:
        texts[prompts.name] = spread(read_prompts(prompts), limit)
    part = None if shard is None else _shard(shard)
    _check_resources(model, detector, device, dtype, scheduler, lora, local=dask is None)
    units = plan(
        texts,
        parse_seeds(seeds),
        _methods(methods, options or []),
        model=model,
        steps=steps,
        guidance_scale=scale,
        device=device,
        dtype=dtype,
        detector=detector,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        scheduler=scheduler,
        lora=lora,
        variant=variant,
        batch=batch,
    )
    if detector is None and model not in _embedded():
        typer.echo("Without --detector, the images of this model are measured but not judged.", err=True)
    mine = units if part is None else _of_shard(units, part)
    total, kept = _images(mine), _kept(mine, out, keep_images)
    try:
        with (
            _executor(dask) as executor,
            tqdm(total=total, initial=kept, unit="image", dynamic_ncols=True) as bar,
        ):
            outcome = run_units(
                units,
                out,
                executor,
                workers=workers,
                threads=threads,
                shard=part,
                keep_images=keep_images,
                on_progress=lambda done, _: bar.update(done - bar.n),
            )
    except KeyboardInterrupt:
        typer.echo(f"Interrupted: {_stored(mine, out, keep_images, total)}. Resume with\n  {_command()}", err=True)
        raise typer.Exit(130) from None
    report = shlex.join(["elakit", "sweep", "report", str(out)])
    typer.echo(f"{_stored(mine, out, keep_images, total)}. Summarize the sweep with\n  {report}")
    if keep_images and _kept(mine, out, keep_images):
        from elakit.sweep import export_images

        typer.echo(f"The images and their metadata are exported to {export_images(out)}.")
    if outcome.failed:
        count, error = len(outcome.failed), next(iter(outcome.failed.values())).splitlines()[0]
        typer.echo(f"{number_of(count, 'unit')} failed; the first error is\n  {error}", err=True)
        typer.echo(f"All errors are in {out / 'failed'}. Try again with\n  {_command()}", err=True)
        raise typer.Exit(1)


@app.command("report")
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of the sweep.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="HTML page to write. Default: report.html in the folder. Markdown and CSV are written next to it."
        ),
    ] = None,
) -> None:
    """Write the results of a sweep as HTML, Markdown and CSV.

    Each success rate has a confidence interval, and McNemar's test compares it with that of plain generation.

    Example: elakit sweep report results/animals
    """
    from elakit.files import check_path
    from elakit.sweep.report import write

    if out is not None:
        check_path(out)
    page = write(folder, out)
    typer.echo(page.with_suffix(".md").read_text(encoding="utf-8"))
    typer.echo(f"Report: {page}")


@app.command("score")
def score(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder of a sweep that was run with --keep-images; not needed with --list.")
    ] = None,
    scorers: Annotated[
        list[str] | None,
        typer.Option(
            "--scorer",
            help="Scorer: NAME, or NAME=MODEL, where MODEL (a folder or hub id) replaces the default model; "
            "--list shows the names. Required without --list. Can be repeated.",
        ),
    ] = None,
    device: Device = None,
    show: Annotated[bool, typer.Option("--list", help="List the scorers with their default models, and exit.")] = False,
) -> None:
    """Score the stored images of a sweep with models such as CLIP. `elakit sweep report` then shows the scores.

    Example: elakit sweep score results/animals --scorer clip --scorer detector=google/owlv2-base-patch16
    """
    from tqdm.auto import tqdm

    from elakit.sweep import SCORERS
    from elakit.sweep import score as score_sweep

    if show:
        for kind in SCORERS.values():
            typer.echo(f"{kind.name:10s}{kind.model or '(name a model)':42s}{kind.summary}")
        return
    if folder is None or not scorers:
        raise SettingError(f"Give the folder of a sweep and at least one --scorer: {', '.join(SCORERS)}.")
    with tqdm(unit="image", dynamic_ncols=True) as bar:

        def show_progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        score_sweep(folder, scorers, device=device, on_progress=show_progress)
    typer.echo(
        f"Scores: {folder / 'scores'}. Summarize them with\n  {shlex.join(['elakit', 'sweep', 'report', str(folder)])}"
    )


@app.command("export")
def export(
    folder: Annotated[Path, typer.Argument(help="Folder of a sweep that was run with --keep-images.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help='Folder to write; an earlier export there is replaced. Default: the subfolder "export" of the sweep.'
        ),
    ] = None,
) -> None:
    """Export the stored images of a sweep in the layouts that T2I-CompBench, GenEval 2 and t2v_metrics read.

    Example: elakit sweep export results/animals
    """
    from elakit.sweep import export_images

    typer.echo(f"Export: {export_images(folder, out)}")


@app.command("suites")
def list_suites() -> None:
    """List the included suites of prompts, and further benchmarks that are not included.

    For these benchmarks, download the file of prompts and pass it to `elakit sweep run --prompts`.
    """
    from elakit.sweep import BENCHMARKS, SUITES

    for each in SUITES.values():
        prompts = each.build()
        typer.echo(f"{each.name:22s}{len(prompts):4d}  {each.summary}, for example {prompts[0]!r}")
    typer.echo("\nBenchmarks to download; `elakit sweep run --suite NAME --out x` prints the commands for it:")
    for benchmark in BENCHMARKS.values():
        typer.echo(f"{benchmark.name:22s}      {benchmark.summary} ({benchmark.source}; license: {benchmark.license})")


@app.command("methods")
def list_methods() -> None:
    """List all methods with the options that `elakit sweep run --set` takes.

    Methods that need regions are marked. They work with `elakit run --regions`, but not in sweeps.
    """
    from elakit.guidance import METHODS, method_options
    from elakit.sweep.options import sweepable

    for name in dict.fromkeys((*sweepable(), *METHODS)):
        options = ", ".join(option.name for option in method_options(METHODS[name])) if name in METHODS else ""
        mark = "" if name in sweepable() else "(needs regions, not in sweeps) "
        typer.echo(f"{name:22s} {mark}{options}".rstrip())


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise SettingError(f"--shard {text}: write I/N with I from 1 to N, such as 1/3.")
    return int(index), int(count)


def _of_shard(units: Sequence[Unit], part: tuple[int, int]) -> list[Unit]:
    from elakit.sweep import shard

    return shard(units, *part)


def _methods(text: str, settings: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Parse the values of --methods and --set into pairs of a method and its options."""
    chosen: dict[str, dict[str, Any]] = {name.strip(): {} for name in text.split(",") if name.strip()}
    for setting in settings:
        target, equals, value = setting.partition("=")
        method, dot, option = target.strip().partition(".")
        if not (equals and dot and option):
            raise SettingError(f"--set {setting}: write METHOD.OPTION=VALUE, such as ela.anchor.step_size=0.2.")
        if method not in chosen:
            raise SettingError(f"--set {setting}: {method!r} is not among --methods {text}. Add it there.")
        if option in chosen[method]:
            raise SettingError(
                f"--set {setting}: {method}.{option} is set twice. To compare two values, run the command once for "
                "each value, with the same --out."
            )
        chosen[method][option] = value_of(value.strip())
    return list(chosen.items())


def _embedded() -> Iterable[str]:
    from elakit.models import EMBEDDED

    return EMBEDDED


def _check_resources(
    model: str,
    detector: str | None,
    device: str | None,
    dtype: str | None,
    scheduler: str | None,
    lora: str | None,
    local: bool,
) -> None:
    """Check, before any worker starts, that the workers can load the models with these settings.

    An error is raised if they cannot. `local` is False if the workers are on other machines; then only the data type is
    checked.
    """
    from elakit.models import HUB_ID, check_scheduler, device_named

    if local:
        _check_name("--model", model, _embedded())
        if detector is not None:
            _check_name("--detector", detector, ())
        if lora is not None and not HUB_ID.fullmatch(lora) and not Path(lora).expanduser().exists():
            raise ModelError(f"--lora {lora}: there is no such file. Give a file, a folder or a hub id.")
        device_named(device)
        if scheduler is not None:
            check_scheduler(model, scheduler)
    if dtype is not None and dtype not in DTYPES:
        raise SettingError(f"--dtype {dtype}: choose from {', '.join(DTYPES)}.")


def _check_name(option: str, name: str, embedded: Iterable[str]) -> None:
    from elakit.models import HUB_ID

    if name not in embedded and not HUB_ID.fullmatch(name) and not Path(name).expanduser().is_dir():
        choices = ", ".join([*embedded, "a folder", "a hub id such as org/model"])
        raise ModelError(f"{option} {name}: there is no such model. Give one of {choices}.")


def _images(units: Sequence[Unit]) -> int:
    return sum(len(unit.seeds) for unit in units)


def _kept(units: Sequence[Unit], folder: Path, keep_images: bool) -> int:
    from elakit.sweep.store import finished

    return _images([unit for unit in units if finished(folder, unit, keep_images)])


def _stored(units: Sequence[Unit], folder: Path, keep_images: bool, total: int) -> str:
    kept = _kept(units, folder, keep_images)
    return f"{kept} of {number_of(total, 'image')} {'is' if 1 in (kept, total) else 'are'} in {folder}"


def _command() -> str:
    return shlex.join(["elakit", *sys.argv[1:]])


def _executor(address: str | None) -> AbstractContextManager[Any]:
    """Context that yields an executor on the workers of a Dask scheduler, or None if `address` is None."""
    from elakit.sweep.workers import dask_executor

    return nullcontext() if address is None else dask_executor(address)
