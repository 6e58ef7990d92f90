"""Errors of the widgets' traits."""

from __future__ import annotations

import traitlets as t

from elakit.errors import SettingError


class RefusedError(SettingError, t.TraitError):
    """Error for an invalid value of a widget's trait; traitlets restores the values that were set together with it."""
