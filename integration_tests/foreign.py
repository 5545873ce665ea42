"""Checkpoints as others write them: by the compressed-tensors library, whose `compress_model` is what llm-compressor saves with.

Only the library's own code touches the bytes: its schemes, its scales (round to nearest from each group's extremes), its packers and its
config. What it decompresses them to again comes along, so that our reading of its layout can be held against its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from qplugins.checkpoints.files import staged


def compress(src: Path, out: Path, preset: str, ignore: Sequence[str] = ("lm_head",)) -> dict[str, Tensor]:
    """Writes the plain checkpoint `src` to `out`, its Linear layers in one of the library's presets: "NVFP4", "W4A16_ASYM" (group 128).

    Returns the weights that the library decompresses `out` to, by parameter name.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(src, dtype=torch.bfloat16)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=list(ignore)))
    layers = {name: m for name, m in model.named_modules() if getattr(m, "quantization_scheme", None) is not None}
    for layer in layers.values():
        _calibrate(layer)
    compressor = ModelCompressor.from_pretrained_model(model)
    with torch.compiler.set_stance("force_eager"):  # the library compiles its packers, which for once takes longer than packing
        compressor.compress_model(model)
        with staged(out) as folder:
            model.save_pretrained(folder)
            compressor.update_config(folder)
            AutoTokenizer.from_pretrained(src).save_pretrained(folder)
        compressor.decompress_model(model)
    return {f"{name}.weight": layer.weight.detach() for name, layer in layers.items()}


@torch.no_grad()
def _calibrate(layer: nn.Linear) -> None:
    """Fills in the scales that a layer's scheme asks for."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args, w = layer.quantization_scheme.weights, layer.weight
    factor = None
    if hasattr(layer, "weight_global_scale"):
        factor = generate_gparam(w.amin(), w.amax())
        layer.weight_global_scale.copy_(factor)
    if hasattr(layer, "input_global_scale"):
        layer.input_global_scale.copy_(generate_gparam(torch.tensor(-8.0), torch.tensor(8.0)))
    groups = w.unflatten(-1, (-1, args.group_size))
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=factor)
    layer.weight_scale.copy_(scale)
    if hasattr(layer, "weight_zero_point"):
        layer.weight_zero_point.copy_(zero_point)
