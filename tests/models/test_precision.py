"""Half precision is used where a device has instructions for it."""

import subprocess
import sys

import pytest
import torch

from ddpm.models import precision
from ddpm.models.precision import supported_dtype

CPU = torch.device("cpu")
GPU = torch.device("cuda")


@pytest.mark.parametrize(("capability", "supported"), [("AVX2", False), ("DEFAULT", False), ("AVX512", True)])
def test_a_cpu_needs_wide_instructions(
    monkeypatch: pytest.MonkeyPatch, capability: str, supported: bool
) -> None:
    monkeypatch.setattr(precision, "CPU_CAPABILITY", capability)
    assert supported_dtype(torch.bfloat16, CPU) == (torch.bfloat16 if supported else None)
    assert supported_dtype(None, CPU) is None


@pytest.mark.parametrize("supported", [True, False])
def test_emulation_on_a_gpu_does_not_count(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    """PyTorch emulates bfloat16 on GPUs before Ampere, such as a T4."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: supported or including_emulation
    )
    assert supported_dtype(torch.bfloat16, GPU) == (torch.bfloat16 if supported else None)


def test_training_imports_no_compiler_before_it_compiles() -> None:
    """It takes two seconds."""
    program = "import sys, ddpm.training.loop; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
