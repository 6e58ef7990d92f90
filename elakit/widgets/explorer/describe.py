"""Data of runs that the explorer widget sends to the browser: words, images, maps, regions, measures and settings."""

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
    """A word of a prompt whose attention maps the explorer widget sends to the browser.

    Start-of-text and end-of-text also count as words, with the labels "<start>" and "<end>".

    Attributes
    ----------
    label : str
        Unique label, such as "car" or "red#2".
    columns : tuple of int
        Positions of the word's tokens along the dimension ``token`` of the recording.
    entity : int or None
        If the word is the noun of an entity: index of this entity. Otherwise None.
    attribute : int or None
        If the word is an attribute of an entity: index of this entity. Otherwise None.
    """

    label: str
    columns: tuple[int, ...]
    entity: int | None = None
    attribute: int | None = None


@dataclass(frozen=True)
class Payload:
    """Data that the explorer widget sends to the browser.

    Attributes
    ----------
    meta : dict
        All data except maps and regions, such as words, images and measures. It is sent as JSON.
    maps : bytes
        Attention maps and regions in a compressed binary format, the result of `Buffer.deflated`.
    """

    meta: dict[str, Any]
    maps: bytes


def describe(runs: Sequence[Run], budget: int) -> Payload:
    """Collect the data of runs that the explorer widget sends to the browser.

    Parameters
    ----------
    runs : sequence of Run
        One or more runs, all of them recorded.
    budget : int
        Largest number of bytes of the maps of all runs together, before compression. If the maps exceed the budget,
        the maps are downsampled. If this is not enough, steps are omitted, too.

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
    """Recorded attention maps, as one xarray dataset per map size. The dataset with the largest maps comes first.

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
    """Words of the prompt whose attention was recorded, in the order of the prompt.

    Start-of-text (label "<start>") and end-of-text with padding (label "<end>") follow if they were recorded.

    Parameters
    ----------
    recording : Recording
        Recording of a run.

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
    """Label of the word that `tokens` represent.

    For example, the label is "giraffe" for the two tokens "giraffe/1" and "giraffe/2". The label is also "giraffe" for
    the tokens "giraffe@clip" and "giraffe@t5" of two text encoders.
    """
    return tokens[0].label if len(tokens) == 1 else prompt.word_labels[tokens[0].word]


def _owners(prompt: Prompt, indices: Sequence[int]) -> tuple[int | None, int | None]:
    """Return the index of the entity that a word names, and the index of the entity that the word describes.

    `indices` are the indices of the word's tokens. In "a red car", the noun "car" names the entity, and the attribute
    "red" describes the entity. Each result is None if there is no such entity.
    """
    nouns = [i for i, entity in enumerate(prompt.entities) if set(indices) & set(entity.token_indices)]
    owners = [i for i, entity in enumerate(prompt.entities) if set(indices) & set(entity.attribute_indices)]
    return (nouns[0] if nouns else None), (owners[0] if owners else None)


def _chips(prompt: Prompt, words: Sequence[Word]) -> list[dict[str, Any]]:
    """Describe the buttons with which the explorer shows the prompt, one dict per word of the prompt.

    "text" is the word as written in the prompt. "gap" is True if a space precedes the word. "token" is the index of the
    word in `words`, or None if the word was not recorded. If start-of-text and end-of-text were recorded, their buttons
    follow, and have the entry "special".
    """
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
    """Data of one run that the explorer sends to the browser as JSON, such as the image and the measures.

    The maps and regions of the run are not part of the result, but are added to `buffer`. `name` is the title of the
    run. `words` and `source` are the run's recorded words and maps. `fit` is the reduction of maps and steps.
    """
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
    """Final images that a run predicts at the steps in `steps`, one data URI per step.

    The result is None if the run was generated without ``predicted=True``.
    """
    if not run.predicted:
        return None
    return [data_uri(run.predicted[min(step, len(run.predicted) - 1)], LOSSLESS_SIDE) for step in steps]


def _outcome(run: Run) -> dict[str, Any] | None:
    """Verdict of the built-in judge on the image of a run; None if the judge cannot judge the image.

    The entry "right" is True if the image is right. The entry "verdict" is the verdict as text.
    """
    verdict = run.verdict
    return None if verdict is None else {"right": bool(verdict.success), "verdict": str(verdict)}


def _regions(run: Run, steps: Sequence[int], buffer: Buffer, notes: list[str]) -> dict[str, Any] | None:
    """Add the regions of a run at the given steps to `buffer`, and return their size and position.

    The regions are stored as bytes (step, y, x). The byte is n at locations in the region of the n-th entity, counted
    from 1. The byte is 0 at locations outside every region. The result has the entries "rows", "columns", and "at", the
    index of the first byte in the buffer. If regions cannot be computed, the reason is added to `notes`, and the result
    is None.
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
    """Lines with which the explorer plots the measures of a run over the steps.

    The result maps the name of each measure to a list of lines. For example, a measure of entities has one line per
    entity. Measures that are matrices, such as leakage, are left out. A line is a dict with four entries:

    - "name": name of the line, such as the label of an entity.
    - "color": color of the entity; None if the line belongs to no entity.
    - "second": color of the second entity, if the line belongs to a pair of entities; otherwise None.
    - "values": one value per step; None if a value is missing or not finite.

    `colors` maps the labels of the entities to their colors. If the measures cannot be computed, the result is empty.
    The reason is then added to `notes`, unless `notes` already contains a note.
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
    """Valid values of the explorer's settings, as a dict with one list per setting.

    The keys are names of attributes of `Explorer`, such as "layer". The list "tokens" also applies to the attribute
    `token`. `about` is the data of each run, as `_run_data` returns it. `steps` are the steps that can be chosen.
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
    """Labels of the words that the explorer shows by default: the recorded nouns of the entities of all runs.

    If no noun was recorded, the only label is the label of the first recorded word of the first run. `about` is the
    data of each run, as `_run_data` returns it.
    """
    nouns = dict.fromkeys(word["label"] for run in about for word in run["words"] if word["entity"] is not None)
    return list(nouns) or [about[0]["words"][0]["label"]]


def _default_maps(about: Sequence[dict[str, Any]], recording: Recording) -> tuple[str, int | None]:
    """Default layers and default map size, which select the attention maps that the explorer shows.

    If possible, these maps are the maps from which `Run.regions` is computed.

    The layers are "up" (the decoder) for a U-Net, and "all" for a transformer. If any run has no maps in the decoder,
    the layers are "all". The map size is the size nearest to 16 in `recording`, the recording of the run with the most
    steps. If any run has no maps of this size in the default layers, the map size is None, which stands for all sizes.
    `about` is the data of each run, as `_run_data` returns it.
    """
    layer, size = recording.decoder, recording.usual_size()
    if any(not sizes_of(run["layers"], layer) for run in about):
        layer = "all"
    return layer, size if all(size in sizes_of(run["layers"], layer) for run in about) else None


def sizes_of(layers: Sequence[dict[str, Any]], layer: str) -> set[int]:
    """Map sizes of the selected layers.

    `layer` selects layers: it is "all", a part of the network such as "mid", or the name of one layer. `layers` is a
    list with one dict per layer, as `pack` returns it.

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
    """Notes for the user about maps that were downsampled, and steps that were omitted, to limit the size of the data.

    The list is empty if nothing was reduced. `fit` is the reduction.
    """
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
