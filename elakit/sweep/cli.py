"""The command line of sweeps: ``elakit sweep run``, ``report`` and ``suites``."""

from __future__ import annotations

import ast
import shlex
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm.auto import tqdm

from elakit.errors import ModelError, SettingError
from elakit.files import check_path
from elakit.models import EMBEDDED, HUB_ID, device_named
from elakit.sweep import report as reports
from elakit.sweep.store import there
from elakit.sweep.suites import SUITES, read_prompts, spread, suite
from elakit.sweep.sweep import run as run_units
from elakit.sweep.units import Unit, plan, sweepable

DTYPES = ("float32", "float16", "bfloat16")

app = typer.Typer(no_args_is_help=True, help="Sweep methods over suites of prompts, and sum up how they do.")


@app.command("run")
def run(
    out: Annotated[Path, typer.Option(help="Folder of the sweep; one that is there is gone on with.")],
    suites: Annotated[
        list[str] | None, typer.Option("--suite", help="One of `elakit bench suites`; may be given several times.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file of prompts, one a line.")] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated; drawn in one batch.")] = "1,3",
    methods: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(sweepable())}.")] = "plain,ela",
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="method.option=value, such as ela.anchor.step_size=0.2; several times. Every method takes "
            "guide_above=0.2: only images that are likelier than that to fail are guided.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="So many prompts of each suite, evenly spread.")] = None,
    batch: Annotated[int | None, typer.Option(help="Most seeds in a batch; by default all of them.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that draw; by default processors over threads, and 1 on a GPU.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Of torch in each worker; by default 1.")] = None,
    dask: Annotated[
        str | None, typer.Option(help="A Dask scheduler whose workers draw, such as tcp://host:8786.")
    ] = None,
    model: Annotated[str, typer.Option(help="picture-world (embedded), a folder, or a hub id.")] = "picture-world",
    steps: Annotated[int | None, typer.Option(help="Denoising steps; by default the model's own.")] = None,
    scale: Annotated[float | None, typer.Option(help="Classifier-free guidance; by default the model's own.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}.")] = None,
    detector: Annotated[
        str | None, typer.Option(help="Judges images of other models: a folder or hub id, such as an OWLv2.")
    ] = None,
) -> None:
    """Draw prompts by several methods from the same noise, judge and measure them; ended, it can be gone on with."""
    names = suites or ([] if prompts else ["attend-and-excite"])
    texts = {name: spread(suite(name), limit) for name in names}
    if prompts is not None:
        texts[prompts.name] = spread(read_prompts(prompts), limit)
    _check_places(model, detector, device, dtype, here=dask is None)
    units = plan(
        texts,
        _seeds(seeds),
        _methods(methods, options or []),
        model=model,
        steps=steps,
        guidance_scale=scale,
        device=device,
        dtype=dtype,
        detector=detector,
        batch=batch,
    )
    if model not in EMBEDDED and detector is None:
        typer.echo(
            "Without --detector the images of this model are not judged, only their attention measured.", err=True
        )
    total, kept = _images(units), _kept(units, out)
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
                on_progress=lambda done, _: bar.update(done - bar.n),
            )
    except KeyboardInterrupt:
        typer.echo(
            f"Interrupted: {_kept(units, out)} of {total} images are kept in {out}. Go on with\n  {_command()}",
            err=True,
        )
        raise typer.Exit(130) from None
    sum_up = shlex.join(["elakit", "bench", "report", str(out)])
    typer.echo(f"{_kept(units, out)} of {total} images are in {out}. Sum them up with\n  {sum_up}")
    if outcome.failed:
        count, error = len(outcome.failed), next(iter(outcome.failed.values())).splitlines()[0]
        typer.echo(f"{count} unit{'s' * (count > 1)} failed, such as with\n  {error}", err=True)
        typer.echo(f"All errors are in {out / 'failed'}. Try again with\n  {_command()}", err=True)
        raise typer.Exit(1)


@app.command("report")
def report(
    folder: Annotated[Path, typer.Argument(help="Of a sweep.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The page; by default report.html in the folder. Markdown and CSV lie beside it."),
    ] = None,
) -> None:
    """Sum a sweep up: shares with intervals and tests against plain generation, as a page, Markdown and CSV."""
    if out is not None:
        check_path(out)
    page = reports.write(folder, out)
    typer.echo(page.with_suffix(".md").read_text(encoding="utf-8"))
    typer.echo(f"Report: {page}")


@app.command("suites")
def list_suites() -> None:
    """List the suites of prompts."""
    for each in SUITES.values():
        prompts = each.build()
        typer.echo(f"{each.name:18s}{len(prompts):4d}  {each.summary}, such as {prompts[0]!r}")


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise SettingError(f"--seeds {text}: give whole numbers with commas between them, such as 1,3.") from None


def _methods(text: str, settings: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Methods with their options."""
    chosen: dict[str, dict[str, Any]] = {name.strip(): {} for name in text.split(",") if name.strip()}
    for setting in settings:
        target, equals, value = setting.partition("=")
        method, dot, option = target.strip().partition(".")
        if not (equals and dot and option):
            raise SettingError(f"--set {setting}: write method.option=value, such as ela.anchor.step_size=0.2.")
        if method not in chosen:
            raise SettingError(f"--set {setting}: {method!r} is not among --methods {text}; add it there.")
        if option in chosen[method]:
            raise SettingError(
                f"--set {setting}: {option} of {method} is set twice; draw the second into the same folder afterwards."
            )
        chosen[method][option] = _value(value.strip())
    return list(chosen.items())


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # such as gradient=raw


def _check_places(model: str, detector: str | None, device: str | None, dtype: str | None, here: bool) -> None:
    """Refuse, before any worker starts, what none could load; folders and devices of other machines are theirs."""
    if here:
        _check_name("--model", model, EMBEDDED)
        if detector is not None:
            _check_name("--detector", detector, ())
        device_named(device)
    if dtype is not None and dtype not in DTYPES:
        raise SettingError(f"--dtype {dtype}: choose from {', '.join(DTYPES)}.")


def _check_name(option: str, name: str, embedded: Iterable[str]) -> None:
    if name not in embedded and not HUB_ID.fullmatch(name) and not Path(name).expanduser().is_dir():
        choices = ", ".join([*embedded, "a folder", "a hub id such as org/model"])
        raise ModelError(f"{option} {name}: there is no such model. Give one of {choices}.")


def _images(units: list[Unit]) -> int:
    return sum(len(unit.seeds) for unit in units)


def _kept(units: list[Unit], folder: Path) -> int:
    return _images([unit for unit in units if there(folder, unit)])


def _command() -> str:
    return shlex.join(["elakit", *sys.argv[1:]])


@contextmanager
def _executor(address: str | None) -> Iterator[Executor | None]:
    """Dask's workers at an address; None without one."""
    if address is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise SettingError(
            "--dask needs dask.distributed, which is not installed. Get it with  pip install 'elakit[dask]'"
        ) from error
    try:
        client = Client(address)
    except (OSError, ValueError) as error:
        raise SettingError(
            f"--dask {address}: no scheduler answers there ({error}). Start one with  dask scheduler  and give the "
            "address it prints."
        ) from error
    with client:
        yield client.get_executor()
