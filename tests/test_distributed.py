"""Several processes are one run: real torchrun, two to four processes on the CPU, against a single process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, small_corpus
from test_train import PAPER, flags, settings, tensors

import data
import model as M
import train

pytestmark = pytest.mark.skipif(not torch.distributed.is_available() or sys.platform == 'win32',
                                reason='needs torch.distributed with gloo')
SMALL = dict(PAPER, batch_size=2, global_batch=8, max_iters=20, log_interval=1, eval_interval=10, eval_windows=9,
             eval_draws=1, sample_tokens=4, learning_rate=3e-3, warmup_iters=5, keep_last=5)


@pytest.fixture(scope='module')
def corpus_folder(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp('corpus') / 'small')


EXTRA = ('fsdp', 'act_memory', 'keep_last', 'masking', 'pad_group', 'random_length', 'random_split', 'tied', 'compile')


def command(n, cfg, *more):
    asked = [f'--{name}={getattr(cfg, name)}' for name in EXTRA]
    return [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={n}', *more,
            str(ROOT / 'train.py'), *flags(cfg), *asked]


def torchrun(n, cfg, *more, code=0):
    """Run train.py on n processes -> what it said."""
    done = subprocess.run(command(n, cfg, *more), cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert (done.returncode == 0) == (code == 0), done.stderr[-3000:]
    return done.stdout + done.stderr


def losses(run):
    lines = [json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()]
    return {(e['iter'], key): e[key] for e in lines for key in ('loss', 'grad_norm', 'val_nats') if key in e}


def same_losses(run, other, rel=1e-5):
    a, b = losses(run), losses(other)
    assert a.keys() == b.keys() and len(a) == 42
    for key, value in a.items():
        assert value == pytest.approx(b[key], rel=rel if key[1] != 'grad_norm' else max(1e-4, 10 * rel)), key


@pytest.fixture(scope='module')
def one(corpus_folder, tmp_path_factory):
    run = tmp_path_factory.mktemp('one') / 'run'
    train.main(settings(corpus_folder, run, **SMALL))
    return run


@pytest.fixture(scope='module')
def sharded(corpus_folder, tmp_path_factory):
    """20 iterations of FSDP on two processes."""
    run = tmp_path_factory.mktemp('fsdp') / 'run'
    torchrun(2, settings(corpus_folder, run, **SMALL, fsdp=-1))
    return run


def test_fsdp_equals_one_process(one, sharded):
    same_losses(sharded, one)


def test_fine_tuning_on_two_processes_equals_one(tmp_path):
    """Rows of unequal length (Eq. 5): padded to the longest of their group, on whatever process."""
    talks = [{'messages': [{'role': r, 'content': f'{r} {i} {k} ' * (i % 3 + 1)} for k in range(2)
                           for r in ('user', 'assistant')]} for i in range(60)]
    data.prepare([list(enumerate(talks))], tmp_path / 'talks', 'bytes', val_every=5)
    asked = {**SMALL, 'masking': 'response', 'seq_len': 256, 'pad_group': 8}
    train.main(settings(tmp_path / 'talks', tmp_path / 'one', **asked))
    torchrun(2, settings(tmp_path / 'talks', tmp_path / 'two', **asked, fsdp=-1))
    same_losses(tmp_path / 'two', tmp_path / 'one')


@pytest.mark.parametrize('n, changes', [
    (2, dict(fsdp=0)), (4, dict(fsdp=2)),
    pytest.param(2, dict(fsdp=-1, act_memory=0.0), marks=pytest.mark.slow)], ids=str)
def test_ddp_and_hsdp_equal_one_process(corpus_folder, one, tmp_path, n, changes):
    said = torchrun(n, settings(corpus_folder, tmp_path / 'run', **SMALL, **changes))
    same_losses(tmp_path / 'run', one)
    assert said.count('saved iteration 20') == 1 and f'{n} processes' in said                    # only rank 0 speaks


def test_unequal_lengths_on_the_processes(corpus_folder, tmp_path):
    """Random lengths and splits: the loss is normalised over the global batch, wherever the short windows fall.

    With a tied head and grouped queries, as iLLaDA has them.
    """
    cut = dict(SMALL, random_length=0.4, random_split=0.4, tied=True, n_kv_head=1)
    train.main(settings(corpus_folder, tmp_path / 'one', **cut))
    torchrun(2, settings(corpus_folder, tmp_path / 'two', **cut, fsdp=-1))
    same_losses(tmp_path / 'two', tmp_path / 'one')


@pytest.mark.slow
def test_compiled_blocks_under_fsdp(corpus_folder, tmp_path):
    """Each block compiled, then sharded, on windows cut at random; needs a C++ compiler on CPU."""
    cut = dict(SMALL, random_length=0.2, random_split=0.4)
    train.main(settings(corpus_folder, tmp_path / 'one', **cut))
    torchrun(2, settings(corpus_folder, tmp_path / 'two', **cut, fsdp=-1, compile=True))
    same_losses(tmp_path / 'two', tmp_path / 'one')


def test_narrow_parameters_with_wide_gradients(corpus_folder, one, tmp_path):
    """FSDP in bfloat16: forward and backward in narrow copies, weights, reductions and updates in float32."""
    torchrun(2, settings(corpus_folder, tmp_path / 'run', **SMALL, fsdp=-1, dtype='bfloat16'))
    same_losses(tmp_path / 'run', one, rel=2e-2)
    assert all(p.dtype == torch.float32 for p in M.load_model(tmp_path / 'run')[0].parameters())


def half(run, target):
    """A copy of a run that was stopped at iteration 10."""
    shutil.copytree(run, target)
    shutil.rmtree(target / 'iter_0000020')
    return target


def test_one_process_takes_over_from_fsdp_and_back(corpus_folder, one, sharded, tmp_path):
    train.main(settings(corpus_folder, half(sharded, tmp_path / 'a'), **SMALL, resume=True))        # 2 -> 1
    same_losses(tmp_path / 'a', one)
    torchrun(2, settings(corpus_folder, half(one, tmp_path / 'b'), **SMALL, fsdp=-1, resume=True))   # 1 -> 2
    same_losses(tmp_path / 'b', one)
    torchrun(4, settings(corpus_folder, half(sharded, tmp_path / 'c'), **SMALL, resume=True))        # FSDP 2 -> DDP 4
    same_losses(tmp_path / 'c', one)


def test_resuming_on_the_same_processes_gives_the_same_bits(corpus_folder, sharded, tmp_path):
    torchrun(2, settings(corpus_folder, half(sharded, tmp_path / 'run'), **SMALL, fsdp=-1, resume=True))
    a, b = tensors(sharded / 'iter_0000020'), tensors(tmp_path / 'run' / 'iter_0000020')
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
@pytest.mark.parametrize('fsdp', [pytest.param(0, id='ddp'), pytest.param(-1, id='fsdp')])
def test_four_processes_resume_to_the_same_bits(corpus_folder, tmp_path, fsdp):
    """Of four summands the order counts: DDP must add up after a restart as it does in the middle of a run."""
    short = {**SMALL, 'max_iters': 8, 'eval_interval': 4, 'fsdp': fsdp}
    torchrun(4, settings(corpus_folder, tmp_path / 'a', **short))
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    shutil.rmtree(tmp_path / 'b' / 'iter_0000008')
    torchrun(4, settings(corpus_folder, tmp_path / 'b', **short, resume=True))
    a, b = tensors(tmp_path / 'a' / 'iter_0000008'), tensors(tmp_path / 'b' / 'iter_0000008')
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_one_process_reads_a_sharded_checkpoint(one, sharded):
    model, meta = M.load_model(sharded)
    plain, _ = M.load_model(one)
    assert meta['iteration'] == 20
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def children(pid):
    out = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(pid)], capture_output=True, text=True).stdout
    return [int(x) for x in out.split()]


def killed_and_restarted(corpus_folder, run, kills, iters=60):
    """Kills one of two processes `kills` times; torchrun starts them anew, and they go on from the last checkpoint."""
    config = settings(corpus_folder, run, **dict(SMALL, max_iters=iters, eval_interval=5))
    with open(f'{run}.log', 'w') as log:
        process = subprocess.Popen(command(2, config, f'--max-restarts={kills}'), cwd=ROOT, stdout=log, stderr=log,
                                   env={**os.environ, 'OMP_NUM_THREADS': '1'})
    for k in range(kills):
        want, end = run / f'iter_{5 * (k + 1):07d}', time.time() + 120
        while not want.exists():
            assert process.poll() is None and time.time() < end
            time.sleep(0.01)
        victims = children(process.pid)
        assert len(victims) == 2
        os.kill(victims[k % 2], signal.SIGKILL)
        time.sleep(0.5)
    assert process.wait(timeout=300) == 0, open(f'{run}.log').read()[-20000:]


@pytest.mark.skipif(shutil.which('ps') is None, reason='needs ps')
def test_a_killed_process_is_replaced(corpus_folder, tmp_path):
    train.main(settings(corpus_folder, tmp_path / 'straight', **dict(SMALL, max_iters=60, eval_interval=5)))
    killed_and_restarted(corpus_folder, tmp_path / 'run', 1)
    a, b = (M.load_model(tmp_path / name)[0] for name in ('straight', 'run'))
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('ps') is None, reason='needs ps')
def test_ten_kills_end_with_the_same_bits(corpus_folder, tmp_path):
    torchrun(2, settings(corpus_folder, tmp_path / 'straight', **dict(SMALL, max_iters=120, eval_interval=5)))
    killed_and_restarted(corpus_folder, tmp_path / 'run', 10, iters=120)
    a, b = (tensors(tmp_path / name / 'iter_0000120') for name in ('straight', 'run'))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_all_processes_stop_together_and_save(corpus_folder, tmp_path):
    run = tmp_path / 'run'
    config = settings(corpus_folder, run, **dict(SMALL, max_iters=5000, eval_interval=5000))
    process = subprocess.Popen(command(2, config), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    end = time.time() + 120
    while not ((run / 'log.jsonl').exists() and (run / 'log.jsonl').read_text().count('\n') > 10):
        assert process.poll() is None and time.time() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert 'saved iteration' in said and len(M.list_checkpoints(run)) == 1
    M.load_model(run)


def test_what_does_not_divide_is_said_once_and_in_words(corpus_folder, tmp_path):
    said = torchrun(2, settings(corpus_folder, tmp_path / 'run', **dict(SMALL, batch_size=8)), code=2)
    assert said.count('global_batch 8 must divide into 2 processes of batch_size 8') == 1
    assert not (tmp_path / 'run').exists()
