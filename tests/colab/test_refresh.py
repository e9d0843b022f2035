"""The list of Colab's packages is read from what Google publishes, and never replaced by something shorter."""

import pytest
import refresh

PUBLISHED = """# generated
absl-py==1.4.0
torch==2.11.0+cu128
cuvs-cu12 @ https://example.org/cuvs-cu12/cuvs_cu12-26.2.0-cp312-cp312-manylinux_2_28_x86_64.whl
en_core_web_sm @ https://example.org/en_core_web_sm-3.8.0-py3-none-any.whl#sha256=1932
google-colab @ file:///colabtools/dist/google_colab-1.0.0.tar.gz
kernel_gateway @ git+https://example.org/kernel_gateway@b134e9945df25c
"""
FOUND = {
    "absl-py": "1.4.0",
    "torch": "2.11.0+cu128",
    "cuvs-cu12": "26.2.0",
    "en_core_web_sm": "3.8.0",
    "google-colab": "1.0.0",
}


def test_addresses_tell_versions():
    assert refresh.versions(PUBLISHED) == FOUND


def test_what_moved_is_written_and_shown(tmp_path, monkeypatch, capsys):
    stored, new = tmp_path / "freeze.txt", tmp_path / "new.txt"
    stored.write_text("# head\nabsl-py==1.3.0\nold==1\n")
    new.write_text(PUBLISHED + "".join(f"package{i}==1\n" for i in range(100)) + "Ubuntu\nPython 3.13.15\n")
    monkeypatch.setattr(refresh, "FREEZE", stored)
    refresh.main([new])
    shown = capsys.readouterr().out
    assert "| absl-py | 1.3.0 | 1.4.0 |" in shown and "| old | 1 |  |" in shown
    assert "(Python 3.13.15)" in stored.read_text() and refresh.versions(stored.read_text()).items() >= FOUND.items()


def test_a_list_that_cannot_be_right_is_refused(tmp_path, monkeypatch):
    stored, new = tmp_path / "freeze.txt", tmp_path / "new.txt"
    stored.write_text("absl-py==1.3.0\n")
    new.write_text("<html>moved</html>")
    monkeypatch.setattr(refresh, "FREEZE", stored)
    with pytest.raises(SystemExit, match="only 0 packages"):
        refresh.main([new])
    assert stored.read_text() == "absl-py==1.3.0\n"
