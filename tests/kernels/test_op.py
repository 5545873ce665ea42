"""The operators: fused layers, edge sizes, what the compiler sees of them."""

from dataclasses import replace

import pytest
import torch
from samples import quantized, rel_rms, spec

from qplugins.kernels.linear import Spec, embedding, fuse, linear, pack, plan
from qplugins.kernels.linear.ref import matmul

CPU = torch.device("cpu")
TEXTS = ("e2m1*e4m3/16", "e2m1*e8m0/32", "int4*bf16/32+zero", "int4*fp16/64", "int8*bf16/row", "e4m3*f32/row", "int8*f32/32+zero")


def layer(weights):
    return [t for w in weights for t in w.tensors], plan([(w.implementation, w.spec) for w in weights])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", TEXTS)
def test_the_reference_on_a_cpu(text, dtype):
    q = quantized(spec(text, 200, 192), CPU)
    x = torch.randn(2, 3, 192, dtype=dtype)
    tensors, p = layer([pack(q, "reference")])
    y = linear(x, tensors, p)
    assert y.dtype == dtype and y.shape == (2, 3, 200)
    # float32 sums in another order, then one rounding
    assert rel_rms(y, matmul(x, q.dequantize())) < max(1e-6, torch.finfo(dtype).eps)


@pytest.mark.parametrize("text", ["int4*fp16/32+zero", "int8*bf16/64"])
def test_columns_in_the_order_of_their_groups(text, device):
    """Act-order: x is put in that order by the operator, whatever runs the product."""
    q = replace(quantized(spec(text, 200, 256), device), columns=torch.randperm(256, dtype=torch.int32).to(device))
    x = torch.randn(5, 256, dtype=torch.bfloat16, device=device)
    tensors, p = layer([pack(q, "triton")])
    assert p == f"triton {text}+permuted 200x256"
    # a scaled weight is rounded to x's type, and the result is
    assert rel_rms(linear(x, tensors, p), matmul(x, q.dequantize())) < torch.finfo(torch.bfloat16).eps
    assert embedding(torch.tensor([7, 0], device=device), tensors, p, torch.float32).equal(q.dequantize()[[7, 0]])


def test_blocks_of_rows_join_without_a_seam(monkeypatch):
    from qplugins.kernels.linear import ref

    monkeypatch.setattr(ref, "BLOCK", 7 * 96)
    q = quantized(spec("e2m1*e4m3/16", 100, 96), CPU)
    x = torch.randn(3, 96)
    tensors, p = layer([pack(q, "reference")])
    assert rel_rms(linear(x, tensors, p), matmul(x, q.dequantize())) < 1e-6


@pytest.mark.parametrize("k", [1, 3, 30, 33])
@pytest.mark.parametrize("text", ["int4*bf16/row", "int8*bf16/row"])
def test_rows_that_end_within_a_word(text, k):
    q = quantized(spec(text, 5, k), CPU)
    x = torch.randn(2, k)
    tensors, p = layer([pack(q, "reference")])
    assert rel_rms(linear(x, tensors, p), matmul(x, q.dequantize())) < 1e-6


def test_a_layer_of_different_shards_is_one_output(device):
    """q INT4, k FP8, v BF16, a second FP8 one for the projection before them; each with its own columns and its part of the bias."""
    k = 128
    quant = [
        quantized(spec("int4*bf16/32", 96, k), device),
        quantized(spec("e4m3*f32/row", 40, k), device),
        quantized(spec("e2m1*e4m3/16", 33, k), device),
    ]
    plain = torch.randn(24, k, device=device, dtype=torch.bfloat16)
    implementation = "triton" if device.type == "cuda" else "reference"
    weights = [pack(q, implementation) for q in quant[:2]] + [pack(plain, "torch"), pack(quant[2], implementation)]
    want = torch.cat([quant[0].dequantize(), quant[1].dequantize(), plain.float(), quant[2].dequantize()])
    x, bias = torch.randn(7, k, device=device, dtype=torch.bfloat16), torch.randn(193, device=device, dtype=torch.bfloat16)
    tensors, p = layer(weights)
    for b in (bias, None):
        y, w = linear(x, tensors, p, b), matmul(x, want, b)
        for columns in (slice(0, 96), slice(96, 136), slice(136, 160), slice(160, 193)):
            assert rel_rms(y[:, columns], w[:, columns]) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_fused_matrices_give_the_same_columns(implementation, device):
    qs = [quantized(spec("e2m1*e4m3/16", n, 128), device) for n in (128, 64, 72)]
    x = torch.randn(3, 128, device=device, dtype=torch.bfloat16)
    apart, joined = layer([pack(q, implementation) for q in qs]), layer(fuse([pack(q, implementation) for q in qs]))
    assert len(joined[0]) == len(apart[0]) // 3
    assert rel_rms(linear(x, *joined), linear(x, *apart).float()) < torch.finfo(torch.bfloat16).eps


def test_kernel_layout_on_a_cpu_runs_the_reference():
    q = quantized(spec("int4*bf16/32+zero", 72, 96), CPU)
    x = torch.randn(3, 96, dtype=torch.bfloat16)
    assert rel_rms(linear(x, *layer([pack(q, "triton")])), matmul(x, q.dequantize())) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (64,)])
def test_no_rows_and_no_rank(shape, device):
    q = quantized(spec("int4*bf16/32", 72, 64), device)
    weights = [pack(q, "triton"), pack(torch.zeros(8, 64, device=device, dtype=torch.bfloat16), "torch")]
    y = linear(torch.ones(shape, device=device, dtype=torch.bfloat16), *layer(weights))
    assert y.shape == (*shape[:-1], 80)


def test_x_of_another_width_is_refused():
    tensors, p = layer([pack(torch.zeros(8, 64), "torch")])
    with pytest.raises(ValueError, match=r"K = 64 columns for torch plain 8x64, has shape \(3, 65\)"):
        linear(torch.ones(3, 65), tensors, p)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("text", TEXTS)
def test_embedding_fetches_rows(text, implementation, device):
    q = quantized(spec(text, 200, 192), device)
    tensors, p = layer([pack(q, implementation)])
    ids = torch.tensor([[0, 199, 5], [5, 64, 63]], device=device, dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        got = embedding(ids, tensors, p, dtype)
        assert got.shape == (2, 3, 192) and torch.equal(got, q.dequantize()[ids.long()].to(dtype))
    assert embedding(ids[:, :0], tensors, p, torch.bfloat16).shape == (2, 0, 192)


def test_embedding_of_a_plain_matrix():
    w = torch.randn(10, 6)
    tensors, p = layer([pack(w, "torch")])
    assert torch.equal(embedding(torch.tensor([3, 3]), tensors, p, torch.float32), w[[3, 3]])


def test_a_compiled_graph_sees_two_opaque_calls(device):
    q = quantized(spec("e2m1*e4m3/16", 72, 64), device)
    tensors, p = layer([pack(q, "reference")])

    def model(ids):
        x = embedding(ids, tensors, p, torch.bfloat16)
        return linear(x * 2, tensors, p) + 1

    ids = torch.arange(5, device=device)
    seen = []

    def backend(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    got = torch.compile(model, backend=backend, fullgraph=True)(ids)
    assert torch.equal(got, model(ids))
    assert [str(t).split(".")[0] for t in seen if "qplugins" in str(t)] == ["qplugins"] * 2


def test_fake_tensors_have_the_real_ones_shape_and_dtype(device):
    q = quantized(spec("int4*bf16/32", 72, 64), device)
    tensors, p = layer([pack(q, "reference")])
    x = torch.randn(2, 3, 64, device=device, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.qplugins.linear, (x, tensors, p, None), test_utils=("test_schema", "test_faketensor"))
    ids = torch.zeros(2, 3, dtype=torch.int64, device=device)
    torch.library.opcheck(torch.ops.qplugins.embedding, (ids, tensors, p, torch.bfloat16), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
def test_a_cuda_graph_replays_a_layer(device):
    if device.type != "cuda":
        pytest.skip("no GPU")
    q = quantized(spec("e2m1*e4m3/16", 4096, 2048), device)
    tensors, p = layer([pack(q, "triton"), pack(torch.randn(64, 2048, device=device, dtype=torch.bfloat16), "torch")])
    x = torch.randn(3, 2048, device=device, dtype=torch.bfloat16)
    linear(x, tensors, p)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, tensors, p)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, linear(x, tensors, p))


def test_specs_can_be_made_before_there_are_tensors():
    q = quantized(spec("e2m1*e4m3/16", 72, 64), CPU)
    assert pack(q).spec == Spec(72, 64, "e2m1", "e4m3", 16)


def of_gain_one(q):
    """The matrix with another global scale: y has the size that x has."""
    return replace(q, global_scale=q.global_scale * q.shape[0] ** 0.5 / q.dequantize().norm())


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 16, 32, 64])
@pytest.mark.parametrize("n", [1024, 4096, 6144])
def test_each_product_of_a_chain_has_what_the_one_before_wrote(m, n, device):
    """Programs may come up before the kernel in front of them is done. Bit for bit as if each call were waited for, also in a CUDA graph, where
    the locks and the memory for sums are used again right away."""
    sizes = [(n, 2048), (2048, n)]
    layers = [layer([pack(of_gain_one(quantized(spec("e2m1*e4m3/16", *size), device)), "triton")]) for size in sizes] * 3
    x = torch.randn(m, 2048, dtype=torch.bfloat16, device=device)

    def products(wait: bool) -> list[torch.Tensor]:
        found = [x]
        for tensors, p in layers:
            found.append(linear(found[-1], tensors, p))
            if wait:
                torch.cuda.synchronize()
        return found

    want = products(True)
    assert 0.1 < float(want[-1].float().square().mean()) < 10
    for _ in range(20):
        assert all(map(torch.equal, products(False), want))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = products(False)
    for _ in range(20):
        graph.replay()
        assert all(map(torch.equal, got, want))
