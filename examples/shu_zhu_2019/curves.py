"""How well a score finds outliers: ROC and precision-recall curves, the areas below them, bootstrap
intervals.

An interval resamples outliers and ordinary images, each among themselves, so the prevalence stays.
The networks stay as they are: it says nothing about another training. Scores are sorted once; a
resample is a weight for each image, and both areas are sums over the sorted scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import (
    average_precision_score,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

__all__ = ["LEVEL", "POINTS", "Ranking", "compared", "curve_points"]

LEVEL = 0.95  # of the intervals
POINTS = 300  # of a curve that is kept
DIGITS = 12  # of areas, after the point

Array = NDArray[Any]


class Ranking:
    """A score's order, for the areas of many resamples.

    Args:
        score: [N] finite; outliers should have the higher ones.
        outlier: [N] bool, some and not all.
        weight: [N] positive, how many images each stands for.

    Raises:
        ValueError: scores are not finite, or all images are of one kind.
    """

    def __init__(self, score: Array, outlier: Array, weight: Array) -> None:
        bad = int((~np.isfinite(score)).sum())
        if bad:
            raise ValueError(f"expected finite scores, got {bad} of {len(score)} that are not")
        if not 0 < outlier.sum() < len(outlier):
            raise ValueError(
                f"expected outliers and ordinary images, got {int(outlier.sum())} outliers among "
                f"{len(outlier)} images"
            )
        self._order = np.argsort(-score, kind="stable")
        high_first = score[self._order]
        # Equal scores are one threshold.
        self._starts = np.flatnonzero(np.r_[True, high_first[1:] != high_first[:-1]])
        self._weight = weight[self._order]
        self._outlier = outlier[self._order]

    def areas(self, counts: Array) -> tuple[float, float]:
        """Area under the ROC curve, and average precision, where image i comes ``counts[i]`` times:
        scikit-learn's roc_auc_score and average_precision_score with sample weights."""
        w = self._weight * counts[self._order]
        hit = np.add.reduceat(np.where(self._outlier, w, 0.0), self._starts)  # by threshold
        false = np.add.reduceat(np.where(self._outlier, 0.0, w), self._starts)
        hits, falses = hit.cumsum(), false.cumsum()
        area = (false * (hits - hit / 2)).sum() / (hits[-1] * falses[-1])
        some = hit > 0
        precision = hits[some] / (hits[some] + falses[some])
        return float(area), float((hit[some] * precision).sum() / hits[-1])


def _resamples(outlier: Array, count: int, seed: int) -> Iterator[Array]:
    """How often each image comes, [N], in each resample of its own kind."""
    generator = np.random.default_rng(seed)
    kinds = [np.flatnonzero(outlier), np.flatnonzero(~outlier)]
    for _ in range(count):
        counts = np.empty(len(outlier))
        for kind in kinds:
            drawn = generator.integers(len(kind), size=len(kind))
            counts[kind] = np.bincount(drawn, minlength=len(kind))
        yield counts


def _interval(values: Array) -> list[float] | None:
    """The middle LEVEL of the resamples; None where there are none."""
    if len(values) == 0:
        return None
    return [_rounded(end) for end in np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))]


def _rounded(value: float) -> float:
    """Without the rounding errors of sums, which would make a difference of 1e-17 out of none."""
    return round(float(value), DIGITS) + 0.0


def compared(
    scores: Mapping[str, Array],
    outlier: Array,
    weight: Array | None = None,
    *,
    reference: str,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Areas of several scores of the same images, and paired differences to one of them.

    Args:
        scores: [N] each.
        outlier: [N] bool.
        weight: [N] how many images each stands for; None: one.
        reference: the score that the others are subtracted from.
        resamples: behind each interval; with 0 there are none.
        seed: of the resamples.

    Returns:
        ``{"images", "outliers", "prevalence", "scores": {name: {"roc", "roc_interval",
        "precision", "precision_interval"}}, "differences": the same of reference minus each
        other}``; "roc" is the area under the ROC curve, "precision" the average precision.
    """
    weight = np.ones(len(outlier)) if weight is None else weight
    rankings = {name: Ranking(score, outlier, weight) for name, score in scores.items()}
    drawn = np.array(
        [
            [ranking.areas(counts) for ranking in rankings.values()]
            for counts in _resamples(outlier, resamples, seed)
        ]
    ).reshape(resamples, len(rankings), 2)
    area = {
        name: (
            float(roc_auc_score(outlier, score, sample_weight=weight)),
            float(average_precision_score(outlier, score, sample_weight=weight)),
        )
        for name, score in scores.items()
    }
    place = {name: i for i, name in enumerate(scores)}

    def line(found: tuple[float, float], of: Array) -> dict[str, Any]:
        return {
            "roc": _rounded(found[0]),
            "roc_interval": _interval(of[:, 0]),
            "precision": _rounded(found[1]),
            "precision_interval": _interval(of[:, 1]),
        }

    first = drawn[:, place[reference]]
    return {
        "images": len(outlier),
        "outliers": int(outlier.sum()),
        "prevalence": float(weight[outlier].sum() / weight.sum()),
        "scores": {name: line(area[name], drawn[:, i]) for name, i in place.items()},
        "differences": {
            name: line(
                (area[reference][0] - area[name][0], area[reference][1] - area[name][1]),
                first - drawn[:, i],
            )
            for name, i in place.items()
            if name != reference
        },
    }


def _thinned(x: Array, y: Array, points: int) -> Array:
    """At most ``points`` points of a curve, evenly along it, with both ends: [2, n] float32."""
    along = np.r_[0.0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))]
    at = np.searchsorted(along, np.linspace(0, along[-1], points))
    at = np.unique(np.r_[0, np.minimum(at, len(x) - 1), len(x) - 1])
    return np.stack([x[at], y[at]]).astype(np.float32)


def curve_points(
    score: Array, outlier: Array, weight: Array | None = None, points: int = POINTS
) -> tuple[Array, Array]:
    """The curves for a figure: false positive rate and recall, [2, n]; recall and precision,
    [2, m]; float32."""
    false, recall, _ = roc_curve(outlier, score, sample_weight=weight)
    precision, found, _ = precision_recall_curve(outlier, score, sample_weight=weight)
    # scikit-learn ends with recall 0 and precision 1, which no threshold has.
    return _thinned(false, recall, points), _thinned(found[-2::-1], precision[-2::-1], points)
