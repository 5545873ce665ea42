"""What the bytes of each format mean: by hand, by round trips, and by the compressed-tensors library's own compressors."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4 import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor
from torch.overrides import TorchFunctionMode

from qplugins.formats import ALIASES, BF16, FORMATS, CheckpointError, format_of_scheme, get_format
from qplugins.formats.float4 import round_e2m1
from qplugins.formats.packing import pack_int32, pack_pairs, unpack_int32, unpack_pairs
from qplugins.kernels.quantized import QuantizedTensor

QUANTIZED = [f.name for f in FORMATS.values() if f.quantized]
MADE = [f.name for f in FORMATS.values() if f.quantize]  # the others are only read
E2M1_BITS = bytes([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE])  # all sixteen patterns in order
E2M1_VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def weights(n: int, k: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Normal, with a few outliers, a row of zeros and a row a millionth as large."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02
    w[:, ::37] *= 3
    w[0] = 0
    w[1] *= 1e-6
    return w.to(dtype)


def hex_of(t: torch.Tensor) -> list[str]:
    return [f"{x & 0xFFFFFFFF:08x}" for x in t.flatten().tolist()]


def read_bytes(fmt, n, k, **stored):
    return FORMATS[fmt].read(stored, n, k).dequantize()


# --- bytes written by hand


def test_int32_packing_by_hand():
    assert hex_of(pack_int32(tensor([[0, 1, 2, 3, 4, 5, 6, 15]], dtype=torch.uint8), 4)) == ["f6543210"]
    assert hex_of(pack_int32(tensor([[0x80, 0x81, 0x00, 0xFF]], dtype=torch.uint8), 8)) == ["ff008180"]


def test_the_last_int32_is_padded_with_zeros():
    assert hex_of(pack_int32(torch.full((1, 9), 15, dtype=torch.uint8), 4)) == ["ffffffff", "0000000f"]
    assert hex_of(pack_int32(torch.full((5, 1), 255, dtype=torch.uint8), 8, dim=0)) == ["ffffffff", "000000ff"]


def test_zero_points_are_packed_along_rows():
    packed = pack_int32(tensor([[1, 2]] * 7 + [[14, 15]], dtype=torch.uint8), 4, dim=0)
    assert packed.shape == (1, 2) and hex_of(packed) == ["e1111111", "f2222222"]


def test_pairs_by_hand():
    codes = tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert pack_pairs(codes).tolist() == [[0x21, 0x0F]] and unpack_pairs(pack_pairs(codes)).equal(codes)


def test_int4_by_hand():
    """-8 .. 7 with scale 0.5, and the same with zero point 3"""
    packed = tensor([[0x76543210, 0xFEDCBA98 - (1 << 32)]], dtype=torch.int32)
    scale = tensor([[0.5]], dtype=torch.bfloat16)
    want = (torch.arange(16.0) - 8) / 2
    assert read_bytes("int4_channel", 1, 16, weight_packed=packed, weight_scale=scale)[0].equal(want)
    zero = tensor([[0x0000000B]], dtype=torch.int32)  # 3 + 8
    assert read_bytes("int4_channel_asym", 1, 16, weight_packed=packed, weight_scale=scale, weight_zero_point=zero)[0].equal(want - 1.5)


def test_int8_by_hand():
    packed = tensor([[0xFF818000 - (1 << 32)]], dtype=torch.int32)  # low byte first: -128, 0, 1, 127
    assert read_bytes("int8", 1, 4, weight_packed=packed, weight_scale=tensor([[2.0]])).tolist() == [[-256, 0, 2, 254]]
    plain = tensor([[-128, 0, 1, 127]], dtype=torch.int8)
    assert read_bytes("int8_plain", 1, 4, weight=plain, weight_scale=tensor([[2.0]])).tolist() == [[-256, 0, 2, 254]]


def test_fp8_by_hand():
    codes = tensor([[0x38, 0xB8, 0x7E, 0x01]], dtype=torch.uint8).view(torch.float8_e4m3fn)  # 1, -1, 448, 2 ** -9
    for fmt, scale in (("fp8", tensor([[2.0]])), ("fp8_tensor", tensor([2.0])), ("fp8_tensor", tensor(2.0))):
        assert read_bytes(fmt, 1, 4, weight=codes, weight_scale=scale).tolist() == [[2, -2, 896, 2**-8]]


def test_nvfp4_by_hand():
    """weight_global_scale is a divisor"""
    packed = tensor([list(E2M1_BITS)], dtype=torch.uint8)
    scale = tensor([[0x40]], dtype=torch.uint8).view(torch.float8_e4m3fn)  # 2
    got = read_bytes("nvfp4", 1, 16, weight_packed=packed, weight_scale=scale, weight_global_scale=tensor([4.0]))
    assert got.tolist() == [[v / 2 for v in E2M1_VALUES]]


def test_mxfp4_by_hand():
    packed = tensor([list(E2M1_BITS * 2)], dtype=torch.uint8)
    got = read_bytes("mxfp4", 1, 32, weight_packed=packed, weight_scale=tensor([[129]], dtype=torch.uint8))  # 2 ** 2
    assert got.tolist() == [[4 * v for v in E2M1_VALUES * 2]]


def test_e2m1_rounds_ties_to_even_patterns():
    ties = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5: 4}
    x = tensor(list(ties))
    for sign in (1, -1):
        assert tensor(E2M1_VALUES)[round_e2m1(sign * x).long()].tolist() == [sign * v for v in ties.values()]
    up, down = torch.nextafter(x, tensor(9.0)), torch.nextafter(x, tensor(0.0))
    assert tensor(E2M1_VALUES)[round_e2m1(up).long()].tolist() == [0.5, 1, 1.5, 2, 3, 4, 6]
    assert tensor(E2M1_VALUES)[round_e2m1(down).long()].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4]


def test_e2m1_rounds_everything_to_the_nearest_value():
    x = torch.linspace(-9, 9, 36001)
    distance = (tensor(E2M1_VALUES)[round_e2m1(x).long()] - x.clamp(-6, 6)).abs()
    assert distance.equal((tensor(E2M1_VALUES)[:, None] - x.clamp(-6, 6)).abs().amin(0))
    assert round_e2m1(tensor([0.0, -0.0])).tolist() == [0, 8]


# --- round trips


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([4, 8]), st.integers(1, 19), st.integers(1, 19), st.sampled_from([0, 1]))
def test_int32_packing_round_trip(data, bits, n, k, dim):
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999))))
    packed = pack_int32(codes, bits, dim)
    assert unpack_int32(packed, bits, codes.shape[dim], dim).equal(codes)
    half = 1 << (bits - 1)
    signed = (codes.to(torch.int16) - half).to(torch.int8)
    assert packed.equal(pack_to_int32(signed, bits, packed_dim=dim))
    assert unpack_from_int32(packed, bits, codes.shape, packed_dim=dim).equal(signed)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(MADE), st.integers(1, 17), st.integers(1, 4), st.integers(0, 999), st.sampled_from([torch.bfloat16, torch.float16]))
def test_what_is_stored_is_read_back(name, n, groups, seed, dtype):
    fmt = FORMATS[name]
    k = groups * (fmt.group_size or 8)
    q = fmt.quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(dtype), None)
    stored = fmt.store(q)
    fmt.check("layer", stored, n, k)
    assert fmt.infer_shape(stored) == (n, k)
    assert sum(t.nbytes for p, t in stored.items() if p != "weight_shape") == fmt.nbytes(n, k, dtype)
    back = fmt.read(stored, n, k)
    assert back.codes.equal(q.codes) and back.code == q.code
    torch.testing.assert_close(back.dequantize(), q.dequantize(), rtol=3e-7, atol=0)  # the global scale is stored as its inverse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", MADE)
def test_zeros_and_tiny_rows(name, dtype):
    fmt = FORMATS[name]
    w = weights(16, 256, dtype)
    q = fmt.quantize(w, None)
    got = q.dequantize()
    assert got.isfinite().all() and not got[0].any()
    for p, t in fmt.store(q).items():
        if p.endswith("scale") and t.dtype != torch.uint8:
            assert (t.float() > 0).all(), p
    # e4m3 leaves half of 2 ** -4, four bits about a tenth of the norm, per-row scales a little more
    assert (got - w.float()).norm() / w.float().norm() < (0.03 if "8" in name.split("_")[0] else 0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [f for f in MADE if f.startswith("int")])
def test_integer_scales_have_the_weights_dtype(name, dtype):
    assert FORMATS[name].quantize(weights(4, 256, dtype), None).scale.dtype == dtype


@pytest.mark.parametrize("name", ["nvfp4", "fp8_tensor"])
def test_siblings_share_one_global_scale(name):
    a, b = weights(8, 64, seed=1), weights(8, 64, seed=2) * 5
    amax = torch.maximum(a.abs().amax(), b.abs().amax())
    stored = [FORMATS[name].store(FORMATS[name].quantize(w, amax)) for w in (a, b)]
    key = "weight_global_scale" if name == "nvfp4" else "weight_scale"
    assert stored[0][key].equal(stored[1][key]) and FORMATS[name].shares_amax
    assert not FORMATS["fp8"].shares_amax and not FORMATS["int4_g128"].shares_amax and not BF16.shares_amax


class DivisionOfGPUs(TorchFunctionMode):
    """PyTorch's on a GPU: by a number of Python's, a product with its rounded inverse (BinaryDivTrueKernel.cu)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.div, torch.Tensor.__truediv__, torch.div) and isinstance(args[1], int | float):
            return args[0] * (1 / torch.tensor(args[1], dtype=torch.float32))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", MADE)
def test_a_gpu_divides_to_the_same_bytes(name, dtype):
    # of few distinct values, of which many lie half way between two codes
    rows = [torch.randint(-8, 8, (8, 256), generator=torch.Generator().manual_seed(seed)).to(dtype) * 0.013 * seed for seed in range(1, 33)]
    for w in rows:
        want = FORMATS[name].store(FORMATS[name].quantize(w, None))
        with DivisionOfGPUs():
            got = FORMATS[name].store(FORMATS[name].quantize(w, None))
        for param, t in want.items():
            assert got[param].view(torch.uint8).equal(t.view(torch.uint8)), param


# --- the search


def plain(name: str, w: torch.Tensor) -> torch.Tensor:
    """The same format with every scale from the largest magnitude, written out: what the search must never be worse than."""
    x = w.float()
    if name.startswith("int"):
        bits = int(name[3])
        half, size = 1 << (bits - 1), FORMATS[name].group_size or w.shape[1]
        x = x.view(w.shape[0], -1, size)
        if name.endswith("asym"):
            lo, hi = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
            scale = ((hi - lo) / (2 * half - 1)).clamp_min(2**-24).to(w.dtype).float()
            zero = (-half - lo / scale).round().clamp(-half, half - 1)
            return (((x / scale).round() + zero).clamp(-half, half - 1) - zero).mul(scale).view_as(w)
        scale = torch.maximum(x.amax(-1, keepdim=True) / (half - 1), -x.amin(-1, keepdim=True) / half).clamp_min(2**-24).to(w.dtype).float()
        return (x / scale).round().clamp(-half, half - 1).mul(scale).view_as(w)
    if name == "nvfp4":
        factor = x.abs().amax() / (6 * 448)
        x = x.view(w.shape[0], -1, 16)
        scale = (x.abs().amax(-1, keepdim=True) / factor / 6).clamp_min(2**-9).to(torch.float8_e4m3fn).float() * factor
    else:
        x = x.view(w.shape[0], -1, 32)
        scale = torch.exp2(torch.log2(x.abs().amax(-1, keepdim=True).clamp_min(2.0**-120)).floor() - 2)
    return tensor(E2M1_VALUES)[round_e2m1(x / scale).long()].mul(scale).view_as(w)


@pytest.mark.parametrize("name", [f for f in MADE if not f.startswith("fp8") and f != "int8_plain"])
def test_search_is_never_worse_than_the_largest_magnitude(name):
    w = weights(64, 512)
    size = FORMATS[name].group_size or 512
    got, want = (
        (v - w.float()).view(64, -1, size).square().sum(-1) for v in (FORMATS[name].quantize(w, None).dequantize(), plain(name, w))
    )
    assert (got <= want * (1 + 1e-5) + 1e-20).all()  # the two sums are rounded differently
    if name.startswith(("int4", "nvfp4")):
        assert got.sum() < 0.97 * want.sum()  # and it is worth having: 4 to 15 % here


@pytest.mark.parametrize("name", [f for f in MADE if not f.startswith("fp8") and f != "int8_plain"])
def test_errors_in_important_columns_are_the_smaller(name):
    """No group's weighed error is larger than the largest magnitude makes it; how much all columns count, where they count alike, changes nothing."""
    w, fmt = weights(64, 512), FORMATS[name]
    size = fmt.group_size or 512
    importance = torch.rand(512) ** 8 * 100
    weighed, searched, largest = (
        ((v - w.float()).square() * importance).view(64, -1, size).sum(-1)
        for v in (fmt.quantize(w, None, importance).dequantize(), fmt.quantize(w, None).dequantize(), plain(name, w))
    )
    assert (weighed <= largest * (1 + 1e-5) + 1e-20).all()
    if name.startswith(("int4", "nvfp4")):
        assert weighed.sum() < 0.95 * searched.sum()
    assert torch.equal(*(fmt.quantize(w, None, torch.full((512,), value)).codes for value in (1.0, 64.0)))


@pytest.mark.parametrize("name", ["fp8", "fp8_tensor_a16"])
def test_scales_that_follow_from_the_largest_magnitude_stay(name):
    w = weights(64, 512)
    assert torch.equal(FORMATS[name].quantize(w, None, torch.rand(512)).dequantize(), FORMATS[name].quantize(w, None).dequantize())


# --- the compressed-tensors library


def library(name: str) -> tuple[type[BaseCompressor], QuantizationScheme]:
    scheme = FORMATS[name].scheme
    parsed = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**scheme["weights"]), format=scheme["format"])
    return BaseCompressor.get_value_from_registry(scheme["format"]), parsed


def library_scale(q: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The parameters of `q` as that library's compressors take them: floats, not yet packed."""
    if q.scale.dtype == torch.uint8:
        return {"weight_scale": torch.exp2(q.scale.float() - 127)}
    scale = {"weight_scale": q.scale.float() if q.scale.dtype == torch.float8_e4m3fn else q.scale}
    if q.global_scale is not None:
        scale["weight_global_scale"] = (1 / q.global_scale).reshape(1)
    if q.zero_point is not None:
        scale["weight_zero_point"] = q.zero_point
    return scale


@pytest.mark.parametrize("name", MADE)
def test_library_packs_the_same_bytes(name):
    """Given our values and scales, that library's compressor stores what we store, in every tensor that both have."""
    fmt, (compressor, scheme) = FORMATS[name], library(name)
    q = fmt.quantize(weights(24, 256), None)
    scale = library_scale(q)
    if name.startswith("fp8_tensor"):
        scale["weight_scale"] = q.scale[:1, 0]
    # exact in float32, and nearest to themselves
    theirs = compressor.compress(
        {"weight": q.dequantize(), **{k: v.float() if k == "weight_scale" else v for k, v in scale.items()}}, scheme
    )
    ours = fmt.store(q)
    for p in ours.keys() | theirs.keys():
        if p == "weight_scale" and name.startswith("int"):
            assert theirs[p].to(ours[p].dtype).equal(ours[p])
        elif p != "weight_shape" or p in ours:
            assert theirs[p].dtype == ours[p].dtype and theirs[p].shape == ours[p].shape, p
            if p in ("weight", "weight_packed") and "e2m1" == q.code:
                a, b = unpack_pairs(ours[p]), unpack_pairs(theirs[p])
                assert (a & 7).equal(b & 7) and ((a == b) | (a & 7 == 0)).all()  # dequantized, -0 may become 0
            else:
                assert theirs[p].flatten().view(torch.uint8).equal(ours[p].flatten().view(torch.uint8)), p


@pytest.mark.parametrize("name", MADE)
def test_library_reads_what_is_stored(name):
    fmt, (compressor, scheme) = FORMATS[name], library(name)
    q = fmt.quantize(weights(24, 256), None)
    got = compressor.decompress(fmt.store(q), scheme)["weight"]
    if q.code == "e2m1":
        # that library multiplies in bfloat16: 2 roundings of 2 ** -9 each, and one more of the scale
        torch.testing.assert_close(got.float(), q.dequantize(), rtol=3 * 2**-8, atol=0)
    else:
        assert got.equal(q.dequantize().to(got.dtype))


@pytest.mark.parametrize("name", MADE)
def test_what_the_library_writes_is_read(name):
    """Its own rounding with plain scales of its own: codes and values come out as its decompressor has them."""
    fmt, (compressor, scheme) = FORMATS[name], library(name)
    w = weights(24, 256).float()
    scale = {k: v.float() if k == "weight_scale" else v for k, v in library_scale(fmt.quantize(w.bfloat16(), None)).items()}
    if name.startswith("fp8_tensor"):
        scale["weight_scale"] = scale["weight_scale"][:1, 0]
    stored = compressor.compress({"weight": w, **scale}, scheme)
    fmt.check("layer", stored, 24, 256)
    q = fmt.read(stored, 24, 256)
    if q.code == "e2m1":
        assert tensor(E2M1_VALUES)[q.codes.long()].equal(unpack_fp4_from_uint8(stored["weight_packed"], 24, 256, torch.float32))
        assert pack_fp4_to_uint8(tensor(E2M1_VALUES)[q.codes.long()]).equal(stored["weight_packed"])
    else:
        assert q.dequantize().equal(compressor.decompress(stored, scheme)["weight"].float())


# --- schemes


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_scheme_is_its_own_format(name):
    assert format_of_scheme(FORMATS[name].scheme) is FORMATS[name]


@pytest.mark.parametrize("name", QUANTIZED)
def test_library_keeps_every_scheme(name):
    scheme = FORMATS[name].scheme
    dumped = QuantizationScheme(targets=["Linear"], **scheme).model_dump(mode="json")
    assert format_of_scheme(dumped) is FORMATS[name]


@pytest.mark.parametrize(
    ("preset", "name"),
    [("W8A16", "int8_g128"), ("W4A16", "int4_g128"), ("W4A16_ASYM", "int4_g128_asym"), ("W8A8", "int8_plain"), ("INT8", "int8_plain"),
     ("FP8", "fp8_static"), ("FP8_DYNAMIC", "fp8"), ("NVFP4A16", "nvfp4"), ("NVFP4", "nvfp4"), ("MXFP4A16", "mxfp4"), ("MXFP4", "mxfp4"),
     ("UNQUANTIZED", "bf16")],
)  # fmt: skip
def test_schemes_of_llm_compressor(preset, name):
    scheme = QuantizationScheme(targets=["Linear"], **PRESET_SCHEMES[preset]).model_dump(mode="json")
    assert format_of_scheme(scheme).name == name
    if scheme["weights"]:
        storage = FORMATS[name].scheme["format"]
        assert (
            format_of_scheme(scheme, storage).name == name
            and format_of_scheme({**scheme, "format": storage}, "mixed-precision").name == name
        )


def test_a_row_for_a_group_is_minus_one_in_that_library():
    weights = QuantizationArgs(num_bits=4, group_size=-1).model_dump(mode="json")
    assert weights["group_size"] == -1 and format_of_scheme({"weights": weights}).name == "int4_channel"
    assert format_of_scheme({"weights": {"num_bits": 4, "group_size": 128}}).name == "int4_g128"


@pytest.mark.parametrize("preset", ["FP8_BLOCK", "MXFP8", "W4A8"])
def test_unknown_scheme_says_what_it_is_and_what_there_is(preset):
    scheme = QuantizationScheme(targets=["Linear"], **PRESET_SCHEMES[preset]).model_dump(mode="json")
    with pytest.raises(ValueError, match=r"no format stores \S+ weights with .*'num_bits': [48].*; supported are fp8, .*mxfp4"):
        format_of_scheme(scheme)


def test_activation_order():
    weights = FORMATS["int4_g128"].scheme["weights"]
    for order, name in {"group": "int4_g128_act", "dynamic": "int4_g128_act", "static": "int4_g128", "weight": "int4_g128"}.items():
        args = QuantizationArgs(**{**weights, "actorder": order}).model_dump(mode="json")
        assert format_of_scheme({"weights": args}).name == format_of_scheme({"weights": {**weights, "actorder": order}}).name == name
    with pytest.raises(ValueError, match="no format stores pack-quantized weights with .*'actorder': 'group'"):
        format_of_scheme({"weights": {**FORMATS["int4_channel"].scheme["weights"], "actorder": "group"}})


def test_unknown_format_name():
    with pytest.raises(ValueError, match="unknown format 'int5'; there are int4, bf16, fp8"):
        get_format("int5")
    assert all(name in FORMATS for names in ALIASES.values() for name in names)


# --- shapes


def test_refusals_are_sentences():
    assert FORMATS["nvfp4"].refuses(8, 100) == "K = 100 is not a multiple of 16, the group size of nvfp4"
    assert FORMATS["int4_channel"].refuses(8, 100) == "K = 100 is not a multiple of 8, which weight_packed of int4_channel packs together"
    assert FORMATS["fp8"].refuses(8, 100) is None and BF16.refuses(1, 1) is None


def test_check_names_tensor_expected_and_found():
    fmt = FORMATS["int4_g128"]
    stored = fmt.store(fmt.quantize(weights(8, 256), None))
    with pytest.raises(CheckpointError, match=r"^m\.weight_scale: expected shape \[8, 2\] for a 8 x 256 weight, found \[8, 1\]"):
        fmt.check("m", {**stored, "weight_scale": stored["weight_scale"][:, :1]}, 8, 256)
    with pytest.raises(CheckpointError, match=r"^m\.weight_packed: expected torch.int32, found torch.int64"):
        fmt.check("m", {**stored, "weight_packed": stored["weight_packed"].long()}, 8, 256)
    del stored["weight_scale"]
    with pytest.raises(CheckpointError, match=r"^m\.weight_scale: missing; a layer in int4_g128 has weight_packed, weight_scale"):
        fmt.check("m", stored, 8, 256)


def param(fmt: str, name: str):
    return next(p for p in FORMATS[fmt].params if p.name == name)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_slices_make_the_slices_of_w(name, ranks):
    """Column and row parallel: what a rank reads of its slices is its part of the whole."""
    fmt, n, k = FORMATS[name], 64, 1024
    stored = fmt.store(fmt.quantize(weights(n, k), None))
    whole = fmt.read(stored, n, k).dequantize()
    for rank in range(ranks):
        rows, columns = (rank * n // ranks, (rank + 1) * n // ranks), (rank * k // ranks, (rank + 1) * k // ranks)
        for r, c in ((rows, (0, k)), ((0, n), columns)):
            mine = {p.name: p.slice(p.name, stored[p.name], r, c) for p in fmt.params if p.name in stored}
            part = fmt.read(mine, r[1] - r[0], c[1] - c[0]).dequantize()
            assert part.equal(whole[r[0] : r[1], c[0] : c[1]])


def test_slice_inside_a_group_is_refused():
    with pytest.raises(
        CheckpointError, match=r"m\.weight_scale: columns 192..384 of this rank do not fall on multiples of 128; use a tensor parallel"
    ):
        param("int4_g128", "weight_scale").slice("m.weight_scale", torch.empty(8, 6), (0, 8), (192, 384))
    with pytest.raises(CheckpointError, match="columns 0..192 of this rank do not fall on multiples of 128"):
        param("int4_g128", "weight_scale").slice("m.weight_scale", torch.empty(8, 6), (0, 8), (0, 192))


def test_slice_inside_packed_zero_points_is_refused():
    zero = param("int4_g128_asym", "weight_zero_point")
    with pytest.raises(CheckpointError, match="rows 12..24 of this rank do not fall on multiples of 8"):
        zero.slice("m.weight_zero_point", torch.empty(6, 2, dtype=torch.int32), (12, 24), (0, 256))
    assert zero.slice("", torch.empty(6, 2, dtype=torch.int32), (16, 32), (0, 256)).shape == (2, 2)


def test_slice_may_end_in_the_last_padded_element():
    """12 rows of zero points are two int32, and the whole tensor ends inside the second."""
    zero = param("int4_g128_asym", "weight_zero_point")
    packed = torch.arange(4, dtype=torch.int32).view(2, 2)
    assert zero.slice("", packed, (0, 12), (0, 256)).equal(packed)


def test_slice_leaves_what_has_no_rows_alone():
    shared = torch.ones(1)
    assert param("nvfp4", "weight_global_scale").slice("", shared, (3, 5), (16, 32)) is shared
    assert param("fp8", "weight_scale").slice("", torch.ones(8, 1), (2, 4), (0, 16)).shape == (2, 1)
