"""From a 16- or 32-bit checkpoint to a quantized one, a tensor at a time.

    plan      headers only: which matrix gets which format, what it will weigh, and every reason to refuse
    importance.py  what a text says of which columns matter, if there is one
    quantize  one source tensor -> its stored tensors -> the current output file, written when full; the folder appears when all is done

What is in memory at any time: the pages of one source tensor, its codes, one block of rows in float32, and one output file's tensors.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qplugins.checkpoints.files import MAX_SHARD_SIZE, TensorFiles, check_room, other_files, staged, write_others
from qplugins.checkpoints.reader import Checkpoint, is_head
from qplugins.formats import CheckpointError, Format, packed
from qplugins.kernels.quantized import QuantizedTensor
from qplugins.layer_map import Assignment, LayerMap, fused_siblings, to_config

BLOCK_CPU, BLOCK_GPU = 1 << 18, 1 << 24  # elements of a matrix that are worked on at a time
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Layer:
    """One matrix of a plan, and once it is quantized its relative error ||W_q - W|| / ||W||."""

    name: str
    kind: str
    n: int
    k: int
    format: str
    nbytes_before: int
    nbytes_after: int
    error: float | None = None


@dataclass(frozen=True)
class Report:
    """What a checkpoint becomes, or became.

    layers        every matrix
    other_tensors, other_nbytes  number and bytes of what is no matrix, copied as it is: norms, biases, joined experts
    dropped       tensors that are not written, because a tied model does not use them
    files         safetensors files written; 0 in a plan
    """

    layers: tuple[Layer, ...]
    other_tensors: int
    other_nbytes: int
    dropped: tuple[str, ...] = ()
    files: int = 0

    @property
    def nbytes_before(self) -> int:
        return self.other_nbytes + sum(x.nbytes_before for x in self.layers)

    @property
    def nbytes_after(self) -> int:
        return self.other_nbytes + sum(x.nbytes_after for x in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight over all matrices, the unquantized ones and all scales included."""
        return 8 * sum(x.nbytes_after for x in self.layers) / max(1, sum(x.n * x.k for x in self.layers))

    def counts(self) -> Counter[str]:
        return Counter(x.format for x in self.layers)

    def worst(self, count: int) -> list[Layer]:
        """The quantized layers of the largest relative error."""
        return sorted((x for x in self.layers if x.error is not None), key=lambda x: -x.error)[:count]


def plan(src: str | Path | Checkpoint, layer_map: LayerMap, *, pack: bool = False) -> Report:
    """What `quantize` would make of `src`, from its headers.

    Raises CheckpointError for a source that is malformed or quantized already, ValueError for a map that does not fit the model.
    """
    return _plan(src, layer_map, pack)[2]


def quantize(
    src: str | Path,
    out: str | Path,
    layer_map: LayerMap,
    *,
    pack: bool = False,
    device: str = "cpu",
    max_shard_size: int = MAX_SHARD_SIZE,
    importance: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Writes the checkpoint folder `src` to the new folder `out`, its matrices in the formats that `layer_map` gives them.

    pack            whether matrices are stored as the GPU kernel reads them, where its layout holds them (`formats/tiles.py`)
    device          where matrices are quantized; they pass through it a block of rows at a time
    max_shard_size  bytes of one output file; a tensor that is larger has a file of its own
    importance      module name -> float32 [K], how much the square of an error in each column counts, of `importance.importance`; others count all
                    columns the same
    progress        called after each source tensor with (bytes done, bytes in all, the tensor's name)

    `out` appears only once it is complete. Before anything is written, raises what `plan` raises, FileExistsError if `out` exists,
    ValueError for an unusable device, and OSError if the disk has too little room. While writing: CheckpointError for a source
    tensor with NaN or infinity, OSError for a full disk.
    """
    source, assignment, planned = _plan(src, layer_map, pack)
    if max_shard_size <= 0:
        raise ValueError(f"the largest size of a file has to be positive, is {max_shard_size}")
    check_device(device)
    others = other_files(source.path)
    check_room(Path(out), planned.nbytes_after + sum(f.stat().st_size for f in others))

    formats = {m.name: fmt for m, fmt in assignment if fmt.quantized}
    amax, important = _SharedAmax(source, formats), importance or {}
    errors: dict[str, float] = {}
    written: dict[str, int] = {}
    total, done = source.nbytes, 0
    with staged(out) as folder:
        files = TensorFiles(folder, max_shard_size)
        for name, entry in source.tensors.items():
            module, _, param = name.rpartition(".")
            if name in planned.dropped:
                pass
            elif module in formats and param == "weight":
                tensors, errors[module] = _quantize_matrix(
                    source.load(name), name, formats[module], amax(module), important.get(module), device
                )
                written[module] = sum(t.nbytes for t in tensors.values())
                files.add({f"{module}.{p}": t for p, t in tensors.items()})
            else:
                tensor = source.load(name)
                _largest(name, tensor)
                files.add({name: tensor})
            done += entry.nbytes
            if progress is not None:
                progress(done, total, name)
        count = files.close()
        config = source.config | {"quantization_config": to_config(assignment)}
        write_others(folder, config, source.path, others)
    layers = (replace(x, error=errors.get(x.name), nbytes_after=written.get(x.name, x.nbytes_after)) for x in planned.layers)
    return replace(planned, files=count, layers=tuple(layers))


def _plan(src: str | Path | Checkpoint, layer_map: LayerMap, pack: bool) -> tuple[Checkpoint, Assignment, Report]:
    source = src if isinstance(src, Checkpoint) else Checkpoint.open(src)
    if source.quantization_config:
        raise CheckpointError(f"{source.path} has a quantization_config: this checkpoint is quantized already; start from the original")
    source.check()
    heads = [m for m in source.modules() if source.tied and is_head(m.name)]
    assignment = layer_map.assign([m for m in source.modules() if m not in heads], [m.name for m in heads] or ["lm_head"] * source.tied)
    if pack:
        assignment = Assignment(assignment.modules, tuple(packed(fmt, m.n, m.k) for m, fmt in assignment))
    layers = []
    for module, fmt in assignment:
        if fmt.quantized and fmt.quantize is None:
            raise ValueError(f"{module.name}: {fmt.name} can only be read, since its input scale comes from calibration; take fp8 instead")
        dtype = module.dtype or torch.bfloat16
        after = fmt.nbytes(module.n, module.k, dtype) if fmt.quantized else module.nbytes
        layers.append(Layer(module.name, module.kind, module.n, module.k, fmt.name, module.nbytes, after))
    if not any(fmt.quantized for _, fmt in assignment):
        raise ValueError("this map quantizes no layer of the model")
    dropped = tuple(f"{m.name}.weight" for m in heads)
    matrices = {f"{m.name}.weight" for m in assignment.modules}
    rest = [e.nbytes for name, e in source.tensors.items() if name not in matrices and name not in dropped]
    return source, assignment, Report(tuple(layers), len(rest), sum(rest), dropped)


def _largest(name: str, w: Tensor) -> Tensor | None:
    """The largest magnitude in `w`, float32; None for what is no 16- or 32-bit float. Raises CheckpointError for NaN or infinity."""
    if not w.dtype.is_floating_point or w.dtype.itemsize == 1 or w.numel() == 0:
        return None
    lo, hi = w.aminmax()
    largest = torch.maximum(-lo, hi).to(torch.float32)
    if not largest.isfinite():
        bad = int((~w.isfinite()).sum())
        raise CheckpointError(f"{name}: {bad} of {w.numel()} values are NaN or infinite; the source checkpoint is damaged")
    return largest


class _SharedAmax:
    """The magnitude that a matrix's one global scale has to cover: that of all its fused siblings in the same format."""

    def __init__(self, source: Checkpoint, formats: dict[str, Format]) -> None:
        self.source, self.formats = source, formats
        self.known: dict[tuple[str, ...], Tensor] = {}

    def __call__(self, name: str) -> Tensor | None:
        fmt = self.formats[name]
        if not fmt.shares_amax:
            return None
        group = tuple(s for s in fused_siblings(name) if s in self.formats and self.formats[s] == fmt)
        if group not in self.known:
            self.known[group] = torch.stack([_largest(f"{s}.weight", self.source.load(f"{s}.weight")) for s in group]).amax()
        return self.known[group]


def _quantize_matrix(
    w: Tensor, name: str, fmt: Format, amax: Tensor | None, importance: Tensor | None, device: str
) -> tuple[dict[str, Tensor], float]:
    """The stored tensors of W [N, K], and their relative error. Every format's rows depend on one another through `amax` only."""
    _largest(name, w)
    n, k = w.shape
    codes = torch.empty(n, k, dtype=torch.uint8)
    scales, zeros, last = [], [], None
    error = norm = 0.0
    rows = max(1, (BLOCK_CPU if device == "cpu" else BLOCK_GPU) // k)
    for start in range(0, n, rows):
        block = w[start : start + rows].to(device)
        last = fmt.quantize(block, None if amax is None else amax.to(device), importance)
        codes[start : start + rows] = last.codes.cpu()
        scales.append(last.scale.cpu())
        if last.zero_point is not None:
            zeros.append(last.zero_point.cpu())
        exact = block.to(torch.float32)
        norm += float(exact.square().sum())
        error += float((last.dequantize() - exact).square_().sum())
    factor = None if last.global_scale is None else last.global_scale.cpu()
    whole = QuantizedTensor(last.code, codes, torch.cat(scales), torch.cat(zeros) if zeros else None, factor)
    return fmt.store(whole), (error / norm) ** 0.5 if norm else 0.0


def check_device(device: str) -> None:
    """Raises ValueError for a device that cannot be used here."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"device {device!r} cannot be used here: {str(e).splitlines()[0]}") from None
