"""The losses as modules: options at construction, tensors at the call. Every option is that of the function of
`leafkern.ops` that the module names, and is checked there."""

from collections.abc import Sequence

import torch
from torch import nn

from leafkern import ops


class _Loss(nn.Module):
    """Keeps the options of one function of `leafkern.ops`."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class AlignmentLoss(_Loss):
    """`leafkern.ops.alignment_loss`: distance between a student's vectors and its teacher's (LEAF).

    Call with student (B, D_s), teacher (B, D_t) and, unless the widths are equal, the weight (D_t, D_s) of a Dense head
    that belongs to the student; returns a scalar.
    """

    def __init__(self, *, kind: str = "l2sq", normalize: bool = False, gather: str = "none"):
        super().__init__(kind=kind, normalize=normalize, gather=gather)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        return ops.alignment_loss(student, teacher, weight=weight, **self.options)


class SimilarityLoss(_Loss):
    """`leafkern.ops.similarity_loss`: squared differences of all pairwise cosines (Jasper, Stella).

    Call with student (B, D_s) and teacher (B, D_t), or a list of teachers; returns a scalar.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] | None = None,
        teacher_weights: Sequence[float] | None = None,
        gather: str = "none",
    ):
        super().__init__(dims=dims, teacher_weights=teacher_weights, gather=gather)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        return ops.similarity_loss(student, teacher, **self.options)


class RelativeSimilarityLoss(_Loss):
    """`leafkern.ops.relative_similarity_loss`: pairs ordered as the teacher orders them, by a margin (Jasper, Stella).

    Call with student (B, D_s) and teacher (B, D_t), or a list of teachers; returns a scalar.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] | None = None,
        margin: float = 0.015,
        ties: str = "skip",
        min_gap: float = 0.0,
        teacher_weights: Sequence[float] | None = None,
        gather: str = "none",
    ):
        super().__init__(
            dims=dims, margin=margin, ties=ties, min_gap=min_gap, teacher_weights=teacher_weights, gather=gather
        )

    def forward(self, student: torch.Tensor, teacher: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        return ops.relative_similarity_loss(student, teacher, **self.options)


class DistillLoss(_Loss):
    """`leafkern.ops.distill_loss`: the three losses of Jasper and Stella over all Matryoshka widths.

    Call with student (B, D_s) and teacher (B, D_t), or a list of teachers; returns
    DistillTerms(total, cosine, similarity, relative), of which only `total` has a gradient.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] | None = None,
        weights: Sequence[float] = (10.0, 200.0, 20.0),
        margin: float = 0.015,
        ties: str = "skip",
        min_gap: float = 0.0,
        teacher_weights: Sequence[float] | None = None,
        gather: str = "none",
    ):
        super().__init__(
            dims=dims,
            weights=weights,
            margin=margin,
            ties=ties,
            min_gap=min_gap,
            teacher_weights=teacher_weights,
            gather=gather,
        )

    def forward(self, student: torch.Tensor, teacher: torch.Tensor | Sequence[torch.Tensor]) -> ops.DistillTerms:
        return ops.distill_loss(student, teacher, **self.options)


class InfoNCELoss(_Loss):
    """`leafkern.ops.info_nce`, with `leafkern.ops.mix_negatives` before it where asked for (KaLM-Embedding-V2).

    listwise, pairwise: mixed negatives to draw per query from its own negatives (pairwise None: as many as it has
    negatives); 0 and 0, the default, draw none. mix_temperature: of the list-wise weights. Call with queries (B, D),
    positives (B, D), negatives (B, M, D) or None, and the optional `mixed` and `ids` of the function; returns a scalar.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.01,
        gamma: float = 0.0,
        detach_focal: bool = True,
        fn_margin: float | None = None,
        dims: Sequence[int] | None = None,
        dim_weights: Sequence[float] | None = None,
        listwise: int = 0,
        pairwise: int | None = 0,
        mix_temperature: float = 0.05,
        gather: str = "none",
    ):
        super().__init__(
            temperature=temperature,
            gamma=gamma,
            detach_focal=detach_focal,
            fn_margin=fn_margin,
            dims=dims,
            dim_weights=dim_weights,
            gather=gather,
        )
        self.mixing = {"listwise": listwise, "pairwise": pairwise, "temperature": mix_temperature}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mixing={self.mixing}"

    def forward(
        self,
        queries: torch.Tensor,
        positives: torch.Tensor,
        negatives: torch.Tensor | None = None,
        *,
        mixed: torch.Tensor | None = None,
        ids: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        if mixed is None and negatives is not None and (self.mixing["listwise"] or self.mixing["pairwise"] != 0):
            mixed = ops.mix_negatives(queries, negatives, **self.mixing)
        return ops.info_nce(queries, positives, negatives, mixed=mixed, ids=ids, **self.options)


class SoftLabelLoss(_Loss):
    """`leafkern.ops.soft_label_loss`: the teacher's scores of candidates as soft labels (KaLM-V2.5, LG-ANNA).

    Call with queries (B, D), candidates (B, C, D) or (N, D), and teacher_scores (B, C) or (B, N); returns a scalar.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.05,
        teacher_temperature: float | None = None,
        dims: Sequence[int] | None = None,
        dim_weights: Sequence[float] | None = None,
        gather: str = "none",
    ):
        super().__init__(
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            dims=dims,
            dim_weights=dim_weights,
            gather=gather,
        )

    def forward(self, queries: torch.Tensor, candidates: torch.Tensor, teacher_scores: torch.Tensor) -> torch.Tensor:
        return ops.soft_label_loss(queries, candidates, teacher_scores, **self.options)
