"""TurboQuant's cache: rotated keys on the levels of a normal distribution, values as integers."""

from lowbit.modules import KVRule, KVSpec
from lowbit.numerics import Int, Normal, PerToken, Spec
from lowbit.recipes import Recipe, method
from lowbit.scheme import Scheme


@method("kv-turbo", family="kv-cache", paper="arXiv:2504.19874")
def kv_turbo(
    bits: int = 4,
    recent: int = 0,
    *,
    value_bits: int | None = None,
    sink: int = 0,
    exempt: int = 2,
) -> Recipe:
    """A rotated key has as scale its root mean square, stored in 16 bits, and codes of a normal distribution's levels; no data.

    * bits: of keys, 1 to 8.
    * value_bits: of values, as integers with a range for each token; 16 leaves them as they are; None: bits.
    * recent, sink: the newest and the first tokens, which stay as they are.
    * exempt: layers at each end of the model that stay as they are.

    As engines run it: of the paper's two stages the first, with a Hadamard matrix as the rotation, for keys; values by their
    extremes.
    """
    values = bits if value_bits is None else value_bits
    ends = tuple(range(exempt)) + tuple(range(-exempt, 0))
    return Recipe(
        "kv-turbo",
        Scheme(
            kv=KVSpec(
                Spec(Normal(bits), PerToken()),
                None if values == 16 else Spec(Int(values, zero="real"), PerToken()),
                recent=recent,
                sink=sink,
                key_rotation="hadamard",
            ),
            kv_overrides=(KVRule(ends),) if exempt else (),
        ),
    )
