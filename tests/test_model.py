"""model.py against transformers' Llama, brute force in float64, and itself without a cache."""

import copy
import math
import os
import pickle
import shutil
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, VOCAB, needs_cuda, same, shared_data

import model as M
from export import read_any
from model import ModelArgs, Transformer, generate, sample

TINY = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 61,
    "multiple_of": 8,
    "max_seq_len": 48,
}


def make(seed: int = 0, scale: float = 6.0, **changes) -> Transformer:
    """A random model, its weights made large so that its choices are far from uniform."""
    torch.manual_seed(seed)
    net = Transformer(ModelArgs(**TINY | changes)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(scale) if p.dim() > 1 else p.add_(0.3 * torch.randn_like(p))
    return net


def tokens(*shape: int, seed: int = 1, vocab: int = 61) -> torch.Tensor:
    return torch.randint(3, vocab, shape, generator=torch.Generator().manual_seed(seed))


# ---- the network -----------------------------------------------------------------------------------------


def hugging_face(net: Transformer):
    """The same weights in transformers' LlamaForCausalLM, whose rotary pairs are (i, i + D/2), not (2i, 2i
    + 1).
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    a = net.args
    config = LlamaConfig(
        hidden_size=a.dim,
        intermediate_size=a.hidden_dim,
        num_hidden_layers=a.n_layers,
        vocab_size=a.vocab_size,
        num_attention_heads=a.n_heads,
        num_key_value_heads=a.n_kv_heads,
        rms_norm_eps=a.norm_eps,
        max_position_embeddings=a.max_seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": a.rope_theta},
        tie_word_embeddings=False,
    )
    theirs = LlamaForCausalLM(config).eval()

    def halves(w: torch.Tensor) -> torch.Tensor:
        return w.view(-1, a.head_dim // 2, 2, a.dim).transpose(1, 2).reshape(w.shape)

    names = {
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    state = {
        "model.embed_tokens.weight": net.tok_embeddings.weight,
        "model.norm.weight": net.norm.weight,
        "lm_head.weight": net.output.weight,
    }
    for i, layer in enumerate(net.layers):
        ours = dict(layer.named_parameters())
        for name, their_name in names.items():
            state[f"model.layers.{i}.{their_name}.weight"] = ours[name + ".weight"]
        for name, their_name in (("wq", "q_proj"), ("wk", "k_proj")):
            state[f"model.layers.{i}.self_attn.{their_name}.weight"] = halves(
                ours[f"attention.{name}.weight"]
            )
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False},
        {"n_kv_heads": 4},
        {"n_kv_heads": 1},
        {"rope_theta": 500.0, "norm_eps": 1e-2},
        {"dim": 80, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 100},
    ],
)
def test_logits_equal_transformers(changes):
    net = make(**changes)
    x = tokens(3, 40)
    with torch.no_grad():
        ours, _ = net(x)
        theirs = hugging_face(net)(x).logits
    assert ours.std() > 0.5  # else equality would say little
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_loss_is_mean_negative_log_likelihood_without_ignored_targets():
    net = make()
    x, y = tokens(2, 9), tokens(2, 9, seed=2)
    y[0, 3:] = -1
    logits, loss = net(x, y)
    log_probs = logits.detach().double().log_softmax(-1)
    expected = np.mean(
        [-log_probs[b, t, y[b, t]].item() for b in range(2) for t in range(9) if y[b, t] != -1]
    )
    assert abs(loss.item() - expected) < 1e-5


def brute_force_attention(q, k, v):
    """(B, T, H, D), key by key, in float64."""
    B, T, H, D = q.shape
    out = torch.zeros_like(q)
    for h in range(H):
        kv = h * k.shape[2] // H
        for t in range(T):
            scores = torch.einsum("bd,bsd->bs", q[:, t, h], k[:, : t + 1, kv]) / math.sqrt(D)
            out[:, t, h] = torch.einsum("bs,bsd->bd", scores.softmax(-1), v[:, : t + 1, kv])
    return out


@pytest.mark.parametrize("T", [1, 7, 8, 21])
def test_narrow_attention_and_its_gradients_equal_brute_force(T, monkeypatch):
    monkeypatch.setattr(M.NarrowCausalAttention, "BLOCK", 8)
    g = torch.Generator().manual_seed(T)
    q = torch.randn(2, T, 6, 4, generator=g, dtype=torch.float64)
    k, v = (torch.randn(2, T, 3, 4, generator=g, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(2, T, 6, 4, generator=g, dtype=torch.float64)
    expected, got = [], []
    for function, dtype, results in (
        (brute_force_attention, torch.float64, expected),
        (M.causal_attention, torch.float32, got),
    ):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        (out * weight.to(dtype)).sum().backward()
        results += [out] + [x.grad for x in leaves]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_stays_on_the_fast_path(dropout, monkeypatch):
    calls = []

    def spy(*args, **kwargs):
        calls.append((args[3:], kwargs))
        return stock(*args, **kwargs)

    stock = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    net = make(dropout=dropout, dim=64, n_heads=2, n_kv_heads=1).train()  # 32 wide: the stock kernel
    net(tokens(2, 9), tokens(2, 9))
    assert len(calls) == 2
    for args, kwargs in calls:
        assert (
            not args
            and kwargs["is_causal"]
            and not kwargs.get("dropout_p")
            and kwargs.get("attn_mask") is None
        )


def test_dropout_only_in_training():
    net = make(dropout=0.5)
    x = tokens(1, 8)
    assert torch.equal(net(x)[0], net(x)[0])
    net.train()
    assert not torch.equal(net(x)[0], net(x)[0])


def test_residual_projections_start_smaller():
    torch.manual_seed(0)
    net = Transformer(ModelArgs(dim=256, n_layers=8, n_heads=4, vocab_size=500))
    for name, p in net.named_parameters():
        if p.dim() == 2:
            std = 0.02 / 4 if name.endswith(("wo.weight", "w2.weight")) else 0.02
            assert abs(p.std().item() / std - 1) < 0.05, name
        else:
            assert torch.equal(p, torch.ones_like(p))


def test_bfloat16_autocast_is_close():
    net = make()
    x = tokens(2, 20)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = net(x)[0].float()
    exact = net(x)[0]
    assert (rough - exact).abs().mean() < 0.05 * exact.std()


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"n_heads": 3}, "n_heads"),
        ({"n_kv_heads": 3}, "n_kv_heads"),
        ({"dim": 0}, "dim"),
        ({"dropout": 1.0}, "dropout"),
        ({"dim": 12, "n_heads": 4}, "2\\*n_heads"),
        ({"vocab_size": -1}, "vocab_size"),
    ],
)
def test_impossible_shapes(bad, message):
    with pytest.raises(ValueError, match=message):
        ModelArgs(**TINY | bad)


# ---- generation ------------------------------------------------------------------------------------------


def greedy_without_cache(net, prompt, n):
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(net(torch.tensor([ids]))[0][0, -1].argmax()))
    return ids[len(prompt) :]


PROMPTS = [[1], [1, 7, 9, 30], [1, 5], list(range(3, 30)), [1, 5, 8, 8, 8, 8, 8, 20]]


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 4}, {"n_kv_heads": 1}, {"dim": 128, "n_heads": 4}])
def test_cached_generation_equals_uncached(changes):
    net = make(tie_embeddings=False, **changes)
    with torch.no_grad():
        expected = [greedy_without_cache(net, p, 20) for p in PROMPTS]
    assert len({token for row in expected for token in row}) > 12  # no mere repetition
    assert generate(net, PROMPTS, 20, temperature=0, stop_ids=()) == expected
    assert [generate(net, [p], 20, temperature=0, stop_ids=())[0] for p in PROMPTS] == expected


@needs_cuda
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 4}, {"n_kv_heads": 1}, {"dim": 128, "n_heads": 4}])
def test_on_cuda_all_is_as_on_the_cpu(changes):
    """Logits and gradients of full fp32 products, beside float64 on the CPU; and the cache's stories."""
    torch.set_float32_matmul_precision("highest")
    net = make(tie_embeddings=False, **changes)
    there, double = copy.deepcopy(net).cuda(), copy.deepcopy(net).double()
    x, y = tokens(3, 48), tokens(3, 48, seed=2)
    results = []
    for model, device in ((there, "cuda"), (double, "cpu")):
        logits, loss = model(x.to(device), y.to(device))
        loss.backward()
        results.append([logits, loss, *(p.grad for p in model.parameters())])
    for ours, exact in zip(*results, strict=True):
        scale = float(exact.abs().max())
        torch.testing.assert_close(ours.cpu().double(), exact.double(), atol=2e-5 * scale, rtol=1e-5)
    expected = generate(net, PROMPTS, 20, temperature=0, stop_ids=())
    assert generate(there, PROMPTS, 20, temperature=0, stop_ids=()) == expected
    assert [generate(there, [p], 20, temperature=0, stop_ids=())[0] for p in PROMPTS] == expected


def test_cached_features_equal_uncached():
    net = make()
    x = tokens(2, 30)
    cache = M.KVCache(net.args, [0, 0], 30, x.float())
    with torch.no_grad():
        parts = [net.features(part, cache) for part in x.split([11, 1, 1, 9, 8], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), net.features(x), atol=1e-5, rtol=1e-5)


def test_rows_end_by_themselves_and_do_not_disturb_others():
    net = make(scale=2.0)
    free = generate(net, PROMPTS * 8, 20, stop_ids=(), generator=torch.Generator().manual_seed(3))
    stop = 5
    assert 5 < sum(stop in row for row in free) < len(free)
    ended = generate(net, PROMPTS * 8, 20, stop_ids=(stop,), generator=torch.Generator().manual_seed(3))
    for row, full in zip(ended, free, strict=True):
        assert row == (full[: full.index(stop) + 1] if stop in full else full)


def test_generation_respects_the_context_and_reports_each_token():
    net = make()
    seen = {0: [], 1: []}
    rows = generate(
        net,
        [[3] * 40, [4] * 47],
        100,
        stop_ids=(),
        generator=torch.Generator().manual_seed(0),
        on_token=lambda row, token: seen[row].append(token),
    )
    assert [len(row) for row in rows] == [8, 1] and [seen[0], seen[1]] == rows
    assert generate(net, [[3] * 48], 5) == [[]]
    assert generate(net, [], 5) == []
    for bad in ([], [3] * 49):
        with pytest.raises(ValueError, match="prompt"):
            generate(net, [bad], 5)


def test_same_generator_same_text_and_training_mode_comes_back():
    net = make(dropout=0.3).train()
    a, b, c = (generate(net, PROMPTS, 12, generator=torch.Generator().manual_seed(s)) for s in (7, 7, 8))
    assert a == b != c and net.training


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.7}, {"top_k": 7, "top_p": 0.9, "temperature": 2.0}],
)
def test_sampling_follows_the_distribution(options):
    logits = torch.randn(1, 13, generator=torch.Generator().manual_seed(0)) * 2
    n = 20000
    u = (torch.arange(n) + 0.5) / n  # a grid in place of random numbers: frequencies are exact to 1/n
    got = np.bincount(sample(logits.expand(n, -1), u, **options).numpy(), minlength=13) / n
    p = np.exp(logits[0].double().numpy() / options.get("temperature", 1.0))
    order = np.argsort(-p)
    if "top_k" in options:
        p[order[options["top_k"] :]] = 0
    p /= p.sum()
    if "top_p" in options:
        total = 0.0
        for i in order:
            p[i], total = (p[i], total + p[i]) if total <= options["top_p"] else (0.0, total)
    np.testing.assert_allclose(got, p / p.sum(), atol=3 / n)


def test_sampling_edges():
    logits = torch.tensor([[0.0, 5.0, 5.0, -math.inf]])
    for temperature in (0, 1e-45, 1e-39, 1e-30):  # at the least, logits / temperature would be infinite
        assert sample(logits, torch.tensor([0.4]), temperature=temperature).item() == 1
    assert sample(logits, torch.tensor([0.99]), temperature=0).item() == 1
    assert sample(logits, torch.tensor([1 - 2**-24])).item() == 2
    assert sample(logits, torch.tensor([0.0])).item() == 0
    assert sample(logits, torch.tensor([1 - 2**-24]), top_k=1).item() == 1


# ---- checkpoints -----------------------------------------------------------------------------------------


def checkpoint_of(net: Transformer, **more) -> dict:
    from dataclasses import asdict

    return {"model": net.state_dict(), "model_args": asdict(net.args)} | more


def test_checkpoint_round_trip_and_foreign_prefixes(tmp_path):
    net, path = make(), tmp_path / "ckpt.pt"
    state = {"_orig_mod." + k: v for k, v in net.state_dict().items()}
    args = {
        k: TINY[k]
        for k in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len")
    }
    M.save_checkpoint(path, {"model": state, "model_args": args | {"dropout": 0.0}})  # as llama2.c writes it
    again = M.model_from_checkpoint(M.load_checkpoint(path), dropout=0.2)
    assert (
        again.args.dropout == 0.2
        and again.args.tie_embeddings
        and again.output.weight is again.tok_embeddings.weight
    )
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_untied_checkpoint_is_recognised():
    net = make(tie_embeddings=False)
    checkpoint = checkpoint_of(net)
    del checkpoint["model_args"]["tie_embeddings"]
    again = M.model_from_checkpoint(checkpoint)
    assert not again.args.tie_embeddings and torch.equal(again.output.weight, net.output.weight)


class Attack:
    def __reduce__(self):
        return print, ("this must never run",)


def test_bad_checkpoints_are_one_clear_line(tmp_path, capsys):
    path = tmp_path / "ckpt.pt"
    good = tmp_path / "good.pt"
    M.save_checkpoint(good, checkpoint_of(make()))
    whole = good.read_bytes()
    contents = {
        "attack": pickle.dumps(Attack()),
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"Once upon a time",
    }
    for name, content in contents.items():
        path.write_bytes(content)
        with pytest.raises(SystemExit, match="ckpt.pt") as e:
            M.load_checkpoint(path)
        assert "\n" not in str(e.value), name
    torch.save({"model": Attack(), "model_args": {}}, path)
    with pytest.raises(SystemExit, match="would run code"):
        M.load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(SystemExit, match="model_args"):
        M.load_checkpoint(path)
    with pytest.raises(SystemExit, match="train.py"):
        M.load_checkpoint(tmp_path / "nothing.pt")
    assert "never" not in capsys.readouterr().out


def test_incomplete_or_surplus_weights_are_refused():
    for change in ("missing", "surplus", "shape", "args"):
        checkpoint = checkpoint_of(make())
        if change == "missing":
            del checkpoint["model"]["layers.1.attention.wo.weight"]
        elif change == "surplus":
            checkpoint["model"]["layers.2.attention.wo.weight"] = torch.zeros(32, 32)
        elif change == "shape":
            checkpoint["model_args"]["dim"] = 64
        else:
            checkpoint["model_args"]["moe"] = 8
        with pytest.raises(SystemExit):
            M.model_from_checkpoint(checkpoint)


def test_devices():
    assert M.pick_device("cpu") == "cpu" and M.pick_device() in ("cpu", "cuda", "mps")
    for name in ("tpu", "cuda:99", "cuda:x"):
        with pytest.raises(SystemExit, match="--device"):
            M.pick_device(name)


# ---- command line ----------------------------------------------------------------------------------------

LILY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
)


def run_cli(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "model.py", *map(str, args)], capture_output=True, text=True
    )


def test_real_weights_tell_lilys_story():
    done = run_cli("--checkpoint", shared_data("stories260K/ckpt.pt"), "--temperature=0")
    assert done.stdout.startswith(LILY) and done.stdout.endswith(
        '"Thank you, Lily! You are a good friend."\n'
    ), done.stderr


def test_cli_samples_and_mistakes(tmp_path, data_dir, capsys):
    from conftest import VOCAB

    path = tmp_path / "ckpt.pt"
    config = {"vocab_source": "custom", "data_dir": data_dir}
    M.save_checkpoint(path, checkpoint_of(make(scale=1.0, vocab_size=VOCAB), config=config))
    flags = ["--checkpoint", path, "--max_new_tokens=9", "--seed=4", "--start=One day"]
    one, again, three = run_cli(*flags), run_cli(*flags), run_cli(*flags, "--num_samples=3")
    assert one.returncode == 0 and one.stdout == again.stdout and one.stdout.startswith("One day"), one.stderr
    assert three.stdout.count("One day") == 3 and three.stdout.count("-----") == 2 * 3
    for wrong, message in (
        (["--checkpoint", "no.pt"], "train.py"),
        (["--temprature=1"], "--temperature"),
        (["--temperature=nan"], "--temperature=nan"),
        (["--checkpoint", __file__], "export.py"),
        (["--checkpoint", path, "--start", "word " * 99], "fewer than 48"),
        (["--checkpoint", path, "--start=FILE:/no"], "FILE:/no"),
        (["--checkpoint", path, "--tokenizer=/no.model"], "/no.model"),
    ):
        with pytest.raises(SystemExit) as e:
            M.main([str(flag) for flag in wrong])
        assert message in str(e.value) and "\n" not in str(e.value) and capsys.readouterr().err == ""


def test_a_tokenizer_that_lacks_ids_is_refused(tmp_path, data_dir):
    from conftest import VOCAB

    path = tmp_path / "ckpt.pt"
    config = {"vocab_source": "custom", "data_dir": data_dir}
    M.save_checkpoint(path, checkpoint_of(make(vocab_size=VOCAB + 9), config=config))
    with pytest.raises(SystemExit, match=f"has {VOCAB} pieces and the model {VOCAB + 9}.*put that one back"):
        M.main(["--checkpoint", str(path), f"--tokenizer={data_dir}/tok{VOCAB}.model"])


def test_a_foreign_checkpoints_own_tokenizer_is_taken_before_ones_own(tmp_path, data_dir, monkeypatch):
    """Where README has it put, while data/ holds another of as many pieces."""
    from conftest import VOCAB

    name = f"tok{VOCAB}.model"
    for folder in ("data", "theirs/data"):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(os.path.join(data_dir, name), tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    foreign = {"model_args": {"vocab_size": VOCAB}}
    path = os.path.join("theirs", "data", name)
    assert M.find_tokenizer(foreign, "theirs/ckpt.pt").model_path == path
    os.remove(path)
    assert M.find_tokenizer(foreign, "theirs/ckpt.pt").model_path == os.path.join("data", name)


@pytest.mark.parametrize("sha256", [5, None, "", "0" * 64])
def test_whatever_a_checkpoint_says_of_its_tokenizer(tmp_path, data_dir, capsys, sha256):
    from conftest import VOCAB

    path = tmp_path / "ckpt.pt"
    config = {"vocab_source": "custom", "data_dir": data_dir, "tokenizer_sha256": sha256}
    M.save_checkpoint(path, checkpoint_of(make(vocab_size=VOCAB), config=config))
    M.main(["--checkpoint", str(path), "--max_new_tokens=2"])
    assert "is not the tokenizer this model was trained with; put that one back" in capsys.readouterr().err


def test_a_start_may_have_a_byte_order_mark(tmp_path):
    (tmp_path / "start.txt").write_text("\ufeffOnce", encoding="utf-8")
    assert M.read_start(f"FILE:{tmp_path}/start.txt") == "Once"


def test_rows_of_very_different_room_share_a_batch():
    """A full row stays in the batch until enough others are; nothing may run over the context's end."""
    net = make(tie_embeddings=False)
    prompts = [[1, 5] * 20] * 9 + [[7] * 47] + [[9] * 3]
    got = generate(net, prompts, 100, temperature=0, stop_ids=())
    assert [len(row) for row in got] == [8] * 9 + [1, 45]
    assert got[-1] == greedy_without_cache(net, prompts[-1], 45)


def test_too_many_tokens_and_broken_weights():
    net = make()
    with pytest.raises(ValueError, match="49 tokens"):
        net(tokens(1, 49))
    with torch.no_grad():
        net.norm.weight[0] = math.nan
    assert all(0 <= token < 61 for token in generate(net, [[1]], 5)[0])


def test_a_state_saved_twice_is_kept_once(tmp_path):
    """The second state that --keep=2 holds is the one before, not a copy."""
    for number in (1, 2, 3, 3):
        M.save_state(tmp_path, "last", {"iter_num": number, "model": {}, "model_args": {}}, keep=2)
    numbers = {path.name: M.load_checkpoint(path)["iter_num"] for path in tmp_path.iterdir()}
    assert numbers == {"last.pt": 3, "last-00000002.pt": 2}


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs a file that opens and cannot be read")
def test_an_unreadable_checkpoint_is_one_line():
    with pytest.raises(SystemExit, match="cannot read /proc/self/mem: Input/output error; put"):
        M.load_checkpoint("/proc/self/mem")


@pytest.mark.parametrize("dim", [64, 80, 128, 384, 640, 896, 1152, 1408])
def test_a_model_for_run_c_is_told_from_a_checkpoint(dim, tmp_path):
    """Also those whose first byte, of dim, is that of a pickle or of a zip archive, and under any name."""
    path = tmp_path / "model.pt"
    path.write_bytes(struct.pack("<7i", dim, 4, 1, 1, 1, 5, 8))
    with pytest.raises(SystemExit, match="if it is a model for run.c, convert it"):
        M.load_checkpoint(path)
    with pytest.raises(SystemExit, match="model.pt"):
        read_any(str(path))


def test_stories_give_the_terminal_no_orders(capsys):
    text = "On\x1b[2Jce\x00 upon\n\ta\x7f \x9bchâteau \U0001f600"
    assert M.showable(text) == "On[2Jce upon\n\ta château \U0001f600"
    pieces = iter([text[:4], text])
    stream = M.TextStream(type("T", (), {"decode": lambda self, ids: next(pieces)})(), [])
    stream(0, 5)
    stream(0, 6)
    assert capsys.readouterr().out == M.showable(text)


def test_a_start_of_broken_utf8_can_be_printed():
    assert M.read_start("caf\udce9 \U0001f431") == "caf\ufffd \U0001f431"


SMALL = {"dim": 32, "n_layers": 1, "n_heads": 4, "vocab_size": 50, "max_seq_len": 16}


def small(**more) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelArgs(**SMALL | more))


def test_flops_by_hand_and_parameters_as_built():
    for tied, kv in ((True, 4), (False, 2)):
        args = ModelArgs(
            dim=32, n_layers=3, n_heads=4, n_kv_heads=kv, vocab_size=50, max_seq_len=16, tie_embeddings=tied
        )
        net = Transformer(args)
        count = sum(p.numel() for p in {id(p): p for p in net.parameters()}.values())
        assert args.num_parameters() == net.num_parameters() == count
        assert net.flops_per_token() == 6 * count + 12 * 3 * 32 * 16


def test_prefixes_of_ddp_and_compile():
    net = small()
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        checkpoint = {"model": {prefix + k: v for k, v in net.state_dict().items()}, "model_args": SMALL}
        assert same(dict(M.model_from_checkpoint(checkpoint).state_dict()), dict(net.state_dict()))


def test_where_dropout_is():
    """On the embeddings and on both residual branches."""
    net, rates = small(dropout=0.5).train(), []
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda m, x, y: rates.append(m.p))
    net(torch.ones(1, 4, dtype=torch.long))
    assert rates == [0.5] * 3


def test_half_a_character_waits(capsys):
    texts = iter(["caf", "caf\ufffd", "café", "café ☃"])
    stream = M.TextStream(SimpleNamespace(decode=lambda ids: next(texts)), [])
    outs = []
    for i in range(4):
        stream(0, i)
        outs.append(capsys.readouterr().out)
    assert outs == ["caf", "", "é", " ☃"]


def test_flags_reach_generate(tmp_path, data_dir, monkeypatch, capsys):
    path = tmp_path / "ckpt.pt"
    net = small(vocab_size=VOCAB)
    M.save_checkpoint(
        path,
        {
            "model": net.state_dict(),
            "model_args": {**SMALL, "vocab_size": VOCAB},
            "config": {"vocab_source": "custom", "data_dir": data_dir},
        },
    )
    seen, real = [], M.generate
    monkeypatch.setattr(
        M,
        "generate",
        lambda *args, **how: seen.append((args[2:], how["generator"].initial_seed())) or real(*args, **how),
    )
    M.main(
        [
            "--checkpoint",
            str(path),
            "--max_new_tokens=3",
            "--temperature=0.5",
            "--top_k=7",
            "--top_p=0.8",
            "--seed=9",
        ]
    )
    assert seen == [((3, 0.5, 7, 0.8), 9)]


def test_an_impossible_id_is_never_drawn():
    logits = torch.tensor([[-math.inf, 5.0, -math.inf, 1.0]])
    for u in (0.0, 1 - 2**-24):
        assert M.sample(logits, torch.tensor([u])).item() in (1, 3)


def test_states_without_moments_come_last(tmp_path):
    some = {"model": {}, "model_args": {}}
    M.save_checkpoint(tmp_path / "a.pt", some | {"iter_num": 3, "optimizer": {"state": {0: {"step": 1}}}})
    M.save_checkpoint(tmp_path / "b.pt", some | {"iter_num": 9})
    paths = [str(tmp_path / x) for x in ("b.pt", "a.pt")]
    assert M.newest_state(paths)[0] == paths[1] and M.newest_state(paths[:1])[0] == paths[0]


def test_a_tokenizer_beside_the_checkpoint(tmp_path, data_dir):
    shutil.copy(f"{data_dir}/tok{VOCAB}.model", tmp_path)
    checkpoint = {
        "model_args": {"vocab_size": VOCAB},
        "config": {"vocab_source": "custom", "data_dir": str(tmp_path / "gone")},
    }
    checkpoint["config"]["tokenizer_sha256"] = M.find_tokenizer(
        checkpoint, str(tmp_path / "ckpt.pt"), f"{data_dir}/tok{VOCAB}.model"
    ).sha256
    assert M.find_tokenizer(checkpoint, str(tmp_path / "ckpt.pt")).model_path == str(
        tmp_path / f"tok{VOCAB}.model"
    )
    checkpoint["config"]["data_dir"] = data_dir  # the usual one first
    usual, path = f"{data_dir}/tok{VOCAB}.model", str(tmp_path / "ckpt.pt")
    assert M.find_tokenizer(checkpoint, path).model_path == usual
    del checkpoint["config"]["tokenizer_sha256"]  # as others' do not say which it was: what came along first
    assert M.find_tokenizer(checkpoint, path).model_path == str(tmp_path / f"tok{VOCAB}.model")
    assert M.find_tokenizer(checkpoint, path, strict=True).model_path == usual  # of which the data is made
