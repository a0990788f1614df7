"""An independent check of our figures on one CUDA GPU: plain PyTorch and CUDA events, nothing of this project.

    python benchmarks/independent_gpu.py independent.json [attention] [llama] [fp32] [fp16] [bf16]

Times what the shipped sweeps `llama-1b` and `attention` time, in the plainest way, so that the two can be laid side by
side with `benchmarks/compare_independent.py RESULTS independent.json`. A precision stands for that part of `llama`.
"""

import gc
import json
import math
import os
import sys
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False
LLAMA_1B = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
}  # fmt: skip


CPUS = sorted(os.sched_getaffinity(0))


def median(values):
    return sorted(values)[len(values) // 2]


def undisturbed(groups):
    """Median of the samples from the CPUs on which they were fast, and of all.

    On a shared host a CPU may run at half its speed for a while; eager steps of small models wait for theirs. So the
    samples are taken in groups, each launched from another CPU, and a group counts when its median is within 10 % of
    the best one.
    """
    best = min(median(samples) for samples in groups)
    return {
        "ms": median([sample for samples in groups if median(samples) <= 1.1 * best for sample in samples]),
        "ms_all": median([sample for samples in groups for sample in samples]),
    }


NEW_TOKENS = 32


def events(call, repeats, inner=1):
    """Median milliseconds of one call, from CUDA events around `inner` calls, as `undisturbed` gives them."""
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    groups = []
    for number in range(repeats):
        if number % 5 == 0:
            os.sched_setaffinity(0, {CPUS[number // 5 * 5 % len(CPUS)]})
            groups.append([])
            call()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(inner):
            call()
        stop.record()
        stop.synchronize()
        groups[-1].append(start.elapsed_time(stop) / inner)
    return undisturbed(groups)


def attention(kind, length):
    torch._C._cuda_clearCublasWorkspaces()  # what another kind has left there is not this one's memory
    sets = [[torch.randn(4, 12, length, 64, device="cuda", dtype=torch.float16) for _ in range(3)] for _ in range(4)]
    waiting = 9 * sets[0][0].nbytes  # three of the four sets; they rotate, so that none stays in the L2 cache
    turn = iter(range(10**9))
    if kind == "eager":

        def call():
            q, k, v = sets[next(turn) % 4]
            scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(64)
            return torch.matmul(torch.softmax(scores, dim=-1), v)

        return measured(call, 20 if length <= 2048 else 4, waiting)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = {
        "sdpa-flash": SDPBackend.FLASH_ATTENTION,
        "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    }[kind]

    def fused():
        return torch.nn.functional.scaled_dot_product_attention(*sets[next(turn) % 4])

    with sdpa_kernel(backend):
        return measured(fused, 100 if length <= 1024 else 8, waiting)


def measured(call, inner, waiting=0):
    began = time.perf_counter()
    while time.perf_counter() - began < 0.5:  # the clock of the card settles
        call()
        torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return {**events(call, 40, inner), "peak_bytes": torch.cuda.max_memory_allocated() - waiting}


def llama(dtype):
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **LLAMA_1B)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def prefill(model):
    """One prompt through the model; call it again and again."""
    ids = [torch.randint(0, 128256, (1, 512), device="cuda") for _ in range(8)]
    turn = iter(range(10**9))

    def call():
        return model(input_ids=ids[next(turn) % 8], use_cache=True, logits_to_keep=1).logits

    return call


class Decode:
    """Greedy decoding of one sequence; `static` or growing cache, the static one's step `compiled` or not."""

    def __init__(self, model, static=False, compiled=False):
        self.model = model
        self.prompt = torch.randint(0, 128256, (1, 512), device="cuda")
        self.step = torch.compile(self.one, mode="reduce-overhead") if compiled else self.one
        self.cache = StaticCache(config=model.config, max_cache_len=512 + NEW_TOKENS) if static else None
        self.current = torch.zeros((1, 1), dtype=torch.long, device="cuda")

    def one(self, ids, cache):
        return (
            self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
        )

    def start(self):
        if isinstance(self.cache, StaticCache):
            self.cache.reset()
        else:
            self.cache = DynamicCache(config=self.model.config)
        self.current.copy_(self.one(self.prompt, self.cache).unsqueeze(1))
        torch.cuda.synchronize()

    def token(self):
        torch.compiler.cudagraph_mark_step_begin()
        self.current.copy_(self.step(self.current, self.cache).unsqueeze(1))

    def token_ms(self):
        """Milliseconds of a token that is waited for."""
        before = time.perf_counter()
        self.token()
        torch.cuda.synchronize()
        return (time.perf_counter() - before) * 1e3


def decode(plain):
    groups, rates = [], []
    for request in range(6):
        plain.start()
        if request == 3:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        for token in range(NEW_TOKENS - 1):
            if token % 9 == 0:
                os.sched_setaffinity(0, {CPUS[(5 * request + token) % len(CPUS)]})
                groups.append([])
            if request % 2:
                groups[-1].append(plain.token_ms())
            else:
                plain.token()
        torch.cuda.synchronize()
        if request < 2:
            groups.clear()
        elif request % 2 == 0:
            rates.append((NEW_TOKENS - 1) / (time.perf_counter() - began))
    return {
        **undisturbed([samples[1:] for samples in groups if len(samples) > 3]),
        "tokens_per_s": median(rates),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


class Results(dict):
    """Written to FILE at every new figure: what was measured before a time limit is not lost."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        with open(sys.argv[1], "w") as file:  # noqa: PTH123
            json.dump(self, file, indent=1)


def main():
    results = Results(device=torch.cuda.get_device_name(), torch=torch.__version__)
    wanted = sys.argv[2:] or ["attention", "llama"]
    with torch.inference_mode():
        if "attention" in wanted:
            for length in (512, 1024, 2048, 4096, 8192):
                for kind in ("eager", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn"):
                    results[f"attention|{length}|fp16+{kind}"] = attention(kind, length)
                    gc.collect()
                    torch.cuda.empty_cache()
        for name in ("fp32", "fp16", "bf16"):
            if not {"llama", name} & set(wanted):
                continue
            model = llama({"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name])
            # four calls queued, so that the device does not wait for the first launch of each
            results[f"prefill|512|{name}"] = measured(prefill(model), 4)
            results[f"decode|512|{name}"] = decode(Decode(model))
            if name == "bf16":
                results["decode|512|bf16+static-cache"] = decode(Decode(model, static=True))
                results["decode|512|bf16+static-cache+compile:mode=reduce-overhead"] = decode(
                    Decode(model, static=True, compiled=True)
                )
            del model
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
