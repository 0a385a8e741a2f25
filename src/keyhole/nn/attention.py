"""Embeddings -> logits of every patch, and the pooled embedding per query.

Letters: b image, n patches, t query, h head, d width, k key width, v value width.

Scoring and pooling are one module, so that what is selected is what is attended to:

    logit[n,h,t] = <W_k e_n, W_q u_t>_h / sqrt(k)                    (IPS, Bergner et al. 2023, section 3)
    out[t]       = LayerNorm(u_t + W_o concat_h sum_n softmax_n(logit[n,h,t]) W_v e_n), then an MLP block
"""

import math

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F


def check_mask(mask: Tensor | None, patches: Tensor) -> None:
    """Raises ValueError for a mask that is not bool (b n), one value for each of the patches (b n ...)."""
    if mask is not None and (mask.shape != patches.shape[:2] or mask.dtype != torch.bool):
        came = f"{str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}"
        raise ValueError(f"`mask` must be bool {tuple(patches.shape[:2])}, one value for each patch, not {came}")


class CrossAttentionPool(nn.Module):
    """Multi-head cross-attention of learnable queries over the patches of an image.

    Args:
        dim: width d of embeddings and queries.
        heads: attention heads h.
        queries: learnable queries t, one per task.
        key_dim: width k of a head's keys; default dim / heads.
        value_dim: width v of a head's values; default dim / heads.
        hidden_dim: width inside the MLP; default 4 dim.
        dropout: after the attention's projection and in the MLP.
        attention_dropout: of the attention weights.

    Raises:
        ValueError: `dim` is not divisible by `heads` where a default needs it.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        queries: int = 1,
        key_dim: int | None = None,
        value_dim: int | None = None,
        hidden_dim: int | None = None,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if dim % heads and (key_dim is None or value_dim is None):
            raise ValueError(f"`dim` (={dim}) must be divisible by `heads` (={heads}), or give key_dim and value_dim")
        self.dim, self.heads, self.queries = dim, heads, queries
        self.key_dim = key_dim or dim // heads
        self.value_dim = value_dim or dim // heads
        self.hidden_dim = hidden_dim or 4 * dim
        self.query = nn.Parameter(torch.empty(queries, dim))
        self.query_proj = nn.Linear(dim, heads * self.key_dim, bias=False)
        self.key_proj = nn.Linear(dim, heads * self.key_dim, bias=False)
        self.value_proj = nn.Linear(dim, heads * self.value_dim, bias=False)
        self.out_proj = nn.Linear(heads * self.value_dim, dim, bias=False)
        self.attention_norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, self.hidden_dim), nn.ReLU(), nn.Linear(self.hidden_dim, dim))
        self.mlp_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attention_dropout = nn.Dropout(attention_dropout)
        self.dropout = nn.Dropout(dropout)
        nn.init.uniform_(self.query, -1 / math.sqrt(dim), 1 / math.sqrt(dim))
        for projection in (self.query_proj, self.key_proj, self.value_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)

    def folded_query(self) -> Float[Tensor, "d ht"]:
        """Queries folded into the key projection: scoring is one product with this matrix."""
        query = rearrange(self.query_proj(self.query), "t (h k) -> h k t", h=self.heads) / math.sqrt(self.key_dim)
        key = rearrange(self.key_proj.weight, "(h k) d -> h d k", h=self.heads)
        return rearrange(key @ query, "h d t -> d (h t)")

    def logits(
        self, embedding: Float[Tensor, "b n d"], query: Float[Tensor, "d ht"] | None = None
    ) -> Float[Tensor, "b n h t"]:
        """Attention logits of every patch under every head and query; each patch's are its own alone.

        Args:
            embedding: one row a patch.
            query: `folded_query()`, for calls with the same weights; default computes it.

        Raises:
            ValueError: embeddings of another shape.
        """
        if embedding.ndim != 3 or embedding.shape[-1] != self.dim:
            raise ValueError(f"embeddings must be (b n d) with `dim` d = {self.dim}, not {tuple(embedding.shape)}")
        query = self.folded_query() if query is None else query
        return rearrange(embedding @ query, "b n (h t) -> b n h t", h=self.heads)

    def forward(
        self, embedding: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b t d"]:
        """Pools the patches of each image once per query.

        Args:
            embedding: one row a patch.
            mask: True where there is a patch, False at padding; each image needs at least one patch.

        Raises:
            ValueError: embeddings or a mask of another shape.
        """
        logits = self.logits(embedding)
        check_mask(mask, embedding)
        if mask is not None:
            logits = logits.masked_fill(~mask[:, :, None, None], -torch.inf)
        attention = self.attention_dropout(F.softmax(logits, dim=1))
        value = rearrange(self.value_proj(embedding), "b n (h v) -> b n h v", h=self.heads)
        pooled = torch.einsum("b n h t, b n h v -> b t h v", attention, value)
        x = self.attention_norm(self.query + self.dropout(self.out_proj(rearrange(pooled, "b t h v -> b t (h v)"))))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))
