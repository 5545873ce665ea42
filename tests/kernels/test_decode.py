"""Every 16-bit word through every decode function: the tables in kernels/decode are what the bits mean."""

import pytest
import torch
import triton.language as tl
from samples import jit

from qplugins.kernels.decode import CODES
from qplugins.kernels.decode.e2m1 import decode_e2m1
from qplugins.kernels.decode.e4m3 import decode_e4m3
from qplugins.kernels.decode.int4 import decode_int4
from qplugins.kernels.decode.int8 import decode_int8

# value = decoded * 2 ** power - base; of int4 in bfloat16, every second code is decoded to 16 times as much
MEANING = {
    ("e2m1", "bf16"): (126, 0),
    ("e2m1", "fp16"): (14, 0),
    ("e4m3", "bf16"): (120, 0),
    ("e4m3", "fp16"): (8, 0),
    ("int4", "bf16"): (133, 8),
    ("int4", "fp16"): (0, 1032),
    ("int8", "bf16"): (0, 0),
    ("int8", "fp16"): (0, 0),
}


@jit
def decode_kernel(word, out, CODE: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr):
    """out[i, j] = code j of word i, decoded."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(word + i)
    if CODE == "e2m1" or CODE == "int4":
        if CODE == "e2m1":
            d0, d1, d2, d3 = decode_e2m1(w, dtype, PTX)
        else:
            d0, d1, d2, d3 = decode_int4(w, dtype, PTX)
        tl.store(out + 4 * i, d0.to(tl.float32))
        tl.store(out + 4 * i + 1, d1.to(tl.float32))
        tl.store(out + 4 * i + 2, d2.to(tl.float32))
        tl.store(out + 4 * i + 3, d3.to(tl.float32))
    else:
        if CODE == "e4m3":
            d0, d1 = decode_e4m3(w, dtype, PTX)
        else:
            d0, d1 = decode_int8(w, dtype, PTX)
        tl.store(out + 2 * i, d0.to(tl.float32))
        tl.store(out + 2 * i + 1, d1.to(tl.float32))


@pytest.mark.parametrize("ptx", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", CODES)
def test_every_code_in_every_place_is_exact(name, dtype, ptx, device):
    if ptx and (device.type != "cuda" or torch.version.hip):
        pytest.skip("PTX needs an NVIDIA GPU")
    code = CODES[name]
    word = torch.arange(1 << 16, dtype=torch.int32)
    codes = torch.stack([sum(((word >> place) & 1) << b for b, place in enumerate(places)) for places in code.places], 1)
    out = torch.full(codes.shape, torch.nan, device=device)
    words = torch.where(word >= 1 << 15, word - (1 << 16), word).to(torch.int16).to(device)
    decode_kernel[(16,)](words, out, CODE=name, dtype={"bf16": tl.bfloat16, "fp16": tl.float16}[dtype], PTX=ptx, BLOCK=4096)
    power, base = MEANING[name, dtype]
    got = torch.ldexp(out.cpu().double(), torch.tensor(power))
    if (name, dtype) == ("int4", "bf16"):
        got[:, 1::2] /= 16
    got -= base
    want = code.values.double()[codes]
    known = ~want.isnan()
    assert torch.equal(got[known], want[known])
    assert torch.equal(torch.signbit(out.cpu()[want == 0]), torch.signbit(want[want == 0]))


@pytest.mark.parametrize("name", CODES)
def test_places_of_a_word_are_each_used_once(name):
    code = CODES[name]
    assert sorted(p for places in code.places for p in places) == list(range(16))
    assert code.values.shape == (1 << code.bits,)
