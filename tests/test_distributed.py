"""Several processes are one run: two to four processes on the CPU, against one process."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from ranks import run_ranks
from test_train import PAPER, flags, log_of, settings, tensors, wait_for

import data
import model as models
import train

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == 'win32', reason='needs gloo')
needs_ps = pytest.mark.skipif(shutil.which('ps') is None, reason='needs ps')
SMALL = dict(
    PAPER, batch_size=2, global_batch=8, max_iters=20, log_interval=1, eval_interval=10, eval_windows=9,
    eval_draws=1, sample_tokens=4, learning_rate=3e-3, warmup_iters=5, keep_last=5)


def start(n, cfg, *more):
    """Start train.py by torchrun on n processes. What they say goes to a file."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={n}', *more,
               str(ROOT / 'train.py'), *flags(cfg), f'--keep_last={cfg.keep_last}']
    with open(f'{cfg.out_dir}.log', 'w') as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)


def end_of(process, cfg):
    """Wait for torchrun -> its exit code, what it said."""
    return process.wait(timeout=300), Path(f'{cfg.out_dir}.log').read_text()


def on_ranks(n, cfg):
    """Train on n processes, without the seconds that torchrun takes -> what they said."""
    codes = run_ranks(n, cfg)
    said = Path(f'{cfg.out_dir}.log').read_text()
    assert codes == [0] * n, said[-3000:]
    return said


def same_losses(run, other, rel=1e-5):
    """All losses, norms and bounds agree."""
    a, b = log_of(run), log_of(other)
    assert a.keys() == b.keys() and len(a) == 22
    for key, entry in a.items():
        for name in entry.keys() & {'loss', 'grad_norm', 'val_nats'}:
            tolerance = max(1e-4, 10 * rel) if name == 'grad_norm' else rel
            assert entry[name] == pytest.approx(b[key][name], rel=tolerance), (key, name)


def same_bits(run, other, checkpoint='iter_0000020'):
    a, b = tensors(run / checkpoint), tensors(other / checkpoint)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def same_weights(run, other):
    for p, q in zip(models.load_model(run)[0].parameters(), models.load_model(other)[0].parameters()):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope='module')
def one(corpus, tmp_path_factory):
    """20 iterations on one process."""
    run = tmp_path_factory.mktemp('one') / 'run'
    train.main(settings(corpus, run, **SMALL))
    return run


@pytest.fixture(scope='module')
def sharded(corpus, tmp_path_factory):
    """20 iterations of FSDP on two processes."""
    run = tmp_path_factory.mktemp('fsdp') / 'run'
    on_ranks(2, settings(corpus, run, **SMALL, fsdp=-1))
    return run


# ------------------------------------------------------------------------------------- N processes are one


def test_fsdp_equals_one_process_which_reads_its_checkpoint(one, sharded):
    same_losses(sharded, one)
    same_weights(sharded, one)
    assert models.load_model(sharded)[1]['iteration'] == 20


@pytest.mark.parametrize('n, changes', [
    (2, dict(fsdp=0)), (4, dict(fsdp=2)),
    pytest.param(2, dict(fsdp=-1, act_memory=0.0), marks=pytest.mark.slow)], ids=str)
def test_ddp_and_hsdp_equal_one_process(corpus, one, tmp_path, n, changes):
    said = on_ranks(n, settings(corpus, tmp_path / 'run', **SMALL, **changes))
    same_losses(tmp_path / 'run', one)
    assert said.count('saved iteration 20') == 1 and f'{n} processes' in said       # only rank 0 speaks


# random lengths and borders, with a tied head and grouped queries, as iLLaDA has them
CUT = dict(SMALL, random_length=0.4, random_split=0.4, tied=True, n_kv_head=1)
TALKS = dict(SMALL, masking='response', seq_len=256, pad_group=8)


@pytest.mark.parametrize('changes', [
    CUT, TALKS, pytest.param(dict(CUT, compile=True), marks=pytest.mark.slow)],
    ids=['cut', 'talks', 'compiled'])
def test_rows_of_unequal_length_on_two_processes_equal_one(corpus, tmp_path, changes):
    """The loss is normalised over the global batch, wherever short rows fall. (The last needs a C++ compiler.)"""
    if changes is TALKS:
        corpus = tmp_path / 'talks'
        talks = [{'messages': [{'role': role, 'content': f'{role} {i} {k} ' * (i % 3 + 1)} for k in range(2)
                               for role in ('user', 'assistant')]} for i in range(60)]
        data.prepare([list(enumerate(talks))], corpus, 'bytes', val_every=5)
    train.main(settings(corpus, tmp_path / 'one', **{**changes, 'compile': False}))
    on_ranks(2, settings(corpus, tmp_path / 'two', **changes, fsdp=-1))
    same_losses(tmp_path / 'two', tmp_path / 'one')


def test_narrow_parameters_with_wide_gradients(corpus, one, tmp_path):
    """FSDP in bfloat16: forward and backward in narrow copies, weights, reductions and updates in float32."""
    on_ranks(2, settings(corpus, tmp_path / 'run', **SMALL, fsdp=-1, dtype='bfloat16'))
    same_losses(tmp_path / 'run', one, rel=2e-2)
    assert all(p.dtype == torch.float32 for p in models.load_model(tmp_path / 'run')[0].parameters())


# ----------------------------------------------------------------------------------- stopped and continued


def half(run, target, checkpoint='iter_0000020'):
    """Copy a run without its last checkpoint, as if it had been stopped before."""
    shutil.copytree(run, target)
    shutil.rmtree(target / checkpoint)
    return target


def test_other_processes_take_over(corpus, one, sharded, tmp_path):
    train.main(settings(corpus, half(sharded, tmp_path / 'a'), **SMALL, resume=True))           # 2 -> 1
    on_ranks(2, settings(corpus, half(one, tmp_path / 'b'), **SMALL, fsdp=-1, resume=True))     # 1 -> 2
    on_ranks(4, settings(corpus, half(sharded, tmp_path / 'c'), **SMALL, resume=True))      # FSDP 2 -> DDP 4
    for name in 'abc':
        same_losses(tmp_path / name, one)


def test_the_same_processes_continue_to_the_same_bits(corpus, sharded, tmp_path):
    on_ranks(2, settings(corpus, half(sharded, tmp_path / 'run'), **SMALL, fsdp=-1, resume=True))
    same_bits(sharded, tmp_path / 'run')


@pytest.mark.slow
@pytest.mark.parametrize('fsdp', [0, -1])
def test_four_processes_continue_to_the_same_bits(corpus, tmp_path, fsdp):
    """Of four summands the order counts: DDP must add up after a restart as in the middle of a run."""
    short = {**SMALL, 'max_iters': 8, 'eval_interval': 4, 'fsdp': fsdp}
    on_ranks(4, settings(corpus, tmp_path / 'a', **short))
    run = half(tmp_path / 'a', tmp_path / 'b', 'iter_0000008')
    on_ranks(4, settings(corpus, run, **short, resume=True))
    same_bits(tmp_path / 'a', run, 'iter_0000008')


def children(pid):
    out = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(pid)], capture_output=True, text=True).stdout
    return [int(x) for x in out.split()]


def killed_and_restarted(corpus, run, kills, iters):
    """Kill one of two processes `kills` times. torchrun starts them anew, from the last checkpoint."""
    cfg = settings(corpus, run, **dict(SMALL, max_iters=iters, eval_interval=5))
    process = start(2, cfg, f'--max-restarts={kills}')
    for k in range(kills):
        wait_for((run / f'iter_{5 * (k + 1):07d}').exists, process)
        victims = children(process.pid)
        assert len(victims) == 2
        os.kill(victims[k % 2], signal.SIGKILL)
        time.sleep(0.5)
    code, said = end_of(process, cfg)
    assert code == 0, said[-20000:]


@needs_ps
def test_a_killed_process_is_replaced(corpus, tmp_path):
    train.main(settings(corpus, tmp_path / 'straight', **dict(SMALL, max_iters=30, eval_interval=5)))
    killed_and_restarted(corpus, tmp_path / 'run', 1, 30)
    same_weights(tmp_path / 'straight', tmp_path / 'run')


@pytest.mark.slow
@needs_ps
def test_ten_kills_end_with_the_same_bits(corpus, tmp_path):
    on_ranks(2, settings(corpus, tmp_path / 'straight', **dict(SMALL, max_iters=120, eval_interval=5)))
    killed_and_restarted(corpus, tmp_path / 'run', 10, 120)
    same_bits(tmp_path / 'straight', tmp_path / 'run', 'iter_0000120')


def test_sharded_weights_begin_as_those_of_another_run(corpus, one, tmp_path):
    slow = dict(SMALL, max_iters=1, warmup_iters=0, learning_rate=1e-12, init_from=str(one))
    on_ranks(2, settings(corpus, tmp_path / 'run', **slow, fsdp=-1))
    same_weights(tmp_path / 'run', one)


def test_all_processes_stop_together_and_save(corpus, tmp_path):
    run = tmp_path / 'run'
    cfg = settings(corpus, run, **dict(SMALL, max_iters=5000, eval_interval=5000))
    process = start(2, cfg)
    wait_for(lambda: 'iter 10/' in Path(f'{run}.log').read_text(), process)
    process.send_signal(signal.SIGTERM)
    _, said = end_of(process, cfg)
    assert 'saved iteration' in said and len(models.list_checkpoints(run)) == 1
    models.load_model(run)
