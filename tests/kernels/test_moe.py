"""The routed experts: choices sorted by expert, the grouped product of every format, the whole layer, and what compilers see of it."""

from dataclasses import replace

import pytest
import torch
from samples import quantized, rel_rms, spec
from torch.nn.functional import gelu, silu

from qplugins.dispatch import CPU, Machine, choose, explain
from qplugins.kernels import linear, moe
from qplugins.kernels.decode import CODES
from qplugins.kernels.linear import Spec
from qplugins.kernels.linear.tiles import Tile
from qplugins.kernels.moe import kernel, layout, order, tiles

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ACTIVATIONS = {"silu": silu, "gelu": gelu, "gelu_tanh": lambda x: gelu(x, approximate="tanh")}
TILE = Tile(64, 16, 1, split_k=2, stripe_m=2)
# What differs from float32 are roundings to the 16-bit type, each off by at most eps / 2 of a number, or by eps where the interpreter
# rounds towards zero. They are measured against the size that a sum of such products has before any of it cancels, which `sizes` carries
# through the layer. Rounded are, all in one direction at worst, a scaled weight and a result ...
PRODUCT = 1 / 2 + 1
# ... and, in a layer, the weights of both products, gate, up, act(gate) * up, down's part, the sum. A wrong matrix is off by a hundred.
LAYER = 1 / 2 + 1 / 2 + 5


def matrices(text, n, k, experts, device, dtype=torch.bfloat16):
    """(matrices of the experts, float32 [E, N, K]), of such a size that products with numbers of about 1 are about 1 again."""
    if text == "plain":
        found = [(torch.randn(n, k) / k**0.5).to(device, dtype) for _ in range(experts)]
        return found, torch.stack(found).float()
    found = [quantized(spec(text, n, k), device) for _ in range(experts)]
    found = [replace(q, global_scale=(q.global_scale or 1) * k**-0.5 / q.dequantize().square().mean().sqrt()) for q in found]
    return found, torch.stack([q.dequantize() for q in found])


def permute(found, columns):
    """The same codes for columns in another order, int32 [E, K]."""
    found = [replace(q, columns=c) for q, c in zip(found, columns, strict=True)]
    return found, torch.stack([q.dequantize() for q in found])


def random_ids(tokens, top_k, experts, device, missing=0.2):
    """int64 [T, k]: different experts for a token, and -1 for a part of them; not for all."""
    ids = torch.rand(tokens, experts).argsort(1)[:, :top_k]
    gone = torch.rand(tokens, top_k) < missing
    gone[0, 0] = False
    return torch.where(gone, -1, ids).to(device)


def sizes(x, weights, ids, gate_up, down, activation):
    """(y, size): float32 [T, N], what the layer is, and how large an error of one in every product before it may come out."""
    here = (ids >= 0)[..., None]
    e = ids.clamp(min=0)
    gate, up = torch.einsum("tk,tjnk->tjn", x.float(), gate_up[e]).chunk(2, 2)
    size_gate, size_up = torch.einsum("tk,tjnk->tjn", x.float() ** 2, gate_up[e] ** 2).sqrt().chunk(2, 2)
    act = ACTIVATIONS[activation](gate)
    h = act * up
    size_h = h**2 + (act * size_up) ** 2 + (1.1 * up * size_gate) ** 2  # no derivative of these activations exceeds 1.13
    w = torch.where(here, weights[..., None], 0)
    y = (w * torch.einsum("tjk,tjnk->tjn", h, down[e])).sum(1)
    return y, ((w**2) * torch.einsum("tjk,tjnk->tjn", size_h, down[e] ** 2)).sum(1).sqrt()


class Layer:
    """Random experts: `formats` of gate, up and down; gate and up fused where they are of one format and `fuse` says so."""

    def __init__(self, formats, k, n, experts, device, dtype=torch.bfloat16, implementation="triton", fuse=False, permuted=False):
        (gate, g), (up, u), (down, d) = (
            matrices(text, *shape, experts, device, dtype) for text, shape in zip(formats, ((n, k), (n, k), (k, n)), strict=True)
        )
        if permuted:
            a, b = torch.rand(experts, k, device=device).argsort(1).int(), torch.rand(experts, n, device=device).argsort(1).int()
            (gate, g), (up, u), (down, d) = (permute(m, columns) for m, columns in ((gate, a), (up, a), (down, b)))
        self.gate_up, self.down = torch.cat((g, u), 1), d
        both = [[moe.pack(m, implementation) for m in pair] for pair in zip(gate, up, strict=True)]
        both = [linear.fuse(pair) for pair in both] if fuse else both
        shards = [moe.stack(shard) for shard in zip(*both, strict=True)]
        last = moe.stack(moe.pack(m, implementation) for m in down)
        self.shards = [*shards, last]
        self.tensors = [t for w in self.shards for t in w.tensors]
        self.plans = linear.plan([(w.implementation, w.spec) for w in shards]), linear.plan([(last.implementation, last.spec)])
        self.x = torch.randn(1024, k, device=device, dtype=dtype)

    def kernel(self, x, weights, ids, activation="silu", tile=TILE):
        """What the Triton kernels make of it, on any device."""
        gate_up, down = map(linear.parse, self.plans)
        ours, theirs = layout.divide(self.tensors, gate_up, down)
        return kernel.experts(x, weights, ids, gate_up, ours, down, theirs, activation, tile)

    def error(self, y, x, weights, ids, activation="silu"):
        """The root mean square of y's error over that of its size, in units of eps."""
        want, size = sizes(x, weights, ids, self.gate_up, self.down, activation)
        return float((y.float() - want).norm() / size.norm()) / torch.finfo(y.dtype).eps


@pytest.fixture
def poison(monkeypatch):
    """Whatever is allocated holds NaN, or a number that is no index of anything."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        t = empty(*args, **kwargs)
        return t.fill_(torch.nan if t.is_floating_point() else torch.iinfo(t.dtype).max)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize(
    ("choices", "experts", "block_m", "first", "last", "dtype"),
    [
        (1, 1, 16, 0, 1, torch.int32),
        (8, 128, 8, 0, 128, torch.int64),
        (7, 3, 16, -1, 3, torch.int32),
        (255, 100, 8, 0, 100, torch.int32),
        (257, 5, 64, -2, 7, torch.int64),  # ids past the last expert are nobody's either
        (1000, 17, 16, -1, 17, torch.int32),
        (513, 300, 8, -100, 300, torch.int64),
        (40, 4, 8, 2, 3, torch.int32),
        (20, 4, 8, -1, 0, torch.int64),
        pytest.param(4500, 6, 128, 1, 4, torch.int32, id="more chunks than their counts are read at a time"),
    ],
)
def test_choices_are_sorted_by_expert_and_cut_into_blocks(choices, experts, block_m, first, last, dtype, device, poison):
    ids = torch.randint(first, last, (choices, 1), dtype=dtype, device=device)
    found, blocks = order.order(ids, experts, block_m)
    key = torch.where((ids >= 0) & (ids < experts), ids, experts).view(-1)
    want = key.sort(stable=True)
    here = int((key < experts).sum())
    assert torch.equal(found[:here].long(), want.indices[:here])
    counts = torch.bincount(key, minlength=experts + 1)[:experts].tolist()
    expected, start = [], 0
    for e, n in enumerate(counts):
        expected += [(e, start + i, start + min(i + block_m, n)) for i in range(0, n, block_m)]
        start += n
    assert blocks.shape[1] == order.bound(choices, experts, block_m) >= len(expected)
    assert [b for b in zip(*blocks.tolist(), strict=True) if b[1] < b[2]] == expected


def test_no_choice_makes_more_blocks_than_there_is_room_for():
    for choices, experts, block_m in ((9, 3, 4), (7, 20, 16), (16, 4, 1), (100, 7, 8)):
        # as many experts as there can be with one choice each, the rest with one: the most blocks for their number
        counts = [1] * min(choices, experts)
        counts[0] += choices - sum(counts)
        assert sum(-(-n // block_m) for n in counts) <= order.bound(choices, experts, block_m)


FORMATS = (
    "e2m1*e4m3/16", "e2m1*e8m0/32", "e2m1*bf16/32", "e2m1*f32/row",
    "e4m3*f32/row", "e4m3*bf16/128", "e4m3*e4m3/16", "e4m3*e8m0/32",
    "int4*bf16/32", "int4*fp16/64", "int4*bf16/row", "int4*e4m3/16",
    "int4*bf16/32+zero", "int4*fp16/128+zero", "int4*bf16/row+zero",
    "int8*bf16/row", "int8*fp16/128", "int8*f32/32+zero", "int8*bf16/row+zero",
    "plain",
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", FORMATS)
def test_every_format(text, dtype, device):
    """One product: each choice by its own expert's matrix, codes, scales, zero points and rows."""
    n, k, experts, top_k = 72, 256 if "128" in text else 128, 3, 2
    found, w = matrices(text, n, k, experts, device, DTYPES[dtype])
    stacked = moe.stack(moe.pack(m, "triton") for m in found)
    shard = linear.parse(linear.plan([("triton", stacked.spec)])).shards[0]
    x = torch.randn(3, k, device=device, dtype=DTYPES[dtype])
    ids = torch.tensor([[2, 0], [-1, 2], [0, 2]], device=device)
    y = torch.full((6, n + 8), torch.nan, dtype=x.dtype, device=device)
    kernel.multiply(x, top_k, *order.order(ids, experts, 16), shard, list(stacked.tensors), y[:, :n], TILE)
    here = ids.view(-1) >= 0
    assert y[~here].isnan().all() and y[:, n:].isnan().all(), "written where nothing was to be written"
    assert text == "plain" or not stacked.tensors[2].any(), "a lock was left"
    rows, mine = x.repeat_interleave(2, 0)[here].float(), w[ids.view(-1)[here]]
    want = torch.einsum("mk,mnk->mn", rows, mine)
    size = torch.einsum("mk,mnk->mn", rows**2, mine**2).sum().sqrt()
    assert float((y[here, :n].float() - want).norm() / size) / torch.finfo(x.dtype).eps < PRODUCT


def test_every_code_has_been_multiplied():
    assert {text.split("*")[0] for text in FORMATS} == {*CODES, "plain"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("formats", "k", "n", "experts", "tokens", "top_k", "activation"),
    [
        (("e2m1*e4m3/16", "e2m1*e4m3/16", "int4*bf16/32"), 64, 64, 5, 1, 2, "silu"),
        (("int4*bf16/32", "e4m3*f32/row", "plain"), 96, 32, 4, 7, 3, "silu"),
        (("plain", "int8*bf16/row", "e4m3*f32/row"), 80, 72, 3, 5, 1, "gelu"),
        (("plain", "plain", "plain"), 40, 24, 2, 4, 2, "gelu_tanh"),
        (("int4*bf16/row+zero", "int4*bf16/row+zero", "e2m1*e8m0/32"), 33, 32, 2, 40, 2, "silu"),
    ],
)
def test_the_layer(formats, k, n, experts, tokens, top_k, activation, dtype, device, poison):
    layer = Layer(formats, k, n, experts, device, DTYPES[dtype])
    x, weights = layer.x[:tokens], torch.rand(tokens, top_k, device=device)
    ids = random_ids(tokens, top_k, experts, device)
    y = layer.kernel(x, weights, ids, activation)
    assert layer.error(y, x, weights, ids, activation) < LAYER


def test_gate_and_up_of_one_format_are_one_product(device):
    layer = Layer(("int8*bf16/row",) * 3, 64, 64, 2, device, fuse=True)
    assert [w.spec.n for w in layer.shards] == [128, 64]
    x, weights, ids = layer.x[:3], torch.rand(3, 1, device=device), torch.tensor([[1], [0], [1]], device=device)
    assert layer.error(layer.kernel(x, weights, ids), x, weights, ids) < LAYER


def test_each_experts_columns_may_have_an_order_of_their_own(device, poison):
    """As GPTQ's act-order leaves them; gate and up of one expert have the same."""
    layer = Layer(("int4*bf16/32", "int4*bf16/32", "int8*f32/32+zero"), 64, 64, 3, device, fuse=True, permuted=True)
    assert len(layer.shards) == 2 and all(w.spec.permuted for w in layer.shards)
    x, weights, ids = layer.x[:5], torch.rand(5, 2, device=device), random_ids(5, 2, 3, device)
    assert layer.error(layer.kernel(x, weights, ids), x, weights, ids) < LAYER
    if device.type == "cpu":
        assert layer.error(moe.experts(x, weights, ids, layer.tensors, *layer.plans, "silu"), x, weights, ids) < LAYER


def test_a_choice_of_nobody_adds_nothing_whatever_its_weight(device, poison):
    layer = Layer(("int8*bf16/row",) * 3, 32, 32, 3, device)
    x, weights = layer.x[:4], torch.rand(4, 2, device=device)
    ids = torch.tensor([[0, -1], [-1, -1], [3, 2], [-7, 1000]], device=device, dtype=torch.int32)
    weights[ids == -1] = torch.nan
    y = layer.kernel(x, weights, ids)
    assert not y[1].any() and not y[3].any()
    alone = torch.tensor([[0], [2]], device=device)
    mine = torch.stack((weights[0, :1], weights[2, 1:]))
    assert torch.equal(y[[0, 2]], layer.kernel(x[[0, 2]], mine, alone))


def test_the_company_does_not_change_a_tokens_result(device):
    """A token alone, and among others that fill blocks before and after it: the same bits, as each has its own column of the product."""
    layer = Layer(("e2m1*e4m3/16",) * 3, 64, 64, 3, device)
    x, weights = layer.x[:20], torch.rand(20, 2, device=device)
    ids = random_ids(20, 2, 3, device, missing=0)
    y = layer.kernel(x, weights, ids)
    assert torch.equal(y[7:8], layer.kernel(x[7:8], weights[7:8], ids[7:8]))
    assert not layer.shards[0].tensors[2].any() and not layer.shards[-1].tensors[2].any(), "a lock was left"


def test_rows_may_lie_apart(device):
    layer = Layer(("int8*bf16/row",) * 3, 32, 32, 3, device)
    x = torch.cat((layer.x[:5],) * 2, 1)[:, 32:]
    weights, ids = torch.rand(5, 4, device=device)[:, 1:3], random_ids(5, 3, 3, device, missing=0.4)[:, 1:]
    assert torch.equal(layer.kernel(x, weights, ids), layer.kernel(x.contiguous(), weights.contiguous(), ids.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", moe.ACTIVATIONS)
def test_the_reference_on_a_cpu(activation, dtype):
    cpu = torch.device("cpu")
    layer = Layer(("int4*bf16/32+zero", "e4m3*f32/row", "plain"), 64, 96, 5, cpu, dtype, "reference")
    x, weights, ids = layer.x[:9], torch.rand(9, 2), random_ids(9, 2, 5, cpu).to(torch.int32)
    y = moe.experts(x, weights, ids, layer.tensors, *layer.plans, activation)
    want, _ = sizes(x, weights, ids, layer.gate_up, layer.down, activation)
    assert y.dtype == dtype
    # float32 sums in another order, then one rounding
    assert rel_rms(y, want) < max(1e-5, torch.finfo(dtype).eps)


def test_the_kernels_layout_on_a_cpu_runs_the_reference():
    cpu = torch.device("cpu")
    layer = Layer(("e2m1*e4m3/16", "int4*fp16/64", "plain"), 64, 96, 3, cpu)
    x, weights, ids = layer.x[:3], torch.rand(3, 2), random_ids(3, 2, 3, cpu)
    want, _ = sizes(x, weights, ids, layer.gate_up, layer.down, "silu")
    assert rel_rms(moe.experts(x, weights, ids, layer.tensors, *layer.plans, "silu"), want) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("tokens", [0, 3])
def test_no_tokens_and_no_choices(tokens, device):
    layer = Layer(("int8*bf16/row",) * 3, 32, 32, 3, device)
    ids = torch.empty(tokens, 0 if tokens else 2, dtype=torch.int32, device=device)
    y = moe.experts(layer.x[:tokens], ids.float(), ids, layer.tensors, *layer.plans, "silu")
    assert y.shape == (tokens, 32) and not y.any()


def test_stacks():
    cpu = torch.device("cpu")
    found, _ = matrices("int4*bf16/32", 72, 64, 3, cpu)
    weights = [moe.pack(m, "triton") for m in found]
    stacked = moe.stack(weights)
    assert stacked.spec == weights[0].spec and stacked.implementation == "triton"
    for e, w in enumerate(weights):
        assert all(torch.equal(s[e], t) for s, t in zip(stacked.tensors, w.tensors, strict=True))
    again = moe.stack((moe.pack(m, "triton") for m in found), experts=3)
    assert all(torch.equal(a, b) for a, b in zip(again.tensors, stacked.tensors, strict=True))


def test_what_cannot_be_stacked():
    cpu = torch.device("cpu")
    (a,), _ = matrices("int4*bf16/32", 72, 64, 1, cpu)
    (b,), _ = matrices("int4*bf16/64", 72, 64, 1, cpu)
    a, b = moe.pack(a, "triton"), moe.pack(b, "triton")
    with pytest.raises(ValueError, match=r"expert 1 is triton int4\*bf16/row 72x64 .*, expert 0 is triton int4\*bf16/32 72x64"):
        moe.stack([a, b])
    with pytest.raises(ValueError, match="3 experts were promised, 2 were given"):
        moe.stack(iter([a, a]), experts=3)
    with pytest.raises(ValueError, match="1 experts were promised, and there are more"):
        moe.stack(iter([a, a]), experts=1)
    with pytest.raises(ValueError, match="expert 1 is triton plain 8x8 .*float16"):
        moe.stack([moe.pack(torch.zeros(8, 8), "triton"), moe.pack(torch.zeros(8, 8, dtype=torch.float16), "triton")])


def test_experts_are_weights_only():
    (q,), _ = matrices("e4m3*f32/row", 64, 64, 1, torch.device("cpu"))
    assert moe.pack(q, "triton").spec.activation is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 33)}, r"x should be \[tokens, 32\].*has shape \(3, 33\)"),
        ({"weights": torch.zeros(3, 1)}, r"topk_weights should be \(3, 2\), as topk_ids is, has shape \(3, 1\)"),
        ({"ids": torch.zeros(4, 2, dtype=torch.int64)}, r"topk_ids should be \[3, choices of a token\], has shape \(4, 2\)"),
        ({"ids": torch.zeros(3, 2, dtype=torch.int16)}, "topk_ids should be int32 or int64, is torch.int16"),
        ({"activation": "relu"}, "unknown activation 'relu'; there are silu, gelu, gelu_tanh"),
        ({"tensors": []}, "gate and up have 6 tensors, down has 3; 0 were given"),
        ({"down": "reference int8*bf16/row 32x31"}, r"gate and up should have 2 \* 31 rows together .*, have 64"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    layer = Layer(("int8*bf16/row",) * 3, 32, 32, 2, torch.device("cpu"))
    given = {"x": layer.x[:3], "weights": torch.zeros(3, 2), "ids": torch.zeros(3, 2, dtype=torch.int64), "tensors": layer.tensors}
    given |= {"gate_up": layer.plans[0], "down": layer.plans[1], "activation": "silu"} | change
    with pytest.raises(ValueError, match=message):
        moe.experts(*given.values())


def test_a_compiled_graph_sees_one_opaque_call(device):
    layer = Layer(("e2m1*e8m0/32", "int8*bf16/row", "plain"), 64, 32, 3, device, implementation="reference")
    x, weights, ids = layer.x[:5], torch.rand(5, 2, device=device), random_ids(5, 2, 3, device)

    def model(x):
        return moe.experts(x * 2, weights, ids, layer.tensors, *layer.plans, "silu") + 1

    seen = []

    def backend(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    assert torch.equal(torch.compile(model, backend=backend, fullgraph=True)(x), model(x))
    assert sum("qplugins" in str(target) for target in seen) == 1
    args = (x, weights, ids, layer.tensors, *layer.plans, "silu")
    torch.library.opcheck(torch.ops.qplugins.experts, args, test_utils=("test_schema", "test_faketensor"))


def test_dispatch():
    gpu = Machine("cuda", (9, 0), "H100")
    for s in (spec("e2m1*e4m3/16", 64, 64), spec("e4m3*f32/row,token", 64, 64), Spec(64, 64)):
        assert choose(s, CPU, operation="experts") == "reference" and choose(s, gpu, operation="experts") == "triton"
    for s in (spec("int4*bf16/48", 64, 96), Spec(64, 64)):
        refusals = dict(explain(s, Machine("cuda", (7, 5), "T4"), operation="experts"))
        assert all(refusals.values()) and "compute capability 8.0" in refusals["triton"]
    assert "groups of 16, 32, 64" in dict(explain(spec("int4*bf16/48", 64, 96), gpu, operation="experts"))["triton"]
    assert "float32" in dict(explain(Spec(64, 64), gpu, torch.float32, "experts"))["triton"]


@pytest.mark.parametrize(("experts", "top_k", "k", "n"), [(128, 8, 2048, 768), (8, 2, 4096, 14336), (512, 10, 2048, 512), (1, 1, 64, 64)])
def test_shards_of_a_layer_share_the_blocks_of_their_choices(experts, top_k, k, n):
    specs = [spec(t, *shape) for t in ("e2m1*e4m3/16", "int8*bf16/row") for shape in ((2 * n, k), (k, n))] + [Spec(n, k)]
    for tokens in (1, 2, 7, 16, 64, 100, 512, 1000, 4096, 16384):
        found = tiles.choose(tokens * top_k, experts, specs, torch.device("cpu"))
        assert len({t.block_m for t in found}) == 1
        for tile, s in zip(found, specs, strict=True):
            blocks = order.bound(tokens * top_k, experts, tile.block_m) * -(-s.n // tile.block_n)
            assert tile.split_k == 1 or blocks <= experts * 4 * -(-s.n // 64), "more blocks share K than there are locks"


def test_tables_whose_tiles_differ_in_height(monkeypatch):
    monkeypatch.setattr(tiles.tiles, "choose", lambda m, s, device: Tile(64, 16 if s.n > 1000 else 8, 2))
    found = tiles.choose(6, 3, [Spec(64, 64), spec("int4*bf16/32", 640, 64)], torch.device("cpu"))
    assert found == [Tile(64, 8, 4), Tile(64, 8, 2)]


@pytest.mark.gpu
def test_a_cuda_graph_replays_other_choices(device):
    if device.type != "cuda":
        pytest.skip("no GPU")
    layer = Layer(("e2m1*e4m3/16", "int4*bf16/32", "plain"), 512, 256, 16, device)
    x, weights, ids = layer.x[:33].clone(), torch.rand(33, 4, device=device), random_ids(33, 4, 16, device)
    moe.experts(x, weights, ids, layer.tensors, *layer.plans, "silu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = moe.experts(x, weights, ids, layer.tensors, *layer.plans, "silu")
    for _ in range(3):
        x.copy_(layer.x[torch.randperm(1000)[:33]])
        ids.copy_(random_ids(33, 4, 16, device))
        graph.replay()
        assert layer.error(y, x, weights, ids) < LAYER
        assert torch.equal(y, moe.experts(x, weights, ids, layer.tensors, *layer.plans, "silu"))


@pytest.mark.gpu
@pytest.mark.parametrize("formats", [("e2m1*e4m3/16",) * 3, ("int4*bf16/128", "e4m3*f32/row", "int8*bf16/row"), ("plain",) * 3], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 33, 300, 2048])
def test_real_sizes_with_the_tables_tiles(formats, tokens, device):
    if device.type != "cuda":
        pytest.skip("no GPU")
    layer = Layer(formats, 1024, 768, 16, device, fuse=True)
    x, weights = layer.x[torch.randint(0, 1024, (tokens,))], torch.rand(tokens, 4, device=device)
    ids = random_ids(tokens, 4, 16, device)
    y = layer.kernel(x, weights, ids, tile=None)
    part = slice(0, 64)  # the float32 form gathers a matrix for every choice
    assert layer.error(y[part], x[part], weights[part], ids[part]) < LAYER
    for _ in range(20):
        assert torch.equal(layer.kernel(x, weights, ids, tile=None), y)


@pytest.mark.gpu
def test_an_expert_beyond_two_to_the_31(device):
    if device.type != "cuda":
        pytest.skip("no GPU")
    experts, (m,) = 260, matrices("int4*bf16/row", 8192, 4096, 1, device)[0]
    one = moe.pack(m, "triton")
    stacked = [torch.empty(experts, *t.shape, dtype=t.dtype, device=device) for t in one.tensors]
    assert stacked[0].numel() > 1 << 31
    stacked[2].zero_()
    for s, t in zip(stacked, one.tensors, strict=True):
        s[-1].copy_(t)
    shard = linear.parse(linear.plan([("triton", one.spec)])).shards[0]
    x, ids = torch.randn(3, 4096, device=device, dtype=torch.bfloat16), torch.full((3, 1), experts - 1, device=device)
    y, want = torch.full((2, 3, 8192), torch.nan, device=device, dtype=torch.bfloat16)
    kernel.multiply(x, 1, *order.order(ids, experts, 16), shard, stacked, y, TILE)
    linear.kernel.linear(x, one.spec, list(one.tensors), want, None, TILE)
    assert torch.equal(y, want)
