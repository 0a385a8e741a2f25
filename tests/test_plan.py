"""The memory plan: what it reads, chooses, predicts, keeps to, and what happens when memory runs out all the same."""

from __future__ import annotations

import copy
import errno
import json
import mmap
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import settings as settings_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import run_process
from torch import nn

import keyhole
from keyhole.config.base import parse_memory
from keyhole.config.settings import Config, ModelConfig
from keyhole.engine import split_backward
from keyhole.engine.encoders import Encoders
from keyhole.engine.memory.bill import Bill, powers
from keyhole.engine.memory.meter import growth, has_peak, steady_heap, taken, tensor_bytes
from keyhole.engine.memory.pace import Pace
from keyhole.engine.memory.plan import CHUNK_PARTS, Plan, largest_chunk, make_plan
from keyhole.engine.memory.probe import Line, PassBytes, Probe, Workload
from keyhole.errors import ConfigError
from keyhole.nn import IPSClassifier, build_classifier
from keyhole.tasks.kinds import Task
from keyhole.util.budget import memory_text, out_of_memory
from keyhole.util.platform import resident_memory

CPU = torch.device("cpu")
TASKS = [Task("a", "binary", ("no", "yes")), Task("b", "multiclass", ("x", "y", "z"))]
LINUX = pytest.mark.skipif(not has_peak(), reason="peak memory is read from /proc")
LAW = settings(max_examples=50, deadline=None)


def model_of(position: str = "none", **options: Any) -> IPSClassifier:
    torch.manual_seed(0)
    return build_classifier(ModelConfig(encoder="small", width=4, heads=2, position=position, **options), TASKS, 16)  # type: ignore[arg-type]


def plan_for(model: IPSClassifier, **options: Any) -> Plan:
    memory = options.pop("memory", None)
    given = {"patch_shape": (16, 16, 3), "m": 8, "batch_size": 2, "largest_bag": 100, "learn": True}
    return make_plan(Encoders(model), Workload(**(given | options)), memory)


# What the user writes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("auto", None),
        ("AUTO", None),
        ("5GB", 5 * 10**9),
        ("4GiB", 4 * 2**30),
        ("800MB", 800 * 10**6),
        ("1.5 gb", 1_500_000_000),
        (".5G", 500_000_000),
        ("2g", 2 * 10**9),
        ("512mib", 512 * 2**20),
        ("1000000B", 10**6),
    ],
)
def test_sizes_are_read(text: str, size: int | None) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    "text", ["", "5", "0GB", "-1GB", "5XB", "GB", "five GB", "1e9B", "5GBB", "nan GB", "auto5", 5, 0.5]
)
def test_what_is_no_size_is_refused_with_what_is_expected(text: str | float) -> None:
    with pytest.raises(ConfigError, match=r"^memory: expected `auto` or a size with its unit, such as 5GB"):
        Config(memory=text)


def test_a_size_is_never_rounded_to_nothing() -> None:
    assert [memory_text(size) for size in (4_200_000_000, 800_000_000, 2_400_000, 12_300, 0)] == [
        "4.2 GB", "800 MB", "2 MB", "12 kB", "0 kB",
    ]  # fmt: skip


@LAW
@given(st.integers(10**6, 10**13))
def test_a_size_that_is_advised_is_never_less_than_what_is_needed(size: int) -> None:
    advised = parse_memory(memory_text(size, up=True))
    assert advised is not None
    assert size <= advised <= size * 1.1 + 10**6


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("could not create a memory object"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("std::bad_alloc"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOENT, "No such file"), False),
        (RuntimeError("could not create a primitive descriptor for a matmul primitive"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("DefaultCPUAllocator"), False),
        # CUDA's libraries; c10/cuda, ATen/native/cudnn/Conv_v8.cpp and ATen/cuda/Exceptions.h of torch
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_COMPILATION_FAILED"), False),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("FIND was unable to find an engine to execute this computation"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        # torchvision/csrc/io/image/cuda/decode_jpegs_cuda.cpp, which wraps what torch says of its own allocations
        (RuntimeError("Error while decoding JPEG images: CUDA out of memory. Tried to allocate 20.00 MiB."), True),
        (RuntimeError("Error while decoding JPEG images: Failed to decode batch: 5"), True),
        (RuntimeError("Failed to initialize nvjpeg with hardware backend: 5"), True),
        (RuntimeError("Error while decoding JPEG images: Failed to decode batch: 3"), False),
        (RuntimeError("Error while decoding JPEG images: Failed to decode jpeg stream: 8"), False),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: invalid device context"), False),
        (RuntimeError("out of resource: shared memory, Required: 270336, Hardware limit: 232448"), False),
    ],
)
def test_only_want_of_memory_is_taken_for_it(error: Exception, is_one: bool) -> None:
    assert out_of_memory(error) is is_one


# What is chosen


MB = 10**6
COSTS = PassBytes(score=Line(MB, 2 * MB), learn=Line(2 * MB, 9 * MB), pool=Line(MB, MB / 4), dim=512)


def bill_of(m: int, batch: int, learn: bool = True) -> Bill:
    work = Workload(patch_shape=(250, 200, 4), m=m, batch_size=batch, largest_bag=MB // 16, learn=learn)
    return Bill(work, COSTS, cpu=True, now=300 * MB, training=90 * MB, stepping=30 * MB, scores=12)


@LAW
@given(st.integers(1, 256), st.integers(1, 16), st.integers(200, 20_000), st.integers(0, 5_000), st.booleans())
def test_a_plan_fits_its_budget_and_more_memory_never_makes_it_smaller(
    m: int, batch: int, budget: int, more: int, learn: bool
) -> None:
    bill = bill_of(m, batch, learn)
    poor, rich = (bill.best(size * MB, powers(64)) for size in (budget, budget + more))
    for sizes, room in ((poor, budget), (rich, budget + more)):
        if sizes is not None:
            assert bill.peak(*sizes) <= room * MB
            assert sizes[1] is None or 2 <= sizes[1] < bill.kept
    if poor is not None:
        assert rich is not None
        assert min(rich[0], rich[1] or bill.kept) >= min(poor[0], poor[1] or bill.kept) or not learn
        assert learn or rich[0] >= poor[0]
    else:
        assert bill.wanted(1, 2 if learn and bill.kept > 3 else None) > budget * MB


def test_a_run_that_predicts_at_its_end_has_room_for_the_logits_of_a_batch() -> None:
    bill = bill_of(8, 16)
    predicting = replace(bill, work=replace(bill.work, predicts=True))
    assert predicting.peak(64, None) == bill.peak(64, None), "learning takes more"
    bill, predicting = (
        replace(each, scores=24, work=replace(each.work, largest_bag=100 * MB // 32)) for each in (bill, predicting)
    )
    assert predicting.peak(64, None) >= bill.now + 16 * 300 * MB > bill.peak(64, None)
    only = replace(bill, training=0, work=replace(bill.work, learn=False))
    assert predicting.peak(64, None) == only.peak(64, None)


def test_the_probe_sees_what_a_patch_costs_where_memory_comes_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: 20 MB at a time, and runs of the first two sizes load libraries for longer than a probe may take."""
    scale, step, slow = 90, 20 * MB, 0.05
    sizes: dict[str, set[int]] = {}

    def exact(function: Any) -> int:
        return scale * tensor_bytes(function)

    def reserved(device: torch.device, function: Any, repeats: int = 1) -> int:
        size, known = exact(function), sizes.setdefault(function.__qualname__, set())
        if size not in known and len(known) < 2:
            time.sleep(slow)
        known.add(size)
        return -(-size // step) * step

    monkeypatch.setattr("keyhole.engine.memory.probe.ENOUGH_SECONDS", slow)
    monkeypatch.setattr("keyhole.engine.memory.probe.comes_in_steps", lambda _device: True)
    monkeypatch.setattr("keyhole.engine.memory.probe.growth", reserved)
    encoders, chunk, m = Encoders(model_of()), 256, 64
    encoders.fast(torch.zeros(2, 16, 16, 3, dtype=torch.uint8))  # built before counting
    work = Workload(patch_shape=(16, 16, 3), m=m, batch_size=4, largest_bag=100, learn=True, color=False)
    costs = Probe(encoders, work).measure(chunk, room=10**12)
    assert [len(known) for known in sizes.values()] == [4, 4, 3], "patches: 4, 16, 64, 256"
    monkeypatch.setattr("keyhole.engine.memory.probe.growth", lambda _device, function, _repeats=1: exact(function))
    monkeypatch.setattr("keyhole.engine.memory.probe.ENOUGH_BYTES", 10**12)
    true = Probe(encoders, work).measure(chunk, room=10**12)
    assert costs.score(chunk) == pytest.approx(true.score(chunk), rel=0.1)
    assert costs.learn(4 * m) == pytest.approx(true.learn(4 * m), rel=0.1)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((256, 256, 3), (256, 512, 1024)),
        ((100, 100, 3), (2048, 2048, 2048)),
        ((1024, 1024, 3), (16, 32, 64)),
        ((2048,), (8192, 16384, 32768)),
        ((512,), (32768, 65536, 65536)),
        ((9000, 9000, 3), (2, 2, 2)),
    ],
)
def test_chunks_on_a_gpu_hold_as_many_bytes_as_its_decoder_wants(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    gpu = torch.device("cuda")
    assert largest_chunk(gpu, shape) == sizes[1]
    for cap_bytes, size in zip((2**26, 2**27, 2**28), sizes, strict=True):
        monkeypatch.setattr("keyhole.engine.memory.plan.GPU_CHUNK_BYTES", cap_bytes)
        assert largest_chunk(gpu, shape) == size
        assert largest_chunk(gpu, shape, patches=5) == min(size, 8), "no batch fills more"
        assert largest_chunk(torch.device("cpu"), shape, patches=5) == 64


@pytest.mark.parametrize(
    ("shape", "patches", "size"),
    [((50, 50, 1), 14_400, 7200), ((100, 100, 3), 3072, 1536), ((256, 256, 3), 64_000, 512), ((50, 50, 1), 13, 16)],
)
def test_chunks_on_a_gpu_share_a_batch_evenly(shape: tuple[int, ...], patches: int, size: int) -> None:
    assert largest_chunk(torch.device("cuda"), shape, patches) == size
    assert size % CHUNK_PARTS == 0


def test_chunks_on_a_cpu_hold_more_of_small_patches() -> None:
    sizes = {(16, 16, 3): 512, (50, 50, 1): 256, (128, 128, 3): 64, (1024, 1024, 3): 64, (2048,): 64}
    assert {shape: largest_chunk(torch.device("cpu"), shape) for shape in sizes} == sizes


def test_a_split_step_stays_within_one_budget_whatever_m_and_b_are() -> None:
    for m, batch in ((16, 4), (64, 4), (64, 16), (256, 16)):
        bill = bill_of(m, batch)
        sizes = bill.best(1000 * MB, powers(64))
        assert sizes is not None
        assert bill.peak(*sizes) <= 1000 * MB


@LAW
@given(st.integers(1, 1024), st.one_of(st.none(), st.integers(2, 512)), st.integers(0, 5000))
def test_halving_ends_and_halves_only_what_it_is_asked_to(chunk: int, split: int | None, kept: int) -> None:
    for step in ("select", "learn", "both"):
        plan: Plan | None = Plan(chunk, split if split is None or split < kept else None, kept)
        for _ in range(30):
            assert plan is not None
            smaller = plan.halved(step)  # type: ignore[arg-type]
            if smaller is None:
                break
            assert smaller.chunk <= plan.chunk
            assert (smaller.split or kept) <= (plan.split or kept)
            assert step != "select" or smaller.split == plan.split
            assert step != "learn" or smaller.chunk == plan.chunk
            plan = smaller
        else:
            pytest.fail("halving does not end")
        assert plan is not None
        assert step == "learn" or plan.chunk == 1
        assert step == "select" or kept <= 3 or plan.split == 2


def test_a_plan_is_saved_and_read() -> None:
    plan = Plan(32, 16, 128, 5 * 10**9, "--memory", True, 4 * 10**9)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert plan.describe() == (
        "memory: 5.0 GB (--memory); selecting 32 patches at a time, learning from 128 kept patches in chunks of 16; "
        "predicted peak 4.0 GB"
    )
    assert "at once" in Plan(kept=64).describe()
    assert "learning" not in Plan().describe()


@pytest.mark.parametrize("position", ["none", "1d", "2d"])
@pytest.mark.parametrize("freeze", [False, True])
def test_probing_leaves_everything_as_it_was(position: str, freeze: bool) -> None:
    model = model_of(position, freeze=freeze).train()
    model.pool.eval()
    next(model.heads.parameters()).grad = torch.ones_like(next(model.heads.parameters()))
    gradients = [parameter.grad for parameter in model.parameters()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes, random = [part.training for part in model.modules()], torch.get_rng_state()
    plan = plan_for(model)
    assert (plan.chunk, plan.split, plan.kept) == (512, None, 16)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert modes == [part.training for part in model.modules()]
    assert torch.equal(random, torch.get_rng_state())
    for before, parameter in zip(gradients, model.parameters(), strict=True):
        assert parameter.grad is before
    assert gradients[-2] is None or (gradients[-2] == 1).all()


def test_where_the_system_keeps_no_peak_tensors_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keyhole.engine.memory.meter.has_peak", lambda: False)
    plan = plan_for(model_of(), m=50)
    assert (plan.chunk, plan.split, plan.kept) == (512, None, 100)
    assert plan.peak > 0


def test_features_are_planned_like_pixels() -> None:
    from keyhole.nn import CrossAttentionPool, FeatureProjector

    model = IPSClassifier(FeatureProjector(24, 16), CrossAttentionPool(16, 2), {"a": nn.Linear(16, 1)})
    plan = plan_for(model, patch_shape=(24,), m=50, largest_bag=40)
    assert (plan.chunk, plan.split, plan.kept) == (64, None, 80)
    assert plan_for(model, patch_shape=(24,), chunk=500, learn=False).chunk == 500


def test_an_optimizer_that_has_its_state_is_not_counted_twice() -> None:
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    from keyhole.engine.memory.plan import state_bytes

    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert 2 * weights <= state_bytes(optimizer) <= 2.1 * weights
    assert state_bytes(None) == 0


@LINUX
def test_too_small_a_budget_says_what_would_fit() -> None:
    model = model_of()
    with pytest.raises(ConfigError, match=r"too little .* give --memory (\S+) or more .* smaller --") as caught:
        plan_for(model, memory=100 * MB)
    advised = parse_memory(str(caught.value).partition("give --memory ")[2].split()[0])
    assert advised is not None
    plan = plan_for(model, memory=advised + 30 * MB)  # the process itself has grown a little meanwhile
    assert plan.peak <= advised + 30 * MB


# What it costs, in processes of their own


@LINUX
def test_a_meter_shows_the_peak_and_counting_tensors_comes_near() -> None:
    def work() -> None:
        first = torch.ones(20_000_000)
        second = first * 2
        del first
        (second + 1).sum()

    steady_heap()  # as a probe has it; in a heap of its own the third does not fit into the gap of the first
    try:
        measured = growth(CPU, work), tensor_bytes(work)
    finally:
        steady_heap(False)
    for size in measured:
        assert 150 * MB < size < 200 * MB  # two of 80 MB at a time


@LINUX
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (100, ["--model.encoder=small", "--select.m=64", "--train.batch=8"]),
        (64, ["--model.encoder=resnet18", "--model.stages=2", "--select.m=24", "--train.batch=4"]),
    ],
    ids=["small", "resnet18"],
)
def test_the_predicted_peak_of_a_run_is_the_measured_one_within_15_percent(
    tmp_path: Path, size: int, options: list[str]
) -> None:
    """Gaps in the heap, which the plan counts, take some steps to come: three in each of two epochs.

    test_told.py has a run without a budget.
    """
    rng = np.random.default_rng(0)
    for number in range(32 if size == 100 else 16):  # of 70 patches each
        (folder := tmp_path / "data" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (7 * size, 10 * size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png", compress_level=1)
    options = [*options, f"--patch.size={size}", "--data.test=0", "--data.val=0.25", "--data.cache=0"]
    options += ["--train.epochs=2", "--train.warmup=0", "--augment.no-shift", "--run.threads=1"]
    done = run_process("planned_run", 450, tmp_path / "data", "--out", tmp_path / "run", *options)
    budget, measured = map(int, done.stdout.splitlines()[-1].split())
    (said,) = re.findall(r"; predicted peak (\d.* \wB)$", done.stderr, re.MULTILINE)
    predicted = parse_memory(said)
    assert predicted is not None
    assert abs(predicted - measured) < 0.15 * measured, done.stderr
    assert "kept patches at once" not in done.stderr, "a small budget splits the step"
    assert measured <= budget, done.stderr


def test_no_step_learns_from_more_patches_than_are_planned_for(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    learned, learn = [], Encoders.learn

    def counted(encoders: Encoders, patches: Any) -> torch.Tensor:
        embedding = learn(encoders, patches)
        learned.append(len(embedding))
        return embedding

    monkeypatch.setattr(Encoders, "learn", counted)
    sections: dict[str, Any] = settings_of(select={"m": 64}, train={"epochs": 1}, augment={"shift": True})
    keyhole.train(toy, tmp_path / "run", **sections)
    kept = int(re.findall(r"learning from (\d+) kept patches", capsys.readouterr().err)[0])
    batch = sections["train"]["batch"]
    assert max(learned) > batch * (64 // 16) ** 2, "shifted grids have more patches"
    assert max(learned) <= kept


def test_where_memory_runs_out_half_as_much_gives_the_same_result() -> None:
    """The encoder fails in the middle of a pass for every call with more than 50 patches."""
    torch.manual_seed(0)
    model = build_classifier(ModelConfig(encoder="small", width=8), TASKS[:1], 32)
    twin = copy.deepcopy(model)
    patches, mask = torch.randint(0, 256, (2, 100, 3, 32, 32), dtype=torch.uint8), torch.ones(2, 100, dtype=torch.bool)
    loose = patches.flatten(0, 1)
    expected = model.select(patches, 20, 16).index
    tried: list[tuple[int, int | None]] = []

    def fail(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if len(given[0]) > 50:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    def select(plan: Plan) -> torch.Tensor:
        tried.append((plan.chunk, plan.split))
        return model.select(patches, 20, plan.chunk).index

    def learn(plan: Plan, model: IPSClassifier = model) -> float:
        tried.append((plan.chunk, plan.split))
        torch.manual_seed(1)
        model.zero_grad(set_to_none=True)
        model.train()
        return split_backward(
            model, lambda i, j: loose[i:j], None, mask, lambda logits: logits["a"].square().mean(), plan.split
        ).item()

    hook = next(part for part in model.encoder.modules() if isinstance(part, nn.Conv2d)).register_forward_pre_hook(fail)
    said: list[str] = []
    pace = Pace(Plan(128, None, 200), said.append)
    assert torch.equal(pace.run("select", select), expected), "the kept patches are those of an undisturbed selection"
    loss = pace.run("learn", learn)
    hook.remove()
    assert tried == [(128, None), (64, None), (32, None), (32, None), (32, 128), (32, 64)]
    assert len(said) == 4
    assert learn(pace.plan, twin) == loss
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad), "the gradients of an undisturbed step"
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), "running statistics moved once"


def touch(megabytes: int) -> None:
    """Make so much memory resident for a moment; not in malloc's heap, which may reuse what is free in it."""
    with mmap.mmap(-1, megabytes * MB) as memory:
        for page in range(0, len(memory), mmap.PAGESIZE):
            memory[page] = 1


@LINUX
def test_a_chunk_is_halved_each_time_that_the_measured_peak_goes_over_the_budget() -> None:
    said: list[str] = []
    budget = taken(CPU) + 100 * MB
    pace = Pace(Plan(64, None, 0, budget, "--memory", named=True, device="cpu"), said.append)

    def work(plan: Plan) -> int:
        touch(4 * plan.chunk)
        return plan.chunk

    assert [pace.run("select", work) for _ in range(5)] == [64, 32, 16, 16, 16]
    assert [line.split(" ", 1)[0] for line in said] == ["the", "the"]
    assert all("over --memory" in line for line in said)
    unnamed = Pace(replace(pace.plan, chunk=64, named=False), said.append)
    assert [unnamed.run("select", work) for _ in range(2)] == [64, 64], "the memory of the moment decides nothing"


@LINUX
def test_over_the_budget_with_the_smallest_chunks_is_said_once() -> None:
    said: list[str] = []
    pace = Pace(Plan(1, None, 0, taken(CPU) + 10 * MB, "--memory", named=True, device="cpu"), said.append)
    for size in (1, 50, 100):
        pace.run("select", lambda _, size=size: touch(size))  # type: ignore[misc]
    assert len(said) == 1
    assert "with the smallest chunks already" in said[0]


@LINUX
def test_without_a_budget_memory_that_grows_back_within_a_step_is_not_returned_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    returned: list[int] = []
    monkeypatch.setattr("keyhole.engine.memory.pace.give_back", lambda: returned.append(1))
    pace = Pace(Plan(peak=1, device="cpu"))
    for _ in range(3):
        pace.after_pass()
    assert len(returned) == 1
    with mmap.mmap(-1, resident_memory() // 5) as memory:
        for page in range(0, len(memory), mmap.PAGESIZE):
            memory[page] = 1
        for _ in range(3):
            pace.after_pass()
    assert len(returned) == 2
    named = Pace(Plan(peak=1, named=True, device="cpu"))
    for _ in range(3):
        named.after_pass()
    assert len(returned) == 5, "a budget leaves no room for it"


def test_predicting_and_embedding_return_free_memory_after_every_batch_and_at_the_end(
    toy: Path, toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    returned: list[int] = []
    monkeypatch.setattr("keyhole.engine.memory.pace.give_back", lambda: returned.append(1))
    monkeypatch.setattr("keyhole.engine.memory.pace.resident_memory", lambda: 10**15)
    images = sorted(toy.rglob("*.png"))
    predictor = keyhole.load(toy_run, device="cpu", memory="30GB")
    counts = []
    for number in (1, 9):  # of batches of four
        returned.clear()
        assert len(list(predictor.predict_many((images * 2)[: 4 * number]))) == 4 * number
        counts.append(len(returned))
    assert counts[1] - counts[0] == 8
    assert counts[0] >= 2  # after the batch, and after the last prediction
    returned.clear()
    keyhole.embed(toy, tmp_path / "features", run=toy_run, quiet=True, device="cpu", memory="30GB")
    assert len(returned) >= len(images)


def test_images_that_stay_in_memory_get_a_quarter_of_a_budget_that_they_count_in() -> None:
    from keyhole.config.settings import Config, DataConfig
    from keyhole.training.setup import cache_limit

    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert cache_limit(Config(memory="2GB"), cpu) == 0.5
    assert cache_limit(Config(memory="2GB"), cuda) is None  # a quarter of what is free on the host
    assert cache_limit(Config(), cpu) is None
    assert cache_limit(Config(memory="2GB", data=DataConfig(cache=3.0)), cpu) == 3.0
