"""Timing on a GPU: by CUDA graphs, since eager calls measure Python, and on inputs that are not in the cache."""

from collections.abc import Callable

import torch
import triton


def time_us(calls: list[Callable[[], object]], rep_ms: float = 20) -> float:
    """Microseconds of one call: the median over replays of a CUDA graph that makes all `calls`, again and again, for about rep_ms.

    Give one call for each copy of the inputs, enough of them that no copy is in the cache when its turn comes: see `copies`.
    """

    def all_of_them() -> None:
        for call in calls:
            call()

    torch.cuda.synchronize()  # graphs run on a stream of their own, which does not wait for what still makes the inputs
    return triton.testing.do_bench_cudagraph(all_of_them, rep=rep_ms, return_mode="median") * 1000 / len(calls)


def copies(nbytes: int) -> int:
    """How many sets of inputs of that size exceed the cache twice over, so that each is read from memory."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, -(-2 * cache // max(nbytes, 1)))


def bandwidth() -> float:
    """Bytes a second that a large copy on the device moves, reads and writes together: by the driver or by a kernel, whichever is quicker."""
    a = torch.randn(1 << 29, dtype=torch.float32, device="cuda")
    b = torch.empty_like(a)
    us = min(time_us([call], 20) for _ in range(3) for call in (lambda: b.copy_(a), lambda: torch.mul(a, 2, out=b)))
    return 2 * a.nbytes / us * 1e6
