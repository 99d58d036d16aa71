"""What vLLM's path cannot run is refused, with the reason."""

from __future__ import annotations

import pytest

from lowbit.checkpoints.description import ModelDescription
from lowbit.modules import ActSpec, AttentionSpec, KVSpec, LinearDescription, ResidualRotation
from lowbit.numerics import Int, PerChannel, PerGroup, PerTensor, PerToken, Spec
from lowbit.serving.vllm_plugin.refusals import why_not_served

TOKENS = Spec(Int(8), PerToken())


def described(act: ActSpec | None = None, **more) -> ModelDescription:
    return ModelDescription(
        {"model.layers.0.mlp.up_proj": LinearDescription(Spec(Int(4), PerChannel()), (8, 8), act=act)}, **more
    )


@pytest.mark.parametrize(
    "act",
    [None, ActSpec(TOKENS), ActSpec(Spec(Int(8), PerGroup(4))), ActSpec(Spec(Int(8), PerTensor()), static=True)],
    ids=str,
)
def test_what_does_not_depend_on_other_requests_is_served(act):
    assert why_not_served(described(act)) is None


@pytest.mark.parametrize("act", [ActSpec(TOKENS, threshold=6.0), ActSpec(Spec(Int(8), PerTensor()))], ids=str)
def test_ranges_of_a_whole_call_are_refused_because_vllm_joins_requests(act):
    assert "model.layers.0.mlp.up_proj: its inputs are quantized with ranges of a whole call" in str(
        why_not_served(described(act))
    )


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"unfused_experts": True}, "experts"),
        ({"attention": {"model.layers.0.self_attn": AttentionSpec(bits=8)}}, "attention"),
        (
            {
                "residual": ResidualRotation.from_json(
                    {"type": "RandomHadamard", "seed": 1, "size": 8, "blocks": "model.layers"}
                )
            },
            "rotated",
        ),
        ({"kv": KVSpec(Spec(Int(4), PerToken()), Spec(Int(4), PerToken()))}, "cache"),
    ],
    ids=["experts", "attention", "residual", "cache"],
)
def test_parts_of_a_model_that_vllm_computes_without_asking_are_refused(more, reason):
    assert reason in str(why_not_served(described(**more)))
