"""WKVQuant: weights and the cache of keys and values in few bits, learned together; activations stay as they are."""

from dataclasses import replace

from lowbit.modules import KVSpec
from lowbit.numerics import Int, PerGroup, Spec
from lowbit.recipes import Recipe, method
from lowbit.scheme import linears, weight
from lowbit.solve import Nearest
from lowbit.steps import CacheCoordinates, ClipShares, CrossBlockMAE, Learn, Solve


@method("wkvquant", family="weight-kv", paper="arXiv:2402.12065")
def wkvquant(
    bits: int = 4,
    group_size: int | None = 128,
    *,
    kv_bits: int = 4,
    kv_group_size: int = 128,
    ahead: int = 5,
    ahead_weight: float = 1.0,
    epochs: int = 5,
    clip_lr: float = 1e-2,
    cache_lr: float = 5e-3,
    batch: int = 1,
    amp: bool | None = None,
) -> Recipe:
    """Learned clipping of weights, and a cache in learned coordinates, of which every token reads its past quantized.

    * kv_bits: of keys and values; 16 leaves them as they are.
    * kv_group_size: channels of keys and values that share a range; a head with fewer has one.
    * ahead: further original blocks behind which the block's output is compared too.
    * ahead_weight: what the error there counts, beside that of the block itself.
    * epochs: passes over the calibration windows.
    * clip_lr, cache_lr: learning rates of the clipping, and of scales and shifts of the cache's channels.
    * batch: windows in each gradient step.
    * amp: products in bfloat16 while learning; None: as the recipe's compute says.

    Where the paper leaves a choice open: keys are packed after the rotary embedding; keys and values are scaled and shifted when
    they are packed and read, and nothing of that is folded into weights; dynamic ranges have real zero points, and no window of
    recent tokens stays floating; epochs, learning rates and the weights' groups are those of OmniQuant's practice, and both
    errors count alike.
    """
    cache = None if kv_bits == 16 else Spec(Int(kv_bits, zero="real"), PerGroup(kv_group_size))
    placed = KVSpec(cache, cache, key_scaled=True, key_shifted=True, value_scaled=True, value_shifted=True)
    return Recipe.blockwise(
        name="wkvquant",
        scheme=replace(linears(weight(bits, group_size)), kv=cache and placed),
        steps=(
            Learn(
                (ClipShares(lr=clip_lr), *([CacheCoordinates(lr=cache_lr)] if cache else [])),
                CrossBlockMAE(ahead, ahead_weight),
                epochs,
                batch,
                amp,
            ),
            Solve(Nearest()),
        ),
    )
