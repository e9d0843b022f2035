"""Lesson 05 through unsloth's CPU back end: `make test-unsloth`.

What this does not test: float16, CUDA kernels, unsloth's own checkpointing on a GPU and its 8-bit optimizer. On a CPU
unsloth replaces all four (bfloat16, PyTorch's kernels, AdamW), so this is a test of the calls and of the adapter that
comes out of them, not of a T4's arithmetic.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("unsloth") is None, reason="unsloth is not in this environment: make test-unsloth"
)

TRAIN = """
import json, sys
from course_lib import models
if models.four_bit_backend() == "unsloth":
    import unsloth
from types import SimpleNamespace
from course_lib import recipes, reference, tickets
s = SimpleNamespace(**vars(recipes.settings("ticket_qlora", "ci")) | {"train": 80})
model, trainer = recipes.prepare_with(s, 0, logging_steps=1)
trainer.train()
answers = reference.ticket_answers(model.eval(), trainer.processing_class, tickets.load("test", 60))
losses = [loss for _, loss in recipes.losses(trainer)]
json.dump({"losses": losses, "exact": answers["exact"], "valid": answers["valid"]}, open(sys.argv[1], "w"))
"""


def run(command, backend):
    environment = os.environ | {"COURSE_FOUR_BIT": backend}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{back end: losses and answers} after the same twenty steps."""
    found = {}
    for backend in ("bitsandbytes", "unsloth"):
        path = tmp_path_factory.mktemp(backend) / "result.json"
        said = run([sys.executable, "-c", TRAIN, str(path)], backend)
        assert ("Unsloth" in said) == (backend == "unsloth")
        found[backend] = json.loads(path.read_text())
    return found


def test_the_first_loss_is_the_same_within_two_percent(trained):
    theirs, ours = (trained[backend]["losses"][0] for backend in ("unsloth", "bitsandbytes"))
    assert theirs == pytest.approx(ours, rel=0.02)


def test_the_last_ten_losses_are_the_same_within_ten_percent(trained):
    theirs, ours = (sum(trained[backend]["losses"][-10:]) / 10 for backend in ("unsloth", "bitsandbytes"))
    assert theirs == pytest.approx(ours, rel=0.1)
    assert theirs < 0.5 * trained["unsloth"]["losses"][0]  # something was learnt


# After so few steps hardly a record is exact, so the valid ones are compared too; more of them move by chance.
@pytest.mark.parametrize(("what", "points"), [("exact", 0.1), ("valid", 0.2)])
def test_the_answers_are_as_good(trained, what, points):
    theirs, ours = (sum(trained[b][what]) / len(trained[b][what]) for b in ("unsloth", "bitsandbytes"))
    assert abs(theirs - ours) <= points
    assert what == "exact" or theirs > 0.4


def test_lesson_05_passes_through_unsloth(tmp_path):
    run([sys.executable, "-m", "course_lib", "run", "05", "--profile", "ci", "--out", str(tmp_path)], "unsloth")
    lesson = json.loads((tmp_path / "results.json").read_text())["lessons"]["05_qlora_on_a_t4"]
    assert lesson["status"] == "passed"
    notebook = json.loads((tmp_path / "notebooks" / "05_qlora_on_a_t4.ipynb").read_text())
    said = [o.get("text", "") for cell in notebook["cells"] for o in cell.get("outputs", [])]
    assert any("back end unsloth" in "".join(text) for text in said)
