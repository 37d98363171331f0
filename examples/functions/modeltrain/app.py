"""Training with scikit-learn: review sentiment by logistic regression.

`size` is the number of generated reviews, three quarters to train on and the
rest to be judged. A fixed benchmark corpus, vectorised at import, scores the
new model against the one trained on it.
"""

import hashlib

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split

DEFAULT_SIZE = 240
MAX_SIZE = 20_000
DECIMALS = 5

SYLLABLES = np.array([c + v for c in "bcdfghklmnprstvz" for v in "aeiou"])


def _words():
    rng = np.random.default_rng(2022)
    words = {"".join(rng.choice(SYLLABLES, size=rng.integers(2, 5))): None for _ in range(1_500)}
    return np.array(list(words))


WORDS = _words()
# Which words speak for a good review (positive) or a bad one (negative).
LEANING = np.random.default_rng(7).normal(0, 0.6, size=len(WORDS))


def generate(rng, count):
    """(texts, labels): the words of a review lean the way of its label."""
    labels = rng.permutation(np.arange(count) % 2)
    base = 1.0 / np.arange(1, len(WORDS) + 1)
    texts = []
    for label in labels:
        weight = base * np.exp(LEANING if label else -LEANING)
        texts.append(" ".join(rng.choice(WORDS, p=weight / weight.sum(), size=30)))
    return texts, labels


def new_model():
    return LogisticRegression(C=4.0, max_iter=200, tol=1e-6, random_state=0)


BENCHMARK_TEXTS, BENCHMARK_LABELS = generate(np.random.default_rng(2022), 800)
VECTORIZER = TfidfVectorizer(ngram_range=(1, 2), max_features=3_000)
BENCHMARK = VECTORIZER.fit_transform(BENCHMARK_TEXTS)
REFERENCE = new_model().fit(BENCHMARK, BENCHMARK_LABELS)


def handler(event, context):
    seed = int(event.get("seed", 0))
    size = int(event.get("size", DEFAULT_SIZE))
    if seed < 0:
        raise ValueError(f"seed must not be negative, but is {seed}")
    if not 16 <= size <= MAX_SIZE:
        raise ValueError(f"size must be 16 to {MAX_SIZE}, not {size}")

    texts, labels = generate(np.random.default_rng(seed), size)
    train_texts, test_texts, train_labels, test_labels = train_test_split(
        texts, labels, test_size=0.25, random_state=seed % 2**32, stratify=labels
    )
    model = new_model().fit(VECTORIZER.transform(train_texts), train_labels)
    test = VECTORIZER.transform(test_texts)
    predicted = model.predict(BENCHMARK)
    return {
        "reviews": size,
        "iterations": int(model.n_iter_[0]),
        "accuracy": round(float(model.score(test, test_labels)), DECIMALS),
        "log_loss": round(
            float(log_loss(test_labels, model.predict_proba(test), labels=[0, 1])), DECIMALS
        ),
        "benchmark_accuracy": round(float((predicted == BENCHMARK_LABELS).mean()), DECIMALS),
        "agrees_with_reference": round(
            float((predicted == REFERENCE.predict(BENCHMARK)).mean()), DECIMALS
        ),
        "weights_sha256": hashlib.sha256(
            (np.round(model.coef_, DECIMALS) + 0.0).tobytes()
        ).hexdigest(),
    }
