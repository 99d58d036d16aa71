"""A linear under construction: everything that is decided of it before it is packed, and one way to run it.

    h = pre(x)
    y = post(Q_act(h) @ restored(weight).T + sum of side_terms(h)) + bias        simulated
    y = post(h @ weight.T) + bias                                                exact

Every linear of a block that has a role becomes a draft when the block is loaded; steps read and set the draft's attributes, and
searches and learning run it. ``Solve`` turns it into a :class:`~lowbit.modules.QuantLinear`, and what a recipe leaves alone
becomes a linear of its original class again. Only here is known that GPT-2's Conv1D stores the transpose.

Law: simulated, a draft gives bit for bit what the packed layer's reference gives (tests/laws/test_draft_linear.py).

Shapes: O output channel, I input channel after ``pre``, T token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowbit.modules.activation import ActSpec, fake_activation, static_params
from lowbit.modules.linear_format import LinearFormat
from lowbit.modules.quant_linear import QuantLinear
from lowbit.numerics import Affine, Clipped, Fixed, PerInput, QTensor, SideTerm, fake_quantize
from lowbit.transforms import ChannelTransform, Permute, Scale, through


@dataclass
class _Simulation:
    """What a draft computes with while it is simulated: ``weight`` as it will be restored, for the input after ``transform``,
    and with the side terms where the input is not quantized. ``act_params``: None where the draft's own count, and ``foreseen``
    where it has none. ``factor``: the weight in the type of the products of a search."""

    weight: Tensor
    bias: Tensor | None
    side_terms: tuple[SideTerm, ...]
    transform: ChannelTransform | None
    act_params: Affine | None
    foreseen: Affine | None
    inputs: SharedInput | None
    factor: Tensor | None = None

    def multiply(self, h: Tensor) -> Tensor:
        """``h @ weight.T``. Under autocast, a search converts the weight once, not once for each call."""
        device = h.device.type
        if torch.is_grad_enabled() or not torch.is_autocast_enabled(device):
            return F.linear(h, self.weight)
        if self.factor is None:
            self.factor = self.weight.to(torch.get_autocast_dtype(device))
        return F.linear(h, self.factor)


class SharedInput:
    """The input that several simulated linears read, made ready once for all of them: of the last forward alone."""

    def __init__(self):
        self._last: tuple[Tensor, ChannelTransform | None, ActSpec | None, Affine | None, Tensor, Tensor] | None = None

    def fake(
        self, h: Tensor, transform: ChannelTransform | None, act: ActSpec | None, params: Affine | None
    ) -> tuple[Tensor, Tensor]:
        """``h`` behind ``transform``, and that quantized if ``act`` says how, in the type of the product that follows."""
        last = self._last  # several threads may run forwards
        if last is not None and last[0] is h and last[1] is transform and last[2] == act and last[3] is params:
            return last[4], last[5]
        transformed = h if transform is None else through((transform,), h)
        result = fake_activation(transformed, act, params)
        device = h.device.type
        if torch.is_autocast_enabled(device):  # once, not once for each reader
            result = result.to(torch.get_autocast_dtype(device))
        self._last = h, transform, act, params, transformed, result
        return transformed, result


class DraftLinear(nn.Module):
    """See the module docstring.

    Args:
        linear: the linear to begin with, a Linear or a Conv1D. Its weight is shared, not copied.
        format: what will be stored; None: the linear is not to be quantized.

    Attributes:
        weight: ``[O, I]``, transforms folded in.
        bias: ``[O]`` or None.
        pre, post: transforms that it runs itself, of its input and of its output before the bias, in the order they run.
        side_terms: what is added to the decoded weight.
        act_params: parameters of a static input; None where they are not known yet, or each call has its own.
        range_shares: the range chosen for each granule of the weight; None: the solver chooses.
        rounding_offset: ``[O, I]``, added to the weight before it is rounded; None: nothing is.
        fisher: ``[O, I]``, Fisher information of the weight as it is now; None where no step needs it.
    """

    def __init__(self, linear: nn.Module, format: LinearFormat | None = None):
        super().__init__()
        self.format = format
        self.pre: tuple[ChannelTransform, ...] = ()
        self.post: tuple[ChannelTransform, ...] = ()
        self.side_terms: tuple[SideTerm, ...] = ()
        self.act_params: Affine | None = None
        self.range_shares: Clipped | Fixed | None = None
        self.rounding_offset: Tensor | None = None
        self.fisher: Tensor | None = None
        weight, bias = linear.get_parameter("weight"), linear._parameters.get("bias")
        self._transposed = isinstance(linear, Conv1D)
        self.weight = nn.Parameter(weight.T if self._transposed else weight, requires_grad=weight.requires_grad)
        self.bias = bias
        origin = copy.copy(linear)
        origin._parameters = dict.fromkeys(linear._parameters)
        self._origin = (origin,)  # in a tuple, so that it is no part of the model
        self._simulation: _Simulation | None = None
        self._observer: Callable[[Tensor], None] | None = None
        self._idle = False

    def as_loaded(self) -> nn.Module:
        """A linear of the class that this draft was made of, with its weight and bias as they are now.

        Raises:
            ValueError: the draft does to its input or output what that class cannot.
        """
        if self.pre or self.post or self.side_terms:
            raise ValueError(
                "the linear transforms its input or output itself, which only a packed one can; quantize it"
            )
        linear = copy.copy(self._origin[0])
        weight = self.weight.detach()
        linear._parameters = {
            "weight": nn.Parameter(weight.T if self._transposed else weight, requires_grad=self.weight.requires_grad)
        }
        linear.register_parameter("bias", self.bias)
        return linear

    @property
    def target(self) -> Tensor:
        """What is rounded: the weight, with its offset where one was chosen."""
        return self.weight if self.rounding_offset is None else self.weight + self.rounding_offset

    # Running

    def forward(self, x: Tensor) -> Tensor:
        """``[..., I before pre]`` to ``[..., O]``."""
        return self.product(through(self.pre, x) if self.pre else x)

    def product(self, h: Tensor) -> Tensor:
        """:meth:`forward` of an input ``[..., I]`` that has been through ``pre``."""
        if self._observer is not None:
            self._observer(h)
        if self._idle:
            return h.new_zeros(*h.shape[:-1], self.weight.shape[0])
        if self._simulation is not None:
            y, bias = self._simulated_product(h, self._simulation), self._simulation.bias
        elif self.post:
            y, bias = F.linear(h, self.weight), self.bias
        else:
            return F.linear(h, self.weight, self.bias)  # as a linear computes it
        y = through(self.post, y) if self.post else y
        return y if bias is None else y + bias.to(y.dtype)

    def _simulated_product(self, h: Tensor, simulation: _Simulation) -> Tensor:
        """In the order of operations of a packed layer."""
        act = None if self.format is None else self.format.act
        params = None if act is None else simulation.act_params or self.act_params or simulation.foreseen
        inputs = simulation.inputs or SharedInput()
        h, ready = inputs.fake(h, simulation.transform, act, params)
        y = simulation.multiply(ready)
        if act is None:  # side terms are in the weight
            return y
        for term in simulation.side_terms:
            y = y + term.apply(h, y.shape[-1])
        return y

    @contextmanager
    def simulated(
        self, transform: ChannelTransform | None = None, bounds_2I: Tensor | None = None, **chosen: Any
    ) -> Iterator[None]:
        """While open, :meth:`forward` computes what the packed layer will.

        The weight is rounded once, when this opens; static parameters that are set meanwhile count at once.

        Args:
            transform: one to try on the input behind ``pre``; the weight reads its result.
            bounds_2I: lowest and highest value of each channel of the input. A static input whose parameters are not set yet is
                quantized by those that this range will give; without it, by the range of each call.
            chosen: values that count instead of the attributes of that name, and that gradients may pass: weight, bias,
                range_shares, rounding_offset, act_params, side_terms. ``inputs``: shared with the linears that read the same input.
                ``exact``: true where the weight is not rounded.
        """
        before, self._simulation = self._simulation, self._simulate(transform, bounds_2I, chosen)
        try:
            yield
        finally:
            self._simulation = before

    def _simulate(
        self, transform: ChannelTransform | None, bounds_2I: Tensor | None, chosen: Mapping[str, Any]
    ) -> _Simulation:
        form = self.format
        assert form is not None, "a linear that is not to be quantized cannot be simulated"
        weight, bias = chosen.get("weight", self.weight.detach()), chosen.get("bias", self.bias)
        offset = chosen.get("rounding_offset", self.rounding_offset)
        weight = weight if offset is None else weight + offset
        if transform is not None:
            weight, bias = transform.fold_in(weight, bias)
        foreseen = None
        if bounds_2I is not None and form.act is not None and form.act.static:
            foreseen = static_params(form.act, bounds_2I if transform is None else transform.forward(bounds_2I))
        restored = weight
        if not chosen.get("exact"):
            restored = fake_quantize(weight, form.weight, chosen.get("range_shares", self.range_shares)).contiguous()
        side_terms = chosen.get("side_terms", self.side_terms)
        if form.act is None:  # one product for all
            for term in side_terms:
                restored = restored + term.dense((restored.shape[0], restored.shape[1]))
        return _Simulation(
            restored, bias, side_terms, transform, chosen.get("act_params"), foreseen, chosen.get("inputs")
        )

    @property
    def errs_by_weight(self) -> bool:
        """Whether all that simulation changes is the weight."""
        return not self.post and (self.format is None or self.format.act is None)

    def weight_error(self) -> Tensor | None:
        """What simulation adds to the weight ``[O, I]``, for the input behind ``pre``; None if that is not all it does."""
        simulation = self._simulation
        if simulation is None or simulation.bias is not self.bias or not self.errs_by_weight:
            return None
        if simulation.transform is None:
            return simulation.weight - self.weight
        if isinstance(simulation.transform, Scale):
            return simulation.weight / simulation.transform.s - self.weight
        return None

    @contextmanager
    def observed(self, observer: Callable[[Tensor], None]) -> Iterator[None]:
        """While open, ``observer`` is given every input ``[..., I]`` as the weight reads it, behind ``pre``."""
        before, self._observer = self._observer, observer
        try:
            yield
        finally:
            self._observer = before

    @contextmanager
    def idle(self) -> Iterator[None]:
        """While open, the output is zero: for passes that want inputs alone, where none depends on this linear."""
        before, self._idle = self._idle, True
        try:
            yield
        finally:
            self._idle = before

    # Changing

    @torch.no_grad()
    def transform(self, of_input: ChannelTransform, of_output: ChannelTransform | None = None) -> None:
        """The linear applies ``of_input`` to its input at run time, behind ``pre``, and undoes ``of_output``, a rotation, of its
        output; its weight (and bias, and Fisher information) become those in between. The width of the weight may change.

        Raises:
            ValueError: Fisher information of the weight does not follow.
        """
        assert not self.side_terms, "side terms are for the input as it was"
        if self.fisher is not None:
            if not isinstance(of_input, Scale | Permute) or of_output is not None:
                raise ValueError(no_fisher(of_input))
            self.fisher = fisher_behind(of_input, self.fisher)
        weight = self.weight if of_output is None else self.weight.double()  # both are rounded once
        new, bias = of_input.fold_in(weight, self.bias)
        if of_output is not None:
            new, _ = of_output.fold_out(new, None)
            self.post = (of_output.inverse(), *self.post)  # pyright: ignore[reportAttributeAccessIssue]
        if bias is not None and bias is not self.bias:
            self.bias = nn.Parameter(bias, requires_grad=False)
        assert self.rounding_offset is None or new.shape == self.weight.shape, "an offset is for the weight as it was"
        new = new.to(self.weight.dtype)
        new = new.T.contiguous().T if self._transposed else new.contiguous()
        self.weight = nn.Parameter(new, requires_grad=False)
        self.pre = (*self.pre, of_input)

    def pack(
        self,
        q: QTensor,
        store_dtype: torch.dtype,
        pre: tuple[ChannelTransform, ...] = (),
        post: tuple[ChannelTransform, ...] = (),
        side_terms: tuple[SideTerm, ...] = (),
        own_pre: bool = True,
    ) -> QuantLinear:
        """The packed layer with the codes ``q`` and the draft's own decisions.

        Args:
            q: ``[O, I]``, in the draft's weight format.
            store_dtype: of the bias.
            pre, post: what the layer does to its input behind the draft's ``pre``, and to its output before its ``post``.
            side_terms: added to the decoded ``q``, beside the draft's own.
            own_pre: whether the layer runs the draft's ``pre``; without, it reads what the draft's weight reads.

        Raises:
            ValueError: parts that do not fit together.
        """
        assert self.format is not None
        bias = None if self.bias is None else self.bias.detach().to(store_dtype)
        act, params = self.format.act, self.act_params
        if act is not None and params is not None and isinstance(act.spec.granularity, PerInput):
            params = _behind_transforms(pre, params)
        own = self.pre if own_pre else ()
        return QuantLinear.from_qtensor(
            q, bias, act, params, (*own, *pre), (*post, *self.post), (*side_terms, *self.side_terms)
        )

    def extra_repr(self) -> str:
        rows, columns = self.weight.shape
        return f"in_features={columns}, out_features={rows}, bias={self.bias is not None}, {self.format}"


def _behind_transforms(transforms: Iterable[ChannelTransform], params: Affine) -> Affine:
    """Static scales of input channels as they are after ``transforms``, which the solver chose."""
    for transform in transforms:
        if not isinstance(transform, Permute):
            raise ValueError(f"a {type(transform).__name__} mixes input channels that have static scales of their own")
        index = transform.index
        params = Affine(params.scale[index], None if params.zero is None else params.zero[index])
    return params


def fisher_behind(of_input: Scale | Permute, fisher_OI: Tensor) -> Tensor:
    """Fisher information of a weight once ``of_input`` is folded into it.

    Where the new weights are ``A w``, gradients are multiplied by ``A^-T``: by 1/s where weights are by s, and a permutation
    moves both alike. So the very fold of the weights serves, on square roots, with the reciprocal scale. Mixing channels needs
    the covariance of gradients, and a shift their sums; the diagonal has neither.
    """
    roots, _ = for_gradients(of_input).fold_in(fisher_OI.sqrt(), None)
    return roots.square()


def for_gradients(transform: Scale | Permute) -> Scale | Permute:
    """What gradients of weights are folded by, where weights are by ``transform``."""
    return Scale(1 / transform.s) if isinstance(transform, Scale) else transform


def no_fisher(transform: ChannelTransform) -> str:
    """Why Fisher information does not follow weights behind ``transform``."""
    return (
        f"the Fisher information behind a {type(transform).__name__} does not follow from that before it; leave that step out, "
        "or choose a solver that needs no Fisher information"
    )


def make_drafts(block: nn.Module, paths: Iterable[str]) -> None:
    """Puts a draft in the place of each named linear of ``block`` that is none yet. Weights stay where they are."""
    for path in paths:
        linear = block.get_submodule(path)
        if not isinstance(linear, DraftLinear):
            block.set_submodule(path, DraftLinear(linear))


def unmake_drafts(block: nn.Module) -> None:
    """Puts a linear of its original class in the place of each draft of ``block``.

    Raises:
        ValueError: a draft that such a linear cannot stand for.
    """
    for path, module in [(path, module) for path, module in block.named_modules() if isinstance(module, DraftLinear)]:
        block.set_submodule(path, module.as_loaded())


def weight_shape(linear: nn.Module) -> tuple[int, int]:
    """``(O, I)`` of a linear of any class, a draft included."""
    rows, columns = linear.get_parameter("weight").shape
    return (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)
