"""What torchrun does for a run of a test, without its start: one process has imported torch, all others fork from it.

A module of its own, because train.py reads its rank when it is imported.
"""

import multiprocessing
import os
import socket
import sys


def one_rank(rank, n, port, cfg):
    """Be process `rank` of n, whose output goes to a file beside the run."""
    log = os.open(f'{cfg.out_dir}.log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n),
        MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    import torch

    import train
    torch.set_num_threads(1)
    train.main(cfg)
    sys.exit(0)


def run_ranks(n, cfg):
    """Run train.main on n processes -> their exit codes."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['torch', 'torch.distributed.fsdp', 'torch.distributed.checkpoint', 'jinja2'])
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=one_rank, args=(rank, n, port, cfg)) for rank in range(n)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        process.kill()                                      # only if it hangs
    return [process.exitcode for process in ranks]
