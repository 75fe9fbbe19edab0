"""What several tests share: the table model, the golden vectors, small models and small data."""

import json
import runpy
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import worlds

import data
import model as M

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / 'golden'
V, T, MASK = 3, 3, 3                                    # the table: 27 sequences of 3 tokens, and one id for [MASK]


def table_model(seed=0):
    """A joint distribution over V^T sequences and its exact mask predictor, in float64: -> (p (V, .., V), model)."""
    p = torch.rand((V,) * T, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) ** 3
    p = p / p.sum()
    sequences = torch.tensor(list(product(range(V), repeat=T)))                         # (27, T)
    weight = p.flatten()

    def model(ids):
        agrees = ((ids[:, None] == sequences) | (ids[:, None] == MASK)).all(-1)         # (B, 27)
        posterior = agrees * weight
        onehot = torch.nn.functional.one_hot(sequences, V + 1).double()                 # (27, T, V + 1)
        marginal = torch.einsum('bs,stv->btv', posterior, onehot) / posterior.sum(1)[:, None, None]
        return marginal.log()                                                           # -inf for [MASK]

    return p, model


def read_safetensors(path):
    """The tensors of a small trusted file: 8 bytes of header length, a JSON header, then the data."""
    raw = Path(path).read_bytes()
    n = int.from_bytes(raw[:8], 'little')
    kinds = {'F32': np.float32, 'I32': np.int32}
    out = {}
    for name, entry in json.loads(raw[8:8 + n]).items():
        if name != '__metadata__':
            a, b = entry['data_offsets']
            array = np.frombuffer(raw[8 + n + a:8 + n + b], dtype=kinds[entry['dtype']]).reshape(entry['shape'])
            out[name] = torch.from_numpy(array.copy())
    return out


def golden(name):
    """The cases of one golden file, as pytest parameters."""
    cases = json.loads((GOLDEN / name).read_text())['cases']
    return [pytest.param(c, id=c.get('id', f"{c.get('mask_num')}-{c.get('steps')}")) for c in cases]


_models = {}


def golden_model(name):
    """A golden model, by our table of names but without the safetensors package (test_release.py has the real door)."""
    if name not in _models:
        folder = GOLDEN / 'models' / name
        kind, config, _ = M.release_config(folder)
        tensors = read_safetensors(folder / 'model.safetensors')
        _models[name] = M.release_model(folder, kind, config, tensors).eval()
    return _models[name]


def tiny_model(seed=0, **changes):
    """A small random Transformer in float32."""
    shape = dict(vocab_size=40, seq_len=16, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48)
    return M.init_weights(M.Transformer(M.ModelConfig(**{**shape, **changes})), seed, emb_std=1.0)


def small_corpus(folder, n_documents=40, tokenizer='bytes'):
    """A few kB of seeded words, prepared into `folder`."""
    rng = np.random.default_rng(0)
    words = ['mask', 'token', 'noise', 'step', 'the', 'a', 'model', 'fills', 'in', 'text', 'again']
    documents = [(f'd{i}', {'text': ' '.join(rng.choice(words, 120)) + '\n'}) for i in range(n_documents)]
    data.prepare([documents], folder, tokenizer)
    return folder


def write_worlds(folder):
    """Small sets of the lab: world, instruct, facts."""
    worlds.words_of_the_world(folder.parent / 'words.json')
    for name, records in (('world', worlds.stories(300)), ('instruct', worlds.dialogues(150))):
        worlds.write(records, folder / name, folder.parent / 'words.json')
    worlds.write([fact for fact in worlds.facts(8) if fact['seen']], folder / 'facts', 'bytes', by_heart=True)


def script(name, *argv):
    """Runs a script as the command line would, in this process."""
    before = sys.argv
    sys.argv = [f'{name}.py', *map(str, argv)]
    try:
        runpy.run_path(str(ROOT / f'{name}.py'), run_name='__main__')
    finally:
        sys.argv = before
