"""A layer map for a budget: which matrices are chosen for, what each may be stored as, and the choice.

Candidates.of    which matrices, which formats; every reason to refuse
sensitivities    what each format costs in each of them (sensitivity.py)
choose           the formats of least predicted KL within the budget (budget.py), as an assignment that layer_map.to_yaml writes
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from qplugins.checkpoints.budget import spend
from qplugins.checkpoints.quantize import Layer, plan
from qplugins.checkpoints.reader import Checkpoint
from qplugins.formats import ALIASES, BF16, Format, get_format
from qplugins.layer_map import PRESET_IGNORE, Assignment, LayerMap, Module, Rule, match

# 4.12, 4.25, 4.31, 4.5, 4.62, 8 and 16 bits
FORMATS = ("int4_g128", "int4_g64", "int4_g64_asym", "nvfp4", "int4_g32_asym", "int8", "bf16")


@dataclass(frozen=True)
class Candidates:
    """layers   every matrix of the model, as quantize.plan lists them
    options  name -> formats, of the matrices that are chosen for
    dtypes   name -> dtype of those matrices, which their scales may have too
    rest     bytes of all else in the checkpoint
    """

    layers: tuple[Layer, ...]
    options: Mapping[str, tuple[Format, ...]]
    dtypes: Mapping[str, torch.dtype]
    rest: int

    @classmethod
    def of(cls, source: Checkpoint, formats: Sequence[str], ignore: Sequence[str] = (), embeddings: bool = False) -> "Candidates":
        """Every linear layer, in each of the formats that can store it; not what presets ignore, but the output head with `embeddings`.

        Raises CheckpointError for a source that is damaged or quantized already; ValueError for an unknown format, one that is only read,
        an `ignore` that matches nothing, and a matrix that none of the formats can store.
        """
        known = tuple(get_format(name) for f in dict.fromkeys(formats) for name in ALIASES.get(f, (f,)))
        for fmt in known:
            if fmt.quantized and fmt.quantize is None:
                raise ValueError(f"{fmt.name} can only be read, since its input scale comes from calibration; take fp8 instead")
        ignored = [t for t in PRESET_IGNORE if not (embeddings and match(t, "lm_head", "Linear"))]
        # quantized ones first: a rule takes the first format that fits
        rule = Rule(("Linear", "Embedding") if embeddings else ("Linear",), tuple(sorted(known, key=lambda f: not f.quantized)))
        layer_map = LayerMap((rule,), (*ignored, *ignore), strict=False)
        planned = plan(source, layer_map)
        for target in ignore:
            if not any(match(target, x.name, x.kind) for x in planned.layers):
                raise ValueError(f"--ignore {target!r} matches no module of this model")
        options = {
            x.name: tuple(f for f in known if f.refuses(x.n, x.k) is None) for x in planned.layers if layer_map.rule_for(x.name, x.kind)
        }
        dtypes = {m.name: m.dtype or torch.bfloat16 for m in source.modules() if m.name in options}
        rest = planned.nbytes_after - sum(x.nbytes_after for x in planned.layers if x.name in options)
        return cls(planned.layers, options, dtypes, rest)

    @property
    def chosen_for(self) -> list[Layer]:
        return [x for x in self.layers if x.name in self.options]

    @property
    def weights(self) -> int:
        """How many numbers the matrices that are chosen for have."""
        return sum(x.n * x.k for x in self.chosen_for)

    def sizes(self, layer: Layer) -> list[int]:
        """Bytes of a matrix in each of its formats, scales included, as `quantize` writes it."""
        return [
            f.nbytes(layer.n, layer.k, self.dtypes[layer.name]) if f.quantized else layer.nbytes_before for f in self.options[layer.name]
        ]


@dataclass(frozen=True)
class Choice:
    """assignment  every matrix of the model, those that were not chosen for in bf16
    kl      predicted, nats a token: the sum over matrices
    bits    bits a weight of the matrices that were chosen for, scales included, a 16-bit one counted as 16
    nbytes  of all tensors of the checkpoint that this makes
    """

    assignment: Assignment
    kl: float
    bits: float
    nbytes: int


def choose(
    candidates: Candidates, costs: Mapping[str, Mapping[str, float]], *, bits: float | None = None, nbytes: int | None = None
) -> Choice:
    """The choice of least predicted KL with at most `bits` bits a weight in the matrices chosen for, or `nbytes` bytes of all tensors.

    costs  name -> format -> nats a token, of `sensitivities`
    Raises ValueError for a budget below the smallest possible, which it names, and for costs that are not finite.
    """
    if (bits is None) == (nbytes is None):
        raise ValueError("a budget is either bits a weight or bytes")
    layers = candidates.chosen_for
    sizes = [candidates.sizes(x) for x in layers]
    budget = math.floor(bits * candidates.weights / 8) if bits is not None else nbytes - candidates.rest
    least = sum(map(min, sizes))
    if budget < least:
        formats = ", ".join(dict.fromkeys(f.name for options in candidates.options.values() for f in options))
        if bits is not None:
            smallest = f"{math.ceil(8000 * least / candidates.weights) / 1000:g} bits a weight"
        else:
            smallest = f"{least + candidates.rest:,} bytes, of which {candidates.rest:,} are not chosen for"
        given = f"{bits:g} bits a weight" if bits is not None else f"{nbytes:,} bytes"
        raise ValueError(f"a budget of {given} is too small: the least that {formats} come to is {smallest}")
    losses = [[costs[x.name][f.name] for f in candidates.options[x.name]] for x in layers]
    for layer, loss in zip(layers, losses, strict=True):
        if not all(map(math.isfinite, loss)):
            raise ValueError(
                f"{layer.name}: its costs are {', '.join(f'{x:g}' for x in loss)}, so the model overflowed; measure in bfloat16 or float32"
            )
    found = spend(losses, sizes, budget)
    formats = {x.name: candidates.options[x.name][j] for x, j in zip(layers, found, strict=True)}
    modules = tuple(Module(x.name, x.kind, x.n, x.k) for x in candidates.layers)
    used = sum(size[j] for size, j in zip(sizes, found, strict=True))
    return Choice(
        Assignment(modules, tuple(formats.get(m.name, BF16) for m in modules)),
        sum(loss[j] for loss, j in zip(losses, found, strict=True)),
        8 * used / candidates.weights,
        candidates.rest + used,
    )
