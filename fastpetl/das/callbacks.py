"""The search inside loops that exist: Hugging Face's Trainer, Lightning. The libraries are imported when asked for."""

from __future__ import annotations

from pathlib import Path

import torch

from fastpetl.das.searching import Search

__all__ = ["lightning_callback", "trainer_callback"]
FILE = "fastpetl_search.pt"  # tensors and JSON, read with weights_only


def _check(search, function: str) -> None:
    if not isinstance(search, Search):
        raise TypeError(f"{function}: search is {type(search).__name__}, expected a fastpetl.das.Search")


def trainer_callback(search: Search):
    """Semantics: a transformers.TrainerCallback: each micro-batch is one step of `search`; when training ends,
    `search.finish()` has been called and `search.plan()` is the result.

    The Trainer's checkpoints get a file of the search; a training that is resumed from one goes on with it.
    """
    _check(search, "trainer_callback")
    from transformers import TrainerCallback

    class DASCallback(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            if state.global_step:
                search.load_state_dict(_resumed(args, state.global_step))

        def on_step_begin(self, args, state, control, **kwargs):
            search.begin()

        def on_substep_end(self, args, state, control, **kwargs):
            search.end()
            search.begin()

        def on_step_end(self, args, state, control, **kwargs):
            search.end()

        def on_save(self, args, state, control, **kwargs):
            if state.is_world_process_zero:  # all ranks have the same search
                torch.save(search.state_dict(), _checkpoint(args.output_dir, state.global_step) / FILE)

        def on_train_end(self, args, state, control, **kwargs):
            search.finish()

    return DASCallback()


def _checkpoint(folder, step: int) -> Path:
    return Path(folder) / f"checkpoint-{step}"


def _resumed(args, step: int) -> dict:
    """The state beside the checkpoint the Trainer has gone on from."""
    given = [Path(args.resume_from_checkpoint)] if isinstance(args.resume_from_checkpoint, str) else []
    folders = [*given, _checkpoint(args.output_dir, step)]
    found = next((folder / FILE for folder in folders if (folder / FILE).is_file()), None)
    if found is None:
        places = ", ".join(map(str, folders))
        raise FileNotFoundError(f"trainer_callback: training goes on at step {step}, expected {FILE} in {places}")
    return torch.load(found, map_location="cpu", weights_only=True)


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
