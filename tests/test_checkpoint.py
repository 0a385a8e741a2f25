"""Files of weights: what the library reads of them, and the memory that writing takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_process
from safetensors import safe_open
from safetensors.torch import load_file

from keyhole.errors import RunError
from keyhole.runs.checkpoint import TYPES, read_tensors, write_tensors


def test_the_library_reads_tensors_of_all_types_and_shapes(tmp_path: Path) -> None:
    tensors = {f"of {kind}": (torch.arange(5) % 2).to(kind) for kind in TYPES}
    tensors |= {
        "number": torch.tensor(3.5),
        "nothing": torch.empty(0, 4),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "bytes": torch.arange(3, dtype=torch.uint8),
        'a name: "é"': torch.ones(2, 2, dtype=torch.bfloat16),
    }
    path, info = tmp_path / "file.safetensors", {"said": "\ud800 and é", "list": [1, None]}

    write_tensors(path, tensors, info)

    found = load_file(path)
    assert set(found) == set(tensors)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    assert all(each.data_ptr() % each.element_size() == 0 for each in found.values()), "aligned"
    read, said = read_tensors(path)
    assert said == info
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, "pt") as file:
        assert set(file.metadata()) == {"keyhole", "keyhole.sha256", "keyhole.info_sha256"}


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"weight": torch.ones(9)}, {})
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(RunError, match="damaged"):
        read_tensors(path)


def test_writing_holds_no_copy(tmp_path: Path) -> None:
    more = int(run_process("writes_weights", tmp_path).stdout)
    assert more < 2**24, "of 256 MB"
