"""The routed experts on a GPU: linear's product, each block of it with the rows of x that chose one expert.

    order       choices sorted by expert, cut into blocks                          order.py
    gate, up    of the rows of x that a block's choices belong to                  experts_kernel, once a shard
    activate    act(gate) * up                                                     activate_kernel
    down        of those                                                           experts_kernel, once a shard
    combine     y[t]: the sum of the token's k results, weighted                   combine_kernel

A shard whose experts' columns have orders of their own (GPTQ's act-order) reads x from permute_kernel, a row a choice.

Results of a product stand at their choice's place c = t * k + j, not in the sorted order: only the product's own loads and stores jump.
What chose no expert here is never written and never read. Between the steps values are rounded to x's dtype; all sums are float32.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from qplugins.kernels.common.device import after_previous, dependent_launch, dot
from qplugins.kernels.linear import Plan, Shard
from qplugins.kernels.linear.layout import named, tile_k
from qplugins.kernels.linear.product import block_at, constants, leave_share, load_x, of_groups, product, shares, sum_shares, sums_of
from qplugins.kernels.linear.tiles import Tile
from qplugins.kernels.moe.order import order
from qplugins.kernels.moe.tiles import choose

COLUMNS = 512  # that a program of the elementwise steps has


@triton.jit
def _plain_product(xs, m_in, w, block_n, N, K, EVEN_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """`product` for a matrix w [N, K] that is not quantized, of x's dtype."""
    # rows past the matrix's last one read it again; they are not stored
    n = tl.minimum(block_n * BLOCK_N + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    ws = w + n[:, None] * K + k[None, :]
    xs += k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(ws)
        else:
            a = tl.load(ws, mask=(first + k < K)[None, :], other=0.0)
        acc = dot(a, load_x(xs, first + k, m_in, K, EVEN_K), acc)
        ws += BLOCK_K
        xs += BLOCK_K
    return acc


# sizes that change from call to call must not each have a compilation of their own
@triton.jit(do_not_specialize=["blocks_m", "top_k", "tiles_k", "pairs", "steps", "split_k", "stripe_m"])
def experts_kernel(
    x, order, blocks, codes, row, scale, zero, y, work, locks,
    N, K, stride_x, stride_y, stride_scale, blocks_m, top_k, tiles_k, pairs, steps, split_k, stripe_m,
    CODE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, UP: tl.constexpr, OUT: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STEP: tl.constexpr, SHARED_K: tl.constexpr,
    PTX: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    """y[c, n] = sum_k x[c // top_k, k] W[e, n, k] for the choices c of expert e. One program: BLOCK_N columns of one block of choices, and
    one of split_k shares of K.

    x      [.., K], rows stride_x apart                 y     [choices, N], rows stride_y apart
    order, blocks  of order.py, `blocks_m` of these     top_k  choices that share a row of x
    codes, scale, zero, steps, GROUP   of `product`, one expert after the other; of `_plain_product` where CODE is "plain"
    row    float32 [E, N]        stride_scale  of an expert in scale and zero
    work   float32 [blocks, split_k, BLOCK_N, BLOCK_M]                     locks  int32 [blocks], zeros
    """
    dtype: tl.constexpr = x.dtype.element_ty
    program = tl.program_id(0)
    share = tl.program_id(1)
    block_m, block_n = block_at(program, blocks_m, tl.cdiv(N, BLOCK_N), stripe_m)
    first = tl.load(blocks + blocks_m + block_m)
    stop = tl.load(blocks + 2 * blocks_m + block_m)
    if first >= stop:
        return
    e = tl.load(blocks + block_m).to(tl.int64)
    m = first + tl.arange(0, BLOCK_M)
    m_in = (m < stop)[None, :]
    c = tl.load(order + m, mask=m < stop, other=0)
    xs = x + (c // top_k)[None, :].to(tl.int64) * stride_x
    if CODE == "plain":
        acc = _plain_product(xs, m_in, codes + e * N * K, block_n, N, K, EVEN_K, BLOCK_N, BLOCK_M, 16 * STEP)
    else:
        acc = product(
            xs, m_in, codes + e * tl.cdiv(N, 64) * tiles_k * 1024, scale + e * stride_scale, zero + e * stride_scale,
            block_n, share, steps, N, K, tiles_k, pairs,
            CODE, SCALE, GROUP, ZERO, UP, EVEN_K, BLOCK_N, BLOCK_M, STEP, dtype, PTX, HOPPER,
        )  # fmt: skip
    if SHARED_K:
        mine = work + program.to(tl.int64) * split_k * (BLOCK_N * BLOCK_M)
        if not leave_share(acc, mine, share, locks + program, split_k, BLOCK_N, BLOCK_M):
            return
        acc = sum_shares(mine, locks + program, split_k, BLOCK_N, BLOCK_M)

    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n_in = n < N
    if CODE != "plain":
        acc = acc * OUT * tl.load(row + e * N + n, mask=n_in, other=0.0)[:, None]  # in this order: see linear_kernel
    # loaded again, as the sums lie in other registers than x did: kept over the loop they would take up to 32 of each thread
    c = tl.load(order + m, mask=m < stop, other=0, cache_modifier=".ca")
    tl.store(y + c[None, :].to(tl.int64) * stride_y + n[:, None], acc.to(dtype), mask=m_in & n_in[:, None])


@triton.jit(do_not_specialize=["experts", "top_k"])
def permute_kernel(ids, x, columns, out, experts, top_k, K, stride_x, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out[c, k] = x[c // top_k, columns[e, k]]: what an expert whose columns are in an order of their own reads. One program: BLOCK columns
    of one choice, if an expert here has it."""
    after_previous(PDL)
    c = tl.program_id(0).to(tl.int64)
    e = tl.load(ids + c).to(tl.int64)
    if (e < 0) | (e >= experts):
        return
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.load(columns + e * K + k, mask=k < K, other=0)
    tl.store(out + c * K + k, tl.load(x + c // top_k * stride_x + column, mask=k < K), mask=k < K)


@triton.jit(do_not_specialize=["experts"])
def activate_kernel(ids, gate_up, h, experts, N, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """h[c, n] = act(gate_up[c, n]) * gate_up[c, N + n]. One program: BLOCK columns of one choice, if an expert here has it."""
    after_previous(PDL)
    c = tl.program_id(0).to(tl.int64)
    e = tl.load(ids + c)
    if (e < 0) | (e >= experts):
        return
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate_up += c * 2 * N + n
    gate = tl.load(gate_up, mask=n < N, other=0.0).to(tl.float32)
    up = tl.load(gate_up + N, mask=n < N, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        gate *= tl.sigmoid(gate)
    elif ACTIVATION == "gelu":
        gate *= 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
    else:
        # (1 + tanh(u)) / 2 = sigmoid(2 u)
        gate *= tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    tl.store(h + c * N + n, (gate * up).to(h.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["experts"])
def combine_kernel(ids, weights, parts, y, experts, N, TOP_K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """y[t] = sum_j weights[t, j] * parts[t, j] over the choices that experts here have. One program: BLOCK columns of one token."""
    after_previous(PDL)
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP_K):
        e = tl.load(ids + t * TOP_K + j)
        width = tl.where((e >= 0) & (e < experts), N, 0)
        part = tl.load(parts + (t * TOP_K + j) * N + n, mask=n < width, other=0.0).to(tl.float32)
        weight = tl.load(weights + t * TOP_K + j)
        acc += tl.where(width > 0, weight * part, 0.0)
    tl.store(y + t * N + n, acc.to(y.dtype.element_ty), mask=n < N)


def multiply(x: Tensor, top_k: int, order: Tensor, blocks: Tensor, shard: Shard, tensors: list[Tensor], out: Tensor, tile: Tile) -> None:
    """out[c] = x[c // top_k] @ W_e.T for the choices c in `order` and one shard's matrices. tile.block_m is what `blocks` were made for."""
    spec = shard.spec
    t = named(shard.implementation, spec, tensors)
    w = t["codes" if spec.code else "weight"]
    if spec.code is None and w.dtype != x.dtype:
        raise ValueError(f"plain experts should be {x.dtype}, as x is, are {w.dtype}")
    tiles_k = w.shape[2] if spec.code else triton.cdiv(spec.k, tile_k(spec))
    blocks_m, blocks_n = blocks.shape[1], triton.cdiv(spec.n, tile.block_n)
    locks, row = t.get("locks"), t.get("row", w)
    split, steps = shares(tiles_k, tile if locks is not None else replace(tile, split_k=1))
    work = sums_of(blocks_m * blocks_n, split, tile, locks)
    scale, zero, grouped = of_groups(t, row)
    experts_kernel[(blocks_m * blocks_n, split)](
        x, order, blocks, w, row, scale, zero, out, row if work is None else work, order if locks is None else locks,
        spec.n, spec.k, x.stride(0), out.stride(0), 0 if grouped is None else grouped.stride(0), blocks_m, top_k, tiles_k,
        0 if grouped is None else grouped.shape[2], steps, split, tile.stripe_m,
        **constants(spec, x.dtype, tile), SHARED_K=split > 1, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def experts(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Plan, gate_up_tensors: list[Tensor], down: Plan, down_tensors: list[Tensor],
    activation: str, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """[T, down.n] in x's dtype, bfloat16 or float16; T * k > 0. Tensors are contiguous, but for rows of x that may lie apart.

    tile  None: for each shard from tiles.py
    """
    (tokens, top_k), count = topk_ids.shape, gate_up_tensors[0].shape[0]
    choices = tokens * top_k
    ids, weights = topk_ids.contiguous(), topk_weights.to(torch.float32).contiguous()
    shards = [*gate_up.shards, *down.shards]
    tiles = [tile] * len(shards) if tile else choose(choices, count, [s.spec for s in shards], x.device)
    ordered = order(ids, count, tiles[0].block_m)

    def layer(x: Tensor, top_k: int, plan: Plan, tensors: list[Tensor], tiles: list[Tile]) -> Tensor:
        y = torch.empty(choices, plan.n, dtype=x.dtype, device=x.device)
        for s, t in zip(plan.shards, tiles, strict=True):
            mine, of_each = x, top_k
            if s.columns is not None:
                mine, of_each = torch.empty(choices, plan.k, dtype=x.dtype, device=x.device), 1
                permute_kernel[(choices, triton.cdiv(plan.k, COLUMNS))](
                    ids, x, tensors[s.columns], mine, count, top_k, plan.k, x.stride(0), BLOCK=COLUMNS, **dependent_launch()
                )
            multiply(mine, of_each, *ordered, s, tensors[s.first : s.first + s.count], y[:, s.start : s.start + s.spec.n], t)
        return y

    gate_and_up = layer(x, top_k, gate_up, gate_up_tensors, tiles[: len(gate_up.shards)])
    h = torch.empty(choices, down.k, dtype=x.dtype, device=x.device)
    activate_kernel[(choices, triton.cdiv(down.k, COLUMNS))](
        ids, gate_and_up, h, count, down.k, ACTIVATION=activation, BLOCK=COLUMNS, **dependent_launch()
    )
    parts = layer(h, 1, down, down_tensors, tiles[len(gate_up.shards) :])
    y = torch.empty(tokens, down.n, dtype=x.dtype, device=x.device)
    combine_kernel[(tokens, triton.cdiv(down.n, COLUMNS))](
        ids, weights, parts, y, count, down.n, TOP_K=top_k, BLOCK=COLUMNS, **dependent_launch()
    )
    return y
