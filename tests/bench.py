"""run.c's speed as a Markdown table, beside other programs' where they are named. Settings are variables:

    make bench
    make bench MODELS="out/model.bin out/model8.bin" THREADS="1 4" RUNS=3
    make bench PEER=llama2.c/run PEERQ=llama2.c/runq LLAMA_BENCH=llama.cpp/build/bin/llama-bench

MODELS       models to measure; without it, random weights of four usual sizes, made once in bench/
Z            their tokenizer; without it, a made-up one of the model's vocabulary
THREADS      numbers of threads, default 1 and all physical cores
RUNS         runs of each program, default 7; the table has the median (lowest–highest)
RUN          the program under test, default ./run
PEER, PEERQ  llama2.c's run (for fp32 models, v0) and runq (for int8 models)
LLAMA_BENCH  llama.cpp's llama-bench, or programs with its flags and JSON, separated by spaces. They read
             15M-F32.gguf beside 15M.bin, 15M-Q8_0.gguf beside 15M-int8.bin, 15M-Q4_0.gguf beside
             15M-4bit.bin.

The programs take turns, so that a slow minute of the machine is everyone's. Decode: 255 tokens after BOS,
greedy; of large fp32 models also without the draft that guesses ahead. Guessed right: the share of its
guesses that were, which for random weights need not be that of trained ones. First token: from the program's
start to that story's first. Of the bandwidth: bytes of weights times decode's tok/s without a draft, as a
share of what the same number of threads can read from a buffer of that size.

Not for: judging a change by itself; other work on the machine shows in the spread.
"""

import itertools
import json
import os
import platform
import re
import statistics
import struct
import subprocess
import sys
import time
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "bench"  # what is made here
STEPS, PROMPT, STORIES = 256, 512, 16  # positions of a story, tokens of a prompt, stories at once
TIMEOUT = 900  # seconds
LAYOUTS = {0: "fp32", 1: "fp32", 2: "int8", 3: "4-bit"}
GGUF = {"fp32": "F32", "int8": "Q8_0", "4-bit": "Q4_0"}
SUFFIX = {0: "", 2: "-int8", 3: "-4bit"}  # of the models made here
SIZES = {  # dim, n_layers, n_heads, n_kv_heads, vocab_size, hidden_dim, max_seq_len
    "260K": (64, 5, 8, 4, 512, 172, 512),
    "15M": (288, 6, 6, 6, 32000, 768, 1024),
    "42M": (512, 8, 8, 8, 32000, 1376, 1024),
    "110M": (768, 12, 12, 12, 32000, 2048, 1024),
}
COLUMNS = ["model", "threads", "program", "decode, tok/s", "÷ best peer", "guessed right", "of the bandwidth",
           f"prompt of {PROMPT}, tok/s", "÷ best peer", f"{STORIES} stories, tok/s", "whole run, ms",
           "first token, ms", "memory, MB"]


def die(message: str):
    raise SystemExit(f"bench: {message}")


def note(message: str) -> None:
    print(f"bench: {message}", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------
# Settings


@dataclass
class Settings:
    run: str
    models: list[Path]  # empty: those made here
    tokenizer: str
    threads: list[int]
    runs: int
    peer: str
    peerq: str
    llama_bench: list[str]


def physical_cores() -> int:
    """Two hyperthreads count as one core. Where the system does not tell, all that it shows."""
    found = set()
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ():
        folder = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            found.add(((folder / "physical_package_id").read_text(), (folder / "core_id").read_text()))
        except OSError:
            return os.cpu_count() or 1
    return len(found) or os.cpu_count() or 1


def whole_numbers(name: str, text: str) -> list[int]:
    if not re.fullmatch(r"\s*[1-9]\d*(\s+[1-9]\d*)*\s*", text):
        die(f'{name}="{text}": expected whole numbers of at least 1')
    return [int(n) for n in text.split()]


def program(name: str, path: str, hint: str) -> str:
    if not (os.path.isfile(path) and os.access(path, os.X_OK)):
        die(f"{name}={path}: there is no such program; {hint}")
    return os.path.abspath(path)


def read_settings(env: dict[str, str]) -> Settings:
    """Raises SystemExit where one of them cannot be meant."""
    def get(name: str, default: str = "") -> str:
        return env.get(name, "").strip() or default

    models = [Path(path) for path in get("MODELS").split()]
    for path in models:
        if not path.is_file():
            die(f"MODELS: there is no file {path}; leave MODELS out to have models made")
    if get("Z") and not os.path.isfile(get("Z")):
        die(f"Z={get('Z')}: there is no such file; leave Z out to have a tokenizer made")
    runs = whole_numbers("RUNS", get("RUNS", "7"))
    if len(runs) != 1:
        die(f'RUNS="{get("RUNS")}": expected one number')
    built = "build llama2.c (make run, make runomp) and give the program's path"
    return Settings(
        run=program("RUN", get("RUN", str(ROOT / "run")), "build it: make run"),
        models=models,
        tokenizer=get("Z"),
        threads=whole_numbers("THREADS", get("THREADS", " ".join(map(str, sorted({1, physical_cores()}))))),
        runs=runs[0],
        peer=get("PEER") and program("PEER", get("PEER"), built),
        peerq=get("PEERQ") and program("PEERQ", get("PEERQ"), built),
        llama_bench=[
            program("LLAMA_BENCH", path, "build llama.cpp; it is build/bin/llama-bench there")
            for path in get("LLAMA_BENCH").split()
        ],
    )


# ----------------------------------------------------------------------------
# Models


def make_tokenizer(path: Path, vocab_size: int) -> None:
    """A tokenizer of that size: bytes, then all words of one letter, of two, of three, ..."""
    letters = " etaoinshrdlucmfwypvbgkjqxz"
    words = ("".join(word) for n in itertools.count(1) for word in itertools.product(letters, repeat=n))
    special = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{i:02X}>" for i in range(256))]
    pieces = [piece.encode() for piece in itertools.islice(itertools.chain(special, words), vocab_size)]
    data = struct.pack("<I", max(map(len, pieces)))
    data += b"".join(struct.pack("<fI", -i, len(piece)) + piece for i, piece in enumerate(pieces))
    part = path.with_suffix(".part")
    part.write_bytes(data)
    part.replace(path)


def make_models(folder: Path, sizes: dict[str, tuple[int, ...]]) -> list[Path]:
    """Random weights of each size in each layout; what is there is kept."""
    folder.mkdir(exist_ok=True)
    paths = {(name, v): folder / f"{name}{end}.bin" for name in sizes for v, end in SUFFIX.items()}
    for name, shape in sizes.items():
        missing = [version for version in SUFFIX if not paths[name, version].exists()]
        if not missing:
            continue
        note(f"making {name} in {folder}")
        sys.path.insert(0, str(ROOT))
        import torch  # takes seconds, and only this needs it

        from export import tensor_names, tensor_shape, write_bin
        from model import ModelArgs

        torch.set_num_threads(1)  # the pieces are small: on a busy machine threads would wait for each other
        args = ModelArgs(*shape[:6], max_seq_len=shape[6])
        generator = torch.Generator().manual_seed(0)
        state = {}
        for tensor in tensor_names(1, args):
            size = tensor_shape(tensor, args)
            norm = len(size) == 1
            state[tensor] = torch.ones(size) if norm else torch.randn(size, generator=generator) * 0.02
        # BOS and EOS are never the likeliest: their logits are near 0, and others' are not
        state["tok_embeddings.weight"][1:3] *= 0.01
        for version in missing:
            write_bin(str(paths[name, version]), args, state, version)
    return list(paths.values())


@dataclass
class Model:
    path: Path
    version: int
    vocab_size: int
    seq_len: int
    weights: int  # bytes of them that each token needs

    @property
    def layout(self) -> str:
        return LAYOUTS[self.version]

    @property
    def name(self) -> str:
        return self.path.stem.removesuffix(SUFFIX.get(self.version, ""))

    @property
    def gguf(self) -> Path:
        return self.path.with_name(f"{self.name}-{GGUF[self.layout]}.gguf")


def read_model(path: Path) -> Model:
    """From the header alone; that the rest is sound is for run to say."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        header = f.read(41)
    if len(header) < 41:
        die(f"MODELS: {path} is no model: it has only {size} bytes")
    magic, version = struct.unpack("<Ii", header[:8])
    version = version if magic == 0x616B3432 else 0
    shape = struct.unpack_from("<7i", header, 8 if version else 0)
    dim, hidden_dim, _, n_heads, _, vocab_size, seq_len = shape
    tied, group_size = struct.unpack_from("<Bi", header, 36) if version else (vocab_size > 0, 0)
    if version not in LAYOUTS or min(dim, hidden_dim, n_heads, abs(vocab_size), seq_len) < 1 or dim > 2**20:
        die(f"MODELS: {path} is no model for run.c; python export.py makes one from a checkpoint")
    weights = size - (256 if version else 28 + seq_len * (dim // n_heads) * 4)  # v0 has two unused tables
    if not tied:  # of the table of embeddings each token needs but a row
        per_value = {0: 4, 1: 4, 2: 1 + 4 / max(group_size, 1), 3: 18 / 32}[version]
        weights -= int(abs(vocab_size) * dim * per_value)
    return Model(path, version, abs(vocab_size), seq_len, max(weights, 1))


# ----------------------------------------------------------------------------
# Running programs


class Failed(Exception):
    """A program's failure, in a line."""


def call(command: list, env: dict[str, str] | None = None) -> tuple[str, str, float]:
    """stdout, stderr, seconds."""
    start = time.perf_counter()
    try:
        done = subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL, capture_output=True,
                              timeout=TIMEOUT, check=False, env=os.environ | (env or {}))
    except subprocess.TimeoutExpired:
        raise Failed(f"{command[0]} was stopped after {TIMEOUT} s") from None
    except OSError as e:
        raise Failed(f"{command[0]} cannot be run: {e.strerror}") from None
    seconds = time.perf_counter() - start
    out, err = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
    if done.returncode:
        last = (err.strip() or "it said nothing").splitlines()[-1]
        raise Failed(f"{command[0]} failed with code {done.returncode}: {last}")
    return out, err, seconds


def run_stats(command: list) -> tuple[dict, float]:
    """What run says with --stats, and seconds."""
    _, err, seconds = call([*command, "--stats"])
    try:
        return json.loads(err.strip().splitlines()[-1]), seconds
    except (ValueError, IndexError):
        raise Failed(f"{command[0]} printed no JSON for --stats") from None


BANDWIDTH_C = r"""
/* bandwidth BYTES THREADS: prints the bytes per second at which so many threads together read a buffer */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { PASSES = 16, STREAMS = 4 };
typedef uint64_t Vector __attribute__((vector_size(64)));
static Vector *buffer;
static size_t n;        /* vectors of a stream */
static size_t repeats;  /* of short buffers, so that a pass is not over at once */
static int threads;
static atomic_int arrived[2 * PASSES];
static double best = 1e30;
static volatile uint64_t sink;

static double now(void) {
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void meet(int i) {
    atomic_fetch_add(&arrived[i], 1);
    while (atomic_load(&arrived[i]) < threads) sched_yield();
}

static void *reader(void *arg) {
    const size_t me = (size_t)(uintptr_t)arg;
    const Vector *p = buffer + me * STREAMS * n;
    Vector a = {0}, b = {0}, c = {0}, d = {0};
    for (int pass = 0; pass < PASSES; pass++) {
        meet(2 * pass);
        double start = now();
        for (size_t r = 0; r < repeats; r++) {
            /* one stream or four: which is faster depends on the machine */
            const size_t step = pass % 2 ? 1 : STREAMS, apart = pass % 2 ? n : 1;
            for (const Vector *v = p; v < p + n * step; v += step) {
                a ^= v[0], b ^= v[apart], c ^= v[2 * apart], d ^= v[3 * apart];
            }
            __asm__ volatile("" ::: "memory");
        }
        meet(2 * pass + 1);
        double seconds = now() - start;
        if (me == 0 && seconds < best) best = seconds;
    }
    a ^= b ^ c ^ d;
    sink = a[0] ^ a[1] ^ a[2] ^ a[3] ^ a[4] ^ a[5] ^ a[6] ^ a[7];
    return NULL;
}

int main(int argc, char **argv) {
    const size_t huge = (size_t)2 << 20;
    if (argc != 3) return 2;
    threads = atoi(argv[2]);
    size_t bytes = strtoull(argv[1], NULL, 10);
    n = bytes / sizeof(Vector) / STREAMS / (size_t)threads + 1;
    bytes = n * STREAMS * (size_t)threads * sizeof(Vector);
    repeats = ((size_t)32 << 20) / bytes + 1;
    buffer = aligned_alloc(huge, (bytes + huge - 1) / huge * huge);
    pthread_t *others = calloc((size_t)threads, sizeof *others);
    if (!buffer || !others) return 3;
#ifdef MADV_HUGEPAGE
    madvise(buffer, bytes, MADV_HUGEPAGE);
#endif
    memset(buffer, 1, bytes);
    for (int i = 1; i < threads; i++) {
        if (pthread_create(&others[i], NULL, reader, (void *)(uintptr_t)i)) return 3;
    }
    reader(NULL);
    printf("%.0f\n", (double)bytes * (double)repeats / best);
    return 0;
}
"""


def build_bandwidth(folder: Path) -> Path:
    source, binary = folder / "bandwidth.c", folder / "bandwidth"
    if binary.exists() and source.exists() and source.read_text(encoding="utf-8") == BANDWIDTH_C:
        return binary
    folder.mkdir(exist_ok=True)
    source.write_text(BANDWIDTH_C, encoding="utf-8")
    command = [*os.environ.get("CC", "cc").split(), "-std=c11", "-O3", "-o", binary, source, "-lpthread"]
    try:
        call([*command, "-march=native"])  # vectors as wide as run.c's
    except Failed:
        try:
            call(command)
        except Failed as e:
            die(f"{e}; name a C compiler with CC=")
    return binary


# ----------------------------------------------------------------------------
# Measuring

Figures = dict[str, list[float]]  # by what is measured


@dataclass
class Bench:
    settings: Settings
    bandwidth: Path

    def tokenizer(self, model: Model) -> str:
        if self.settings.tokenizer:
            return self.settings.tokenizer
        path = FOLDER / f"tok{model.vocab_size}.bin"
        if not path.exists():
            FOLDER.mkdir(exist_ok=True)
            make_tokenizer(path, model.vocab_size)
        return str(path)

    def ours(self, model: Model, *options) -> list:
        return [self.settings.run, model.path, "-z", self.tokenizer(model), "-t", 0, *options]

    def prompt(self, model: Model, length: int) -> str:
        """A text of exactly that many tokens: words while there is room, then newlines, a token each."""
        words = ("Once upon a time there was a little fox who lived in the woods with her mother and her two "
                 "brothers and every day they went down to the river to look for something to eat ").split()
        words = list(itertools.islice(itertools.cycle(words), length))

        def count(text: str) -> int:
            return len(call(self.ours(model, "--tokens", "-i", text))[0].split())

        def text(n: int) -> str:
            return " ".join(words[:n])

        n = bisect_right(range(length + 1), length, key=lambda n: count(text(n))) - 1
        return text(max(n, 0)) + "\n" * (length - count(text(max(n, 0))))

    def memory(self, model: Model, threads: int) -> float:
        """Megabytes, from a first run that also warms the file cache."""
        # a shell's child starts at the shell's memory, but ours at the memory of this interpreter
        in_shell = ["sh", "-c", '"$@"; exit $?', "sh"]
        stats, _ = run_stats([*in_shell, *self.ours(model, "-n", STEPS, "-j", threads)])
        told, asked = stats["decoded_tokens"], min(STEPS, model.seq_len) - 1
        if told != asked:
            note(f"{model.path} ended its story after {told} of {asked} tokens; its speeds are of those")
        return stats["memory_bytes"] / 1e6

    def jobs(self, model: Model, threads: int) -> dict[str, list]:
        """By program, functions that measure once and return {what: figure}."""
        s = self.settings
        length = min(PROMPT, model.seq_len)
        if length < PROMPT:
            note(f"{model.path} has room for {length} positions: its prompt has so many tokens")
        prompt = self.prompt(model, length)

        def decode(*options):
            stats, seconds = run_stats(self.ours(model, "-n", STEPS, "-j", threads, *options))
            first = stats["load_seconds"] + stats["first_token_seconds"]
            figures = {"decode": stats["decode_tok_s"], "wall": seconds * 1e3, "first": first * 1e3}
            if guesses := stats.get("drafted_tokens"):
                figures["right"] = stats["accepted_tokens"] / guesses
            return figures

        def prefill():
            stats, _ = run_stats(self.ours(model, "-n", length, "-j", threads, "-i", prompt))
            if stats["prompt_tokens"] != length:
                raise Failed(f"with {self.tokenizer(model)} no prompt has exactly {length} tokens")
            return {"prompt": stats["prompt_tok_s"]}

        def batch():
            stats, _ = run_stats(self.ours(model, "-n", STEPS, "-j", threads, "-b", STORIES))
            return {"batch": stats["decode_tok_s"]}

        def llama2c(path: str):
            command = [path, model.path, "-t", 0, "-n", STEPS, "-z", self.tokenizer(model), "-i", ""]
            _, err, seconds = call(command, {"OMP_NUM_THREADS": str(threads)})
            found = re.search(r"achieved tok/s: ([\d.]+)", err)
            if not found:
                raise Failed(f'{path} printed no "achieved tok/s"')
            return {"decode": float(found[1]), "wall": seconds * 1e3}

        def llama_bench(path: str):
            out, _, _ = call([path, "-m", model.gguf, "-t", threads, "-n", STEPS - 1, "-p", length, "-r", 1,
                              "-o", "json"])
            figures = {}
            try:
                for test in json.loads(out):
                    tok_s = test["avg_ts"] if "avg_ts" in test else statistics.mean(test["samples_ts"])
                    figures["decode" if test["n_gen"] else "prompt"] = float(tok_s)
            except (ValueError, TypeError, KeyError, statistics.StatisticsError):
                raise Failed(f"{path} printed no JSON as llama-bench -o json does") from None
            return figures

        def bandwidth():
            return {"bandwidth": float(call([self.bandwidth, model.weights, threads])[0])}

        jobs = {"run": [decode, prefill, batch]}
        if "right" in decode():  # else both are the same
            jobs["run --draft 0"] = [lambda: decode("--draft", 0), bandwidth]
        else:
            jobs["run"].append(bandwidth)
        if model.version in (0, 2):
            peer = s.peer if model.version == 0 else s.peerq
            if peer:
                jobs["llama2.c"] = [lambda: llama2c(peer)]
        elif model.version == 1 and s.peer:
            note(f"{model.path} is v1, and llama2.c's run reads v0 alone: python export.py writes it")
        short = [Path(path).name for path in s.llama_bench]
        for path, name in zip(s.llama_bench, short, strict=True):
            if model.gguf.exists():
                jobs[name if short.count(name) == 1 else path] = [lambda path=path: llama_bench(path)]
        return jobs

    def measure(self, model: Model, threads: int) -> dict[str, Figures]:
        """By program, the figures of all runs. SystemExit if run fails; another program is left out then."""
        figures: dict[str, Figures] = {}
        try:
            memory = self.memory(model, threads)
            jobs = self.jobs(model, threads)
            figures = {name: defaultdict(list) for name in jobs}
            figures["run"]["memory"].append(memory)
            for _ in range(self.settings.runs):
                for name in list(jobs):
                    try:
                        for job in jobs[name]:
                            for what, value in job().items():
                                figures[name][what].append(value)
                    except Failed as e:
                        if name.startswith("run"):
                            raise
                        note(f"{e}; going on without it")
                        del jobs[name]
        except Failed as e:
            die(str(e))
        return figures


# ----------------------------------------------------------------------------
# The table


def number(x: float) -> str:
    return f"{x:,.0f}" if x >= 99.95 else f"{x:.3g}"


def spread(values: list[float]) -> str:
    """Median (lowest–highest)."""
    if not values:
        return "–"
    text = number(statistics.median(values))
    return text if len(values) == 1 else f"{text} ({number(min(values))}–{number(max(values))})"


def ours(name: str) -> bool:
    return name in ("run", "run --draft 0")


def ratio(figures: dict[str, Figures], program: str, what: str) -> str:
    """The median of ours as a multiple of the best other one's."""
    others = [statistics.median(f[what]) for name, f in figures.items() if f.get(what) and not ours(name)]
    if not others or not ours(program) or not figures[program].get(what):
        return "–" if ours(program) else ""
    return f"{statistics.median(figures[program][what]) / max(others):.2f} ×"


def rows(model: Model, threads: int, figures: dict[str, Figures]) -> list[list[str]]:
    lines = []
    for name, f in figures.items():
        share = "–"
        if f.get("bandwidth"):
            reached, best = model.weights * statistics.median(f["decode"]), max(f["bandwidth"])
            share = f"{reached / best:.0%} of {number(best / 1e9)} GB/s"
        lines.append([
            f"{model.name}, {model.layout}", str(threads), name,
            spread(f["decode"]), ratio(figures, name, "decode"),
            f"{statistics.median(f['right']):.0%}" if f.get("right") else "–", share,
            spread(f["prompt"]), ratio(figures, name, "prompt"),
            spread(f["batch"]), spread(f["wall"]), spread(f["first"]), spread(f["memory"]),
        ])
    return lines


def machine() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
    except OSError:
        found = None
    return f"{found[1] if found else platform.processor() or platform.machine()}, {physical_cores()} cores"


def print_row(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    settings = read_settings(dict(os.environ))
    models = [read_model(path) for path in settings.models or make_models(FOLDER, SIZES)]
    missing = [str(model.gguf) for model in models if not model.gguf.exists()]
    if settings.llama_bench and missing:
        note(f"there is no {', '.join(missing)}; llama.cpp's llama-convert-llama2c-to-ggml makes -F32.gguf "
             "from a v0 model, its llama-quantize --pure the others from that")
    bench = Bench(settings, build_bandwidth(FOLDER))
    try:
        stats, _ = run_stats(bench.ours(models[0], "-n", 2))
    except Failed as e:
        die(str(e))
    runs = f"{settings.runs} runs in turn: median (lowest–highest)" if settings.runs > 1 else "1 run"
    print(f"{machine()}, {stats['kernels']} kernels; {runs}\n")
    print_row(COLUMNS)
    print_row(["---"] * 2 + ["---"] + ["---:"] * (len(COLUMNS) - 3))
    for model, threads in itertools.product(models, settings.threads):
        for row in rows(model, threads, bench.measure(model, threads)):
            print_row(row)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        die("interrupted")
