"""vLLM's layer methods over `qplugins.layer.MixedLinear`. Tensors reach the parts of a layer through `qplugins.routers`."""

from collections.abc import Sequence

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import ModelWeightParameter

from qplugins.layer import MixedLinear, Shard, Span, has_bias, pad_rows, quantize_weight
from qplugins.layer_map import LayerMap
from qplugins.routers import add_routers, formats, remove_routers, shards

logger = init_logger("vllm.qplugins")


def spans(layer: LinearBase, input_size_per_partition: int, input_size: int, output_partition_sizes: Sequence[int]) -> list[Span]:
    """What this rank owns of each matrix of a vLLM layer."""
    rank = getattr(layer, "tp_rank", 0)
    size = getattr(layer, "tp_size", 1)
    start = rank * input_size_per_partition if isinstance(layer, RowParallelLinear) else 0
    columns = (start, start + input_size_per_partition)
    found = []
    for i, n in enumerate(output_partition_sizes):
        if not isinstance(layer, ColumnParallelLinear):
            found.append(Span(n, input_size, (0, n), columns))
            continue
        # k and v heads that are fewer than the ranks are held by several of them
        replicas = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and i > 0 else 1
        mine = rank // replicas
        found.append(Span(n * size // replicas, input_size, (mine * n, (mine + 1) * n), columns))
    return found


def log(layer: torch.nn.Module, plan: str) -> None:
    """Which implementation runs each part of a layer, at debug level."""
    logger.debug("%s: %s", getattr(layer, "prefix", ""), plan)


def leave_weight(layer: torch.nn.Module, dtype: torch.dtype) -> None:
    """An empty `weight`, no parameter, for those in vLLM who ask for its device (LoRA), whether there is one (MLA, which then multiplies by the
    identity), or whether it is another's too (EAGLE)."""
    device = next((p.device for p in layer.mixed.parameters()), torch.get_default_device())  # a tied head's embedding may come after it
    layer.weight = torch.empty(0, dtype=dtype, device=device)


class LinearMethod(LinearMethodBase):
    """A layer of a quantized checkpoint. names: the checkpoint's module names of its matrices."""

    def __init__(self, layer_map: LayerMap, names: Sequence[str]) -> None:
        self.layer_map, self.names = layer_map, names
        self.load_format = get_current_vllm_config().load_config.load_format

    def create_weights(self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **attrs):
        parts = spans(layer, input_size_per_partition, input_size, output_partition_sizes)
        self.dtype = params_dtype
        found = formats(self.layer_map, self.names, parts)
        layer.mixed = MixedLinear(shards(self.names, found, parts, params_dtype))
        add_routers(layer, layer.mixed)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if self.load_format == "dummy":
            layer.mixed.load_random()
        remove_routers(layer, layer.mixed)
        log(layer, layer.mixed.finish(dtype=self.dtype, bias=has_bias(layer)))
        leave_weight(layer, self.dtype)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.mixed(x, bias)


class EmbeddingMethod(QuantizeMethodBase):
    """A quantized embedding table, or an output head. Rows are padded as vLLM pads the vocabulary."""

    def __init__(self, layer_map: LayerMap, name: str, kind: str) -> None:
        self.layer_map, self.name, self.kind = layer_map, name, kind
        self.load_format = get_current_vllm_config().load_config.load_format

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
        own = layer.shard_indices
        rows = (own.org_vocab_start_index, own.org_vocab_end_index)
        span = Span(layer.org_vocab_size, input_size, rows, (0, input_size))
        layer.mixed = MixedLinear([Shard(self.name, self.layer_map.format_for(self.name, self.kind, *span.shape), span, params_dtype)])
        add_routers(layer, layer.mixed)

    def process_weights_after_loading(self, layer: VocabParallelEmbedding) -> None:
        if getattr(layer, "tied", False):
            leave_weight(layer, layer.params_dtype)
            return
        if self.load_format == "dummy":
            layer.mixed.load_random()
        (shard,) = layer.mixed.shards
        matrix = pad_rows(shard.matrix(), layer.num_embeddings_per_partition)
        remove_routers(layer, layer.mixed)
        layer.mixed.shards = torch.nn.ModuleList()
        log(layer, layer.mixed.finish([matrix], dtype=layer.params_dtype))
        leave_weight(layer, layer.params_dtype)

    def tie_weights(self, layer: VocabParallelEmbedding, embed_tokens: VocabParallelEmbedding) -> VocabParallelEmbedding:
        remove_routers(layer, layer.mixed)
        layer.mixed, layer.tied = embed_tokens.mixed, True
        return layer

    def apply(self, layer: VocabParallelEmbedding, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.mixed(x, bias)

    def embedding(self, layer: VocabParallelEmbedding, input_: Tensor) -> Tensor:
        return layer.mixed.embedding(input_, layer.params_dtype)


@register_weight_loader_v2_supported_method
class OnlineLinearMethod(LinearMethodBase):
    """A layer of a plain checkpoint. Its 16-bit weight exists only from the moment its last part has arrived until it is quantized."""

    uses_meta_device = True

    def __init__(self, layer_map: LayerMap, names: Sequence[str]) -> None:
        self.layer_map, self.names = layer_map, names

    def create_weights(self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **attrs):
        parts = spans(layer, input_size_per_partition, input_size, output_partition_sizes)
        layer.formats, layer.sizes = formats(self.layer_map, self.names, parts), list(output_partition_sizes)
        weight = torch.empty(sum(output_partition_sizes), input_size_per_partition, device="meta", dtype=params_dtype)
        layer.register_parameter(
            "weight", ModelWeightParameter(data=weight, input_dim=1, output_dim=0, weight_loader=attrs["weight_loader"])
        )
        layer.mixed = MixedLinear()
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if layer.mixed.plan:
            return
        weight = layer.weight.data
        del layer.weight
        log(layer, layer.mixed.finish(quantize_weight(weight, layer.sizes, layer.formats), weight.dtype, has_bias(layer)))
        leave_weight(layer, weight.dtype)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.mixed(x, bias)
