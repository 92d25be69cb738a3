#!/usr/bin/env bash
# Run every check that needs a CUDA device, within 8 minutes: bash benchmarks/gpu.sh [--check] [--json FILE] [NAME ...]
#
# PYTHON: the interpreter. WHEELS: a folder of wheels that its environment lacks, installed into a folder of their own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/plugins${PYTHONPATH:+:$PYTHONPATH}"
if [[ -n ${WHEELS:-} ]]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH="$PYTHONPATH:$site"
fi
"$python" benchmarks/gpu/run.py "$@"
