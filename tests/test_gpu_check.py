"""The two cheapest checks of tests/bench/gpu_check.py on a CPU."""

import json
import subprocess
import sys

from processes import ROOT


def test_cheap_checks_pass_on_a_cpu(tmp_path):
    command = [sys.executable, ROOT / "tests" / "bench" / "gpu_check.py", "--device=cpu",
               "--only=parity_float32,kv_cache,float16"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    checks = json.loads((tmp_path / "gpu_check.json").read_text())["checks"]
    rows = {row["check"]: row for row in checks}
    assert {name: row["result"] for name, row in rows.items()} == {
        "parity_float32": "ok", "kv_cache": "ok", "float16": "skipped"}
    assert rows["parity_float32"]["figures"]["max loss difference"] < 1e-3
    assert rows["kv_cache"]["figures"]["equal"] == rows["kv_cache"]["figures"]["tokens"]
