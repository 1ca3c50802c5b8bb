"""The tutorials of docs/tutorials: their list, their form, their links, and (marked slow) their execution as scripts.

Building the documentation executes them as notebooks.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "tutorials"
TUTORIALS = [
    "01_prices_to_scores",
    "02_qlib_project",
    "03_gats_whole_market",
    "04_live_tcn",
    "05_rolling_study",
    "06_own_model",
    "07_training_control",
    "08_own_factors",
    "09_several_processes",
]
SECONDS = 600  # wall-clock limit of one tutorial, which takes a few seconds on an idle machine
CELL = re.compile(r"^# %%(?: alt=\"[^\"\n]*\")?( \[markdown\])?\n(.*?)(?=^# %%|\Z)", flags=re.M | re.S)


def cells(name: str) -> list[tuple[bool, str]]:
    """(is Markdown, text) of each cell. Markdown is without its comment signs."""
    found = CELL.findall((FOLDER / f"{name}.py").read_text())
    return [(bool(kind), re.sub(r"^# ?", "", text, flags=re.M) if kind else text) for kind, text in found]


def test_the_list_is_complete():
    assert [file.stem for file in sorted(FOLDER.glob("*.py"))] == TUTORIALS


@pytest.mark.parametrize("name", TUTORIALS)
def test_form(name):
    """A title, a picture on white, a temporary folder that is removed, and a list of pages at the end."""
    parts = cells(name)
    code = "".join(text for is_markdown, text in parts if not is_markdown)
    assert parts[0][0]
    assert parts[0][1].startswith("# ")
    assert parts[-1][0]
    assert parts[-1][1].startswith("## What to read next\n")
    assert "plt.show()" in code
    text = (FOLDER / f"{name}.py").read_text()
    assert len(re.findall(r'^# %% alt="[^"\n]{20,}"$', text, flags=re.M)) == code.count("plt.show()")
    assert 'plt.rcParams["figure.facecolor"] = "white"' in code
    assert code.rstrip().endswith("os.chdir(start)\nfolder.cleanup()")


@pytest.mark.parametrize("name", TUTORIALS)
def test_links_lead_to_files(name):
    text = "".join(text for is_markdown, text in cells(name) if is_markdown)
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert len(links) >= 3
    assert [link for link in links if not (FOLDER / link).is_file()] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", TUTORIALS)
def test_runs_as_a_script(name, tmp_path):
    work, temporary = tmp_path / "work", tmp_path / "temporary"
    work.mkdir()
    temporary.mkdir()
    environment = {
        **os.environ,
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore:FigureCanvasAgg is non-interactive:UserWarning",
        "TMPDIR": str(temporary),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),  # otherwise torch creates it in TMPDIR
    }
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py")],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) >= 5
    assert str(tmp_path) not in done.stdout
    assert str(ROOT) not in done.stdout
    assert list(work.iterdir()) == list(temporary.iterdir()) == []
