"""`python -m fuserl_megatron.cli`, as torchrun and srun call it."""

import sys

from fuserl_megatron.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
