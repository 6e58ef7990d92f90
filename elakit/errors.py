"""Errors a user can act on: each message names the wrong value, what is allowed, and the next step."""

from __future__ import annotations


class ElakitError(Exception):
    """Anything elakit refuses; the command line prints its message without a traceback."""


class PromptError(ElakitError, ValueError):
    """A prompt that cannot be read: empty, too long, without an entity, brackets left open."""


class ModelError(ElakitError, ValueError):
    """A model that is unknown, cannot be loaded, or is of an unsupported family."""


class RecordingError(ElakitError, ValueError):
    """A recording that cannot be made, opened or selected from as asked."""


class SettingError(ElakitError, ValueError):
    """A setting outside its range."""


class OutputError(ElakitError, OSError):
    """A path that cannot be written or read."""
