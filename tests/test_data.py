"""Tokenizers without loss, data sets whole or not at all, batches that are a function of a number."""

import datetime
import gzip
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_corpus

import data
from configurator import Refused, alone, command, copy_tokenizer, settings_of, write_manifest

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
    model, split = file['model'], file['pre_tokenizer']['pretokenizers'][0]
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
    yield lambda: model['merges'].append(model['merges'][0]), 'merges far apart'
    yield lambda: split.update(pattern={'Regex': r'\p{N}{1,3}+|\s|\S'}), 'different things to different engines'
    yield lambda: split.update(pattern={'Regex': r'^\s+|\s|\S'}), 'different things to different engines'
    yield lambda: split.update(behavior='Removed', invert=True, pattern={'Regex': r'\w+|\s'}), 'leaves out characters'
    yield lambda: split.update(pattern={'Regex': r'(\s'}), 'regex cannot be used'
    yield lambda: file['added_tokens'][0].update(special=False), 'plain text'
    yield lambda: (model['vocab'].update({'qqq': 99999}), model.update(ignore_merges=True)), 'ignore_merges'
    yield lambda: file.pop('model'), 'not a tokenizer.json'


@pytest.mark.parametrize('case', range(19))
def test_what_cannot_be_converted_is_refused_by_name(bpe, tmp_path, case):
    file = json.loads(bpe.read_text(encoding='utf-8'))
    change, says = list(doctored(file))[case]
    change()
    (tmp_path / 't.json').write_text(json.dumps(file), encoding='utf-8')
    with pytest.raises(ValueError, match=says):
        data.get_tokenizer(tmp_path / 't.json')


@pytest.mark.parametrize('changes', [
    {'pattern': {'Regex': r' ?[^(\s|[.,!?…。，、।۔،])]+'}}, {'pattern': {'Regex': r'\p{L}+'}},
    {'pattern': {'Regex': r'\d'}},
    {'pattern': {'Regex': r'(?i:ab)\S+'}}, {'behavior': 'Removed', 'invert': True}], ids=lambda c: str(c)[:40])
def test_what_a_pattern_leaves_out_is_a_piece_of_its_own(bpe, tmp_path, changes):
    """As the reference library has it (BLOOM's regex): nothing is lost between two matches."""
    file = json.loads(bpe.read_text(encoding='utf-8'))
    file['pre_tokenizer']['pretokenizers'][0].update(changes)
    file['normalizer'] = {'type': 'Sequence', 'normalizers': []}            # DeepSeek's: does nothing
    (tmp_path / 't.json').write_text(json.dumps(file), encoding='utf-8')
    tok, rng = data.get_tokenizer(tmp_path / 't.json'), random.Random(2)
    texts = [*TEXTS[:6], 'Hello, world! (It works.)\nYes?', '床前明月光，疑是地上霜。']
    texts += [''.join(rng.choice('ab1 .,(\n漢é') for _ in range(30)) for _ in range(300)]
    for text in texts:
        assert tok.decode(tok.encode(text)) == text
    reference = pytest.importorskip('tokenizers').Tokenizer.from_file(str(tmp_path / 't.json'))
    for text in texts:
        assert tok.encode(text) == reference.encode(text).ids


def test_all_ways_to_make_a_token_one_after_the_other(bpe, tmp_path):
    """Llama 3's file lists every split of a token as a merge: the rank is that of the first."""
    file = json.loads(bpe.read_text(encoding='utf-8'))
    vocab, plain = file['model']['vocab'], data.get_tokenizer(bpe)
    merges = []
    for a, b in file['model']['merges']:
        token = a + b
        merges += [[a, b], *([token[:k], token[k:]] for k in range(1, len(token))
                             if token[:k] in vocab and token[k:] in vocab and token[:k] != a)]
    assert len(merges) > len(file['model']['merges'])
    file['model'].update(merges=merges, ignore_merges=True)
    (tmp_path / 't.json').write_text(json.dumps(file), encoding='utf-8')
    tok, text = data.get_tokenizer(tmp_path / 't.json'), open(__file__, encoding='utf-8').read()
    assert tok.decode(tok.encode(text)) == text and len(tok.encode(text)) <= 1.02 * len(plain.encode(text))


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


def stream(corpus, split):
    """All tokens of a split."""
    return np.concatenate(corpus.shards[split])


def windows(dataset, T, split='train', seed=0, **cuts):
    dataset = data.Dataset([dataset], [1.0]) if isinstance(dataset, data.Corpus) else dataset
    return data.Windows(dataset, split, dataset.parts[0].tokenizer(), T, seed, data.Cuts(**cuts))


def first(source, n, size=None):
    """The first n windows of the endless stream."""
    return source.batch(0, range(n), size or n).x0


def run_main(**flags):
    data.main({**settings_of(vars(data)), **flags})


def test_every_piece_lands_once_and_documents_end(corpus_folder):
    corpus, tok = data.Corpus(corpus_folder), data.get_tokenizer('bytes')
    for split, n_eos in (('train', 36), ('val', 4)):                                # 40 documents, every 10th held out
        assert (stream(corpus, split) == tok.eos_id).sum() == n_eos
        assert corpus.count(split, 'tokens') == corpus.count(split, 'bytes') + n_eos == len(corpus.shards[split][0])


def test_held_out_pieces_are_spread(tmp_path):
    text = '\n'.join(f'line {i} of a long document' for i in range(4000))
    data.prepare([[('a', {'text': text})]], tmp_path / 'd', 'bytes')
    corpus, tok = data.Corpus(tmp_path / 'd'), data.get_tokenizer('bytes')
    val = tok.decode(stream(corpus, 'val'))
    numbers = [int(line.split()[1]) for line in val.replace('<|endoftext|>', '').splitlines() if line]
    assert min(numbers) < 1700 and max(numbers) > 2600 and 0.05 < len(numbers) / 4000 < 0.15
    train = tok.decode(stream(corpus, 'train'))
    assert not set(numbers) & {int(line.split()[1]) for line in train.replace('<|endoftext|>', '').splitlines() if line}


def test_files_to_hold_out(tmp_path):
    (tmp_path / 'a.txt').write_text('to train on\n' * 2000)
    (tmp_path / 'b.txt').write_text('to be held out\n' * 100)
    run_main(input=str(tmp_path / 'a.txt'), val_input=str(tmp_path / 'b.txt'), out=str(tmp_path / 'd'),
             tokenizer='bytes')
    corpus, tok = data.Corpus(tmp_path / 'd'), data.get_tokenizer('bytes')
    assert tok.decode(stream(corpus, 'train')).count('train on') == 2000
    assert tok.decode(stream(corpus, 'val')).count('held out') == 100


def test_dtype_fits_the_vocabulary(tmp_path, bpe):
    small_corpus(tmp_path / 'a', 12, str(bpe))
    manifest = data.Corpus(tmp_path / 'a').manifest
    assert manifest['splits']['train'][0]['dtype'] == 'uint16' and manifest['tokenizer'] == 'tokenizer.json'
    file = json.loads(bpe.read_text(encoding='utf-8'))
    file['model']['vocab']['qqq'] = 126336
    (tmp_path / 'wide.json').write_text(json.dumps(file), encoding='utf-8')
    small_corpus(tmp_path / 'b', 12, str(tmp_path / 'wide.json'))
    assert data.Corpus(tmp_path / 'b').manifest['splits']['train'][0]['dtype'] == 'uint32'


def test_docs_are_real_text_without_repeats():
    texts = [record['text'] for _, record in data.docs_text()]
    text = '\n\n'.join(texts)
    assert 700_000 < len(text) < 3_000_000 and 'with' in text and len(texts) > 100
    paragraphs = [p.strip() for t in texts for p in t.split('\n\n')]
    assert len(paragraphs) == len(set(paragraphs))


def damage(folder, how):
    shard, manifest = folder / 'train_00000.bin', folder / 'manifest.json'
    raw = bytearray(shard.read_bytes())
    if how == 'short':
        shard.write_bytes(raw[:-10])
    elif how == 'empty':
        shard.write_bytes(b'')
    elif how == 'gone':
        shard.unlink()
    elif how == 'flip':
        raw[len(raw) // 2] ^= 4
        shard.write_bytes(raw)
    elif how == 'dtype':
        manifest.write_text(manifest.read_text().replace('uint16', 'uint32'))
    elif how == 'bytes':
        manifest.write_text(manifest.read_text().replace('"bytes": ', '"bytes": 1'))
    elif how == 'json':
        manifest.write_text(manifest.read_text()[:-30])


@pytest.mark.parametrize('how, says', [
    ('short', 'damaged'), ('empty', 'damaged'), ('gone', 'missing'), ('flip', 'damaged'), ('dtype', 'damaged'),
    ('bytes', 'damaged'), ('json', 'not a JSON object'),
])
def test_damaged_data(corpus_folder, tmp_path, how, says):
    folder = tmp_path / 'copy'
    shutil.copytree(corpus_folder, folder)
    damage(folder, how)
    with pytest.raises(ValueError, match=says):
        data.Corpus(folder)


def test_sizes_are_compared_even_without_checksums(corpus_folder, tmp_path):
    shutil.copytree(corpus_folder, tmp_path / 'copy')
    damage(tmp_path / 'copy', 'flip')
    data.Corpus(tmp_path / 'copy', None)
    damage(tmp_path / 'copy', 'short')
    with pytest.raises(ValueError, match='the manifest says'):
        data.Corpus(tmp_path / 'copy', None)


def test_processes_share_the_work_of_comparing(files, tmp_path):
    data.prepare(files, tmp_path / 'd', 'bytes')
    folder = tmp_path / 'd'
    names = sorted(data.Corpus(folder).manifest['files'])
    raw = bytearray((folder / names[3]).read_bytes())
    raw[0] ^= 1
    (folder / names[3]).write_bytes(raw)
    for k in (0, 2):
        data.Corpus(folder, (k, 4))
    with pytest.raises(ValueError, match=names[3]):
        data.Corpus(folder, (3, 4))


def test_another_version_of_data_is_refused(corpus_folder, tmp_path):
    shutil.copytree(corpus_folder, tmp_path / 'copy')
    manifest = json.loads((tmp_path / 'copy' / 'manifest.json').read_text())
    (tmp_path / 'copy' / 'manifest.json').unlink()
    del manifest['sha256']
    write_manifest(tmp_path / 'copy', {**manifest, 'format': 'nanollada data 1'})
    with pytest.raises(ValueError, match='another version'):
        data.Corpus(tmp_path / 'copy')


def test_nothing_of_the_user_is_overwritten(tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.tex').write_text('years of work')
    with pytest.raises(ValueError, match='something else is here'):
        small_corpus(tmp_path / 'mine', 12)
    assert (tmp_path / 'mine' / 'thesis.tex').exists() and len(list(tmp_path.iterdir())) == 1
    small_corpus(tmp_path / 'again', 12)
    small_corpus(tmp_path / 'again', 24)                            # a data set may be made anew
    data.Corpus(tmp_path / 'again')


def test_a_wall_of_text_is_cut():
    wall, words = list(data.chunks('x' * 50000)), list(data.chunks('word ' * 5000))
    assert max(map(len, wall + words)) <= 8192 and ''.join(wall) == 'x' * 50000 and ''.join(words) == 'word ' * 5000
    assert all(piece.startswith((' word', 'word')) for piece in words)


@pytest.mark.parametrize('name, content, says', [
    ('a.txt', b'', 'no text'), ('a.txt', b'ok\nok\n\xff bad', 'a.txt:3: not UTF-8'),
    ('a.csv', b'x', 'input must be one of .txt, .jsonl'),
    ('a.jsonl', b'{"text": "x"}\n{"text": 3}', 'a.jsonl:2'), ('a.jsonl', b'{"text": "x"}\n{"text"', 'a.jsonl:2'),
    ('a.jsonl', b'{"text": "\\ud800"}', 'a.jsonl:1'), ('a.jsonl', b'5', 'a.jsonl:1: want a JSON object'),
    ('a.jsonl', b'{"words": "x"}', 'a.jsonl:1'), ('a.jsonl', b'{"text": "x"}\n\xfe', 'a.jsonl:2'),
    ('a.json', b'{"text": "x"}', 'must be one list'), ('a.json', b'[{"text": "x"}, {"text": ""}]', 'a.json, item 2'),
])
def test_bad_input_is_named_and_leaves_nothing(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((Refused, OSError), match=says) as e:
        run_main(input=str(tmp_path / name), out=str(tmp_path / 'out'), tokenizer='bytes')
    assert '\n' not in str(e.value) and [f.name for f in tmp_path.iterdir()] == [name]


def test_lines_that_hold_nothing_are_passed_over(tmp_path):
    lines = [b'\xef\xbb\xbf{"prompt": "a", "response": "b"}', b'', b'  ', b'{"prompt": "c", "response": "d"}', b'']
    (tmp_path / 'a.jsonl').write_bytes(b'\n'.join(lines))
    found = list(data.read_records(tmp_path / 'a.jsonl'))
    assert [where.rpartition(':')[2] for where, _ in found] == ['1', '4']
    assert [record['messages'][0]['content'] for _, record in found] == ['a', 'c']


def test_command_line(tmp_path, capsys, monkeypatch):
    (tmp_path / 'a.txt').write_text('some words to learn\n' * 4000, encoding='utf-8')
    (tmp_path / 'b.jsonl').write_text('\n'.join(json.dumps({'text': f'line {i}'}) for i in range(30)), encoding='utf-8')
    flags = [f"--input={tmp_path / 'a.txt'},{tmp_path / 'b.jsonl'}", f"--out={tmp_path / 'out'}", '--tokenizer=bpe-300']
    for argv, says in ((flags, 'train on it'), ([], 'shakespeare')):
        monkeypatch.setattr('sys.argv', ['data.py', *argv])
        command(data.main, dict(vars(data)), positional=('name',))
        assert says in capsys.readouterr().out
    assert data.Corpus(tmp_path / 'out').tokenizer().vocab_size <= 300
    monkeypatch.setattr('sys.argv', ['data.py', 'nothing'])
    with pytest.raises(SystemExit) as e:
        command(data.main, dict(vars(data)), positional=('name',))
    assert e.value.code == 2 and 'docs, shakespeare' in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- batches


def test_a_permutation_is_a_permutation():
    for n in (1, 2, 3, 10, 64, 65, 1000):
        for key in ([1, 2, 3, 4], [9, 8, 7, 6]):
            assert sorted(data.shuffled(i, n, key) for i in range(n)) == list(range(n))
    order = [data.shuffled(i, 1000, [5, 6, 7, 8]) for i in range(1000)]
    assert abs(np.corrcoef(order, range(1000))[0, 1]) < 0.1


def test_every_window_once_an_epoch_and_another_order_in_the_next(corpus_folder):
    corpus, T = data.Corpus(corpus_folder), 64
    tokens, total = stream(corpus, 'train'), corpus.count('train', 'tokens')
    n = (total - T + 1) // T
    source = windows(corpus, T, seed=3)
    epochs = [source.batch(e, range(n), n).x0.numpy() for e in range(2)]
    for epoch in epochs:
        place = {tokens[i:i + T].tobytes(): i for i in range(total - T + 1)}
        starts = sorted(place[w.astype(tokens.dtype).tobytes()] for w in epoch)
        assert len(starts) == n and (np.diff(starts) == T).all()                        # side by side, each once
    assert not np.array_equal(epochs[0], epochs[1])


def test_batches_do_not_depend_on_how_they_are_split(corpus_folder):
    source = windows(data.Corpus(corpus_folder), 32, seed=1)
    whole = source.batch(5, range(8), 8)
    parts = [source.batch(5, range(i, i + 2), 8).x0 for i in range(0, 8, 2)]
    assert torch.equal(whole.x0, torch.cat(parts)) and whole.maskable.all() and whole.cu_seqlens is None
    assert whole.x0.dtype == torch.int64 and whole.maskable.dtype == torch.bool


def test_windows_cross_shards(tmp_path):
    rng = np.random.default_rng(0)
    documents = [(f'd{i}', {'text': ' '.join(rng.choice(['ab', 'cd', 'ef'], 60))}) for i in range(20)]
    data.prepare([documents], tmp_path / 'one', 'bytes')
    for name, record in documents:
        (tmp_path / f'{name}.txt').write_text(record['text'])
    files = [tmp_path / f'{name}.txt' for name, _ in documents]
    data.prepare(files, tmp_path / 'many', 'bytes')
    one, many = data.Corpus(tmp_path / 'one'), data.Corpus(tmp_path / 'many')
    assert len(many.shards['train']) == 18 and len(one.shards['train']) == 1
    for seed in range(3):
        assert torch.equal(first(windows(one, 250, seed=seed), 9), first(windows(many, 250, seed=seed), 9))
    (a, _), (b, _) = (windows(corpus, 50, 'val').held_out()[0][0] for corpus in (one, many))
    assert torch.equal(a, b)


def test_held_out_windows_are_in_order_and_evenly_chosen(corpus_folder):
    corpus = data.Corpus(corpus_folder)
    [(x0, maskable)], n_bytes = windows(corpus, 32, 'val').held_out()
    assert torch.equal(x0.flatten(), torch.from_numpy(stream(corpus, 'val').astype(np.int64))[:x0.numel()])
    assert maskable.all() and len(x0) == corpus.count('val', 'tokens') // 32
    assert n_bytes == pytest.approx(32 * corpus.count('val', 'bytes') / corpus.count('val', 'tokens'))
    [(few, _)], _ = windows(corpus, 32, 'val').held_out(5)
    assert torch.equal(few, x0[[i * len(x0) // 5 for i in range(5)]])


def test_too_little_text(corpus_folder, tmp_path):
    corpus = data.Corpus(corpus_folder)
    for split in ('train', 'val'):
        with pytest.raises(ValueError, match='too short for a window'):
            windows(corpus, 10 ** 6, split)
    with pytest.raises(ValueError, match='too little text'):
        data.prepare([[('a', {'text': 'short'})]], tmp_path / 'x', 'bytes')
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match='python data.py shakespeare'):
        data.Corpus(tmp_path / 'shakespeare')
    with pytest.raises(FileNotFoundError, match='worlds.py'):
        data.Corpus(tmp_path / 'world')


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
    real, made = data.tokenize_source, []

    def interrupted(job):
        if job[0] == 3:
            raise KeyboardInterrupt
        made.append(job[0])
        return real(job)

    monkeypatch.setattr(data, 'tokenize_source', interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.prepare(files, tmp_path / 'again', 'bpe-300')
    assert not (tmp_path / 'again').exists() and made == [0, 1, 2]
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / '.again.unfinished').glob('train_*')}
    monkeypatch.setattr(data, 'tokenize_source', real)
    assert data.prepare(files, tmp_path / 'again', 'bpe-300') == one
    assert all((tmp_path / 'again' / f.name).stat().st_mtime_ns == t for f, t in before.items()) and len(before) == 3


def interrupted_at_the_end(monkeypatch, *args, **options):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, 'collect', stop)
        with pytest.raises(KeyboardInterrupt):
            data.prepare(*args, **options)


def test_what_changed_since_is_done_anew(files, tmp_path, monkeypatch):
    interrupted_at_the_end(monkeypatch, files, tmp_path / 'a', 'bytes')
    files[0].write_text('another text altogether\n' * 900)
    assert data.prepare(files, tmp_path / 'a', 'bytes') == data.prepare(files, tmp_path / 'b', 'bytes')


def test_a_bad_line_in_one_of_many_files(files, tmp_path):
    files[4].write_text(files[4].read_text() + '{"text": 5}\n')
    with pytest.raises(ValueError, match='in4.jsonl:8: want a text'):
        data.prepare(files, tmp_path / 'out', 'bytes', workers=2)
    assert not (tmp_path / 'out').exists()
    files[4].write_text('\n'.join(files[4].read_text().splitlines()[:7]) + '\n')
    assert data.prepare(files, tmp_path / 'out', 'bytes') == data.prepare(files, tmp_path / 'two', 'bytes')


def test_another_vocabulary_is_another_job(files, tmp_path, monkeypatch):
    interrupted_at_the_end(monkeypatch, files, tmp_path / 'a', 'bpe-300', val_every=3)
    first, again = (data.prepare(files[:4], tmp_path / name, 'bpe-300', val_every=3) for name in 'ab')
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
    dates = [datetime.date(2026, 6, 1), datetime.date(2026, 6, 2)]
    table = pyarrow.table({'text': ['one text', 'two'], 'n': [1, 2], 'when': dates, 'raw': [b'a', None]})
    parquet.write_table(table, tmp_path / 'a.parquet')
    assert [record['text'] for _, record in data.read_records(tmp_path / 'a.parquet')] == ['one text', 'two']
    (tmp_path / 'b.parquet').write_text('no')
    with pytest.raises(ValueError, match='not a parquet file'):
        list(data.read_records(tmp_path / 'b.parquet'))


def test_a_row_that_is_several_things_is_the_first_of_them():
    """Public sets carry the flattened text beside the messages: it is not trained on twice."""
    said = [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}]
    assert data.as_record({'messages': said, 'text': 'q a', 'id': 7}) == {'messages': said, 'id': 7}
    assert data.as_record({'prompt': 'q', 'response': 'a', 'text': 'q a'}) == {'messages': said}
    assert data.as_record({'text': 't', 'response': 'a'}) == {'text': 't'}


def test_a_vocabulary_is_learnt_from_what_is_trained_on(tmp_path):
    """Of several sources, and of examples, exactly the texts of the training split."""
    for i, line in enumerate(('aa bb ' * 9000, 'cc dd ' * 9000)):
        (tmp_path / f'{i}.txt').write_text('\n'.join(line[k:k + 60] for k in range(0, len(line), 60)))
    sources = [tmp_path / '0.txt', tmp_path / '1.txt']
    data.prepare(sources, tmp_path / 'out', 'bytes', val_every=3)
    trained = ''.join(data.training_texts(sources, 3))
    tok = data.get_tokenizer('bytes')
    ids = data.open_dataset(str(tmp_path / 'out')).parts[0]
    stored = [int(i) for shard in ids.shards['train'] for i in shard if i != tok.eos_id]
    assert tok.decode(stored) == trained


def test_another_vocabulary_with_the_same_look_is_noticed(tmp_path):
    """Two vocabularies that differ in one merge that hardly any text shows."""
    merges = data.train_bpe('the quick brown fox the quick brown fox', 12)
    data.save_bpe(tmp_path / 'a.json', merges)
    data.save_bpe(tmp_path / 'b.json', [*merges[:-1], (b'Z', b'Q')])
    ours, theirs = (data.get_tokenizer(tmp_path / name) for name in ('a.json', 'b.json'))
    data.check_same(ours, data.get_tokenizer(tmp_path / 'a.json'), 'x', 'y')
    with pytest.raises(Refused, match='x: its tokenizer is not the one of y'):
        data.check_same(ours, theirs, 'x', 'y')


def test_a_mixture_keeps_its_shares_and_repeats_nothing(files, tmp_path):
    for name, part in (('a', files[:4]), ('b', files[4:])):
        data.prepare(part, tmp_path / name, 'bytes', val_every=3)
    mixture = windows(data.open_dataset(f"{tmp_path / 'a'}:3,{tmp_path / 'b'}:1"), 32, seed=5)
    a, b = (windows(data.Corpus(tmp_path / name), 32, seed=5) for name in 'ab')
    at, streams = [0, 0], [first(source, 1000) for source in (a, b)]
    for window, which in zip(first(mixture, 1000), mixture.turns):                      # each its own stream, in order
        assert torch.equal(window, streams[which][at[which]])
        at[which] += 1
    assert at == [750, 250]
    later, second = mixture.batch(1, range(20), 1000).x0, mixture.turns[:20] == 1
    assert torch.equal(later[second], first(b, 1000)[250:250 + int(second.sum())])
    [(x0, _)], _ = windows(data.open_dataset(f"{tmp_path / 'a'}:3,{tmp_path / 'b'}:1"), 32, 'val').held_out(40)
    assert len(x0) == 40
    low, high = sorted((a.bytes_per_token, b.bytes_per_token))
    assert low <= mixture.bytes_per_token <= high


def test_mixtures_that_cannot_be(files, tmp_path):
    for name, part in (('a', files[:4]), ('b', files[4:])):
        data.prepare(part, tmp_path / name, 'bytes', val_every=3)
    for text in ('a:0.5,b', 'a:-1,b:2', 'a:x', 'a:nan,b:1'):
        with pytest.raises(ValueError, match='a mixture is written'):
            data.open_dataset(text)
    with pytest.raises(ValueError, match='less than a thousandth'):
        windows(data.open_dataset(f"{tmp_path / 'a'}:1,{tmp_path / 'b'}:0.0001"), 32)
    data.prepare(files[:2], tmp_path / 'c', 'bpe-300', val_every=3)
    with pytest.raises(ValueError, match='its tokenizer is not the one of'):
        data.open_dataset(f"{tmp_path / 'a'}:1,{tmp_path / 'c'}:1")


def test_a_colon_in_the_name_of_a_folder(files, tmp_path):
    data.prepare(files, tmp_path / 'a:1', 'bytes')
    assert len(data.open_dataset(str(tmp_path / 'a:1')).parts) == 1


def test_cuts_have_the_rates_and_lengths_of_the_papers(corpus_folder):
    source = windows(data.Corpus(corpus_folder), 64, seed=1, random_length=0.01, random_split=0.30)
    keep, border = (np.concatenate(z) for z in zip(*(source.cuts(i, 1000) for i in range(200))))
    short, split, n = keep < 64, (border < 64) & (keep == 64), len(keep)
    assert abs(short.mean() - 0.01 * 63 / 64) < 4 * (0.01 / n) ** 0.5                   # one length in 64 is all of it
    assert abs(split.mean() - 0.3) < 4 * (0.21 / n) ** 0.5
    assert set(border[split]) == set(range(1, 64)) and set(keep) <= set(range(1, 65))
    assert abs(keep[short].mean() - 32) < 4 * 18.5 / short.sum() ** 0.5
    assert (source.cuts(7, 10)[1] == source.cuts(7, 10)[1]).all()
    assert (windows(data.Corpus(corpus_folder), 64).cuts(7, 10)[1] == 64).all()


def test_cut_windows(corpus_folder, monkeypatch):
    source = windows(data.Corpus(corpus_folder), 16)
    plain = source.batch(0, range(4), 4)
    cuts = np.array([16, 16, 3, 16]), np.array([16, 5, 3, 16])
    monkeypatch.setattr(source, 'cuts', lambda it, size: cuts)
    cut = source.batch(0, range(4), 4)
    assert torch.equal(plain.x0, cut.x0) and plain.cu_seqlens is None and plain.maskable.all()
    assert cut.cu_seqlens.tolist() == [0, 16, 21, 32, 35, 48, 64, 64, 64] and cut.cu_seqlens.dtype == torch.int32
    assert cut.maskable.sum(1).tolist() == [16, 16, 3, 16]


SAID = [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}]


@pytest.mark.parametrize('row', [
    {'prompt': 'q', 'response': 'a'}, {'question': 'q', 'answer': 'a'}, {'prompt': 'q', 'completion': 'a'},
    {'instruction': 'q', 'output': 'a'}, {'instruction': 'q', 'input': '', 'output': 'a'},              # Alpaca
    {'prompt': SAID[:1], 'completion': SAID[1:]}, {'messages': SAID},                                   # TRL
    {'conversations': [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}]},                # ShareGPT
    {'conversation': SAID}, {'messages': [{**said, 'tool_calls': None, 'name': 'x'} for said in SAID]},
    {'messages': [{'role': said['role'], 'content': [{'type': 'text', 'text': said['content']}]} for said in SAID]},
], ids=str)
def test_conversations_by_other_names(row):
    assert data.as_record({**row, 'id': 7})['messages'] == SAID
    assert data.as_record({**row, 'id': 7}).keys() <= {'messages', 'id', 'input'}


def test_what_is_no_conversation_leaves_a_text_a_text():
    assert data.as_record({'text': 't', 'conversation': 17, 'messages': None}) == {'text': 't'}
    assert data.as_record({'response': 'a', 'messages': None}) == {'response': 'a'}


def test_alpacas_input_is_part_of_the_question():
    row = data.as_record({'instruction': 'Add.', 'input': '1 and 2', 'output': '3'})
    assert row['messages'][0]['content'] == 'Add.\n\n1 and 2'


@pytest.mark.parametrize('row, says', [
    ({'messages': [*SAID[:1], {'role': 'assistant', 'content': None, 'tool_calls': [{'id': 1}]}]}, '"tool_calls"'),
    ({'messages': [*SAID[:1], {'role': 'assistant', 'content': 'a', 'function_call': {'name': 'f'}}]}, 'tools'),
    ({'messages': [{'role': 'user', 'content': [{'type': 'image'}]}, SAID[1]]}, '"content" of a message'),
    ({'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': 5}]}, SAID[1]]}, '"content" of a message'),
    ({'conversations': [{'from': 'human', 'value': 'q'}]}, 'must end with an answer'),
    ({'conversations': 'q'}, '"conversations" must be a list'), ({'messages': ['q']}, '"role" and a "content"'),
    ({'instruction': 'q', 'output': ['a']}, '"role" and a "content"'),
    ({'instruction': None, 'input': 'q', 'output': 'a'}, 'must be a text'),
    ({'instruction': 'q', 'input': {'a': 1}, 'output': 'a'}, 'must be a text'),
])
def test_conversations_that_are_refused(row, says):
    with pytest.raises(ValueError, match=says):
        data.as_record(row)


def test_a_tiktoken_vocabulary_is_kept_in_the_data_set(tmp_path, monkeypatch):
    """Who has prepared data with gpt2's once needs no network again, nor does the checkpoint."""
    ranks = {bytes([b]): b for b in range(256)} | {b'th': 256, b'the': 258}          # a gap, as o200k has them
    full = data.tiktoken.Encoding('gpt2', pat_str=data.PATTERN, mergeable_ranks=ranks,
                                  special_tokens={'<|endoftext|>': 300})
    monkeypatch.setattr(data.tiktoken, 'get_encoding', lambda name: full)
    tok = data.get_tokenizer('gpt2')
    assert tok.encode('the') == [258] and tok.eos_id == 300 and tok.mask_id > 300
    small_corpus(tmp_path / 'a', tokenizer='gpt2')

    def no_network(name):
        raise OSError('no route to host')

    monkeypatch.setattr(data.tiktoken, 'get_encoding', no_network)
    kept = data.Corpus(tmp_path / 'a').tokenizer()
    data.check_same(kept, tok, 'a', 'b')
    (tmp_path / 'step').mkdir()
    assert copy_tokenizer(kept.spec, tmp_path / 'step') == 'tokenizer.tiktoken'
    assert data.get_tokenizer(tmp_path / 'step' / 'tokenizer.tiktoken').encode('the \u00e9') == tok.encode('the \u00e9')
    with pytest.raises(Refused, match='TIKTOKEN_CACHE_DIR'):
        data.get_tokenizer('gpt2')
    (tmp_path / 'bad.tiktoken').write_text('{"ids": {"zz": 1}}')
    with pytest.raises(Refused, match='not a vocabulary'):
        data.get_tokenizer(tmp_path / 'bad.tiktoken')
    with pytest.raises(FileNotFoundError, match='no such tokenizer file'):
        data.get_tokenizer(tmp_path / 'none.tiktoken')
    with pytest.raises(Refused, match='must name a folder'):
        small_corpus(Path('.'))


def test_what_is_too_short_leaves_nothing_behind(tmp_path):
    (tmp_path / 'one.jsonl').write_text('{"question": "a", "answer": "b"}')
    with pytest.raises(Refused, match='too little text'):
        data.prepare([tmp_path / 'one.jsonl'], tmp_path / 'out', 'bytes')
    with pytest.raises(FileNotFoundError):
        data.prepare([tmp_path / 'none.jsonl'], tmp_path / 'a' / 'b' / 'out', 'bytes')
    assert [path.name for path in tmp_path.iterdir()] == ['one.jsonl']


def test_a_word_of_any_length_teaches_merges():
    """Its cost would grow with the length of the word times the number of merges."""
    assert data.train_bpe('ab' * 100_000, 2) == [(b'a', b'b'), (b'ab', b'ab')]


def test_two_preparations_do_not_meet(tmp_path):
    pytest.importorskip('fcntl')
    with alone(tmp_path / '.a.lock'), pytest.raises(Refused, match='another process is at work here'):
        small_corpus(tmp_path / 'a')
    small_corpus(tmp_path / 'a')
    assert [path.name for path in tmp_path.iterdir()] == ['a']


def test_a_lock_that_its_owner_has_removed_is_no_lock(tmp_path, monkeypatch):
    """Between opening a lock file and taking the lock its last owner may have left, and a third made a new file."""
    fcntl = pytest.importorskip('fcntl')
    real, lock = fcntl.flock, tmp_path / 'lock'
    monkeypatch.setattr(fcntl, 'flock', lambda *how: lock.unlink() or real(*how))
    with pytest.raises(Refused, match='another process'), alone(lock):
        pass
