#!/usr/bin/env bash
# Checks and measures FP8 on this machine's GPU, in under 10 minutes and without a network:
#   bash benchmarks/gpu.sh OUT
# Runs the tests marked gpu and the benchmarks of whole updates, environments, training, linear layers and ensembles, and
# leaves under OUT: log.txt (all that was printed), junit.xml and each benchmark's records and pictures. Exits with 1 if
# a test or a benchmark failed (the records are there nevertheless), with 2 where there is no CUDA device.
# Environment: PYTHON (default python3); WIDE, ENVS, TRAIN, LINEAR, ENSEMBLE: more options for each; MAX_SECONDS (570);
# DEVICE=cpu tries this script where there is no GPU: the tests skip themselves, and FP8 is emulated.
set -euo pipefail

if [ $# -ne 1 ]; then
  echo "usage: bash benchmarks/gpu.sh OUT" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
max_seconds=${MAX_SECONDS:-570}
# The package need not be installed; where it is, this checkout is the one that is measured.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 TQDM_MININTERVAL=20

if [ "$device" = cuda ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: $python sees no CUDA device; this script measures one (DEVICE=cpu tries the script itself)" >&2
  exit 2
fi

failed=()
# run NAME SECONDS COMMAND...: shows and logs what a command prints, and goes on if it fails.
run() {
  local name=$1 seconds=$2 status=0
  shift 2
  printf '\n=== %s (at most %d s) ===\n' "$name" "$seconds" | tee -a "$out/log.txt"
  timeout "$seconds" "$@" 2>&1 | tee -a "$out/log.txt" || status=${PIPESTATUS[0]}
  if [ "$status" -ne 0 ]; then
    failed+=("$name (exit code $status)")
  fi
}
minutes() { awk -v seconds="$1" 'BEGIN { print (seconds > 6 ? seconds : 6) / 60 }'; }

: > "$out/log.txt"
run versions 60 "$python" -c 'import json
from fp8rl_torchrl.training.run_folder import made_with
print(json.dumps(made_with(), indent=1))'
if command -v nvidia-smi > /dev/null; then
  run nvidia-smi 30 nvidia-smi
fi
run capability 60 "$python" -m fp8rl_torchrl.precision

ignored=()
if ! "$python" -c 'import stable_baselines3' 2> /dev/null; then
  # The one module that cannot be imported without it; it holds no test for a GPU.
  ignored=(--ignore=tests/envs/test_gymnasium_env.py)
  echo "stable-baselines3 is not installed: tests/envs/test_gymnasium_env.py is left out" | tee -a "$out/log.txt"
fi
# Without the project's addopts: they ask for pytest-xdist, which may be absent, and two processes would share the GPU.
run tests 210 "$python" -m pytest -m gpu -o addopts="" -p no:cacheprovider --strict-markers --import-mode=importlib \
  -ra --durations=5 --continue-on-collection-errors --junitxml="$out/junit.xml" "${ignored[@]}" tests

# Whole updates, environments and training, each with a share of the time of its own.
# shellcheck disable=SC2086
run wide_update 120 "$python" benchmarks/wide_update.py --device "$device" --out "$out/wide_update" ${WIDE:-}
# shellcheck disable=SC2086
run env_throughput 60 "$python" benchmarks/env_throughput.py --device "$device" --out "$out/env_throughput" \
  ${ENVS:---num-envs 65536 1048576}
# shellcheck disable=SC2086
run train_throughput 90 "$python" benchmarks/train_throughput.py --device "$device" --minutes 1 \
  --out "$out/train_throughput" ${TRAIN:---num-envs 65536 --widths 64 --precisions fp32 bf16}

# What is left, but for the ensembles (60 s) and for a last shape that is begun just in time (45 s).
left=$((max_seconds - SECONDS - 60))
# shellcheck disable=SC2086 # options are words
run linear "$((left > 60 ? left : 60))" "$python" benchmarks/linear.py --device "$device" --out "$out/linear" \
  --minutes "$(minutes $((left - 45)))" ${LINEAR:-}
left=$((max_seconds - SECONDS))
# shellcheck disable=SC2086
run ensemble "$((left > 60 ? left : 60))" "$python" benchmarks/ensemble.py --device "$device" --out "$out/ensemble" \
  --minutes "$(minutes $((left - 20)))" ${ENSEMBLE:-}

printf '\n%d s; in %s:\n' "$SECONDS" "$out" | tee -a "$out/log.txt"
ls -l "$out" | tee -a "$out/log.txt"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" | tee -a "$out/log.txt"
  exit 1
fi
echo "all passed" | tee -a "$out/log.txt"
