"""The search inside loops that exist: Hugging Face's Trainer, Lightning. The libraries are imported when asked for."""

from __future__ import annotations

from fastpetl.das.searching import Search

__all__ = ["lightning_callback", "trainer_callback"]


def _check(search, function: str) -> None:
    if not isinstance(search, Search):
        raise TypeError(f"{function}: search is {type(search).__name__}, expected a fastpetl.das.Search")


def trainer_callback(search: Search):
    """Semantics: a transformers.TrainerCallback: each micro-batch is one step of `search`; when training ends,
    `search.finish()` has been called and `search.plan()` is the result.
    """
    _check(search, "trainer_callback")
    from transformers import TrainerCallback

    class DASCallback(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            search.begin()

        def on_substep_end(self, args, state, control, **kwargs):
            search.end()
            search.begin()

        on_step_end = on_substep_end

        def on_train_end(self, args, state, control, **kwargs):
            search.finish()

    return DASCallback()


def lightning_callback(search: Search):
    """Semantics: a lightning.pytorch.Callback: each training batch is one step of `search`; when training ends,
    `search.finish()` has been called and `search.plan()` is the result.
    """
    _check(search, "lightning_callback")
    try:
        from lightning.pytorch import Callback
    except ImportError:
        from pytorch_lightning import Callback

    class DASCallback(Callback):
        def on_train_batch_start(self, *args, **kwargs):
            search.begin()

        def on_train_batch_end(self, *args, **kwargs):
            search.end()

        def on_train_end(self, *args, **kwargs):
            search.finish()

        def state_dict(self):
            return search.state_dict()

        def load_state_dict(self, state):
            search.load_state_dict(state)

    return DASCallback()
