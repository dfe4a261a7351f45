"""Runs killed at random moments, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "kill_campaign.py"


def test_three_killed_runs_continue_bit_for_bit():
    result = subprocess.run(
        [sys.executable, str(TOOL), "--points", "3", "--steps", "60", "--seed", "4"],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 of 3 continuations are identical" in result.stdout
