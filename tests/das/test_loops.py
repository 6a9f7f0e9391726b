"""The search inside loops that exist: transformers' Trainer, Lightning, several processes."""

import json
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

import fastpetl
import two_ranks
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


@pytest.mark.parametrize("given", [True, False])
def test_the_trainers_checkpoints_hold_the_search(tmp_path, given):
    """Resumed after a kill it ends with the gates, rounds and weights of a run that was not interrupted."""
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    def run(folder, steps, resume=None):
        task = Task()
        found = Search(task.model, task.evaluate, n_skip=2, turn=2, warmup_steps=2)
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=6,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            save_steps=3,
            logging_strategy="no",
            disable_tqdm=True,
            resume_from_checkpoint=str(resume) if resume and given else None,
        )
        callbacks = [fastpetl.das.trainer_callback(found), *([] if steps == 6 else [Stop()])]
        trainer = Trainer(task.model, arguments, train_dataset=Items(), callbacks=callbacks)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return found, task.model

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    whole, model = run(tmp_path / "whole", 6)
    run(tmp_path / "killed", 3)
    folder = tmp_path / "killed" / "checkpoint-3"
    found, resumed = run(tmp_path / "other" if given else tmp_path / "killed", 6, folder)
    assert (found.step, found.count) == (12, whole.count) and len(found.rounds) > 3
    assert found.plan() == whole.plan()
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    (folder / "fastpetl_search.pt").unlink()
    with pytest.raises(FileNotFoundError, match="trainer_callback: training goes on at step 3, expected fastpetl_sea"):
        run(tmp_path / "killed", 6, folder)


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
        enable_checkpointing=False,
        callbacks=[fastpetl.das.lightning_callback(found)],
        **_quiet(tmp_path),
    )
    trainer.fit(Module(task), torch.utils.data.DataLoader(Items(), batch_size=2))
    assert found.step == 6 and [r["step"] for r in found.rounds] == [3, 5]
    assert fastpetl.skip.current(task.model) is None
    again = Search(task.model, task.evaluate, n_skip=2, turn=2, warmup_steps=2)
    callback = fastpetl.das.lightning_callback(again)
    callback.load_state_dict(fastpetl.das.lightning_callback(found).state_dict())
    assert again.plan() == found.plan()


def _quiet(folder) -> dict:
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    return {**off, "accelerator": "cpu", "default_root_dir": folder}


def test_lightnings_checkpoints_hold_the_search(tmp_path):
    """Resumed from the file Lightning wrote, it ends with the gates, rounds and weights of an uninterrupted run."""
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(lightning.LightningModule):
        def __init__(self, task):
            super().__init__()
            self.model, self.task = task.model, task

        def training_step(self, batch, index):
            torch.manual_seed(self.global_step)  # ViLT orders patches by it
            return self.model(**batch).loss

        def configure_optimizers(self):
            return self.task.optimizer

    def run(steps, resume=None):
        task = Task()
        found = Search(task.model, task.evaluate, n_skip=2, turn=3, warmup_steps=2)
        written = ModelCheckpoint(tmp_path, every_n_train_steps=8, save_top_k=-1, filename="at-{step}")
        callbacks = [fastpetl.das.lightning_callback(found), written]
        trainer = lightning.Trainer(max_steps=steps, callbacks=callbacks, **_quiet(tmp_path))
        trainer.fit(Module(task), torch.utils.data.DataLoader(Items(), batch_size=2), ckpt_path=resume)
        return found, task.model

    whole, model = run(12)
    (tmp_path / "at-step=8.ckpt").unlink()
    run(8)
    found, resumed = run(12, tmp_path / "at-step=8.ckpt")
    assert (found.step, found.count) == (12, whole.count) and len(found.rounds) == 4
    assert found.plan() == whole.plan()
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def _rank(rank, folder):
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

    own = []

    def evaluate(round):
        own.append(task.evaluate(round).item())
        return own[-1]

    options = {"steps": 7, "n_skip": 2, "turn": 3, "warmup_steps": 0, "progress": False}
    plans = [search(task.model, step, evaluate, **options, quirks=quirks) for quirks in ((), ("rank0_rewards",))]
    found = [[plan.gates, plan.rounds, plan.blocks] for plan in plans]
    resumed = _interrupted_and_whole(rank, folder)
    Path(folder, f"{rank}.json").write_text(json.dumps([found, own, resumed]))


def _interrupted_and_whole(rank, folder) -> list:
    """[gates, rounds and a weight of a search that was killed and resumed, of one that was not]: ViLT orders patches by
    the global generator, which each rank has in a state of its own.
    """
    found = []
    for killed_at in (4, None):
        for seed in (rank, 10 + rank):
            task = Task()
            ddp = torch.nn.parallel.DistributedDataParallel(task.model)

            def step(i, task=task, ddp=ddp, dies=killed_at if seed == rank else None):
                if i == dies:
                    raise KeyboardInterrupt
                task.optimizer.zero_grad()
                task.loss(ddp(**task.data), task.target).backward()
                task.optimizer.step()

            torch.manual_seed(seed)
            options = {"steps": 7, "n_skip": 2, "turn": 2, "warmup_steps": 0, "progress": False, "per_sample": True}
            options |= {"checkpoint": Path(folder, f"search{killed_at}.pt"), "checkpoint_every": 3}
            try:
                plan = search(task.model, step, task.evaluate, state={"optimizer": task.optimizer}, **options)
            except KeyboardInterrupt:
                continue
            found.append([plan.gates, plan.rounds, task.model.classifier[3].weight.tolist()])
            break
    return found


def test_ranks_agree(tmp_path):
    """On the mean of their rewards; by the quirk's name on rank 0's."""
    two_ranks.run(__file__, tmp_path)
    (a, own, resumed), (b, other, *_) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert resumed[0] == resumed[1] and len(resumed[0][1]) == 3
    assert a == b and own != other
    losses = [[loss for r in rounds for loss in r["losses"]] for _, rounds, _ in a]
    n = len(losses[0])
    assert n == len(losses[1]) == 2 * 3 and all(any(gates) for gates, _, _ in a)
    assert losses[0] == pytest.approx([(x + y) / 2 for x, y in zip(own[:n], other[:n], strict=True)])
    assert losses[1] == own[n:]


def test_meter_and_its_swapped_labels():
    """The search on METER, its text and image layers skipped apart; by the quirk's name with the released labels."""
    import meter_tiny

    def run(*quirks):
        model = fastpetl.patch(meter_tiny.tiny())
        given, target = meter_tiny.inputs(), torch.tensor([1, 2])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

        def loss(round=None):
            return torch.nn.functional.cross_entropy(model(**given).logits, target)

        def step(i):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        options = {"turn": 2, "warmup_steps": 2, "quirks": quirks, "progress": False}
        return search(model, step, loss, steps=8, n_skip=1, **options), fastpetl.blocks(model)

    (plan, blocks), (swapped, _) = run(), run("swapped_labels")
    assert plan.gates == swapped.gates and any(plan.gates) and plan.blocks == swapped.blocks
    names = [block.name for block in blocks]
    half = len(names) // 2
    assert all("text" in name for name in names[:half]) and all("image" in name for name in names[half:])
    (chosen,) = plan.blocks
    assert plan.names == (names[chosen],) and swapped.names == (names[(chosen + half) % len(names)],)
    with pytest.raises(ValueError, match="search: quirks has 'swapped_labels', expected a model with text and image"):
        Search(Task().model, lambda round: None, n_skip=2, quirks=("swapped_labels",))
