"""The search of DAS: which blocks can be skipped, found while the adapters train.

Source: DAS (NeurIPS 2023), Algorithm 1, and the released code, whose defaults are kept: a third of the steps without
rewards, then every 10 micro-batches rewards of 3 sets, learning rate 1.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from fastpetl import skip
from fastpetl._version import __version__
from fastpetl.das.gates import Fill, check_count, draw, draw_distinct, update_gates
from fastpetl.das.plan import SearchedPlan
from fastpetl.das.scoring import Scorer, scoring, sequential

QUIRKS = {
    "fixed_batch": "every reward is of validation batch 0",
    "train_mode": "rewards are taken in train mode, dropout and all",
    "swapped_labels": "METER's text layers are named as its image layers and these as text layers",
    "ignored_lr": "the gates move with lr 1.0, whatever lr says, as METER's do",
    "before_step": "a round sees the weights from before its micro-batch's update: it is held in the forward",
    "rank0_rewards": "in a process group the rewards of rank 0 count, not the mean: its gates were broadcast",
}


_MOST = 700.0  # exp() of more is not a float64


class Search:
    """The search as a state that a training loop of one's own drives: `begin` before each micro-batch, `end` after it.

    Semantics: `begin` has the model skip a set drawn by sigmoid(gates); every `turn` calls of `end`, warm-up over,
    `candidates` different sets are scored on validation data and the gates move (`gates.update_gates`). Between `end`
    and the next `begin`, where a loop evaluates, the model skips what the gates say now. `plan` is that, `finish`
    restores the skip set from before and returns it. Arguments as in `search`.
    """

    def __init__(
        self,
        model: nn.Module,
        evaluate: Callable[[int], object] | Scorer,
        *,
        n_skip: int | None = None,
        budget_macs: float | None = None,
        warmup_steps: int = 0,
        turn: int = 10,
        candidates: int = 3,
        lr: float = 1.0,
        per_sample: bool = False,
        shortcut: str | None = None,
        seed: int = 0,
        quirks: tuple[str, ...] = (),
    ):
        self.model, self.evaluate, self.shortcut = model, evaluate, shortcut
        with skip(model, [False] * len(skip.blocks(model)), shortcut=shortcut):
            self.blocks = skip.blocks(model)  # what a shortcut costs depends on which one it is
        self.fill = _fill(self.blocks, n_skip, budget_macs)
        for name, value, least in (("turn", turn, 1), ("candidates", candidates, 2), ("warmup_steps", warmup_steps, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"search: {name} is {value!r}, expected an integer >= {least}")
        if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not math.isfinite(lr):
            raise ValueError(f"search: lr is {lr!r}, expected a finite number")
        check_count(self.fill, candidates)
        unknown = [quirk for quirk in quirks if quirk not in QUIRKS]
        if unknown:
            raise ValueError(f"search: quirks has {unknown[0]!r}, expected some of {', '.join(QUIRKS)}")
        if not isinstance(evaluate, Scorer) and not callable(evaluate):
            raise TypeError(f"search: evaluate is {type(evaluate).__name__}, expected a Scorer or a function (round)")
        self.warmup_steps, self.turn, self.candidates = warmup_steps, turn, candidates
        self.lr = 1.0 if "ignored_lr" in quirks else float(lr)
        self.per_sample, self.seed, self.quirks = per_sample, seed, tuple(quirks)
        self.names = _names(self.blocks, "swapped_labels" in quirks)
        self.gates = torch.zeros(len(self.blocks), dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(seed)
        self.step, self.count, self.rounds = 0, 0, []
        self._before = None

    def begin(self) -> None:
        """Semantics: draw what the next micro-batch skips: one set, or with per_sample one for each sample."""
        if self.per_sample:
            chosen = self._masks
        else:
            chosen = self._row(draw(self.gates, self.fill, self.generator))
            if _distributed():  # DDP waits for a gradient of every parameter: masks per sample give zeros, not None
                row = chosen
                chosen = lambda x, n_blocks: row.expand(len(x), -1)  # noqa: E731
        setting = skip(self.model, chosen, shortcut=self.shortcut)
        self._before = self._before or setting
        if "before_step" in self.quirks and self._due():
            self._round()

    def end(self) -> bool:
        """Semantics: count the micro-batch; is it the turn of the gates, score candidates and move them. True if so."""
        due = self._due()
        if due and "before_step" not in self.quirks:
            self._round()
        self.step += 1
        self.count = 0 if due else self.count + 1  # from the first step: the round after warm-up comes at once
        if self._before is not None:
            skip(self.model, self._row(self.fill.best(self.gates)), shortcut=self.shortcut)
        return due

    def _due(self) -> bool:
        return self.count + 1 >= self.turn and self.step + 1 > self.warmup_steps

    def _round(self) -> None:
        step = self.step + 1
        sets = draw_distinct(self.gates, self.fill, self.candidates, self.generator)
        losses = self._losses(torch.stack([self._row(chosen) for chosen in sets]))
        for chosen, loss in zip(sets, losses.tolist(), strict=True):
            if not math.isfinite(loss):
                raise ValueError(f"search: evaluate gave a loss of {loss} with blocks {chosen} skipped, at step {step}")
            if loss < -_MOST:
                raise ValueError(f"search: evaluate gave a loss of {loss}, expected one whose exp(-loss) is finite")
        if losses.min() > _MOST:
            least = losses.min().item()
            warnings.warn(
                f"search: losses are {least} and more, their rewards exp(-loss) 0: no gate moves", stacklevel=2
            )
        self.gates = update_gates(self.gates, sets, losses, self.lr)
        self.rounds.append(
            {
                "step": step,
                "sets": [list(chosen) for chosen in sets],
                "losses": losses.tolist(),
                "gates": self.gates.tolist(),
            }
        )

    def plan(self) -> SearchedPlan:
        """Semantics: what the gates say now."""
        chosen = self.fill.best(self.gates)
        versions = {"fastpetl": __version__, "torch": torch.__version__}
        return SearchedPlan(
            chosen,
            self.shortcut,
            names=tuple(self.names[i] for i in chosen),
            gates=tuple(self.gates.tolist()),
            macs_saved=sum(self.blocks[i].macs - self.blocks[i].shortcut_macs for i in chosen),
            seed=self.seed,
            versions=versions,
            rounds=tuple(self.rounds),
        )

    def finish(self) -> SearchedPlan:
        """Semantics: the plan; the model skips again what it did before the search."""
        if self._before is not None:
            self._before.__exit__()
            self._before = None
        return self.plan()

    def _row(self, chosen) -> torch.Tensor:
        row = torch.zeros(len(self.blocks), dtype=torch.bool)
        row[list(chosen)] = True
        return row

    def _masks(self, x, n_blocks) -> torch.Tensor:
        # By torch's own generator: the ranks' batches may differ in size, the sets they score may not.
        return torch.stack([self._row(draw(self.gates, self.fill, None)) for _ in range(len(x))])

    def _losses(self, sets: torch.Tensor) -> torch.Tensor:
        round = 0 if "fixed_batch" in self.quirks else len(self.rounds)
        with scoring(self.model, "train_mode" in self.quirks), torch.random.fork_rng(devices=_devices(self.model)):
            if isinstance(self.evaluate, Scorer):
                losses = self.evaluate.losses(self.model, sets, self.shortcut, round)
            else:
                losses = sequential(self.evaluate, self.model, sets, self.shortcut, round)
        if _distributed():
            losses = losses.to(next(self.model.parameters()).device)
            if "rank0_rewards" in self.quirks:
                torch.distributed.broadcast(losses, 0)
            else:
                torch.distributed.all_reduce(losses)  # every rank draws the same sets, and now sees the same rewards
                losses /= torch.distributed.get_world_size()
            losses = losses.cpu()
        return losses

    # --- checkpoints

    def _settings(self) -> dict:
        names = ("warmup_steps", "turn", "candidates", "lr", "per_sample", "seed", "shortcut")
        fill = {"n_skip": self.fill.n_skip, "budget_macs": self.fill.budget, "quirks": list(self.quirks)}
        return {**{name: getattr(self, name) for name in names}, **fill, "blocks": [b.name for b in self.blocks]}

    def state_dict(self) -> dict:
        """Semantics: all the search needs to go on: settings, gates, counters, the generator."""
        return {
            "settings": json.dumps(self._settings()),
            "rounds": json.dumps(self.rounds),
            "gates": self.gates,
            "step": self.step,
            "count": self.count,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Semantics: go on from `state_dict()` of a search with the same settings."""
        saved, own = json.loads(state["settings"]), self._settings()
        for name in own:
            if saved.get(name) != own[name]:
                raise ValueError(f"search: the checkpoint's {name} is {saved.get(name)!r}, expected {own[name]!r}")
        self.gates, self.step, self.count = state["gates"].cpu(), state["step"], state["count"]
        self.rounds = json.loads(state["rounds"])
        self.generator.set_state(state["generator"].cpu())


def search(
    model: nn.Module,
    step: Callable[[int], object],
    evaluate: Callable[[int], object] | Scorer,
    *,
    steps: int,
    n_skip: int | None = None,
    budget_macs: float | None = None,
    warmup_steps: int | None = None,
    checkpoint=None,
    checkpoint_every: int = 50,
    state: Mapping[str, object] | None = None,
    progress: bool = True,
    **options,
) -> SearchedPlan:
    """Semantics: train for `steps` micro-batches, each with a set of blocks skipped that sigmoid(gates) draw; every
    `turn` of them the gates move by what `candidates` sets earn on validation data. Gives the plan of the best gates.

    step(i): micro-batch i, 0 <= i < steps: forward, backward, optimizer, in train mode. evaluate(r): the loss of
    validation batch r as the model stands, r counts the rounds; or a `Scorer`, which takes all candidates in one pass.
    n_skip: blocks to skip; or budget_macs: multiply-accumulates of one sample to save at least, filled by gate per
    MAC. warmup_steps: without rounds, a third unless given. options: turn=10, candidates=3, lr=1.0, seed=0;
    per_sample: each sample trains with a set of its own; shortcut as in `fastpetl.skip`; quirks: of the released code,
    by the names in `fastpetl.das.QUIRKS`, which says what each does.
    checkpoint: a file to write every `checkpoint_every` steps and, if it is there, to go on from: gates, generators,
    the model's trained parameters, and what `state` names (the optimizer, a scheduler: has state_dict). The gates are
    then those of a run that was never stopped, if step(i) depends on nothing else. In a process group rewards are
    averaged and all ranks agree. ValueError for impossible requests and losses that are not finite.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"search: steps is {steps!r}, expected an integer >= 1")
    if not isinstance(checkpoint_every, int) or isinstance(checkpoint_every, bool) or checkpoint_every < 1:
        raise ValueError(f"search: checkpoint_every is {checkpoint_every!r}, expected an integer >= 1")
    if not callable(step):
        raise TypeError(f"search: step is {type(step).__name__}, expected a function (i), one training step")
    for name, thing in (state or {}).items():
        if not all(hasattr(thing, method) for method in ("state_dict", "load_state_dict")):
            raise TypeError(f"search: state[{name!r}] is {type(thing).__name__}, expected one with a state_dict")
    warmup_steps = steps // 3 if warmup_steps is None else warmup_steps
    made = Search(model, evaluate, n_skip=n_skip, budget_macs=budget_macs, warmup_steps=warmup_steps, **options)
    keep = {"model": _Trained(model), "rng": _Generators(model), "search": made, **(state or {})}
    if checkpoint is not None:
        Path(checkpoint).parent.mkdir(parents=True, exist_ok=True)
        if Path(checkpoint).is_file():
            _load(Path(checkpoint), keep)
        at = _of_all_ranks(made.step)
        if len(set(at)) > 1:
            raise ValueError(f"search: the ranks' checkpoints are of steps {at}, expected one file that all ranks see")
    from tqdm import tqdm

    rank = torch.distributed.get_rank() if _distributed() else 0
    try:
        with tqdm(total=steps, initial=made.step, desc="search", unit="step", disable=not progress or rank > 0) as bar:
            while made.step < steps:
                made.begin()
                step(made.step)
                if made.end():
                    bar.set_postfix_str(f"skip {','.join(map(str, made.fill.best(made.gates)))}")
                bar.update()
                if checkpoint is not None and (made.step % checkpoint_every == 0 or made.step == steps):
                    _save(Path(checkpoint), keep, rank)
    finally:
        plan = made.finish()
    return plan


def _names(blocks, swapped: bool) -> list[str]:
    """The blocks' names; swapped: the two streams' exchanged, as the released code prints them."""
    names, half = [block.name for block in blocks], len(blocks) // 2
    if not swapped:
        return names
    streams = [{name.rpartition(".")[0] for name in part} for part in (names[:half], names[half:])]
    if len(names) % 2 or not all(len(stream) == 1 for stream in streams) or streams[0] == streams[1]:
        raise ValueError("search: quirks has 'swapped_labels', expected a model with text and image layers (METER)")
    return names[half:] + names[:half]


def _fill(blocks, n_skip, budget) -> Fill:
    n = len(blocks)
    if (n_skip is None) == (budget is None):
        raise ValueError(f"search: n_skip is {n_skip!r} and budget_macs {budget!r}, expected one of them")
    if n_skip is not None:
        if not isinstance(n_skip, int) or isinstance(n_skip, bool) or not 1 <= n_skip <= n:
            raise ValueError(f"search: n_skip is {n_skip!r}, expected an integer from 1 to {n}, the number of blocks")
        return Fill(n, n_skip)
    saved = [block.macs - block.shortcut_macs for block in blocks]
    most = sum(s for s in saved if s > 0)
    if not 0 < budget <= most:
        raise ValueError(
            f"search: budget_macs is {budget!r}, expected more than 0 and at most {most}, all blocks skipped"
        )
    return Fill(n, None, budget, saved)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _devices(model) -> list:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})


class _Trained:
    """The trained parameters and the buffers, as one thing with a state."""

    def __init__(self, model):
        self.model = model

    def _tensors(self) -> dict:
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return {**trained, **dict(self.model.named_buffers())}

    def state_dict(self):
        return {name: p.detach() for name, p in self._tensors().items()}

    def load_state_dict(self, state):
        own = self._tensors()
        for name in sorted(own.keys() ^ state.keys()):
            raise ValueError(f"search: the checkpoint and the model differ in {name}, expected the same model")
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)


class _Generators:
    """torch's generators, each rank's its own: their batches and dropout differ."""

    def __init__(self, model):
        self.devices = _devices(model)

    def state_dict(self):
        own = {"cpu": torch.get_rng_state(), **{str(d): torch.cuda.get_rng_state(d) for d in self.devices}}
        return {"ranks": _of_all_ranks(own)}

    def load_state_dict(self, state):
        ranks, rank, here = state["ranks"], 0, 1
        if _distributed():
            rank, here = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if len(ranks) != here:
            raise ValueError(f"search: the checkpoint is of {len(ranks)} processes, expected {here}, as there are now")
        own, names = ranks[rank], {"cpu", *map(str, self.devices)}
        if own.keys() != names:
            raise ValueError(f"search: the checkpoint is of devices {sorted(own)}, expected {sorted(names)}")
        torch.set_rng_state(own["cpu"])
        for device in self.devices:
            torch.cuda.set_rng_state(own[str(device)], device)


def _of_all_ranks(value) -> list:
    if not _distributed():
        return [value]
    found = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def _save(path: Path, keep: Mapping, rank: int) -> None:
    states = {name: thing.state_dict() for name, thing in keep.items()}  # on all ranks: they speak to each other
    if rank > 0:
        return
    part = path.with_name(path.name + ".part")
    torch.save(states, part)
    os.replace(part, path)  # a kill leaves the old one


def _load(path: Path, keep: Mapping) -> None:
    saved = torch.load(path, map_location="cpu", weights_only=True)
    for name in keep:
        if name not in saved:
            raise ValueError(f"search: {path} has no {name!r}, expected a checkpoint of a search with the same state")
    keep["search"].load_state_dict(saved["search"])  # first: it knows whether the file is of this search
    for name, thing in keep.items():
        if name != "search":
            thing.load_state_dict(saved[name])
