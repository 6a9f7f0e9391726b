"""The search inside loops that exist: transformers' Trainer, Lightning, several processes."""

import json
import sys
from pathlib import Path

import pytest
import torch

import fastpetl
from das_task import Task
from fastpetl.das import Search, search
from vilt_tiny import inputs, one_thread  # noqa: F401


class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        data = {name: value[i % 2] for name, value in inputs().items()}
        return {**data, "labels": torch.eye(5)[i % 5]}


def test_inside_the_trainer_of_transformers(tmp_path):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    task = Task()
    seen = []
    task.model.vilt.encoder.register_forward_pre_hook(
        lambda m, a: seen.append(fastpetl.skip.current(task.model).blocks)
    )
    found = Search(task.model, task.evaluate, n_skip=2, turn=2, warmup_steps=2)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    Trainer(task.model, arguments, train_dataset=Items(), callbacks=[fastpetl.das.trainer_callback(found)]).train()
    assert found.step == 8 and [r["step"] for r in found.rounds] == [3, 5, 7]  # micro-batches, not optimizer steps
    assert len(seen) == 8 + 3 * 3 and len(set(seen)) > 1
    assert len(found.plan().blocks) == 2 and fastpetl.skip.current(task.model) is None


def test_inside_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self, task):
            super().__init__()
            self.model, self.task = task.model, task

        def training_step(self, batch, index):
            return self.model(**batch).loss

        def configure_optimizers(self):
            return self.task.optimizer

    task = Task()
    found = Search(task.model, task.evaluate, n_skip=2, turn=2, warmup_steps=2)
    trainer = lightning.Trainer(
        max_steps=6,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[fastpetl.das.lightning_callback(found)],
    )
    trainer.fit(Module(task), torch.utils.data.DataLoader(Items(), batch_size=2))
    assert found.step == 6 and [r["step"] for r in found.rounds] == [3, 5]
    assert fastpetl.skip.current(task.model) is None
    again = Search(task.model, task.evaluate, n_skip=2, turn=2, warmup_steps=2)
    callback = fastpetl.das.lightning_callback(again)
    callback.load_state_dict(fastpetl.das.lightning_callback(found).state_dict())
    assert again.plan() == found.plan()


def _rank(rank, folder):
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    task = Task()
    ddp = torch.nn.parallel.DistributedDataParallel(task.model)  # find_unused_parameters=False
    task.data = {name: value[rank : rank + 1] for name, value in task.data.items()}
    task.target = task.target[rank : rank + 1]

    def step(i):
        torch.manual_seed(i)
        task.optimizer.zero_grad()
        task.loss(ddp(**task.data), task.target).backward()
        task.optimizer.step()

    plan = search(task.model, step, task.evaluate, steps=7, n_skip=2, turn=3, warmup_steps=0, progress=False)
    Path(folder, f"{rank}.json").write_text(json.dumps([plan.gates, plan.rounds, plan.blocks]))
    torch.distributed.destroy_process_group()


def test_ranks_agree(tmp_path):
    torch.multiprocessing.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    a, b = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert a == b and any(a[0]) and len(a[1]) == 2
