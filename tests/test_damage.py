"""Whatever is typed and whatever is in a file: it is read, or refused in one line (SystemExit). No other
exception, no output, and nothing that a file says is run.

Not here: the parsers of tinystories.py (test_tinystories.py), run.c (fuzz.c).
"""

import dataclasses
import io
import os
import pickle
import random
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import export
import train
from model import ModelArgs, Transformer, load_checkpoint, model_from_checkpoint, save_checkpoint

FLAGS = [f.name for c in (train.ModelArgs, train.TrainConfig, train.PPOConfig) for f in dataclasses.fields(c)]


def refused(e: SystemExit) -> bool:
    """Whether it is a mistake told in one line."""
    return isinstance(e.code, str) and e.code.isprintable()


# ---- the command line ------------------------------------------------------------------------------------

ODD = ["nan", "-inf", "1e999", "0x10", "1_0", "٣", "", "True", "no", "auto", "--", "-h="]
NUMBERS = st.one_of(st.integers(), st.floats()).map(str)
VALUES = st.one_of(st.text(max_size=20), NUMBERS, st.sampled_from(ODD))
WORDS = st.one_of(
    st.builds(lambda name, value: [f"--{name}={value}"], st.sampled_from(FLAGS), VALUES),
    st.builds(lambda name, value: [f"--{name}", value], st.sampled_from(FLAGS), VALUES),
    st.text(max_size=20).map(lambda text: [text]),
    st.text(max_size=20).map(lambda text: [f"--{text}"]),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(WORDS, max_size=3))
@example([["--dim=" + "9" * 5000]])
@example([["--dim=--"]])
@example([["--dim=\n\x1b[31m"]])
@example([["--\udcff=\udcff"]])
def test_any_command_line_is_parsed_or_refused(words):
    argv = sum(words, [])
    if any(word.split("=")[0] in ("-h", "--help") or word.startswith("-h") for word in argv):
        return  # which prints, and exits with 0
    try:
        parsed = train.parse_cli(argv)
    except SystemExit as e:
        assert refused(e), e.code
        return
    assert len(parsed) == 3 and all(name in FLAGS for part in parsed for name in part)
    for config, values in zip((train.ModelArgs, train.TrainConfig, train.PPOConfig), parsed, strict=True):
        try:
            made = config(**values)
        except ValueError as e:
            assert str(e)
        else:
            assert all(getattr(made, name) == value for name, value in values.items())


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=12) | st.from_regex(r"(cpu|cuda|mps|xpu|meta)(:[0-9]{0,3})?", fullmatch=True))
@example("cpu:")
@example("cuda:²")
@example("cpu:00")
def test_any_device_is_there_or_refused(name):
    try:
        device = train.pick_device(name)
    except SystemExit as e:
        assert refused(e), e.code
    else:
        torch.empty(1, device=device)


# ---- files -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """ckpt.pt as train.py writes it, old.pt as torch did before zip archives, and a model.bin per version."""
    folder = tmp_path_factory.mktemp("damage")
    torch.manual_seed(0)
    net = Transformer(ModelArgs(dim=8, n_layers=1, n_heads=2, vocab_size=16, hidden_dim=8, max_seq_len=4))
    checkpoint = {
        "model": net.state_dict(),
        "model_args": dataclasses.asdict(net.args),
        "iter_num": 3,
        "config": {"vocab_source": "custom", "batch_size": 2},
    }
    save_checkpoint(folder / "ckpt.pt", checkpoint)
    torch.save(checkpoint, folder / "old.pt", _use_new_zipfile_serialization=False)
    for version in export.HEADER_BYTES:
        export.write_bin(str(folder / f"v{version}.bin"), net.args, net.state_dict(), version, 8)
    return folder


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes replaced, a part cut out, doubled or zeroed, or the end cut off."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, n = rng.randrange(len(data)), rng.choice((1, 4, 8, 100))
        match rng.randrange(6):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + n] = rng.randbytes(len(data[at : at + n]))
            case 2:
                del data[at : at + n]
            case 3:
                data[at:at] = data[at : at + n]
            case 4:
                data[at : at + n] = bytes(len(data[at : at + n]))
            case 5:
                del data[at:]
        if not data:
            break
    return bytes(data)


def read(path: str) -> Transformer | None:
    """The model in a damaged file; None if it is refused."""
    try:
        return model_from_checkpoint(export.read_any(path), path)
    except SystemExit as e:
        assert refused(e), e.code
        return None


@pytest.mark.parametrize("name", ["ckpt.pt", "old.pt", *(f"v{v}.bin" for v in export.HEADER_BYTES)])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_refused(folder, tmp_path, name):
    data, path = (folder / name).read_bytes(), tmp_path / name
    whole = read(str(folder / name))
    assert whole is not None
    rng, refusals = random.Random(name), 0

    @settings(max_examples=250, deadline=None, derandomize=True)
    @given(st.integers(0, 2**32))
    def check(seed):
        nonlocal refusals
        path.write_bytes(damaged(data, random.Random(seed)))
        model = read(str(path))
        refusals += model is None
        assert model is None or {n: p.shape for n, p in model.named_parameters()}.keys() == names

    names = dict(whole.named_parameters()).keys()
    check()
    assert refusals > 50
    for _ in range(40):  # cut off anywhere
        path.write_bytes(data[: rng.randrange(len(data))])
        assert read(str(path)) is None


def pickled(unpickler: bytes, folder: Path, name: str) -> Path:
    """A checkpoint, zipped as torch.save does, with this pickle in place of its own and right checksums."""
    path, records = folder / "evil.pt", zipfile.ZipFile(folder / name)
    with zipfile.ZipFile(path, "w") as z:
        for record in records.namelist():
            z.writestr(record, unpickler if record.endswith("data.pkl") else records.read(record))
    return path


class Evil:
    def __init__(self, how: tuple):
        self.how = how

    def __reduce__(self):
        return self.how


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("caller", ["system", "eval", "open", "load"])
def test_a_pickle_that_runs_code_is_refused(folder, tmp_path, caller, zipped, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inner = pickle.dumps(Evil((os.system, ("touch ran",))))
    how = {
        "system": (os.system, ("touch ran",)),
        "eval": (eval, ("open('ran', 'w')",)),
        "open": (open, ("ran", "w")),
        "load": (torch.load, (io.BytesIO(inner),)),
    }[caller]
    content = pickle.dumps({"model": {}, "model_args": {}, "x": Evil(how)}, protocol=2)
    if zipped:
        path = pickled(content, folder, "ckpt.pt")
    else:
        path = tmp_path / "evil.pt"
        path.write_bytes(content)
    for reader in (load_checkpoint, export.read_any):
        with pytest.raises(SystemExit) as e:
            reader(str(path))
        assert refused(e.value) and not os.path.exists("ran")
    pickle.loads(inner)  # it would have run
    assert os.path.exists("ran")


def test_model_args_beyond_the_weights_take_no_memory(folder, monkeypatch):
    checkpoint = load_checkpoint(folder / "ckpt.pt")

    def build(args):
        raise AssertionError(f"{args} was built")

    monkeypatch.setattr("model.Transformer", build)
    for change in (
        {"n_layers": 10**9},
        {"dim": 2 * 10**9},
        {"vocab_size": 10**15},
        {"hidden_dim": 10**12},
        {"max_seq_len": 10**12},
        {"dim": "8"},
        {"n_layers": "2"},  # of such a string times a shape memory would be full
        {"vocab_size": "x"},
        {"dim": None},
        {"norm_eps": float("nan")},
        {"unknown": 1},
    ):
        odd = checkpoint | {"model_args": checkpoint["model_args"] | change}
        with pytest.raises(SystemExit) as e:
            model_from_checkpoint(odd, "odd.pt")
        assert refused(e.value) and "odd.pt" in e.value.code, (change, e.value.code)


@pytest.mark.parametrize(
    "content", [[], "text", {}, {"model": {}}, {"model": {1: 2}, "model_args": {}},
                {"model": {"a": 1}, "model_args": {}}, {"model": {}, "model_args": {}, "config": []}]
)
def test_checkpoints_of_something_else(tmp_path, content):
    path = str(tmp_path / "other.pt")
    torch.save(content, path)
    assert read(path) is None


def test_a_zip_of_other_records(tmp_path):
    path = tmp_path / "other.pt"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("notes.txt", "not a checkpoint")
    assert read(str(path)) is None
    path.write_bytes(zlib.compress(b"nor this"))
    assert read(str(path)) is None


def test_an_index_gives_the_terminal_no_orders(tmp_path):
    index = b"c\x1b[31mposix\nmkdir\n."  # a pickle that asks for a module of this name
    os.mkdir(folder := tmp_path / "evil.dcp")
    (folder / ".metadata").write_bytes(index)
    rest = {"model": {}, "model_args": {}, "optimizer": {}, "crc32": {".metadata": zlib.crc32(index)}}
    torch.save(rest, folder / "rest.pt")
    with pytest.raises(SystemExit, match=r"asks for \\x1b\[31mposix\.mkdir"):
        load_checkpoint(folder)
