"""What several tests share: the table model, the golden vectors, small models and small data."""

import functools
import json
import runpy
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

import data
import diffusion
import model as models
from configurator import configure

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / 'golden'
GOLDEN_MODELS = ('llada_mha', 'llada_gqa_tied', 'illada_gqa')
V, T, MASK = 3, 3, 3                # the table: 27 sequences of 3 tokens, and one more id for [MASK]


def seeded(seed):
    """Return a torch.Generator."""
    return torch.Generator().manual_seed(seed)


def table_model(seed=0):
    """Make a joint distribution over V^T sequences -> p (V, V, V) float64, and its exact mask predictor."""
    p = torch.rand((V,) * T, dtype=torch.float64, generator=seeded(seed)) ** 3
    p = p / p.sum()
    sequences = torch.tensor(list(product(range(V), repeat=T)))                         # (27, T)
    onehot = torch.nn.functional.one_hot(sequences, V + 1).double()                     # (27, T, V + 1)

    def logits(ids):
        agrees = ((ids[:, None] == sequences) | (ids[:, None] == MASK)).all(-1)         # (B, 27)
        posterior = agrees * p.flatten()
        posterior = posterior / posterior.sum(1, keepdim=True)
        return torch.einsum('bs,stv->btv', posterior, onehot).log()                     # -inf for [MASK]

    return p, diffusion.plain(logits)


def read_golden(name):
    """Return one golden file."""
    return json.loads((GOLDEN / name).read_text(encoding='utf-8'))


def golden(name):
    """Parametrize a test by the cases of one golden file, as its argument `case`."""
    return pytest.mark.parametrize('case', read_golden(name)['cases'], ids=lambda case: case['id'])


@functools.cache
def golden_model(name):
    """Return a golden model. It is shared by the tests, so do not change it."""
    return models.load_model(GOLDEN / 'models' / name)[0]


def tiny_model(seed=0, **changes):
    """Make a small random Transformer in float32 and eval mode."""
    shape = dict(vocab_size=40, seq_len=16, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48)
    model = models.Transformer(models.ModelConfig(**{**shape, **changes}))
    return models.init_weights(model, seed, emb_std=1.0).eval()


def checkpoint(folder, masking=None, dataset='none', **changes):
    """Write a small random model and the tokenizer of bytes -> folder. masking: as if by train.py.

    The head has three rows that stand for no token. LLaDA's has such rows, too.
    """
    tok = data.get_tokenizer('bytes')
    model = tiny_model(**{'vocab_size': tok.vocab_size + 3, 'seq_len': 96, **changes})
    ids = {f'{role}_id': getattr(tok, f'{role}_id') for role in models.ROLES}
    models.save_model(model, folder, ids)
    tok.save(folder)
    if masking:
        state = {'iteration': 2, 'settings': {'masking': masking, 'dataset': str(dataset)}}
        (folder / 'state.json').write_text(json.dumps(state))
    return folder


def read_tensors(path):
    """Return the tensors of a safetensors file, by name."""
    return safetensors.torch.load_file(path)


def small_corpus(folder, n_documents=40, tokenizer='bytes'):
    """Prepare a few kB of random words as a data set in `folder`."""
    rng = np.random.default_rng(0)
    words = ['mask', 'token', 'noise', 'step', 'the', 'a', 'model', 'fills', 'in', 'text', 'again']
    documents = [(f'd{i}', {'text': ' '.join(rng.choice(words, 120)) + '\n'}) for i in range(n_documents)]
    data.prepare([documents], folder, tokenizer)
    return folder


def write_worlds(folder):
    """Prepare small data sets of the lab: world, instruct, facts."""
    import worlds
    worlds.words_of_the_world(folder.parent / 'words.json')
    for name, records in (('world', worlds.stories(300)), ('instruct', worlds.dialogues(150))):
        worlds.write(records, folder / name, folder.parent / 'words.json')
    worlds.write([fact for fact in worlds.facts(8) if fact['seen']], folder / 'facts', 'bytes', by_heart=True)


def settings_of(module, **changes):
    """Return the settings of a script as its main gets them, with some changes."""
    return SimpleNamespace(**{**configure(dict(vars(module)), []), **changes})


def script(name, *argv):
    """Run a script as the command line would, in this process."""
    before = sys.argv
    sys.argv = [f'{name}.py', *map(str, argv)]
    try:
        runpy.run_path(str(ROOT / f'{name}.py'), run_name='__main__')
    finally:
        sys.argv = before


def refused(capsys, name, *argv):
    """Run a script that must end with exit code 2 -> the one line that it prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        script(name, *argv)
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == '' and len(said.err.splitlines()) == 1, said
    return said.err
