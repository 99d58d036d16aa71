"""Fisher information of every linear that is to be quantized: the whole model's gradients, one block in memory at a time.

One pass forward keeps what every block reads, for all windows. The loss behind the last block gives the gradient there;
then the blocks come once more, last first: each runs again window by window, its weights' gradients are squared and
added, and the gradient of its input takes the place of that input, which nobody needs any more. So the pass holds, beside
one block, its squares and the gradient of one weight, an array of activations for every block boundary (in files beyond
the store's limit). The alternative, autograd over the whole model, holds the model twice. Products are in bfloat16, as in
SqueezeLLM's own gradients, where the processor has instructions for it; squares are summed in float32.

F is of the original model and does not depend on what a recipe does; it is made before the first block is quantized,
and kept in files beside the finished blocks, so that a run that is killed finds what it had. Law: the result equals
autograd's on the whole model, window by window.

Shapes: N window, T token, d hidden width, O output channel, I input channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lowbit.checkpoints.source import ModelSource
from lowbit.modules import make_drafts, unmake_drafts
from lowbit.parallel import each
from lowbit.progress import Progress, silent
from lowbit.stages.journal import Journal
from lowbit.stages.store import ActivationStore
from lowbit.stages.stream import Call, Stream
from lowbit.steps.precision import faster_products

_BACKWARD = 3
"""Time of a block's backward pass (run again, then two gradients) in forward passes; 2.9 measured on SmolLM2."""


@dataclass
class FisherPass:
    """See the module docstring. :meth:`run` makes what is missing of the files, :meth:`load` reads one.

    Args:
        calls: every block's arguments, from the stream.
        ids: ``[N, T]`` calibration windows; each is one sample of the gradient.
        linears: by block, the paths of the linears that are to be quantized.
        journal: whose directory takes the files.
        progress: ``progress(done, total, what)``.
    """

    source: ModelSource
    stream: Stream
    calls: Sequence[Call]
    ids: Tensor
    linears: Sequence[Sequence[str]]
    store: ActivationStore
    journal: Journal
    progress: Progress = silent

    def run(self, first_NTd: Tensor, blocks: Sequence[int]) -> None:
        """Makes the files of ``blocks`` that are not there. ``first_NTd``: the first block's inputs; not changed.

        Raises:
            ValueError: windows of one token, which have no loss; gradients that are NaN or Inf; a full disk.
        """
        missing = [i for i in blocks if self.linears[i] and not self.path(i).exists()]
        if not missing:
            return
        if self.ids.shape[1] < 2:
            raise ValueError("Fisher information needs calibration windows of at least 2 tokens, found 1")
        total, lowest = len(self.calls), min(missing)
        self._done, self._total = 0.0, total + 1.0 + _BACKWARD * (total - lowest)
        boundary = self._forward(first_NTd)
        self._loss(boundary[total])
        for i in reversed(range(lowest, total)):
            squares = self._backward(i, boundary[i], boundary[i + 1], i in missing, i > lowest)
            self.store.free(_name(i + 1))
            boundary.pop()
            if i in missing:
                self._save(i, squares)
        for i in range(1, lowest + 1):
            self.store.free(_name(i))

    def _forward(self, first_NTd: Tensor) -> list[Tensor]:
        """What enters each block, and what leaves the last: ``[N, T, d]`` each."""
        boundary = [first_NTd]
        for i, call in enumerate(self.calls):
            block = self._loaded(i)
            boundary.append(self.store.allocate(_name(i + 1), first_NTd.shape, torch.float32))
            run, tick = partial(_window, block, call, boundary[i], boundary[i + 1]), f"forward, block {i + 1}"
            with torch.no_grad():
                each(len(self.ids), run, partial(self._tick, 1, tick))
            self._release(i)
        return boundary

    @torch.enable_grad()
    def _loss(self, last_NTd: Tensor) -> None:
        """Puts in place of the last hidden states the gradient, there, of each window's loss."""
        with self.stream.loaded_outside(self.source):
            for w, ids_T in enumerate(self.ids):
                hidden = last_NTd[w : w + 1].clone().requires_grad_()
                with faster_products(hidden.device):
                    logits_TV = self.stream.logits(ids_T[None], hidden)
                of_logits_TV = _of_cross_entropy(logits_TV.detach(), ids_T.to(logits_TV.device))
                last_NTd[w] = torch.autograd.grad(logits_TV, hidden, of_logits_TV)[0][0]
                self._tick(1, "loss")

    @torch.enable_grad()
    def _backward(self, i: int, x_NTd: Tensor, g_NTd: Tensor, wanted: bool, onward: bool) -> dict[str, Tensor]:
        """Fisher information ``[O, I]`` of block i's linears by path, from the gradient ``g`` of its output.

        ``wanted``: else weights are left out and the result is empty. ``onward``: ``x`` becomes the gradient of itself.
        """
        block = self._loaded(i)
        weights = {path: block.get_parameter(f"{path}.weight") for path in self.linears[i]} if wanted else {}
        squares = {path: torch.zeros_like(weight) for path, weight in weights.items()}
        with ExitStack() as stack:
            for path, weight in weights.items():
                weight.requires_grad_()
                handle = weight.register_post_accumulate_grad_hook(_square_into(squares[path]))
                stack.callback(handle.remove)
            for w in range(len(x_NTd)):
                x = x_NTd[w : w + 1].clone().requires_grad_(onward)
                with faster_products(x.device):
                    y = self.calls[i](block, x, w)
                if y.requires_grad:  # not where the only linears of interest are experts that were not chosen
                    y.backward(g_NTd[w : w + 1].to(y.dtype))
                if onward:
                    assert x.grad is not None
                    x_NTd[w] = x.grad[0]
                self._tick(_BACKWARD, f"backward, block {i + 1}")
        block.requires_grad_(False)
        self._release(i)
        return squares

    # Blocks and files

    def _block(self, i: int) -> str:
        return f"{self.stream.architecture.blocks}.{i}"

    def _loaded(self, i: int) -> nn.Module:
        self.source.load_into(self.stream.model, self._block(i))
        make_drafts(self.stream.blocks[i], self.linears[i])
        return self.stream.blocks[i].requires_grad_(False)

    def _release(self, i: int) -> None:
        unmake_drafts(self.stream.blocks[i])
        self.source.release(self.stream.model, self._block(i))

    def path(self, i: int) -> Path:
        return self.journal.directory / f"fisher-{i:05d}.safetensors"

    def _save(self, i: int, squares: dict[str, Tensor]) -> None:
        for path, f_OI in squares.items():
            if not torch.isfinite(f_OI).all():
                raise ValueError(f"{self._block(i)}.{path}: gradients on the calibration text are NaN or Inf")
        self.journal.save(self.path(i).name, squares)

    def load(self, i: int) -> dict[str, Tensor]:
        """``[O, I]`` float32 by path of block i's linears; empty where none of them is to be quantized."""
        return load_file(self.path(i)) if self.linears[i] else {}

    def remove(self) -> None:
        """Deletes the files."""
        for i in range(len(self.linears)):
            self.path(i).unlink(missing_ok=True)

    def _tick(self, cost: float, what: str) -> None:
        self._done += cost / len(self.ids)
        self.progress(self._done, self._total, f"sensitivities: {what}")


def _window(block: nn.Module, call: Call, before_NTd: Tensor, behind_NTd: Tensor, w: int) -> None:
    """Window w through a block."""
    with faster_products(before_NTd.device):  # a setting of the thread
        behind_NTd[w] = call(block, before_NTd[w : w + 1], w)[0]


def _of_cross_entropy(logits_TV: Tensor, ids_T: Tensor) -> Tensor:
    """The gradient of the mean next-token cross-entropy of a window by its logits, in their dtype. One float32 copy of the
    logits, where autograd makes several."""
    count = len(ids_T) - 1
    share_TV = torch.softmax(logits_TV, -1, dtype=torch.float32)
    share_TV[torch.arange(count, device=ids_T.device), ids_T[1:]] -= 1
    share_TV[-1] = 0
    return share_TV.div_(count).to(logits_TV.dtype)


def _name(i: int) -> str:
    return f"fisher boundary {i}"


def _square_into(total: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds the square of a parameter's gradient to ``total`` as soon as it is there, and drops it."""

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        total.addcmul_(parameter.grad, parameter.grad)
        parameter.grad = None

    return hook
