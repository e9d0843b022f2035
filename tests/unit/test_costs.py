import pytest

from course_lib import CourseError
from course_lib.costs import cost_per_success, stop_rung

LADDER = "base prompt few_shot retry grammar validator retrieval date_tool routing lora".split()


def table(**changes):
    """The ladder with no rung good enough, then `changes`: name to (low, cost)."""
    found = {name: (0.1, 0.001) for name in LADDER} | changes
    return [
        {"name": name, "value": low + 0.1, "low": low, "cost_per_success": cost} for name, (low, cost) in found.items()
    ]


def test_cost_per_success():
    assert cost_per_success(3600, 10, 0.10) == pytest.approx(0.01)
    assert cost_per_success(1800, 5, 0.10, fixed_dollars=0.20) == pytest.approx((0.05 + 0.20) / 5)
    assert cost_per_success(0, 3, 0.10) == 0


def test_where_nothing_succeeded_there_is_no_cost():
    assert cost_per_success(3600, 0, 0.10) is None


@pytest.mark.parametrize("arguments", [(-1, 1, 0.1), (1, 1, -0.1), (1, 1, 0.1, -1)])
def test_negative_costs_are_refused(arguments):
    with pytest.raises(ValueError, match="-"):
        cost_per_success(*arguments)


@pytest.mark.parametrize("rung", LADDER)
def test_the_rule_stops_at_each_rung(rung):
    assert stop_rung(table(**{rung: (0.6, 0.001)}), target=0.5, max_cost=0.01) == rung


@pytest.mark.parametrize("rung", LADDER)
def test_the_lowest_rung_that_is_good_enough_wins(rung):
    """However much better those above it are."""
    good = {name: (0.6 if name == rung else 0.99, 0.0001) for name in LADDER[LADDER.index(rung) :]}
    assert stop_rung(table(**good), target=0.5) == rung


@pytest.mark.parametrize("rung", LADDER)
def test_a_rung_that_costs_too_much_is_passed_over(rung):
    rest = LADDER[LADDER.index(rung) + 1 :]
    for cost in (0.02, None):
        rungs = table(**{rung: (0.9, cost)} | {name: (0.6, 0.01) for name in rest})
        assert stop_rung(rungs, target=0.5, max_cost=0.01) == (rest[0] if rest else None)
        assert stop_rung(rungs, target=0.5) == rung  # where no limit is given, cost does not count


def test_none_is_good_enough():
    assert stop_rung(table(), target=0.5) is None
    assert stop_rung(table(lora=(0.9, 0.02)), target=0.5, max_cost=0.01) is None
    assert stop_rung([], target=0.5) is None


def test_the_lower_end_decides_and_not_the_value():
    rungs = table(prompt=(0.45, 0.001), lora=(0.5, 0.001))
    assert rungs[1]["value"] > 0.5
    assert stop_rung(rungs, target=0.5) == "lora"  # and the target itself is enough


def test_limits_are_reached_by_equality():
    assert stop_rung(table(grammar=(0.5, 0.01)), target=0.5, max_cost=0.01) == "grammar"


def test_a_rung_may_not_stand_twice():
    with pytest.raises(CourseError, match=r"twice.*'base', 'base'"):
        stop_rung([*table()[:1], *table()], target=0.5)
