"""The two mixes of text lengths that every benchmark uses, and texts of exactly those lengths.

Lengths are tokens, special tokens included, drawn log-normally with sigma 0.8, clipped to 4..512, seed 0. 70 and
300 are the means before clipping.
"""

import numpy as np

SIGMA, SHORTEST, LONGEST = 0.8, 4, 512
MEANS = {"real": 70, "document": 300}


def lengths(mix: str, count: int, seed: int = 0) -> np.ndarray:
    """`count` lengths in tokens, int64, of the "real" or the "document" mix."""
    from leafkern.errors import unknown_name

    if mix not in MEANS:
        raise unknown_name("mix", mix, MEANS)
    # The mean of a log-normal is exp(mu + sigma²/2).
    mu = np.log(MEANS[mix]) - SIGMA**2 / 2
    drawn = np.random.default_rng(seed).lognormal(mu, SIGMA, count)
    return np.clip(np.rint(drawn), SHORTEST, LONGEST).astype(np.int64)


def texts(token_counts: np.ndarray, vocabulary: list[str], special: int = 2, seed: int = 0) -> list[str]:
    """One text per entry of `token_counts`, of whole words that are one token each (`special` tokens are added)."""
    words = np.array(sorted(word for word in vocabulary if word.isascii() and word.isalpha() and word.islower()))
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(words, max(0, int(count) - special))) for count in token_counts]
