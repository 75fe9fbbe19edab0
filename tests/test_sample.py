"""sample.py as a user meets it: prompts from everywhere, gaps, chat, released folders, and refusals in one line."""

import io
import json
import re
import shutil
import subprocess

import pytest
import torch
from helpers import script, small_corpus, tiny_model
from test_train import settings

import data
import diffusion
import model as M
import sample
import train


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A diffusion model after a few updates, on bytes, context 32."""
    folder = tmp_path_factory.mktemp('sample')
    train.main(settings(small_corpus(folder / 'corpus'), folder / 'run', max_iters=2, eval_interval=2))
    return folder / 'run'


def test_sampling_from_a_run(run, capsys):
    script('sample', run, '--gen_length=16', '--num_samples=2', '--show')
    captured = capsys.readouterr()
    assert captured.out.count('-' * 80) == 3 and '32 tokens' in captured.err and '   1 | ' in captured.out
    script('sample', run, '--prompt=the model ______ text', '--prompt=a ___ b', '--gap_length=4')
    out = capsys.readouterr().out
    assert 'the model' in out and ' text' in out
    script('sample', run, '--prompt=the', '--gen_length=8', '--block_length=4', '--steps=4',
           '--remasking=low_confidence', '--temperature=0.5', '--cfg_scale=0.5')
    a = capsys.readouterr().out
    script('sample', run, '--prompt=the', '--gen_length=8', '--block_length=4', '--steps=4',
           '--remasking=low_confidence', '--temperature=0.5', '--cfg_scale=0.5')
    assert a == capsys.readouterr().out                             # the seed decides


def test_a_gap_of_unknown_length(run, monkeypatch, capsys):
    """Every length from 1 to 8 that fits into the context is filled; what fits best is kept, each prompt for itself."""
    tried = []

    def fit(model, prompt, filled, mask_id, seed):
        n = prompt.count(mask_id)
        tried.append(n)
        assert len(filled) == len(prompt) and mask_id not in filled
        return -abs(n - (5 if filled[0] == ord('o') else 2))

    monkeypatch.setattr(diffusion, 'fit', fit)
    script('sample', run, '--prompt=one ___ x', '--prompt=two___', '--gap_length=0', '--dtype=float32')
    assert tried == [*range(1, 9)] * 2 and '7 tokens' in capsys.readouterr().err             # 5 and 2
    script('sample', run, '--prompt=' + 'a' * 27 + '___', '--gap_length=0')
    assert tried[16:] == [1, 2, 3, 4, 5]
    script('sample', run, '--prompt=nothing to fill', '--gap_length=0', '--gen_length=2')
    assert len(tried) == 21                                     # asked of gaps only

    def answers_of(*more):
        capsys.readouterr()
        script('sample', run, '--prompt=one ___ x', '--prompt=two___', '--gap_length=0', '--dtype=float32', *more)
        return capsys.readouterr().out

    assert answers_of('--batch_size=1') == answers_of('--batch_size=8')


@pytest.mark.parametrize('argv, says', [
    (['--prompt='], 'the prompt is empty'), (['--prompt=' + 'x' * 40], 'the context holds 32'),
    (['--gen_length=8', '--steps=9'], 'steps must lie between 1 (blocks) and 8'),
    (['--gen_length=8', '--block_length=3'], 'block_length must divide the 8'),
    (['--gen_length=-1'], 'gen_length must be 0 or more'), (['--stop=', '--prompt=a'], 'stop must hold texts'),
    (['--prompt=a ___', '--gen_length=4'], 'not gaps'),
    (['--instruct'], 'needs a prompt'), (['--chat', '--out=x'], 'from the keyboard'),
    (['--chat', '--gen_length=2', '--remasking=best'], 'remasking must be'),
    (['--mask_id=5'], 'the weights say mask is'), (['--temperature=-1'], 'temperature must be 0 or more'),
    (['--remasking=best'], 'remasking must be'), (['--prompt=a ___', '--prompt=b'], 'either all prompts'),
    (['--gen_length=8', '--block_length=4', '--steps=1'], 'between 2 (blocks) and 8'),
    (['--checkpoint=no/such'], 'no checkpoint here'), (['--gen_lenght=8'], 'did you mean gen_length'),
    (['--threshold=0.9'], 'needs low_confidence'),
    (['--prompt=a ___ b', '--block_length=2'], 'not gaps'), (['--gap_length=-1'], 'gap_length must be'),
    (['--prompt=a ___ b', '--gap_length=0', '--html=x.html'], 'gaps of known length'),
])
def test_bad_requests(run, capsys, argv, says):
    with pytest.raises(SystemExit) as e:
        script('sample', run, *argv)
    captured = capsys.readouterr()
    assert e.value.code == 2 and says in captured.err and len(captured.err.splitlines()) == 1 and captured.out == ''


@pytest.mark.parametrize('more', [[], ['--variable_length', '--block_length=4'], ['--show']])
def test_a_page_of_the_steps(run, tmp_path, capsys, more):
    """The page holds every token with the step that wrote it, in a script that no text can end."""
    page, out = tmp_path / 'new' / 'page.html', tmp_path / 'out.jsonl'
    script('sample', run, '--prompt=a </script> b', '--gen_length=8', f'--html={page}', f'--out={out}', *more)
    text = page.read_text(encoding='utf-8')
    assert text.count('</script>') == 1 and 'http' not in text
    tokens, guesses = map(json.loads, re.search('tokens = (.*), guesses = (.*), at = ', text).groups())
    ids = json.loads(out.read_text())['ids']
    pieces, born, written, sure = zip(*tokens)
    assert len(tokens) == len(ids) and sorted(written)[-8:] == list(range(1, 9))
    assert set(written[:-8]) == {0} and ''.join(pieces[:-8]) == 'a </script> b'
    assert set(born) == ({0, 4} if '--variable_length' in more else {0})
    for step, seen in enumerate(guesses):                       # before a step: three for each mask of the block
        asked = {i for i, w in enumerate(written) if w > step and (not max(born) or (w > 4) == (step > 3))}
        assert set(map(int, seen)) == asked and all(len(best) == 3 for best in seen.values())
        assert all(0 <= share <= 100 for best in seen.values() for _, share in best)
    assert all(0 <= s <= 100 for s in sure[-8:]) and set(sure[:-8]) == {None}
    with pytest.raises(SystemExit):
        script('sample', run, f'--html={page}', '--num_samples=1')
    assert 'is there already' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script('sample', run, f'--html={tmp_path / "x"}', '--num_samples=2')
    assert 'one prompt' in capsys.readouterr().err


def test_the_page_in_a_browser(run, tmp_path):
    """Drawn by a real one, where there is one: the last step has no mask left, and the text is the sample's."""
    browser = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not browser:
        pytest.skip('no Chromium here')
    page, out = tmp_path / 'a.html', tmp_path / 'a.jsonl'
    script('sample', run, '--prompt=a </script> b', '--gen_length=8', f'--html={page}', f'--out={out}')
    steps = re.search(r'steps = (\d+)', page.read_text(encoding='utf-8'))[1]
    last_token = 'document.querySelector("#text").lastChild.click()'
    for k, masks, about in (('0', 8, 'next guesses: '), (steps, 0, 'written in step ')):
        page.with_name('b.html').write_text(page.read_text(encoding='utf-8').replace(
            'draw();\n</script>', f'at("bar").value = {k}; at("hue").value = "sure"; draw(); {last_token};\n</script>'),
            encoding='utf-8')
        drawn = subprocess.run([browser, '--headless', '--no-sandbox', '--disable-gpu', '--dump-dom',
                                f'--user-data-dir={tmp_path / "profile"}', page.with_name('b.html').as_uri()],
                               capture_output=True, text=True, timeout=60).stdout
        assert f'step {k} of {steps}' in drawn and drawn.count('class="mask"') == masks
        assert about in drawn and drawn.count('style="background: rgba') == 8 - masks


def test_characters_of_several_tokens_are_shown_whole():
    """They come with their last token; a mask between them breaks them, and nothing else."""
    tok = data.get_tokenizer('bytes')
    ids = tok.encode('é👍a')
    assert sample.pieces_of(ids, tok) == ['', 'é', '', '', '', '👍', 'a']
    assert ''.join(sample.pieces_of([*ids, tok.mask_id, *tok.encode('b')], tok)) == f'é👍a{sample.HIDDEN}b'


def test_answers_look_for_the_mode_and_samples_are_drawn(run, tmp_path, capsys, monkeypatch):
    """What is not set goes by what is asked: by the weights, chat and instruct; what is set counts."""
    seen = []
    monkeypatch.setattr(diffusion, 'complete', lambda model, ids, *args, **how: seen.append(
        (how['remasking'], how['temperature'])) or ([[*i, 65] for i in ids], 1))
    for flags in ([], ['--instruct'], ['--temperature=0.5'], ['--instruct', '--remasking=random', '--temperature=1']):
        script('sample', run, '--prompt=a', '--gen_length=4', *flags)
    assert seen == [('random', 1.0), ('low_confidence', 0.0), ('random', 0.5), ('random', 1.0)]


def test_control_characters_are_not_printed():
    assert sample.clean('a\x1b[31mb\x07\n\tc') == 'a[31mb\n\tc'




def feed(monkeypatch, *lines):
    """What a user types; an exception is raised instead of being typed."""
    queue = iter(lines)

    def typed(_=''):
        line = next(queue, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr('builtins.input', typed)


def test_prompts_from_files_and_stdin(run, tmp_path, capsys, monkeypatch):
    (tmp_path / 'p.txt').write_text('the model\n\na token\r\n', encoding='utf-8')
    (tmp_path / 'p.jsonl').write_text('{"prompt": "the model"}\n{"ids": [97, 32, 116]}\n', encoding='utf-8')
    script('sample', run, f'--prompt-file={tmp_path / "p.txt"}', '--gen_length=8', f'--out={tmp_path / "a.jsonl"}')
    lines = [json.loads(x) for x in (tmp_path / 'a.jsonl').read_text().splitlines()]
    assert [x['prompt'] for x in lines] == ['the model', 'a token']
    assert all(len(x['ids']) == len(x['prompt']) + 8 for x in lines) and lines[0]['settings']['gen_length'] == 8
    err = capsys.readouterr().err
    assert '16 tokens' in err and 'tokens/s' in err and '8 forward passes' in err
    script('sample', run, '--prompt_file', tmp_path / 'p.jsonl', '--gen_length=8', '--batch_size=1',
           f'--out={tmp_path / "b.jsonl"}')
    again = [json.loads(x) for x in (tmp_path / 'b.jsonl').read_text().splitlines()]
    assert again[0]['ids'] == lines[0]['ids'] and again[1]['ids'][:3] == [97, 32, 116]     # a batch equals single runs
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(b'the model\n{"prompt": "a token"}\n')))
    script('sample', run, '--prompt_file=-', '--gen_length=8', f'--out={tmp_path / "c.jsonl"}')
    piped = [json.loads(x)['ids'] for x in (tmp_path / 'c.jsonl').read_text().splitlines()]
    assert piped == [x['ids'] for x in lines]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        script('sample', run, '--prompt=a', f'--out={tmp_path / "c.jsonl"}')
    assert 'is there already' in capsys.readouterr().err and len((tmp_path / 'c.jsonl').read_text().splitlines()) == 2


@pytest.mark.parametrize('content, says', [
    (b'', 'no prompt in it'), (b'{"prompt": "a"}\n{"prompt": 5}\n', ':2: want "prompt"'), (b'{"a": 1}', ':1: want'),
    (b'{', ':1: not JSON'), (b'{"prompt": "a"}\n\xff\n', ':2: not UTF-8'), (b'[]', ':1: want'),
    (b'{"messages": [{"role": "user"}]}', ':1: the "content"'), (b'{"ids": [1, 99999]}', 'between 0 and'),
    (b'null', ':1: want'), (b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', 'must be a text'),
])
def test_bad_prompt_files(run, tmp_path, capsys, content, says):
    (tmp_path / 'p.jsonl').write_bytes(content)
    with pytest.raises(SystemExit) as e:
        script('sample', run, f'--prompt_file={tmp_path / "p.jsonl"}', '--gen_length=4',
               f'--out={tmp_path / "o.jsonl"}')
    captured = capsys.readouterr()
    assert e.value.code == 2 and says in captured.err and len(captured.err.splitlines()) == 1
    assert not (tmp_path / 'o.jsonl').exists()


@pytest.mark.parametrize('flags', [
    '--block_length=4 --variable_length --steps=2', '--block_length=4 --variable_length --cfg_scale=0.5',
    '--logits_eos_inf', '--confidence_eos_eot_inf --remasking=low_confidence', '--cache=prefix --block_length=4',
    '--cache=dual --block_length=4', '--cache=roll --block_length=4', '--threshold=0.3 --remasking=low_confidence',
    '--think_boost=50 --block_length=8 --variable_length', '--instruct', '--show --block_length=8 --variable_length',
])
def test_every_sampler_flag(run, capsys, flags):
    script('sample', run, '--prompt=a', '--prompt=tok', *flags.split(),
           f'--gen_length={2 if "--instruct" in flags else 8}')
    assert 'forward passes' in capsys.readouterr().err


def test_compiled_blocks_write_the_same_tokens(run, monkeypatch, capsys):
    """By the tracer alone: its graphs run eagerly, which needs no C++ compiler and no half a minute."""
    calls, real = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self: calls.append(real(self, backend='eager')))
    argv = [run, '--prompt=the', '--prompt=a model', '--gen_length=12', '--block_length=4', '--temperature=0']
    for how in ([], ['--cache=prefix'], ['--cache=dual'], ['--cache=roll']):
        pages = []
        for more in ([], ['--compile=true']):
            script('sample', *argv, *how, *more)
            pages.append(capsys.readouterr().out.split('-' * 80)[1:-1])
        assert pages[0] == pages[1]
    assert len(calls) == 4 * 2                                                          # the blocks of each model


def test_a_run_that_fails_leaves_no_empty_file(run, tmp_path, monkeypatch):
    """The same command can be given again."""
    def broken(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(diffusion, 'complete', broken)
    with pytest.raises(SystemExit):
        script('sample', run, '--num_samples=1', f'--out={tmp_path / "a.jsonl"}', f'--html={tmp_path / "a.html"}')
    assert not list(tmp_path.iterdir())


def test_stop_strings_cut_the_text(run, capsys):
    script('sample', run, '--prompt=the', '--gen_length=16')
    whole = capsys.readouterr().out.split('-' * 80)[1].strip('\n')
    cut = whole[8]
    script('sample', run, '--prompt=the', '--gen_length=16', f'--stop={cut}')
    assert capsys.readouterr().out.split('-' * 80)[1].strip('\n') == whole[:3] + whole[3:].split(cut)[0]


def chat_model(folder, seq_len=96, **changes):
    """A released-style folder with a byte tokenizer file and a chat template."""
    pytest.importorskip('safetensors', reason='released weights need: pip install safetensors')
    data.save_bpe(folder / 't.json', [])
    tok = data.get_tokenizer(folder / 't.json')
    model = tiny_model(vocab_size=tok.vocab_size + 3, seq_len=seq_len, **changes)
    ids = {f'{role}_id': getattr(tok, f'{role}_id') for role in data.ROLES}
    M.save_release(model, {**ids, 'tokenizer': str(folder / 't.json')}, folder / 'r')
    (folder / 'r' / 'tokenizer_config.json').write_text(json.dumps(
        {'chat_template': TEMPLATE, 'eos_token': {'content': '<|endoftext|>'}, 'bos_token': '<|startoftext|>'}))
    return folder / 'r'


TEMPLATE = """{% for message in messages %}{% set c = '<|start_header_id|>' + message['role'] + '<|end_header_id|>

' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% endif %}
{{ c }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"""


def test_chat(tmp_path, capsys, monkeypatch):
    folder = chat_model(tmp_path, seq_len=48)
    seen, real = [], diffusion.generate

    def spy(model, x, *a, **k):
        seen.append(x[0].tolist())
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(model, x, *a, **k)

    monkeypatch.setattr(diffusion, 'generate', spy)
    feed(monkeypatch, 'hi', '', 'more', 'broken off', '/reset', 'anew', '/quit', 'never read')
    script('sample', folder, '--chat', '--gen_length=8')
    captured, tok = capsys.readouterr(), data.get_tokenizer(folder / 'tokenizer.json')
    first, second, _, fourth = (tok.decode(x) for x in seen)
    assert first.startswith('<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>')
    assert 'oldest turn' in captured.err and 'hi' not in second                     # 48 tokens hold one turn
    assert '(broken off)' in captured.err and 'anew' in fourth and 'more' not in fourth
    feed(monkeypatch, 'hi', KeyboardInterrupt())
    script('sample', folder, '--chat', '--gen_length=8')                            # leaves without a traceback
    feed(monkeypatch, 'x' * 200, '/quit')
    script('sample', folder, '--chat', '--gen_length=8')
    assert 'the context holds 48' in capsys.readouterr().err


def test_chat_remembers_while_there_is_room(tmp_path, capsys, monkeypatch):
    folder, seen, real = chat_model(tmp_path, seq_len=400), [], diffusion.generate
    monkeypatch.setattr(diffusion, 'generate', lambda model, x, *a, **k: seen.append(x[0]) or real(model, x, *a, **k))
    feed(monkeypatch, 'hi', 'and you')
    script('sample', folder, '--chat', '--gen_length=8')
    text = data.get_tokenizer(folder / 'tokenizer.json').decode(seen[1].tolist())
    assert 'hi<|eot_id|><|start_header_id|>assistant' in text and 'and you' in text
    assert 'oldest' not in capsys.readouterr().err


def edit(path, **changes):
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**raw, **changes}.items() if v != 'gone'}))


def test_other_templates_and_missing_ids_are_refused(tmp_path, capsys):
    folder = chat_model(tmp_path)

    def refused(*argv):
        with pytest.raises(SystemExit) as e:
            script('sample', folder, '--gen_length=4', *argv)
        lines = [line for line in capsys.readouterr().err.splitlines() if 'changed since save_release' not in line]
        assert e.value.code == 2 and len(lines) == 1
        return lines[0]

    llama = TEMPLATE.replace("'<|eot_id|>'", "'<|eot_id|>Cutting Knowledge Date'")
    edit(folder / 'tokenizer_config.json', chat_template=llama)
    assert 'chat template is not one of the two' in refused('--prompt=a', '--instruct') and 'chat' in refused('--chat')
    script('sample', folder, '--prompt=a', '--gen_length=4')                         # plain text needs no template
    capsys.readouterr()
    edit(folder / 'tokenizer_config.json', chat_template='gone')
    script('sample', folder, '--prompt=a', '--gen_length=4', '--instruct')           # LLaDA's, for its tokens are there
    capsys.readouterr()
    edit(folder / 'tokenizer_config.json', eos_token='<|mdm_mask|>')
    assert 'the weights say eos is' in refused('--prompt=a')
    edit(folder / 'tokenizer_config.json', eos_token='gone')
    edit(folder / 'config.json', mask_token_id=7)
    assert 'the weights say mask is 7' in refused('--prompt=a')
    edit(folder / 'config.json', mask_token_id='gone')
    script('sample', folder, '--prompt=a', '--gen_length=4')                         # its name is in the tokenizer
    capsys.readouterr()
    tokenizer = folder / 'tokenizer.json'
    tokenizer.write_text(tokenizer.read_text().replace('<|mdm_mask|>', '<|odd|>'))
    assert 'say which id is mask' in refused('--prompt=a')
    script('sample', folder, '--prompt=a', '--gen_length=4', '--mask_id=258')
    tokenizer.write_text(tokenizer.read_text().replace('<|eot_id|>', '<|other|>'))
    capsys.readouterr()
    assert 'chat template' in refused('--chat', '--mask_id=258')                    # no template, nor tokens for one
    (folder / 'tokenizer_config.json').write_text('[')
    assert 'tokenizer_config.json: not a' in refused('--prompt=a')
    tokenizer.unlink()
    (folder / 'tokenizer_config.json').unlink()
    assert 'no tokenizer.json' in refused('--prompt=a')


def test_the_format_of_the_guideline(tmp_path):
    folder = chat_model(tmp_path)
    template = "{{bos_token}}{{'<start_id>' + message['role'] + '<end_id>\\n' + message['content'] + '<eot_id>'}}" \
               "{{'<start_id>assistant<end_id>\\n'}}"
    edit(folder / 'tokenizer_config.json', chat_template=template)
    tokenizer = folder / 'tokenizer.json'
    for a, b in (('start_header', 'start'), ('end_header', 'end'), ('eot', 'eot')):
        tokenizer.write_text(tokenizer.read_text().replace(f'<|{a}_id|>', f'<{b}_id>'))
    tok = data.tokenizer_for(M.load_model(folder)[1])
    text = tok.decode(tok.encode_chat([{'role': 'user', 'content': 'hi'}]))
    assert text.replace('<|start_header_id|>', '<start_id>').replace('<|end_header_id|>', '<end_id>').replace(
        '<|eot_id|>', '<eot_id>') == '<|startoftext|><start_id>user<end_id>\nhi<eot_id><start_id>assistant<end_id>\n'


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('rope_fp32', [True, False])
def test_released_folders_in_the_dtype_they_are_stored_in(tmp_path, capsys, dtype, rope_fp32):
    pytest.importorskip('safetensors', reason='released weights need: pip install safetensors')
    data.save_bpe(tmp_path / 't.json', [])
    tok = data.get_tokenizer(tmp_path / 't.json')
    model = tiny_model(vocab_size=tok.vocab_size + 5, rope_fp32=rope_fp32, tied=not rope_fp32).to(dtype)
    M.save_release(model, {'eos_id': tok.eos_id, 'tokenizer': str(tmp_path / 't.json')}, tmp_path / 'r')
    script('sample', tmp_path / 'r', '--prompt=ab', '--gen_length=8', '--temperature=1')
    assert str(dtype) in capsys.readouterr().err
    script('sample', tmp_path / 'r', '--prompt=ab', '--gen_length=8', '--dtype=float32')
    assert 'torch.float32' in capsys.readouterr().err


def test_unused_rows_of_the_vocabulary_are_never_written():
    tok = data.get_tokenizer('bytes')
    assert tok.unused(tok.vocab_size) == [] and tok.unused(tok.vocab_size + 2) == [tok.vocab_size, tok.vocab_size + 1]
    x = torch.full((2, 8), tok.mask_id)
    flat = lambda ids: torch.zeros(*ids.shape, 300).index_fill_(-1, torch.arange(262, 300), 5.0)     # noqa: E731
    for temperature in (0.0, 1.0):
        made = diffusion.generate(flat, x, tok.mask_id, steps=8, temperature=temperature, suppress=tok.unused(300))
        assert (made.x < tok.vocab_size).all()


def test_end_think_by_hand():
    """One row in a thought of ids 7 8: the boost goes to 7, after a written 7 to 8, and to nobody once 7 8 stands."""
    m = 39
    hook = diffusion.end_think(2, 4, [7, 8], boost=10.0, power=2.0)
    for row, column, token in (([1, 2, 5, m, m, m], 3, 7), ([1, 2, 7, m, m, m], 3, 8), ([1, 2, 7, 8, m, m], 4, None),
                               ([1, 7, m, m, m, m], 2, 7)):         # a 7 in the prompt is not of the thought
        x = torch.tensor([row])
        logits = hook(torch.zeros(int((x == m).sum()), 40), x, x == m)
        want = torch.zeros_like(logits)
        if token is not None:
            want[0, token] = 10.0 * ((column - 2 + 1) / 4) ** 2
        assert torch.equal(logits, want)


def test_a_page_of_a_boosted_end_has_its_guesses(run, tmp_path):
    """Two hooks on the logits, one after the other: the page sees what the model says before the boost."""
    page = tmp_path / 'page.html'
    script('sample', run, '--prompt=a', '--gen_length=8', '--think_boost=50', f'--html={page}')
    guesses = json.loads(re.search('guesses = (.*), at = ', page.read_text(encoding='utf-8'))[1])
    assert [len(step) for step in guesses] == [8, 7, 6, 5, 4, 3, 2, 1]


def test_a_page_offers_only_what_may_be_written(run):
    """Neither [MASK] nor a row of the head without a token is guessed, however likely; the others add up to 1."""
    _, meta = M.load_model(run)
    tok = data.tokenizer_for(meta)
    logits = torch.zeros(2, tok.vocab_size + 3)
    logits[:, [tok.mask_id, tok.vocab_size + 1]] = 9.0
    logits[1, ord('a')] = 20.0
    trace = sample.Trace(tok)
    x = torch.tensor([[ord('x'), tok.mask_id, tok.mask_id]])
    assert trace.look(logits, x, x == tok.mask_id) is logits
    assert trace.guesses[0][2][0] == ['a', 100]
    for chances in trace.chances.values():
        assert chances.sum() == pytest.approx(1) and chances[[tok.mask_id, tok.vocab_size + 1]].tolist() == [0, 0]


def test_end_think_ends_a_thought():
    model = tiny_model(5).eval()
    prompts, ids = [[1, 2], [3, 4, 5]], [30, 31]
    options = dict(block_length=4, steps_per_block=4, max_length=24, stop=lambda new: 31 in new)
    free, _ = diffusion.generate_variable_length(model, prompts, 39, 38, **options)
    hook = diffusion.end_think(3, 24, ids, boost=100.0, power=3.0)
    ended, _ = diffusion.generate_variable_length(model, prompts, 39, 38, adjust=hook, **options)
    for row, p in zip(ended, prompts):
        assert '30, 31' in str(row[len(p):]) and '30, 31' not in str(free)
    for row, p in zip(ended, prompts):                              # and a batch equals single runs
        hook = diffusion.end_think(len(p), 24, ids, boost=100.0, power=3.0)
        assert diffusion.generate_variable_length(model, [p], 39, 38, adjust=hook, **options)[0][0] == row


def test_a_wide_vocabulary_is_sampled_in_little_memory():
    """V = 126,464, a canvas of 1,024, temperature 1: no float64 tensor is larger than (rows of the block) x V."""
    from torch.utils._python_dispatch import TorchDispatchMode
    V, T, block, largest = 126_464, 1024, 8, 0

    class Meter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
                largest = max(largest, out.numel())
            return out

    def model(ids, rows=None):
        return torch.zeros(int(rows.sum()), V)

    x = torch.full((1, T), V - 1)
    x[:, :T - 2 * block] = 5
    with Meter():
        made = diffusion.generate(model, x, V - 1, steps=4, block_length=block, temperature=1.0)
    assert 0 < largest <= block * V and not (made.x == V - 1).any()
