#!/usr/bin/env bash
# `on_gpu.sh` once for each card of a host, side by side: card, cores, home and temporary folder are each one's own.
#
#   benchmarks/on_gpus.sh OUT SECONDS "llama instrumentation" "ROUNDS=2 compile kv-cache" ...
#
# Lane N gets card N, writes to OUT/N and ends after SECONDS; what stands before its parts is for its environment.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$1
seconds=$2
shift 2
began=$(date +%s)
export DEADLINE=$((began + seconds))
cores=$(($(nproc) / $#))
((cores > 0)) || cores=1

lane() { # NUMBER [VARIABLE=VALUE...] PART...
    local number=$1
    shift
    export CUDA_VISIBLE_DEVICES=$number HOME=/tmp/lane$number/home TMPDIR=/tmp/lane$number
    mkdir -p "$HOME" "$out/$number"
    while [[ $1 == *=* ]]; do
        export "${1?}"
        shift
    done
    taskset -c "$((number * cores))-$((number * cores + cores - 1))" \
        "$here/on_gpu.sh" "$out/$number" "$@" >"$out/$number.txt" 2>&1
    echo "lane $number ended after $(($(date +%s) - began)) s"
}

number=0
for parts in "$@"; do
    # shellcheck disable=SC2086
    lane "$number" $parts &
    number=$((number + 1))
    sleep 3 # two instances of Ray that start at once may choose one port
done
wait
