"""The inputs in tests/corpus, through tests/fuzz.c on a build with sanitizers, by any C compiler: what the
fuzzer began with, and what ever failed. Not here: looking for more, which `make fuzz` does.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "tests" / "corpus"
TARGETS = ["model", "tokenizer", "prompt", "cli"]
CHECKS = ["-fsanitize=address,undefined,float-cast-overflow,float-divide-by-zero",
          "-fno-sanitize-recover=all"]
ENV = dict(os.environ, UBSAN_OPTIONS="print_stacktrace=1")


@pytest.fixture(scope="module")
def replay(tmp_path_factory):
    cc = shutil.which(os.environ.get("CC", "cc"))
    if not cc:
        pytest.skip("no C compiler (cc) to build tests/fuzz.c with")
    out = tmp_path_factory.mktemp("fuzz")
    probe = subprocess.run([cc, *CHECKS, "-xc", "-", "-o", str(out / "probe")],
                           input="int main(void){return 0;}", text=True, capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("the C compiler has no -fsanitize=address,undefined (libasan, libubsan)")
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    build = subprocess.run(  # not optimized: compiling takes longer than running all the inputs
        [cc, "-std=c11", "-g", "-O0", "-DSMALL", *warnings, *CHECKS, f"-I{ROOT}", "-o", str(out / "replay"),
         str(ROOT / "tests" / "fuzz.c"), "-lm", "-lpthread"], capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stderr
    return out / "replay"


def run(replay, target, paths):
    return subprocess.run([str(replay), target, *map(str, paths)], capture_output=True, env=ENV,
                          timeout=120, check=False)


@pytest.mark.parametrize("target", TARGETS)
def test_corpus(replay, target):
    paths = sorted((CORPUS / target).iterdir())
    assert len(paths) > 10
    if run(replay, target, paths).returncode == 0:
        return
    for path in paths:  # which one it was
        r = run(replay, target, [path])
        assert r.returncode == 0, f"{path}\n{r.stderr.decode(errors='replace')}"


def test_every_target_has_a_corpus(replay):
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)
    assert run(replay, "other", []).returncode == 2


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_fuzz_without_clang(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "run.c", tmp_path)
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "fuzz.c", tmp_path / "tests")
    r = subprocess.run(["make", "-s", "fuzz", "FUZZ_CC=no-such-compiler"], cwd=tmp_path, capture_output=True,
                       text=True, timeout=60, check=False)
    assert r.returncode != 0 and "needs clang" in r.stdout and r.stdout.count("\n") == 1
