"""Run the trainer module of one argument in the run directory of another, under the launcher, without engines.

Arguments: run directory (with config.json), module. Ends as the command line would.
"""

import sys
from pathlib import Path

from megatron_sdpo import config as configuration
from megatron_sdpo.launch.local import Program, RoleDied, run_locally
from megatron_sdpo.launch.run_dir import RunDir

if __name__ == "__main__":
    run_dir = RunDir(Path(sys.argv[1]))
    try:
        run_locally(configuration.load(run_dir.config), run_dir, Program("no coordinator", sys.argv[2], "trainer"))
    except RoleDied as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
