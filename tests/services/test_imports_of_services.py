"""Commands that read and plan answer without torch, Ray and what else takes long to import."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "peft", "ray", "mlflow", "matplotlib", "pyarrow")


@pytest.mark.parametrize(
    "module",
    [
        "services.cli.main",
        "services.cli.leaderboard",
        "services.cli.status",
        "services.registry.exports",
        "services.registry.mlflow_runs",
        "services.registry.registry",
        "services.registry.releases",
        "services.registry.trial_facts",
        "services.registry.winner",
        "services.report.dataset_page",
        "services.report.farm_status",
        "services.report.leaderboard",
        "services.report.page",
        "services.report.sweep_report",
        "services.report.trial_sheet",
        "services.sweeps.files",
        "services.sweeps.leaderboard",
        "services.sweeps.plan",
        "services.sweeps.recipe_text",
    ],
)
def test_it_is_imported_without_what_takes_long(module: str) -> None:
    code = f"import sys\nimport {module}\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(HEAVY) & set(run.stdout.split()) == set()
