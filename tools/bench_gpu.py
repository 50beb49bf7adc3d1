"""Numbers of one GPU: TFLOP/s and ratios within one run. Results belong in tools/BENCHMARKS.md.

    python tools/bench_gpu.py [SECTION ...] [--json FILE] [--limit SECONDS]

Sections run one after another, each in a process of its own (see tools/gpu_check.py). ``divergences`` of
tools/bench_divergence.py has the loss on the last layer: ``--device cuda --dtype bfloat16 --hidden 4096``.
"""

import argparse
import sys
from pathlib import Path

from gpu_check import check, within

SECTIONS = {
    **{name: f"gpu_sections.speed:{name}" for name in ("ceilings", "quantisation", "ema")},
    **{name: f"gpu_sections.last_layer:{name}" for name in ("head", "support")},
    "stack": "gpu_sections.speed:stack",
    "sharing": "gpu_sections.speed:sharing",
    "profile": "gpu_sections.kernels:layers_by_kernel",
    "publish": "gpu_sections.publishing:publish",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--limit", type=float, default=240.0)
    parser.add_argument("--within", metavar="SECTION", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.within:
        within(SECTIONS[arguments.within], arguments.json)
        return
    if unknown := set(arguments.sections) - SECTIONS.keys():
        parser.error(f"there is no section {sorted(unknown)[0]}; there are {', '.join(SECTIONS)}")
    arguments.jobs = 1
    sys.exit(check(arguments.sections or list(SECTIONS), SECTIONS, arguments, __file__))


if __name__ == "__main__":
    main()
