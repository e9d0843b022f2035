"""GLOSSARY.md against the notebooks: its links lead somewhere, and each term stands in the lesson that it names."""

import re

import pytest

from course_lib import index, profiles

GLOSSARY = profiles.ROOT / "GLOSSARY.md"
ROW = re.compile(r"^\| \*\*(?P<term>[^|*]+)\*\* \| (?P<meaning>[^|]+) \| \[(?P<number>\d\d)\]\((?P<link>[^)]+)\) \|$")


def table(heading):
    """The rows below the head of the table in one section."""
    text = GLOSSARY.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [line for line in text.splitlines() if line.startswith("|")][2:]


def entries():
    found = [(line, ROW.match(line)) for line in table("Glossary")]
    assert not (odd := [line for line, match in found if not match]), f"not | **term** | meaning | [NN](link) |: {odd}"
    return [match.groupdict() for _, match in found]


def prose(lesson):
    """A lesson's markdown without line breaks and emphasis; what points to other lessons at its end is left out."""
    cells = index.read(index.notebook_path(lesson)).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown" and not index.is_generated(cell))
    return " ".join(text.partition("## Where next")[0].replace("*", "").split()).lower()


def test_terms_are_sorted_and_unique():
    terms = [entry["term"].lower() for entry in entries()]
    assert len(terms) == len(set(terms)) >= 80
    assert terms == sorted(terms)


def test_every_link_leads_to_the_notebook_of_its_number():
    for entry in entries():
        assert (profiles.ROOT / entry["link"]).is_file(), f"{entry['term']}: there is no {entry['link']}"
        assert entry["link"].startswith(f"notebooks/{entry['number']}_"), entry


@pytest.mark.parametrize("lesson", profiles.lessons(), ids=lambda lesson: lesson["id"])
def test_a_lesson_introduces_two_terms_or_more_and_uses_them(lesson):
    number, text = lesson["id"][:2], prose(lesson)
    terms = [entry["term"] for entry in entries() if entry["number"] == number]
    assert len(terms) >= 2, f"GLOSSARY.md has {terms} of lesson {number}: add rows for the terms that it introduces"
    for term in terms:
        assert re.search(rf"(?<!\w){re.escape(term.lower())}(?:s|es)?(?!\w)", text), (
            f"{term!r} is nowhere in lesson {number}"
        )


def test_notation_names_lessons_that_exist():
    known = {lesson["id"][:2] for lesson in profiles.lessons()}
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in table("Notation")]
    assert len(rows) >= 25
    for row in rows:
        assert len(row) == 4, row
        numbers = re.findall(r"\d\d", row[3])
        assert numbers and set(numbers) <= known, row


def test_names_of_the_notation_stand_in_the_code():
    for line in table("Notation"):
        symbol, names, _, numbers = (part.strip() for part in line.strip("|").split("|"))
        lessons = [profiles.lesson(number) for number in re.findall(r"\d\d", numbers)]
        cells = [cell for lesson in lessons for cell in index.read(index.notebook_path(lesson)).cells]
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        for name in re.findall(r"`([^`]+)`", names):
            assert re.search(rf"\b{name}\b", code), f"{symbol}: {name} is in no code of lessons {numbers}"


def test_the_glossary_is_reachable():
    assert "](GLOSSARY.md" in (profiles.ROOT / "README.md").read_text(encoding="utf-8")
    assert "](../glossary.md" in prose(profiles.lesson("00"))
