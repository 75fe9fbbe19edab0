"""Text becomes ids, ids become files, and files become batches.

    python data.py                                          # lists the data sets that it can make
    python data.py shakespeare                              # downloads one and tokenizes it to data/shakespeare
    python data.py --input=a.txt,b.jsonl --out=data/my --tokenizer=gpt2

A data set is a folder: its tokenizer, flat files of token ids (train_00000.bin, val_00000.bin), and a manifest.
Batches have no state: the rows of iteration `it` are a function of (seed, it, row). So a run resumes from a number,
on any number of processes.

Letters: B batch, T sequence length (tokens per row of a batch).
"""

import ast
import functools
import glob
import gzip
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import sysconfig
import zlib
from collections import namedtuple
from datetime import datetime
from itertools import count, groupby
from operator import itemgetter
from pathlib import Path

import jinja2
import jinja2.sandbox
import numpy as np
import tiktoken
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from configurator import UserError, run, say

name = ''                       # a data set from the list that `python data.py` prints
input = ''                      # your own files: .txt .jsonl .jsonl.gz .json .parquet, or patterns, with commas between
val_input = ''                  # files to hold out, likewise. Default: hold out a part of the input
out = ''                        # folder to write, default data/NAME. If a data set is there, it is replaced
tokenizer = ''                  # bytes, bpe-N (learned), gpt2 or another tiktoken name, or a tokenizer.json
workers = 0                     # number of processes, each with a file of its own. 0: one per core
val_every = 10                  # hold out every N-th piece of a document, or one in N examples

# ----------------------------------------------------------------------------------------------------------
# 1. Tokenizers. The `tokenizers` library does the work, so that ids are the same as everywhere else.

# What a special token is called: first in LLaDA's release, which our own vocabularies follow, then elsewhere.
ROLES = {
    'bos': ('<|startoftext|>', '<s>', '<|begin_of_text|>'),
    'eos': ('<|endoftext|>', '</s>', '<|end_of_text|>'),
    'mask': ('<|mdm_mask|>', '<[MASK]>', '[MASK]', '<mask>'),
    'start_header': ('<|start_header_id|>',),
    'end_header': ('<|end_header_id|>',),
    'eot': ('<|eot_id|>', '<eot_id>'),
    'pad': ()}
LLADA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
# GPT-2's words, but digits alone, so that numbers have the same tokens wherever they stand
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# a code point that no text contains, because Unicode reserves it
BREAK = '\U0010ffff'


class Tokenizer:
    """Turn text into ids and back.

    mask_id, eos_id, pad_id, bos_id, eot_id: the special tokens; None if released weights have no such token.
    config: a tokenizer_config.json, which may name them. complete: add the tokens of ROLES that are missing.
    """

    def __init__(self, hf, config=None, template=None, complete=True):
        self.hf = hf                                        # a tokenizers.Tokenizer
        self.config = config or {}
        self.names = {}                                     # bos_token: its name, and so on
        # some files ask for it, but a text is always encoded whole
        hf.no_truncation()
        hf.no_padding()

        for role, usual in ROLES.items():
            key = f'{role}_token'
            if role == 'pad':                               # LLaDA pads with EOS
                usual = [self.names.get('eos_token')]
            choices = [choice for choice in (token_name(self.config.get(key)), *usual) if choice]
            found = [choice for choice in choices if hf.token_to_id(choice) is not None]
            if complete:
                found += choices
            setattr(self, f'{role}_id', None)
            if found:
                # even if the file knows the token, it may not call it special, and then a text could contain it
                hf.add_special_tokens(found[:1])
                setattr(self, f'{role}_id', hf.token_to_id(found[0]))
                self.names[key] = found[0]

        in_template = re.findall(r'<\|\w+\|>', LLADA_TEMPLATE)
        if not template and None not in map(hf.token_to_id, in_template):
            template = LLADA_TEMPLATE
        self.template = template

        self.ids = set(hf.get_vocab().values())
        self.vocab_size = max(self.ids) + 1
        special = [token.content for token in hf.get_added_tokens_decoder().values() if token.special]
        either = '|'.join(map(re.escape, sorted(special, reverse=True)))
        self.special = re.compile(f'({either})')            # the name of any special token

    def encode(self, text, special_names=False):
        """Return the ids of a text. special_names: the name of a special token is that token, and not text."""
        self.hf.encode_special_tokens = not special_names
        return self.hf.encode(text, add_special_tokens=False).ids

    def decode(self, ids, skip_special_tokens=False):
        """Return the text of ids. Half a character becomes U+FFFD, and an id without a token nothing."""
        return self.hf.decode(list(map(int, ids)), skip_special_tokens=skip_special_tokens)

    def encode_chat(self, messages):
        """Return the ids of a conversation [{'role', 'content'}, ...] and of the assistant's header.

        If the last message is by the assistant, it is left open instead, to be continued.
        """
        if messages and messages[-1]['role'] == 'assistant':
            return self.encode_chat(messages[:-1]) + self.encode(messages[-1]['content'].strip())

        # a template that drops or changes what somebody says would do so silently, so we try it first
        probes = [f'content {i}.' for i in range(len(messages))]
        shown = self.render(messages, probes)
        if any(shown.count(probe) != 1 for probe in probes):
            raise UserError('the chat template of the tokenizer drops, repeats or changes the content of a message')

        # If a user types the name of a special token, BREAK between its characters keeps it text. The parts without
        # BREAK are encoded as transformers does it, with the names that the template has written as tokens.
        contents = [self.special.sub(lambda typed: BREAK.join(typed[0]), m['content']) for m in messages]
        text = self.render(messages, contents)
        ids = []
        for part in self.special.split(text) if BREAK in text else [text]:
            ids += self.encode(part.replace(BREAK, ''), special_names=BREAK not in part)
        return ids

    def render(self, messages, contents):
        """Return the text that the chat template makes of the messages, with these contents."""
        if not self.template:
            raise UserError('the tokenizer has no chat template; put a chat_template.jinja beside its tokenizer.json')
        messages = [message | {'content': content} for message, content in zip(messages, contents)]
        try:
            template = compile_template(self.template)
            return template.render(messages=messages, add_generation_prompt=True, **self.names)
        except jinja2.TemplateError as error:
            raise UserError(f'the chat template of the tokenizer says: {error}') from None

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json, for get_tokenizer and for transformers."""
        config = {
            'tokenizer_class': 'PreTrainedTokenizerFast',
            'clean_up_tokenization_spaces': False,
            **self.config,
            **self.names,
            'chat_template': self.template}
        self.hf.save(f'{folder}/tokenizer.json')
        Path(folder, 'tokenizer_config.json').write_text(json.dumps(config, indent=1), encoding='utf-8')

    def fingerprint(self):
        """Return a checksum, the same for two tokenizers that encode every text to the same ids."""
        facts = f'{self.hf.to_str()} {self.mask_id} {self.eos_id}'
        return hashlib.sha256(facts.encode()).hexdigest()

    def unused(self, vocab_size):
        """Return the ids below vocab_size that are no token: the head of a network may have more rows than tokens."""
        return [i for i in range(vocab_size) if i not in self.ids]


def token_name(token):
    """Return the name of a token in tokenizer_config.json, where it is a text, or a dict with "content", or null."""
    return token['content'] if isinstance(token, dict) else token


@functools.lru_cache
def compile_template(source):
    """Compile a chat template. It is somebody's program, so it runs in a sandbox, with what transformers offers."""
    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, **options):
        return json.dumps(value, **{'ensure_ascii': False, **options})

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols'])
    environment.filters['tojson'] = tojson
    environment.globals['raise_exception'] = raise_exception
    environment.globals['strftime_now'] = lambda layout: datetime.now().strftime(layout)
    return environment.from_string(source)


def get_tokenizer(spec, complete=True):
    """Return the Tokenizer of 'bytes', of a tiktoken name, of a tokenizer.json, or of a folder that holds one."""
    if spec == 'bytes':
        return Tokenizer(byte_level(dict(zip(byte_symbols(), range(256)))))
    if spec in tiktoken.list_encoding_names():
        return from_tiktoken(spec)

    path = Path(spec)
    if path.is_dir():
        path = path / 'tokenizer.json'
    if not path.is_file():
        names = ', '.join(tiktoken.list_encoding_names())
        raise UserError(f'{spec}: unknown tokenizer; expected a tokenizer.json, its folder, bytes, bpe-N, or {names}')

    config = json.loads(text_beside(path, 'tokenizer_config.json') or '{}')
    template = text_beside(path, 'chat_template.jinja') or config.get('chat_template')
    if isinstance(template, list):
        template = {entry['name']: entry['template'] for entry in template}.get('default')
    return Tokenizer(tokenizers.Tokenizer.from_file(str(path)), config, template, complete)


def text_beside(path, name):
    """Return the text of the file with this name in the same folder, '' if there is none."""
    path = path.with_name(name)
    return path.read_text(encoding='utf-8') if path.is_file() else ''


def tokenizer_of(meta, mask_id=None):
    """Return the Tokenizer of loaded weights (meta of model.load_model), with the special ids that they name.

    mask_id: given by the user where nothing else names it. Raises UserError if two sources differ, or if mask or EOS
    stay unknown: to guess, for instance the unknown token, would go wrong silently.
    """
    tok = get_tokenizer(meta['folder'], complete=False)
    for role in ('mask', 'eos', 'pad', 'bos', 'eot'):
        choices = [meta[f'{role}_id'], getattr(tok, f'{role}_id')]
        if role == 'mask':
            choices.append(mask_id)
        ids = [choice for choice in choices if choice is not None]

        where = f"{meta['folder']}: config.json, tokenizer and --mask_id"
        if role != 'pad' and len(set(ids)) > 1:
            raise UserError(f'{where} disagree on the {role} id: {ids}')
        if role in ('mask', 'eos') and not ids:
            raise UserError(f'{where} do not say which id is {role}')
        setattr(tok, f'{role}_id', ids[0] if ids else None)
    return tok


def byte_symbols():
    """Return GPT-2's printable characters for the bytes 0 to 255, in which vocabularies spell their tokens."""
    others = count(256)
    return [chr(b if chr(b).isprintable() and chr(b) != ' ' else next(others)) for b in range(256)]


def byte_level(vocab, merges=(), pattern=WORDS):
    """Return a tokenizers.Tokenizer: byte-pair encoding inside of the words that a pattern finds."""
    # tiktoken looks up a whole word before it merges. A learned vocabulary gives the same ids either way.
    hf = tokenizers.Tokenizer(models.BPE(vocab, list(merges), ignore_merges=True))
    hf.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    hf.decoder = decoders.ByteLevel()
    return hf


def from_tiktoken(name):
    """Return a vocabulary of OpenAI as a Tokenizer. tiktoken downloads it, or finds it in TIKTOKEN_CACHE_DIR."""
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise UserError(f'tokenizer {name}: could not be downloaded ({type(error).__name__}); without a network, let '
                        'TIKTOKEN_CACHE_DIR name a folder that has it, or give a tokenizer.json') from None

    ranks = encoding._mergeable_ranks                       # bytes of a token: its id
    symbols = dict(enumerate(byte_symbols()))
    spelled = {token: token.decode('latin-1').translate(symbols) for token in ranks}

    # tiktoken joins any two neighbours that make a token, lowest rank first. So the merges are, in order of rank, all
    # ways to cut a token in two. (Llama 3's file lists them like this, too.)
    merges = []
    for token in sorted(ranks, key=ranks.get):
        for i in range(1, len(token)):
            if token[:i] in ranks and token[i:] in ranks:
                merges.append((spelled[token[:i]], spelled[token[i:]]))

    # special tokens are in the vocabulary, too, because their ids need not follow without a gap
    vocab = {spelled[token]: rank for token, rank in ranks.items()} | encoding._special_tokens
    # {1,3}+ means at most three digits in tiktoken, but any number of digits here
    hf = byte_level(vocab, merges, encoding._pat_str.replace('{1,3}+', '{1,3}'))
    hf.add_special_tokens(list(encoding._special_tokens))
    return Tokenizer(hf)


def learn_tokenizer(texts, vocab_size):
    """Learn a byte-level vocabulary of at most vocab_size tokens, special tokens included -> Tokenizer."""
    hf = byte_level({})
    n_special = sum(map(bool, ROLES.values()))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - n_special,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False)
    hf.train_from_iterator(texts, trainer)
    return Tokenizer(hf)


# ----------------------------------------------------------------------------------------------------------
# 2. Records. {"text"} is a document, {"messages"} or {"response"} an example for fine-tuning.


def docs_text():
    """Yield real text that comes with Python: pydoc's language reference, docstrings of the standard library.

    Modules are parsed, never imported, and repeated paragraphs are dropped. About 1.5 million characters, which vary
    a little with the Python version.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:                                     # a stripped-down Python
        topics = {}
    texts = {'language': '\n\n'.join(topics[key] for key in sorted(topics))}

    root = Path(sysconfig.get_paths()['stdlib'])
    skip = {'test', 'tests', 'idlelib', 'lib2to3', 'turtledemo', 'pydoc_data', 'site-packages', 'turtle.py',
            'tkinter', 'encodings'}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in sorted([*root.glob('*.py'), *root.glob('*/*.py')]):
        inside = file.relative_to(root).parts
        if skip & set(inside) or inside[0].startswith('_'):
            continue
        try:
            tree = ast.parse(file.read_text(encoding='utf-8'))
        except (SyntaxError, ValueError, OSError):
            continue                                        # written for another Python
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
    """Yield the 1.1 MB of tiny Shakespeare, downloaded once and checked."""
    url = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
    sha256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
    path = Path(torch.hub.get_dir(), 'tinyshakespeare.txt')
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:
            raise UserError(f'could not download {url} ({error}); if you have the file, add --input=FILE') from None
    return read_records(path)


DATASETS = {        # name: (its records, default tokenizer, what it is)
    'docs': (docs_text, 'bpe-4096', 'documentation that comes with Python; needs no network'),
    'shakespeare': (shakespeare_text, 'bpe-1024', 'tiny Shakespeare, 1.1 MB; downloaded, or --input=FILE')}
FORMATS = ('.txt', '.jsonl', '.jsonl.gz', '.json', '.parquet')

# What others call the list of messages (ShareGPT), the two sides of an example (TRL, Alpaca), and who speaks.
LISTS = ('messages', 'conversations', 'conversation')
PAIRS = (('prompt', 'response'), ('question', 'answer'), ('prompt', 'completion'), ('instruction', 'output'))
SPEAKERS = {'human': 'user', 'gpt': 'assistant'}
IDS = ('prompt_ids', 'response_ids')
CONTENT = {'text', 'input', *LISTS, *IDS}.union(*PAIRS)


def read_records(source, accept=None):
    """Yield (where, record) of a file. A .txt is one document, and the other formats have a record per row.

    accept: turns a row, a dict, into a record, or raises ValueError. Default: as_record. Raises UserError with file
    and line. (A source that is no path is a list of (where, record) already.)
    """
    if not isinstance(source, (str, Path)):
        yield from source
        return

    path, where = Path(source), None
    for where, row in read_rows(path):
        keys = ''
        try:
            if isinstance(row, bytes):
                row = json.loads(row)
            keys = f'; the row has the keys {list(row)[:9]}'
            record = (accept or as_record)(row)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f'{where}: {error}{keys}') from None
        yield where, record
    if not where:
        raise UserError(f'{path}: no text in it')


def read_rows(path):
    """Yield (where, row) of a file: a dict, or bytes that are still to be parsed as JSON."""
    if not path.name.endswith(FORMATS):
        raise UserError(f'{path}: unknown format; expected {", ".join(FORMATS)}')

    if path.suffix == '.txt':
        raw = path.read_bytes()
        try:
            yield path.name, {'text': raw.decode('utf-8-sig')}
        except UnicodeDecodeError as error:
            line = raw.count(b'\n', 0, error.start) + 1
            raise UserError(f'{path}:{line}: not UTF-8 ({error.reason})') from None

    elif path.suffix == '.json':
        for number, row in enumerate(json.loads(path.read_bytes()), 1):
            yield f'{path}, item {number}', row

    elif path.suffix == '.parquet':
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise UserError(f'{path}: reading .parquet needs one more package: pip install pyarrow') from None
        batches = ParquetFile(path).iter_batches()
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield f'{path}, row {number}', row

    else:
        with gzip.open(path) if path.suffix == '.gz' else path.open('rb') as lines:
            for number, line in enumerate(lines, 1):
                if line.strip(b'\xef\xbb\xbf \t\r\n'):      # not empty, nor a mere byte order mark
                    yield f'{path}:{number}', line


def as_record(row):
    """Return a row as {"text"}, {"messages"}, {"response"} or {"prompt_ids", "response_ids"}, or raise ValueError.

    The two sides of an example become messages, whatever they are called. If a row has several of these, messages
    come first, because public data sets carry the same text beside them. Other keys stay.
    """
    record = {key: value for key, value in row.items() if key not in CONTENT}
    messages = messages_of(row)
    if messages:
        if messages[-1]['role'] != 'assistant':
            raise ValueError('the last message must be by the "assistant"')
        record['messages'] = messages

    elif all(key in row for key in IDS):
        record |= {key: list(map(int, row[key])) for key in IDS}
    elif 'text' in row or 'response' in row:
        key = 'text' if 'text' in row else 'response'
        record[key] = as_text(row[key])
    else:
        raise ValueError('expected "text", "messages", or "prompt" and "response"')
    return record


def messages_of(row):
    """Return the messages of a row, a list of {"role", "content"}, or None."""
    for key in LISTS:
        if isinstance(row.get(key), list):
            return list(map(as_message, row[key]))

    for prompt, response in PAIRS:
        if prompt in row and response in row:
            question = row[prompt]
            if prompt == 'instruction' and row.get('input'):
                question = as_text(question) + '\n\n' + as_text(row['input'])
            pair = [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': row[response]}]
            return list(map(as_message, pair))


def as_message(message):
    """Return a message as {"role", "content"}, two texts that are not empty, or raise ValueError."""
    role = as_text(message.get('role', message.get('from')))
    content = message.get('content', message.get('value'))
    if isinstance(content, list):                           # in parts, as OpenAI has them
        content = ''.join(part['text'] for part in content)
    return {'role': SPEAKERS.get(role, role), 'content': as_text(content)}


def as_text(value):
    """Return a text that is not empty, or raise ValueError."""
    if isinstance(value, bytes):                            # a column of a .parquet file that does not say it is text
        value = value.decode()
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'expected a text that is not empty, got {value!r:.60}')
    value.encode()                                          # half a surrogate pair is not text
    return value


# ----------------------------------------------------------------------------------------------------------
# 3. Preparing. Records become files of token ids.

FORMAT = 'nanollada data 3'
SPLITS = ('train', 'val')


def prepare(sources, out, tokenizer, *, val=(), val_every=10, workers=1):
    """Tokenize sources (files, or lists of (where, record)) into the folder `out` -> its manifest.

    val: sources to hold out. If there are none, one piece in val_every is held out of the others.
    tokenizer: what get_tokenizer takes, or bpe-N to learn N tokens from the training pieces.
    The folder is written under another name and then renamed, so it is complete or absent. A process per file.
    """
    out, sources = Path(out).resolve(), [*sources, *val]
    check_out(out, sources)
    # for each source: hold out one piece in how many (1: all, 0: none)
    every = [val_every] * len(sources)
    if val:
        every = [0] * (len(sources) - len(val)) + [1] * len(val)
    is_text = 'text' in next(iter(read_records(sources[0])))[1]
    jobs = [(number, source, every[number], is_text) for number, source in enumerate(sources)]

    if re.fullmatch(r'bpe-\d+', str(tokenizer)):
        tok = learn_tokenizer(training_texts(jobs), int(tokenizer[4:]))
    else:
        tok = get_tokenizer(tokenizer)

    aside = out.with_name(f'.{out.name}.{os.getpid()}')
    aside.mkdir(parents=True)
    try:
        tok.save(aside)
        tokenize = functools.partial(tokenize_source, folder=aside)
        workers = min(workers, len(jobs))
        if workers > 1:
            with multiprocessing.get_context('spawn').Pool(workers) as pool:
                entries = pool.map(tokenize, jobs, chunksize=1)
        else:
            entries = list(map(tokenize, jobs))

        manifest = {'format': FORMAT, 'vocab_size': tok.vocab_size, 'splits': {}}
        for split in SPLITS:
            manifest['splits'][split] = [entry[split] for entry in entries if entry[split]['tokens']]
            if not manifest['splits'][split]:
                raise UserError(f'not enough text to hold out a validation split: nothing is left for {split}; give '
                                'more text, or say with --val_input=FILE what to hold out')
        manifest['files'] = sorted(path.name for path in aside.iterdir())
        (aside / 'manifest.json').write_text(json.dumps(manifest, indent=1), encoding='utf-8')

        shutil.rmtree(out, ignore_errors=True)
        os.replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return manifest


def check_out(out, sources):
    """Raise UserError if `out` holds an input, or anything but a data set that prepare has made."""
    for source in sources:
        if isinstance(source, (str, Path)) and out in Path(source).resolve().parents:
            raise UserError(f'{source} lies inside of {out}, which would be replaced; choose another --out')

    manifest = json.loads(text_beside(out / '', 'manifest.json') or '{}')
    found = {path.name for path in out.iterdir()} if out.exists() else set()
    ours = set()
    if str(manifest.get('format')).startswith('nanollada'):
        ours = {'manifest.json', *manifest['files']}
    if found - ours:
        raise UserError(f'{out} holds files that are no data set, such as {min(found - ours)}; choose another --out')
    if found:
        say(f'{out}: replacing the data set that is there')


def tokenize_source(job, folder):
    """Tokenize one source into a file for each split -> {split: its entry in the manifest}."""
    number = job[0]
    tok = get_tokenizer(folder)
    shards = {split: Shard(folder / f'{split}_{number:05d}.bin', tok.vocab_size) for split in SPLITS}
    dialogues, held_out = count(), []
    for (where, split), pieces in groupby(split_pieces(*job), key=itemgetter(0, 1)):
        shard = shards[split]
        for _, _, piece in pieces:
            if isinstance(piece, str):
                shard.write(tok.encode(piece), len(piece.encode()))
                continue

            # a dialogue of n answers is n examples, each with all that was said before as its prompt (App. B.1)
            dialogue = next(dialogues)
            for prompt, response in turns_of(piece, tok):
                ids = [*prompt, *response, tok.eos_id]
                if max(ids) >= tok.vocab_size:
                    raise UserError(f'{where}: the vocabulary has {tok.vocab_size} tokens, got id {max(ids)}')
                start = shard.tokens
                shard.write(ids, len(tok.decode(ids, skip_special_tokens=True).encode()))
                shard.rows.append((start, start + len(prompt), shard.tokens, dialogue))
            if split == 'val':
                held_out.append(json.dumps(piece, ensure_ascii=False, default=str) + '\n')

        if not shard.rows:                                  # a document ends, or continues in the other split
            shard.write([tok.eos_id])

    if held_out:                                            # evaluate.py asks these questions
        (folder / f'val_{number:05d}.jsonl').write_text(''.join(held_out), encoding='utf-8')
    return {split: shard.close() for split, shard in shards.items()}


def split_pieces(number, source, val_every, is_text):
    """Yield (where, split, piece) of a source: a piece of a document (str) or a whole example (dict).

    Of documents, every val_every-th piece is held out, counted from `number`, because a tail of a text would share
    long passages with the rest. Of examples one in val_every, by a hash, so that no question is in both splits.
    """
    for where, record in tqdm(read_records(source), disable=number > 0 or None, leave=False):
        if is_text != ('text' in record):
            raise UserError(f'{where}: documents ("text") and examples do not mix; prepare them separately')
        pieces = [(question_hash(record), record)]
        if is_text:
            pieces = enumerate(chunks(record['text']), number + 1)

        for number, piece in pieces:
            held_out = val_every and number % val_every == 0
            yield where, 'val' if held_out else 'train', piece


def chunks(text, size=4096):
    """Yield a text in pieces of about `size` characters, cut at line ends, else at spaces, else anywhere."""
    start = 0
    while start < len(text):
        least, most = start + size, start + 2 * size
        end = text.find('\n', least, most) + 1 or text.find(' ', least, most)
        if end < 1:
            end = most
        yield text[start:end]
        start = end


def question_hash(record):
    """Return a number for an example, the same for all examples with the same first question."""
    asked = [message['content'] for message in record.get('messages', []) if message['role'] == 'user']
    key = asked[0] if asked else record.get('response', '')
    if 'accept' in record or 'prompt_ids' in record:        # "accept": with many right answers, questions may be few
        key = json.dumps(record, sort_keys=True, default=str)
    return zlib.crc32(key.strip().encode())


def training_texts(jobs):
    """Yield, in pieces, the text of everything that goes into the training split."""
    for job in jobs:
        for _, split, piece in split_pieces(*job):
            if split == 'train':
                # short pieces, because the time to learn from a word grows with the square of its length
                yield from chunks(piece if isinstance(piece, str) else text_of(piece))


def text_of(record):
    """Return all text of an example."""
    said = [message[key] for message in record.get('messages', []) for key in ('role', 'content')]
    return '\n\n'.join(said) or record.get('response', '')


def turns_of(record, tok):
    """Yield (prompt ids, response ids) for each answer of an example."""
    if 'prompt_ids' in record:
        yield record['prompt_ids'], record['response_ids']
    if 'response' in record:
        # BOS is the prompt: a canvas of masks looks the same everywhere, so positions need an edge to count from
        yield [tok.bos_id], tok.encode(record['response'].strip())

    messages = record.get('messages', [])
    for i, message in enumerate(messages):
        if i and message['role'] == 'assistant':
            yield tok.encode_chat(messages[:i]), tok.encode(message['content'].strip())


class Shard:
    """Write one file of token ids. rows: where each example is, as (start, response, end, dialogue)."""

    def __init__(self, path, vocab_size):
        self.path, self.dtype = path, dtype_of(vocab_size)
        self.file = path.open('wb')
        self.tokens, self.bytes, self.rows = 0, 0, []

    def write(self, ids, n_bytes=0):
        """Append ids that stand for n_bytes of text."""
        self.file.write(np.array(ids, self.dtype))
        self.tokens += len(ids)
        self.bytes += n_bytes

    def close(self):
        """Finish the file -> its entry in the manifest."""
        self.file.close()
        if self.rows:
            np.save(self.path.with_suffix('.rows.npy'), self.rows)
        return {'name': self.path.stem, 'tokens': self.tokens, 'bytes': self.bytes, 'examples': len(self.rows)}


def dtype_of(vocab_size):
    """Return the type of the ids in the files. In uint16, id 126336 would silently become 60800."""
    return np.dtype('uint16' if vocab_size <= 2 ** 16 else 'uint32')


# ----------------------------------------------------------------------------------------------------------
# 4. Loading. Files become batches.

Dataset = namedtuple('Dataset', 'parts weights')            # lists of Corpus and of float
Batch = namedtuple('Batch', 'x0 maskable cu_seqlens')       # (B, T) int64, (B, T) bool, (n+1,) int32 or None
Options = namedtuple('Options', 'random_length random_split isolate copies pad_group', defaults=(0., 0., False, 1, 0))
ORDER, CUTS, TURNS, MIXTURE = range(4)                      # what a random number is for


class Corpus:
    """A prepared folder. Its files of tokens are mapped into memory, not read."""

    def __init__(self, folder):
        self.folder = Path(folder)
        how = f'data.py --input=FILE --out={folder}'
        if self.folder.name in DATASETS:
            how = f'data.py {self.folder.name}'
        if self.folder.name in ('world', 'instruct', 'facts'):
            how = 'tests/lab/worlds.py'

        self.manifest = json.loads(text_beside(self.folder / '', 'manifest.json') or '{}')
        if self.manifest.get('format') != FORMAT:
            what = 'made by another version of data.py' if self.manifest else 'no data set here'
            raise UserError(f'{folder}: {what}; make it with: python {how}')
        splits = self.manifest['splits'].items()
        self.shards = {split: list(map(self.open_shard, entries)) for split, entries in splits}

    def open_shard(self, entry):
        """Map a file of tokens into memory -> (n,) uint16 or uint32."""
        path = self.folder / f"{entry['name']}.bin"
        dtype = dtype_of(self.manifest['vocab_size'])
        if path.stat().st_size != entry['tokens'] * dtype.itemsize:
            raise UserError(f"{path}: expected {entry['tokens']} tokens, the file has another size; prepare it again")
        return np.memmap(path, dtype, 'r')

    def tokenizer(self):
        """Return the Tokenizer that made it."""
        return get_tokenizer(self.folder)

    def count(self, split, what):
        """Return how many 'tokens', 'bytes' of text or 'examples' a split has."""
        return sum(entry[what] for entry in self.manifest['splits'][split])

    def read(self, split, start, length):
        """Return the tokens start .. start+length of a split, as if it were one array: (length,) int64."""
        parts = []
        for shard in self.shards[split]:
            if -length < start < len(shard):
                parts.append(shard[max(0, start):start + length])
            start -= len(shard)
        return np.concatenate(parts, dtype=np.int64)

    def rows(self, split):
        """Return where the examples of a split are: (n, 4) int64 of start, response, end, number of the dialogue."""
        tables, start, dialogue = [], 0, 0
        for entry in self.manifest['splits'][split]:
            table = np.load(self.folder / f"{entry['name']}.rows.npy")
            tables.append(table + [start, start, start, dialogue])
            start += entry['tokens']
            dialogue += 1 + table[-1, 3]
        return np.concatenate(tables)


def open_dataset(name):
    """Return the Dataset of a name in data/, a folder, or a mixture 'a:0.7,b:0.3'. 'docs' is made on first use."""
    names, weights = [name], [1.]
    if ':' in name and not Path(name).is_dir():
        try:
            names, weights = zip(*(part.rsplit(':', 1) for part in name.split(',')))
            weights = list(map(float, weights))
        except ValueError:
            raise UserError(f'dataset {name!r}: a mixture is written name:weight,name:weight') from None

    parts = [open_corpus(part) for part in names]
    if len(parts) > 1 and len({corpus.tokenizer().fingerprint() for corpus in parts}) > 1:
        raise UserError(f'dataset {name!r}: the parts of a mixture must have the same tokenizer')
    return Dataset(parts, weights)


def open_corpus(name):
    """Return the Corpus of a folder, or of a name in data/."""
    folder = Path(name)
    if '/' not in name and not folder.is_dir():
        folder = Path('data', name)
    if name == 'docs' and not folder.exists():
        records, tokenizer, what = DATASETS[name]
        say(f'preparing {folder} (once): {what}')
        prepare([list(records())], folder, tokenizer)
    return Corpus(folder)


def open_source(dataset, split, masking, tok, seq_len, seed=0, **options):
    """Return the rows of a split as training sees them: Examples if masking is 'response', else Windows.

    options: fields of Options. random_length, random_split and isolate are for Windows, pad_group is for Examples.
    copies: how many successive rows each window or example fills (2 for pairs of complementary masks).
    """
    kind = Examples if masking == 'response' else Windows
    return kind(dataset, split, tok, seq_len, seed, Options(**options))


def keyed_rng(*key):
    """Return a numpy generator that depends on the key alone, some integers."""
    return np.random.default_rng(key)


def shuffled(sample, n, seed):
    """Return (epoch, which of n things, generator of the epoch) at place `sample` of an endless stream.

    Each epoch has every thing once. Its order i -> (a i + b) mod n, with a coprime to n, takes no memory.
    """
    epoch, i = divmod(sample, n)
    rng = keyed_rng(seed, epoch, ORDER)
    a, b = rng.integers(n, size=2).tolist()
    while math.gcd(a, n) > 1:
        a = int(rng.integers(n))
    return epoch, (a * i + b) % n, rng


def evenly_spaced(n, limit):
    """Return `limit` of the numbers 0 .. n-1, evenly spaced, or all of them for 0."""
    limit = min(limit or n, n)
    return [i * n // limit for i in range(limit)]


class Windows:
    """Pre-training (Eq. 3): windows of T tokens, all maskable. Each epoch cuts the text at other places.

    random_length: share of windows of which only a random length is kept (LLaDA: 0.01). random_split: share cut into
    two parts that do not attend to each other (iLLaDA: 0.3). isolate: nor do documents.
    """

    def __init__(self, dataset, split, tok, seq_len, seed, options):
        self.parts, self.split, self.eos_id = dataset.parts, split, tok.eos_id
        self.T, self.seed, self.options = seq_len, seed, options
        self.share = np.array(dataset.weights) / sum(dataset.weights)
        self.tokens = [corpus.count(split, 'tokens') for corpus in self.parts]
        self.n_examples = sum(corpus.count(split, 'examples') for corpus in self.parts)
        self.bytes_per_token = 0.

        for corpus, tokens, share in zip(self.parts, self.tokens, self.share):
            if tokens < seq_len:
                raise UserError(f'{corpus.folder}: split {split} has {tokens} tokens, too few for seq_len={seq_len}')
            self.bytes_per_token += float(share * corpus.count(split, 'bytes') / tokens)

    def window(self, sample):
        """Return window number `sample` of an endless stream: (T,) int64."""
        part, total = 0, self.tokens[0]
        if len(self.parts) > 1:
            # a mixture draws with replacement, so that its weights hold however small a part is
            rng = keyed_rng(self.seed, sample, MIXTURE)
            part = rng.choice(len(self.parts), p=self.share)
            start = rng.integers(self.tokens[part] - self.T + 1)
        else:
            n = max(1, (total - self.T + 1) // self.T)      # windows that fit behind any offset
            _, i, rng = shuffled(sample, n, self.seed)
            start = i * self.T + rng.integers(min(self.T, total - n * self.T + 1))
        return self.parts[part].read(self.split, int(start), self.T)

    def cuts(self, it, size):
        """Return how many tokens of each window are kept, and where its border is (T: nowhere), two (size,) int64."""
        random = keyed_rng(self.seed, it, CUTS).random((size, 2))
        which, where = torch.from_numpy(random).unbind(1)
        short = which < self.options.random_length
        split = ~short & (which < self.options.random_length + self.options.random_split)
        keep = torch.where(short, 1 + (where * self.T).long(), self.T)
        border = torch.where(split, 1 + (where * (self.T - 1)).long(), keep)
        return keep, border

    def batch(self, it, rows, size):
        """Return the rows `rows` (a range) of the `size` windows of iteration `it` -> Batch."""
        windows = [self.window((it * size + row) // self.options.copies) for row in rows]
        x0 = torch.from_numpy(np.stack(windows))
        keep, border = (cut[rows.start:rows.stop] for cut in self.cuts(it, size))
        maskable = torch.arange(self.T) < keep[:, None]
        cu_seqlens = None
        if self.options.isolate or border.min() < self.T:
            cu_seqlens = self.segments(x0, border)
        return Batch(x0, maskable, cu_seqlens)

    def segments(self, x0, border):
        """Return the limits of what may attend to each other, (n+1,) int32 in the flattened batch."""
        starts = torch.arange(0, x0.numel() + 1, self.T)
        limits = torch.cat([starts, starts[:-1] + border])
        n = 2 * len(x0) + 1
        if self.options.isolate:
            ends = (x0.flatten() == self.eos_id).nonzero()[:, 0] + 1
            limits = torch.cat([limits, ends])
            n = math.ceil(len(limits.unique()) / 64) * 64

        # empty segments at the end make few different sizes, because each new size compiles a graph
        limits = limits.unique()
        padding = limits[-1:].expand(n - len(limits))
        return torch.cat([limits, padding]).int()

    def held_out(self, limit=0):
        """Return ([(x0, maskable)], bytes of text per row): `limit` windows of the split in order, or all, (n, T)."""
        x0 = []
        if len(self.parts) > 1:                             # each part has its share, so all cannot be meant
            limit = limit or 1000
        for corpus, tokens, share in zip(self.parts, self.tokens, self.share):
            n = limit and max(1, round(share * limit))
            x0 += [corpus.read(self.split, i * self.T, self.T) for i in evenly_spaced(tokens // self.T, n)]
        x0 = torch.from_numpy(np.stack(x0))
        return [(x0, torch.ones_like(x0, dtype=torch.bool))], self.T * self.bytes_per_token


class Examples:
    """Fine-tuning (Eq. 5): one example per row. Response, EOS and padding are maskable, and the prompt is not.

    pad_group: how many consecutive rows are padded to the same length (0: all rows of an update). Padding is EOS, and
    it counts in L' (LLaDA, App. B.1).
    """

    bytes_per_token = None

    def __init__(self, dataset, split, tok, seq_len, seed, options):
        self.corpus, self.split, self.tok = dataset.parts[0], split, tok
        self.T, self.seed, self.options = seq_len, seed, options
        self.n_examples = self.corpus.count(split, 'examples')
        where = f'{self.corpus.folder}, split {split}'
        if len(dataset.parts) > 1 or not self.n_examples:
            raise UserError(f"{where}: masking='response' needs one data set of examples (messages, or prompt and "
                            "response); use masking='unified' for text")

        rows = self.corpus.rows(split)
        self.rows = rows[rows[:, 2] - rows[:, 0] <= seq_len]
        too_long = len(rows) - len(self.rows)
        if too_long == len(rows):
            raise UserError(f'{where}: all {too_long} examples are longer than seq_len={seq_len}')
        if too_long and os.environ.get('RANK', '0') == '0':
            say(f'{where}: leaving out {too_long} of {len(rows)} examples, longer than seq_len={seq_len}')

        _, first_turns = np.unique(self.rows[:, 3], return_index=True)
        self.dialogues = np.append(first_turns, len(self.rows))             # where each one begins

    def drawn(self, samples):
        """Return the examples at these places of an endless stream, (n, 4): each dialogue once per epoch.

        Of a dialogue one random turn is drawn, and the others wait for other epochs (issue 77 of the official code).
        """
        chosen = []
        for sample in samples:
            epoch, dialogue, _ = shuffled(sample, len(self.dialogues) - 1, self.seed)
            turns = self.dialogues[dialogue:dialogue + 2]
            chosen.append(keyed_rng(self.seed, epoch, TURNS, dialogue).integers(*turns))
        return self.rows[chosen]

    def batch(self, it, rows, size):
        """Return the rows `rows` (a range inside of a group) of the `size` examples of iteration `it` -> Batch."""
        group_size = self.options.pad_group or size
        start = rows.start // group_size * group_size
        stop = max(rows.stop, min(start + group_size, size))
        group = self.drawn([(it * size + row) // self.options.copies for row in range(start, stop)])
        longest = int((group[:, 2] - group[:, 0]).max())
        return Batch(*self.padded(group[rows.start - start:rows.stop - start], longest), None)

    def padded(self, rows, length):
        """Return examples (n, 4) as x0 (n, length) int64, maskable (n, length) bool."""
        x0 = torch.full((len(rows), length), self.tok.eos_id)
        maskable = torch.zeros_like(x0, dtype=torch.bool)
        for i, (start, response, end, _) in enumerate(rows.tolist()):
            x0[i, :end - start] = torch.from_numpy(self.corpus.read(self.split, start, end - start))
            maskable[i, response - start:] = True
        return x0, maskable

    def held_out(self, limit=0):
        """Return ([(x0 (n, T), maskable (n, T)), ...] for several T, bytes of text per row).

        Each example is padded to a multiple of 32, so that its loss does not depend on which others there are.
        """
        rows = self.rows[evenly_spaced(len(self.rows), limit)]
        lengths = np.ceil((rows[:, 2] - rows[:, 0]) / 32) * 32
        lengths = lengths.clip(max=self.T).astype(int)
        groups = [self.padded(rows[lengths == T], int(T)) for T in np.unique(lengths)]

        n_bytes = 0
        for x0, maskable in groups:
            for answer in map(torch.masked_select, x0, maskable):
                n_bytes += len(self.tok.decode(answer, skip_special_tokens=True).encode())
        return groups, n_bytes / len(rows)


# ----------------------------------------------------------------------------------------------------------


def files_of(patterns):
    """Return the files that a list of names and patterns stands for, each once."""
    found = []
    for pattern in filter(None, patterns):
        # a name that exists is that file, even if it looks like a pattern, as part[1].txt does
        matches = [] if Path(pattern).exists() else sorted(glob.glob(pattern))
        found += matches or [pattern]
    return list(dict.fromkeys(found))


def main(cfg):
    sources = files_of(cfg.input.split(','))
    if not cfg.name and not sources:
        for known, (_, _, what) in DATASETS.items():
            print(f'{known:<12} {what}')
        print('your own text: python data.py --input=FILE --out=data/my   (--help shows all settings)')
        return
    if cfg.name and cfg.name not in DATASETS:
        raise UserError(f'unknown data set {cfg.name!r}; expected {" or ".join(DATASETS)}, or --input=FILE')
    if not cfg.name and not cfg.out:
        raise UserError('--input needs --out=FOLDER')

    records, tokenizer, _ = DATASETS.get(cfg.name, (None, 'bpe-1024', ''))
    out = cfg.out or f'data/{cfg.name}'
    prepare(
        sources or [list(records())], out, cfg.tokenizer or tokenizer,
        val=files_of(cfg.val_input.split(',')),
        val_every=cfg.val_every,
        workers=cfg.workers or os.cpu_count())

    corpus = Corpus(out)
    for split in SPLITS:
        tokens = corpus.count(split, 'tokens')
        print(f'{out}/{split}: {tokens:,} tokens, {corpus.count(split, "bytes") / tokens:.2f} bytes per token')
    how = ' --masking=response' if corpus.count('train', 'examples') else ''
    print(f'train on it: python train.py --dataset={out}{how} --out_dir=out/{Path(out).name}')


if __name__ == '__main__':
    run(main, globals(), positional=('name',))
