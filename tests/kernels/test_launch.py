"""A Launcher launches what Triton would, and asks it once for each version."""

from itertools import product

import pytest
import torch
import triton.language as tl
from samples import jit, spec

from qplugins.kernels.common import launch
from qplugins.kernels.common.launch import Launcher, Place, compiled_for
from qplugins.kernels.linear import fp8_wide, wide


@jit
def scale_kernel(x, y, n, offset, factor, BLOCK: tl.constexpr, TWICE: tl.constexpr):
    """y[i] = factor * x[i] + offset, or twice that, for i < n."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0) * factor + offset
    if TWICE:
        value *= 2.0
    tl.store(y + i, value.to(y.dtype.element_ty), mask=i < n)


def test_values_of_every_kind_of_arguments(device):
    """Sizes that Triton compiles for (1, multiples of 16, others), pointers off 16 bytes, types: twice each, as the second time goes by another way."""
    for twice in (False, True):
        run = Launcher(scale_kernel, BLOCK=32, TWICE=twice, num_warps=1)
        for n, skip, dtype, offset in product((1, 7, 16, 48), (0, 1), (torch.float32, torch.float16), (1, 3, 16)):
            for _ in range(2):
                x = torch.randn(n + skip, device=device, dtype=dtype)
                y = torch.full((n + skip + 1,), torch.nan, device=device, dtype=dtype)
                run((-(-n // 32),), x[skip:], y[skip:], n, offset, 0.5)
                want = (1 + twice) * (0.5 * x[skip:].float() + offset)
                torch.testing.assert_close(y[skip:-1], want.to(dtype), rtol=1e-3, atol=1e-3)
                assert y[-1].isnan() and (not skip or y[0].isnan())


class Kernel:
    """Stands for a compiled one: what was launched, and which way."""

    arg_names = ("x", "n", "BLOCK", "EVEN")

    def __init__(self):
        self.by_triton, self.directly = [], []

    def __getitem__(self, grid):
        def run(*args, **constants):
            self.by_triton.append((grid, args, constants))
            return compiled

        class Compiled:
            def __getitem__(_, grid):
                return lambda *args: self.directly.append((grid, args))

        compiled = Compiled()
        return run


def test_triton_is_asked_once_for_each_version(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRET", type("", (), {"value": False}))
    device = [0]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device[0])
    kernel = Kernel()
    run = Launcher(kernel, EVEN=True, BLOCK=64, num_warps=4)
    x = torch.zeros(64)
    run((3,), x, 32)
    assert kernel.by_triton == [((3,), (x, 32), {"EVEN": True, "BLOCK": 64, "num_warps": 4})] and not kernel.directly
    run((5, 2), x[16:], 48)
    ((grid, args),) = kernel.directly
    assert grid[:3] == (5, 2, 1) and args[1:] == (48, 64, True)  # constants as the kernel has them, options gone
    for args in ((x, 1), (x, 33), (x[1:], 32), (x.half(), 32), (x, 1 << 40)):
        run((1,), *args)
    device[0] = 1
    run((1,), x, 32)
    assert len(kernel.by_triton) == 7 and len(kernel.directly) == 1


def test_constants_are_the_last_parameters():
    with pytest.raises(TypeError, match="last parameters should be its constants: x, n, BLOCK, EVEN with BLOCK"):
        Launcher(Kernel(), BLOCK=64)


def test_a_descriptor_counts_by_its_type():
    base = lambda dtype: type("", (), {"base": Place.of(torch.zeros(4, dtype=dtype))})()  # noqa: E731
    assert compiled_for((base(torch.int16), 0.5, 3)) == compiled_for((base(torch.int16), 1.0, 5))
    assert compiled_for((base(torch.int16),)) != compiled_for((base(torch.int32),))


@pytest.mark.gpu
def test_as_many_versions_as_triton_has(device):
    """What a Launcher tells apart is at least what Triton does: each of these is one of both."""
    run = Launcher(scale_kernel, BLOCK=64, TWICE=False, num_warps=2)
    before = len(scale_kernel.device_caches[torch.cuda.current_device()][0])
    x = torch.randn(64, device=device)
    for n, skip, dtype in product((1, 7, 16), (0, 1), (torch.float32, torch.float16)):
        t = x.to(dtype)[skip:]
        run((1,), t, torch.empty_like(t), n, 3, 0.5)
    assert len(run.compiled) == len(scale_kernel.device_caches[torch.cuda.current_device()][0]) - before == 12


def test_kernels_that_only_a_gpu_launches_have_their_constants_last():
    """The others' Launchers are made wherever their tests run."""
    for bias in (False, True):
        for tile, _ in wide.TILES:
            wide._launcher(spec("int4*bf16/128+zero", 256, 256), torch.bfloat16, tile, bias)
        for tile, _ in fp8_wide.TILES:
            fp8_wide._launcher(tile, bias)
