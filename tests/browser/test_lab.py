"""`course lab` in a real browser: Run All Cells on lessons 00 and 04, and a look at the page that a learner sees."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import psutil
import pytest

from course_lib import exercises, index, profiles

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # a container's /dev/shm holds 64 MB: a page with many figures needs more
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TOKEN = "course-test"
START_SECONDS = 120
# A lesson takes one to three minutes in profile ci; on a busy machine, or with an empty cache, several times as long.
RUN_SECONDS = 1800
# By default JupyterLab skips cells that are out of view: a figure there could not be seen to be missing.
WHOLE_PAGE = {"windowingMode": "none"}


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
    settings = tmp_path / "config" / "lab" / "user-settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text(json.dumps(WHOLE_PAGE))
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


def saved_counts(path):
    """Execution counts of the code cells of a notebook on disk; None where it is being written."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except ValueError:
        return None
    return [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]


def expected_figures(cell):
    """How many figures a code cell of the committed notebook shows."""
    return sum(bool({"image/png", "image/svg+xml"} & set(output.get("data", {}))) for output in cell.outputs)


# What a learner can see: of each code cell its number, the figures that have really been drawn, text and errors.
READ_PAGE = r"""() => {
  const ERROR = /Traceback \(most recent call last\)|Cell In\[\d+\], line/;  // an error looks like any other red text
  const panel = document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden)');
  const seen = element => { const box = element.getBoundingClientRect(); return box.width > 20 && box.height > 20; };
  const drawn = image => seen(image) && (image.tagName !== 'IMG' || (image.complete && image.naturalWidth > 0));
  return {
    code: [...panel.querySelectorAll('.jp-Notebook .jp-CodeCell')].map(cell => {
      const outputs = [...cell.querySelectorAll('.jp-OutputArea-output')];
      return {
        prompt: (cell.querySelector('.jp-InputPrompt') || {textContent: ''}).textContent.trim(),
        figures: outputs.flatMap(o => [...o.querySelectorAll('img, :scope > svg')]).filter(drawn).length,
        text: outputs.map(o => o.innerText).join('\n'),
        errors: outputs.map(o => o.innerText).filter(text => ERROR.test(text)),
      };
    }),
    markdown: [...panel.querySelectorAll('.jp-Notebook .jp-MarkdownCell')].map(cell => ({
      text: (cell.querySelector('.jp-MarkdownOutput') || {innerText: ''}).innerText,
      formulas: cell.querySelectorAll('mjx-container').length,
      badFormulas: cell.querySelectorAll('mjx-merror').length,
    })),
  };
}"""
# Every code cell has its number, or one shows an error, after which JupyterLab runs no other.
ENDED = r"""() => {
  const panel = document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden)');
  const prompts = [...panel.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(p => p.textContent.trim());
  const ERROR = /Traceback \(most recent call last\)|Cell In\[\d+\], line/;
  const failed = [...panel.querySelectorAll('.jp-CodeCell .jp-OutputArea-output')].some(o => ERROR.test(o.innerText));
  return failed || (prompts.length > 0 && prompts.every(p => /^\[\d+\]:?$/.test(p)));
}"""


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.timeout(5 * START_SECONDS + RUN_SECONDS)
@pytest.mark.parametrize("number", ["00", "04"])
def test_run_all_cells(number, browser_path, lab, tmp_path):
    from playwright.sync_api import TimeoutError as PlaywrightTimeout
    from playwright.sync_api import sync_playwright

    lesson = profiles.lesson(number)
    committed = [cell for cell in index.read(index.notebook_path(lesson)).cells]
    name = f"{lesson['id']}.ipynb"
    served = lab.served_path(name)
    assert served, f"`course lab` does not serve {name}:\n{lab.tail()}"
    on_disk = lab.work / served
    assert on_disk.is_file(), f"{name} is not in the working folder {lab.work}"

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, headless=True, args=BROWSER_ARGUMENTS)
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            page.goto(f"{lab.url}/lab/tree/{served}?token={TOKEN}", timeout=START_SECONDS * 1000)
            page.locator(".jp-NotebookPanel:visible .jp-Cell").nth(len(committed) - 1).wait_for(
                state="attached", timeout=START_SECONDS * 1000
            )
            # A reader who runs nothing sees the stored figures, drawings included.
            wanted = [expected_figures(cell) for cell in committed if cell.cell_type == "code"]
            deadline = time.monotonic() + 60
            while fewer_figures(page.evaluate(READ_PAGE)["code"], wanted) and time.monotonic() < deadline:
                page.wait_for_timeout(250)
            assert fewer_figures(page.evaluate(READ_PAGE)["code"], wanted) == [], "before the first run"
            # Clearing makes sure that what is read below was made by this run.
            menu(page, "Edit", "Clear Outputs of All Cells")
            assert not [cell for cell in page.evaluate(READ_PAGE)["code"] if cell["figures"] or cell["text"]]
            deadline = time.monotonic() + START_SECONDS
            while not lab.idle() and time.monotonic() < deadline:
                page.wait_for_timeout(250)
            assert lab.idle(), f"the kernel did not start:\n{lab.tail()}"

            menu(page, "Run", "Run All Cells")
            try:
                page.wait_for_function(ENDED, timeout=RUN_SECONDS * 1000, polling=1000)
            except PlaywrightTimeout:
                prompts = [cell["prompt"] for cell in page.evaluate(READ_PAGE)["code"]]
                pytest.fail(f"{name} did not end within {RUN_SECONDS} s; its code cells say {prompts}")
            # The last outputs, figures and formulas may still be on their way into the page.
            deadline = time.monotonic() + 60
            while True:
                seen = page.evaluate(READ_PAGE)
                if problems(seen, committed, number, wanted) == [] or time.monotonic() > deadline:
                    break
                page.wait_for_timeout(1000)
            page.keyboard.press("Control+s")
            while None in (counts := saved_counts(on_disk) or [None]) and time.monotonic() < deadline:
                page.wait_for_timeout(500)
            page.screenshot(path=tmp_path / "lab.png")
        finally:
            browser.close()

    assert problems(seen, committed, number, wanted) == []
    assert counts == list(range(1, len(wanted) + 1)), "the saved notebook holds another run than the page"


def fewer_figures(code, wanted):
    """Which code cells of the page show fewer figures than the committed notebook."""
    return [
        f"code cell {count} shows {cell['figures']} figures, the committed notebook {figures}"
        for count, (cell, figures) in enumerate(zip(code, wanted, strict=True), 1)
        if cell["figures"] < figures
    ]


def problems(seen, committed, number, wanted):
    """What a learner would find wrong with the page after Run All Cells; ``wanted`` figures for each code cell."""
    code, found = seen["code"], []
    if len(code) != len(wanted):
        return [f"{len(code)} code cells in the page, {len(wanted)} in the notebook"]
    found += fewer_figures(code, wanted)
    for count, cell in enumerate(code, 1):
        found += [f"code cell {count} shows an error: {text[-500:]}" for text in cell["errors"]]
        if cell["prompt"].rstrip(":") != f"[{count}]":
            found.append(f"code cell {count} is marked {cell['prompt']!r}")
    if sum(wanted) < 3:
        found.append(f"the committed notebook has {sum(wanted)} figures in all")

    said = "\n".join(cell["text"] for cell in code)
    for name, (expected, _) in exercises.CHECKS.items():
        if name.startswith(f"{number}.") and f"{name}  to do: {expected}" not in " ".join(said.split("\n")):
            found.append(f"the check of exercise {name} does not say what is expected")
    if not code[-1]["text"].strip():
        found.append("the finish cell shows nothing")

    prose = [cell.source for cell in committed if cell.cell_type == "markdown"]
    if len(prose) != len(seen["markdown"]):
        return found + [f"{len(seen['markdown'])} markdown cells in the page, {len(prose)} in the notebook"]
    for cell, source in zip(seen["markdown"], prose, strict=True):
        if not cell["text"].strip():
            found.append(f"a markdown cell is not rendered: {source[:60]!r}")
        if cell["badFormulas"] or (re.search(r"(?<![\\`])\$[^$`\n]*\\[a-z]", source) and not cell["formulas"]):
            found.append(f"a formula is not rendered: {source[:60]!r}")
    return found


def menu(page, title, item):
    page.locator(".lm-MenuBar-itemLabel").get_by_text(title, exact=True).click()
    page.locator(".lm-Menu .lm-Menu-itemLabel").get_by_text(item, exact=True).click()
