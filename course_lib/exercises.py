"""Exercises: ``check("04.2", answer)`` tells at once whether an answer is right, and never stops a run."""

import inspect
import textwrap

CHECKS = {}  # exercise -> (what is expected, function of the answer)


def register(exercise, expected):
    """Decorator for the check of one exercise.

    expected: a sentence that tells an untouched exercise what to give. The function takes the answer and returns
    (right, message); right is None where the answer is still untouched.
    """

    def add(function):
        if exercise in CHECKS:
            raise ValueError(f"exercise {exercise} has a check already: {CHECKS[exercise][1].__name__}")
        CHECKS[exercise] = (expected, function)
        return function

    return add


def check(exercise, answer=None):
    """Print whether ``answer`` solves ``exercise``; untouched (... or None), print what is expected. Never raises."""
    if exercise not in CHECKS:
        known = ", ".join(name for name in CHECKS if name.split(".")[0] == str(exercise).split(".")[0])
        print(f"There is no exercise {exercise}." + (f" This lesson has {known}." if known else ""))
        return
    expected, function = CHECKS[exercise]
    right, message = None, ""
    if answer is not None and answer is not ...:
        try:
            right, message = function(answer)
        except NotImplementedError:  # the body of a function that the learner has not written yet
            pass
        except (Exception, SystemExit) as error:
            right, message = False, f"the check could not use your answer ({type(error).__name__}: {error}). {expected}"
    if right is None:
        print(f"{exercise}  to do: {message or expected}")
    else:
        print(f"{exercise}  {'right' if right else 'not yet'}: {message or ('well done.' if right else expected)}")


def show_source(function):
    """Show the library's own source of a function or class, so that a lesson explains the code that runs."""
    from IPython.display import Markdown, display

    display(Markdown(f"```python\n{textwrap.dedent(inspect.getsource(function)).rstrip()}\n```"))
