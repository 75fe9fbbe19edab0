"""evaluate.py: scores that can be worked out by hand, every task end to end, and mistakes in one line."""

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import checkpoint, refused, script, settings_of, small_corpus, tiny_model

import data
import diffusion
import evaluate
import sample
from configurator import UserError

WHICH = {'question': 'Which?', 'choices': ['this', 'that', 'other'], 'answer': 2}
TOK = data.get_tokenizer('bytes')


def settings(**changes):
    return settings_of(evaluate, **{'batch_size': 8, 'dtype': 'float32', **changes})


def run_of(**changes):
    """Return a small random model of bytes, as evaluate.load gives it."""
    model = tiny_model(**{'vocab_size': TOK.vocab_size, 'seq_len': 32, **changes})
    return sample.Run('tiny', model, {'settings': None}, TOK, [], None)


def write_lines(path, rows):
    path.write_text('\n'.join(map(json.dumps, rows)))


@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    """A folder with models of text (diffusion and causal) and of questions, and their data."""
    folder = tmp_path_factory.mktemp('evaluate')
    small_corpus(folder / 'text', 60)
    questions = [{'task': 'ab'[i % 2], 'prompt': f'{i}?', 'response': f'{i}!'} for i in range(60)]
    data.prepare([list(enumerate(map(data.as_record, questions)))], folder / 'qa', 'bytes')
    checkpoint(folder / 'diffusion', 'unified', folder / 'text')
    checkpoint(folder / 'causal', 'unified', folder / 'text', causal=True)
    checkpoint(folder / 'examples', 'response', folder / 'qa')
    checkpoint(folder / 'released')
    write_lines(folder / 'choices.jsonl', [WHICH, {**WHICH, 'answer': 'this'}])
    write_lines(folder / 'sums.jsonl', [{'question': '1 + 1?', 'answer': 'two\n#### 2'}])
    return folder


@pytest.fixture
def at_desk(desk, monkeypatch):
    monkeypatch.chdir(desk)


def table_of(capsys):
    """Return the lines that were printed, as lists of words."""
    return [line.split() for line in capsys.readouterr().out.splitlines()]


# ---------------------------------------------------------------------------------------------------- bound


def test_bound_is_the_mean_over_rows(at_desk, capsys):
    """Each by the formula of the paper, with the standard error, and the difference of the same rows."""
    script('evaluate', *'bound diffusion causal --draws=4 --windows=5 --out=t.csv --dtype=float32'.split())
    head, *rows = table_of(capsys)
    assert head[2:] == ['nats/token', '+-', 'bits/byte', '+-', 'above', 'the', 'first', '+-']
    assert [row[2] for row in rows] == ['<=', '=']

    source = data.open_source(data.open_dataset('text'), 'val', 'unified', TOK, 96)
    pairs, n_bytes = source.held_out(5)
    models = [evaluate.load(name, settings()).model for name in ('diffusion', 'causal')]
    bounds = [diffusion.log_likelihood(models[0], *row, TOK.mask_id, mc_num=4, batch_size=64,
                                       generator=diffusion.keyed_generator(1, i))
              for i, row in enumerate(pairs)]
    exact = [diffusion.ar_log_likelihood(models[1], *row, bos_id=TOK.eos_id) for row in pairs]
    nats = -torch.tensor([bounds, exact], dtype=torch.float64) / 96
    bits = nats * 96 / n_bytes / math.log(2)
    values = torch.stack((nats, bits, bits - bits[0]), 1)                           # (models, columns, rows)
    numbers = torch.stack((values.mean(-1), values.std(-1) / 5 ** 0.5), -1).flatten(1)
    for row, expected in zip(rows, numbers.tolist()):
        assert list(map(float, row[3:])) == pytest.approx(expected, abs=1e-4)
    assert Path('t.csv').read_text().splitlines()[1].split(',')[3:5] == rows[0][3:5]


def test_bound_of_examples(at_desk, capsys):
    script('evaluate', 'bound', 'examples', '--draws=2')
    head, row = table_of(capsys)
    assert head[-2:] == ['bits/byte', '+-'] and row[:3] == ['examples', '2', '<='] and len(row) == 7


# --------------------------------------------------------------------------------------------------- choice


def test_shapes_of_multiple_choice():
    expected = {'context': 'Question: Which?\nAnswer:', 'choices': ['this', 'that', 'other'], 'answer': 2}
    assert evaluate.as_choice(WHICH) == evaluate.as_choice({**WHICH, 'answer': 'other'}) == expected
    plain = {'context': '', 'choices': ['They go.', 'They goes.'], 'answer': 0}
    assert evaluate.as_choice(plain) == plain
    for answer in (3, 'c', None):
        with pytest.raises(ValueError, match='none of the 3 choices'):
            evaluate.as_choice({**WHICH, 'answer': answer})


def test_pairs_are_encoded_as_one_text():
    run = run_of()
    for context, continuation in (('Question: x\nAnswer:', ' yes'), ('Go ', 'home'), ('', 'all'), ('a', 'b')):
        before, after = evaluate.encode_pair(context, continuation, run)
        assert TOK.decode(before) == context.rstrip() and TOK.decode(before + after) == context + continuation


def test_one_token_is_scored_by_its_log_probability():
    """Whatever the method, and however many masks, because there is only one mask."""
    run, causal = run_of(), run_of(causal=True)
    pairs = [evaluate.encode_pair('x:', text, run) for text in 'abcd']

    def expected(model, ids, position):
        logp = model(torch.tensor([ids]))[0, position].log_softmax(-1)
        return pytest.approx([logp[ord(text)].item() for text in 'abcd'], abs=1e-5)

    def scores(run, **changes):
        return [evaluate.score(run, *pair, settings(**changes)) for pair in pairs]

    alone = expected(run.model, [*b'x:', TOK.mask_id], 2)
    with_eos = expected(run.model, [*b'x:', TOK.mask_id, TOK.eos_id], 2)
    for changes in (dict(mc_num=1), dict(mc_num=16), dict(method='confidence')):
        assert scores(run, **changes) == alone and scores(run, **changes) != with_eos
        assert scores(run, pad_eos=True, **changes) == with_eos
        # guided away from what the model says without the prompt
        assert scores(run, cfg_scale=0.5, **changes) == scores(run, cfg_scale=0.5) != alone
    assert scores(causal) == expected(causal.model, [TOK.eos_id, *b'x:'], -1)
    assert scores(causal, method='confidence', pad_eos=True) == scores(causal)


def test_choices_of_a_question_share_their_masks(monkeypatch):
    run = run_of(seq_len=64)
    seeds = []
    monkeypatch.setattr(diffusion, 'log_likelihood', lambda *_, generator, **options: seeds.append(
        generator.initial_seed()))
    for question in ('which?', 'who?'):
        for text in (' this', ' that'):
            evaluate.score(run, *evaluate.encode_pair(question, text, run), settings())
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]


def test_a_context_that_is_too_long_loses_its_beginning_but_not_bos(monkeypatch):
    run = run_of(seq_len=16)._replace(start=[TOK.bos_id])
    rows = []
    monkeypatch.setattr(evaluate, 'score_row', lambda run, *row: rows.append(row[:2]))
    evaluate.score(run, list(range(100)), [7, 8, 9], settings(pad_eos=True))
    (x0, maskable), = rows
    assert x0.tolist() == [TOK.bos_id, *range(89, 100), 7, 8, 9, TOK.eos_id]
    assert maskable.nonzero()[:, 0].tolist() == [12, 13, 14]
    with pytest.raises(UserError, match='16 tokens to score'):
        evaluate.score(run, [], list(range(16)), settings())


def test_the_likelier_choice_counts(at_desk, capsys, monkeypatch):
    """By a table of scores: "this" is the most likely, but per byte "other" is."""
    table = {' this': -3.0, ' that': -9.0, ' other': -3.5}
    monkeypatch.setattr(evaluate, 'score', lambda run, before, after, cfg: table[TOK.decode(after)])
    write_lines(Path('a.jsonl'), [{**WHICH, 'answer': 'this'}] * 3 + [WHICH])
    evaluate.choice(settings(checkpoints=['diffusion'], input=['a.jsonl', 'choices.jsonl']))
    assert [(row[1], row[2], row[4]) for row in table_of(capsys)[1:]] == [
        ('acc', 'a', '75.0'), ('acc', 'choices', '50.0'), ('acc', 'all', '66.7'),
        ('acc_norm', 'a', '25.0'), ('acc_norm', 'choices', '50.0'), ('acc_norm', 'all', '33.3')]


# ---------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize('said, wanted, hit', [
    ('#### 72.', '72', True), ('#### 1080', '1,080', True), ('#### 18.00', '18', True),
    ('#### 1,080.00', '1080', True), ('#### \u22125', '-5', True), ('#### 5 \u20ac', '5', True),
    ('#### $18', '18', True), ('#### 18 dollars', '18', True), ('#### .5', '0.50', True),
    ('#### <5', '5', False), ('#### 5\u00bd', '5', False),
    ('#### -5', '5', False), ('#### .', '72', False), ('#### 3/4', '3', False), ('#### A1', 'B1', False),
    ('#### yes', 'yes', True), ('#### 70 #### 72', '72', True), ('72', '72', False),
    ('#### 72\nQuestion: 1 + 1?\n#### 2', '72', True)])
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
    for row in ({'prompt': 'x'}, {'question': 'x', 'answer': 3}):
        with pytest.raises(ValueError):
            evaluate.as_question(row)
    assert evaluate.as_question({'response': 'x'}) == evaluate.as_question({'text': 'x'}) == {}     # no questions


def test_a_model_that_knows_the_answers(at_desk, capsys, monkeypatch):
    """From the held-out questions to the table nothing is lost: right in task b, and in task a or not."""
    def texts(run, prompts, cfg):
        asked = [re.search(r'(\d+)\?', TOK.decode(ids))[1] for ids in prompts]
        return [f'{n}!' if cfg.seed == 1 or int(n) % 2 else 'no' for n in asked]

    monkeypatch.setattr(evaluate, 'answers', texts)
    for seed, a in ((1, 100.), (2, 0.)):
        evaluate.exact(settings(checkpoints=['examples'], seed=seed))
        rows = {row[1]: [float(cell) for cell in row[2:]] for row in table_of(capsys)[1:]}
        assert rows['a'][1:] == [a, 0.] and rows['b'][1:] == [100., 0.]
        hits = torch.tensor([a] * int(rows['a'][0]) + [100.] * int(rows['b'][0]))
        expected = [len(hits), hits.mean().item(), hits.std().item() / len(hits) ** 0.5]
        assert rows['all'] == pytest.approx(expected, abs=0.051)


def test_answers_are_what_the_sampler_writes():
    run = run_of()
    prompts = [TOK.encode('ab'), TOK.encode('c')]
    rows, _ = sample.generate_text(
        run.model, prompts, 8, TOK, diffusion.SamplingParams(), seeds=[(1, 0), (1, 1)])
    expected = [sample.answer_text(row[len(ids):], TOK) for row, ids in zip(rows, prompts)]
    assert evaluate.answers(run, prompts, settings(gen_length=8)) == expected


# ----------------------------------------------------------------------------------------------- every task


@pytest.mark.parametrize('argv, word', [
    ('exact examples --steps=2 --gen_length=8 --show=2', 'expected'),
    ('exact diffusion causal --input=sums.jsonl --extract=####_(.+) --gen_length=4', 'questions'),
    ('exact diffusion --input=sums.jsonl --gen_length=4 --instruct --block_length=2 --variable_length', '%'),
    ('choice diffusion causal --input=choices.jsonl --mc_num=2', 'acc_norm'),
    ('choice diffusion --input=choices.jsonl --method=confidence --cfg_scale=0.5 --add_bos', 'acc_norm')])
def test_every_task_runs(at_desk, capsys, argv, word):
    script('evaluate', *(text.replace('_(', ' (') for text in argv.split()))
    assert word in capsys.readouterr().out


@pytest.mark.parametrize('argv, message', [
    ('nonsense diffusion', 'task must be one of bound, exact, choice, lm_eval'),
    ('bound', 'at least one checkpoint'), ('bound none', 'none: no checkpoint here'),
    ('bound released', 'give --dataset'),
    ('choice diffusion', 'no questions'), ('choice diffusion --input=no.jsonl', 'no.jsonl'),
    ('choice diffusion --input=sums.jsonl', 'sums.jsonl:1'),
    ('choice diffusion --input=choices.jsonl --method=guess', 'method must be one of likelihood, confidence'),
    ('exact diffusion', 'no questions'), ('exact examples --variable_length', 'a block_length'),
    ('exact examples --block_length=3 --gen_length=8', 'block_length must divide the 8')])
def test_mistakes_get_one_line(at_desk, capsys, argv, message):
    assert message in refused(capsys, 'evaluate', *argv.split())


def test_tokenizers_must_agree(at_desk, capsys):
    small_corpus(Path('other'), 60, 'bpe-300')
    with pytest.raises(UserError, match='its tokenizer is not the one of'):
        evaluate.bound(settings(checkpoints=['diffusion'], dataset='./other'))


# ----------------------------------------------------- lm-evaluation-harness, if installed; without network


def request(*args, number=0):
    return SimpleNamespace(args=args, task_name='t', doc_id=number)


def test_generation_arguments_of_a_task():
    lm = evaluate.Harness(run_of(seq_len=64), settings(stop=['!']))
    for asked, expected in (
            (dict(until=['\n'], max_gen_toks=8, do_sample=False, temperature=0.7), (['!', '\n'], 8, 0.0)),
            (dict(until='B', do_sample=True, temperature=0.7), (['!', 'B'], 32, 0.7))):  # half of the context
        cfg = lm.sampler(**asked)
        assert (cfg.stop, cfg.gen_length, cfg.temperature) == expected and lm.cfg.stop == ['!']
    lm.cfg.gen_length = 16
    assert lm.sampler(max_gen_toks=8).gen_length == 16
    with pytest.raises(UserError, match='num_beams'):
        lm.sampler(num_beams=4)


def test_requests_are_answered_in_order(monkeypatch):
    seen = []

    def texts(run, prompts, cfg):
        seen.append((len(prompts), cfg.gen_length))
        return list(map(TOK.decode, prompts))

    monkeypatch.setattr(evaluate, 'answers', texts)
    lm = evaluate.Harness(run_of(seq_len=24), settings())
    short, long = {'max_gen_toks': 4}, {'max_gen_toks': 8}
    requests = [request('a', short), request('b' * 99 + 'c', short), request('d', long)]
    assert lm.generate_until(requests) == ['a', 'b' * 19 + 'c', 'd'] and seen == [(2, 4), (1, 8)]

    # a prompt that loses its beginning keeps BOS
    lm = evaluate.Harness(run_of(seq_len=24)._replace(start=[TOK.bos_id]), settings())
    text, = lm.generate_until([request('b' * 99 + 'c', short)])
    assert text == TOK.decode([TOK.bos_id]) + 'b' * 18 + 'c'

    lm = evaluate.Harness(run_of(seq_len=200), settings(instruct=True))
    messages = [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'well'}]
    text, = lm.generate_until([request(lm.apply_chat_template(messages), short)])
    assert text == TOK.decode(TOK.encode_chat(messages)) and text.endswith('well')


@pytest.mark.parametrize('causal', [False, True])
def test_is_greedy_asks_the_model(causal):
    """What it writes itself is greedy, something else is not. With several choices nobody asks."""
    run = run_of(causal=causal)
    (row,), _ = sample.generate_text(run.model, [[65, 66]], 2, TOK, diffusion.SamplingParams(), seeds=[(0,)])
    # bytes that are no UTF-8 are possible, too
    ids = {key: getattr(TOK, key) for key in ('mask_id', 'eos_id', 'eot_id', 'unused')}
    run = run._replace(tok=SimpleNamespace(encode=lambda text: list(text.encode('latin1')), **ids))
    lm = evaluate.Harness(run, settings(mc_num=2))
    written = bytes(row[2:]).decode('latin1')
    texts = [written, written[0] + 'z', 'zz']
    results = lm.loglikelihood([request('AB', text, number=k) for k, text in enumerate(texts)])
    assert [greedy for _, greedy in results] == [True, False, False]
    assert results[2][0] == evaluate.score(run, [65, 66], list(b'zz'), lm.cfg)
    assert not any(greedy for _, greedy in lm.loglikelihood([request('AB', text) for text in texts]))


@pytest.fixture
def local_tasks(desk, at_desk, monkeypatch):
    """Two tasks of lm_eval that need no network. (JSON is YAML as well.)"""
    pytest.importorskip('lm_eval')
    for key in ('HF_DATASETS_OFFLINE', 'HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE'):
        monkeypatch.setenv(key, '1')
    monkeypatch.setenv('HF_HOME', str(desk / 'hf'))
    rows = {'sums': [{'q': f'{n} + 1?', 'a': f'{n + 1}'} for n in range(10)],
            'choices': [{'q': f'Is it {n}?', 'a': n % 3} for n in range(6)]}
    tasks = {
        'sums': {
            'output_type': 'generate_until', 'doc_to_text': 'Q: {{q}}\nA:', 'doc_to_target': '{{a}}',
            'generation_kwargs': {'until': ['\n'], 'max_gen_toks': 8},
            'filter_list': [{'name': 'number', 'filter': [
                {'function': 'regex', 'regex_pattern': r'#### (\d+)'}, {'function': 'take_first'}]}],
            'metric_list': [{'metric': 'exact_match'}]},
        'choices': {
            'output_type': 'multiple_choice', 'doc_to_text': '{{q}}', 'doc_to_choice': ['yes', 'no', 'never'],
            'doc_to_target': '{{a}}', 'metric_list': [{'metric': 'acc'}, {'metric': 'acc_norm'}]}}
    for name, task in tasks.items():
        write_lines(desk / f'local_{name}.jsonl', rows[name])
        files = {'data_files': {'test': str(desk / f'local_{name}.jsonl')}}
        task.update(task=f'local_{name}', dataset_path='json', dataset_kwargs=files, test_split='test')
        write_lines(desk / f'local_{name}.yaml', [task])
    return [str(desk / f'local_{name}.yaml') for name in tasks]


@pytest.mark.slow
@pytest.mark.parametrize('wrong, value', [(0, 1.0), (1, 0.5)])
def test_an_oracle_scores_one_and_half_an_oracle_one_half(local_tasks, monkeypatch, capsys, wrong, value):
    """Right always, or every second time: between the requests of lm_eval and its table nothing is lost."""
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
    evaluate.lm_eval(settings(checkpoints=['diffusion'], tasks=local_tasks))
    found = re.findall(r'\|(exact_match|acc|acc_norm) *\|[^|]*\|([^|]*)\|', capsys.readouterr().out)
    assert len(found) == 3 and {float(number) for _, number in found} == {value}


@pytest.mark.slow
def test_a_model_runs_tasks_end_to_end(local_tasks, capsys):
    for flags in ([], ['--instruct']):
        tasks = [f'--tasks={local_tasks[0]}', f'--tasks={local_tasks[1]}:0']
        script('evaluate', 'lm_eval', 'diffusion', *tasks, '--mc_num=2', '--limit=2', *flags)
        out = capsys.readouterr().out
        assert 'exact_match' in out and 'acc_norm' in out


def test_a_bound_is_not_printed_as_a_perplexity():
    with pytest.raises(UserError, match='use the task `bound`'):
        evaluate.Harness(run_of(), settings()).loglikelihood_rolling([('a text',)])


def test_without_lm_eval_one_line_says_what_to_install(at_desk, monkeypatch):
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    with pytest.raises(UserError, match='pip install lm_eval'):
        evaluate.lm_eval(settings(checkpoints=['diffusion'], tasks=['x']))
