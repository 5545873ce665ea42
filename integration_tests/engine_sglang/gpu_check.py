"""SGLang on a GPU, as a user runs it: CUDA graphs, overlap scheduling, 16-bit arithmetic. `python integration_tests/engine_sglang/gpu_check.py`

    weights   a mixed checkpoint answers, and its probabilities are those of the dequantized weights
    fused     q, k and v in formats of their own
    stock     the same model in FP8 with a plain k, served by SGLang alone and by qplugins: mean KL of both
    kv        int4_sink and int8_sink: probabilities, a prefix found again, many clients for two minutes, every answer looked at
Names on the command line choose among them; the last line of each is a line of JSON.
"""

import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from integration_tests.compare import (  # noqa: E402
    TOP,
    Comparison,
    compare,
    dequantized_model,
    next_token_logprobs,
    plain_model,
    text_tokens,
)
from integration_tests.engine_sglang.conftest import rules  # noqa: E402
from integration_tests.engine_sglang.server import SglangServer  # noqa: E402
from integration_tests.models import smollm2  # noqa: E402
from qplugins.checkpoints.quantize import quantize  # noqa: E402
from qplugins.layer_map import LayerMap  # noqa: E402

CAPITALS = dict(
    France="Paris", Italy="Rome", Spain="Madrid", Japan="Tokyo", Egypt="Cairo", Cuba="Havana", Germany="Berlin", Greece="Athens"
)
# Triton's attention and PyTorch's sampling are there on every GPU host; SGLang's own choices need parts that not every installation has
OPTIONS = ["--sampling-backend", "pytorch", "--grammar-backend", "none"]
STOCK = ["--attention-backend", "triton", *OPTIONS]


def report(name: str, **values) -> None:
    print(json.dumps({"check": name, **values}), flush=True)


def measured(server: SglangServer, model, folder: Path) -> Comparison:
    tokens = text_tokens(folder)
    return compare(server.prompt_logprobs(tokens, TOP), next_token_logprobs(model, tokens), tokens)


def weights(folder: Path, work: Path) -> None:
    out = work / "balanced"
    quantize(folder, out, LayerMap.preset("balanced", 30), device="cuda")
    with SglangServer(out, quantization="qplugins", dtype="float16", args=STOCK) as server:
        found, answer = measured(server, dequantized_model(out), out), server.chat("What is the capital of France?")
        report("weights", ready_s=round(server.seconds_to_start, 1), answer=answer, graphs="Capturing batches" in server.log, **vars(found))
    assert "Paris" in answer
    found.check()


def fused(folder: Path, work: Path) -> None:
    out = work / "fused"
    formats = dict(q_proj="int4_g64", k_proj="fp8", o_proj="int8", gate_proj="mxfp4", up_proj="nvfp4", down_proj="int4_g128_asym")
    quantize(folder, out, rules(*((f"re:.*{name}$", fmt) for name, fmt in formats.items())), device="cuda")
    with SglangServer(out, quantization="qplugins", dtype="float16", args=STOCK) as server:
        found = measured(server, dequantized_model(out), out)
        report("fused", **vars(found))
    found.check()


def stock(folder: Path, work: Path) -> None:
    out = work / "fp8"
    quantize(folder, out, LayerMap(rules(("Linear", "fp8")).rules, ("lm_head", "re:.*k_proj$"), strict=False), device="cuda")
    config = json.loads((out / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    group["targets"], config["quantization_config"]["ignore"] = ["Linear"], ["lm_head", "re:.*k_proj$"]
    (out / "config.json").write_text(json.dumps(config))
    model = dequantized_model(out)
    for name, quantization in (("qplugins", "qplugins"), ("stock", None)):
        with SglangServer(out, quantization=quantization, dtype="bfloat16", args=STOCK) as server:
            found, answer = measured(server, model, out), server.chat("What is the capital of France?")
            report("stock", served_by=name, answer=answer, mean_kl=found.mean_kl, top1=found.top1)


def load(server: SglangServer, clients: int, seconds: float) -> tuple[int, list[str]]:
    """Clients that ask one question after another: how many answers came, and those without the capital in it."""
    until, wrong, count, lock = time.monotonic() + seconds, [], 0, threading.Lock()
    filler = "The lighthouse at the end of the harbour had not been lit for eleven years when the council voted to repair it. "

    def ask(client: int) -> None:
        nonlocal count
        i = client
        while time.monotonic() < until:
            country, city = list(CAPITALS.items())[i % len(CAPITALS)]
            answer = server.chat(filler * (i % 30) + f"What is the capital of {country}?", max_tokens=24 + 16 * (i % 5))
            with lock:
                count += 1
                if city not in answer:
                    wrong.append(f"{country}: {answer}")
            i += 7

    threads = [threading.Thread(target=ask, args=(c,)) for c in range(clients)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return count, wrong


def kv(folder: Path, work: Path, seconds: float = 120) -> None:
    model, tokens = plain_model(folder), text_tokens(folder)

    def serve(layout: str | None, limit: float) -> float:
        """The share of answers without the capital."""
        args = ["--chunked-prefill-size", "1024", *(STOCK if layout is None else OPTIONS)]
        with SglangServer(
            folder,
            kv_cache_dtype=layout,
            dtype="float16",
            context_length=2048,
            max_total_tokens=65536,
            max_running=64,
            args=args,
            timeout=500,
        ) as server:
            found = measured(server, model, folder)
            first, again = (server.generate(tokens, max_new_tokens=8) for _ in range(2))
            cached, same = again["meta_info"]["cached_tokens"], first["text"] == again["text"]
            count, wrong = load(server, 64, seconds)
            values = dict(mean_kl=found.mean_kl, top1=found.top1, cached=cached, same=same, answers=count, without_capital=len(wrong))
            report("kv", layout=layout or "float16", graphs="Capturing batches" in server.log, **values, examples=wrong[:3])
        assert found.mean_kl <= limit, found
        assert layout is None or cached == 128
        return len(wrong) / count

    with ThreadPoolExecutor() as side_by_side:
        plain, *shares = side_by_side.map(serve, (None, "int8_sink", "int4_sink"), (1e-3, 2e-3, 0.03))
    # a small model errs by itself, and in 4 bits hardly more often
    assert shares[0] <= plain + 0.02 and shares[1] <= plain + 0.05, (plain, shares)


def main(names: Sequence[str]) -> None:
    folder = smollm2()
    with tempfile.TemporaryDirectory() as work:
        for check in (weights, fused, stock, kv):
            if not names or check.__name__ in names:
                check(folder, Path(work))


if __name__ == "__main__":
    main(sys.argv[1:])
