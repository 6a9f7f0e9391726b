"""fastpetl.das.search: the bandit as published, its checkpoints, and the loops it runs in."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch

import fastpetl
from das_task import Task
from fastpetl.das import Scorer, Search, SearchedPlan, gates, search
from fastpetl.das.gates import Fill, draw, draw_distinct, update_gates
from fastpetl.models import MeterConfig, MeterModel
from vilt_tiny import everything, one_thread, tiny_das, tiny_vilt  # noqa: F401

GOLDEN = Path(__file__).parents[1] / "golden"


# --- gates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["das_vilt", "das_meter"])
def test_gates_move_as_in_the_original(kind):
    trace = json.loads((GOLDEN / f"{kind}_search_trace.json").read_text())
    moved = 0
    for update in trace["updates"]:
        before, want = (torch.tensor(update[f"gate_{when}"], dtype=torch.float64) for when in ("before", "after"))
        got = update_gates(before, update["subsets"], torch.tensor(update["losses"]), trace["lr"])
        assert (got - want).abs().max() <= 1e-12 * 1e-2  # the gates themselves are 1e-8
        moved += (got - before).abs().max().item()
    assert moved > 1e-8 and len(trace["updates"]) == 6


def test_gates_by_hand():
    before, losses = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64), torch.tensor([0.1, 1.0, 2.0])
    got = update_gates(before, [(0, 1), (1, 2), (0, 2)], losses, 0.5)
    r = [math.exp(-loss) for loss in (0.1, 1.0, 2.0)]
    a = [x - sum(r) / 3 for x in r]
    slope = [1 / (1 + math.exp(-g)) * (1 - 1 / (1 + math.exp(-g))) for g in (0.0, 1.0, -1.0)]
    want = [0.5 * (a[0] + a[2]) * slope[0], 1 + 0.5 * (a[0] + a[1]) * slope[1], -1 + 0.5 * (a[1] + a[2]) * slope[2]]
    assert torch.allclose(got, torch.tensor(want, dtype=torch.float64), atol=1e-7)


def test_draws_follow_the_gates():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 2.0, -2.0, 0.0], dtype=torch.float64)
    counts = torch.zeros(4)
    for _ in range(2000):
        counts[list(draw(logits, Fill(4, 1), generator))] += 1
    want = torch.sigmoid(logits) / torch.sigmoid(logits).sum()
    assert torch.allclose(counts / 2000, want.float(), atol=0.03)
    sets = draw_distinct(logits, Fill(4, 2), 6, generator)
    assert len(set(sets)) == 6 and all(list(s) == sorted(s) and len(set(s)) == 2 for s in sets)
    certain = torch.tensor([90.0, 90.0, -900.0, -900.0], dtype=torch.float64)  # only one set is ever drawn by these
    assert len(set(draw_distinct(certain, Fill(4, 2), 3, generator))) == 3
    with pytest.raises(ValueError, match="search: candidates is 5, but only 4 different sets of blocks were found"):
        draw_distinct(logits, Fill(4, None, 1, (1, 1, 1, 1)), 5, generator)


def test_the_best_set():
    logits = torch.tensor([0.3, -0.1, 0.3, 0.9], dtype=torch.float64)
    assert Fill(4, 2).best(logits) == (2, 3)  # of equals the later, as torch.sort leaves them
    assert Fill(4, 3).best(logits) == (0, 2, 3)
    saved = (10, 50, 10, 10)
    assert Fill(4, None, 15, saved).best(logits) == (2, 3)
    assert Fill(4, None, 45, saved).best(torch.tensor([0.0, 0.5, 0.0, 0.0], dtype=torch.float64)) == (1,)
    assert Fill(4, None, 80, saved).best(logits) == (0, 1, 2, 3)
    assert 2 not in Fill(3, None, 5, (5, 5, 0)).best(torch.tensor([0.0, 0.0, 9.0], dtype=torch.float64))
    # what turned out not to be needed is given back
    assert Fill(3, None, 50, (10, 50, 10)).best(torch.tensor([0.9, 0.8, 0.0], dtype=torch.float64)) == (1,)


# --- the search -------------------------------------------------------------------------------------------------------


def test_the_algorithm():
    task, made = Task(patch=False), []
    model = task.model
    original = gates.update_gates

    def spy(before, sets, losses, lr):
        made.append((before.clone(), sets, losses.clone(), lr))
        return original(before, sets, losses, lr)

    fastpetl.das.searching.update_gates, kept = spy, fastpetl.das.searching.update_gates
    before = everything(model)
    try:
        plan = task.search(steps=12, warmup_steps=4)
    finally:
        fastpetl.das.searching.update_gates = kept
    assert [r["step"] for r in plan.rounds] == [5, 8, 11]  # the count runs through the warm-up; then every third
    assert all(len(p.blocks) == 2 for p in task.seen) and len({p.blocks for p in task.seen}) > 2
    assert len(made) == 3 and all(len(set(sets)) == 3 and lr == 1.0 for _, sets, _, lr in made)
    assert plan.blocks == tuple(sorted(torch.tensor(plan.gates).argsort(stable=True)[-2:].tolist()))
    assert plan.names == tuple(f"vilt.encoder.layer.{i}" for i in plan.blocks)
    saved = [b.macs - b.shortcut_macs for b in fastpetl.blocks(model)]
    assert plan.macs_saved == sum(saved[i] for i in plan.blocks)
    assert plan.versions["torch"] == torch.__version__ and plan.seed == 0
    assert fastpetl.skip.current(model) is None and everything(model) == before and model.training
    last = Task()
    for i in range(11):  # the losses are those of the sets, one by one, in eval mode
        fastpetl.skip(last.model, task.seen[i])
        last.step(i)
    last.model.eval()
    for chosen, loss in zip(plan.rounds[2]["sets"], plan.rounds[2]["losses"], strict=True):
        with fastpetl.skip(last.model, fastpetl.SkipPlan(tuple(chosen))), torch.no_grad():
            assert abs(last.evaluate(2).item() - loss) <= 1e-5 * loss


def test_one_seed_one_search():
    a, b, c = (Task().search(seed=seed) for seed in (1, 1, 2))
    assert a == b and a.gates != c.gates


def test_candidates_in_one_pass_are_the_candidates_one_by_one():
    one, other = Task(), Task()
    a, b = one.search(), other.search(Scorer(other.batches, other.loss))
    assert [r["sets"] for r in a.rounds] == [r["sets"] for r in b.rounds]
    for x, y in zip(a.rounds, b.rounds, strict=True):
        assert torch.allclose(torch.tensor(x["losses"]), torch.tensor(y["losses"]), rtol=1e-5)
    plain = Task(patch=False)
    assert [r["sets"] for r in plain.search().rounds] == [r["sets"] for r in a.rounds]


def test_training_with_a_set_per_sample():
    task = Task()
    plan = task.search(per_sample=True)
    assert all(isinstance(p, fastpetl.skip.Policy) for p in task.seen) and len(plan.rounds) > 1
    masks = Search(task.model, task.evaluate, n_skip=2, per_sample=True)
    masks.begin()
    state = masks.generator.get_state()
    mask = fastpetl.skip.current(task.model).masks(torch.zeros(50, 3, 32), 4, True)[0]
    assert (mask.sum(1) == 2).all() and len(set(map(tuple, mask.tolist()))) > 3
    assert torch.equal(masks.generator.get_state(), state)  # ranks with other batches score the same sets
    masks.finish()
    assert fastpetl.skip.current(task.model) is None


def test_a_budget_of_macs():
    task = Task()
    saved = [b.macs - b.shortcut_macs for b in fastpetl.blocks(task.model)]
    plan = task.search(n_skip=None, budget_macs=1.5 * saved[0])
    assert plan.macs_saved >= 1.5 * saved[0] and len(plan.blocks) == 2
    assert all(len(chosen) == 2 for r in plan.rounds for chosen in r["sets"])


def test_a_budget_that_one_set_makes_up_is_refused_before_the_first_step():
    task, steps = Task(), []
    saved = [b.macs - b.shortcut_macs for b in fastpetl.blocks(task.model)]
    with pytest.raises(ValueError, match="search: candidates is 3, but only 1 different sets of blocks were found"):
        search(task.model, steps.append, lambda r: 0.0, steps=9, budget_macs=sum(saved), progress=False)
    assert steps == []


def test_a_budget_weighs_layers_by_what_they_save():
    """At METER's real sizes an image layer saves five times what a text layer does."""
    with torch.device("meta"):
        config = MeterConfig(max_text_length=40, vision_config={"image_size": 384})
        model = fastpetl.attach(MeterModel(config), fastpetl.DASConfig(), patch=False)
    saved = [b.macs - b.shortcut_macs for b in fastpetl.blocks(model)]
    text, image = saved[0], saved[6]
    assert 5 < image / text < 5.2
    for benefit, chosen in ((4.0, (0, 1, 2, 3, 4, 5)), (6.0, (11,))):  # of an image layer, a text layer's being 1
        made = Search(model, lambda r: 0.0, budget_macs=float(image))
        made.gates = torch.tensor([1.0] * 6 + [0.0] * 5 + [benefit], dtype=torch.float64)
        assert made.plan().blocks == chosen and made.plan().macs_saved >= image
    counted = Search(model, lambda r: 0.0, n_skip=1)
    counted.gates = made.gates
    assert counted.plan().blocks == (11,)


def test_what_is_saved_depends_on_the_shortcut():
    task = Task()
    with fastpetl.skip(task.model, [False] * 4, shortcut="identity"):
        macs = [b.macs - b.shortcut_macs for b in fastpetl.blocks(task.model)]
    identity, adapter = (task.search(shortcut=shortcut) for shortcut in ("identity", "adapter"))
    assert identity.macs_saved == 2 * macs[0] > adapter.macs_saved


def test_quirks():
    task, seen, modes = Task(), [], []

    def evaluate(r):
        seen.append(r)
        modes.append(task.model.training)
        return task.evaluate(r)

    task.search(evaluate)
    assert seen == [0, 0, 0, 1, 1, 1, 2, 2, 2] and not any(modes)
    seen.clear(), modes.clear()
    task.search(evaluate, quirks=("fixed_batch", "train_mode"))
    assert seen == [0] * 9 and all(modes)


def test_lr_is_ignored_by_name():
    gates = [Task().search(lr=lr, quirks=quirks).gates for lr, quirks in ((0.1, ()), (0.1, ("ignored_lr",)), (1.0, ()))]
    assert gates[1] == gates[2] != gates[0]


def test_rounds_before_or_after_the_update():
    def run(*quirks):
        task, done = Task(), []
        before = {}

        def evaluate(r):
            done.append(len(task.seen))
            with torch.no_grad():
                before.setdefault(r, task.model.classifier[3].weight.clone())
            return task.evaluate(r)

        return task.search(evaluate, quirks=quirks), done, before, task

    (after, done, weights, _), (before, done_before, weights_before, task) = run(), run("before_step")
    steps = [r["step"] for r in after.rounds]
    assert steps == [r["step"] for r in before.rounds] and len(steps) == 3
    assert done == [step for step in steps for _ in range(3)]  # that many updates lie behind
    assert done_before == [step - 1 for step in steps for _ in range(3)]
    assert not torch.equal(weights[0], weights_before[0]) and before.gates != after.gates
    assert all(len(plan.blocks) == 2 for plan in task.seen)  # the round left the training's own set


def test_every_quirk_is_described():
    assert set(fastpetl.das.QUIRKS) == {
        "fixed_batch",
        "train_mode",
        "swapped_labels",
        "ignored_lr",
        "before_step",
        "rank0_rewards",
    }
    assert all(fastpetl.das.QUIRKS.values()) and Search(Task().model, lambda r: 0.0, n_skip=2).quirks == ()


def test_rewards_leave_the_run_as_it_was():
    """Scoring draws nothing from the run's generator and moves no weight: only the gates know."""
    with_rounds, without = Task(), Task()
    made = Search(with_rounds.model, with_rounds.evaluate, n_skip=2, turn=1)
    made.begin()
    before = torch.get_rng_state()
    assert made.end() and torch.equal(torch.get_rng_state(), before)  # though the evaluation draws, and seeds
    made.finish()
    with_rounds.search()
    for i, plan in enumerate(with_rounds.seen):
        fastpetl.skip(without.model, plan)
        without.step(i)
    for p, q in zip(with_rounds.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("killed_at", [0, 4, 7, 11])
def test_resumed_after_a_kill(killed_at, tmp_path):
    whole, file = Task(), tmp_path / "made" / "search.pt"
    want = whole.search()
    first = Task()
    step = first.step

    def dies(i):
        if i == killed_at:
            raise KeyboardInterrupt
        step(i)

    first.step = dies
    options = {"checkpoint": file, "checkpoint_every": 3}
    with pytest.raises(KeyboardInterrupt):
        first.search(state={"optimizer": first.optimizer}, **options)
    assert fastpetl.skip.current(first.model) is None
    second = Task()
    got = second.search(state={"optimizer": second.optimizer}, **options)
    assert got == want and len(second.seen) == 12 - killed_at // 3 * 3
    third = Task()
    assert third.search(state={"optimizer": third.optimizer}, **options) == want and not third.seen
    for p, q in zip(third.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(ValueError, match="search: the checkpoint's n_skip is 2, expected 1"):
        third.search(n_skip=1, **options)
    with pytest.raises(
        ValueError, match="search: .* has no 'scheduler', expected a checkpoint of a search with the same"
    ):
        third.search(state={"scheduler": third.optimizer}, **options)
    third.model.classifier.requires_grad_(False)
    with pytest.raises(ValueError, match="search: the checkpoint and the model differ in classifier"):
        third.search(**options)


def test_the_plan_is_a_file_and_a_picture(tmp_path):
    plan = Task().search()
    loaded = SearchedPlan.load(plan.save(tmp_path / "plan.json"))
    assert loaded == plan and isinstance(loaded, fastpetl.SkipPlan)
    assert (plan.plot(tmp_path / "plan.png")).read_bytes()[:4] == b"\x89PNG"
    assert SearchedPlan((1,), gates=(0.0, 0.0)).plot(tmp_path / "empty.png").is_file()
    model = tiny_das()
    fastpetl.skip(model, loaded)
    assert fastpetl.skip.current(model).blocks == plan.blocks
    again = fastpetl.SkipPlan.load(tmp_path / "plan.json")
    assert type(again) is SearchedPlan and again == plan
    plain = fastpetl.SkipPlan((2, 1), "identity")
    assert fastpetl.SkipPlan.load(plain.save(tmp_path / "plain.json")) == plain
    with pytest.raises(ValueError, match="SearchedPlan.load: .*plain.json was not written by SearchedPlan.save"):
        SearchedPlan.load(tmp_path / "plain.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="SkipPlan.load: .*other.json was not written by SkipPlan.save"):
        fastpetl.SkipPlan.load(tmp_path / "other.json")
    with pytest.raises(ValueError, match="SearchedPlan.load: .*other.json was not written by SearchedPlan.save"):
        SearchedPlan.load(tmp_path / "other.json")


def test_without_adapters():
    model = tiny_vilt()
    task = Task()
    task.model = model
    task.optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    assert len(task.search().blocks) == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_skip": 0}, ValueError, "search: n_skip is 0, expected an integer from 1 to 4, the number of blocks"),
        ({"n_skip": 5}, ValueError, "search: n_skip is 5, expected an integer from 1 to 4"),
        ({"n_skip": True}, ValueError, "search: n_skip is True"),
        ({"n_skip": 4}, ValueError, "search: candidates is 3, expected at most 1: so many sets of 4 of 4 blocks"),
        ({"n_skip": 1, "candidates": 5}, ValueError, "search: candidates is 5, expected at most 4"),
        ({"n_skip": None}, ValueError, "search: n_skip is None and budget_macs None, expected one of them"),
        ({"budget_macs": 9}, ValueError, "search: n_skip is 2 and budget_macs 9, expected one of them"),
        ({"n_skip": None, "budget_macs": 1e12}, ValueError, "search: budget_macs is 1000000000000.0, expected more"),
        ({"n_skip": None, "budget_macs": 0}, ValueError, "search: budget_macs is 0, expected more than 0 and at most"),
        ({"steps": 0}, ValueError, "search: steps is 0, expected an integer >= 1"),
        ({"turn": 0}, ValueError, "search: turn is 0, expected an integer >= 1"),
        ({"candidates": 1}, ValueError, "search: candidates is 1, expected an integer >= 2"),
        ({"warmup_steps": -1}, ValueError, "search: warmup_steps is -1, expected an integer >= 0"),
        ({"quirks": ("swap",)}, ValueError, "search: quirks has 'swap', expected some of fixed_batch, train_mode"),
        ({"evaluate": 3}, TypeError, r"search: evaluate is int, expected a Scorer or a function \(round\)"),
        ({"evaluate": lambda r: float("nan")}, ValueError, "search: evaluate gave a loss of nan with blocks"),
        ({"evaluate": lambda r: -float("inf")}, ValueError, "search: evaluate gave a loss of -inf with blocks"),
        ({"evaluate": lambda r: float("inf")}, ValueError, "search: evaluate gave a loss of inf with blocks"),
        ({"evaluate": lambda r: -1000.0}, ValueError, "search: evaluate gave a loss of -1000.0, expected one whose"),
        ({"lr": float("nan")}, ValueError, "search: lr is nan, expected a finite number"),
        ({"checkpoint_every": 0}, ValueError, "search: checkpoint_every is 0, expected an integer >= 1"),
        ({"evaluate": lambda r: None}, TypeError, "search: evaluate gave a NoneType, expected a loss, one number"),
        ({"state": {"mine": 3}}, TypeError, "search: state.'mine'. is int, expected one with a state_dict"),
        ({"evaluate": lambda r: torch.zeros(2)}, ValueError, r"search: evaluate gave a loss of shape \(2,\), expected"),
    ],
)
def test_impossible_requests(options, error, message):
    task = Task()
    with pytest.raises(error, match=message):
        task.search(**options)
    assert fastpetl.skip.current(task.model) is None


def test_losses_too_large_to_earn_anything():
    with pytest.warns(UserWarning, match=r"search: losses are 1000.0 and more, their rewards exp\(-loss\) 0"):
        assert not any(Task().search(lambda r: 1000.0).gates)


def test_between_steps_the_model_skips_what_the_gates_say():
    """An evaluation in the loop is not of the set the last micro-batch happened to train with."""
    task = Task()
    fastpetl.skip(task.model, [True, False, False, False])
    made = Search(task.model, task.evaluate, n_skip=2, turn=3, seed=1)
    for i in range(7):
        made.begin()
        task.step(i)
        made.end()
        assert fastpetl.skip.current(task.model).blocks == made.plan().blocks
    assert any(made.gates) and len({p.blocks for p in task.seen}) > 2
    made.finish()
    assert fastpetl.skip.current(task.model).blocks == (0,)


def test_wrong_scorers_and_callbacks():
    with pytest.raises(TypeError, match="Scorer: batches is list, expected a function .round. -> .inputs, targets."):
        Scorer([], lambda outputs, targets: 0.0)
    with pytest.raises(TypeError, match="Scorer: loss is int, expected a function .outputs, targets. -> scalar"):
        Scorer(id, 3)
    with pytest.raises(TypeError, match="search: step is int, expected a function"):
        fastpetl.das.search(None, 3, id, steps=3)
    for make in (fastpetl.das.trainer_callback, fastpetl.das.lightning_callback):
        with pytest.raises(TypeError, match="callback: search is int, expected a fastpetl.das.Search"):
            make(3)


def test_the_progress_bar_names_the_best(capfd):
    Task().search(progress=True)
    err = capfd.readouterr().err
    assert "search: 100%" in err and "12/12" in err and "skip " in err


def test_search_state_is_its_own():
    task = Task()
    made = Search(task.model, task.evaluate, n_skip=2, turn=1)
    state = copy.deepcopy(made.state_dict())
    made.begin(), made.end(), made.finish()
    again = Search(task.model, task.evaluate, n_skip=2, turn=1)
    again.load_state_dict(state)
    again.begin(), again.end(), again.finish()
    assert again.plan() == made.plan()
