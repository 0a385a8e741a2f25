"""A run that goes on on another kind of device than it began on. The device is a CPU here; what was saved says other."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from torch import nn

import keyhole
from keyhole.engine.memory.plan import CPU_CHUNK, Plan
from keyhole.errors import ConfigError
from keyhole.runs.checkpoint import load_state, read_info, read_tensors, save_state, write_tensors
from keyhole.training.finite import step_if_finite


def began_on(device: str, toy_run: Path, folder: Path, plan: Plan) -> Path:
    """A copy of a run whose state says that it was planned for a device."""
    run = shutil.copytree(toy_run, folder / "run")
    tensors, info = read_tensors(run / "last.safetensors")
    write_tensors(
        run / "last.safetensors", tensors, info | {"plan": dataclasses.replace(plan, device=device).to_json()}
    )
    return run


def test_a_run_that_began_on_a_gpu_gets_a_plan_for_the_cpu(
    toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = began_on("cuda", toy_run, tmp_path, Plan(4096, None, 16, 70 * 10**9, "auto, 74.0 GB free on a GPU"))
    keyhole.resume(run, epochs=SMALL["train"]["epochs"] + 1)
    assert "the run was on cuda and is now on cpu, with a new plan: memory: " in capsys.readouterr().err
    plan = Plan.from_json(read_info(run / "last.safetensors")["plan"])
    assert (plan.device, plan.chunk) == ("cpu", SMALL["select"]["chunk"])
    assert plan.source.startswith("auto, 80%")


@pytest.mark.parametrize("device", ["cpu", ""], ids=["the same kind", "of an early keyhole"])
def test_a_plan_of_the_same_device_stays(toy_run: Path, tmp_path: Path, device: str) -> None:
    given = Plan(CPU_CHUNK // 2, 8, 16, 70 * 10**9, "auto")
    run = began_on(device, toy_run, tmp_path, given)
    keyhole.resume(run, epochs=SMALL["train"]["epochs"] + 1)
    found = Plan.from_json(read_info(run / "last.safetensors")["plan"])
    assert found == dataclasses.replace(given, device=device)


def test_a_run_that_names_a_gpu_says_what_to_do_without_one(toy_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(toy_run, tmp_path / "run")
    tensors, info = read_tensors(run / "last.safetensors")
    info["config"] = info["config"].replace("device: auto", "device: cuda")
    assert "device: cuda" in info["config"]
    (run / "config.yaml").write_text(info["config"])
    write_tensors(run / "last.safetensors", tensors, info)
    with pytest.raises(ConfigError, match="resume it where there is one"):
        keyhole.resume(run)


class Learner:
    """Two layers and a fused optimizer with weight decay on one layer only.

    The weights of one layer do not lie in memory as a file has them.
    """

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
        self.model[2].weight = nn.Parameter(torch.randn(4 * 36, 2).t() / 12)
        groups = [{"params": [*self.model[at].parameters()], "weight_decay": at * 0.1, "factor": 1.0} for at in (0, 2)]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)

    def step(self, seed: int) -> None:
        pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        self.optimizer.zero_grad()
        loss = self.model(pixels).square().mean()
        loss.backward()
        gradients = [parameter.grad for parameter in self.model.parameters()]
        step_if_finite(self.optimizer, torch.stack([loss.detach(), torch.nn.utils.get_total_norm(gradients)]))

    def weights(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])


def test_the_saved_state_of_an_optimizer_goes_on_as_if_it_had_not_been_saved(tmp_path: Path) -> None:
    whole, first, second = Learner(), Learner(), Learner()
    for seed in range(3):
        first.step(seed)
        whole.step(seed)
    save_state(tmp_path / "last.safetensors", first.model, first.optimizer, {})
    load_state(tmp_path / "last.safetensors", second.model, second.optimizer)
    for seed in range(3, 6):
        whole.step(seed)
        second.step(seed)
    assert [group["weight_decay"] for group in second.optimizer.param_groups] == [0.0, 0.2]
    torch.testing.assert_close(second.weights(), whole.weights())
    steps = {float(state["step"]) for state in second.optimizer.state.values()}
    assert steps == {6.0}
    assert {state["step"].dtype for state in second.optimizer.state.values()} == {torch.float32}
