"""The Triton kernels of several tasks against float64, task by task (on a GPU machine: the compiled kernels).

The expectation loops over the tasks and picks their rows on the host: all that the kernels do otherwise.
"""

import pytest
import torch
import torch.nn.functional as F

from no_host_sync import NoHostSynchronisation

triton = pytest.importorskip("triton", reason="the Triton kernels need the triton package")

from fastpetl.kernels import multi_adapter  # noqa: E402

if multi_adapter.launching.INTERPRETED:
    import interp_patch  # noqa: F401  (bf16 in the interpreter)

DEVICE = "cuda" if torch.cuda.is_available() and not multi_adapter.launching.INTERPRETED else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = (lambda z: z, F.relu, F.gelu, lambda z: F.gelu(z, approximate="tanh"), F.silu)
NAMES = ("x", "w_down", "b_down", "w_up", "b_up", "norm_weight", "norm_bias")
ALL = 127


@pytest.fixture(autouse=True)
def poisoned():
    """torch fills what torch.empty returns with NaN: an element that no kernel wrote cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Tiles that suit the interpreter, where a program costs the same whatever its size."""
    if multi_adapter.launching.INTERPRETED:
        monkeypatch.setattr(multi_adapter.adapter_config, "WEIGHT_GRADS_TILE", (64, 128))


def make(rows, d, r, tasks, dtype, shared=(), norm=True, bias=True):
    """x and the stacks; those named in `shared` have 1 in front."""

    def draw(name, *shape, sigma=1.0, offset=0.0):
        front = () if name == "x" else (1 if name in shared else tasks,)
        return (offset + sigma * torch.randn(*front, *shape)).to(DEVICE, dtype)

    return dict(
        x=draw("x", rows, d, sigma=1.5, offset=0.3),
        w_down=draw("w_down", r, d, sigma=d**-0.5),
        b_down=draw("b_down", r, sigma=0.1) if bias else None,
        w_up=draw("w_up", d, r, sigma=r**-0.5),
        b_up=draw("b_up", d, sigma=0.1) if bias else None,
        norm_weight=draw("norm_weight", d, sigma=0.2, offset=1.0) if norm else None,
        norm_bias=draw("norm_bias", d, sigma=0.1) if norm and bias else None,
    )


def expected(t, ids, grad, res, add_x, activation, scale, tasks, dtype):
    """y and all gradients: each task's rows by themselves, arithmetic in dtype."""
    leaves = {k: None if v is None else v.detach().to(dtype).requires_grad_() for k, v in t.items()}
    res = None if res is None else res.to(dtype)
    rows = ids.repeat_interleave(t["x"].shape[0] // ids.shape[0])
    y = torch.zeros_like(leaves["x"])
    for task in range(tasks):
        mine = (rows == task).nonzero()[:, 0]
        w = {k: v if v is None else v[min(task, v.shape[0] - 1)] for k, v in leaves.items() if k != "x"}
        x = leaves["x"][mine]
        n = x
        if w["norm_weight"] is not None:
            n = F.layer_norm(x, x.shape[-1:], w["norm_weight"], w["norm_bias"], 1e-5)
        h = ACTIVATIONS[activation](F.linear(n, w["w_down"], w["b_down"]))
        out = F.linear(h, w["w_up"], w["b_up"]) * scale
        for other in (x if add_x else None, None if res is None else res[mine]):
            out = out if other is None else out + other
        y = y.index_copy(0, mine, out)
    used = {k: v for k, v in leaves.items() if v is not None}
    return y.detach(), dict(zip(used, torch.autograd.grad(y, list(used.values()), grad.to(dtype)), strict=True))


def close(name, ours, exact, torch_says, eps):
    """The 2x rule in the largest and in the mean error, plus eps of the largest value."""
    assert ours.shape == exact.shape and ours.dtype == torch_says.dtype, name
    assert ours.isfinite().all(), f"{name}: not written everywhere, or overflowed"
    size = exact.abs().max().clamp_min(1e-3)
    for kind in (torch.mean, torch.amax):
        mine, theirs = (kind((v.double() - exact).abs()) for v in (ours, torch_says))
        assert mine <= 2 * theirs + eps * size, f"{name}: error {mine:.3e}, torch at {ours.dtype} {theirs:.3e}"


def run(t, ids, grad, res, add_x, activation, scale, tasks, needs=ALL):
    order, bounds = multi_adapter.sort_by_task(ids, tasks)
    stacks = [t[k] for k in NAMES[1:]]
    settings = add_x, 1e-5, activation, scale
    y, z, stats = multi_adapter.multi_adapter_forward(t["x"], *stacks, order, bounds, res, None, *settings, True)
    weights = t["w_down"], t["w_up"], t["norm_weight"], t["norm_bias"]
    shared = sum(1 << i for i, s in enumerate(stacks, 1) if s is not None and s.shape[0] != tasks)
    back = (grad, t["x"], z, stats, *weights, order, bounds, add_x, activation, scale, needs, shared)
    return y, multi_adapter.multi_adapter_backward(*back)


def check(t, ids, tasks, activation=3, add_x=True, residual=True, scale=0.7):
    dtype = t["x"].dtype
    grad, other = (torch.randn(t["x"].shape).to(DEVICE, dtype) for _ in range(2))
    settings = grad, other if residual else None, add_x, activation, scale, tasks
    exact_y, exact = expected(t, ids, *settings, torch.float64)
    torch_y, torch_says = expected(t, ids, *settings, dtype)
    eps = 4 * torch.finfo(dtype).eps if dtype == torch.float32 else torch.finfo(dtype).eps / 4
    y, got = run(t, ids, *settings)
    close("y", y, exact_y, torch_y, eps)
    for name, g in zip(NAMES, got, strict=True):
        if t[name] is None and "norm" in name:
            assert g.numel() == 0, name
        elif t[name] is not None:
            close("d" + name, g, exact[name], torch_says[name], eps)
    return y, got, settings


def draw_ids(n, tasks, absent=None):
    """Each task is there, where there are as many samples, but the absent one."""
    ids = torch.cat([torch.arange(tasks), torch.randint(0, tasks, (n,))])[:n][torch.randperm(n)]
    if absent is not None:
        ids[ids == absent] = (absent + 1) % tasks
    return ids.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("samples,unit,d,r,tasks", [(37, 1, 40, 12, 3), (5, 7, 72, 100, 5), (3, 30, 136, 48, 2)])
def test_each_row_goes_through_its_task(samples, unit, d, r, tasks, dtype):
    """Ids per row (unit 1) and per sample, odd sizes, one task that nobody uses: its gradients are zeros."""
    t = make(samples * unit, d, r, tasks, dtype)
    _, got, _ = check(t, draw_ids(samples, tasks, absent=1), tasks, activation=3)
    for name, g in zip(NAMES[1:], got[1:], strict=True):
        assert not g[1].any() and g[0 if tasks == 2 else -1].any(), name


@pytest.mark.grid
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shared", [("w_down", "b_down"), ("w_up", "b_up"), NAMES[5:], NAMES[1:]], ids=lambda s: s[0])
def test_shared_by_all_tasks(shared, dtype):
    """Half-shared adapters, a shared norm, all shared: nothing is copied, gradients are sums over the tasks."""
    check(make(44, 40, 20, 4, dtype, shared), draw_ids(11, 4), 4, activation=2)


def test_one_task_is_the_adapter():
    check(make(21, 40, 12, 1, torch.float32), draw_ids(21, 1), 1)


@pytest.mark.grid
@pytest.mark.parametrize("norm,bias", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("activation", [0, 1, 4])
def test_optional_parts(activation, norm, bias):
    t = make(30, 40, 12, 3, torch.float32, norm=norm, bias=bias)
    check(t, draw_ids(10, 3), 3, activation, add_x=bias, residual=norm, scale=-1.3)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_two_tiles_of_the_bottleneck_and_many_rows(dtype, monkeypatch):
    """A bottleneck of 192 in two tiles; rows in several slices, whose sums are added in their order."""
    monkeypatch.setattr(multi_adapter, "SLICE", 64)
    monkeypatch.setattr(multi_adapter, "PRODUCTS_TILE", dict.fromkeys(("half", "float"), (64, 128, 32, 4, 2)))
    check(make(210, 64, 192, 2, dtype), draw_ids(70, 2), 2)


def test_strides_from_task_to_task():
    """Expanded stacks (stride 0) and stacks with room between the tasks give what dense ones give."""
    t, ids = make(30, 40, 12, 3, torch.float32), draw_ids(30, 3)
    t["w_down"] = t["w_down"][:1].expand(3, -1, -1)
    t["norm_weight"] = t["norm_weight"][1:2].expand(3, -1)
    wide = torch.full((6, 40, 12), float("nan"), device=DEVICE)
    wide[::2] = t["w_up"]
    t["w_up"] = wide[::2]
    y, got, settings = check(t, ids, 3)
    dense = run({k: v.contiguous() for k, v in t.items()}, ids, *settings)
    assert torch.equal(y, dense[0]) and all(map(torch.equal, got, dense[1]))


def test_the_same_bits_every_time_and_only_what_is_needed():
    t, ids = make(40, 40, 12, 3, torch.bfloat16, shared=("w_up",)), draw_ids(40, 3)
    _, full, settings = check(t, ids, 3)
    assert all(map(torch.equal, run(t, ids, *settings)[1], full))
    for needs in [1 << i for i in range(7)] + [0, 1 | 4, 2 | 8 | 64]:
        for i, (g, f) in enumerate(zip(run(t, ids, *settings, needs=needs)[1], full, strict=True)):
            assert torch.equal(g, f) if needs >> i & 1 else g.numel() == 0, (needs, NAMES[i])


def test_other_tasks_rows_are_not_touched_by_an_infinity():
    t, ids = make(20, 40, 12, 2, torch.float32), torch.tensor([0, 1] * 10, device=DEVICE)
    t["x"][1] = float("inf")
    _, got = run(t, ids, torch.ones_like(t["x"]), None, True, 1, 1.0, 2)
    y, _ = run(t, ids, torch.ones_like(t["x"]), None, True, 1, 1.0, 2)
    assert y[::2].isfinite().all() and y[1].isnan().all()
    assert all(g[0].isfinite().all() for g in got[1:])


def test_nothing_waits_for_the_device(monkeypatch):
    """All torch calls of forward and backward, the launches themselves left out (the interpreter's read memory)."""
    t, ids, grad = make(30, 40, 12, 3, torch.float32, shared=("w_up",)), draw_ids(10, 3), torch.randn(30, 40)
    monkeypatch.setattr(multi_adapter, "SLICE", 8)
    launches = []
    monkeypatch.setattr(multi_adapter.launching, "launch", lambda kernel, grid, *a, **k: launches.append(grid))
    with NoHostSynchronisation() as mode:
        run(t, ids, grad.to(DEVICE), None, True, 1, 1.0, 3)
    assert {"sort", "searchsorted"} <= {name.partition(".")[0] for name in mode.seen}
    assert len(launches) == 4  # forward; rows, products and parameters of the backward
    with pytest.raises(AssertionError, match="waits for the device"), NoHostSynchronisation():
        int(ids.max())


def test_sorting():
    order, bounds = multi_adapter.sort_by_task(torch.tensor([2, 0, 2, 0, 0], device=DEVICE), 4)
    assert order.tolist() == [1, 3, 4, 0, 2] and bounds.tolist() == [0, 3, 3, 5, 5]
    if DEVICE == "cpu":  # on a GPU the assertion ends the process's use of it
        for bad in ([0, 4], [-1, 2]):
            with pytest.raises(RuntimeError, match="multi_adapter: task_ids outside 0 to 3"):
                multi_adapter.sort_by_task(torch.tensor(bad), 4)


def test_bad_arguments():
    t, ids = make(20, 40, 12, 3, torch.float32), draw_ids(20, 3)

    def forward(ids=ids, **changes):
        run({**t, **changes}, ids, t["x"], changes.get("res"), True, 1, 1.0, 3)

    for message, changes in {
        r"multi_adapter_forward: w_up has shape \(2, 40, 12\), expected \(3, 40, 12\)": dict(w_up=t["w_up"][:2]),
        r"multi_adapter_forward: b_up\[0\] has dtype torch.float64": dict(b_up=t["b_up"].double()),
        r"multi_adapter_forward: w_down\[0\] has strides": dict(w_down=t["w_down"].mT.contiguous().mT),
        r"multi_adapter_forward: res1 has shape \(3, 40\)": dict(res=t["x"][:3]),
        r"multi_adapter_forward: order has shape \(7,\), expected 20": dict(ids=draw_ids(7, 3)),
    }.items():
        with pytest.raises(ValueError, match=message):
            forward(**changes)
    assert multi_adapter.verify(torch.float32, 768, 192, 5) == (True, "")
    for why, sizes in {"float64": (torch.float64, 8, 4, 2), "bottleneck": (torch.float32, 8, 300, 2)}.items():
        ok, reason = multi_adapter.verify(*sizes)
        assert not ok and why in reason
