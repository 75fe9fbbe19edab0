"""evaluate.py: scores that can be worked out by hand, every task end to end, and mistakes in one line."""

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, script, small_corpus, tiny_model

import data
import diffusion
import evaluate
import model as models
import sample
from configurator import UserError, configure

WHICH = {'question': 'Which?', 'choices': ['this', 'that', 'other'], 'answer': 2}


def settings(**changes):
    cfg = configure(dict(vars(evaluate)), [])
    return SimpleNamespace(**{**cfg, 'batch_size': 8, 'dtype': 'float32', **changes})


def run_of(**changes):
    """A small random model of bytes, as evaluate.load gives it."""
    tok = data.get_tokenizer('bytes')
    model = tiny_model(**{'vocab_size': tok.vocab_size, 'seq_len': 32, **changes})
    return sample.Run('tiny', model, {'settings': None}, tok, [], None)


def save(run, folder, masking, dataset):
    """Write a checkpoint as if train.py had made it."""
    ids = {f'{role}_id': getattr(run.tok, f'{role}_id') for role in models.ROLES}
    models.save_model(run.model, folder, ids)
    run.tok.save(folder)
    state = {'iteration': 2, 'settings': {'masking': masking, 'dataset': str(dataset)}}
    (folder / 'state.json').write_text(json.dumps(state))


@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    """A folder with models of text (diffusion and causal) and of questions, and their data."""
    folder = tmp_path_factory.mktemp('evaluate')
    small_corpus(folder / 'text', 60)
    records = [(f'q{i}', {'task': 'ab'[i % 2], 'messages': [
        {'role': 'user', 'content': f'{i}?'}, {'role': 'assistant', 'content': f'{i}!'}]}) for i in range(60)]
    data.prepare([records], folder / 'qa', 'bytes')

    save(run_of(seq_len=96), folder / 'diffusion', 'unified', folder / 'text')
    save(run_of(seq_len=96, causal=True), folder / 'causal', 'unified', folder / 'text')
    save(run_of(seq_len=96), folder / 'examples', 'response', folder / 'qa')
    models.save_model(run_of().model, folder / 'released', {})
    run_of().tok.save(folder / 'released')
    (folder / 'choices.jsonl').write_text(json.dumps(WHICH) + '\n' + json.dumps({**WHICH, 'answer': 'this'}))
    (folder / 'sums.jsonl').write_text(json.dumps({'question': '1 + 1?', 'answer': 'two\n#### 2'}) + '\n')
    return folder


@pytest.fixture
def at_desk(desk, monkeypatch):
    monkeypatch.chdir(desk)


def printed(capsys, *argv):
    """The lines of the table that a call prints, as lists of words."""
    script('evaluate', *argv, '--dtype=float32')
    return [line.split() for line in capsys.readouterr().out.splitlines()]


# ------------------------------------------------------------------------------------------------------------ bound


def test_bound_is_the_mean_over_rows(at_desk, capsys):
    head, *rows = printed(capsys, 'bound', 'diffusion', 'causal', '--draws=4', '--windows=5', '--out=t.csv')
    names = ['nats/token', '+-', 'bits/byte', '+-', 'above', 'the', 'first', '+-']
    assert head[2:] == names and [row[2] for row in rows] == ['<=', '=']

    source = data.open_source(data.open_dataset('text'), 'val', 'unified', data.get_tokenizer('bytes'), 96)
    rows_of_text = source.held_out(5)[0]
    nats = []
    for name in ('diffusion', 'causal'):
        run = evaluate.load(name, settings())
        each = [evaluate.score_row(run, x, m, settings(), 4, (i,)) for i, (x, m) in enumerate(rows_of_text)]
        nats.append(-torch.tensor(each, dtype=torch.float64) / 96)
    for row, values in zip(rows, nats):
        assert float(row[3]) == pytest.approx(values.mean().item(), abs=1e-4)
        assert float(row[4]) == pytest.approx(values.std().item() / 5 ** 0.5, abs=1e-4)

    # the difference is paired
    bits = (nats[1] - nats[0]) * 96 / source.held_out(5)[1] / math.log(2)
    assert rows[0][7:] == ['0.0000', '0.0000']
    assert float(rows[1][7]) == pytest.approx(bits.mean().item(), abs=1e-4)
    assert float(rows[1][8]) == pytest.approx(bits.std().item() / 5 ** 0.5, abs=1e-4)
    assert Path('t.csv').read_text().splitlines()[1].split(',')[3:5] == rows[0][3:5]


def test_a_row_is_scored_by_the_formulas_of_the_paper():
    run = run_of()
    x0 = torch.randint(0, 256, (20,))
    maskable = torch.arange(20) >= 8
    got = evaluate.score_row(run, x0, maskable, settings(), 16, (3,))
    assert got == diffusion.log_likelihood(
        run.model, x0, maskable, run.tok.mask_id, mc_num=16, generator=diffusion.keyed_generator(1, 3))
    causal = run_of(causal=True)
    got = evaluate.score_row(causal, x0, maskable, settings(), 16, (3,))
    assert got == diffusion.ar_log_likelihood(causal.model, x0, maskable, bos_id=causal.tok.eos_id)


def test_bound_of_examples(at_desk, capsys):
    head, row = printed(capsys, 'bound', 'examples', '--draws=2')
    assert head[-2:] == ['bits/byte', '+-'] and row[:3] == ['examples', '2', '<='] and len(row) == 7


# ----------------------------------------------------------------------------------------------------------- choice


def test_shapes_of_multiple_choice():
    expected = {'context': 'Question: Which?\nAnswer:', 'choices': ['this', 'that', 'other'], 'answer': 2}
    assert evaluate.as_choice(WHICH) == expected
    assert evaluate.as_choice({**WHICH, 'answer': 'other'}) == expected
    plain = {'context': '', 'choices': ['They go.', 'They goes.'], 'answer': 0}
    assert evaluate.as_choice(plain) == plain
    for change in ({'answer': 3}, {'answer': 'c'}, {'answer': None}):
        with pytest.raises(ValueError, match='none of the 3 choices'):
            evaluate.as_choice({**WHICH, **change})


def test_pairs_are_encoded_as_one_text():
    run = run_of()
    for context, continuation in (('Question: x\nAnswer:', ' yes'), ('Go ', 'home'), ('', 'all of it'), ('a', 'b')):
        before, after = evaluate.encode_pair(context, continuation, run)
        assert run.tok.decode(before) == context.rstrip() and run.tok.decode(before + after) == context + continuation


def test_one_token_is_scored_by_its_log_probability():
    """Whatever the method, and however many masks, because there is only one mask."""
    run = run_of()
    tok = run.tok
    pairs = [evaluate.encode_pair('x:', text, run) for text in 'abcd']

    def expected(model, ids, position):
        logp = model(torch.tensor([ids]))[0, position].log_softmax(-1)
        return pytest.approx([logp[ord(text)].item() for text in 'abcd'], abs=1e-5)

    def scores(run, **changes):
        return [evaluate.score(run, *pair, settings(**changes)) for pair in pairs]

    alone = expected(run.model, [*b'x:', tok.mask_id], 2)
    with_eos = expected(run.model, [*b'x:', tok.mask_id, tok.eos_id], 2)
    for changes in (dict(mc_num=1), dict(mc_num=16), dict(method='confidence')):
        assert scores(run, **changes) == alone and scores(run, **changes) != with_eos
        assert scores(run, pad_eos=True, **changes) == with_eos

    causal = run_of(causal=True)
    assert scores(causal) == expected(causal.model, [tok.eos_id, *b'x:'], -1)
    assert scores(causal, method='confidence', pad_eos=True) == scores(causal)


def test_choices_of_a_question_share_their_masks(monkeypatch):
    run = run_of(seq_len=64)
    seeds = []

    def noted(*args, generator, **options):
        seeds.append(generator.initial_seed())
        return 0.0

    monkeypatch.setattr(diffusion, 'log_likelihood', noted)
    pairs = [evaluate.encode_pair('which?', text, run) for text in (' this', ' that')]
    for same_masks in (True, False):
        for pair in pairs:
            evaluate.score(run, *pair, settings(same_masks=same_masks))
    assert seeds[0] == seeds[1] and seeds[2] != seeds[3]


def test_a_context_that_is_too_long_loses_its_beginning_but_not_bos(monkeypatch):
    run = run_of(seq_len=16)
    run = run._replace(start=[run.tok.bos_id])
    rows = []
    monkeypatch.setattr(evaluate, 'score_row', lambda run, x0, maskable, *_: rows.append((x0, maskable)))
    evaluate.score(run, list(range(100)), [7, 8, 9], settings(pad_eos=True))
    (x0, maskable), = rows
    assert x0.tolist() == [run.tok.bos_id, *range(89, 100), 7, 8, 9, run.tok.eos_id]
    assert maskable.nonzero()[:, 0].tolist() == [12, 13, 14]
    with pytest.raises(UserError, match='16 tokens to score'):
        evaluate.score(run, [], list(range(16)), settings())


def test_the_likelier_choice_counts(at_desk, capsys, monkeypatch):
    """By a table of scores: "this" is the most likely, but per byte "other" is."""
    def score_of_table(run, before, after, cfg):
        return {' this': -3.0, ' that': -9.0, ' other': -3.5}[run.tok.decode(after)]

    monkeypatch.setattr(evaluate, 'score', score_of_table)
    evaluate.choice(settings(checkpoints=['diffusion'], input=['choices.jsonl']))
    rows = [line.split()[:5] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [['diffusion,', name, 'choices', '2', '50.0'] for name in ('acc', 'acc_norm')]
    lines = [json.dumps({**WHICH, 'answer': 'this'})] * 3
    Path('a.jsonl').write_text('\n'.join([*lines, json.dumps(WHICH)]))
    evaluate.choice(settings(checkpoints=['diffusion'], input=['a.jsonl', 'choices.jsonl']))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [(row[1], row[2], row[4]) for row in rows] == [
        ('acc', 'a', '75.0'), ('acc', 'choices', '50.0'), ('acc', 'all', '66.7'),
        ('acc_norm', 'a', '25.0'), ('acc_norm', 'choices', '50.0'), ('acc_norm', 'all', '33.3')]


# ------------------------------------------------------------------------------------------------------------ exact


@pytest.mark.parametrize('said, wanted, hit', [
    ('#### 72.', '72', True), ('#### 1080', '1,080', True), ('#### 18.00', '18', True), ('#### $18', '18', True),
    ('#### 1,080.00', '1080', True), ('#### \u22125', '-5', True), ('#### 5 \u20ac', '5', True),
    ('#### \xa318', '18', True), ('#### 18 dollars', '18', True), ('#### -5', '5', False), ('#### .', '72', False),
    ('#### 3/4', '3', False), ('#### 70 #### 72', '72', True), ('#### A1', 'B1', False), ('#### yes', 'yes', True),
    ('#### .5', '0.50', True), ('72', '72', False), ('#### 72\nQuestion: 1 + 1?\n#### 2', '72', True)])
def test_numbers_are_compared_as_numbers(said, wanted, hit):
    item = evaluate.as_question({'question': 'How many?', 'answer': f'#### {wanted}'})
    assert evaluate.right(said, item, r'#### ([^#]+)') == hit


def test_what_counts_as_right():
    word = evaluate.as_question({'prompt': 'x', 'response': ' yes\n'})
    assert evaluate.right('yes ', word) and not evaluate.right('yes!', word)
    two = evaluate.as_question({'prompt': 'x', 'response': 'a and b', 'accept': r'(a|b) and (?!\1$)(a|b)'})
    assert evaluate.right('b and a', two) and not evaluate.right('a and a', two)
    with pytest.raises(UserError, match='finds nothing'):
        evaluate.right('72', word, '#### (.+)')
    for row in ({'prompt': 'x'}, {'question': 'x', 'answer': 3}, {'response': 'x'}, {'text': 'x'}):
        with pytest.raises((ValueError, KeyError)):
            evaluate.as_question(row)


def test_a_share_and_its_standard_error():
    error = 100 * torch.tensor([1., 0, 1, 1]).std().item() / 2
    assert evaluate.percent([True, False, True, True]) == ['75.0', f'{error:.1f}']
    assert evaluate.shares('m', 'abab', [1, 0, 1, 0]) == [
        ['m', 'a', 2, '100.0', '0.0'], ['m', 'b', 2, '0.0', '0.0'], ['m', 'all', 4, '50.0', '28.9']]


def test_a_model_that_knows_the_answers(at_desk, capsys, monkeypatch):
    """From the held-out questions to the table nothing is lost: right always, or only in task b."""
    def texts(run, prompts, cfg):
        asked = [re.search(r'(\d+)\?', run.tok.decode(ids))[1] for ids in prompts]
        return [f'{n}!' if cfg.seed == 1 or int(n) % 2 else 'no' for n in asked]

    monkeypatch.setattr(evaluate, 'answers', texts)
    for seed, right in ((1, ['100.0'] * 3), (2, ['0.0', '100.0'])):
        evaluate.exact(settings(checkpoints=['examples'], seed=seed))
        rows = sorted(line.split()[1:4] for line in capsys.readouterr().out.splitlines()[1:])
        shares = {row[0]: row[2] for row in rows}
        assert [shares['a'], shares['b']] == right[:2] and set(shares) == {'a', 'b', 'all'}


def test_answers_are_what_the_sampler_writes():
    run = run_of()
    prompts = [run.tok.encode('ab'), run.tok.encode('c')]
    rows, _ = sample.generate_text(
        run.model, prompts, 8, run.tok, diffusion.SamplingParams(), seeds=[(1, 0), (1, 1)])
    expected = [sample.answer_text(row[len(ids):], run.tok) for row, ids in zip(rows, prompts)]
    assert evaluate.answers(run, prompts, settings(gen_length=8)) == expected


# ------------------------------------------------------------------------------------------------------ every task


@pytest.mark.parametrize('argv, word', [
    ('exact examples --steps=2 --gen_length=8 --show=2', 'expected'),
    ('exact diffusion causal --input=sums.jsonl --extract=#_(.+) --gen_length=4', 'questions'),
    ('exact diffusion --input=sums.jsonl --gen_length=4 --instruct --block_length=2 --variable_length', 'right'),
    ('choice diffusion causal --input=choices.jsonl --mc_num=2', 'acc_norm'),
    ('choice diffusion --input=choices.jsonl --method=confidence --cfg_scale=0.5 --add_bos', 'acc_norm')])
def test_every_task_runs(at_desk, capsys, argv, word):
    script('evaluate', *(text.replace('_(', ' (') for text in argv.split()))
    assert word in capsys.readouterr().out


@pytest.mark.parametrize('argv, message', [
    ('nonsense diffusion', 'task must be one of bound, exact, choice, lm_eval'), ('bound', 'at least one checkpoint'),
    ('choice diffusion', 'no questions; give --input'), ('choice diffusion --input=no.jsonl', 'no.jsonl'),
    ('choice diffusion --input=choices.jsonl --method=guess', 'method must be one of likelihood, confidence'),
    ('bound diffusion --split=test', 'split must be one of'), ('exact diffusion', 'no questions'),
    ('bound none', 'none: no checkpoint here'), ('bound released', 'give --dataset'),
    ('exact examples --temperature=-1.5', 'temperature must be'), ('exact examples --remasking=none', 'remasking must'),
    ('exact examples --variable_length', 'needs a block_length'),
    ('choice diffusion --input=sums.jsonl', 'sums.jsonl:1'),
    ('exact examples --block_length=3 --gen_length=8', 'block_length must divide the 8')])
def test_mistakes_get_one_line(at_desk, capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        script('evaluate', *argv.split())
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and message in err and 'Traceback' not in err


def test_tokenizers_must_agree(at_desk, capsys):
    small_corpus(Path('other'), 60, 'bpe-300')
    with pytest.raises(UserError, match='its tokenizer is not the one of'):
        evaluate.bound(settings(checkpoints=['diffusion'], dataset='./other'))


def test_the_configs_of_benchmarks_are_what_the_papers_say():
    def changes(name):
        cfg = configure(dict(vars(evaluate)), [str(ROOT / 'config' / 'eval' / f'{name}.py')])
        return {key: value for key, value in cfg.items() if value != getattr(evaluate, key)}

    assert changes('llada_base') == {'task': 'lm_eval', 'gen_length': 1024, 'tasks': [
        'bbh:3', 'gsm8k:4', 'minerva_math:4', 'humaneval:0', 'mbpp:4']}
    assert changes('llada_base_truthfulqa') == {'task': 'lm_eval', 'cfg_scale': 2.0, 'tasks': ['truthfulqa_mc2:0']}
    assert changes('llada_instruct_math') == {
        'task': 'lm_eval', 'gen_length': 512, 'confidence_eos_eot_inf': True, 'instruct': True,
        'tasks': ['gsm8k', 'minerva_math', 'ifeval']}
    assert changes('illada_base_choice') == {
        'task': 'lm_eval', 'method': 'confidence', 'pad_eos': True, 'add_bos': True,
        'tasks': ['arc_challenge:0', 'hellaswag:0']}


# -------------------------------------------------------------- lm-evaluation-harness, if installed; without network


def request(*args, number=0):
    return SimpleNamespace(args=args, task_name='t', doc_id=number)


def test_generation_arguments_of_a_task():
    lm = evaluate.Harness(run_of(seq_len=64), settings(stop=['!']))
    cfg = lm.sampler(until=['\n'], max_gen_toks=8, do_sample=False, temperature=0.7)
    assert (cfg.stop, cfg.gen_length, cfg.temperature) == (['!', '\n'], 8, 0.0)
    cfg = lm.sampler(until='B', do_sample=True, temperature=0.7)
    assert (cfg.stop, cfg.gen_length, cfg.temperature) == (['!', 'B'], 32, 0.7)         # half of the context
    lm = evaluate.Harness(run_of(seq_len=64), settings(gen_length=16))
    assert lm.sampler(max_gen_toks=8).gen_length == 16 and lm.cfg.stop == []
    with pytest.raises(UserError, match="num_beams"):
        lm.sampler(num_beams=4)


def test_requests_are_answered_in_order(monkeypatch):
    run = run_of(seq_len=24)
    seen = []

    def texts(run, prompts, cfg):
        seen.append((len(prompts), cfg.gen_length))
        return [run.tok.decode(ids) for ids in prompts]

    monkeypatch.setattr(evaluate, 'answers', texts)
    lm = evaluate.Harness(run, settings())
    short, long = {'max_gen_toks': 4}, {'max_gen_toks': 8}
    requests = [request('a', short), request('b' * 99 + 'c', short), request('d', long)]
    assert lm.generate_until(requests) == ['a', 'b' * 19 + 'c', 'd'] and seen == [(2, 4), (1, 8)]

    lm = evaluate.Harness(run_of(seq_len=200), settings(instruct=True))
    messages = [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'well'}]
    text, = lm.generate_until([request(lm.apply_chat_template(messages), short)])
    assert text == run.tok.decode(run.tok.encode_chat(messages)) and text.endswith('well')


@pytest.mark.parametrize('causal', [False, True])
def test_is_greedy_asks_the_model(causal):
    """What it writes itself is greedy, something else is not. If a document has several choices, nobody asks."""
    run = run_of(causal=causal)
    (row,), _ = sample.generate_text(
        run.model, [[65, 66]], 2, run.tok, diffusion.SamplingParams(), seeds=[(0,)])
    lm = evaluate.Harness(run, settings(mc_num=2))
    texts = [bytes(row[2:]).decode('latin1'), 'zz']
    monkey = SimpleNamespace(encode=lambda text: list(text.encode('latin1')), **{
        key: getattr(run.tok, key) for key in ('mask_id', 'eos_id', 'eot_id', 'unused')})
    lm.run = run._replace(tok=monkey)                           # bytes that are no UTF-8 are possible, too
    results = lm.loglikelihood([request('AB', text, number=k) for k, text in enumerate(texts)])
    assert [greedy for _, greedy in results] == [True, False]
    assert [greedy for _, greedy in lm.loglikelihood([request('AB', text) for text in texts])] == [False, False]
    assert results[1][0] == evaluate.score(lm.run, [65, 66], list(b'zz'), lm.cfg)


@pytest.fixture
def local_tasks(desk, at_desk, monkeypatch):
    pytest.importorskip('lm_eval')
    for key in ('HF_DATASETS_OFFLINE', 'HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE'):
        monkeypatch.setenv(key, '1')
    monkeypatch.setenv('HF_HOME', str(desk / 'hf'))
    folder = desk / 'tasks'
    folder.mkdir(exist_ok=True)
    sums = [{'question': f'{n} + 1?', 'answer': f'#### {n + 1}'} for n in range(10)]
    choices = [{'q': f'Is it {n}?', 'options': ['yes', 'no', 'never'], 'gold': n % 3} for n in range(6)]
    for name, rows in (('sums', sums), ('choices', choices)):
        (folder / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, rows)))

    def write(name, rows, text):
        (folder / f'{name}.yaml').write_text(
            f'task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / rows}.jsonl\n'
            f'test_split: test\n{text}')

    write('local_sums', 'sums', (
        'output_type: generate_until\ndoc_to_text: "Q: {{question}}\\nA:"\n'
        'doc_to_target: "{{answer.split(\'#### \')[1]}}"\ngeneration_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 8\n'
        'filter_list:\n- name: number\n  filter:\n  - function: regex\n    regex_pattern: "#### (\\\\d+)"\n'
        '  - function: take_first\nmetric_list:\n- metric: exact_match\n'))
    write('local_choices', 'choices', (
        'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{options}}"\ndoc_to_target: "{{gold}}"\n'
        'metric_list:\n- metric: acc\n- metric: acc_norm\n'))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('wrong, value', [(0, '1.0'), (1, '0.5')])
def test_an_oracle_scores_one_and_half_an_oracle_one_half(local_tasks, monkeypatch, capsys, wrong, value):
    """Right always, or every second time: from the requests of lm_eval to its table nothing is lost or added."""
    def number(ids):
        return int(re.search(r'\d+', bytes(ids).decode())[0])

    def texts(run, prompts, cfg):
        assert cfg.stop == ['\n']
        return [f' #### {n + 1 + wrong * (n % 2)}' for n in map(number, prompts)]

    def score(run, before, after, cfg):
        n = number(before)
        best = (n + wrong * (n % 2)) % 3
        return float(bytes(after).decode() == ' ' + ['yes', 'no', 'never'][best]) - 1

    monkeypatch.setattr(evaluate, 'answers', texts)
    monkeypatch.setattr(evaluate, 'score', score)
    tasks = [str(local_tasks / f'{name}.yaml') for name in ('local_sums', 'local_choices')]
    evaluate.lm_eval(settings(checkpoints=['diffusion'], tasks=tasks))
    out = capsys.readouterr().out
    found = re.findall(r'\|(exact_match|acc|acc_norm) *\|[^|]*\|([^|]*)\|', out)
    assert len(found) == 3 and {float(number) for _, number in found} == {float(value)}


@pytest.mark.slow
def test_a_model_runs_tasks_end_to_end(local_tasks, capsys):
    for name, metric in (('local_sums.yaml', 'exact_match'), ('local_choices.yaml:0', 'acc_norm')):
        task = local_tasks / name
        for flags in ([], ['--instruct']):
            script('evaluate', 'lm_eval', 'diffusion', f'--tasks={task}', '--mc_num=2', '--limit=2', *flags)
            assert metric in capsys.readouterr().out


def test_without_lm_eval_one_line_says_what_to_install(at_desk, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    with pytest.raises(UserError, match='pip install lm_eval'):
        evaluate.lm_eval(settings(checkpoints=['diffusion'], tasks=['x']))
