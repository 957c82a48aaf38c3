"""A ``with`` block in which the user's own backward passes are recorded."""

from __future__ import annotations

from abc import abstractmethod

from torch_secorder.model.hooks import HookScope
from torch_secorder.recording.user_recorder import UserRecorder


class RecordedBlock(HookScope):
    """A block with a recorder, which a subclass makes and enters in ``_attach``."""

    _recorder: UserRecorder | None = None

    def _detach(self) -> None:
        if self._recorder is not None:
            self._recorder.__exit__()
            self._recorder = None

    def __exit__(self, *exc_info: object) -> None:
        waiting = [] if self._recorder is None else self._recorder.waiting
        super().__exit__(*exc_info)
        if not any(exc_info):  # the user's own exception comes first
            for error in waiting:
                self._refuse(error)

    @abstractmethod
    def _refuse(self, error: Exception) -> None:
        """Raise or note the refusal of a pass at whose own end nothing could be raised."""
