"""RPTQ: reorder channels into clusters of like range, and give each cluster a static range of its own."""

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
    """Channels sorted into clusters of like (max, min), a static range for each cluster; weights by GPTQ.

    clusters: of an input; head_clusters: in each head of the output projection's input, of queries with keys, and of values.
    attention_bits: of queries, keys and values (the authors: as activation_bits), with probabilities of 8 bits or more;
    None: floating. activation_bits: of the inputs of the attention's output projection and the MLP's last linear. norm_bits:
    of what norms give (q, k, v, gate, up, fc1); None: activation_bits, but at least 8, as in what the authors call W4A4.
    ranges: "minmax", the extremes of all tokens; "ema", a moving average of each window's (0.99 old, 0.01 new), the authors'
    default, which clips; "search", the extremes shrunk, cluster by cluster, to where sampled tokens lose least (inputs of
    linears only): on real layers about half the error of "ema" at 4 bits.
    solver: of the weights, with inputs that are not rounded; damp: as in gptq.

    The order is folded into weights where it can be; behind norms each linear gathers its input (the authors' norm kernel
    writes in the new order), and attention its queries and keys behind the rotary embedding.
    Differs from the authors' code: weights have a range a row (or group), not one for each cluster in it, and a step is
    (max - min) / (2^bits - 1), where theirs divides by 2^bits.
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
