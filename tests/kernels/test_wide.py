"""The product for many rows on Hopper, which nothing but a Hopper GPU runs, against the plain kernel: the same values multiplied, and added up in
float32 in an order of its own."""

import pytest
import torch
from samples import quantized, spec

from qplugins.kernels.linear import kernel, pack, wide
from qplugins.kernels.linear.spec import Spec
from qplugins.kernels.linear.tiles import Tile

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
SIZES = [(257, 576, 640), (300, 1000, 4096), (8, 64, 64), (130, 192, 576), (1030, 200, 2048)]  # M, N, K
FORMATS = [
    "e2m1*e4m3/16", "e2m1*e8m0/32", "e4m3*f32/row", "e4m3*bf16/128", "e4m3*e8m0/32", "int4*bf16/32", "int4*fp16/64", "int4*f32/64",
    "int4*bf16/128+zero", "int4*fp16/32+zero", "int8*bf16/row", "int8*bf16/128+zero",
]  # fmt: skip


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
        y.fill_(torch.nan)
        assert around.isnan().all(), "written outside of the output"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.gpu
@needs_hopper
def test_every_format(text, dtype, device):
    check(quantized(spec(text, 328, 640), device), 300, wide.TILES[0][0], dtype, True, device)


@pytest.mark.parametrize("tile", [tile for tile, _ in wide.TILES], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.gpu
@needs_hopper
def test_every_tile_and_tail(m, n, k, tile, device):
    check(quantized(spec("e2m1*e4m3/16", n, k), device), m, tile, torch.bfloat16, m % 2 == 0, device)


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


@pytest.mark.parametrize("m", [256, 1024, 8192])
@pytest.mark.parametrize("n", [4096, 28672])
def test_the_tile_is_that_which_keeps_multiprocessors_busy(m, n):
    tile = wide.choose(m, n, torch.device("cpu"))
    blocks = -(-m // tile.block_m) * -(-n // tile.block_n)
    assert blocks >= 128 or tile == wide.TILES[-1][0]
