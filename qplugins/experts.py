"""The routed experts of a mixture as an engine builds them: of each expert three matrices, gate, up and down.

    y = sum over the experts that a token chose of   weight * down(act(gate x) * up x)

Engine-neutral, as layer.py is. All experts of a layer are computed together, so that gate has one format in all of them, and so have up and
down. A checkpoint brings them matrix by matrix, in any order. Each is packed for the kernel, or quantized first where the checkpoint is
plain, as soon as it is complete; `finish` then puts the experts of the layer one behind the other. What is in memory beside the result is so
the matrices that have begun to arrive, and for a moment the experts of one layer a second time.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qplugins.dispatch import Machine, choose
from qplugins.formats import BF16, CheckpointError, Format
from qplugins.kernels import linear, moe
from qplugins.kernels.linear import Weight
from qplugins.layer import Matrix, Shard, Span, quantize_weight
from qplugins.layer_map import LayerMap, check_experts
from qplugins.routers import add_router, formats

# Gate, up and down, as Mixtral's checkpoints have it and after them the loaders of both engines; gate and up are multiplied as one.
IDS = ("w1", "w3", "w2")
PRODUCTS = (("w1", "w3"), ("w2",))
# What checkpoints call them.
LEAVES = (("gate_proj", "up_proj", "down_proj"), IDS)


@dataclass(frozen=True)
class Part:
    """What all experts of a layer have alike of gate, up or down.

    leaf    its name within an expert, in the checkpoint
    format  what it is computed from
    span    what this rank has of it
    """

    leaf: str
    format: Format
    span: Span


def leaves(layer_map: LayerMap, prefix: str, usual: Sequence[str] | None = None) -> Sequence[str]:
    """What the checkpoint calls gate, up and down of the experts called `prefix`: the names that the map speaks of, or else the usual ones."""
    if usual is None:
        usual = LEAVES["block_sparse_moe" in prefix]

    def spoken_of(names: Sequence[str]) -> bool:
        rules = ((f"{prefix}.0.{leaf}", layer_map.rule_for(f"{prefix}.0.{leaf}")) for leaf in names)
        return any(rule is not None and rule.named(name) for name, rule in rules)

    return next((names for names in (usual, *LEAVES) if spoken_of(names)), usual)


def quantizes(layer_map: LayerMap, prefix: str, names: Sequence[str], experts: int) -> bool:
    """Whether a map has a format for any of the experts called `prefix`."""
    return any(layer_map.rule_for(f"{prefix}.{e}.{leaf}") for e in range(experts) for leaf in names)


def refuses(*, gated: bool, activation: str, biases: bool, limits: Iterable[float | None], weighs_input: bool) -> str | None:
    """What is not computed here of a layer's experts, to follow "these experts"; None where all is.

    limits  of their activation, None where there is none        weighs_input  whether the router's weight is a factor of the input
    """
    if not gated:
        return "have no gate"
    if activation not in moe.ACTIVATIONS:
        return f"have the activation {activation}"
    if biases:
        return "have biases"
    if any(limit is not None for limit in limits):
        return "bound their activation (swiglu_limit)"
    if weighs_input:
        return "take the router's weight on their input"
    return None


def parts(layer_map: LayerMap, prefix: str, names: Sequence[str], experts: int, spans: Sequence[Span]) -> dict[str, Part]:
    """Gate, up and down of the experts called `prefix`, by their ids. spans: what this rank has of them.

    Raises ValueError where experts differ in format, and for a format that cannot store what the rank has.
    """
    every = [f"{prefix}.{e}.{leaf}" for e in range(experts) for leaf in names]
    found = formats(layer_map, every, [*spans] * experts)
    check_experts(zip(every, found, strict=True))
    if permuted := next((name for name, fmt in zip(every, found, strict=True) if fmt.permuted), None):
        raise ValueError(
            f"{permuted}: experts whose groups have columns from everywhere (act-order, desc_act) are not served; quantize them without it"
        )
    return {i: Part(leaf, fmt, span) for i, leaf, fmt, span in zip(IDS, names, found, spans, strict=False)}


def spans(hidden_size: int, intermediate_size: int, rank: int, size: int) -> list[Span]:
    """What rank `rank` of `size` has of gate, up and down: the same `intermediate_size` rows of the first two, and columns of the third."""
    mine, whole = (rank * intermediate_size, (rank + 1) * intermediate_size), size * intermediate_size
    gate = Span(whole, hidden_size, mine, (0, hidden_size))
    return [gate, gate, Span(hidden_size, whole, (0, hidden_size), mine)]


class MixedExperts(nn.Module):
    """The experts of one layer that this rank has.

    names       theirs in the checkpoint: "model.layers.0.mlp.experts.3"
    parts       by id
    activation  a key of `moe.ACTIVATIONS`
    plain       whether the checkpoint is not quantized, so that matrices are when they arrive
    """

    def __init__(self, names: Sequence[str], parts: Mapping[str, Part], activation: str, dtype: torch.dtype, plain: bool = False) -> None:
        super().__init__()
        self.names, self.parts, self.activation, self.dtype, self.plain = list(names), dict(parts), activation, dtype, plain
        self.device = torch.get_default_device()
        self.arriving: dict[tuple[int, str], Shard] = {}
        self.packed: dict[tuple[str, ...], dict[int, list[Weight]]] = {ids: {} for ids in PRODUCTS}
        self.operands = nn.ParameterList()
        self.plans: list[str] = []

    def stored(self, part_id: str) -> Format:
        """What the checkpoint holds of a matrix."""
        return BF16 if self.plain else self.parts[part_id].format

    def load(self, param: str, tensor: Tensor, part_id: str, expert: int) -> None:
        """Takes one checkpoint tensor of the expert that is number `expert` of this rank's. Raises CheckpointError as `Shard.load` does."""
        tile = next((p.tile for p in self.stored(part_id).params if p.name == param), ())
        if tensor.ndim > 2 + len(tile):
            raise CheckpointError(
                f"{self.names[expert]}: the checkpoint has the experts of a layer joined in one tensor {list(tensor.shape)}; those that are "
                "served quantized are stored one by one"
            )
        ids = next(ids for ids in PRODUCTS if part_id in ids)
        if expert in self.packed[ids]:
            return  # what a matrix may lack, and nothing reads, behind all the rest of it
        self._shard(part_id, expert).load(param, tensor)
        if all((expert, i) in self.arriving and not self.arriving[expert, i].missing for i in ids):
            self.packed[ids][expert] = self._pack([self.arriving.pop((expert, i)) for i in ids], ids)

    def _shard(self, part_id: str, expert: int) -> Shard:
        if (expert, part_id) not in self.arriving:
            part = self.parts[part_id]
            with self.device:
                shard = Shard(f"{self.names[expert]}.{part.leaf}", self.stored(part_id), part.span, self.dtype)
            self.arriving[expert, part_id] = shard
        return self.arriving[expert, part_id]

    def _pack(self, shards: Sequence[Shard], ids: Sequence[str]) -> list[Weight]:
        """One expert's matrices for the kernel; those that run as one matrix are joined."""
        matrices = [shard.matrix() for shard in shards]
        if self.plain:
            rows = torch.cat([m.weight for m in matrices])
            matrices = quantize_weight(rows, [len(m.weight) for m in matrices], [self.parts[i].format for i in ids])
        return linear.fuse([self._pack_matrix(m) for m in matrices])

    def _pack_matrix(self, m: Matrix) -> Weight:
        return moe.pack(m.weight, choose(replace(m.spec, activation=None), Machine.of(self.device), self.dtype, "experts"))

    def load_random(self) -> None:
        """Random matrices, the same for all experts, in place of a checkpoint's."""
        for ids in PRODUCTS:
            shards = [self._shard(i, 0) for i in ids]
            for shard in shards:
                shard.load_random()
            self.packed[ids] = dict.fromkeys(range(len(self.names)), self._pack(shards, ids))
        self.arriving.clear()

    def finish(self) -> str:
        """Puts the experts together for the kernel. Returns the plans: which implementation runs which part.

        Raises CheckpointError for a tensor that has not been loaded, and ValueError when nothing here can run a part.
        """
        for expert in range(len(self.names)):
            for ids in PRODUCTS:
                if expert not in self.packed[ids]:
                    for i in ids:
                        self._shard(i, expert).matrix()  # says what is missing
        for ids in PRODUCTS:
            packed = self.packed.pop(ids)
            one_by_one = range(len(self.names))
            stacked = [moe.stack((packed[e][i] for e in one_by_one), len(self.names)) for i in range(len(packed[0]))]
            self.operands.extend(nn.Parameter(t, requires_grad=False) for w in stacked for t in w.tensors)
            self.plans.append(linear.plan([(w.implementation, w.spec) for w in stacked]))
        return " | ".join(self.plans)

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """x [T, K], topk_weights float32 [T, k], topk_ids [T, k] by this rank's numbering, -1 for another rank's -> [T, K]"""
        return moe.experts(x, topk_weights, topk_ids, list(self.operands), *self.plans, self.activation)


def add_routers(layer: nn.Module, experts: MixedExperts, local: Callable[[int], int]) -> None:
    """Router parameters, as in routers.py, under the names that engines' loaders give to experts' tensors: w13_weight_scale, w2_weight_scale.

    local  an expert's number among those of this rank, negative where it is another rank's
    """
    for name, dtype in _routers(experts).items():
        add_router(layer, name, dtype, _loader(experts, name.partition("_")[2], local))


def remove_routers(layer: nn.Module, experts: MixedExperts) -> None:
    for name in _routers(experts):
        delattr(layer, name)


def _routers(experts: MixedExperts) -> dict[str, torch.dtype]:
    return {f"{'w2' if i == 'w2' else 'w13'}_{p.name}": p.dtype or experts.dtype for i in IDS for p in experts.stored(i).params}


def _loader(experts: MixedExperts, stored: str, local: Callable[[int], int]) -> Callable:
    """The loader of one router. Engines call it by position or by these names."""

    def loader(param, loaded_weight, weight_name, shard_id, expert_id, return_success=False) -> bool | None:
        expert = local(expert_id)
        if expert >= 0:
            experts.load(stored, loaded_weight, shard_id, expert)
        return expert >= 0 if return_success else None

    loader.supports_moe_loading = True
    return loader
