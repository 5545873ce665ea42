"""The operators `qplugins::kv_write` and `qplugins::kv_gather`. CPU tensors run the reference, others the Triton kernels.

Pages are one tensor, uint8 [num_pages, num_kv_heads, nbytes], of any strides but the last, which is 1 (page.py says what the bytes mean;
`str(page)` travels in the operators' schemas). All sizes that shape a launch come from tensor shapes and plain numbers, never from values on the
device, so a CUDA graph can hold every call.
"""

import torch
from torch import Tensor

from qplugins.kernels.kv import gather as gather_kernel
from qplugins.kernels.kv import ref
from qplugins.kernels.kv import write as write_kernel
from qplugins.kernels.kv.page import Page

_library = torch.library.Library("qplugins", "FRAGMENT")
_library.define(
    "kv_write(Tensor(a!) pages, Tensor k, Tensor v, Tensor slot_mapping, Tensor query_start_loc, Tensor seq_lens, Tensor block_table, "
    "str page, int max_query_len) -> ()"
)
_library.define(
    "kv_gather(Tensor pages, Tensor block_table, Tensor starts, Tensor cu_lens, int total, str page, ScalarType dtype) -> (Tensor, Tensor)"
)


def check_pages(pages: Tensor, page: Page) -> None:
    """Raises ValueError unless the tensor holds such pages."""
    if pages.dtype != torch.uint8 or pages.ndim != 3 or pages.shape[2] != page.nbytes or pages.stride(2) != 1:
        raise ValueError(
            f"pages should be uint8 [num_pages, num_kv_heads, {page.nbytes}], dense in the last dimension, for {page}; "
            f"is {pages.dtype} {tuple(pages.shape)} with strides {pages.stride()}"
        )
    if pages.data_ptr() % 16 or pages.stride(0) % 16 or pages.stride(1) % 16:
        raise ValueError(f"pages should start at multiples of 16 bytes; strides are {pages.stride()}")


def _check_new(pages: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor, page: Page) -> None:
    heads, n = pages.shape[1], slot_mapping.shape[0]
    for name, x, dim in (("k", k, page.head_dim), ("v", v, page.v_head_dim)):
        if x.ndim != 3 or x.shape[0] < n or x.shape[1:] != (heads, dim) or x.stride(2) != 1:
            raise ValueError(
                f"{name} should be [at least {n} tokens, {heads}, {dim}], dense in the last dimension; is {tuple(x.shape)} with strides {x.stride()}"
            )


def _write(
    pages: Tensor,
    k: Tensor,
    v: Tensor,
    slot_mapping: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    page: str,
    max_query_len: int,
) -> None:
    layout = Page.parse(page)
    check_pages(pages, layout)
    _check_new(pages, k, v, slot_mapping, layout)
    if slot_mapping.shape[0] and seq_lens.shape[0]:
        if pages.device.type == "cpu":
            ref.write(pages, k, v, slot_mapping, query_start_loc, seq_lens, block_table, layout)
        else:
            write_kernel.write(pages, k, v, slot_mapping, query_start_loc, seq_lens, block_table, layout, max_query_len)


def _gather(
    pages: Tensor, block_table: Tensor, starts: Tensor, cu_lens: Tensor, total: int, page: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    layout = Page.parse(page)
    check_pages(pages, layout)
    if pages.device.type == "cpu":
        return ref.gather(pages, block_table, starts, cu_lens, total, layout, dtype)
    return gather_kernel.gather(pages, block_table, starts, cu_lens, total, layout, dtype)


def _gather_fake(pages: Tensor, block_table: Tensor, starts: Tensor, cu_lens: Tensor, total: int, page: str, dtype: torch.dtype):
    layout, heads = Page.parse(page), pages.shape[1]
    return tuple(pages.new_empty(total, heads, dim, dtype=dtype) for dim in (layout.head_dim, layout.v_head_dim))


for _key in ("CPU", "CUDA"):
    _library.impl("kv_write", _write, _key)
    _library.impl("kv_gather", _gather, _key)
torch.library.register_fake("qplugins::kv_write", lambda *_: None, lib=_library)
torch.library.register_fake("qplugins::kv_gather", _gather_fake, lib=_library)


def write(
    pages: Tensor,
    k: Tensor,
    v: Tensor,
    slot_mapping: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    page: Page | str,
    max_query_len: int,
) -> None:
    """Stores the keys and values of new tokens, of many sequences at once, prompts and decode steps mixed.

    k, v             [>= T, num_kv_heads, head_dim] in any float dtype; tokens of a sequence are neighbours, in order
    slot_mapping     int [T]: page number * page_size + offset in the page; -1: not stored. A page whose first token is not stored is not opened:
                     it has the mean that it had
    query_start_loc  int [B + 1]: sequence b's new tokens are query_start_loc[b] .. query_start_loc[b + 1] - 1; those after the last are ignored
    seq_lens         int [B]: the sequence's length, new tokens included; so position of its i-th new token = seq_lens[b] - new tokens + i,
                     and offset in the page = position % page_size
    block_table      int [B, >= pages of the sequence]: read for the page before one that is opened, no further
    max_query_len    an upper bound of the new tokens of a sequence
    Raises ValueError where shapes or strides are wrong.
    """
    torch.ops.qplugins.kv_write(pages, k, v, slot_mapping, query_start_loc, seq_lens, block_table, str(page), max_query_len)


def gather(
    pages: Tensor, block_table: Tensor, starts: Tensor, cu_lens: Tensor, total: int, page: Page | str, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """Reads stored tokens back, in the model's own space: K [total, num_kv_heads, head_dim] and V of `dtype`, sequences one after the other.

    starts   int [B]: first position that is read of each sequence
    cu_lens  int [B + 1]: sequence b's tokens are rows cu_lens[b] .. cu_lens[b + 1] - 1 of the result
    total    rows of the result, >= cu_lens[B]; rows after cu_lens[B] are zero on a CPU and unwritten elsewhere
    """
    return torch.ops.qplugins.kv_gather(pages, block_table, starts, cu_lens, total, str(page), dtype)
