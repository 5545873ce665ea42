"""LoRA adapters over quantized layers: vLLM adds an adapter's product to that of a layer, whose method is ours."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from integration_tests.compare import TOP, compare, dequantized_model, next_token_logprobs, text_tokens
from integration_tests.engine_vllm.test_serving import MIXED_SHARDS
from integration_tests.server import VllmServer
from qplugins.checkpoints.quantize import quantize
from qplugins.layer_map import LayerMap

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

RANK, ALPHA = 4, 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(folder: Path, model: PreTrainedModel) -> None:
    """A random adapter in PEFT's layout, which changes every layer by a few percent. model: has it added."""
    folder.mkdir()
    tensors = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in TARGETS:
            n, k = module.weight.shape
            a, b = torch.randn(RANK, k) / k**0.5, torch.randn(n, RANK) * module.weight.detach().std() * k**0.5 / 100
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
            module.weight.data += ALPHA / RANK * b @ a
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_an_adapter_is_added_to_layers_of_every_format(smollm2, tmp_path):
    (tmp_path / "map.yaml").write_text(MIXED_SHARDS)
    checkpoint = tmp_path / "checkpoint"
    quantize(smollm2, checkpoint, LayerMap.from_yaml(tmp_path / "map.yaml"))
    tokens, model = text_tokens(checkpoint), dequantized_model(checkpoint)
    plain = next_token_logprobs(model, tokens)
    write_adapter(tmp_path / "adapter", model)
    tuned = next_token_logprobs(model, tokens)
    args = ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"tuned={tmp_path / 'adapter'}"]
    with VllmServer(checkpoint, quantization="qplugins", args=args, log=tmp_path / "server.log") as server:
        compare(server.prompt_logprobs(tokens, TOP), plain, tokens).check()
        listed = server.prompt_logprobs(tokens, TOP, model="tuned")
    compare(listed, tuned, tokens).check()
    assert compare(listed, plain, tokens).mean_kl > 0.01, "an adapter that changes nothing shows nothing"
