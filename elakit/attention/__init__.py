"""Attention of a run: reading it (taps), selecting what to keep (spec), recording it, changing it (edit)."""

from __future__ import annotations

from elakit.attention.aggregate import resize
from elakit.attention.edit import Edit, biased, edit
from elakit.attention.recorder import paused, record
from elakit.attention.recording import Recording, open_recording
from elakit.attention.spec import Plan, RecordSpec, SelfAttention, select_layers
from elakit.attention.taps import probabilities, tap

__all__ = [
    "Edit",
    "Plan",
    "RecordSpec",
    "Recording",
    "SelfAttention",
    "biased",
    "edit",
    "open_recording",
    "paused",
    "probabilities",
    "record",
    "resize",
    "select_layers",
    "tap",
]
