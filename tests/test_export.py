"""export.py against files written by hand from the format's description, and against real ones."""

import struct
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, VOCAB, shared_data

import export
from export import fit_group_size, quantize, read_bin, write_bin
from model import ModelArgs, Transformer, save_checkpoint
from tokenizer import Tokenizer

SHAPES = [
    {},
    {"tie_embeddings": False},
    {"n_kv_heads": 4, "hidden_dim": 96},
    {"rope_theta": 5e5, "norm_eps": 1e-6, "tie_embeddings": False},
]


def make(**changes) -> Transformer:
    torch.manual_seed(0)
    args = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 40, "hidden_dim": 64}
    net = Transformer(ModelArgs(**args | {"max_seq_len": 16} | changes))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))
    return net


def by_hand(net: Transformer, version: int, group_size: int = 0) -> bytes:
    """The file as the README's table of formats describes it, written with struct and numpy alone."""
    a, w = net.args, {k: v.detach().numpy() for k, v in net.state_dict().items()}
    sizes = [a.dim, a.hidden_dim, a.n_layers, a.n_heads, a.n_kv_heads, a.vocab_size, a.max_seq_len]
    every = lambda name: [w[f"layers.{i}.{name}.weight"] for i in range(a.n_layers)]  # noqa: E731
    attention = every("attention.wq") + every("attention.wk") + every("attention.wv") + every("attention.wo")
    ffn = every("feed_forward.w1") + every("feed_forward.w2") + every("feed_forward.w3")
    last = [] if a.tie_embeddings else [w["output.weight"]]
    floats = lambda tensors: b"".join(t.astype("<f4").tobytes() for t in tensors)  # noqa: E731
    if version == 0:
        head = struct.pack(
            "<7i", *sizes[:5], a.vocab_size if a.tie_embeddings else -a.vocab_size, a.max_seq_len
        )
        half = a.dim // a.n_heads // 2
        angles = np.arange(a.max_seq_len)[:, None] / 10000.0 ** (np.arange(half)[None] / half)
        tables = [np.cos(angles), np.sin(angles)]
        tensors = [w["tok_embeddings.weight"], *every("attention_norm"), *attention, *every("ffn_norm"), *ffn]
        return head + floats([*tensors, w["norm.weight"], *tables, *last])
    head = struct.pack("<Ii7iB", 0x616B3432, version, *sizes, a.tie_embeddings)
    if version == 2:
        head += struct.pack("<i", group_size)
    head = head.ljust(48, b"\0")
    if a.rope_theta != 10000:
        head += struct.pack("<2f", a.rope_theta, a.norm_eps)
    head = head.ljust(256, b"\0")
    norms = [*every("attention_norm"), *every("ffn_norm"), w["norm.weight"]]
    matrices = [w["tok_embeddings.weight"], *attention, *ffn, *last]
    if version == 1:
        return head + floats(norms + matrices)
    body = b""
    for m in matrices:
        groups = m.reshape(-1, group_size).astype(np.float32)
        scale = np.abs(groups).max(1) / np.float32(127)
        body += np.rint(groups / scale[:, None]).astype(np.int8).tobytes() + scale.astype("<f4").tobytes()
    return head + floats(norms) + body


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("version", [0, 1, 2])
def test_bytes_equal_the_description_and_read_back(version, shape, tmp_path):
    net, path = make(**shape), str(tmp_path / "model.bin")
    if version == 0 and "rope_theta" in shape:
        with pytest.raises(SystemExit, match="--version=1"):
            write_bin(path, net.args, net.state_dict(), 0)
        return
    error = write_bin(path, net.args, net.state_dict(), version, group_size=64)
    got = Path(path).read_bytes()
    expected = by_hand(net, version, group_size=32)
    if version == 0:  # numpy's cosines differ from torch's in the last bit: compare those as numbers
        assert got[:28] == expected[:28]
        np.testing.assert_allclose(*(np.frombuffer(b[28:], "<f4") for b in (got, expected)), atol=2e-7)
    else:
        assert got == expected
    args, state = read_bin(path)
    same = asdict(args) | {
        "multiple_of": 0,
        "rope_theta": round(args.rope_theta),
        "norm_eps": round(args.norm_eps, 9),
    }
    assert same == asdict(net.args) | {"multiple_of": 0}
    assert state.keys() == net.state_dict().keys()
    worst = max((state[k] - v).abs().max().item() for k, v in net.state_dict().items())
    assert worst == error if version == 2 else worst == error == 0
    if version == 2:  # half a step of the coarsest group
        assert 0 < error <= max(p.abs().max().item() for p in net.parameters()) / 127 / 2 * 1.001


def test_quantize_equals_numpy_and_survives_zeros():
    w = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    w[2] = 0
    w[3, 5] = -100.0
    q, scale = quantize(w, 32)
    groups = w.numpy().reshape(-1, 32)
    for g, q_row, s in zip(groups, q.numpy(), scale.numpy(), strict=True):
        assert s == np.abs(g).max() / np.float32(127)
        expected = np.rint(g / s) if s else np.zeros(32)
        assert (q_row == expected).all()
    assert q.abs().max() == 127


def test_group_size_backs_off_until_it_divides_both_kinds_of_row():
    assert fit_group_size(make().args, 64) == 32
    assert fit_group_size(make(hidden_dim=172).args, 64) == 4
    assert fit_group_size(make(hidden_dim=64).args, 16) == 16


def test_damaged_files_are_one_clear_line(tmp_path):
    net, path = make(), tmp_path / "model.bin"
    for version in (0, 1, 2):
        write_bin(str(path), net.args, net.state_dict(), version)
        good = path.read_bytes()
        at = 0 if version == 0 else 8
        bad = {
            "cut": good[:-1],
            "longer": good + b"\0",
            "header": good[:20],
            "empty": b"",
            "half": good[: len(good) // 2],
            "text": b"Once upon a time, there was a little girl." * 9,
            "gguf": b"GGUF" + bytes(300),
            "version": struct.pack("<Ii", 0x616B3432, 7) + good[8:],
        }
        for i in range(7):
            for value in (0, -5, 2**31 - 1, 3):
                if (i, value) == (6, 3) and version:  # a shorter context is as good as any
                    continue
                bad[f"{i}={value}"] = good[: at + 4 * i] + struct.pack("<i", value) + good[at + 4 * i + 4 :]
        if version == 2:
            for value in (0, -4, 7, 2**30):
                bad[f"group={value}"] = good[:37] + struct.pack("<i", value) + good[41:]
        for what, content in bad.items():
            path.write_bytes(content)
            with pytest.raises(SystemExit, match="model.bin is") as e:
                read_bin(str(path))
            assert "\n" not in str(e.value), what


def test_real_weights_byte_for_byte(tmp_path):
    source, path = shared_data("stories260K/ckpt.pt"), tmp_path / "model.bin"
    run("model.bin", "--checkpoint", source, cwd=tmp_path)
    assert path.read_bytes() == shared_data("stories260K/stories260K.bin").read_bytes()


def run(*args: object, cwd) -> str:
    command = [sys.executable, str(ROOT / "export.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=True).stdout


def test_cli_to_bin_and_back(tmp_path):
    net = make(hidden_dim=172)
    save_checkpoint(tmp_path / "ckpt.pt", {"model": net.state_dict(), "model_args": asdict(net.args)})
    assert "v0" in run("a.bin", "--checkpoint=ckpt.pt", cwd=tmp_path)
    run("back.pt", "--checkpoint=a.bin", cwd=tmp_path)
    assert "groups of 4 (64 does not" in run("q.bin", "--checkpoint=back.pt", "--version=2", cwd=tmp_path)
    run("again.bin", "--checkpoint=back.pt", "--version", 0, cwd=tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "again.bin").read_bytes()


@pytest.mark.parametrize(
    "args, message",
    [
        (["m.bin", "--checkpoint=none.pt"], "train.py"),
        (["m.bin", "--checkpoint=none.bin"], "none.bin"),
        (["m.bin", "--version=9"], "--version"),
        (["m.bin", "--group_size=0"], "group_size"),
        ([], "output"),
    ],
)
def test_mistakes(args, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["export.py", *args])
    with pytest.raises(SystemExit, match=message) as e:
        export.main()
    assert "\n" not in str(e.value)


# ---- from PyTorch to run.c ---------------------------------------------------------------------------------


@pytest.fixture
def run_c(run_program):
    """A function that runs run.c and gives its standard output."""

    def call(*args: object, fails: bool = False) -> str:
        done = subprocess.run([run_program, *map(str, args)], capture_output=True, text=True)
        assert done.returncode == int(fails), done.stderr
        return done.stderr if fails else done.stdout

    return call


@pytest.mark.parametrize("version, shape", [(0, {}), (0, {"tie_embeddings": False}), (1, SHAPES[3])])
def test_run_c_computes_the_logits_of_pytorch(version, shape, run_c, data_dir, tmp_path):
    from conftest import VOCAB

    from tokenizer import Tokenizer

    net, path = make(vocab_size=VOCAB, max_seq_len=64, **shape).eval(), tmp_path / "model.bin"
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.5)
    write_bin(str(path), net.args, net.state_dict(), version)
    tokenizer = Tokenizer(f"{data_dir}/tok{VOCAB}.model")
    pieces = tokenizer.export(str(tmp_path / "tok.bin"))
    prompt = "Once upon a time, there was a kind girl. \N{CAT FACE}"
    ids = tokenizer.encode(prompt, bos=True)
    assert run_c(path, "-z", pieces, "-i", prompt, "--tokens").split() == [str(i) for i in ids]
    got = np.array(
        [line.split() for line in run_c(path, "-z", pieces, "-i", prompt, "--logits").splitlines()]
    )
    with torch.no_grad():
        expected = net(torch.tensor([ids]))[0][0].numpy()
    assert expected.std() > 0.5
    np.testing.assert_allclose(got.astype(np.float64), expected, atol=1e-4)


def test_run_c_tells_the_story_that_pytorch_tells(run_c, tmp_path):
    """The real model, greedily, to its natural end; and its int8 file begins alike."""
    from model import generate, load_checkpoint, model_from_checkpoint
    from tokenizer import Tokenizer

    folder = shared_data("stories260K")
    net = model_from_checkpoint(load_checkpoint(folder / "ckpt.pt"))
    tokenizer = Tokenizer(str(folder / "tok512.model"))
    (ids,) = generate(net, [[tokenizer.bos_id]], 512, temperature=0)
    assert ids[-1] == tokenizer.bos_id
    flags = ["-z", folder / "tok512.bin", "-t", 0, "-n", 0]
    assert run_c(folder / "stories260K.bin", *flags) == tokenizer.decode(ids) + "\n"
    write_bin(str(tmp_path / "int8.bin"), net.args, net.state_dict(), 2)
    assert run_c(tmp_path / "int8.bin", *flags).startswith(
        "Once upon a time, there was a little girl named Lily."
    )


def test_missing_files_name_the_command_that_makes_them(run_c, tmp_path):
    net, path = make(), tmp_path / "model.bin"
    assert "python export.py" in run_c(path, fails=True)
    write_bin(str(path), net.args, net.state_dict())
    message = run_c(path, "-z", tmp_path / "tok.bin", fails=True)
    assert "tok.bin" in message and "python tokenizer.py" in message and message.count("\n") == 1


def v3_by_hand_interleaved(w):
    q, scale = export.quantize4(w)
    values, scales = bytearray(), bytearray()
    for band in range(0, len(q), 16):
        for group in range(q.shape[1] // 32):
            for i in range(4):
                for row in range(band, band + 16):
                    for j in range(4):
                        low, high = (int(q[row, 32 * group + 8 * i + k + j]) + 8 for k in (0, 4))
                        values.append(low | high << 4)
            for row in range(band, band + 16):
                scales += struct.pack("<e", float(scale[row, group]))
    return bytes(values + scales)


@pytest.mark.parametrize(
    "shape", [{}, {"dim": 48, "hidden_dim": 80, "vocab_size": 41, "tie_embeddings": False}]
)
def test_v3_is_as_described_and_reads_back(shape, tmp_path):
    net, path = make(**shape), str(tmp_path / "m.bin")
    error = write_bin(path, net.args, net.state_dict(), 3)
    data, a = Path(path).read_bytes(), net.args
    at, w = 256, net.state_dict()
    for name in export.tensor_names(3, a):
        if name.endswith("norm.weight"):
            assert data[at : at + 4 * a.dim] == w[name].numpy().tobytes()
            at += 4 * a.dim
            continue
        at = -(-at // 64) * 64
        expected = v3_by_hand_interleaved(w[name])
        assert data[at : at + len(expected)] == expected, name
        at += len(expected)
    assert at == len(data)
    _, back = read_bin(path)
    worst = max((back[k] - v).abs().max().item() for k, v in w.items())
    assert worst == error < 0.3 * max(v.abs().max().item() for v in w.values())
    assert all(torch.equal(back[k], w[k]) for k in w if k.endswith("norm.weight"))


def test_quantize4_takes_the_best_of_its_scales():
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    w[3, :32] = 0
    q, scale = export.quantize4(w)
    assert q.min() >= -8 and q.max() <= 7 and (scale[3, 0], q[3, :32].any()) == (0, False)
    for row in range(16):
        for g in range(2):
            x = w[row, 32 * g : 32 * g + 32].double().numpy()
            errors = []
            for factor in np.linspace(0.75, 1.25, 21):
                s = float(np.float16(np.float32(x[np.abs(x).argmax()] * factor / -8)))
                k = np.clip(np.rint(x / s), -8, 7) if s else 0 * x
                errors.append(((k * s - x) ** 2).sum())
            ours = ((q[row, 32 * g : 32 * g + 32].double().numpy() * float(scale[row, g]) - x) ** 2).sum()
            assert ours <= min(errors) * (1 + 1e-4) + 1e-12


def test_the_group_size_is_followed(tmp_path, monkeypatch, capsys):
    net = make(dim=64, hidden_dim=128)
    save_checkpoint(tmp_path / "ckpt.pt", {"model": net.state_dict(), "model_args": asdict(net.args)})
    monkeypatch.chdir(tmp_path)
    export.main(["q.bin", "--checkpoint=ckpt.pt", "--version=2", "--group_size=16"])
    assert (
        struct.unpack_from("<i", Path("q.bin").read_bytes(), 37) == (16,)
        and "groups of 16" in capsys.readouterr().out
    )
    export.main(["f.bin", "--checkpoint=ckpt.pt", "--version=3"])
    assert "largest error" in capsys.readouterr().out


def test_run_c_reads_what_export_writes_of_every_version(run_program, tmp_path, data_dir):
    net = make(vocab_size=VOCAB, max_seq_len=64).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.5)
    pieces = Tokenizer(f"{data_dir}/tok{VOCAB}.model").export(str(tmp_path / "tok.bin"))
    for version in (2, 3):
        path = tmp_path / f"v{version}.bin"
        write_bin(str(path), net.args, net.state_dict(), version)
        _, state = read_bin(str(path))
        rounded = make(vocab_size=VOCAB, max_seq_len=64).eval()
        rounded.load_state_dict(state)
        call = [run_program, path, "-z", pieces, "-i", "Once upon a time", "--logits"]
        out = subprocess.run(list(map(str, call)), capture_output=True, text=True, check=True).stdout
        got = np.array([line.split() for line in out.splitlines()], float)
        ids = Tokenizer(f"{data_dir}/tok{VOCAB}.model").encode("Once upon a time", bos=True)
        with torch.no_grad():
            expected = rounded(torch.tensor([ids]))[0][0].numpy()
        assert np.abs(got - expected).mean() < 0.05 * expected.std()  # activations are int8
