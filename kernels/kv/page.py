"""What the bytes of a KV page mean. Engine, kernels, `inspect` and the documentation all take them from here.

A page is `page_size` tokens of one KV head in one run of bytes. Keys and values are rotated (rotation.py), then stored as

    x[t, d] = (code[t, d] - 2 ** (bits - 1)) * scale[t] + zero[t]  (+ mean[d], keys only)

with one scale and zero a token. The parts lie in this order, each a multiple of 16 bytes:

    codes_k     words of 16 bits, four 4-bit codes (two of 8 bits) each
    high_k      5-bit keys only: the fifth bits, 16 a word; codes_k has the lower four
    codes_v     as codes_k
    scales_k    [page_size] words of 32 bits: float16 scale in the low half, float16 zero in the high half
    scales_v    the same
    mean_k      [head_dim] float16
    row_scales  [2, sinks] words of 32 bits, as scales_k: first the keys', then the values'
    rows_k      [sinks, head_dim] bytes: the sequence's first tokens again in 8 bits, rotated, without the mean, in plain order
    rows_v      [sinks, v_head_dim] bytes

**Within a word** codes lie far apart, so that a word taken apart gives as many plain matrices: of C columns of words,

    4 bits   bits 4j..4j+3 of column c hold the code of d = c + j*C          C = head_dim / 4
    8 bits   bits 8j..8j+7                                                   C = head_dim / 2
    high     bit i of column h is bit 4 of the code in quarter i % 4 (j above) of column  (c' of h's lane, see below)

**Within a matrix of words** (page_size tokens x C columns) the order is that of a tensor core's register operand (mma.m16n8k16, wgmma alike),
where lane 4a + b of a warp holds rows a and a + 8 and columns 2b, 2b+1, 2b+8, 2b+9: each lane finds its own words in 16 consecutive
bytes, and a warp's 512 bytes are contiguous, a *block*. A block holds 8n tokens by 4w columns, where the w * n = 8 words of a lane are w columns of n tokens:

    keys     token 8n*g + 8*y + a,       column 4w*p + w*b + i          at word (((p*G + g)*8 + a)*4 + b)*8 + y*w + i
    values   token 8n*g + 8*y + 2b + e,  column 4w*p + (w/2)*a + i      at word (((p*G + g)*8 + a)*4 + b)*8 + y*w + 2i + e
             a < 8, b < 4, y < n, g < G = page_size / 8n, p < C / 4w;  i < w for keys, i < w/2 and e < 2 for values

Values are the operand transposed, so there two tokens are neighbours. w is the largest power of two up to 8 that divides C / 4: at head_dim
128 a block is 8 tokens x 32 columns of four codes. The order of a product's inner dimension and of its output rows is free: the kernels use
the columns in the order in which they come, and rename them where q is read and the output is written.

In 4-bit matrices C is padded to a multiple of 8 (head_dim 80 is stored as 96). The matrix of fifth bits follows the keys' formula with its own
w' and p': a lane's words of codes_k, counted u = w*p + i, are split in four runs of U/4 (U: their number, padded to a power of two), and

    bit 4j + q of the lane's word u' holds the fifth bit of quarter q of its word u = j*U/4 + u'
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
PAGE_SIZES = (64, 128)
MAX_SINKS = 16
LANE_WORDS = 8  # 16 bytes, what a lane loads at once


def _pow2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def batch_block(batch: int) -> int:
    """Length of the vectors in which a kernel holds something of each sequence of a batch: one of few, since each is a compilation."""
    block = 32
    while block < batch:
        block *= 4
    return block


@dataclass(frozen=True)
class Words:
    """A matrix of 16-bit words in a page: `tokens` x `columns`, for keys or values. See the top of this file."""

    tokens: int
    columns: int
    values: bool = False

    @property
    def w(self) -> int:
        """Words of one token (keys) that a lane holds side by side."""
        lane = self.columns // 4
        return min(lane & -lane, LANE_WORDS)

    @property
    def n(self) -> int:
        return LANE_WORDS // self.w

    @property
    def pieces(self) -> int:
        """Blocks side by side along the columns."""
        return self.columns // (4 * self.w)

    @property
    def groups(self) -> int:
        """Blocks along the tokens."""
        return self.tokens // (8 * self.n)

    @property
    def nbytes(self) -> int:
        return 2 * self.tokens * self.columns

    def index(self) -> Tensor:
        """int64 [tokens, columns]: the word where each token's column stands."""
        return _index(self)


@cache
def _index(m: Words) -> Tensor:
    t = torch.arange(m.tokens)[:, None]
    c = torch.arange(m.columns)[None, :]
    g, y = t // (8 * m.n), t // 8 % m.n
    p, c = c // (4 * m.w), c % (4 * m.w)
    if m.values:
        a, i = c // (m.w // 2), c % (m.w // 2)
        b, last = t % 8 // 2, 2 * i + t % 2
    else:
        a, b, last = t % 8, c // m.w, c % m.w
    return (((p * m.groups + g) * 8 + a) * 4 + b) * LANE_WORDS + y * m.w + last


@dataclass(frozen=True)
class Page:
    """One page: what is stored, and where.

    head_dim, v_head_dim   values a token has in K and in V
    page_size              tokens
    k_bits 4, 5 or 8; v_bits 4 or 8
    sinks                  tokens of the sequence whose rows are kept in 8 bits, 0 to 16
    mean, rotate           False only in ablations: keys are stored as they are; nothing is rotated
    """

    head_dim: int
    page_size: int
    k_bits: int
    v_bits: int
    sinks: int
    v_head_dim: int
    mean: bool = True
    rotate: bool = True

    def __str__(self) -> str:
        """The page in a word, for operators' schemas; `parse` is the inverse."""
        dims = f"{self.head_dim}" if self.v_head_dim == self.head_dim else f"{self.head_dim}/{self.v_head_dim}"
        plain = ("" if self.mean else ",nomean") + ("" if self.rotate else ",norot")
        return f"k{self.k_bits}v{self.v_bits},d{dims},p{self.page_size},s{self.sinks}{plain}"

    @staticmethod
    @cache
    def parse(text: str) -> "Page":
        """The page that `str` made the text of. Raises ValueError for another text."""
        found = re.fullmatch(r"k(\d+)v(\d+),d(\d+)(?:/(\d+))?,p(\d+),s(\d+)(,nomean)?(,norot)?", text)
        if not found:
            raise ValueError(f"no description of a KV page: {text!r}; one is k4v4,d128,p128,s4")
        k_bits, v_bits, dim, v_dim, size, sinks = (int(n) if n else None for n in found.groups()[:6])
        return Page(dim, size, k_bits, v_bits, sinks, v_dim or dim, not found[7], not found[8])

    @staticmethod
    def _columns(dim: int, bits: int) -> int:
        return dim // 2 if bits == 8 else -(-dim // 32) * 8

    @property
    def k(self) -> Words:
        return Words(self.page_size, self._columns(self.head_dim, self.k_bits))

    @property
    def v(self) -> Words:
        return Words(self.page_size, self._columns(self.v_head_dim, self.v_bits), values=True)

    @property
    def high(self) -> Words | None:
        """The fifth bits of keys; None unless they have 5."""
        return Words(self.page_size, _pow2(self.k.columns) // 4) if self.k_bits == 5 else None

    def parts(self) -> Iterator[tuple[str, int]]:
        """(name, bytes) of every part, in order."""
        yield "codes_k", self.k.nbytes
        yield "high_k", self.high.nbytes if self.high else 0
        yield "codes_v", self.v.nbytes
        yield "scales_k", 4 * self.page_size
        yield "scales_v", 4 * self.page_size
        yield "mean_k", 2 * self.head_dim if self.mean else 0
        yield "row_scales", -(-2 * 4 * self.sinks // 16) * 16
        yield "rows_k", self.sinks * self.head_dim
        yield "rows_v", self.sinks * self.v_head_dim

    @property
    def offsets(self) -> dict[str, int]:
        """The byte at which each part starts."""
        return dict(_offsets(self))

    @property
    def content_bytes(self) -> int:
        """Bytes that mean something."""
        return sum(n for _, n in self.parts())

    @property
    def nbytes(self) -> int:
        """Bytes of a page: a whole number a token, since engines count so, and a multiple of 16."""
        return -(-self.content_bytes // self.page_size) * self.page_size

    @property
    def bits_per_value(self) -> float:
        """All-in."""
        return 8 * self.nbytes / (self.page_size * (self.head_dim + self.v_head_dim))


@cache
def _offsets(page: Page) -> tuple[tuple[str, int], ...]:
    found, at = [], 0
    for name, size in page.parts():
        found.append((name, at))
        at += size
    return tuple(found)
