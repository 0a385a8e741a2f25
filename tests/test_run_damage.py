"""What happens to the files of a run: bits that flip, files that are cut or changed. Each is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from keyhole.checkpoint import read_info, read_tensors, write_tensors
from keyhole.errors import RunError


def test_no_flipped_bit_of_a_file_of_tensors_goes_unseen(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "weight": torch.ones(3, 2),
        "count": torch.zeros((), dtype=torch.int64),
        "half": torch.ones(4, dtype=torch.bfloat16),
        "mask": torch.ones(2, dtype=torch.bool),
        "empty": torch.ones(0, 3),
    }
    write_tensors(path, tensors, {"name": "ä", "classes": ["a", "b"]})
    found, info = read_tensors(path)
    assert info == {"name": "ä", "classes": ["a", "b"]} == read_info(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(RunError, match=r"model\.safetensors"):
            read_tensors(path)
