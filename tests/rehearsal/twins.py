"""The real Transformer Engine on CPU tensors: its Python as it is, torch twins in place of its C++ kernels.

Import it before megatron.core, which binds some of the kernels by name. Only the flow is rehearsed (arguments, autograd
functions, quantizers, state, checkpoints), never a kernel's numbers. `CALLS` counts the twins' calls.
"""

import collections
import functools
import inspect
import sys
import textwrap
from contextlib import nullcontext
from unittest import mock

import torch  # before Transformer Engine, whose library needs torch's
import transformer_engine.pytorch.optimizers as te_optimizers
import transformer_engine_torch as tex
from transformer_engine.pytorch.constants import TE_DType
from transformer_engine.pytorch.cpp_extensions import gemm as gemm_module
from transformer_engine.pytorch.module import base

CALLS: collections.Counter = collections.Counter()
TORCH_DTYPES = {value: key for key, value in TE_DType.items()}


def counted(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        CALLS[function.__name__] += 1
        return function(*args, **kwargs)

    return call


def as_dtype(dtype):
    return dtype if dtype is None or isinstance(dtype, torch.dtype) else TORCH_DTYPES[dtype]


def replace_everywhere(real, twin) -> None:
    """Also where a module of Transformer Engine imported it by name."""
    for name, module in list(sys.modules.items()):
        if name.startswith("transformer_engine"):
            for key, value in list(vars(module).items()):
                if value is real:
                    setattr(module, key, twin)


def plain(tensor):
    """Values of a quantized tensor; twins_fp8 puts its own in place."""
    return tensor


@counted
def generic_gemm(
    A, transa, B, transb, D, quantizer, out_dtype, bias, bias_type, gelu, gelu_in, grad, workspace, size, accumulate,
    split, comm_overlap=None, comm_type=None, extra_output=None, bulk_overlap=False, alpha=1.0, beta=None,
):  # fmt: skip
    """op(B) op(A) of column-major matrices, which is A and B in torch's order; bias added or its gradient taken."""
    assert not gelu and comm_overlap is None and alpha == 1.0
    a, b = plain(A), plain(B)
    a2, b2 = (t.reshape(-1, t.shape[-1]).float() for t in (a, b))
    out = (b2.t() if transb else b2) @ (a2.t() if transa else a2)
    bias_grad = None
    if bias is not None and grad:
        bias_grad = b2.sum(0).to(bias.dtype)
    elif bias is not None:
        out = out + bias.float()
    out = out.to(as_dtype(out_dtype) or b.dtype)
    if not transb:
        out = out.reshape(*b.shape[:-1], out.shape[-1])
    if D is not None:
        out = D.add_(out) if accumulate else D.copy_(out)
    if quantizer is not None:
        out = quantizer(out)
    return out, bias_grad, gelu_in, extra_output


@counted
def rmsnorm_fwd(x, weight, eps, out, quantizer, dtype, margin, zero_centered):
    scale = weight.float() + (1 if zero_centered else 0)
    inverse = torch.rsqrt(x.float().square().mean(-1) + eps)
    y = (x.float() * inverse[..., None] * scale).to(as_dtype(dtype))
    if quantizer is not None:
        y = tex.quantize(y, quantizer, out, None)
    elif out is not None:
        y = out.copy_(y)
    return y, None, inverse


@counted
def rmsnorm_bwd(dz, x, inverse, weight, margin, zero_centered):
    scale = weight.float() + (1 if zero_centered else 0)
    normal, dz = x.float() * inverse[..., None], dz.float().reshape(x.shape)
    d = dz * scale
    dx = (d - normal * (d * normal).mean(-1, keepdim=True)) * inverse[..., None]
    return dx.to(x.dtype), (dz * normal).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)


@counted
def multi_tensor_l2norm(chunk, flag, lists, per_parameter=False):
    return torch.stack([t.float().norm() for t in lists[0]]).norm()[None], None


@counted
def multi_tensor_scale(chunk, flag, lists, factor):
    for source, target in zip(*lists, strict=True):
        target.copy_(source.float() * float(factor))


@counted
def multi_tensor_adam(chunk, flag, lists, lr, b1, b2, eps, step, mode, bias_correction, decay, *_):
    assert mode and bias_correction
    for tensors in zip(*lists, strict=True):
        adam(*tensors[:4], tensors[4] if len(tensors) > 4 else tensors[1], lr, b1, b2, eps, step, decay)


def adam(grad, parameter, first, second, master, lr, b1, b2, eps, step, decay):
    grad, weight = grad.float(), master.float()
    m = b1 * first.float() + (1 - b1) * grad
    v = b2 * second.float() + (1 - b2) * grad * grad
    weight = weight - lr * (m / (1 - b1**step) / ((v / (1 - b2**step)).sqrt() + eps) + decay * weight)
    first.copy_(m), second.copy_(v), master.copy_(weight)
    if master is not parameter:
        parameter.copy_(weight)


@counted
def multi_tensor_adam_param_remainder(
    chunk, flag, lists, lr, b1, b2, eps, step, mode, bias_correction, decay, *_
):  # what a setting of the optimizer must keep from being called: see test_settings.py
    for grad, parameter, first, second, rest in zip(*lists, strict=True):
        assert parameter.dtype == torch.bfloat16 and rest.dtype == torch.int16
        high = parameter.view(torch.int16).int() - (rest < 0).int()
        weight = ((high << 16) | (rest.int() & 0xFFFF)).view(torch.float32).clone()
        adam(grad, weight, first, second, weight, lr, b1, b2, eps, step, decay)
        bits = weight.view(torch.int32)
        low = bits & 0xFFFF
        rest.copy_(torch.where(low >= 0x8000, low - 0x10000, low).to(torch.int16))
        high = (bits >> 16) + (rest < 0).int()
        parameter.view(torch.int16).copy_(torch.where(high > 32767, high - 65536, high).to(torch.int16))


def _rewrite(owner, name: str, *choices: tuple[str, str]) -> None:
    """A method with one piece of its source replaced: the first choice that occurs in it."""
    source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    old, new = next(choice for choice in choices if choice[0] in source)
    scope: dict = {}
    exec(compile(source.replace(old, new), f"<rehearsed {name}>", "exec"), vars(sys.modules[owner.__module__]), scope)
    setattr(owner, name, scope[name])


def _as_if_cuda(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        with mock.patch.object(torch.cuda, "is_available", lambda: True):
            return function(*args, **kwargs)

    return call


def _install() -> None:
    module = base.TransformerEngineBaseModule
    module.__init__ = _as_if_cuda(module.__init__)
    _rewrite(module, "prepare_forward", ("if not inp.is_cuda", "if False"), ("assert inp.is_cuda", "assert True"))
    gemm_module.get_cublas_workspace = lambda *_: torch.empty(1, dtype=torch.uint8)
    for twin in (generic_gemm, rmsnorm_fwd, rmsnorm_bwd, multi_tensor_adam, multi_tensor_adam_param_remainder):
        replace_everywhere(getattr(tex, twin.__name__), twin)
    te_optimizers.multi_tensor_l2norm = multi_tensor_l2norm
    te_optimizers.multi_tensor_scale = te_optimizers.multi_tensor_scale_tensor = multi_tensor_scale
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: None
    torch.Tensor.cuda = lambda self, *_, **__: self

    from fuserl_megatron.mcore import cpu

    cpu._CALLERS = ("megatron.core", "transformer_engine")
    cpu.no_requests = nullcontext  # the forward pass asks for "cuda" here
    cpu._use_torch_optimizer = lambda: None  # Transformer Engine's Adam is what is rehearsed


_install()
