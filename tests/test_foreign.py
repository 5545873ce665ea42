"""Layouts of AutoAWQ, GPTQ and ModelOpt: bytes by hand, and a second, plainer reading of each; then configs, checkpoints and `convert`.

`packed` writes the layouts from a description of where each bit goes, a code at a time, and shares nothing with what reads them.
"""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from folders import change, small_llama
from safetensors.torch import load_file
from torch import Tensor, tensor
from typer.testing import CliRunner

from integration_tests import foreign
from qplugins import serving
from qplugins.checkpoints.convert import convert
from qplugins.checkpoints.reader import Checkpoint
from qplugins.checkpoints.verify import verify
from qplugins.cli import app
from qplugins.formats import FOREIGN, FORMATS, CheckpointError, any_format, get_format, producer
from qplugins.kernels.linear import fuse, linear, pack, plan, spec_of, unpack
from qplugins.layer import MixedLinear, Shard, Span
from qplugins.layer_map import LayerMap

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
INTEGER = [name for name, f in FOREIGN.items() if f.code.startswith("int")]


def int32(*words: int) -> Tensor:
    return tensor([w - (1 << 32) if w >> 31 else w for w in words], dtype=torch.int32)


# --- bytes written by hand


def test_awq_by_hand():
    """Halves of a word from the low end: rows 0, 2, 4, 6, 1, 3, 5, 7."""
    qweight = int32(0x75316420, 0xFFFFFFFF)[:, None]  # column 0: row n holds n; column 1: all 15
    qzeros, scales = int32(0x88888888)[None], torch.full((1, 8), 0.5, dtype=torch.float16)
    q = any_format("awq_int4_channel_asym").read({"qweight": qweight, "qzeros": qzeros, "scales": scales}, 8, 2)
    assert q.codes[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7] and q.codes[:, 1].tolist() == [15] * 8
    assert q.dequantize().equal(torch.stack(((torch.arange(8.0) - 8) / 2, torch.full((8,), 3.5)), 1))
    zeros = any_format("awq_int4_channel_asym").read({"qweight": qweight, "qzeros": int32(0x75316420)[None], "scales": scales}, 8, 2)
    assert not zeros.dequantize()[:, 0].any()  # each row's zero point is its code


def test_gptq_by_hand():
    """Codes 0 .. 7 of one row in a word, low end first; zero points are of rows, and lack one, or not in v2."""
    stored = {"qweight": int32(0x76543210)[:, None].expand(1, 8).contiguous(), "scales": torch.full((1, 8), 2.0, dtype=torch.float16)}
    stored["qzeros"], stored["g_idx"] = int32(0x76543210)[None], torch.zeros(8, dtype=torch.int32)
    codes, rows = torch.arange(8.0), torch.arange(8.0)[:, None]
    assert any_format("gptq_v2_int4_channel_asym").read(stored, 8, 8).dequantize().equal((codes - rows) * 2)
    assert any_format("gptq_int4_channel_asym").read(stored, 8, 8).dequantize().equal((codes - rows - 1) * 2)
    assert any_format("gptq_int4_channel").read(stored, 8, 8).dequantize().equal((codes - 8).expand(8, 8) * 2)


def test_gptq_zero_points_of_zero_borrowed_from_the_next():
    """Less one, of words: 0 and 8 in the lowest halves, 0x80 - 0x11 = 0x6F."""
    stored = {"qweight": torch.zeros(1, 8, dtype=torch.int32), "scales": torch.ones(1, 8)}
    q = any_format("gptq_int4_channel_asym").read({**stored, "qzeros": int32(0x00000080 - 0x11111111 + (1 << 32))[None]}, 8, 8)
    assert (q.zero_point[:, 0] + 8).tolist() == [0, 8, 0, 0, 0, 0, 0, 0]


def test_gptq_8_bits_by_hand():
    stored = {"qweight": int32(0xFF818000)[:, None], "qzeros": int32(0x7F7F7F7F)[None, :0], "scales": tensor([[2.0]])}
    assert any_format("gptq_int8").read(stored, 1, 4).dequantize().tolist() == [[-256, 0, 2, 254]]


def test_act_order_by_hand():
    """Columns 0 and 2 are group 1, the others group 0: each has its own group's scale."""
    g_idx = tensor([1, 0, 1, 0] * 16, dtype=torch.int32)
    stored = {"qweight": int32(*[0x99999999] * 8)[:, None], "qzeros": int32(0x77777777)[None, :0].expand(2, 0), "g_idx": g_idx}
    q = any_format("gptq_int4_g32_act").read({**stored, "scales": tensor([[1.0], [10.0]])}, 1, 64)
    assert q.columns.tolist() == [*range(1, 64, 2), *range(0, 64, 2)] and q.dequantize()[0].tolist() == [10, 1] * 32


def test_modelopt_nvfp4_by_hand():
    """weight_scale_2 is a factor, where weight_global_scale is a divisor."""
    weight = tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8)
    scale = tensor([[0x40]], dtype=torch.uint8).view(torch.float8_e4m3fn)  # 2
    for factor in (tensor(4.0), tensor([4.0])):
        got = any_format("modelopt_nvfp4").read({"weight": weight, "weight_scale": scale, "weight_scale_2": factor}, 1, 16)
        assert got.dequantize().tolist() == [[8 * v for v in E2M1]]


def test_modelopt_fp8_by_hand():
    codes = tensor([[0x38, 0xB8], [0x7E, 0x01]], dtype=torch.uint8).view(torch.float8_e4m3fn)  # 1, -1; 448, 2 ** -9
    of_rows = any_format("modelopt_fp8").read({"weight": codes, "weight_scale": tensor([2.0, 0.5])}, 2, 2)
    assert of_rows.dequantize().tolist() == [[2, -2], [224, 2**-10]]


# --- a plainer reading


def packed(fmt, n: int, k: int, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Random tensors of an integer layout, and the matrix that they mean, element by element from the layout's description."""
    g = torch.Generator().manual_seed(seed)
    bits, size = int(fmt.code[3:]), fmt.group_size or k
    codes = torch.randint(0, 1 << bits, (n, k), generator=g)
    scales = ((torch.rand(k // size, n, generator=g) + 0.5) * 0.01).to(torch.float16)
    symmetric = fmt.twin.scheme["weights"]["symmetric"] if fmt.twin else fmt.scheme["weights"]["symmetric"]
    zeros = torch.full((k // size, n), 1 << (bits - 1)) if symmetric else torch.randint(1, 1 << bits, (k // size, n), generator=g)
    order = torch.randperm(k, generator=g) if fmt.permuted else torch.arange(k)
    g_idx = torch.empty(k, dtype=torch.int32)
    g_idx[order] = torch.arange(k, dtype=torch.int32) // size
    group = g_idx.to(torch.int64)
    w = (codes - zeros[group].T) * scales[group].T.to(torch.float32)

    def words(rows: Tensor, places) -> Tensor:
        """int32 [R, L / (32/b)]: code j of each run at bits b * places[j]"""
        runs = rows.view(rows.shape[0], -1, 32 // bits)
        total = sum(runs[..., j] << (bits * place) for j, place in enumerate(places))
        return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)

    plain = range(32 // bits)
    if fmt.name.startswith("awq"):
        places = [[0, 2, 4, 6, 1, 3, 5, 7].index(j) for j in range(8)]
        return {"qweight": words(codes.T.contiguous(), places), "qzeros": words(zeros, places), "scales": scales}, w
    if fmt.name.startswith("gptq"):
        less = 0 if fmt.name.startswith("gptq_v2") else 1
        qweight = words(codes, plain).T.contiguous()
        return {"qweight": qweight, "qzeros": words(zeros - less, plain), "scales": scales, "g_idx": g_idx}, w
    stored = {"weight_packed": words(codes, plain), "weight_scale": scales.T.contiguous(), "weight_g_idx": g_idx}
    if not symmetric:
        stored["weight_zero_point"] = words(zeros, plain).T.contiguous()
    return stored, w


@pytest.mark.parametrize("name", INTEGER)
def test_reads_what_the_layout_says(name):
    fmt, n, k = any_format(name), 24, 256
    stored, w = packed(fmt, n, k)
    fmt.check("layer", stored, n, k)
    assert fmt.infer_shape(stored) == (n, k) and fmt.problem(stored, n, k) is None
    q = fmt.read(stored, n, k)
    assert q.dequantize().equal(w) and spec_of(q).permuted == fmt.permuted == fmt.spec(n, k).permuted


@pytest.mark.parametrize("name", INTEGER)
def test_its_twin_stores_the_same(name):
    fmt, n, k = any_format(name), 24, 256
    stored, w = packed(fmt, n, k)
    twin = fmt.twin or fmt
    written = twin.store(fmt.read(stored, n, k))
    twin.check("layer", written, n, k)
    assert twin.read(written, n, k).dequantize().equal(w) and twin.problem(written, n, k) is None
    # and so does that library, which rounds each product to the scale's float16
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**twin.scheme["weights"]), format=twin.scheme["format"])
    theirs = BaseCompressor.get_value_from_registry(twin.scheme["format"]).decompress(written, scheme)["weight"]
    assert theirs.equal(w.to(theirs.dtype))


@pytest.mark.parametrize("name", ["awq_int4_g64_asym", "gptq_int4_g64", "gptq_int8_g64"])
def test_vllm_packs_the_same_words(name):
    """vLLM's own packers, which its kernels' tests make such checkpoints with."""
    utils = pytest.importorskip("vllm.model_executor.layers.quantization.utils.quant_utils")
    fmt, (stored, _) = any_format(name), packed(any_format(name), 24, 256)
    bits, codes = int(fmt.code[3:]), fmt.read(stored, 24, 256).codes.T.to(torch.int32).contiguous()
    pack_words = utils.awq_pack if name.startswith("awq") else utils.gptq_pack
    assert pack_words(codes, bits, 256, 24).equal(stored["qweight"])


# --- slices, and products of permuted matrices


@pytest.mark.parametrize("name", [n for n in INTEGER if not FOREIGN[n].permuted and n.startswith(("awq", "gptq_int"))])
def test_ranks_slices_make_the_slices_of_w(name):
    fmt, n, k, ranks = any_format(name), 32, 512, 4
    stored, w = packed(fmt, n, k)
    for rank in range(ranks):
        r, c = (rank * n // ranks, (rank + 1) * n // ranks), (rank * k // ranks, (rank + 1) * k // ranks)
        for rows, columns in ((r, (0, k)), ((0, n), c)):
            mine = {p.name: p.slice(p.name, stored[p.name], rows, columns) for p in fmt.params}
            shape = rows[1] - rows[0], columns[1] - columns[0]
            assert fmt.read(mine, *shape).dequantize().equal(w[rows[0] : rows[1], columns[0] : columns[1]])
            assert fmt.problem(mine, *shape) is None


def test_cuts_within_a_word_or_a_group_are_refused():
    fmt = any_format("awq_int4_g128_asym")
    stored, _ = packed(fmt, 24, 256)
    p = {p.name: p for p in fmt.params}
    with pytest.raises(CheckpointError, match=r"m\.qweight: rows 12..24 of this rank do not fall on multiples of 8"):
        p["qweight"].slice("m.qweight", stored["qweight"], (12, 24), (0, 256))
    with pytest.raises(CheckpointError, match=r"m\.scales: columns 64..128 of this rank do not fall on multiples of 128"):
        p["scales"].slice("m.scales", stored["scales"], (0, 24), (64, 128))
    assert fmt.refuses(12, 256) == "N = 12 is not a multiple of 8, which qweight of awq_int4_g128_asym packs together"
    assert fmt.refuses(8, 100) == "K = 100 is not a multiple of 128, the group size of awq_int4_g128_asym"


def test_act_order_is_refused_where_k_is_cut():
    fmt = any_format("gptq_int4_g32_act")
    Shard("m.q_proj", fmt, Span(64, 128, (32, 64), (0, 128)), torch.float32)
    with pytest.raises(
        ValueError, match=r"^m\.down_proj: columns 0..64 of 128 cannot be cut out of a gptq_int4_g32_act matrix.*parallel size 1"
    ):
        Shard("m.down_proj", fmt, Span(64, 128, (0, 64), (0, 64)), torch.float32)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("name", ["int4_g32_asym_act", "int8_g64_act"])
def test_product_of_a_permuted_matrix(name, implementation):
    """The triton layout too: on a CPU the operator computes from it with the reference."""
    fmt, n, k = any_format(name), 72, 256
    stored, w = packed(fmt, n, k)
    q = fmt.read(stored, n, k)
    packed_q = pack(q, implementation)
    assert unpack(packed_q).dequantize().equal(w) and str(packed_q.spec).endswith(f"+permuted {n}x{k}")
    x = torch.randn(3, k)
    y = linear(x, packed_q.tensors, plan([(implementation, packed_q.spec)]))
    torch.testing.assert_close(y, x @ w.T, rtol=1e-4, atol=1e-4)  # float32 sums in another order


def test_permuted_matrices_join_only_in_the_same_order():
    fmt = any_format("int4_g32_act")
    (a, wa), (b, wb) = packed(fmt, 64, 128, seed=1), packed(fmt, 64, 128, seed=2)
    qa, qb = fmt.read(a, 64, 128), fmt.read(b, 64, 128)
    for weights, count in (([qa, qa], 1), ([qa, qb], 2)):
        joined = fuse([pack(q, "triton") for q in weights])
        assert len(joined) == count
        x = torch.randn(2, 128)
        y = linear(x, [t for w in joined for t in w.tensors], plan([(w.implementation, w.spec) for w in joined]))
        want = torch.cat([wa, wa if count == 1 else wb])
        torch.testing.assert_close(y, x @ want.T, rtol=1e-4, atol=1e-4)


def test_layer_of_one_tensor_fused_on_disk():
    """qkv in one AWQ tensor: cut along N, which is its last dimension."""
    fmt = any_format("awq_int4_g64_asym")
    stored, w = packed(fmt, 48, 128)
    sizes = (32, 8, 8)
    mixed = MixedLinear([Shard(f"m.{p}", fmt, Span(n, 128, (0, n), (0, 128)), torch.float32) for p, n in zip("qkv", sizes, strict=True)])
    for p, t in stored.items():
        mixed.load(p, t, range(3))
    assert mixed.finish(dtype=torch.float32) == "reference int4*fp16/64+zero 48x128"
    x = torch.randn(2, 128)
    torch.testing.assert_close(mixed(x), x @ w.T, rtol=1e-4, atol=1e-4)


def test_scales_keep_their_own_dtype():
    """float16 scales in a bfloat16 model: rounded to its dtype they would lose three bits."""
    fmt = any_format("gptq_int4_g64")
    stored, w = packed(fmt, 8, 128)
    shard = Shard("m", fmt, Span(8, 128, (0, 8), (0, 128)), torch.bfloat16)
    for p, t in stored.items():
        shard.load(p, t)
    assert shard.matrix().weight.dequantize().equal(w)


# --- configs

AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": ["visual", "k_proj"],
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
NVFP4 = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "model.layers.1*"], "kv_cache_quant_algo": "FP8"}}  # fmt: skip
Q = "model.layers.{}.self_attn.q_proj"


def formats(config: dict, *names: str) -> list[str | None]:
    layer_map = LayerMap.from_config(config)
    return [rule.formats[0].name if (rule := layer_map.rule_for(name)) else None for name in names]


def test_awq_config():
    found = formats(AWQ, Q.format(0), "model.layers.0.self_attn.k_proj", "visual.blocks.0.qkv", "lm_head")
    assert found == ["awq_int4_g128_asym", None, None, None]
    assert formats({"quant_method": "awq", "w_bit": 4, "q_group_size": -1}, Q.format(0)) == ["awq_int4_channel_asym"]


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({}, "gptq_int4_g128"),
        ({"bits": 8, "group_size": -1}, "gptq_int8"),
        ({"sym": False}, "gptq_int4_g128_asym"),
        ({"sym": False, "checkpoint_format": "gptq_v2"}, "gptq_v2_int4_g128_asym"),
        ({"desc_act": True}, "gptq_int4_g128_act"),
        ({"desc_act": True, "static_groups": True}, "gptq_int4_g128"),
        ({"desc_act": True, "group_size": -1}, "gptq_int4_channel"),
    ],
)
def test_gptq_config(changed, name):
    assert formats({**GPTQ, **changed}, Q.format(0), "lm_head") == [name, None]
    assert formats({**GPTQ, **changed, "lm_head": True}, "lm_head") == [name]


def test_gptq_dynamic_rules():
    """The first that matches decides, as in GPTQModel: what a "-:" leaves alone another rule before it may have claimed."""
    dynamic = {r"+:.*\.0\..*q_proj": {"bits": 8, "group_size": 32}, r"-:.*\.(0|1)\.": {}, r".*\.2\.": {"desc_act": True}}
    found = formats({**GPTQ, "dynamic": dynamic}, *(Q.format(i) for i in range(4)), "model.layers.0.self_attn.k_proj")
    assert found == ["gptq_int8_g32", None, "gptq_int4_g128_act", "gptq_int4_g128", None]
    with pytest.raises(ValueError, match=r"^dynamic, '\.\*up': GPTQ with bits 3, group_size 128, sym True is not read"):
        formats({**GPTQ, "dynamic": {".*up": {"bits": 3}}})


def test_modelopt_config():
    """As in its own file, as in config.json, and as the engines rename it; excluded are names, and shell patterns of them."""
    flat = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "model.layers.1*"], "config_groups": {"group_0": {}}}
    for config in (NVFP4, flat, {**flat, "quant_method": "modelopt_fp4"}):
        found = formats(config, Q.format(0), Q.format(1), Q.format(12), "lm_head", "language_model.lm_head")
        assert producer(config) == "modelopt" and found == ["modelopt_nvfp4", None, None, None, None]
    assert formats({**flat, "ignore": ["model.layers.1"]}, Q.format(1), Q.format(12)) == [None, "modelopt_nvfp4"]
    assert formats({**flat, "quant_algo": "FP8"}, Q.format(0)) == ["fp8_static"]


def test_modelopt_mixed_precision():
    layers = {Q.format(0): {"quant_algo": "FP8"}, Q.format(1): {"quant_algo": "W4A16_NVFP4", "group_size": 16}}
    config = {"quant_method": "modelopt_mixed", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    assert formats(config, Q.format(0), Q.format(1), Q.format(2)) == ["fp8_static", "modelopt_nvfp4", None]
    with pytest.raises(ValueError, match="MIXED_PRECISION and there are no quantized_layers"):
        formats({**config, "quantized_layers": {}})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**AWQ, "version": "gemv"}, "AWQ's layout 'gemv' of autoawq is not read, only 'gemm'"),
        ({**AWQ, "backend": "llm-awq"}, "AWQ's layout 'gemm' of llm-awq is not read"),
        ({**AWQ, "zero_point": False}, "AWQ stores 4 bits with zero points; this config has bits 4 and zero_point False"),
        ({**AWQ, "group_size": 256}, "AWQ in groups of 256 is not read; those that are have 32, 64, 128, -1"),
        ({**GPTQ, "is_marlin_format": True}, "checkpoint_format 'marlin' is not read, only gptq and gptq_v2"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not read"),
        ({**GPTQ, "bits": 3}, "GPTQ with bits 3, group_size 128, sym True is not read; read are 4 bits, and 8 with sym, in groups of 32"),
        ({**GPTQ, "bits": 8, "sym": False}, "GPTQ with bits 8, group_size 128, sym False is not read"),
        ({**GPTQ, "group_size": 1024}, "GPTQ with bits 4, group_size 1024, sym True is not read"),
        ({**GPTQ, "pack_dtype": "int16"}, "GPTQ with pack_dtype int16 is not read"),
        ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, "ModelOpt's quant_algo FP8_PB_WO is not read; those that are: NVFP4"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, "NVFP4 has groups of 16 columns; this config has 32"),
    ],
)  # fmt: skip
def test_layouts_that_are_not_read(config, message):
    serving.check_producer(config, "vLLM")
    with pytest.raises(ValueError, match=message):
        LayerMap.from_config(config)


def test_unknown_producer():
    with pytest.raises(
        ValueError, match="compressed-tensors, awq, gptq, modelopt; this one says quant_method 'hqq'. Leave --quantization out"
    ):
        serving.check_producer({"quant_method": "hqq"}, "vLLM")


def test_kv_schemes_that_are_not_used_are_forgotten():
    config = json.loads(json.dumps(NVFP4))
    serving.forget_kv_scheme(config)
    assert serving.unused_kv_scheme(config) is None and LayerMap.from_config(config) == LayerMap.from_config(NVFP4)


def test_kv_schemes_that_are_not_used():
    assert "kv_cache_quant_algo (FP8) and its scales are not used" in serving.unused_kv_scheme(NVFP4)
    assert serving.unused_kv_scheme({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": None}) is None
    assert serving.unused_kv_scheme(AWQ) is None is serving.unused_kv_scheme(GPTQ)


# --- checkpoints


@pytest.fixture(params=list(foreign.LAYOUTS))
def layout(request) -> str:
    return request.param


@pytest.fixture
def src(tmp_path) -> Path:
    return small_llama(tmp_path / "src", torch.float16, vocabulary=96, intermediate=256)


@pytest.fixture
def written(layout, src, tmp_path) -> tuple[Path, dict[str, Tensor]]:
    return tmp_path / layout, foreign.write(src, tmp_path / layout, layout)


def values(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(folder).check()
    return {m.name: m.format.read(checkpoint.load_module(m), m.n, m.k).dequantize() for m in checkpoint.modules() if m.format.quantized}


def test_checkpoint_is_read(written, src):
    folder, want = written
    found = values(folder)
    assert found.keys() == want.keys() and len(found) == 14
    for name, w in want.items():
        assert found[name].equal(w), name
    checked = verify(folder, src)
    assert checked.problems == [] and checked.mean_error < 0.2


def test_inspect(written):
    result = CliRunner().invoke(app, ["inspect", str(written[0]), "--json"])
    assert result.exit_code == 0, result.output
    modules = json.loads(result.stdout)["modules"]
    assert sum(m["kernel"] in ("reference", "triton", "scaled_mm") for m in modules) == 14
    assert {m["format"] for m in modules if m["name"] in ("lm_head", "model.embed_tokens")} == {"bf16"}


def test_served_map_leaves_alone_what_is_plain(written, src):
    """A config of classes does not say that one layer is left in 16 bits; the checkpoint does."""
    name = "model.layers.1.mlp.up_proj"

    def plain(stored: dict[str, Tensor]) -> None:
        for tensor_name in [n for n in stored if n.startswith(f"{name}.")]:
            del stored[tensor_name]
        stored[f"{name}.weight"] = load_file(src / "model.safetensors")[f"{name}.weight"]

    checkpoint = Checkpoint.open(change(written[0], plain)).check()
    assert checkpoint.layer_map.rule_for(name) is not None and checkpoint.served_map.rule_for(name) is None
    assert checkpoint.served_map.rule_for("lm_head") is None and checkpoint.served_map.rule_for(Q.format(1)) is not None
    # by its name, whichever way the config says so: names are what engines change
    assert {name, "lm_head", "model.embed_tokens"} <= set(checkpoint.served_map.ignore)


def test_convert(written, tmp_path):
    folder, want = written
    result = CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    done = json.loads(result.stdout)
    found = values(tmp_path / "out")
    assert found.keys() == want.keys() and sum(x["count"] for x in done["formats"] if x["to"] != "bf16") == 14
    for name, w in want.items():
        # a reciprocal, and another one to read it: a half unit in the last place each
        torch.testing.assert_close(found[name], w, rtol=2 * 2**-24 if "nvfp4" in folder.name else 0, atol=0)
    assert done["rounding"] <= 2**-23 and bool(done["dropped"]) == ("modelopt" in folder.name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert not any((tmp_path / "out" / name).exists() for name in ("hf_quant_config.json", "quantize_config.json"))
    assert verify(tmp_path / "out").problems == []
    with pytest.raises(CheckpointError, match="out is in the layout of compressed-tensors already"):
        convert(tmp_path / "out", tmp_path / "again")


def test_converted_checkpoint_is_decompressed_by_that_library(written, tmp_path):
    """Stock readers come to the same values: transformers, through compressed-tensors."""
    folder, want = written
    convert(folder, tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    groups = checkpoint.quantization_config["config_groups"].values()
    for m in checkpoint.modules():
        if m.format.quantized:
            group = next(g for g in groups if m.name in g["targets"])
            scheme = QuantizationScheme(**group)
            theirs = BaseCompressor.get_value_from_registry(group["format"]).decompress(checkpoint.load_module(m), scheme)["weight"]
            # nvfp4 there multiplies in bfloat16
            rtol = 3 * 2**-8 if m.format.code == "e2m1" else 0
            torch.testing.assert_close(theirs.to(torch.float32), want[m.name].to(theirs.dtype).to(torch.float32), rtol=rtol, atol=0)


def test_plain_checkpoint_is_not_converted(src, tmp_path):
    with pytest.raises(CheckpointError, match="src is not quantized; `qplugins quantize` does that"):
        convert(src, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- damage


def write(src: Path, layout: str) -> Path:
    foreign.write(src, src.with_name(layout), layout)
    return src.with_name(layout)


@pytest.mark.parametrize(
    ("layout", "tensors", "message"),
    [
        ("gptq_act", lambda t: t.pop(f"{Q.format(0)}.g_idx"), r"q_proj\.g_idx: missing; a layer in gptq_int4_g32_act has qweight, qzeros, scales, g_idx"),
        ("gptq", lambda t: t.pop(f"{Q.format(0)}.scales"), r"q_proj\.scales: missing; a layer in gptq_int4_g64 has qweight, qzeros, scales"),
        ("gptq", lambda t: t.update({f"{Q.format(0)}.qzeros": t[f"{Q.format(0)}.qzeros"][:1].clone()}), r"q_proj\.qzeros: expected shape \[2, 16\] for a 128 x 128 weight, found \[1, 16\]"),
        ("awq", lambda t: t.update({f"{Q.format(0)}.qweight": t[f"{Q.format(0)}.qweight"].T.contiguous()}), r"q_proj: K = 16 is not a multiple of 64"),
        ("awq", lambda t: t.pop(f"{Q.format(0)}.qweight"), r"q_proj\.qweight: missing"),
        ("awq", lambda t: t.update({f"{Q.format(0)}.qweight": t[f"{Q.format(0)}.qweight"].to(torch.int64)}), r"q_proj\.qweight: expected torch\.int32, found torch\.int64"),
        ("modelopt_nvfp4", lambda t: t.pop(f"{Q.format(0)}.weight_scale_2"), r"q_proj\.weight_scale_2: missing"),
        ("modelopt_nvfp4", lambda t: t.update({f"{Q.format(0)}.pre_quant_scale": torch.ones(128)}), r"q_proj\.pre_quant_scale: a layer in modelopt_nvfp4 has no such tensor"),
        ("awq", lambda t: [t.pop(n) for n in list(t) if n.startswith(Q.format(1))], None),
    ],
)  # fmt: skip
def test_headers_tell(src, layout, tensors, message):
    folder = change(write(src, layout), tensors)
    if message is None:  # a config of classes does not know which modules there should be: the engine's model does
        Checkpoint.open(folder).check()
        return
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder).check()


@pytest.mark.parametrize(
    ("layout", "tensors", "problem"),
    [
        ("gptq_act", lambda t: t[f"{Q.format(0)}.g_idx"].fill_(0), "g_idx: expected 32 columns in each of the groups 0..3, found 128 in group 0"),
        ("gptq_act", lambda t: t[f"{Q.format(0)}.g_idx"][5:6].fill_(7), "g_idx: expected 32 columns in each of the groups 0..3, found 31 in group "),
        ("gptq_act", lambda t: t[f"{Q.format(0)}.g_idx"][5:6].fill_(-1), "g_idx: expected 32 columns in each of the groups 0..3, found 31 in group "),
        ("gptq", lambda t: t[f"{Q.format(0)}.g_idx"][5:6].fill_(1), "g_idx: expected groups of 64 neighbouring columns, found column 5 in group 1; the columns were ordered"),
        ("gptq", lambda t: t[f"{Q.format(0)}.qzeros"][0, :1].fill_(0), "qzeros: expected 8 throughout, since the config says sym, found others"),
        ("gptq", lambda t: t[f"{Q.format(0)}.scales"][0, :2].fill_(float("nan")), "scales: expected finite values, found 2 of 256 NaN or infinite"),
        ("awq", lambda t: t[f"{Q.format(0)}.scales"][0, :2].zero_(), "scales: expected positive scales, of 256 found 2 zero and 0 negative"),
    ],
)  # fmt: skip
def test_values_tell(src, tmp_path, layout, tensors, problem):
    """`verify` says it, `convert` refuses, and a server does when it has loaded the layer."""
    folder = change(write(src, layout), tensors)
    (found,) = verify(folder).problems
    assert found.startswith(f"{Q.format(0)}.{problem}")
    if "scales" in problem:
        return
    with pytest.raises(CheckpointError, match=problem.split(":")[0]):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    checkpoint = Checkpoint.open(folder)
    module = next(m for m in checkpoint.modules() if m.name == Q.format(0))
    shard = Shard(module.name, module.format, Span(128, 128, (0, 128), (0, 128)), torch.float32)
    for p, t in checkpoint.load_module(module).items():
        shard.load(p, t)
    with pytest.raises(CheckpointError) as e:
        shard.matrix()
    assert str(e.value) == found


def test_modelopt_file_of_its_own(src):
    """Before 0.31 only hf_quant_config.json says how a checkpoint is quantized; and where layers differ, also later."""
    folder = write(src, "modelopt_nvfp4")
    assert "quantization_config" not in Checkpoint.open(folder).config
    layers = {n: {"quant_algo": "NVFP4"} for n in values(folder)}
    (folder / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}})
    )
    change(folder, config=lambda c: c.update(quantization_config={"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}))
    assert values(folder).keys() == layers.keys()
    (folder / "hf_quant_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: expected a JSON object, found list"):
        values(folder)


def test_foreign_formats_are_found_in_checkpoints_only():
    assert not FOREIGN.keys() & FORMATS.keys()
    with pytest.raises(ValueError, match="unknown format 'awq_int4_g128_asym'"):
        get_format("awq_int4_g128_asym")
