"""Text becomes ids, ids become files, and files become batches.

    python data.py --input=a.txt,b.jsonl --out=data/my
    python data.py --input="talks/*.jsonl" --out=data/talks --tokenizer=gpt2

A data set is a folder: a tokenizer, token ids (train_00000.bin, val_00000.bin) and a manifest of them.
Batches have no state: the rows of iteration `it` are a function of (seed, it, row). So a run resumes from a
number, on any number of processes.

Letters: B batch, T sequence length (tokens per row of a batch).
"""

import ast
import functools
import glob
import gzip
import json
import math
import os
import re
import shlex
import shutil
import time
import zlib
from array import array
from collections import namedtuple
from dataclasses import dataclass
from itertools import chain, count, groupby
from pathlib import Path

import jinja2
import numpy as np
import tiktoken
import tokenizers
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.random import default_rng
from tokenizers import decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

from configurator import UserError, read_json, run, say

input = ''                      # your files or patterns, with commas between: .txt .jsonl(.gz) .json .parquet
val_input = ''                  # files to hold out, likewise. Default: hold out a part of the input
out = ''                        # folder to write. A data set that is there is replaced
tokenizer = 'bpe-1024'          # bytes, bpe-N (learned), gpt2 or another tiktoken name, or a tokenizer.json
val_every = 10                  # hold out every N-th piece of a document, or one in N examples

# ----------------------------------------------------------------------------------------------------------
# 1. Tokenizers. The library `tokenizers` does the work, so that ids are the same as everywhere else.

# What special tokens are called, first in LLaDA's release, which our own vocabularies follow, then elsewhere.
# LLaDA pads with EOS.
ROLES = {
    'bos': '<|startoftext|> <s> <|begin_of_text|>',
    'eos': '<|endoftext|> </s> <|end_of_text|>',
    'mask': '<|mdm_mask|> <[MASK]> [MASK] <mask>',
    'start_header': '<|start_header_id|>',
    'end_header': '<|end_header_id|>',
    'eot': '<|eot_id|> <eot_id>',
    'pad': '<|endoftext|> </s> <|end_of_text|>'}
LLADA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
# GPT-2's words, but digits stand alone, so that a number has the same tokens wherever it is.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# A code point that no text contains, because Unicode reserves it.
BREAK = '\U0010ffff'


class Tokenizer:
    """Turn text into ids and back. mask_id, eos_id, pad_id, bos_id, eot_id: the special tokens, int or None.

    hf: a tokenizers.Tokenizer. config: what is in tokenizer_config.json, which may name special tokens.
    complete: add those of ROLES that are missing, unless there are a mask and an EOS.
    """

    def __init__(self, hf, config=(), template=None, complete=True):
        self.hf = hf
        self.names = {}
        # some files cut or fill up a text, but here it is always encoded as it is
        hf.no_truncation()
        hf.no_padding()

        vocab = hf.get_vocab()
        added = hf.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special}
        best = {}
        for role, usual in ROLES.items():
            named = dict(config).get(f'{role}_token')
            if isinstance(named, dict):
                named = named['content']
            names = [named, *usual.split()]
            best[role] = next((name for name in names if name in vocab), named or names[1])

        # with a mask it is the vocabulary of released weights, which know no other tokens
        complete = complete and not {best['mask'], best['eos']} <= vocab.keys()
        for role, name in best.items():
            if complete or name in vocab:
                # Some files have the token but do not call it special.
                # Then its name in a text would be read as the token.
                if name not in special:
                    hf.add_special_tokens([name])
                self.names[f'{role}_token'] = name
            setattr(self, f'{role}_id', hf.token_to_id(name))

        vocab = hf.get_vocab()
        self.ids = set(vocab.values())
        self.vocab_size = max(self.ids) + 1
        # our own vocabularies have no template, and speak like LLaDA
        self.template = template or ('<|eot_id|>' in vocab and LLADA_TEMPLATE)
        # finds the name of any special token, the longest one first
        special = map(re.escape, special.union(self.names.values()))
        self.special = re.compile('|'.join(sorted(special, reverse=True)) or '(?!)')

    def encode(self, text, special_names=False):
        """Return the ids of a text. special_names: the name of a special token is that token."""
        self.hf.encode_special_tokens = not special_names
        return self.hf.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts):
        """Return the ids of each of many texts, encoded by all processors."""
        self.hf.encode_special_tokens = True
        return [encoding.ids for encoding in self.hf.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids, skip_special_tokens=False):
        """Return the text of ids. Half a character becomes U+FFFD, an id without a token nothing."""
        return self.hf.decode(list(map(int, ids)), skip_special_tokens=skip_special_tokens)

    def encode_chat(self, messages, continued=True):
        """Return the ids of a conversation [{'role', 'content'}, ...] and of the assistant's header.

        continued: if the last message is by the assistant, it is left open instead.
        """
        if continued and messages and messages[-1]['role'] == 'assistant':
            begun = self.encode(messages[-1]['content'].strip())
            return self.encode_chat(messages[:-1]) + begun

        # A template that drops or changes what somebody says would do so silently. So we try it with a
        # content that is easy to find.
        probe = 'Some content.'
        if self.render(messages, lambda content: probe).count(probe) != len(messages):
            raise UserError('the chat template of the tokenizer drops, repeats or changes contents')

        # If somebody types the name of a special token, it stays text. We put a BREAK before and behind it,
        # so that every other part is such a name. All the rest is encoded as transformers does.
        text = self.render(
            messages, lambda content: self.special.sub(rf'{BREAK}\g<0>{BREAK}', content.replace(BREAK, '')))
        ids = []
        for i, part in enumerate(text.split(BREAK)):
            ids += self.encode(part, special_names=i % 2 == 0)
        return ids

    def render(self, messages, change):
        """Return the text that the chat template makes of messages, after a change of their contents."""
        if not self.template:
            raise UserError('the tokenizer has no chat template; put a chat_template.jinja beside it')
        messages = [message | {'content': change(message['content'])} for message in messages]
        try:
            template = compile_template(self.template)
            return template.render(messages=messages, tools=None, add_generation_prompt=True, **self.names)
        except jinja2.TemplateError as error:
            raise UserError(f'the chat template of the tokenizer says: {error}') from None

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json, for get_tokenizer and for transformers."""
        self.hf.save(f'{folder}/tokenizer.json')
        config = {
            'tokenizer_class': 'PreTrainedTokenizerFast',
            'chat_template': self.template or None,
            **self.names}
        Path(folder, 'tokenizer_config.json').write_text(json.dumps(config, indent=1))

    def fingerprint(self):
        """Return a long text, the same for two tokenizers that encode every text to the same ids."""
        # special tokens stand in no text (those of a chat are named by LLaDA's Instruct, but not by Base)
        file = json.loads(self.hf.to_str())
        del file['post_processor']                          # which adds some to a text, but not here
        file['added_tokens'] = [token for token in file['added_tokens'] if not token['special']]
        return f'{self.mask_id} {self.eos_id} {file}'

    def unused(self, vocab_size):
        """Return the ids below vocab_size that are no token: a network may have more outputs than tokens."""
        return sorted(set(range(vocab_size)) - self.ids)


@functools.lru_cache
def compile_template(source):
    """Compile a chat template, with what transformers offers to it."""
    # it is a stranger's program, so it runs in a sandbox
    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols'])
    environment.filters['tojson'] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals.update(raise_exception=raise_exception, strftime_now=time.strftime)
    return environment.from_string(source)


def get_tokenizer(spec, complete=True):
    """Return the Tokenizer of 'bytes', a tiktoken name, a tokenizer.json, or a folder that holds one."""
    if spec == 'bytes':
        vocab = {symbol: byte for byte, symbol in byte_symbols().items()}
        return Tokenizer(byte_level(vocab))
    if spec in tiktoken.list_encoding_names():
        return from_tiktoken(tiktoken.get_encoding(spec))

    # any other tokenizer is a file in the format of Hugging Face
    path = Path(spec)
    if path.is_dir():
        path /= 'tokenizer.json'
    if not path.is_file():
        raise UserError(f'{spec}: unknown tokenizer; expected a tokenizer.json, its folder, bytes, bpe-N, '
                        f'or {", ".join(tiktoken.list_encoding_names())}')

    config = read_json(path.with_name('tokenizer_config.json'))
    template = config.get('chat_template')
    if isinstance(template, list):
        template = {entry['name']: entry['template'] for entry in template}.get('default')
    # where transformers saves a template today
    beside = path.with_name('chat_template.jinja')
    if beside.is_file():
        template = beside.read_text(encoding='utf-8')
    return Tokenizer(tokenizers.Tokenizer.from_file(str(path)), config, template, complete)


def tokenizer_of(meta):
    """Return the Tokenizer of loaded weights, which must agree with their config.json (meta of load_model)."""
    tok = get_tokenizer(meta['folder'], complete=False)
    for key in 'mask_id eos_id pad_id bos_id eot_id'.split():
        ids = {meta[key], getattr(tok, key)} - {None}
        # a guess, such as the unknown token for the mask, would go wrong silently
        if key in ('mask_id', 'eos_id') and len(ids) != 1:
            raise UserError(f'{meta["folder"]}: config.json and tokenizer must give one {key}, got {ids or "none"}')
        if meta[key] is not None:
            setattr(tok, key, meta[key])
    return tok


def check_same(tok, other, where, elsewhere):
    """Raise UserError unless two tokenizers encode alike."""
    if tok.fingerprint() != other.fingerprint():
        raise UserError(f'{where}: its tokenizer is not the one of {elsewhere}')


def byte_symbols():
    """Return byte -> character: GPT-2's printable ones, in which vocabularies spell their tokens."""
    symbols = {}
    others = count(256)
    for byte in range(256):
        # those that leave no ink are replaced by the first characters behind the 256
        visible = chr(byte) in ByteLevel.alphabet()
        symbols[byte] = chr(byte if visible else next(others))
    return symbols


def byte_level(vocab, merges=(), words=WORDS):
    """Return a tokenizers.Tokenizer: byte-pair encoding inside of what the pattern `words` finds."""
    # tiktoken looks up a whole word before it merges. For other vocabularies this changes nothing.
    hf = tokenizers.Tokenizer(BPE(vocab, list(merges), ignore_merges=True))
    hf.pre_tokenizer = Sequence([
        Split(tokenizers.Regex(words), 'isolated'),
        ByteLevel(add_prefix_space=False, use_regex=False)])
    hf.decoder = decoders.ByteLevel()
    return hf


def from_tiktoken(encoding):
    """Return a tiktoken.Encoding as a Tokenizer."""
    ranks = encoding._mergeable_ranks
    special = encoding._special_tokens
    symbols = byte_symbols()
    vocab = {}
    merges = []
    # tiktoken joins any two neighbours that make a token, lowest rank first. So the merges are all ways to
    # cut a token in two, in order of rank. (Llama 3's tokenizer.json lists them like this, too.)
    for token in sorted(ranks, key=ranks.get):
        word = token.decode('latin-1').translate(symbols)
        vocab[word] = ranks[token]
        for i in range(1, len(token)):
            if token[:i] in ranks and token[i:] in ranks:
                merges.append((word[:i], word[i:]))

    # {1,3}+ means at most three digits in tiktoken, and any number of them here
    words = encoding._pat_str.replace('{1,3}+', '{1,3}')
    # special tokens are in the vocabulary, too, because their ids may leave gaps
    hf = byte_level(vocab | special, merges, words)
    hf.add_special_tokens(list(special))
    return Tokenizer(hf)


def learn_tokenizer(texts, vocab_size):
    """Learn a byte-level vocabulary of at most vocab_size tokens, special tokens included -> Tokenizer."""
    hf = byte_level({})
    # the single bytes come first, then what is learned, and special tokens last
    hf.train_from_iterator(texts, BpeTrainer(
        vocab_size=vocab_size - len(set(ROLES.values())), min_frequency=2,
        initial_alphabet=ByteLevel.alphabet(), show_progress=False))
    return Tokenizer(hf)


# ----------------------------------------------------------------------------------------------------------
# 2. Records. {"text"} is a document, {"messages"} or {"response"} an example for fine-tuning.


def docs_text():
    """Yield records of text that comes with Python: pydoc's language reference, docstrings of its library.

    About 1.5 million characters, which vary a little with the Python version.
    """
    from pydoc_data.topics import topics
    # a dict of reStructuredText, which help() shows
    texts = ['\n\n'.join(topics[key] for key in sorted(topics))]
    root = Path(ast.__file__).parent
    skip = set('test tests idlelib lib2to3 turtledemo turtle.py pydoc_data site-packages tkinter encodings'
               .split())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

    # modules are parsed, never imported
    for file in sorted([*root.glob('*.py'), *root.glob('*/*.py')]):
        inside = file.relative_to(root).parts
        if skip & set(inside) or inside[0].startswith('_'):
            continue
        nodes = ast.walk(ast.parse(file.read_bytes()))
        docs = [ast.get_docstring(node) for node in nodes if isinstance(node, documented)]
        texts.append('\n\n'.join(filter(None, docs)))

    # many classes repeat the words of others
    seen = {''}
    for text in texts:
        fresh = []
        for paragraph in text.split('\n\n'):
            if paragraph.strip() not in seen:
                fresh.append(paragraph.strip('\n'))
                seen.add(paragraph.strip())
        if fresh:
            yield 'docs', {'text': '\n\n'.join(fresh) + '\n'}


# what a file or a row raises that is not what its name or its keys promise
BROKEN = (ValueError, TypeError, LookupError, AttributeError, EOFError, gzip.BadGzipFile)


def read_records(source, accept=None):
    """Yield (where, record) of a file. A .txt is one document, and the other formats have a record per row.

    accept: turns a row, a dict, into a record, or raises ValueError. Default: as_record.
    Raises UserError with file:line, or file:row.
    """
    # a list of (where, record) is fine, too
    if not isinstance(source, (str, Path)):
        yield from source
        return

    # where an error is, if it comes before the first row
    number = 1
    try:
        for number, row in enumerate(read_rows(Path(source)), 1):
            if isinstance(row, bytes):
                row = row.strip() and json.loads(row)
            # an empty line is no record
            if row == b'':
                continue
            if not isinstance(row, dict):
                raise ValueError(f'expected an object {{...}}, got {row!r:.60}')
            yield f'{source}:{number}', (accept or as_record)(row)
    except BROKEN as error:
        # a .txt is one row of many lines
        if isinstance(error, UnicodeDecodeError):
            number += error.object.count(b'\n', 0, error.start)
        if isinstance(error, json.JSONDecodeError):
            error = 'this is not JSON'
        raise UserError(f'{source}:{number}: {error}') from None


def read_rows(path):
    """Yield the rows of a file: a dict, or a line of JSON as bytes."""
    if path.suffix == '.txt':
        yield {'text': path.read_bytes()}
    elif path.suffix == '.json':
        yield from json.loads(path.read_bytes())
    elif path.suffix == '.parquet':
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise ValueError('reading .parquet needs one more package: pip install pyarrow') from None
        for batch in ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    elif '.jsonl' in path.suffixes:
        yield from gzip.open(path) if path.suffix == '.gz' else path.open('rb')
    else:
        raise ValueError('unknown format; expected .txt, .jsonl, .jsonl.gz, .json or .parquet')


def as_record(row):
    """Return a row as a record with "messages", "text" or "response", or raise ValueError."""
    # the two sides of an example become messages, whatever they are called (TRL, Alpaca, ShareGPT)
    talks = values_of(row, 'messages conversations conversation')
    talks = [talk for talk in talks if talk and isinstance(talk, list)]
    asked = values_of(row, 'prompt question instruction')
    answers = values_of(row, 'response answer completion output')
    if asked and answers:
        # what Alpaca's instruction is about
        if row.get('input'):
            asked[0] = as_text(asked[0]) + '\n\n' + as_text(row['input'])
        talks.append([
            {'role': 'user', 'content': asked[0]},
            {'role': 'assistant', 'content': answers[0]}])

    # messages come first, because public data sets carry the same text beside them
    record = {key: row[key] for key in row if key != 'text'}
    if talks:
        record['messages'] = list(map(as_message, talks[0]))
        if record['messages'][-1]['role'] != 'assistant':
            raise ValueError('the last message must be by the assistant')
        return record

    key = 'text' if 'text' in row else 'response'
    if key not in row:
        raise ValueError(f'expected text, messages, or prompt and response; got the keys {list(row)}')
    record[key] = as_text(row[key])
    return record


def values_of(row, keys):
    """Return the values of those of the keys that a row has."""
    return [row[key] for key in keys.split() if key in row]


def as_message(message):
    """Return a message as {"role", "content"}, two texts that are not empty, or raise ValueError."""
    role = as_text(message.get('role', message.get('from')))
    content = message.get('content', message.get('value'))
    # in parts, as OpenAI has them
    if isinstance(content, list):
        content = ''.join(part['text'] for part in content)
    role = {'human': 'user', 'gpt': 'assistant'}.get(role, role)
    return {'role': role, 'content': as_text(content)}


def as_text(value):
    """Return a text that is not empty, or raise ValueError."""
    # of a .txt, or a binary column of a .parquet
    if isinstance(value, bytes):
        value = value.decode('utf-8-sig')
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'expected a text that is not empty, got {value!r:.60}')
    # half a surrogate pair is not text
    value.encode()
    return value


# ----------------------------------------------------------------------------------------------------------
# 3. Preparing. Records become files of token ids.

FORMAT = 'nanollada data 3'
SPLITS = ('train', 'val')
# Pieces of about 4 kB, cut at line ends, else at spaces, else anywhere.
PIECE = re.compile(r'(?s).{4096,8191}?\n|.{4096,8191}?(?= )|.{1,8192}')


def prepare(sources, out, tokenizer, *, val=(), val_every=10):
    """Tokenize sources (files, or lists of (where, record)) into the folder `out` -> its manifest.

    val: sources to hold out. If there are none, one piece in val_every is held out of the others.
    tokenizer: what get_tokenizer takes, or bpe-N to learn N tokens from the training pieces. The text must fit
    into memory.
    """
    # refuse before there is anything to lose
    out = Path(out).resolve()
    # other programs have a manifest.json, too, so we look whether it is ours, and lists all that is there
    before = read_json(out / 'manifest.json')
    others = {path.name for path in out.glob('*')}
    if 'nanollada' in str(before.get('format')):
        others -= {'manifest.json', *before['files']}
    if others:
        raise UserError(f'{out} holds files that are no data set, such as {min(others)}; choose another one')
    if before:
        say(f'{out}: the data set that is there will be replaced')
    parts = []
    for number, source in enumerate(sources):
        parts += split_source(source, number, 0 if val else val_every)
    for source in val:
        parts += split_source(source, 0, 1)

    size = tokenizer.removeprefix('bpe-')
    if size.isdecimal():
        texts = [text_of(record) for split, record in parts if split == 'train']
        tok = learn_tokenizer(texts, int(size))
    else:
        tok = get_tokenizer(tokenizer)
    # in uint16, id 126336 would silently become 60800
    dtype = 'uint16' if tok.vocab_size <= 2 ** 16 else 'uint32'
    manifest = {'format': FORMAT, 'dtype': dtype, 'splits': {}}

    # written under another name and then renamed, so that a data set is complete or absent
    aside = out.with_name(f'.{out.name}.{os.getpid()}')
    aside.mkdir(parents=True)
    try:
        tok.save(aside)
        for split in SPLITS:
            records = [record for which, record in parts if which == split]
            if not records:
                raise UserError('not enough text to hold out a validation split; give more, or --val_input=FILE')
            manifest['splits'][split] = write_split(records, tok, aside / f'{split}_00000.bin', dtype)

        manifest['files'] = sorted(path.name for path in aside.iterdir())
        (aside / 'manifest.json').write_text(json.dumps(manifest, indent=1))
        shutil.rmtree(out, ignore_errors=True)
        aside.replace(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return manifest


def split_source(source, number, every):
    """Yield (split, record) of a source, with one in `every` held out (0: none). Documents come in parts."""
    # sources begin at different numbers, or else no file of less than `every` pieces would be held out
    numbers = count(number + 1)
    for _, record in read_records(source):
        if 'text' in record:
            # some pieces of it, spread evenly, because its tail would share long passages with the rest
            pieces = PIECE.findall(record['text'])
            # (a bool is an index: SPLITS[True] is 'val')
            for held_out, part in groupby(pieces, lambda piece: every and next(numbers) % every == 0):
                yield SPLITS[held_out], {'text': ''.join(part)}
            continue

        # By a hash of the first question, so that no question is in both splits. If many answers are right
        # ("accept"), there may be too few questions for that.
        asked = [message['content'] for message in record.get('messages', []) if message['role'] == 'user']
        key = (asked or [record.get('response', '')])[0].strip()
        if 'accept' in record:
            key = json.dumps(record, sort_keys=True, default=str)
        held_out = every and zlib.crc32(key.encode()) % every == 0
        yield SPLITS[held_out], record


def text_of(record):
    """Return all text of a document or an example."""
    said = chain(*map(dict.values, record.get('messages', [])))
    return record.get('text') or '\n\n'.join(said) or record['response']


def turns_of(record, tok):
    """Tokenize a record -> [(prompt ids, response ids), ...], one pair for each answer."""
    if 'text' in record:
        # a document is a response without a prompt
        pieces = PIECE.findall(record['text'])
        return [([], list(chain(*tok.encode_batch(pieces))))]
    if 'messages' in record:
        # the prompt of an answer is all that was said before (LLaDA, App. B.1)
        turns = []
        for i, message in enumerate(record['messages']):
            if i and message['role'] == 'assistant':
                prompt = tok.encode_chat(record['messages'][:i], continued=False)
                turns.append((prompt, tok.encode(message['content'].strip())))
        return turns
    # a canvas of masks alone looks the same everywhere, so positions need an edge to count from
    response = tok.encode(record['response'].strip())
    return [([tok.bos_id], response)]


def write_split(records, tok, path, dtype):
    """Tokenize and write the records of a split -> {'tokens', 'bytes', 'examples'}, how many it has."""
    ids = array('I')
    rows = []
    n_bytes = 0
    for dialogue, record in enumerate(records):
        for prompt, response in turns_of(record, tok):
            start = len(ids)
            ids.extend([*prompt, *response, tok.eos_id])
            text = tok.decode(ids[start:], skip_special_tokens=True)
            n_bytes += len(text.encode())
            # documents are no rows, because windows are cut from all of them
            if prompt:
                rows.append((start, start + len(prompt), len(ids), dialogue))

    path.write_bytes(np.array(ids, dtype))
    if rows:
        # where the examples are, and of those that are held out also the text, which evaluate.py asks again
        np.save(path.with_suffix('.rows.npy'), rows)
        if path.name.startswith('val'):
            lines = [json.dumps(record, default=str) + '\n' for record in records]
            path.with_suffix('.jsonl').write_text(''.join(lines))
    return {'tokens': len(ids), 'bytes': n_bytes, 'examples': len(rows)}


# ----------------------------------------------------------------------------------------------------------
# 4. Loading. Files become batches.

Dataset = namedtuple('Dataset', 'parts weights')            # lists of Corpus and of float
OFFSET, CUTS, TURNS, MIXTURE = range(1, 5)                  # what random numbers are for


class Corpus:
    """A prepared folder, or the name of one in data/. facts: split -> counts of tokens, bytes, examples."""

    def __init__(self, name):
        self.folder = Path(name)
        if not (self.folder / 'manifest.json').is_file():
            self.folder = Path('data', name)
        manifest = read_json(self.folder / 'manifest.json')
        if manifest.get('format') != FORMAT:
            raise UserError(f'{name}: no data set, or one of another version; make it: python data.py '
                            f'--input=FILE --out=data/{Path(name).name}, or for world, instruct and facts: '
                            'python tests/lab/worlds.py')

        self.facts = manifest['splits']
        self.tokens = {}
        for split in SPLITS:
            # mapped into memory, not read
            path = self.folder / f'{split}_00000.bin'
            self.tokens[split] = np.memmap(path, manifest['dtype'], 'r')

    def tokenizer(self):
        """Return the Tokenizer that made it."""
        return get_tokenizer(self.folder)

    def read(self, split, start, end):
        """Return the tokens start .. end of a split, int64."""
        return torch.from_numpy(self.tokens[split][start:end].astype(np.int64))


def open_dataset(name):
    """Return the Dataset of a name in data/, a folder, or a mixture 'a:0.7,b:0.3'."""
    if name == 'docs' and not Path('data/docs').exists():
        say('preparing data/docs, once')
        prepare([list(docs_text())], 'data/docs', 'bpe-4096')
    if ':' not in name or Path(name).is_dir():
        return Dataset([Corpus(name)], [1.])

    names, weights = zip(*(part.rsplit(':', 1) for part in name.split(',')))
    parts = list(map(Corpus, names))
    for corpus in parts:
        check_same(corpus.tokenizer(), parts[0].tokenizer(), corpus.folder, names[0])
    return Dataset(parts, list(map(float, weights)))


def a_question(name):
    """Return the first question of a data set's held-out conversations, None if it has none."""
    file = open_dataset(name).parts[0].folder / 'val_00000.jsonl'
    if file.is_file():
        _, record = next(read_records(file))
        return record.get('messages', [{}])[0].get('content')


def open_source(dataset, split, masking, tok, seq_len, seed=0, **options):
    """Return the rows of a split as training sees them: Examples if masking is 'response', else Windows."""
    kind = Examples if masking == 'response' else Windows
    return kind(dataset, split, tok, seq_len, seed, **options)


@functools.lru_cache(4)
def shuffled(n, *key):
    """Return a random order of n things, which depends on the key alone: (n,) int64."""
    return default_rng(key).permutation(n)


def evenly_spaced(n, limit):
    """Return `limit` of the numbers 0 .. n-1, evenly spaced, or all of them for 0: (limit,) int64."""
    limit = min(limit or n, n)
    return np.arange(limit) * n // limit


@dataclass
class Source:
    """The rows of a split."""
    dataset: Dataset
    split: str
    tok: Tokenizer
    T: int
    seed: int = 0
    random_length: float = 0.       # the share of windows of which only a random length is kept (LLaDA: 0.01)
    random_split: float = 0.        # the share of windows in two parts that do not attend to each other (0.3)
    isolate: bool = False           # documents do not attend to each other, either
    copies: int = 1                 # successive rows that a window or example fills, 2 for complementary masks
    pad_group: int = 0              # successive examples that are padded to one length, 0 for all of an update


@dataclass
class Windows(Source):
    """Pre-training (Eq. 3): windows of T tokens. Each epoch cuts the text elsewhere (a mixture has no epochs)."""

    def __post_init__(self):
        self.n_tokens = [corpus.facts[self.split]['tokens'] for corpus in self.dataset.parts]
        if min(self.n_tokens) < self.T:
            raise UserError(f'{self.split} has {min(self.n_tokens)} tokens, too few for seq_len={self.T}')
        self.share = np.array(self.dataset.weights) / sum(self.dataset.weights)

    def window(self, sample):
        """Return window number `sample` of an endless stream: (T,) int64."""
        # of a mixture each window draws its part; a single part is always drawn
        rng = default_rng([self.seed, sample, MIXTURE])
        part = rng.choice(len(self.share), p=self.share)
        # as many windows as fit behind any offset
        n_tokens = self.n_tokens[part]
        n = max(1, (n_tokens - self.T + 1) // self.T)
        room = min(self.T, n_tokens - n * self.T + 1)
        epoch, i = divmod(sample, n)
        start = shuffled(n, self.seed, epoch)[i] * self.T
        start += default_rng([self.seed, epoch, OFFSET]).integers(room)
        return self.dataset.parts[part].read(self.split, start, start + self.T)

    def batch(self, it, rows, size):
        """Return x0 (B, T) int64, maskable (B, T) bool, and cu_seqlens (n+1,) int32 or None.

        rows: a range of the `size` rows of iteration `it`. cu_seqlens: the limits, in the flattened batch, of
        segments that attend only to themselves.
        """
        windows = [self.window((it * size + row) // self.copies) for row in rows]
        x0 = torch.stack(windows)
        if self.random_length or self.random_split or self.isolate:
            return x0, *self.cut(x0, it, rows, size)
        return x0, x0 >= 0, None                            # all are maskable

    def cut(self, x0, it, rows, size):
        """Cut some windows at random, and others where documents end -> maskable, cu_seqlens of `batch`."""
        # drawn for all rows, so that it does not depend on how they are divided, and alike for copies
        draws = default_rng([self.seed, it, CUTS]).random((2, size))
        which, where = draws[:, [row // self.copies for row in rows]]
        maskable = x0 >= 0                                  # all
        limits = [0]
        for b in range(len(x0)):
            ends = {self.T}
            if which[b] < self.random_length:
                # what is not kept is a segment of its own
                keep = 1 + int(where[b] * self.T)
                maskable[b, keep:] = False
                ends.add(keep)
            elif which[b] < self.random_length + self.random_split:
                ends.add(1 + int(where[b] * (self.T - 1)))
            if self.isolate:
                is_end = x0[b] == self.tok.eos_id
                ends.update((is_end.nonzero()[:, 0] + 1).tolist())
            limits += [b * self.T + end for end in sorted(ends)]
        if len(limits) == len(x0) + 1:
            return maskable, None                           # nothing was cut

        # empty segments at the end make few different shapes, because each new shape compiles a graph
        limits += [x0.numel()] * (32 - len(limits) % 32)
        return maskable, torch.tensor(limits, dtype=torch.int32)

    def held_out(self, limit=0):
        """Return [(x0 (T,), maskable (T,)), ...] of all windows in order, or `limit`, and bytes of text per row."""
        rows = []
        n_bytes = []
        for corpus, n_tokens, share in zip(self.dataset.parts, self.n_tokens, self.share):
            for start in evenly_spaced(n_tokens // self.T, math.ceil(share * limit)) * self.T:
                x0 = corpus.read(self.split, start, start + self.T)
                rows.append((x0, x0 >= 0))
                n_bytes.append(corpus.facts[self.split]['bytes'] / n_tokens * self.T)
        return rows, float(np.mean(n_bytes))


@dataclass
class Examples(Source):
    """Fine-tuning (Eq. 5): one example per row. Response, EOS and padding are maskable, the prompt is not."""

    def __post_init__(self):
        self.corpus, = self.dataset.parts
        if not self.corpus.facts[self.split]['examples']:
            raise UserError(f"{self.corpus.folder}: masking='response' needs examples, got documents")
        rows = np.load(self.corpus.folder / f'{self.split}_00000.rows.npy')
        lengths = rows[:, 2] - rows[:, 0]
        if lengths.sum() < self.corpus.facts[self.split]['tokens']:
            say(f'{self.corpus.folder}: its documents are left out, because they answer nothing')
        self.rows = rows[lengths <= self.T]
        if len(self.rows) < len(rows):
            say(f'{self.corpus.folder}: {len(self.rows)} of {len(rows)} examples fit into seq_len={self.T}')
        if not self.rows.size:
            raise UserError(f'{self.split}: no example fits into seq_len={self.T}')
        # where each dialogue begins
        _, first_turns = np.unique(self.rows[:, 3], return_index=True)
        self.dialogues = np.append(first_turns, len(self.rows))

    def drawn(self, sample):
        """Return example number `sample` of an endless stream, (4,). It has each dialogue once per epoch."""
        n = len(self.dialogues) - 1
        epoch, i = divmod(sample, n)
        i = shuffled(n, self.seed, epoch)[i]
        # one random turn of it, and the others wait for other epochs (issue 77 of the official code)
        rng = default_rng([self.seed, sample, TURNS])
        return self.rows[rng.integers(*self.dialogues[i:i + 2])]

    def batch(self, it, rows, size):
        """Return x0 (B, T) int64, maskable (B, T) bool, None."""
        # the whole group says how long its rows are, however the rows are split over processes
        each = self.pad_group or size
        first = rows.start // each * each
        group = range(first, min(first + each, size))
        examples = [self.drawn((it * size + row) // self.copies) for row in group]
        x0, maskable = self.padded(examples)
        inside = slice(rows.start - first, rows.stop - first)
        return x0[inside], maskable[inside], None

    def padded(self, rows, multiple=1):
        """Pad examples (n, 4) with EOS to a multiple of tokens -> x0 (n, T) int64, maskable (n, T) bool."""
        start, response, end, _ = np.transpose(rows)
        T = math.ceil(max(end - start) / multiple) * multiple
        T = min(T, self.T)
        x0 = torch.full((len(rows), T), self.tok.eos_id)
        for row, a, b in zip(x0, start, end):
            row[:b - a] = self.corpus.read(self.split, a, b)
        # padding counts, too, in L' (LLaDA, App. B.1)
        return x0, torch.arange(T) >= torch.from_numpy(response - start)[:, None]

    def held_out(self, limit=0):
        """Return [(x0 (T,), maskable (T,)), ...] of several T, and bytes of text per row."""
        rows = []
        n_bytes = 0
        for i in evenly_spaced(len(self.rows), limit):
            # a multiple of 32, so that the loss of an example does not depend on which others there are
            (x0,), (maskable,) = self.padded(self.rows[i:i + 1], 32)
            rows.append((x0, maskable))
            n_bytes += len(self.tok.decode(x0[maskable], skip_special_tokens=True).encode())
        return rows, n_bytes / len(rows)


# ----------------------------------------------------------------------------------------------------------


def files_of(patterns):
    """Return the files that names and patterns with commas between stand for, each once."""
    found = []
    for pattern in filter(None, patterns.split(',')):
        # a name that exists is that file, even if it looks like a pattern, as part[1].txt does
        matches = [] if Path(pattern).exists() else sorted(glob.glob(pattern))
        found += matches or [pattern]
    # a.txt and ./a.txt are one
    return list(dict.fromkeys(map(os.path.normpath, found)))


def main(cfg):
    if not (cfg.input and cfg.out):
        raise UserError('expected your own text: --input=FILE --out=data/my')
    # what is held out may be among the files that a pattern finds
    val = files_of(cfg.val_input)
    sources = [file for file in files_of(cfg.input) if file not in val]
    manifest = prepare(sources, cfg.out, cfg.tokenizer, val=val, val_every=cfg.val_every)

    for split, n in manifest['splits'].items():
        print(f'{cfg.out}/{split}: {n["tokens"]:,} tokens, {n["bytes"] / n["tokens"]:.2f} bytes per token')
    train = ['python', 'train.py', 'config/docs.py', f'--dataset={cfg.out}', f'--out_dir=out/{Path(cfg.out).name}']
    if n['examples']:
        train.append('--masking=response')
    print(f'train on it: {shlex.join(train)}')


if __name__ == '__main__':
    run(main, globals())
