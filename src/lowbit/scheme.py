"""Formats by rule: what is stored of which linear, and how it runs; the formats of attention and of the KV cache.

Methods say it by :func:`linears`, recipe files by rules and overrides; the last rule that matches counts.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any, Literal

from lowbit.architectures import ROLE_GROUPS, ResolvedBlock
from lowbit.modules import ActSpec, AttentionSpec, KVFormats, KVRule, KVSpec, LinearFormat
from lowbit.numerics import Int, PerChannel, PerGroup, PerTensor, PerToken, Spec, nearest, untagged
from lowbit.patterns import check_pattern


@untagged
@dataclass(frozen=True)
class FormatRule:
    """Formats for the linears that ``match``: ``*``, a role (``down``), a group of roles (``attention``, ``mlp``,
    ``behind_norm``), a name pattern, or ``re:`` and a regex.

    ``skip`` leaves them as they are. Where several rules match, the last one counts.
    """

    match: str = "*"
    weight: Spec | None = None
    activation: ActSpec | None = None
    skip: bool = False

    def __post_init__(self):
        check_pattern(self.match)

    def matches(self, name: str, role: str) -> bool:
        if self.match.startswith("re:"):
            return re.search(self.match[3:], name) is not None
        return self.match in ("*", role) or role in ROLE_GROUPS.get(self.match, ()) or fnmatch(name, self.match)


@untagged
@dataclass(frozen=True)
class Outside:
    """Formats of what is outside of the blocks. A head that is the embedding's table is stored once, in its format.

    Attributes:
        embedding: the format of the token embedding, with parameters for each row; None: as it is.
        head: the format of the output head; None: as it is.
        limit: nats a token that both may cost, measured; if they cost more they stay as they are. None: no limit.
    """

    embedding: Spec | None = None
    head: Spec | None = None
    limit: float | None = None


OUTSIDE_ROLES = {"embedding": "embedding", "head": "head", "lm_head": "head"}
"""Matches of overrides that mean the token embedding or the output head: the attribute of :class:`Outside`."""
NARROW = 4
"""Bits of codes up to which :data:`Scheme.outside` None packs the embedding and the head."""
USUAL_COST = 1e-3
"""Nats a token that these may cost then."""


def row_format(bits: int | None) -> Spec | None:
    """The format of an embedding or head of ``bits``; None (as it is) for None, 16 and over.

    Groups of 64, because a scale for a whole row costs SmolLM2-135M 0.0017 nats a token at 8 bits and these cost it 0.0006.
    Scales in bfloat16, because rows of tokens that were never trained can be smaller than float16 holds.
    """
    if bits is None or bits >= 16:
        return None
    return Spec(Int(bits, symmetric=True), PerGroup(64), scale_dtype="bfloat16")


@untagged
@dataclass(frozen=True)
class Scheme:
    """What is stored and how it runs.

    Attributes:
        rules: formats of linears; later rules override earlier ones.
        attention: the formats of the operands of every block's attention; None: floating.
        kv: the format of every block's cache of keys and values; None: floating.
        outside: the formats of embedding and head; None: 8 bits where codes have at most 4 and it costs little.
        kv_overrides: other formats of the cache of some layers; the last rule that matches counts.
    """

    rules: tuple[FormatRule, ...] = ()
    attention: AttentionSpec | None = None
    kv: KVSpec | None = None
    outside: Outside | None = None
    kv_overrides: tuple[KVRule, ...] = ()

    @property
    def chosen_outside(self) -> Outside:
        """:attr:`outside`, or what it is where nothing was said."""
        if self.outside is not None:
            return self.outside
        bits = [rule.weight.grid.bits for rule in self.rules if rule.weight is not None]
        if not bits or max(bits) > NARROW:
            return Outside()
        return Outside(row_format(8), row_format(8), USUAL_COST)

    def format(self, name: str, role: str) -> LinearFormat | None:
        """The format of one linear, or None where it stays as it is."""
        for rule in reversed(self.rules):
            if rule.matches(name, role):
                return None if rule.skip or rule.weight is None else LinearFormat(rule.weight, rule.activation)
        return None

    def formats(self, resolved: ResolvedBlock, block_name: str) -> dict[str, LinearFormat]:
        """Formats of the block's linears by path, those left alone omitted."""
        formats = {path: self.format(f"{block_name}.{path}", role) for path, role in resolved.linears.items()}
        return {path: form for path, form in formats.items() if form is not None}

    def check_matches(self, linears: Mapping[str, str]) -> None:
        """``linears``: every linear of the model, name -> role.

        Raises:
            ValueError: a rule that matches none of them; it names the nearest role or layer.
        """
        for rule in self.rules:
            if not any(rule.matches(name, role) for name, role in linears.items()):
                raise ValueError(f"rule {rule.match!r} matches no layer{_nearest_layer(rule.match, linears)}")

    @property
    def cache(self) -> KVFormats:
        """The formats of the KV cache of all layers."""
        return KVFormats(self.kv, self.kv_overrides)

    def with_rules(self, *added: FormatRule) -> Scheme:
        """This scheme with rules after its own."""
        return replace(self, rules=(*self.rules, *added))

    @property
    def quantizes_activations(self) -> bool:
        return any(rule.activation is not None for rule in self.rules)


def _nearest_layer(pattern: str, linears: Mapping[str, str]) -> str:
    """The nearest role or name; where none is near, the roles and one name: a model has hundreds of names."""
    hint = nearest(pattern.removeprefix("re:"), [*linears.values(), *linears])
    if hint.startswith(" ("):
        return hint
    return (
        f"; this model has the roles {', '.join(sorted({*linears.values()}))}, and names such as {next(iter(linears))}"
    )


@untagged
@dataclass(frozen=True)
class Override:
    """What one ``overrides`` entry of a recipe file may say; what it leaves out is as in the recipe's first weight format."""

    match: str
    skip: bool = False
    bits: int | None = None
    group_size: int | Literal["channel"] | None = None
    symmetric: bool | None = None
    activation_bits: int | None = None

    @property
    def outside(self) -> bool:
        """Whether it is about the embedding or the output head."""
        return self.match in OUTSIDE_ROLES

    def change(self, outside: Outside) -> Outside:
        """``outside`` with what this override says of the embedding or the head.

        Raises:
            ValueError: something else than bits or skip, or bits that no code has.
        """
        others = [key for key in ("group_size", "symmetric", "activation_bits") if getattr(self, key) is not None]
        if others or (self.bits is None) != self.skip:
            raise ValueError(
                f"override {self.match!r}: bits or skip are expected, found {', '.join(others) or 'neither'}"
            )
        what = OUTSIDE_ROLES[self.match]
        if self.bits is not None and not (1 <= self.bits <= 8 or self.bits >= 16):
            raise ValueError(f"the {what} has 1 to 8 bits, or 16 to stay as it is; found {self.bits}")
        return replace(outside, **{what: None if self.skip else row_format(self.bits)}, limit=None)

    def rule(self, base: FormatRule) -> FormatRule:
        if self.skip:
            return FormatRule(match=self.match, skip=True)
        assert base.weight is not None
        grid, grain, act = base.weight.grid, base.weight.granularity, base.activation
        for key in ("bits", "symmetric"):
            if (value := getattr(self, key)) is None:
                continue
            if key not in {field.name for field in dataclasses.fields(grid)}:  # pyright: ignore[reportArgumentType]
                raise ValueError(f"override {self.match!r}: {key} cannot be changed, the recipe has the grid {grid}")
            grid = replace(grid, **{key: value})  # pyright: ignore[reportArgumentType]
        if self.group_size is not None:
            grain = PerChannel() if self.group_size == "channel" else PerGroup(self.group_size)
        if self.activation_bits is not None:
            act = activation(self.activation_bits) if act is None else _with_bits(act, self.activation_bits)
        return FormatRule(match=self.match, weight=replace(base.weight, grid=grid, granularity=grain), activation=act)


def _with_bits(act: ActSpec, bits: int) -> ActSpec | None:
    if bits < 16 and not isinstance(act.spec.grid, Int):
        raise ValueError(
            f"activation_bits cannot be changed to {bits}, the recipe's activations have the grid {act.spec.grid}"
        )
    return None if bits >= 16 else replace(act, spec=replace(act.spec, grid=replace(act.spec.grid, bits=bits)))  # pyright: ignore[reportArgumentType]


# What most methods say of formats


def weight(bits: int, group_size: int | None, *, symmetric: bool = False) -> Spec:
    """Integers of ``bits``, in groups of ``group_size`` along the input, or per output channel where it is None."""
    return Spec(Int(bits, symmetric=symmetric), PerChannel() if group_size is None else PerGroup(group_size))


def activation(
    bits: int | None,
    *,
    symmetric: bool = True,
    per: Literal["token", "tensor"] = "token",
    static: bool = False,
    threshold: float = 0.0,
) -> ActSpec | None:
    """Integers of ``bits`` for a linear's input; None (no quantization) where ``bits`` is None or 16 and over."""
    if bits is None or bits >= 16:
        return None
    grain = PerToken() if per == "token" else PerTensor()
    return ActSpec(Spec(Int(bits, symmetric=symmetric), grain, scale_dtype="float32"), static, threshold)


def attention(
    bits: int | None, *, symmetric: bool = True, probabilities: int | None = 2, **options: Any
) -> AttentionSpec | None:
    """Operands of attention of ``bits``, and as many for probabilities but at least ``probabilities`` (None: floating); ``more``
    goes to :class:`~lowbit.modules.AttentionSpec`. None where ``bits`` is None or 16 and over."""
    if bits is None or bits >= 16:
        return None
    return AttentionSpec(bits, symmetric, None if probabilities is None else max(bits, probabilities), **options)


def linears(weight: Spec, activation: ActSpec | None = None, attention: AttentionSpec | None = None) -> Scheme:
    """One format for every linear of every block."""
    return Scheme(rules=(FormatRule(weight=weight, activation=activation),), attention=attention)
