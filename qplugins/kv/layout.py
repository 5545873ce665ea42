"""A KV layout, as data: in how many bits keys and values are kept. `page` makes of it, for a head size and a page size, the bytes
(kernels/kv/page.py) that engine, kernels, `inspect` and the documentation share.

    key - page mean, value  --rotate-->  codes with one scale and zero a token;  the first tokens of a sequence a second time, in 8 bits
"""

from dataclasses import dataclass

from qplugins.kernels.kv.page import HEAD_DIMS, MAX_SINKS, PAGE_SIZES, Page


@dataclass(frozen=True)
class Layout:
    """name; about, a line for people; k_bits 4, 5 or 8; v_bits 4 or 8.

    sinks         tokens at a sequence's beginning that are kept in 8 bits beside their codes
    mean, rotate  parts of the method that only an ablation leaves out
    """

    name: str
    about: str
    k_bits: int
    v_bits: int
    sinks: int = 4
    mean: bool = True
    rotate: bool = True

    def page(self, head_dim: int, page_size: int, v_head_dim: int | None = None) -> Page:
        """The page of this layout. Raises ValueError with the sentence of `refuses` where there is none."""
        if why := self.refuses(head_dim, page_size, v_head_dim):
            raise ValueError(why)
        return Page(head_dim, page_size, self.k_bits, self.v_bits, self.sinks, v_head_dim or head_dim, self.mean, self.rotate)

    def page_bytes(self, head_dim: int, page_size: int, v_head_dim: int | None = None) -> int:
        """Bytes of a page of one KV head: a multiple of page_size and of 16."""
        return self.page(head_dim, page_size, v_head_dim).nbytes

    def token_bytes(self, head_dim: int, page_size: int, v_head_dim: int | None = None) -> int:
        """Bytes that a token takes in one KV head, all parts of the page counted in."""
        return self.page_bytes(head_dim, page_size, v_head_dim) // page_size

    def refuses(self, head_dim: int, page_size: int, v_head_dim: int | None = None) -> str | None:
        """Why there is no such page, in a sentence with the way out; None where there is one."""
        for what, dim in (("head_dim", head_dim), ("the values' head_dim", v_head_dim or head_dim)):
            if dim not in HEAD_DIMS:
                offered = ", ".join(map(str, HEAD_DIMS))
                return (
                    f"{self.name} stores heads of {offered} values, and {what} is {dim}; leave this layer's KV cache in the model's dtype"
                )
        if page_size not in PAGE_SIZES:
            return f"{self.name} has pages of {' or '.join(map(str, PAGE_SIZES))} tokens, not {page_size}; use a page or block size of 128"
        if not 0 <= self.sinks <= MAX_SINKS:
            return f"{self.name} keeps at most {MAX_SINKS} sink tokens, and {self.sinks} were asked for; lower the number of sinks"
        return None
