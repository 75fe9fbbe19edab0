"""Folders of released weights: both layouts, every shape checked, what is doctored is refused in one sentence."""

import json
import os
import shutil

import pytest
import torch
from helpers import GOLDEN, golden_model, tiny_model

import data
import model as M

safetensors = pytest.importorskip('safetensors.torch', reason='released weights need: pip install safetensors')


@pytest.mark.parametrize('name', ['llada_mha', 'llada_gqa_tied', 'illada_gqa'])
def test_the_door_reads_the_official_layouts(name):
    model, meta = M.load_model(GOLDEN / 'models' / name)
    for (a, p), (b, q) in zip(model.state_dict().items(), golden_model(name).state_dict().items()):
        assert a == b and torch.equal(p, q)
    raw = json.loads((GOLDEN / 'models' / name / 'config.json').read_text())
    assert meta['mask_id'] == raw.get('mask_token_id') and meta['eos_id'] == raw['eos_token_id']
    assert model.config.rope_fp32 == (raw['model_type'] == 'llada') and not model.training


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('rope_fp32', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, tied, rope_fp32, dtype):
    model = tiny_model(tied=tied, rope_fp32=rope_fp32, rope_theta=12345.0, norm_eps=3e-6).to(dtype)
    ids = {'mask_id': 39, 'eos_id': 38, 'pad_id': 38, 'bos_id': 37}
    M.save_release(model, {**ids, 'tokenizer': None}, tmp_path / 'r')
    again, meta = M.load_model(tmp_path / 'r')
    assert again.config == model.config and {k: meta[k] for k in ids} == ids
    for p, q in zip(model.parameters(), again.parameters()):
        assert p.dtype == q.dtype == dtype and torch.equal(p, q)
    wide, _ = M.load_model(tmp_path / 'r', dtype=torch.float32)
    assert wide.embed.weight.dtype == torch.float32


def test_what_save_release_writes_bears_its_checksums(tmp_path, capsys):
    """A flipped bit in the weights is found, which safetensors itself would not do; a changed config.json is said."""
    M.save_release(tiny_model(tied=False), {'mask_id': 39}, tmp_path / 'r')
    file = tmp_path / 'r' / 'model.safetensors'
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match='damaged'):
        M.load_model(tmp_path / 'r')
    raw[-1] ^= 1
    file.write_bytes(raw)
    M.load_model(tmp_path / 'r')
    assert capsys.readouterr().err == ''
    edit(tmp_path / 'r', rope_theta=20000.0)
    M.load_model(tmp_path / 'r')
    assert 'config.json: changed since' in capsys.readouterr().err


def test_special_ids_by_number_and_by_name(tmp_path):
    """LLaDA says its ids in config.json; iLLaDA's mask has only a name; generation_config.json knows a bos."""
    M.save_release(tiny_model(rope_fp32=False), {}, tmp_path / 'r')
    assert M.load_model(tmp_path / 'r')[1]['mask_id'] is None
    added = {'5': {'content': '<[MASK]>'}, '1': {'content': '<pad>'}}
    files = {'tokenizer_config.json': {'eos_token': '<eos>', 'pad_token': {'content': '<pad>'},
                                       'added_tokens_decoder': added},
             'tokenizer.json': {'added_tokens': [{'content': '<eos>', 'id': 2}]},
             'generation_config.json': {'bos_token_id': 0}}
    for name, content in files.items():
        (tmp_path / 'r' / name).write_text(json.dumps(content))
    meta = M.load_model(tmp_path / 'r')[1]
    assert [meta[f'{role}_id'] for role in ('mask', 'eos', 'pad', 'bos', 'eot')] == [5, 2, 1, 0, None]


def shard(folder):
    """Splits model.safetensors in two, with an index, as the released 8B models are."""
    tensors = safetensors.load_file(folder / 'model.safetensors')
    (folder / 'model.safetensors').unlink()
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f'model-0000{i}-of-00002.safetensors'
        safetensors.save_file({n: tensors[n] for n in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))


@pytest.fixture
def folder(tmp_path):
    M.save_release(tiny_model(tied=True), {'mask_id': 39}, tmp_path / 'r')
    return tmp_path / 'r'


def test_sharded_and_stored_tied_head(folder):
    want = M.load_model(folder)[0].state_dict()
    tensors = safetensors.load_file(folder / 'model.safetensors')
    tensors['model.transformer.ff_out.weight'] = tensors['model.transformer.wte.weight'].clone()  # some store it twice
    safetensors.save_file(tensors, folder / 'model.safetensors')
    shard(folder)
    got = M.load_model(folder)[0].state_dict()
    assert all(torch.equal(want[k], got[k]) for k in want) and set(want) == set(got)


def edit(folder, **changes):
    raw = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({k: v for k, v in {**raw, **changes}.items() if v != 'gone'}))


def retensor(folder, change):
    tensors = safetensors.load_file(folder / 'model.safetensors')
    change(tensors)
    safetensors.save_file(tensors, folder / 'model.safetensors')


DOCTORED = {
    'missing shard': (lambda f: (shard(f), os.remove(f / 'model-00002-of-00002.safetensors')), '00002.safetensors'),
    'no weights': (lambda f: os.remove(f / 'model.safetensors'), 'missing'),
    'wrong shape': (lambda f: retensor(f, lambda t: t.update({'model.transformer.ln_f.weight': torch.ones(7)})),
                    'has shape \\[7\\]'),
    'missing tensor': (lambda f: retensor(f, lambda t: t.pop('model.transformer.ln_f.weight')),
                       'lacks .*ln_f.* 0 tensors'),
    'extra tensor': (lambda f: retensor(f, lambda t: t.update(a=torch.ones(1), b=torch.ones(1))),
                     "has .'a'. that this"),
    'renamed tensor': (lambda f: retensor(f, lambda t: t.update(odd=t.pop('model.transformer.ln_f.weight'))),
                       'lacks .*ln_f.* has ..odd'),
    'truncated file': (lambda f: (f / 'model.safetensors').write_bytes((f / 'model.safetensors').read_bytes()[:-100]),
                       'not a complete'),
    'text file': (lambda f: (f / 'model.safetensors').write_text('hello'), 'not a complete'),
    'wrong type': (lambda f: edit(f, model_type='gpt2'), "model_type 'gpt2'"),
    'broken config': (lambda f: (f / 'config.json').write_text('{'), 'not a JSON object'),
    'hostile layers': (lambda f: edit(f, n_layers=10 ** 9), 'n_layer must be a whole number'),
    'hostile width': (lambda f: edit(f, d_model=2 ** 30), 'the configuration says'),
    'no theta': (lambda f: edit(f, rope_theta='gone'), 'rope_theta missing'),
    'biases': (lambda f: edit(f, include_bias=True), 'include_bias = True is not supported'),
    'untied head': (lambda f: retensor(f, lambda t: t.update({'model.transformer.ff_out.weight': torch.ones(40, 32)})),
                    'but they differ'),
    'broken generation': (lambda f: (f / 'generation_config.json').write_text('[1'), 'not a JSON object'),
    'broken tokens': (lambda f: (f / 'tokenizer.json').write_text('{"added_tokens": [1]}'), 'added tokens is broken'),
    'index without a map': (lambda f: (f / 'model.safetensors.index.json').write_text('{}'), 'not a safetensors index'),
    'path in the index': (lambda f: (shard(f), (f / 'model.safetensors.index.json').write_text(
        '{"weight_map": {"x": "../../etc/passwd"}}')), 'r.passwd'),
}


@pytest.mark.parametrize('case', DOCTORED)
def test_doctored_folders(folder, case):
    change, says = DOCTORED[case]
    change(folder)
    with pytest.raises((ValueError, OSError), match=says) as e:
        M.load_model(folder)
    assert '\n' not in str(e.value)


def test_an_autoregressive_model_has_no_released_layout(tmp_path):
    with pytest.raises(ValueError, match='bidirectional'):
        M.save_release(tiny_model(causal=True), {}, tmp_path)


def test_the_missing_package_is_named(folder, monkeypatch):
    import builtins
    real = builtins.__import__
    monkeypatch.setattr(builtins, '__import__', lambda name, *a, **k: (_ for _ in ()).throw(ImportError(name))
                        if name.startswith('safetensors') else real(name, *a, **k))
    with pytest.raises(ValueError, match='pip install safetensors'):
        M.load_model(folder)


def test_the_tokenizer_travels(tmp_path):
    data.save_bpe(tmp_path / 't.json', data.train_bpe('some words ' * 50, 5))
    tok = data.get_tokenizer(tmp_path / 't.json')
    M.save_release(tiny_model(vocab_size=tok.vocab_size),
                   {'mask_id': tok.mask_id, 'tokenizer': str(tmp_path / 't.json')}, tmp_path / 'r')
    shutil.rmtree(tmp_path / 't.json', ignore_errors=True)
    _, meta = M.load_model(tmp_path / 'r')
    assert data.get_tokenizer(meta['tokenizer']).encode('some words') == tok.encode('some words')


def released(tmp_path, **shape):
    """A folder in iLLaDA's layout, and the model in it."""
    model = tiny_model(rope_fp32=False, **shape)
    M.save_release(model, {'mask_id': 39}, tmp_path / 'r')
    return model, tmp_path / 'r'


@pytest.mark.parametrize('changes, says', [
    (dict(rope_theta='gone', rope_parameters={'rope_type': 'default', 'rope_theta': 7.0}), 7.0),
    (dict(rope_theta='gone', rope_scaling={'type': 'default', 'rope_theta': 7.0}), 7.0),
    (dict(rope_scaling={'rope_type': 'default'}), None), (dict(rope_parameters={}), None),
    (dict(rope_parameters={'rope_type': 'linear', 'factor': 4.0}), 'scaled rotary angles'),
    (dict(rope_scaling=5), 'scaled rotary angles'),
    (dict(rope_parameters={'rope_theta': 7.0}), 'which one'),
    (dict(partial_rotary_factor=0.5), 'partial_rotary_factor = 0.5 is not known'),
    (dict(use_sliding_window=True), 'take it out'), (dict(clip_qkv=8.0), 'clip_qkv'),
    (dict(use_sliding_window=False, qk_norm=None, output_attentions=False), None)], ids=str)
def test_what_a_configuration_says_is_read_or_refused(tmp_path, changes, says):
    """transformers 5 moves the base of the rotary angles; a key that nobody knows may change the logits."""
    model, folder = released(tmp_path)
    edit(folder, **changes)
    if isinstance(says, str):
        with pytest.raises(ValueError, match=says):
            M.load_model(folder)
    else:
        again, _ = M.load_model(folder)
        assert again.config.rope_theta == (says or model.config.rope_theta)


def test_two_sets_of_weights_in_one_folder_are_refused(tmp_path):
    """An index that does not know the single file beside it: one of the two is stale."""
    _, folder = released(tmp_path)
    index = folder / 'model.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': {'a': 'model-00001-of-00001.safetensors'}}))
    with pytest.raises(ValueError, match='which weights'):
        M.load_model(folder)
    index.write_text(json.dumps({'weight_map': {'a': 'model.safetensors'}}))
    M.load_model(folder)


def test_a_tied_matrix_stored_as_the_head_and_buffers_that_say_nothing(tmp_path):
    model, folder = released(tmp_path, tied=True)
    tensors = safetensors.load_file(folder / 'model.safetensors')
    tensors['lm_head.weight'] = tensors.pop('model.embed_tokens.weight')
    tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = torch.ones(4)
    safetensors.save_file(tensors, folder / 'model.safetensors')
    again, _ = M.load_model(folder)
    assert torch.equal(again.embed.weight, model.embed.weight)


def test_a_tiktoken_vocabulary_travels_too(tmp_path):
    """A run on gpt2's vocabulary, saved as a release, is sampled without network."""
    ids = {bytes([b]).hex(): b for b in range(256)} | {b'th'.hex(): 256}
    facts = {'pattern': data.PATTERN, 'ids': ids, 'special': {'<|endoftext|>': 257}}
    (tmp_path / 'tokenizer.tiktoken').write_text(json.dumps(facts))
    tok = data.get_tokenizer(tmp_path / 'tokenizer.tiktoken')
    special = {f'{role}_id': getattr(tok, f'{role}_id') for role in data.ROLES}
    M.save_release(tiny_model(vocab_size=tok.vocab_size), {**special, 'tokenizer': tok.spec}, tmp_path / 'r')
    _, meta = M.load_model(tmp_path / 'r')
    again = data.tokenizer_for(meta)
    assert again.encode('the') == tok.encode('the') == [256, 101]
    assert all(getattr(again, name) == number for name, number in special.items())
