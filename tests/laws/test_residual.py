"""A rotated residual stream leaves every model as it was, where its table says that it may be rotated; wrong folds do not."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.architectures import Architecture, ResolvedResidual, block_modules, for_config, resolve, rotate_residual
from lowbit.architectures.check import TOLERANCE, drafted, logits, randomize
from lowbit.architectures.experts import unfuse_experts
from lowbit.architectures.parts import NORM_EDGES
from lowbit.architectures.table import Residual
from lowbit.modules import ResidualRotation, residual_of, turn_residual
from lowbit.transforms import ChannelTransform, Kronecker, RandomHadamard, Rotate, Seeded

from laws.test_architectures import CASES, _model

FREE = {
    "llama grouped",
    "llama tied embeddings, all biases",
    "llama single key-value head",
    "mistral",
    "granite",
    "smollm3",
    "qwen2",
    "qwen3",
    "gemma",
    "phi3",
    "phi3 partial rotary",
    "mixtral",
    "qwen2_moe",
    "qwen2_moe with a dense block",
    "qwen3_moe",
}
Wrong = Callable[[ResolvedResidual], ResolvedResidual]


@cache
def _prepared(case: str) -> tuple[PreTrainedModel, Architecture, Tensor, Tensor]:
    model = _model(case)
    unfuse_experts(model)
    randomize(model.double().eval(), seed=3)
    for module in model.modules():  # a LayerNorm without a bias, so that its mean alone is in the way of a rotation
        if isinstance(module, nn.LayerNorm) and module.bias is not None:
            nn.init.zeros_(module.bias)
    tokens = torch.randint(0, 48, (3, 12), generator=torch.Generator().manual_seed(4))
    return model, for_config(model.config), tokens, logits(model, tokens)


@contextlib.contextmanager
def _rotated(model: PreTrainedModel, table: Architecture, rotation: Seeded, wrong: Wrong) -> Iterator[None]:
    """A copy of the model's state aside, the model rotated; put back on leaving, hooks too."""
    blocks = block_modules(model, table)
    residuals = [wrong(drafted(table, block, model.config).residual) for block in blocks]
    old = copy.deepcopy(model.state_dict())  # of the drafts, which may hold a weight the other way round
    for block, residual in zip(blocks, residuals, strict=True):
        block.load_state_dict(rotate_residual(residual, rotation, block.state_dict()), strict=False)
    turn_residual(model, ResidualRotation(table.blocks, rotation))
    try:
        yield
    finally:
        model.load_state_dict(old)
        blocks[0]._forward_pre_hooks.clear()
        blocks[0]._forward_pre_hooks_with_kwargs.clear()
        blocks[-1]._forward_hooks.clear()


def _change(
    case: str, rotation: ChannelTransform, wrong: Wrong = lambda r: r, table: Architecture | None = None
) -> float:
    model, own, tokens, before = _prepared(case)
    with _rotated(model, table or own, rotation, wrong):  # pyright: ignore[reportArgumentType]
        return float((logits(model, tokens) - before).abs().max() / before.abs().max())


def _width(case: str) -> int:
    return _prepared(case)[0].config.hidden_size


def _forced(case: str, **changes) -> Architecture:
    """The table of the case as if its stream could be rotated."""
    residual = Residual(NORM_EDGES, ("o", "down" if "gemma" in case else "fc2"))
    return dataclasses.replace(_prepared(case)[1], residual=residual, **changes)


@pytest.mark.parametrize("kind", [RandomHadamard, Kronecker])
@pytest.mark.parametrize("case", sorted(FREE))
def test_a_rotated_residual_stream_leaves_the_logits_unchanged(case: str, kind: type[Seeded]) -> None:
    assert _change(case, kind(5, _width(case))) <= TOLERANCE


@pytest.mark.parametrize("case", sorted(set(CASES) - FREE))
def test_a_stream_that_cannot_be_rotated_says_why_and_is_refused(case: str) -> None:
    model, table, _, _ = _prepared(case)
    residual = resolve(table, block_modules(model, table)[0], model.config).residual
    assert ("LayerNorm" in residual.fixed) != ("norms after attention" in residual.fixed)
    with pytest.raises(ValueError, match="cannot be rotated: "):
        rotate_residual(residual, RandomHadamard(5, _width(case)), {})


def _without(residual: ResolvedResidual, module: str) -> ResolvedResidual:
    edges = tuple(
        dataclasses.replace(edge, ports=tuple(port for port in edge.ports if port.module != module))
        for edge in residual.edges
    )
    return dataclasses.replace(
        residual, edges=edges, writers=tuple(port for port in residual.writers if port.module != module)
    )


@pytest.mark.parametrize(
    ("case", "forgotten"),
    [
        ("llama grouped", "self_attn.k_proj"),
        ("llama grouped", "mlp.down_proj"),
        ("mixtral", "mlp.gate"),
        ("mixtral", "mlp.experts.1.down_proj"),
        ("qwen2_moe", "mlp.shared_expert_gate"),
        ("qwen2_moe", "mlp.shared_expert.down_proj"),
    ],
)
def test_forgetting_a_reader_or_a_writer_of_the_stream_changes_the_logits(case: str, forgotten: str) -> None:
    assert _change(case, RandomHadamard(5, _width(case)), lambda r: _without(r, forgotten)) > 1e-3


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_gain_that_stays_in_its_norm_changes_the_logits(offset: float) -> None:
    """Fused with another offset than the norm's own, part of the gain stays or is lost."""
    case = "gemma" if offset == 0 else "llama grouped"

    def wrong(residual: ResolvedResidual) -> ResolvedResidual:
        edges = tuple(
            dataclasses.replace(
                edge,
                ports=tuple(dataclasses.replace(p, gain_offset=offset) if p.norm else p for p in edge.ports),
            )
            for edge in residual.edges
        )
        return dataclasses.replace(residual, edges=edges)

    assert _change(case, RandomHadamard(5, _width(case)), wrong) > 1e-3


def test_a_bias_of_a_writer_that_is_not_rotated_changes_the_logits() -> None:
    case = "llama tied embeddings, all biases"

    def wrong(residual: ResolvedResidual) -> ResolvedResidual:
        writers = tuple(dataclasses.replace(port, has_bias=False) for port in residual.writers)
        return dataclasses.replace(residual, writers=writers)

    assert _change(case, RandomHadamard(5, _width(case)), wrong) > 1e-3


def _unbiased(residual: ResolvedResidual) -> ResolvedResidual:
    """With the norms' biases, which are zero here, out of sight."""
    edges = tuple(
        dataclasses.replace(
            edge, ports=tuple(dataclasses.replace(p, has_bias=p.has_bias and not p.norm) for p in edge.ports)
        )
        for edge in residual.edges
    )
    return dataclasses.replace(residual, edges=edges)


@dataclasses.dataclass(frozen=True)
class _Fixing(Seeded):
    """A Householder reflection that leaves the mean of the channels alone: what a LayerNorm does commute with."""

    def forward(self, x: Tensor) -> Tensor:
        v = torch.linspace(-1, 1, self.size, dtype=torch.float64)
        v = v / v.norm()
        return x - 2 * (x @ v)[..., None] * v


@pytest.mark.parametrize("case", ["gpt2", "gpt_neox parallel", "opt", "bloom"])
def test_the_mean_that_a_layer_norm_subtracts_is_what_keeps_its_stream_from_being_rotated(case: str) -> None:
    table = _forced(case)
    assert _change(case, RandomHadamard(5, _width(case)), _unbiased, table) > 1e-3
    assert _change(case, _Fixing(5, _width(case)), _unbiased, table) <= TOLERANCE


def test_a_layer_norm_with_a_bias_is_not_taken_for_an_rms_norm() -> None:
    with pytest.raises(AssertionError, match="not an RMSNorm"):
        _change("gpt2", RandomHadamard(5, 24), table=_forced("gpt2"))


@pytest.mark.parametrize("case", ["gemma2", "gemma3"])
def test_rotating_in_front_of_norms_that_follow_attention_changes_the_logits(case: str) -> None:
    assert _change(case, RandomHadamard(5, _width(case)), table=_forced(case)) > 1e-3


def test_folding_without_turning_the_ends_changes_the_logits() -> None:
    model, table, tokens, before = _prepared("qwen3")
    with _rotated(model, table, RandomHadamard(5, 24), lambda r: r):
        table_blocks = block_modules(model, table)
        table_blocks[-1]._forward_hooks.clear()
        assert (logits(model, tokens) - before).abs().max() > 1e-3 * before.abs().max()


def test_a_model_says_how_its_stream_is_rotated() -> None:
    model, table, _, _ = _prepared("qwen2")
    assert residual_of(model) is None
    with _rotated(model, table, RandomHadamard(7, 24), lambda r: r):
        residual = residual_of(model)
        assert residual == ResidualRotation("model.layers", RandomHadamard(7, 24))
        assert ResidualRotation.from_json(json.loads(json.dumps(residual.to_json()))) == residual
    with pytest.raises(ValueError, match="has a type"):
        ResidualRotation.from_json({"type": "Rotate", "seed": 1, "size": 2, "blocks": "x"})
    with pytest.raises(ValueError, match="damaged"):
        ResidualRotation.from_json({"type": "Kronecker", "seed": "1", "size": 2, "blocks": "x"})


def test_any_orthogonal_matrix_will_do() -> None:
    model, table, _, _ = _prepared("mistral")
    block = block_modules(model, table)[0]
    residual = resolve(table, block, model.config).residual
    folded = rotate_residual(residual, Rotate.random_orthogonal(24, seed=2), block.state_dict())
    assert all(value.dtype == torch.float64 for value in folded.values())
    assert (folded["input_layernorm.weight"] == 1).all()
    assert set(folded) == {
        *(f"self_attn.{role}_proj.weight" for role in "qkvo"),
        *(f"mlp.{role}_proj.weight" for role in ("gate", "up", "down")),
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }
