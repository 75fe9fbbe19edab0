"""Tokenizers without loss, data sets whole or not at all, batches that are a function of a number."""

import gzip
import hashlib
import json
import random
import shutil

import numpy as np
import pytest
import torch
from helpers import small_corpus

import data

TEXTS = ['', ' ', 'Hello, world!', "it's  two\n\n\n    def f(x):\treturn 1234567", 'naïve — 漢字 🙂 e\u0301',
         '\x00\x1b[0m\r\n', 'a' * 3000, '<|endoftext|> <|mdm_mask|> typed by a user']


@pytest.fixture(scope='module')
def bpe(tmp_path_factory):
    """A small vocabulary learnt from this very file."""
    path = tmp_path_factory.mktemp('bpe') / 'tokenizer.json'
    data.save_bpe(path, data.train_bpe(open(__file__, encoding='utf-8').read(), 200))
    return path


@pytest.fixture(scope='module')
def corpus_folder(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp('corpus') / 'small')


# ---------------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize('kind', ['bytes', 'bpe'])
def test_round_trip(kind, bpe):
    tok = data.get_tokenizer('bytes' if kind == 'bytes' else bpe)
    rng = random.Random(0)
    fuzz = [''.join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(1, 0xD800), rng.randrange(0xE000, 0x110000)]))
                    for _ in range(rng.randrange(20))) for _ in range(500)]
    for text in TEXTS + fuzz:
        ids = tok.encode(text)
        assert tok.decode_bytes(ids) == text.encode() and tok.decode(ids) == text
        assert all(0 <= i < 256 + 200 * (kind == 'bpe') for i in ids)               # no special token out of plain text
    specials = {tok.mask_id, tok.eos_id, tok.bos_id}
    assert len(specials) == 3 and max(specials) < tok.vocab_size and tok.pad_id == tok.eos_id


def test_bpe_merges_as_trained(bpe):
    merges = data.train_bpe('aaaa aaaa aaaa bab bab', 3)
    assert merges[0] == (b'a', b'a') and (b'aa', b'aa') in merges
    tok = data.get_tokenizer(bpe)
    assert len(tok.encode('import pytest')) < len('import pytest')


def test_conversion_equals_the_reference_library(bpe):
    """20,000 random strings and every code point, if the `tokenizers` package is here."""
    reference = pytest.importorskip('tokenizers').Tokenizer.from_file(str(bpe))
    ours, rng = data.get_tokenizer(bpe), random.Random(1)
    pool = open(__file__, encoding='utf-8').read().replace('<|', '< |')               # it reads those as special tokens
    for _ in range(20000):
        start = rng.randrange(len(pool))
        text = pool[start:start + rng.randrange(40)] + rng.choice(['', ' ', '\n\n', 'é', '漢', '🙂', "'s", ' 12', '\t'])
        assert ours.encode(text) == reference.encode(text).ids
    every = ''.join(f' {chr(i)}{chr(i)}a' for i in range(1, 0x110000)
                    if not 0xD800 <= i < 0xE000 and chr(i).isprintable())
    for i in range(0, len(every), 50000):
        assert ours.encode(every[i:i + 50000]) == reference.encode(every[i:i + 50000]).ids


def test_ids_need_not_follow_the_merge_order(bpe, tmp_path):
    """Rank is the position in the merge list; taking the id for it goes wrong without a word."""
    file = json.loads(bpe.read_text(encoding='utf-8'))
    n, vocab = len(file['model']['vocab']), file['model']['vocab']
    shuffle = list(range(n))
    random.Random(0).shuffle(shuffle)
    file['model']['vocab'] = {t: shuffle[i] for t, i in vocab.items()}
    (tmp_path / 'shuffled.json').write_text(json.dumps(file), encoding='utf-8')
    plain, shuffled = data.get_tokenizer(bpe), data.get_tokenizer(tmp_path / 'shuffled.json')
    for text in TEXTS[:7]:
        assert shuffled.encode(text) == [shuffle[i] for i in plain.encode(text)]
        assert shuffled.decode(shuffled.encode(text)) == text


def doctored(file):
    """(what is done to a good tokenizer.json, what the refusal must name)."""
    model = file['model']
    yield lambda: model.update(type='WordPiece'), 'WordPiece'
    yield lambda: model.update(byte_fallback=True), 'byte_fallback'
    yield lambda: model.update(dropout=0.1), 'dropout'
    yield lambda: file.update(normalizer={'type': 'NFC'}), 'NFC'
    yield lambda: file.update(pre_tokenizer={'type': 'Metaspace'}), 'Metaspace'
    yield lambda: file['pre_tokenizer']['pretokenizers'][0].update(behavior='Removed'), 'Removed'
    yield lambda: file['pre_tokenizer']['pretokenizers'][1].update(add_prefix_space=True), 'add_prefix_space'
    yield lambda: model['vocab'].pop('!'), 'single bytes'
    yield lambda: model['vocab'].update({'!': 5}), 'share an id'
    yield lambda: model['vocab'].update({'no space': 99999}), 'not spelled in bytes'
    yield lambda: model['merges'].append(['q', 'q']), 'has no token'
    yield lambda: model['merges'].append(model['merges'][0]), 'two merges'
    yield lambda: (model['vocab'].update({'zq': 99991, 'qz': 99992, 'zqz': 99993}), model['merges'].extend(
        [['q', 'z'], ['z', 'q'], ['zq', 'z']])), 'not how its token is reached'
    yield lambda: file['added_tokens'][0].update(special=False), 'plain text'
    yield lambda: (model['vocab'].update({'qqq': 99999}), model.update(ignore_merges=True)), 'ignore_merges'
    yield lambda: file.pop('model'), 'not a tokenizer.json'


@pytest.mark.parametrize('case', range(16))
def test_what_cannot_be_converted_is_refused_by_name(bpe, tmp_path, case):
    file = json.loads(bpe.read_text(encoding='utf-8'))
    change, says = list(doctored(file))[case]
    change()
    (tmp_path / 't.json').write_text(json.dumps(file), encoding='utf-8')
    with pytest.raises(ValueError, match=says):
        data.get_tokenizer(tmp_path / 't.json')


def test_tokens_that_no_merge_makes_decode_but_are_never_made(bpe, tmp_path):
    file = json.loads(bpe.read_text(encoding='utf-8'))
    file['model']['vocab']['qqq'] = 9999
    (tmp_path / 't.json').write_text(json.dumps(file), encoding='utf-8')
    tok = data.get_tokenizer(tmp_path / 't.json')
    assert 9999 not in tok.encode('qqq') and tok.decode([9999]) == 'qqq' and tok.decode([8888]) == '<|8888|>'


def test_a_million_spaces_do_not_abort():
    path_text = ' ' * 1_200_000 + 'end'
    tok = data.get_tokenizer('bytes')
    assert tok.decode(tok.encode(path_text)) == path_text


def test_unknown_tokenizers(tmp_path):
    with pytest.raises(ValueError, match="got 'gpt9'"):
        data.get_tokenizer('gpt9')
    with pytest.raises(FileNotFoundError, match='no such tokenizer'):
        data.get_tokenizer(tmp_path / 'none.json')


def test_chat_template_inserts_ids_itself():
    tok = data.get_tokenizer('bytes')
    ids = tok.encode_chat([{'role': 'user', 'content': ' hi <|eot_id|> '}])
    assert ids[0] == tok.bos_id and ids.count(tok.specials['eot']) == 1 and ids.count(tok.specials['start_header']) == 2
    assert tok.decode(ids) == ('<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nhi <|eot_id|><|eot_id|>'
                               '<|start_header_id|>assistant<|end_header_id|>\n\n')


# ------------------------------------------------------------------------------------------------- prepared folders


def test_every_piece_lands_once_and_documents_end(corpus_folder):
    corpus, tok = data.open_corpus(corpus_folder), data.get_tokenizer('bytes')
    train, val = (np.concatenate(corpus.splits[s]) for s in ('train', 'val'))
    assert (train == tok.eos_id).sum() == 36 and (val == tok.eos_id).sum() == 4      # 40 documents, every 10th held out
    for split in ('train', 'val'):
        entry = corpus.manifest['splits'][split]
        n_eos = 36 if split == 'train' else 4
        assert entry['tokens'] == entry['bytes'] + n_eos and len(corpus.splits[split][0]) == entry['tokens']


def test_held_out_pieces_are_spread(tmp_path):
    text = '\n'.join(f'line {i} of a long document' for i in range(4000))
    data.prepare([('a', text)], tmp_path / 'd', 'bytes')
    corpus, tok = data.open_corpus(tmp_path / 'd'), data.get_tokenizer('bytes')
    val = tok.decode(np.concatenate(corpus.splits['val']))
    numbers = [int(line.split()[1]) for line in val.replace('<|endoftext|>', '').splitlines() if line]
    assert min(numbers) < 1700 and max(numbers) > 2600 and 0.05 < len(numbers) / 4000 < 0.15
    train = tok.decode(np.concatenate(corpus.splits['train']))
    assert not set(numbers) & {int(line.split()[1]) for line in train.replace('<|endoftext|>', '').splitlines() if line}


def test_dtype_fits_the_vocabulary(tmp_path, bpe):
    small_corpus(tmp_path / 'a', 12, str(bpe))
    manifest = data.open_corpus(tmp_path / 'a').manifest
    assert manifest['dtype'] == 'uint16' and manifest['tokenizer'] == 'tokenizer.json'
    file = json.loads(bpe.read_text(encoding='utf-8'))
    file['model']['vocab']['qqq'] = 126336
    (tmp_path / 'wide.json').write_text(json.dumps(file), encoding='utf-8')
    small_corpus(tmp_path / 'b', 12, str(tmp_path / 'wide.json'))
    assert data.open_corpus(tmp_path / 'b').manifest['dtype'] == 'uint32'


def test_docs_are_real_text_without_repeats():
    documents = dict(data.docs_text())
    text = '\n\n'.join(documents.values())
    assert 700_000 < len(text) < 3_000_000 and 'with' in text and len(documents) > 100
    paragraphs = [p.strip() for t in documents.values() for p in t.split('\n\n')]
    assert len(paragraphs) == len(set(paragraphs))


def damage(folder, how):
    shard, manifest = folder / 'train_00000.bin', folder / 'manifest.json'
    raw = bytearray(shard.read_bytes())
    if how == 'short':
        shard.write_bytes(raw[:-10])
    elif how == 'odd':
        shard.write_bytes(raw[:-1])
    elif how == 'empty':
        shard.write_bytes(b'')
    elif how == 'gone':
        shard.unlink()
    elif how == 'flip':
        raw[len(raw) // 2] ^= 4
        shard.write_bytes(raw)
    elif how == 'dtype':
        manifest.write_text(manifest.read_text().replace('uint16', 'uint32'))
    elif how == 'json':
        manifest.write_text(manifest.read_text()[:-30])


@pytest.mark.parametrize('change', [
    dict(tokenizer=None), dict(tokenizer='/etc/tokenizer.json'), dict(vocab_size=0), dict(vocab_size=10 ** 30),
    dict(dtype='int8,int8'), dict(splits={}), dict(splits=None), dict(splits={'train': 5}),
])
def test_hostile_manifests(corpus_folder, tmp_path, change):
    folder = tmp_path / 'copy'
    shutil.copytree(corpus_folder, folder)
    manifest = json.loads((folder / 'manifest.json').read_text())
    (folder / 'manifest.json').write_text(json.dumps({**manifest, **change}))
    with pytest.raises(ValueError, match='not a manifest'):
        data.open_corpus(folder)


def test_nothing_of_the_user_is_overwritten(tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.tex').write_text('years of work')
    with pytest.raises(ValueError, match='something else is here'):
        small_corpus(tmp_path / 'mine', 12)
    assert (tmp_path / 'mine' / 'thesis.tex').exists() and len(list(tmp_path.iterdir())) == 1
    small_corpus(tmp_path / 'again', 12)
    small_corpus(tmp_path / 'again', 24)                            # a data set may be made anew
    data.open_corpus(tmp_path / 'again')


def test_a_wall_of_text_is_cut():
    pieces = list(data.chunks([('a', 'x' * 50000), ('b', 'word ' * 5000)]))
    assert max(len(t) for _, t in pieces) <= 8192 and ''.join(t for n, t in pieces if n == 'a') == 'x' * 50000
    assert all(t.startswith((' word', 'word')) for n, t in pieces if n == 'b')


@pytest.mark.parametrize('how, says', [
    ('short', 'the manifest says'), ('odd', 'the manifest says'), ('empty', 'the manifest says'),
    ('gone', 'missing'), ('flip', 'damaged'), ('dtype', 'the manifest says'), ('json', 'not a manifest'),
])
def test_damaged_data(corpus_folder, tmp_path, how, says):
    folder = tmp_path / 'copy'
    shutil.copytree(corpus_folder, folder)
    damage(folder, how)
    with pytest.raises(ValueError, match=says):
        data.open_corpus(folder)


def test_a_token_outside_the_vocabulary(corpus_folder, tmp_path):
    folder = tmp_path / 'copy'
    shutil.copytree(corpus_folder, folder)
    shard = np.fromfile(folder / 'train_00000.bin', dtype=np.uint16)
    shard[:] = 60000
    shard.tofile(folder / 'train_00000.bin')
    manifest = json.loads((folder / 'manifest.json').read_text())
    manifest['splits']['train']['shards'][0]['sha256'] = hashlib.sha256(shard).hexdigest()
    (folder / 'manifest.json').write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match='token 60000'):
        data.batch(data.open_corpus(folder), 'train', [0], 8)


@pytest.mark.parametrize('name, content, says', [
    ('a.txt', b'', 'no text'), ('a.txt', b'ok\nok\n\xff bad', 'a.txt:3: not UTF-8'),
    ('a.csv', b'x', 'must be .txt, .jsonl'),
    ('a.jsonl', b'{"text": "x"}\n{"text": 3}', 'a.jsonl:2'), ('a.jsonl', b'{"text": "x"}\n{"text"', 'a.jsonl:2'),
    ('a.jsonl', b'{"text": "\\ud800"}', 'a.jsonl:1'),
    ('a.jsonl', b'{"words": "x"}', 'a.jsonl:1'), ('a.jsonl', b'{"text": "x"}\n\xfe', 'a.jsonl:2: not UTF-8'),
])
def test_bad_input_is_named_and_leaves_nothing(tmp_path, name, content, says, capsys):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as e:
        data.main(['--input', str(tmp_path / name), '--out', str(tmp_path / 'out'), '--tokenizer', 'bytes'])
    err = capsys.readouterr().err
    assert e.value.code == 2 and says in err and len(err.splitlines()) == 1
    assert not (tmp_path / 'out').exists() and not (tmp_path / 'out.tmp').exists()


def test_command_line(tmp_path, capsys):
    (tmp_path / 'a.txt').write_text('some words to learn\n' * 4000, encoding='utf-8')
    (tmp_path / 'b.jsonl').write_text('\n'.join(json.dumps({'text': f'line {i}'}) for i in range(30)), encoding='utf-8')
    data.main(['--input', f"{tmp_path / 'a.txt'},{tmp_path / 'b.jsonl'}", '--out', str(tmp_path / 'out'),
               '--tokenizer', 'bpe-300'])
    assert 'train it' in capsys.readouterr().out.replace('train on it', 'train it')
    assert data.corpus_tokenizer(data.open_corpus(tmp_path / 'out')).vocab_size <= 300
    with pytest.raises(SystemExit):
        data.main(['nothing'])
    assert 'docs, shakespeare' in capsys.readouterr().err
    data.main([])
    assert 'shakespeare' in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- batches


def test_a_permutation_is_a_permutation():
    for n in (1, 2, 3, 10, 64, 65, 1000):
        for key in ([1, 2, 3, 4], [9, 8, 7, 6]):
            assert sorted(data.shuffled(i, n, key) for i in range(n)) == list(range(n))
    order = [data.shuffled(i, 1000, [5, 6, 7, 8]) for i in range(1000)]
    assert abs(np.corrcoef(order, range(1000))[0, 1]) < 0.1


def test_every_window_once_an_epoch_and_another_order_in_the_next(corpus_folder):
    corpus = data.open_corpus(corpus_folder)
    total, T = corpus.manifest['splits']['train']['tokens'], 64
    n = (total - T + 1) // T
    stream = np.concatenate(corpus.splits['train'])
    epochs = [data.batch(corpus, 'train', range(e * n, (e + 1) * n), T, seed=3).x0.numpy() for e in range(2)]
    for windows in epochs:
        place = {stream[i:i + T].tobytes(): i for i in range(total - T + 1)}
        starts = sorted(place[w.astype(stream.dtype).tobytes()] for w in windows)
        assert len(starts) == n and (np.diff(starts) == T).all()                        # side by side, each once
    assert not np.array_equal(epochs[0], epochs[1])


def test_batches_do_not_depend_on_how_they_are_split(corpus_folder):
    corpus = data.open_corpus(corpus_folder)
    whole = data.batch(corpus, 'train', range(40, 48), 32, seed=1)
    parts = [data.batch(corpus, 'train', range(i, i + 2), 32, seed=1).x0 for i in range(40, 48, 2)]
    assert torch.equal(whole.x0, torch.cat(parts)) and whole.maskable.all() and whole.cu_seqlens is None
    assert whole.x0.dtype == torch.int64 and whole.maskable.dtype == torch.bool


def test_windows_cross_shards(tmp_path):
    rng = np.random.default_rng(0)
    documents = [(f'd{i}', ' '.join(rng.choice(['ab', 'cd', 'ef'], 60))) for i in range(20)]
    data.prepare(documents, tmp_path / 'one', 'bytes')
    for name, text in documents:
        (tmp_path / f'{name}.txt').write_text(text)
    files = [tmp_path / f'{name}.txt' for name, _ in documents]
    data.prepare(files, tmp_path / 'many', 'bytes')
    one, many = data.open_corpus(tmp_path / 'one'), data.open_corpus(tmp_path / 'many')
    assert len(many.splits['train']) == 18 and len(one.splits['train']) == 1
    for seed in range(3):
        assert torch.equal(data.batch(one, 'train', range(9), 250, seed).x0,
                           data.batch(many, 'train', range(9), 250, seed).x0)
    assert torch.equal(data.all_windows(one, 'val', 50), data.all_windows(many, 'val', 50))


def test_too_little_text(corpus_folder, tmp_path):
    corpus = data.open_corpus(corpus_folder)
    with pytest.raises(ValueError, match='too few for a window'):
        data.batch(corpus, 'train', [0], 10 ** 6)
    with pytest.raises(ValueError, match='too short'):
        data.all_windows(corpus, 'val', 10 ** 6)
    with pytest.raises(ValueError, match='too little text'):
        data.prepare([('a', 'short')], tmp_path / 'x', 'bytes')
    with pytest.raises(FileNotFoundError, match='python data.py shakespeare'):
        data.open_corpus(tmp_path / 'shakespeare')


# ------------------------------------------------------------------------------------------- many files, and mixtures


@pytest.fixture
def files(tmp_path):
    """Six files of four kinds, some 12 kB each."""
    rng, out = np.random.default_rng(1), []
    for i, suffix in enumerate(('.txt', '.jsonl', '.jsonl.gz', '.txt', '.jsonl', '.txt')):
        texts = [' '.join(rng.choice(['mask', 'token', 'noise', 'naïve'], 300)) + '\n' for _ in range(7)]
        path = tmp_path / f'in{i}{suffix}'
        body = ''.join(texts) if suffix == '.txt' else ''.join(json.dumps({'text': t}) + '\n' for t in texts)
        path.write_bytes(gzip.compress(body.encode()) if suffix.endswith('.gz') else body.encode())
        out.append(path)
    return out


def test_processes_and_interruptions_change_nothing(files, tmp_path, monkeypatch):
    one = data.prepare(files, tmp_path / 'one', 'bpe-300')
    many = data.prepare(files, tmp_path / 'many', 'bpe-300', workers=2)
    assert one == many and not list(tmp_path.glob('.*unfinished*'))
    real, made = data._write_part, []

    def interrupted(job):
        if job[2] == 3:
            raise KeyboardInterrupt
        made.append(job[2])
        return real(job)

    monkeypatch.setattr(data, '_write_part', interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.prepare(files, tmp_path / 'again', 'bpe-300')
    assert not (tmp_path / 'again').exists() and made == [0, 1, 2]
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / '.again.unfinished').glob('train_*')}
    monkeypatch.setattr(data, '_write_part', real)
    assert data.prepare(files, tmp_path / 'again', 'bpe-300') == one
    assert all((tmp_path / 'again' / f.name).stat().st_mtime_ns == t for f, t in before.items()) and len(before) == 3


def test_what_changed_since_is_done_anew(files, tmp_path, monkeypatch):
    real = data._finish
    monkeypatch.setattr(data, '_finish', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        data.prepare(files, tmp_path / 'a', 'bytes')
    files[0].write_text('another text altogether\n' * 900)
    monkeypatch.setattr(data, '_finish', real)
    assert data.prepare(files, tmp_path / 'a', 'bytes') == data.prepare(files, tmp_path / 'b', 'bytes')


def test_a_bad_line_in_one_of_many_files(files, tmp_path):
    files[4].write_text(files[4].read_text() + '{"text": 5}\n')
    with pytest.raises(ValueError, match='in4.jsonl:8: want a JSON object'):
        data.prepare(files, tmp_path / 'out', 'bytes', workers=2)
    assert not (tmp_path / 'out').exists()
    files[4].write_text('\n'.join(files[4].read_text().splitlines()[:7]) + '\n')
    assert data.prepare(files, tmp_path / 'out', 'bytes') == data.prepare(files, tmp_path / 'two', 'bytes')


def test_another_vocabulary_is_another_job(files, tmp_path, monkeypatch):
    real = data._finish
    monkeypatch.setattr(data, '_finish', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        data.prepare(files, tmp_path / 'a', 'bpe-300', val_every=3)
    monkeypatch.setattr(data, '_finish', real)
    first, again = (data.prepare(files[:4], tmp_path / name, 'bpe-300', val_every=3) for name in 'ab')
    for manifest in (first, again):                                 # but for when it was made
        for split in manifest['splits'].values():
            for shard in split['shards']:
                shard.pop('made_from', None)
    assert first == again
    assert {f.name for f in (tmp_path / 'a').iterdir()} == {f.name for f in (tmp_path / 'b').iterdir()}


def test_a_cut_gzip_file(files, tmp_path):
    files[2].write_bytes(files[2].read_bytes()[:-20])
    with pytest.raises(ValueError, match='in2.jsonl.gz: not a complete gzip file'):
        data.prepare(files, tmp_path / 'out', 'bytes')
    assert not (tmp_path / 'out').exists()


def test_parquet(tmp_path):
    parquet = pytest.importorskip('pyarrow.parquet')
    import pyarrow
    parquet.write_table(pyarrow.table({'text': ['one text', 'two']}), tmp_path / 'a.parquet')
    assert list(data.read_file(tmp_path / 'a.parquet')) == [('a.parquet:1', 'one text'), ('a.parquet:2', 'two')]
    (tmp_path / 'b.parquet').write_text('no')
    with pytest.raises(ValueError, match='not a parquet file'):
        list(data.read_file(tmp_path / 'b.parquet'))


def test_a_mixture_keeps_its_shares_and_repeats_nothing(files, tmp_path):
    for name, part in (('a', files[:4]), ('b', files[4:])):
        data.prepare(part, tmp_path / name, 'bytes', val_every=3)
    mixture = data.open_dataset(f"{tmp_path / 'a'}:3,{tmp_path / 'b'}:1")
    a, b = (data.open_corpus(tmp_path / name) for name in 'ab')
    windows = data.batch(mixture, 'train', range(1000), 32, 5).x0
    at, streams = [0, 0], [data.batch(c, 'train', range(1000), 32, 5).x0 for c in (a, b)]
    for window, source in zip(windows, mixture.turns):                             # each source's own stream, in order
        assert torch.equal(window, streams[source][at[source]])
        at[source] += 1
    assert at == [750, 250]
    later = data.batch(mixture, 'train', [1000 + i for i in range(20)], 32, 5).x0
    assert torch.equal(later[mixture.turns[:20] == 1], data.batch(b, 'train', range(250, 1000), 32, 5).x0[
        :int((mixture.turns[:20] == 1).sum())])
    assert len(data.all_windows(mixture, 'val', 32, 40)) == 40
    low, high = sorted(map(data.bytes_per_token, (a, b)))
    assert low <= data.bytes_per_token(mixture) <= high
    for text, says in (('a:0.5,b', 'a mixture is written'), ('a:-1,b:2', 'a mixture is written'), (':1', 'a mixture'),
                       (f"{tmp_path / 'a'}:1,{tmp_path / 'b'}:0.0001", 'less than a thousandth')):
        with pytest.raises(ValueError, match=says):
            data.open_dataset(text)
    data.prepare(files[:2], tmp_path / 'c', 'bpe-300', val_every=3)
    with pytest.raises(ValueError, match='different tokenizers'):
        data.open_dataset(f"{tmp_path / 'a'}:1,{tmp_path / 'c'}:1")


def test_a_colon_in_the_name_of_a_folder(files, tmp_path):
    data.prepare(files, tmp_path / 'a:1', 'bytes')
    assert not data.open_dataset(str(tmp_path / 'a:1')).parts


def test_cuts_have_the_rates_and_lengths_of_the_papers():
    cuts = np.concatenate([data.draw_cuts(1, i, 1000, 64, 0.01, 0.30) for i in range(200)])
    n = len(cuts)
    assert abs((cuts < 0).mean() - 0.01) < 4 * (0.01 / n) ** 0.5
    assert abs((cuts > 0).mean() - 0.3) < 4 * (0.21 / n) ** 0.5
    assert set(cuts[cuts > 0]) == set(range(1, 64)) and set(-cuts[cuts < 0]) <= set(range(1, 65))
    assert abs(-cuts[cuts < 0].mean() - 32.5) < 4 * 18.5 / (cuts < 0).sum() ** 0.5
    assert (data.draw_cuts(1, 7, 10, 64, 0.5, 0.5) == data.draw_cuts(1, 7, 10, 64, 0.5, 0.5)).all()
    assert not data.draw_cuts(1, 7, 10, 64).any()


def test_cut_windows(corpus_folder):
    corpus = data.open_corpus(corpus_folder)
    plain = data.batch(corpus, 'train', range(4), 16)
    cut = data.batch(corpus, 'train', range(4), 16, cuts=np.array([0, 5, -3, -16]))
    assert torch.equal(plain.x0, cut.x0) and plain.cu_seqlens is None and plain.maskable.all()
    assert cut.cu_seqlens.tolist() == [0, 16, 21, 32, 35, 48, 64, 64, 64] and cut.cu_seqlens.dtype == torch.int32
    assert cut.maskable.sum(1).tolist() == [16, 16, 3, 16]
