"""The command ``elakit diagnose``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from elakit.cli_options import (
    PROMPT,
    PROMPTS_FILE,
    Device,
    Dtype,
    Height,
    Lora,
    Model,
    Negative,
    Options,
    Scale,
    Scheduler,
    Seeds,
    Steps,
    Variant,
    Width,
    load_pipeline,
    method_options,
)
from elakit.errors import SettingError
from elakit.guidance.registry import METHODS, NEED_REGIONS, WITHOUT_REGIONS
from elakit.numbering import number_of
from elakit.seeds import parse_seeds


def diagnose(
    prompt: Annotated[str | None, typer.Argument(help=f"{PROMPT} Or use --prompts.")] = None,
    seeds: Seeds = "0-3",
    method: Annotated[
        str,
        typer.Option(help=f"Guidance method: {', '.join(WITHOUT_REGIONS)}. ela is Entity Localization and Anchoring."),
    ] = "ela",
    remedies: Annotated[
        str,
        typer.Option(
            help="Remedies to try besides --method: all, none, or comma-separated names. all stands for six: conform, "
            "ebama, regions (ELA with one box per entity, placed side by side), another-seed (other seeds, of which "
            "the most promising is chosen; see --predictor), swapped (entities in the opposite order) and next-to "
            "(“next to” instead of “and”). Other names that --method takes are remedies, too. No remedy is tried if "
            "all plain images are judged right."
        ),
    ] = "all",
    options: Options = None,
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
    predictor: Annotated[
        Path | None,
        typer.Option(
            help="File written by `elakit predict fit`: a predictor of failures, by which the remedy “another-seed” "
            "chooses among other seeds. Default: for picture-world the included one; for other models none, and the "
            "seeds whose attention bleeds least are chosen."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="HTML report to write (default: report.html) or, with --prompts, output folder (default: diagnoses)."
        ),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            help="Folder in which all runs are stored; stored runs with the same settings are not generated again. "
            "Not with --prompts."
        ),
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="JSON file for all results. Not with --prompts.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help=f"File of prompts: {PROMPTS_FILE}. Reports are written to the folder --out. Run the command again to "
            "resume."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Number of worker processes with --prompts. Default: one per GPU that is used; on the CPU, one per "
            "core."
        ),
    ] = None,
) -> None:
    """Report how often images of a prompt fail, why, and which remedy fixes them.

    Each seed gives a plain image and an image with --method, from the same noise.
    Plain means without a guidance method; --scale applies to both.

    Only images of picture-world are judged. For other models, the report
    compares measures of attention.

    Example: elakit diagnose "a cat and a lion" --seeds 0-7 --out report.html
    """
    from elakit.diagnosis.trials import check
    from elakit.sweep.units import checked_sizes

    numbers = parse_seeds(seeds)
    checked_sizes(steps, height, width)
    asked: bool | list[str] = remedies == "all"
    if remedies not in ("all", "none"):
        asked = [name.strip() for name in remedies.split(",") if name.strip()]
    check(asked)
    if (prompt is None) == (prompts is None):
        given = "No prompt is" if prompt is None else "A prompt and --prompts are both"
        raise SettingError(
            f'{given} given. Give either one prompt, such as "a cat and a lion", or a file of prompts with --prompts.'
        )
    if prompts is not None and (keep is not None or json_out is not None):
        given = "--json" if keep is None else "--keep"
        raise SettingError(f"{given} applies to one prompt only. With --prompts, leave {given} out and use --out.")
    if prompts is None and workers is not None:
        raise SettingError(f"--workers {workers} applies only to a file of prompts. Leave it out, or use --prompts.")
    settings = {
        "seeds": numbers, "method": method, "remedies": asked, "steps": steps,
        "guidance_scale": scale, "negative_prompt": negative_prompt, "height": height, "width": width,
    }  # fmt: skip
    resources = {
        "model": model, "device": device, "dtype": dtype, "variant": variant, "scheduler": scheduler, "lora": lora,
    }  # fmt: skip
    if method in NEED_REGIONS:
        raise SettingError(
            f"--method {method} needs regions, which `elakit diagnose` does not take. Use `elakit run --method "
            f"{method} --regions ...`, or choose from {', '.join(WITHOUT_REGIONS)}."
        )
    if method not in METHODS:
        raise SettingError(f"--method {method} is unknown. Choose from {', '.join(WITHOUT_REGIONS)}.")
    own = method_options(method, options)
    if prompts is not None:
        chosen = out or Path("diagnoses")
        _diagnose_many(prompts, chosen, predictor=predictor, workers=workers, options=own, **resources, **settings)
    else:
        assert prompt is not None
        if own:
            from elakit.guidance.metadata import build

            settings["method"] = build(METHODS[method], own)
        _diagnose_one(prompt, out or Path("report.html"), keep, json_out, predictor, resources, settings)


def _diagnose_one(
    prompt: str,
    out: Path,
    keep: Path | None,
    json_out: Path | None,
    predictor: Path | None,
    resources: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    from elakit.files import check_path, write_json
    from elakit.sweep.store import check_folder

    target = check_path(out)
    if json_out is not None:
        check_path(json_out, "JSON file", "found.json")
    if keep is not None:
        check_folder(keep)
    import elakit
    from elakit.diagnosis import report
    from elakit.prediction import load_predictor

    loaded = None if predictor is None else load_predictor(predictor)
    pipe = load_pipeline(**resources)
    parsed = elakit.parse(prompt, pipe)
    with typer.progressbar(length=100, label="generating", file=sys.stderr, show_eta=False) as bar:

        def show(done: int, total: int, what: str) -> None:
            bar.label = f"{done} of {total} images, {what}"
            bar.update(100 * done // max(total, 1) - bar.pos)
            bar.render_progress()

        found = elakit.diagnose(pipe, parsed, predictor=loaded, folder=keep, on_progress=show, **settings)
        bar.label = "done"
        bar.update(100 - bar.pos)
    path = report.write(found, target, shlex.join(["elakit", *sys.argv[1:]]))
    typer.echo(f'"{found.prompt.text}", {number_of(len(found.pairs), "seed")}, {found.seconds:.0f} s')
    for sentence in report.summary(found):
        typer.echo(sentence)
    if json_out is not None:
        typer.echo(f"JSON: {write_json(json_out.absolute(), found.to_dict())}")
    if keep is not None:
        typer.echo(f"Runs: {keep.absolute()}")
    typer.echo(f"Report: {path}")


def _diagnose_many(file: Path, out: Path, **settings: Any) -> None:
    from tqdm.auto import tqdm

    from elakit.diagnosis.survey import diagnose_many
    from elakit.sweep.prompts import read_prompts

    texts = read_prompts(file)
    command = shlex.join(["elakit", *sys.argv[1:]])
    try:
        with tqdm(total=len(texts), unit="prompt", dynamic_ncols=True) as bar:
            survey = diagnose_many(texts, out, on_progress=lambda done, _: bar.update(done - bar.n), **settings)
    except KeyboardInterrupt:
        typer.echo(f"Interrupted. Finished prompts are in {out}. Resume with\n  {command}", err=True)
        raise typer.Exit(130) from None
    ready = survey.earlier + survey.diagnosed
    typer.echo(f"{ready} of {number_of(len(texts), 'prompt')} {'is' if ready == 1 else 'are'} diagnosed.")
    for prompt, error in list(survey.failed.items())[:5]:
        typer.echo(f"{prompt!r} failed: {error.splitlines()[0]}", err=True)
    typer.echo(f"Summary: {survey.page}")
    if survey.failed:
        failed = f"{len(survey.failed)} of {number_of(len(texts), 'prompt')} failed"
        typer.echo(f"{failed}. Try {'it' if len(survey.failed) == 1 else 'them'} again with\n  {command}", err=True)
        raise typer.Exit(1)
