"""JupyterLab and the report in headless Chromium, as a reader meets them. Needs `pip install -e ".[lab,browser]"` and Chromium.

`make test-browser`; screenshots go to the folder $FALCON_SCREENSHOTS when it is set.
"""

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from falconlib.reporting.report import html
from falconlib.reporting.run import REPO

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TOKEN = "only-for-this-test"  # the server listens on loopback and lives as long as the test
RUN = REPO / "results" / "reference" / "quick"


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt install chromium")
    with sync_api.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # only pages of our own are opened
        yield found
        found.close()


@pytest.fixture
def page(browser):
    found = browser.new_page(viewport={"width": 1280, "height": 900})
    found.problems = []
    found.on("console", lambda m: found.problems.append(m.text) if m.type == "error" else None)
    found.on("pageerror", lambda error: found.problems.append(str(error)))
    yield found
    found.close()


def picture(page, name: str, **options) -> None:
    folder = os.environ.get("FALCON_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", **options)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The committed report, as today's code renders it."""
    target = tmp_path_factory.mktemp("report") / "report.html"
    target.write_text(html((RUN / "report.md").read_text(encoding="utf-8"), "FALCON", RUN), encoding="utf-8")
    return target.as_uri()


@pytest.fixture
def lab(tmp_path):
    """A JupyterLab as `make lab` opens it, on a copy of notebooks/ in which 00 is prepared for profile smoke; its address."""
    pytest.importorskip("jupyterlab")
    environment = {**os.environ, "FALCON_RESULTS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "falconlib", "run", "--profile", "smoke", "--prepare", "00"]
    subprocess.run(command, env=environment, cwd=REPO, check=True, capture_output=True)
    prepared = next((tmp_path / "runs" / "smoke").rglob("00_start_here.ipynb"))
    home = tmp_path / "falcon"
    shutil.copytree(REPO / "notebooks", home / "notebooks", ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copy(prepared, home / "notebooks")
    (home / "notebooks" / prepared.name).with_suffix(".py").unlink()  # jupytext refuses a pair that differs
    settings = ["--no-browser", "--ip=127.0.0.1", "--port=0", "--allow-root", f"--IdentityProvider.token={TOKEN}"]
    settings += [
        f"--ServerApp.root_dir={home}",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    environment |= {name: str(tmp_path / name) for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR")}
    environment |= {
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"),
        "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
    }
    told = tmp_path / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    told.parent.mkdir(parents=True)
    told.write_text('{"fetchNews": "false"}')  # else it asks, over the picture
    with (tmp_path / "lab.log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *settings], env=environment, stdout=log, stderr=log)
    try:
        yield address(tmp_path, server), prepared
    finally:
        server.terminate()
        server.wait(30)


def address(folder: Path, server: subprocess.Popen) -> str:
    """Waits until the server answers; where it does is in its log."""
    for _ in range(240):
        found = re.search(r"http://127\.0\.0\.1:\d+", (folder / "lab.log").read_text())
        if found:
            try:
                urllib.request.urlopen(f"{found[0]}/api?token={TOKEN}", timeout=2)
                return found[0]
            except OSError:
                pass
        assert server.poll() is None, (folder / "lab.log").read_text()
        time.sleep(0.5)
    raise AssertionError((folder / "lab.log").read_text())


def test_the_first_notebook_runs_in_jupyterlab(lab, page):
    where, prepared = lab
    page.goto(f"{where}/lab/tree/notebooks/{prepared.name}?token={TOKEN}")
    page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=120_000)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=120_000)  # cells run before that are dropped
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    manifest = prepared.parents[1] / "00_start_here" / "manifest.json"  # its last cell writes it
    for _ in range(480):
        if manifest.is_file():
            break
        page.wait_for_timeout(500)
    assert manifest.is_file(), page.locator(".jp-OutputArea-output").all_inner_texts()[-3:]
    assert page.locator(".jp-OutputArea-output img").count() >= 1 and page.locator(".jp-OutputArea-output table").count() >= 1
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    assert page.locator(".jp-DirListing-itemText", has_text="10_report.ipynb").count() == 1, "the folder of the notebooks is open"
    page.locator(".jp-OutputArea-output img").first.scroll_into_view_if_needed()
    picture(page, "jupyterlab")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_is_one_clean_page(page, report, width):
    page.set_viewport_size({"width": width, "height": 900})
    fetched = []
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(report)
    assert page.problems == [] and [url for url in fetched if not url.startswith(("file:", "data:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "the page scrolls sideways"
    assert page.evaluate(
        "[...document.images].length > 0 && [...document.images].every(i => i.complete && i.naturalWidth && i.alt)"
    )
    picture(page, f"report-{width}")


def test_a_table_of_the_report_sorts_by_a_click(page, report):
    page.goto(report)
    table = page.locator("table").last  # stage, seconds
    column = "rows => rows.map(r => parseFloat(r.cells[1].textContent))"
    rows = table.locator("tbody tr")
    before = rows.evaluate_all(column)
    known = [value for value in before if value == value]  # the report's own time is not known while it is written
    for descending in (False, True):
        table.locator("th button").nth(1).click()
        after = rows.evaluate_all(column)
        assert after[: len(known)] == sorted(known, reverse=descending) != before[: len(known)] and len(after) == len(before)
