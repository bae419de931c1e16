#!/usr/bin/env bash
# Proves and measures the kernels on a CUDA machine: bench/gpu.sh OUTDIR [--stage NAME ...] [--wheels DIR] [--dry-run]
# The options are explained by bench/gpu.sh --help; what is measured and what is expected in bench/NOTES.md.
set -euo pipefail
exec "${PYTHON:-python3}" -P "$(dirname "$(realpath "$0")")/gpu/launch.py" "$@"
