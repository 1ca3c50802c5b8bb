"""The report page of a run in headless Chromium: no errors, and nothing is wider than the window."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

import qfast
from qfast.workflow.demo import DEMO, demo_prices

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>
const wide = [...document.querySelectorAll("body, body *")].filter(e => e.scrollWidth > e.clientWidth + 1
  && getComputedStyle(e).display !== "inline").map(e => e.outerHTML.slice(0, 80));
const back = getComputedStyle(document.body).backgroundColor;
const width = document.documentElement.scrollWidth;
document.body.dataset.probe = JSON.stringify({wide, width, window: innerWidth, back});
</script>"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    prices = demo_prices(n_instruments=12, n_days=620)
    result = qfast.run(DEMO, data=prices, sets=["task.model.kwargs.n_epochs=1"], output=folder / "run", seed=0)
    text = result.report.read_text()
    assert '<details class="note">' in text
    assert "exposure" in text
    page = folder / "page.html"
    page.write_text(text.replace("</body>", f"{PROBE}</body>"))
    return page


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [700, 1200])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_fits_and_has_no_errors(report, width, dark):
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={width},900"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = [CHROMIUM, *options, "--dump-dom", report.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert "CONSOLE" not in ran.stderr
    probe = json.loads(re.search(r"data-probe=\"([^\"]*)\"", ran.stdout)[1].replace("&quot;", '"').replace("&lt;", "<"))
    assert probe["window"] == width
    assert probe["width"] <= width
    assert probe["wide"] == []
    assert probe["back"] == ("rgb(17, 20, 24)" if dark else "rgb(250, 250, 250)")
