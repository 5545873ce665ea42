"""The FP8 product for more rows. Nothing but a Hopper GPU runs it: there it is held against a float32 product of the same values. Here: which tile
runs, when, and that it is compiled ahead. test_wide.py has how programs share K, test_compile.py what the compiler makes of the tiles."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean

import pytest
import torch
from samples import quantized, rel_rms, spec

from qplugins.kernels.linear import fp8, fp8_few, fp8_wide
from qplugins.kernels.linear.ref import matmul

ROOT = Path(__file__).resolve().parents[2]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
TILES = [replace(tile, shared=shared) for tile, _ in fp8_wide.TILES for shared in (False, True)]
CPU = torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k", "multiprocessors"),
    [(33, 72, 128, 3), (64, 1000, 1040, 7), (130, 200, 4096, 132), (257, 576, 2688, 5), (700, 328, 1024, 4)],
)
def test_every_tile_and_tail(m, n, k, multiprocessors, tile, device, monkeypatch):
    """Tails of M, N and K, blocks done alone and shared, more buffers than steps and fewer; into columns of a wider output."""
    monkeypatch.setattr(fp8_wide, "multiprocessors", lambda device: multiprocessors)
    s = spec("e4m3*f32/row", n, k)
    weight = quantized(s, device).codes.view(torch.float8_e4m3fn)
    row = torch.rand(n if m % 2 else 1, device=device) + 0.5
    bias = torch.randn(n, device=device, dtype=torch.bfloat16) if m % 3 else None
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    around = torch.full((m + 2, n + 16), torch.nan, device=device, dtype=torch.bfloat16)
    y = around[1:-1, 8:-8]
    assert fp8_wide.refuses(s, y) is None
    for _ in range(3):  # a race shows now and then
        locks = torch.full((fp8.LOCKS,), 7, dtype=torch.int32, device=device)
        q, scale = fp8.quantize(x, locks=locks)
        want = matmul(q.float() * scale, weight.float() * row.expand(n)[:, None], bias)
        for _ in range(2):  # behind the quantizer, and on the locks as the first left them
            around.fill_(torch.nan)
            fp8.quantize(x)
            fp8_wide.linear(q, scale, weight, row, s, locks, y, bias, tile)
            # the same values, and sums of no more than 128 products in the fewer bits of the tensor core
            assert rel_rms(y, want) < torch.finfo(torch.bfloat16).eps
            assert not locks.any(), "a lock was left"
            y.fill_(torch.nan)
            assert around.isnan().all(), "written outside of the output"


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_the_ring_fits_and_there_are_locks(tile):
    c = fp8_wide.constants(tile)
    buffer = 128 * (tile.block_n + tile.block_m)
    assert c["STAGES"] >= 4 and c["STAGES"] * buffer + 2 * tile.block_n * tile.block_m < fp8_wide.SHARED_MEMORY
    assert 132 * c["PARTS"] <= fp8.LOCKS


@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 14336), (57344, 8192), (1280, 8192), (64, 1040)])
def test_every_number_of_rows_runs_a_tile_that_is_warmed(n, k):
    s = spec("e4m3*f32/row", n, k)
    known = fp8_wide.variants(s, CPU)
    assert 1 <= len(known) <= len(TILES)
    for m in range(1, 1200):
        if fp8_wide.suits(m, s, CPU):
            assert fp8_wide.choose(m, s, CPU) in known, m
    for tile, m in known.items():
        assert fp8_wide.suits(m, s, CPU) and fp8_wide.choose(m, s, CPU) == tile


def test_what_runs_is_nearly_the_quickest_that_was_timed(monkeypatch):
    """By bench/results/fp8_tiles.json, of an H100; each with the quantizer in front."""
    for module in (fp8_few, fp8_wide):
        monkeypatch.setattr(module, "on_hopper", lambda: True)
    cases: dict[tuple, dict[str, float]] = {}
    for row in json.loads((ROOT / "bench" / "results" / "fp8_tiles.json").read_text())["rows"]:
        if row["us"] and row["impl"] not in ("quantizer", "scaled_mm alone"):
            cases.setdefault(tuple(row["case"].values()), {})[row["impl"]] = row["us"]
    longer, by_scaled_mm = [], []
    for (_, n, k, m), us in cases.items():
        s = spec("e4m3*f32/row", n, k)
        names = {fp8_few: "fp8_few.py", fp8_wide: str(fp8_wide.choose(m, s, CPU)), None: "quantizer + scaled_mm"}
        runs = names[fp8._ours(m, s, torch.empty(m, n, dtype=torch.bfloat16))]
        by_scaled_mm.append(us[runs] / us["quantizer + scaled_mm"])
        longer.append(us[runs] / min(us.values()))
    assert len(longer) == 224 and geometric_mean(longer) < 1.03 and max(longer) < 1.25
    assert max(by_scaled_mm) < 1.2 and geometric_mean(by_scaled_mm) < 0.92


def test_more_rows_where_scaled_mm_leaves_much_of_the_gpu_idle():
    """Of 4096 x 14336 it has 160 blocks with 576 rows, two rounds of 132 multiprocessors; with 512 it has one of 128."""
    s = spec("e4m3*f32/row", 4096, 14336)
    assert fp8_wide.suits(576, s, CPU) and not fp8_wide.suits(512, s, CPU)


@pytest.mark.parametrize(
    ("k", "width", "why"), [(1040, 72, None), (1032, 72, "rows of whole 16 bytes"), (1040, 68, "rows of out")], ids=["taken", "K", "out"]
)
def test_what_tma_does_not_take_is_refused(k, width, why, monkeypatch):
    monkeypatch.setattr(fp8_wide, "on_hopper", lambda: True)
    found = fp8_wide.refuses(spec("e4m3*f32/row", 64, k), torch.empty(40, width, dtype=torch.bfloat16)[:, :64])
    assert found is None if why is None else why in found


@pytest.mark.parametrize(
    ("m", "k", "width", "ours"),
    [
        (1, 1024, 64, fp8_few), (32, 1024, 68, fp8_few), (33, 1024, 64, fp8_wide), (33, 1024, 68, None), (32, 1040, 64, None), (64, 1040, 64, fp8_wide),
        (1025, 1024, 64, None),
    ],
)  # fmt: skip
def test_rows_sizes_and_the_output_decide_what_runs(m, k, width, ours, monkeypatch):
    for module in (fp8_few, fp8_wide):
        monkeypatch.setattr(module, "on_hopper", lambda: True)
    assert fp8._ours(m, spec("e4m3*f32/row", 64, k), torch.empty(m, width, dtype=torch.bfloat16)[:, :64]) is ours


@pytest.mark.skipif(HOPPER, reason="here it is not refused")
def test_elsewhere_it_says_that_it_is_for_hopper():
    assert "Hopper" in fp8_wide.refuses(spec("e4m3*f32/row", 64, 64), torch.empty(40, 64, dtype=torch.bfloat16))
