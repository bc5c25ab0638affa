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
import glob
import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import reprlib
import shlex
import shutil
import signal
import sys
import tarfile
import threading
import time
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from typing import IO

try:
    import resource
except ModuleNotFoundError:  # on Windows
    resource = None
try:
    import numpy as np
    import sentencepiece
    from tqdm import tqdm
except ModuleNotFoundError as e:
    raise SystemExit(f"{e.name} is not installed for Python {sys.version.split()[0]}; run: "
                     ". .venv/bin/activate, or with 3.11 or newer: pip install -r requirements.txt") from None

from tokenizer import CommandLine, Tokenizer, atomic_write, forget, kept_path, lock, tokenizer_path, whole

STORIES_URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories_all_data.tar.gz"
SMALL_URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories-valid.txt"
TOKENIZER_URL = "https://raw.githubusercontent.com/karpathy/llama2.c/master/tokenizer.model"
TOKENIZER_SHA256 = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"

TIMEOUT = (10, 30)  # seconds to connect, and without a byte before a download counts as stalled
TRIES = 5  # failed attempts in a row that bring not one new byte
BACKOFF = 1.0  # seconds before the second try, doubled for each one after it
CHUNK = 1 << 20  # characters or bytes read at a time
BATCH = 1 << 18  # characters tokenized at a time
LONGEST_STORY = 64 << 20  # characters; more without an end means that the format was guessed wrong
HEADERS = 1 << 20  # bytes that an archive may have between two of its files
CONFUSED = (ValueError, OverflowError, IndexError, RecursionError, MemoryError)  # tarfile by hostile input
MAX_VOCAB = 65536  # ids are stored as uint16
MIN_VOCAB = 259
MAX_SHARDS = 1000
BLOCK = 1 << 20  # bytes of a token shard that share a checksum
META_FORMAT = 2


# ---- paths and messages ------------------------------------------------------------------------------

def stories_dir(data_dir: str) -> str:
    return os.path.join(data_dir, "TinyStories_all_data")


def token_dir(data_dir: str, vocab_size: int) -> str:
    """The folder of the token shards: their tokenizer's path without its suffix."""
    return os.path.splitext(tokenizer_path(data_dir, vocab_size))[0]


def file_size(path: str) -> int:
    """In bytes, -1 for what is no file."""
    return os.path.getsize(path) if os.path.isfile(path) else -1


def command(stage: str, data_dir: str = "data", vocab_size: int = 0, more: str = "") -> str:
    """What to type next, for messages."""
    words = [f"python tinystories.py {stage}"]
    words += [f"--vocab_size={vocab_size}"] * (vocab_size > 0)
    words += [f"--data_dir={shlex.quote(data_dir)}"] * (data_dir != "data")
    return " ".join(words + [more] * bool(more))


@contextmanager
def claimed(data_dir: str, *names: str, shared: tuple[str, ...] = ()) -> Iterator[None]:
    """Hold locks in `data_dir` meanwhile: `names` alone, `shared` together with others that share them.

    "stories" stands for the text, "synth" for its parts to come, "tokN" for a vocabulary and its tokens.
    SystemExit if another has one.
    """
    os.makedirs(data_dir, exist_ok=True)
    with ExitStack() as stack:
        for name in (*names, *shared):
            held = lock(data_dir, f".{name}.lock", "another --data_dir", shared=name in shared)
            if held:
                stack.callback(held.close)
        yield


def progress_bar(title: str, total: int | None = None) -> tqdm:
    return tqdm(desc=title, total=total, unit="B", unit_scale=True, disable=None, leave=False)


# ---- fetch: resume, retry, checksum ------------------------------------------------------------------

class TryAgain(Exception):
    """A failure that another attempt may cure."""


def fetch(url: str, path: str, sha256: str | None = None, flag: str = "--url") -> None:
    """Download `url` to `path` unless it is there, going on where an earlier run was cut off.

    The bytes so far are in `path`.part; `path`.part.json names the version they belong to, so that halves
    of two versions are never joined. An attempt that brings new bytes resets the count of failures.
    Raises SystemExit: a bad URL or status, no network, a wrong checksum. `flag` is named in the message.
    """
    if os.path.exists(path):
        print(f"{path} is already there")
        return
    part = path + ".part"
    furthest = failures = 0
    with progress_bar(os.path.basename(path)) as bar:
        while True:
            try:
                fetch_rest(url, part, bar, flag)
                break
            except TryAgain as e:
                failures = 1 if file_size(part) > furthest else failures + 1
                furthest = max(furthest, file_size(part))
                if failures >= TRIES:
                    raise SystemExit(f"cannot download {url}: {e}; try again later (it resumes), or with no "
                                     "network: python tinystories.py synth (or import FILE), then train_vocab"
                                     ) from None
                wait = BACKOFF * 2 ** (failures - 1)
                tqdm.write(f"{e}; trying again in {wait:.3g} s", file=sys.stderr)
                time.sleep(wait)
    with open(part, "r+b") as f:  # Windows flushes only what is open for writing
        os.fsync(f.fileno())
        found = hashlib.file_digest(f, "sha256").hexdigest() if sha256 else None
    if found != sha256:
        forget(part, part + ".json")
        raise SystemExit(f"{url} has the wrong content (sha256 {found[:12]}…, not {sha256[:12]}…) and was "
                         f"dropped; run the same again, or give another address with {flag}=URL")
    os.replace(part, path)
    forget(part, part + ".json")


def fetch_rest(url: str, part: str, bar: tqdm, flag: str) -> None:
    """One request for the bytes that `part` lacks. Raises TryAgain or SystemExit."""
    import requests  # 0.14 s, which only this stage should pay
    from urllib3.exceptions import HTTPError

    have, seen = partial_download(url, part)
    if have and have == seen["total"]:
        return
    headers = {"Accept-Encoding": "identity"}  # else lengths and ranges would count compressed bytes
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": seen["version"]}
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as reply:
            if not is_rest(reply, part, have, seen, flag):
                have = 0  # a first attempt, a changed file, or a server that knows no ranges
                open(part, "wb").close()
                length = reply.headers.get("Content-Length", "")
                total = int(length) if re.fullmatch("[0-9]{1,15}", length) else None
                seen = {"url": url, "version": version_of(reply), "total": total}
                with atomic_write(part + ".json", "w") as f:
                    json.dump(seen, f)
            room = room_for(url, part, (seen["total"] or have) - have, flag)
            bar.total, bar.n = seen["total"], have
            bar.refresh()
            with open(part, "ab") as f:
                while chunk := reply.raw.read1(1 << 16, decode_content=False):
                    f.write(chunk)
                    bar.update(len(chunk))
                    have += len(chunk)
                    room -= len(chunk)
                    if room < 0:
                        raise SystemExit(f"{url} sends more and more, {have:,} bytes by now, and would fill "
                                         f"the disk; delete {part}, and check {flag}=URL")
    except (requests.Timeout, requests.ConnectionError, HTTPError) as e:  # urllib3's, while the body is read
        # of a certificate that is not trusted, or an address that does not exist, the reason lies inside
        why = getattr(e.args[0] if e.args else None, "reason", None) or type(e).__name__
        raise TryAgain(f"the connection failed after {have:,} bytes ({why})") from None
    except (requests.RequestException, ValueError) as e:  # ValueError: an address that is none
        why = " ".join(str(e).split())[:300]
        raise SystemExit(f"cannot download {url}: {why}; check {flag}=URL") from None
    if seen["total"] not in (None, have):
        raise TryAgain(f"got {have:,} of {seen['total']:,} bytes")


def room_for(url: str, part: str, size: int, flag: str) -> int:
    """How many bytes a reply may bring: a part of the disk stays free whatever the server sends."""
    free = shutil.disk_usage(os.path.dirname(part) or ".").free
    room = free - free // 20
    if size > room:
        raise SystemExit(f"{url} has {size:,} bytes more, and the disk {free:,} free; make room, then run "
                         f"the same again, or check {flag}=URL")
    return room


def partial_download(url: str, part: str) -> tuple[int, dict]:
    """Bytes of `url` in `part` that can be gone on from (0: start over), and what the server said of them."""
    try:
        with open(part + ".json", encoding="utf-8") as f:
            seen = json.load(f)
        version, total = seen["version"], seen["total"]
        if seen["url"] == url and re.fullmatch("[!-~]([ -~]*[!-~])?", version) and type(total) is int:
            return os.path.getsize(part), seen
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        pass  # none, or a damaged note: start over
    return 0, {}


def version_of(reply) -> str:
    """What tells this version of a file from others; "" if nothing does."""
    tag = reply.headers.get("ETag", "W/")  # W/ marks a weak one, of no use for ranges
    return reply.headers.get("Last-Modified", "") if tag.startswith("W/") else tag


def is_rest(reply, part: str, have: int, seen: dict, flag: str) -> bool:
    """Does the reply hold what comes after the `have` bytes that are here? False: the whole file."""
    status, why = reply.status_code, f"the server says {reply.status_code} {reply.reason}"
    if status == 200:
        return False
    if status == 206 and have and version_of(reply) in ("", seen["version"]):  # some ignore If-Range
        if reply.headers.get("Content-Range") == f"bytes {have}-{seen['total'] - 1}/{seen['total']}":
            return True
    if status in (206, 416):  # not the range that was asked for: what we have is of no use
        forget(part, part + ".json")
        raise TryAgain("the server has another version of the file")
    if status in (408, 425, 429) or status >= 500:
        raise TryAgain(why)
    raise SystemExit(f"cannot download {reply.url}: {why}; check {flag}=URL")


class LimitedReader:
    """A file to read, of which tarfile may take no more at once than it has reason to.

    It keeps long names and the like in memory, however long they claim to be.
    """

    def __init__(self, f: IO[bytes]):
        self._f, self.allowed = f, HEADERS

    def read(self, size: int) -> bytes:
        data = self._f.read(size)
        self.allowed -= len(data)
        if self.allowed < 0:
            raise tarfile.ReadError("a header is too long")
        return data


def extract(archive: str, folder: str) -> None:
    """Unpack the dataNN.json files of a .tar.gz into `folder`, which appears whole or not at all.

    Only regular files are taken, each under the last part of its name: no path or link leads elsewhere. What
    unpacks to over a hundred times its size, or to more than the disk has room for, is refused.
    """
    with new_folder(folder) as scratch:
        try:
            take_shards(archive, scratch)
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, *CONFUSED) as e:
            raise SystemExit(f"{archive} is damaged ({e}); delete it and run download again") from None
        if not os.listdir(scratch):
            raise SystemExit(f"{archive} holds no data00.json, data01.json, …; delete it and check --url=URL")


def take_shards(archive: str, folder: str) -> None:
    size, room = os.path.getsize(archive), shutil.disk_usage(folder).free
    limit = 100 * size + HEADERS
    with open(archive, "rb") as raw, gzip.open(raw) as unzipped, progress_bar("unpacking", size) as bar:
        plain = LimitedReader(unzipped)
        tar = tarfile.open(fileobj=plain, mode="r|")
        for member in tar:
            if member.issparse():  # a few bytes that would become as many as it likes
                raise tarfile.ReadError("a file with holes in it")
            if member.offset_data + member.size > limit:
                raise tarfile.ReadError("it unpacks to far more than it should")
            plain.allowed = member.size + HEADERS
            target = os.path.join(folder, os.path.basename(member.name))
            if member.isreg() and shard_number(target) >= 0 and not os.path.exists(target):
                room -= member.size
                if room < 0:
                    raise SystemExit(f"{archive} unpacks to more than the disk has room for; make room, then "
                                     "run the same again")
                with atomic_write(target) as f:
                    shutil.copyfileobj(tar.extractfile(member), f, CHUNK)
            bar.update(raw.tell() - bar.n)
        plain.allowed = limit
        while plain.read(CHUNK):  # to its end, where gzip's checksum is
            pass


def download(data_dir: str, small: bool, url: str | None, tokenizer_url: str, force: bool) -> None:
    """Stage `download`: the stories (`small`: only those for validation) and the Llama 2 tokenizer."""
    folder = stories_dir(data_dir)
    file = os.path.join(data_dir, "TinyStories-valid.txt" if small else "TinyStories_all_data.tar.gz")
    model = tokenizer_path(data_dir, 0)
    with claimed(data_dir, "stories", "synth", "tokenizer"):
        restore(folder)
        if os.path.isdir(folder) and not force:
            print(f"{folder} is already there: {len(os.listdir(folder))} files; --force replaces it")
        else:
            there = os.path.exists(file)
            if there and force and url:  # what is there may be from elsewhere
                fetch(url, file + ".new")
                os.replace(file + ".new", file)
                there = False
            else:
                fetch(url or (SMALL_URL if small else STORIES_URL), file)
            if small:
                try:
                    import_into([file], data_dir, force=force)
                except SystemExit as e:
                    if there:
                        raise
                    forget(file)  # else it would be "already there"
                    why = str(e).partition(";")[0]
                    raise SystemExit(f"what {url or SMALL_URL} gave is no text of stories and was dropped "
                                     f"({why}); run the same again, or check --url=URL") from None
            else:
                extract(file, folder)
                print(f"{folder}: {len(shard_files(data_dir))} shards; {file} is no longer needed")
        fetch(tokenizer_url, model, TOKENIZER_SHA256, "--tokenizer_url")
        print(f"{Tokenizer(model).export()}: the Llama 2 tokenizer for run.c")
    print(f"next: {command('pretokenize', data_dir)}  (or first train_vocab, for a smaller vocabulary)")


# ---- shards: read, import, synth ---------------------------------------------------------------------

def shard_number(path: str) -> int:
    """12 for …/data12.json; -1 for what is no shard."""
    match = re.fullmatch(r"data([0-9]{1,9})\.json", os.path.basename(path))
    return int(match[1]) if match else -1


def shard_files(data_dir: str) -> list[str]:
    """Paths of the text shards by number: the first is data00, for validation; at least one more follows."""
    folder = stories_dir(data_dir)
    names = os.listdir(folder) if os.path.isdir(folder) else []
    names = sorted((name for name in names if shard_number(name) >= 0), key=shard_number)
    if len(names) < 2 or shard_number(names[0]) != 0:
        there = os.path.isdir(folder)  # which is not replaced without being told to
        how, force = ("put back what is missing, or run", "--force") if there else ("run", "")
        raise SystemExit(f"no stories in {folder} (data00.json for validation and more for training); "
                         f"{how}: {command('download', data_dir, more=force)} (or synth, or import FILE)")
    return [os.path.join(folder, name) for name in names]


@contextmanager
def new_folder(folder: str) -> Iterator[str]:
    """An empty folder that takes the place of `folder` at the end, or is gone after an exception.

    Between two renames the old one is `folder`.old, where `restore` finds it after a crash.
    """
    scratch = folder + ".tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    os.makedirs(scratch)
    try:
        yield scratch
        replace_folder(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def replace_folder(new: str, folder: str) -> None:
    """Rename `new` to `folder`, in place of what is there."""
    old = folder + ".old"
    if os.path.isdir(folder):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def restore(folder: str) -> None:
    """Bring back what a run that was killed inside replace_folder left under another name.

    Only for who holds the lock: else it may be one that is inside it.
    """
    if not os.path.isdir(folder) and os.path.isdir(folder + ".old"):
        with suppress(FileNotFoundError):  # another, with which the lock is shared, was faster
            os.rename(folder + ".old", folder)


def read_text(path: str, progress: Callable[[int], object]) -> Iterator[str]:
    """Pieces of a UTF-8 file without its BOM, \\r\\n as \\n; progress(bytes) before each. Bounded memory."""
    with open(path, encoding="utf-8-sig") as f:
        while True:
            before = f.buffer.tell()
            try:
                text = f.read(CHUNK)
            except UnicodeDecodeError as e:  # of e.object, the bytes up to where the file was read
                at = f.buffer.tell() - len(e.object) + e.start
                raise SystemExit(f"{path} is not UTF-8: byte {at} is 0x{e.object[e.start]:02x}; "
                                 + how_to_convert(path)) from None
            progress(f.buffer.tell() - before)
            if not text:
                return
            yield text


def how_to_convert(path: str) -> str:
    """What to do with a file that is not UTF-8."""
    name = shlex.quote(path)
    with open(path, "rb") as f:
        start = f.read(1024)
    if start.startswith(b"\x1f\x8b"):
        return f"unpack it first: gzip -dc {name}"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # what Windows calls Unicode
        return f"convert it first: iconv -f utf-16 -t utf-8 {name}"
    if b"\0" in start or start.startswith((b"%PDF", b"PK")):
        return "it is no text; save it as plain text in UTF-8 first"
    return f"convert it first: iconv -f latin1 -t utf-8 {name}"


def read_pieces(path: str, separator: str, progress: Callable[[int], object]) -> Iterator[str]:
    """What stands between separators in a text file; "blank" means one or more blank lines."""
    split = re.compile(r"\n\s*\n" if separator == "blank" else re.escape(separator)).split
    rest = ""
    for text in read_text(path, progress):
        *pieces, rest = split(rest + text)
        yield from pieces
        if len(rest) > LONGEST_STORY:
            raise SystemExit(f"{path} has {LONGEST_STORY >> 20} million characters without {separator!r}; "
                             "say what ends a story: --separator=blank (blank lines) or --separator=TEXT")
    yield rest


def read_json_list(path: str, progress: Callable[[int], object]) -> Iterator:
    """The items of a JSON list, holding no more of the file than an item and a piece."""
    decode, skip_space = json.JSONDecoder().raw_decode, re.compile(r"[ \t\n]*").match
    pieces = read_text(path, progress)
    text, at, line, item = "", 0, 1, 0  # text[at:] is yet to be read, line is that of text[0]

    def grow() -> bool:
        """Drop what was read and take another piece; False at the end of the file."""
        nonlocal text, at, line
        if piece := next(pieces, ""):
            line += text.count("\n", 0, at)
            text, at = text[at:] + piece, 0
        return bool(piece)

    def peek() -> str:
        """The next character that is no space; "" at the end of the file."""
        nonlocal at
        while True:
            at = skip_space(text, at).end()
            if at < len(text) or not grow():
                return text[at:at + 1]

    def fail(what: str, after: int = 0):
        here = line + text.count("\n", 0, at + after)
        raise SystemExit(f"{path}, line {here}, item {item}: {what}; repair the file, or make it again")

    if peek() != "[":
        fail("not a JSON list (name a file with an object in each line .jsonl)")
    at += 1
    mark = peek()
    at += mark == "]"
    while mark != "]":
        peek()
        try:
            value, end = decode(text, at)
            if len(text) - end <= 2 and isinstance(value, int | float) and grow():
                continue  # there may be more of the number, as of 1 in "1e+"
            at = end
        except json.JSONDecodeError as e:  # wrong, or cut off by the end of the text we hold
            after = e.pos - at
            if len(text) - at > LONGEST_STORY or not grow():
                fail(e.msg, after)
            continue
        except RecursionError:
            fail("nested too deeply")
        except ValueError:  # Python's limit, against numbers that take hours to read
            fail("a number of thousands of digits")
        yield value
        item += 1
        mark = peek()
        if mark not in (",", "]"):
            fail("expected ',' or ']'" if mark else "the file ends inside the list")
        at += 1
    if peek():
        fail("text after the list")


def text_of(item: object, field: str | None, where: str) -> str:
    """The text of a JSON item: itself, or what it has under `field` (default: story, else text)."""
    if isinstance(item, str):
        return item
    names = [field] if field else ["story", "text"]
    for name in names:
        if isinstance(item, dict) and isinstance(item.get(name), str):
            return item[name]
    raise SystemExit(f"{where}: no text under {' or '.join(names)} in {reprlib.repr(item)}; "
                     "name the field: --field=NAME")


def read_stories(path: str, progress: Callable[[int], object], separator: str = "<|endoftext|>",
                 field: str | None = None) -> Iterator[str]:
    """The stories of a .json, .jsonl or text file, as they stand there. SystemExit names the place."""
    kind = os.path.splitext(path)[1].lower()
    if kind == ".json":
        for i, item in enumerate(read_json_list(path, progress)):
            yield text_of(item, field, f"{path}, item {i}")
    elif kind in (".jsonl", ".ndjson"):
        for i, line in enumerate(read_pieces(path, "\n", progress), start=1):
            if line.strip():
                try:
                    item = json.loads(line)
                except (ValueError, RecursionError) as e:
                    raise SystemExit(f"{path}, line {i}: {e}; each line must be a JSON object") from None
                if isinstance(item, list):
                    raise SystemExit(f"{path}, line {i}: a list, {reprlib.repr(item)}; name a file "
                                     "that is one list .json")
                yield text_of(item, field, f"{path}, line {i}")
    else:
        yield from read_pieces(path, separator, progress)


def free_stories_dir(data_dir: str, force: bool) -> str:
    """The folder of the text shards, which must not be there yet unless `force`."""
    folder = stories_dir(data_dir)
    restore(folder)
    if os.path.isdir(folder) and not force:
        raise SystemExit(f"{folder} already holds stories; --force replaces them, "
                         "--data_dir=DIR puts these elsewhere")
    return folder


def write_shards(stories: Iterable[str], data_dir: str, num_shards: int, seed: int, force: bool) -> None:
    """Deal stories out to shards, without the empty ones; the folder appears when all are written.

    With fewer stories than `num_shards` there is a shard for each.
    """
    folder = free_stories_dir(data_dir, force)
    empty = 0

    def not_empty() -> Iterator[str]:
        nonlocal empty
        for story in map(str.strip, stories):
            if story:
                yield story
            else:
                empty += 1

    kept = not_empty()
    first = list(itertools.islice(kept, num_shards))
    if len(first) < 2:
        raise SystemExit(f"found {len(first)} of the 2 stories it takes, one for validation; add more "
                         "(of a text file: is --separator right? --separator=blank splits at blank lines)")
    with new_folder(folder) as scratch:
        counts = deal(itertools.chain(first, kept), str, scratch, len(first), seed, range(len(first)))
    print(f"{folder}: {sum(counts):,} stories in {len(counts)} shards, {counts[0]:,} of them for validation"
          + f"; {empty:,} empty ones left out" * (empty > 0))
    print(f"next: {command('train_vocab', data_dir, 4096)}")


def deal(items: Iterable, story: Callable[..., str], folder: str, num_shards: int, seed: int,
         mine: Iterable[int]) -> list[int]:
    """Write story(item) of each item that falls to one of the shards `mine`; returns how many each got.

    Of each `num_shards` items in a row every shard gets one, by a seeded shuffle: shard 00 is a fair sample
    of the whole, and memory does not grow.
    """
    open_many_files()
    rng, items, counts = random.Random(seed), iter(items), dict.fromkeys(mine, 0)
    with ExitStack() as stack:
        files = {i: stack.enter_context(atomic_write(shard_path(folder, i), "w")) for i in mine}
        while block := list(itertools.islice(items, num_shards)):
            for i, item in zip(rng.sample(range(num_shards), len(block)), block, strict=True):
                if i in files:
                    files[i].write(",\n" if counts[i] else "[\n")
                    json.dump({"story": story(item)}, files[i])
                    counts[i] += 1
        for f in files.values():
            f.write("\n]\n")
    return list(counts.values())


def open_many_files() -> None:
    """Let this process have all shards open at once; some systems begin with 256 files."""
    if resource:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MAX_SHARDS + 100 if hard == resource.RLIM_INFINITY else min(MAX_SHARDS + 100, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            with suppress(OSError, ValueError):  # of a system whose own limit is lower
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def shard_path(folder: str, i: int) -> str:
    return os.path.join(folder, f"data{i:02d}.json")


def import_files(paths: list[str], data_dir: str, separator: str = "endoftext", field: str | None = None,
                 num_shards: int = 10, seed: int = 1337, force: bool = False) -> None:
    """Stage `import`: stories of text and JSON files into shards. Streams: memory stays flat at any size."""
    separator = "<|endoftext|>" if separator == "endoftext" else separator.replace("\\n", "\n")
    for path in paths:
        if not os.path.isfile(path):
            raise SystemExit(f"no such file: {path}; run: {command('import', data_dir, more='FILE.txt')} "
                             "(or .json, .jsonl)")
    with claimed(data_dir, "stories", "synth"):
        import_into(paths, data_dir, separator, field, num_shards, seed, force)


def import_into(paths: list[str], data_dir: str, separator: str = "<|endoftext|>", field: str | None = None,
                num_shards: int = 10, seed: int = 1337, force: bool = False) -> None:
    with progress_bar("importing", sum(map(os.path.getsize, paths))) as bar:
        write_shards((story for path in paths for story in read_stories(path, bar.update, separator, field)),
                     data_dir, num_shards, seed, force)


def synth(data_dir: str, num_stories: int, num_shards: int, seed: int, force: bool,
          shard: tuple[int, int] | None = None) -> None:
    """Stage `synth`. Story i depends on the seed and i alone, not on the machine or num_stories."""
    if shard:
        part, parts = shard
        with claimed(data_dir, f"stories-{part}-of-{parts}", shared=("synth",)):
            synth_part(data_dir, num_stories, num_shards, seed, force, part, parts)
        return
    stories = (synth_story(random.Random(f"{seed}:{i}")) for i in range(num_stories))
    stories = tqdm(stories, "writing", num_stories, disable=None, leave=False)
    with claimed(data_dir, "stories", "synth"):
        write_shards(stories, data_dir, num_shards, seed, force)


def synth_part(data_dir: str, num_stories: int, num_shards: int, seed: int, force: bool, part: int,
               parts: int) -> None:
    """Every `parts`-th shard of what synth writes. Whoever finds that none is missing puts them together.

    Until then they are in a folder named after all that they depend on, so that different ones never mix.
    """
    folder, count = free_stories_dir(data_dir, force), min(num_shards, num_stories)
    if not 2 <= count >= parts:
        raise SystemExit(f"{num_stories} stories in {num_shards} shards cannot be shared out to {parts} "
                         f"parts; give both --num_stories and --num_shards at least {max(2, parts)}")
    begun = f"{folder}.synth-{num_stories}-{num_shards}-{seed}"
    for other in sorted(set(glob.glob(glob.escape(folder) + ".synth-*")) - {begun}):
        stories, shards, chance = other.rpartition(".synth-")[2].split("-", 2)
        raise SystemExit(f"{other} has parts of other stories: finish those with --num_stories={stories} "
                         f"--num_shards={shards} --seed={chance}, or delete that folder")
    os.makedirs(begun, exist_ok=True)
    todo = [i for i in range(part - 1, count, parts) if not os.path.exists(shard_path(begun, i))]
    if todo:
        numbers = tqdm(range(num_stories), "writing", disable=None, leave=False)
        deal(numbers, lambda i: synth_story(random.Random(f"{seed}:{i}")), begun, count, seed, todo)
    missing = [i for i in range(count) if os.path.isdir(begun) and not os.path.exists(shard_path(begun, i))]
    if missing:
        print(f"part {part} of {parts} is done; {len(missing)} of {count} shards are still to come "
              f"from other parts")
        return
    if put_together(begun, data_dir, force):
        print(f"{folder}: {num_stories:,} stories in {count} shards")
        print(f"next: {command('train_vocab', data_dir, 4096)}")
    else:
        print(f"part {part} of {parts} is done; another part is putting all together")


def put_together(parts: str, data_dir: str, force: bool) -> bool:
    """Make the folder of stories of its complete parts. False: another process does so at this moment."""
    with ExitStack() as stack:
        try:
            stack.enter_context(claimed(data_dir, "stories-parts"))
        except SystemExit:
            return False
        if os.path.isdir(parts):  # else it has been done
            stack.enter_context(claimed(data_dir, "stories"))  # which nobody may be reading
            folder = free_stories_dir(data_dir, force)
            for name in os.listdir(parts):
                if shard_number(name) < 0:  # left over from a run that was killed
                    os.remove(os.path.join(parts, name))
            replace_folder(parts, folder)
    return True


# ---- the story grammar -------------------------------------------------------------------------------

# A story is a shape: a template, and a table of things that fit it. One row of the table fills the template's
# {slots}, so a ball has rolled under the bed and a torn kite gets tape. [a|b] picks an alternative (they
# nest), [|x] may leave x out, // starts a paragraph, {Name} is {name} with a capital letter. Chance comes
# from `rng.random()` alone: a seed gives the same story on every machine and Python version.
# Not for: variety like TinyStories'. Words and sentences are plain enough for a 260K model.

# the cast: (name, pronoun, kind)

PRONOUNS = {"he": ("he", "him", "his"), "she": ("she", "her", "her")}
CHILDREN = [(name, "she", "girl") for name in ("Lily", "Anna", "Sue", "Amy")]
CHILDREN += [(name, "he", "boy") for name in ("Tim", "Ben", "Max", "Jack")]
ANIMALS = [("Bobo", "he", "bear"), ("Dot", "she", "bunny"), ("Rusty", "he", "fox"), ("Poppy", "she", "panda")]
ADULTS = [("mum", "she"), ("mum", "she"), ("dad", "he"), ("dad", "he"), ("grandma", "she"), ("grandpa", "he")]
COLORS = ["red", "blue", "green", "yellow", "pink", "orange", "new", "old"]

# the tables: a name and the columns, then the rows; a cell may hold other {slots}

STORY_TABLES = """
toys: toy | use        | together                       | why                       | hid
ball      | bounce it  | kicked the ball together       | It had rolled there.      | under the bed
car       | push it    | pushed the car up and down     | It had rolled there.      | under the sofa
train     | push it    | made a road for the train      | {Name} had left it there. | behind the sofa
teddy     | hug it     | had a tea party with the teddy | It had fallen there.      | behind the bed
drum      | bang on it | banged on the drum and sang    | {Name} had left it there. | in the kitchen
boat      | sail it    | sailed the boat on the pond    | {Name} had left it there. | in the bath

breaks: toy | oops                                       | mend
car         | pushed it too hard, and a wheel came off   | put the wheel back on
teddy       | pulled it too hard, and an ear came off    | sewed the ear back on
kite        | ran into a bush with it, and the kite tore | put tape on the kite
book        | turned the page too fast, and it tore      | put tape on the page

fears: fear    | where     | tip                             | did
the big slide  | the park  | Sit down and hold on            | climbed up and went down the slide
the cold water | the beach | Put one foot in first           | put in one foot and then the other foot
the big dog    | the farm  | Let the dog smell your {hand}   | held out {his} {hand}, and the dog licked it
the big horse  | the farm  | Give the horse an apple         | held out an apple, and the horse ate it
the old bridge | the woods | Look at me and take small steps | took small steps to the other side

pets: pet | where        | trouble                       | help                          | after
bird      | under a tree | hurt and could not fly        | put it in a soft box          | sang a song
kitten    | up in a tree | afraid and could not get down | got it down with a ladder     | licked {name}
puppy     | by the road  | cold and wet                  | put a warm blanket on it      | wagged its tail
turtle    | on the path  | stuck on its back             | turned it over                | walked to the pond
duck      | in the woods | lost and wanted its mum       | showed it the way to the pond | swam to its mum
fish      | in a puddle  | stuck and wanted to go home   | took it to the pond           | swam away

rain: plan         | made
ride {his} bike    | made a boat out of a big box
play in the garden | made a tent with a blanket and two chairs
go to the park     | put on funny hats and danced
fly a kite         | played hide and seek

chores: chore       | oops                                      | fix
sweep the leaves    | the wind blew the leaves away             | swept up the leaves again
carry the apples    | the bag broke, and the apples rolled away | picked up all the apples
hang up the clothes | a sock fell in the mud                    | washed the sock again
set the table       | a spoon fell on the floor                 | washed the spoon

dishes: dish | food    | steps                              | oops                        | fix
a cake       | cake    | put eggs, milk and flour in a bowl | an egg fell on the floor    | got a new egg
a pie        | pie     | put apples in a bowl               | an apple fell on the floor  | washed the apple
some soup    | soup    | put carrots and peas in a big pot  | {name} put in too much salt | put in more water
a pancake    | pancake | put eggs and milk in a bowl        | some milk fell on the floor | got more milk

races: goal  | oops                               | help
the big tree | {pal} fell and hurt {pal_his} knee | helped {pal} get up
the gate     | {pal} got stuck in the mud         | pulled {pal} out of the mud
the pond     | {pal} fell into a hole             | pulled {pal} out of the hole

nights: sound    | cause                  | fix
Tap, tap, tap    | a branch at the window | closed the window
Meow, meow       | the cat at the door    | let the cat in
Drip, drip, drip | the water in the bath  | turned off the water
Hoo, hoo         | an owl in the tree     | waved at the owl

tasks: want                   | tried                      | oops                  | help
get a book from the top shelf | climbed on a chair         | the chair shook       | got the book for {name}
open the jar of jam           | turned and turned the lid  | the lid did not move  | opened the jar for {name}
carry a big box of toys       | pulled and pulled the box  | the box was too heavy | helped {name} carry it
put on {his} {color} coat     | pulled and pulled the coat | {he} got stuck in it  | turned the coat around

gifts: gift | made                               | oops                       | fix
card        | drew a red heart on the card       | a drop of paint fell on it | made the drop into a flower
necklace    | put pretty shells on a string      | the string broke           | put the shells on a new string
cake        | put eggs, milk and flour in a bowl | the cake came out flat     | put berries on top of the cake

plants: plant | grew                 | end
sunflower     | a tall yellow flower | showed the flower to {friend}
carrot        | a long orange carrot | shared the carrot with {friend}
tomato        | a round red tomato   | shared the tomato with {friend}
pumpkin       | a fat orange pumpkin | made pumpkin soup with {his} {adult}

meets: where  | doing                      | play
in the park   | sitting alone on the swing | took turns on the swing
at the beach  | making a house of sand     | made a big house of sand
in the garden | picking flowers            | made a crown of flowers
on the hill   | flying a {color} kite      | flew the kite together

rules: rule         | did                   | oops                          | care
run by the pond     | ran and ran           | fell into the water           | dried {name} with a towel
jump on the bed     | jumped and jumped     | fell off and hurt {his} head  | put ice on {his} head
touch the hot pot   | touched the pot       | hurt {his} {hand}             | put cold water on {his} {hand}
go out with no coat | went out with no coat | got very cold                 | put a warm blanket on {name}
climb on the wall   | climbed up the wall   | fell down and hurt {his} knee | washed {his} knee

trips: place | saw              | did
the farm     | three white cows | gave the cows some grass
the beach    | a {color} boat   | waved at the boat
the pond     | two ducks        | gave seeds to the ducks
the zoo      | an elephant      | waved at the elephant
the woods    | a tall tree      | sat down under the tree
"""

# the templates: pieces that many stories use, then the shapes, each with the name of its table

STORY_PIECES = {
    "day": "[One day|One day|One morning|One afternoon]",
    "open": "[Once upon a time, there was a [little|happy|kind] {kind} named {name}|There once was a little "
            "{kind} named {name}|{Name} was a [little|happy|kind] {kind}][||| who lived in a small house"
            "| who lived with {his} mum and dad| who loved to [sing|dance|laugh]].",
    "start": "[{open} [|//] {day}, {name}|{day}, a [little|happy|kind] {kind} named {name}]",
    "oh_no": '[||"Oh no!" [said|cried] {name}.]',
    "calm": "[Do not worry|Do not be sad|It is okay]",
    "thanks": '["Thank you, {Adult}!" said {name}.|{Name} hugged {his} {adult}.]',
    "joy": "[{Name} was very happy.|They were very happy.|They laughed and laughed.|What a good day!]",
    "learned": "[From that day on, {name} knew|{Name} learned] that",
}

STORY_SHAPES = [
    ("toys", """{open} {He} had a {color} {toy}[| and loved to {use}| and took it everywhere]. // {day},
{name} could not find the {toy}[| and was sad]. {He} looked under the table and behind the door, but the {toy}
was not there. ["Where is my {toy}?" {he} asked {his} {adult}.|{Name} asked {his} {adult} for help.] "{calm},
{name}. [We will find it|I will help you look]," said {his} {adult}. // They looked and looked, and at last
they found it {hid}. [|{why}] {thanks} [|{joy}|From that day on, {name} put the {toy} away every night.]"""),
    ("toys", """{start} was playing with {his} {color} {toy} when {friend} came to play, too. "Can I play with
your {toy}[|, please]?" asked {pal}. "No, it is mine!" said {name}. {Pal} was sad and sat down alone. //
{Name} played with the {toy}, but it was not fun to play alone. ["It is good to share with a friend," said
{his} {adult}.|{He} looked at {pal} and felt bad.] [So|Then] {name} gave the {toy} to {pal} and said, "[I am
sorry. You can have a turn|I am sorry. We can play together|You can have a turn now]." {Pal} smiled, and they
{together}. [|{joy}|{learned} it is [good|fun] to share.]"""),
    ("breaks", """{start} went to play with {friend}, who had a {color} {toy}. "Can I have a turn?" asked
{name}. "Yes, but please be careful," said {pal}. But {name} {oops}. {oh_no} // {Name} was afraid, so {he} hid
the {toy} under a blanket. "Where is my {toy}?" asked {pal}. {Name} said, "I broke it, and I am sorry." [{Pal}
was sad, but {pal_he} was not angry.|"Thank you for telling me," said {pal}.] {Pal}'s {adult} {mend}, and soon
[the {toy} was as good as new|they could play again]. [|{joy}|{learned} it is good to [be careful|say
sorry].]"""),
    ("fears", """{start} went to {where} with {his} {adult}. {Name} wanted to have fun, but {he} was afraid of
{fear}. [|"I cannot do it," said {name}.|"I want to go home," said {name}.] // {His} {adult} took {his} {hand}
and said, "[I am here with you|You can do it|Do not be afraid]. {tip}." {Name} was still a little afraid, but
{he} wanted to try. {He} {did}. "[I did it|Look at me]!" {he} cried. [|"I am very proud of you," said {his}
{adult}.] [{joy}|{Name} was not afraid any more.|{Name} felt brave.]"""),
    ("pets", """{start} saw a little {pet} {where}. The {pet} was {trouble}. "Do not be [sad|afraid], little
{pet}. I will help you," said {name}. // {Name} ran to {his} {adult} for help. They went to the {pet} and
{help}. Soon, the {pet} felt better and {after}. [|{Name} was very happy.|{learned} it is good to help.]"""),
    ("rain", """{start} wanted to {plan}, but it began to rain. [{Name} looked out of the window and was
sad.|"I do not like the rain," said {name}.] // "{calm}, {name}. We can have fun inside," said {his} {adult}.
So {name} and {his} {adult} {made}. [|It was a lot of fun.] [|// Soon, the rain stopped and the sun came out.
[{Name} ran out and jumped in the puddles.|Now {name} could {plan}.|"Look, I can see a rainbow!" said
{name}.]] [|{joy}|{learned} a rainy day can be fun, too.]"""),
    ("chores", """{start} wanted to help {his} {adult}. "[What can I do|How can I help]?" asked {name}. "You
can {chore} with me," said {his} {adult}. {Name} worked [very hard|as fast as {he} could], but then {oops}.
{oh_no} // "{calm}, {name}. I will help you," said {his} {adult}. They {fix}, and soon the work was done.
"[You are a good helper|Thank you for your help]," said {his} {adult}. [|{joy}|{Name} was very proud.|Then
they sat down and had some cookies and milk.]"""),
    ("dishes", """{start} was hungry. "Can we make {dish}?" {he} asked {his} {adult}. "Yes, we can make it
together," said {his} {adult}. First, they washed their {hand}s, and then they {steps}. But {oops}. {oh_no} //
"{calm}, {name}," said {his} {adult}. So they {fix}, and soon the {food} was ready. [|The kitchen smelled very
nice.] [Then|Then {friend} came, and] they sat down and ate the {food}. [|"Yum!" said {name}.] [|{joy}]"""),
    ("races", """{start} was playing with {friend}. "Let us run to {goal}!" said {pal}. [|"I will win!" said
{name}.] They ran very fast. But then {oops}. [|"Help!" cried {pal}.] // {Name} wanted to win, but {his}
friend needed help. So {he} ran back and {help}. "Thank you, {name}. You are a good friend," said {pal}. They
walked to {goal} together. [|"We both win!" said {name}.] [|{joy}|{learned} it is good to help.]"""),
    ("nights", """{open} // One night, {name} was in bed and could not sleep. {sound}! What was that sound?
{Name} [was afraid|hid under {his} blanket] and called {his} {adult}. // {His} {adult} came in with a lamp and
looked around. It was only {cause}! {His} {adult} {fix} and said, "[You are safe now|It is time to sleep]."
[|Then {his} {adult} [sang a soft song|gave {him} a kiss].] ["Good night, {Adult}," said {name}.|{Name} was
not afraid any more.] {He} closed {his} eyes[ and went to sleep|, and soon {he} was asleep]."""),
    ("tasks", """{start} wanted to {want}. [|"I can do it," {he} said.] {He} {tried}, but {oops}. {Name}
[tried again, but {he} could not do it alone|was sad and did not know what to do]. // "Can you help me,
please?" {he} asked {his} {adult}. "Yes, I am happy to help you," said {his} {adult}. {Adult_he} smiled and
{help}. {thanks} [|{joy}|{learned} it is good to ask for help.]"""),
    ("gifts", """{start} wanted to make a {gift} for {his} {adult}. {He} {made}, but {oops}. {oh_no} {Name}
[was sad|wanted to cry], but then {he} had a good idea. {He} {fix}[|, and now the {gift} was very pretty]. //
{Name} gave the {gift} to {his} {adult} and said, "[This is for you|I made this for you]." "[I love it|It is
so pretty]! Thank you, {name}," said {his} {adult}. [|{joy}|{His} {adult} gave {him} a big hug.]"""),
    ("plants", """{start} had a {plant} seed. {He} put the seed in the ground and gave it some water. [|"Grow,
little seed!" {he} said.] The next day, {name} looked at the ground, but there was nothing to see. "A seed
needs time," said {his} {adult}. // {Name} gave the seed water every day and [waited and waited|sang a song to
it]. At last, {he} saw a small green leaf. It grew and grew, and soon there was {grew}! {Name} {end}.
[|{joy}|{learned} it is good to wait.]"""),
    ("meets", """{start} had no one to play with. {He} saw a {pal_kind} {doing} {where}. {Name} [was shy, but
{he} wanted a friend|wanted to play, too]. "Hello, my name is {name}. What is your name?" asked {name}. "I am
{pal}," said the {pal_kind}. // "Can I play with you?" asked {name}. "Yes[|, please]!" said {pal}, and they
{play}. [|It was a lot of fun.] From that day on, {name} and {pal} were [good|best] friends."""),
    ("rules", """{start} wanted to play. "Please do not {rule}," said {his} {adult}. But {name} did not
listen. {He} {did}, and then {he} {oops}. "[Help me, {Adult}|Oh no]!" cried {name}. // {His} {adult} came to
help and {care}. "I am sorry I did not listen," said {name}. ["[I love you. |]Please listen next time," said
{his} {adult}.|{His} {adult} hugged {name} and said, "Please listen next time."] [|From that day on, {name}
listened to {his} {adult}.]"""),
    ("trips", """{start} [went|walked] to {place} with {his} [{adult}|friend {pal}]. They saw {saw}[ and|.
"Look!" said {name}. They] {did}. [It was a lot of fun.|{joy}|It was a warm and sunny day.] [|When the sun
went down, they went home[| and had some hot soup| and went to bed].]"""),
]

# from a shape to a story


def pick_one(rng: random.Random, options: list):
    """One of `options`, each as likely as the next."""
    return options[int(rng.random() * len(options))]


def read_story_tables(text: str) -> dict[str, list[dict[str, str]]]:
    """{table name: rows}, each row a dict from column name to cell."""
    tables = {}
    for block in text.strip().split("\n\n"):
        name, body = block.split(":", 1)
        header, *rows = [[cell.strip() for cell in line.split("|")] for line in body.splitlines()]
        tables[name] = [dict(zip(header, row, strict=True)) for row in rows]
    return tables


STORY_ROWS = read_story_tables(STORY_TABLES)


def draw_cast(rng: random.Random) -> dict[str, str]:
    """Slots for the hero {name}, a friend {pal} (never the hero) and the {adult}."""
    cast = pick_one(rng, [CHILDREN, CHILDREN, ANIMALS])
    hero, he, kind = pick_one(rng, cast)
    pal, pal_he, pal_kind = pick_one(rng, [person for person in cast if person[0] != hero])
    adult, adult_he = pick_one(rng, ADULTS)
    he, him, his = PRONOUNS[he]
    return {
        "name": hero, "kind": kind, "he": he, "him": him, "his": his,
        "pal": pal, "pal_kind": pal_kind, "pal_he": pal_he, "pal_his": PRONOUNS[pal_he][2],
        "friend": f"{his} friend {pal}", "adult": adult, "adult_he": adult_he,
        "hand": "paw" if cast is ANIMALS else "hand", "color": pick_one(rng, COLORS),
    }


def choose_alternatives(rng: random.Random, text: str) -> str:
    """Replaces every [a|b|c] with one of its alternatives, the innermost first."""
    while "[" in text:
        start = text.rindex("[")
        end = text.index("]", start)
        text = text[:start] + pick_one(rng, text[start + 1:end].split("|")) + text[end + 1:]
    return text


def fix_articles(text: str) -> str:
    """Writes "an" for "a" before a vowel, and one space between words."""
    words = text.split()
    for i, following in enumerate(words[1:]):
        if words[i] == "a" and following[0] in "aeiou":
            words[i] = "an"
    return " ".join(words)


def synth_story(rng: random.Random) -> str:
    """One story of 3 to 15 sentences, its paragraphs joined by newlines. Draws only `rng.random()`."""
    table, text = pick_one(rng, STORY_SHAPES)
    slots = STORY_PIECES | draw_cast(rng) | pick_one(rng, STORY_ROWS[table])
    slots |= {key.capitalize(): value[0].upper() + value[1:] for key, value in slots.items()}
    while "{" in text:  # a slot's text may hold slots too
        text = text.format(**slots)
    paragraphs = [fix_articles(paragraph) for paragraph in choose_alternatives(rng, text).split("//")]
    return "\n".join(paragraph for paragraph in paragraphs if paragraph)


# ---- train_vocab -------------------------------------------------------------------------------------

def train_vocab(data_dir: str, vocab_size: int, num_shards: int) -> None:
    """Stage `train_vocab`: a byte-pair vocabulary made as Llama 2's was, from training shards only.

    A different one of that size, which tokens and models may have been made with, is kept under another name.
    """
    if not MIN_VOCAB <= vocab_size <= MAX_VOCAB:
        raise SystemExit(f"--vocab_size={vocab_size} is not between {MIN_VOCAB} (bytes and special ids) and "
                         f"{MAX_VOCAB} (16 bits per token); run: {command('train_vocab', data_dir, 4096)}")
    if not os.path.isdir(data_dir):  # none should come of it
        shard_files(data_dir)
    with claimed(data_dir, f"tok{vocab_size}", shared=("stories",)):
        restore(stories_dir(data_dir))
        proto, shards = make_vocab(data_dir, vocab_size, num_shards)
        model = tokenizer_path(data_dir, vocab_size)
        for_run = os.path.splitext(model)[0] + ".bin"
        if os.path.isfile(model):
            back_up(model, proto)
        elif os.path.isfile(for_run):  # of a model of others, and nothing to make it of again
            back_up(for_run, b"")
        with atomic_write(model) as f:
            f.write(proto)
        Tokenizer(model).export(for_run)
    print(f"{model} and, for ./run, {for_run}: {vocab_size} pieces from {shards} shards; next: "
          + command("pretokenize", data_dir, vocab_size))


def back_up(path: str, content: bytes) -> None:
    """A copy of the file beside itself, under the name of its sum, unless it holds `content`."""
    with open(path, "rb") as f:
        old = f.read()
    if old != content:
        kept = kept_path(path, hashlib.sha256(old).hexdigest())
        with atomic_write(kept) as f:
            f.write(old)
        print(f"there was another {path}: it is kept as {kept}")


def make_vocab(data_dir: str, vocab_size: int, num_shards: int) -> tuple[bytes, int]:
    """A sentencepiece model, and the number of shards that it was made from."""
    shards = shard_files(data_dir)[1:1 + num_shards]
    failure: list[BaseException] = []
    handler = signal.getsignal(signal.SIGINT)

    def lines() -> Iterator[str]:
        try:
            with progress_bar("reading", sum(map(os.path.getsize, shards))) as bar:
                for shard in shards:
                    for story in read_stories(shard, bar.update):
                        yield from (whole(line) for line in story.strip().split("\n") if line)
            if handler != signal.SIG_IGN:  # what follows would not notice Ctrl-C for minutes
                signal.signal(signal.SIGINT, signal.SIG_DFL)
        except BaseException as e:  # sentencepiece would wrap it in a RuntimeError of several lines
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
            remove_extra_whitespaces=False,  # run.c does not merge spaces either
            max_sentence_length=1 << 30,  # the default drops lines over 4,192 bytes in silence
            num_threads=16,  # the options go into the file, which must not depend on this machine's cores
            minloglevel=2)
    except RuntimeError as e:
        raise failure[0] if failure else vocab_error(str(e), data_dir, vocab_size) from None
    finally:
        signal.signal(signal.SIGINT, handler)
    return proto.getvalue(), len(shards)


def vocab_error(message: str, data_dir: str, vocab_size: int) -> SystemExit:
    """sentencepiece's complaint in our words, with the size to type instead."""
    for pattern, problem, other in (
            (r"required_chars\. \d+ vs (\d+)", "too small: this text's characters need", "larger"),
            (r"Please set it to a value <= (\d+)", "too large: the most that this text gives is", "smaller")):
        if match := re.search(pattern, message):
            return SystemExit(f"--vocab_size={vocab_size} is {problem} {match[1]}; "
                              f"run: {command('train_vocab', data_dir, int(match[1]))} (or {other})")
    return SystemExit(f"sentencepiece cannot train on these stories: {message.splitlines()[0]}; "
                      f"check them, or replace them: {command('import', data_dir, more='--force FILE')}")


# ---- pretokenize -------------------------------------------------------------------------------------

def pretokenize(data_dir: str, vocab_size: int, force: bool, num_workers: int,
                shard: tuple[int, int] | None = None) -> None:
    """Stage `pretokenize`: every shard as uint16 tokens, a shard per process at a time.

    Each leaves a note behind, dataNN.note.json, by which it is skipped the next time, also after a run that
    was interrupted; meta.json, of all notes, comes last, and while it is missing nothing can be read.
    A part of several (`shard`) does its share of the shards; who finds none missing writes meta.json.
    """
    tokenizer = Tokenizer(tokenizer_path(data_dir, vocab_size))
    if vocab_size not in (0, tokenizer.vocab_size) or tokenizer.vocab_size > MAX_VOCAB:
        raise SystemExit(f"{tokenizer.model_path} has {tokenizer.vocab_size} pieces, "
                         f"not {vocab_size or 32000} (at most {MAX_VOCAB}); run: "
                         + command("train_vocab", data_dir, vocab_size or 4096))
    folder, (part, parts) = token_dir(data_dir, vocab_size), shard or (1, 1)
    name = os.path.basename(folder)
    locks = (f"{name}-{part}-of-{parts}",) if shard else (name,)
    with claimed(data_dir, *locks, shared=("stories", name) if shard else ("stories",)):
        tokenizer = Tokenizer(tokenizer.model_path)  # train_vocab may have written another meanwhile
        restore(stories_dir(data_dir))
        sources = shard_files(data_dir)
        numbers = list(map(shard_number, sources))
        if gaps := numbers[-1] + 1 - len(numbers):
            first = next(i for i, number in enumerate(numbers) if i < number)
            print(f"note: there is no {os.path.basename(shard_path('', first))}"
                  + f" (and {gaps - 1} more)" * (gaps > 1) + ": its stories are left out", file=sys.stderr)
        mine = sources[part - 1::parts]
        head = {"format": META_FORMAT, "vocab_size": tokenizer.vocab_size,
                "tokenizer_sha256": tokenizer.sha256, "bos_id": tokenizer.bos_id}
        meta = os.path.join(folder, "meta.json")
        os.makedirs(folder, exist_ok=True)
        before = {} if force else up_to_date(folder, head, mine)
        todo = [source for source in mine if source not in before or not is_whole(folder, before[source])]
        if todo:
            forget(meta, *(tokens_path(folder, source, ".note.json") for source in todo))
        for source, entry in tokenize_shards(todo, folder, tokenizer.model_path, num_workers):
            write_json(tokens_path(folder, source, ".note.json"), head | {"shard": entry})
        done = up_to_date(folder, head, sources)
        if len(done) < len(sources):
            print(f"part {part} of {parts} is done; {len(sources) - len(done)} of {len(sources)} shards are "
                  "still to come from other parts")
            return
        write_json(meta, head | {"shards": list(done.values())})
    stories, tokens, size = (sum(entry[key] for entry in done.values())
                             for key in ("stories", "tokens", "bytes"))
    print(f"{folder}: {stories:,} stories, {tokens:,} tokens, {size / max(tokens, 1):.2f} bytes each"
          + f" ({len(mine) - len(todo)} of {len(mine)} shards were up to date)" * (todo != mine))
    flags = f"--vocab_source=custom --vocab_size={vocab_size}" if vocab_size else "--vocab_source=llama2"
    print(f"next: python train.py {flags}" + f" --data_dir={shlex.quote(data_dir)}" * (data_dir != "data"))


def tokens_path(folder: str, source: str, suffix: str = ".bin") -> str:
    """Of a text shard's tokens; with .note.json, of what pretokenize knows of them."""
    return os.path.join(folder, os.path.splitext(os.path.basename(source))[0] + suffix)


def up_to_date(folder: str, head: dict, sources: list[str]) -> dict[str, dict]:
    """By source, in order, the entries of shards made by a run like this one and of their size."""
    entries = {}
    for source in sources:
        try:
            with open(tokens_path(folder, source, ".note.json"), encoding="utf-8") as f:
                note = json.load(f)
            entry, path = note["shard"], tokens_path(folder, source)
            if (head.items() <= note.items() and is_entry(entry) and entry["name"] == os.path.basename(path)
                    and source_state(source).items() <= entry.items()
                    and file_size(path) == 2 * entry["tokens"]):
                entries[source] = entry
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # missing or damaged: do its shard again
    return entries


def write_json(path: str, value: dict) -> None:
    with atomic_write(path, "w") as f:
        json.dump(value, f, indent=1)


def source_state(source: str) -> dict:
    """What tells one version of a text shard from another, without reading it."""
    stat = os.stat(source)
    return {"source_bytes": stat.st_size, "source_mtime_ns": stat.st_mtime_ns}


def is_whole(folder: str, entry: dict) -> bool:
    """Does the shard's file hold what was written? Reads it, at 1 to 3 GB/s."""
    with open(os.path.join(folder, entry["name"]), "rb") as f:
        return block_sums(f) == entry["crc32"]


def block_sums(f: IO[bytes]) -> str:
    """CRC-32 of every BLOCK bytes of a file, the last block being what is left; 8 hex digits each."""
    f.seek(0)
    return "".join(f"{zlib.crc32(block):08x}" for block in iter(lambda: f.read(BLOCK), b""))


def tokenize_shards(sources: list[str], folder: str, model: str,
                    num_workers: int) -> Iterator[tuple[str, dict]]:
    """(source, its entry for meta.json) as each is done, by processes. The first failure stops them all."""
    sources = sorted(sources, key=os.path.getsize, reverse=True)  # the largest first: no long tail at the end
    workers = min(num_workers, len(sources) or 1, 61)  # Windows has no more
    with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        futures = {pool.submit(tokenize_shard, source, folder, model): source for source in sources}
        try:
            with progress_bar("tokenizing", sum(map(os.path.getsize, sources))) as bar:
                for future in as_completed(futures):
                    yield futures[future], future.result()
                    bar.update(os.path.getsize(futures[future]))
        except BaseException as e:  # also Ctrl-C
            for process in multiprocessing.active_children():
                process.terminate()
            if isinstance(e, BrokenProcessPool):
                raise SystemExit("a worker process was killed, perhaps for memory; run the same again "
                                 "to go on, with fewer --num_workers") from None
            raise


def start_worker() -> None:
    """In a new worker: leave Ctrl-C to the parent, and end when it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def tokenize_shard(source: str, folder: str, model: str) -> dict:
    """Write one token shard as a stream; returns its entry for meta.json. Empty stories are left out."""
    tokenizer = Tokenizer(model)
    path, state = tokens_path(folder, source), source_state(source)
    stories = size = 0
    with atomic_write(path, "w+b") as f:
        for batch in batches_of_stories(source):
            f.write(encode_stories(tokenizer, batch, source).tobytes())
            stories += len(batch)
            size += sum(len(text.encode("utf-8", "replace")) for _, text in batch)
        tokens, crc32 = f.tell() // 2, block_sums(f)
        f.seek(0)
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    return {"name": os.path.basename(path), "tokens": tokens, "stories": stories, "bytes": size,
            "sha256": sha256, "crc32": crc32, **state}


def batches_of_stories(source: str) -> Iterator[list[tuple[int, str]]]:
    """Stories with their indices in the shard, in lists of about BATCH characters."""
    batch: list[tuple[int, str]] = []
    size = 0
    for i, text in enumerate(map(str.strip, read_stories(source, id))):
        if text:
            batch.append((i, text))
            size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_stories(tokenizer: Tokenizer, stories: list[tuple[int, str]], source: str) -> np.ndarray:
    """The stories' ids one after the other, each story begun by BOS. SystemExit names the one that fails."""
    try:  # on one thread: the processes are the parallelism
        ids = tokenizer.encode_batch([text for _, text in stories], num_threads=1, return_type="numpy")
        return np.concatenate(ids, dtype="<u2", casting="unsafe")
    except (RuntimeError, ValueError, MemoryError) as e:
        if len(stories) > 1:  # find which
            return np.concatenate([encode_stories(tokenizer, [story], source) for story in stories])
        raise SystemExit(f"{source}, item {stories[0][0]}: {type(e).__name__}: {e}; "
                         "remove or repair that story") from None


# ---- TokenBatches ------------------------------------------------------------------------------------

class TokenShard:
    """A shard's tokens, read from the file by position: nothing is mapped, memory stays flat.

    A block is checked against its checksum when it is first touched, so that no damaged token is ever
    returned and nobody reads a whole set to know. Raises SystemExit that names the bytes and the command.
    """

    def __init__(self, folder: str, entry: dict):
        self.path, self.tokens = os.path.join(folder, entry["name"]), entry["tokens"]
        self._again = pretokenize_again(folder)
        self._sums = np.frombuffer(bytes.fromhex(entry["crc32"]), ">u4")
        self._checked = bytearray(len(self._sums))
        try:
            self._file = open(self.path, "rb", buffering=0)
        except OSError as e:
            raise SystemExit(f"cannot read {self.path}: {e.strerror}; {self._again}") from None

    def __del__(self):
        if hasattr(self, "_file"):
            self._file.close()

    def read(self, start: int, count: int) -> np.ndarray:
        """At most `count` ids from the one at `start`, fewer at the end of the shard."""
        count = min(count, self.tokens - start)
        for block in range(2 * start // BLOCK, -(-2 * (start + count) // BLOCK)):
            if not self._checked[block]:
                size = min(BLOCK, 2 * self.tokens - block * BLOCK)
                if zlib.crc32(self._bytes(block * BLOCK, size)) != self._sums[block]:
                    self._damaged(block * BLOCK, size, "is damaged")
                self._checked[block] = 1
        return np.frombuffer(self._bytes(2 * start, 2 * count), "<u2")

    def _bytes(self, at: int, size: int) -> bytes:
        try:
            self._file.seek(at)
            data = self._file.read(size)
            while len(data) < size and (more := self._file.read(size - len(data))):  # a read may bring less
                data += more
        except OSError as e:
            raise SystemExit(f"cannot read {self.path}: {e.strerror}; {self._again}") from None
        if len(data) < size:
            self._damaged(at, size, "has lost its end")
        return data

    def _damaged(self, at: int, size: int, what: str):
        raise SystemExit(f"{self.path} {what}: bytes {at} to {at + size - 1} are not what was written; "
                         f"{self._again}")


class TokenBatches:
    """Batches of (x, y), int64 tensors of shape (batch_size, max_seq_len) where y is x one token later.

    train: endless. Batch k of all ranks together comes from lane k % lanes. The training shards are one
    sequence of N tokens, cut into `lanes` regions as equal as can be, and a lane knows nothing but its own: a
    ring of n tokens. In its epoch e the ring is cut at a random offset into ceil(n / max_seq_len) windows,
    taken in random order, both from the generator [seed, lane, e]; the last window runs on over the cut. So
    every token is a target in every epoch of its lane, none is lost at the end of a shard, and epochs differ
    in where they cut. A lane's batches take its next windows, also over the end of an epoch. Of fewer than
    `lanes` windows there are as many regions as windows, which lanes share, each in an order of its own.
    val: shard 00 from its start, anew with every iter(); every token but the first is a target once. The
    last window is filled up with x = BOS and y = -1, which the loss ignores, and so are missing rows.

    Batch k of all goes to rank k % world_size: with as many lanes, 1 rank with 2 micro-batches sees what 2
    ranks with 1 see, and no token of one rank is read by another.
    Raises SystemExit when the shards are missing or damaged or read_meta finds fault with them.
    """

    def __init__(self, token_dir: str, split: str, batch_size: int, max_seq_len: int, *, seed: int = 0,
                 rank: int = 0, world_size: int = 1, lanes: int | None = None,
                 max_batches: int | None = None):
        """`lanes`: the batches that make an iteration, a multiple of world_size (default: world_size);
        `max_batches` ends the val split after so many batches of all ranks together.
        """
        lanes = lanes or world_size
        assert split in ("train", "val") and 0 <= rank < world_size and lanes % world_size == 0
        self.dir, self.split = token_dir, split
        self.batch_size, self.max_seq_len, self.max_batches = batch_size, max_seq_len, max_batches
        self.seed, self.rank, self.world_size, self.lanes = seed, rank, world_size, lanes
        meta = read_meta(token_dir)
        self.bos_id: int = meta["bos_id"]
        shards = meta["shards"][1:] if split == "train" else meta["shards"][:1]
        shards = [shard for shard in shards if shard["tokens"]]
        self.num_tokens: int = sum(shard["tokens"] for shard in shards)
        if self.num_tokens < 2:
            raise SystemExit(f"the {split} shards in {token_dir} hold no text; put more stories in: "
                             "python tinystories.py import --force FILE, then run pretokenize")
        self.bytes_per_token: float = sum(shard["bytes"] for shard in shards) / self.num_tokens
        sums = "".join(shard["sha256"] for shard in shards)
        self.fingerprint = int(hashlib.sha256(sums.encode()).hexdigest()[:15], 16)
        open_many_files()
        self._shards = [TokenShard(token_dir, shard) for shard in shards]
        self._ends = list(itertools.accumulate(shard.tokens for shard in self._shards))
        self._orders: dict[int, tuple] = {}  # of a lane: epoch, offset, order of windows
        self._epoch, self._start = 0, 0  # of a lane: its epoch, and windows since, when made or loaded
        self._batch = 0  # batches this rank took since

    def __iter__(self) -> "TokenBatches":
        if self.split == "val":
            self._batch = 0
        return self

    def __len__(self) -> int:
        """How many batches of the val split are this rank's."""
        batches = -(-(self.num_tokens - 1) // (self.batch_size * self.max_seq_len))
        batches = batches if self.max_batches is None else min(batches, self.max_batches)
        return -(-(batches - self.rank) // self.world_size)

    def __next__(self):
        import torch  # 2.8 s, which only training should pay

        B, T, N = self.batch_size, self.max_seq_len, self.num_tokens
        k = self._batch * self.world_size + self.rank
        if self.split == "val" and self._batch >= len(self):
            raise StopIteration
        self._batch += 1
        rows = np.full((B, T + 1), -1, np.int64)
        for i, row in enumerate(rows):
            if self.split == "train":
                turn, lane = divmod(k, self.lanes)
                self._read_window(lane, self._start + turn * B + i, row)
            elif (at := (k * B + i) * T) < N - 1:
                self._read(at, row[:N - at], 0, N)
        x, y = rows[:, :-1].copy(), rows[:, 1:].copy()
        x[x < 0] = self.bos_id
        return torch.from_numpy(x), torch.from_numpy(y)

    def _region(self, lane: int, lanes: int) -> tuple[int, int]:
        """Where the tokens of a lane begin and end."""
        regions = max(1, min(lanes, self.num_tokens // self.max_seq_len))
        i = lane % regions
        return self.num_tokens * i // regions, self.num_tokens * (i + 1) // regions

    def _read_window(self, lane: int, window: int, out: np.ndarray) -> None:
        """A window of a lane's endless sequence, counted from where it was made or loaded."""
        start, end = self._region(lane, self.lanes)
        size, T = end - start, self.max_seq_len
        epoch, i = divmod(window, -(-size // T))
        epoch += self._epoch
        if lane not in self._orders or self._orders[lane][0] != epoch:
            rng = np.random.default_rng([self.seed, lane, epoch])
            self._orders[lane] = epoch, int(rng.integers(T)), rng.permutation(-(-size // T))
        _, offset, order = self._orders[lane]
        self._read(start + (offset + int(order[i]) * T) % size, out, start, end)

    def _read(self, at: int, out: np.ndarray, start: int, end: int) -> None:
        """Fill `out` with the tokens from `at` on, in the ring from `start` to `end`, around and around."""
        done = 0
        while done < len(out):
            shard = bisect_right(self._ends, at)
            in_shard = at - (self._ends[shard] - self._shards[shard].tokens)
            part = self._shards[shard].read(in_shard, min(len(out) - done, end - at))
            out[done:done + len(part)] = part
            done += len(part)
            at += len(part)
            at = start if at == end else at

    def state_dict(self) -> dict[str, int]:
        """Where the data stands: the same on all ranks, after a whole number of turns of the lanes."""
        turns, rest = divmod(self._batch * self.world_size, self.lanes)
        assert not rest
        return {"epoch": self._epoch, "windows": self._start + turns * self.batch_size, "lanes": self.lanes,
                "seed": self.seed, "max_seq_len": self.max_seq_len, "num_tokens": self.num_tokens,
                "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on exactly there, with any batch size and number of ranks; with other lanes, at the next epoch.

        Raises SystemExit for other data.
        """
        for key in ("max_seq_len", "num_tokens", "fingerprint"):
            if state[key] != getattr(self, key):
                raise SystemExit(f"this run was trained on other data than {self.dir} gives now ({key} was "
                                 f"{state[key]}, is {getattr(self, key)}); put it back, or start anew from "
                                 "its weights: python train.py --init_from=CKPT")
        self.seed, self._epoch, self._start = state["seed"], state["epoch"], state["windows"]
        self._batch, self._orders = 0, {}
        if (lanes := state["lanes"]) != self.lanes:
            shortest = min(end - start for start, end in (self._region(i, lanes) for i in range(lanes)))
            self._epoch += -(-self._start // -(-shortest // self.max_seq_len))
            self._start = 0
            if self.rank == 0:
                print(f"the data is dealt out to {self.lanes} micro-batches per iteration, no longer "
                      f"{lanes}: it goes on with the next epoch, {self._epoch}", file=sys.stderr)


class StoryStarts:
    """Beginnings of random stories of a split: BOS and the first tokens, to be continued by a model.

    Raises SystemExit as TokenBatches does, and for shards without a BOS.
    """

    def __init__(self, token_dir: str, split: str):
        data = TokenBatches(token_dir, split, 1, 1)
        self.bos_id, self._shards, self._ends = data.bos_id, data._shards, data._ends
        if not any((shard.read(at, CHUNK) == self.bos_id).any()  # the very first, but for a damaged folder
                   for shard in self._shards for at in range(0, shard.tokens, CHUNK)):
            raise SystemExit(f"no story in {token_dir} begins with BOS (id {self.bos_id}), which ends "
                             "the one before; run pretokenize again")

    def sample(self, rng: np.random.Generator, count: int, length: int) -> list[list[int]]:
        """`count` prompts of BOS and 0 to length - 1 tokens, but none of a next story's."""
        prompts = []
        for _ in range(count):
            # the story that begins next after a random token
            i = bisect_right(self._ends, int(rng.integers(self._ends[-1])))
            shard = self._shards[i]
            at = int(rng.integers(shard.tokens))
            while not len(found := np.flatnonzero(shard.read(at, 4096) == self.bos_id)):
                at += 4096
                if at >= shard.tokens:
                    i, at = (i + 1) % len(self._shards), 0
                    shard = self._shards[i]
            at += int(found[0]) + 1
            story = shard.read(at, int(rng.integers(length))).tolist()
            if self.bos_id in story:
                story = story[:story.index(self.bos_id)]
            prompts.append([self.bos_id, *story])
        return prompts


def pretokenize_again(folder: str, more: str = "") -> str:
    """What to type when something is wrong with a token folder."""
    data_dir, name = os.path.split(os.path.normpath(folder))
    size = name.removeprefix("tok")
    return "run: " + command("pretokenize", data_dir or ".", int(size) if size.isdecimal() else 0, more)


def is_entry(entry: object) -> bool:
    """Is this what tokenize_shard says of a shard? It may come from a damaged, or anyone's, meta.json."""
    texts = {"name": r"data[0-9]{1,9}\.bin", "sha256": "[0-9a-f]{64}", "crc32": "([0-9a-f]{8})*"}
    counts = ("tokens", "stories", "bytes", "source_bytes")
    return (isinstance(entry, dict) and type(entry.get("source_mtime_ns")) is int
            and all(isinstance(entry.get(key), str) and re.fullmatch(pattern, entry[key])
                    for key, pattern in texts.items())
            and all(type(entry.get(key)) is int and 0 <= entry[key] < 1 << 60 for key in counts)
            and len(entry["crc32"]) == 8 * -(-2 * entry["tokens"] // BLOCK))


def is_head(meta: object) -> bool:
    """Are this meta.json's own fields, but for its shards, what pretokenize writes?"""
    return (isinstance(meta, dict) and type(meta.get("vocab_size")) is int
            and 0 < meta["vocab_size"] <= MAX_VOCAB and type(meta.get("bos_id")) is int
            and 0 <= meta["bos_id"] < meta["vocab_size"] and isinstance(meta.get("tokenizer_sha256"), str))


def read_meta(folder: str, vocab_size: int | None = None) -> dict:
    """The meta.json of a token folder, checked against the files, the tokenizer and `vocab_size`."""
    again = pretokenize_again(folder)
    try:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
            meta = json.load(f)
    except (FileNotFoundError, NotADirectoryError):
        cut = glob.glob(os.path.join(glob.escape(folder), "*.note.json"))
        what = "an unfinished pretokenize" if cut else "no token shards"
        raise SystemExit(f"{what} in {folder}; {again}") from None
    except OSError as e:
        raise SystemExit(f"cannot read {folder}/meta.json: {e.strerror}; {again}") from None
    except (ValueError, RecursionError):
        meta = None
    version = meta.get("format") if isinstance(meta, dict) else None
    if type(version) is int and version != META_FORMAT:
        raise SystemExit(f"{folder} has format {version}, not {META_FORMAT}; {again}")
    shards = meta.get("shards") if is_head(meta) else None
    if version is None or not isinstance(shards, list) or not all(map(is_entry, shards)):
        raise SystemExit(f"{folder}/meta.json is damaged; {again}")
    found = meta["vocab_size"]
    if vocab_size not in (None, found):
        raise SystemExit(f"{folder} holds tokens of a vocabulary of {found}, not {vocab_size}; "
                         f"give --vocab_size={found}, or {again}")
    model = os.path.normpath(folder) + ".model"
    if os.path.exists(model) and Tokenizer(model).sha256 != meta["tokenizer_sha256"]:
        raise SystemExit(f"{folder} was made with another tokenizer than {model} is now; {again}")
    wrong = [shard["name"] for shard in shards
             if file_size(os.path.join(folder, shard["name"])) != 2 * shard["tokens"]]
    if wrong:
        raise SystemExit(f"{folder}/{wrong[0]} is missing or not of its size; {again}")
    if len(shards) < 2:
        raise SystemExit(f"{folder} needs a shard for validation and one for training; {again} --force")
    return meta


# ---- command line ------------------------------------------------------------------------------------

def whole_number(least: int, most: float = math.inf, why: str = "") -> Callable[[str], int]:
    """A parser of numbers from `least` to `most`; `why` explains the limits."""
    limits = f" between {least} and {most}" if most < math.inf else f" above {least - 1}" if least else ""

    def number(value: str) -> int:
        if not value.isdecimal() or not least <= int(value) <= most:
            raise argparse.ArgumentTypeError(f"{value!r} is not a whole number{limits}{why}")
        return int(value)

    return number


def part(value: str) -> tuple[int, int]:
    """(2, 4) for "2/4"."""
    match = re.fullmatch("([0-9]{1,4})/([0-9]{1,4})", value)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{value!r} is not a part such as 1/4, 2/4, 3/4 or 4/4")
    return int(match[1]), int(match[2])


def some_text(value: str) -> str:
    if not value:
        raise argparse.ArgumentTypeError("there is nothing after it")
    return value


def web_address(value: str) -> str:
    if not re.match(r"https?://[^/]", value):
        raise argparse.ArgumentTypeError(f"{value!r} does not begin like https://server/")
    return value


class ShowDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Adds each option's default to its help, where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, False) else action.help


def make_cli() -> CommandLine:
    cli = CommandLine(prog="tinystories.py", description=__doc__)
    stages = cli.add_subparsers(dest="stage", required=True, metavar="STAGE", help="STAGE --help tells more")

    def stage(name: str, run: Callable, summary: str, force: str = "") -> CommandLine:
        parser = stages.add_parser(name, help=summary, description=summary + ".",
                                   formatter_class=ShowDefaults)
        parser.add_argument("--data_dir", type=some_text, default="data",
                            help="folder for everything this script writes")
        if force:
            parser.add_argument("--force", action="store_true", help=force)
        parser.set_defaults(run=run, parser=parser)
        return parser

    def share(parser: CommandLine) -> None:
        parser.add_argument("--shard", type=part, metavar="I/N", help="do one of N parts: 1/4, 2/4, 3/4 and "
                            "4/4 on machines that share the data_dir; together they write the same files")

    replace = "replace the stories that are there"
    why = " (one is for validation)"
    stories, shards = whole_number(2, why=why), whole_number(2, MAX_SHARDS, why)
    p = stage("download", download, "Download TinyStories (1.5 GB) and the Llama 2 tokenizer", replace)
    p.add_argument("--small", action="store_true", help="only TinyStories-valid.txt (20 MB), as shards")
    p.add_argument("--url", type=web_address, help="a mirror of the archive (--small: of the .txt)")
    p.add_argument("--tokenizer_url", type=web_address, default=TOKENIZER_URL,
                   help="a mirror of the Llama 2 tokenizer.model")

    p = stage("import", import_files, "Make shards of your own text: .txt, .json, .jsonl", replace)
    p.add_argument("paths", nargs="+", metavar="FILE", help="text, a JSON list, or a JSON object per line")
    p.add_argument("--separator", type=some_text, default="endoftext",
                   help="what stands between the stories of a text file: endoftext "
                   "(<|endoftext|>), blank (blank lines), or any other text, \\n being a new line")
    p.add_argument("--field", help="where a JSON object has its text (default: story, else text)")
    p.add_argument("--num_shards", type=shards, default=10, help="files to make, one for validation")
    p.add_argument("--seed", type=int, default=1337, help="decides which stories are for validation")

    p = stage("synth", synth, "Make up simple stories from a built-in grammar; needs no network", replace)
    p.add_argument("--num_stories", type=stories, default=20000, help="how many")
    p.add_argument("--num_shards", type=shards, default=10, help="files to make, one for validation")
    p.add_argument("--seed", type=int, default=1337, help="another seed, other stories")
    share(p)

    p = stage("train_vocab", train_vocab, "Train a vocabulary on the training shards")
    p.add_argument("--vocab_size", type=int, required=True, help=f"pieces, {MIN_VOCAB} to {MAX_VOCAB}")
    p.add_argument("--num_shards", type=whole_number(1), default=10, help="how many training shards to read")

    p = stage("pretokenize", pretokenize, "Turn the stories into tokens", "also those up to date")
    p.add_argument("--vocab_size", type=whole_number(0), default=0,
                   help="a vocabulary from train_vocab; 0: Llama 2's")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    p.add_argument("--num_workers", type=whole_number(1), default=cores, help="processes")
    share(p)
    return cli


def main(argv: list[str] | None = None) -> None:
    args = vars(make_cli().parse_args(argv))
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
