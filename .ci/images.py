"""Generate images of picture-world with the packages at hand, or compare those of two environments.

``python .ci/images.py OUT.npz`` generates; ``python .ci/images.py ONE.npz OTHER.npz`` fails if a value differs by more
than 1 of 255.
"""

import sys
from pathlib import Path

import numpy as np

PROMPTS = ("a [green apple] and a [red car]", "a [bear] and a [blue clock]")


def generate(path: Path) -> None:
    """Write one plain and one guided image per prompt."""
    import elakit

    pipe = elakit.load("picture-world", device="cpu")
    images = {
        f"{text} {'plain' if method is None else method.name}": np.asarray(
            elakit.generate(pipe, text, seed=1, guidance=method, progress=False).image
        )
        for text in PROMPTS
        for method in (None, elakit.ELA())
    }
    np.savez(path, **images)


def compare(one: Path, other: Path) -> int:
    """Print the largest difference per image, and return the largest."""
    first, second = np.load(one), np.load(other)
    largest = 0
    for name in first.files:
        difference = np.abs(first[name].astype(int) - second[name])
        changed = f"{(difference > 0).sum()} of {difference.size} values differ, by up to {difference.max()} of 255"
        print(f"{name}: {changed if difference.any() else 'the same'}")
        largest = max(largest, int(difference.max()))
    return largest


if __name__ == "__main__":
    paths = [Path(name) for name in sys.argv[1:]]
    if len(paths) == 1:
        generate(*paths)
    else:
        sys.exit(compare(*paths) > 1)
