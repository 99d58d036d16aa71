"""QLoRA: low-rank terms beside a frozen packed base, trained on a text of the user's."""

from dataclasses import replace
from typing import Any, Literal

from lowbit.recipes import Recipe, Train, method, recipe
from lowbit.solve import Adapter
from lowbit.training import AdamW, Cosine, LowRankTerms, NextToken


@method("qlora", family="training", paper="arXiv:2305.14314")
def qlora(
    base: str = "nf4",
    *,
    bits: int | None = None,
    group_size: int | None = None,
    rank: int = 16,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: str = "",
    start: Literal["zero", "residual", "calibrated"] = "zero",
    rounds: int = 1,
    tokens: int = 2**18,
    seq_len: int | None = None,
    lr: float = 2e-4,
    batch: int = 1,
    accumulate: int = 16,
    amp: bool = False,
    recompute: bool = False,
    measures: int = 16,
) -> Recipe:
    """LoRA on all linears of a packed base (NF4 with double quantization), trained on the next tokens of the text.

    * base: the method that packs the frozen weights; bits, group_size: of that method (of NF4: 4, and its block).
    * rank, alpha, dropout: of LoRA, as in peft (the authors: 64, 16, and 0.1 or 0.05). Terms are stored beside the codes in float16.
    * targets: roles of linears, or groups of roles, by commas (attention,down); empty: all.
    * start: zero, as published; residual: of what rounding lost (LoftQ), over ``rounds``; calibrated: of what it costs outputs (CLoQ).
    * tokens, seq_len: of training text. lr, batch, accumulate: of AdamW at a constant rate; batch windows at once, accumulate times.
    * amp, recompute: multiply in bfloat16 while training; run blocks again in the backward pass instead of keeping activations.
    * measures: how often the loss is measured on held-out text; the best state is kept. The divergence from the original, which
      every run reports, is here what was learned, too.
    """
    nf4 = base == "nf4"
    if nf4 and bits not in (None, 4):
        raise ValueError(f"NF4 has 4 bits, found {bits}; choose another base, such as base=gptq")
    given: dict[str, Any] = (
        {"double_quant": True, "block": group_size} if nf4 else {"bits": bits, "group_size": group_size}
    )
    packed = recipe(base, **{name: value for name, value in given.items() if value is not None})
    adapter = Adapter(rank, start, rounds, targets=tuple(each.strip() for each in targets.split(",") if each.strip()))
    train = Train(
        LowRankTerms(alpha / rank, dropout), NextToken(), lr=lr, batch=batch, amp=amp, optimizer=AdamW((0.9, 0.999)),
        schedule=Cosine(0.03, 1.0), tokens=tokens, seq_len=seq_len, accumulate=accumulate, clip_norm=0.3, recompute=recompute,
        measures=measures, judge="objective",
    )  # fmt: skip
    packed = packed.with_blockwise(steps=(*packed.steps[:-1], replace(packed.steps[-1], adapter=adapter)))
    return replace(packed, name="qlora", stages=(*packed.stages, train))
