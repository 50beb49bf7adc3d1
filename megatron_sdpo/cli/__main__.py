"""``python -m megatron_sdpo.cli``: the same as ``megatron-sdpo``."""

from megatron_sdpo.cli import main

if __name__ == "__main__":
    main()
