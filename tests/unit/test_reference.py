"""Stored references: the formula of the bands, how pieces are kept, and what is stored for the real course."""

import csv

import pytest

from course_lib import CourseError, profiles, recipes, reference

RECIPES = [name for table in profiles.lessons() for name in table.get("introduces", [])]
BANDED = {"ticket_lora": {"exact_match": ("01", "rung_lora_exact_match")}}


def stored(name, profile="cpu", control=""):
    rows = reference.read(name, "metrics")
    return {
        (row["seed"], row["metric"]): (float(row["value"]), int(row["n"]))
        for row in rows
        if row["profile"] == profile and row["control"] == control
    }


def test_a_band_holds_its_seeds_and_stays_a_share():
    low, high = reference.band([0.6, 0.7], 150)
    assert 0 < low < 0.55 and 0.75 < high < 1
    assert reference.band([0.0], 10)[0] == 0 and reference.band([1.0], 10)[1] == 1


def test_more_items_make_a_narrower_band():
    few, many = (reference.band([0.6], n) for n in (20, 2000))
    assert few[0] < many[0] and many[1] < few[1]


def test_a_piece_replaces_itself_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    for seed, value in ((0, "1"), (1, "2"), (0, "3")):
        common = {"profile": "cpu", "seed": seed, "control": ""}
        reference._replace("r", "metrics", common, [common | {"metric": "m", "value": value}])
    assert [(row["seed"], row["value"]) for row in reference.read("r", "metrics")] == [("0", "3"), ("1", "2")]
    assert [path.name for path in tmp_path.iterdir()] == ["r_metrics.csv"]


def test_stored_pieces_are_not_measured_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    measured = []

    def piece(name, profile, seed, control, key):
        measured.append((profile, seed, control))
        common = {"profile": profile, "seed": seed, "control": control}
        reference._replace(name, "metrics", common, [common | {"metric": "m", "value": "1", "key": key}])

    monkeypatch.setattr(reference, "_piece", piece)
    reference.run("01", 0)
    first = list(measured)
    reference.run("01", 0)
    assert measured == first and (("cpu", 0, reference.CONTROL) in first)
    assert "stored" in capsys.readouterr().out


def test_a_lesson_without_a_recipe_has_no_reference():
    with pytest.raises(CourseError, match="00_start_here introduces no recipe"):
        reference.run("00_start_here")


def need(name, profile="cpu"):
    rows = [row for row in reference.read(name, "metrics") if row["profile"] == profile]
    if not rows:
        pytest.skip(f"no reference of {name} in profile {profile} is stored yet: make reference")
    return rows


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("kind", ["curves", "metrics"])
def test_every_stored_row_says_where_it_comes_from(name, kind):
    need(name)
    with open(reference.path(name, kind), newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        assert all(row[column] for column in reference.PROVENANCE), row


@pytest.mark.parametrize("name", RECIPES)
def test_the_stored_rows_belong_to_the_recipe_as_it_is(name):
    """A changed recipe, data set or stack asks for `make reference`. The dtype is part of the key: machines differ."""
    row = next(row for row in need(name) if row["seed"] == "0")
    if row["dtype"] == str(recipes.hardware.dtype()).removeprefix("torch."):
        assert row["key"] == recipes.key(name, "cpu", 0)


@pytest.mark.parametrize(("name", "metric"), [(name, metric) for name, table in BANDED.items() for metric in table])
def test_bands_hold_the_seeds_and_keep_out_the_control(name, metric):
    need(name)
    lesson, recorded = BANDED[name][metric]
    low, high = profiles.lesson(lesson)["bands"]["cpu"][recorded]
    values = [value for (_, found), (value, _) in stored(name).items() if found == metric]
    assert len(values) == len(reference.SEEDS) and all(low <= value <= high for value in values)
    formula = reference.band(values, profiles.lesson(lesson)["sizes"]["cpu"]["tickets"])
    assert low > formula[0] - 0.01 and high < formula[1] + 0.01  # never wider than the formula says
    controls = [value for (_, found), (value, _) in stored(name, control=reference.CONTROL).items() if found == metric]
    assert controls and not any(low <= value <= high for value in controls)
