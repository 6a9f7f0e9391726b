"""Which task a model's task-specific modules serve: set by `fastpetl.task`, or given to a call as `task=`."""

from __future__ import annotations


class TaskRouted:
    """Mixin of a layer that holds modules per task: what is set on it, or given as `task=`, reaches its forward.

    The setting is read where the layer is called, outside activation checkpointing: a layer that is run again in
    backward sees the task of its forward, whatever is set by then.
    """

    _fastpetl_task: str | None = None

    def __call__(self, *args, task=None, **kwargs):
        return super().__call__(*args, task=self._fastpetl_task if task is None else task, **kwargs)
