"""Fuzzes one target with atheris: python tests/fuzz/run_atheris.py TARGET FOLDER -runs=20000 (options of libFuzzer).

FOLDER: an empty one, for scratch files. An input that ends in anything but a refusal is printed and kept as crash-....
"""

import random
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["leafkern.index", "leafkern.files", "leafkern.textio", "leafkern.parquet", "json"]
):
    import mutate
    import targets


def main() -> None:
    name, folder, *options = sys.argv[1:]
    known = targets.Targets(Path(folder))
    if name not in known.targets:
        sys.exit(f"unknown target {name}; known: {', '.join(known.targets)}")
    corpus = Path(folder) / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(known.seeds[name])

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if chance.random() < 0.5:
            return atheris.Mutate(data, max_size)
        return mutate.mutated(data, chance)[:max_size]

    atheris.Setup(
        [sys.argv[0], *options, str(corpus)], lambda data: known.targets[name](data) and None, custom_mutator=mutator
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
