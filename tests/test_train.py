"""A run that was stopped, killed or split differently ends with the same bits; what is broken is refused."""

import copy
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import estimate
import pytest
import reference
import torch
from helpers import ROOT, script, small_corpus

import diffusion
import model as M
import train
from configurator import Refused, configure, settings_of, write_manifest
from model import find_checkpoints, load_model, one_line, read_checkpoint, read_tensors, stored_tensors

TINY = dict(n_layer=2, n_head=2, n_kv_head=2, d_model=32, d_ff=48, seq_len=32, batch_size=4, global_batch=8,
            max_iters=40,
            warmup_iters=4, eval_interval=10, eval_windows=8, eval_draws=2, sample_tokens=8, log_interval=1,
            device='cpu', dtype='float32', learning_rate=3e-3, muon_lr=1e-2)
ONE = train.Processes(rank=0, world=1, device='cpu', bf16=False, sharded=False)


@pytest.fixture(scope='module')
def corpus_folder(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp('corpus') / 'small')


def settings(corpus_folder, out, **changes):
    return {**settings_of(vars(train)), **TINY, 'dataset': str(corpus_folder), 'out_dir': str(out), **changes}


def flags(config):
    return [f'--{k}={v}' for k, v in config.items()
            if k in TINY or k in ('dataset', 'out_dir', 'resume', 'causal', 'optimizer')]


def log_of(run):
    """The entries of the log, in order; of repeated ones the last counts."""
    entries = {}
    for e in train.read_log(run / 'log.jsonl'):
        if 'iter' in e:
            entries[e['iter'], 'loss' in e] = {k: v for k, v in e.items() if k != 'tokens_per_second'}
    return [entries[key] for key in sorted(entries, key=lambda key: (key[0], not key[1]))]


@pytest.fixture(scope='module')
def straight(corpus_folder, tmp_path_factory):
    """40 iterations without a break."""
    run = tmp_path_factory.mktemp('straight') / 'run'
    train.main(settings(corpus_folder, run))
    return run


def tensors(folder):
    """All that a step folder holds, by name."""
    read_checkpoint(folder)
    state = {name: torch.zeros(size) for name, size in stored_tensors(folder).items()}
    read_tensors(folder, state)
    return state


def same_tensors(folder, other):
    a, b = tensors(folder), tensors(other)
    assert a.keys() == b.keys() and {name.split('.')[0] for name in a} == {'model', 'optim'}
    assert all(torch.equal(a[name], b[name]) for name in a)


def same_end(run, straight):
    """Weights, optimizer and log are equal to the last bit."""
    same_tensors(run / 'iter_0000040', straight / 'iter_0000040')
    assert log_of(run) == log_of(straight)


def start(config):
    return subprocess.Popen([sys.executable, str(ROOT / 'train.py'), *flags(config)], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})


def wait_for(condition, process, seconds=180):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < end, process.communicate()
        time.sleep(0.01)


def test_the_loss_falls_and_the_run_is_complete(straight):
    log = log_of(straight)
    losses = [e['loss'] for e in log if 'loss' in e]
    bounds = [e['val_nats'] for e in log if 'val_nats' in e]
    assert len(losses) == 40 and len(bounds) == 4 and bounds[-1] < bounds[0] < 6
    assert [f.name for f in find_checkpoints(straight)] == ['iter_0000030', 'iter_0000040']
    first = json.loads((straight / 'log.jsonl').read_text().splitlines()[0])
    assert first['config']['max_iters'] == 40 and first['torch'] == torch.__version__ and first['parameters'] > 0
    assert all(len(e['sample']) > 0 for e in log if 'val_nats' in e)


def test_kill_and_resume(corpus_folder, straight, tmp_path):
    run = tmp_path / 'run'
    process = start(settings(corpus_folder, run))
    wait_for(lambda: (run / 'iter_0000020').exists(), process)
    process.kill()
    process.wait()
    with (run / 'log.jsonl').open('a') as f:
        f.write('{"iter": 21, "lo')                                 # as if cut in the middle of a line
    train.main(settings(corpus_folder, run, resume=True))
    same_end(run, straight)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_so(corpus_folder, straight, tmp_path, number):
    run = tmp_path / 'run'
    process = start(settings(corpus_folder, run))
    wait_for(lambda: (run / 'log.jsonl').exists() and (run / 'log.jsonl').read_text().count('\n') > 3, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.skip('the run was over before the signal came')
    assert process.returncode == 128 + number and 'saved iteration' in out
    assert '--resume' in out and 'Traceback' not in err
    train.main(settings(corpus_folder, run, resume=True))
    same_end(run, straight)


def test_a_damaged_checkpoint_is_passed_over(corpus_folder, straight, tmp_path, capsys):
    run = tmp_path / 'run'
    shutil.copytree(straight, run)
    raw = bytearray((run / 'iter_0000040' / '__0_0.distcp').read_bytes())
    raw[len(raw) // 2] ^= 1
    (run / 'iter_0000040' / '__0_0.distcp').write_bytes(raw)
    with pytest.raises(ValueError, match='damaged'):
        load_model(run)
    train.main(settings(corpus_folder, run, resume=True))
    assert 'passing over' in capsys.readouterr().err and (run / 'iter_0000040.damaged').exists()
    same_end(run, straight)
    load_model(run)


@pytest.mark.parametrize('damage', ['truncate', 'empty', 'gone', 'manifest'])
def test_damaged_checkpoints_are_refused(straight, tmp_path, damage):
    folder = tmp_path / 'iter_0000040'
    shutil.copytree(straight / 'iter_0000040', folder)
    file = folder / '__0_0.distcp'
    if damage == 'truncate':
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == 'empty':
        file.write_bytes(b'')
    elif damage == 'gone':
        file.unlink()
    else:
        (folder / 'manifest.json').write_text('{"format":')
    with pytest.raises(ValueError, match=str(folder)):
        load_model(folder)


HOSTILE = {
    'n_layer': lambda m: m['model'].update(n_layer=10 ** 9), 'no model': lambda m: m.update(model=None),
    'extra key': lambda m: m['model'].update(bias=True), 'theta': lambda m: m['model'].update(rope_theta='x'),
    'ids': lambda m: m['ids'].update(mask_id=99999), 'layers': lambda m: m['model'].update(n_layer=3),
    'width': lambda m: m['model'].update(d_model=64), 'vocab': lambda m: m['model'].update(vocab_size=10 ** 30),
    'format': lambda m: m.update(format='nanollada 9'), 'settings': lambda m: m.update(config={'x': 1}),
    'no settings': lambda m: m.pop('config'),
}


def sealed(folder, change=lambda manifest: None):
    """Changes the manifest of a folder, and gives everything in it the right checksum."""
    manifest = json.loads((folder / 'manifest.json').read_text())
    del manifest['sha256']
    change(manifest)
    write_manifest(folder, manifest)


@pytest.mark.parametrize('case', HOSTILE)
def test_hostile_manifests(straight, tmp_path, case):
    """Even with the right checksums."""
    folder = tmp_path / 'iter_0000040'
    shutil.copytree(straight / 'iter_0000040', folder)
    sealed(folder, HOSTILE[case])
    with pytest.raises(ValueError, match=str(folder)):
        load_model(folder)


def test_the_manifest_bears_its_own_checksum(straight, tmp_path):
    folder = tmp_path / 'iter_0000040'
    shutil.copytree(straight / 'iter_0000040', folder)
    text = (folder / 'manifest.json').read_text()
    (folder / 'manifest.json').write_text(text.replace('"rope_theta": 10000.0', '"rope_theta": 30000.0'))
    with pytest.raises(ValueError, match='manifest.json: damaged'):
        load_model(folder)


def test_a_hostile_table_with_the_right_checksum_is_refused(straight, tmp_path):
    """torch.distributed.checkpoint reads its table of contents by pickle: what it could run must not run."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'pwned'),)

    folder = tmp_path / 'iter_0000040'
    shutil.copytree(straight / 'iter_0000040', folder)
    (folder / '.metadata').write_bytes(pickle.dumps(Evil()))
    sealed(folder)
    with pytest.raises(ValueError, match='it asks for posix.mkdir'):
        load_model(folder)
    assert not (tmp_path / 'pwned').exists()


def test_members_of_an_enumeration_by_name_and_nothing_else_by_name():
    """Python 3.11.2 pickles them as a call of getattr, which must reach nothing but this enumeration."""
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    class ByName:
        def __init__(self, owner, name):
            self.owner, self.name = owner, name

        def __reduce__(self):
            return getattr, (self.owner, self.name)

    def read(what):
        return M._OnlyTensors(io.BytesIO(pickle.dumps(what))).load()

    member = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    assert read(ByName(_MEM_FORMAT_ENCODING, member.name)) is member
    for owner, name in ((torch.Size, 'mro'), ({}, 'pop'), ('', 'join')):
        with pytest.raises(ValueError, match=f'it asks for {name}'):
            read(ByName(owner, name))


def in_two(chunk, at, then):
    """A chunk cut at a row, the second part moved to another one."""
    first, second = copy.deepcopy(chunk), copy.deepcopy(chunk)
    first.sizes = torch.Size([at, *chunk.sizes[1:]])
    second.sizes = torch.Size([chunk.sizes[0] - at, *chunk.sizes[1:]])
    second.offsets = torch.Size([then, *chunk.offsets[1:]])
    return [first, second]


@pytest.mark.parametrize('damage', [
    lambda chunk: [], lambda chunk: in_two(chunk, 5, 5)[:1], lambda chunk: in_two(chunk, 5, 4),
    lambda chunk: in_two(chunk, 5, 6), lambda chunk: [chunk, chunk]], ids=['none', 'half', 'twice', 'gap', 'double'])
def test_a_table_that_lacks_a_part_of_a_tensor_is_refused(straight, tmp_path, damage):
    """Else uninitialised memory would become weights."""
    folder = tmp_path / 'iter_0000040'
    shutil.copytree(straight / 'iter_0000040', folder)
    with (folder / '.metadata').open('rb') as file:
        table = pickle.load(file)
    entry = table.state_dict_metadata['model.embed.weight']
    assert M.covers(entry.chunks, entry.size) and M.covers(in_two(entry.chunks[0], 5, 5), entry.size)
    entry.chunks = damage(entry.chunks[0])
    (folder / '.metadata').write_bytes(pickle.dumps(table))
    sealed(folder)
    with pytest.raises(ValueError, match='only parts of model.embed.weight'):
        load_model(folder)


def test_values_that_are_no_tensors_are_refused(straight, tmp_path):
    import torch.distributed.checkpoint as dcp
    folder = tmp_path / 'iter_0000040'
    shutil.copytree(straight / 'iter_0000040', folder)
    state = {**tensors(folder), 'model.norm.weight': {'a': 1}}      # would be read back by pickle
    with one_line(folder, 'test'):
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    sealed(folder)
    with pytest.raises(ValueError, match='not a table of tensors'):
        load_model(folder)


def test_a_full_disk_keeps_what_there_was(corpus_folder, tmp_path, monkeypatch, capsys):
    import torch.distributed.checkpoint as dcp
    real, saved = dcp.save, []

    def full(state, **options):
        saved.append(1)
        if len(saved) == 2:                                         # in the middle of the second checkpoint
            raise OSError(28, 'No space left on device')
        return real(state, **options)

    monkeypatch.setattr(dcp, 'save', full)
    with pytest.raises(SystemExit) as e:
        train.main(settings(corpus_folder, tmp_path / 'run'))
    err = capsys.readouterr().err
    assert e.value.code == 1 and 'No space left' in err and 'iter_0000010' in err
    assert not (tmp_path / 'run' / 'unfinished').exists()
    assert load_model(tmp_path / 'run')[1]['iteration'] == 10


def test_a_second_run_in_the_same_folder_is_refused(corpus_folder, tmp_path):
    pytest.importorskip('fcntl')
    with train.alone_in(tmp_path / 'run', ONE), pytest.raises(Refused, match='another process is at work here'):
        train.main(settings(corpus_folder, tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()                      # nothing came of either


def test_a_run_folder_that_is_taken_away_ends_the_run_in_one_line(corpus_folder, tmp_path, monkeypatch, capsys):
    real = train.report
    monkeypatch.setattr(train, 'report', lambda *args: shutil.rmtree(tmp_path / 'run') or real(*args))
    with pytest.raises(SystemExit) as e:
        train.main(settings(corpus_folder, tmp_path / 'run'))
    err = capsys.readouterr().err
    assert e.value.code == 1 and 'stopped: ' in err and 'unfinished' in err and err.count('\n') == 1


def test_who_lost_another_process_says_so_in_one_line(tmp_path, capsys):
    for error in (RuntimeError('[/gloo/transport/tcp/pair.cc:534] Connection closed by peer'),
                  torch.distributed.DistNetworkError('timeout')):
        with pytest.raises(SystemExit), train.last_words(tmp_path):
            raise error
        err = capsys.readouterr().err
        assert err.startswith('stopped: another process is gone (') and err.count('\n') == 1 and str(error)[-7:] in err
    with pytest.raises(RuntimeError, match='shapes'), train.last_words(tmp_path):
        raise RuntimeError('shapes do not fit')                 # a mistake in code keeps its traceback


@pytest.mark.parametrize('changes', [dict(count_form=False), dict(count_form=True), dict(causal=True),
                                     dict(random_length=0.3, random_split=0.4)], ids=str)
def test_the_batch_may_be_split_in_any_way(corpus_folder, changes):
    """1 x 8, 2 x 4 and 8 x 1, on 1, 2 or 4 processes, draw the same tokens and masks, and give the same gradient."""
    results = []
    for batch_size, world in ((8, 1), (4, 1), (2, 1), (1, 1), (4, 2), (2, 2), (2, 4), (1, 4)):
        cfg = SimpleNamespace(**settings(corpus_folder, 'x', batch_size=batch_size, global_batch=8, **changes))
        source, _, tok = train.open_data(cfg, ONE)
        model = small_model(tok, causal=cfg.causal)
        per_rank = [train.questions(source, 7, cfg, tok, replace(ONE, rank=r, world=world)) for r in range(world)]
        pieces = [rank[i] for i in range(len(per_rank[0])) for rank in per_rank]        # in the order of the rows
        assert len(pieces) * batch_size == 8
        for question in pieces:
            diffusion.weighted_loss(model, question).backward()
        drawn = [torch.cat([getattr(q, key) for q in pieces]) for key in ('ids', 'targets', 'weights')]
        results.append([*drawn, torch.cat([p.grad.flatten() for p in model.parameters()])])
    for other in results[1:]:
        for a, b in zip(results[0][:3], other[:3]):
            assert torch.equal(a, b)
        torch.testing.assert_close(results[0][3], other[3], atol=1e-5, rtol=1e-4)
    cfg = SimpleNamespace(**settings(corpus_folder, 'x', seed=5, **changes))
    source, _, tok = train.open_data(cfg, ONE)
    assert not torch.equal(train.questions(source, 7, cfg, tok, ONE)[0].ids, results[0][0][:4])


def small_model(tok, **changes):
    shape = dict(vocab_size=tok.vocab_size, seq_len=32, n_layer=2, n_head=2, n_kv_head=2, d_model=32, d_ff=48)
    return M.init_weights(M.Transformer(M.ModelConfig(**{**shape, **changes})), 0, 1.0)


def test_one_update_is_the_papers_loss(corpus_folder):
    """train_step with all its parts, against diffusion_loss on the whole batch."""
    cfg = SimpleNamespace(**settings(corpus_folder, 'x', batch_size=2, count_form=False, optimizer='adamw',
                                     complementary=False))
    source, _, tok = train.open_data(cfg, ONE)
    model = small_model(tok)
    x0, maskable, _ = source.batch(3, range(8), 8)
    t = diffusion.sample_t(8, cfg.mask_eps, True, diffusion.keyed_generator(cfg.seed, 3),
                           logit_normal=source.logit_normal)
    _, masked = diffusion.forward_process(x0, t, tok.mask_id, u=diffusion.row_noise(cfg.seed, 3, range(8), 32))
    want = diffusion.diffusion_loss(model, x0, maskable, tok.mask_id, t=t, masked=masked)
    plain = reference.plain_loss(model, x0, tok.mask_id, p_mask=t[:, None].expand(8, 32), masked=masked)
    assert want.item() == pytest.approx(plain.item(), rel=1e-5)     # the guideline's own loop says so too
    before = [p.clone() for p in model.parameters()]
    loss, norm = train.train_step(model, train.make_optimizers(model, cfg, 'cpu'),
                                  train.questions(source, 3, cfg, tok, ONE), 0.5, cfg, ONE)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5) and norm > 0
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before))


@pytest.mark.parametrize('changes', [
    {}, dict(count_form=False), dict(logit_normal=0.0), dict(random_split=0.5)], ids=str)
def test_what_one_mask_of_a_pair_hides_the_other_shows(corpus_folder, changes):
    """Both are masks as they would be drawn alone, hence the same objective; together they ask for every token."""
    cfg = SimpleNamespace(**settings(corpus_folder, '', **{'batch_size': 8, **changes}))
    source, _, tok = train.open_data(cfg, ONE)
    for it in range(5):
        question, = train.questions(source, it, cfg, tok, ONE)
        x0 = source.batch(it, range(8), 8).x0
        hidden = torch.zeros(256, dtype=torch.bool)
        hidden[question.rows] = True
        hidden = hidden.view(8, 32)
        assert torch.equal(x0[::2], x0[1::2]) and (hidden[::2] | hidden[1::2]).all()
        assert (hidden[::2] & hidden[1::2]).sum(1).max() <= 1           # the count is rounded up
        assert torch.equal(question.ids, torch.where(hidden, tok.mask_id, x0))
    assert len({tuple(row) for it in range(3) for row in source.batch(it, range(8), 8).x0.tolist()}) == 12


def test_counts_of_pairs_are_as_uniform_as_those_of_single_rows(corpus_folder):
    cfg = SimpleNamespace(**settings(corpus_folder, '', logit_normal=0.0, batch_size=8))
    source, _, tok = train.open_data(cfg, ONE)
    counts = [train.questions(source, it, cfg, tok, ONE)[0].rows.div(32, rounding_mode='floor').bincount(minlength=8)
              for it in range(250)]
    for parity in (0, 1):
        ranks = torch.stack(counts)[:, parity::2].flatten()
        assert ranks.min() >= 1 and ranks.max() == 32
        assert torch.histc(ranks.float(), 8, 0.5, 32.5).sub(125).abs().max() < 30       # five standard deviations


def test_a_cut_window_counts_as_much_as_a_whole_one(corpus_folder):
    """Alg. 1 divides each row by its own length: with weights of the count form every row's add up to 1/B."""
    cfg = SimpleNamespace(**settings(corpus_folder, '', random_length=0.5, batch_size=8))
    source, _, tok = train.open_data(cfg, ONE)
    question, = train.questions(source, 0, cfg, tok, ONE)
    assert source.batch(0, range(8), 8).maskable.sum(1).unique().numel() > 2
    sums = diffusion.sum_by_row(question.weights, question.rows // 32, 8)
    torch.testing.assert_close(sums, torch.full((8,), 1 / 8))


def test_evaluation_does_not_touch_training(corpus_folder, straight, tmp_path):
    train.main(settings(corpus_folder, tmp_path / 'run', eval_interval=40, eval_draws=1, sample_tokens=0))
    same_tensors(tmp_path / 'run' / 'iter_0000040', straight / 'iter_0000040')


@pytest.mark.parametrize('where', ['loss', 'gradient'])
def test_not_a_number_stops_before_the_update(corpus_folder, tmp_path, monkeypatch, capsys, where):
    real, calls = M.weighted_cross_entropy, []

    def sabotage(*args, **options):
        loss = real(*args, **options)
        if not torch.is_grad_enabled():
            return loss
        calls.append(1)
        if len(calls) == 2 * 24 + 1 and where == 'gradient':        # a finite loss
            loss.register_hook(lambda g: g * float('inf'))
        return loss * float('nan') if len(calls) > 2 * 24 and where == 'loss' else loss

    monkeypatch.setattr(M, 'weighted_cross_entropy', sabotage)
    with pytest.raises(SystemExit) as e:
        train.main(settings(corpus_folder, tmp_path / 'run'))
    err = capsys.readouterr().err
    assert e.value.code == 1 and 'no update was made' in err and 'iter_0000020' in err
    model, meta = load_model(tmp_path / 'run')
    assert meta['iteration'] == 20 and all(p.isfinite().all() for p in model.parameters())


def test_autoregressive_adamw_and_init_from(corpus_folder, tmp_path):
    run = tmp_path / 'ar'
    train.main(settings(corpus_folder, run, causal=True, optimizer='adamw', schedule='wsd', max_iters=10))
    model, meta = load_model(run)
    assert model.config.causal and meta['config']['optimizer'] == 'adamw'
    train.main(settings(corpus_folder, tmp_path / 'more', causal=True, init_from=str(run), max_iters=1, warmup_iters=0,
                        learning_rate=1e-12, muon_lr=1e-12))
    again, _ = load_model(tmp_path / 'more')
    for a, b in zip(model.parameters(), again.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize('causal', [False, True])
def test_bfloat16_from_training_to_sampling(corpus_folder, tmp_path, capsys, causal):
    """Under autocast the cache, the samplers and the evaluation meet two dtypes."""
    run = tmp_path / 'run'
    train.main(settings(corpus_folder, run, causal=causal, dtype='bfloat16', max_iters=10))
    script('sample', run, '--dtype=bfloat16', '--gen_length=8', '--prompt=the', '--prompt=a model')
    script('evaluate', 'bound', run, '--dtype=bfloat16', '--draws=2')
    if not causal:
        model, meta = load_model(run)
        x = torch.full((1, 16), meta['mask_id'])
        with torch.autocast('cpu', torch.bfloat16):
            out = diffusion.generate(model, x, meta['mask_id'], steps=16, block_length=4, cache='dual')
        assert not (out.x == meta['mask_id']).any()


def test_resume_takes_the_settings_of_the_run(corpus_folder, straight, tmp_path, capsys):
    """Whoever types --resume and a folder need not type the rest again; what is typed counts."""
    run = tmp_path / 'run'
    shutil.copytree(straight, run)
    script('train', '--resume', f'--out_dir={run}', '--max_iters=42')
    assert capsys.readouterr().err == 'resuming with another max_iters: 42, it was 40\n'
    script('train', f'--out_dir={run}', '--resume')             # whose settings now say 42
    assert 'iter    42 | validation' in capsys.readouterr().out
    script('train', '--resume', f'--out_dir={run}', '--max_iters=9')         # it is further already: nothing to do
    assert 'done: ' in capsys.readouterr().out
    (run / 'iter_0000042' / 'manifest.json').write_text('{}')   # passed over here as there
    script('train', '--resume', f'--out_dir={run}')
    assert (run / 'iter_0000042.damaged').is_dir() and '40 asked' not in capsys.readouterr().err


def test_resume_refuses_what_is_no_run_before_anything_is_made(straight, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(straight, tmp_path / 'run')
    sealed(tmp_path / 'run' / 'iter_0000040', lambda m: m['config'].update(batch_size='x'))
    (tmp_path / 'broken' / 'iter_0000001').mkdir(parents=True)
    (tmp_path / 'broken' / 'iter_0000001' / 'manifest.json').write_text('{"a": 1}')
    for name, says in (('tpyo', 'tpyo: no checkpoint to resume from'), ('run', "not a checkpoint (batch_size = 'x')"),
                       ('broken', 'iter_0000001/manifest.json: damaged')):
        with pytest.raises(SystemExit) as e:
            script('train', '--resume', f'--out_dir={name}')
        err = capsys.readouterr().err
        assert e.value.code == 2 and says in err and err.count('\n') == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ['broken', 'run']


def test_a_run_older_than_a_setting_goes_on_without_it(straight, tmp_path):
    shutil.copytree(straight, tmp_path / 'run')
    for step in find_checkpoints(tmp_path / 'run'):
        sealed(step, lambda m: m['config'].pop('complementary'))
    found = train.settings_of_run({**settings_of(vars(train)), 'resume': True, 'out_dir': str(tmp_path / 'run')})
    assert found['complementary'] is False and found['d_ff'] == 48 and 'out_dir' not in found


def test_what_is_set_on_resume_counts(corpus_folder, straight, tmp_path, capsys):
    run = tmp_path / 'run'
    shutil.copytree(straight, run)
    train.main(settings(corpus_folder, run, resume=True, max_iters=42, weight_decay=0.7, beta2=0.5))
    assert 'another weight_decay: 0.7, it was 0.1' in capsys.readouterr().err
    as_before = tmp_path / 'as_before'
    shutil.copytree(straight, as_before)
    train.main(settings(corpus_folder, as_before, resume=True, max_iters=42))
    a, b = tensors(run / 'iter_0000042'), tensors(as_before / 'iter_0000042')
    assert not torch.equal(a['model.blocks.0.ff.up.weight'], b['model.blocks.0.ff.up.weight'])      # Muon's decay
    assert not torch.equal(a['optim.embed.weight.exp_avg_sq'], b['optim.embed.weight.exp_avg_sq'])  # AdamW's beta2


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(corpus_folder, tmp_path):
    """Half a minute of compiling; needs a C++ compiler on CPU."""
    for name, compiled in (('eager', False), ('compiled', True)):
        train.main(settings(corpus_folder, tmp_path / name, compile=compiled, max_iters=10))
    eager, compiled = ([e['loss'] for e in log_of(tmp_path / name) if 'loss' in e] for name in ('eager', 'compiled'))
    assert eager == pytest.approx(compiled, rel=1e-4)
    load_model(tmp_path / 'compiled')                               # no trace of the compiler in the names


def test_learning_rates_at_every_corner():
    cfg = SimpleNamespace(schedule='cosine', warmup_iters=10, max_iters=110, min_lr_ratio=0.1, decay_iters=20)
    at = [train.lr_factor(i, cfg) for i in range(111)]
    assert at[0] == pytest.approx(0.1) and at[9] == 1.0 and at[10] == 1.0
    assert at[60] == pytest.approx(0.55) and at[110] == pytest.approx(0.1)
    cfg.schedule = 'wsd'
    at = [train.lr_factor(i, cfg) for i in range(111)]
    assert at[0] == pytest.approx(0.1) and at[10] == at[90] == 1.0
    assert at[100] == pytest.approx(0.55) and at[110] == pytest.approx(0.1)


PAPER = {'llada_1b': (1_487_243_264, 969_246_720), 'llada_8b': (8_015_581_184, 6_979_588_096),
         'arm_1b': (1_487_243_264, 969_246_720), 'arm_7b': (6_834_851_840, 5_798_858_752),
         'illada_8b': (7_615_025_152, 6_979_588_096)}


def paper(name):
    return SimpleNamespace(**configure(settings_of(vars(train)), [str(ROOT / 'config' / f'{name}.py')]))


@pytest.mark.parametrize('name', PAPER)
def test_configs_have_the_parameter_counts_of_the_papers(name):
    cfg = paper(name)
    train.check(cfg, 1)
    with torch.device('meta'):
        model = M.Transformer(M.ModelConfig(cfg.vocab_size, **{f: getattr(cfg, f) for f in train.SHAPE}))
    assert (model.num_params(), model.num_params(non_embedding=True)) == PAPER[name]
    assert cfg.causal == name.startswith('arm') and cfg.logit_normal == 0 and not cfg.count_form or cfg.causal


def test_the_papers_learning_rates_at_every_corner():
    def lr(cfg, tokens):
        return cfg.learning_rate * train.lr_factor(tokens // (cfg.global_batch * cfg.seq_len) - 1, cfg)

    cfg = paper('llada_8b')
    step = cfg.global_batch * cfg.seq_len
    assert step == 5_242_880 and cfg.max_iters == 438_690
    for tokens, want in ((step, 2e-7), (1000 * step, 2e-4), (2000 * step, 4e-4), (1e12, 4e-4), (1.2e12 - step, 4e-4),
                         (1.2e12 + 2 * step, 1e-4), (1.9e12, 1e-4), (2.15e12, 5.5e-5), (2.3e12, 1e-5)):
        assert lr(cfg, int(tokens)) == pytest.approx(want, rel=1e-4), tokens
    cfg = paper('illada_8b')
    step = cfg.global_batch * cfg.seq_len
    for tokens, want in ((2000 * step, 2e-4), (9.9e12, 2e-4), (11e12, (2e-4 + 5e-6) / 2), (12e12, 5e-6)):
        assert lr(cfg, int(tokens)) == pytest.approx(want, rel=1e-3), tokens
    assert train.lr_at(5, [[0, 0.0], [10, 1.0]]) == 0.5 and train.lr_at(10, [[0, 0.0], [10, 1.0]]) == 1.0
    assert train.lr_at(10, [[0, 0.0], [10, 1.0], [10, 3.0]]) == 3.0                     # a jump: the later rate counts
    assert train.lr_at(99, [[0, 0.0], [10, 1.0]]) == 1.0


@pytest.mark.parametrize('gpus, fits', [(8, True), (64, True), (320, True), (1, False)])
def test_an_estimate_for_8b(capsys, gpus, fits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    estimate.main({**settings_of(estimate.NAMESPACE), **vars(paper('llada_8b')), 'gpus': gpus})
    out = capsys.readouterr().out
    assert '8,015,581,184' in out and ('fits into 80 GiB' in out) == fits and not list(tmp_path.iterdir())
    assert '438,690 updates' in out and f'{gpus} GPUs x {320 // gpus} passes x 4 windows' in out
    total = float(re.search(r'([\d.]+) GB +on each', out).group(1))
    by_hand = {8: 73.9, 64: 59.8, 320: 58.2}        # 128.2 / GPUs + 4.7 + 5.2 + 10 * 32 * 16384 * 4096 * 2 / 1e9 + 5
    assert not fits or abs(total - by_hand[gpus]) < 1.5


def test_256_gpus_do_not_divide_the_papers_batch():
    with pytest.raises(Refused, match='1280 windows do not divide into 256 processes x batch_size 4'):
        estimate.main({**settings_of(estimate.NAMESPACE), **vars(paper('llada_8b')), 'gpus': 256})


def test_a_vocabulary_wider_than_the_tokenizer(corpus_folder, tmp_path):
    """LLaDA's head has rows that stand for no token: they are trained away, and never shown."""
    train.main(settings(corpus_folder, tmp_path / 'run', vocab_size=400, max_iters=2, eval_interval=2))
    model, meta = load_model(tmp_path / 'run')
    assert model.config.vocab_size == 400 and meta['mask_id'] < 264
    sample = next(e['sample'] for e in log_of(tmp_path / 'run') if 'sample' in e)
    assert not re.search(r'<\|\d+\|>', sample)


def test_recomputing_changes_nothing(corpus_folder, straight, tmp_path):
    train.main(settings(corpus_folder, tmp_path / 'run', act_memory=0.0))
    same_tensors(tmp_path / 'run' / 'iter_0000040', straight / 'iter_0000040')


def test_packed_training_equals_separate_training(corpus_folder):
    """A batch with cuts: loss and gradients are those of its segments, each run alone."""
    cfg = SimpleNamespace(**settings(corpus_folder, 'x', batch_size=8, random_length=0.4, random_split=0.5))
    source, _, tok = train.open_data(cfg, ONE)
    model = small_model(tok)
    question, = train.questions(source, 3, cfg, tok, ONE)
    loss = diffusion.weighted_loss(model, question)
    loss.backward()
    packed = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    ids, rows, targets, weights, cu_seqlens = question
    total, flat, borders = 0.0, ids.flatten(), cu_seqlens.tolist()
    assert len(set(borders)) > 12
    for a, b in zip(borders, borders[1:]):
        mine = (rows >= a) & (rows < b)
        if a < b and mine.any():
            part = model(flat[None, a:b], rows=rows[mine] - a, targets=targets[mine], weights=weights[mine])
            part.backward()
            total += part.item()
    assert loss.item() == pytest.approx(total, rel=1e-5)
    for p, want in zip(model.parameters(), packed):
        torch.testing.assert_close(p.grad, want, atol=1e-6, rtol=1e-4)
    assert weights.min() >= 1 / 8 / 32 - 1e-9


def test_a_resumed_run_measures_anew_what_lies_ahead(straight):
    """An older log may know later iterations, of other settings perhaps: it counts up to the checkpoint only."""
    log = train.Log(straight / 'log.jsonl', 20, train.Processes(1, 2, 'cpu', False, False))
    assert {entry['iter'] for entry in log.lines if 'iter' in entry} == set(range(1, 21))


def test_a_damaged_line_of_the_log_is_said(tmp_path, capsys):
    log = tmp_path / 'log.jsonl'
    log.write_text('{"iter": 1}\n{"iter": 2, "lo\n{"iter": 3}\n{"it')
    assert train.read_log(log) == [{'iter': 1}, {'iter': 3}]
    assert capsys.readouterr().err == f'{log}:2: not a line of a log, passed over\n'


def test_reports_do_not_swallow_losses(corpus_folder, tmp_path):
    """Lines of the log are means over all updates since the last, also when a checkpoint lies between them."""
    train.main(settings(corpus_folder, tmp_path / 'each', max_iters=12, eval_interval=4))
    train.main(settings(corpus_folder, tmp_path / 'six', max_iters=12, eval_interval=4, log_interval=6))
    each, six = ([e['loss'] for e in log_of(tmp_path / run) if 'loss' in e] for run in ('each', 'six'))
    assert six == pytest.approx([sum(each[:6]) / 6, sum(each[6:]) / 6], rel=1e-5)


@pytest.mark.parametrize('changes, says', [
    (dict(lr_points=[[0, 1.0], [5, 'x']], schedule='points'), 'in order of tokens'),
    (dict(schedule='points'), 'lr_points goes with'),
    (dict(lr_points=[[5, 1.0], [0, 1.0]], schedule='points'), 'in order of tokens'),
    (dict(random_split=1.5), 'random_split must be in'), (dict(max_iters=10 ** 7), 'below 10^7'),
    (dict(random_split=0.6, random_length=0.5), 'shares of the same windows'),
    (dict(causal=True, random_length=0.1), 'are for diffusion'),
    (dict(vocab_size=5), 'vocab_size must hold'),
    (dict(n_layer=9000, d_model=10 ** 4), 'GB for n_layer'), (dict(vocab_size=10 ** 9), 'GB for n_layer'),
    (dict(batch_size=90000, global_batch=90000, seq_len=20, d_model=4096), 'batch_size x seq_len'),
    (dict(global_batch=10 ** 9), 'global_batch must be below'), (dict(eval_draws=10 ** 46), 'eval_draws must be'),
    (dict(fsdp=2), 'do not divide 1 processes'), (dict(global_batch=10), '10 windows do not divide'),
    (dict(batch_size=7, global_batch=7), 'an update of 7 windows is odd'),
    (dict(batch_size=0), 'batch_size must be above 0'), (dict(optimizer='sgd'), "optimizer must be one of"),
    (dict(beta2=1.0), 'beta2'), (dict(n_head=3), 'd_model / n_head'), (dict(seq_len=10 ** 6), 'too short'),
    (dict(dataset='no/such'), 'no data set here'),
    (dict(device='cuda'), "'cuda' is not available"), (dict(resume=True), 'no checkpoint to resume from'),
    (dict(init_from='no/such'), 'no checkpoint here'), (dict(dataset='shakespeare'), 'python data.py shakespeare'),
])
def test_bad_settings(corpus_folder, tmp_path, monkeypatch, changes, says):
    if changes.get('device') == 'cuda' and torch.cuda.is_available():
        pytest.skip('there is a GPU here')
    monkeypatch.chdir(tmp_path)
    with pytest.raises((Refused, OSError), match=re.escape(says)):
        train.main(settings(corpus_folder, tmp_path / 'run', **changes))
    assert not (tmp_path / 'run').exists()


def test_force(corpus_folder):
    giant = SimpleNamespace(**settings(corpus_folder, 'out', n_layer=9000, d_model=10 ** 4, n_head=1, n_kv_head=1))
    config = M.ModelConfig(vocab_size=300, **{name: getattr(giant, name) for name in train.SHAPE})
    with pytest.raises(Refused, match='--force'):
        train.refuse_giants(config, giant, ONE)
    giant.force = True
    train.refuse_giants(config, giant, ONE)


def test_what_a_config_file_says_cannot_steer_the_terminal(corpus_folder, tmp_path, capsys):
    train.main(settings(corpus_folder, tmp_path / 'run', max_iters=2, then='\x1b]0;evil\x07 go'))
    out = capsys.readouterr().out
    assert ']0;evil go' in out and not {'\x1b', '\x07'} & set(out)


def test_without_a_terminal_the_first_line_comes_at_once(corpus_folder, tmp_path, capsys):
    train.main(settings(corpus_folder, tmp_path / 'run', max_iters=25, log_interval=2, eval_interval=50))
    lines = [line.split(' |')[0] for line in capsys.readouterr().out.splitlines() if line.startswith('iter ')]
    assert lines[:2] == ['iter 2/25', 'iter 20/25']


def test_a_refusal_is_one_line_and_a_mistake_keeps_its_traceback(corpus_folder, tmp_path):
    """A learner's wrong formula must show its file and line; what the user typed wrong must not."""
    (tmp_path / 'broken').mkdir()
    for name in ('configurator', 'data', 'model', 'diffusion', 'train'):
        shutil.copy(ROOT / f'{name}.py', tmp_path / 'broken')
    file = tmp_path / 'broken' / 'diffusion.py'
    file.write_text(file.read_text().replace('weight = 1 / t ', 'weight = 1 / t[:, None, None] '))
    for folder, more, code, says in ((ROOT, ['--batch_size=0'], 2, 'batch_size must be above 0'),
                                     (ROOT, ['--dataset=no/such'], 2, 'no/such: no data set here'),
                                     (tmp_path / 'broken', ['--count_form=false'], 1, 'diffusion.py", line')):
        config = settings(corpus_folder, tmp_path / 'run')
        done = subprocess.run([sys.executable, 'train.py', *flags(config), *more], cwd=folder, capture_output=True,
                              text=True)
        assert done.returncode == code and says in done.stderr, done.stderr
        assert ('Traceback' in done.stderr) == (code == 1) == (done.stderr.count('\n') > 1)


def test_a_run_is_not_overwritten_and_another_architecture_is_refused(corpus_folder, straight):
    for changes, says in ((dict(), 'already holds a run'),
                          (dict(resume=True, d_ff=64), 'another architecture (d_ff 48 here, 64 asked)')):
        with pytest.raises(Refused, match=re.escape(says)):
            train.main(settings(corpus_folder, straight, **changes))
    assert (straight / 'iter_0000040').exists()


# ------------------------------------------------------------------------------------------ sample.py and evaluate.py


def test_bounds_side_by_side(corpus_folder, straight, tmp_path, capsys):
    train.main(settings(corpus_folder, tmp_path / 'ar', causal=True, max_iters=10))
    capsys.readouterr()
    script('evaluate', 'bound', straight, tmp_path / 'ar', '--draws=4', '--dtype=float32')
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and '<=' in lines[1] and ' = ' in lines[2] and 'autoregressive' in lines[2]
    script('evaluate', 'bound', straight, '--draws=4', '--dtype=float32', '--batch_size=3')     # however it is batched
    again = capsys.readouterr().out.splitlines()
    assert abs(float(again[1].split()[4]) - float(lines[1].split()[4])) < 2e-4
    with pytest.raises(SystemExit) as e:
        script('evaluate', 'bound')
    assert e.value.code == 2
    with pytest.raises(SystemExit):
        script('evaluate', 'bound', straight, '--split=test')
    assert "split must be one of train, val" in capsys.readouterr().err
