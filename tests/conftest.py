"""What the tests share: a small data folder of made-up stories, run, and where real data would be."""

import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # every core has a worker
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for --deterministic; read at the first product
VOCAB = 384  # of the small data folder


def needs_cuda(function):
    """Skips the test where PyTorch sees no GPU."""
    import torch  # slow, and not every test file needs it

    return pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(function)


def shared_data(name: str) -> Path:
    """A file of real weights or stories that may lie beside the project; skips the test where it doesn't."""
    path = ROOT.parent / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"needs {path}, which is not part of the project")
    return path


def made_once(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that make fills, for all of xdist's workers: the first that comes does it, the others wait."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    try:
        folder.mkdir()
    except FileExistsError:
        patience = time.monotonic() + 600  # the other one may have been killed
        while not (folder / "ended").exists():
            assert time.monotonic() < patience, f"{folder} was begun and is not made"
            time.sleep(0.1)
    else:
        try:
            make(folder)
        finally:
            (folder / "ended").touch()
    return folder


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
    flags = ["-std=c11", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]

    def make(folder: Path) -> None:
        command = [cc, *flags, "-o", folder / "run", ROOT / "run.c", "-lm", "-lpthread"]
        build = subprocess.run(command, capture_output=True, text=True)
        assert build.returncode == 0, build.stderr

    return made_once(tmp_path_factory, "run", make) / "run"


@pytest.fixture
def rng() -> random.Random:
    return random.Random(0)


HANDLED = signal.SIGINT, signal.SIGTERM, signal.SIGHUP  # what a run takes over


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


def as_rank(rank: int, count: int, port: int, out: str, flags: list[str]) -> None:
    """train.py in this process, as one of several; what it prints is added to the file out."""
    file = os.open(out, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch

    import train

    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    sys.argv = ["train.py", *flags]
    train.main(flags)


def ranks(count: int, flags: list[str], out: Path) -> str:
    """Runs train.py in so many processes, which meet as torchrun's do; returns what they print, also in out.

    They are forked from one that has torch loaded: loading it in each would take most of a test's time.
    """
    # elsewhere than on Linux, what is loaded may not bear forking
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        slow = [f"torch.distributed.{x}" for x in ("checkpoint.state_dict", "device_mesh", "fsdp", "tensor")]
        context.set_forkserver_preload(["conftest", "train", *slow])
    with socket.create_server(("127.0.0.1", 0)) as server:
        rest = count, server.getsockname()[1], str(out), flags
    out.touch()
    processes = [context.Process(target=as_rank, args=(i, *rest), daemon=True) for i in range(count)]
    with pytest.MonkeyPatch.context() as patch:  # the server starts here, and finds modules by this alone
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}", prepend=os.pathsep)
        for process in processes:
            process.start()
    left = {process.sentinel: process for process in processes}
    while left:
        for ended in (found := multiprocessing.connection.wait(left, timeout=240)):
            left.pop(ended).join()
        if not found or any(process.exitcode for process in processes):  # the others would wait for it
            for process in left.values():
                process.kill()
    text = out.read_text(encoding="utf-8")
    assert [process.exitcode for process in processes] == [0] * count, text
    return text
