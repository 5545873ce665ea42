"""The Triton kernel's own layout as a checkpoint's: what `--packed` stores, so that loading a layer on a GPU repacks nothing.

    weight_tiles        int16 [N / 64, K / tile, 1024]          a tile is 64 rows of 64 columns of 4-bit codes, or of 32 of 8-bit ones
    weight_row_scale    [N]                                     float32; the scale in its own dtype where a row has but one
    weight_tile_scales  [K / span, N / 64, 32, 2 * s]           span: the columns of a group or of a tile, whichever are more; s groups lie in it
    weight_tile_zeros   int16 [K / span, N / 64, 32, 2 * s]     zero points
    weight_columns      int32 [K]                               which column of W each column of the tiles is, only with act-order

`kernels/linear/layout.py` says where in a tile a code stands, and how scales are written: e4m3 and e8m0 as bytes of its own, 16-bit ones divided
by a power of two that is in the row's scale. Rows are padded to whole tiles; K is not, so that the shapes in a file's header tell N and K. A rank's
slice is whole tiles. Each of these formats is a weight-only one (its `twin`) in another layout, with the same values. Formats that round a layer's input
run by other kernels on GPUs that have them, and keep their own layout.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qplugins.formats.base import Format, Param
from qplugins.kernels.linear.layout import INTEGERS, LOCKS, TILE_N, Weight, named, pack, scales_per_tile, tile_k, unpack
from qplugins.kernels.linear.spec import SCALES, Spec
from qplugins.kernels.quantized import QuantizedTensor

STORAGE = "qplugins-tiles"
VERSION = 1  # of the layout: whatever moves a bit of it makes another one
NAMES = {
    "codes": "weight_tiles",
    "row": "weight_row_scale",
    "scale": "weight_tile_scales",
    "zero": "weight_tile_zeros",
    "columns": "weight_columns",
}
"""What a checkpoint calls the tensors of a `Weight`. Locks are zeros, made at load."""


def refuses(storage: str) -> str | None:
    """Why a checkpoint in tiles of another version is not read, as a sentence; None for the name of any other storage."""
    if not storage.startswith(STORAGE):
        return None
    return (
        f"the checkpoint is packed as {storage}, and this qplugins reads {STORAGE}-v{VERSION}; with the qplugins that wrote it, "
        "`qplugins convert CKPT OUT` writes the layout that all versions read"
    )


def _spec(twin: Format, tensors: Mapping[str, Tensor], n: int, k: int) -> Spec:
    """The twin's, with the scales' own dtype where the format leaves a choice."""
    spec = twin.spec(n, k)
    if spec.scale in ("e4m3", "e8m0"):
        return spec
    dtype = tensors[NAMES["row"] if twin.group_size is None else NAMES["scale"]].dtype
    return replace(spec, scale=next(name for name, d in SCALES.items() if d == dtype))


def _weight(tensors: Mapping[str, Tensor], n: int, k: int, twin: Format) -> Weight:
    def words(t: Tensor) -> Tensor:
        """[R, tiles, 32, 2 * s] -> integers [R, N' / 2]"""
        return t.view(INTEGERS[t.shape[-1] * t.element_size()]).flatten(1)

    own = {name: tensors[stored] for name, stored in NAMES.items() if stored in tensors}
    own |= {name: words(own[name]) for name in ("scale", "zero") if name in own}
    codes = own.pop("codes")
    locks = torch.zeros(codes.shape[0] * LOCKS, dtype=torch.int32, device=codes.device)
    return Weight("triton", _spec(twin, tensors, n, k), (codes, own.pop("row").to(torch.float32), locks, *own.values()))


def _store(q: QuantizedTensor, twin: Format) -> dict[str, Tensor]:
    w = pack(q, "triton")
    own = named("triton", w.spec, w.tensors)
    tiles = own["codes"].shape[0]
    dtypes = {"scale": torch.uint8 if w.spec.scale in ("e4m3", "e8m0") else q.scale.dtype, "zero": torch.int16}
    own |= {name: own[name].view(d).view(own[name].shape[0], tiles, TILE_N // 2, -1) for name, d in dtypes.items() if name in own}
    if twin.group_size is None:
        own["row"] = own["row"].to(q.scale.dtype)  # which is what it was
    return {stored: own[name] for name, stored in NAMES.items() if name in own}


def _problem(tensors: Mapping[str, Tensor], n: int, k: int) -> str | None:
    name = NAMES["columns"]
    if name in tensors and not tensors[name].sort().values.equal(torch.arange(k, dtype=torch.int32, device=tensors[name].device)):
        return f"{name}: expected each of the columns 0..{k - 1} once, found others"
    return None


def _tiles(twin: Format) -> Format:
    shape = Spec(TILE_N, 256, twin.code, "bf16", twin.group_size)  # of any matrix in this format
    columns, group = tile_k(shape), twin.group_size
    span = group and max(group, columns)
    of_groups = {"per": (TILE_N, span), "axes": (1, 0), "tile": (TILE_N // 2, 2 * scales_per_tile(shape))}
    stored = next(p for p in twin.params if p.name == "weight_scale")
    params = [
        Param(NAMES["codes"], torch.int16, (TILE_N, columns), tile=(1024,)),
        Param(NAMES["row"], torch.float32 if group else None, (1, None), axes=(0,), writes=stored.writes),
    ]
    if group:
        params.append(Param(NAMES["scale"], None if stored.dtype is None else torch.uint8, **of_groups))
    if twin.spec(TILE_N, 256).zero_point:
        params.append(Param(NAMES["zero"], torch.int16, **of_groups))
    if twin.permuted:
        params.append(Param(NAMES["columns"], torch.int32, (None, 1), axes=(1,)))
    return Format(
        f"tiles_{twin.name}",
        params=tuple(params),
        scheme={**twin.scheme, "format": f"{STORAGE}-v{VERSION}"},
        code=twin.code,
        group_size=group,
        quantize=twin.quantize,
        store=lambda q: _store(q, twin),
        read=lambda tensors, n, k: unpack(_weight(tensors, n, k, twin)),
        weight=lambda tensors, n, k: _weight(tensors, n, k, twin),
        problem=_problem,
        twin=twin,
        permuted=twin.permuted,
    )


def in_tiles(formats: tuple[Format, ...]) -> tuple[Format, ...]:
    """Those of `formats` that the tiles can hold, in that layout."""
    return tuple(_tiles(f) for f in formats if f.quantized and f.scheme and not f.scheme["input_activations"])
