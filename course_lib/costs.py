"""What an answer costs, and where on the ladder to stop."""

from __future__ import annotations

from course_lib import CourseError


def cost_per_success(
    seconds: float, successes: int, dollars_per_hour: float, fixed_dollars: float = 0.0
) -> float | None:
    """Dollars per right answer: machine time plus what was paid once, over the answers that were right.

    seconds: machine time of all answers, wrong ones too (they are paid for as well). fixed_dollars: the share of a
    training run that these answers carry. None where nothing succeeded: no money buys a right answer there.
    """
    if seconds < 0 or dollars_per_hour < 0 or fixed_dollars < 0:
        raise ValueError(f"costs cannot be negative: {seconds} s, {dollars_per_hour} $/h, {fixed_dollars} $")
    if successes == 0:
        return None
    return (seconds / 3600 * dollars_per_hour + fixed_dollars) / successes


def stop_rung(rungs: list[dict], target: float, max_cost: float | None = None) -> str | None:
    """The first rung, from the bottom, that is good enough; None where none is: then the ladder ends and the task,
    the data or the model has to change.

    rungs: in the order of the ladder, each with `name`, `low` (lower end of the interval of its score) and
    `cost_per_success` (dollars or None). Good enough: `low >= target`, and the cost is known and at most `max_cost`
    (where one is given). The lower end is taken, not the value: a lucky small sample must not end the search.
    """
    names = [rung["name"] for rung in rungs]
    if len(set(names)) < len(names):
        raise CourseError(f"a rung stands twice in the table: {names}")
    for rung in rungs:
        if not rung["low"] >= target:  # a score that is no number is not good enough
            continue
        if max_cost is not None and (rung["cost_per_success"] is None or not rung["cost_per_success"] <= max_cost):
            continue
        return rung["name"]
    return None
