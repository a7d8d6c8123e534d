"""Twins of Transformer Engine's FP8 kernels: one scale for each tensor, delayed or current.

A recipe with a scale for each block rounds as the kernels do, but its layouts of scales are not rehearsed.
"""

import torch
import twins
from transformer_engine.pytorch import utils as te_utils
from transformer_engine.pytorch.constants import TE_DType_To_Torch
from transformer_engine.pytorch.tensor import float8_blockwise_tensor, float8_tensor
from transformer_engine.pytorch.tensor import utils as tensor_utils
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage
from twins import counted, replace_everywhere, tex

MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def plain(tensor):
    if isinstance(tensor, Float8TensorStorage):
        dtype = TE_DType_To_Torch[tensor._fp8_dtype]
        if tensor._data is not None:
            return tensor._data.view(dtype).float() * tensor._scale_inv
        values = tensor._transpose.view(dtype).float() * tensor._scale_inv
        return values.reshape(values.shape[0], -1).t()
    return getattr(tensor, "_twin_values", tensor)


def _rounded(x, scale, dtype):
    return (x.float() * scale).clamp(-MAX[dtype], MAX[dtype]).to(dtype)


@counted
def quantize(x, quantizer, out=None, noop=None):
    x, dtype = x.detach(), TE_DType_To_Torch[quantizer.dtype]
    if out is None:
        out = quantizer.make_empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return out
    name, amax = type(quantizer).__name__, x.float().abs().max()
    if name == "Float8BlockQuantizer":
        out._twin_values = _block_values(x, quantizer, dtype)
        return out
    if name == "Float8Quantizer":  # delayed: scales of earlier steps, and this step's largest value for later ones
        scale = quantizer.scale.float().reshape(())
        if quantizer.amax.numel():
            quantizer.amax.copy_(torch.maximum(quantizer.amax, amax.reshape(quantizer.amax.shape)))
    else:
        assert name == "Float8CurrentScalingQuantizer", name
        if quantizer.with_amax_reduction:
            torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, quantizer.amax_reduction_group)
        scale = torch.where(amax > 0, MAX[dtype] / amax.clamp(min=1e-30), torch.ones(()))
    data = _rounded(x, scale, dtype).view(torch.uint8)
    if out._data is not None:
        out._data.copy_(data.reshape(out._data.shape))
    if out._transpose is not None:
        out._transpose.copy_(data.reshape(-1, data.shape[-1]).t().reshape(out._transpose.shape))
        out._transpose_invalid = False
    out._scale_inv.copy_((1 / scale).reshape(out._scale_inv.shape))
    return out


def _block_values(x, quantizer, dtype):
    """x rounded in blocks of 128, or of 128 x 128."""
    flat = x.reshape(-1, x.shape[-1]).float()
    rows, columns = flat.shape
    padded = torch.nn.functional.pad(flat, (0, -columns % 128, 0, -rows % 128))
    blocks = padded.reshape(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
    amax = blocks.abs().amax((1, 3) if quantizer.block_scaling_dim == 2 else 3, keepdim=True)
    scale = torch.where(amax > 0, MAX[dtype] / amax.clamp(min=1e-30), torch.ones(()))
    if quantizer.force_pow_2_scales:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    values = _rounded(blocks, scale, dtype).float() / scale
    return values.reshape(padded.shape)[:rows, :columns].reshape(x.shape).to(x.dtype)


@counted
def fp8_transpose(data, dtype, out=None):
    transposed = data.reshape(-1, data.shape[-1]).t().contiguous()
    return transposed if out is None else out.copy_(transposed.reshape(out.shape))


def dequantize(tensor, dtype):
    return plain(tensor).to(twins.as_dtype(dtype))


@counted
def fused_amax_and_scale_update_after_reduction(reduced, histories, scales, algorithm, dtype, margin):
    start = 0
    for history, scale in zip(histories, scales, strict=True):
        history[0].copy_(reduced[start : start + history.shape[1]])
        start += history.shape[1]
        amax = history.max(0).values if algorithm == "max" else history[0].clone()
        history.copy_(torch.roll(history, -1, 0))
        history[0].zero_()
        fresh = MAX[TE_DType_To_Torch[dtype]] / amax / 2**margin
        scale.copy_(torch.where((amax > 0) & torch.isfinite(amax), fresh, scale))


def compute_amax(x, amax):
    if x.numel():
        amax.copy_(x.abs().max().reshape(amax.shape))


def compute_scale_and_scale_inv(chunk, flag, lists, largest, power_of_two, eps):
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(torch.where(amax > 0, largest / amax.clamp(min=1e-30), torch.ones(())))
        inverse.copy_(1 / scale)


@counted
def multi_tensor_adam_fp8(chunk, flag, lists, lr, b1, b2, eps, step, mode, bias_correction, decay, out_dtype):
    """Adam whose weights are rounded with a delayed scale, their largest value noted: in one kernel."""
    assert mode and bias_correction
    for grad, data, first, second, master, scale, amax, inverse in zip(*lists, strict=True):
        twins.adam(grad, master, first, second, master, lr, b1, b2, eps, step, decay)
        data.copy_(_rounded(master, scale, TE_DType_To_Torch[out_dtype]).view(torch.uint8).reshape(data.shape))
        amax.copy_(torch.maximum(amax, master.abs().max().reshape(amax.shape)))
        inverse.copy_(1 / scale)


def create_empty_quantized_tensor(quantizer, shape, dtype, device, pin_memory):
    *rest, last = shape
    sizes = dict(rowwise=list(shape) if quantizer.rowwise_usage else None)
    sizes["columnwise"] = [last, *rest] if quantizer.columnwise_usage else None
    data = {k: None if size is None else torch.zeros(size, dtype=torch.uint8) for k, size in sizes.items()}
    if type(quantizer).__name__ == "Float8BlockQuantizer":
        scales = {k: None if s is None else torch.zeros(quantizer.get_scale_shape(shape, k != "rowwise"))
                  for k, s in sizes.items()}  # fmt: skip
        fields = dict(rowwise_data=data["rowwise"], rowwise_scale_inv=scales["rowwise"], fp8_dtype=quantizer.dtype)
        fields |= dict(columnwise_data=data["columnwise"], columnwise_scale_inv=scales["columnwise"])
        fields |= dict(quantizer=quantizer, is_2D_scaled=quantizer.block_scaling_dim == 2)
        storage, tensor = Float8BlockwiseQTensorStorage, float8_blockwise_tensor.Float8BlockwiseQTensor
        place = {}
    else:
        fields = dict(data=data["rowwise"], data_transpose=data["columnwise"], fp8_scale_inv=torch.ones(1))
        fields |= dict(fp8_dtype=quantizer.dtype, quantizer=quantizer)
        storage, tensor, place = Float8TensorStorage, float8_tensor.Float8Tensor, dict(device=torch.device("cpu"))
    if quantizer.internal:
        return storage(fake_dtype=dtype, **fields)
    return tensor(shape=list(shape), dtype=dtype, **place, **fields)


def _install() -> None:
    twins.plain = plain
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # Hopper
    replace_everywhere(te_utils.get_device_compute_capability, lambda: (9, 0))
    for twin in (quantize, fp8_transpose, dequantize, fused_amax_and_scale_update_after_reduction, compute_amax):
        setattr(tex, twin.__name__, twin)
    replace_everywhere(tex.multi_tensor_adam_fp8, multi_tensor_adam_fp8)
    tex.multi_tensor_adam_fp8 = multi_tensor_adam_fp8
    if hasattr(tex, "create_empty_quantized_tensor"):  # not in Transformer Engine 2.11
        tex.create_empty_quantized_tensor = create_empty_quantized_tensor
    replace_everywhere(tensor_utils.multi_tensor_compute_scale_and_scale_inv, compute_scale_and_scale_inv)
    replace_everywhere(tensor_utils.multi_tensor_scale, twins.multi_tensor_scale)

    from fuserl_megatron.mcore import model

    model.check_fp8 = lambda *_: None


_install()
