"""Tests of run.c: logits, tokens, sampling and text against independent implementations written here, and
every broken file, prompt and flag we know of on a build with the address and undefined-behaviour sanitizers.

Needs a C compiler, numpy and sentencepiece; makes its own models. Where ../shared/data lies beside the
repository, the real stories260K and Llama 2 tokenizer are tested as well. Not here: speed, fuzzing.
"""

import ctypes
import ctypes.util
import dataclasses
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from conftest import made_once

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
STORIES = DATA / "stories260K"
BOS, EOS = 1, 2
INT_MAX, INT_MIN = 2**31 - 1, -(2**31)
SANITIZER = "exitcode=99:allocator_may_return_null=1:detect_leaks="
# leaks count where a run succeeds; an error exits from where it is
ENV = dict(os.environ, ASAN_OPTIONS=SANITIZER + "0", UBSAN_OPTIONS="exitcode=99")
LEAKS_ENV = dict(ENV, ASAN_OPTIONS=SANITIZER + "1")

needs_stories = pytest.mark.skipif(
    not STORIES.is_dir(), reason=f"no real weights: {STORIES} is not there (stories260K.bin, tok512.bin)")


# ---------------------------------------------------------------------------------------------------------
# Builds

# Reads {char kind; uint32 n; n bytes} from stdin. 'e': encode the bytes, print the ids. 's': the bytes are
# {float temperature, topp; uint64 seed; uint32 draws; float logits[]}: print that many sampled ids. 'h':
# print the floats as attention remembers them, as half floats' bits, by each instruction set in turn.
HARNESS = r"""
#define main run_main
#include "run.c"
#undef main
int main(int argc, char **argv) {
    if (argc < 2 || strcmp(argv[1], "harness")) return run_main(argc, argv);
    Tokenizer t = {0};
    unsigned char head[5];
    if (argc > 2) load_tokenizer(&t, argv[2]);
    while (fread(head, 1, 5, stdin) == 5) {
        size_t n = (size_t)i32_at(head + 1);
        char *bytes = malloc(n);  /* exactly n: the sanitizer sees a read beyond */
        if (fread(bytes, 1, n, stdin) != n) return 2;
        if (head[0] == 'e') {
            Tokens ids = encode(&t, bytes, n);
            for (int i = 0; i < ids.n; i++) printf("%d ", ids.ids[i]);
            free(ids.ids);
        } else if (head[0] == 'h') {
            unsigned char *memory = malloc(n / 4 * LANES * 2);
            for (int k = 0; k < N_KERNELS; k++) {
                if (!usable(all_kernels[k])) continue;
                all_kernels[k]->store_kv(memory, 0, (float *)(void *)bytes, (int)n / 4, 2);
                for (size_t i = 0; i < n / 4; i++) {
                    printf("%d ", memory[2 * LANES * i] | memory[2 * LANES * i + 1] << 8);
                }
            }
            free(memory);
        } else {
            const unsigned char *b = (unsigned char *)bytes;
            int vocab = (int)(n - 20) / 4, draws = i32_at(b + 16);
            Sampler s = {.n = vocab, .temperature = f32_at(b), .topp = f32_at(b + 4)};
            s.kernels = best_kernels();
            uint64_t rng;
            memcpy(&rng, b + 8, 8);
            Candidate *candidates = malloc(2 * (size_t)vocab * sizeof(Candidate));
            float *logits = malloc(((size_t)vocab + LANES) * sizeof(float));
            for (int i = 0; i < draws; i++) {
                memcpy(logits, b + 20, (size_t)vocab * sizeof(float));
                printf("%d ", sample(&s, logits, &rng, candidates));
            }
            free(logits);
            free(candidates);
        }
        printf("\n");
        free(bytes);
    }
    if (argc > 2) free_tokenizer(&t);
    return 0;
}
"""


@dataclasses.dataclass
class Builds:
    fast: Path       # -O2
    checked: Path    # -O1 with ASan and UBSan; as "checked harness [TOKENIZER]" it is HARNESS
    in_place: Path   # -O1; fp32 weights are read where they are in the file, as those of large models; a
                     # container's limits are in files of the folder it runs in


@pytest.fixture(scope="session")
def builds(run_program, tmp_path_factory):
    cc = shutil.which(os.environ.get("CC", "cc"))
    common = [cc, "-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-ffp-contract=off", f"-I{ROOT}"]
    # use after scope is left to the fuzzer: looking for it takes twice as long to compile
    checks = ["-DSMALL", "-g", "-O1", "-fsanitize=address,undefined,float-cast-overflow,float-divide-by-zero",
              "-fno-sanitize-address-use-after-scope", "-fno-sanitize-recover=all"]
    probe = subprocess.run([cc, "-fsanitize=address,undefined", "-xc", "-",
                            "-o", str(tmp_path_factory.mktemp("probe") / "probe")],
                           input="int main(void){return 0;}", text=True, capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("the C compiler has no -fsanitize=address,undefined (libasan, libubsan)")

    def make(folder):
        (folder / "harness.c").write_text(HARNESS)
        jobs = {
            "checked": [*common, *checks, str(folder / "harness.c")],
            "in_place": [*common, "-Werror", "-DSMALL", "-DPACKED_FP32=0", '-DCONTAINER=""', "-O1",
                         str(ROOT / "run.c")],
        }
        running = [
            subprocess.Popen([*cmd, "-o", str(folder / name), "-lm", "-lpthread"], stderr=subprocess.PIPE,
                             text=True)
            for name, cmd in jobs.items()
        ]
        for process in running:
            _, errors = process.communicate()
            assert process.returncode == 0, errors

    out = made_once(tmp_path_factory, "checked", make)
    return Builds(run_program, out / "checked", out / "in_place")


def run(binary, *args, stdin=b"", cwd=None, env=ENV):
    return subprocess.run([str(binary), *map(str, args)], input=stdin, capture_output=True, env=env, cwd=cwd,
                          timeout=60, check=False)


def run_ok(binary, *args, **kw):
    r = run(binary, *args, env=LEAKS_ENV, **kw)
    assert r.returncode == 0, r.stderr.decode()
    return r.stdout


def assert_error(r, subject, *words):
    """One line on stderr, "run: SUBJECT: ..." with all the words; exit code 1, nothing on stdout."""
    text = r.stderr.decode()
    assert r.returncode == 1, (r.returncode, text)
    start = f"run: {subject}: " if str(subject) else "run: "
    assert text.startswith(start) and text.count("\n") == 1 and text.endswith("\n"), text
    assert r.stdout == b""
    for word in words:
        assert str(word) in text[len(start):], text


# ---------------------------------------------------------------------------------------------------------
# Models: random weights, written in the three layouts

@dataclasses.dataclass
class Shape:
    dim: int = 32
    hidden_dim: int = 48
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    vocab_size: int = 300
    seq_len: int = 32
    tied: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def ints(self, vocab_sign=1):
        return struct.pack("<7i", self.dim, self.hidden_dim, self.n_layers, self.n_heads, self.n_kv_heads,
                           self.vocab_size * vocab_sign, self.seq_len)


def random_weights(s, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)

    def matrix(layers, rows, cols):
        return (rng.standard_normal((layers, rows, cols)) * scale / np.sqrt(cols)).astype(np.float32)

    kv_dim = s.dim // s.n_heads * s.n_kv_heads
    w = {
        "emb": matrix(1, s.vocab_size, s.dim)[0] * np.float32(3),
        "rms_att": (1 + 0.2 * rng.standard_normal((s.n_layers, s.dim))).astype(np.float32),
        "wq": matrix(s.n_layers, s.dim, s.dim), "wk": matrix(s.n_layers, kv_dim, s.dim),
        "wv": matrix(s.n_layers, kv_dim, s.dim), "wo": matrix(s.n_layers, s.dim, s.dim),
        "rms_ffn": (1 + 0.2 * rng.standard_normal((s.n_layers, s.dim))).astype(np.float32),
        "w1": matrix(s.n_layers, s.hidden_dim, s.dim), "w2": matrix(s.n_layers, s.dim, s.hidden_dim),
        "w3": matrix(s.n_layers, s.hidden_dim, s.dim),
        "rms_final": (1 + 0.2 * rng.standard_normal(s.dim)).astype(np.float32),
    }
    w["cls"] = w["emb"] if s.tied else matrix(1, s.vocab_size, s.dim)[0]
    return w


V0_ORDER = ["emb", "rms_att", "wq", "wk", "wv", "wo", "rms_ffn", "w1", "w2", "w3", "rms_final"]
V1_ORDER = ["rms_att", "rms_ffn", "rms_final", "emb", "wq", "wk", "wv", "wo", "w1", "w2", "w3"]


def quantize(x, group):
    """int8 values and fp32 scales of the last axis in groups, rounding half away from zero."""
    g = x.reshape(-1, group)
    scale = (np.abs(g).max(axis=1) / 127).astype(x.dtype)
    t = g / np.where(scale == 0, 1, scale)[:, None]
    return (np.sign(t) * np.floor(np.abs(t) + 0.5)).astype(np.int8), scale


def quantize4(x):
    """(rows, groups, 32) values in [-8, 7] and (rows, groups) float16 scales; zeros behind."""
    g = np.pad(x, ((0, 0), (0, -x.shape[1] % 32))).reshape(len(x), -1, 32)
    scale = (np.abs(g).max(axis=2) / 7).astype(np.float16)
    t = g / np.where(scale == 0, 1, scale.astype(np.float64))[..., None]
    return np.rint(t).clip(-8, 7).astype(int), scale


def bytes4(x):
    """A tensor of v3, a byte at a time."""
    q, scale = quantize4(x)
    values, scales = bytearray(), bytearray()
    for band in range(0, len(x), 16):
        for group in range(q.shape[1]):
            for vector in range(4):
                for row in range(band, band + 16):
                    for byte in range(4):
                        low = q[row, group, 8 * vector + byte] if row < len(x) else 0
                        high = q[row, group, 8 * vector + 4 + byte] if row < len(x) else 0
                        values.append((low + 8) + 16 * (high + 8))
            for row in range(band, band + 16):
                scales += (scale[row, group] if row < len(x) else np.float16(0)).tobytes()
    return bytes(values + scales)


def model_bytes(s, w, version=0, group=0):
    if version == 0:
        freqs = np.full(s.seq_len * s.dim // s.n_heads, 7.0, np.float32)  # unused, and wrong on purpose
        parts = [s.ints(1 if s.tied else -1)] + [w[k].tobytes() for k in V0_ORDER] + [freqs.tobytes()]
        return b"".join(parts + ([] if s.tied else [w["cls"].tobytes()]))
    header = struct.pack("<Ii", 0x616B3432, version) + s.ints() + struct.pack("<B", s.tied)
    header = (header + struct.pack("<i", group)).ljust(48, b"\0")
    defaults = s.rope_theta == 10000.0 and s.norm_eps == 1e-5
    header += struct.pack("<ff", *((0, 0) if defaults else (s.rope_theta, s.norm_eps)))
    parts = [header.ljust(256, b"\0")]
    for name in V1_ORDER + ([] if s.tied else ["cls"]):
        for tensor in w[name] if w[name].ndim == 3 else [w[name]]:
            if version == 1 or name.startswith("rms"):
                parts.append(tensor.tobytes())
            elif version == 3:
                parts.append(bytes(-sum(map(len, parts)) % 64) + bytes4(tensor))
            else:
                q, scale = quantize(tensor, group)
                parts += [q.tobytes(), scale.tobytes()]
    return b"".join(parts)


def reference_logits(s, w, ids, group=0, bits=8):
    """Llama in numpy float64, one position and head at a time; a group makes weights and activations int8, or
    weights 4-bit."""
    def linear(x, matrix):
        if not group:
            return matrix.astype(np.float64) @ x
        if bits == 4:
            wq, ws = quantize4(matrix)
            xq, xs = quantize(np.pad(x, (0, -len(x) % 32)), 32)
            sums = (wq * xq.astype(np.int64)[None]).sum(axis=2)
            return (sums * ws.astype(np.float64) * xs[None]).sum(axis=1)
        wq, ws = quantize(matrix, group)
        xq, xs = quantize(x, group)
        wq = wq.reshape(len(matrix), -1, group).astype(np.int64)
        sums = (wq * xq.astype(np.int64)[None]).sum(axis=2)
        return (sums * ws.reshape(len(matrix), -1).astype(np.float64) * xs[None]).sum(axis=1)

    def norm(x, weight):
        return weight * (x / np.sqrt((x * x).mean() + s.norm_eps))

    def rotate(x, pos):
        pairs = x.reshape(-1, size // 2, 2)
        turn = np.exp(1j * pos * s.rope_theta ** (-np.arange(0, size, 2) / size))
        z = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
        return np.stack([z.real, z.imag], axis=-1).reshape(-1, size)

    size = s.dim // s.n_heads
    emb = w["emb"]
    if bits == 4:
        q, scale = quantize4(emb)
        emb = (q * scale.astype(np.float64)[..., None]).reshape(len(emb), -1)[:, :s.dim]
    elif group:
        q, scale = quantize(emb, group)
        emb = (q * scale[:, None]).reshape(emb.shape)
    half = np.float16 if group else np.float64  # of what attention remembers
    cache = [([], []) for _ in range(s.n_layers)]
    out = []
    for pos, token in enumerate(ids):
        x = emb[token].astype(np.float64)
        for layer in range(s.n_layers):
            h = norm(x, w["rms_att"][layer])
            q = rotate(linear(h, w["wq"][layer]), pos)
            keys, values = cache[layer]
            keys.append(rotate(linear(h, w["wk"][layer]), pos).astype(half))
            values.append(linear(h, w["wv"][layer]).reshape(-1, size).astype(half))
            heads = []
            for i in range(s.n_heads):
                kv = i // (s.n_heads // s.n_kv_heads)
                score = np.array([q[i] @ k[kv] for k in keys]) / np.sqrt(size)
                p = np.exp(score - score.max())
                heads.append(sum(a * v[kv] for a, v in zip(p / p.sum(), values, strict=True)))
            x = x + linear(np.concatenate(heads), w["wo"][layer])
            h = norm(x, w["rms_ffn"][layer])
            gate = linear(h, w["w1"][layer])
            x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, w["w3"][layer]), w["w2"][layer])
        out.append(linear(norm(x, w["rms_final"]), w["cls"]))
    return np.array(out)


# ---------------------------------------------------------------------------------------------------------
# Tokenizers

def tokenizer_bytes(pieces, scores=None, longest=None):
    scores = scores or [0.0] * len(pieces)
    longest = max(map(len, pieces)) if longest is None else longest
    out = [struct.pack("<i", longest)]
    for piece, score in zip(pieces, scores, strict=True):
        out += [struct.pack("<fI", score, len(piece)), piece]
    return b"".join(out)


SPECIAL = [b"<unk>", b"\n<s>\n", b"\n</s>\n"]
BYTES = [b"<0x%02X>" % i for i in range(256)]
LETTERS = [c.encode() for c in " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLM"]


def tokenizer_of(vocab_size):
    """A tokenizer with byte pieces, single letters and nothing to merge."""
    pieces = (SPECIAL + BYTES + LETTERS)[:vocab_size]
    return tokenizer_bytes(pieces + [b"filler%d" % i for i in range(vocab_size - len(pieces))])


def export_sentencepiece(model, path):
    pieces, scores = [], []
    for i in range(model.vocab_size()):
        special = {model.bos_id(): "\n<s>\n", model.eos_id(): "\n</s>\n"}
        pieces.append(special.get(i, model.id_to_piece(i)).replace("\u2581", " ").encode())
        scores.append(model.get_score(i))
    path.write_bytes(tokenizer_bytes(pieces, scores))


@pytest.fixture(scope="session")
def sentencepieces(tmp_path_factory):
    """{name: (sentencepiece model, its .bin)}: two trained here, and the real ones where they are."""
    out = tmp_path_factory.mktemp("sp")
    rng = random.Random(0)
    words = ("Once upon a time there was little girl named Lily who loved to play in the park "
             "caf\u00e9 na\u00efve \U0001f600 <s> I'll don't ball, ball. 12 2024 the the and and").split()
    text = [(" " * rng.choice([1, 1, 1, 2, 4])).join(rng.choices(words, k=12)) for _ in range(2000)]
    models = {}
    for name, fallback in [("bytes", True), ("no_bytes", False)]:
        proto = io.BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=proto, vocab_size=420 if fallback else 160,
            model_type="bpe", byte_fallback=fallback, split_digits=True, character_coverage=1.0,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, num_threads=1, minloglevel=2)
        models[name] = spm.SentencePieceProcessor(model_proto=proto.getvalue())
    for name, path in [("tok512", STORIES / "tok512.model"), ("llama2", DATA / "llama2" / "tokenizer.model")]:
        if path.is_file():
            models[name] = spm.SentencePieceProcessor(model_file=str(path))
    for name, model in models.items():
        export_sentencepiece(model, out / f"{name}.bin")
    return {name: (model, out / f"{name}.bin") for name, model in models.items()}


def harness_ids(builds, tokenizer, texts):
    stdin = b"".join(b"e" + struct.pack("<I", len(t)) + t for t in texts)
    lines = run_ok(builds.checked, "harness", tokenizer, stdin=stdin).splitlines()
    return [list(map(int, line.split())) for line in lines]


# ---------------------------------------------------------------------------------------------------------
# Logits

def logits_of(binary, path, tokenizer, text="hello KIM"):
    ids = list(map(int, run_ok(binary, path, "-z", tokenizer, "-i", text, "--tokens").split()))
    out = run_ok(binary, path, "-z", tokenizer, "-i", text, "--logits")
    return ids, np.array([list(map(float, line.split())) for line in out.splitlines()])


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "tok300.bin"
    path.write_bytes(tokenizer_of(300))
    return path


@pytest.mark.parametrize("version,shape", [
    (0, Shape()),
    (0, Shape(tied=False)),
    (0, Shape(dim=36, n_heads=2, n_kv_heads=1, hidden_dim=50)),  # head size 18, ragged sums
    (0, Shape(dim=64, n_heads=8, n_kv_heads=8, hidden_dim=33, n_layers=1)),
    (1, Shape()),
    (1, Shape(tied=False, n_kv_heads=4)),
    (1, Shape(rope_theta=500.0, norm_eps=0.25, n_kv_heads=1)),
])
def test_logits_fp32(builds, tmp_path, tokenizer, version, shape):
    w = random_weights(shape)
    path = tmp_path / "model.bin"
    path.write_bytes(model_bytes(shape, w, version))
    ids, logits = logits_of(builds.checked, path, tokenizer)
    assert len(ids) > 8 and ids[0] == BOS
    np.testing.assert_allclose(logits, reference_logits(shape, w, ids), atol=1e-4, rtol=0)
    assert np.array_equal(logits_of(builds.fast, path, tokenizer)[1], logits)  # bit for bit in both builds


@pytest.mark.parametrize("group,shape", [
    (16, Shape()),
    (16, Shape(tied=False, n_kv_heads=1)),
    (2, Shape(dim=6, n_heads=1, n_kv_heads=1, hidden_dim=2, vocab_size=301)),  # scales that lie unaligned
    (32, Shape(dim=64, hidden_dim=96, rope_theta=300.0, norm_eps=0.1)),
])
def test_logits_int8(builds, tmp_path, group, shape):
    w = random_weights(shape, seed=2)  # no last bit of theirs rounds a half float, then an int8, differently
    path, tokenizer = tmp_path / "model.bin", tmp_path / "tok.bin"
    path.write_bytes(model_bytes(shape, w, 2, group))
    tokenizer.write_bytes(tokenizer_of(shape.vocab_size))
    ids, logits = logits_of(builds.checked, path, tokenizer)
    expected = reference_logits(shape, w, ids, group)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    assert np.abs(expected - reference_logits(shape, w, ids)).max() > 1e-3  # it is not the fp32 model


@pytest.mark.parametrize("shape", [
    Shape(dim=64, hidden_dim=96),
    Shape(dim=48, hidden_dim=80, vocab_size=301, tied=False),  # the last groups and bands are not full
    Shape(dim=36, n_heads=2, n_kv_heads=1, hidden_dim=2, n_layers=1),
])
def test_logits_4_bit(builds, tmp_path, shape):
    w = random_weights(shape)
    path, tokenizer = tmp_path / "model.bin", tmp_path / "tok.bin"
    path.write_bytes(model_bytes(shape, w, 3, 32))
    tokenizer.write_bytes(tokenizer_of(shape.vocab_size))
    ids, logits = logits_of(builds.checked, path, tokenizer)
    expected = reference_logits(shape, w, ids, 32, bits=4)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    assert np.abs(expected - reference_logits(shape, w, ids)).max() > 1e-2  # it is not the fp32 model


def kernels_of(binary):
    name, *kernels = run_ok(binary, "--version").decode().strip().split("kernels: ")
    return kernels[0].split()


@pytest.mark.parametrize("version,group", [(0, 0), (1, 0), (2, 16), (2, 5), (2, 64), (3, 32)])
def test_every_instruction_set_and_thread_count(builds, tmp_path, tokenizer, version, group):
    """All kernels agree, with a long prompt and without; the number of threads and of stories at once changes
    no bit."""
    width = 320 if group in (5, 64) else 96
    s = Shape(dim=width, hidden_dim=width + (group or 16), n_layers=1, n_heads=4, seq_len=300)
    s.hidden_dim -= s.hidden_dim % (group or 1)
    w = random_weights(s)
    path = tmp_path / "model.bin"
    text = "The quick brown fox jumps over the lazy dog. " * 4  # more tokens than are fed at once
    path.write_bytes(model_bytes(s, w, version, group))
    args = path, "-z", tokenizer, "-i", text, "--logits"
    expected = None
    for kernels in kernels_of(builds.fast):
        out = run_ok(builds.fast, *args, "--kernels", kernels, "-j", 1)
        for threads in (2, 3, 5):
            assert run_ok(builds.fast, *args, "--kernels", kernels, "-j", threads) == out
        logits = np.array([list(map(float, line.split())) for line in out.splitlines()])
        expected = logits if expected is None else expected
        # with int8 activations a difference in the last bit may round one of them to its neighbour
        np.testing.assert_allclose(logits, expected, atol=0.3 if group else 3e-5, rtol=0)
        assert np.abs(logits - expected).mean() < 0.03
    assert len(expected) > 128
    story = path, "-z", tokenizer, "-i", "hi", "-n", 30
    for kernels in kernels_of(builds.checked):
        choice = "--kernels", kernels
        alone = [run_ok(builds.checked, *story, *choice, "-s", seed, "-j", 1) for seed in range(1, 5)]
        for threads in (1, 2):
            together = run_ok(builds.checked, *story, *choice, "-s", 1, "-b", 4, "-j", threads)
            assert together == b"".join(alone)


def test_half_floats(builds):
    """Keys and values beside rounded weights: rounded as numpy rounds, the largest for what is larger."""
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 2**32, 20000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    scale = 10.0 ** rng.uniform(-9, 5, 20000)
    every = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (every[:0x7BFF].astype(np.float64) + every[1:0x7C00]) / 2
    near = np.nextafter(ties.astype(np.float32), np.float32(rng.choice([-9e9, 9e9], len(ties))))
    x = [rng.normal(size=20000) * scale, ties, -ties, [7.0]]
    x = np.concatenate([anything, every, near, *(np.asarray(part).astype(np.float32) for part in x)])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = np.where(np.isnan(x), x, np.clip(x, -65504, 65504)).astype(np.float16)
    assert len(x) % 16  # the last vector is not full
    stdin = b"h" + struct.pack("<I", 4 * len(x)) + x.tobytes()
    [line] = run_ok(builds.checked, "harness", stdin=stdin).splitlines()
    halves = np.array(line.split(), np.uint16).view(np.float16).reshape(-1, len(x))
    assert len(halves) == len(kernels_of(builds.checked))
    for ours in halves:
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(x))
        real = ~np.isnan(x)
        np.testing.assert_array_equal(ours[real], expected[real])


def test_int8_of_minus_128(builds, tmp_path, tokenizer):
    """export.py writes none, but a file may hold it: it has no opposite, and all kernels agree on it."""
    s = Shape()
    data = bytearray(model_bytes(s, random_weights(s), 2, 16))
    wq = 256 + 4 * s.dim * (2 * s.n_layers + 1) + s.vocab_size * (s.dim + 4 * s.dim // 16)
    data[wq:wq + s.dim * s.dim:2] = b"\x80" * (s.dim * s.dim // 2)
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    args = path, "-z", tokenizer, "-i", "a dog", "--logits", "--kernels"
    logits = {k: np.array(run_ok(builds.checked, *args, k).split(), float)
              for k in kernels_of(builds.checked)}
    for kernels in logits:
        np.testing.assert_allclose(logits[kernels], logits["plain"], atol=0.05, rtol=0)


def test_what_make_builds_tells_the_same(builds, tmp_path, tokenizer):
    """-O3, and the Makefile's flags."""
    made = ROOT / "run"
    if not made.exists() or made.stat().st_mtime < (ROOT / "run.c").stat().st_mtime:
        pytest.skip("make run has not been called")
    for version in (0, 2, 3):
        s = Shape(dim=64, hidden_dim=96, seq_len=128)
        path = tmp_path / "model.bin"
        path.write_bytes(model_bytes(s, random_weights(s), version, 32))
        args = path, "-z", tokenizer, "-i", "The quick brown fox jumps over the lazy dog. " * 2, "--logits"
        for kernels in kernels_of(made):
            a, b = (run_ok(binary, *args, "--kernels", kernels) for binary in (made, builds.checked))
            assert a == b and len(a) > 1000


@pytest.mark.parametrize("text", ["a dog", "The quick brown fox jumps over the lazy dog. " * 2])
@pytest.mark.parametrize("binary", ["checked", "in_place"])
def test_ragged_rows_and_columns(builds, tmp_path, binary, text):
    """Neither rows nor columns fill whole vectors; of large fp32 models, the file's own weights are read."""
    s = Shape(dim=132, hidden_dim=50, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=1701, seq_len=128)
    w = random_weights(s)
    path, tokenizer = tmp_path / "model.bin", tmp_path / "tok.bin"
    path.write_bytes(model_bytes(s, w))
    tokenizer.write_bytes(tokenizer_of(s.vocab_size))
    binary = getattr(builds, binary)
    ids = list(map(int, run_ok(binary, path, "-z", tokenizer, "-i", text, "--tokens").split()))
    assert len(ids) < 10 or len(ids) > 64  # MANY: the file's own weights are put in order
    expected = reference_logits(s, w, ids)
    args = path, "-z", tokenizer, "-i", text, "--logits"
    for kernels in kernels_of(binary):
        for threads in (1, 3):
            out = run_ok(binary, *args, "--kernels", kernels, "-j", threads)
            logits = np.array([list(map(float, line.split())) for line in out.splitlines()])
            np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


def test_many_stories_of_a_large_model(builds, tmp_path, tokenizer):
    """More stories than are told at once: each is what it would be alone."""
    s = Shape(dim=48, n_layers=1)
    path = tmp_path / "model.bin"
    path.write_bytes(model_bytes(s, random_weights(s)))
    args = builds.in_place, path, "-z", tokenizer, "-n", 20, "-p", 1, "-j", 1
    alone = [run_ok(*args, "-s", seed) for seed in range(1, 101)]
    assert run_ok(*args, "-s", 1, "-b", 100) == b"".join(alone)


def told(binary, *args):
    """What is told, and of the tokens guessed ahead, how many there were and how many were right."""
    r = run(binary, *args, "--stats")
    assert r.returncode == 0, r.stderr
    stats = json.loads(r.stderr.splitlines()[-1])
    return r.stdout, stats["drafted_tokens"], stats["accepted_tokens"]


@pytest.mark.parametrize("binary,version", [("checked", 0), ("in_place", 1)])
def test_guessing_ahead_changes_nothing(builds, tmp_path, tokenizer, binary, version):
    """However far the draft guesses, and on however many threads, the story is the one told without."""
    s = Shape(dim=132, hidden_dim=50, n_layers=2, n_heads=2, n_kv_heads=1, seq_len=90)
    path, binary = tmp_path / "model.bin", getattr(builds, binary)
    path.write_bytes(model_bytes(s, random_weights(s, scale=2.0), version))
    args = path, "-z", tokenizer, "-n", 0, "-i", "a dog"
    guessed = rights = 0
    for kernels in kernels_of(binary):
        for i, how in enumerate([["-t", 0], ["-t", 0.7], ["-k", 9, "-p", 1], ["-t", 2, "-p", 0.99]]):
            story = *args, *how, "-s", i + 3, "--kernels", kernels
            alone, n, _ = told(binary, *story, "--draft", 0)
            assert n == 0
            for most, threads in [(2, 2), (5, 1), (15, 3)]:
                text, n, right = told(binary, *story, "--draft", most, "-j", threads)
                assert text == alone
                guessed, rights = guessed + n, rights + right
    assert 0 < rights < guessed


def test_guessing_ahead_stops_in_time(builds, tmp_path, tokenizer):
    """At the end token, and where the context is full; weights that are not fp32 have no draft."""
    s = Shape()
    endless, ends = tmp_path / "endless.bin", [259, 260, 261, 262, EOS]
    markov_model(endless, {259 + i: 259 + (i + 1) % 5 for i in range(5)})
    model = markov_model(tmp_path / "ends.bin", chain(ends))
    for path, steps in [(model, 64), (endless, 0), (endless, 9), (endless, 4)]:
        args = builds.checked, path, "-z", tokenizer, "-t", 0, "-i", " ", "-n", steps
        assert told(*args, "--draft", 15)[0] == told(*args, "--draft", 0)[0]
    assert told(builds.checked, endless, "-z", tokenizer, "-t", 0, "-i", " ", "--draft", 15)[1] > 0
    for version, group in [(2, 16), (3, 32)]:
        path = tmp_path / f"v{version}.bin"
        path.write_bytes(model_bytes(s, random_weights(s), version, group))
        assert told(builds.checked, path, "-z", tokenizer, "-n", 60, "--draft", 9)[1] == 0


@needs_stories
def test_guesses_of_stories260k(builds):
    """The int8 copy nearly always agrees with the weights it was made of."""
    args = builds.fast, STORIES / "stories260K.bin", "-z", STORIES / "tok512.bin", "-t", 0, "-n", 0
    alone, n, _ = told(*args)
    text, n, right = told(*args, "--draft", 4)
    assert text == alone and n >= 4 and right > 0.5 * n


def test_int8_with_empty_groups(builds, tmp_path, tokenizer):
    """Groups of zeros, or too small to have a scale, divide nothing by zero."""
    s = Shape()
    path = tmp_path / "model.bin"
    for value in (0, 1e-38, 1e-43):
        w = {k: v * np.float32(value) if k in ("wv", "w1") else v for k, v in random_weights(s).items()}
        path.write_bytes(model_bytes(s, w, 2, 16))
        ids, logits = logits_of(builds.checked, path, tokenizer)
        w = {k: v * np.float32(0) if k in ("wv", "w1") else v for k, v in w.items()}
        np.testing.assert_allclose(logits, reference_logits(s, w, ids, 16), atol=1e-4, rtol=0)


@needs_stories
def test_logits_of_stories260k(builds):
    raw = (STORIES / "stories260K.bin").read_bytes()
    s = Shape(*struct.unpack("<7i", raw[:28]))
    w = random_weights(s)
    at = 28
    for name in V0_ORDER:
        w[name] = np.frombuffer(raw, np.float32, w[name].size, at).reshape(w[name].shape)
        at += w[name].nbytes
    w["cls"] = w["emb"]
    args = STORIES / "stories260K.bin", STORIES / "tok512.bin"
    ids, logits = logits_of(builds.fast, *args, "Lily saw 2 birds")
    np.testing.assert_allclose(logits, reference_logits(s, w, ids), atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------------------------
# Text

LILY = ("Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One "
        "day, she saw a big, red ball. She wanted to play with it, but it was too high.\n")
SEEDED = {  # what llama2.c's run says
    1: 'Once upon a time, there was a little boy named Tim. Tim loved to show his f'
       "riends her a big, shiny blue bug. One day, Tim's mom was making his favorit",
    4242: 'One day, a modest boy named Tim went to the park. He saw a big, soft pile o'
       'f pile. He did not want to share his pie. Sue said, "Yes, you can do it."\nT',
}


@needs_stories
def test_greedy_story(builds):
    args = [STORIES / "stories260K.bin", "-z", STORIES / "tok512.bin", "-t", 0]
    r = run(builds.fast, *args, "-n", 0)
    story = r.stdout.decode()
    assert story.startswith(LILY)
    assert story.endswith('"Thank you, Lily! You are a good friend."\n')  # ends by itself, below 512 tokens
    assert r.stderr.startswith(b"achieved tok/s: ") and r.stderr.count(b"\n") == 1
    assert story.startswith(run_ok(builds.checked, *args).decode()[:-1])  # 256 steps, a shorter cache
    assert run_ok(builds.fast, *args, "-n", 0, "-i", LILY[:40]).decode() == story


@needs_stories
@pytest.mark.parametrize("seed", SEEDED)
def test_seeded_story_equals_llama2c(builds, seed):
    out = run_ok(builds.fast, STORIES / "stories260K.bin", "-z", STORIES / "tok512.bin", "-s", seed, "-n", 0)
    assert out.decode().startswith(SEEDED[seed])


@needs_stories
def test_seeded_story_on_every_instruction_set(builds):
    args = [builds.fast, STORIES / "stories260K.bin", "-z", STORIES / "tok512.bin", "-n", 0]
    for extra in (["-t", 0], ["-s", 1], ["-s", 4242], ["-s", 7, "-t", 0.7, "-p", 0.5], ["-s", 9, "-p", 1]):
        ways = [("--kernels", kernels, "-j", j) for kernels in kernels_of(builds.fast) for j in (1, 2)]
        assert len({run_ok(*args, *extra, *way) for way in ways}) == 1, extra


def test_prompt_from_a_file(builds, tmp_path, tokenizer):
    model = markov_model(tmp_path / "m.bin", {})
    prompt = tmp_path / "prompt.txt"
    prompt.write_bytes(b"ab\nc\n")
    ids = run_ok(builds.checked, model, "-z", tokenizer, "-f", prompt, "--tokens")
    assert ids == run_ok(builds.checked, model, "-z", tokenizer, "-i", "ab\nc", "--tokens")
    assert run_ok(builds.checked, model, "-z", tokenizer, "--file=-", "--tokens", stdin=b"ab\nc\n") == ids
    prompt.write_bytes(b"\xef\xbb\xbfab\r\nc\r\n")  # as Windows writes it
    assert run_ok(builds.checked, model, "-z", tokenizer, "-f", prompt, "--tokens") == ids
    piped = run_ok(builds.checked, model, "-z", tokenizer, "-i", "-", "--tokens", stdin=prompt.read_bytes())
    assert piped == ids
    assert_error(run(builds.checked, model, "-z", tokenizer, "-f", "no/such.txt"), "no/such.txt")
    assert_error(run(builds.checked, model, "-z", tokenizer, "-f", prompt, "-i", "a"), "-f", "-i")


def test_stats(builds, tmp_path, tokenizer):
    model = markov_model(tmp_path / "m.bin", {259: 260, 260: 261, 261: EOS})
    for extra, stories, decoded in [([], 1, 2), (["-b", 3], 3, 6)]:
        r = run(builds.checked, model, "-z", tokenizer, "-t", 0, "-i", " ", "--stats", "-j", 2, *extra)
        stats = json.loads(r.stderr.splitlines()[-1])
        assert (stats["stories"], stats["decoded_tokens"], stats["threads"]) == (stories, decoded, 2)
        assert stats["prompt_tokens"] == 3 and stats["kernels"] == kernels_of(builds.checked)[0]
        assert stats["first_token_seconds"] > 0 and stats["memory_bytes"] > 1e5
    assert b"(9 tokens in 3 stories)" in r.stderr  # the first and the last of each, too


def test_perplexity(builds, tmp_path, tokenizer):
    s = Shape()
    w = random_weights(s)
    model, file = tmp_path / "m.bin", tmp_path / "stories.txt"
    model.write_bytes(model_bytes(s, w))
    stories = ["hello KIM", "a", "the dog and the cat and the mouse and the " + "x" * 60]
    file.write_text(" \n" + "\n<|endoftext|>\n".join(stories) + " <|endoftext|>\n<|endoftext|>")
    nats = []
    for story in stories:
        ids = list(map(int, run_ok(builds.checked, model, "-z", tokenizer, "-i", story, "--tokens").split()))
        for at in range(0, len(ids), s.seq_len):
            part = ids[at : at + s.seq_len]
            logits = reference_logits(s, w, part)
            top = logits.max(axis=1, keepdims=True)
            log_p = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
            targets = (ids + [BOS])[at + 1 : at + 1 + len(part)]
            nats += list(-log_p[np.arange(len(part)), targets])
    out = run_ok(builds.checked, model, "-z", tokenizer, "--perplexity", file).decode()
    assert f"({len(nats)} tokens, {sum(map(len, stories))} bytes, 3 stories)" in out
    mean = float(out.split(":")[1].split()[0])
    assert abs(mean - np.mean(nats)) < 1e-5
    assert abs(float(out.split()[1][:-1]) / np.exp(mean) - 1) < 1e-4
    args = builds.checked, model, "-z", tokenizer
    assert run_ok(*args, "--perplexity=-", stdin=file.read_bytes()).decode() == out
    windows = b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n")
    assert run_ok(*args, "--perplexity=-", stdin=windows).decode() == out
    file.write_text("<|endoftext|> \n")
    assert_error(run(*args, "--perplexity", file), file, "no text")


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and limits of memory")


@pytest.fixture(params=[1, 8])
def large_model(tmp_path, request):
    """Beyond what a cache holds, so that it is read where it is mapped: of zeros, with all tokens alike."""
    s = Shape(dim=512, hidden_dim=3000, n_layers=2, n_heads=8, n_kv_heads=request.param, seq_len=20000)
    layer = 2 * s.dim + 3 * s.dim * s.hidden_dim + 2 * s.dim * (s.dim + s.dim // s.n_heads * s.n_kv_heads)
    weights = s.vocab_size * s.dim + s.dim + s.n_layers * layer
    path = tmp_path / "large.bin"
    path.write_bytes(s.ints())
    os.truncate(path, 28 + 4 * (weights + s.seq_len * s.dim // s.n_heads))
    assert path.stat().st_size > 40e6
    return path


def limited(size, *args, **how):
    """run, but with no more than so many bytes of memory."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size))  # noqa: E731
    return subprocess.run([str(a) for a in args], capture_output=True, env=ENV, timeout=60, check=False,
                          preexec_fn=limit, **how)


@needs_linux
def test_memory_for_a_story_is_memory_enough(builds, large_model, tokenizer):
    """Where there is none for a draft too, none is made. Both want the same for anything else."""
    args = builds.fast, large_model, "-z", tokenizer, "-j", 1, "-t", 0, "-n", 600
    size, ends = large_model.stat().st_size, set()
    for room in range(4, 80, 12):
        r, plain = (limited(size + room * 1000000, *args, *more) for more in ([], ["--draft", 0]))
        assert (r.returncode, r.stdout) == (plain.returncode, plain.stdout), r.stderr
        ends.add(r.returncode)
    assert ends == {0, 1}


@needs_linux
def test_memory_for_two_stories_is_enough_for_many(builds, tmp_path, tokenizer):
    """As many are told at once as there is room for. The stories are short, and the room for each large."""
    model = markov_model(tmp_path / "m.bin", chain([BOS, 260, 261, EOS]), seq_len=16000)  # 19.2 MB each
    args = builds.fast, model, "-z", tokenizer, "-j", 1, "-t", 0, "-n", 0
    size, told = model.stat().st_size, set()
    for room in range(4, 60, 4):
        one, many = (limited(size + (room + more) * 1000000, *args, "-b", n) for more, n in [(0, 1), (22, 8)])
        assert one.returncode == 1 or (many.returncode, many.stdout) == (0, 8 * one.stdout), many.stderr
        told.add(one.returncode)
    assert told == {0, 1}


@needs_linux
def test_limits_of_a_container(builds, large_model, tokenizer, tmp_path):
    def measured(cpu, memory):
        (tmp_path / "cpu.max").write_text(cpu)
        (tmp_path / "memory.max").write_text(memory)
        r = run(builds.in_place, large_model, "-z", tokenizer, "-t", 0, "-n", 40, "--stats", cwd=tmp_path)
        stats = json.loads(r.stderr.splitlines()[-1])
        return stats["threads"], stats["drafted_tokens"] > 0

    cores, _ = measured("max 100000\n", "max\n")
    assert measured("900000000 100000\n", "900000000000\n") == (cores, True)
    assert measured("250000 100000\n", "max\n") == (min(cores, 2), True)
    assert measured("190000 100000\n", "30000000\n") == (1, False)


@needs_linux
def test_threads_that_cannot_start_are_done_without(builds, tmp_path, tokenizer):
    args = builds.fast, markov_model(tmp_path / "m.bin", chain([260, 261, EOS])), "-z", tokenizer, "-t", 0
    expected, codes = run_ok(*args), set()
    for room in range(4, 40, 2):  # a thread's stack takes 8 MB
        r, many = (limited(room * 1000000, *args, *more) for more in ([], ["-j", 9]))
        codes.add((many.returncode, r.stdout == expected))
        assert b"cannot start" not in r.stderr
    assert (1, True) in codes


@needs_linux
def test_many_stories_in_little_memory(builds, tmp_path, tokenizer):
    """As many at once as there is room for; and those that end at once leave nothing behind."""
    args = builds.fast, markov_model(tmp_path / "m.bin", chain([260, 260])), "-z", tokenizer, "-t", 0, "-j", 1
    r = limited(40_000_000, *args, "-b", 400, "-n", 60)
    assert r.returncode == 0 and r.stdout.count(b"\n") == 400, r.stderr
    few, many = (run(*args, "-b", n, "-n", 1, "--stats").stderr.splitlines()[-1] for n in (2, 4000))
    assert json.loads(many)["memory_bytes"] < json.loads(few)["memory_bytes"] + 4e6


@needs_linux
def test_many_threads_in_little_memory(builds, tmp_path):
    """What only some of them sample with is not touched for all: 512 KB each, of 32,000 tokens."""
    s = Shape(dim=4, hidden_dim=4, n_layers=1, n_heads=1, n_kv_heads=1, vocab_size=32000)
    model, tokenizer = tmp_path / "m.bin", tmp_path / "tok.bin"
    model.write_bytes(model_bytes(s, random_weights(s)))
    tokenizer.write_bytes(tokenizer_of(s.vocab_size))
    args = builds.fast, model, "-z", tokenizer, "-n", 3, "--stats", "-j"
    few, many = (json.loads(run(*args, n).stderr.splitlines()[-1])["memory_bytes"] for n in (1, 65))
    assert many < few + 16e6


@needs_linux
def test_a_file_cut_short_while_it_is_read(builds, large_model, tokenizer):
    command = [str(a) for a in (builds.fast, large_model, "-z", tokenizer, "-j", 1, "-i", "-")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=ENV) as process:
        mapped, status = (Path(f"/proc/{process.pid}/{name}") for name in ("maps", "status"))
        while str(large_model) not in mapped.read_text() or "(sleeping)" not in status.read_text():
            time.sleep(0.01)  # until it waits for its prompt
        os.truncate(large_model, 8192)
        out, error = process.communicate(b"a", timeout=60)
    assert (process.returncode, out, error.count(b"\n")) == (1, b"", 1) and b"cut short" in error


def test_a_pipe_is_told_as_it_goes_on(builds, large_model, tokenizer):
    command = [str(a) for a in (builds.fast, large_model, "-z", tokenizer, "-t", 0, "-n", 0, "--draft", 0)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=ENV) as process:
        assert 0 < len(os.read(process.stdout.fileno(), 1 << 16)) < 4096  # of a buffer that is full
        process.kill()


def test_a_prompt_longer_than_the_story_is_told_of(builds, tmp_path, tokenizer):
    model = markov_model(tmp_path / "m.bin", {BOS: 260})
    for extra in ([], ["-b", 2]):
        r = run(builds.checked, model, "-z", tokenizer, "-i", "abcdefgh", "-n", 4, *extra)
        assert r.returncode == 0 and b"run: -n: the prompt is 10 tokens long, only its first 4" in r.stderr
    assert b"cut off" in run(builds.checked, model, "-z", tokenizer, "-i", "abcdefgh", "-n", 4).stderr


def test_the_seed_after_the_last_is_not_0(builds, tmp_path, tokenizer):
    """From which xorshift would draw nothing but 0."""
    model = tmp_path / "m.bin"
    model.write_bytes(model_bytes(Shape(), random_weights(Shape())))
    args = builds.checked, model, "-z", tokenizer, "-t", 1, "-p", 1, "-n", 12
    told = run_ok(*args, "-s", 2**64 - 1, "-b", 2)
    assert told == run_ok(*args, "-s", 2**64 - 1) + run_ok(*args, "-s", 1)


def markov_model(path, successors, vocab_size=300, seq_len=64):
    """A model whose most likely token after t is successors[t], else </s>. Embeddings are one-hot."""
    s = Shape(dim=vocab_size, hidden_dim=2, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=vocab_size,
              seq_len=seq_len, tied=False)
    w = {k: np.zeros_like(v) for k, v in random_weights(s).items()}
    w["emb"] = np.eye(vocab_size, dtype=np.float32)
    w["rms_final"][:] = 1
    for t in range(vocab_size):
        w["cls"][successors.get(t, EOS), t] = 1
    path.write_bytes(model_bytes(s, w))
    return path


def chain(ids):
    return dict(itertools.pairwise(ids))


def test_byte_tokens_come_out_whole(builds, tmp_path, tokenizer):
    text = "\u00e9\U0001f600".encode() + b"\x1b\x00\x7f\t"  # escape, NUL and delete stay inside
    model = markov_model(tmp_path / "m.bin", chain([BOS, *(3 + b for b in text), EOS]))
    assert run_ok(builds.checked, model, "-z", tokenizer, "-t", 0) == "\u00e9\U0001f600\t\n".encode()


def test_leading_space_and_end_tokens(builds, tmp_path, tokenizer):
    space, a = 259, 260
    model = markov_model(tmp_path / "m.bin", {BOS: space, space: a, a: EOS})
    assert run_ok(builds.checked, model, "-z", tokenizer, "-t", 0) == b"a\n"  # stripped after BOS only
    assert run_ok(builds.checked, model, "-z", tokenizer, "-t", 0, "-i", "a ") == b"a a\n"
    model = markov_model(tmp_path / "m.bin", {BOS: a, a: BOS})
    assert run_ok(builds.checked, model, "-z", tokenizer, "-t", 0) == b"a\n"
    model = markov_model(tmp_path / "m.bin", {BOS: a, a: a})
    assert run_ok(builds.checked, model, "-z", tokenizer, "-t", 0, "-n", 5) == b"aaaaa\n"
    assert run_ok(builds.checked, model, "-z", tokenizer, "-t", 0, "-n", 0) == b"a" * 64 + b"\n"
    assert run_ok(builds.checked, model, "-z", tokenizer, "-t", 0, "-n", 3, "-i", "bcdefgh") == b"bc\n"


def test_prompt_from_stdin_may_hold_anything(builds, tmp_path, tokenizer, sentencepieces):
    model = markov_model(tmp_path / "m.bin", {})
    sp, path = sentencepieces["bytes"]
    for text in [b"a\x00b", b"", b"\xff\xfe a", b"line\nline\n"]:
        out = run_ok(builds.checked, model, "-z", path, "--tokens", "-i", "-", stdin=text + b"\n")
        assert list(map(int, out.split())) == [BOS, *sp.encode(text)]


def test_wrong_tokenizer_is_a_warning(builds, tmp_path):
    model = markov_model(tmp_path / "m.bin", chain([BOS, 260, 299, 261, EOS]))
    small, large = tmp_path / "small.bin", tmp_path / "large.bin"
    small.write_bytes(tokenizer_of(290))
    large.write_bytes(tokenizer_of(512))
    for path, size in [(small, 290), (large, 512)]:
        r = run(builds.checked, model, "-z", path, "-t", 0, "-i", "a")
        assert r.returncode == 0 and r.stdout[:1] == b"a"
        for word in [str(path), str(size), "300", "-z data/tok300.bin"]:
            assert word in r.stderr.decode().splitlines()[0]
    r = run(builds.checked, model, "-z", small, "-t", 0)
    assert r.stdout == b"ab\n"  # 299 has no piece there: it prints nothing


def test_default_tokenizer(builds, tmp_path):
    model = markov_model(tmp_path / "m.bin", chain([BOS, 260, EOS]))
    assert_error(run(builds.checked, model, cwd=tmp_path), "tokenizer.bin", "-z", "python tokenizer.py")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tokenizer.bin").write_bytes(tokenizer_of(300))
    assert run_ok(builds.checked, model, "-t", 0, cwd=tmp_path) == b"a\n"
    (tmp_path / "tokenizer.bin").write_bytes(tokenizer_of(300).replace(b"\1\0\0\0a", b"\1\0\0\0Z"))
    assert run_ok(builds.checked, model, "-t", 0, cwd=tmp_path) == b"Z\n"


# ---------------------------------------------------------------------------------------------------------
# Tokens

def fuzzed_texts(n, seed=0):
    rng = random.Random(seed)
    parts = ["the", "Once upon a time", " ", "  ", "\t", "\n", "\u2581", "\u2581\u2581", "0", "2024",
             "\U0001f600", "\U0001f468\u200d\U0001f469", "\u00e9", "e\u0301", "\u4e2d\u6587", "<s>", "</s>",
             "<unk>", "<0x41>", "\n<s>\n", "\x00", "\x1b", "\x7f", "\ufeff", "\ufffd", "\uffff",
             "I'll", "ball."]
    broken = [b"\xff", b"\xc0\x80", b"\xe2\x96", b"\xed\xa0\x80", b"\xf0\x9f\x98", b"\xf4\x90\x80\x80",
              b"\x80", b"\xf8\x88\x80\x80\x80", b"\xe0\x80\x80", b"\xc3"]
    alphabet = [p.encode() for p in parts] + broken + [bytes([b]) for b in range(256)]
    texts = [b"", *alphabet]
    for _ in range(n):
        kind = rng.random()
        pool = alphabet[:28] if kind < 0.5 else alphabet if kind < 0.8 else [b"t", b"h", b"e", b" ", b"l"]
        texts.append(b"".join(rng.choices(pool, k=rng.randrange(1, 30))))
    return texts


def test_ids_equal_sentencepiece(builds, sentencepieces):
    texts = fuzzed_texts(1500)
    for name, (sp, path) in sentencepieces.items():
        for text, ids in zip(texts, harness_ids(builds, path, texts), strict=True):
            assert ids == [BOS, *sp.encode(text)], (name, text)


def children_seconds() -> float:
    """Of the CPU, so that other work on the machine does not count."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_long_prompts_take_no_time(builds, tmp_path, sentencepieces):
    sp, path = sentencepieces.get("llama2", sentencepieces["bytes"])
    model = markov_model(tmp_path / "m.bin", {})
    for text in [b" ".join(fuzzed_texts(9000, seed=1))[:100_000], b"a" * 100_000, b" " * 100_000]:
        start = children_seconds()
        out = run_ok(builds.fast, model, "-z", path, "--tokens", "-i", "-", stdin=text + b"\n")
        seconds = children_seconds() - start
        assert list(map(int, out.split())) == [BOS, *sp.encode(text)]
        assert seconds < 1, "tokenizing should take 50 ms, start-up included; quadratic code takes minutes"


def test_tokenizer_without_bytes(builds, tmp_path):
    """Unknown characters become <unk>, a run of them one <unk>."""
    path, model = tmp_path / "t.bin", markov_model(tmp_path / "m.bin", {}, vocab_size=8)
    path.write_bytes(tokenizer_bytes([*SPECIAL, b" ", b"a", b"b"]))
    out = run_ok(builds.checked, model, "-z", path, "--tokens", "-i", "a\u00e9\U0001f600\u00e9b\u00ff")
    assert out == b"1 3 4 0 5 0\n"
    assert run(builds.checked, model, "-z", path, "-i", "\u00e9").returncode == 0


def test_special_pieces_do_not_match_text(builds, tmp_path):
    """Though all that is needed to merge up to them is in the vocabulary."""
    text = [b"<", b"s", b">", b"\n", b"<s", b"<s>", b"\n<s", b">\n", b"0", b"x", b"4", b"1", b"<0",
            b"x4", b"<0x4", b"1>", b"u", b"n", b"k", b"un", b"k>", b"<un", b" "]
    pieces = [*SPECIAL, *BYTES, *text]
    path = tmp_path / "t.bin"
    path.write_bytes(tokenizer_bytes(pieces, [0.0] * 259 + [-10.0 + len(p) for p in text]))
    prompts = [b"<s>", b"\n<s>\n", b"<0x41>", b"<unk>"]
    expected = [[b"<s>"], [b"\n<s", b">\n"], [b"<0x4", b"1>"], [b"<un", b"k>"]]
    for ids, words in zip(harness_ids(builds, path, prompts), expected, strict=True):
        assert [pieces[i] for i in ids] == [b"\n<s>\n", b" ", *words]


@pytest.mark.parametrize("longest", [0, -1, INT_MAX, INT_MIN])
def test_max_token_length_is_not_trusted(builds, tmp_path, longest):
    path, model = tmp_path / "t.bin", markov_model(tmp_path / "m.bin", {})
    pieces = [*SPECIAL, *BYTES, b" ", b"a", b"aa", b"aaaa"]
    path.write_bytes(tokenizer_bytes(pieces, longest=longest))
    out = run_ok(builds.checked, model, "-z", path, "--tokens", "-i", "aaaaaaa")
    assert out == b"1 259 262 261 260\n"


# ---------------------------------------------------------------------------------------------------------
# Sampling

class XorShift:
    def __init__(self, seed):
        self.state = seed

    def uniform(self):
        x = self.state
        x ^= x >> 12
        x = (x ^ x << 25) & (2**64 - 1)
        x ^= x >> 27
        self.state = x
        return np.float32(((x * 0x2545F4914F6CDD1D & (2**64 - 1)) >> 32 >> 8) / 2**24)


def reference_sample(logits, temperature, topp, rng, expf):
    if temperature == 0:
        return int(np.argmax(logits))
    x = (logits / np.float32(temperature)).astype(np.float32)
    p = np.array([expf(float(v)) for v in x - x.max()], np.float32)
    p = p / np.cumsum(p, dtype=np.float32)[-1]
    coin = rng.uniform()
    order = np.arange(len(p))
    if 0 < topp < 1:
        topp = np.float32(topp)
        order = order[p >= (np.float32(1) - topp) / np.float32(len(p) - 1)]
        order = order[np.lexsort((order, -p[order]))]
        if len(order) == 0:
            return int(np.argmax(p))
        above = np.cumsum(p[order], dtype=np.float32) > topp
        order = order[: int(np.argmax(above)) + 1] if above.any() else order
        coin = coin * np.cumsum(p[order], dtype=np.float32)[-1]
    below = coin < np.cumsum(p[order], dtype=np.float32)
    return int(order[int(np.argmax(below))] if below.any() else order[-1])


def test_sampler_equals_python(builds):
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    libm.expf.restype, libm.expf.argtypes = ctypes.c_float, [ctypes.c_float]
    rng = np.random.default_rng(0)
    kinds = {"peaked": 4 * rng.standard_normal(200), "flat": np.zeros(200),
             "many": rng.standard_normal(3000).round(2), "ties": np.repeat([1.0, 3.0, 2.0], 30),
             "two": np.array([0.5, 0.25]), "one": np.array([1.0])}
    cases = [(logits.astype(np.float32), temperature, topp, seed)
             for logits in kinds.values() for temperature in (0, 0.5, 1, 1.7)
             for topp in (0, 0.001, 0.1, 0.5, 0.9, 0.999, 1) for seed in (1, 2**63 + 12345)]
    cases = [c for c in cases if len(c[0]) > 1 or not 0 < c[2] < 1]  # the reference divides by n - 1
    stdin = b""
    for logits, temperature, topp, seed in cases:
        body = struct.pack("<ffQI", temperature, topp, seed, 20) + logits.tobytes()
        stdin += b"s" + struct.pack("<I", len(body)) + body
    lines = run_ok(builds.checked, "harness", stdin=stdin).splitlines()
    for (logits, temperature, topp, seed), line in zip(cases, lines, strict=True):
        coins = XorShift(seed)
        expected = [reference_sample(logits, temperature, topp, coins, libm.expf) for _ in range(20)]
        assert list(map(int, line.split())) == expected, (len(logits), temperature, topp, seed)


def test_top_k(builds, tmp_path, tokenizer):
    """-k 1 is greedy; with larger k, only the k likeliest tokens appear, in their proportions."""
    s = Shape(dim=300, hidden_dim=2, n_layers=1, n_heads=2, n_kv_heads=1, tied=False)
    w = {k: np.zeros_like(v) for k, v in random_weights(s).items()}
    w["emb"], w["rms_final"] = np.eye(300, dtype=np.float32), np.ones(300, np.float32)
    odds = {b"a": 5.0, b"b": 3.0, b"c": 2.0, b"d": 1.9}
    for letter, p in odds.items():
        w["cls"][259 + LETTERS.index(letter), BOS] = np.log(9 * p) / np.sqrt(300)
    model = tmp_path / "m.bin"
    model.write_bytes(model_bytes(s, w))
    args = builds.fast, model, "-z", tokenizer, "-n", 1, "-b", 3000, "-s", 1
    assert set(run_ok(*args, "-k", 1).splitlines()) == {b"a"}
    for extra in (["-p", 1], ["-p", 0.9999]):
        lines = run_ok(*args, "-k", 3, *extra).splitlines()
        assert set(lines) == {b"a", b"b", b"c"}
        for letter in b"a", b"b", b"c":
            assert abs(lines.count(letter) / 3000 - odds[letter] / 10) < 4 * np.sqrt(0.25 / 3000)
    assert b"d" in run_ok(*args, "-k", 4, "-p", 1).splitlines()


def test_seed_is_64_bits(builds, tmp_path, tokenizer):
    s = Shape()
    model = tmp_path / "m.bin"
    model.write_bytes(model_bytes(s, random_weights(s)))
    texts = {seed: run_ok(builds.checked, model, "-z", tokenizer, "-s", seed, "--top-p=1")
             for seed in (1, 2**32, 2**32 + 1, 2**64 - 1)}
    assert len(set(texts.values())) == 4
    assert texts[1] == run_ok(builds.checked, model, "-z", tokenizer, "--seed=1", "--top-p", "1")


@pytest.mark.parametrize("args", [["-t", "1e-45"], ["-t", "1e-38"], ["-t", "3e38"], ["-t", "1e-50"],
                                  ["-p", "1e-45"], ["-p", "0"], ["-p", "1"], ["-p", "0.99999997"]])
def test_extreme_sampling_values(builds, tmp_path, tokenizer, args):
    s = Shape()
    model = tmp_path / "m.bin"
    model.write_bytes(model_bytes(s, random_weights(s)))
    out = run_ok(builds.checked, model, "-z", tokenizer, "-s", 1, *args)
    if args in (["-t", "1e-45"], ["-t", "1e-50"]):
        assert out == run_ok(builds.checked, model, "-z", tokenizer, "-t", 0)


# ---------------------------------------------------------------------------------------------------------
# Robustness: one clear line, exit code 1, nothing on stdout; on the sanitizer build

FIELDS = ["dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len"]


def poke(data, offset, fmt, value):
    packed = struct.pack(fmt, value)
    return data[:offset] + packed + data[offset + len(packed):]


def broken_models():
    """{name: (bytes, words that the error must have)}"""
    s = Shape()
    w = random_weights(s)
    v0, v1, v2 = model_bytes(s, w), model_bytes(s, w, 1), model_bytes(s, w, 2, 16)
    cases = {"empty": (b"", ["empty"])}
    for name, data, header in [("v0", v0, 28), ("v1", v1, 256), ("v2", v2, 256)]:
        size = len(data)
        for n in [1, 4, 27, header - 1, header, header + 1, 100, size // 2, size - 4, size - 1]:
            cases[f"{name} cut to {n}"] = (data[:n], [])
        cases[f"{name} cut in half"] = (data[:len(data) // 2], ["truncated", len(data)])
        for n in [1, 4, 4096]:
            cases[f"{name} with {n} more"] = (data + b"\0" * n, ["damaged", "only", len(data)])
        first = 0 if name == "v0" else 8
        for i, field in enumerate(FIELDS):
            for value in [0, -1, 1, 7, 65536, 2**24, INT_MAX, INT_MIN]:
                if field == "seq_len" and name != "v0" and value in (1, 7, 65536, 2**24):
                    continue  # a fine context length: nothing in these files depends on it
                cases[f"{name} {field}={value}"] = (poke(data, first + 4 * i, "<i", value), [])
    cases["zero dim is named"] = (poke(v1, 8, "<i", 0), ["dim", "0"])
    cases["all ones"] = (b"\xff" * 4096, ["dim"])
    cases["all zero"] = (b"\0" * 4096, ["dim"])
    cases["sizes that overflow 64 bits"] = (
        struct.pack("<Ii7iBi", 0x616B3432, 2, 2**24, 2**24, 2**14, 2**20, 2**20, 2**24, 2**24, 0, 2**16)
        .ljust(4096, b"\0"), ["larger than memory"])
    for name, change, words in [("kv heads above heads", {"n_kv_heads": 8}, ["key/value"]),
                                ("kv heads do not divide", {"n_kv_heads": 3}, ["key/value"]),
                                ("heads do not divide", {"n_heads": 3, "n_kv_heads": 3}, ["divide"]),
                                ("odd head size", {"n_heads": 32, "n_kv_heads": 32}, ["odd"])]:
        cases[name] = (dataclasses.replace(s, **change).ints() + v0[28:], words)
    for name, group in [("0", 0), ("-4", -4), ("3", 3), ("32, not a divisor of 48", 32), ("huge", INT_MAX)]:
        cases[f"int8 group {name}"] = (poke(v2, 37, "<i", group), ["group", group])
    for name, value in [("nan", np.nan), ("inf", np.inf), ("negative", -1.0)]:
        cases[f"rope_theta {name}"] = (poke(v1, 48, "<f", value), ["rope_theta"])
        cases[f"norm_eps {name}"] = (poke(v2, 52, "<f", value), ["norm_eps"])
    v3 = model_bytes(s, w, 3, 32)
    for n in [255, 256, 300, len(v3) // 2, len(v3) - 1]:
        cases[f"v3 cut to {n}"] = (v3[:n], ["truncated"])
    cases["v3 with 1 more"] = (v3 + b"\0", ["damaged", "only"])
    cases["v3 with another group"] = (poke(v3, 37, "<i", 64), ["groups of 64"])
    cases["v3 with infinite scales"] = (v3[:-2] + b"\0\x7c", ["damaged"])
    cases["version 4"] = (poke(v1, 4, "<i", 4), ["version 4"])
    cases["version 0 with magic"] = (poke(v1, 4, "<i", 0), ["version 0"])
    cases["shared byte"] = (poke(v1, 36, "<B", 9), ["shared"])
    cases["text"] = (b"Once upon a time, there was a file that was not a model.\n" * 99, ["text"])
    cases["short text"] = (b"hi\n", ["text"])
    cases["zip checkpoint"] = (b"PK\x03\x04" + b"\0" * 999, ["PyTorch", "python export.py", "--checkpoint"])
    cases["pickle"] = (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + b"\0" * 999, ["PyTorch", "export.py"])
    cases["gguf"] = (b"GGUF\3\0\0\0" + b"\0" * 999, ["GGUF"])
    cases["safetensors"] = (struct.pack("<Q", 200) + b'{"__metadata__":{}}'.ljust(999), ["safetensors"])
    for kind, value in [("NaN", np.nan), ("infinite", np.inf)]:
        for where in ["emb", "rms_att", "wq", "w2", "rms_final"]:
            damaged = dict(w, **{where: w[where].copy()})
            damaged[where].reshape(-1)[:] = value
            damaged["cls"] = damaged["emb"]
            cases[f"{kind} {where}"] = (model_bytes(s, damaged), ["damaged"])
            if where.startswith("rms"):
                cases[f"{kind} {where} int8"] = (model_bytes(s, damaged, 2, 16), ["damaged"])
    return cases


BROKEN_MODELS = broken_models()


@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_broken_model(builds, tmp_path, tokenizer, name):
    data, words = BROKEN_MODELS[name]
    path = tmp_path / "broken.bin"
    path.write_bytes(data)
    assert_error(run(builds.checked, path, "-z", tokenizer, "-i", "hello", "-n", 8), path, *words)


def broken_tokenizers():
    good = tokenizer_of(300)
    entry = struct.pack("<fI", 0.0, 1) + b"a"
    return {
        "empty": b"", "only a length": good[:4], "two bytes": good[:2],
        "cut inside a piece": good[:-1], "cut inside a header": good + b"\0\0\0",
        "half": good[: len(good) // 2],
        "length negative": good[:4] + struct.pack("<fi", 0.0, -1) + good[12:],
        "length huge": good[:4] + struct.pack("<fi", 0.0, INT_MAX) + good[12:],
        "length beyond the end": good + struct.pack("<fI", 0.0, 2) + b"a",
        "score is NaN": good + struct.pack("<fI", np.nan, 1) + b"a" + entry,
        "text": b"this is not a tokenizer, but a text of some length\n" * 9,
        "sentencepiece model": b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02\n\n\n\x03<s>",
    }


@pytest.mark.parametrize("name", broken_tokenizers())
def test_broken_tokenizer(builds, tmp_path, name):
    path, model = tmp_path / "broken.bin", markov_model(tmp_path / "m.bin", {})
    path.write_bytes(broken_tokenizers()[name])
    words = ["python tokenizer.py", "--tokenizer-model"] if name == "sentencepiece model" else []
    assert_error(run(builds.checked, model, "-z", path, "-i", "hello"), path, *words)


def test_prompt_beyond_the_vocabulary(builds, tmp_path):
    """llama2.c reads an embedding row that is not there."""
    path, model = tmp_path / "t.bin", markov_model(tmp_path / "m.bin", {}, vocab_size=100)
    path.write_bytes(tokenizer_of(300))
    r = run(builds.checked, model, "-z", path, "-i", "hello")
    assert (r.returncode, r.stdout) == (1, b"")
    warning, error = r.stderr.decode().splitlines()
    assert "warning" in warning and "-z data/tok100.bin" in warning
    assert str(path) in error and "100" in error


@pytest.mark.parametrize("mode", ["generate", "chat"])
def test_prompt_longer_than_the_context(builds, tmp_path, tokenizer, mode):
    model = markov_model(tmp_path / "m.bin", {}, seq_len=16)
    args = ["-y", ""] if mode == "chat" else []
    assert_error(run(builds.checked, model, "-z", tokenizer, "-m", mode, *args, "-i", "a" * 40), model, "16")


def test_the_beginning_of_an_option(builds, tmp_path, tokenizer):
    args = builds.checked, markov_model(tmp_path / "m.bin", {}), "-z", tokenizer
    for option in ("--temp", "--temp=1"):
        assert_error(run(*args, option), option, "did you mean --temperature or --template?")
    assert_error(run(*args, "--to"), "--to", "did you mean --top-p or --tokenizer or --top-k or --tokens?")
    for option in ("--", "--t", "--q", "--tempo", "-x"):
        r = run(*args, option)
        assert_error(r, option, "unknown option; see")
        assert b"did you mean" not in r.stderr


@pytest.mark.parametrize("args,subject", [
    (["-y", "be kind"], "-y"), (["--template", "plain"], "--template"),
    (["--perplexity", "-", "-n", "9"], "-n"), (["--perplexity", "-", "-f", "x"], "-f"),
    (["--perplexity", "-", "-i", "x"], "-i"), (["--stats", "--tokens"], "--stats"),
    (["--stats", "--logits"], "--stats"), (["-b", "2", "--logits"], "-b"), (["-b", "2", "-m", "chat"], "-b"),
    (["-b", "2", "--tokens"], "-b"), (["-b", "2", "--perplexity", "-"], "-b"),
    (["-m", "chat", "--tokens"], "-m chat"), (["--tokens", "--logits"], "--tokens"),
    (["--logits", "--perplexity", "-"], "--logits"),
])
def test_options_without_effect_are_refused(builds, tmp_path, tokenizer, args, subject):
    model = markov_model(tmp_path / "m.bin", {})
    assert_error(run(builds.checked, model, "-z", tokenizer, *args), subject)


@pytest.mark.parametrize("args,flag", [
    *[(["-t", v], "-t") for v in ["nan", "inf", "-1", "abc", "", "1x", " 1", "1e39"]],
    *[(["-p", v], "-p") for v in ["nan", "2", "-0.1", "", "x", "1.0000001"]],
    *[(["-n", v], "-n") for v in ["abc", "-1", "1.5", "", "99999999999", "0x10", " 7", "+7"]],
    *[(["-s", v], "-s") for v in ["abc", "-1", "18446744073709551616", "1.0", ""]],
    (["--temperature=nan"], "--temperature"), (["--top-p", "7"], "--top-p"), (["--steps="], "--steps"),
    (["-m", "talk"], "-m"), (["-m", ""], "-m"), (["-t"], "-t"), (["--prompt"], "--prompt"),
    *[(["--draft", v], "--draft") for v in ["16", "-1", "x", ""]],
    (["-q", "1"], "-q"), (["--temp", "1"], "--temp"), (["--temperatures=1"], "--temperatures=1"),
    (["-"], "-"), (["--"], "--"),
    (["-T"], "-T"), (["--tokens=1"], "--tokens=1"), (["other.bin"], "other.bin"), (["-tt", "1"], "-tt"),
    (["-z", "no/such.bin"], "no/such.bin"), (["-z", "/"], "/"), (["-z", "/dev/zero"], "/dev/zero"),
    (["--evil\n\x1b[2J"], "--evil??[2J"),
])
def test_bad_flags(builds, tmp_path, tokenizer, args, flag):
    model = markov_model(tmp_path / "m.bin", {})
    assert_error(run(builds.checked, model, "-z", tokenizer, *args), flag)


@pytest.mark.parametrize("path", ["no/such/model.bin", "/", "/dev/zero", "/dev/null", ""])
def test_not_a_file(builds, path):
    assert_error(run(builds.checked, path), path)


def test_no_arguments_and_help(builds):
    assert_error(run(builds.checked), "", "no model", "usage")
    for flag in ["-h", "--help"]:
        r = run(builds.checked, flag)
        assert (r.returncode, r.stderr) == (0, b"")
        for word in [b"--temperature", b"--tokenizer", b"--logits", b"debugging"]:
            assert word in r.stdout


def test_prompt_of_any_length_from_a_pipe(builds, tmp_path, tokenizer):
    model = markov_model(tmp_path / "m.bin", {}, seq_len=64)
    r = run(builds.checked, model, "-z", tokenizer, "-i", "-", stdin=b"ab" * 500_000)
    assert_error(r, model, "1000002 tokens")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
@pytest.mark.parametrize("extra", [[], ["--help"], ["--logits"], ["--tokens"], ["-m", "chat"]])
def test_full_device(builds, tmp_path, tokenizer, extra):
    model = markov_model(tmp_path / "m.bin", {BOS: 260, 260: 260})
    with open("/dev/full", "wb") as full:
        r = subprocess.run([builds.checked, model, "-z", tokenizer, "-t", "0", *extra], stdout=full, env=ENV,
                           stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=60, check=False)
    assert r.returncode == 1
    assert b"run: stdout: cannot write" in r.stderr and r.stderr.count(b"\n") == 1


def test_closed_stdout(builds, tmp_path, tokenizer):
    model = markov_model(tmp_path / "m.bin", {BOS: 260, 260: 260})
    command = [str(builds.checked), str(model), "-z", str(tokenizer), "-t", "0"]
    r = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], env=ENV, stderr=subprocess.PIPE,
                       timeout=60, check=False)
    assert (r.returncode, r.stderr.count(b"\n")) == (1, 1)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        r = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=ENV, timeout=60, check=False)
    finally:
        os.close(writer)
    assert r.returncode == 1 and b"run: stdout" in r.stderr


# ---------------------------------------------------------------------------------------------------------
# Chat

def chat_model(tmp_path, seq_len=3000):
    """Answers every turn, which ends in "]", with "ok"."""
    close, o, k = 3 + ord("]"), 259 + LETTERS.index(b"o"), 259 + LETTERS.index(b"k")
    return markov_model(tmp_path / "m.bin", chain([close, o, k, EOS]), seq_len=seq_len)


def test_chat_turns(builds, tmp_path, tokenizer):
    model = chat_model(tmp_path)
    args = [builds.checked, model, "-z", tokenizer, "-t", 0, "-n", 0, "-m", "chat"]
    ask = b"Enter system prompt (optional): "
    assert run_ok(*args) == ask + b"User: \n"  # the end of input ends the chat
    assert run_ok(*args, stdin=b"be kind\nhi\nyou?\n") == (
        ask + b"User: Assistant: ok\nUser: Assistant: ok\nUser: \n")
    assert run_ok(*args, "-y", "", "-i", "hi", stdin=b"") == b"Assistant: ok\nUser: \n"
    assert run_ok(*args, "-y", "", stdin=b"no newline") == b"User: Assistant: ok\nUser: \n"
    assert run_ok(*args, "-y", "s", "-i", "-", stdin=b"hi\n") == b"User: Assistant: ok\nUser: \n"


def test_chat_that_cannot_read_its_input(builds, tmp_path, tokenizer):
    """It is told, as of -i -, and not taken for the end."""
    command = [str(a) for a in (builds.checked, chat_model(tmp_path), "-z", tokenizer, "-m", "chat")]
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        r = subprocess.run(command, stdin=folder, capture_output=True, env=ENV, timeout=60, check=False)
    finally:
        os.close(folder)
    assert (r.returncode, r.stderr.count(b"\n")) == (1, 1) and b"run: stdin: cannot read" in r.stderr


def test_chat_template_reaches_the_model(builds, tmp_path, tokenizer, sentencepieces):
    """The ids of a turn, seen through how many fit: a context of exactly that many tokens leaves no room."""
    turn = b"[INST] <<SYS>>\nbe kind\n<</SYS>>\n\nhi [/INST]"
    [ids] = harness_ids(builds, tokenizer, [turn])
    for room, words in [(len(ids) - 1, ["-n", "first prompt", len(ids)]), (len(ids), None)]:
        r = run(builds.checked, chat_model(tmp_path), "-z", tokenizer, "-t", 0, "-n", room, "-m", "chat",
                "-y", "be kind", "-i", "hi")
        if words:
            assert_error(r, *words)
        else:
            assert r.returncode == 0 and r.stdout == b"Assistant: o\n" and b"context" in r.stderr


def test_plain_chat(builds, tmp_path, tokenizer):
    """The text goes on as it is: nothing is put before, between or behind what user and model say."""
    a, b, c = (259 + LETTERS.index(letter) for letter in (b"a", b"b", b"c"))
    model = markov_model(tmp_path / "m.bin", {a: b, b: EOS, c: c})
    args = [builds.checked, model, "-z", tokenizer, "-t", 0, "-m", "chat", "--template", "plain"]
    assert run_ok(*args, stdin=b"a\nxa\n") == b"User: b\nUser: b\nUser: \n"  # and asks for no system prompt
    r = run(*args, "-y", "s", "-i", "c")
    assert r.stdout == b"c" * 60 + b"\n" and r.stderr.startswith(b"run: the context of 64 tokens is full")
    assert_error(run(*args, "--template", "alpaca"), "--template", "plain")


def test_chat_with_long_prompts(builds, tmp_path, tokenizer):
    model = chat_model(tmp_path)
    args = [builds.checked, model, "-z", tokenizer, "-t", 0, "-n", 0, "-m", "chat"]
    assert run_ok(*args, "-y", "s" * 600, "-i", "u" * 600) == b"Assistant: ok\nUser: \n"
    assert run_ok(*args, stdin=b"s" * 600 + b"\n" + b"u" * 600 + b"\n").endswith(b"ok\nUser: \n")
    for long in [["-y", "s" * 100_000], ["-i", "u" * 100_000]]:
        assert_error(run(*args, "-y", "", "-i", "", *long), model, "3000")


def test_chat_stops_when_the_context_is_full(builds, tmp_path, tokenizer):
    r = run(builds.checked, chat_model(tmp_path), "-z", tokenizer, "-t", 0, "-n", 100, "-m", "chat",
            "-y", "", stdin=b"hi\n" * 50)
    assert r.returncode == 0
    assert r.stdout.count(b"Assistant: ok\n") > 2
    note, full = r.stderr.splitlines()
    assert b"with 300 may do better with --template plain" in note
    assert b"the context of 100 tokens is full" in full


def test_chat_closes_every_answer(builds, tmp_path, tokenizer):
    """Two turns take their prompts, two answers of two tokens and the </s> between them: no room is left."""
    [ids] = harness_ids(builds, tokenizer, [b"[INST] hi [/INST]"])
    args = [builds.checked, chat_model(tmp_path), "-z", tokenizer, "-t", 0, "-m", "chat", "-y", "",
            "-i", "hi"]
    for room, out in [(2 * len(ids) + 3, b"ok\nUser: Assistant: o\n"), (2 * len(ids) + 2, b"ok\nUser: ")]:
        r = run(*args, "-n", room, stdin=b"hi\n")
        assert (r.returncode, r.stdout) == (0, b"Assistant: " + out) and b"is full" in r.stderr


def test_chat_ends_when_a_line_is_longer_than_the_context(builds, tmp_path, tokenizer):
    args = builds.checked, chat_model(tmp_path, 100), "-z", tokenizer, "-t", 0, "-m", "chat", "-y", ""
    r = run(*args, "--stats", stdin=b"hi\n" + b"h" * 200 + b"\nhi\n")
    assert (r.returncode, r.stdout) == (0, b"User: Assistant: ok\nUser: ")
    assert b"the context of 100 tokens is full" in r.stderr
    assert json.loads(r.stderr.splitlines()[-1])["stories"] == 1


def test_chat_uses_the_whole_context(builds, tmp_path, tokenizer):
    r = run(builds.checked, chat_model(tmp_path, 300), "-z", tokenizer, "-t", 0, "-m", "chat", "-y", "",
            stdin=b"hi\n" * 100)
    assert r.returncode == 0 and b"context of 300 tokens is full, the chat ends here\n" in r.stderr


def test_chat_on_windows_and_its_stats(builds, tmp_path, tokenizer):
    args = builds.checked, chat_model(tmp_path), "-z", tokenizer, "-t", 0, "-m", "chat", "-y", ""
    r, windows = (run(*args, "--stats", stdin=text) for text in (b"hi\nho\n", b"hi\r\nho\r\n"))
    stats, same = (json.loads(x.stderr.splitlines()[-1]) for x in (r, windows))
    assert r.stdout == windows.stdout and stats["prompt_tokens"] == same["prompt_tokens"] > 20
    assert (stats["stories"], stats["decoded_tokens"]) == (2, 2 * 3) and stats["first_token_seconds"] > 0
    assert_error(run(*args, "-b", 3), "-b", "leave one of them out")


@needs_stories
def test_chat_keeps_its_state(builds):
    """The second answer depends on the first turn."""
    args = [builds.fast, STORIES / "stories260K.bin", "-z", STORIES / "tok512.bin", "-t", 0, "-n", 0,
            "-m", "chat", "-y", ""]
    answers = [run_ok(*args, stdin=first + b"\nTell me about the dog.\n").split(b"User: ")
               for first in (b"Hello", b"The cat is big")]
    assert len(answers[0]) > 1 and answers[0] != answers[1]


def pieces_of(ids):
    told = SPECIAL + BYTES + LETTERS
    return b"".join(bytes([i - 3]) if 3 <= i < 259 else told[i] for i in ids)


def test_a_prompt_of_more_tokens_than_are_fed_at_once(builds, tmp_path, tokenizer):
    """The first token told is the one that --logits, which feeds fewer at a time, finds likeliest."""
    s = Shape(dim=32, n_layers=2, seq_len=1100)
    model, text = tmp_path / "m.bin", tmp_path / "p.txt"
    model.write_bytes(model_bytes(s, random_weights(s, scale=2.0)))
    rng = np.random.default_rng(0)
    seen = set()
    for count in (511, 512, 600, 1030):
        text.write_bytes(bytes(rng.choice(list(b"abcdefghijklm"), count).tolist()))
        args = builds.checked, model, "-z", tokenizer, "-f", text, "-t", 0
        rows = run_ok(*args, "-n", 0, "--logits").splitlines()
        assert len(rows) == count + 2
        best = int(np.argmax(np.array(rows[-1].split(), float)))
        seen.add(best)
        out = run_ok(*args, "-n", count + 3)
        first = out[count:]
        expected = b"" if best in (BOS, EOS) else pieces_of([best])
        assert first.startswith(expected) or not expected.isascii(), (count, best, first)
    assert len(seen) > 1


@pytest.mark.parametrize("seq_len", [32, 100])
def test_perplexity_also_where_a_story_is_fed_in_parts(builds, tmp_path, tokenizer, seq_len):
    s = Shape(seq_len=seq_len)
    w = random_weights(s)
    model, file = tmp_path / "m.bin", tmp_path / "stories.txt"
    model.write_bytes(model_bytes(s, w))
    stories = ["hello KIM", "the dog and the cat and the mouse and the " + "x" * 80]
    file.write_text("<|endoftext|>".join(stories))
    nats = []
    for story in stories:
        ids = list(map(int, run_ok(builds.checked, model, "-z", tokenizer, "-i", story, "--tokens").split()))
        for at in range(0, len(ids), seq_len):
            part = ids[at : at + seq_len]
            logits = reference_logits(s, w, part)
            log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            targets = (ids + [BOS])[at + 1 : at + 1 + len(part)]
            nats += list(-log_p[np.arange(len(part)), targets])
    out = run_ok(builds.checked, model, "-z", tokenizer, "--perplexity", file).decode()
    mean, bits = (float(x.split()[0]) for x in (out.split(":")[1], out.split(",")[1]))
    size = sum(map(len, stories))
    assert abs(mean - np.mean(nats)) < 1e-5 and abs(bits - np.sum(nats) / np.log(2) / size) < 1e-5, out


def test_perplexity_with_another_models_tokenizer(builds, tmp_path):
    path, file, model = (
        tmp_path / "t.bin",
        tmp_path / "s.txt",
        markov_model(tmp_path / "m.bin", {}, vocab_size=100),
    )
    path.write_bytes(tokenizer_of(300))
    file.write_text("hello")
    r = run(builds.checked, model, "-z", path, "--perplexity", file)
    assert r.returncode == 1 and r.stdout == b"" and b"the model has only 100" in r.stderr


def test_a_chat_has_its_seed(builds, tmp_path, tokenizer):
    model = tmp_path / "m.bin"
    model.write_bytes(model_bytes(Shape(), random_weights(Shape())))
    args = (
        builds.checked,
        model,
        "-z",
        tokenizer,
        "-t",
        1,
        "-p",
        1,
        "-m",
        "chat",
        "--template",
        "plain",
        "-y",
        "",
        "-i",
        "a",
    )
    one, again, two = (run(*args, "-s", seed).stdout for seed in (1, 1, 2))
    assert one == again != two


def test_no_seed_is_the_time(builds, tmp_path, tokenizer):
    model = tmp_path / "m.bin"
    model.write_bytes(model_bytes(Shape(), random_weights(Shape())))
    args = builds.checked, model, "-z", tokenizer, "-t", 1, "-p", 1
    for how in ([], ["-s", 0]):
        before = int(time.time())
        out = run_ok(*args, *how)
        assert out in {run_ok(*args, "-s", t) for t in range(before, int(time.time()) + 1)}


def test_the_usual_length_is_256(builds, tmp_path, tokenizer):
    model = markov_model(tmp_path / "m.bin", {BOS: 260, 260: 260}, seq_len=300)
    assert run_ok(builds.checked, model, "-z", tokenizer, "-t", 0) == b"a" * 256 + b"\n"


def test_a_last_piece_may_be_empty(builds, tmp_path):
    path, model = tmp_path / "t.bin", markov_model(tmp_path / "m.bin", {}, vocab_size=264)
    path.write_bytes(tokenizer_bytes([*SPECIAL, *BYTES, b" ", b"a", b""]))
    assert run_ok(builds.checked, model, "-z", path, "--tokens", "-i", "a") == b"1 259 260\n"


def test_tokens_told_are_counted(builds, tmp_path, tokenizer):
    model = markov_model(tmp_path / "m.bin", chain([BOS, 260, 261, EOS]))
    r = run(builds.checked, model, "-z", tokenizer, "-t", 0)
    assert r.stdout == b"ab\n" and re.fullmatch(rb"achieved tok/s: [\d.]+ \(4 tokens\)\n", r.stderr), r.stderr


def test_two_turns_are_one_text(builds, tmp_path, tokenizer):
    """Greedily, as the float64 reference that reads all turns: the system prompt is said once."""
    s = Shape(seq_len=64)
    turns = ["be\nab", "ba", "c"]
    for seed in range(40):
        w = random_weights(s, seed, scale=2.0)
        w["cls"] = w["cls"].copy()
        keep = [EOS, *(259 + LETTERS.index(x) for x in (b"a", b"b", b"c", b"d", b"e", b"f"))]
        w["cls"][[i for i in range(s.vocab_size) if i not in keep]] *= 0
        s.tied = False
        told, ids = [], []
        for turn in turns:
            ids += [BOS, 259, *(259 + LETTERS.index(x.encode()) if x != "\n" else 3 + 10 for x in turn)]
            answer = []
            while len(ids) < 60:
                best = int(np.argmax(reference_logits(s, w, ids)[-1]))
                if best == EOS:
                    break
                ids.append(best)
                answer.append(best)
            told.append(answer)
        if len(ids) < 55 and all(told):
            break
    else:
        raise AssertionError("no such weights")
    model = tmp_path / "m.bin"
    model.write_bytes(model_bytes(s, w))
    args = (
        builds.checked,
        model,
        "-z",
        tokenizer,
        "-t",
        0,
        "-n",
        0,
        "-m",
        "chat",
        "--template",
        "plain",
        "-y",
        "be",
    )
    out = run_ok(*args, stdin="\n".join(["ab", *turns[1:]]).encode() + b"\n")
    assert out.replace(b"User: ", b"").split(b"\n")[:3] == [pieces_of(x) for x in told]


def test_int8_groups_that_no_vector_divides(builds, tmp_path, tokenizer):
    for group, shape in [
        (5, Shape(dim=40, hidden_dim=50)),
        (7, Shape(dim=28, hidden_dim=42, n_heads=2, n_kv_heads=1)),
    ]:
        w = random_weights(shape, seed=2)
        path = tmp_path / "model.bin"
        path.write_bytes(model_bytes(shape, w, 2, group))
        ids, logits = logits_of(builds.checked, path, tokenizer)
        np.testing.assert_allclose(logits, reference_logits(shape, w, ids, group), atol=1e-4, rtol=0)
