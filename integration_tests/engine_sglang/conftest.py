"""The checkpoints that these tests serve, and the condition under which they run: in the environment that has SGLang."""

import importlib.util
import json
from pathlib import Path

import pytest

from qplugins.layer_map import LayerMap, Rule, get_format

if importlib.util.find_spec("sglang") is None:
    collect_ignore_glob = ["test_*.py"]


def rules(*pairs: tuple[str, str]) -> LayerMap:
    """A layer map of (target, format name) pairs."""
    return LayerMap(tuple(Rule((target,), (get_format(name),)) for target, name in pairs))


@pytest.fixture(scope="session")
def balanced(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 by the preset `balanced`."""
    from qplugins.checkpoints.quantize import quantize

    out = tmp_path_factory.mktemp("balanced") / "model"
    quantize(smollm2, out, LayerMap.preset("balanced", 30))
    return out


@pytest.fixture(scope="session")
def mixed_qkv(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose q, k and v differ, each in a format of its own, and whose embedding and output head are quantized."""
    from qplugins.checkpoints.quantize import quantize

    out = tmp_path_factory.mktemp("mixed") / "model"
    wanted = [("re:.*q_proj$", "int4_g128"), ("re:.*k_proj$", "fp8"), ("re:.*(gate_proj)$", "nvfp4"), ("re:.*(o_proj|down_proj)$", "int8")]
    quantize(tiny_llama, out, rules(*wanted, ("re:.*embed_tokens$", "int8"), ("lm_head", "int4_g64")))
    return out


@pytest.fixture(scope="session")
def packed(mixed_qkv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as the GPU kernel reads it."""
    from qplugins.checkpoints.convert import convert

    out = tmp_path_factory.mktemp("packed") / "model"
    convert(mixed_qkv, out, pack=True)
    return out


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose quantized embedding is its output head too."""
    from integration_tests.models import tiny_llama
    from qplugins.checkpoints.quantize import quantize

    folder = tmp_path_factory.mktemp("tied")
    wanted = [("re:.*embed_tokens$", "int8"), ("re:.*(q|o)_proj$", "int4_g128"), ("re:.*down_proj$", "nvfp4"), ("re:.*v_proj$", "fp8")]
    quantize(tiny_llama(folder / "plain", tie=True), folder / "model", rules(*wanted))
    return folder / "model"


@pytest.fixture(scope="session")
def fp8_and_plain(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in FP8 whose k stays plain, told as llm-compressor tells it: the class Linear, and an expression under `ignore`."""
    from qplugins.checkpoints.quantize import quantize

    out = tmp_path_factory.mktemp("fp8") / "model"
    quantize(tiny_llama, out, LayerMap(rules(("Linear", "fp8")).rules, ("lm_head", "re:.*k_proj$")))
    config = json.loads((out / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    group["targets"] = ["Linear"]
    config["quantization_config"]["ignore"] = ["lm_head", "re:.*k_proj$"]
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture(scope="session")
def mixed_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral whose experts differ in format between gate, up and down, and between its layers."""
    from integration_tests.models import tiny_moe
    from qplugins.checkpoints.quantize import quantize

    folder = tmp_path_factory.mktemp("experts")
    wanted = [("w1", "nvfp4"), ("w3", "int8"), ("w2", "int4_g128_asym")]
    of_experts = [(rf"re:.*layers\.0\..*experts.*{leaf}$", fmt) for leaf, fmt in wanted]
    of_experts += [(r"re:.*experts.*(w1|w3)$", "mxfp4"), (r"re:.*experts.*w2$", "fp8")]
    plain = tiny_moe(folder / "plain", family="mixtral")
    quantize(plain, folder / "model", rules(*of_experts, ("re:.*k_proj$", "fp8"), ("re:.*(q|v|o)_proj$", "int4_g128")))
    return folder / "model"
