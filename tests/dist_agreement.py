"""Worker of test_agreement.py: the trainer itself, whose second rank has another run directory or another package.

Arguments: run directory of the first rank, of the second, and the folder from which the second imports the package.
"""

import os
import runpy
import sys

if __name__ == "__main__":
    first, second, package_folder = sys.argv[1:]
    if os.environ["RANK"] == "1":
        sys.path.insert(0, package_folder)
    sys.argv = ["trainer", second if os.environ["RANK"] == "1" else first]
    runpy.run_module("megatron_sdpo.launch.trainer", run_name="__main__")
