"""pytest with nbval on one notebook; in a warm process the kernel is a fork of that, too."""

import os
import sys


def main(arguments):
    warm = sys.modules.get("tests.warm")
    fork = warm and warm.Fork()  # now, while there is nothing of pytest or of a front end in it

    import pytest
    from jupyter_client.provisioning import local_provisioner

    def launch(command, env=None, cwd=None, **options):
        nonlocal fork
        words = [word for word in command if not word.startswith("-X")]
        if fork and words[:3] == [sys.executable, "-m", "ipykernel_launcher"]:
            ready, fork = fork, None
            return ready.become(words[1:], cwd, {**env, "JPY_PARENT_PID": str(os.getpid())})
        return launch_kernel(command, env=env, cwd=cwd, **options)

    launch_kernel, local_provisioner.launch_kernel = local_provisioner.launch_kernel, launch
    return pytest.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
