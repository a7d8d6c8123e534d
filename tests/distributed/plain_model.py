"""A Hugging Face model on the ranks of a layout and rows of tokens, without a data set: for what model, weights and
conversion do alone."""

import torch


def load_engine(directory, tp=1, pp=1, vpp=None, dtype=torch.float32, **model_fields):
    """This rank's part of the model in `directory`, ready to score."""
    from fuserl_megatron.config.schema import ModelConfig, TrainerConfig
    from fuserl_megatron.convert.hf_config import read_config
    from fuserl_megatron.mcore import parallel, step, weights
    from fuserl_megatron.mcore.model import build_model

    model = ModelConfig(
        path=directory,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        **model_fields,
    )
    layout = parallel.initialize(model, TrainerConfig())
    target = build_model(read_config(directory), model, layout, dtype)
    weights.load_hf_weights(target, directory, layout)
    return step.Engine(
        target=target, layout=layout, loss=None, metric_names=(), source_names=["a"], logprob_chunk_size=17
    )


def batch_of_rows(rows_BT):
    """A sequence a row; every token but the first is scored."""
    from fuserl_megatron.data.batch import PackedBatch

    B, S = rows_BT.shape[0], rows_BT.shape[1] - 1
    ids, one = torch.zeros(B, S, dtype=torch.int64), torch.ones(B, dtype=torch.int64)
    return PackedBatch(
        tokens_BS=rows_BT[:, :-1].contiguous(), labels_BS=rows_BT[:, 1:].contiguous(),
        positions_BS=torch.arange(S).expand(B, -1).contiguous(), segment_ids_BS=ids, parent_ids_BS=ids,
        sequence_ids_BS=torch.arange(B)[:, None].expand(-1, S).contiguous(), lengths_N=one * S,
        weights_N=one.double(), source_ids_N=one * 0, prompt_ids_N=torch.arange(B), response_ids_N=torch.arange(B),
        chosen_index_P=one[:0], rejected_index_P=one[:0], pair_weights_P=one[:0].double(), pair_source_ids_P=one[:0],
    )  # fmt: skip
