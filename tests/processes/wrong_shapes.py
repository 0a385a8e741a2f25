"""Calls the modules with wrong shapes, and prints what each says; run without jaxtyping's checks, as by a user."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from keyhole.nn import CrossAttentionPool, FeatureProjector, IPSClassifier, Selector, SmallEncoder

ENCODER = SmallEncoder(channels=3, width=4)
POOL = CrossAttentionPool(ENCODER.dim, heads=2)
MODEL = IPSClassifier(ENCODER, POOL, {"label": nn.Linear(ENCODER.dim, 2)}).eval()


class Splitting(nn.Module):
    """An encoder that makes four patches of one."""

    def forward(self, patches: Tensor) -> Tensor:
        return patches.reshape(4 * len(patches), -1)[:, : ENCODER.dim]


HEAD = nn.Linear(ENCODER.dim, 2)
SPLITTING = IPSClassifier(Splitting(), POOL, {"label": HEAD}).eval()
ZEROS = torch.zeros(4, dtype=torch.long)


def bags(*shape: int) -> Tensor:
    return torch.zeros(shape)


CALLS: dict[str, Callable[[], object]] = {
    "grey patches": lambda: ENCODER(bags(5, 1, 16, 16)),
    "channels last": lambda: ENCODER(bags(5, 16, 16, 3)),
    "one image": lambda: MODEL(bags(6, 3, 16, 16)),
    "two axes": lambda: MODEL(bags(6, 3)),
    "mask of another number": lambda: MODEL(bags(2, 6, 3, 16, 16), mask=torch.ones(2, 5, dtype=torch.bool)),
    "mask of NumPy": lambda: MODEL(bags(2, 6, 3, 16, 16), mask=bags(2, 6).bool().numpy()),  # type: ignore[arg-type]
    "patches of NumPy": lambda: MODEL(bags(2, 6, 3, 16, 16).numpy()),  # type: ignore[arg-type]
    "whole numbers": lambda: MODEL(bags(2, 6, 3, 16, 16).long()),
    "more embeddings than patches": lambda: SPLITTING(bags(2, 6, 3, 16, 16), mask=torch.ones(2, 6, dtype=torch.bool)),
    "fewer logits than patches": lambda: Selector([4], 2, 2, "streaming").add(ZEROS, torch.arange(4), bags(3, 1, 1)),
    "queries": lambda: IPSClassifier(ENCODER, POOL, {"label": HEAD}, queries={"lable": 0}),
    "mask of numbers": lambda: MODEL(bags(2, 6, 3, 16, 16), mask=torch.ones(2, 6)),
    "position": lambda: MODEL(bags(2, 6, 3, 16, 16), position=torch.zeros(2, 7)),
    "select mask": lambda: MODEL.select(bags(2, 6, 3, 16, 16), 2, 4, mask=torch.ones(6, 2, dtype=torch.bool)),
    "select none": lambda: MODEL.select(bags(2, 6, 3, 16, 16), 0, 4),
    "pool width": lambda: POOL(bags(2, 6, 7)),
    "pool of one image": lambda: POOL(bags(6, 32)),
    "features": lambda: FeatureProjector(8, 4)(bags(5, 9)),
}

for name, call in CALLS.items():
    try:
        call()
        print(f"{name}: nothing")
    except ValueError as error:
        print(f"{name}: {error}")
