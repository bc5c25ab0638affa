"""Weights in and out of the files that run.c reads: llama2.c's three layouts, and one of ours.

    python export.py model.bin --checkpoint=out/ckpt.pt               # v0: fp32, bare header
    python export.py model.bin --checkpoint=out/ckpt.pt --version=1   # v1: fp32, magic and version
    python export.py model.bin --checkpoint=out/ckpt.pt --version=2   # v2: int8, a quarter of the size
    python export.py model.bin --checkpoint=out/ckpt.pt --version=3   # v3: 4-bit, a seventh
    python export.py ckpt.pt --checkpoint=model.bin                   # and back, from any of them

All numbers are little-endian. Matrices are row-major, (output, input), in the order of `tensor_names`.
v0 starts with 7 int32: dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size (negative: the classifier
has weights of its own, at the end), max_seq_len. v1 and v2 have a 256-byte header: magic "24ka", version,
the same 7, a byte that says whether the classifier is shared, for v2 the int32 group size; at byte 48 our
float32 rope_theta and norm_eps, where llama2.c leaves zeros (zero stands for its 10000 and 1e-5). In v2
every tensor but the norms is int8 [-127, 127], all of it, then one float32 scale for every group of values.
v3 is like v2 with 4-bit values [-8, 7] in groups of 32 of a row, with float16 scales, in the order in which
run.c reads them: by bands of 16 rows. Each such tensor begins at a multiple of 64 bytes and is filled up with
zeros to a multiple of 16 rows and 32 columns. Its values come first, (bands, groups, 4, 16 rows, 4) bytes:
byte j of vector i holds the group's column 8i + j, plus 8, and in its upper half column 8i + 4 + j, plus 8.
The scales follow, (bands, groups, 16 rows).

Not for: Hugging Face or GGUF files.
"""

import argparse
import math
import os
import shlex
import struct
import sys
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

try:
    import numpy as np
    import torch
except ModuleNotFoundError as e:
    raise SystemExit(
        f"{e.name} is not installed for Python {sys.version.split()[0]}; run: "
        ". .venv/bin/activate, or with 3.11 or newer: pip install -r requirements.txt"
    ) from None

from model import (
    SHARDED,
    ModelArgs,
    begins_checkpoint,
    load_checkpoint,
    model_from_checkpoint,
    no_checkpoint,
    rope_table,
    save_checkpoint,
)
from tokenizer import CommandLine, atomic_write

MAGIC = 0x616B3432  # "ak42"
HEADER_BYTES = {0: 28, 1: 256, 2: 256, 3: 256}
GROUP4, BAND, ALIGN = 32, 16, 64  # v3: values that share a scale, rows in a band, where tensors begin
SPARE = 48  # where in a 256-byte header rope_theta and norm_eps are
ANOTHER = "name a checkpoint or a .bin model: --checkpoint=FILE"
OTHERS = (".gguf", ".safetensors", ".onnx", ".json", ".model")  # formats that people may hope for
DEFAULTS = 10000.0, 1e-5  # llama2.c's rope_theta and norm_eps, the only ones v0 can mean

# ----------------------------------------------------------------------------
# What lies where


def tensor_names(version: int, args: ModelArgs) -> list[str]:
    """State dict names in the file's order; "rope_cos" and "rope_sin" stand for v0's two unused tables."""

    def layers(*names: str) -> list[str]:
        return [f"layers.{i}.{name}.weight" for name in names for i in range(args.n_layers)]

    attention = layers("attention.wq", "attention.wk", "attention.wv", "attention.wo")
    feed_forward = layers("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    if version == 0:
        names = [
            "tok_embeddings.weight",
            *layers("attention_norm"),
            *attention,
            *layers("ffn_norm"),
            *feed_forward,
        ]
        names += ["norm.weight", "rope_cos", "rope_sin"]
    else:
        names = [*layers("attention_norm", "ffn_norm"), "norm.weight", "tok_embeddings.weight"]
        names += [*attention, *feed_forward]
    return names if args.tie_embeddings else [*names, "output.weight"]


def tensor_shape(name: str, args: ModelArgs) -> tuple[int, ...]:
    """Shape of the tensor of this name."""
    kv_dim = args.n_kv_heads * args.head_dim
    kind = name.removesuffix(".weight").split(".")[-1]
    if kind.endswith("norm"):
        return (args.dim,)
    if kind.startswith("rope"):
        return (args.max_seq_len, args.head_dim // 2)
    return {
        "wq": (args.dim, args.dim),
        "wk": (kv_dim, args.dim),
        "wv": (kv_dim, args.dim),
        "wo": (args.dim, args.dim),
        "w1": (args.hidden_dim, args.dim),
        "w2": (args.dim, args.hidden_dim),
        "w3": (args.hidden_dim, args.dim),
        "tok_embeddings": (args.vocab_size, args.dim),
        "output": (args.vocab_size, args.dim),
    }[kind]


def is_quantized(version: int, name: str) -> bool:
    return version >= 2 and not name.endswith("norm.weight")


def file_bytes(version: int, args: ModelArgs, group_size: int) -> int:
    """Exact size of the file."""
    total = HEADER_BYTES[version]
    for name in tensor_names(version, args):
        numel = math.prod(tensor_shape(name, args))
        if not is_quantized(version, name):
            total += 4 * numel
        elif version == 2:
            total += numel + 4 * (numel // group_size)
        else:
            rows, cols = tensor_shape(name, args)
            groups = -(-rows // BAND) * BAND * -(-cols // GROUP4)
            total = -(-total // ALIGN) * ALIGN + groups * (GROUP4 // 2 + 2)
    return total


# ----------------------------------------------------------------------------
# int8 groups


def quantize(w: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 in groups of consecutive values: (groups, group_size) int8 and (groups,) fp32 scales."""
    w = w.float().reshape(-1, group_size)
    scale = w.abs().amax(dim=1) / 127.0
    steps = torch.where(scale > 0, scale, 1.0)  # a group of zeros stays zeros
    return torch.round(w / steps[:, None]).to(torch.int8), scale


def quantize4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, cols) → 4-bit [-8, 7] (bands * 16, groups * 32) int8, and float16 scales (bands * 16, groups).

    Zeros fill up the last band and group. Of 21 scales around the one that makes -8 of a group's largest
    value, the one with the smallest squared error is taken.
    """
    rows, cols = w.shape
    padded = torch.nn.functional.pad(w.float(), (0, -cols % GROUP4, 0, -rows % BAND))
    parts = []
    for groups in padded.reshape(-1, GROUP4).split(1 << 13):  # as many as the caches hold
        largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
        best, scale = torch.full_like(largest, torch.inf), torch.zeros_like(largest)
        for factor in torch.linspace(0.75, 1.25, 21).tolist():
            candidate = (largest * factor / -8).half().float()
            steps = torch.where(candidate != 0, candidate, 1.0)
            q = (groups / steps).round_().clamp_(-8, 7)
            error = q.mul_(candidate).sub_(groups).square_().sum(1, keepdim=True)
            better = error < best
            best, scale = torch.where(better, error, best), torch.where(better, candidate, scale)
        q = (groups / torch.where(scale != 0, scale, 1.0)).round_().clamp_(-8, 7)
        parts.append((q.to(torch.int8), scale.half()))
    q, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    return q.reshape(padded.shape), scale.reshape(len(padded), -1)


def pack4(q: torch.Tensor, scale: torch.Tensor) -> bytes:
    """What quantize4 returns, as v3 holds it."""
    units = (q.numpy() + 8).astype(np.uint8).reshape(-1, BAND, q.shape[1] // 8, 2, 4).transpose(3, 0, 2, 1, 4)
    scales = scale.numpy().reshape(-1, BAND, scale.shape[1]).transpose(0, 2, 1)
    return (units[0] | units[1] << 4).tobytes() + scales.astype("<f2").tobytes()


def unpack4(packed: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """(rows, cols) float32 of a v3 tensor's bytes."""
    bands, groups = -(-rows // BAND), -(-cols // GROUP4)
    values, scales = np.split(packed, [bands * groups * BAND * GROUP4 // 2])
    units = values.reshape(bands, groups * 4, BAND, 4)
    q = np.stack([units & 15, units >> 4]).transpose(1, 3, 2, 0, 4).reshape(-1, GROUP4).astype(np.float32) - 8
    scale = scales.view("<f2").reshape(bands, groups, BAND).transpose(0, 2, 1).reshape(-1, 1)
    return (q * scale.astype(np.float32)).reshape(bands * BAND, groups * GROUP4)[:rows, :cols]


def fit_group_size(args: ModelArgs, group_size: int) -> int:
    """The largest part of a group size with which no group runs over the end of a row."""
    return math.gcd(group_size, args.dim, args.hidden_dim)


# ----------------------------------------------------------------------------
# Writing and reading


def write_bin(
    path: str, args: ModelArgs, state: dict[str, torch.Tensor], version: int = 0, group_size: int = 64
) -> float:
    """Write a model; returns the largest absolute rounding error (0 unless v2 or v3).

    Raises SystemExit if the version cannot hold this model, OSError if the file cannot be written.
    """
    if version == 0 and (args.rope_theta, args.norm_eps) != DEFAULTS:
        raise SystemExit("v0 files cannot say rope_theta or norm_eps; add --version=1")
    group_size = GROUP4 if version == 3 else fit_group_size(args, group_size)
    shape = args.dim, args.hidden_dim, args.n_layers, args.n_heads, args.n_kv_heads
    if version == 0:
        sign = 1 if args.tie_embeddings else -1
        header = struct.pack("<7i", *shape, sign * args.vocab_size, args.max_seq_len)
        cos, sin = rope_table(args.head_dim, args.max_seq_len, args.rope_theta)
        state = state | {"rope_cos": cos[:, ::2], "rope_sin": sin[:, ::2]}
    else:
        header = struct.pack(
            "<Ii7iB", MAGIC, version, *shape, args.vocab_size, args.max_seq_len, args.tie_embeddings
        )
        header += struct.pack("<i", group_size) if version >= 2 else b""
        theta, eps = (
            0.0 if value == default else value
            for value, default in zip((args.rope_theta, args.norm_eps), DEFAULTS, strict=True)
        )
        header = (header.ljust(SPARE, b"\0") + struct.pack("<2f", theta, eps)).ljust(
            HEADER_BYTES[version], b"\0"
        )
    error = 0.0
    with atomic_write(path) as f:
        f.write(header)
        for name in tensor_names(version, args):
            w = state[name].detach().cpu().float()
            if is_quantized(version, name) and version == 3:
                packed = pack4(*quantize4(w))
                back = unpack4(np.frombuffer(packed, np.uint8), *w.shape)
                error = max(error, np.abs(back - w.numpy()).max().item())
                f.write(bytes(-f.tell() % ALIGN) + packed)
                continue
            if is_quantized(version, name):
                q, scale = quantize(w, group_size)
                error = max(error, (q * scale[:, None] - w.reshape(q.shape)).abs().max().item())
                f.write(q.numpy().tobytes())
                w = scale
            f.write(w.contiguous().numpy().astype("<f4", copy=False).tobytes())
    return error


def read_header(f: BinaryIO, path: str) -> tuple[int, ModelArgs, int]:
    """Version, shape and group size of an open .bin file; SystemExit if it isn't one or its size is wrong."""
    raw, size = f.read(256), os.fstat(f.fileno()).st_size
    magic, version = struct.unpack("<Ii", raw[:8].ljust(8, b"\0"))
    if magic != MAGIC:
        version, offset = 0, 0
    elif version in (1, 2, 3):
        offset = 8
    else:
        raise SystemExit(f"{path} is a model file of version {version}; this program knows 0 to 3; {ANOTHER}")
    if len(raw) < HEADER_BYTES[version]:
        raise SystemExit(f"{path} is no model file: it has only {len(raw)} bytes; {ANOTHER}")
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = struct.unpack_from(
        "<7i", raw, offset
    )
    tied, group_size = (vocab_size > 0, 1) if version == 0 else struct.unpack_from("<Bi", raw, 36)
    theta, eps = struct.unpack_from("<2f", raw, SPARE) if version else (0.0, 0.0)
    try:
        if hidden_dim < 1 or version == 2 and (group_size < 1 or dim % group_size or hidden_dim % group_size):
            raise ValueError(f"hidden_dim={hidden_dim}, group size={group_size}")
        if version == 3 and group_size != GROUP4:
            raise ValueError(f"group size={group_size}")
        if n_layers > size // 28 or max_seq_len > 2**24:  # before anything is made of that length
            raise ValueError(f"n_layers={n_layers}, max_seq_len={max_seq_len}")
        args = ModelArgs(
            dim,
            n_layers,
            n_heads,
            n_kv_heads,
            abs(vocab_size) if version == 0 else vocab_size,
            hidden_dim,
            max_seq_len=max_seq_len,
            rope_theta=theta or DEFAULTS[0],
            norm_eps=eps or DEFAULTS[1],
            tie_embeddings=bool(tied),
        )
    except (ValueError, ZeroDivisionError) as e:
        raise SystemExit(f"{path} is no model file: impossible header ({e}); {ANOTHER}") from None
    group_size = group_size if version == 2 else 1
    expected = file_bytes(version, args, group_size)
    if size != expected:
        raise SystemExit(f"{path} is damaged: {size} bytes where its header needs {expected}; {ANOTHER}")
    return version, args, group_size


def read_bin(path: str) -> tuple[ModelArgs, dict[str, torch.Tensor]]:
    """Shape and fp32 state dict of a v0, v1, v2 or v3 file. Raises SystemExit for anything else, OSError if
    unreadable.
    """
    with open(path, "rb") as f:
        version, args, group_size = read_header(f, path)
        f.seek(HEADER_BYTES[version])
        state = {}
        for name in tensor_names(version, args):
            shape = tensor_shape(name, args)
            numel = math.prod(shape)
            if is_quantized(version, name) and version == 3:
                rows, cols = shape
                f.seek(-f.tell() % ALIGN, os.SEEK_CUR)
                groups = -(-rows // BAND) * BAND * -(-cols // GROUP4)
                w = unpack4(np.fromfile(f, np.uint8, groups * (GROUP4 // 2 + 2)), rows, cols).copy()
            elif is_quantized(version, name):
                q = np.fromfile(f, np.int8, numel).reshape(-1, group_size)
                w = q * np.fromfile(f, "<f4", numel // group_size)[:, None]
            else:
                w = np.fromfile(f, "<f4", numel)
            state[name] = torch.from_numpy(w.astype(np.float32, copy=False).reshape(shape))
    state = {name: w for name, w in state.items() if not name.startswith("rope_")}
    return args, {"output.weight": state["tok_embeddings.weight"]} | state


def read_any(path: str) -> dict:
    """A checkpoint dict from a .pt checkpoint, a folder of a split model's state, or a .bin file."""
    if os.path.isdir(path) and path.rstrip("/").endswith(SHARDED):
        return load_checkpoint(path)
    try:
        with open(path, "rb") as f:
            start = f.read(4)
        if begins_checkpoint(start) and (start or path.endswith(".pt")):
            return load_checkpoint(path)
        args, state = read_bin(path)
    except OSError as e:
        if os.path.isdir(path):
            raise SystemExit(no_checkpoint(Path(path))) from None
        raise SystemExit(
            f"cannot read {path}: {e.strerror}; a checkpoint comes from: python train.py"
        ) from None
    return {"model": state, "model_args": asdict(args), "config": {}}


def parse_cli(argv: list[str] | None) -> argparse.Namespace:
    cli = CommandLine(prog="export.py", description=__doc__)
    cli.add_argument("output", help="the file to write: .pt for a checkpoint, else a model for run.c")
    cli.add_argument(
        "--checkpoint", default="out/ckpt.pt", help="a .pt checkpoint or .bin model; default %(default)s"
    )
    cli.add_argument("--version", type=int, choices=HEADER_BYTES, help="layout, default 0")
    cli.add_argument("--group_size", type=int, help="v2: values that share a scale, default 64")
    args = cli.parse_args(argv)
    folder, name = os.path.split(args.output)
    if not name or os.path.isdir(args.output):
        cli.error(f"{args.output!r} is no file; name one, like {os.path.join(args.output, 'model.bin')}")
    if not os.path.isdir(folder or "."):
        raise SystemExit(f"there is no folder {folder}; run: mkdir -p {shlex.quote(folder)}")
    if name.endswith(OTHERS):
        cli.error(f"{name} cannot be written, only .pt (a checkpoint) and .bin (for run.c); name a .bin")
    if name.endswith(".pt") and os.path.exists(args.output):  # a model.bin can be made again, a run cannot
        cli.error(f"{args.output} is there already, and may be all there is of a run; name another file")
    if name.endswith(".pt") and args.version is not None:
        cli.error(f"--version={args.version} is for .bin files; leave it out, or name a .bin")
    args.version = args.version or 0
    if args.group_size is not None and args.version != 2:
        cli.error("--group_size is for int8; add --version=2, or leave it out")
    args.group_size = 64 if args.group_size is None else args.group_size
    if args.group_size < 1:
        cli.error(f"--group_size={args.group_size} must be at least 1")
    if os.path.exists(args.output) and os.path.exists(args.checkpoint):
        if os.path.samefile(args.output, args.checkpoint):
            cli.error(f"{args.output} is the model that is read; name another file")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_cli(argv)
    checkpoint = read_any(args.checkpoint)
    model = model_from_checkpoint(checkpoint, args.checkpoint)
    try:
        if args.output.endswith(".pt"):
            whole = {"model": model.state_dict(), "model_args": asdict(model.args)}
            save_checkpoint(args.output, checkpoint | whole)
            print(f"wrote {args.output}: {model.num_parameters():,} parameters")
            return
        error = write_bin(args.output, model.args, model.state_dict(), args.version, args.group_size)
    except (OSError, RuntimeError) as e:  # torch.save hides a full disk in a RuntimeError
        why = getattr(e, "strerror", None) or e
        raise SystemExit(f"cannot write {args.output}: {why}; free space, or name another file") from None
    note = ""
    if args.version == 3:
        note = f", largest error {error:.2g}"
    if args.version == 2:
        used = fit_group_size(model.args, args.group_size)
        note = f", groups of {used}" + (
            f" ({args.group_size} does not divide the rows)" * (used != args.group_size)
        )
        note += f", largest error {error:.2g}"
    print(f"wrote {args.output}: v{args.version}, {os.path.getsize(args.output):,} bytes{note}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
