"""leafkern in sentence-transformers: its losses in the trainer, its attention without padding in one model."""

import functools
import warnings
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from leafkern.errors import InputError
from leafkern.integrations.patch import Patch, equal_states, evaluating, set_attention
from leafkern.nn.losses import (
    AlignmentLoss,
    DistillLoss,
    InfoNCELoss,
    RelativeSimilarityLoss,
    SimilarityLoss,
    SoftLabelLoss,
)
from leafkern.ops import mean_pool


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


def enable(model: nn.Module) -> Patch:
    """Attention by leafkern, and texts without padding, in one SentenceTransformer.

    The attention of its first module becomes "leafkern" (`leafkern.integrations.transformers`). Texts then reach the
    model as one row of all their tokens, (1, T) with cu_seq_lens_q, in `encode` and in the trainer: the way that
    sentence-transformers takes for flash attention. Mean pooling of that row is leafkern's: summed in float32, in a
    fixed order. Vectors stay the same within rounding, as do prompts, order and everything saved.

    Returns what was replaced; its `undo()` restores the model. Whether a model takes unpadded input is tried on three
    words. Where it doesn't, or sentence-transformers is older than 5.4 or was told unpad_inputs=False, input stays
    padded, `replaced` says so, and a warning why. Training needs an attention dropout of 0. `encode` with
    output_value="token_embeddings" needs padding and fails without it, as with flash attention. Raises InputError for
    another kind of model, one that is enabled already, and one whose attention transformers can't exchange.

        model = SentenceTransformer("nreimers/MiniLM-L6-H384-uncased")
        with enable(model):
            vectors = model.encode(texts)
    """
    from sentence_transformers import SentenceTransformer

    if not isinstance(model, SentenceTransformer):
        raise InputError(f"model: {type(model).__name__}; expected a SentenceTransformer")
    transformer = next(iter(model), None)
    inner = getattr(transformer, "auto_model", None)
    if not isinstance(inner, PreTrainedModel):
        raise InputError(f"model: its first module is {type(transformer).__name__}; expected a transformers model")
    done = Patch(model)
    try:
        set_attention(done, inner)
        refused = _unsuited(transformer) or _flatten(done, transformer)
    except Exception:
        done.undo()
        raise
    if refused is not None:
        done.replaced.append("0: input stays padded")
        warnings.warn(f"leafkern: input stays padded: {refused}", stacklevel=2)
        return done
    for path, module in model.named_children():
        if type(module).__name__ == "Pooling" and module.pooling_mode == "mean":
            forward = functools.partial(_mean_pooled, module)
            done.set(module, "forward", forward, f"{path}: mean pooling of unpadded input by mean_pool")
    return done


# What attention and pooling of unpadded input need beside the tokens.
_BOUNDS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


def _unsuited(transformer: nn.Module) -> str | None:
    """Why this module can't be given unpadded input, if that is known beforehand."""
    if not hasattr(transformer, "can_flatten_inputs"):
        return "an older sentence-transformers than 5.4, which can't leave it out"
    if transformer.unpad_inputs is False:
        return "unpad_inputs is False"
    ways = transformer.modality_config
    if "text" not in ways or any(way["method"] != "forward" for way in ways.values()):
        return "a model of more than text"
    if transformer.module_output_name != "token_embeddings":
        return f"a model that gives {transformer.module_output_name}"
    return None


def _flatten(done: Patch, transformer: nn.Module) -> str | None:
    """Sets the module up for unpadded input; back, with the reason, if the model gives other states for it."""
    from transformers import DataCollatorWithFlattening

    with evaluating(transformer):
        padded = _states(transformer)
    expected = padded["token_embeddings"][padded["attention_mask"].bool()]
    collator = DataCollatorWithFlattening(return_position_ids=True, return_flash_attn_kwargs=True, return_seq_idx=True)
    done.set(transformer, "data_collator", collator)
    taken = transformer.model_forward_params
    done.set(transformer, "model_forward_params", None if taken is None else taken | _BOUNDS)
    if hasattr(transformer, "_infer_flatten_position_offset"):
        done.set(transformer, "_flatten_position_offset", transformer._infer_flatten_position_offset())
    done.set(transformer, "can_flatten_inputs", True, "0: padded input by unpadded")
    try:
        with evaluating(transformer):
            found = _states(transformer)["token_embeddings"][0]
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = f"which does not take it otherwise: {error}"
    else:
        if equal_states(found, expected):
            return None
        reason = "whose states are others without it"
    transformer.can_flatten_inputs = False
    done.replaced.pop()
    return f"{type(transformer.auto_model).__name__}, {reason}"


def _states(transformer: nn.Module) -> dict:
    """What the module makes of two short texts."""
    device = transformer.auto_model.device
    features = transformer.preprocess(["a", "b c"])
    return transformer({key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in features.items()})


def _mean_pooled(pooling: nn.Module, features: dict, **options) -> dict:
    if "cu_seq_lens_q" not in features or ("prompt_length" in features and not pooling.include_prompt):
        return type(pooling).forward(pooling, features, **options)
    states = features["token_embeddings"][0]
    features["sentence_embedding"] = mean_pool(states, features["cu_seq_lens_q"]).to(states.dtype)
    return features
