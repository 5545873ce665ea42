"""The kernel's own layout in checkpoints: the same values as its twin's, the very bytes that `pack` makes, slices of whole tiles, and refusals."""

import json
import math
import zlib
from pathlib import Path

import pytest
import torch
from folders import change, small_llama
from torch import Tensor
from torch.nn.functional import silu
from typer.testing import CliRunner

from integration_tests import foreign
from qplugins import experts, layer, routers
from qplugins.checkpoints.convert import convert
from qplugins.checkpoints.quantize import quantize
from qplugins.checkpoints.reader import Checkpoint
from qplugins.checkpoints.verify import verify
from qplugins.cli import app
from qplugins.formats import FOREIGN, FORMATS, TILES, CheckpointError, Format, any_format, format_of_scheme, get_format, packed, tiles
from qplugins.kernels.linear import Weight, layout, pack, spec_of, unpack
from qplugins.kernels.quantized import QuantizedTensor
from qplugins.layer import Matrix, MixedLinear, Shard, Span, pad_rows
from qplugins.layer_map import LayerMap, Rule

N, K = 200, 384  # rows end within a tile
ODD = "model.layers.0.odd_proj"
Q = "model.layers.0.mlp.gate_proj"


def matrix(fmt: Format, n: int = N, k: int = K, dtype: torch.dtype = torch.bfloat16) -> QuantizedTensor:
    """Of a format's own quantizer, in a dtype that its scales follow; in random order where its columns are permuted."""
    by = fmt.twin
    if by.permuted:
        by = get_format(by.name.removesuffix("_act"))
    q = by.quantize((torch.randn(n, k) * torch.rand(n, 1)).to(dtype), None)
    if not fmt.permuted:
        return q
    return QuantizedTensor(q.code, q.codes, q.scale, q.zero_point, columns=torch.randperm(k, dtype=torch.int32))


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    pairs = [(getattr(a, f), getattr(b, f)) for f in ("codes", "scale", "zero_point", "global_scale", "columns")]
    return a.code == b.code and all(
        (x is None) == (y is None)
        and (x is None or (x.dtype == y.dtype and x.flatten().view(torch.uint8).equal(y.flatten().view(torch.uint8))))
        for x, y in pairs
    )


def loaded(fmt: Format, stored: dict[str, Tensor], span: Span) -> Shard:
    shard = Shard("m.proj", fmt, span, torch.bfloat16)
    for name, t in stored.items():
        shard.load(name, t)
    return shard


def whole(n: int, k: int) -> Span:
    return Span(n, k, (0, n), (0, k))


def test_which_formats_have_tiles():
    """All that leave a layer's input in 16 bits; the others run by other kernels on GPUs that have them."""
    weight_only = {f.name for f in (*FORMATS.values(), *FOREIGN.values()) if f.scheme and not f.scheme["input_activations"]}
    assert {f.twin.name for f in TILES.values()} == weight_only and {"nvfp4", "fp8_a16", "int4_g32_asym_act"} <= weight_only
    assert packed(FORMATS["fp8"], 64, 64) is FORMATS["fp8"] and packed(FORMATS["bf16"], 64, 64) is FORMATS["bf16"]
    with pytest.raises(ValueError, match="unknown format 'tiles_nvfp4'"):
        get_format("tiles_nvfp4")


def test_tile_by_hand():
    """Columns 0, 16, 32, 48 of a row are four codes of a word; row 8 is its neighbour but one, row 1 is 32 words on."""
    codes = torch.zeros(65, 128, dtype=torch.uint8)
    codes[8, 16], codes[1, 64], codes[64, 0] = 8, 8, 8  # a zero's sign, which no scale changes
    scale = torch.full((65, 8), 2.0).to(torch.float8_e4m3fn)
    stored = any_format("tiles_nvfp4").store(QuantizedTensor("e2m1", codes, scale, global_scale=torch.tensor(0.5)))
    words = stored["weight_tiles"]
    assert words.shape == (2, 2, 1024) and [x.tolist() for x in words.nonzero().T] == [[0, 0, 1], [0, 1, 0], [2, 32, 0]]
    assert stored["weight_row_scale"].tolist() == [0.5] * 65
    # 2 is exponent 11 of 5 bits and mantissa 0 of 3; the second tile has one row
    scales = stored["weight_tile_scales"]
    assert scales.shape == (2, 2, 32, 8) and scales[:, 0].eq(0x58).all() and scales[:, 1].count_nonzero() == 2 * 4


@pytest.mark.parametrize(
    ("name", "crc"),
    [("tiles_nvfp4", 519536467), ("tiles_mxfp4", 850086961), ("tiles_int4_g32_asym", 3143918762), ("tiles_int8_g64", 2354221405), ("tiles_int4_channel_asym", 1411101774), ("tiles_fp8_a16", 2504155507)],
)  # fmt: skip
def test_version_1_is_these_bytes(name, crc):
    """Checkpoints hold them. Whoever moves a bit raises `tiles.VERSION`, and these numbers go with the version."""
    fmt, n, k = TILES[name], 72, 192
    group = fmt.group_size or k
    place = torch.arange(n)[:, None] * 37 + torch.arange(k) * 11
    groups = place[:, ::group]
    codes = (place % (1 << fmt.twin.spec(n, k).bits)).to(torch.uint8)
    value = torch.exp2((groups % 4 - 6).to(torch.float32)) * (1 + (groups % 8) / 8)  # within any format's scales
    scale = {"e4m3": value.to(torch.float8_e4m3fn), "e8m0": (groups % 4 + 121).to(torch.uint8), "f32": value}.get(fmt.twin.spec(n, k).scale)
    zero = (groups % 13 - 6).to(torch.int8) if fmt.twin.spec(n, k).zero_point else None
    q = QuantizedTensor(fmt.code, codes, value.to(torch.bfloat16) if scale is None else scale, zero)
    stored = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in fmt.store(q).values())
    assert (tiles.VERSION, zlib.crc32(stored)) == (1, crc)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TILES)
def test_its_twin_stores_the_same(name, dtype):
    fmt = TILES[name]
    q = matrix(fmt, dtype=dtype)
    stored = fmt.store(q)
    fmt.check("m", stored, N, K)
    assert (
        fmt.infer_shape(stored) == (N, K)
        and fmt.problem(stored, N, K) is None
        and fmt.nbytes(N, K) == sum(t.nbytes for t in stored.values())
    )
    back = fmt.read(stored, N, K)
    # an fp8 matrix of one scale is read as one of a scale a row, by its twin too
    assert same(back, q) and same(fmt.twin.read(fmt.twin.store(back), N, K), fmt.twin.read(fmt.twin.store(q), N, K))
    assert spec_of(back, fmt.activation) == fmt.weight(stored, N, K).spec


@pytest.mark.parametrize("name", TILES)
def test_is_what_the_kernel_reads(name):
    """Bit for bit what `pack` makes, in the same memory but for locks and a row's one scale."""
    fmt = TILES[name]
    q = matrix(fmt)
    stored = fmt.store(q)
    got, want = fmt.weight(stored, N, K), pack(q, "triton")
    assert (got.implementation, got.spec) == (want.implementation, want.spec)
    for g, w in zip(got.tensors, want.tensors, strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape and g.view(torch.uint8).equal(w.view(torch.uint8))
    own = {t.data_ptr() for t in stored.values()}
    assert sum(t.data_ptr() in own for t in got.tensors) == len(got.tensors) - (
        2 if fmt.params[1].dtype is None and q.scale.dtype != torch.float32 else 1
    )


@pytest.mark.parametrize("name", TILES)
def test_ranks_slices_make_the_slices_of_w(name):
    """Rows in whole tiles, the last rank's less; columns in whole tiles and groups."""
    fmt, n, k = TILES[name], 128 + 40, 512
    q = matrix(fmt, n, k)
    stored, w = fmt.store(q), q.dequantize()
    for rows in ((0, 64), (64, 128), (128, n)):
        m = loaded(fmt, stored, Span(n, k, rows, (0, k))).matrix()
        assert m.spec.n == rows[1] - rows[0] and unpack(m.weight).dequantize().equal(w[rows[0] : rows[1]])
    if fmt.permuted:
        with pytest.raises(ValueError, match="act-order, desc_act"):
            loaded(fmt, stored, Span(n, k, (0, n), (0, 256)))
        return
    for columns in ((0, 256), (256, 512)):
        m = loaded(fmt, stored, Span(n, k, (0, n), columns)).matrix()
        assert unpack(m.weight).dequantize().equal(w[:, columns[0] : columns[1]])


def test_cuts_within_a_tile_are_refused():
    fmt = TILES["tiles_nvfp4"]
    stored = fmt.store(matrix(fmt, 128, 256))
    with pytest.raises(
        CheckpointError,
        match=r"m\.proj\.weight_tiles: rows 32..64 of this rank do not fall on multiples of 64; use a tensor.*`qplugins convert` makes one",
    ):
        loaded(fmt, stored, Span(128, 256, (32, 64), (0, 256)))
    layer_map = LayerMap((Rule(("Linear",), (fmt,)),))
    with pytest.raises(ValueError, match=r"^m\.proj: K = 32 is not a multiple of 64, which weight_tiles of tiles_nvfp4 packs together"):
        layer_map.format_for("m.proj", "Linear", 128, 32)
    # a slice that has one scale a row would be another format
    assert TILES["tiles_int4_g128"].refuses(64, 128) == "K = 128 is a single group, and tiles_int4_g128 stores the scales of several"


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_layer_of_mixed_shards(monkeypatch, implementation):
    """Fused in an engine: neighbours in one format are joined as tiles, or read by what does not know tiles."""
    monkeypatch.setattr(layer, "choose", lambda *a: implementation)
    names, sizes = ("tiles_nvfp4", "tiles_nvfp4", "tiles_int4_g128_asym", "fp8_a16"), (64, 40, 64, 24)
    fmts = [any_format(name) for name in names]
    qs = [
        fmt.twin.quantize(torch.randn(n, K), torch.tensor(4.0)) if fmt.twin else fmt.quantize(torch.randn(n, K), None)
        for fmt, n in zip(fmts, sizes, strict=True)
    ]
    mixed = MixedLinear([Shard(f"m.{i}", fmt, whole(n, K), torch.float32) for i, (fmt, n) in enumerate(zip(fmts, sizes, strict=True))])
    for i, (fmt, q) in enumerate(zip(fmts, qs, strict=True)):
        for name, t in fmt.store(q).items():
            mixed.load(name, t, [i])
    plan = mixed.finish(dtype=torch.float32)
    assert plan.split("; ")[0] == f"{implementation} e2m1*e4m3/16 104x{K}" and plan.count(implementation) == 3
    x = torch.randn(3, K)
    # float32 sums in another order
    torch.testing.assert_close(mixed(x), x @ torch.cat([q.dequantize() for q in qs]).T, rtol=1e-4, atol=1e-4)


def test_nothing_is_repacked(monkeypatch):
    monkeypatch.setattr(layer, "choose", lambda *a: "triton")
    names = ("tiles_nvfp4", "tiles_fp8_a16")
    mixed = MixedLinear([loaded(TILES[name], TILES[name].store(matrix(TILES[name])), whole(N, K)) for name in names])
    for step in ("_pack_tiles", "_unpack_tiles", "unpack"):
        monkeypatch.setattr(layout, step, lambda *a, step=step: pytest.fail(f"{step} was called"))
    assert mixed.finish() == f"triton e2m1*e4m3/16 {N}x{K}; triton e4m3*f32/row {N}x{K}"


def test_layer_of_one_tensor_fused_on_disk():
    fmt = TILES["tiles_int8_g64"]
    q = matrix(fmt, 64 + 64 + 24, K)
    mixed = MixedLinear([Shard(f"m.{p}", fmt, whole(n, K), torch.float32) for p, n in zip("qkv", (64, 64, 24), strict=True)])
    for name, t in fmt.store(q).items():
        mixed.load(name, t, range(3))
    assert mixed.finish(dtype=torch.float32) == f"reference int8*bf16/64 152x{K}"
    x = torch.randn(2, K)
    torch.testing.assert_close(mixed(x), x @ q.dequantize().T, rtol=1e-4, atol=1e-4)


def test_layer_of_more_parts_than_matrices():
    """Qwen3.5's linear attention: four parts, of which three are one matrix in the checkpoint."""
    sizes, fmts = (64, 64, 24, 40), [FORMATS["nvfp4"]] * 3 + [FORMATS["int8"]]
    qkv, z = FORMATS["nvfp4"].quantize(torch.randn(152, K), None), FORMATS["int8"].quantize(torch.randn(40, K), None)
    layer_map = LayerMap((Rule(("re:.*in_proj_qkv$",), (FORMATS["nvfp4"],)), Rule(("Linear",), (FORMATS["int8"],))))
    names, parts = ["m.in_proj_qkv", "m.in_proj_z"], [whole(n, K) for n in sizes]
    assert routers.formats(layer_map, names, parts) == fmts
    mixed = MixedLinear(routers.shards(names, fmts, parts, torch.float32))
    for name, t in FORMATS["nvfp4"].store(qkv).items():
        mixed.load(name, t, routers.part_of((0, 1, 2), 4))
    for name, t in FORMATS["int8"].store(z).items():
        mixed.load(name, t, routers.part_of(3, 4))
    mixed.finish(dtype=torch.float32)
    x = torch.randn(2, K)
    torch.testing.assert_close(mixed(x), x @ torch.cat([qkv.dequantize(), z.dequantize()]).T, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="builds this layer of 4 matrices, its model names 2"):
        routers.formats(layer_map, ["m.a", "m.b"], parts)


def test_padded_vocabulary():
    fmt = TILES["tiles_mxfp4"]
    q = matrix(fmt, 72, K)
    m = Matrix(fmt, fmt.weight(fmt.store(q), 72, K))
    assert pad_rows(m, 72) is m
    padded = pad_rows(m, 128)
    assert padded.spec.n == 128 and padded.weight.dequantize().equal(torch.cat([q.dequantize(), torch.zeros(56, K)]))


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_experts_compute_with_their_dequantized_matrices(monkeypatch, implementation):
    monkeypatch.setattr(experts, "choose", lambda *a: implementation)
    hidden, intermediate, count = 128, 192, 3
    names = {"gate_proj": "tiles_nvfp4", "up_proj": "tiles_nvfp4", "down_proj": "tiles_int8_g32"}
    layer_map = LayerMap(tuple(Rule((f"re:.*{leaf}",), (TILES[name],)) for leaf, name in names.items()))
    found = experts.parts(layer_map, "m.experts", list(names), count, experts.spans(hidden, intermediate, 0, 1))
    mixed = experts.MixedExperts([f"m.experts.{e}" for e in range(count)], found, "silu", torch.float32)
    w = {}
    for e in range(count):
        for i, part in found.items():
            q = matrix(part.format, part.span.n, part.span.k)
            w[e, i] = q.dequantize()
            for name, t in part.format.store(q).items():
                mixed.load(name, t, i, e)
    assert mixed.finish() == f"{implementation} e2m1*e4m3/16 384x128 | {implementation} int8*bf16/32 128x192"
    x, ids = torch.randn(count, hidden) / 8, torch.arange(count)[:, None]
    want = torch.stack([w[e, "w2"] @ (silu(w[e, "w1"] @ x[e]) * (w[e, "w3"] @ x[e])) for e in range(count)])
    # both sum in float32, in another order
    torch.testing.assert_close(mixed(x, torch.ones(count, 1), ids), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_random_weights():
    """--load-format dummy"""
    shard = Shard("m.proj", TILES["tiles_nvfp4"], whole(96, 128), torch.bfloat16)
    shard.load_random()
    assert shard.missing == [] and isinstance(shard.matrix().weight, Weight)


# --- configs


def test_config_names_layout_and_version():
    assert {f.scheme["format"] for f in TILES.values()} == {"qplugins-tiles-v1"}
    assert all(
        format_of_scheme(f.scheme) is f and format_of_scheme({**f.scheme, "format": None}, "qplugins-tiles-v1") is f for f in TILES.values()
    )


@pytest.mark.parametrize("storage", ["qplugins-tiles-v0", "qplugins-tiles-v2", "qplugins-tiles"])
def test_another_version_is_refused(storage):
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {**TILES["tiles_nvfp4"].scheme, "format": storage, "targets": ["Linear"]}},
    }
    with pytest.raises(
        ValueError,
        match=rf"^quantization_config, group_0: the checkpoint is packed as {storage}, and this qplugins reads qplugins-tiles-v1; with.*`qplugins convert CKPT OUT`",
    ):
        LayerMap.from_config(config)


# --- checkpoints


@pytest.fixture
def src(tmp_path) -> Path:
    """A small Llama in 16 bits, one matrix of whose columns no tiles hold."""
    folder = small_llama(tmp_path / "src", torch.bfloat16, vocabulary=97, intermediate=320)
    return change(folder, lambda t: t.update({f"{ODD}.weight": torch.randn(8, 80, dtype=torch.bfloat16)}))


RULES = {
    "re:.*q_proj$": "int4_g64_asym", "re:.*k_proj$": "fp8", "re:.*(gate|up)_proj$": "nvfp4", "re:.*down_proj$": "mxfp4", "re:.*v_proj$": "int8_plain",
    "re:.*o_proj$": "int8", "re:.*odd_proj$": "nvfp4", "lm_head": "fp8_tensor_a16", "Embedding": "int4_channel",
}  # fmt: skip
MAP = LayerMap(tuple(Rule((target,), (FORMATS[fmt],)) for target, fmt in RULES.items()))


@pytest.fixture
def packed_and_plain(src, tmp_path) -> tuple[Path, Path]:
    for name, pack_it in (("packed", True), ("plain", False)):
        quantize(src, tmp_path / name, MAP, pack=pack_it)
    return tmp_path / "packed", tmp_path / "plain"


def equal_files(a: Path, b: Path) -> bool:
    x, y = Checkpoint.open(a), Checkpoint.open(b)
    return x.tensors.keys() == y.tensors.keys() and all(
        x.load(n).flatten().view(torch.uint8).equal(y.load(n).flatten().view(torch.uint8)) for n in x.tensors
    )


def test_checkpoint_holds_the_same_values(src, packed_and_plain):
    packed_, plain = (Checkpoint.open(folder).check() for folder in packed_and_plain)
    of_plain = {m.name: m for m in plain.modules()}
    for m in packed_.modules():
        other = of_plain[m.name]
        assert (m.n, m.k, m.kind) == (other.n, other.k, other.kind)
        if m.format.quantized:
            assert same(*(m2.format.read(c.load_module(m2), m.n, m.k) for c, m2 in ((packed_, m), (plain, other))))
    found = {m.name.rsplit(".", 1)[-1]: m.format.name for m in packed_.modules()}
    assert found == {
        "q_proj": "tiles_int4_g64_asym", "k_proj": "fp8", "gate_proj": "tiles_nvfp4", "up_proj": "tiles_nvfp4", "down_proj": "tiles_mxfp4",
        "v_proj": "int8_plain", "o_proj": "tiles_int8", "odd_proj": "nvfp4", "lm_head": "tiles_fp8_tensor_a16", "embed_tokens": "tiles_int4_channel",
    }  # fmt: skip
    a, b = (verify(folder, src) for folder in packed_and_plain)
    assert a.problems == b.problems == [] and a.errors == b.errors


def test_convert_makes_the_plain_one_and_the_packed_one(packed_and_plain, tmp_path):
    packed_, plain = packed_and_plain
    convert(packed_, tmp_path / "unpacked")
    convert(plain, tmp_path / "repacked", pack=True)
    for a, b in ((tmp_path / "unpacked", plain), (tmp_path / "repacked", packed_)):
        formats = [{m.name: m.format.name for m in Checkpoint.open(folder).modules()} for folder in (a, b)]
        assert equal_files(a, b) and formats[0] == formats[1]
    with pytest.raises(CheckpointError, match="packed is packed already, as far as it can be"):
        convert(packed_, tmp_path / "again", pack=True)


def test_scales_below_zero(packed_and_plain, tmp_path):
    """Which other quantizers take for integers: codes reach from -8 to 7, and the sign puts the largest weight at -8."""
    name = "model.layers.0.self_attn.q_proj"
    plain = change(packed_and_plain[1], lambda t: t[f"{name}.weight_scale"][::2].neg_())
    convert(plain, tmp_path / "out", pack=True)
    assert verify(plain).problems == verify(tmp_path / "out").problems == []
    values = []
    for folder in (plain, tmp_path / "out"):
        checkpoint = Checkpoint.open(folder)
        m = next(m for m in checkpoint.modules() if m.name == name)
        values.append(m.format.read(checkpoint.load_module(m), m.n, m.k).dequantize())
    assert values[0].equal(values[1])
    loaded(m.format, checkpoint.load_module(m), whole(m.n, m.k)).matrix()


def test_group_whose_scale_is_zero(packed_and_plain, tmp_path):
    """Of no consequence are its codes, and in tiles they are others."""
    plain = change(packed_and_plain[1], lambda t: t[f"{Q}.weight_scale"][3].zero_())
    convert(plain, tmp_path / "out", pack=True)
    values = []
    for folder in (plain, tmp_path / "out"):
        checkpoint = Checkpoint.open(folder)
        m = next(m for m in checkpoint.modules() if m.name == Q)
        values.append(m.format.read(checkpoint.load_module(m), m.n, m.k).dequantize())
    assert values[0].equal(values[1]) and not values[1][3].any() and values[1][4].any()


def test_scales_of_4_bit_activations_are_named_as_dropped(packed_and_plain, tmp_path):
    name = f"{Q}.input_global_scale"
    done = convert(change(packed_and_plain[1], lambda t: t.update({name: torch.ones(1)})), tmp_path / "out", pack=True)
    assert done.dropped == (name,) and equal_files(tmp_path / "out", packed_and_plain[0])


def test_convert_keeps_what_is_said_of_the_kv_cache(packed_and_plain, tmp_path):
    said = {"qplugins": {"kv_layers": {"int8_sink": [0]}}, "kv_cache_scheme": {"num_bits": 4, "type": "int"}}
    config = json.loads((packed_and_plain[0] / "config.json").read_text())
    config["quantization_config"] |= said
    (packed_and_plain[0] / "config.json").write_text(json.dumps(config))
    convert(packed_and_plain[0], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"].items() >= said.items()


def test_act_order_of_another_producer_is_packed(src, tmp_path):
    change(src, lambda t: t.pop(f"{ODD}.weight"))
    meant = foreign.write(src, tmp_path / "gptq", "gptq_act")
    convert(tmp_path / "gptq", tmp_path / "out", pack=True)
    checkpoint = Checkpoint.open(tmp_path / "out").check()
    modules = {m.name: m for m in checkpoint.modules() if m.format.quantized}
    assert {m.format.name for m in modules.values()} == {"tiles_int4_g32_act"} and verify(tmp_path / "out").problems == []
    for name, w in meant.items():
        m = modules[name]
        assert m.format.read(checkpoint.load_module(m), m.n, m.k).dequantize().equal(w)


def test_commands(src, tmp_path):
    (tmp_path / "map.yaml").write_text("rules: [{targets: [Linear], format: nvfp4}]\nignore: [lm_head]\n")
    run = CliRunner().invoke(app, ["quantize", str(src), str(tmp_path / "out"), "--map", str(tmp_path / "map.yaml"), "--packed", "--json"])
    assert run.exit_code == 0, run.output
    report = json.loads(run.stdout)
    assert (
        report["formats"] == {"bf16": 2, "tiles_nvfp4": 14, "nvfp4": 1}
        and report["bytes_after"] == Checkpoint.open(tmp_path / "out").nbytes
    )
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out"), "--json"])
    assert shown.exit_code == 0, shown.output
    assert {m["kernel"] for m in json.loads(shown.stdout)["modules"] if m["format"] == "tiles_nvfp4"} <= {"reference", "triton"}
    run = CliRunner().invoke(app, ["convert", str(tmp_path / "out"), str(tmp_path / "plain")])
    assert run.exit_code == 0 and "14 matrices: tiles_nvfp4 -> nvfp4" in run.output, run.output


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda t: t.pop(f"{Q}.weight_row_scale"), r"gate_proj\.weight_row_scale: missing; a layer in tiles_nvfp4 has weight_tiles, weight_row_scale, weight_tile_scales"),
        (lambda t: t.update({f"{Q}.weight_tiles": t[f"{Q}.weight_tiles"][:4].clone()}), r"gate_proj\.weight_tiles: expected shape \[5, 2, 1024\] for a 320 x 128 weight, found \[4, 2, 1024\]"),
        (lambda t: t.update({f"{Q}.weight_tiles": t[f"{Q}.weight_tiles"].flatten(1)}), r"gate_proj\.weight_tiles: expected a matrix in tiles of \[1024\], found shape \[5, 2048\]"),
        (lambda t: t.update({f"{Q}.weight_row_scale": torch.tensor(1.0)}), r"gate_proj\.weight_row_scale: expected shape \[320\] for a 320 x 128 weight, found \[\]"),
        (lambda t: t.update({f"{Q}.weight_tile_scales": t[f"{Q}.weight_tile_scales"].to(torch.bfloat16)}), r"gate_proj\.weight_tile_scales: expected torch\.uint8, found torch\.bfloat16"),
    ],
)  # fmt: skip
def test_headers_tell(packed_and_plain, tensors, message):
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(change(packed_and_plain[0], tensors)).check()


@pytest.mark.parametrize(
    ("name", "tensors", "problem"),
    [
        (Q, lambda t: t[f"{Q}.weight_row_scale"][:2].fill_(math.nan), "weight_row_scale: expected finite values, found 2 of 320 NaN or infinite"),
    ],
)  # fmt: skip
def test_values_tell(packed_and_plain, name, tensors, problem):
    folder = change(packed_and_plain[0], tensors)
    assert verify(folder).problems == [f"{name}.{problem}"]
    checkpoint = Checkpoint.open(folder)
    module = next(m for m in checkpoint.modules() if m.name == name)
    with pytest.raises(CheckpointError, match=problem.split(":")[0]):
        loaded(module.format, checkpoint.load_module(module), whole(module.n, module.k)).matrix()


def test_columns_that_are_no_order():
    fmt = TILES["tiles_int4_g32_act"]
    stored = fmt.store(matrix(fmt))
    stored["weight_columns"][3] = stored["weight_columns"][4]
    with pytest.raises(CheckpointError, match=rf"m\.proj\.weight_columns: expected each of the columns 0..{K - 1} once, found others"):
        loaded(fmt, stored, whole(N, K)).matrix()
