"""How much the square of an error in each column of a matrix counts: the sum of the squares of the layer's input there, over a text.

`formats/search.py` says why. Some thousand tokens are enough, since there is one number a column: 4,096 halve what nvfp4 costs SmolLM2-135M
(`bench/choose.py`).
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

LEAST = 1e-4  # of the mean over columns: what a text never uses, another may

Progress = Callable[[int, int, str], None]


@torch.no_grad()
def importance(
    model: nn.Module, names: Iterable[str], windows: Sequence[Sequence[int]], *, progress: Progress | None = None
) -> dict[str, Tensor]:
    """Name -> float32 [K] on the CPU, of those of `names` that the model runs as a linear layer; not of embeddings, or of experts that are joined.

    model     transformers' causal language model of the unquantized checkpoint
    windows   tokens, a window at a time
    progress  called after each window with (windows done, windows in all, "")
    Raises ValueError where the model's activations are not finite.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    sums: dict[str, Tensor] = {}

    def add(name: str, module: nn.Module, inputs: tuple) -> None:
        squares = inputs[0].to(torch.float32).square().flatten(0, -2).sum(0)
        sums[name] = sums[name].add_(squares) if name in sums else squares

    handles = [modules[name].register_forward_pre_hook(partial(add, name)) for name in names if name in modules]
    try:
        for i, window in enumerate(windows):
            model(input_ids=torch.tensor([list(window)], device=model.device), use_cache=False)
            if progress is not None:
                progress(i + 1, len(windows), "")
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, of in sums.items():
        if not of.isfinite().all():
            raise ValueError(f"{name}: its inputs are not finite, so the model overflowed; run it in bfloat16 or float32")
        found[name] = of.clamp_min(LEAST * of.mean()).cpu()
    return found
