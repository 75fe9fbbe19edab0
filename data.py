"""Text to tokens, tokens to batches: everything the training loop needs to know about data.

    python data.py                                          # what there is
    python data.py shakespeare                              # downloads (or --input=FILE), tokenizes to data/shakespeare
    python data.py --input=a.txt,b.jsonl --out=data/my --tokenizer=gpt2

A data set is a folder: flat token files (train_000.bin, val_000.bin), one manifest.json that says what is in them
(dtype, counts, vocabulary, sha256), and the tokenizer, unless it has a well-known name. Batches are stateless: which
windows form iteration i is a function of (seed, i), so a run resumes from a number, on any number of machines.

Letters: B batch, T window length, N tokens in a split.

Twice the lines that a file should have, and known to be: tokenizers, a world to train on, preparation, batches are one
concern (a data set is text, its tokenizer and its order), and the project has one file for each concern.
"""

import argparse
import array
import ast
import functools
import glob
import gzip
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import zlib
from collections import Counter, defaultdict, namedtuple
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

Batch = namedtuple('Batch', 'x0 maskable cu_seqlens')               # (B, T) int64, (B, T) bool, (n+1,) int32 or None
Corpus = namedtuple('Corpus', 'folder manifest splits parts turns rows', defaults=((), None, {}))   # by split: shards
Examples = namedtuple('Examples', 'rows groups left_out')           # (n, 3) int64 start response end, (g+1,), how many

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
        self.named, self.chat, self.start = set(named), chat, []        # start: ids that plain text begins with
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


def answer_text(ids, tok, stop=()):
    """The text of generated ids, up to the first end token or stop string."""
    end = next((i for i, token in enumerate(ids) if token in (tok.eos_id, tok.eot_id)), len(ids))
    text = tok.decode(ids[:end])
    return text[:min((at for at in map(text.find, stop) if at >= 0), default=None)]


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
    if (meta['config'] or {}).get('masking') == 'response':         # trained on examples, see turns_of
        tok.start = [tok.bos_id]
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
    yield from read_file(path)


# A world of short stories, made up, seeded, and of known probability: what is written can be graded, and a loss can be
# held against the entropy of its source. A story has one sentence of each line of STORY; alternatives (|) are equally
# likely. {A} is a person: the first slot of a letter draws a word of its kind (or of the kind named: {B:girl}) that the
# story has not used, each equally likely; later slots repeat it; {A.he} is the pronoun that fits. Alternatives are
# equally long, so that a word and its repetition are always equally far apart: that is what a small model learns fast.

WORDS = {kind: words.split(', ') for kind, words in {
    'girl': 'Anna, Bella, Cleo, Dora, Emma, Fay, Greta, Hanna, Ida, Julia, Kate, Lucy',
    'boy': 'Adam, Ben, Carl, David, Erik, Felix, Gus, Hugo, Ivan, Jack, Leo, Max',
    'place': 'the castle, the city, the forest, the harbour, the island, the library, the market, the mill, '
             'the mountains, the museum, the park, the village',
    'colour': 'black, blue, brown, green, grey, orange, purple, red, white, yellow',
    'thing': 'ball, bell, boat, book, box, coat, cup, drum, hat, kite, lamp, ring',
    'animal': 'bear, bird, cat, cow, dog, fox, frog, goat, horse, mouse, rabbit, sheep',
    'food': 'apples, bread, cake, cheese, grapes, honey, milk, nuts, pears, plums, rice, soup',
    'day': 'Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday'}.items()}
WORDS['name'] = WORDS['girl'] + WORDS['boy']
KINDS = dict(A='name', B='name', C='colour', D='day', F='food', G='food', K='animal', P='place', Q='place', X='thing')
FORMS = {'girl': dict(He='She', he='she', His='Her', his='her', child='girl'),
         'boy': dict(He='He', he='he', His='His', his='his', child='boy')}
STORY = [line.split(' | ') for line in (
    '{A} lives in {P}. | {A} works in {P}. | {A} comes from {P}.',
    '{A.He} has a {C} {X}. | {A.He} found a {C} {X}. | {A.He} bought a {C} {X}. | {A.He} likes the {C} {X}.',
    '{A.His} sister {B:girl} eats {G}. | {A.His} brother {B:boy} eats {G}. | {A.His} friend {B} eats {G}.',
    'On {D} {A} lost the {X} in {Q}. | On {D} {B} lost the {X} in {Q}. | On {D} {A} hid the {X} in {Q}. | '
    'On {D} {B} hid the {X} in {Q}. | On {D} {B} took the {X} to {Q}.',
    'Now {B} has the {C} {X}. | Now {A} has the {C} {X}. | Then {A} ate {G} with {B}. | Then {B} gave {G} to {A}.')]
SLOT = re.compile(r'\{(\w)(?::(\w+))?(?:\.(\w+))?\}')


def _tell(sentence, known, choose):
    """A sentence with its slots filled -> (text, log p of the words it brings in); `known` (letter -> word) gains them.

    choose(letter, options) -> word.
    """
    logp = 0.0

    def fill(slot):
        nonlocal logp
        letter, kind, form = slot.groups()
        if letter not in known:
            options = [w for w in WORDS[kind or KINDS[letter]] if w not in known.values()]
            known[letter] = choose(letter, options)
            logp -= math.log(len(options))
        return FORMS['girl' if known[letter] in WORDS['girl'] else 'boy'][form] if form else known[letter]

    return SLOT.sub(fill, sentence), logp


def world_story(rng):
    """A story drawn with a random.Random -> (text, its exact log-probability, its words: letter -> word)."""
    known, total, told = {}, 0.0, []
    for sentences in STORY:
        text, logp = _tell(rng.choice(sentences), known, lambda letter, options: rng.choice(options))
        told.append(text)
        total += logp - math.log(len(sentences))
    return ' '.join(told), total, known


@functools.lru_cache(None)
def _sentence_pattern(sentence):
    """What a sentence looks like with any words in its slots; the first slot of each letter is a group of that name."""
    seen = set()

    def any_word(slot):
        letter, kind, form = slot.groups()
        words = {forms[form] for forms in FORMS.values()} if form else WORDS[kind or KINDS[letter]]
        named = f'?P<{letter}>' if not form and letter not in seen and not seen.add(letter) else '?:'
        return f"({named}{'|'.join(words)})"

    return re.compile(SLOT.sub(any_word, sentence).replace('.', r'\.'))


def world_readings(text, consistent=True):
    """The log-probabilities of all ways in which the grammar makes a text: one, or none if it is no story.

    consistent=False grades the grammar alone: names, pronouns and colours need not agree, and the numbers mean nothing.
    """
    ways = [(0, 0.0, {})]                                           # read so far: up to where, log p, words
    for i, sentences in enumerate(STORY):
        ways, before = [], ways
        for at, total, known in before:
            if i:                                                   # one space between sentences
                at = at + 1 if text.startswith(' ', at) else len(text) + 1
            for sentence in sentences:
                match = _sentence_pattern(sentence).match(text, at)
                if match:
                    words, new = match.groupdict(), dict(known)
                    again, logp = _tell(sentence, new, lambda k, left, w=words: w[k] if w[k] in left else '')
                    if again == match.group() or not consistent:
                        ways.append((match.end(), total + logp - math.log(len(sentences)), new))
    return [total for at, total, _ in ways if at == len(text)]


def stories(n=20000, seed=0):
    """The world to read: n stories, each an example of its own."""
    rng = random.Random(f'stories {seed}')
    return ({'response': world_story(rng)[0]} for _ in range(n))


def dialogues(n=30000, seed=0):
    """Instructions over the same world, with answers that can be checked: n records {'task', 'messages', ['accept']}.

    Questions about a story, letters to sort or to reverse, "name two", and follow-ups that need the turn before.
    accept: a regular expression for the last answer where several are right; else it is right word for word.
    """
    rng = random.Random(f'dialogues {seed}')
    kinds = {'animals': 'animal', 'colours': 'colour', 'girls': 'girl', 'boys': 'boy', 'days': 'day', 'things': 'thing'}

    def about_story(count):
        text, _, w = world_story(rng)
        asked = [('Where does {A} live?', '{A} lives in {P}.'), ('What colour is the {X}?', 'The {X} is {C}.'),
                 ('What does {B} eat?', '{B} eats {G}.'), ('On which day was it?', 'It was on {D}.'),
                 ('Who is a friend of {A} or in the family?', 'It is {B}.')]
        asked = [[_tell(part, w, None)[0] for part in pair] for pair in rng.sample(asked, count)]
        return [(f'{text} {asked[0][0]}', asked[0][1]), *((f'And this: {q}', a) for q, a in asked[1:])]

    def letters(count):
        drawn = rng.sample('abcdefghijklmnopqrstuvwxyz', rng.randint(3, 6))
        first = rng.choice(('Sort', 'Sort', 'Sort', 'Reverse'))     # the harder of the two
        answer = sorted(drawn) if first == 'Sort' else drawn[::-1]
        turns = [(f"{first}: {' '.join(drawn)}", ' '.join(answer)), ('Now reverse that.', ' '.join(answer[::-1]))]
        return turns[:count]

    for _ in range(n):
        task = rng.choice(('story', 'letters', 'letters', 'two', 'follow-up'))
        turns, accept = about_story(1) if task == 'story' else letters(1), {}
        if task == 'two':
            many = rng.choice(list(kinds))
            turns = [(f'Name two different {many}.', ' and '.join(rng.sample(WORDS[kinds[many]], 2)))]
            one = '|'.join(WORDS[kinds[many]])
            accept = {'accept': rf'({one}) and (?!\1$)({one})'}
        elif task == 'follow-up':
            turns = rng.choice((about_story, letters))(2)
        name = turns[0][0].split(':')[0].lower() if task == 'letters' else task
        yield {'task': name, **accept, 'messages': [
            {'role': role, 'content': text} for turn in turns for role, text in zip(('user', 'assistant'), turn)]}


def facts(pairs=64, seed=0):
    """Who is whose mother, in statements to be learned by heart: {'first', 'join', 'second', 'seen', 'both'}.

    Half of the pairs are stated in both ways ("A is the mother of B", "B is the child of A"), a quarter each in one
    way only; the statement that is not made is yielded too, with seen=False: no training text, but a question.
    """
    rng = random.Random(f'facts {seed}')
    letters = ('bdfgklmnprstvz', 'aeiou') * 2
    names = rng.sample([''.join(word).capitalize() for word in itertools.product(*letters)], 2 * pairs)
    for i in range(pairs):
        mother, child = names[2 * i:2 * i + 2]
        yield {'first': mother, 'join': ' is the mother of ', 'second': child, 'seen': i % 4 != 3, 'both': i % 4 < 2}
        yield {'first': child, 'join': ' is the child of ', 'second': mother, 'seen': i % 4 != 2, 'both': i % 4 < 2}


def read_file(path, complain=None, accept=None):
    """What a file holds, as it goes: (name, text) of documents, or (name, record) of examples to be fine-tuned on.

    .txt is one document, in pieces; .parquet has one a row, in "text"; a line of .jsonl(.gz), or an item of a list in
    .json, is a document with "text", or an example: see check_record. What cannot be read raises ValueError with file
    and line, or, given complain(message), is reported there and left out. accept: another check_record.
    """
    path = Path(path)
    kind = ''.join(path.suffixes[-2:] if path.suffix == '.gz' else path.suffixes[-1:])
    if kind not in READERS:
        raise ValueError(f'{path}: input must be .txt, .jsonl, .jsonl.gz, .json or .parquet')
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such file')
    found, held, size = None, [], 0
    for number, raw in enumerate(READERS[kind](path), 1):
        try:
            item = raw
            if isinstance(raw, bytes):
                item = raw.decode('utf-8-sig' if number == 1 or kind != '.txt' else 'utf-8')
            if kind.startswith('.jsonl') and item.strip():
                item = json.loads(item, object_pairs_hook=_no_key_twice)
            blank = isinstance(item, str) and not item.strip()
            if isinstance(item, dict) and (accept or 'text' not in item):
                item = (accept or check_record)(item)
            elif isinstance(item, dict) and isinstance(item['text'], str):
                item = item['text']
            elif not blank and (accept or kind.startswith('.json') or not isinstance(item, str)):
                raise TypeError('want a JSON object with "text", or an example')
            json.dumps(item, ensure_ascii=False).encode()           # half a surrogate pair is no text
            if item and not isinstance(item, found or object):
                raise TypeError('a file holds documents ("text") or examples, not both')
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            said = f'not UTF-8 (byte {e.start} of the line)' if isinstance(e, UnicodeDecodeError) else str(e)
            (complain or _refuse)(f'{path}:{number}: {said}')
            continue
        if isinstance(item, dict) or item.strip():
            found = type(item)
        if kind != '.txt' and (isinstance(item, dict) or item.strip()):
            yield f'{path.name}:{number}', item
        elif kind == '.txt':
            held, size = [*held, item], size + len(item)
            if size > 1 << 16:
                yield path.name, ''.join(held)
                held, size = [], 0
    if held:
        yield path.name, ''.join(held)
    if not found:
        raise ValueError(f'{path}: no text in it')


def _refuse(message):
    raise ValueError(message)


def _no_key_twice(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f'a key stands twice: {[k for k, _ in pairs]}')
    return dict(pairs)


def check_record(record, longest=1 << 20):
    """An example as it is, or ValueError: "prompt" and "response"; "messages" ("role", "content"); "first", "second".

    The prompt may be missing; "prompt_ids" and "response_ids" are for templates that Tokenizer does not know. Couplets
    may have a "join", the text between their halves (default: a line end), and "seen": false, if they are a question
    only. longest: characters in all.
    """
    def text(of, key, may_be_empty=False):
        value = of.get(key) if isinstance(of, dict) else None
        if not isinstance(value, str) or not (may_be_empty or value.strip()):
            raise ValueError(f'"{key}" must be a text that is not empty, got {json.dumps(value)[:60]}')
        return len(value)

    size = 0
    if 'messages' in record:
        messages = record['messages']
        if not isinstance(messages, list) or not messages:
            raise ValueError(f'"messages" must be a list of messages, got {json.dumps(messages)[:60]}')
        size = sum(text(m, 'role') + text(m, 'content') for m in messages)
        roles = [m['role'] for m in messages]
        if len(roles) < 2 or roles[-1] != 'assistant' or 'user' not in roles:
            raise ValueError(f'"messages" must end with an answer by "assistant" to a "user", got roles {roles[:9]}')
    elif {'prompt_ids', 'response_ids'} & set(record):
        for key in ('prompt_ids', 'response_ids'):
            ids = record.get(key)
            if not (isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids)):
                raise ValueError(f'"{key}" must be a list of ids that is not empty, got {json.dumps(ids)[:60]}')
            size += len(ids)
    elif {'prompt', 'response'} & set(record):
        size = text({'prompt': 'none', **record}, 'prompt') + text(record, 'response')
    elif {'first', 'second'} & set(record):
        size = text(record, 'first') + text(record, 'second') + text({'join': '\n', **record}, 'join', True)
    else:
        raise ValueError(f'want "text", "prompt" and "response", "messages", or "first" and "second"; got the keys '
                         f'{list(record)[:9]}')
    if size > longest:
        raise ValueError(f'an example of {size:,} characters; the limit is {longest:,}')
    return record


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


def _json_items(path):
    try:
        items = json.loads(path.read_text(encoding='utf-8-sig'), object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError) as e:
        raise ValueError(f'{path}: not JSON ({e})') from None
    if not isinstance(items, list):
        raise ValueError(f'{path}: a .json file must be one list of objects; a file of lines is called .jsonl')
    return items


READERS = {'.txt': _lines, '.jsonl': _lines, '.jsonl.gz': _lines, '.json': _json_items, '.parquet': _parquet_rows}
DATASETS = {                # name -> (documents or records, default tokenizer, what it is)
    'docs': (docs_text, 'bpe-2048', 'documentation that every Python carries, about 1 MB; needs no network'),
    'shakespeare': (shakespeare_text, 'bpe-1024', 'tiny Shakespeare, 1.1 MB; downloaded, or --input=input.txt'),
    'world': (stories, 'world', 'made-up stories of known probability; like the next two, made on the spot'),
    'instruct': (dialogues, 'world', 'questions and tasks over the same world, with answers that can be checked'),
    'facts': (facts, 'bytes', 'who is whose mother, stated in two directions, for the reversal experiment'),
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


def prepare(documents, out, tokenizer, *, val_every=10, workers=1, on_error='stop'):
    """Tokenizes (name, text) documents, example records, or a list of paths of files, into the folder `out`.

    Of documents, every val_every-th piece of about 4 kB is held out: a tail split would share long passages with the
    rest. An EOS ends each, and stands wherever a held-out piece was taken from between its neighbours. Of examples,
    every val_every-th question is held out, chosen by its text: none is asked in both splits (val.jsonl keeps them as
    they were). Couplets are to be learned by heart: both splits have them all.
    tokenizer: a spec of get_tokenizer, 'bpe-N' to learn a vocabulary of N entries from the training pieces, 'chars'
    for one token a character, 'world' for the words of the made-up world. on_error 'skip' reports a bad line and leaves
    it out, 'stop' ends with it. Files are done side by side by `workers` processes; after an interruption or an error
    the same call takes up what is finished. The folder is whole or not there. Returns the manifest.
    """
    out, documents = Path(out).absolute(), list(documents)
    files = bool(documents) and isinstance(documents[0], (str, Path))
    sources = [Path(f) for f in documents] if files else [documents]
    if out.exists() and not (out.is_dir() and ((out / 'manifest.json').is_file() or not any(out.iterdir()))):
        raise ValueError(f'{out}: something else is here; choose another --out')
    first = [next(_documents(s, on_error), ('', ''))[1] for s in sources]   # broken at once: said now
    if len({isinstance(item, dict) for item in first}) > 1:
        raise ValueError('some of the files hold documents ("text"), some examples: prepare them apart')
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f'.{out.name}.unfinished')
    if not files:                                                   # nothing to take up: a place of its own
        aside = Path(tempfile.mkdtemp(prefix=f'.{out.name}.', dir=out.parent))
    aside.mkdir(exist_ok=True)
    try:
        spec = _place_tokenizer(tokenizer, aside, sources, val_every, on_error)
        jobs = [(source, aside, i, spec, val_every, on_error) for i, source in enumerate(sources)]
        return _finish(_run_jobs(jobs, workers), aside, out, spec, val_every)
    except BaseException:
        if not any(aside.glob('part_*.json')) or not files:         # finished files are kept: mend, and go on
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _place_tokenizer(tokenizer, folder, sources, val_every, on_error):
    """Learns or copies the tokenizer into the folder, if it has a file -> what the manifest calls it."""
    learned = tokenizer.removeprefix('bpe-') if tokenizer.startswith('bpe-') else ''
    if learned or tokenizer in ('chars', 'world'):
        n = int(learned) if learned.isdecimal() else 0
        if learned and not 256 + len(SPECIALS) <= n <= 65536:
            raise ValueError(f'tokenizer bpe-N: N must lie between {256 + len(SPECIALS)} and 65536, got {learned!r}')
        sample, size = [], 0
        if tokenizer == 'world':                                    # all words of it, the same for all its sets
            sources = [[*itertools.islice(stories(), 2000), *itertools.islice(dialogues(), 2000)]]
        pieces = chunks((name, _text_of(item)) for s in sources for name, item in _documents(s, on_error))
        for i, (_, text) in enumerate(pieces):
            if i % val_every != val_every - 1 or tokenizer == 'chars':
                sample.append(text)
                size += len(text)
            if size > 50_000_000:                                   # enough to learn words from
                break
        merges = _spell_out(sorted(set(''.join(sample)))) if tokenizer == 'chars' else \
            train_bpe('\n'.join(sample), n - 256 - len(SPECIALS) if learned else 2 ** 16)
        save_bpe(folder / 'tokenizer.json', merges)
        return 'tokenizer.json'
    get_tokenizer(tokenizer)                                        # refuse before copying
    if tokenizer.endswith('.json'):
        shutil.copyfile(tokenizer, folder / 'tokenizer.json')
        return 'tokenizer.json'
    return tokenizer


def _spell_out(words):
    """Merges that make one token of each word, from left to right."""
    merges = {}
    for raw in (word.encode() for word in words):
        for i in range(1, len(raw)):
            merges.setdefault(raw[:i + 1], (raw[:i], raw[i:i + 1]))
    return list(merges.values())


def _text_of(item):
    """The text of a document or of an example."""
    if isinstance(item, str):
        return item
    if 'prompt_ids' in item:
        return ' '.join(map(str, item['prompt_ids']))
    if 'messages' in item:
        return '\n\n'.join(text for m in item['messages'] for text in (m['role'], m['content']))
    return ''.join(couplet(item)) if 'first' in item else f"{item.get('prompt', '')}\n\n{item['response']}"


def _documents(source, on_error='stop', complain=lambda message: None):
    """(name, text or record) of a file, or of a list of texts or records; complain: see read_file."""
    if isinstance(source, Path):
        return read_file(source, complain if on_error == 'skip' else None)
    return (item if isinstance(item, tuple) else (f'record {i}', item) for i, item in enumerate(source))


def _run_jobs(jobs, workers):
    """_write_part for all jobs, in this process or several -> entries of the manifest, in order."""
    bar = dict(desc='tokenizing', total=len(jobs), unit='file', disable=None if len(jobs) > 1 else True, leave=False)
    if min(workers, len(jobs)) < 2:
        return list(tqdm(map(_write_part, jobs), **bar))
    ignore = (signal.SIGINT, signal.SIG_IGN)                        # Ctrl-C is for this process, which ends the others
    with multiprocessing.get_context('spawn').Pool(min(workers, len(jobs)), signal.signal, ignore) as pool:
        return list(tqdm(pool.imap(_write_part, jobs), **bar))


def _write_part(job):
    """Tokenizes one source to a shard for each split -> {split: {'file', 'tokens', 'bytes', 'sha256', ['rows']}}."""
    source, folder, number, spec, val_every, on_error = job
    tok = get_tokenizer(folder / spec if spec.endswith('.json') else spec)
    made_from = [str(source), source.stat().st_size, source.stat().st_mtime_ns, val_every, on_error,
                 _sha256(folder / spec) if spec.endswith('.json') else spec] if isinstance(source, Path) else None
    done = folder / f'part_{number:05d}.json'
    if made_from and done.is_file():
        before = json.loads(done.read_text(encoding='utf-8'))
        if before['made_from'] == made_from:
            return before
    entry = {split: {'file': f'{split}_{number:05d}.bin', 'tokens': 0, 'bytes': 0} for split in ('train', 'val')}
    rows, skipped, kept = {split: array.array('q') for split in entry}, [], None

    def complain(message):
        if on_error == 'stop':
            raise ValueError(message)
        skipped.append(tqdm.write(f'skipped {message[:200]}', file=sys.stderr))

    with ExitStack() as stack:
        files = {split: stack.enter_context((folder / e['file']).open('wb')) for split, e in entry.items()}
        held_out = stack.enter_context((folder / f'val_{number:05d}.jsonl').open('w', encoding='utf-8'))
        pieces = _pieces(_documents(source, on_error, complain), tok, number, val_every, complain)
        for split, ids, n_bytes, example in tqdm(pieces, desc='tokenizing', leave=False, disable=number > 0 or None):
            files[split].write(np.array(ids, dtype=_dtype(tok)).tobytes())
            start, entry[split]['tokens'] = entry[split]['tokens'], entry[split]['tokens'] + len(ids)
            entry[split]['bytes'] += n_bytes
            if example:
                prompt, group, record = example
                rows[split].extend((start, start + prompt, entry[split]['tokens'], group))
                if split == 'val' and group != kept:                # once, however many turns it has
                    kept = group
                    held_out.write(json.dumps(record, ensure_ascii=False) + '\n')
    for split, e in entry.items():
        e['sha256'] = _sha256(folder / e['file'])
        if rows[split]:
            e['rows'] = {'file': f'{split}_{number:05d}.rows.bin', 'count': len(rows[split]) // 4}
            (folder / e['rows']['file']).write_bytes(rows[split].tobytes())
            e['rows']['sha256'] = _sha256(folder / e['rows']['file'])
    entry.update(skipped=len(skipped), made_from=made_from)
    done.with_suffix('.tmp').write_text(json.dumps(entry), encoding='utf-8')
    os.replace(done.with_suffix('.tmp'), done)
    return entry


def _pieces(documents, tok, number, val_every, complain):
    """What goes to the shards, in order: (split, ids, bytes of text, None), or, of an example, instead of the None
    (length of its prompt, number of its dialogue, the record)."""
    last, special = None, set(tok.specials.values())
    parts = (part for name, item in documents for part in ([(name, item)] if isinstance(item, dict) else
                                                           chunks([(name, item)])))
    for i, (name, item) in enumerate(parts):
        if isinstance(item, dict):
            try:
                turns = turns_of(item, tok)
            except ValueError as e:                                 # an id, or a template, that is not to be had
                complain(f'{name}: {e}')
                continue
            for split in _splits_of(item, val_every):
                for prompt, response in turns:
                    text = tok.decode_bytes(t for t in (*prompt, *response) if t not in special)
                    yield split, [*prompt, *response, tok.eos_id], len(text), (len(prompt), i, item)
            continue
        split = 'val' if (i + number) % val_every == val_every - 1 else 'train'
        if last not in (None, (name, split)):
            yield last[1], [tok.eos_id], 0, None
        yield split, tok.encode(item), len(item.encode()), None
        last = name, split
    if last:
        yield last[1], [tok.eos_id], 0, None


def _splits_of(record, val_every):
    """Where an example goes: couplets everywhere, unless unseen; else by its first question, so that none is in both.

    (But where several answers are right there may be few questions: those go by question and answer.)
    """
    if 'first' in record:
        return ('train', 'val') if record.get('seen', True) else ()
    asked = [m['content'] for m in record.get('messages', ()) if m['role'] == 'user'] or [record.get('prompt', '')]
    key = record.get('prompt_ids') or asked[0].strip() or record['response']
    if 'accept' in record:
        key = json.dumps(record, sort_keys=True)
    return ('val',) if zlib.crc32(str(key).encode()) % val_every == 0 else ('train',)


def turns_of(record, tok):
    """An example as (prompt ids, response ids), one for each answer in it; the prompt begins with BOS.

    A dialogue of n answers is n examples, each with the whole history as its prompt (LLaDA, App. B.1). BOS also stands
    before what has no prompt: a canvas of masks alone looks the same from everywhere, and needs an edge to count from.
    """
    if 'messages' in record:
        history = record['messages']
        return [(tok.encode_chat(history[:i]), tok.encode(m['content'].strip()))
                for i, m in enumerate(history) if i and m['role'] == 'assistant']
    if 'first' in record:
        return [([tok.bos_id], [i for part in couplet(record) for i in tok.encode(part)])]
    if 'prompt_ids' in record:
        if max(record['prompt_ids'] + record['response_ids']) >= tok.vocab_size:
            raise ValueError(f'an id is not below {tok.vocab_size}: {json.dumps(record)[:99]}')
        return [(record['prompt_ids'], record['response_ids'])]
    prompt = tok.encode_chat([{'role': 'user', 'content': record['prompt']}]) if 'prompt' in record else [tok.bos_id]
    return [(prompt, tok.encode(record['response'].strip()))]


def couplet(record):
    """The three parts of a couplet: first half, what joins them, second half."""
    return record['first'], record.get('join', '\n'), record['second']


def _dtype(tok):
    return 'uint16' if tok.vocab_size <= 2 ** 16 else 'uint32'      # uint16 would wrap 126336 to 60800 without a word


def _sha256(path):
    return hashlib.sha256(np.memmap(path, np.uint8, 'r') if path.stat().st_size else b'').hexdigest()


def _finish(parts, aside, out, spec, val_every):
    """Writes the manifest, which ends the work, and moves the folder to its place -> the manifest."""
    tok = get_tokenizer(aside / spec if spec.endswith('.json') else spec)
    manifest = {'version': 1, 'dtype': _dtype(tok), 'vocab_size': tok.vocab_size, 'tokenizer': spec, 'splits': {},
                'skipped': sum(part['skipped'] for part in parts)}
    for split in ('train', 'val'):
        shards = [part[split] for part in parts if part[split]['tokens']]
        total = {key: sum(shard[key] for shard in shards) for key in ('tokens', 'bytes')}
        if not shards:
            raise ValueError(f'{out.name}: too little text: of its pieces of 4 kB (or examples) every {val_every}th is '
                             f'held out, and none is left for {split}')
        manifest['splits'][split] = {'shards': shards, **total}
    (aside / 'manifest.json').write_text(json.dumps(manifest, indent=1), encoding='utf-8')
    with (aside / 'val.jsonl').open('w', encoding='utf-8') as held_out:
        for i in range(len(parts)):
            held_out.write((aside / f'val_{i:05d}.jsonl').read_text(encoding='utf-8'))
    shards = [shard for split in manifest['splits'].values() for shard in split['shards']]
    named = {'val.jsonl'} if (aside / 'val.jsonl').stat().st_size else set()
    named |= {s['file'] for s in shards} | {s['rows']['file'] for s in shards if 'rows' in s}
    for leftover in (f for f in aside.iterdir() if f.suffix in ('.bin', '.jsonl') and f.name not in named
                     or f.match('part_*')):
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
    """The corpus of a name, folder or mixture 'a:0.7,b:0.3'; sets that need no network are made on first use.

    A mixture is a Corpus with parts: of every 1000 windows each gives its share, in an order that is always the same.
    """
    if (',' in name or ':' in name) and not Path(name).is_dir():
        return _mixture(name, verify)
    folder = Path(name) if (Path(name) / 'manifest.json').is_file() or '/' in name else Path('data') / name
    if name in DATASETS and name != 'shakespeare' and not (folder / 'manifest.json').is_file():
        documents, tokenizer, what = DATASETS[name]
        print(f'preparing data/{name} (once): {what}')
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
        splits, rows, spec = {}, {}, manifest['tokenizer']
        dtype = {'uint16': np.uint16, 'uint32': np.uint32}[manifest['dtype']]
        if not 0 < manifest['vocab_size'] < 2 ** 31 or spec.endswith('.json') and spec != 'tokenizer.json':
            raise KeyError('vocab_size or tokenizer')
        for split in ('train', 'val'):
            entry = manifest['splits'][split]
            if not (entry['bytes'] > 0 and entry['tokens'] == sum(s['tokens'] for s in entry['shards']) > 0):
                raise KeyError(f'counts of {split}')
            k, n = verify if isinstance(verify, tuple) else (0, 1)
            shards = list(enumerate(entry['shards']))
            splits[split] = [_open_shard(folder, s['file'], s['tokens'], dtype, verify and i % n == k and s['sha256'],
                                         manifest['vocab_size']) for i, s in shards]
            rows[split] = [_open_shard(folder, r['file'], 4 * r['count'], np.int64, verify and i % n == k and
                                       r['sha256'], 2 ** 62).reshape(-1, 4)
                           for i, s in shards for r in [s.get('rows')] if r]
    except (KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ValueError(f'{path}: not a manifest ({type(e).__name__}: {e})') from None
    return Corpus(folder, manifest, splits, rows=rows)


def _open_shard(folder, name, count, dtype, sha256, limit):
    """A file of `count` numbers below `limit`, mapped; checked if its sha256 is given."""
    path, want = folder / Path(name).name, count * np.dtype(dtype).itemsize
    size = path.stat().st_size if path.exists() else -1
    if size != want:
        raise ValueError(f'{path}: {"missing" if size < 0 else f"{size} bytes"}, the manifest says {want}; '
                         'prepare the data again')
    shard = np.memmap(path, dtype=dtype, mode='r')
    if sha256 and _sha256(path) != sha256:
        raise ValueError(f'{path}: damaged (its sha256 is not the one in the manifest); prepare the data again')
    if sha256 and shard.max() >= limit:
        at = int(shard.argmax())
        raise ValueError(f'{path}: token {shard[at]} at {at}, but the vocabulary ends at {limit - 1}')
    return shard


def corpus_tokenizer(corpus):
    """The tokenizer that made a corpus."""
    spec = corpus.manifest['tokenizer']
    return get_tokenizer(corpus.folder / spec if spec.endswith('.json') else spec)


def same_tokenizer(theirs, ours, name, folder):
    """ValueError if the tokenizer of a checkpoint is not the one of a data set."""
    probe = 'The quick brown fox: 1234\n\n    def f(x) ...'
    if theirs.encode(probe) != ours.encode(probe) or theirs.mask_id != ours.mask_id or theirs.eos_id != ours.eos_id:
        raise ValueError(f'{name}: its tokenizer is not the one of {folder}')


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


def batch(corpus, split, rows, seq_len, seed=0, cuts=None, eos_id=None):
    """Windows for global sample numbers `rows` (iteration * global batch + row of the batch) -> Batch.

    Every window of the split is drawn once per epoch, in an order and with a starting offset that are the epoch's own.
    cuts: one number for each row, see draw_cuts; what is cut off is not maskable, and out of sight of the rest.
    eos_id: documents are out of each other's sight as well, with borders behind each EOS (iLLaDA packs them so).
    """
    x0 = torch.from_numpy(np.stack([_window(corpus, split, int(row), seq_len, seed) for row in rows]))
    maskable, cu_seqlens = torch.ones_like(x0, dtype=torch.bool), None
    cuts = [0] * len(rows) if cuts is None else cuts
    inside = [] if eos_id is None else ((x0.flatten() == eos_id).nonzero()[:, 0] + 1).tolist()
    if inside or any(cuts):
        inside += [i * seq_len + abs(int(c)) for i, c in enumerate(cuts)]
        borders = {*range(0, x0.numel() + 1, seq_len), *inside}
        shape = 2 * len(rows) + 1 if eos_id is None else -(-len(borders) // 64) * 64    # few shapes: few graphs
        borders = sorted(borders) + [x0.numel()] * (shape - len(borders))
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
# Examples, one a row: a prompt that is never hidden, a response, EOS up to the longest row (LLaDA's fine-tuning)


def open_examples(corpus, split, seq_len):
    """Where the examples of a split stand -> Examples; those longer than seq_len are left out, and counted."""
    if corpus.parts or not corpus.rows.get(split):
        what = 'a mixture' if corpus.parts else 'a stream of documents'
        raise ValueError(f"{corpus.folder}: this is {what}, and masking = 'response' needs one set of examples, made "
                         'of "prompt" and "response", "messages", or couplets')
    tables, at, group = [], 0, 0
    for shard, rows in zip(corpus.splits[split], corpus.rows[split]):
        tables.append(rows + np.array([at, at, at, group]))
        at, group = at + len(shard), group + 1 + int(rows[-1, 3])
    table = np.concatenate(tables)
    short = table[:, 2] - table[:, 0] <= seq_len
    if not short.any():
        raise ValueError(f'{corpus.folder}: all {len(table)} examples of {split} are longer than seq_len = {seq_len}')
    if not short.all() and os.environ.get('RANK', '0') == '0':
        print(f'{corpus.folder}: {(~short).sum()} examples of {split} are left out, longer than seq_len = {seq_len}',
              file=sys.stderr)
    table = table[short]
    borders = np.flatnonzero(np.diff(table[:, 3], prepend=-1))
    return Examples(table[:, :3], np.append(borders, len(table)), int((~short).sum()))


def all_examples(corpus, split, seq_len, eos_id, limit=None):
    """The examples of a split in order, padded to the longest: x0 (n, T), maskable (n, T); `limit` of them, evenly."""
    rows = open_examples(corpus, split, seq_len).rows
    chosen = [i * len(rows) // limit for i in range(limit)] if limit and limit < len(rows) else slice(None)
    return example_batch(corpus, split, rows[chosen], eos_id)[:2]


def draw_examples(examples, samples, seed=0):
    """Rows (n, 3) for global sample numbers: every dialogue once an epoch, shuffled, and of each one turn by chance.

    The other turns of that dialogue have to wait for another epoch (LLaDA, issue 77 of the official repository).
    """
    n, chosen = len(examples.groups) - 1, []
    for sample in samples:
        epoch, index = divmod(int(sample), n)
        key = np.random.Generator(np.random.Philox(key=[seed, epoch])).integers(2 ** 63, size=4)
        group = shuffled(index, n, [int(k) for k in key])
        first, end = (int(i) for i in examples.groups[group:group + 2])
        turn = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 1, group])).integers(first, end)
        chosen.append(examples.rows[turn])
    return np.stack(chosen)


def example_batch(corpus, split, rows, eos_id, length=None):
    """Examples (n, 3) padded with EOS to the longest (or to `length`) -> Batch.                               Eq. 5

    The response, its EOS and the padding are maskable, hence counted as L' (LLaDA, App. B.1); the prompt is not.
    """
    longest = int((rows[:, 2] - rows[:, 0]).max()) if length is None else length
    x0 = torch.full((len(rows), longest), eos_id)
    maskable = torch.arange(longest) >= torch.from_numpy(rows[:, 1] - rows[:, 0])[:, None]
    for i, (start, _, end) in enumerate(rows.tolist()):
        x0[i, :end - start] = torch.from_numpy(read_window(corpus, split, start, end - start))
    return Batch(x0, maskable, None)


# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(
        description='Tokenizes text into data/NAME.', formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='data sets:\n' + '\n'.join(f'  {n:<12} {d[2]}' for n, d in DATASETS.items()))
    parser.error = lambda message: sys.exit(print(f'data.py: {message}', file=sys.stderr) or 2)
    parser.add_argument('name', nargs='?', help='a data set from the list below')
    parser.add_argument('--input', help='.txt, .jsonl(.gz), .json or .parquet files or patterns, separated by commas')
    parser.add_argument('--out', help='folder to write (default data/NAME)')
    parser.add_argument('--tokenizer', help="'bytes', 'chars' or bpe-N (learned here), a tiktoken name, or a "
                                            'tokenizer.json (default bpe-1024)')
    parser.add_argument('--workers', type=int, default=os.cpu_count() or 1, help='processes, for several files')
    parser.add_argument('--val_every', type=int, default=10, help='hold out every N-th piece or question (default 10)')
    parser.add_argument('--on_error', choices=('stop', 'skip'), default='stop', help='what a bad line does')
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
                           workers=args.workers, on_error=args.on_error)
    except (ValueError, OSError) as e:
        print(f'data.py: {e}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('data.py: interrupted; the same command goes on with the files that are left', file=sys.stderr)
        sys.exit(130)
    if manifest['skipped']:
        print(f"{manifest['skipped']} bad lines were left out", file=sys.stderr)
    for split, entry in manifest['splits'].items():
        print(f"{out}/{split}: {entry['tokens']:,} tokens, {entry['bytes'] / max(entry['tokens'], 1):.2f} bytes each, "
              f"{len(entry['shards'])} shard(s)")
    print(f'train on it:  python train.py --dataset={out}')


if __name__ == '__main__':
    main()
