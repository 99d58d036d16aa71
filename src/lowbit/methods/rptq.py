"""RPTQ: reorders channels into clusters of similar range and gives each cluster its own static range."""

from typing import Literal

from lowbit.numerics import ClipSearch
from lowbit.recipes import Recipe, method
from lowbit.scheme import FormatRule, Scheme, activation, attention, weight
from lowbit.solve import Gptq, Nearest
from lowbit.steps import Cluster, SetActivationRange, SetAttentionRange, Solve


@method("rptq", family="weight-activation", paper="arXiv:2304.01089")
def rptq(
    bits: int = 4,
    activation_bits: int = 4,
    group_size: int | None = None,
    *,
    attention_bits: int | None = None,
    clusters: int = 32,
    head_clusters: int = 4,
    norm_bits: int | None = None,
    ranges: Literal["search", "ema", "minmax"] = "search",
    solver: Literal["gptq", "nearest"] = "gptq",
    damp: float = 0.01,
) -> Recipe:
    """Channels sorted into clusters of similar (max, min), with one static range for each; weights by GPTQ.

    * clusters: of each linear's input.
    * head_clusters: in each head: of the output projection's input, of queries with keys, and of values.
    * activation_bits: of the inputs of attention's output projection and of the MLP's last linear.
    * norm_bits: of the outputs of norms (for q, k, v, gate, up, fc1); None: activation_bits, at least 8, as in the authors' W4A4.
    * attention_bits: of queries, keys and values (authors: activation_bits), with probabilities in 8 or more; None: floating.
    * ranges: "minmax": all extremes. "ema", the authors' default: moving averages of windows (0.99 old, 0.01 new), which clip.
      "search": extremes shrunk for each cluster to the least error on sampled tokens (only inputs of linears), on real layers
      about half the error of "ema" at 4 bits.
    * solver, damp: of the weights, with unrounded inputs; damp as in gptq.

    The order is folded into weights where possible. After norms each linear gathers its input (the authors' norm kernel writes
    in the new order), and attention gathers queries and keys after the rotary embedding. Differs from the authors' code: weights
    have a range for each row (or group), not for each cluster in it, and steps are (max - min) / (2^bits - 1), not / 2^bits.
    """
    norms, spec = max(8, activation_bits) if norm_bits is None else norm_bits, weight(bits, group_size)
    widths = {"*": activation_bits} | ({} if norms == activation_bits else {"behind_norm": norms})
    rules = tuple(
        FormatRule(match=match, weight=spec, activation=activation(width, symmetric=False, per="tensor", static=True))
        for match, width in widths.items()
    )
    operands = attention(attention_bits, symmetric=False, probabilities=8, static=True, clusters=head_clusters)
    decay = 0.99 if ranges == "ema" else None
    by = Gptq(ClipSearch(), order="group", damp=damp) if solver == "gptq" else Nearest()
    return Recipe.blockwise(
        name="rptq",
        scheme=Scheme(rules=rules, attention=operands),
        steps=(
            Cluster(clusters, head_clusters),
            *((SetAttentionRange(decay),) if operands else ()),
            SetActivationRange(decay=decay, shrinks=40 if ranges == "search" else 1),
            Solve(by),
        ),
    )
