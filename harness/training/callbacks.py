"""Callbacks: what happens between steps and epochs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.errors import ReplivitError
from harness.training.objective import identity_of

if TYPE_CHECKING:
    from harness.training.context import Context


class Callback:
    """Base of all callbacks; every method may stay as it is.

    A run that was killed inside an epoch calls `on_epoch_start` of that epoch once more, so what
    it does must follow from the context and from `state_dict`.
    """

    def on_epoch_start(self, context: Context) -> None:
        """Before the first step of `context.epoch`."""

    def on_step_end(self, context: Context) -> None:
        """After the update of `context.step`."""

    def on_epoch_end(self, context: Context) -> None:
        """After the last step; numbers put into `context.row` are logged."""

    def on_train_end(self, context: Context) -> None:
        """After the last epoch, before weights are written and evaluated."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings and containers of them that a restart needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def identity(self) -> dict[str, Any] | None:
        """What makes this callback this one; None if it only watches, so that a run may be
        resumed with or without it."""
        return identity_of(self)


class Watcher(Callback):
    """Base of callbacks that change nothing of the training."""

    def identity(self) -> None:
        return None


class EvaluateEvery(Watcher):
    """Log top-1 on the test split every `epochs` epochs: a curve to look at, never a choice."""

    def __init__(self, epochs: int = 1, limit: int | None = None) -> None:
        self.epochs, self.limit = epochs, limit

    def on_epoch_end(self, context: Context) -> None:
        from harness.evaluation import evaluate

        if (context.epoch + 1) % self.epochs or not context.accelerator.is_main_process:
            return
        records = evaluate(
            context.model, context.track, root=context.root, device=context.device,
            image_size=context.side, limit=self.limit,
        )  # fmt: skip
        context.row.update({record.metric: record.value for record in records})


class TensorBoard(Watcher):
    """Write each epoch's row for TensorBoard into the run's directory.

    Raises:
        ReplivitError: TensorBoard is not installed.
    """

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ReplivitError(
                "TensorBoard is not installed; `pip install tensorboard`, or leave it out: "
                "log.csv and log.jsonl hold the same numbers"
            ) from error
        self._writer_type = SummaryWriter

    def on_epoch_end(self, context: Context) -> None:
        if not context.accelerator.is_main_process:
            return
        with self._writer_type(str(context.directory / "tensorboard")) as writer:
            for name, value in context.row.items():
                if name != "epoch" and isinstance(value, (int, float)):
                    writer.add_scalar(name, value, context.epoch)
