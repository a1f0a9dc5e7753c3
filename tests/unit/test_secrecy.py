"""Secrets of the environment and of well-known forms are taken out; nothing else is touched."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keel.config import TrainConfig
from keel.config_load import dump
from keel.secrecy import SecretError, refuse_secrets, scrubbed, scrubbed_values

PLANTED = {
    "OPENAI_API_KEY": "planted-Zq4v8Lr2-key",
    "HF_TOKEN": "plain_word_but_a_token_7",
    "DB_PASSWORD": 'quote"and\\slash-9é',
    "SERVICE_SECRET": "/no/such/path/9a8b7c",
    "GITHUB_PAT": "1234567890abcdef1234",
}
FORMS = [
    "hf_" + "aB3" * 10,
    "sk-" + "proj-Ab1_" * 5,
    "ghp_" + "x1" * 18,
    "AKIA" + "ABCDEFGH12345678",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----",
]


@pytest.fixture
def planted(monkeypatch):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("name", PLANTED)
def test_values_of_secret_variables_are_taken_out(planted, name):
    value = PLANTED[name]
    assert scrubbed(f"before {value} after") == f"before [secret {name}] after"
    text = json.dumps({"error": f"401 for {value}"})
    assert json.loads(scrubbed(text)) == {"error": f"401 for [secret {name}]"}
    nested = scrubbed_values({"a": [{value: value}], "n": 1, "t": (value,)})
    assert nested == {"a": [{f"[secret {name}]": f"[secret {name}]"}], "n": 1, "t": [f"[secret {name}]"]}


@pytest.mark.parametrize("text", FORMS)
def test_keys_of_well_known_forms_are_taken_out(text):
    assert scrubbed(f"x={text};") == "x=[secret];"


def test_passwords_in_addresses_and_headers():
    assert scrubbed("GET https://me:pa55@host/x") == "GET https://[secret]@host/x"
    assert scrubbed("Authorization: Bearer abcdef0123456789xyz") == "Authorization: Bearer [secret]"


def test_the_token_that_the_hub_keeps(monkeypatch, tmp_path):
    (tmp_path / "token").write_text("not-of-the-usual-form-77\n")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    assert scrubbed("x not-of-the-usual-form-77 x") == "x [secret HF_TOKEN] x"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAX_TOKEN", "12345678"),
        ("SORT_KEY", "reinforcement"),
        ("GROUP_KEY", "group_id"),
        ("SSH_AUTH_SOCK", "/run/agent.1234"),
        ("API_KEY_FILE", "keys/first-1.txt"),
        ("API_KEY", "short1"),
        ("KEYBOARD", "something-12345"),
        ("TOKENIZERS_PARALLELISM", "something-12345"),
        ("HOME_PWD", "/tmp"),
    ],
)
def test_what_is_no_secret_stays(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert scrubbed(f"a {value} b") == f"a {value} b"


@given(st.text())
def test_ordinary_text_stays(text):
    assert scrubbed(text) == text or "secret" in scrubbed(text)


def test_the_default_config_passes_unchanged():
    config = TrainConfig()
    refuse_secrets(config.model_dump(mode="json"))
    assert scrubbed(dump(config)) == dump(config)


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"api_key": "a1b2c3d4e5"}, True),
        ({"nested": {"password": "correct-horse-1"}}, True),
        ({"anything": FORMS[0]}, True),
        ({"url": "https://me:pa55word@host/"}, True),
        ({"copied": PLANTED["OPENAI_API_KEY"]}, True),
        ({"api_key": ""}, False),
        ({"api_key": "OPENAI_API_KEY"}, False),
        ({"api_key_env": "my-variable-1"}, False),
        (
            {"pad_token": "<|endoftext|>", "stop_token": "</s>", "max_tokens": 77, "answer_key": "answer_column_1"},
            False,
        ),
    ],
)
def test_a_config_holds_no_secret(planted, options, refused):
    config = TrainConfig.model_validate({"env": {"options": options}}).model_dump(mode="json")
    if not refused:
        refuse_secrets(config)
        return
    with pytest.raises(SecretError, match=r"env\.options\.\S+ looks like a secret") as caught:
        refuse_secrets(config)
    assert not any(str(value) in str(caught.value) for value in options.values())


def test_a_config_is_never_changed_in_silence(planted):
    """What is written is read again by a resumed run: a name that would be taken out is refused as a value is."""
    value = PLANTED["OPENAI_API_KEY"]
    refuse_secrets({"env": {"options": {"rows": ["a", "b"], "limits": {"x": 1}}}})
    with pytest.raises(SecretError, match="name of an option") as caught:
        refuse_secrets({"env": {"options": {value: 1}}})
    assert value not in str(caught.value)
