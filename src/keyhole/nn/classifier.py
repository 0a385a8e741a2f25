"""The paper in one forward: kept patches -> logits per task, and the selection that keeps them.

Letters: b image, n patches, m kept, i chunk, t query, h head, d width, o outputs of a task.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from keyhole.nn.attention import CrossAttentionPool, check_mask
from keyhole.nn.fast import CompiledEncoder, FastEncoder, encoded
from keyhole.nn.heads import Heads
from keyhole.nn.lone import lone_patch
from keyhole.nn.pixels import AsRead, prepare
from keyhole.nn.position import CenterPosition
from keyhole.nn.selection import Rule, Selection, Selector, evaluating, keep_global, whole_bags
from keyhole.util.tf32 import tf32


def _loose(tensor: Shaped[Tensor, "b n ..."], mask: Bool[Tensor, "b n"] | None) -> Shaped[Tensor, "k ..."]:
    """One row a patch; without a mask no copy is made."""
    return tensor.flatten(0, 1) if mask is None else tensor[mask.to(tensor.device)]


def _check_bags(patches: Tensor, position: Tensor | None, mask: Tensor | None) -> None:
    """Raises ValueError for shapes that do not fit each other; the modules check what they take themselves."""
    if patches.ndim < 3:
        raise ValueError(
            f"patches must be (b n c h w), or features (b n f), not {tuple(patches.shape)}; one image is patches[None]"
        )
    check_mask(mask, patches)
    if position is not None and position.shape[:2] != patches.shape[:2]:
        wanted = tuple(patches.shape[:2])
        raise ValueError(f"`position` must begin with {wanted}, as the patches do, not {tuple(position.shape)}")


def _encoder_input(patches: Tensor | AsRead) -> tuple[Tensor, Tensor | None]:
    """Return what the encoder is given of patches, and the colour change that is left to it.

    On a CPU pixels become numbers before the encoder begins: colours are changed in float32 there, whatever the
    encoder's precision is, and results do not depend on what is fused.
    """
    if isinstance(patches, Tensor):
        return patches, None
    return (patches.values(), None) if patches.device.type == "cpu" else (patches.pixels, patches.color)


class IPSClassifier(nn.Module):
    """Iterative Patch Selection (Bergner et al., ICLR 2023): encoder, cross-attention pool, one head per task.

    Args:
        encoder: patches (k, ...) -> embeddings (k d); any module. uint8 patches are scaled to 0 ... 1 before it.
        pool: scores and pools the embeddings.
        heads: task -> module from (b d) to (b o) logits.
        position: positions (b n) or (b n 2) -> codes (b n d), or None.
        queries: task -> query of the pool; default one each, in the order of `heads`.
        precision: arithmetic of the encoder (autocast), which may be another one for looking, see `accelerate`;
            everything behind it is float32.

    Attributes:
        fast: what looks at patches without gradients in the encoder's place, see `accelerate`; None: the encoder.
        tf32: whether a GPU may round float32 to TF32 in `fast` and in `split_backward`, see `keyhole.util.tf32`; set it
            before `accelerate`. If it is off, neither these nor `select` round. In a training step of your own, the
            settings that you made in torch hold.

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
        self.heads = Heads(heads)
        self.queries = dict(queries) if queries is not None else {task: t for t, task in enumerate(heads)}
        self.precision = precision
        self.tf32 = False
        self.fast: FastEncoder | None = None
        self.learned: CompiledEncoder | None = None
        self._query: Callable[[], Tensor] | None = None
        self._steady = False
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

        Raises:
            ValueError: patches, positions or a mask of another shape.
        """
        _check_bags(patches, position, mask)
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
        loose = _loose(patches, mask)
        embedding = torch.cat([self.encode(part) for part in loose.split(chunk or max(1, len(loose)))])
        if mask is None:
            return embedding.unflatten(0, patches.shape[:2])
        return embedding.new_zeros(*mask.shape, embedding.shape[-1]).masked_scatter(mask[..., None], embedding)

    def accelerate(
        self,
        precision: torch.dtype | None = None,
        compile: bool = False,  # noqa: A002 - torch's word for it
    ) -> FastEncoder:
        """From now on a folded copy of the encoder looks at patches, see `FastEncoder`; a copy that fits is kept.

        Args:
            precision: its arithmetic; default is that of the last call, or else the model's.
            compile: `torch.compile` it, and the encoder where it learns.
        """
        if precision is None:
            precision = self.precision if self.fast is None else self.fast.precision
        fast, wanted = self.fast, (self.encoder, precision, self.tf32)
        if fast is None or (fast.encoder, fast.precision, fast.tf32) != wanted:
            fast = self.fast = FastEncoder(self.encoder, precision, tf32=self.tf32)
        fast.compiled = compile
        self.learned = CompiledEncoder(self.encoder) if compile else None
        return fast

    @property
    def compiled(self) -> bool:
        """Whether its encoder goes through `torch.compile`, see `accelerate`."""
        return self.fast is not None and self.fast.compiled

    def encode(self, patches: Shaped[Tensor, "k ..."] | AsRead) -> Float[Tensor, "k d"]:
        """The encoder over loose patches, in the model's precision; the result is float32.

        A single patch has no statistics of its own: see `lone_patch`.

        Args:
            patches: floats, or uint8 in the same order (k c h w); or as they were read.
        """
        if isinstance(patches, Tensor) and patches.dtype == torch.uint8:
            patches = patches.to(torch.float32) / 255
        alone = self.training and len(patches) == 1
        compiled = self.learned if self.training and not alone else None
        pixels, color = _encoder_input(patches)
        with (
            torch.autocast(pixels.device.type, self.precision, enabled=self.precision != torch.float32),
            lone_patch(self.encoder) if alone else nullcontext(),
        ):
            if compiled is not None:
                return compiled(pixels, color).float()
            return encoded(self.encoder, pixels, color, torch.float32).float()

    def look(
        self,
        pixels: Shaped[Tensor, "k ..."] | AsRead,
        color: Float[Tensor, "k c c+1"] | None = None,
        rows: int | None = None,
    ) -> Float[Tensor, "k d"]:
        """Embeddings of loose patches, for use without gradients and in evaluation mode; see `looking`.

        Args:
            pixels: uint8 as read from files (k h w c), floats as the encoder takes them (k c h w), or features (k f).
            color: affine colour change of each patch, for uint8 only; `AsRead` brings its own.
            rows: the most patches that are encoded at once, for which a compiled encoder is compiled; 0: too few for
                that, see `FastEncoder`.
        """
        if isinstance(pixels, AsRead):
            pixels, color = _encoder_input(pixels)
        if self.fast is not None:
            return self.fast(pixels, color, rows)
        return self.encode(prepare(pixels, color) if pixels.dtype == torch.uint8 else pixels)

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
        self,
        pixels: Shaped[Tensor, "k ..."],
        position: Shaped[Tensor, "k ..."] | None = None,
        color: Float[Tensor, "k c c+1"] | None = None,
    ) -> Float[Tensor, "k h t"]:
        """Attention logits of loose patches, given as to `look`; what the selection runs over every chunk."""
        return self.score_embedding(self.look(pixels, color), position)

    def score_embedding(
        self, embedding: Float[Tensor, "k d"], position: Shaped[Tensor, "k ..."] | None = None
    ) -> Float[Tensor, "k h t"]:
        """Attention logits of loose patches, from their embeddings."""
        query = None if self._query is None else self._query()
        placed = self.with_position(embedding[None], None if position is None else position[None])
        return self.pool.logits(placed, query)[0]

    def select(
        self,
        patches: Shaped[Tensor, "b n ..."],
        m: int,
        chunk: int,
        rule: Rule = "global",
        position: Shaped[Tensor, "b n ..."] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        at_once: int | None = None,
    ) -> Selection:
        """Keeps the m most salient patches of each image, without gradients and in evaluation mode.

        Args:
            patches: (b n ...) in memory; on any device.
            m: patches to keep; all where an image has fewer.
            chunk: I of the rule "streaming".
            rule: "global" (independent of order and chunk) or "streaming" (as published).
            position: as in `forward`; default 0 ... n-1 for the 1-D code.
            mask: True where there is a patch, for bags of different size.
            at_once: patches to encode at once; default `chunk`. Where the encoder is compiled it should stay the same.
                For features on a GPU give tens of thousands: the work on each is small, and launching it is not.

        Raises:
            ValueError: patches, positions or a mask of another shape; `m` or `chunk` below 1.

        Returns:
            Selection with `index` (b m) best first and, under "global", `logits` (b n h t).
        """
        _check_bags(patches, position, mask)
        if m < 1 or chunk < 1:
            raise ValueError(f"`m` (={m}) and `chunk` (={chunk}) must be at least 1")
        b, n = patches.shape[:2]
        if position is None and self.position is not None and not isinstance(self.position, CenterPosition):
            position = torch.arange(n, device=patches.device).expand(b, n)
        loose = _loose(patches, mask)
        where = None if position is None else _loose(position, mask)
        if loose.dtype == torch.uint8 and loose.ndim == 4:
            loose = loose.permute(0, 2, 3, 1)  # as if read from files
        goes = [slice(start, start + (at_once or chunk)) for start in range(0, len(loose), at_once or chunk)]
        scored = ((go, self.score(loose[go], None if where is None else where[go])) for go in goes)
        with self.looking():  # `scored` is lazy: all scoring happens inside
            if rule == "global":
                shape = (b, n, self.pool.heads, self.pool.queries)
                return keep_global(whole_bags([logits for _, logits in scored], mask, shape, loose.device), m, mask)
            on_host = torch.ones(b, n, dtype=torch.bool) if mask is None else mask.cpu()
            image, index = on_host.nonzero(as_tuple=True)
            selector = Selector([n] * b, m, chunk, rule)
            selector.skip((~on_host).nonzero(as_tuple=True)[0])
            for go, logits in scored:
                selector.add(image[go], index[go], logits)
        return self._collect(selector, b, n, m)

    def _collect(self, selector: Selector, b: int, n: int, m: int) -> Selection:
        kept = [selector.finish(image) for image in range(b)]
        index = torch.full((b, min(m, n)), -1, dtype=torch.long, device=self.pool.query.device)
        score = torch.zeros(index.shape, device=index.device)
        for row, image in enumerate(kept):
            index[row, : len(image.index)] = image.index
            score[row, : len(image.index)] = image.score
        return Selection(index, score, index >= 0)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Evaluation mode without gradients, and `fast` with the weights of now; afterwards all is as it was.

        Weights must not change inside: what follows from them alone is computed once.
        """
        outer = self._query
        with evaluating(self), tf32(False):
            if self.fast is not None:
                self.fast.refresh(changed_only=self._steady)
            self._query = cache(self.pool.folded_query)
            try:
                yield
            finally:
                self._query = outer

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Inside, `looking` takes over weights only where torch has counted a change of them since the last time.

        For many batches with one set of weights. Torch counts what is loaded or moved and most operations in place,
        but not what fused optimizers do, nor what is written through `.data`.
        """
        outer = self._steady
        try:
            self._steady = True
            yield
        finally:
            self._steady = outer

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
