"""Wrong commands, as beginners type them: each ends with code 1, says in one line what is wrong and what to
type, and changes no file. All of it before anything slow.

Most run in this process, which is quick; MISTAKES_AS_PROCESSES=1 runs every one as a process of its own, and
--durations=5 then shows the slowest. Not here: damaged files (test_damage.py), mistakes of the system such as
a full disk.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, VOCAB

import tokenizer

AS_PROCESSES = bool(os.environ.get("MISTAKES_AS_PROCESSES"))
HELP = "see: python {} --help"
CC = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


class Mistake(NamedTuple):
    name: str
    command: str  # in a folder with data/ and out/ of a small run; {port} is one that is taken
    says: str  # regular expressions
    type: str  # of what to type next
    needs: str = ""  # of SET_UPS
    process: bool = False  # cannot be in this process, or shows that a process does the same


# ---- what has gone wrong before --------------------------------------------------------------------------


def write(path: str, content: str | bytes):
    def set_up(folder: Path) -> None:
        file = folder / path
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)

    return set_up


def remove(*paths: str):
    def set_up(folder: Path) -> None:
        for path in map(folder.joinpath, paths):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return set_up


def copy(source: str, path: str):
    return lambda folder: shutil.copy(folder / source, folder / path)


def halve(path: str):
    return lambda folder: os.truncate(folder / path, (folder / path).stat().st_size // 2)


def forget(path: Path, setting: str) -> None:
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["config"][setting]
    torch.save(checkpoint, path)


HELD = []  # what must stay open

SET_UPS = {
    "nothing yet": remove("data", "out"),
    "no stories": remove("data/TinyStories_all_data"),
    "no shard 00": remove("data/TinyStories_all_data/data00.json"),
    "no tokenizer": remove(f"data/tok{VOCAB}.model"),
    "no tokens": remove(f"data/tok{VOCAB}"),
    "a lost shard": remove(f"data/tok{VOCAB}/data01.bin"),
    "broken meta.json": write(f"data/tok{VOCAB}/meta.json", "{"),
    "another tokenizer": copy("data/tok400.model", f"data/tok{VOCAB}.model"),
    "a tokenizer of 400 as tok512": copy("data/tok400.model", "data/tok512.model"),
    "a model as tok512": copy("out/model.bin", "data/tok512.model"),
    "no ckpt.pt": remove("out/ckpt.pt"),
    "no run": remove("out"),
    "an empty ckpt.pt": lambda folder: (remove("out/last.pt")(folder), write("out/ckpt.pt", "")(folder)),
    "a ckpt.pt that tells no tokenizer": lambda folder: (
        remove(f"data/tok{VOCAB}.model")(folder),
        forget(folder / "out/ckpt.pt", "tokenizer_sha256"),
    ),
    "half a last.pt": lambda folder: (remove("out/ckpt.pt")(folder), halve("out/last.pt")(folder)),
    "model.bin as last.pt": lambda folder: (
        remove("out/ckpt.pt")(folder),
        copy("out/model.bin", "out/last.pt")(folder),
    ),
    "a text as ppo_ckpt.pt": write("out/ppo_ckpt.pt", "a text"),
    "another run's ppo_ckpt.pt": copy("out/ckpt.pt", "out/ppo_ckpt.pt"),
    "half a model.bin": halve("out/model.bin"),
    "an empty file": write("empty", ""),
    "an empty .bin": write("empty.bin", ""),
    "one story": write("one.txt", "Once upon a time."),
    "no list": write("no.json", '{"story": "a"}'),
    "other fields": write("other.json", '[{"title": "a"}, {"title": "b"}]'),
    "latin1": write("latin1.txt", "caf\xe9<|endoftext|>b".encode("latin1")),
    "pdf": write("book.pdf", b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n"),
    "lines": write("lines.json", b'{"story": "a"}\n{"story": "b"}\n'),
    "list": write("list.jsonl", b'[{"story": "a"}, {"story": "b"}]\n'),
    "utf-16": write("wide.txt", "\ufeffa<|endoftext|>b".encode("utf-16-le")),
    "a long prompt": write("long", "word " * 500),
    "a reward of syntax error": write("r.py", "x = ("),
    "a reward of no function": write("r.py", "def g(a, b, c, d): return a"),
    "a reward that exits": write("r.py", "import sys; sys.exit()"),
    "a reward of two lists": write("r.py", "def f(prompts, stories): return [0] * len(stories)"),
    "a reward that is text": write("r.txt", "def f(a, b, c, d): return a"),
    "a run at work": lambda folder: HELD.append(tokenizer.lock(str(folder / "out"))),
    "no program": remove("run"),
    "broken metrics": write("out/metrics.jsonl", "nonsense\n"),
}

# ---- the table -------------------------------------------------------------------------------------------

TINYSTORIES, TOKENIZER, MODEL = "python tinystories.py", "python tokenizer.py", "python model.py"
NEW = f"python train.py --vocab_source=custom --vocab_size={VOCAB} --out_dir=new"
RESUME = "python train.py --init_from=resume --max_iters=9"
PPO = "python train.py --init_from=resume --ppo --target_len=40"
EXPORT = "python export.py"
RUN = f"./run out/model.bin -z data/tok{VOCAB}.bin"
RANKS = "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT={port}"
TRAIN_HELP, MODEL_HELP, EXPORT_HELP = map(HELP.format, ("train.py", "model.py", "export.py"))
NO_PACKAGE = r"is not installed for Python 3", r"pip install -r requirements.txt"

# fmt: off
TABLE = [
    # tinystories.py: stages
    Mistake("no stage", TINYSTORIES, "required: STAGE", HELP.format("tinystories.py"), process=True),
    Mistake("a typo in a stage", f"{TINYSTORIES} pretokenise", "'pretokenise' is not one of download, import",
            "did you mean pretokenize"),
    Mistake("a flag before its stage", f"{TINYSTORIES} --data_dir=x synth",
            "--data_dir belongs after the stage", "run: python tinystories.py synth --data_dir=x"),
    Mistake("a typo in a stage's flag", f"{TINYSTORIES} synth --num_story=9", "no such option.*--num_story",
            "did you mean --num_stories"),
    Mistake("a flag without its value", f"{TINYSTORIES} synth --num_stories", "expected one argument",
            HELP.format("tinystories.py synth")),
    Mistake("words for a number", f"{TINYSTORIES} synth --num_stories=many --data_dir=new",
            "'many' is not a whole", HELP.format("tinystories.py synth")),
    Mistake("words for a vocabulary", f"{TINYSTORIES} pretokenize --vocab_size=small",
            "'small' is not a whole number; see", HELP.format("tinystories.py pretokenize")),
    Mistake("one story for two splits", f"{TINYSTORIES} synth --num_stories=1 --data_dir=new",
            "'1' is not a whole number above 1",
            HELP.format("tinystories.py synth")),
    Mistake("stories are there already", f"{TINYSTORIES} synth", "already holds stories",
            "--force|--data_dir=DIR"),
    Mistake("no data_dir", f"{TINYSTORIES} synth --data_dir=", "nothing after it",
            HELP.format("tinystories.py synth")),
    Mistake("a file as data_dir", f"{TINYSTORIES} synth --data_dir=out/ckpt.pt",
            "Not a directory|File exists", "check the folder"),
    Mistake("an address without https", f"{TINYSTORIES} download --url=mirror.org/x --data_dir=new",
            "does not begin like https://", HELP.format("tinystories.py download")),
    Mistake("a value for a switch", f"{TINYSTORIES} download --small=yes --data_dir=new", "takes no value",
            HELP.format("tinystories.py download")),
    Mistake("import of nothing", f"{TINYSTORIES} import", "required: FILE",
            HELP.format("tinystories.py import")),
    Mistake("import of a missing file", f"{TINYSTORIES} import no.txt", "no such file: no.txt",
            "import FILE.txt"),
    Mistake("import of a folder", f"{TINYSTORIES} import data", "no such file: data", "import FILE.txt"),
    Mistake("import of one story", f"{TINYSTORIES} import one.txt --data_dir=new", "found 1 of the 2 stories",
            "--separator=blank", "one story"),
    Mistake("import with an empty separator", f"{TINYSTORIES} import one.txt --data_dir=new --separator=",
            "nothing after it", HELP.format("tinystories.py import"), "one story"),
    Mistake("import of a JSON object", f"{TINYSTORIES} import no.json --data_dir=new", "not a JSON list",
            "repair the file", "no list"),
    Mistake("import without its field", f"{TINYSTORIES} import other.json --data_dir=new",
            "no text under story", "--field=NAME", "other fields"),
    Mistake("import of Latin 1", f"{TINYSTORIES} import latin1.txt --data_dir=new",
            "not UTF-8: byte 3 is 0xe9", "iconv -f latin1", "latin1"),
    Mistake("import of UTF-16", f"{TINYSTORIES} import wide.txt --data_dir=new",
            "not UTF-8: byte 0 is 0xff", "iconv -f utf-16 -t utf-8 wide.txt", "utf-16"),
    Mistake("import of a PDF", f"{TINYSTORIES} import book.pdf --data_dir=new",
            "not UTF-8: byte 10 is 0xe2", "save it as plain text in UTF-8", "pdf"),
    Mistake("import of lines as a list", f"{TINYSTORIES} import lines.json --data_dir=new", "not a JSON list",
            r"name a file with an object in each line \.jsonl", "lines"),
    Mistake("import of a list as lines", f"{TINYSTORIES} import list.jsonl --data_dir=new",
            "line 1: a list", r"one list \.json", "list"),
    Mistake("train_vocab without a size", f"{TINYSTORIES} train_vocab", "required: --vocab_size",
            HELP.format("tinystories.py train_vocab")),
    Mistake("train_vocab before download", f"{TINYSTORIES} train_vocab --vocab_size=512",
            "no stories in data/", "run: python tinystories.py download", "nothing yet"),
    Mistake("a vocabulary of 16 bits and more", f"{TINYSTORIES} train_vocab --vocab_size=100000",
            "not between 259 .* and 65536", "run: python tinystories.py train_vocab --vocab_size=4096"),
    Mistake("a vocabulary of next to nothing", f"{TINYSTORIES} train_vocab --vocab_size=2",
            "not between 259", "run: python tinystories.py train_vocab --vocab_size=4096"),
    Mistake("a vocabulary below its letters", f"{TINYSTORIES} train_vocab --vocab_size=260", "too small",
            r"run: python tinystories.py train_vocab --vocab_size=\d+"),
    Mistake("a vocabulary above its text", f"{TINYSTORIES} train_vocab --vocab_size=60000", "too large",
            r"run: python tinystories.py train_vocab --vocab_size=\d+"),
    Mistake("pretokenize before download", f"{TINYSTORIES} pretokenize", "no tokenizer data/tokenizer.model",
            "run: python tinystories.py download"),
    Mistake("pretokenize before train_vocab", f"{TINYSTORIES} pretokenize --vocab_size=512",
            "no tokenizer data/tok512.model", "run: python tinystories.py train_vocab --vocab_size=512"),
    Mistake("pretokenize in another folder", f"{TINYSTORIES} pretokenize --vocab_size=512 --data_dir=there",
            "no tokenizer there/tok512.model", "train_vocab --vocab_size=512 --data_dir=there"),
    Mistake("pretokenize without stories", f"{TINYSTORIES} pretokenize --vocab_size={VOCAB}",
            "no stories in data/", "run: python tinystories.py download", "no stories"),
    Mistake("pretokenize without shard 00", f"{TINYSTORIES} pretokenize --vocab_size={VOCAB}",
            "data00.json for valid", "run: python tinystories.py download", "no shard 00"),
    Mistake("pretokenize of a negative size", f"{TINYSTORIES} pretokenize --vocab_size=-1",
            "'-1' is not a whole", HELP.format("tinystories.py pretokenize")),
    Mistake("a tokenizer of another size", f"{TINYSTORIES} pretokenize --vocab_size=512",
            "has 400 pieces, not 512", "run: python tinystories.py train_vocab --vocab_size=512",
            "a tokenizer of 400 as tok512"),
    Mistake("a model as tokenizer", f"{TINYSTORIES} pretokenize --vocab_size=512",
            "is no sentencepiece model", "run: python tinystories.py train_vocab --vocab_size=512",
            "a model as tok512"),

    # tokenizer.py
    Mistake("tokenizer before download", TOKENIZER, "no tokenizer data/tokenizer.model",
            "run: python tinystories.py download", process=True),
    Mistake("tokenizer from its .bin", f"{TOKENIZER} --tokenizer-model=data/tok{VOCAB}.bin",
            "no sentencepiece model", f"give the one for Python: data/tok{VOCAB}.model"),
    Mistake("tokenizer from a checkpoint", f"{TOKENIZER} -t out/ckpt.pt",
            "out/ckpt.pt is no sentencepiece model", "run: python tinystories.py train_vocab"),
    Mistake("tokenizer onto itself", f"{TOKENIZER} -t data/tok400.model -o data/tok400.model",
            "is the model that", "name another file"),
    Mistake("tokenizer into no folder", f"{TOKENIZER} -t data/tok400.model -o no/t.bin",
            "cannot write no/t.bin", "--output=FILE"),
    Mistake("tokenizer without its flag", f"{TOKENIZER} data/tok400.model",
            "no such option or argument: data/tok400", HELP.format("tokenizer.py")),

    # train.py: order of stages
    Mistake("train before all else", "python train.py", "no token shards in data/tokenizer",
            "run: python tinystories.py pretokenize", "nothing yet"),
    Mistake("train before pretokenize", NEW, f"no token shards in data/tok{VOCAB}",
            f"run: python tinystories.py pretokenize --vocab_size={VOCAB}", "no tokens"),
    Mistake("train in the wrong folder", f"{NEW} --data_dir=there", f"no token shards in there/tok{VOCAB}",
            f"pretokenize --vocab_size={VOCAB} --data_dir=there", process=True),
    Mistake("train on shards of another size",
            "python train.py --vocab_source=custom --out_dir=new --vocab_size=512",
            "no token shards in data/tok512", f"--vocab_source=custom --vocab_size={VOCAB}"),
    Mistake("a vocabulary without its source", f"python train.py --vocab_size={VOCAB} --out_dir=new",
            "Llama 2 tokenizer has 32000 ids", "add --vocab_source=custom"),
    Mistake("a vocabulary without its size", "python train.py --vocab_source=custom --out_dir=new",
            "no token shards in data/tok32000", f"--vocab_source=custom --vocab_size={VOCAB}"),
    Mistake("a vocabulary above 16 bits",
            "python train.py --vocab_source=custom --vocab_size=70000 --out_dir=new", "above 65536",
            "tinystories.py train_vocab --vocab_size=4096"),
    Mistake("a shard is gone", NEW, "data01.bin is missing", f"pretokenize --vocab_size={VOCAB}",
            "a lost shard"),
    Mistake("meta.json is broken", NEW, "meta.json is damaged", "pretokenize", "broken meta.json"),
    Mistake("the tokenizer has changed", NEW, "with another tokenizer than",
            f"pretokenize --vocab_size={VOCAB}", "another tokenizer"),
    Mistake("a run is there already", NEW.replace("new", "out"), "is a run already",
            "--init_from=resume.*--out_dir"),

    # train.py: flags
    Mistake("a typo in a flag", "python train.py --vocab_sorce=custom",
            "no such option or argument: --vocab_sorce", "did you mean --vocab_source"),
    Mistake("a word too many", f"{NEW} now", "no such option or argument: now", TRAIN_HELP),
    Mistake("a fraction for a whole number", f"{NEW} --dim=64.5", "invalid int value: '64.5'", TRAIN_HELP),
    Mistake("nothing for a number", f"{NEW} --dim=", "invalid int value: ''", TRAIN_HELP),
    Mistake("a comma in a number", f"{NEW} --learning_rate=5e-4,", "invalid float value", TRAIN_HELP),
    Mistake("a rate that is no number", f"{NEW} --learning_rate=nan", "learning_rate=nan must be a",
            TRAIN_HELP),
    Mistake("an infinite rate", f"{NEW} --learning_rate=inf", "learning_rate=inf must be a", TRAIN_HELP),
    Mistake("a negative count", f"{NEW} --max_iters=-1", "max_iters=-1 must be", TRAIN_HELP),
    Mistake("a batch of none", f"{NEW} --batch_size=0", "batch_size=0 must be at least 1", TRAIN_HELP),
    Mistake("no state to keep", f"{NEW} --keep=0", "keep=0 must be at least 1", TRAIN_HELP),
    Mistake("neither true nor false", f"{NEW} --decay_lr=maybe", "invalid boolean.*'maybe'", TRAIN_HELP),
    Mistake("half a compilation", f"{NEW} --compile=maybe", "'maybe' is not one of auto, True, False",
            TRAIN_HELP),
    Mistake("a precision by another name", f"{NEW} --dtype=floatl6", "'floatl6' is not one of auto",
            "did you mean float16"),
    Mistake("heads that do not divide dim", f"{NEW} --dim=64 --n_heads=5",
            r"dim=64 must be a multiple of 2\*n_heads=10", TRAIN_HELP),
    Mistake("kv heads that do not divide heads", f"{NEW} --dim=64 --n_heads=8 --n_kv_heads=3",
            "multiple of n_kv_heads=3", TRAIN_HELP),
    Mistake("all is dropped", f"{NEW} --dropout=1", r"dropout=1.0 must be in \[0, 1\)", TRAIN_HELP),
    Mistake("an infinite epsilon", f"{NEW} --norm_eps=inf", "norm_eps=inf must be at least 0 and finite",
            TRAIN_HELP),
    Mistake("a context beyond all", f"{NEW} --max_seq_len=100000000000000000000", "must be at most 16777216",
            TRAIN_HELP),
    Mistake("a context beyond the data", f"{NEW} --max_seq_len=1000000",
            "fewer than a batch of 128 x 1000000", r"--max_seq_len=\d+ or less"),
    Mistake("a batch beyond the data", f"{NEW} --batch_size=100000", "tokens to train on, fewer than a batch",
            r"--batch_size=\d+ or less"),
    Mistake("a model beyond memory", f"{NEW} --dim=6000000 --n_heads=1", "parameters takes .* GB",
            "lower --dim"),
    Mistake("layers beyond memory", f"{NEW} --n_layers=1000000000", "parameters takes .* GB",
            "lower --dim or --n_layers"),
    Mistake("a device that isn't there", f"{NEW} --device=cuda:77", "no device 'cuda:77' here", "--device="),
    Mistake("a device of another name", f"{NEW} --device=gpu", "no device 'gpu' here", "--device="),
    Mistake("a device with a slip", f"{NEW} --device=cpu:", "no device 'cpu:' here", "--device="),
    Mistake("half precision on the CPU", f"{NEW} --device=cpu --dtype=float16", "float16 needs a CUDA device",
            "--dtype=float32"),
    Mistake("no out_dir", f"{NEW} --out_dir=", "out_dir is empty", TRAIN_HELP),
    Mistake("a file as out_dir", f"{NEW} --out_dir=out/ckpt.pt", "ckpt.pt is no folder",
            "choose another --out_dir"),
    Mistake("an out_dir within a file", f"{NEW} --out_dir=out/ckpt.pt/new", "ckpt.pt is no folder",
            "another --out_dir"),
    Mistake("wandb isn't there", f"{NEW} --wandb_log", "--wandb_log needs a package", "pip install wandb"),
    Mistake("a PPO flag without --ppo", f"{NEW} --target_len=100", "--target_len is for PPO", "add --ppo"),

    # train.py: going on, fine-tuning
    Mistake("resume of nothing", f"{RESUME} --out_dir=new", "nothing to resume in new",
            "run the same without --init_from=resume"),
    Mistake("a typo in resume", "python train.py --init_from=resum", "no checkpoint at resum",
            "did you mean resume"),
    Mistake("fine-tuning of nothing", f"{NEW} --init_from=no.pt", "no checkpoint at no.pt",
            "scratch, resume, auto"),
    Mistake("fine-tuning of a folder", f"{NEW} --init_from=out", "out is a folder, no checkpoint",
            "like out/ckpt.pt"),
    Mistake("fine-tuning of a .bin", f"{NEW} --init_from=out/model.bin", "model.bin is no checkpoint",
            "python export.py ckpt.pt --checkpoint=out/model.bin"),
    Mistake("fine-tuning to another width", f"{NEW} --init_from=out/ckpt.pt --dim=128",
            "--dim=128 contradicts", "leave the flag out"),
    Mistake("fine-tuning in a batch beyond the data", f"{NEW} --init_from=out/ckpt.pt --batch_size=100000",
            "tokens to train on, fewer than a batch of 100000 x 64", r"--batch_size=\d+ or less"),
    Mistake("resume with another context", f"{RESUME} --max_seq_len=128", "--max_seq_len=128 contradicts",
            "leave the flag out"),
    Mistake("resume without its data", f"{RESUME} --data_dir=there", f"no token shards in there/tok{VOCAB}",
            f"pretokenize --vocab_size={VOCAB} --data_dir=there"),
    Mistake("resume of an empty file", RESUME, "ckpt.pt cannot be read as a checkpoint", "put a whole copy",
            "an empty ckpt.pt"),
    Mistake("resume of half a file", RESUME, "last.pt cannot be read as a checkpoint", "put a whole copy",
            "half a last.pt"),
    Mistake("resume of a .bin", RESUME, "last.pt is no checkpoint", "python export.py ckpt.pt --checkpoint=",
            "model.bin as last.pt"),

    Mistake("resume of what PPO started from", f"{RESUME} --max_iters=1000",
            "out/ppo_ckpt.pt is of PPO on out/ckpt.pt",
            "--ppo; to train, --init_from=out/ckpt.pt --out_dir=", "a text as ppo_ckpt.pt"),
    Mistake("two runs at once", RESUME, "out is in use by process", "choose another --out_dir",
            "a run at work", process=True),

    # train.py --ppo
    Mistake("PPO without resume", "python train.py --ppo", "--ppo fine-tunes out/ckpt.pt",
            "add --init_from=resume"),
    Mistake("PPO before training", PPO, "no checkpoint at out/ckpt.pt", "run: python train.py --out_dir=out",
            "no ckpt.pt"),
    Mistake("PPO in another folder", f"{PPO} --out_dir=new", "no checkpoint at new/ckpt.pt",
            "run: python train.py --out_dir=new"),
    Mistake("a target beyond the context", f"{PPO} --target_len=500", "no story can come to --target_len=500",
            r"like --target_len=\d+"),
    Mistake("a target beyond the response", f"{PPO} --target_len=60 --max_gen_len=20",
            "within --max_gen_len=20", r"like --target_len=\d+"),
    Mistake("prompts as long as the context", f"{PPO} --start_len=64", "--start_len=64 leaves no room",
            r"like --start_len=\d+"),
    Mistake("a typo in a reward", f"{PPO} --reward=lenght", "--reward=lenght is not known",
            "--reward=length, keyword"),
    Mistake("keywords without words", f"{PPO} --reward=keyword", "--reward=keyword needs words",
            "--keywords=dog,happy"),
    Mistake("a weight that is no number", f"{PPO} --reward=nan*length", "nan is no number",
            r"length\+0.5\*keyword"),
    Mistake("a reward file that isn't there", f"{PPO} --reward=r.py:f", "there is no file r.py",
            "FILE.py:FUNCTION"),
    Mistake("a reward with a syntax error", f"{PPO} --reward=r.py:f", "r.py failed with SyntaxError.*line 1",
            "repair it", "a reward of syntax error"),
    Mistake("a reward without its function", f"{PPO} --reward=r.py:f", "r.py has no function f",
            r"write one: def f\(prompts, stories, tokens, ended\)", "a reward of no function"),
    Mistake("a reward that exits", f"{PPO} --reward=r.py:f", "r.py failed with SystemExit", "repair it",
            "a reward that exits"),
    Mistake("a reward of two lists", f"{PPO} --reward=r.py:f", "f cannot be called with four lists",
            r"def f\(prompts, stories, tokens, ended\)", "a reward of two lists"),
    Mistake("a reward that is no .py", f"{PPO} --reward=r.txt:f", "r.txt is no Python file",
            "must end in .py", "a reward that is text"),
    Mistake("prompts that aren't there", f"{PPO} --prompts=no.txt", "--prompts=no.txt: No such file",
            "name a text file"),
    Mistake("prompts that are none", f"{PPO} --prompts=empty", "holds no prompt", "write one per line",
            "an empty file"),
    Mistake("prompts that are no text", f"{PPO} --prompts=out/ckpt.pt", "--prompts=out/ckpt.pt: not UTF-8",
            "name a text file"),
    Mistake("prompts that are too long", f"{PPO} --prompts=long", "leaves no room in a context of 64",
            "shorten it", "a long prompt"),
    Mistake("groups that don't divide", f"{PPO} --batch_size=10 --group_size=3",
            "must divide the rollout's 80", "add --rollout_size=81"),
    Mistake("rloo without groups", f"{PPO} --advantage=rloo", "rloo compares responses", "add --group_size=4",
            "no ckpt.pt"),
    Mistake("a typo in an advantage", f"{PPO} --advantage=gea", "'gea' is not one of", "did you mean gae"),
    Mistake("no regular expression", f"{PPO} --train_only='('", "is no regular expression", TRAIN_HELP),
    Mistake("no such parameter", f"{PPO} --train_only=w9", "matches no parameter",
            "layers.0.attention.wq.weight"),
    Mistake("PPO in half precision", f"{PPO} --dtype=bfloat16", "PPO computes in float32", "leave --dtype"),
    Mistake("PPO on no such device", f"{PPO} --device=tpu", "no device 'tpu' here", "--device="),
    Mistake("PPO of another width", f"{PPO} --dim=64", "--dim=64 contradicts out/ckpt.pt",
            "leave the flag out"),
    Mistake("PPO without the tokenizer", PPO, f"no tokenizer data/tok{VOCAB}.model",
            f"run: python tinystories.py train_vocab --vocab_size={VOCAB}", "no tokenizer"),
    Mistake("PPO without llama2.c's tokenizer", PPO, f"no tokenizer data/tok{VOCAB}.model",
            "put the one there that out/ckpt.pt was trained with", "a ckpt.pt that tells no tokenizer"),
    Mistake("PPO with another tokenizer", PPO, "has 400 pieces and the model 384", "put that one back",
            "another tokenizer"),
    Mistake("PPO without tokens", PPO, f"no token shards in data/tok{VOCAB}",
            f"pretokenize --vocab_size={VOCAB}", "no tokens"),
    Mistake("a text as PPO's state", PPO, "ppo_ckpt.pt is no checkpoint", "python export.py",
            "a text as ppo_ckpt.pt"),
    Mistake("PPO's state of other weights", PPO, "was trained from other weights",
            "move out/ppo_ckpt.pt away", "another run's ppo_ckpt.pt"),

    # ppo.py
    Mistake("no stage of ppo.py", "python ppo.py", "required: stage", HELP.format("ppo.py"), process=True),
    Mistake("a typo in report", "python ppo.py reprot out", "'reprot' is not one of report",
            "did you mean report"),
    Mistake("a report of nowhere", "python ppo.py report no", "no no/metrics.jsonl",
            "run: python train.py --init_from=resume --ppo --out_dir=no"),
    Mistake("a report before PPO", "python ppo.py report out", "no checkpoint at out/ppo_ckpt.pt",
            "run: python train.py --out_dir=out --init_from=resume --ppo"),
    Mistake("a report of a file", "python ppo.py report out/ckpt.pt", "out/ckpt.pt is a file",
            "run: python ppo.py report out"),
    Mistake("a report of pretraining", "python ppo.py report out", "holds no iteration of PPO yet",
            "run: python train.py --out_dir=out --init_from=resume --ppo", "another run's ppo_ckpt.pt"),
    Mistake("a report of nonsense", "python ppo.py report out", "metrics.jsonl, line 1 is damaged",
            "delete it", "broken metrics"),

    # model.py
    Mistake("a story before training", MODEL, "no checkpoint at out/ckpt.pt",
            "run: python train.py --out_dir=out", "no run", process=True),
    Mistake("a story of a folder", f"{MODEL} --checkpoint=out", "out is a folder", "like out/ckpt.pt"),
    Mistake("a story of a .bin", f"{MODEL} --checkpoint=out/model.bin", "model.bin is no checkpoint",
            "python export.py ckpt.pt --checkpoint=out/model.bin"),
    Mistake("a checkpoint without its flag", f"{MODEL} out/ckpt.pt",
            "no such option or argument: out/ckpt.pt", MODEL_HELP),
    Mistake("a typo in a flag of model.py", f"{MODEL} --chekpoint=out/ckpt.pt", "no such option",
            "did you mean --checkpoint"),
    Mistake("no stories at all", f"{MODEL} --num_samples=0", "--num_samples=0 must be from 1", MODEL_HELP),
    Mistake("a cold story", f"{MODEL} --temperature=-1", "--temperature=-1.0 must be from 0", MODEL_HELP),
    Mistake("top_p that is no number", f"{MODEL} --top_p=nan", "--top_p=nan must be from 0 to 1", MODEL_HELP),
    Mistake("a seed beyond 64 bits", f"{MODEL} --seed=99999999999999999999", "--seed=9+ must be from 0",
            MODEL_HELP),
    Mistake("a story on no such device", f"{MODEL} --device=cuda:77", "no device 'cuda:77' here",
            "--device="),
    Mistake("run's tokenizer for Python", f"{MODEL} --tokenizer=data/tok400.bin", "no sentencepiece model",
            "give the one for Python: data/tok400.model"),
    Mistake("a story without a tokenizer", MODEL, f"no tokenizer data/tok{VOCAB}.model",
            f"train_vocab --vocab_size={VOCAB}", "no tokenizer"),
    Mistake("a start that isn't there", f"{MODEL} --start=FILE:no.txt", "--start=FILE:no.txt: No such file",
            "name a text file"),
    Mistake("a start longer than the context", f"{MODEL} --start=FILE:long", "takes fewer than 64 tokens",
            "shorten it", "a long prompt"),

    # export.py
    Mistake("export of nothing", EXPORT, "required: output", EXPORT_HELP),
    Mistake("export before training", f"{EXPORT} m.bin", "cannot read out/ckpt.pt", "python train.py",
            "no run", process=True),
    Mistake("export of a folder", f"{EXPORT} m.bin --checkpoint=out", "out is a folder", "like out/ckpt.pt"),
    Mistake("export of a tokenizer", f"{EXPORT} m.bin --checkpoint=data/tok400.bin", "is no model file",
            "--checkpoint=FILE"),
    Mistake("export of an empty file", f"{EXPORT} m.bin --checkpoint=empty.bin",
            "is no model file: it has only 0", "--checkpoint=FILE", "an empty .bin"),
    Mistake("export of half a file", f"{EXPORT} m.bin --checkpoint=out/model.bin", "is damaged: ",
            "--checkpoint=FILE", "half a model.bin"),
    Mistake("export into no folder", f"{EXPORT} no/m.bin", "there is no folder no", "mkdir -p no"),
    Mistake("export onto a folder", f"{EXPORT} out", "'out' is no file", "like out/model.bin"),
    Mistake("export onto a run", f"{EXPORT} out/ckpt.pt --checkpoint=out/model.bin", "is there already",
            "name another file"),
    Mistake("export onto itself", f"{EXPORT} out/model.bin --checkpoint=out/model.bin",
            "is the model that is read", "name another file"),
    Mistake("export to GGUF", f"{EXPORT} m.gguf", "m.gguf cannot be written", "name a .bin"),
    Mistake("an unknown version", f"{EXPORT} m.bin --version=9", "9 is not one of 0, 1, 2, 3", EXPORT_HELP),
    Mistake("a version by name", f"{EXPORT} m.bin --version=int8", "invalid int value: 'int8'", EXPORT_HELP),
    Mistake("a version of a checkpoint", f"{EXPORT} m.pt --version=2", "--version=2 is for .bin files",
            "leave it out"),
    Mistake("groups of none", f"{EXPORT} m.bin --version=2 --group_size=0", "--group_size=0 must be",
            EXPORT_HELP),

    # run
    Mistake("run of nothing", "./run", "no model given", "run --help"),
    Mistake("run before training", "./run out/model.bin", "out/model.bin: cannot open",
            "python export.py model.bin", "no run"),
    Mistake("run without a tokenizer", "./run out/model.bin", "tokenizer.bin: not found",
            "python tokenizer.py --tokenizer-model="),
    Mistake("run with a missing tokenizer", "./run out/model.bin -z no.bin", "no.bin: cannot open",
            "python tokenizer.py --tokenizer-model="),
    Mistake("run with Python's tokenizer", "./run out/model.bin -z data/tok400.model",
            "this is a sentencepiece model", "python tokenizer.py --tokenizer-model=data/tok400.model"),
    Mistake("run with the two swapped", f"./run data/tok{VOCAB}.bin -z out/model.bin",
            "this is a tokenizer, not a model", "run MODEL.bin -z TOKENIZER.bin"),
    Mistake("run with the model twice", "./run out/model.bin -z out/model.bin", "not a tokenizer .bin",
            "python tokenizer.py --tokenizer-model="),
    Mistake("run of a checkpoint", RUN.replace("model.bin", "ckpt.pt"), "this is a PyTorch checkpoint",
            "python export.py model.bin --checkpoint out/ckpt.pt"),
    Mistake("run of a folder", "./run out", "is a directory", "name a file in it"),
    Mistake("run of half a file", RUN, "truncated", "python export.py model.bin", "half a model.bin"),
    Mistake("run of a text", "./run out/metrics.jsonl", "this is a text file", "run MODEL.bin"),
    Mistake("run for abc tokens", f"{RUN} -n abc", "-n: expected a whole number.*'abc'", "run --help"),
    Mistake("run for no count", f"{RUN} -n", "-n: needs a value", "run --help"),
    Mistake("run at no temperature", f"{RUN} -t nan", "-t: expected a number of at least 0, got 'nan'",
            "run --help"),
    Mistake("run with a typo", f"{RUN} --temprature 1", "--temprature: unknown option", "run --help"),
    Mistake("run in an unknown mode", f"{RUN} -m talk", "expected generate or chat", "run --help"),
    Mistake("run without -z", "./run out/model.bin data/tok400.bin", "the model is already out/model.bin",
            "follows -z"),
    Mistake("run of a prompt too long", f"{RUN} -f long", "context holds 64", "shorten it", "a long prompt"),
    Mistake("run of a missing prompt", f"{RUN} -f no.txt", "no.txt: cannot open", "name a text file"),

    # make
    Mistake("a typo in a target", "make tset", "no target or file tset", "make help"),
    Mistake("no compiler", "make run CC=no-such-cc", "no C compiler no-such-cc", "make run CC=clang",
            "no program"),
    Mistake("no Python", "make demo PYTHON=no-python", "no-python is no Python 3.11", "make demo PYTHON="),

    # several processes
    Mistake("a rank without the others", f"RANK=0 {NEW}", "RANK is set, and WORLD_SIZE is ''",
            "torchrun --standalone"),
    Mistake("a rank too high", f"{RANKS.replace('RANK=0', 'RANK=5', 1)} {NEW}", "no RANK 5 of WORLD_SIZE 2",
            "torchrun"),
    Mistake("a rank without an address", f"{RANKS.replace('127.0.0.1', '')} {NEW}", "MASTER_ADDR is ''",
            "torchrun"),
    Mistake("steps that ranks cannot share", f"{RANKS} {NEW} --gradient_accumulation_steps=3",
            "2 processes cannot share --gradient_accumulation_steps=3", "multiple of 2"),
    Mistake("a port in use", f"{RANKS} {NEW}", "no meeting the other processes at 127.0.0.1",
            "torchrun --standalone", process=True),
    Mistake("a port in use, torchrun", f"torchrun --nproc_per_node=2 --master_port={{port}} {NEW[7:]}",
            "port: {port}, .*EADDRINUSE", "address already in use", process=True),
    Mistake("a typo under torchrun", "torchrun --standalone --nproc_per_node=2 train.py --vocab_sorce=custom",
            "no such option or argument: --vocab_sorce", "did you mean --vocab_source", process=True),

    Mistake("--fsdp alone", f"{NEW} --fsdp", "--fsdp splits the model over processes",
            "run: torchrun --standalone"),

    # what is not installed (-S: no site-packages)
    *(Mistake(f"{script} without packages", f"python -S {script}", *NO_PACKAGE, process=True)
      for script in ("tinystories.py", "tokenizer.py", "model.py", "export.py", "ppo.py", "train.py")),
]
# fmt: on

# ---- running it ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(data_dir, tmp_path_factory) -> Path:
    """A folder with all that a small run leaves, the Makefile, and run."""
    import tinystories
    import train

    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(data_dir, folder / "data")
    with contextlib.chdir(folder):
        tinystories.main(["train_vocab", "--vocab_size=400"])
        for size in (VOCAB, 400):
            tokenizer.main(["-t", f"data/tok{size}.model"])
        shape = ["--dim=16", "--n_layers=1", "--n_heads=2", "--max_seq_len=64", "--multiple_of=4"]
        steps = ["--max_iters=1", "--warmup_iters=0", "--eval_iters=1", "--batch_size=2", "--device=cpu"]
        train.main([*shape, *steps, "--vocab_source=custom", f"--vocab_size={VOCAB}"])
    (folder / "out" / ".lock").unlink(missing_ok=True)
    shutil.copy(ROOT / "Makefile", folder)
    shutil.copy(ROOT / "requirements.txt", folder)
    shutil.copy(ROOT / "run.c", folder)
    if CC:
        subprocess.run([CC, "-O0", "-o", "run", "run.c", "-lm", "-lpthread"], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def taken_port():
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file and folder, but for locks and what Python caches."""
    paths = [p for p in folder.rglob("*") if p.suffix != ".lock" and "__pycache__" not in p.parts]
    paths = [p for p in paths if p.name != ".lock"]
    full = {parent for p in paths if not p.is_dir() for parent in p.parents}
    paths = [p for p in paths if p in full or not p.is_dir()]  # a folder of nothing but a lock is no harm
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in paths}


def in_process(words: list[str], capfd, monkeypatch) -> tuple[int, str, str]:
    """Exit code, standard output and error of `python SCRIPT …`, run here."""
    script = importlib.import_module(words[1].removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", words[1:])
    if words[1] == "train.py":  # nothing slow may come first

        def slow(*args):
            raise AssertionError("slow work was begun before the mistake was seen")

        for name in ("Transformer", "pretrain", "train_ppo"):
            monkeypatch.setattr(script, name, slow)
    capfd.readouterr()
    with pytest.raises(SystemExit) as e:
        script.main()
    out, err = capfd.readouterr()
    text = isinstance(e.value.code, str)
    return (1, out, f"{err}{e.value.code}\n") if text else (e.value.code or 0, out, err)


def as_process(words: list[str], variables: dict[str, str], folder: Path) -> tuple[int, str, str]:
    words = [str(ROOT / word) if (ROOT / word).is_file() and word.endswith(".py") else word for word in words]
    first = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
        "make": ["make"],
        "./run": ["./run"],
    }[words[0]]
    # not what the make says that may have started these tests
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    env |= variables | {"OMP_NUM_THREADS": "1"}
    # the time limit only ends what would hang
    r = subprocess.run(
        [*first, *words[1:]], cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    return r.returncode, r.stdout, r.stderr


def skip_where_it_is_none(mistake: Mistake) -> None:
    if mistake.command.startswith("./run") and not CC:
        pytest.skip("no C compiler")
    if mistake.command.startswith("make") and not shutil.which("make"):
        pytest.skip("no make")
    if "--wandb_log" in mistake.command and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")


@pytest.mark.parametrize("mistake", TABLE, ids=lambda mistake: mistake.name)
def test_mistake(mistake, world, taken_port, tmp_path, monkeypatch, capfd):
    skip_where_it_is_none(mistake)
    folder = tmp_path / "w"
    shutil.copytree(world, folder)
    if mistake.needs:
        SET_UPS[mistake.needs](folder)
    before = contents(folder)
    words = shlex.split(mistake.command.replace("{port}", str(taken_port)))
    variables = {}
    while "=" in words[0]:
        name, _, variables[name] = words.pop(0).partition("=")
    if words[0] == "python" and not (mistake.process or AS_PROCESSES):
        monkeypatch.chdir(folder)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        code, out, err = in_process(words, capfd, monkeypatch)
    else:
        code, out, err = as_process(words, variables, folder)

    assert code == (2 if words[0] == "make" else 1), err  # make has a code of its own
    for expected in (mistake.says, mistake.type):
        assert re.search(expected.replace("{port}", str(taken_port)), err), err
    if words[0] == "torchrun":  # which adds a report of its own, with its own traceback
        assert not re.search(r'File ".*(train|model|tinystories)\.py"', err), err
    else:
        lines = [line for line in err.splitlines() if not line.startswith("make: ***")]
        assert len(lines) == 1 and "Traceback" not in err, err
    assert not [line for line in out.splitlines() if not line.startswith("from out/")], out
    assert contents(folder) == before


def test_the_table_is_a_table():
    names = [mistake.name for mistake in TABLE]
    assert len(names) == len(set(names)) >= 50
    assert set(SET_UPS) == {mistake.needs for mistake in TABLE} - {""}


def test_the_next_command_can_be_pasted_whatever_the_folders_are_called(run_program, tmp_path):
    """From stories to PPO's model by what each stage names, typed into a shell as it stands."""
    for script in ROOT.glob("*.py"):
        (tmp_path / script.name).symlink_to(script)
    (tmp_path / "run").symlink_to(run_program)
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def typed(command: str) -> str:
        r = subprocess.run(command, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True)
        found = re.search(r"(?:next|run): (.*?)(?: \(or smaller\))?$", r.stdout + r.stderr, re.MULTILINE)
        assert found and "Traceback" not in r.stderr, (command, r.stdout, r.stderr)
        return found[1]

    small = ("--out_dir='an \"out\"' --dim=16 --n_layers=1 --n_heads=2 --max_seq_len=32 --batch_size=2 "
             "--gradient_accumulation_steps=1 --eval_iters=1 --device=cpu")
    command = "python tinystories.py synth --num_stories=300 --num_shards=3 --data_dir=\"it's & mine\""
    for stage in ("synth", "train_vocab", "train_vocab", "pretokenize"):  # the first vocabulary is too large
        assert f"tinystories.py {stage} " in command
        command = typed(command)
    train = f"{command} {small}"
    assert typed(f"{train} --max_iters=2").startswith("./run 'an \"out\"/model.bin' -z ")
    command = typed(f"{train} --init_from=resume --ppo --ppo_iters=1 --rollout_size=4 --target_len=16")
    subprocess.run(f"{command} -n 5", shell=True, cwd=tmp_path, env=env, check=True)


@pytest.mark.parametrize("script", ["tokenizer", "tinystories", "model", "ppo", "train", "export"])
def test_help(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "9999")  # no wrapping
    with pytest.raises(SystemExit) as e:
        importlib.import_module(script).main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert not e.value.code and text.startswith(f"usage: {script}.py")
    if script == "train":
        from model import ModelArgs
        from ppo import PPOConfig
        from train import TrainConfig

        configs = ModelArgs, TrainConfig, PPOConfig
        for field in (field for config in configs for field in dataclasses.fields(config)):
            assert f"--{field.name} " in text and " ".join(field.metadata["help"].split()) in text


def test_report_without_matplotlib(world, tmp_path, monkeypatch):
    import ppo

    (tmp_path / "metrics.jsonl").write_text('{"iter": 1, "ppo/kl": 0, "ppo/episodes": 8}\n')
    monkeypatch.setattr(ppo, "newest_state", lambda paths, lazily: (paths[0], {"evaluation": {"before": 1}}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="run: pip install matplotlib"):
        ppo.main(["report", str(tmp_path)])
