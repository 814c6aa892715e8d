"""Equality as a claim: is a stage as good as F16, worse, or have too few rows been asked?

A paired test of non-inferiority at one-sided 95 %, by the intervals of intervals.py, or of bootstrap.py
where the metric is no share of rows.
"""

from collections.abc import Mapping
from typing import Any

from pockettune.common.words import Words, english


def judge(paired: Mapping[str, Any], margin: float) -> dict[str, Any]:
    """Return {"claim", "margin", "bound", "detectable"} of what a comparison of rows found.

    "as good": the metric is lower by less than `margin`. "worse": that is not proved, and it is
    lower. "undecided": neither is proved. `bound` is what the claim rests on: the lowest that the
    difference may be, and for "worse" the highest. `detectable`: the loss that these rows show as
    "worse" in four of five samples.
    """
    low, high = paired["one_sided"]
    claim = "as good" if low > -margin else "worse" if high < 0 else "undecided"
    return {
        "claim": claim,
        "margin": margin,
        "bound": high if claim == "worse" else low,
        "detectable": paired["detectable"],
    }


def say(verdict: Mapping[str, Any], words: Words = english) -> str:
    """Return the claim in the words of report, card and log."""
    bound = f"{100 * verdict['bound']:+.2f}"
    margin = f"{100 * verdict['margin']:.4g}"
    if verdict["claim"] == "as good":
        return words(
            "proved as good (difference at least {bound} points, margin {margin})",
            bound=bound,
            margin=margin,
        )
    if verdict["claim"] == "worse":
        return words("proved worse (difference at most {bound} points)", bound=bound)
    return not_decided(verdict["detectable"], words)


def not_decided(detectable: float, words: Words = english) -> str:
    """Return what is said where the rows prove neither."""
    return words(
        "not decided by these rows, which could have shown a difference of {points} points",
        points=f"{100 * detectable:.2f}",
    )
