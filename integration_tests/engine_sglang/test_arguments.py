"""What the plugin tells SGLang, without a server: names, what follows from them, and refusals, each with its sentence."""

import argparse
from types import SimpleNamespace

import pytest

from qplugins.kv import KV_LAYOUTS
from qplugins.layer_map import PRESETS, LayerMap

server_args = pytest.importorskip("sglang.srt.server_args")


@pytest.fixture(scope="module", autouse=True)
def plugins():
    from sglang.srt.plugins import load_plugins

    load_plugins()


def arguments(**options):
    from sglang.srt.server_args import ServerArgs

    return ServerArgs(**{"model_path": "none", **options})


def resolved(**options):
    from qplugins.sglang.kv import _resolve

    args = arguments(**options)
    _resolve(args)
    return args


def test_registration_worked_and_every_hook_is_in_place():
    from sglang.srt.plugins.hook_registry import HookRegistry

    from qplugins.sglang import register

    assert register.failure is None
    ours = {target for target, hooks in HookRegistry._hooks.items() if any("qplugins" in (f.__module__ or "") for _, f, _ in hooks)}
    assert ours and ours <= HookRegistry._patched


def test_the_command_line_knows_the_names():
    parser = argparse.ArgumentParser()
    server_args.ServerArgs.add_cli_args(parser)
    assert set(KV_LAYOUTS) <= set(parser._option_string_actions["--kv-cache-dtype"].choices)
    assert {"qplugins", *(f"qplugins-{p}" for p in PRESETS)} <= set(parser._option_string_actions["--quantization"].choices)


def test_a_projection_that_sglang_takes_apart_is_refused():
    from qplugins.formats import FORMATS
    from qplugins.sglang.config import CheckpointConfig, online_config

    config = {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": ["Linear"], **FORMATS["nvfp4"].scheme}}}
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.self_attn\.kv_b_proj: SGLang takes this matrix apart"):
        CheckpointConfig(config).quantized_linear("model.layers.0.self_attn.kv_b_proj")
    online = online_config("nvfp4")()
    online.layer_map = LayerMap.preset("nvfp4", 2)
    assert online.quantized_linear("model.layers.0.self_attn.kv_b_proj") is None


def test_what_a_checkpoint_on_a_hub_stores_plainly_is_looked_up(monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

    from qplugins.sglang.config import CheckpointConfig

    tensors = {
        name: TensorInfo(dtype, [8, 64], (0, 1)) for name, dtype in (("m.layers.0.gate.weight", "BF16"), ("m.layers.0.up.qweight", "I32"))
    }
    found = SafetensorsRepoMetadata(None, False, {}, {"model.safetensors": SafetensorsFileMetadata({}, tensors)})
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda name, revision: found)
    model = SimpleNamespace(model_path="org/model", revision="v1")
    config = CheckpointConfig({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False})
    config.bind(model, SimpleNamespace(load_format="auto"), {})
    assert config.layer_map.rule_for("m.layers.0.up") and config.layer_map.rule_for("m.layers.0.gate") is None

    def offline(name, revision):
        raise huggingface_hub.errors.OfflineModeIsEnabled("no network")

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", offline)
    assert CheckpointConfig.plain_on_hub("org/model", None) == []


def test_page_size_and_attention_follow_from_the_dtype():
    args = resolved(kv_cache_dtype="int4_sink")
    assert (args.page_size, args.attention_backend) == (128, "qplugins")
    untouched = resolved(kv_cache_dtype="auto")
    assert (untouched.page_size, untouched.attention_backend) == (None, None)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(page_size=16), "pages of 128 tokens; leave out --page-size 16"),
        (dict(attention_backend="triton"), "leave out --attention-backend triton"),
        (dict(chunked_prefill_size=100), "not a multiple of 128"),
        (dict(speculative_algorithm="EAGLE"), "does not work with --speculative-algorithm"),
        (dict(enable_hierarchical_cache=True), "does not work with --enable-hierarchical-cache"),
        (dict(disaggregation_mode="prefill"), "does not work with --disaggregation-mode"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_refuses_what_pages_cannot_do(options, words):
    from qplugins.sglang.kv import Unsupported

    with pytest.raises(Unsupported, match=words):
        resolved(kv_cache_dtype="int4_sink", **options)


@pytest.mark.parametrize(
    "model, words",
    [
        (dict(mla=True), "MLA"),
        (dict(head_dim=40), "head_dim is 40"),
        (dict(encoder=True), "cross-attention"),
    ],
)
def test_refuses_models_without_such_pages(model, words):
    from qplugins.sglang.kv import Unsupported, _layouts

    with pytest.raises(Unsupported, match=words):
        _layouts(configurator(**model))


def configurator(mla=False, encoder=False, head_dim=128, stored=None):
    hf_config = SimpleNamespace(quantization_config=stored)
    config = SimpleNamespace(is_encoder_decoder=encoder, head_dim=head_dim, v_head_dim=head_dim, num_hidden_layers=4, hf_config=hf_config)
    return SimpleNamespace(kv_cache_dtype_str="int4_sink", use_mla_backend=mla, model_config=config)


def test_a_checkpoint_may_give_layers_layouts_of_their_own():
    from qplugins.sglang.kv import _layouts

    stored = {"qplugins": {"kv_layers": {"int8_sink": [0, -1]}}}
    assert [x.name for x in _layouts(configurator(stored=stored))] == ["int8_sink", "int4_sink", "int4_sink", "int8_sink"]


def test_a_checkpoint_may_choose_the_dtype(tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {"kv_cache_scheme": {"num_bits": 4, "type": "int"}}}')
    assert resolved(model_path=str(tmp_path), quantization="qplugins").kv_cache_dtype == "int4_sink"
    assert resolved(model_path=str(tmp_path)).kv_cache_dtype == "auto"


def test_a_failed_registration_is_raised_at_the_first_use(monkeypatch):
    """SGLang swallows what a plugin raises; the names stay, and refuse with the reason."""
    from sglang.srt.layers import quantization

    from qplugins.sglang import register

    saved = dict(quantization.QUANTIZATION_METHODS)
    try:
        register._refuse(["qplugins"], AttributeError("no such hook"))
        config = quantization.get_quantization_config("qplugins")
        assert config.override_quantization_method({}, "fp8") is None
        for use in (lambda: config.from_config({}), lambda: config(), lambda: config.override_quantization_method({}, "qplugins")):
            with pytest.raises(register.RegistrationFailed, match="no such hook"):
                use()
    finally:
        quantization.QUANTIZATION_METHODS.update(saved)
