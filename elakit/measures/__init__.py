"""Measures on arrays: overlap, agreement and masks, in pure numpy."""
