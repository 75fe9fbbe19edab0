"""Fine-tuning data: by whatever name an example comes, a row is template, answer, EOS and counted padding."""

import json
import zlib

import numpy as np
import pytest
import torch

import data
from configurator import UserError

PAIRS = [{'prompt': f'question {i}' + '?' * (i % 5), 'response': 'yes ' * (i % 4 + 1)} for i in range(60)]
ROLES = ('user', 'assistant')
TALKS = [{'messages': [{'role': role, 'content': f'{role} {i} {k}'} for k in range(3) for role in ROLES]}
         for i in range(40)]
SAID = [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}]


def prepared(records, folder, **options):
    """Prepare records with bytes as tokens -> Corpus."""
    (folder.parent / 'rows.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    data.prepare([folder.parent / 'rows.jsonl'], folder, 'bytes', **options)
    return data.Corpus(folder)


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    return prepared(PAIRS, tmp_path_factory.mktemp('examples') / 'pairs', val_every=5)


@pytest.fixture(scope='module')
def talks(tmp_path_factory):
    return prepared(TALKS, tmp_path_factory.mktemp('examples') / 'talks', val_every=5)


def examples(corpus, seq_len=200, split='train', masking='response', **options):
    dataset = data.Dataset([corpus], [1.])
    return data.open_source(dataset, split, masking, corpus.tokenizer(), seq_len, **options)


def rows_of(corpus, split='train'):
    """Return (prompt, rest) of each example, as text."""
    tok, tokens = corpus.tokenizer(), corpus.tokens[split]
    rows = np.load(corpus.folder / f'{split}_00000.rows.npy')
    return [(tok.decode(tokens[start:middle]), tok.decode(tokens[middle:end])) for start, middle, end, _ in rows]


def chat(*contents):
    """Return LLaDA's template of these contents, and the assistant's header."""
    header = '<|start_header_id|>{}<|end_header_id|>\n\n'.format
    turns = [header(role) + text + '<|eot_id|>' for role, text in zip(ROLES * len(contents), contents)]
    return '<|startoftext|>' + ''.join(turns) + header('assistant')


# ------------------------------------------------------------------------------------------------- records


def test_documents_among_examples_are_said(tmp_path, capsys):
    examples(prepared([*PAIRS, {'text': 'a document\n' * 9}], tmp_path / 'mixed', val_every=5))
    assert 'documents are left out' in capsys.readouterr().err
    examples(prepared(PAIRS, tmp_path / 'pairs', val_every=5))
    assert 'documents' not in capsys.readouterr().err


def test_two_answers_in_a_row_are_two_turns(tmp_path):
    talk = {'messages': [*SAID, {'role': 'assistant', 'content': 'b'}]}
    rows = rows_of(prepared([talk] * 2, tmp_path / 'talks', val=[[('', talk)]]))
    assert rows[:2] == [(chat('q'), 'a<|endoftext|>'), (chat('q', 'a'), 'b<|endoftext|>')]


@pytest.mark.parametrize('row', [
    {'prompt': 'q', 'response': 'a'}, {'question': 'q', 'answer': 'a'}, {'prompt': 'q', 'completion': 'a'},
    {'instruction': 'q', 'output': 'a'}, {'instruction': 'q', 'input': '', 'output': 'a'},
    {'messages': SAID}, {'conversation': SAID}, {'messages': SAID, 'text': 'q a'},
    {'conversations': [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}]},
    {'messages': [{**said, 'name': 'x'} for said in SAID]},
    {'messages': [{**said, 'content': [{'type': 'text', 'text': said['content']}]} for said in SAID]}], ids=str)
def test_examples_by_other_names(row):
    record = data.as_record({**row, 'id': 7})
    assert record['messages'] == SAID and record['id'] == 7 and 'text' not in record


def test_the_first_of_several():
    assert data.as_record({'text': 't', 'conversation': 17, 'messages': None})['text'] == 't'
    assert data.as_record({'text': 't', 'response': 'a'})['text'] == 't'
    record = data.as_record({'instruction': 'Add.', 'input': '1 and 2', 'output': '3'})
    assert record['messages'][0]['content'] == 'Add.\n\n1 and 2'


@pytest.mark.parametrize('row', [
    {}, [], 5, {'text': ' '}, {'response': ''}, {'prompt': 'a'}, {'answer': 'x'}, {'conversations': 'q'},
    {'prompt': 3, 'response': 'x'}, {'prompt': None, 'response': 'x'}, {'prompt': '', 'response': 'x'},
    {'instruction': None, 'input': 'q', 'output': 'a'}, {'messages': []}, {'messages': 'x'},
    {'messages': [None]}, {'messages': SAID[:1]}, {'messages': SAID[::-1]}, {'messages': [{'role': 'user'}, SAID[1]]},
    {'messages': [SAID[0], {'role': 'assistant', 'content': None, 'tool_calls': [1]}]},
    {'messages': [{'role': 'user', 'content': [{'type': 'image'}]}, SAID[1]]}], ids=str)
def test_rows_that_are_no_examples(row, tmp_path):
    (tmp_path / 'a.jsonl').write_text(json.dumps(PAIRS[0]) + '\n' + json.dumps(row))
    with pytest.raises(UserError, match='a.jsonl:2: ') as error:
        list(data.read_records(tmp_path / 'a.jsonl'))
    assert '\n' not in str(error.value) and len(str(error.value)) < 400


# ------------------------------------------------------------------------------------------------ prepared


def test_an_example_is_template_answer_and_one_eos(pairs):
    expected = {chat(pair['prompt']): pair['response'].strip() + '<|endoftext|>' for pair in PAIRS}
    found = rows_of(pairs) + rows_of(pairs, 'val')
    assert len(found) == len(PAIRS) and dict(found) == expected


def test_each_answer_of_a_dialogue_is_an_example_with_its_history(talks):
    rows = rows_of(talks)
    assert len(rows) % 3 == 0
    for i in range(0, len(rows), 3):
        number = rows[i][0].split('user ')[1].split()[0]
        said = [f'{role} {number} {k}' for k in range(3) for role in ROLES]
        assert rows[i:i + 3] == [(chat(*said[:n]), said[n] + '<|endoftext|>') for n in (1, 3, 5)]


def test_answers_without_a_question_begin_with_bos(tmp_path):
    corpus = prepared([{'response': f'story {i}'} for i in range(60)], tmp_path / 'd', val_every=3)
    assert {row[0] for row in rows_of(corpus)} == {'<|startoftext|>'}


def test_a_question_is_never_in_both_splits(tmp_path):
    corpus = prepared([{'prompt': f'q{i % 30}', 'response': f'a{i}'} for i in range(300)], tmp_path / 'many')
    train, val = ({prompt for prompt, _ in rows_of(corpus, split)} for split in data.SPLITS)
    assert train and val and not train & val
    held_out = [record for _, record in data.read_records(tmp_path / 'many' / 'val_00000.jsonl')]
    assert {record['messages'][0]['content'] for record in held_out} == {
        f'q{i}' for i in range(30) if zlib.crc32(f'q{i}'.encode()) % 10 == 0}


def test_held_out_records_keep_what_they_are_graded_by(tmp_path):
    rows = [{'task': 'two', 'accept': 'a|b', 'prompt': 'Name one.', 'response': f'a{i}'} for i in range(100)]
    prepared(rows, tmp_path / 'd', val_every=3)
    held_out = [record for _, record in data.read_records(tmp_path / 'd' / 'val_00000.jsonl')]
    # by the whole record, because one question would be in one split
    assert 10 < len(held_out) < 60
    assert all(record['task'] == 'two' and record['accept'] == 'a|b' for record in held_out)


# ------------------------------------------------------------------------------------------------- batches


def test_padding_is_maskable_and_the_prompt_never(pairs):
    """Eq. 5 with L' = response, EOS and padding (LLaDA, App. B.1)."""
    source = examples(pairs)
    tok = source.tok
    x0, maskable, cu_seqlens = source.batch(0, range(6), 6)
    for x, m in zip(x0, maskable):
        prompt, rest = tok.decode(x[~m]), tok.decode(x[m])
        assert prompt.endswith('assistant<|end_header_id|>\n\n') and rest.startswith('yes')
        assert set(rest.split('yes')[-1].replace('<|endoftext|>', '')) <= {' '} and m.int().diff().min() >= 0
    assert cu_seqlens is None and (x0[:, -1] == tok.eos_id).all()
    assert (x0[:, -2] != tok.eos_id).any()                  # as long as the longest
    double = examples(pairs, copies=2).batch(0, range(12), 12)[0]
    assert torch.equal(double, x0.repeat_interleave(2, 0))


def test_rows_are_padded_to_their_group_however_the_batch_is_split(pairs):
    source = examples(pairs, pad_group=4)
    for start in (0, 4):
        whole = source.batch(1, range(start, start + 4), 8)
        halves = [source.batch(1, range(start + k, start + k + 2), 8) for k in (0, 2)]
        for i in (0, 1):
            assert torch.equal(whole[i], torch.cat([half[i] for half in halves]))

    # without a group all rows of an update are padded alike
    alone, together = (examples(pairs, pad_group=n) for n in (1, 0))
    lengths = [alone.batch(0, range(i, i + 1), 40)[0].shape[1] for i in range(40)]
    assert {together.batch(0, range(i, i + 1), 40)[0].shape[1] for i in range(40)} == {max(lengths)}
    assert len(set(lengths)) > 3


def test_a_dialogue_gives_one_random_turn_an_epoch(talks):
    source = examples(talks, 500, seed=5)
    n = len(source.dialogues) - 1
    turns = []
    for epoch in range(30):
        texts = list(map(source.tok.decode, source.batch(epoch, range(n), n)[0]))
        assert len({text.split('user ')[1].split()[0] for text in texts}) == n      # each dialogue once
        turns += [text.count('<|start_header_id|>assistant') - 1 for text in texts]
    assert np.bincount(turns).min() > 0.8 * 10 * n                                  # each turn equally often


def test_the_canvas_of_a_held_out_example_does_not_depend_on_the_others(tmp_path):
    short = [{'prompt': f'question {i}', 'response': 'yes ' * (i % 3 + 1)} for i in range(40)]
    found = []
    for more in ([], [{'prompt': 'a long one', 'response': 'word ' * 50}]):
        records = [list(enumerate(map(data.as_record, rows))) for rows in (short, [*short, *more])]
        data.prepare(records[:1], tmp_path / 'd', 'bytes', val=records[1:])
        rows, _ = examples(data.Corpus(tmp_path / 'd'), 400, 'val').held_out()
        assert all(len(x0) % 32 == 0 for x0, _ in rows)
        found.append({tuple(x0.tolist()) for x0, _ in rows})
    assert found[0] < found[1] and len(found[1]) == 41


def test_bytes_of_held_out_answers(pairs):
    source = examples(pairs, split='val')
    answers = [rest.replace('<|endoftext|>', '') for _, rest in rows_of(pairs, 'val')]
    rows, n_bytes = source.held_out()
    assert n_bytes == np.mean(list(map(len, answers)))
    assert len(source.held_out(5)[0]) == 5 and len(rows) == len(answers)


def test_what_is_too_long_is_left_out(tmp_path, capsys):
    records = [{'prompt': 'q' * (200 if i % 3 == 0 else 5) + str(i), 'response': 'a'} for i in range(60)]
    corpus = prepared(records, tmp_path / 'd', val_every=3)
    source = examples(corpus, 64)
    said = f"{len(source.rows)} of {corpus.facts['train']['examples']} examples fit into seq_len=64"
    assert said in capsys.readouterr().err
    assert source.batch(0, range(8), 8)[0].shape[1] <= 64
    with pytest.raises(UserError, match='no example fits'):
        examples(corpus, 8)


def test_examples_as_windows_and_documents_as_examples(pairs, corpus):
    """iLLaDA's unified masking: everything may be hidden, and examples do not attend to each other."""
    source = examples(pairs, 128, masking='unified', isolate=True)
    x0, maskable, cu_seqlens = source.batch(0, range(2), 2)
    assert maskable.all() and len(set(cu_seqlens.tolist())) > 6
    with pytest.raises(UserError, match="masking='response' needs examples"):
        examples(data.Corpus(corpus))
