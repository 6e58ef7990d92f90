"""Data of the explorer: words, images, steps, regions and measures of the runs, and the valid values of settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from elakit.attention import Recording
from elakit.errors import ElakitError, RecordingError
from elakit.plot import style
from elakit.plot.image_figures import LOSSLESS_SIDE, data_uri
from elakit.prompt import Prompt, Token
from elakit.run import Run
from elakit.widgets.explorer.packing import Buffer, Fit, Source, fit_to, pack
from elakit.widgets.shared.colors import TABLES

START, END = "<start>", "<end>"
# Normalizations of `Recording.maps` ("none" for None), with the unit of the values.
NORMALIZATIONS = {
    "none": "probability",
    "sum": "share of the map",
    "start": "relative to the start-of-text token",
}
# Matrices have too many lines for one plot; they are shown by `elakit.plot.leakage`.
_MATRICES = ("leakage", "attribute_leakage", "truth_leakage", "attribute_truth_leakage", "attribute_overlap")


@dataclass(frozen=True)
class Word:
    """A word whose maps are sent to the browser; "<start>" and "<end>" count as words.

    Attributes
    ----------
    label : str
        Unique label, such as "car" or "red#2".
    columns : tuple of int
        Positions of the word's tokens along the dimension ``token``.
    entity : int or None
        Index of the entity whose noun the word is; None for other words.
    attribute : int or None
        Index of the entity whose attribute the word is; None for other words.
    """

    label: str
    columns: tuple[int, ...]
    entity: int | None = None
    attribute: int | None = None


@dataclass(frozen=True)
class Payload:
    """Data of an explorer for the browser: `meta`, which is sent as JSON, and `maps`, a compressed `Buffer`."""

    meta: dict[str, Any]
    maps: bytes


def describe(runs: Sequence[Run], budget: int) -> Payload:
    """Data that an explorer of runs sends to the browser.

    Parameters
    ----------
    runs : sequence of Run
        One or more runs, all of them recorded.
    budget : int
        Largest number of bytes of the maps of all runs together, before compression. To stay within it, maps are
        downsampled and then steps are omitted (see `elakit.widgets.explorer.packing.fit_to`).

    Returns
    -------
    Payload

    Raises
    ------
    RecordingError
        A run was not recorded, or its recording is empty.
    """
    words = [words_of(style.recorded(run)) for run in runs]
    sources = [
        Source(nodes_of(style.recorded(run)), tuple(word.columns for word in each))
        for run, each in zip(runs, words, strict=True)
    ]
    fit, buffer = fit_to(sources, budget), Buffer()
    names = style.run_names(runs)
    about = [
        _run_data(run, name, each, source, fit, buffer)
        for run, name, each, source in zip(runs, names, words, sources, strict=True)
    ]
    # The run with the most steps names them; the others show the step at the nearest share of the run.
    reference = max(range(len(about)), key=lambda i: len(about[i]["steps"]))
    layer, size = _default_maps(about, style.recorded(runs[reference]))
    choices = _choices(about, about[reference]["steps"])
    default = {
        "tokens": _default_tokens(about),
        "layer": layer,
        "size": size,
        "measure": "bleed" if "bleed" in choices["measure"] else next(iter(choices["measure"]), ""),
        "step": choices["step"][len(choices["step"]) // 2],
    }
    meta = {
        "runs": about,
        "reference": reference,
        "choices": choices,
        "default": default,
        "units": NORMALIZATIONS,
        "colors": TABLES,
        "meanings": _meanings(choices["measure"]),
        "notes": _notes(sources, fit),
        "scales": buffer.scale_count,
    }
    return Payload(meta, buffer.deflated())


def nodes_of(recording: Recording) -> tuple[xr.Dataset, ...]:
    """Datasets of a recording, one per map size, largest maps first.

    Raises
    ------
    RecordingError
        The recording is empty.
    """
    nodes = recording.nodes()
    if not nodes or not nodes[0].sizes["step"]:
        raise RecordingError("The recording is empty: the run ended before its first step. Generate the image again.")
    return nodes


def words_of(recording: Recording) -> list[Word]:
    """Recorded words in the order of the prompt, followed by "<start>" and "<end>" where they were recorded.

    Parameters
    ----------
    recording : Recording

    Returns
    -------
    list of Word

    Raises
    ------
    RecordingError
        The recording is empty.
    """
    prompt = recording.prompt
    node = nodes_of(recording)[0]
    labels = [str(label) for label in node["token"].values]
    column = {int(index): i for i, index in enumerate(node["token_index"].values) if labels[i] not in (START, END)}
    pieces: dict[int, list[Token]] = {}
    for token in prompt.tokens:
        pieces.setdefault(token.word, []).append(token)
    words = []
    for tokens in pieces.values():
        kept = [token.index for token in tokens if token.index in column]
        if kept:
            entity, attribute = _owners(prompt, kept)
            words.append(Word(_label(prompt, tokens), tuple(column[index] for index in kept), entity, attribute))
    return words + [Word(end, (labels.index(end),)) for end in (START, END) if end in labels]


def _label(prompt: Prompt, tokens: Sequence[Token]) -> str:
    """Label of the word with these tokens.

    It is "giraffe" for the tokens "giraffe/1" and "giraffe/2", and also for "giraffe@clip" and "giraffe@t5".
    """
    return tokens[0].label if len(tokens) == 1 else prompt.word_labels[tokens[0].word]


def _owners(prompt: Prompt, indices: Sequence[int]) -> tuple[int | None, int | None]:
    """Index of the entity whose noun has one of the token indices, and index of the entity whose attribute has one.

    Each of the two is None if there is no such entity.
    """
    nouns = [i for i, entity in enumerate(prompt.entities) if set(indices) & set(entity.token_indices)]
    owners = [i for i, entity in enumerate(prompt.entities) if set(indices) & set(entity.attribute_indices)]
    return (nouns[0] if nouns else None), (owners[0] if owners else None)


def _chips(prompt: Prompt, words: Sequence[Word]) -> list[dict[str, Any]]:
    """All words of the prompt as written, each with its index in `words`, or None if it was not recorded."""
    place = {word.label: i for i, word in enumerate(words)}
    pieces: dict[int, list[Token]] = {}
    for token in prompt.tokens:
        pieces.setdefault(token.word, []).append(token)
    chips: list[dict[str, Any]] = []
    last = 0
    for i, (first, past) in enumerate(prompt.words):
        where = place.get(_label(prompt, pieces[i])) if i in pieces else None
        chips.append({"text": prompt.text[first:past], "gap": first > last, "token": where})
        last = past
    names = {START: "start", END: "end"}
    return chips + [
        {"text": names[word.label], "gap": True, "token": place[word.label], "special": True}
        for word in words
        if word.label in names
    ]


def _run_data(run: Run, name: str, words: Sequence[Word], source: Source, fit: Fit, buffer: Buffer) -> dict[str, Any]:
    """Data of one run for the browser as JSON; its maps and regions are added to the buffer."""
    recording = style.recorded(run)
    node, prompt = source.nodes[0], run.prompt
    positions = fit.positions(node.sizes["step"])
    steps = [int(node["step"].values[i]) for i in positions]
    colors = style.entity_colors([entity.label for entity in prompt.entities])
    attrs = recording.tree.attrs
    notes: list[str] = []
    regions = _regions(run, steps, buffer, notes)
    measures = _measures(run, steps, colors, notes)
    return {
        "name": name,
        "seed": run.seed,
        "prompt": prompt.text,
        "image": data_uri(run.image, 512),
        "predicted": _predicted(run, steps),
        "width": run.image.width,
        "height": run.image.height,
        "coarse": max(run.image.size) < LOSSLESS_SIDE,
        "outcome": _outcome(run),
        "words": [{"label": word.label, "entity": word.entity, "attribute": word.attribute} for word in words],
        "chips": _chips(prompt, words),
        "entities": [{"label": label, "color": color} for label, color in colors.items()],
        "steps": steps,
        "timesteps": [_number(node["timestep"].values[i], 1) for i in positions],
        "calls": max(int(attrs.get("expected") or 0), int(attrs.get("calls") or 0), steps[-1] + 1),
        "averaged": recording.averaged,
        "guided": sorted(set(run.guidance.guided)) if run.guidance else [],
        "layers": pack(source, fit, buffer),
        "regions": regions,
        "measures": measures,
        "notes": notes,
    }


def _predicted(run: Run, steps: Sequence[int]) -> list[str] | None:
    """Image that the run predicts at each of the steps, as data URIs; None if the run has no predicted images."""
    if not run.predicted:
        return None
    return [data_uri(run.predicted[min(step, len(run.predicted) - 1)], LOSSLESS_SIDE) for step in steps]


def _outcome(run: Run) -> dict[str, Any] | None:
    """The judge's verdict on the image; None if the judge cannot judge this image."""
    verdict = run.verdict
    return None if verdict is None else {"right": bool(verdict.success), "verdict": str(verdict)}


def _regions(run: Run, steps: Sequence[int], buffer: Buffer, notes: list[str]) -> dict[str, Any] | None:
    """Add the regions to the buffer; return their size and position there, or None after adding a note on the reason.

    They are bytes (step, y, x): 0 for a location outside every region, n for one in the region of the n-th entity.
    """
    try:
        regions = run.regions.sel(step=list(steps))
    except ElakitError as error:
        notes.append(f"Regions and measures are not available: {error}")
        return None
    numbers = np.arange(1, regions.sizes["entity"] + 1, dtype=np.uint8)[:, None, None]
    owner = (regions.values * numbers).max(axis=1)
    return {"rows": regions.sizes["y"], "columns": regions.sizes["x"], "at": buffer.add(owner)}


def _measures(
    run: Run, steps: Sequence[int], colors: dict[str, str], notes: list[str]
) -> dict[str, list[dict[str, Any]]]:
    """Lines of the plot of each measure over the steps, by measure; empty if no measure is available.

    Each line has name, color (None without an entity), second (color of the other entity of a pair, or None) and values
    (one per step, None where the value is missing or not finite). `colors` has the color of each entity, by its label.
    If no measure is available, a note on the reason is added to `notes`, unless `notes` already has one.
    """
    try:
        frame = run.bleeding.to_frame()
    except ElakitError as error:
        if not notes:
            notes.append(f"Measures are not available: {error}")
        return {}
    frame = frame[frame["step"].isin(steps) & ~frame["measure"].isin(_MATRICES)]
    lines: dict[str, list[dict[str, Any]]] = {}
    for (measure, entity, other), part in frame.groupby(["measure", "entity", "other"], sort=False):
        values: pd.Series = part.set_index("step")["value"].reindex(list(steps))
        line = {
            "name": _line_name(str(measure), str(entity), str(other), colors),
            "color": colors.get(str(entity)) or colors.get(str(other)),
            # the second color of the swatch of a pair of entities
            "second": colors.get(str(other)) if str(entity) in colors else None,
            "values": [_number(value, 5) for value in values],
        }
        lines.setdefault(str(measure), []).append(line)
    return lines


def _line_name(measure: str, entity: str, other: str, colors: dict[str, str]) -> str:
    if not entity:
        return measure.replace("_", " ")
    if not other:
        return entity
    return f"{entity} and {other}" if entity in colors else f"{entity} of {other}"


def _number(value: float, digits: int) -> float | None:
    """A number for JSON, rounded to `digits` decimal places; None if the number is not finite."""
    return round(float(value), digits) if np.isfinite(value) else None


def _choices(about: Sequence[dict[str, Any]], steps: list[int]) -> dict[str, list[Any]]:
    """Valid values of the traits of `Explorer` that have a list of choices, by name of the trait.

    The entry "tokens" holds for the trait `token`, too. `about` has the data of each run, as `_run_data` returns them.
    `steps` are the steps that can be chosen.
    """
    layers = [layer for run in about for layer in run["layers"]]
    places = dict.fromkeys(layer["place"] for layer in layers)
    labels = dict.fromkeys(word["label"] for run in about for word in run["words"])
    heads = sorted({head for layer in layers for head in layer["heads"] if head != "mean"})
    starts = any(word["label"] == START for run in about for word in run["words"])
    return {
        "step": steps,
        "tokens": list(labels),
        "layer": list(dict.fromkeys(["all", *places, *(layer["name"] for layer in layers)])),
        "size": [None, *sorted({layer["size"] for layer in layers}, reverse=True)],
        "head": ["mean", *heads],
        "normalization": [each for each in NORMALIZATIONS if each != "start" or starts],
        "measure": list(dict.fromkeys(measure for run in about for measure in run["measures"])),
        "colors": list(TABLES),
    }


def _default_tokens(about: Sequence[dict[str, Any]]) -> list[str]:
    """Labels of the nouns of all runs' entities; the first word of the first run if no noun was recorded.

    `about` has the data of each run, as `_run_data` returns them.
    """
    nouns = dict.fromkeys(word["label"] for run in about for word in run["words"] if word["entity"] is not None)
    return list(nouns) or [about[0]["words"][0]["label"]]


def _default_maps(about: Sequence[dict[str, Any]], recording: Recording) -> tuple[str, int | None]:
    """Default values of `Explorer.layer` and `Explorer.size`, which select the maps that `Run.regions` uses.

    The layer is "up" if `recording` is of a U-Net, else "all"; it is also "all" if a run has no maps in the decoder.
    The size is the map size of `recording` nearest to 16, or None if a run has no maps of this size in these layers.
    `recording` is that of the run with the most steps. `about` has the data of each run, as `_run_data` returns them.
    """
    layer, size = recording.decoder, recording.usual_size()
    if any(not sizes_of(run["layers"], layer) for run in about):
        layer = "all"
    return layer, size if all(size in sizes_of(run["layers"], layer) for run in about) else None


def sizes_of(layers: Sequence[dict[str, Any]], layer: str) -> set[int]:
    """Map sizes of the layers that `layer` selects: "all", a part of the network such as "mid", or a layer's name.

    `layers` are the descriptions that `pack` returns.

    Examples
    --------
    >>> layers = [{"name": "a", "place": "down", "size": 32}, {"name": "b", "place": "mid", "size": 8}]
    >>> sizes_of(layers, "mid"), sizes_of(layers, "a"), sizes_of(layers, "up")
    ({8}, {32}, set())
    """
    return {each["size"] for each in layers if layer in ("all", each["place"], each["name"])}


def _meanings(measures: Sequence[str]) -> dict[str, str]:
    from elakit.diagnosis.report import MEANINGS  # imported late, since it loads plotly.js

    return {measure: MEANINGS.get(measure, "") for measure in measures}


def _notes(sources: Sequence[Source], fit: Fit) -> list[str]:
    """Notes for the user on how maps and steps were reduced to stay within the budget; empty if they were not."""
    notes = []
    large = {(node.sizes["y"], node.sizes["x"]) for source in sources for node in source.nodes}
    shrunk = {size: fit.size(*size) for size in sorted(large, reverse=True) if fit.size(*size) != size}
    if shrunk:
        sizes = ", ".join(f"{a[0]}×{a[1]} maps are averaged to {b[0]}×{b[1]}" for a, b in shrunk.items())
        notes.append(f"To limit the size, {sizes}.")
    steps = max(source.nodes[0].sizes["step"] for source in sources)
    if len(fit.positions(steps)) < steps:
        kept = len(fit.positions(steps))
        are = "is" if kept == 1 else "are"
        notes.append(f"To limit the size, only {kept} of {steps} steps {are} included, evenly spaced.")
    if notes:
        notes.append("Raise the limit with elakit.explore(..., budget=...).")
    return notes
