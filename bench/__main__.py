"""`python -m leafkern.bench`: `leafkern bench` with the model and the folder of results to choose too."""

import argparse
import sys

from leafkern.errors import InputError

from . import SIZES, main, operations

parser = argparse.ArgumentParser(prog="python -m leafkern.bench", description="Benchmarks beside peers and limits.")
parser.add_argument("ops", nargs="*", metavar="OP", help=f"{', '.join(operations())} (default: all)")
parser.add_argument("--peers", action="store_true", help="time other libraries in the same rounds")
parser.add_argument("--report", help="HTML page of what was measured")
parser.add_argument("--size", choices=SIZES, default="full", help="how big the inputs are")
parser.add_argument("--model", help="sentence-transformers folder for the encoder benchmark")
parser.add_argument("--results", help="folder for the JSON")

if __name__ == "__main__":
    given = parser.parse_args()
    try:
        status = main(given.ops, given.peers, given.report, size=given.size, model=given.model, results=given.results)
    except InputError as error:
        parser.error(str(error))
    sys.exit(status)
