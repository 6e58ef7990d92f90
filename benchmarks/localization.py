"""Agreement of localization rules with the regions in ELA's method figure: ``python -m benchmarks.localization``.

Prints the regression that restores the raw scale of the figure's maps, the agreement (IoU) of every combination of
differentiation and binarization with the two masks of the figure, and the interval of thresholds in which the default
rule has an IoU of at least .79 (cat) and .90 (frog).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from elakit.regions import THRESHOLD, Binarization, Differentiation, localize

PAPER = Path(__file__).resolve().parents[1] / "data" / "paper"
ENTITIES = ("cat", "frog")
BAR = (0.79, 0.90)


@dataclass(frozen=True)
class Figure:
    """Maps and masks of the paper's figure, with maps on the raw scale, in units of the range of start-of-text.

    Attributes
    ----------
    maps : ndarray, (entity, y, x)
        Maps of the entities.
    sot : ndarray, (y, x)
        Map of start-of-text.
    masks : ndarray, bool, (entity, y, x)
        Regions of the entities.
    coefficients : ndarray, (3,)
        Coefficients of the regression: intercept, cat and frog.
    r2 : float
        Coefficient of determination of the regression.
    """

    maps: np.ndarray
    sot: np.ndarray
    masks: np.ndarray
    coefficients: np.ndarray
    r2: float


def load_figure(folder: Path = PAPER) -> Figure:
    """Read the digitized figure and restore the raw scale of its maps.

    In the figure, each map is scaled so that its minimum is 0 and its maximum is 1. The attention at a location sums to
    1 over the tokens, so the raw map of start-of-text is a constant minus the raw maps of the entities (other words
    receive hardly any attention). A least-squares fit of the scaled map of start-of-text to the scaled maps of the
    entities therefore gives, with reversed sign, the raw range of each entity's map in units of the range of
    start-of-text. The raw minima are unknown and taken as 0.
    """

    def read(name: str) -> np.ndarray:
        return np.loadtxt(folder / name, delimiter=",")

    sot = read("fig_maps_sot.csv")
    shown = np.stack([read(f"fig_maps_{name}.csv") for name in ENTITIES])
    masks = np.stack([read(f"fig_mask_{name}.csv") for name in ENTITIES]).astype(bool)
    design = np.column_stack([np.ones(sot.size), *(m.ravel() for m in shown)])
    coefficients, residual, *_ = np.linalg.lstsq(design, sot.ravel(), rcond=None)
    r2 = 1 - float(residual[0]) / float(((sot - sot.mean()) ** 2).sum())
    return Figure(maps=-coefficients[1:, None, None] * shown, sot=sot, masks=masks, coefficients=coefficients, r2=r2)


def meeting(figure: Figure, differentiation: Differentiation, step: float = 0.0005) -> list[tuple[float, float]]:
    """Intervals of the background threshold, tested at multiples of `step`, in which both IoUs reach those in `BAR`."""
    runs: list[tuple[float, float]] = []
    for k in range(40, 600):
        t = k * step
        if (
            localize(figure.maps, figure.sot, differentiation=differentiation, threshold=t).iou(figure.masks) >= BAR
        ).all():
            joined = runs and k - round(runs[-1][1] / step) == 1
            runs[-1:] = [(runs[-1][0], t)] if joined else [*runs[-1:], (t, t)]
    return runs


def main() -> None:
    """Print the regression, the agreement of all rules, and the intervals of thresholds."""
    figure = load_figure()
    a, cat, frog = figure.coefficients
    print(f"start-of-text = {a:.3f} {cat:+.3f} cat {frog:+.3f} frog   (R^2 = {figure.r2:.3f})\n")
    print("IoU with the figure's masks (areas of the regions; the figure has 25 and 42)\n")
    print(f"{'':29}{'raw maps':<26}{'maps scaled to 0..1'}")
    print(f"{'differentiation':<16}{'binarization':<13}" + 2 * f"{'cat':<13}{'frog':<13}")
    for differentiation in get_args(Differentiation):
        for binarization in get_args(Binarization):
            line = f"{differentiation:<16}{binarization:<13}"
            for normalize in (False, True):
                regions = localize(
                    figure.maps,
                    figure.sot,
                    differentiation=differentiation,
                    binarization=binarization,
                    normalize=normalize,
                )
                for iou, mask in zip(regions.iou(figure.masks), regions.masks, strict=True):
                    line += f"{f'{iou:.3f} ({mask.sum()})':<13}"
            print(line.rstrip())

    print("\nThresholds of binarization 'background' on raw maps that meet the bar (IoU .79 cat, .90 frog):")
    rules: tuple[Differentiation, ...] = (
        "argmax",
        "subtract-max",
        "subtract-mean",
    )  # "none" is "argmax" here
    for differentiation in rules:
        intervals = [f"{low:.4f} to {high:.4f}" for low, high in meeting(figure, differentiation)]
        print(f"  {differentiation:<16}{', '.join(intervals) or 'none'}")
    default = localize(figure.maps, figure.sot, entities=ENTITIES)
    scores = ", ".join(f"{n} {i:.3f}" for n, i in zip(ENTITIES, default.iou(figure.masks), strict=True))
    print(f"\ndefault (argmax, background, threshold {THRESHOLD}): IoU {scores}")


if __name__ == "__main__":
    main()
