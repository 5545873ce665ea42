"""A Hugging Face checkpoint folder, known by its headers.

    config.json                      what the model is, and in `quantization_config` which module is stored how
    hf_quant_config.json             the latter, where ModelOpt wrote it and config.json does not say
    model.safetensors.index.json     tensor name -> file, where there is more than one file
    *.safetensors                    8 bytes header size, a JSON header {name: dtype, shape, offsets}, then the tensors' bytes

`Checkpoint.open` reads the JSON and the headers of the tensors' files: names, dtypes and shapes of a large model in well under a second. That
is enough for `check` to find nearly everything that can be wrong with a checkpoint, before a weight is read and a GPU is filled.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qplugins.formats import BF16, FOREIGN, FORMATS, PRODUCERS, TILES, CheckpointError, Format, producer
from qplugins.layer_map import LayerMap, Module, is_name

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MODELOPT = "hf_quant_config.json"

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip

QUANTIZATION_KEYS = ("quantization_config", "compression_config")

# A checkpoint does not say what class a module has. Matrices whose name ends in one of these are looked up by row; all others are "Linear".
EMBEDDINGS = (
    "embed_tokens", "word_embeddings", "token_embeddings", "tok_embeddings", "embed_in", "wte", "embeddings", "embedding", "shared",
    "embed_tokens_per_layer", "embed_positions", "position_embeddings", "position_embedding", "token_type_embeddings", "wpe",
)  # fmt: skip

# ModelOpt's AWQ also scales the input by column, which nothing here does: such a layer must not pass for one without
_PARAMS = {p.name for f in (*FORMATS.values(), *FOREIGN.values(), *TILES.values()) for p in f.params} | {"pre_quant_scale"}
_NUMBERED = re.compile(r"(.*-)(\d{5})-of-(\d{5})\.safetensors")


class NoWeights(CheckpointError):
    """A folder that holds a config, perhaps, and no weights at all."""


@dataclass(frozen=True)
class Entry:
    """One tensor, as a file's header describes it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape)


@dataclass(frozen=True)
class StoredModule(Module):
    """A matrix of a checkpoint: its name, class, rows and columns, its format, and the tensors that hold it.

    tensors  parameter name ("weight_scale") -> the tensor's entry; its full name is `f"{name}.{parameter}"`
    """

    format: Format = BF16
    tensors: Mapping[str, Entry] = field(default_factory=dict, repr=False)

    @property
    def nbytes(self) -> int:
        return sum(e.nbytes for e in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype | None:
        """The 16- or 32-bit float dtype that the module brings along: its weight's, or its scales'. None where it has neither."""
        return next((e.dtype for e in self.tensors.values() if e.dtype in (torch.bfloat16, torch.float16)), None)


def kind_of(name: str) -> str:
    """The class of a matrix, by its name: "Embedding" or "Linear"."""
    return "Embedding" if name.rsplit(".", 1)[-1] in EMBEDDINGS else "Linear"


def is_head(name: str) -> bool:
    """Whether a module of that name is a language model's output head, maybe one inside of a larger model."""
    return name.rpartition(".")[2] == "lm_head"


@dataclass(frozen=True)
class Checkpoint:
    """path; config: config.json; tensors: name -> Entry, in the order of the files."""

    path: Path
    config: dict[str, Any] = field(repr=False)
    tensors: dict[str, Entry] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Reads config.json, the index and every file's header.

        Raises CheckpointError when one of them is missing, truncated or not what it should be, or when index and files disagree.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a folder; a checkpoint is a folder with config.json and safetensors files")
        config = _read_json(path / "config.json")
        index = _read_json(path / INDEX).get("weight_map") if (path / INDEX).exists() else None
        if index is not None and not isinstance(index, dict):
            raise CheckpointError(f"{path / INDEX}: expected a weight_map of tensor names to file names, found {type(index).__name__}")
        files = _files(path) if index is None else sorted({str(f) for f in index.values()})
        tensors: dict[str, Entry] = {}
        for file in files:
            if not (path / file).exists():
                raise CheckpointError(f"{path / file} is missing, {INDEX} names it; download or copy the checkpoint again")
            for name, entry in _read_header(path / file).items():
                if index is None and name in tensors:
                    raise CheckpointError(f"{name}: is in {tensors[name].file.name} and in {file}, and there is no {INDEX} to choose")
                if index is None or index.get(name, file) == file:
                    tensors[name] = entry
        for name, file in (index or {}).items():
            if name not in tensors:
                raise CheckpointError(f"{name}: {INDEX} places it in {path / file}, which does not have it; download the checkpoint again")
        return cls(path, config, tensors)

    def load(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor, or its rows from `rows[0]` up to `rows[1]`, backed by the file's pages until it is changed.

        Raises CheckpointError when there is none of that name.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{name}: missing in {self.path}")
        try:
            with safe_open(self.tensors[name].file, "pt") as f:
                return f.get_tensor(name) if rows is None else f.get_slice(name)[rows[0] : rows[1]]
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{name}: cannot be read from {self.tensors[name].file}: {e}") from e

    def load_module(self, module: StoredModule) -> dict[str, Tensor]:
        """All of a module's tensors, by parameter name."""
        return {p: self.load(f"{module.name}.{p}") for p in module.tensors}

    @property
    def nbytes(self) -> int:
        return sum(e.nbytes for e in self.tensors.values())

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of the config; all of it, where the model is nothing else."""
        return self.config.get("text_config") or self.config

    @property
    def num_layers(self) -> int:
        """Decoder layers, as the config has it, or else as the tensors' names do."""
        declared = self.text_config.get("num_hidden_layers") or self.text_config.get("n_layer")
        return declared or 1 + max((int(m[1]) for t in self.tensors if (m := re.search(r"\blayers\.(\d+)\.", t))), default=-1)

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding, and no matrix of its own: as the language model's config has it, which is what engines go by."""
        declared = self.text_config.get("tie_word_embeddings", self.config.get("tie_word_embeddings"))
        return declared if declared is not None else not any(is_head(t.rpartition(".")[0]) for t in self.tensors)

    @cached_property
    def _quantization(self) -> tuple[Path, Mapping[str, Any]]:
        """The file that says how modules are stored, and what it says; empty where none does."""
        where = self.path / "config.json"
        config = next((c for of in (self.config, self.text_config) for key in QUANTIZATION_KEYS if (c := of.get(key))), {})
        beside = self.path / MODELOPT
        # where layers differ, older versions of ModelOpt list them in its own file only
        incomplete = config.get("quant_algo") == "MIXED_PRECISION" and "quantized_layers" not in config
        if (not config or incomplete) and beside.exists():
            return beside, {"quant_method": "modelopt", **_read_json(beside)}
        return where, config

    @property
    def quantization_config(self) -> Mapping[str, Any]:
        """Which module is stored how, in its producer's words; empty for a checkpoint that is not quantized."""
        return self._quantization[1]

    @cached_property
    def layer_map(self) -> LayerMap | None:
        """Of the quantization_config; None where there is none. Raises CheckpointError for one that cannot be read."""
        where, config = self._quantization
        if not config:
            return None
        if (method := producer(config)) not in ("compressed-tensors", *PRODUCERS):
            known = ", ".join(PRODUCERS)
            raise CheckpointError(f"{where}: expected quant_method compressed-tensors, {known}; found {method!r}, which is not read here")
        try:
            return LayerMap.from_config(config)
        except ValueError as e:
            raise CheckpointError(f"{where}: {e}") from None

    @property
    def served_map(self) -> LayerMap | None:
        """The layer map, for engines: matrices that are stored plainly are ignored by their names.

        A config need not name what it leaves alone (AutoGPTQ's does not), or may by an expression, which means nothing where an engine's model has
        other names; and here it can be seen.
        """
        if self.layer_map is None:
            return None
        return self.layer_map.without(m.name for m in self.modules() if not m.format.quantized)

    @cached_property
    def _grouped(self) -> dict[str, dict[str, Entry]]:
        """Module name -> parameter name -> entry, of every module that has a matrix or a part of a quantized one."""
        groups: dict[str, dict[str, Entry]] = {}
        for name, entry in self.tensors.items():
            module, _, param = name.rpartition(".")
            if param in _PARAMS:
                groups.setdefault(module, {})[param] = entry
        return {m: g for m, g in groups.items() if _quantized_part(g) or ("weight" in g and len(g["weight"].shape) == 2)}

    def _format(self, name: str, group: Mapping[str, Entry]) -> Format:
        rule = self.layer_map.rule_for(name, kind_of(name)) if self.layer_map else None
        if (part := _quantized_part(group)) is None:
            # a class is a guess here, and a plain matrix shows that it was wrong: routers and position tables need not be under `ignore`
            return BF16 if rule is None or not rule.named(name) else rule.formats[0]
        if rule is None:
            why = "config.json has no quantization_config" if self.layer_map is None else "no target of quantization_config matches it"
            e = group[part]
            raise CheckpointError(
                f"{name}.{part}: expected a weight that is not quantized, since {why}, found {e.dtype} {list(e.shape)}; "
                f"add {name} to the targets of its config group"
            )
        return rule.formats[0]

    @cached_property
    def _modules(self) -> tuple[StoredModule, ...]:
        modules = []
        for name, group in self._grouped.items():
            fmt = self._format(name, group)
            codes, shape = fmt.params[0], fmt.infer_shape(group)
            if codes.name in group and shape is None:
                tiles = f" in tiles of {list(codes.tile)}" if codes.tile else ""
                raise CheckpointError(f"{name}.{codes.name}: expected a matrix{tiles}, found shape {list(group[codes.name].shape)}")
            n, k = shape or (0, 0)
            fmt.check(name, group, n, k)
            known = {p.name for p in fmt.params}
            for p in group:
                if p not in known and not p.startswith("input"):
                    raise CheckpointError(f"{name}.{p}: a layer in {fmt.name} has no such tensor, only {', '.join(sorted(known))}")
            modules.append(StoredModule(name, kind_of(name), n, k, fmt, {p: e for p, e in group.items() if p in known}))
        return tuple(modules)

    def modules(self) -> tuple[StoredModule, ...]:
        """Every matrix, with its format: all 2-D `weight`s and all quantized layers.

        Raises CheckpointError where a module's tensors are not those of its format: one missing, or of a wrong dtype or shape.
        """
        return self._modules

    def check(self) -> "Checkpoint":
        """Raises CheckpointError unless this is a checkpoint that can be loaded, as far as headers tell. Returns itself.

        The message names the file or tensor, what was expected, what was found, and what to do.
        """
        modules = self.modules()
        present = {m.name for m in modules}
        for rule in self.layer_map.rules if self.layer_map else ():
            for target in rule.targets:
                if is_name(target) and target not in present and target not in self.layer_map.ignore:
                    raise CheckpointError(
                        f"{target}: quantization_config stores it as {rule.formats[0].name}, but {self.path} has no tensor of it; "
                        "the checkpoint is incomplete, or its config.json is another one's"
                    )
        return self


def _quantized_part(group: Mapping[str, Entry]) -> str | None:
    """The name of a parameter that only a quantized layer has; None where the group is a plain matrix."""
    for name, entry in group.items():
        if name != "weight" or not entry.dtype.is_floating_point or entry.dtype.itemsize == 1:
            return name
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a checkpoint is a folder with config.json and safetensors files") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{path}: expected JSON, found {e}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def _files(path: Path) -> list[str]:
    """The safetensors files of a folder without an index."""
    if (path / SINGLE).exists():
        return [SINGLE]
    files = sorted(f.name for f in path.glob("*.safetensors"))
    if not files:
        pickles = sorted(f.name for suffix in ("bin", "pt", "pth") for f in path.glob(f"*.{suffix}"))
        if pickles:
            raise CheckpointError(
                f"{path} has {pickles[0]} and no safetensors file; only safetensors are read, since unpickling runs code. Load the model with "
                "transformers and save_pretrained it, or take the model's safetensors revision"
            )
        raise NoWeights(f"{path} has no safetensors file; a checkpoint is a folder with config.json and safetensors files")
    for file in files:
        if m := _NUMBERED.fullmatch(file):
            for i in range(1, int(m[3]) + 1):
                if (part := f"{m[1]}{i:05d}-of-{m[3]}.safetensors") not in files:
                    raise CheckpointError(f"{path / part} is missing, {file} is one of {int(m[3])}; download or copy the checkpoint again")
    return files


def _read_header(file: Path) -> dict[str, Entry]:
    with file.open("rb") as f:
        if f.read(23) == b"version https://git-lfs":
            raise CheckpointError(f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull`")
    try:
        with safe_open(file, "pt") as f:
            described = {name: (s.get_dtype(), tuple(s.get_shape())) for name in f.offset_keys() for s in (f.get_slice(name),)}
    except (SafetensorError, OSError) as e:
        raise CheckpointError(
            f"{file}: {file.stat().st_size} bytes, truncated or no safetensors file ({e}); download or copy it again"
        ) from None
    for name, (dtype, _) in described.items():
        if dtype not in DTYPES:
            raise CheckpointError(f"{name}: {file} has it as {dtype}; dtypes that are read are {', '.join(DTYPES)}")
    return {name: Entry(file, DTYPES[dtype], shape) for name, (dtype, shape) in described.items()}
