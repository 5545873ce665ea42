"""The product for many rows on Hopper. Nothing but a Hopper GPU runs it: there it is held against the plain kernel, since the same values are
multiplied and added up in float32 in another order. Here: what TMA brings from the packed matrix, who reads it, and how work is shared out."""

import json
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import geometric_mean

import pytest
import torch
import triton.language as tl
from samples import jit, quantized, spec
from sass import report

from qplugins.kernels.decode import CODES
from qplugins.kernels.linear import kernel, pack, wide
from qplugins.kernels.linear.layout import INTEGERS, LOCKS, _split_words, named, relative_scale, tile_k
from qplugins.kernels.linear.spec import SCALES, Spec
from qplugins.kernels.linear.tiles import Tile, multiprocessors

ROOT = Path(__file__).resolve().parents[2]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
SIZES = [(257, 576, 640), (300, 1000, 4096), (8, 64, 64), (130, 192, 576), (1030, 200, 2048)]  # M, N, K
FORMATS = [
    "e2m1*e4m3/16", "e2m1*e8m0/32", "e4m3*f32/row", "e4m3*bf16/128", "e4m3*e8m0/32", "int4*bf16/32", "int4*fp16/64", "int4*f32/64",
    "int4*e8m0/64", "int4*bf16/128+zero", "int4*fp16/32+zero", "int4*bf16/row+zero", "int8*bf16/row", "int8*bf16/128+zero",
]  # fmt: skip
TILES = [tile for tile, _ in wide.TILES]
CPU = torch.device("cpu")


def check(q, m: int, tile: wide.WideTile, dtype: torch.dtype, bias: bool, device: torch.device) -> None:
    w = pack(q, "triton")
    n, k = w.spec.n, w.spec.k
    x = torch.randn(m, k + 64, dtype=dtype, device=device)[:, :k]
    b = torch.randn(n, dtype=dtype, device=device) if bias else None
    want = torch.empty(m, n, dtype=dtype, device=device)
    kernel.linear(x, w.spec, list(w.tensors), want, b, Tile(128, 128, w.spec.bits // 4, 8, 3))
    around = torch.full((m + 2, n + 16), torch.nan, dtype=dtype, device=device)
    y = around[1:-1, 8:-8]
    assert wide.refuses(w.spec, x, y) is None
    for _ in range(3):  # a race shows now and then
        around.fill_(torch.nan)
        wide.linear(x, w.spec, list(w.tensors), y, b, tile)
        # float32 sums of 16-bit products in two orders: seldom a last bit of the result
        assert ((y.float() - want.float()).norm() / want.float().norm()) < 0.1 * torch.finfo(dtype).eps
        assert not w.tensors[2].any(), "a lock was left"
        y.fill_(torch.nan)
        assert around.isnan().all(), "written outside of the output"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.gpu
@needs_hopper
def test_every_format(text, dtype, device):
    check(quantized(spec(text, 328, 640), device), 300, TILES[0], dtype, True, device)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.gpu
@needs_hopper
def test_every_tile_and_tail(m, n, k, tile, shared, device):
    q, tile = quantized(spec("e2m1*e4m3/16", n, k), device), replace(tile, shared=shared)
    blocks = -(-m // tile.block_m) * -(-n // tile.block_n)
    sharing = blocks - wide.share_out(blocks, -(-k // 64), multiprocessors(device))[0]
    few = shared and sharing > LOCKS * -(-n // 64)  # locks
    with pytest.raises(ValueError, match="locks") if few else nullcontext():
        check(q, m, tile, torch.bfloat16, m % 2 == 0, device)


@pytest.mark.parametrize("block_n", [128, 256])
@pytest.mark.parametrize(("n", "k"), [(200, 384), (64, 640)])
@pytest.mark.parametrize("text", FORMATS)
def test_buffers_hold_what_the_reference_reads(text, n, k, block_n):
    """W put together from the blocks that the loader asks for, with the reshapes by which consumers name what they hold."""
    q = quantized(spec(text, n, k), CPU)
    w = pack(q, "triton")
    s, t = w.spec, named("triton", w.spec, w.tensors)
    blocks = wide.blocks_of(s, wide.WideTile(block_n, 128))
    tiles_n, tiles_k, _ = t["codes"].shape
    tiles, sub, spans = block_n // 64, 64 // tile_k(s), tile_k(s) // 16
    per_group, per_scale = max(1, (s.group or 1) // tile_k(s)), min(s.group or k, tile_k(s)) // 16

    def tma(of: torch.Tensor, first: int, count: int) -> torch.Tensor:
        there = of[first : first + count]
        return torch.cat((there, torch.zeros(count - len(there), *of.shape[1:], dtype=of.dtype)))

    def of_rows(name: str, group: int, block: int) -> torch.Tensor:
        (count, width), _ = blocks[name]
        of = t[name].view(INTEGERS[16 // width]).view(-1, width)
        part = tma(of, (group * 64 * tiles_n + block * block_n) // width, count)
        return part.reshape(tiles, 4, 8, 2).permute(0, 1, 3, 2).reshape(block_n).to(torch.int64)

    got = torch.full((-(-n // block_n) * block_n, -(-k // 64) * 64), torch.nan)
    for block, step, i, j in product(range(len(got) // block_n), range(got.shape[1] // 64), range(sub), range(spans)):
        at = [min(block * tiles + tile, tiles_n - 1) * tiles_k + step * sub + i for tile in range(tiles)]
        words = torch.cat([tma(t["codes"].view(-1, 64), 16 * a, 16) for a in at])
        words = words.reshape(tiles, 4, 8, 4, 2, 2, 2).permute(0, 1, 5, 2, 4, 3, 6).reshape(block_n, 16)
        value = CODES[s.code].values[_split_words(CODES[s.code], words)[:, j].int()]
        group = min(step * sub + i, tiles_k - 1) // per_group
        if s.zero_point and s.group:
            value = value - (of_rows("zero", group, block) >> 16 * (j // per_scale)).to(torch.int16)[:, None]
        if s.group:
            bits = 8 if s.scale in ("e4m3", "e8m0") else 8 * SCALES[s.scale].itemsize
            bytes_ = (of_rows("scale", group, block) >> bits * (j // per_scale)).to(INTEGERS[bits // 8])
            scale = relative_scale(s, bytes_.view(torch.uint8) if bits == 8 else bytes_.view(SCALES[s.scale]))
            value = value * scale[:, None].float()
        got[block * block_n : (block + 1) * block_n, (step * sub + i) * tile_k(s) + 16 * j :][:, :16] = value
    got = got[:n, :k] * t["row"][:, None]
    want = q.dequantize().float()
    if s.zero_point and not s.group:  # rows' own, which consumers read themselves
        want = want + q.zero_point.float() * q.scale.float()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_the_ring_fits(tile, text):
    s = spec(text, 4096, 4096)
    stages = wide.stages(s, tile)
    assert stages >= 2
    per_row = sum(
        block[0] * block[1] * layout.element_bitwidth // 8 for name, (block, layout) in wide.blocks_of(s, tile).items() if name == "x"
    )
    assert stages * per_row + 2 * tile.block_n * tile.block_m < wide.SHARED_MEMORY


@jit
def pieces_kernel(out, programs, blocks, steps, alone, share, PIECES: tl.constexpr):
    """out int32 [programs, PIECES, 6]: each program's pieces of work; a shared block's programs, and the slot of the part."""
    program = tl.program_id(0)
    for i in range(tl.cdiv(alone - program, programs) + 2 * (alone < blocks)):
        block, first, count = wide.piece_of_work(i, program, programs, blocks, steps, alone, share)
        begin, end = wide.parts_of_block(block - alone, steps, share)
        at = out + (program * PIECES + i) * 6
        tl.store(at, block)
        tl.store(at + 1, first)
        tl.store(at + 2, count)
        tl.store(at + 3, begin)
        tl.store(at + 4, end)
        tl.store(at + 5, wide.slot_of_part(program, block - alone, steps, share))


@pytest.mark.parametrize(
    ("blocks", "steps", "programs"), [(3, 7, 5), (12, 4, 5), (9, 64, 8), (4, 5, 8), (1, 3, 6), (10, 6, 5), (13, 10, 7)]
)
def test_work_is_shared_out_once_and_evenly(blocks, steps, programs, device):
    alone, share = wide.share_out(blocks, steps, programs)
    assert alone % programs == 0 and blocks - alone < programs
    pieces = -(-blocks // programs) + 2
    out = torch.zeros(programs, pieces, 6, dtype=torch.int32, device=device)
    pieces_kernel[(programs,)](out, programs, blocks, steps, alone, max(share, 1), PIECES=pieces)
    found = [(program, *piece) for program, of in enumerate(out.tolist()) for piece in of if piece[2]]
    assert sorted((b, first + i) for _, b, first, count, *_ in found for i in range(count)) == sorted(product(range(blocks), range(steps)))
    done = [sum(count for p, _, _, count, *_ in found if p == program) for program in range(programs)]
    assert max(done) == alone // programs * steps + share * (alone < blocks)
    parts = [piece for piece in found if piece[1] >= alone]
    for block in range(alone, blocks):
        of = [piece for piece in parts if piece[1] == block]
        assert [p for p, *_ in of] == list(range(of[0][4], of[0][5])), "who waits for whom"
        assert [first for _, _, first, *_ in of] == sorted(first for _, _, first, *_ in of), "in the order of K"
    slots = [piece[6] for piece in parts]
    assert len(set(slots)) == len(slots) and all(0 <= slot < 2 * programs for slot in slots)


@pytest.mark.parametrize("m", [256, 512, 1024, 8192])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (28672, 4096), (10240, 8192)])
def test_the_tile_keeps_multiprocessors_busy(m, n, k):
    s = spec("e2m1*e4m3/16", n, k)
    tile = wide.choose(m, s, CPU)
    blocks, programs = -(-m // tile.block_m) * -(-n // tile.block_n), 132
    assert tile.shared or blocks / programs > 0.7 * -(-blocks // programs)


def test_the_tile_that_is_chosen_is_nearly_the_best_one_timed():
    """By bench/results/wide_tiles.json, of an H100. Two versions of one kernel differ by a few percent from run to run there."""
    times: dict[tuple, dict[str, float]] = {}
    for row in json.loads((ROOT / "bench" / "results" / "wide_tiles.json").read_text())["rows"]:
        if row["us"]:
            times.setdefault(tuple(row["case"].values()), {})[row["impl"]] = row["us"]
    longer = []
    for (name, n, k, m), us in times.items():
        s = spec({"nvfp4": "e2m1*e4m3/16", "int4_g128": "int4*bf16/128"}[name], n, k)
        chosen = us.get(str(wide.choose(m, s, CPU)) if wide.suits(m, s) else "kernel.py")
        if chosen is not None:  # some were not timed
            longer.append(chosen / min(us.values()))
    assert len(longer) == 160 and geometric_mean(longer) < 1.01 and max(longer) < 1.1


def test_elsewhere_it_says_that_it_is_for_hopper():
    if HOPPER:
        pytest.skip("here it is not refused")
    x, y = torch.empty(256, 64), torch.empty(256, 64)
    assert "Hopper" in wide.refuses(spec("e2m1*e4m3/16", 64, 64), x, y)


@pytest.mark.parametrize(
    ("x", "y", "why"),
    [((256, 72), (256, 64), None), ((256, 68), (256, 64), "rows of x"), ((256, 72), (256, 68), "rows of out")],
)
def test_what_tma_does_not_take_is_refused(x, y, why, monkeypatch):
    monkeypatch.setattr(wide, "on_hopper", lambda: True)
    x, y = (torch.empty(size, dtype=torch.bfloat16)[:, :64] for size in (x, y))
    found = wide.refuses(spec("e2m1*e4m3/16", 64, 64), x, y)
    assert found is None if why is None else why in found
    assert "not quantized" in wide.refuses(Spec(64, 64), x, y)


@pytest.mark.parametrize(
    ("write", "conflict"),
    [
        ("IMAD R152, R4, R5, RZ ;", "IMAD R152, R4, R5, RZ"),  # a operand of the product before the wait
        ("LDS.64 R154, [R4] ;", "LDS.64 R154, [R4]"),
        ("FMUL R4, R30, 128 ;", "FMUL R4, R30, 128"),  # a sum
        ("IMAD R156, R4, R5, RZ ;", None),
    ],
)
def test_machine_code_is_read_right(write, conflict):
    lines = [
        "HGMMA.64x256x16.F32.BF16 R24, R152, gdesc[UR8], R24, gsb0 ;",
        write,
        "HGMMA.64x256x16.F32.BF16 R24, R156, gdesc[UR8], R24, gsb0 ;",
        "WARPGROUP.DEPBAR.LE gsb0, 0x1 ;",
        "IMAD R152, R4, R5, RZ ;",
        "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;",
        "@!P0 BRA `(.L_x_1) ;",
    ]
    found = report(".L_x_1:\n" + "\n".join(f"        /*{16 * i:04x}*/    {line}" for i, line in enumerate(lines)))
    assert (found["loops"], found["products"], found["waits"], found["groups_under_way"]) == (1, 2, [1, 0], 2)
    assert set(found["conflicts"]) == ({conflict} if conflict else set())
