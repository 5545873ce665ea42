"""Makes `--quantization qplugins`, `--quantization qplugins-<preset>` and `--kv-cache-dtype int4_sink` known to vLLM.

vLLM calls `register` in the API server, the engine core and every worker, possibly more than once.
"""

_registered = False


def register() -> None:
    """Entry point `vllm.general_plugins`."""
    global _registered
    if _registered:
        return
    from vllm.logger import init_logger
    from vllm.model_executor.layers.quantization import register_quantization_config

    from qplugins.layer_map import PRESETS
    from qplugins.vllm import compat, kv
    from qplugins.vllm.config import CheckpointConfig, online_config

    if warning := compat.untested():
        init_logger("vllm.qplugins").warning(warning)
    register_quantization_config("qplugins")(CheckpointConfig)
    for preset in PRESETS:
        register_quantization_config(f"qplugins-{preset}")(online_config(preset))
    kv.register()
    _registered = True
