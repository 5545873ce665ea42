"""What the adapter asks of vLLM and promises it, without a server: names, take-over, and every layer of a model that vLLM's own loader
built and filled, held against the dequantized matrix.

Needs none of vLLM's compiled parts. `test_gpu_version.py` runs this file a second time, under the vLLM for GPUs on a machine without one.
"""

import os
from pathlib import Path

import pytest
import torch
import vllm
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.layers.utils import _get_lora_device
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.model_executor.layers.quantization.utils.quant_utils import get_and_maybe_dequant_weights
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from integration_tests import foreign
from integration_tests.compare import dequantized_model, laid_out_model, quantized_model
from integration_tests.engine_vllm.in_process import edited, load
from qplugins.checkpoints.quantize import quantize
from qplugins.formats import CheckpointError
from qplugins.layer_map import PRESETS, LayerMap

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("plugins")]

EVERY_SHARD = r"""
rules:
  - {targets: ["re:.*q_proj$"], format: int4}
  - {targets: ["re:.*k_proj$"], format: fp8}
  - {targets: ["re:.*v_proj$"], format: bf16}
  - {targets: ["re:.*o_proj$"], format: int4_g128_asym}
  - {targets: ["re:.*gate_proj$"], format: mxfp4}
  - {targets: ["re:.*up_proj$"], format: nvfp4}
  - {targets: ["re:.*down_proj$"], format: int8}
  - {targets: [Embedding], format: fp8}
  - {targets: [lm_head], format: nvfp4}
"""
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def config(folder: Path, quantization: str | None, **options) -> VllmConfig:
    return EngineArgs(
        model=str(folder), quantization=quantization, dtype="float32", enforce_eager=True, max_model_len=128, **options
    ).create_engine_config()


@pytest.fixture(scope="module")
def mixed(tiny_llama, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "map.yaml").write_text(EVERY_SHARD)
    quantize(tiny_llama, folder / "ckpt", LayerMap.from_yaml(folder / "map.yaml"))
    return folder / "ckpt"


@pytest.fixture(scope="module")
def taken_over(tiny_llama, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("theirs") / "ckpt"
    foreign.compress(tiny_llama, folder, "W4A16_ASYM")
    return folder


def test_the_version_is_the_one_that_is_meant():
    assert vllm.__version__.startswith(os.environ.get("QPLUGINS_EXPECT_VLLM", ""))


@pytest.mark.parametrize("name", ["qplugins", *(f"qplugins-{preset}" for preset in PRESETS)])
def test_name_is_known(name):
    from qplugins.vllm.config import MappedConfig

    assert name in QUANTIZATION_METHODS
    assert issubclass(get_quantization_config(name), MappedConfig)


def test_loading_plugins_again_changes_nothing():
    from qplugins.vllm.register import register

    before = list(QUANTIZATION_METHODS)
    register()
    assert list(QUANTIZATION_METHODS) == before


def test_what_a_checkpoint_on_a_hub_stores_plainly_is_looked_up(monkeypatch):
    """GPTQ's config does not say what was left alone; vLLM reads headers from the hub."""
    from qplugins.vllm import config

    headers = {
        "model.layers.0.mlp.up_proj.qweight": {"dtype": "I32", "shape": [8, 64]},
        "model.layers.0.mlp.gate.weight": {"dtype": "BF16", "shape": [8, 64]},
        "model.norm.weight": {"dtype": "BF16", "shape": [64]},
        "model.layers.0.mlp.down_proj.weight": {"dtype": "F8_E4M3", "shape": [8, 64]},
    }
    monkeypatch.setattr(
        config, "get_safetensors_params_metadata", lambda name, revision: headers if (name, revision) == ("org/model", "v1") else {}
    )
    found = config.CheckpointConfig({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False})
    found.maybe_update_config("org/model", None, "v1")
    rules = {name: found.layer_map.rule_for(f"model.layers.0.mlp.{name}") for name in ("up_proj", "gate", "down_proj")}
    assert rules["up_proj"] and rules["down_proj"] and rules["gate"] is None


@pytest.mark.parametrize("quantization", ["qplugins", None])
def test_compressed_tensors_is_taken_over_when_asked_and_only_then(taken_over, quantization):
    found = config(taken_over, quantization)
    assert found.model_config.quantization == (quantization or "compressed-tensors")
    assert (type(found.quant_config).__module__ == "qplugins.vllm.config") == (quantization is not None)


def test_plain_checkpoint_is_quantized_while_loading_when_asked(tiny_llama):
    assert config(tiny_llama, "qplugins-nvfp4").quant_config.get_name() == "qplugins-nvfp4"
    assert config(tiny_llama, None).quant_config is None


@pytest.fixture(scope="module", params=["mixed", "taken_over", "while_loading", "awq", "gptq_act", "modelopt_nvfp4"])
def loaded(request, world, tiny_llama, tmp_path_factory) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model as vLLM's loader leaves it, and the matrices that it should compute with."""
    if request.param == "while_loading":
        model, reference = load(config(tiny_llama, "qplugins-nvfp4")), quantized_model(tiny_llama, LayerMap.preset("nvfp4", 4))
    elif request.param in foreign.LAYOUTS:
        folder = tmp_path_factory.mktemp("theirs") / request.param
        reference = laid_out_model(tiny_llama, foreign.write(tiny_llama, folder, request.param))
        model = load(config(folder, "qplugins"))
    else:
        folder = request.getfixturevalue(request.param)
        model, reference = load(config(folder, "qplugins")), dequantized_model(folder)
    return model, {name.removesuffix(".weight"): p.detach() for name, p in reference.named_parameters()}


def test_every_linear_layer_computes_with_its_dequantized_matrix(loaded):
    model, want = loaded
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LinearBase)}
    assert sum(isinstance(m, QKVParallelLinear) for m in layers.values()) == 4
    torch.manual_seed(0)
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        w = torch.cat([want[f"{parent}.{part}"] for part in PARTS.get(leaf, (leaf,))])
        x = torch.randn(3, w.shape[1])
        y = layer.quant_method.apply(layer, x)
        # both sum in float32, in another order
        torch.testing.assert_close(y, x @ w.T, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_what_others_in_vllm_ask_of_a_layer(loaded):
    """MLA takes a projection apart, LoRA wants its device."""
    model, want = loaded
    for name, layer in model.named_modules():
        if isinstance(layer, LinearBase):
            parent, _, leaf = name.rpartition(".")
            w = torch.cat([want[f"{parent}.{part}"] for part in PARTS.get(leaf, (leaf,))])
            torch.testing.assert_close(get_and_maybe_dequant_weights(layer), w, rtol=1e-4, atol=1e-4)
            assert _get_lora_device(layer).type == "cpu"


def test_a_tensor_that_comes_late_is_refused(loaded):
    model, _ = loaded
    mixed = next(m.mixed for m in model.modules() if isinstance(m, LinearBase) and hasattr(m, "mixed"))
    with pytest.raises(CheckpointError, match="the layer is loaded already"):
        mixed.load("weight_packed", torch.zeros(1), [0])


def test_embedding_and_head_compute_with_their_dequantized_matrix(loaded):
    model, want = loaded
    seen = 0
    for name, layer in model.named_modules():
        if isinstance(layer, ParallelLMHead):
            x = torch.randn(2, want["lm_head"].shape[1])
            y = layer.quant_method.apply(layer, x)[:, : want["lm_head"].shape[0]]
            torch.testing.assert_close(y, x @ want["lm_head"].T, rtol=1e-4, atol=1e-4)
        elif isinstance(layer, VocabParallelEmbedding):
            ids = torch.tensor([0, 1, 777, 49151])
            torch.testing.assert_close(layer.quant_method.embedding(layer, ids), want[name][ids], rtol=1e-6, atol=0)
        else:
            continue
        seen += 1
    assert seen == 2


def test_nothing_of_the_checkpoint_is_left_over(loaded):
    model, _ = loaded
    for name, layer in model.named_modules():
        if isinstance(layer, LinearBase):
            left = [p for p, t in layer.named_parameters() if t.numel() == 0 or t.device.type == "meta"]
            assert not left, f"{name} keeps {left}"


def test_random_weights_need_no_file(world, mixed, tmp_path):
    (tmp_path / "config.json").write_text((mixed / "config.json").read_text())
    model = load(config(tmp_path, "qplugins", load_format="dummy", skip_tokenizer_init=True))
    layers = [layer for layer in model.modules() if isinstance(layer, LinearBase)]
    assert layers and all(layer.mixed.plan for layer in layers if hasattr(layer, "mixed"))
    x = torch.randn(3, layers[0].input_size)
    assert layers[0].quant_method.apply(layers[0], x).isfinite().all()


def test_plain_checkpoint_under_qplugins_is_refused(tiny_llama):
    with pytest.raises(Exception, match="serves quantized checkpoints, and this one has no quantization_config"):
        config(tiny_llama, "qplugins")


def test_quantized_checkpoint_under_a_preset_is_refused(mixed):
    with pytest.raises(Exception, match="quantizes plain checkpoints; this one has a quantization_config. Use --quantization qplugins"):
        config(mixed, "qplugins-nvfp4")


def test_checkpoint_of_another_method_is_refused(mixed, tmp_path):
    with pytest.raises(Exception, match="in the layouts of compressed-tensors, awq, gptq, modelopt; this one says quant_method 'hqq'"):
        config(edited(mixed, tmp_path / "ckpt", quantization_config={"quant_method": "hqq"}), "qplugins")


@pytest.mark.parametrize(("layout", "theirs"), [("awq", "awq"), ("gptq", "auto_gptq"), ("modelopt_nvfp4", "modelopt_fp4")])
def test_other_producers_are_taken_over_when_asked_and_only_then(tiny_llama, tmp_path, layout, theirs):
    foreign.write(tiny_llama, tmp_path / layout, layout)
    found = config(tmp_path / layout, "qplugins")
    assert found.model_config.quantization == "qplugins" and type(found.quant_config).__module__ == "qplugins.vllm.config"
    assert found.cache_config.cache_dtype == "auto"  # and not FP8, which ModelOpt's config asks for
    # the rest of vLLM's configuration may refuse its own method here
    assert EngineArgs(model=str(tmp_path / layout), dtype="float32").create_model_config().quantization == theirs


def test_layout_that_is_not_read_is_refused_before_the_model_is_built(tiny_llama, tmp_path):
    foreign.write(tiny_llama, tmp_path / "awq", "awq")
    with pytest.raises(Exception, match="AWQ's layout 'gemv' of autoawq is not read, only 'gemm' of autoawq"):
        config(edited(tmp_path / "awq", tmp_path / "gemv", quantization_config={"version": "gemv"}), "qplugins")


def test_checkpoint_without_its_file_is_refused(mixed, tmp_path):
    folder = edited(mixed, tmp_path / "ckpt")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(Exception, match="model-00002-of-00002.safetensors is missing"):
        config(folder, "qplugins")


def test_untested_version_is_a_warning_that_says_what_was_tested(monkeypatch):
    from qplugins.vllm import compat

    assert compat.untested() is None
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    assert "was tested with vLLM 0.32 to 0.33, this is 0.99.1" in compat.untested()
