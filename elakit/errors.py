"""Errors for users: each message names the wrong value, the allowed values, and the next step."""

from __future__ import annotations


class ElakitError(Exception):
    """Base class of elakit's errors; the command line prints the message without a traceback."""


class PromptError(ElakitError, ValueError):
    """Raised when a prompt cannot be parsed, lacks a requested word, or has words unknown to the built-in judge."""


class ModelError(ElakitError, ValueError):
    """Raised when a model is unknown, cannot be loaded, or does not attend to text in a way that elakit supports."""


class RecordingError(ElakitError, ValueError):
    """Raised when a recording cannot be made or opened, or does not contain what is requested."""


class SettingError(ElakitError, ValueError):
    """Raised when a setting or an argument has a value that is not allowed."""


class OutputError(ElakitError, OSError):
    """Raised when a file or folder cannot be written or read, or its content is not as expected."""


def clause(error: object) -> str:
    """Message of an error without its final period, so that it can be a part of a sentence.

    Parameters
    ----------
    error : Exception or str
        A KeyError is described in words, because its message is only the key.

    Examples
    --------
    >>> clause(KeyError("seed"))
    "the key 'seed' is missing"
    >>> f"The image cannot be read: {clause(OSError('It is truncated.'))}. Delete it."
    'The image cannot be read: It is truncated. Delete it.'
    """
    if isinstance(error, KeyError) and len(error.args) == 1:  # Python's own message is only the key
        return f"the key {error.args[0]!r} is missing"
    return str(error).rstrip().removesuffix(".")
