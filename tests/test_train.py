"""A run that was stopped, killed or split ends with the same bits, and it trains what the paper says."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest
import reference
import torch
from helpers import ROOT, read_tensors, script, settings_of, small_corpus, tiny_model

import data
import diffusion
import model as models
import train
from configurator import UserError, configure

TINY = dict(
    n_layer=2, n_head=2, n_kv_head=2, d_model=32, d_ff=48, seq_len=32, batch_size=4, global_batch=8,
    max_iters=40, warmup_iters=4, eval_interval=10, eval_windows=8, eval_draws=2, sample_tokens=8,
    log_interval=1, device='cpu', dtype='float32', learning_rate=3e-3, muon_lr=1e-2, optimizer='muon',
    complementary=True, logit_normal=0.5, fixed_count=True)
PAPER = dict(optimizer='adamw', complementary=False, logit_normal=0., fixed_count=False)


def settings(corpus, out, /, **changes):
    """Return the settings of a tiny run, as main gets them."""
    return settings_of(train, **{**TINY, 'dataset': str(corpus), 'out_dir': str(out), **changes})


def ready(corpus, **changes):
    """Return what one update needs: settings, rows, tokenizer, a model."""
    cfg = settings(corpus, 'x', bf16=False, sharded=False, **changes)
    source, _, tok = train.open_data(cfg)
    return cfg, source, tok, tiny_model(vocab_size=tok.vocab_size, causal=cfg.causal)


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def tensors(folder):
    """Return all that a checkpoint holds, by name."""
    files = [folder / 'model.safetensors', *sorted((folder / 'optimizer').glob('*.safetensors'))]
    return {f'{file.name} {name}': tensor for file in files for name, tensor in read_tensors(file).items()}


def same_tensors(folder, other):
    a, b = tensors(folder), tensors(other)
    assert a.keys() == b.keys() and len(a) > 40
    assert all(torch.equal(a[name], b[name]) for name in a)


def log_of(run):
    """Return the entries of the log by (iteration, kind). Of repeated ones the last counts."""
    entries = {}
    for line in (run / 'log.jsonl').read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue                                        # cut by a kill
        if 'iter' in entry:
            entry.pop('tokens_per_second', None)
            entries[entry['iter'], 'loss' in entry] = entry
    return entries


def losses_of(run):
    return [entry['loss'] for entry in log_of(run).values() if 'loss' in entry]


def same_end(run, straight):
    """Weights, optimizer and log are equal to the last bit."""
    same_tensors(run / 'iter_0000040', straight / 'iter_0000040')
    assert log_of(run) == log_of(straight)


def wait_for(condition, process, seconds=180):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < end
        time.sleep(0.01)


@pytest.fixture(scope='module')
def straight(corpus, tmp_path_factory):
    """A run of 40 iterations without a break."""
    run = tmp_path_factory.mktemp('straight') / 'run'
    train.main(settings(corpus, run))
    return run


# ---------------------------------------------------------------------------------------------- one update


def test_one_update_is_the_papers_loss(corpus):
    """train_step with all its parts has loss and gradient of Eq. 3 as the guideline writes it, clipped."""
    cfg, source, tok, model = ready(corpus, batch_size=2, grad_clip=0.5, **PAPER)
    x0, _, _ = source.batch(3, range(8), 8)
    t = diffusion.sample_t(8, cfg.mask_eps, generator=diffusion.keyed_generator(cfg.seed, 3))
    u = diffusion.row_noise(cfg.seed, 3, range(8), 32)
    _, masked = diffusion.forward_process(x0, t, tok.mask_id, u=u)
    want = reference.plain_loss(model, x0, tok.mask_id, p_mask=t[:, None].expand(8, 32), masked=masked)
    want.backward()
    gradient = gradients(model)

    model.zero_grad()
    batches = train.micro_batches(source, 3, cfg, tok)
    loss, norm = train.train_step(model, [], batches, 1.0, cfg)     # without an optimizer the gradients stay
    assert loss == pytest.approx(want.item(), rel=1e-5)
    assert norm == pytest.approx(gradient.norm().item(), rel=1e-5) and norm > 0.5
    torch.testing.assert_close(gradients(model), gradient * 0.5 / norm, atol=1e-6, rtol=1e-4)


def test_examples_are_weighted_by_their_own_length(tmp_path):
    """Eq. 5: 1/(t b L'), where L' counts response, EOS and padding."""
    pairs = [data.as_record({'prompt': f'{i}?', 'response': 'yes ' * (i % 4 + 1)}) for i in range(60)]
    data.prepare([list(enumerate(pairs))], tmp_path / 'd', 'bytes')
    cfg, source, tok, _ = ready(tmp_path / 'd', batch_size=8, seq_len=128, masking='response', **PAPER)
    x0, maskable, _ = source.batch(3, range(8), 8)
    t, u = train.draw_noise(3, range(8), x0.shape[1], cfg)
    masked = maskable & (u < t[:, None])
    batch, = train.micro_batches(source, 3, cfg, tok)
    weights = 1 / (t * 8 * maskable.sum(1))
    assert torch.equal(batch.xt, torch.where(masked, tok.mask_id, x0)) and len(set(weights.tolist())) == 8
    torch.testing.assert_close(batch.weights, weights.repeat_interleave(masked.sum(1)))


def test_the_autoregressive_twin_predicts_every_token_from_eos_on(corpus):
    cfg, source, tok, _ = ready(corpus, batch_size=8, causal=True, complementary=False)
    x0, _, _ = source.batch(3, range(8), 8)
    batch, = train.micro_batches(source, 3, cfg, tok)
    assert torch.equal(batch.targets.view(8, 32), x0) and torch.equal(batch.xt[:, 1:], x0[:, :-1])
    assert (batch.xt[:, 0] == tok.eos_id).all() and batch.weights.tolist() == pytest.approx([1 / 256] * 256)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_matrices_are_decayed_and_norms_are_not(optimizer):
    """With Muon, which takes the matrices of the blocks, only these."""
    model = tiny_model()
    groups = [group for one in train.make_optimizers(model, settings('x', 'x', optimizer=optimizer))
              for group in one.param_groups]
    assert sum(len(group['params']) for group in groups) == len(list(model.parameters()))
    decayed = {p for group in groups if group['weight_decay'] for p in group['params']}
    for name, p in model.named_parameters():
        assert (p in decayed) == (p.dim() == 2 and (optimizer == 'adamw' or name.startswith('blocks')))


@pytest.mark.parametrize('name', ['loss_weights', 'diffusion_loss'])
def test_who_changes_eq_3_changes_what_is_trained(corpus, monkeypatch, name):
    """train.py has no second copy of the loss: if these lines of diffusion.py triple it, gradients triple."""
    cfg, source, tok, model = ready(corpus, grad_clip=0., **PAPER)
    train.train_step(model, [], train.micro_batches(source, 0, cfg, tok), 1.0, cfg)
    before = gradients(model)
    model.zero_grad()
    real = getattr(diffusion, name)
    monkeypatch.setattr(diffusion, name, lambda *args, **options: 3 * real(*args, **options))
    train.train_step(model, [], train.micro_batches(source, 0, cfg, tok), 1.0, cfg)
    torch.testing.assert_close(gradients(model), 3 * before)


@pytest.mark.parametrize('changes', [
    PAPER, {}, dict(causal=True, complementary=False), dict(random_length=0.3, random_split=0.4)], ids=str)
def test_the_batch_may_be_split_in_any_way(corpus, monkeypatch, changes):
    """On 1, 2 or 4 ranks, in 1 to 8 micro-batches: the same tokens and masks, and the same gradient."""
    results = []
    for batch_size, world in ((8, 1), (4, 1), (1, 1), (4, 2), (2, 2), (2, 4), (1, 4)):
        monkeypatch.setattr(train, 'WORLD', 1)
        cfg, source, tok, model = ready(corpus, batch_size=batch_size, **changes)
        monkeypatch.setattr(train, 'WORLD', world)
        per_rank = []
        for rank in range(world):
            monkeypatch.setattr(train, 'RANK', rank)
            per_rank.append(train.micro_batches(source, 7, cfg, tok))
        pieces = [batch for batches in zip(*per_rank) for batch in batches]         # in the order of the rows
        assert len(pieces) * batch_size == 8
        for batch in pieces:
            diffusion.diffusion_loss(model, batch).backward()
        drawn = [torch.cat([getattr(batch, key) for batch in pieces]) for key in ('xt', 'targets', 'weights')]
        results.append([*drawn, gradients(model)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][:3], other))
        torch.testing.assert_close(results[0][3], other[3], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('changes', [
    {}, dict(fixed_count=False), dict(logit_normal=0.), dict(random_split=0.5)], ids=str)
def test_what_one_mask_of_a_pair_hides_the_other_shows(corpus, changes):
    cfg, source, tok, _ = ready(corpus, batch_size=8, **changes)
    for it in range(5):
        batch, = train.micro_batches(source, it, cfg, tok)
        x0, _, _ = source.batch(it, range(8), 8)
        hidden = torch.zeros(256, dtype=torch.bool)
        hidden[batch.positions] = True
        hidden = hidden.view(8, 32)
        assert torch.equal(x0[::2], x0[1::2]) and (hidden[::2] | hidden[1::2]).all()
        assert (hidden[::2] & hidden[1::2]).sum(1).max() <= 1       # the count is rounded up
        assert torch.equal(batch.xt, torch.where(hidden, tok.mask_id, x0))


def test_noise_of_pairs_is_as_uniform_as_that_of_single_rows(corpus):
    cfg, source, tok, _ = ready(corpus, logit_normal=0., batch_size=8)
    counts = []
    for it in range(250):
        batch, = train.micro_batches(source, it, cfg, tok)
        counts.append((batch.positions // 32).bincount(minlength=8))
    for parity in (0, 1):
        sizes = torch.stack(counts)[:, parity::2].flatten()
        assert sizes.min() >= 1 and sizes.max() == 32
        assert torch.histc(sizes.float(), 8, 0.5, 32.5).sub(125).abs().max() < 30   # five standard deviations

    # and the complement of t stays in [eps, 1], because its weight is 1/t
    cfg.mask_eps = 0.1
    cfg.fixed_count = False
    t, _ = train.draw_noise(0, range(8), 32, cfg)
    assert t[0::2].tolist() == pytest.approx((1.1 - t[1::2]).tolist()) and 0.1 <= t.min() and t.max() <= 1


def test_waves_hide_stretches_and_leave_all_counts_as_they_are(corpus):
    """Each place is hidden as often as any other, and a row as much as its t says, but neighbours are alike."""
    cfg, source, tok, _ = ready(corpus, logit_normal=0., batch_size=8)
    sizes, shares, halves = {}, {}, {}
    for waves in (0., 0.5):
        cfg.waves = waves
        batches = [train.micro_batches(source, it, cfg, tok)[0] for it in range(400)]
        hidden = torch.stack([batch.xt == tok.mask_id for batch in batches])                # (400, 8, 32)
        assert (hidden[:, 0::2] | hidden[:, 1::2]).all()                                    # complementary
        sizes[waves] = hidden.sum(2)
        shares[waves] = hidden.double().mean((0, 1))
        # four neighbours in sight, and the four behind them hidden
        eight = hidden.unfold(2, 8, 1)                                                          # (400, 8, 25, 8)
        halves[waves] = (~eight[..., :4].any(-1) & eight[..., 4:].all(-1)).sum().item()
    assert torch.equal(sizes[0.5], sizes[0.])
    assert (shares[0.5] - sizes[0.5].double().mean() / 32).abs().max() < 0.05               # five standard deviations
    assert halves[0.5] > 3 * halves[0.] > 0, halves


def test_packed_training_equals_separate_training(corpus):
    """A batch with cuts: loss and gradients are those of its segments, each run alone."""
    cfg, source, tok, model = ready(corpus, batch_size=8, random_length=0.4, random_split=0.5)
    batch, = train.micro_batches(source, 3, cfg, tok)
    loss = diffusion.diffusion_loss(model, batch)
    loss.backward()
    packed = gradients(model)
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
    torch.testing.assert_close(gradients(model), packed, atol=1e-6, rtol=1e-4)


# --------------------------------------------------------------------------------------------- a whole run


def test_the_loss_falls_and_the_run_is_complete(straight):
    bounds = [entry['val_nats'] for entry in log_of(straight).values() if 'val_nats' in entry]
    assert len(losses_of(straight)) == 40 and len(bounds) == 4 and bounds[-1] < bounds[0] < 6
    assert [folder.name for folder in models.list_checkpoints(straight)] == ['iter_0000030', 'iter_0000040']
    first = json.loads((straight / 'log.jsonl').read_text().splitlines()[0])
    assert first['config']['max_iters'] == 40 and first['torch'] == torch.__version__


def test_validation_is_the_mean_of_the_bounds_of_the_rows(corpus):
    cfg, _, tok, model = ready(corpus, eval_windows=3)
    _, held_out, _ = train.open_data(cfg)
    rows, n_bytes = held_out
    bounds = [diffusion.log_likelihood(
        model, *row, tok.mask_id, mc_num=2, generator=diffusion.keyed_generator(0, i))
        for i, row in enumerate(rows)]
    entry = train.held_out_bound(model, held_out, cfg, tok)
    assert entry['val_nats'] == pytest.approx(-sum(bounds) / 96)
    assert entry['val_bits_per_byte'] == pytest.approx(-sum(bounds) / 3 / n_bytes / math.log(2))


def test_a_run_can_be_repeated_from_its_config_file(straight, tmp_path):
    script('train', straight / 'settings.py', f'--out_dir={tmp_path / "run"}')
    same_end(tmp_path / 'run', straight)


def test_reports_and_recomputing_do_not_touch_training(corpus, straight, tmp_path):
    """And a line of the log is a mean over all updates since the last one; checkpoints have one as well."""
    fewer = dict(eval_interval=20, eval_draws=1, sample_tokens=0, log_interval=8, act_memory=0.)
    train.main(settings(corpus, tmp_path / 'run', **fewer))
    same_tensors(tmp_path / 'run' / 'iter_0000040', straight / 'iter_0000040')
    each = losses_of(straight)
    ends = [1, 8, 16, 20, 24, 32, 40]
    means = [sum(each[start:end]) / (end - start) for start, end in zip([0, *ends], ends)]
    assert losses_of(tmp_path / 'run') == pytest.approx(means, rel=1e-5)


def flags(cfg):
    """Return the settings as words of a command line."""
    return [f'--{name}={getattr(cfg, name)}' for name in (*TINY, 'dataset', 'out_dir', 'resume')]


def test_kill_and_resume(corpus, straight, tmp_path):
    run = tmp_path / 'run'
    command = [sys.executable, str(ROOT / 'train.py'), *flags(settings(corpus, run))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for((run / 'iter_0000020').exists, process)
    process.kill()
    process.wait()
    with (run / 'log.jsonl').open('a') as file:
        file.write('{"iter": 21, "lo\n')                    # as if cut in the middle of a line
    train.main(settings(corpus, run, resume=True))
    same_tensors(run / 'iter_0000040', straight / 'iter_0000040')
    assert log_of(run).items() <= log_of(straight).items()  # a report may have been lost, nothing else


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_says_so(corpus, straight, tmp_path, number, monkeypatch, capsys):
    run = tmp_path / 'run'
    # a closed terminal cannot be printed to, so train.py puts others in their place
    for name in ('stdout', 'stderr'):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    before = signal.getsignal(number)
    signal.signal(number, signal.SIG_DFL)                   # a process in the background may ignore it
    real, updates = train.train_step, []

    def interrupted(*args):
        updates.append(1)
        if len(updates) == 13:
            signal.raise_signal(number)
        return real(*args)

    monkeypatch.setattr(train, 'train_step', interrupted)
    with pytest.raises(SystemExit) as stopped:
        train.main(settings(corpus, run))
    signal.signal(number, before)
    said = capsys.readouterr().out
    assert stopped.value.code == 128 + number
    assert number == signal.SIGHUP or 'saved iteration 13 of 40' in said and '--resume' in said
    train.main(settings(corpus, run, resume=True))
    same_end(run, straight)


def test_a_damaged_checkpoint_is_passed_over_and_written_again(corpus, straight, tmp_path, capsys):
    run = tmp_path / 'run'
    shutil.copytree(straight, run)
    for file in ('model.safetensors', 'optimizer/shard-00001-model-00001-of-00001.safetensors', 'tokenizer.json'):
        damaged = run / 'iter_0000040' / file
        raw = bytearray(damaged.read_bytes())
        raw[len(raw) // 2] ^= 1
        # after a power failure a file may be empty
        damaged.write_bytes(b'' if file == 'tokenizer.json' else raw)
        with pytest.raises(UserError, match='damaged'):
            models.load_model(run)
        train.main(settings(corpus, run, resume=True))
        assert 'passing over' in capsys.readouterr().err
        same_end(run, straight)


def test_a_checkpoint_that_lost_a_file_is_passed_over(corpus, straight, tmp_path, capsys):
    run = tmp_path / 'run'
    shutil.copytree(straight, run)
    (run / 'iter_0000040' / 'model.safetensors').unlink()
    train.main(settings(corpus, run, resume=True, max_iters=31))
    assert 'passing over' in capsys.readouterr().err


@pytest.mark.parametrize('keep_last', [1, -1])
def test_saving_removes_neither_the_new_checkpoint_nor_your_copies(corpus, straight, tmp_path, keep_last):
    run = tmp_path / 'run'
    shutil.copytree(straight, run)
    for name in ('iter_best', 'iter_0000030_before'):
        shutil.copytree(run / 'iter_0000030', run / name)
    (run / 'iter_0000040' / 'model.safetensors').write_bytes(b'')
    train.main(settings(corpus, run, resume=True, max_iters=32, keep_last=keep_last))
    kept = {folder.name for folder in run.glob('iter_*')}
    assert kept >= {'iter_best', 'iter_0000030_before', 'iter_0000032'}
    assert 'iter_0000030' not in kept


def test_what_stands_beside_a_run_is_left_alone(corpus, tmp_path):
    run = tmp_path / 'run'
    run.mkdir()
    (run / 'config.py').write_text('# mine\nmax_iters = 1\n')
    train.main(settings(corpus, run, max_iters=1))
    assert (run / 'config.py').read_text().startswith('# mine')


def test_what_is_set_on_resume_counts(corpus, straight, tmp_path, capsys):
    run = tmp_path / 'run'
    shutil.copytree(straight, run)
    train.main(settings(corpus, run, resume=True, max_iters=42, learning_rate=0., muon_lr=0.))
    assert 'muon_lr 0.01 -> 0.0' in capsys.readouterr().err
    before, after = (models.load_model(run / f'iter_00000{it}')[0] for it in (40, 42))
    assert all(map(torch.equal, before.parameters(), after.parameters()))


def test_a_run_keeps_its_dtype_however_a_busy_cpu_is_timed(corpus, tmp_path, monkeypatch):
    run = tmp_path / 'run'
    steps = (2, True, 'auto', 'bfloat16'), (4, False, 'auto', 'bfloat16'), (6, True, 'float32', 'float32')
    for it, pays, dtype, is_so in steps:
        monkeypatch.setattr(models, 'bfloat16_pays', lambda device, pays=pays: pays)
        train.main(settings(corpus, run, dtype=dtype, max_iters=it, eval_interval=2, resume=it > 2))
        assert models.load_model(run)[1]['settings']['dtype'] == is_so


@pytest.mark.parametrize('where', ['loss', 'gradient'])
def test_not_a_number_stops_before_the_update(corpus, tmp_path, monkeypatch, where):
    real, calls = diffusion.diffusion_loss, []

    def sabotage(model, batch):
        loss = real(model, batch)
        calls.append(1)
        if len(calls) <= 2 * 24:
            return loss
        if where == 'loss':
            return loss * float('nan')
        loss.register_hook(lambda gradient: gradient * float('inf'))    # of a finite loss
        return loss

    monkeypatch.setattr(diffusion, 'diffusion_loss', sabotage)
    with pytest.raises(UserError, match='before an update.*iter_0000020'):
        train.main(settings(corpus, tmp_path / 'run'))
    model, meta = models.load_model(tmp_path / 'run')
    assert meta['iteration'] == 20 and all(p.isfinite().all() for p in model.parameters())


def test_a_full_disk_keeps_what_there_was(corpus, tmp_path, monkeypatch):
    real, saved = models.save_model, []

    def full(*args):
        saved.append(1)
        if len(saved) == 2:
            raise OSError(28, 'No space left on device')
        return real(*args)

    monkeypatch.setattr(models, 'save_model', full)
    with pytest.raises(UserError, match='No space left'):
        train.main(settings(corpus, tmp_path / 'run'))
    assert models.load_model(tmp_path / 'run')[1]['iteration'] == 10


def test_autoregressive_and_init_from(corpus, tmp_path):
    run = tmp_path / 'ar'
    train.main(settings(corpus, run, causal=True, max_iters=10, **{**PAPER, 'complementary': True}))
    model, meta = models.load_model(run)
    assert model.config.causal and meta['settings']['optimizer'] == 'adamw'
    slow = dict(max_iters=1, warmup_iters=0, learning_rate=1e-12, muon_lr=1e-12)
    for causal in (True, False):                            # a diffusion model may begin as its twin, too
        more = tmp_path / f'more {causal}'
        train.main(settings(corpus, more, causal=causal, init_from=str(run), **slow))
        again, _ = models.load_model(more)
        assert again.config.causal == causal
        for a, b in zip(model.parameters(), again.parameters()):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize('causal', [False, True])
def test_bfloat16_and_a_wide_vocabulary_from_training_to_sampling(corpus, tmp_path, causal):
    """LLaDA's head has rows that stand for no token. They are never sampled."""
    run = tmp_path / 'run'
    train.main(settings(corpus, run, causal=causal, dtype='bfloat16', vocab_size=400, max_iters=10))
    model, meta = models.load_model(run)
    assert model.config.vocab_size == 400 and len(data.tokenizer_of(meta).unused(400)) == 400 - 262
    script('sample', run, '--dtype=bfloat16', '--gen_length=8', '--prompt=the', '--prompt=a model')
    script('evaluate', 'bound', run, '--dtype=bfloat16', '--draws=2')


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(corpus, tmp_path):
    """Half a minute of compiling. On a CPU it needs a C++ compiler."""
    for name in ('eager', 'compiled'):
        train.main(settings(corpus, tmp_path / name, compile=name == 'compiled', max_iters=10))
    assert losses_of(tmp_path / 'compiled') == pytest.approx(losses_of(tmp_path / 'eager'), rel=1e-4)
    models.load_model(tmp_path / 'compiled')                # no trace of the compiler in the names


# -------------------------------------------------------------------------------- schedules, configs, errors


def test_learning_rates_at_every_corner():
    corners = dict(warmup_iters=10, max_iters=110, min_lr_ratio=0.1)
    for schedule, decay_iters, ones, half in (('cosine', 0, (9, 10), 60), ('wsd', 20, (9, 10, 90), 100)):
        cfg = settings_of(train, schedule=schedule, decay_iters=decay_iters, **corners)
        at = [train.lr_factor(i, cfg) for i in range(111)]
        assert at[0] == pytest.approx(0.1) and all(at[i] == 1.0 for i in ones)
        assert at[half] == pytest.approx(0.55) and at[110] == pytest.approx(0.1)


def paper(name):
    return settings_of(train, **configure(dict(vars(train)), [str(ROOT / 'config' / f'{name}.py')]))


@pytest.mark.parametrize('name, n_parameters, non_embedding', [
    ('llada_1b', 1_487_243_264, 969_246_720), ('llada_8b', 8_015_581_184, 6_979_588_096),
    ('arm_1b', 1_487_243_264, 969_246_720), ('arm_7b', 6_834_851_840, 5_798_858_752),
    ('illada_8b', 7_615_025_152, 6_979_588_096)])
def test_configs_of_the_papers(name, n_parameters, non_embedding):
    """They have the papers' parameter counts, and the objective is the default of train.py."""
    cfg = paper(name)
    train.check(cfg)
    shape = {field.name: getattr(cfg, field.name) for field in fields(models.ModelConfig)}
    model = models.empty_model(models.ModelConfig(**shape))
    assert (model.num_params(), model.num_params(non_embedding=True)) == (n_parameters, non_embedding)
    assert cfg.causal == name.startswith('arm')
    for setting, value in {**PAPER, 'emb_std': 0}.items():
        assert getattr(cfg, setting) == getattr(train, setting) == value


@pytest.mark.parametrize('name, rates', [
    ('llada_8b', [(1, 2e-7), (1000, 2e-4), (2000, 4e-4), (1e12, 4e-4), (1.2e12 - 6e6, 4e-4),
                  (1.2e12 + 1.1e7, 1e-4), (1.9e12, 1e-4), (2.15e12, 5.5e-5), (2.3e12, 1e-5)]),
    ('illada_8b', [(2000, 2e-4), (9.9e12, 2e-4), (11e12, (2e-4 + 5e-6) / 2), (12e12, 5e-6)])])
def test_learning_rates_of_the_papers(name, rates):
    """After so many updates (small numbers) or tokens."""
    cfg = paper(name)
    tokens = cfg.global_batch * cfg.seq_len
    assert name != 'llada_8b' or (tokens, cfg.max_iters) == (5_242_880, 438_690)
    for when, rate in rates:
        it = int(when if when < 1e6 else when // tokens)
        assert cfg.learning_rate * train.lr_factor(it - 1, cfg) == pytest.approx(rate, rel=1e-3), when


@pytest.mark.parametrize('changes, says', [
    (dict(global_batch=7, batch_size=7), 'complementary masks need an even global_batch, got 7'),
    (dict(global_batch=10), 'global_batch 10 must divide into 1 processes of batch_size 4'),
    (dict(vocab_size=5), 'vocab_size must hold'), (dict(n_head=3), 'd_model / n_head'),
    (dict(dataset='no/such'), 'no/such'), (dict(seq_len=10 ** 6), 'too few'),
    (dict(device='tpu'), "'tpu' is not available"), (dict(resume=True), 'no checkpoint'),
    (dict(init_from='no/such'), 'no checkpoint')], ids=str)
def test_a_mistake_is_one_line_and_leaves_nothing(corpus, tmp_path, monkeypatch, changes, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UserError, OSError), match=re.escape(says)):
        train.main(settings(corpus, tmp_path / 'run', **changes))
    assert not (tmp_path / 'run').exists()


def test_what_does_not_divide_into_processes_is_refused(corpus):
    with pytest.raises(UserError, match='global_batch 8 must divide into 2 processes of batch_size 8'):
        train.check(settings(corpus, 'x', batch_size=8), world=2)
    with pytest.raises(UserError, match='these into groups of fsdp 3'):
        train.check(settings(corpus, 'x', batch_size=2, fsdp=3), world=4)
    for fsdp in (-1, 0, 2, 8):                              # more than there are: one group
        train.check(settings(corpus, 'x', batch_size=2, fsdp=fsdp), world=4)


@pytest.mark.parametrize('changes, says', [
    (dict(), 'already holds a run'), (dict(resume=True, d_ff=64), 'd_ff 64, the run has 48'),
    (dict(resume=True, optimizer='adamw'), 'optimizer adamw, the run has muon'),
    (dict(resume=True, global_batch=16), 'global_batch 16, the run has 8'),
    (dict(resume=True, vocabulary='another'), 'its tokenizer is not the one of')], ids=str)
def test_a_run_is_not_overwritten_or_mixed_up(corpus, straight, tmp_path, changes, says):
    if changes.pop('vocabulary', None):
        corpus = small_corpus(tmp_path / 'other', tokenizer='bpe-262')      # of equal size
    with pytest.raises(UserError, match=re.escape(says)):
        train.main(settings(corpus, straight, **changes))
    assert (straight / 'iter_0000040').exists()
