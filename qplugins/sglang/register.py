"""Makes `--quantization qplugins`, `--quantization qplugins-<preset>` and our `--kv-cache-dtype`s known to SGLang.

SGLang calls `register` before it parses the command line and again in every process that it starts, logs what it raises, and goes on. A
failure is therefore kept, and raised where one of our names is used first: a server must not start without what it was asked for.
"""

import logging

logger = logging.getLogger(__name__)

failure: Exception | None = None
_registered = False


class RegistrationFailed(RuntimeError):
    """The plugin could not be set up in this SGLang. The cause is the exception that says why."""


def register() -> None:
    """Entry point `sglang.srt.plugins`."""
    global _registered, failure
    if _registered:
        return
    _registered = True
    from qplugins.layer_map import PRESETS

    names = ["qplugins", *(f"qplugins-{preset}" for preset in PRESETS)]
    try:
        _register(names)
    except Exception as e:
        failure = e
        logger.exception(
            "qplugins could not be set up in this SGLang; --quantization %s and our KV cache dtypes will refuse to start", names[0]
        )
        _refuse(names, e)


def _register(names: list[str]) -> None:
    from sglang.srt import server_args
    from sglang.srt.layers import quantization

    from qplugins.layer_map import PRESETS
    from qplugins.sglang import compat, kv
    from qplugins.sglang.config import CheckpointConfig, MappedConfig, online_config

    if warning := compat.untested():
        logger.warning(warning)
    server_args.add_quantization_method_choices(names)
    configs = {"qplugins": CheckpointConfig, **{f"qplugins-{preset}": online_config(preset) for preset in PRESETS}}
    quantization.BASE_QUANTIZATION_METHODS.update(configs)
    # first: the first that takes a checkpoint over has it, and SGLang's ModelOpt methods ask no one
    stock = dict(quantization.QUANTIZATION_METHODS)
    quantization.QUANTIZATION_METHODS.clear()
    quantization.QUANTIZATION_METHODS.update(configs | stock)

    def describe(model_config, *args, **kwargs) -> None:
        if model_config.quantization == "qplugins":
            CheckpointConfig.describe(model_config)

    def bind(config, model_config, load_config, packed_modules_mapping, *args, **kwargs) -> None:
        if isinstance(config, MappedConfig):
            config.bind(model_config, load_config, packed_modules_mapping)

    def check(model, *args, **kwargs) -> None:
        if isinstance(config := getattr(model, "quant_config", None), CheckpointConfig):
            config.check_model()

    compat.hook("sglang.srt.model_loader.loader.get_quant_config", describe, "BEFORE")

    def architecture(found, model_config, *args, **kwargs) -> tuple:
        # SGLang gives a Mixtral in a format that it does not know experts each apart, one after the other
        if found[1] != "QuantMixtralForCausalLM" or model_config.quantization not in names:
            return found
        from sglang.srt.models.mixtral import MixtralForCausalLM

        return MixtralForCausalLM, "MixtralForCausalLM"

    compat.hook("sglang.srt.model_loader.utils.get_model_architecture", architecture, "AFTER")
    compat.hook("sglang.srt.model_loader.loader.get_quant_config", bind, "AFTER")
    compat.hook("sglang.srt.model_loader.loader._initialize_model", check, "AFTER")
    compat.load_plugins_in_workers()
    kv.register()


def _refuse(names: list[str], cause: Exception) -> None:
    """Lets the names be said, and fail with the cause."""
    from sglang.srt import server_args
    from sglang.srt.layers import quantization

    from qplugins.kv import KV_LAYOUTS
    from qplugins.sglang import compat

    class Refusing(quantization.QuantizationConfig):
        def __new__(cls, *args, **kwargs):
            raise RegistrationFailed(f"qplugins could not be set up in this SGLang: {cause}. `qplugins doctor` tells more") from cause

        @classmethod
        def from_config(cls, config):
            return cls()

        @classmethod
        def override_quantization_method(cls, hf_quant_cfg, user_quant):
            return cls() if user_quant in names else None

    for name in names:
        quantization.QUANTIZATION_METHODS[name] = Refusing
    server_args.add_quantization_method_choices(names)

    def refuse(args, *rest, **kwargs) -> None:
        if getattr(args, "kv_cache_dtype", None) in KV_LAYOUTS:
            Refusing()

    compat.offer_kv_cache_dtypes(list(KV_LAYOUTS))
    compat.hook(compat.resolution(), refuse, "BEFORE")


def diagnose() -> list[str]:
    """What is wrong with the plugin in the SGLang that is installed here, a sentence each; for `qplugins doctor`."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    from qplugins.sglang import compat

    load_plugins()
    found = []
    if not _registered:
        found.append("SGLang does not load the plugin qplugins: it is not among those that the environment variable SGLANG_PLUGINS names")
    if failure is not None:
        found.append(f"the plugin could not be set up: {type(failure).__name__}: {failure}")
    for target, hooks in HookRegistry._hooks.items():
        if target not in HookRegistry._patched and any((hook.__module__ or "").startswith("qplugins.") for _, hook, _ in hooks):
            found.append(f"SGLang could not put the plugin's hook in place at {target}")
    if warning := compat.untested():
        found.append(warning)
    return found
