"""bench.py: its table for a tiny model beside made-up peers, and mistakes. No time decides a test."""

import os
import shutil
from pathlib import Path

import pytest

import bench

ROOT = Path(__file__).parent.parent
TINY = {"tiny": (32, 2, 4, 2, 300, 48, 64)}  # a context shorter than the usual prompt

LLAMA2C = """#!/bin/sh
echo "$OMP_NUM_THREADS $*" >> "$0.log"
echo "achieved tok/s: 250.4" >&2
"""
LLAMA_BENCH = """#!/bin/sh
echo "$*" >> "$0.log"
echo '[{"n_prompt": 64, "n_gen": 0, "avg_ts": 8000.4},'
echo ' {"n_prompt": 0, "n_gen": 255, "samples_ts": [400, 600]}]'
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    return bench.make_models(tmp_path_factory.mktemp("models"), TINY)


def script(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


def call_bench(monkeypatch, capsys, folder: Path, **variables) -> tuple[list[dict[str, str]], str, str]:
    """Rows of the table by column (the second ratio under "prompt ratio"), stdout and stderr."""
    for name in ("MODELS", "Z", "THREADS", "RUNS", "RUN", "PEER", "PEERQ", "LLAMA_BENCH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(bench, "FOLDER", folder)
    bench.main()
    out, err = capsys.readouterr()
    table = [line for line in out.splitlines() if line.startswith("|")]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert lines[0] == bench.COLUMNS and all(len(line) == len(bench.COLUMNS) for line in lines)
    columns = [*bench.COLUMNS]
    columns[columns.index("÷ best peer", 5)] = "prompt ratio"
    return [dict(zip(columns, line, strict=True)) for line in lines[2:]], out, err


def figure(text: str) -> float:
    return float(text.split()[0].replace(",", ""))


def test_table(run_program, models, tmp_path, monkeypatch, capsys):
    for path in models:
        shutil.copy(path, tmp_path)
    mine = [tmp_path / path.name for path in models]  # fp32, int8, 4-bit
    (tmp_path / "tiny-F32.gguf").touch()
    peer, peerq = script(tmp_path / "run_peer", LLAMA2C), script(tmp_path / "runq_peer", LLAMA2C)
    lb = script(tmp_path / "llama-bench", LLAMA_BENCH)
    other = script(tmp_path / "broken-bench", "#!/bin/sh\nexit 3\n")
    rows, out, err = call_bench(
        monkeypatch, capsys, tmp_path / "bench", RUN=run_program, MODELS=" ".join(map(str, mine)),
        THREADS="1 2", RUNS=1, PEER=peer, PEERQ=peerq, LLAMA_BENCH=f"{lb} {other}")
    assert "1 run" in out.splitlines()[0] and "kernels" in out.splitlines()[0]
    seen = [(row["model"], row["threads"], row["program"]) for row in rows]
    fp32 = ["run", "llama2.c", "llama-bench", "broken-bench"]
    assert seen == [
        *(("tiny, fp32", j, name) for j in "12" for name in fp32),
        *(("tiny, int8", j, name) for j in "12" for name in ["run", "llama2.c"]),
        *(("tiny, 4-bit", j, "run") for j in "12"),
    ]
    for row in rows:
        if row["program"] == "run":
            for column in ("decode, tok/s", "prompt of 512, tok/s", "16 stories, tok/s", "whole run, ms",
                           "first token, ms", "memory, MB"):
                assert figure(row[column]) > 0, row
            assert row["of the bandwidth"].endswith("GB/s") and "% of" in row["of the bandwidth"]
            assert figure(row["memory, MB"]) < 50  # not this interpreter's
    ours, llama2c, llama_bench, broken = rows[:4]
    assert llama2c["decode, tok/s"] == "250" and llama2c["prompt of 512, tok/s"] == "–"
    assert (llama_bench["decode, tok/s"], llama_bench["prompt of 512, tok/s"]) == ("500", "8,000")
    assert broken["decode, tok/s"] == "–" and f"{other} failed with code 3: it said nothing" in err
    ratios = [("decode, tok/s", "÷ best peer", 500), ("prompt of 512, tok/s", "prompt ratio", 8000.4)]
    for column, ratio, best in ratios:
        assert figure(ours[ratio]) == pytest.approx(figure(ours[column]) / best, abs=0.01, rel=0.01)
    assert rows[-1]["÷ best peer"] == rows[-1]["prompt ratio"] == "–"
    assert "tiny-Q8_0.gguf" in err and "llama-quantize" in err and "tiny-F32.gguf," not in err
    assert "room for 64 positions" in err and "ended its story" not in err

    calls = (tmp_path / "run_peer.log").read_text(encoding="utf-8").splitlines()
    assert calls == [f"{j} {mine[0]} -t 0 -n 256 -z {tmp_path}/bench/tok300.bin -i " for j in "12"]
    assert str(mine[1]) in (tmp_path / "runq_peer.log").read_text(encoding="utf-8")
    calls = (tmp_path / "llama-bench.log").read_text(encoding="utf-8").splitlines()
    assert calls == [f"-m {tmp_path}/tiny-F32.gguf -t {j} -n 255 -p 64 -r 1 -o json" for j in "12"]


def test_models_are_kept(models):
    before = {path: path.stat().st_mtime_ns for path in models}
    assert [bench.read_model(path).layout for path in models] == ["fp32", "int8", "4-bit"]
    assert bench.make_models(models[0].parent, TINY) == models
    assert {path: path.stat().st_mtime_ns for path in models} == before


def test_weights_of_a_token(tmp_path):
    """Tied: all but the header and v0's tables. Untied: less the table of embeddings."""
    import torch

    from export import write_bin
    from model import ModelArgs, Transformer

    for tied in (True, False):
        args = ModelArgs(32, 2, 4, 2, 300, 48, max_seq_len=64, tie_embeddings=tied)
        torch.manual_seed(0)
        state = Transformer(args).state_dict()
        values = sum(w.numel() for name, w in state.items() if name != "tok_embeddings.weight")
        for version, bits in [(0, 32), (1, 32), (2, 8 + 32 / 16), (3, 4.5)]:
            write_bin(str(tmp_path / "m.bin"), args, state, version)
            model = bench.read_model(tmp_path / "m.bin")
            assert (model.vocab_size, model.seq_len) == (300, 64)
            assert model.weights == pytest.approx(values * bits / 8, rel=0 if version < 2 else 0.15)


def test_spread_and_ratio():
    assert bench.spread([3.0, 1.0, 2000.0]) == "3 (1–2,000)"
    assert bench.spread([0.01234]) == "0.0123" and bench.spread([]) == "–"
    figures = {"run": {"decode": [30.0, 10.0, 20.0]}, "a": {"decode": [5.0]}, "b": {"decode": [8.0]}, "c": {}}
    assert bench.ratio(figures, "run", "decode") == "2.50 ×" and bench.ratio(figures, "a", "decode") == ""
    figures["run --draft 0"] = {"decode": [4.0]}
    assert bench.ratio(figures, "run --draft 0", "decode") == "0.50 ×"


def test_draft(run_program, tmp_path, monkeypatch, capsys):
    """A model that guesses ahead has a row with its guesses, and one without, which has the bandwidth."""
    model = bench.make_models(tmp_path, {"tiny": (32, 2, 4, 2, 300, 48, 64)})[0]
    guessing = script(tmp_path / "guessing", f'#!/bin/sh\nexec {run_program} --draft 4 "$@"\n')
    rows, _, _ = call_bench(monkeypatch, capsys, tmp_path, RUN=guessing, MODELS=model, THREADS=1, RUNS=1)
    guesses, plain = rows
    assert (guesses["program"], plain["program"]) == ("run", "run --draft 0")
    assert guesses["guessed right"].endswith("%") and guesses["of the bandwidth"] == "–"
    assert plain["guessed right"] == "–" and plain["of the bandwidth"].endswith("GB/s")


@pytest.mark.parametrize(("variables", "words"), [
    ({"MODELS": "nowhere.bin"}, ["MODELS", "nowhere.bin"]),
    ({"MODELS": __file__}, ["MODELS", "no model", "export.py"]),
    ({"MODELS": os.devnull}, ["MODELS"]),
    ({"Z": "nowhere.bin"}, ["Z=nowhere.bin", "no such file"]),
    ({"PEER": "/nowhere/run"}, ["PEER=/nowhere/run", "no such program", "llama2.c"]),
    ({"PEERQ": __file__}, ["PEERQ", "no such program"]),
    ({"LLAMA_BENCH": "/nowhere/llama-bench"}, ["LLAMA_BENCH=/nowhere/llama-bench", "llama.cpp"]),
    ({"RUN": "/nowhere/run"}, ["RUN=/nowhere/run", "make run"]),
    ({"THREADS": "two"}, ["THREADS", "whole numbers"]),
    ({"RUNS": "0"}, ["RUNS", "whole numbers"]),
    ({"RUNS": "1 2"}, ["RUNS", "one number"]),
])
def test_mistakes(run_program, monkeypatch, capsys, tmp_path, variables, words):
    with pytest.raises(SystemExit) as e:
        call_bench(monkeypatch, capsys, tmp_path, **({"RUN": run_program} | variables))
    message = str(e.value)
    assert message.startswith("bench: ") and "\n" not in message
    for word in words:
        assert word in message


def test_our_own_failure_is_one_line(models, monkeypatch, capsys, tmp_path):
    fake = script(tmp_path / "run", "#!/bin/sh\necho first >&2\necho 'run: it broke' >&2\nexit 1\n")
    with pytest.raises(SystemExit, match=f"^bench: {fake} failed with code 1: run: it broke$"):
        call_bench(monkeypatch, capsys, tmp_path, RUN=fake, MODELS=models[0])
