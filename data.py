"""Text to tokens, tokens to batches: everything the training loop needs to know about data.

    python data.py                                          # what there is
    python data.py shakespeare                              # downloads, tokenizes to data/shakespeare
    python data.py --input=a.txt,b.jsonl --out=data/my --tokenizer=gpt2

A data set is a folder: flat token files (train_00000.bin, val_00000.bin), a manifest that says what is in
them, and the tokenizer (but 'bytes' needs no file). Batches are stateless: which rows form iteration i
is a function of (seed, i), so a run resumes from a number, on any number of machines.

Letters: B batch, T window length, N tokens in a split.
"""

from configurator import before_torch

if __name__ == '__main__':
    before_torch()

import ast
import glob
import gzip
import json
import multiprocessing
import os
import re
import shutil
import signal
import sysconfig
import zlib
from collections import Counter, defaultdict, namedtuple
from errno import ENOENT
from functools import partial
from itertools import count, groupby, pairwise, takewhile
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from configurator import (
    NAMES,
    ROLES,
    TOKENIZER_FILES,
    Refused,
    alone,
    command,
    copy_tokenizer,
    facts_sha256,
    own_tokenizer,
    read_json,
    read_manifest,
    say,
    special_tokens,
    write_manifest,
)

name = ''                       # a data set from the list below
input = ''                      # .txt, .jsonl(.gz), .json or .parquet files or patterns, separated by commas
val_input = ''                  # likewise, held out; default: a part of the input, see val_every
out = ''                        # folder to write; default data/NAME
tokenizer = ''            # 'bytes', bpe-N (learned), a tiktoken name or a tokenizer.json; default bpe-1024 for files
workers = 0                     # processes, for several files; 0: one per core
val_every = 10                  # hold out every N-th piece of text, or question

Batch = namedtuple('Batch', 'x0 maskable cu_seqlens')       # (B, T) int64, (B, T) bool, (n+1,) int32 or None
Dataset = namedtuple('Dataset', 'parts weights')            # lists of Corpus and of float
Cuts = namedtuple('Cuts', 'random_length random_split isolate times pad_group', defaults=(0., 0., False, 1, 1))
WHOLE = Cuts()                                              # see Windows and Examples
progress = partial(tqdm, disable=None, leave=False)         # silent if not on a terminal

# ----------------------------------------------------------------------------------------------------------
# Tokenizers: one kind, a tiktoken.Encoding and a table from its ranks to ids; three sources

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"    # GPT-2's, digits alone
GPT2_PATTERN = PATTERN.replace(r'\p{N}|', r'\p{N}+|')
ADDED = [names[0] for names in NAMES.values() if names]         # special tokens of a learned vocabulary
LONGEST_PIECE = 400_000                                 # tiktoken gives up on about a million spaces in a row
LONGEST_WORD = 200                              # merges are learned from words; longer ones are cut up
TWO_MEANINGS = r'\}\+|[$^]'                      # possessive or repeated, of a text or a line: engines differ
# The two chat formats known here, LLaDA's as released and the one shown in its guideline: the texts that a
# template puts around a message -> what it puts between header and message.
CHAT_FORMATS = {
    frozenset({'<|start_header_id|>', '<|end_header_id|>\n\n', '<|eot_id|>',
               '<|start_header_id|>assistant<|end_header_id|>\n\n'}): '\n\n',
    frozenset({'<start_id>', '<end_id>\n', '<eot_id>', '<start_id>assistant<end_id>\n'}): '\n'}


class Tokenizer:
    """Text to ids and back. `mask_id`, `eos_id`, `pad_id`, `bos_id`, `eot_id`: ids, or None in a release without.

    id_of: the bytes of a token -> its id, in the order of merging, which is tiktoken's rank. others: ids that
    encode never produces -> bytes.
    specials: role -> id. complete: a role that the vocabulary lacks gets the next free id. chat: what the
    template puts between header and message, None if it is not known. `spec` is what a checkpoint stores.
    """

    def __init__(self, pattern, id_of, specials, spec, others, chat='\n\n', complete=True):
        self.spec, self.chat, self.pattern, self.id_of = str(spec), chat, pattern, id_of
        self.start = []                                     # ids put before plain text
        self.encoding = tiktoken.Encoding(
            self.spec, pat_str=pattern, special_tokens={}, mergeable_ranks=dict(zip(id_of, count())))
        self._id_of_rank = list(id_of.values())
        self._bytes = {i: token for token, i in id_of.items()} | others

        specials = dict(specials)
        for role, names in NAMES.items():
            if complete and names and role not in specials:
                specials[role] = max(self._bytes) + 1
                self._bytes[specials[role]] = names[0].encode()
        self.vocab_size = max(self._bytes) + 1
        self.set_specials(specials)

    def set_specials(self, specials):
        """role -> id, or None."""
        self.specials = specials
        for role in ROLES:
            setattr(self, f'{role}_id', specials.get(role))
        if self.pad_id is None:
            self.pad_id = self.eos_id

    def encode(self, text):
        """The ids of a text, list of int. Names of special tokens typed by a user are text like any other."""
        ids = []
        for start in range(0, len(text), LONGEST_PIECE):
            ranks = self.encoding.encode_ordinary(text[start:start + LONGEST_PIECE])
            ids += [self._id_of_rank[rank] for rank in ranks]
        return ids

    def decode_bytes(self, ids):
        """The exact bytes of ids; ids that stand for no token are written out as <|id|>."""
        return b''.join(self._bytes.get(int(i), f'<|{i}|>'.encode()) for i in ids)

    def decode(self, ids):
        """Text of ids; half a character becomes U+FFFD."""
        return self.decode_bytes(ids).decode(errors='replace')

    def ended(self, ids, stop=()):
        """Whether generated ids hold an end token or a stop string."""
        return self.answer(ids, stop) != self.decode(ids)

    def answer(self, ids, stop=()):
        """The text of generated ids, up to the first end token or stop string."""
        text = self.decode(takewhile(lambda i: i not in (self.eos_id, self.eot_id), ids))
        cuts = [text.find(s) for s in stop if s in text]
        return text[:min(cuts, default=None)]

    def encode_chat(self, messages):
        """Ids of a conversation [{'role', 'content'}, ...] and of the assistant's header (LLaDA's template)."""
        if self.chat is None:
            raise Refused(f'{self.spec}: its chat template is not one of the two known here (LLaDA as released, '
                          'and as in its guideline); make the ids elsewhere, give them in a file as {"ids"}')
        parts = [self.specials.get(role) for role in ('bos', 'start_header', 'end_header', 'eot')]
        if None in parts:
            raise Refused(f'{self.spec}: it has no tokens for the chat template (BOS, headers, end of turn)')
        bos, start, end, eot = parts

        ids = [bos]
        for message in [*messages, {'role': 'assistant', 'content': ''}]:
            content = self.encode(self.chat + message['content'].strip())
            ids += [start, *self.encode(message['role']), end, *content, eot]
        return ids[:-1]                                     # the assistant's turn is open

    def encode_begun(self, messages):
        """encode_chat, but a last message by the assistant is left open, to be continued."""
        if not messages or messages[-1]['role'] != 'assistant':
            return self.encode_chat(messages)
        *before, last = messages
        return self.encode_chat(before) + self.encode(last['content'].strip())

    def cut(self, ids, room):
        """Cuts the ids of a prompt to at most `room`: BOS and a first header stay, what follows is cut."""
        keep = int(ids[:1] == [self.bos_id])
        if keep and ids[1:2] == [self.specials.get('start_header')]:
            keep += ids.index(self.specials['end_header'])
        lost = max(0, len(ids) - room)
        return ids[:keep] + ids[keep + lost:]

    def fingerprint(self):
        """The same for two tokenizers that encode every text to the same ids."""
        return facts_sha256(repr((self.pattern, list(self.id_of.items()), self.mask_id, self.eos_id)))

    def unused(self, vocab_size):
        """The ids below vocab_size without a token: rows of a head that were never trained."""
        return [i for i in range(vocab_size) if i not in self._bytes]


def get_tokenizer(spec, complete=True):
    """'bytes', a tiktoken name ('gpt2', ...), or the path of a byte-level BPE tokenizer.json -> Tokenizer.

    Or the path of a data set's copy of a tiktoken vocabulary. complete: see Tokenizer. Raises Refused for
    what cannot be read without loss.
    """
    spec = str(spec)
    if spec.endswith(TOKENIZER_FILES) and not Path(spec).is_file():
        raise FileNotFoundError(ENOENT, 'no such tokenizer file', spec)
    if spec.endswith('.json'):
        return read_bpe(Path(spec), complete)
    facts = read_json(spec) if spec.endswith('.tiktoken') else tiktoken_facts(spec)
    try:
        ids = sorted(facts['ids'].items(), key=itemgetter(1))                   # ids are ranks, with gaps
        id_of = {bytes.fromhex(token): i for token, i in ids}

        special = facts['special']
        roles = {role: special[n] for role, names in NAMES.items() for n in names if n in special}
        others = {i: n.encode() for n, i in special.items()}
        return Tokenizer(facts['pattern'], id_of, roles, spec, others)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Refused(f'{spec}: not a vocabulary ({type(error).__name__}: {error})') from None


def tiktoken_facts(name):
    """A vocabulary as JSON, so that a data set can keep a copy; tiktoken downloads all but 'bytes'."""
    if name == 'bytes':
        return {'pattern': r'[\s\S]', 'ids': {f'{b:02x}': b for b in range(256)}, 'special': {}}

    known = tiktoken.list_encoding_names()
    if name not in known:
        raise Refused(f"tokenizer must be 'bytes', bpe-N, a tokenizer.json or {', '.join(known)}; got {name!r}")
    try:
        full = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise Refused(f'tokenizer {name}: could not be downloaded ({type(error).__name__}); where there is no '
                      'network, TIKTOKEN_CACHE_DIR names a folder that has it, or give a tokenizer.json') from None
    ids = {token.hex(): i for token, i in full._mergeable_ranks.items()}
    return {'pattern': full._pat_str, 'ids': ids, 'special': full._special_tokens}


def tokenizer_for(meta, mask_id=None):
    """The tokenizer of loaded weights (meta of model.load_model), with the special ids that they name.

    mask_id: to be given where released weights do not name it.
    """
    where, config = meta['folder'], meta['config']          # config: of train.py, None for released weights
    if meta['tokenizer'] is None:
        raise Refused(f'{where}: no tokenizer.json beside the weights')
    if mask_id is not None and meta['mask_id'] not in (None, mask_id):
        raise Refused(f"{where}: the weights say mask is {meta['mask_id']}, you say {mask_id}")

    tok = get_tokenizer(meta['tokenizer'], complete=config is not None)
    told = {role: meta[f'{role}_id'] for role in ROLES}
    if mask_id is not None:
        told['mask'] = mask_id
    for role in ('mask', 'eos'):
        if told[role] is None:
            raise Refused(f'{where}: neither config.json nor the tokenizer say which id is {role}')
    tok.set_specials(tok.specials | told)
    if config and config.get('masking') == 'response':      # trained on examples, which begin with BOS
        tok.start = [tok.bos_id]
    return tok


def byte_symbols():
    """GPT-2's printable character for each byte, in which tokenizer.json files spell tokens: str -> byte."""
    others = count(256)
    return {chr(b if chr(b).isprintable() and chr(b) != ' ' else next(others)): b for b in range(256)}


def read_bpe(path, complete):
    """A Hugging Face byte-level BPE file as a Tokenizer, without loss; or Refused, naming what is in the way."""
    def demand(condition, what):
        if not condition:
            raise Refused(f'{path}: cannot be converted without loss: {what}')

    file = read_json(path)
    try:
        pattern = check_kind(file, demand)
        names, roles = special_tokens(path)
        id_of, others = convert_merges(file['model'], names, demand)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise Refused(f'{path}: not a tokenizer.json with a BPE model '
                      f'({type(error).__name__}: {error})') from None

    chat = chat_format(path, roles)
    try:
        tok = Tokenizer(pattern, id_of, roles, path, others, chat, complete)
    except ValueError as error:
        raise Refused(f'{path}: its regex cannot be used here ({error})') from None
    characters = [chr(i) for i in range(2 ** 16) if not 0xD800 <= i < 0xE000]
    for glue in ('', ' ', 'a', '1.', '\n'):
        text = glue.join(characters)
        demand(tok.decode(tok.encode(text)) == text, 'its pattern leaves out characters')
    return tok


def check_kind(file, demand):
    """Refuses a tokenizer.json of a kind that cannot be converted -> its splitting pattern."""
    model = file['model']
    demand(model.get('type', 'BPE') == 'BPE', f"model type {model.get('type')}")
    for key in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix', 'byte_fallback'):
        demand(not model.get(key), f'{key} is {model.get(key)!r}')
    normalizer = file.get('normalizer') or {'normalizers': []}
    demand(normalizer.get('normalizers') == [], f"it has a normalizer ({normalizer.get('type')})")
    plain = [added['content'] for added in file.get('added_tokens') or [] if not added.get('special')]
    demand(not plain, f'added token {plain[:1]} is matched in plain text')

    before = file.get('pre_tokenizer') or {}
    steps = before.get('pretokenizers', [before])
    kinds = [step.get('type') for step in steps]
    demand(kinds in (['ByteLevel'], ['Split', 'ByteLevel']), f'pre-tokenizer {kinds}')
    *splits, byte_level = steps
    demand(not byte_level.get('add_prefix_space', True), 'add_prefix_space')
    by_itself = byte_level.get('use_regex', True)
    demand(by_itself != bool(splits), f'ByteLevel has use_regex {by_itself} behind {len(splits)} Split')
    if not splits:
        return GPT2_PATTERN

    split, = splits
    pattern = split['pattern'].get('Regex')
    demand(pattern, 'Split without a regex')
    bare = re.sub(r'\\[pP]\{[^}]*\}|\\.|\[(\\.|[^\]])*\]', 'x', pattern)         # without classes and escapes
    demand(not re.search(TWO_MEANINGS, bare), f'its regex means different things to different engines: {pattern}')

    behavior, inverted = split.get('behavior'), bool(split.get('invert'))
    demand(behavior == ('Removed' if inverted else 'Isolated'), f'Split is {behavior}, inverted: {inverted}')
    if inverted:
        return pattern                                      # read_bpe checks that it leaves nothing out
    return f'{pattern}|(?:(?!{pattern})[\\s\\S])+'          # what lies between matches is a piece of its own


def convert_merges(model, names, demand):
    """Merges in order -> the tokens that they make (bytes -> id), and ids that none makes -> bytes.

    tiktoken merges by rank, so the rank must be the position in the merge list, never the id. It joins any
    two pieces that make a token, Hugging Face only the pairs listed: the same for every learned vocabulary,
    and for those that list all ways to make a token one after the other (Llama 3).
    """
    vocab = model['vocab']
    byte_of = byte_symbols()
    raw = {}                                                # token as spelled -> its bytes
    for token in vocab:
        if token not in names:
            demand(set(token) <= byte_of.keys(), f'token {token!r} is not spelled in bytes')
            raw[token] = bytes(byte_of[c] for c in token)

    lacking = byte_of.keys() - raw.keys()
    demand(not lacking, f'{len(lacking)} of the 256 single bytes have no token')
    used = (vocab | names).values()
    whole = all(type(i) is int and 0 <= i < 2 ** 31 for i in used)
    demand(whole, 'an id is not a whole number below 2^31')
    demand(len(set(used)) == len(used), 'two tokens share an id')

    id_of, last = {raw[symbol]: vocab[symbol] for symbol in byte_of}, ''      # bytes may be in any order
    for merge in model['merges']:
        pair = merge.split(' ') if isinstance(merge, str) else merge
        new = ''.join(pair)
        demand(len(pair) == 2 and {*pair, new} <= raw.keys(), f'merge {pair} has no token')
        demand(new == last or raw[new] not in id_of, f'merges far apart make the token {new!r}')
        id_of[raw[new]] = vocab[new]                        # made again: keeps its place
        last = new

    others = {vocab[token]: spelled for token, spelled in raw.items() if spelled not in id_of}
    demand(not others or not model.get('ignore_merges'), f'ignore_merges, and no merge makes {len(others)} tokens')
    others.update((i, name.encode()) for name, i in names.items())
    return id_of, others


def chat_format(path, roles):
    """What the chat template beside a tokenizer.json puts between header and message; None if unknown."""
    config = read_json(path.with_name('tokenizer_config.json'))
    template = str(config.get('chat_template') or '')
    if not template:                                # our own file, or a release whose tokens are all there
        return '\n\n' if not config or {'start_header', 'end_header', 'eot'} <= roles.keys() else None

    quoted = re.findall(r"""(['"])(.*?)\1""", template, re.S)
    texts = {text.replace('\\n', '\n') for _, text in quoted} - {'role', 'content', ''}
    return CHAT_FORMATS.get(frozenset(texts)) if 'bos_token' in template else None


def train_bpe(text, n_merges):
    """Byte-pair encoding on word counts: -> list of (bytes, bytes) merges, most frequent pair first."""
    import regex  # comes with tiktoken

    words = Counter()
    for word, n in Counter(regex.findall(PATTERN, text)).items():
        for start in range(0, len(word), LONGEST_WORD):     # or a word of a megabyte would take forever
            words[word[start:start + LONGEST_WORD]] += n
    spelled = {word: list(map(bytes, zip(word.encode()))) for word in words}       # in single bytes
    pairs, where = Counter(), defaultdict(set)              # how often, in which words

    def count_pairs(word, sign):
        for pair in pairwise(spelled[word]):
            pairs[pair] += sign * words[word]
            where[pair].add(word)

    for word in words:
        count_pairs(word, 1)

    merges = []
    for _ in progress(range(n_merges), desc='learning merges'):
        best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)
        if pairs[best] < 2:
            break
        merges.append(best)

        for word in where.pop(best):
            count_pairs(word, -1)
            spelled[word] = merged(spelled[word], best)
            count_pairs(word, 1)
        pairs = +pairs                                      # drops pairs that are gone
    return merges


def merged(word, pair):
    """A word (list of bytes) in which the pair is joined wherever it stands, from the left."""
    new = []
    for piece in word:
        if new and (new[-1], piece) == pair:        # `a a a` merges once: a fresh `aa` is not merged again
            new[-1] += piece
        else:
            new.append(piece)
    return new


def save_bpe(path, merges):
    """Writes merges as a Hugging Face tokenizer.json, which serves get_tokenizer and other programs alike."""
    vocab = byte_symbols()                                  # the single bytes come first
    symbol = list(vocab)

    def spell(raw):
        return ''.join(symbol[b] for b in raw)

    for a, b in merges:
        vocab[spell(a + b)] = len(vocab)

    off = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
    added = [{'id': i, 'content': text, 'special': True, **off} for i, text in enumerate(ADDED, len(vocab))]

    split = {'type': 'Split', 'pattern': {'Regex': PATTERN}, 'behavior': 'Isolated', 'invert': False}
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
    file = {'version': '1.0', 'added_tokens': added,
            'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [split, byte_level]}, 'decoder': byte_level,
            'model': {'type': 'BPE', 'vocab': vocab, 'merges': [[spell(a), spell(b)] for a, b in merges]}}
    Path(path).write_text(json.dumps(file, ensure_ascii=False, indent=0), encoding='utf-8')


# ----------------------------------------------------------------------------------------------------------
# Texts and records: {"text"} is a piece of a document, {"messages"} or {"response"} an example


def docs_text():
    """Real text that ships with every Python: pydoc's language reference, docstrings of the standard library.

    Modules are parsed, never imported, and repeated paragraphs are dropped. About 1.5 million characters,
    varying a little with the Python version. Yields records.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:                                     # a stripped-down Python
        topics = {}
    root = Path(sysconfig.get_paths()['stdlib'])
    skip = {'test', 'tests', 'idlelib', 'lib2to3', 'turtledemo', 'pydoc_data', 'site-packages', 'turtle.py',
            'tkinter', 'encodings'}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

    texts = {'language': '\n\n'.join(topics[key] for key in sorted(topics))}
    files = sorted([*root.glob('*.py'), *root.glob('*/*.py')])
    for file in progress(files, desc='reading docstrings'):
        inside = file.relative_to(root).parts
        if skip & set(inside) or inside[0].startswith('_'):
            continue
        try:
            tree = ast.parse(file.read_text(encoding='utf-8'))
        except (SyntaxError, ValueError, OSError):
            continue                                # a module that this Python cannot read has no docs
        docs = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
        texts['/'.join(inside)] = '\n\n'.join(filter(None, docs))

    seen = {''}
    for where, text in texts.items():
        fresh = []
        for paragraph in text.split('\n\n'):
            if paragraph.strip() not in seen:
                fresh.append(paragraph.strip('\n'))
                seen.add(paragraph.strip())
        if fresh:
            yield where, {'text': '\n\n'.join(fresh) + '\n'}


def shakespeare_text():
    """The 1.1 MB of tiny Shakespeare, downloaded once and checked."""
    url = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
    path = Path(torch.hub.get_dir()) / 'tinyshakespeare.txt'
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        sha256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except Exception as error:                          # urllib raises a dozen kinds
            raise Refused(f'could not download {url} ({error}); get the file by other means, and give it '
                          'with --input=FILE') from None
    yield from read_records(path)


DATASETS = {        # name -> (records, default tokenizer, what it is)
    'docs': (docs_text, 'bpe-4096', 'documentation that every Python carries; needs no network'),
    'shakespeare': (shakespeare_text, 'bpe-1024', 'tiny Shakespeare, 1.1 MB; downloaded, or --input=FILE')}
MADE_BY = {name: f'data.py {name}' for name in DATASETS}
MADE_BY.update(dict.fromkeys(('world', 'instruct', 'facts'), 'tests/lab/worlds.py'))


def read_records(source, accept=None):
    """(where, record) of a file: .txt is one document, .jsonl(.gz), .json and .parquet have a record per row.

    accept(row) -> record, or ValueError, which becomes Refused with file and line; default: as_record. A
    source that is not a path is already a list of such pairs.
    """
    if not isinstance(source, (str, Path)):
        yield from source
        return

    path = Path(source)
    kind = ''.join(path.suffixes[-2:]) if path.suffix == '.gz' else path.suffix
    if kind not in READERS:
        raise Refused(f'{path}: input must be one of {", ".join(READERS)}')
    if not path.is_file():
        raise FileNotFoundError(ENOENT, 'no such file', str(path))

    where = None
    for where, row in READERS[kind](path):
        try:
            row = json.loads(row) if isinstance(row, bytes) else row
            if not isinstance(row, dict):
                raise ValueError(f'want a JSON object, got {json.dumps(row)[:60]}')
            record = (accept or as_record)(row)
            json.dumps(record, ensure_ascii=False).encode()     # half a surrogate pair is not text
        except (ValueError, RecursionError) as error:
            raise Refused(f'{where}: {error}') from None

        yield where, record
    if where is None:
        raise Refused(f'{path}: no text in it')


def _text_pieces(path):
    """A .txt file: pieces of 64 kB or more, cut at line ends."""
    number = 1
    with path.open('rb') as file:
        while lines := file.readlines(1 << 16):
            raw = b''.join(lines)
            try:
                text = raw.decode('utf-8-sig' if number == 1 else 'utf-8')
            except UnicodeDecodeError as error:
                number += raw.count(b'\n', 0, error.start)
                raise Refused(f'{path}:{number}: not UTF-8 (byte {error.object[error.start]})') from None
            number += len(lines)
            if text.strip():
                yield path.name, {'text': text}


def _lines(path):
    open_file = gzip.open if path.suffix == '.gz' else open
    try:
        with open_file(path, 'rb') as file:
            for number, line in enumerate(file, 1):
                if line.strip(b'\xef\xbb\xbf \t\r\n'):      # json skips the byte order mark
                    yield f'{path}:{number}', line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Refused(f'{path}: not a complete gzip file ({error})') from None


def _json_items(path):
    try:
        items = json.loads(path.read_text(encoding='utf-8-sig'))
    except (ValueError, RecursionError) as error:
        raise Refused(f'{path}: not JSON ({error})') from None
    if not isinstance(items, list):
        raise Refused(f'{path}: a .json file must be one list; a file of lines is called .jsonl')
    for number, item in enumerate(items, 1):
        yield f'{path}, item {number}', item


def _parquet_rows(path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise Refused(f'{path}: .parquet needs one more package: pip install pyarrow') from None
    try:
        rows = (row for part in pyarrow.parquet.ParquetFile(path).iter_batches() for row in part.to_pylist())
        for number, row in enumerate(rows, 1):
            yield f'{path}, row {number}', json.dumps(row, default=str).encode()        # dates become text
    except pyarrow.ArrowException as error:
        raise Refused(f'{path}: not a parquet file ({str(error).splitlines()[0][:100]})') from None


READERS = {'.txt': _text_pieces, '.jsonl': _lines, '.jsonl.gz': _lines, '.json': _json_items,
           '.parquet': _parquet_rows}


# What others call the two sides of an example (TRL, Alpaca), the list of messages (ShareGPT), and who speaks
PAIRS = ('prompt', 'response'), ('question', 'answer'), ('prompt', 'completion'), ('instruction', 'output')
LISTS = 'messages', 'conversations', 'conversation'
IDS = 'prompt_ids', 'response_ids'
CONTENT = {'text', *LISTS, *IDS}.union(*PAIRS)
LONGEST_EXAMPLE = 1 << 20
SPEAKERS = {'human': 'user', 'gpt': 'assistant'}


def as_message(said):
    """A message of a conversation as {"role", "content"}, both texts that are not empty; or ValueError."""
    if not isinstance(said, dict):
        raise ValueError(f'a message has a "role" and a "content", got {json.dumps(said)[:60]}')
    for key in ('tool_calls', 'function_call'):
        if said.get(key):
            raise ValueError(f'a message with "{key}": calls of tools are not supported')

    role, content = said.get('role', said.get('from')), said.get('content', said.get('value'))
    if isinstance(content, list):                           # in parts
        try:
            content = ''.join(part['text'] for part in content)
        except (KeyError, TypeError):
            content = None
    for key, text in (('role', role), ('content', content)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f'the "{key}" of a message must be a text, got {json.dumps(said)[:80]}')
    return {'role': SPEAKERS.get(role, role), 'content': content}


def as_messages(row):
    """The messages of a row, or its prompt and response as messages, under any known name; else None."""
    for key in LISTS:
        said = row.get(key)
        if isinstance(said, list):
            return list(map(as_message, said))
        if said is not None and 'text' not in row:
            raise ValueError(f'"{key}" must be a list of messages, got {json.dumps(said)[:60]}')

    for prompt, response in PAIRS:
        if prompt in row and response in row:
            asked, answer = row[prompt], row[response]
            if prompt == 'instruction' and row.get('input'):
                texts = [as_message({'role': 'user', 'content': text}) for text in (asked, row['input'])]
                asked = '\n\n'.join(said['content'] for said in texts)
            messages = []
            for role, said in (('user', asked), ('assistant', answer)):
                messages += said if isinstance(said, list) else [{'role': role, 'content': said}]
            return list(map(as_message, messages))
    return None


def as_record(row):
    """A row as {"text"}, {"messages": [{"role", "content"}]} or {"response"}, other keys kept; or ValueError.

    "prompt" and "response", by this or another of the names in PAIRS, become messages; "prompt_ids" and
    "response_ids" are for templates that Tokenizer does not know. A row that fits several of these counts as
    the first: messages, ids, text.
    """
    messages = as_messages(row)
    if messages is not None:
        kept, roles = {'messages': messages}, [message['role'] for message in messages]
        if roles[-1:] != ['assistant'] or 'user' not in roles:
            raise ValueError(f'"messages" must end with an answer by "assistant" to a "user", got {roles[:9]}')

    elif all(key in row for key in IDS):
        kept = {key: row[key] for key in IDS}
        if not all(re.fullmatch(r'\[\d+(, \d+)*\]', json.dumps(ids)) for ids in kept.values()):
            raise ValueError('"prompt_ids" and "response_ids" must be lists of ids that are not empty')

    elif 'text' in row or 'response' in row:
        key = 'text' if 'text' in row else 'response'
        kept = {key: row[key]}
        if not isinstance(row[key], str) or not row[key].strip():
            raise ValueError(f'want a text that is not empty, got {json.dumps(row[key])[:60]}')
    else:
        raise ValueError(f'want "text", "prompt" and "response", or "messages"; got the keys {list(row)[:9]}')

    if 'text' not in kept and len(text_of(kept)) > LONGEST_EXAMPLE:
        raise ValueError(f'an example of {len(text_of(kept)):,} characters; the limit is {LONGEST_EXAMPLE:,}')
    return {key: value for key, value in (row | kept).items() if key in kept or key not in CONTENT}


# ----------------------------------------------------------------------------------------------------------
# Preparation: records -> token shards


def prepare(sources, out, tokenizer, *, val=(), val_every=10, workers=1):
    """Tokenizes sources (paths of files, or lists of (name, record)) into the folder `out` -> its manifest.

    val: sources to hold out. Without any, every val_every-th piece of about 4 kB of the documents (a tail
    would share long passages with the rest), with an EOS left in its place; of examples one in val_every, by
    its first question, so that none is asked in both splits.
    tokenizer: a spec of get_tokenizer, or 'bpe-N' to learn a vocabulary of N entries from the training
    pieces. One process per file. The folder is complete or absent; after an interruption or a bad line the
    same call reuses the files that are finished.
    """
    out, all_sources = Path(out), [*sources, *val]
    if not out.name:
        raise Refused(f'out must name a folder, got {str(out)!r}')
    if out.exists() and any(out.iterdir()) and not (out / 'manifest.json').is_file():
        raise Refused(f'{out}: something else is here; choose another --out')
    # report at once what is broken from the start
    kinds = {'text' in next(read_records(source))[1] for source in all_sources}
    if len(kinds) > 1:
        raise Refused('some of the files hold documents ("text"), some examples: prepare them apart')

    aside = out.with_name(f'.{out.name}.unfinished')        # replaces `out` when complete
    with alone(out.with_name(f'.{out.name}.lock')):
        aside.mkdir(exist_ok=True)
        try:
            if val:
                val_every = 0                               # nothing is held out of the other sources
            spec = place_tokenizer(tokenizer, sources, val_every, aside)

            jobs = [(number, source, val_every if number < len(sources) else 1, aside, spec)
                    for number, source in enumerate(all_sources)]
            write_manifest(aside, collect(run_jobs(jobs, workers), aside, spec))
        except BaseException:
            if not any(aside.glob('part_*')):               # nothing to reuse
                shutil.rmtree(aside, ignore_errors=True)
            raise

        shutil.rmtree(out, ignore_errors=True)
        os.replace(aside, out)
    return read_manifest(out, None)


def run_jobs(jobs, workers):
    """tokenize_source for all jobs, in this process or several -> what they return, in order."""
    bar = partial(progress, desc='files', total=len(jobs))
    workers = min(workers, len(jobs))
    if workers < 2:
        return list(bar(map(tokenize_source, jobs)))

    ignore = (signal.SIGINT, signal.SIG_IGN)               # Ctrl-C is for this process, which ends the others
    with multiprocessing.get_context('spawn').Pool(workers, signal.signal, ignore) as pool:
        return list(bar(pool.imap(tokenize_source, jobs)))


def collect(parts, folder, spec):
    """The facts of a manifest; files that are not part of the data set are removed from the folder."""
    splits = {'train': [], 'val': []}
    for split, shards in splits.items():
        shards += [part[split] for part in parts if part[split]['tokens']]
        if not shards:
            shutil.rmtree(folder)                           # the same call would end here again
            raise Refused(f'too little text: some of its pieces of 4 kB, or of the first questions of its examples, '
                          f'are held out, and none is left for {split}; --val_input=FILE says what to hold out')

    kept = {'tokenizer', 'tokenizer_config'}
    kept.update(shard['name'] for shards in splits.values() for shard in shards)
    for file in folder.iterdir():
        if file.name.split('.')[0] not in kept:
            file.unlink()
    vocab_size = get_tokenizer(own_tokenizer(spec, folder)).vocab_size
    return {'format': 'nanollada data 2', 'tokenizer': spec, 'vocab_size': vocab_size, 'splits': splits}


def place_tokenizer(tokenizer, sources, val_every, out):
    """Learns or copies the tokenizer into the data set, unless it is well known -> what the manifest says."""
    for old in out.glob('tokenizer*'):                      # left by an interrupted call with another one
        old.unlink()
    if tokenizer in tiktoken.list_encoding_names():         # kept, so that nobody needs the network again
        (out / 'tokenizer.tiktoken').write_text(json.dumps(tiktoken_facts(tokenizer)))
        return 'tokenizer.tiktoken'
    if not tokenizer.startswith('bpe-'):
        get_tokenizer(tokenizer)                            # refuse before anything is written
        return copy_tokenizer(tokenizer, out)

    size = tokenizer.removeprefix('bpe-')
    least = 256 + len(ADDED)
    if not size.isdecimal() or not least <= int(size) <= 65536:
        raise Refused(f'tokenizer bpe-N: N must lie between {least} and 65536, got {size!r}')

    sample = '\n'.join(training_texts(sources, val_every))
    save_bpe(out / 'tokenizer.json', train_bpe(sample, int(size) - least))
    return 'tokenizer.json'


def training_texts(sources, val_every, room=50_000_000):
    """The texts of all sources that tokenize_source will put into the training split.

    About `room` characters of them, which is enough to learn words from.
    """
    for number, source in enumerate(sources):
        for _, split, piece in placed(read_records(source), number, val_every):
            if split == 'train':
                text = piece if isinstance(piece, str) else text_of(piece)
                yield text
                room -= len(text)
            if room < 0:
                return


def text_of(record):
    """All text of an example."""
    if 'messages' in record:
        return '\n\n'.join(message[key] for message in record['messages'] for key in ('role', 'content'))
    return record.get('response') or json.dumps(record)


def chunks(text, size=4096):
    """A text in pieces of about `size` characters, cut at line ends, else at spaces, else anywhere."""
    start = 0
    while start < len(text):
        least, most = start + size, start + 2 * size
        end = text.find('\n', least, most) + 1 or text.find(' ', least, most)
        if end < 1:
            end = most
        yield text[start:end]
        start = end


class Shard:
    """A file of tokens being written; for examples also where each is: (start, response, end, dialogue)."""

    def __init__(self, path, tok):
        self.path, self.file = path, path.open('wb')
        self.dtype = 'uint16' if tok.vocab_size <= 2 ** 16 else 'uint32'
        self.tokens, self.bytes, self.rows = 0, 0, []

    def write(self, ids, text=b''):
        self.file.write(np.array(ids, self.dtype))
        self.tokens += len(ids)
        self.bytes += len(text)

    def close(self):
        """-> its entry in the manifest."""
        self.file.close()
        if self.rows:
            np.save(self.path.with_suffix('.rows.npy'), np.array(self.rows, np.int64))
        return {'name': self.path.stem, 'dtype': self.dtype, 'tokens': self.tokens, 'bytes': self.bytes,
                'examples': len(self.rows)}


def tokenize_source(job):
    """Tokenizes one source into a shard for each split -> {split: its entry in the manifest}."""
    number, source, val_every, folder, spec = job
    tok = get_tokenizer(own_tokenizer(spec, folder))
    done, made_from = folder / f'part_{number:05d}.json', None
    if isinstance(source, (str, Path)):
        state = Path(source).stat()
        made_from = [str(source), state.st_size, state.st_mtime_ns, val_every, tok.fingerprint(), tok.specials]
        before = read_json(done)
        if before.pop('made_from', None) == made_from:      # by an earlier call
            return before

    shards = {split: Shard(folder / f'{split}_{number:05d}.bin', tok) for split in ('train', 'val')}
    records = progress(read_records(source), desc='tokenizing', disable=number > 0 or None)
    dialogues, held_out = 0, ''
    for (where, split), run in groupby(placed(records, number, val_every), key=itemgetter(0, 1)):
        for _, _, piece in run:
            if isinstance(piece, str):
                shards[split].write(tok.encode(piece), piece.encode())
                continue

            write_example(shards[split], piece, where, dialogues, tok)
            dialogues += 1
            if split == 'val':
                held_out += json.dumps(piece, ensure_ascii=False) + '\n'
        if not dialogues:                                   # a document ends, or goes on in the other split
            shards[split].write([tok.eos_id])

    entry = {split: shard.close() for split, shard in shards.items()}
    if held_out:
        shards['val'].path.with_suffix('.jsonl').write_text(held_out, encoding='utf-8')
    if made_from:
        done.write_text(json.dumps({**entry, 'made_from': made_from}), encoding='utf-8')
    return entry


def placed(records, number, val_every):
    """Assigns records to splits: yields (where, split, piece of a document's text or whole example).

    Every val_every-th is held out: 1 all, 0 none. Pieces are counted from `number` on.
    """
    kinds = set()
    for where, record in records:
        kinds.add('text' in record)
        if len(kinds) > 1:
            raise Refused(f'{where}: a file holds documents ("text") or examples, not both')

        if 'text' in record:
            pieces = enumerate(chunks(record['text']), number + 1)
        else:
            pieces = [(checksum(record), record)]
        for number, piece in pieces:
            held_out = val_every and number % val_every == 0
            yield where, 'val' if held_out else 'train', piece


def checksum(record):
    """The number of an example, a hash of its first question, so that no question is in both splits.

    (Where several answers are right there may be few questions: those examples go by the whole record.)
    """
    if 'accept' in record:
        key = json.dumps(record, sort_keys=True)
    elif 'prompt_ids' in record:
        key = str(record['prompt_ids'])
    elif 'messages' in record:
        key = next(said['content'] for said in record['messages'] if said['role'] == 'user')
    else:
        key = record['response']
    return zlib.crc32(key.strip().encode())


def write_example(shard, record, where, dialogue, tok):
    """A dialogue of n answers is n examples, each with the whole history as its prompt (LLaDA, App. B.1)."""
    special = set(tok.specials.values())
    for prompt, response in turns_of(record, tok):
        start, ids = shard.tokens, [*prompt, *response, tok.eos_id]
        if max(ids) >= tok.vocab_size:
            raise Refused(f'{where}: an id is not below {tok.vocab_size}, the size of the vocabulary')
        shard.write(ids, tok.decode_bytes(i for i in ids if i not in special))
        shard.rows.append((start, start + len(prompt), shard.tokens, dialogue))


def turns_of(record, tok):
    """Yields the prompt of each answer of an example, and the answer, as ids.

    A response without a prompt gets BOS as its prompt: a canvas of masks alone looks the same everywhere, and
    needs an edge to count from.
    """
    if 'response' in record:
        yield [tok.bos_id], tok.encode(record['response'].strip())
    if 'prompt_ids' in record:
        yield record['prompt_ids'], record['response_ids']
    said = record.get('messages', ())
    for i, message in enumerate(said):
        if i and message['role'] == 'assistant':
            yield tok.encode_chat(said[:i]), tok.encode(message['content'].strip())


# ----------------------------------------------------------------------------------------------------------
# Loading: what is in a batch is a function of (seed, iteration)


class Corpus:
    """A prepared folder, its shards memory-mapped. share: which files are verified, see read_manifest."""

    def __init__(self, folder, share=(0, 1)):
        self.folder = Path(folder)
        if not (self.folder / 'manifest.json').is_file():
            how = MADE_BY.get(self.folder.name, f'data.py --input=FILE --out={folder}')
            raise FileNotFoundError(ENOENT, f'no data set here; run: python {how}', str(folder))

        self.manifest = read_manifest(self.folder, share)
        if self.manifest.get('format') != 'nanollada data 2':
            raise Refused(f'{folder}: a data set of another version; prepare it again')
        splits = self.manifest['splits']
        self.shards = {split: list(map(self._open, entries)) for split, entries in splits.items()}

    def _open(self, entry):
        path = self.folder / f"{entry['name']}.bin"
        size, want = path.stat().st_size, entry['tokens'] * np.dtype(entry['dtype']).itemsize
        if size != want:
            raise Refused(f'{path}: {size} bytes, the manifest says {want}; prepare the data again')
        return np.memmap(path, entry['dtype'], 'r')

    def tokenizer(self):
        """The tokenizer that made it."""
        return get_tokenizer(own_tokenizer(self.manifest['tokenizer'], self.folder))

    def count(self, split, what):
        """How many 'tokens', 'bytes' of text or 'examples' a split has."""
        return sum(entry[what] for entry in self.manifest['splits'][split])

    def read(self, split, start, length):
        """Tokens start .. start+length of a split, as if its shards were one array: (length,) int64."""
        parts = []
        for shard in self.shards[split]:
            if -length < start < len(shard):
                parts.append(shard[max(0, start):start + length])
            start -= len(shard)
        return np.concatenate(parts, dtype=np.int64)

    def rows(self, split):
        """Where a split's examples are, likewise: (n, 4) start, response, end, number of the dialogue."""
        tables, at, dialogue = [], 0, 0
        for entry in self.manifest['splits'][split]:
            rows = np.load(self.folder / f"{entry['name']}.rows.npy")
            tables.append(rows + [at, at, at, dialogue])
            at += entry['tokens']
            dialogue += 1 + rows[-1, 3]
        return np.concatenate(tables)


def open_dataset(name, share=(0, 1)):
    """The data set of a name, a folder or a mixture 'a:0.7,b:0.3' -> Dataset; `docs` is made on first use."""
    names, weights = [name], [1.0]
    if (',' in name or ':' in name) and not Path(name).is_dir():
        try:
            names, weights = zip(*(part.rsplit(':', 1) for part in name.split(',')))
            weights = list(map(float, weights))
        except ValueError:
            weights = [0.0]
        if not all(0 < weight < np.inf for weight in weights):
            raise Refused('dataset: a mixture is written name:weight,name:weight, weights above 0; got '
                          f'{name!r}')

    parts = [open_corpus(part.strip(), share) for part in names]
    for corpus in parts[1:]:
        check_same(corpus.tokenizer(), parts[0].tokenizer(), corpus.folder, parts[0].folder)
    return Dataset(parts, weights)


def open_corpus(name, share):
    """The Corpus of a folder, or of a name: a folder in data/."""
    folder = Path(name)
    if '/' not in name and not (folder / 'manifest.json').is_file():
        folder = Path('data') / name
    if name == 'docs' and not (folder / 'manifest.json').is_file():
        records, tokenizer, what = DATASETS[name]
        print(f'preparing data/{name} (once): {what}')
        prepare([list(records())], folder, tokenizer)
    return Corpus(folder, share)


def check_same(theirs, ours, name, folder):
    """Refused if the tokenizer of a checkpoint or corpus is not that of a data set."""
    if theirs.fingerprint() != ours.fingerprint():
        raise Refused(f'{name}: its tokenizer is not the one of {folder}')


def open_source(dataset, split, masking, tok, seq_len, seed=0, **cuts):
    """The rows of a split as training sees them: Examples for masking 'response', else Windows.

    dataset: a Dataset. cuts: fields of Cuts. Both have batch, held_out and bytes_per_token.
    """
    kind = Examples if masking == 'response' else Windows
    return kind(dataset, split, tok, seq_len, seed, Cuts(**cuts))


def shuffled(index, n, key):
    """Where a random permutation of range(n) sends index: a Feistel network over 4^k >= n, no memory."""
    half = max(1, (n - 1).bit_length() + 1 >> 1)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for k in key:
            scrambled = (right ^ k) * 0x9E3779B97F4A7C15 % 2 ** 64
            scrambled = (scrambled ^ scrambled >> 29) * 0xBF58476D1CE4E5B9 % 2 ** 64
            left, right = right, left ^ (scrambled >> 32) & low
        index = left << half | right
        if index < n:                                       # outside: walk the cycle until it comes back
            return index


def philox(seed, number, stream, index=0):
    """A numpy generator. Streams: 0 noise of rows (diffusion.row_noise), 1 orders, 2 turns, 3 cuts."""
    return np.random.Generator(np.random.Philox(key=[seed, number], counter=[0, 0, stream, index]))


def nth(sample, n, seed, slack=1):
    """Sample number `sample` of an endless stream that goes through n things, in a new order every epoch.

    -> (epoch, which of the n, the epoch's own offset below slack).
    """
    epoch, index = divmod(int(sample), n)
    rng = philox(seed, epoch, 1)
    offset = int(rng.integers(slack))
    key = rng.integers(2 ** 63, size=4).tolist()
    return epoch, shuffled(index, n, key), offset


def evenly(n, limit):
    """`limit` of the numbers 0 .. n-1, evenly spread; all of them for 0."""
    limit = min(limit or n, n)
    return [i * n // limit for i in range(limit)]


class Windows:
    """Windows of seq_len tokens, everything in them maskable; the stream is cut anew each epoch.         Eq. 3

    Cuts: random_length is the share of windows of which only a random length is kept (LLaDA: 0.01),
    random_split the share cut into two parts that do not attend to each other (iLLaDA: 0.3). isolate: nor do
    documents, with borders behind each EOS. times: how many successive rows each window fills.
    """

    logit_normal = 0.5                                      # not in the papers: a better bound per update

    def __init__(self, dataset, split, tok, seq_len, seed=0, cuts=WHOLE):
        self.parts, self.split, self.tok = dataset.parts, split, tok
        self.T, self.seed, self.asked = seq_len, seed, cuts
        self.examples = sum(corpus.count(split, 'examples') for corpus in self.parts)
        self.tokens = [corpus.count(split, 'tokens') for corpus in self.parts]
        for corpus, n in zip(self.parts, self.tokens):
            if n < seq_len:
                raise Refused(f'{corpus.folder}: split {split} is too short for a window of {seq_len} tokens: '
                              f'it has {n}')

        # each part gives its share of every 1000 windows, in a fixed order
        self.share = np.array(dataset.weights) / sum(dataset.weights)
        turns = np.floor(self.share * 1000).astype(int)
        missing = 1000 - turns.sum()
        turns[np.argsort(turns - self.share * 1000)[:missing]] += 1          # the largest remainders round up
        if turns.min() == 0:
            raise Refused('dataset: a weight is less than a thousandth of the whole')
        self.turns = philox(0, 0, 1).permutation(np.repeat(np.arange(len(turns)), turns))

        each = [corpus.count(split, 'bytes') / n for corpus, n in zip(self.parts, self.tokens)]
        self.bytes_per_token = float(self.share @ each)

    def window(self, sample):
        """Window number `sample` of an endless, shuffled stream: (seq_len,) int64."""
        turn, slot = divmod(sample, len(self.turns))
        which = self.turns[slot]
        mine = self.turns == which
        number, total = turn * mine.sum() + mine[:slot].sum(), self.tokens[which]

        n = max(1, (total - self.T + 1) // self.T)          # windows that fit behind any offset
        _, index, offset = nth(number, n, self.seed, min(self.T, total - n * self.T + 1))
        return self.parts[which].read(self.split, offset + index * self.T, self.T)

    def cuts(self, it, size):
        """For each window of an iteration, how many tokens are kept, and where a border lies (T: nowhere)."""
        which, where = philox(self.seed, it, 3).random((size, 2)).T
        short = which < self.asked.random_length
        split = ~short & (which < self.asked.random_length + self.asked.random_split)
        keep = np.where(short, 1 + (where * self.T).astype(int), self.T)
        border = np.where(split, 1 + (where * (self.T - 1)).astype(int), keep)
        return keep, border

    def batch(self, it, rows, size):
        """Rows `rows` (a range) of the `size` windows of iteration `it` -> Batch. Every window once an epoch."""
        windows = [self.window((it * size + row) // self.asked.times) for row in rows]
        x0 = torch.from_numpy(np.stack(windows))
        keep, border = (cut[rows] for cut in self.cuts(it, size))
        maskable = torch.arange(self.T) < torch.from_numpy(keep)[:, None]
        if not self.asked.isolate and border.min() == self.T:
            return Batch(x0, maskable, None)

        starts = np.arange(0, x0.numel() + 1, self.T)
        borders = np.union1d(starts, starts[:-1] + border)
        n = 2 * len(x0) + 1                                 # few different sizes: few graphs to compile
        if self.asked.isolate:
            borders = np.union1d(borders, np.flatnonzero(x0 == self.tok.eos_id) + 1)
            n = -(-len(borders) // 64) * 64
        borders = np.pad(borders, (0, n - len(borders)), 'edge')
        return Batch(x0, maskable, torch.from_numpy(borders).int())

    def held_out(self, limit=0):
        """The split in order, less a last partial window: [(x0, maskable)], (n, T) both, bytes of text in a row."""
        x0 = []
        for corpus, tokens, share in zip(self.parts, self.tokens, self.share):
            n = limit
            if len(self.parts) > 1:                         # each part of a mixture gives its share
                n = max(1, round(share * (limit or 1000)))
            x0 += [corpus.read(self.split, i * self.T, self.T) for i in evenly(tokens // self.T, n)]
        x0 = torch.from_numpy(np.stack(x0))
        return [(x0, torch.ones_like(x0, dtype=torch.bool))], self.T * self.bytes_per_token


class Examples:
    """One example per row, EOS up to the longest of pad_group rows: LLaDA's fine-tuning.       Eq. 5

    The response, its EOS and the padding are maskable, hence counted as L' (App. B.1); the prompt is not.
    Of Cuts only pad_group and times apply, the latter for how many successive rows each example fills.
    """

    bytes_per_token = None
    logit_normal = 0.0                                      # an answer begins at t = 1: that must be trained

    def __init__(self, dataset, split, tok, seq_len, seed=0, cuts=WHOLE):
        self.corpus, self.split, self.tok, self.seed = dataset.parts[0], split, tok, seed
        self.T, self.asked = seq_len, cuts
        self.examples = self.corpus.count(split, 'examples')
        if len(dataset.parts) > 1 or not self.examples:
            raise Refused(f"{self.corpus.folder}: masking = 'response' needs one set of examples, made of "
                          '"messages" or "prompt" and "response"')

        rows = self.corpus.rows(split)
        short = rows[:, 2] - rows[:, 0] <= seq_len
        told = (f'{self.corpus.folder}: {(~short).sum()} of {len(rows)} examples of {split} are longer than '
                f'seq_len = {seq_len}')
        if not short.any():
            raise Refused(told)
        if not short.all() and os.environ.get('RANK', '0') == '0':
            say(f'{told} and left out')

        self.rows = rows[short]
        _, first_turns = np.unique(self.rows[:, 3], return_index=True)
        self.borders = np.append(first_turns, len(self.rows))                # where each dialogue begins

    def drawn(self, samples):
        """Examples by number in an endless stream, (n, 4): every dialogue once an epoch, one random turn of it.

        The other turns have to wait for another epoch (issue 77 of the official repository).
        """
        chosen = []
        for sample in samples:
            epoch, dialogue, _ = nth(sample, len(self.borders) - 1, self.seed)
            turns = self.borders[dialogue:dialogue + 2]
            chosen.append(philox(self.seed, epoch, 2, dialogue).integers(*turns))
        return self.rows[chosen]

    def batch(self, it, rows, size):
        """Rows `rows` (a range inside a group) of the `size` examples of iteration `it` -> Batch."""
        each = self.asked.pad_group
        start = rows.start // each * each
        stop = max(rows.stop, min(start + each, size))
        group = self.drawn([(it * size + row) // self.asked.times for row in range(start, stop)])
        longest = int((group[:, 2] - group[:, 0]).max())
        return Batch(*self.padded(group[rows.start - start:rows.stop - start], longest), None)

    def padded(self, rows, length):
        """Examples (n, 4) -> x0 (n, length), maskable (n, length)."""
        x0 = torch.full((len(rows), length), self.tok.eos_id)
        maskable = torch.arange(length) >= torch.from_numpy(rows[:, 1] - rows[:, 0])[:, None]
        for row, (start, _, end, _) in zip(x0, rows.tolist()):
            row[:end - start] = torch.from_numpy(self.corpus.read(self.split, start, end - start))
        return x0, maskable

    def held_out(self, limit=0):
        """The examples by length: [(x0 (n, T), maskable (n, T)), ...] for several T, bytes of text in a row.

        Each is padded to a multiple of 32, so that its loss does not depend on which others are there.
        """
        rows = self.rows[evenly(len(self.rows), limit)]
        length = -(-(rows[:, 2] - rows[:, 0]) // 32) * 32
        length = np.minimum(length, self.T)
        groups = [self.padded(rows[length == T], int(T)) for T in np.unique(length)]

        ends = (self.tok.eos_id, self.tok.pad_id)
        answers = (i for x0, maskable in groups for i in x0[maskable].tolist() if i not in ends)
        return groups, len(self.tok.decode_bytes(answers)) / len(rows)


# ----------------------------------------------------------------------------------------------------------


def files_of(patterns):
    """File names and patterns, list of str -> list of file names."""
    found = []
    for pattern in filter(None, patterns):
        found += sorted(glob.glob(pattern)) or [pattern]
    return found


def main(config):
    cfg = SimpleNamespace(**config)
    sources, held_out = files_of(cfg.input.split(',')), files_of(cfg.val_input.split(','))
    own = 'for your own text: --input=FILE --out=data/my'
    if not cfg.name and not sources:
        lines = [f'  {name:<12} {what}' for name, (_, _, what) in DATASETS.items()]
        print('data sets:', *lines, f'{own}; see --help', sep='\n')
        return

    if cfg.name and cfg.name not in DATASETS:
        raise Refused(f"no data set {cfg.name!r}; there are {', '.join(DATASETS)}; {own}")
    if not cfg.name and not cfg.out:
        raise Refused('--input needs --out=FOLDER')
    if cfg.val_every < 2 or cfg.workers < 0:
        raise Refused(f'val_every must be 2 or more and workers 0 or more, got {cfg.val_every} and {cfg.workers}')

    records, tokenizer, _ = DATASETS.get(cfg.name, (None, 'bpe-1024', ''))
    out = cfg.out or f'data/{cfg.name}'
    prepare(sources or [list(records())], out, cfg.tokenizer or tokenizer, val=held_out,
            val_every=cfg.val_every, workers=cfg.workers or os.cpu_count() or 1)

    corpus = Corpus(out, None)
    for split, shards in corpus.shards.items():
        tokens, size = corpus.count(split, 'tokens'), corpus.count(split, 'bytes')
        print(f'{out}/{split}: {tokens:,} tokens, {size / tokens:.2f} bytes each, {len(shards)} shard(s)')
    how = ' --masking=response' if corpus.count('train', 'examples') else ''
    print(f'train on it:  python train.py --dataset={out}{how} --out_dir=out/{Path(out).name}')


if __name__ == '__main__':
    command(main, globals(), positional=('name',))
