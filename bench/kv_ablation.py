"""What each part of the KV pages brings: sink rows, the page mean, the rotation, keys in more bits; beside FP8 and vLLM's int4_per_token_head.

    python bench/kv_ablation.py [--model FOLDER] [--windows N] [--text prose=FILE code=FILE] [--out FILE]

A transformers model in float32. In every layer keys and values go through a cache and come back before attention reads them, those of the page's
own tokens too, so that nothing but the cache differs; pages by the product's own definition (kernels/kv/ref.py). Windows of 2,048 tokens,
teacher-forced; KL of the next token's distribution, all of the vocabulary, against the same model with its keys and values as they are.

Texts, unless given: running paragraphs of Python's language reference (`pydoc_data.topics`), and the source of `argparse`.
"""

import argparse
import hashlib
import inspect
import json
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from bench.common import commit  # noqa: E402
from qplugins.checkpoints.quality import next_token_logprobs  # noqa: E402
from qplugins.kernels.kv import ref  # noqa: E402
from qplugins.kernels.kv.rotation import rotate  # noqa: E402
from qplugins.kv import KV_LAYOUTS, Layout  # noqa: E402

WINDOW, PAGE = 2048, 128
CACHE = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # k, v float32 [tokens, heads, D] -> what a cache makes of them


def pages(layout: Layout, page_size: int = PAGE) -> CACHE:
    """Written page by page, as a prompt is, and read back."""

    def cache(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        n, heads, dim = k.shape
        page = layout.page(dim, page_size)
        count = -(-n // page_size)
        table = torch.arange(count, dtype=torch.int32)[None]
        made = torch.zeros(count, heads, page.nbytes, dtype=torch.uint8)
        ref.write(made, k, v, torch.arange(n), torch.tensor([0, n]), torch.tensor([n]), table, page)
        return ref.gather(made, table, torch.tensor([0]), torch.tensor([0, n]), n, page, torch.float32)

    return cache


def fp8(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """vLLM's fp8: e4m3 without a scale."""
    return k.to(torch.float8_e4m3fn).float(), v.to(torch.float8_e4m3fn).float()


def int4_per_token_head(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """vLLM's int4_per_token_head, written from its definition (0.33): random signs and a Hadamard rotation, then for each token and head

    scale = max(max - min, 15e-6) / 15,  zero point = round(-min / scale) in 0..15,  code = round(x / scale) + zero point in 0..15
    """

    def one(x: Tensor) -> Tensor:
        signs = torch.randint(0, 2, (x.shape[-1],), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        x = rotate(x * signs)
        low, high = x.aminmax(dim=-1, keepdim=True)
        scale = ((high - low) / 15).clamp_min(1e-6)
        zero = (-low / scale).round().clamp(0, 15)
        code = (x / scale + zero).round().clamp(0, 15)
        return rotate((code - zero) * scale) * signs

    return one(k), one(v)


@dataclass(frozen=True)
class Variant:
    name: str
    cache: CACHE
    bits: float  # a value, all-in, at this model's head_dim


def variants(dim: int) -> list[Variant]:
    int4, k5v4 = KV_LAYOUTS["int4_sink"], KV_LAYOUTS["k5v4_sink"]
    mine = {
        "int4_sink": int4,
        "int4_sink, 0 sinks": replace(int4, sinks=0),
        "int4_sink, 1 sink": replace(int4, sinks=1),
        "int4_sink, 16 sinks": replace(int4, sinks=16),
        "int4_sink, no page mean": replace(int4, mean=False),
        "int4_sink, no rotation": replace(int4, rotate=False),
        "int4_sink, no mean, no rotation": replace(int4, mean=False, rotate=False),
        "int4_sink, no mean, 0 sinks": replace(int4, mean=False, sinks=0),
        "k5v4_sink": k5v4,
        "k5v4_sink, no page mean": replace(k5v4, mean=False),
        "k8v4_sink": KV_LAYOUTS["k8v4_sink"],
        "int8_sink": KV_LAYOUTS["int8_sink"],
    }
    found = [Variant("fp8", fp8, 8), Variant("int4_per_token_head", int4_per_token_head, 4 + 32 / dim)]
    found += [Variant(name, pages(x), x.page(dim, PAGE).bits_per_value) for name, x in mine.items()]
    return [*found, Variant("int4_sink, pages of 64", pages(int4, 64), int4.page(dim, 64).bits_per_value)]


# ---- the model and the texts


def load(folder: Path, cache: list[CACHE | None]) -> tuple[torch.nn.Module, Callable[[str], list[int]]]:
    """The model, in float32, whose attention sends keys and values through cache[0]; its tokenizer."""
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

    def attention(module, query, key, value, attention_mask, scaling=None, **_):
        if cache[0] is not None:
            k, v = cache[0](*(x[0].transpose(0, 1).float() for x in (key, value)))
            key, value = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None

    AttentionInterface.register("through_a_cache", attention)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="through_a_cache").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def default_texts() -> dict[str, str]:
    import argparse as code
    from pydoc_data.topics import topics

    paragraphs = dict.fromkeys(" ".join(p.split()) for text in topics.values() for p in re.split(r"\n\s*\n", text) if not p.startswith(" "))
    prose = [p for p in paragraphs if len(p.split()) > 40 and "::=" not in p and ">>>" not in p]
    return {"prose": "\n\n".join(prose), "code": inspect.getsource(code)}


def measure(model: torch.nn.Module, cache: list[CACHE | None], windows: list[list[int]], chosen: list[Variant]) -> list[dict]:
    sums = {v.name: [0.0, 0, 0.0] for v in chosen}
    nll, positions = 0.0, 0
    for window in windows:
        cache[0] = None
        p = next_token_logprobs(model, window)
        right = torch.tensor(window[1:])[:, None]
        nll -= float(p.gather(1, right).sum())
        positions += len(right)
        for v in chosen:
            cache[0] = v.cache
            started = time.monotonic()
            q = next_token_logprobs(model, window)
            of = sums[v.name]
            of[0] += float((p.exp() * (p - q)).sum(dtype=torch.float64))
            of[1] += int((p.argmax(-1) == q.argmax(-1)).sum())
            of[2] -= float(q.gather(1, right).sum())
            print(f"  {v.name:34} {of[0] / positions:.5f}   {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    rows = [{"cache": "unquantized", "bits": 16, "kl": 0.0, "top1": 1.0, "perplexity": math.exp(nll / positions)}]
    for v in chosen:
        kl, same, loss = sums[v.name]
        rows.append(
            {
                "cache": v.name,
                "bits": round(v.bits, 3),
                "kl": kl / positions,
                "top1": same / positions,
                "perplexity": math.exp(loss / positions),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint; SmolLM2-135M-Instruct by default")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--text", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--only", nargs="*", help="caches by name")
    parser.add_argument(
        "--write-texts", type=Path, metavar="FOLDER", help="write prose.txt and code.txt, for `qplugins eval kv --text`, and stop"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "kv_ablation.json")
    args = parser.parse_args()
    if args.write_texts:
        for name, text in default_texts().items():
            (args.write_texts / f"{name}.txt").write_text(text, encoding="utf-8")
        return
    if args.model is None:
        from integration_tests.models import smollm2

        args.model = smollm2()
    texts = {name: Path(file).read_text() for name, file in (t.split("=", 1) for t in args.text)} or default_texts()
    cache: list[CACHE | None] = [None]
    model, tokenize = load(args.model, cache)
    dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    chosen = [v for v in variants(dim) if not args.only or v.name in args.only]
    result = {
        "command": f"python bench/kv_ablation.py --windows {args.windows}",
        "model": args.model.name,
        "head_dim": dim,
        "window": WINDOW,
        "windows": args.windows,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "commit": commit(),
        "texts": {},
    }
    for name, text in texts.items():
        tokens = tokenize(text)[: args.windows * WINDOW]
        if len(tokens) < args.windows * WINDOW:
            raise SystemExit(f"{name}: {len(tokens)} tokens, and {args.windows} windows of {WINDOW} are wanted")
        print(name, file=sys.stderr)
        rows = measure(model, cache, [tokens[i : i + WINDOW] for i in range(0, len(tokens), WINDOW)], chosen)
        result["texts"][name] = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "rows": rows}
        print(f"\n{name}\n{'cache':36}{'bits':>7}{'KL':>10}{'top-1':>9}{'perplexity':>12}")
        for r in rows:
            print(f"{r['cache']:36}{r['bits']:7.2f}{r['kl']:10.5f}{r['top1']:9.2%}{r['perplexity']:12.3f}")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
