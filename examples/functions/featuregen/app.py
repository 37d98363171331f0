"""Feature generation: text cleaned with pandas, weighted with scikit-learn.

`size` is the number of generated support tickets. Their text becomes TF-IDF
weights under a vocabulary learnt at import, then 8 components by truncated
SVD; their other columns are encoded and aggregated with pandas.
"""

import hashlib

import numpy as np
import pandas as pd
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import StandardScaler

DEFAULT_SIZE = 150
MAX_SIZE = 50_000
DECIMALS = 6

SYLLABLES = np.array([c + v for c in "bcdfghklmnprstvz" for v in "aeiou"])
PRODUCTS = np.array(["router", "phone", "laptop", "printer", "camera"])
CHANNELS = np.array(["mail", "chat", "call"])


def _words():
    rng = np.random.default_rng(2022)
    words = {"".join(rng.choice(SYLLABLES, size=rng.integers(2, 5))): None for _ in range(2_000)}
    return np.array(list(words))


WORDS = _words()
ZIPF = 1.0 / np.arange(1, len(WORDS) + 1)
ZIPF /= ZIPF.sum()


def generate(rng, count):
    """Raw tickets: untidy text, some values missing."""
    lengths = rng.integers(8, 40, size=count)
    picked = rng.choice(WORDS, p=ZIPF, size=int(lengths.sum()))
    texts = [" ".join(words) for words in np.split(picked, np.cumsum(lengths)[:-1])]
    frame = pd.DataFrame(
        {
            "text": [
                f"  {text.upper()}!! call +{number}" if shout else f"{text}, {number}."
                for text, shout, number in zip(
                    texts, rng.random(count) < 0.3, rng.integers(1_000, 99_999, size=count)
                )
            ],
            "product": rng.choice(PRODUCTS, size=count),
            "channel": rng.choice(CHANNELS, size=count),
            "minutes": rng.gamma(2.0, 30.0, size=count),
        }
    )
    frame.loc[rng.random(count) < 0.1, "minutes"] = np.nan
    return frame


def clean(text):
    """Lower case, digits and punctuation out, single spaces."""
    return (
        text.str.lower()
        .str.replace(r"[^a-z\s]+", " ", regex=True)
        .str.replace(r"\s+", " ", regex=True)
        .str.strip()
    )


VECTORIZER = TfidfVectorizer(ngram_range=(1, 2), min_df=2, max_features=4_000, sublinear_tf=True)
REDUCER = TruncatedSVD(n_components=8, random_state=2022)
REDUCER.fit(
    VECTORIZER.fit_transform(clean(generate(np.random.default_rng(2022), 600)["text"]))
)


def handler(event, context):
    seed = int(event.get("seed", 0))
    size = int(event.get("size", DEFAULT_SIZE))
    if seed < 0:
        raise ValueError(f"seed must not be negative, but is {seed}")
    if not 2 <= size <= MAX_SIZE:
        raise ValueError(f"size must be 2 to {MAX_SIZE}, not {size}")

    tickets = generate(np.random.default_rng(seed), size)
    weights = VECTORIZER.transform(clean(tickets["text"]))
    components = REDUCER.transform(weights)

    tickets["minutes"] = tickets["minutes"].fillna(tickets["minutes"].median())
    encoded = pd.get_dummies(tickets[["product", "channel"]], dtype=float)
    numbers = StandardScaler().fit_transform(
        np.column_stack([np.log1p(tickets["minutes"]), tickets["text"].str.len()])
    )
    features = np.hstack([components, encoded.to_numpy(), numbers])

    by_product = tickets.groupby("product")["minutes"].agg(["count", "mean"])
    # Adding 0.0 turns -0.0 into 0.0: they are equal and must hash alike.
    rounded = np.round(features, DECIMALS) + 0.0
    return {
        "tickets": size,
        "features": int(features.shape[1]),
        "vocabulary": len(VECTORIZER.vocabulary_),
        "nonzero": int(weights.nnz),
        "minutes_by_product": {
            product: [int(row["count"]), round(float(row["mean"]), DECIMALS)]
            for product, row in by_product.iterrows()
        },
        "sha256": hashlib.sha256(rounded.tobytes()).hexdigest(),
    }
