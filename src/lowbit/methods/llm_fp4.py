"""LLM-FP4 (FPQ): floating-point weights and activations whose split into exponent and mantissa, and whose range, are searched."""

from lowbit.modules import ActSpec
from lowbit.numerics import Float, PerChannel, PerGroup, PerInput, PerTensor, Spec, powers_of_two
from lowbit.recipes import Recipe, method
from lowbit.scheme import attention, linears
from lowbit.solve import Nearest
from lowbit.steps import SearchFloat, Solve


@method("llm-fp4", family="weight-activation", paper="arXiv:2310.16836")
def llm_fp4(
    bits: int = 4,
    activation_bits: int | None = 4,
    group_size: int | None = None,
    *,
    attention_bits: int | None = None,
    attention_format: str | None = None,
    weight_format: str | None = None,
    activation_format: str | None = None,
    channel_bias: bool = True,
    rounds: int = 3,
    grid: int = 19,
    tokens: int = 2048,
) -> Recipe:
    """Floating formats and their largest numbers searched by each layer's output error; a power of two for each input channel.

    bits, activation_bits: 2 to 8 each, of weights and of each linear's input, which is static; activation_bits=16: not at all.
    attention_bits, attention_format: of queries, keys and values, floating too, with a range for each token of each head;
    None: not quantized, as in the authors' code; E2M1 for 4 bits where only the bits are given.
    group_size: None, as published, one range for each output channel.
    weight_format, activation_format: such as E2M1 or E4M3; None: the best split for each linear.
    channel_bias: scales of the input channels are the tensor's, halved up to 2^E - 1 times (pre-shifted exponent bias).
    rounds: of searching weight and input in turns; 0: ranges are the extremes (MinMax). grid: how many ranges are tried.
    tokens: calibration tokens by which the output error is judged.

    Differs from the authors' code: the range is searched, not the exponent bias, which is the same where that is positive;
    the exponents of channels are stored once for each linear, with the width of the widest format searched. The embedding
    and the head stay as they are (theirs quantizes them); keys and values are rounded where they are read, in the cache they are
    as they were.
    """
    start = Float.of(bits, weight_format)
    act = None
    if activation_bits is not None and activation_bits < 16:
        form = Float.of(activation_bits, activation_format)
        exponents = max(each.exponent for each in (form.splits() if activation_format is None and rounds else (form,)))
        halved = Spec(powers_of_two(exponents), PerTensor(), scale_dtype="float32")
        grain = (PerInput(), halved) if channel_bias else (PerTensor(), None)
        act = ActSpec(Spec(form, *grain, scale_dtype="float32"), static=True)
    spec = Spec(start, PerChannel() if group_size is None else PerGroup(group_size), scale_dtype="bfloat16")
    search = SearchFloat(weight_format is None, activation_format is None, rounds, grid, tokens)
    steps = (search,) if act is not None or rounds else ()
    form = None if attention_bits is None or attention_bits > 8 else Float.of(attention_bits, attention_format).name
    operands = attention(attention_bits, probabilities=None, format=form)
    return Recipe.blockwise(
        name="llm-fp4", scheme=linears(spec, act, operands), steps=(*steps, Solve(Nearest())), feed="fp"
    )
