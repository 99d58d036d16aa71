"""The llama shape with experts in place of the MLP, in some or all blocks.

The norm before the MLP feeds the router and every expert (and, if there are any, a shared expert and its gate). A transform
must fold into all of them. Every expert has its own inputs and its own up -> down edge. Fused experts must be unfused
first.
"""

from __future__ import annotations

from typing import Any

from lowbit.architectures.parts import GATED_MLP, Mlp, decoder, gated_edge
from lowbit.architectures.table import Architecture, End, LinearRole, SharedInput

EXPERT_MLP = Mlp(
    linears=tuple(LinearRole(f"expert_{role}", f"mlp.experts.*.{role}_proj") for role in ("gate", "up", "down")),
    shared_inputs=(
        SharedInput("expert_in", ("expert_gate", "expert_up")),
        SharedInput("expert_hidden", ("expert_down",)),
    ),
    readers=("router", "expert_gate", "expert_up"),
    writers=("expert_down",),
    edges=(
        gated_edge(
            End("expert_gate"),
            End("expert_up"),
            "expert_down",
            name="expert_up_down",
            judge="mlp.experts.*.down_proj",
        ),
    ),
    routers=(LinearRole("router", "mlp.gate"),),
)

SHARED_EXPERT = Mlp(
    linears=tuple(LinearRole(f"shared_{role}", f"mlp.shared_expert.{role}_proj") for role in ("gate", "up", "down")),
    shared_inputs=(
        SharedInput("shared_in", ("shared_gate", "shared_up")),
        SharedInput("shared_hidden", ("shared_down",)),
    ),
    readers=("shared_router", "shared_gate", "shared_up"),
    writers=("shared_down",),
    edges=(
        gated_edge(
            End("shared_gate"),
            End("shared_up"),
            "shared_down",
            name="shared_up_down",
            judge="mlp.shared_expert.down_proj",
        ),
    ),
    routers=(LinearRole("shared_router", "mlp.shared_expert_gate"),),
)


def _together(*mlps: Mlp) -> Mlp:
    """One table part with the roles of all; a block has the modules of some."""
    return Mlp(
        linears=tuple(x for mlp in mlps for x in mlp.linears),
        shared_inputs=tuple(x for mlp in mlps for x in mlp.shared_inputs),
        readers=tuple(x for mlp in mlps for x in mlp.readers),
        writers=tuple(x for mlp in mlps for x in mlp.writers),
        edges=tuple(x for mlp in mlps for x in mlp.edges),
        routers=tuple(x for mlp in mlps for x in mlp.routers),
    )


_EXPERTS = "every token chooses its experts"


def mixtral(config: Any) -> Architecture:
    return decoder(config, name="mixtral", model_types=("mixtral",), mlp=EXPERT_MLP, token_step=_EXPERTS)


def qwen2_moe(config: Any) -> Architecture:
    mlp = _together(GATED_MLP, SHARED_EXPERT, EXPERT_MLP)
    return decoder(config, name="qwen2_moe", model_types=("qwen2_moe",), mlp=mlp, token_step=_EXPERTS)


def qwen3_moe(config: Any) -> Architecture:
    mlp = _together(GATED_MLP, EXPERT_MLP)
    return decoder(
        config, name="qwen3_moe", model_types=("qwen3_moe",), mlp=mlp, query_key_norms=True, token_step=_EXPERTS
    )


TABLES = {"mixtral": mixtral, "qwen2_moe": qwen2_moe, "qwen3_moe": qwen3_moe}
