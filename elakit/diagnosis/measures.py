"""The measures that a diagnosis tells of: what they mean, and their values by seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from elakit.diagnosis.result import Diagnosis

MEANINGS: dict[str, str] = {
    "leakage": "share of an entity's attention that lies in a region; a row sums to 1",
    "bleed": "share of an entity's attention outside its own region (0 to 1, lower is better)",
    "intrusion": "share of an entity's attention inside the other entities' regions (0 to 1, lower is better)",
    "spill": "share of an entity's attention in the background, so that bleed = intrusion + spill",
    "ruzicka": "overlap of two entities' maps: common part over joint extent (0 apart, 1 the same)",
    "iou": "overlap of two maps, each cut at its Otsu threshold: intersection over union",
    "dice": "overlap of the same two areas: twice the intersection over their sum",
    "overlap_coefficient": "overlap of the same two areas: intersection over the smaller one",
    "astar": "overlap of two maps as A-STAR counts it (0 to .5)",
    "symmetric_kl": "how unlike two maps are: symmetric Kullback-Leibler divergence (nats, higher is further apart)",
    "jensen_shannon": "how unlike two maps are: Jensen-Shannon divergence (nats, at most .69)",
    "hellinger": "how unlike two maps are: Hellinger distance (0 to 1)",
    "attribute_leakage": "share of an attribute's attention that lies in a region; a row sums to 1",
    "attribute_bleed": "share of an attribute's attention outside its entity's region (lower is better)",
    "attribute_intrusion": "share of an attribute's attention inside the other entities' regions (lower is better)",
    "attribute_spill": "share of an attribute's attention in the background",
    "attribute_overlap": "overlap (Ruzicka) of an attribute's map with an entity's",
    "attribute_margin": "overlap of an attribute with its own entity less the most with another (below 0: bound to the "
    "wrong one)",
    "truth_iou": "overlap of an entity's map, cut at its Otsu threshold, with where the judge sees it in the finished "
    "image: intersection over union",
    "truth_auc": "chance that a place on the entity, as the judge sees it, has more of its attention than one beside "
    "it (1 always, .5 no better than a guess)",
    "pointing": "whether the peak of an entity's attention lies on it in the finished image (share of the steps)",
    "truth_leakage": "share of an entity's attention that lies on a thing in the finished image; a row sums to 1",
    "attribute_truth_leakage": "share of an attribute's attention that lies on a thing in the finished image; a row "
    "sums to 1",
    "start_mass": "share of all attention on the start-of-text token",
    "end_mass": "share of all attention on end-of-text and padding",
}
# Columns of the table by seed: the measure, its heading, and whether less is better (None: neither).
BY_SEED = (
    ("bleed", "bleed", True),
    ("intrusion", "intrusion", True),
    ("spill", "spill", None),
    ("ruzicka", "overlap", True),
    ("attribute_intrusion", "attribute intrusion", True),
    ("attribute_margin", "attribute margin", False),
)


def measure_table(diagnosis: Diagnosis) -> pd.DataFrame:
    """Measures by seed: the mean over steps, and over entities, pairs or attributes.

    Returns
    -------
    DataFrame
        Indexed by seed; columns (measure, "plain" or "guided").
    """
    rows = []
    for pair in diagnosis.pairs:
        row: dict[tuple[str, str], float] = {}
        for name, run in (("plain", pair.plain), ("guided", pair.guided)):
            means = run.bleeding.overall().groupby("measure")["value"].mean()
            row |= {(measure, name): means[measure] for measure, _, _ in BY_SEED if measure in means}
        rows.append(row)
    frame = pd.DataFrame(rows, index=[pair.seed for pair in diagnosis.pairs])
    frame.columns = pd.MultiIndex.from_tuples(frame.columns, names=["measure", "run"])
    return frame.rename_axis(index="seed")
