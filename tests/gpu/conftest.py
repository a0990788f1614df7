"""The card that the tests of this folder run on."""

from __future__ import annotations

import os

import pytest

from tasks.device import DeviceInfo


@pytest.fixture(scope="session")
def card() -> DeviceInfo:
    """The first card that CUDA may use: NVML lists those that CUDA_VISIBLE_DEVICES hides as well."""
    from tasks.probe import probe

    cards = [device for device in probe().devices if device.kind == "cuda"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        first = visible.split(",")[0]
        cards = [device for device in cards if first in (str(device.index), device.uuid)]
    if not cards:
        pytest.skip("no CUDA device")
    return cards[0]
