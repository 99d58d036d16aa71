"""The loop of training: steps of an optimizer, measured on windows that are not trained on, and continued after a kill.

A training is determined by its stage, its text and its seed: the order of windows follows from the seed, and so does what a
choice of parameters draws in a step. Its state (leaves, moments of the optimizer, position) is written every few minutes. A run that was killed continues
from it and takes the very steps that it would have taken.

Several processes take the steps together, where a launcher started them: see :class:`~lowbit.training.Processes`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.numerics.divergence import kl_and_agreement
from lowbit.progress import Progress, silent
from lowbit.recipes import Train
from lowbit.steps.precision import faster_products
from lowbit.training import Batch, Curve, Parameters, Processes, Start, Text, loss_in_pieces, recomputed, replaced

SAVE_SECONDS = 180.0
"""Between two saved states."""


@dataclass(frozen=True)
class StateFile:
    """Where something is kept that a training needs when it is continued, such as its state.

    Attributes:
        path: the file.
        place: replaces it by what a function writes to the path that it is given: whole, or not at all.
    """

    path: Path
    place: Callable[[Callable[[Path], None]], None]

    def load(self) -> dict[str, Any] | None:
        """What was saved last; None: nothing that can be read. A training then begins anew, and ends the same."""
        try:
            return torch.load(self.path, weights_only=True)
        except Exception:  # torch reports damage by errors of several types
            return None


@dataclass
class _Best:
    """The leaves with the least that was measured so far."""

    value: float = math.inf
    step: int = 0
    leaves: list[Tensor] | None = None
    since: int = 0  # measurements that were no better


@dataclass
class Descent:
    """One training of a model, in place.

    Args:
        model: a transformers causal language model in float32.
        stage: what is trained, towards what, how long.
        text: what is trained on.
        held_out: what is measured on; None: nothing is measured, and the last state is kept.
        start: what the choice of parameters is given.
        blocks: of the model, in order.
        seed: of the order of windows.
        state: where the state is kept; None: a kill loses the training.
        curve: makes the record of steps, of which those up to a given one count; None: it is not kept.

    Attributes:
        parameters: what is trained, from :meth:`run` on.
    """

    model: nn.Module
    stage: Train
    text: Text
    held_out: Text | None = None
    start: Start = field(default_factory=Start)
    blocks: Iterable[nn.Module] = ()
    seed: int = 0
    state: StateFile | None = None
    curve: Callable[[int | None], Curve] | None = None
    progress: Progress = silent
    parameters: Parameters | None = field(default=None, init=False)

    def run(self) -> list[str]:
        """Trains; returns notes for the report.

        Raises:
            ValueError: the loss became NaN or Inf.
        """
        self.parameters = parameters = self.stage.what.parameters(self.model.requires_grad_(False), self.start)
        count, seq_len = self.text.ids_NT.shape
        steps = step_windows(self.stage, count, seq_len, self.seed)
        notes = list(parameters.notes)
        if not any(group.leaves for group in parameters.groups):
            notes.append("nothing was trained: the packed model stores no number that this stage moves")
        elif steps:
            notes += _Loop(self, parameters, steps).run()
        parameters.commit()
        return notes


class _Loop:
    """The steps of one training."""

    def __init__(self, descent: Descent, parameters: Parameters, steps: list[list[int]]):
        self.descent, self.stage, self.parameters, self.steps = descent, descent.stage, parameters, steps
        self.processes = Processes.here()
        self.leaves = [leaf for group in parameters.groups for leaf in group.leaves]
        self.optimizer = self.stage.optimizer.make(parameters.groups, self.stage.lr)
        self.schedule = self.stage.schedule.make(self.optimizer, len(steps))
        self.best, self.measured = _Best(), math.nan
        self.done, self.seen = 0, 0  # steps, windows
        self.lr = self.optimizer.param_groups[0]["lr"]  # of the last step
        self._windows, self._saved_at, self._before = sum(map(len, steps)), time.monotonic(), 0.0
        self.judged = "KL" if self.stage.judge == "original" else self.stage.objective.name
        measured = self.stage.measurements if descent.held_out is not None else 0
        self._measured_at = {round(k * len(steps) / measured) for k in range(measured + 1)} if measured else set()

    def run(self) -> list[str]:
        self.objective, note = self.stage.objective.settled(self.descent.text)
        notes = [note] if note else []
        saved = None if self.descent.state is None else self.descent.state.load()
        if saved is not None:
            self._restore(saved)
        self.curve = None
        if self.descent.curve is not None and self.processes.first:
            self.curve = self.descent.curve(None if saved is None else self.done)
        self._began, self._seen_before = time.monotonic(), self.seen
        blocks = recomputed(self.descent.blocks) if self.stage.recompute else nullcontext()
        try:
            with self.parameters, blocks:
                if saved is None:
                    self._record(None)
                while self.done < len(self.steps) and not self._stands_still:
                    loss = self._gradients(self.steps[self.done])
                    self._move(len(self.steps[self.done]))
                    self._record(loss)
                    if time.monotonic() - self._saved_at >= SAVE_SECONDS:
                        self._save()
                if self._measured_at:
                    notes += self._keep_best()
        finally:
            if self.curve is not None:
                self.curve.close()
        return notes

    # Steps

    def _gradients(self, windows: list[int]) -> float:
        """The gradients of one step; returns its mean loss over all processes. Ctrl-C here, where nearly all time goes, saves
        what is trained so far."""
        try:
            return self._backward(windows)
        except KeyboardInterrupt:
            self._save()
            raise

    def _backward(self, windows: list[int]) -> float:
        self.optimizer.zero_grad()
        mine = self.processes.share(windows)
        total = torch.zeros((), dtype=torch.float64, device=self.descent.text.ids_NT.device)
        for first in range(0, len(mine), self.stage.batch):
            some = mine[first : first + self.stage.batch]
            with replaced(self.descent.model, self.parameters.replaced()), self._drawing(some[0]):
                share = len(some) / len(windows)
                loss = self._loss(self.descent.text, some) * share
                loss.backward()
            total += loss.item()
        if self.processes.count > 1:
            for leaf in self.leaves:
                leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            self.processes.sum([total, *(leaf.grad for leaf in self.leaves if leaf.grad is not None)])
        if not math.isfinite(total.item()):
            raise ValueError("training met a loss that is NaN or Inf; use a smaller lr or leave the stage out")
        return total.item()

    def _move(self, windows: int) -> None:
        """Takes the step."""
        if self.stage.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.leaves, self.stage.clip_norm)
        self.lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.schedule.step()
        self.done, self.seen = self.done + 1, self.seen + windows

    @contextmanager
    def _drawing(self, window: int) -> Iterator[None]:
        """While open, random numbers follow from the seed, the step and the window, wherever a run was stopped."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.descent.seed * 1_000_003 + self.done) * 1_000_003 + window)
            yield

    def _loss(self, text: Text, windows: list[int]) -> Tensor:
        objective, ids_BT = self.objective, text.ids_NT[windows]
        asked = {"output_hidden_states": True} if objective.reads_hidden else {}
        with faster_products(ids_BT.device, self.stage.amp):
            if self.stage.recompute and objective.reads_next:
                return loss_in_pieces(self.descent.model, ids_BT, objective)
            output = self.descent.model(input_ids=ids_BT, use_cache=False, **asked)
        hidden = tuple(output.hidden_states) if objective.reads_hidden else ()
        return objective.loss(Batch(windows, ids_BT, output.logits, text.original, hidden))

    # Measuring

    def _record(self, loss: float | None) -> None:
        """Measures where it is time, and notes the step."""
        measured = None
        if self.done in self._measured_at:
            self.measured = measured = self._judge()
            if measured < self.best.value:
                self.best = _Best(measured, self.done, [leaf.detach().clone() for leaf in self.leaves])
            else:
                self.best.since += 1
        if self.curve is not None:
            tokens, seconds = self.seen * self.descent.text.ids_NT.shape[1], round(self._seconds, 3)
            of_kl = self.stage.judge == "original"
            found = {"held_out_kl": measured if of_kl else None, "held_out_loss": None if of_kl else measured}
            row = {"step": self.done, "tokens": tokens, "loss": loss, **found, "lr": self.lr}
            self.curve.add(row | {"seconds": seconds})
        if self.processes.first:
            self._report(loss)

    def _report(self, loss: float | None) -> None:
        text = f"training, step {self.done} of {len(self.steps)}"
        if loss is not None:
            text += f", {self.stage.objective.name} {loss:.3f}"
        if not math.isnan(self.measured):
            text += f", held-out {self.judged} {self.measured:.3f}"
        if self.seen > self._seen_before:
            tokens = (self.seen - self._seen_before) * self.descent.text.ids_NT.shape[1]
            text += f", {tokens / (time.monotonic() - self._began):.0f} tokens/s"
        self.descent.progress(self.seen, self._windows, text)

    @torch.no_grad()
    def _judge(self) -> float:
        """What is to be small on the windows that are not trained on, in nats a token: the mean over them."""
        text = self.descent.held_out
        assert text is not None
        total = torch.zeros((), dtype=torch.float64, device=text.ids_NT.device)
        with replaced(self.descent.model, self.parameters.replaced()):
            for w in self.processes.share(list(range(len(text)))):
                total += self._divergence(text, w) if self.stage.judge == "original" else self._loss(text, [w]).double()
        self.processes.sum([total])
        return total.item() / len(text)

    def _divergence(self, text: Text, w: int) -> Tensor:
        """Mean KL divergence from the original on window w."""
        logits_TV = self.descent.model(input_ids=text.ids_NT[w : w + 1], use_cache=False).logits[0]
        return kl_and_agreement(text.original(w).logits_TV, logits_TV)[0].mean()

    @property
    def _stands_still(self) -> bool:
        return 0 < self.stage.patience <= self.best.since

    @torch.no_grad()
    def _keep_best(self) -> list[str]:
        notes = []
        if self.done < len(self.steps):
            notes.append(
                f"training stopped at step {self.done} of {len(self.steps)}: {self.best.since} measurements were no better"
            )
        if self.best.leaves is None:  # none was finite
            raise ValueError(f"the {self.judged} on held-out text is without bound; use a smaller lr")
        for leaf, value in zip(self.leaves, self.best.leaves, strict=True):
            leaf.copy_(value)
        unseen = f"with a {self.judged} of {self.best.value:.4f} on windows that it was not trained on"
        if self.best.step == 0:
            notes.append(
                f"training made nothing better ({self.measured:.4f} when it ended), and what it started from is kept, {unseen}: use "
                "a smaller lr or more tokens"
            )
        elif self.best.step < len(self.steps):
            notes.append(f"training kept step {self.best.step} of {len(self.steps)}, {unseen}")
        return notes

    # State

    @property
    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._began

    def _save(self) -> None:
        self._saved_at = time.monotonic()
        if self.descent.state is None or not self.processes.first:
            return
        state = {
            "done": self.done,
            "seconds": self._seconds,
            "leaves": [leaf.detach() for leaf in self.leaves],
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "best": {name: getattr(self.best, name) for name in ("value", "step", "leaves", "since")},
            "measured": self.measured,
        }
        self.descent.state.place(lambda path: torch.save(state, path))

    @torch.no_grad()
    def _restore(self, state: dict[str, Any]) -> None:
        for leaf, value in zip(self.leaves, state["leaves"], strict=True):
            leaf.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.best = _Best(**state["best"])
        self.done, self._before, self.measured = state["done"], state["seconds"], state["measured"]
        self.seen = sum(map(len, self.steps[: self.done]))


def step_windows(stage: Train, count: int, seq_len: int, seed: int) -> list[list[int]]:
    """The windows of each step: every pass over all ``count`` windows is in an order of its own, drawn from ``seed``.

    Without ``stage.tokens`` there are ``stage.epochs`` passes; else as many windows as hold these tokens, the last pass cut short.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = stage.epochs * count if stage.tokens is None else -(-stage.tokens // seq_len)
    together, steps, seen = stage.batch * stage.accumulate, [], 0
    while seen < wanted:
        order = torch.randperm(count, generator=generator).tolist()[: wanted - seen]
        steps += [order[i : i + together] for i in range(0, len(order), together)]
        seen += len(order)
    return steps
