"""Regions given by hand: they are required, and there is one for each entity of the prompt."""

from __future__ import annotations

from typing import Any

import pytest
from column_maps import HALVES, PAIR
from tiny import tiny_pipeline

from elakit.errors import SettingError
from elakit.generation import generate
from elakit.guidance import BoxDiff, LayoutGuidance


@pytest.mark.parametrize("kind", [LayoutGuidance, BoxDiff])
def test_a_layout_has_to_be_given_and_to_fit_the_prompt(kind: Any) -> None:
    with pytest.raises(TypeError, match="regions"):
        kind()
    with pytest.raises(SettingError, match="1 region, but the prompt has 2 entities"):
        generate(tiny_pipeline(), PAIR, steps=2, guidance=kind(HALVES[:1], guided=1), record=False, progress=False)
