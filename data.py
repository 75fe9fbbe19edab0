"""Text becomes ids, ids become files, and files become batches.

    python data.py                                          # lists the data sets that it can make
    python data.py shakespeare                              # downloads one and tokenizes it to data/shakespeare
    python data.py --input=a.txt,b.jsonl --out=data/my --tokenizer=gpt2

A data set is a folder: a tokenizer, token ids (train_00000.bin, val_00000.bin) and a manifest.json that counts them.
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
import time
import zlib
from collections import namedtuple
from dataclasses import dataclass
from itertools import chain, count, groupby
from pathlib import Path

import jinja2
import numpy as np
import tiktoken
import tokenizers
import torch
import torch.nn.functional as F
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer
from tqdm import tqdm

from configurator import UserError, run, say

name = ''                       # a data set from the list that `python data.py` prints
input = ''                      # your own files: .txt .jsonl .jsonl.gz .json .parquet, or patterns, with commas
val_input = ''                  # files to hold out, likewise. Default: hold out a part of the input
out = ''                        # folder to write, default data/NAME. A data set that is there is replaced
tokenizer = ''                  # bytes, bpe-N (learned), gpt2 or another tiktoken name, or a tokenizer.json
workers = 0                     # number of processes, each with a file of its own. 0: one per core
val_every = 10                  # hold out every N-th piece of a document, or one in N examples

# ----------------------------------------------------------------------------------------------------------
# 1. Tokenizers. The `tokenizers` library does the work, so that ids are the same as everywhere else.

# What a special token is called: first in LLaDA's release, which our own vocabularies follow, then elsewhere.
# LLaDA pads with EOS.
ROLES = {
    'bos': ('<|startoftext|>', '<s>', '<|begin_of_text|>'),
    'eos': ('<|endoftext|>', '</s>', '<|end_of_text|>'),
    'mask': ('<|mdm_mask|>', '<[MASK]>', '[MASK]', '<mask>'),
    'start_header': ('<|start_header_id|>',),
    'end_header': ('<|end_header_id|>',),
    'eot': ('<|eot_id|>', '<eot_id>'),
    'pad': ('<|endoftext|>', '</s>', '<|end_of_text|>')}
LLADA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
# GPT-2's words, but digits alone, so that a number has the same tokens wherever it stands.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# A code point that no text contains, because Unicode reserves it.
BREAK = '\U0010ffff'


class Tokenizer:
    """Turn text into ids and back.

    mask_id, eos_id, pad_id, bos_id, eot_id: special tokens, None if released weights have no such token.
    config: tokenizer_config.json, which may name them. complete: add what the vocabulary lacks of ROLES.
    """

    def __init__(self, hf, config=None, template=None, complete=True):
        self.hf = hf                                        # a tokenizers.Tokenizer
        self.config = config or {}
        self.names = {}                                     # bos_token: its name, and so on
        # some files ask for it, but here a text is always encoded whole
        hf.no_truncation()
        hf.no_padding()

        for role, usual in ROLES.items():
            named = self.config.get(f'{role}_token')
            if isinstance(named, dict):
                named = named['content']
            choices = [choice for choice in (named, *usual) if choice]
            best = [choice for choice in choices if hf.token_to_id(choice) is not None]
            if complete and not best:
                best = choices
            setattr(self, f'{role}_id', None)
            if best:
                # Some files have the token, but do not call it special. Then typing its name would make it.
                hf.add_special_tokens(best[:1])
                setattr(self, f'{role}_id', hf.token_to_id(best[0]))
                self.names[f'{role}_token'] = best[0]

        if not template and None not in (self.start_header_id, self.end_header_id, self.eot_id):
            template = LLADA_TEMPLATE
        self.template = template
        self.ids = set(hf.get_vocab().values())
        self.vocab_size = max(self.ids) + 1
        special = [re.escape(token.content) for token in hf.get_added_tokens_decoder().values() if token.special]
        self.special = re.compile(f"({'|'.join(sorted(special, reverse=True))})")

    def encode(self, text, special_names=False):
        """Return the ids of a text. special_names: read the name of a special token as that token, not as text."""
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
            raise UserError('the chat template of the tokenizer drops, repeats or changes contents')

        # If somebody types the name of a special token, BREAK between its characters keeps it text. Whatever
        # contains no BREAK is encoded as transformers does, with the names that the template writes as tokens.
        contents = [self.special.sub(lambda typed: BREAK.join(typed[0]), m['content']) for m in messages]
        text = self.render(messages, contents)
        ids = []
        for part in self.special.split(text) if BREAK in text else [text]:
            ids += self.encode(part.replace(BREAK, ''), special_names=BREAK not in part)
        return ids

    def render(self, messages, contents):
        """Return the text that the chat template makes of messages with these contents."""
        if not self.template:
            raise UserError('the tokenizer has no chat template; put a chat_template.jinja beside tokenizer.json')
        messages = [message | {'content': content} for message, content in zip(messages, contents)]
        try:
            template = compile_template(self.template)
            return template.render(messages=messages, add_generation_prompt=True, **self.names)
        except jinja2.TemplateError as error:
            raise UserError(f'the chat template of the tokenizer says: {error}') from None

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json, for get_tokenizer and for transformers."""
        config = {'tokenizer_class': 'PreTrainedTokenizerFast', **self.config, **self.names}
        config['chat_template'] = self.template
        self.hf.save(f'{folder}/tokenizer.json')
        write_json(Path(folder, 'tokenizer_config.json'), config)

    def fingerprint(self):
        """Return a checksum, the same for two tokenizers that encode every text to the same ids."""
        facts = f'{self.hf.to_str()} {self.mask_id} {self.eos_id}'
        return hashlib.sha256(facts.encode()).hexdigest()

    def unused(self, vocab_size):
        """Return the ids below vocab_size that are no token, for a network with more outputs than tokens."""
        return [i for i in range(vocab_size) if i not in self.ids]


@functools.lru_cache
def compile_template(source):
    """Compile a chat template. It is a stranger's program, so it runs in a sandbox, as in transformers."""
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
        return Tokenizer(byte_level(dict(zip(byte_symbols(), range(256)))))
    if spec in tiktoken.list_encoding_names():
        return from_tiktoken(spec)

    path = Path(spec)
    if path.is_dir():
        path = path / 'tokenizer.json'
    if not path.is_file():
        raise UserError(f'{spec}: unknown tokenizer; expected bytes, bpe-N, a tokenizer.json, a folder that holds '
                        f'one, or {", ".join(tiktoken.list_encoding_names())}')

    config = read_json(path.with_name('tokenizer_config.json'))
    template = config.get('chat_template')
    if isinstance(template, list):
        template = {entry['name']: entry['template'] for entry in template}.get('default')
    beside = path.with_name('chat_template.jinja')
    if beside.is_file():
        template = beside.read_text(encoding='utf-8')
    return Tokenizer(tokenizers.Tokenizer.from_file(str(path)), config, template, complete)


def read_json(path):
    """Return the JSON object in a file, {} if there is no file."""
    return json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1), encoding='utf-8')


def tokenizer_of(meta, mask_id=None):
    """Return the Tokenizer of loaded weights (meta of model.load_model), with the special ids that they name.

    mask_id: given by the user where nothing else names it. Raises UserError if two sources differ, or if mask or
    EOS stay unknown: a guess, such as the unknown token, would go wrong silently.
    """
    tok = get_tokenizer(meta['folder'], complete=False)
    for role in ('mask', 'eos', 'bos', 'eot', 'pad'):
        key = f'{role}_id'
        ids = [meta[key], getattr(tok, key), mask_id if role == 'mask' else None]
        ids = [i for i in ids if i is not None]
        if len(set(ids)) > 1 and role != 'pad':
            raise UserError(f"{meta['folder']}: config.json, tokenizer or --mask_id disagree on the {role} id, {ids}")
        setattr(tok, key, ids[0] if ids else tok.eos_id)

    return tok


def byte_symbols():
    """Return GPT-2's printable characters for the bytes 0 to 255, in which vocabularies spell their tokens."""
    others = count(256)
    return [chr(b if chr(b).isprintable() and chr(b) != ' ' else next(others)) for b in range(256)]


def byte_level(vocab, merges=(), words=WORDS):
    """Return a tokenizers.Tokenizer: byte-pair encoding inside of what the pattern `words` finds."""
    # tiktoken looks up a whole word before it merges; for other vocabularies this changes nothing
    hf = tokenizers.Tokenizer(BPE(vocab, list(merges), ignore_merges=True))
    hf.pre_tokenizer = Sequence([
        Split(tokenizers.Regex(words), 'isolated'),
        ByteLevel(add_prefix_space=False, use_regex=False)])
    hf.decoder = decoders.ByteLevel()
    return hf


def from_tiktoken(name):
    """Return a vocabulary of OpenAI as a Tokenizer. tiktoken downloads it, or finds it in TIKTOKEN_CACHE_DIR."""
    try:
        encoding = tiktoken.get_encoding(name)
    except OSError as error:
        raise UserError(f'could not download tokenizer {name} ({type(error).__name__}); without a network, let '
                        'TIKTOKEN_CACHE_DIR name a folder that has it, or give a tokenizer.json') from None

    # tiktoken joins any two neighbours that make a token, lowest rank first. So in order of rank, all ways to cut
    # a token in two are merges. (Llama 3's tokenizer.json lists them like this, too.)
    ranks = encoding._mergeable_ranks                       # bytes of a token: its id
    symbols = dict(enumerate(byte_symbols()))
    vocab, merges = {}, []
    for token in sorted(ranks, key=ranks.get):
        word = token.decode('latin-1').translate(symbols)
        vocab[word] = ranks[token]
        for i in range(1, len(token)):
            if token[:i] in ranks and token[i:] in ranks:
                merges.append((word[:i], word[i:]))

    # special tokens are in the vocabulary, too, because their ids may leave gaps
    vocab |= encoding._special_tokens
    # {1,3}+ means at most three digits in tiktoken, and any number of them here
    hf = byte_level(vocab, merges, encoding._pat_str.replace('{1,3}+', '{1,3}'))
    hf.add_special_tokens(list(encoding._special_tokens))
    return Tokenizer(hf)


def learn_tokenizer(texts, vocab_size):
    """Learn a byte-level vocabulary of at most vocab_size tokens, special tokens included -> Tokenizer."""
    hf = byte_level({})
    hf.train_from_iterator(texts, BpeTrainer(
        vocab_size=vocab_size - len(set(ROLES.values())),
        min_frequency=2,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False))
    return Tokenizer(hf)


# ----------------------------------------------------------------------------------------------------------
# 2. Records. {"text"} is a document, {"messages"} or {"response"} an example for fine-tuning.


def docs_text():
    """Yield real text that comes with Python: pydoc's language reference, docstrings of the standard library.

    Modules are parsed, never imported, and repeated paragraphs are dropped. About 1.5 million characters, which
    vary a little with the Python version.
    """
    from pydoc_data.topics import topics
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
        except (SyntaxError, ValueError):
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
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if not path.exists():
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
CONTENT = {'text', 'input', 'prompt_ids', 'response_ids', *LISTS}.union(*PAIRS)


def read_records(source, accept=None):
    """Yield (where, record) of a file. A .txt is one document, and the other formats have a record per row.

    accept: turns a row, a dict, into a record, or raises ValueError. Default: as_record. Raises UserError with
    file:line, or file:row. (A source that is no path is a list of (where, record) already.)
    """
    if not isinstance(source, (str, Path)):
        yield from source
        return

    for number, row in enumerate(read_rows(Path(source)), 1):
        if not row:                                         # an empty line
            continue
        try:
            if isinstance(row, bytes):
                row = json.loads(row)
            yield f'{source}:{number}', (accept or as_record)(row)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, UnicodeDecodeError):
                number += error.object.count(b'\n', 0, error.start)
            raise UserError(f'{source}:{number}: {error}') from None


def read_rows(path):
    """Yield the rows of a file: a dict, or a line of JSON as bytes."""
    if not path.name.endswith(FORMATS):
        raise UserError(f'{path}: unknown format; expected {", ".join(FORMATS)}')

    if path.suffix == '.txt':
        yield {'text': path.read_bytes()}
    elif path.suffix == '.json':
        yield from json.loads(path.read_bytes())
    elif path.suffix == '.parquet':
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise UserError(f'{path}: reading .parquet needs one more package: pip install pyarrow') from None
        for batch in ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    else:
        with (gzip.open if path.suffix == '.gz' else open)(path, 'rb') as lines:
            yield from map(bytes.strip, lines)


def as_record(row):
    """Return a row as {"text"}, {"messages"}, {"response"} or {"prompt_ids", "response_ids"}, or raise ValueError.

    The two sides of an example become messages, whatever they are called. If a row has several of these, messages
    come first, because public data sets carry the same text beside them. Other keys stay.
    """
    record = {key: value for key, value in row.items() if key not in CONTENT}
    messages = [row[key] for key in LISTS if isinstance(row.get(key), list)]
    for prompt, response in PAIRS:
        if prompt in row and response in row:
            question = {'role': 'user', 'content': row[prompt]}
            if prompt == 'instruction' and row.get('input'):
                question['content'] = as_text(row[prompt]) + '\n\n' + as_text(row['input'])
            messages.append([question, {'role': 'assistant', 'content': row[response]}])

    if messages:
        record['messages'] = list(map(as_message, messages[0]))
        if record['messages'][-1]['role'] != 'assistant':
            raise ValueError('the last message must be by the assistant')
        return record

    if 'prompt_ids' in row and 'response_ids' in row:
        return record | {key: list(map(int, row[key])) for key in ('prompt_ids', 'response_ids')}
    for key in ('text', 'response'):
        if key in row:
            return record | {key: as_text(row[key])}
    raise ValueError(f'expected text, messages, or prompt and response; got the keys {list(row)}')


def as_message(message):
    """Return a message as {"role", "content"}, two texts that are not empty, or raise ValueError."""
    role = as_text(message.get('role', message.get('from')))
    content = message.get('content', message.get('value'))
    if isinstance(content, list):                           # in parts, as OpenAI has them
        content = ''.join(part['text'] for part in content)
    return {'role': SPEAKERS.get(role, role), 'content': as_text(content)}


def as_text(value):
    """Return a text that is not empty, or raise ValueError."""
    if isinstance(value, bytes):                            # of a .txt, or a binary column of a .parquet
        value = value.decode('utf-8-sig')
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'expected a text that is not empty, got {value!r:.60}')
    value.encode()                                          # half a surrogate pair is not text
    return value


# ----------------------------------------------------------------------------------------------------------
# 3. Preparing. Records become files of token ids.

FORMAT = 'nanollada data 3'
SPLITS = ('train', 'val')
# A document, or the part of it in one split, or an answer with all that was said before (LLaDA, App. B.1).
Item = namedtuple('Item', 'split ids n_bytes n_prompt record', defaults=(0, ''))


def prepare(sources, out, tokenizer, *, val=(), val_every=10, workers=1):
    """Tokenize sources (files, or lists of (where, record)) into the folder `out` -> its manifest.

    val: sources to hold out. If there are none, one piece in val_every is held out of the others.
    tokenizer: what get_tokenizer takes, or bpe-N to learn N tokens from the training pieces.
    The folder is written under another name and then renamed, so it is complete or absent.
    """
    out = Path(out).resolve()
    check_out(out, [*sources, *val])
    every = [0 if val else val_every] * len(sources) + [1] * len(val)
    jobs = list(zip(count(), [*sources, *val], every))
    size = str(tokenizer).removeprefix('bpe-')
    tok = learn_tokenizer(training_texts(jobs), int(size)) if size.isdecimal() else get_tokenizer(tokenizer)

    aside = out.with_name(f'.{out.name}.{os.getpid()}')
    aside.mkdir(parents=True)
    try:
        tok.save(aside)
        tokenize = functools.partial(tokenize_source, folder=aside)
        if min(workers, len(jobs)) > 1:
            with multiprocessing.get_context('spawn').Pool(min(workers, len(jobs))) as pool:
                items = list(chain(*pool.imap(tokenize, jobs)))
        else:
            items = list(chain(*map(tokenize, jobs)))

        splits = {split: write_split(items, split, aside) for split in SPLITS}
        files = [path.name for path in aside.iterdir()]
        manifest = {'format': FORMAT, 'vocab_size': tok.vocab_size, 'splits': splits, 'files': sorted(files)}
        write_json(aside / 'manifest.json', manifest)
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

    manifest = read_json(out / 'manifest.json')
    others = {path.name for path in out.glob('*')}
    if 'nanollada' in str(manifest.get('format')):
        say(f'{out}: the data set that is there will be replaced')
        others -= {'manifest.json', *manifest['files']}
    if others:
        raise UserError(f'{out} holds files that are no data set, such as {min(others)}; choose another --out')


def tokenize_source(job, folder):
    """Tokenize one source -> its Items, in order."""
    tok = get_tokenizer(folder)
    dtype = dtype_of(tok.vocab_size)
    items = []
    for where, split, pieces in split_source(*job):
        if isinstance(pieces[0], str):
            ids = list(chain(*map(tok.encode, pieces)))
            items.append(Item(split, np.array([*ids, tok.eos_id], dtype), len(''.join(pieces).encode())))
            continue

        line = json.dumps(pieces[0], ensure_ascii=False, default=str) + '\n'
        for prompt, response in turns_of(pieces[0], tok):
            ids = [*prompt, *response, tok.eos_id]
            if max(ids) >= tok.vocab_size:
                raise UserError(f'{where}: id {max(ids)} is not in the vocabulary of {tok.vocab_size} tokens')
            n_bytes = len(tok.decode(ids, skip_special_tokens=True).encode())
            items.append(Item(split, np.array(ids, dtype), n_bytes, len(prompt), line))
            line = ''                                       # the first answer of a dialogue carries the record
    return items


def write_split(items, split, folder):
    """Write the Items of a split -> {'tokens', 'bytes', 'examples'}, how many it has.

    Of examples also where they are: rows (n, 4) start, response, end, number of the dialogue; and the held-out
    records, which evaluate.py asks.
    """
    items = [item for item in items if item.split == split]
    if not items:
        raise UserError(f'not enough text to hold out a validation split (nothing is left for {split}); give more, '
                        'or say with --val_input=FILE what to hold out')
    path = folder / f'{split}_00000.bin'
    np.concatenate([item.ids for item in items]).tofile(path)
    ends = np.cumsum([len(item.ids) for item in items])
    prompts = np.array([item.n_prompt for item in items])
    if prompts.any():
        if not prompts.all():
            raise UserError('documents (text) and examples do not mix; prepare them separately')
        starts = np.append(0, ends[:-1])
        dialogues = np.cumsum([item.record > '' for item in items])
        np.save(path.with_suffix('.rows.npy'), np.stack([starts, starts + prompts, ends, dialogues], 1))
        if split == 'val':
            path.with_suffix('.jsonl').write_text(''.join(item.record for item in items), encoding='utf-8')
    return {'tokens': int(ends[-1]), 'bytes': sum(item.n_bytes for item in items), 'examples': int((prompts > 0).sum())}


def split_source(number, source, val_every):
    """Yield (where, split, pieces) of a source: successive pieces of a document (str), or one example (dict).

    Of documents, every val_every-th piece is held out, counted from `number`, because the tail of a text would share
    long passages with the rest. Of examples one in val_every, by a hash, so that no question is in both splits.
    """
    numbers = count(number + 1)
    for where, record in tqdm(read_records(source), disable=number > 0 or None, leave=False):
        pieces = [(record, question_hash(record))]
        if 'text' in record:
            pieces = zip(chunks(record['text']), numbers)
        for held_out, group in groupby(pieces, lambda piece: val_every > 0 and piece[1] % val_every == 0):
            yield where, SPLITS[held_out], [piece for piece, _ in group]


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
    if 'accept' in record or 'prompt_ids' in record:        # "accept": questions with many answers may be few
        key = json.dumps(record, sort_keys=True, default=str)
    return zlib.crc32(key.strip().encode())


def training_texts(jobs):
    """Yield, in pieces, the text of everything that goes into the training split."""
    for job in jobs:
        for _, split, pieces in split_source(*job):
            if split == 'train':
                # short pieces, because the time to learn from a word grows with the square of its length
                yield from chain(*map(chunks, map(text_of, pieces)))


def text_of(piece):
    """Return all text of a piece of a document, or of an example."""
    if isinstance(piece, str):
        return piece
    said = [f'{message["role"]}\n\n{message["content"]}' for message in piece.get('messages', [])]
    return '\n\n'.join(said) or piece.get('response', '')


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


def dtype_of(vocab_size):
    """Return the type of the ids in the files. In uint16, id 126336 would silently become 60800."""
    return np.dtype('uint16' if vocab_size <= 2 ** 16 else 'uint32')


# ----------------------------------------------------------------------------------------------------------
# 4. Loading. Files become batches.

Dataset = namedtuple('Dataset', 'parts weights')            # lists of Corpus and of float
ORDER, CUTS, TURNS, MIXTURE = range(4)                      # what a random number is for


class Corpus:
    """A prepared folder. facts: for each split the number of tokens, bytes of text and examples."""

    def __init__(self, folder):
        self.folder = Path(folder)
        manifest = read_json(self.folder / 'manifest.json')
        if manifest.get('format') != FORMAT:
            what = 'a data set of another version' if manifest else 'no data set here'
            raise UserError(f'{folder}: {what}; make it: python data.py {self.folder.name}, or python data.py '
                            f'--input=FILE --out={folder}, or tests/lab/worlds.py for world, instruct and facts')

        self.facts = manifest['splits']
        self.tokens = {}
        for split in SPLITS:
            # mapped into memory, not read
            path = self.folder / f'{split}_00000.bin'
            self.tokens[split] = np.memmap(path, dtype_of(manifest['vocab_size']), 'r')
            if len(self.tokens[split]) != self.facts[split]['tokens']:
                raise UserError(f'{path}: not as long as the manifest says; prepare the data again')

    def tokenizer(self):
        """Return the Tokenizer that made it."""
        return get_tokenizer(self.folder)

    def read(self, split, start, end):
        """Return the tokens start .. end of a split, int64."""
        return torch.from_numpy(self.tokens[split][start:end].astype(np.int64))


def open_dataset(name):
    """Return the Dataset of a name in data/, a folder, or a mixture 'a:0.7,b:0.3'. 'docs' is made on first use."""
    names, weights = [name], [1.]
    if ':' in name and not Path(name).is_dir():
        try:
            names, weights = zip(*(part.rsplit(':', 1) for part in name.split(',')))
            weights = np.array(weights, float)
        except ValueError:
            raise UserError(f'dataset {name!r}: a mixture is written name:weight,name:weight') from None

    parts = list(map(open_corpus, names))
    if len({corpus.tokenizer().fingerprint() for corpus in parts}) > 1:
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
    """Return the rows of a split as training sees them: Examples if masking is 'response', else Windows."""
    kind = Examples if masking == 'response' else Windows
    return kind(dataset, split, tok, seq_len, seed, **options)


def shuffled(sample, n, seed):
    """Return (epoch, which of n things, generator of the epoch) at place `sample` of an endless stream.

    Each epoch has every thing once. Its order i -> (a i + b) mod n, with a coprime to n, takes no memory.
    """
    epoch, i = divmod(sample, n)
    rng = np.random.default_rng([seed, epoch, ORDER])
    a, b = rng.integers(n, size=2).tolist()
    while math.gcd(a, n) > 1:
        a = int(rng.integers(n))
    return epoch, (a * i + b) % n, rng


def evenly_spaced(n, limit):
    """Return `limit` of the numbers 0 .. n-1, evenly spaced, or all of them for 0."""
    limit = min(limit or n, n)
    return [i * n // limit for i in range(limit)]


@dataclass
class Source:
    """The rows of a split, as training sees them."""
    dataset: Dataset
    split: str
    tok: Tokenizer
    T: int
    seed: int = 0
    random_length: float = 0.   # share of windows of which only a random length is kept (LLaDA: 0.01)
    random_split: float = 0.    # share of windows in two parts that do not attend to each other (iLLaDA: 0.3)
    isolate: bool = False       # documents do not attend to each other, either
    copies: int = 1             # how many successive rows a window or example fills (2: complementary masks)
    pad_group: int = 0          # how many successive examples are padded to one length. 0: all of an update


class Windows(Source):
    """Pre-training (Eq. 3): windows of T tokens, all maskable. Each epoch cuts the text at other places."""

    def __post_init__(self):
        facts = [corpus.facts[self.split] for corpus in self.dataset.parts]
        self.n_tokens = [fact['tokens'] for fact in facts]
        if min(self.n_tokens) < self.T:
            raise UserError(f'split {self.split} has {min(self.n_tokens)} tokens, too few for seq_len={self.T}')
        self.share = np.array(self.dataset.weights) / sum(self.dataset.weights)
        self.bytes_per_token = float(self.share @ [fact['bytes'] / fact['tokens'] for fact in facts])
        self.n_examples = sum(fact['examples'] for fact in facts)

    def window(self, sample):
        """Return window number `sample` of an endless stream: (T,) int64."""
        # of a mixture each window draws its part; a single part is always drawn
        part = np.random.default_rng([self.seed, sample, MIXTURE]).choice(len(self.share), p=self.share)
        n_tokens = self.n_tokens[part]
        n = max(1, (n_tokens - self.T + 1) // self.T)       # windows that fit behind any offset
        _, i, rng = shuffled(sample, n, self.seed)
        start = i * self.T + rng.integers(min(self.T, n_tokens - n * self.T + 1))
        return self.dataset.parts[part].read(self.split, start, start + self.T)

    def cuts(self, it, size):
        """Return how many tokens of each window are kept, and where its border is (T: nowhere), (size,) int64."""
        which, where = torch.from_numpy(np.random.default_rng([self.seed, it, CUTS]).random((2, size)))
        short = which < self.random_length
        split = ~short & (which < self.random_length + self.random_split)
        keep = torch.where(short, 1 + (where * self.T).long(), self.T)
        return keep, torch.where(split, 1 + (where * (self.T - 1)).long(), keep)

    def batch(self, it, rows, size):
        """Return x0 (B, T) int64, maskable (B, T) bool and cu_seqlens, the limits of segments that attend only to
        themselves, (n+1,) int32 in the flattened batch, or None. rows: a range of the `size` rows of iteration `it`.
        """
        x0 = torch.stack([self.window((it * size + row) // self.copies) for row in rows])
        keep, border = (cut[rows.start:rows.stop] for cut in self.cuts(it, size))
        maskable = torch.arange(self.T) < keep[:, None]
        if not self.isolate and border.min() == self.T:
            return x0, maskable, None

        starts = torch.arange(0, x0.numel() + 1, self.T)
        limits = torch.cat([starts, starts[:-1] + border])
        if self.isolate:
            limits = torch.cat([limits, 1 + (x0.flatten() == self.tok.eos_id).nonzero()[:, 0]])
        limits = limits.unique()
        # empty segments at the end make few different shapes, because each new shape compiles a graph
        n = math.ceil(len(limits) / 64) * 64 if self.isolate else 2 * len(x0) + 1
        cu_seqlens = F.pad(limits, (0, n - len(limits)), value=x0.numel())
        return x0, maskable, cu_seqlens.int()

    def held_out(self, limit=0):
        """Return ([(x0, maskable)], bytes of text per row): `limit` windows of the split in order, or all, (n, T)."""
        if len(self.share) > 1:                             # each part has its share, so all cannot be meant
            limit = limit or 1000
        x0 = []
        for corpus, n_tokens, share in zip(self.dataset.parts, self.n_tokens, self.share):
            for i in evenly_spaced(n_tokens // self.T, limit and max(1, round(share * limit))):
                x0.append(corpus.read(self.split, i * self.T, (i + 1) * self.T))
        x0 = torch.stack(x0)
        return [(x0, torch.ones_like(x0, dtype=torch.bool))], self.T * self.bytes_per_token


class Examples(Source):
    """Fine-tuning (Eq. 5): one example per row. Response, EOS and padding are maskable, and the prompt is not.

    Padding is EOS, and it counts in L' (LLaDA, App. B.1).
    """

    bytes_per_token = None

    def __post_init__(self):
        self.corpus = self.dataset.parts[0]
        self.n_examples = self.corpus.facts[self.split]['examples']
        if len(self.dataset.parts) > 1 or not self.n_examples:
            raise UserError(f"{self.corpus.folder}: masking='response' needs one data set of examples, made of "
                            'messages, or of prompt and response')

        rows = np.load(self.corpus.folder / f'{self.split}_00000.rows.npy')
        self.rows = rows[rows[:, 2] - rows[:, 0] <= self.T]
        say(f'{self.corpus.folder}: {len(self.rows)} of {len(rows)} examples fit into seq_len={self.T}')
        _, first_turns = np.unique(self.rows[:, 3], return_index=True)
        self.dialogues = np.append(first_turns, len(self.rows))             # where each one begins

    def drawn(self, sample):
        """Return the example (4,) at this place of an endless stream that has each dialogue once per epoch.

        One random turn of it is drawn. The others wait for other epochs (issue 77 of the official code).
        """
        epoch, dialogue, _ = shuffled(sample, len(self.dialogues) - 1, self.seed)
        turns = self.dialogues[dialogue:dialogue + 2]
        return self.rows[np.random.default_rng([self.seed, epoch, TURNS, dialogue]).integers(*turns)]

    def batch(self, it, rows, size):
        """Return x0 (B, T) int64, maskable (B, T) bool, None. rows: a range inside of a group of pad_group rows."""
        each = self.pad_group or size
        start = rows.start // each * each
        group = range(start, max(rows.stop, min(start + each, size)))
        examples = np.stack([self.drawn((it * size + row) // self.copies) for row in group])
        longest = (examples[:, 2] - examples[:, 0]).max()
        return *self.padded(examples[rows.start - start:rows.stop - start], longest), None

    def padded(self, rows, length):
        """Return examples (n, 4) as x0 (n, length) int64, maskable (n, length) bool."""
        x0 = torch.full((len(rows), length), self.tok.eos_id)
        for row, (start, _, end, _) in zip(x0, rows):
            row[:end - start] = self.corpus.read(self.split, start, end)
        return x0, torch.arange(length) >= torch.from_numpy(rows[:, 1] - rows[:, 0])[:, None]

    def held_out(self, limit=0):
        """Return ([(x0 (n, T), maskable (n, T)), ...] for several T, bytes of text per row).

        Each example is padded to a multiple of 32, so that its loss does not depend on which others there are.
        """
        rows = self.rows[evenly_spaced(len(self.rows), limit)]
        lengths = np.minimum((rows[:, 2] - rows[:, 0] + 31) // 32 * 32, self.T)
        groups = [self.padded(rows[lengths == T], T) for T in np.unique(lengths)]
        answers = [self.tok.decode(x0[maskable], skip_special_tokens=True) for x0, maskable in groups]
        return groups, len(''.join(answers).encode()) / len(rows)


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
    if cfg.name and cfg.name not in DATASETS or not cfg.name and not cfg.out:
        raise UserError(f'expected the name of a data set ({", ".join(DATASETS)}), or --input=FILE --out=FOLDER')

    records, tokenizer, _ = DATASETS.get(cfg.name, (None, 'bpe-1024', ''))
    out = cfg.out or f'data/{cfg.name}'
    prepare(
        sources or [list(records())], out, cfg.tokenizer or tokenizer,
        val=files_of(cfg.val_input.split(',')),
        val_every=cfg.val_every,
        workers=cfg.workers or os.cpu_count())

    corpus = Corpus(out)
    for split, facts in corpus.facts.items():
        per_token = facts['bytes'] / facts['tokens']
        print(f'{out}/{split}: {facts["tokens"]:,} tokens, {per_token:.2f} bytes per token')
    how = ' --masking=response' if corpus.facts['train']['examples'] else ''
    print(f'train on it: python train.py --dataset={out}{how} --out_dir=out/{Path(out).name}')


if __name__ == '__main__':
    run(main, globals(), positional=('name',))
