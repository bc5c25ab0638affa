"""train.py: whole runs on a small data folder, compared with brute force and with each other."""

import errno
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import HANDLED, ROOT, VOCAB, needs_cuda, same, shared_data

import tinystories
import train
from export import read_bin, read_header
from model import ModelArgs, Transformer, load_checkpoint, model_from_checkpoint
from tokenizer import Tokenizer
from train import Runtime, TrainConfig, get_lr, parse_cli

TINY = [
    "--vocab_source=custom",
    f"--vocab_size={VOCAB}",
    "--dim=32",
    "--n_layers=2",
    "--n_heads=4",
    "--n_kv_heads=2",
    "--multiple_of=8",
    "--max_seq_len=64",
    "--batch_size=8",
    "--gradient_accumulation_steps=2",
    "--device=cpu",
    "--learning_rate=1e-2",
    "--warmup_iters=3",
    "--eval_interval=4",
    "--eval_iters=3",
]


@pytest.fixture
def fit(data_dir, tmp_path, capsys):
    """Runs train.py in this process, in out_dir tmp_path/name; returns what it printed."""
    handlers = {number: signal.getsignal(number) for number in HANDLED}

    def run(name: str, *flags: str) -> str:
        train.main([*TINY, f"--data_dir={data_dir}", f"--out_dir={tmp_path / name}", *flags])
        return "".join(capsys.readouterr())

    yield run
    torch.use_deterministic_algorithms(False)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def state(folder: Path) -> dict:
    checkpoint = load_checkpoint(folder / "last.pt")
    del checkpoint["config"]  # holds out_dir and the like
    return checkpoint


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tok/s"} for line in lines]


# ---- command line ----------------------------------------------------------------------------------------


def test_flags():
    model, cfg, ppo = parse_cli(
        ["--dim=64", "--always-save-checkpoint", "--decay_lr=False", "--compile", "--beta2", "0.9", "--ppo"]
    )
    assert model == {"dim": 64}
    assert cfg == {"always_save_checkpoint": True, "decay_lr": False, "compile": "True", "beta2": 0.9}
    assert ppo == {"ppo": True}
    assert parse_cli(["--eval_only=True", "--compile=False"])[1] == {"eval_only": True, "compile": "False"}
    assert parse_cli([]) == ({}, {}, {})


def test_every_flag_of_llama2c_has_its_default():
    theirs = {
        "out_dir": "out",
        "eval_interval": 2000,
        "log_interval": 1,
        "eval_iters": 100,
        "eval_only": False,
        "always_save_checkpoint": False,
        "init_from": "scratch",
        "wandb_log": False,
        "wandb_project": "llamac",
        "batch_size": 128,
        "max_seq_len": 256,
        "vocab_source": "llama2",
        "vocab_size": 32000,
        "dim": 288,
        "n_layers": 6,
        "n_heads": 6,
        "n_kv_heads": 6,
        "multiple_of": 32,
        "dropout": 0.0,
        "gradient_accumulation_steps": 4,
        "learning_rate": 5e-4,
        "max_iters": 100000,
        "weight_decay": 1e-1,
        "beta1": 0.9,
        "beta2": 0.95,
        "grad_clip": 1.0,
        "decay_lr": True,
        "warmup_iters": 1000,
    }
    ours = vars(TrainConfig()) | vars(train.ModelArgs())
    assert theirs.items() <= ours.items()


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--batchsize=3", "--batch_size"),
        ("--dim=big", "--dim"),
        ("--eval_only=maybe", "boolean"),
        ("7", "7"),
        ("--vocab_source=mine", "vocab_source"),
        ("--batch_size=0", "batch_size=0"),
        ("--n_heads=5", "n_heads"),
        ("--vocab_size=512", "--vocab_source=custom"),
        ("--device=tpu", "--device=cpu"),
        ("--beta1=1", "beta1"),
        ("--init_from=no.pt", "no.pt"),
        ("--init_from=resume", "nothing to resume"),
        ("--learning_rate=nan", "learning"),
        ("--dtype=float16", "float16"),
        ("--data_dir=nowhere", "tinystories.py pretokenize"),
    ],
)
def test_mistakes_are_one_line(flag, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        train.main([flag])
    assert message in str(e.value) and "\n" not in str(e.value)


# ---- parts -----------------------------------------------------------------------------------------------


def test_learning_rate():
    cfg = TrainConfig(learning_rate=1.0, warmup_iters=10, max_iters=110, min_lr=0.1)
    assert get_lr(cfg, 0) == pytest.approx(1 / 11) and get_lr(cfg, 9) == pytest.approx(10 / 11)
    assert get_lr(cfg, 10) == 1 and get_lr(cfg, 60) == pytest.approx(0.55)
    assert get_lr(cfg, 35) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert get_lr(cfg, 110) == get_lr(cfg, 1000) == 0.1
    assert get_lr(TrainConfig(decay_lr=False, learning_rate=0.3), 0) == 0.3
    assert get_lr(TrainConfig(max_iters=0, warmup_iters=0), 0) == 0


def test_only_matrices_decay():
    net = train.Transformer(train.ModelArgs(dim=32, n_layers=2, n_heads=4, vocab_size=50))
    decayed, free = train.make_optimizer(net, TrainConfig(weight_decay=0.3), "cpu").param_groups
    assert decayed["weight_decay"] == 0.3 and free["weight_decay"] == 0
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in free["params"]} == {1}
    assert len(decayed["params"]) + len(free["params"]) == len(list(net.parameters()))


class Fixed:
    """Batches from a list."""

    bytes_per_token = 2.5

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)

    def __next__(self):
        return self.batches.pop(0)


def random_batches(n: int, seed: int = 0) -> list:
    g = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(0, 50, (6, 16), generator=g) for _ in range(2)) for _ in range(n)]


@pytest.mark.parametrize("micro_batches, chunk", [(1, 10**9), (1, 32), (3, 10**9), (3, 64)])
def test_a_step_equals_adamw_by_hand(micro_batches, chunk, monkeypatch):
    """However the tokens are cut up: the mean gradient, clipped, then the update of Loshchilov and Hutter
    (2019).
    """
    monkeypatch.setattr(train, "CPU_PART_TOKENS", chunk)
    torch.manual_seed(0)
    net = train.Transformer(train.ModelArgs(dim=32, n_layers=1, n_heads=4, vocab_size=50, max_seq_len=16))
    cfg = TrainConfig(
        gradient_accumulation_steps=micro_batches, learning_rate=0.01, grad_clip=0.3, weight_decay=0.2
    )
    batches = random_batches(micro_batches)
    before = {name: p.detach().double() for name, p in net.named_parameters()}
    x, y = (torch.cat([b[i] for b in batches]) for i in (0, 1))
    double = train.Transformer(net.args).double()
    double.load_state_dict(net.state_dict())
    log_probs = double.output(double.features(x)).log_softmax(-1)
    expected_loss = -log_probs.gather(-1, y[..., None]).mean()
    expected_loss.backward()
    grads = {name: p.grad for name, p in double.named_parameters()}
    expected_norm = math.sqrt(sum(g.square().sum().item() for g in grads.values()))

    optimizer = train.make_optimizer(net, cfg, "cpu")
    runtime = Runtime("cpu", torch.float32, False)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss, norm = train.train_step(net, optimizer, scaler, Fixed(list(batches)), cfg, runtime, 0)
    assert abs(loss - expected_loss.item()) < 1e-5 and abs(norm / expected_norm - 1) < 1e-4
    assert expected_norm > 0.3
    for name, p in net.named_parameters():
        g = grads[name] * 0.3 / expected_norm
        decay = 0.2 if p.dim() == 2 else 0.0
        expected = before[name] * (1 - 0.01 * decay) - 0.01 * g / (g.abs() + 1e-8)
        clear = g.abs() > 1e-5  # below, the first step's g / |g| is rounding noise
        torch.testing.assert_close(p.detach().double()[clear], expected[clear], atol=2e-5, rtol=0)


def test_evaluation_weighs_every_token_alike():
    torch.manual_seed(0)
    net = train.Transformer(train.ModelArgs(dim=32, n_layers=1, n_heads=4, vocab_size=50, max_seq_len=16))
    batches = random_batches(3)
    batches[2][1][1:] = -1
    batches[2][1][0, 5:] = -1
    scores = train.evaluate(net, Fixed(batches), Runtime("cpu", torch.float32, False))
    nats = []
    for x, y in batches:
        log_probs = net(x)[0].detach().double().log_softmax(-1)
        nats += [-log_probs[b, t, y[b, t]].item() for b in range(6) for t in range(16) if y[b, t] >= 0]
    assert len(nats) == 2 * 96 + 5
    assert scores["loss/val"] == pytest.approx(np.mean(nats), abs=1e-5)
    assert scores["perplexity/val"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)
    assert scores["bits_per_byte/val"] == pytest.approx(np.mean(nats) / math.log(2) / 2.5, abs=1e-5)


# ---- whole runs ------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_everything(fit, tmp_path, data_dir):
    out = fit("out", "--max_iters=30", "--eval_interval=10")
    folder, lines = tmp_path / "out", metrics(tmp_path / "out")
    assert {".lock", "ckpt.pt", "last.pt", "model.bin", "metrics.jsonl"} == {p.name for p in folder.iterdir()}
    evaluations = [line for line in lines if "loss/val" in line]
    assert [line["iter"] for line in evaluations] == [0, 10, 20, 30]
    assert [line["iter"] for line in lines if "loss/train" in line] == list(range(1, 31))
    assert abs(evaluations[0]["loss/val"] - math.log(VOCAB)) < 0.2
    assert evaluations[-1]["loss/val"] < evaluations[0]["loss/val"] - 1.2
    # sample stories
    assert len(re.findall(r"^step \d+: .*val loss", out, re.M)) == 4 and out.count("\n  > ") == 4
    last = load_checkpoint(folder / "last.pt")
    assert last["iter_num"] == 30 and last["config"]["vocab_source"] == "custom"
    assert last["best_val_loss"] == min(line["loss/val"] for line in evaluations)
    _, state = read_bin(str(folder / "model.bin"))
    assert same(state, dict(model_from_checkpoint(load_checkpoint(folder / "ckpt.pt")).state_dict()))
    # the final loss, once more from the file and by hand
    net, meta = (
        model_from_checkpoint(last).eval(),
        json.loads(Path(data_dir, f"tok{VOCAB}/meta.json").read_text()),
    )
    ids = np.fromfile(Path(data_dir, f"tok{VOCAB}", meta["shards"][0]["name"]), "<u2").astype(np.int64)
    ids = torch.from_numpy(ids[: 3 * 8 * 64 + 1])
    with torch.no_grad():
        logits = net(ids[:-1].view(-1, 64))[0]
    by_hand = -logits.double().log_softmax(-1).gather(-1, ids[1:].view(-1, 64, 1)).mean().item()
    assert evaluations[-1]["loss/val"] == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize("dropout", [0, 0.1])
def test_resumed_equals_uninterrupted_bit_for_bit(fit, tmp_path, dropout):
    flags = [f"--dropout={dropout}", "--lr_decay_iters=10"]
    fit("whole", "--max_iters=10", *flags)
    fit("parts", "--max_iters=6", *flags)
    assert not same(state(tmp_path / "parts"), state(tmp_path / "whole"))
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as f:
        f.write('{"iter": 7, "loss/train": 0}\n{"iter": 8, "lo')  # as a killed run would leave it
    train.main(["--init_from=resume", f"--out_dir={tmp_path / 'parts'}", "--max_iters=10", "--device=cpu"])
    assert same(state(tmp_path / "parts"), state(tmp_path / "whole"))
    # the shorter run was evaluated at its end as well
    ends = {6}
    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert [m for m in parts if not ("loss/val" in m and m["iter"] in ends)] == whole


def cli(*flags: object, nproc: int = 0, **how) -> subprocess.Popen:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc else []
    command = [sys.executable, *launch, str(ROOT / "train.py"), *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how)


def test_ctrl_c_saves_and_resume_equals_uninterrupted(fit, tmp_path, data_dir):
    flags = [*TINY, f"--data_dir={data_dir}", "--max_iters=120", "--eval_interval=60"]
    process = cli(*flags, f"--out_dir={tmp_path / 'cut'}")
    log = tmp_path / "cut" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 5):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "--init_from=resume" in out, out
    assert 3 < state(tmp_path / "cut")["iter_num"] < 120
    fit("cut", "--init_from=resume", "--max_iters=120", "--eval_interval=60")
    # one thread more or less changes the last bit, so compare with a run in this process
    fit("whole", "--max_iters=120", "--eval_interval=60")
    assert same(state(tmp_path / "cut"), state(tmp_path / "whole"))
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_two_ranks_equal_one(fit, tmp_path, data_dir):
    flags = ["--max_iters=6", "--dropout=0.1", "--grad_clip=0.5"]
    fit("one", *flags)
    process = cli(
        *TINY,
        *flags,
        f"--data_dir={data_dir}",
        f"--out_dir={tmp_path / 'two'}",
        nproc=2,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    assert one["iter_num"] == two["iter_num"] == 6 and one["data"] == two["data"]
    for name, tensor in one["model"].items():
        torch.testing.assert_close(two["model"][name], tensor, atol=1e-6, rtol=1e-5)
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_ctrl_c_stops_all_ranks_together(tmp_path, data_dir):
    """Also when they rarely log, and torchrun passes on the signal to each of them at its own time."""
    flags = [
        *TINY,
        f"--data_dir={data_dir}",
        f"--out_dir={tmp_path}",
        "--max_iters=100000",
        "--log_interval=20",
    ]
    process = cli(*flags, "--eval_interval=100000", nproc=2, env=os.environ | {"OMP_NUM_THREADS": "1"})
    log = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert "torchrun command with --init_from=resume" in out, out
    assert state(tmp_path)["iter_num"] > 40


def test_one_rank_more_than_there_is_work(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit, match="multiple of 3"):
        train.set_up(TrainConfig())


def test_fine_tuning_starts_afresh_from_the_weights(fit, tmp_path):
    fit("base", "--max_iters=8")
    base = load_checkpoint(tmp_path / "base" / "ckpt.pt")
    fit("tuned", f"--init_from={tmp_path / 'base' / 'ckpt.pt'}", "--max_iters=4")
    tuned = load_checkpoint(tmp_path / "tuned" / "last.pt")
    assert tuned["iter_num"] == 4 and tuned["data"]["windows"] == 4 * 8
    first = metrics(tmp_path / "tuned")[0]
    assert first["iter"] == 0 and first["loss/val"] == pytest.approx(
        metrics(tmp_path / "base")[-1]["loss/val"]
    )
    assert all(int(s["step"]) == 4 for s in tuned["optimizer"]["state"].values())
    assert same(load_checkpoint(tmp_path / "base" / "ckpt.pt"), base)


def test_existing_runs_are_safe(fit, tmp_path, data_dir):
    fit("out", "--max_iters=4")
    before = (tmp_path / "out" / "last.pt").read_bytes()
    with pytest.raises(SystemExit, match="--init_from=resume"):
        fit("out", "--max_iters=4")
    with pytest.raises(SystemExit, match="--dim=64 contradicts"):
        fit("out", "--init_from=resume", "--dim=64")
    assert "already" in fit("out", "--init_from=auto", "--max_iters=4")
    assert (tmp_path / "out" / "last.pt").read_bytes() == before
    log = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    for source in ("resume", "scratch"):
        assert "val loss" in fit("out", f"--init_from={source}", "--eval_only")
    assert (tmp_path / "out" / "last.pt").read_bytes() == before
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == log
    fit("out", "--init_from=auto", "--max_iters=5")
    assert load_checkpoint(tmp_path / "out" / "last.pt")["iter_num"] == 5


def saved(folder: Path) -> dict:
    return {name: load_checkpoint(folder / f"{name}.pt")["iter_num"] for name in ("ckpt", "last")}


def test_ckpt_is_the_best_and_last_the_newest(fit, tmp_path, monkeypatch):
    losses = iter([9.0, 5.0, 3.0, 4.0] * 2)
    scores = {"perplexity/val": 1.0, "bits_per_byte/val": 1.0}
    monkeypatch.setattr(train, "evaluate", lambda *args: {"loss/val": next(losses)} | scores)
    fit("best", "--max_iters=12")
    assert saved(tmp_path / "best") == {"ckpt": 8, "last": 12}
    assert load_checkpoint(tmp_path / "best" / "last.pt")["best_val_loss"] == 3.0
    fit("all", "--max_iters=12", "--always_save_checkpoint", "--log_interval=5")
    assert saved(tmp_path / "all") == {"ckpt": 12, "last": 12}
    assert [m["iter"] for m in metrics(tmp_path / "all") if "loss/train" in m] == [5, 10]


@pytest.mark.parametrize("stop", [8, 12])
def test_killed_between_two_files_of_a_save(fit, tmp_path, monkeypatch, stop):
    class Killed(BaseException):
        pass

    def kill(folder, stem, checkpoint, *more):
        if checkpoint["iter_num"] == stop:
            raise Killed
        real(folder, stem, checkpoint, *more)

    fit("whole", "--max_iters=12")
    real = train.save_state
    monkeypatch.setattr(train, "save_state", kill)
    with pytest.raises(Killed):
        fit("cut", "--max_iters=12")
    monkeypatch.setattr(train, "save_state", real)
    fit("cut", "--init_from=resume", "--max_iters=12")
    for name in ("ckpt.pt", "last.pt"):
        whole, cut = (load_checkpoint(tmp_path / folder / name) for folder in ("whole", "cut"))
        assert all(same(whole[key], cut[key]) for key in whole if key != "config")
    assert (tmp_path / "whole" / "model.bin").read_bytes() == (tmp_path / "cut" / "model.bin").read_bytes()


def test_foreign_checkpoints_go_on(fit, tmp_path, data_dir):
    """As llama2.c writes them, without our state; and as export.py makes them from a model.bin."""
    fit("ours", "--max_iters=4")
    ours = load_checkpoint(tmp_path / "ours" / "ckpt.pt")
    folder = tmp_path / "theirs"
    folder.mkdir()
    keys = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len", "dropout")
    args = {k: ours["model_args"][k] for k in keys}
    torch.save(
        {"model": ours["model"], "model_args": args, "iter_num": 4, "best_val_loss": 0.1}, folder / "ckpt.pt"
    )
    out = fit("theirs", "--init_from=resume", "--max_iters=6")
    assert "moments start from zero" in out and saved(folder)["last"] == 6
    assert (folder / "model.bin").exists()  # 0.1 was measured on other text and holds nothing up
    checkpoint = train.Transformer(
        train.ModelArgs(**args | {"multiple_of": 32, "hidden_dim": 88})
    ).state_dict()
    assert (
        checkpoint["layers.0.feed_forward.w1.weight"].shape
        == ours["model"]["layers.0.feed_forward.w1.weight"].shape
    )
    (tmp_path / "from_bin").mkdir()
    unknown = ours["model_args"] | {"multiple_of": 32}
    torch.save(
        {"model": ours["model"], "model_args": unknown, "config": {}}, tmp_path / "from_bin" / "ckpt.pt"
    )
    fit(
        "from_bin", "--init_from=resume", "--max_iters=2"
    )  # with --multiple_of=8, which its hidden_dim agrees with


@pytest.mark.parametrize("name, value", [("keep", None), ("batch_size", 2.5), ("learning_rate", "1e-3")])
def test_a_foreign_setting_of_another_kind_is_one_line(name, value, fit, tmp_path):
    fit("out", "--max_iters=1")
    checkpoint = load_checkpoint(tmp_path / "out" / "last.pt")
    del checkpoint["data"]
    checkpoint["config"][name] = value
    torch.save(checkpoint, tmp_path / "out" / "last.pt")
    with pytest.raises(SystemExit, match=f"has {name}=.*; add --{name}="):
        train.main(["--init_from=resume", "--eval_only", f"--out_dir={tmp_path / 'out'}"])


def test_bfloat16_runs_and_differs(fit, tmp_path):
    for dtype in ("float32", "bfloat16"):
        fit(dtype, "--max_iters=3", f"--dtype={dtype}")
    exact, rough = (metrics(tmp_path / dtype)[-1]["loss/val"] for dtype in ("float32", "bfloat16"))
    assert 0 < abs(exact - rough) < 0.05


def test_another_tokenizer_than_the_checkpoints_is_refused(fit, tmp_path):
    fit("out", "--max_iters=4")
    checkpoint = load_checkpoint(tmp_path / "out" / "last.pt")
    checkpoint["config"]["tokenizer_sha256"] = "0" * 64
    torch.save(checkpoint, tmp_path / "other.pt")
    with pytest.raises(SystemExit, match="is not the tokenizer that the checkpoint was trained with"):
        fit("new", f"--init_from={tmp_path / 'other.pt'}")


def test_a_foreign_model_that_foresees_worse_than_chance_is_warned_of(fit, tmp_path):
    fit("out", "--max_iters=4")
    checkpoint = load_checkpoint(tmp_path / "out" / "ckpt.pt")
    del checkpoint["config"]["tokenizer_sha256"]
    torch.save(checkpoint, tmp_path / "its.pt")
    checkpoint["model"]["norm.weight"] *= -100  # sure of the tokens that it thought least likely
    torch.save(checkpoint, tmp_path / "another.pt")
    for name, warnings in (("its", 0), ("another", 1)):  # one, not one at each evaluation
        flags = [f"--init_from={tmp_path}/{name}.pt", "--max_iters=2", "--eval_interval=1"]
        assert fit(f"new {name}", *flags).count("worse than chance") == warnings


def test_divergence_stops_before_anything_good_is_overwritten(fit, tmp_path, monkeypatch):
    real, evaluations = train.evaluate, []

    def evaluate(model, batches, runtime, *stop):
        evaluations.append(0)
        if len(evaluations) == 3:  # as a weight that became inf would make it
            train.nn.init.constant_(model.norm.weight, math.inf)
        return real(model, batches, runtime)

    monkeypatch.setattr(train, "evaluate", evaluate)
    with pytest.raises(SystemExit, match="diverged"):
        fit("out", "--max_iters=12")
    assert state(tmp_path / "out")["iter_num"] == 4


def test_threads_change_no_bit(fit, tmp_path, monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        fit("threads", "--max_iters=2", "--batch_size=64")
        fit("threads", "--init_from=resume", "--max_iters=4", "--batch_size=64")
        monkeypatch.setattr(Runtime, "start_threads", lambda self, model: None)
        torch.set_num_threads(1)
        fit("one", "--max_iters=4", "--batch_size=64")
    finally:
        torch.set_num_threads(before)
    assert same(state(tmp_path / "threads")["model"], state(tmp_path / "one")["model"])


def test_missing_packages_are_named(fit, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    for package in ("wandb", "tensorboard"):
        with pytest.raises(SystemExit, match=f"pip install {package}"):
            fit("out", f"--{package}_log")


def test_real_weights_on_real_stories(tmp_path, monkeypatch, capsys):
    """The loss of stories260K on 1.5 MB of TinyStories, as measured independently: 1.375 nats per token."""
    import shutil

    import tinystories

    story_file, checkpoint = shared_data("tinystories/stories.txt"), shared_data("stories260K/ckpt.pt")
    monkeypatch.chdir(tmp_path)
    tinystories.main(["import", str(story_file)])
    shutil.copy(shared_data("stories260K/tok512.model"), "data/tok512.model")
    tinystories.main(["pretokenize", "--vocab_size=512"])
    os.makedirs("out")
    shutil.copy(checkpoint, "out/ckpt.pt")
    train.main(
        [
            "--init_from=resume",
            "--eval_only=True",
            "--vocab_source=custom",
            "--vocab_size=512",
            "--batch_size=8",
            "--eval_iters=20",
            "--device=cpu",
        ]
    )
    out = capsys.readouterr().out
    assert abs(float(re.search(r"val loss ([\d.]+)", out)[1]) - 1.375) < 0.04


# ---- nothing is lost ---------------------------------------------------------------------------------


def poison(monkeypatch, when) -> None:
    """Make the loss NaN where when(number) of a forward pass in training says so."""
    real, calls = train.Transformer.forward, []

    def forward(self, tokens, targets=None):
        logits, loss = real(self, tokens, targets)
        if self.training and targets is not None:
            calls.append(0)
            if when(len(calls)):
                loss = loss * math.nan
        return logits, loss

    monkeypatch.setattr(train.Transformer, "forward", forward)


ALONE = ["--batch_size=8", "--gradient_accumulation_steps=1", "--eval_interval=100"]


def test_a_step_that_is_not_finite_changes_nothing_but_is_counted(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(Runtime, "start_threads", lambda self, model: None)
    monkeypatch.setattr(train, "CPU_PART_TOKENS", 10**9)
    fit("three", *ALONE, "--max_iters=3", "--decay_lr=False")
    poison(monkeypatch, lambda call: call == 4)
    out = fit("four", *ALONE, "--max_iters=4", "--decay_lr=False")
    assert "step 3 skipped: loss nan" in out and "(1 in a row)" in out
    three, four = state(tmp_path / "three"), state(tmp_path / "four")
    assert same(three["model"], four["model"]) and same(three["optimizer"], four["optimizer"])
    assert three["skipped"] == 0 and four["skipped"] == 1 and four["iter_num"] == 4
    assert four["data"]["windows"] == three["data"]["windows"] + 8
    assert {"iter": 4, "skipped": 1} in metrics(tmp_path / "four")
    assert sum("loss/train" in line for line in metrics(tmp_path / "four")) == 3


def test_too_many_in_a_row_stop_the_run_with_its_last_good_state_saved(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CPU_PART_TOKENS", 10**9)
    poison(monkeypatch, lambda call: call == 2 or call >= 5)
    with pytest.raises(SystemExit, match=r"3 steps in a row .* --init_from=resume --learning_rate=0\.005"):
        fit("bad", *ALONE, "--max_iters=50", "--max_skipped=3")
    bad = state(tmp_path / "bad")
    assert bad["iter_num"] == 7 and bad["skipped"] == 4
    assert all(tensor.isfinite().all() for tensor in bad["model"].values())
    assert all(int(s["step"]) == 3 for s in bad["optimizer"]["state"].values())
    monkeypatch.undo()
    fit("bad", *ALONE, "--init_from=resume", "--max_iters=9", "--learning_rate=0.005")
    assert state(tmp_path / "bad")["iter_num"] == 9 and state(tmp_path / "bad")["skipped"] == 4


def test_the_newest_states_are_kept_and_a_damaged_one_is_passed_over(fit, tmp_path):
    out_dir = tmp_path / "out"
    fit("whole", "--max_iters=12", "--decay_lr=False")
    fit("out", "--max_iters=8", "--keep=3", "--eval_interval=2", "--decay_lr=False")
    names = sorted(path.name for path in out_dir.glob("last*"))
    assert names == ["last-00000004.pt", "last-00000006.pt", "last.pt"]
    assert load_checkpoint(out_dir / "last-00000006.pt")["iter_num"] == 6
    damaged = bytearray((out_dir / "last.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 4
    (out_dir / "last.pt").write_bytes(damaged)
    shutil.copy(out_dir / "last-00000004.pt", out_dir / "ckpt.pt")  # the best is as new: it is damaged, too
    out = fit("out", "--max_iters=12", "--init_from=resume", "--keep=1")
    assert f"{out_dir / 'last.pt'} cannot be read as a checkpoint: the checksum" in out
    assert f"from {out_dir / 'last-00000006.pt'}, iteration 6" in out
    assert same(state(out_dir)["model"], state(tmp_path / "whole")["model"])
    assert list(out_dir.glob("last-*")) == []
    for path in out_dir.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SystemExit, match="cannot be read as a checkpoint"):
        fit("out", "--init_from=resume")


def test_no_flipped_bit_is_trained_on(fit, tmp_path, rng):
    """Anywhere in the file: it is refused, or nothing that matters has changed."""
    fit("out", "--max_iters=2")
    path, whole = tmp_path / "out" / "last.pt", load_checkpoint(tmp_path / "out" / "last.pt")
    data, refused = path.read_bytes(), 0
    for _ in range(60):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert same(load_checkpoint(path), whole)
        except SystemExit as e:
            refused += 1
            assert "\n" not in str(e)
    assert refused > 20


def test_a_second_run_in_the_same_folder_is_refused(fit, tmp_path, data_dir):
    flags = [*TINY, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'out'}", "--max_iters=100000"]
    first = cli(*flags, "--eval_interval=100000")
    log = tmp_path / "out" / "metrics.jsonl"
    while first.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.05)
    for mode in ("resume", "auto", "scratch"):
        with pytest.raises(SystemExit, match=f"in use by process {first.pid} on .*another --out_dir"):
            fit("out", f"--init_from={mode}", "--max_iters=3")
    first.kill()
    first.communicate()
    assert "process" in (tmp_path / "out" / ".lock").read_text()  # it is still there, and in nobody's way
    fit("out", "--init_from=auto", "--max_iters=3")


def test_a_clock_that_goes_back_changes_nothing(fit, tmp_path, monkeypatch):
    fit("whole", "--max_iters=8")
    fit("back", "--max_iters=4")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 10**8)
    for path in (tmp_path / "back").iterdir():
        os.utime(path, (0, 0))
    fit("back", "--init_from=resume", "--max_iters=8")
    assert same(state(tmp_path / "back"), state(tmp_path / "whole"))


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit of the size of files")
def test_a_full_disk_leaves_what_was_there(fit, tmp_path):
    fit("out", "--max_iters=4")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then fails like one to a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(SystemExit, match="cannot save to .* what was saved before is whole"):
            fit("out", "--init_from=resume", "--max_iters=8")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for name in ("ckpt.pt", "last.pt", "model.bin"):
        assert (tmp_path / "out" / name).read_bytes() == before[name]
    fit("out", "--init_from=resume", "--max_iters=8")
    fit("whole", "--max_iters=8")
    assert same(state(tmp_path / "out"), state(tmp_path / "whole"))


def test_a_log_on_a_full_disk_costs_no_step(fit, tmp_path, monkeypatch):
    flags, log = ["--eval_interval=1000", "--max_iters=12"], train.Metrics.log

    def full(self, iter_num, values):
        if iter_num == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        log(self, iter_num, values)

    monkeypatch.setattr(train.Metrics, "log", full)
    with pytest.raises(SystemExit, match="cannot report .*No space left.*saved up to 7; .*=resume"):
        fit("out", *flags)
    monkeypatch.undo()
    fit("out", *flags, "--init_from=resume")
    fit("whole", *flags)
    assert same(state(tmp_path / "out"), state(tmp_path / "whole"))


def test_the_advice_for_another_tokenizer_can_be_followed(capsys):
    train.warn_of_noise(9.0, 384, "out/ckpt.pt", "my data/tok384")
    advice = "run: python tinystories.py pretokenize --vocab_size=384 --data_dir='my data' --force"
    assert advice in capsys.readouterr().err
    train.warn_of_noise(6.9, 384, "out/ckpt.pt", "data/tok384")
    assert capsys.readouterr().err == ""


def test_an_evaluation_that_cannot_be_told_is_made_again(fit, tmp_path, monkeypatch):
    """And with it what it writes: the best weights, model.bin."""
    flags, show = ["--eval_interval=3", "--max_iters=6"], train.show

    def closed(line, file=None):
        if line.startswith("step 6:"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        show(line, file)

    monkeypatch.setattr(train, "show", closed)
    with pytest.raises(SystemExit, match="Input/output error.*saved up to 6"):
        fit("out", *flags)
    monkeypatch.undo()
    fit("out", *flags, "--init_from=resume")
    fit("whole", *flags)
    assert same(state(tmp_path / "out"), state(tmp_path / "whole"))
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")
    assert (tmp_path / "out" / "model.bin").read_bytes() == (tmp_path / "whole" / "model.bin").read_bytes()


def test_a_disk_that_fails_under_the_data_costs_no_step(fit, tmp_path, monkeypatch):
    read, calls = tinystories.TokenShard.read, []

    class Failing:
        def seek(self, at):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def close(self):
            pass

    def fail_once(self, start, count):
        calls.append(0)
        if len(calls) == 60:
            monkeypatch.setattr(self, "_file", Failing())
        return read(self, start, count)

    monkeypatch.setattr(tinystories.TokenShard, "read", fail_once)
    flags = ["--eval_interval=1000", "--max_iters=12"]
    with pytest.raises(SystemExit, match="cannot read .*Input/output error"):
        fit("out", *flags)
    monkeypatch.undo()
    assert 0 < state(tmp_path / "out")["iter_num"] < 12
    fit("out", *flags, "--init_from=resume")
    fit("whole", *flags)
    assert same(state(tmp_path / "out"), state(tmp_path / "whole"))


@pytest.mark.parametrize("setting, message", [
    ({"dtype": "float16"}, "needs a CUDA device; try --dtype=float32"),
    ({"wandb_log": True}, "pip install wandb, or give --wandb_log=False"),
])
def test_settings_of_another_machine_are_one_line(setting, message, fit, tmp_path, monkeypatch):
    fit("out", "--max_iters=2")
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)  # as where wandb is missing
    path = tmp_path / "out" / "last.pt"
    checkpoint = load_checkpoint(path)
    torch.save(checkpoint | {"config": checkpoint["config"] | setting}, path)
    with pytest.raises(SystemExit, match=message):
        fit("out", "--max_iters=4", "--init_from=resume", *(["--device=cpu"] if "dtype" in setting else []))


def test_a_closed_pipe_costs_no_step(tmp_path, data_dir):
    """As of `| head`: standard error tells of it in one line."""
    flags = [*TINY, f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--eval_interval=20"]
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--max_iters=100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not process.stdout.readline().startswith("  > "):  # a story after the first evaluation
            pass
        process.stdout.close()
        lines = re.split("[\r\n]", process.stderr.read())
    said = [line for line in lines if line.strip() and "it/s" not in line and "%|" not in line]
    assert process.returncode == 1 and len(said) == 1 and "Broken pipe" in said[0], lines
    assert f"saved up to {state(tmp_path)['iter_num']};" in said[0]  # 20, or a line 10 s after the last


@pytest.mark.parametrize("before, stops", [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_a_terminal_that_closes_is_a_wish_to_stop(before, stops):
    """But not to a run that nohup started."""
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    try:
        signal.signal(signal.SIGHUP, before)
        interrupt = train.Interrupt()
        for _ in range(2):  # from the shell, and from the terminal
            os.kill(os.getpid(), signal.SIGHUP)
        assert interrupt.asked == stops
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_log_from_the_start_on_keeps_what_others_logged(tmp_path):
    """Going on from iteration 0 drops what came after it; a fresh run all of its kind, nothing of PPO's."""
    path, cfg = tmp_path / "metrics.jsonl", TrainConfig(out_dir=str(tmp_path))
    lines = [{"iter": 0, "loss/val": 6.0}, {"iter": 1, "loss/train": 5.0}, {"iter": 1, "ppo/J": -1.0}]
    for fresh, kept in ((False, [0, 2]), (True, [2])):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        train.Metrics(cfg, 0, fresh=fresh)
        assert [json.loads(line) for line in path.read_text().splitlines()] == [lines[i] for i in kept]


def test_resume_keeps_the_precision_but_not_llama2cs(fit, tmp_path):
    out_dir = tmp_path / "out"
    fit("out", "--max_iters=2", "--dtype=bfloat16", "--keep=3")
    fit("out", "--max_iters=4", "--init_from=resume")
    fit("whole", "--max_iters=4", "--dtype=bfloat16")
    assert same(state(out_dir)["model"], state(tmp_path / "whole")["model"])
    assert load_checkpoint(out_dir / "last.pt")["config"]["keep"] == 3
    checkpoint = load_checkpoint(out_dir / "ckpt.pt")
    del checkpoint["data"]  # which only this project's have
    (tmp_path / "theirs").mkdir()
    torch.save(checkpoint, tmp_path / "theirs" / "ckpt.pt")
    fit("theirs", "--max_iters=6", "--init_from=resume")
    assert load_checkpoint(tmp_path / "theirs" / "last.pt")["config"]["dtype"] == "auto"


def test_a_damaged_shard_ends_the_run_with_its_state_saved(fit, tmp_path, data_dir):
    shutil.copytree(data_dir, tmp_path / "data")
    flags = [f"--data_dir={tmp_path / 'data'}", "--eval_interval=100", "--max_iters=40"]
    for shard in sorted((tmp_path / "data").glob(f"tok{VOCAB}/data0[12].bin")):
        data = bytearray(shard.read_bytes())
        data[0] ^= 1
        shard.write_bytes(data)
    with pytest.raises(SystemExit, match=r"data0[12]\.bin.*pretokenize"):
        fit("out", *flags)


def test_deterministic(fit, tmp_path):
    for name in ("one", "two"):
        fit(name, "--max_iters=4", "--deterministic")
        assert torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
    assert same(state(tmp_path / "one"), state(tmp_path / "two"))


def test_a_story_gives_the_terminal_no_orders(monkeypatch, capsys):
    monkeypatch.setattr(train, "generate", lambda *args, **how: [[7]])
    run = SimpleNamespace(raw_model=None, cfg=TrainConfig())
    train.tell_story(run, SimpleNamespace(bos_id=1, decode=lambda ids: "Once\x1b[2J\nupon\x07 a château\x00"))
    assert capsys.readouterr().out == "  > Once[2J upon a château\n"


@needs_cuda
@pytest.mark.parametrize("dropout", [0, 0.1])
@pytest.mark.parametrize("compiled", ["False", "True"])
def test_on_cuda_resumed_equals_uninterrupted_bit_for_bit(fit, tmp_path, compiled, dropout):
    flags = ["--device=cuda", f"--compile={compiled}", "--deterministic"]
    fit("whole", "--max_iters=10", "--lr_decay_iters=10", f"--dropout={dropout}", *flags)
    fit("parts", "--max_iters=6", "--lr_decay_iters=10", f"--dropout={dropout}", *flags)
    train.main(["--init_from=resume", f"--out_dir={tmp_path / 'parts'}", "--max_iters=10", *flags])
    assert same(state(tmp_path / "parts"), state(tmp_path / "whole"))


@needs_cuda
@pytest.mark.parametrize(
    "flags, close",
    [
        (["--dtype=float32", "--compile=False"], 5e-3),  # TF32
        (["--dtype=bfloat16", "--compile=False"], 5e-2),
        (["--dtype=float16", "--compile=True"], 5e-2),
        ([], 5e-2),
    ],
    ids=["fp32", "bf16", "fp16", "default"],
)
def test_on_cuda_it_learns_as_on_the_cpu(fit, tmp_path, flags, close):
    fit("cpu", "--max_iters=20")
    out = fit("cuda", "--max_iters=20", "--device=cuda", *flags)
    assert "on 1 x cuda, " + ("bfloat16, compiled" if not flags else flags[0][8:]) in out
    here, there = metrics(tmp_path / "cpu"), metrics(tmp_path / "cuda")
    assert [m["iter"] for m in here] == [m["iter"] for m in there]
    for a, b in zip(here, there, strict=True):
        for name in a.keys() & b.keys() & {"loss/train", "loss/val"}:  # float16 may skip a step
            assert b[name] == pytest.approx(a[name], abs=close), (a["iter"], name)


SMALL = {"dim": 32, "n_layers": 1, "n_heads": 4, "vocab_size": 50, "max_seq_len": 16}
ONE_PROCESS = Runtime("cpu", torch.float32, False)


def small(**more) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelArgs(**SMALL | more))


def one_step(net, cfg, iter_num=0):
    scaler, optimizer = torch.amp.GradScaler("cpu", enabled=False), train.make_optimizer(net, cfg, "cpu")
    batches = Fixed(random_batches(cfg.gradient_accumulation_steps))
    return train.train_step(net, optimizer, scaler, batches, cfg, ONE_PROCESS, iter_num)


def test_dropout_depends_on_the_seed_and_the_iteration():
    losses = {}
    for seed, i in ((1, 0), (1, 0), (2, 0), (1, 1)):
        loss, _ = one_step(small(dropout=0.5), TrainConfig(gradient_accumulation_steps=1, seed=seed), i)
        losses.setdefault((seed, i), set()).add(loss)
    assert [len(x) for x in losses.values()] == [1, 1, 1] and len(set.union(*losses.values())) == 3


def test_the_seed_decides_first_weights_and_order_of_data(fit, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fit(name, "--max_iters=0", f"--seed={seed}")
    a, b, c = (state(tmp_path / x)["model"] for x in "abc")
    assert same(a, b) and not same(a, c)
    for name, seed in (("d", 1), ("e", 2)):
        fit(name, f"--init_from={tmp_path / 'a' / 'ckpt.pt'}", "--max_iters=1", f"--seed={seed}")
    d, e = ([m["loss/train"] for m in metrics(tmp_path / x) if "loss/train" in m] for x in "de")
    assert d != e


def test_a_gradient_that_is_not_finite_beside_a_loss_that_is():
    class Kink(Transformer):
        def forward(self, tokens, targets=None):
            logits, loss = super().forward(tokens, targets)
            return logits, loss + (self.norm.weight * 0).sqrt().sum()  # 0, and its slope is not finite

    torch.manual_seed(0)
    net = Kink(ModelArgs(**SMALL))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    loss, norm = one_step(net, TrainConfig(gradient_accumulation_steps=1))
    assert math.isfinite(loss) and not math.isfinite(norm) and same(dict(net.state_dict()), before)


def test_no_clipping():
    net = small()
    before = net.norm.weight.detach().clone()
    _, norm = one_step(net, TrainConfig(gradient_accumulation_steps=1, grad_clip=0.0, learning_rate=0.01))
    assert norm > 0 and (net.norm.weight - before).abs().max() > 0.005


@pytest.mark.parametrize(
    "number, then", [(signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)]
)
def test_the_first_signal_is_a_wish_and_the_second_an_order(number, then):
    handlers = {n: signal.getsignal(n) for n in HANDLED}
    try:
        interrupt = train.Interrupt()
        os.kill(os.getpid(), number)
        assert interrupt.asked and signal.getsignal(number) == then
    finally:
        for n, handler in handlers.items():
            signal.signal(n, handler)


def test_the_mean_training_loss_goes_on(fit, tmp_path, monkeypatch):
    flags, log = ["--eval_interval=8", "--max_iters=8"], train.Metrics.log

    def full(self, iter_num, values):
        if iter_num == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        log(self, iter_num, values)

    monkeypatch.setattr(train.Metrics, "log", full)
    with pytest.raises(SystemExit):
        fit("cut", *flags)
    monkeypatch.undo()
    told = [
        re.search(r"step 8: .*", fit(name, *flags, *more))[0]
        for name, more in (("cut", ["--init_from=resume"]), ("whole", []))
    ]
    assert "train loss" in told[0] and told[0] == told[1]


def test_where_fine_tuning_begins_is_no_rival(fit, tmp_path, monkeypatch):
    losses = iter([1.0, 5.0, 3.0, 4.0])
    monkeypatch.setattr(
        train,
        "evaluate",
        lambda *args: {"loss/val": next(losses), "perplexity/val": 1.0, "bits_per_byte/val": 1.0},
    )
    fit("best", "--max_iters=12")
    assert saved(tmp_path / "best") == {"ckpt": 8, "last": 12}
    assert load_checkpoint(tmp_path / "best" / "last.pt")["best_val_loss"] == 3.0


def test_ruined_weights_are_not_saved(fit, tmp_path, monkeypatch):
    real = train.Transformer.forward

    def forward(self, tokens, targets=None):
        logits, loss = real(self, tokens, targets)
        if self.training and targets is not None:
            self.norm.weight.data.fill_(100.0)  # as a step of a finite, huge gradient might
            loss = loss * math.nan
        return logits, loss

    monkeypatch.setattr(train.Transformer, "forward", forward)
    # and so there is nothing to resume
    with pytest.raises(SystemExit, match="is no good and was not saved; begin anew with --learning_rate="):
        fit("bad", "--max_iters=20", "--max_skipped=2")
    assert not (tmp_path / "bad" / "last.pt").exists()


def test_damaged_lines_of_metrics_are_dropped():
    assert train.logged_by('{"iter": 3, "ppo/kl": 0}\n') == (3, True)
    for line in ('{"iter": "x"}', '{"iter": null}', '{"iter": [1]}', '{"iter": Infinity}', "5", '"iter"'):
        assert train.logged_by(line + "\n") == (-1, False), line


def test_wandb_and_tensorboard_get_what_is_logged(fit, tmp_path, monkeypatch):
    seen, scalars = [], []
    wandb, board = types.ModuleType("wandb"), types.ModuleType("torch.utils.tensorboard")

    def init(**how):
        seen.append(how)
        return SimpleNamespace(log=lambda values, step: seen.append((step, values)))

    class Writer:
        def __init__(self, folder):
            assert folder == str(tmp_path / "out" / "tensorboard")

        def add_scalar(self, *what):
            scalars.append(what)

    wandb.init, board.SummaryWriter = init, Writer
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr(
        train.importlib.util, "find_spec", lambda name: name if name in ("wandb", "tensorboard") else None
    )
    fit("out", "--max_iters=4", "--wandb_log", "--tensorboard_log", "--wandb_project=p", "--wandb_run_name=r")
    (how, *logged), lines = (
        seen,
        [json.loads(x) for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()],
    )
    assert (how["project"], how["name"], how["config"]["max_iters"]) == ("p", "r", 4)
    assert [{"iter": step} | values for step, values in logged] == lines
    assert scalars == [(k, v, line["iter"]) for line in lines for k, v in line.items() if k != "iter"]


def test_threads_are_for_models_without_dropout():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for dropout, threads in ((0.0, 2), (0.1, 1)):
            runtime = Runtime("cpu", torch.float32, False)
            runtime.start_threads(small(dropout=dropout))
            assert runtime.threads == threads and bool(runtime.pool) == (threads > 1)
            if runtime.pool:
                runtime.pool.shutdown()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape, version", [({}, 0), ({"rope_theta": 500.0}, 1), ({"norm_eps": 1e-6}, 1)])
def test_model_bin_is_of_the_oldest_layout_that_can_tell_all(shape, version, tmp_path):
    net, path = small(**shape), str(tmp_path / "model.bin")
    train.write_model(path, net.args, net.state_dict())
    with open(path, "rb") as f:
        assert read_header(f, path)[0] == version


def test_evaluation_is_without_dropout():
    net = small(dropout=0.5).train()
    batches = random_batches(2)
    scores = train.evaluate(net, Fixed(batches), ONE_PROCESS)
    assert net.training
    losses = [net.eval()(x, y)[1].item() for x, y in batches]
    assert scores["loss/val"] == pytest.approx(np.mean(losses), abs=1e-6)


def test_the_share_of_the_peak(monkeypatch):
    gpu = Runtime("cuda:0", torch.bfloat16, True, world_size=4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert train.peak_flops(gpu) == 4 * 989e12 and train.peak_flops(ONE_PROCESS) == 0


def test_stories_are_always_of_the_same_numbers(capsys, monkeypatch):
    net, run = small(), SimpleNamespace(cfg=TrainConfig(seed=5))
    run.raw_model = net
    tokenizer = SimpleNamespace(bos_id=1, decode=lambda ids: " ".join(map(str, ids)))
    told = []
    for run.cfg in (TrainConfig(seed=5), TrainConfig(seed=5), TrainConfig(seed=6)):
        train.tell_story(run, tokenizer)
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] != told[2]


def test_resume_takes_this_machines_device(fit, tmp_path, monkeypatch):
    fit("out", "--max_iters=2")
    path = tmp_path / "out" / "last.pt"
    checkpoint = load_checkpoint(path)
    torch.save(checkpoint | {"config": checkpoint["config"] | {"device": "cuda:7"}}, path)
    train.main(["--init_from=resume", f"--out_dir={tmp_path / 'out'}", "--max_iters=3"])  # device=auto
    assert state(tmp_path / "out")["iter_num"] == 3


def test_speed_is_of_all_iterations_since(fit, tmp_path, monkeypatch):
    took, step = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *args: took.append(0.5) or step(*args))
    monkeypatch.setattr(train.time, "perf_counter", lambda: sum(took))
    fit("out", "--max_iters=8", "--log_interval=4", "--eval_interval=100")
    first, second = [
        json.loads(x) for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines() if "tok/s" in x
    ]
    assert first["tok/s"] == second["tok/s"] == 2 * 8 * 64 / 0.5


def test_the_rate_that_is_logged_is_that_of_the_step(fit, tmp_path):
    fit("out", "--max_iters=4")
    cfg = TrainConfig(learning_rate=1e-2, warmup_iters=3, max_iters=4)
    assert [m["lr"] for m in metrics(tmp_path / "out") if "lr" in m] == [
        train.get_lr(cfg, i) for i in range(4)
    ]


def test_fine_tuning_may_shorten_the_context(fit, tmp_path):
    fit("base", "--max_iters=2")
    fit("tuned", f"--init_from={tmp_path / 'base' / 'ckpt.pt'}", "--max_iters=1", "--max_seq_len=32")
    assert load_checkpoint(tmp_path / "tuned" / "last.pt")["model_args"]["max_seq_len"] == 32


def test_fine_tuning_takes_no_settings_over(fit, tmp_path, data_dir):
    fit("base", "--max_iters=2", "--learning_rate=3e-2", "--weight_decay=0.7")
    flags = [x for x in TINY if "learning_rate" not in x]
    train.main(
        [
            *flags,
            f"--data_dir={data_dir}",
            f"--out_dir={tmp_path / 'tuned'}",
            f"--init_from={tmp_path / 'base' / 'ckpt.pt'}",
            "--max_iters=1",
        ]
    )
    config = load_checkpoint(tmp_path / "tuned" / "last.pt")["config"]
    assert (config["learning_rate"], config["weight_decay"], config["max_iters"]) == (5e-4, 0.1, 1)


def test_the_best_loss_goes_on(fit, tmp_path, monkeypatch):
    losses = iter([9.0, 3.0, 5.0, 4.0])
    monkeypatch.setattr(
        train,
        "evaluate",
        lambda *args: {"loss/val": next(losses), "perplexity/val": 1.0, "bits_per_byte/val": 1.0},
    )
    fit("out", "--max_iters=8")
    fit("out", "--max_iters=12", "--init_from=resume")
    assert saved(tmp_path / "out") == {"ckpt": 4, "last": 12}


# ---- what a user meets -------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2, 3])
def test_ctrl_c_ends_an_evaluation(fit, tmp_path, monkeypatch, at):
    """The first, one in the middle, or the last: it is not finished, but made when the run goes on."""
    flags = "--max_iters=8", "--eval_interval=4"
    fit("whole", *flags)
    split, real, evaluations = train.split_batch, train.evaluate, []

    def interrupted(*batch):
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(train, "split_batch", split)
        return split(*batch)

    def evaluate(model, batches, runtime, stop=bool):
        evaluations.append(1)
        if len(evaluations) == at:
            monkeypatch.setattr(train, "split_batch", interrupted)
        return real(model, batches, runtime, stop)

    monkeypatch.setattr(train, "evaluate", evaluate)
    said = fit("cut", *flags)
    assert "stopped after iteration" in said and len(evaluations) == at
    cut = load_checkpoint(tmp_path / "cut" / "last.pt")
    assert (cut["iter_num"], cut["evaluated"]) == (4 * (at - 1), False)
    fit("cut", *flags, "--init_from=resume")
    assert same(state(tmp_path / "cut"), state(tmp_path / "whole"))
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_the_end_says_what_is_next(fit, tmp_path, data_dir):
    folder = tmp_path / "a run"
    said = fit("a run", "--max_iters=1", "--warmup_iters=0")
    assert said.endswith(f"next: ./run '{folder}/model.bin' -z {data_dir}/tok{VOCAB}.bin\n"), said
    assert "next:" not in fit("a run", "--eval_only", "--init_from=resume")
    assert "this model is new" in fit("new", "--eval_only")
    assert "this model is new" not in fit("a run", "--eval_only", "--init_from=resume")


def test_what_will_not_work_is_told_before(fit, capsys, monkeypatch):
    monkeypatch.setattr(train.os, "cpu_count", lambda: 2)
    said = fit("short", "--max_iters=1", "--warmup_iters=0")
    assert "days" not in said and "warmup" not in said
    assert "--warmup_iters=3 is longer than the run" in fit("warmup", "--max_iters=3")
    assert "warmup_iters" not in fit("warmup", "--init_from=resume", "--max_iters=3")
    model = Transformer(ModelArgs(dim=288, n_layers=6, n_heads=6, vocab_size=32000, max_seq_len=256))
    train.warn_early(TrainConfig(), model, 100_000, True)
    assert "On a laptop" in capsys.readouterr().err
    train.warn_early(TrainConfig(), model, 100_000, False)
    train.warn_early(TrainConfig(), model, 1, True)
    assert not capsys.readouterr().err


def test_the_best_is_the_best_on_the_batches_of_now(fit, tmp_path):
    """Losses on other batches say nothing: those that ckpt.pt has on them do."""
    fit("out", "--max_iters=8", "--eval_iters=0")
    best = load_checkpoint(tmp_path / "out" / "ckpt.pt")
    how = "--init_from=resume", "--eval_iters=1", "--batch_size=1"
    measured = fit("out", *how, "--eval_only")
    assert "best so far" not in measured  # it only looks at this one
    loss = float(re.search(r"val loss ([\d.]+)", measured)[1])
    said = fit("out", *how, "--max_iters=9", "--learning_rate=10", "--min_lr=10")  # which makes it worse
    assert "(best so far)" not in said and f"has a loss of {loss:.4f}" in said, said
    assert same(load_checkpoint(tmp_path / "out" / "ckpt.pt"), best)
    assert load_checkpoint(tmp_path / "out" / "last.pt")["best_val_loss"] == pytest.approx(loss, abs=1e-4)


def test_a_run_saves_by_the_clock_too(fit, tmp_path, monkeypatch):
    """Between evaluations that are far apart: a kill costs no more than the time between."""
    class Killed(BaseException):
        pass

    step, took = train.train_step, []

    def slow(*args):
        if len(took) == 7:
            raise Killed
        took.append(train.SAVE_SECONDS / 3 + 1)
        return step(*args)

    flags = "--max_iters=9", "--eval_interval=100"
    fit("whole", *flags)
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(train, "train_step", slow)
        m.setattr(train.time, "perf_counter", lambda: sum(took))
        fit("cut", *flags)
    assert load_checkpoint(tmp_path / "cut" / "last.pt")["iter_num"] == 6
    fit("cut", *flags, "--init_from=resume")
    assert same(state(tmp_path / "cut"), state(tmp_path / "whole"))


def test_only_a_new_model_is_evaluated_beside_a_run(fit):
    fit("out", "--max_iters=1", "--warmup_iters=0")
    with pytest.raises(SystemExit, match="--init_from=resume"):
        fit("out", "--eval_only")
    assert "this model is new" in fit("out", "--eval_only", "--init_from=scratch")


def test_compile_needs_a_compiler(fit, monkeypatch):
    monkeypatch.setattr(train.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit, match="--compile needs a C"):
        fit("out", "--compile", "--max_iters=1")


def test_no_ruined_weights_are_saved_by_the_clock(fit, tmp_path, monkeypatch):
    """A step may have a gradient that is finite and yet ruin the weights; those that follow are skipped."""
    step, took = train.train_step, []

    def ruining(model, *args):
        took.append(train.SAVE_SECONDS / 3 + 1)
        result = step(model, *args)
        if len(took) == 4:
            train.nn.init.constant_(model.norm.weight, math.inf)
        return result

    monkeypatch.setattr(train, "train_step", ruining)
    monkeypatch.setattr(train.time, "perf_counter", lambda: sum(took))
    with pytest.raises(SystemExit, match="no good and was not saved"):
        fit("out", "--max_iters=50", "--eval_interval=100", "--max_skipped=5")
    assert load_checkpoint(tmp_path / "out" / "last.pt")["iter_num"] == 3


def test_the_vocabulary_that_was_kept_comes_back_as_told(fit, data_dir, tmp_path):
    """For a model that was trained with it before train_vocab made another; that one is not lost either."""
    data = tmp_path / "data"
    shutil.copytree(data_dir, data)
    model, flags = data / f"tok{VOCAB}.model", [f"--data_dir={data}", "--warmup_iters=0"]
    make = [f"--vocab_size={VOCAB}", f"--data_dir={data}"]

    def kept() -> Path:
        return data / f"tok{VOCAB}-{hashlib.sha256(model.read_bytes()).hexdigest()[:8]}.model"

    def resume(name: str) -> str:
        return fit(name, *flags, "--init_from=resume", "--max_iters=2")

    fit("older", *flags, "--max_iters=1")
    older, path_of_older = model.read_bytes(), kept()
    tinystories.main(["train_vocab", *make, "--num_shards=1"])
    newer, path_of_newer = model.read_bytes(), kept()
    assert newer != older == path_of_older.read_bytes()
    with pytest.raises(SystemExit, match=f"is not the tokenizer that .*; run: mv {model}"):
        resume("older")  # the tokens are still its own: pretokenize would only take them away
    tinystories.main(["pretokenize", *make])
    fit("newer", *flags, "--max_iters=1")
    for name, pieces in (("older", older), ("newer", newer)):
        with pytest.raises(SystemExit) as told:
            resume(name)
        commands = str(told.value).partition("; run: ")[2].replace("; then: ", " && ")
        commands = commands.replace("python ", f"{sys.executable} ")
        subprocess.run(commands, shell=True, check=True, cwd=ROOT)
        assert model.read_bytes() == pieces
        assert Path(Tokenizer(str(model)).export(str(tmp_path / "t.bin"))).read_bytes() == (
            data / f"tok{VOCAB}.bin").read_bytes()
        assert "step 2" in resume(name)
    assert path_of_older.read_bytes() == older and not path_of_newer.exists()  # it is in use
    path_of_older.unlink()
    with pytest.raises(SystemExit, match="put that one back; then: "):
        fit("older", *flags, "--init_from=resume", "--max_iters=3")


def test_a_run_that_saved_nothing(fit, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, why in (("empty", "nothing was saved there yet"), ("slip", "there is no such folder")):
        with pytest.raises(SystemExit, match=f"nothing to resume in .*{name}: {why}"):
            fit(name, "--init_from=resume")


@pytest.mark.parametrize("flags", [(), ("--eval_iters=0",), ("--eval_iters=0", "--batch_size=500"),
                                   ("--eval_iters=1000000",)])
def test_how_long_the_first_evaluation_is(fit, data_dir, flags):
    """3 batches of 8 x 64, or all that there is, whose first token is foreseen by nobody."""
    meta = json.loads((Path(data_dir) / f"tok{VOCAB}" / "meta.json").read_text(encoding="utf-8"))
    tokens = meta["shards"][0]["tokens"] - 1 if flags else 3 * 8 * 64
    said = fit("out", "--max_iters=1", "--warmup_iters=0", *flags)
    assert f"evaluating on {tokens:,} tokens" in said
