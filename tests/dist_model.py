"""Worker of test_mcore_model.py: one layout under torchrun, every checkpoint that it is given.

Arguments: tensor_parallel pipeline_parallel folder checkpoint-names. Reads folder/NAME and folder/inputs.pt; writes,
under folder/tpTppP/NAME, logits.pt, perturbed.pt, the exported model (export/) and the gradients exported like one
(gradients/).
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sdpo.config import LayoutConfig
from megatron_sdpo.fused import Head, fused_loss, scored
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.mcore.groups import ParallelGroups, initialize, shutdown
from megatron_sdpo.mcore.hf import load_hf, save_hf
from megatron_sdpo.mcore.model import HiddenStatesModel, build_model, chunks_of
from megatron_sdpo.mcore.modules import packed_rows

CHUNK = 24
"""Tokens that meet the head at one time; those of the documents make two chunks and a piece."""


def run(
    model: Any, bare: HiddenStatesModel, groups: ParallelGroups, documents: list[Tensor], weights_TV: Tensor | None
) -> Tensor | None:
    """One packed micro-batch through the pipeline schedule; the whole logits on the last stage.

    With ``weights_TV`` backward runs too, of ``(logits * weights).sum()``.
    """
    from megatron.core import tensor_parallel
    from megatron.core.pipeline_parallel import get_forward_backward_func

    ids = torch.cat(documents)[None]
    seen: list[Tensor] = []

    def step(batches: Iterator[int], model: Any) -> tuple[Tensor, Any]:
        next(batches)
        rows = packed_rows([len(document) for document in documents], ids.device)
        hidden = model(ids, None, None, packed_seq_params=rows)

        def loss(output: Tensor, non_loss_data: bool = False) -> Any:
            hidden_TH, head = output[:, 0], Head(bare.head(), group=groups.tensor, chunk=CHUNK)
            (logits_TV,) = scored(hidden_TH, head, lambda logits_CV, _: (logits_CV,))
            seen.append(tensor_parallel.gather_from_tensor_model_parallel_region(logits_TV))
            if weights_TV is None:
                return torch.zeros(1), {}
            mine_TV = weights_TV.chunk(groups.tensor_size, 1)[groups.tensor_rank]
            loss, _ = fused_loss(hidden_TH, head, lambda logits_CV, rows: ((logits_CV * mine_TV[rows]).sum(), None))
            return loss, {}

        return hidden, loss

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([0]),
        model=model,
        num_microbatches=1,
        seq_length=ids.shape[1],
        micro_batch_size=1,
        forward_only=weights_TV is None,
    )
    return seen[0] if seen else None


def gradients(bare: HiddenStatesModel, groups: ParallelGroups, documents: list[Tensor], weights_TV: Tensor) -> None:
    """Replace every weight by its gradient, as training would see it (reduced over the groups that share it)."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    config = bare.config
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), bare)
    config.finalize_model_grads_func = finalize_model_grads
    run(wrapped, bare, groups, documents, weights_TV)
    with torch.no_grad():
        for parameter in bare.parameters():
            parameter.copy_(parameter.main_grad)


def check(source: Path, out: Path, inputs: dict[str, Any], groups: ParallelGroups, layout: LayoutConfig) -> None:
    hf = read_hf_config(source)
    (model,) = chunks_of(build_model(hf, layout, groups, torch.float32))
    load_hf(model, source, groups, layout)
    with torch.no_grad():
        plain, perturbed = (run(model, model, groups, inputs[key], None) for key in ("documents", "perturbed"))
    if groups.is_last_stage and groups.tensor_rank == 0:
        out.mkdir(parents=True)
        torch.save(plain, out / "logits.pt")
        torch.save(perturbed, out / "perturbed.pt")
    torch.distributed.barrier()

    save_hf(model, out / "export", groups, layout, source)
    save_hf(model, out / "export", groups, layout, source, shard_bytes=20_000)  # replaces the first, several files
    again = build_model(hf, layout, groups, torch.float32)
    load_hf(again, out / "export", groups, layout)
    for (name, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name

    gradients(model, groups, inputs["documents"], inputs["weights_TV"])
    save_hf(model, out / "gradients", groups, layout, source)


def main() -> None:
    tp, pp = int(sys.argv[1]), int(sys.argv[2])
    folder = Path(sys.argv[3])
    layout = LayoutConfig(tensor_parallel=tp, pipeline_parallel=pp, world_size=tp * pp)
    groups = initialize(layout, seed=0, timeout_s=60)
    inputs = torch.load(folder / "inputs.pt")
    for name in sys.argv[4:]:
        check(folder / name, folder / f"tp{tp}pp{pp}" / name, inputs, groups, layout)
    shutdown()


if __name__ == "__main__":
    main()
