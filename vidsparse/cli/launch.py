"""Starting the command once for each GPU, by what torchrun itself calls."""

from __future__ import annotations

import logging
import sys
import uuid

from vidsparse.errors import ConfigError, OutOfMemory


def check_gpus(count: int, device: str) -> None:
    """Fail before any work where the machine has fewer GPUs.

    Raises:
        ConfigError: one sentence.
    """
    import torch

    if device == "cpu":
        raise ConfigError(
            f"--num-gpus {count} and --device cpu contradict each other; on the CPU start {count} processes with "
            f"`torchrun --nproc-per-node {count} -m vidsparse.cli generate --ulysses-degree {count} …`."
        )
    have = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if have < count:
        raise ConfigError(f"--num-gpus {count} was asked for, but this machine has {have or 'no'} usable GPU(s).")


def launch(arguments: list[str], count: int, verbose: bool = False) -> int:
    """Run `vidsparse` with these arguments in `count` processes; returns the exit code of the first that fails, or 0.

    Raises:
        OutOfMemory: a process was killed from outside.
        KeyboardInterrupt: the user stopped it.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if not verbose:
        # The processes say themselves what went wrong.
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "vidsparse.cli", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            # The process had no time to say anything.
            raise OutOfMemory(
                f"Process {rank} of {count} was ended by signal {-failure.exitcode}; the machine's memory may have run "
                "out."
            ) from error
        return failure.exitcode
    except SignalException as error:
        raise KeyboardInterrupt from error
    return 0
