"""The official implementation was run once on tiny random models. Its numbers are in golden/."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from helpers import GOLDEN, GOLDEN_MODELS, golden, golden_model, read_golden, read_tensors, seeded

import diffusion
import model as models
from diffusion import SamplingParams


@pytest.mark.parametrize('name', GOLDEN_MODELS)
def test_logits(name):
    model = golden_model(name)
    stored = read_tensors(GOLDEN / 'models' / name / 'parity.safetensors')
    for case in read_golden(f'models/{name}/parity.json')['cases']:
        ids = stored[f"{case['id']}.input_ids"].long()
        attention_mask = stored[f"{case['id']}.attention_mask"] if case['attention_mask'] else None
        with torch.no_grad():
            logits = model(ids, attention_mask=attention_mask)
        if case['logit_positions'] is not None:
            logits = logits[:, case['logit_positions']]
        torch.testing.assert_close(logits, stored[f"{case['id']}.logits"], atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------- samplers


def test_transfer_tokens():
    stored = read_golden('transfer_tokens.json')
    for case in stored['cases']:
        expected = [n for n, times in case['runs'] for _ in range(times)]
        n_masked = torch.tensor([case['mask_num']])
        assert diffusion.num_transfer_tokens(n_masked, case['steps']).tolist() == [expected]
    for case in stored['batched']:
        n_masked = torch.tensor(case['mask_nums'])
        assert diffusion.num_transfer_tokens(n_masked, case['steps']).tolist() == case['counts']


def run_sampler(case, on_step=None):
    """Call generate with the settings of a case -> ids. It must fill all masks and keep the prompt."""
    settings = dict(case['settings'])
    gen_length = settings.pop('gen_length')
    ids = case['ids']
    prompt = torch.tensor(case['prompt_ids'])
    x = F.pad(prompt, (0, gen_length), value=ids['mask'])
    attention_mask = case['attention_mask']
    if attention_mask is not None:
        attention_mask = F.pad(torch.tensor(attention_mask), (0, gen_length), value=1)
    out, _ = diffusion.generate(
        golden_model(case['model']), x, ids['mask'], SamplingParams(**settings), gen_start=prompt.shape[1],
        attention_mask=attention_mask, eos_id=ids['eos'], eot_id=ids['eot'], on_step=on_step)
    assert torch.equal(out[:, :-gen_length], prompt) and not (out == ids['mask']).any()
    return out.tolist()


@golden('sampler.json')
def test_greedy_sampler_step_by_step(case):
    frames = []
    assert run_sampler(case, lambda x, committed: frames.append(x.tolist())) == case['output_ids']
    # the official code makes a forward pass even if there is nothing left to commit
    trajectory = case['trajectory']
    assert frames == [now for before, now in zip(trajectory, trajectory[1:]) if now != before]


def mix(z):
    z = (z + 0x9E3779B97F4A7C15) % 2 ** 64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2 ** 64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2 ** 64
    return z ^ z >> 31


def hash_noise(seed, step, row, position, token):
    """Return the noise of the golden runs, which is a hash instead of a random number."""
    key = step << 48 ^ row << 40 ^ position << 24 ^ token
    return ((mix(mix(seed) ^ key) >> 11) + 0.5) / 2 ** 53


@golden('sampler_noise.json')
def test_sampler_with_given_noise(case, monkeypatch):
    steps_done = []

    def uniform(positions, n, generator):
        # random remasking draws one number per position, and the golden run calls that token 2^20
        tokens = range(n) if n > 1 else [2 ** 20]
        noise = [[hash_noise(case['noise_seed'], len(steps_done), row, position, token) for token in tokens]
                 for row, position in positions.nonzero().tolist()]
        return torch.tensor(noise, dtype=torch.float64)

    monkeypatch.setattr(diffusion, 'uniform', uniform)
    assert run_sampler(case, lambda x, committed: steps_done.append(1)) == case['output_ids']


@golden('sampler_random.json')
def test_schedule_of_random_runs(case):
    revealed = []
    run_sampler(case, lambda x, committed: revealed.append(committed.sum(1).tolist()))
    assert revealed == [counts for counts in case['revealed_per_step'] if any(counts)]


@golden('sampler_var.json')
def test_variable_length(case):
    settings = dict(case['settings'])
    steps = settings.pop('steps_per_block')
    max_length = settings.pop('max_gen_length')
    eos_id, = settings.pop('stop_ids') or [None]
    params = SamplingParams(steps=steps, **settings)
    rows, n_forward = diffusion.generate_variable_length(
        golden_model(case['model']), case['prompt_ids'][:1], case['ids']['mask'], eos_id, params,
        max_length=max_length)
    assert rows == case['output_ids']
    assert n_forward == case['blocks_generated'] * steps * (2 if params.cfg_scale else 1)


@golden('greedy_check.json')
def test_greedy_check(case):
    n_prompt = len(case['prompt_ids'])
    x = torch.tensor([case['prompt_ids'] + [case['mask_id']] * len(case['answer_ids'])])
    params = SamplingParams(cfg_scale=case['cfg_scale'])
    out = diffusion.generate(golden_model(case['model']), x, case['mask_id'], params)
    assert (out.x[0, n_prompt:].tolist() == case['answer_ids']) == case['is_greedy']


# ------------------------------------------------------------------------------------- likelihoods and losses


def question(case):
    """Return what a score takes: model, x0 (T,), maskable (T,), mask_id. The answer is maskable."""
    x0 = torch.tensor(case['prompt_ids'] + case['answer_ids'])
    maskable = torch.arange(len(x0)) >= len(case['prompt_ids'])
    return golden_model(case['model']), x0, maskable, case['mask_id']


def close(value, expected):
    return math.isclose(value, expected, abs_tol=1e-4, rel_tol=5e-5)


@golden('likelihood.json')
def test_likelihood(case):
    def estimate(mc_num, seed=0):
        options = dict(batch_size=64, cfg_scale=case['cfg_scale'], generator=seeded(seed))
        return diffusion.log_likelihood(*question(case), mc_num=mc_num, **options)

    n_masks = 2 ** len(case['answer_ids']) - 1
    exact = case['exact_log_likelihood']
    assert close(estimate(n_masks), exact)                  # over all masks there is no noise

    if n_masks > 14:
        draws = torch.tensor([estimate(14, seed) for seed in range(20)])
        standard_error = draws.std() / math.sqrt(len(draws))
        assert abs(draws.mean() - exact) < 4 * standard_error + 1e-4


@golden('likelihood_confidence.json')
def test_confidence_score(case):
    assert close(diffusion.confidence_score(*question(case), cfg_scale=case['cfg_scale']), case['value'])
    # it is the chain rule along the order that the model prefers
    if not case['cfg_scale']:
        order = [len(case['prompt_ids']) + i for i in case['reveal_order']]
        assert close(reference.log_likelihood_ordered(*question(case), order), case['value'])


@golden('loss.json')
def test_loss_and_gradients(case):
    model = golden_model(case['model'])
    x0 = torch.tensor(case['input_ids'])
    masked = torch.tensor(case['mask']).bool()
    t = torch.tensor(case['p_mask'])
    maskable = torch.ones_like(masked)
    normalize = 'token'
    if case['kind'] == 'sft':
        maskable = torch.arange(x0.shape[1]) >= torch.tensor(case['prompt_lengths'])[:, None]
        masked = masked & maskable
        normalize = 'sequence'

    xt = torch.where(masked, case['mask_id'], x0)
    weights = diffusion.loss_weights(maskable, masked, t, normalize=normalize)
    loss = diffusion.diffusion_loss(model, diffusion.masked_batch(x0, xt, masked, weights))
    assert math.isclose(loss.item(), case['expected_loss'], rel_tol=1e-5)

    parameters = models.released_parameters(model)          # by their official names
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    norms = {name: gradient.norm().item() for name, gradient in zip(parameters, gradients)}
    assert norms == pytest.approx(case['grad_norms'], rel=1e-3, abs=1e-7)
