"""Channel transforms: changes of basis of an activation that the weights around it absorb.

A transform T replaces the activation x between two linear maps with x' = T x. The consumer's weights absorb the inverse
of T and the producer's weights absorb T itself, so the network computes the same function in a basis that quantizes
better. Every transform obeys two laws, tested in float64:

    linear(t.forward(x), *t.fold_in(w, b)) == linear(x, w, b)         exact transforms
    linear(x, *t.fold_out(w, b)) == t.forward(linear(x, w, b))        all transforms

`Scale`, `Shift` and `Rotate` are differentiable in their parameters, so one object serves a closed form, a search,
training and the final commit. `Kronecker` and `RandomHadamard` are rotations stored as a seed, for layers that run them
on their input and output. `Normalize` is what a packed layer may do to its output; it is not linear, so it obeys neither
law and raises an error where it would be folded.
"""

from __future__ import annotations

from lowbit.transforms.base import ChannelTransform, through
from lowbit.transforms.normalize import Normalize
from lowbit.transforms.permute import Permute
from lowbit.transforms.reassembly import Reassembly, Split
from lowbit.transforms.rotate import Rotate
from lowbit.transforms.scale import Scale
from lowbit.transforms.seeded import Kronecker, Made, RandomHadamard, Seeded
from lowbit.transforms.shift import Shift

__all__ = [
    "ChannelTransform",
    "Kronecker",
    "Made",
    "Normalize",
    "Permute",
    "RandomHadamard",
    "Reassembly",
    "Rotate",
    "Scale",
    "Seeded",
    "Shift",
    "Split",
    "through",
]
