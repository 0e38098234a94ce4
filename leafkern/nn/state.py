"""Whether tensors are what they were: for what is derived from weights and kept."""

from collections.abc import Iterable

import torch


class State:
    """The state of some tensors at one moment; equal states mean that no tensor was written to or replaced since.

    It keeps the memory of the tensors alive, so that an address can't come back as another tensor's.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]):
        self._kept = [x.detach() for x in tensors]
        # Tensors made in inference mode count no versions.
        self._key = [(x.data_ptr(), x.dtype, 0 if x.is_inference() else x._version) for x in self._kept]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, State) and self._key == other._key

    __hash__ = None
