"""Whole files through an encoder, in blocks: to vectors in a file, or to what an index is built from."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from leafkern.encode import Encoder
from leafkern.errors import InputError, unknown_name
from leafkern.evaluate import prompt_for
from leafkern.index.manifest import PRECISIONS
from leafkern.index.vectors import Rows
from leafkern.ops import quantize
from leafkern.textio import (
    BLOCK_ROWS,
    VECTOR_FORMATS,
    is_vector_file,
    iter_texts,
    read_column,
    read_texts,
    read_vectors,
    suffix,
    vector_writer,
)

Progress = Callable[[str, int, int], None]


class Documents(NamedTuple):
    """What an index is built from. vectors: a matrix, or blocks still to be encoded; prompt: literal, None: unknown."""

    vectors: np.ndarray | Iterator[np.ndarray]
    ids: list[str | int] | None
    texts: list[str] | None
    encoder: Encoder | None
    prompt: str | None


def encode_file(
    open_encoder: Callable[[], Encoder],
    input: str | os.PathLike,
    output: str | os.PathLike,
    *,
    field: str = "text",
    dim: int | None = None,
    precision: str = "float32",
    prompt: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> tuple[int, int]:
    """Writes the vectors of the texts of `input` to `output`, atomically; their number and width.

    The file is read once before anything is encoded, so that a bad line shows at once. int8 and int4 take their ranges
    from the first block of 16,384 texts. open_encoder is called when everything else has been checked.
    """
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    kind = suffix(output)
    if kind in VECTOR_FORMATS and precision in ("int8", "int4") and kind != ".safetensors":
        raise InputError(f"{output}: {precision} codes need their scale and offset beside them; write .safetensors")
    if kind == ".parquet" and precision not in ("float32", "float16"):
        raise InputError(f"{output}: .parquet holds float vectors only; write .safetensors or .npy")
    piped = read_texts(input, field) if str(input) == "-" else None
    total = len(piped.texts) if piped else sum(len(block.texts) for block in iter_texts(input, field))
    done, ranges = 0, None
    with vector_writer(output, {"precision": precision}) as writer:
        encoder = open_encoder()
        blocks = [piped] if piped else iter_texts(input, field, rows=BLOCK_ROWS)
        for block in blocks:
            vectors = encoder.encode(
                block.texts,
                prompt=prompt,
                dim=dim,
                progress=lambda rows, _, at=done: progress("encoding", at + rows, total),
            )
            done += len(block.texts)
            if precision in ("int8", "int4") and ranges is None:
                with Rows(vectors, Path(output).parent, None) as rows:
                    ranges = rows.ranges(precision)
            codes = quantize(torch.from_numpy(vectors), precision, ranges=ranges)
            if codes.scale is not None:
                writer.extra = {"scale": codes.scale.numpy(), "offset": codes.offset.numpy()}
                writer.metadata["dim"] = str(codes.dim)
            writer.add(codes.codes.numpy(), block.texts)
    return done, vectors.shape[1]


def documents(
    encoder: Encoder | None,
    input: str | os.PathLike,
    field: str = "text",
    ids_field: str | None = None,
    prompt: str | None = None,
    *,
    check: Callable[..., None] = lambda **expected: None,
    progress: Progress = lambda what, done, total: None,
) -> Documents:
    """The documents of a file of vectors, or of texts that `encoder` is to encode.

    prompt: a name; None is the encoder's prompt for documents. check: `Index.require`, called before encoding.
    """
    if str(input) != "-" and is_vector_file(input):
        if encoder is not None and suffix(input) != ".parquet":
            raise InputError(f"--model: {input} holds vectors already; leave the model out")
        if encoder is None:
            if ids_field and suffix(input) != ".parquet":
                raise InputError(f"--ids-field: {input} has no fields; only .parquet keeps ids beside vectors")
            texts, vectors = read_vectors(input)
            return Documents(vectors, read_column(input, ids_field) if ids_field else None, texts, None, None)
    if encoder is None:
        raise InputError(f"--model: {input} holds texts; name the model that is to encode them")
    name = prompt or prompt_for(encoder, "document")
    literal = encoder.prompt_text(name)
    check(encoder=encoder, prompt=literal, width=encoder.dim)
    ids, texts = read_texts(input, field, ids_field)

    def vectors() -> Iterator[np.ndarray]:
        for start in range(0, len(texts), BLOCK_ROWS):
            yield encoder.encode(
                texts[start : start + BLOCK_ROWS],
                prompt_text=literal,
                progress=lambda rows, _, at=start: progress("encoding", at + rows, len(texts)),
            )

    return Documents(vectors(), ids, texts, encoder, literal)
