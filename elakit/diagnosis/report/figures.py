"""The figures of a diagnosis, as they go into the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from markupsafe import Markup

from elakit import plot
from elakit.diagnosis.sentences import guided
from elakit.guidance import method_title

if TYPE_CHECKING:
    from elakit.diagnosis import Diagnosis, Pair


@dataclass(frozen=True)
class Figure:
    """A figure of the page: where it goes, what it is called, what a screen reader says of it."""

    key: str
    heading: str
    text: str
    alt: str
    json: Markup
    width: int
    height: int


def figures(diagnosis: Diagnosis, example: Pair) -> list[Figure]:
    """The figures of the seed that is shown closely, and of the measures over all seeds.

    Parameters
    ----------
    diagnosis : Diagnosis
    example : Pair
    """
    plain, other, method = example.plain, example.guided, method_title(diagnosis.method)
    attributes = any(entity.attributes for entity in diagnosis.prompt.entities)
    traced = other.guidance is not None and other.guidance.regions is not None
    made = [
        _figure(
            "attention", "Where each entity's attention lies", plot.entity_maps(plain, other, title=""),
            "The image, and over it in gray where the attention of each entity lies. Maps that cover the same place "
            "are the mark of bleeding.",
        ),
        _figure(
            "regions-plain", "Regions, plain", plot.region_evolution(plain, title=""),
            "The place each entity holds from step to step, found by setting the entities' maps against each other. "
            "In gray: the maps.",
        ),
        _figure("regions-guided", f"Regions, {method}", plot.region_evolution(other, title=""), ""),
    ]  # fmt: skip
    if traced:
        made.append(
            _figure(
                "anchors", f"Regions {method} anchored the entities to",
                plot.region_evolution(other, source="guidance", title=""),
                "Found anew at each guided step, before the latent is moved.",
            )
        )  # fmt: skip
    made += [
        _figure(
            "leakage", "How much of it leaks",
            plot.leakage(plain, other, attributes=attributes, title=""),
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
        _figure("tokens-guided", f"Token maps, {method}", plot.token_maps(other, title=""), ""),
    ]  # fmt: skip
    # Where nothing was guided, both runs are the same: shown once.
    return [figure for figure in made if guided(example) or not figure.key.endswith("-guided")]


def _figure(key: str, heading: str, figure: go.Figure, text: str) -> Figure:
    # The page's colors shine through; its script gives the text the page's ink.
    figure.update_layout(paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)")
    plain = figure.to_json().replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    alt = f"Figure: {heading}. {text}".strip()
    return Figure(key, heading, text, alt, Markup(plain), int(figure.layout.width), int(figure.layout.height))
