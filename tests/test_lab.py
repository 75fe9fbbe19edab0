"""The experiments of tests/lab: all run, and find what is known."""

import json
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace

import experiments
import pytest
import torch
import worlds
from helpers import ROOT, script, small_corpus, tiny_model, write_worlds

import data
import diffusion
import evaluate
import model as M
import train
from configurator import configure, settings_of

TINY = ('--n_layer=1 --n_head=2 --n_kv_head=2 --d_model=32 --d_ff=48 --batch_size=2 --max_iters=2 --eval_windows=2 '
        '--eval_draws=1 --sample_tokens=0 --warmup_iters=1 --device=cpu').split()


def settings(**changes):
    return SimpleNamespace(**{**settings_of(experiments.NAMESPACE), 'batch_size': 8, **changes})


@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    """Runs to be measured: text, the world, instructions both ways, facts."""
    folder = tmp_path_factory.mktemp('lab')
    small_corpus(folder / 'text', 60)
    write_worlds(folder / 'data')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, flags in (('text', ['--dataset=./text', '--seq_len=96']),
                            ('text_ar', ['--dataset=./text', '--seq_len=96', '--causal=true']),
                            ('world', ['--dataset=world', '--seq_len=40', '--masking=response']),
                            ('sft', ['--dataset=instruct', '--seq_len=96', '--masking=response',
                                     '--init_from=out/world']),
                            ('uni', ['--dataset=instruct', '--seq_len=96', '--isolate=true']),
                            ('facts', ['--dataset=facts', '--seq_len=28', '--masking=response']),
                            ('facts_ar', ['--dataset=facts', '--seq_len=28', '--masking=response', '--causal=true'])):
            script('train', *TINY, *flags, f'--out_dir=out/{name}')
    return folder


def test_every_experiment_runs(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    (desk / 'poems.json').write_text(json.dumps([{'first': f'ab{i}', 'second': f'{i}cd'} for i in range(9)]))
    few = ['--mc_num=2', '--samples=4', '--draws=1', '--limit=6']
    for argv, columns in ((['log', 'out/text'], 'held out'), (['gaps', 'out/world'], 'best fit'),
                          (['by_t', 'out/text', 'out/sft', '--windows=8'], 'a hidden token'),
                          (['world', 'out/world'], 'x the source'),
                          (['ahead', 'out/world', '--windows=2'], 'passes'), (['flood', 'out/sft', 'out/uni'], '128'),
                          (['commit', 'out/world', '--windows=2'], 'still'),
                          (['commit', 'out/sft', '--gen_length=4'], 'same tokens %'),
                          (['reversal', 'out/facts', 'out/facts_ar'], 'unstated %'),
                          (['reversal', 'out/facts', '--poems=poems.json'], 'unstated %'),
                          (['scaling', 'out/text', 'out/text_ar'], 'autoregressive')):
        script('tests/lab/experiments', *argv, *few)
        assert columns in capsys.readouterr().out, argv


@pytest.mark.parametrize('argv, says', [
    (['nonsense', 'out/text'], 'want one of log'), (['world'], 'then checkpoints'),
    (['flood', 'out/facts_ar'], 'no canvas'), (['scaling', 'out/no*'], 'no checkpoint here'),
    (['curves', 'out/text_ar'], 'the model is autoregressive'), (['world', 'out/world', '--draws=0'], 'draws must be')])
def test_bad_requests_get_one_line(desk, monkeypatch, capsys, argv, says):
    monkeypatch.chdir(desk)
    with pytest.raises(SystemExit) as stopped:
        script('tests/lab/experiments', *argv)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and says in err and 'Traceback' not in err


def test_curves_and_scaling_write_tables_and_figures(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    monkeypatch.setattr(experiments, 'likelihood_spread', lambda *_: [['x', 'draws, Eq. 6: sd', 4, 0.1, 0.01, 9]])
    experiments.curves(settings(task='curves', checkpoints=['out/world'], samples=2, out='curves.csv'))
    lines = (desk / 'curves.csv').read_text().splitlines()
    assert lines[0] == 'checkpoint,sweep,setting,%,+-,tokens/s'
    assert {line.split(',')[1].strip('"') for line in lines[1:]} >= {'steps', 'block_length', 'temperature'}
    script('tests/lab/experiments', 'scaling', 'out/text*', '--out=scaling.csv')
    assert len((desk / 'scaling.csv').read_text().splitlines()) == 3
    assert all((desk / f'{name}.png').exists() == bool(find_spec('matplotlib')) for name in ('curves', 'scaling'))


@pytest.mark.parametrize('seed', range(4))
def test_guessing_ahead_changes_no_token(seed):
    """The same canvas as one step at a time, in as many passes or fewer; with nothing guessed in as many."""
    model = tiny_model(seed)
    x = torch.randint(0, 39, (1, 24), generator=torch.Generator().manual_seed(seed))
    x[:, 5:] = 39
    want = diffusion.generate(model, x, 39, steps=19)
    passes = []
    for n in (0, 1, 3, 30):
        got, more = experiments.speculate(model, x, 39, n)
        assert torch.equal(got, want.x)
        passes.append(more)
    assert passes[0] == 19 and passes == sorted(passes, reverse=True)


@pytest.mark.parametrize('seed', range(4))
def test_a_rule_that_allows_nothing_writes_one_token_a_pass(seed):
    model = tiny_model(seed)
    x = torch.randint(0, 39, (1, 24), generator=torch.Generator().manual_seed(seed))
    x[:, 5:] = 39
    want = diffusion.generate(model, x, 39, steps=19)
    for rule, most in ((experiments.threshold, 2.0), (experiments.factor, 0.0), (experiments.still, 0.0)):
        got, passes = experiments.written_by(rule, most, model, x, 39)
        assert torch.equal(got, want.x) and passes == 19, rule.__name__
    by_threshold = diffusion.generate(model, x, 39, steps=19, threshold=0.1)
    got, passes = experiments.written_by(experiments.threshold, 0.1, model, x, 39)
    assert torch.equal(got, by_threshold.x) and passes == by_threshold.n_forward


def test_what_each_rule_allows():
    """By hand: two coins that are 0.9 and 0.8 on one side, and one that is fair."""
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    h = torch.special.entr(p.double()).sum(-1)                              # 0.33, 0.50, 0.69 nats
    for rule, most, want in (
            (experiments.threshold, 0.91, 0), (experiments.threshold, 0.8, 2), (experiments.threshold, 0.5, 3),
            (experiments.factor, 0.19, 0), (experiments.factor, 0.21, 1), (experiments.factor, 0.59, 1),
            (experiments.factor, 0.61, 2), (experiments.factor, 2.1, 3),    # 2 * 0.1, 3 * 0.2, 4 * 0.5
            (experiments.entropy, 0.0, 1), (experiments.entropy, h[0] + 1e-6, 2),
            (experiments.entropy, h[0] + h[1] - 1e-6, 2), (experiments.entropy, h[0] + h[1] + 1e-6, 3)):
        trust, n = rule(p, None, most)
        assert int(n) == want and trust.argsort(descending=True).tolist() == [0, 1, 2], (rule.__name__, most)

    before = torch.tensor([[0.5, 0.5], [0.2, 0.8], [0.5, 0.5]])
    trust, n = experiments.still(p, before, 0.1, least=0.7)                 # the first one was moved by 0.37 nats
    assert int(n) == 1 and int(trust.argmax()) == 1
    trust, n = experiments.still(p, before, 0.4, least=0.7)
    assert int(n) == 2 and int(trust.argmax()) == 0


def test_who_is_sure_of_everything_needs_two_passes():
    def sure(ids):
        return (9 * torch.eye(12, 30) * torch.linspace(1, 2, 12)[:, None]).expand(len(ids), -1, -1)

    got, passes = experiments.speculate(sure, torch.full((1, 12), 29), 29, 30)
    assert got.tolist() == [list(range(12))] and passes == 2


def test_both_halves_are_filled_by_one_who_knows_them():
    """A model that has the couplets by heart: right in both directions; one that has not: in none."""
    tok = data.get_tokenizer('bytes')
    items = [{'first': a, 'join': ' to ', 'second': b} for a, b in (('ab', 'cd'), ('ef', 'gh'), ('xy', 'zz'))]
    rows = torch.tensor([[*tok.encode(''.join((i['first'], i['join'], i['second']))), tok.eos_id] for i in items])

    class Heart(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config, self.nothing = config, torch.nn.Parameter(torch.zeros(1))

        def forward(self, ids):
            agree = ((ids[:, None] == rows) | (ids[:, None] == tok.mask_id)).all(-1).float()
            return (torch.nn.functional.one_hot(rows, 300).float() * agree[:, :, None, None]).sum(1)

    for knows in (True, False):
        if not knows:
            rows[:, :2] = rows[:, [1, 0]]
            rows[:, -3:-1] = rows[:, [-2, -3]]
            items[2]['second'] = 'zy'
        model = Heart(SimpleNamespace(causal=False, vocab_size=300, seq_len=32))
        run = evaluate.Run('heart', model, {}, tok, 'cpu', nullcontext(), False)
        for which in ('first', 'second'):
            assert experiments.fill(run, items, which, settings()) == [knows] * 3


def test_the_fit_of_a_power_law_is_found(desk, monkeypatch, capsys):
    """Runs whose bounds lie on 3 C^-0.1 and 6 C^-0.1: diffusion needs 2^10 times the compute."""
    monkeypatch.chdir(desk)
    for name in ('p0', 'p1', 'p2', 'q0', 'q1', 'q2'):
        (desk / 'fit' / name).mkdir(parents=True)
    model = tiny_model()

    def load(name, cfg):
        path = desk / name
        causal, n = path.name[0] == 'q', 10 ** int(path.name[1])
        flops = n * 96 * model.flops_per_token(1.0 if causal else 0.5)
        entry = dict(iter=n, val_nats=1.0, val_bits_per_byte=(3 if causal else 6) * flops ** -0.1,
                     val_bits_per_byte_stderr=0.)
        (path / 'log.jsonl').write_text(json.dumps(entry) + '\n')
        return SimpleNamespace(model=model, causal=causal,
                               meta={'config': {'global_batch': 0, 'batch_size': 1, 'seq_len': 96}})

    monkeypatch.setattr(evaluate, 'load', load)
    experiments.scaling(settings(checkpoints=['fit/*']))
    out = capsys.readouterr().out
    assert out.count('FLOPs^-0.1000') == 2 and '1.02e+03 times' in out


@pytest.mark.parametrize('size, flops', [('s', 1e12), ('m', 4e12), ('l', 1.6e13)])
def test_the_sizes_get_equal_flops(size, flops):
    """With the vocabulary that the documentation has: the head of a small model is most of it."""
    for name in (f'scaling_{size}', f'scaling_{size}_ar'):
        cfg = SimpleNamespace(**configure(settings_of(vars(train)), [str(ROOT / 'config' / f'{name}.py')]))
        shape = {field: getattr(cfg, field) for field in train.SHAPE}
        vocab_size = int(data.DATASETS[cfg.dataset][1].removeprefix('bpe-'))
        each = M.empty_model(M.ModelConfig(vocab_size, **shape)).flops_per_token(1.0 if cfg.causal else 0.5)
        assert each * train.update_size(cfg) * cfg.seq_len * cfg.max_iters == pytest.approx(flops, rel=2e-3)


def test_the_config_of_every_experiment_names_what_draws_its_result():
    for name in ('world', 'sft_toy_unified', 'reversal_facts', 'reversal_poems', 'scaling_s'):
        assert 'python tests/lab/experiments.py ' in (ROOT / 'config' / f'{name}.py').read_text()


def test_one_command_writes_what_the_configs_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'poems.json').write_text(json.dumps([{'first': f'ab{i}', 'second': f'{i}\u6f22'} for i in range(9)]))
    monkeypatch.setattr(worlds, 'stories', lambda n=0, real=worlds.stories: real(200))
    monkeypatch.setattr(worlds, 'dialogues', lambda n=0, real=worlds.dialogues: real(200))
    worlds.main({'poems': '', 'out': 'data'})
    worlds.main({'poems': 'poems.json', 'out': 'data'})
    for name, n in (('world', 200), ('instruct', 200), ('facts', 2 * 96), ('poems', 18)):
        corpus = data.Corpus(f'data/{name}')
        counted = sum(len(set(corpus.rows(split)[:, 3].tolist())) for split in ('train', 'val'))
        assert counted == n
    tok = data.Corpus('data/poems').tokenizer()
    assert len(tok.encode('ab1\n\u6f22')) == 5                       # one token a character
