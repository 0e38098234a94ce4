"""What tests of the packed encoder share: a small one with large weights, batches, and a stand-in for capturing."""

import copy

import numpy as np
import torch
from torch import nn

from leafkern.nn import PackedConfig, PackedEncoder, SentenceModel, pack

VOCABULARY = 50


class Recorder:
    """In place of `capture`."""

    def __init__(self):
        self.count = self.replays = 0

    def __call__(self, call, pool=None):
        self.count += 1

        def replay():
            self.replays += 1
            return call()

        return replay


def small_model(**options):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = PackedConfig(**sizes, intermediate_size=40, max_position_embeddings=20)
    encoder = PackedEncoder(config).double()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return SentenceModel(encoder, **options).eval()


def batch_of(lengths):
    return pack([np.random.randint(1, VOCABULARY, length) for length in lengths])


def gradients(module):
    """The gradients of all parameters, under their names in state_dict."""
    holder = copy.deepcopy(module)
    with torch.no_grad():
        for mine, parameter in zip(holder.parameters(), module.parameters(), strict=True):
            mine.copy_(parameter.grad)
    return holder.state_dict()
