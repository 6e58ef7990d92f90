"""The report of a diagnosis: one HTML page that needs nothing but itself."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from elakit import plot
from elakit.files import check_path, write_file
from elakit.plot.pictures import data_uri
from elakit.plot.style import entity_colours, method_name
from elakit.rewording import bracketed, entity_spans

if TYPE_CHECKING:
    from elakit.diagnose import Diagnosis, Pair
    from elakit.generate import Run
    from elakit.judge import Verdict
    from elakit.prompt import Prompt

__all__ = ["check_path", "render", "summary", "write"]

# Longest sides in pixels of the pictures in the grid and of the example's.
THUMBNAIL, LARGE = 256, 640

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
    "picture: intersection over union",
    "truth_auc": "chance that a place on the entity, as the judge sees it, has more of its attention than one beside "
    "it (1 always, .5 no better than a guess)",
    "pointing": "whether the peak of an entity's attention lies on it in the finished picture (share of the steps)",
    "truth_leakage": "share of an entity's attention that lies on a thing in the finished picture; a row sums to 1",
    "attribute_truth_leakage": "share of an attribute's attention that lies on a thing in the finished picture; a row "
    "sums to 1",
    "start_mass": "share of all attention on the start-of-text token",
    "end_mass": "share of all attention on end-of-text and padding",
}
# Columns of the table by seed: the measure, its heading, and whether less is better (None: neither).
_BY_SEED = (
    ("bleed", "bleed", True),
    ("intrusion", "intrusion", True),
    ("spill", "spill", None),
    ("ruzicka", "overlap", True),
    ("attribute_intrusion", "attribute intrusion", True),
    ("attribute_margin", "attribute margin", False),
)


def render(diagnosis: Diagnosis, command: str = "") -> str:
    """The report as a page.

    Parameters
    ----------
    diagnosis : Diagnosis
    command : str
        The command line that made it, to be printed; "" leaves it out.

    Returns
    -------
    str
        HTML. Pictures, figures and plotly.js are in it, and nothing is fetched when it is opened.

    Raises
    ------
    RecordingError
        A run was not recorded.

    Examples
    --------
    >>> import elakit
    >>> found = elakit.diagnose(elakit.load("picture-world"), "a [cat] and a [lion]", seeds=1, steps=2)
    >>> page = render(found, 'elakit diagnose "a [cat] and a [lion]" --seeds 1 --steps 2')
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
            marked=_marked(diagnosis.prompt),
            colours=entity_colours([entity.label for entity in diagnosis.prompt.entities]),
            method=method_name(diagnosis.method),
            summary=summary(diagnosis),
            judged=diagnosis.judged,
            tiles=_tiles(diagnosis, table),
            cards=[_card(diagnosis, pair) for pair in diagnosis.pairs],
            example=_card(diagnosis, example, LARGE),
            why=_why_example(diagnosis, example),
            figures=_figures(diagnosis, example),
            table=table,
            by_seed=[column for column in _BY_SEED if column[0] in table.columns.get_level_values(0)],
            details=details,
            meanings=_meanings(table.columns.get_level_values(0)),
            more_meanings=_meanings(row["measure"] for row in details),
            settings=_settings(diagnosis),
            command=command,
            code=_code(diagnosis),
            versions=_versions(),
            plotly_js=Markup(get_plotlyjs()),
        )
    )


def write(diagnosis: Diagnosis, path: str | Path, command: str = "") -> Path:
    """Write the report to a file, whole or not at all; a file that is there is replaced.

    Parameters
    ----------
    diagnosis : Diagnosis
    path : str or Path
    command : str
        As in `render`.

    Returns
    -------
    Path
        Of the file, absolute.

    Raises
    ------
    OutputError
        The path is a folder, or its folder does not exist or cannot be written to.
    """
    target = check_path(path)
    write_file(target, render(diagnosis, command).encode())
    return target


def summary(diagnosis: Diagnosis) -> list[str]:
    """What was found, in sentences for people.

    Parameters
    ----------
    diagnosis : Diagnosis

    Returns
    -------
    list of str
        Plain text, nothing escaped.
    """
    method, count = method_name(diagnosis.method), len(diagnosis.pairs)
    said = []
    if diagnosis.judged:
        plain, guided = _right(diagnosis)
        said.append(
            f"Drawn plainly, {plain} of {count} {_plural('picture', count)} {'shows' if plain == 1 else 'show'} "
            f"everything the prompt asks for; with {method}, {guided} of {count}."
        )
        said.append(f"{method} {_changed(diagnosis, 'mended')} and {_changed(diagnosis, 'harmed')}.")
    else:
        said.append(
            "The pictures were not judged, because the judge knows only the nouns and colours of picture-world. "
            "Whether they are right is left to your eye; what is measured here are the attention maps."
        )
    table = measure_table(diagnosis)
    before, after = (float(table["bleed", run].mean()) for run in ("plain", "guided"))
    fell = int((table["bleed", "guided"] < table["bleed", "plain"]).sum())
    if any(_guided(pair) for pair in diagnosis.pairs):
        said.append(
            f"Of an entity's attention, {before:.0%} lay outside its own region when drawn plainly and {after:.0%} "
            f"with {method}, on average; the share fell for {fell} of {count} {_plural('seed', count)}."
        )
    else:
        alone = len(diagnosis.prompt.entities) == 1
        why = ", since the prompt names one thing only and nothing can bleed into it" if alone else ""
        said.append(f"{method} took no step here{why}: both pictures of a seed are the same.")
    return said


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
            row |= {(measure, name): means[measure] for measure, _, _ in _BY_SEED if measure in means}
        rows.append(row)
    frame = pd.DataFrame(rows, index=[pair.seed for pair in diagnosis.pairs])
    frame.columns = pd.MultiIndex.from_tuples(frame.columns, names=["measure", "run"])
    return frame.rename_axis(index="seed")


# --- parts of the page --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Picture:
    """A picture with what is said of it."""

    uri: str
    alt: str
    name: str
    seen: tuple[tuple[str, bool], ...]  # what the judge says of each entity, and whether that is right
    success: bool | None
    width: int
    height: int


@dataclass(frozen=True)
class _Card:
    """Both pictures of a seed."""

    seed: int
    outcome: str | None
    plain: _Picture
    guided: _Picture


@dataclass(frozen=True)
class _Figure:
    """A figure of the page: where it goes, what it is called, what a screen reader says of it."""

    key: str
    heading: str
    text: str
    alt: str
    json: Markup
    width: int
    height: int


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("elakit"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = lambda value: "–" if pd.isna(value) else f"{value:.3f}"
    return environment


def _marked(prompt: Prompt) -> list[tuple[str, str | None]]:
    """The prompt in pieces, each with the label of the entity that it names, or None."""
    pieces: list[tuple[str, str | None]] = []
    at = 0
    for start, stop, label in entity_spans(prompt):
        pieces += [(prompt.text[at:start], None), (prompt.text[start:stop], label)]
        at = stop
    return [(text, label) for text, label in [*pieces, (prompt.text[at:], None)] if text]


def _card(diagnosis: Diagnosis, pair: Pair, most: int = THUMBNAIL) -> _Card:
    return _Card(
        pair.seed,
        pair.outcome,
        _picture(diagnosis, pair.plain, pair.plain_verdict, "plain", most),
        _picture(diagnosis, pair.guided, pair.guided_verdict, method_name(diagnosis.method), most),
    )


def _picture(diagnosis: Diagnosis, run: Run, verdict: Verdict | None, name: str, most: int) -> _Picture:
    seen = verdict.findings() if verdict is not None else ()
    judged = "".join(f" {said}." for said, _ in seen)
    alt = f"Picture of “{diagnosis.prompt.text}”, seed {run.seed}, {name}.{judged}"
    success = None if verdict is None else bool(verdict.success)
    width, height = run.image.size
    return _Picture(data_uri(run.image, most), alt, name, seen, success, width, height)


def _guided(pair: Pair) -> bool:
    """Whether guidance took any step."""
    return pair.guided.guidance is not None and bool(pair.guided.guidance.rows)


def _right(diagnosis: Diagnosis) -> tuple[int, int]:
    """Seeds that came out right, drawn plainly and guided."""
    both = diagnosis.count("right")
    return both + diagnosis.count("harmed"), both + diagnosis.count("mended")


def _changed(diagnosis: Diagnosis, outcome: Any) -> str:
    seeds = [str(pair.seed) for pair in diagnosis.pairs if pair.outcome == outcome]
    if not seeds:
        return f"{outcome} none"
    shown = ", ".join(seeds[:8]) + (", …" if len(seeds) > 8 else "")
    return f"{outcome} {len(seeds)} ({_plural('seed', len(seeds))} {shown})"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


def _tiles(diagnosis: Diagnosis, table: pd.DataFrame) -> list[tuple[str, str]]:
    """Numbers worth showing large, each with what it is."""
    count, method = len(diagnosis.pairs), method_name(diagnosis.method)
    tiles = []
    if diagnosis.judged:
        plain, guided = _right(diagnosis)
        tiles += [
            (f"{plain} of {count}", "right when drawn plainly"),
            (f"{guided} of {count}", f"right with {method}"),
            (f"{diagnosis.count('mended')} / {diagnosis.count('harmed')}", "mended / harmed"),
        ]
    for measure, heading, _ in _BY_SEED[: 1 if tiles else 2]:
        before, after = (table[measure, run].mean() for run in ("plain", "guided"))
        tiles.append((f"{before:.2f} → {after:.2f}", f"mean {heading}, plain → {method}"))
    if not diagnosis.judged:
        tiles.insert(0, (str(count), f"{_plural('seed', count)}, drawn twice each"))
    return tiles


def _why_example(diagnosis: Diagnosis, example: Pair) -> str:
    if len(diagnosis.pairs) == 1:
        return "The only seed drawn."
    if example.outcome == "mended":
        others = diagnosis.count("mended") > 1
        return "Chosen because it was mended" + (", and bled most of those when drawn plainly." if others else ".")
    return "Chosen because its maps bleed most when drawn plainly" + (
        f"; {method_name(diagnosis.method)} mended none of the seeds." if diagnosis.judged else "."
    )


def _figures(diagnosis: Diagnosis, example: Pair) -> list[_Figure]:
    plain, guided, method = example.plain, example.guided, method_name(diagnosis.method)
    attributes = any(entity.attributes for entity in diagnosis.prompt.entities)
    traced = guided.guidance is not None and guided.guidance.regions is not None
    figures = [
        _figure(
            "attention", "Where each entity's attention lies", plot.entity_maps(plain, guided, title=""),
            "The picture, and over it in grey where the attention of each entity lies. Maps that cover the same place "
            "are the mark of bleeding.",
        ),
        _figure(
            "regions-plain", "Regions, plain", plot.region_evolution(plain, title=""),
            "The place each entity holds from step to step, found by setting the entities' maps against each other. "
            "In grey: the maps.",
        ),
        _figure("regions-guided", f"Regions, {method}", plot.region_evolution(guided, title=""), ""),
    ]  # fmt: skip
    if traced:
        figures.append(
            _figure(
                "anchors", f"Regions {method} anchored the entities to",
                plot.region_evolution(guided, source="guidance", title=""),
                "Found anew at each guided step, before the latent is moved.",
            )
        )  # fmt: skip
    figures += [
        _figure(
            "leakage", "How much of it leaks",
            plot.leakage(plain, guided, attributes=attributes, title=""),
            "Each row is one entity's attention" + (" or one attribute's" if attributes else "") + ", each column a "
            "region. What lies outside the frames has leaked.",
        ),
        _figure(
            "steps", "Bleeding over the steps",
            plot.bleeding_over_steps([run for pair in diagnosis.pairs for run in (pair.plain, pair.guided)], title=""),
            "All seeds." if len(diagnosis.pairs) > 1 else "",
        ),
        _figure(
            "tokens-plain", "Token maps, plain", plot.token_maps(plain, title=""),
            "What each word of the prompt attends to, from the first step to the last.",
        ),
        _figure("tokens-guided", f"Token maps, {method}", plot.token_maps(guided, title=""), ""),
    ]  # fmt: skip
    # Where nothing was guided, both runs are the same: shown once.
    return [figure for figure in figures if _guided(example) or not figure.key.endswith("-guided")]


def _figure(key: str, heading: str, figure: go.Figure, text: str) -> _Figure:
    # The page's colours shine through; its script gives the text the page's ink.
    figure.update_layout(paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)")
    plain = figure.to_json().replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    alt = f"Figure: {heading}. {text}".strip()
    return _Figure(key, heading, text, alt, Markup(plain), int(figure.layout.width), int(figure.layout.height))


def _details(example: Pair) -> list[dict[str, Any]]:
    """Every overall measure of both runs of the example."""
    both = [run.bleeding.overall() for run in (example.plain, example.guided)]
    keys = ["measure", "entity", "other"]
    merged = both[0].merge(both[1], on=keys, suffixes=("_plain", "_guided"))
    return [
        {
            "measure": str(row["measure"]),
            "about": " · ".join(part for part in (row["entity"], row["other"]) if part),
            "plain": float(row["value_plain"]),
            "guided": float(row["value_guided"]),
        }
        for row in merged.to_dict("records")
    ]


def _meanings(measures: Iterable[str]) -> list[tuple[str, str]]:
    """What measures mean, each once."""
    headings = {"ruzicka": "overlap (ruzicka)"}
    return [
        (headings.get(measure, measure.replace("_", " ")), MEANINGS.get(measure, ""))
        for measure in dict.fromkeys(measures)
    ]


def _settings(diagnosis: Diagnosis) -> list[tuple[str, str]]:
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
    rows.append(("method", method_name(diagnosis.method)))
    rows += [(f"{method_name(diagnosis.method)}: {name}", str(value)) for name, value in diagnosis.options.items()]
    if recording is not None:
        maps = run.entity_maps()
        layers = "the decoder's layers" if recording.decoder == "up" else "all layers"
        rows.append(("maps measured", f"{maps.sizes['y']} × {maps.sizes['x']}, mean of {layers} and heads"))
    traces = [each.guided.guidance for each in diagnosis.pairs if each.guided.guidance is not None]
    if skipped := sum(trace.skipped for trace in traces):
        rows.append(("steps left alone", f"{skipped} (the gradient was not finite)"))
    rows.append(("time", f"{diagnosis.seconds:.0f} s for {2 * len(diagnosis.pairs)} pictures"))
    return rows


def _code(diagnosis: Diagnosis) -> str:
    """Python that draws the same pictures again."""
    settings = diagnosis.pairs[0].plain.settings
    seeds = [pair.seed for pair in diagnosis.pairs]
    return "\n".join(
        [
            "import elakit",
            "from elakit import report",
            "",
            f"pipe = elakit.load({str(settings.get('model'))!r})",
            "found = elakit.diagnose(",
            "    pipe,",
            f"    {bracketed(diagnosis.prompt)!r},",
            f"    seeds={seeds},",
            f"    method={_method_code(diagnosis.method, diagnosis.options)},",
            f"    steps={settings.get('steps')},",
            f"    guidance_scale={settings.get('guidance_scale'):g},",
            ")",
            'report.write(found, "report.html")',
        ]
    )


def _method_code(name: str, options: Mapping[str, Any]) -> str:
    """A method as code: its name where every option has its default."""
    from elakit.guidance import METHODS

    if name not in METHODS:
        return repr(name)
    defaults = {field.name: field.default for field in fields(METHODS[name])}
    changed = {key: value for key, value in options.items() if key not in defaults or defaults[key] != value}
    if not changed:
        return repr(name)
    arguments = ", ".join(f"{key}={value!r}" for key, value in changed.items())
    return f"elakit.guidance.{METHODS[name].__name__}({arguments})"


def _versions() -> Sequence[tuple[str, str]]:
    found = [("Python", platform.python_version())]
    for package in ("elakit", "torch", "diffusers", "transformers", "plotly"):
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            from elakit import __version__

            found.append((package, __version__ if package == "elakit" else "unknown"))
    return found
