"""Writes 256 MB of weights into a folder, and prints by how many bytes memory rose."""

import sys
from pathlib import Path

import torch

from keyhole.runs.checkpoint import write_tensors
from keyhole.util.platform import peak_memory, resident_memory

tensors = {f"part.{number}": torch.full((2**20,), float(number)) for number in range(64)}
write_tensors(Path(sys.argv[1]) / "small.safetensors", {"one": torch.ones(1)}, {})
before = resident_memory()
write_tensors(Path(sys.argv[1]) / "large.safetensors", tensors, {})
print(peak_memory() - before)
