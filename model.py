"""The Llama: architecture, cached generation, checkpoint files; run it to sample text from a checkpoint.

    python model.py --checkpoint=out/ckpt.pt --start="Once upon a time" --num_samples=3

Parameter names and shapes are llama2.c's, so its checkpoints load here and ours load there.
Not for: training loops (train.py), other file formats (export.py), serving.
"""

import argparse
import glob
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import struct
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ModuleNotFoundError as e:
    raise SystemExit(
        f"{e.name} is not installed for Python {sys.version.split()[0]}; run: "
        ". .venv/bin/activate, or with 3.11 or newer: pip install -r requirements.txt"
    ) from None

# ----------------------------------------------------------------------------
# Configuration


def opt(default, text: str, **extra):
    """A dataclass field that carries its own help text, from which the command line is made."""
    return field(default=default, metadata={"help": text, **extra})


def check_numbers(config, **least: float) -> None:
    """ValueError for a number in a dataclass that is not finite, or below its least (0 where not named).

    TypeError for another thing in place of a named number, as anyone's checkpoint may hold it.
    """
    for f in fields(config):
        value, low = getattr(config, f.name), least.get(f.name, 0)
        if f.name in least and not isinstance(value, int | float | None):
            raise TypeError(f"{f.name}={value!r:.50} is no number")
        if isinstance(value, int | float) and not low <= value < math.inf:
            finite = "" if math.isfinite(value) else " and finite"
            raise ValueError(f"{f.name}={value} must be at least {low}{finite}")


MAX_SEQ_LEN = 2**24


@dataclass
class ModelArgs:
    """The shape of the network. Raises ValueError for a shape that cannot be built."""

    dim: int = opt(288, "width of the residual stream")
    n_layers: int = opt(6, "number of transformer blocks")
    n_heads: int = opt(6, "number of query heads")
    n_kv_heads: int | None = opt(
        None, "number of key/value heads; fewer than n_heads share them (default: n_heads)"
    )
    vocab_size: int = opt(32000, "number of token ids")
    hidden_dim: int | None = opt(None, "width of the feed-forward layer (default: 8/3 dim, rounded up)")
    multiple_of: int = opt(32, "round the default hidden_dim up to a multiple of this")
    norm_eps: float = opt(1e-5, "epsilon inside RMSNorm")
    max_seq_len: int = opt(256, "longest context, in tokens")
    dropout: float = opt(0.0, "dropout on embeddings and residual branches; never inside attention")
    rope_theta: float = opt(10000.0, "base of the rotary embedding's wavelengths")
    tie_embeddings: bool = opt(True, "share the weights of the embedding and the classifier")

    def __post_init__(self):
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        one = "dim n_layers n_heads n_kv_heads vocab_size hidden_dim multiple_of max_seq_len"
        check_numbers(self, **dict.fromkeys(one.split(), 1))
        if self.dim % (2 * self.n_heads):
            raise ValueError(
                f"dim={self.dim} must be a multiple of 2*n_heads={2 * self.n_heads} (rotary pairs)"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}")
        if self.dropout >= 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if not (0 < self.rope_theta < 1e38 and 0 < self.norm_eps < 1):  # what run.c and float32 can tell
            raise ValueError(
                f"rope_theta={self.rope_theta} must be in (0, 1e38), norm_eps={self.norm_eps} in (0, 1)"
            )
        if self.max_seq_len > MAX_SEQ_LEN:  # the rotary tables are made for all of it
            raise ValueError(f"max_seq_len={self.max_seq_len} must be at most {MAX_SEQ_LEN}")
        if self.hidden_dim is None:
            self.hidden_dim = -(-(8 * self.dim // 3) // self.multiple_of) * self.multiple_of

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    def num_parameters(self) -> int:
        """How many a Transformer of this shape has, known before it is built."""
        attention = 2 * self.dim * self.dim + 2 * self.dim * self.n_kv_heads * self.head_dim
        layer = attention + 3 * self.dim * self.hidden_dim + 2 * self.dim
        tables = 1 if self.tie_embeddings else 2
        return self.n_layers * layer + self.dim + tables * self.vocab_size * self.dim


# ----------------------------------------------------------------------------
# Layers. Shapes: B batch, T time, C dim, H query heads, K key/value heads, D head_dim, S cache slots.


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight (Zhang and Sennrich 2019), computed in fp32 whatever the input's type."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.float()  # written out, because the stock function costs three times as much on a single token
        return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def rope_table(head_dim: int, length: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position * theta^(-2i/head_dim), both (length, head_dim), every angle twice.

    Source: Su et al. 2021, RoFormer.
    """
    freqs = 1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
    angles = torch.outer(torch.arange(length), freqs).float()
    return angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs of x (B, T, heads, D); cos and sin broadcast to (B, T, heads, D)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, heads, D/2) each
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)  # x rotated by 90 degrees
    return (x * cos + turned * sin).type_as(x)  # cos and sin are fp32, and so is the sum


class NarrowCausalAttention(torch.autograd.Function):
    """Causal attention for narrow heads (D <= 16) on the CPU, twice as fast as the stock kernel.

    The stock CPU kernel visits the masked half too and multiplies matrices whose *output* is D wide, which
    BLAS does badly. Here a block of queries meets only the keys before its end, products are laid out with D
    as the rows, and the probabilities are kept rather than computed again (so the caller feeds few thousand
    tokens at a time).
    """

    BLOCK = 64

    @staticmethod
    def forward(ctx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q (N, T, G, D), k and v (N, T, D) with N = B*K and G = H/K; returns (N, T, G, D)."""
        N, T, G, D = q.shape
        block = NarrowCausalAttention.BLOCK
        # keys after the query, in the last block
        hidden = torch.full((block, block), -math.inf).triu_(1)[:, None]
        out, probs = torch.empty_like(q), []
        for i in range(0, T, block):
            j = min(i + block, T)
            # (N, (j-i)*G, j)
            scores = torch.bmm(q[:, i:j].reshape(N, -1, D) * D**-0.5, k[:, :j].transpose(1, 2))
            scores.view(N, j - i, G, j)[..., i:].add_(hidden[: j - i, :, : j - i])
            probs.append(scores.softmax(-1))
            mixed = torch.bmm(v[:, :j].transpose(1, 2), probs[-1].transpose(1, 2))  # (N, D, (j-i)*G)
            out[:, i:j] = mixed.transpose(1, 2).view(N, j - i, G, D)
        ctx.save_for_backward(q, k, v, *probs)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v, *probs = ctx.saved_tensors
        N, T, G, D = q.shape
        block, scale = NarrowCausalAttention.BLOCK, D**-0.5
        dq, dk, dv = torch.empty_like(q), q.new_zeros(N, D, T), q.new_zeros(N, D, T)
        for i, p in zip(range(0, T, block), probs, strict=True):
            j = min(i + block, T)
            g = grad[:, i:j].reshape(N, -1, D)
            dv[:, :, :j].baddbmm_(g.transpose(1, 2), p)
            dp = torch.bmm(g, v[:, :j].transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            dk[:, :, :j].baddbmm_(q[:, i:j].reshape(N, -1, D).transpose(1, 2), ds, alpha=scale)
            turned = torch.bmm(k[:, :j].transpose(1, 2), ds.transpose(1, 2)).mul_(scale)  # (N, D, (j-i)*G)
            dq[:, i:j] = turned.transpose(1, 2).view(N, j - i, G, D)
        return dq, dk.transpose(1, 2), dv.transpose(1, 2)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax(q k' / sqrt(D)) v over the past; q (B, T, H, D), k and v (B, T, K, D); returns (B, T, H, D)."""
    B, T, H, D = q.shape
    K = k.shape[2]
    if q.device.type == "cpu" and D <= 16 and q.dtype == torch.float32 and not torch.compiler.is_compiling():
        q = q.view(B, T, K, H // K, D).transpose(1, 2).reshape(B * K, T, H // K, D)
        k, v = (x.transpose(1, 2).reshape(B * K, T, D) for x in (k, v))
        out = NarrowCausalAttention.apply(q, k, v)
        return out.view(B, K, T, H // K, D).transpose(1, 2).reshape(B, T, H, D)
    # no explicit mask and no dropout: either would throw the kernel off its fast path
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, D)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H > K).transpose(1, 2)


class KVCache:
    """Keys and values of all layers for B rows of up to S tokens, and attention over them.

    Rows are padded on the left, so that every row writes the same slot: `start` (B,) is each row's first
    real slot. On the CPU they lie transposed, (D, S): batched products then go at twice the stock kernel's
    speed for one query per row.
    """

    def __init__(self, args: ModelArgs, start: list[int], slots: int, like: torch.Tensor):
        """start: padding of each row; slots: S; like: a tensor that has the wanted device and dtype."""
        self.transposed = like.device.type == "cpu"
        K, D = args.n_kv_heads, args.head_dim
        shape = (args.n_layers, len(start), K, *((D, slots) if self.transposed else (slots, D)))
        self.k, self.v = like.new_empty(shape), like.new_empty(shape)  # (layer, B, K, ...)
        self.weights: dict[tuple[nn.Linear, ...], torch.Tensor] = {}
        self.used, self.limit = 0, args.max_seq_len
        self.ragged = any(start)
        self.start = torch.tensor(start, device=like.device)

    def positions(self, T: int) -> torch.Tensor:
        """Positions of the next T slots, (B, T) or for rows all alike (1, T); padding counts as 0."""
        slots = torch.arange(self.used, self.used + T, device=self.start.device)[None]
        # a row that has ended may stay for a while, and its position then passes the context's end
        return (slots - self.start[:, None]).clamp(0, self.limit - 1) if self.ragged else slots

    def mask(self, T: int) -> torch.Tensor | None:
        """What the next T slots may see, (B, 1, T, used + T) bool; None if that is all before them."""
        if not self.ragged and (T == 1 or self.used == 0):
            return None
        slots = torch.arange(self.used + T, device=self.start.device)
        rows, cols = slots[self.used :, None], slots[None]
        real = cols >= self.start[:, None, None]  # (B, 1, S)
        return ((cols <= rows) & real | (cols == rows))[:, None]  # padding sees itself: no empty softmax

    def bias(self) -> torch.Tensor:
        """What one more token adds to its scores, (B * K, 1, used + 1): 0, or -inf for padding."""
        K = self.k.shape[2]
        slots = torch.arange(self.used + 1)
        hidden = torch.zeros(len(self.start), 1, self.used + 1)
        if self.ragged:
            hidden.masked_fill_((slots < self.start[:, None])[:, None], -math.inf)
        return hidden.repeat_interleave(K, 0)

    def attend(self, layer: int, q, k, v, mask: torch.Tensor | None) -> torch.Tensor:
        """Write k and v (B, T, K, D) behind what is there, and let q (B, T, H, D) see all so far.

        mask is what mask(T) gave, or for one token on the CPU what bias() gave. Returns (B, T, H, D).
        """
        B, T, H, D = q.shape
        K, end = k.shape[2], self.used + T
        if not self.transposed:
            self.k[layer, :, :, self.used : end] = k.transpose(1, 2)
            self.v[layer, :, :, self.used : end] = v.transpose(1, 2)
            k, v = self.k[layer, :, :, :end], self.v[layer, :, :, :end]
        else:
            self.k[layer, :, :, :, self.used : end] = k.permute(0, 2, 3, 1)
            self.v[layer, :, :, :, self.used : end] = v.permute(0, 2, 3, 1)
            if T == 1:
                k, v = (x[layer].view(B * K, D, -1)[:, :, :end] for x in (self.k, self.v))
                scores = torch.baddbmm(mask, q.reshape(B * K, H // K, D), k, alpha=D**-0.5)  # (B*K, H/K, end)
                out = torch.bmm(v, scores.softmax(-1).transpose(1, 2))  # (B*K, D, H/K)
                return out.transpose(1, 2).reshape(B, 1, H, D)
            k, v = (x[layer, :, :, :, :end].transpose(2, 3).contiguous() for x in (self.k, self.v))
        causal = mask is None and T > 1
        q = q.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=H > K).transpose(
            1, 2
        )

    def fused(self, *layers: nn.Linear) -> torch.Tensor:
        """fuse_weights, kept for as long as the cache lives: during generation the weights don't change."""
        if layers not in self.weights:
            self.weights[layers] = fuse_weights(*layers)
        return self.weights[layers]

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but these (indices)."""
        self.k, self.v, self.start = self.k[:, rows], self.v[:, rows], self.start[rows]


def fuse_weights(*layers: nn.Linear) -> torch.Tensor:
    """Stack the weights of layers with the same input: one wide product beats several narrow ones."""
    return torch.cat([layer.weight for layer in layers])


def project(x: torch.Tensor, layers: tuple[nn.Linear, ...], fused: bool, cache: KVCache | None):
    """All layers' outputs side by side. fused: by one product, whose weights training keeps a copy of."""
    if cache is None and not fused:
        return torch.cat([layer(x) for layer in layers], -1)
    return F.linear(x, cache.fused(*layers) if cache else fuse_weights(*layers))


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    fused = True  # False where copies of weights are too much, in models that are split over ranks

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.heads = args.n_heads, args.n_kv_heads, args.head_dim
        self.wq = nn.Linear(args.dim, args.dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.dim, args.dim, bias=False)

    def forward(self, x, cos, sin, cache: KVCache | None = None, layer: int = 0, mask=None) -> torch.Tensor:
        B, T, C = x.shape
        H, K, D = self.heads
        qkv = project(x, (self.wq, self.wk, self.wv), self.fused, cache).view(B, T, H + 2 * K, D)
        q, k = apply_rope(qkv[:, :, : H + K], cos, sin).split([H, K], dim=2)
        v = qkv[:, :, H + K :]
        if cache is None:
            out = causal_attention(q, k, v)  # (B, T, H, D)
        else:
            out = cache.attend(layer, q, k, v, mask)
        return self.wo(out.reshape(B, T, C))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (Shazeer 2020)."""

    fused = True  # as in Attention

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        gate, up = project(x, (self.w1, self.w3), self.fused, cache).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x, cos, sin, cache: KVCache | None = None, layer: int = 0, mask=None) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin, cache, layer, mask))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x), cache))


class Transformer(nn.Module):
    """The Llama: tokens (B, T) in, logits (B, T, vocab_size) out."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.dropout = nn.Dropout(args.dropout)
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.reset_rope()
        self.reset_parameters()

    def reset_rope(self) -> None:
        """Compute the rotary tables, which are no part of checkpoints, on the CPU."""
        cos, sin = rope_table(self.args.head_dim, self.args.max_seq_len, self.args.rope_theta)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def reset_parameters(self) -> None:
        """N(0, 0.02); as in GPT-2, the projections into the residual stream (wo, w2) are drawn from
        N(0, 0.02 / sqrt(2 n_layers)).
        """
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                residual = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.args.n_layers) if residual else 0.02)

    def features(self, tokens: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Hidden states after the last norm, (B, T, dim); with a cache, tokens (B, T) follow what is cached.

        Raises ValueError for more than max_seq_len tokens.
        """
        T = tokens.shape[1]
        if T > self.args.max_seq_len:
            raise ValueError(f"{T} tokens; the model takes {self.args.max_seq_len}")
        x = self.dropout(self.tok_embeddings(tokens))
        if cache is None:
            cos, sin, mask = self.rope_cos[:T, None], self.rope_sin[:T, None], None
        else:
            pos, mask = cache.positions(T), cache.bias() if cache.transposed and T == 1 else cache.mask(T)
            cos, sin = self.rope_cos[pos][:, :, None], self.rope_sin[pos][:, :, None]
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, cache, i, mask)
        if cache is not None:
            cache.used += T
        return self.norm(x)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None):
        """Returns (logits, loss): logits (B, T, vocab_size); loss is the mean negative log-likelihood in
        nats of targets (B, T), those equal to -1 left out, or None without targets.
        """
        logits = self.output(self.features(tokens))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Forward and backward at full context: 6 per weight, 12 L dim T for attention (PaLM, app. B)."""
        a = self.args
        return 6 * self.num_parameters() + 12 * a.n_layers * a.dim * a.max_seq_len


# ----------------------------------------------------------------------------
# Generation


def sample(logits: torch.Tensor, u: torch.Tensor, temperature=1.0, top_k=0, top_p=1.0) -> torch.Tensor:
    """Draw one id per row of logits (B, V) by inverse transform of u (B,), uniform in [0, 1); returns (B,).

    temperature 0 is argmax; top_k 0 and top_p 1 are off; top_p keeps the fewest ids whose probability
    exceeds it.
    """
    if temperature < 1e-30:  # 0, or so little that the quotients below would be infinite
        return logits.argmax(-1)
    logits, ids = logits.float() / temperature, None
    if 0 < top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k)
    elif 0 < top_p < 1:
        logits, ids = logits.sort(descending=True)
    # in whole numbers, whose sums are exact and on every device, in any order, the same
    weights = (logits.softmax(-1) * 2**38).long()
    cdf = weights.cumsum(-1)
    if 0 < top_p < 1:
        cdf = (weights * (cdf - weights <= int(top_p * 2**38))).cumsum(-1)
    # the first id whose sum is above u * total; u has 24 bits, and so all of it stays in whole numbers
    point = (u * 2**24).long()[:, None] * cdf[:, -1:]
    choice = torch.searchsorted(cdf * 2**24, point, right=True)
    choice = choice.clamp(max=cdf.shape[-1] - 1)  # of NaN some id
    return (choice if ids is None else ids.gather(-1, choice)).squeeze(-1)


@torch.inference_mode()
def decode(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> list[list[int]]:
    """Continue prompts (ids, of any lengths >= 1) by what choose picks; returns the new ids.

    choose(rows, features) gets the indices of the prompts still in the batch, (B,) on the CPU, and their
    last hidden states, (B, dim), and returns an id for each, (B,). A row ends with the first id of stop_ids
    (kept in the result), after max_new_tokens, or when prompt and new ids fill max_seq_len; rows that have
    ended are dropped from the batch now and then, and what they are given until then is ignored. Raises
    ValueError for an empty prompt or one longer than max_seq_len.
    """
    device, limit = model.rope_cos.device, model.args.max_seq_len
    for prompt in prompts:
        if not 1 <= len(prompt) <= limit:
            raise ValueError(f"a prompt of {len(prompt)} tokens; the model takes 1 to {limit}")
    room = torch.tensor([min(max_new_tokens, limit - len(prompt)) for prompt in prompts])
    if not prompts or max(room) < 1:
        return [[] for _ in prompts]
    width = max(map(len, prompts))
    start = [width - len(prompt) for prompt in prompts]
    tokens = torch.tensor([[0] * pad + list(p) for pad, p in zip(start, prompts, strict=True)], device=device)
    cache = KVCache(model.args, start, width + int(room.max()), model.tok_embeddings.weight)
    stops = torch.tensor(stop_ids, device=device)
    new = torch.zeros(len(prompts), int(room.max()), dtype=torch.long)
    length = room.clone()  # of each row's new ids, once it has met a stop id
    rows, step = torch.arange(len(prompts)), 0  # row r of the batch is prompt rows[r]
    training = model.training
    model.eval()
    try:
        while True:
            ids = choose(rows, model.features(tokens, cache)[:, -1])
            new[rows, step] = ids.cpu()
            step += 1
            ended = torch.isin(ids, stops).cpu() & (length[rows] > step)
            length[rows[ended]] = step
            alive = length[rows] > step
            count = int(alive.sum())
            if not count:
                return [ids[:n] for ids, n in zip(new.tolist(), length.tolist(), strict=True)]
            if count <= 0.8 * len(rows):  # dropping rows copies the cache: not at every ending
                index = alive.nonzero()[:, 0]
                cache.keep(index.to(device))
                rows, ids = rows[index], ids[index.to(device)]
            tokens = ids[:, None]
    finally:
        model.train(training)


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_ids: Sequence[int] = (1, 2),
    generator: torch.Generator | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continue prompts as decode does, each with its own random numbers; returns the new ids.

    on_token(row, id) is called for each id that is drawn, and those of a row that has ended are no part of
    its text. The generator lives on the CPU.
    """

    def choose(rows: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        # one draw per prompt and step, ended or not: a row's text does not depend on when others end
        u = torch.rand(len(prompts), generator=generator)[rows].to(features.device)
        ids = sample(model.output(features), u, temperature, top_k, top_p)
        if on_token:
            for row, token in zip(rows.tolist(), ids.tolist(), strict=True):
                on_token(row, token)
        return ids

    return decode(model, prompts, max_new_tokens, stop_ids, choose)


# ----------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(path: str | os.PathLike, checkpoint: dict) -> None:
    """Write a dict of tensors and plain values; a killed run leaves the old file or the new one."""
    from tokenizer import atomic_write

    with atomic_write(os.fspath(path)) as f:
        torch.save(checkpoint, f)


RESTORE = "put a whole copy in its place, or train into another --out_dir"


def no_checkpoint(path: Path) -> str:
    """That there is none at path, and what to do about it."""
    if path.is_dir():
        return f"{path} is a folder, no checkpoint; name a file in it, like {path / 'ckpt.pt'}"
    how = {"ckpt.pt": "", "last.pt": "", "ppo_ckpt.pt": " --init_from=resume --ppo"}.get(path.name)
    if how is None:
        return f"no checkpoint at {path}; check the name, or make out/ckpt.pt: python train.py"
    folder = shlex.quote(str(path.parent))
    return f"no checkpoint at {path}; to make one, run: python train.py --out_dir={folder}{how}"


def fault(e: Exception) -> str:
    """Why a checkpoint was refused, in one line, in place of torch's advice to run what is in it."""
    from tokenizer import printable

    if "Weights only load failed" not in str(e):
        return printable(" ".join(str(e).split())[:200] or type(e).__name__)
    code = re.search(r"GLOBAL ([\w.]+)", str(e))
    return f"it would run code ({code[1]})" if code else "it holds something else than weights"


def begins_checkpoint(start: bytes) -> bool:
    """Whether a file that begins so, with 4 bytes or fewer, may be a zip archive or a pickle of torch.save.

    A model.bin v0 begins with its dim: \x80\x00\x00\x00 for 128, \x80\x02\x00\x00 for 640.
    """
    zipped = b"PK".startswith(start[:2])
    return zipped or start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05" and start[2:4] != b"\0\0"


def load_checkpoint(path: str | os.PathLike, lazily: bool = False, check: bool = True) -> dict:
    """Read a checkpoint of train.py or of llama2.c onto the CPU; code hidden in a pickle is refused.

    A folder of save_sharded is read whole, too. lazily: tensors stay on the disk until they are used (those
    of such a folder are left out). check: look for damage by the checksums. Raises SystemExit, in one line,
    for a file that is missing, damaged or something else.
    """
    path = Path(path)
    if path.suffix == SHARDED and path.is_dir():
        return load_sharded(path, lazily, check)
    if not path.is_file():
        raise SystemExit(no_checkpoint(path))
    try:
        with open(path, "rb") as f:
            start = f.read(4)
    except OSError as e:
        raise SystemExit(f"cannot read {path}: {e.strerror}; {RESTORE}") from None
    if not begins_checkpoint(start):
        raise SystemExit(
            f"{path} is no checkpoint; if it is a model for run.c, convert it: "
            f"python export.py ckpt.pt --checkpoint={shlex.quote(str(path))}"
        )
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped and check:
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # torch.load itself lets a flipped bit pass
                    raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped and lazily)
    except (
        RuntimeError,
        LookupError,
        AssertionError,
        struct.error,
        AttributeError,
        TypeError,
        ValueError,
        EOFError,
        OSError,
        zlib.error,
        zipfile.BadZipFile,
        pickle.UnpicklingError,
    ) as e:  # whatever a damaged archive leads its readers into
        raise SystemExit(f"{path} cannot be read as a checkpoint: {fault(e)}; {RESTORE}") from None
    parts = {"config": {}} | checkpoint if isinstance(checkpoint, dict) else {}
    parts = [parts.get(key) for key in ("model", "model_args", "config")]
    if not all(isinstance(part, dict) and all(isinstance(key, str) for key in part) for part in parts):
        raise SystemExit(f"{path} holds no model and model_args; name a checkpoint of train.py")
    if not isinstance(checkpoint.get("iter_num", 0), int):
        raise SystemExit(f"{path} tells no iteration, but {type(checkpoint['iter_num'])}; {RESTORE}")
    return checkpoint


# A model that is split over ranks (FSDP) is saved as a folder NAME.dcp: torch.distributed.checkpoint's files
# with the tensors, each rank's written by itself, and rest.pt with all else and the files' checksums.

SHARDED = ".dcp"


def moments(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The tensors of an optimizer's state under flat names, those of no step yet being zero."""
    tensors = {}
    params = [(p, group.get("fused")) for group in optimizer.param_groups for p in group["params"]]
    for i, (p, fused) in enumerate(params):
        if not (state := optimizer.state[p]):  # as AdamW makes them
            state["step"] = torch.zeros((), device=p.device if fused else "cpu")
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        tensors |= {f"optimizer/{i}/{key}": value for key, value in state.items()}
    return tensors


def shards(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Weights and moments under flat names; tied weights come once."""
    weights = model.state_dict()  # which also makes sure that they are split just now
    return {f"model/{name}": weights[name] for name, _ in model.named_parameters()} | moments(optimizer)


def save_sharded(path: str, tensors: dict[str, torch.Tensor], rest: dict) -> None:
    """Write what shards() gives, and plain values, as the folder `path`; all ranks call it.

    It appears whole or not at all. Raises OSError or RuntimeError, as torch.save.
    """
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    tmp, rank = path + ".tmp", dist.get_rank()
    if rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)
    dist.barrier()
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(tmp))
    except CheckpointException as e:  # no Exception, but a BaseException
        raise RuntimeError("; ".join(str(failure[0]) for failure in e.failures.values())) from None
    names = (f"__{rank}_", ".metadata") if rank == 0 else f"__{rank}_"
    ours = [name for name in os.listdir(tmp) if name.startswith(names)]
    sums = [None] * dist.get_world_size()
    dist.all_gather_object(sums, {name: crc_of(os.path.join(tmp, name)) for name in ours})
    if rank == 0:
        sums = {name: crc for part in sums for name, crc in part.items()}
        save_checkpoint(os.path.join(tmp, "rest.pt"), rest | {"model": {}, "crc32": sums})
        old = set_aside(path) if os.path.exists(path) else None  # of the same iteration
        os.replace(tmp, path)
        if old:
            shutil.rmtree(old)
    dist.barrier()


def crc_of(path: str | os.PathLike) -> int:
    crc = 0
    with open(path, "rb") as f:
        while piece := f.read(1 << 20):
            crc = zlib.crc32(piece, crc)
    return crc


def sharded_reader(path: str | os.PathLike, rest: dict, check: bool = True):
    """A reader of a folder of save_sharded. check: see first by the checksums whether its files are whole.

    Raises SystemExit for damage, and for an index that holds anything but an index: it is a pickle.
    """
    from torch.distributed.checkpoint import FileSystemReader

    class Index(pickle.Unpickler):
        ALLOWED = {
            "torch.distributed.checkpoint.metadata": (
                "Metadata MetadataIndex StorageMeta TensorStorageMetadata TensorProperties "
                "ChunkStorageMetadata _MEM_FORMAT_ENCODING"
            ),
            "torch.distributed.checkpoint.filesystem": "_StorageInfo",
            "torch.serialization": "_get_layout",
            "torch": "Size float32 bfloat16 float16 float64 int64",
            "pathlib": "PosixPath WindowsPath PurePosixPath",
        }

        def find_class(self, module: str, name: str):
            if name not in self.ALLOWED.get(module, "").split():
                raise pickle.UnpicklingError(f"its index asks for {module}.{name}")
            return super().find_class(module, name)

    class Reader(FileSystemReader):
        def read_metadata(self, *args, **kwargs):
            with open(os.path.join(path, ".metadata"), "rb") as f:
                return Index(f).load()

    try:
        if not isinstance(rest["optimizer"], dict):
            raise TypeError("no optimizer")
        for name, crc in rest["crc32"].items():
            if name != os.path.basename(name):
                raise ValueError(f"{name} is no file in it")
            # the index always: its pickle is loaded next
            if (check or name == ".metadata") and crc_of(os.path.join(path, name)) != crc:
                raise ValueError(f"the checksum of {name} is wrong")
        reader = Reader(path)
        files = {info.relative_path for info in reader.read_metadata().storage_data.values()}
        if not files <= rest["crc32"].keys():
            raise ValueError("its index names other files")
    except (
        OSError,
        LookupError,
        ValueError,
        AttributeError,
        TypeError,
        EOFError,
        pickle.UnpicklingError,
    ) as e:
        raise SystemExit(f"{path} cannot be read as a checkpoint: {fault(e)}; {RESTORE}") from None
    return reader


def load_sharded(path: str | os.PathLike, lazily: bool = False, check: bool = True) -> dict:
    """The whole checkpoint of a folder of save_sharded, in one process; lazily, all but the tensors."""
    import torch.distributed.checkpoint as dcp

    rest = load_checkpoint(os.path.join(path, "rest.pt"))
    reader = sharded_reader(path, rest, check)
    if lazily:
        return rest
    described = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(info.size, dtype=info.properties.dtype) for name, info in described.items()}
    with warnings.catch_warnings():  # that it is one process which reads is meant so
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    moments: dict[int, dict] = {}
    for name, tensor in tensors.items():
        kind, _, name = name.partition("/")
        if kind == "model":
            rest["model"][name] = tensor
        else:
            index, _, key = name.partition("/")
            moments.setdefault(int(index), {})[key] = tensor
    rest["optimizer"] = rest["optimizer"] | {"state": moments}
    if rest["model_args"]["tie_embeddings"]:
        rest["model"]["output.weight"] = rest["model"]["tok_embeddings.weight"]
    return rest


def numbered(folder: str, stem: str) -> list[tuple[int, str]]:
    """Iterations and paths of the states STEM-ITERATION.pt or .dcp in a folder, the oldest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    found = [m for m in (re.fullmatch(rf"{stem}-(\d+)\.(pt|dcp)", name) for name in names) if m]
    return sorted((int(m[1]), os.path.join(folder, m[0])) for m in found)


def state_paths(folder: str, stem: str) -> list[str]:
    """Paths of all states of a run in a folder: STEM.pt, the newest, and the numbered ones."""
    newest = os.path.join(folder, stem + ".pt")
    return [newest] * os.path.exists(newest) + [path for _, path in numbered(folder, stem)]


def save_state(folder: str, stem: str, checkpoint: dict, keep: int = 1, tensors: dict | None = None) -> None:
    """Write STEM.pt; or, given the tensors of a split model, STEM-ITERATION.dcp, which all ranks do together.

    The states before it are STEM-ITERATION.pt or .dcp; in all, the `keep` newest are kept, and older ones go
    once the new one is there.
    """
    newest, writer = os.path.join(folder, stem + ".pt"), True
    if tensors is not None:
        import torch.distributed as dist

        writer = dist.get_rank() == 0
    if writer:
        for cut in glob.glob(os.path.join(glob.escape(folder), f"{stem}-*{SHARDED}.*")):
            shutil.rmtree(cut)
        if os.path.exists(newest) and (keep > 1 or tensors is not None):
            try:
                number = load_checkpoint(newest, lazily=True, check=False).get("iter_num", 0)
                if tensors is not None or number != checkpoint["iter_num"]:  # else it is replaced by its like
                    os.replace(newest, os.path.join(folder, f"{stem}-{number:08d}.pt"))
            except SystemExit:  # damaged: this run went on from another
                os.remove(newest)
    if tensors is None:
        save_checkpoint(newest, checkpoint)
    else:
        save_sharded(
            os.path.join(folder, f"{stem}-{checkpoint['iter_num']:08d}{SHARDED}"), tensors, checkpoint
        )
    if writer:
        states = numbered(folder, stem)
        # of more iterations: damaged, or this run would have gone on from it
        past = [path for number, path in states if number <= checkpoint["iter_num"]]
        kept = past[max(0, len(past) - (keep - (tensors is None))) :]
        for _, path in states:
            if path not in kept:
                discard(path)


def discard(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(set_aside(path))  # half a folder must not bear a state's name
    else:
        os.remove(path)


def set_aside(path: str) -> str:
    """Rename a state's folder to what no state is called; returns that."""
    old = path + ".old"
    shutil.rmtree(old, ignore_errors=True)
    os.replace(path, old)
    return old


def newest_state(paths: Sequence[str], lazily: bool = False) -> tuple[str, dict]:
    """Path and content of the state of the highest iteration; damaged ones are named and passed over.

    Those without moments, which go on less well, come last. Raises SystemExit if none is whole.
    """
    states, failures = [], []
    for path in paths:
        try:
            state = load_checkpoint(path, lazily=True, check=False)
            moments = path.endswith(SHARDED) or bool((state.get("optimizer") or {}).get("state"))
            states.append((moments, state.get("iter_num", 0), path))
        except SystemExit as e:
            failures.append(e)
    for *_, path in sorted(states, key=lambda state: (not state[0], -state[1])):
        try:
            newest = load_checkpoint(path, lazily)
        except SystemExit as e:
            failures.append(e)
            continue
        for failure in failures:
            print(f"{failure}; passed over, {path} is taken", file=sys.stderr)
        return path, newest
    raise failures[0]


def fill_shards(
    path: str | os.PathLike, rest: dict, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Read a folder of save_sharded into a model and optimizer that are split, over any number of ranks."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    reader = sharded_reader(path, rest, check=False)  # newest_state or load_checkpoint has done so
    try:
        dcp.load(shards(model, optimizer), storage_reader=reader)
    except CheckpointException as e:
        why = fault(next(iter(e.failures.values()))[0])
        raise SystemExit(f"{path} does not hold this model's state ({why}); {RESTORE}") from None


def model_from_checkpoint(
    checkpoint: dict, path: str | os.PathLike = "checkpoint", empty: bool = False, **changes
) -> Transformer:
    """The checkpoint's network in fp32 on the CPU, every weight accounted for; changes override model_args.

    empty: without weights, on the meta device. Raises SystemExit if names or shapes do not fit; path only
    names the culprit.
    """
    state = dict(checkpoint["model"])
    for prefix in ("module.", "_orig_mod."):  # left by DDP and torch.compile in other people's checkpoints
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    args = dict(checkpoint["model_args"])
    if "tie_embeddings" not in args:
        embedding, output = state.get("tok_embeddings.weight"), state.get("output.weight")
        args["tie_embeddings"] = output is None or (embedding is not None and torch.equal(embedding, output))
    if args["tie_embeddings"] and "tok_embeddings.weight" in state:
        state["output.weight"] = state["tok_embeddings.weight"]
    if unknown := args.keys() - {f.name for f in fields(ModelArgs)}:
        names = fault(ValueError(", ".join(sorted(unknown))))
        raise SystemExit(f"{path} has model_args this version does not know: {names}; update the program")
    try:
        shape, held = ModelArgs(**args), sum(w.numel() for w in state.values())
        if not empty and shape.num_parameters() > held:  # before memory is taken for what is not there
            raise ValueError(f"it has {held:,} numbers of {shape.num_parameters():,}")
        with torch.device("meta" if empty else "cpu"):
            model = Transformer(ModelArgs(**args | changes))
        if not empty:
            model.load_state_dict(state)
    except (ValueError, TypeError, AttributeError, RuntimeError) as e:
        raise SystemExit(f"{path} does not hold the model it describes: {fault(e)}; {RESTORE}") from None
    return model


def pick_device(name: str = "auto") -> str:
    """auto is cuda, then mps, then cpu. Raises SystemExit for a device this machine does not have."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(
        kind, 0
    )
    known = re.fullmatch(r"[a-z]+(:(0|[1-9][0-9]{0,3}))?", name)
    if not known or int(index or 0) >= count:
        raise SystemExit(f"no device {name!r} here; try --device={pick_device()}")
    return name


# ----------------------------------------------------------------------------
# Command line: sample from a checkpoint


def find_tokenizer(checkpoint: dict, checkpoint_path: str, named: str | None = None, strict: bool = False):
    """The checkpoint's Tokenizer: the named one, else the one train.py used, else one beside it; or, where
    nothing says which it was trained with, first one beside it or in its folder's data/.

    A wrong one is only warned of, unless strict, which takes that of the data first.
    """
    from tokenizer import Tokenizer, tokenizer_path

    config, size = checkpoint.get("config", {}), checkpoint["model_args"]["vocab_size"]
    source = 0 if config.get("vocab_source", "llama2" if size == 32000 else "custom") == "llama2" else size
    usual = tokenizer_path(config.get("data_dir", "data"), source)
    beside = os.path.join(os.path.dirname(checkpoint_path), os.path.basename(usual))
    in_data = os.path.join(os.path.dirname(checkpoint_path), "data", os.path.basename(usual))
    usual_first = strict or "tokenizer_sha256" in config
    places = [usual, beside] if usual_first else [beside, in_data, usual]
    path = named or next(filter(os.path.exists, places), usual)
    if source and "tokenizer_sha256" not in config and not os.path.exists(path):  # a new one has other pieces
        raise SystemExit(f"no tokenizer {path}; put the one there that {checkpoint_path} was trained with")
    tokenizer = Tokenizer(path)
    wrong, back = None, "put that one back"
    if tokenizer.vocab_size != size:
        wrong = (
            f"{tokenizer.model_path} has {tokenizer.vocab_size} pieces and the model {size}: "
            f"the text will be noise; it was trained with one like {usual}"
        )
    elif (sha256 := config.get("tokenizer_sha256", tokenizer.sha256)) != tokenizer.sha256:
        wrong = f"{tokenizer.model_path} is not the tokenizer this model was trained with"
        back = tokenizer.put_back(sha256)
    strict = strict or tokenizer.vocab_size < size  # it has no text for some of the ids
    if wrong and strict:
        raise SystemExit(f"{wrong}; {back}")
    if wrong:
        print(f"warning: {wrong}; {back}", file=sys.stderr)
    return tokenizer


def showable(text: str) -> str:
    """text without the control characters that a terminal would obey, as run.c prints it."""
    return re.sub(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]", "", text)


class TextStream:
    """Prints a growing list of ids as text, each character once it is whole."""

    def __init__(self, tokenizer, ids: list[int]):
        self.tokenizer, self.ids, self.shown = tokenizer, list(ids), 0

    def __call__(self, row: int, token: int) -> None:
        self.ids.append(token)
        # bytes still waiting for the rest of a character
        text = self.tokenizer.decode(self.ids).rstrip("\ufffd")
        print(showable(text[self.shown :]), end="", flush=True)
        self.shown = len(text)


def parse_cli(argv: list[str] | None) -> argparse.Namespace:
    from tokenizer import CommandLine

    cli = CommandLine(prog="model.py", description=__doc__)
    add = cli.add_argument
    add("--checkpoint", default="out/ckpt.pt", help="default: %(default)s")
    add("--start", default="", help="beginning of the text, or FILE:path to read it from a file")
    add("--num_samples", type=int, default=1, help="how many texts, default 1")
    add("--max_new_tokens", type=int, default=0, help="default: up to the model's max_seq_len")
    add("--temperature", type=float, default=1.0, help="0 takes the likeliest token, default 1.0")
    add("--top_k", type=int, default=0, help="sample from the k likeliest tokens only, default off")
    add(
        "--top_p",
        type=float,
        default=1.0,
        help="sample from the likeliest with this much probability, default off",
    )
    add("--tokenizer", help="tokenizer .model; default: the one the checkpoint was trained with")
    add("--seed", type=int, default=1337, help="same seed, same text; default 1337")
    add("--device", default="auto", help="auto|cpu|cuda|cuda:N|mps, default auto")
    args = cli.parse_args(argv)
    for name, low, high in (
        ("temperature", 0, 1e9),
        ("num_samples", 1, 2**31),
        ("max_new_tokens", 0, 2**31),
        ("top_k", 0, 2**31),
        ("top_p", 0, 1),
        ("seed", 0, 2**63 - 1),
    ):
        if not low <= getattr(args, name) <= high:
            cli.error(f"--{name}={getattr(args, name)} must be from {low} to {high:.10g}")
    return args


def read_start(start: str) -> str:
    from tokenizer import whole

    if not start.startswith("FILE:"):
        # bytes of a shell's that are not UTF-8 come as surrogates, which cannot be printed
        return whole(start)
    try:
        return Path(start[5:]).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else f"not UTF-8 ({e.reason})"
        raise SystemExit(f"--start={start}: {why}; name a text file, or write the text itself") from None


def main(argv: list[str] | None = None) -> None:
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the program, as it does any other
    args = parse_cli(argv)
    start = read_start(args.start)
    device = pick_device(args.device)
    checkpoint = load_checkpoint(args.checkpoint)
    model = model_from_checkpoint(checkpoint, args.checkpoint).to(device).eval()
    tokenizer = find_tokenizer(checkpoint, args.checkpoint, args.tokenizer)
    prompt = tokenizer.encode(start, bos=True)
    limit = model.args.max_seq_len
    if len(prompt) >= limit or max(prompt) >= model.args.vocab_size:
        raise SystemExit(
            f"--start is {len(prompt)} tokens up to id {max(prompt)}; this model takes fewer than {limit} "
            f"tokens of ids below {model.args.vocab_size}; shorten it, or name another --tokenizer"
        )
    stream = TextStream(tokenizer, prompt) if args.num_samples == 1 else None
    if stream:
        print(start, end="")
        stream.shown = len(tokenizer.decode(prompt))
    began = time.perf_counter()
    samples = generate(
        model,
        [prompt] * args.num_samples,
        args.max_new_tokens or limit,
        args.temperature,
        args.top_k,
        args.top_p,
        generator=torch.Generator().manual_seed(args.seed),
        on_token=stream,
    )
    seconds = time.perf_counter() - began
    if stream:
        print()
    else:
        print("\n---------------\n".join(showable(tokenizer.decode(prompt + ids)) for ids in samples))
    print(f"{sum(map(len, samples)) / seconds:.0f} tok/s", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
