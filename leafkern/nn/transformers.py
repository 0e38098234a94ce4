"""Backbones of other families than BERT, through transformers' AutoModel."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from leafkern.errors import InputError
from leafkern.nn.packed import PackedBatch, Padding


class TransformersBackbone(nn.Module):
    """Any encoder or decoder that transformers' AutoModel opens: PackedBatch -> (T, width).

    The batch is padded on the right inside; the last hidden states are packed again.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        if model.config.is_encoder_decoder:
            raise InputError(
                f"model: {model.config.model_type!r} is an encoder-decoder; expected an encoder or a decoder alone"
            )
        self.model = model

    @classmethod
    def from_folder(cls, folder: Path, dtype: torch.dtype) -> "TransformersBackbone":
        from transformers import AutoModel

        options = {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True}
        try:
            with _without_bars():
                model, info = AutoModel.from_pretrained(str(folder), dtype=dtype, output_loading_info=True, **options)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"model: transformers can't open {folder}: {error}") from None
        missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)
        if missing:
            raise InputError(f"model: {folder} has no weights {missing[0]!r}; is its config.json of another model?")
        return cls(model)

    @property
    def width(self) -> int:
        return self.model.config.get_text_config().hidden_size

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""
        return self.model.get_input_embeddings().num_embeddings

    @property
    def max_length(self) -> int | None:
        """The longest sequence that has positions, where the config says so."""
        config = self.model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        # RoBERTa and its relatives start counting positions after the padding index.
        offset = config.pad_token_id + 1 if _counts_from_padding(self.model) else 0
        return None if positions is None or positions < 0 else positions - offset

    def description(self) -> dict:
        """What a fingerprint covers beside the weights."""
        config = self.model.config.to_dict()
        return {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        padding = Padding(batch)
        if padding.tokens == 0:
            return torch.zeros(0, self.width, device=batch.input_ids.device, dtype=self.model.dtype)
        mask = padding.mask
        fill = self.model.config.get_text_config().pad_token_id or 0
        ids = padding.pad(batch.input_ids).masked_fill(~mask, fill)
        more = {} if batch.token_type_ids is None else {"token_type_ids": padding.pad(batch.token_type_ids)}
        states = self.model(input_ids=ids, attention_mask=mask.long(), **more).last_hidden_state
        return padding.unpad(states)


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers draws its bars even where stderr is no terminal; its switch also turns the hub's."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    shown, hub_silent = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
            if hub_silent:
                disable_progress_bars()
        elif not hub_silent:
            enable_progress_bars()


def _counts_from_padding(model: nn.Module) -> bool:
    positions = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    return isinstance(positions, nn.Embedding) and positions.padding_idx is not None
