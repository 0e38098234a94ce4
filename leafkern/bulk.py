"""Whole files through an encoder, in blocks: to vectors in a file, or to what an index is built from."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from leafkern.console import Report, unseen
from leafkern.encode import Encoder
from leafkern.errors import InputError, unknown_name
from leafkern.evaluate import prompt_for
from leafkern.files import existing
from leafkern.index import Index, exchange
from leafkern.index.manifest import PRECISIONS, checked_rescore
from leafkern.index.segment import checksum
from leafkern.index.stream import Stream
from leafkern.index.vectors import Rows
from leafkern.ops import quantize
from leafkern.textio import (
    BLOCK_ROWS,
    VECTOR_FORMATS,
    Texts,
    iter_texts,
    read_texts,
    suffix,
    vector_writer,
)


def encode_file(
    open_encoder: Callable[[], Encoder],
    input: str | os.PathLike,
    output: str | os.PathLike,
    *,
    field: str = "text",
    dim: int | None = None,
    precision: str = "float32",
    prompt: str | None = None,
    progress: Report = unseen,
) -> tuple[int, int]:
    """Writes the vectors of the texts of `input` to `output`, atomically; their number and width.

    The file is read once before anything is encoded, so that a bad line shows at once. int8 and int4 take their ranges
    from the first block of 16,384 texts. open_encoder is called when everything else has been checked. prompt: a name;
    None is the encoder's default prompt, if any.
    """
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    kind = suffix(output)
    if kind in VECTOR_FORMATS and precision in ("int8", "int4") and kind != ".safetensors":
        raise InputError(f"{output}: {precision} codes need their scale and offset beside them; write .safetensors")
    if kind == ".parquet" and precision not in ("float32", "float16"):
        raise InputError(f"{output}: .parquet holds float vectors only; write .safetensors or .npy")
    done, ranges = 0, None
    with vector_writer(output, {"precision": precision}) as writer:
        piped = read_texts(input, field) if str(input) == "-" else None
        total = len(piped.texts) if piped else sum(len(block.texts) for block in iter_texts(input, field))
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


def encode_index(
    open_encoder: Callable[[], Encoder],
    input: str | os.PathLike,
    output: str | os.PathLike,
    *,
    field: str = "text",
    ids_field: str | None = None,
    dim: int | None = None,
    precision: str = "int8",
    rescore: str | None = "float16",
    prompt: str | None = None,
    texts: bool = True,
    progress: Report = unseen,
) -> Index:
    """Encodes the texts of `input` into an index at `output`, 16,384 at a time; killed and called again, it goes on.

    prompt: a name; None is the encoder's prompt for documents. dim: the first numbers of each vector (MRL). The ranges
    of int8 and int4 codes are those of the first block. What is in the index by a kill stays there; a call with another
    input, model, prompt or form of the index is refused, and the same one of a finished index encodes nothing.
    """
    checked_rescore(precision, rescore)
    if str(input) == "-":
        raise InputError("INPUT: an index is encoded from a file, for standard input can't be read again after a kill")
    read = _stamp(input)
    total = _checked_texts(input, field, ids_field)
    encoder = open_encoder()
    literal = encoder.prompt_text(prompt or prompt_for(encoder, "document"))
    origin = {"input": checksum(Path(input)), "total": total, "field": field, "ids_field": ids_field}
    origin |= {"encoder": encoder.fingerprint, "prompt": literal}
    stream = Stream(
        output,
        origin,
        width=encoder.encode([], prompt_text=literal, dim=dim).shape[1],
        precision=precision,
        rescore=checked_rescore(precision, rescore),
        encoder=encoder,
        prompt=literal,
        texts=texts,
    )
    for block in _from(iter_texts(input, field, ids_field, BLOCK_ROWS), stream.position):
        vectors = encoder.encode(
            block.texts,
            prompt_text=literal,
            dim=dim,
            progress=lambda rows, _, at=stream.position: progress("encoding", at + rows, total),
        )
        if _stamp(input) != read:
            raise InputError(
                f"{input}: was changed while it was encoded; with the file of before, the same command goes on at text "
                f"{stream.position}; else choose another folder"
            )
        stream.add(vectors, block.ids, block.texts if texts else None)
    return stream.finish(progress)


def _stamp(path: str | os.PathLike) -> tuple[int, int]:
    """What changes when a file does."""
    status = existing(path).stat()
    return status.st_size, status.st_mtime_ns


def _checked_texts(input: str | os.PathLike, field: str, ids_field: str | None) -> int:
    """How many texts a file holds; every line is read, and ids are compared, before anything is encoded."""
    total, ids = 0, []
    for block in iter_texts(input, field, ids_field):
        total += len(block.texts)
        ids.extend(block.ids or ())
    if ids_field is not None:
        exchange.checked_ids(input, ids_field, ids)
    return total


def _from(blocks: Iterator[Texts], position: int) -> Iterator[Texts]:
    """The blocks without the first `position` texts."""
    for block in blocks:
        if position < len(block.texts):
            yield Texts(None if block.ids is None else block.ids[position:], block.texts[position:])
        position = max(0, position - len(block.texts))


def documents(
    encoder: Encoder | None,
    input: str | os.PathLike,
    field: str = "text",
    ids_field: str | None = None,
    prompt: str | None = None,
    *,
    texts: bool = True,
    binary: bool = False,
    folder: str | os.PathLike | None = None,
    check: Callable[..., None] = lambda **expected: None,
    progress: Report = unseen,
) -> exchange.Source:
    """The documents of a file of vectors, or of texts that `encoder` is to encode.

    prompt: a name; None is the encoder's prompt for documents. texts, binary, folder: as in `exchange.read`. check:
    `Index.require`, called before encoding.
    """
    if str(input) != "-" and exchange.holds_vectors(input):
        if encoder is not None and suffix(input) != ".parquet":
            raise InputError(f"--model: {input} holds vectors already; leave the model out")
        if encoder is None:
            for option, given in {"--prompt": prompt is not None, "--field": field != "text"}.items():
                if given:
                    raise InputError(f"{option}: {input} holds vectors already; leave it out")
            return exchange.read(input, ids_field=ids_field, texts=texts, binary=binary, folder=folder)
    if encoder is None:
        raise InputError(f"--model: {input} holds texts; name the model that is to encode them")
    literal = encoder.prompt_text(prompt or prompt_for(encoder, "document"))
    check(encoder=encoder, prompt=literal, width=encoder.dim)
    ids, given = read_texts(input, field, ids_field)
    ids = None if ids is None else exchange.checked_ids(input, ids_field, ids)

    def vectors() -> Iterator[np.ndarray]:
        for start in range(0, len(given), BLOCK_ROWS):
            yield encoder.encode(
                given[start : start + BLOCK_ROWS],
                prompt_text=literal,
                progress=lambda rows, _, at=start: progress("encoding", at + rows, len(given)),
            )

    return exchange.Source(vectors(), ids, given if texts else None, encoder.dim, encoder, literal)
