"""Text to tokens, tokens to batches: everything the training loop needs to know about data.

    python data.py                                          # what there is
    python data.py shakespeare                              # downloads (or --input=FILE), tokenizes to data/shakespeare
    python data.py --input=a.txt,b.jsonl --out=data/my --tokenizer=gpt2

A data set is a folder: flat token files (train_000.bin, val_000.bin), one manifest.json that says what is in them
(dtype, counts, vocabulary, sha256), and the tokenizer, unless it has a well-known name. Batches are stateless: which
windows form iteration i is a function of (seed, i), so a run resumes from a number, on any number of machines.

Letters: B batch, T window length, N tokens in a split.

Too many lines, and known to be: a tokenizer is part of what a data set is, and neither is of use without the other.
"""

import argparse
import ast
import glob
import gzip
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import zlib
from collections import Counter, defaultdict, namedtuple
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

Batch = namedtuple('Batch', 'x0 maskable cu_seqlens')               # (B, T) int64, (B, T) bool, (n+1,) int32 or None
Corpus = namedtuple('Corpus', 'folder manifest splits parts turns', defaults=((), None))       # splits: name -> shards

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers: one kind, a tiktoken.Encoding and a table from its ranks to ids; three sources

SPECIALS = {'bos': '<|startoftext|>', 'eos': '<|endoftext|>', 'mask': '<|mdm_mask|>',       # LLaDA's names
            'start_header': '<|start_header_id|>', 'end_header': '<|end_header_id|>', 'eot': '<|eot_id|>'}
ALIASES = {'bos': ('<s>', '<|begin_of_text|>'), 'eos': ('</s>', '<|end_of_text|>'),
           'mask': ('<[MASK]>', '[MASK]', '<mask>'), 'start_header': ('<start_id>',), 'end_header': ('<end_id>',),
           'eot': ('<eot_id>',)}                        # the last three: names in LLaDA's guideline for the same ids
ROLES = ('mask', 'eos', 'pad', 'bos', 'eot')
# The two chat formats known here, as the texts that a chat template may put around a message: that of the released
# LLaDA, and the one drawn in its guideline. What stands between header and message is the difference.
CHAT_FORMATS = {'\n\n': {'<|start_header_id|>', '<|end_header_id|>\n\n', '<|eot_id|>',
                         '<|start_header_id|>assistant<|end_header_id|>\n\n'},
                '\n': {'<start_id>', '<end_id>\n', '<eot_id>', '<start_id>assistant<end_id>\n'}}
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"    # GPT-2's, but digits stand alone
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LONGEST_PIECE = 400_000                                 # tiktoken gives up on about a million spaces in a row


class Tokenizer:
    """Text to ids and back. `mask_id`, `eos_id`, `pad_id`, `bos_id` are ids; `spec` is what a checkpoint stores.

    encoding: a tiktoken.Encoding; id_of_rank: its rank -> our id; specials: role -> id; spare: other ids -> bytes.
    `named`: the roles whose id is in the vocabulary; the others stand for the next free ids. `chat`: what its template
    puts between header and message, None if there is no template that encode_chat knows.
    """

    def __init__(self, encoding, id_of_rank, specials, spec, spare=None, named=(), chat='\n\n'):
        self.encoding, self.spec, self.specials = encoding, str(spec), dict(specials)
        self.named, self.chat = set(named), chat
        self._id_of_rank = np.asarray(id_of_rank, dtype=np.int64)
        self._bytes = {int(self._id_of_rank[r]): encoding.decode_single_token_bytes(r) for r in range(len(id_of_rank))}
        self._bytes.update(spare or {})
        self.vocab_size = max([*self._bytes, *specials.values()]) + 1
        self.mask_id, self.eos_id, self.bos_id, self.eot_id = (specials[r] for r in ('mask', 'eos', 'bos', 'eot'))
        self.pad_id = specials.get('pad', self.eos_id)
        self._names = {i: SPECIALS.get(role, f'<|{role}|>') for role, i in specials.items()}

    def encode(self, text):
        """The ids of a text, list of int. Names of special tokens typed by a user are text like any other."""
        ranks = []
        while text:
            piece, text = _split_long(text)
            ranks += self.encoding.encode(piece, disallowed_special=())     # encode_ordinary aborts where this raises
        return self._id_of_rank[ranks].tolist() if ranks else []

    def decode_bytes(self, ids):
        """The exact bytes of ids; ids that stand for no token are written out as <|id|>."""
        return b''.join(self._bytes[i] if i in self._bytes else self._names.get(i, f'<|{i}|>').encode()
                        for i in map(int, ids))

    def decode(self, ids):
        """Text of ids; half a character becomes U+FFFD."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def encode_chat(self, messages):
        """Ids of a conversation, ready for the assistant's turn: [{'role', 'content'}, ...] (LLaDA's template).

        ValueError if the vocabulary came with another template, or with none and without the tokens for this one.
        """
        if self.chat is None:
            raise ValueError(f'{self.spec}: its chat template is not one of the two known here (LLaDA as released, and '
                             'as in its guideline); make the ids elsewhere and give them in a prompt file as {"ids"}')
        s, ids = self.specials, [self.bos_id]
        if self.bos_id is None:
            raise ValueError(f'{self.spec}: a conversation begins with BOS, and no file tells its id')
        for message in [*messages, {'role': 'assistant', 'content': None}]:
            ids += [s['start_header'], *self.encode(message['role']), s['end_header'], *self.encode(self.chat)]
            if message['content'] is not None:
                ids += [*self.encode(message['content'].strip()), s['eot']]
        return ids

    def unused(self, vocab_size):
        """The ids below vocab_size that stand for no token: rows of a head that nothing was trained to write."""
        return [i for i in range(vocab_size) if i not in self._bytes and i not in self._names]


def _split_long(text):
    """(first piece, rest): long texts are cut before a space between two letters, where every pattern has a border."""
    if len(text) <= LONGEST_PIECE:
        return text, ''
    for i in range(LONGEST_PIECE, LONGEST_PIECE // 2, -1):
        if text[i] == ' ' and text[i - 1].isalpha() and text[i + 1:i + 2].isalpha():
            return text[:i], text[i:]
    return text[:LONGEST_PIECE], text[LONGEST_PIECE:]


def get_tokenizer(spec):
    """'bytes', a tiktoken name ('gpt2', 'o200k_base'), or the path of a byte-level BPE tokenizer.json -> Tokenizer.

    Special tokens that a vocabulary lacks are given the next free ids. Raises ValueError for what cannot be read
    without loss, FileNotFoundError for a missing file.
    """
    spec = str(spec)
    if spec == 'bytes':
        ranks = {bytes([b]): b for b in range(256)}
        encoding = tiktoken.Encoding('bytes', pat_str=r'[\s\S]', special_tokens={}, mergeable_ranks=ranks)
        return Tokenizer(encoding, range(256), _specials({}, 256)[0], spec)
    if spec.endswith('.json'):
        return _hugging_face_tokenizer(Path(spec))
    if spec not in tiktoken.list_encoding_names():
        names = ', '.join(tiktoken.list_encoding_names())
        raise ValueError(f"tokenizer must be 'bytes', a tokenizer.json or one of {names}; got {spec!r}")
    full = tiktoken.get_encoding(spec)
    ordered = sorted(full._mergeable_ranks, key=full._mergeable_ranks.get)          # ranks are ids, and may have gaps
    plain = tiktoken.Encoding(spec, pat_str=full._pat_str, special_tokens={},
                              mergeable_ranks={token: i for i, token in enumerate(ordered)})
    ids = [full._mergeable_ranks[token] for token in ordered]
    specials, named = _specials(full._special_tokens, full.n_vocab)
    return Tokenizer(plain, ids, specials, spec, {i: name.encode() for name, i in full._special_tokens.items()}, named)


def _specials(names, next_id, told=None):
    """role -> id for every role of SPECIALS: by name where the vocabulary has it, else the next free id; and who has.

    told: role -> the name that a tokenizer_config.json gives it; it wins over the usual names.
    """
    ids, named, told = {}, set(), told or {}
    for role in dict.fromkeys((*SPECIALS, *told)):
        usual = (told.get(role), SPECIALS.get(role), *ALIASES.get(role, ()))
        found = [names[n] for n in usual if n in names]
        if found or role in SPECIALS:
            ids[role] = found[0] if found else next_id
            next_id += not found
            named |= {role} if found else set()
    return ids, named


def tokenizer_for(meta, mask_id=None):
    """The tokenizer that belongs to loaded weights (meta of model.load_model), with the special ids that they name.

    mask_id: say it where neither the weights nor their tokenizer do. Raises ValueError where the two disagree.
    """
    where = meta['folder']
    if meta['tokenizer'] is None:
        raise ValueError(f'{where}: no tokenizer.json beside the weights')
    tok, released = get_tokenizer(meta['tokenizer']), meta['config'] is None
    for role in ROLES:
        told = mask_id if role == 'mask' and mask_id is not None else meta.get(f'{role}_id')
        ours = tok.specials.get(role) if role in tok.named or not released else None
        if role == 'mask' and mask_id is not None and meta['mask_id'] not in (None, mask_id):
            raise ValueError(f"{where}: the weights say mask is {meta['mask_id']}, you say {mask_id}")
        if told is not None and ours is not None and told != ours and not (role == 'mask' and mask_id is not None):
            raise ValueError(f'{where}: the weights say {role} is {told}, the tokenizer says {ours}')
        if told is None and ours is None and role in ('mask', 'eos'):
            raise ValueError(f'{where}: neither config.json nor the tokenizer say which id is {role}')
        told = ours if told is None else told
        setattr(tok, f'{role}_id', told)
        if told is not None:
            tok.specials[role] = told
    tok.pad_id = tok.eos_id if tok.pad_id is None else tok.pad_id
    tok._names = {i: SPECIALS.get(role, f'<|{role}|>') for role, i in tok.specials.items()
                  if not released or role in tok.named or i == getattr(tok, f'{role}_id', None)}
    if released and not {'start_header', 'end_header', 'eot'} <= tok.named:
        tok.chat = None                                             # never ids that merely come next
    return tok


def byte_symbols():
    """GPT-2's printable character for each byte, as tokenizer.json files spell their tokens: list of 256 str."""
    keep = {*range(33, 127), *range(161, 173), *range(174, 256)}
    odd = iter(range(256, 512))
    return [chr(b) if b in keep else chr(next(odd)) for b in range(256)]


def _hugging_face_tokenizer(path):
    """A Hugging Face byte-level BPE file as a Tokenizer, without loss, or a ValueError naming what stands in the way.

    tiktoken merges by rank, so the rank must be the position in the merge list, never the id; a table maps it back.
    """
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such tokenizer file')

    def demand(condition, what):
        if not condition:
            raise ValueError(f'{path}: cannot be converted without loss: {what}')

    try:
        file = json.loads(path.read_text(encoding='utf-8'))
        model, added = file['model'], file.get('added_tokens') or []
        vocab, merges = model['vocab'], [m.split(' ') if isinstance(m, str) else m for m in model['merges']]
        return _convert_bpe(path, file, model, added, vocab, merges, demand)
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError, OverflowError) as e:
        raise ValueError(f'{path}: not a tokenizer.json with a BPE model ({type(e).__name__}: {e})') from None


def _tokenizer_config(path):
    """What the tokenizer_config.json beside a tokenizer.json says: (role -> token name, name -> id, chat template)."""
    path = path.with_name('tokenizer_config.json')
    if not path.is_file():
        return {}, {}, None
    try:
        file = json.loads(path.read_text(encoding='utf-8'))
        told = {role: file.get(f'{role}_token') for role in ROLES}
        told = {role: name['content'] if isinstance(name, dict) else name for role, name in told.items() if name}
        names = {token['content']: int(i) for i, token in (file.get('added_tokens_decoder') or {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f'{path}: not a tokenizer configuration ({type(e).__name__}: {e})') from None
    return told, names, str(file.get('chat_template') or '')


def _chat_format(template, named):
    """What stands between header and message in a template; None if it is not one of CHAT_FORMATS."""
    if not template:                        # our own file, or a release without a template whose tokens are all there
        return '\n\n' if template is None or {'start_header', 'end_header', 'eot'} <= named else None
    if 'bos_token' not in template:
        return None
    texts = {(a or b).replace('\\n', '\n') for a, b in re.findall(r"'([^']*)'|\"([^\"]*)\"", template)}
    return next((gap for gap, parts in CHAT_FORMATS.items() if parts <= texts <= parts | {'role', 'content', ''}), None)


def _convert_bpe(path, file, model, added, vocab, merges, demand):
    demand(model.get('type', 'BPE') == 'BPE', f"model type {model.get('type')}")
    for key in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix', 'byte_fallback'):
        demand(not model.get(key), f'{key} is {model.get(key)!r}')
    demand(not file.get('normalizer'), f"it has a normalizer ({(file.get('normalizer') or {}).get('type')})")
    pattern = _pre_tokenizer_pattern(file.get('pre_tokenizer'), demand)

    byte_of = {symbol: b for b, symbol in enumerate(byte_symbols())}
    told, names, template = _tokenizer_config(path)
    names = {**names, **{a['content']: a['id'] for a in added}}
    raw = {t: bytes(byte_of[c] for c in t) for t in vocab if t not in names and all(c in byte_of for c in t)}
    odd = [t for t in vocab if t not in raw and t not in names]
    demand(not odd, f'token {odd[:1]} is not spelled in bytes')
    lacking = [s for s in byte_of if s not in raw]
    demand(not lacking, f'{len(lacking)} of the 256 single bytes have no token')
    ids = [*(vocab[t] for t in raw), *names.values()]
    demand(all(type(i) is int and 0 <= i < 2 ** 31 for i in ids), 'an id is not a whole number below 2^31')
    demand(len(set(ids)) == len(ids), 'two tokens share an id')
    plain = [a['content'] for a in added if not a.get('special')]
    demand(not plain, f'added token {plain[:1]} is matched in plain text')

    ranks = {bytes([b]): b for b in range(256)}                     # never compete with each other: any order will do
    id_of_rank = [vocab[s] for s in byte_symbols()]
    for pair in merges:
        demand(len(pair) == 2 and pair[0] in raw and pair[1] in raw and ''.join(pair) in raw,
               f'merge {pair} has no token')
        merged = ''.join(pair)
        demand(raw[merged] not in ranks, f'two merges make the token {merged!r}')
        ranks[raw[merged]] = len(id_of_rank)
        id_of_rank.append(vocab[merged])
    for pair in merges:                                             # tiktoken joins any two pieces that make a token,
        a, b = raw[pair[0]], raw[pair[1]]                           # Hugging Face these two only: the same if the
        demand(_last_pair(a + b, ranks) == (a, b), f'merge {pair} is not how its token is reached')     # token ends so
    loose = {vocab[t]: b for t, b in raw.items() if b not in ranks}    # without merges they are never made: decode only
    demand(not (loose and model.get('ignore_merges')), f'ignore_merges with {len(loose)} tokens that no merge makes')
    encoding = tiktoken.Encoding(path.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    loose.update({i: name.encode() for name, i in names.items()})
    specials, named = _specials(names, max(ids) + 1, told)
    return Tokenizer(encoding, id_of_rank, specials, path, loose, named, _chat_format(template, named))


def _last_pair(token, ranks):
    """The two pieces that byte-pair encoding joins last when it spells a token from its bytes."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        i = pairs.index(min(pairs))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def _pre_tokenizer_pattern(pre, demand):
    """The splitting pattern of a pre_tokenizer entry: a lone ByteLevel (GPT-2's), or Split by regex, then ByteLevel."""
    steps = pre.get('pretokenizers', []) if pre and pre.get('type') == 'Sequence' else [pre or {}]
    kinds = [s.get('type') for s in steps]
    demand(kinds in (['ByteLevel'], ['Split', 'ByteLevel']), f'pre-tokenizer {kinds}')
    demand(not steps[-1].get('add_prefix_space', True), 'add_prefix_space')
    if len(steps) == 1:
        demand(steps[0].get('use_regex', True), 'ByteLevel without a regex')
        return GPT2_PATTERN
    split = steps[0]
    demand(not steps[1].get('use_regex', True), 'Split and ByteLevel both split')
    demand(split.get('behavior') == 'Isolated' and not split.get('invert'), f"Split is {split.get('behavior')}")
    demand((split.get('pattern') or {}).get('Regex'), 'Split without a regex')
    return split['pattern']['Regex']


def train_bpe(text, n_merges):
    """Byte-pair encoding on word counts: -> list of (bytes, bytes) merges, most frequent pair first."""
    import regex  # comes with tiktoken
    words = Counter(regex.findall(PATTERN, text))
    spelled = [[bytes([b]) for b in w.encode()] for w in words]
    counts, pairs, where = list(words.values()), Counter(), defaultdict(set)
    for i, word in enumerate(spelled):
        for pair in zip(word, word[1:]):
            pairs[pair] += counts[i]
            where[pair].add(i)
    merges = []
    for _ in tqdm(range(n_merges), desc='learning merges', disable=None, leave=False):
        best = max(pairs, key=lambda p: (pairs[p], p), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        for i in list(where[best]):
            word, new = spelled[i], []
            for pair in zip(word, word[1:]):
                pairs[pair] -= counts[i]
                where[pair].discard(i)
            for piece in word:
                glue = new and (new[-1], piece) == best
                new[-1:] = [best[0] + best[1]] if glue else new[-1:] + [piece]
            # `a a a` must merge once, from the left: a fresh `aa` is longer than best[0], so it never glues again
            spelled[i] = new
            for pair in zip(new, new[1:]):
                pairs[pair] += counts[i]
                where[pair].add(i)
        pairs = +pairs                                              # drops pairs that are gone
    return merges


def save_bpe(path, merges):
    """Writes merges as a Hugging Face tokenizer.json: the same file serves get_tokenizer and other programs."""
    symbol = byte_symbols()
    spell = lambda raw: ''.join(symbol[b] for b in raw)             # noqa: E731
    tokens = [*symbol, *(spell(a + b) for a, b in merges)]
    added = [{'id': len(tokens) + i, 'content': name, 'single_word': False, 'lstrip': False, 'rstrip': False,
              'normalized': False, 'special': True} for i, name in enumerate(SPECIALS.values())]
    file = {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added, 'normalizer': None,
            'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [
                {'type': 'Split', 'pattern': {'Regex': PATTERN}, 'behavior': 'Isolated', 'invert': False},
                {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}]},
            'post_processor': None,
            'decoder': {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False},
            'model': {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
                      'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': False,
                      'vocab': {t: i for i, t in enumerate(tokens)},
                      'merges': [[spell(a), spell(b)] for a, b in merges]}}
    Path(path).write_text(json.dumps(file, ensure_ascii=False, indent=0), encoding='utf-8')


# ---------------------------------------------------------------------------------------------------------------------
# Sources of text: (document, text) pieces of a few kB; pieces of one document follow each other


def docs_text():
    """Real text that every Python carries: the language reference of pydoc and the docstrings of the standard library.

    The modules are parsed, never imported, and a paragraph that came before is dropped. About a megabyte; it
    changes a little with the Python version.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:                                             # a stripped-down Python
        topics = {}
    skip = {'test', 'tests', 'idlelib', 'lib2to3', 'turtledemo', 'pydoc_data', 'site-packages', 'turtle.py', 'tkinter',
            'encodings'}
    root = Path(sysconfig.get_paths()['stdlib'])
    files = sorted([*root.glob('*.py'), *root.glob('*/*.py')])
    files = [f for f in files if not skip & set(f.relative_to(root).parts)
             and not f.relative_to(root).parts[0].startswith('_')]
    texts = [('language', '\n\n'.join(topics[name] for name in sorted(topics)))]
    for f in tqdm(files, desc='reading docstrings', disable=None, leave=False):
        try:
            tree = ast.parse(f.read_text(encoding='utf-8'))
        except (SyntaxError, ValueError, OSError):
            continue                                                # a module that this Python cannot read has no docs
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docs = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
        texts.append((f.name, '\n\n'.join(d for d in docs if d)))
    seen = set()
    for name, text in texts:
        fresh = [p.strip('\n') for p in text.split('\n\n')
                 if p.strip() and not (p.strip() in seen or seen.add(p.strip()))]
        if fresh:
            yield name, '\n\n'.join(fresh) + '\n'


def shakespeare_text():
    """The 1.1 MB of tiny Shakespeare, downloaded once and checked."""
    url = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
    path = Path(torch.hub.get_dir()) / 'tinyshakespeare.txt'
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        sha256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except Exception as e:                                      # urllib raises a dozen kinds
            raise OSError(f'could not download {url} ({e}); '
                          'get the file by other means and pass it with --input=FILE') from None
    yield from file_text(path)


def file_text(path):
    """The documents of a file: .txt is one, in pieces; .jsonl(.gz) has one a line and .parquet one a row, in "text".

    Reads as it goes; errors name the file and the line.
    """
    path = Path(path)
    kind = ''.join(path.suffixes[-2:] if path.suffix == '.gz' else path.suffixes[-1:])
    if kind not in ('.txt', '.jsonl', '.jsonl.gz', '.parquet'):
        raise ValueError(f'{path}: input must be .txt, .jsonl, .jsonl.gz or .parquet')
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such file')
    found, held, size = False, [], 0
    for number, raw in enumerate((_parquet_rows if kind == '.parquet' else _lines)(path), 1):
        try:
            text = raw if kind == '.parquet' else raw.decode('utf-8-sig' if number == 1 or kind != '.txt' else 'utf-8')
            if kind.startswith('.jsonl') and text.strip():
                text = json.loads(text)['text']
            if not isinstance(text, str):
                raise TypeError('text is not a string')
            text.encode()                                           # half a surrogate pair is no text
        except UnicodeDecodeError as e:
            raise ValueError(f'{path}:{number}: not UTF-8 (byte {e.start} of the line)') from None
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise ValueError(f'{path}:{number}: want a JSON object with "text" ({type(e).__name__}: {e})') from None
        found = found or bool(text.strip())
        if kind != '.txt' and text.strip():
            yield f'{path.name}:{number}', text
        elif kind == '.txt':
            held, size = [*held, text], size + len(text)
            if size > 1 << 16:
                yield path.name, ''.join(held)
                held, size = [], 0
    if held:
        yield path.name, ''.join(held)
    if not found:
        raise ValueError(f'{path}: no text in it')


def _lines(path):
    try:
        with (gzip.open if path.suffix == '.gz' else open)(path, 'rb') as f:
            yield from f
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise ValueError(f'{path}: not a complete gzip file ({e})') from None


def _parquet_rows(path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f'{path}: .parquet needs one more package: pip install pyarrow') from None
    try:
        for part in pyarrow.parquet.ParquetFile(path).iter_batches(columns=['text']):
            yield from part.column(0).to_pylist()
    except pyarrow.ArrowException as e:
        raise ValueError(f'{path}: not a parquet file with a column "text" ({str(e).splitlines()[0][:100]})') from None


DATASETS = {                # name -> (documents, default tokenizer, what it is)
    'docs': (docs_text, 'bpe-2048', 'documentation that every Python carries, about 1 MB; needs no network'),
    'shakespeare': (shakespeare_text, 'bpe-1024', 'tiny Shakespeare, 1.1 MB; downloaded, or --input=input.txt'),
}

# ---------------------------------------------------------------------------------------------------------------------
# Preparation: documents -> chunks -> shards


def chunks(documents, size=4096):
    """Cuts documents at line ends into pieces of about `size` characters: -> (document name, text)."""
    for name, text in documents:
        start = 0
        while start < len(text):
            end = text.find('\n', start + size, start + 2 * size) + 1 or text.find(' ', start + size, start + 2 * size)
            end = end if end > 0 else start + 2 * size                # a wall of text is cut where it stands
            yield name, text[start:end]
            start = end


def prepare(documents, out, tokenizer, *, val_every=10, workers=1):
    """Tokenizes (name, text) documents, or a list of paths of files, into the folder `out`, whole or not at all.

    Every val_every-th piece of about 4 kB is held out: a tail split would share long passages with the rest. An EOS
    ends each document, and stands wherever a held-out piece was taken from between its neighbours.
    tokenizer: a spec of get_tokenizer, or 'bpe-N' to learn a vocabulary of N entries from the training pieces.
    Files are done side by side by `workers` processes; after an interruption or an error the same call takes up what is
    finished. Returns the manifest.
    """
    out, documents = Path(out).absolute(), list(documents)
    files = bool(documents) and isinstance(documents[0], (str, Path))
    sources = [Path(f) for f in documents] if files else [documents]
    if out.exists() and not (out.is_dir() and ((out / 'manifest.json').is_file() or not any(out.iterdir()))):
        raise ValueError(f'{out}: something else is here; choose another --out')
    for source in sources if files else ():
        next(file_text(source))                                     # missing, wrong kind, broken at once: said now
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f'.{out.name}.unfinished')
    if not files:                                                   # nothing to take up: a place of its own
        aside = Path(tempfile.mkdtemp(prefix=f'.{out.name}.', dir=out.parent))
    aside.mkdir(exist_ok=True)
    try:
        spec = _place_tokenizer(tokenizer, aside, sources, val_every)
        jobs = [(source, aside, i, spec, val_every) for i, source in enumerate(sources)]
        return _finish(_run_jobs(jobs, workers), aside, out, spec, val_every)
    except BaseException:
        if not any(aside.glob('part_*.json')) or not files:         # finished files are kept: mend, and go on
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _place_tokenizer(tokenizer, folder, sources, val_every):
    """Learns or copies the tokenizer into the folder, if it has a file -> what the manifest calls it."""
    if tokenizer.startswith('bpe-'):
        n = int(tokenizer[4:]) if tokenizer[4:].isdecimal() else 0
        if not 256 + len(SPECIALS) <= n <= 65536:
            raise ValueError(f'tokenizer bpe-N: N must lie between {256 + len(SPECIALS)} and 65536, '
                             f'got {tokenizer[4:]!r}')
        sample, size = [], 0
        for i, (_, text) in enumerate(chunks(d for s in sources for d in _documents(s))):
            if i % val_every != val_every - 1:
                sample.append(text)
                size += len(text)
            if size > 50_000_000:                                   # enough to learn words from
                break
        save_bpe(folder / 'tokenizer.json', train_bpe('\n'.join(sample), n - 256 - len(SPECIALS)))
        return 'tokenizer.json'
    get_tokenizer(tokenizer)                                        # refuse before copying
    if tokenizer.endswith('.json'):
        shutil.copyfile(tokenizer, folder / 'tokenizer.json')
        return 'tokenizer.json'
    return tokenizer


def _documents(source):
    return file_text(source) if isinstance(source, Path) else source


def _run_jobs(jobs, workers):
    """_write_part for all jobs, in this process or several -> entries of the manifest, in order."""
    bar = dict(desc='tokenizing', total=len(jobs), unit='file', disable=None if len(jobs) > 1 else True, leave=False)
    if min(workers, len(jobs)) < 2:
        return list(tqdm(map(_write_part, jobs), **bar))
    ignore = (signal.SIGINT, signal.SIG_IGN)                        # Ctrl-C is for this process, which ends the others
    with multiprocessing.get_context('spawn').Pool(min(workers, len(jobs)), signal.signal, ignore) as pool:
        return list(tqdm(pool.imap(_write_part, jobs), **bar))


def _write_part(job):
    """Tokenizes one source to a shard for each split -> {split: {'file', 'tokens', 'bytes', 'sha256'}}."""
    source, folder, number, spec, val_every = job
    tok = get_tokenizer(folder / spec if spec.endswith('.json') else spec)
    made_from = [str(source), source.stat().st_size, source.stat().st_mtime_ns, val_every,
                 _sha256(folder / spec) if spec.endswith('.json') else spec] if isinstance(source, Path) else None
    done = folder / f'part_{number:05d}.json'
    if made_from and done.is_file():
        before = json.loads(done.read_text(encoding='utf-8'))
        if before['made_from'] == made_from:
            return before
    entry = {split: {'file': f'{split}_{number:05d}.bin', 'tokens': 0, 'bytes': 0} for split in ('train', 'val')}
    last = None
    with (folder / entry['train']['file']).open('wb') as train, (folder / entry['val']['file']).open('wb') as val:
        def put(split, ids, n_bytes=0):
            (train if split == 'train' else val).write(np.array(ids, dtype=_dtype(tok)).tobytes())
            entry[split]['tokens'] += len(ids)
            entry[split]['bytes'] += n_bytes

        for i, (name, text) in enumerate(tqdm(chunks(_documents(source)), desc='tokenizing', leave=False,
                                              disable=None if number == 0 else True)):
            split = 'val' if (i + number) % val_every == val_every - 1 else 'train'
            if last not in (None, (name, split)):
                put(last[1], [tok.eos_id])
            put(split, tok.encode(text), len(text.encode()))
            last = name, split
        if last:
            put(last[1], [tok.eos_id])
    for e in entry.values():
        e['sha256'] = _sha256(folder / e['file'])
    done.with_suffix('.tmp').write_text(json.dumps({**entry, 'made_from': made_from}), encoding='utf-8')
    os.replace(done.with_suffix('.tmp'), done)
    return entry


def _dtype(tok):
    return 'uint16' if tok.vocab_size <= 2 ** 16 else 'uint32'      # uint16 would wrap 126336 to 60800 without a word


def _sha256(path):
    return hashlib.sha256(np.memmap(path, np.uint8, 'r') if path.stat().st_size else b'').hexdigest()


def _finish(parts, aside, out, spec, val_every):
    """Writes the manifest, which ends the work, and moves the folder to its place -> the manifest."""
    tok = get_tokenizer(aside / spec if spec.endswith('.json') else spec)
    manifest = {'version': 1, 'dtype': _dtype(tok), 'vocab_size': tok.vocab_size, 'tokenizer': spec, 'splits': {}}
    for split in ('train', 'val'):
        shards = [part[split] for part in parts if part[split]['tokens']]
        total = {key: sum(shard[key] for shard in shards) for key in ('tokens', 'bytes')}
        if not shards:
            raise ValueError(f'{out.name}: too little text: of its pieces of 4 kB every {val_every}th is held out, '
                             f'and none is left for {split}')
        manifest['splits'][split] = {'shards': shards, **total}
    (aside / 'manifest.json').write_text(json.dumps(manifest, indent=1), encoding='utf-8')
    named = {shard['file'] for split in manifest['splits'].values() for shard in split['shards']}
    for leftover in (f for f in aside.iterdir() if f.suffix == '.bin' and f.name not in named or f.match('part_*')):
        leftover.unlink()
    aside.chmod(0o755)
    old = aside.with_name(aside.name + '.old')
    if out.exists():
        os.replace(out, old)                                        # replaced, never missing for long
    os.replace(aside, out)
    shutil.rmtree(old, ignore_errors=True)
    return manifest


# ---------------------------------------------------------------------------------------------------------------------
# Loading: windows of a memory-mapped split, chosen by a number


def open_dataset(name, verify=True):
    """The corpus of a name, folder or mixture 'a:0.7,b:0.3'; `docs`, which needs no network, is made on first use.

    A mixture is a Corpus with parts: of every 1000 windows each gives its share, in an order that is always the same.
    """
    if (',' in name or ':' in name) and not Path(name).is_dir():
        return _mixture(name, verify)
    folder = Path(name) if (Path(name) / 'manifest.json').is_file() or '/' in name else Path('data') / name
    if name == 'docs' and not (folder / 'manifest.json').is_file():
        print('preparing data/docs (once): the documentation that this Python carries')
        documents, tokenizer, _ = DATASETS['docs']
        try:
            prepare(documents(), folder, tokenizer)
        except OSError:
            if not (folder / 'manifest.json').is_file():            # unless another process was faster
                raise
    return open_corpus(folder, verify)


def _mixture(text, verify):
    try:
        names, weights = zip(*((part.rpartition(':')[0].strip(), float(part.rpartition(':')[2]))
                               for part in text.split(',')))
        if not all(names) or not all(0 < w < math.inf for w in weights):
            raise ValueError
    except ValueError:
        raise ValueError(f'dataset: a mixture is written name:weight,name:weight, with weights above 0; got {text!r}'
                         ) from None
    parts = [open_dataset(name, verify) for name in names]
    first, weights = parts[0].manifest, np.array(weights) / sum(weights)
    made = [(c.folder / c.manifest['tokenizer']).read_bytes() if c.manifest['tokenizer'].endswith('.json') else
            c.manifest['tokenizer'] for c in parts]
    for c, tokenizer in zip(parts, made):
        if tokenizer != made[0]:
            raise ValueError(f'dataset: {c.folder} and {parts[0].folder} were made with different tokenizers')
    share = np.floor(weights * 1000).astype(int)
    share[np.argsort(share - weights * 1000)[:1000 - share.sum()]] += 1             # the largest remainders round up
    if share.min() == 0:
        raise ValueError(f'dataset: a weight in {text!r} is less than a thousandth of the whole')
    turns = np.random.Generator(np.random.Philox(key=[0, 0])).permutation(np.repeat(np.arange(len(parts)), share))
    splits = {split: {'tokens': 1, 'bytes': float(sum(w * bytes_per_token(c, split) for w, c in zip(weights, parts)))}
              for split in ('train', 'val')}
    return Corpus(parts[0].folder, {**first, 'splits': splits}, {}, parts, turns)


def open_corpus(folder, verify=True):
    """Opens a prepared folder and checks it: sizes always, checksums unless verify is off -> Corpus.

    verify may be (k, n): check every n-th shard, from the k-th; n processes share the work.
    """
    folder = Path(folder)
    path = folder / 'manifest.json'
    if not path.is_file():
        known = f'; run: python data.py {folder.name}' if folder.name in DATASETS else \
            '; run: python data.py --input=FILE --out=' + str(folder)
        raise FileNotFoundError(f'{folder}: no data set here{known}')
    try:
        manifest = json.loads(path.read_text(encoding='utf-8'))
        splits, spec, dtype = {}, manifest['tokenizer'], {'uint16': np.uint16, 'uint32': np.uint32}[manifest['dtype']]
        if not 0 < manifest['vocab_size'] < 2 ** 31 or spec.endswith('.json') and spec != 'tokenizer.json':
            raise KeyError('vocab_size or tokenizer')
        for split in ('train', 'val'):
            entry = manifest['splits'][split]
            if not (entry['bytes'] > 0 and entry['tokens'] == sum(s['tokens'] for s in entry['shards']) > 0):
                raise KeyError(f'counts of {split}')
            k, n = verify if isinstance(verify, tuple) else (0, 1)
            splits[split] = [_open_shard(folder / Path(s['file']).name, np.dtype(dtype), s, verify and i % n == k,
                                         manifest['vocab_size']) for i, s in enumerate(entry['shards'])]
    except (KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ValueError(f'{path}: not a manifest ({type(e).__name__}: {e})') from None
    return Corpus(folder, manifest, splits)


def _open_shard(path, dtype, entry, verify, vocab_size):
    size, want = path.stat().st_size if path.exists() else -1, entry['tokens'] * dtype.itemsize
    if size != want:
        raise ValueError(f'{path}: {"missing" if size < 0 else f"{size} bytes"}, the manifest says {want}; '
                         'prepare the data again')
    shard = np.memmap(path, dtype=dtype, mode='r')
    if verify and _sha256(path) != entry['sha256']:
        raise ValueError(f'{path}: damaged (its sha256 is not the one in the manifest); prepare the data again')
    if verify and shard.max() >= vocab_size:
        at = int(shard.argmax())
        raise ValueError(f'{path}: token {shard[at]} at {at}, but the vocabulary ends at {vocab_size - 1}')
    return shard


def corpus_tokenizer(corpus):
    """The tokenizer that made a corpus."""
    spec = corpus.manifest['tokenizer']
    return get_tokenizer(corpus.folder / spec if spec.endswith('.json') else spec)


def bytes_per_token(corpus, split='val'):
    """Bytes of text per token of a split: turns nats per token into bits per byte."""
    entry = corpus.manifest['splits'][split]
    return entry['bytes'] / entry['tokens']


def read_window(corpus, split, start, length):
    """Tokens start .. start+length of a split, as if its shards were one array: (length,) int64."""
    parts = []
    for shard in corpus.splits[split]:
        if length and start < len(shard):
            parts.append(np.asarray(shard[start:start + length], dtype=np.int64))
            length -= len(parts[-1])
            start += len(parts[-1])
        start -= len(shard)
    window = np.concatenate(parts)
    if window.max() >= corpus.manifest['vocab_size']:
        raise ValueError(f'{corpus.folder}: token {window.max()} in split {split}, '
                         f"but the vocabulary ends at {corpus.manifest['vocab_size'] - 1}")
    return window


def shuffled(index, n, key):
    """Where a pseudo-random permutation of range(n) sends index: O(1) memory, Feistel network over 4^k >= n values."""
    half = max(1, (n - 1).bit_length() + 1 >> 1)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for k in key:
            scrambled = (right ^ k) * 0x9E3779B97F4A7C15 % 2 ** 64
            scrambled = (scrambled ^ scrambled >> 29) * 0xBF58476D1CE4E5B9 % 2 ** 64
            left, right = right, left ^ (scrambled >> 32) & low
        index = left << half | right
        if index < n:                                               # outside: walk the cycle until it comes back
            return index


def draw_cuts(seed, iteration, n, seq_len, random_length=0.0, random_split=0.0):
    """Where the n windows of an iteration are cut, (n,) int64; a function of (seed, iteration) like all noise.

    0: nowhere. Negative (with chance random_length; LLaDA: 1 %): only that many tokens are kept, uniform on 1..seq_len.
    Positive (with chance random_split; iLLaDA: 30 %): the window is two segments with a border there.
    """
    u = np.random.Generator(np.random.Philox(key=[seed, 2 ** 62 + iteration])).random((n, 2))
    keep, border = 1 + (u[:, 1] * seq_len).astype(np.int64), 1 + (u[:, 1] * (seq_len - 1)).astype(np.int64)
    return np.where(u[:, 0] < random_length, -keep, np.where(u[:, 0] < random_length + random_split, border, 0))


def _window(corpus, split, sample, seq_len, seed):
    """Window number `sample` of an endless, shuffled stream: (seq_len,) int64."""
    if corpus.parts:
        turn, slot = divmod(sample, len(corpus.turns))
        which = corpus.turns[slot]
        number = turn * int((corpus.turns == which).sum()) + int((corpus.turns[:slot] == which).sum())
        return _window(corpus.parts[which], split, number, seq_len, seed)
    total = sum(len(s) for s in corpus.splits[split])
    if total < seq_len:
        raise ValueError(f'{corpus.folder}: split {split} has {total} tokens, too few for a window of {seq_len}')
    n = max(1, (total - seq_len + 1) // seq_len)                    # windows that fit behind any offset
    epoch, index = divmod(sample, n)
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    offset = int(rng.integers(min(seq_len, total - n * seq_len + 1)))
    key = [int(k) for k in rng.integers(2 ** 63, size=4)]
    return read_window(corpus, split, offset + shuffled(index, n, key) * seq_len, seq_len)


def batch(corpus, split, rows, seq_len, seed=0, cuts=None):
    """Windows for global sample numbers `rows` (iteration * global batch + row of the batch) -> Batch.

    Every window of the split is drawn once per epoch, in an order and with a starting offset that are the epoch's own.
    cuts: one number for each row, see draw_cuts; what is cut off is not maskable, and out of sight of the rest.
    """
    x0 = torch.from_numpy(np.stack([_window(corpus, split, int(row), seq_len, seed) for row in rows]))
    maskable, cu_seqlens = torch.ones_like(x0, dtype=torch.bool), None
    if cuts is not None and any(cuts):
        borders = {*range(0, x0.numel() + 1, seq_len), *(i * seq_len + abs(int(c)) for i, c in enumerate(cuts))}
        borders = sorted(borders) + [x0.numel()] * (2 * len(rows) + 1 - len(borders))       # one shape: one graph
        cu_seqlens = torch.tensor(borders, dtype=torch.int32)
        maskable = torch.arange(seq_len) < torch.tensor([-int(c) if c < 0 else seq_len for c in cuts])[:, None]
    return Batch(x0, maskable, cu_seqlens)


def all_windows(corpus, split, seq_len, limit=None):
    """The split as consecutive windows, in order, less a last partial one: x0 (n, T) int64; `limit` of them, evenly."""
    if corpus.parts:
        share = [max(1, round((limit or 1000) * (corpus.turns == i).mean())) for i in range(len(corpus.parts))]
        return torch.cat([all_windows(c, split, seq_len, k) for c, k in zip(corpus.parts, share)])
    n = sum(len(s) for s in corpus.splits[split]) // seq_len
    if n < 1:
        raise ValueError(f'{corpus.folder}: split {split} is too short for a window of {seq_len} tokens')
    chosen = range(n) if limit is None or limit >= n else [i * n // limit for i in range(limit)]
    return torch.from_numpy(np.stack([read_window(corpus, split, i * seq_len, seq_len) for i in chosen]))


# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(
        description='Tokenizes text into data/NAME.', formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='data sets:\n' + '\n'.join(f'  {n:<12} {d[2]}' for n, d in DATASETS.items()))
    parser.error = lambda message: sys.exit(print(f'data.py: {message}', file=sys.stderr) or 2)
    parser.add_argument('name', nargs='?', help='a data set from the list below')
    parser.add_argument('--input', help='.txt, .jsonl(.gz) or .parquet files or patterns, separated by commas')
    parser.add_argument('--out', help='folder to write (default data/NAME)')
    parser.add_argument('--tokenizer', help="'bytes', bpe-N (learned here), a tiktoken name, or a tokenizer.json "
                                            '(default bpe-1024)')
    parser.add_argument('--workers', type=int, default=os.cpu_count() or 1, help='processes, for several files')
    parser.add_argument('--val_every', type=int, default=10, help='hold out every N-th piece of 4 kB (default 10)')
    args = parser.parse_args(argv)
    if not args.name and args.input is None:
        return parser.print_help()
    try:
        if args.name and args.name not in DATASETS:
            raise ValueError(f"no data set {args.name!r}; there are {', '.join(DATASETS)}; "
                             'for your own files: --input=FILE --out=data/my')
        if args.input is not None:
            documents = [f for name in args.input.split(',') for f in sorted(glob.glob(name)) or [name]]
            if not (args.out or args.name):
                raise ValueError('--input needs --out=FOLDER')
        else:
            documents = DATASETS[args.name][0]()
        if args.val_every < 2 or args.workers < 1:
            raise ValueError('--val_every must be 2 or more and --workers 1 or more, '
                             f'got {args.val_every} and {args.workers}')
        out = args.out or f'data/{args.name}'
        default = DATASETS[args.name][1] if args.name else 'bpe-1024'
        manifest = prepare(documents, out, args.tokenizer or default, val_every=args.val_every,
                           workers=args.workers)
    except (ValueError, OSError) as e:
        print(f'data.py: {e}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('data.py: interrupted; the same command goes on with the files that are left', file=sys.stderr)
        sys.exit(130)
    for split, entry in manifest['splits'].items():
        print(f"{out}/{split}: {entry['tokens']:,} tokens, {entry['bytes'] / max(entry['tokens'], 1):.2f} bytes each, "
              f"{len(entry['shards'])} shard(s)")
    print(f'train on it:  python train.py --dataset={out}')


if __name__ == '__main__':
    main()
