"""evaluate.py: questions in files, scores that can be worked out by hand, every task end to end."""

import json
import math
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, script, small_corpus, tiny_model, write_worlds

import data
import evaluate
from configurator import Refused, configure, settings_of

TINY = ('--n_layer=1 --n_head=2 --n_kv_head=2 --d_model=32 --d_ff=48 --batch_size=2 --max_iters=2 --eval_windows=2 '
        '--eval_draws=1 --sample_tokens=0 --warmup_iters=1 --device=cpu').split()
WHICH = {'question': 'Which?', 'choices': ['this', 'that', 'other'], 'answer': 2}


def settings(**changes):
    return SimpleNamespace(**{**settings_of(vars(evaluate)), 'batch_size': 8, **changes})


def run_of(model):
    """A model in the form that evaluate.load gives."""
    return evaluate.Run('tiny', model, {'config': None}, data.get_tokenizer('bytes'), 'cpu', nullcontext(),
                        model.config.causal)


@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    """Runs to be measured: text, its baseline, the world, instructions."""
    folder = tmp_path_factory.mktemp('evaluate')
    small_corpus(folder / 'text', 60)
    write_worlds(folder / 'data')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, flags in (('text', ['--dataset=./text', '--seq_len=96']),
                            ('text_ar', ['--dataset=./text', '--seq_len=96', '--causal=true']),
                            ('world', ['--dataset=world', '--seq_len=40', '--masking=response']),
                            ('sft', ['--dataset=instruct', '--seq_len=96', '--masking=response',
                                     '--init_from=out/world'])):
            script('train', *TINY, *flags, f'--out_dir=out/{name}')
    return folder


def test_shapes_of_multiple_choice():
    item = evaluate.as_choice(WHICH)
    assert item == {'context': 'Question: Which?\nAnswer:', 'choices': ['this', 'that', 'other'], 'answer': 2}
    assert evaluate.as_choice({**WHICH, 'answer': 'other'})['answer'] == 2
    plain = {'context': '', 'choices': ['They go.', 'They goes.'], 'answer': 0}
    assert evaluate.as_choice(plain) == plain
    letters = {'question': 'First letter?', 'choices': ['B', 'A'], 'answer': 'A'}       # the choice itself, no label
    assert evaluate.as_choice(letters)['answer'] == 1


@pytest.mark.parametrize('item', [
    {}, {'question': 'Which?'}, {'question': 'Which?', 'choices': ['a'], 'answer': 0},
    {'choices': ['a', 'b'], 'answer': 0},
    {'question': 'Q', 'choices': ['a', ''], 'answer': 0}, {'question': 'Q', 'choices': ['a', 'b'], 'answer': 2},
    {'question': 'Q', 'choices': ['a', 'b'], 'answer': 'c'}, {'question': 'Q', 'choices': ['a', 'b'], 'answer': True},
    {'question': 'Q', 'choices': 'ab', 'answer': 0}, {'context': 5, 'choices': ['a', 'b'], 'answer': 0},
    {'question': None, 'choices': ['a', 'b'], 'answer': 0}])
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
    logits = model(torch.tensor([[*tok.encode('x:'), tok.mask_id, tok.eos_id]]))[0, -2].log_softmax(-1)
    with_eos = [float(logits[tok.encode(c)[0]].detach()) for c in 'abcd']       # in sight of it, which is not scored
    assert with_eos != pytest.approx(want, abs=1e-3)
    for changes in (dict(mc_num=1), dict(method='confidence')):
        assert evaluate.score_pairs(run, pairs, settings(pad_eos=True, **changes)) == pytest.approx(with_eos, abs=1e-5)
    causal = run_of(tiny_model(vocab_size=262, seq_len=32, causal=True).eval())
    assert (evaluate.score_pairs(causal, pairs, settings(pad_eos=True))
            == pytest.approx(evaluate.score_pairs(causal, pairs, settings())))
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
                 {'messages': [{'role': 'user', 'content': 'x'}]}, {'response': 'x'}):
        with pytest.raises(ValueError):
            evaluate.as_question(item)
    error = 100 * torch.tensor([1., 0, 1, 1]).std().item() / 2
    assert evaluate.percent([True, False, True, True]) == ['75.0', f'{error:.1f}']


@pytest.mark.parametrize('said, want, hit', [
    ('#### 72.', '72', True), ('#### 1080', '1,080', True), ('#### 18.00', '18', True), ('#### $18', '18', True),
    ('#### 18 dollars', '18', True), ('#### -5', '5', False), ('#### .', '72', False), ('#### 3/4', '3', False),
    ('#### 70 #### 72', '72', True),
    ('#### 72\nQuestion: 1 + 1?\n#### 2', '72', True), ('#### A1', 'B1', False),
    ('#### yes', 'yes', True), ('#### .5', '0.50', True)])
def test_numbers_are_compared_as_numbers(said, want, hit):
    item = evaluate.as_question({'question': 'How many?', 'answer': f'#### {want}'})
    assert evaluate.right(said, item, r'#### ([^#]+)') == hit


def test_choices_of_a_question_share_their_masks(monkeypatch):
    """What differs between them is then the choice, not the luck of the draw; an empty continuation costs nothing."""
    run, drawn = run_of(tiny_model(vocab_size=262, seq_len=64).eval()), []
    real = evaluate.diffusion.log_likelihood
    monkeypatch.setattr(evaluate.diffusion, 'log_likelihood', lambda *args, generator, **options: drawn.append(
        generator.initial_seed()) or real(*args, generator=generator, **options))
    pairs = [evaluate.encode_pair('which?', text, run.tok) for text in (' this', ' that', '')]
    scores = evaluate.score_pairs(run, pairs, settings(mc_num=2))
    assert scores[2] == 0.0 and len(drawn) == 2 and drawn[0] == drawn[1]
    evaluate.score_pairs(run, pairs, settings(mc_num=2, same_masks=False))
    assert drawn[2] != drawn[3]


def request(context, wish, number=0):
    return SimpleNamespace(args=(context, wish), task_name='t', doc_id=number)


def test_what_a_task_asks_of_generation(monkeypatch):
    """Lengths by all their names, a temperature only with do_sample, no empty stop string; the rest is refused."""
    run, seen = run_of(tiny_model(vocab_size=262, seq_len=64).eval()), []

    def noted(run, prompts, new, cfg):
        seen.append((new, cfg.stop, cfg.temperature))
        return [[*p, 65, 66] for p in prompts], 0

    monkeypatch.setattr(evaluate, 'answers', noted)
    lm = evaluate.Harness(run, settings())
    for wish in ({'until': ['']}, {'until': 'B', 'max_new_tokens': 8}, {'max_tokens': 4, 'temperature': 0.8},
                 {'max_gen_toks': 4, 'temperature': 0.8, 'do_sample': True}):
        lm.generate_until([request('a', wish)])
    assert seen == [(32, [], 0.0), (8, ['B'], 0.0), (4, [], 0.0), (4, [], 0.8)]
    for wish in ({'num_beams': 4}, {'do_sample': True, 'top_p': 0.9}):
        with pytest.raises(Refused, match='no sampler here has'):
            lm.generate_until([request('a', wish)])


def test_what_is_cut_keeps_its_beginning(monkeypatch):
    """BOS, and in a conversation the first header, stay when a prompt is too long for the context."""
    run, seen = run_of(tiny_model(vocab_size=266, seq_len=48).eval()), []
    tok = run.tok
    monkeypatch.setattr(evaluate, 'answers', lambda run, prompts, new, cfg: (seen.extend(prompts), ([[]], 0))[1])
    tok.start = [tok.bos_id]
    evaluate.Harness(run, settings(gen_length=8)).generate_until([request('x' * 99, {})])
    assert len(seen[-1]) == 40 and seen[-1][0] == tok.bos_id
    lm = evaluate.Harness(run, settings(gen_length=8, instruct=True))
    lm.generate_until([request(json.dumps([{'role': 'user', 'content': 'x' * 99}]), {})])
    whole = tok.encode_chat([{'role': 'user', 'content': 'x' * 99}])
    header = whole.index(tok.specials['end_header']) + 1
    assert len(seen[-1]) == 40 and seen[-1][:header] == whole[:header] and seen[-1][-9:] == whole[-9:]
    for block in (48, 60):
        with pytest.raises(Refused, match='leaves no room'):
            evaluate.Harness(run, settings(block_length=block)).generate_until([request('x' * 99, {})])
    ids, n = evaluate.encode_pair('x' * 99, 'yes', tok)
    assert tok.cut(ids[:n], 10)[0] == tok.bos_id and len(tok.cut(ids[:n], 10)) == 10


@pytest.mark.parametrize('causal', [False, True])
def test_is_greedy_is_asked_of_the_model(causal):
    """Its own continuation is, another is not; of several continuations of a document nobody asks."""
    run = run_of(tiny_model(vocab_size=262, seq_len=64, causal=causal).eval())
    prompt = run.tok.encode('some text')
    (row,), _ = evaluate.diffusion.complete(run.model, [prompt], 3, run.tok)
    lm = evaluate.Harness(run, settings(mc_num=2))
    other = [(i + 1) % 256 for i in row[-3:]]
    assert lm.greedy(row, len(prompt)) and not lm.greedy([*prompt, *other], len(prompt))
    one, = lm.loglikelihood([request('some text', 'abc')])
    two = lm.loglikelihood([request('some text', 'abc'), request('some text', 'abd')])
    assert one[1] in (True, False) and [greedy for _, greedy in two] == [False, False]


def test_contexts_that_are_no_conversation(desk):
    lm = evaluate.Harness(run_of(tiny_model(vocab_size=266, seq_len=64).eval()), settings(instruct=True))
    tok = lm.run.tok
    assert lm.conversation('') == tok.encode_chat([])
    assert lm.conversation('plain') == tok.encode_chat([{'role': 'user', 'content': 'plain'}])
    begun = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'well'}]
    assert lm.conversation(json.dumps(begun)) == [*tok.encode_chat(begun[:1]), *tok.encode('well')]


def test_the_difference_of_two_runs_on_the_same_windows(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    script('evaluate', 'bound', 'out/text', 'out/text_ar', '--draws=1', '--out=t/two.csv')
    head, first, second = ((desk / 't' / 'two.csv').read_text().splitlines())
    rows = [dict(zip(['name', 'it', 'sign', 'nats', 'e1', 'bits', 'e2', 'above', 'e3'], line.split(',')))
            for line in (first, second)]
    assert 'above the first' in head and rows[0]['above'] in ('0.0000', '-0.0000')
    assert float(rows[1]['above']) == pytest.approx(float(rows[1]['bits']) - float(rows[0]['bits']), abs=2e-4)


def test_the_configs_of_benchmarks_are_what_the_papers_say():
    def told(name):
        settings = configure(settings_of(vars(evaluate)), [str(ROOT / 'config' / f'eval_{name}.py')])
        defaults = settings_of(vars(evaluate))
        return {key: value for key, value in settings.items() if value != defaults[key]}

    assert told('llada_base') == {'task': 'lm_eval', 'gen_length': 1024, 'tasks': [
        'bbh:3', 'gsm8k:4', 'minerva_math:4', 'humaneval:0', 'mbpp:4']}
    assert told('llada_base_truthfulqa') == {'task': 'lm_eval', 'cfg_scale': 2.0, 'tasks': ['truthfulqa_mc2:0']}
    assert told('llada_instruct_math') == {'task': 'lm_eval', 'gen_length': 512, 'confidence_eos_eot_inf': True,
                                           'instruct': True, 'tasks': ['gsm8k', 'minerva_math', 'ifeval']}
    assert told('illada_base_choice') == {'task': 'lm_eval', 'method': 'confidence', 'pad_eos': True, 'add_bos': True,
                                          'tasks': ['arc_challenge:0', 'hellaswag:0']}
    assert told('illada_instruct_mbpp') == {
        'task': 'lm_eval', 'tasks': ['mbpp_reasoning:0'], 'gen_length': 2048, 'variable_length': True,
        'block_length': 16, 'steps': 16, 'think_boost': 100.0, 'instruct': True}


def test_every_task_runs(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    (desk / 'choice.jsonl').write_text(json.dumps(WHICH) + '\n' + json.dumps({**WHICH, 'answer': 'this'}))
    (desk / 'math.jsonl').write_text(json.dumps({'question': '1 + 1?', 'answer': 'two\n#### 2'}) + '\n')
    few = ['--mc_num=2', '--draws=1', '--limit=6']
    for argv, columns in (
            (['bound', 'out/text', 'out/text_ar'], 'nats/token'), (['bound', 'out/world'], 'bits/byte'),
            (['exact', 'out/sft', '--steps=2', '--show=2'], 'want'),
            (['exact', 'out/text', 'out/text_ar', '--input=math.jsonl', '--extract=# (.+)', '--gen_length=4'], 'all'),
            (['choice', 'out/text', 'out/text_ar', '--input=choice.jsonl'], 'random guess'),
            (['choice', 'out/text', '--input=choice.jsonl', '--method=confidence', '--cfg_scale=0.5'], 'confidence')):
        script('evaluate', *argv, *few)
        assert columns in capsys.readouterr().out, argv


def test_tables_are_written_as_csv(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    script('evaluate', 'bound', 'out/text', '--draws=1', '--out=t/bound.csv')
    lines = (desk / 't' / 'bound.csv').read_text().splitlines()
    assert len(lines) == 2 and lines[0] == 'checkpoint,iteration,,nats/token,+-,bits/byte,+-,seconds'
    assert lines[1].split(',')[3] in capsys.readouterr().out


@pytest.mark.parametrize('argv, says', [
    (['nonsense', 'out/text'], 'task must be one of'), (['bound'], 'at least one checkpoint'),
    (['choice', 'out/text'], 'needs --input'), (['choice', 'out/text', '--input=no.jsonl'], 'no such file'),
    (['exact', 'out/text'], 'no held-out examples'), (['bound', 'out/none'], 'out/none: no checkpoint here'),
    (['bound', 'out/text', '--dataset=instruct'], 'not the one of'),
    (['exact', 'out/sft', '--temperature=-1'], 'temperature must be'),
    (['exact', 'out/sft', '--extract=('], 'regular expression'), (['lm_eval', 'out/text'], '--tasks'),
    (['exact', 'out/sft', '--variable_length'], 'needs a block_length'),
    (['exact', 'out/sft', '--remasking=none'], 'remasking must be'),
    (['exact', 'out/sft', '--block_length=3', '--gen_length=8'], 'block_length must divide the 8')])
def test_bad_requests_get_one_line(desk, monkeypatch, capsys, argv, says):
    monkeypatch.chdir(desk)
    with pytest.raises(SystemExit) as stopped:
        script('evaluate', *argv)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and says in err and 'Traceback' not in err


def test_a_bad_line_of_questions_is_named(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    (desk / 'some.jsonl').write_text(json.dumps(WHICH) + '\n' + json.dumps({'question': 'x'}) + '\n')
    with pytest.raises(SystemExit):
        script('evaluate', 'choice', 'out/text', '--input=some.jsonl')
    assert 'some.jsonl:2: ' in capsys.readouterr().err


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
        'metric_list:\n- metric: acc\n- metric: acc_norm\n')
    (folder / 'local_cloze.yaml').write_text(
        'task: local_cloze\n' + head.format(folder / 'choice.jsonl') + 'output_type: loglikelihood\n'
        'doc_to_text: "{{q}}"\ndoc_to_target: " {{options[gold]}}"\n'
        'metric_list:\n- metric: acc\n- metric: perplexity\n')
    (folder / 'local_text.yaml').write_text(
        'task: local_text\n' + head.format(folder / 'math.jsonl') + 'output_type: loglikelihood_rolling\n'
        'doc_to_text: ""\ndoc_to_target: "{{answer}}"\nmetric_list:\n- metric: bits_per_byte\n')
    return folder


@pytest.mark.parametrize('wrong, says', [(0, '1.0000'), (1, '0.5000')])
def test_an_oracle_scores_one_and_half_an_oracle_one_half(local_tasks, monkeypatch, capsys, wrong, says):
    """Right always, or every second time: from the requests to the table nothing is lost or added."""
    def number(text):
        return int(re.search(r'\d+', text)[0])

    def answers(run, prompts, new, cfg):
        n = [number(run.tok.decode(p)) for p in prompts]
        return [[*run.tok.encode(f' #### {k + 1 + wrong * (k % 2)}\nQ: on and on'), run.tok.eos_id] for k in n], 0

    def knows(run, ids, n):
        k = number(run.tok.decode(ids[:n]))
        return run.tok.decode(ids[n:]) == ' ' + ['yes', 'no', 'never'][(k + wrong * (k % 2)) % 3]

    def score(run, ids, n):
        if n > len(run.tok.start):
            return float(knows(run, ids, n)) - 1
        return -float(says) * math.log(2) * len(run.tok.decode_bytes(ids[n:]))      # a text without a context: rolling

    monkeypatch.setattr(evaluate, 'answers', answers)
    monkeypatch.setattr(evaluate.Harness, 'greedy', lambda self, ids, n: knows(self.run, ids, n))
    monkeypatch.setattr(evaluate, 'score_pairs', lambda run, pairs, cfg: [score(run, *pair) for pair in pairs])
    tasks = [str(local_tasks / f'local_{kind}.yaml') for kind in ('math', 'choice', 'cloze', 'text')]
    evaluate.lm_eval(settings(checkpoints=['out/text'], tasks=tasks, mc_num=2))
    rows = [row.split() for row in capsys.readouterr().out.splitlines() if row.startswith('out/text')]
    assert {(row[1], row[2]): row[3] for row in rows} == {
        ('local_math', 'exact_match,number'): says, ('local_choice', 'acc'): says, ('local_choice', 'acc_norm'): says,
        ('local_cloze', 'acc'): says, ('local_cloze', 'perplexity'): f'{math.exp(wrong / 2):.4f}',
        ('local_text', 'bits_per_byte'): says}


def test_a_model_runs_local_tasks_end_to_end(local_tasks, capsys):
    for task, metric in (('local_choice', 'acc'), ('local_math', 'exact_match')):
        script('evaluate', 'lm_eval', 'out/text', f'--tasks={local_tasks / task}.yaml', '--mc_num=2', '--device=cpu')
        row = next(r for r in capsys.readouterr().out.splitlines() if metric in r)
        assert 0 <= float(row.split()[3]) <= 1


def test_unknown_tasks_are_named_before_anything_is_loaded(local_tasks, capsys):
    for tasks in (['no_such_task'], [f'{local_tasks}/local_math.yaml,other']):
        with pytest.raises(SystemExit) as stop:
            script('evaluate', 'lm_eval', 'out/text', *(f'--tasks={task}' for task in tasks))
        assert stop.value.code == 2 and 'lm_eval knows no' in capsys.readouterr().err


def test_rolling_leaves_room_for_the_eos_in_sight(desk):
    pytest.importorskip('lm_eval')
    run = run_of(tiny_model(vocab_size=262, seq_len=16).eval())
    lm = evaluate.harness(run, settings(pad_eos=True, mc_num=2))
    got, = lm.loglikelihood_rolling([SimpleNamespace(args=('a text of more than two windows of it',))])
    assert math.isfinite(got) and got < 0


def test_rolling_likelihood_is_the_sum_over_windows(desk):
    pytest.importorskip('lm_eval')
    run = run_of(tiny_model(vocab_size=262, seq_len=16, causal=True).eval())
    lm, text = evaluate.harness(run, settings()), 'a text of more than two windows of it'
    got, = lm.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    parts = [text[i:i + 16] for i in range(0, len(text), 16)]
    want = sum(evaluate.score_pairs(run, [(run.tok.encode(p), 0)], settings())[0] for p in parts)
    assert got == pytest.approx(want) and math.isfinite(got) and got < 0
