"""LLM-FP4 (FPQ): floating-point weights and activations with searched formats and ranges."""

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
    """Floating formats and ranges searched by each layer's output error, and a power of two for each input channel.

    * bits: 2 to 8, of weights.
    * activation_bits: 2 to 8, of each linear's input, which is static; 16: not quantized.
    * group_size: of weights; None, as published: one range for each output channel.
    * attention_bits: of queries, keys and values, floating, one range for each token of each head; None, as in the authors'
      code: not quantized.
    * attention_format: of these; None: half of the bits are exponent (E2M1 at 4 bits).
    * weight_format, activation_format: such as E2M1 or E4M3; None: the best split for each linear.
    * channel_bias: the scale of an input channel is the tensor's, halved up to 2^E - 1 times (pre-shifted exponent bias).
    * rounds: of searching weight and input in turn; 0: ranges are the extremes (MinMax).
    * grid: number of ranges to try.
    * tokens: calibration tokens that judge the output error.

    Differs from the authors' code: the search is over ranges, which equals theirs over exponent biases where these are
    positive; formats and ranges that a part of the tokens, or the round before, shows to be worse are left out; the exponents of
    channels are stored once for each linear, in the width of the widest format searched; embedding and head are not
    quantized; keys and values are rounded when they are read, and the cache holds them unrounded.
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
