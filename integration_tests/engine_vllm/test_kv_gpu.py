"""KV pages on a GPU, as vLLM runs by itself: torch.compile, full CUDA graphs for decoding, prompts in chunks; alone, with speculative decoding,
and under 64 clients for two minutes ($QPLUGINS_SOAK_SECONDS).

    python -m pytest -m gpu integration_tests/engine_vllm/test_kv_gpu.py
"""

import json
import math
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from integration_tests.engine_vllm.test_kv import (
    ANSWER,
    BOUND,
    QUESTION,
    SPECULATIVE,
    check_speculation,
    counter,
    divergence,
    exact,
    greedy,
    mean,
    next_token,
    prompts,
    repeating,
    tokens,
)
from integration_tests.server import NAME, VllmServer, together
from qplugins.kv import KV_LAYOUTS

pytestmark = [pytest.mark.gpu, pytest.mark.engine, pytest.mark.timeout(900)]
__all__ = ["exact", "prompts", "repeating", "tokens"]  # fixtures

SOAK_SECONDS = float(os.environ.get("QPLUGINS_SOAK_SECONDS", "120"))
CLIENTS = 64


def serve(model: Path, *args: str, **options) -> VllmServer:
    # float16: its rounding is far below what 4 bits change, which bfloat16's is not
    options = {"dtype": "float16", "max_model_len": 2048, "compiled": True, "kv_bytes": 1 << 28, "timeout": 500, **options}
    return VllmServer(model, args=args, **options)


@pytest.mark.real_model
@pytest.mark.parametrize("name", KV_LAYOUTS)
def test_prompts_from_the_cache_and_the_answer(smollm2, exact, prompts, name):
    with serve(smollm2, "--kv-cache-dtype", name) as server:
        assert ANSWER in server.chat(QUESTION)
        cold = [divergence(e, next_token(server, p)) for e, p in zip(exact, prompts, strict=True)]
        cached = [divergence(e, next_token(server, p)) for e, p in zip(exact, prompts, strict=True)]
        assert counter(server, "prefix_cache_hits_total") >= 128 * len(prompts)
    # float16 activations themselves; KL of k5v4 and k8v4 lies between that of int8 and that of int4
    rounding = 1e-4
    assert mean(cold) < rounding, cold
    assert mean(cached) < BOUND.get(name, BOUND["int4_sink"]) + rounding, cached


@pytest.mark.real_model
def test_graphs_and_eager_say_the_same(smollm2, tokens):
    """A decode replayed from a CUDA graph against one launched call by call."""
    with together(*(serve(smollm2, "--kv-cache-dtype", "int8_sink", compiled=compiled) for compiled in (True, False))) as servers:
        said = [[greedy(server, tokens[i : i + 200], 24) for i in range(4)] for server in servers]
    for graphs, eager in zip(*said, strict=True):
        assert mean([divergence(a[1], b[1]) for a, b in zip(graphs, eager, strict=True) if a[0] == b[0]]) < 1e-3


@pytest.mark.real_model
def test_speculation_changes_no_token(smollm2, repeating):
    with together(*(serve(smollm2, "--kv-cache-dtype", "int4_sink", *args) for args in ([], SPECULATIVE))) as (without, guessing):
        check_speculation(without, guessing, repeating)


@pytest.fixture(scope="module")
def long_llama(tmp_path_factory) -> Path:
    """A random model that takes 20,000 tokens."""
    from integration_tests.models import tiny_llama

    folder = tiny_llama(tmp_path_factory.mktemp("models") / "long", head_dim=128)
    described = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 20480}
    (folder / "config.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def soaked(long_llama) -> Iterator[VllmServer]:
    # few enough tokens fit that requests put each other out
    with serve(long_llama, "--kv-cache-dtype", "int4_sink", "--max-num-seqs", str(CLIENTS), max_model_len=17408) as server:
        yield server


def test_many_clients_for_minutes(soaked):
    """Mixed lengths up to 16k tokens, half of them beginning with one of four shared texts. No error, no NaN, and the same answer after as before."""
    rng = random.Random(0)
    shared = [[rng.randrange(1000, 40000) for _ in range(8000)] for _ in range(4)]
    probe = [rng.randrange(1000, 40000) for _ in range(700)]
    before = greedy(soaked, probe, 8)
    end = time.monotonic() + SOAK_SECONDS

    def client(seed: int) -> int:
        rng, done, http = random.Random(seed), 0, requests.Session()
        while time.monotonic() < end:
            own = [rng.randrange(1000, 40000) for _ in range(int(2 ** rng.uniform(3, 13)))]
            prompt = rng.choice(shared)[: rng.randrange(64, 8000)] + own if rng.random() < 0.5 else own
            body = {
                "model": NAME,
                "prompt": prompt,
                "max_tokens": rng.choice((1, 16, 100)),
                "temperature": rng.choice((0, 1)),
                "logprobs": 1,
            }
            reply = http.post(
                f"{soaked.url}/v1/completions", json=body | {"ignore_eos": True, "return_tokens_as_token_ids": True}, timeout=300
            )
            assert reply.status_code == 200, reply.text[:500]
            said = reply.json()["choices"][0]["logprobs"]["token_logprobs"]
            assert len(said) == body["max_tokens"] and all(math.isfinite(x) and x <= 1e-3 for x in said), said
            done += 1
        return done

    with ThreadPoolExecutor(CLIENTS) as clients:
        done = list(clients.map(client, range(CLIENTS)))
    assert min(done) > 0
    after = greedy(soaked, probe, 8)
    assert [t for t, _ in after][:1] == [t for t, _ in before][:1]
    assert mean([divergence(a[1], b[1]) for a, b in zip(before[:1], after[:1], strict=True)]) < BOUND["int4_sink"]


def test_tokens_that_fit_beside_other_dtypes(long_llama):
    """In one configuration: how many tokens the same memory holds in 16 bits, in the other dtypes that vLLM has, and in int4_sink."""
    names = ("auto", "fp8", "int4_per_token_head", "int4_sink")
    with together(*(serve(long_llama, "--kv-cache-dtype", name, compiled=False) for name in names)) as servers:
        fit = {name: server.kv_tokens for name, server in zip(names, servers, strict=True)}
    print(f"\ntokens in 256 MiB: {fit}")
    for name, token_bytes in (("auto", 512), ("int4_sink", KV_LAYOUTS["int4_sink"].token_bytes(128, 128))):
        most = 2**28 // (4 * 2 * token_bytes)  # 4 layers, 2 KV heads
        assert 0.97 * most < fit[name] <= most
    assert fit["int4_sink"] > 3.4 * fit["auto"] and fit["int4_sink"] > 1.7 * fit["fp8"]
