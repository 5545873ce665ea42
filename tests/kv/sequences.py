"""Sequences with keys like a model's, and their pages."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qplugins.kernels.kv import ref
from qplugins.kernels.kv.page import Page

POISON = 0xFF  # two such bytes are NaN as float16, and a code that stands for the largest value


def keys_and_values(tokens: int, heads: int, page: Page) -> tuple[Tensor, Tensor]:
    """Some channels of keys are eight times as large, and each has a mean of its own; the first token stands out."""
    spread = torch.ones(heads, page.head_dim)
    spread[:, ::17] = 8
    k = torch.randn(tokens, heads, page.head_dim) * spread + 2 * torch.randn(heads, page.head_dim) * spread
    v = torch.randn(tokens, heads, page.v_head_dim)
    if tokens:
        k[0] *= 3
        v[0] *= 0.1
    return k, v


@dataclass
class Batch:
    """Sequences of `lens` tokens whose pages lie anywhere: block_table [B, pages + 1], what is not a page of the sequence out of range."""

    page: Page
    lens: list[int]
    pages: Tensor
    block_table: Tensor
    used: Tensor

    @classmethod
    def empty(cls, page: Page, lens: list[int], heads: int) -> "Batch":
        counts = [-(-n // page.page_size) for n in lens]
        order = torch.randperm(sum(counts) + 2)
        table = torch.full((len(lens), max(counts) + 1), 1 << 20, dtype=torch.int32)
        at = 0
        for b, n in enumerate(counts):
            table[b, :n] = order[at : at + n]
            at += n
        pages = torch.full((len(order), heads, page.nbytes), POISON, dtype=torch.uint8)
        return cls(page, lens, pages, table, order[:at])

    @classmethod
    def filled(cls, page: Page, lens: list[int], heads: int, values: float = 1.0) -> "Batch":
        """values: how large they are."""
        batch = cls.empty(page, lens, heads)
        for b, n in enumerate(lens):
            if n:
                k, v = keys_and_values(n, heads, page)
                ref.write(
                    batch.pages,
                    k,
                    v * values,
                    batch.slots(b, 0, n),
                    torch.tensor([0, n]),
                    torch.tensor([n]),
                    batch.block_table[b : b + 1],
                    page,
                )
        return batch

    def slots(self, b: int, start: int, stop: int) -> Tensor:
        """int64: where tokens start..stop-1 of sequence b are stored."""
        position = torch.arange(start, stop)
        size = self.page.page_size
        return self.block_table[b, position // size].to(torch.int64) * size + position % size


def starts(counts: list[int]) -> Tensor:
    """query_start_loc."""
    return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)


def rel(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|."""
    got, want = got.cpu().double(), want.cpu().double()
    return float((got - want).norm() / want.norm())
