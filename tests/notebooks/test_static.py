"""The static gates on the lessons as they lie in notebooks/; what a problem's line says is its cure."""

import pytest

from course_lib import gates, index, profiles


@pytest.mark.parametrize("gate", gates.GATES, ids=lambda gate: gate.__name__)
@pytest.mark.parametrize("lesson", profiles.lessons(), ids=lambda lesson: lesson["id"])
def test_gate(lesson, gate):
    problems = gate(index.read(index.notebook_path(lesson)), lesson)
    assert not problems, "\n" + "\n".join(problems)


def test_index():
    problems = gates.index_check()
    assert not problems, "\n" + "\n".join(problems)
