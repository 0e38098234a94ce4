#!/usr/bin/env bash
# Builds leafkern on a GPU machine without network, runs the GPU tests and benchmarks, and leaves one JSON per stage.
#
#   bench/gpu.sh OUTDIR [STAGE...]   stages: tests native sanitizer search search-k100 encoder pooling norm norm-backward
#                                     relative distill contrastive attention attention-backward attention-tuned
#                                     (default: all, over an hour)
#
# The machine brings torch, triton, transformers, sentence-transformers, pytest, setuptools, pybind11 and a compiler;
# what it lacks comes from .gpu_kit (bench/gpu_kit.sh). Every stage is stopped after STAGE_SECONDS (default 480).
# Nothing is installed but into a scratch folder. Without a GPU it builds, collects every stage's tests and launches none.
# bench/stage.py unpack OUTDIR bench/results   turns the stages' figures into result files.
set -u

stages_known="tests native sanitizer search search-k100 encoder pooling norm norm-backward"
stages_known+=" relative distill contrastive attention attention-backward attention-tuned"
if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
    sed -n '2,7p' "$0" | cut -c3- >&2
    exit 2
fi
mkdir -p "$1" || exit 1
out=$(cd "$1" && pwd)
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ $# -gt 0 ] || set -- $stages_known
for stage in "$@"; do
    case " $stages_known " in
        *" $stage "*) ;;
        *)
            echo "gpu.sh: unknown stage '$stage' (known: $stages_known)" >&2
            exit 2
            ;;
    esac
done

python=${PYTHON:-python3}
limit=${STAGE_SECONDS:-480}
kit=$root/.gpu_kit
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
site=$scratch/site
mkdir -p "$site" "$scratch/results"
# Old stages must not pass for this run's.
rm -f "$out"/build.json $(printf "$out/%s.json " $stages_known)

export PYTHONPATH=$site:$kit/packages${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
LEAFKERN_COMMIT=$(git -C "$root" rev-parse HEAD 2>/dev/null || cat "$kit/commit" 2>/dev/null)
export LEAFKERN_COMMIT
[ -n "${LEAFKERN_DATA:-}" ] || [ ! -d "$kit/data" ] || export LEAFKERN_DATA=$kit/data
# Away from the checkout: its leafkern/ has no compiled extension and must not be imported.
cd "$scratch" || exit 1

gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else "")')
walk=()
collect=()
if [ -z "$gpu" ]; then
    walk=(--walk "no GPU")
    collect=(--collect-only)
fi
echo "GPU: ${gpu:-none}; stages: $*; kit: $([ -d "$kit" ] && echo present || echo absent)"

build() {
    local wheels=("$kit"/wheels/*.whl) install=("$python" -m pip install --quiet --no-index --no-deps)
    install+=(--no-compile --disable-pip-version-check --target "$site")
    rm -rf "$root"/build/lib*
    # The kit's wheels are for one version of Python: only where what they carry is really missing.
    if [ -e "${wheels[0]}" ] && ! "$python" -c 'import pydantic' 2>/dev/null; then
        "${install[@]}" "${wheels[@]}" || return 1
    fi
    "${install[@]}" --no-build-isolation "$root" || return 1
    "$python" -c 'import leafkern, leafkern.bench; print(leafkern.__file__)'
}
export -f build
export python kit site root

pytest=("$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -o addopts= -p no:cacheprovider -q)
# Only the files that hold GPU tests: others may import packages that such a machine lacks.
mapfile -t gpu_tests < <(grep -rl --include='test_*.py' 'mark\.gpu' "$root/tests")
# The tests of the compiled CPU kernels: that machine's processor may have instructions that this one lacks.
mapfile -t native_tests < <(grep -rl --include='test_*.py' '_core.native import library' "$root/tests/ops")
# Over a thousand kernels are compiled, one after the other in a process.
side_by_side=()
if "$python" -c 'import xdist' 2>/dev/null; then side_by_side=(-n 8 --dist worksteal); fi
kernel_tests=("$root"/tests/gpu/test_{pooling,attention,norm,relative,distill,contrastive,retrieval}_gpu.py)
no_sanitizer() { # why compute-sanitizer can't run here; nothing when it can
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not installed"
    elif [ -n "$gpu" ] && compute-sanitizer "$python" -c 'import torch; torch.zeros(1, device="cuda")' 2>&1 |
        grep -q "Device not supported"; then
        echo "compute-sanitizer: device not supported"
    fi
}
# Every allocation its own, so that no overrun stays inside a pool.
sanitizer() { # the kernels' small tests of the last dtype, bfloat16, under both tools: all would take half an hour
    local tool
    for tool in memcheck racecheck; do
        echo "compute-sanitizer --tool $tool"
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 "$@" || return
    done
}
export -f sanitizer
bench() { # a benchmark of the installed package on the GPU, for a stage; of its cases those that -k selects
    command=("${pytest[@]}" "$site/leafkern/bench/bench_$1.py" --peers --results "$scratch/results/$2")
    [ -z "$gpu" ] || command+=(-k "cuda${3:+ and $3}")
}
plan() { # the command of one stage: one line each
    case $1 in
        tests)
            command=(env OMP_NUM_THREADS=2 "${pytest[@]}" ${side_by_side[@]+"${side_by_side[@]}"})
            command+=("${gpu_tests[@]}" -m gpu -rs)
            ;;
        native) command=("${pytest[@]}" "${native_tests[@]}" -m "not slow and not gpu" -rs) ;;
        sanitizer)
            command=("${pytest[@]}" "${kernel_tests[@]}" -m gpu -k "small and (dtype2 or relative_gpu or (retrieval_gpu and 33 and (float or 129)))" -x -s)
            [ -z "$gpu" ] || command=(bash -c 'sanitizer "$@"' sanitizer "${command[@]}")
            ;;
        search) bench search "$1" "not k100" ;;
        search-k100) bench search "$1" k100 ;;
        encoder | pooling | relative | distill | contrastive) bench "$1" "$1" ;;
        norm | attention) bench "$1" "$1" "not backward" ;;
        *-backward) bench "${1%-backward}" "$1" backward ;;
        attention-tuned)
            bench attention "$1" "real and B32 and (MiniLM or BERT)"
            command=(env LEAFKERN_AUTOTUNE=1 "${command[@]}")
            ;;
    esac
}

stage() { "$python" "$root/bench/stage.py" "$@"; }

failed=0
stage run "$out" build "$limit" -- bash -c build || failed=1
for name in "$@"; do
    if [ $failed = 1 ] && [ ! -d "$site/leafkern" ]; then
        stage skip "$out" "$name" "the build failed"
        continue
    fi
    if [ "$name" = sanitizer ] && reason=$(no_sanitizer) && [ -n "$reason" ]; then
        stage skip "$out" "$name" "$reason"
        continue
    fi
    plan "$name"
    mkdir -p "$scratch/results/$name"
    stage run "$out" "$name" "$limit" --results "$scratch/results/$name" ${walk[@]+"${walk[@]}"} -- \
        "${command[@]}" ${collect[@]+"${collect[@]}"} || failed=1
done
echo
stage table "$out"
exit $failed
