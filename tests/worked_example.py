"""Maps and regions whose leakage was worked out by hand, for measures and for the table of a run."""

from __future__ import annotations

import numpy as np

# Two 2x4 maps and their regions. Cat: total 20, of which 16 in its own region, 3 in the frog's, 1 in the background.
# Frog: total 10, of which 6 in its own region, 1 in the cat's, 3 in the background.
CAT = np.array([[8.0, 4.0, 2.0, 0.0], [4.0, 0.0, 1.0, 1.0]])
FROG = np.array([[0.0, 1.0, 4.0, 1.0], [0.0, 2.0, 2.0, 0.0]])
CAT_REGION = np.array([[1, 1, 0, 0], [1, 0, 0, 0]], bool)
FROG_REGION = np.array([[0, 0, 1, 0], [0, 0, 1, 0]], bool)
MATRIX = [[0.8, 0.15, 0.05], [0.1, 0.6, 0.3]]
