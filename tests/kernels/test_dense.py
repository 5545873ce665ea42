"""Weights decoded for PyTorch's product, against the reference."""

import pytest
import torch
from samples import quantized, spec
from test_linear import DTYPES, error

from qplugins.kernels.linear import dense, pack


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "text",
    [
        "e2m1*e4m3/16", "e2m1*e8m0/32", "e2m1*f32/row", "e4m3*f32/row", "e4m3*bf16/128", "e4m3*e8m0/32", "int4*bf16/32", "int4*bf16/128",
        "int4*fp16/128+zero", "int4*bf16/row+zero", "int8*bf16/row", "int8*f32/32+zero", "int8*fp16/128",
    ],
)  # fmt: skip
def test_every_format(text, dtype, device):
    q = quantized(spec(text, 136, 384), device)
    w = pack(q, "triton")
    got = torch.full((136, 384), torch.nan, dtype=DTYPES[dtype], device=device)
    dense.decode(w.spec, list(w.tensors), 0, got)
    # rounded once where a group's scale meets it, and once where the row's does; the interpreter rounds towards zero
    eps = torch.finfo(got.dtype).eps
    want = q.dequantize()
    assert ((got.float() - want).abs() <= 2.1 * eps * want.abs() + torch.finfo(got.dtype).smallest_normal).all()


@pytest.mark.parametrize("k", [96, 1000, 1040])
def test_columns_that_are_no_whole_tiles(k, device):
    q = quantized(spec("int8*bf16/row", 72, k), device)
    w = pack(q, "triton")
    got = torch.full((74, k), torch.nan, dtype=torch.bfloat16, device=device)
    dense.decode(w.spec, list(w.tensors), 0, got[:72])
    assert got[72:].isnan().all() and torch.allclose(got[:72].float(), q.dequantize(), rtol=0.02)


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_in_several_parts(bias, device, monkeypatch):
    m, n, k = 70, 200, 384
    monkeypatch.setattr(dense, "SCRATCH", 128 * k * 2)
    q = quantized(spec("e2m1*e4m3/16", n, k), device)
    w, x = pack(q, "triton"), torch.randn(m, k, dtype=torch.bfloat16, device=device)
    b = torch.randn(n, dtype=torch.bfloat16, device=device) if bias else None
    y = torch.full((m, n + 24), torch.nan, dtype=torch.bfloat16, device=device)
    dense.linear(x, w.spec, list(w.tensors), y[:, 8 : n + 8], b)
    assert y[:, :8].isnan().all() and y[:, n + 8 :].isnan().all()
    assert error(y[:, 8 : n + 8], x, q.dequantize(), b) < 2.0
