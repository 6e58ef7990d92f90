"""Command ``elakit predict fit``, which fits a predictor of failures on a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    help="Fit predictors that estimate, from the first steps of a run, whether and how its image will fail.",
)


@app.callback()
def _group() -> None:
    """Do nothing. Without a callback, typer would not expect the name ``fit``, because there is only one command."""


@app.command("fit")
def fit(
    sweep: Annotated[
        Path,
        typer.Argument(
            help="Folder of a sweep of picture-world, or of a sweep of another model that was run with --detector."
        ),
    ],
    out: Annotated[Path, typer.Option(help="File to write the predictor to.")] = Path("predictor.json"),
    method: Annotated[str, typer.Option(help="Method whose images in the sweep are used.")] = "plain",
) -> None:
    """Fit a predictor of failures on a sweep, and write the predictor to a file.

    The command also prints the quality of the predictions for held-out prompts.

    `elakit diagnose --predictor FILE` and `elakit.prediction.load_predictor` read the file.

    Example: elakit predict fit sweeps/plain --out predictor.json
    """
    import numpy as np

    from elakit.files import check_path
    from elakit.prediction.fit import confusion
    from elakit.prediction.fit import fit as fit_to
    from elakit.sweep import table

    check_path(out)
    predictor, quality, held_out = fit_to(table(sweep), method)
    predictor.save(out)
    typer.echo(str(predictor.about))
    wide = quality.pivot(index=["outcome", "by"], columns="share", values="auroc")
    typer.echo("Area under the ROC curve by share of the steps:\n" + wide.to_string(float_format="%.3f"))
    own = quality[quality["by"] == "predictor"].set_index(["outcome", "share"])[["rate", "ece", "brier", "images"]]
    typer.echo("Calibration of the predictor:\n" + own.to_string(float_format="%.3f"))
    counts = confusion(held_out)
    right = float(np.nanmean(np.diag(counts) / counts.sum(axis=1).replace(0, np.nan)))
    typer.echo(f"Kinds of failure after the whole run, mean accuracy {right:.0%} (chance: 33%):\n{counts}")
    typer.echo(f"Written to {out}. From Python: elakit.prediction.load_predictor({str(out)!r}).")
