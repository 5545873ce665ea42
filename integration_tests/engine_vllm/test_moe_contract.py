"""What the adapter asks of vLLM's mixtures of experts and promises them, as test_contract.py does it for linear layers: every layer's experts,
built and filled by vLLM's own loader, held against the dequantized matrices; and what is refused.

`test_gpu_version.py` runs this file a second time, under the vLLM for GPUs on a machine without one.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig

from integration_tests import foreign
from integration_tests.compare import dequantized_model, quantized_model
from integration_tests.engine_vllm.in_process import edited, load
from integration_tests.engine_vllm.test_contract import config
from integration_tests.models import tiny_moe
from qplugins.checkpoints.quantize import quantize
from qplugins.layer_map import LayerMap

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("plugins")]

# gate and up apart and in one, layers that differ, and a first layer without experts
QWEN3 = r"""
rules:
  - {targets: ["re:.*layers\\.0\\."], format: fp8}
  - {targets: ["re:.*layers\\.1\\..*experts.*(gate|up)_proj$"], format: nvfp4}
  - {targets: ["re:.*layers\\.1\\..*experts.*down_proj$"], format: int4_g128_asym}
  - {targets: ["re:.*layers\\.2\\..*experts.*gate_proj$"], format: int8}
  - {targets: ["re:.*layers\\.2\\..*experts.*up_proj$"], format: mxfp4}
  - {targets: ["re:.*layers\\.2\\..*experts.*down_proj$"], format: bf16}
  - {targets: [Linear], format: int4_g64}
ignore: [lm_head, "re:.*mlp.gate$"]
"""
MIXTRAL = r"""
rules:
  - {targets: ["re:.*experts.*w1$"], format: int8}
  - {targets: ["re:.*experts.*w2$"], format: nvfp4}
  - {targets: ["re:.*experts.*w3$"], format: fp8}
"""


def mapped(text: str, folder: Path) -> LayerMap:
    (folder / "map.yaml").write_text(text)
    return LayerMap.from_yaml(folder / "map.yaml")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("plain")
    return {"qwen3": tiny_moe(folder / "qwen3", dense=[0]), "mixtral": tiny_moe(folder / "mixtral", family="mixtral")}


@pytest.fixture(scope="module")
def by_class(plain, tmp_path_factory) -> Path:
    """As llm-compressor describes a mixture: the class Linear, less the router."""
    folder = tmp_path_factory.mktemp("by_class")
    layer_map = LayerMap.preset("int4", 3)
    quantize(plain["qwen3"], folder / "named", layer_map)
    groups = {"group_0": {"targets": ["Linear"], **layer_map.rules[0].formats[0].scheme}}
    described = {"config_groups": groups, "ignore": ["lm_head", "re:.*mlp.gate$"]}
    return edited(folder / "named", folder / "ckpt", quantization_config=described)


def joined(source: Path, target: Path) -> Path:
    """A copy of a Qwen3-MoE that has all experts of a layer in one tensor, as some models come."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    for prefix in {name.split(".experts.")[0] for name in tensors if ".experts." in name}:
        gate, up, down = (
            torch.stack([tensors.pop(f"{prefix}.experts.{e}.{leaf}_proj.weight") for e in range(8)]) for leaf in ("gate", "up", "down")
        )
        tensors |= {f"{prefix}.experts.gate_up_proj": torch.cat([gate, up], 1), f"{prefix}.experts.down_proj": down}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.fixture(scope="module", params=["qwen3", "mixtral", "packed", "by_class", "awq", "while_loading", "joined_while_loading"])
def loaded(request, world, plain, tmp_path_factory) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model as vLLM's loader leaves it, and the matrices that it should compute with."""
    if request.param == "while_loading":
        folder = plain["mixtral"]
        model, reference = load(config(folder, "qplugins-nvfp4")), quantized_model(folder, LayerMap.preset("nvfp4", 2))
    elif request.param == "joined_while_loading":
        folder = joined(plain["qwen3"], tmp_path_factory.mktemp("joined") / "ckpt")
        model, reference = load(config(folder, "qplugins-int4")), quantized_model(plain["qwen3"], LayerMap.preset("int4", 3))
    else:
        if request.param == "by_class":
            folder = request.getfixturevalue("by_class")
        elif request.param == "awq":  # whose config says nothing of the router, which is plain
            folder = tmp_path_factory.mktemp("awq") / "ckpt"
            foreign.write(plain["qwen3"], folder, "awq")
        elif request.param == "packed":
            folder = tmp_path_factory.mktemp("packed") / "ckpt"
            quantize(plain["qwen3"], folder, mapped(QWEN3, folder.parent), pack=True)
        else:
            folder = tmp_path_factory.mktemp(request.param) / "ckpt"
            quantize(plain[request.param], folder, mapped({"qwen3": QWEN3, "mixtral": MIXTRAL}[request.param], folder.parent))
        model, reference = load(config(folder, "qplugins")), dequantized_model(folder)
    # transformers has one name for what checkpoints call otherwise
    return model, {name.replace(".mlp.", ".block_sparse_moe."): p.detach() for name, p in reference.named_parameters()}


def routed(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {
        name.replace(".mlp.", ".block_sparse_moe.").removesuffix(".routed_experts"): layer
        for name, layer in model.named_modules()
        if isinstance(layer, RoutedExperts)
    }


def test_every_layers_experts_compute_with_their_dequantized_matrices(loaded):
    model, want = loaded
    layers = routed(model)
    assert len(layers) == 2
    torch.manual_seed(0)
    for name, layer in layers.items():
        gate_up, down = want[f"{name}.gate_up_proj"], want[f"{name}.down_proj"]
        x, weights = torch.randn(7, gate_up.shape[2]), torch.rand(7, 2)
        ids = torch.stack([torch.randperm(8)[:2] for _ in range(7)])
        y = layer.quant_method.apply(layer, x, weights, ids, None, None)
        expected = torch.zeros_like(x)
        for t in range(7):
            for weight, e in zip(weights[t], ids[t], strict=True):
                gate, up = (gate_up[e] @ x[t]).chunk(2)
                expected[t] += weight * (down[e] @ (silu(gate) * up))
        # both sum in float32, in another order
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_nothing_of_the_checkpoint_is_left_over(loaded):
    for name, layer in routed(loaded[0]).items():
        left = [p for p, t in layer.named_parameters() if t.numel() == 0]
        assert not left and not layer.mixed.arriving and not layer.mixed.packed, f"{name} keeps {left}"


def test_the_router_stays_as_it_is(loaded):
    gates = [m for name, m in loaded[0].named_modules() if name.endswith(("mlp.gate", "block_sparse_moe.gate"))]
    assert gates and all(gate.weight.dtype == torch.float32 for gate in gates)


def test_experts_of_one_layer_in_two_formats_are_refused(world, plain, tmp_path, monkeypatch):
    text = MIXTRAL.replace("rules:\n", 'rules:\n  - {targets: ["re:.*layers\\\\.1\\\\..*experts.(2|3|7).w1$"], format: nvfp4}\n')
    with monkeypatch.context() as allowed:
        allowed.setattr("qplugins.layer_map.check_experts", lambda formats: None)
        quantize(plain["mixtral"], tmp_path / "ckpt", mapped(text, tmp_path))
    with pytest.raises(ValueError, match=r"model.layers.1.block_sparse_moe.experts: w1 is int8 in 0..1,4..6 and nvfp4 in 2..3,7"):
        load(config(tmp_path / "ckpt", "qplugins"))


def test_act_order_is_refused(world, plain, tmp_path):
    foreign.write(plain["qwen3"], tmp_path / "ckpt", "gptq_act")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.0\.gate_proj: experts whose groups have columns from everywhere"):
        load(config(tmp_path / "ckpt", "qplugins"))


def test_missing_expert_is_named(world, by_class, tmp_path):
    folder = Path(shutil.copytree(by_class, tmp_path / "ckpt"))
    tensors = load_file(folder / "model.safetensors")
    gone = {name for name in tensors if ".2.mlp.experts.5.up_proj" in name}
    assert gone
    save_file({name: t for name, t in tensors.items() if name not in gone}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model.layers.2.mlp.experts.5.up_proj: weight_packed, weight_scale not found in the checkpoint"):
        load(config(folder, "qplugins"))


def parallel(**options) -> FusedMoEParallelConfig:
    """One rank's, with some things otherwise."""
    return replace(FusedMoEParallelConfig.make_no_parallel(), **options)


@pytest.mark.parametrize(
    ("of_layer", "of_config", "said"),
    [
        ({}, {}, None),
        ({}, {"is_act_and_mul": False}, "have no gate"),
        ({}, {"activation": SimpleNamespace(value="swigluoai")}, "have the activation swigluoai"),
        ({}, {"has_bias": True}, "have biases"),
        ({}, {"swiglu_limit": 7.0}, "bound their activation"),
        ({}, {"is_lora_enabled": True}, "--enable-lora"),
        ({}, {"moe_parallel_config": parallel(enable_eplb=True)}, "--enable-eplb"),
        ({}, {"moe_parallel_config": parallel(dp_size=2, use_ep=True)}, None),
        (
            {},
            {"moe_parallel_config": parallel(dp_size=2, use_ep=True, all2all_backend="deepep_low_latency")},
            "--all2all-backend deepep_low_latency",
        ),
        ({}, {"moe_parallel_config": parallel(all2all_backend="deepep_low_latency")}, None),  # with one rank nothing is sent
        ({"apply_router_weight_on_input": True}, {}, "on their input"),
        ({"expert_map_manager": SimpleNamespace(num_fused_shared_experts=1)}, {}, "have shared ones among them"),
    ],
)
def test_what_is_not_computed_here_is_refused(of_layer, of_config, said):
    from qplugins.vllm import moe

    usual = {"is_act_and_mul": True, "activation": SimpleNamespace(value="silu"), "has_bias": False, "is_lora_enabled": False}
    usual |= {"swiglu_limit": None, "swiglu_alpha": None, "swiglu_beta": None, "moe_parallel_config": parallel()}
    layer = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(layer)
    layer.moe_config = SimpleNamespace(**usual | of_config)
    layer.apply_router_weight_on_input, layer.expert_map_manager = False, SimpleNamespace(num_fused_shared_experts=0)
    for name, value in of_layer.items():
        setattr(layer, name, value)
    reason = moe.refuses(layer)
    assert reason is None if said is None else said in reason
