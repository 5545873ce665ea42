"""Pages go from one server to another: a prompt computed by the first is answered by the second, from what it was sent.

The connector is the one that vLLM brings as an example, which leaves blocks of whole pages in a folder. It knows a block's bytes by vLLM's own
[blocks, heads, tokens, bytes], as the others do; a page that says something of its tokens together, their mean, arrives only with all of them.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration_tests.engine_vllm.test_kv import (
    BOUND,
    MAPPED,
    counter,
    divergence,
    exact,
    greedy,
    mean,
    next_token,
    parted,
    prompts,
    serve,
    tokens,
)
from integration_tests.server import VllmServer, together

pytestmark = [pytest.mark.engine, pytest.mark.real_model, pytest.mark.timeout(420)]
__all__ = ["exact", "prompts", "tokens"]  # fixtures


@pytest.fixture(scope="module")
def pair(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[VllmServer]]:
    """(producer, consumer), with pages of two kinds."""
    folder = str(tmp_path_factory.mktemp("pages"))

    def one(role: str) -> VllmServer:
        how = {"kv_connector": "ExampleConnector", "kv_role": role, "kv_connector_extra_config": {"shared_storage_path": folder}}
        layers = ["--kv-cache-dtype", "int4_sink", "--additional-config", json.dumps(MAPPED)]
        return serve(smollm2, *layers, "--kv-transfer-config", json.dumps(how))

    with together(one("kv_producer"), one("kv_consumer")) as servers:
        yield servers


def test_pages_arrive_as_they_were(pair, prompts, exact):
    """What the consumer says is what the producer says where it reads the same pages itself, to the last bit: also for the answer's further
    tokens, which are written into pages behind those that came."""
    (producer, consumer), some = pair, slice(1, None, 2)
    for prompt in prompts[some]:
        next_token(producer, prompt)
    own = [greedy(producer, p, 8) for p in prompts[some]]  # from its prefix cache
    sent = [greedy(consumer, p, 8) for p in prompts[some]]
    assert counter(consumer, "external_prefix_cache_hits_total") >= 128 * len(sent)
    for a, b in zip(own, sent, strict=True):
        same, kls = parted(a, b)
        assert same == len(a) and not any(kls), (same, kls)
    kls = [divergence(e, answer[0][1]) for e, answer in zip(exact[some], sent, strict=True)]
    assert mean(kls) < BOUND["int4_sink"], kls
