"""A run and the signs in its attention: of the decoder, and, when asked for, of single layers and heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from statistics import mean, median
from typing import Any, NamedTuple

from elakit.causes.evidence import Maps, read
from elakit.causes.findings import CAUSE_KINDS, CauseKind
from elakit.causes.signs import LEAST, Key, Sign, of_maps, strongest
from elakit.causes.text import word_label
from elakit.measures.masks import coverage
from elakit.run import Run

# Layers and heads that are named at most.
MOST = 3


class Reading:
    """A run with the signs in its attention.

    Parameters
    ----------
    run : Run
        Recorded.

    Raises
    ------
    RecordingError
        The run was not recorded.
    """

    def __init__(self, run: Run) -> None:
        run.entity_maps()  # refuses a run that was not recorded
        assert run.recording is not None
        self.run = run
        self.recording = run.recording
        entities = run.prompt.entities
        self._entities = [entity.label for entity in entities]
        self._attributes = [
            word_label(run.prompt, word)
            for entity in entities
            for word in dict.fromkeys(t.word for t in run.prompt.tokens if t.index in entity.attribute_indices)
        ]
        self._parts: dict[tuple[str, int | None, CauseKind], dict[Key, Sign]] = {}

    @cached_property
    def signs(self) -> dict[Key, Sign]:
        """The strongest sign for each cause in the decoder."""
        return self._signs(read(self.recording, self.recording.decoder))

    def part(self, layer: str, head: int | None, kind: CauseKind) -> dict[Key, Sign]:
        """The strongest signs for causes of a kind in one layer, the mean of its heads or one of them."""
        if (layer, head, kind) not in self._parts:
            recording = self.recording if head is None else self.recording.sel(layer=layer, head=head)
            self._parts[layer, head, kind] = self._signs(read(recording, layer), (kind,))
        return self._parts[layer, head, kind]

    def heads(self, layer: str) -> list[int]:
        """Numbers of the heads of a layer that were kept apart."""
        return list(self.recording.heads(layer))

    def _signs(self, maps: Maps, kinds: Sequence[CauseKind] = CAUSE_KINDS) -> dict[Key, Sign]:
        covered = None
        if self.run.verdict is not None:
            covered = coverage(self.run.verdict.masks, maps.entities.shape[-2:])
        return strongest(of_maps(maps, self._entities, self._attributes, covered, kinds))


class Place(NamedTuple):
    """Where and when something starts to show.

    Attributes
    ----------
    step : int or None
        Denoiser call from which on it shows, the median over runs.
    layers : tuple of str
        Where it shows first, the clearest first.
    heads : tuple of (str, int)
        Layer and number of the heads in which it shows first; empty where heads were not kept apart.
    """

    step: int | None = None
    layers: tuple[str, ...] = ()
    heads: tuple[tuple[str, int], ...] = ()


def place(readings: Sequence[Reading], key: Key) -> Place:
    """Where and when signs for a cause start to show.

    Parameters
    ----------
    readings : sequence of Reading
        Of the runs that show it.
    key : Key
    """
    since = [
        step
        for reading in readings
        if key in reading.signs and (step := _since(reading, reading.signs[key])) is not None
    ]
    layers: dict[str, list[tuple[float, float]]] = {}
    heads: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for reading in readings:
        for layer in reading.recording.layers:
            layers.setdefault(layer, []).append(_speaks(reading.part(layer, None, key[0]).get(key)))
            for head in reading.heads(layer):
                heads.setdefault((layer, head), []).append(_speaks(reading.part(layer, head, key[0]).get(key)))
    return Place(round(median(since)) if since else None, _clearest(layers), _clearest(heads))


def _since(reading: Reading, sign: Sign) -> int | None:
    """Denoiser call from which on a sign speaks."""
    position = sign.since()
    return None if position is None else reading.recording.steps[position]


def _speaks(sign: Sign | None) -> tuple[float, float]:
    """Position of the step from which on a sign speaks (past all where it never does), and its strength."""
    position = None if sign is None else sign.since()
    return float("inf") if position is None else float(position), 0.0 if sign is None else sign.strength


def _clearest(found: Mapping[Any, Sequence[tuple[float, float]]]) -> tuple[Any, ...]:
    """Keys where it shows: the earliest first, of these the strongest."""
    ranks = {key: (median(since for since, _ in each), -mean(s for _, s in each)) for key, each in found.items()}
    return tuple(sorted((key for key, (_, minus) in ranks.items() if minus <= -LEAST), key=ranks.__getitem__)[:MOST])
