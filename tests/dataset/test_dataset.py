"""Lesson 13 on a reader's own file, as the README says: papermill with `dataset`, in profile ci, offline."""

import json
import os
import subprocess
import sys

import nbformat
import own_files
import pytest

from course_lib import card, hardware, profiles

NOTEBOOK = profiles.ROOT / "notebooks" / "13_capstone.ipynb"
BROKEN = ['{"text": "no target"}', '{"text": 1, "target": "x"}', "[]"]


def executed(tmp_path, dataset, **parameters):
    """(exit code, what was said on stderr, the executed notebook or None)."""
    out = tmp_path / "out.ipynb"
    given = {"dataset": str(dataset), "profile": "ci", "out_dir": str(tmp_path / "runs")} | parameters
    words = [word for name, value in given.items() for word in ("-p", name, value)]
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(NOTEBOOK), str(out), *words]
    environment = os.environ | hardware.kernel_environment() | {"HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(profiles.ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
    return done.returncode, done.stderr, nbformat.read(out, as_version=4) if out.exists() else None


def said(nb):
    return "".join(out.get("text", "") for cell in nb.cells if cell.cell_type == "code" for out in cell.outputs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["label", "json"])
def test_a_file_of_ones_own(tmp_path, kind):
    records = own_files.intents() if kind == "label" else own_files.slots()
    again = json.dumps(records[0])
    path = own_files.write(tmp_path / "mine.jsonl", records, [*BROKEN, again])
    code, errors, nb = executed(tmp_path, path.name)  # from the folder that papermill was called in
    assert code == 0, errors[-3000:]
    text, n = said(nb), len(records)
    for number, reason in ((1, "has no 'target'"), (2, "its text is a number"), (3, "not a JSON object")):
        assert f"line {n + number}: {reason}" in text
    assert f"line {n + 4} is line 1 again" in text and "Subsampled" in text and "skipped: a dataset is given" in text
    assert f"{n} usable records, targets of kind {kind}" in text and "majority answer" in text
    assert "stage1" not in text and not (tmp_path / "runs" / "launch").exists()  # the rest of the lesson did not run
    metrics = json.loads((tmp_path / "runs" / "metrics" / "13_capstone.json").read_text())["metrics"]
    assert set(metrics) == {"own_data_score", "own_data_majority", "own_data_lift"}
    folder = tmp_path / "runs" / "adapters" / "13_capstone" / "own_data"
    assert "mine.jsonl" in (folder / card.CARD).read_text() and (folder / card.SIGNATURE).exists()
    public = next(line for line in text.splitlines() if line.startswith("public key: ")).removeprefix("public key: ")
    assert set(card.verify(folder, public)) >= {"adapter_model.safetensors", "adapter_config.json"}


@pytest.mark.slow
def test_a_file_that_is_not_there_says_so_at_once(tmp_path):
    code, errors, _ = executed(tmp_path, "nowhere.jsonl")
    assert code != 0 and "cannot read the dataset 'nowhere.jsonl'" in errors
