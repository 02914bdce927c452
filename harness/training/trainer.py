"""The one trainer: a loop that survives being killed; methods bring objectives and callbacks."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from harness.errors import ReplivitError
from harness.training.callbacks import Callback
from harness.training.context import Context
from harness.training.loading import Batches, create_mixup
from harness.training.log import Reporter, write_history
from harness.training.objective import Objective
from harness.training.optim import Schedule, clip_gradients, create_optimizer
from harness.training.state import load_checkpoint, save_checkpoint

SETUP, EPOCH_START, STEP, EPOCH_END, TRAIN_END = range(5)  # places for `Context.reseed`
CHECK_EVERY_ON_GPU = 20  # updates between looks at the loss: each look waits for the device


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """On CPU: only algorithms that give the same bits again (parallel scatter-adds do not)."""
    if device.type != "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time and changes nothing
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


class Trainer:
    """One run: `run()` trains from wherever its directory says it stopped.

    Args:
        context: model, recipe and accelerator; the trainer fills in the rest.
        batches: the training images.
        checkpoint_steps: also write a checkpoint every so many updates (0 = never).
        checkpoint_minutes: ... and after so many minutes. One is written after every epoch.
    """

    def __init__(
        self,
        context: Context,
        batches: Batches,
        objective: Objective,
        callbacks: Sequence[Callback] = (),
        *,
        checkpoint_steps: int = 0,
        checkpoint_minutes: float = 5.0,
        quiet: bool = False,
        note: str | None = None,
    ) -> None:
        self.note = note  # said once when the run starts
        self.context, self.batches, self.objective = context, batches, objective
        self.callbacks, self.quiet = list(callbacks), quiet
        self.checkpoint_steps, self.checkpoint_minutes = checkpoint_steps, checkpoint_minutes
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0  # spent on steps, over all restarts
        self._sums: dict[str, tuple[float, int]] = {}  # total and count of this epoch's losses
        self._epoch_seconds = 0.0
        self._unseen: list[tuple[int, dict[str, Tensor]]] = []  # losses nobody looked at yet
        self._assemble()

    def _assemble(self) -> None:
        """Put model, objective, optimizer, schedule and average together."""
        context, recipe = self.context, self.context.recipe
        accelerator = context.accelerator
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        context.model.to(accelerator.device, memory_format=layout)
        context.reseed(SETUP)
        self.objective.setup(context)
        extra = list(self.objective.parameters())
        optimizer = create_optimizer(context.model, recipe, extra)
        self.schedule = Schedule(optimizer, recipe, context.steps_per_epoch)
        self.ema = ModelEmaV3(context.model, decay=recipe.ema_decay) if recipe.ema_decay else None
        self.mixup = create_mixup(recipe, context.num_classes)
        context.network, context.optimizer = accelerator.prepare(context.model, optimizer)
        if recipe.compile:
            context.network = torch.compile(context.network)
        self._trainable = [one for group in optimizer.param_groups for one in group["params"]]
        inside = {id(one) for one in context.model.parameters()}
        self._outside = [one for one in self._trainable if id(one) not in inside]

    # the loop

    def run(self) -> None:
        """Train to the last epoch, then write nothing more than the last checkpoint.

        Raises:
            ReplivitError: the loss is not finite, or a file cannot be written.
        """
        context = self.context
        self.resume()
        title = f"{context.name}, {context.track}, seed {context.seed}"
        quiet = self.quiet or not context.accelerator.is_main_process
        with (
            reproducible(context.device),
            Reporter(title, context.total_updates, context.updates, quiet) as self.reporter,
        ):
            if context.epoch == context.recipe.epochs:
                self.reporter.say(f"{title}: already trained, in {context.directory}")
            elif context.updates:
                where = f"epoch {context.epoch + 1}, step {context.step + 1}"
                self.reporter.say(f"{title}: goes on at {where}")
            elif self.note:
                self.reporter.say(f"{title}: {self.note}")
            while context.epoch < context.recipe.epochs:
                self._epoch()

    def _epoch(self) -> None:
        context = self.context
        context.network.train()  # a callback may put parts back into evaluation mode
        self._call("on_epoch_start", EPOCH_START)
        if self.mixup is not None:
            off = context.recipe.mixup_off_epoch
            self.mixup.mixup_enabled = off is None or context.epoch < off
        passes = self.batches(context.epoch, context.step)
        last_saved = tick = time.perf_counter()
        while context.step < context.steps_per_epoch:
            self._step(passes)
            for callback in self.callbacks:
                callback.on_step_end(context)
            context.step += 1
            if context.step == context.steps_per_epoch:
                self._look()  # waits for the device, so that the seconds are the whole epoch's
            now = time.perf_counter()
            self._epoch_seconds, tick = self._epoch_seconds + now - tick, now
            if context.step < context.steps_per_epoch and self._due(now - last_saved):
                self.save()
                last_saved = tick = time.perf_counter()
        self._finish_epoch()

    def _step(self, passes: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One update: the passes it is split into, clipping, optimizer, average."""
        context, recipe = self.context, self.context.recipe
        accelerator, optimizer = context.accelerator, context.optimizer
        self.schedule.set(context.epoch, context.step)
        optimizer.zero_grad(set_to_none=True)
        for number in range(recipe.accumulation):
            images, targets = next(passes)
            context.reseed(STEP, context.step, number)
            if recipe.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            last = number == recipe.accumulation - 1
            with nullcontext() if last else accelerator.no_sync(context.network):
                parts = self.objective.step(context.network, images, targets, context)
            self._unseen.append((context.step, {key: one.detach() for key, one in parts.items()}))
        if accelerator.num_processes > 1:
            for parameter in self._outside:  # those inside are averaged by the wrapper
                if parameter.grad is not None:
                    parameter.grad = accelerator.reduce(parameter.grad, "mean")
        if recipe.clip is not None:
            accelerator.unscale_gradients(optimizer)
            clip_gradients(self._trainable, recipe)
        optimizer.step()
        context.updates += 1
        context.images_seen += recipe.batch_size
        if self.ema is not None:
            self.ema.update(context.model)
        if context.device.type == "cpu" or context.updates % CHECK_EVERY_ON_GPU == 0:
            self._look()

    def _look(self) -> None:
        """Add up the losses since the last look; stop if one is not finite."""
        if not self._unseen:
            return
        # one transfer for all: each wait for the device costs more than the losses
        values = torch.stack([one.float() for _, parts in self._unseen for one in parts.values()])
        numbers = iter(values.tolist())
        for step, parts in self._unseen:
            told = {name: next(numbers) for name in parts}
            if not math.isfinite(told["loss"]):
                self._diverged(step, told["loss"])
            for name, value in told.items():
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + value, count + 1)
        self._unseen.clear()
        self.reporter.step(self.context.updates, self._rate(), told["loss"])

    def _rate(self) -> float:
        """Images per second of the epoch under way."""
        context = self.context
        done = context.updates - context.epoch * context.steps_per_epoch
        seconds = self._epoch_seconds
        return done * context.recipe.batch_size / seconds if seconds > 0 else 0.0

    def _diverged(self, step: int, loss: float) -> None:
        context = self.context
        indices = self.batches.order.images(context.epoch, step)
        shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
        self.schedule.set(context.epoch, step)
        raise ReplivitError(
            f"the loss became {loss} in epoch {context.epoch + 1}, step {step + 1} of "
            f"{context.steps_per_epoch}, at learning rate {context.lr:.3g} (batch of images "
            f"{shown}); the checkpoint before is kept. A lower learning rate, gradient clipping "
            "or float32 may help"
        )

    def _finish_epoch(self) -> None:
        context = self.context
        context.row = {
            "epoch": context.epoch,
            **{name: total / count for name, (total, count) in self._sums.items()},
            "lr": context.lr,
            "images_per_second": self._rate(),
            "seconds": self._epoch_seconds,
        }
        context.model.eval()
        self._call("on_epoch_end", EPOCH_END)
        self.history.append(dict(context.row))
        self.reporter.epoch(context.row, context.recipe.epochs)
        self.seconds += self._epoch_seconds
        self._sums, self._epoch_seconds = {}, 0.0
        context.epoch, context.step = context.epoch + 1, 0
        self.save()
        if context.accelerator.is_main_process:
            write_history(context.directory, self.history)

    def _call(self, name: str, place: int) -> None:
        self.context.reseed(place)
        for callback in self.callbacks:
            getattr(callback, name)(self.context)

    # what survives

    def _due(self, seconds: float) -> bool:
        by_step = self.checkpoint_steps and self.context.step % self.checkpoint_steps == 0
        return bool(by_step) or seconds > 60 * self.checkpoint_minutes

    def save(self) -> None:
        """Write the checkpoint (by the main process; the losses are looked at before)."""
        self._look()
        context = self.context
        if not context.accelerator.is_main_process:
            return
        scaler = context.accelerator.scaler
        state = {
            "epoch": context.epoch,
            "step": context.step,
            "updates": context.updates,
            "images_seen": context.images_seen,
            "seconds": self.seconds,
            "epoch_seconds": self._epoch_seconds,
            "sums": self._sums,
            "history": self.history,
            "model": context.model.state_dict(),
            "optimizer": context.optimizer.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "scaler": scaler.state_dict() if scaler else None,
            "objective": self.objective.state_dict(),
            "objective_parameters": [one.detach() for one in self._outside],
            "callbacks": {type(one).__qualname__: one.state_dict() for one in self.callbacks},
        }
        save_checkpoint(context.directory, state)

    def resume(self) -> None:
        """Take up the checkpoint of the directory, if there is one."""
        context = self.context
        state = load_checkpoint(context.directory)
        if state is None:
            return
        context.epoch, context.step = state["epoch"], state["step"]
        context.updates, context.images_seen = state["updates"], state["images_seen"]
        self.seconds, self._epoch_seconds = state["seconds"], state["epoch_seconds"]
        self._sums, self.history = state["sums"], state["history"]
        context.model.load_state_dict(state["model"])
        context.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        if state["scaler"]:
            context.accelerator.scaler.load_state_dict(state["scaler"])
        self.objective.load_state_dict(state["objective"])
        with torch.no_grad():
            for parameter, value in zip(self._outside, state["objective_parameters"], strict=True):
                parameter.copy_(value)
        for callback in self.callbacks:
            if (own := state["callbacks"].get(type(callback).__qualname__)) is not None:
                callback.load_state_dict(own)

    def result(self) -> nn.Module:
        """The trained module, in evaluation mode: the averaged one if the recipe says so."""
        context = self.context
        self._call("on_train_end", TRAIN_END)
        context.accelerator.unwrap_model(context.network, keep_fp32_wrapper=False)
        if context.recipe.ema_final:
            context.model.load_state_dict(self.ema.module.state_dict())
        return context.model.eval()
