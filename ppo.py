"""PPO: fine-tune a pretrained Llama towards a reward, at a price for leaving what it was.

    python train.py --out_dir=stories260K --init_from=resume --ppo        # all flags: python train.py --help
    python ppo.py report stories260K                                      # what it did, as pictures and csv

An iteration rolls out responses to prompts, scores them, estimates advantages, and takes a few clipped
policy-gradient steps (Schulman et al. 2017; for language models Ziegler et al. 2019, Stiennon et al. 2020).
It maximises J = E[reward] - beta * KL(policy || reference), the KL summed over a response's tokens.
Not for: training reward models, dialogue of several turns, rewards in the middle of a response.
"""

import copy
import csv
import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ModuleNotFoundError as e:
    raise SystemExit(
        f"{e.name} is not installed for Python {sys.version.split()[0]}; run: "
        ". .venv/bin/activate, or with 3.11 or newer: pip install -r requirements.txt"
    ) from None

from model import (
    SHARDED,
    ModelArgs,
    Transformer,
    check_numbers,
    decode,
    fill_shards,
    load_checkpoint,
    model_from_checkpoint,
    newest_state,
    opt,
    sample,
    save_checkpoint,
    save_state,
    shards,
    state_paths,
)

ROLLOUT_ROWS = 200  # episodes decoded together on a CPU core
GPU_EVAL_ROWS = 512  # held-out episodes decoded together on a GPU, at least
CPU_PART_TOKENS = 1024  # tokens that a CPU core learns from at a time: they stay in its caches
PAST_END = 0.02  # a path is told on past its end while more than this share of its stories would still go on
REPLAYED = ("tokens", "start", "end", "on", "returns")  # what a checkpoint keeps of the critic's rollouts
CURVE = {  # columns of report.csv, and their names in metrics.jsonl
    "iteration": "iter",
    **{name: f"ppo/{name}" for name in ("episodes", "reward", "mae", "kl", "J", "length", "ended")},
    "seconds": "ppo/iteration_seconds",
}
# settings that held-out stories depend on
HELD_OUT = ("eval_iters", "eval_samples", "batch_size", "start_len", "prompts", "max_gen_len", "data_dir")
EVAL_SEED = 2**40  # of the random numbers of held-out responses, the same at every evaluation

# ---- configuration -----------------------------------------------------------------------------------


@dataclass
class PPOConfig:
    """What to optimise and how. Raises ValueError for values that make no sense."""

    ppo: bool = opt(False, "fine-tune out_dir/ckpt.pt with PPO instead of pretraining")
    ppo_iters: int = opt(
        0, "PPO iterations after ckpt.pt's last one (default: 15, or up to --max_iters, inclusive)"
    )
    # the task
    reward: str = opt(
        "length",
        "length, keyword, or FILE.py:FUNCTION of your own (the file is run); a weighted sum is "
        "written like length+0.5*keyword",
    )
    target_len: int = opt(200, "tokens that --reward=length wants, from BOS to end token, prompt included")
    keywords: str = opt("", "words that --reward=keyword wants in the story, with commas")
    reward_norm: bool = opt(False, "subtract the scores' running mean and divide by their running deviation")
    reward_clip: float = opt(0.0, "clip scores to +- this; 0 for no limit")
    missing_eos_penalty: float = opt(
        0.0, "taken from the score of a story cut off before its end, in training"
    )
    start_len: int = opt(30, "a prompt is BOS and the first 0 to start_len - 1 tokens of a story")
    prompts: str = opt("", "take the prompts from this file instead, one per line")
    max_gen_len: int = opt(300, "longest response, in tokens")
    rollout_size: int = opt(0, "episodes per iteration, over all processes (default: 8 * batch_size)")
    group_size: int = opt(1, "responses to each prompt")
    # the price of leaving the reference
    init_kl_coef: float = opt(0.2, "beta, the price of a nat")
    kl_penalty: str = opt(
        "exact",
        "exact: of the whole distribution at each token, differentiated; k1: the sampled token's log-ratio, "
        "in the reward",
        choices=("exact", "k1"),
    )
    adaptive_kl: bool = opt(False, "move beta so that the KL comes to --kl_target")
    kl_target: float = opt(6.0, "nats per response, for --adaptive_kl")
    kl_horizon: int = opt(10000, "episodes in which beta may change by about a fifth")
    # advantages
    advantage: str = opt(
        "gae",
        "gae: by a critic; rloo and grpo: against the other responses to the same prompt (--group_size >= 2)",
        choices=("gae", "rloo", "grpo"),
    )
    lam: float = opt(0.99, "lambda of GAE: 1 has no bias, less has less noise")
    critic: str = opt(
        "reference",
        "what the critic's value head reads: the reference's features, a trunk of its own (separate), or the "
        "policy's (shared)",
        choices=("reference", "separate", "shared"),
    )
    critic_lr: float = opt(3e-3, "the critic's learning rate; falls to 0 in every fit")
    critic_epochs: int = opt(4, "passes of the critic over the latest rollouts")
    critic_replay: int = opt(1600, "how many episodes of the latest rollouts it learns from")
    critic_warmup: int = opt(1, "first rollouts, which move only the critic")
    critic_warmup_epochs: int = opt(30, "its passes over each of those")
    vf_coef: float = opt(0.1, "weight of the value loss in a shared trunk")
    exact_end: bool = opt(
        False,
        "where the reward tells what a story would score if it ended at any token (length does), tell "
        "stories on past their ends and learn from all the places where they might have ended",
    )
    others: float = opt(
        1.0,
        "weight, with exact_end, of learning with which other token to go on; 0 leaves that to the KL, "
        "and needs no critic",
    )
    # updates
    ppo_epochs: int = opt(2, "passes of the policy over each rollout")
    clip: float = opt(0.8, "how far below 1 the probability ratio is followed")
    clip_high: float = opt(
        5.0,
        "how far above; the usual 0.2 lets rare tokens, such as the end, become 20% likelier an iteration",
    )
    target_kl: float = opt(
        0.02, "stop an iteration's passes when old and new policy differ by this (k3); 0: never"
    )
    ent_coef: float = opt(0.0, "weight of an entropy bonus")
    train_only: str = opt("", "train only parameters whose names match this regular expression")
    adam_eps: float = opt(1e-2, "epsilon of AdamW; so large, weights that see but noise stay where they are")
    eval_samples: int = opt(4, "responses to each of the eval_iters * batch_size held-out prompts")

    def __post_init__(self):
        one = "target_len start_len max_gen_len group_size ppo_epochs eval_samples kl_horizon"
        check_numbers(self, **dict.fromkeys(one.split(), 1))
        if self.lam > 1:
            raise ValueError(f"lam={self.lam} must be in [0, 1]")
        if self.clip >= 1:
            raise ValueError(f"clip={self.clip} must be below 1")
        if self.others != 1 and not self.exact_end:
            raise ValueError(f"others={self.others} has a meaning with exact_end only; add --exact_end")
        if self.keywords and not any(name == "keyword" for name in reward_names(self.reward)):
            raise ValueError(f"keywords={self.keywords} has a meaning with --reward=keyword only; add that")
        if self.adaptive_kl and not (self.init_kl_coef and self.kl_target):
            raise ValueError("adaptive_kl multiplies init_kl_coef, by kl_target's measure: neither may be 0")
        if self.advantage != "gae" and self.group_size < 2:
            raise ValueError(
                f"advantage={self.advantage} compares responses to one prompt; add --group_size=4, say"
            )
        try:
            re.compile(self.train_only)
        except re.error as e:
            raise ValueError(f"train_only={self.train_only} is no regular expression ({e})") from None


# ---- rewards -----------------------------------------------------------------------------------------

# prompts, stories (prompt and response), their token ids (end token included), whether each ended by itself
# it may have an attribute if_ended(tokens): (N, T) ids → (N, T-1), entry t what it would give if tokens 0 … t
# were the story but for its end token
Reward = Callable[[list[str], list[str], list[list[int]], list[bool]], Sequence[float]]


def length_reward(target_len: int) -> Reward:
    """-|tokens - target_len| / 100, so that a hundred tokens off cost one."""

    def reward(prompts, stories, tokens, ended):
        return [-abs(len(ids) - target_len) / 100 for ids in tokens]

    def if_ended(tokens: torch.Tensor) -> torch.Tensor:
        length = torch.arange(2, tokens.shape[1] + 1, device=tokens.device)
        return (-(length - target_len).abs() / 100).expand(len(tokens), -1)

    reward.if_ended = if_ended
    return reward


def keyword_reward(words: Sequence[str]) -> Reward:
    """The share of the words that a story mentions, as whole words, in any case."""
    patterns = [re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE) for word in words]
    return lambda prompts, stories, tokens, ended: [
        sum(bool(p.search(story)) for p in patterns) / len(patterns) for story in stories
    ]


def reward_from_file(spec: str) -> Reward:
    """The function of FILE.py:FUNCTION; running the file is what the user asked for."""
    path, _, name = spec.rpartition(":")
    if not os.path.isfile(path):
        raise SystemExit(
            f"--reward={spec}: there is no file {path}; give --reward=length, keyword or FILE.py:FUNCTION"
        )
    module_spec = importlib.util.spec_from_file_location("user_reward", path)
    if module_spec is None:
        raise SystemExit(f"--reward={spec}: {path} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look theirs up there
    sys.path.append(os.path.dirname(os.path.abspath(path)))  # it may import what lies beside it
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:  # the user's code may raise anything
        raise SystemExit(f"--reward={spec}: {path} failed with {type(e).__name__}: {e}; repair it") from None
    takes = f"write one: def {name or 'reward'}(prompts, stories, tokens, ended)"
    if not callable(function := getattr(module, name, None)):
        raise SystemExit(f"--reward={spec}: {path} has no function {name}; {takes}")
    try:
        inspect.signature(function).bind(*"four")
    except TypeError:
        raise SystemExit(f"--reward={spec}: {name} cannot be called with four lists; {takes}") from None
    except ValueError:  # one written in C may not tell
        pass
    return function


def terms(spec: str) -> list[str]:
    """The terms of --reward=spec; of FILE.py:FUNCTION alone, FILE may have a + in it."""
    path, _, name = spec.rpartition(":")
    return [spec] if os.path.isfile(path) and "+" not in name else spec.split("+")


def reward_names(spec: str) -> list[str]:
    """The names in --reward=spec, without their weights."""
    return [term.rpartition("*")[2].strip() for term in terms(spec)]


class Scorer:
    """The weighted rewards of PPOConfig.reward, checked, with the story named that one of them fails on."""

    def __init__(self, cfg: PPOConfig, tokenizer):
        self.tokenizer, self.parts = tokenizer, []  # (name, weight, Reward)
        for term in terms(cfg.reward):
            weight, _, name = (part.strip() for part in term.rpartition("*"))
            try:
                if not math.isfinite(number := float(weight or 1)):
                    raise ValueError(weight)
            except ValueError:
                raise SystemExit(
                    f"--reward={cfg.reward}: {weight} is no number; write it like length+0.5*keyword"
                ) from None
            if name == "length":
                reward = length_reward(cfg.target_len)
            elif name == "keyword":
                words = [word.strip() for word in cfg.keywords.split(",") if word.strip()]
                if not words:
                    raise SystemExit("--reward=keyword needs words; add them like --keywords=dog,happy")
                reward = keyword_reward(words)
            elif ":" in name:
                reward = reward_from_file(name)
            else:
                raise SystemExit(
                    f"--reward={name} is not known; give --reward=length, keyword or FILE.py:FUNCTION"
                )
            name = name.rpartition(":")[2]
            if cfg.exact_end and not callable(getattr(reward, "if_ended", None)):
                raise SystemExit(
                    f"--exact_end needs rewards that tell what ending anywhere would score; {name} does not: "
                    "leave --exact_end out, or give your function an attribute if_ended (see README.md)"
                )
            self.parts.append((name, number, reward))

    def __call__(self, prompts: list[list[int]], tokens: list[list[int]], ended: list[bool]) -> torch.Tensor:
        """Weighted scores of the parts, (N, parts); raises SystemExit naming the story at fault."""
        if not tokens:
            return torch.zeros(0, len(self.parts))
        texts = (
            [self.tokenizer.decode(ids) for ids in prompts],
            [self.tokenizer.decode(ids) for ids in tokens],
        )
        columns = [
            self.run(name, reward, *texts, tokens, ended) * weight for name, weight, reward in self.parts
        ]
        return torch.stack(columns, 1)

    def if_ended(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Weighted score (N, T-1) of tokens (N, T) ended after each token; it has to be finite where mask."""
        total = torch.zeros(len(tokens), tokens.shape[1] - 1, device=tokens.device)
        for name, weight, reward in self.parts:
            try:
                scores = torch.as_tensor(reward.if_ended(tokens), device=tokens.device)
                if scores.shape != total.shape or not scores[mask].isfinite().all():
                    raise ValueError(f"it must give finite scores of shape {tuple(total.shape)}")
                total += weight * scores
            except Exception as e:  # the user's code may raise anything
                raise SystemExit(
                    f"if_ended of the reward {name} failed with {type(e).__name__}: {e}; repair it, or leave "
                    "--exact_end out"
                ) from None
        return total

    def run(self, name: str, reward: Reward, *columns: list) -> torch.Tensor:
        stories = columns[1]
        try:
            scores = self.numbers(reward(*columns), len(stories))
        except Exception as together:  # the user's code may raise anything
            cause, where = together, ""
            for i, story in enumerate(stories):  # whose fault it is shows one by one
                try:
                    self.numbers(reward(*([column[i]] for column in columns)), 1)
                except Exception as alone:
                    cause, where = alone, f", on the story {story[:80]!r}"
                    break
            raise SystemExit(
                f"the reward {name} failed with {type(cause).__name__}: {cause}{where}"
            ) from None
        if len(bad := (~scores.isfinite()).nonzero()):
            story = stories[int(bad[0])]
            raise SystemExit(f"the reward {name} is {float(scores[bad[0]])} for the story {story[:80]!r}")
        return scores

    @staticmethod
    def numbers(scores, count: int) -> torch.Tensor:
        scores = torch.tensor([float(score) for score in scores], dtype=torch.float32)
        if len(scores) != count:
            raise ValueError(f"{len(scores)} scores for {count} stories")
        return scores


class RunningMoments:
    """Mean and deviation of all scores so far (Chan et al. 1979)."""

    def __init__(self, count: float = 0.0, mean: float = 0.0, squares: float = 0.0):
        self.count, self.mean, self.squares = count, mean, squares

    def update(self, x: torch.Tensor) -> None:
        x = x.cpu().double()
        delta, total = float(x.mean()) - self.mean, self.count + len(x)
        self.squares += float((x - x.mean()).square().sum()) + delta**2 * self.count * len(x) / total
        self.mean, self.count = self.mean + delta * len(x) / total, total

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) / max(math.sqrt(self.squares / self.count), 1e-8)


# ---- rollout -----------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """N episodes padded on the right to T tokens, on the model's device.

    Of the tensors per token, (N, T-1), entry t belongs to the choice of token t + 1, made in the state of
    tokens 0 … t; it counts where that token is part of the response: mask. A path may go on past the end of
    its story, told as if the end token had not been drawn; else path and story are the same.
    """

    tokens: torch.Tensor  # (N, T) int64, of the path
    start: torch.Tensor  # (N,) length of the prompt
    end: torch.Tensor  # (N,) length of prompt and path, end token included if the path has one
    ended: torch.Tensor  # (N,) bool: the path has one, it was not cut off at a cap
    story_end: torch.Tensor  # (N,) length of prompt and story, end token included if the story has one
    story_ended: torch.Tensor  # (N,) bool: the story has one
    logp: torch.Tensor  # (N, T-1) log-probability of what was chosen
    reach: torch.Tensor  # (N, T-1) share of the path's stories that come to make the choice; 0 outside mask
    features: torch.Tensor  # (N, T-1, dim) last hidden state of the policy

    @property
    def mask(self) -> torch.Tensor:
        """(N, T-1) bool: choices of the path's tokens after the prompt, the end token's included."""
        t = torch.arange(self.tokens.shape[1] - 1, device=self.tokens.device)
        return (t >= self.start[:, None] - 1) & (t < self.end[:, None] - 1)

    def ids(self, end_id: int) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        """Of prompts, of whole stories, and of whole paths."""
        rows = self.tokens.tolist()
        prompts, stories, paths = (
            [row[:n] for row, n in zip(rows, ends.tolist(), strict=True)]
            for ends in (self.start, self.story_end, self.end)
        )
        for story, ended in zip(stories, self.story_ended.tolist(), strict=True):
            story[-1] = end_id if ended else story[-1]
        return prompts, stories, paths


@torch.no_grad()
def rollout(
    policy: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_id: int,
    u: torch.Tensor,
    until: torch.Tensor | None = None,
) -> Rollout:
    """Let the policy continue prompts at temperature 1 over the whole vocabulary.

    u (N, max_new_tokens), uniform in [0, 1), makes the choices: row n's text depends on prompt n and u[n].
    With until (N,), uniform as well, paths go on past the ends of their stories: other tokens than the end
    are drawn, and a story ends where no more than until of those with its path would go on. When that is
    less than PAST_END, the path is drawn like any other from there on.
    """
    steps = []  # (rows, logp, reach, features) of each step
    device = policy.rope_cos.device
    going = torch.ones(len(prompts), device=device)  # share of a path's stories that have not ended
    story = torch.zeros(len(prompts), dtype=torch.long)  # length of a story that has ended before its path

    def choose(rows: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        logits = policy.output(features).float()
        total, reach, choices = logits.logsumexp(-1), going[rows], logits
        if until is not None:
            past = reach > PAST_END
            choices = logits.clone()
            choices[past, end_id] = -math.inf
            going[rows] = torch.where(past, -torch.expm1(logits[:, end_id] - total), 1.0) * reach
            ends = (past & (going[rows] <= until.to(device)[rows])).cpu() & (story[rows] == 0)
            story[rows[ends]] = len(steps) + 1
        ids = sample(choices, u[rows, len(steps)].to(device))
        steps.append((rows, logits.gather(-1, ids[:, None])[:, 0] - total, reach, features))
        return ids

    new = decode(policy, prompts, max_new_tokens, (end_id,), choose)
    start = torch.tensor([len(prompt) for prompt in prompts])
    end = start + torch.tensor([len(ids) for ids in new])
    N, T = len(prompts), int(end.max())
    tokens = torch.zeros(N, T, dtype=torch.long)
    for row, prompt, ids in zip(tokens, prompts, new, strict=True):
        row[: len(prompt) + len(ids)] = torch.tensor([*prompt, *ids])
    logp, reach = torch.zeros(2, N, T - 1, device=device)
    features = torch.zeros(N, T - 1, policy.args.dim, device=device)
    for step, (rows, step_logp, step_reach, step_features) in enumerate(steps):
        at = start[rows] - 1 + step
        real = at < end[rows] - 1  # rows that have ended stay in the batch for a while
        where = rows[real].to(device), at[real].to(device)
        real = real.to(device)
        logp[where], features[where] = step_logp[real], step_features[real].float()
        reach[where] = step_reach[real]
    ended = torch.tensor([bool(ids) and ids[-1] == end_id for ids in new])
    story[start + story > end] = 0  # rows cut off at a cap may have been asked on
    story_end, story_ended = torch.where(story > 0, start + story, end), ended | (story > 0)
    columns = (tokens, start, end, ended, story_end, story_ended)
    return Rollout(*(x.to(device) for x in columns), logp, reach, features)


def join(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Concatenate episodes (dicts of tensors, N first) that are padded to different lengths."""
    joined = {}
    for key in parts[0]:
        columns = [part[key] for part in parts]
        if columns[0].dim() > 1:
            width = max(x.shape[1] for x in columns)
            columns = [F.pad(x, (0, 0) * (x.dim() - 2) + (0, width - x.shape[1])) for x in columns]
        joined[key] = torch.cat(columns)
    return joined


def length_parts(index: torch.Tensor, end: torch.Tensor, tokens: int) -> list[torch.Tensor]:
    """Split episodes (indices (n,)) into parts of similar length, of at most so many tokens with padding."""
    index = index[end[index].argsort(stable=True)]
    parts, first, lengths = [], 0, end[index].tolist()
    for i, length in enumerate(lengths):
        if i > first and (i + 1 - first) * length > tokens:
            parts.append(index[first:i])
            first = i
    return [*parts, index[first:]] if len(index) else []


# ---- pure functions ----------------------------------------------------------------------------------


def weighted_mean(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean of x with weights >= 0, or where a mask is True, as a scalar."""
    return torch.where(weight > 0, weight * x, 0.0).sum() / weight.sum()


def whiten(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x - mean) / deviation, both weighted over all at once, 0 where the weight is; and that deviation."""
    mean = weighted_mean(x, weight)
    deviation = (weighted_mean((x - mean).square(), weight) + 1e-8).sqrt()
    return torch.where(weight > 0, (x - mean) / deviation, 0.0), deviation


def explained_variance(x: torch.Tensor, guess: torch.Tensor, weight: torch.Tensor) -> float:
    """Share of the weighted variance of x that guess explains, at most 1; 0 where there is none."""
    spread, left = (weighted_mean((y - weighted_mean(y, weight)).square(), weight) for y in (x, x - guess))
    return float(1 - left / spread) if spread > 0 else 0.0


def k1(logp: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Unbiased estimate of KL(p || q) from log p and log q of ids drawn from p (Schulman 2020)."""
    return logp - other


def k3(logp: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The same with less variance and never negative: q/p - 1 - log(q/p)."""
    d = (other - logp).clamp(-20, 20)
    return torch.expm1(d) - d


def exact_kl(logp: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of whole distributions, log p and log q (…, V) → (…)."""
    return (logp.exp() * (logp - other)).sum(-1)


def log_not(logp: torch.Tensor) -> torch.Tensor:
    """log(1 - p) of log p; p counts as no more than 1 - 1e-6."""
    return torch.log1p(-logp.exp().clamp(max=1 - 1e-6))


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    lam: float,
    gamma: float = 1.0,
    hazard: torch.Tensor | None = None,
    ending: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimates and returns (advantage + value), all (N, T), 0 outside mask.

    mask must be one stretch per row; after it the value is 0 (Schulman et al. 2016, eq. 16). Where an episode
    ends with a known probability, hazard, and then has ending to come, values, rewards, and what is returned
    are those of going on: a state is worth hazard * ending + (1 - hazard) * values.
    """
    if hazard is None:
        hazard = ending = torch.zeros_like(rewards)
    advantages = torch.zeros_like(rewards)
    last, next_value = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        inside, stop = mask[:, t], hazard[:, t]
        # last is what the states after this one bring above their values
        step = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * last
        advantages[:, t] = torch.where(inside, step, 0.0)
        last = torch.where(inside, (1 - stop) * step, last)
        next_value = torch.where(inside, stop * ending[:, t] + (1 - stop) * values[:, t], next_value)
    return advantages, torch.where(mask, advantages + values, 0.0)


def group_baseline(returns: torch.Tensor, group_size: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What to subtract from each of the returns (N,), and to divide by, (N,) each.

    Responses to one prompt lie together. rloo: the mean of the others' (Ahmadian et al. 2024) and 1; grpo:
    the mean of all and their deviation (Shao et al. 2024).
    """
    groups = returns.view(-1, group_size)
    if kind == "rloo":
        others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
        return others.flatten(), torch.ones_like(returns)
    mean, deviation = groups.mean(1, keepdim=True), groups.std(1, keepdim=True) + 1e-4
    return mean.expand_as(groups).flatten(), deviation.expand_as(groups).flatten()


def ppo_loss(
    logp: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, clip: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """max(-A r, -A clip(r, 1 - clip, 1 + clip_high)) per token with r = exp(logp - old), and r.

    Schulman et al. 2017, eq. 7; asymmetric as in DAPO (Yu et al. 2025). The log-ratio is held within +-20.
    """
    ratio = (logp - old).clamp(-20, 20).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip_high)), ratio


def adapt_beta(beta: float, kl: float, cfg: PPOConfig, episodes: int) -> float:
    """beta after so many episodes with this mean KL (Ziegler et al. 2019, sec. 2.2)."""
    error = min(max(kl / cfg.kl_target - 1, -0.2), 0.2)
    return beta * (1 + error * min(episodes / cfg.kl_horizon, 1))  # a huge rollout must not turn its sign


def best_of(scores: torch.Tensor, n: int) -> float:
    """Expected best of n drawn without replacement from each row of scores (P, m), n <= m; mean over rows."""
    m = scores.shape[1]
    ranked = scores.double().sort(1).values.mean(0)
    weights = torch.tensor([math.comb(i, n - 1) / math.comb(m, n) for i in range(m)], dtype=torch.float64)
    return float(ranked @ weights)


def tilted(scores: torch.Tensor, beta: float) -> tuple[float, float]:
    """Reward and KL of the optimum π_ref e^{R/beta} / Z per prompt, from the reference's scores (P, m)."""
    w = (scores.double() / beta).softmax(1)
    kl = (w * (w * scores.shape[1]).clamp_min(1e-300).log()).sum(1)
    return float((w * scores).sum(1).mean()), float(kl.mean())


def optimum(scores: torch.Tensor, beta: float) -> float:
    """J* = beta log E_ref[e^{R/beta}], the highest J there is, from the reference's scores (P, m)."""
    if beta == 0:
        return float(scores.max(1).values.mean())
    return float(beta * ((scores.double() / beta).logsumexp(1) - math.log(scores.shape[1])).mean())


# ---- critic ------------------------------------------------------------------------------------------


class Critic(nn.Module):
    """Expected return of each state, from its features and the position, which features hardly tell.

    Its last layer starts at zero, so that every value is 0 at first.
    """

    WAVES, HIDDEN = 16, 128

    def __init__(self, args: ModelArgs, trunk: Transformer | None = None):
        """trunk: a Transformer of the critic's own, in place of the features that forward is given."""
        super().__init__()
        self.trunk = trunk
        # wavelengths from 16 tokens to twice the context
        low, high = math.log(math.pi / args.max_seq_len), math.log(2 * math.pi / 16)
        waves = torch.outer(torch.arange(args.max_seq_len), torch.linspace(low, high, self.WAVES).exp())
        self.register_buffer("position", torch.cat([waves.sin(), waves.cos()], -1), persistent=False)
        self.head = nn.Sequential(
            nn.Linear(args.dim + 2 * self.WAVES, self.HIDDEN),
            nn.SiLU(),
            nn.Linear(self.HIDDEN, self.HIDDEN),
            nn.SiLU(),
            nn.Linear(self.HIDDEN, 1),
        )
        nn.init.zeros_(self.head[-1].weight)
        nn.init.zeros_(self.head[-1].bias)

    def forward(self, features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """features (B, T, dim) of tokens (B, T) → values (B, T)."""
        if self.trunk is not None:
            features = self.trunk.features(tokens)
        B, T, _ = features.shape
        return self.head(torch.cat([features, self.position[:T].expand(B, T, -1)], -1))[..., 0]


# ---- the run -----------------------------------------------------------------------------------------


def rollout_size(ppo: PPOConfig, cfg) -> int:
    """Episodes per iteration. Raises SystemExit if groups of responses do not come out even."""
    size = ppo.rollout_size or 8 * cfg.batch_size
    if size % ppo.group_size:
        raise SystemExit(
            f"--group_size={ppo.group_size} must divide the rollout's {size} episodes; "
            f"add --rollout_size={-(-size // ppo.group_size) * ppo.group_size}"
        )
    return size


class PPO:
    """A run's moving parts: policy, reference, critic, their optimizers, and where the run stands.

    cfg has train.py's flags and runtime its device and ranks; prompts(iteration, count) gives training
    prompts, ids with BOS first.
    """

    def __init__(
        self,
        ppo: PPOConfig,
        cfg,
        runtime,
        checkpoint: dict,
        tokenizer,
        prompts: Callable[[int, int], list[list[int]]],
        eval_prompts: list[list[int]],
    ):
        self.ppo, self.cfg, self.runtime, self.tokenizer = ppo, cfg, runtime, tokenizer
        self.prompts, self.eval_prompts = prompts, eval_prompts
        self.scorer, self.moments = Scorer(ppo, tokenizer), RunningMoments()
        path = os.path.join(cfg.out_dir, "ckpt.pt")
        # no dropout: the probability ratio would not be 1 at the start
        empty = runtime.fsdp and runtime.rank > 0  # there, rank 0's weights arrive in parts
        self.reference = model_from_checkpoint(checkpoint, path, empty, dropout=0.0)
        self.reference_hash = runtime.broadcast(None if empty else fingerprint(self.reference))
        if runtime.fsdp:
            self.policy, self.reference = runtime.split(self.reference), runtime.split(self.reference)
        else:
            self.reference.to(runtime.device)
            self.policy = copy.deepcopy(self.reference)
        self.reference.requires_grad_(False).eval()
        self.policy.eval()
        self.args = self.policy.args
        self.names = [n for n, _ in self.policy.named_parameters() if re.search(ppo.train_only, n)]
        if not self.names:
            raise SystemExit(
                f"--train_only={ppo.train_only} matches no parameter; write a part of a name such as "
                "layers.0.attention.wq.weight"
            )
        for name, p in self.policy.named_parameters():
            p.requires_grad_(name in self.names)
        self.trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.critic, self.replay = None, []
        if ppo.advantage == "gae" and (ppo.others or not ppo.exact_end):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(cfg.seed)
                separate = ppo.critic == "separate"
                trunk = copy.deepcopy(self.reference).requires_grad_(True) if separate else None
                self.critic = Critic(self.args, trunk).to(runtime.device)
        self.shared = self.critic is not None and ppo.critic == "shared"
        groups = [
            {"params": [p for p in self.trained if p.dim() >= 2], "weight_decay": cfg.weight_decay},
            {"params": [p for p in self.trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        if self.shared:  # its head learns along with the policy
            groups.append({"params": list(self.critic.parameters()), "weight_decay": 0.0, "critic": True})
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=ppo.adam_eps)
        self.first = self.iter_num = checkpoint.get("iter_num", 0)
        # --max_iters is the last iteration, --ppo_iters how many there are
        self.last = self.first + ppo.ppo_iters if ppo.ppo_iters else cfg.max_iters + 1
        self.beta, self.episodes, self.seconds = ppo.init_kl_coef, 0, 0.0
        self.evaluated, self.evaluation = False, {}
        self.best = (-math.inf, 0.0)  # reward and KL of the best evaluation
        self.saved = self.first  # the newest state's iteration; the reference's needs no saving
        self.size, self.longest = rollout_size(ppo, cfg), min(ppo.max_gen_len, self.args.max_seq_len)
        self.skipped = self.in_a_row = 0  # steps that were not made, for a gradient that is not finite

    # -- collecting

    def generator(self, *key: int) -> torch.Generator:
        """Random numbers that depend on the seed and the key alone: there is no state to save."""
        seed = self.cfg.seed
        for number in key:
            seed = (seed * 6364136223846793005 + 1442695040888963407 + number) % 2**63
        return torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def collect(
        self, prompts: list[list[int]], u: torch.Tensor, until: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Roll out, score, and look up what learning needs, shared by all ranks; all of it on every rank."""
        runtime = self.runtime
        share = -(-len(prompts) // runtime.world_size)
        first = min(runtime.rank * share, len(prompts))
        mine = slice(first, first + share)
        prompts, u, until = prompts[mine], u[mine], until if until is None else until[mine]
        began = time.perf_counter()
        rows = ROLLOUT_ROWS if runtime.kind == "cpu" else max(1, len(prompts))
        chunks = [slice(i, i + rows) for i in range(0, len(prompts), rows)]
        cap, end_id = self.longest, self.tokenizer.bos_id
        with runtime.gathered(self.policy):
            rollouts = runtime.map(
                lambda c: rollout(
                    self.policy, prompts[c], cap, end_id, u[c], until if until is None else until[c]
                ),
                chunks,
            )
            rollouts = [vars(r) | {"mask": r.mask} | self.scores(r) for r in rollouts]
        batch = join(rollouts) if rollouts else {}
        seconds = time.perf_counter() - began
        with runtime.gathered(self.reference), runtime.gathered(self.policy, layers=False):
            if batch:
                batch["reference"] = self.over_parts(batch, lambda ids: self.reference.features(ids))
                batch |= self.compare(batch)
        if runtime.world_size > 1:
            batch = join([part for part in runtime.gather(batch) if part])
        batch["seconds"] = torch.tensor(seconds)
        return batch

    def scores(self, r: Rollout) -> dict[str, torch.Tensor]:
        """(N, parts): scores of the stories, and cut_scores of the paths, of use where those were cut off."""
        prompts, stories, paths = r.ids(self.tokenizer.bos_id)
        scores = self.scorer(prompts, stories, r.story_ended.tolist())
        cut_scores, past = scores.clone(), (r.story_ended & ~r.ended).nonzero()[:, 0].tolist()
        rows = ([prompts[i] for i in past], [paths[i] for i in past])
        cut_scores[past] = self.scorer(*rows, [False] * len(past))
        device = r.tokens.device
        return {"scores": scores.to(device), "cut_scores": cut_scores.to(device)}

    def parts(self, index: torch.Tensor, batch: dict) -> list[torch.Tensor]:
        """Episodes in parts of similar length, as many tokens at a time as suit the device."""
        return length_parts(index, batch["end"], CPU_PART_TOKENS if self.runtime.kind == "cpu" else 2**16)

    def over_parts(self, batch: dict, function: Callable) -> torch.Tensor:
        """function(tokens (B, W)) → (B, W, …) of all episodes in parts without much padding; (N, T-1, …)."""

        def run(index: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():  # in here: it belongs to the thread
                return function(batch["tokens"][index, : int(batch["end"][index].max()) - 1])

        out, (N, T) = None, batch["tokens"].shape
        parts = self.parts(torch.arange(N, device=batch["end"].device), batch)
        for index, values in zip(parts, self.runtime.map(run, parts), strict=True):
            if out is None:
                out = values.new_zeros(N, T - 1, *values.shape[2:])
            out[index, : values.shape[1]] = values
        return out

    def compare(self, batch: dict) -> dict[str, torch.Tensor]:
        """Per token: exact KL to the reference, k1, entropy, log-probability under the reference; and of the
        end token, chosen or not, the log-probability and k1.
        """
        names = ("kl", "k1", "entropy", "reference_logp", "end_logp", "end_k1")
        where = batch["mask"].nonzero()
        chosen = batch["tokens"][:, 1:]

        def run(at: torch.Tensor) -> torch.Tensor:
            at = at.unbind(1)
            with torch.no_grad():
                logp = self.policy.output(batch["features"][at]).float().log_softmax(-1)
                other = self.reference.output(batch["reference"][at]).float().log_softmax(-1)
                reference_logp = other.gather(-1, chosen[at][:, None])[:, 0]
                kl, entropy = exact_kl(logp, other), -(logp.exp() * logp).sum(-1)
                end, other_end = (x[:, self.tokenizer.bos_id] for x in (logp, other))
                chosen_k1 = k1(batch["logp"][at], reference_logp)
                return torch.stack([kl, chosen_k1, entropy, reference_logp, end, k1(end, other_end)])

        parts = where.split(8192)
        columns = batch["logp"].new_zeros(len(names), *batch["mask"].shape)
        for at, values in zip(parts, self.runtime.map(run, parts), strict=True):
            columns[:, at[:, 0], at[:, 1]] = values
        return dict(zip(names, columns, strict=True))

    # -- learning

    def shaped(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores as --reward_norm and --reward_clip want them."""
        if self.ppo.reward_norm:
            scores = self.moments.normalise(scores)
        limit = self.ppo.reward_clip or math.inf
        return scores.clamp(-limit, limit)

    def rewards(self, batch: dict) -> torch.Tensor:
        """(N, T-1): the price of each token's KL, and the score at the last one."""
        if self.ppo.reward_norm:
            self.moments.update(batch["scores"].sum(1))
        total = self.shaped(batch["cut_scores"].sum(1)) - self.ppo.missing_eos_penalty * ~batch["ended"]
        if self.ppo.kl_penalty == "k1":
            rewards = -self.beta * batch["k1"]
        else:  # a choice answers for the KL of the states it leads to; that of its own is differentiated
            rewards = -self.beta * F.pad(batch["kl"][:, 1:], (0, 1))
        rewards = torch.where(batch["mask"], rewards, 0.0)
        rewards[torch.arange(len(total)), batch["end"] - 2] += total
        return rewards

    def endings(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, T-1) each: the chance that a story with this path ends here, and what it would have to come.

        A path is told on past the ends of its stories while enough of them would go on; after that it ends
        where it does.
        """
        mask, ended = batch["mask"], batch["tokens"][:, 1:] == self.tokenizer.bos_id
        hazard = torch.where(batch["reach"] > PAST_END, batch["end_logp"].exp(), ended.float())
        ending = self.shaped(self.scorer.if_ended(batch["tokens"], mask))
        if self.ppo.kl_penalty == "k1":
            ending = ending - self.beta * batch["end_k1"]
        return torch.where(mask, hazard, 0.0), torch.where(mask, ending, 0.0)

    def values(self, batch: dict) -> torch.Tensor:
        """(N, T-1) by the critic as it is."""
        if self.ppo.critic == "separate":
            return self.over_parts(batch, lambda ids: self.critic(None, ids)) * batch["mask"]
        features = batch["features" if self.ppo.critic == "shared" else "reference"]
        with torch.no_grad():
            return self.critic(features, batch["tokens"][:, :-1]) * batch["mask"]

    def fit_critic(self, epochs: int) -> None:
        """Regress the critic (of a shared trunk the head alone) on the returns of the latest rollouts.

        The learning rate falls to 0 each time: a critic that still jitters makes noise of the advantages.
        """
        params = list(self.critic.parameters())
        optimizer = torch.optim.AdamW(params, betas=(0.9, 0.99), eps=1e-5, weight_decay=0.01)
        generator, size = self.generator(2, self.iter_num), max(1, self.cfg.batch_size // 2)
        for epoch in range(epochs):
            jobs = [
                (batch, index)
                for batch in self.replay
                for index in torch.randperm(len(batch["end"]), generator=generator).split(size)
            ]
            for i, job in enumerate(torch.randperm(len(jobs), generator=generator).tolist()):
                batch, index = jobs[job]
                for group in optimizer.param_groups:
                    group["lr"] = self.ppo.critic_lr * (1 - (epoch + i / len(jobs)) / epochs)
                count = batch["on"][index].sum()

                def loss(part: torch.Tensor, batch=batch, count=count) -> tuple[torch.Tensor, torch.Tensor]:
                    width = int(batch["end"][part].max()) - 1
                    features = None if self.critic.trunk else batch["critic_features"][part, :width]
                    value = self.critic(features, batch["tokens"][part, :width])
                    error = (value - batch["returns"][part, :width]).square()
                    total = (batch["on"][part, :width] * error).sum() / count
                    return total, total.detach()

                self.step(optimizer, params, loss, index.to(count.device), batch)

    def remember(self, batch: dict) -> None:
        """Keep a rollout for the critic, and drop what is more than critic_replay episodes old."""
        features = batch["features" if self.shared else "reference"]
        kept = {key: batch[key] for key in REPLAYED}
        self.replay.append(kept | {"critic_features": features})
        while len(self.replay) > 1 and (
            self.shared or sum(len(b["end"]) for b in self.replay[1:]) >= self.ppo.critic_replay
        ):
            del self.replay[0]

    def step(
        self, optimizer, params: list, loss: Callable, index: torch.Tensor, batch: dict, limit: float = 0.0
    ) -> torch.Tensor:
        """One optimizer step on episodes, shared by all ranks. loss(part) → (scalar, statistics to add up).

        Returns the statistics; where the first of them exceeds limit (0: none), or the gradient is not
        finite, the step is not made.
        """
        index = index[batch["end"][index].argsort(stable=True)]  # dealt out so that ranks get like lengths
        runtime, parts = self.runtime, self.parts(index[self.runtime.rank :: self.runtime.world_size], batch)
        if split := runtime.fsdp and optimizer is self.optimizer:
            stats = runtime.backward_split(loss, parts, index[:1], self.policy)
        else:
            stats = runtime.reduce(params, runtime.backward(loss, parts, params))
        norm = nn.utils.clip_grad_norm_(params, self.cfg.grad_clip or math.inf)
        self.grad_norm = norm.full_tensor() if split else norm
        finite = bool(self.grad_norm.isfinite())
        if finite and not (limit and float(stats.flatten()[0]) > limit):
            optimizer.step()
        if optimizer is self.optimizer:
            self.in_a_row = 0 if finite else self.in_a_row + 1
            self.skipped += not finite
        optimizer.zero_grad(set_to_none=True)
        return stats

    def advantages(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Whitened advantages (N, T-1), and the deviation they were divided by.

        Adds to batch the returns, "on", the share of a path's stories that a choice is made for, and "unit"
        (N, 1), by which what an episode gains or costs is multiplied: with grpo 1 / its group's deviation.
        With exact_end all of it is of the choice among the other tokens than the end, and "going_on" tells
        how much more it brings to make that choice than to end.
        """
        ppo, mask, rewards = self.ppo, batch["mask"], self.rewards(batch)
        hazard = ending = torch.zeros_like(rewards)
        if ppo.exact_end:
            hazard, ending = self.endings(batch)
        batch["on"] = batch["reach"] * (1 - hazard)
        # targets without bias, whatever the critic thinks so far
        returns = gae(rewards, torch.zeros_like(rewards), mask, 1.0, hazard=hazard, ending=ending)[1]
        batch["returns"], batch["unit"] = returns, torch.ones_like(returns[:, :1])
        if self.critic is not None:
            batch["values"] = self.values(batch)
            advantages, _ = gae(rewards, batch["values"], mask, ppo.lam, hazard=hazard, ending=ending)
            self.remember(batch)
        elif ppo.advantage == "gae":  # of the others nothing is learnt: only the deviation counts
            advantages = returns
        else:
            totals = torch.lerp(returns, ending, hazard).gather(1, batch["start"][:, None] - 1)[:, 0]
            baseline, deviation = group_baseline(totals, ppo.group_size, ppo.advantage)
            batch["unit"] = 1 / deviation[:, None]
            # a path's total holds what a choice brings as often as it is reached: on weighs it so again
            gained = returns if ppo.exact_end else totals[:, None].expand_as(rewards)
            advantages = (gained - baseline[:, None]) * batch["unit"]
        advantages, scale = whiten(advantages, batch["on"])
        if ppo.exact_end:
            batch["going_on"] = torch.where(batch["on"] > 0, batch["unit"] * (returns - ending), 0.0)
            advantages = ppo.others * advantages
        return advantages, scale

    def update_policy(self, batch: dict, advantages: torch.Tensor, scale: torch.Tensor) -> dict[str, float]:
        """The policy's passes over the rollout, each minibatch one step; returns statistics."""
        ppo, cfg = self.ppo, self.cfg
        params = self.trained + (list(self.critic.parameters()) if self.shared else [])
        size = cfg.batch_size * cfg.gradient_accumulation_steps
        generator, logged = self.generator(3, self.iter_num), []
        for _ in range(ppo.ppo_epochs):
            for index in torch.randperm(len(advantages), generator=generator).split(size):
                index = index.to(advantages.device)
                count = batch["reach"][index].sum()  # the mean is over the tokens of the whole step

                def loss(part: torch.Tensor, count=count) -> tuple[torch.Tensor, torch.Tensor]:
                    total, stats = self.loss(batch, advantages, scale, part)
                    return total / count, stats / count

                stats = self.step(self.optimizer, params, loss, index, batch, ppo.target_kl)
                if ppo.target_kl and float(stats[0]) > ppo.target_kl:
                    return self.summary(logged, stopped=True)
                if self.grad_norm.isfinite():  # else it was no step
                    logged.append(torch.cat([stats.cpu(), self.grad_norm.cpu()[None]]))
        return self.summary(logged, stopped=False)

    def loss(self, batch: dict, advantages, scale, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum over the response tokens of some episodes of what is to become small; and sums of statistics.

        scale is what the advantages were divided by: the other terms have to be, too.
        """
        ppo, width = self.ppo, int(batch["end"][part].max()) - 1
        inside = batch["mask"][part, :width]

        def of(x: torch.Tensor) -> torch.Tensor:
            return x[part, :width][inside]

        if self.runtime.fsdp:  # which works within forward alone
            features, logits = None, self.policy(batch["tokens"][part, :width])[0][inside]
        else:
            features = self.policy.features(batch["tokens"][part, :width])
            logits = self.policy.output(features[inside])
        logps = logits.float().log_softmax(-1)  # (n, V)
        chosen, reach, went_on = of(batch["tokens"][:, 1:]), of(batch["reach"]), of(batch["on"])
        logp, old = logps.gather(-1, chosen[:, None])[:, 0], of(batch["logp"])
        priced = reach * of(batch["unit"].expand_as(batch["reach"]))
        advantages, clips = of(advantages), (ppo.clip, ppo.clip_high)
        losses, ratio = ppo_loss(logp, old, advantages, *clips)
        ratios, moved = [ratio], reach * k3(old, logp)
        if "going_on" in batch:  # two choices: to go on or to end; if on, with which of the other tokens
            end, end_was = logps[:, self.tokenizer.bos_id], of(batch["end_logp"])
            on, on_was = log_not(end), log_not(end_was)
            first, second = (
                ppo_loss(on, on_was, of(batch["going_on"]) / scale, *clips),
                ppo_loss(logp - on, old - on_was, advantages, *clips),
            )
            losses, ratios = first[0] + second[0], [first[1], second[1]]
            moved = went_on * k3(old - on_was, logp - on)
            moved = moved + reach * exact_kl(torch.stack([on_was, end_was], -1), torch.stack([on, end], -1))
        losses = went_on * losses
        entropy = -(logps.exp() * logps).sum(-1)
        total = losses.sum() - ppo.ent_coef / scale * (priced * entropy).sum()
        if ppo.kl_penalty == "exact":
            with torch.no_grad():
                reference = self.reference.output(of(batch["reference"])).float().log_softmax(-1)
            total = total + self.beta / scale * (priced * exact_kl(logps, reference)).sum()
        value_loss = torch.zeros(())
        if self.shared:
            values = self.critic(features, batch["tokens"][part, :width])[inside]
            value_loss = (went_on * (values - of(batch["returns"])).square()).sum()
            total = total + ppo.vf_coef * value_loss
        with torch.no_grad():
            clipped = sum((r < 1 - ppo.clip) | (r > 1 + ppo.clip_high) for r in ratios) > 0
            stats = [
                moved.sum(),
                losses.sum(),
                (went_on * clipped).sum(),
                (reach * (ratio - 1).abs()).sum(),
                value_loss,
            ]
        wide = torch.float32 if total.device.type == "mps" else torch.float64  # which that does not know
        return total, torch.stack([x.detach().to(total.device, wide) for x in stats])

    def summary(self, logged: list[torch.Tensor], stopped: bool) -> dict[str, float]:
        """Means over the steps made, under their stable names."""
        names = ["policy_kl", "loss/policy", "clip_fraction", "ratio_deviation", "loss/value", "grad_norm"]
        means = torch.stack(logged).mean(0).tolist() if logged else [0.0] * len(names)
        steps = {"steps": len(logged), "stopped_early": float(stopped)}
        return {f"ppo/{name}": value for name, value in zip(names, means, strict=True)} | {
            f"ppo/{name}": value for name, value in steps.items()
        }

    def learning_rate(self) -> float:
        """Of this iteration: linear from learning_rate to min_lr with --decay_lr, else constant."""
        if not self.cfg.decay_lr:
            return self.cfg.learning_rate
        left = 1 - (self.iter_num - self.first) / max(self.last - self.first, 1)
        return self.cfg.min_lr + left * (self.cfg.learning_rate - self.cfg.min_lr)

    def iteration(self) -> dict[str, float]:
        """Roll out, learn, count; returns what is to be logged."""
        began, ppo = time.perf_counter(), self.ppo
        for group in self.optimizer.param_groups:
            group["lr"] = ppo.critic_lr if "critic" in group else self.learning_rate()
        prompts = self.prompts(self.iter_num, self.size // ppo.group_size)
        prompts = [prompt for prompt in prompts for _ in range(ppo.group_size)]
        u = torch.rand(self.size, self.longest, generator=self.generator(1, self.iter_num))
        until = torch.rand(self.size, generator=self.generator(4, self.iter_num)) if ppo.exact_end else None
        batch = self.collect(prompts, u, until)
        if not self.shared:  # the largest tensor, and of no more use
            del batch["features"]
        values = self.rollout_metrics(batch) | {"ppo/beta": self.beta, "lr": self.learning_rate()}
        advantages, scale = self.advantages(batch)
        if self.critic is not None:
            on, returns = batch["on"], batch["returns"]
            values |= {
                "ppo/explained_variance": explained_variance(returns, batch["values"], on),
                "ppo/value": float(weighted_mean(batch["values"], on)),
            }
        warmup = self.critic is not None and self.iter_num < self.first + ppo.critic_warmup
        if warmup or (self.critic is not None and not self.shared):
            self.fit_critic(ppo.critic_warmup_epochs if warmup else ppo.critic_epochs)
        values["ppo/advantage_deviation"] = float(scale)
        with self.runtime.gathered(self.reference, layers=False):
            if warmup:
                values |= self.summary([], stopped=False)
            else:
                values |= self.update_policy(batch, advantages, scale)
        if ppo.adaptive_kl and not warmup:
            self.beta = adapt_beta(self.beta, values["ppo/kl"], ppo, self.size)
        self.iter_num, self.episodes, self.evaluated = self.iter_num + 1, self.episodes + self.size, False
        seconds = time.perf_counter() - began
        self.seconds += seconds
        tokens = int(batch["mask"].sum())
        values |= {
            "ppo/episodes": self.episodes,
            "ppo/seconds": self.seconds,
            "ppo/iteration_seconds": seconds,
            "ppo/rollout_seconds": float(batch["seconds"]),
            "ppo/skipped": self.skipped,
        }
        return values | {"ppo/tok/s": tokens / seconds, "ppo/rollout_tok/s": tokens / float(batch["seconds"])}

    def rollout_metrics(self, batch: dict) -> dict[str, float]:
        """What a rollout's stories are like: reward and its parts, KL, J, lengths, entropy."""
        total, length = batch["scores"].sum(1), batch["story_end"].float()
        left = length[:, None] - 2 - torch.arange(batch["mask"].shape[1], device=length.device)
        mask = batch["mask"] & (left >= 0)
        ends = (left == 0) & batch["story_ended"][:, None]  # the path may have another token there
        sampled_k1 = torch.where(ends, batch["end_k1"], batch["k1"])
        logp = torch.where(ends, batch["end_logp"], batch["logp"])
        kl = (batch["kl"] * mask).sum(1)
        values = {
            "reward": total.mean(),
            "kl": kl.mean(),
            "kl_k1": (sampled_k1 * mask).sum(1).mean(),
            "kl_k3": (k3(logp, logp - sampled_k1) * mask).sum(1).mean(),
            "J": (total - self.beta * kl).mean(),
            "entropy": weighted_mean(batch["entropy"], mask),
            "length": length.mean(),
            "length_deviation": length.std(correction=0),
            "ended": batch["story_ended"].float().mean(),
        }
        for (name, *_), column in zip(self.scorer.parts, batch["scores"].unbind(1), strict=True):
            values[f"reward/{name}"] = column.mean()
            if name == "length":
                values["mae"] = (length - self.ppo.target_len).abs().mean()
        return {f"ppo/{name}": float(value) for name, value in values.items()}

    # -- evaluation

    def evaluate(self) -> dict[str, float]:
        """Held-out prompts, always with the same random numbers: describe, and the text's quality."""
        samples = self.ppo.eval_samples
        prompts = [prompt for prompt in self.eval_prompts for _ in range(samples)]
        if self.runtime.rank == 0:
            print(f"evaluating on {len(prompts)} held-out stories", flush=True)
        u = torch.rand(len(prompts), self.longest, generator=torch.Generator().manual_seed(EVAL_SEED))
        # no more at once than in training, or than is little for a GPU: features are large
        parts, rows = [], self.size if self.runtime.kind == "cpu" else max(self.size, GPU_EVAL_ROWS)
        for i in range(0, len(prompts), rows):
            part = self.collect(prompts[i : i + rows], u[i : i + rows])
            parts.append({k: x for k, x in part.items() if k not in ("features", "reference", "seconds")})
        batch = join(parts)
        values = self.rollout_metrics(batch)
        stories = [
            row[first:last]
            for row, first, last in zip(
                *(batch[key].tolist() for key in ("tokens", "start", "end")), strict=True
            )
        ]
        distinct = [len(set(zip(x, x[1:], strict=False))) / (len(x) - 1) for x in stories if len(x) > 1]
        # of a story's pairs of tokens, how many differ
        values["ppo/distinct_2"] = sum(distinct) / max(len(distinct), 1)
        nats = -weighted_mean(batch["reference_logp"], batch["mask"])
        values["ppo/reference_perplexity"] = math.exp(min(float(nats), 700))
        record = {"scores": batch["scores"].sum(1).view(-1, samples).cpu(), "lengths": batch["end"].cpu()}
        if self.iter_num == self.first:
            self.evaluation["before"] = record
        self.evaluation["after"] = record
        # over all prompts at once: few samples of each would underrate it, many would come out a little lower
        best = optimum(self.evaluation["before"]["scores"].view(1, -1), self.beta)
        shown = slice(0, 3 * samples, samples)  # a story of each of the first prompts
        self.stories = (
            [batch[key][shown] for key in ("tokens", "start", "end")],
            batch["scores"][shown].sum(1),
        )
        values |= {"ppo/J_optimum": best, "ppo/regret": best - values["ppo/J"]}
        return {name.replace("ppo/", "ppo/eval/", 1): value for name, value in values.items()}

    def is_best(self, reward: float, kl: float) -> bool:
        """Whether J of a held-out evaluation is the highest so far, at beta as it is now."""
        return reward - self.beta * kl > self.best[0] - self.beta * self.best[1]

    # -- state

    def state(self) -> dict:
        """What a checkpoint holds; of a split policy without its tensors."""
        optimizer = self.optimizer.state_dict()
        return {
            "model": {} if self.runtime.fsdp else self.policy.state_dict(),
            "model_args": asdict(self.args),
            "optimizer": optimizer | {"state": {}} if self.runtime.fsdp else optimizer,
            "critic": self.critic.state_dict() if self.critic else None,
            "replay": [
                {key: value.cpu() for key, value in b.items() if key in REPLAYED} for b in self.replay
            ],
            "iter_num": self.iter_num,
            "first_iter": self.first,
            "trained": self.names,
            "beta": self.beta,
            "moments": vars(self.moments),
            "episodes": self.episodes,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "best": self.best,
            "evaluation": self.evaluation,
            "evaluated": self.evaluated,
            "reference_sha256": self.reference_hash,
            "config": asdict(self.cfg) | asdict(self.ppo) | {"tokenizer_sha256": self.tokenizer.sha256},
        }

    def check_origin(self, state: dict, path: str) -> None:
        """Raises SystemExit if state is of another reference or another task."""
        if state.get("reference_sha256") != self.reference_hash:
            raise SystemExit(
                f"{path} was trained from other weights than {self.cfg.out_dir}/ckpt.pt holds; put those "
                f"back, or move {path} away to begin anew"
            )
        if (trained_with := state["config"]["tokenizer_sha256"]) != self.tokenizer.sha256:
            raise SystemExit(
                f"{path} was trained with another tokenizer than {self.tokenizer.model_path}; "
                f"{self.tokenizer.put_back(trained_with)}, or give the --data_dir where it is"
            )
        # the optimum and the critic's replay are of those
        for name in ("reward", "target_len", "keywords", "exact_end"):
            if (was := state["config"][name]) != getattr(self.ppo, name):
                raise SystemExit(
                    f"{path} was trained with --{name}={was}, which cannot change during a run; give that, "
                    f"or move {path} away to begin anew"
                )

    def resume(self, state: dict, path: str) -> None:
        """Go on exactly where state was saved. Raises SystemExit if it is not of this reference and shape."""
        self.check_origin(state, path)
        flags = asdict(self.cfg) | asdict(self.ppo)
        if same := all(state["config"][name] == flags[name] for name in HELD_OUT):
            self.evaluation, self.best = state["evaluation"], state["best"]
        else:  # the optimum and the best are of other stories: both are judged again
            self.evaluate()  # so far the policy is the reference
            path_of_best = os.path.join(self.cfg.out_dir, "ppo_best.pt")
            if state["best"][0] > -math.inf and os.path.exists(path_of_best):
                self.iter_num = state["iter_num"]  # what follows is not "before"
                self.runtime.load_weights(self.policy, load_checkpoint(path_of_best)["model"])
                values = self.evaluate()
                self.best = values["ppo/eval/reward"], values["ppo/eval/kl"]
        try:
            if state["trained"] != self.names or (state["critic"] is None) != (self.critic is None):
                raise ValueError("other parts are trained")
            if self.runtime.fsdp and path.endswith(SHARDED):
                fill_shards(path, state, self.policy, self.optimizer)
            else:
                self.runtime.load_weights(self.policy, state["model"])
                self.runtime.load_moments(self.optimizer, state["optimizer"])
            if self.critic:
                self.critic.load_state_dict(state["critic"])
        except (RuntimeError, ValueError, KeyError) as e:
            raise SystemExit(
                f"{path} does not fit these flags ({' '.join(str(e).split())[:100]}): --advantage, --critic, "
                "--train_only, and whether --others is 0, cannot change during a run; move "
                f"{path} away to begin anew"
            ) from None
        self.iter_num, self.first = state["iter_num"], state["first_iter"]
        self.saved = self.iter_num
        if self.ppo.adaptive_kl:
            self.beta = state["beta"]
        self.moments = RunningMoments(**state["moments"])
        self.episodes, self.seconds, self.skipped = (state[k] for k in ("episodes", "seconds", "skipped"))
        self.evaluated = state["evaluated"] and same
        self.replay = [self.replayed(saved) for saved in state["replay"]]

    def replayed(self, saved: dict) -> dict[str, torch.Tensor]:
        """A rollout that the critic learns from, of a checkpoint."""
        batch = {key: value.to(self.runtime.device) for key, value in saved.items()}
        if not self.shared:  # what the reference says to it is quickly made again, as collect made it
            share = -(-len(batch["end"]) // self.runtime.world_size)
            shares = zip(batch["tokens"].split(share), batch["end"].split(share), strict=True)
            with self.runtime.gathered(self.reference):
                features = [
                    self.over_parts({"tokens": tokens, "end": end}, lambda ids: self.reference.features(ids))
                    for tokens, end in shares
                ]
            batch["critic_features"] = torch.cat(features)
        return batch

    def save(self, write_model: Callable[[str, ModelArgs, dict], None], best: bool) -> None:
        """Write ppo_ckpt.pt, the newest state (of a split policy ppo_ckpt-ITERATION.dcp); before it, if best,
        ppo_best.pt and ppo_model.bin. All ranks call it.
        """
        folder, runtime, state = self.cfg.out_dir, self.runtime, self.state()
        path = os.path.join(folder, "ppo_model.bin")
        kept_best = os.path.join(folder, "ppo_best.pt")
        try:
            if best or self.best[0] == -math.inf:  # no best of this run yet: what is there is another's
                weights = runtime.whole_weights(self.policy)
                if runtime.rank == 0:
                    write_model(path, self.args, weights)
                    kept = {k: state[k] for k in ("model_args", "iter_num", "config", "best")}
                    save_checkpoint(kept_best, kept | {"model": weights})
            if runtime.fsdp or runtime.rank == 0:
                tensors = shards(self.policy, self.optimizer) if runtime.fsdp else None
                save_state(folder, "ppo_ckpt", state, self.cfg.keep, tensors)
            self.saved = self.iter_num
        except (OSError, RuntimeError) as e:  # torch.save hides a full disk in a RuntimeError
            raise SystemExit(f"cannot save to {folder} ({e}); what was saved before is whole") from None


def fingerprint(model: Transformer) -> str:
    """sha256 of all weights."""
    digest = hashlib.sha256()
    for _, tensor in sorted(model.state_dict().items()):
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def show_stories(run: PPO) -> None:
    """A table of the first held-out prompts, their stories and rewards."""
    (tokens, start, end), scores = run.stories
    for row, first, last, score in zip(
        tokens.tolist(), start.tolist(), end.tolist(), scores.tolist(), strict=True
    ):
        prompt, story = run.tokenizer.decode(row[:first]), run.tokenizer.decode(row[first:last])
        story = " ".join(story.split())
        if len(story) > 160:
            story = story[:80] + " … " + story[-78:]
        print(f"  {' '.join(prompt.split())!r} → {story!r} → {last} tokens, reward {score:.3f}")


def progress(run: PPO, values: dict[str, float]) -> str:
    """One line about an iteration."""
    v = {name.removeprefix("ppo/"): value for name, value in values.items()}
    parts = [f"{name.removeprefix('reward/')} {v[name]:.3f}" for name in v if name.startswith("reward/")]
    parts = f" ({', '.join(parts)})" if len(parts) > 1 else f", MAE {v['mae']:.1f}" if "mae" in v else ""
    left, kl = (run.last - run.iter_num) * v["iteration_seconds"], max(v["kl"], 0.0)  # no -0.00
    eta = f"{left / 3600:.1f} h" if left > 5400 else f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s"
    warmup = run.critic is not None and run.iter_num <= run.first + run.ppo.critic_warmup
    stop = ", only the critic learnt" if warmup else ", stopped early" * bool(v["stopped_early"])
    return (
        f"{run.iter_num} ({run.iter_num - run.first} of {run.last - run.first}) | reward {v['reward']:.3f}"
        f"{parts} | J {v['J']:.3f} | KL {kl:.2f} | entropy {v['entropy']:.2f} | clipped "
        f"{100 * v['clip_fraction']:.1f}% | length {v['length']:.1f} ± {v['length_deviation']:.1f}, "
        f"{100 * v['ended']:.0f}% ended | {v['tok/s']:,.0f} tok/s, {v['iteration_seconds']:.1f} s{stop} | "
        f"{eta} left"
    )


def verdict(run: PPO, values: dict[str, float], best: bool) -> str:
    """One line about a held-out evaluation."""
    v = {name.removeprefix("ppo/eval/"): value for name, value in values.items()}
    mae = f", MAE {v['mae']:.2f}" if "mae" in v else ""
    line = (
        f"held out after {run.iter_num - run.first} iterations: J {v['J']:.3f} (optimum about "
        f"{v['J_optimum']:.2f}), reward {v['reward']:.3f}{mae}, KL {abs(v['kl']):.2f}, "
        f"length {v['length']:.1f} ± {v['length_deviation']:.1f}, {100 * v['ended']:.1f}% ended, "
        f"perplexity under the reference {v['reference_perplexity']:.2f}, distinct-2 {v['distinct_2']:.3f}"
    )
    return line + " (best so far)" * best


@contextmanager
def saved_if_reward_fails(run: PPO, write_model: Callable[[str, ModelArgs, dict], None]) -> Iterator[None]:
    """If a reward fails in here, nothing of what was learned before is lost."""
    moments = copy.copy(run.moments)
    try:
        yield
    except SystemExit:
        run.moments = moments
        if run.runtime.alone and not run.cfg.eval_only and run.iter_num > run.saved:
            run.save(write_model, best=False)
        raise


def say_stopped(iter_num: int, runtime) -> None:
    flags = [flag for flag in sys.argv if not flag.startswith(("--init_from=", "--init-from="))]
    again = shlex.join(["python", *flags, "--init_from=resume"])  # the last one counts
    if runtime.world_size > 1:
        again = "the same torchrun command with --init_from=resume"
    print(f"stopped after iteration {iter_num}, saved; to go on: {again}", file=sys.stderr)


def train_ppo(run: PPO, metrics, interrupt, write_model: Callable[[str, ModelArgs, dict], None]) -> None:
    """The loop: evaluate and save when due, stop when asked or done, else iterate. metrics on rank 0 only."""
    cfg, runtime = run.cfg, run.runtime
    while True:
        done = run.iter_num >= run.last
        due = (run.iter_num - run.first) % cfg.eval_interval == 0 or done or cfg.eval_only
        if due and (not run.evaluated or cfg.eval_only):
            with saved_if_reward_fails(run, write_model):
                values = run.evaluate()
            held_out = values["ppo/eval/reward"], values["ppo/eval/kl"]
            best = run.iter_num > run.first and run.is_best(*held_out)
            if metrics:
                print(verdict(run, values, best))
                show_stories(run)
                metrics.log(run.iter_num, values)
            run.best, run.evaluated = held_out if best else run.best, True
            if not cfg.eval_only and run.iter_num > run.first:
                run.save(write_model, best or cfg.always_save_checkpoint)
        # whoever was asked tells the others: the ranks stop together
        (asked,) = runtime.total(interrupt.asked)
        if done or asked or cfg.eval_only:
            break
        with saved_if_reward_fails(run, write_model):
            values = run.iteration()
        if metrics:
            metrics.log(run.iter_num, values)
            print(progress(run, values), flush=True)
        if run.in_a_row >= cfg.max_skipped:
            raise SystemExit(
                f"{run.in_a_row} steps in a row had a gradient that is not finite: training has diverged. "
                "To go on from the newest saved state, run the same again with "
                f"--learning_rate={cfg.learning_rate / 2:g} (or less)"
            )
    if asked and not done and not cfg.eval_only:
        if run.saved < run.iter_num:
            run.save(write_model, best=False)
        if metrics:
            say_stopped(run.iter_num, runtime)


# ---- report ------------------------------------------------------------------------------------------


def read_metrics(path: str) -> tuple[list[dict], list[dict]]:
    """PPO's lines of a metrics.jsonl: iterations, and held-out evaluations."""
    folder = os.path.dirname(path)
    if os.path.isfile(folder):
        above = shlex.quote(os.path.dirname(folder) or ".")
        raise SystemExit(f"{folder} is a file; run: python ppo.py report {above}")
    if not os.path.isfile(path):
        raise SystemExit(
            f"no {path}; to make one, run: python train.py --init_from=resume --ppo "
            f"--out_dir={shlex.quote(os.path.dirname(path) or '.')}"
        )
    lines = []
    with open(path, encoding="utf-8", errors="replace") as f:
        for i, line in enumerate(f, start=1):
            try:
                lines += [dict(json.loads(line))] if line.endswith("\n") else []
                if lines and "ppo/kl" in lines[-1]:  # without these it has no place in the curves
                    float(lines[-1]["iter"]), float(lines[-1]["ppo/episodes"])
            except (ValueError, TypeError, KeyError):
                raise SystemExit(f"{path}, line {i} is damaged; delete it, then run the same again") from None
    return [x for x in lines if "ppo/kl" in x], [x for x in lines if "ppo/eval/kl" in x]


def frontier(scores: torch.Tensor) -> dict[str, list[tuple[float, float]]]:
    """(KL, reward) of best-of-n and of the optima for all beta, from the reference's scores (P, m).

    Per prompt for best-of-n where there are enough samples, else over all: prompts tell little about rewards.
    KL of best-of-n is its bound log n - (n - 1) / n.
    """
    rows = scores if scores.shape[1] >= 16 else scores.view(1, -1)
    ns = [2**k for k in range(8) if 2**k <= rows.shape[1] // 4]
    best = [(math.log(n) - (n - 1) / n, best_of(rows, n)) for n in ns]
    # few samples know little of what is far from them: the curve ends where it rests on fewer than five
    betas = torch.logspace(1, -2, 60).tolist()
    curve = [tilted(rows, b)[::-1] for b in betas]
    return {"best": best, "optimum": [(kl, r) for kl, r in curve if kl < math.log(rows.shape[1] / 5)]}


def write_curve(path: str, steps: list[dict]) -> None:
    """The learning curve as csv, a row per iteration: CURVE; mae is empty where length is no reward."""
    from tokenizer import atomic_write

    with atomic_write(path, "w") as f:
        table = csv.writer(f, lineterminator="\n")
        table.writerow(CURVE)
        table.writerows([step.get(name, "") for name in CURVE.values()] for step in steps)


def report(out_dir: str) -> tuple[str, str]:
    """Make report.csv and report.png in out_dir, from metrics.jsonl and ppo_ckpt.pt; returns their paths."""
    steps, evals = read_metrics(os.path.join(out_dir, "metrics.jsonl"))
    paths = state_paths(out_dir, "ppo_ckpt") or [os.path.join(out_dir, "ppo_ckpt.pt")]
    _, state = newest_state(paths, lazily=True)
    if not steps or "before" not in state.get("evaluation", {}):
        raise SystemExit(
            f"{out_dir} holds no iteration of PPO yet; run: python train.py --out_dir={shlex.quote(out_dir)} "
            "--init_from=resume --ppo"
        )
    table, picture = (os.path.join(out_dir, name) for name in ("report.csv", "report.png"))
    write_curve(table, steps)
    if not importlib.util.find_spec("matplotlib"):
        raise SystemExit("the report needs a package; run: pip install matplotlib")
    title = f"PPO on {out_dir}: {state['episodes']:,} episodes, {state['seconds'] / 60:.1f} minutes"
    draw(picture, title, steps, evals, state)
    return table, picture


def draw(path: str, title: str, steps: list[dict], evals: list[dict], state: dict) -> None:
    """The report's picture: curves over episodes, lengths before and after, reward over KL."""
    import matplotlib

    from tokenizer import atomic_write

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    config, before, after = state["config"], state["evaluation"]["before"], state["evaluation"]["after"]
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    after_them = {x["iter"]: x["ppo/episodes"] for x in steps}
    size, first = steps[0]["ppo/episodes"], steps[0]["iter"] - 1
    episodes = [after_them.get(x["iter"] - 1, x["ppo/episodes"] - size) for x in steps]  # before each rollout
    held_out = [after_them.get(x["iter"], (x["iter"] - first) * size) for x in evals]

    def curve(ax, name: str, label: str) -> None:
        ax.plot(episodes, [x[f"ppo/{name}"] for x in steps], color="tab:blue", alpha=0.6, label="rollouts")
        ax.plot(held_out, [x[f"ppo/eval/{name}"] for x in evals], "o-", color="tab:orange", label="held out")
        ax.set(xlabel="episodes", ylabel=label)

    curve(axes[0, 0], "reward", "reward")
    curve(axes[0, 1], "kl", "KL to the reference, nats per response")
    curve(axes[0, 2], "J", f"J = reward - {state['beta']:.3g} KL")
    if evals:
        best = evals[0]["ppo/eval/J_optimum"]
        axes[0, 2].axhline(best, color="tab:green", ls="--", label="optimum, estimated")
    axes[0, 2].legend()
    ax = axes[1, 0]
    curve(ax, "length", "length, tokens")
    if "length" in reward_names(config["reward"]):
        ax.axhline(config["target_len"], color="gray", ls=":")
    ax = axes[1, 1]
    bins = range(0, int(max(before["lengths"].max(), after["lengths"].max())) + 10, 10)
    for when, label, color in ((before, "before", "gray"), (after, "after", "tab:orange")):
        ax.hist(when["lengths"].tolist(), bins, alpha=0.6, color=color, label=label)
    ax.set(xlabel="length of held-out stories, tokens", ylabel="stories")
    ax.legend()
    ax, points = axes[1, 2], frontier(before["scores"])
    ax.plot(*zip(*points["optimum"], strict=True), color="tab:green", ls="--", label="optimum for each beta")
    if points["best"]:
        ax.plot(*zip(*points["best"], strict=True), "s-", color="gray", label="best of n")
    reached = [(x["ppo/eval/kl"], x["ppo/eval/reward"]) for x in evals]
    ax.plot(*zip(*reached, strict=True), "o-", color="tab:orange", label="this run")
    ax.set(xlabel="KL to the reference, nats per response", ylabel="reward")
    ax.legend()
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    figure.suptitle(title)
    with atomic_write(path) as f:
        figure.savefig(f, dpi=100, format="png")
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    from tokenizer import CommandLine

    cli = CommandLine(prog="ppo.py", description=__doc__)
    stages = cli.add_subparsers(dest="stage", required=True)
    stages.add_parser("report", help="write OUT_DIR/report.csv and report.png").add_argument("out_dir")
    args = cli.parse_args(argv)
    try:
        print(*report(args.out_dir), sep="\n")
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
    except OSError as e:
        raise SystemExit(
            f"cannot report on {args.out_dir} ({e}); see to that, then run the same again"
        ) from None


if __name__ == "__main__":
    main()
