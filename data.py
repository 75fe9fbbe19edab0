"""Text becomes ids, ids become files, files become batches: everything that train.py needs to know about data.

    python data.py                                          # lists the data sets that it can make
    python data.py shakespeare                              # downloads one and tokenizes it to data/shakespeare
    python data.py --input=a.txt,b.jsonl --out=data/my --tokenizer=gpt2

A data set is a folder with its tokenizer (tokenizer.json), flat files of token ids (train_00000.bin, val_00000.bin)
and a manifest that lists them. Batches have no state: which rows form iteration `it` is a function of (seed, it).
So a run resumes from the number of its iteration, on any number of processes.

Letters: B batch, T sequence length (tokens in a row of the batch).
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
from itertools import count, groupby, pairwise
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
input = ''                      # your own files instead: .txt .jsonl .jsonl.gz .json .parquet, or patterns, with commas
val_input = ''                  # likewise, files to hold out. Default: a part of the input (val_every)
out = ''                        # folder to write, default data/NAME. A data set that is there is replaced
tokenizer = ''                  # bytes, bpe-N (learned from the text), gpt2 or another tiktoken name, a tokenizer.json
workers = 0                     # processes, one file each. 0: one per core
val_every = 10                  # hold out every N-th piece of a document, or one in N examples

# ----------------------------------------------------------------------------------------------------------
# 1. The tokenizer. `tokenizers` does the work, so that ids are the same as everywhere else.

# What special tokens are called: in LLaDA's release, which we follow, then in its guideline, then elsewhere.
ROLES = {'bos': ('<|startoftext|>', '<s>', '<|begin_of_text|>'),
         'eos': ('<|endoftext|>', '</s>', '<|end_of_text|>'),
         'mask': ('<|mdm_mask|>', '<[MASK]>', '[MASK]', '<mask>'),
         'start_header': ('<|start_header_id|>',),
         'end_header': ('<|end_header_id|>',),
         'eot': ('<|eot_id|>', '<eot_id>'),
         'pad': ()}
LLADA_TEMPLATE = ("{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
                  "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
                  "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"       # GPT-2's, but digits alone
BREAK = '\U0010ffff'            # no text contains this code point: Unicode reserves it


class Tokenizer:
    """Turn text into ids and back.

    mask_id, eos_id, pad_id, bos_id, eot_id: the ids of special tokens, None where released weights have no such
    token. A tokenizer_config.json (`config`) says which they are, otherwise their usual names do.
    complete: add the special tokens that training needs and the vocabulary does not have.
    """

    def __init__(self, hf, config=None, template=None, complete=True):
        self.hf = hf                                        # a tokenizers.Tokenizer
        self.hf.no_truncation()                             # some files say so, but a text is encoded whole
        self.hf.no_padding()
        self.config = dict(config or {})

        for role, usual in ROLES.items():
            # with a template of its own, a vocabulary needs none of LLaDA's tokens for chat
            needed = complete and (role in ('bos', 'eos', 'mask') or not template)
            names = [name for name in (token_name(self.config.get(f'{role}_token')), *usual) if name]
            found = [name for name in names if needed or hf.token_to_id(name) is not None]
            known = [name for name in found if hf.token_to_id(name) is not None] or found
            setattr(self, f'{role}_id', self.add_special(known[0]) if known else None)
            if known and role in ('bos', 'eos', 'mask', 'pad'):
                self.config[f'{role}_token'] = known[0]

        if self.pad_id is None:                             # LLaDA pads with EOS
            self.pad_id = self.eos_id
            self.config['pad_token'] = self.config.get('eos_token')

        if not template and None not in (self.start_header_id, self.end_header_id, hf.token_to_id('<|eot_id|>')):
            template = LLADA_TEMPLATE
        self.template = template
        self.ids = set(hf.get_vocab().values())
        self.vocab_size = max(self.ids) + 1

        special = [token.content for token in hf.get_added_tokens_decoder().values() if token.special]
        self.special = re.compile('(%s)' % '|'.join(map(re.escape, sorted(special, key=len, reverse=True))))

    def add_special(self, name):
        """Make a name a special token, with a new id if the vocabulary does not have it -> its id."""
        # Some files call such a token not special. Then `encode` would read its name in a text as the token.
        if name not in [token.content for token in self.hf.get_added_tokens_decoder().values() if token.special]:
            self.hf.add_special_tokens([name])
        return self.hf.token_to_id(name)

    def encode(self, text, special_names=False):
        """Return the ids of a text. The name of a special token in it is text, unless special_names."""
        self.hf.encode_special_tokens = not special_names
        return self.hf.encode(text, add_special_tokens=False).ids

    def decode(self, ids, skip_special_tokens=False):
        """Return the text of ids. Half a character becomes U+FFFD, and an id without a token becomes nothing."""
        return self.hf.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def encode_chat(self, messages):
        """Return the ids of a conversation [{'role', 'content'}, ...] and of the assistant's header.

        If the last message is by the assistant, it is left open, to be continued.
        """
        if messages and messages[-1]['role'] == 'assistant':
            return self.encode_chat(messages[:-1]) + self.encode(messages[-1]['content'].strip())

        # Nothing of a conversation may get lost on the way, so we look whether the template shows all contents.
        probes = [f'content {i}.' for i in range(len(messages))]
        shown = self.render([message | {'content': probe} for message, probe in zip(messages, probes)])
        if any(shown.count(probe) != 1 for probe in probes):
            raise UserError('the chat template of the tokenizer changes, repeats or drops the content of a message')

        # A user may type the name of a special token. With BREAK inside it is no name, as far as rendering goes.
        safe = [message | {'content': self.special.sub(broken, message['content'])} for message in messages]
        text = self.render(safe)
        if BREAK not in text:
            return self.encode(text, special_names=True)

        ids = []
        for part in self.special.split(text):               # here only the template's own names are left
            if self.special.fullmatch(part):
                ids.append(self.hf.token_to_id(part))
            else:
                ids += self.encode(part.replace(BREAK, ''))
        return ids

    def render(self, messages):
        """Return the text that the chat template makes of a conversation, as transformers does."""
        if not self.template:
            raise UserError('the tokenizer has no chat template; put a chat_template.jinja beside its tokenizer.json')
        names = {key: token_name(token) for key, token in self.config.items() if token and key.endswith('_token')}
        try:
            template = compile_template(self.template)
            return template.render(messages=messages, add_generation_prompt=True, **names)
        except jinja2.TemplateError as error:
            raise UserError(f'the chat template of the tokenizer says: {error}') from None

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json, for get_tokenizer and for transformers."""
        config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False, **self.config}
        config['chat_template'] = self.template
        self.hf.save(str(folder / 'tokenizer.json'))
        (folder / 'tokenizer_config.json').write_text(json.dumps(config, indent=1), encoding='utf-8')

    def fingerprint(self):
        """Return a checksum, the same for two tokenizers that encode every text to the same ids."""
        facts = self.hf.to_str() + repr((self.mask_id, self.eos_id))
        return hashlib.sha256(facts.encode()).hexdigest()

    def unused(self, vocab_size):
        """Return the ids below vocab_size that are no token, because a head may have more rows than tokens."""
        return [i for i in range(vocab_size) if i not in self.ids]


def token_name(token):
    """Return the name of a token in a tokenizer_config.json, where it stands as a text or as {"content"}."""
    return token['content'] if isinstance(token, dict) else token


def broken(match):
    """Return a special name with BREAK behind its first character."""
    return match[0][0] + BREAK + match[0][1:]


@functools.lru_cache
def compile_template(source):
    """Compile a chat template, a stranger's program, in jinja's sandbox, with what transformers offers to it."""
    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols'])
    environment.globals['raise_exception'] = raise_exception
    environment.globals['strftime_now'] = lambda form: datetime.now().strftime(form)
    environment.filters['tojson'] = lambda value, **how: json.dumps(value, **{'ensure_ascii': False, **how})

    # {% generation %} only marks what the assistant says; a comment takes the same space
    source = re.sub(r'\{%(-?)\s*(?:end)?generation\s*(-?)%\}', r'{#\1 \2#}', source)
    return environment.from_string(source)


def get_tokenizer(spec, complete=True):
    """Return the Tokenizer of 'bytes', of a tiktoken name, of a tokenizer.json, or of a folder that holds one."""
    known = tiktoken.list_encoding_names()
    path = Path(spec)
    if path.is_dir():
        path = path / 'tokenizer.json'

    if spec == 'bytes':
        return Tokenizer(byte_level({symbol: byte for byte, symbol in enumerate(byte_symbols())}))
    if spec in known:
        return from_tiktoken(spec)
    if not path.is_file():
        raise UserError(f'{spec}: no such tokenizer; expected a tokenizer.json, a folder that holds one, bytes, '
                        f'or {", ".join(known)}')
    try:
        hf = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:                              # the library raises nothing more special
        raise UserError(f'{path}: not a tokenizer.json ({error})') from None

    beside = path.with_name('tokenizer_config.json')
    config = json.loads(beside.read_text(encoding='utf-8')) if beside.is_file() else {}
    template = config.get('chat_template')
    if isinstance(template, list):
        template = {each['name']: each['template'] for each in template}.get('default')
    beside = path.with_name('chat_template.jinja')
    if beside.is_file():
        template = beside.read_text(encoding='utf-8')
    return Tokenizer(hf, config, template, complete)


def tokenizer_of(meta, mask_id=None):
    """Return the Tokenizer of loaded weights (meta of model.load_model), with the special ids that they name.

    mask_id: given by the user, where released weights do not name it. Raises UserError if two of these differ, or if
    mask or EOS are unknown: a guess, such as the unknown token, would go wrong silently.
    """
    tok = get_tokenizer(meta['folder'], complete=False)
    for role in ('mask', 'eos', 'bos', 'eot', 'pad'):
        named = [meta[f'{role}_id'], getattr(tok, f'{role}_id')]
        if role == 'mask':
            named.insert(0, mask_id)
        ids = [i for i in named if i is not None]
        if role != 'pad' and len(set(ids)) > 1:
            raise UserError(f"{meta['folder']}: the {role} id is {ids[0]} in one place and {ids[-1]} in another "
                            '(--mask_id, config.json, tokenizer)')
        if role in ('mask', 'eos') and not ids:
            raise UserError(f"{meta['folder']}: neither config.json nor the tokenizer names the {role} token"
                            f"{'; give --mask_id' * (role == 'mask')}")
        setattr(tok, f'{role}_id', ids[0] if ids else None)
    return tok


def byte_symbols():
    """Return GPT-2's printable characters for the bytes 0 to 255, in which vocabularies spell their tokens."""
    others = count(256)
    return [chr(b if chr(b).isprintable() and chr(b) != ' ' else next(others)) for b in range(256)]


def byte_level(vocab, merges=(), pattern=WORDS):
    """Return a tokenizers.Tokenizer: byte-pair encoding inside of the words that a regular expression finds."""
    # tiktoken looks up a whole word before it merges, hence ignore_merges; a learned vocabulary does not mind
    hf = tokenizers.Tokenizer(models.BPE(vocab, list(merges), ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated')
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    hf.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of_words])
    hf.decoder = decoders.ByteLevel()
    return hf


def from_tiktoken(name):
    """Return a vocabulary of OpenAI as a Tokenizer. tiktoken downloads it, or finds it in TIKTOKEN_CACHE_DIR."""
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise UserError(f'could not download tokenizer {name} ({type(error).__name__}); without a network, set '
                        'TIKTOKEN_CACHE_DIR to a folder that has it, or give a tokenizer.json') from None

    symbols, ranks = byte_symbols(), encoding._mergeable_ranks
    spelled = {token: ''.join(symbols[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        parts = parts_of(token, ranks)
        if len(parts) == 2:
            merges.append(tuple(spelled[part] for part in parts))

    # the special tokens are in the vocabulary too, since their ids need not follow without a gap
    vocab = {spelled[token]: rank for token, rank in ranks.items()} | encoding._special_tokens
    # {1,3}+ takes all digits here, but at most three in tiktoken
    hf = byte_level(vocab, merges, encoding._pat_str.replace('{1,3}+', '{1,3}'))
    hf.add_special_tokens(list(encoding._special_tokens))
    return Tokenizer(hf)


def parts_of(token, ranks):
    """Return the two parts of which the last merge made a token (bytes), by doing all merges before it.

    >>> parts_of(b'abc', {b'a': 0, b'b': 1, b'c': 2, b'bc': 3, b'abc': 4})
    [b'a', b'bc']
    """
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        merged = [ranks.get(a + b, math.inf) for a, b in pairwise(parts)]
        lowest = min(merged)
        if lowest >= ranks[token]:
            break                                           # no merge makes it: it is only found as a whole word
        i = merged.index(lowest)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def learn_tokenizer(texts, vocab_size):
    """Learn a byte-level vocabulary of up to vocab_size tokens, special ones included -> Tokenizer."""
    n_special = sum(1 for usual in ROLES.values() if usual)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + n_special:
        raise UserError(f'tokenizer bpe-N needs N >= {len(alphabet) + n_special}, got {vocab_size}')
    hf = byte_level({})
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - n_special, min_frequency=2, initial_alphabet=alphabet,
                                  show_progress=False)
    hf.train_from_iterator(texts, trainer)
    return Tokenizer(hf)


# ----------------------------------------------------------------------------------------------------------
# 2. Texts become records: {"text"} is a document, {"messages"} or {"response"} an example for fine-tuning.


def docs_text():
    """Yield real text that ships with Python: pydoc's language reference, docstrings of the standard library.

    Modules are parsed, never imported, and repeated paragraphs are dropped. This makes about 1.5 million characters,
    and varies a little with the Python version.
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
    path = Path(torch.hub.get_dir()) / 'tinyshakespeare.txt'
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        sha256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:
            raise UserError(f'could not download {url} ({error}); get it by other means, then add --input=FILE') from None
    yield from read_records(path)


DATASETS = {        # name -> (records, default tokenizer, what it is)
    'docs': (docs_text, 'bpe-4096', 'documentation that comes with Python; needs no network'),
    'shakespeare': (shakespeare_text, 'bpe-1024', 'tiny Shakespeare, 1.1 MB; downloaded, or --input=FILE')}


def read_records(source, accept=None):
    """Yield (where, record) of a file: a .txt is one document, the other formats hold a record per row.

    accept: turns a row (dict) into a record, or raises ValueError. Default: as_record. Raises UserError with file and
    line. A source that is not a path is already a list of (where, record).
    """
    if not isinstance(source, (str, Path)):
        yield from source
        return
    path = Path(source)
    kinds = [kind for kind in READERS if path.name.endswith(kind)]
    if not kinds:
        raise UserError(f'{path}: unknown kind of file; expected one of {", ".join(READERS)}')

    where = None
    for where, row in READERS[kinds[0]](path):
        try:
            if isinstance(row, bytes):
                row = json.loads(row)
            if not isinstance(row, dict):
                raise ValueError(f'expected a JSON object, got {row!r:.60}')
            record = (accept or as_record)(row)
        except (ValueError, KeyError, TypeError) as error:
            keys = f'; its keys are {list(row)[:9]}' if isinstance(row, dict) else ''
            raise UserError(f'{where}: {error}{keys}') from None
        yield where, record
    if where is None:
        raise UserError(f'{path}: no text in it')


def read_txt(path):
    """Yield the only row of a text file. Line ends stay as they are."""
    raw = path.read_bytes()
    try:
        yield path.name, {'text': raw.decode('utf-8-sig')}
    except UnicodeDecodeError as error:
        line = raw.count(b'\n', 0, error.start) + 1
        raise UserError(f'{path}:{line}: not UTF-8 (byte {error.object[error.start]})') from None


def read_jsonl(path):
    """Yield the lines of a file as bytes, but no empty ones."""
    with (gzip.open if path.suffix == '.gz' else open)(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b'\xef\xbb\xbf')       # Windows writes a byte order mark
            if line.strip():
                yield f'{path}:{number}', line


def read_json(path):
    """Yield the items of a file that is one list."""
    try:
        items = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f'{path}: not JSON ({error})') from None
    if not isinstance(items, list):
        raise UserError(f'{path}: a .json file must be one list; if it has an object per line, call it .jsonl')
    for number, item in enumerate(items, 1):
        yield f'{path}, item {number}', item


def read_parquet(path):
    """Yield the rows of a table."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f'{path}: .parquet needs one more package: pip install pyarrow') from None
    number = 0
    for part in pyarrow.parquet.ParquetFile(path).iter_batches():
        for row in part.to_pylist():
            number += 1
            yield f'{path}, row {number}', row


READERS = {'.txt': read_txt, '.jsonl': read_jsonl, '.jsonl.gz': read_jsonl, '.json': read_json,
           '.parquet': read_parquet}

# What others call the two sides of an example (TRL, Alpaca), the list of messages (ShareGPT), and who speaks.
PAIRS = ('prompt', 'response'), ('question', 'answer'), ('prompt', 'completion'), ('instruction', 'output')
LISTS = 'messages', 'conversations', 'conversation'
SPEAKERS = {'human': 'user', 'gpt': 'assistant'}
CONTENT = {'text', 'prompt_ids', 'response_ids', 'input', *LISTS}.union(*PAIRS)


def as_record(row):
    """Return a row as {"text"}, {"messages"}, {"response"} or {"prompt_ids", "response_ids"}, or raise ValueError.

    Both sides of an example become messages, whatever their names. A row with several of these is the first of
    messages, ids, text, because public sets carry the flattened text beside the messages. Other keys stay.
    """
    record = {key: value for key, value in row.items() if key not in CONTENT}
    messages = messages_of(row)
    if messages:
        roles = [message['role'] for message in messages]
        if 'user' not in roles or roles[-1] != 'assistant':
            raise ValueError(f'messages must end with an answer by "assistant" to a "user", got {roles[:9]}')
        return record | {'messages': messages}

    if row.get('prompt_ids') and row.get('response_ids'):
        # for a model that is prompted in a way that no chat template describes
        return record | {key: list(map(int, row[key])) for key in ('prompt_ids', 'response_ids')}

    for key in ('text', 'response'):
        if key in row:
            return record | {key: as_text(row[key])}
    raise ValueError('expected "text", or "messages", or "prompt" and "response"')


def messages_of(row):
    """Return the messages of a row, under any of the usual names, or None."""
    for key in LISTS:
        if isinstance(row.get(key), list):
            return list(map(as_message, row[key]))

    for prompt, response in PAIRS:
        if prompt in row and response in row:
            question, answer = row[prompt], row[response]
            if prompt == 'instruction' and row.get('input'):
                question = f"{as_text(question)}\n\n{as_text(row['input'])}"
            messages = []
            for role, said in (('user', question), ('assistant', answer)):
                messages += said if isinstance(said, list) else [{'role': role, 'content': said}]
            return list(map(as_message, messages))


def as_message(said):
    """Return a message as {"role", "content"}, two texts that are not empty, or raise ValueError."""
    if not isinstance(said, dict):
        raise ValueError(f'a message needs "role" and "content", got {said!r:.60}')
    role, content = said.get('role', said.get('from')), said.get('content', said.get('value'))
    if isinstance(content, list):                           # in parts, as OpenAI has them
        content = ''.join(part['text'] for part in content)
    return {'role': SPEAKERS.get(role, as_text(role)), 'content': as_text(content)}


def as_text(value):
    """Return a text that is not empty, or raise ValueError."""
    if isinstance(value, bytes):                            # a column of a .parquet that is not declared as text
        value = value.decode()
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'expected a text that is not empty, got {value!r:.60}')
    value.encode()                                          # half a surrogate pair is not text
    return value


# ----------------------------------------------------------------------------------------------------------
# 3. Preparing: records become files of token ids.

FORMAT = 'nanollada data 3'


def prepare(sources, out, tokenizer, *, val=(), val_every=10, workers=1):
    """Tokenize sources (paths of files, or lists of (where, record)) into the folder `out` -> its manifest.

    val: sources to hold out. Without any, one in val_every pieces of the others is held out.
    tokenizer: what get_tokenizer takes, or bpe-N to learn N tokens from the training pieces, or a Tokenizer.
    The folder is written aside under another name, so it is complete or absent. One process per file.
    """
    out, sources, val = Path(out).resolve(), list(sources), list(val)
    check_out(out, [*sources, *val])
    kinds = {'text' in next(read_records(source))[1] for source in [*sources, *val]}
    if len(kinds) > 1:
        raise UserError('some files hold documents ("text"), some examples; prepare them separately')
    every = 0 if val else val_every
    if isinstance(tokenizer, str) and tokenizer.startswith('bpe-') and tokenizer[4:].isdecimal():
        tokenizer = learn_tokenizer(training_texts(sources, every), int(tokenizer[4:]))
    elif not isinstance(tokenizer, Tokenizer):
        tokenizer = get_tokenizer(tokenizer)

    aside = out.with_name(f'.{out.name}.{os.getpid()}')
    aside.mkdir(parents=True)
    try:
        tokenizer.save(aside)
        jobs = [(number, source, every, aside) for number, source in enumerate(sources)]
        jobs += [(number, source, 1, aside) for number, source in enumerate(val, len(sources))]
        manifest = finish(tokenize_all(jobs, workers), aside, tokenizer.vocab_size)

        check_out(out, [])                                  # once more: hours may have passed
        if out.exists():
            shutil.rmtree(out)
        os.replace(aside, out)
    except BaseException:                                   # Ctrl-C, too
        shutil.rmtree(aside)
        raise
    return manifest


def check_out(out, sources):
    """Raise UserError if writing to `out` would remove anything but a data set that prepare once made."""
    for source in sources:
        if isinstance(source, (str, Path)) and out in Path(source).resolve().parents:
            raise UserError(f'{source}: this input lies inside of {out}, which is replaced; choose another --out')

    manifest = out / 'manifest.json'
    found = {path.name for path in out.iterdir()} if out.exists() else set()
    facts = json.loads(manifest.read_text(encoding='utf-8')) if manifest.is_file() else {}
    ours = {'manifest.json', *facts.get('files', ())} if 'nanollada' in str(facts.get('format')) else set()
    if found - ours:
        raise UserError(f'{out}: holds other files than a data set, such as {min(found - ours)}; choose another --out')
    if found and sources:
        say(f'{out}: the data set that is there will be replaced')


def finish(entries, folder, vocab_size):
    """Write the manifest of a data set. entries: what tokenize_source returned, for each source."""
    splits = {split: [entry[split] for entry in entries if entry[split]['tokens']] for split in ('train', 'val')}
    for split, shards in splits.items():
        if not shards:
            raise UserError(f'not enough text to hold out a validation split (nothing is left for {split}); give more, '
                            'or say with --val_input=FILE what to hold out')
    files = sorted(path.name for path in folder.iterdir())
    manifest = {'format': FORMAT, 'vocab_size': vocab_size, 'splits': splits, 'files': files}
    (folder / 'manifest.json').write_text(json.dumps(manifest, indent=1), encoding='utf-8')
    return manifest


def tokenize_all(jobs, workers):
    """Run tokenize_source for all jobs, in this process or in several -> what they return, in order."""
    if min(workers, len(jobs)) < 2:
        return list(map(tokenize_source, jobs))
    with multiprocessing.get_context('spawn').Pool(min(workers, len(jobs))) as pool:
        return list(tqdm(pool.imap(tokenize_source, jobs), 'files', len(jobs), disable=None, leave=False))


def tokenize_source(job):
    """Tokenize one source into a shard for each split -> {split: its entry in the manifest}."""
    number, source, val_every, folder = job
    tok = get_tokenizer(folder)
    shards = {split: Shard(folder, f'{split}_{number:05d}', tok) for split in ('train', 'val')}
    records = tqdm(read_records(source), 'tokenizing', disable=number > 0 or None, leave=False)
    for (where, split), pieces in groupby(split_pieces(records, number, val_every), key=itemgetter(0, 1)):
        for _, _, piece in pieces:
            if isinstance(piece, str):
                shards[split].write(tok.encode(piece), len(piece.encode()))
            else:
                shards[split].write_example(piece, where, tok)

        # here a document ends, or continues in the other split
        if not shards[split].rows:
            shards[split].write([tok.eos_id])
    return {split: shard.close() for split, shard in shards.items()}


def split_pieces(records, number, val_every):
    """Assign records to splits: yield (where, split, piece), a piece of a document (str) or a whole example (dict).

    Of documents every val_every-th piece is held out, counted from `number` on: a tail of the text would share long
    passages with the rest. Of examples, one in val_every, by a hash of the first question: so no question is asked
    in both splits. val_every 1: all, 0: none.
    """
    is_text = None
    for where, record in records:
        if is_text not in (None, 'text' in record):
            raise UserError(f'{where}: a file holds documents ("text") or examples, not both')
        is_text = 'text' in record

        pieces = enumerate(chunks(record['text']), number + 1) if is_text else [(question_hash(record), record)]
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
    if 'accept' in record:                                  # many answers are right: there may be few questions
        key = json.dumps(record, sort_keys=True)
    elif 'prompt_ids' in record:
        key = str(record['prompt_ids'])
    elif 'messages' in record:
        key = next(message['content'] for message in record['messages'] if message['role'] == 'user')
    else:
        key = record['response']
    return zlib.crc32(key.strip().encode())


def training_texts(sources, val_every):
    """Yield the text of everything that tokenize_source puts into the training split, in pieces."""
    for number, source in enumerate(sources):
        for _, split, piece in split_pieces(read_records(source), number, val_every):
            if split == 'train':
                # short pieces, because the time to learn from a word grows with the square of its length
                yield from chunks(piece if isinstance(piece, str) else text_of(piece))


def text_of(record):
    """Return all text of an example."""
    if 'messages' in record:
        return '\n\n'.join(f"{message['role']}\n\n{message['content']}" for message in record['messages'])
    return record.get('response', '')


class Shard:
    """Write one file of token ids. Of examples it also keeps where each one is: (start, response, end, dialogue)."""

    def __init__(self, folder, name, tok):
        self.path = folder / f'{name}.bin'
        self.file = self.path.open('wb')
        self.dtype = dtype_of(tok.vocab_size)
        self.tokens, self.bytes = 0, 0
        self.rows, self.records = [], []

    def write(self, ids, n_bytes=0):
        """Append ids that stand for n_bytes of text."""
        self.file.write(np.array(ids, self.dtype))
        self.tokens += len(ids)
        self.bytes += n_bytes

    def write_example(self, record, where, tok):
        """Append all turns of an example. Each has the whole history as its prompt (LLaDA, App. B.1)."""
        for prompt, response in turns_of(record, tok):
            ids = [*prompt, *response, tok.eos_id]
            if max(ids) >= tok.vocab_size:
                raise UserError(f'{where}: id {max(ids)} is outside of the vocabulary of {tok.vocab_size}')
            start = self.tokens
            self.write(ids, len(tok.decode(ids, skip_special_tokens=True).encode()))
            self.rows.append((start, start + len(prompt), self.tokens, len(self.records)))
        self.records.append(record)

    def close(self):
        """Finish the file -> its entry in the manifest."""
        self.file.close()
        if self.rows:
            np.save(self.path.with_suffix('.rows.npy'), np.array(self.rows, np.int64))
        if self.rows and self.path.name.startswith('val'):
            # evaluate.py asks these questions
            lines = [json.dumps(record, ensure_ascii=False, default=str) + '\n' for record in self.records]
            self.path.with_suffix('.jsonl').write_text(''.join(lines), encoding='utf-8')
        return {'name': self.path.stem, 'tokens': self.tokens, 'bytes': self.bytes, 'examples': len(self.rows)}


def dtype_of(vocab_size):
    """Return the type of the numbers in the files. In uint16, id 126336 would silently become 60800."""
    return np.dtype('uint16' if vocab_size <= 2 ** 16 else 'uint32')


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


# ----------------------------------------------------------------------------------------------------------
# 4. Loading: files become batches.

Dataset = namedtuple('Dataset', 'parts weights')            # lists of Corpus and of float
Batch = namedtuple('Batch', 'x0 maskable cu_seqlens')       # (B, T) int64, (B, T) bool, (n+1,) int32 or None
Options = namedtuple('Options', 'random_length random_split isolate copies pad_group', defaults=(0., 0., False, 1, 0))
ORDER, CUTS, TURNS, MIXTURE = range(4)                      # what random numbers are drawn for


class Corpus:
    """A prepared folder. Its shards are mapped into memory, not read."""

    def __init__(self, folder):
        self.folder = Path(folder)
        made_by = f'data.py --input=FILE --out={folder}'
        if self.folder.name in DATASETS:
            made_by = f'data.py {self.folder.name}'
        if self.folder.name in ('world', 'instruct', 'facts'):
            made_by = 'tests/lab/worlds.py'

        path = self.folder / 'manifest.json'
        if not path.is_file():
            raise UserError(f'{folder}: no data set here; make it with: python {made_by}')
        self.manifest = json.loads(path.read_text(encoding='utf-8'))
        if self.manifest.get('format') != FORMAT:
            raise UserError(f'{folder}: made by another version of data.py; make it again with: python {made_by}')

        self.shards = {}
        for split, entries in self.manifest['splits'].items():
            self.shards[split] = [self.open_shard(entry) for entry in entries]

    def open_shard(self, entry):
        """Map a file of tokens into memory -> (n,) uint16 or uint32."""
        path = self.folder / f"{entry['name']}.bin"
        dtype = dtype_of(self.manifest['vocab_size'])
        if path.stat().st_size != entry['tokens'] * dtype.itemsize:
            raise UserError(f"{path}: the file should have {entry['tokens']} tokens; prepare the data again")
        return np.memmap(path, dtype, 'r')

    def tokenizer(self):
        """Return the Tokenizer that made it."""
        return get_tokenizer(self.folder)

    def count(self, split, what):
        """Return how many 'tokens', 'bytes' of text or 'examples' a split has."""
        return sum(entry[what] for entry in self.manifest['splits'][split])

    def read(self, split, start, length):
        """Return the tokens start .. start+length of a split, as if its shards were one array: (length,) int64."""
        parts = []
        for shard in self.shards[split]:
            if -length < start < len(shard):
                parts.append(shard[max(0, start):start + length])
            start -= len(shard)
        return np.concatenate(parts, dtype=np.int64)

    def rows(self, split):
        """Return where the examples of a split are, as if its shards were one: (n, 4) start, response, end, dialogue."""
        tables, start, dialogue = [], 0, 0
        for entry in self.manifest['splits'][split]:
            table = np.load(self.folder / f"{entry['name']}.rows.npy")
            tables.append(table + [start, start, start, dialogue])
            start += entry['tokens']
            dialogue += 1 + table[-1, 3]
        return np.concatenate(tables)


def open_dataset(name):
    """Return the Dataset of a name in data/, of a folder, or of a mixture 'a:0.7,b:0.3'. 'docs' is made if missing."""
    names, weights = [name], [1.0]
    if (',' in name or ':' in name) and not Path(name).is_dir():
        try:
            names, weights = zip(*(part.rsplit(':', 1) for part in name.split(',')))
            weights = list(map(float, weights))
        except ValueError:
            weights = [0.0]
        if not min(weights) > 0:
            raise UserError(f'dataset: a mixture is written name:weight,name:weight with weights > 0, got {name!r}')

    parts = [open_corpus(part.strip()) for part in names]
    prints = {corpus.tokenizer().fingerprint() for corpus in parts} if len(parts) > 1 else ()
    if len(prints) > 1:
        raise UserError(f'{name}: the parts of a mixture must have the same tokenizer')
    return Dataset(parts, weights)


def open_corpus(name):
    """Return the Corpus of a folder, or of a name in data/."""
    folder = Path(name)
    if '/' not in name and not (folder / 'manifest.json').is_file():
        folder = Path('data') / name
    if name == 'docs' and not (folder / 'manifest.json').is_file():
        records, tokenizer, what = DATASETS[name]
        say(f'preparing {folder} (once): {what}')
        prepare([list(records())], folder, tokenizer)
    return Corpus(folder)


def open_source(dataset, split, masking, tok, seq_len, seed=0, **options):
    """Return the rows of a split as training sees them: Examples if masking is 'response', else Windows.

    options: the fields of Options. random_length, random_split, isolate concern Windows, pad_group Examples. copies:
    how many successive rows each window or example fills, for complementary masks.
    """
    kind = Examples if masking == 'response' else Windows
    return kind(dataset, split, tok, seq_len, seed, Options(**options))


def keyed_rng(*key):
    """Return a numpy generator that depends on the key alone, some integers."""
    return np.random.default_rng(key)


def shuffled(sample, n, seed):
    """Return (epoch, which of n things, generator of the epoch) for place `sample` of an endless stream.

    Each epoch has every thing once, in a random order that takes no memory: i -> (a i + b) mod n, a coprime to n.
    """
    epoch, i = divmod(int(sample), n)
    rng = keyed_rng(seed, epoch, ORDER)
    a, b = rng.integers(n, size=2).tolist()
    while math.gcd(a, n) > 1:
        a = int(rng.integers(n))
    return epoch, (a * i + b) % n, rng


def evenly_spaced(n, limit):
    """Return `limit` of the numbers 0 .. n-1, evenly spaced; all of them for 0."""
    limit = min(limit or n, n)
    return [i * n // limit for i in range(limit)]


class Windows:
    """Pre-training: windows of seq_len tokens, all of them maskable (Eq. 3). Each epoch cuts the text anew.

    random_length: share of windows of which only a random length is kept (LLaDA: 0.01). random_split: share cut into
    two parts that do not attend to each other (iLLaDA: 0.3). isolate: documents do not attend to each other, either.
    """

    def __init__(self, dataset, split, tok, seq_len, seed=0, options=Options()):
        self.parts, self.split, self.tok = dataset.parts, split, tok
        self.T, self.seed, self.options = seq_len, seed, options
        self.share = np.array(dataset.weights) / sum(dataset.weights)
        self.tokens = [corpus.count(split, 'tokens') for corpus in self.parts]
        self.n_examples = sum(corpus.count(split, 'examples') for corpus in self.parts)

        for corpus, tokens in zip(self.parts, self.tokens):
            if tokens < seq_len:
                raise UserError(f'{corpus.folder}: split {split} has {tokens} tokens, too few for seq_len={seq_len}')
        bytes_per_token = [corpus.count(split, 'bytes') / n for corpus, n in zip(self.parts, self.tokens)]
        self.bytes_per_token = float(self.share @ bytes_per_token)

    def window(self, sample):
        """Return window number `sample` of an endless stream: (T,) int64."""
        if len(self.parts) > 1:
            # a mixture draws with replacement, so that its weights hold however small a part is
            rng = keyed_rng(self.seed, sample, MIXTURE)
            part = rng.choice(len(self.parts), p=self.share)
            start = rng.integers(self.tokens[part] - self.T + 1)
        else:
            part, total = 0, self.tokens[0]
            n = max(1, (total - self.T + 1) // self.T)      # windows that fit behind any offset
            _, index, rng = shuffled(sample, n, self.seed)
            start = index * self.T + rng.integers(min(self.T, total - n * self.T + 1))
        return self.parts[part].read(self.split, int(start), self.T)

    def cuts(self, it, size):
        """Return for each of `size` windows how many tokens are kept, and where a border is (T: nowhere)."""
        which, where = keyed_rng(self.seed, it, CUTS).random((size, 2)).T
        short = which < self.options.random_length
        split = ~short & (which < self.options.random_length + self.options.random_split)
        keep = np.where(short, 1 + (where * self.T).astype(int), self.T)
        border = np.where(split, 1 + (where * (self.T - 1)).astype(int), keep)
        return keep, border

    def batch(self, it, rows, size):
        """Return rows `rows` (a range) of the `size` windows of iteration `it` as a Batch."""
        windows = [self.window((it * size + row) // self.options.copies) for row in rows]
        x0 = torch.from_numpy(np.stack(windows))
        keep, border = (cut[rows] for cut in self.cuts(it, size))
        maskable = torch.arange(self.T) < torch.from_numpy(keep)[:, None]
        if not self.options.isolate and border.min() == self.T:
            return Batch(x0, maskable, None)

        # Segments end at the end of each row and at its border. Their number is padded, because the kernel is
        # compiled anew for each new shape: empty segments at the end cost nothing.
        starts = np.arange(0, x0.numel() + 1, self.T)
        borders = np.union1d(starts, starts[:-1] + border)
        n = 2 * len(x0) + 1
        if self.options.isolate:
            borders = np.union1d(borders, np.flatnonzero(x0 == self.tok.eos_id) + 1)
            n = -(-len(borders) // 64) * 64
        borders = np.pad(borders, (0, n - len(borders)), 'edge')
        return Batch(x0, maskable, torch.from_numpy(borders).int())

    def held_out(self, limit=0):
        """Return ([(x0, maskable)], bytes of text per row): the split in order, or `limit` windows of it, (n, T)."""
        x0 = []
        for corpus, tokens, share in zip(self.parts, self.tokens, self.share):
            n = limit
            if len(self.parts) > 1:                         # each part of a mixture has its share
                n = max(1, round(share * (limit or 1000)))
            x0 += [corpus.read(self.split, i * self.T, self.T) for i in evenly_spaced(tokens // self.T, n)]
        x0 = torch.from_numpy(np.stack(x0))
        return [(x0, torch.ones_like(x0, dtype=torch.bool))], self.T * self.bytes_per_token


class Examples:
    """Fine-tuning (Eq. 5): one example per row. The response, its EOS and the padding are maskable, the prompt is not.

    pad_group: how many consecutive rows are padded to one length (0: all of an update). Padding is EOS and counts in
    L' (LLaDA, App. B.1).
    """

    bytes_per_token = None

    def __init__(self, dataset, split, tok, seq_len, seed=0, options=Options()):
        self.corpus, self.split, self.tok = dataset.parts[0], split, tok
        self.T, self.seed, self.options = seq_len, seed, options
        self.n_examples = self.corpus.count(split, 'examples')
        if len(dataset.parts) > 1 or not self.n_examples:
            raise UserError(f"{self.corpus.folder}: masking='response' needs one data set of examples, made of "
                            '"messages" or of "prompt" and "response"')

        rows = self.corpus.rows(split)
        fits = rows[:, 2] - rows[:, 0] <= seq_len
        too_long = f'{(~fits).sum()} of {len(rows)} examples of {split} are longer than seq_len={seq_len}'
        if not fits.any():
            raise UserError(f'{self.corpus.folder}: {too_long}')
        if not fits.all() and os.environ.get('RANK', '0') == '0':
            say(f'{self.corpus.folder}: {too_long} and are left out')

        self.rows = rows[fits]
        _, first_turns = np.unique(self.rows[:, 3], return_index=True)
        self.dialogues = np.append(first_turns, len(self.rows))              # where each one begins

    def drawn(self, samples):
        """Return examples (n, 4) by their place in an endless stream: each dialogue once an epoch, one turn of it.

        The turn is random, and the others wait for other epochs (issue 77 of the official repository).
        """
        chosen = []
        for sample in samples:
            epoch, dialogue, _ = shuffled(sample, len(self.dialogues) - 1, self.seed)
            turns = self.dialogues[dialogue:dialogue + 2]
            chosen.append(keyed_rng(self.seed, epoch, TURNS, dialogue).integers(*turns))
        return self.rows[chosen]

    def batch(self, it, rows, size):
        """Return rows `rows` (a range inside of a group) of the `size` examples of iteration `it` as a Batch."""
        group_size = self.options.pad_group or size
        start = rows.start // group_size * group_size
        stop = max(rows.stop, min(start + group_size, size))
        group = self.drawn([(it * size + row) // self.options.copies for row in range(start, stop)])
        longest = int((group[:, 2] - group[:, 0]).max())
        return Batch(*self.padded(group[rows.start - start:rows.stop - start], longest), None)

    def padded(self, rows, length):
        """Return examples (n, 4) as x0 (n, length) int64, maskable (n, length) bool."""
        x0 = torch.full((len(rows), length), self.tok.eos_id)
        maskable = torch.arange(length) >= torch.from_numpy(rows[:, 1] - rows[:, 0])[:, None]
        for row, (start, _, end, _) in zip(x0, rows.tolist()):
            row[:end - start] = torch.from_numpy(self.corpus.read(self.split, start, end - start))
        return x0, maskable

    def held_out(self, limit=0):
        """Return ([(x0 (n, T), maskable (n, T)), ...] for several T, bytes of text per row).

        Each example is padded to a multiple of 32, so that its loss does not depend on which others are there.
        """
        rows = self.rows[evenly_spaced(len(self.rows), limit)]
        lengths = np.minimum(-(-(rows[:, 2] - rows[:, 0]) // 32) * 32, self.T)
        groups = [self.padded(rows[lengths == T], int(T)) for T in np.unique(lengths)]

        texts = [self.tok.decode(x[m], skip_special_tokens=True) for x0, maskable in groups for x, m in zip(x0, maskable)]
        return groups, sum(len(text.encode()) for text in texts) / len(texts)


# ----------------------------------------------------------------------------------------------------------


def files_of(patterns):
    """Return the files that a list of names and patterns stands for, each once."""
    found = []
    for pattern in filter(None, patterns):
        # a name that exists is that file, even if it looks like a pattern: part[1].txt
        found += [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern)) or [pattern]
    return list({Path(file).resolve(): file for file in found}.values())


def main(cfg):
    sources, val = files_of(cfg.input.split(',')), files_of(cfg.val_input.split(','))
    if not cfg.name and not sources:
        for known, (_, _, what) in DATASETS.items():
            print(f'{known:<12} {what}')
        print('for your own text: python data.py --input=FILE --out=data/my   (--help lists all settings)')
        return

    if cfg.name and cfg.name not in DATASETS:
        raise UserError(f"unknown data set {cfg.name!r}; expected {' or '.join(DATASETS)}, or --input=FILE")
    if not cfg.name and not cfg.out:
        raise UserError('--input needs --out=FOLDER')
    if cfg.val_every < 2:
        raise UserError(f'val_every must be at least 2, got {cfg.val_every}')

    records, tokenizer, _ = DATASETS.get(cfg.name, (None, 'bpe-1024', ''))
    out = cfg.out or f'data/{cfg.name}'
    prepare(sources or [list(records())], out, cfg.tokenizer or tokenizer, val=val, val_every=cfg.val_every,
            workers=cfg.workers or os.cpu_count())

    corpus = Corpus(out)
    for split in corpus.shards:
        tokens = corpus.count(split, 'tokens')
        print(f"{out}/{split}: {tokens:,} tokens, {corpus.count(split, 'bytes') / tokens:.2f} bytes per token")
    how = ' --masking=response' if corpus.count('train', 'examples') else ''
    print(f'train on it: python train.py --dataset={out}{how} --out_dir=out/{Path(out).name}')


if __name__ == '__main__':
    run(main, globals(), positional=('name',))
