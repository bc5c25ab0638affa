"""tinystories.py: downloads from a hostile local server, every import format, shards, tokens and batches.

References are independent: sentencepiece called story by story, json.load, and batches by brute force.
"""

import argparse
import contextlib
import gzip
import hashlib
import http.server
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tinystories as ts  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

SHARED = ROOT.parent / "shared" / "data"


def stories(count=300, seed=1):
    return [ts.synth_story(random.Random(f"{seed}:{i}")) for i in range(count)]


def run(*args, cwd=None, check=False):
    done = subprocess.run([sys.executable, str(ROOT / "tinystories.py"), *map(str, args)], cwd=cwd,
                          capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


def visible(folder):
    """Without the locks."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def refuses(message, function, *args, **kwargs):
    """The call ends in one line that holds `message`."""
    with pytest.raises(SystemExit) as e:
        function(*args, **kwargs)
    assert message in str(e.value) and "\n" not in str(e.value), str(e.value)


# ---- fetch -------------------------------------------------------------------------------------------

DATA = random.Random(0).randbytes(300_000)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves server.data; server.faults is a list of what to do wrong, one per request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        s = self.server
        s.requests.append(dict(self.headers))
        fault = s.faults.pop(0) if s.faults else ""
        if isinstance(fault, int):
            self.send_response(fault)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, start, name = s.data, 0, self.headers.get("Range", "")
        if name and s.ranges and (s.careless or self.headers.get("If-Range") == s.etag):
            start = int(name.removeprefix("bytes=").removesuffix("-"))
        if fault == "wrong range":
            start -= 1
        if start >= len(data):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if s.etag:
            self.send_header("ETag", s.etag)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(data[start:start + 100_000] if fault else data[start:])
            self.wfile.flush()
            if fault == "stall":
                s.release.wait(20)
        if fault:
            self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(ts, "BACKOFF", 0.01)
    monkeypatch.setattr(ts, "TIMEOUT", (5, 1.5))
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    s.data, s.faults, s.requests, s.ranges, s.etag, s.release = DATA, [], [], True, '"v1"', threading.Event()
    s.careless = False  # about If-Range
    s.url = f"http://127.0.0.1:{s.server_port}/x.bin"
    thread = threading.Thread(target=s.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield s
    s.release.set()
    s.shutdown()
    thread.join()
    s.server_close()


def fetched(server, path, alone=True, **kwargs):
    ts.fetch(server.url, str(path), **kwargs)
    assert path.read_bytes() == server.data
    assert not alone or os.listdir(path.parent) == [path.name]
    return [request.get("Range") for request in server.requests]


def test_fetch(server, tmp_path):
    assert fetched(server, tmp_path / "f", sha256=hashlib.sha256(DATA).hexdigest()) == [None]


@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_fetch_resumes(server, tmp_path, fault, capsys):
    server.faults = [fault, fault]
    assert fetched(server, tmp_path / "f") == [None, "bytes=100000-", "bytes=200000-"]
    assert "trying again" in capsys.readouterr().err


def test_fetch_resumes_in_another_run(server, tmp_path, monkeypatch):
    monkeypatch.setattr(ts, "TRIES", 1)
    server.faults = ["cut"]
    refuses("tinystories.py synth (or import FILE)", ts.fetch, server.url, str(tmp_path / "f"))
    assert sorted(os.listdir(tmp_path)) == ["f.part", "f.part.json"]
    assert fetched(server, tmp_path / "f")[-1] == "bytes=100000-"


def test_fetch_never_joins_two_versions(server, tmp_path, monkeypatch):
    monkeypatch.setattr(ts, "TRIES", 1)
    server.faults = ["cut"]
    refuses("cannot download", ts.fetch, server.url, str(tmp_path / "f"))
    server.data, server.etag = DATA[::-1], '"v2"'
    fetched(server, tmp_path / "f")


def test_fetch_of_a_server_that_ignores_if_range(server, tmp_path, monkeypatch):
    monkeypatch.setattr(ts, "TRIES", 1)
    server.faults = ["cut"]
    refuses("cannot download", ts.fetch, server.url, str(tmp_path / "f"))
    server.data, server.etag, server.careless = DATA[::-1], '"v2"', True
    monkeypatch.setattr(ts, "TRIES", 2)
    fetched(server, tmp_path / "f")


def test_what_cannot_be_imported_does_not_stay(server, tmp_path):
    """A captive portal's page, or a compressed body: the next try asks again."""
    args = ["download", "--small", f"--url={server.url}", f"--tokenizer_url={server.url}"]
    args += [f"--data_dir={tmp_path}"]
    for data, message in ((b"<html>Please log in.</html>", "was dropped (found 1 of the 2"),
                          (gzip.compress(b"one<|endoftext|>two" * 99), "was dropped (")):
        server.data = data
        refuses(message, ts.main, args)
        assert not (tmp_path / "TinyStories-valid.txt").exists()
    server.data = b"one<|endoftext|>two"
    refuses("wrong content", ts.main, args)  # of the tokenizer: the stories are there
    assert len(ts.shard_files(str(tmp_path))) == 2
    server.data = b"three<|endoftext|>four<|endoftext|>five"  # another version, which --force wants
    server.faults = [404]
    refuses("404", ts.main, [*args, "--force"])
    assert (tmp_path / "TinyStories-valid.txt").read_bytes() == b"one<|endoftext|>two"
    refuses("wrong content", ts.main, [*args, "--force"])
    assert len(ts.shard_files(str(tmp_path))) == 3
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "TinyStories-valid.txt").write_bytes(gzip.compress(b"one<|endoftext|>two" * 99))
    refuses("unpack it first: gzip -dc ", ts.main, [*args, f"--data_dir={tmp_path / 'own'}"])
    assert (tmp_path / "own" / "TinyStories-valid.txt").exists()


def test_parts_are_not_put_together_under_a_reader(tok):
    """pretokenize, say, reads the stories that --force would replace."""
    args = ["synth", "--num_stories=40", "--num_shards=4", "--force", "--shard=1/1", f"--data_dir={tok}"]
    before = ts.shard_files(tok), [Path(path).read_bytes() for path in ts.shard_files(tok)]
    with held(tok, "", "stories"):
        refuses("is in use by", ts.main, args)
        assert (ts.shard_files(tok), [Path(path).read_bytes() for path in ts.shard_files(tok)]) == before
    ts.main(args)
    assert len(ts.shard_files(tok)) == 4


def test_commands_in_messages_can_be_pasted():
    assert ts.command("synth", "my data") == "python tinystories.py synth --data_dir='my data'"


def test_fetch_starts_over_for_another_url_or_note(server, tmp_path, monkeypatch):
    (tmp_path / "f.part").write_bytes(b"x" * 1000)
    for note in ("", "[]", "{}", json.dumps({"url": "http://other", "version": '"v1"', "total": len(DATA)})):
        (tmp_path / "f.part.json").write_text(note)
        assert fetched(server, tmp_path / "f")[-1] is None
        os.rename(tmp_path / "f", tmp_path / "f.part")


def test_fetch_without_ranges(server, tmp_path):
    server.ranges, server.faults = False, ["cut", "cut"]
    assert fetched(server, tmp_path / "f") == [None, "bytes=100000-", "bytes=100000-"]


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
def test_fetch_without_a_version(server, tmp_path, etag):
    server.etag, server.faults = etag, ["cut"]
    assert fetched(server, tmp_path / "f") == [None, None]


def test_fetch_with_wrong_ranges(server, tmp_path):
    server.faults = ["cut", "wrong range"]
    assert fetched(server, tmp_path / "f") == [None, "bytes=100000-", None]


def test_fetch_with_416(server, tmp_path):
    server.faults = ["cut", 416]
    assert fetched(server, tmp_path / "f") == [None, "bytes=100000-", None]


@pytest.mark.parametrize("status", [500, 503, 429])
def test_fetch_after_passing_trouble(server, tmp_path, status):
    server.faults = [status, status]
    assert len(fetched(server, tmp_path / "f")) == 3


def test_fetch_gives_up(server, tmp_path):
    server.faults = [503] * 100
    refuses("503", ts.fetch, server.url, str(tmp_path / "f"))
    assert len(server.requests) == ts.TRIES and os.listdir(tmp_path) == []


@pytest.mark.parametrize("status", [404, 403, 410])
def test_fetch_refused_at_once(server, tmp_path, status):
    server.faults = [status] * 9
    refuses(f"{status}", ts.fetch, server.url, str(tmp_path / "f"), flag="--tokenizer_url")
    assert len(server.requests) == 1 and os.listdir(tmp_path) == []


def test_fetch_checksum(server, tmp_path):
    refuses("--tokenizer_url=URL", ts.fetch, server.url, str(tmp_path / "f"), "0" * 64, "--tokenizer_url")
    assert os.listdir(tmp_path) == []


def test_fetch_without_network(tmp_path, monkeypatch):
    monkeypatch.setattr(ts, "BACKOFF", 0.01)
    refuses("python tinystories.py synth", ts.fetch, "http://127.0.0.1:9/x", str(tmp_path / "f"))
    for url in ("nonsense", "file:///etc/passwd", "http://"):
        refuses("--url", ts.fetch, url, str(tmp_path / "f"))


def archive(members):
    """A .tar.gz of (name, content or None, changes) triples."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for name, content, changes in members:
            info = tarfile.TarInfo(name)
            info.size = len(content or b"")
            for key, value in changes.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content or b""))
    return raw.getvalue()


SHARD = json.dumps([{"story": "Hello."}, {"story": "Bye."}]).encode()
HOSTILE = [
    ("../data07.json", SHARD, {}), ("/data08.json", SHARD, {}), ("a/../../data09.json", SHARD, {}),
    ("data10.json", None, {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
    ("data11.json", None, {"type": tarfile.LNKTYPE, "linkname": "data00.json"}),
    ("data12.json", None, {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}),
    ("data13.json", None, {"type": tarfile.FIFOTYPE}), ("data14.json", None, {"type": tarfile.DIRTYPE}),
    ("run.sh", b"rm", {}), ("data15.json.exe", b"x", {}), ("x/data01.json", b"again", {})]


def test_extract(tmp_path):
    file, folder = tmp_path / "a.tar.gz", tmp_path / "in" / "out"
    file.write_bytes(archive([("data00.json", SHARD, {}), ("sub/data01.json", SHARD, {}), *HOSTILE]))
    ts.extract(str(file), str(folder))
    # files that would lie elsewhere are taken without their path; links, devices and the rest are not taken
    assert sorted(os.listdir(folder)) == [f"data{i:02d}.json" for i in (0, 1, 7, 8, 9)]
    assert all(p.read_bytes() == SHARD and not p.is_symlink() for p in folder.iterdir())
    assert sorted(os.listdir(tmp_path)) == ["a.tar.gz", "in"] and os.listdir(tmp_path / "in") == ["out"]


def test_extract_damaged(tmp_path):
    whole = archive([("data00.json", SHARD, {}), ("data01.json", DATA, {})])
    flipped = bytearray(whole)
    flipped[-6] ^= 1  # in gzip's checksum
    for bad in (whole[:1000], whole[:-8], bytes(flipped), b"", b"<html>", gzip.compress(b"no tar" * 200)):
        (tmp_path / "a.tar.gz").write_bytes(bad)
        refuses("delete it", ts.extract, str(tmp_path / "a.tar.gz"), str(tmp_path / "out"))
        assert os.listdir(tmp_path) == ["a.tar.gz"]


def test_download(server, tmp_path, capsys, monkeypatch):
    model = SHARED / "llama2" / "tokenizer.model"
    if not model.exists():
        pytest.skip(f"no Llama 2 tokenizer at {model}")
    data, models = str(tmp_path / "data"), tmp_path / "data" / "tokenizer.model"
    server.data = archive([("data00.json", SHARD, {}), ("data01.json", SHARD, {})])
    monkeypatch.setattr(ts, "fetch", lambda url, path, *rest, _fetch=ts.fetch: (
        models.write_bytes(model.read_bytes()) if path == str(models) and not models.exists()
        else _fetch(url, path, *rest)))
    args = ["download", "--data-dir", data, "--url", server.url]
    ts.main(args)
    assert visible(data) == [
        "TinyStories_all_data", "TinyStories_all_data.tar.gz", "tokenizer.bin", "tokenizer.model"]
    assert (Path(data) / "tokenizer.bin").read_bytes() == (SHARED / "llama2" / "tokenizer.bin").read_bytes()
    assert "\nnext: python tinystories.py pretokenize" in capsys.readouterr().out
    ts.main(args)
    assert capsys.readouterr().out.count("already there") == 2 and len(server.requests) == 1
    # --small, into a folder that holds stories: kept, then replaced
    server.data = b"Hello.\n<|endoftext|>\nBye.\n<|endoftext|>\n"
    ts.main([*args, "--small"])
    assert len(server.requests) == 1
    ts.main([*args, "--small", "--force"])
    assert sorted(shards(data).values()) == [["Bye."], ["Hello."]]


# ---- shards ------------------------------------------------------------------------------------------

def shards(data_dir):
    """What json.load says is in each shard, by name."""
    folder = Path(data_dir) / "TinyStories_all_data"
    return {path.name: [item["story"] for item in json.loads(path.read_text("utf-8"))]
            for path in sorted(folder.iterdir())}


def imported(tmp_path, name, content, *flags):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    ts.main(["import", str(tmp_path / name), f"--data_dir={tmp_path / 'd'}", "--force", *flags])
    return sorted(story for shard in shards(tmp_path / "d").values() for story in shard)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_import_text(tmp_path, newline, bom):
    text = ["One é.\n\nOne, too.", "Two 😀.", "Three."]
    joined = bom + "<|endoftext|>".join(["", *(f"\n{t}\n" for t in text), "  ", ""]).replace("\n", newline)
    assert imported(tmp_path, "a.txt", joined) == sorted(text)
    blank = bom + "\n\n  \nOne.\nOne, too.\n\n\n \nTwo.\n\t\nThree.\n\n".replace("\n", newline)
    assert imported(tmp_path, "a.txt", blank, "--separator=blank") == ["One.\nOne, too.", "Three.", "Two."]
    own = bom + "One.\n---\nTwo. --- Two.\n---\n\n---\nThree.".replace("\n", newline)
    assert imported(tmp_path, "a.txt", own, "--separator", r"\n---\n") == ["One.", "Three.", "Two. --- Two."]


def test_import_json(tmp_path):
    text = ["Tom said \"hi\".\n", "\u2028é😀", "c", "d\\"]
    for items in (text, [{"x": 1, "story": t, "text": "no"} for t in text], [{"text": t} for t in text],
                  [{"story": {"a": [1]}, "text": t} for t in text]):
        plain = json.dumps(items)
        for content in (plain, json.dumps(items, indent=2, ensure_ascii=False), "\ufeff" + plain):
            assert imported(tmp_path, "a.json", content) == sorted(t.strip() for t in text)
        for end in ("\n", "\r\n", "\n\n"):
            lines = end.join(map(json.dumps, items))
            assert imported(tmp_path, "a.jsonl", lines) == sorted(t.strip() for t in text)
    other = json.dumps([{"t": "a", "text": "x"}, {"t": "b"}])
    assert imported(tmp_path, "a.json", other, "--field=t") == ["a", "b"]
    assert imported(tmp_path, "a.json", r'["a\ud83d", "\ud83d\ude00"]') == ["a\ud83d", "😀"]


def test_import_errors(tmp_path, capsys):
    cases = [
        ("a.txt", b"One <|endoftext|> caf\xe9", [], "byte 21 is 0xe9"),
        ("a.txt", b"x" * ts.CHUNK + b"<|endoftext|>\xff", [], f"byte {ts.CHUNK + 13} is 0xff"),
        ("a.txt", b"x" * (ts.CHUNK - 1) + "é".encode()[:1], [], f"byte {ts.CHUNK - 1} is 0xc3"),
        ("a.txt", b"only one", [], "found 1 of the 2"), ("a.txt", b"", [], "found 0 of the 2"),
        ("a.txt", b"one two", ["--separator=blank"], "--separator"),
        ("a.json", b'{"story": "a"}', [], "line 1, item 0: not a JSON list"),
        ("a.json", b'[{"story": "a"},\n{"story": "b"\n"x"}]', [], "line 3, item 1: Expecting ',' delimiter"),
        ("a.json", b'["a",\n"b"', [], "line 2, item 2: the file ends inside the list"),
        ("a.json", b'["a",\n"b', [], "line 2, item 1: Unterminated string"),
        ("a.json", b'["a", "b"] x', [], "text after the list"), ("a.json", b"[] x", [], "text after"),
        ("a.json", b"[" * 100_000, [], "nested too deeply"),
        ("a.json", b'["a" "b"]', [], "expected ',' or ']'"), ("a.json", b"", [], "not a JSON list"),
        ("a.json", b'["a", 3]', [], "item 1: no text"),
        ("a.json", b'["a",]', [], "item 1: Expecting value"),
        ("a.json", b'[{"title": "a"}]', [], "no text under story or text in {"),
        ("a.json", b'[{"title": "a"}]', ["--field=body"], "no text under body"),
        ("a.jsonl", b'"a"\n\n{"story": "b"\n', [], "line 3: "),
        ("a.jsonl", b"[1]\n", [], "line 1: a list, [1]; name a file"),
        ("a.jsonl", b"1\n", [], "line 1: no text under"),
    ]
    for name, content, flags, message in cases:
        (tmp_path / name).write_bytes(content)
        args = ["import", str(tmp_path / name), f"--data_dir={tmp_path / 'd'}", *flags]
        refuses(message, ts.main, args)
        assert not (tmp_path / "d" / "TinyStories_all_data").exists()
    refuses("no such file", ts.main, ["import", str(tmp_path / "none.txt")])
    refuses("--data_dir", ts.main, ["import", str(tmp_path), f"--data_dir={tmp_path / 'd'}"])


def test_import_counts_what_it_leaves_out(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one<|endoftext|> \n<|endoftext|>two<|endoftext|>\n")
    ts.main(["import", str(tmp_path / "a.txt"), f"--data_dir={tmp_path / 'd'}"])
    assert "2 stories in 2 shards, 1 of them for validation; 2 empty ones left out" in capsys.readouterr().out


def test_import_without_separator_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(ts, "LONGEST_STORY", 1 << 20)
    (tmp_path / "a.txt").write_bytes(b"word " * (1 << 20))
    refuses("--separator=blank", ts.main, ["import", str(tmp_path / "a.txt"), f"--data_dir={tmp_path / 'd'}"])


def test_import_deals_fairly(tmp_path):
    text = [f"story {i}" for i in range(1003)]
    assert imported(tmp_path, "a.jsonl", "\n".join(map(json.dumps, text)), "--num_shards=10") == sorted(text)
    first = shards(tmp_path / "d")
    assert list(first) == [f"data{i:02d}.json" for i in range(10)]
    assert all(100 <= len(shard) <= 101 for shard in first.values())
    held_out = [int(story.split()[1]) for story in first["data00.json"]]
    assert len({i // 10 for i in held_out}) == len(held_out)  # one of every ten in a row
    assert len({i % 10 for i in held_out}) > 3  # and not always the same of the ten
    imported(tmp_path, "a.jsonl", "\n".join(map(json.dumps, text)), "--num_shards=10")
    assert shards(tmp_path / "d") == first
    imported(tmp_path, "a.jsonl", "\n".join(map(json.dumps, text)), "--num_shards=10", "--seed=2")
    assert shards(tmp_path / "d") != first


@pytest.mark.parametrize("count", [2, 3, 9, 10, 11])
def test_import_of_few_stories(tmp_path, count):
    text = [f"s{i:02}" for i in range(count)]
    assert imported(tmp_path, "a.json", json.dumps(text)) == text
    assert len(shards(tmp_path / "d")) == min(count, 10) and all(shards(tmp_path / "d").values())


def test_import_keeps_what_is_there(tmp_path, capsys):
    imported(tmp_path, "a.json", '["a", "b", ""]')
    assert "2 stories in 2 shards" in capsys.readouterr().out
    args = ["import", str(tmp_path / "a.json"), f"--data_dir={tmp_path / 'd'}"]
    refuses("--force", ts.main, args)
    before = shards(tmp_path / "d")
    (tmp_path / "a.json").write_text('["c", "d", 3]')
    refuses("item 2", ts.main, [*args, "--force"])
    assert shards(tmp_path / "d") == before
    folder = tmp_path / "d" / "TinyStories_all_data"
    folder.rename(f"{folder}.old")  # killed between two renames
    refuses("--force", ts.main, args)
    assert shards(tmp_path / "d") == before


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text() | st.fixed_dictionaries({"story": st.text(), "n": st.floats(allow_nan=False)})),
       st.integers(1, 40), st.sampled_from([None, 1]), st.booleans())
def test_json_list_reads_in_pieces(tmp_path_factory, items, chunk, indent, ascii_only):
    path = tmp_path_factory.getbasetemp() / "pieces.json"
    path.write_text(json.dumps(items, indent=indent, ensure_ascii=ascii_only), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ts, "CHUNK", chunk)
        sizes = []
        assert list(ts.read_json_list(str(path), sizes.append)) == items
    assert sum(sizes) == path.stat().st_size


def test_long_stories_take_linear_time(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(["x" * 20_000_000, "y"]))
    start = time.process_time()
    assert [len(s) for s in ts.read_stories(str(tmp_path / "a.json"), id)] == [20_000_000, 1]
    assert time.process_time() - start < 3


def test_synth(tmp_path, capsys):
    args = ["synth", "--num_stories=50", "--num-shards=5", f"--data_dir={tmp_path / 'd'}"]
    ts.main(args)
    first = shards(tmp_path / "d")
    assert [len(s) for s in first.values()] == [10] * 5
    assert sorted(sum(first.values(), [])) == sorted(s.strip() for s in stories(50, 1337))
    refuses("--force", ts.main, args)
    ts.main([*args, "--force"])
    assert shards(tmp_path / "d") == first
    ts.main([*args, "--force", "--seed=7"])
    assert shards(tmp_path / "d") != first


SPEECH_TAG = re.compile(r"(said|asked|cried|(he|she) (said|asked|cried))\b")


class OnlyRandom:
    """A generator with nothing but `random()`, the one method that is the same on every Python version."""

    def __init__(self, seed: int):
        self.random = random.Random(seed).random


def sentences(story: str) -> list[str]:
    """The story cut after . ! or ? (and a closing quote), but not before `said Lily`."""
    return re.split(r'(?<=[.!?])\s+(?=["A-Z])|(?<=[.!?]")\s+(?=["A-Z])', story)


def test_synth_stories_are_well_formed():
    rng = OnlyRandom(1)
    stories = [ts.synth_story(rng) for _ in range(5000)]
    for story in stories:
        assert story.isascii() and not re.search(r"[{}\[\]|/_]", story), story
        assert "  " not in story and not re.search(r"\s[.,!?]|[.,!?]{2}", story), story
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", story, re.IGNORECASE), story
        assert not re.search(r"\b(\w+) \1\b", story), story
        for paragraph in story.split("\n"):
            assert re.match(r'"?[A-Z]', paragraph) and re.search(r'[.!?]"?$', paragraph), story
            quoted = paragraph.split('"')[1::2]
            assert paragraph.count('"') % 2 == 0, story
            assert all(re.fullmatch(r"[A-Z].*[.,!?]", speech) for speech in quoted), story
            # a small letter after . ! ? is only ever a tag such as `said Lily` after a closing quote
            for end in re.finditer(r'[.!?]("?) (?=[a-z])', paragraph):
                assert end[1] and SPEECH_TAG.match(paragraph, end.end()), story
        assert 3 <= len(sentences(story)) <= 15, story


def test_synth_stories_are_distinct_and_repeatable():
    rng = random.Random(2)
    stories = [ts.synth_story(rng) for _ in range(20000)]
    assert len(set(stories)) >= 0.995 * len(stories)
    again = OnlyRandom(2)
    assert [ts.synth_story(again) for _ in range(100)] == stories[:100]
    words = {word for story in stories for word in re.findall(r"[a-z]+", story.lower())}
    assert len(words) < 600


def test_synth_cast_is_consistent():
    girls = "Lily Mia Anna Sue Amy Lucy Coco Dot Ruby Poppy".split()
    boys = "Tim Ben Tom Max Sam Jack Bobo Hop Rusty Pip".split()
    rng = random.Random(3)
    for _ in range(5000):
        story = ts.synth_story(rng)
        hero = re.search(r"named ([A-Z][a-z]+)|^([A-Z][a-z]+) was a ", story)
        hero = hero[1] or hero[2]
        assert not re.search(rf"friend {hero}\b|I am {hero},", story), story
        names = [name for name in girls + boys if re.search(rf"\b{name}\b", story)]
        assert hero in names and len(names) <= 2, story
        if all(name in girls for name in names) and not re.search(r"\b([Dd]ad|[Gg]randpa)\b", story):
            assert not re.search(r"\b(he|him|his)\b", story, re.IGNORECASE), story
        if all(name in boys for name in names) and not re.search(r"\b([Mm]um|[Gg]randma)\b", story):
            assert not re.search(r"\b(she|her)\b", story, re.IGNORECASE), story


def test_shards_missing(tmp_path):
    data = str(tmp_path)
    for args in (["train_vocab", "--vocab_size=300"], ["pretokenize"]):
        refuses("tinystories.py download --data_dir=" + data, ts.main, [*args, "--data_dir=" + data])
    (tmp_path / "TinyStories_all_data").mkdir()
    refuses("no stories", ts.shard_files, data)
    for name in ("data01.json", "data02.json"):
        (tmp_path / "TinyStories_all_data" / name).write_bytes(SHARD)
    refuses("data00.json", ts.shard_files, data)
    for i in (0, 100, 11):
        (tmp_path / "TinyStories_all_data" / f"data{i:02d}.json").write_bytes(SHARD)
    assert [ts.shard_number(p) for p in ts.shard_files(data)] == [0, 1, 2, 11, 100]


# ---- train_vocab and pretokenize ---------------------------------------------------------------------

@pytest.fixture
def data(tmp_path):
    """A data folder of five shards; the validation shard alone holds the word and letter ß."""
    texts = stories(300)
    texts[3] = "  Two  spaces.\n\n And a  line \n\nbreak.\n  "
    texts[5:10] = ["In 2023, 2023 was 2023. " * 50] * 5
    texts[4] = "A lone \ud83d half, a NUL \0, an emoji 😀."
    ts.write_shards([*texts, ""], str(tmp_path / "data"), 5, 1, False)
    path = Path(ts.shard_files(str(tmp_path / "data"))[0])
    texts = [*shards(tmp_path / "data")["data00.json"], "ßßßß " * 500, " "]
    path.write_text(json.dumps([{"story": s} for s in texts]))
    return str(tmp_path / "data")


@pytest.fixture
def tok(data):
    ts.train_vocab(data, 350, 10)
    return data


def test_train_vocab(data, capfd):
    ts.main(["train_vocab", "--vocab-size=350", "--data_dir=" + data])
    out, err = capfd.readouterr()
    assert err == "" and out.count("\n") == 1 and f"pretokenize --vocab_size=350 --data_dir={data}" in out
    assert visible(data) == ["TinyStories_all_data", "tok350.bin", "tok350.model"]
    Tokenizer(data + "/tok350.model").export(data + "/t")
    assert Path(data, "tok350.bin").read_bytes() == Path(data, "t").read_bytes()
    Path(data, "t").unlink()
    first = Path(data, "tok350.model").read_bytes()
    sp = sentencepiece.SentencePieceProcessor(model_proto=first)
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    assert len(pieces) == 350 and pieces[:3] == ["<unk>", "<s>", "</s>"]
    assert [sp.unk_id(), sp.bos_id(), sp.eos_id(), sp.pad_id()] == [0, 1, 2, -1]
    assert pieces[3:259] == [f"<0x{i:02X}>" for i in range(256)]
    assert all(len(p.strip("▁")) == 1 for p in pieces[259:] if any(c.isdigit() for c in p))  # digits split
    assert not any("ß" in p for p in pieces)  # validation text is not looked at
    assert sp.decode(sp.encode("  a  b ﬁ ß\n")) == "  a  b ﬁ ß\n"  # nothing normalized, spaces kept
    ts.main(["train_vocab", "--vocab-size=350", "--data_dir=" + data])
    assert Path(data, "tok350.model").read_bytes() == first
    assert visible(data) == ["TinyStories_all_data", "tok350.bin", "tok350.model"]


def test_train_vocab_keeps_another_vocabulary(data, capfd):
    """Such as that of a model of others, which nothing could make again."""
    theirs = Path(data, "tok350.model")
    theirs.write_bytes(b"theirs")
    Path(data, "tok350.bin").write_bytes(b"theirs, too")
    ts.train_vocab(data, 350, 10)
    name = f"tok350-{hashlib.sha256(b'theirs').hexdigest()[:8]}.model"
    assert Path(data, name).read_bytes() == b"theirs" and name in capfd.readouterr().out
    assert b"theirs" not in theirs.read_bytes() + Path(data, "tok350.bin").read_bytes()
    theirs.unlink()
    Path(data, "tok350.bin").write_bytes(b"theirs alone")
    ts.train_vocab(data, 350, 10)
    name = f"tok350-{hashlib.sha256(b'theirs alone').hexdigest()[:8]}.bin"
    assert Path(data, name).read_bytes() == b"theirs alone"


def test_train_vocab_from_a_file_gives_the_same(data, tmp_path):
    """As llama2.c does it: the text in a file of lines, read by sentencepiece."""
    ts.train_vocab(data, 400, 2)
    with open(tmp_path / "tiny.txt", "w", encoding="utf-8") as f:
        for name in ("data01.json", "data02.json"):
            for story in shards(data)[name]:
                f.write(story.strip().replace("\ud83d", "\ufffd") + "\n")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "tiny.txt"), model_prefix=str(tmp_path / "m"), model_type="bpe", vocab_size=400,
        input_format="text", character_coverage=1.0, split_digits=True, allow_whitespace_only_pieces=True,
        byte_fallback=True, unk_surface=r" \342\201\207 ", normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2)
    ours, theirs = (sentencepiece.SentencePieceProcessor(model_file=str(p))
                    for p in (Path(data, "tok400.model"), tmp_path / "m.model"))
    assert [(ours.id_to_piece(i), ours.get_score(i)) for i in range(400)] == \
           [(theirs.id_to_piece(i), theirs.get_score(i)) for i in range(400)]


def test_train_vocab_reads_long_lines(tmp_path):
    """sentencepiece drops lines over 4,192 bytes by default, without a word."""
    ts.write_shards(["short story here"] * 2 + ["qzqz " * 3000] * 2, str(tmp_path), 4, 1, False)
    ts.train_vocab(str(tmp_path), 280, 10)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tok280.model"))
    assert any("qz" in sp.id_to_piece(i) for i in range(280))


def test_train_vocab_mistakes(data, capfd):
    for size, message in ((0, "not between 259"), (-5, "not between"), (65537, "and 65536 (16"),
                          (260, "characters need"), (60000, "too large")):
        refuses(message, ts.main, ["train_vocab", f"--vocab_size={size}", "--data_dir=" + data])
    assert not list(Path(data).glob("*.model")) and capfd.readouterr().err == ""
    with pytest.raises(SystemExit) as e:  # the size that it names works, and one more does not
        ts.train_vocab(data, 60000, 10)
    most = int(str(e.value).split("--vocab_size=")[2].split()[0])
    refuses("too large", ts.train_vocab, data, most + 1, 10)
    ts.train_vocab(data, most, 10)
    refuses("--vocab_size", ts.main, ["train_vocab", "--data_dir=" + data])
    Path(ts.shard_files(data)[2]).write_text('[{"story": "a"}, {"story"')
    refuses("data02.json, line 1, item 1", ts.main, ["train_vocab", "--vocab_size=300", "--data_dir=" + data])


def tokens(folder, name="data00.bin"):
    return np.fromfile(Path(folder, name), "<u2").tolist()


def expected_tokens(data, model):
    """Per shard, from sentencepiece directly."""
    sp = sentencepiece.SentencePieceProcessor(model_file=model)
    return {name.replace(".json", ".bin"):
            sum(([1] + sp.encode(s.strip().replace("\ud83d", "\ufffd")) for s in texts if s.strip()), [])
            for name, texts in shards(data).items()}


def files_of(names):
    """Token shards and what pretokenize knows of each."""
    return sorted([*names, *(name.replace(".bin", ".note.json") for name in names)])


def snapshot(folder):
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in Path(folder).iterdir()}


@pytest.mark.parametrize("workers", [1, 3])
def test_pretokenize(tok, capsys, workers, monkeypatch):
    monkeypatch.setattr(ts, "BLOCK", 1000)
    ts.main(["pretokenize", "--vocab_size=350", "--data_dir=" + tok, f"--num_workers={workers}"])
    out = capsys.readouterr().out
    assert f"python train.py --vocab_source=custom --vocab_size=350 --data_dir={tok}" in out
    folder = ts.token_dir(tok, 350)
    expected = expected_tokens(tok, ts.tokenizer_path(tok, 350))
    assert sorted(os.listdir(folder)) == [*files_of(expected), "meta.json"]
    meta = json.loads(Path(folder, "meta.json").read_text())
    assert [meta[key] for key in ("format", "vocab_size", "bos_id")] == [2, 350, 1]
    assert meta["tokenizer_sha256"] == hashlib.sha256(Path(tok, "tok350.model").read_bytes()).hexdigest()
    for shard, (name, ids) in zip(meta["shards"], expected.items(), strict=True):
        assert tokens(folder, name) == ids
        texts = [s.strip() for s in shards(tok)[name.replace(".bin", ".json")] if s.strip()]
        assert shard["name"] == name and shard["tokens"] == len(ids) and shard["stories"] == len(texts)
        assert shard["bytes"] == sum(len(s.replace("\ud83d", "?").encode()) for s in texts)
        data = Path(folder, name).read_bytes()
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
        blocks = [data[i:i + 1000] for i in range(0, len(data), 1000)]
        assert shard["crc32"] == "".join(f"{zlib.crc32(block):08x}" for block in blocks)


def test_pretokenize_skips_what_is_done(tok):
    args = ["pretokenize", "--vocab_size=350", "--data_dir=" + tok]
    ts.main(args)
    folder = Path(ts.token_dir(tok, 350))
    first = snapshot(folder)

    def redone():
        ts.main(args)
        now = {name: told for name, told in snapshot(folder).items() if name.endswith(".bin")}
        assert {k: v[0] for k, v in now.items()} == {k: v[0] for k, v in first.items() if k.endswith(".bin")}
        assert ts.read_meta(str(folder))
        changed = [name for name in now if now[name][1] != first[name][1]]
        first.update(now)
        return sorted(changed)

    assert redone() == []
    (folder / "data02.bin").unlink()
    assert redone() == ["data02.bin"]
    with open(folder / "data03.bin", "ab") as f:
        f.write(b"x")
    assert redone() == ["data03.bin"]
    data = bytearray((folder / "data01.bin").read_bytes())
    data[1234] ^= 64
    (folder / "data01.bin").write_bytes(data)
    refuses("data01.bin is damaged", take, ts.TokenBatches(str(folder), "train", 2, 8), 2000)
    first["data01.bin"] = (first["data01.bin"][0], 0)
    assert redone() == ["data01.bin"]
    os.utime(ts.shard_files(tok)[1])
    assert redone() == ["data01.bin"]
    (folder / "meta.json").write_text("{broken")
    assert redone() == []  # it is made again of the notes
    (folder / "data04.note.json").write_text("{broken")
    assert redone() == ["data04.bin"]
    (folder / "data00.note.json").unlink()
    assert redone() == ["data00.bin"]
    args.append("--force")
    assert redone() == [f"data{i:02d}.bin" for i in range(5)]
    args.pop()
    ts.train_vocab(tok, 350, 1)  # another tokenizer under the same name
    refuses("another tokenizer", ts.TokenBatches, str(folder), "train", 2, 8)
    ts.main(args)
    assert {n: tokens(folder, n) for n in expected_tokens(tok, ts.tokenizer_path(tok, 350))} == \
        expected_tokens(tok, ts.tokenizer_path(tok, 350))


def test_pretokenize_stops_at_a_bad_story(tok):
    path = Path(ts.shard_files(tok)[2])
    good = path.read_text()
    path.write_text(json.dumps([{"story": "fine"}, {"story": 5}]))
    os.mkdir(ts.token_dir(tok, 350))
    Path(ts.token_dir(tok, 350), "meta.json").write_text("of an earlier run")
    done = run("pretokenize", "--vocab_size=350", "--data_dir", tok, "--num_workers=2")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "data02.json, item 1" in done.stderr
    folder = Path(ts.token_dir(tok, 350))
    assert not (folder / "meta.json").exists() and not (folder / "data02.bin").exists()
    refuses("an unfinished pretokenize", ts.TokenBatches, str(folder), "train", 2, 8)
    # a shard may be whole without its note yet, when the failure of another stopped the run: it is done again
    finished = {name.replace(".note.json", ".bin") for name in os.listdir(folder) if "json" in name}
    before = snapshot(folder)
    path.write_text(good)
    run("pretokenize", "--vocab_size=350", "--data_dir", tok, check=True)
    after = snapshot(folder)
    assert all(after[name] == before[name] for name in finished)
    assert sorted(after) == [*files_of([f"data{i:02d}.bin" for i in range(5)]), "meta.json"]
    assert {n: tokens(folder, n) for n in expected_tokens(tok, tok + "/tok350.model")} == \
        expected_tokens(tok, tok + "/tok350.model")


def test_encoding_failure_names_the_story(tok, monkeypatch):
    path, bad = ts.shard_files(tok)[1], 17

    class Fails(Tokenizer):
        def encode_batch(self, texts, *args, **kwargs):
            if len(texts) > limit or any(text.startswith("broken") for text in texts):
                raise RuntimeError("no memory")
            return super().encode_batch(texts, *args, **kwargs)

    monkeypatch.setattr(ts, "Tokenizer", Fails)
    limit = 5  # more stories than that fail together, but each alone is fine
    entry = ts.tokenize_shard(path, tok, tok + "/tok350.model")
    assert tokens(tok, "data01.bin") == expected_tokens(tok, tok + "/tok350.model")["data01.bin"]
    limit, texts = 1000, shards(tok)["data01.json"]
    assert entry["stories"] == len(texts)
    Path(path).write_text(json.dumps([*texts[:bad], "", "broken", *texts[bad:]]))
    refuses(f"data01.json, item {bad + 1}: RuntimeError: no memory", ts.tokenize_shard, path, tok,
            tok + "/tok350.model")


def test_pretokenize_notices_killed_processes(tok, tmp_path):
    """A worker, then the whole run, killed by force; what is there is whole and the same command goes on."""
    for i, path in enumerate(ts.shard_files(tok)):
        with open(path, "w") as f:
            json.dump([{"story": f"{n} times {s}"} for n in range(20) for s in stories(40, i)], f)
    folder = Path(ts.token_dir(tok, 350))
    slow = ("import os, sys, time; sys.path.insert(0, sys.argv[1]); import tinystories\n"
            "encode = tinystories.encode_stories\n"
            "tinystories.encode_stories = lambda *args: (time.sleep(4e-2), encode(*args))[1]\n"
            "tinystories.BATCH = 1 << 12\n"
            "if __name__ == '__main__': tinystories.main(sys.argv[2:])")
    (tmp_path / "slow.py").write_text(slow)
    command = [sys.executable, tmp_path / "slow.py", ROOT, "pretokenize", "--vocab_size=350",
               "--data_dir", tok, "--num_workers=2"]

    def start():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not list(folder.glob("*.bin.*.tmp")):
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return process, [int(pid) for pid in children]

    def dead(pids):
        return not any(Path(f"/proc/{pid}").exists() for pid in pids)

    process, workers = start()
    os.kill(workers[0], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "was killed" in err and out == "" and err.count("\n") == 1
    assert dead(workers) and not (folder / "meta.json").exists()
    for path in folder.glob("*.bin.*.tmp"):
        path.unlink()
    process, workers = start()
    process.kill()
    assert process.communicate(timeout=120)[1] == ""
    deadline = time.time() + 60
    while not dead(workers) and time.time() < deadline:  # orphans notice by themselves
        time.sleep(0.02)
    assert dead(workers) and not (folder / "meta.json").exists()
    run("pretokenize", "--vocab_size=350", "--data_dir", tok, check=True)
    assert sorted(os.listdir(folder)) == [*files_of([f"data{i:02d}.bin" for i in range(5)]), "meta.json"]
    expected = expected_tokens(tok, tok + "/tok350.model")
    assert {n: tokens(folder, n) for n in expected} == expected


def content(folder):
    """The bytes of all files below a folder, but for locks."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*"))
            if p.is_file() and not p.name.startswith(".")}


def part(stage, which, data_dir, *flags):
    ts.main([stage, f"--shard={which}", f"--data_dir={data_dir}", *flags])


def test_a_part_that_meets_another_says_so(tmp_path, capsys, monkeypatch):
    """Who finds another part putting all together does not speak as if it had."""
    claimed = ts.claimed

    def refused(data_dir, *names, **shared):
        if names == ("stories-parts",):
            raise SystemExit("another has it")
        return claimed(data_dir, *names, **shared)

    monkeypatch.setattr(ts, "claimed", refused)
    for which in ("1/2", "2/2"):
        part("synth", which, tmp_path / "d", "--num_stories=20", "--num_shards=4")
    out = capsys.readouterr().out
    assert "part 2 of 2 is done; another part is putting all together" in out and "next:" not in out
    monkeypatch.undo()
    part("synth", "2/2", tmp_path / "d", "--num_stories=20", "--num_shards=4")
    assert "20 stories in 4 shards" in capsys.readouterr().out


def test_pretokenize_in_parts(tok, capsys):
    args = ["pretokenize", "--vocab_size=350", "--data_dir=" + tok]
    ts.main(args)
    folder = Path(ts.token_dir(tok, 350))
    whole = content(folder)

    def parts(*which):
        capsys.readouterr()
        for i in which:
            part("pretokenize", i, tok, "--vocab_size=350")
        return capsys.readouterr().out

    assert content(folder) == whole and "(3 of 3 shards were up to date)" in parts("1/2")  # nothing to do
    for order in (("1/2", "2/2"), ("3/3", "1/3", "2/3"), ("2/7", "7/7", "5/7", "4/7", "1/7", "3/7"),
                  ("1/2", "2/3", "2/2")):  # of another number of parts, too
        for path in folder.iterdir():
            path.unlink()
        assert "still to come from other parts\n" in parts(*order[:-1])
        refuses("an unfinished pretokenize", ts.read_meta, str(folder))
        assert "next: python train.py" in parts(order[-1]) and content(folder) == whole
    # what a part does again leaves the others' shards as they are; meta.json is not there meanwhile
    (folder / "data01.bin").write_bytes(b"")
    before = snapshot(folder)
    source = ts.shard_files(tok)[3]
    os.utime(source)
    assert "2 of 5 shards are still to come" in parts("1/2") and (folder / "meta.json").exists()
    assert "next" in parts("2/2")
    after = snapshot(folder)
    assert [n for n in sorted(after) if after[n] != before[n]] == \
        [*files_of(["data01.bin", "data03.bin"]), "meta.json"]
    assert {n: whole[n] for n in whole if n.endswith(".bin")} == \
        {n: data for n, data in content(folder).items() if n.endswith(".bin")}
    (folder / "data04.bin").write_bytes(b"")
    (folder / "data04.note.json").write_text("{damaged")
    assert "next" in parts("1/2", "2/2")
    assert content(folder)["data04.bin"] == whole["data04.bin"] and ts.read_meta(str(folder))


def test_a_missing_validation_shard(data):
    """download would say that the stories are there already."""
    ts.shard_files(data)
    Path(ts.shard_files(data)[0]).unlink()
    refuses(f"put back what is missing, or run: {ts.command('download', data, more='--force')} (or",
            ts.shard_files, data)


def test_synth_in_parts(tmp_path, capsys):
    flags = ["--num_stories=47", "--num_shards=5", "--seed=3"]
    ts.main(["synth", f"--data_dir={tmp_path / 'a'}", *flags])
    whole = content(tmp_path / "a")
    for order in (("1/2", "2/2"), ("5/5", "1/5", "3/5", "2/5", "4/5"), ("1/1",), ("2/3", "1/2", "2/2")):
        data = tmp_path / f"b{len(order)}{order[0][0]}"
        for which in order[:-1]:
            part("synth", which, data, *flags)
            assert "still to come from other parts\n" in capsys.readouterr().out
            refuses("no stories in", ts.shard_files, str(data))
            refuses("has parts of other stories: finish those with --num_stories=47 --num_shards=5 --seed=3",
                    part, "synth", "2/2", data, *flags[:2], "--seed=4")
        (parts := data / "TinyStories_all_data.synth-47-5-3").mkdir(parents=True, exist_ok=True)
        (parts / "data01.json.host-1.tmp").write_text("of a run that was killed")
        part("synth", order[-1], data, *flags)
        assert content(data) == whole
        refuses("already holds stories", part, "synth", "1/2", data, *flags)
    part("synth", "1/2", data, *flags[:2], "--seed=4", "--force")
    assert content(data)["TinyStories_all_data/data00.json"] == whole["TinyStories_all_data/data00.json"]
    part("synth", "2/2", data, *flags[:2], "--seed=4", "--force")
    ts.main(["synth", f"--data_dir={tmp_path / 'a'}", *flags[:2], "--seed=4", "--force"])
    assert content(data) == content(tmp_path / "a") != whole
    for shards, count in ((3, 99), (9, 3)):
        refuses("cannot be shared out to 4 parts; give both", part, "synth", "1/4", tmp_path / "c",
                f"--num_shards={shards}", f"--num_stories={count}")


def test_parts_at_the_same_time(tmp_path):
    """As on three machines: three parts of synth at once, then three of pretokenize."""
    flags = ["--num_stories=600", "--num_shards=7"]
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    ts.main(["synth", f"--data_dir={tmp_path / 'whole'}", *flags])
    ts.main(["train_vocab", "--vocab_size=320", f"--data_dir={tmp_path / 'whole'}"])
    for name in ("tok320.model", "tok320.bin"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "parts")

    def at_once(*args):
        runs = [subprocess.Popen([sys.executable, ROOT / "tinystories.py", *args, f"--shard={i}/3",
                                  f"--data_dir={tmp_path / 'parts'}"], stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT, text=True) for i in (1, 2, 3)]
        said = [p.communicate(timeout=60)[0] for p in runs]
        assert not any(p.returncode for p in runs), said

    at_once("synth", *flags)
    for path in (tmp_path / "whole" / "TinyStories_all_data").iterdir():
        os.utime(tmp_path / "parts" / "TinyStories_all_data" / path.name, ns=(0, path.stat().st_mtime_ns))
    at_once("pretokenize", "--vocab_size=320", "--num_workers=1")
    ts.main(["pretokenize", "--vocab_size=320", f"--data_dir={tmp_path / 'whole'}"])
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


# ---- two at once -------------------------------------------------------------------------------------

HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
import tinystories
with tinystories.claimed(sys.argv[2], *sys.argv[3].split(), shared=tuple(sys.argv[4].split())):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def held(data_dir, names="", shared=""):
    """Another process holds locks."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, ROOT, data_dir, names, shared],
                               stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process.pid
    finally:
        process.kill()  # what it locked is free again, though its lock files are there
        process.wait()
        process.stdout.close()


def test_two_at_once(tok, tmp_path):
    """A stage that writes what another writes or reads refuses in one line; what does not disturb, runs."""
    (tmp_path / "a.txt").write_text("one<|endoftext|>two")
    stages = {
        "import": ["import", str(tmp_path / "a.txt"), "--force"],
        "synth": ["synth", "--force", "--num_stories=9"],
        "part": ["synth", "--force", "--num_stories=9", "--num_shards=3", "--shard=1/3"],
        "download": ["download", "--url=http://127.0.0.1:9/", "--force"],
        "train_vocab": ["train_vocab", "--vocab_size=350"],
        "pretokenize": ["pretokenize", "--vocab_size=350"],
        "pre-part": ["pretokenize", "--vocab_size=350", "--shard=2/3"]}

    def refused(*names):
        before = content(tok)
        for name in names:
            refuses(f"{tok} is in use by {who}", ts.main, [*stages[name], f"--data_dir={tok}"])
            assert content(tok) == before

    def runs(*names):
        for name in names:
            ts.main([*stages[name], f"--data_dir={tok}"])

    with held(tok, "stories synth") as pid:  # import, say
        who = f"process {pid} on "
        refused(*stages)
    with held(tok, "tok350", "stories") as pid:  # pretokenize or train_vocab of this vocabulary
        who = f"process {pid} on "
        refused("train_vocab", "pretokenize", "pre-part")
        who = "another process"  # of several, who knows
        refused("import", "synth", "download")
        runs("part")
        ts.main(["train_vocab", "--vocab_size=340", f"--data_dir={tok}"])
    with held(tok, "tok350-1-of-3", "stories tok350"):  # a part of pretokenize
        refused("train_vocab", "pretokenize", "synth")
        runs("pre-part")
        part("pretokenize", "1/2", tok, "--vocab_size=350")
        part("pretokenize", "2/2", tok, "--vocab_size=350")
        refuses("is in use", part, "pretokenize", "1/3", tok, "--vocab_size=350")
    with held(tok, "stories-1-of-3", "synth") as pid:  # a part of synth
        refused("synth", "import")
        who = f"process {pid} on "
        refused("part")
        runs("pretokenize", "train_vocab")
    runs("pretokenize", "synth")


def test_pretokenize_mistakes(tok, monkeypatch):
    for flags, message in ((["--vocab_size=77"], "train_vocab --vocab_size=77 --data_dir=" + tok),
                           ([], "download --data_dir=" + tok)):
        refuses(message, ts.main, ["pretokenize", "--data_dir=" + tok, *flags])
    os.rename(Path(tok, "tok350.model"), Path(tok, "tok99.model"))
    args = ["pretokenize", "--vocab_size=99", "--data_dir=" + tok]
    refuses("350 pieces, not 99", ts.main, args)
    monkeypatch.setattr(ts, "MAX_VOCAB", 349)
    os.rename(Path(tok, "tok99.model"), Path(tok, "tok350.model"))
    refuses("at most 349", ts.main, ["pretokenize", "--vocab_size=350", "--data_dir=" + tok])


def test_no_torch_for_pretokenize(tok):
    code = ("import sys; sys.path.insert(0, sys.argv[1])\n"
            "import tinystories; tinystories.main(sys.argv[2:])\n"
            "assert 'torch' not in sys.modules and 'requests' not in sys.modules")
    subprocess.run([sys.executable, "-c", code, ROOT, "pretokenize", "--vocab_size=350", "--data_dir", tok],
                   check=True, capture_output=True)


# ---- a full disk, a read-only one, what is gone, a wrong clock ---------------------------------------

def small_disk(folder):
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")


def same_but_for_clocks(a, b):
    a, b = ({name: re.sub(rb'"source_mtime_ns": -?\d+', b"", data) for name, data in content(folder).items()}
            for folder in (a, b))
    return a == b


@pytest.mark.parametrize("how", ["file size limit", "full disk", "read-only"])
def test_no_room(tmp_path, how, server):
    """Every stage says so in one line, leaves what is there as it was, and goes on when there is room."""
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, stories(200))))
    few = "--num_shards=3"
    stages = [["import", str(tmp_path / "a.jsonl"), few], ["train_vocab", "--vocab_size=330"],
              ["pretokenize", "--vocab_size=330"], ["synth", "--num_stories=250", few, "--force"]]
    for stage in stages:
        ts.main([*stage, f"--data_dir={tmp_path / 'reference'}"])
    work = tmp_path / "disk"
    work.mkdir() if how == "file size limit" else small_disk(work)
    try:
        data = work / "data"
        data.mkdir()
        for stage in stages:
            before, limit = content(work), None
            if how == "file size limit":
                limit = resource_limit
            elif how == "full disk":
                with contextlib.suppress(OSError), open(work / "filler", "wb", buffering=0) as f:
                    while True:
                        f.write(bytes(4096))
                before = content(work)
            else:
                subprocess.run(["mount", "-o", "remount,ro", work], check=True)
            if limit or stage[0] == "import":
                done = subprocess.run([sys.executable, ROOT / "tinystories.py", *stage, "--data_dir", data],
                                      capture_output=True, text=True, preexec_fn=limit)
                assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stdout == "", done
                assert "then run the same again" in done.stderr, done.stderr
            else:
                refuses("then run the same again", ts.main, [*stage, f"--data_dir={data}"])
            after = {name: data for name, data in content(work).items() if not name.endswith(".tmp")}
            assert after == before  # a worker that was stopped in turn may leave one; the next run clears it
            if how == "full disk":
                (work / "filler").unlink()
            elif how == "read-only":
                subprocess.run(["mount", "-o", "remount,rw", work], check=True)
            ts.main([*stage, f"--data_dir={data}"])
        assert same_but_for_clocks(data, tmp_path / "reference")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=200_000))
            refuses("has 300,000 bytes more, and the disk 200,000 free",
                    ts.fetch, server.url, str(data / "f"))
        assert fetched(server, data / "f", alone=False)
    finally:
        if how != "file size limit":
            subprocess.run(["umount", "-l", work], check=True)


def resource_limit():
    import resource  # not on Windows

    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def test_what_is_gone_is_told(tok, capsys):
    args = ["pretokenize", "--vocab_size=350", "--data_dir=" + tok]
    ts.main(args)
    for i in (1, 3):
        Path(ts.shard_files(tok)[0]).with_name(f"data0{i}.json").unlink()
    capsys.readouterr()
    ts.main(args)
    assert capsys.readouterr().err == "note: there is no data01.json (and 1 more): its stories are left out\n"
    stray = Path(ts.shard_files(tok)[0]).with_name("data999999999.json")
    shutil.copy(ts.shard_files(tok)[0], stray)
    ts.main(args)
    assert "data01.json (and 999999995 more)" in capsys.readouterr().err
    stray.unlink()
    ts.main(args)
    meta = ts.read_meta(ts.token_dir(tok, 350))
    assert [shard["name"] for shard in meta["shards"]] == ["data00.bin", "data02.bin", "data04.bin"]


@pytest.mark.parametrize("seconds", [0, -10**9, 2**33])
def test_clocks_do_not_matter(tok, seconds, capsys):
    """Files of the future, of before 1970, and one that was changed while the clock went back."""
    for path in ts.shard_files(tok):
        os.utime(path, (seconds, seconds))
    args = ["pretokenize", "--vocab_size=350", "--data_dir=" + tok]
    ts.main(args)
    os.utime(ts.shard_files(tok)[2], (seconds - 5, seconds - 5))
    capsys.readouterr()
    ts.main(args)
    assert "(4 of 5 shards were up to date)" in capsys.readouterr().out
    ts.main(args)
    assert "(5 of 5 shards were up to date)" in capsys.readouterr().out
    ts.read_meta(ts.token_dir(tok, 350))


# ---- untrusted input: the right result, or one line --------------------------------------------------

FUZZ = settings(max_examples=100, deadline=None)
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=30)  # lone surrogates too
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
                    max_leaves=8)


def outcome(function, *args):
    """What the call returns, as a list where it generates; None after a SystemExit of one line."""
    try:
        result = function(*args)
        return result if isinstance(result, dict | list | int | str | tuple) else list(result)
    except SystemExit as e:
        assert isinstance(e.code, str) and e.code and "\n" not in e.code, e.code
        return None


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A folder for many examples."""
    return tmp_path_factory.mktemp("examples")


def edited(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """`data` with pieces replaced: (place, length, what is there instead)."""
    for at, length, new in edits:
        at %= len(data) + 1
        data = data[:at] + new + data[at + length:]
    return data


EDITS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 9), st.binary(max_size=3) | st.sampled_from(
    [b'"', b"[", b"]", b",", b"\\", b"{", b"}", b"1", b" ", b"\n"])), max_size=3)


def plain(value):
    """Comparable: NaN equals itself."""
    return json.dumps(value)


@FUZZ
@given(st.lists(JSON, max_size=5), EDITS, st.integers(1, 20), st.sampled_from([None, 1]), st.booleans())
def test_json_lists(scratch, items, edits, chunk, indent, ascii_only):
    text = json.dumps(items, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    data = edited(text, edits)
    try:
        expected = json.loads(data.decode("utf-8-sig"))
        expected = expected if isinstance(expected, list) else None
    except ValueError:
        expected = None
    (scratch / "a.json").write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ts, "CHUNK", chunk)
        found = outcome(ts.read_json_list, str(scratch / "a.json"), id)
    assert plain(found) == plain(expected)


@FUZZ
@given(st.lists(JSON, max_size=5), EDITS, st.integers(1, 20), st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_json_lines(scratch, items, edits, chunk, end):
    data = edited(end.join(map(json.dumps, items)).encode(), edits)
    try:
        lines = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
        items = [json.loads(line) for line in lines if line.strip()]
        expected = [item if isinstance(item, str) else next(
            item[name] for name in ("story", "text") if isinstance(item.get(name), str)) for item in items]
    except (ValueError, AttributeError, StopIteration):
        expected = None
    (scratch / "a.jsonl").write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ts, "CHUNK", chunk)
        assert outcome(ts.read_stories, str(scratch / "a.jsonl"), id) == expected


@FUZZ
@given(st.text(st.sampled_from("ab \n\t-|\ufeffé😀"), max_size=40), st.integers(1, 9),
       st.sampled_from(["<|endoftext|>", "blank", "--", "|", "\n", "a", ".", "b\n"]))
def test_separators(scratch, text, chunk, separator):
    (scratch / "a.txt").write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ts, "CHUNK", chunk)
        found = outcome(ts.read_stories, str(scratch / "a.txt"), id, separator)
    text = text.removeprefix("\ufeff")
    if separator == "blank":
        expected, lines = [""], text.split("\n")
        for line in lines:
            expected[-1:] = [expected[-1] + "\n" + line] if line.strip() else [expected[-1], ""]
    else:
        expected = text.split(separator)
    assert [piece.strip() for piece in found if piece.strip()] == \
        [piece.strip() for piece in expected if piece.strip()]


def test_hostile_json(tmp_path):
    deep = b"[" * 900 + b"]" * 900
    for name, data, message in [
            ("a.json", b"[" + b"9" * 5000 + b"]", "a number of thousands of digits"),
            ("a.jsonl", b"9" * 5000, "line 1: "),
            ("a.json", b'["a", {"story": 1' + b"0" * 5000 + b"}]", "item 1: "),
            ("a.json", b"[" + deep + b"]", "item 0: no text"), ("a.jsonl", deep, "line 1: a list"),
            ("a.jsonl", b"[" * 10**6, "line 1: "), ("a.json", b'[{"story":' * 10**5, "nested too deeply"),
            ("a.json", b'[{"a":"' + b"x" * 10**6 + b'"}]', "no text under story or text in {'a': 'xxx"),
            ("a.json", b'["a"]'.decode().encode("utf-16"), "is not UTF-8"),
            ("a.json", b'\xef\xbb\xbf\xef\xbb\xbf["a"]', "not a JSON list")]:
        (tmp_path / name).write_bytes(data)
        refuses(message, list, ts.read_stories(str(tmp_path / name), id))
    for data, expected in [
            (b'[{"story": "a", "story": "b"}]', ["b"]), (b'["\\u0000", "\\ud800"]', ["\0", "\ud800"]),
            (b'["' + b"y" * 10**7 + b'\\n"]', ["y" * 10**7 + "\n"]), (b'["", ""]', ["", ""])]:
        (tmp_path / "a.json").write_bytes(data)
        assert list(ts.read_stories(str(tmp_path / "a.json"), id)) == expected


@settings(max_examples=40, deadline=None)
@given(st.lists(ANY_TEXT.map(str.strip).filter(bool), min_size=4, max_size=12))
def test_any_stories_become_tokens(scratch, data_dir, texts):
    """NULs, halves of pairs, control characters: each token shard is what sentencepiece says, and decodes."""
    data = str(scratch / "any")
    shutil.rmtree(data, ignore_errors=True)
    (scratch / "any.json").write_text(json.dumps([*texts, "", " "]))
    with contextlib.redirect_stdout(io.StringIO()):
        ts.main(["import", str(scratch / "any.json"), f"--data_dir={data}", "--num_shards=2"])
        shutil.copy(Path(data_dir, "tok384.model"), Path(data, "tok384.model"))
    tokenizer = Tokenizer(str(Path(data, "tok384.model")))
    sp = sentencepiece.SentencePieceProcessor(model_file=tokenizer.model_path)
    for i, path in enumerate(ts.shard_files(data)):
        entry = ts.tokenize_shard(path, data, tokenizer.model_path)
        clean = [story.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
                 for story in shards(data)[f"data0{i}.json"]]
        assert tokens(data, f"data0{i}.bin") == sum(([1, *sp.encode(story)] for story in clean), [])
        assert [tokenizer.decode(tokenizer.encode(story)) for story in clean] == clean
        assert entry["stories"] == len(clean) and ts.is_entry(entry)


ENTRY = ["name", "tokens", "stories", "bytes", "sha256", "crc32", "source_bytes", "source_mtime_ns"]
PLACES = [*"format vocab_size tokenizer_sha256 bos_id shards".split(), ("shards", 0), ("shards", 1),
          *(("shards", i, key) for i in (0, 1) for key in ENTRY)]
VALUES_OF_META = JSON | st.integers(-2**70, 2**70) | st.sampled_from(
    ["data01.bin", "../x.bin", "data00.bin", "", "0" * 8, "0" * 16, 9, 8, 1.5, True])


@FUZZ
@given(st.sampled_from(PLACES), VALUES_OF_META, EDITS)
def test_damaged_meta(scratch, place, value, edits):
    folder = Path(made(scratch / "tok60000", (9, 30)))
    meta = json.loads((folder / "meta.json").read_text())
    inner = meta
    for key in (path := [place] if isinstance(place, str) else place)[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    text = json.dumps(meta).encode()
    note = json.dumps(meta | {"shard": value if path in (["shards"], ("shards", 0)) else meta["shards"][0]})
    for data, of_shard in ((text, note.encode()), (edited(text, edits), edited(note.encode(), edits))):
        (folder / "meta.json").write_bytes(data)
        (folder / "data00.note.json").write_bytes(of_shard)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ts, "source_state", lambda source: {})
            entries = ts.up_to_date(str(folder), {"vocab_size": 60000}, ["data00.json", "data01.json"])
            assert all(ts.is_entry(entry) for entry in entries.values())
        if outcome(ts.read_meta, str(folder)) is None:
            continue
        for split in ("train", "val"):
            pairs = outcome(lambda split=split: take(ts.TokenBatches(str(folder), split, 1, 4), 2))
            known = set(range(10, 49)) | {1, -1} | {json.loads(data)["bos_id"]}
            assert pairs is None or all(set(x.flatten().tolist()) <= known for x, _ in pairs)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 12), st.binary(max_size=12)), min_size=1,
                max_size=4))
def test_damaged_archives(scratch, edits):
    plain = gzip.decompress(archive([("data00.json", SHARD, {}), ("a" * 200, b"x" * 700, {}),
                                     ("data01.json", SHARD, {"pax_headers": {"comment": "x" * 50}})]))
    (scratch / "a.tar.gz").write_bytes(gzip.compress(edited(plain, edits), 1))
    shutil.rmtree(scratch / "out", ignore_errors=True)
    whole = outcome(lambda: ts.extract(str(scratch / "a.tar.gz"), str(scratch / "out")) or [])
    assert (scratch / "out").exists() == (whole is not None)
    assert not (scratch / "out.tmp").exists()


def test_hostile_archives(tmp_path, monkeypatch):
    """Bombs: what unpacks to a thousand times its size, headers without end, files with holes."""
    def header(name, size, kind):
        info = tarfile.TarInfo(name)
        info.size, info.type = size, kind
        return info.tobuf(tarfile.GNU_FORMAT)

    def refused(data, message):
        (tmp_path / "a.tar.gz").write_bytes(gzip.compress(data))
        refuses(message, ts.extract, str(tmp_path / "a.tar.gz"), str(tmp_path / "out"))
        assert os.listdir(tmp_path) == ["a.tar.gz"]

    zeros = bytes(3 << 20)
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
        for size in (len(zeros), 1 << 40):
            refused(header("x", size, kind) + zeros, "a header is too long")
    refused(header("data00.json", 1 << 20, tarfile.REGTYPE) + zeros[:1 << 20]
            + header("x", 3 << 20, tarfile.REGTYPE) + zeros, "far more than it should")
    refused(header("x", 0, tarfile.GNUTYPE_LONGNAME) * 3000, "is damaged")
    sparse = bytearray(header("data00.json", 512, tarfile.GNUTYPE_SPARSE))
    sparse[386:410], sparse[483:495] = b"00000000000\0" + b"00000001000\0", b"77777777777\0"
    sparse[148:156] = b"%06o\0 " % (sum(sparse[:148]) + sum(sparse[156:512]) + 256)
    refused(bytes(sparse) + bytes(512), "a file with holes")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    text = random.Random(1).randbytes(2000)
    refused(header("data00.json", 2000, tarfile.REGTYPE) + text + bytes(48), "more than the disk has room")


@contextlib.contextmanager
def reply_with(*replies):
    """An address that sends these bytes, one after the other, whatever it is asked."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        for reply in replies:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(2)
                    connection.recv(65536)
                    for piece in [reply] if isinstance(reply, bytes) else reply:
                        connection.sendall(piece)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/x"
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        thread.join(5)
        listener.close()


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(ts, "TIMEOUT", (1, 1))
    monkeypatch.setattr(ts, "TRIES", 1)


BODY = b"0123456789" * 5
VALUES = st.sampled_from([
    "50", "49", "51", "0", "-1", "-50", "abc", "\u00b2", "9" * 30, "9" * 6000, "50, 50", "5e1", " 50 ", "",
    "bytes 0-49/50", "bytes 1-49/50", "bytes */50", "gzip", "chunked", '"v"', "W/", "\u00e9",
    "http://127.0.0.1:9/", "file:///etc/passwd", "//", "http://[", "http://.a/"])
NAMES = st.sampled_from(["Content-Length", "Content-Range", "Transfer-Encoding", "Content-Encoding", "ETag",
                         "Last-Modified", "Location", "Connection", "X" * 70_000, ""])
STATUS = st.sampled_from([200, 200, 200, 206, 204, 304, 302, 301, 416, 500, 100, 0, 999])


@FUZZ
@given(STATUS, st.lists(st.tuples(NAMES, VALUES), max_size=3), st.none() | st.binary(max_size=60))
def test_hostile_replies(scratch, status, headers, garbage):
    """Any status and headers: a part of the body from its start, or a line."""
    head = f"HTTP/1.1 {status} X\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers)
    reply = head.encode("latin-1") + b"\r\n" + BODY if garbage is None else garbage
    for path in scratch.glob("f*"):
        path.unlink()
    with pytest.MonkeyPatch.context() as patch, reply_with(reply) as url:
        patch.setattr(ts, "TIMEOUT", (1, 1))
        patch.setattr(ts, "TRIES", 1)
        done = outcome(lambda: ts.fetch(url, str(scratch / "f")) or [])
    assert (scratch / "f").exists() == (done is not None)
    if done is not None and b"chunked" not in reply and garbage is None:
        assert BODY.startswith((scratch / "f").read_bytes())


def test_replies_without_end(tmp_path, hasty, monkeypatch):
    """A body that never ends leaves room on the disk; redirects end; a note of anyone's is no harm."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    endless = itertools.chain([b"HTTP/1.1 200 OK\r\n\r\n"], itertools.repeat(bytes(1 << 16)))
    with reply_with(endless) as url:
        refuses("sends more and more", ts.fetch, url, str(tmp_path / "f"))
    assert (tmp_path / "f.part").stat().st_size < 1.2 * (1 << 20) and not (tmp_path / "f").exists()
    (tmp_path / "f.part").unlink()
    for target in ("/x", "file:///etc/passwd", "ftp://127.0.0.1/", "\u00e9", "http://["):
        head = f"HTTP/1.1 302 X\r\nLocation: {target}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        with reply_with(*[head.encode("latin-1")] * 40) as url:
            refuses("check --url=URL", ts.fetch, url, str(tmp_path / "f"))
    assert not (tmp_path / "f").exists()
    for length in ("\u00b2", "-5", "9" * 5000, ""):  # as good as none
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n"
        with reply_with(head.encode("latin-1") + BODY) as url:
            ts.fetch(url, str(tmp_path / "f"))
        assert (tmp_path / "f").read_bytes() == BODY
        (tmp_path / "f").unlink()
    for url in ("http://" + "a" * 64 + "/", "http://[", "http://.a/", "http://a:b/", "http://\u00b2\udc80/"):
        assert outcome(ts.fetch, url, str(tmp_path / "f")) is None
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n" + BODY
    for version, total in ((5, 50), ("v\r\nX: y", 50), ("v", "x"), ("\u0100", 50), ("", 50), ("v", True)):
        with reply_with(whole) as url:
            (tmp_path / "f.part").write_bytes(b"xxx")
            note = {"url": url, "version": version, "total": total}
            (tmp_path / "f.part.json").write_text(json.dumps(note))
            ts.fetch(url, str(tmp_path / "f"))
        assert (tmp_path / "f").read_bytes() == BODY
        (tmp_path / "f").unlink()


ODD_VALUES = ["1/1", "4/4", "0/4", "5/4", "1/0", "/", "1/4/4", "٣", "²", "1e3", "9" * 5000, " 1/4", "1/4 "]


@FUZZ
@given(ANY_TEXT | st.integers(-10, 2000).map(str) | st.sampled_from(ODD_VALUES)
       | st.from_regex(r"[0-9]{1,5}/[0-9]{1,5}", fullmatch=True))
def test_values_of_options(value):
    def parsed(function):
        try:
            return function(value)
        except (argparse.ArgumentTypeError, ValueError) as e:  # what argparse turns into a line
            assert isinstance(e, argparse.ArgumentTypeError) or len(value) > 4000
            return None

    number = int(value) if value.isdecimal() and len(value) < 4000 else 0
    assert parsed(ts.whole_number(1)) == (number or None)
    assert parsed(ts.whole_number(2, 1000)) == (number if 2 <= number <= 1000 else None)
    assert parsed(ts.some_text) == (value or None)
    i, slash, n = value.partition("/")
    ok = slash and re.fullmatch("[0-9]{1,4}", i) and re.fullmatch("[0-9]{1,4}", n) and 1 <= int(i) <= int(n)
    assert parsed(ts.part) == ((int(i), int(n)) if ok else None)


# ---- TokenBatches ------------------------------------------------------------------------------------

def made(folder, sizes, bos=1):
    """A token folder whose tokens count up through its shards, so that each can be told from the others."""
    folder.mkdir(exist_ok=True)
    entries, at = [], 10
    for i, size in enumerate(sizes):
        ids = np.arange(at, at + size, dtype="<u2")
        at += size
        data = ids.tobytes()
        (folder / f"data{i:02d}.bin").write_bytes(data)
        sums = [f"{zlib.crc32(data[at:at + ts.BLOCK]):08x}" for at in range(0, len(data), ts.BLOCK)]
        entries.append({"name": f"data{i:02d}.bin", "tokens": size, "stories": 1, "bytes": 3 * size,
                        "sha256": hashlib.sha256(data).hexdigest(), "crc32": "".join(sums),
                        "source_bytes": 1, "source_mtime_ns": 1})
    meta = {"format": 2, "vocab_size": 60000, "tokenizer_sha256": "ab", "bos_id": bos, "shards": entries}
    (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, u) and torch.equal(y, v)
                                    for (x, y), (u, v) in zip(a, b, strict=True))


SHAPES = [((5, 40, 33, 27), 8, 3), ((5, 3, 0, 4), 16, 2), ((9, 2), 8, 4), ((1, 64, 64), 16, 8),
          ((3, 1, 1, 1, 50, 1), 7, 5)]


@pytest.mark.parametrize("sizes, T, B", SHAPES)
@pytest.mark.parametrize("lanes", [1, 2, 3, 16])
def test_train_batches_by_brute_force(tmp_path, sizes, T, B, lanes):
    folder = made(tmp_path / "t", sizes)
    text = sum((tokens(folder, f"data{i:02d}.bin") for i in range(1, len(sizes))), [])
    regions = max(1, min(lanes, len(text) // T))
    cuts = [len(text) * i // regions for i in range(regions + 1)]

    def rows(lane):
        ring = text[cuts[lane % regions]:cuts[lane % regions + 1]]
        for epoch in range(10_000):
            rng = np.random.default_rng([7, lane, epoch])
            offset = rng.integers(T)
            for w in rng.permutation((len(ring) + T - 1) // T):
                yield [ring[(offset + w * T + j) % len(ring)] for j in range(T + 1)]

    expected = [rows(lane) for lane in range(lanes)]
    batches = ts.TokenBatches(folder, "train", B, T, seed=7, lanes=lanes)
    for k, (x, y) in enumerate(take(batches, 20 * lanes)):
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (B, T)
        assert x.is_contiguous() and y.is_contiguous()
        these = np.array([next(expected[k % lanes]) for _ in range(B)])
        assert np.array_equal(x.numpy(), these[:, :-1]) and np.array_equal(y.numpy(), these[:, 1:])


@pytest.mark.parametrize("sizes, T", [((5, 40, 33, 27), 10), ((5, 40, 33, 27), 8), ((2, 500, 1, 377), 64)])
@pytest.mark.parametrize("lanes", [1, 2, 5])
def test_every_token_is_a_target_in_every_epoch(tmp_path, sizes, T, lanes):
    N = sum(sizes[1:])
    batches = ts.TokenBatches(made(tmp_path / "t", sizes), "train", 1, T, seed=3, lanes=lanes)
    targets = [[] for _ in range(lanes)]
    for k, (_, y) in enumerate(take(batches, 3 * lanes * (-(-N // lanes) // T + 1))):
        targets[k % lanes].append(y - 10 - sizes[0])
    for lane in range(lanes):
        start, end = N * lane // lanes, N * (lane + 1) // lanes
        windows, orders = -(-(end - start) // T), []
        for epoch in range(3):
            y = torch.cat(targets[lane][epoch * windows:(epoch + 1) * windows]).flatten()
            counts = torch.bincount(y, minlength=N)
            assert counts.sum() == windows * T  # at most T - 1 of them twice
            assert counts[start:end].min() == 1 and counts[start:end].sum() == windows * T
            orders.append(y.tolist())
        assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_same_data(tmp_path, world):
    folder = made(tmp_path / "t", (50, 300, 200))
    alone = ts.TokenBatches(folder, "train", 4, 8, seed=5, lanes=4)
    ranks = [ts.TokenBatches(folder, "train", 4, 8, seed=5, rank=r, world_size=world, lanes=4)
             for r in range(world)]
    for _ in range(30):
        assert same(take(alone, 4), [next(rank) for _ in range(4 // world) for rank in ranks])
        assert all(alone.state_dict() == rank.state_dict() for rank in ranks)
    alone = list(ts.TokenBatches(folder, "val", 4, 8))
    ranks = [list(ts.TokenBatches(folder, "val", 4, 8, rank=r, world_size=world)) for r in range(world)]
    assert same(alone, [rank[i] for i in range(len(ranks[0])) for rank in ranks if i < len(rank)])


def test_no_rank_reads_what_another_does(tmp_path, monkeypatch):
    """Over several epochs each of 4 ranks reads a quarter of the shards' tokens, and no two the same."""
    seen = [set() for _ in range(4)]
    folder = made(tmp_path / "t", (50, 300, 200, 299))

    def read(shard, start, count, _read=ts.TokenShard.read):
        ids = _read(shard, start, count)
        seen[now].update(ids.tolist())
        return ids

    monkeypatch.setattr(ts.TokenShard, "read", read)
    for now in range(4):
        take(ts.TokenBatches(folder, "train", 4, 8, rank=now, world_size=4, lanes=8), 50)
    assert sorted(i for rank in seen for i in rank) == list(range(60, 60 + 799))
    assert all(abs(len(rank) - 200) <= 1 for rank in seen)


@pytest.mark.parametrize("before, after", [(1, 1), (2, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize("size", [3, 5])
def test_resume(tmp_path, before, after, size, capsys):
    folder = made(tmp_path / "t", (9, 200, 131))

    def group(world, size, seed=5):
        return [ts.TokenBatches(folder, "train", size, 8, seed=seed, rank=rank, world_size=world, lanes=4)
                for rank in range(world)]

    def run(batches, turns):
        """The windows of `turns` turns, lane by lane: other batch sizes share them out differently."""
        taken = [next(b) for _ in range(turns * 4 // len(batches)) for b in batches]
        return [[pair for x, y in taken[lane::4] for pair in zip(x, y, strict=True)] for lane in range(4)]

    straight = run(group(1, 1), 6 * 3 + 6 * size)
    first = group(before, 3)
    got = run(first, 6)
    state = json.loads(json.dumps(first[0].state_dict()))
    assert all(state == b.state_dict() for b in first)
    second = group(after, size, seed=99)  # the state's seed counts
    for b in second:
        b.load_state_dict(state)
    for lane, more in enumerate(run(second, 6)):
        assert same(straight[lane], got[lane] + more)
    assert all(type(v) is int for v in state.values()) and capsys.readouterr().err == ""


def test_resume_with_other_lanes(tmp_path, capsys):
    folder = made(tmp_path / "t", (9, 200, 131))  # of 42 windows: 2 lanes of 21, 4 of 11
    first = ts.TokenBatches(folder, "train", 3, 8, seed=5, lanes=4)
    for turns, epoch in ((0, 0), (1, 1), (2, 1), (1, 2), (10, 4)):  # of 3 windows each
        take(first, 4 * turns)
        state, second = first.state_dict(), ts.TokenBatches(folder, "train", 3, 8, lanes=2)
        second.load_state_dict(state)
        assert capsys.readouterr().err == ("the data is dealt out to 2 micro-batches per iteration, no "
                                           f"longer 4: it goes on with the next epoch, {epoch}\n")
        assert (second.state_dict()["epoch"], second.state_dict()["windows"]) == (epoch, 0)
        straight = ts.TokenBatches(folder, "train", 3, 8, seed=5, lanes=2)
        take(straight, 2 * 7 * epoch)  # 7 batches an epoch
        assert same(take(straight, 10), take(second, 10))
    second.load_state_dict(second.state_dict() | {"epoch": 3, "windows": 21})
    take(second, 2)
    third = ts.TokenBatches(folder, "train", 3, 8, lanes=2, rank=1, world_size=2)
    third.load_state_dict(second.state_dict())
    assert same(take(second, 4)[1::2], take(third, 2)) and capsys.readouterr().err == ""


def test_resume_on_other_data(tmp_path):
    state = ts.TokenBatches(made(tmp_path / "t", (9, 200, 131)), "train", 3, 8).state_dict()
    other = ts.TokenBatches(str(tmp_path / "t"), "train", 3, 9)
    refuses("max_seq_len was 8, is 9", other.load_state_dict, state)
    other = ts.TokenBatches(made(tmp_path / "u", (9, 200, 132)), "train", 3, 8)
    refuses("num_tokens was 331, is 332", other.load_state_dict, state)
    other = ts.TokenBatches(made(tmp_path / "v", (8, 200, 131)), "train", 3, 8)  # as many, but others
    refuses("fingerprint", other.load_state_dict, state)


@pytest.mark.parametrize("size", [2, 8, 9, 10, 64, 65, 66, 100])
@pytest.mark.parametrize("world", [1, 3])
def test_val_counts_every_target_once(tmp_path, size, world):
    folder = made(tmp_path / "t", (size, 30))
    targets = []
    for rank in range(world):
        batches = ts.TokenBatches(folder, "val", 3, 8, rank=rank, world_size=world)
        first = list(batches)
        assert same(first, list(batches))  # anew each time
        if world == 1:
            assert len(first) == -(-(size - 1) // (3 * 8))
        next(iter(batches), None)
        assert same(first, list(batches))
        for x, y in first:
            assert x.shape == y.shape == (3, 8) and x.min() >= 1 and x.is_contiguous() and y.is_contiguous()
            assert torch.all((y == x + 1) | (y == -1)) and torch.all(x[y == -1] <= 10 + size)
            targets += y[y != -1].tolist()
    assert sorted(targets) == list(range(11, 10 + size))


def test_val_max_batches(tmp_path):
    folder = made(tmp_path / "t", (100, 30))
    assert same(list(ts.TokenBatches(folder, "val", 2, 8, max_batches=3)),
                list(ts.TokenBatches(folder, "val", 2, 8))[:3])
    for rank, count in ((0, 2), (1, 1)):
        batches = ts.TokenBatches(folder, "val", 2, 8, max_batches=3, rank=rank, world_size=2)
        assert len(list(batches)) == len(batches) == count
    for ws, counts in ((4, [2, 1, 1, 1]), (8, [1] * 5 + [0] * 3)):  # 99 targets in batches of 24
        ranks = [ts.TokenBatches(folder, "val", 3, 8, rank=i, world_size=ws) for i in range(ws)]
        assert [len(list(batches)) for batches in ranks] == [len(batches) for batches in ranks] == counts


def test_val_pads_with_bos(tmp_path):
    (x, y), = ts.TokenBatches(made(tmp_path / "t", (4, 30), bos=7), "val", 1, 5)
    assert x.tolist() == [[10, 11, 12, 13, 7]] and y.tolist() == [[11, 12, 13, -1, -1]]
    (x, y), = ts.TokenBatches(made(tmp_path / "t", (4, 30), bos=7), "val", 2, 5)
    assert x.tolist() == [[10, 11, 12, 13, 7], [7] * 5] and y.tolist() == [[11, 12, 13, -1, -1], [-1] * 5]


def test_batches_from_real_stories(tok):
    ts.pretokenize(tok, 350, False, 2)
    folder = ts.token_dir(tok, 350)
    t = Tokenizer(ts.tokenizer_path(tok, 350))
    val = ts.TokenBatches(folder, "val", 4, 32)
    ids = tokens(folder)
    assert [i for _, y in val for i in y.flatten().tolist() if i >= 0] == ids[1:]
    text = sum(len(s.strip().encode("utf-8", "replace")) for s in shards(tok)["data00.json"])
    assert val.bytes_per_token == text / len(ids)
    Path(folder, "data77.bin").write_bytes(b"stale")  # in the folder, not in meta.json
    train = ts.TokenBatches(folder, "train", 4, 32)
    assert train.num_tokens == sum(len(ids) for n, ids in expected_tokens(tok, t.model_path).items()
                                   if n != "data00.bin")


def test_batches_check_the_folder(tmp_path):
    folder = str(tmp_path / "tok4096")
    where = f"pretokenize --vocab_size=4096 --data_dir={tmp_path}"
    refuses(where, ts.TokenBatches, folder, "train", 2, 8)
    refuses(f"pretokenize --data_dir={tmp_path}", ts.TokenBatches, str(tmp_path / "tokenizer"), "train", 2, 8)
    made(tmp_path / "tok4096", (9, 30))
    refuses("60000, not 4096", ts.read_meta, folder, 4096)
    assert ts.read_meta(folder, 60000) == ts.read_meta(folder)
    os.truncate(Path(folder, "data01.bin"), 58)
    refuses("data01.bin is missing or not of its size; run: python tinystories.py " + where,
            ts.TokenBatches, folder, "val", 2, 8)
    os.remove(Path(folder, "data01.bin"))
    refuses("data01.bin", ts.TokenBatches, folder, "train", 2, 8)
    for sizes, split, message in (((9,), "train", "and one for training"), ((1, 9), "val", "hold no text"),
                                  ((9, 0), "train", "hold no text")):
        refuses(message, ts.TokenBatches, made(tmp_path / "tok4096", sizes), split, 2, 8)
    for text in ("", "{}", "[]", '{"shards": 3}'):
        Path(folder, "meta.json").write_text(text)
        refuses(f"damaged; run: python tinystories.py {where}", ts.TokenBatches, folder, "train", 2, 8)
    Path(folder, "meta.json").write_text('{"format": 1, "shards": []}')
    refuses(f"format 1, not 2; run: python tinystories.py {where}", ts.TokenBatches, folder, "train", 2, 8)


def test_damage_is_found_before_it_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(ts, "BLOCK", 64)  # 32 tokens
    folder = made(tmp_path / "tok4096", (50, 300, 200))
    again = f"run: python tinystories.py pretokenize --vocab_size=4096 --data_dir={tmp_path}"
    path = Path(folder, "data02.bin")
    data = bytearray(path.read_bytes())
    data[399] ^= 4  # its last token
    path.write_bytes(data)
    val, train = ts.TokenBatches(folder, "val", 2, 8), ts.TokenBatches(folder, "train", 1, 8, lanes=2)
    assert list(val)  # is whole
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(zlib, "crc32")
        assert list(val)  # checked once is enough
    damaged = f"data02.bin is damaged: bytes 384 to 399 are not what was written; {again}"
    refuses(damaged, take, train, 100)
    rank = ts.TokenBatches(folder, "train", 1, 8, lanes=2, world_size=2)
    assert len(take(rank, 100)) == 100  # it has nothing to do with that part
    train = ts.TokenBatches(folder, "train", 1, 8)
    os.truncate(path, 380)  # meanwhile
    refuses("data02.bin has lost its end: bytes 320 to 383", take, train, 100)


def test_story_starts(tmp_path, monkeypatch):
    """Prompts, and that only what they take is read: no damage elsewhere is noticed."""
    monkeypatch.setattr(ts, "BLOCK", 64)
    monkeypatch.setattr(ts, "CHUNK", 8)
    folder = made(tmp_path / "t", (9, 30, 9000), bos=5000)  # a BOS, in the middle of data02
    path = Path(folder, "data02.bin")
    data = path.read_bytes()
    with open(path, "r+b") as f:
        f.write(b"xx")
        f.seek(17_990)
        f.write(b"xx")
    refuses("data02.bin is damaged: bytes 0 to 63", ts.StoryStarts, folder, "train")  # in search of a BOS
    path.write_bytes(data)
    refuses("no story", ts.StoryStarts, folder, "val")
    prompts = ts.StoryStarts(folder, "train").sample(np.random.default_rng(1), 50, 5)
    assert {len(p) for p in prompts} == {1, 2, 3, 4, 5}
    assert all(p == list(range(5000, 5000 + len(p))) for p in prompts)
    made(tmp_path / "u", (9, 5000, 9000), bos=30)
    path = tmp_path / "u" / "data02.bin"
    path.write_bytes(bytes(17_998) + b"xx")
    starts = ts.StoryStarts(str(tmp_path / "u"), "train")  # the BOS is in data01
    refuses("data02.bin is damaged", starts.sample, np.random.default_rng(1), 50, 5)


# ---- command line ------------------------------------------------------------------------------------

def test_paths():
    assert ts.tokenizer_path("data", 0) == "data/tokenizer.model"
    assert ts.token_dir("data", 0) == "data/tokenizer"
    assert (ts.tokenizer_path("d", 512), ts.token_dir("d", 512)) == ("d/tok512.model", "d/tok512")


@pytest.mark.parametrize("args, message", [
    ([], "STAGE"), (["pretokenise"], "pretokenise"), (["synth", "--seeds=3"], "did you mean --seed"),
    (["synth", "--num-stories=0"], "not a whole number above 1"), (["import", "a.pdf"], "no such file"),
    (["synth", "--num_shards=1"], "between 2 and 1000"), (["train_vocab", "--vocab_size=abc"], "abc"),
    (["import"], "FILE"), (["pretokenize", "--vocab_size"], "expected")])
def test_command_line_mistakes(args, message, tmp_path):
    done = run(*args, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert message in done.stderr and os.listdir(tmp_path) == []


def test_from_text_to_tokens_as_commands(tmp_path):
    help_text = run("--help", check=True).stdout
    stages = ("download", "import", "synth", "train_vocab", "pretokenize")
    assert all(stage in help_text for stage in stages)
    for stage in stages:
        assert "--data_dir" in run(stage, "--help", check=True).stdout
    run("synth", "--num-stories", 99, cwd=tmp_path, check=True)
    run("train_vocab", "--vocab-size=310", cwd=tmp_path, check=True)
    done = run("pretokenize", "--vocab_size=310", cwd=tmp_path, check=True)
    assert done.stderr == ""
    assert done.stdout.endswith("next: python train.py --vocab_source=custom --vocab_size=310\n")
    assert visible(tmp_path / "data") == ["TinyStories_all_data", "tok310", "tok310.bin", "tok310.model"]
    readonly = run("train_vocab", "--vocab_size=301", "--data_dir=/proc/none", cwd=tmp_path)
    assert readonly.returncode == 1 and readonly.stderr.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="needs ulimit")
def test_more_shards_than_files_that_may_be_open(tmp_path):
    """macOS begins with 256 of them; the limit that nobody may exceed is higher."""
    script = f"""
        ulimit -Sn 40 && cd {tmp_path} && run() {{ {sys.executable} {ROOT}/tinystories.py $@; }}
        run synth --num_stories=120 --num_shards=60 && run train_vocab --vocab_size=384 &&
        run pretokenize --vocab_size=384 --num_workers=1 && PYTHONPATH={ROOT} {sys.executable} -c '
from tinystories import TokenBatches
print(len(TokenBatches("data/tok384", "train", 1, 8)._shards))'
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("\n59\n"), done.stderr


def test_a_download_goes_on_as_long_as_bytes_come(server, tmp_path, monkeypatch):
    """Cut off more often than it may fail: each attempt brings something new."""
    monkeypatch.setattr(ts, "TRIES", 3)
    server.data = DATA * 2  # 6 pieces
    server.faults = ["cut"] * 5
    ts.fetch(server.url, str(tmp_path / "f"))
    assert (tmp_path / "f").read_bytes() == server.data and len(server.requests) == 6
    server.faults = ["cut", 503, "cut", 503, 503]  # two in a row that bring nothing
    refuses("503", ts.fetch, server.url, str(tmp_path / "g"))
    assert server.faults == []


def test_waits_double(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(ts, "BACKOFF", 1.0)
    monkeypatch.setattr(ts.time, "sleep", waits.append)
    server.faults = [503] * 9
    refuses("503", ts.fetch, server.url, str(tmp_path / "f"))
    assert waits == [1, 2, 4, 8]


def test_a_prompt_ends_before_the_next_story(tmp_path):
    """Also of short stories; and stories are drawn as often as their place in all shards says."""
    folder = Path(made(tmp_path / "t", (9, 40, 4000)))
    for name, size in (("data01.bin", 40), ("data02.bin", 4000)):
        ids = np.arange(size, dtype="<u2") % 7 + 10 + 100 * (size > 40)
        ids[::4] = 1  # BOS, then three tokens
        (folder / name).write_bytes(ids.tobytes())
    meta = json.loads((folder / "meta.json").read_text())
    for shard in meta["shards"]:
        shard["crc32"] = f"{zlib.crc32((folder / shard['name']).read_bytes()):08x}"
    (folder / "meta.json").write_text(json.dumps(meta))
    prompts = ts.StoryStarts(str(folder), "train").sample(np.random.default_rng(0), 1000, 12)
    assert all(p[0] == 1 and 1 not in p[1:] and len(p) <= 4 for p in prompts)
    assert sum(len(p) > 1 and p[1] < 100 for p in prompts) < 40  # one in a hundred is of the small shard


def test_ctrl_c_ends_train_vocab_at_once(tmp_path):
    """Also while sentencepiece trains, which asks nobody; and it is no fault of the stories."""
    run("synth", f"--data_dir={tmp_path}", "--num_stories=20", "--num_shards=2", check=True)
    interrupt = "os.kill(os.getpid(), signal.SIGINT), time.sleep(60)"
    for when, code, told in (
            ("ts.read_stories = lambda *args: (" + interrupt + ")", 1, "stopped; run the same again"),
            ("ts.sentencepiece.SentencePieceTrainer.train = lambda sentence_iterator, **how: "
             "(list(sentence_iterator), " + interrupt + ")", -signal.SIGINT, "")):
        call = ("import os, signal, time, tinystories as ts; "  # a job in the background ignores Ctrl-C
                f"signal.signal(signal.SIGINT, signal.default_int_handler); {when}; ts.main()")
        done = subprocess.run([sys.executable, "-c", call, "train_vocab", "--vocab_size=350", "--data_dir",
                               tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=50)
        assert done.returncode == code and told in done.stderr and "cannot train" not in done.stderr, done
        assert not list(tmp_path.glob("tok*")), "a vocabulary came of it"


def test_who_may_be_at_it_is_not_undone(tmp_path):
    """A folder that is away between two renames is brought back by who has the lock alone."""
    ts.main(["synth", f"--data_dir={tmp_path}", "--num_stories=20", "--num_shards=2"])
    folder = Path(ts.stories_dir(str(tmp_path)))
    folder.rename(f"{folder}.old")
    with ts.claimed(str(tmp_path), "stories"):  # of this process; others are refused
        for stage in ("train_vocab", "pretokenize"):
            done = run(stage, "--vocab_size=350", f"--data_dir={tmp_path}")
            assert done.returncode == 1 and not folder.exists(), done.stderr
    run("train_vocab", "--vocab_size=350", f"--data_dir={tmp_path}", check=True)
    assert folder.is_dir()


def test_an_address_that_cannot_be_reached_is_told_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(ts, "TRIES", 1)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{s.getsockname()[1]}/f"
        refuses("Connection refused", ts.fetch, address, str(tmp_path / "f"))
