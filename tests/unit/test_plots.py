"""The map's every box can be lit, and the style and the saved files are what lessons rely on."""

import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import pytest

from course_lib import plots, profiles

NUMBERS = [number for _, lessons in plots.STAGES for number, _ in lessons]
SPACE = "{http://www.w3.org/2000/svg}"


def texts(svg):
    return [node.text for node in ElementTree.fromstring(svg).iter(f"{SPACE}text")]


def test_every_lesson_of_the_index_has_one_box():
    assert sorted(NUMBERS) == sorted(set(NUMBERS))
    assert {lesson["id"].split("_")[0] for lesson in profiles.lessons()} <= set(NUMBERS)


@pytest.mark.parametrize("number", NUMBERS)
def test_map_lights_one_box(number):
    pytest.importorskip("IPython")
    svg = plots.course_map(f"{number}_some_title").data
    assert svg == plots.course_map(number).data
    boxes = [node for node in ElementTree.fromstring(svg).iter(f"{SPACE}rect") if node.get("fill") == plots.BLUE]
    assert len(boxes) == 1 and texts(svg).count("you are here") == 1
    assert f"lesson {number}" in ElementTree.fromstring(svg).find(f"{SPACE}title").text


def test_texts_stay_within_the_picture():
    tree = ElementTree.fromstring(plots._map("12"))
    width, height = map(float, tree.get("viewBox").split()[2:])
    for node in tree.iter(f"{SPACE}text"):
        half = 0.3 * float(node.get("font-size")) * len(node.text)  # half of a text in Helvetica is less
        assert half <= float(node.get("x")) <= width - half and 0 < float(node.get("y")) < height


def test_unknown_lesson_is_named_with_the_valid_ones():
    with pytest.raises(ValueError, match="no lesson '99' on the map: choose one of 00, 01, "):
        plots.course_map("99")


def test_style_and_save(tmp_path):
    mpl = pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    with mpl.rc_context():
        plots.figure_style()
        assert mpl.rcParams["figure.dpi"] == 110 and mpl.rcParams["font.size"] == 10
        assert mpl.rcParams["axes.prop_cycle"].by_key()["color"][0] == plots.BLUE
        fig = Figure(figsize=(2, 1))
        fig.subplots().plot([0, 1])
        plots.save(fig, SimpleNamespace(folder={"figures": tmp_path}.get), "curve")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_diagram_names_its_boxes_and_escapes_them():
    boxes = [(0, 0, 50, 20, "A & B", "trained"), (80, 0, 50, 20, "W0", "frozen"), (160, 0, 50, 20, "y", "plain")]
    svg = plots.diagram("one < two", 220, 40, boxes, [(50, 10, 80, 10)]).data
    assert "<title>one &lt; two</title>" in svg and "A &amp; B" in svg and svg.count("<rect") == 4
    assert svg.count('marker-end="url(#head)"') == 1 and plots.BLUE in svg
