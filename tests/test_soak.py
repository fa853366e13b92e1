"""jobs/soak.py, a minute of which is hours: two parts, a kill and a resumption between them."""

import json
import subprocess
import sys
from pathlib import Path

import ranks

SOAK = Path(__file__).parent.parent / "jobs" / "soak.py"


def test_a_training_that_is_killed_goes_on_with_other_ranks_and_leaks_nothing(tmp_path):
    out = tmp_path / "soak.json"
    done = subprocess.run(
        [sys.executable, SOAK, "--steps", "400", "--ranks", "2,1", "--save", "50",
         "--method", "onebit:exchange=sharded", "--out", out],
        capture_output=True, text=True, timeout=ranks.JOB)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = json.loads(out.read_text())["runs"][0]["parts"]
    assert (first["ranks"], first["last_step"], second["ranks"]) == (2, 200, 1)
    assert 0 < second["resumed_from"] <= 250 and second["last_step"] == 400
    assert first["requests_posted"] > 200 and second["identical"] and first["identical"]
