"""The layouts: bytes written by hand, and there and back for every spec."""

import pytest
import torch
from samples import quantized, spec

from qplugins.kernels.decode import CODES
from qplugins.kernels.linear import Spec, Weight, fuse, pack, parse, plan, refuses, spec_of, unpack
from qplugins.kernels.linear.layout import _e4m3_from_e5m3, _e5m3_from_e4m3, _join_words, _split_words, named
from qplugins.kernels.quantized import QuantizedTensor

CPU = torch.device("cpu")
SPECS = (
    "e2m1*e4m3/16", "e2m1*e8m0/32", "e2m1*f32/row", "e2m1*bf16/64", "e4m3*f32/row", "e4m3*bf16/128", "e4m3*e8m0/32", "int4*bf16/32",
    "int4*fp16/64", "int4*bf16/128", "int4*fp16/row", "int4*f32/64", "int4*bf16/32+zero", "int4*bf16/128+zero", "int4*bf16/row+zero",
    "int4*e4m3/16", "int4*e4m3/32+zero", "int8*bf16/row", "int8*bf16/128", "int8*f32/32+zero", "int8*e4m3/16",
)  # fmt: skip


def bits(word: int) -> int:
    return word & 0xFFFF


@pytest.mark.parametrize(
    ("name", "codes", "word"),
    [
        # sign seeeemm.. of e2m1 1111, 0000, 0000, 0000: bits 15, 8, 7, 6
        ("e2m1", (0b1111, 0, 0, 0), 0x81C0),
        ("e2m1", (0, 0b1111, 0, 0), 0x1038),
        ("e2m1", (0, 0, 0b1111, 0), 0x0207),
        ("e2m1", (0, 0, 0, 0b1111), 0x6C00),
        # 1 = 0b0010 has only the low exponent bit, in each place
        ("e2m1", (2, 2, 2, 2), 0x0080 | 0x0010 | 0x0002 | 0x0800),
        ("int4", (0x1, 0x2, 0x3, 0xF), 0xF321),
        ("int8", (0x34, 0x12), 0x1234),
        ("e4m3", (0x7E, 0x80), 0x807E),
    ],
)
def test_a_word_written_by_hand(name, codes, word):
    got = _join_words(CODES[name], torch.tensor(codes, dtype=torch.uint8)[:, None].expand(-1, 16))
    assert {bits(w) for w in got.tolist()} == {word}
    assert torch.equal(_split_words(CODES[name], got)[:, 0], torch.tensor(codes, dtype=torch.uint8))


def test_a_tile_has_each_lane_its_16_bytes():
    """Row 16w + 8u + g, column 16j + 8h + 2t + p is nibble j of word w*256 + g*32 + t*8 + h*4 + u*2 + p."""
    for row, column, word, nibble in [
        (0, 0, 0, 0),
        (0, 1, 1, 0),
        (8, 0, 2, 0),
        (0, 8, 4, 0),
        (0, 2, 8, 0),
        (1, 0, 32, 0),
        (16, 0, 256, 0),
        (0, 16, 0, 1),
        (63, 63, 1023, 3),
    ]:
        codes = torch.zeros(64, 64, dtype=torch.uint8)
        codes[row, column] = 0xF
        words = named(
            "triton", spec("int4*bf16/row", 64, 64), pack(QuantizedTensor("int4", codes, torch.ones(64, 1, dtype=torch.bfloat16))).tensors
        )["codes"]
        assert words.shape == (1, 1, 1024)
        assert words.nonzero().tolist() == [[0, 0, word]]
        assert bits(int(words[0, 0, word])) == 0xF << (4 * nibble)


def test_tiles_of_a_larger_matrix_run_along_k_first():
    codes = torch.zeros(65, 129, dtype=torch.uint8)
    codes[64, 128] = 1
    words = pack(QuantizedTensor("int4", codes, torch.ones(65, 1))).tensors[0]
    assert words.shape == (2, 3, 1024)
    assert words.nonzero().tolist() == [[1, 2, 0]]


def test_rows_are_plain():
    q = QuantizedTensor("int4", torch.tensor([[1, 2, 3, 4, 5, 6]], dtype=torch.uint8), torch.ones(1, 1))
    assert [bits(w) for w in pack(q, "reference").tensors[0].flatten().tolist()] == [0x4321, 0x0065]
    q = QuantizedTensor("int8", torch.tensor([[1, 2, 3]], dtype=torch.uint8), torch.ones(1, 1))
    assert [bits(w) for w in pack(q, "reference").tensors[0].flatten().tolist()] == [0x0201, 0x0003]


def test_nvfp4_scales_of_two_rows_make_one_integer():
    scale = torch.zeros(64, 4)
    scale[0] = torch.tensor([1.0, 2.0, 0.5, 448.0])  # 2 ** (E - 10): E = 10, 11, 9 and 18 with mantissa 6
    scale[8, 0] = 2.0**-9  # the smallest e4m3
    q = QuantizedTensor("e2m1", torch.zeros(64, 64, dtype=torch.uint8), scale.to(torch.float8_e4m3fn))
    words = named("triton", spec_of(q), pack(q).tensors)["scale"]
    assert words.shape == (1, 32)
    assert int(words[0, 0]) & 0xFFFF_FFFF_FFFF_FFFF == 0x0000_0008_9648_5850
    assert not words[0, 1:].any()


def test_e5m3_holds_every_positive_e4m3_number():
    byte = torch.arange(0x7F, dtype=torch.uint8)
    coded = _e5m3_from_e4m3(byte)
    assert torch.equal(_e4m3_from_e5m3(coded).view(torch.uint8), byte)
    assert torch.all(coded[1:] > coded[:-1]) and coded[0] == 0 and coded.max() >> 3 == 18


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize(("n", "k"), [(72, 256), (1, 128)])
def test_unpack_undoes_pack(text, n, k, implementation):
    q = quantized(spec(text, n, k), CPU)
    w = pack(q, implementation)
    assert w.spec == spec(text, n, k)
    back = unpack(w)
    assert torch.equal(back.dequantize(), q.dequantize())
    assert back.scale.dtype == q.scale.dtype and back.scale.shape == q.scale.shape
    if q.zero_point is not None:
        assert torch.equal(back.zero_point, q.zero_point)
    if q.scale.dtype != torch.float8_e4m3fn:
        assert torch.equal(back.codes, q.codes)
    elif implementation == "triton":
        # groups whose scale is zero lose their codes
        kept = (q.scale.to(torch.float32) != 0).repeat_interleave(q.group_size, 1)
        assert torch.equal(back.codes[kept], q.codes[kept])


def test_mxfp4_scales_are_relative_to_the_rows_largest():
    scale = torch.tensor([[200, 199], [60, 200], [0, 1]], dtype=torch.uint8)
    w = pack(QuantizedTensor("e2m1", torch.full((3, 64), 7, dtype=torch.uint8), scale))
    t = named("triton", w.spec, w.tensors)
    assert t["row"].tolist() == [2.0**73, 2.0**73, 2.0**-126]
    # an integer holds two bytes of row n, then two of row n + 8; 60 is 140 below 200, and the least there is
    assert t["scale"][0, :3].tolist() == [126 << 8 | 127, 127 << 8 | 0, 127 << 8 | 126]


def test_scales_that_no_kernel_can_mean_are_refused():
    codes = torch.zeros(64, 64, dtype=torch.uint8)
    for bad in (-1.0, float("nan")):
        scale = torch.ones(64, 4)
        scale[3, 2] = bad
        with pytest.raises(ValueError, match="negative or NaN"):
            pack(QuantizedTensor("e2m1", codes, scale.to(torch.float8_e4m3fn)))
    with pytest.raises(ValueError, match="NaN"):
        pack(QuantizedTensor("e2m1", codes, torch.full((64, 2), 255, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="do not fit 64 bits"):
        pack(QuantizedTensor("e2m1", codes, torch.ones(64, 4)))


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_fused_shards_are_the_matrices_one_after_the_other(implementation):
    qs = [quantized(spec("e2m1*e4m3/16", n, 128), CPU) for n in (128, 64, 72)]
    (joined,) = fuse([pack(q, implementation) for q in qs])
    assert joined.spec.n == 264
    if implementation == "reference":
        return  # its unpack has one global scale; the operator's test covers it
    codes = unpack(joined).codes
    assert torch.equal(codes, torch.cat([unpack(pack(q)).codes for q in qs]))


def test_what_cannot_be_one_matrix_is_not_fused():
    a, b = (pack(quantized(spec("int4*bf16/32", n, 128), CPU)) for n in (72, 64))
    assert len(fuse([a, b])) == 2, "72 rows are no whole tiles, so the second matrix would not begin with one"
    assert len(fuse([b, a])) == 1
    assert len(fuse([b, pack(quantized(spec("int4*bf16/64", 64, 128), CPU))])) == 2
    assert len(fuse([b, pack(torch.zeros(64, 128), "torch")])) == 2


@pytest.mark.parametrize("text", SPECS)
def test_a_plan_says_all(text):
    s = spec(text, 72, 256)
    p = plan([("triton", s), ("torch", Spec(8, 256)), ("scaled_mm", Spec(16, 256, "e4m3", "f32", activation="token"))])
    back = parse(p)
    assert back.n == 96 and back.k == 256
    assert [(sh.implementation, sh.spec) for sh in back.shards] == [
        ("triton", s),
        ("torch", Spec(8, 256)),
        ("scaled_mm", Spec(16, 256, "e4m3", "f32", activation="token")),
    ]
    assert [sh.start for sh in back.shards] == [0, 72, 80]
    assert back.shards[1].first == len(pack(quantized(s, CPU)).tensors)


def test_plans_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="no shard of a plan"):
        parse("triton e2m1 4x4")
    with pytest.raises(ValueError, match="K = 16 and 32"):
        plan([("torch", Spec(4, 16)), ("torch", Spec(4, 32))])
    with pytest.raises(ValueError, match="unknown implementation 'marlin'"):
        parse("marlin plain 4x4")
    with pytest.raises(ValueError, match="not a multiple of the group size 32"):
        Spec(4, 48, "int4", "bf16", 32)


def test_every_implementation_says_what_it_cannot_run():
    nvfp4, fp8 = Spec(64, 64, "e2m1", "e4m3", 16), Spec(64, 64, "e4m3", "f32", activation="token")
    assert refuses("triton", nvfp4, "cuda", (9, 0)) is None
    assert "run on a GPU" in refuses("triton", nvfp4, "cpu")
    assert "capability 8.0" in refuses("triton", nvfp4, "cuda", (7, 5))
    assert "groups of 16, 32, 64" in refuses("triton", Spec(64, 96, "int4", "bf16", 48), "cuda", (9, 0))
    assert "at least 64 columns" in refuses("triton", Spec(64, 64, "int4", "f32", 16), "cuda", (9, 0))
    assert "zero points" in refuses("triton", Spec(64, 64, "e2m1", "bf16", 32, True), "cuda", (9, 0))
    assert refuses("scaled_mm", fp8, "cuda", (9, 0)) is None
    assert "capability 8.9" in refuses("scaled_mm", fp8, "cuda", (8, 0))
    assert "stay in 16 bits" in refuses("scaled_mm", Spec(64, 64, "e4m3", "f32"), "cuda", (9, 0))
    assert "multiples of 16" in refuses("scaled_mm", Spec(65, 64, "e4m3", "f32", activation="token"), "cuda", (9, 0))
    assert refuses("torch", Spec(64, 64), "cpu") is None and "is quantized" in refuses("torch", nvfp4, "cpu")
    assert refuses("reference", nvfp4, "cpu") is None


def test_tensors_are_counted():
    w = pack(quantized(spec("int4*bf16/32+zero", 64, 64), CPU))
    assert isinstance(w, Weight) and w.nbytes == sum(t.numel() * t.element_size() for t in w.tensors)
    with pytest.raises(ValueError, match="codes, row, locks, scale, zero"):
        named("triton", w.spec, w.tensors[:-1])
