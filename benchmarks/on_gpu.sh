#!/usr/bin/env bash
# What docs/results is made with, on a machine with one CUDA GPU: parts by name, each within a time limit and each
# keeping what it has measured when the limit strikes.
#
#   benchmarks/on_gpu.sh OUT tests llama attention calibration instrumentation
#
# A part may be the name of any shipped sweep, at its scale `headline`; what stands behind a slash are the cells that it
# is limited to, as `--only` takes them: decode-ladder/new_tokens=100. `profile` has a stack there, of the model
# PROFILE_MODEL (random:NAME, path:FOLDER) with PROFILE_PROMPT tokens of prompt. With DEADLINE (seconds since 1970)
# nothing goes on beyond it.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$1
shift
mkdir -p "$out"
PYTHON=${PYTHON:-python}
PAIRED=${PAIRED:-fp32|fp16|bf16|bf16+static-cache|bf16+static-cache+compile:mode=reduce-overhead}
BEST="bf16+fused-projections:of=attention+eager+static-cache+compile:mode=reduce-overhead,coordinate_descent=true"
MARLIN="import torch; from gptqmodel.utils.marlin import prewarm_marlin_extension as build; build(torch.bfloat16)"
DEVICE_BOUND="model=random:llama-3.2-1b|none,optimization=bf16"

limited() { # SECONDS COMMAND...: an interrupt first, so that a sweep finishes its cell and pytest prints what failed
    local seconds=$1 left
    shift
    left=$((${DEADLINE:-9999999999} - $(date +%s)))
    if ((left < 20)); then
        echo "no time for: $*"
        return
    fi
    # which a shell's background jobs would ignore; the longest cell compiles for nearly two minutes
    timeout --signal=INT --kill-after=150 $((left < seconds ? left : seconds)) env --default-signal=INT "$@"
}

sweep() { # SECONDS NAME FOLDER [OPTION...]
    limited "$1" "$PYTHON" -m orchestrator run "$2" --out "$out/$3" "${@:4}" >>"$out/$3.txt" 2>&1
    tail -n 60 "$out/$3.txt"
}

for part in "$@"; do
    echo "== $part, $(date +%T)"
    only=
    [[ $part == */* ]] && only=${part#*/} && part=${part%%/*}
    case $part in
    tests)
        limited "${TESTS_S:-420}" "$PYTHON" -m pytest -m gpu ${TESTS:-tests/gpu} --tb=short -v -p no:cacheprovider ${TESTS_K:+-k "$TESTS_K"} >"$out/tests.txt" 2>&1
        tail -n 60 "$out/tests.txt"
        ;;
    llama)
        sweep "${LLAMA_S:-400}" llama-1b llama-1b
        limited 120 "$PYTHON" benchmarks/independent_gpu.py "$out/independent-llama.json" llama
        "$PYTHON" benchmarks/compare_independent.py "$out/llama-1b" "$out/independent-llama.json"
        ;;
    paired) # the plain script before and after every round: both have met the same clock of the host
        mkdir -p "$out/paired"
        for round in 0 1 2 3; do
            ((round == 0)) || sweep 150 llama-1b "paired/$round" --set rounds=1 --only "optimization=$PAIRED"
            # shellcheck disable=SC2046
            limited 60 "$PYTHON" benchmarks/independent_gpu.py "$out/paired/$round.json" $(tr '|+:' '\n\n\n' <<<"$PAIRED" | grep -E '^(fp32|fp16|bf16)$' | sort -u)
        done
        "$PYTHON" benchmarks/compare_independent.py "$out"/paired/[123] "$out"/paired/?.json
        ;;
    attention)
        sweep "${ATTENTION_S:-300}" attention attention --set scale=headline
        limited 60 "$PYTHON" benchmarks/independent_gpu.py "$out/independent-attention.json" attention
        "$PYTHON" benchmarks/compare_independent.py "$out/attention" "$out/independent-attention.json"
        ;;
    calibration)
        sweep "${AA_S:-240}" aa-gpu aa-gpu-1
        sweep "${AA_S:-240}" aa-gpu aa-gpu-2
        "$PYTHON" benchmarks/repeatability.py "$out/aa-gpu-1" "$out/aa-gpu-2"
        ;;
    in-turn)
        limited 260 "$PYTHON" benchmarks/in_turn.py --pairs "${PAIRS:-12}"
        ;;
    instrumentation)
        limited 120 "$PYTHON" benchmarks/instrumentation.py --pairs "${PAIRS:-12}"
        ;;
    profile) # where a token spends its time: of the best 8B stack, or of the stack behind the slash
        limited 180 "$PYTHON" benchmarks/profile_decode.py "${PROFILE_MODEL:-random:llama-3.1-8b}" "${only:-$BEST}" \
            --prompt-tokens "${PROFILE_PROMPT:-512}" |
            tee -a "$out/profile.txt"
        ;;
    train) # Marlin's kernels are compiled meanwhile, which takes two minutes of the processor
        GPTQMODEL_OFFLINE=1 limited 300 "$PYTHON" -c "$MARLIN" >"$out/marlin.txt" 2>&1 &
        limited 300 "$PYTHON" -m orchestrator train "$out/trained" --size gpt2 --minutes "${TRAIN_MINUTES:-2}"
        wait
        ;;
    systematic) # of the model that `train` has left (in OUT, or in TRAINED)
        sweep "${SYSTEMATIC_S:-900}" systematic systematic --set scale=gpu \
            --set "models=[{id: gpt2-size, path: ${TRAINED:-$out/trained}}]" ${only:+--only "$only"}
        ;;
    onnx) # ONNX Runtime's CUDA provider, of the same model
        sweep "${ONNX_S:-200}" systematic onnx --set scale=gpu --set baseline=fp32 --set 'include=[]' \
            --set 'optimizations=[fp32, onnx, onnx-int8, onnx-int4]' \
            --set "models=[{id: gpt2-size, path: ${TRAINED:-$out/trained}}]"
        ;;
    systematic-8b)
        sweep "${SYSTEMATIC_8B_S:-600}" systematic systematic-8b --set scale=8b ${only:+--only "$only"}
        ;;
    two) # on a host with two cards; then `one` on each of them, and benchmarks/two_devices.py
        sweep 240 aa-gpu two --parallel-gpus --only "$DEVICE_BOUND"
        ;;
    one)
        sweep 240 aa-gpu one --only "$DEVICE_BOUND"
        ;;
    *)
        sweep "${SWEEP_S:-600}" "$part" "$part" --set scale=headline ${ROUNDS:+--set rounds=$ROUNDS} ${only:+--only "$only"}
        ;;
    esac
done
