"""Figures of the report of a diagnosis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup

from elakit import plot
from elakit.diagnosis.data import DiagnosisData, Pair
from elakit.guidance import Trace, method_title
from elakit.numbering import step_name


@dataclass(frozen=True)
class Figure:
    """A figure of the report.

    Attributes
    ----------
    key : str
        Id of the figure in the HTML page.
    heading : str
    text : str
        Caption.
    alt : str
        Description for screen readers.
    json : markupsafe.Markup
        Plotly figure as JSON.
    width, height : int
        Size of the figure in pixels.
    """

    key: str
    heading: str
    text: str
    alt: str
    json: Markup
    width: int
    height: int


def figures(diagnosis: DiagnosisData, example: Pair) -> list[Figure]:
    """Figures of the report: maps and regions of one seed, and the bleeding of all seeds.

    Parameters
    ----------
    diagnosis : DiagnosisData
    example : Pair
        Plain and guided run of the seed whose maps and regions are shown.
    """
    plain, other, method = example.plain, example.guided, method_title(diagnosis.method)
    attributes = any(entity.attributes for entity in diagnosis.prompt.entities)
    trace = other.guidance
    made = [
        _figure(
            "attention", "Attention of each entity", plot.entity_maps(plain, other, title=""),
            "The image and, for each entity, the image in gray with the entity's attention over it in color "
            "(mean over all steps). An entity bleeds where its attention lies outside its own region, which the next "
            "figure shows.",
        ),
        _figure(
            "regions-plain", "Regions without guidance", plot.region_evolution(plain, title=""),
            "Regions of the entities at several steps, localized by comparing the entities' maps of this run, which "
            "are shown in gray. The measures use these regions.",
        ),
        _figure(
            "regions-guided", f"Regions with {method}", plot.region_evolution(other, title=""),
            f"Regions at several steps, localized in the same way in the maps of the run with {method}. They serve "
            "only to measure this run.",
        ),
    ]  # fmt: skip
    if example.was_guided and trace is not None and trace.regions is not None:
        made.append(
            _figure(
                "anchors", f"Regions found by {method}", plot.region_evolution(other, source="guidance", title=""),
                f"These are the regions of {method} itself; the measures do not use them. {describe_regions(trace)}",
            )
        )  # fmt: skip
    made += [
        _figure(
            "leakage", "Leakage", plot.leakage(plain, other, attributes=attributes, title=""),
            "Each row is the attention of one entity" + (" or one attribute" if attributes else "") + ", each column a "
            "region. A frame marks an entity's "
            + ("or attribute's " if attributes else "") + "own region; the values outside the frames are attention "
            "that leaks.",
        ),
        _figure(
            "steps", "Bleeding over the steps",
            plot.bleeding_over_steps([run for pair in diagnosis.pairs for run in (pair.plain, pair.guided)], title=""),
            "Mean over the entities at each step."
            + (" A thin line shows one seed, a thick line the mean of all seeds." if len(diagnosis.pairs) > 1 else ""),
        ),
        _figure(
            "tokens-plain", "Token maps without guidance", plot.token_maps(plain, title=""),
            _tokens("without guidance"),
        ),
        _figure(
            "tokens-guided", f"Token maps with {method}", plot.token_maps(other, title=""), _tokens(f"with {method}"),
        ),
    ]  # fmt: skip
    # Without any guided step both runs are identical and shown once.
    return [figure for figure in made if example.was_guided or not figure.key.endswith("-guided")]


def _tokens(run: str) -> str:
    return (
        f"Attention to each word of the prompt, {run}. Each row shows one step, not a mean over steps. The steps are "
        "spaced evenly from the first to the last."
    )


def describe_regions(trace: Trace) -> str:
    """Sentences that describe how a guidance method used regions in a run.

    Parameters
    ----------
    trace : Trace
        Trace of the run; its `regions` must not be None.
    """
    assert trace.regions is not None
    with_regions = {int(step) for step in trace.regions.step.values}
    guided = [step for step in trace.guided if step in with_regions]
    before = sum("contrast" in row and row["moved"] > 0 for row in trace.rows)
    first = f"the first {before} steps" if before > 1 else "the first step"
    began = f"In {first}, the entities' maps were moved apart, without regions. " if before else ""
    unused = sorted(with_regions - set(guided))
    if not guided:
        return (
            f"{began}At {step_name(unused[-1])}, the regions shown here were localized. The image was found to need no "
            f"{'further ' if before else ''}guidance, so these regions had no effect."
        )
    regions = trace.regions.sel(step=guided)
    steps, masks = [int(step) for step in regions.step.values], regions.values
    if trace.options.get("regions") is not None:
        source = "These regions were given by hand"
    elif np.array_equal(masks, np.broadcast_to(masks[:1], masks.shape)):
        used = "were used in one step" if len(steps) == 1 else f"are the same in all {len(steps)} steps that used them"
        source = f"These regions were determined once and {used}"
    else:
        same = next(i for i in range(len(steps)) if (masks[i:] == masks[i]).all())
        source = "These regions were localized again in each step that used them"
        if same < len(steps) - 1:
            source += f" before {step_name(steps[same])}, and did not change from then on"
    moved = sum(bool(row["moved"] > 0) for row in trace.rows if row["step"] in guided)
    if moved == 0:
        acted = "Attention was changed within the denoiser's calls; the latent was not moved."
    else:
        these = "this step" if moved == 1 else f"each of these {moved} steps"
        share = these if moved == len(guided) else f"{moved} of these {len(guided)} steps"
        acted = f"The latent was moved down the gradient of the loss in {share}."
    if not unused or trace.skipped:
        return f"{began}{source}. {acted}"
    ended = f"At {step_name(unused[-1])}, the image needed no more guidance; the regions shown there had no effect."
    return f"{began}{source}. {acted} {ended}"


def _figure(key: str, heading: str, figure: go.Figure, text: str) -> Figure:
    # transparent, so that the page's background shows; its script sets the text color
    figure.update_layout(paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)")
    plain = figure.to_json().replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    alt = f"Figure: {heading}. {text}".strip()
    return Figure(
        key=key,
        heading=heading,
        text=text,
        alt=alt,
        json=Markup(plain),
        width=int(figure.layout.width),
        height=int(figure.layout.height),
    )
