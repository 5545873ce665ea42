"""The product of very few rows against the float32 reference, and which kernel a layer gets."""

from functools import partial

import pytest
import test_linear
import torch
from samples import quantized, spec
from test_linear import DTYPES, TOLERANCE, error

from qplugins.kernels.linear import few, kernel, variants

CPU = torch.device("cpu")
FORMATS = [
    "e2m1*e4m3/16", "e2m1*e8m0/32", "e2m1*f32/row", "int4*bf16/32", "int4*fp16/64", "int4*bf16/128", "int4*bf16/row", "int4*f32/64",
    "int4*bf16/32+zero", "int4*fp16/128+zero", "int4*bf16/row+zero", "e4m3*f32/row", "e4m3*bf16/128", "int8*fp16/128", "int8*bf16/row+zero",
]  # fmt: skip


run = partial(test_linear.run, multiply=few.linear)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", FORMATS)
def test_every_format(text, dtype, device):
    """K in whole steps of all warps, and what is left over."""
    for k in (2048, 1152):
        q = quantized(spec(text, 72, k), device)
        x = torch.randn(5, k, device=device, dtype=DTYPES[dtype])
        assert error(run(q, x), x, q.dequantize()) < TOLERANCE, k


@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 64), (8, 1, 32), (7, 200, 192), (3, 72, 160), (2, 1000, 64), (4, 15, 2080)])
def test_odd_sizes(m, n, k, device):
    for text in ("int4*bf16/32", "e4m3*f32/row"):
        q = quantized(spec(text, n, k), device)
        x = torch.randn(m, k + 32, device=device, dtype=torch.bfloat16)[:, :k]
        bias = torch.randn(n, device=device, dtype=torch.bfloat16)
        # a single number may be several times as far off as many are on average
        assert error(run(q, x, bias=bias, spare=8), x, q.dequantize(), bias) < TOLERANCE * (1 if m * n >= 64 else 5), text


@pytest.mark.parametrize("k", [48, 80, 1000])
def test_k_that_is_no_whole_number_of_tiles(k, device):
    for text in ("int4*bf16/row", "e2m1*e4m3/16" if k % 16 == 0 else "e2m1*f32/row"):
        q = quantized(spec(text, 64, k), device)
        x = torch.randn(4, k, device=device, dtype=torch.bfloat16)
        assert error(run(q, x), x, q.dequantize()) < TOLERANCE, text


def test_nothing_past_the_last_row_or_column_of_x_counts(device):
    """x between other numbers that are not finite: a tail that multiplied them would show."""
    q = quantized(spec("int4*bf16/32", 64, 96), device)
    around = torch.full((8, 256), torch.nan, dtype=torch.bfloat16, device=device)
    around[1:4, 32:128] = torch.randn(3, 96, device=device)
    x = around[1:4, 32:128]
    assert error(run(q, x), x, q.dequantize()) < TOLERANCE


@pytest.mark.parametrize(
    ("n", "stages"),
    [(1024, 4), (2112, 4), (2128, 3), (4096, 3), (4224, 3), (4240, 4), (6144, 4), (8192, 3), (8448, 3), (8464, None), (28672, None)],
)
def test_stages_leave_room_for_all_programs(n, stages):
    assert few.stages_of(spec("int4*bf16/128", n, 4096), CPU) == stages  # of 132 multiprocessors


@pytest.mark.parametrize(
    ("text", "n", "m", "ours"),
    [
        ("e2m1*e4m3/16", 4096, 1, True),
        ("int4*bf16/128", 8192, 8, True),
        ("int4*bf16/128", 8192, 9, False),
        ("e2m1*e4m3/16", 28672, 1, False),
        ("int8*bf16/row", 4096, 1, False),
    ],
)
def test_which_layers_it_is_for(text, n, m, ours, monkeypatch):
    """On Hopper; elsewhere it is for none."""
    s = spec(text, n, 512)
    assert not few.suits(m, s, CPU) or torch.cuda.is_available()
    called = []
    monkeypatch.setattr(few, "on_hopper", lambda: True)
    monkeypatch.setattr(few, "linear", lambda *a: called.append("few"))
    monkeypatch.setattr(kernel, "linear", lambda *a: called.append("kernel"))
    variants.linear(torch.empty(m, 512), s, [], torch.empty(m, n))
    assert called == ["few" if ours else "kernel"]
