"""Which module is stored in which format.

A layer map is a list of rules, each a few targets and a format; the first rule that matches a module decides, and a module that no rule
matches, or that `ignore` names, stays unquantized. Targets are those of compressed-tensors: a module's full name, the name of its class
("Linear", "Embedding"), or "re:" and a regular expression that the start of the full name must match.

    rules:
      - {targets: ["re:.*\\.layers\\.(0|1|28|29)\\."], format: fp8}
      - {targets: ["re:.*down_proj$"],                 format: int4}
      - {targets: [Linear],                            format: nvfp4}
    ignore: [lm_head]

Names are those of the checkpoint, one for each matrix: engines fuse q, k and v, a map never does.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from qplugins.formats import ALIASES, BF16, PRODUCERS, Format, any_format, format_of_scheme, get_format, producer

# Matrices that engines join to one, where they are siblings. vLLM and SGLang keep one global scale for the joined layer, so that these
# share one where they share a format.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)


# the first number in a name is that of its layer
_NUMBERED = re.compile(r"(?P<before>.*?\.)(?P<number>\d+)(?P<after>\..*)")


def fused_siblings(name: str) -> tuple[str, ...]:
    """The names that an engine joins with `name`, itself among them; `name` alone where it joins none."""
    parent, dot, last = name.rpartition(".")
    return next((tuple(parent + dot + part for part in parts) for parts in FUSED if last in parts), (name,))


# The experts of one layer, of which there may be hundreds, are computed together.
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")


def check_experts(formats: Iterable[tuple[str, Format]]) -> None:
    """Raises ValueError where experts of one layer differ in what gate, up or down is stored as. formats: (module name, format) pairs."""
    found: dict[tuple[str, str], dict[str, list[int]]] = {}
    for name, fmt in formats:
        if m := EXPERT.fullmatch(name):
            found.setdefault((m[1], m[3]), {}).setdefault(fmt.name, []).append(int(m[2]))
    for (experts, part), numbers in found.items():
        if len(numbers) > 1:
            told = " and ".join(f"{fmt} in {ranges(n)}" for fmt, n in numbers.items())
            raise ValueError(
                f"{experts}: {part} is {told}. The experts of a layer are computed together and share one format for {part}; other layers, "
                "and the other matrices of these experts, may have another"
            )


def ranges(numbers: Iterable[int]) -> str:
    """{0, 1, 2, 5} -> "0..2,5" """
    parts: list[list[int]] = []
    for i in sorted(set(numbers)):
        if parts and i == parts[-1][1] + 1:
            parts[-1][1] = i
        else:
            parts.append([i, i])
    return ",".join(str(a) if a == b else f"{a}..{b}" for a, b in parts)


def is_name(target: str) -> bool:
    """Whether a target is one module's name, and neither an expression nor a class."""
    return not target.startswith("re:") and ("." in target or target == "lm_head")


def match(target: str, name: str, kind: str) -> bool:
    """Whether a target means the module called `name`, of class `kind`."""
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target in (name, kind)


class _Targets:
    """The first of many targets that matches: names and classes by look-up, since a config may list every module of a large model."""

    def __init__(self, targets: Sequence[str]) -> None:
        self.plain: dict[str, int] = {}
        self.expressions: list[tuple[int, re.Pattern]] = []
        for i, target in enumerate(targets):
            if target.startswith("re:"):
                self.expressions.append((i, re.compile(target[3:])))
            else:
                self.plain.setdefault(target, i)

    def first(self, name: str, kind: str) -> int | None:
        found = [self.plain[key] for key in (name, kind) if key in self.plain]
        found += next(([i] for i, expression in self.expressions if expression.match(name)), [])
        return min(found, default=None)


@dataclass(frozen=True)
class Module:
    """A matrix that a map may speak of: its checkpoint name, its class, rows and columns."""

    name: str
    kind: str
    n: int
    k: int


@dataclass(frozen=True)
class Rule:
    """formats: in order of preference; the first that can store a module's shape is taken."""

    targets: tuple[str, ...]
    formats: tuple[Format, ...]

    def named(self, name: str) -> bool:
        """Whether a name or an expression means the module, rather than its class."""
        return any(match(t, name, "") for t in self.targets)

    def format_for(self, name: str, n: int, k: int) -> Format:
        """Raises ValueError when none of the rule's formats can store an n x k matrix."""
        reasons = []
        for fmt in self.formats:
            reason = fmt.refuses(n, k)
            if reason is None:
                return fmt
            reasons.append(reason)
        raise ValueError(f"{name}: {'; '.join(reasons)}. Give this layer another format, or name it under ignore")


@dataclass(frozen=True)
class Assignment:
    """A map applied to a model: every module's format."""

    modules: tuple[Module, ...]
    formats: tuple[Format, ...]

    def __iter__(self):
        return iter(zip(self.modules, self.formats, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of all modules, scales included."""
        return sum(f.nbytes(m.n, m.k) for m, f in self)

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight over all modules, scales included; a 16-bit module counts 16."""
        return 8 * self.nbytes / max(1, sum(m.n * m.k for m in self.modules))

    def counts(self) -> Counter[str]:
        """How many modules have each format."""
        return Counter(f.name for _, f in self)


class _RuleFile(BaseModel):
    model_config = ConfigDict(extra="forbid")
    targets: list[str]
    format: str


class _MapFile(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rules: list[_RuleFile]
    ignore: list[str] = []


def _formats(name: str) -> tuple[Format, ...]:
    return tuple(get_format(n) for n in ALIASES.get(name, (name,)))


@dataclass(frozen=True)
class LayerMap:
    """rules; ignore
    strict  whether an `ignore` that matches nothing is an error: a map file is written for one model, a preset for all of them
    """

    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()
    strict: bool = True

    def __post_init__(self) -> None:
        for target in (*self.ignore, *(t for r in self.rules for t in r.targets)):
            if target.startswith("re:"):
                try:
                    re.compile(target[3:])
                except re.error as e:
                    raise ValueError(f"target {target!r} is not a regular expression: {e}") from None

    @cached_property
    def _ignored(self) -> _Targets:
        return _Targets(self.ignore)

    @cached_property
    def _ruled(self) -> tuple[_Targets, list[Rule]]:
        pairs = [(t, r) for r in self.rules for t in r.targets]
        return _Targets([t for t, _ in pairs]), [r for _, r in pairs]

    def rename(self, renamed: Callable[[str], str]) -> "LayerMap":
        """The map with what `renamed` makes of each target before it."""

        def both(targets: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(dict.fromkeys(name for t in targets for name in (renamed(t), t)))

        return LayerMap(tuple(Rule(both(r.targets), r.formats) for r in self.rules), both(self.ignore), self.strict)

    def without(self, names: Iterable[str]) -> "LayerMap":
        """The map with these modules ignored too."""
        return replace(self, ignore=tuple(dict.fromkeys((*self.ignore, *names))))

    def rule_for(self, name: str, kind: str = "Linear") -> Rule | None:
        """The rule that decides on a module; None where it stays unquantized."""
        if self._ignored.first(name, kind) is not None:
            return None
        targets, rules = self._ruled
        first = targets.first(name, kind)
        return None if first is None else rules[first]

    def format_for(self, name: str, kind: str, n: int, k: int) -> Format:
        """The format of one module; bf16 where no rule matches. Raises ValueError when its rule cannot store that shape."""
        rule = self.rule_for(name, kind)
        return BF16 if rule is None else rule.format_for(name, n, k)

    def assign(self, modules: Sequence[Module], tied: Sequence[str] = ()) -> Assignment:
        """The map applied to all of a model's modules.

        tied  modules that are another one's matrix, as an lm_head may be the embedding's: they may be ignored, but have no format of their own
        Raises ValueError for a target that matches no module, in a rule or under `ignore`: it is a misspelling more often than not,
        and for experts of one layer in different formats.
        """
        for rule in (None, *self.rules):
            where = "ignore" if rule is None else f"the rule for {rule.formats[0].name}"
            for target in self.ignore if rule is None else rule.targets:
                if not any(match(target, m.name, m.kind) for m in modules):
                    shared = next((name for name in tied if match(target, name, "")), None)
                    if rule is None and (shared or not self.strict):
                        continue
                    if shared:
                        raise ValueError(
                            f"{where} gives {shared} a format, but in this model {shared} is tied to the embedding and has no matrix of its own: "
                            "give embed_tokens that format, or leave both unquantized"
                        )
                    names = ", ".join(m.name for m in modules[:3])
                    raise ValueError(f"target {target!r} in {where} matches no module of this model; its modules are named like {names}")
        formats = [self.format_for(m.name, m.kind, m.n, m.k) for m in modules]
        check_experts((m.name, fmt) for m, fmt in zip(modules, formats, strict=True))
        return Assignment(tuple(modules), tuple(formats))

    @classmethod
    def from_yaml(cls, path: str | Path) -> "LayerMap":
        """Reads a map file. Raises ValueError, naming the file and the place, when it is not one."""
        try:
            data = _MapFile.model_validate(yaml.safe_load(Path(path).read_text()))
            return cls(tuple(Rule(tuple(r.targets), _formats(r.format)) for r in data.rules), tuple(data.ignore))
        except ValidationError as e:
            places = "; ".join(f"{'.'.join(map(str, x['loc'])) or 'top level'}: {x['msg']}" for x in e.errors())
            raise ValueError(f"{path} is not a layer map: {places}") from None
        except (yaml.YAMLError, ValueError) as e:
            raise ValueError(f"{path} is not a layer map: {e}") from None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "LayerMap":
        """Of a `quantization_config`: compressed-tensors' or one of PRODUCERS.

        Where several of compressed-tensors' groups match a module, the more definite target wins, as in that library: a name before an
        expression before a class. Raises ValueError for what cannot be served: unknown schemes, transforms, sparsity, an uncompressed status.
        """
        if (name := producer(config)) in PRODUCERS:
            rules, ignored = PRODUCERS[name](config)
            return cls(tuple(Rule((target,), (fmt,)) for target, fmt in rules), tuple(ignored))
        for key in ("transform_config", "sparsity_config"):
            if (value := config.get(key)) and value.get("format") != "dense":
                raise ValueError(f"quantization_config has a {key}, which is not supported: {value}")
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise ValueError("quantization_config has no config_groups; the compressed-tensors layout has")
        by_rank: list[list[Rule]] = [[], [], []]
        for name, group in groups.items():
            try:
                fmt = format_of_scheme(group, config.get("format"))
                targets = group["targets"]
            except KeyError as e:
                raise ValueError(f"quantization_config, {name}: {e} is missing") from None
            except ValueError as e:
                raise ValueError(f"quantization_config, {name}: {e}") from None
            for target in targets:
                rank = 0 if is_name(target) else 1 if target.startswith("re:") else 2
                by_rank[rank].append(Rule((target,), (fmt,)))
        return cls(tuple(r for rules in by_rank for r in rules), tuple(config.get("ignore") or ()))

    @classmethod
    def preset(cls, name: str, num_layers: int) -> "LayerMap":
        """balanced: the first and last two layers fp8, down projections int4 in groups of 32 with zero points, the others nvfp4; or one format throughout by its name.
        What PRESET_IGNORE names stays as it is, and so do embeddings. Raises ValueError for an unknown name."""
        rules: list[Rule] = []
        if name == "balanced":
            outer = sorted({i for i in (0, 1, num_layers - 2, num_layers - 1) if 0 <= i < num_layers})
            rules.append(Rule((rf"re:.*\blayers\.({'|'.join(map(str, outer))})\.",), _formats("fp8")))
            if num_layers > len(outer):
                # groups of 32: a down projection has outliers that matter, and they spoil the scale of a larger group
                rules += [Rule((r"re:.*(down_proj|\.experts\.\d+\.w2)$",), _formats("int4_g32_asym")), Rule(("Linear",), _formats("nvfp4"))]
        elif name in PRESETS:
            rules.append(Rule(("Linear",), _formats(name)))
        else:
            raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(tuple(rules), PRESET_IGNORE, strict=False)


# the output head; the routers of mixtures of experts, small and decisive; encoders of images and sound, whose layers engines build otherwise; what latent
# attention makes keys and values with, of which engines keep a 16-bit copy
PRESET_IGNORE = (
    "re:.*lm_head$",
    r"re:.*\.(gate|router|shared_expert_gate)(\.\w+)?$",
    r"re:(.*\.)?(visual|vision_tower|vision_model|audio_tower|multi_modal_projector)\.",
    r"re:.*\.kv_b_proj$",
)
PRESETS = ("balanced", "nvfp4", "mxfp4", "int4", "int8", "fp8")


def to_config(assignment: Assignment) -> dict[str, Any]:
    """The compressed-tensors `quantization_config` of a checkpoint: one group a format, its modules by name, so that every reader of
    the layout comes to the same assignment whatever its rules of precedence."""
    names: dict[str, list[str]] = {}
    for module, fmt in assignment:
        names.setdefault(fmt.name, []).append(module.name)
    ignore = names.pop(BF16.name, [])
    groups = {f"group_{i}": {"targets": targets, **any_format(fmt).scheme} for i, (fmt, targets) in enumerate(names.items())}
    formats = {g["format"] for g in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


def to_yaml(assignment: Assignment, comment: str = "") -> str:
    """A map file with which `LayerMap.from_yaml` comes to this assignment.

    The format that most Linear modules have is the last rule, for all of the class; the others' rules name their modules by expressions of
    which each stands for one set of layers. What stays unquantized is named under `ignore`, where that last rule would match it.
    comment  lines to begin the file with
    """
    modules = {m.name: fmt for m, fmt in assignment}
    linear = {m.name for m, _ in assignment if m.kind == "Linear"}
    (most, _), *_ = Counter(modules[name].name for name in linear).most_common(1) or [(BF16.name, 0)]
    by_format: dict[str, list[str]] = {}
    for name, fmt in modules.items():
        if fmt.name != most or name not in linear:
            by_format.setdefault(fmt.name, []).append(name)
    plain = [name for name in by_format.pop(BF16.name, []) if name in linear]

    def lines(names: Sequence[str], indent: str) -> list[str]:
        return [f"{indent}- '{target}'" for target in _expressions(names, modules)]

    rules = [line for name, members in by_format.items() for line in (f"  - format: {name}", "    targets:", *lines(members, "      "))]
    if most != BF16.name:
        rules += [f"  - format: {most}", "    targets: [Linear]"]
    head = [f"# {line}".rstrip() for line in comment.splitlines()]
    text = [*head, *(["rules:", *rules] if rules else ["rules: []"]), *(["ignore:", *lines(plain, "  ")] if plain else [])]
    return "\n".join(text) + "\n"


def _expressions(names: Sequence[str], all_names: Iterable[str]) -> list[str]:
    """Targets that match these of all modules: one for those that have the same layers' numbers, and the name of what has no number."""

    def layers(names: Iterable[str]) -> dict[tuple[str, str], list[str]]:
        found: dict[tuple[str, str], list[str]] = {}
        for m in filter(None, (_NUMBERED.fullmatch(name) for name in names)):
            found.setdefault((m["before"], m["after"]), []).append(m["number"])
        return {key: sorted(numbers, key=int) for key, numbers in found.items()}

    there_are = layers(all_names)
    wanted = layers(names)
    alike: dict[tuple[str, tuple[str, ...] | None], list[str]] = {}
    for (before, after), every in there_are.items():
        if numbers := wanted.get((before, after)):
            alike.setdefault((before, None if numbers == every else tuple(numbers)), []).append(after)
    targets = [name for name in names if not _NUMBERED.fullmatch(name)]
    for (before, numbers), afters in alike.items():
        layer = r"\d+" if numbers is None else one_of(numbers)
        targets.append(f"re:{re.escape(before)}{layer}{one_of([re.escape(a) for a in afters])}$")
    return targets


def one_of(alternatives: Sequence[str]) -> str:
    """An expression for any of these."""
    return alternatives[0] if len(alternatives) == 1 else f"({'|'.join(alternatives)})"
