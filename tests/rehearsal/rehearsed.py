"""What the ranks of the rehearsal run: the product's own steps, on Transformer Engine's layers and optimizers."""

# isort: off
import twins
import twin_attention  # noqa: F401
import twins_fp8  # noqa: F401
# isort: on

import dataclasses
import shutil
from pathlib import Path

import torch
from fusion_case import loss_and_gradients, make_config

from fuserl_megatron.mcore import model as model_module

_real_spec = model_module._layer_spec


def use_layers(te: bool) -> None:
    """Transformer Engine's layers, or core's own, for every model from now on."""
    model_module._layer_spec = lambda shape, _use_te: _real_spec(shape, te)


def one_by_one() -> None:
    """Gloo's coalesced all-gather mixes buffers of bytes and of bf16 up (NCCL does not): gather each by itself."""
    import megatron.core.distributed.param_and_grad_buffer as buffers

    def gather(out, mine, group=None, async_op=False, **_):
        parts = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(parts, mine.clone(), group=group)
        out.copy_(torch.cat(parts))

    buffers.dist_all_gather_func = gather


def config_of(paths, objective, directory="unused", *, model=None, optim=None, async_save=False, **settings):
    defaults = dict(share="on", seq_length=256, results_dir=str(directory))
    config = make_config(paths, objective, **defaults | settings)
    manager = config.exp_manager
    params = dataclasses.replace(manager.checkpoint_callback_params, async_save=async_save)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **model or {}),
        optim=dataclasses.replace(config.optim, **optim or {}),
        exp_manager=dataclasses.replace(manager, checkpoint_callback_params=params),
    )


def gradients(config, reference_dir, backend="sdpa"):
    """Of one step, and how often each twin was called for it."""
    use_layers(True)
    model_module.choose_backend = lambda *_: backend
    twins.CALLS.clear()
    loss, _, norm, grads, *_ = loss_and_gradients(config, reference_dir)
    return loss, norm, grads, dict(twins.CALLS)


def parameters(config, te):
    """Names with shapes and tensor-parallel marks, and the keys that a checkpoint would hold."""
    from fuserl_megatron.mcore import checkpoint, parallel
    from fuserl_megatron.train import feed

    use_layers(te)
    config, shape, _ = feed.open_run(config, [config.data.path])
    layout = parallel.initialize(config.model, config.trainer)
    target = model_module.build_model(shape, config.model, layout, torch.bfloat16)
    found = {
        name: (tuple(p.shape), getattr(p, "tensor_model_parallel", False), getattr(p, "partition_dim", -1))
        for name, p in target.chunks[0].named_parameters()
    }
    state = checkpoint._state(target, None, is_loading=False)["model"]
    return found, sorted(state)


def training(config, te=True):
    """Losses by step, and the checkpoints that were written."""
    from test_resume_and_export import losses, run

    use_layers(te)
    if config.model.fp8_params:
        one_by_one()
    code = run(config)
    directory = Path(config.run.results_dir)
    assert code == 0, code
    seen = losses(directory)
    return [seen[step] for step in sorted(seen)], sorted(p.name for p in (directory / "checkpoints").glob("iter_*"))


def without_the_last_checkpoint(directory) -> None:
    """As a run looks that was killed in its third step."""
    shutil.rmtree(Path(directory) / "checkpoints" / "iter_0000003")
    (Path(directory) / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2\n")
    shutil.rmtree(Path(directory) / "hf", ignore_errors=True)
    (Path(directory) / "metrics.jsonl").unlink()
