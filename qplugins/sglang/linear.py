"""SGLang's layer methods over `qplugins.layer.MixedLinear`. Tensors reach the parts of a layer through `qplugins.routers`."""

import logging
from collections.abc import Sequence
from functools import partial

import torch
from sglang.srt.layers.linear import ColumnParallelLinear, LinearBase, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.quantization.base_config import LinearMethodBase, QuantizeMethodBase
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from torch import Tensor

from qplugins.formats import BF16
from qplugins.layer import MixedLinear, Shard, Span, has_bias, pad_rows, quantize_weight
from qplugins.layer_map import LayerMap
from qplugins.routers import add_router, add_routers, formats, part_loader, remove_routers, shards
from qplugins.sglang import compat

logger = logging.getLogger(__name__)


def spans(layer: LinearBase, input_size_per_partition: int, input_size: int, output_partition_sizes: Sequence[int]) -> list[Span]:
    """What this rank owns of each matrix of an SGLang layer."""
    rank, size = compat.rank_and_size(layer)
    if not isinstance(layer, ColumnParallelLinear):
        start = rank * input_size_per_partition if isinstance(layer, RowParallelLinear) else 0
        return [Span(n, input_size, (0, n), (start, start + input_size_per_partition)) for n in output_partition_sizes]
    found = []
    for i, n in enumerate(output_partition_sizes):
        mine, ranks = rank, size
        if isinstance(layer, QKVParallelLinear) and i > 0:
            # k and v heads that are fewer than the ranks are held by several of them
            mine, ranks = compat.rank_and_size(layer, kv=True)
            mine, ranks = mine // layer.num_kv_head_replicas, ranks // layer.num_kv_head_replicas
        found.append(Span(n * ranks, input_size, (mine * n, (mine + 1) * n), (0, input_size)))
    return found


class Method(QuantizeMethodBase):
    """What all methods here do alike.

    names       the checkpoint's module names of the layer's matrices
    dummy       fill with random numbers what no checkpoint brings
    """

    def __init__(self, layer_map: LayerMap, names: Sequence[str], dummy: bool = False) -> None:
        self.layer_map, self.names, self.dummy = layer_map, list(names), dummy

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.mixed(x, bias)

    def restore_weights_before_loading(self, layer: torch.nn.Module) -> None:
        raise ValueError(
            f"{self.names[0]}: weights that qplugins serves cannot be replaced while serving; start the server again on the new checkpoint"
        )


class LinearMethod(Method, LinearMethodBase):
    """A layer of a quantized checkpoint."""

    def create_weights(self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **attrs):
        self.dtype = params_dtype
        parts = spans(layer, input_size_per_partition, input_size, output_partition_sizes)
        found = formats(self.layer_map, self.names, parts)
        layer.mixed = MixedLinear(shards(self.names, found, parts, params_dtype))
        add_routers(layer, layer.mixed)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if self.dummy:
            layer.mixed.load_random()
        remove_routers(layer, layer.mixed)
        logger.debug("%s: %s", ", ".join(self.names), layer.mixed.finish(dtype=self.dtype, bias=has_bias(layer)))


class EmbeddingMethod(Method):
    """A quantized embedding table, an output head, or both in one, which is how SGLang ties them. Rows are padded as it pads the vocabulary."""

    def __init__(self, layer_map: LayerMap, name: str, kind: str, dummy: bool = False) -> None:
        super().__init__(layer_map, [name], dummy)
        self.kind = kind

    def create_weights(
        self,
        layer: VocabParallelEmbedding,
        input_size_per_partition,
        output_partition_sizes,
        input_size,
        output_size,
        params_dtype,
        **attrs,
    ):
        self.dtype = params_dtype
        own = layer.shard_indices
        span = Span(layer.org_vocab_size, input_size, (own.org_vocab_start_index, own.org_vocab_end_index), (0, input_size))
        (name,) = self.names
        layer.mixed = MixedLinear([Shard(name, self.layer_map.format_for(name, self.kind, *span.shape), span, params_dtype)])
        add_routers(layer, layer.mixed)

    def process_weights_after_loading(self, layer: VocabParallelEmbedding) -> None:
        if self.dummy:
            layer.mixed.load_random()
        (shard,) = layer.mixed.shards
        matrix = pad_rows(shard.matrix(), layer.num_embeddings_per_partition)
        remove_routers(layer, layer.mixed)
        layer.mixed.shards = torch.nn.ModuleList()
        logger.debug("%s: %s", self.names[0], layer.mixed.finish([matrix], dtype=self.dtype))

    def embedding(self, layer: VocabParallelEmbedding, input_: Tensor) -> Tensor:
        return layer.mixed.embedding(input_, self.dtype)


class OnlineLinearMethod(Method, LinearMethodBase):
    """A layer of a plain checkpoint. Its 16-bit weight exists from the moment its first part arrives until its last one has."""

    def create_weights(self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **attrs):
        self.dtype, self.device = params_dtype, torch.get_default_device()
        self.parts = spans(layer, input_size_per_partition, input_size, output_partition_sizes)
        self.formats = formats(self.layer_map, self.names, self.parts)
        layer.mixed = MixedLinear()
        add_router(layer, "weight", params_dtype, part_loader(partial(self.load, layer), len(self.parts)))

    def allocate(self, mixed: MixedLinear) -> None:
        with self.device:
            mixed.shards.extend(shards(self.names, [BF16] * len(self.parts), self.parts, self.dtype))

    def load(self, layer: torch.nn.Module, tensor: Tensor, ids: Sequence[int]) -> None:
        if not layer.mixed.shards:
            self.allocate(layer.mixed)
        layer.mixed.load("weight", tensor, ids)
        if all(shard.loaded for shard in layer.mixed.shards):
            self.quantize(layer)

    def quantize(self, layer: torch.nn.Module) -> None:
        parts = [shard.matrix().weight for shard in layer.mixed.shards]
        layer.mixed.shards = torch.nn.ModuleList()
        weight = torch.cat(parts)
        sizes = [len(part) for part in parts]
        del parts
        logger.debug(
            "%s: %s", ", ".join(self.names), layer.mixed.finish(quantize_weight(weight, sizes, self.formats), self.dtype, has_bias(layer))
        )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if not layer.mixed.plan:
            if not layer.mixed.shards:
                self.allocate(layer.mixed)
            if self.dummy:
                layer.mixed.load_random()
            self.quantize(layer)  # names what is missing
        del layer.weight
