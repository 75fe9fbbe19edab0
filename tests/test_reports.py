"""What people reported, each with the right behaviour."""

import signal
from types import SimpleNamespace

import pytest
import torch
from helpers import script, tiny_model

import data
import diffusion
import evaluate
import sample
import train


def overflowing(**shape):
    model = tiny_model(**shape)
    with torch.no_grad():
        model.head.weight[3] = float('nan')
    return model


def test_scores_and_samples_of_numbers_that_are_none_are_refused():
    model = overflowing()
    x0 = torch.arange(4, 12)
    maskable = x0 > 6
    canvas, _, _ = diffusion.canvas([[5, 6]], 4, mask_id=1, pad_id=0)
    params = diffusion.SamplingParams()
    twin = overflowing(causal=True)
    for call in (lambda: diffusion.ar_log_likelihood(twin, x0, maskable, bos_id=2),
                 lambda: diffusion.ar_generate(twin, canvas, 1),
                 lambda: diffusion.log_likelihood(model, x0, maskable, 1, mc_num=4),
                 lambda: diffusion.confidence_score(model, x0, maskable, 1),
                 lambda: diffusion.generate(model, canvas, 1, params)):
        with pytest.raises(FloatingPointError, match='not finite'):
            call()


@pytest.mark.parametrize('text', ['-5', '−5', '–5', '- 5', '-$5', '$-5', '−$ 5.0', '－5'])
def test_a_minus_is_a_minus_however_it_is_written(text):
    assert evaluate.value(text) == -5


def test_plus_and_currency_change_nothing():
    assert [evaluate.value(text) for text in ('+7', '$7', '7 apples', '7.')] == [7] * 4


def test_a_stop_text_that_is_empty_stops_nothing():
    tok = data.get_tokenizer('bytes')
    assert sample.answer_text(tok.encode('a b'), tok, ['', 'b']) == 'a '


def test_what_is_held_out_is_not_trained_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in 'ab':
        (tmp_path / f'{name}.txt').write_text(f'text of {name}\n' * 200)
    script('data', '--input=*.txt', '--val_input=b.txt', '--out=d', '--tokenizer=bytes')
    corpus = data.Corpus('d')
    text = corpus.tokenizer().decode(corpus.tokens['train'])
    assert 'text of a' in text and 'text of b' not in text


def test_one_beam_is_greedy_and_several_are_refused():
    harness = evaluate.Harness.__new__(evaluate.Harness)
    harness.cfg, harness.run = SimpleNamespace(stop=[], gen_length=8), None
    assert harness.sampler(num_beams=1).gen_length == 8
    with pytest.raises(evaluate.UserError, match='num_beams'):
        harness.sampler(num_beams=4)


def test_what_is_ignored_stays_ignored():
    """Under nohup a closed terminal must not end the run."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train.catch_signals()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, before[signal.SIGTERM])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_muon_leaves_matrices_that_cannot_be_divided_to_adamw(monkeypatch):
    model = tiny_model()
    cfg = SimpleNamespace(
        optimizer='muon', weight_decay=0.1, muon_lr=1e-3, learning_rate=1e-3, beta1=0.9, beta2=0.95, device='cpu')
    rows = sorted({len(p) for p in model.blocks.parameters() if p.dim() == 2})
    monkeypatch.setattr(train, 'WORLD', rows[-1])
    muon, adamw = train.make_optimizers(model, cfg)
    assert {len(p) for group in muon.param_groups for p in group['params']} == {rows[-1]}
    others = sum(len(group['params']) for group in adamw.param_groups)
    assert others + len(muon.param_groups[0]['params']) == len(list(model.parameters()))
