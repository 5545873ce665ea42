"""FP8 layers: the quantizer, and torch._scaled_mm behind it."""

import pytest
import torch
from samples import quantized, rel_rms, spec

from qplugins.kernels.linear import fp8, fp8_few, linear, pack, plan
from qplugins.kernels.linear.ref import matmul
from qplugins.kernels.quantized import QuantizedTensor


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("m", "k"), [(1, 16), (3, 1000), (5, 300)])
def test_the_quantizer_finds_what_needs_no_rounding(m, k, static, device, monkeypatch):
    """e4m3 numbers times a power of two, 448 among them. The interpreter gets e4m3's rounding wrong, so that is left to a GPU, below."""
    monkeypatch.setattr(fp8, "BLOCK", 512)  # so that 1000 columns are walked in parts
    codes = torch.randint(0, 0x7F, (m, k), dtype=torch.uint8) | (torch.randint(0, 2, (m, k), dtype=torch.uint8) << 7)
    codes[:, k // 2] = 0xFE
    power = torch.full((m, 1), 0.25) if static else torch.exp2(torch.randint(-3, 3, (m, 1)))
    x = torch.full((m, k + 8), torch.nan)
    x[:, :k] = codes.view(torch.float8_e4m3fn).float() * power
    q, scale = fp8.quantize(x.to(device, torch.bfloat16)[:, :k], torch.tensor([0.25], device=device) if static else None)
    assert torch.equal(q.cpu().view(torch.uint8), codes) and torch.equal(scale.cpu(), power)


def test_a_row_of_zeros_and_what_a_stored_scale_does_not_reach(device):
    q, scale = fp8.quantize(torch.zeros(2, 32, device=device, dtype=torch.bfloat16))
    assert not q.float().any() and (scale > 0).all()
    q, _ = fp8.quantize(torch.full((1, 32), -1000.0, device=device, dtype=torch.bfloat16), torch.tensor([1.0], device=device))
    assert (q.float() == -448).all()


def test_rows_to_spare(device, monkeypatch):
    """torch._scaled_mm gets whole blocks of rows on Hopper, and what is in those that nobody asked for does not matter."""
    monkeypatch.setattr(fp8, "on_hopper", lambda: True)
    assert [fp8.padded(m) for m in (1, 127, 128, 129, 256, 700)] == [1, 127, 128, 256, 256, 768]
    monkeypatch.setattr(fp8, "on_hopper", lambda: False)
    assert fp8.padded(700) == 700
    x = torch.randn(3, 64, device=device, dtype=torch.bfloat16)
    (q, scale), (more, scales) = fp8.quantize(x), fp8.quantize(x, rows=8)
    assert more.shape == (8, 64) and scales.shape == (8, 1)
    assert torch.equal(more[:3].view(torch.uint8), q.view(torch.uint8)) and torch.equal(scales[:3], scale)


@pytest.mark.gpu
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("m", "k"), [(1, 16), (3, 1000), (64, 14336)])
def test_the_quantizer_rounds_as_torch_does(m, k, static, device):
    if device.type != "cuda":
        pytest.skip("no GPU")
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    stored = torch.tensor([0.01], device=device) if static else None
    q, scale = fp8.quantize(x, stored)
    want_q, want_scale = fp8.quantize_ref(x, stored)
    # a division may be off by its last bit, and with it a number that is halfway between two codes
    assert torch.allclose(scale, want_scale, rtol=1e-6)
    assert (q.view(torch.uint8) != want_q.view(torch.uint8)).float().mean() < 1e-3


@pytest.mark.parametrize("row_scales", [True, False])
@pytest.mark.parametrize(
    ("m", "n", "k", "multiprocessors"), [(1, 64, 128, 1), (16, 72, 1024, 4), (17, 130, 1152, 6), (32, 200, 512, 132), (31, 72, 512, 1)]
)
def test_the_product_of_few_rows(m, n, k, multiprocessors, row_scales, device, monkeypatch):
    """Tails of N and of K's shares, on more and fewer programs; into columns of a wider output."""
    monkeypatch.setattr(fp8_few, "multiprocessors", lambda device: multiprocessors)
    s = spec("e4m3*f32/row", n, k)
    assert (fp8_few.shares(s, device)[0] > 1) == (k > 512)
    weight = quantized(s, device).codes.view(torch.float8_e4m3fn)
    row = torch.rand(n if row_scales else 1, device=device) + 0.5
    bias = torch.randn(n, device=device, dtype=torch.bfloat16)
    locks = torch.full((fp8.LOCKS,), 7, dtype=torch.int32, device=device)
    q, scale = fp8.quantize(torch.randn(m, k, device=device, dtype=torch.bfloat16), locks=locks)
    assert not locks.any()
    y = torch.full((m + 1, n + 8), torch.nan, device=device, dtype=torch.bfloat16)
    for _ in range(2):  # a second time on the locks as the first left them
        fp8_few.linear(q, scale, weight, row, s, locks, y[:m, 4 : n + 4], bias)
    want = matmul(q.float() * scale, weight.float() * row.expand(n)[:, None], bias)
    assert rel_rms(y[:m, 4 : n + 4], want) < torch.finfo(torch.bfloat16).eps
    y[:m, 4 : n + 4] = torch.nan
    assert y.isnan().all(), "written beside the output"


def test_without_a_gpu_the_weight_is_8_bit_and_the_product_is_not():
    q = quantized(spec("e4m3*f32/row", 48, 64), torch.device("cpu"))
    w = pack(q, "scaled_mm", activation="token")
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    y = linear(x, w.tensors, plan([(w.implementation, w.spec)]))
    assert rel_rms(y, matmul(x, q.dequantize())) < torch.finfo(torch.bfloat16).eps


def test_one_scale_a_matrix_is_kept_as_one_only_where_x_has_one_too():
    codes = torch.zeros(32, 16, dtype=torch.uint8)
    q = QuantizedTensor("e4m3", codes, torch.full((32, 1), 0.5))
    assert pack(q, "scaled_mm", activation="token").tensors[1].shape == (32,)
    assert pack(q, "scaled_mm", activation="tensor", input_scale=torch.tensor(2.0)).tensors[1].shape == (1,)
    with pytest.raises(ValueError, match="input_scale belongs to"):
        pack(q, "scaled_mm", activation="tensor")


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 17, 64, 300, 1100])
@pytest.mark.parametrize("kind", ["token", "static row", "static matrix"])
def test_scaled_mm(kind, m, device):
    if device.type != "cuda" or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no GPU with FP8 products")
    q = quantized(spec("e4m3*f32/row", 272, 512), device)
    if kind == "static matrix":
        q = QuantizedTensor("e4m3", q.codes, torch.full((272, 1), 0.003, device=device))
    x, bias = torch.randn(m, 512, device=device, dtype=torch.bfloat16), torch.randn(272, device=device, dtype=torch.bfloat16)
    stored = None if kind == "token" else torch.tensor([0.02], device=device)
    w = pack(q, "scaled_mm", activation="token" if kind == "token" else "tensor", input_scale=stored)
    plain = torch.randn(16, 512, device=device, dtype=torch.bfloat16)
    codes, scale = fp8.quantize_ref(x, stored)
    want = matmul(codes.float() * scale, q.dequantize(), bias)
    # the same codes on both sides; cuBLASLt adds up e4m3 products in fewer bits than float32 has
    y = linear(x, w.tensors, plan([(w.implementation, w.spec)]), bias)
    assert rel_rms(y, want) < torch.finfo(torch.bfloat16).eps
    two = linear(x, [*w.tensors, plain], plan([(w.implementation, w.spec), ("torch", pack(plain, "torch").spec)]))
    assert rel_rms(two[:, :272], want - bias.float()) < torch.finfo(torch.bfloat16).eps
