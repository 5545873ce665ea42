"""vLLM's method for the routed experts of a layer, over `qplugins.experts.MixedExperts`.

vLLM chooses the experts of each token before it comes here, and adds shared experts and other ranks' parts afterwards.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase, RoutedExperts

from qplugins import experts
from qplugins.experts import MixedExperts, add_routers, parts, remove_routers, spans
from qplugins.layer_map import LayerMap

logger = init_logger("vllm.qplugins")


def refuses(layer: RoutedExperts) -> str | None:
    """What is not computed here of a layer's experts, to follow "these experts"; None where all is."""
    config = layer.moe_config
    if reason := experts.refuses(
        gated=config.is_act_and_mul,
        activation=config.activation.value,
        biases=config.has_bias,
        limits=(config.swiglu_limit, config.swiglu_alpha, config.swiglu_beta),
        weighs_input=layer.apply_router_weight_on_input,
    ):
        return reason
    parallel = config.moe_parallel_config
    if parallel.enable_eplb:
        return "move between ranks (--enable-eplb)"
    if parallel.use_all2all_kernels and not parallel.use_ag_rs_all2all_kernels:
        return f"are reached another way (--all2all-backend {parallel.all2all_backend}; allgather_reducescatter is what is served)"
    if config.is_lora_enabled:
        return "take adapters (--enable-lora)"
    if layer.expert_map_manager.num_fused_shared_experts:
        return "have shared ones among them"
    if type(layer) is not RoutedExperts:
        return f"are a model's own kind ({type(layer).__name__})"
    return None


class ExpertsMethod(FusedMoEMethodBase):
    """prefix  the layer's name, with a dot, a number, a dot and one of `names` that of a matrix in the checkpoint
    names   what the checkpoint calls gate, up and down
    plain   whether the checkpoint is not quantized, and its experts are when they arrive
    """

    def __init__(self, config: FusedMoEConfig, layer_map: LayerMap, prefix: str, names: Sequence[str], plain: bool) -> None:
        super().__init__(config)
        self.layer_map, self.prefix, self.names, self.plain = layer_map, prefix, names, plain
        self.load_format = get_current_vllm_config().load_config.load_format

    def create_weights(self, layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **attrs):
        own = spans(hidden_size, intermediate_size_per_partition, self.moe.tp_rank, self.moe.tp_size)
        every, local = range(layer.global_num_experts), layer.expert_map_manager.map_global_to_local
        mine = sorted((e for e in every if local(e) >= 0), key=local)
        layer.mixed = MixedExperts(
            [f"{self.prefix}.{e}" for e in mine],
            parts(self.layer_map, self.prefix, self.names, len(every), own),
            self.moe.activation.value,
            params_dtype,
            self.plain,
        )
        add_routers(layer, layer.mixed, local)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None  # vLLM's own kernels would ask for it

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        if self.load_format == "dummy":
            layer.mixed.load_random()
        remove_routers(layer, layer.mixed)
        logger.debug("%s: %s", self.prefix, layer.mixed.finish())

    def apply(
        self, layer: RoutedExperts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared_experts, shared_experts_input
    ) -> torch.Tensor:
        local = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids]
        return layer.mixed(x, topk_weights, local)
