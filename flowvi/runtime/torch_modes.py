"""Watching every operation of torch."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class EagerDispatchMode(TorchDispatchMode):
    """A mode for operations that run as they come.

    Torch makes sure that its compiler leaves a mode alone, for which it loads the compiler:
    two seconds of every process. None of these is entered in what is compiled.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
