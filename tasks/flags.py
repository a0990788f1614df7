"""What the findings mean that rows carry in `flags`: the numbers stand, but something was not as it should be."""

from __future__ import annotations

FLAGS = {
    "interference": "other work disturbed its CPUs, so that the interval is widened by what equal runs differ here",
    "steal": "the hypervisor gave its CPUs to others (no verdict)",
    "foreign_load": "other processes used more than a tenth of its CPUs (no verdict)",
    "cpu_starved": "it had to wait for a CPU in more than a tenth of the time (no verdict)",
    "foreign_gpu_process": "another process computed on its GPU (no verdict)",
    "throttled": "heat or the power brake slowed the GPU (no verdict)",
    "clock_drift": "the GPU's clock changed while it was measured",
    "gpu_idle": "the GPU had nothing to do in between: the host did not keep up",
    "launch_bound": "the device waited for the host to launch its kernels: the time is the host's",
    "not_steady": "calls still became faster or slower when the time for warming up was over",
    "passes_disagree": "calls that are waited for were faster than calls in a row by more than 2 %, which cannot be",
    "passes_contradict": "calls that are waited for were faster than calls in a row by more than 10 % (no verdict)",
    "executed_instead": "it could not be forked and was started anew, unlike the others (no verdict)",
    "aa_failed": "equal cells differed on this machine (no verdict)",
    "ceiling_raised": "the first ceiling was too low, the machine being busy: MFU is of one measured again",
    "allocation_retries": "memory was so short that cached blocks had to be given back first",
    "energy_suspect": "the energy counter and the power readings disagree",
    "energy_polled": "energy is summed from power readings: this device has no counter",
    "shared_gpu": "its energy is the whole GPU's, which others used as well",
    "several_gpus": "its energy is that of one of several GPUs",
    "steps_skipped": "the gradient scaler skipped optimizer steps",
    "loss_did_not_fall": "training steps did not lower the loss",
    "statistics_per_micro_batch": "batch norm saw micro-batches, so gradients differ from the whole batch's",
    "quality_failed": "quality could not be judged",
    "metric_failed": "this metric's columns are null because of an error, which the reasons name",
}
