"""The paper in one forward: kept patches -> logits per task, and the selection that keeps them.

Letters: b image, n patches, m kept, i chunk, t query, h head, d width, o outputs of a task.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from keyhole.nn.attention import CrossAttentionPool, check_mask
from keyhole.nn.encoder import PixelEncoder, lone_patch
from keyhole.nn.position import PositionCode
from keyhole.nn.selection import Rule, Selection, evaluating, select_bags
from keyhole.nn.tensors import AsRead, no_autocast, prepare
from keyhole.util.tf32 import tf32


def _loose(tensor: Shaped[Tensor, "b n ..."], mask: Bool[Tensor, "b n"] | None) -> Shaped[Tensor, "k ..."]:
    return tensor.flatten(0, 1) if mask is None else tensor[mask.to(tensor.device)]


def _check_bags(patches: Tensor, position: Tensor | None, mask: Tensor | None, encoder: nn.Module) -> None:
    """Raise ValueError for shapes that do not fit each other; the modules check what they take themselves."""
    if not isinstance(patches, Tensor):
        raise ValueError(f"patches must be a torch tensor, not {type(patches).__name__}")
    if patches.ndim < 3 or (patches.ndim == 4 and any(isinstance(part, PixelEncoder) for part in encoder.modules())):
        raise ValueError(
            f"patches must be (b n c h w), or features (b n f), not {tuple(patches.shape)}; one image is patches[None]"
        )
    check_mask(mask, patches)
    if position is not None and not isinstance(position, Tensor):
        raise ValueError(f"`position` must be a torch tensor, not {type(position).__name__}")
    if position is not None and position.shape[:2] != patches.shape[:2]:
        wanted = tuple(patches.shape[:2])
        raise ValueError(f"`position` must begin with {wanted}, as the patches do, not {tuple(position.shape)}")


def encoder_input(patches: Tensor | AsRead) -> tuple[Tensor, Tensor | None]:
    """Return the input of the encoder, and the colour change that is left to it; none on a CPU.

    There colours are changed before, in float32, so that results do not depend on what is fused.
    """
    if isinstance(patches, Tensor):
        return patches, None
    on_cpu = patches.pixels.device.type == "cpu"
    return (prepare(patches.pixels, patches.color), None) if on_cpu else (patches.pixels, patches.color)


def encoded(encoder: Callable[..., Tensor], pixels: Tensor, color: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the embeddings of patches; uint8 pixels become normalized values of `dtype` in one pass where that works.

    `pixels` are (k h w c) uint8 as read, with affine colour changes (k c c+1); or (k c h w) floats or (k f) features.
    """
    if pixels.dtype != torch.uint8:
        embedding = encoder(pixels)
    elif isinstance(encoder, PixelEncoder):
        embedding = encoder.embed(prepare(pixels, color, dtype, encoder.scale, encoder.shift))
    else:
        embedding = encoder(prepare(pixels, color))
    if embedding.ndim != 2 or len(embedding) != len(pixels):
        raise ValueError(
            f"the encoder gave {tuple(embedding.shape)} for {len(pixels)} patches, expected a vector for each"
        )
    return embedding


class Heads(nn.Module):
    """A head for each task, by number in the state: a column such as `tumor.grade` is not a valid name of a module."""

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.by_task = nn.ModuleList(heads.values())
        self._number = {task: number for number, task in enumerate(heads)}

    def __getitem__(self, task: str) -> nn.Module:
        return self.by_task[self._number[task]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._number)

    def items(self) -> Iterable[tuple[str, nn.Module]]:
        return zip(self._number, self.by_task, strict=True)


class IPSClassifier(nn.Module):
    """Iterative Patch Selection (Bergner et al., ICLR 2023): encoder, cross-attention pool, one head per task.

    Args:
        encoder: patches (k, ...) -> embeddings (k d); any module. uint8 patches are scaled to 0 ... 1 before it.
        pool: scores and pools the embeddings.
        heads: task -> module from (b d) to (b o) logits.
        position: positions (b n) or (b n 2) -> codes (b n d), or None.
        queries: task -> query of the pool; default one each, in the order of `heads`.
        precision: arithmetic of the encoder; everything behind it is float32. An autocast of your own has no effect.

    Raises:
        ValueError: a head has no query, or one that does not exist in the pool.
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
        self.heads = Heads(heads)
        self.queries = dict(queries) if queries is not None else {task: t for t, task in enumerate(heads)}
        self.precision = precision
        if self.queries.keys() != heads.keys():
            raise ValueError(f"`queries` must name the tasks {list(heads)}, not {list(self.queries)}")
        for task, t in self.queries.items():
            if not 0 <= t < pool.queries:
                raise ValueError(f"task {task!r} needs query {t}, the pool has `queries` (={pool.queries})")

    def forward(
        self,
        patches: Shaped[Tensor, "b m ..."],
        position: Shaped[Tensor, "b m ..."] | None = None,
        mask: Bool[Tensor, "b m"] | None = None,
    ) -> dict[str, Float[Tensor, "b o"]]:
        """Compute the logits of every task from the kept patches.

        Args:
            patches: (b m c h w) pixels or (b m f) features.
            position: patch index (b m) for the 1-D code, centres (b m 2) for the 2-D, nothing without a code.
            mask: True where there is a patch. Padding is neither encoded nor attended to.

        Returns:
            Logits (b o) of every task.

        Raises:
            ValueError: the patches, positions or mask have another shape.
        """
        _check_bags(patches, position, mask, self.encoder)
        embedding = self.encode(_loose(patches, mask))
        if mask is None:
            embedding = embedding.unflatten(0, patches.shape[:2])
        else:
            embedding = embedding.new_zeros(*mask.shape, embedding.shape[-1]).masked_scatter(mask[..., None], embedding)
        return self.classify(embedding, position, mask)

    def classify(
        self,
        embedding: Float[Tensor, "b m d"],
        position: Shaped[Tensor, "b m ..."] | None = None,
        mask: Bool[Tensor, "b m"] | None = None,
    ) -> dict[str, Float[Tensor, "b o"]]:
        """Compute the part of `forward` after the encoder.

        Returns:
            Logits (b o) of every task.
        """
        with no_autocast(embedding.device):
            pooled = self.pool(self._placed(embedding, position), mask)
            return {task: head(pooled[:, self.queries[task]]) for task, head in self.heads.items()}

    def encode(self, patches: Shaped[Tensor, "k ..."] | AsRead) -> Float[Tensor, "k d"]:
        """Encode loose patches in the model's precision; see `lone_patch` for a single one.

        Args:
            patches: floats, or uint8 in the same order (k c h w); or as they were read.

        Returns:
            Embeddings (k d) in float32.

        Raises:
            ValueError: patches of another type, or an encoder that does not give a vector for each.
        """
        if isinstance(patches, Tensor):
            if not (patches.is_floating_point() or patches.dtype == torch.uint8):
                came = str(patches.dtype).removeprefix("torch.")
                raise ValueError(f"patches must be uint8 pixels of 0 ... 255, or floats, not {came}")
            kinds = (weight.dtype for weight in self.encoder.parameters() if weight.is_floating_point())
            values = patches.to(next(kinds, torch.float32))
            patches = values / 255 if patches.dtype == torch.uint8 else values
        alone = self.training and len(patches) == 1
        pixels, color = encoder_input(patches)
        with self.autocast(pixels.device), lone_patch(self.encoder) if alone else nullcontext():
            return encoded(self.encoder, pixels, color, torch.float32).float()

    def autocast(self, device: torch.device) -> torch.autocast:
        """Make the encoder compute in `precision`.

        Returns:
            A context.
        """
        return torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32)

    def _placed(
        self, embedding: Float[Tensor, "b n d"], position: Shaped[Tensor, "b n ..."] | None
    ) -> Float[Tensor, "b n d"]:
        """Add the position codes: embeddings as scoring and pooling see them."""
        if self.position is None:
            return embedding
        if position is None:
            raise ValueError(
                "this model has a position code: give `position`, the patch index (b m) or centres (b m 2)"
            )
        return embedding + self.position(position)

    def logits(
        self,
        embedding: Float[Tensor, "k d"],
        position: Shaped[Tensor, "k ..."] | None = None,
        query: Tensor | None = None,
    ) -> Float[Tensor, "k h t"]:
        """Compute the attention logits of loose patches.

        Args:
            embedding: without position codes.
            position: patch index (k) or centres (k 2), where the model has a position code.
            query: of `CrossAttentionPool.folded_query`, so that many calls compute it once.

        Returns:
            Logits (k h t).
        """
        with no_autocast(embedding.device):
            placed = self._placed(embedding[None], None if position is None else position[None])
            return self.pool.logits(placed, query)[0]

    def select(
        self,
        patches: Shaped[Tensor, "b n ..."],
        m: int,
        chunk: int,
        rule: Rule = "global",
        position: Shaped[Tensor, "b n ..."] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        encode: Callable[[Tensor], Tensor] | None = None,
    ) -> Selection:
        """Keep the m most salient patches of each image, without gradients and in evaluation mode.

        Args:
            patches: (b n ...) in memory; on any device.
            m: patches to keep; all where an image has fewer.
            chunk: patches to encode at once, and I of the rule "streaming". For features on a GPU use tens of
                thousands, since launching the work takes longer than the work.
            rule: "global" (independent of order and chunk) or "streaming" (as published).
            position: as in `forward`; default 0 ... n-1 for a `PositionCode` that takes indices.
            mask: True where there is a patch, for bags of different size.
            encode: loose patches, uint8 as they are read (k h w c), -> embeddings (k d); default `self.encode`.

        Returns:
            Selection with `index` (b min(m,n)) best first and, under "global", `logits` (b n h t).

        Raises:
            ValueError: patches, positions or a mask of another shape; `m` or `chunk` below 1; on a CPU, without
                `encode`, scores that are NaN or infinite; a GPU would have to be waited for.

        Example:
            >>> from keyhole.nn import CrossAttentionPool, IPSClassifier, SmallEncoder
            >>> encoder = SmallEncoder(channels=3, width=8)
            >>> pool = CrossAttentionPool(encoder.dim, heads=2)
            >>> model = IPSClassifier(encoder, pool, {"tumor": nn.Linear(encoder.dim, 2)})
            >>> patches = torch.rand(1, 50, 3, 32, 32)  # 50 patches of one image
            >>> selection = model.select(patches, m=4, chunk=16)
            >>> selection.index.shape
            torch.Size([1, 4])
            >>> model(patches[:, selection.index[0]])["tumor"].shape
            torch.Size([1, 2])
        """
        _check_bags(patches, position, mask, self.encoder)
        b, n = patches.shape[:2]
        if position is None and isinstance(self.position, PositionCode) and not self.position.takes_centers:
            position = torch.arange(n, device=patches.device).expand(b, n)
        loose, where = _loose(patches, mask), None if position is None else _loose(position, mask)
        if loose.dtype == torch.uint8 and loose.ndim == 4:
            loose = loose.permute(0, 2, 3, 1)
        watched = encode is None and loose.device.type == "cpu"
        undefined: list[Tensor] = []
        if encode is None:
            pixels = loose.dtype == torch.uint8 and loose.ndim == 4
            encode = self.encode if not pixels else lambda pixels: self.encode(AsRead(pixels))
        with evaluating(self), tf32(False):
            query = self.pool.folded_query()

            def score(rows: slice) -> Tensor:
                logits = self.logits(encode(loose[rows]), None if where is None else where[rows], query)
                if watched:
                    undefined.append(~logits.isfinite().all())
                return logits

            selection = select_bags(score, (b, n), mask, m, chunk, rule)
        if undefined and torch.stack(undefined).any():
            raise ValueError("the scores of some patches are NaN or infinite, as some of their values, or weights, are")
        return selection

    def train(self, mode: bool = True) -> "IPSClassifier":
        """Set training mode, except for parts whose parameters are all frozen: batch norm would go on learning there.

        Returns:
            The classifier itself.
        """
        super().train(mode)
        frozen = mode and not all(parameter.requires_grad for parameter in self.parameters())
        for part in self.modules() if frozen else ():
            learns = [parameter.requires_grad for parameter in part.parameters()]
            if learns and not any(learns):
                part.eval()
        return self
