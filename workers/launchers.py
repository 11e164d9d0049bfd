"""What starts the processes of a rank group: one function for each launcher, which gives its command line.

A rank is `python -m workers.ranks` with these arguments; the last of them, the address of the executor, comes later.
"""

import sys

from omnirt_tasks.registry import Launcher
from workers.ranks import RankArguments

RANK = ("-m", "workers.ranks")


def command(launcher: Launcher, ranks: int, arguments: RankArguments) -> list[str]:
    """The command line of a group, but for the address at its end."""
    return [*_STARTS[launcher](ranks), *RANK, *arguments.as_words()]


def python(ranks: int) -> list[str]:
    """One process, and no torch."""
    assert ranks == 1, "several ranks need a launcher that starts them"
    return [sys.executable]


def torchrun(ranks: int) -> list[str]:
    """Processes of this host; the first that dies ends all, and none is started again: that is the executor's to do."""
    alone = ("--standalone", "--local-addr=127.0.0.1", "--max-restarts=0", f"--nproc-per-node={ranks}")
    return [sys.executable, "-m", "torch.distributed.run", *alone]


def accelerate(ranks: int) -> list[str]:
    """As torchrun, by Accelerate's launcher; what is said here goes before what a person has configured for it."""
    alone = ("--multi_gpu", "--gpu_ids=all", "--num_machines=1", "--main_process_port=0", "--max_restarts=0")
    plain = ("--mixed_precision=no", "--dynamo_backend=no", f"--num_processes={ranks}")
    return [sys.executable, "-m", "accelerate.commands.launch", *alone, *plain]


_STARTS = {Launcher.PYTHON: python, Launcher.TORCHRUN: torchrun, Launcher.ACCELERATE: accelerate}
