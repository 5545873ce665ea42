"""From any layout that is read to compressed-tensors', or to the kernel's own, value for value: nothing is quantized again.

    tensors of AutoAWQ, GPTQ, ModelOpt; tiles  --read-->  QuantizedTensor  --store by the format's twin-->  tensors of compressed-tensors
    tensors of any of these                    --read-->  QuantizedTensor  --store, packed-->               tiles

What is written is read back and compared before the next matrix. One thing cannot always be kept to the last bit: NVFP4's global scale is a
factor with ModelOpt and a divisor here, and the reciprocal of a float32's reciprocal may be its neighbour, 2 ** -23 away.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qplugins.checkpoints.files import MAX_SHARD_SIZE, TensorFiles, check_room, other_files, staged, write_others
from qplugins.checkpoints.reader import QUANTIZATION_KEYS, Checkpoint, StoredModule
from qplugins.formats import PRODUCERS, CheckpointError, Format, packed, producer
from qplugins.kernels.quantized import QuantizedTensor
from qplugins.layer_map import Assignment, to_config

# of the keys and values that pass through attention, for a KV cache of fixed scales
KV_SCALES = ("k_scale", "v_scale", "q_scale", "prob_output_scale")
# of a config in the compressed-tensors layout: what it says of the KV cache, which is no business of a matrix' layout
KV_KEYS = ("kv_cache_scheme", "qplugins")

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Conversion:
    """formats   (format read, format written) -> how many matrices; those that are not quantized are bf16
    rounding  the largest relative difference of a global scale from the one that was read; every other number is the same
    dropped   tensors that the written layout has no place for: scales of 4-bit activations and of the KV cache
    files     safetensors files written
    """

    formats: Counter[tuple[str, str]]
    rounding: float
    dropped: tuple[str, ...]
    files: int


def convert(
    src: str | Path, out: str | Path, *, pack: bool = False, max_shard_size: int = MAX_SHARD_SIZE, progress: Progress | None = None
) -> Conversion:
    """Writes the quantized checkpoint folder `src` to the new folder `out`, in the compressed-tensors layout.

    pack      whether matrices are stored as the GPU kernel reads them instead, where its layout holds them
    progress  called after each matrix or other tensor with (bytes done, bytes in all, its name)

    `out` appears only once it is complete. Raises CheckpointError for a checkpoint that is malformed, not quantized, or in that layout
    already, FileExistsError if `out` exists, and OSError if the disk has too little room.
    """
    source = Checkpoint.open(src).check()
    layout = producer(source.quantization_config)
    modules = source.modules()
    written = tuple(m.format.twin or m.format for m in modules)
    if pack:
        written = tuple(packed(fmt, m.n, m.k) for m, fmt in zip(modules, written, strict=True))
    if layout not in PRODUCERS and written == tuple(m.format for m in modules):
        already = "is packed already, as far as it can be" if pack else f"is in the layout of {layout} already"
        raise CheckpointError(f"{source.path} {already if layout else 'is not quantized; `qplugins quantize` does that'}")
    others = other_files(source.path)
    # the same codes and scales, but for zero points, which there are in one order or the other, and what fills tiles
    growth = sum(max(0, fmt.nbytes(m.n, m.k) - m.nbytes) for m, fmt in zip(modules, written, strict=True))
    check_room(Path(out), source.nbytes + growth + sum(f.stat().st_size for f in others))
    inside = {f"{m.name}.{p}": (m, fmt) for m, fmt in zip(modules, written, strict=True) for p in m.tensors}
    total, done, rounding, dropped = source.nbytes, 0, 0.0, []
    with staged(out) as folder:
        files = TensorFiles(folder, max_shard_size)
        for name, entry in source.tensors.items():
            module, fmt = inside.get(name, (None, None))
            if module is None and layout in PRODUCERS and name.rpartition(".")[2] in KV_SCALES:
                dropped.append(name)
            elif module is None:
                files.add({name: source.load(name)})
            elif name == f"{module.name}.{module.format.params[0].name}":  # the module's codes, and with them all of it
                tensors, off = _convert(module, fmt, source.load_module(module))
                rounding = max(rounding, off)
                files.add({f"{module.name}.{p}": t for p, t in tensors.items()})
                dropped += [f"{module.name}.{p}" for p in module.tensors if p.startswith("input") and p not in tensors]
            done += entry.nbytes
            if progress is not None:
                progress(done, total, name)
        count = files.close()
        quantization = to_config(Assignment(modules, written))
        if layout not in PRODUCERS:
            quantization |= {key: source.quantization_config[key] for key in KV_KEYS if key in source.quantization_config}
        write_others(folder, _config(source.config, quantization), source.path, others)
    formats = Counter((m.format.name, fmt.name) for m, fmt in zip(modules, written, strict=True))
    return Conversion(formats, rounding, tuple(dropped), count)


def _convert(module: StoredModule, to: Format, stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """The tensors of a module as the format `to` stores them, and by how much their global scale is another."""
    n, k, fmt = module.n, module.k, module.format
    if problem := fmt.problem(stored, n, k):
        raise CheckpointError(f"{module.name}.{problem}")
    if to is fmt:
        # the same tensors; a single number is [1] there, and [] with ModelOpt
        return {p.name: stored[p.name].reshape(p.shape(n, k)) for p in fmt.params if p.name in stored}, 0.0
    q = fmt.read(stored, n, k)
    tensors = to.store(q)
    back = to.read(tensors, n, k)
    if not _same(q, back):
        raise CheckpointError(f"{module.name}: {to.name} does not read what it wrote; please report this checkpoint")
    off = 0.0 if q.global_scale is None else float((back.global_scale / q.global_scale - 1).abs())
    return tensors, off


def _same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Whether two matrices are equal in all but their global scales. Where a scale is zero, codes mean nothing."""
    if not a.codes.equal(b.codes) and not a.dequantize().equal(b.dequantize()):
        return False
    pairs = ((a.scale, b.scale), (a.zero_point, b.zero_point), (a.columns, b.columns))
    # bytes: torch cannot compare some of these dtypes
    return all((x is None) == (y is None) and (x is None or x.view(torch.uint8).equal(y.view(torch.uint8))) for x, y in pairs)


def _config(config: Mapping[str, Any], quantization: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the converted checkpoint: nothing of what the other producer said, also where only the text model's part did."""

    def without(of: Mapping[str, Any]) -> dict[str, Any]:
        return {key: without(value) if key == "text_config" else value for key, value in of.items() if key not in QUANTIZATION_KEYS}

    return {**without(config), "quantization_config": quantization}
