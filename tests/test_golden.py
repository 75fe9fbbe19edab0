"""The official implementation, run once on tiny random models; its numbers are in golden/ (golden/README.md)."""

import json
import math

import pytest
import torch
from helpers import GOLDEN, golden, golden_model, read_safetensors

import diffusion
from model import release_names

MODELS = ('llada_mha', 'llada_gqa_tied', 'illada_gqa')


@pytest.mark.parametrize('name', MODELS)
def test_logits(name):
    model, folder = golden_model(name), GOLDEN / 'models' / name
    tensors = read_safetensors(folder / 'parity.safetensors')
    for case in json.loads((folder / 'parity.json').read_text())['cases']:
        ids = tensors[f"{case['id']}.input_ids"].long()
        visible = tensors[f"{case['id']}.attention_mask"].bool() if case['attention_mask'] else None
        with torch.no_grad():
            logits = model(ids, visible=visible)
        if case['logit_positions'] is not None:
            logits = logits[:, case['logit_positions']]
        torch.testing.assert_close(logits, tensors[f"{case['id']}.logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize('case', golden('transfer_tokens.json'))
def test_transfer_tokens(case):
    want = [n for n, times in case['runs'] for _ in range(times)]
    assert diffusion.num_transfer_tokens(torch.tensor([case['mask_num']]), case['steps']).tolist() == [want]


def test_transfer_tokens_of_a_batch():
    for case in json.loads((GOLDEN / 'transfer_tokens.json').read_text())['batched']:
        assert diffusion.num_transfer_tokens(torch.tensor(case['mask_nums']), case['steps']).tolist() == case['counts']


def run_sampler(case, on_step=None):
    """generate() with the settings of a case."""
    s, ids, prompt = case['settings'], case['ids'], torch.tensor(case['prompt_ids'])
    B, P = prompt.shape
    x = torch.cat((prompt, torch.full((B, s['gen_length']), ids['mask'])), 1)
    visible = None
    if case['attention_mask'] is not None:
        visible = torch.cat((torch.tensor(case['attention_mask']).bool(),
                             torch.ones(B, s['gen_length'], dtype=torch.bool)), 1)
    options = {k: s[k] for k in ('steps', 'block_length', 'temperature', 'cfg_scale', 'remasking', 'logits_eos_inf',
                                 'confidence_eos_eot_inf')}
    return diffusion.generate(golden_model(case['model']), x, ids['mask'], gen_start=P, visible=visible,
                              eos_id=ids['eos'], eot_id=ids['eot'], on_step=on_step, **options), x


@pytest.mark.parametrize('case', golden('sampler.json'))
def test_greedy_sampler_step_by_step(case):
    frames = []
    out, x = run_sampler(case, lambda x, committed: frames.append(x.tolist()))
    if case['quirk'] in ('mask_in_prompt', 'mask_predicted'):
        assert not (out.x == case['ids']['mask']).any()             # ours fills every gap and never writes a mask
        given = x != case['ids']['mask']
        assert torch.equal(out.x[given], x[given])
        return
    assert out.x.tolist() == case['output_ids']
    want = [f for i, f in enumerate(case['trajectory']) if i and f != case['trajectory'][i - 1]]    # no idle steps
    assert frames == want


def mix(z):
    z = (z + 0x9E3779B97F4A7C15) % 2 ** 64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2 ** 64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2 ** 64
    return z ^ z >> 31


def hash_noise(seed, step, row, pos, token):
    return ((mix(mix(seed) ^ (step << 48 ^ row << 40 ^ pos << 24 ^ token)) >> 11) + 0.5) / 2 ** 53


@pytest.mark.parametrize('case', golden('sampler_noise.json'))
def test_sampler_with_given_noise(case, monkeypatch):
    step = [0]

    def uniform(rows, columns, generator):
        tokens = range(columns) if columns > 1 else [2 ** 20]
        return torch.tensor([[hash_noise(case['noise_seed'], step[0], b, i, v) for v in tokens]
                             for b, i in rows.nonzero().tolist()], dtype=torch.float64)

    def count(x, committed):
        step[0] += 1

    monkeypatch.setattr(diffusion, 'uniform', uniform)
    out, _ = run_sampler(case, count)
    if case['quirk'] is None:
        assert out.x.tolist() == case['output_ids']
    else:
        assert not (out.x == case['ids']['mask']).any()


@pytest.mark.parametrize('case', golden('sampler_random.json'))
def test_schedule_of_random_runs(case):
    revealed = []
    out, x = run_sampler(case, lambda x, committed: revealed.append(committed.sum(1).tolist()))
    assert revealed == [n for n in case['revealed_per_step'] if any(n)]
    given = x != case['ids']['mask']
    assert torch.equal(out.x[given], x[given]) and not (out.x == case['ids']['mask']).any()


@pytest.mark.parametrize('case', golden('sampler_var.json'))
def test_variable_length(case):
    s, ids = case['settings'], case['ids']
    out, n_forward = diffusion.generate_variable_length(
        golden_model(case['model']), case['prompt_ids'][:1], ids['mask'], (s['stop_ids'] or [None])[0],
        block_length=s['block_length'], steps_per_block=s['steps_per_block'], max_length=s['max_gen_length'],
        temperature=s['temperature'], cfg_scale=s['cfg_scale'], remasking=s['remasking'])
    assert out == case['output_ids']
    assert n_forward == case['blocks_generated'] * s['steps_per_block'] * (2 if s['cfg_scale'] else 1)


def answer(case):
    x0 = torch.tensor(case['prompt_ids'] + case['answer_ids'])
    return x0, torch.arange(len(x0)) >= len(case['prompt_ids'])


@pytest.mark.parametrize('case', golden('likelihood.json'))
def test_likelihood(case):
    model, (x0, maskable), L = golden_model(case['model']), answer(case), len(case['answer_ids'])
    exact = case['exact_log_likelihood']
    options = dict(cfg_scale=case['cfg_scale'], batch_size=64)
    value = diffusion.log_likelihood(model, x0, maskable, case['mask_id'], mc_num=2 ** L, **options)
    assert abs(value - exact) < max(1e-4, 5e-5 * abs(exact))                            # all masks: no noise at all
    if L > 3:                                                                           # and the estimator finds it too
        draws = [diffusion.log_likelihood(model, x0, maskable, case['mask_id'], mc_num=14, **options,
                                          generator=torch.Generator().manual_seed(i)) for i in range(40)]
        draws = torch.tensor(draws)
        assert abs(draws.mean() - exact) < 4 * draws.std() / math.sqrt(len(draws)) + 1e-4


@pytest.mark.parametrize('case', golden('likelihood_confidence.json'))
def test_confidence_score(case):
    value = diffusion.confidence_score(golden_model(case['model']), *answer(case), case['mask_id'],
                                       cfg_scale=case['cfg_scale'])
    assert abs(value - case['value']) < max(1e-4, 5e-5 * abs(case['value']))
    order = [i + len(case['prompt_ids']) for i in case['reveal_order']]
    chain = diffusion.log_likelihood_ordered(golden_model(case['model']), *answer(case), case['mask_id'], order,
                                             cfg_scale=case['cfg_scale'])
    assert abs(chain - case['value']) < max(1e-4, 5e-5 * abs(case['value']))            # the same sum, along that order


@pytest.mark.parametrize('case', golden('greedy_check.json'))
def test_greedy_check(case):
    P, L = len(case['prompt_ids']), len(case['answer_ids'])
    x = torch.tensor([case['prompt_ids'] + [case['mask_id']] * L])
    out = diffusion.generate(golden_model(case['model']), x, case['mask_id'], steps=L, cfg_scale=case['cfg_scale'])
    assert (out.x[0, P:].tolist() == case['answer_ids']) == case['is_greedy']


@pytest.mark.parametrize('case', golden('loss.json'))
def test_loss_and_gradients(case):
    model = golden_model(case['model'])
    model.zero_grad()
    x0, masked, t = torch.tensor(case['input_ids']), torch.tensor(case['mask']).bool(), torch.tensor(case['p_mask'])
    maskable = torch.ones_like(masked)
    if case['kind'] == 'sft':
        maskable = torch.arange(x0.shape[1]) >= torch.tensor(case['prompt_lengths'])[:, None]
        masked = masked & maskable
    loss = diffusion.diffusion_loss(model, x0, maskable, case['mask_id'], t=t, masked=masked,
                                    per='sequence' if case['kind'] == 'sft' else 'token')
    if case.get('quirk') == 'natural_mask_in_prompt':               # trap 19: the official code trains on it, we do not
        assert math.isfinite(loss) and loss < case['expected_loss']
        return
    assert abs(loss.item() - case['expected_loss']) < 1e-5 * abs(case['expected_loss'])
    if case.get('grad_norms'):
        loss.backward()
        names = release_names('illada' if case['model'].startswith('illada') else 'llada', model.config)
        for ours, theirs in names.items():
            norm = model.get_parameter(ours).grad.norm().item()
            assert abs(norm - case['grad_norms'][theirs]) <= 1e-3 * case['grad_norms'][theirs] + 1e-7, ours
