"""`python -m leafkern.train recipe.yaml`: the same as `leafkern train recipe.yaml`."""

import sys

from leafkern.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["train"]
    main()
