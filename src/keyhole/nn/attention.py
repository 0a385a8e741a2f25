"""Embeddings -> attention logits of every patch, and one pooled embedding for each query.

Letters: b image, n patches, t query, h head, d width, k key width, v value width.

One module scores and pools, so that the selected patches are the attended ones:

    logit[n,h,t] = <W_k e_n, W_q u_t>_h / sqrt(k)                    (IPS, Bergner et al. 2023, section 3)
    out[t]       = LayerNorm(u_t + W_o concat_h sum_n softmax_n(logit[n,h,t]) W_v e_n), then an MLP block
"""

import math

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from keyhole.nn.tensors import no_autocast


def check_mask(mask: Tensor | None, patches: Tensor) -> None:
    """Raise ValueError for a mask that is not bool (b n), one value for each of the patches (b n ...)."""
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(f"`mask` must be a torch tensor, not {type(mask).__name__}")
    if mask is not None and (mask.shape != patches.shape[:2] or mask.dtype != torch.bool):
        came = f"{str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}"
        raise ValueError(f"`mask` must be bool {tuple(patches.shape[:2])}, one value for each patch, not {came}")


class CrossAttentionPool(nn.Module):
    """Multi-head cross-attention of learnable queries over the patches of an image.

    Args:
        dim: width d of embeddings and queries.
        heads: number of attention heads h.
        queries: number of learnable queries t, one for each task.
        head_dim: width of a head's keys and values, or (k, v) where they differ; default dim / heads.
        hidden_dim: width inside the MLP; default 4 dim.
        dropout: rate after the attention's projection and in the MLP.
        attention_dropout: rate of the attention weights.

    Raises:
        ValueError: `dim` is not divisible by `heads` and `head_dim` is not given.

    Example:
        >>> pool = CrossAttentionPool(dim=32, heads=4, queries=2)
        >>> embedding = torch.rand(3, 10, 32)  # 10 patches of each of 3 images
        >>> pool.logits(embedding).shape
        torch.Size([3, 10, 4, 2])
        >>> pool(embedding).shape
        torch.Size([3, 2, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        queries: int = 1,
        head_dim: int | tuple[int, int] | None = None,
        hidden_dim: int | None = None,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if head_dim is None and dim % heads:
            raise ValueError(f"`dim` (={dim}) must be divisible by `heads` (={heads}), or give `head_dim`")
        head_dim = head_dim or dim // heads
        self.dim, self.heads, self.queries = dim, heads, queries
        self.key_dim, self.value_dim = head_dim if isinstance(head_dim, tuple) else (head_dim, head_dim)
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
        """Fold the queries into the key projection, so that scoring is one product with the result.

        Returns:
            Matrix (d ht).
        """
        with no_autocast(self.query.device):
            query = rearrange(self.query_proj(self.query), "t (h k) -> h k t", h=self.heads) / math.sqrt(self.key_dim)
            key = rearrange(self.key_proj.weight, "(h k) d -> h d k", h=self.heads)
            return rearrange(key @ query, "h d t -> d (h t)")

    def logits(
        self, embedding: Float[Tensor, "b n d"], query: Float[Tensor, "d ht"] | None = None
    ) -> Float[Tensor, "b n h t"]:
        """Compute the attention logits of every patch; those of one patch do not depend on the others.

        Args:
            embedding: (b n d).
            query: `folded_query()`, to be computed once for several calls with the same weights.

        Returns:
            Logits (b n h t) of every patch under every head and query.

        Raises:
            ValueError: the embeddings have another shape.
        """
        if embedding.ndim != 3 or embedding.shape[-1] != self.dim:
            raise ValueError(f"embeddings must be (b n d) with `dim` d = {self.dim}, not {tuple(embedding.shape)}")
        query = self.folded_query() if query is None else query
        with no_autocast(embedding.device):
            return rearrange(embedding.to(query.dtype) @ query, "b n (h t) -> b n h t", h=self.heads)

    def forward(
        self, embedding: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b t d"]:
        """Pool the patches of each image, once for each query.

        Args:
            embedding: (b n d).
            mask: (b n), False at padding. An image of padding alone gets the mean of its padding.

        Returns:
            Pooled embeddings (b t d).

        Raises:
            ValueError: the embeddings or the mask have another shape.
        """
        logits = self.logits(embedding)
        check_mask(mask, embedding)
        if mask is not None:  # not -inf, with which an image of padding alone would make all gradients NaN
            logits = logits.masked_fill(~mask[:, :, None, None], torch.finfo(logits.dtype).min)
        with no_autocast(embedding.device):
            attention = self.attention_dropout(F.softmax(logits, dim=1))
            value = rearrange(self.value_proj(embedding.to(logits.dtype)), "b n (h v) -> b n h v", h=self.heads)
            pooled = torch.einsum("b n h t, b n h v -> b t h v", attention, value)
            x = self.attention_norm(self.query + self.dropout(self.out_proj(rearrange(pooled, "b t h v -> b t (h v)"))))
            return self.mlp_norm(x + self.dropout(self.mlp(x)))
