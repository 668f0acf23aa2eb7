"""`python -m bitllm COMMAND`."""

import sys

from bitllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
