"""evaluate.py: the shapes of benchmark files, scores that can be worked out by hand, every task end to end."""

import json
import math
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, script, small_corpus, tiny_model

import data
import evaluate
from configurator import settings_of

TINY = ('--n_layer=1 --n_head=2 --n_kv_head=2 --d_model=32 --d_ff=48 --batch_size=2 --max_iters=2 --eval_windows=2 '
        '--eval_draws=1 --sample_tokens=0 --warmup_iters=1 --device=cpu').split()
SHAPES = {
    'ours': {'question': 'Which?', 'choices': ['this', 'that', 'other'], 'answer': 2},
    'letter': {'question': 'Which?', 'choices': ['this', 'that', 'other'], 'answer': 'C'},
    'text': {'question': 'Which?', 'choices': ['this', 'that', 'other'], 'answer': 'other'},
    'arc': {'question': 'Which?', 'answerKey': '3',
            'choices': {'text': ['this', 'that', 'other'], 'label': list('123')}},
    'piqa': {'goal': 'Go', 'sol1': 'this', 'sol2': 'that', 'label': 1},
    'hellaswag': {'ctx': 'Go', 'endings': ['this', 'that', 'other', 'more'], 'label': '2'},
    'blimp': {'sentence_good': 'They go.', 'sentence_bad': 'They goes.'},
}


def settings(**changes):
    return SimpleNamespace(**{**settings_of(vars(evaluate)), 'batch_size': 8, 'temperature': 0.0, **changes})


def run_of(model, **more):
    """A model in the form that evaluate.load gives."""
    from contextlib import nullcontext
    tok = data.get_tokenizer('bytes')
    return SimpleNamespace(name='tiny', model=model, meta={'config': None}, tok=tok, autocast=nullcontext(),
                           device='cpu', causal=model.config.causal, kind='', sign='', **more)


@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    """Runs to be measured: text, its baseline, the world, instructions, facts."""
    folder = tmp_path_factory.mktemp('evaluate')
    small_corpus(folder / 'text', 60)
    data.prepare(list(data.stories(300)), folder / 'data' / 'world', 'world')
    data.prepare(list(data.dialogues(150)), folder / 'data' / 'instruct', 'world')
    data.prepare(list(data.facts(8)), folder / 'data' / 'facts', 'bytes')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, flags in (('text', ['--dataset=./text', '--seq_len=96']),
                            ('text_ar', ['--dataset=./text', '--seq_len=96', '--causal=true']),
                            ('world', ['--dataset=world', '--seq_len=37', '--masking=response']),
                            ('sft', ['--dataset=instruct', '--seq_len=96', '--masking=response',
                                     '--init_from=out/world']),
                            ('uni', ['--dataset=instruct', '--seq_len=96', '--isolate=true']),
                            ('facts', ['--dataset=facts', '--seq_len=28', '--masking=response']),
                            ('facts_ar', ['--dataset=facts', '--seq_len=28', '--masking=response', '--causal=true'])):
            script('train', *TINY, *flags, f'--out_dir=out/{name}')
    return folder


@pytest.mark.parametrize('shape', SHAPES)
def test_shapes_of_multiple_choice(shape):
    item = evaluate.as_choice(SHAPES[shape])
    assert item['choices'][item['gold']] == {'piqa': 'that', 'blimp': 'They go.'}.get(shape, 'other')
    assert item['context'] == {'piqa': 'Question: Go\nAnswer:', 'hellaswag': 'Go', 'blimp': ''}.get(
        shape, 'Question: Which?\nAnswer:')


@pytest.mark.parametrize('item', [
    {}, {'question': 'Which?'}, {'question': 'Which?', 'choices': ['a'], 'answer': 0}, {'sentence_good': 'x'},
    {'question': 'Q', 'choices': ['a', ''], 'answer': 0}, {'question': 'Q', 'choices': ['a', 'b'], 'answer': 2},
    {'question': 'Q', 'choices': ['a', 'b'], 'answer': 'c'}, {'question': 'Q', 'choices': ['a', 'b'], 'answer': True},
    {'question': 'Q', 'choices': 'ab', 'answer': 0}, {'goal': 'x', 'sol1': 'a', 'sol2': 'b', 'label': '1'},
    {'ctx': 'x', 'endings': ['a', 'b'], 'label': 'first'}, {'question': None, 'choices': ['a', 'b'], 'answer': 0}])
def test_questions_without_a_known_answer_are_refused(item):
    with pytest.raises(ValueError):
        evaluate.as_choice(item)


def test_pairs_are_encoded_as_one_text():
    tok = data.get_tokenizer('bytes')
    for context, continuation in (('Question: x\nAnswer:', ' yes'), ('Go ', 'home'), ('', 'all of it'), ('a', 'b')):
        ids, n = evaluate.encode_pair(context, continuation, tok)
        assert tok.decode(ids) == context + continuation and n == len(context.rstrip()) and n < len(ids)


def test_choices_are_ranked_by_the_likelihood_of_the_table():
    """One token, four choices: the score is the log-probability that the model gives it, whatever the method."""
    model = tiny_model(vocab_size=262, seq_len=32).eval()
    run = run_of(model)
    tok, pairs = run.tok, [evaluate.encode_pair('x:', c, run.tok) for c in 'abcd']
    logits = model(torch.tensor([[*tok.encode('x:'), tok.mask_id]]))[0, -1].log_softmax(-1)
    want = [float(logits[tok.encode(c)[0]].detach()) for c in 'abcd']
    for changes in (dict(mc_num=1), dict(mc_num=16), dict(method='confidence')):
        assert evaluate.score_pairs(run, pairs, settings(**changes)) == pytest.approx(want, abs=1e-5)
    causal = run_of(tiny_model(vocab_size=262, seq_len=32, causal=True).eval())
    logits = causal.model(torch.tensor([[tok.eos_id, *tok.encode('x:')]]))[0, -1].log_softmax(-1)
    assert evaluate.score_pairs(causal, pairs, settings()) == pytest.approx(
        [float(logits[tok.encode(c)[0]].detach()) for c in 'abcd'], abs=1e-5)


def test_a_context_that_is_too_long_loses_its_beginning():
    run = run_of(tiny_model(vocab_size=262, seq_len=16).eval())
    long, short = (evaluate.encode_pair(c, 'abc', run.tok) for c in ('0123456789' * 5, '7890123456789'))
    assert len({evaluate.score_pairs(run, [pair], settings(mc_num=8))[0] for pair in (long, short)}) == 1
    with pytest.raises(ValueError, match='holds 16'):
        evaluate.score_pairs(run, [evaluate.encode_pair('x', 'y' * 17, run.tok)], settings())


def test_what_counts_as_right():
    gsm = evaluate.as_question({'question': 'How many?', 'answer': '3 * 24 = <<3*24=72>>72\n#### 72'})
    number = r'#### (-?[\d,.]+)'
    assert evaluate.right('so #### 70, no: #### 72', gsm, number) and not evaluate.right('#### 71', gsm, number)
    assert not evaluate.right('72', gsm, number)
    word = evaluate.as_question({'prompt': 'x', 'response': ' yes\n'})
    assert evaluate.right('yes ', word, '') and not evaluate.right('yes!', word, '')
    two = evaluate.as_question({'prompt': 'x', 'response': 'a and b', 'accept': r'(a|b) and (?!\1$)(a|b)'})
    assert evaluate.right('b and a', two, '') and not evaluate.right('a and a', two, '')
    with pytest.raises(ValueError, match='finds nothing'):
        evaluate.right('72', word, number)
    for item in ({'prompt': 'x'}, {'question': 'x', 'answer': 3}, {'prompt': 'x', 'response': 'y', 'accept': '('},
                 {'messages': [{'role': 'user', 'content': 'x'}]}, {'first': 'a', 'second': 'b'}, {'response': 'x'}):
        with pytest.raises(ValueError):
            evaluate.as_question(item)
    mean, stderr = evaluate.share([True, False, True, True])
    assert mean == 0.75 and stderr == pytest.approx(torch.tensor([1., 0, 1, 1]).std().item() / 2)


def test_presets_are_what_the_papers_say():
    known = evaluate.presets()
    assert known['llada-base']['gsm8k'] == {'gen_length': 1024, 'num_fewshot': 4}
    assert known['llada-base']['truthfulqa_mc2'] == {'cfg_scale': 2.0, 'num_fewshot': 0}
    assert known['llada-instruct']['gsm8k'] == {'gen_length': 512, 'confidence_eos_eot_inf': True}
    assert known['illada-base']['hellaswag'] == {'method': 'confidence', 'pad_eos': True, 'add_bos': True,
                                                 'num_fewshot': 0}
    assert known['illada-instruct']['mbpp_reasoning'] == {
        'gen_length': 2048, 'variable_length': True, 'block_length': 16, 'steps': 16, 'think_boost': 100.0,
        'think_power': 3.0, 'num_fewshot': 0}
    ours = settings_of(vars(evaluate))
    for tasks in known.values():
        for changes in tasks.values():
            assert all(type(ours[key]) is type(value) for key, value in changes.items())


def test_both_halves_are_filled_by_one_who_knows_them():
    """A model that has the couplets by heart: right in both directions; one that has not: in none."""
    tok = data.get_tokenizer('bytes')
    items = [{'first': a, 'join': ' to ', 'second': b} for a, b in (('ab', 'cd'), ('ef', 'gh'), ('xy', 'zz'))]
    rows = torch.tensor([[*tok.encode(''.join(data.couplet(i))), tok.eos_id] for i in items])

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
        run = run_of(Heart(SimpleNamespace(causal=False, vocab_size=300, seq_len=32)))
        for which in ('first', 'second'):
            assert evaluate.fill(run, items, which, settings()) == [knows] * 3


def test_every_task_runs(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    (desk / 'choice.jsonl').write_text(''.join(json.dumps(SHAPES[k]) + '\n' for k in ('ours', 'blimp', 'piqa')))
    (desk / 'math.jsonl').write_text(json.dumps({'question': '1 + 1?', 'answer': 'two\n#### 2'}) + '\n')
    few = ['--mc_num=2', '--samples=4', '--draws=1', '--limit=6']
    for argv, columns in (
            (['bound', 'out/text', 'out/text_ar'], 'nats/token'), (['bound', 'out/world'], 'the source itself'),
            (['world', 'out/world'], 'consistent %'), (['exact', 'out/sft', '--steps=2', '--show=2'], 'want'),
            (['flood', 'out/sft', 'out/uni'], '128'),
            (['exact', 'out/text', 'out/text_ar', '--input=math.jsonl', '--extract=# (.+)', '--gen_length=4'], 'all'),
            (['choice', 'out/text', 'out/text_ar', '--input=choice.jsonl'], 'random guess'),
            (['choice', 'out/text', '--input=choice.jsonl', '--method=confidence', '--cfg_scale=0.5'], 'confidence'),
            (['reversal', 'out/facts', 'out/facts_ar'], 'unstated %')):
        script('evaluate', *argv, *few)
        assert columns in capsys.readouterr().out, argv


def test_curves_and_scaling_write_tables_and_figures(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    monkeypatch.setattr(evaluate, 'likelihood_spread', lambda *_: [['x', 'Eq. 6: sd by draws', 4, 0.1, 0.01, 9]])
    evaluate.curves(settings(task='curves', checkpoints=['out/world'], samples=2, out='curves.csv', temperature=1.0))
    lines = (desk / 'curves.csv').read_text().splitlines()
    assert lines[0] == 'checkpoint,sweep,setting,%,+-,tokens/s'
    assert {line.split(',')[1].strip('"') for line in lines[1:]} >= {'steps', 'block_length', 'temperature'}
    script('evaluate', 'scaling', 'out/text*', '--out=scaling.csv')
    assert len((desk / 'scaling.csv').read_text().splitlines()) == 3
    assert all((desk / f'{name}.png').exists() == bool(find_spec('matplotlib')) for name in ('curves', 'scaling'))


def test_the_fit_of_a_power_law_is_found(desk, monkeypatch, capsys):
    """Runs whose bounds lie on 3 C^-0.1 and 6 C^-0.1: diffusion needs 2^10 times the compute."""
    monkeypatch.chdir(desk)
    for name in ('p0', 'p1', 'p2', 'q0', 'q1', 'q2'):
        (desk / 'fit' / name).mkdir(parents=True)
    model = tiny_model()
    monkeypatch.setattr(evaluate, 'find_checkpoints', lambda name: [name])

    def load(name, cfg):
        path = desk / name
        causal, n = path.name[0] == 'q', 10 ** int(path.name[1])
        flops = n * 96 * model.flops_per_token(1.0 if causal else 0.5)
        entry = dict(iter=n, val_nats=1.0, val_bits_per_byte=(3 if causal else 6) * flops ** -0.1,
                     val_bits_per_byte_stderr=0.)
        (path / 'log.jsonl').write_text(json.dumps(entry) + '\n')
        return SimpleNamespace(model=model, causal=causal, kind='autoregressive' if causal else 'diffusion', sign='',
                               meta={'config': {'global_batch': 0, 'batch_size': 1, 'seq_len': 96}})

    monkeypatch.setattr(evaluate, 'load', load)
    evaluate.scaling(settings(checkpoints=['fit/*']))
    out = capsys.readouterr().out
    assert out.count('FLOPs^-0.1000') == 2 and '1.02e+03 times' in out


@pytest.mark.parametrize('argv, says', [
    (['nonsense', 'out/text'], 'task must be one of'), (['bound'], 'at least one checkpoint'),
    (['choice', 'out/text'], 'needs --input'), (['choice', 'out/text', '--input=no.jsonl'], 'no such file'),
    (['exact', 'out/text'], 'trained on examples'), (['flood', 'out/facts_ar'], 'no canvas'),
    (['bound', 'out/text', '--dataset=instruct'], 'not the one of'),
    (['exact', 'out/sft', '--extract=('], 'regular expression'), (['lm_eval', 'out/text'], '--tasks'),
    (['lm_eval', 'out/text', '--preset=llada-base', '--tasks=x'], 'knows no settings'),
    (['lm_eval', 'out/text', '--preset=gpt'], 'preset must be one of'), (['world', 'out/none'], 'out/none'),
    (['exact', 'out/sft', '--variable_length'], 'needs a block_length'), (['scaling', 'out/no*'], 'no run'),
    (['exact', 'out/sft', '--block_length=3', '--gen_length=8'], 'must divide')])
def test_bad_requests_get_one_line(desk, monkeypatch, capsys, argv, says):
    monkeypatch.chdir(desk)
    with pytest.raises(SystemExit) as stopped:
        script('evaluate', *argv)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and says in err and 'Traceback' not in err


def test_bad_lines_of_questions_stop_or_are_counted(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    lines = SHAPES['ours'], {'question': 'x'}, SHAPES['arc']
    (desk / 'some.jsonl').write_text(''.join(json.dumps(i) + '\n' for i in lines))
    with pytest.raises(SystemExit):
        script('evaluate', 'choice', 'out/text', '--input=some.jsonl')
    assert 'some.jsonl:2: ' in capsys.readouterr().err
    script('evaluate', 'choice', 'out/text', '--input=some.jsonl', '--on_error=skip', '--mc_num=1')
    captured = capsys.readouterr()
    assert '1 bad lines were left out, 2 are used' in captured.err and '3.3' in captured.out.split('random guess')[1]


# ---------------------------------------------------------------------------------------------------------------------
# lm-evaluation-harness, where it is installed; without network


@pytest.fixture
def local_tasks(desk, monkeypatch):
    pytest.importorskip('lm_eval')
    for key in ('HF_DATASETS_OFFLINE', 'HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE'):
        monkeypatch.setenv(key, '1')
    monkeypatch.chdir(desk)
    folder = desk / 'tasks'
    folder.mkdir(exist_ok=True)
    (folder / 'math.jsonl').write_text(''.join(
        json.dumps({'question': f'{n} + 1?', 'answer': f'so it is\n#### {n + 1}'}) + '\n' for n in range(10)))
    (folder / 'choice.jsonl').write_text(''.join(
        json.dumps({'q': f'Is it {n}?', 'options': ['yes', 'no', 'never'], 'gold': n % 3}) + '\n' for n in range(6)))
    head = 'dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {}\ntest_split: test\n'
    (folder / 'local_math.yaml').write_text(
        'task: local_math\n' + head.format(folder / 'math.jsonl') + 'output_type: generate_until\n'
        'doc_to_text: "Q: {{question}}\\nA:"\ndoc_to_target: "{{answer.split(\'#### \')[1]}}"\n'
        'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 8\n'
        'filter_list:\n- name: number\n  filter:\n  - function: regex\n    regex_pattern: "#### (\\\\d+)"\n'
        '  - function: take_first\n'
        'metric_list:\n- metric: exact_match\n  aggregation: mean\n  higher_is_better: true\n')
    (folder / 'local_choice.yaml').write_text(
        'task: local_choice\n' + head.format(folder / 'choice.jsonl') + 'output_type: multiple_choice\n'
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{options}}"\ndoc_to_target: "{{gold}}"\n'
        'metric_list:\n- metric: acc\n  aggregation: mean\n  higher_is_better: true\n')
    return folder


def test_a_half_right_oracle_scores_one_half(local_tasks, monkeypatch, capsys):
    """Every second answer is right: the whole way, from the requests to the table, loses and adds nothing."""
    def oracle(run, prompts, new, cfg, **other):
        texts = [run.tok.decode(p) for p in prompts]
        n = [int(t.split('Q: ')[1].split(' ')[0]) for t in texts]
        return [[*run.tok.encode(f' #### {k + 1 + k % 2}\nQ: on and on'), run.tok.eos_id] for k in n], 0, 1.0

    monkeypatch.setattr(evaluate, 'answer', oracle)
    evaluate.lm_eval(settings(checkpoints=['out/text'], tasks=[str(local_tasks / 'local_math.yaml')]))
    assert [row for row in capsys.readouterr().out.splitlines() if 'exact_match' in row][0].split()[3] == '0.5000'


def test_a_model_runs_local_tasks_end_to_end(local_tasks, capsys):
    for task, metric in (('local_choice', 'acc'), ('local_math', 'exact_match')):
        script('evaluate', 'lm_eval', 'out/text', f'--tasks={local_tasks / task}.yaml', '--mc_num=2', '--device=cpu')
        row = next(r for r in capsys.readouterr().out.splitlines() if metric in r)
        assert 0 <= float(row.split()[3]) <= 1


def test_rolling_likelihood_is_the_sum_over_windows(desk):
    pytest.importorskip('lm_eval')
    run = run_of(tiny_model(vocab_size=262, seq_len=16, causal=True).eval())
    lm, text = evaluate.harness(run, settings()), 'a text of more than two windows of it'
    got, = lm.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    parts = [text[i:i + 16] for i in range(0, len(text), 16)]
    want = sum(evaluate.score_pairs(run, [(run.tok.encode(p), 0)], settings())[0] for p in parts)
    assert got == pytest.approx(want) and math.isfinite(got) and got < 0


def test_the_config_of_every_experiment_names_what_draws_its_result():
    for name in ('world', 'sft_toy', 'reversal_facts', 'reversal_poems', 'scaling_s'):
        assert 'python evaluate.py ' in (ROOT / 'config' / f'{name}.py').read_text()
