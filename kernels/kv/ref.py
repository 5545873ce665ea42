"""Writing and reading pages, in float32 torch: the definition of the kernels in this folder, and what runs on a CPU.

Let x be a token's rotated key (less its page's mean) or rotated value. With b bits and half = 2 ** (b - 1),

    scale = (max x - min x) / (2 ** b - 1)      zero = min x + half * scale             both rounded to float16
    code  = clamp(floor((x - zero) / scale + half + 1/2), 0, 2 ** b - 1)                code = half where scale is 0

**The mean of a page** is set by the write that holds the token at offset 0 of it: the mean of that write's rotated keys in the page, sinks
left out, where there are at least MEAN_TOKENS of them; otherwise the mean of the sequence's previous page; otherwise zero. It is kept in
float16 and does not change afterwards, so tokens that follow are encoded against the mean that is there.
"""

import torch
from torch import Tensor

from qplugins.kernels.kv.page import Page, Words
from qplugins.kernels.kv.rotation import rotate

MEAN_TOKENS = 16


# ---- one token's values <-> codes, scale and zero


def encode(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [..., D] -> codes int32 [..., D], scale and zero float16 [..., 1]."""
    half, top = 1 << bits - 1, (1 << bits) - 1
    low, high = x.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / top).clamp(max=65504).to(torch.float16)
    zero = (low + half * scale.to(torch.float32)).clamp(-65504, 65504).to(torch.float16)
    s = scale.to(torch.float32)
    steps = torch.where(s > 0, (x - zero.to(torch.float32)) / s, 0)
    return (steps + half + 0.5).floor().clamp(0, top).to(torch.int32), scale, zero


def decode(codes: Tensor, bits: int, scale: Tensor, zero: Tensor) -> Tensor:
    """The inverse: float32 [..., D]."""
    return (codes - (1 << bits - 1)).to(torch.float32) * scale.to(torch.float32) + zero.to(torch.float32)


def _pair(scale: Tensor, zero: Tensor) -> Tensor:
    """float16 [..., 1] twice -> int32 [...], scale in the low half."""
    return torch.cat((scale, zero), -1).view(torch.int32)[..., 0]


def _unpair(pairs: Tensor) -> tuple[Tensor, Tensor]:
    both = pairs[..., None].view(torch.float16)
    return both[..., :1], both[..., 1:]


# ---- codes <-> words (page.py)


def to_words(codes: Tensor, bits: int, m: Words) -> Tensor:
    """Codes int32 [..., D] of 4 or 8 bits -> words int16 [..., C]."""
    per = 16 // bits
    spread = torch.nn.functional.pad(codes, (0, per * m.columns - codes.shape[-1])).unflatten(-1, (per, m.columns))
    return sum(spread[..., j, :] << bits * j for j in range(per)).to(torch.int16)


def from_words(words: Tensor, bits: int, dim: int) -> Tensor:
    """The inverse: int32 [..., D]."""
    w = words.to(torch.int32)
    return torch.cat([w >> bits * j & (1 << bits) - 1 for j in range(16 // bits)], -1)[..., :dim]


def _lanes(x: Tensor, m: Words) -> Tensor:
    """[..., C] -> [..., 4, C / 4]: each lane's columns, in the order u = w*p + i."""
    return x.unflatten(-1, (m.pieces, 4, m.w)).transpose(-3, -2).flatten(-2)


def _unlanes(x: Tensor, m: Words) -> Tensor:
    return x.unflatten(-1, (m.pieces, m.w)).transpose(-3, -2).flatten(-3)


def to_high(codes: Tensor, page: Page) -> Tensor:
    """Codes int32 [..., D] of 5 bits -> the words int16 of their fifth bits."""
    m, high = page.k, page.high
    fifth = torch.nn.functional.pad(codes >> 4, (0, 4 * m.columns - codes.shape[-1])).unflatten(-1, (4, m.columns))
    lanes = _lanes(fifth, m)  # [..., quarter, 4, U]
    runs = torch.nn.functional.pad(lanes, (0, high.columns - m.columns // 4)).unflatten(-1, (4, high.columns // 4))
    words = sum(runs[..., q, :, j, :] << 4 * j + q for q in range(4) for j in range(4))
    return _unlanes(words, high).to(torch.int16)


def from_high(words: Tensor, page: Page) -> Tensor:
    """The fifth bits int32 [..., D], 0 or 1."""
    m, high = page.k, page.high
    w = _lanes(words.to(torch.int32), high)  # [..., 4, U / 4]
    quarters = [torch.cat([w >> 4 * j + q & 1 for j in range(4)], -1)[..., : m.columns // 4] for q in range(4)]
    return torch.cat([_unlanes(lanes, m) for lanes in quarters], -1)[..., : page.head_dim]


# ---- pages


def _part(pages: Tensor, page: Page, name: str, dtype: torch.dtype) -> Tensor:
    """[num_pages, num_kv_heads, elements]: one part of every page, as a view."""
    size = dict(page.parts())[name]
    at = page.offsets[name]
    return pages[..., at : at + size].view(dtype)


def _token_sequences(num_tokens: int, slot_mapping: Tensor, query_start_loc: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For the tokens that are stored: their indices, sequences and positions, all int64."""
    token = torch.arange(num_tokens, device=slot_mapping.device)
    start = query_start_loc.to(torch.int64)
    sequence = torch.searchsorted(start, token, right=True) - 1
    kept = (slot_mapping >= 0) & (sequence < len(seq_lens))
    token, sequence = token[kept], sequence[kept]
    return token, sequence, seq_lens.to(torch.int64)[sequence] - start[sequence + 1] + token


def write(
    pages: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor, query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor, page: Page
) -> None:
    """Stores new tokens. See op.py for shapes."""
    size = page.page_size
    token, sequence, position = _token_sequences(slot_mapping.shape[0], slot_mapping, query_start_loc, seq_lens)
    if token.numel() == 0:
        return
    slot = slot_mapping[token].to(torch.int64)
    number, offset = slot // size, slot % size
    k, v = k[token], v[token]
    rk, rv = (rotate(k), rotate(v)) if page.rotate else (k.float(), v.float())  # [tokens, heads, D]

    if page.mean:
        means = _part(pages, page, "mean_k", torch.float16)
        opened = (offset == 0).nonzero()[:, 0]
        # the sums go by a page's place among those that are written
        numbers, place = number.unique(return_inverse=True)
        counted = position >= page.sinks
        count = torch.zeros(len(numbers), device=k.device).index_add_(0, place, counted.float())
        total = torch.zeros(len(numbers), *rk.shape[1:], device=k.device).index_add_(0, place[counted], rk[counted])
        enough = count[place[opened]] >= MEAN_TOKENS
        own, others = opened[enough], opened[~enough]
        mean = total[place[own]] / count[place[own]][:, None, None]
        means[number[own]] = mean.clamp(-65504, 65504).to(torch.float16)
        # a page too small for a mean of its own is a sequence's last one: the page before it has its mean by now
        previous = block_table[sequence[others], (position[others] // size - 1).clamp(min=0)].to(torch.int64)
        means[number[others]] = torch.where((position[others] >= size)[:, None, None], means[previous], 0).to(torch.float16)
        rk_coded = rk - means[number].float()
    else:
        rk_coded = rk

    heads = torch.arange(pages.shape[1], device=k.device)[None, :, None]

    def put(name: str, m: Words, words: Tensor) -> None:
        where = m.index().to(k.device)[offset][:, None, :]
        _part(pages, page, name, torch.int16)[number[:, None, None], heads, where] = words

    codes, *pair = encode(rk_coded, page.k_bits)
    put("codes_k", page.k, to_words(codes & 15 if page.k_bits == 5 else codes, 8 if page.k_bits == 8 else 4, page.k))
    if page.high:
        put("high_k", page.high, to_high(codes, page))
    _part(pages, page, "scales_k", torch.int32)[number, :, offset] = _pair(*pair)
    codes, *pair = encode(rv, page.v_bits)
    put("codes_v", page.v, to_words(codes, page.v_bits, page.v))
    _part(pages, page, "scales_v", torch.int32)[number, :, offset] = _pair(*pair)

    first = position < page.sinks
    if page.sinks:
        number, row = number[first], position[first]
        for i, (name, x) in enumerate((("rows_k", rk), ("rows_v", rv))):
            codes, *pair = encode(x[first], 8)
            _part(pages, page, name, torch.uint8).unflatten(-1, (page.sinks, -1))[number, :, row] = codes.to(torch.uint8)
            _part(pages, page, "row_scales", torch.int32)[number, :, i * page.sinks + row] = _pair(*pair)


def read(pages: Tensor, page: Page) -> tuple[Tensor, Tensor]:
    """Whole pages [N, H, nbytes] -> K [N, H, page_size, head_dim] and V, float32, still rotated, from the codes alone."""

    def words(name: str, m: Words) -> Tensor:
        part = _part(pages, page, name, torch.int16)
        return part[..., m.index().flatten().to(pages.device)].unflatten(-1, (m.tokens, m.columns))

    def scales(name: str) -> tuple[Tensor, Tensor]:
        return _unpair(_part(pages, page, name, torch.int32))

    codes = from_words(words("codes_k", page.k), 8 if page.k_bits == 8 else 4, page.head_dim)
    if page.high:
        codes = codes + (from_high(words("high_k", page.high), page) << 4)
    k = decode(codes, page.k_bits, *scales("scales_k"))
    if page.mean:
        k = k + _part(pages, page, "mean_k", torch.float16).float()[..., None, :]
    v = decode(from_words(words("codes_v", page.v), page.v_bits, page.v_head_dim), page.v_bits, *scales("scales_v"))
    return k, v


def read_rows(pages: Tensor, page: Page) -> tuple[Tensor, Tensor]:
    """The rows of first pages [N, H, nbytes]: K [N, H, sinks, head_dim] and V, float32, rotated."""
    scale, zero = _unpair(_part(pages, page, "row_scales", torch.int32)[..., : 2 * page.sinks])
    out = []
    for i, name in enumerate(("rows_k", "rows_v")):
        codes = _part(pages, page, name, torch.uint8).unflatten(-1, (page.sinks, -1)).to(torch.int32)
        of = slice(i * page.sinks, (i + 1) * page.sinks)
        out.append(decode(codes, 8, scale[..., of, :], zero[..., of, :]))
    return out[0], out[1]


def sequence(pages: Tensor, block_table: Tensor, start: int, stop: int, page: Page) -> tuple[Tensor, Tensor]:
    """Tokens start..stop-1 of the sequence whose pages are block_table [num_pages]: K [tokens, H, head_dim] and V, float32, rotated."""
    size, first = page.page_size, start // page.page_size
    chosen = pages[block_table[first : -(-stop // size)].to(torch.int64)]
    k, v = (x.transpose(1, 2).flatten(0, 1) for x in read(chosen, page))  # [tokens, H, D]
    if first == 0 and page.sinks and stop > 0:
        rows = read_rows(chosen[:1], page)
        k[: page.sinks], v[: page.sinks] = (x[0].transpose(0, 1) for x in rows)
    cut = slice(start - first * size, stop - first * size)
    return k[cut], v[cut]


def gather(
    pages: Tensor, block_table: Tensor, starts: Tensor, cu_lens: Tensor, total: int, page: Page, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Tokens of many sequences in the model's own space. See op.py."""
    heads = pages.shape[1]
    k = torch.zeros(total, heads, page.head_dim, dtype=dtype, device=pages.device)
    v = torch.zeros(total, heads, page.v_head_dim, dtype=dtype, device=pages.device)
    cu = cu_lens.tolist()
    for i, start in enumerate(starts.tolist()):
        n = cu[i + 1] - cu[i]
        if n > 0:
            rk, rv = sequence(pages, block_table[i], start, start + n, page)
            k[cu[i] : cu[i + 1]] = rotate(rk) if page.rotate else rk
            v[cu[i] : cu[i + 1]] = rotate(rv) if page.rotate else rv
    return k, v
