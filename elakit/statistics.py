"""Statistics of shares of images: Wilson and bootstrap intervals, McNemar's test, and Holm's correction of p values."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from elakit import checks
from elakit.errors import SettingError
from elakit.numbering import number_of


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a share, such as the share of images that are right.

    Parameters
    ----------
    successes, n : int
        Number of successes and number of trials.
    level : float
        Confidence level, between 0 and 1.

    Returns
    -------
    (float, float)
        Lower and upper end of the interval; (0, 1) if `n` is 0.

    Raises
    ------
    SettingError
        `n` is not a whole number of at least 0, `successes` is not a whole number from 0 to `n`, or `level` is not
        between 0 and 1.

    References
    ----------
    Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22, 1927.

    Examples
    --------
    If 3 of 4 images are right, the share is 0.75. Its interval is wide, because there are only 4 images:

    >>> [round(bound, 3) for bound in wilson(3, 4)]
    [0.301, 0.954]
    >>> wilson(0, 0)
    (0.0, 1.0)
    """
    n = checks.whole_number(n, "n", 0)
    successes = checks.whole_number(successes, "successes", 0, n)
    level = _level(level)
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    observed, square = successes / n, z**2 / n
    center, half = observed + square / 2, z * (observed * (1 - observed) / n + square / (4 * n)) ** 0.5
    # rounding must not move an end past 0 or 1, where the interval ends exactly
    low = 0.0 if successes == 0 else max((center - half) / (1 + square), 0.0)
    high = 1.0 if successes == n else min((center + half) / (1 + square), 1.0)
    return low, high


class Interval(NamedTuple):
    """Value of a statistic with its confidence interval, as returned by `bootstrap`.

    Attributes
    ----------
    value, low, high : float or ndarray, (columns,)
        Value of the statistic, and lower and upper end of its interval. They are floats for one-dimensional data, and
        arrays with one entry per column for two-dimensional data.
    """

    value: Any
    low: Any
    high: Any


def bootstrap(
    numerators: Any,
    denominators: Any = None,
    groups: Sequence[Any] | np.ndarray | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a mean, or of a ratio of two sums. Whole groups of rows are resampled.

    A row is typically an image, and a group contains all images of one prompt. Images of one prompt are more alike than
    images of different prompts. If single images were resampled, the interval would be too narrow.

    Parameters
    ----------
    numerators : array_like, (n,) or (n, columns)
        Values, one row per image.
    denominators : array_like, optional
        Values of the same shape as `numerators`. The statistic is the sum of the numerators divided by the sum of the
        denominators. By default every denominator is 1, so the statistic is the mean of the numerators.
    groups : sequence, optional
        Label of each row's group, such as the prompt of the image. By default each row is a group of its own.
    level : float
        Confidence level, between 0 and 1.
    resamples : int
        Number of bootstrap resamples.
    seed : int
        Seed of the random numbers.

    Returns
    -------
    Interval
        Value of the statistic with the ends of its interval. They are floats for one-dimensional input, otherwise
        arrays with one entry per column. They are NaN if the sum of the denominators is not positive.

    Raises
    ------
    SettingError
        Shapes differ, there are no rows, or a setting is out of range.

    References
    ----------
    Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.

    Examples
    --------
    The mean is 1 in the group "cat" and 0.5 in the group "dog". A resample has two groups, so its mean is between 0.5
    (twice "dog") and 1 (twice "cat"):

    >>> value, low, high = bootstrap([1, 1, 1, 0], groups=["cat", "cat", "dog", "dog"])
    >>> value, low, high
    (0.75, 0.5, 1.0)
    """
    parts = np.asarray(numerators, dtype=float)
    wholes = np.ones_like(parts) if denominators is None else np.asarray(denominators, dtype=float)
    if parts.shape != wholes.shape or parts.ndim not in (1, 2) or not len(parts):
        raise SettingError(
            f"numerators have the shape {parts.shape}, and denominators have the shape {wholes.shape}. Give arrays of "
            "the same shape, (n,) or (n, columns), with at least one row."
        )
    level = _level(level)
    resamples = checks.whole_number(resamples, "resamples", 1)
    flat = parts.ndim == 1
    parts, wholes = (array.reshape(len(array), -1) for array in (parts, wholes))
    if groups is not None:
        labels = np.asarray(groups)
        if labels.shape != (len(parts),):
            raise SettingError(
                f"groups have the shape {labels.shape}, but numerators have {number_of(len(parts), 'row')}. Give one "
                f"group per row, in an array of shape ({len(parts)},)."
            )
        position = np.unique(labels, return_inverse=True)[1].reshape(-1)
        parts, wholes = (_sum_by(array, position) for array in (parts, wholes))
    count = len(parts)
    # how often each group is in each resample
    weights = np.random.default_rng(checks.seed(seed)).multinomial(count, np.full(count, 1 / count), size=resamples)
    ends = np.full((3, parts.shape[1]), np.nan)
    for column, (part, whole) in enumerate(zip(parts.T, wholes.T, strict=True)):
        if not whole.sum() > 0:
            continue
        sums = weights @ whole
        ratios = (weights @ part)[sums > 0] / sums[sums > 0]
        tails = [50 * (1 - level), 50 * (1 + level)]
        ends[:, column] = part.sum() / whole.sum(), *np.percentile(ratios, tails)
    if flat:
        return Interval(*(float(end) for end in ends[:, 0]))
    return Interval(*ends)


def mcnemar(fixed: int, broken: int) -> float:
    """Exact two-sided McNemar test of a method. A pair is two images from the same noise, without and with the method.

    Parameters
    ----------
    fixed : int
        Number of pairs in which only the image with the method is right.
    broken : int
        Number of pairs in which only the image without the method is right.

    Returns
    -------
    float
        The p value: the probability that the two counts differ at least this much by chance, if a pair is as likely to
        be fixed as to be broken. The p value is 1 if both counts are 0.

    Raises
    ------
    SettingError
        A count is not a whole number of at least 0.

    References
    ----------
    McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 12, 1947; the exact form is the sign test.

    Examples
    --------
    The probability that five pairs are all fixed, or all broken, by chance is 2 * 0.5**5:

    >>> mcnemar(fixed=5, broken=0)
    0.0625
    >>> mcnemar(fixed=0, broken=0)
    1.0
    """
    fixed, broken = checks.whole_number(fixed, "fixed", 0), checks.whole_number(broken, "broken", 0)
    if fixed + broken == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(fixed, fixed + broken, 0.5).pvalue)


def holm(p_values: Any) -> np.ndarray:
    """Correct p values for the number of tests with Holm's step-down procedure.

    Parameters
    ----------
    p_values : array_like, (n,)
        Uncorrected p values. NaN marks a test that was not made; this test is not counted.

    Returns
    -------
    numpy.ndarray, (n,)
        Corrected p values, NaN where the input is NaN.

    Raises
    ------
    SettingError
        A p value is not from 0 to 1.

    References
    ----------
    Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979.

    Examples
    --------
    From the smallest to the largest, the three p values are multiplied by 3, 2 and 1: 0.03, 0.06 and 0.04. A corrected
    value must not be smaller than the previous value, so 0.04 is raised to 0.06:

    >>> holm([float("nan"), 0.01, 0.04, 0.03]).tolist()
    [nan, 0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=float).reshape(-1)
    made = np.flatnonzero(~np.isnan(p))
    if ((p[made] < 0) | (p[made] > 1)).any():
        raise SettingError(
            f"p_values contain {p[(p < 0) | (p > 1)][0]:g}. Give numbers from 0 to 1, or NaN for tests that were not "
            "performed."
        )
    order = made[np.argsort(p[made], kind="stable")]
    corrected = np.full(len(p), np.nan)
    corrected[order] = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)).clip(max=1)
    return corrected


def _level(level: Any) -> float:
    rule = "Give one above 0 and below 1, such as 0.95."
    level = checks.real_number(level, "level", hint=rule)
    if not 0 < level < 1:
        checks.refuse(level, "level", "a number above 0 and below 1, such as 0.95")
    return level


def _sum_by(array: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Sum the rows of each group: `array` has the shape (rows, columns), and the result (groups, columns).

    `position` is the index of each row's group, from 0.
    """
    sums = np.zeros((position.max() + 1, array.shape[1]))
    np.add.at(sums, position, array)
    return sums
