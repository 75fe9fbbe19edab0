"""The experiments of tests/lab run, and find what is known."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import estimate
import experiments
import pytest
import torch
import worlds
from helpers import ROOT, script, seeded, small_corpus, tiny_model, write_worlds

import data
import diffusion
import evaluate
import model as models
import sample
import train
from configurator import configure
from diffusion import SamplingParams

TINY = ('--n_layer=1 --n_head=2 --n_kv_head=2 --d_model=32 --d_ff=48 --batch_size=2 --max_iters=2 '
        '--eval_windows=2 --eval_draws=1 --sample_tokens=0 --warmup_iters=1 --device=cpu').split()
RUNS = {
    'text': '--dataset=./text --seq_len=96',
    'text_ar': '--dataset=./text --seq_len=96 --causal',
    'world': '--dataset=world --seq_len=40 --masking=response',
    'sft': '--dataset=instruct --seq_len=96 --masking=response --init_from=out/world',
    'unified': '--dataset=instruct --seq_len=96 --isolate',
    'facts': '--dataset=facts --seq_len=28 --masking=response',
    'facts_ar': '--dataset=facts --seq_len=28 --masking=response --causal'}
# what may be kept for the backward pass
KEPT = [dict(act_memory=1.0), dict(act_memory=0.0), dict(act_memory=0.5, compile=True)]


def settings(**changes):
    namespace = {**vars(evaluate), **vars(experiments)}
    return SimpleNamespace(**{**configure(namespace, []), 'batch_size': 8, **changes})


@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    """A folder with tiny runs on text, on the world, on instructions in both ways, and on facts."""
    folder = tmp_path_factory.mktemp('lab')
    small_corpus(folder / 'text', 60)
    write_worlds(folder / 'data')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, flags in RUNS.items():
            script('train', *TINY, *flags.split(), f'--out_dir=out/{name}')
    return folder


# -------------------------------------------------------------------------------------------- all of them run


@pytest.mark.parametrize('words, column', [
    ('log out/text', 'held out'),
    ('gaps out/world', 'best fit'),
    ('by_t out/text out/sft --windows=8', 'per hidden token'),
    ('world out/world', 'x the source'),
    ('ahead out/world --windows=2', 'passes'),
    ('flood out/sft out/unified', '128'),
    ('commit out/world --windows=2', 'unchanged'),
    ('commit out/sft --gen_length=4', 'same tokens %'),
    ('reversal out/facts out/facts_ar', 'unstated %'),
    ('reversal out/facts --poems=poems.json', 'unstated %'),
    ('scaling out/text out/text_ar', 'autoregressive')])
def test_every_experiment_runs(desk, monkeypatch, capsys, words, column):
    monkeypatch.chdir(desk)
    (desk / 'poems.json').write_text(json.dumps([{'first': f'ab{i}', 'second': f'{i}cd'} for i in range(9)]))
    few = ['--windows=20', '--samples=4', '--draws=1', '--limit=6', '--candidates=4']
    script('tests/lab/experiments', *few, *words.split())
    assert column in capsys.readouterr().out


@pytest.mark.parametrize('words, message', [
    ('nonsense out/text', 'expected one of log'),
    ('world', 'and then checkpoints'),
    ('flood out/facts_ar', 'no canvas'),
    ('scaling out/no*', 'no checkpoint here'),
    ('curves out/text_ar', 'the model is autoregressive'),
    ('reversal out/facts --poems=data/world/manifest.json', 'manifest.json: expected [{"first"'),
    ('gaps out/facts', 'no held-out story')])
def test_a_wrong_request_gets_one_line(desk, monkeypatch, capsys, words, message):
    monkeypatch.chdir(desk)
    with pytest.raises(SystemExit) as stopped:
        script('tests/lab/experiments', *words.split())
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and message in err and 'Traceback' not in err


SCRIPTS = ('lab/estimate', 'lab/experiments', 'lab/hooks', 'lab/pictures', 'lab/trace', 'lab/worlds',
           'bench_kernels', 'bench_sample', 'bench_train')


@pytest.mark.parametrize('name', SCRIPTS)
def test_help_says_what_a_script_does_and_what_each_setting_means(name, capsys):
    try:
        script(f'tests/{name}', '--help')
    except SystemExit as stopped:
        assert not stopped.code
    out = capsys.readouterr().out
    assert f'python tests/{name}.py' in out and '\nusage: ' in out
    settings = re.findall(r'^  --(\w+)=(.*)', out, re.M)
    names = [name for name, _ in settings]
    assert len(names) == len(set(names)) > 1
    for name, value_and_comment in settings:
        assert re.search(r' \w', value_and_comment), name


@pytest.mark.parametrize('command, message', [
    ('lab/hooks choice out/text', 'task must be one of gaps, exact, lm_eval'),
    ('lab/hooks gaps out/text', 'expected a checkpoint and a gap'),
    ('lab/estimate --gpus=0', 'gpus must be at least 1'), ('lab/estimate --gpu=2', 'did you mean gpus'),
    ('lab/worlds --poem=x', 'did you mean poems'), ('bench_train --task=x', 'task must be one of speed'),
    ('bench_kernels --parts=x', 'expected some of products'),
    ('bench_sample --only=x', 'expected some of plain loop')])
def test_a_mistyped_word_gets_one_line(command, message, capsys):
    name, *argv = command.split()
    with pytest.raises(SystemExit) as stopped:
        script(f'tests/{name}', *argv)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and message in err and err.count('\n') == 1


@pytest.mark.parametrize('of', ['random weights', 'a checkpoint'])
def test_the_benchmark_shows_each_row_when_it_is_measured(of, desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    argv = ['--gen_length=4', '--block_length=2', '--only=exact;exact, 2 tokens per step', '--rounds=2']
    if of == 'a checkpoint':
        argv += ['--checkpoint=out/sft', '--questions=3']
    else:
        argv += '--d_model=32 --n_layer=1 --n_head=2 --d_ff=48 --vocab_size=99 --prompt_length=9'.split()
    script('tests/bench_sample', *argv)
    out, err = capsys.readouterr()
    assert [line[:20] for line in err.splitlines() if 'passes' in line] == [
        f'round {k} of 2 | exact' for k in (1, 1, 2, 2)]
    head, first, second = out.splitlines()
    assert head.startswith('sampler ') and first.startswith('exact ') and second.startswith('exact, 2 tokens')
    assert ('right %' in head) == (of == 'a checkpoint')


def test_curves_and_scaling_write_tables_and_figures(desk, monkeypatch):
    monkeypatch.chdir(desk)
    row = ['x', 'draws, Eq. 6: sd', 4, 0.1, 0.01, 9]
    monkeypatch.setattr(experiments, 'likelihood_spread', lambda *_: [row])
    experiments.curves(settings(checkpoints=['out/world'], samples=2, out='curves.csv'))
    lines = (desk / 'curves.csv').read_text().splitlines()
    assert lines[0] == 'checkpoint,sweep,setting,%,+-,tokens/s'
    assert {line.split(',')[1].strip('"') for line in lines[1:]} >= {'steps', 'block_length', 'temperature'}

    script('tests/lab/experiments', 'scaling', 'out/text*', '--out=scaling.csv')
    assert len((desk / 'scaling.csv').read_text().splitlines()) == 3
    for name in ('curves', 'scaling'):
        assert (desk / f'{name}.png').exists() == bool(find_spec('matplotlib'))


def test_the_spread_of_the_two_forms_of_the_bound(desk, monkeypatch):
    monkeypatch.chdir(desk)
    run = evaluate.load('out/world', settings())
    table = experiments.likelihood_spread(run, settings(), repeats=3)
    assert len(table) == 8 and all(row[3] > 0 for row in table)


# ------------------------------------------------------------------------------ fewer passes, the same tokens


def half_written(seed):
    """Return a canvas of 24 tokens of which 19 are masks, and what the sampler makes of it."""
    model = tiny_model(seed)
    x = torch.randint(0, 39, (1, 24), generator=seeded(seed))
    x[:, 5:] = 39
    return model, x, diffusion.generate(model, x, 39, SamplingParams()).x


@pytest.mark.parametrize('seed', range(4))
def test_guessing_ahead_changes_no_token(seed):
    model, x, expected = half_written(seed)
    passes = []
    for n in (0, 1, 3, 30):
        got, n_forward = experiments.speculate(model, x, 39, n)
        assert torch.equal(got, expected)
        passes.append(n_forward)
    assert passes[0] == 19 and passes == sorted(passes, reverse=True)


def test_a_model_that_is_always_certain_needs_two_passes():
    logits = 9 * torch.eye(12, 30) * torch.linspace(1, 2, 12)[:, None]
    certain = diffusion.plain(lambda ids: logits.expand(len(ids), -1, -1))
    got, n_forward = experiments.speculate(certain, torch.full((1, 12), 29), 29, 30)
    assert got.tolist() == [list(range(12))] and n_forward == 2


@pytest.mark.parametrize('seed', range(4))
def test_a_rule_that_allows_nothing_commits_one_token_per_pass(seed):
    model, x, expected = half_written(seed)
    for name, most in (('by_threshold', 2.0), ('by_factor', 0.0), ('by_change', 0.0)):
        got, n_forward = experiments.generate_by_rule(getattr(experiments, name), most, model, x, 39)
        assert torch.equal(got, expected) and n_forward == 19, name


@pytest.mark.parametrize('seed', range(4))
def test_the_threshold_rule_is_the_threshold_of_the_sampler(seed):
    model, x, _ = half_written(seed)
    expected = diffusion.generate(model, x, 39, SamplingParams(threshold=0.1))
    got, n_forward = experiments.generate_by_rule(experiments.by_threshold, 0.1, model, x, 39)
    assert torch.equal(got, expected.x) and n_forward == expected.n_forward


# two coins that fall on one side with probability 0.9 and 0.8, and a fair one
COINS = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
H = torch.special.entr(COINS).sum(-1).tolist()                              # 0.33, 0.50, 0.69 nats


@pytest.mark.parametrize('rule, most, n', [
    ('by_threshold', 0.91, 0), ('by_threshold', 0.8, 2), ('by_threshold', 0.5, 3),
    ('by_factor', 0.19, 0), ('by_factor', 0.21, 1), ('by_factor', 0.59, 1),     # 2 * 0.1, 3 * 0.2, 4 * 0.5
    ('by_factor', 0.61, 2), ('by_factor', 2.1, 3),
    ('by_entropy', 0.0, 1), ('by_entropy', H[0] + 1e-6, 2),
    ('by_entropy', H[0] + H[1] - 1e-6, 2), ('by_entropy', H[0] + H[1] + 1e-6, 3)])
def test_what_each_rule_allows(rule, most, n):
    confidence, allowed = getattr(experiments, rule)(COINS, None, most)
    assert int(allowed) == n and confidence.argsort(descending=True).tolist() == [0, 1, 2]


@pytest.mark.parametrize('most, n, best', [(0.1, 1, 1), (0.4, 2, 0)])
def test_a_guess_that_the_last_pass_has_changed_waits(most, n, best):
    before = torch.tensor([[0.5, 0.5], [0.2, 0.8], [0.5, 0.5]])     # the first one has changed by 0.37 nats
    confidence, allowed = experiments.by_change(COINS, before, most, least=0.7)
    assert int(allowed) == n and int(confidence.argmax()) == best


# ----------------------------------------------------------------------------------------- what they conclude


class ByHeart(torch.nn.Module):
    """A mask predictor that knows a few rows by heart."""

    def __init__(self, rows, mask_id):
        super().__init__()
        self.config = SimpleNamespace(causal=False, vocab_size=300, seq_len=32)
        self.somewhere = torch.nn.Parameter(torch.zeros(1))
        self.rows = rows
        self.mask_id = mask_id

    def forward(self, ids, positions=None, **unused):
        agrees = ((ids[:, None] == self.rows) | (ids[:, None] == self.mask_id)).all(-1).float()
        logits = torch.einsum('br,rtv->btv', agrees, torch.nn.functional.one_hot(self.rows, 300).float())
        return logits[positions]


@pytest.mark.parametrize('knows', [True, False])
@pytest.mark.parametrize('half', ['first', 'second'])
def test_both_halves_are_filled_by_a_model_that_knows_them(half, knows):
    tok = data.get_tokenizer('bytes')
    items = [dict(first='ab', join=' to ', second='cd'), dict(first='ef', join=' to ', second='gh')]
    rows = torch.tensor([[*tok.encode('ab to cd'), tok.eos_id], [*tok.encode('ef to gh'), tok.eos_id]])
    if not knows:
        rows[:, [0, 1, 6, 7]] = rows[:, [1, 0, 7, 6]]
    run = sample.Run('by heart', ByHeart(rows, tok.mask_id), {}, tok, [], 'response')
    assert experiments.fill_halves(run, items, half, settings()) == [knows] * 2


def test_the_power_law_is_found(desk, monkeypatch, capsys):
    """If the bounds lie on 3 C^-0.1 and 6 C^-0.1, then diffusion needs 2^10 times the compute."""
    monkeypatch.chdir(desk)
    model = tiny_model()
    causal_model = tiny_model(causal=True)

    def load(name, cfg):
        causal = name[-2] == 'a'
        iteration = 10 ** int(name[-1])
        flops = iteration * 96 * model.flops_per_token(1.0 if causal else 0.5)
        bits = (3 if causal else 6) * flops ** -0.1
        entry = dict(iter=iteration, val_nats=1.0, val_bits_per_byte=bits, val_bits_per_byte_stderr=0.)
        (desk / name / 'log.jsonl').write_text(json.dumps(entry) + '\n')
        meta = {'settings': {'global_batch': 1, 'seq_len': 96}}
        return sample.Run(name, causal_model if causal else model, meta, None, [], 'unified')

    for name in ('a0', 'a1', 'a2', 'd0', 'd1', 'd2'):
        (desk / 'fit' / name).mkdir(parents=True)
    monkeypatch.setattr(evaluate, 'load', load)
    experiments.scaling(settings(checkpoints=['fit/*']))
    out = capsys.readouterr().out
    assert out.count('FLOPs^-0.1000') == 2 and '1.02e+03 times' in out


def test_the_last_entry_of_an_iteration_counts(tmp_path):
    entries = [dict(resumed=0), dict(iter=10, loss=3.), dict(iter=20, loss=2.), dict(iter=20, val_nats=2.1),
               dict(resumed=10), dict(iter=20, loss=1.)]
    (tmp_path / 'log.jsonl').write_text(''.join(json.dumps(entry) + '\n' for entry in entries))
    assert experiments.read_log(tmp_path) == [entries[1], entries[5], entries[3]]


# ---------------------------------------------------------------------------------------------- their configs


@pytest.mark.parametrize('size, flops', [('s', 1e12), ('m', 4e12), ('l', 1.6e13)])
def test_both_families_get_equal_flops(size, flops):
    """The head is most of a small model, so this holds for the vocabulary of docs only, 4,096."""
    for name in (f'scaling_{size}', f'scaling_{size}_ar'):
        cfg = SimpleNamespace(**configure(dict(vars(train)), [str(ROOT / 'config' / 'lab' / f'{name}.py')]))
        cfg.vocab_size = 4096
        shape = {field: getattr(cfg, field) for field in models.ModelConfig.__dataclass_fields__}
        model = models.empty_model(models.ModelConfig(**shape))
        per_token = model.flops_per_token(1.0 if cfg.causal else 0.5)
        tokens = cfg.max_iters * cfg.batch_size * cfg.seq_len
        assert cfg.global_batch == 0 and per_token * tokens == pytest.approx(flops, rel=3e-3)


@pytest.mark.parametrize('name', [
    'world', 'sft_toy_unified', 'lab/reversal_facts', 'lab/reversal_poems', 'lab/scaling_l'])
def test_a_config_names_the_experiment_that_it_is_for(name):
    assert 'python tests/lab/experiments.py ' in (ROOT / 'config' / f'{name}.py').read_text(encoding='utf-8')


@pytest.mark.parametrize('file', sorted((ROOT / 'config').rglob('*_ar.py')), ids=lambda file: file.stem)
def test_a_twin_differs_in_the_causal_mask_alone(file):
    """And where FLOPs are to be equal, in the number of updates."""
    twin = configure(dict(vars(train)), [str(file)])
    diffusion_model = configure(dict(vars(train)), [str(file).replace('_ar.py', '.py')])
    differs = {name for name in twin if twin[name] != diffusion_model[name]}
    more = {'max_iters'} if 'scaling' in file.stem else set()
    assert differs == {'out_dir', 'causal'} | more


def test_a_twin_of_a_config_trains_and_resumes_from_its_own_config(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    script('train', ROOT / 'config' / 'lab' / 'reversal_facts_ar.py', *TINY, '--out_dir=out/twin')
    script('train', 'out/twin/settings.py', '--resume', '--max_iters=3')
    assert 'saved iteration 3 of 3' in capsys.readouterr().out
    written = configure(dict(vars(train)), ['out/twin/settings.py'])
    assert written['causal'] and written['seq_len'] == 28 and written['optimizer'] == 'muon'


# -------------------------------------------------------------------------------------------------- estimates


def estimated(argv, capsys):
    script('tests/lab/estimate', *argv)
    return capsys.readouterr().out


@pytest.mark.slow
def test_the_estimate_of_the_8b(capsys):
    """(Of two of its layers, so that it takes a moment.)"""
    out = estimated([ROOT / 'config' / 'llada_8b.py', '--gpus=320', '--n_layer=2'], capsys)
    assert '5,242,880 tokens: 320 GPUs x 1 passes x 4 windows' in out and '126,464 (vocab_size is set)' in out
    assert re.search(r'GB +on each of 320 GPUs at the peak of an update: fits into 80 GiB', out)


def test_the_vocabulary_is_set_or_that_of_the_data_or_assumed(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    bytes_and_roles = data.get_tokenizer('bytes').vocab_size
    for argv, says in ((['--vocab_size=99'], '99 (vocab_size is set)'),
                       (['--dataset=./text'], f'{bytes_and_roles} (that of text)'),
                       (['--dataset=facts:0.5,none:0.5'], f'{bytes_and_roles} (that of data/facts)'),
                       (['--dataset=none'], '4,096 (assumed, because none is not prepared; --vocab_size=N ')):
        assert says in estimated([*TINY, *argv], capsys)


def shape_of_a_run(**changes):
    """Return the settings of a small sharded run. Each number divides by four."""
    cfg = configure(dict(vars(train)), '--d_model=64 --d_ff=96 --n_layer=2 --seq_len=32 --fsdp=-1'.split())
    return SimpleNamespace(**{**cfg, 'vocab_size': 512, 'batch_size': 4, 'keeps_gradients': False, **changes})


@pytest.mark.parametrize('keeps_gradients', [False, True])
def test_four_processes_hold_a_quarter_each(keeps_gradients):
    cfg = shape_of_a_run(keeps_gradients=keeps_gradients)
    shape = {field: getattr(cfg, field) for field in models.ModelConfig.__dataclass_fields__}
    model = models.empty_model(models.ModelConfig(**shape))
    n_tensors = len(list(model.parameters()))
    with estimate.fake_machine(4):
        parts = estimate.peak_memory(cfg)
    assert parts['Optstate'] == 2 * model.num_params() + 4 * n_tensors      # two moments, and the steps
    assert parts['Parameter'] > model.num_params()                          # shards, and what is gathered
    assert (parts['Gradient'] >= model.num_params()) == keeps_gradients


@pytest.mark.slow
def test_the_estimate_equals_what_four_real_processes_hold(tmp_path):
    """Byte for byte, by the same tracker: eager, recomputed, and as the compiler plans it."""
    program = tmp_path / 'program.py'
    program.write_text(f'''
import sys
sys.path[:0] = {[str(ROOT), str(ROOT / 'tests'), str(ROOT / 'tests' / 'lab')]!r}
import estimate, test_lab, train
train.join_processes(test_lab.shape_of_a_run(device='cpu'))
for changes in test_lab.KEPT:
    parts = estimate.peak_memory(test_lab.shape_of_a_run(**changes))
    if train.RANK == 0:
        print(list(parts.values()), flush=True)
''')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=4', program]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line for line in run.stdout.splitlines() if line.startswith('[')]
    for changes, line in zip(KEPT, lines, strict=True):
        with estimate.fake_machine(4):
            assert list(estimate.peak_memory(shape_of_a_run(**changes)).values()) == json.loads(line), changes


# ------------------------------------------------------------------------------------------------- their data


def test_one_command_writes_the_data_sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    couplets = [{'first': f'ab{i}', 'second': f'{i}\u6f22'} for i in range(9)]
    (tmp_path / 'poems.json').write_text(json.dumps(couplets))
    dialogues = worlds.dialogues
    monkeypatch.setattr(worlds, 'dialogues', lambda n=0: dialogues(200))
    worlds.main(SimpleNamespace(poems='', n_stories=200, out='data'))
    worlds.main(SimpleNamespace(poems='poems.json', out='data'))

    splits = {name: data.Corpus(f'data/{name}').facts for name in ('world', 'instruct', 'facts', 'poems')}
    examples = {name: facts['train']['examples'] + facts['val']['examples'] for name, facts in splits.items()}
    assert examples['world'] == 200 and examples['instruct'] > 200          # some dialogues have two answers
    assert examples['facts'] == 2 * 96 and examples['poems'] == 2 * 9       # held out is what was trained on
    tok = data.get_tokenizer('data/poems')
    assert len(tok.encode('ab1\n\u6f22')) == 5                              # one token per character


def test_a_word_of_the_world_is_one_token(tmp_path):
    worlds.words_of_the_world(tmp_path / 'words')
    tok = data.get_tokenizer(tmp_path / 'words')
    for kind in ('girl', 'boy', 'colour', 'thing', 'animal', 'food', 'day'):
        for word in worlds.WORDS[kind]:
            assert len(tok.encode(f' {word}')) == 1, word
