"""The report of a diagnosis as an HTML page: this module computes the values for the template and writes the file."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from elakit.diagnosis import commands
from elakit.diagnosis.data import DiagnosisData, Pair
from elakit.diagnosis.measures import BY_SEED, MEANINGS, measure_table
from elakit.diagnosis.report import views
from elakit.diagnosis.report.figures import figures
from elakit.diagnosis.sentences import statements, unexplained
from elakit.diagnosis.trials import SHARE
from elakit.files import check_path, write_text
from elakit.guidance import METHODS, Trace, method_title
from elakit.numbering import plural, step_number
from elakit.plot.style import entity_colors

# Methods whose title is an abbreviation that the page spells out.
SPELLED_OUT = {"ela": "Entity Localization and Anchoring"}
# Measures of an attribute alone, without another entity or region.
OF_ATTRIBUTE = ("attribute_bleed", "attribute_intrusion", "attribute_spill", "attribute_margin")


def render(diagnosis: DiagnosisData, command: str = "") -> str:
    """Render the report as an HTML page.

    Parameters
    ----------
    diagnosis : DiagnosisData
    command : str
        Command line that made the diagnosis. The page shows it; "" shows nothing.

    Returns
    -------
    str
        HTML page. It contains all images, all figures and plotly.js, and loads nothing from the network.

    Raises
    ------
    RecordingError
        A run was not recorded.

    Examples
    --------
    >>> import elakit
    >>> found = elakit.diagnose(elakit.load("picture-world"), "a [cat] and a [lion]", seeds=[0], steps=2)
    >>> page = render(found, 'elakit diagnose "a [cat] and a [lion]" --seeds 0 --steps 2')
    >>> page.startswith("<!doctype html>"), "elakit diagnose" in page
    (True, True)
    """
    example = diagnosis.example()
    table, details = measure_table(diagnosis), _details(example)
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            prompt=diagnosis.prompt.text,
            marked=views.marked(diagnosis.prompt),
            colors=entity_colors([entity.label for entity in diagnosis.prompt.entities]),
            method=method_title(diagnosis.method),
            introduction=_introduction(diagnosis),
            statements=statements(diagnosis),
            judged=diagnosis.judged,
            tiles=_tiles(diagnosis, table),
            failures=views.failures(diagnosis),
            causes=views.causes(diagnosis),
            unexplained=unexplained(diagnosis),
            remedies=views.rows(diagnosis),
            predicted=f"{SHARE:.0%}" if diagnosis.predicted else "",
            cards=[views.card(diagnosis, pair) for pair in diagnosis.pairs],
            example=views.card(diagnosis, example, views.LARGE),
            why=_why_example(diagnosis, example),
            figures=figures(diagnosis, example),
            table=table,
            by_seed=[column for column in BY_SEED if column[0] in table.columns.get_level_values(0)],
            details=details,
            meanings=_meanings(table.columns.get_level_values(0)),
            more_meanings=_meanings(row["measure"] for row in details),
            settings=_settings(diagnosis),
            described=f"help(elakit.guidance.{METHODS[diagnosis.method].__name__})"
            if diagnosis.method in METHODS
            else "",
            command=command,
            code=commands.code(diagnosis),
            versions=_versions(),
            plotly_js=Markup(get_plotlyjs()),
        )
    )


def write(diagnosis: DiagnosisData, path: str | Path, command: str = "") -> Path:
    """Write the report to an HTML file, completely or not at all; an existing file is replaced.

    Parameters
    ----------
    diagnosis : DiagnosisData
    path : str or Path
        Path of the file, in an existing folder.
    command : str
        Command line that made the diagnosis. The page shows it; "" shows nothing.

    Returns
    -------
    Path
        Absolute path of the file.

    Raises
    ------
    OutputError
        The path is a folder, or its folder does not exist or cannot be written to.
    RecordingError
        A run was not recorded.
    """
    target = check_path(path)
    return write_text(target, render(diagnosis, command))


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("elakit.diagnosis.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value: "–" if pd.isna(value) else f"{value:.3f}"
    return environment


def _introduction(diagnosis: DiagnosisData) -> str:
    method = method_title(diagnosis.method)
    if spelled := SPELLED_OUT.get(diagnosis.method):
        method = f"{method} ({spelled})"
    said = (
        f"This report compares plain images with images guided by {method}. Plain images are generated without a "
        "guidance method; classifier-free guidance is the same in both."
    )
    if diagnosis.judged:
        said += (
            " The judge, a network that decides what each finished image shows, finds an image right if every entity "
            "is present, not fused with another thing (a hybrid), and in the color that the prompt gives. Extra copies "
            "of an entity are listed among the failures, but do not make an image wrong."
        )
    return said


def _tiles(diagnosis: DiagnosisData, table: pd.DataFrame) -> list[tuple[str, str]]:
    """Numbers that the report shows in large type, as pairs (number as text, label)."""
    count, method = len(diagnosis.pairs), method_title(diagnosis.method)
    tiles = []
    if diagnosis.judged:
        tiles.append((f"{diagnosis.right} of {count}", "right without guidance"))
        best = diagnosis.best if len(diagnosis.remedies) > 1 else None
        if best is None or best.remedy.name == diagnosis.method:
            guided = diagnosis.count("right") + diagnosis.count("fixed")
            tiles.append((f"{guided} of {count}", f"right with {method}"))
            tiles.append((f"{diagnosis.count('fixed')} / {diagnosis.count('broken')}", f"fixed / broken by {method}"))
        else:
            tiles.append((f"{best.right} of {len(best.runs)}", f"right with the best remedy: {best.remedy.title}"))
            tiles.append((f"{len(best.fixed)} / {len(best.broken)}", "fixed / broken by the best remedy"))
    # where the prompt gives attributes, they bleed most often
    more = ["attribute_intrusion"] if "attribute_intrusion" in table else [] if tiles else ["intrusion"]
    for measure, heading, _ in BY_SEED:
        if measure in ["bleed", *more] and measure in table:
            before, after = (table[measure, run].mean() for run in ("plain", "guided"))
            tiles.append((f"{before:.3f} → {after:.3f}", f"mean {heading}, plain → {method}"))
    if not diagnosis.judged:
        tiles.insert(0, (str(count), f"{plural('seed', count)}, each plain and with {method}"))
    return tiles


def _why_example(diagnosis: DiagnosisData, example: Pair) -> str:
    count = len(diagnosis.pairs)
    if count == 1:
        return ""
    fixed = diagnosis.count("fixed")
    if fixed == 1:
        return "The only fixed seed."
    frequent = bool(diagnosis.failures) and example.seed in diagnosis.failures[0].seeds
    if fixed:
        said = "This seed was fixed" + (" and shows the most frequent failure" if frequent else "")
        return f"{said}. Of all such seeds, it has the highest bleed without guidance."
    none = f"{method_title(diagnosis.method)} fixed no seed. " if diagnosis.judged else ""
    if frequent:
        return f"{none}This seed shows the most frequent failure. Of all such seeds, it has the highest bleed."
    return f"{none}This seed has the highest bleed without guidance."


def _details(example: Pair) -> list[dict[str, Any]]:
    """Rows of the report's table of all measures, for the seed that the report shows in detail.

    Each row has the keys "measure", "name" (the name of the measure in the report), "about" (label of the entities that
    are measured), "plain" and "guided". The values "plain" and "guided" are means over the steps of the plain and of
    the guided run.
    """
    both = [run.bleeding.overall() for run in (example.plain, example.guided)]
    keys = ["measure", "entity", "other"]
    merged = both[0].merge(both[1], on=keys, suffixes=("_plain", "_guided"))
    bound = merged[merged["measure"] == "attribute_margin"]
    owners = dict(zip(bound["entity"], bound["other"], strict=True))
    return [
        {
            "measure": str(row["measure"]),
            "name": _measure_name(str(row["measure"])),
            "about": _about(row, owners),
            "plain": float(row["value_plain"]),
            "guided": float(row["value_guided"]),
        }
        for row in merged.to_dict("records")
    ]


def _about(row: Mapping[str, Any], owners: Mapping[str, str]) -> str:
    """Label of the entities that a row of the table of all measures is about.

    The label "car · bird" names two entities. The label "green (of apple) · bird" names an attribute with its own
    entity, and another entity.

    Parameters
    ----------
    row : mapping
        Row with the keys "measure", "entity" and "other".
    owners : mapping of str to str
        Entity of each attribute.
    """
    first, other = row["entity"], row["other"]
    if str(row["measure"]).startswith("attribute_") and first in owners:
        # a measure of an attribute alone names its owner as the other
        alone = row["measure"] in OF_ATTRIBUTE
        first, other = f"{first} (of {owners[first]})", "" if alone else other
    return " · ".join(part for part in (first, other) if part)


def _meanings(measures: Iterable[str]) -> list[tuple[str, str]]:
    """Explanations of measures, as pairs (heading, explanation), without duplicates."""
    return [(_measure_name(measure), MEANINGS.get(measure, "")) for measure in dict.fromkeys(measures)]


def _measure_name(measure: str) -> str:
    """Name of a measure in the report: the heading of the table by seed, or its name with spaces."""
    return next((heading for name, heading, _ in BY_SEED if name == measure), measure.replace("_", " "))


def _settings(diagnosis: DiagnosisData) -> list[tuple[str, str]]:
    pair = diagnosis.pairs[0]
    run, settings = pair.plain, pair.plain.settings
    recording = run.recording
    rows = [
        ("model", str(settings.get("model"))),
        ("seeds", ", ".join(str(each.seed) for each in diagnosis.pairs)),
        ("steps", str(settings.get("steps"))),
        ("guidance scale", f"{settings.get('guidance_scale'):g}"),
        ("size", f"{settings.get('width')} × {settings.get('height')} pixels"),
        ("scheduler", str(settings.get("scheduler"))),
    ]
    if settings.get("negative_prompt"):
        rows.append(("negative prompt", str(settings["negative_prompt"])))
    rows.append(("method", method_title(diagnosis.method)))
    rows += [(f"{method_title(diagnosis.method)}: {name}", value) for name, value in acting_options(diagnosis)]
    if recording is not None:
        maps = run.entity_maps()
        layers = "decoder layers" if recording.decoder == "up" else "all layers"
        rows.append(("maps measured", f"{maps.sizes['y']} × {maps.sizes['x']}, mean over {layers} and heads"))
    traces = [each.guided.guidance for each in diagnosis.pairs if each.guided.guidance is not None]
    rows.append((_guided_heading(method_title(diagnosis.method), traces), _guided_steps(traces)))
    if skipped := sum(trace.skipped for trace in traces):
        rows.append(("skipped steps", f"{skipped} (the gradient was not finite)"))
    others = sum(len(one.runs) for one in diagnosis.remedies if one.remedy.name != diagnosis.method)
    rows.append(("time", f"{diagnosis.seconds:.0f} s for {2 * len(diagnosis.pairs) + others} images of all remedies"))
    return rows


def acting_options(diagnosis: DiagnosisData) -> list[tuple[str, str]]:
    """Options of the guidance method that were changed or had an effect, as pairs (name, value as text).

    An option that differs from its default is always listed. An option with its default value is listed if the option
    had an effect in at least one guided run. Defaults of None, zero or False are never listed.
    """
    different = commands.changed(diagnosis.method, diagnosis.options) or {}
    guided = any(pair.was_guided for pair in diagnosis.pairs)
    idle = _idle(diagnosis)
    return [
        (name, str(value))
        for name, value in diagnosis.options.items()
        if name in different
        or (guided and value is not None and not _is_off(value) and not idle & {name, *name.split(".")})
    ]


def _idle(diagnosis: DiagnosisData) -> set[str]:
    """Names of options that had no effect in any guided run of the diagnosis.

    The name of a group of options, such as "separate", stands for all options of the group, such as
    "separate.step_size".
    """
    idle = set()
    if not any(entity.attributes for entity in diagnosis.prompt.entities):
        idle.add("attributes")
    if (regions := diagnosis.options.get("regions")) is not None:
        idle |= {"anchor.needed", "anchor.enough"}
        if all(region is not None for region in regions):
            idle.add("localize")
    traces = [pair.guided.guidance for pair in diagnosis.pairs if pair.guided.guidance is not None]
    terms = {term for trace in traces for row in trace.rows for term in row}
    for term, parts in getattr(METHODS.get(diagnosis.method), "parts_of_terms", {}).items():
        if term not in terms:
            idle.update(parts)
    return idle


def _is_off(value: Any) -> bool:
    return isinstance(value, bool | int | float) and not value


def _guided_heading(method: str, traces: Sequence[Trace]) -> str:
    """Heading of the guided steps in the report's table of settings.

    The heading is "steps in which ELA moved the latent" if ELA moved the latent at every guided step. Otherwise the
    heading is "steps in which ELA acted", because some methods edit attention scores and do not move the latent.

    Parameters
    ----------
    method : str
        Display name of the method, such as "ELA".
    traces : sequence of Trace
        Traces of the guided runs.
    """
    acted = [row for trace in traces for row in trace.rows if row["step"] in trace.guided]
    what = "moved the latent" if acted and all(row["moved"] > 0 for row in acted) else "acted"
    return f"steps in which {method} {what}"


def _guided_steps(traces: Sequence[Trace]) -> str:
    """Text on the guided steps of all images, such as "5 to 7 (2 to 3 per image)"; "none" without guided steps.

    In this example, step 5 is the first guided step of any image, and step 7 the last. Steps count from 1. Each image
    has two or three guided steps.
    """
    steps = sorted({step_number(step) for trace in traces for step in trace.guided})
    if not steps:
        return "none"
    counts = sorted({len(trace.guided) for trace in traces})
    each = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return f"{steps[0]} to {steps[-1]} ({each} per image)" if len(steps) > 1 else f"{steps[0]} ({each} per image)"


def _versions() -> Sequence[tuple[str, str]]:
    found = [("Python", platform.python_version())]
    for package in ("elakit", "torch", "diffusers", "transformers", "plotly"):
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            from elakit import __version__

            found.append((package, __version__ if package == "elakit" else "unknown"))
    return found
