"""Recoloring of drawings: the body is found by hue and lightness in CIE Lab and painted; its shading is kept.

Details such as eyes, outlines, wheels and noses keep their colors, so that a purple clock can still be recognized as a
clock.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import ndimage
from skimage.color import lab2rgb, rgb2lab

from elakit.errors import SettingError
from elakit.world.art import Drawing


@dataclass(frozen=True)
class Paint:
    """A color in which drawings are painted, and how much of a drawing's shading the paint keeps.

    Attributes
    ----------
    lightness, a, b : float
        Coordinates of the color in CIE Lab (D65); `lightness` is from 0 to 100.
    shading : float
        Share of the shading that is kept. At 0, all painted pixels have the same lightness. At 1, they differ in
        lightness as much as before the painting.
    floor, ceiling : float
        Lowest and highest lightness of a painted pixel. With these limits, shadows on red still look red and highlights
        on black still look black.
    """

    lightness: float
    a: float
    b: float
    shading: float
    floor: float
    ceiling: float


PAINTS = {
    "red": Paint(lightness=47, a=68, b=46, shading=0.75, floor=18, ceiling=82),
    "orange": Paint(lightness=68, a=40, b=72, shading=0.65, floor=34, ceiling=90),
    "yellow": Paint(lightness=86, a=-3, b=80, shading=0.55, floor=52, ceiling=97),
    "green": Paint(lightness=54, a=-50, b=44, shading=0.75, floor=22, ceiling=88),
    "blue": Paint(lightness=46, a=14, b=-62, shading=0.80, floor=18, ceiling=86),
    "purple": Paint(lightness=40, a=48, b=-54, shading=0.80, floor=16, ceiling=84),
    "pink": Paint(lightness=75, a=42, b=-4, shading=0.65, floor=42, ceiling=94),
    "brown": Paint(lightness=37, a=19, b=30, shading=0.70, floor=14, ceiling=72),
    "gray": Paint(lightness=58, a=0, b=-1, shading=0.75, floor=26, ceiling=88),
    "black": Paint(lightness=17, a=0, b=-1, shading=0.55, floor=5, ceiling=46),
    "white": Paint(lightness=94, a=0, b=0, shading=0.55, floor=66, ceiling=100),
}


@dataclass(frozen=True)
class BodyRule:
    """Rule that separates the body of a drawing, which is recolored, from its details.

    Attributes
    ----------
    tolerance : float
        For the kind "hue": largest distance, in degrees, of a body pixel's hue from the main hue of the drawing.
    kind : {"auto", "hue", "neutral", "light", "dark", "frame"}
        Pixels that are the body. "hue": the pixels near the main hue. "neutral": the grays. "light": the light pixels.
        "dark": the dark pixels. "frame", for glasses: the darkest third, and pixels that are about as dark. "auto":
        the same as "neutral" if clearly more pixels are gray than colored, else the same as "hue".
    dark_too : bool
        For the kind "hue": True if dark pixels belong to the body as well, such as the iron feet of a bench.
    chroma : float
        For the kind "hue": chroma below which a pixel is a detail.
    lilac : bool
        For the kind "neutral": True if lilac counts as gray, because the artist shades grays with lilac.
    """

    tolerance: float = 50
    kind: Literal["auto", "hue", "neutral", "light", "dark", "frame"] = "auto"
    dark_too: bool = False
    chroma: float = 5
    lilac: bool = False


_NOUN_RULES = {
    **{noun: BodyRule(62) for noun in ("cat", "dog", "bear", "horse", "elephant", "monkey", "rabbit", "mouse")},
    "frog": BodyRule(85),
    "turtle": BodyRule(110),
    "lion": BodyRule(85),
    "glasses": BodyRule(kind="frame"),
    "crown": BodyRule(45),
    "bench": BodyRule(60, dark_too=True),
    "apple": BodyRule(55),
    "chair": BodyRule(55),
    "car": BodyRule(40),
    "bow": BodyRule(70),
    "clock": BodyRule(181, kind="hue"),
    "bowl": BodyRule(45),
    "suitcase": BodyRule(45),
}
# Fluent 3D shades within a hue more widely than flat art does.
_FLUENT_3D_TOLERANCE = {
    "balloon": 120, "apple": 60, "backpack": 75, "frog": 181, "lion": 130, "bear": 80, "bow": 110, "car": 60,
    "chair": 75, "horse": 80, "monkey": 75, "suitcase": 70, "crown": 60, "bird": 75, "cat": 75, "dog": 75,
}  # fmt: skip
_FILE_RULES: dict[str, dict] = {
    "noto/turtle.svg": {"tolerance": 80},
    "fluent-flat/luggage.svg": {"tolerance": 80},
    "fluent-flat/bowl-with-spoon.svg": {"tolerance": 95},
    "fluent-flat/mantelpiece-clock.svg": {"chroma": 2},
}


def rule_for(drawing: Drawing) -> BodyRule:
    """Rule for a drawing: the rule of its noun, with adjustments for its artist and its file."""
    rule = _NOUN_RULES.get(drawing.noun, BodyRule())
    if drawing.artist == "fluent-3d":
        rule = replace(rule, lilac=True, tolerance=_FLUENT_3D_TOLERANCE.get(drawing.noun, rule.tolerance))
    return replace(rule, **_FILE_RULES.get(drawing.file, {}))


def body_weight(rgba: np.ndarray, rule: BodyRule) -> np.ndarray:
    """Weight with which each pixel of a drawing belongs to the body, that is, to the part that is recolored.

    Parameters
    ----------
    rgba : ndarray, (h, w, 4)
        Straight (not premultiplied) RGBA in [0, 1].
    rule : BodyRule
        Rule that separates the body from the details.

    Returns
    -------
    ndarray, (h, w)
        1 for the body, 0 for details, and values in between at the borders between body and details.
    """
    lab = rgb2lab(rgba[..., :3])
    light, chroma = lab[..., 0], np.hypot(lab[..., 1], lab[..., 2])
    hue = np.degrees(np.arctan2(lab[..., 2], lab[..., 1]))
    solid = rgba[..., 3] > 0.5
    colored = solid & (chroma > 16) & (light > 14)
    neutral = solid & (chroma <= 16) & (light > 34)
    kind = rule.kind
    if kind == "auto":
        kind = "neutral" if neutral.sum() > 1.15 * colored.sum() else "hue"
    if kind == "hue":
        distance = _hue_distance(hue, _main_hue(hue[colored], chroma[colored]))
        weight = _ramp(distance, rule.tolerance, rule.tolerance - 16) * _ramp(chroma, rule.chroma, rule.chroma + 8)
        return np.maximum(weight, _ramp(light, 45, 38)) if rule.dark_too else weight
    if kind == "neutral":
        weight = _ramp(chroma, 26, 17)
        if rule.lilac:
            weight = np.maximum(weight, _ramp(_hue_distance(hue, -58), 52, 40) * _ramp(chroma, 75, 60))
        return weight * _ramp(light, 26, 36)
    if kind == "light":
        return _ramp(light, 70, 80)
    if kind == "frame":
        darkest = np.percentile(light[solid], 35)
        return _ramp(light, darkest + 22, darkest + 12)
    return _ramp(light, 62, 52) * _ramp(chroma, 30, 20)


def recolor(rgba: np.ndarray, color: str, rule: BodyRule) -> np.ndarray:
    """Copy of a drawing with its body, the part that `rule` selects, in another color.

    Parameters
    ----------
    rgba : ndarray, (h, w, 4)
        Straight (not premultiplied) RGBA in [0, 1].
    color : str
        Name of the new color, a key of ``PAINTS``.
    rule : BodyRule
        Rule that separates the body from the details.

    Returns
    -------
    ndarray, float32, (h, w, 4)
        Straight RGBA in [0, 1].

    Raises
    ------
    SettingError
        The color is unknown.

    Examples
    --------
    >>> blob = np.ones((4, 4, 4), np.float32) * [1, 0, 0, 1]
    >>> green = recolor(blob, "green", BodyRule())[0, 0, :3]
    >>> bool(green.argmax() == 1)
    True
    """
    if color not in PAINTS:
        raise SettingError(f"Unknown color {color!r}. Choose from {', '.join(PAINTS)}.")
    paint, lab, weight = PAINTS[color], rgb2lab(rgba[..., :3]), body_weight(rgba, rule)
    light, solid = lab[..., 0], rgba[..., 3] > 0.5
    body = solid & (weight > 0.5)
    median = float(np.median(light[body])) if body.any() else 60.0
    gain = paint.shading * (0.6 if rule.kind in ("dark", "frame") else 1)
    shaded = np.clip(paint.lightness + gain * (light - median), paint.floor, paint.ceiling)
    chroma = fade(shaded, paint)
    painted = np.stack([shaded, paint.a * chroma, paint.b * chroma], -1)
    details = lab.copy()
    if color == "black":
        details = _light_details(details, weight, solid)
    if rule.kind == "frame":
        details[..., 0] = 46 + 0.3 * light if color == "white" else 62 + 0.35 * light
        details[..., 1:] *= 0.25
        if color not in ("white", "black"):
            details = 0.68 * details + 0.32 * np.array([paint.lightness, paint.a, paint.b])
    mixed = details * (1 - weight[..., None]) + painted * weight[..., None]
    return np.dstack([lab2rgb(mixed).clip(0, 1), rgba[..., 3]]).astype(np.float32)


def fade(light: np.ndarray, paint: Paint) -> np.ndarray:
    """Share of a paint's chroma that is kept at each lightness.

    Highlights and shadows are paler than the paint itself, so that they do not look fluorescent.

    Parameters
    ----------
    light : ndarray
        CIE lightness, 0 to 100.
    paint : Paint
        The color that is made paler.

    Returns
    -------
    ndarray
        Factor for the coordinates a and b of the paint, from 0 to 1, in the shape of `light`.
    """
    above = (light - paint.lightness) / max(1.0, 100 - paint.lightness)
    below = 0.45 + 0.55 * np.clip(light / paint.lightness, 0, 1)
    return np.where(light > paint.lightness, 1 - 0.55 * above, below)


def _light_details(lab: np.ndarray, weight: np.ndarray, solid: np.ndarray) -> np.ndarray:
    """Copy of a drawing, in CIE Lab, with lighter eyes and mouths, which would otherwise vanish on a black body.

    All small dark details are made lighter. Large dark details, such as a mane, stay dark. `weight` is the result of
    `body_weight`, and `solid` is True at the drawing's opaque pixels.
    """
    light = lab[..., 0]
    dark = _ramp(light, 42, 30) * (1 - weight)
    parts, count = ndimage.label((dark > 0.3) & solid)
    if count:
        areas = ndimage.sum_labels(np.ones_like(parts), parts, np.arange(1, count + 1))
        large = np.concatenate([[False], areas > 0.03 * solid.sum()])
        dark = dark * ~ndimage.binary_dilation(large[parts], iterations=2)
    lab = lab.copy()
    lab[..., 0] = light * (1 - dark) + dark * (88 - 0.6 * light)
    lab[..., 1:] *= (1 - dark)[..., None]
    return lab


def _main_hue(hue: np.ndarray, chroma: np.ndarray) -> float:
    """Most frequent hue of a drawing, in degrees from -180 to 180.

    The hue is the maximum of a smoothed circular histogram in which each pixel is weighted by its chroma.
    """
    counts, edges = np.histogram(hue, 72, (-180, 180), weights=np.minimum(chroma, 60))
    smooth = ndimage.convolve1d(counts, [1, 2, 3, 2, 1], mode="wrap")
    return float(edges[smooth.argmax()] + 2.5)


def _hue_distance(hue: np.ndarray, other: float) -> np.ndarray:
    return np.abs((hue - other + 180) % 360 - 180)


def _ramp(x: np.ndarray, zero: float, one: float) -> np.ndarray:
    """Smooth step function: 0 for x below `zero`, 1 for x above `one`, and a smooth transition in between.

    If `zero` is larger than `one`, the function is 1 for x below `one` and 0 for x above `zero`.
    """
    t = ((x - zero) / (one - zero)).clip(0, 1)
    return t * t * (3 - 2 * t)
