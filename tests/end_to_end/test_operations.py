"""The script of docs/develop.md: the whole job by calling operations, without the command line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from services.farm.settings import open_home
from services.registry.registry import Registry

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DEVELOP = ROOT / "docs/develop.md"
PICTURES = ROOT / "services/cli/demo/pictures/aya"


def test_the_script_in_the_docs_does_the_whole_job(
    home: Path, sweep_file: Path, environment: dict[str, str], tmp_path: Path
):
    (text,) = re.findall(r"```python\n(.*?)```", DEVELOP.read_text("utf-8"), re.DOTALL)
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) <= 40 and "rich" not in text and "typer" not in text
    script = tmp_path / "job.py"
    script.write_text(text)
    root = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(script), str(home), str(PICTURES), str(sweep_file)],
        env=environment | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert "identity" in done.stdout, "the reason for the winner"
    said = done.stderr.splitlines()
    assert {"step_taken", "checkpoint_scored", "trial_succeeded"} <= set(said)
    assert "aya: runs recorded in MLflow: done" in said
    farm = open_home(home)
    (version,) = Registry(farm.tracking_uri, farm.artifacts).versions("aya.sd15")
    assert set(version.aliases) == {"candidate", "production"}
