"""Runs Unsloth's CUDA branch on CPU tensors: Triton's interpreter, and a torch that believes in one GPU.

For the tests of `make test-fused` alone. `pretend` must be called before torch, transformers or unsloth are used, in a
process of its own. Use float16: bfloat16 gives NaN under the interpreter.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

_ENVIRONMENT = {
    "UNSLOTH_ALLOW_CPU": "1",  # import without a GPU
    "TRITON_INTERPRET": "1",  # kernels as Python over CPU tensors
    "UNSLOTH_COMPILE_DISABLE": "1",  # no compiled copies of modules
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DEACTIVATE_ASYNC_LOAD": "1",  # the mode below holds in one thread only
}
_GIB = 2**30
_NAME = "a card that is not there"


def pretend() -> ModuleType:
    """Make torch report one big new GPU whose memory is the CPU's; returns the imported `unsloth`."""
    os.environ.update(_ENVIRONMENT)
    import torch

    properties = SimpleNamespace(
        name=_NAME, total_memory=141 * _GIB, major=9, minor=0, multi_processor_count=132, gcnArchName=""
    )
    answers = {
        "get_device_properties": properties,
        "get_device_capability": (9, 0),
        "get_device_name": _NAME,
        "current_device": 0,
        "device_count": 1,
        "synchronize": None,
        "mem_get_info": (130 * _GIB, 141 * _GIB),
        "max_memory_reserved": 0,
        "memory_reserved": 0,
        "is_current_stream_capturing": False,
        "is_bf16_supported": True,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, _always(answer))
    torch._C._cuda_getCurrentRawStream = _always(0)  # type: ignore[attr-defined]
    import unsloth

    for name, module in list(sys.modules.items()):
        if name.startswith("unsloth"):
            if hasattr(module, "get_device_stats"):
                module.get_device_stats = _always((_NAME, "", 141.0))
            if hasattr(module, "SUPPORTS_BFLOAT16"):
                module.SUPPORTS_BFLOAT16 = True
    _everything_on_the_cpu().__enter__()
    return unsloth


def _always(answer: Any) -> Any:
    return lambda *args, **kwargs: answer


def _everything_on_the_cpu() -> Any:
    """A mode in which whatever is asked of the GPU is given on the CPU (as device cpu:0, which has an index)."""
    import torch
    from torch.overrides import TorchFunctionMode

    def means_gpu(value: Any) -> bool:
        if isinstance(value, str):
            return value.startswith("cuda")
        if isinstance(value, torch.device):
            return value.type == "cuda"
        return False

    class OnTheCpu(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            device = kwargs.get("device")
            if means_gpu(device) or (isinstance(device, int) and not isinstance(device, bool)):
                kwargs["device"] = "cpu"
            if func is torch.device and args and (args[0] is None or isinstance(args[0], int) or means_gpu(args[0])):
                return torch.device("cpu", 0)
            if func is torch.Tensor.cuda:
                return args[0]
            if func in (torch.Tensor.to, torch.empty, torch.zeros):
                args = tuple("cpu" if means_gpu(value) else value for value in args)
            return func(*args, **kwargs)

    return OnTheCpu()
