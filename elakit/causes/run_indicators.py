"""Indicators of causes in the attention of a run, for the whole decoder and for single layers and heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import isfinite
from statistics import mean, median
from typing import Any, NamedTuple

from elakit.causes.evidence import Maps, read
from elakit.causes.findings import CAUSE_KINDS, CauseKind
from elakit.causes.indicators import LEAST, Indicator, Key, of_maps, strongest
from elakit.measures.masks import coverage
from elakit.run import Run

# Largest number of layers and of heads that are named.
MOST = 3


class RunIndicators:
    """Indicators of causes of failures, computed from the attention of one run.

    The indicators are computed when they are first read.

    Parameters
    ----------
    run : Run
        A recorded run.

    Raises
    ------
    RecordingError
        The constructor raises this error if the run was not recorded, or was recorded without the tokens of its
        entities. Reading indicators raises this error if the tokens of attributes were not recorded.
    """

    def __init__(self, run: Run) -> None:
        run.entity_maps()  # refuses a run that was not recorded
        assert run.recording is not None
        self.run = run
        self.recording = run.recording
        entities = run.prompt.entities
        self._entities = [entity.label for entity in entities]
        self._attributes = [
            run.prompt.word_labels[word]
            for entity in entities
            for word in dict.fromkeys(t.word for t in run.prompt.tokens if t.index in entity.attribute_indices)
        ]
        self._parts: dict[tuple[str, int | None, CauseKind], dict[Key, Indicator]] = {}

    @cached_property
    def indicators(self) -> dict[Key, Indicator]:
        """The strongest indicator of each cause; the keys are `Indicator.key`.

        The indicators are computed from the attention in the decoder, or in all layers of a transformer.
        """
        return self._indicators(read(self.recording, self.recording.decoder))

    def part(self, layer: str, head: int | None, kind: CauseKind) -> dict[Key, Indicator]:
        """The strongest indicator of each cause, computed from the attention of one layer or of one head.

        Parameters
        ----------
        layer : str
            Name of the layer.
        head : int or None
            Index of the head; None for the mean over the heads.
        kind : str
            Kind of cause that is needed. The kinds "region split", "regions swap" and "attribute misplaced" are slow
            to compute, and each of these three is included only if it equals `kind`. All other kinds are always
            included.

        Returns
        -------
        dict of Key to Indicator
            Strongest indicator of each cause; the keys are `Indicator.key`.
        """
        if (layer, head, kind) not in self._parts:
            recording = self.recording if head is None else self.recording.sel(layer=layer, head=head)
            self._parts[layer, head, kind] = self._indicators(read(recording, layer), (kind,))
        return self._parts[layer, head, kind]

    def heads(self, layer: str) -> list[int]:
        """Indices of the heads of a layer that were recorded separately; empty if heads were averaged."""
        return list(self.recording.heads(layer))

    def _indicators(self, maps: Maps, kinds: Sequence[CauseKind] = CAUSE_KINDS) -> dict[Key, Indicator]:
        covered = None
        if self.run.verdict is not None:
            covered = coverage(self.run.verdict.masks, maps.entities.shape[-2:])
        return strongest(of_maps(maps, self._entities, self._attributes, covered, kinds))


class Onset(NamedTuple):
    """Step, layers and heads in which an indicator is first visible.

    `Indicator.since` defines from which step an indicator is visible.

    Attributes
    ----------
    step : int or None
        Denoiser call from which the indicator is visible, counted from 0: the median over the runs. None if the
        indicator is never visible.
    layers : tuple of str
        Up to three layers in which the indicator is visible earliest, the earliest first.
    heads : tuple of (str, int)
        Up to three heads (layer, head index) in which the indicator is visible earliest; empty if heads were averaged.
    """

    step: int | None = None
    layers: tuple[str, ...] = ()
    heads: tuple[tuple[str, int], ...] = ()


def onset(readings: Sequence[RunIndicators], key: Key) -> Onset:
    """Step, layers and heads in which a cause is first visible, summarized over several runs.

    Parameters
    ----------
    readings : sequence of RunIndicators
        Indicators of the runs that show the cause.
    key : Key
        Tuple that identifies the cause: its kind, and the labels of the affected entity, of the other entity and of
        the token.

    Returns
    -------
    Onset
        The step is the median, over the runs, of the denoiser call from which the cause is visible
        (`Indicator.since`). Runs in which the cause is never visible are left out. If no run is left, the step is None.
        The layers and heads are those in which the cause is visible earliest, by the median over the runs.
    """
    since = [
        step
        for reading in readings
        if key in reading.indicators and (step := _since(reading, reading.indicators[key])) is not None
    ]
    layers: dict[str, list[tuple[float, float]]] = {}
    heads: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for reading in readings:
        for layer in reading.recording.layers:
            layers.setdefault(layer, []).append(_visible(reading.part(layer, None, key[0]).get(key)))
            for head in reading.heads(layer):
                heads.setdefault((layer, head), []).append(_visible(reading.part(layer, head, key[0]).get(key)))
    return Onset(round(median(since)) if since else None, _clearest(layers), _clearest(heads))


def _since(reading: RunIndicators, indicator: Indicator) -> int | None:
    """Denoiser call from which an indicator is visible, counted from 0; None if the indicator is never visible."""
    position = indicator.since()
    return None if position is None else reading.recording.steps[position]


def _visible(indicator: Indicator | None) -> tuple[float, float]:
    """Position of the step from which an indicator is visible, and the strength of the indicator.

    The position is infinite if the indicator is never visible. If `indicator` is None, the position is infinite and
    the strength is 0.
    """
    position = None if indicator is None else indicator.since()
    return float("inf") if position is None else float(position), 0.0 if indicator is None else indicator.strength


def _clearest(found: Mapping[Any, Sequence[tuple[float, float]]]) -> tuple[Any, ...]:
    """Up to `MOST` layers or heads in which an indicator is visible earliest, the earliest first.

    A layer or head is left out if the mean strength over the runs is less than `LEAST`. It is also left out if at least
    half of the runs never show the indicator. The remaining layers or heads are ordered by the median position of the
    first visible step. If the medians are equal, the larger mean strength comes first.

    Parameters
    ----------
    found : mapping
        For each layer or head, a sequence with one result of `_visible` per run: position and strength.
    """
    ranks = {key: (median(since for since, _ in each), -mean(s for _, s in each)) for key, each in found.items()}
    seen = (key for key, (since, minus) in ranks.items() if isfinite(since) and minus <= -LEAST)
    return tuple(sorted(seen, key=ranks.__getitem__)[:MOST])
