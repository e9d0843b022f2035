import pytest

from course_lib import exercises


@pytest.fixture(autouse=True)
def checks(monkeypatch):
    monkeypatch.setattr(exercises, "CHECKS", {})

    @exercises.register("07.1", "Give the number of bytes as an int.")
    def number(answer):
        return answer == 8, "8 bytes." if answer == 8 else f"{answer} is not it: think of the optimizer."

    @exercises.register("07.2", "Give a function of x.")
    def function(answer):
        return answer(2) == 4, ""


def said(capsys):
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize("answer", [None, ...])
def test_untouched_says_what_is_expected(capsys, answer):
    assert exercises.check("07.1", answer) is None
    assert said(capsys) == "07.1  to do: Give the number of bytes as an int."


def test_an_unwritten_function_is_untouched(capsys):
    def answer(x):
        raise NotImplementedError

    exercises.check("07.2", answer)
    assert "to do" in said(capsys)


def test_right_and_wrong(capsys):
    exercises.check("07.1", 8)
    assert said(capsys) == "07.1  right: 8 bytes."
    exercises.check("07.1", 4)
    assert said(capsys) == "07.1  not yet: 4 is not it: think of the optimizer."
    exercises.check("07.2", lambda x: x + 2)
    assert said(capsys) == "07.2  right: well done."
    exercises.check("07.2", lambda x: x)
    assert said(capsys) == "07.2  not yet: Give a function of x."


@pytest.mark.parametrize("answer", [5, lambda: 1, lambda x: 1 / 0, lambda x: exit()])
def test_never_raises(capsys, answer):
    exercises.check("07.2", answer)
    assert "not yet: the check could not use your answer" in said(capsys)


def test_unknown_exercise_names_those_of_the_lesson(capsys):
    exercises.check("07.9", 1)
    assert said(capsys) == "There is no exercise 07.9. This lesson has 07.1, 07.2."
    exercises.check(3, 1)
    assert "no exercise 3" in said(capsys)


def test_a_second_check_for_one_exercise_is_refused():
    with pytest.raises(ValueError, match="07.1"):
        exercises.register("07.1", "again")(lambda answer: (True, ""))


def test_show_source_shows_the_librarys_own_text(capsys):
    pytest.importorskip("IPython")
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("IPython.display.display", shown.append)
        exercises.show_source(exercises.check)
    assert shown[0].data.startswith("```python\ndef check(exercise") and shown[0].data.endswith("\n```")
