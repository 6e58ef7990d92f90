"""Measures in the report of a diagnosis: their definitions, and their values by seed."""

from __future__ import annotations

import pandas as pd

from elakit.diagnosis.data import DiagnosisData

MEANINGS: dict[str, str] = {
    "leakage": "share of an entity's attention that lies in a region; the shares of an entity sum to 1 ("
    "its own region: higher is better; the region of another entity: lower is better)",
    "bleed": "share of an entity's attention outside its own region (0 to 1, lower is better)",
    "intrusion": "share of an entity's attention inside the regions of other entities (0 to 1, lower is better)",
    "spill": "share of an entity's attention in the background (0 to 1, neither direction is better); bleed = "
    "intrusion + spill",
    "ruzicka": "overlap of the maps of two entities: sum of minima over sum of maxima (0 disjoint, 1 identical; "
    "lower is better)",
    "iou": "intersection over union of two maps, binarized at their Otsu thresholds (0 to 1, lower is better)",
    "dice": "Dice coefficient of two maps, binarized at their Otsu thresholds (0 to 1, lower is better)",
    "overlap_coefficient": "intersection of two maps, binarized at their Otsu thresholds, over the smaller one (0 to "
    "1, lower is better)",
    "astar": "overlap of two maps as defined by A-STAR (0 to 0.5, lower is better)",
    "symmetric_kl": "symmetric Kullback-Leibler divergence of two maps (nats, from 0, higher is better)",
    "jensen_shannon": "Jensen-Shannon divergence of two maps (nats, 0 to 0.69, higher is better)",
    "hellinger": "Hellinger distance of two maps (0 to 1, higher is better)",
    "attribute_leakage": "share of an attribute's attention that lies in a region; the shares of an attribute sum to 1 "
    "(the region of its entity: higher is better; that of another entity: lower is better)",
    "attribute_bleed": "share of an attribute's attention outside its entity's region (0 to 1, lower is better)",
    "attribute_intrusion": "share of an attribute's attention inside the regions of other entities (0 to 1, lower is "
    "better)",
    "attribute_spill": "share of an attribute's attention in the background (0 to 1, neither direction is better)",
    "attribute_overlap": "overlap (Ruzicka) of an attribute's map with an entity's map (0 to 1; its own entity: higher "
    "is better; another one: lower is better)",
    "attribute_margin": "overlap of an attribute's map with that of its own entity, minus its largest overlap with "
    "that of another entity (below 0: the overlap with another entity is larger; higher is better)",
    "truth_iou": "intersection over union of an entity's map, binarized at its Otsu threshold, and the judge's mask in "
    "the finished image (0 to 1, higher is better)",
    "truth_auc": "area under the ROC curve of an entity's attention for the judge's mask (1 perfect, 0.5 chance; "
    "higher is better)",
    "pointing": "share of the steps in which the maximum of an entity's attention lies in the judge's mask (0 to 1, "
    "higher is better)",
    "truth_leakage": "share of an entity's attention inside the judge's mask of the same or another entity, or outside "
    "all masks; the shares of an entity sum to 1 (its own mask: higher is better; that of another "
    "entity: lower is better)",
    "attribute_truth_leakage": "share of an attribute's attention inside the judge's mask of an entity, or outside all "
    "masks; the shares of an attribute sum to 1 (the mask of its entity: higher is better; "
    "that of another entity: lower is better)",
    "start_mass": "share of all attention on the start-of-text token (0 to 1, neither direction is better)",
    "end_mass": "share of all attention on the end-of-text and padding tokens (0 to 1, neither direction is better)",
}
# Columns of the table by seed: measure, heading, and whether lower is better (None: neither).
BY_SEED = (
    ("bleed", "bleed", True),
    ("intrusion", "intrusion", True),
    ("spill", "spill", None),
    ("ruzicka", "overlap (Ruzicka)", True),
    ("attribute_intrusion", "attribute intrusion", True),
    ("attribute_margin", "attribute margin", False),
)


def measure_table(diagnosis: DiagnosisData) -> pd.DataFrame:
    """Table of measures by seed, for the plain and the guided runs.

    Each value is a mean over the steps, and over the entities, pairs of entities, or attributes that are measured.

    Parameters
    ----------
    diagnosis : DiagnosisData

    Returns
    -------
    pandas.DataFrame
        One row per seed, indexed by seed. The columns have two levels: the name of the measure, and "plain" or
        "guided". `BY_SEED` lists the measures, and `MEANINGS` defines each measure. Measures that do not apply to the
        prompt are left out, such as "ruzicka" for a single entity.
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
