"""The two cheapest checks of tests/bench/gpu_check.py on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

GPU_CHECK = next(path for path in (Path(__file__).with_name("gpu_check.py"),
                                   Path(__file__).parent / "bench" / "gpu_check.py")
                 if path.exists())


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Exit status, stdout and gpu_check.json of a run of two checks and one that needs CUDA."""
    cwd = tmp_path_factory.mktemp("gpu_check")
    result = subprocess.run(
        [sys.executable, str(GPU_CHECK), "--device=cpu",
         "--only=parity_float32,kv_cache,float16"], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, json.loads((cwd / "gpu_check.json").read_text())


def test_cheap_checks_pass_on_a_cpu(report):
    rows = {row["check"]: row for row in report[1]["checks"]}
    assert {name: row["result"] for name, row in rows.items()} == {
        "parity_float32": "ok", "kv_cache": "ok", "float16": "skipped"}
    assert rows["parity_float32"]["figures"]["max loss difference"] < 1e-3
    assert rows["kv_cache"]["figures"]["equal"] == rows["kv_cache"]["figures"]["tokens"]


def test_unknown_check_is_an_error():
    result = subprocess.run([sys.executable, str(GPU_CHECK), "--only=speed"], capture_output=True,
                            text=True)
    assert result.returncode == 2 and "choose from machine, parity_float32" in result.stderr
