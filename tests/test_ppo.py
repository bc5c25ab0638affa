"""ppo.py: its formulas against float64 and enumeration, parts against brute force, runs with each other."""

import copy
import csv
import errno
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import HANDLED, ROOT, VOCAB, needs_cuda, ranks, same
from hypothesis import given, settings
from hypothesis import strategies as st

import ppo
import train
from export import read_any
from model import ModelArgs, Transformer, decode, load_checkpoint, model_from_checkpoint
from ppo import PPO, PPOConfig, RunningMoments, Scorer, rollout
from tokenizer import Tokenizer
from train import Runtime, TrainConfig

END = 1  # the end token is BOS, as in llama2.c's story format


@pytest.fixture(autouse=True)
def leave_as_it_was():
    """Runs take over Ctrl-C; and cores that share operations as small as these mostly wait for each other."""
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Letters:
    """Writes id n as the n-th letter."""

    bos_id, sha256, vocab_size = END, "0" * 64, 16

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + i) for i in ids)


def tiny(vocab: int = 16, length: int = 24, seed: int = 0, scale: float = 8.0, **args) -> Transformer:
    """A random network, scale times as far from uniform as usual."""
    torch.manual_seed(seed)
    shape = {"dim": 16, "n_layers": 1, "n_heads": 2, "multiple_of": 8} | args
    net = Transformer(ModelArgs(vocab_size=vocab, max_seq_len=length, **shape))
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                p *= scale
    return net.eval()


def some_prompts(i: int, n: int) -> list[list[int]]:
    rng = np.random.default_rng([7, i])
    return [[END, *map(int, rng.integers(2, 16, size=rng.integers(5)))] for _ in range(n)]


def make_run(net: Transformer | None = None, reward=None, prompts=some_prompts, cfg=None, **flags) -> PPO:
    """A PPO in this process, with all said that a test may depend on; reward takes the rows of token ids."""
    net = net or tiny()
    training = {
        "out_dir": "nowhere",
        "device": "cpu",
        "batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "decay_lr": False,
        "weight_decay": 0.0,
        "beta1": 0.9,
        "beta2": 0.95,
        "grad_clip": 1.0,
        "seed": 1,
    } | (cfg or {})
    settings = {
        "reward": "length",
        "target_len": 8,
        "max_gen_len": 16,
        "rollout_size": 16,
        "init_kl_coef": 0.1,
        "kl_penalty": "exact",
        "advantage": "gae",
        "lam": 1.0,
        "critic": "reference",
        "critic_lr": 1e-3,
        "critic_epochs": 1,
        "critic_replay": 16,
        "critic_warmup": 0,
        "critic_warmup_epochs": 1,
        "ppo_epochs": 1,
        "clip": 0.2,
        "clip_high": 0.2,
        "target_kl": 0.0,
        "ent_coef": 0.0,
        "train_only": "",
        "adam_eps": 1e-5,
        "eval_samples": 2,
    } | flags
    checkpoint = {"model": net.state_dict(), "model_args": asdict(net.args), "iter_num": 0}
    runtime, cfg = Runtime("cpu", torch.float32, False), TrainConfig(**training)
    run = PPO(PPOConfig(**settings), cfg, runtime, checkpoint, Letters(), prompts, prompts(10**6, 4))
    if reward:
        run.scorer.parts = [("r", 1.0, lambda prompts, stories, tokens, ended: reward(tokens))]
    return run


def nudge(net: torch.nn.Module, size: float, seed: int = 0) -> None:
    """Move every weight a little."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p += size * torch.randn(p.shape, generator=g)


def collect(run: PPO, n: int = 16, seed: int = 0) -> dict:
    g = torch.Generator().manual_seed(seed)
    u, until = torch.rand(n, run.ppo.max_gen_len, generator=g), torch.rand(n, generator=g)
    return run.collect(run.prompts(seed, n), u, until if run.ppo.exact_end else None)


def batch_ids(batch: dict) -> list[list[int]]:
    """The paths, without padding."""
    return [row[:n] for row, n in zip(batch["tokens"].tolist(), batch["end"].tolist(), strict=True)]


def batch_stories(batch: dict) -> list[list[int]]:
    """The stories, which may have ended before their paths."""
    stories = []
    for row, end, ended in zip(
        *(batch[key].tolist() for key in ("tokens", "story_end", "story_ended")), strict=True
    ):
        stories.append([*row[: end - 1], END if ended else row[end - 1]])
    return stories


def scripted(monkeypatch) -> None:
    """From now on u holds the ids to choose, over 1000."""
    monkeypatch.setattr(ppo, "sample", lambda logits, u: (u * 1000).round().long())


def script(rows: list[list[int]], width: int) -> torch.Tensor:
    return torch.tensor([row + [0] * (width - len(row)) for row in rows]) / 1000


def weights(module: torch.nn.Module) -> dict:
    return copy.deepcopy(dict(module.state_dict()))


def one_line(e) -> str:
    text = str(e.value)
    assert isinstance(e.value.code, str) and "\n" not in text, text
    return text


# ---- rewards -----------------------------------------------------------------------------------------

STORIES = ["The dog's bone. DOG!", "hotdog and cat", "a happy, happy end"]
IDS = [[1, 5, 6, 1], [1] * 150, [1] * 250]


class Scripted(Letters):
    """Decodes as many given texts as it is asked for, in turn."""

    def decode(self, ids: list[int]) -> str:
        return {len(i): s for i, s in zip(IDS, STORIES, strict=True)}.get(len(ids), "prompt")


def score(tmp_path=None, code: str = "", reward: str = "", **flags) -> torch.Tensor:
    """The scores of STORIES by a reward, or by `f` of a file with this code."""
    if code:
        (tmp_path / "mine.py").write_text(code)
        reward = reward or f"{tmp_path}/mine.py:f"
    scorer = Scorer(PPOConfig(reward=reward, **flags), Scripted())
    return scorer([[1], [1], [1, 2]], IDS, [True, False, True])


def test_rewards_by_hand(tmp_path):
    assert score(reward="length", target_len=200).flatten().tolist() == pytest.approx([-1.96, -0.5, -0.5])
    # whole words only, in any case, each once
    found = score(reward="keyword", keywords="dog, happy,cat").flatten().tolist()
    assert found == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert score(reward="keyword", keywords="hot").flatten().tolist() == [0, 0, 0]
    assert score(reward="keyword", keywords="dog's,.").flatten().tolist() == [0.5, 0, 0]
    # what a function of one's own is given
    code = (
        "def f(prompts, stories, tokens, ended):\n"
        "    assert prompts == ['prompt'] * 3 and len(tokens) == 3 and ended == [True, False, True]\n"
        "    return [len(s) + len(t) / 1000 for s, t in zip(stories, tokens)]\n"
    )
    assert score(tmp_path, code).flatten().tolist() == pytest.approx([20.004, 14.15, 18.25])


def test_weighted_sum_of_rewards(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nimport dataclasses\n\n"
        "@dataclasses.dataclass\nclass Told:\n    ended: float\n\n"  # looks its module up
        "def g(prompts, stories, tokens, ended): return [Told(float(x)).ended for x in ended]"
    )
    spec = f"length+0.5 * keyword + -2*{tmp_path}/mine.py:g"
    scorer = Scorer(PPOConfig(reward=spec, keywords="dog", target_len=200), Scripted())
    assert [name for name, *_ in scorer.parts] == ["length", "keyword", "g"]
    scores = scorer([[1]] * 3, IDS, [True, False, True])
    expected = [[-1.96, 0.5, -2], [-0.5, 0, 0], [-0.5, 0, -2]]
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-6)
    assert scorer([], [], []).shape == (0, 3)
    (tmp_path / "c++").mkdir()
    shutil.copy(tmp_path / "mine.py", tmp_path / "c++")
    assert len(Scorer(PPOConfig(reward=f"{tmp_path}/c++/mine.py:g"), Scripted()).parts) == 1
    first = Scorer(PPOConfig(reward=f"{tmp_path}/mine.py:g+0.5*length"), Scripted())
    assert [part[:2] for part in first.parts] == [("g", 1), ("length", 0.5)]


@pytest.mark.parametrize(
    "code, named",
    [
        ("def f(p, s, t, e):\n  if any('cat' in x for x in s): raise KeyError('oops')\n  return [0] * len(s)",
         "KeyError"),
        ("def f(p, s, t, e): return [float('nan') if 'cat' in x else 1 for x in s]", "nan"),
        ("def f(p, s, t, e): return [float('inf') if 'cat' in x else 1 for x in s]", "inf"),
        ("def f(p, s, t, e): return ['high' if 'cat' in x else 1 for x in s]", "ValueError"),
        ("def f(p, s, t, e): return [1 for x in s if 'cat' not in x]", "0 scores for 1"),
    ],
)  # fmt: skip
def test_a_failing_reward_names_the_story(code, named, tmp_path):
    with pytest.raises(SystemExit) as e:
        score(tmp_path, code)
    text = one_line(e)
    assert named in text and "hotdog and cat" in text and "bone" not in text


@pytest.mark.parametrize(
    "result",
    [
        "1.0",
        "None",
        "[1.0] * (len(s) + 1)",
        "[1.0]",
        "{1.0}",
    ],
)
def test_a_wrong_number_of_scores_is_one_line(result, tmp_path):
    with pytest.raises(SystemExit) as e:
        score(tmp_path, f"def f(p, s, t, e): return {result}")
    assert "f" in one_line(e)


@pytest.mark.parametrize(
    "reward, message",
    [
        ("shortness", "shortness is not known"),
        ("", "not known"),
        ("length+", "not known"),
        ("x*length", "x is no number"),
        ("keyword", "--keywords"),
        ("missing.py:f", "no file missing.py"),
        ("mine.py:nothing", "no function nothing"),
        ("mine.py:number", "no function number"),
        ("mine.txt:f", ".py"),
        ("broken.py:f", "SyntaxError"),
        ("failing.py:f", "ZeroDivisionError"),
    ],
)
def test_unknown_rewards_are_one_line(reward, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, code in [("mine.py", "number = 3"), ("mine.txt", "f = print"), ("broken.py", "def f(:")]:
        Path(name).write_text(code)
    Path("failing.py").write_text("f = 1 / 0")
    with pytest.raises(SystemExit) as e:
        Scorer(PPOConfig(reward=reward), Letters())
    assert message in one_line(e)


def test_running_moments_equal_numpy():
    rng, seen = np.random.default_rng(0), []
    moments = RunningMoments()
    for n in (1, 7, 30):
        seen.append(rng.normal(3, 2, size=n).astype(np.float32))
        moments.update(torch.from_numpy(seen[-1]))
        every = np.concatenate(seen).astype(np.float64)
        assert moments.mean == pytest.approx(every.mean(), abs=1e-12)
        assert moments.squares / moments.count == pytest.approx(every.var(), abs=1e-12)
    by_hand = (every - every.mean()) / every.std()
    np.testing.assert_allclose(moments.normalise(torch.from_numpy(every)).numpy(), by_hand, atol=1e-12)
    assert RunningMoments(**vars(moments)).normalise(torch.tensor([1.0])) == moments.normalise(
        torch.tensor([1.0])
    )


# ---- rollout -----------------------------------------------------------------------------------------


def ragged(n: int = 12) -> tuple[list[list[int]], torch.Tensor]:
    prompts = [[END, *range(2, 2 + k % 7)] for k in range(n)] + [[END] * 3, [5, 4, 3]]
    return prompts, torch.rand(len(prompts), 20, generator=torch.Generator().manual_seed(3))


def test_rollout_equals_teacher_forcing():
    """Log-probabilities and features of the cache and of a float64 network that reads the whole story; rows
    retire at many different steps; the choices are the inverse transform of u at temperature 1.
    """
    net, (prompts, u) = tiny(), ragged()
    r = rollout(net, prompts, 20, END, u)
    double = copy.deepcopy(net).double()
    lengths = (r.end - r.start).tolist()
    assert len(set(lengths)) >= 5 and min(lengths) <= 2 and max(lengths) >= 15  # it is a test of ragged rows
    for n, prompt in enumerate(prompts):
        start, end = int(r.start[n]), int(r.end[n])
        ids = r.tokens[n, :end].tolist()
        assert ids[:start] == prompt and start == len(prompt) and not r.tokens[n, end:].any()
        hidden = double.features(r.tokens[n : n + 1, : end - 1])[0]
        logp = double.output(hidden).log_softmax(-1)
        for t in range(r.logp.shape[1]):
            if not start - 1 <= t < end - 1:
                assert r.logp[n, t] == 0 and not r.features[n, t].any() and not r.mask[n, t]
                continue
            assert r.mask[n, t]
            assert abs(r.logp[n, t].item() - logp[t, ids[t + 1]].item()) < 1e-5
            torch.testing.assert_close(r.features[n, t].double(), hidden[t], atol=1e-5, rtol=0)
            below = logp[t].exp()[: ids[t + 1]].sum().item()
            point = u[n, t - start + 1].item()
            assert below - 1e-6 < point < below + logp[t, ids[t + 1]].exp().item() + 1e-6
        assert END not in ids[start:-1]
        full = end - start == 20 or end == net.args.max_seq_len
        assert bool(r.ended[n]) == (ids[-1] == END and end > start) and (r.ended[n] or full)


@pytest.mark.parametrize("past_end", [0.0, 0.5, 0.8])
def test_paths_go_on_past_the_ends_of_their_stories(past_end, monkeypatch):
    """Which tokens they have, what share of their stories comes so far, and where the story ends: against a
    float64 network that reads the whole path.
    """
    monkeypatch.setattr(ppo, "PAST_END", past_end)
    net, (prompts, u) = tiny(scale=5), ragged()
    until = torch.rand(len(prompts), generator=torch.Generator().manual_seed(5))
    r = rollout(net, prompts, 20, END, u, until)
    double, seen = copy.deepcopy(net).double(), set()
    told = r.ids(END)
    for n, prompt in enumerate(prompts):
        start, end = int(r.start[n]), int(r.end[n])
        ids = r.tokens[n, :end].tolist()
        p = double(r.tokens[n : n + 1, : end - 1])[0][0].softmax(-1).detach()
        reach, story = 1.0, None
        for t in range(start - 1, end - 1):
            assert r.reach[n, t].item() == pytest.approx(reach, rel=1e-4)
            choices, past = p[t].clone(), reach > past_end
            if past:
                choices[END] = 0
                reach *= 1 - p[t, END].item()
                if story is None and reach <= until[n]:
                    story = [*ids[: t + 1], END]
            below, width = choices[: ids[t + 1]].sum() / choices.sum(), choices[ids[t + 1]] / choices.sum()
            point = u[n, t - start + 1].item()
            assert below - 1e-5 < point < below + width + 1e-5
            assert abs(r.logp[n, t].item() - p[t, ids[t + 1]].log().item()) < 1e-4
        assert not r.reach[n, end - 1 :].any() and not r.reach[n, : start - 1].any()
        assert bool(r.ended[n]) == (ids[-1] == END and end > start)
        seen.add((story is None, bool(r.ended[n])))
        assert [told[0][n], told[1][n], told[2][n]] == [prompt, story or ids, ids]
        assert bool(r.story_ended[n]) == (story is not None or bool(r.ended[n]))
        assert int(r.story_end[n]) == len(story or ids)
    assert seen >= ({(False, True), (True, True)} if past_end else {(False, False), (True, False)})


def test_stories_of_paths_are_the_policys(enumerated):
    """Each story comes as often as the policy tells it; and a path's story is one of its own beginnings."""
    run, _, stories, _ = enumerated()
    with torch.no_grad():
        p = log_probs(run.policy, stories).exp().numpy()
    g, n = torch.Generator().manual_seed(0), 40000
    r = rollout(run.policy, [[END]] * n, 3, END, torch.rand(n, 3, generator=g), torch.rand(n, generator=g))
    counts = Counter(map(tuple, r.ids(END)[1]))
    assert set(counts) == {tuple(story) for story in stories}
    seen = np.array([counts[tuple(story)] for story in stories])
    chi2 = float(((seen - n * p) ** 2 / (n * p)).sum())
    assert chi2 < 36.1  # 14 degrees of freedom, one in a thousand
    assert 0.1 < float((r.story_end < r.end).float().mean())


@pytest.mark.parametrize("past", [False, True])
def test_a_row_depends_on_its_prompt_and_numbers_alone(past):
    net, prompts = tiny(scale=2 if past else 8), ragged(60)[0]
    # they fill the context at different times
    prompts = [prompt + [3] * (k % 9) for k, prompt in enumerate(prompts)]
    u = torch.rand(len(prompts), 30, generator=torch.Generator().manual_seed(0))
    whole = rollout(net, prompts, 30, END, u, u[:, 29] if past else None)
    assert (whole.story_end <= whole.end).all() and not whole.story_ended.all()
    for rows in ([3], [0, 13], [9, 4, 12, 1], *([i] for i in range(14, 62, 4))):
        part = rollout(net, [prompts[i] for i in rows], 30, END, u[rows], u[rows, 29] if past else None)
        assert torch.equal(part.story_end, whole.story_end[rows])
        T = part.tokens.shape[1]
        assert torch.equal(part.tokens, whole.tokens[rows, :T]) and torch.equal(part.end, whole.end[rows])
        torch.testing.assert_close(part.logp, whole.logp[rows, : T - 1], atol=1e-5, rtol=0)
        torch.testing.assert_close(part.reach, whole.reach[rows, : T - 1], atol=1e-5, rtol=0)
        torch.testing.assert_close(part.features, whole.features[rows, : T - 1], atol=1e-5, rtol=0)


def test_greedy_decoding_equals_teacher_forcing():
    net, (prompts, _) = tiny(), ragged()
    new = decode(net, prompts, 20, (END,), lambda rows, features: net.output(features).argmax(-1))
    for prompt, ids in zip(prompts, new, strict=True):
        story = list(prompt)
        while len(story) < min(len(prompt) + 20, 24) and (len(story) == len(prompt) or story[-1] != END):
            story.append(int(net(torch.tensor([story]))[0][0, -1].argmax()))
        assert prompt + ids == story


# prompt, what is chosen, length of the response, and whether it ended: cap 4, context 10
EPISODES = [
    ([1, 5], [1, 9, 9, 9], 1, True),  # end token first
    ([1], [7, 8, 9, 1], 4, True),  # as the last there is room for
    ([1, 2, 3], [7, 8, 9, 7], 4, False),  # never
    ([1, 4, 1], [6, 1, 9, 9], 2, True),  # in the prompt, and at its end
    ([1, 1, 1], [3, 3, 3, 3], 4, False),
    ([1, 2, 3, 4, 5, 6, 7, 8], [2, 2, 9, 9], 2, False),  # the context's end
    ([1, 2, 3, 4, 5, 6, 7, 8], [2, 1, 9, 9], 2, True),
]


@pytest.mark.parametrize("kl_penalty", ["exact", "k1"])
def test_mask_and_place_of_the_score(kl_penalty, monkeypatch):
    scripted(monkeypatch)
    run = make_run(
        tiny(length=10), max_gen_len=4, kl_penalty=kl_penalty, missing_eos_penalty=0.75, target_len=5
    )
    nudge(run.policy, 0.05)
    batch = run.collect([e[0] for e in EPISODES], script([e[1] for e in EPISODES], 4))
    rewards = run.rewards(batch)
    for n, (prompt, chosen, length, ended) in enumerate(EPISODES):
        story = prompt + chosen[:length]
        assert batch["tokens"][n, : len(story)].tolist() == story and bool(batch["ended"][n]) == ended
        inside = [len(prompt) <= t + 1 < len(story) for t in range(batch["mask"].shape[1])]
        assert batch["mask"][n].tolist() == inside
        with torch.no_grad():
            logits = [net(torch.tensor([story]))[0][0].double() for net in (run.policy, run.reference)]
        logps = [x.log_softmax(-1) for x in logits]
        total = -abs(len(story) - 5) / 100 - (0 if ended else 0.75)
        for t, there in enumerate(inside):
            expected = 0.0
            if there and kl_penalty == "k1":
                expected = -0.1 * float(logps[0][t, story[t + 1]] - logps[1][t, story[t + 1]])
            elif there and t + 2 < len(story):  # the KL of the state that the choice leads to
                p, q = logps[0][t + 1], logps[1][t + 1]
                expected = -0.1 * float((p.exp() * (p - q)).sum())
            if t == len(story) - 2:
                expected += total
            assert rewards[n, t].item() == pytest.approx(expected, abs=2e-6)


def test_scores_are_normalised_then_clipped():
    run = make_run(
        reward=lambda tokens: [sum(row) % 7 for row in tokens],
        reward_norm=True,
        reward_clip=0.9,
        init_kl_coef=0.0,
        missing_eos_penalty=2.0,
    )
    seen = []
    for seed in (0, 1):
        batch = collect(run, seed=seed)
        seen += [sum(row) % 7 for row in batch_ids(batch)]
        clipped = np.clip((np.array(seen[-16:]) - np.mean(seen)) / np.std(seen), -0.9, 0.9)
        assert {-0.9, 0.9} < set(clipped)
        penalised = clipped - 2.0 * ~batch["ended"].numpy()
        np.testing.assert_allclose(run.rewards(batch).sum(1).numpy(), penalised, atol=1e-5)


def test_padding_changes_nothing():
    """Other pad ids and more padding: the same advantages, metrics, and steps, bit for bit."""
    outcomes = []
    for ids, columns in [(0, 0), (9, 0), (END, 0), (3, 5)]:
        run = make_run(ent_coef=0.01)
        nudge(run.policy, 0.02)
        batch = collect(run)
        T = batch["tokens"].shape[1]
        if columns:  # as if a longer story had been in the batch
            longer = {key: torch.cat([x, x[:1]]) for key, x in batch.items() if x.dim()}
            for key, x in longer.items():
                if x.dim() > 1 and key != "scores":
                    longer[key] = torch.cat([x, torch.zeros_like(x[:, :columns])], 1)
            batch = {key: x[:-1] for key, x in longer.items()}
        beyond = torch.arange(T + columns) >= batch["end"][:, None]
        assert beyond.any()
        batch["tokens"] = torch.where(beyond, ids, batch["tokens"])
        batch["reference"] = run.over_parts(batch, lambda ids, run=run: run.reference.features(ids))
        batch |= run.compare(batch)
        described = run.rollout_metrics(batch)
        advantages, scale = run.advantages(batch)
        run.fit_critic(1)
        run.update_policy(batch, advantages, scale)
        assert not advantages[:, T - 1 :].any()
        outcomes.append([advantages[:, : T - 1], described, weights(run.policy), weights(run.critic)])
    for outcome in outcomes[1:3]:
        assert same(outcome, outcomes[0])
    for ours, first in zip(outcomes[3], outcomes[0], strict=True):  # sums over longer rows round otherwise
        if isinstance(first, dict) and not isinstance(next(iter(first.values())), torch.Tensor):
            assert ours == pytest.approx(first, abs=2e-6)
        else:
            torch.testing.assert_close(ours, first, atol=2e-6, rtol=0)


def test_join_pads_and_keeps_every_episode():
    a = {"tokens": torch.ones(2, 3), "f": torch.ones(2, 2, 4), "end": torch.tensor([1, 2])}
    b = {"tokens": 2 * torch.ones(1, 5), "f": 2 * torch.ones(1, 4, 4), "end": torch.tensor([3])}
    joined = ppo.join([a, b])
    assert joined["tokens"].tolist() == [[1, 1, 1, 0, 0]] * 2 + [[2] * 5] and joined["end"].tolist() == [
        1,
        2,
        3,
    ]
    assert joined["f"].shape == (3, 4, 4) and joined["f"].sum() == 2 * 2 * 4 + 2 * 16


@given(st.lists(st.integers(2, 50), max_size=40), st.integers(1, 300))
def test_length_parts_hold_every_episode_once(lengths, tokens):
    end = torch.tensor([7] + lengths)
    index = torch.arange(1, len(end)).flip(0)
    parts = ppo.length_parts(index, end, tokens)
    assert sorted(i for part in parts for i in part.tolist()) == list(range(1, len(end)))
    for part in parts:
        assert len(part) == 1 or len(part) * int(end[part].max()) <= tokens
    ends = [int(end[i]) for part in parts for i in part]
    assert ends == sorted(ends)


# ---- formulas ----------------------------------------------------------------------------------------


def stretches(n: int, T: int, seed: int = 0) -> torch.Tensor:
    """Masks of one stretch per row: of one token, of all, at either end, and random ones."""
    rng = np.random.default_rng(seed)
    mask = torch.zeros(n, T, dtype=torch.bool)
    for i in range(n):
        first = int(rng.integers(T))
        last = int(rng.integers(first, T))
        first, last = {0: (0, 0), 1: (0, T - 1), 2: (T - 1, T - 1)}.get(i, (first, last))
        mask[i, first : last + 1] = True
    return mask


@pytest.mark.parametrize(
    "lam, gamma", [(0.95, 1.0), (0.7, 0.9), (1.0, 1.0), (0.0, 1.0), (0.0, 0.5), (1.0, 0.8)]
)
def test_gae_equals_the_double_sum(lam, gamma):
    """A_t = sum_l (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}), term by term in float64."""
    N, T = 12, 9
    g = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(N, T, generator=g, dtype=torch.float64) for _ in range(2))
    mask = stretches(N, T)
    advantages, returns = ppo.gae(rewards, values, mask, lam, gamma)
    for n, t in itertools.product(range(N), range(T)):
        if not mask[n, t]:
            assert advantages[n, t] == returns[n, t] == 0
            continue
        last = int(mask[n].nonzero().max())
        r, v = rewards[n].tolist(), values[n].tolist() + [0.0]
        after = [v[s + 1] if s < last else 0.0 for s in range(T)]
        expected = sum(
            (gamma * lam) ** (s - t) * (r[s] + gamma * after[s] - v[s]) for s in range(t, last + 1)
        )
        assert abs(advantages[n, t].item() - expected) < 1e-12
        assert abs(returns[n, t].item() - expected - v[t]) < 1e-12
        if lam == 1:
            return_ = sum(gamma ** (s - t) * r[s] for s in range(t, last + 1))
            assert abs(advantages[n, t].item() - (return_ - v[t])) < 1e-12
        if lam == 0:
            assert abs(advantages[n, t].item() - (r[t] + gamma * after[t] - v[t])) < 1e-12


def test_gae_of_episodes_that_end_by_chance():
    """Values and advantages of going on: A_t = sum_s lam^(s-t) P(on at t+1 … s) (r_s + W_{s+1} - V_s), where
    W is what a state is worth, its end included; term by term in float64.
    """
    N, T, lam = 12, 9, 0.7
    g = torch.Generator().manual_seed(0)
    rewards, values, ending = (torch.randn(N, T, generator=g, dtype=torch.float64) for _ in range(3))
    hazard, mask = torch.rand(N, T, generator=g, dtype=torch.float64), stretches(N, T)
    advantages, returns = ppo.gae(rewards, values, mask, lam, hazard=hazard, ending=ending)
    for n, t in itertools.product(range(N), range(T)):
        if not mask[n, t]:
            assert advantages[n, t] == returns[n, t] == 0
            continue
        last = int(mask[n].nonzero().max())
        r, v, e, h = (x[n].tolist() for x in (rewards, values, ending, hazard))
        expected = 0.0
        for i in range(t, last + 1):
            worth = h[i + 1] * e[i + 1] + (1 - h[i + 1]) * v[i + 1] if i < last else 0.0
            on = math.prod(1 - h[k] for k in range(t + 1, i + 1))
            expected += lam ** (i - t) * on * (r[i] + worth - v[i])
        assert abs(advantages[n, t].item() - expected) < 1e-12
        assert abs(returns[n, t].item() - expected - v[t]) < 1e-12


def test_whiten_equals_numpy():
    g = torch.Generator().manual_seed(0)
    x, mask = torch.randn(7, 11, generator=g, dtype=torch.float64) * 3 + 5, stretches(7, 11)
    white, deviation = ppo.whiten(x, mask)
    inside = x[mask].numpy()
    np.testing.assert_allclose(white[mask].numpy(), (inside - inside.mean()) / inside.std(), atol=1e-8)
    assert float(deviation) == pytest.approx(inside.std(), abs=1e-8) and not white[~mask].any()
    assert float(ppo.weighted_mean(x, mask)) == pytest.approx(inside.mean(), abs=1e-12)
    w = torch.rand(7, 11, generator=g, dtype=torch.float64) * mask
    mean = np.average(x.numpy(), weights=w.numpy())
    spread = math.sqrt(np.average((x.numpy() - mean) ** 2, weights=w.numpy()))
    by_weight, deviation = ppo.whiten(torch.where(mask, x, math.inf), w)
    torch.testing.assert_close(by_weight, torch.where(mask, (x - mean) / spread, 0.0), atol=1e-8, rtol=0)
    assert float(deviation) == pytest.approx(spread, abs=1e-8)
    order = torch.randperm(7, generator=g)
    torch.testing.assert_close(ppo.whiten(x[order], mask[order])[0], white[order], atol=1e-12, rtol=0)
    padded = torch.cat([x, torch.full((7, 4), 1e6, dtype=torch.float64)], 1)
    wider = torch.cat([mask, torch.zeros(7, 4, dtype=torch.bool)], 1)
    torch.testing.assert_close(ppo.whiten(padded, wider)[0][:, :11], white, atol=1e-12, rtol=0)
    assert not ppo.whiten(torch.full((2, 3), 4.0), torch.ones(2, 3, dtype=torch.bool))[0].any()


def test_kl_estimators_agree_on_enumerated_distributions():
    """E_p[k1] = E_p[k3] = KL(p || q), which is zero only for p = q."""
    g = torch.Generator().manual_seed(0)
    p, q = ((2 * torch.randn(50, 6, generator=g, dtype=torch.float64)).log_softmax(-1) for _ in range(2))
    P, Q = p.exp().numpy(), q.exp().numpy()
    expected = (P * np.log(P / Q)).sum(-1)
    np.testing.assert_allclose((P * ppo.k1(p, q).numpy()).sum(-1), expected, atol=1e-12)
    np.testing.assert_allclose((P * ppo.k3(p, q).numpy()).sum(-1), expected, atol=1e-12)
    np.testing.assert_allclose(ppo.exact_kl(p, q).numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(ppo.k3(p, q).numpy(), Q / P - 1 - np.log(Q / P), atol=1e-12)
    assert (ppo.exact_kl(p, q) > 0).all() and (ppo.k3(p, q) >= 0).all() and not ppo.exact_kl(p, p).any()
    assert ppo.k3(torch.tensor([0.0, -3000.0]), torch.tensor([-3000.0, 0.0])).isfinite().all()


def test_ppo_loss_equals_the_published_formula():
    """pg_losses = max(-A r, -A clamp(r, 1 - c, 1 + c)), as TRL has it; here asymmetric too."""
    rng = np.random.default_rng(0)
    logp, old, A = (rng.normal(size=2000) for _ in range(3))
    for low, high in [(0.2, 0.2), (0.1, 0.35), (0.0, 0.0)]:
        r = np.exp(logp - old)
        expected = np.maximum(-A * r, -A * np.clip(r, 1 - low, 1 + high))
        losses, ratio = ppo.ppo_loss(*map(torch.from_numpy, (logp, old, A)), low, high)
        np.testing.assert_allclose(losses.numpy(), expected, atol=1e-12)
        np.testing.assert_allclose(ratio.numpy(), r, rtol=1e-12)
    far = torch.tensor([-1e4, 1e4], requires_grad=True)
    losses, ratio = ppo.ppo_loss(far, torch.zeros(2), torch.tensor([-1.0, -1.0]), 0.2, 0.2)
    losses.sum().backward()
    assert losses.isfinite().all() and ratio.isfinite().all() and far.grad.isfinite().all()


def test_gradient_at_ratio_one_is_reinforce():
    """d loss / d logits = -A d log p / d logits, by autograd and by central differences of the loss."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(20, 5, generator=g, dtype=torch.float64, requires_grad=True)
    ids, A = torch.randint(5, (20,), generator=g), torch.randn(20, generator=g, dtype=torch.float64)
    old = z.detach().log_softmax(-1).gather(-1, ids[:, None])[:, 0]

    def loss(z: torch.Tensor) -> torch.Tensor:
        return ppo.ppo_loss(z.log_softmax(-1).gather(-1, ids[:, None])[:, 0], old, A, 0.2, 0.2)[0].sum()

    (grad,) = torch.autograd.grad(loss(z), z)
    reinforce = -A[:, None] * (torch.nn.functional.one_hot(ids, 5) - z.detach().softmax(-1))
    torch.testing.assert_close(grad, reinforce, atol=1e-12, rtol=0)
    for i, j in [(0, 0), (3, 4), (19, 2)]:
        step = torch.zeros_like(z)
        step[i, j] = 1e-5
        with torch.no_grad():
            slope = (loss(z + step) - loss(z - step)) / 2e-5
        assert abs(slope.item() - reinforce[i, j].item()) < 1e-6


def test_the_best_is_found_at_one_beta():
    """When beta grows, J falls, of what is better too: the second here has more reward and less KL."""
    run = make_run()
    for beta, reward, kl, best in (
        (0.004, -0.119, 4.78, True), (0.06, -0.076, 2.33, True), (0.06, -0.1, 2.2, False),
        (0.2, -0.1, 2.2, True), (0.001, -0.09, 2.3, True),
    ):
        run.beta = beta
        assert run.is_best(reward, kl) == best
        run.best = (reward, kl) if best else run.best


def test_adaptive_beta_moves_both_ways():
    """Ziegler et al. 2019: beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)."""
    cfg = PPOConfig(kl_target=6.0, kl_horizon=10000)
    for kl, error in [(60.0, 0.2), (6.6, 0.1), (6.0, 0.0), (5.4, -0.1), (0.0, -0.2), (-1.0, -0.2)]:
        assert ppo.adapt_beta(0.3, kl, cfg, 400) == pytest.approx(0.3 * (1 + error * 400 / 10000), abs=1e-12)
    # never below 0, however large the rollout
    assert ppo.adapt_beta(0.2, 1.0, PPOConfig(kl_target=6.0, kl_horizon=50), 400) == pytest.approx(0.2 * 0.8)
    run = make_run(adaptive_kl=True, kl_target=5.0, kl_horizon=100)
    run.iteration()  # the policy is still the reference: KL 0
    assert run.beta == pytest.approx(0.1 * (1 - 0.2 * 16 / 100), abs=1e-9)
    fixed = make_run()
    fixed.iteration()
    assert fixed.beta == 0.1


def test_group_baselines_by_hand():
    returns = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    baseline, deviation = ppo.group_baseline(returns, 3, "rloo")
    assert baseline.tolist() == pytest.approx([4, 3.5, 1.5, 1.5, 1.5, 0]) and deviation.tolist() == [1] * 6
    baseline, deviation = ppo.group_baseline(returns, 3, "grpo")
    assert baseline.tolist() == pytest.approx([3, 3, 3, 1, 1, 1])
    expected = [math.sqrt((4 + 1 + 9) / 2) + 1e-4, math.sqrt((1 + 1 + 4) / 2) + 1e-4]
    assert deviation.tolist() == pytest.approx([expected[0]] * 3 + [expected[1]] * 3)
    assert all(x.isfinite().all() for x in ppo.group_baseline(torch.ones(4), 2, "grpo"))


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_group_advantages_are_the_totals_less_the_baseline(kind):
    run = make_run(advantage=kind, group_size=4, kl_penalty="k1")
    nudge(run.policy, 0.1)
    prompts = [prompt for prompt in some_prompts(0, 4) for _ in range(4)]
    batch = run.collect(prompts, torch.rand(16, 16, generator=torch.Generator().manual_seed(0)))
    advantages, scale = run.advantages(batch)
    totals = (batch["scores"].sum(1) - 0.1 * (batch["k1"] * batch["mask"]).sum(1)).view(4, 4).double().numpy()
    if kind == "rloo":
        expected = totals - (totals.sum(1, keepdims=True) - totals) / 3
    else:
        expected = (totals - totals.mean(1, keepdims=True)) / (totals.std(1, ddof=1, keepdims=True) + 1e-4)
    rows = np.where(batch["mask"], expected.reshape(16, 1), np.nan)
    assert float(scale) == pytest.approx(np.nanstd(rows), rel=1e-4)
    rows = np.nan_to_num((rows - np.nanmean(rows)) / np.nanstd(rows))
    np.testing.assert_allclose(advantages.numpy(), rows, atol=1e-4)


def test_best_of_n_by_enumeration():
    scores = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for n in range(1, 7):
        subsets = list(itertools.combinations(range(6), n))
        expected = np.mean([[max(row[i] for i in subset) for subset in subsets] for row in scores.tolist()])
        assert ppo.best_of(scores, n) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(st.floats(0.05, 5.0), st.integers(0, 1000))
def test_optimum_by_enumeration(beta, seed):
    """No distribution over the samples has a higher J than the tilted one, whose J is the optimum."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(4, 9))
    w = np.exp(scores / beta) / np.exp(scores / beta).sum(1, keepdims=True)
    reward, kl = (w * scores).sum(1).mean(), (w * np.log(w * 9)).sum(1).mean()
    assert ppo.tilted(torch.from_numpy(scores), beta) == pytest.approx((reward, kl), abs=1e-9)
    best = ppo.optimum(torch.from_numpy(scores), beta)
    assert best == pytest.approx((beta * np.log(np.exp(scores / beta).mean(1))).mean(), abs=1e-9)
    assert best == pytest.approx(reward - beta * kl, abs=1e-9)
    for _ in range(20):
        other = rng.dirichlet(np.ones(9), size=4) * 0.5 + 0.5 * w
        assert ((other * scores).sum(1) - beta * (other * np.log(other * 9)).sum(1)).mean() <= best + 1e-9
    assert ppo.optimum(torch.from_numpy(scores), 0.0) == pytest.approx(scores.max(1).mean(), abs=1e-12)


@pytest.mark.parametrize(
    "flags",
    [
        {"lam": 1.1}, {"clip": 1.0}, {"clip": -0.1}, {"advantage": "rloo"}, {"advantage": "grpo"},
        {"train_only": "("}, {"init_kl_coef": float("nan")}, {"init_kl_coef": -1.0}, {"start_len": 0},
        {"max_gen_len": 0}, {"target_kl": float("inf")}, {"ppo_epochs": 0}, {"kl_horizon": 0},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(flags):
    with pytest.raises(ValueError, match=next(iter(flags))):
        PPOConfig(**flags)


# ---- a language model small enough to be enumerated --------------------------------------------------


def stories_of(net: Transformer, length: int) -> list[list[int]]:
    """All that net can write after BOS within this many tokens."""
    whole, open_ = [], [[END]]
    while open_:
        story = open_.pop()
        for v in range(net.args.vocab_size):
            longer = [*story, v]
            (whole if v == END or len(longer) == length else open_).append(longer)
    return whole


def log_probs(net: Transformer, stories: list[list[int]]) -> torch.Tensor:
    """(stories,) in float64, differentiable."""
    total = []
    for story in stories:
        logp = net.output(net.features(torch.tensor([story[:-1]])))[0].double().log_softmax(-1)
        total.append(logp[range(len(story) - 1), story[1:]].sum())
    return torch.stack(total)


@pytest.fixture
def enumerated(monkeypatch):
    """A run over all stories of V = 3, T = 4, each once: (run, batch, stories, random scores)."""

    def make(**flags):
        net = tiny(3, 5, scale=20)
        stories = stories_of(net, 4)
        assert len(stories) == 1 + 2 + 4 * 3 and len({tuple(s) for s in stories}) == 15
        scores = np.random.default_rng(0).normal(size=len(stories))
        table = {tuple(s): float(x) for s, x in zip(stories, scores, strict=True)}
        run = make_run(net, lambda tokens: [table[tuple(row)] for row in tokens], max_gen_len=3, **flags)
        run.scorer.parts[0][2].if_ended = lambda tokens: torch.tensor(
            [[table.get((*row[:t], END), math.nan) for t in range(1, len(row))] for row in tokens.tolist()]
        )
        nudge(run.policy, 0.1)
        with monkeypatch.context() as patch:
            scripted(patch)
            batch = run.collect([[END]] * len(stories), script([s[1:] for s in stories], 3))
        assert batch_ids(batch) == stories
        return run, batch, stories, torch.from_numpy(scores)

    return make


def test_kl_of_stories_is_the_sum_over_tokens(enumerated):
    """E[sum of k1] = E[sum of k3] = E[sum of exact KL] = KL of the distributions over whole stories."""
    run, batch, stories, _ = enumerated()
    with torch.no_grad():
        p, q = log_probs(run.policy, stories), log_probs(run.reference, stories)
    assert float(p.exp().sum()) == pytest.approx(1, abs=1e-6)
    expected = float((p.exp() * (p - q)).sum())
    assert expected > 0.01
    k3 = ppo.k3(batch["logp"], batch["reference_logp"]) * batch["mask"]
    for kl in (batch["k1"], batch["kl"], k3):
        assert float((p.exp() * kl.double().sum(1)).sum()) == pytest.approx(expected, abs=2e-6)
    assert (batch["kl"] >= -1e-7).all()
    np.testing.assert_allclose(batch["logp"].sum(1).numpy(), p.numpy(), atol=1e-5)


def paths_of(net: Transformer, length: int, past_end: float) -> tuple[list[list[int]], list[float]]:
    """All paths that net can take after BOS within this many tokens, and how likely each of them is."""
    whole, open_ = [], [([END], 1.0, 1.0)]
    while open_:
        path, probability, reach = open_.pop()
        if len(path) == length or len(path) > 1 and path[-1] == END:
            whole.append((path, probability))
            continue
        with torch.no_grad():
            p = net(torch.tensor([path]))[0][0, -1].double().softmax(-1)
        past = reach > past_end
        left = float(1 - p[END]) if past else 1.0
        for v in range(net.args.vocab_size):
            if not (past and v == END):
                longer = (*path, v)
                open_.append(([*longer], probability * float(p[v]) / left, reach * (left if past else 1.0)))
    return [path for path, _ in whole], [p for _, p in whole]


@pytest.mark.parametrize("past_end", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("kl_penalty", ["exact", "k1"])
@pytest.mark.parametrize("advantage, size", [("gae", 1), ("rloo", 2)])
def test_the_expected_gradient_is_that_of_the_objective(
    enumerated, kl_penalty, past_end, advantage, size, monkeypatch
):
    """At ratio 1: E[d loss] = -d J, J = E[R] - beta KL(stories), the expectation a sum over all stories (with
    rloo over all groups of two); or over all paths, told on past the end all the way, half, or not at all.
    """
    exact_end = past_end is not None
    flags = {"advantage": advantage, "group_size": size, "kl_penalty": kl_penalty, "exact_end": exact_end}
    run, _, paths, scores = enumerated(init_kl_coef=0.4, **flags)
    params = list(run.policy.parameters())
    logp, ref = log_probs(run.policy, paths), log_probs(run.reference, paths).detach()
    J = (logp.exp() * (scores - 0.4 * (logp - ref))).sum()
    expected = torch.autograd.grad(-J, params)
    probabilities = logp.detach().exp().tolist()
    if exact_end:
        monkeypatch.setattr(ppo, "PAST_END", past_end)
        paths, probabilities = paths_of(run.policy, 4, past_end)
        assert sum(probabilities) == pytest.approx(1) and len(paths) == {0.0: 8, 0.5: 14, 1.0: 15}[past_end]
    groups = list(itertools.product(range(len(paths)), repeat=size))
    rows = [paths[i] for group in groups for i in group]
    with monkeypatch.context() as patch:
        scripted(patch)
        until = torch.zeros(len(rows)) if exact_end else None
        batch = run.collect([[END]] * len(rows), script([row[1:] for row in rows], 3), until)
    assert batch_ids(batch) == rows
    monkeypatch.setattr(ppo, "whiten", lambda x, weight: (x, torch.tensor(1.0)))
    advantages, scale = run.advantages(batch)
    total = 0.0
    for n, group in enumerate(groups):
        p = math.prod(probabilities[i] for i in group) / size
        part = torch.arange(n * size, (n + 1) * size)
        total = total + p * run.loss(batch, advantages, scale, part)[0]
    for ours, theirs in zip(torch.autograd.grad(total, params), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)
    assert max(g.abs().max() for g in expected) > 0.05


@pytest.mark.parametrize("exact_end", [False, True])
@pytest.mark.parametrize("advantage, size", [("gae", 1), ("rloo", 4), ("grpo", 4)])
def test_the_unit_of_rewards_does_not_matter(advantage, size, exact_end):
    """Ten times the reward at ten times the price of a nat: the same gradient."""
    gradients = []
    for unit in (1, 10):
        flags = {"advantage": advantage, "group_size": size, "exact_end": exact_end}
        run = make_run(init_kl_coef=0.1 * unit, ent_coef=0.02 * unit, **flags)
        run.scorer.parts = [("length", float(unit), ppo.length_reward(8))]
        nudge(run.policy, 0.1)
        prompts = [prompt for prompt in some_prompts(0, 16 // size) for _ in range(size)]
        g = torch.Generator().manual_seed(0)
        u, until = torch.rand(16, 16, generator=g), torch.rand(16, generator=g)
        batch = run.collect(prompts, u, until if exact_end else None)
        loss = run.loss(batch, *run.advantages(batch), torch.arange(16))[0]
        gradients.append(torch.cat([x.flatten() for x in torch.autograd.grad(loss, run.trained)]))
    # but for what keeps deviations from being 0
    atol = 1e-3 * float(gradients[0].abs().max())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=5e-3, atol=atol)


def test_what_a_story_would_score_if_it_ended():
    """At any token: as the scorer has it of the story cut there. What going on brings is then worked out
    backwards, path by path.
    """
    run = make_run(exact_end=True, others=0.5, kl_penalty="k1", missing_eos_penalty=0.3)
    run.scorer.parts.append(("length", 2.0, ppo.length_reward(13)))
    nudge(run.policy, 0.2)
    batch = collect(run)
    told = run.scorer.if_ended(batch["tokens"], batch["mask"])
    for row, scores in zip(batch["tokens"].tolist(), told, strict=True):
        cut = [[*row[:t], END] for t in range(1, len(row))]
        torch.testing.assert_close(scores, run.scorer(cut, cut, [True] * len(cut)).sum(1))
    advantages, _ = run.advantages(batch)
    assert batch["story_ended"].any() and not batch["ended"].all()
    on, brought = torch.zeros_like(told), torch.zeros_like(told)
    for n, path in enumerate(batch_ids(batch)):
        ended = path[-1] == END and len(path) > batch["start"][n]
        worth = 0.0 if ended else float(run.scorer([path], [path], [False]).sum()) - 0.3
        for t in range(len(path) - 2, int(batch["start"][n]) - 2, -1):
            ending = float(told[n, t] - 0.1 * batch["end_k1"][n, t])
            going = worth - 0.1 * float(batch["k1"][n, t])
            hazard = float(batch["end_logp"][n, t].exp())
            if batch["reach"][n, t] <= ppo.PAST_END:
                hazard = float(path[t + 1] == END)
            on[n, t], brought[n, t] = batch["reach"][n, t] * (1 - hazard), going - ending
            worth = hazard * ending + (1 - hazard) * going
    torch.testing.assert_close(batch["on"], on)
    torch.testing.assert_close(batch["going_on"], torch.where(on > 0, brought, 0.0), atol=1e-5, rtol=0)
    white = ppo.whiten(batch["returns"], on)[0]
    torch.testing.assert_close(advantages, 0.5 * white)
    for wrong in (torch.zeros(3, 7), torch.full_like(told, math.nan), None):
        run.scorer.parts[-1][2].if_ended = lambda tokens, wrong=wrong: wrong
        with pytest.raises(SystemExit) as e:
            run.advantages(batch)
        assert "if_ended of the reward length failed" in one_line(e)


OPTIMA = {
    "critic and exact KL": (3, 4, {"advantage": "gae", "kl_penalty": "exact", "ppo_epochs": 2}),
    "rloo and k1": (3, 4, {"advantage": "rloo", "kl_penalty": "k1", "group_size": 4}),
    "shared critic": (3, 4, {"critic": "shared", "kl_penalty": "exact", "vf_coef": 0.1}),
    "bandit": (8, 2, {"advantage": "rloo", "kl_penalty": "exact", "group_size": 4}),
}


@pytest.mark.parametrize("name", OPTIMA)
def test_converges_to_the_tilted_reference(name):
    """Policy gradients end at π_ref e^{R/beta} / Z, known here exactly: to 0.02 nats, either way round."""
    V, T, flags = OPTIMA[name]
    net, beta, iterations = tiny(V, T + 1, scale=7), 0.5, 40
    stories = stories_of(net, T)
    scores = np.random.default_rng(0).normal(size=len(stories))
    table = {tuple(s): float(x) for s, x in zip(stories, scores, strict=True)}
    cfg = {"batch_size": 256, "learning_rate": 1e-2, "decay_lr": True, "max_iters": iterations - 1}
    run = make_run(
        net,
        lambda tokens: [table[tuple(row)] for row in tokens],
        lambda i, n: [[END]] * n,
        cfg,
        **{"max_gen_len": T - 1, "rollout_size": 512, "init_kl_coef": beta} | flags,
    )
    with torch.no_grad():
        ref = log_probs(net, stories).numpy()
    star = ref + scores / beta
    star -= np.log(np.exp(star).sum())
    assert (np.exp(ref) * (ref - star)).sum() > 0.15  # where it starts
    for _ in range(iterations):
        run.iteration()
    with torch.no_grad():
        logp = log_probs(run.policy, stories).numpy()
    assert (np.exp(logp) * (logp - star)).sum() < 0.02 and (np.exp(star) * (star - logp)).sum() < 0.02
    # J* = beta log E_ref[e^{R/beta}], which a policy misses by beta KL(policy || optimum)
    J = (np.exp(logp) * (scores - beta * (logp - ref))).sum()
    best = beta * np.log((np.exp(ref + scores / beta)).sum())
    assert best - J == pytest.approx(beta * (np.exp(logp) * (logp - star)).sum(), abs=1e-6)


# ---- learning ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact_end", [False, True])
@pytest.mark.parametrize("kl_penalty", ["exact", "k1"])
def test_the_loss_term_by_term(kl_penalty, exact_end):
    """Value and gradients of all terms, summed story by story and token by token in float64."""
    run = make_run(
        critic="shared",
        vf_coef=0.3,
        ent_coef=0.02,
        clip=0.1,
        clip_high=0.3,
        kl_penalty=kl_penalty,
    )
    batch = collect(run)
    g = torch.Generator().manual_seed(0)
    mask = batch["mask"]
    batch["returns"] = torch.randn(mask.shape, generator=g)
    batch["reach"], batch["on"] = torch.rand(2, *mask.shape, generator=g)
    batch["unit"] = torch.rand(len(mask), 1, generator=g) + 0.5
    advantages, scale = torch.randn(mask.shape, generator=g), torch.tensor(0.7)
    if exact_end:
        batch["going_on"] = torch.randn(mask.shape, generator=g)
    nudge(run.policy, 0.05)  # so that some ratios are clipped
    nudge(run.critic, 0.1)
    policy, critic, reference = (copy.deepcopy(m).double() for m in (run.policy, run.critic, run.reference))
    expected, clipped, k3 = 0.0, 0, 0.0
    for n, story in enumerate(batch_ids(batch)):
        tokens = torch.tensor([story])
        hidden = policy.features(tokens)
        p = policy.output(hidden)[0].log_softmax(-1)
        q = reference.output(reference.features(tokens))[0].log_softmax(-1).detach()
        values = critic(hidden, tokens)[0]
        for t in range(int(batch["start"][n]) - 1, len(story) - 1):
            ratio = (p[t, story[t + 1]] - batch["logp"][n, t].double()).exp()
            reach, went_on = (batch[key][n, t].double() for key in ("reach", "on"))
            terms = [(ratio, advantages[n, t].double())]
            if exact_end:  # going on, and among the tokens that do
                on = (1 - p[t, END].exp()) / (1 - batch["end_logp"][n, t].double().exp())
                terms = [(on, batch["going_on"][n, t].double() / 0.7), (ratio / on, terms[0][1])]
            for r, A in terms:
                expected = expected - went_on * torch.minimum(A * r, A * r.clamp(0.9, 1.3))
            priced = reach * batch["unit"][n].item()
            expected = expected + priced * 0.02 / 0.7 * (p[t].exp() * p[t]).sum()
            expected = expected + went_on * 0.3 * (values[t] - batch["returns"][n, t].double()) ** 2
            if kl_penalty == "exact":
                expected = expected + priced * 0.1 / 0.7 * (p[t].exp() * (p[t] - q[t])).sum()
            clipped += went_on.item() * any(not 0.9 <= r <= 1.3 for r, _ in terms)
            if exact_end:  # the KL of ending or not, and an estimate of that among the others
                was = batch["end_logp"][n, t].double()
                k3 += (reach * (was.exp() * (was - p[t, END]) - (1 - was.exp()) * on.log())).item()
                k3 += (went_on * (ratio / on - 1 - (ratio / on).log())).item()
            else:
                k3 += (reach * (ratio - 1 - ratio.log())).item()
    assert 0.02 < clipped / float(batch["reach"][mask].sum()) < 0.9
    ours, stats = run.loss(batch, advantages, scale, torch.arange(16))
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    assert stats[0].item() == pytest.approx(k3, rel=1e-4)
    assert stats[2].item() == pytest.approx(clipped, rel=1e-5)
    mine = [*run.policy.parameters(), *run.critic.parameters()]
    grads = torch.autograd.grad(ours, mine)
    theirs = torch.autograd.grad(expected, [*policy.parameters(), *critic.parameters()])
    for a, b in zip(grads, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5 * float(b.abs().max()) + 1e-5, rtol=1e-4)


def gradients(run: PPO, batch: dict) -> list[dict]:
    """Of every step of the policy's passes over a batch, without making them."""
    seen = []
    names = [name for name, p in run.policy.named_parameters()]

    def step(*args):
        seen.append({n: p.grad.clone() for n, p in zip(names, run.policy.parameters(), strict=True)})

    run.optimizer.step = step
    batch = batch | {"on": batch["reach"], "unit": torch.ones(len(batch["reach"]), 1)}
    g = torch.Generator().manual_seed(5)
    run.update_policy(batch, torch.randn(batch["mask"].shape, generator=g), torch.tensor(1.0))
    return seen


def test_gradients_do_not_depend_on_how_a_step_is_cut_up(monkeypatch):
    """A step's mean is over its tokens: the same whether they are learnt from in 1, 3 or 20 parts, in one
    thread or more, or as 1, 2 or 5 accumulated minibatches.
    """
    run = make_run(cfg={"batch_size": 20, "grad_clip": 0.0}, rollout_size=20, advantage="rloo", group_size=2)
    batch = collect(run, 20)
    (whole,) = gradients(run, batch)
    assert max(g.abs().max() for g in whole.values()) > 0.01
    for tokens, parts in [(1, 20), (120, None), (10**6, 1)]:
        monkeypatch.setattr(ppo, "CPU_PART_TOKENS", tokens)
        assert parts in (None, len(run.parts(torch.arange(20), batch)))
        (cut,) = gradients(run, batch)
        for name in whole:
            torch.testing.assert_close(cut[name], whole[name], atol=1e-6, rtol=0)
    monkeypatch.setattr(ppo, "CPU_PART_TOKENS", 60)
    (alone,) = gradients(run, batch)
    run.runtime.threads, run.runtime.pool = 3, ThreadPoolExecutor(3)
    (threaded,) = gradients(run, batch)
    run.runtime.pool.shutdown()
    assert same(alone, threaded)
    for micro_batches in (2, 5):
        cfg = {
            "batch_size": 20 // micro_batches,
            "gradient_accumulation_steps": micro_batches,
            "grad_clip": 0.0,
        }
        other = make_run(cfg=cfg, rollout_size=20, advantage="rloo", group_size=2)
        assert same(gradients(other, batch), [alone])
    cfg = {"batch_size": 10, "grad_clip": 0.0}
    assert len(gradients(make_run(cfg=cfg, advantage="rloo", group_size=2), batch)) == 2


def test_the_first_step_is_adamw_with_fresh_state():
    """Clipped gradient, eps as given, and neither moments nor weight decay from pretraining."""
    cfg = {"batch_size": 16, "grad_clip": 0.05, "learning_rate": 0.01, "weight_decay": 0.2}
    how = {"adam_eps": 1e-4, "advantage": "rloo", "group_size": 2}
    run, other = make_run(cfg=cfg, **how), make_run(cfg=cfg | {"grad_clip": 0.0}, **how)
    assert not run.optimizer.state
    before = {name: p.detach().double() for name, p in run.policy.named_parameters()}
    seen = []
    other.optimizer.step = lambda: seen.append([p.grad.double().clone() for p in other.policy.parameters()])
    norm = other.iteration()["ppo/grad_norm"]
    expected_norm = math.sqrt(sum(float(g.square().sum()) for g in seen[0]))
    assert norm == pytest.approx(expected_norm, rel=1e-5) and norm > 0.1
    run.iteration()
    for (name, p), g in zip(run.policy.named_parameters(), seen[0], strict=True):
        g = g * 0.05 / norm
        expected = before[name] * (1 - 0.01 * (0.2 if p.dim() == 2 else 0.0)) - 0.01 * g / (g.abs() + 1e-4)
        torch.testing.assert_close(p.detach().double(), expected, atol=2e-6, rtol=0)
    assert {int(s["step"]) for s in run.optimizer.state_dict()["state"].values()} == {1}


def test_train_only():
    run = make_run(train_only=r"norm|layers\.0\.attention\.w[qk]")
    before = weights(run.policy)
    for _ in range(2):
        run.iteration()
    moved = {name for name, x in run.policy.state_dict().items() if not torch.equal(x, before[name])}
    expected = {"layers.0.attention.wq.weight", "layers.0.attention.wk.weight", "norm.weight"}
    assert moved == expected | {"layers.0.attention_norm.weight", "layers.0.ffn_norm.weight"}
    assert same(weights(run.reference), before)


def test_ratio_is_one_on_the_first_minibatch():
    """Also for a network that was trained with dropout."""
    net = tiny(dropout=0.1)
    net.train()
    run = make_run(net, cfg={"batch_size": 16})
    values = run.iteration()
    assert values["ppo/steps"] == 1 and values["ppo/ratio_deviation"] < 2e-6
    assert values["ppo/clip_fraction"] == 0 and values["ppo/policy_kl"] < 1e-9
    assert abs(values["ppo/kl"]) < 1e-5 and abs(values["ppo/kl_k1"]) < 1e-4
    later = run.iteration()
    assert later["ppo/ratio_deviation"] < 2e-6 and later["ppo/kl"] > 1e-5


def test_a_step_beyond_target_kl_is_not_made():
    """It leaves weights and moments as the last step within it did."""
    cfg = {"batch_size": 16, "learning_rate": 1e-2}
    one, stopped = make_run(cfg=cfg), make_run(cfg=cfg, ppo_epochs=5, target_kl=1e-6)
    values = [run.iteration() for run in (one, stopped)]
    assert values[0]["ppo/steps"] == values[1]["ppo/steps"] == 1
    assert values[0]["ppo/stopped_early"] == 0 and values[1]["ppo/stopped_early"] == 1
    assert same(weights(one.policy), weights(stopped.policy))
    assert same(one.optimizer.state_dict()["state"], stopped.optimizer.state_dict()["state"])
    free = make_run(cfg=cfg, ppo_epochs=5, target_kl=100.0)
    assert free.iteration()["ppo/steps"] == 5 and not same(weights(one.policy), weights(free.policy))
    # before the very first step
    run = make_run(cfg=cfg, target_kl=1e-6)
    batch = collect(run)
    advantages, scale = run.advantages(batch)
    nudge(run.policy, 0.1)
    before = weights(run.policy)
    summary = run.update_policy(batch, advantages, scale)
    assert summary["ppo/steps"] == 0 and summary["ppo/stopped_early"] == 1
    assert same(weights(run.policy), before) and not run.optimizer.state


def test_learning_rate_falls_to_min_lr():
    cfg = {"learning_rate": 1.0, "min_lr": 0.2, "decay_lr": True}
    run = make_run(cfg=cfg, ppo_iters=4)
    rates = []
    for run.iter_num in range(5):
        rates.append(run.learning_rate())
    assert rates == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    run = make_run(cfg=cfg | {"decay_lr": False}, ppo_iters=4)
    run.iter_num = 3
    assert run.learning_rate() == 1.0


def test_iterations_are_counted_from_the_checkpoint_or_absolutely():
    net = tiny()
    checkpoint = {"model": net.state_dict(), "model_args": asdict(net.args), "iter_num": 7}
    runtime = Runtime("cpu", torch.float32, False)

    def last(max_iters: int, ppo_iters: int) -> int:
        cfg, ppo = TrainConfig(max_iters=max_iters), PPOConfig(ppo_iters=ppo_iters)
        return PPO(ppo, cfg, runtime, checkpoint, Letters(), some_prompts, []).last

    assert last(100, 3) == 10 and last(9, 0) == 10  # --max_iters is the last index, and is made


# ---- critic ------------------------------------------------------------------------------------------

CRITICS = ["reference", "separate", "shared"]


@pytest.mark.parametrize("critic", CRITICS)
def test_values_are_zero_at_first_and_warm_up_leaves_the_policy(critic):
    run = make_run(
        critic=critic,
        critic_warmup=1,
        critic_warmup_epochs=3,
        reward=lambda tokens: [len(row) / 10 for row in tokens],
    )
    before = weights(run.policy), weights(run.reference)
    batch = collect(run)
    assert not run.values(batch).any()
    first = run.iteration()
    assert first["ppo/value"] == 0 and first["ppo/explained_variance"] == pytest.approx(0, abs=1e-6)
    assert first["ppo/steps"] == 0  # the first iteration belongs to the critic
    assert same((weights(run.policy), weights(run.reference)), before) and not run.optimizer.state
    after = run.values(batch)
    assert after[batch["mask"]].abs().min() > 0 and not after[~batch["mask"]].any()
    assert run.iteration()["ppo/steps"] > 0
    assert not same(weights(run.policy), before[0]) and same(weights(run.reference), before[1])
    assert run.values(batch).isfinite().all() and not same(run.values(batch), after)


@pytest.mark.parametrize("critic", CRITICS)
def test_the_critic_learns_what_the_position_tells(critic):
    """Explained variance of stories it has not seen: each choice earns 1 - t / 10, and gae sums that up."""

    def explained(run: PPO, batch: dict) -> float:
        rewards = torch.where(batch["mask"], 1 - torch.arange(batch["mask"].shape[1]) / 10, 0.0)
        mask = batch["mask"].numpy()
        returns = np.flip(np.cumsum(np.flip(rewards.double().numpy(), 1), 1), 1)[mask]
        values = run.values(batch).double().numpy()[mask]
        return 1 - np.var(returns - values) / np.var(returns)

    # stories that all end with the context: what is left follows from the position alone
    net = tiny()
    with torch.no_grad():
        net.tok_embeddings.weight[END] = 0
    run = make_run(net, critic=critic, max_gen_len=24, critic_lr=1e-2, init_kl_coef=0.0, critic_replay=64)
    run.rewards = lambda batch: torch.where(batch["mask"], 1 - torch.arange(batch["mask"].shape[1]) / 10, 0.0)
    batch, unseen = collect(run, 64, 0), collect(run, 64, 1)
    for b in (batch, unseen):  # leave out the stories that do end
        whole = b["end"] == 24
        for key, x in b.items():
            b[key] = x[whole] if x.dim() else x
        assert len(b["end"]) > 20
    assert explained(run, unseen) == 0
    run.advantages(batch)
    before = weights(run.policy)
    run.fit_critic(20)
    assert explained(run, unseen) > 0.9 and same(weights(run.policy), before)


def test_explained_variance_and_value_are_logged_as_defined():
    run = make_run(lam=0.9)
    run.iteration()
    nudge(run.critic, 0.2)
    seen, advantages = {}, run.advantages
    run.advantages = lambda batch: seen.update(batch=batch) or advantages(batch)
    logged, batch = run.iteration(), seen["batch"]
    assert ppo.explained_variance(torch.ones(3), torch.rand(3), torch.ones(3)) == 0
    x, weight = torch.tensor([1.0, 2.0, 9.0]), torch.tensor([3.0, 1.0, 0.0])  # variances 3/16 and 3/64
    assert ppo.explained_variance(x, torch.tensor([0.5, 1.0, 4.0]), weight) == pytest.approx(0.75)
    rewards, mask = run.rewards(batch).double().numpy(), batch["mask"].numpy()
    values = batch["values"].double().numpy()
    returns = np.flip(np.cumsum(np.flip(rewards, 1), 1), 1)[mask]
    expected = 1 - np.var(returns - values[mask]) / np.var(returns)
    assert logged["ppo/explained_variance"] == pytest.approx(expected, rel=1e-5)
    assert logged["ppo/value"] == pytest.approx(values[mask].mean(), abs=1e-6)
    A, next_value = np.zeros_like(values), np.append(values[:, 1:], np.zeros((16, 1)), 1)
    for n, t in zip(*np.nonzero(mask), strict=True):
        last = int(np.nonzero(mask[n])[0].max())
        A[n, t] = sum(
            0.9 ** (s - t) * (rewards[n, s] + next_value[n, s] - values[n, s]) for s in range(t, last + 1)
        )
    assert logged["ppo/advantage_deviation"] == pytest.approx(A[mask].std(), rel=1e-4)


# ---- what is told ------------------------------------------------------------------------------------


def by_hand(run: PPO, stories: list[list[int]], starts: list[int]) -> dict[str, float]:
    """What describe and evaluate tell, story by story in float64."""
    policy, reference = (copy.deepcopy(net).double() for net in (run.policy, run.reference))
    rows, entropies, nats = [], [], []
    for story, start in zip(stories, starts, strict=True):
        with torch.no_grad():
            p, q = (net(torch.tensor([story]))[0][0].log_softmax(-1) for net in (policy, reference))
        at = range(start - 1, len(story) - 1)
        k1 = [float(p[t, story[t + 1]] - q[t, story[t + 1]]) for t in at]
        entropies += [-float((p[t].exp() * p[t]).sum()) for t in at]
        nats += [-float(q[t, story[t + 1]]) for t in at]
        pairs = [(story[t], story[t + 1]) for t in at[1:]]  # of the response alone
        rows.append(
            {
                "reward": -abs(len(story) - 8) / 100,
                "kl": sum(float((p[t].exp() * (p[t] - q[t])).sum()) for t in at),
                "kl_k1": sum(k1),
                "kl_k3": sum(math.exp(-x) - 1 + x for x in k1),
                "length": len(story),
                "mae": abs(len(story) - 8),
                "ended": story[-1] == END,
                "distinct_2": len(set(pairs)) / len(pairs) if pairs else math.nan,
            }
        )
    told = {name: float(np.nanmean([row[name] for row in rows])) for name in rows[0]}
    return told | {
        "J": told["reward"] - 0.1 * told["kl"],
        "reward/length": told["reward"],
        "entropy": np.mean(entropies),
        "length_deviation": np.std([row["length"] for row in rows]),
        "reference_perplexity": math.exp(np.mean(nats)),
    }


@pytest.fixture
def evaluated():
    run = make_run(eval_samples=3, rollout_size=8)
    run.evaluate()
    nudge(run.policy, 0.1)
    seen, real = [], run.collect
    run.collect = lambda *args: seen.append(real(*args)) or seen[-1]
    told = {name.removeprefix("ppo/eval/"): value for name, value in run.evaluate().items()}
    assert [len(batch["end"]) for batch in seen] == [8, 4]  # no more at once than in training
    stories = [story for batch in seen for story in batch_ids(batch)]
    return run, told, by_hand(run, stories, torch.cat([batch["start"] for batch in seen]).tolist())


def test_evaluation_tells_what_it_says(evaluated):
    run, told, expected = evaluated
    assert len(run.eval_prompts) == 4 and expected["kl"] > 0.1 and 0 < expected["ended"] < 1
    for name, value in expected.items():
        assert told[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name
    assert told["regret"] == pytest.approx(told["J_optimum"] - told["J"])
    again = {name.removeprefix("ppo/eval/"): value for name, value in run.evaluate().items()}
    assert again == told  # the same random numbers


def test_of_paths_their_stories_are_described():
    """As the policy tells them: nothing of what a path has past the end of its story."""
    run = make_run(exact_end=True)
    nudge(run.policy, 0.1)
    batch = collect(run, 40)
    stories, starts = batch_stories(batch), batch["start"].tolist()
    past = (batch["story_end"] < batch["end"]).float().mean()
    assert 0.3 < past and batch["reach"].max() == 1 and not batch["story_ended"].all()
    told = {name.removeprefix("ppo/"): value for name, value in run.rollout_metrics(batch).items()}
    expected = by_hand(run, stories, starts)
    for name in told:
        assert told[name] == pytest.approx(expected[name], rel=2e-4, abs=2e-5), name
    assert {"kl_k1", "kl_k3", "entropy", "J", "ended"} <= set(told)
    scores = run.scorer(stories, stories, batch["story_ended"].tolist())
    torch.testing.assert_close(batch["scores"], scores)
    paths = run.scorer(batch_ids(batch), batch_ids(batch), batch["ended"].tolist())
    torch.testing.assert_close(batch["cut_scores"][~batch["ended"]], paths[~batch["ended"]])


# ---- does it learn? ----------------------------------------------------------------------------------


def improvement(seed: int, shuffled: bool) -> float:
    """By how much the mean absolute error of held-out stories falls, in hundreds of tokens as the reward."""
    run = make_run(
        tiny(seed=seed, scale=3),
        cfg={"batch_size": 64, "learning_rate": 1e-3, "seed": seed},
        rollout_size=128,
        target_len=6,
        max_gen_len=20,
        ppo_epochs=2,
        init_kl_coef=0.02,
        critic_warmup=2,
        eval_samples=50,
    )
    rng, scores = np.random.default_rng(seed), run.scores
    before = run.evaluate()["ppo/eval/mae"]
    if shuffled:  # the same rewards, but for anyone's story

        def shuffle(r):
            order = torch.from_numpy(rng.permutation(len(r.end)))
            return {name: x[order] for name, x in scores(r).items()}

        run.scores = shuffle
    for _ in range(8):
        run.iteration()
    return (before - run.evaluate()["ppo/eval/mae"]) / 100


def test_rewards_improve_and_shuffled_rewards_do_not():
    """95 % bounds of Student's t over 5 seeds (2.776 for 4 degrees of freedom)."""
    bounds = {}
    for shuffled in (False, True):
        gains = np.array([improvement(seed, shuffled) for seed in range(5)])
        print(shuffled, gains)
        half = 2.776 * gains.std(ddof=1) / math.sqrt(5)
        bounds[shuffled] = gains.mean() - half, gains.mean() + half
    assert bounds[False][0] > 0.01
    assert bounds[True][0] < 0.0 and bounds[True][1] < bounds[False][0]


# ---- Runtime -----------------------------------------------------------------------------------------


def test_backward_adds_up_parts():
    a, b = (torch.nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(2))

    def function(part: float):
        return part * (a**2).sum(), torch.tensor([part, 1.0])

    runtime = Runtime("cpu", torch.float32, False)
    assert runtime.backward(function, [2.0, 3.0], [a, b]).tolist() == [5, 2]
    assert a.grad.tolist() == [10, 20] and b.grad is None
    assert runtime.backward(function, [], [a, b]) == 0 and a.grad.tolist() == [10, 20]
    stats = torch.tensor([1.0])
    assert runtime.reduce([a, b], stats) is stats and a.grad.tolist() == [10, 20]


def test_reduce_and_gather_over_ranks(monkeypatch):
    """With a stand-in for another rank, which holds three times of everything, in the same order."""

    def all_gather_object(out: list, mine) -> None:
        out[:] = [mine, {k: 3 * v for k, v in mine.items()} if isinstance(mine, dict) else 3 * mine]

    monkeypatch.setattr(train.dist, "all_reduce", lambda x: x.mul_(4))
    monkeypatch.setattr(train.dist, "all_gather_object", all_gather_object)
    runtime = Runtime("cpu", torch.float32, False, rank=0, world_size=2)
    params = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    params[0].grad = torch.arange(6.0).view(2, 3)
    assert runtime.reduce(params, torch.tensor([1.0, 2.0])).tolist() == [4, 8]
    assert params[0].grad.tolist() == [[0, 4, 8], [12, 16, 20]] and params[1].grad.tolist() == [0] * 4
    first, second = runtime.gather({"x": torch.tensor([1.0])})
    assert first["x"].tolist() == [1] and second["x"].tolist() == [3]


# ---- whole runs --------------------------------------------------------------------------------------

SHAPE = [
    "--vocab_source=custom",
    f"--vocab_size={VOCAB}",
    "--dim=32",
    "--n_layers=2",
    "--n_heads=4",
    "--n_kv_heads=2",
    "--multiple_of=8",
    "--max_seq_len=64",
]
FLAGS = [
    "--ppo",
    "--init_from=resume",
    "--device=cpu",
    "--batch_size=8",
    "--gradient_accumulation_steps=1",
    "--learning_rate=3e-3",
    "--decay_lr=False",
    "--max_gen_len=30",
    "--target_len=20",
    "--start_len=6",
    "--rollout_size=16",
    "--critic_epochs=1",
    "--critic_warmup=0",
    "--critic_warmup_epochs=2",
    "--train_only=",
    "--ppo_epochs=2",
    "--eval_iters=1",
    "--eval_samples=2",
    "--eval_interval=2",
]
PRETRAINED = 12  # iterations


@pytest.fixture(scope="session")
def base(data_dir, tmp_path_factory) -> Path:
    """The folder of a small pretrained model, not to be changed."""
    folder = tmp_path_factory.mktemp("base") / "out"
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    how = ["--batch_size=16", "--gradient_accumulation_steps=1", "--learning_rate=1e-2", "--warmup_iters=3"]
    how += [f"--max_iters={PRETRAINED}", f"--eval_interval={PRETRAINED}", "--eval_iters=2", "--device=cpu"]
    train.main([*SHAPE, *how, f"--data_dir={data_dir}", f"--out_dir={folder}"])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return folder


@pytest.fixture
def tune(base, tmp_path, capsys):
    """Runs train.py in this process on a copy of the base, tmp_path/name; returns what it printed."""

    def run(name: str, *flags: str, all_flags=FLAGS) -> str:
        if not (tmp_path / name).exists():
            shutil.copytree(base, tmp_path / name)
        train.main([*all_flags, f"--out_dir={tmp_path / name}", *flags])
        return "".join(capsys.readouterr())

    yield run
    torch.use_deterministic_algorithms(False)


def state(folder: Path) -> dict:
    """What ppo_ckpt.pt holds, but for names and times."""
    checkpoint = load_checkpoint(folder / "ppo_ckpt.pt")
    del checkpoint["config"], checkpoint["seconds"]
    return checkpoint


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "seconds" not in k and "tok/s" not in k} for line in lines]


ITERATION = """
    reward kl kl_k1 kl_k3 J entropy length length_deviation ended reward/length mae beta explained_variance
    value advantage_deviation policy_kl loss/policy clip_fraction ratio_deviation loss/value grad_norm steps
    stopped_early episodes seconds iteration_seconds rollout_seconds tok/s rollout_tok/s
"""
EVALUATION = """
    reward kl kl_k1 kl_k3 J entropy length length_deviation ended reward/length mae distinct_2
    reference_perplexity J_optimum regret
"""


def test_a_run_leaves_everything_and_names_stay(tune, tmp_path, base):
    out = tune("out", "--ppo_iters=3")
    folder = tmp_path / "out"
    assert {"ckpt.pt", "ppo_ckpt.pt", "ppo_best.pt", "ppo_model.bin"} < {p.name for p in folder.iterdir()}
    for name in ("ckpt.pt", "last.pt", "model.bin"):
        assert (folder / name).read_bytes() == (base / name).read_bytes()
    text = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    pretraining = (base / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert text[: len(pretraining)] == pretraining
    lines = [json.loads(line) for line in text[len(pretraining) :]]
    iterations = [line for line in lines if "ppo/reward" in line]
    evaluations = [line for line in lines if "ppo/eval/reward" in line]
    assert [line["iter"] for line in iterations] == [PRETRAINED + i for i in (1, 2, 3)]
    assert [line["iter"] for line in evaluations] == [PRETRAINED + i for i in (0, 2, 3)]
    assert all({f"ppo/{name}" for name in ITERATION.split()} | {"lr"} <= line.keys() for line in iterations)
    assert all({f"ppo/eval/{name}" for name in EVALUATION.split()} <= line.keys() for line in evaluations)
    assert all(math.isfinite(x) for line in lines for x in line.values())
    assert out.count("held out after") == 3 and [line["ppo/episodes"] for line in iterations] == [16, 32, 48]
    # the files are the policy's
    state = load_checkpoint(folder / "ppo_ckpt.pt")
    best_J = max(e["ppo/eval/J"] for e in evaluations[1:])
    reward, kl = state["best"]
    assert state["iter_num"] == PRETRAINED + 3 and math.isclose(reward - 0.2 * kl, best_J, abs_tol=1e-5)
    best = load_checkpoint(folder / "ppo_best.pt")
    assert best["best"] == state["best"] and best["iter_num"] in (PRETRAINED + 2, PRETRAINED + 3)
    policy, reference = (
        model_from_checkpoint(load_checkpoint(path)) for path in (folder / "ppo_best.pt", base / "ckpt.pt")
    )
    assert same(dict(policy.state_dict()), dict(read_any(str(folder / "ppo_model.bin"))["model"]))
    assert not same(dict(policy.state_dict()), dict(reference.state_dict()))
    prompt = [[END]]
    assert decode(policy, prompt, 3, (), lambda rows, x: policy.output(x).argmax(-1))[0]


@pytest.mark.parametrize(
    "flags",
    [
        ["--critic=reference", "--critic_warmup=1", "--adaptive_kl", "--kl_horizon=50", "--kl_penalty=exact"],
        ["--critic=reference", "--train_only=wv|norm", "--critic_replay=40", "--lam=0.9"],
        ["--critic=separate", "--reward_norm", "--kl_penalty=k1"],
        ["--critic=shared", "--target_kl=0.002", "--ent_coef=0.01"],
        ["--advantage=rloo", "--group_size=4", "--gradient_accumulation_steps=2"],
        ["--exact_end", "--others=0"],
        ["--exact_end", "--others=0.5", "--advantage=grpo", "--group_size=4", "--kl_penalty=k1"],
    ],
    ids=["reference", "part of the weights", "separate", "shared", "rloo", "exact end", "exact end, grpo"],
)
def test_resumed_equals_uninterrupted_bit_for_bit(tune, tmp_path, flags):
    tune("whole", "--ppo_iters=4", *flags)
    tune("parts", "--ppo_iters=2", *flags)
    assert not same(state(tmp_path / "parts"), state(tmp_path / "whole"))
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as f:
        f.write(json.dumps({"iter": PRETRAINED + 3, "ppo/reward": 0.0}) + '\n{"iter": 15, "ppo/re')  # killed
    out = tune("parts", all_flags=["--ppo", "--init_from=resume", "--ppo_iters=4", "--device=cpu"])
    assert "ppo_ckpt.pt" in out
    assert same(state(tmp_path / "parts"), state(tmp_path / "whole"))
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    for name in ("ckpt.pt", "ppo_model.bin"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert "already" in tune("parts", all_flags=["--ppo", "--init_from=resume", "--device=cpu"])


@needs_cuda
@pytest.mark.parametrize(
    "flags",
    [
        ["--critic=reference"],
        ["--critic=separate", "--reward_norm", "--kl_penalty=k1", "--adaptive_kl"],
        ["--critic=shared"],
        ["--advantage=rloo", "--group_size=4"],
        ["--exact_end", "--others=0.5"],
    ],
    ids=["reference", "separate", "shared", "rloo", "exact end"],
)
def test_on_cuda(tune, tmp_path, flags):
    """The first rollout is the CPU's, what is learnt from it close; the ratio is 1; and a resumed run equals
    an uninterrupted one to the last bit.
    """
    flags = [*flags, "--batch_size=16", "--ppo_epochs=1", "--deterministic"]
    tune("cpu", "--ppo_iters=2", *flags)
    tune("whole", "--ppo_iters=4", *flags, "--device=cuda")
    tune("parts", "--ppo_iters=2", *flags, "--device=cuda")
    again = ["--ppo", "--init_from=resume", "--ppo_iters=4", "--deterministic", "--device=cuda"]
    tune("parts", all_flags=again)
    assert same(state(tmp_path / "parts"), state(tmp_path / "whole"))
    here, there = ([m for m in metrics(tmp_path / name) if "ppo/kl" in m] for name in ("cpu", "whole"))
    for name, value in here[0].items():
        assert there[0][name] == pytest.approx(value, rel=2e-3, abs=2e-4), name
    assert abs(there[1]["ppo/reward"] - here[1]["ppo/reward"]) < 0.05
    assert all(m["ppo/ratio_deviation"] < 5e-6 for m in there)
    before, after = (load_checkpoint(tmp_path / "whole" / x)["model"] for x in ("ckpt.pt", "ppo_ckpt.pt"))
    assert not same(before, after)


@pytest.mark.parametrize("flags, kept", [
    ([], True), (["--init_kl_coef=1e-9"], True), (["--init_kl_coef=1"], False),
])
def test_the_best_stays_the_best(tune, tmp_path, flags, kept):
    """Also when ppo_model.bin was moved away; after a change of beta, if it is the best at the new one."""
    tune("out", "--ppo_iters=2")
    path, best = tmp_path / "out" / "ppo_ckpt.pt", tmp_path / "out" / "ppo_best.pt"
    ppo.save_checkpoint(path, load_checkpoint(path) | {"best": (1e9, 4e9)})
    (tmp_path / "out" / "ppo_model.bin").unlink()
    before = best.read_bytes()
    flags = ["--ppo", "--init_from=resume", "--ppo_iters=3", "--device=cpu", *flags]
    tune("out", all_flags=flags)
    assert (best.read_bytes() == before) == kept
    with pytest.raises(SystemExit, match="--target_len=20, which cannot change"):
        tune("out", all_flags=[*flags, "--target_len=30"])


def test_a_gradient_that_is_not_finite_leaves_no_trace():
    """The step is not made, and what is logged are the means over the others."""
    run, calls = make_run(critic_warmup=0), []
    loss = run.loss

    def poisoned(*args):
        total, stats = loss(*args)
        calls.append(total)
        return (total * math.nan, stats * math.nan) if len(calls) == 1 else (total, stats)

    run.loss = poisoned
    values = run.iteration()
    assert run.skipped == values["ppo/skipped"] == 1 and 0 < values["ppo/steps"] < len(calls)
    assert all(math.isfinite(x) for x in values.values())
    assert all(p.isfinite().all() for p in run.policy.parameters())


STOPPING = """
import os, signal
def f(prompts, stories, tokens, ended):
    with open(__file__ + ".calls", "a") as file:
        file.write(".")
    if STOP and os.path.getsize(__file__ + ".calls") == 3:  # in the second iteration
        os.kill(os.getpid(), signal.SIGINT)
    return [-len(row) / 100 for row in tokens]
"""


def test_ctrl_c_saves_and_resume_equals_uninterrupted(tune, tmp_path):
    for name in ("whole", "cut"):
        (tmp_path / f"{name}.py").write_text(f"STOP = {name == 'cut'}\n" + STOPPING)
    flags = ["--ppo_iters=4", "--decay_lr=True", "--eval_interval=3"]
    tune("whole", *flags, f"--reward={tmp_path}/whole.py:f")
    out = tune("cut", *flags, f"--reward={tmp_path}/cut.py:f")
    assert f"stopped after iteration {PRETRAINED + 2}, saved" in out and "to go on: python" in out
    assert state(tmp_path / "cut")["iter_num"] == PRETRAINED + 2 and (tmp_path / "cut/ppo_model.bin").exists()
    tune("cut", all_flags=["--ppo", "--init_from=resume", "--device=cpu"])
    assert same(state(tmp_path / "cut"), state(tmp_path / "whole"))
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_killed_between_two_files_of_a_save(tune, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(folder, stem, checkpoint, *more):
        if checkpoint["iter_num"] == PRETRAINED + 4:
            raise Killed
        real(folder, stem, checkpoint, *more)

    real = ppo.save_state
    tune("whole", "--ppo_iters=4")
    monkeypatch.setattr(ppo, "save_state", kill)
    with pytest.raises(Killed):
        tune("cut", "--ppo_iters=4")
    monkeypatch.setattr(ppo, "save_state", real)
    tune("cut", "--ppo_iters=4")
    assert same(state(tmp_path / "cut"), state(tmp_path / "whole"))
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_pretraining_and_ppo_keep_each_others_metrics(tune, tmp_path):
    tune("out", "--ppo_iters=1")
    before = metrics(tmp_path / "out")
    (tmp_path / "out" / "ppo_ckpt.pt").unlink()  # with which ckpt.pt has to stay as it is
    flags = ["--init_from=resume", f"--max_iters={PRETRAINED + 2}", "--device=cpu"]
    tune("out", all_flags=flags)
    assert [m for m in metrics(tmp_path / "out") if m in before] == before
    later = [m for m in metrics(tmp_path / "out") if m not in before]
    assert {m["iter"] for m in later} == {PRETRAINED + 1, PRETRAINED + 2}
    assert all("loss/train" in m or "loss/val" in m for m in later)


def test_beginning_anew_forgets_the_run_before(tune, tmp_path):
    tune("out", "--ppo_iters=2")
    before = metrics(tmp_path / "out"), state(tmp_path / "out")
    (tmp_path / "out" / "ppo_ckpt.pt").unlink()
    tune("out", "--ppo_iters=2")
    assert same((metrics(tmp_path / "out"), state(tmp_path / "out")), before)


def test_target_len_is_for_the_length_reward_alone(tune, tmp_path):
    (tmp_path / "wordlength.py").write_text("def f(p, s, t, e): return [len(x) for x in s]")
    tune("out", "--ppo_iters=1", "--target_len=1000", f"--reward={tmp_path}/wordlength.py:f")


def test_max_iters_and_eval_only(tune, tmp_path):
    tune("out", f"--max_iters={PRETRAINED + 1}")
    assert state(tmp_path / "out")["iter_num"] == PRETRAINED + 2
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert tune("out", "--eval_only").count("held out after 2") == 1
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    tune("out", "--ppo_iters=3")
    assert state(tmp_path / "out")["iter_num"] == PRETRAINED + 3


def test_a_run_that_has_nothing_to_do_names_no_files_of_its_own(tune, tmp_path):
    out = tune("out", "--max_iters=1")  # counted as PPO's iterations, where ckpt.pt is further
    assert f"--ppo_iters={train.PPO_ITERS}" in out and "ppo_model.bin" not in out


def test_frontier_of_two_outcomes():
    """Scores 0 and 1, equally likely: best of n is 1 - 2^-n (n small beside m), the optima are logistic."""
    scores = torch.tensor([0.0, 1.0]).repeat(1, 500)
    curves = ppo.frontier(scores)
    for n, (kl, reward) in zip([1, 2, 4, 8], curves["best"], strict=False):
        assert reward == pytest.approx(1 - 0.5**n, abs=2e-3)
        assert kl == pytest.approx(math.log(n) - (n - 1) / n)
    for beta, (kl, reward) in zip(torch.logspace(1, -2, 60).tolist(), curves["optimum"], strict=False):
        p = 1 / (1 + math.exp(-1 / beta))
        q = 1 - p
        assert reward == pytest.approx(p, abs=1e-6)
        assert kl == pytest.approx(math.log(2) + p * math.log(p) + (q * math.log(q) if q else 0), abs=1e-6)


def test_report_draws_and_says_what_is_missing(tune, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit, match="metrics.jsonl; to make one, run: python train.py") as e:
        ppo.main(["report", str(tmp_path / "nowhere")])
    assert "\n" not in str(e.value)
    tune("out", "--ppo_iters=2", "--eval_interval=1")
    ppo.main(["report", str(tmp_path / "out")])
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / f"report.{x}") for x in ("csv", "png")]
    assert (tmp_path / "out" / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with monkeypatch.context() as patch:
        patch.setattr(ppo.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SystemExit, match="pip install matplotlib"):
            ppo.main(["report", str(tmp_path / "out")])
    (tmp_path / "out" / "report.png").unlink()
    (tmp_path / "out" / "report.png").mkdir()
    with pytest.raises(SystemExit, match="cannot report on .*report.png"):
        ppo.main(["report", str(tmp_path / "out")])


@pytest.mark.parametrize("reward", ["length", "keyword"])
def test_report_tells_the_learning_curve(reward, tune, tmp_path, monkeypatch):
    tune("out", "--ppo_iters=2", f"--reward={reward}", *["--keywords=a"] * (reward == "keyword"))
    monkeypatch.setattr(ppo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        ppo.main(["report", str(tmp_path / "out")])
    with open(tmp_path / "out" / "report.csv", encoding="utf-8", newline="") as f:  # needs no matplotlib
        rows = list(csv.DictReader(f))
    assert ",".join(rows[0]) == "iteration,episodes,reward,mae,kl,J,length,ended,seconds"
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "ppo/kl" in line]
    assert [int(row["iteration"]) for row in rows] == [PRETRAINED + 1, PRETRAINED + 2]
    assert [float(row["seconds"]) for row in rows] == [step["ppo/iteration_seconds"] for step in steps]
    for name in ("episodes", "reward", "kl", "J", "length", "ended"):
        assert [float(row[name]) for row in rows] == [step[f"ppo/{name}"] for step in steps]
    errors = [str(step["ppo/mae"]) if reward == "length" else "" for step in steps]
    assert [row["mae"] for row in rows] == errors


def test_dropout_is_off(tune, tmp_path):
    out = tune("out", "--ppo_iters=1", "--dropout=0.1", "--batch_size=16", "--ppo_epochs=1")
    (line,) = (m for m in metrics(tmp_path / "out") if "ppo/ratio_deviation" in m)
    assert line["ppo/steps"] == 1 and line["ppo/ratio_deviation"] < 5e-6 and "clipped 0.0%" in out
    assert load_checkpoint(tmp_path / "out" / "ppo_best.pt")["model_args"]["dropout"] == 0


@pytest.mark.parametrize("flags, torchrun", [([], True), (["--exact_end", "--others=0.5"], False)])
def test_two_ranks_equal_one(tune, tmp_path, base, flags, torchrun):
    """Rollouts, critic and policy are shared out, and come to the same weights and metrics."""
    flags = [*flags, "--ppo_iters=2", "--rollout_size=18", "--adam_eps=1e-3"]
    flags += ["--critic=separate", "--critic_lr=1e-4"]
    tune("one", *flags)
    shutil.copytree(base, tmp_path / "two")
    flags = [*FLAGS, *flags, f"--out_dir={tmp_path / 'two'}"]
    if torchrun:  # whose processes end as any do
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        command += [str(ROOT / "train.py"), *flags]
        process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
        assert process.returncode == 0, process.stderr
    else:
        ranks(2, flags, tmp_path / "out")
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    assert one["iter_num"] == two["iter_num"] == PRETRAINED + 2 and one["episodes"] == two["episodes"] == 36
    for part in ("model", "critic"):
        for name, tensor in one[part].items():
            torch.testing.assert_close(two[part][name], tensor, atol=2e-5, rtol=0)
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


# ---- beginners' mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--ppo", "--out_dir=empty"], "--init_from=resume"),
        (["--ppo", "--init_from=scratch"], "--init_from=resume"),
        (["--ppo", "--init_from=resume", "--out_dir=empty"], "no checkpoint at empty/ckpt.pt"),
        (["--lam=0.9"], "--lam is for PPO; add --ppo"),
        ([*FLAGS, "--others=0"], "add --exact_end"),
        ([*FLAGS, "--exact_end", "--reward=keyword", "--keywords=dog"], "keyword does not"),
        (["--ppo=False", "--clip=0.1"], "--clip is for PPO; add --ppo"),
        ([*FLAGS, "--target_len=100", "--max_gen_len=300"], "the context of 64"),
        ([*FLAGS, "--target_len=63"], "--max_gen_len=30"),
        ([*FLAGS, "--start_len=64"], "--start_len=64"),
        ([*FLAGS, "--dim=64"], "--dim=64 contradicts"),
        ([*FLAGS, "--max_seq_len=128"], "--max_seq_len=128 contradicts"),
        ([*FLAGS, "--train_only=["], "regular expression"),
        ([*FLAGS, "--train_only=nothing"], "matches no parameter"),
        ([*FLAGS, "--group_size=5"], "--group_size=5"),
        ([*FLAGS, "--advantage=rloo"], "--group_size"),
        ([*FLAGS, "--advantage=reinforce"], "advantage"),
        ([*FLAGS, "--clip=1"], "clip=1"),
        ([*FLAGS, "--lam=-1"], "lam=-1"),
        ([*FLAGS, "--reward=shortness"], "shortness"),
        ([*FLAGS, "--reward=keyword"], "--keywords"),
        ([*FLAGS, "--prompts=no.txt"], "no.txt"),
        ([*FLAGS, "--dtype=bfloat16"], "float32"),
        ([*FLAGS, "--compile"], "compil"),
        ([*FLAGS, "--data_dir=nowhere"], "nowhere"),
        ([*FLAGS, "--batch_size=0"], "batch_size"),
    ],
    ids=lambda x: x[-1] if isinstance(x, list) else "",
)
def test_mistakes_are_one_line(flags, message, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "out")
    with pytest.raises(SystemExit) as e:
        train.main(flags)
    assert message in one_line(e)
    assert not Path("out/ppo_ckpt.pt").exists()
    assert Path("out/metrics.jsonl").read_bytes() == (base / "metrics.jsonl").read_bytes()


def test_another_tokenizer_is_refused(tune, base, tmp_path):
    shutil.copytree(base, tmp_path / "out")
    checkpoint = load_checkpoint(base / "ckpt.pt")
    checkpoint["config"]["tokenizer_sha256"] = "0" * 64
    torch.save(checkpoint, tmp_path / "out" / "ckpt.pt")
    (tmp_path / "prompts.txt").write_text("Once upon a time\n")
    for flags in ([], [f"--prompts={tmp_path}/prompts.txt"]):
        with pytest.raises(SystemExit) as e:
            tune("out", "--ppo_iters=1", *flags)
        assert "not the tokenizer" in one_line(e) or "another tokenizer" in one_line(e)


@pytest.mark.parametrize("of_its_own", [True, False], ids=["its own tokenizer", "another of that size"])
def test_a_foreign_model_with_another_tokenizer_is_warned_of(of_its_own, tune, base, tmp_path):
    """As llama2.c's checkpoints, this one does not tell its tokenizer."""
    shutil.copytree(base, tmp_path / "out")
    checkpoint = load_checkpoint(base / "ckpt.pt")
    del checkpoint["config"]["tokenizer_sha256"]
    if not of_its_own:
        checkpoint["model"]["norm.weight"] *= -100  # sure of the tokens that it thought least likely
    torch.save(checkpoint, tmp_path / "out" / "ckpt.pt")
    warned = "worse than chance" in tune("out", "--ppo_iters=1")
    assert warned is not of_its_own


@pytest.mark.parametrize("evaluation", [1, 2])
def test_an_evaluation_that_cannot_be_logged_is_made_again(evaluation, tune, tmp_path, monkeypatch):
    """Else its J would count as the best, without files of it."""
    flags, log = ["--ppo_iters=4", "--eval_interval=2"], train.Metrics.log

    def full(self, iter_num, values):
        if "ppo/eval/J" in values and iter_num == PRETRAINED + 2 * evaluation:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        log(self, iter_num, values)

    monkeypatch.setattr(train.Metrics, "log", full)
    with pytest.raises(SystemExit, match=f"No space left.*saved up to {PRETRAINED + 2 * evaluation}"):
        tune("cut", *flags)
    monkeypatch.setattr(train.Metrics, "log", log)
    tune("cut", *flags)
    tune("whole", *flags)
    for name in ("ppo_best.pt", "ppo_model.bin"):
        cut, whole = (read_any(str(tmp_path / run / name))["model"] for run in ("cut", "whole"))
        assert same(dict(cut), dict(whole)), name
    cut, whole = state(tmp_path / "cut"), state(tmp_path / "whole")
    assert all(same(cut[key], whole[key]) for key in ("model", "critic", "best", "evaluated", "episodes"))
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_what_fails_before_the_first_iteration_saves_nothing(tune, tmp_path, monkeypatch):
    """A state without an iteration would only keep pretraining from going on."""

    def full(run):
        raise OSError("the disk is full")

    monkeypatch.setattr(ppo.PPO, "evaluate", full)
    with pytest.raises(SystemExit, match=f"stopped after iteration {PRETRAINED}"):
        tune("out", "--ppo_iters=1")
    assert not list((tmp_path / "out").glob("ppo_*"))


def test_a_finished_pretraining_may_be_asked_for_again(tune, base, tmp_path):
    """As make demo does when called again: there is nothing to do, and PPO's reference stays as it is."""
    tune("out", "--ppo_iters=1")
    out = tune("out", all_flags=["--init_from=auto", f"--max_iters={PRETRAINED}", "--device=cpu"])
    assert f"at iteration {PRETRAINED} already" in out
    for name in ("ckpt.pt", "last.pt", "model.bin"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    tune("out", "--ppo_iters=2")
    assert state(tmp_path / "out")["iter_num"] == PRETRAINED + 2


def test_a_cap_beyond_the_context_is_the_context(tune, tmp_path):
    tune("out", "--ppo_iters=1", "--max_gen_len=1000000000")
    tune("same", "--ppo_iters=1", "--max_gen_len=64")
    assert same(state(tmp_path / "out"), state(tmp_path / "same"))
    out = tune("out", all_flags=["--ppo", "--init_from=resume", "--ppo_iters=0", "--device=cpu"])
    assert "already" in out  # 0 is the default: what the run had


def test_shards_without_bos_are_refused(tune, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    for path in (tmp_path / "data" / f"tok{VOCAB}").glob("*.bin"):
        ids = np.fromfile(path, "<u2")
        assert (ids == END).any()
        np.where(ids == END, 5, ids).astype("<u2").tofile(path)
    meta_path = tmp_path / "data" / f"tok{VOCAB}" / "meta.json"
    meta = json.loads(meta_path.read_text())
    for shard in meta["shards"]:  # smaller than a MiB, so there is one block
        shard["crc32"] = f"{zlib.crc32((meta_path.parent / shard['name']).read_bytes()):08x}"
    meta_path.write_text(json.dumps(meta))
    with pytest.raises(SystemExit) as e:
        tune("out", f"--data_dir={tmp_path / 'data'}")
    assert "BOS" in one_line(e)


def test_another_reference_is_refused(tune, tmp_path):
    tune("out", "--ppo_iters=1")
    before = (tmp_path / "out" / "ppo_ckpt.pt").read_bytes()
    original = load_checkpoint(tmp_path / "out" / "ckpt.pt")
    changed = copy.deepcopy(original)
    changed["model"]["norm.weight"][0] += 1e-6
    torch.save(changed, tmp_path / "out" / "ckpt.pt")
    with pytest.raises(SystemExit) as e:
        tune("out", "--ppo_iters=2")
    assert "other weights" in one_line(e) and "ckpt.pt" in one_line(e)
    assert (tmp_path / "out" / "ppo_ckpt.pt").read_bytes() == before
    torch.save(original, tmp_path / "out" / "ckpt.pt")
    tune("out", "--ppo_iters=2")


@pytest.mark.parametrize(
    "before, after",
    [
        ("", "--critic=separate"),
        ("", "--critic=shared"),
        ("", "--train_only=norm"),
        ("", "--exact_end"),
        ("--exact_end", "--exact_end=False"),
        ("--exact_end --others=0.5", "--exact_end --others=0"),
    ],
)
def test_what_cannot_change_during_a_run(before, after, tune):
    tune("out", "--ppo_iters=1", "--critic=reference", *before.split())
    with pytest.raises(SystemExit) as e:
        tune("out", "--ppo_iters=2", *after.split())
    assert "cannot change during a run" in one_line(e)


# ---- prompts -----------------------------------------------------------------------------------------


def sources(data_dir, checkpoint, **flags):
    cfg = TrainConfig(data_dir=data_dir, vocab_source="custom", eval_iters=2, batch_size=40, seed=3)
    args = ModelArgs(**checkpoint["model_args"])
    tokenizer = Tokenizer(f"{data_dir}/tok{VOCAB}.model")
    ppo_cfg = PPOConfig(**{"target_len": 20} | flags)
    return *train.prompts_for(cfg, ppo_cfg, args, checkpoint, tokenizer), tokenizer


def test_prompts_are_the_beginnings_of_stories(data_dir, base):
    checkpoint = load_checkpoint(base / "ckpt.pt")
    train_prompts, held_out, _ = sources(data_dir, checkpoint, start_len=6)
    folder = Path(data_dir, f"tok{VOCAB}")
    names = [shard["name"] for shard in json.loads((folder / "meta.json").read_text())["shards"]]
    beginnings = []
    for split in (names[:1], names[1:]):
        ids = [x for name in split for x in np.fromfile(folder / name, "<u2").tolist()]
        at = [i for i, x in enumerate(ids) if x == END]
        beginnings.append(
            {tuple(ids[i : i + n]) for i in at for n in range(1, 7) if END not in ids[i + 1 : i + n]}
        )
    some = [train_prompts(i, 100) for i in range(3)]
    assert len(held_out) == 80 and all(tuple(p) in beginnings[0] for p in held_out)
    assert all(tuple(p) in beginnings[1] for prompts in some for p in prompts)
    assert {len(p) for p in some[0]} == {len(p) for p in held_out} == set(range(1, 7))
    assert train_prompts(1, 100) == some[1] and some[0] != some[1]  # by the iteration's number alone


def test_prompts_from_a_file(data_dir, base, tmp_path, tune):
    checkpoint, path = load_checkpoint(base / "ckpt.pt"), tmp_path / "prompts.txt"
    lines = [f"Once there was a {x}" for x in "abcdefghijklmnopqrstuvwxy"]
    path.write_text("\n".join(lines[:7] + ["", "  "] + lines[7:]) + "\n", encoding="utf-8")
    sample, held_out, tokenizer = sources(data_dir, checkpoint, prompts=str(path))
    assert [tokenizer.decode(p) for p in held_out] == [lines[0], lines[10], lines[20]]
    drawn = {tokenizer.decode(p) for p in sample(0, 500)}
    assert drawn == set(lines) - {lines[0], lines[10], lines[20]}
    assert sample(0, 5) == sample(0, 5) != sample(1, 5) and all(p[0] == END for p in sample(0, 5))
    out = tune("out", "--ppo_iters=1", f"--prompts={path}")
    assert "'Once there was a a'" in out and "'Once there was a k'" in out
    path.write_text("\ufeffHello\nBye\n", encoding="utf-8")  # too few to hold any out
    sample, held_out, _ = sources(data_dir, checkpoint, prompts=str(path))
    assert held_out == [tokenizer.encode(x) for x in ("Hello", "Bye")]
    assert len({tuple(p) for p in sample(0, 50)}) == 2
    for text, message in [
        ("\n \n", "no prompt"),
        ("word " * 100, "context of 64"),
        (b"\xff\xfe\xfa", "UTF-8"),
    ]:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(SystemExit) as e:
            sources(data_dir, checkpoint, prompts=str(path))
        assert message in one_line(e) and "prompts.txt" in one_line(e)


def test_another_seed_other_random_numbers(data_dir, base, tmp_path):
    def draws(seed):
        run = make_run(cfg={"seed": seed})
        return [
            float(torch.rand((), generator=run.generator(*key)))
            for key in ((1, 0), (1, 1), (2, 0), (3, 0), (4, 0))
        ]

    assert draws(1) == draws(1) and len({*draws(1), *draws(2)}) == 10
    checkpoint, path = load_checkpoint(base / "ckpt.pt"), tmp_path / "p.txt"
    path.write_text("\n".join(f"Once there was a {x}" for x in "abcdefghi"))
    args, tokenizer = ModelArgs(**checkpoint["model_args"]), Tokenizer(f"{data_dir}/tok{VOCAB}.model")
    for how in ({}, {"prompts": str(path)}):
        first = [
            train.prompts_for(
                TrainConfig(data_dir=data_dir, vocab_source="custom", seed=seed),
                PPOConfig(target_len=20, start_len=6, **how),
                args,
                checkpoint,
                tokenizer,
            )[0](0, 50)
            for seed in (3, 4)
        ]
        assert first[0] != first[1]


def test_a_reward_is_told_which_stories_and_paths_ended():
    calls = []

    def f(prompts, stories, tokens, ended):
        calls.append((tokens, ended))
        return [0.0] * len(tokens)

    f.if_ended = ppo.length_reward(8).if_ended
    run = make_run(exact_end=True)
    run.scorer.parts = [("f", 1.0, f)]
    batch = collect(run, 40)
    assert calls[0] == (batch_stories(batch), batch["story_ended"].tolist())
    past = (batch["story_ended"] & ~batch["ended"]).tolist()  # told on past their ends, and cut off there
    assert any(past) and not all(past)
    assert calls[1] == (
        [path for path, x in zip(batch_ids(batch), past, strict=True) if x],
        [False] * sum(past),
    )


def test_normalised_and_clipped_are_stories_paths_and_ends_alike():
    run = make_run(
        exact_end=True, reward_norm=True, reward_clip=0.5, init_kl_coef=0.0, missing_eos_penalty=0.25
    )
    nudge(run.policy, 0.2)
    batch = collect(run, 40)
    rewards = run.rewards(batch)
    scores = batch["scores"].sum(1).double().numpy()  # of the stories, not of the paths
    assert not same(batch["scores"], batch["cut_scores"])
    assert run.moments.mean == pytest.approx(scores.mean()) and run.moments.count == 40
    shaped = lambda x: np.clip((x - scores.mean()) / scores.std(), -0.5, 0.5)  # noqa: E731
    paths = shaped(batch["cut_scores"].sum(1).double().numpy()) - 0.25 * ~batch["ended"].numpy()
    np.testing.assert_allclose(rewards.sum(1).numpy(), paths, atol=1e-5)
    told = run.scorer.if_ended(batch["tokens"], batch["mask"]).double().numpy()
    ending = run.endings(batch)[1].numpy()
    np.testing.assert_allclose(ending, np.where(batch["mask"], shaped(told), 0.0), atol=1e-5)


def test_the_critics_rate_falls_to_nothing_in_every_fit():
    run = make_run(critic_lr=0.5)
    run.advantages(collect(run))
    for _ in range(2):
        rates = []
        run.step = lambda optimizer, *more, rates=rates: rates.append(optimizer.param_groups[0]["lr"])
        run.fit_critic(2)  # 16 episodes, 4 a step
        assert rates == pytest.approx([0.5 * (1 - i / 8) for i in range(8)])


def test_the_shared_critics_head_has_its_own_rate():
    run = make_run(critic="shared", critic_lr=0.5)
    run.iteration()
    assert [g["lr"] for g in run.optimizer.param_groups] == [1e-3, 1e-3, 0.5]


@pytest.mark.parametrize(
    "critic, replay, kept",
    [("reference", 32, 2), ("reference", 33, 3), ("reference", 0, 1), ("shared", 100, 1)],
)
def test_how_many_episodes_the_critic_learns_from(critic, replay, kept):
    run = make_run(critic=critic, critic_replay=replay)
    for seed in range(4):
        run.advantages(batch := collect(run, seed=seed))
    assert [len(b["end"]) for b in run.replay] == [16] * kept
    assert same(run.replay[-1]["tokens"], batch["tokens"])  # the latest


def test_ppo_ends_after_so_many_steps_in_a_row_that_cannot_be_made():
    def go(bad):
        run, calls = make_run(cfg={"max_skipped": 3, "max_iters": 3, "eval_interval": 100}), []
        loss = run.loss

        def poisoned(*args):
            calls.append(0)
            total, stats = loss(*args)
            return (total * math.nan, stats) if bad(len(calls)) else (total, stats)

        run.loss, run.save = poisoned, lambda *args, **how: None
        ppo.train_ppo(run, None, SimpleNamespace(asked=False), None)
        return run

    with pytest.raises(SystemExit, match="4 steps in a row .* --learning_rate=0.0005"):
        go(lambda call: True)  # two steps an iteration
    run = go(lambda call: call % 2)
    assert run.skipped == 4 and run.in_a_row == 0


def test_the_mean_is_over_what_is_reached():
    """Half as many stories that come to each choice: the same gradient."""
    run = make_run(cfg={"batch_size": 16, "grad_clip": 0.0}, advantage="rloo", group_size=2)
    batch = collect(run)
    (whole,), (half,) = gradients(run, batch), gradients(run, batch | {"reach": batch["reach"] / 2})
    assert max(g.abs().max() for g in whole.values()) > 0.01
    for name in whole:
        torch.testing.assert_close(half[name], whole[name], atol=1e-6, rtol=0)


def test_beta_rests_while_only_the_critic_learns():
    run = make_run(adaptive_kl=True, kl_target=5.0, kl_horizon=100, critic_warmup=1)
    run.first = run.iter_num = 7  # of a pretrained model
    assert run.iteration()["ppo/steps"] == 0 and run.beta == 0.1
    assert run.iteration()["ppo/steps"] > 0 and run.beta < 0.1


def test_j_is_at_the_beta_of_now():
    run = make_run()
    nudge(run.policy, 0.1)
    run.beta, batch = 0.7, collect(run)
    told = run.rollout_metrics(batch)
    assert told["ppo/J"] == pytest.approx(told["ppo/reward"] - 0.7 * told["ppo/kl"], abs=1e-6)


def test_the_optimum_is_that_of_what_the_reference_told():
    run = make_run(eval_samples=3)
    run.evaluate()
    before = run.evaluation["before"]["scores"].double().numpy()
    assert before.shape == (4, 3)
    run.iter_num, run.beta = 1, 0.3
    nudge(run.policy, 0.2)
    told = run.evaluate()
    assert not same(run.evaluation["after"]["scores"], run.evaluation["before"]["scores"])
    expected = 0.3 * np.log(np.exp(before / 0.3).mean())
    assert told["ppo/eval/J_optimum"] == pytest.approx(expected, abs=1e-6)
    tokens = [r[:3] for r in (run.stories[0][0].tolist())]
    assert len(tokens) == 3


def test_scores_lie_by_prompt():
    prompts = lambda i, n: [[END, *[3] * k] for k in range(n)]  # noqa: E731
    run = make_run(
        eval_samples=3, max_gen_len=1, reward=lambda tokens: [float(len(t)) for t in tokens], prompts=prompts
    )
    run.evaluate()
    assert run.evaluation["before"]["scores"].tolist() == [[k + 2.0] * 3 for k in range(4)]


def test_what_a_state_keeps():
    run, other = make_run(), make_run()
    run.iteration()
    run.skipped, run.seconds = 3, 17.5
    other.resume(run.state(), "ppo_ckpt.pt")
    for name in ("skipped", "seconds", "episodes", "best", "evaluated", "iter_num"):
        assert getattr(other, name) == getattr(run, name), name


@pytest.mark.parametrize(
    "before, after", [("length", "0.5*length"), ("keyword --keywords=a", "keyword --keywords=b")]
)
def test_rewards_cannot_change_either(before, after, tune):
    tune("out", "--ppo_iters=1", *f"--reward={before}".split())
    with pytest.raises(SystemExit, match="which cannot change during a run"):
        tune("out", "--ppo_iters=2", *f"--reward={after}".split())


@pytest.mark.parametrize("always", [False, True])
def test_evaluations_are_counted_from_the_first_iteration(always, tune, tmp_path, monkeypatch):
    monkeypatch.setattr(PPO, "is_best", lambda self, *args: self.iter_num == PRETRAINED + 5)
    flags = [
        "--ppo_iters=6",
        "--eval_interval=5",
        "--critic_epochs=0",
        "--ppo_epochs=1",
        f"--always_save_checkpoint={always}",
    ]
    tune("out", *flags)
    assert [m["iter"] - PRETRAINED for m in metrics(tmp_path / "out") if "ppo/eval/J" in m] == [0, 5, 6]
    assert load_checkpoint(tmp_path / "out" / "ppo_best.pt")["iter_num"] == PRETRAINED + (6 if always else 5)


def test_moments_come_without_their_settings():
    def adamw(**how):
        p = torch.nn.Parameter(torch.ones(2))
        return p, torch.optim.AdamW([p], **how)

    (p, old), (_, new) = (
        adamw(lr=1.0, betas=(0.5, 0.6), weight_decay=0.3),
        adamw(lr=2.0, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.0),
    )
    p.sum().backward()
    old.step()
    train.Runtime("cpu", torch.float32, False).load_moments(new, old.state_dict())
    (group,) = new.param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (2.0, (0.9, 0.99), 1e-3, 0.0)
    assert [int(s["step"]) for s in new.state.values()] == [1]


def test_betas_are_in_their_order():
    """The first step does not tell: bias correction takes them out."""
    (run,) = (make_run(cfg={"beta1": 0.7, "beta2": 0.97}),)
    assert all(g["betas"] == (0.7, 0.97) for g in run.optimizer.param_groups)
    optimizer = train.make_optimizer(tiny(), TrainConfig(beta1=0.7, beta2=0.97), "cpu")
    assert all(g["betas"] == (0.7, 0.97) for g in optimizer.param_groups)


def test_a_certain_end_has_a_finite_logarithm():
    logp = torch.tensor([0.0, math.log(0.25), -50.0], requires_grad=True)
    out = ppo.log_not(logp)
    assert out.tolist() == pytest.approx([math.log(1e-6), math.log(0.75), 0.0], rel=0.05)
    out.sum().backward()
    assert logp.grad.isfinite().all()


def test_minibatches_are_others_in_every_iteration():
    run, seen = make_run(), []
    run.step = lambda optimizer, params, loss, index, *more: seen.append(index.tolist()) or torch.zeros(5)
    run.grad_norm = torch.tensor(0.0)
    batch = collect(run)
    advantages, scale = run.advantages(batch)
    for run.iter_num in (0, 1):
        run.update_policy(batch, advantages, scale)
    assert len(seen) == 4 and sorted(seen[0] + seen[1]) == list(range(16)) and seen[:2] != seen[2:]


def test_where_a_story_ends_is_drawn_apart_from_its_tokens(monkeypatch):
    run, seen = make_run(exact_end=True), []
    monkeypatch.setattr(
        run, "collect", lambda prompts, u, until: seen.extend([u, until]) or (_ for _ in ()).throw(KeyError)
    )
    with pytest.raises(KeyError):
        run.iteration()
    u, until = seen
    assert u.shape == (16, 16) and until.shape == (16,) and not torch.isin(until, u).any()


def test_target_kl_is_the_limit_itself():
    """Just above what the second step would move, it is made; just below, it is not."""

    def second(limit):
        run = make_run(cfg={"batch_size": 16, "learning_rate": 1e-2}, ppo_epochs=2, target_kl=limit)
        kls, step = [], run.step
        run.step = lambda *args: kls.append(float((s := step(*args)).flatten()[0])) or s
        return run.iteration()["ppo/steps"], kls[-1]

    _, kl = second(100.0)
    assert second(kl * 1.01)[0] == 2 and second(kl * 0.99)[0] == 1


def test_values_are_those_of_the_mask():
    run = make_run()
    nudge(run.critic, 0.2)
    batch = collect(run)
    assert not run.values(batch)[~batch["mask"]].any()


def test_responses_to_a_prompt_lie_together():
    run, seen = make_run(advantage="rloo", group_size=4), []
    run.collect = lambda prompts, *more: seen.extend(prompts) or (_ for _ in ()).throw(KeyError)
    with pytest.raises(KeyError):
        run.iteration()
    assert seen == [prompt for prompt in some_prompts(0, 4) for _ in range(4)]


# ---- what could be lost, or be wrong without a word ---------------------------------------------------


def test_an_evaluation_that_is_due_does_not_replace_the_reference(tune, tmp_path):
    """Pretraining was stopped before one; it may make another ckpt.pt, which PPO compares with."""
    flags = ["--init_from=resume", "--device=cpu", f"--max_iters={PRETRAINED}"]
    tune("out", "--ppo_iters=1")
    last = tmp_path / "out" / "last.pt"
    train.save_checkpoint(str(last), load_checkpoint(last) | {"evaluated": False, "best_val_loss": 1e9})
    reference = (tmp_path / "out" / "ckpt.pt").read_bytes()
    with pytest.raises(SystemExit, match="has to stay as it is"):
        tune("out", all_flags=flags)
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == reference


FAILING = """
import os, beside
def f(prompts, stories, tokens, ended):
    with open(__file__ + ".calls", "a") as file:
        file.write(".")
    if FAIL and os.path.getsize(__file__ + ".calls") == 4:  # in the third iteration
        raise ValueError("no such word")
    return [-len(row) / 100 for row in tokens]
"""


def test_a_reward_that_fails_late_loses_nothing(tune, tmp_path):
    (tmp_path / "beside.py").write_text("")  # which the reward imports
    for name in ("whole", "cut"):
        (tmp_path / f"{name}.py").write_text(f"FAIL = {name == 'cut'}\n" + FAILING)
    flags = ["--ppo_iters=4", "--eval_interval=100", "--reward_norm"]
    tune("whole", *flags, f"--reward={tmp_path}/whole.py:f")
    with pytest.raises(SystemExit, match="no such word"):
        tune("cut", *flags, f"--reward={tmp_path}/cut.py:f")
    assert state(tmp_path / "cut")["iter_num"] == PRETRAINED + 2
    tune("cut", all_flags=["--ppo", "--init_from=resume", "--device=cpu"])
    assert same(state(tmp_path / "cut"), state(tmp_path / "whole"))


@pytest.mark.parametrize("flags", [["--keywords=dog"], ["--adaptive_kl", "--init_kl_coef=0"],
                                   ["--adaptive_kl", "--kl_target=0"]])
def test_settings_that_nothing_reads_are_refused(tune, flags):
    with pytest.raises(SystemExit, match=flags[0][2:].partition("=")[0]):
        tune("out", *flags)


def test_iterations_in_which_only_the_critic_learns_say_so(tune):
    lines = [line for line in tune("out", "--ppo_iters=2", "--critic_warmup=1").splitlines() if "| J" in line]
    assert ["only the critic learnt" in line for line in lines] == [True, False]


def test_other_held_out_stories_are_judged_anew(tune, tmp_path):
    """The optimum, and the best so far, of a run are of the stories that it was evaluated on."""
    more = ["--max_gen_len=20", "--start_len=2"]
    tune("out", "--ppo_iters=2")
    tune("out", "--ppo_iters=4", *more)
    tune("new", "--ppo_iters=2", *more)
    out, new = ([m for m in metrics(tmp_path / name) if "ppo/eval/J" in m] for name in ("out", "new"))
    # both know the same "before", that of the reference
    before, again = (state(tmp_path / name)["evaluation"]["before"] for name in ("out", "new"))
    assert same(before, again)
    assert out[-1]["ppo/eval/J_optimum"] == new[-1]["ppo/eval/J_optimum"] != out[0]["ppo/eval/J_optimum"]
    best = state(tmp_path / "out")["best"]
    later = [(m["ppo/eval/reward"], m["ppo/eval/kl"]) for m in out if m["iter"] > PRETRAINED][1:]
    assert best in later


def test_the_best_of_a_run_before_goes_with_it(tune, tmp_path):
    tune("out", "--ppo_iters=2")
    (tmp_path / "out" / "ppo_ckpt.pt").unlink()
    before = (tmp_path / "out" / "ppo_best.pt").read_bytes()
    (tmp_path / "cut.py").write_text("STOP = True\n" + STOPPING)
    tune("out", "--ppo_iters=4", "--eval_interval=4", f"--reward={tmp_path}/cut.py:f")
    assert "cut.py" in load_checkpoint(tmp_path / "out" / "ppo_best.pt")["config"]["reward"]
    assert (tmp_path / "out" / "ppo_best.pt").read_bytes() != before


def test_the_best_stays_when_other_stories_judge_it(tune, tmp_path):
    """As with half the --batch_size, where memory ran out: no policy that nobody judged takes its place."""
    reward = tmp_path / "cut.py"
    reward.write_text("STOP = False\n" + STOPPING)
    tune("out", "--ppo_iters=2", f"--reward={reward}:f")
    before = (tmp_path / "out" / "ppo_best.pt").read_bytes()
    reward.write_text("import os, signal\ncalls = []\ndef f(prompts, stories, tokens, ended):\n"
                      "    calls.append(1)\n    if len(calls) == 6: os.kill(os.getpid(), signal.SIGINT)\n"
                      "    return [-len(row) / 100 for row in tokens]\n")
    said = tune("out", "--ppo_iters=9", "--eval_interval=9", "--eval_samples=3", f"--reward={reward}:f")
    assert "stopped after iteration" in said, said
    assert (tmp_path / "out" / "ppo_best.pt").read_bytes() == before
    assert state(tmp_path / "out")["best"][0] > -math.inf


def test_resume_with_another_tokenizer_is_refused(tune, tmp_path):
    """Also where the pretrained model does not say which its own is."""
    tune("out", "--ppo_iters=1")
    path = tmp_path / "out" / "ppo_ckpt.pt"
    checkpoint = load_checkpoint(path)
    checkpoint["config"]["tokenizer_sha256"] = "0" * 64
    train.save_checkpoint(str(path), checkpoint)
    with pytest.raises(SystemExit, match="another tokenizer than .*put that one back"):
        tune("out", "--ppo_iters=2")
