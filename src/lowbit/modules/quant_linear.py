"""The one packed linear layer: every method's result, every kernel's input, every checkpoint's unit.

    h = pre(x)
    y = post(Q_act(h) @ decode(codes, params).T + sum of side_terms(h)) + bias

A layer is a :class:`~lowbit.modules.LinearDescription` and buffers laid out by it; the weight is held in its canonical packed form only, and decoded by the kernel that runs. The field's alternative, a
class for each method, multiplies the loaders and kernels by the methods.

The packed buffers mean what they mean in their own dtype, so casts (``.half()``, ``.to(torch.bfloat16)``) move this
module between devices but never convert it; it computes in the dtype of its input instead.

``pre`` and ``post`` are channel transforms that no neighbour could absorb; ``post`` may also normalize. ``side_terms`` are weights in floating point that
multiply the input before it is quantized: they are few and were kept because they matter.

Shapes: O output channel, I input channel after ``pre``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import kernels
from lowbit.kernels import PackedLinear, Reason
from lowbit.layouts import pack_qtensor, packed_layout, unpack_qtensor
from lowbit.modules import serialize_transforms
from lowbit.modules.activation import ActSpec, pack_static, unpack_static
from lowbit.modules.description import LinearDescription
from lowbit.modules.linear_format import LinearFormat
from lowbit.modules.serialize_transforms import PLACES, Place
from lowbit.modules.validation import check_tensors
from lowbit.numerics import Affine, QTensor, SideTerm, Spec, Table, TwoSided
from lowbit.transforms import ChannelTransform, Made, Seeded, through


@dataclass(frozen=True)
class Prepared:
    """What a prepared layer has made once, so that a call does nothing but call: the product, and what is around it.

    Attributes:
        source: the checked tensors that it was made from; :meth:`QuantLinear.prepare` compares their identities, addresses
            and versions with ``state``.
    """

    product: kernels.product.Product
    side_terms: tuple[SideTerm, ...]
    transforms: dict[str, tuple[ChannelTransform | Made, ...]]
    source: tuple[Tensor, ...]
    state: tuple[tuple[int, int, int], ...]


class QuantLinear(nn.Module):
    """A packed linear. Build it with :meth:`from_qtensor` or :meth:`empty`.

    Args:
        description: what the layer stores; :meth:`empty` builds the same layer from it.
        buffers: tensors by name, laid out as ``description.layout()`` says.
    """

    def __init__(self, description: LinearDescription, buffers: Mapping[str, Tensor]):
        super().__init__()
        self.description = description
        self.spec, self.shape, self.act = description.spec, description.shape, description.act
        self.in_features, self.out_features = description.features
        self._weight_names = tuple(packed_layout(self.spec, self.shape))
        for name in description.layout():
            self.register_buffer(name, buffers[name])
        self.tiles: Tensor | None
        self.register_buffer("tiles", None, persistent=False)
        self._prepared: Prepared | None = None
        self._kept_weight: Tensor | None = None
        if description.bias is None:
            self.register_buffer("bias", None)

    @classmethod
    def from_qtensor(
        cls,
        q: QTensor,
        bias: Tensor | None = None,
        act: ActSpec | None = None,
        act_params: Affine | None = None,
        pre: tuple[ChannelTransform, ...] = (),
        post: tuple[ChannelTransform, ...] = (),
        side_terms: tuple[SideTerm, ...] = (),
    ) -> QuantLinear:
        """Packs ``q`` ``[O, I]``.

        Args:
            q: the weight, solved for the input after ``pre``.
            bias: ``[O]``; kept in its dtype (float64 becomes float32), copied.
            act: how the input is quantized after ``pre``.
            act_params: parameters of a static ``act``, for granularity ``act.spec.granularity`` over I.
            pre: transforms of the input that no earlier layer could absorb, in the order they run.
            post: transforms of the output, before the bias, in the order they run; they keep its width.
            side_terms: terms added to the decoded ``q``.

        Raises:
            ValueError: shapes that do not fit together, or parameters that are not as the spec stores them.
        """
        bias = None if bias is None else (bias.float() if bias.dtype == torch.float64 else bias).detach().clone()
        description = LinearDescription(
            spec=q.spec,
            shape=(q.shape[0], q.shape[1]),
            bias=None if bias is None else bias.dtype,
            act=act,
            pre=serialize_transforms.describe("pre", pre),
            post=serialize_transforms.describe("post", post),
            side_terms=serialize_transforms.describe("side", side_terms),
        )
        buffers = pack_qtensor(q)
        for place, values in zip(PLACES, (pre, post, side_terms), strict=True):
            buffers |= serialize_transforms.tensors(place, values)
        if act is not None and act.static != (act_params is not None):
            raise ValueError("act_params are given exactly when act is static")
        if act is not None and act_params is not None:
            buffers |= pack_static(act, act_params, q.shape[-1])
        if bias is not None:
            buffers["bias"] = bias
        _check(description, buffers)
        return cls(description, buffers)

    @classmethod
    def empty(cls, description: LinearDescription, device: torch.device | str = "meta") -> QuantLinear:
        """The described layer, its buffers of the right shapes and dtypes without content: for loading."""
        layout = description.layout()
        return cls(description, {n: torch.empty(s, dtype=dtype, device=device) for n, (s, dtype) in layout.items()})

    @property
    def format(self) -> LinearFormat:
        """What is stored of the weight, and how the input is quantized."""
        return LinearFormat(self.spec, self.act)

    @property
    def pre(self) -> tuple[ChannelTransform, ...]:
        """The transforms of the input, around this module's buffers."""
        return self._transforms("pre", torch.float32)

    @property
    def post(self) -> tuple[ChannelTransform, ...]:
        """The transforms of the output, around this module's buffers."""
        return self._transforms("post", torch.float32)

    @property
    def side_terms(self) -> tuple[SideTerm, ...]:
        """The terms added to the decoded weight, around this module's buffers."""
        return serialize_transforms.build("side", self.description.side_terms, self._tensors())

    @property
    def act_params(self) -> Affine | None:
        """Static parameters of the input, float32 ``[G, 1]``."""
        held = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        return unpack_static(self.act, held, self.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]`` in the dtype of x.

        Transforms and activation quantization compute in float32; the weight is decoded in float32 and rounded to the
        dtype of x, in which the product and the bias are taken.
        """
        if not x.dim() or x.shape[-1] != self.in_features:
            found = f"{x.shape[-1]}" if x.dim() else "no axis"
            raise ValueError(f"the layer reads {self.in_features} channels, the input has {found}")
        if not x.is_floating_point():  # rounding the weight to integers would give zeros
            raise ValueError(f"the layer reads floating-point inputs, found {x.dtype}")
        if x.dim() == 1:
            return self.forward(x[None])[0]
        if not x.numel():  # no token has no range
            return x @ x.new_zeros(1, 1).expand(self.in_features, self.out_features)
        y = self._through("post", self.product(self._through("pre", x)))
        bias = self._buffers["bias"]
        return y if bias is None else y + bias.to(y.dtype)

    def product(self, x: Tensor) -> Tensor:
        """The part between the transforms: activation quantization, the packed weight and its side terms."""
        if self._kept_weight is not None:
            return kernels.reference(x, self.packed(), self._kept_weight)
        ready, forced = self.prepared, kernels.forced()
        compiled = forced is None or forced in kernels.native.instruction_sets()
        if ready is None or not compiled or (self.act is not None and torch.is_grad_enabled() and x.requires_grad):
            return kernels.run(x, self.packed())
        assert self.tiles is not None
        return kernels.side_terms.add(ready.product(x, self.tiles, forced or ""), x, ready.side_terms, forced or "")

    def packed(self) -> PackedLinear:
        """This layer as kernels see it."""
        threshold = 0.0 if self.act is None else self.act.threshold
        act = self.act and self.act.spec
        return PackedLinear(
            self.spec, self.shape, self._tensors(), act, self.act_params, self.side_terms, self.tiles, threshold
        )

    def prepare(self) -> str | None:
        """Repacks the codes for the compiled kernels of this machine, in place of the canonical ones; these are made again
        where something asks for them (saving, decoding). Returns why not, or None where it is done (or was before).

        Raises:
            ValueError: a tensor whose values no layer has, see :func:`lowbit.modules.validation.check_tensors`.
        """
        if self.tiles is not None:
            return None
        if any(buffer.is_meta for buffer in (self._buffers["codes"], *self._source()) if buffer is not None):
            return "the layer has no content yet"
        with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode do not count their changes
            for name, buffer in self._buffers.items():
                if buffer is not None and buffer.is_inference():
                    self._buffers[name] = buffer.clone()
            check_tensors(self.description, self._tensors())
            packed = self.packed()
            reason = kernels.native.why_unpackable(packed)
            if reason is not None:
                return reason
            self.tiles = tiles = kernels.native.pack(packed)
            del self._buffers["codes"]
            made = {
                place: tuple(
                    t.made(torch.float32, tiles.device) if isinstance(t, Seeded) else t
                    for t in self._transforms(place, torch.float32)
                )
                for place in ("pre", "post")
            }
            product, source = kernels.product.product_of(packed), self._source()
            self._prepared = Prepared(product, packed.side_terms, made, source, _state(source))
        return None

    @property
    def prepared(self) -> Prepared | None:
        """What :meth:`prepare` made; made anew, and checked anew, where a stored tensor was replaced or changed in place."""
        made = self._prepared
        if made is None or torch.compiler.is_compiling() or made.state == _state(self._source()):
            return made
        self.restore()
        self.prepare()
        return self._prepared

    def _source(self) -> tuple[Tensor, ...]:
        """The tensors that :meth:`prepare` reads, but the codes, which it replaces."""
        left_out = ("bias", "tiles", "codes")
        return tuple(b for name, b in self._buffers.items() if b is not None and name not in left_out)

    def tied(self) -> QuantLinear:
        """This layer with buffers that another module stores: they are not in its state."""
        self._non_persistent_buffers_set |= set(self._buffers)
        return self

    @property
    def is_tied(self) -> bool:
        """Whether another module stores the buffers."""
        return "codes" in self._non_persistent_buffers_set

    def restore(self, codes: Tensor | None = None) -> None:
        """Undoes :meth:`prepare`: canonical codes and nothing else. ``codes``: these, where another module has them."""
        if self.tiles is not None:
            codes = self._tensors()["codes"] if codes is None else codes
            self.register_buffer("codes", codes, persistent=not self.is_tied)
            self.tiles = self._prepared = None

    def explain(self, rows: int = 1) -> list[Reason]:
        """Which kernel runs for ``rows`` input vectors, and for each other one why it does not."""
        return kernels.explain(self.packed(), rows)

    def qtensor(self) -> QTensor:
        """The stored codes, unpacked, and their parameters in float32; side terms are not in it."""
        return unpack_qtensor(self._tensors(), self.spec, self.shape)

    def dequantize(self) -> Tensor:
        """The stored weight ``[O, I]``, float32, side terms included. It reads the input after ``pre`` and gives the output
        before ``post``; see :meth:`effective_weight`."""
        return kernels.with_side_terms(kernels.decode_packed(self._tensors(), self.spec, self.shape), self.side_terms)

    def effective_weight(self) -> Tensor:
        """``[out_features, in_features]`` float32: the layer's map, transforms folded in, activations not quantized.

        Raises:
            ValueError: the layer normalizes its output, which no weight does.
        """
        self._check_affine("weight")
        weight = self.dequantize()
        if self.description.post:
            weight = (self._through("post", weight.T) - self._through("post", torch.zeros_like(weight[:, 0]))).T
        if not self.description.pre:
            return weight
        with torch.inference_mode(False), torch.enable_grad():
            x = weight.new_zeros(self.out_features, self.in_features, requires_grad=True)
            y = self._through("pre", x)  # affine, so the pullback of W is the weight that reads the untransformed input
            return torch.autograd.grad(y, x, weight.clone())[0]

    def effective_bias(self) -> Tensor | None:
        """The bias, float32 ``[out_features]``, with the constant that shifts in the transforms add; None without either.

        Raises:
            ValueError: as :meth:`effective_weight`.
        """
        self._check_affine("bias")
        bias = self._buffers["bias"]
        bias = None if bias is None else bias.float()
        if not self.description.pre and not self.description.post:
            return bias
        weight = self.dequantize()
        constant = weight @ self._through("pre", weight.new_zeros(self.in_features))
        constant = self._through("post", constant)
        return constant if bias is None else bias + constant

    @property
    def weight(self) -> Tensor:
        """:meth:`effective_weight`, decoded at each access: for model code that looks at a linear's weight.

        It is not a parameter, and writing to it changes nothing. GPT-2 hands it to an initializer after loading, which
        transformers' mark keeps from drawing random numbers. Of a layer that normalizes its output all values are NaN, and so is
        what is computed with them. (torch multiplies by a tensor on the meta device without a word, and gives what was in memory.)
        """
        if self.description.is_affine:
            weight = self.effective_weight()
        else:
            nan = torch.full((), torch.nan, dtype=torch.float32, device=self.packed().device)
            weight = nan.expand(self.out_features, self.in_features)
        weight._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        return weight

    def _check_affine(self, what: str) -> None:
        if not self.description.is_affine:
            raise ValueError(
                f"the layer normalizes its output over its channels, which no {what} does; dequantize() is the weight "
                "before that, and calling the layer computes all of it"
            )

    @property
    def qweight(self) -> Tensor:
        """The packed weight as it is held, under the name by which others ask where a packed layer is (peft asks
        :attr:`weight` otherwise, nine times a layer, and each time decodes it)."""
        held = self.tiles if self.tiles is not None else self._buffers["codes"]
        assert held is not None
        return held

    @property
    def stored_bits(self) -> int:
        """Bits of everything stored, transforms (a seed is 64), side terms and static activation parameters included; only
        the bias is left out, since it is stored the same without quantization."""
        return self.description.stored_bits

    @property
    def bits_per_weight(self) -> float:
        """``stored_bits`` over the number of weights of the linear that this one replaces."""
        return self.stored_bits / (self.in_features * self.out_features)

    def extra_repr(self) -> str:
        bias = self._buffers["bias"] is not None
        parts = [f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"]
        parts.append(f"{_short(self.spec)}, {self.bits_per_weight:.3f} bits per weight")
        if self.act is not None:
            parts.append(f"act={_short(self.act.spec)}, {'static' if self.act.static else 'dynamic'}")
            if self.act.threshold:
                parts.append(f"channels of {self.act.threshold:g} and over in floating point")
        for place in PLACES:
            if entries := self.description.parts(place):
                parts.append(
                    f"{place}={(' and ' if place == 'side' else ' then ').join(part.type for part in entries)}"
                )
        return "; ".join(parts)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.tiles is not None and not self.is_tied:
            destination[f"{prefix}codes"] = self._tensors()["codes"]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if any(name.startswith(prefix) for name in state_dict):  # an adapter's state has nothing for this layer
            self.restore()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        if self.tiles is not None and fn(self.tiles[:0]).device != self.tiles.device:
            self.restore()  # tiles are for this machine's CPU; whoever moves the layer back prepares it again
        return super()._apply(serialize_transforms.keeping_dtype(fn), recurse)

    def _tensors(self) -> Mapping[str, Tensor]:
        """Every stored tensor, the codes too where they are held as tiles."""
        if self.tiles is None:
            return {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        return _Restoring(self)

    def _transforms(self, place: Place, dtype: torch.dtype) -> tuple[ChannelTransform, ...]:
        return serialize_transforms.build(place, self.description.parts(place), self._tensors(), dtype)

    def _through(self, place: Place, x: Tensor) -> Tensor:
        """The transforms of ``place`` on x, in float32 (float64 stays) and back."""
        if not self.description.parts(place):
            return x
        wide = torch.promote_types(x.dtype, torch.float32)
        ready = self.prepared if wide == torch.float32 else None
        return through(self._transforms(place, wide) if ready is None else ready.transforms[place], x)


def _state(tensors: tuple[Tensor, ...]) -> tuple[tuple[int, int, int], ...]:
    """Identity, address and version of each: together they change whenever content does."""
    return tuple((id(t), t.data_ptr(), t._version) for t in tensors)


class _Restoring(Mapping[str, Tensor]):
    """The tensors of a prepared layer; its codes are unpacked when they are asked for, and not kept."""

    def __init__(self, layer: QuantLinear):
        self._layer = layer
        self._held = {n: b for n, b in layer._buffers.items() if b is not None and n != "tiles"}

    def __getitem__(self, name: str) -> Tensor:
        if name == "codes":
            assert self._layer.tiles is not None
            return kernels.native.unpack(self._layer.tiles, self._layer.spec, self._layer.shape)
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(("codes", *self._held))

    def __len__(self) -> int:
        return len(self._held) + 1


def _short(spec: Spec) -> str:
    grid = str(spec.grid)
    if isinstance(spec.grid, Table | TwoSided):
        grid = f"{type(spec.grid).__name__}({len(spec.grid.values)} values)"
    return f"{grid} {spec.granularity}"


def _check(description: LinearDescription, buffers: Mapping[str, Tensor]) -> None:
    layout = description.layout()
    for name in layout.keys() | buffers.keys():
        held = (tuple(buffers[name].shape), buffers[name].dtype) if name in buffers else None
        if held != layout.get(name):
            raise ValueError(f"{name} should be {layout.get(name, 'absent')}, found {held or 'nothing'}")
