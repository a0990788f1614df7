#!/usr/bin/env bash
# `on_gpu.sh` once for each card of a host, side by side: card, cores, home and temporary folder are each one's own.
#
#   benchmarks/on_gpus.sh OUT SECONDS "llama instrumentation" "ROUNDS=2 compile kv-cache" ...
#
# Lane N gets the Nth card of CUDA_VISIBLE_DEVICES (0, 1, ... by default), writes to OUT/N and ends its parts after
# SECONDS; what stands before the parts is for their environment. Siblings of one core stay in one lane.
set -ufo pipefail # a part may hold the patterns of --only
here=$(cd "$(dirname "$0")" && pwd)
out=$(realpath -m "$1")
seconds=$2
shift 2
began=$(date +%s)
export DEADLINE=$((began + seconds))
IFS=, read -ra cards <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $(($# - 1)))}"
mapfile -t cpus < <("${PYTHON:-python}" - "$#" <<'PYTHON'
import os, sys
from pathlib import Path

cores = {}
for cpu in sorted(os.sched_getaffinity(0)):
    siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    cores.setdefault(siblings.read_text() if siblings.exists() else cpu, []).append(cpu)
lanes, cores = int(sys.argv[1]), list(cores.values())
for lane in range(lanes):
    mine = cores[lane * len(cores) // lanes : (lane + 1) * len(cores) // lanes]
    print(",".join(str(cpu) for core in mine for cpu in core))
PYTHON
)
if ((${#cards[@]} < $# || ${#cpus[@]} < $#)) || printf '%s\n' "${cpus[@]}" | grep -qx ''; then
    echo "$# lanes need as many cards and cores: ${#cards[@]} cards, CPUs by lane: ${cpus[*]}" >&2
    exit 2
fi

lane() { # NUMBER [VARIABLE=VALUE...] PART...
    local number=$1
    shift
    export CUDA_VISIBLE_DEVICES=${cards[number]} HOME=/tmp/lane$number/home TMPDIR=/tmp/lane$number
    mkdir -p "$HOME" "$out/$number"
    while [[ $1 =~ ^[A-Z_0-9]+= ]]; do
        export "${1?}"
        shift
    done
    taskset -c "${cpus[number]}" "$here/on_gpu.sh" "$out/$number" "$@" >"$out/$number.txt" 2>&1
    local status=$?
    echo "lane $number ended with status $status after $(($(date +%s) - began)) s"
    return $status
}

number=0
lanes=()
for parts in "$@"; do
    # shellcheck disable=SC2086
    lane "$number" $parts &
    lanes+=($!)
    number=$((number + 1))
    sleep 3 # two instances of Ray that start at once may choose one port
done
failed=0
for process in "${lanes[@]}"; do
    wait "$process" || failed=1
done
exit $failed
