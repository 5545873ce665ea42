"""The Triton GEMM against the float32 reference: every code, scale and zero point, odd sizes, shared K, slices of outputs."""

import pytest
import torch
from samples import quantized, rel_rms, spec

from qplugins.kernels.linear import pack
from qplugins.kernels.linear.kernel import linear
from qplugins.kernels.linear.ref import matmul
from qplugins.kernels.linear.tiles import Tile, choose

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Products and sums are float32. What differs from the reference is at most two roundings to the 16-bit type: of each scaled weight, by up to
# eps / 2, and of the result, by up to eps / 2, or eps where the interpreter rounds towards zero. Errors are measured against
# sqrt(x ** 2 @ W.T ** 2), the size that a sum of such products has before any of it cancels. A weight decoded wrongly, or a group's scale on
# another, is off by fifty times that.
TOLERANCE = 1.5


def error(y, x, w, bias=None):
    """The root mean square of y - x W.T, over that of sqrt(x ** 2 @ W.T ** 2), in units of eps."""
    size = (x.float() ** 2 @ w.T**2 + (0 if bias is None else bias.float() ** 2)).sum().sqrt()
    return float((y.float() - matmul(x, w, bias)).norm() / size) / torch.finfo(y.dtype).eps


def run(q, x, tile=None, bias=None, spare=0, multiply=linear):
    """y[M, N] of a kernel, in an output that is NaN before and, past column N, still is afterwards."""
    w = pack(q, "triton")
    m, n = x.shape[0], w.spec.n
    y = torch.full((m, n + spare), torch.nan, dtype=x.dtype, device=x.device)
    multiply(x, w.spec, list(w.tensors), y[:, :n], bias, *([tile] if tile else []))
    assert y[:, n:].isnan().all(), "written past the last column"
    assert not w.tensors[2].any(), "a lock was left"
    return y[:, :n]


SMALL, WIDE, TALL = Tile(64, 16, 1, split_k=3), Tile(128, 16, 2), Tile(64, 32, 2, split_k=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "text",
    [
        "e2m1*e4m3/16", "e2m1*e8m0/32", "e2m1*bf16/32", "e2m1*f32/row",
        "e4m3*f32/row", "e4m3*bf16/128", "e4m3*e4m3/16", "e4m3*e8m0/32",
        "int4*bf16/32", "int4*fp16/64", "int4*bf16/128", "int4*bf16/row", "int4*f32/64", "int4*e4m3/16", "int4*e8m0/64",
        "int4*bf16/32+zero", "int4*fp16/128+zero", "int4*bf16/row+zero",
        "int8*bf16/row", "int8*fp16/128", "int8*f32/32+zero", "int8*bf16/row+zero", "int8*e4m3/16",
    ],
)  # fmt: skip
def test_every_format(text, dtype, device):
    m, n, k = 3, 72, 384
    q = quantized(spec(text, n, k), device)
    x = torch.randn(m, k, device=device, dtype=DTYPES[dtype])
    y = run(q, x, SMALL)
    assert error(y, x, q.dequantize()) < TOLERANCE


@pytest.mark.parametrize(
    ("m", "n", "k", "tile"),
    [
        (1, 64, 64, SMALL),
        (33, 1, 32, WIDE),  # enough values for a mean square
        (17, 200, 192, WIDE),
        (63, 72, 160, TALL),
        (5, 65, 96, Tile(64, 16, 2, split_k=8)),
        (129, 130, 64, Tile(128, 32, 1, stripe_m=2)),
        (2, 1000, 64, Tile(128, 16, 1)),
    ],
)
def test_odd_sizes(m, n, k, tile, device):
    for text in ("int4*bf16/32", "e4m3*f32/row"):
        q = quantized(spec(text, n, k), device)
        x, bias = torch.randn(m, k, device=device, dtype=torch.bfloat16), torch.randn(n, device=device, dtype=torch.bfloat16)
        y = run(q, x, tile, bias, spare=8)
        # a single number may be several times as far off as many are on average
        assert error(y, x, q.dequantize(), bias) < TOLERANCE * (1 if m * n >= 64 else 5), text


@pytest.mark.parametrize("k", [48, 80, 112, 1000])
def test_k_that_is_no_whole_number_of_tiles(k, device):
    for text in ("int4*bf16/row", "int8*bf16/row", "e2m1*e4m3/16" if k % 16 == 0 else "e2m1*f32/row"):
        q = quantized(spec(text, 64, k), device)
        x = torch.randn(4, k, device=device, dtype=torch.bfloat16)
        assert error(run(q, x, SMALL), x, q.dequantize()) < TOLERANCE, text


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", ["e2m1*e4m3/16", "e2m1*e8m0/32", "int8*f32/row", "int4*f32/row", "e4m3*f32/row"])
def test_a_row_of_the_identity_brings_back_a_column_of_the_matrix_exactly(text, dtype, device):
    """Codes times e4m3 or e8m0 scales have few enough bits for both 16-bit types, so that nothing is rounded at all."""
    k = 128
    q = quantized(spec(text, 64, k), device)
    w = q.dequantize()
    scale = torch.exp2(torch.randint(-3, 3, q.scale.shape, device=device)) if q.scale.dtype == torch.float32 else q.scale
    if q.scale.dtype == torch.uint8:
        scale = torch.randint(120, 134, q.scale.shape, device=device, dtype=torch.uint8)
    q = type(q)(q.code, q.codes, scale, q.zero_point, None if q.global_scale is None else torch.tensor(0.25, device=device))
    w = q.dequantize()
    x = torch.eye(k, device=device, dtype=DTYPES[dtype])
    assert torch.equal(run(q, x, Tile(64, 64, 1)).float(), w.T)


def test_the_order_of_arrival_does_not_change_the_result(device):
    k = 512 if device.type == "cpu" else 4096
    q = quantized(spec("e2m1*e4m3/16", 128, k), device)
    x = torch.randn(2, k, device=device, dtype=torch.bfloat16)
    first = run(q, x, Tile(64, 16, 1, split_k=8))
    for _ in range(2 if device.type == "cpu" else 50):
        assert torch.equal(run(q, x, Tile(64, 16, 1, split_k=8)), first)


def test_rows_of_x_may_lie_apart(device):
    q = quantized(spec("int4*bf16/32", 64, 64), device)
    x = torch.randn(5, 96, device=device, dtype=torch.bfloat16)[:, 16:80]
    assert error(run(q, x, SMALL), x, q.dequantize()) < TOLERANCE


def test_small_float16_scales_keep_their_bits(device):
    """2 ** -20 is subnormal in float16; a row's scales are stored relative to the row's largest."""
    q = quantized(spec("int4*bf16/64", 64, 128), device)
    q = type(q)("int4", q.codes, (torch.rand(64, 2, device=device) + 1).mul(2.0**-20).to(torch.bfloat16))
    x = torch.randn(3, 128, device=device, dtype=torch.float16) * 1024
    assert rel_rms(run(q, x, SMALL) * 512, matmul(x, q.dequantize()) * 512) < 2 * torch.finfo(torch.float16).eps


def test_mxfp4_beyond_the_range_of_float16(device):
    """Scales of 2 ** 40 and 2 ** -40 in different rows: x makes up for them, and a row's own power of two does in float16."""
    codes = torch.randint(0, 16, (64, 64), dtype=torch.uint8, device=device)
    scale = torch.full((64, 2), 127 + 40, dtype=torch.uint8, device=device)
    scale[:, 1] -= 3
    scale[32:] = 127 - 12
    from qplugins.kernels.quantized import QuantizedTensor

    q = QuantizedTensor("e2m1", codes, scale)
    x = torch.randn(3, 64, device=device, dtype=torch.float16)
    y, want = run(q, x, SMALL).float(), matmul(x, q.dequantize())
    assert torch.isinf(y[:, :32][want[:, :32].abs() > 1e5]).all()
    assert rel_rms(y[:, 32:], want[:, 32:]) < 2 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 4096, 4096), (16, 576, 576), (40, 28672, 4096), (300, 1000, 1536), (1024, 192, 576), (8192, 4096, 14336)]
)
def test_the_table_knows_every_shape(m, n, k):
    for text in ("e2m1*e4m3/16", "e4m3*f32/row"):
        tile = choose(m, spec(text, n, k), torch.device("cpu"))
        assert tile.block_n % 64 == 0 and tile.split_k >= 1
        blocks = -(-m // tile.block_m) * -(-n // tile.block_n)
        assert tile.split_k == 1 or blocks <= 4 * -(-n // 64)


@pytest.mark.gpu
@pytest.mark.parametrize("text", ["e2m1*e4m3/16", "int4*bf16/128+zero", "e4m3*f32/row", "int8*bf16/row", "e2m1*e8m0/32"])
@pytest.mark.parametrize("m", [1, 16, 17, 64, 100, 256, 1000])
def test_real_sizes_with_the_tables_tiles(text, m, device):
    if device.type != "cuda":
        pytest.skip("no GPU")
    for n, k in ((1536, 576), (4096, 4096), (1000, 2048)):
        k = k if text != "int4*bf16/128+zero" or k % 128 == 0 else 640
        q = quantized(spec(text, n, k), device)
        x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        assert error(run(q, x), x, q.dequantize()) < TOLERANCE, (n, k)


@pytest.mark.gpu
@pytest.mark.parametrize("text", ["e2m1*e4m3/16", "int4*bf16/128", "e4m3*f32/row", "e2m1*e8m0/32"])
@pytest.mark.parametrize(
    "tile",
    [
        Tile(64, 8, 4, 4, 3, split_k=2),
        Tile(64, 64, 2, 4, 3),
        Tile(64, 256, 1, 4, 3),
        Tile(128, 128, 1, 8, 3),
        Tile(128, 256, 1, 8, 3),
    ],
    ids=str,
)
def test_every_run_gives_the_same_bits(text, tile, device):
    """The tensor core reads its registers after the instruction was issued: a step that writes them too early shows here, now and then."""
    if device.type != "cuda":
        pytest.skip("no GPU")
    m, n, k = 1000 if tile.block_m > 8 else 8, 2048, 8192
    q = quantized(spec(text, n, k), device)
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    first = run(q, x, tile)
    assert error(first, x, q.dequantize()) < TOLERANCE
    w = pack(q, "triton")
    for _ in range(50):
        y = torch.full_like(first, torch.nan)
        linear(x, w.spec, list(w.tensors), y, None, tile)
        assert torch.equal(y, first)
