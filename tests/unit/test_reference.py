"""Stored references: the formula of the bands, how pieces are kept, and what is stored for the real course."""

import csv

import pytest

from course_lib import CourseError, profiles, recipes, reference

RECIPES = [  # those that start from the base; tests/unit/test_preferences.py has the others
    name
    for table in profiles.lessons()
    for name in table.get("introduces", [])
    if "start" not in profiles.index()["recipes"][name]
]
BANDED = {
    "ticket_lora": {"exact_match": ("01", "rung_lora_exact_match")},
    "ticket_full": {"exact_match": ("03", "full_ft_exact_match")},
    "ticket_lora_short": {"exact_match": ("04", "lora_exact_match")},
    "ticket_dora_short": {"exact_match": ("04", "dora_exact_match")},
    "ticket_qlora": {"exact_match": ("05", "qlora_exact_match")},
}


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


def test_stored_pieces_are_not_measured_again(tmp_path, monkeypatch, capsys, lesson="01"):
    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    measured = []

    def piece(name, profile, seed, control, key):
        measured.append((profile, seed, control))
        common = {"profile": profile, "seed": seed, "control": control}
        reference._replace(name, "metrics", common, [common | {"metric": "m", "value": "1", "key": key}])

    def swept(name, seed, knob, setting, key):
        measured.append((knob, setting))
        common = {"profile": "cpu", "seed": seed, "control": "", "knob": knob, "piece": setting}
        reference._replace(name, "sweeps", common, [common | {"metric": "m", "value": "1", "key": key}])

    monkeypatch.setattr(reference, "_piece", piece)
    monkeypatch.setattr(reference, "_sweep_piece", swept)
    monkeypatch.setattr(reference, "adapter_sweep", lambda seeds: None)  # tests/unit/test_zoo.py has it
    reference.run(lesson, 0)
    first = list(measured)
    reference.run(lesson, 0)
    assert measured == first and {("cpu", 0, c) for c in reference.CONTROLS} <= {*first}
    assert "stored" in capsys.readouterr().out


@pytest.mark.parametrize("name", RECIPES)
def test_sweeps_are_measured_once_for_each_setting(name, tmp_path, monkeypatch, capsys):
    home = next(table["id"] for table in profiles.lessons() if name in table.get("introduces", []))
    test_stored_pieces_are_not_measured_again(tmp_path, monkeypatch, capsys, home)
    wanted = {k: [str(v) for v in values] for k, values in profiles.index()["recipes"][name].get("sweeps", {}).items()}
    found = {}
    for row in reference.read(name, "sweeps"):
        found.setdefault(row["knob"], []).append(row["piece"])
    assert {k: sorted(v) for k, v in found.items()} == {k: sorted(v) for k, v in wanted.items()}


def test_a_setting_is_trained_and_measured(tmp_path, monkeypatch):
    """The plumbing of a sweep: which model is measured for which setting, and what is written down."""
    from types import SimpleNamespace

    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    s, trained = SimpleNamespace(learning_rate=1e-4, method="full"), []
    trainer = SimpleNamespace(train=lambda: trained.append("trainer"))
    monkeypatch.setattr(recipes, "settings", lambda name, profile: s)
    monkeypatch.setattr(recipes, "load", lambda name, profile, seed: "the recipe")
    monkeypatch.setattr(recipes, "for_use", lambda model: model)
    monkeypatch.setattr(recipes, "prepare_with", lambda s, seed: (f"lr {s.learning_rate}", trainer))
    monkeypatch.setattr(reference, "_by_hand", lambda s, seed, name, rate, penalty=None: f"{name} at {rate}")
    estimate = reference.evaluation.Estimate(0.5, 0.4, 0.6, 9)
    measured = []
    monkeypatch.setattr(reference, "swept_metrics", lambda model, generate: measured.append(model) or {"m": estimate})
    for knob, setting in (("learning_rate", 1e-4), ("learning_rate", 3e-4), ("optimizer", "muon 2e-4")):
        reference._sweep_piece("r", 0, knob, setting, "the key")
    assert measured == ["the recipe", "lr 0.0003", "muon at 0.0002"] and trained == ["trainer"]
    rows = reference.read("r", "sweeps")
    assert [(r["setting"], r["value"], r["low"], r["n"]) for r in rows if r["metric"] == "m"] == [
        ("0.0001", "0.5000", "0.4000", "9"), ("0.0003", "0.5000", "0.4000", "9"), ("muon 2e-4", "0.5000", "0.4000", "9")
    ]  # fmt: skip
    assert all(row["key"] == "the key" and row["torch"] for row in rows)


def test_a_lesson_without_a_recipe_has_no_reference():
    with pytest.raises(CourseError, match="00_start_here introduces no recipe"):
        reference.run("00_start_here")


def need(name, profile="cpu"):
    rows = [row for row in reference.read(name, "metrics") if row["profile"] == profile]
    if not rows:
        pytest.skip(f"no reference of {name} in profile {profile} is stored yet: make reference")
    return rows


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("kind", ["curves", "metrics", "sweeps"])
def test_every_stored_row_says_where_it_comes_from(name, kind):
    need(name)
    if kind == "sweeps" and not reference.path(name, kind).exists():
        pytest.skip(f"no sweep of {name} is stored")
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
def test_bands_hold_the_seeds(name, metric):
    need(name)
    lesson, recorded = BANDED[name][metric]
    low, high = profiles.lesson(lesson)["bands"]["cpu"][recorded]
    values = [value for (_, found), (value, _) in stored(name).items() if found == metric]
    assert len(values) == len(reference.SEEDS) and all(low <= value <= high for value in values)
    formula = reference.band(values, profiles.lesson(lesson)["sizes"]["cpu"]["tickets"])
    assert low > formula[0] - 0.01 and high < formula[1] + 0.01  # never wider than the formula says


@pytest.mark.parametrize("control", reference.CONTROLS)
@pytest.mark.parametrize(("name", "metric"), [(name, metric) for name, table in BANDED.items() for metric in table])
def test_bands_keep_out_the_controls(name, metric, control):
    lesson, recorded = BANDED[name][metric]
    low, high = profiles.lesson(lesson)["bands"]["cpu"][recorded]
    controls = [value for (_, found), (value, _) in stored(name, control=control).items() if found == metric]
    if not controls:
        pytest.skip(f"no control {control} of {name} is stored yet: make reference")
    assert not any(low <= value <= high for value in controls)
