"""A run that was stopped, killed or split differently ends with the same bits, and it trains what the paper says."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import reference
import torch
from helpers import ROOT, script, small_corpus
from safetensors.torch import load_file

import data
import diffusion
import model as M
import train
from configurator import UserError, configure

TINY = dict(n_layer=2, n_head=2, n_kv_head=2, d_model=32, d_ff=48, seq_len=32, batch_size=4, global_batch=8,
            max_iters=40, warmup_iters=4, eval_interval=10, eval_windows=8, eval_draws=2, sample_tokens=8,
            log_interval=1, device='cpu', dtype='float32', learning_rate=3e-3, muon_lr=1e-2, optimizer='muon',
            complementary=True, logit_normal=0.5, fixed_count=True)
PAPER = dict(optimizer='adamw', complementary=False, logit_normal=0., fixed_count=False)


@pytest.fixture(scope='module')
def corpus_folder(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp('corpus') / 'small')


def settings(corpus_folder, out, **changes):
    """The settings of a tiny run, as main gets them."""
    defaults = configure(dict(vars(train)), [])
    cfg = SimpleNamespace(**{**defaults, **TINY, 'dataset': str(corpus_folder), 'out_dir': str(out), **changes})
    cfg.global_batch = cfg.global_batch or cfg.batch_size
    return cfg


def ready(corpus_folder, **changes):
    """What one update needs: settings, rows, tokenizer."""
    cfg = settings(corpus_folder, 'x', **changes)
    cfg.bf16 = cfg.sharded = False
    source, _, tok = train.open_data(cfg)
    return cfg, source, tok


def flags(cfg):
    named = [*TINY, 'dataset', 'out_dir', 'resume']
    return [f'--{name}={getattr(cfg, name)}' for name in named]


def log_of(run):
    """The entries of the log by (iteration, kind). Of repeated ones the last counts."""
    entries = {}
    for line in (run / 'log.jsonl').read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue                                                # cut by a kill
        if 'iter' in entry:
            entry.pop('tokens_per_second', None)
            entries[entry['iter'], 'loss' in entry] = entry
    return entries


def tensors(folder):
    """All that a checkpoint holds, by name."""
    files = [folder / 'model.safetensors', *sorted((folder / 'optimizer').glob('*.safetensors'))]
    return {f'{file.name} {name}': tensor for file in files for name, tensor in load_file(file).items()}


def same_tensors(folder, other):
    a, b = tensors(folder), tensors(other)
    assert a.keys() == b.keys() and len(a) > 40
    assert all(torch.equal(a[name], b[name]) for name in a)


def same_end(run, straight):
    """Weights, optimizer and log are equal to the last bit."""
    same_tensors(run / 'iter_0000040', straight / 'iter_0000040')
    assert log_of(run) == log_of(straight)


def small_model(tok, **changes):
    shape = dict(vocab_size=tok.vocab_size, seq_len=32, n_layer=2, n_head=2, n_kv_head=2, d_model=32, d_ff=48)
    return M.init_weights(M.Transformer(M.ModelConfig(**{**shape, **changes})), 0, 1.0)


@pytest.fixture(scope='module')
def straight(corpus_folder, tmp_path_factory):
    """40 iterations without a break."""
    run = tmp_path_factory.mktemp('straight') / 'run'
    train.main(settings(corpus_folder, run))
    return run


def start(cfg):
    return subprocess.Popen([sys.executable, str(ROOT / 'train.py'), *flags(cfg)], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})


def wait_for(condition, process, seconds=180):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < end, process.communicate()
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------ one update


def test_one_update_is_the_papers_loss(corpus_folder):
    """train_step with all its parts equals Eq. 3 as the guideline writes it, on the whole batch."""
    cfg, source, tok = ready(corpus_folder, batch_size=2, **PAPER)
    model = small_model(tok)
    x0, _, _ = source.batch(3, range(8), 8)
    t = diffusion.sample_t(8, cfg.mask_eps, generator=diffusion.keyed_generator(cfg.seed, 3))
    u = diffusion.row_noise(cfg.seed, 3, range(8), 32)
    _, masked = diffusion.forward_process(x0, t, tok.mask_id, u=u)
    want = reference.plain_loss(model, x0, tok.mask_id, p_mask=t[:, None].expand(8, 32), masked=masked)

    before = [p.clone() for p in model.parameters()]
    batches = train.micro_batches(source, 3, cfg, tok)
    loss, norm = train.train_step(model, train.make_optimizers(model, cfg), batches, 0.5, cfg)
    assert loss == pytest.approx(want.item(), rel=1e-5) and norm > 0
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before))


@pytest.mark.parametrize('name, change', [
    ('loss_weights', lambda real: lambda *a, **k: 3 * real(*a, **k)),
    ('diffusion_loss', lambda real: lambda *a, **k: 3 * real(*a, **k))])
def test_who_changes_eq_3_changes_what_is_trained(corpus_folder, monkeypatch, name, change):
    cfg, source, tok = ready(corpus_folder, **PAPER)

    def gradient():
        model = small_model(tok)
        cfg.grad_clip = 0.
        train.train_step(model, [], train.micro_batches(source, 0, cfg, tok), 1.0, cfg)
        return model.embed.weight.grad

    before = gradient()
    monkeypatch.setattr(diffusion, name, change(getattr(diffusion, name)))
    torch.testing.assert_close(gradient(), 3 * before)


@pytest.mark.parametrize('changes', [dict(PAPER), dict(), dict(causal=True, complementary=False),
                                     dict(random_length=0.3, random_split=0.4)], ids=['paper', 'toy', 'ar', 'cut'])
def test_the_batch_may_be_split_in_any_way(corpus_folder, monkeypatch, changes):
    """On 1, 2 or 4 ranks, in 1 to 8 micro-batches: the same tokens and masks, and the same gradient."""
    results = []
    for batch_size, world in ((8, 1), (4, 1), (1, 1), (4, 2), (2, 2), (2, 4), (1, 4)):
        monkeypatch.setattr(train, 'WORLD', 1)
        cfg, source, tok = ready(corpus_folder, batch_size=batch_size, **changes)
        model = small_model(tok, causal=cfg.causal)
        monkeypatch.setattr(train, 'WORLD', world)
        per_rank = []
        for rank in range(world):
            monkeypatch.setattr(train, 'RANK', rank)
            per_rank.append(train.micro_batches(source, 7, cfg, tok))
        pieces = [rank[i] for i in range(len(per_rank[0])) for rank in per_rank]        # in the order of the rows
        assert len(pieces) * batch_size == 8
        for batch in pieces:
            diffusion.diffusion_loss(model, batch).backward()
        drawn = [torch.cat([getattr(batch, key) for batch in pieces]) for key in ('xt', 'targets', 'weights')]
        results.append([*drawn, torch.cat([p.grad.flatten() for p in model.parameters()])])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][:3], other))
        torch.testing.assert_close(results[0][3], other[3], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('changes', [{}, dict(fixed_count=False), dict(logit_normal=0.), dict(random_split=0.5)],
                         ids=str)
def test_what_one_mask_of_a_pair_hides_the_other_shows(corpus_folder, changes):
    cfg, source, tok = ready(corpus_folder, batch_size=8, **changes)
    for it in range(5):
        batch, = train.micro_batches(source, it, cfg, tok)
        x0, _, _ = source.batch(it, range(8), 8)
        hidden = torch.zeros(256, dtype=torch.bool)
        hidden[batch.positions] = True
        hidden = hidden.view(8, 32)
        assert torch.equal(x0[::2], x0[1::2]) and (hidden[::2] | hidden[1::2]).all()
        assert (hidden[::2] & hidden[1::2]).sum(1).max() <= 1       # the count is rounded up
        assert torch.equal(batch.xt, torch.where(hidden, tok.mask_id, x0))


def test_counts_of_pairs_are_as_uniform_as_those_of_single_rows(corpus_folder):
    cfg, source, tok = ready(corpus_folder, logit_normal=0., batch_size=8)
    counts = []
    for it in range(250):
        batch, = train.micro_batches(source, it, cfg, tok)
        counts.append((batch.positions // 32).bincount(minlength=8))
    for parity in (0, 1):
        sizes = torch.stack(counts)[:, parity::2].flatten()
        assert sizes.min() >= 1 and sizes.max() == 32
        assert torch.histc(sizes.float(), 8, 0.5, 32.5).sub(125).abs().max() < 30       # five standard deviations


def test_packed_training_equals_separate_training(corpus_folder):
    """A batch with cuts: loss and gradients are those of its segments, each run alone."""
    cfg, source, tok = ready(corpus_folder, batch_size=8, random_length=0.4, random_split=0.5)
    model = small_model(tok)
    batch, = train.micro_batches(source, 3, cfg, tok)
    loss = diffusion.diffusion_loss(model, batch)
    loss.backward()
    packed = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    total, flat, borders = 0., batch.xt.flatten(), batch.cu_seqlens.tolist()
    assert len(set(borders)) > 12
    for a, b in zip(borders, borders[1:]):
        mine = (batch.positions >= a) & (batch.positions < b)
        if a < b and mine.any():
            ce = model(flat[None, a:b], positions=batch.positions[mine] - a, targets=batch.targets[mine])
            part = (batch.weights[mine] * ce).sum()
            part.backward()
            total += part.item()
    assert loss.item() == pytest.approx(total, rel=1e-5)
    for p, want in zip(model.parameters(), packed):
        torch.testing.assert_close(p.grad, want, atol=1e-6, rtol=1e-4)


# ---------------------------------------------------------------------------------------------- a whole run


def test_the_loss_falls_and_the_run_is_complete(straight):
    log = log_of(straight)
    losses = [entry['loss'] for entry in log.values() if 'loss' in entry]
    bounds = [entry['val_nats'] for entry in log.values() if 'val_nats' in entry]
    assert len(losses) == 40 and len(bounds) == 4 and bounds[-1] < bounds[0] < 6
    assert [folder.name for folder in M.list_checkpoints(straight)] == ['iter_0000030', 'iter_0000040']
    first = json.loads((straight / 'log.jsonl').read_text().splitlines()[0])
    assert first['config']['max_iters'] == 40 and first['torch'] == torch.__version__ and first['parameters'] > 0


def test_a_run_can_be_repeated_from_its_config_file(straight, tmp_path):
    script('train', straight / 'config.py', f'--out_dir={tmp_path / "run"}')
    same_end(tmp_path / 'run', straight)


def test_kill_and_resume(corpus_folder, straight, tmp_path):
    run = tmp_path / 'run'
    process = start(settings(corpus_folder, run))
    wait_for(lambda: (run / 'iter_0000020').exists(), process)
    process.kill()
    process.wait()
    with (run / 'log.jsonl').open('a') as file:
        file.write('{"iter": 21, "lo\n')                            # as if cut in the middle of a line
    train.main(settings(corpus_folder, run, resume=True))
    same_tensors(run / 'iter_0000040', straight / 'iter_0000040')
    assert log_of(run).items() <= log_of(straight).items()          # a report may have been lost, nothing else


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_says_so(corpus_folder, straight, tmp_path, number):
    run = tmp_path / 'run'
    process = start(settings(corpus_folder, run))
    wait_for(lambda: (run / 'log.jsonl').exists() and (run / 'log.jsonl').read_text().count('\n') > 3, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.skip('the run was over before the signal came')
    assert process.returncode == 128 + number and 'Traceback' not in err
    if number != signal.SIGHUP:                                     # nobody reads what a closed terminal shows
        assert 'saved iteration' in out and '--resume' in out
    train.main(settings(corpus_folder, run, resume=True))
    same_end(run, straight)


def test_a_damaged_checkpoint_is_passed_over_and_written_again(corpus_folder, straight, tmp_path, capsys):
    run = tmp_path / 'run'
    shutil.copytree(straight, run)
    for file in ('model.safetensors', 'optimizer/shard-00001-model-00001-of-00001.safetensors'):
        damaged = run / 'iter_0000040' / file
        raw = bytearray(damaged.read_bytes())
        raw[len(raw) // 2] ^= 1
        damaged.write_bytes(raw)
        with pytest.raises(UserError, match='damaged'):
            M.load_model(run)
        train.main(settings(corpus_folder, run, resume=True))
        assert 'passing over' in capsys.readouterr().err
        same_end(run, straight)


def test_what_is_set_on_resume_counts(corpus_folder, straight, tmp_path, capsys):
    results = []
    for changes in ({}, dict(weight_decay=0.7)):
        run = tmp_path / str(len(results))
        shutil.copytree(straight, run)
        train.main(settings(corpus_folder, run, resume=True, max_iters=42, **changes))
        results.append(tensors(run / 'iter_0000042'))
    assert 'weight_decay 0.1 -> 0.7' in capsys.readouterr().err
    assert any(not torch.equal(a, b) for a, b in zip(results[0].values(), results[1].values()))


def test_evaluation_does_not_touch_training(corpus_folder, straight, tmp_path):
    train.main(settings(corpus_folder, tmp_path / 'run', eval_interval=40, eval_draws=1, sample_tokens=0))
    same_tensors(tmp_path / 'run' / 'iter_0000040', straight / 'iter_0000040')


def test_recomputing_changes_nothing(corpus_folder, straight, tmp_path):
    train.main(settings(corpus_folder, tmp_path / 'run', act_memory=0.))
    same_tensors(tmp_path / 'run' / 'iter_0000040', straight / 'iter_0000040')


def test_lines_of_the_log_are_means(corpus_folder, straight, tmp_path):
    """Over all updates since the last one. The first update and every checkpoint have a line as well."""
    train.main(settings(corpus_folder, tmp_path / 'run', log_interval=8))
    each = [entry['loss'] for entry in log_of(straight).values() if 'loss' in entry]
    means = {entry['iter']: entry['loss'] for entry in log_of(tmp_path / 'run').values() if 'loss' in entry}
    ends = [1, 8, 10, 16, 20, 24, 30, 32, 40]
    assert list(means) == ends
    for start, end in zip([0, *ends], ends):
        assert means[end] == pytest.approx(sum(each[start:end]) / (end - start), rel=1e-5)


@pytest.mark.parametrize('where', ['loss', 'gradient'])
def test_not_a_number_stops_before_the_update(corpus_folder, tmp_path, monkeypatch, where):
    real, calls = diffusion.diffusion_loss, []

    def sabotage(model, batch):
        loss = real(model, batch)
        calls.append(1)
        if len(calls) == 2 * 24 + 1 and where == 'gradient':        # a finite loss
            loss.register_hook(lambda gradient: gradient * float('inf'))
        return loss * float('nan') if len(calls) > 2 * 24 and where == 'loss' else loss

    monkeypatch.setattr(diffusion, 'diffusion_loss', sabotage)
    with pytest.raises(UserError, match='before an update.*iter_0000020'):
        train.main(settings(corpus_folder, tmp_path / 'run'))
    model, meta = M.load_model(tmp_path / 'run')
    assert meta['iteration'] == 20 and all(p.isfinite().all() for p in model.parameters())


def test_a_full_disk_keeps_what_there_was(corpus_folder, tmp_path, monkeypatch):
    real, saved = M.save_model, []

    def full(*args):
        saved.append(1)
        if len(saved) == 2:
            raise OSError(28, 'No space left on device')
        return real(*args)

    monkeypatch.setattr(M, 'save_model', full)
    with pytest.raises(UserError, match='No space left'):
        train.main(settings(corpus_folder, tmp_path / 'run'))
    assert M.load_model(tmp_path / 'run')[1]['iteration'] == 10


def test_autoregressive_and_init_from(corpus_folder, tmp_path):
    run = tmp_path / 'ar'
    train.main(settings(corpus_folder, run, causal=True, max_iters=10, **{**PAPER, 'complementary': True}))
    model, meta = M.load_model(run)
    assert model.config.causal and meta['settings']['optimizer'] == 'adamw'
    train.main(settings(corpus_folder, tmp_path / 'more', causal=True, init_from=str(run), max_iters=1, warmup_iters=0,
                learning_rate=1e-12, muon_lr=1e-12, complementary=False))
    again, _ = M.load_model(tmp_path / 'more')
    for a, b in zip(model.parameters(), again.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize('causal', [False, True])
def test_bfloat16_from_training_to_sampling(corpus_folder, tmp_path, causal):
    run = tmp_path / 'run'
    train.main(settings(corpus_folder, run, causal=causal, complementary=not causal, dtype='bfloat16', max_iters=10))
    script('sample', run, '--dtype=bfloat16', '--gen_length=8', '--prompt=the', '--prompt=a model')
    script('evaluate', 'bound', run, '--dtype=bfloat16', '--draws=2')


def test_a_vocabulary_wider_than_the_tokenizer(corpus_folder, tmp_path):
    """LLaDA's head has rows that stand for no token. They are never sampled."""
    train.main(settings(corpus_folder, tmp_path / 'run', vocab_size=400, max_iters=2, eval_interval=2))
    model, meta = M.load_model(tmp_path / 'run')
    tok = data.tokenizer_of(meta)
    assert model.config.vocab_size == 400 and tok.vocab_size < 300 and len(tok.unused(400)) == 400 - tok.vocab_size


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(corpus_folder, tmp_path):
    """Half a minute of compiling. On a CPU it needs a C++ compiler."""
    for name, compiled in (('eager', False), ('compiled', True)):
        train.main(settings(corpus_folder, tmp_path / name, compile=compiled, max_iters=10))
    eager, compiled = (log_of(tmp_path / name) for name in ('eager', 'compiled'))
    for key, entry in eager.items():
        if 'loss' in entry:
            assert entry['loss'] == pytest.approx(compiled[key]['loss'], rel=1e-4)
    M.load_model(tmp_path / 'compiled')                             # no trace of the compiler in the names


# ------------------------------------------------------------------------------------- schedules, configs, errors


def test_learning_rates_at_every_corner():
    cfg = SimpleNamespace(schedule='cosine', warmup_iters=10, max_iters=110, min_lr_ratio=0.1, decay_iters=0)
    at = [train.lr_factor(i, cfg) for i in range(111)]
    assert at[0] == pytest.approx(0.1) and at[9] == 1.0 and at[10] == 1.0
    assert at[60] == pytest.approx(0.55) and at[110] == pytest.approx(0.1)
    cfg.schedule, cfg.decay_iters = 'wsd', 20
    at = [train.lr_factor(i, cfg) for i in range(111)]
    assert at[0] == pytest.approx(0.1) and at[10] == at[90] == 1.0
    assert at[100] == pytest.approx(0.55) and at[110] == pytest.approx(0.1)


PARAMETERS = {'llada_1b': (1_487_243_264, 969_246_720), 'llada_8b': (8_015_581_184, 6_979_588_096),
              'arm_1b': (1_487_243_264, 969_246_720), 'arm_7b': (6_834_851_840, 5_798_858_752),
              'illada_8b': (7_615_025_152, 6_979_588_096)}


def paper(name):
    return SimpleNamespace(**configure(dict(vars(train)), [str(ROOT / 'config' / f'{name}.py')]))


@pytest.mark.parametrize('name', PARAMETERS)
def test_configs_of_the_papers(name):
    """They have the papers' parameter counts, and leave the objective as it is by default."""
    cfg = paper(name)
    train.check(cfg)
    shape = {field: getattr(cfg, field) for field in M.ModelConfig.__dataclass_fields__}
    model = M.empty_model(M.ModelConfig(**shape))
    assert (model.num_params(), model.num_params(non_embedding=True)) == PARAMETERS[name]
    assert cfg.causal == name.startswith('arm')
    assert not (cfg.logit_normal or cfg.fixed_count or cfg.complementary or cfg.emb_std) and cfg.optimizer == 'adamw'


def test_defaults_are_the_paper_and_docs_lists_what_differs():
    defaults, docs = configure(dict(vars(train)), []), vars(paper('docs'))
    objective = {name: defaults[name] for name in PAPER}
    assert objective == PAPER and defaults['emb_std'] == 0
    assert {name for name in docs if docs[name] != defaults[name]} == {
        'optimizer', 'learning_rate', 'emb_std', 'fixed_count', 'logit_normal', 'complementary', 'decay_iters'}


def test_the_papers_learning_rates_at_every_corner():
    def lr(cfg, tokens):
        return cfg.learning_rate * train.lr_factor(int(tokens) // (cfg.global_batch * cfg.seq_len) - 1, cfg)

    cfg = paper('llada_8b')
    step = cfg.global_batch * cfg.seq_len
    assert step == 5_242_880 and cfg.max_iters == 438_690
    for tokens, want in ((step, 2e-7), (1000 * step, 2e-4), (2000 * step, 4e-4), (1e12, 4e-4), (1.2e12 - step, 4e-4),
                         (1.2e12 + 2 * step, 1e-4), (1.9e12, 1e-4), (2.15e12, 5.5e-5), (2.3e12, 1e-5)):
        assert lr(cfg, tokens) == pytest.approx(want, rel=1e-3), tokens
    cfg = paper('illada_8b')
    step = cfg.global_batch * cfg.seq_len
    for tokens, want in ((2000 * step, 2e-4), (9.9e12, 2e-4), (11e12, (2e-4 + 5e-6) / 2), (12e12, 5e-6)):
        assert lr(cfg, tokens) == pytest.approx(want, rel=1e-3), tokens


@pytest.mark.parametrize('changes, says', [
    (dict(global_batch=7, batch_size=7), 'complementary masks need an even global_batch, got 7'),
    (dict(global_batch=10), 'global_batch 10 must divide into 1 processes of batch_size 4'),
    (dict(vocab_size=5), 'vocab_size must hold'), (dict(n_head=3), 'd_model / n_head'),
    (dict(dataset='no/such'), 'no/such'), (dict(seq_len=10 ** 6), 'too few'),
    (dict(device='cuda'), "'cuda' is not available"), (dict(resume=True), 'no checkpoint'),
    (dict(init_from='no/such'), 'no checkpoint')])
def test_a_mistake_is_one_line(corpus_folder, tmp_path, monkeypatch, changes, says):
    if changes.get('device') == 'cuda' and torch.cuda.is_available():
        pytest.skip('there is a GPU here')
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UserError, OSError), match=re.escape(says)):
        train.main(settings(corpus_folder, tmp_path / 'run', **changes))
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('changes, says', [
    (dict(), 'already holds a run'), (dict(resume=True, d_ff=64), 'd_ff 64, the run has 48'),
    (dict(resume=True, optimizer='adamw'), 'optimizer adamw, the run has muon'),
    (dict(resume=True, global_batch=16), 'global_batch 16, the run has 8')])
def test_a_run_is_not_overwritten_or_mixed_up(corpus_folder, straight, changes, says):
    with pytest.raises(UserError, match=re.escape(says)):
        train.main(settings(corpus_folder, straight, **changes))
    assert (straight / 'iter_0000040').exists()


def test_resume_refuses_another_vocabulary(straight, tmp_path):
    other = small_corpus(tmp_path / 'other', tokenizer='bpe-262')       # of equal size
    with pytest.raises(UserError, match='tokenizer'):
        train.main(settings(other, straight, resume=True))


def test_a_mistake_of_the_user_is_one_line_and_a_bug_keeps_its_traceback(corpus_folder, tmp_path):
    """A learner's wrong formula must show its file and line."""
    for name in ('configurator', 'data', 'model', 'diffusion', 'train'):
        shutil.copy(ROOT / f'{name}.py', tmp_path)
    file = tmp_path / 'diffusion.py'
    file.write_text(file.read_text().replace('weights = 1 / t ', 'weights = 1 / t_wrong '))
    for folder, more, code, says in ((ROOT, '--dataset=no/such', 2, 'no/such'),
                                     (tmp_path, '--fixed_count=false', 1, 'diffusion.py", line')):
        cfg = settings(corpus_folder, tmp_path / 'run')
        command = [sys.executable, 'train.py', *flags(cfg), more]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == code and says in done.stderr, done.stderr
        assert ('Traceback' in done.stderr) == (code == 1) == (done.stderr.count('\n') > 1)
