"""leafkern's losses in sentence-transformers' SentenceTransformerTrainer."""

from collections.abc import Iterable

import torch
from torch import nn

from leafkern.errors import InputError
from leafkern.nn.losses import (
    AlignmentLoss,
    DistillLoss,
    InfoNCELoss,
    RelativeSimilarityLoss,
    SimilarityLoss,
    SoftLabelLoss,
)


class TrainerLoss(nn.Module):
    """A loss of `leafkern.nn.losses` as SentenceTransformerTrainer calls it: with text columns and labels.

    | loss | text columns | label column |
    |---|---|---|
    | AlignmentLoss, SimilarityLoss, RelativeSimilarityLoss, DistillLoss | text | teacher vector (D,) |
    | InfoNCELoss | query, positive, any number of negatives | none |
    | SoftLabelLoss | query, C candidates | teacher scores (C,) |

    Several teachers: give n(concat_k sqrt(w_k) n(t_k)) as the label; it is the target that the losses form themselves.
    On several GPUs set gather="ranks" on the loss. Of DistillLoss the total is trained.

        model = SentenceTransformer("nreimers/MiniLM-L6-H384-uncased")
        loss = TrainerLoss(model, DistillLoss(dims=[384, 128]))
        SentenceTransformerTrainer(model=model, train_dataset=dataset, loss=loss).train()
    """

    def __init__(self, model: nn.Module, loss: nn.Module):
        super().__init__()
        known = (AlignmentLoss, SimilarityLoss, RelativeSimilarityLoss, DistillLoss, InfoNCELoss, SoftLabelLoss)
        if not isinstance(loss, known):
            names = ", ".join(kind.__name__ for kind in known)
            raise InputError(f"loss: {type(loss).__name__}; expected one of leafkern.nn.losses: {names}")
        self.model = model
        self.loss = loss

    def forward(self, sentence_features: Iterable[dict], labels: torch.Tensor | None = None) -> torch.Tensor:
        columns = [self.model(features)["sentence_embedding"] for features in sentence_features]
        name = type(self.loss).__name__
        if isinstance(self.loss, InfoNCELoss):
            if len(columns) < 2:
                raise InputError(f"{name}: {len(columns)} text column; expected query, positive and any negatives")
            return self.loss(columns[0], columns[1], torch.stack(columns[2:], dim=1) if len(columns) > 2 else None)
        if labels is None:
            raise InputError(f"{name}: the dataset has no label column; expected teacher vectors or scores there")
        if isinstance(self.loss, SoftLabelLoss):
            if len(columns) < 2:
                raise InputError(f"{name}: {len(columns)} text column; expected query and candidates")
            return self.loss(columns[0], torch.stack(columns[1:], dim=1), labels)
        if len(columns) != 1:
            raise InputError(f"{name}: {len(columns)} text columns; expected one, and teacher vectors as labels")
        found = self.loss(columns[0], labels)
        return found.total if isinstance(self.loss, DistillLoss) else found

    def get_config_dict(self) -> dict[str, object]:
        """What the model card says of the loss."""
        mixing = {"mixing": self.loss.mixing} if isinstance(self.loss, InfoNCELoss) else {}
        return {"loss": type(self.loss).__name__, **self.loss.options, **mixing}
