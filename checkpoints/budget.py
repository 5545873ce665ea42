"""Spending a budget of bytes where it buys most: one format for each matrix, such that the sum of losses is least and the sum of sizes fits.

That is the multiple-choice knapsack problem. With a price y for a byte, each item alone takes the option of least loss + y * size, and

    L(y) = sum_i min_j (loss_ij + y * size_ij) - y * budget

is at most the loss of any choice that fits (Lagrangian relaxation; Kellerer, Pferschy and Pisinger, Knapsack Problems, chapter 11). At the best
price, which is the slope of the convex hull where a greedy walk down the items' hulls runs out of budget, that walk itself fits and is worse
than L by less than one step. An option whose excess loss_ij + y * size_ij - min exceeds that gap is in no better choice. What survives, a few options
of a few items, is enumerated exactly: item by item, keeping the choices so far that no other one beats in both size and loss.
"""

from collections.abc import Sequence

import numpy as np

# A choice is accepted when no other can have a smaller loss by more than this part of it: far below what predicted losses are good for.
TOLERANCE = 1e-5


def spend(losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The option of each item: of all choices whose sizes add up to at most `budget`, the one of least total loss. Deterministic.

    losses, sizes  for each item, its options' losses and sizes
    Raises ValueError, naming the least possible total, when even the smallest options exceed the budget.
    """
    hulls = [_hull(loss, size) for loss, size in zip(losses, sizes, strict=True)]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(size[j] for size, j in zip(sizes, chosen, strict=True))
    if left < 0:
        raise ValueError(f"the smallest choice has {budget - left:,} bytes, the budget is {budget:,}")

    # the walk down the hulls, steepest step first; a step that is too large ends its item's walk, and others go on
    steps = [
        ((losses[i][a] - losses[i][b]) / (sizes[i][b] - sizes[i][a]), i, a, b)
        for i, hull in enumerate(hulls)
        for a, b in zip(hull, hull[1:], strict=False)
    ]
    price = None
    for slope, i, a, b in sorted(steps, key=lambda step: (-step[0], step[1])):
        if chosen[i] == a and (more := sizes[i][b] - sizes[i][a]) <= left:
            chosen[i] = b
            left -= more
        elif price is None:
            price = slope
    # without a price, every item has its best
    return chosen if price is None else _improve(losses, sizes, budget, price, chosen)


def _hull(loss: Sequence[float], size: Sequence[int]) -> list[int]:
    """Options on the lower convex hull, from the smallest on: each step down in loss costs more a nat than the one before."""

    def slope(a: int, b: int) -> float:
        return (loss[a] - loss[b]) / (size[b] - size[a])

    hull: list[int] = []
    for j in sorted(range(len(loss)), key=lambda j: (size[j], loss[j], j)):
        if hull and loss[j] >= loss[hull[-1]]:
            continue
        # the last one goes when the straight way past it is at least as steep as the way to it
        while len(hull) > 1 and slope(hull[-2], j) >= slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(j)
    return hull


def _improve(losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int, price: float, start: list[int]) -> list[int]:
    """The best choice, given one that fits and a price at which few options are worth a look."""
    total = sum(loss[j] for loss, j in zip(losses, start, strict=True))
    priced = [np.asarray(loss, dtype=np.float64) + price * np.asarray(size) for loss, size in zip(losses, sizes, strict=True)]
    excess = [p - p.min() for p in priced]
    gap = total - (sum(float(p.min()) for p in priced) - price * budget) - TOLERANCE * total
    if gap <= 0:
        return start
    worth = [np.flatnonzero(e <= gap) for e in excess]
    ends = [(min(size[j] for j in options), max(size[j] for j in options)) for size, options in zip(sizes, worth, strict=True)]
    least, most = (sum(e) for e in zip(*ends, strict=True))  # of the items still to come

    # choices so far, as arrays: their size, the excess over L(price), and at each item the option and the choice it was added to
    size, over = np.zeros(1, dtype=np.int64), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for i, options in enumerate(worth):
        least, most = least - ends[i][0], most - ends[i][1]
        parent, option = (a.ravel() for a in np.meshgrid(np.arange(len(size)), options, indexing="ij"))
        new_size = size[parent] + np.asarray(sizes[i], dtype=np.int64)[option]
        new_over = over[parent] + excess[i][option]
        unspent = price * np.maximum(0, budget - most - new_size)
        keep = np.flatnonzero((new_over + unspent <= gap) & (new_size + least <= budget))
        # among those of one size the least loss, and then only what is better than everything smaller; loss and excess differ by price * size
        loss = new_over - price * new_size
        keep = keep[np.lexsort((loss[keep], new_size[keep]))]
        best = np.minimum.accumulate(np.r_[np.inf, loss[keep]])[:-1]
        keep = keep[loss[keep] < best]
        if not len(keep):
            return start
        size, over = new_size[keep], new_over[keep]
        trail.append((parent[keep], option[keep]))
    # the loss itself: L(price) counts what is left of the budget at its price
    at, chosen = int(np.argmin(over - price * size)), []
    for parent, option in reversed(trail):
        chosen.append(int(option[at]))
        at = int(parent[at])
    return min(start, chosen[::-1], key=lambda c: sum(loss[j] for loss, j in zip(losses, c, strict=True)))
