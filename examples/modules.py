"""keyhole's modules in a torch loop of your own, on tensors in memory; no files, no configuration.

The task: bags of 60 to 100 noisy patches. Two in three bags have one patch that holds a bar. Is there none, is it
upright, or is it lying? One patch in about 80 decides, and nobody tells the model which.

Why a class without a bar: with two classes alone the model could look for one kind of bar and answer the other wherever
it sees none. All answers would be right, and half of the deciding patches would not be kept.

Letters: b image, n patches, m kept, d width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from keyhole.nn import CrossAttentionPool, IPSClassifier, SmallEncoder

STEPS, BATCH, M, CHUNK = 100, 16, 8, 256
LARGEST = 100  # n of the largest bag


def make_bags(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Patches (b n 1 16 16) uint8, mask (b n) of those that are there, labels (b), and which patch decides (b).

    Labels: 0 no bar, 1 upright, 2 lying.
    """
    patches = torch.randint(0, 100, (count, LARGEST, 1, 16, 16), dtype=torch.uint8, generator=generator)
    sizes = torch.randint(60, LARGEST + 1, (count, 1), generator=generator)
    mask = torch.arange(LARGEST) < sizes  # bags of different size share a batch; padding is never looked at
    labels = torch.randint(0, 3, (count,), generator=generator)
    decides = torch.randint(0, 60, (count,), generator=generator)
    for image, (label, patch) in enumerate(zip(labels.tolist(), decides.tolist(), strict=True)):
        if label:
            bar = patches[image, patch, 0, 4:12, 6:10] if label == 1 else patches[image, patch, 0, 6:10, 4:12]
            bar += 150
    return patches, mask, labels, decides


def build() -> IPSClassifier:
    """Any module from (k c h w) to (k d) can be the encoder; each task has a query of the pool and a head."""
    encoder = SmallEncoder(channels=1, width=16, stages=1)
    pool = CrossAttentionPool(encoder.dim, heads=4, queries=1)
    return IPSClassifier(encoder, pool, {"bar": nn.Linear(encoder.dim, 3)})


def forward(model: IPSClassifier, patches: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both passes: logits (b 3) from the m patches that were kept, and their indices (b m)."""
    # First pass: every patch, CHUNK at a time, without gradients and in evaluation mode; all modes are put back.
    selection = model.select(patches, m=M, chunk=CHUNK, rule="global", mask=mask)
    # Second pass: the kept patches alone, with gradients. -1 marks the gaps of bags with fewer than m patches.
    rows = torch.arange(len(patches))[:, None]
    kept = patches[rows, selection.index.clamp(min=0)]
    return model(kept, mask=selection.mask)["bar"], selection.index


def main(steps: int = STEPS) -> float:
    """Learns, and returns the share of new bags that are answered rightly."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        patches, mask, labels, _ = make_bags(BATCH, generator)
        model.train()
        logits, _ = forward(model, patches, mask)
        loss = F.cross_entropy(logits, labels)  # heads give logits, never probabilities
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")

    model.eval()
    patches, mask, labels, decides = make_bags(200, generator)
    with torch.no_grad():
        logits, index = forward(model, patches, mask)
    right = (logits.argmax(dim=1) == labels).float().mean().item()
    kept = (index == decides[:, None]).any(dim=1)[labels > 0]
    print(
        f"new bags answered rightly: {right:.2f}; the patch with the bar was kept in {kept.float().mean():.2f} of them"
    )
    return right


if __name__ == "__main__":
    main()
