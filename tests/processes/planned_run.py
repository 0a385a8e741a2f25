"""`keyhole train` under a budget: `ROOM OPTION ...`; ROOM is MB beyond what this process takes.

Prints the budget and the peak of memory, in bytes.
"""

import sys

import torch
from torch import nn
from usage import memory

from keyhole.cli.main import main

room, *options = sys.argv[1:]
# what torch loads with its first convolution and its first gradient is not part of the budget
nn.Conv2d(3, 8, 3)(torch.zeros(1, 3, 64, 64)).sum().backward()
budget = memory("VmRSS") // 10**6 + int(room)
code = main(["train", *options, "--memory", f"{budget}MB"])
print(budget * 10**6, memory("VmHWM"))
sys.exit(code)
