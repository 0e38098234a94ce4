"""Inputs of the search tests."""

import ctypes
import mmap

import numpy as np
import pytest
import torch

from leafkern.ops._core.native import library

C = library()[0]
ISAS = C.instruction_sets() if C is not None else []
FORMS = [(8, 8), (4, 8), (1, 8), (1, 1)]  # bits of a code, of a query's


@pytest.fixture(autouse=True)
def restore_isa():
    before = C.isa() if C is not None else None
    yield
    if C is not None:
        C.select_isa(before)


def random_codes(n, dim, bits, *, signed=False, generator=None, narrow=False):
    if bits == 8:
        low, high = (-1, 2) if narrow else (-128, 128)
        return torch.randint(low, high, (n, dim), dtype=torch.int8, generator=generator)
    width = -(-dim * bits // 8)
    codes = torch.randint(0, 2 if narrow else 256, (n, width), dtype=torch.uint8, generator=generator)
    return codes.view(torch.int8) if signed and bits == 1 else codes


def random_queries(q, dim, query_bits, *, limit=63, generator=None):
    u = torch.randint(-limit, limit + 1, (q, dim), dtype=torch.int8, generator=generator)
    return torch.where(u > 0, 1, -1).to(torch.int8) if query_bits == 1 else u


def unit(n, dim, dtype=torch.float32):
    return torch.nn.functional.normalize(torch.randn(n, dim), dim=1).to(dtype)


def close_rows(dim, step):
    """(query, a, b): b scores above a by 0.175 step D / 2, yet below it with the query rounded to a type whose next
    number above 1 is 1 + step."""
    query = torch.ones(dim)
    query[0::4] += 0.55 * step
    query[1::2] += 0.45 * step
    a = torch.arange(dim) % 2 == 0
    return query, a.float(), (~a).float()


def before_a_guard(x):
    """A copy of `x` that ends where memory may not be read: one byte more is a crash (POSIX)."""
    size = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    guard = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = np.frombuffer(memory, x.numpy().dtype, x.numel(), size - x.nbytes).reshape(x.shape)
    copy[:] = x.numpy()
    return torch.from_numpy(copy)
