"""Extras for sample.generate_text: the end of a thought (iLLaDA), and gaps of unknown length.

    python tests/lab/hooks.py gaps out/docs --prompt="If the file ___ exist"       # tries 1 to 8 tokens
    python tests/lab/hooks.py lm_eval iLLaDA-8B-Instruct config/eval/illada_instruct_mbpp.py

The second is evaluate.py (also: exact) with a "</think>" that becomes more and more likely. iLLaDA's
evaluation does that for reasoning tasks, as read in forks of the official repository. All other settings are
those of sample.py and evaluate.py.
"""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

LAB = Path(__file__).resolve().parent
sys.path[:0] = [str(LAB.parents[1]), str(LAB.parent)]

import command  # noqa: E402

import diffusion  # noqa: E402
import evaluate  # noqa: E402
import sample  # noqa: E402
from configurator import UserError  # noqa: E402

task = 'gaps'                   # gaps, or a task of evaluate.py that writes answers: exact or lm_eval
think_boost = 100.0             # what "</think>" gains at the end of gen_length
think_power = 3.0               # how late that sets in

TASKS = ('gaps', 'exact', 'lm_eval')

# ----------------------------------------------------------------------------------------------------------
# The end of a thought


def end_think(begin, gen_length, ids, boost=100.0, power=3.0):
    """Return an `adjust` that makes the tokens `ids` of "</think>" ever more likely, until a row has them.

    The next of them gains boost * progress^power in the logits of the first mask of a row. progress says how
    far this position lies into the gen_length columns after the prompt, which ends at column `begin`.
    """
    def adjust(logits, x, masked):
        logits = logits.clone()
        rows = x[:, begin:].tolist()
        holes = masked[:, begin:].tolist()
        first = 0                                           # where the logits of the row begin

        for row, hidden in zip(rows, holes):
            if any(hidden) and not contains(row, ids):
                position = hidden.index(True)
                token = ids[n_begun(row[:position], ids)]
                progress = min(1.0, (position + 1) / gen_length)
                logits[first, token] += boost * progress ** power
            first += sum(hidden)
        return logits

    return adjust


def contains(row, ids):
    """Tell whether a list of ids contains another one."""
    return any(row[k:k + len(ids)] == ids for k in range(len(row)))


def n_begun(row, ids):
    """Return with how many of the first ids a row ends.

    >>> n_begun([5, 7, 8], [7, 8, 9])
    2
    """
    return max(k for k in range(len(ids)) if row[len(row) - k:] == ids[:k])


def generate_with_end_think(model, prompts, gen_length, tok, params,
                            *, seeds, boost=100.0, power=3.0, batch_size=1,
                            generate=sample.generate_text, **options):
    """Do what sample.generate_text does, with end_think. (One by one: prompts end at different columns.)"""
    ids = tok.encode('</think>')
    rows = []
    n_forward = 0
    for prompt, seed in zip(prompts, seeds):
        hook = end_think(len(prompt), gen_length, ids, boost, power)
        (row,), n = generate(model, [prompt], gen_length, tok, params, seeds=[seed], adjust=hook, **options)
        rows.append(row)
        n_forward += n
    return rows, n_forward


# ----------------------------------------------------------------------------------------------------------
# Gaps of unknown length


def infill_score(model, prompt, filled, mask_id, *, neighbours=2, mc_num=64, seed=0):
    """Score an infill, both lists of ids: its bound on log p in nats per token -> float.

    The likelihood of a filling by itself hardly depends on whether its length is right, so `neighbours`
    tokens on each side are scored as well. A wrong length shows there.
    """
    device = diffusion.device_of(model)
    gap = [i for i, token in enumerate(prompt) if token == mask_id]
    scored = torch.zeros(len(prompt), dtype=torch.bool, device=device)
    for i in gap:
        scored[max(0, i - neighbours):i + neighbours + 1] = True
    logp = diffusion.log_likelihood(
        model, torch.tensor(filled, device=device), scored, mask_id, mc_num=mc_num,
        generator=diffusion.keyed_generator(seed))
    return logp / int(scored.sum())


def fill_gaps(run, prompt, cfg, lengths=range(1, 9)):
    """Fill the ___ of a text with each number of tokens -> [(score, prompt ids, filled ids)], best first."""
    tried = []
    for n in lengths:
        ids = sample.encode_prompt(prompt, run, SimpleNamespace(**{**vars(cfg), 'gap_length': n}))
        if len(ids) <= run.model.config.seq_len:
            tried.append(ids)
    if not tried or run.tok.mask_id not in tried[0]:
        raise UserError(f'{prompt!r} has no ___, or does not fit into the context')

    params = sample.sampling_params(cfg, 0)
    seeds = [(cfg.seed, 0)] * len(tried)
    filled, _ = sample.generate_text(run.model, tried, 0, run.tok, params, seeds=seeds)
    found = []
    for ids, row in zip(tried, filled):
        found.append((infill_score(run.model, ids, row, run.tok.mask_id, seed=cfg.seed), ids, row))
    return sorted(found, reverse=True)


def gaps(cfg):
    """Print the fillings of each prompt with their scores, best first."""
    if not cfg.checkpoints or not cfg.prompt:
        raise UserError('expected a checkpoint and a gap:  gaps out/docs --prompt="If the file ___ exist"')
    for name in cfg.checkpoints:
        run = sample.load(name, cfg)
        if run.model.config.causal:
            raise UserError(f'{name}: an autoregressive model cannot fill a ___')
        for prompt in cfg.prompt:
            print(prompt)
            for score, ids, row in fill_gaps(run, prompt, cfg):
                text = run.tok.decode(row, skip_special_tokens=True)
                print(f'{score:8.3f} nats per token, {ids.count(run.tok.mask_id)} tokens: {text!r}')


ALLOWED = {}                    # not those of evaluate.py


def main(cfg):
    if cfg.task not in TASKS:
        raise UserError(f'task must be one of {", ".join(TASKS)}, got {cfg.task!r}')
    if cfg.task == 'gaps':
        gaps(cfg)
        return
    # evaluate.py gets its answers from there
    sample.generate_text = partial(generate_with_end_think, boost=cfg.think_boost, power=cfg.think_power)
    evaluate.main(cfg)


if __name__ == '__main__':
    command.run(main, globals(), evaluate, sample, positional=('task', 'checkpoints'))
