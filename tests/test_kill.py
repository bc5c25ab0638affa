"""A short run of the kill -9 harness, tests/kill.py, and that it would find what a kill breaks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


@pytest.mark.skipif(os.name == "nt", reason="no fork")
def test_no_stage_loses_anything_to_a_kill(tmp_path):
    done = subprocess.run([sys.executable, TESTS / "kill.py", "--kills=24", "--seed=7",
                           f"--dir={tmp_path / 'work'}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^2\d kills, 0 failures$", done.stdout, re.MULTILINE), done.stdout


CARELESS = """
import contextlib, sys, time
import kill, tinystories, tokenizer

@contextlib.contextmanager
def write(path, mode="wb"):
    with open(path, mode) as f:
        yield f
        time.sleep(0.3)

tokenizer.atomic_write = tinystories.atomic_write = write
kill.main(sys.argv[1:])
"""


@pytest.mark.skipif(os.name == "nt", reason="no fork")
def test_a_file_that_is_not_whole_is_found(tmp_path):
    done = subprocess.run([sys.executable, "-c", CARELESS, "--kills=20", "--stage=tokenizer",
                           f"--dir={tmp_path / 'work'}"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(TESTS)})
    assert done.returncode == 1 and "tok320.bin is not whole" in done.stdout, done.stdout + done.stderr
