"""The Triton kernels against the references."""

import math

import pytest
import torch
from sequences import Batch, keys_and_values, rel, starts
from triton.runtime import interpreter

from qplugins.kernels.attention import decode as decode_kernel
from qplugins.kernels.attention import merge as merge_kernel
from qplugins.kernels.attention import prefill as prefill_kernel
from qplugins.kernels.attention import ref as attention
from qplugins.kernels.attention.decode import LOG2E
from qplugins.kernels.common.device import INTERPRET
from qplugins.kernels.kv import gather as gather_kernel
from qplugins.kernels.kv import ref
from qplugins.kernels.kv import write as write_kernel
from qplugins.kernels.kv.page import Page
from qplugins.kernels.kv.rotation import rotate
from qplugins.kv import get_layout

# float32 queries keep what is compared to the kernel's own rounding, that of p * v_scale to bfloat16: off by up to 2 ** -9, and where one token
# has most of the weight nothing averages that. Twice as much, because what is summed may cancel
TOLERANCE = 2.0**-8
# where float32 sums in two orders round a query to different sides of a float16, a score moves by that last bit, below 2 ** -11, times a key's
# value, here below 60 and seldom above 10; of several such with either sign one is left
LSE = 0.02


def as_rounded(q: torch.Tensor, page: Page, scale: float) -> torch.Tensor:
    """The queries that a kernel computes with: float16 once they are rotated and scaled. A logit of 30 moves by up to 0.03 for that, which is the
    format's doing; the reference gets these."""
    turn = rotate if page.rotate else torch.clone
    factor = scale * LOG2E
    return turn((turn(q.float()) * factor).half().float() / factor)


def page_of(layout: str, head_dim: int, page_size: int = 128) -> Page:
    return get_layout(layout).page(head_dim, page_size)


def run_decode(batch, queries, group, device, *, window=0, soft_cap=0.0, sink=False, dtype=torch.float32, launch=None):
    page, lens = batch.page, batch.lens
    heads, tokens, spare = batch.pages.shape[1], sum(queries), 2
    q = torch.randn(tokens + spare, heads * group, page.head_dim).to(dtype)
    cu, seq_lens = starts(queries), torch.tensor(lens, dtype=torch.int32)
    logits = torch.randn(heads * group) if sink else None
    scale = page.head_dim**-0.5
    out = torch.full((tokens + spare, heads * group, page.v_head_dim), torch.nan, dtype=dtype, device=device)
    lse = torch.full(out.shape[:2], torch.nan, device=device)
    n = decode_kernel.workspace_bytes(len(lens), heads * group, heads, page, max(queries), device) if launch is None else 1 << 22
    workspace = torch.zeros(n, dtype=torch.uint8, device=device)
    args = [x.to(device) for x in (q, batch.pages, batch.block_table, seq_lens, cu)]
    for _ in range(2):  # a second time on the workspace as the first left it
        decode_kernel.decode(
            *args,
            workspace,
            out,
            lse,
            page,
            max(queries),
            max(lens),
            scale,
            window,
            soft_cap,
            None if logits is None else logits.to(device),
            launch,
        )
        if INTERPRET.value:
            break
    want, want_lse = attention.decode(
        as_rounded(q, page, scale), batch.pages, batch.block_table, seq_lens, cu, page, scale, window, soft_cap, logits
    )
    out, lse = out.cpu(), lse.cpu()
    assert out[tokens:].isnan().all() and lse[tokens:].isnan().all(), "written past the last token"
    seen = want_lse[:tokens].isfinite()
    assert not out[:tokens][~seen].any() and (lse[:tokens][~seen] == -math.inf).all()
    assert rel(out[:tokens], want[:tokens]) < max(TOLERANCE, torch.finfo(dtype).eps)
    assert (lse[:tokens] - want_lse[:tokens])[seen].abs().max() < LSE


HEADS = [("int4_sink", d) for d in (64, 80, 96, 128, 192, 256)] + [
    (name, d) for name in ("k5v4_sink", "k8v4_sink", "int8_sink") for d in (64, 96, 128)
]


@pytest.mark.parametrize("page_size", [64, 128])
@pytest.mark.parametrize(("layout", "head_dim"), HEADS + [("k5v4_sink", 80), ("k5v4_sink", 256), ("k8v4_sink", 80)])
def test_decode_of_every_page(layout, head_dim, page_size, device):
    run_decode(Batch.filled(page_of(layout, head_dim, page_size), [page_size + 3], 1), [1], 2, device)


@pytest.mark.parametrize("group", [1, 3, 8, 33])
def test_decode_of_any_group(group, device):
    run_decode(Batch.filled(page_of("int4_sink", 64), [131], 1), [1], group, device)


@pytest.mark.parametrize("tokens", [1, 2, 5, 63, 64, 127, 128, 129])
def test_decode_of_any_tail(tokens, device):
    run_decode(Batch.filled(page_of("int4_sink", 64), [tokens], 1), [1], 4, device)


@pytest.mark.parametrize("layout", ["int4_sink", "k8v4_sink", "int8_sink"])
@pytest.mark.parametrize("values", [1e-4, 1e4])  # as far as float16 scales go
def test_decode_of_values_of_any_size(layout, values, device):
    run_decode(Batch.filled(page_of(layout, 64), [700, 3], 1, values), [1, 1], 4, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_decode_of_a_ragged_batch_with_padding(dtype, device):
    run_decode(Batch.filled(page_of("int4_sink", 64), [700, 1, 0, 130, 64], 2), [1, 1, 1, 1, 0], 4, device, dtype=dtype)


@pytest.mark.parametrize(
    ("programs", "tokens", "pages"), [(7, 32, 1), (2, 16, 1), (1, 64, 1), (1, 128, 1), (7, 64, 3), (7, 64, 100)], ids=lambda n: str(n)
)
def test_decode_shared_out_in_any_way(programs, tokens, pages, device):
    launch = decode_kernel.Launch(programs, 2, None, tokens, pages=pages)
    run_decode(Batch.filled(page_of("int4_sink", 64), [520, 3, 250], 1), [1, 1, 1], 4, device, launch=launch)


@pytest.mark.parametrize("pages", [[5, 5], [9, 1], [5, 4, 5], [7, 3, 2], [3, 3, 3, 3, 3], [30, 13, 0], [13, 13, 13], [9]], ids=str)
def test_decode_shares_cross_into_no_other_sequence_where_that_is_cheap(pages, device, monkeypatch):
    monkeypatch.setattr(decode_kernel, "_multiprocessors", lambda device: 3)
    shares, heads = 4, 3
    batch = Batch.filled(page_of("int4_sink", 64, 64), [max(64 * n - 1, 0) for n in pages], heads)
    q, cu, lens = torch.randn(len(pages), heads, 64), starts([int(n > 0) for n in pages]), torch.tensor(batch.lens, dtype=torch.int32)
    out = torch.zeros(len(pages), heads, 64, device=device)
    args = [x.to(device) for x in (q, batch.pages, batch.block_table, lens, cu)]
    workspace = torch.zeros(1 << 20, dtype=torch.uint8, device=device)
    launch = decode_kernel.Launch(4, 2, None, 64, pages=1)
    decode_kernel.decode(*args, workspace, out, None, batch.page, 1, max(batch.lens), 0.125, launch=launch)
    want, _ = attention.decode(as_rounded(q, batch.page, 0.125), batch.pages, batch.block_table, lens, cu, batch.page, 0.125)
    assert rel(out, want) < TOLERANCE

    even = -(-sum(pages) // shares)
    chunk = next((c for c in range(even, even + 3) if sum(-(-n // c) for n in pages) <= shares), None)
    if chunk and len(pages) <= shares:
        pages = [-(-n // chunk) * chunk for n in pages]
    else:
        chunk = even
    left, at = set(), 0  # slots
    for n in pages:
        first, last = at // chunk, (at + n - 1) // chunk
        left |= {2 * first + 1, *(2 * i for i in range(first + 1, last + 1))} if last > first else set()
        at += n
    sums, ends = decode_kernel._sizes(shares, decode_kernel.MIN_ROWS, heads, batch.page)
    tops = workspace[4 * (decode_kernel.COUNTERS + sums) :][: 4 * ends].view(torch.float32).view(heads, 2 * shares, 2, -1)[:, :, 0, 0]
    assert [top.nonzero().flatten().tolist() for top in tops] == [sorted(left)] * heads


def test_decode_gives_a_program_the_least_pages(device):
    # 5 and 2 pages: with five to a program neither sequence is shared out
    batch = Batch.filled(page_of("int4_sink", 64, 64), [300, 70], 1)
    args = [x.to(device) for x in (torch.randn(2, 2, 64), batch.pages, batch.block_table, torch.tensor([300, 70]).int(), starts([1, 1]))]
    for pages, shared in ((5, False), (4, True)):
        workspace, out = torch.zeros(1 << 20, dtype=torch.uint8, device=device), torch.empty(2, 2, 64, device=device)
        launch = decode_kernel.Launch(7, 2, None, 64, pages=pages)
        decode_kernel.decode(*args, workspace, out, None, batch.page, 1, 300, 0.125, launch=launch)
        assert bool(workspace.any()) == shared, "what programs leave of a sequence"


# 19, 1 and 5 parts: up to five levels, groups that are not full, groups of one, and fewer parts than a group
MANY_PARTS = [1153, 40, 260]


@pytest.mark.parametrize("heads", [4, 8])  # half of a program's rows, and all
@pytest.mark.parametrize(("fan", "at_once"), [(2, 1), (8, 2), (4, 4), (16, 8), (64, 2)])
def test_decode_joins_parts_in_any_way(fan, at_once, heads, device):
    launch = decode_kernel.Launch(11, 2, None, 64, pages=1, fan=fan, round=at_once, halve=True)
    run_decode(Batch.filled(page_of("int4_sink", 64, 64), MANY_PARTS, 1), [1, 1, 1], heads, device, launch=launch)


@pytest.mark.parametrize("fan", [2, 4])
def test_decode_does_not_depend_on_who_comes_last(fan, device, monkeypatch):
    batch = Batch.filled(page_of("int4_sink", 64, 64), [700, 40, 260], 1)
    lens = torch.tensor(batch.lens, dtype=torch.int32)
    q, launch = torch.randn(3, 4, 64), decode_kernel.Launch(7, 2, None, 64, pages=1, fan=fan, round=2)
    args = [x.to(device) for x in (q, batch.pages, batch.block_table, lens, starts([1, 1, 1]))]
    workspace = torch.zeros(1 << 22, dtype=torch.uint8, device=device)
    found = []
    for order in (lambda z, n: z, lambda z, n: n - 1 - z, lambda z, n: z * 8 % n):
        with monkeypatch.context() as patch:
            if INTERPRET.value:  # one program after the other: shares in this order
                builder = interpreter.interpreter_builder
                at = builder.set_grid_idx
                patch.setattr(builder, "set_grid_idx", lambda x, y, z, at=at, o=order, b=builder: at(x, y, o(z, b.grid_dim[2])))
            out = torch.full((3, 4, 64), torch.nan, device=device)
            decode_kernel.decode(*args, workspace, out, None, batch.page, 1, max(batch.lens), 0.125, launch=launch)
        assert not workspace[: 4 * decode_kernel.COUNTERS].any()
        found.append(out)
    assert found[0].equal(found[1]) and found[0].equal(found[2])
    want, _ = attention.decode(as_rounded(q, batch.page, 0.125), batch.pages, batch.block_table, lens, args[4].cpu(), batch.page, 0.125)
    assert rel(found[0], want) < TOLERANCE


@pytest.mark.parametrize(
    ("layout", "window", "soft_cap", "sink"), [("int4_sink", 70, 0.0, False), ("k5v4_sink", 0, 5.0, False), ("int8_sink", 3, 0.0, True)]
)
def test_decode_of_several_queries(layout, window, soft_cap, sink, device):
    run_decode(Batch.filled(page_of(layout, 64), [270, 40, 8], 1), [8, 1, 8], 3, device, window=window, soft_cap=soft_cap, sink=sink)


def test_decode_leaves_pages_before_the_window_alone(device):
    batch = Batch.filled(page_of("int4_sink", 64, 64), [300], 1)
    batch.block_table[0, :3] = 1 << 20  # freed: reading one would fail, or be far out
    page = batch.page
    q, cu, lens = torch.randn(1, 2, 64), starts([1]), torch.tensor([300], dtype=torch.int32)
    out = torch.full((1, 2, 64), torch.nan, device=device)
    workspace = torch.zeros(decode_kernel.workspace_bytes(3, 2, 1, page, 1, device), dtype=torch.uint8, device=device)
    args = [x.to(device) for x in (q, batch.pages, batch.block_table, lens, cu)]
    decode_kernel.decode(*args, workspace, out, None, page, 1, 300, 0.125, window=100)
    want, _ = attention.decode(as_rounded(q, page, 0.125), batch.pages, batch.block_table, lens, cu, page, 0.125, window=100)
    assert rel(out, want) < TOLERANCE


@pytest.mark.parametrize(
    "page",
    ["k4v4,d64,p64,s0", "k4v4,d64,p64,s1", "k4v4,d64,p64,s16", "k4v4,d64,p64,s4,nomean", "k4v4,d64,p64,s4,norot", "k4v4,d64/128,p64,s4"],
)
def test_decode_of_ablations_and_two_head_dims(page, device):
    run_decode(Batch.filled(Page.parse(page), [70], 1), [1], 2, device)


def test_decode_says_when_the_workspace_is_too_small(device):
    batch = Batch.filled(page_of("int4_sink", 64), [20], 1)
    args = [
        x.to(device) for x in (torch.randn(1, 1, 64), batch.pages, batch.block_table, torch.tensor([20], dtype=torch.int32), starts([1]))
    ]
    with pytest.raises(ValueError, match="decode_workspace"):
        decode_kernel.decode(
            *args, torch.zeros(16, dtype=torch.uint8, device=device), torch.empty(1, 1, 64, device=device), None, batch.page, 1, 20, 1.0
        )


def test_one_workspace_serves_batches_of_any_size_and_layout(device):
    # what a small batch leaves must not stand where a large one counts
    pages = page_of("int4_sink", 64, 64), page_of("int8_sink", 64, 64)
    workspace = torch.zeros(
        max(decode_kernel.workspace_bytes(3, 2, 1, page, 1, device) for page in pages), dtype=torch.uint8, device=device
    )
    for page, lens in ((pages[0], [400]), (pages[1], [70, 300, 200]), (pages[0], [300, 90])):
        batch = Batch.filled(page, lens, 1)
        q, cu, seq_lens = torch.randn(len(lens), 2, 64), starts([1] * len(lens)), torch.tensor(lens, dtype=torch.int32)
        out = torch.full((len(lens), 2, 64), torch.nan, device=device)
        args = [x.to(device) for x in (q, batch.pages, batch.block_table, seq_lens, cu)]
        decode_kernel.decode(*args, workspace, out, None, page, 1, max(lens), 0.125, launch=decode_kernel.Launch(2, 2, None, 64))
        want, _ = attention.decode(as_rounded(q, page, 0.125), batch.pages, batch.block_table, seq_lens, cu, page, 0.125)
        assert rel(out, want) < TOLERANCE
        assert not workspace[: 4 * decode_kernel.COUNTERS].any()


def run_write(page: Page, steps: list[list[int]], device, *, heads=2, dtype=torch.float32, drop=(), means=False):
    """Batches of new tokens, one after the other, by kernel and reference; what they leave has to be the same page. Tokens `drop` of each batch
    are not stored; `means`: pages have one from before."""
    lens = [sum(step[b] for step in steps) for b in range(len(steps[0]))]
    batch = Batch.empty(page, lens, heads)
    batch.block_table[batch.block_table == 1 << 20] = 0
    if means:
        at = page.offsets["mean_k"]
        batch.pages[..., at : at + 2 * page.head_dim].view(torch.float16).normal_()
    got, want = batch.pages.to(device), batch.pages.clone()
    at = [0] * len(lens)
    for step in steps:
        k, v = (x.to(dtype) for x in keys_and_values(sum(step) + 3, heads, page))
        slots = torch.cat([batch.slots(b, at[b], at[b] + n) for b, n in enumerate(step)] + [torch.full((3,), -1)])
        slots[[i for i in drop if i < len(slots)]] = -1
        at = [a + n for a, n in zip(at, step, strict=True)]
        meta = slots, starts(step), torch.tensor(at, dtype=torch.int32), batch.block_table
        ref.write(want, k, v, *meta, page)
        write_kernel.write(got, k.to(device), v.to(device), *(x.to(device) for x in meta), page, max(step))
    got = got.cpu()
    unused = torch.ones(len(got), dtype=torch.bool)
    unused[batch.used] = False
    assert got[unused].equal(want[unused]), "written to another sequence's page"
    # A sum in another order moves some values over the edge between two codes, or a scale or mean to the next float16
    assert (got != want).float().mean() < 2e-3
    both = [ref.read(x[batch.used], page) for x in (got, want)]
    for a, b in zip(*both, strict=True):
        assert a.isnan().equal(b.isnan()), "other tokens are stored"
        step = {4: 1 / 15, 5: 1 / 31, 8: 1 / 255}[min(page.k_bits, page.v_bits)]
        a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
        off = (a - b).abs() > 1e-3 * b.abs().max()
        assert off.float().mean() < 5e-3 and (a - b).abs().max() <= 1.5 * step * (b.amax() - b.amin())


@pytest.mark.parametrize(
    ("layout", "head_dim", "page_size"),
    [(*case, 64) for case in [*HEADS, ("k5v4_sink", 80), ("k5v4_sink", 192), ("k8v4_sink", 80)]]
    + [("int4_sink", 128, 128), ("k5v4_sink", 64, 128), ("int4_sink", 96, 128), ("k8v4_sink", 80, 128), ("int8_sink", 256, 64)],
)
def test_write_of_every_page(layout, head_dim, page_size, device):
    run_write(page_of(layout, head_dim, page_size), [[page_size + 9, 3], [1, 18]], device, heads=1)


def test_write_of_prompts_and_decode_steps_mixed(device):
    page = page_of("int4_sink", 64, 64)
    run_write(page, [[140, 3, 20, 60], [1, 1, 0, 4], [1, 130, 70, 1], [8, 1, 2, 1], [1, 0, 40, 15]], device)


@pytest.mark.parametrize("layout", ["int4_sink", "k5v4_sink"])
@pytest.mark.parametrize("new", [1, 3, 15])
def test_write_of_decode_steps_that_some_sequences_sit_out(new, layout, device):
    # the kernel reads tokens from where they lie if all have as many; here all do, then those behind the second lie elsewhere, then the last do
    n = new
    run_write(page_of(layout, 128, 64), [[60, 64, 1, 130], [n, n, n, n], [n, 0, n, n], [n, n, n, 0]], device)


@pytest.mark.parametrize("heads", [1, 3, 8, 20])
def test_write_of_any_number_of_heads(heads, device):
    run_write(page_of("int4_sink", 64, 64), [[63], [3], [1]], device, heads=heads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_write_of_16_bit_inputs(dtype, device):
    run_write(page_of("k5v4_sink", 128), [[150, 20], [1, 1]], device, dtype=dtype)


def test_write_skips_slots_of_minus_one(device):
    run_write(page_of("int4_sink", 64, 64), [[100, 20], [4, 4]], device, drop=(1, 2, 3))


@pytest.mark.parametrize("layout", ["int4_sink", "k5v4_sink", "int8_sink"])
@pytest.mark.parametrize("begin", [0, 1, 60], ids=lambda n: f"from {n}")
def test_write_of_pages_that_are_whole_or_lack_a_token(layout, begin, device):
    # of four pages some are stored whole, one lacks a token in the middle, and at the ends there are parts
    run_write(page_of(layout, 64, 64), [[begin], [250 - begin]], device, drop=[150])


@pytest.mark.parametrize(
    ("tokens", "drop"),
    [
        pytest.param(150, range(64, 128), id="nothing of a page is stored"),
        pytest.param(133, range(64, 128), id="nothing of the page before is stored"),
        pytest.param(133, [64], id="the page before is not opened, but has tokens enough"),
        pytest.param(150, [64], id="a page without its first token is not opened"),
        pytest.param(128, range(66, 128), id="two tokens and a page before that is opened too"),
        pytest.param(128, [0, *range(66, 128)], id="two tokens and a page before that is not"),
    ],
)
def test_write_finds_the_mean_where_tokens_are_not_stored(tokens, drop, device):
    run_write(page_of("int4_sink", 64, 64), [[tokens]], device, drop=list(drop), means=True)


@pytest.mark.parametrize(
    "page",
    ["k4v4,d64,p64,s0", "k8v4,d64,p64,s1", "k4v4,d64,p64,s16", "k4v4,d64,p64,s4,nomean", "k4v4,d64,p64,s4,norot", "k4v4,d64/128,p64,s4"],
)
def test_write_of_ablations_and_two_head_dims(page, device):
    run_write(Page.parse(page), [[70, 2], [1, 1]], device)


@pytest.mark.parametrize(("layout", "head_dim"), HEADS)
def test_gather_of_every_page(layout, head_dim, device):
    batch = Batch.filled(page_of(layout, head_dim), [150, 0, 20], 1)
    begin, cu = torch.tensor([2, 0, 7], dtype=torch.int32), starts([140, 0, 13])
    k, v = gather_kernel.gather(*(x.to(device) for x in (batch.pages, batch.block_table, begin, cu)), 153, batch.page, torch.float32)
    want_k, want_v = ref.gather(batch.pages, batch.block_table, begin, cu, 153, batch.page, torch.float32)
    assert rel(k, want_k) < 1e-5 and rel(v, want_v) < 1e-5


@pytest.mark.parametrize(
    ("layout", "head_dim", "window", "soft_cap", "sink"),
    [
        ("int4_sink", 128, 0, 0.0, False),
        ("k5v4_sink", 64, 0, 5.0, False),
        ("k8v4_sink", 96, 0, 0.0, True),
        ("int8_sink", 64, 60, 0.0, False),
        ("int4_sink", 80, 9, 0.0, True),
    ],
)
def test_prefill_over_cached_pages(layout, head_dim, window, soft_cap, sink, device):
    batch = Batch.filled(page_of(layout, head_dim), [150, 0, 20], 1)
    page, queries, heads = batch.page, [30, 2, 1], 3
    q, logits = torch.randn(33, heads, head_dim), torch.randn(heads) if sink else None
    context, cu = torch.tensor(batch.lens, dtype=torch.int32), starts(queries)
    rest = head_dim**-0.5, window, soft_cap
    args = [x.to(device) for x in (q, batch.pages, batch.block_table, context, cu)]
    out, lse = prefill_kernel.prefill(*args, page, *rest, None if logits is None else logits.to(device), max_query_len=30)
    want, want_lse = attention.prefill(as_rounded(q, page, rest[0]), batch.pages, batch.block_table, context, cu, page, *rest, logits)
    seen = want_lse.isfinite()
    assert lse.cpu().isfinite().equal(seen) and not out.cpu()[~seen].any()
    assert rel(out, want) < TOLERANCE and (lse.cpu() - want_lse)[seen].abs().max() < LSE


def test_merge(device):
    a, b = torch.randn(50, 6, 80).to(device), torch.randn(50, 6, 80).to(device)
    la, lb = 3 * torch.randn(50, 6), 3 * torch.randn(6, 50).T
    la[3], la[4], lb[4] = -math.inf, -math.inf, -math.inf
    a[3] = math.nan  # what saw nothing may hold anything
    out, lse = merge_kernel.merge(a, la.to(device), b, lb.to(device))
    a[3] = 0
    want, want_lse = attention.merge(a.cpu(), la, b.cpu(), lb)
    assert rel(out, want) < 1e-5 and (lse.cpu()[4] == -math.inf).all() and torch.allclose(lse.cpu(), want_lse, atol=1e-5)


@pytest.mark.gpu
def test_a_cuda_graph_serves_shorter_batches(device):
    page = page_of("int4_sink", 128)
    batch = Batch.filled(page, [900, 300, 500], 2)
    pages, table = batch.pages.to(device), batch.block_table.to(device)
    q, cu, lens = (
        torch.randn(3, 8, 128, device=device, dtype=torch.bfloat16),
        starts([1, 1, 1]).to(device),
        torch.tensor([900, 300, 500], dtype=torch.int32, device=device),
    )
    out = torch.empty(3, 8, 128, device=device, dtype=torch.bfloat16)
    workspace = torch.zeros(decode_kernel.workspace_bytes(3, 8, 2, page, 1, device), dtype=torch.uint8, device=device)

    def call():
        decode_kernel.decode(q, pages, table, lens, cu, workspace, out, None, page, 1, 4096, 128**-0.5)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for now in ([900, 300, 500], [257, 1, 0], [128, 0, 129], [900, 300, 500]):
        lens.copy_(torch.tensor(now, dtype=torch.int32))
        out.fill_(torch.nan)
        graph.replay()
        want, _ = attention.decode(
            as_rounded(q.cpu(), page, 128**-0.5), batch.pages, batch.block_table, torch.tensor(now), cu.cpu(), page, 128**-0.5
        )
        assert rel(out, want) < torch.finfo(torch.bfloat16).eps
