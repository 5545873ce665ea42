"""What KV dtypes and weight formats give vLLM: how many tokens fit, how long a prompt takes, how long an output token takes.

    source bench/checkout.sh && python bench/engine_vllm.py [--out FILE] [--kv auto int4_sink ...] [--weights bf16 nvfp4-qplugins ...]

The model has the shape of Llama 3 8B in half of its layers (16) and random weights, so that nothing has to be downloaded; its text means
nothing. NVFP4 weights are a checkpoint of random codes that all kernels read: a GPU that multiplies zeros needs less power, and is the faster for
it. One process for each configuration, otherwise vLLM as it runs by itself: torch.compile and CUDA graphs. Random prompts are sent for one token,
several times other ones: the median is the prompts' time. The last of them are sent again, now from the prefix cache, for 1 + N output tokens. An
output token's time is what the engine says of when a request got its first token and its last, over N: the median over the batch's requests, and of
several repeats. A configuration that fails, or takes longer than --timeout, is a row that says why.

--together starts all configurations at the same time, where they fit the GPU side by side, and measures one after the other while the rest are
idle: starting takes longer than measuring. Each then gets as much memory for its KV cache as the largest shape takes. Several of these commands
start side by side too: with --after FILE each says when it is ready, and measures once FILE is there. --rounds N then measures all of them N times,
forwards and backwards in turn: where CPUs decide, one that is measured at a quiet moment looks faster than it is.

--profile DIR records the output tokens of each shape once more with vLLM's profiler, last of all: SHAPE_gpu_ms is how long the GPU is busy for one,
which no CPU can change. DIR keeps the traces.

weights: bf16; nvfp4, vLLM's own choice of a kernel for a weight-only NVFP4 checkpoint; nvfp4-humming, the kernel by that name; nvfp4-qplugins, ours;
or a --quantization of ours that quantizes while loading, such as qplugins-nvfp4. lm_head has 16 bits in all of them.
"""

import argparse
import gzip
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from bench.common import versions  # noqa: E402

KV = ("auto", "fp8", "int4_per_token_head", "int4_sink")
WEIGHTS = ("bf16", "nvfp4", "nvfp4-humming", "nvfp4-qplugins")
SHAPES = ((16, 8192), (8, 32768))
OUTPUT_TOKENS = 96
REPEATS = 5
MARK, READY, MEASURE, PROFILE = "ROW ", "READY", "measure", "profile"

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 40960,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NVFP4 = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "format": "nvfp4-pack-quantized",
            "weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True, "dynamic": False},
            "input_activations": None,
            "output_activations": None,
        }
    },
    "ignore": ["lm_head"],
}


def write_nvfp4(folder: Path) -> None:
    """A checkpoint: linear layers of random codes, whose values have the spread of a model's weights, and everything else random in 16 bits."""
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, middle, size = LLAMA["hidden_size"], LLAMA["intermediate_size"], LLAMA["head_dim"]
    q, kv = LLAMA["num_attention_heads"] * size, LLAMA["num_key_value_heads"] * size
    matrices = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (middle, hidden),
        "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle),
    }
    index: dict[str, str] = {}

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file({name: t.cpu() for name, t in tensors.items()}, folder / file)
        index.update(dict.fromkeys(tensors, file))

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": NVFP4}))
    for name in ("model.embed_tokens", "lm_head"):
        matrix = 0.02 * torch.randn(LLAMA["vocab_size"], hidden, device=device)
        save(f"{name}.safetensors", {f"{name}.weight": matrix.to(torch.bfloat16)})
    norms = ["model.norm"]
    for i in range(LLAMA["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        norms += [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
        tensors = {}
        for name, (n, k) in matrices.items():
            tensors[f"{layer}.{name}.weight_packed"] = torch.randint(256, (n, k // 2), dtype=torch.uint8, device=device)
            tensors[f"{layer}.{name}.weight_scale"] = (100 + 300 * torch.rand(n, k // 16, device=device)).to(torch.float8_e4m3fn)
            # codes have a mean square of 3.2 ** 2, scales are about 250: so weights have 0.02 ** 2
            tensors[f"{layer}.{name}.weight_global_scale"] = torch.tensor([40000.0])
        save(f"{layer}.safetensors", tensors)
    save("norms.safetensors", {f"{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in norms})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write_models(folder: Path, weights: Iterable[str]) -> None:
    """What `arguments_of` such weights needs."""
    (folder / "plain").mkdir()
    (folder / "plain" / "config.json").write_text(json.dumps(LLAMA))
    if any(w.startswith("nvfp4") for w in weights):
        write_nvfp4(folder / "nvfp4")


def arguments_of(weights: str, folder: Path) -> dict:
    """vLLM's. folder: of `write_models`."""
    if weights.startswith("nvfp4"):
        how = {
            "nvfp4": {},
            "nvfp4-humming": {"kernel_config": {"linear_backend": "humming"}},
            "nvfp4-qplugins": {"quantization": "qplugins"},
        }
        return {"model": str(folder / "nvfp4")} | how[weights]
    return {"model": str(folder / "plain"), "load_format": "dummy"} | ({} if weights == "bf16" else {"quantization": weights})


def kv_bytes(kv_cache_dtype: str, shapes: list[tuple[int, int]]) -> int:
    """Enough for the largest of the shapes, and some pages a sequence more."""
    from qplugins.kv import KV_LAYOUTS

    size = LLAMA["head_dim"]
    others = {"auto": 4 * size, "fp8": 2 * size, "int4_per_token_head": size + 8}
    layout = KV_LAYOUTS.get(kv_cache_dtype)
    token = (
        LLAMA["num_hidden_layers"] * LLAMA["num_key_value_heads"] * (layout.token_bytes(size, size) if layout else others[kv_cache_dtype])
    )
    return int(token * max(batch * (length + 2 * OUTPUT_TOKENS + 256) for batch, length in shapes))


def serve(kv_cache_dtype: str, weights: str, shapes: list[tuple[int, int]], more: dict, together: bool, traces: str, folder: Path) -> None:
    """One configuration in this process, which prints a row for each line of its standard input: MEASURE, or PROFILE, whose traces go to `traces`."""
    import torch
    from vllm import LLM, SamplingParams, __version__

    started = time.perf_counter()
    sizes = sorted({1, *(batch for batch, _ in shapes)})
    options = {
        "max_model_len": max(n for _, n in shapes) + 2 * OUTPUT_TOKENS,
        "max_num_seqs": max(sizes),
        "max_num_batched_tokens": 8192,
        "gpu_memory_utilization": 0.85,
        "compilation_config": {"cudagraph_capture_sizes": sizes},
        "disable_log_stats": False,  # when a request got which token
    }
    if together:
        options |= {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": kv_bytes(kv_cache_dtype, shapes)}
    if traces:
        options["profiler_config"] = {
            "profiler": "torch",
            "torch_profiler_dir": traces,
            "torch_profiler_activities": ["CUDA"],
            "torch_profiler_with_stack": False,
            "torch_profiler_dump_cuda_time_total": False,
        }
    llm = LLM(kv_cache_dtype=kv_cache_dtype, skip_tokenizer_init=True, **options | arguments_of(weights, folder) | more)
    about = {
        "kv": kv_cache_dtype,
        "weights": weights,
        "vllm": __version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }
    cache = llm.llm_engine.vllm_config.cache_config
    about |= {"tokens": cache.kv_cache_size_tokens, "start_s": round(time.perf_counter() - started, 1)}
    if together:
        about["tokens_per_gib"] = round(about["tokens"] * 2**30 / cache.kv_cache_memory_bytes)
    rng = random.Random(0)

    def random_prompts(batch: int, length: int) -> list[list[int]]:
        return [[rng.randrange(1000, 128000) for _ in range(length)] for _ in range(batch)]

    def generate(prompts: list[list[int]], new: int) -> tuple[float, float]:
        """Seconds that it takes, and milliseconds of an output token after the first."""
        ask = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        done = llm.generate([{"prompt_token_ids": p} for p in prompts], ask, use_tqdm=False)
        seconds = time.perf_counter() - start
        stats = [request.metrics for request in done]
        return seconds, 1000 * statistics.median(s.last_token_ts - s.first_token_ts for s in stats) / max(1, new - 1)

    def fits(batch: int, length: int) -> bool:
        return not about["tokens"] or about["tokens"] >= batch * (length + OUTPUT_TOKENS + 1)

    def measure() -> dict:
        row = dict(about)
        for batch, length in shapes:
            name = f"{batch}x{length}"
            if not fits(batch, length):
                row[f"{name}_note"] = f"{batch * length:,} tokens do not fit"
                continue
            prefill = []
            for _ in range(REPEATS):
                prompts = random_prompts(batch, length)
                prefill.append(generate(prompts, 1)[0])
            generate(prompts, 1 + OUTPUT_TOKENS)
            token = [generate(prompts, 1 + OUTPUT_TOKENS)[1] for _ in range(REPEATS)]
            row[f"{name}_prefill_s_all"] = [round(t, 4) for t in prefill]
            row[f"{name}_token_ms_all"] = [round(t, 4) for t in token]
        return row

    def profile() -> dict:
        row = {}
        for batch, length in shapes:
            if not fits(batch, length):
                continue
            prompts, trace = random_prompts(batch, length), f"{weights}-{kv_cache_dtype}-{batch}x{length}"
            generate(prompts, 1)
            llm.start_profile(trace, delay_iterations=8)  # without the prompts, what is left of them
            generate(prompts, 1 + OUTPUT_TOKENS)
            llm.stop_profile()
            file = max(Path(traces).glob(f"{trace}*.json.gz"), key=os.path.getmtime)
            row[f"{batch}x{length}_gpu_ms"] = round(busy_ms(file), 4)
        return row

    # kernels are compiled at their first use
    generate(random_prompts(1, min(9000, options["max_model_len"] - 8)), 8)
    print(READY, flush=True)
    for line in sys.stdin:
        print(MARK + json.dumps({MEASURE: measure, PROFILE: profile}[line.strip()]()), flush=True)


def busy_ms(trace: Path) -> float:
    """Of a step: how long the GPU computes or copies in a trace, kernels that run side by side counted once, over the number of steps."""
    events = [
        e for e in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"] if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    busy, until = 0.0, -math.inf
    for start, end in sorted((e["ts"], e["ts"] + e["dur"]) for e in events):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    # whatever runs in every step runs as often as that, or several times as often
    counts = Counter(e["name"] for e in events).values()
    return busy / 1000 / min(c for c in counts if c > OUTPUT_TOKENS / 2)


def merged(rows: list[dict]) -> dict:
    """Rounds of one configuration as one row, with the median of each list of times."""
    row = {name: value for other in rows for name, value in other.items()}
    for name in [n for n in row if n.endswith("_all")]:
        row[name] = [t for other in rows for t in other.get(name, [])]
        row[name.removesuffix("_all")] = round(statistics.median(row[name]), 4)
    return row


class Process:
    """One configuration, in a process of its own, that measures when told to. Used as a context: it is gone afterwards."""

    def __init__(self, kv: str, weights: str, *arguments: object) -> None:
        """arguments: further ones of `serve`."""
        self.about, self.log, self.asked = {"kv": kv, "weights": weights}, tempfile.NamedTemporaryFile("w+"), 0
        command = [sys.executable, __file__, "--one", json.dumps([kv, weights, *arguments])]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self.log, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *exc: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # with vLLM's own processes
        self.process.wait()
        self.log.close()

    def lines(self) -> list[str]:
        return Path(self.log.name).read_text(errors="replace").splitlines()

    def started(self) -> bool:
        """Whether it waits to be told to measure, or never will."""
        return self.process.poll() is not None or READY in self.lines()

    def ask(self, what: str, deadline: float) -> dict:
        """The row that it answers MEASURE or PROFILE with, or one that says why there is none until `deadline`, by time.monotonic."""
        with suppress(BrokenPipeError):
            print(what, file=self.process.stdin, flush=True)
        self.asked += 1
        while time.monotonic() < deadline:
            over = self.process.poll() is not None  # before its last lines are read
            lines = self.lines()
            if len(rows := [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]) >= self.asked:
                return json.loads(rows[self.asked - 1])
            if over:
                errors = [line.strip() for line in lines if "Error" in line and "root cause" not in line] or lines[-1:] or ["no output"]
                return self.about | {"note": errors[-1][-400:], "first_error": errors[0][-400:]}
            time.sleep(0.2)
        return self.about | {"note": "took too long"}


def rows_of(
    configurations: list[tuple[str, str]],
    arguments: tuple,
    timeout: float,
    together: bool,
    after: Path | None,
    questions: list[str],
) -> Iterator[list[dict]]:
    """All rows so far, whenever there is another. arguments: of `serve`, after KV dtype and weights; questions: what each is asked, in order."""
    found: dict[tuple[str, str], list[dict]] = {c: [] for c in configurations}

    def ask(process: Process, question: str, deadline: float) -> list[dict]:
        found[process.about["kv"], process.about["weights"]].append(process.ask(question, deadline))
        return [merged(rows) for rows in found.values() if rows]

    if not together:
        for kv, weights in configurations:
            with Process(kv, weights, *arguments) as process:
                deadline = time.monotonic() + timeout
                for question in questions:
                    yield ask(process, question, deadline)
        return
    with ExitStack() as stack:
        processes = [stack.enter_context(Process(kv, weights, *arguments)) for kv, weights in configurations]
        deadline = time.monotonic() + timeout
        while not all(p.started() for p in processes) and time.monotonic() < deadline:
            time.sleep(1)
        if after is not None:
            print(READY, flush=True)
            while not after.exists():
                time.sleep(0.2)
        for i, question in enumerate(questions):
            for process in processes[:: 1 if i % 2 == 0 else -1]:
                yield ask(process, question, time.monotonic() + timeout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", nargs="+", default=list(KV))
    parser.add_argument("--weights", nargs="+", default=["bf16"], help=" ".join(WEIGHTS))
    parser.add_argument("--pairs", nargs="+", metavar="KV:WEIGHTS", help="these, instead of each --kv with each of --weights")
    parser.add_argument("--shapes", nargs="+", default=[f"{b}x{n}" for b, n in SHAPES], metavar="BATCHxTOKENS")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="further arguments of vllm.LLM, JSON")
    parser.add_argument(
        "--timeout", type=float, default=240, help="seconds of one configuration; with --together, of all to start, and of each"
    )
    parser.add_argument("--together", action="store_true", help="start all configurations at once, and measure one after the other")
    parser.add_argument("--after", type=Path, metavar="FILE", help="with --together: measure once it exists")
    parser.add_argument("--rounds", type=int, default=1, help="how often each configuration is measured")
    parser.add_argument(
        "--profile", metavar="DIR", default="", help="also record with vLLM's profiler how long the GPU is busy, into this folder"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "engine_vllm.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        kv, weights, shapes, more, together, traces, folder = json.loads(args.one)
        serve(kv, weights, [tuple(s) for s in shapes], more, together, traces, Path(folder))
        return
    shapes = [tuple(map(int, s.split("x"))) for s in args.shapes]
    configurations = [(kv, weights) for weights in args.weights for kv in args.kv]
    if args.pairs:
        configurations = [tuple(pair.split(":")) for pair in args.pairs]
    traces = str(Path(args.profile).resolve()) if args.profile else ""
    questions = [MEASURE] * args.rounds + [PROFILE] * bool(traces)
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), (weights for _, weights in configurations))
        arguments = (shapes, args.engine_args, args.together, traces, folder)
        for rows in rows_of(configurations, arguments, args.timeout, args.together, args.after, questions):
            # after each, so that what was measured is there when a later one takes the machine down
            args.out.parent.mkdir(parents=True, exist_ok=True)
            about = (
                {"device": next((r["device"] for r in rows if "device" in r), None)} | versions("vllm") | {"output_tokens": OUTPUT_TOKENS}
            )
            args.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    for row in rows:
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
