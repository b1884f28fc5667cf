"""One command run by several processes: `torchrun --nproc-per-node 2 -m actmaps fit ...`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from .cli_options import console


@contextmanager
def joined_ranks(device: str | None) -> Iterator[tuple[str | None, bool]]:
    """Join the processes that torchrun or `accelerate launch` started beside this one; all but the first are silent.

    Yields:
        The device of this process, and whether it is the first, which writes the files. A process on its own gets `device`.

    Raises:
        ValueError: if `device` is of a kind that the processes do not get.
        ChildProcessError: if another process fails, with its message.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device, True
        return
    import torch
    from accelerate import PartialState

    from .maps.ranks import RankError

    # Where nothing but a processor can join others, accelerate wants to be told: else every process takes itself for the first.
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    state = PartialState(cpu=device == "cpu" or accelerator is None or accelerator.type == "mps")
    console.quiet = not state.is_main_process
    try:
        if device is not None and device.split(":")[0] != state.device.type:
            raise ValueError(f"--device {device}, but this process was started for {state.device}")
        yield str(state.device), state.is_main_process
    except RankError as error:
        raise ChildProcessError(str(error)) from error
    finally:
        console.quiet = False
        state.destroy_process_group()
