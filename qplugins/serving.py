"""What the configs of both adapters do and say alike: a layer map at work, the names that it knows a layer's matrices by, and the refusals at
start-up."""

import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from qplugins.formats import PRODUCERS, modelopt, producer
from qplugins.kv_map import KVMap
from qplugins.layer_map import PRESETS, LayerMap, is_name

# Models that fuse need not say so, or say it too late; one that does, as where a checkpoint's qkv is fused already, is believed.
PACKED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj_with_mqa": ["q_a_proj", "kv_a_proj_with_mqa"],
}


class Mapped:
    """A layer map at work in an engine's model. To stand before the engine's QuantizationConfig among the bases of a class.

    layer_map               names as the engine's model has them
    packed_modules_mapping  the engine's table of the model's fused layers
    plain                   whether the checkpoint is not quantized, and its layers are while they load
    """

    layer_map: LayerMap
    packed_modules_mapping: Mapping[str, Sequence[str]]
    plain = False

    def get_name(self) -> str:
        return "qplugins"

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def linear_method(self, names: list[str]) -> Any:
        """The engine's method for a layer of the matrices `names`."""
        raise NotImplementedError

    def embedding_method(self, layer: Any, prefix: str) -> Any:
        """The engine's method for an embedding or output head; None leaves it to the engine."""
        return None

    def quantized_linear(self, prefix: str) -> Any:
        """The engine's method for a linear layer; None where the map has a format for none of its matrices."""
        names = part_names(self.packed_modules_mapping, prefix)
        return self.linear_method(names) if any(self.layer_map.rule_for(name) for name in names) else None


class Online(Mapped):
    """A plain checkpoint, quantized by a preset as each layer arrives. A class for each preset: engines build it without arguments."""

    preset: str
    plain = True

    def get_name(self) -> str:
        return f"qplugins-{self.preset}"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Online":
        """For a checkpoint that is quantized already: raises ValueError."""
        raise ValueError(
            f"--quantization qplugins-{cls.preset} quantizes plain checkpoints; this one has a quantization_config. Use --quantization qplugins."
        )

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None) -> None:
        """Takes nothing over. Raises ValueError where the user named this preset for a quantized checkpoint."""
        if user_quant == f"qplugins-{cls.preset}":
            cls.from_config(hf_quant_cfg)


def part_names(packed: Mapping[str, Sequence[str]], prefix: str) -> list[str]:
    """The names that a map knows the matrices of an engine's layer by: q_proj, k_proj, v_proj for qkv_proj.

    packed: the engine's table of fused layers
    """
    parent, _, leaf = prefix.rpartition(".")
    return [f"{parent}.{part}" if parent else part for part in (PACKED | dict(packed)).get(leaf) or [leaf]]


def rename(layer_map: LayerMap, renamed: Callable[[str], str | None]) -> LayerMap:
    """The map with its module names as the engine's model has them, and as they were: an engine's table of names may be one for tensors only.

    renamed  takes a weight's name, and gives None for one that is dropped
    """

    def target(name: str) -> str:
        return (renamed(f"{name}.weight") or f"{name}.weight").removesuffix(".weight") if is_name(name) else name

    return layer_map.rename(target)


def plain_matrices(metadata: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the modules that have a 16- or 32-bit matrix. metadata: name -> dtype and shape, as safetensors' headers have them."""
    return [
        name.removesuffix(".weight")
        for name, tensor in metadata.items()
        if name.endswith(".weight") and tensor.get("dtype") in ("F16", "BF16", "F32") and len(tensor.get("shape", ())) == 2
    ]


def nothing_quantized(stored: Sequence[str], built: Mapping[str, bool]) -> str | None:
    """A sentence, where an engine's model has a place for none of a checkpoint's quantized matrices: it would be served as it is initialized.

    stored  names of those matrices       built  the engine's layers and experts -> whether the map has a format for one of their matrices
    """
    numbered = [name for name in built if re.search(r"\blayers\.\d+\.", name)]
    # a draft model of one layer may be plain where the rest is not
    if not stored or any(built.values()) or len({re.search(r"\blayers\.(\d+)\.", name)[1] for name in numbered}) < 2:
        return None
    return (
        f"the checkpoint stores {len(stored)} matrices quantized, {stored[0]} the first, and the engine's model has a place for none of them: "
        f"it calls its layers like {numbered[0]}. Leave out --quantization qplugins, or name the layers as this model's code does"
    )


def plain_checkpoint() -> ValueError:
    """For --quantization qplugins on a checkpoint that is not quantized."""
    presets = [f"qplugins-{p}" for p in PRESETS]
    return ValueError(
        "--quantization qplugins serves quantized checkpoints, and this one has no quantization_config. "
        f"Quantize it while loading with one of --quantization {', '.join(presets)}, or once with `qplugins quantize`."
    )


def check_producer(quantization_config: Mapping, engine: str) -> None:
    """Raises ValueError for a quantized checkpoint in a layout that is not read here."""
    name = producer(quantization_config)
    if name not in ("compressed-tensors", "qplugins", *PRODUCERS):
        raise ValueError(
            f"--quantization qplugins reads checkpoints in the layouts of compressed-tensors, {', '.join(PRODUCERS)}; this one says quant_method "
            f"{name!r}. Leave --quantization out to serve it by {engine}'s own methods."
        )


def unused_kv_scheme(quantization_config: Mapping) -> str | None:
    """A sentence, for a checkpoint whose KV scheme is none that is served here (FP8 with stored scales); None where there is none."""
    if algorithm := modelopt.settings(quantization_config).get("kv_cache_quant_algo"):
        return (
            f"the checkpoint's kv_cache_quant_algo ({algorithm}) and its scales are not used: the KV cache has the dtype that "
            "--kv-cache-dtype names"
        )
    scheme = quantization_config.get("kv_cache_scheme")
    if not scheme or KVMap.from_config(quantization_config).default is not None:
        return None
    return (
        f"the checkpoint's kv_cache_scheme ({scheme.get('num_bits')} bits, {scheme.get('type', 'int')}) and its scales are not used: "
        "the KV cache has the dtype that --kv-cache-dtype names"
    )


def forget_kv_scheme(quantization_config: MutableMapping) -> None:
    """Takes an unused KV scheme out of a config: vLLM's `auto` would take its dtype, of ModelOpt's checkpoints, and know none of its scales."""
    for of in (quantization_config, modelopt.settings(quantization_config)):
        of.pop("kv_cache_quant_algo", None)
        of.pop("kv_cache_scheme", None)


def refused_experts(prefix: str, reason: str) -> ValueError:
    """For experts that a map quantizes and nothing here computes. reason: what they are or do."""
    return ValueError(
        f"{prefix}: these experts {reason}, and such are not served quantized here. Leave them in 16 bits: name them under ignore in a map "
        "for `qplugins quantize`."
    )


def untested(engine: str, version: str, tested: tuple[tuple[int, ...], tuple[int, ...]]) -> str | None:
    """A sentence when an engine's version is not from the first to the last of `tested`, or does not say; None when it is."""
    found = re.match(r"\.".join([r"(\d+)"] * len(tested[0])), version)
    if found and tested[0] <= tuple(map(int, found.groups())) <= tested[1]:
        return None
    first, last = (".".join(map(str, t)) for t in tested)
    return f"qplugins was tested with {engine} {first} to {last}, this is {version}: it may still work, and `qplugins doctor` tells more"
