"""Nothing is left to compile once a layer has been warmed."""

from dataclasses import replace

import pytest
import torch
from samples import quantized, spec

from qplugins.kernels import linear as ops
from qplugins.kernels.linear import dense, few, fp8, fp8_few, fp8_wide, kernel, variants, wide
from qplugins.kernels.linear.layout import tile_k
from qplugins.kernels.linear.product import shares
from qplugins.kernels.linear.tiles import choose

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "s",
    [
        spec("e2m1*e4m3/16", 4096, 4096),
        spec("int4*bf16/128", 28672, 4096),
        spec("int8*bf16/row", 576, 1536),
        spec("e2m1*e8m0/32", 640, 96),
        spec("int8*bf16/row", 768, 14336),
        spec("int8*bf16/row", 7168, 25664),
    ],
)
def test_every_number_of_rows_runs_a_variant_that_is_warmed(s):
    known = variants.variants(s, CPU)
    assert 4 <= len(known) <= 16
    for m in range(1, variants.MOST + 1):
        tile = choose(m, s, CPU)
        key = replace(tile, split_k=1, stripe_m=1), shares(-(-s.k // tile_k(s)), tile)[0] > 1, kernel.schedule(m, s, tile, CPU).early
        assert key in known, m
    for (tile, shared, _), m in known.items():
        assert tile.block_m == choose(m, s, CPU).block_m and shared <= (m <= 1024)

    known = variants.wide_variants(s, CPU)
    assert 1 <= len(known) <= 2 * len(wide.TILES)
    for m in range(1, variants.MOST_WIDE + 500):
        if wide.suits(m, s):
            assert replace(wide.choose(m, s, CPU), stripe_m=1) in known, m


def test_off_the_gpu_nothing_runs(monkeypatch):
    monkeypatch.setattr(kernel, "linear", None)
    w = ops.pack(quantized(spec("e2m1*e4m3/16", 64, 64), CPU), "triton")
    variants.warm(ops.plan([(w.implementation, w.spec)]), list(w.tensors), torch.bfloat16, False)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1024, 28672])
@pytest.mark.parametrize("bias", [False, True])
def test_no_call_compiles_afterwards(bias, n, device):
    q = quantized(spec("int4*bf16/64", n, 832), device)
    w = ops.pack(q, "triton")
    plan, tensors = ops.plan([(w.implementation, w.spec)]), list(w.tensors)
    variants.warm(plan, tensors, torch.bfloat16, bias)

    def compiled() -> list[int]:
        return [
            len(k.device_caches[torch.cuda.current_device()][0])
            for k in (few.few_kernel, kernel.linear_kernel, dense.decode_kernel, wide.wide_kernel)
        ]

    before = compiled()
    assert min(before[1:3]) > 0
    b = torch.zeros(n, dtype=torch.bfloat16, device=device) if bias else None
    for m in (*range(1, 140), *range(150, 8300, 111 if n == 1024 else 1111)):
        ops.linear(torch.randn(m, 832, dtype=torch.bfloat16, device=device), tensors, plan, b)
    assert compiled() == before


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1000, 1004])
def test_no_call_of_a_layer_of_several_shards_compiles_afterwards(n, device):
    """Their columns of y lie apart by the layer's, and begin somewhere within them."""
    weights = [ops.pack(quantized(spec(text, n, 832), device), "triton") for text in ("int4*bf16/64", "e2m1*e4m3/16")]
    plan, tensors = ops.plan([(w.implementation, w.spec) for w in weights]), [t for w in weights for t in w.tensors]
    variants.warm(plan, tensors, torch.bfloat16, False)

    def compiled() -> list[int]:
        return [len(k.device_caches[torch.cuda.current_device()][0]) for k in (few.few_kernel, kernel.linear_kernel, wide.wide_kernel)]

    before = compiled()
    for m in (1, 7, 16, 30, 50, 100, 200, 500, 3000):
        ops.linear(torch.randn(m, 832, dtype=torch.bfloat16, device=device), tensors, plan)
    assert compiled() == before


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1024, 2048), (1008, 4096)])
def test_no_call_of_an_fp8_layer_compiles_afterwards(shape, device):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no GPU with FP8 products")
    w = ops.pack(quantized(spec("e4m3*f32/row", *shape), device), "scaled_mm", activation="token")
    plan, tensors = ops.plan([(w.implementation, w.spec)]), list(w.tensors)
    variants.warm(plan, tensors, torch.bfloat16, False)

    def compiled() -> list[int]:
        kernels = fp8.quantize_kernel, fp8_few.few_kernel, fp8_wide.fp8_wide_kernel
        return [len(k.device_caches[torch.cuda.current_device()][0]) for k in kernels]

    before = compiled()
    assert before[0] > 0
    for m in (*range(1, 140), *range(150, 600, 50), 4096):
        ops.linear(torch.randn(m, shape[1], dtype=torch.bfloat16, device=device), tensors, plan)
    assert compiled() == before
