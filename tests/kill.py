"""kill -9 at random moments, of every stage: afterwards each file is whole, and the same command goes on.

    python tests/kill.py --kills=200 --seed=1          # all stages, and a table of them
    python tests/kill.py --kills=50 --stage=ppo

First each stage runs undisturbed, for reference. Then the same command is killed, its whole process group, at
moments drawn from all of its duration, or just as a file appears under a new name; is run again until it ends
by itself; and must end in the same result to the last bit (but for clock times). After every kill what lies
under its own name must be whole, and no state may be older than before. The seed draws the same moments
again, but not the same luck: another run may be cut off elsewhere.

Commands run in forks of this process, which has imported all there is: a kill during Python's imports would
find nothing that is being written. Not for: power failures, which may lose what was not yet on the disk.
"""

import argparse
import gzip
import hashlib
import http.server
import importlib
import io
import json
import math
import os
import random
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import requests  # noqa: F401 (for the forks)
import sentencepiece
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # this process must not start threads: its forks could not

CLOCK = ("tok/s", "time", "seconds", "mfu")  # what is measured, and differs from run to run
TRAIN = ["train.py", "--vocab_source=custom", "--vocab_size=320", "--device=cpu"]
SHAPE = ["--dim=16", "--n_layers=1", "--n_heads=2", "--n_kv_heads=1", "--multiple_of=4", "--max_seq_len=32",
         "--dropout=0.1", "--batch_size=8", "--gradient_accumulation_steps=2", "--warmup_iters=4",
         "--learning_rate=1e-2", "--max_iters=20", "--eval_interval=3", "--eval_iters=2"]
PPO = ["--ppo", "--init_from=resume", "--max_gen_len=24", "--target_len=20", "--rollout_size=8",
       "--batch_size=4", "--ppo_iters=5", "--eval_interval=2", "--eval_iters=2", "--eval_samples=2"]


@dataclass
class Stage:
    """A command, the files that it needs, and how often it fell and rose again."""

    name: str
    argv: list[str]
    share: int  # of the kills
    inputs: tuple[str, ...] = ()  # from the common folder
    done: str = "no line says so"  # exit code 1 with this means that it is complete already
    kills: int = 0
    runs: int = 0  # that ended by themselves, each compared with the reference
    failures: list[str] = field(default_factory=list)


STORIES = ("data/TinyStories_all_data",)
VOCAB = (*STORIES, "data/tok320.model")
PRETOKENIZE = ["tinystories.py", "pretokenize", "--vocab_size=320", "--num_workers=2"]
SYNTH = ["tinystories.py", "synth", "--num_stories=6000", "--num_shards=4"]
THERE = "already holds stories"


def stages(url: str) -> list[Stage]:
    return [
        Stage("download", ["tinystories.py", "download", f"--url={url}/stories.tar.gz",
                           f"--tokenizer_url={url}/tokenizer.model"], 12),
        Stage("import", ["tinystories.py", "import", "stories.jsonl", "--num_shards=3"], 10,
              ("stories.jsonl",), THERE),
        Stage("synth", [*SYNTH, "--seed=2", "--force"], 8, STORIES),
        Stage("synth part", [*SYNTH, "--shard=1/2", "--data_dir=part"], 8, ("part",), THERE),
        Stage("train_vocab", ["tinystories.py", "train_vocab", "--vocab_size=320"], 6, STORIES),
        Stage("pretokenize", PRETOKENIZE, 10, VOCAB),
        Stage("tokens part", [*PRETOKENIZE, "--shard=2/2", "--data_dir=half"], 8, ("half",)),
        Stage("train", [*TRAIN, *SHAPE, "--init_from=auto"], 25, (*VOCAB, "data/tok320")),
        Stage("ppo", [*TRAIN, *PPO], 25, (*VOCAB, "data/tok320", "out/ckpt.pt")),
        Stage("export", ["export.py", "out/model8.bin", "--version=2"], 6, ("out/ckpt.pt",)),
        Stage("tokenizer", ["tokenizer.py", "--tokenizer-model=data/tok320.model"], 6, VOCAB[1:]),
    ]


# ---- processes ---------------------------------------------------------------------------------------

def start(argv: list[str], folder: Path, threads: int = 1) -> int:
    """Run a command of this project in a fork of its own process group, in `folder`. Returns its pid."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(threads)
        sys.argv = list(argv)
        importlib.import_module(argv[0].removesuffix(".py")).main()
        code = 0
    except SystemExit as e:
        code = 0 if e.code is None else 1
        print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def names(folder: Path) -> set[tuple[str, int]]:
    """What lies in a folder: another set as soon as a file appears, is renamed, or goes."""
    found, todo = set(), [str(folder)]
    while todo:
        try:
            with os.scandir(todo.pop()) as entries:
                for entry in entries:
                    found.add((entry.path, entry.inode()))
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
        except FileNotFoundError:
            pass
    return found


def wait(pid: int, folder: Path, after: float = math.inf, change: int = 0) -> tuple[int | None, float, int]:
    """Wait for the process to end, or kill it and its group `after` seconds, or at the n-th change of names.

    Returns its exit code (None: killed), how long it took, and the changes that were seen.
    """
    began, changes, before = time.perf_counter(), 0, names(folder)
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), time.perf_counter() - began, changes
        now = names(folder)
        changes += now != before
        before = now
        if time.perf_counter() - began > after or change and changes >= change:
            kill_group(pid)
            return None, time.perf_counter() - began, changes
        time.sleep(0.001)


def kill_group(pid: int) -> None:
    try:
        os.setpgid(pid, pid)  # it may not have come to do so itself
    except (PermissionError, ProcessLookupError):
        pass
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        while True:  # its workers, which are not our children
            os.killpg(pid, 0)
            time.sleep(0.001)
    except ProcessLookupError:
        pass


# ---- what must hold ----------------------------------------------------------------------------------

def same(a, b) -> bool:
    """Equal to the last bit, but for clock times and for how the run was begun."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        skip = {k for k in a if k == "init_from" or any(word in str(k) for word in CLOCK)}
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a.keys() - skip)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b


def lines_of(path: Path) -> list[dict]:
    """The complete lines of a .jsonl; the last may have been cut off."""
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def check_pt(path: Path) -> None:
    with zipfile.ZipFile(path) as z:
        assert z.testzip() is None, "a wrong checksum"
    torch.load(path, map_location="cpu", weights_only=True)


def check_meta(path: Path) -> None:
    for shard in json.loads(path.read_text("utf-8"))["shards"]:
        data = path.with_name(shard["name"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard["sha256"] and len(data) == 2 * shard["tokens"]
        assert shard["crc32"] == "".join(f"{zlib.crc32(data[i:i + (1 << 20)]):08x}"
                                         for i in range(0, len(data), 1 << 20))


def check_weights(path: Path) -> None:
    """model.bin is as long as its header says (v0 and v2, where all heads and groups divide evenly)."""
    size, head = path.stat().st_size, path.read_bytes()[:256]
    magic, version = struct.unpack("<Ii", head[:8])
    v2 = magic == 0x616B3432
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack_from("<7i", head, 8 if v2 else 0)
    matrices = vocab * dim + layers * dim * (2 * dim + 2 * dim * kv_heads // heads + 3 * hidden)
    norms = (2 * layers + 1) * dim
    expected = 28 + 4 * (matrices + norms + context * dim // heads)
    if v2:
        assert version == 2
        expected = 256 + 4 * norms + matrices + 4 * (matrices // struct.unpack_from("<i", head, 37)[0])
    assert size == expected, f"{size} bytes, not {expected}"


def check_vocabulary(path: Path) -> None:
    data, at, count = path.read_bytes(), 4, 0
    while at < len(data):
        at, count = at + 8 + struct.unpack_from("<I", data, at + 4)[0], count + 1
    assert at == len(data) and count == 320, f"{count} pieces"


def check(path: Path) -> None:
    """Raises unless a file under its own name is whole."""
    if path.name == "meta.json":
        check_meta(path)
    elif path.suffix == ".json":
        json.loads(path.read_text("utf-8"))
    elif path.suffix == ".jsonl":
        lines_of(path)
    elif path.suffix == ".pt":
        check_pt(path)
    elif path.suffix == ".model":
        assert sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size() > 1
    elif path.suffix == ".bin" and "model" in path.name:
        check_weights(path)
    elif path.suffix == ".bin" and path.name == "tok320.bin":
        check_vocabulary(path)


def own_names(folder: Path) -> list[Path]:
    """Files under their own names: not temporary ones, nor parts of a download, nor locks."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")
            and not any(part.endswith((".tmp", ".part", ".part.json", ".old"))
                        for part in path.relative_to(folder).parts)]


def progress(folder: Path) -> dict[Path, int]:
    """The iteration of every state."""
    return {path: torch.load(path, map_location="cpu", weights_only=True)["iter_num"]
            for path in sorted(folder.rglob("*.pt"))}


def find_damage(folder: Path, before: dict[Path, int]) -> list[str]:
    """What a kill must not have done; `before` is the progress before it."""
    faults = []
    for path in own_names(folder):
        try:
            check(path)
        except Exception as e:  # whatever it is, it is the finding
            faults.append(f"{path.relative_to(folder)} is not whole: {type(e).__name__}: {e}")
    after = {} if faults else progress(folder)
    return faults + [f"{path.name} went from iteration {n} back to {after.get(path)}"
                     for path, n in before.items() if not faults and after.get(path, -1) < n]


def find_difference(folder: Path, reference: Path) -> list[str]:
    """How a finished run differs from the undisturbed one."""
    ours, theirs = ({path.relative_to(f): path for path in f.rglob("*")
                     if path.is_file() and not path.name.startswith(".")} for f in (folder, reference))
    faults = [f"{name} is only in {'one' if name in ours else 'the reference'}"
              for name in sorted(ours.keys() ^ theirs.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        pair = ours[name], theirs[name]
        if name.suffix == ".pt":
            equal = same(*(torch.load(path, map_location="cpu", weights_only=True) for path in pair))
        elif name.suffix == ".jsonl":
            equal = same(*map(lines_of, pair))
        else:
            equal = pair[0].read_bytes() == pair[1].read_bytes()
        if not equal:
            faults.append(f"{name} differs from the reference")
    return faults


# ---- what the stages start from ----------------------------------------------------------------------

def run(argv: list[str], folder: Path) -> None:
    code, _, _ = wait(start(argv, folder), folder)
    if code:
        said = folder.with_suffix(".log").read_text()
        raise SystemExit(f"{' '.join(argv)} ends with {code}: {said[-2000:]}")


def prepare(folder: Path, model: bool) -> None:
    """Everything that some stage needs, once: stories, vocabulary, tokens, and a model if that is needed."""
    run(["tinystories.py", "synth", "--num_stories=4000", "--num_shards=4"], folder)
    run(["tinystories.py", "train_vocab", "--vocab_size=320"], folder)
    run(PRETOKENIZE, folder)
    shutil.copytree(folder / "data", folder / "half", ignore=shutil.ignore_patterns("tok320"))
    run([*PRETOKENIZE, "--shard=1/2", "--data_dir=half"], folder)  # the other parts are for the stages
    run([*SYNTH, "--shard=2/2", "--data_dir=part"], folder)
    if model:
        run([*TRAIN, *SHAPE, "--dropout=0", "--max_iters=4"], folder)
    text = json.loads((folder / "data/TinyStories_all_data/data01.json").read_text("utf-8"))
    (folder / "stories.jsonl").write_text("".join(json.dumps(story) + "\n" for story in text * 6), "utf-8")
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for path in sorted((folder / "data/TinyStories_all_data").glob("*.json")):
            tar.add(path, path.name)
    (folder / "stories.tar.gz").write_bytes(gzip.compress(raw.getvalue(), mtime=0))
    shutil.copy(folder / "data/tok320.model", folder / "tokenizer.model")


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves the common folder, slowly, and knows ranges, as the real one does."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        data, first = path.read_bytes(), 0
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        if self.headers.get("If-Range") == etag:
            first = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if first else 200)
        self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(data) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        try:
            for at in range(first, len(data), len(data) // 10 + 1):
                self.wfile.write(data[at:min(at + len(data) // 10 + 1, len(data))])
                time.sleep(0.02)
        except ConnectionError:
            self.close_connection = True


def serve(folder: Path) -> tuple[int, str]:
    """A server in a process of its own: its pid and address."""
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args: Server(*args, directory=str(folder)))
    pid = os.fork()
    if not pid:
        try:
            server.serve_forever()
        finally:
            os._exit(1)
    server.socket.close()
    return pid, f"http://127.0.0.1:{server.server_port}"


def copy_inputs(stage: Stage, common: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in stage.inputs:
        source, target = common / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)


# ---- the trial ---------------------------------------------------------------------------------------

def trial(stage: Stage, folder: Path, duration: float, changes: int, kills: int, rng: random.Random) -> None:
    """Kill a fresh run up to `kills` times, let it end, compare. Adds to stage.kills, runs and failures."""
    log, reference = folder.with_suffix(".log"), folder.with_name("reference")
    before, said = progress(folder), ""
    while True:
        after, change = math.inf, 0
        if kills and rng.random() < 0.5:
            after = rng.uniform(0, duration)
        elif kills:
            change = rng.randint(1, changes)
        code, _, _ = wait(start(stage.argv, folder), folder, after, change)
        if code is not None:
            said = log.read_text("utf-8", errors="replace")
            break
        stage.kills += 1
        kills -= 1
        faults = find_damage(folder, before)
        stage.failures += faults
        if faults:
            return
        before = progress(folder)
    stage.runs += 1
    if code and stage.done not in said:
        stage.failures.append(f"ends with {code}: {said.strip()[-300:]}")
        return
    stage.failures += find_difference(folder, reference)


def torture(stage: Stage, common: Path, kills: int, rng: random.Random) -> None:
    """The reference, then trials until there were `kills` kills."""
    reference, folder = common.parent / stage.name / "reference", common.parent / stage.name / "trial"
    copy_inputs(stage, common, reference)
    code, duration, changes = wait(start(stage.argv, reference), reference)
    if code:
        stage.failures.append(f"undisturbed: {reference.with_suffix('.log').read_text()[-300:]}")
    while stage.kills < kills and len(stage.failures) < 10:
        copy_inputs(stage, common, folder)
        trial(stage, folder, duration, max(1, changes), min(rng.randint(1, 6), kills - stage.kills), rng)
    print(f"{stage.name:12} {duration:7.2f} s {stage.kills:6} {stage.runs:6} {len(stage.failures):9}")
    for fault in stage.failures:
        print(f"  {fault}", flush=True)


def main(argv: list[str] | None = None) -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--kills", type=int, default=200, help="in all, shared out to the stages (default: 200)")
    cli.add_argument("--seed", type=int, default=1, help="draws the moments (default: 1)")
    cli.add_argument("--stage", action="append", help="only this one; may be given again")
    cli.add_argument("--dir", help="work there, and leave everything as it is at the end")
    args = cli.parse_args(argv)
    for name in ("tinystories", "tokenizer", "train", "export"):
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as scratch:
        common = Path(args.dir or scratch).resolve() / "common"
        common.mkdir(parents=True)
        server, url = serve(common)
        try:
            chosen = [stage for stage in stages(url) if not args.stage or stage.name in args.stage]
            if not chosen:
                raise SystemExit(f"no such stage: {args.stage}")
            prepare(common, any("out/ckpt.pt" in stage.inputs for stage in chosen))
            model = (common / "tokenizer.model").read_bytes()  # in place of Llama 2's
            sys.modules["tinystories"].TOKENIZER_SHA256 = hashlib.sha256(model).hexdigest()
            print(f"{'stage':12} {'alone':>9} {'kills':>6} {'ended':>6} {'failures':>9}")
            for stage in chosen:
                kills = max(1, round(args.kills * stage.share / sum(s.share for s in chosen)))
                torture(stage, common, kills, random.Random(f"{args.seed}:{stage.name}"))
        finally:
            os.kill(server, signal.SIGKILL)
            os.waitpid(server, 0)
    print(f"{sum(s.kills for s in chosen)} kills, {sum(len(s.failures) for s in chosen)} failures")
    sys.exit(any(stage.failures for stage in chosen))


if __name__ == "__main__":
    main()
