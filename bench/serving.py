"""One figure that a user would quote: `vllm bench serve` against servers that differ in their KV cache alone, each with 8 GiB for it.

    source bench/checkout.sh && python bench/serving.py [--out FILE] [--kv auto fp8 int4_sink] [--weights bf16 qplugins-nvfp4]

8,192 tokens in and 256 out, random, as many requests at once as the cache holds and --waves times as many in all: requests a second, and the
median and 99th percentile of the time to the first token and between tokens. The model is that of engine_vllm.py, 16 layers of Llama 3 8B's
shape with random weights, and a vocabulary as large as that of the tokenizer at hand.

--together starts all servers at the same time, where they fit the GPU side by side, and measures one after the other while the rest are idle.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from bench.common import table, versions  # noqa: E402
from bench.engine_vllm import LLAMA  # noqa: E402
from integration_tests.models import smollm2  # noqa: E402
from integration_tests.server import NAME, ServerFailed, VllmServer, start_together  # noqa: E402

FIGURES = {
    "req_s": "request_throughput",
    "ttft_p50": "median_ttft_ms",
    "ttft_p99": "p99_ttft_ms",
    "itl_p50": "median_itl_ms",
    "itl_p99": "p99_itl_ms",
}


def model(folder: Path, **shape: int) -> Path:
    """A config, and SmolLM2's tokenizer; vLLM makes the weights."""
    tokenizer = smollm2()
    for file in tokenizer.glob("*token*"):
        (folder / file.name).symlink_to(file)
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    (folder / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": vocabulary} | shape))
    return folder


def load(server: VllmServer, tokenizer: Path, concurrency: int, options: argparse.Namespace, result: Path) -> dict:
    """`vllm bench serve` of options.waves * concurrency requests, after a first one."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--base-url", server.url, "--model", NAME]
    command += ["--tokenizer", str(tokenizer), "--dataset-name", "random", "--ignore-eos", "--num-warmups", "1", "--disable-tqdm"]
    command += ["--random-input-len", str(options.tokens_in), "--random-output-len", str(options.tokens_out)]
    command += ["--max-concurrency", str(concurrency), "--num-prompts", str(options.waves * concurrency)]
    command += ["--percentile-metrics", "ttft,itl", "--metric-percentiles", "50,99"]
    command += ["--save-result", "--result-dir", str(result.parent), "--result-filename", result.name]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    if run.returncode:
        raise RuntimeError(f"vllm bench serve: {run.stderr[-500:]}")
    return json.loads(result.read_text())


def server_of(kv: str, weights: str, options: argparse.Namespace, folder: Path) -> VllmServer:
    args = ["--load-format", "dummy", "--kv-cache-dtype", kv, "--max-num-seqs", "256", *options.engine_args]
    return VllmServer(
        model(folder, **options.shape),
        quantization=None if weights == "bf16" else weights,
        dtype=options.dtype,
        max_model_len=options.tokens_in + options.tokens_out + 128,
        compiled=not options.eager,
        kv_bytes=options.kv_bytes,
        args=args,
        timeout=400,
    )


def measure(server: VllmServer, options: argparse.Namespace, folder: Path) -> dict:
    """What a row says of a server that runs."""
    tokens = server.kv_tokens
    concurrency = min(256, tokens // (options.tokens_in + options.tokens_out))
    found = load(server, folder, concurrency, options, folder / "result.json")
    figures = {name: round(found[key], 3) for name, key in FIGURES.items()}
    return {"tokens": tokens, "concurrency": concurrency, **figures, "failed": found.get("failed", 0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", nargs="+", default=["auto", "fp8", "int4_sink"])
    parser.add_argument("--weights", nargs="+", default=["bf16"], help="bf16, or a --quantization of ours such as qplugins-nvfp4")
    parser.add_argument("--kv-bytes", type=int, default=8 << 30)
    parser.add_argument("--tokens-in", type=int, default=8192)
    parser.add_argument("--tokens-out", type=int, default=256)
    parser.add_argument("--waves", type=int, default=4, help="times as many requests in all as at once")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--together", action="store_true", help="start all servers at once, and measure one after the other")
    parser.add_argument("--shape", type=json.loads, default={}, help="entries of the model's config to replace, JSON")
    parser.add_argument("--engine-args", nargs="*", default=[], help="further arguments of vllm serve")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "serving.json")
    options = parser.parse_args()
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    about = {"device": device} | versions("vllm")
    about |= {"tokens_in": options.tokens_in, "tokens_out": options.tokens_out, "kv_bytes": options.kv_bytes}
    rows = []
    with ExitStack() as stack:
        configurations = [
            ({"kv": kv, "weights": weights}, stack.enter_context(tempfile.TemporaryDirectory()))
            for weights in options.weights
            for kv in options.kv
        ]
        servers = [server_of(row["kv"], row["weights"], options, Path(folder)) for row, folder in configurations]
        contexts = start_together(stack, servers) if options.together else servers
        for (row, folder), context in zip(configurations, contexts, strict=True):
            try:
                with context as server:
                    row |= measure(server, options, Path(folder))
            except (ServerFailed, RuntimeError, subprocess.TimeoutExpired) as e:
                row["note"] = str(e)[-400:]
            rows.append(row)
            print(json.dumps(row), flush=True)
            # after each, so that what was measured is there when a later one takes the machine down
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    columns = ["kv", "weights", "tokens", "concurrency", *FIGURES]
    print(table(columns, ([row.get(c, "") for c in columns] for row in rows)))


if __name__ == "__main__":
    main()
