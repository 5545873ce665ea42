"""What an INT4 KV cache gives SGLang: how many tokens fit, and how long an output token takes at 16 x 8192 and 8 x 32768 tokens.

    source bench/checkout.sh && python bench/engine_sglang.py [--out FILE] [--only int4_sink ...]

The model has the shape of an 8B one in half of its layers (16, hidden 4096, 32 heads, 8 KV heads of 128) and random weights, so that
nothing has to be downloaded; its text means nothing. One server for each KV dtype, otherwise as SGLang runs by itself. A request's prompt
is sent once to fill the cache, then again for 1 and for 1 + N output tokens: the difference, over N, is the time of an output token.

--together starts all servers at the same time, where they fit the GPU side by side, each with room for the largest shape's tokens, and measures
one after the other while the rest are idle.
"""

import argparse
import json
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import requests  # noqa: E402
import torch  # noqa: E402

from bench.common import versions  # noqa: E402
from integration_tests.engine_sglang.server import SglangServer  # noqa: E402
from integration_tests.models import smollm2  # noqa: E402
from integration_tests.server import start_together  # noqa: E402

SHAPES = ((16, 8192), (8, 32768))
OUTPUT_TOKENS = 128
VOCABULARY = 49152


def model(folder: Path) -> Path:
    """Config and tokenizer; SGLang makes the weights."""
    source = smollm2()
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    config |= dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8)
    config |= dict(head_dim=128, max_position_embeddings=40960, tie_word_embeddings=False, torch_dtype="bfloat16", dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(config))
    for file in source.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def tokens_that_fit(server: SglangServer) -> int:
    """Of its log, since what tells it over HTTP has another name in every version."""
    return int(re.search(r"max_total_num_tokens=(\d+)", server.log)[1])


def tokens_per_gib(server: SglangServer) -> int:
    """Of the KV cache's memory, by what the log says of it."""
    tokens, sizes = re.search(r"KV Cache is allocated.*#tokens: (\d+), (.*)", server.log).groups()
    return round(int(tokens) / sum(map(float, re.findall(r"size: ([\d.]+) GB", sizes))))


def measure(server: SglangServer, about: dict) -> dict:
    row = about | dict(tokens=tokens_that_fit(server), tokens_per_gib=tokens_per_gib(server))
    for batch, length in SHAPES:
        times = output_token_ms(server, batch, length)
        row[f"{batch}x{length}_token_ms"] = round(statistics.median(times), 3)
        row[f"{batch}x{length}_token_ms_all"] = [round(t, 3) for t in times]
    return row


def output_token_ms(server: SglangServer, batch: int, length: int, repeats: int = 3) -> list[float]:
    rng = random.Random(0)
    prompts = [[rng.randrange(1000, VOCABULARY) for _ in range(length)] for _ in range(batch)]

    def seconds(new_tokens: int) -> float:
        body = {"input_ids": prompts, "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}}
        start = time.perf_counter()
        reply = requests.post(f"{server.url}/generate", json=body, timeout=500)
        reply.raise_for_status()
        return time.perf_counter() - start

    seconds(1)
    seconds(1 + OUTPUT_TOKENS)
    return [1000 * (seconds(1 + OUTPUT_TOKENS) - seconds(1)) / OUTPUT_TOKENS for _ in range(repeats)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", default=["auto", "fp8_e4m3", "int4_sink"])
    parser.add_argument("--attention-backend", help="for SGLang's own KV dtypes, where its first choice is not installed")
    parser.add_argument("--together", action="store_true", help="start all servers at once, and measure one after the other")
    parser.add_argument("--server-args", default="", help="further arguments of launch_server, in one string")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        folder = model(Path(work) / "model")
        most = max(batch * (length + OUTPUT_TOKENS + 256) for batch, length in SHAPES) if options.together else None
        servers, about = [], []
        for dtype in options.only:
            own = ["--attention-backend", options.attention_backend] if options.attention_backend and dtype in ("auto", "fp8_e4m3") else []
            args = ["--load-format", "dummy", *own, *options.server_args.split()]
            server = SglangServer(
                folder,
                kv_cache_dtype=dtype,
                dtype="bfloat16",
                context_length=40960,
                max_total_tokens=most,
                max_running=32,
                args=args,
                timeout=500,
            )
            servers.append(server)
            about.append(dict(kv=dtype, attention=own[1] if own else "by itself"))
        for row, context in zip(about, start_together(stack, servers) if options.together else servers, strict=True):
            with context as server:
                rows.append(measure(server, row))
            print(json.dumps(rows[-1]), flush=True)
    if options.out:
        head = {"device": torch.cuda.get_device_name()} | versions("sglang")
        options.out.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
