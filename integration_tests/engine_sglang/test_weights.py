"""Quantized weights in a real SGLang server: what it answers, and whether its probabilities are those of the dequantized weights."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from integration_tests import foreign
from integration_tests.compare import TOP, compare, dequantized_model, laid_out_model, next_token_logprobs, quantized_model, text_tokens
from integration_tests.engine_sglang.server import SglangServer
from integration_tests.server import ServerFailed, VllmServer
from qplugins.layer_map import LayerMap

pytestmark = pytest.mark.engine

VLLM = Path(os.environ.get("QPLUGINS_VLLM", Path(__file__).parents[2] / ".venv/vllm/bin/python"))


def check(server: SglangServer, folder: Path, model) -> None:
    tokens = text_tokens(folder)
    found = compare(server.prompt_logprobs(tokens, TOP), next_token_logprobs(model, tokens), tokens)
    print(found)
    found.check()


@pytest.fixture(scope="module")
def served(balanced) -> tuple[str, list[dict[int, float]]]:
    """An answer of the `balanced` checkpoint, and what it says about the next tokens of the text."""
    # two HTTP workers: they are started by name, and load plugins only because they are given an app that does
    with SglangServer(balanced, quantization="qplugins", args=["--tokenizer-worker-num", "2"]) as server:
        return server.chat("What is the capital of France?"), server.prompt_logprobs(text_tokens(balanced), TOP)


@pytest.mark.real_model
def test_mixed_checkpoint_answers_as_its_weights_say(balanced, served):
    answer, logprobs = served
    assert "Paris" in answer
    tokens = text_tokens(balanced)
    found = compare(logprobs, next_token_logprobs(dequantized_model(balanced), tokens), tokens)
    print(found)
    found.check()


@pytest.mark.real_model
@pytest.mark.skipif(not VLLM.exists(), reason="no vLLM beside SGLang: set QPLUGINS_VLLM to its Python")
def test_vllm_says_the_same(balanced, served):
    class OtherVllm(VllmServer):
        def command(self) -> list[str]:
            return [str(VLLM), *super().command()[1:]]

    tokens = text_tokens(balanced)
    with OtherVllm(balanced, quantization="qplugins") as server:
        theirs = server.prompt_logprobs(tokens, TOP)
    # vLLM's list as a distribution over the vocabulary: tokens that it does not name share what is left
    size = dequantized_model(balanced).config.vocab_size
    reference = torch.full((len(theirs), size), -torch.inf)
    for row, listed in zip(reference, theirs, strict=True):
        named = torch.tensor(list(listed))
        row[named] = torch.tensor(list(listed.values()))
        left = (1 - row.exp().sum()).clamp_min(1e-12) / (size - len(named))
        row[row == -torch.inf] = left.log()
    common = [{t: p for t, p in ours.items() if t in other} for ours, other in zip(served[1], theirs, strict=True)]
    found = compare(common, reference, tokens)
    print(found)
    found.check()


def test_fused_layers_of_different_formats_and_a_quantized_vocabulary(mixed_qkv):
    with SglangServer(mixed_qkv, quantization="qplugins") as server:
        check(server, mixed_qkv, dequantized_model(mixed_qkv))


def test_two_ranks_and_a_tied_vocabulary(tied):
    with SglangServer(tied, quantization="qplugins", tensor_parallel_size=2) as server:
        check(server, tied, dequantized_model(tied))


def test_packed_on_two_ranks(packed):
    with SglangServer(packed, quantization="qplugins", tensor_parallel_size=2) as server:
        check(server, packed, dequantized_model(packed))


def test_modelopts_layout_and_its_own_file(tiny_llama, tmp_path):
    """Which SGLang reads for its own methods only, and takes for itself wherever it is asked first."""
    meant = foreign.write(tiny_llama, tmp_path / "model", "modelopt_nvfp4")
    with SglangServer(tmp_path / "model", quantization="qplugins") as server:
        check(server, tmp_path / "model", laid_out_model(tiny_llama, meant))


def test_experts_of_different_formats_on_two_ranks(mixed_experts):
    with SglangServer(mixed_experts, quantization="qplugins", tensor_parallel_size=2) as server:
        check(server, mixed_experts, dequantized_model(mixed_experts))


@pytest.mark.parametrize("preset", ["nvfp4", "balanced"])
def test_quantized_while_loading(tiny_llama, preset):
    with SglangServer(tiny_llama, quantization=f"qplugins-{preset}") as server:
        check(server, tiny_llama, quantized_model(tiny_llama, LayerMap.preset(preset, 4)))


def test_sglang_alone_loads_differing_shards_wrong(fp8_and_plain):
    """The reason to be: FP8 with a plain k is a valid checkpoint, and SGLang's own method takes one scheme for all of qkv."""
    tokens = text_tokens(fp8_and_plain)
    reference = next_token_logprobs(dequantized_model(fp8_and_plain), tokens)
    with SglangServer(fp8_and_plain, quantization="qplugins") as server:
        ours = compare(server.prompt_logprobs(tokens, TOP), reference, tokens)
    ours.check()
    # bfloat16 is the smallest difference that SGLang's own method takes, and its FP8 product needs help on a CPU
    with SglangServer(fp8_and_plain, dtype="bfloat16", env={"SGLANG_CPU_FP8": "1"}) as server:
        stock = compare(server.prompt_logprobs(tokens, TOP), reference, tokens)
    print(f"mean KL: stock SGLang {stock.mean_kl:.2e}, qplugins {ours.mean_kl:.2e}")
    assert not stock.mean_kl <= 100 * ours.mean_kl  # NaN here: k has no scale to load, and its place keeps what it was filled with


@pytest.mark.parametrize(
    ("of_layer", "of_runner", "of_server", "said"),
    [
        ({}, {}, {}, None),
        ({}, {"is_gated": False}, {}, "have no gate"),
        ({}, {"activation": "situ"}, {}, "have the activation situ"),
        ({"with_bias": True}, {}, {}, "have biases"),
        ({}, {"gemm1_alpha": 1.7}, {}, "bound their activation"),
        ({}, {"apply_router_weight_on_input": True}, {}, "on their input"),
        ({}, {"no_combine": True}, {}, "are not added up"),
        ({}, {}, {"enable_eplb": True}, "--enable-eplb"),
        ({"num_fused_shared_experts": 1}, {}, {}, "--disable-shared-experts-fusion"),
    ],
)
def test_experts_that_are_not_computed_here_are_refused(monkeypatch, of_layer, of_runner, of_server, said):
    from sglang.srt.layers.moe import MoeRunnerConfig

    from qplugins.sglang import moe

    args = {"enable_eplb": False, "ep_num_redundant_experts": 0, "init_expert_location": "trivial"}
    monkeypatch.setattr(moe, "get_server_args", lambda: SimpleNamespace(**args | of_server))
    config = MoeRunnerConfig(**of_runner)
    layer = SimpleNamespace(**{"moe_runner_config": config, "with_bias": False, "num_fused_shared_experts": 0} | of_layer)
    reason = moe.refuses(layer)
    assert reason is None if said is None else said in reason


# what is wrong with a checkpoint, and the words with which the server refuses it


def _copy(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    return out


def refused(folder: Path, quantization: str, *words: str) -> None:
    with pytest.raises(ServerFailed) as failed, SglangServer(folder, quantization=quantization):
        pass
    for word in words:
        assert word in failed.value.log


def test_refuses_a_plain_checkpoint(tiny_llama):
    refused(tiny_llama, "qplugins", "this one has no quantization_config", "qplugins-nvfp4")


def test_refuses_to_quantize_a_quantized_one(fp8_and_plain):
    refused(fp8_and_plain, "qplugins-int4", "Use --quantization qplugins")


def test_refuses_a_missing_tensor(fp8_and_plain, tmp_path):
    folder = _copy(fp8_and_plain, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight_scale"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "qplugins", "model.layers.1.self_attn.q_proj.weight_scale", "missing")


def test_refuses_scales_that_are_not_finite(fp8_and_plain, tmp_path):
    folder = _copy(fp8_and_plain, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight_scale"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "qplugins", "model.layers.1.self_attn.q_proj.weight_scale", "NaN")


def test_refuses_another_producers_layout(fp8_and_plain, tmp_path):
    folder = _copy(fp8_and_plain, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "hqq"
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "qplugins", "in the layouts of compressed-tensors", "hqq")
