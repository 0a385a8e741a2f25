"""Both passes of a model over one image, as in training and prediction: `PATH PATCHES SIZE HEADS TASKS`; print the peak."""

import sys
from pathlib import Path

import torch
from usage import memory

from keyhole.config.settings import ModelConfig, SelectConfig
from keyhole.engine import Engine
from keyhole.loading import Reader
from keyhole.nn import build_classifier
from keyhole.nn.tensors import values_of
from keyhole.patches.opener import FileOpener
from keyhole.tasks.kinds import Task

path = Path(sys.argv[1])
patches, size, heads, tasks = map(int, sys.argv[2:])
kinds = [Task(f"task{t}", "binary", ("no", "yes")) for t in range(tasks)]
model = build_classifier(ModelConfig(encoder="small", width=8, heads=heads), kinds, size).eval()
engine = Engine(model, SelectConfig(m=16, chunk=64))
with Reader(threads=2, ahead=4) as reader:
    engine.reader = reader
    for batch in engine.stream([[FileOpener(path, path.name, size)]], hold=0):
        bags = engine.fetch(batch, engine.select(batch))
        with torch.no_grad():
            model(values_of(bags.part(0, 16))[None], bags.position, bags.mask)
assert reader.read_patches == patches + 16
assert bags.mask.sum() == 16
print(memory("VmHWM"))
