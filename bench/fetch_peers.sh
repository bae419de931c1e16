#!/usr/bin/env bash
# Wheels for a GPU machine without a network: bench/fetch_peers.sh DIR [--plots] [--cute]
# Run where pip works; then bench/gpu.sh OUTDIR --wheels DIR there. For Python 3.12 on Linux x86_64 with torch and
# triton present. About 8 MiB; --plots adds matplotlib with what it needs (22 MiB), --cute what QuACK needs
# (105 MiB more).
set -euo pipefail

directory=${1:?"usage: bench/fetch_peers.sh DIR [--plots] [--cute]"}
shift
# Peers, at the versions that bench/gpu/peers describes; torch and triton are left to the machine.
wheels=(trl==1.16.0 liger-kernel==0.8.5 cut-cross-entropy==25.1.1 verl==0.9.1 quack-kernels==0.6.5 packaging)
# The GPU tests, and the native extensions.
wheels+=(pytest iniconfig pluggy pygments hypothesis sortedcontainers "setuptools>=77" pybind11)
for option in "$@"; do
    case $option in
        --plots) wheels+=(matplotlib contourpy cycler fonttools kiwisolver pillow pyparsing python-dateutil six) ;;
        --cute) wheels+=(nvidia-cutlass-dsl==4.8.1 nvidia-cutlass-dsl-libs-{base,core,cu13}==4.8.1 cuda-bindings
                         cuda-pathfinder protobuf "apache-tvm-ffi<0.2" torch-c-dlpack-ext einops) ;;
        *) echo "unknown option $option" >&2; exit 2 ;;
    esac
done

platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
done
mkdir -p "$directory"
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --dest "$directory" "${wheels[@]}"
du -k "$directory"/*.whl | sort -n | awk '{ kib += $1; print $1 " KiB", $2 } END { printf "%.1f MiB in all\n", kib / 1024 }'
