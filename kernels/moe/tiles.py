"""Which blocks the experts' products are cut into: linear's table, asked about a layer like them.

All experts that somebody chose are together one tall matrix, each of whose rows meets the choices of one expert. So linear's table holds
for them: the rows of x are the choices that an expert has, and N is that of all these matrices, which decides whether they fill the GPU.

How many choices an expert has only the GPU knows; were they spread evenly, P / E. Few experts should need a second block, since that one
reads the expert's weights again, while a block that is half empty costs little: so a block has room for half as many more. Nothing here has
been timed yet.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from qplugins.kernels.linear import Spec, tiles
from qplugins.kernels.linear.tiles import Tile


def choose(choices: int, experts: int, specs: Sequence[Spec], device: torch.device) -> list[Tile]:
    """A tile for each shard of a layer. They have one block_m, since blocks of choices are made once for all of them."""
    rows = max(1, 3 * choices // (2 * experts))
    found = [tiles.choose(rows, replace(s, n=s.n * min(choices, experts)), device) for s in specs]
    # a plain matrix: 64 columns at a time, since 16-bit values take four times the shared memory that 4-bit codes do
    found = [replace(t, step=4) if s.code is None else t for t, s in zip(found, specs, strict=True)]
    return [replace(t, block_m=found[0].block_m) for t in found]
