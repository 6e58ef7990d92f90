"""Errors of the widgets' traits."""

from __future__ import annotations

import traitlets as t

from elakit.errors import SettingError


class RefusedError(SettingError, t.TraitError):
    """Error for an invalid value of a widget's trait.

    The error is also a `TraitError`. Therefore, if several traits are set together and one value is invalid, traitlets
    restores the former values of all these traits.
    """
