"""Authentication and encryption: password check, token, AES in pure Python.

A user logs in (PBKDF2), is given a signed token, and a message of `size`
bytes is sealed with AES-256-CTR and HMAC-SHA256 (encrypt, then authenticate),
opened again, and compared; a forged copy must be refused. Keys and nonces
come from the seed so that answers can be compared: never do that with real
ones.
"""

import base64
import hashlib
import hmac
import json
import random

import pyaes

DEFAULT_SIZE = 4_096
MAX_SIZE = 1_000_000
ROUNDS = 1_000
TAG_LEN = 32
NONCE_LEN = 16


def _users():
    """name: (password, salt, PBKDF2 of both), as a user database would hold."""
    rng = random.Random(2022)
    users = {}
    for i in range(32):
        password, salt = rng.randbytes(12).hex(), rng.randbytes(16)
        stored = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, ROUNDS)
        users[f"user{i}"] = (password, salt, stored)
    return users


USERS = _users()
SIGNING_KEY = hashlib.sha256(b"a key for examples only").digest()


class Refused(Exception):
    """A wrong password, signature or tag."""


def login(name, password):
    """A token `claims.signature` for the right password."""
    _, salt, stored = USERS[name]
    offered = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, ROUNDS)
    if not hmac.compare_digest(offered, stored):
        raise Refused(f"wrong password for {name}")
    claims = base64.urlsafe_b64encode(json.dumps({"sub": name}).encode()).decode()
    return f"{claims}.{hmac.new(SIGNING_KEY, claims.encode(), hashlib.sha256).hexdigest()}"


def subject(token):
    claims, _, signature = token.partition(".")
    expected = hmac.new(SIGNING_KEY, claims.encode(), hashlib.sha256).hexdigest()
    if not hmac.compare_digest(signature, expected):
        raise Refused("the token's signature is wrong")
    return json.loads(base64.urlsafe_b64decode(claims))["sub"]


def _keys(master, name):
    """Two independent keys, for the cipher and for the tag."""
    return (
        hmac.new(master, b"cipher:" + name.encode(), hashlib.sha256).digest(),
        hmac.new(master, b"tag:" + name.encode(), hashlib.sha256).digest(),
    )


def _cipher(key, nonce):
    counter = pyaes.Counter(initial_value=int.from_bytes(nonce, "big"))
    return pyaes.AESModeOfOperationCTR(key, counter=counter)


def seal(cipher_key, tag_key, nonce, message):
    body = nonce + _cipher(cipher_key, nonce).encrypt(message)
    return body + hmac.new(tag_key, body, hashlib.sha256).digest()


def unseal(cipher_key, tag_key, sealed):
    body, tag = sealed[:-TAG_LEN], sealed[-TAG_LEN:]
    if not hmac.compare_digest(tag, hmac.new(tag_key, body, hashlib.sha256).digest()):
        raise Refused("the message's tag is wrong")
    return _cipher(cipher_key, body[:NONCE_LEN]).decrypt(body[NONCE_LEN:])


def handler(event, context):
    seed = int(event.get("seed", 0))
    size = int(event.get("size", DEFAULT_SIZE))
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"size must be 1 to {MAX_SIZE}, not {size}")

    rng = random.Random(seed)
    name = f"user{rng.randrange(len(USERS))}"
    token = login(name, USERS[name][0])
    cipher_key, tag_key = _keys(rng.randbytes(32), subject(token))
    message = rng.randbytes(size)
    sealed = seal(cipher_key, tag_key, rng.randbytes(NONCE_LEN), message)

    forged = bytearray(sealed)
    forged[rng.randrange(len(forged))] ^= 1 << rng.randrange(8)
    try:
        unseal(cipher_key, tag_key, bytes(forged))
        forgery = "accepted"
    except Refused:
        forgery = "refused"
    return {
        "token": token,
        "bytes": size,
        "round_trip": unseal(cipher_key, tag_key, sealed) == message,
        "forgery": forgery,
        "sha256": hashlib.sha256(sealed).hexdigest(),
    }
