"""torchrun, unmodified, as a process that does not outlive the one that started it."""

from torch.distributed.run import main

from megatron_sdpo.rollout import lifeline

if __name__ == "__main__":
    lifeline.tie_to_parent()
    main()
