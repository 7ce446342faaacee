"""What a change is: a class of some lines, the built-in ones and users' own alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._trial import Trial

__all__ = ["Change", "NotApplicable"]


class NotApplicable(Exception):  # noqa: N818 (it is no error: a reason)
    """A change would change nothing, or can't be made; the text says why."""


class Change:
    """One thing that is changed in a training that is tried again.

    ```python
    class HalfBatches(Change):
        name = "half of each batch"
        cause = "the batch is too large"

        def apply(self, trial):
            trial.on_batch.append(lambda batch: map_rows(batch, slice(0, 16)))
    ```

    Attributes:
        name: short and unique, as the report shows it.
        kind: `"repair"`: puts right what is out of what is usual; `"part"`: leaves out or replaces a part of the
            program; `"setting"`: another value of something that has many.
        cause: what is at fault if it cures, as the end of a sentence.
        advice: what to do then, a sentence.
        is_of_loss: it changes what the loss measures: where outputs and targets can't be compared, nothing can be said.
    """

    name: str = ""
    kind: str = "setting"
    cause: str = "this is at fault"
    advice: str = ""
    is_of_loss: bool = False

    def apply(self, trial: Trial) -> None:
        """Make the change, on a trial that has not begun.

        Raises:
            NotApplicable: there is nothing to change.
        """
        raise NotImplementedError

    def kind_in(self, trial: Trial) -> str:
        """Return the kind that it is in this training: a setting that is far out of what is usual is repaired."""
        return self.kind

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"
