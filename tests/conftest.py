"""What the tests share: a small data folder of made-up stories, run, and where real data would be."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
VOCAB = 384  # of the small data folder


def shared_data(name: str) -> Path:
    """A file of real weights or stories that may lie beside the project; skips the test where it doesn't."""
    path = ROOT.parent / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"needs {path}, which is not part of the project")
    return path


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> str:
    """300 stories in 3 shards, a vocabulary of 384 and its tokens."""
    import tinystories

    folder = str(tmp_path_factory.mktemp("data"))
    tinystories.main(["synth", "--num_stories=300", "--num_shards=3", "--data_dir", folder])
    tinystories.main(["train_vocab", f"--vocab_size={VOCAB}", "--data_dir", folder])
    tinystories.main(["pretokenize", f"--vocab_size={VOCAB}", "--data_dir", folder])
    return folder


@pytest.fixture(scope="session")
def run_program(tmp_path_factory) -> Path:
    """run.c built with -O2 and no warning, which takes a while."""
    cc = shutil.which(os.environ.get("CC", "cc"))
    if not cc:
        pytest.skip("no C compiler (cc) to build run.c with")
    program = tmp_path_factory.mktemp("build") / "run"
    flags = ["-std=c11", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    build = subprocess.run(
        [cc, *flags, "-o", program, ROOT / "run.c", "-lm", "-lpthread"], capture_output=True, text=True
    )
    assert build.returncode == 0, build.stderr
    return program


@pytest.fixture
def rng() -> random.Random:
    return random.Random(0)


def same(a, b) -> bool:
    """Equal to the last bit, tensors and plain values alike."""
    import torch  # slow, and not every test file needs it

    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
