"""`vllm serve`, as a user would start it, on every kind of checkpoint that the adapter takes. Each case is one server: a
question over the chat API, and what it says about each of 200 next tokens, which is held against transformers on the dequantized weights.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from integration_tests import foreign
from integration_tests.compare import (
    TOP,
    Comparison,
    compare,
    dequantized_model,
    greedy,
    laid_out_model,
    next_token_logprobs,
    quantized_model,
    text_tokens,
)
from integration_tests.models import tiny_moe
from integration_tests.server import VllmServer
from qplugins.checkpoints.quantize import quantize
from qplugins.checkpoints.reader import Checkpoint
from qplugins.layer_map import LayerMap

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

BEGINNING, CONTINUED = 40, 8  # tokens

# every shard of the fused layers in another format, and the embedding, to which SmolLM2's head is tied
MIXED_SHARDS = r"""
rules:
  - {targets: ["re:.*q_proj$"], format: int4}
  - {targets: ["re:.*k_proj$"], format: fp8}
  - {targets: ["re:.*v_proj$"], format: bf16}
  - {targets: ["re:.*o_proj$"], format: nvfp4}
  - {targets: ["re:.*gate_proj$"], format: mxfp4}
  - {targets: ["re:.*up_proj$"], format: int8}
  - {targets: ["re:.*down_proj$"], format: int4_g128_asym}
  - {targets: [Embedding], format: int8}
"""

# the same for two ranks: groups of 128 fall within the 256 columns that each has of o_proj and down_proj; the head is a matrix of its own
TWO_RANKS = r"""
rules:
  - {targets: ["re:.*q_proj$"], format: int4_g128}
  - {targets: ["re:.*k_proj$"], format: fp8}
  - {targets: ["re:.*v_proj$"], format: bf16}
  - {targets: ["re:.*o_proj$"], format: int4_g128_asym}
  - {targets: ["re:.*gate_proj$", "re:.*up_proj$"], format: nvfp4}
  - {targets: ["re:.*down_proj$"], format: int8_g128}
  - {targets: [Embedding], format: fp8}
  - {targets: [lm_head], format: nvfp4}
"""

# experts whose gate, up and down differ, a layer of unquantized ones, and one of none
EXPERTS = r"""
rules:
  - {targets: ["re:.*layers\\.1\\..*experts.*gate_proj$"], format: nvfp4}
  - {targets: ["re:.*layers\\.1\\..*experts.*up_proj$"], format: int8}
  - {targets: ["re:.*layers\\.1\\..*experts.*down_proj$"], format: int4_g128_asym}
  - {targets: ["re:.*layers\\.2\\..*experts"], format: bf16}
  - {targets: ["re:.*k_proj$"], format: fp8}
  - {targets: [Linear], format: int4_g128}
ignore: [lm_head, "re:.*mlp.gate$"]
"""


def written(name: str, source: str, text: str | None, pack: bool = False) -> Callable:
    """A checkpoint that qplugins writes by the map `text`, or else by the preset `balanced`. pack: as the GPU kernel reads it."""

    def make(models: Callable[[str], Path], folder: Path) -> tuple[Path, PreTrainedModel]:
        src = models(source)
        if text is None:
            layer_map = LayerMap.preset("balanced", Checkpoint.open(src).num_layers)
        else:
            (folder / "map.yaml").write_text(text)
            layer_map = LayerMap.from_yaml(folder / "map.yaml")
        quantize(src, folder / name, layer_map, pack=pack)
        return folder / name, dequantized_model(folder / name)

    return make


def compressed(name: str, source: str, preset: str) -> Callable:
    """A checkpoint that the compressed-tensors library writes."""

    def make(models: Callable[[str], Path], folder: Path) -> tuple[Path, PreTrainedModel]:
        theirs = foreign.compress(models(source), folder / name, preset)
        model = dequantized_model(folder / name)
        ours = dict(model.named_parameters())
        for tensor, w in theirs.items():
            # the library computes code times scale in bfloat16: two roundings
            error = (ours[tensor].detach() - w.to(torch.float32)).norm() / w.to(torch.float32).norm()
            assert error < 2 * torch.finfo(torch.bfloat16).eps, (
                f"{tensor}: read otherwise than by the library that wrote it, by {error:.1%}"
            )
        return folder / name, model

    return make


def laid_out(source: str, layout: str) -> Callable:
    """A checkpoint in another producer's layout, whose meaning is known without reading it."""

    def make(models: Callable[[str], Path], folder: Path) -> tuple[Path, PreTrainedModel]:
        meant = foreign.write(models(source), folder / layout, layout)
        return folder / layout, laid_out_model(models(source), meant)

    return make


def while_loading(source: str, preset: str) -> Callable:
    """A plain checkpoint that the engine quantizes."""

    def make(models: Callable[[str], Path], folder: Path) -> tuple[Path, PreTrainedModel]:
        src = models(source)
        return src, quantized_model(src, LayerMap.preset(preset, Checkpoint.open(src).num_layers))

    return make


@dataclass(frozen=True)
class Case:
    make: Callable
    quantization: str = "qplugins"
    ranks: int = 1
    args: tuple[str, ...] = ()
    knows_paris: bool = True  # the random model knows nothing


CASES = {
    "balanced": Case(written("balanced", "smollm2", None)),
    "mixed-shards": Case(written("mixed-shards", "smollm2", MIXED_SHARDS)),
    "compressed-tensors-nvfp4": Case(compressed("ct-nvfp4", "smollm2", "NVFP4")),
    "compressed-tensors-int4-asym": Case(compressed("ct-int4", "tiny_llama", "W4A16_ASYM"), knows_paris=False),
    "gptq-act-order": Case(laid_out("smollm2", "gptq_act")),
    "modelopt-nvfp4": Case(laid_out("smollm2", "modelopt_nvfp4")),
    "quantized-while-loading": Case(while_loading("smollm2", "nvfp4"), quantization="qplugins-nvfp4"),
    "two-ranks": Case(written("two-ranks", "tiny_llama", TWO_RANKS), ranks=2, knows_paris=False),
    "packed-two-ranks": Case(written("packed", "tiny_llama", TWO_RANKS, pack=True), ranks=2, knows_paris=False),
    "experts": Case(written("experts", "qwen3_moe", EXPERTS), ranks=2, knows_paris=False),
    "experts-quantized-while-loading": Case(
        while_loading("mixtral", "int4"), "qplugins-int4", ranks=2, args=("--enable-expert-parallel",), knows_paris=False
    ),
}


@dataclass(frozen=True)
class Served:
    case: Case
    server: VllmServer
    tokens: list[int]
    logprobs: torch.Tensor  # of the reference model, for each next token of the text
    continuation: str  # of the text's beginning, by the reference model


@pytest.fixture(scope="module")
def moes(smollm2, tmp_path_factory) -> dict[str, Path]:
    """Mixtures of experts."""
    folder = tmp_path_factory.mktemp("moes")
    return {"qwen3_moe": tiny_moe(folder / "qwen3", dense=[0]), "mixtral": tiny_moe(folder / "mixtral", family="mixtral")}


@pytest.fixture(scope="module", params=CASES)
def served(request, smollm2, tiny_llama, moes, tmp_path_factory) -> Iterator[Served]:
    case = CASES[request.param]
    if case.ranks > (os.cpu_count() or 1):
        pytest.skip(f"{case.ranks} ranks need as many cores")
    folder = tmp_path_factory.mktemp(request.param)
    models = {"smollm2": smollm2, "tiny_llama": tiny_llama, **moes}
    checkpoint, model = case.make(models.__getitem__, folder)
    tokens = text_tokens(checkpoint)
    logprobs, continuation = next_token_logprobs(model, tokens), greedy(model, checkpoint, tokens[:BEGINNING], CONTINUED)
    del model
    options = {"quantization": case.quantization, "tensor_parallel_size": case.ranks, "args": case.args}
    with VllmServer(checkpoint, log=folder / "server.log", **options) as server:
        yield Served(case, server, tokens, logprobs, continuation)


@pytest.mark.parametrize("served", [name for name, case in CASES.items() if case.knows_paris], indirect=True)
def test_knows_the_capital_of_france(served):
    assert "Paris" in served.server.chat("What is the capital of France?", max_tokens=10)


def test_continues_as_the_reference_does(served):
    assert served.server.complete(served.tokens[:BEGINNING], max_tokens=CONTINUED) == served.continuation


def test_computes_what_the_checkpoint_says(served):
    found: Comparison = compare(served.server.prompt_logprobs(served.tokens, TOP), served.logprobs, served.tokens)
    print(f"{found}, server started in {served.server.seconds_to_start:.0f} s")
    found.check()


def test_is_served_by_qplugins(served):
    # and not by the engine's own methods, which could read some of these checkpoints too
    assert f"quantization={served.case.quantization}" in served.server.log
