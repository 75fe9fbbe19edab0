"""Text to records to files to windows: nothing is lost or removed, and batches are functions."""

import errno
import gzip
import json
import os
import shutil

import numpy as np
import pytest
import torch
from helpers import refused, script, small_corpus

import data
from configurator import UserError

TOK = data.get_tokenizer('bytes')


def write_files(folder):
    """Write six files of three kinds, some 12 kB each -> their paths."""
    rng, paths = np.random.default_rng(1), []
    for i, suffix in enumerate(('.txt', '.jsonl', '.jsonl.gz', '.txt', '.jsonl', '.txt')):
        texts = [' '.join(rng.choice(['mask', 'token', 'noise', 'naïve'], 300)) + '\n' for _ in range(7)]
        body = ''.join(texts if suffix == '.txt' else [json.dumps({'text': text}) + '\n' for text in texts])
        paths.append(folder / f'in{i}{suffix}')
        paths[-1].write_bytes(gzip.compress(body.encode()) if suffix.endswith('.gz') else body.encode())
    return paths


def stream(folder, split):
    """Return all tokens of a split."""
    return np.array(data.Corpus(folder).tokens[split])


def texts(folder):
    """Return the text of each split."""
    return [TOK.decode(stream(folder, split)) for split in data.SPLITS]


def windows(name, T, split='train', **options):
    dataset = data.open_dataset(str(name))
    return data.open_source(dataset, split, 'unified', dataset.parts[0].tokenizer(), T, **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# -------------------------------------------------------------------------------------------------- records


def test_docs_are_docstrings_without_repeats(tmp_path, monkeypatch):
    for name in ('a.py', 'b.py', '_private.py', 'test/c.py', 'email/d.py'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'"""Of {name}.\n\nThe same everywhere."""\ndef f():\n    """Of f in {name}."""\n')
    monkeypatch.setattr(data.ast, '__file__', str(tmp_path / 'ast.py'))
    _, *texts = [record['text'] for _, record in data.docs_text()]      # the first one is what help() says
    assert texts == [
        'Of a.py.\n\nThe same everywhere.\n\nOf f in a.py.\n', 'Of b.py.\n\nOf f in b.py.\n',
        'Of email/d.py.\n\nOf f in email/d.py.\n']


@pytest.mark.slow
def test_docs_are_real_text_without_repeats():
    texts = [record['text'] for _, record in data.docs_text()]
    paragraphs = [p.strip() for text in texts for p in text.split('\n\n')]
    assert 700_000 < len(''.join(texts)) < 3_000_000 and len(texts) > 100
    assert len(paragraphs) == len(set(paragraphs))


@pytest.mark.parametrize('name, content, says', [
    ('a.txt', b'ok\nok\n\xff bad', 'a.txt:3: .*utf-8'),
    ('a.txt', b' ', 'a.txt:1: expected a text'),
    ('a.csv', b'x', 'unknown format; expected .txt, .jsonl'),
    ('a.jsonl.gz', b'hello', 'a.jsonl.gz:1: Not a gzipped file'),
    ('a.jsonl.gz', gzip.compress(b'{"text": "x"}')[:15], 'a.jsonl.gz:1: Compressed file ended'),
    ('a.jsonl', b'{"text": "x"}\n\n{"text": 3}', 'a.jsonl:3: .*got 3'),
    ('a.jsonl', b'{"text": "x"}\n{"text"', 'a.jsonl:2: this is not JSON'),
    ('a.jsonl', b'{"text": "\\ud800"}', 'a.jsonl:1: .*surrogates'),
    ('a.jsonl', b'5', 'a.jsonl:1: expected an object {...}, got 5'),
    ('a.jsonl', b'["x"]', r"a.jsonl:1: expected an object {...}, got \['x'\]"),
    ('a.jsonl', b'{"words": "x"}', r"a.jsonl:1: expected text, .*keys \['words'\]"),
    ('a.jsonl', b'{"text": "x"}\n{"text": "\xfe"}', 'a.jsonl:2: .*utf-8'),
    ('a.json', b'[{"text": "x"}, {"text": ""}]', 'a.json:2: expected a text'),
    ('a.json', b'[{', 'a.json:1: this is not JSON'),
    ('a.txt', b'short', 'not enough text to hold out')])
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        data.prepare([tmp_path / name], tmp_path / 'out', 'bytes')
    assert '\n' not in str(error.value) and names(tmp_path) == [name]


def test_empty_lines_and_byte_order_marks(tmp_path):
    (tmp_path / 'a.jsonl').write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}\n')
    (tmp_path / 'a.txt').write_bytes(b'\xef\xbb\xbfa\r\nb')
    found = list(data.read_records(tmp_path / 'a.jsonl'))
    assert [(where[-2:], record['text']) for where, record in found] == [(':1', 'a'), (':4', 'b')]
    assert [record['text'] for _, record in data.read_records(tmp_path / 'a.txt')] == ['a\r\nb']


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    parquet = pytest.importorskip('pyarrow.parquet')
    columns = {'text': pyarrow.array([b'one caf\xc3\xa9', b'two'], pyarrow.binary()), 'raw': [b'\xff', None]}
    parquet.write_table(pyarrow.table(columns), tmp_path / 'a.parquet')
    assert [record['text'] for _, record in data.read_records(tmp_path / 'a.parquet')] == ['one café', 'two']


def test_pieces_end_at_lines_then_spaces_then_anywhere():
    for unit, end in (('word word\n', '\n'), ('word ', 'd'), ('x', 'x')):
        text = unit * 5000
        pieces = data.PIECE.findall(text)
        assert ''.join(pieces) == text and max(map(len, pieces)) <= 8192
        assert all(len(piece) >= 4096 and piece.endswith(end) for piece in pieces[:-1])


# ----------------------------------------------------------------------------------------- prepared folders


def test_every_document_lands_once_and_ends_with_eos(corpus):
    for split, n in (('train', 36), ('val', 4)):            # 40 documents, one in ten held out
        tokens = stream(corpus, split)
        assert (tokens == TOK.eos_id).sum() == n and tokens[-1] == TOK.eos_id
        facts = data.Corpus(corpus).facts[split]
        assert facts == {'tokens': len(tokens), 'bytes': len(tokens) - n, 'examples': 0}


def test_held_out_pieces_are_spread_and_eos_is_in_their_place(tmp_path):
    lines = [f'line {i} of a long document\n' for i in range(4000)]
    data.prepare([[('a', {'text': ''.join(lines)})]], tmp_path / 'd', 'bytes')
    train, val = (text.split('<|endoftext|>')[:-1] for text in texts(tmp_path / 'd'))
    assert sorted(''.join(train + val).splitlines(True)) == sorted(lines)
    first, *_, last = [int(part.split()[1]) for part in val]
    assert first < 1700 and last > 2600 and len(train) == len(val) + 1


def test_files_to_hold_out(tmp_path):
    (tmp_path / 'a.txt').write_text('to train on\n' * 2000)
    (tmp_path / 'b.txt').write_text('to be held out\n' * 100)
    data.prepare([tmp_path / 'a.txt'], tmp_path / 'd', 'bytes', val=[tmp_path / 'b.txt'])
    train, val = texts(tmp_path / 'd')
    assert train.count('train on') == 2000 and val.count('held out') == 100


def test_uint16_is_used_as_long_as_it_can_hold_the_ids(corpus, tmp_path):
    assert data.Corpus(corpus).tokens['train'].dtype == np.uint16
    wide = json.loads((corpus / 'tokenizer.json').read_text())
    wide['model']['vocab']['qqq'] = 126336
    (tmp_path / 'tokenizer.json').write_text(json.dumps(wide))
    small_corpus(tmp_path / 'd', tokenizer=str(tmp_path))
    assert data.Corpus(tmp_path / 'd').tokens['train'].dtype == np.uint32
    assert len(stream(tmp_path / 'd', 'train')) == len(stream(corpus, 'train'))


def test_the_batch_of_all_processors_equals_one_text_after_the_other():
    tok = data.learn_tokenizer(['some words and their vowels'] * 9, 300)
    texts = [f'words <|endoftext|> {i}\n' for i in range(999)]
    assert tok.encode_batch(texts) == [tok.encode(text) for text in texts]


def test_a_vocabulary_is_learned_from_what_is_trained_on(tmp_path, monkeypatch):
    seen, real = [], data.learn_tokenizer
    monkeypatch.setattr(data, 'learn_tokenizer', lambda texts, n: seen.extend(texts) or real(seen, n))
    small_corpus(tmp_path / 'd', tokenizer='bpe-300')
    tok = data.get_tokenizer(tmp_path / 'd')
    trained = tok.decode(stream(tmp_path / 'd', 'train'), skip_special_tokens=True)
    assert ''.join(seen) == trained and tok.vocab_size <= 300


def test_nothing_of_the_user_is_removed(tmp_path):
    for name, content in (('thesis.tex', 'years of work'), ('manifest.json', '{"name": "an extension"}')):
        (tmp_path / 'mine').mkdir(exist_ok=True)
        (tmp_path / 'mine' / name).write_text(content)
        with pytest.raises(UserError, match='holds files that are no data set'):
            small_corpus(tmp_path / 'mine')
    assert names(tmp_path / 'mine') == ['manifest.json', 'thesis.tex']

    # a data set may be made anew, but not if there is something else beside it, such as its own input
    small_corpus(tmp_path / 'ours')
    small_corpus(tmp_path / 'ours')
    (tmp_path / 'ours' / 'notes.txt').write_text('mine\n' * 9000)
    with pytest.raises(UserError, match='such as notes.txt'):
        small_corpus(tmp_path / 'ours')
    with pytest.raises(UserError, match='such as notes.txt'):
        data.prepare([tmp_path / 'ours' / 'notes.txt'], tmp_path / 'ours', 'bytes')
    assert (tmp_path / 'ours' / 'notes.txt').exists()


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    small_corpus(tmp_path / 'd')
    before = stream(tmp_path / 'd', 'train')

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, 'write_split', stop)
    with pytest.raises(KeyboardInterrupt):
        small_corpus(tmp_path / 'd', 12)
    assert names(tmp_path) == ['d'] and (stream(tmp_path / 'd', 'train') == before).all()


def test_data_sets_that_are_not_there_or_old(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='python data.py --input=FILE --out=data/shakespeare'):
        data.open_dataset('shakespeare')
    with pytest.raises(UserError, match='too few for seq_len'):
        windows(corpus, 10 ** 6)

    shutil.copytree(corpus, 'd')
    manifest = json.loads((tmp_path / 'd' / 'manifest.json').read_text())
    (tmp_path / 'd' / 'manifest.json').write_text(json.dumps({**manifest, 'format': 'nanollada data 2'}))
    with pytest.raises(UserError, match='another version'):
        data.Corpus('d')
    small_corpus(tmp_path / 'd')                            # an old one may be replaced


def test_names_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('b.txt', 'a.txt', 'part1.txt', 'part[1].txt'):
        (tmp_path / name).write_text('x')
    assert data.files_of('*.txt,./a.txt,a.txt') == ['a.txt', 'b.txt', 'part1.txt', 'part[1].txt']
    assert data.files_of('part[1].txt') == ['part[1].txt'] and data.files_of('none.txt,') == ['none.txt']


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.txt').write_text('some words to learn\n' * 4000)
    (tmp_path / 'b.jsonl').write_text('\n'.join(json.dumps({'text': f'line {i}'}) for i in range(30)))
    script('data', '--input=a.txt,b.jsonl', '--out=data/my', '--tokenizer=bpe-300')
    said = capsys.readouterr().out
    assert 'bytes per token' in said and 'train.py config/docs.py --dataset=data/my --out_dir=out/my' in said
    assert data.Corpus('my').tokenizer().vocab_size <= 300
    for flags in ([], ['--input=a.txt']):
        assert '--input=FILE --out=data/my' in refused(capsys, 'data', *flags)
    assert 'none.txt: No such file' in refused(capsys, 'data', '--input=none.txt', '--out=x')


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EFBIG])
def test_a_full_disk_is_one_line_and_keeps_the_old_data_set(tmp_path, capsys, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.txt').write_text('some words to learn\n' * 4000)
    flags = '--input=a.txt', '--out=my', '--tokenizer=bytes'
    script('data', *flags)

    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(data.Path, 'write_bytes', full)
    with pytest.raises(SystemExit) as stopped:
        script('data', *flags)
    assert stopped.value.code == 2 and f'the disk: {os.strerror(number)}\n' in capsys.readouterr().err
    assert sorted(names(tmp_path)) == ['a.txt', 'my'] and data.Corpus('my').facts


# -------------------------------------------------------------------------------------------------- windows


def starts_of(folder, x0):
    """Return where windows begin in the training split."""
    tokens, T = stream(folder, 'train'), x0.shape[1]
    place = {tokens[i:i + T].tobytes(): i for i in range(len(tokens) - T + 1)}
    return [place[x.numpy().astype(tokens.dtype).tobytes()] for x in x0]


def test_every_window_once_an_epoch_and_another_order_in_the_next(corpus):
    T = 64
    n = (len(stream(corpus, 'train')) - T + 1) // T
    epochs = [starts_of(corpus, windows(corpus, T, seed=3).batch(it, range(n), n)[0]) for it in range(2)]
    for starts in epochs:
        assert len(starts) == n and (np.diff(sorted(starts)) == T).all()        # side by side
        assert abs(np.corrcoef(starts, range(n))[0, 1]) < 0.3
    assert epochs[0] != epochs[1] and min(epochs[0]) != min(epochs[1])


def test_batches_do_not_depend_on_how_they_are_split_and_copies_are_neighbours(corpus):
    source = windows(corpus, 32, seed=1, random_length=0.3, random_split=0.3)
    x0, maskable, _ = source.batch(5, range(8), 8)
    parts = [source.batch(5, range(i, i + 2), 8) for i in range(0, 8, 2)]
    assert torch.equal(x0, torch.cat([part[0] for part in parts]))
    assert torch.equal(maskable, torch.cat([part[1] for part in parts]))
    assert x0.dtype == torch.int64 and maskable.dtype == torch.bool

    single, _, cu_seqlens = windows(corpus, 32).batch(3, range(4), 4)
    double, _, _ = windows(corpus, 32, copies=2).batch(3, range(8), 8)
    _, maskable, _ = windows(corpus, 32, copies=2, random_length=0.5).batch(3, range(8), 8)
    assert torch.equal(maskable[0::2], maskable[1::2]) and not maskable.all()
    assert torch.equal(double, single.repeat_interleave(2, 0)) and cu_seqlens is None


def test_random_lengths_and_borders_have_the_rates_of_the_papers(corpus):
    source = windows(corpus, 64, seed=1, random_length=0.05, random_split=0.30)
    _, maskable, cu_seqlens = source.batch(0, range(20_000), 20_000)
    keep = maskable.sum(1)
    borders = [int(i) % 64 for i in cu_seqlens if i % 64]
    assert abs((keep < 64).float().mean() - 0.05 * 63 / 64) < 0.006
    assert abs(len(borders) / 20_000 - 0.35) < 0.015 and set(borders) == set(range(1, 64))
    assert abs(keep[keep < 64].float().mean() - 32) < 3


def test_cu_seqlens_are_the_borders_padded_to_few_shapes(corpus):
    source = windows(corpus, 16, random_length=0.2, random_split=0.5)
    for it in range(20):
        _, maskable, cu_seqlens = source.batch(it, range(4), 4)
        if cu_seqlens is not None:
            limits = cu_seqlens.tolist()
            assert cu_seqlens.dtype == torch.int32 and len(limits) == 32 and limits == sorted(limits)
            assert {0, 16, 32, 48, 64} <= set(limits) and limits[-1] == 64
            assert all(16 * i + int(n) in limits for i, n in enumerate(maskable.sum(1)))


def test_isolated_documents_end_behind_their_eos(corpus):
    x0, maskable, cu_seqlens = windows(corpus, 100, isolate=True).batch(0, range(20), 20)
    ends = np.flatnonzero(x0 == TOK.eos_id) + 1
    assert set(cu_seqlens.tolist()) == {0, *ends.tolist(), *range(0, 2001, 100)}
    assert maskable.all() and len(ends) and len(cu_seqlens) % 32 == 0


def test_held_out_windows_are_in_order_and_evenly_chosen(corpus):
    val = stream(corpus, 'val')
    rows, n_bytes = windows(corpus, 32, 'val').held_out()
    x0, maskable = map(torch.stack, zip(*rows))
    assert x0.flatten().tolist() == val[:len(val) // 32 * 32].tolist() and maskable.all()
    assert n_bytes == pytest.approx(32 * (len(val) - 4) / len(val))
    few, _ = windows(corpus, 32, 'val').held_out(5)
    assert torch.equal(torch.stack([x for x, _ in few]), x0[[i * len(x0) // 5 for i in range(5)]])


# ------------------------------------------------------------------------------------------------- mixtures


def test_a_mixture_has_its_shares_and_one_tokenizer(tmp_path):
    files = write_files(tmp_path)
    for name, part in (('a', files[:4]), ('b', files[4:])):
        data.prepare(part, tmp_path / name, 'bytes', val_every=3)
    mixture = f'{tmp_path}/a:3,{tmp_path}/b:1'
    source = windows(mixture, 150, seed=5)
    larger = stream(tmp_path / 'a', 'train').tobytes()
    from_a = [source.window(sample).numpy().astype(np.uint16).tobytes() in larger for sample in range(1000)]
    assert abs(np.mean(from_a) - 0.75) < 0.05
    rows, n_bytes = windows(mixture, 32, 'val').held_out(40)
    each = [windows(tmp_path / name, 32, 'val').held_out()[1] for name in 'ab']
    assert len(rows) == 40 and n_bytes == pytest.approx(np.dot([0.75, 0.25], each))

    data.prepare(files[:2], tmp_path / 'c', 'bpe-300', val_every=3)
    with pytest.raises(UserError, match='its tokenizer is not the one of'):
        data.open_dataset(f'{tmp_path}/a:1,{tmp_path}/c:1')
    # a folder may have a colon in its name
    shutil.copytree(tmp_path / 'a', tmp_path / 'a:1')
    assert len(data.open_dataset(f'{tmp_path}/a:1').parts) == 1


def test_docs_are_made_on_first_use(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, 'docs_text', lambda: [('d', {'text': 'words of a document\n' * 9000})])
    dataset = data.open_dataset('docs')
    assert dataset.weights == [1.] and dataset.parts[0].folder == data.Path('data/docs')
    assert 'preparing data/docs' in capsys.readouterr().err
    assert data.open_dataset('docs') and 'preparing' not in capsys.readouterr().err
