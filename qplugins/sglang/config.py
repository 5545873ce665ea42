"""SGLang's `QuantizationConfig`s: `qplugins` for checkpoints that are quantized, `qplugins-<preset>` for quantizing while loading.

Both hold a layer map and answer one question, which method a layer gets; they differ in where the map comes from and in the method.
SGLang builds a config from its dictionary alone; what else it needs to know, `bind` tells it, a hook behind `get_quant_config`.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from qplugins import experts, serving
from qplugins.layer_map import LayerMap
from qplugins.sglang import moe
from qplugins.sglang.linear import EmbeddingMethod, LinearMethod, OnlineLinearMethod

logger = logging.getLogger(__name__)


class MappedConfig(serving.Mapped, QuantizationConfig):
    """A layer map at work in an SGLang model."""

    dummy = False

    def bind(self, model_config, load_config, packed_modules_mapping: Mapping[str, Sequence[str]]) -> None:
        """Tells the config what it serves, before a layer is built."""
        self.packed_modules_mapping = dict(packed_modules_mapping or {})
        self.dummy = getattr(load_config.load_format, "value", load_config.load_format) == "dummy"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        dtypes = [torch.bfloat16, torch.float16]
        return dtypes if torch.cuda.is_available() else [*dtypes, torch.float32]

    def get_scaled_act_names(self) -> list[str]:
        return []

    def apply_weight_name_mapper(self, hf_to_sglang_mapper) -> None:
        """Renames the map's targets as the model renames its modules. Fusing is not renaming: a map names the parts."""

        def renamed(name: str) -> str | None:
            return next(iter(hf_to_sglang_mapper.apply_list([name])), None)

        self.layer_map = serving.rename(self.layer_map, renamed)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if prefix.startswith("layers."):  # Mixtral's code forgets what its layers are in
            prefix = f"model.{prefix}"
        if isinstance(layer, LinearBase):
            return self.quantized_linear(prefix) or UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            return self.embedding_method(layer, prefix)
        if isinstance(layer, FusedMoE):
            return self.experts_method(layer, prefix)
        return None

    def experts_method(self, layer: FusedMoE, prefix: str) -> moe.ExpertsMethod | None:
        leaves = experts.leaves(self.layer_map, prefix)
        if not experts.quantizes(self.layer_map, prefix, leaves, layer.num_experts):
            return None
        if reason := moe.refuses(layer):
            raise serving.refused_experts(prefix, reason)
        return moe.ExpertsMethod(self.layer_map, prefix, leaves, self.dummy, self.plain)


class CheckpointConfig(MappedConfig):
    """A quantized checkpoint, ours or another producer's."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__()
        if config is None:
            raise serving.plain_checkpoint()
        self.layer_map = LayerMap.from_config(config)
        if warning := serving.unused_kv_scheme(config):
            logger.warning(warning)
        self.unseen: set[str] = set()
        self.stored: list[str] = []
        self.built: dict[str, bool] = {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CheckpointConfig":
        return cls(config)

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: dict[str, Any], user_quant: str | None) -> str | None:
        """Takes a quantized checkpoint over when the user named this method, and only then."""
        if user_quant != "qplugins":
            return None
        serving.check_producer(hf_quant_cfg, "SGLang")
        return "qplugins"

    @staticmethod
    def describe(model_config) -> None:
        """Lets the model's config say how a checkpoint is stored where only ModelOpt's own file does, which SGLang reads for its own methods."""
        from qplugins.checkpoints.reader import MODELOPT, Checkpoint

        if (Path(model_config.model_path) / MODELOPT).is_file():
            model_config.hf_config.quantization_config = dict(Checkpoint.open(model_config.model_path).quantization_config)

    def bind(self, model_config, load_config, packed_modules_mapping) -> None:
        """Also checks the whole checkpoint, by its headers, before anything of it is loaded. One still on a hub is checked while loading; what it
        stores plainly is looked up before."""
        super().bind(model_config, load_config, packed_modules_mapping)
        if self.dummy:
            return
        if not Path(model_config.model_path).is_dir():
            self.layer_map = self.layer_map.without(self.plain_on_hub(model_config.model_path, getattr(model_config, "revision", None)))
        else:
            from qplugins.checkpoints.reader import Checkpoint

            checkpoint = Checkpoint.open(model_config.model_path).check()
            self.layer_map = checkpoint.served_map or self.layer_map
            quantized = [m for m in checkpoint.modules() if m.format.quantized]
            self.unseen = {m.name for m in quantized if m.kind == "Embedding" or m.name == "lm_head"}
            self.stored = [m.name for m in quantized if m.name not in self.unseen]

    @staticmethod
    def plain_on_hub(model: str, revision: str | None) -> list[str]:
        """Names of the matrices that a checkpoint on a hub stores plainly; none, with a warning, where the hub does not answer."""
        import huggingface_hub

        try:
            files = huggingface_hub.get_safetensors_metadata(model, revision=revision).files_metadata.values()
        except Exception as e:  # there are many ways in which a hub does not answer
            logger.warning("what %s stores plainly, and its config does not say, cannot be looked up: %s", model, e)
            return []
        return serving.plain_matrices({name: vars(tensor) for file in files for name, tensor in file.tensors.items()})

    def check_model(self) -> None:
        """Once the model is built, before it is loaded: SGLang only logs a tensor that has no place in it, and goes on."""
        if self.unseen:
            raise ValueError(
                f"{', '.join(sorted(self.unseen))}: the checkpoint stores this quantized, and SGLang's model code builds it without a "
                "quantization method; leave it in 16 bits, by naming it under ignore when quantizing"
            )
        if problem := serving.nothing_quantized(self.stored, self.built):
            raise ValueError(problem)

    def quantized_linear(self, prefix: str) -> LinearMethod | None:
        method = super().quantized_linear(prefix)
        if method is not None and prefix.endswith(".kv_b_proj"):
            raise ValueError(
                f"{prefix}: SGLang takes this matrix apart, and knows only its own layouts of it; name it under ignore when quantizing"
            )
        self.built[prefix] = method is not None
        return method

    def experts_method(self, layer: FusedMoE, prefix: str) -> moe.ExpertsMethod | None:
        method = super().experts_method(layer, prefix)
        self.built[prefix] = method is not None
        return method

    def linear_method(self, names: list[str]) -> LinearMethod:
        return LinearMethod(self.layer_map, names, self.dummy)

    def embedding_method(self, layer: VocabParallelEmbedding, prefix: str) -> EmbeddingMethod | None:
        kind = "Linear" if isinstance(layer, ParallelLMHead) else "Embedding"
        self.unseen.discard(prefix)
        if self.layer_map.rule_for(prefix, kind) is None:
            return None
        return EmbeddingMethod(self.layer_map, prefix, kind, self.dummy)


class OnlineConfig(serving.Online, MappedConfig):
    """A plain checkpoint, quantized by a preset as each layer arrives."""

    def bind(self, model_config, load_config, packed_modules_mapping) -> None:
        super().bind(model_config, load_config, packed_modules_mapping)
        self.layer_map = LayerMap.preset(self.preset, model_config.num_hidden_layers)

    def linear_method(self, names: list[str]) -> OnlineLinearMethod:
        return OnlineLinearMethod(self.layer_map, names, self.dummy)


def online_config(preset: str) -> type[OnlineConfig]:
    """The config class of one preset: SGLang builds it without arguments, so that each needs its own."""
    return type(f"OnlineConfig_{preset}", (OnlineConfig,), {"preset": preset})
