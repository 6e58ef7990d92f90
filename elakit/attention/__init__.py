"""Attention of a run: reading it (taps), choosing what to keep (spec), recording it, and the recording itself."""

from __future__ import annotations

from elakit.attention.recorder import paused, record
from elakit.attention.recording import Recording, open_recording, resize
from elakit.attention.spec import Plan, RecordSpec, select_layers
from elakit.attention.taps import probabilities, tap

__all__ = [
    "Plan",
    "RecordSpec",
    "Recording",
    "open_recording",
    "paused",
    "probabilities",
    "record",
    "resize",
    "select_layers",
    "tap",
]
