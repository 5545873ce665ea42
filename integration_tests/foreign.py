"""Checkpoints as others write them.

`compress` has the compressed-tensors library write one, whose `compress_model` is what llm-compressor saves with. Only the library's own code
touches the bytes: its schemes, its scales (round to nearest from each group's extremes), its packers and its config. What it decompresses
them to again comes along, so that our reading of its layout can be held against its own.

`write` lays one out as AutoAWQ, GPTQ and ModelOpt do, whose libraries want a GPU. Numbers are rounded to nearest, since a layout does not ask
how good they are, and put where the layout wants them by arithmetic of its own; what they mean comes along.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
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


Stored = tuple[dict[str, Tensor], Tensor]  # a layer's tensors, and the matrix [N, K] that they mean, in float32


def _words(codes: Tensor, places: Sequence[int]) -> Tensor:
    """[R, L] -> int32 [R, L / 8]: of every eight codes the j-th at bits 4 * places[j]"""
    eights = codes.view(codes.shape[0], -1, 8).to(torch.int64)
    words = sum(eights[..., j] << 4 * place for j, place in enumerate(places))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _int4(w: Tensor, order: Tensor, size: int, symmetric: bool) -> tuple[Tensor, ...]:
    """Codes [N, K], scales float16 and zero points [N, K / size], the group of each column, and what they mean. order: of columns in groups."""
    groups = w[:, order].unflatten(1, (-1, size))
    lo, hi = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scale = (torch.maximum(hi / 7, -lo / 8) if symmetric else (hi - lo) / 15).clamp_min(1e-6).to(torch.float16)
    # not 0: what GPTQ stores is one less
    zero = torch.full_like(scale, 8) if symmetric else (-lo / scale).round().clamp(1, 15)
    group = torch.empty_like(order)
    group[order] = torch.arange(len(order)) // size
    scale_of, zero_of = (t.to(torch.float32)[:, group] for t in (scale, zero))
    codes = (w / scale_of + zero_of).round().clamp(0, 15)
    return codes, scale, zero, group, (codes - zero_of) * scale_of


def _awq(w: Tensor, name: str, siblings: Sequence[Tensor]) -> Stored:
    codes, scale, zero, _, meant = _int4(w, torch.arange(w.shape[1]), 64, symmetric=False)
    places = (0, 4, 1, 5, 2, 6, 3, 7)
    return {"qweight": _words(codes.T, places), "qzeros": _words(zero.T, places), "scales": scale.T.contiguous()}, meant


def _gptq(size: int, *, symmetric: bool = True, act_order: bool = False, less: int = 1) -> Callable[..., Stored]:
    def store(w: Tensor, name: str, siblings: Sequence[Tensor]) -> Stored:
        # the real order is that of the input's second moments, and so one for all that reads the same input
        seed = torch.Generator().manual_seed(len(name))
        order = torch.randperm(w.shape[1], generator=seed) if act_order else torch.arange(w.shape[1])
        codes, scale, zero, group, meant = _int4(w, order, size, symmetric)
        stored = {
            "qweight": _words(codes, range(8)).T.contiguous(),
            "qzeros": _words(zero.T - less, range(8)),
            "scales": scale.T.contiguous(),
        }
        return {**stored, "g_idx": group.to(torch.int32)}, meant

    return store


def _nvfp4(w: Tensor, name: str, siblings: Sequence[Tensor]) -> Stored:
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    factor = torch.stack([s.abs().amax() for s in siblings]).amax() / (6 * 448)  # the exporter gives one to layers that engines join
    blocks = w.unflatten(1, (-1, 16))
    scale = (blocks.abs().amax(-1) / (6 * factor)).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    unit = scale.to(torch.float32)[..., None] * factor
    index = torch.bucketize((blocks / unit).abs(), (values[1:] + values[:-1]) / 2)
    meant = (values[index] * blocks.sign() * scale.to(torch.float32)[..., None]).flatten(1) * factor
    codes = (index + 8 * (blocks < 0)).flatten(1).to(torch.uint8)
    stored = {
        "weight": codes[:, 0::2] | codes[:, 1::2] << 4,
        "weight_scale": scale,
        "weight_scale_2": factor,
        "input_scale": torch.tensor(0.01),
    }
    return stored | _kv_scale(name), meant


def _fp8(w: Tensor, name: str, siblings: Sequence[Tensor]) -> Stored:
    scale = w.abs().amax() / 448
    codes = (w / scale).to(torch.float8_e4m3fn)
    stored = {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.02)}
    return stored | _kv_scale(name), codes.to(torch.float32) * scale


def _kv_scale(name: str) -> dict[str, Tensor]:
    """For a KV cache in FP8."""
    return {f"{x}_scale": torch.tensor(1.0) for x in "kv" if name.endswith(f"{x}_proj")}


def _modelopt(algorithm: str, **other: Any) -> dict[str, Any]:
    settings = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"], **other}
    return {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": settings}


# name -> what stores a matrix, and what the config says
GPTQ = {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": False, "checkpoint_format": "gptq"}
LAYOUTS: dict[str, tuple[Callable[..., Stored], dict[str, Any]]] = {
    "awq": (_awq, {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}),
    "gptq": (_gptq(64), {**GPTQ, "group_size": 64}),
    "gptq_act": (_gptq(32, act_order=True), {**GPTQ, "group_size": 32, "desc_act": True}),
    "gptq_v2_asym": (_gptq(64, symmetric=False, less=0), {**GPTQ, "group_size": 64, "sym": False, "checkpoint_format": "gptq_v2"}),
    "modelopt_nvfp4": (_nvfp4, _modelopt("NVFP4", group_size=16)),
    "modelopt_fp8": (_fp8, _modelopt("FP8")),
}
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("o_proj",), ("down_proj",))


def write(src: Path, out: Path, layout: str) -> dict[str, Tensor]:
    """Writes the plain Llama checkpoint `src`, of one file, to `out`, its decoder's matrices in one of LAYOUTS.

    ModelOpt's config is in a file of its own, as it was before version 0.31. Returns what the matrices mean, by module name.
    """
    store, config = LAYOUTS[layout]
    source, tensors, meant = load_file(src / "model.safetensors"), {}, {}
    for name, t in source.items():
        module = name.removesuffix(".weight")
        parent, _, leaf = module.rpartition(".")
        joined = next((names for names in JOINED if leaf in names), None)
        if joined is None:
            tensors[name] = t
            continue
        siblings = [source[f"{parent}.{x}.weight"].to(torch.float32) for x in joined]
        stored, meant[module] = store(t.to(torch.float32), f"{parent}.{joined[0]}" if layout == "gptq_act" else module, siblings)
        tensors |= {f"{module}.{p}": x.contiguous() for p, x in stored.items()}
    with staged(out) as folder:
        for file in src.glob("*.json"):
            shutil.copyfile(file, folder / file.name)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        described = json.loads((src / "config.json").read_text())
        if "producer" in config:
            (folder / "hf_quant_config.json").write_text(json.dumps(config))
        else:
            described["quantization_config"] = config
        (folder / "config.json").write_text(json.dumps(described))
    return meant
