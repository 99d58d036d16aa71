"""OSCAR: caches whose keys and values are rotated by what attention makes of them, then integers per token."""

from lowbit.caches import SecondMoments
from lowbit.modules import KVSpec
from lowbit.numerics import Int, PerGroup, Spec
from lowbit.recipes import FitCache, Recipe, method
from lowbit.scheme import Scheme


@method("kv-oscar", family="kv-cache", paper="arXiv:2605.17757")
def kv_oscar(
    bits: int = 2,
    group_size: int = 128,
    recent: int = 256,
    *,
    key_bits: int | None = None,
    value_bits: int | None = None,
    sink: int = 64,
    centred: bool = False,
) -> Recipe:
    """Each head of keys and of values has a rotation from the second moments of the calibration text, and each token a range.

    * bits, key_bits, value_bits: 1 to 8; 16 leaves them as they are.
    * group_size: channels of a range, at most those of a head.
    * recent, sink: the newest and the first tokens, which stay as they are.
    * centred: take the mean of each key channel off before, which is this project's own, not the paper's; needs recent of at
      least 32. It more than halves what SmolLM2-135M loses at 2 bits.

    Keys are rotated after the rotary embedding, by eigenvectors of the second moment of the queries that read them, times a Hadamard
    matrix; values likewise, by the second moment of what attention mixes from them. The queries of all heads that share a key
    head are summed. Both rotations run with the cache and are stored with it; the one of values could be folded into the
    projections around it, but then weights would be quantized rotated. The paper's permutation of channels between the two
    factors changes nothing where a head is one group, and is left out, as are its clipping thresholds: ranges are extremes.
    """

    def spec(own: int | None) -> Spec | None:
        width = bits if own is None else own
        return None if width == 16 else Spec(Int(width, zero="real"), PerGroup(group_size))

    keys, values = spec(key_bits), spec(value_bits)
    form = KVSpec(
        keys, values, recent=recent, sink=sink, key_rotation="learned", value_rotation="learned", centred=centred
    )
    stages = (FitCache(SecondMoments()),) if form.calibrated else ()
    return Recipe("kv-oscar", Scheme(kv=form), stages)
