"""What is handed to the writer of a checkpoint."""

import pytest
import torch

from megatron_sdpo.mcore.background_save import own_storage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_part_of_a_tensor_becomes_a_storage_without_a_copy(dtype: torch.dtype) -> None:
    whole = torch.arange(24).to(dtype).view(6, 4)
    part = own_storage(whole[2:5])
    assert part.untyped_storage().nbytes() == part.nbytes == 12 * dtype.itemsize
    assert (part.dtype, part.shape) == (dtype, (3, 4))
    whole[3, 1] = 99
    assert torch.equal(part, whole[2:5])


def test_what_has_its_own_storage_or_gaps_stays_as_it_is() -> None:
    whole = torch.arange(6.0).view(2, 3)
    gaps = whole[:, :2]
    assert own_storage(whole) is whole
    assert own_storage(gaps) is gaps
    scalar = own_storage(whole[1, 2])
    assert (scalar.shape, scalar.item()) == ((), 5.0)
