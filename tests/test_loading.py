"""How models are loaded, without loading one."""

import pytest
import torch

from atv.lm.load import parse_dtype


@pytest.mark.parametrize(
    ("gpu", "cpu_has_it", "device", "expected"),
    [
        (False, False, None, torch.float32),
        (False, True, None, torch.bfloat16),
        (True, False, None, torch.bfloat16),
        (True, False, "auto", torch.bfloat16),
        (True, False, "cpu", torch.float32),
        (False, False, "cuda:1", torch.bfloat16),
    ],
)
def test_the_default_dtype_is_one_that_the_device_is_fast_with(monkeypatch, gpu, cpu_has_it, device, expected):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: cpu_has_it)
    assert parse_dtype("auto", device) == expected
    assert parse_dtype("float16", device) == torch.float16
