"""Train a Llama from scratch, go on with a run, or fine-tune someone's weights.

    python train.py --vocab_source=custom --vocab_size=4096           # on whatever this machine has
    python train.py --out_dir=out --init_from=resume                  # go on where that run stopped
    python train.py --init_from=stories.pt --out_dir=tuned            # fine-tune these weights
    python train.py --out_dir=out --init_from=resume --ppo            # PPO on out/ckpt.pt (ppo.py)
    torchrun --standalone --nproc_per_node=4 train.py …               # any of it, shared by 4 processes

    torchrun --standalone --nproc_per_node=8 train.py --fsdp …        # a model too large for one of them

In out_dir: ckpt.pt (best validation loss so far) and its model.bin for run.c, last.pt (newest state, what
resume takes; with --fsdp a folder, last-ITERATION.dcp), metrics.jsonl (a line per log step and evaluation).
Not for: preparing data (tinystories.py), layers that need to be split over several devices.
"""

import dataclasses
import gc
import glob
import hashlib
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import types
import typing
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import IO

try:
    import numpy as np
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    from tqdm import tqdm
except ModuleNotFoundError as e:
    raise SystemExit(
        f"{e.name} is not installed for Python {sys.version.split()[0]}; run: "
        ". .venv/bin/activate, or with 3.11 or newer: pip install -r requirements.txt"
    ) from None

from export import DEFAULTS, write_bin
from model import (
    SHARDED,
    ModelArgs,
    Transformer,
    check_numbers,
    fill_shards,
    find_tokenizer,
    generate,
    load_checkpoint,
    model_from_checkpoint,
    newest_state,
    opt,
    pick_device,
    save_checkpoint,
    save_state,
    shards,
    showable,
    state_paths,
)
from ppo import CPU_PART_TOKENS, PPO, PPOConfig, reward_names, say_stopped, train_ppo
from tinystories import StoryStarts, TokenBatches, command, pretokenize_again, read_meta, token_dir
from tokenizer import CommandLine, Tokenizer, atomic_write, did_you_mean, lock, tokenizer_path

# Above so many parameters the gradients of several parts at once would take too much memory
THREADED_PARAMETERS = 50_000_000
SAVE_SECONDS = 900  # a run that is killed loses no more than so much
# Peak dense bf16 FLOP/s by a part of the device's name, for MFU
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12, "L4": 121e12}

# ----------------------------------------------------------------------------
# Configuration


@dataclass
class TrainConfig:
    """How to train. Raises ValueError for values that make no sense."""

    # files
    out_dir: str = opt("out", "folder for checkpoints, model.bin and metrics.jsonl")
    data_dir: str = opt("data", "folder of the token shards")
    init_from: str = opt(
        "scratch",
        "scratch; resume: go on with the run in out_dir; auto: resume if there is a "
        "run, else scratch; or the path of a checkpoint to fine-tune",
    )
    # evaluation and logging
    eval_interval: int = opt(2000, "iterations between evaluations; each saves the state")
    eval_iters: int = opt(100, "batches of validation data to evaluate on, from its start; 0 for all")
    eval_only: bool = opt(False, "evaluate once and exit")
    log_interval: int = opt(1, "iterations between lines in metrics.jsonl")
    always_save_checkpoint: bool = opt(False, "make every evaluation's state ckpt.pt, not only the best")
    keep: int = opt(1, "newest states to keep: last.pt, and those before it as last-ITERATION.pt")
    wandb_log: bool = opt(False, "log to Weights & Biases too")
    wandb_project: str = opt("llamac", "its project")
    wandb_run_name: str = opt("", "its run name (default: from the date)")
    tensorboard_log: bool = opt(False, "log to out_dir/tensorboard too")
    # data
    batch_size: int = opt(128, "sequences per micro-batch and process")
    vocab_source: str = opt("llama2", "whose tokenizer made the shards", choices=("llama2", "custom"))
    # optimizer (AdamW)
    gradient_accumulation_steps: int = opt(4, "micro-batches per iteration, over all processes")
    learning_rate: float = opt(5e-4, "highest learning rate")
    max_iters: int = opt(100000, "iterations in all")
    weight_decay: float = opt(1e-1, "weight decay of the matrices")
    beta1: float = opt(0.9, "decay of the mean gradient")
    beta2: float = opt(0.95, "decay of the mean squared gradient")
    grad_clip: float = opt(1.0, "longest gradient (2-norm) let through; 0 for any")
    max_skipped: int = opt(10, "stop after so many steps in a row whose loss or gradient is not finite")
    decay_lr: bool = opt(True, "cosine decay of the learning rate to min_lr, after the warm-up")
    warmup_iters: int = opt(1000, "iterations of linear warm-up, with decay_lr")
    lr_decay_iters: int = opt(0, "iteration at which min_lr is reached (default 0: max_iters)")
    min_lr: float = opt(0.0, "learning rate at the end of the decay")
    # system
    device: str = opt("auto", "auto, cpu, cuda, cuda:N or mps; auto takes the best there is")
    dtype: str = opt(
        "auto", "auto is bfloat16 on CUDA, else float32", choices=("auto", "float32", "bfloat16", "float16")
    )
    compile: str = opt(
        "auto", "torch.compile the model; auto does on CUDA", choices=("auto", "True", "False")
    )
    fsdp: bool = opt(
        False, "split weights, gradients and moments over the processes (torchrun), not copy them"
    )
    deterministic: bool = opt(False, "only operations that give the same bits every time, also on CUDA")
    seed: int = opt(1337, "of initial weights, order of data, and dropout")

    def __post_init__(self):
        one = "eval_interval log_interval batch_size gradient_accumulation_steps keep max_skipped"
        check_numbers(self, **dict.fromkeys(one.split(), 1))
        for name in ("out_dir", "data_dir", "init_from"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty")
        if self.seed >= 2**62:
            raise ValueError(f"seed={self.seed} must be below 2**62")
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")


# what these are with --ppo, where they are not given
PPO_DEFAULTS = {
    "learning_rate": 5e-4,
    "batch_size": 50,
    "gradient_accumulation_steps": 2,
    "beta2": 0.99,
    "weight_decay": 0.0,
    "eval_interval": 5,
    "eval_iters": 2,
}
PPO_ITERS = 15  # where neither --ppo_iters nor --max_iters is given

# what a resumed run takes from the command line (or the default), not from the run it goes on with
NOT_INHERITED = {"out_dir", "init_from", "eval_only", "device", "fsdp"}
# nor from llama2.c's runs: what was right for their GPU, and their logs
NOT_LLAMA2C = {"dtype", "compile", "wandb_log", "wandb_project", "wandb_run_name"}


def parse_bool(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise ValueError(text)


parse_bool.__name__ = "boolean (True or False)"  # what argparse calls it in its complaint


def parse_cli(argv: list[str] | None = None) -> tuple[dict, dict, dict]:
    """The flags that were given, as (fields of ModelArgs, fields of TrainConfig, fields of PPOConfig)."""
    cli = CommandLine(prog="train.py", description=__doc__)
    configs = {"model": ModelArgs, "training": TrainConfig, "PPO": PPOConfig}
    for title, config in configs.items():
        group = cli.add_argument_group(title)
        for f in dataclasses.fields(config):
            kind = typing.get_args(f.type)[0] if isinstance(f.type, types.UnionType) else f.type
            how = {"type": kind, "metavar": kind.__name__.upper()}
            if kind is bool:
                how = {"type": parse_bool, "metavar": "BOOL", "nargs": "?", "const": True}
            if choices := f.metadata.get("choices"):
                how = {"choices": choices}
                if "True" in choices:
                    how |= {
                        "nargs": "?",
                        "const": "True",
                        "type": lambda v: v.capitalize() if v.lower() in ("true", "false") else v,
                    }
            text = f.metadata["help"]
            if "(default" not in text and f.default != "":
                with_ppo = f"; with --ppo {PPO_DEFAULTS[f.name]}" if f.name in PPO_DEFAULTS else ""
                text += f" (default: {f.default}{with_ppo})"
            text = text.replace("%", "%%")  # argparse formats it
            group.add_argument("--" + f.name, help=text, default=dataclasses.MISSING, **how)
    given = {k: v for k, v in vars(cli.parse_args(argv)).items() if v is not dataclasses.MISSING}
    return tuple(
        {f.name: given[f.name] for f in dataclasses.fields(config) if f.name in given}
        for config in configs.values()
    )


# ----------------------------------------------------------------------------
# Metrics


def logged_by(line: str) -> tuple[int, bool]:
    """Iteration and whether it is PPO's, of a line of metrics.jsonl; -1 for one cut off or damaged."""
    try:
        values = json.loads(line)
        iter_num = int(values["iter"]) if line.endswith("\n") else -1
        return iter_num, any(k.startswith("ppo/") for k in values)
    except (ValueError, KeyError, TypeError, OverflowError):
        return -1, False


class Metrics:
    """metrics.jsonl, and Weights & Biases and TensorBoard where asked for. Made by rank 0 only."""

    def __init__(self, cfg: TrainConfig, iter_num: int, ppo: bool = False, fresh: bool = False):
        """Goes on after iteration iter_num of pretraining or of PPO: what a killed run logged beyond its
        saved state is dropped, of the other kind nothing. fresh: there was no iteration of this kind yet.
        """
        self.wandb = self.tensorboard = self.path = None
        if cfg.eval_only:  # looks, and leaves no trace
            return
        os.makedirs(cfg.out_dir, exist_ok=True)
        self.path = os.path.join(cfg.out_dir, "metrics.jsonl")
        kept = []
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8", errors="replace") as f:
                lines = [(*logged_by(line), line) for line in f]
            limit = -1 if fresh else iter_num
            kept = [line for i, of_ppo, line in lines if i >= 0 and (of_ppo != ppo or i <= limit)]
        with atomic_write(self.path, "w") as f:
            f.writelines(kept)
        if cfg.wandb_log:
            import wandb

            name = cfg.wandb_run_name or datetime.now().strftime("run%Y_%m_%d_%H_%M_%S")
            self.wandb = wandb.init(project=cfg.wandb_project, name=name, config=asdict(cfg))
        if cfg.tensorboard_log:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(os.path.join(cfg.out_dir, "tensorboard"))

    def log(self, iter_num: int, values: dict[str, float]) -> None:
        if self.path:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps({"iter": iter_num} | values) + "\n")
        if self.wandb:
            self.wandb.log(values, step=iter_num)
        if self.tensorboard:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, iter_num)


# ----------------------------------------------------------------------------
# Device and ranks


@dataclass
class Runtime:
    """Where and with whom this process computes."""

    device: str
    dtype: torch.dtype  # of matrix products, under autocast
    compile: bool
    rank: int = 0
    world_size: int = 1
    fsdp: bool = False
    pool: ThreadPoolExecutor | None = None  # on the CPU: one thread per core, each to compute alone
    threads: int = 1

    @property
    def kind(self) -> str:
        return self.device.partition(":")[0]

    @property
    def alone(self) -> bool:
        """Whether the model is this process's own: no other has a copy or a part of it."""
        return self.world_size == 1 and not self.fsdp

    def autocast(self):
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.kind, self.dtype)

    def send(self, x: torch.Tensor) -> torch.Tensor:
        """x on this process's device; a GPU goes on with what it is at, and the CPU with what comes next."""
        if self.kind != "cuda":
            return x.to(self.device)
        return x.pin_memory().to(self.device, non_blocking=True)

    def start_threads(self, model: Transformer) -> None:
        """Let map use all cores, one part of a batch on each.

        Cores that share every single operation wait for each other hundreds of times a second, which is
        slow for small models, and slower by far when another program holds one of the cores. Not with
        dropout: it draws from one generator, in an order that would not be certain.
        """
        small = model.num_parameters() <= THREADED_PARAMETERS and not model.args.dropout
        if self.alone and self.kind == "cpu" and small and not self.compile:
            self.threads = torch.get_num_threads()
        if self.threads > 1:
            self.pool = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))

    def map(self, function: Callable, items: list) -> Iterator:
        """function(item) of each item, in order, on as many threads as start_threads allowed."""
        if not self.pool:
            yield from map(function, items)
            return
        for i in range(0, len(items), self.threads):  # not all at once: results are as large as the model
            yield from self.pool.map(function, items[i : i + self.threads])

    def backward(self, function: Callable, parts: list, params: list[nn.Parameter]) -> torch.Tensor:
        """Add the gradients of function(part) → (loss, statistics) to p.grad, part after part, in one order.

        Returns the sum of the statistics, 0 without parts.
        """

        def gradients(part) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
            loss, stats = function(part)
            return stats, torch.autograd.grad(loss, params, allow_unused=True)

        total = 0.0
        for stats, grads in self.map(gradients, parts):
            total = total + stats
            for p, grad in zip(params, grads, strict=True):
                if grad is not None:
                    p.grad = grad if p.grad is None else p.grad.add_(grad)
        return torch.as_tensor(total)

    def backward_split(self, function: Callable, parts: list, spare, model: nn.Module) -> torch.Tensor:
        """Backward and reduce for a split model's gradients; a rank out of parts works on spare, in vain."""
        most = torch.tensor(len(parts), device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        total = torch.zeros(())
        for i in range(int(most)):
            with self.sync_gradients(model, last=i == int(most) - 1):
                loss, stats = function(parts[i] if i < len(parts) else spare)
                if i < len(parts):
                    total = total + stats
                # FSDP takes the ranks' mean
                (loss * (self.world_size if i < len(parts) else 0)).backward()
        sums = [None] * self.world_size
        dist.all_gather_object(sums, total.cpu())
        return sum(sums)

    def reduce(self, params: list[nn.Parameter], stats: torch.Tensor) -> torch.Tensor:
        """Replace gradients by their sums over all ranks, and statistics likewise."""
        if self.world_size == 1:
            return stats
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])
        dist.all_reduce(flat)
        for p, grad in zip(params, flat.split([p.numel() for p in params]), strict=True):
            p.grad = grad.view_as(p).clone()
        sums = [None] * self.world_size
        dist.all_gather_object(sums, stats.cpu())
        return sum(sums)

    def broadcast(self, value):
        """Rank 0's value, on all ranks."""
        if self.alone:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0)
        return values[0]

    def gather(self, tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Every rank's tensors, in order of rank, on this rank's device."""
        gathered = [None] * self.world_size
        dist.all_gather_object(gathered, {name: x.cpu() for name, x in tensors.items()})
        return [{name: x.to(self.device) for name, x in part.items()} for part in gathered]

    def split(self, model: Transformer) -> Transformer:
        """The model with each weight split over the ranks (FSDP2), layer by layer; rank 0's weights count.

        The other ranks' model may be without weights, on the meta device; if all are, so is the result.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        full = model.state_dict()
        with torch.device("meta"):
            model = Transformer(model.args)
        if self.compile:
            for layer in model.layers:
                layer.compile()
        # sums in fp32; inputs are not cast, for the rotary tables are fp32 too
        low = None if self.dtype == torch.float32 else self.dtype
        precision = MixedPrecisionPolicy(low, torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(self.kind, (self.world_size,))
        for layer in model.layers:
            layer.attention.fused = layer.feed_forward.fused = False  # else copies of weights add up
            fully_shard(layer, mesh=mesh, mp_policy=precision)
        fully_shard(model, mesh=mesh, mp_policy=precision)
        model.to_empty(device=self.device)
        model.reset_rope()
        model.rope_cos, model.rope_sin = model.rope_cos.to(self.device), model.rope_sin.to(self.device)
        if self.total(any(w.is_meta for w in full.values()))[0] < self.world_size:
            self.load_weights(model, full)
        with torch.no_grad():  # FSDP's own preparations, which gathered relies on
            model(torch.zeros(1, 1, dtype=torch.long, device=self.device))
        model.reshard()  # else the root's parameters are still the whole ones
        return model

    def load_weights(self, model: Transformer, weights: dict[str, torch.Tensor]) -> None:
        """Like load_state_dict; of a split model with rank 0's whole weights."""
        if not self.fsdp:
            model.load_state_dict(weights)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, weights if self.rank == 0 else {}, options=options)

    @contextmanager
    def gathered(self, model: Transformer, layers: bool = True) -> Iterator[None]:
        """A split model's weights are whole on every rank in here, of which each may use them as it likes.

        layers: those of the layers too, not only embedding, last norm and classifier.
        """
        if not self.fsdp:
            yield
            return
        from torch.distributed.fsdp import FSDPModule

        units = [m for m in (model.modules() if layers else [model]) if isinstance(m, FSDPModule)]
        for unit in units:
            unit.unshard()
            unit.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for unit in units:
                unit.set_reshard_after_forward(unit is not model, recurse=False)  # as fully_shard has it
                unit.reshard()

    def load_moments(self, optimizer: torch.optim.Optimizer, saved: dict) -> None:
        """Take over moments, given whole, of a split model by rank 0; settings such as lr stay as they are.

        Raises ValueError if they are of other parameters.
        """
        ours, state = optimizer.state_dict(), saved["state"]
        if [g["params"] for g in ours["param_groups"]] != [g["params"] for g in saved["param_groups"]]:
            raise ValueError("the optimizer's state is of other parameters")
        if self.fsdp:
            from torch.distributed.tensor import distribute_tensor

            params, state = [p for group in optimizer.param_groups for p in group["params"]], {}
            for i, values in saved["state"].items():
                p = params[i]
                state[i] = {
                    key: distribute_tensor(x.to(self.device), p.device_mesh, p.placements) if x.dim() else x
                    for key, x in values.items()
                }
        optimizer.load_state_dict(ours | {"state": state})

    def whole_weights(self, model: Transformer) -> dict[str, torch.Tensor]:
        """The state dict, of a split model gathered on rank 0 (on others empty); all ranks call it."""
        if not self.fsdp:
            return model.state_dict()
        whole = {}
        for name, tensor in model.state_dict().items():
            tensor = tensor.full_tensor()
            if self.rank == 0:
                whole[name] = tensor.cpu()
        return whole

    @contextmanager
    def sync_gradients(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Around the passes of a part: only an update's last one need bring the ranks' gradients together."""
        if self.fsdp:
            model.set_requires_gradient_sync(last)
            yield
        else:
            with nullcontext() if last or self.world_size == 1 else model.no_sync():
                yield

    def total(self, *values: float | torch.Tensor) -> list[float]:
        """The sums over all ranks."""
        if self.world_size == 1:
            return [float(v) for v in values]
        where = self.device if self.kind == "cuda" else "cpu"
        sums = torch.tensor([float(v) for v in values], dtype=torch.float64, device=where)
        dist.all_reduce(sums)
        return sums.tolist()


def fresh_store(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """torchrun's store, under a prefix that this start's ranks share with no other.

    torchrun keeps its store when it starts ranks again, and with it the addresses of those that died. Each
    rank here says a word of its own, and what it has heard, until all have heard the same: a rank that died
    cannot have heard the new words.
    """
    store.set(f"word/{rank}", uuid.uuid4().hex)
    while True:
        words = b" ".join(store.get(f"word/{r}") for r in range(world_size))
        heard = hashlib.sha256(words).hexdigest()
        store.set(f"heard/{rank}", heard)
        if all(store.get(f"heard/{r}") == heard.encode() for r in range(world_size)):
            return dist.PrefixStore(heard, store)
        time.sleep(0.05)


def check_launch() -> None:
    """SystemExit if this is said to be one of several processes, but not which, or how to meet the others."""
    if "RANK" not in os.environ:
        return
    torchrun = "run: torchrun --standalone --nproc_per_node=2 train.py … (their number), or: unset RANK"
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        value = os.environ.get(name, "")
        if not value or name != "MASTER_ADDR" and not re.fullmatch("[0-9]{1,9}", value):
            raise SystemExit(f"RANK is set, and {name} is {value!r}; {torchrun}")
        numbers[name] = value if name == "MASTER_ADDR" else int(value)
    if numbers["RANK"] >= numbers["WORLD_SIZE"] or numbers["MASTER_PORT"] > 65535:
        raise SystemExit(
            f"there is no RANK {numbers['RANK']} of WORLD_SIZE {numbers['WORLD_SIZE']} "
            f"at MASTER_PORT {numbers['MASTER_PORT']}; {torchrun}"
        )


def check_early(cfg: TrainConfig) -> None:
    """SystemExit for flags that cannot be right on this machine: before any file is read, and any written."""
    words = ("scratch", "resume", "auto")
    if cfg.init_from not in words and not os.path.exists(cfg.init_from):
        raise SystemExit(
            f"no checkpoint at {cfg.init_from}; --init_from is one's path, or one of {', '.join(words)}"
            + did_you_mean(cfg.init_from, list(words))
        )
    check_machine(cfg)
    if cfg.eval_only:  # writes nothing
        return
    there = os.path.abspath(cfg.out_dir)
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if not (os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)):
        why = "may not be written to" if os.path.isdir(there) else "is no folder"
        raise SystemExit(f"cannot write to {cfg.out_dir}: {there} {why}; choose another --out_dir")


def check_machine(cfg: TrainConfig) -> None:
    """SystemExit for settings, given or taken over from a run elsewhere, that this machine cannot follow."""
    if pick_device(cfg.device).partition(":")[0] != "cuda" and cfg.dtype == "float16":
        raise SystemExit("--dtype=float16 needs a CUDA device; try --dtype=float32")
    if cfg.compile == "True" and not compiler(pick_device(cfg.device).partition(":")[0]):
        raise SystemExit("--compile needs a C++ compiler; install one (Debian: g++), or leave it out")
    for flag, package in (("wandb_log", "wandb"), ("tensorboard_log", "tensorboard")):
        if getattr(cfg, flag) and not cfg.eval_only and not importlib.util.find_spec(package):
            raise SystemExit(f"--{flag} needs a package; run: pip install {package}, or give --{flag}=False")


def compiler(kind: str) -> str | None:
    """What torch.compile would call: Triton, on CUDA, a C compiler; else the usual one of C++."""
    if kind == "cuda":
        return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return os.environ.get("CXX") or shutil.which(usual)


def start_process_group(backend: str) -> None:
    """Join the other processes. Raises SystemExit if there is no meeting them."""
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = fresh_store(next(dist.rendezvous("env://"))[0], rank, world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    except (dist.DistError, ValueError) as e:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise SystemExit(
            f"no meeting the other processes at {where} ({str(e).splitlines()[0]}); is another run there? "
            "choose another --master_port, or run: torchrun --standalone …"
        ) from None


def count_ranks(cfg: TrainConfig, ppo: bool = False) -> int:
    """How many processes there are. Raises SystemExit if the work cannot be shared by so many."""
    world_size = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1  # set by torchrun
    if cfg.fsdp and "RANK" not in os.environ:
        raise SystemExit(
            "--fsdp splits the model over processes; run: torchrun --standalone --nproc_per_node=2 train.py "
            "… (their number)"
        )
    if cfg.gradient_accumulation_steps % world_size and not ppo:
        raise SystemExit(
            f"{world_size} processes cannot share --gradient_accumulation_steps="
            f"{cfg.gradient_accumulation_steps}; make it a multiple of {world_size}"
        )
    return world_size


def set_up(cfg: TrainConfig, ppo: bool = False) -> Runtime:
    """Pick device, precision and rank; joins the other processes when torchrun started this one."""
    world_size, device = count_ranks(cfg, ppo), cfg.device
    if world_size > 1 and pick_device(device.partition(":")[0]) == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(device)
    kind = device.partition(":")[0]
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    if world_size > 1 or cfg.fsdp:
        if kind == "cuda":
            torch.cuda.set_device(device)
        start_process_group("nccl" if kind == "cuda" else "gloo")
    dtype = cfg.dtype
    if dtype == "auto" and kind == "cuda":  # cards before Ampere know no bfloat16
        dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    elif dtype == "auto":
        dtype = "float32"
    # without Triton (Windows, say), or a C compiler for it, there is nothing to compile with
    able = kind == "cuda" and importlib.util.find_spec("triton") is not None and compiler(kind) is not None
    compiling = able if cfg.compile == "auto" else cfg.compile == "True"
    # TF32 for the fp32 products on CUDA; not in PPO: of what is rounded so, the probability ratio is not 1
    torch.set_float32_matmul_precision("highest" if ppo else "high")
    rank = int(os.environ.get("RANK", 0))
    return Runtime(device, getattr(torch, dtype), compiling, rank, world_size, cfg.fsdp)


# ----------------------------------------------------------------------------
# Model and state


def state_files(out_dir: str) -> list[str]:
    """States of pretraining in out_dir, which someone may have given a new ckpt.pt."""
    ckpt = os.path.join(out_dir, "ckpt.pt")
    # of the same iteration the first counts, and ckpt.pt may be without moments
    return state_paths(out_dir, "last") + [ckpt] * os.path.exists(ckpt)


def find_state(out_dir: str, lazily: bool = False) -> tuple[str, dict]:
    """Path and content of the newest state in out_dir that is whole, read like load_checkpoint does."""
    if not (paths := state_files(out_dir)):
        why = "nothing was saved there yet" if os.path.isdir(out_dir) else "there is no such folder"
        raise SystemExit(
            f"nothing to resume in {out_dir}: {why}; to begin, run the same without --init_from=resume"
        )
    return newest_state(paths, lazily)


def launch() -> str:
    """What the processes of one torchrun command share, also those it starts again; "" without torchrun."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    return " ".join(os.environ[name] for name in names if name in os.environ)


def begun_by_this_launch(out_dir: str) -> bool:
    """Whether torchrun (--max-restarts) started this process again after the run in out_dir had begun."""
    if not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) or not (paths := state_files(out_dir)):
        return False
    return newest_state(paths, lazily=True)[1].get("launch") == launch()


def configure(model_given: dict, given: dict) -> tuple[TrainConfig, Transformer, str, dict]:
    """Settings, network (fp32, on the CPU), path and content of the checkpoint to go on from ("", {}: none).

    The shape comes from the checkpoint; a flag that contradicts it is an error, and what was not given is
    taken over. With --fsdp the network of all ranks but the first is without weights, and that of a
    checkpoint whose tensors are split everywhere.
    """
    try:
        cfg = TrainConfig(**given)
        check_early(cfg)
        if begun_by_this_launch(cfg.out_dir):
            cfg.init_from = "resume"
        if cfg.init_from == "auto":
            cfg.init_from = "resume" if state_files(cfg.out_dir) else "scratch"
        elif (
            cfg.init_from != "resume"
            and (there := state_files(cfg.out_dir))
            and not (cfg.eval_only and "init_from" in given)  # else it would evaluate a new model
        ):
            raise SystemExit(
                f"{there[0]} is a run already; go on with it by --init_from=resume, "
                f"or choose another --out_dir"
            )
        if cfg.init_from == "scratch":
            args = ModelArgs(**model_given)
            if cfg.vocab_source == "llama2" and args.vocab_size != 32000:
                raise SystemExit(
                    "the Llama 2 tokenizer has 32000 ids; for your own add --vocab_source=custom"
                )
            check_shape(cfg, args)
            torch.manual_seed(cfg.seed)
            with torch.device("meta" if cfg.fsdp and int(os.environ.get("RANK", 0)) else "cpu"):
                return cfg, Transformer(args), "", {}
        return configure_from_checkpoint(cfg, model_given, given)
    except ValueError as e:
        raise SystemExit(f"{e}; see: python train.py --help") from None


def config_of(checkpoint: dict, path: str, names: set[str]) -> dict:
    """Those of a checkpoint's settings, which may be anyone's. SystemExit for one that is not of its kind."""
    kinds = {f.name: f.type for f in dataclasses.fields(TrainConfig) if f.name in names}
    config = {k: v for k, v in checkpoint.get("config", {}).items() if k in kinds}
    for name, value in config.items():
        kind = kinds[name]
        if not isinstance(value, int | float if kind is float else kind):
            told = f"{path} has {name}={value!r:.50}, not of type {kind.__name__}"
            raise SystemExit(f"{told}; add --{name}={kind.__name__.upper()}")
    return config


def configure_from_checkpoint(
    cfg: TrainConfig, model_given: dict, given: dict
) -> tuple[TrainConfig, Transformer, str, dict]:
    """configure() from a checkpoint: the one in out_dir or, to fine-tune it, of a path."""
    rank, resume = int(os.environ.get("RANK", 0)), cfg.init_from == "resume"
    if resume:
        path, checkpoint = find_state(cfg.out_dir, cfg.fsdp)
    else:
        path = os.path.normpath(cfg.init_from)  # a shell completes a folder's name with a slash
        checkpoint = load_checkpoint(path, cfg.fsdp)
    free = {"dropout"} if resume else {"dropout", "max_seq_len"}  # these change no weight's shape
    changes = {k: v for k, v in model_given.items() if k in free}
    empty = cfg.fsdp and (rank > 0 or path.endswith(SHARDED))
    model = model_from_checkpoint(checkpoint, path, empty, **changes)
    check_agreement(model_given, model.args, path)
    names = {"vocab_source"}
    if resume:
        names = {f.name for f in dataclasses.fields(TrainConfig)} - NOT_INHERITED
        names -= set() if "data" in checkpoint else NOT_LLAMA2C
    taken = config_of(checkpoint, path, names - given.keys())
    if model.args.vocab_size != 32000:  # not the Llama 2 tokenizer's, whatever the flag's default
        taken.setdefault("vocab_source", "custom")
    if rank == 0:
        print(f"from {path}, iteration {checkpoint.get('iter_num', 0)}")
    cfg = TrainConfig(**taken | given | {"init_from": cfg.init_from})
    check_machine(cfg)
    iter_num, evaluated = checkpoint.get("iter_num", 0), checkpoint.get("evaluated", "data" in checkpoint)
    # an evaluation that is still due may make another ckpt.pt, too
    more = resume and not cfg.eval_only and (cfg.max_iters > iter_num or not evaluated)
    if more and (ppo := state_paths(cfg.out_dir, "ppo_ckpt")):  # which compares with ckpt.pt
        raise SystemExit(
            f"{ppo[0]} is of PPO on {cfg.out_dir}/ckpt.pt, which has to stay as it is; to go on with that, "
            f"add --ppo; to train, --init_from={shlex.quote(cfg.out_dir)}/ckpt.pt --out_dir=ANOTHER"
        )
    return cfg, model, path, checkpoint


def check_shape(cfg: TrainConfig, args: ModelArgs) -> None:
    """SystemExit for a new model that there is no data for, or no room, before it is built."""
    count_ranks(cfg)
    if args.vocab_size > 2**16:
        raise SystemExit(
            f"--vocab_size={args.vocab_size} is above {2**16} (16 bits per token); give a smaller one, "
            "as in: python tinystories.py train_vocab --vocab_size=4096"
        )
    check_batch(cfg, args, *find_tokens(cfg, args, {}))
    if hasattr(os, "sysconf"):  # not on Windows
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        needed = 4 * (args.num_parameters() + 2 * args.max_seq_len * args.head_dim)
        if needed > memory:
            raise SystemExit(
                f"a model of {args.num_parameters():,} parameters takes {needed / 1e9:,.0f} GB, and this "
                f"machine has {memory / 1e9:,.0f}; lower --dim or --n_layers"
            )


def check_batch(cfg: TrainConfig, args: ModelArgs, folder: str, meta: dict) -> None:
    """SystemExit if there is less text to train on than one batch holds."""
    tokens, length = sum(shard["tokens"] for shard in meta["shards"][1:]), args.max_seq_len
    if cfg.batch_size * length <= tokens or cfg.eval_only:
        return
    lower = f"--batch_size={tokens // length}" if length <= tokens else f"--max_seq_len={max(tokens // 8, 1)}"
    raise SystemExit(
        f"{folder} has {tokens:,} tokens to train on, fewer than a batch of {cfg.batch_size} x {length}; "
        f"add more stories, or give {lower} or less"
    )


def check_agreement(model_given: dict, args: ModelArgs, path: str) -> None:
    """SystemExit for a flag that is not what the shape in path is, as far as that shows it."""
    for name, value in model_given.items():
        ours = getattr(args, name)
        same = math.isclose(value, ours, rel_tol=1e-6) if isinstance(value, float) else value == ours
        if name == "multiple_of":  # only leaves its trace in hidden_dim
            implied = ModelArgs(**asdict(args) | {"hidden_dim": None, "multiple_of": value}).hidden_dim
            same = same or implied == args.hidden_dim
        if not same:
            raise SystemExit(
                f"--{name}={value} contradicts {path}, where it is {ours}; leave the flag out, or train "
                "another model with another --out_dir"
            )


def make_optimizer(model: nn.Module, cfg: TrainConfig, kind: str) -> torch.optim.AdamW:
    """AdamW that decays matrices (embedding too) and leaves the norms alone."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = kind in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=fused)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict | None, runtime: Runtime) -> bool:
    """Take over moments, not hyperparameters: those come from the flags. False if there are no moments."""
    if not state or not state["state"]:
        return False
    try:
        runtime.load_moments(optimizer, state)
    except ValueError:
        raise SystemExit(
            "the checkpoint's optimizer state is of another model; start from its weights "
            "alone with --init_from=PATH and another --out_dir"
        ) from None
    return True


# ----------------------------------------------------------------------------
# Training


def get_lr(cfg: TrainConfig, iter_num: int) -> float:
    """Learning rate of an iteration: linear warm-up, then half a cosine down to min_lr."""
    if not cfg.decay_lr:
        return cfg.learning_rate
    if iter_num < cfg.warmup_iters:
        return cfg.learning_rate * (iter_num + 1) / (cfg.warmup_iters + 1)
    end = cfg.lr_decay_iters or cfg.max_iters
    if iter_num >= end:
        return cfg.min_lr
    done = (iter_num - cfg.warmup_iters) / (end - cfg.warmup_iters)
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (cfg.learning_rate - cfg.min_lr)


def evaluate(
    model: nn.Module, batches: TokenBatches, runtime: Runtime, stop: Callable[[], bool] = bool
) -> dict[str, float]:
    """Loss (nats per token), perplexity and bits per byte over a validation set, shared by all ranks; {} when
    stop() said on one of them that it should end.
    """

    def score(part: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, int]:
        xs, ys = part
        valid = int((ys != -1).sum())
        if not valid and not runtime.fsdp:
            return 0.0, 0
        with torch.no_grad(), runtime.autocast():  # in here: both belong to the thread
            _, loss = model(runtime.send(xs), runtime.send(ys))
        return loss.item() * valid if valid else 0.0, valid

    def shared() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches; of a split model, whose ranks compute together, as many as the rank with most has."""
        rest = iter(batches)
        while True:
            batch = next(rest, None)
            more, asked = batch is not None, stop()
            if runtime.fsdp:
                more, asked = runtime.total(more, asked)
            if asked or not more:
                return
            if batch is None:
                shape = batches.batch_size, batches.max_seq_len
                batch = torch.full(shape, batches.bos_id), torch.full(shape, -1)
            yield batch

    bar = {"desc": "evaluating", "unit": "batch", "delay": 3, "leave": False}
    bar["disable"] = True if runtime.rank else None  # None: where it is no terminal
    model.eval()
    nats, count = 0.0, 0
    for x, y in tqdm(shared(), total=len(batches), **bar):
        for part_nats, part_count in runtime.map(score, split_batch(x, y, runtime)):
            nats, count = nats + part_nats, count + part_count
    model.train()
    nats, count, asked = runtime.total(nats, count, stop())
    if asked:
        return {}
    loss = nats / count
    if not math.isfinite(loss):
        raise SystemExit(f"the validation loss is {loss}: training has diverged; try a lower --learning_rate")
    bits = loss / math.log(2) / batches.bytes_per_token
    return {"loss/val": loss, "perplexity/val": math.exp(min(loss, 700)), "bits_per_byte/val": bits}


def split_batch(
    x: torch.Tensor, y: torch.Tensor, runtime: Runtime
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(x, y), both (B, T), in parts of as many rows as the device should work on at a time."""
    rows = max(1, CPU_PART_TOKENS // x.shape[1]) if runtime.kind == "cpu" else len(x)
    return list(zip(x.split(rows), y.split(rows), strict=True))


def add_gradients(model: nn.Module, parts: list, weight: float, runtime: Runtime) -> torch.Tensor:
    """Add weight times each row's gradient to p.grad, part after part; returns the loss likewise."""

    def loss(part: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        with runtime.autocast():
            _, mean = model(*part)
        total = mean * (len(part[0]) * weight)
        return total, total.detach()

    return runtime.backward(loss, parts, list(model.parameters()))


def train_step(
    model, optimizer, scaler, batches: TokenBatches, cfg: TrainConfig, runtime: Runtime, iter_num: int
) -> tuple[float, float]:
    """One update from gradient_accumulation_steps micro-batches over all ranks.

    Returns the mean loss over all ranks and the gradient's norm before clipping. If one of them is not
    finite, the update is not made.
    """
    steps = cfg.gradient_accumulation_steps // runtime.world_size
    total = torch.zeros((), device=runtime.device)
    for micro in range(steps):
        x, y = next(batches)
        # dropout of micro-batch k depends on k alone: resuming or sharing it out differently changes nothing
        k = iter_num * cfg.gradient_accumulation_steps + micro * runtime.world_size + runtime.rank
        torch.manual_seed(cfg.seed + 1_000_003 * (k + 1))
        parts, weight = split_batch(x, y, runtime), 1 / (len(x) * steps)
        if runtime.kind == "cpu" and runtime.alone:
            total += add_gradients(model, parts, weight, runtime)
            continue
        for i, (xs, ys) in enumerate(parts):
            last = micro == steps - 1 and i == len(parts) - 1
            with runtime.sync_gradients(model, last):
                with runtime.autocast():
                    _, loss = model(runtime.send(xs), runtime.send(ys))
                loss = loss * (len(xs) * weight)
                scaler.scale(loss).backward()
            total += loss.detach()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
    if runtime.fsdp:
        norm = norm.full_tensor()
    (loss,), norm = runtime.total(total / runtime.world_size), float(norm)
    if math.isfinite(loss) and math.isfinite(norm):
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


class Interrupt:
    """Turns the first Ctrl-C, SIGTERM, with which clusters end jobs, or SIGHUP, of a terminal that closes,
    into a wish to stop.
    """

    def __init__(self):
        self.asked = False
        signal.signal(signal.SIGINT, self.ask)
        signal.signal(signal.SIGTERM, self.ask)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
            signal.signal(signal.SIGHUP, self.ask)

    def ask(self, number: int, frame) -> None:
        self.asked = True
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":  # print is not for signal handlers
            os.write(2, b"\nfinishing what is begun, then saving; Ctrl-C again stops at once, without\n")
        # the second one ends the run at once; but a closing terminal sends SIGHUP twice
        again = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        signal.signal(number, again.get(number, signal.SIG_IGN))


def find_tokens(cfg: TrainConfig, args: ModelArgs, checkpoint: dict) -> tuple[str, dict]:
    """Folder and meta of the token shards; raises SystemExit if the checkpoint's tokenizer was another."""
    size = 0 if cfg.vocab_source == "llama2" else args.vocab_size
    folder = token_dir(cfg.data_dir, size)
    others = glob.glob(os.path.join(glob.escape(cfg.data_dir), "tok*[0-9]", "meta.json"))
    if others and not checkpoint and not os.path.isdir(folder):
        there = min(os.path.basename(os.path.dirname(other)) for other in others)
        raise SystemExit(
            f"no token shards in {folder}; run: {command('pretokenize', cfg.data_dir, size)}, or take those "
            f"of {there}: --vocab_source=custom --vocab_size={there.removeprefix('tok')}"
        )
    trained_with = checkpoint.get("config", {}).get("tokenizer_sha256")
    model, again = tokenizer_path(cfg.data_dir, size), command("pretokenize", cfg.data_dir, size)
    if trained_with and os.path.exists(model) and (there := Tokenizer(model)).sha256 != trained_with:
        raise SystemExit(
            f"{model} is not the tokenizer that the checkpoint was trained with; "
            f"{there.put_back(trained_with)}; then: {again}"
        )
    meta = read_meta(folder, args.vocab_size)
    if trained_with not in (None, meta["tokenizer_sha256"]):
        raise SystemExit(
            f"{folder} was made with another tokenizer than the checkpoint; put its own there as {model}, "
            f"then run: {again}"
        )
    return folder, meta


def of_unknown_tokenizer(checkpoint: dict) -> bool:
    """Whether it holds, as llama2.c's do, nothing that tells which tokenizer its model was trained with."""
    return bool(checkpoint) and "tokenizer_sha256" not in checkpoint.get("config", {})


def warn_of_noise(loss: float, vocab_size: int, path: str, folder: str) -> None:
    """If the model in path foresees the tokens in folder worse than chance: it was trained with others."""
    chance = math.log(vocab_size)
    if loss > chance + 1:
        show(
            f"warning: {path} foresees {folder} worse than chance ({loss:.1f} nats per token, chance "
            f"{chance:.1f}): was it trained with another tokenizer than {folder}.model? Put that one there, "
            f"and {pretokenize_again(folder, '--force')}",
            sys.stderr,
        )


class Pretraining:
    """A run's moving parts: what a checkpoint holds, and what it takes to make the next step."""

    def __init__(self, cfg: TrainConfig, model: Transformer, path: str, checkpoint: dict, runtime: Runtime):
        """checkpoint, from path, as configure gave them."""
        self.cfg, self.runtime = cfg, runtime
        folder, meta = find_tokens(cfg, model.args, checkpoint)
        check_batch(cfg, model.args, folder, meta)
        self.config = asdict(cfg) | {"tokenizer_sha256": meta["tokenizer_sha256"]}
        shape = cfg.batch_size, model.args.max_seq_len
        ranks = {"rank": runtime.rank, "world_size": runtime.world_size}
        lanes = cfg.gradient_accumulation_steps
        self.batches = TokenBatches(folder, "train", *shape, seed=cfg.seed, lanes=lanes, **ranks)
        self.val_batches = TokenBatches(folder, "val", *shape, max_batches=cfg.eval_iters or None, **ranks)
        self.raw_model = runtime.split(model) if runtime.fsdp else model.to(runtime.device)
        self.optimizer = make_optimizer(self.raw_model, cfg, runtime.kind)
        if runtime.fsdp and path.endswith(SHARDED):
            fill_shards(path, checkpoint, self.raw_model, self.optimizer)
        self.scaler = torch.amp.GradScaler(runtime.kind, enabled=runtime.dtype == torch.float16)
        self.iter_num, self.best_val_loss = 0, math.inf
        self.doubtful = path if of_unknown_tokenizer(checkpoint) else ""  # until the first evaluation
        self.loss_sum, self.loss_count = 0.0, 0  # of the training losses since the last evaluation
        self.evaluated = False  # whether this iteration's evaluation, if one is due, has been made
        self.skipped = self.in_a_row = 0  # steps not made, for a loss or gradient that is not finite
        self.saved = -1  # iteration of the state in last.pt
        if cfg.init_from == "resume":
            self.resume(path, checkpoint)
        elif path:
            self.optimizer.state.clear()
        runtime.start_threads(self.raw_model)
        whole = runtime.compile and not runtime.fsdp  # which compiles layer by layer
        self.model = torch.compile(self.raw_model) if whole else self.raw_model
        self.train_model = self.model
        if runtime.world_size > 1 and not runtime.fsdp:
            ids = [runtime.device] if runtime.kind == "cuda" else None
            self.train_model = DistributedDataParallel(
                self.model, ids, forward_sync_buffers=False, gradient_as_bucket_view=True
            )

    def resume(self, path: str, checkpoint: dict) -> None:
        self.iter_num = checkpoint.get("iter_num", 0)
        there = self.runtime.fsdp and path.endswith(SHARDED)  # the moments, already
        loaded = there or load_optimizer(self.optimizer, checkpoint.get("optimizer"), self.runtime)
        if not loaded and self.iter_num and self.runtime.rank == 0:
            print("the checkpoint has no optimizer state: its moments start from zero", file=sys.stderr)
        if "data" in checkpoint and not self.cfg.eval_only:  # one of ours: others' best loss is of other text
            self.best_val_loss = self.best_of(checkpoint)
            self.batches.load_state_dict(checkpoint["data"])
            if checkpoint["scaler"]:
                self.scaler.load_state_dict(checkpoint["scaler"])
            self.loss_sum, self.loss_count = map(float, checkpoint["train_loss"])
            self.skipped = checkpoint.get("skipped", 0)
            self.evaluated = checkpoint.get("evaluated", True)
            if os.path.basename(path) != "ckpt.pt":  # else killed between the two files of its last save
                self.saved = self.iter_num
            self.set_lr(max(self.iter_num - 1, 0))

    def best_of(self, checkpoint: dict) -> float:
        """The lowest validation loss so far; if that was on other batches, what ckpt.pt has on these."""
        cfg, was, path = self.cfg, checkpoint["config"], os.path.join(self.cfg.out_dir, "ckpt.pt")
        same = all(was.get(name) == getattr(cfg, name) for name in ("eval_iters", "batch_size"))
        if same or self.runtime.fsdp or checkpoint["best_val_loss"] == math.inf or not os.path.exists(path):
            return checkpoint["best_val_loss"]
        best = model_from_checkpoint(load_checkpoint(path), path).to(self.runtime.device)
        loss = evaluate(best, self.val_batches, self.runtime)["loss/val"]
        if self.runtime.rank == 0:
            print(f"on this validation set, {path} has a loss of {loss:.4f}")
        return loss

    def save(self, best: bool) -> None:
        """Write last.pt (of a split model last-ITERATION.dcp); if best, or the first, also model.bin and the
        same as ckpt.pt (of a split model without moments). All ranks call it.
        """
        folder, runtime, fsdp = self.cfg.out_dir, self.runtime, self.runtime.fsdp
        moments = self.optimizer.state_dict()
        state = {
            "model": {} if fsdp else self.raw_model.state_dict(),
            "optimizer": moments | {"state": {}} if fsdp else moments,
            "model_args": asdict(self.raw_model.args),
            "iter_num": self.iter_num,
            "best_val_loss": self.best_val_loss,
            "config": self.config,
            "data": self.batches.state_dict(),
            "scaler": self.scaler.state_dict(),
            "train_loss": (self.loss_sum, self.loss_count),
            "skipped": self.skipped,
            "evaluated": self.evaluated,
            "launch": launch(),
        }
        ckpt = os.path.join(folder, "ckpt.pt")
        first = any(runtime.total(runtime.rank == 0 and not os.path.exists(ckpt)))
        try:
            # the newest state last: it says that this evaluation is over and done with
            if best or first:
                weights = runtime.whole_weights(self.raw_model)
                if runtime.rank == 0:
                    write_model(os.path.join(folder, "model.bin"), self.raw_model.args, weights)
                    save_checkpoint(ckpt, state | {"model": weights})
            if fsdp or runtime.rank == 0:
                tensors = shards(self.raw_model, self.optimizer) if fsdp else None
                save_state(folder, "last", state, self.cfg.keep, tensors)
            self.saved = self.iter_num
        except (OSError, RuntimeError) as e:  # torch.save hides a full disk in a RuntimeError
            raise SystemExit(f"cannot save to {folder} ({e}); what was saved before is whole") from None

    def evaluate(self, metrics: Metrics | None, stop: Callable[[], bool]) -> None:
        """Evaluate, and report; then save, so that a resumed run need not do it again. Or stop() that."""
        if metrics and (self.iter_num == 0 or self.cfg.eval_only):  # else one knows how long it takes
            tokens = there = self.val_batches.num_tokens - 1
            if self.cfg.eval_iters:
                size = self.cfg.batch_size * self.raw_model.args.max_seq_len
                tokens = min(there, self.cfg.eval_iters * size)
            show(f"evaluating on {tokens:,} tokens (--eval_iters)")
        scores = evaluate(self.model, self.val_batches, self.runtime, stop)
        if not scores:
            return
        loss = scores["loss/val"]
        train_loss = self.loss_sum / max(self.loss_count, 1)
        # a fine-tuned model may well do worse than its origin on other text: iteration 0 is no rival
        best = self.iter_num > 0 and loss < self.best_val_loss and not self.cfg.eval_only  # which knows none
        if metrics:
            before = f"train loss {train_loss:.4f}, " if self.loss_count else ""
            show(
                f"step {self.iter_num}: {before}val loss {loss:.4f}, "
                f"perplexity {scores['perplexity/val']:.3f}, "
                f"{scores['bits_per_byte/val']:.4f} bits per byte" + " (best so far)" * best
            )
            metrics.log(self.iter_num, scores)
            if self.doubtful:
                warn_of_noise(loss, self.raw_model.args.vocab_size, self.doubtful, self.val_batches.dir)
        self.doubtful = ""
        if best:
            self.best_val_loss = loss
        self.loss_sum, self.loss_count, self.evaluated = 0.0, 0, True
        if (self.iter_num or not self.cfg.max_iters) and not self.cfg.eval_only:
            self.save(best or self.cfg.always_save_checkpoint)

    def set_lr(self, iter_num: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = get_lr(self.cfg, iter_num)

    def step(self) -> tuple[float, float]:
        """One iteration; returns its mean loss and the norm of the gradient."""
        self.set_lr(self.iter_num)
        parts = self.train_model, self.optimizer, self.scaler, self.batches
        before = self.batches.state_dict()
        try:
            loss, norm = train_step(*parts, self.cfg, self.runtime, self.iter_num)
        except SystemExit:  # damaged data: nothing of what was learned before is lost
            if self.runtime.alone and self.iter_num:
                self.batches.load_state_dict(before)
                self.save(best=False)
            raise
        self.iter_num, self.evaluated = self.iter_num + 1, False
        if math.isfinite(loss) and math.isfinite(norm):
            self.loss_sum, self.loss_count, self.in_a_row = self.loss_sum + loss, self.loss_count + 1, 0
        else:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        return loss, norm


def show(line: str, file: IO | None = None) -> None:
    tqdm.write(line, file)
    (file or sys.stdout).flush()


def tell_story(run: Pretraining, tokenizer) -> None:
    """Print a story by the model as it is now, always from the same random numbers."""
    generator = torch.Generator().manual_seed(run.cfg.seed)
    (ids,) = generate(run.raw_model, [[tokenizer.bos_id]], 200, generator=generator)
    show(f"  > {' '.join(showable(tokenizer.decode(ids)).split())}")


def give_up(run: Pretraining) -> None:
    """After too many steps that could not be made: save the state, if it is any good; raises SystemExit."""
    args, cfg, runtime = run.raw_model.args, run.cfg, run.runtime
    try:
        loss = evaluate(run.model, run.val_batches, run.runtime)["loss/val"]
    except SystemExit:
        loss = math.inf
    # a step just before may have had a gradient that was finite and yet ruined the weights
    good = loss < 1 + min(run.best_val_loss, math.log(args.vocab_size))
    if good:
        run.save(best=False)
    there = any(runtime.total(runtime.rank == 0 and bool(state_files(cfg.out_dir))))
    raise SystemExit(
        f"{run.in_a_row} steps in a row had a loss or gradient that is not finite: training has diverged. "
        + ("The state before them is saved" if good else "The state before them is no good and was not saved")
        + ("; to go on from the newest saved one, add --init_from=resume " if there else "; begin anew with ")
        + f"--learning_rate={cfg.learning_rate / 2:g} (or less)"
    )


def log_step(run: Pretraining, metrics: Metrics, bar: tqdm, values: dict[str, float]) -> None:
    values["lr"] = get_lr(run.cfg, run.iter_num - 1)
    shown = {"loss": f"{values['loss/train']:.4f}", "tok/s": f"{values['tok/s']:,.0f}"}
    if peak := peak_flops(run.runtime):
        values["mfu"] = values["tok/s"] * run.raw_model.flops_per_token() / peak
        shown["MFU"] = f"{100 * values['mfu']:.1f}%"
    metrics.log(run.iter_num, values)
    bar.set_postfix(shown)


def pretrain(run: Pretraining, metrics: Metrics | None, tokenizer) -> None:
    """The loop: evaluate when due, stop when asked or done, else take a step. metrics on rank 0 only."""
    cfg, runtime, interrupt = run.cfg, run.runtime, Interrupt()
    tokens_per_iter = cfg.gradient_accumulation_steps * cfg.batch_size * run.raw_model.args.max_seq_len
    bar = tqdm(total=cfg.max_iters, initial=run.iter_num, unit="it", disable=None if metrics else True)
    since = shown = saved = time.perf_counter()
    since_iter = run.iter_num
    while True:
        due = run.iter_num % cfg.eval_interval == 0 or run.iter_num >= cfg.max_iters or cfg.eval_only
        if due and (not run.evaluated or cfg.eval_only):
            began = time.perf_counter()
            run.evaluate(metrics, lambda: interrupt.asked)
            if tokenizer and run.evaluated and not interrupt.asked:
                tell_story(run, tokenizer)
            saved = time.perf_counter()
            since += saved - began
        # whoever was asked tells the others: the ranks stop together
        asked, long_ago = runtime.total(interrupt.asked, time.perf_counter() - saved > SAVE_SECONDS)
        if run.iter_num >= cfg.max_iters or asked or cfg.eval_only:
            break
        if long_ago and not run.in_a_row:  # what is skipped may come of weights that are ruined
            run.save(best=False)
            saved = time.perf_counter()
        loss, norm = run.step()
        bar.update()
        if run.in_a_row:
            if metrics:
                show(
                    f"step {run.iter_num - 1} skipped: loss {loss}, norm of the gradient {norm} "
                    f"({run.in_a_row} in a row)"
                )
                metrics.log(run.iter_num, {"skipped": run.skipped})
            if run.in_a_row >= cfg.max_skipped:
                break
        elif run.iter_num % cfg.log_interval == 0:
            now = time.perf_counter()
            speed = (run.iter_num - since_iter) * tokens_per_iter / (now - since)
            since, since_iter = now, run.iter_num
            if metrics:
                log_step(run, metrics, bar, {"loss/train": loss, "grad_norm": norm, "tok/s": speed})
                if bar.disable and now - shown > 10:  # not on a terminal: a line now and then
                    shown, left = now, (cfg.max_iters - run.iter_num) * tokens_per_iter / speed
                    print(
                        f"iteration {run.iter_num}/{cfg.max_iters}: loss {loss:.4f}, {speed:,.0f} tok/s, "
                        f"{left / 60:.0f} min left",
                        flush=True,
                    )
    bar.close()
    if run.in_a_row >= cfg.max_skipped:
        give_up(run)
    if cfg.eval_only:
        if asked:
            raise SystemExit("stopped")
        return
    if run.saved < run.iter_num:
        run.save(best=False)
    if metrics and asked and (run.iter_num < cfg.max_iters or not run.evaluated):
        say_stopped(run.iter_num, runtime)
    elif metrics:
        print(f"next: {run_command(cfg, run.raw_model.args, 'model.bin')}")


@contextmanager
def saved_on_failure(run, save: Callable[[], None]) -> Iterator[None]:
    """A run that cannot report, as the disk is full or nobody reads on, saves what it has, and ends.

    Of several processes only the first knows of it: they end without.
    """
    try:
        yield
    except OSError as e:
        try:
            sys.stdout.flush()
        except OSError:  # what waits to be printed would only fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if run.runtime.alone and not run.cfg.eval_only and run.iter_num > max(run.saved, 0):
            save()
        saved = f"saved up to {run.saved}" if run.saved > 0 else "nothing more was saved"
        raise SystemExit(
            f"cannot report on the run any more ({e.strerror or e}); stopped after iteration {run.iter_num}, "
            f"{saved}; repair that, then give the same command with --init_from=resume"
        ) from None


def peak_flops(runtime: Runtime) -> float:
    """What the GPUs of all ranks can do per second in bfloat16; 0 where that is not known."""
    name = torch.cuda.get_device_name(runtime.device) if runtime.kind == "cuda" else ""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), 0) * runtime.world_size


def run_command(cfg: TrainConfig, args: ModelArgs, name: str) -> str:
    """What tells stories by a model in out_dir."""
    model = tokenizer_path(cfg.data_dir, 0 if cfg.vocab_source == "llama2" else args.vocab_size)
    for_run = os.path.splitext(model)[0] + ".bin"
    make = "" if os.path.exists(for_run) else f"python tokenizer.py -t {shlex.quote(model)} && "
    return make + shlex.join(["./run", os.path.join(cfg.out_dir, name), "-z", for_run])


def warn_early(cfg: TrainConfig, model: Transformer, iters: int, on_cpu: bool) -> None:
    """Of a run of so many more iterations that takes weeks, as the default model's does on a CPU, or that
    ends before its learning rate is reached.
    """
    tokens = iters * cfg.gradient_accumulation_steps * cfg.batch_size * model.args.max_seq_len
    days = model.flops_per_token() * tokens / (6e10 * (os.cpu_count() or 1)) / 86400
    if on_cpu and days > 14:
        print(
            f"warning: on this CPU that takes some {days:,.0f} days; README has smaller models under "
            '"On a laptop"',
            file=sys.stderr,
        )
    if cfg.decay_lr and 0 < iters and cfg.max_iters <= cfg.warmup_iters:
        print(
            f"warning: --warmup_iters={cfg.warmup_iters} is longer than the run, which will not reach the "
            f"learning rate of {cfg.learning_rate:g}; try --warmup_iters={cfg.max_iters // 10}",
            file=sys.stderr,
        )


def check_lengths(ppo: PPOConfig, args: ModelArgs, prompt: int) -> None:
    """SystemExit for a prompt or a target that the context has no room for; prompt: tokens of the longest."""
    longest = min(args.max_seq_len, prompt + ppo.max_gen_len)
    if "length" in reward_names(ppo.reward) and ppo.target_len > longest:
        limit = (
            f"--max_gen_len={ppo.max_gen_len}" if longest < args.max_seq_len else f"the context of {longest}"
        )
        raise SystemExit(
            f"no story can come to --target_len={ppo.target_len} within {limit}; choose a lower target, "
            f"like --target_len={max(longest // 2, 1)}"
        )
    if not ppo.prompts and ppo.start_len >= args.max_seq_len:
        raise SystemExit(
            f"--start_len={ppo.start_len} leaves no room in the context of {args.max_seq_len} tokens; choose "
            f"a lower one, like --start_len={max(args.max_seq_len // 4, 1)}"
        )


def configure_ppo(
    model_given: dict, given: dict, ppo_given: dict
) -> tuple[TrainConfig, PPOConfig, dict, str, dict | None]:
    """Settings, the reference's checkpoint, and path and content of the state of a PPO run to go on with."""
    out_dir = given.get("out_dir", TrainConfig.out_dir)
    path = os.path.join(out_dir, "ckpt.pt")
    if given.get("init_from") not in ("resume", "auto"):
        raise SystemExit(f"--ppo fine-tunes {path}; add --init_from=resume")
    paths = state_paths(out_dir, "ppo_ckpt")
    ppo_given = {k: v for k, v in ppo_given.items() if (k, v) != ("ppo_iters", 0)}  # which is the default
    try:
        check_early(TrainConfig(**given))
        if not paths:  # of which the rest would come
            PPOConfig(**ppo_given)
    except ValueError as e:
        raise SystemExit(f"{e}; see: python train.py --help") from None
    split = given.get("fsdp", False)
    checkpoint = load_checkpoint(path, split)
    state_path, state = newest_state(paths, split) if paths else ("", None)
    try:
        args = ModelArgs(**checkpoint["model_args"])
        check_agreement({k: v for k, v in model_given.items() if k != "dropout"}, args, path)
        train_names = {f.name for f in dataclasses.fields(TrainConfig)}
        if state:
            saved = {k: v for k, v in state["config"].items() if k not in NOT_INHERITED}
        else:
            names = {"vocab_source", "data_dir"} - given.keys()
            saved = PPO_DEFAULTS | config_of(checkpoint, path, names)
            if "max_iters" not in given and "ppo_iters" not in ppo_given:
                ppo_given = ppo_given | {"ppo_iters": PPO_ITERS}
        if "max_iters" in given:
            saved.pop("ppo_iters", None)
        if args.vocab_size != 32000:
            saved.setdefault("vocab_source", "custom")
        cfg = TrainConfig(**{k: v for k, v in saved.items() if k in train_names} | given)
        ppo_names = {f.name for f in dataclasses.fields(PPOConfig)}
        ppo = PPOConfig(**{k: v for k, v in saved.items() if k in ppo_names} | ppo_given)
    except (ValueError, TypeError) as e:
        raise SystemExit(f"{e}; see: python train.py --help") from None
    if cfg.dtype not in ("auto", "float32") or cfg.compile == "True":
        raise SystemExit("PPO computes in float32 and without compilation; leave --dtype and --compile out")
    cfg.dtype, cfg.compile = "float32", "False"
    if cfg.fsdp and ppo.advantage == "gae" and ppo.critic != "reference":
        raise SystemExit(
            f"--fsdp does not split --critic={ppo.critic}; take --critic=reference or --advantage=rloo "
            "--group_size=4"
        )
    check_machine(cfg)
    if not ppo.prompts:  # else when they are there
        check_lengths(ppo, args, ppo.start_len)
    return cfg, ppo, checkpoint, state_path, state


def prompts_for(cfg: TrainConfig, ppo: PPOConfig, args: ModelArgs, checkpoint: dict, tokenizer):
    """prompts(iteration, count) to train on, and held-out ones: from the token shards or from --prompts."""
    count = cfg.eval_iters * cfg.batch_size or 512
    if not ppo.prompts:
        folder, _ = find_tokens(cfg, args, checkpoint)
        stories = StoryStarts(folder, "train")
        held_out = StoryStarts(folder, "val").sample(np.random.default_rng(0), count, ppo.start_len)
        return lambda i, n: stories.sample(np.random.default_rng([cfg.seed, i]), n, ppo.start_len), held_out
    try:
        with open(ppo.prompts, encoding="utf-8-sig") as f:
            lines = [line.rstrip("\n") for line in f if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else f"not UTF-8 ({e.reason})"
        raise SystemExit(f"--prompts={ppo.prompts}: {why}; name a text file, one prompt per line") from None
    if not lines:
        raise SystemExit(f"--prompts={ppo.prompts} holds no prompt; write one per line")
    ids = [tokenizer.encode(line, bos=True) for line in lines]
    if (longest := max(map(len, ids))) >= args.max_seq_len:
        raise SystemExit(
            f"--prompts={ppo.prompts}: a prompt of {longest} tokens leaves no room in a context of "
            f"{args.max_seq_len}; shorten it"
        )
    check_lengths(ppo, args, longest)
    train = [p for i, p in enumerate(ids) if i % 10 or len(ids) < 10]  # every tenth is held out
    held_out = (ids[::10] if len(ids) >= 10 else ids)[:count]

    def sample(i: int, n: int) -> list[list[int]]:
        return [train[k] for k in np.random.default_rng([cfg.seed, i]).integers(len(train), size=n)]

    return sample, held_out


def run_ppo(model_given: dict, given: dict, ppo_given: dict) -> None:
    cfg, ppo, checkpoint, state_path, state = configure_ppo(model_given, given, ppo_given)
    runtime = set_up(cfg, ppo=True)
    args = ModelArgs(**checkpoint["model_args"] | {"dropout": 0.0})
    path = os.path.join(cfg.out_dir, "ckpt.pt")
    config = checkpoint.get("config", {}) | {"vocab_source": cfg.vocab_source, "data_dir": cfg.data_dir}
    tokenizer = find_tokenizer({"config": config, "model_args": asdict(args)}, path, strict=True)
    prompts, held_out = prompts_for(cfg, ppo, args, checkpoint, tokenizer)
    agree_on(runtime, state_path, state or {}, cfg.out_dir)
    run = PPO(ppo, cfg, runtime, checkpoint, tokenizer, prompts, held_out)
    if state:
        run.resume(state, state_path)
    runtime.start_threads(run.policy)
    if of_unknown_tokenizer(checkpoint) and not (state or ppo.prompts or cfg.fsdp):
        folder, _ = find_tokens(cfg, args, checkpoint)
        text = TokenBatches(folder, "val", 4, args.max_seq_len, max_batches=1)
        loss = evaluate(run.reference, text, runtime)["loss/val"]
        if runtime.rank == 0:
            warn_of_noise(loss, args.vocab_size, path, folder)
    metrics = None if runtime.rank else open_metrics(cfg, run.iter_num, ppo=True, fresh=state is None)
    with saved_on_failure(run, lambda: run.save(write_model, best=False)):
        if metrics:
            print(f"reference: {path}, iteration {checkpoint.get('iter_num', 0)}")
            print(f"policy: {state_path}, iteration {state['iter_num']}" if state else "policy: a copy of it")
            trained = sum(p.numel() for p in run.trained)
            print(
                f"{run.policy.num_parameters():,} parameters, {trained:,} trained, on {runtime.world_size} x "
                f"{runtime.device}; {max(run.last - run.iter_num, 0)} iterations of {run.size} episodes"
            )
            if run.iter_num >= run.last and not cfg.eval_only:
                print(
                    f"{cfg.out_dir} is at iteration {run.iter_num} already; to go on, "
                    f"give --ppo_iters={run.iter_num - run.first + PPO_ITERS}",
                    file=sys.stderr,
                )
        train_ppo(run, metrics, Interrupt(), write_model)
        if metrics and run.iter_num >= run.last and run.iter_num > run.first and not cfg.eval_only:
            told = run_command(cfg, args, "ppo_model.bin")
            print(f"next: {told} -t 1 -p 1\n  and: python ppo.py report {shlex.quote(cfg.out_dir)}")
    end_process_group(runtime)


def write_model(path: str, args: ModelArgs, weights: dict[str, torch.Tensor]) -> None:
    """model.bin for run.c, in the oldest layout that can tell all there is."""
    version = 0 if (args.rope_theta, args.norm_eps) == DEFAULTS else 1
    write_bin(path, args, weights, version)


def open_metrics(cfg: TrainConfig, iter_num: int, **how) -> Metrics:
    try:
        return Metrics(cfg, iter_num, **how)
    except OSError as e:
        raise SystemExit(f"cannot write to {cfg.out_dir}: {e.strerror}; choose another --out_dir") from None


def end_process_group(runtime: Runtime) -> None:
    """A process group that outlives its threads aborts the process at its end."""
    if not runtime.alone:
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def claim(out_dir: str, make: bool = False) -> IO | None:
    """Rank 0's lock of out_dir, which one run at a time may write to; None if the folder is not there."""
    if os.environ.get("RANK", "0") != "0":
        return None
    try:
        if make:
            os.makedirs(out_dir, exist_ok=True)
        return lock(out_dir, other="another --out_dir") if os.path.isdir(out_dir) else None
    except OSError as e:
        raise SystemExit(f"cannot write to {out_dir}: {e.strerror}; choose another --out_dir") from None


def agree_on(runtime: Runtime, path: str, checkpoint: dict, out_dir: str) -> None:
    """SystemExit, on all ranks, if they have not read the same state."""
    mine = os.path.basename(path), checkpoint.get("iter_num", 0)
    if any(runtime.total(mine != runtime.broadcast(mine))):
        raise SystemExit(
            f"the processes see different states in {out_dir}; it must lie on a file system that all of them "
            "share: choose another --out_dir"
        )


def main(argv: list[str] | None = None) -> None:
    check_launch()
    model_given, given, ppo_given = parse_cli(argv)
    out_dir = given.get("out_dir", TrainConfig.out_dir)
    # before anything is read there, so that no other run changes it in between
    held = None if given.get("eval_only") else claim(out_dir)
    if ppo_given.pop("ppo", False):
        run_ppo(model_given, given, {"ppo": True} | ppo_given)
        return
    if ppo_given:
        raise SystemExit(f"--{next(iter(ppo_given))} is for PPO; add --ppo, or leave it out")
    cfg, model, path, checkpoint = configure(model_given, given)
    runtime = set_up(cfg)
    agree_on(runtime, path, checkpoint, out_dir)
    run = Pretraining(cfg, model, path, checkpoint, runtime)
    metrics = tokenizer = None
    if runtime.rank == 0:
        if cfg.max_iters <= run.iter_num != 0 and run.evaluated and not cfg.eval_only:
            print(
                f"{cfg.out_dir} is at iteration {run.iter_num} already; to go on, raise --max_iters",
                file=sys.stderr,
            )
        held = held or (None if cfg.eval_only else claim(out_dir, make=True))
        metrics = open_metrics(cfg, run.iter_num, fresh=cfg.init_from != "resume")
        try:
            about = {"config": run.config, "model_args": asdict(model.args)}
            if not cfg.fsdp:  # a split model cannot tell a story on one rank
                tokenizer = find_tokenizer(about, os.path.join(cfg.out_dir, "ckpt.pt"))
        except SystemExit as e:
            print(f"no sample stories: {e}", file=sys.stderr)
    with saved_on_failure(run, lambda: run.save(best=False)):
        if metrics:
            tokens = cfg.gradient_accumulation_steps * cfg.batch_size * model.args.max_seq_len
            compiled = ", compiled (the first steps take a minute)" * runtime.compile
            print(
                f"{model.num_parameters():,} parameters on {runtime.world_size} x {runtime.device}, "
                f"{str(runtime.dtype).removeprefix('torch.')}{compiled}; {tokens:,} tokens per iteration",
                flush=True,
            )
            if not cfg.eval_only:
                warn_early(cfg, model, cfg.max_iters - run.iter_num, runtime.kind == "cpu")
            if cfg.eval_only and not path:
                print("this model is new; to evaluate a trained one: --init_from=resume", file=sys.stderr)
        pretrain(run, metrics, tokenizer)
    run.train_model = None  # nothing of DDP may be left either
    end_process_group(runtime)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped; what was saved before is whole") from None
