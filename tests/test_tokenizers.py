"""Ids are those of `tokenizers`, `tiktoken` and `transformers`, and a special name in a text is text."""

import json
import random

import pytest
import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre

import data
from configurator import UserError

TEXTS = [
    '', ' ', 'Hello, world!', "it's  two\n\n\n    def f(x):\treturn 1234567  ", '\x00\x1b[0m\r\n\r\n x',
    'a' * 3000, 'Der Fluß fließt über die Äcker.', 'L’été, où est-il ?', '¿Cuántos años tiene?',
    'Быстрая лиса прыгает.', '床前明月光，疑是地上霜。', 'すばやい茶色の狐', '빠른 갈색 여우',
    'هذا نصٌّ قصير.', 'यह एक वाक्य है।', 'Η γρήγορη αλεπού', '🙂👩‍👩‍👧 e\u0301 \u00a0\u3000\u2028', 'ſ K ﬁ ２３']
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LEARNED = data.learn_tokenizer(TEXTS * 3, 500)
SPECIAL = ('<|begin_of_text|> <|end_of_text|> <|im_start|> <|im_end|> <s> </s> <|mdm_mask|> '
           '<|start_header_id|> <|end_header_id|> <|eot_id|>').split()


def build(kind):
    """Learn a small tokenizer of a family on the texts."""
    hf = Tokenizer(models.BPE())
    special, alphabet = SPECIAL, pre.ByteLevel.alphabet()
    if kind == 'sentencepiece':
        # Llama 2: no words, a blank is a character, unknown characters are bytes
        hf = Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>'))
        hf.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
        hf.decoder = decoders.Sequence([
            decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
        special, alphabet = ['<unk>', *SPECIAL, *(f'<0x{b:02X}>' for b in range(256))], []
    elif kind == 'metaspace':
        hf.pre_tokenizer, hf.decoder = pre.Metaspace(prepend_scheme='first'), decoders.Metaspace()
    else:
        split = pre.Split(Regex(GPT2), 'isolated')
        hf.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
        hf.decoder = decoders.ByteLevel()
    hf.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    if kind == 'neox':
        # other characters are normalised, and runs of blanks are tokens that are not special
        hf.normalizer = normalizers.NFC()
        hf.add_tokens([AddedToken(' ' * n, normalized=False) for n in (2, 3, 4)])
    return hf


KINDS = ['gpt2', 'sentencepiece', 'metaspace', 'neox']


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """A folder for each kind, with its tokenizer.json."""
    root = tmp_path_factory.mktemp('tokenizers')
    for kind in KINDS:
        (root / kind).mkdir()
        build(kind).save(str(root / kind / 'tokenizer.json'))
    return {kind: root / kind for kind in KINDS}


def chars(rng):
    """Return a short random text of any code points."""
    ranges = [(32, 127), (1, 0x3000), (0x3000, 0xD800), (0xE000, 0x10FFFF)]
    return ''.join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(20)))


RANDOM = [chars(random.Random(i)) for i in range(300)]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('complete', [True, False])
def test_ids_are_those_of_the_library(folders, kind, complete):
    ours = data.get_tokenizer(folders[kind], complete)
    theirs = Tokenizer.from_file(str(folders[kind] / 'tokenizer.json'))
    for text in TEXTS + RANDOM:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize('kind', ['bytes', 'learned', 'gpt2'])
def test_round_trip(folders, kind):
    tok = LEARNED if kind == 'learned' else data.get_tokenizer(folders.get(kind, kind))
    for text in TEXTS + RANDOM + ['<|mdm_mask|> typed by a user']:
        ids = tok.encode(text)
        assert tok.decode(ids) == text
        assert not {tok.mask_id, tok.eos_id, tok.bos_id} & set(ids)


@pytest.mark.parametrize('kind', KINDS)
def test_the_name_of_a_special_token_in_a_text_is_text(folders, kind):
    tok = data.get_tokenizer(folders[kind])
    for name in SPECIAL:
        assert tok.hf.token_to_id(name) not in tok.encode(f'a {name} b')
        assert tok.encode(name, special_names=True)[-1] == tok.hf.token_to_id(name)


def test_what_a_file_says_of_its_tokens(tmp_path):
    """It may cut or pad texts, and not call the mask special. Neither counts. It may also name the mask."""
    hf = build('gpt2')
    hf.add_tokens(['[MASK]'])
    hf.enable_truncation(3)
    hf.enable_padding(length=99)
    hf.save(str(tmp_path / 'tokenizer.json'))
    tok = data.get_tokenizer(tmp_path)
    assert tok.decode(tok.encode('a long text of many words')) == 'a long text of many words'
    assert tok.mask_id == tok.hf.token_to_id('<|mdm_mask|>') and tok.mask_id not in tok.encode('<|mdm_mask|>')
    named = data.Tokenizer(build('gpt2'), {'mask_token': {'content': '<|im_end|>'}})
    assert named.mask_id == named.hf.token_to_id('<|im_end|>')


def test_bytes_are_their_own_ids():
    tok = data.get_tokenizer('bytes')
    assert tok.encode('aé') == list('aé'.encode()) and tok.vocab_size == 262
    assert (tok.bos_id, tok.eos_id, tok.mask_id, tok.pad_id, tok.eot_id) == (256, 257, 258, 257, 261)
    assert tok.decode([97, 9999, 258, 195]) == 'a<|mdm_mask|>\ufffd' and tok.unused(265) == [262, 263, 264]


# ------------------------------------------------------------------------------------------------- tiktoken


@pytest.mark.parametrize('name', ['gpt2', 'cl100k_base', 'o200k_base'])
def test_a_vocabulary_of_tiktoken_gives_the_ids_of_tiktoken(name, monkeypatch):
    """The patterns are the real ones, the ranks are few, with a gap behind the bytes."""
    byte_of = {symbol: byte for byte, symbol in data.byte_symbols().items()}
    merges = json.loads(LEARNED.hf.to_str())['model']['merges']
    tokens = [bytes(byte_of[c] for c in a + b) for a, b in merges]
    ranks = {bytes([b]): b for b in range(256)} | {token: 300 + i for i, token in enumerate(tokens)}

    public = pytest.importorskip('tiktoken_ext.openai_public')
    for loader in ('load_tiktoken_bpe', 'data_gym_to_mergeable_bpe_ranks'):
        monkeypatch.setattr(public, loader, lambda *args, **kwargs: ranks)
    facts = {**getattr(public, name)(), 'special_tokens': {'<|endoftext|>': 700, '<|endofprompt|>': 710}}
    facts.pop('explicit_n_vocab', None)
    theirs = tiktoken.Encoding(**facts)
    ours = data.from_tiktoken(theirs)
    for text in TEXTS[:-1] + RANDOM + ['<|endoftext|>', '12345678 a\n b  \n\n', 'a  \n', 'x \t\n y']:
        assert ours.encode(text) == theirs.encode_ordinary(text), text
    assert ours.eos_id == 700 and ours.mask_id > 710 and ours.hf.token_to_id('<|endofprompt|>') == 710


def test_tiktoken_joins_whatever_makes_a_token():
    """The whole word first, then the lowest rank, even if no merge in order would make it."""
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {b'bc': 256, b'ab': 257, b'abcd': 258, b'cd': 259, b'xyz': 260}
    theirs = tiktoken.Encoding('small', pat_str=r'\S+|\s', mergeable_ranks=ranks, special_tokens={})
    ours = data.from_tiktoken(theirs)
    for text in ('abcd', 'abcdx', 'xyz', 'axyz', 'abab abc cdcd bcd'):
        assert ours.encode(text) == theirs.encode_ordinary(text)


# --------------------------------------------------------------------------------------------- learned ones


def test_learning_is_deterministic_and_digits_stand_alone():
    tok, again = LEARNED, data.learn_tokenizer(TEXTS * 3, 500)
    assert tok.fingerprint() == again.fingerprint() and tok.vocab_size <= 500
    assert len(tok.encode('1234')) == 4 and len(tok.encode('world')) < 5
    assert min(tok.mask_id, tok.eos_id, tok.bos_id) == tok.vocab_size - 6       # special tokens come last


def test_a_saved_tokenizer_is_the_same(folders, tmp_path):
    toks = [data.get_tokenizer(spec) for spec in ('bytes', *folders.values())]
    for tok in toks:
        tok.save(tmp_path)
        again = data.get_tokenizer(tmp_path, complete=False)
        assert again.fingerprint() == tok.fingerprint() and again.template == tok.template
        assert again.names == tok.names and again.pad_id == tok.pad_id
    assert len({tok.fingerprint() for tok in toks}) == len(toks)


def test_transformers_opens_what_is_saved(tmp_path):
    transformers = pytest.importorskip('transformers')
    LEARNED.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.mask_token_id == LEARNED.mask_id
    assert theirs.pad_token_id == LEARNED.eos_id == theirs.eos_token_id
    assert theirs.encode('so it goes', add_special_tokens=False) == LEARNED.encode('so it goes')
    assert theirs.decode(LEARNED.encode('it , is')) == 'it , is'


# ----------------------------------------------------------------------------------------- released weights


def meta(folder, **ids):
    names = ('mask_id', 'eos_id', 'pad_id', 'bos_id', 'eot_id')
    return {'folder': str(folder), **dict.fromkeys(names), **ids}


def unknown_roles(tmp_path):
    """A folder whose tokenizer has an unknown token, but nothing that is called a mask."""
    hf = Tokenizer(models.WordLevel({'<unk>': 0, 'a': 1, 'b': 2, '</s>': 3}, unk_token='<unk>'))
    hf.pre_tokenizer = pre.Whitespace()
    hf.save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'tokenizer_config.json').write_text('{"mask_token": "[MASK]", "unk_token": "<unk>"}')
    return tmp_path


def test_the_unknown_token_is_never_the_mask(tmp_path):
    folder = unknown_roles(tmp_path)
    assert data.get_tokenizer(folder, complete=False).mask_id is None
    with pytest.raises(UserError, match='mask'):
        data.tokenizer_of(meta(folder))
    tok = data.tokenizer_of(meta(folder, mask_id=7))
    assert (tok.mask_id, tok.eos_id, tok.bos_id) == (7, 3, None) and tok.vocab_size == 4
    assert data.get_tokenizer(folder).mask_id == 5                                # to train with, it is added


def test_config_json_has_a_say(tmp_path):
    folder = unknown_roles(tmp_path)
    tok = data.tokenizer_of(meta(folder, mask_id=2, eot_id=1, pad_id=0))
    assert (tok.mask_id, tok.eot_id, tok.pad_id) == (2, 1, 0)
    with pytest.raises(UserError, match='must give one eos_id'):
        data.tokenizer_of(meta(folder, mask_id=2, eos_id=1))


@pytest.mark.parametrize('spec', ['gpt9', 'none/tokenizer.json', '.'])
def test_unknown_tokenizers(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='unknown tokenizer; expected'):
        data.get_tokenizer(spec)


# ------------------------------------------------------------------------------------------- chat templates

HEADER = "'<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
ASSISTANT = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
TEMPLATES = {
    'llada': (
        "{% for m in messages %}{% set content = " + HEADER + " + m.content | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        + ASSISTANT),
    'llama3': (
        "{{- bos_token }}\n{%- set date = strftime_now('%Y') %}\n{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system = messages[0]['content'] | trim %}\n    {%- set messages = messages[1:] %}\n"
        "{%- else %}\n    {%- set system = '' %}\n{%- endif %}\n"
        "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + date + system + '<|eot_id|>' }}\n"
        "{%- for m in messages %}\n  {{- " + HEADER + " + m.content | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    " + ASSISTANT + "\n{%- endif %}\n"),
    'chatml': (
        "{% for m in messages %}\n    {%- if m.content is none %}{% continue %}{% endif %}\n"
        "    {% if loop.first and m.role != 'system' %}\n"
        "<|im_start|>system\nYou have {{ {'tools': '<é>'} | tojson }}.<|im_end|>\n    {% endif %}\n"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}\n"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"),
    'mistral': (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}"
        "{% elif loop.first %}{{ m['content'] + '\n' }}"
        "{% else %}{{ raise_exception('Only user and assistant may speak') }}{% endif %}{% endfor %}")}
TALK = [{'role': 'user', 'content': '  What is 12 + 34?\n'}, {'role': 'assistant', 'content': 'It is  46. '},
        {'role': 'user', 'content': 'Naïve 床前!'}]
SYSTEM = [{'role': 'system', 'content': 'Be brief.'}]


def with_template(folder, source, tmp_path):
    """Copy a tokenizer and give it a chat template."""
    (tmp_path / 'tokenizer.json').write_bytes((folder / 'tokenizer.json').read_bytes())
    names = {'bos_token': '<s>', 'eos_token': '</s>', 'mask_token': '<|mdm_mask|>'}
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', **names, 'chat_template': source}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', TEMPLATES)
def test_a_chat_has_the_ids_of_transformers(folders, name, kind, tmp_path):
    transformers = pytest.importorskip('transformers')
    folder = with_template(folders[kind], TEMPLATES[name], tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = data.get_tokenizer(folder)
    for messages in (TALK, TALK[:1], SYSTEM + TALK):
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        expected = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode_chat(messages) == expected
    assert ours.encode_chat(TALK).count(ours.bos_id) == (name != 'chatml')


@pytest.mark.parametrize('name', TEMPLATES)
def test_a_special_name_typed_in_a_chat_is_text(folders, name, tmp_path):
    tok = data.get_tokenizer(with_template(folders['gpt2'], TEMPLATES[name], tmp_path))
    for typed in SPECIAL:
        say = f'a {typed} b'
        ids, plain = (tok.encode_chat([{'role': 'user', 'content': content}]) for content in (say, 'a b'))
        special = [tok.hf.token_to_id(name) for name in SPECIAL]
        assert [i for i in ids if i in special] == [i for i in plain if i in special]
        assert say in tok.decode(ids)
    # nor does a character that stands in no text turn the name into the token
    say = f'{data.BREAK}{SPECIAL[0]} b'
    ids = tok.encode_chat([{'role': 'user', 'content': say}])
    assert ids == tok.encode_chat([{'role': 'user', 'content': say.replace(data.BREAK, '')}])


def test_special_tokens_keep_their_blanks(tmp_path):
    hf = Tokenizer(models.WordLevel({'a': 0, '<unk>': 1}, unk_token='<unk>'))
    hf.add_special_tokens([AddedToken('<mask>', lstrip=True), AddedToken('</s>', rstrip=True)])
    hf.save(str(tmp_path / 'tokenizer.json'))
    tok = data.get_tokenizer(tmp_path)
    assert (tok.mask_id, tok.eos_id) == (2, 3) and tok.vocab_size == 4
    added = tok.hf.get_added_tokens_decoder()
    assert added[2].lstrip and added[3].rstrip


def test_our_own_vocabularies_speak_llada_and_leave_a_last_answer_open():
    tok = data.get_tokenizer('bytes')
    ids = tok.encode_chat([{'role': 'user', 'content': ' hi '}])
    assert tok.decode(ids) == (
        '<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>'
        '<|start_header_id|>assistant<|end_header_id|>\n\n')
    assert tok.decode(tok.encode_chat([])).startswith('<|startoftext|><|start_header_id|>assistant')
    begun = [{'role': 'user', 'content': ' hi '}, {'role': 'assistant', 'content': ' It is '}]
    assert tok.encode_chat(begun) == ids + tok.encode('It is')


@pytest.mark.parametrize('source, says', [
    ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", 'drops, repeats or changes'),
    ("{{ messages[-1].content }}", 'drops, repeats or changes'),
    ("{% for m in messages %}{{ m.content }} {{ m.content }}{% endfor %}", 'drops, repeats or changes'),
    ("{{ raise_exception('no system prompt') }}", 'says: no system prompt'), ("{% for %}", 'says:'),
    ("{{ messages.__class__.__mro__ }}", 'unsafe')])
def test_templates_that_cannot_be_used(source, says, folders, tmp_path):
    tok = data.get_tokenizer(with_template(folders['gpt2'], source, tmp_path))
    with pytest.raises(UserError, match=says):
        tok.encode_chat([*SYSTEM, *TALK])


def test_a_template_may_ask_for_tools(folders, tmp_path):
    source = "{% if tools is not none %}tools{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    tok = data.get_tokenizer(with_template(folders['gpt2'], source, tmp_path))
    assert tok.decode(tok.encode_chat([{'role': 'user', 'content': 'a'}])) == 'a'


def test_which_template_counts(folders, tmp_path):
    named = [{'name': 'tool_use', 'template': 'T'}, {'name': 'default', 'template': 'D'}]
    folder = with_template(folders['gpt2'], named, tmp_path)
    assert data.get_tokenizer(folder).template == 'D'
    (folder / 'chat_template.jinja').write_text('J')
    assert data.get_tokenizer(folder).template == 'J'
    (folder / 'chat_template.jinja').unlink()
    with pytest.raises(UserError, match='no chat template'):
        data.tokenizer_of(meta(unknown_roles(tmp_path), mask_id=7)).encode_chat(TALK)


def test_data_for_released_weights_has_their_tokens_and_no_others(tmp_path):
    """A file with a mask gets no tokens. It may name none of a chat, and another one with the same words may."""
    chat = ['<|eot_id|>', '<|start_header_id|>', '<|end_header_id|>']
    file = json.loads(build('gpt2').to_str())
    file['added_tokens'] = [token for token in file['added_tokens'] if token['content'] not in chat]
    for name in chat:
        del file['model']['vocab'][name]
    (tmp_path / 'tokenizer.json').write_text(json.dumps(file))
    ours, theirs = data.get_tokenizer(tmp_path), data.get_tokenizer(tmp_path, complete=False)
    assert ours.vocab_size == theirs.vocab_size and ours.eot_id is None and not ours.template
    data.check_same(ours, theirs, 'a', 'b')

    instruct = Tokenizer.from_str(json.dumps(file))
    instruct.add_special_tokens(chat)
    instruct = data.Tokenizer(instruct)
    assert instruct.template and instruct.eot_id is not None
    data.check_same(instruct, theirs, 'a', 'b')
