"""The published selection and training step, rendered literally in eager float32: what every ratio is measured against.

Source: Bergner, Lippert, Mahendran, "Iterative Patch Selection for High-Resolution Image Recognition", ICLR 2023, arXiv
2210.13007. Written anew from the paper; `tests/test_published.py` holds it against small runs of the published code.

It keeps what the method does as it was published, also where keyhole does otherwise: patches (b n c h w) of float32,
channels first; the encoder once per chunk of I patches of every image; keys of all M + I candidates projected anew in
every iteration; softmax over these; embeddings and indices gathered; the kept patches gathered from the whole image at
the end; patches that lie in host memory copied a chunk at a time from pageable memory, while the device waits; the loss
log(softmax + eps). The shuffle, which copies all patches of the image, is there and off unless asked for, in the
baseline's favour: then both sides see the patches in the same order.

Letters: b image, n patches, m kept (M), i chunk (I), k candidates, t query, h head, d width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from keyhole.nn import FeatureProjector, IndexPosition, IPSClassifier, TimmEncoder

EPS = 1e-6
"""Added to a softmax before its logarithm. At a logit 40 below the winner's it leaves a gradient of 4e-12."""


class CrossAttention(nn.Module):
    """Learnable queries over the patches: scores for the selection, one vector a query for the heads."""

    def __init__(self, dim: int, heads: int, queries: int, key_dim: int, value_dim: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.queries, self.key_dim, self.value_dim = heads, queries, key_dim, value_dim
        self.q = nn.Parameter(torch.empty(1, queries, dim))
        self.q_w = nn.Linear(dim, heads * key_dim, bias=False)
        self.k_w = nn.Linear(dim, heads * key_dim, bias=False)
        self.v_w = nn.Linear(dim, heads * value_dim, bias=False)
        self.fc = nn.Linear(heads * value_dim, dim, bias=False)
        self.attention_dropout = nn.Dropout(dropout)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(dim, eps=1e-6)

    def attention(self, x: Tensor) -> Tensor:
        """(b k d) -> (b h t k), softmax over the k candidates."""
        b, k = x.shape[:2]
        query = self.q_w(self.q).view(1, self.queries, self.heads, self.key_dim).transpose(1, 2)
        key = self.k_w(x).view(b, k, self.heads, self.key_dim).transpose(1, 2)
        logits = torch.matmul(query / math.sqrt(self.key_dim), key.transpose(2, 3))
        return F.softmax(logits, dim=-1)

    def scores(self, x: Tensor) -> Tensor:
        """(b k d) -> (b k): attention, averaged over heads and queries."""
        return self.attention(x).mean(dim=1).mean(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b m d) -> (b t d)."""
        b, m = x.shape[:2]
        value = self.v_w(x).view(b, m, self.heads, self.value_dim).transpose(1, 2)
        pooled = torch.matmul(self.attention_dropout(self.attention(x)), value)
        pooled = pooled.transpose(1, 2).reshape(b, self.queries, self.heads * self.value_dim)
        return self.layer_norm(self.q + self.dropout(self.fc(pooled)))


class Transformer(nn.Module):
    """Cross-attention, then an MLP with a residual and a layer norm."""

    def __init__(self, attention: CrossAttention, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.crs_attn = attention
        self.w_1, self.w_2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.crs_attn(x)
        return self.layer_norm(x + self.dropout(self.w_2(F.relu(self.w_1(x)))))


class Published(nn.Module):
    """The published network: selects, then classifies what it selected.

    Args:
        encoder: patches (k c h w) or features (k f) -> embeddings (k d).
        transformer: scores and pools.
        heads: task -> linear layer.
        queries: task -> which of the pooled vectors is its own.
        activations: task -> "softmax" or "sigmoid".
        m, chunk: M and I.
        position: whether the 1-D sinusoidal code is added.
        shuffle: draw a new order of the patches for every batch; copies them all.
    """

    def __init__(
        self,
        encoder: nn.Module,
        transformer: Transformer,
        heads: Mapping[str, nn.Module],
        queries: Mapping[str, int],
        activations: Mapping[str, str],
        m: int,
        chunk: int,
        position: bool,
        shuffle: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.transf = encoder, transformer
        self.output_layers = nn.ModuleDict(heads)
        self.queries, self.activations = dict(queries), dict(activations)
        self.m, self.chunk, self.position, self.shuffle = m, chunk, position, shuffle
        self.table: Tensor | None = None

    def codes(self, b: int, n: int) -> Tensor:
        """Position codes (b n d) of all patches, made once for an n."""
        device = self.transf.crs_attn.q.device
        if self.table is None or len(self.table) != n or self.table.device != device:
            self.table = sinusoidal_table(n, self.transf.crs_attn.q.shape[-1]).to(device)
        return self.table.expand(b, -1, -1)

    def embed(self, patches: Tensor) -> Tensor:
        """(b i ...) wherever they lie -> (b i d) on the device; copied there as they are, without a stream."""
        b, i = patches.shape[:2]
        patches = patches.to(self.transf.crs_attn.q.device)
        return self.encoder(patches.reshape(b * i, *patches.shape[2:])).view(b, i, -1)

    @torch.no_grad()
    def ips(self, patches: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Iterative selection.

        Args:
            patches: (b n ...) on the device or in host memory.

        Returns:
            The kept patches (b m ...) on the device, their position codes (b m d) or None, and their indices (b m) in
            the order of the memory.
        """
        device = self.transf.crs_attn.q.device
        b, n = patches.shape[:2]
        codes = self.codes(b, n) if self.position else None
        index = torch.arange(n, device=device).expand(b, n)
        if n <= self.m:
            return patches.to(device), codes, index
        was_training = self.training
        if was_training:
            self.encoder.eval()
            self.transf.eval()
        if self.shuffle:
            order = torch.randperm(n)
            patches = patches[:, order.to(patches.device)]
            index = index[:, order.to(device)]
            codes = None if codes is None else codes[:, order.to(device)]
        at = torch.arange(n, device=device).expand(b, n)  # places in the order of this batch
        memory, memory_at = self.embed(patches[:, : self.m]), at[:, : self.m]
        for start in range(self.m, n, self.chunk):
            new = self.embed(patches[:, start : start + self.chunk])
            memory, memory_at = self.keep_best(
                torch.cat([memory, new], dim=1),
                torch.cat([memory_at, at[:, start : start + self.chunk]], dim=1),
                codes,
            )
        if was_training:
            self.encoder.train()
            self.transf.train()
        kept_codes = None if codes is None else take(codes, memory_at)
        return take(patches, memory_at).to(device), kept_codes, index.gather(1, memory_at)

    def keep_best(self, embedding: Tensor, at: Tensor, codes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scores the candidates (b k d) against each other, keeps the embeddings and places of the best m."""
        score = self.transf.crs_attn.scores(embedding if codes is None else embedding + take(codes, at))
        best = torch.topk(score, self.m, dim=-1).indices
        return take(embedding, best), at.gather(1, best)

    def forward(self, patches: Tensor, codes: Tensor | None = None) -> dict[str, Tensor]:
        """Kept patches (b m ...) and their position codes -> probabilities of every task."""
        embedding = self.embed(patches)
        pooled = self.transf(embedding if codes is None else embedding + codes)
        probability = {}
        for task, head in self.output_layers.items():
            logits = head(pooled[:, self.queries[task]])
            probability[task] = logits.softmax(dim=-1) if self.activations[task] == "softmax" else logits.sigmoid()
        return probability

    def loss(self, probability: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
        """Mean over the tasks: class indices (b,) for softmax, zeros and ones (b o) for sigmoid."""
        terms = []
        for task, p in probability.items():
            if self.activations[task] == "softmax":
                terms.append(F.nll_loss(torch.log(p + EPS), targets[task]))
            else:
                terms.append(F.binary_cross_entropy(p, targets[task]))
        return torch.stack(terms).mean()

    def select(self, patches: Tensor, at_once: int | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """`ips`, `at_once` images at a time into one buffer; default the whole batch."""
        if at_once is None:
            return self.ips(patches)
        parts = [self.ips(part) for part in patches.split(at_once)]
        codes = [part[1] for part in parts if part[1] is not None]
        return (
            torch.cat([part[0] for part in parts]),
            torch.cat(codes) if codes else None,
            torch.cat([p[2] for p in parts]),
        )

    def step(
        self,
        patches: Tensor,
        targets: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        at_once: int | None = None,
    ) -> float:
        """One training step on a batch; the loss."""
        kept, codes, _ = self.select(patches, at_once)
        optimizer.zero_grad()
        loss = self.loss(self(kept, codes), targets)
        loss.backward()
        optimizer.step()
        return loss.item()


def take(rows: Tensor, index: Tensor) -> Tensor:
    """Rows (b k ...) of (b n ...), by gathering with an index (b k) as wide as the rows."""
    wide = index.to(rows.device).view(*index.shape, *[1] * (rows.ndim - 2)).expand(-1, -1, *rows.shape[2:])
    return torch.gather(rows, 1, wide)


def sinusoidal_table(n: int, d: int) -> Tensor:
    """(n d): sine in the even columns, cosine in the odd ones."""
    position = torch.arange(n, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, d, 2, dtype=torch.float32) * -(math.log(10000.0) / d))
    table = torch.zeros(n, d)
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate)
    return table


def published_from(
    model: IPSClassifier,
    m: int,
    chunk: int,
    activations: Mapping[str, str] | None = None,
    shuffle: bool = False,
) -> Published:
    """The published network with the weights of one of ours, copied, on the same device, float32, channels first.

    Args:
        model: with the 1-D position code or none.
        m, chunk: M and I.
        activations: task -> "softmax" (default) or "sigmoid".
        shuffle: see `Published`.

    Raises:
        ValueError: the model has another position code.
    """
    if model.position is not None and not isinstance(model.position, IndexPosition):
        raise ValueError(f"the published code has a 1-D position code or none, not {type(model.position).__name__}")
    pool = model.pool
    attention = CrossAttention(
        pool.dim, pool.heads, pool.queries, pool.key_dim, pool.value_dim, pool.attention_dropout.p
    )
    attention.dropout.p = pool.dropout.p
    transformer = Transformer(attention, pool.dim, pool.hidden_dim, pool.dropout.p)
    with torch.no_grad():
        attention.q.copy_(pool.query[None])
    pairs: list[tuple[nn.Module, nn.Module]] = [
        (attention.q_w, pool.query_proj),
        (attention.k_w, pool.key_proj),
        (attention.v_w, pool.value_proj),
        (attention.fc, pool.out_proj),
        (attention.layer_norm, pool.attention_norm),
        (transformer.w_1, pool.mlp[0]),
        (transformer.w_2, pool.mlp[2]),
        (transformer.layer_norm, pool.mlp_norm),
    ]
    for ours, theirs in pairs:
        ours.load_state_dict(theirs.state_dict())
    network = Published(
        published_encoder(model.encoder),
        transformer,
        {task: copy.deepcopy(head) for task, head in model.heads.items()},
        model.queries,
        activations or dict.fromkeys(model.heads, "softmax"),
        m,
        chunk,
        model.position is not None,
        shuffle,
    )
    network = network.to(pool.query.device, torch.float32).to(memory_format=torch.contiguous_format)
    return network.train(model.training)


def published_encoder(encoder: nn.Module) -> nn.Module:
    """A copy: of a projector of features the four layers it was published as.

    The published code takes pixels as they are. An encoder of ours that leaves them as they are is copied without the
    pass in which others normalize them.
    """
    encoder = copy.deepcopy(encoder)
    if isinstance(encoder, FeatureProjector):
        norm = nn.LayerNorm(encoder.features, elementwise_affine=False)
        return nn.Sequential(norm, encoder.linear, encoder.norm, nn.ReLU())
    if isinstance(encoder, TimmEncoder) and bool((encoder.scale == 1).all() and (encoder.shift == 0).all()):
        return Unchanged(encoder)
    return encoder


class Unchanged(nn.Module):
    """An encoder over pixels as they are."""

    def __init__(self, encoder: TimmEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, patches: Tensor) -> Tensor:
        return self.encoder.embed(patches)
