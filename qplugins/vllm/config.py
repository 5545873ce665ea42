"""vLLM's `QuantizationConfig`s: `qplugins` for checkpoints that are quantized, `qplugins-<preset>` for quantizing while loading.

Both hold a layer map and answer one question, which method a layer gets; they differ in where the map comes from and in the method.
"""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_safetensors_params_metadata

from qplugins import experts, serving
from qplugins.kv_map import KVMap
from qplugins.layer_map import LayerMap
from qplugins.vllm import moe
from qplugins.vllm.linear import EmbeddingMethod, LinearMethod, OnlineLinearMethod

# under vLLM's own logger, whose handlers and level then apply
logger = init_logger("vllm.qplugins")


class MappedConfig(serving.Mapped, QuantizationConfig):
    """A layer map at work in a vLLM model."""

    tied_head = False

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        dtypes = [torch.bfloat16, torch.float16]
        return [*dtypes, torch.float32] if current_platform.is_cpu() else dtypes

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """vLLM's own methods have no use for the order of columns that act-order stores, and so its default drops it (`.g_idx`)."""
        return WeightsMapper()

    def apply_vllm_mapper(self, hf_to_vllm_mapper) -> None:
        """Renames the map's targets as the model renames its modules. Fusing is not renaming: a map names the parts."""
        fields = {f.name for f in dataclasses.fields(hf_to_vllm_mapper)}
        renames = dataclasses.replace(hf_to_vllm_mapper, **({"orig_to_new_stacked": {}} if "orig_to_new_stacked" in fields else {}))

        self.layer_map = serving.rename(self.layer_map, renames.map_name)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
        self.tied_head = bool(getattr(text, "tie_word_embeddings", False))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            return self.quantized_linear(prefix) or UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            return self.embedding_method(layer, prefix)
        if isinstance(layer, RoutedExperts):
            return self.experts_method(layer, prefix)
        return None

    def experts_method(self, layer: RoutedExperts, prefix: str) -> moe.ExpertsMethod | None:
        names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        names = experts.leaves(self.layer_map, prefix, names)
        if not experts.quantizes(self.layer_map, prefix, names, layer.global_num_experts):
            return None
        if reason := moe.refuses(layer):
            raise serving.refused_experts(prefix, reason)
        return moe.ExpertsMethod(layer.moe_config, self.layer_map, prefix, names, self.plain)


class CheckpointConfig(MappedConfig):
    """A quantized checkpoint, ours or another producer's."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__()
        if config is None:
            raise serving.plain_checkpoint()
        self.layer_map = LayerMap.from_config(config)
        self.kv_map = KVMap.from_config(config)
        self.quantized_embedding: str | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CheckpointConfig":
        return cls(config)

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None) -> str | None:
        """Takes a quantized checkpoint over when the user named this method, and only then."""
        if user_quant != "qplugins":
            return None
        serving.check_producer(hf_quant_cfg, "vLLM")
        if warning := serving.unused_kv_scheme(hf_quant_cfg):
            logger.warning_once(warning)
            serving.forget_kv_scheme(hf_quant_cfg)
        return "qplugins"

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Also checks the whole checkpoint, by its headers, before anything of it is loaded. One still on a hub is checked while loading; what it
        stores plainly is looked up before."""
        super().maybe_update_config(model_name, hf_config, revision)
        if not Path(model_name).is_dir():
            self.layer_map = self.layer_map.without(serving.plain_matrices(get_safetensors_params_metadata(model_name, revision=revision)))
        else:
            from qplugins.checkpoints.reader import Checkpoint, NoWeights

            # --load-format dummy needs none; without it vLLM's loader says what is not there
            with contextlib.suppress(NoWeights):
                self.layer_map = Checkpoint.open(model_name).check().served_map or self.layer_map

    def linear_method(self, names: list[str]) -> LinearMethod:
        return LinearMethod(self.layer_map, names)

    def embedding_method(self, layer: VocabParallelEmbedding, prefix: str) -> EmbeddingMethod | None:
        if isinstance(layer, ParallelLMHead):
            if self.tied_head:  # no matrix of its own: what the embedding is, it is
                return EmbeddingMethod(self.layer_map, self.quantized_embedding, "Embedding") if self.quantized_embedding else None
            return EmbeddingMethod(self.layer_map, prefix, "Linear") if self.layer_map.rule_for(prefix, "Linear") else None
        prefix = prefix or self.embedding_name()
        if self.layer_map.rule_for(prefix, "Embedding") is None:
            return None
        self.quantized_embedding = prefix
        return EmbeddingMethod(self.layer_map, prefix, "Embedding")

    def embedding_name(self) -> str:
        """Of a model that does not tell its embedding's name (Llama): the one that the map speaks of, or the usual one."""
        targets = (t for rule in self.layer_map.rules for t in rule.targets)
        return next((t for t in targets if t.endswith("embed_tokens") and not t.startswith("re:")), "model.embed_tokens")


class OnlineConfig(serving.Online, MappedConfig):
    """A plain checkpoint, quantized by a preset as each layer arrives."""

    def __reduce__(self) -> tuple:
        # vLLM sends it to its other processes, which find no class of this name in any module
        return _restore, (self.preset, self.__dict__)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        super().maybe_update_config(model_name, hf_config, revision)
        text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
        self.layer_map = LayerMap.preset(self.preset, text.num_hidden_layers)

    def linear_method(self, names: list[str]) -> OnlineLinearMethod:
        return OnlineLinearMethod(self.layer_map, names)


@functools.cache
def online_config(preset: str) -> type[OnlineConfig]:
    """The config class of one preset: vLLM builds it without arguments, so that each needs its own."""
    return type(f"OnlineConfig_{preset}", (OnlineConfig,), {"preset": preset})


def _restore(preset: str, state: dict[str, Any]) -> OnlineConfig:
    config = online_config(preset)()
    config.__dict__.update(state)
    return config
