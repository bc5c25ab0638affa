"""Text for the model: download, import or make stories, train a vocabulary, tokenize, serve batches.

    python tinystories.py download                        # TinyStories and the Llama 2 tokenizer
    python tinystories.py import book.txt more.jsonl      # or your own text
    python tinystories.py synth                           # or stories from a built-in grammar, no network
    python tinystories.py train_vocab --vocab_size=4096   # data/tok4096.model
    python tinystories.py pretokenize --vocab_size=4096   # data/tok4096/dataNN.bin and meta.json
    python tinystories.py pretokenize                     # the same with the Llama 2 tokenizer

Text lives in DATA_DIR/TinyStories_all_data/dataNN.json, a list of {"story": str, ...}; shard 00 is for
validation, the rest for training. Tokens live in a folder named after their tokenizer: tokN.model → tokN/.
Every stage can be killed and run again: what is on the disk under its own name is whole.

Not for: cleaning or deduplicating text, data loading over a network, vocabularies above 65,536.
"""

import argparse
import codecs
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import shutil
import signal
import sys
import tarfile
import time
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack

import numpy as np
import sentencepiece
from tqdm import tqdm

from tokenizer import CommandLine, Tokenizer, atomic_write, tokenizer_path, whole

STORIES_URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories_all_data.tar.gz"
SMALL_URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories-valid.txt"
TOKENIZER_URL = "https://raw.githubusercontent.com/karpathy/llama2.c/master/tokenizer.model"
TOKENIZER_SHA256 = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"

TIMEOUT = (10, 30)  # seconds to connect, and without a byte before a download counts as stalled
TRIES = 5  # failed attempts in a row that bring not one new byte
BACKOFF = 1.0  # seconds before the second try, doubled for each one after it
CHUNK = 1 << 20  # bytes read at a time
LONGEST_STORY = 64 << 20  # characters; more without an end means that the format was guessed wrong
MAX_VOCAB = 65536  # ids are stored as uint16
META_FORMAT = 1
STAGES = ("download", "import", "synth", "train_vocab", "pretokenize")


# ---- paths and messages ------------------------------------------------------------------------------

def stories_dir(data_dir: str) -> str:
    return os.path.join(data_dir, "TinyStories_all_data")


def token_dir(data_dir: str, vocab_size: int) -> str:
    """The folder of the token shards: their tokenizer's path without its suffix."""
    return os.path.splitext(tokenizer_path(data_dir, vocab_size))[0]


def command(stage: str, data_dir: str = "data", vocab_size: int = 0, more: str = "") -> str:
    """What to type next, for messages."""
    words = [f"python tinystories.py {stage}"]
    words += [f"--vocab_size={vocab_size}"] * (vocab_size > 0)
    words += [f"--data_dir={data_dir}"] * (data_dir != "data")
    return " ".join(words + [more] * bool(more))


def progress_bar(title: str, total: int | None = None) -> tqdm:
    return tqdm(desc=title, total=total, unit="B", unit_scale=True, disable=None, leave=False)


def note(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


# ---- fetch: resume, retry, checksum ------------------------------------------------------------------

class TryAgain(Exception):
    """A failure that another attempt may cure, after `wait` seconds if the server said so."""

    def __init__(self, why: str, wait: float = 0.0):
        super().__init__(why)
        self.wait = wait


def fetch(url: str, path: str, sha256: str | None = None, flag: str = "--url") -> None:
    """Download `url` to `path`, going on where an earlier run was cut off.

    The bytes so far are in `path`.part; `path`.part.json names the version they belong to, so that halves
    of two versions are never joined. An attempt that brings new bytes resets the count of failures.
    Raises SystemExit: a bad URL or status, no network, a wrong checksum. `flag` is named in the message.
    """
    part = path + ".part"
    furthest = failures = 0
    with progress_bar(os.path.basename(path)) as bar:
        while True:
            try:
                fetch_rest(url, part, bar, flag)
                break
            except TryAgain as e:
                here = os.path.getsize(part) if os.path.exists(part) else 0
                failures = 1 if here > furthest else failures + 1
                furthest = max(furthest, here)
                if failures >= TRIES:
                    raise SystemExit(f"cannot download {url}: {e}; try again later (it resumes), or with no "
                                     "network: python tinystories.py synth (or import FILE)") from None
                wait = max(min(e.wait, 60.0), BACKOFF * 2 ** (failures - 1))
                note(f"{e}; trying again in {wait:.3g} s")
                time.sleep(wait)
    with open(part, "rb") as f:
        os.fsync(f.fileno())
        found = hashlib.file_digest(f, "sha256").hexdigest() if sha256 else None
    if found != sha256:
        forget(part)
        raise SystemExit(f"{url} has the wrong content (sha256 {found[:12]}…, not {sha256[:12]}…) and was "
                         f"dropped; run the same again, or give another address with {flag}=URL")
    os.replace(part, path)
    forget(part)


def fetch_rest(url: str, part: str, bar: tqdm, flag: str) -> None:
    """One request for the bytes that `part` lacks. Raises TryAgain or SystemExit."""
    import requests  # 0.14 s, which only this stage should pay
    from urllib3.exceptions import HTTPError

    start, _ = have, seen = partial_download(url, part)
    if have and have == seen["total"]:
        return
    headers = {"Accept-Encoding": "identity"}  # else lengths and ranges would count compressed bytes
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": seen["version"]}
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as reply:
            total, start = check_reply(reply, part, have, seen, flag)
            if not start:  # a first attempt, a changed file, or a server that knows no ranges
                open(part, "wb").close()
                version = reply.headers.get("ETag", "W/")  # W/ marks a weak one, of no use for ranges
                version = reply.headers.get("Last-Modified", "") if version.startswith("W/") else version
                with atomic_write(part + ".json", "w") as f:
                    json.dump({"url": url, "version": version, "total": total}, f)
            bar.total, bar.n = total, start
            bar.refresh()
            with open(part, "ab") as f:
                while chunk := reply.raw.read1(1 << 16, decode_content=False):
                    f.write(chunk)
                    start += len(chunk)
                    bar.update(len(chunk))
    except requests.Timeout:
        raise TryAgain("no answer") from None
    except requests.ConnectionError as e:
        raise TryAgain(f"no connection ({type(e).__name__})") from None
    except HTTPError:  # urllib3's, while the body is read
        raise TryAgain(f"the connection stalled or broke after {start:,} bytes") from None
    except requests.RequestException as e:
        raise SystemExit(f"cannot download {url}: {e}; check {flag}=URL") from None
    if total is not None and start != total:
        raise TryAgain(f"got {start:,} of {total:,} bytes")


def partial_download(url: str, part: str) -> tuple[int, dict]:
    """Bytes of `url` in `part` that can be gone on from (0: start over), and what the server said of them."""
    try:
        with open(part + ".json", encoding="utf-8") as f:
            seen = json.load(f)
        if seen["url"] == url and seen["version"]:
            return os.path.getsize(part), seen
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none, or a damaged note: start over
    return 0, {}


def check_reply(reply, part: str, have: int, seen: dict, flag: str) -> tuple[int | None, int]:
    """Total size of the file (None: not told) and the offset at which this reply's body starts."""
    status = reply.status_code
    if status == 200:
        length = reply.headers.get("Content-Length", "")
        return (int(length) if length.isdigit() else None), 0
    if status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", reply.headers.get("Content-Range", ""))
        if match and int(match[1]) == have and int(match[2]) == seen["total"]:
            return int(match[2]), have
    if status in (206, 416):  # not the range that was asked for: what we have is of no use
        forget(part)
        raise TryAgain("the server has another version of the file")
    if status in (408, 425, 429) or status >= 500:
        wait = reply.headers.get("Retry-After", "")
        raise TryAgain(f"the server says {status} {reply.reason}", float(wait) if wait.isdigit() else 0.0)
    raise SystemExit(f"cannot download {reply.url}: the server says {status} {reply.reason}; "
                     f"check {flag}=URL")


def forget(part: str) -> None:
    for path in (part, part + ".json"):
        if os.path.exists(path):
            os.remove(path)


def extract(archive: str, folder: str) -> None:
    """Unpack the dataNN.json files of a .tar.gz into `folder`, which appears whole or not at all.

    Nothing else is taken: no other names, links, devices, or paths that lead out of the archive.
    """
    scratch = empty_folder(folder + ".tmp")
    skipped = 0
    try:
        with open(archive, "rb") as raw, progress_bar("unpacking", os.path.getsize(archive)) as bar:
            with gzip.open(raw) as plain, tarfile.open(fileobj=plain, mode="r|") as tar:
                for member in tar:
                    target = os.path.join(scratch, os.path.basename(member.name))
                    if not is_shard(member, scratch) or os.path.exists(target):
                        skipped += not member.isdir()
                        continue
                    with open(target, "wb") as f:
                        shutil.copyfileobj(tar.extractfile(member), f, CHUNK)
                        f.flush()
                        os.fsync(f.fileno())
                    bar.update(raw.tell() - bar.n)
                while plain.read(CHUNK):  # to its end, where gzip's checksum is
                    pass
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as e:
        shutil.rmtree(scratch)
        raise SystemExit(f"{archive} is damaged ({e}); delete it and run download again") from None
    if skipped:
        note(f"{archive}: left out {skipped} members that are not shards")
    if not any(shard_number(name) >= 0 for name in os.listdir(scratch)):
        shutil.rmtree(scratch)
        raise SystemExit(f"{archive} holds no data00.json, data01.json, …; delete it and check --url=URL")
    replace_folder(scratch, folder)


def is_shard(member: tarfile.TarInfo, folder: str) -> bool:
    try:
        tarfile.data_filter(member, folder)
    except tarfile.FilterError:
        return False
    return member.isreg() and shard_number(member.name) >= 0


def download(data_dir: str, small: bool, url: str | None, tokenizer_url: str, force: bool) -> None:
    """Stage `download`: the stories (`small`: only those for validation) and the Llama 2 tokenizer."""
    os.makedirs(data_dir, exist_ok=True)
    folder = stories_dir(data_dir)
    url = url or (SMALL_URL if small else STORIES_URL)
    file = os.path.join(data_dir, "TinyStories-valid.txt" if small else "TinyStories_all_data.tar.gz")
    if os.path.isdir(folder) and not force:
        print(f"{folder} is already there: {len(os.listdir(folder))} files; --force replaces it")
    else:
        fetch_once(url + os.path.basename(file) * url.endswith("/"), file)
        if small:
            import_files([file], data_dir, force=force)
        else:
            extract(file, folder)
            print(f"{folder}: {len(shard_files(data_dir))} shards; {file} is no longer needed")
    model = tokenizer_path(data_dir, 0)
    fetch_once(tokenizer_url, model, TOKENIZER_SHA256, "--tokenizer_url")
    print(f"{Tokenizer(model).export()}: the Llama 2 tokenizer for run.c")
    print(f"next: {command('pretokenize', data_dir)}  (or first train_vocab, for a smaller vocabulary)")


def fetch_once(url: str, path: str, sha256: str | None = None, flag: str = "--url") -> None:
    if os.path.exists(path):
        print(f"{path} is already there")
    else:
        fetch(url, path, sha256, flag)


# ---- shards: read, import, synth ---------------------------------------------------------------------

def shard_number(path: str) -> int:
    """12 for …/data12.json; -1 for what is no shard."""
    match = re.fullmatch(r"data(\d+)\.json", os.path.basename(path))
    return int(match[1]) if match else -1


def shard_files(data_dir: str) -> list[str]:
    """Paths of the text shards by number: the first is data00, for validation; at least one more follows."""
    folder = stories_dir(data_dir)
    if not os.path.isdir(folder) and os.path.isdir(folder + ".old"):  # killed inside replace_folder
        os.rename(folder + ".old", folder)
    names = os.listdir(folder) if os.path.isdir(folder) else []
    names = sorted((name for name in names if shard_number(name) >= 0), key=shard_number)
    if not names:
        raise SystemExit(f"no stories in {folder}; run: {command('download', data_dir)} "
                         "(or synth, or import FILE)")
    if shard_number(names[0]) or len(names) < 2:
        raise SystemExit(f"{folder} needs data00.json for validation and another shard for training; "
                         f"run: {command('download', data_dir, more='--force')} (or synth, or import FILE)")
    return [os.path.join(folder, name) for name in names]


def empty_folder(path: str) -> str:
    shutil.rmtree(path, ignore_errors=True)
    os.makedirs(path)
    return path


def replace_folder(new: str, folder: str) -> None:
    """Rename `new` to `folder`. Until then the old one is .old, where shard_files finds it after a crash."""
    old = folder + ".old"
    if os.path.isdir(folder):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def read_text(path: str, progress: Callable[[int], object]) -> Iterator[str]:
    """Pieces of a UTF-8 file without its BOM, \\r\\n as \\n; progress(bytes) after each. Bounded memory."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    newlines = io.IncrementalNewlineDecoder(utf8, translate=True)
    offset = 0
    with open(path, "rb") as f:
        while True:
            data = f.read(CHUNK)
            try:
                text = newlines.decode(data, final=not data)
            except UnicodeDecodeError as e:
                at = offset + len(data) - len(e.object) + e.start
                raise SystemExit(f"{path} is not UTF-8: byte {at} is 0x{e.object[e.start]:02x}; "
                                 f"convert it first: iconv -f latin1 -t utf-8 {path}") from None
            yield text
            offset += len(data)
            progress(len(data))
            if not data:
                return


def read_pieces(path: str, separator: str, progress: Callable[[int], object]) -> Iterator[str]:
    """What stands between separators in a text file; "blank" means one or more blank lines."""
    split = re.compile(r"\n\s*\n" if separator == "blank" else re.escape(separator)).split
    rest = ""
    for text in read_text(path, progress):
        *whole, rest = split(rest + text)
        yield from filter(str.strip, whole) if separator == "blank" else whole
        if len(rest) > LONGEST_STORY:
            raise SystemExit(f"{path} has {LONGEST_STORY >> 20} million characters without {separator!r}; "
                             "say what ends a story: --separator=blank (blank lines) or --separator=TEXT")
    if rest.strip():
        yield rest


class JsonList:
    """Iterate over the items of a JSON list in a file, holding no more than a piece of it."""

    def __init__(self, path: str, progress: Callable[[int], object]):
        self.path, self.pieces = path, read_text(path, progress)
        self.text, self.at, self.line, self.count = "", 0, 1, 0
        self.decode = json.JSONDecoder().raw_decode
        self.skip_space = re.compile(r"[ \t\n]*").match

    def __iter__(self) -> Iterator:
        if self.peek() != "[":
            self.fail("not a JSON list", self.at)
        self.at += 1
        empty = self.peek() == "]"
        self.at += empty
        mark = "]" if empty else ","
        while mark == ",":
            self.peek()
            yield self.item()
            self.count += 1
            mark = self.peek()
            if mark not in (",", "]"):
                self.fail("expected ',' or ']'" if mark else "the file ends inside the list", self.at)
            self.at += 1
        if self.peek():
            self.fail("text after the list", self.at)

    def peek(self) -> str:
        """The next character that is no space; "" at the end of the file."""
        while True:
            self.at = self.skip_space(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.refill():
                return ""

    def item(self):
        while True:
            try:
                value, self.at = self.decode(self.text, self.at)
                return value
            except json.JSONDecodeError as e:
                # cut off by the end of the text we hold, or wrong? "\ud83" and "fals" end close to it
                cut = e.msg.startswith("Unterminated") or e.pos >= len(self.text) - 16
                if not cut or len(self.text) - self.at > LONGEST_STORY or not self.refill():
                    self.fail(e.msg, e.pos)
            except RecursionError:
                self.fail("nested too deeply", self.at)

    def refill(self) -> bool:
        """Drop what was read and at least double the rest (so that long items cost linear time)."""
        rest = len(self.text) - self.at
        more: list[str] = []
        while sum(map(len, more)) <= rest and (piece := next(self.pieces, None)) is not None:
            more.append(piece)
        if any(more):
            self.line += self.text.count("\n", 0, self.at)
            self.text, self.at = self.text[self.at:] + "".join(more), 0
        return any(more)

    def fail(self, what: str, position: int):
        line = self.line + self.text.count("\n", 0, position)
        raise SystemExit(f"{self.path}, line {line}, item {self.count}: {what}; "
                         "repair the file, or make it again")


def text_of(item: object, field: str | None, where: str) -> str:
    """The text of a JSON item: itself, or what it has under `field` (default: story, else text)."""
    if isinstance(item, str):
        return item
    if not isinstance(item, dict):
        raise SystemExit(f"{where}: expected a text or an object with one, found {json.dumps(item)[:40]}")
    names = [field] if field else ["story", "text"]
    for name in names:
        if isinstance(item.get(name), str):
            return item[name]
    raise SystemExit(f"{where}: no text under {' or '.join(names)}, only {', '.join(map(repr, item))[:80]}; "
                     "name the field: --field=NAME")


def read_stories(path: str, progress: Callable[[int], object], separator: str = "<|endoftext|>",
                 field: str | None = None) -> Iterator[str]:
    """The stories of a .json, .jsonl or text file, as they stand there. SystemExit names the place."""
    kind = os.path.splitext(path)[1].lower()
    if kind == ".json":
        for i, item in enumerate(JsonList(path, progress)):
            yield text_of(item, field, f"{path}, item {i}")
    elif kind in (".jsonl", ".ndjson"):
        for i, line in enumerate(read_pieces(path, "\n", progress), start=1):
            if line.strip():
                try:
                    item = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as e:
                    raise SystemExit(f"{path}, line {i}: {e}; each line must be a JSON object") from None
                yield text_of(item, field, f"{path}, line {i}")
    else:
        yield from read_pieces(path, separator, progress)


def write_shards(stories: Iterable[str], data_dir: str, num_shards: int, seed: int, force: bool) -> None:
    """Deal stories out to shards; the folder appears when all are written.

    Of each `num_shards` stories in a row every shard gets one, by a seeded shuffle: shard 00 is a fair sample
    of the whole, and memory does not grow. With fewer stories than that there is a shard for each.
    """
    refuse_existing(data_dir, force)
    empty = 0

    def not_empty() -> Iterator[str]:
        nonlocal empty
        for text in map(str.strip, stories):
            empty += not text
            if text:
                yield text

    kept = not_empty()
    block = list(itertools.islice(kept, num_shards))
    if len(block) < 2:
        raise SystemExit(f"found {len(block)} stories and need 2, one of them for validation; "
                         "is --separator right? --separator=blank splits at blank lines")
    folder = stories_dir(data_dir)
    scratch = empty_folder(folder + ".tmp")
    rng = random.Random(seed)
    counts = [0] * len(block)
    with ExitStack() as stack:
        files = [stack.enter_context(open(os.path.join(scratch, f"data{i:02d}.json"), "w", encoding="utf-8"))
                 for i in range(len(block))]
        while block:
            for i, text in zip(rng.sample(range(len(files)), len(block)), block):
                files[i].write(",\n" if counts[i] else "[\n")
                json.dump({"story": text}, files[i])
                counts[i] += 1
            block = list(itertools.islice(kept, num_shards))
        for f in files:
            f.write("\n]\n")
            f.flush()
            os.fsync(f.fileno())
    replace_folder(scratch, folder)
    print(f"{folder}: {sum(counts):,} stories in {len(counts)} shards, {counts[0]:,} of them for validation"
          + f" ({empty:,} empty ones left out)" * bool(empty))
    print(f"next: {command('train_vocab', data_dir, 4096)}")


def refuse_existing(data_dir: str, force: bool) -> None:
    folder = stories_dir(data_dir)
    if os.path.isdir(folder) and not force:
        raise SystemExit(f"{folder} already holds stories; --force replaces them, "
                         "--data_dir=DIR puts these elsewhere")


def import_files(paths: list[str], data_dir: str, separator: str = "endoftext", field: str | None = None,
                 num_shards: int = 10, seed: int = 1337, force: bool = False) -> None:
    """Stage `import`: stories of text and JSON files into shards. Streams: memory stays flat at any size."""
    refuse_existing(data_dir, force)
    separator = "<|endoftext|>" if separator == "endoftext" else separator.replace("\\n", "\n")
    for path in paths:
        if not os.path.isfile(path):
            raise SystemExit(f"no such file: {path}; run: {command('import', data_dir, more='FILE.txt')} "
                             "(or .json, .jsonl)")
    with progress_bar("importing", sum(map(os.path.getsize, paths))) as bar:
        write_shards((story for path in paths for story in read_stories(path, bar.update, separator, field)),
                     data_dir, num_shards, seed, force)


def synth(data_dir: str, num_stories: int, num_shards: int, seed: int, force: bool) -> None:
    """Stage `synth`. Story i depends on the seed and i alone, not on the machine or num_stories."""
    stories = (synth_story(random.Random(f"{seed}:{i}")) for i in range(num_stories))
    stories = tqdm(stories, "writing", num_stories, disable=None, leave=False)
    write_shards(stories, data_dir, num_shards, seed, force)


# --- synth grammar ---
NAMES = ["Tom", "Lily", "Sam", "Mia", "Ben", "Anna"]
THINGS = ["ball", "kite", "boat", "cake", "drum", "hat"]
PLACES = ["park", "garden", "forest", "kitchen", "barn"]


def synth_story(rng: random.Random) -> str:
    name, friend = rng.sample(NAMES, 2)
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    return (f"Once upon a time, there was a child named {name}. {name} had a red {thing}. One day, {name} "
            f"lost the {thing} in the {place}. \"Can you help me?\" {name} asked. {friend} looked for "
            f"{rng.randint(2, 9)} minutes and found the {thing}.\n{name} was happy and said, \"Thank you!\"")
# --- end of synth grammar ---


# ---- train_vocab -------------------------------------------------------------------------------------

def train_vocab(data_dir: str, vocab_size: int, num_shards: int) -> None:
    """Stage `train_vocab`: a byte-pair vocabulary made as Llama 2's was, from training shards only."""
    if not 0 < vocab_size <= MAX_VOCAB:
        raise SystemExit(f"--vocab_size={vocab_size} is not between 1 and {MAX_VOCAB} (16 bits per token); "
                         f"run: {command('train_vocab', data_dir, 4096)}")
    shards = shard_files(data_dir)[1:1 + num_shards]
    model = tokenizer_path(data_dir, vocab_size)
    failure: list[SystemExit] = []

    def lines() -> Iterator[str]:
        try:
            with progress_bar("reading", sum(map(os.path.getsize, shards))) as bar:
                for shard in shards:
                    for story in read_stories(shard, bar.update):
                        yield from (whole(line) for line in story.strip().split("\n") if line)
        except SystemExit as e:  # sentencepiece would wrap it in a RuntimeError of several lines
            failure.append(e)
            raise

    proto = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(), model_writer=proto, model_type="bpe", vocab_size=vocab_size,
            # as in Llama 2's vocabulary
            byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True, character_coverage=1.0,
            normalization_rule_name="identity", unk_surface=r" \342\201\207 ",
            input_format="text",
            remove_extra_whitespaces=False,  # older versions implied it; run.c does not merge spaces either
            max_sentence_length=1 << 30,  # the default drops lines over 4,192 bytes in silence
            num_threads=16,  # the options go into the file, which must not depend on this machine's cores
            minloglevel=2)
    except RuntimeError as e:
        raise failure[0] if failure else vocab_error(str(e), data_dir, vocab_size) from None
    with atomic_write(model) as f:
        f.write(proto.getvalue())
    print(f"{model}: {vocab_size} pieces from {len(shards)} shards; next: "
          + command("pretokenize", data_dir, vocab_size))


def vocab_error(message: str, data_dir: str, vocab_size: int) -> SystemExit:
    """sentencepiece's complaint in our words, with the size to type instead."""
    small = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    large = re.search(r"Please set it to a value <= (\d+)", message)
    if small:
        return SystemExit(f"--vocab_size={vocab_size} is too small: this text's characters need {small[1]}; "
                          f"run: {command('train_vocab', data_dir, int(small[1]))} (or larger)")
    if large:
        return SystemExit(f"--vocab_size={vocab_size} is too large: this text gives {large[1]} pieces; "
                          f"run: {command('train_vocab', data_dir, int(large[1]))} (or smaller)")
    return SystemExit(f"sentencepiece cannot train on these stories: {message.splitlines()[0]}; "
                      f"check them, or replace them: {command('import', data_dir, more='--force FILE')}")


# ---- pretokenize -------------------------------------------------------------------------------------

def pretokenize(data_dir: str, vocab_size: int, force: bool, num_workers: int) -> None:
    """Stage `pretokenize`: every shard as uint16 tokens, a shard per process at a time.

    Shards that are done already, also by an interrupted run, are skipped. meta.json says what the shards
    hold and comes last; while it is missing nothing can be read.
    """
    if not 0 <= vocab_size <= MAX_VOCAB:
        raise SystemExit(f"--vocab_size={vocab_size} is not between 0 (Llama 2's) and {MAX_VOCAB} "
                         f"(16 bits per token); run: {command('pretokenize', data_dir, 4096)}")
    tokenizer = Tokenizer(tokenizer_path(data_dir, vocab_size))
    if vocab_size not in (0, tokenizer.vocab_size) or tokenizer.vocab_size > MAX_VOCAB:
        raise SystemExit(f"{tokenizer.model_path} has {tokenizer.vocab_size} pieces, "
                         f"not {vocab_size or 32000}; run: "
                         + command("train_vocab", data_dir, vocab_size or 4096))
    sources = shard_files(data_dir)
    folder = token_dir(data_dir, vocab_size)
    os.makedirs(folder, exist_ok=True)
    head = {"format": META_FORMAT, "vocab_size": tokenizer.vocab_size, "tokenizer_sha256": tokenizer.sha256,
            "bos_id": tokenizer.bos_id}
    done = {} if force else shards_done(folder, head, sources)
    todo = [source for source in sources if os.path.basename(source) not in done]
    final, partial = os.path.join(folder, "meta.json"), os.path.join(folder, "meta.json.partial")

    def save(path: str) -> None:
        shards = [done[os.path.basename(source)] for source in sources if os.path.basename(source) in done]
        with atomic_write(path, "w") as f:
            json.dump(head | {"shards": shards}, f, indent=1)

    if todo or not os.path.exists(final):
        save(partial)
        if os.path.exists(final):
            os.remove(final)
        for entry in tokenize_shards(todo, folder, tokenizer.model_path, num_workers):
            done[entry["source"]] = entry
            save(partial)
    save(final)
    if os.path.exists(partial):
        os.remove(partial)
    stories, tokens, size = (sum(done[os.path.basename(s)][key] for s in sources)
                             for key in ("stories", "tokens", "bytes"))
    print(f"{folder}: {stories:,} stories, {tokens:,} tokens, {size / max(tokens, 1):.2f} bytes each"
          + f" ({len(sources) - len(todo)} of {len(sources)} shards were up to date)" * (todo != sources))
    flags = f"--vocab_source=custom --vocab_size={vocab_size}" if vocab_size else "--vocab_source=llama2"
    print(f"next: python train.py {flags}" + f" --data_dir={data_dir}" * (data_dir != "data"))


def source_state(source: str) -> dict:
    """What tells one version of a text shard from another, without reading it."""
    stat, name = os.stat(source), os.path.basename(source)
    return {"source": name, "source_bytes": stat.st_size, "source_mtime_ns": stat.st_mtime_ns}


def shards_done(folder: str, head: dict, sources: list[str]) -> dict[str, dict]:
    """Entries, by source, of token shards that a run like this one has already written and that are whole."""
    done = {}
    for name in ("meta.json", "meta.json.partial"):
        try:
            with open(os.path.join(folder, name), encoding="utf-8") as f:
                meta = json.load(f)
            if head.items() <= meta.items():
                done |= {entry["source"]: entry for entry in meta["shards"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # missing or damaged: do its shards again
    return {entry["source"]: entry for source in sources
            if (entry := done.get(os.path.basename(source))) and source_state(source).items() <= entry.items()
            and file_size(os.path.join(folder, entry["name"])) == 2 * entry["tokens"]}


def file_size(path: str) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else -1


def tokenize_shard(source: str, folder: str, tokenizer: Tokenizer, progress: Callable[[int], object]) -> dict:
    """Write one token shard as a stream; returns its entry for meta.json. Empty stories are left out."""
    name = os.path.splitext(os.path.basename(source))[0] + ".bin"
    state = source_state(source)
    stories = tokens = size = 0
    digest = hashlib.sha256()
    with atomic_write(os.path.join(folder, name)) as f:
        for i, story in enumerate(read_stories(source, progress)):
            story = story.strip()
            if not story:
                continue
            try:
                packed = tokenizer.pack(story)
            except (RuntimeError, ValueError, MemoryError) as e:
                raise SystemExit(f"{source}, item {i}: {type(e).__name__}: {e}; "
                                 "remove or repair that story") from None
            f.write(packed)
            digest.update(packed)
            stories += 1
            tokens += len(packed) // 2
            size += len(story.encode("utf-8", "replace"))
    return {"name": name, "tokens": tokens, "stories": stories, "bytes": size,
            "sha256": digest.hexdigest(), **state}


def tokenize_shards(sources: list[str], folder: str, model: str, num_workers: int) -> Iterator[dict]:
    """tokenize_shard for each source, in processes. Raises SystemExit at the first that fails or dies."""
    sources = sorted(sources, key=os.path.getsize, reverse=True)  # the largest first: no long tail at the end
    turn = multiprocessing.Value("q", 0)
    running = {}
    for _ in range(min(num_workers, len(sources))):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.Process(target=tokenize_worker, daemon=True,
                                          args=(sources, turn, folder, model, theirs, os.getpid()))
        process.start()
        theirs.close()  # so that only the worker holds it, and its death is the end of the file for us
        running[ours] = process
    try:
        with progress_bar("tokenizing", sum(map(os.path.getsize, sources))) as bar:
            while running:
                for pipe in multiprocessing.connection.wait(list(running)):
                    try:
                        what, value = pipe.recv()
                    except EOFError:
                        running[pipe].join()
                        code = running[pipe].exitcode
                        raise SystemExit(f"a worker died (exit code {code}; -9: killed, perhaps for memory); "
                                         "run the same again to go on, with fewer --num_workers") from None
                    if what == "error":
                        raise SystemExit(value)
                    if what == "bytes":
                        bar.update(value)
                    elif what == "shard":
                        yield value
                    else:
                        running.pop(pipe).join()
    finally:
        for process in running.values():
            process.terminate()


def tokenize_worker(sources: list[str], turn, folder: str, model: str, pipe, parent: int) -> None:
    """A process: take the next shard until there is none.

    Sends ("bytes", n) as it reads, ("shard", entry) for each, then ("end", None) or ("error", line).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us

    def progress(size: int) -> None:
        if os.getppid() != parent:  # killed: nobody will write meta.json
            os._exit(1)
        pipe.send(("bytes", size))

    source = "the tokenizer"
    try:
        tokenizer = Tokenizer(model)
        while True:
            with turn.get_lock():
                mine, turn.value = turn.value, turn.value + 1
            if mine >= len(sources):
                return pipe.send(("end", None))
            source = sources[mine]
            pipe.send(("shard", tokenize_shard(source, folder, tokenizer, progress)))
    except SystemExit as e:
        pipe.send(("error", str(e)))
    except Exception as e:  # the edge of the process: whatever it is, the parent must hear of it
        pipe.send(("error", f"{source}: {type(e).__name__}: {e}; run the same again to go on"))


# ---- TokenBatches ------------------------------------------------------------------------------------

class TokenBatches:
    """Batches of (x, y), int64 tensors of shape (batch_size, max_seq_len) where y is x one token later.

    train: endless. The training shards are one ring of N tokens. In epoch e the ring is cut at a random
    offset into ceil(N / max_seq_len) windows, taken in random order, both from the generator [seed, e]; the
    last window runs on over the cut. So every token is a target in every epoch, none is lost at the end of a
    shard, and epochs differ in where they cut. Batches take the next windows, also over the end of an epoch.
    val: shard 00 from its start, anew with every iter(); every token but the first is a target once. The
    last window is filled up with x = BOS and y = -1, which the loss ignores, and so are missing rows.

    Batch k of all goes to rank k % world_size: 1 rank with 2 micro-batches sees what 2 ranks with 1 see.
    Raises SystemExit when the shards are missing, or are not of this vocabulary and tokenizer.
    """

    def __init__(self, token_dir: str, split: str, batch_size: int, max_seq_len: int, *, seed: int = 0,
                 rank: int = 0, world_size: int = 1, vocab_size: int | None = None,
                 tokenizer_sha256: str | None = None, max_batches: int | None = None):
        """`max_batches` ends the val split after so many batches of all ranks together."""
        assert split in ("train", "val") and 0 <= rank < world_size
        self.dir, self.split = token_dir, split
        self.batch_size, self.max_seq_len, self.max_batches = batch_size, max_seq_len, max_batches
        self.seed, self.rank, self.world_size = seed, rank, world_size
        meta = read_meta(token_dir, vocab_size, tokenizer_sha256)
        self.bos_id: int = meta["bos_id"]
        shards = meta["shards"][1:] if split == "train" else meta["shards"][:1]
        self.ends = np.cumsum([shard["tokens"] for shard in shards])  # where each shard ends in the ring
        self.num_tokens = int(self.ends[-1])
        if self.num_tokens < 2:
            raise SystemExit(f"the {split} shards in {token_dir} hold no text; put more stories in: "
                             "python tinystories.py import --force FILE, then run pretokenize")
        self.bytes_per_token: float = sum(shard["bytes"] for shard in shards) / self.num_tokens
        sums = "".join(shard["sha256"] for shard in shards)
        self.fingerprint = int(hashlib.sha256(sums.encode()).hexdigest()[:15], 16)
        self._paths = [os.path.join(token_dir, shard["name"]) for shard in shards]
        self._maps: dict[int, np.ndarray] = {}
        self._epoch = (-1, 0, np.empty(0, np.int64))  # number, offset, order of windows
        self._start = 0  # windows consumed when this state was made or loaded
        self._batch = 0  # batches this rank took since

    def __iter__(self) -> "TokenBatches":
        if self.split == "val":
            self._batch = 0
        return self

    def __next__(self):
        import torch  # 2.8 s, which only training should pay

        k = self._batch * self.world_size + self.rank
        first = self._start + k * self.batch_size
        if self.split == "val":
            windows = -(-(self.num_tokens - 1) // self.max_seq_len)
            if first >= windows or self.max_batches is not None and k >= self.max_batches:
                raise StopIteration
            rows = self._val_rows(first)
        else:
            rows = self._train_rows(first)
        self._batch += 1
        x, y = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
        if self.split == "val":
            x[x < 0] = self.bos_id
        return torch.from_numpy(x), torch.from_numpy(y)

    def _train_rows(self, first: int) -> np.ndarray:
        """(B, T + 1) tokens of the windows first, first + 1, … of the endless sequence."""
        T = self.max_seq_len
        per_epoch = -(-self.num_tokens // T)
        rows = np.empty((self.batch_size, T + 1), np.int64)
        for row, window in enumerate(range(first, first + self.batch_size)):
            epoch, i = divmod(window, per_epoch)
            if epoch != self._epoch[0]:
                rng = np.random.default_rng([self.seed, epoch])
                self._epoch = (epoch, int(rng.integers(T)), rng.permutation(per_epoch))
            self._read((self._epoch[1] + int(self._epoch[2][i]) * T) % self.num_tokens, rows[row])
        return rows

    def _val_rows(self, first: int) -> np.ndarray:
        """(B, T + 1) tokens of the windows from `first` on, -1 after the end of the shard."""
        T = self.max_seq_len
        rows = np.full((self.batch_size, T + 1), -1, np.int64)
        for row in range(self.batch_size):
            start = (first + row) * T
            if start < self.num_tokens - 1:
                self._read(start, rows[row, :min(T + 1, self.num_tokens - start)])
        return rows

    def _read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the ring's tokens from `start` on, as many times around as it takes."""
        done = 0
        while done < len(out):
            shard = bisect_right(self.ends, start)
            tokens = self._shard(shard)
            at = start - (int(self.ends[shard]) - len(tokens))
            part = tokens[at:at + len(out) - done]
            out[done:done + len(part)] = part
            done += len(part)
            start = (start + len(part)) % self.num_tokens

    def _shard(self, i: int) -> np.ndarray:
        if i not in self._maps:
            empty = self.ends[i] == (self.ends[i - 1] if i else 0)  # which cannot be mapped
            self._maps[i] = np.empty(0, "<u2") if empty else np.memmap(self._paths[i], dtype="<u2", mode="r")
        return self._maps[i]

    def state_dict(self) -> dict[str, int]:
        """Where the data stands: the same on all ranks once each has taken as many batches."""
        windows = self._start + self._batch * self.world_size * self.batch_size
        return {"windows": windows, "seed": self.seed, "max_seq_len": self.max_seq_len,
                "num_tokens": self.num_tokens, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on exactly there, with any batch size and number of ranks. Raises SystemExit for other data."""
        for key in ("max_seq_len", "num_tokens", "fingerprint"):
            if state[key] != getattr(self, key):
                raise SystemExit(f"this run was trained on other data than {self.dir} gives now ({key} was "
                                 f"{state[key]}, is {getattr(self, key)}); put it back, or start anew from "
                                 "its weights: python train.py --init_from=CKPT")
        self.seed, self._start, self._batch = state["seed"], state["windows"], 0
        self._epoch = (-1, 0, self._epoch[2])


def read_meta(folder: str, vocab_size: int | None = None, tokenizer_sha256: str | None = None) -> dict:
    """The meta.json of a token folder, checked against the files and what is expected of them."""
    data_dir, name = os.path.split(os.path.normpath(folder))
    size = name.removeprefix("tok")
    again = "run: " + command("pretokenize", data_dir or ".", int(size) if size.isdigit() else 0)
    try:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
            meta = json.load(f)
        shards = meta["shards"]
        sizes = [file_size(os.path.join(folder, shard["name"])) == 2 * shard["tokens"] for shard in shards]
        found, sha256, version = meta["vocab_size"], meta["tokenizer_sha256"], meta["format"]
    except FileNotFoundError:
        cut = os.path.exists(os.path.join(folder, "meta.json.partial"))
        what = "an unfinished pretokenize" if cut else "no token shards"
        raise SystemExit(f"{what} in {folder}; {again}") from None
    except (ValueError, KeyError, TypeError):
        raise SystemExit(f"{folder}/meta.json is damaged; {again} --force") from None
    if version != META_FORMAT:
        raise SystemExit(f"{folder} has format {version}, not {META_FORMAT}; {again} --force")
    if vocab_size is not None and found != vocab_size:
        raise SystemExit(f"{folder} holds tokens of a vocabulary of {found}, not {vocab_size}; "
                         f"give --vocab_size={found}, or {again}")
    if tokenizer_sha256 is not None and sha256 != tokenizer_sha256:
        raise SystemExit(f"{folder} was made with another tokenizer than {folder}.model is now; {again}")
    if not all(sizes):
        name = shards[sizes.index(False)]["name"]
        raise SystemExit(f"{folder}/{name} is missing or not of its size; {again}")
    if len(shards) < 2:
        raise SystemExit(f"{folder} needs a shard for validation and one for training; {again} --force")
    return meta


# ---- command line ------------------------------------------------------------------------------------

def positive(value: str) -> int:
    if not value.isdecimal() or not int(value):
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number above 0")
    return int(value)


def shard_count(value: str) -> int:
    if not 2 <= positive(value) <= 1000:
        raise argparse.ArgumentTypeError(f"{value} is not between 2 and 1000 (one is for validation)")
    return int(value)


def make_cli() -> CommandLine:
    cli = CommandLine(prog="tinystories.py", description=__doc__)
    stages = cli.add_subparsers(dest="stage", required=True, metavar="STAGE",
                                help=f"{', '.join(STAGES)}; STAGE --help tells more")

    def stage(name: str, run: Callable, summary: str) -> CommandLine:
        parser = stages.add_parser(name, help=summary, description=summary + ".",
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        parser.add_argument("--data_dir", default="data", help="folder for everything this script writes")
        parser.set_defaults(run=run, parser=parser)
        return parser

    def force(parser: CommandLine, what: str) -> None:
        parser.add_argument("--force", action="store_true", help=what)

    p = stage("download", download, "Download TinyStories (1.5 GB) and the Llama 2 tokenizer")
    p.add_argument("--small", action="store_true", help="only TinyStories-valid.txt (20 MB), as shards")
    p.add_argument("--url", help="a mirror of the archive (--small: of the .txt); ending in / it is a folder")
    p.add_argument("--tokenizer_url", default=TOKENIZER_URL, help="a mirror of the Llama 2 tokenizer.model")
    force(p, "replace the stories that are there")

    p = stage("import", import_files, "Make shards of your own text: .txt, .json, .jsonl")
    p.add_argument("paths", nargs="+", metavar="FILE", help="text, a JSON list, or a JSON object per line")
    p.add_argument("--separator", default="endoftext", help="what stands between the stories of a text file: "
                   "endoftext (<|endoftext|>), blank (blank lines), or any other text, \\n being a new line")
    p.add_argument("--field", help="where a JSON object has its text (default: story, else text)")
    p.add_argument("--num_shards", type=shard_count, default=10, help="files to make, one for validation")
    p.add_argument("--seed", type=int, default=1337, help="decides which stories are for validation")
    force(p, "replace the stories that are there")

    p = stage("synth", synth, "Make up simple stories from a built-in grammar; needs no network")
    p.add_argument("--num_stories", type=positive, default=20000, help="how many")
    p.add_argument("--num_shards", type=shard_count, default=10, help="files to make, one for validation")
    p.add_argument("--seed", type=int, default=1337, help="another seed, other stories")
    force(p, "replace the stories that are there")

    p = stage("train_vocab", train_vocab, "Train a vocabulary on the training shards")
    p.add_argument("--vocab_size", type=int, required=True, help=f"pieces, at most {MAX_VOCAB}")
    p.add_argument("--num_shards", type=positive, default=10, help="how many training shards to read")

    p = stage("pretokenize", pretokenize, "Turn the stories into tokens")
    p.add_argument("--vocab_size", type=int, default=0, help="a vocabulary from train_vocab; 0: Llama 2's")
    p.add_argument("--num_workers", type=positive, default=len(os.sched_getaffinity(0))
                   if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, help="processes")
    force(p, "also the shards that are up to date")
    return cli


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    cli = make_cli()
    if argv and argv[0].startswith("--"):  # as in llama2.c, options may come first
        argv.sort(key=lambda arg: arg not in STAGES)
    args = vars(cli.parse_args(argv))
    run = args.pop("run")
    del args["stage"], args["parser"]
    try:
        run(**args)
    except OSError as e:
        raise SystemExit(f"{e.filename or 'cannot go on'}: {e.strerror or e}; "
                         "free space or check the folder, then run the same again") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; run the same again to go on") from None


if __name__ == "__main__":
    main()
