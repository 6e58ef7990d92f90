"""Words of picture-world: the nouns and colors of the Attend-and-Excite benchmark, and each noun's natural color.

Source of the word lists: Chefer et al., "Attend-and-Excite", 2023, the prompt set of its evaluation.
"""

from __future__ import annotations

ANIMALS = (
    "cat", "dog", "bird", "bear", "lion", "horse", "elephant", "monkey", "frog", "turtle", "rabbit", "mouse",
)  # fmt: skip
OBJECTS = (
    "backpack", "glasses", "crown", "suitcase", "chair", "balloon", "bow", "car", "bowl", "bench", "clock", "apple",
)  # fmt: skip
NOUNS = ANIMALS + OBJECTS
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "gray", "black", "white")

# The color a thing has in life: shown more often than others, so that an unusual color is hard, as in photographs.
NATURAL_COLOR = {
    "cat": "orange", "dog": "brown", "bird": "blue", "bear": "brown", "lion": "orange", "horse": "brown",
    "elephant": "gray", "monkey": "brown", "frog": "green", "turtle": "green", "rabbit": "white", "mouse": "gray",
    "backpack": "red", "glasses": "black", "crown": "yellow", "suitcase": "brown", "chair": "brown",
    "balloon": "red", "bow": "pink", "car": "red", "bowl": "blue", "bench": "brown", "clock": "red", "apple": "red",
}  # fmt: skip

# The names of the colors that cover a sixth or more of the embedded model's drawings "as drawn": a thing that
# has another color without being asked to took it from somewhere else. `tests/world/test_world.py` measures them again.
USUAL_COLORS = {
    "cat": ("yellow", "orange"), "dog": ("brown", "white"), "bird": ("blue",), "bear": ("brown",),
    "lion": ("yellow", "brown", "orange"), "horse": ("orange", "brown"), "elephant": ("white", "gray"),
    "monkey": ("yellow", "brown"), "frog": ("yellow", "green"), "turtle": ("yellow", "green"),
    "rabbit": ("gray", "white"), "mouse": ("gray", "white", "pink"), "backpack": ("red",), "glasses": ("blue", "brown"),
    "crown": ("orange", "yellow"), "suitcase": ("blue", "brown"), "chair": ("brown", "orange"), "balloon": ("red",),
    "bow": ("pink",), "car": ("gray", "red", "blue", "black"), "bowl": ("blue", "red", "brown"),
    "bench": ("brown", "gray"), "clock": ("white", "red", "brown"), "apple": ("red",),
}  # fmt: skip


def article(word: str) -> str:
    """Indefinite article of a word, by its first letter.

    Examples
    --------
    >>> article("orange"), article("red")
    ('an', 'a')
    """
    return "an" if word[0] in "aeiou" else "a"
