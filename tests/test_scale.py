"""Several processes: copies (DDP) and parts (FSDP) of a model train like one whole; states go on anywhere."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import HANDLED, ROOT, VOCAB, ranks

import model
import train
from export import read_any
from model import load_checkpoint, model_from_checkpoint, numbered
from train import TrainConfig

FLAGS = [
    "--vocab_source=custom",
    f"--vocab_size={VOCAB}",
    "--dim=32",
    "--n_layers=2",
    "--n_heads=4",
    "--n_kv_heads=2",
    "--multiple_of=8",
    "--max_seq_len=64",
    "--batch_size=4",
    "--gradient_accumulation_steps=4",
    "--device=cpu",
    "--learning_rate=1e-2",
    "--decay_lr=False",
    "--dropout=0.1",
    "--eval_interval=2",
    "--eval_iters=3",
    "--init_from=auto",
]
PPO = [
    "--ppo",
    "--init_from=resume",
    "--device=cpu",
    "--batch_size=5",
    "--rollout_size=20",
    "--gradient_accumulation_steps=1",
    "--max_gen_len=24",
    "--target_len=20",
    "--start_len=8",
    "--eval_interval=1",
    "--eval_iters=1",
    "--eval_samples=1",
    "--critic_warmup_epochs=2",
    "--learning_rate=1e-3",
    "--decay_lr=False",
]


@pytest.fixture(autouse=True)
def signals():
    """train.main takes over Ctrl-C."""
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def launch(nproc: int, flags: list, *torchrun: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    return subprocess.Popen(
        [*command, *torchrun, str(ROOT / "train.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def run(nproc: int, flags: list) -> str:
    """train.py in this process, or in nproc others; returns what those print."""
    if not nproc:
        train.main(flags)
        return ""
    with tempfile.TemporaryDirectory() as folder:
        return ranks(nproc, flags, Path(folder, "out"))


def metrics(folder: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def assert_like(one: Path, other: Path, name: str, atol: float) -> None:
    a, b = (load_checkpoint(folder / name) for folder in (one, other))
    assert a["iter_num"] == b["iter_num"]
    for key, tensor in a["model"].items():
        torch.testing.assert_close(b["model"][key], tensor, atol=atol, rtol=0)
    for i, state in a["optimizer"]["state"].items():
        for key, tensor in state.items():
            torch.testing.assert_close(b["optimizer"]["state"][i][key], tensor, atol=atol, rtol=1e-3)


# ---- pretraining -----------------------------------------------------------------------------------------


def test_a_run_goes_from_one_process_to_parts_on_two_and_four_and_back(data_dir, tmp_path):
    """Every step's loss, weights and moments are those of a run in one process, whoever takes over."""
    one, other = tmp_path / "one", tmp_path / "other"
    run(0, [*FLAGS, f"--data_dir={data_dir}", f"--out_dir={one}", "--max_iters=10"])
    there = [*FLAGS, f"--data_dir={data_dir}", f"--out_dir={other}"]
    run(0, [*there, "--max_iters=2"])
    run(2, [*there, "--max_iters=4", "--fsdp", "--keep=2"])
    assert [Path(path).name for _, path in numbered(str(other), "last")] == [
        "last-00000002.pt",
        "last-00000004.dcp",
    ]
    assert not (other / "last.pt").exists()
    out = run(4, [*there, "--max_iters=6", "--fsdp", "--keep=1"])
    assert "last-00000004.dcp, iteration 4" in out
    run(0, [*there, "--max_iters=8"])
    assert numbered(str(other), "last") == [] and (other / "last.pt").exists()
    run(2, [*there, "--max_iters=10"])
    for name in ("loss/train", "grad_norm", "loss/val"):
        assert metrics(other, name) == pytest.approx(metrics(one, name), rel=2e-6)
    assert_like(one, other, "last.pt", 2e-6)
    assert (other / "model.bin").stat().st_size == (one / "model.bin").stat().st_size


def children(pid: int) -> list[int]:
    """Of torchrun: its ranks, in order."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(p) for p in found if b"train.py" in Path(f"/proc/{p}/cmdline").read_bytes()]


def wait_for(condition, process: subprocess.Popen) -> None:
    """Until condition() or the process has ended; no time limit of its own decides."""
    while not condition() and process.poll() is None:
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("fsdp", [[], ["--fsdp"]])
def test_a_killed_rank_is_started_again_and_goes_on(fsdp, data_dir, tmp_path):
    """torchrun --max-restarts: the run ends where an undisturbed one does, although --init_from=scratch."""
    flags = [*FLAGS[:-1], f"--data_dir={data_dir}", "--max_iters=14"]
    run(0, [*flags, f"--out_dir={tmp_path / 'whole'}"])
    out_dir = tmp_path / "killed"
    process = launch(2, [*flags, *fsdp, f"--out_dir={out_dir}"], "--max-restarts=2")
    log = out_dir / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("loss/train") > 5, process)
    with contextlib.suppress(ProcessLookupError):
        os.kill(children(process.pid)[1], signal.SIGKILL)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0 and ", iteration " in out, out
    assert metrics(out_dir, "loss/train") == pytest.approx(
        metrics(tmp_path / "whole", "loss/train"), rel=1e-4
    )
    assert metrics(out_dir, "loss/val") == pytest.approx(metrics(tmp_path / "whole", "loss/val"), rel=1e-4)


def test_fsdp_needs_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="torchrun --standalone --nproc_per_node=2 train.py"):
        train.set_up(TrainConfig(fsdp=True))


# ---- states in parts -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(data_dir, tmp_path_factory) -> Path:
    """out_dir of a run of two ranks with --fsdp."""
    out_dir = tmp_path_factory.mktemp("parts")
    run(2, [*FLAGS, f"--data_dir={data_dir}", f"--out_dir={out_dir}", "--max_iters=2", "--fsdp"])
    return out_dir


def test_a_state_in_parts_reads_whole(parts):
    state, best = load_checkpoint(parts / "last-00000002.dcp"), load_checkpoint(parts / "ckpt.pt")
    taken = read_any(f"{parts / 'last-00000002.dcp'}/")["model"]  # export.py takes such a folder, too
    assert all(torch.equal(taken[name], tensor) for name, tensor in state["model"].items())
    assert state["iter_num"] == best["iter_num"] == 2
    whole, exported = model_from_checkpoint(state), model_from_checkpoint(best)
    for name, p in whole.state_dict().items():
        assert torch.equal(exported.state_dict()[name], p)
    assert len(state["optimizer"]["state"]) == len(list(whole.parameters()))
    assert all(s["exp_avg_sq"].any() for s in state["optimizer"]["state"].values())


def test_a_state_in_parts_can_be_named_with_a_slash(data_dir, parts, tmp_path):
    flags = [*FLAGS, f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--max_iters=0", "--fsdp"]
    out = run(1, [*flags, f"--init_from={parts / 'last-00000002.dcp'}/"])  # as shells complete it
    assert metrics(tmp_path, "loss/val") == metrics(parts, "loss/val")[-1:], out


def test_a_state_in_parts_is_replaced_by_its_like_at_once(tmp_path, monkeypatch):
    """Killed while the old one of the same iteration is deleted: the new one is there."""
    path = str(tmp_path / "last-00000001.dcp")
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        rest = {"iter_num": 1, "model_args": {"tie_embeddings": False}, "optimizer": {}, "config": {}}
        model.save_sharded(path, {"model/w": torch.zeros(2)}, rest)

        def killed(folder, **_):
            if os.path.exists(folder) and not folder.endswith(".tmp"):
                raise KeyboardInterrupt

        monkeypatch.setattr(model.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            model.save_sharded(path, {"model/w": torch.ones(2)}, rest)
    finally:
        torch.distributed.destroy_process_group()
    ((_, newest),) = numbered(str(tmp_path), "last")
    assert load_checkpoint(newest)["model"]["w"].tolist() == [1, 1]


def test_damage_to_a_state_in_parts_is_noticed(parts, tmp_path, rng):
    for i, name in enumerate(sorted(os.listdir(parts / "last-00000002.dcp"))):
        folder = shutil.copytree(parts / "last-00000002.dcp", tmp_path / f"{i}.dcp")
        data = bytearray((folder / name).read_bytes())
        if name == "rest.pt":  # a zip archive, which has bytes of no meaning
            del data[-1000:]
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(data)
        with pytest.raises(SystemExit, match="cannot be read as a checkpoint"):
            load_checkpoint(folder)
        if name == ".metadata":  # a pickle: it is not loaded unseen, also where the rest is not checked
            with pytest.raises(SystemExit, match="the checksum of .metadata is wrong"):
                load_checkpoint(folder, lazily=True, check=False)
        (folder / name).unlink()
        with pytest.raises(SystemExit, match="no checkpoint|cannot be read as a checkpoint"):
            load_checkpoint(folder)


def test_an_index_that_runs_code_is_refused(parts, tmp_path):
    folder = shutil.copytree(parts / "last-00000002.dcp", tmp_path / "evil.dcp")

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    (folder / ".metadata").write_bytes(pickle.dumps(Attack()))
    rest = torch.load(folder / "rest.pt", weights_only=True)
    from model import crc_of

    rest["crc32"][".metadata"] = crc_of(folder / ".metadata")
    torch.save(rest, folder / "rest.pt")
    with pytest.raises(SystemExit, match="posix.mkdir|nt.mkdir"):
        load_checkpoint(folder)
    assert not (tmp_path / "owned").exists()


def test_restarts_go_on_with_their_own_run_only(data_dir, tmp_path, monkeypatch):
    """torchrun starts a refused command again, too: it must not take over the run that was there."""
    flags = [*FLAGS[:-1], f"--data_dir={data_dir}", f"--out_dir={tmp_path}"]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    run(0, [*flags, "--max_iters=2"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run(0, [*flags, "--max_iters=4"])
    assert load_checkpoint(tmp_path / "last.pt")["iter_num"] == 4
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    with pytest.raises(SystemExit, match="is a run already"):
        run(0, [*flags, "--max_iters=6"])


def test_ranks_that_see_different_states_stop(monkeypatch):
    runtime = train.Runtime("cpu", torch.float32, False, rank=1, world_size=2)
    monkeypatch.setattr(train.Runtime, "broadcast", lambda self, value: ("last.pt", 8))
    monkeypatch.setattr(train.Runtime, "total", lambda self, *values: list(map(float, values)))
    train.agree_on(runtime, "out/last.pt", {"iter_num": 8}, "out")
    for path, state in (("", {}), ("out/last.pt", {"iter_num": 4})):
        with pytest.raises(SystemExit, match="share"):
            train.agree_on(runtime, path, state, "out")


def test_a_damaged_state_in_parts_is_replaced_and_whole_ones_are_kept(parts, data_dir, tmp_path):
    """Of two states the newer is damaged: the run goes on from the older, and what it keeps is whole."""
    out_dir = shutil.copytree(parts, tmp_path / "out")
    flags = [*FLAGS, f"--data_dir={data_dir}", f"--out_dir={out_dir}", "--fsdp", "--keep=2"]
    run(2, [*flags, "--max_iters=4"])
    (out_dir / "last-00000009.dcp.tmp").mkdir()  # what a kill may leave
    newest = out_dir / "last-00000004.dcp" / "__1_0.distcp"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    out = run(2, [*flags, "--max_iters=4"])
    assert "passed over" in out and "from " in out and "last-00000002.dcp, iteration 2" in out
    states = numbered(str(out_dir), "last")
    assert [(i, load_checkpoint(path)["iter_num"]) for i, path in states] == [(2, 2), (4, 4)]
    assert not list(out_dir.glob("*.tmp"))


# ---- PPO -------------------------------------------------------------------------------------------------


def test_ppo_in_parts_equals_one_process(data_dir, tmp_path):
    base = tmp_path / "base"
    run(0, [*FLAGS, f"--data_dir={data_dir}", f"--out_dir={base}", "--max_iters=2"])
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        shutil.copy(base / "ckpt.pt", tmp_path / name)
    one, other = tmp_path / "one", tmp_path / "other"
    flags = [*PPO, f"--data_dir={data_dir}"]
    run(0, [*flags, f"--out_dir={one}", "--ppo_iters=4"])
    run(2, [*flags, f"--out_dir={other}", "--ppo_iters=2", "--fsdp"])
    assert not (other / "ppo_ckpt.pt").exists()
    run(4, [*flags, f"--out_dir={other}", "--ppo_iters=3", "--fsdp"])
    run(0, [*flags, f"--out_dir={other}", "--ppo_iters=4"])
    for name in ("ppo/reward", "ppo/kl", "ppo/grad_norm", "ppo/eval/J"):
        assert metrics(other, name) == pytest.approx(metrics(one, name), rel=1e-3, abs=1e-4)
    assert_like(one, other, "ppo_ckpt.pt", 2e-5)


def test_exact_end_in_parts_equals_one_process(data_dir, tmp_path):
    base = tmp_path / "base"
    run(0, [*FLAGS, f"--data_dir={data_dir}", f"--out_dir={base}", "--max_iters=2"])
    shutil.copytree(base, tmp_path / "other")
    flags = [*PPO, f"--data_dir={data_dir}", "--ppo_iters=2", "--exact_end"]
    run(0, [*flags, f"--out_dir={base}"])
    run(2, [*flags, f"--out_dir={tmp_path / 'other'}", "--fsdp"])
    for name in ("ppo/reward", "ppo/kl", "ppo/grad_norm", "ppo/eval/J"):
        assert metrics(tmp_path / "other", name) == pytest.approx(metrics(base, name), rel=1e-3, abs=1e-4)


def test_ppo_in_parts_says_which_critics_it_knows(data_dir, tmp_path):
    base = tmp_path / "base"
    run(0, [*FLAGS, f"--data_dir={data_dir}", f"--out_dir={base}", "--max_iters=2"])
    with pytest.raises(SystemExit, match="--critic=reference"):
        train.main([*PPO, f"--data_dir={data_dir}", f"--out_dir={base}", "--fsdp", "--critic=shared"])
