"""Masked diffusion on one page: train a small LLaDA for two minutes, then watch it write.

    python tests/exercises/mini_llada.py

Hide some words of a text, and let a network guess them. That is all the training there is. To write a text, begin
with masks only and let the same network guess, one word after the other, in any order. You need torch and nothing
else. Each of the five parts names its grown-up place in this project, which also has tokenizers, prompts, caches
and many GPUs. DERIVATION.md beside this file says why it works.

Letters: B texts, T words of a text, V words of the vocabulary, C channels, H attention heads.
"""

import ast
import re
from collections import Counter
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

T, C, H, LAYERS = 10, 64, 4, 4
MASK, END = 0, 1                # the token that hides a word, and the one that fills up a short text

# ----------------------------------------------------------------------------------------------------------
# 1. Data. A text is the first line of a docstring, a token is a word.          data.py: docs_text, Tokenizer


def first_lines():
    """Return the first lines of the docstrings that come with Python, each once, as lists of words."""
    library = Path(ast.__file__).parent
    lines = {}
    for file in sorted([*library.glob('*.py'), *library.glob('*/*.py')]):
        if file.parent.name in ('test', 'site-packages'):
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                line = (ast.get_docstring(node) or '').lower().partition('\n')[0].rstrip('.')
                if re.fullmatch("[a-z' -]+", line):
                    lines[line] = line.split()
    return list(lines.values())


def tokenize(texts):
    """Replace words by numbers: texts, lists of words -> x0 (N, T) int64, vocabulary (a list of V words)."""
    count = Counter(word for text in texts for word in text)
    # a word that is seen four times cannot be learned in two minutes
    texts = [text for text in texts if 3 <= len(text) <= T and min(count[word] for word in text) >= 5]
    vocabulary = ['░░░', '·', *sorted({word for text in texts for word in text})]
    number = {word: i for i, word in enumerate(vocabulary)}
    rows = [[number[word] for word in text] + [END] * (T - len(text)) for text in texts]
    return torch.tensor(rows), vocabulary


# ----------------------------------------------------------------------------------------------------------
# 2. The network. It guesses all words at once: logit i is about word i.                model.py: Transformer


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm, self.ff_norm = nn.RMSNorm(C), nn.RMSNorm(C)
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.out = nn.Linear(C, C, bias=False)
        self.ff = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))

    def forward(self, x):
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3 * H, C // H))
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=1)                       # (B, H, T, C / H) each
        # every word looks at every other one, on both sides: there is no causal mask
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.ff(self.ff_norm(x))


class Transformer(nn.Module):
    def __init__(self, V):
        super().__init__()
        self.words = nn.Embedding(V, C)
        self.positions = nn.Embedding(T, C)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.head = nn.Sequential(nn.RMSNorm(C), nn.Linear(C, V, bias=False))

    def forward(self, ids):
        # it is not told how many words are hidden, because it can count the masks
        x = self.words(ids) + self.positions.weight                         # (B, T, C)
        return self.head(self.blocks(x))                                    # (B, T, V)


# ----------------------------------------------------------------------------------------------------------
# 3. The loss, Eq. 3 of LLaDA.                                  diffusion.py: forward_process, diffusion_loss


def loss_of(model, x0, t, u):
    """Return the loss in nats per word: texts x0 (B, T), mask ratios t (B,), uniform noise u (B, T) -> ()."""
    # hide each word with probability t
    masked = u < t[:, None]                                                 # (B, T)
    logits = model(torch.where(masked, MASK, x0))                           # (B, T, V)
    cross_entropy = F.cross_entropy(logits.transpose(1, 2), x0, reduction='none')
    # only hidden words count, but the mean is over all B T words, and 1/t makes up for that
    return torch.where(masked, cross_entropy / t[:, None], 0).mean()


# ----------------------------------------------------------------------------------------------------------
# 4. Training.                                                          train.py: micro_batches, train_step


def train(model, x0, updates=1600, B=64):
    """Train the model on texts x0 (N, T), and print the mean loss of every 200 updates."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=updates)
    losses = []
    for update in range(1, updates + 1):
        batch = x0[torch.randint(len(x0), (B,))]
        # each text has its own t: some are almost complete, and of others hardly a word is left
        loss = loss_of(model, batch, t=1 - torch.rand(B), u=torch.rand(B, T))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if update % 200 == 0:
            print(f'update {update:4}: loss {sum(losses[-200:]) / 200:.2f} nats per word')


# ----------------------------------------------------------------------------------------------------------
# 5. Writing, one word per text and step.                             diffusion.py: generate_simple, generate


@torch.no_grad()
def fill(model, x, temperature=0., watch=None):
    """Fill the masks of x (B, T) -> (B, T). watch: a function that is called with x after each step.

    With temperature 0 it keeps the guess that the model is most confident of (Alg. 5). Otherwise it draws the
    guesses and keeps one at random (Alg. 4). At temperature 1, that samples exactly what the model has learned.
    """
    while (x == MASK).any():
        masked = x == MASK
        probability = model(x).softmax(-1)                                  # (B, T, V)
        probability[..., MASK] = 0
        if temperature == 0:
            confidence, guess = probability.max(-1)
        else:
            sharper = probability.flatten(0, 1) ** (1 / temperature)
            guess = sharper.multinomial(1).view(x.shape)
            confidence = torch.rand(x.shape)
        # keep one guess of each text, forget the others, and look again
        best = torch.where(masked, confidence, -1).argmax(1, keepdim=True)
        keep = torch.zeros_like(masked).scatter(1, best, True) & masked
        x = torch.where(keep, guess, x)
        if watch is not None:
            watch(x)
    return x


def to_text(ids, vocabulary):
    """Return ids (T,) as words with blanks between them."""
    return ' '.join(vocabulary[i] for i in ids).rstrip(' ·')


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x0, vocabulary = tokenize(first_lines())
    print(f'{len(x0)} texts of {len(vocabulary)} words, such as "{to_text(x0[9], vocabulary)}"')
    model = Transformer(len(vocabulary))
    train(model, x0)

    print('\nfrom masks to a text')
    masks = torch.full((12, T), MASK)
    texts = fill(model, masks, temperature=0.7, watch=lambda x: print(*(vocabulary[i] for i in x[0])))
    print('\nmore texts')
    for ids in texts:
        print(to_text(ids, vocabulary))

    print('\nwhat fits in here?')
    for gaps in ('return the ░░░ of the ░░░', '░░░ ░░░ file', 'return true if ░░░ ░░░ ░░░'):
        ids = [vocabulary.index(word) for word in gaps.split()]
        x = torch.tensor([ids + [END] * (T - len(ids))])
        print(gaps, '->', to_text(fill(model, x)[0], vocabulary))


if __name__ == '__main__':
    main()
