"""Errors of the widgets' traits."""

from __future__ import annotations

import traitlets as t

from elakit.errors import SettingError


class RefusedError(SettingError, t.TraitError):
    """Error for an invalid value of a widget's trait.

    As a `TraitError`, it makes traitlets restore the former values of all traits that were being set together.
    """
