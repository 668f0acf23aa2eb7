"""`python -m bitllm`."""

import runpy

runpy.run_module("bitllm_core", run_name="__main__", alter_sys=True)
