"""Text from a recurrent network: two LSTM layers served by ONNX Runtime.

A character model writes `size` characters after a prompt that the seed
chooses. Its weights are drawn at import from a fixed seed: what it writes is
gibberish, what it costs is what a trained model of this shape costs.
"""

import hashlib

import numpy as np
import onnxruntime

import onnx_writer as onnx

DEFAULT_SIZE = 64
MAX_SIZE = 20_000

ALPHABET = "abcdefghijklmnopqrstuvwxyz .,'-\n"
EMBEDDING = 128
HIDDEN = 384
LAYERS = 2
TEMPERATURE = 0.8
PROMPTS = ["the ", "once upon", "dear sir, ", "in short, ", "nobody", "as it was"]


def build():
    """One step of the network, character and state in, logits and state out."""
    rng = np.random.default_rng(2022)

    def weights(*shape, scale):
        return rng.uniform(-scale, scale, size=shape).astype(np.float32)

    bound = 1.0 / np.sqrt(HIDDEN)
    state = (1, 1, HIDDEN)
    initializers = [
        onnx.tensor("embedding", weights(len(ALPHABET), EMBEDDING, scale=1.0)),
        # Wide output weights: a trained model is far from indifferent.
        onnx.tensor("output_w", weights(HIDDEN, len(ALPHABET), scale=40 * bound)),
        onnx.tensor("output_b", weights(len(ALPHABET), scale=1.0)),
        onnx.tensor("batch", np.array([1, HIDDEN], dtype=np.int64)),
    ]
    inputs = [onnx.value_info("character", onnx.INT64, (1, 1))]
    outputs = [onnx.value_info("logits", onnx.FLOAT, (1, len(ALPHABET)))]
    nodes = [onnx.node("Gather", ["embedding", "character"], ["x0"])]
    width = EMBEDDING
    for i in range(LAYERS):
        initializers += [
            onnx.tensor(f"w{i}", weights(1, 4 * HIDDEN, width, scale=4 * bound)),
            onnx.tensor(f"r{i}", weights(1, 4 * HIDDEN, HIDDEN, scale=2 * bound)),
            onnx.tensor(f"b{i}", weights(1, 8 * HIDDEN, scale=bound)),
        ]
        for part in "hc":
            inputs.append(onnx.value_info(f"{part}{i}", onnx.FLOAT, state))
            outputs.append(onnx.value_info(f"{part}{i}_next", onnx.FLOAT, state))
        nodes += [
            onnx.node(
                "LSTM",
                [f"x{i}", f"w{i}", f"r{i}", f"b{i}", "", f"h{i}", f"c{i}"],
                [f"y{i}", f"h{i}_next", f"c{i}_next"],
                hidden_size=HIDDEN,
            ),
            # (sequence, direction, batch, hidden) back to (sequence, batch, hidden).
            onnx.node("Squeeze", [f"y{i}", "direction"], [f"x{i + 1}"]),
        ]
        width = HIDDEN
    initializers.append(onnx.tensor("direction", np.array([1], dtype=np.int64)))
    nodes += [
        onnx.node("Reshape", [f"x{LAYERS}", "batch"], ["last"]),
        onnx.node("Gemm", ["last", "output_w", "output_b"], ["logits"]),
    ]
    return onnx.model("characters", nodes, initializers, inputs, outputs)


def load():
    options = onnxruntime.SessionOptions()
    # ONNX Runtime starts a thread per core unless told not to.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(build(), options, providers=["CPUExecutionProvider"])


SESSION = load()
INPUTS = [item.name for item in SESSION.get_inputs()]
STATES = [name for name in INPUTS if name != "character"]
OUTPUTS = ["logits"] + [f"{name}_next" for name in STATES]


def step(character, states):
    feed = dict(zip(STATES, states))
    feed["character"] = np.array([[character]], dtype=np.int64)
    logits, *states = SESSION.run(OUTPUTS, feed)
    return logits[0].astype(np.float64), states


def handler(event, context):
    seed = int(event.get("seed", 0))
    size = int(event.get("size", DEFAULT_SIZE))
    if seed < 0:
        raise ValueError(f"seed must not be negative, but is {seed}")
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"size must be 1 to {MAX_SIZE}, not {size}")

    rng = np.random.default_rng(seed)
    prompt = PROMPTS[int(rng.integers(len(PROMPTS)))]
    states = [np.zeros((1, 1, HIDDEN), dtype=np.float32) for _ in STATES]
    for character in prompt:
        logits, states = step(ALPHABET.index(character), states)

    text = []
    log_likelihood = 0.0
    for _ in range(size):
        scaled = logits / TEMPERATURE
        scaled -= scaled.max()
        probability = np.exp(scaled)
        probability /= probability.sum()
        chosen = int(np.searchsorted(np.cumsum(probability), rng.random()))
        chosen = min(chosen, len(ALPHABET) - 1)
        log_likelihood += float(np.log(probability[chosen]))
        text.append(ALPHABET[chosen])
        logits, states = step(chosen, states)

    written = "".join(text)
    return {
        "prompt": prompt,
        "text": written[:80],
        "perplexity": round(float(np.exp(-log_likelihood / size)), 4),
        "sha256": hashlib.sha256((prompt + written).encode()).hexdigest(),
    }
