"""What Transformer Engine brings along, shown without it: its tensors in checkpoints, its state, its kernels on a CPU.

tests/rehearsal shows the same with the real package.
"""

import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from fuserl_megatron.checkpoint.reader import DistReader
from fuserl_megatron.mcore import checkpoint, cpu, precision, saving
from fuserl_megatron.train.saver import FAULT, Saver

ALONE = SimpleNamespace(rank=0, world_size=1, is_main=True, device=torch.device("cpu"))


class Quantized(torch.Tensor):
    """As Transformer Engine's weights in 8 bits: a subclass that `cpu()` keeps and that numpy refuses."""

    def dequantize(self):
        return self.as_subclass(torch.Tensor) * 2

    def numpy(self, *_args, **_kwargs):
        raise RuntimeError(".numpy() is not supported for tensor subclasses.")


@pytest.fixture
def alone():
    """Collectives of one rank."""
    same = dict(from_all_ranks=lambda value: [value], from_main_rank=lambda value, _device: value)
    gather = mock.patch.object(saving.dist, "gather_object", lambda value, into, dst: into.__setitem__(0, value))
    with mock.patch.multiple(saving, **same), gather:
        yield


def saved(tmp_path, tensor, background=False):
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    state = {"w": ShardedTensor.from_rank_offsets("w", tensor)}
    with mock.patch.object(saving, "save_preprocess", lambda _: (state, {"iteration": 1})):  # which asks the ranks
        return saving.Saving(ALONE, state, tmp_path, 1, {}, background)


@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_weights_in_8_bits_are_saved_as_plain_numbers(alone, tmp_path, background):
    values = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    with mock.patch.object(precision, "is_float8tensor", lambda t: isinstance(t, Quantized)):
        folder = saved(tmp_path, values.as_subclass(Quantized), background).publish(keep=1)
    out = torch.empty(2, 3, dtype=torch.bfloat16)
    with DistReader(folder) as reader:
        reader.read_region("w", (0, 0), out)
    assert torch.equal(out, 2 * values)


@pytest.mark.parametrize("error, by_disk", [(OSError(28, "No space left"), True), (RuntimeError("a mistake"), False)])
def test_only_a_disk_is_blamed_for_what_a_disk_did(alone, tmp_path, capsys, error, by_disk):
    with mock.patch.object(saving.DistWriter, "write", side_effect=error):
        saving_ = saved(tmp_path, torch.ones(2))
        with pytest.raises(saving.NotWritten) as caught:
            saving_.publish(keep=1)
        assert caught.value.by_disk == by_disk and not list(tmp_path.iterdir())
        saver = Saver.__new__(Saver)
        saver.engine, saver.root, saver.saved, saver._failed = SimpleNamespace(layout=ALONE), tmp_path, 0, None
        saver.params, saver._tries = SimpleNamespace(save_retries=0), 1
        saver._retry(saving_, caught.value)
    said = capsys.readouterr().out + saver.failure()
    assert ("is the disk full?" in said and "make room" in said) == by_disk
    assert (said.count(FAULT) == 2) != by_disk


def test_pickled_state_is_allowed_for_the_load_alone(monkeypatch):
    name = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
    for before in (None, "0"):
        monkeypatch.delenv(name, raising=False) if before is None else monkeypatch.setenv(name, before)
        with pytest.raises(ZeroDivisionError), checkpoint._extra_state_is_vetted():
            assert os.environ[name] == "1"
            raise ZeroDivisionError
        assert os.environ.get(name) == before


def test_a_load_allows_pickled_state_only_after_the_files_were_checked():
    seen = []
    name = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
    chunk = SimpleNamespace(
        sharded_state_dict=lambda metadata: {}, load_state_dict=lambda state: seen.append(os.environ.get(name))
    )
    target = SimpleNamespace(chunks=[chunk])
    with (
        mock.patch.object(checkpoint, "_metadata", dict),
        mock.patch.object(checkpoint, "from_all_ranks", lambda value: [value]),
        mock.patch.object(checkpoint, "load_state", lambda *_: seen.append(os.environ.get(name)) or {"model": {}}),
    ):
        checkpoint.load(target, "folder")
    assert seen == [None, "1"]


def test_largest_values_of_uninitialised_memory_are_forgotten():
    parameter = torch.nn.Parameter(torch.empty(2))
    parameter._quantizer = SimpleNamespace(amax=torch.full((1,), torch.nan))
    precision.fill(parameter, torch.ones(2))
    assert parameter._quantizer.amax.item() == 0 and torch.equal(parameter.detach(), torch.ones(2))


def test_core_takes_none_of_its_kernels_on_the_cpu():
    """As if core had been imported where Transformer Engine is installed: all that it took from there is undone."""
    import megatron.core.optimizer as chooser
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as mixed

    def kernel(*_args, **_kwargs):
        raise RuntimeError("Found no NVIDIA driver on your system")

    taken = {
        chooser: dict(Adam=kernel, SGD=kernel, USING_PYTORCH_OPTIMIZER=False),
        distrib_optimizer: dict(Adam=kernel, HAVE_APEX_OR_TE=True, USING_TE_OPTIMIZER=True),
        mixed: dict(multi_tensor_applier=kernel, multi_tensor_scale_impl=kernel),
        clip_grads: dict(
            multi_tensor_applier=kernel, l2_norm_impl=kernel, multi_tensor_scale_impl=kernel,
            multi_tensor_scale_tensor_impl=kernel,
        ),
    }  # fmt: skip
    before = {(module, name): getattr(module, name, None) for module, names in taken.items() for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chooser, "multi_tensor_applier", None, raising=False)
        patch.setattr(distrib_optimizer, "multi_tensor_applier", None, raising=False)
        for module, names in taken.items():
            for name, value in names.items():
                patch.setattr(module, name, value, raising=False)
        cpu._use_torch_optimizer()
        for (module, name), value in before.items():
            assert getattr(module, name) is value, (module.__name__, name)
