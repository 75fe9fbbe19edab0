"""Weights on disk: what is written opens again and looks like the release. What is doctored is refused."""

import json
import os
import re

import pytest
import torch
from helpers import GOLDEN, GOLDEN_MODELS, golden_model, read_golden, read_tensors, tiny_model
from safetensors.torch import save_file

import model as models
from configurator import UserError

IDS = {'mask_id': 39, 'eos_id': 38, 'pad_id': 38, 'bos_id': 37, 'eot_id': None}
KINDS = {'llada': dict(), 'illada': dict(rope_fp32=False), 'nanollada_ar': dict(causal=True)}


@pytest.fixture
def folder(tmp_path):
    """A folder with a small model in LLaDA's layout, with a tied head."""
    models.save_model(tiny_model(tied=True), tmp_path / 'released', IDS)
    return tmp_path / 'released'


def edit(folder, **changes):
    """Change keys of config.json, or remove those whose new value is 'gone'."""
    raw = json.loads((folder / 'config.json').read_text())
    raw = {key: value for key, value in {**raw, **changes}.items() if value != 'gone'}
    (folder / 'config.json').write_text(json.dumps(raw))


def retensor(folder, change):
    """Change the dict of tensors in model.safetensors."""
    tensors = read_tensors(folder / 'model.safetensors')
    change(tensors)
    save_file(tensors, folder / 'model.safetensors')


def shard(folder):
    """Split model.safetensors in two, as the released 8B models are."""
    tensors = read_tensors(folder / 'model.safetensors')
    (folder / 'model.safetensors').unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f'model-0000{i}-of-00002.safetensors'
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))


def assert_same_weights(model, other):
    for (name, p), (other_name, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert name == other_name and p.dtype == q.dtype and torch.equal(p, q), name


# ------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_round_trip(kind, tied, dtype, tmp_path):
    model = tiny_model(tied=tied, rope_theta=12345.0, norm_eps=3e-6, **KINDS[kind]).to(dtype)
    models.save_model(model, tmp_path, IDS)
    again, meta = models.load_model(tmp_path)
    assert again.config == model.config and not again.training
    assert_same_weights(again, model)
    assert meta == {**IDS, 'folder': str(tmp_path), 'settings': {}, 'iteration': None}
    assert json.loads((tmp_path / 'config.json').read_text())['model_type'] == kind
    # cast on the way
    assert_same_weights(models.load_model(tmp_path, dtype=torch.float64)[0], model.double())


def test_released_weights_keep_their_dtype_unless_another_is_asked_for(folder, monkeypatch):
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: True)    # so bfloat16 would be fast here
    for dtype, expected in (('auto', torch.float32), ('bfloat16', torch.bfloat16)):
        model, _ = models.open_model(folder, device='cpu', dtype=dtype)
        assert model.embed.weight.dtype == expected
    with pytest.raises(UserError, match='dtype must be auto, bfloat16 or float32'):
        models.open_model(folder, dtype='float16')
    with pytest.raises(UserError, match="device 'tpu' is not available"):
        models.open_model(folder, device='tpu')


def test_several_files_and_what_follows_from_other_tensors(folder):
    whole, _ = models.load_model(folder)
    retensor(folder, lambda tensors: tensors.update({
        # a tied head that is stored twice, and the rotary frequencies
        'model.transformer.ff_out.weight': tensors['model.transformer.wte.weight'].clone(),
        'model.transformer.blocks.0.rotary_emb.inv_freq': torch.ones(4)}))
    shard(folder)
    assert_same_weights(models.load_model(folder)[0], whole)
    # torch would take the tensors of whichever file comes last
    tensors = read_tensors(next(folder.glob('model-*.safetensors')))
    save_file(tensors, folder / 'consolidated.safetensors')
    with pytest.raises(UserError, match='is in another file, too'):
        models.load_model(folder)


@pytest.mark.parametrize('name', GOLDEN_MODELS)
def test_what_we_write_is_what_the_official_code_reads(name, tmp_path):
    """The same tensors by the same names, and the same configuration but for what has no effect."""
    folder = GOLDEN / 'models' / name
    models.save_model(golden_model(name), tmp_path, models.load_model(folder)[1])
    official, ours = (read_tensors(place / 'model.safetensors') for place in (folder, tmp_path))
    assert official.keys() == ours.keys() and all(torch.equal(official[key], ours[key]) for key in ours)

    official = read_golden(f'models/{name}/config.json')
    ours = json.loads((tmp_path / 'config.json').read_text())
    no_effect = re.compile('init|precision|flash_attention|use_cache|transformers_version|alibi_bias_max|'
                           'mlp_ratio|block_group_size|attention_layer_norm_with_affine')
    for key, value in official.items():
        assert no_effect.match(key) or ours[key] == value, key
    assert golden_model(name).config.rope_fp32 == (official['model_type'] == 'llada')


# ------------------------------------------------------------------------------ what is refused in one line

NORM = 'model.transformer.ln_f.weight'
DOCTORED = {
    'no folder': (lambda f: f.rename(f.parent / 'elsewhere'), 'no checkpoint here; there are'),
    'an old run': (lambda f: (f / 'config.json').rename(f / '.metadata'), 'an older version of nanoLLaDA'),
    'no weights': (lambda f: (f / 'model.safetensors').unlink(), '20 tensors .* missing'),
    'one of two': (lambda f: (shard(f), next(f.glob('*2.safetensors')).unlink()), '10 tensors .* missing'),
    'missing tensor': (lambda f: retensor(f, lambda t: t.pop(NORM)), f'1 tensors .*{NORM} is missing'),
    'one more': (lambda f: retensor(f, lambda t: t.update(odd=t[NORM] + 1)), 'odd is .*, by config.json missing'),
    'wrong shape': (lambda f: retensor(f, lambda t: t.update({NORM: torch.ones(7)})), r'\[7\], .* \[32\]'),
    'more layers': (lambda f: edit(f, n_layers=3), r'9 tensors .*blocks\.2'),
    'cut short': (lambda f: os.truncate(f / 'model.safetensors', 5000), 'damaged or incomplete'),
    'broken config': (lambda f: (f / 'config.json').write_text('{'), 'config.json: not a JSON object'),
    'another model': (lambda f: edit(f, model_type='gpt2'), "'gpt2' is not one of llada, illada"),
    'no theta': (lambda f: edit(f, rope_theta='gone'), 'rope_theta missing'),
    'biases': (lambda f: edit(f, include_bias=True), 'include_bias = True is not supported, only False'),
}


@pytest.mark.parametrize('case', DOCTORED)
def test_doctored_folders(case, folder):
    change, message = DOCTORED[case]
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        models.load_model(folder)
    assert '\n' not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize('changes, theta', [
    # as transformers 5 writes it
    (dict(rope_theta='gone', rope_parameters={'rope_type': 'default', 'rope_theta': 7.0}), 7.0),
    (dict(rope_scaling=None, rope_parameters=None, output_attentions=False), 500000.0),
    (dict(rope_parameters={'rope_theta': 7.0, 'rope_type': 'linear', 'factor': 4.0}), None),
    (dict(rope_parameters={'rope_type': 'yarn'}), None),
    (dict(rope_parameters={'rope_theta': 7.0}), None),              # rope_theta says something else
    (dict(rope_scaling={'type': 'linear', 'factor': 2.0}), None),
    (dict(partial_rotary_factor=0.5), None), (dict(attention_bias=True), None)], ids=str)
def test_what_config_json_says_is_computed_or_refused(changes, theta, tmp_path):
    models.save_model(tiny_model(rope_fp32=False), tmp_path, IDS)
    edit(tmp_path, **changes)
    if theta is None:
        with pytest.raises(UserError, match='supported'):
            models.load_model(tmp_path)
    else:
        assert models.load_model(tmp_path)[0].config.rope_theta == theta


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(folder):
    head, embedding = (f'model.transformer.{name}.weight' for name in ('ff_out', 'wte'))
    retensor(folder, lambda tensors: tensors.update({head: tensors[embedding].clone()}))
    assert_same_weights(models.load_model(folder)[0], tiny_model(tied=True))
    retensor(folder, lambda tensors: tensors.update({head: tensors[embedding] + 1}))
    with pytest.raises(UserError, match='ff_out.weight is not the embedding'):
        models.load_model(folder)


def test_of_several_dtypes_the_widest_counts(folder):
    retensor(folder, lambda tensors: tensors.update({NORM: tensors[NORM].bfloat16()}))
    assert models.load_model(folder)[0].embed.weight.dtype == torch.float32


def test_of_several_eos_the_tokenizer_decides(folder):
    edit(folder, eos_token_id=[7, 8])
    meta = models.load_model(folder)[1]
    assert meta['eos_id'] is None and meta['mask_id'] == IDS['mask_id']


# ----------------------------------------------------------------------------------------- runs of train.py


@pytest.fixture
def run(tmp_path):
    """A run with two checkpoints, with checksums as train.py writes them."""
    for it in (400, 800):
        folder = tmp_path / f'iter_{it:07d}'
        models.save_model(tiny_model(it), folder, IDS)
        sha256 = {file.name: models.file_sha256(file) for file in sorted(folder.iterdir())}
        state = {'iteration': it, 'settings': {'seed': it}, 'sha256': sha256}
        (folder / 'state.json').write_text(json.dumps(state))
    return tmp_path


def test_the_newest_checkpoint_of_a_run(run):
    (run / 'iter_0001200').mkdir()                          # not complete, because it has no state.json
    model, meta = models.load_model(run)
    assert_same_weights(model, tiny_model(800))
    assert meta['iteration'] == 800 and meta['settings'] == {'seed': 800}
    assert models.load_model(run / 'iter_0000400')[1]['iteration'] == 400


def test_weights_may_be_passed_on_without_the_optimizer(run):
    folder = run / 'iter_0000800'
    state = json.loads((folder / 'state.json').read_text())
    state['sha256']['optimizer/a.safetensors'] = 'of a file that is not there'
    (folder / 'state.json').write_text(json.dumps(state))
    assert models.load_model(run)[1]['iteration'] == 800


@pytest.mark.parametrize('file', ['model.safetensors', 'config.json'])
def test_a_flipped_bit_is_found(file, run):
    path = run / 'iter_0000800' / file
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f'{file}: damaged'):
        models.load_model(run)
