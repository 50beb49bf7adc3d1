"""Mixtures of experts: Megatron's layer, also where all tensor ranks hold the same tokens."""

from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class _SumGradient(torch.autograd.Function):
    """The tensor as it is; its gradient summed over a group.

    Megatron's function of this kind returns a gradient that is not contiguous, as that of the router's probabilities,
    without having summed it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _summed(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    """The tensor summed over a group; its gradient as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class Experts(MoELayer):
    """Megatron's mixture of experts, which takes the tokens of tensor ranks for different ones.

    Without sequence parallelism they are the same: Megatron would send each token to its experts once a rank, and
    refuses to train so. Here each rank then sends all tokens through its slices of the experts and the outputs are
    summed, as a dense MLP does; where ranks divide the experts (``expert_parallel``), those with the same slices
    exchange tokens. With sequence parallelism, or one tensor rank, this is Megatron's layer.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        groups = pg_collection or get_default_pg_collection()
        super().__init__(config, submodules, layer_number, groups)
        self.same_tokens = groups.tp.size() > 1 and not config.sequence_parallel
        if self.same_tokens:
            self.token_dispatcher = MoEAlltoAllTokenDispatcher(
                self.num_local_experts,
                self.local_expert_indices,
                config,
                # None: a group of one. What each tensor rank's experts make of the tokens is not exchanged here.
                ProcessGroupCollection(ep=groups.ep, expt_tp=None, tp_ep=groups.ep),
            )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """``[T, 1, H] -> [T, 1, H]``, and no bias."""
        if not self.same_tokens:
            return cast("tuple[Tensor, None]", super().forward(hidden_states, *args, **kwargs))
        if self.moe_layer_recompute:  # as Megatron's forward does
            return cast(Tensor, checkpoint(self._of_same_tokens, False, hidden_states)), None
        return self._of_same_tokens(hidden_states), None

    def _of_same_tokens(self, hidden_states: Tensor) -> Tensor:
        probs, routing_map = self.route(hidden_states)
        # Every rank's slices of the experts give a part of both gradients.
        hidden_states, probs = (_SumGradient.apply(x, self.tp_group) for x in (hidden_states, probs))
        tokens, probs = self.dispatch(*self.preprocess(hidden_states, probs, routing_map))
        output, _ = self.routed_experts_compute(tokens, probs)
        output = self.postprocess(self.combine(output), None)
        return cast(Tensor, _Sum.apply(output, self.tp_group))


def with_experts(layer: Any) -> None:
    """Put ``Experts`` into a layer's submodules (of a layer spec), in place of Megatron's class."""
    given: ModuleSpec = layer.mlp
    # Not a ModuleSpec: Megatron would warn, in every layer, of a class that it does not know.
    layer.mlp = SimpleNamespace(module=Experts, submodules=given.submodules, params=given.params)
