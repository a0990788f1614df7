"""What the findings mean that rows carry in `flags`: the numbers stand, but something was not as it should be.

A run that `decides no verdict` is left out of ratios where most of its cell's runs are without such a finding.
"""

from __future__ import annotations

FLAGS = {
    "interference": "other work disturbed its CPUs; where an A/A control was measured, intervals allow for it",
    "steal": "the hypervisor gave its CPUs to others (decides no verdict)",
    "foreign_load": "other processes used more than a tenth of its CPUs (decides no verdict)",
    "cpu_starved": "it got less than nine tenths of its CPUs, having to wait for them (decides no verdict)",
    "foreign_gpu_process": "another process computed on its GPU (decides no verdict)",
    "throttled": "heat or the power brake slowed the GPU (decides no verdict)",
    "clock_drift": "the GPU's clock changed while it was measured",
    "gpu_idle": "the GPU had nothing to do in between: the host did not keep up",
    "launch_bound": "the device waited for the host to launch its kernels: the time is the host's",
    "not_steady": "calls still became faster or slower when the time for warming up was over (decides no verdict)",
    "passes_disagree": "calls that are waited for were faster than calls in a row, which cannot be, by more than 2 %",
    "passes_contradict": "calls that are waited for were faster than calls in a row by over 10 % (decides no verdict)",
    "device_disagrees": "calls in a row took less time than the device alone took for them otherwise, by more than 2 %",
    "executed_instead": "it could not be forked and was started anew, unlike the others (decides no verdict)",
    "aa_failed": "equal cells differed on this machine (decides no verdict)",
    "allocation_retries": "memory was so short that cached blocks had to be given back first",
    "memory_of_process": "what computes allocates for itself: its memory is the growth of the process, kernels and all",
    "energy_suspect": "the energy counter and the power readings disagree",
    "energy_polled": "energy is summed from power readings: this device has no counter",
    "shared_gpu": "others held the GPU too, idle as far as is known: its energy is the whole GPU's",
    "several_gpus": "its energy is that of one of several GPUs",
    "steps_skipped": "the gradient scaler skipped optimizer steps",
    "loss_did_not_fall": "training steps did not lower the loss",
    "statistics_per_micro_batch": "batch norm saw micro-batches, so gradients differ from the whole batch's",
    "quality_failed": "quality could not be judged",
    "metric_failed": "this metric's columns are null because of an error, which the reasons name",
}
