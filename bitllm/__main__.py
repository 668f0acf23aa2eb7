"""`python -m bitllm COMMAND`."""

from bitllm.cli import main
from bitllm_core import exit_with

if __name__ == "__main__":
    exit_with(main())
