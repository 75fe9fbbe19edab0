"""Make a small copy of a checkpoint that can be given away: bfloat16, and no state of the optimizer.

    python tests/lab/ship.py out/sft_toy --out=tests/exercises/stories

It is a folder in the released layout, with state.json, so that sample.py knows how the model was trained.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data  # noqa: E402
import model as models  # noqa: E402
from configurator import run  # noqa: E402

checkpoint = ''                 # a run of train.py, or one of its checkpoints
out = ''                        # folder to write


def main(cfg):
    model, meta = models.load_model(cfg.checkpoint, dtype=torch.bfloat16)
    models.save_model(model, cfg.out, meta)
    data.tokenizer_of(meta).save(cfg.out)

    # only what the scripts look at: paths and rates are those of a run that is not here
    settings = {name: meta['settings'][name] for name in ('masking', 'dataset', 'seed')}
    files = sorted(file.name for file in Path(cfg.out).iterdir() if file.name != 'state.json')
    sha256 = {name: models.file_sha256(Path(cfg.out, name)) for name in files}
    state = {'iteration': meta['iteration'], 'settings': settings, 'sha256': sha256}
    Path(cfg.out, 'state.json').write_text(json.dumps(state, indent=1))
    print(f'wrote {cfg.out}/, {sum(file.stat().st_size for file in Path(cfg.out).iterdir()) / 1e6:.1f} MB')


if __name__ == '__main__':
    run(main, globals(), positional=('checkpoint',))
