"""tokenizer.py against sentencepiece itself, a writer by hand, and the real Llama 2 and stories260K files."""

import hashlib
import io
import os
import platform
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tokenizer as tk  # noqa: E402

REAL = [("llama2/tokenizer.model", "llama2/tokenizer.bin"),
        ("stories260K/tok512.model", "stories260K/tok512.bin")]
WORDS = ["Once upon a time, there was a little girl named Lily.",
         "She said, \"Hello!\"\n\nThen she ran 12 miles.",
         "  two  spaces\tand a tab ", "café über naïve 😀 日本語", "one\n two \n\n\nthree",
         "the the the they them then", "runs    of     spaces  "]
LINES = "\n".join(WORDS * 3).split("\n")


def train(path, sentences=LINES, vocab_size=320, **options):
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=proto, vocab_size=vocab_size, minloglevel=2,
        **{"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
           "allow_whitespace_only_pieces": True, "character_coverage": 1.0,
           "remove_extra_whitespaces": False, **options})
    path.write_bytes(proto.getvalue())
    return str(path)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return train(tmp_path_factory.mktemp("tok") / "tok320.model")


def real(name):
    path = ROOT.parent / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"no real tokenizer at {path}")
    return str(path)


def test_attributes(model):
    t = tk.Tokenizer(model)
    assert (t.vocab_size, t.bos_id, t.eos_id, t.pad_id, t.model_path) == (320, 1, 2, -1, model)
    assert t.sha256 == hashlib.sha256(Path(model).read_bytes()).hexdigest()


def test_encode_is_sentencepiece(model):
    t, sp = tk.Tokenizer(model), sentencepiece.SentencePieceProcessor(model_file=model)
    for text in [*WORDS, "", " ", "a\0b"]:
        ids = sp.encode(text)
        assert t.encode(text, bos=False) == ids
        assert t.encode(text) == [1] + ids
        assert t.encode(text, bos=True, eos=True) == [1] + ids + [2]
    for threads in (1, 2):
        batch = t.encode_batch(WORDS, True, True, num_threads=threads)
        assert batch == [t.encode(text, eos=True) for text in WORDS]
    arrays = t.encode_batch([*WORDS, ""], num_threads=1, return_type="numpy")
    assert all(ids.dtype == np.int32 for ids in arrays)
    assert [ids.tolist() for ids in arrays] == [t.encode(text) for text in [*WORDS, ""]]
    assert t.encode_batch([], num_threads=1) == []


def test_decode(model):
    t = tk.Tokenizer(model)
    for text in WORDS:
        assert t.decode(t.encode(text, bos=True, eos=True)) == text
    assert t.decode([]) == "" and t.decode([1, 2]) == ""
    assert t.decode(t.encode("😀", bos=False)[:-1]).strip("\ufffd") == ""  # bytes that are no UTF-8
    for bad in (-1, 320):
        with pytest.raises(ValueError, match="vocabulary of 320"):
            t.decode([5, bad])


def test_surrogates(model):
    t = tk.Tokenizer(model)
    assert t.encode("a\ud83d b") == t.encode("a\ufffd b")
    assert t.encode("\ud83d\ude00") == t.encode("😀")
    assert t.encode_batch(["a\udc00", "b"], num_threads=1) == [t.encode("a\ufffd"), t.encode("b")]


@pytest.mark.parametrize("model_name, bin_name", REAL)
def test_export_real(model_name, bin_name, tmp_path):
    path = tk.Tokenizer(real(model_name)).export(str(tmp_path / "x.bin"))
    assert Path(path).read_bytes() == Path(real(bin_name)).read_bytes()


def test_export_by_hand(model, tmp_path):
    sp = sentencepiece.SentencePieceProcessor(model_file=model)
    pieces = []
    for i in range(sp.vocab_size()):
        text = {1: "\n<s>\n", 2: "\n</s>\n"}.get(i, sp.id_to_piece(i).replace("▁", " ")).encode()
        pieces.append(struct.pack("<f", sp.get_score(i)) + len(text).to_bytes(4, "little") + text)
    longest = max(len(p) - 8 for p in pieces)
    path = tk.Tokenizer(model).export(str(tmp_path / "a.bin"))
    assert Path(path).read_bytes() == longest.to_bytes(4, "little") + b"".join(pieces)


def run(*args, cwd=None):
    return subprocess.run([sys.executable, str(ROOT / "tokenizer.py"), *args], cwd=cwd,
                          capture_output=True, text=True)


def test_command_line(model, tmp_path):
    copy = tmp_path / "tok320.model"
    copy.write_bytes(Path(model).read_bytes())
    for flags in (["--tokenizer-model=" + str(copy)], ["--tokenizer_model", str(copy)], ["-t", str(copy)]):
        done = run(*flags)
        assert done.returncode == 0 and done.stderr == ""
        assert done.stdout.count("\n") == 1 and f"./run out/model.bin -z {tmp_path}/tok320.bin" in done.stdout
        assert (tmp_path / "tok320.bin").stat().st_size > 320 * 8
        (tmp_path / "tok320.bin").unlink()
    assert run("-t", str(copy), "--output=" + str(tmp_path / "y.bin")).returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["tok320.model", "y.bin"]


def test_user_mistakes(model, tmp_path):
    (tmp_path / "empty.model").touch()
    (tmp_path / "text.model").write_text("hello world")
    (tmp_path / "cut.model").write_bytes(Path(model).read_bytes()[:1000])
    train(tmp_path / "bare.model", bos_id=-1, eos_id=-1)
    cases = [(["-t", "data/tok77.model"], "tinystories.py train_vocab --vocab_size=77\n"),
             (["-t", "my/tok77.model"], "train_vocab --vocab_size=77 --data_dir=my\n"),
             ([], "tinystories.py download\n"), (["-t", "."], "directory"),
             (["-t", "empty.model"], "sentencepiece"),
             (["-t", "text.model"], "sentencepiece"), (["-t", "cut.model"], "sentencepiece"),
             (["-t", "bare.model"], "<s>"), (["--tokenizer-modle=x"], "did you mean --tokenizer_model"),
             (["extra"], "extra"), (["-t", model, "-o", "no/such/x.bin"], "no/such/x.bin")]
    for args, message in cases:
        done = run(*args, cwd=tmp_path)
        assert done.returncode == 1 and done.stdout == "", args
        assert message in done.stderr and done.stderr.count("\n") == 1, (args, done.stderr)


def test_atomic_write(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), tk.atomic_write(str(path)) as f:
        f.write(b"half")
        1 / 0  # noqa: B018
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f"]
    with tk.atomic_write(str(path), "w") as f:
        f.write("é\n")
        assert path.read_text() == "old"
    assert path.read_bytes() == "é\n".encode() and os.listdir(tmp_path) == ["f"]


def test_atomic_write_clears_up_after_a_killed_run(tmp_path):
    path = tmp_path / "f"
    code = ("import os, signal, sys; sys.path.insert(0, sys.argv[1]); from tokenizer import atomic_write\n"
            "with atomic_write(sys.argv[2]) as f:\n"
            "    f.write(b'x' * 100000); os.kill(os.getpid(), signal.SIGKILL)")
    killed = subprocess.run([sys.executable, "-c", code, str(ROOT), str(path)])
    assert killed.returncode == -signal.SIGKILL
    assert not path.exists() and len(os.listdir(tmp_path)) == 1
    with tk.atomic_write(str(path)) as f:
        f.write(b"whole")
    assert os.listdir(tmp_path) == ["f"] and path.read_bytes() == b"whole"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_full_disk_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.open", lambda path, *a, _open=open, **k: _open("/dev/full", *a, **k))
    with pytest.raises(OSError, match="No space") as e, tk.atomic_write(str(tmp_path / "f")) as f:
        f.write(b"x" * 100)
    assert e.value.filename == str(tmp_path / "f")


def test_an_old_encoding_of_stdout_is_no_error(monkeypatch):
    """As on Windows, where output goes to a file: what the encoding lacks becomes a question mark."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", out)
    tk.CommandLine(prog="x").parse_args([])
    print("caf\xe9 \u2192 \ufffd", flush=True)
    assert out.buffer.getvalue() == b"caf\xe9 ? ?" + os.linesep.encode()


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    seen, real = [], {name: getattr(os, name) for name in ("fsync", "replace")}

    def fsync(fd):
        seen.append(("fsync", os.fstat(fd).st_size))
        real["fsync"](fd)

    def replace(a, b):
        seen.append(("replace", b))
        real["replace"](a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with tk.atomic_write(str(tmp_path / "f"), "w") as f:
        f.write("x" * 100)  # less than a buffer
    assert seen == [("fsync", 100), ("replace", str(tmp_path / "f"))]


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    path = tmp_path / "f"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        theirs = Path(f"{path}.{platform.node()}-{other.pid}.tmp")
        other_host = Path(f"{path}.{platform.node()}-2-{other.pid}.tmp")  # its name begins like this one's
        for temporary in (theirs, other_host):
            temporary.write_text("half")
        with tk.atomic_write(str(path)) as f:
            f.write(b"whole")
        assert theirs.read_text() == other_host.read_text() == "half"
        other.communicate(b"\n")
    with tk.atomic_write(str(path)) as f:
        f.write(b"again")
    assert sorted(os.listdir(tmp_path)) == ["f", other_host.name]


def test_did_you_mean():
    """A slip of the finger, the beginning of a name, or the initials that others' flags have."""
    words = ["--learning_rate", "--min_lr", "--grad_clip", "--gradient_accumulation_steps", "--max_iters"]
    for word, meant in [("--lr", "--learning_rate"), ("--grad", "--grad_clip"), ("--max_iter", "--max_iters"),
                        ("--max_itres", "--max_iters"), ("--learning", "--learning_rate")]:
        assert tk.did_you_mean(word, words) == f"; did you mean {meant}?"
    assert tk.did_you_mean("--qqq", words) == ""
