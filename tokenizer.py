"""The tokenizer: sentencepiece's encode and decode, and the file that run.c reads.

    python tokenizer.py --tokenizer-model=data/tok4096.model     # writes data/tok4096.bin

A `.model` file is what sentencepiece trains (`python tinystories.py train_vocab`) or what comes with
Llama 2. Its `.bin` holds the same pieces for run.c, little-endian: uint32 longest piece in bytes, then
per id a float32 score, a uint32 length and the bytes of the piece.

Not for: training a vocabulary (tinystories.py), Hugging Face's tokenizer.json, chat templates.
This file also keeps what the command lines of this project share: `atomic_write`, `lock` and `CommandLine`.
"""

import argparse
import difflib
import errno
import glob
import hashlib
import os
import platform
import shlex
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import IO

try:
    from sentencepiece import SentencePieceProcessor
except ModuleNotFoundError as e:
    raise SystemExit(f"{e.name} is not installed for Python {sys.version.split()[0]}; run: "
                     ". .venv/bin/activate, or with 3.11 or newer: pip install -r requirements.txt") from None
try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

SPACE = "\u2581"  # how sentencepiece spells a space inside a piece


@contextmanager
def atomic_write(path: str, mode: str = "wb") -> Iterator:
    """Open a file that appears under `path` only once all of it is on the disk.

    A run killed halfway leaves the old file, or none. The temporary name holds host and process, so two
    runs never write into each other's; those of dead processes of this host are cleared away.
    """
    ours = f"{path}.{platform.node()}-"
    forget(*(stale for stale in glob.glob(glob.escape(ours) + "*.tmp")
             if not _alive(stale[len(ours):-len(".tmp")])))
    tmp = f"{ours}{os.getpid()}.tmp"
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(tmp, mode, **text) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError as e:
        if e.filename in (None, tmp):  # a full disk names no file
            e.filename = path
        raise
    finally:
        forget(tmp)


def lock(folder: str, name: str = ".lock", other: str = "another folder", shared: bool = False) -> IO | None:
    """Claim `folder` for this process as long as it lives: keep what is returned. None if it can't be locked.

    With `shared` others may share it, but nobody can have it alone. The system drops the lock of a process
    that dies, so a lock file left behind (it names host and process) stands in nobody's way. Raises
    SystemExit if another process, of whatever host, has the lock.
    """
    path = os.path.join(folder, name)
    f = open(path, "a+", encoding="utf-8")
    try:
        if fcntl:
            # not flock: children would inherit that
            fcntl.lockf(f, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        elif not shared:  # there is no such thing there
            f.seek(1 << 30)  # there, the locked byte could not be read
            msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as e:
        if e.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):  # a file system that knows no locks
            print(f"warning: cannot lock {path} ({e.strerror}): use {folder} from one run only",
                  file=sys.stderr)
            return None
        f.seek(0)
        owner = f.read(200).strip() or "another process"
        raise SystemExit(f"{folder} is in use by {owner}; wait until it ends, stop it, or choose {other}"
                         ) from None
    f.truncate(0)
    if not shared:  # there, it would be the last to come, who may be gone while others are not
        with suppress(OSError):  # a full disk: locked it is all the same
            os.write(f.fileno(), f"process {os.getpid()} on {platform.node()}\n".encode())
    return f


def _alive(pid: str) -> bool:
    if os.name == "nt":  # Windows takes signal 0 for Ctrl-C
        return True
    if not pid.isdecimal():  # of a host whose name begins with this one's and a hyphen
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it lives, under another user
    return True


def forget(*paths: str) -> None:
    """Remove those of the files that are there."""
    for path in paths:
        with suppress(FileNotFoundError):
            os.remove(path)


def tokenizer_path(data_dir: str, vocab_size: int) -> str:
    """The .model for a vocabulary of `vocab_size` pieces; 0 means the Llama 2 tokenizer."""
    return os.path.join(data_dir, f"tok{vocab_size}.model" if vocab_size else "tokenizer.model")


class CommandLine(argparse.ArgumentParser):
    """argparse, except that `-` and `_` in option names are the same and a mistake is one line, exit 1."""

    def __init__(self, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, argv: list[str] | None = None, namespace=None) -> argparse.Namespace:
        if hasattr(sys.stdout, "reconfigure"):  # a story may have what an old encoding has not
            sys.stdout.reconfigure(errors="replace")
        argv = list(sys.argv[1:] if argv is None else argv)
        for i, arg in enumerate(argv):
            if arg == "--":
                break
            if arg.startswith("--"):
                name, equals, value = arg.partition("=")
                argv[i] = "--" + name[2:].replace("-", "_") + equals + value
        known, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            sub = getattr(known, "parser", self)  # the stage's own parser, where there are stages
            names = [name for action in sub._actions for name in action.option_strings]
            name = unknown[0].partition("=")[0]
            if sub is not self and name in names:  # the stage's, before the stage
                raise SystemExit(f"{name} belongs after the stage; run: python {sub.prog} "
                                 + printable(unknown[0]))
            sub.error(f"no such option or argument: {unknown[0]}{did_you_mean(name, names)}")
        return known

    def _get_values(self, action: argparse.Action, arg_strings: list[str]):
        value = super()._get_values(action, arg_strings)
        if value == [] and action.nargs is None:  # of --option=--, in Python 3.11
            raise argparse.ArgumentError(action, "expected one argument")
        return value

    def _check_value(self, action: argparse.Action, value) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(action, f"{value!r} is not one of {', '.join(choices)}"
                                         + did_you_mean(str(value), choices))

    def error(self, message: str):
        message = message.replace("ignored explicit argument", "takes no value, such as")
        raise SystemExit(f"{printable(message)}; see: python {self.prog} --help")


def did_you_mean(word: str, words: list[str]) -> str:
    initials = {"--" + "".join(part[:1] for part in w.strip("-").split("_")): w for w in words}
    longer = sorted((w for w in words if len(word) > 4 and w.startswith(word)), key=len)
    near = [initials[word]] if word in initials else longer or difflib.get_close_matches(word, words, 1)
    return f"; did you mean {near[0]}?" if near else ""


def printable(text: str) -> str:
    """What a user typed, fit for one line: without line ends, and without what would steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class Tokenizer:
    """A sentencepiece model with Llama's special ids.

    Raises SystemExit, in one line, when `model_path` is missing or is no such model.
    """

    def __init__(self, model_path: str):
        self.model_path = model_path
        try:
            with open(model_path, "rb") as f:
                self._proto = f.read()
        except OSError as e:
            raise SystemExit(f"no tokenizer {model_path}: {e.strerror}; {how_to_make(model_path)}") from None
        try:
            if not self._proto:  # parses as a model of no pieces
                raise RuntimeError("empty file")
            self._sp = SentencePieceProcessor(model_proto=self._proto)
        except RuntimeError:
            raise SystemExit(f"{model_path} is no sentencepiece model; {how_to_make(model_path)}") from None
        self.vocab_size: int = self._sp.vocab_size()
        self.bos_id: int = self._sp.bos_id()
        self.eos_id: int = self._sp.eos_id()
        self.pad_id: int = self._sp.pad_id()  # -1: Llama has none
        if min(self.bos_id, self.eos_id) < 0:
            raise SystemExit(f"{model_path} has no begin or end piece (<s>, </s>); {how_to_make(model_path)}")

    @cached_property
    def sha256(self) -> str:
        """Of the .model file, as it was loaded: what token shards and checkpoints remember of a tokenizer."""
        return hashlib.sha256(self._proto).hexdigest()

    def put_back(self, sha256: str) -> str:
        """What to type to have the tokenizer of that sum in this one's place, if train_vocab kept it."""
        kept = kept_path(self.model_path, str(sha256))  # whatever a damaged checkpoint says
        if not os.path.exists(kept):
            return "put that one back"
        model, kept, mine = map(shlex.quote, (self.model_path, kept, kept_path(self.model_path, self.sha256)))
        return f"run: mv {model} {mine} && mv {kept} {model} && python tokenizer.py --tokenizer-model={model}"

    def encode(self, s: str, bos: bool = True, eos: bool = False) -> list[int]:
        """Ids of `s`. Half a surrogate pair (JSON's "\\ud83d") is encoded as U+FFFD."""
        return self._sp.encode(whole(s), add_bos=bos, add_eos=eos)

    def encode_batch(self, texts: list[str], bos: bool = True, eos: bool = False, num_threads: int = -1,
                     return_type: type | str = int) -> list:
        """Like encode for each text, on `num_threads` threads (-1: every core).

        `return_type` is sentencepiece's: int for lists, "numpy" for int32 arrays, which are faster.
        """
        return self._sp.encode([whole(s) for s in texts], add_bos=bos, add_eos=eos, num_threads=num_threads,
                               return_type=return_type)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; BOS and EOS are silent, bytes that are no UTF-8 become U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"ids {min(ids)}..{max(ids)} outside a vocabulary of {self.vocab_size}")
        return self._sp.decode(ids)

    def export(self, path: str | None = None) -> str:
        """Write run.c's tokenizer file; returns its path (default: the model's, with .bin as its suffix)."""
        path = path or os.path.splitext(self.model_path)[0] + ".bin"
        pieces = [self._sp.id_to_piece(i).replace(SPACE, " ").encode("utf-8") for i in range(self.vocab_size)]
        pieces[self.bos_id] = b"\n<s>\n"  # llama2.c's spelling: no prompt can contain them by chance
        pieces[self.eos_id] = b"\n</s>\n"
        with atomic_write(path) as f:
            f.write(struct.pack("<I", max(map(len, pieces))))
            for i, piece in enumerate(pieces):
                f.write(struct.pack("<fI", self._sp.get_score(i), len(piece)) + piece)
        return path


def kept_path(path: str, sha256: str) -> str:
    """The name under which a file of that sum is kept when another takes its own."""
    name, suffix = os.path.splitext(path)
    return f"{name}-{sha256[:8]}{suffix}"


def whole(s: str) -> str:
    """`s` with pairs of surrogates joined and halves of a pair replaced, so that it is valid Unicode."""
    try:
        s.encode("utf-8")
    except UnicodeEncodeError:
        return s.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return s


def how_to_make(model_path: str) -> str:
    """The command that makes the tokenizer a path like data/tok4096.model or data/tokenizer.model names."""
    model = os.path.splitext(model_path)[0] + ".model"
    if model != model_path and os.path.isfile(model):
        return f"give the one for Python: {model}"
    folder, name = os.path.split(model_path)
    size = name.removeprefix("tok").removesuffix(".model")
    if name == "tokenizer.model":
        command = "download"
    elif size.isdigit():
        command = f"train_vocab --vocab_size={size}"
    else:
        return "name one that is, or run: python tinystories.py train_vocab --vocab_size=4096"
    where = f" --data_dir={shlex.quote(folder or '.')}" if folder != "data" else ""
    return f"run: python tinystories.py {command}{where}"


def main(argv: list[str] | None = None) -> None:
    cli = CommandLine(prog="tokenizer.py", description=__doc__)
    cli.add_argument("-t", "--tokenizer_model", default="data/tokenizer.model", metavar="MODEL",
                     help="the sentencepiece model to read (default: %(default)s)")
    cli.add_argument("-o", "--output", metavar="BIN", help="the file to write (default: MODEL with .bin)")
    args = cli.parse_args(argv)
    tokenizer = Tokenizer(args.tokenizer_model)
    if args.output and os.path.exists(args.output) and os.path.samefile(args.output, args.tokenizer_model):
        cli.error(f"--output={args.output} is the model that it is made of; name another file")
    try:
        path = tokenizer.export(args.output)
    except OSError as e:
        raise SystemExit(f"cannot write {e.filename}: {e.strerror}; say where else: --output=FILE") from None
    print(f"wrote {path}: {tokenizer.vocab_size} pieces; use it: ./run out/model.bin -z {shlex.quote(path)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
