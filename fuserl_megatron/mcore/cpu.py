"""Lets unmodified megatron-core (0.16 and 0.19) train on CPU and gloo.

Core writes `torch.cuda.current_device()` and `device="cuda"` into code that has no other need of CUDA: gradient
buffers, pipeline receive buffers, token counters, gradient norms. No setting turns those off. `enable()` answers
exactly these calls, and only when megatron.core itself makes them; torch as seen by every other caller stays as it is.
Where CUDA is present nothing is changed. What is answered, and by what:

    torch.cuda.current_device()                   the CPU device
    torch.cuda.synchronize(), current_stream()    nothing, an inert object
    torch.cuda random generator                   the CPU generator (only recompute and dropout ask)
    device="cuda" / .cuda() / .to("cuda")         the CPU
    pin_memory=True                               False
    Tensor.type() -> "torch.FloatTensor"          "torch.cuda.FloatTensor" (core asserts on this text)
    Transformer Engine's Adam and norms           torch's AdamW and core's own (core takes the former where installed)

The cost is one Python call for each torch function, 15 % of a step of a tiny model; a forward pass has no such call
and is left out (`no_requests`), and torch leaves the backward pass out by itself.
"""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_CALLERS: str | tuple[str, ...] = "megatron.core"  # tests/rehearsal adds transformer_engine
_WATCHED = frozenset({"cuda", "to", "type"})
_mode: TorchFunctionMode | None = None


def _names_cuda(device: object) -> bool:
    if isinstance(device, bool):
        return False
    return isinstance(device, int) or (isinstance(device, (str, torch.device)) and str(device).startswith("cuda"))


class _CoreOnCpu(TorchFunctionMode):
    """Rewrites the arguments of torch functions whose direct caller is a module of megatron.core."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if "device" not in kwargs and "pin_memory" not in kwargs and name not in _WATCHED:
            return func(*args, **kwargs)
        if not sys._getframe(1).f_globals.get("__name__", "").startswith(_CALLERS):
            return func(*args, **kwargs)
        if name == "cuda" or (name == "to" and len(args) > 1 and _names_cuda(args[1])):
            return args[0]
        if name == "type" and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


def no_requests() -> AbstractContextManager:
    """Around code of core that asks for no "cuda", a model's forward pass: no Python call for each function there."""
    return nullcontext() if _mode is None else torch._C.DisableTorchFunction()


def _use_torch_optimizer() -> None:
    """Undo core's choice of Transformer Engine's CUDA kernels, which its optimizers made when they were imported."""
    import megatron.core.optimizer as chooser
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as mixed

    chosen: dict[Any, dict[str, Any]] = {
        chooser: dict(Adam=torch.optim.AdamW, SGD=torch.optim.SGD, USING_PYTORCH_OPTIMIZER=True),
        distrib_optimizer: dict(Adam=torch.optim.Adam, HAVE_APEX_OR_TE=False, USING_TE_OPTIMIZER=False),
        mixed: dict(multi_tensor_scale_impl=utils.local_multi_tensor_scale),
        clip_grads: dict(
            l2_norm_impl=utils.local_multi_tensor_l2_norm,
            multi_tensor_scale_impl=utils.local_multi_tensor_scale,
            multi_tensor_scale_tensor_impl=None,  # of core 0.19
        ),
    }
    for module, names in chosen.items():
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        for name, value in names.items():
            setattr(module, name, value)


class _InertStream(nullcontext):
    def __getattr__(self, _name):
        return lambda *args, **kwargs: None


def enable() -> bool:
    """Once per process, before a model is built. Returns whether the shim is active (False where CUDA is present)."""
    global _mode
    if torch.cuda.is_available():
        return False
    if _mode is None:
        import megatron.core.tensor_parallel.random as core_random

        cuda: Any = torch.cuda
        cuda.current_device = lambda: _CPU
        cuda.synchronize = lambda *args, **kwargs: None
        cuda.current_stream = lambda *args, **kwargs: _InertStream()
        cuda.manual_seed = torch.manual_seed
        cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        core_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        core_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
        if "transformer_engine" in sys.modules:
            _use_torch_optimizer()
        _mode = _CoreOnCpu()
        _mode.__enter__()
    return True
