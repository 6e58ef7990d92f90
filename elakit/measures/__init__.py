"""Measures on attention maps and masks, as plain numpy functions.

`arrays` checks and resamples arrays, `masks` binarizes and boxes them, `overlap` compares two maps or masks, `leakage`
compares maps with regions, and `agreement` compares maps with the finished image.
"""
