"""`course lab` serves lesson 00, and Run All Cells takes it from top to bottom in a real browser."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import psutil
import pytest

LESSON = "00_start_here.ipynb"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TOKEN = "course-test"
START_SECONDS = 120
RUN_SECONDS = 600  # a lesson takes a minute in profile ci; a busy machine may take several times as long


@pytest.fixture
def browser_path():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        message = f"no browser found (looked for {', '.join(BROWSERS)})"
        if os.environ.get("CI") == "true":
            pytest.fail(message + "; under CI=true this test may not be skipped: install chromium")
        pytest.skip(message)
    return path


class Lab:
    """A running JupyterLab: its address, its REST interface, and the folder that it works on."""

    def __init__(self, process, port, work, log):
        self.process, self.work, self.log = process, work, log
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path):
        request = urllib.request.Request(f"{self.url}/{path}", headers={"Authorization": f"token {TOKEN}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def tail(self):
        return self.log.read_text(errors="replace")[-4000:]

    def wait_until_up(self):
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                pytest.fail(f"`course lab` ended with code {self.process.returncode}:\n{self.tail()}")
            try:
                self.get("api/status")
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        pytest.fail(f"`course lab` did not answer within {START_SECONDS} s:\n{self.tail()}")

    def served_path(self, name, folder="", depth=2):
        """Path of a notebook below the server's root folder."""
        entries = self.get(f"api/contents/{folder}")["content"]
        for entry in entries:
            if entry["name"] == name:
                return entry["path"]
        for entry in entries:
            if entry["type"] == "directory" and depth:
                found = self.served_path(name, entry["path"], depth - 1)
                if found:
                    return found
        return None

    def idle(self):
        states = [session["kernel"]["execution_state"] for session in self.get("api/sessions")]
        return bool(states) and all(state == "idle" for state in states)


@pytest.fixture
def lab(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    work = tmp_path / "work"
    environment = os.environ | {
        "COURSE_OUT": str(tmp_path / "runs"),
        "COURSE_PROFILE": "ci",
        # The tester's own settings, kernels and saved workspaces stay out of the test, and it out of theirs.
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTER_DATA_DIR": str(tmp_path / "data"),
    }
    command = [sys.executable, "-m", "course_lib", "lab", "--dir", str(work), "--no-browser", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", f"--ServerApp.token={TOKEN}"]
    log = tmp_path / "lab.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    running = Lab(process, port, work, log)
    try:
        running.wait_until_up()
        yield running
    finally:
        # Kernels have process groups of their own, so the whole tree is stopped.
        try:
            tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        except psutil.NoSuchProcess:
            tree = []
        for member in reversed(tree):
            try:
                member.terminate()
            except psutil.NoSuchProcess:
                pass
        for member in psutil.wait_procs(tree, timeout=15)[1]:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                pass
        process.wait(timeout=15)


def code_cells(path):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def unfinished(cells):
    """Numbers of the code cells that hold code and have not run."""
    return [n for n, cell in enumerate(cells) if "".join(cell["source"]).strip() and not cell["execution_count"]]


def errors(cells):
    return [
        f"code cell {n}: {output['ename']}: {output['evalue']}"
        for n, cell in enumerate(cells)
        for output in cell["outputs"]
        if output["output_type"] == "error"
    ]


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.timeout(START_SECONDS + RUN_SECONDS + 180)
def test_lesson_00_runs_from_top_to_bottom(browser_path, lab, tmp_path):
    from playwright.sync_api import sync_playwright

    served = lab.served_path(LESSON)
    assert served, f"`course lab` does not serve {LESSON}:\n{lab.tail()}"
    copies = [path for path in lab.work.rglob(LESSON) if ".ipynb_checkpoints" not in path.parts]
    assert copies, f"{LESSON} is not in the working folder {lab.work}"
    on_disk = copies[0]

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, headless=True, args=BROWSER_ARGUMENTS)
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            page.goto(f"{lab.url}/lab/tree/{served}?token={TOKEN}", timeout=START_SECONDS * 1000)
            page.locator(".jp-NotebookPanel:visible .jp-Cell").first.wait_for(timeout=60_000)
            # Clearing first makes sure that what is read below was made by this run.
            menu(page, "Edit", "Clear Outputs of All Cells")
            deadline = time.monotonic() + 60
            while not lab.idle() and time.monotonic() < deadline:
                page.wait_for_timeout(250)
            assert lab.idle(), f"the kernel did not start:\n{lab.tail()}"

            menu(page, "Run", "Run All Cells")
            deadline = time.monotonic() + RUN_SECONDS
            while True:
                page.wait_for_timeout(1000)
                if lab.idle():
                    # JupyterLab takes cells out of the page that are out of view, so the saved file is read.
                    page.keyboard.press("Control+s")
                    page.wait_for_timeout(1000)
                    cells = code_cells(on_disk)
                    if errors(cells) or not unfinished(cells):
                        break
                if time.monotonic() > deadline:
                    page.screenshot(path=tmp_path / "lab.png")
                    pytest.fail(f"not finished after {RUN_SECONDS} s: code cells {unfinished(code_cells(on_disk))}")
            page.screenshot(path=tmp_path / "lab.png")
        finally:
            browser.close()

    assert not errors(cells)
    assert [cell["execution_count"] for cell in cells if "".join(cell["source"]).strip()] == list(
        range(1, len([cell for cell in cells if "".join(cell["source"]).strip()]) + 1)
    )
    finish = cells[-1]
    assert "finish" in finish["metadata"].get("tags", []), "the last code cell is not the finish cell"
    assert finish["outputs"], "the finish cell printed nothing"


def menu(page, title, item):
    page.locator(".lm-MenuBar-itemLabel").get_by_text(title, exact=True).click()
    page.locator(".lm-Menu .lm-Menu-itemLabel").get_by_text(item, exact=True).click()
