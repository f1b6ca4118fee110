"""Signatures: of manifests, Ed25519 over the file's bytes, as openssl makes and checks them (`-rawin`), in a file of
their own; of aliases, over all they say but the signature itself, in the same file, which is replaced as a whole."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

from retrieval.regular import open_regular

Sign = Callable[[bytes], bytes]


def signer(key: str) -> Sign | None:
    """What signs with a private key (PEM file without password); None for none.

    Raises: ValueError when the file is no such key.
    """
    if not key:
        return None
    serialization, ed25519, _ = _cryptography()
    try:
        private = serialization.load_pem_private_key(_read(key), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{key}: no private key that can be read (PEM, without password): {error}") from None
    if not isinstance(private, ed25519.Ed25519PrivateKey):
        raise ValueError(f"{key}: no Ed25519 key; `openssl genpkey -algorithm ed25519` makes one")
    return private.sign


def is_signed(content: bytes, signature: bytes, key: str) -> bool:
    """Whether a signature of the content is by a public key (PEM file), or by the private one that is given.

    Raises: ValueError when the file is no such key.
    """
    serialization, ed25519, wrong = _cryptography()
    try:
        pem = _read(key)
        if b"PRIVATE KEY" in pem:
            public = serialization.load_pem_private_key(pem, password=None).public_key()
        else:
            public = serialization.load_pem_public_key(pem)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{key}: no public key that can be read (PEM): {error}") from None
    if not isinstance(public, ed25519.Ed25519PublicKey):
        raise ValueError(f"{key}: no Ed25519 key; `openssl pkey -pubout` makes the public one of a private one")
    try:
        public.verify(signature, content)
    except wrong:
        return False
    return True


def with_signature(content: dict[str, Any], sign: Sign) -> dict[str, Any]:
    """JSON values with a `signature` of them: base64, over sorted keys without spaces."""
    return content | {"signature": base64.b64encode(sign(_plain(content))).decode()}


def has_signature(content: dict[str, Any], key: str) -> bool:
    """Whether the `signature` of JSON values is by a key. Raises: ValueError when the file is no key."""
    try:
        signature = base64.b64decode(content["signature"], validate=True)
    except (KeyError, TypeError, ValueError):
        signature = b""
    return is_signed(_plain(content), signature, key)


def _plain(content: dict[str, Any]) -> bytes:
    rest = {key: value for key, value in content.items() if key != "signature"}
    return json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()


def _read(key: str) -> bytes:
    with open_regular(key) as file:
        return file.read()


def _cryptography() -> tuple[Any, Any, type[Exception]]:
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise ValueError("signatures need the package cryptography: pip install 'polyconcept[sign]'") from None
    return serialization, ed25519, InvalidSignature
