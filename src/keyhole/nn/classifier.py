"""The paper in one forward: kept patches -> logits per task, and the selection that keeps them.

Letters: b image, n patches, m kept, i chunk, t query, h head, d width, o outputs of a task.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from keyhole.nn.attention import CrossAttentionPool
from keyhole.nn.position import CenterPosition
from keyhole.nn.selection import Rule, Selection, Selector, evaluating


class IPSClassifier(nn.Module):
    """Iterative Patch Selection (Bergner et al., ICLR 2023): encoder, cross-attention pool, one head per task.

    Args:
        encoder: patches (k, ...) -> embeddings (k d); any module. uint8 patches are scaled to 0 ... 1 before it.
        pool: scores and pools the embeddings.
        heads: task -> module from (b d) to (b o) logits.
        position: positions (b n) or (b n 2) -> codes (b n d), or None.
        queries: task -> query of the pool; default one each, in the order of `heads`.
        precision: arithmetic of the encoder (autocast); everything behind it is float32.

    Raises:
        ValueError: a head's query does not exist in the pool.
    """

    def __init__(
        self,
        encoder: nn.Module,
        pool: CrossAttentionPool,
        heads: Mapping[str, nn.Module],
        position: nn.Module | None = None,
        queries: Mapping[str, int] | None = None,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.encoder, self.pool, self.position = encoder, pool, position
        self.heads = nn.ModuleDict(heads)
        self.queries = dict(queries) if queries is not None else {task: t for t, task in enumerate(heads)}
        self.precision = precision
        for task, t in self.queries.items():
            if not 0 <= t < pool.queries:
                raise ValueError(f"task {task!r} needs query {t}, the pool has `queries` (={pool.queries})")

    def forward(
        self,
        patches: Shaped[Tensor, "b m ..."],
        position: Shaped[Tensor, "b m ..."] | None = None,
        mask: Bool[Tensor, "b m"] | None = None,
    ) -> dict[str, Float[Tensor, "b o"]]:
        """Logits of every task from the kept patches.

        Args:
            patches: (b m c h w) pixels or (b m f) features.
            position: patch index (b m) for the 1-D code, centres (b m 2) for the 2-D, nothing without a code.
            mask: True where there is a patch. Padding is neither encoded nor attended to.
        """
        return self.classify(self.embed(patches, mask), position, mask)

    def classify(
        self,
        embedding: Float[Tensor, "b m d"],
        position: Shaped[Tensor, "b m ..."] | None = None,
        mask: Bool[Tensor, "b m"] | None = None,
    ) -> dict[str, Float[Tensor, "b o"]]:
        """The part of `forward` behind the encoder."""
        pooled = self.pool(self.with_position(embedding, position), mask)
        return {task: head(pooled[:, self.queries[task]]) for task, head in self.heads.items()}

    def embed(
        self, patches: Shaped[Tensor, "b m ..."], mask: Bool[Tensor, "b m"] | None = None, chunk: int | None = None
    ) -> Float[Tensor, "b m d"]:
        """Embeddings without position codes; zeros at padding, which the encoder never sees.

        Args:
            patches: as in `forward`.
            mask: as in `forward`.
            chunk: patches to encode at once; default all. In evaluation mode the result is the same.
        """
        loose = patches.flatten(0, 1) if mask is None else patches[mask]
        embedding = torch.cat([self.encode(part) for part in loose.split(chunk or max(1, len(loose)))])
        if mask is None:
            return embedding.unflatten(0, patches.shape[:2])
        return embedding.new_zeros(*mask.shape, embedding.shape[-1]).masked_scatter(mask[..., None], embedding)

    def encode(self, patches: Shaped[Tensor, "k ..."]) -> Float[Tensor, "k d"]:
        """The encoder over loose patches, in the model's precision; the result is float32."""
        if patches.dtype == torch.uint8:
            patches = patches.to(torch.float32) / 255
        with torch.autocast(patches.device.type, self.precision, enabled=self.precision != torch.float32):
            embedding: Tensor = self.encoder(patches)
        return embedding.float()

    def with_position(
        self, embedding: Float[Tensor, "b n d"], position: Shaped[Tensor, "b n ..."] | None
    ) -> Float[Tensor, "b n d"]:
        """Embeddings as scoring and pooling see them."""
        if self.position is None:
            return embedding
        if position is None:
            raise ValueError(
                "this model has a position code: give `position`, the patch index (b m) or centres (b m 2)"
            )
        return embedding + self.position(position)

    def score(
        self, patches: Shaped[Tensor, "k ..."], position: Shaped[Tensor, "k ..."] | None = None
    ) -> Float[Tensor, "k h t"]:
        """Attention logits of loose patches; what the selection runs over every chunk."""
        embedding = self.encode(patches)[None]
        return self.pool.logits(self.with_position(embedding, None if position is None else position[None]))[0]

    def select(
        self,
        patches: Shaped[Tensor, "b n ..."],
        m: int,
        chunk: int,
        rule: Rule = "global",
        position: Shaped[Tensor, "b n ..."] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> Selection:
        """Keeps the m most salient patches of each image, without gradients and in evaluation mode.

        Args:
            patches: (b n ...) in memory; on any device.
            m: patches to keep; all where an image has fewer.
            chunk: patches to encode at once.
            rule: "global" (independent of order and chunk) or "streaming" (as published).
            position: as in `forward`; default 0 ... n-1 for the 1-D code.
            mask: True where there is a patch, for bags of different size.

        Returns:
            Selection with `index` (b m) best first and, under "global", `logits` (b n h t).
        """
        b, n = patches.shape[:2]
        if mask is None:
            mask = torch.ones(b, n, dtype=torch.bool)
        if position is None and self.position is not None and not isinstance(self.position, CenterPosition):
            position = torch.arange(n, device=patches.device).expand(b, n)
        image, index = mask.cpu().nonzero(as_tuple=True)
        selector = Selector([n] * b, m, chunk, rule, keep_logits=rule == "global")
        selector.skip((~mask.cpu()).nonzero(as_tuple=True)[0])
        with evaluating(self):
            for start in range(0, len(image), chunk):
                i, j = image[start : start + chunk], index[start : start + chunk]
                where = None if position is None else position[i, j]
                selector.add(i, j, self.score(patches[i, j], where))
        return self._collect(selector, b, n, m, rule)

    def _collect(self, selector: Selector, b: int, n: int, m: int, rule: Rule) -> Selection:
        kept = [selector.finish(image) for image in range(b)]
        device = self.pool.query.device
        width = min(m, n)
        index = torch.full((b, width), -1, dtype=torch.long, device=device)
        score = torch.zeros(b, width, device=device)
        logits = torch.full((b, n, self.pool.heads, self.pool.queries), -torch.inf, device=device)
        for row, image in enumerate(kept):
            index[row, : len(image.index)] = image.index
            score[row, : len(image.index)] = image.score
            if image.logits is not None:
                logits[row] = image.logits
        return Selection(index, score, index >= 0, logits if rule == "global" else None)

    def train(self, mode: bool = True) -> "IPSClassifier":
        """Training mode, except for what is frozen: a part whose parameters all stay fixed keeps evaluating.

        Otherwise a frozen encoder's batch norm would go on learning statistics and its dropout go on dropping.
        """
        super().train(mode)
        if mode:
            for part in self.modules():
                parameters = list(part.parameters())
                if parameters and not any(parameter.requires_grad for parameter in parameters):
                    part.eval()
        return self
