"""Whether a checkpoint is sound: first what headers tell, then every value, then how far it is from the one it was made from.

`Checkpoint.check` looks at names, dtypes and shapes. Here the bytes are read: no NaN and no infinity in a float tensor, every scale finite
and positive, and with a source, for each matrix ||W_q - W|| / ||W||. Memory: one matrix in codes, and a block of its rows in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from qplugins.checkpoints.reader import Checkpoint, StoredModule, is_head
from qplugins.formats import CheckpointError
from qplugins.kernels.quantized import QuantizedTensor

BLOCK = 1 << 18  # elements in float32 at a time
# An error of 4 bits is near 0.1, and that of an unrelated matrix is near 1.4: above this, a layer is not the one it should be
UNRELATED = 0.5

Progress = Callable[[int, int, str], None]


@dataclass
class Verification:
    """problems  one sentence each, with the tensor's name; empty where the checkpoint is sound
    tensors   how many were read
    errors    module -> relative error against the source, worst first; only with a source
    formats   module -> its format's name
    """

    problems: list[str] = field(default_factory=list)
    tensors: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)

    @property
    def mean_error(self) -> float | None:
        """Mean over the quantized modules; None without a source."""
        quantized = [e for name, e in self.errors.items() if self.formats[name] != "bf16"]
        return sum(quantized) / len(quantized) if quantized else None


def verify(ckpt: str | Path, against: str | Path | None = None, *, progress: Progress | None = None) -> Verification:
    """Looks for everything wrong with a checkpoint, and compares it with the unquantized one that it was made from.

    progress  called after each tensor with (bytes done, bytes in all, the tensor's name)
    Problems are returned, not raised: of the structure the first, of the values all. A source that cannot be read raises CheckpointError.
    """
    result = Verification()
    source = None if against is None else Checkpoint.open(against).check()
    if source is not None and source.layer_map is not None:
        raise CheckpointError(f"{against} is quantized itself; give the checkpoint that {ckpt} was made from")
    try:
        checkpoint = Checkpoint.open(ckpt).check()
    except CheckpointError as e:
        result.problems.append(str(e))
        return result

    total, done = checkpoint.nbytes, 0
    for name, entry in checkpoint.tensors.items():
        if problem := _values_problem(name, checkpoint.load(name)):
            result.problems.append(problem)
        result.tensors += 1
        done += entry.nbytes
        if progress is not None:
            progress(done, total, name)
    for module in checkpoint.modules():
        result.formats[module.name] = module.format.name
        # what formats look at is small next to codes, which were read just now
        if problem := module.format.problem(checkpoint.load_module(module), module.n, module.k):
            result.problems.append(f"{module.name}.{problem}")
        if "weight_shape" in module.tensors:
            stored = checkpoint.load(f"{module.name}.weight_shape").tolist()
            if stored != [module.n, module.k]:
                result.problems.append(f"{module.name}.weight_shape: expected {[module.n, module.k]}, as the codes have it, found {stored}")
    if source is not None and not result.problems:
        _compare(checkpoint, source, result)
    return result


def _blocks(t: Tensor):
    return t.reshape(-1).split(BLOCK)


def _values_problem(name: str, t: Tensor) -> str | None:
    """What is wrong with the values of a tensor, as a sentence; None where nothing is.

    A block of zeros may have an e4m3 scale of zero. Integers with 16-bit scales may have negative ones: AutoRound takes the sign with which the largest
    weight is met by -8.
    """
    param = name.rpartition(".")[2]
    is_scale = param.endswith(("_scale", "_scale_2")) or param == "scales"
    if t.dtype == torch.uint8 and is_scale:
        bad = sum(int((b == 255).sum()) for b in _blocks(t))
        return f"{name}: {bad} of {t.numel()} e8m0 scales are 255, which is NaN" if bad else None
    if not t.dtype.is_floating_point:
        return None
    bad = zero = negative = 0
    for b in _blocks(t):
        b = b.to(torch.float32)
        bad += int((~b.isfinite()).sum())
        if is_scale:
            zero += int((b == 0).sum()) if t.element_size() > 1 else 0
            negative += int((b < 0).sum()) if t.element_size() != 2 else 0
    if bad:
        return f"{name}: expected finite values, found {bad} of {t.numel()} NaN or infinite"
    if zero or negative:
        return f"{name}: expected positive scales, of {t.numel()} found {zero} zero and {negative} negative"
    return None


def relative_error(checkpoint: Checkpoint, module: StoredModule, w: Tensor) -> float:
    """||W_q - W|| / ||W||, with W_q the module of the checkpoint and W [N, K] the matrix it should be."""
    stored = checkpoint.load_module(module)
    q = module.format.read(stored, module.n, module.k) if module.format.quantized else None
    error = norm = 0.0
    rows = max(1, BLOCK // module.k)
    for start in range(0, module.n, rows):
        part = slice(start, start + rows)
        exact = w[part].to(torch.float32)
        got = stored["weight"][part].to(torch.float32) if q is None else _rows(q, part).dequantize()
        error += float((got - exact).square_().sum())
        norm += float(exact.square().sum())
    return (error / norm) ** 0.5 if norm else error**0.5


def _rows(q: QuantizedTensor, part: slice) -> QuantizedTensor:
    return replace(q, codes=q.codes[part], scale=q.scale[part], zero_point=None if q.zero_point is None else q.zero_point[part])


def _compare(checkpoint: Checkpoint, source: Checkpoint, result: Verification) -> None:
    originals = {m.name: m for m in source.modules()}
    for module in checkpoint.modules():
        original = originals.get(module.name)
        if original is None:
            result.problems.append(f"{module.name}: {source.path} has no such matrix")
        elif (original.n, original.k) != (module.n, module.k):
            result.problems.append(
                f"{module.name}: expected {original.n} x {original.k}, as {source.path} has it, found {module.n} x {module.k}"
            )
        else:
            error = relative_error(checkpoint, module, source.load(f"{module.name}.weight"))
            result.errors[module.name] = error
            if not error < UNRELATED:
                result.problems.append(f"{module.name}: relative error {error:.3f} against {source.path}; it is not the same matrix")
    tied = {n for n in originals if checkpoint.tied and is_head(n)}
    result.problems += [f"{n}: missing; {source.path} has it" for n in originals.keys() - {m.name for m in checkpoint.modules()} - tied]
    result.errors = dict(sorted(result.errors.items(), key=lambda x: -x[1]))
