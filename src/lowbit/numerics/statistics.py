"""Statistics of the inputs of a linear layer, gathered token by token for steps and solvers.

A statistic is a frozen request. The walk keeps one accumulator for each request and shared input, so q, k and v, which
read one tensor, share one Gram matrix. Requests compare by value, so equal requests of two steps share one accumulator.
Only :class:`Samples` keeps tokens. :class:`Fisher` concerns the weights and needs a backward pass over the whole model.

Law: the result does not depend on how the tokens were cut into batches. The exceptions are :class:`Samples` with an even
``stride`` and :class:`MovingRange`.
Shapes: T token, I input channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.numerics.serialize import serializable


class Statistic:
    """A request for one statistic of an input ``[T, I]``: computed from a batch of tokens and joined over batches.

    Subclasses are frozen dataclasses.

    Args:
        of_input: False if inputs cannot give the statistic.
        paired: batches are ``[2, T, I]``, the same tokens as the layer will read them and as the original model reads them.
        skip_first: positions at the start of each calibration window that its batches leave out.
        adds_in_place: tokens are added to the accumulator without a second one for the batch.
    """

    of_input: ClassVar[bool] = True
    paired: ClassVar[bool] = False
    skip_first = 0
    adds_in_place: ClassVar[bool] = False

    def merge(self, x_TI: Tensor) -> Tensor:
        """The statistic of one batch of tokens alone."""
        raise NotImplementedError

    def join(self, old: Tensor, new: Tensor) -> Tensor:
        """The statistic of two batches together, from that of each; may reuse ``old``."""
        raise NotImplementedError

    def update(self, old: Tensor | None, x_TI: Tensor) -> Tensor:
        """The accumulator after more tokens; ``old`` is None before the first."""
        new = self.merge(x_TI)
        return new if old is None else self.join(old, new)

    def complete(self, acc: Tensor) -> Tensor:
        """The statistic, from the accumulator behind the last token; may reuse ``acc``."""
        return acc

    def enough(self, acc: Tensor) -> bool:
        """Whether further tokens would change nothing, so that the pass over them can be left out."""
        return False

    def nbytes(self, tokens: int, width: int) -> int:
        """Bytes of the accumulator for an input of ``width`` channels after ``tokens``; 0 if inputs do not give the statistic."""
        if not self.of_input:
            return 0
        shape = (2, tokens, width) if self.paired else (tokens, width)
        return self.merge(torch.empty(shape, device="meta")).nbytes


_STRIP = 256
"""Rows of a symmetric matrix that are computed together: half as many products in all, each large enough for full speed."""


@serializable
@dataclass(frozen=True)
class Gram(Statistic):
    """``sum_t x_t x_t^T``, ``[I, I]`` in float32: the Hessian of the layer's output error, up to a factor."""

    adds_in_place: ClassVar[bool] = True

    def merge(self, x_TI: Tensor) -> Tensor:
        return self.complete(self.update(None, x_TI))

    def update(self, old: Tensor | None, x_TI: Tensor) -> Tensor:
        """The accumulator, of which only strips from the diagonal to the right are filled, without a matrix beside it."""
        x_TI, width = x_TI.float(), x_TI.shape[-1]
        acc = x_TI.new_zeros(width, width) if old is None else old
        for start in range(0, width, _STRIP):
            acc[start : start + _STRIP, start:].addmm_(x_TI[:, start : start + _STRIP].T, x_TI[:, start:])
        return acc

    def complete(self, acc: Tensor) -> Tensor:
        for start in range(0, len(acc), _STRIP):
            end = start + _STRIP
            acc[end:, start:end] = acc[start:end, end:].T
        return acc

    def join(self, old: Tensor, new: Tensor) -> Tensor:
        return old.add_(new)


@serializable
@dataclass(frozen=True)
class Tokens(Statistic):
    """The number of tokens, ``[1]`` int64: how far other statistics can be trusted."""

    def merge(self, x_TI: Tensor) -> Tensor:
        return torch.full((1,), len(x_TI), dtype=torch.int64, device=x_TI.device)

    def join(self, old: Tensor, new: Tensor) -> Tensor:
        return old.add_(new)


@serializable
@dataclass(frozen=True)
class AbsMax(Statistic):
    """Largest magnitude of each channel, ``[I]``."""

    def merge(self, x_TI: Tensor) -> Tensor:
        return x_TI.abs().amax(0)

    def join(self, old: Tensor, new: Tensor) -> Tensor:
        return torch.maximum(old, new)


@serializable
@dataclass(frozen=True)
class Range(Statistic):
    """Smallest and largest value of each channel, ``[2, I]``."""

    def merge(self, x_TI: Tensor) -> Tensor:
        return torch.stack(torch.aminmax(x_TI, dim=0))

    def join(self, old: Tensor, new: Tensor) -> Tensor:
        return torch.stack([torch.minimum(old[0], new[0]), torch.maximum(old[1], new[1])])


@serializable
@dataclass(frozen=True)
class TokenRange(Statistic):
    """Smallest and largest value of each token, ``[2, T]``; :func:`clipped_tokens` turns them into a range."""

    def merge(self, x_TI: Tensor) -> Tensor:
        return torch.stack(torch.aminmax(x_TI, dim=1))

    def join(self, old: Tensor, new: Tensor) -> Tensor:
        return torch.cat([old, new], dim=1)


def clipped_tokens(bounds_2T: Tensor, share: float) -> Tensor:
    """The range ``[2]`` that clips whole tokens (Outlier Suppression, arXiv:2209.13325, section 4.2).

    Let U be the linear ``share`` quantile of ``|largest value of a token|``. The range ends at the largest of these values
    that is at most U; the lower end is found likewise.

    Args:
        bounds_2T: the result of :class:`TokenRange`.
        share: above 0 and at most 1; 1 gives the range of all values, a smaller share a range within it.

    Raises:
        ValueError: a ``share`` outside these bounds.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of tokens in a range is above 0 and at most 1, found {share}")
    smallest, largest = bounds_2T
    return torch.stack([-_up_to(-smallest, share), _up_to(largest, share)])


def _up_to(values_T: Tensor, share: float) -> Tensor:
    """The largest of ``values_T`` that is at most the quantile of their magnitudes."""
    ordered = values_T.abs().sort().values  # torch.quantile refuses more than 2**24 elements
    at = share * (len(ordered) - 1)
    below = int(at)
    bound = ordered[below].lerp(ordered[min(below + 1, len(ordered) - 1)], at - below)
    return values_T[values_T <= bound].max()


@serializable
@dataclass(frozen=True)
class MovingRange(Range):
    """Like :class:`Range`, but each end is a moving average of the windows' ends: ``decay * old + (1 - decay) * new``.

    The average forgets the extremes of a single window, so the range clips rare extremes (RPTQ, arXiv:2304.01089). The
    result depends on the order of the windows and on how tokens are cut into them.
    """

    decay: float = 0.99

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"the decay of a moving average is at least 0 and below 1, found {self.decay}")

    def update(self, old: Tensor | None, x_TI: Tensor) -> Tensor:
        new = self.merge(x_TI)
        return new if old is None else old * self.decay + new * (1 - self.decay)


@serializable
@dataclass(frozen=True)
class LaterRange(Range):
    """:class:`Range` without the first ``skip_first`` tokens of every window.

    These tokens can have values hundreds of times larger than all others (attention sinks), and would then set the range
    of everything that shares a scale with them.
    """

    skip_first: int = 1

    def __post_init__(self):
        if self.skip_first < 1:
            raise ValueError(f"skip_first is a number of tokens, at least 1, found {self.skip_first}")


@serializable
@dataclass(frozen=True)
class AbsSum(Statistic):
    """``sum_t |x_t|``, then the number of tokens: ``[I + 1]`` in float64. :func:`mean_abs` divides them."""

    def merge(self, x_TI: Tensor) -> Tensor:
        return torch.cat([x_TI.abs().sum(0, dtype=torch.float64), x_TI.new_tensor([len(x_TI)], dtype=torch.float64)])

    def join(self, old: Tensor, new: Tensor) -> Tensor:
        return old.add_(new)


def mean_abs(abs_sum: Tensor) -> Tensor:
    """Mean magnitude of each channel, ``[I]`` float32, from the result of :class:`AbsSum`."""
    return (abs_sum[:-1] / abs_sum[-1]).float()


@serializable
@dataclass(frozen=True)
class SquareSum(Statistic):
    """``sum_t x_t**2``, then the number of tokens: ``[I + 1]`` in float64. :func:`mean_square` divides them.

    The sums are the diagonal of :class:`Gram`. They are what an importance matrix of llama.cpp holds.
    """

    def merge(self, x_TI: Tensor) -> Tensor:
        x_TI = x_TI.double()
        return torch.cat([x_TI.square().sum(0), x_TI.new_tensor([len(x_TI)])])

    def join(self, old: Tensor, new: Tensor) -> Tensor:
        return old.add_(new)


def mean_square(square_sum: Tensor) -> Tensor:
    """Mean square of each channel, ``[I]`` float32, from the result of :class:`SquareSum`."""
    return (square_sum[:-1] / square_sum[-1]).float()


@serializable
@dataclass(frozen=True)
class Samples(Statistic):
    """Tokens, at most ``[count, I]``: every ``stride``-th from the start, until ``count`` are kept."""

    count: int = 512
    stride: int = 1

    def join(self, old: Tensor, new: Tensor) -> Tensor:
        return torch.cat([old, new[: self.count - len(old)]])

    def enough(self, acc: Tensor) -> bool:
        return len(acc) >= self.count

    def merge(self, x_TI: Tensor) -> Tensor:
        return x_TI[:: self.stride][: self.count].clone()


@serializable
@dataclass(frozen=True)
class Fisher(Statistic):
    """Diagonal Fisher information of a weight, ``[O, I]`` float32: the sensitivity of the model's loss to each element.

    ``sum_n (dL_n / dw)^2`` over calibration windows n; L_n is the mean next-token cross-entropy of window n alone (the
    square of a sum over windows would be another quantity). Zero where no token reached the weight. Only ratios of it have
    a meaning.
    """

    of_input: ClassVar[bool] = False


@serializable
@dataclass(frozen=True)
class CrossGram(Statistic):
    """``D = sum_t (x'_t - x_t) x_t^T``, ``[I, I]`` in float32; the original model reads x' where the layer reads x.

    D measures the change of the inputs by the blocks quantized so far; it is zero before the first.
    """

    paired: ClassVar[bool] = True

    def merge(self, x_TI: Tensor) -> Tensor:
        seen, original = x_TI.float()
        return (original - seen).T @ seen

    def join(self, old: Tensor, new: Tensor) -> Tensor:
        return old.add_(new)
