"""SGLang's method for the routed experts of a layer, over `qplugins.experts.MixedExperts`.

SGLang chooses the experts of each token before it comes here, and adds shared experts and other ranks' parts afterwards. It calls an expert
of another rank -1.
"""

import logging
from collections.abc import Sequence

import torch
from sglang.srt.layers.moe import get_moe_a2a_backend, get_moe_runner_backend
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase
from sglang.srt.runtime_context import get_server_args

from qplugins import experts
from qplugins.experts import MixedExperts, add_routers, parts, remove_routers, spans
from qplugins.layer_map import LayerMap
from qplugins.sglang.linear import Method

logger = logging.getLogger(__name__)


def refuses(layer: FusedMoE) -> str | None:
    """What is not computed here of a layer's experts, to follow "these experts"; None where all is."""
    config, args, runner = layer.moe_runner_config, get_server_args(), get_moe_runner_backend()
    if reason := experts.refuses(
        gated=config.is_gated,
        activation=config.activation,
        biases=layer.with_bias,
        limits=(config.gemm1_alpha, config.gemm1_clamp_limit, config.swiglu_limit),
        weighs_input=config.apply_router_weight_on_input,
    ):
        return reason
    if config.no_combine:
        return "are not added up where they are computed"
    if args.enable_eplb or args.ep_num_redundant_experts or args.init_expert_location != "trivial":
        return "have other places than their own (--enable-eplb, --ep-num-redundant-experts, --init-expert-location)"
    if layer.num_fused_shared_experts:
        return "have shared ones among them (--disable-shared-experts-fusion parts them)"
    if not get_moe_a2a_backend().is_none():
        return "are reached another way (--moe-a2a-backend)"
    if not (runner.is_auto() or runner.is_triton()):
        return "have a kernel of their own (--moe-runner-backend)"
    return None


class ExpertsMethod(Method, FusedMoEMethodBase):
    """prefix  the layer's name, with a dot, a number, a dot and one of `leaves` that of a matrix in the checkpoint
    leaves  what the checkpoint calls gate, up and down
    plain   whether the checkpoint is not quantized, and its experts are when they arrive
    """

    runner = None  # of SGLang's own kernels

    def __init__(self, layer_map: LayerMap, prefix: str, leaves: Sequence[str], dummy: bool, plain: bool) -> None:
        super().__init__(layer_map, [prefix], dummy)
        self.prefix, self.leaves, self.plain = prefix, leaves, plain

    def create_weights(self, layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **attrs):
        own = spans(hidden_size, intermediate_size_per_partition, layer.moe_tp_rank, layer.moe_tp_size)
        every, local = range(layer.num_experts), layer._map_global_expert_id_to_local_expert_id
        layer.mixed = MixedExperts(
            [f"{self.prefix}.{e}" for e in every if local(e) >= 0],
            parts(self.layer_map, self.prefix, self.leaves, len(every), own),
            layer.moe_runner_config.activation,
            params_dtype,
            self.plain,
        )
        add_routers(layer, layer.mixed, local)

    def create_moe_runner(self, layer: FusedMoE, moe_runner_config) -> None:
        """There is none: `apply` computes."""

    def process_weights_after_loading(self, layer: FusedMoE) -> None:
        if self.dummy:
            layer.mixed.load_random()
        remove_routers(layer, layer.mixed)
        logger.debug("%s: %s", self.prefix, layer.mixed.finish())

    def apply(self, layer: torch.nn.Module, dispatch_output) -> StandardCombineInput:
        chosen = dispatch_output.topk_output
        y = layer.mixed(dispatch_output.hidden_states, chosen.topk_weights, chosen.topk_ids)
        # where there is no GPU, models do this themselves
        if (factor := layer.moe_runner_config.routed_scaling_factor) is not None and y.is_cuda:
            y *= factor
        return StandardCombineInput(hidden_states=y)
