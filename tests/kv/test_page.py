"""What the bytes of a page mean: a page written by hand, the formula, and what is refused."""

from dataclasses import replace

import pytest
import torch

from qplugins.kernels.kv import ref
from qplugins.kernels.kv.page import HEAD_DIMS, PAGE_SIZES, Page, Words
from qplugins.kernels.kv.rotation import block, hadamard
from qplugins.kv import KV_LAYOUTS, Layout, get_layout


def test_a_word_of_a_page_at_head_dim_128():
    # keys: a block is 8 tokens x 32 columns, 16 bytes a lane: token a, columns 8b .. 8b+7 in lane 4a + b
    keys = Words(128, 32)
    assert (keys.w, keys.n, keys.pieces, keys.groups) == (8, 1, 1, 16)
    assert keys.index()[0, :9].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert keys.index()[1, 0] == 32 and keys.index()[8, 0] == 256 and keys.index()[127, 31] == 4095
    # values: the same block transposed, two tokens side by side: lane 4a + b has columns 4a .. 4a+3 of tokens 2b and 2b+1
    values = Words(128, 32, values=True)
    assert values.index()[:8, 0].tolist() == [0, 1, 8, 9, 16, 17, 24, 25]
    assert values.index()[0, :5].tolist() == [0, 2, 4, 6, 32]
    assert values.index()[8, 0] == 256


def test_a_page_written_by_hand():
    page = Page(64, 64, 4, 4, 1, 64, rotate=False)
    assert page.offsets == {
        "codes_k": 0, "high_k": 2048, "codes_v": 2048, "scales_k": 4096, "scales_v": 4352, "mean_k": 4608, "row_scales": 4736, "rows_k": 4752, "rows_v": 4816
    }  # fmt: skip
    assert page.content_bytes == 4880 and page.nbytes == 4928
    one = torch.zeros(1, 1, page.nbytes, dtype=torch.uint8)
    b = one[0, 0]
    # token 9, d = 5 + 16 * j for code j = 0..3 of column 5: lane a = 1, b = 1, y = 1, i = 1 -> word (4 + 1) * 8 + 4 + 1 = 45, bytes 90 and 91
    b[90], b[91] = 0x21, 0xF3  # codes 1, 2, 3, 15
    b[4096 + 36 : 4096 + 40] = torch.tensor([0x00, 0x38, 0x00, 0xC0], dtype=torch.uint8)  # scale 0.5, zero -2
    b[4608 + 2 * 21 : 4608 + 2 * 21 + 2] = torch.tensor([0x00, 0x3C], dtype=torch.uint8)  # mean[21] = 1
    k, v = ref.read(one, page)
    assert k[0, 0, 9, [5, 21, 37, 53]].tolist() == [-7 * 0.5 - 2, -6 * 0.5 - 2 + 1, -5 * 0.5 - 2, 7 * 0.5 - 2]
    assert k[0, 0, 9, 6] == -8 * 0.5 - 2 and k[0, 0, 8, 21] == 1
    # value of token 9 (y = 1, b = 0, e = 1), column 5 (a = 2, i = 1): word 8 * 8 + 4 + 2 + 1 = 71
    b[2048 + 142] = 0x0C
    b[4352 + 36 : 4352 + 40] = torch.tensor([0x00, 0x3C, 0x00, 0x00], dtype=torch.uint8)  # scale 1, zero 0
    k, v = ref.read(one, page)
    assert v[0, 0, 9, 5] == 4 and v[0, 0, 9, 21] == -8 and v[0, 0, 8, 5] == 0
    # rows: token 0 in bytes
    b[4736:4744] = torch.tensor([0x00, 0x3C, 0x00, 0x40, 0x00, 0x38, 0x00, 0x00], dtype=torch.uint8)  # keys 1 and 2, values 0.5 and 0
    b[4752 + 3], b[4816 + 7] = 130, 64
    rows_k, rows_v = ref.read_rows(one, page)
    assert rows_k[0, 0, 0, 3] == 2 + 2 and rows_k[0, 0, 0, 4] == -128 + 2 and rows_v[0, 0, 0, 7] == -32


def test_a_fifth_bit_written_by_hand():
    page = Page(128, 128, 5, 4, 0, 128, rotate=False, mean=False)
    one = torch.zeros(1, 1, page.nbytes, dtype=torch.uint8)
    one.view(torch.int16)[..., page.offsets["scales_k"] // 2 :: 2][..., :128] = 0x3C00
    # column 11 is lane b = 1, word u = 3: two words a lane, so run j = 1 and word u' = 1. Its quarter 2 is d = 64 + 11 and bit 4*1 + 2.
    # Token 8: y = 1 of n = 4, so the lane's word 2*1 + 1, and word (4*0 + 1) * 8 + 3 = 11 of the matrix
    one[0, 0, page.offsets["high_k"] + 22] = 1 << 6
    k, _ = ref.read(one, page)
    assert k[0, 0, 8, 75] == 0
    k[0, 0, 8, 75] = -16
    assert (k == -16).all()


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("layout", KV_LAYOUTS.values(), ids=list(KV_LAYOUTS))
def test_every_layout_has_every_size(layout, head_dim, page_size):
    page = layout.page(head_dim, page_size)
    for m in filter(None, (page.k, page.v, page.high)):
        assert m.index().flatten().sort()[0].equal(torch.arange(m.tokens * m.columns)), "two codes in one place, or a hole"
        assert m.nbytes % 512 == 0
    assert all(at % 16 == 0 for at in page.offsets.values())
    assert page.nbytes % page_size == 0 and page.nbytes % 16 == 0
    assert page.nbytes - page.content_bytes < page_size
    assert Page.parse(str(page)) == page
    assert layout.token_bytes(head_dim, page_size) * page_size == layout.page_bytes(head_dim, page_size) == page.nbytes


@pytest.mark.parametrize(("name", "bits"), [("int4_sink", 4.6), ("k5v4_sink", 5.1), ("k8v4_sink", 6.6), ("int8_sink", 8.6)])
def test_bits_of_a_value_all_in(name, bits):
    assert bits - 0.1 < get_layout(name).page(128, 128).bits_per_value <= bits


def test_keys_and_values_of_different_size():
    page = get_layout("int4_sink").page(192, 128, 128)
    assert page.offsets["codes_v"] - page.offsets["codes_k"] == 128 * 96 and page.offsets["scales_k"] - page.offsets["codes_v"] == 128 * 64
    assert Page.parse(str(page)) == page


@pytest.mark.parametrize(
    ("layout", "args", "says"),
    [
        (get_layout("int4_sink"), (112, 128), "head_dim is 112"),
        (get_layout("int4_sink"), (576, 128, 512), "head_dim is 576"),
        (get_layout("int4_sink"), (128, 128, 512), "values' head_dim is 512"),
        (get_layout("k5v4_sink"), (128, 16), "not 16"),
        (replace(get_layout("int8_sink"), sinks=17), (128, 128), "17 were asked for"),
    ],
)
def test_refusals_say_what_to_do(layout: Layout, args, says):
    why = layout.refuses(*args)
    assert says in why and ";" in why
    with pytest.raises(ValueError, match="."):
        layout.page(*args)
    assert get_layout("int4_sink").refuses(128, 128) is None


def test_unknown_layouts_and_texts():
    with pytest.raises(ValueError, match="int4_sink, k5v4_sink"):
        get_layout("int3_sink")
    with pytest.raises(ValueError, match="k4v4,d128"):
        Page.parse("k4v4")


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_rotation_is_orthonormal_and_its_own_inverse(dim):
    r = hadamard(dim)
    assert r.equal(r.T) and torch.allclose(r @ r, torch.eye(dim), atol=1e-5)
    assert {64: 64, 80: 16, 96: 32, 128: 128, 192: 64, 256: 256}[dim] == block(dim)
