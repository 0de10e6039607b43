"""Secrets are found in texts and refused in configurations, and nothing else is."""

import time

import pytest

from rlsys.config import ConfigError, RunConfig
from rlsys.config.command_line import parse
from rlsys.config.secrets import redacted, refuse_secrets

PLANTED = {
    "HF_TOKEN": "planted-hub-token",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+key",
    "RAY_AUTH_TOKEN": "planted-ray-token",
    "DATABASE_PASSWORD": "planted password",
}


@pytest.mark.parametrize("value", PLANTED.values())
def test_a_secret_of_the_environment_is_hidden(value: str):
    assert redacted(f"GET /?a={value}: refused {value!r}", PLANTED) == "GET /?a=***: refused '***'"


def test_a_secret_is_hidden_as_part_of_a_url():
    assert redacted("http://host/planted%2Fsecret%2Bkey", PLANTED) == "http://host/***"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("s3://user:pass@host/bucket", "s3://***@host/bucket"),
        ("http://proxy:p%40ss@10.0.0.1:3128", "http://***@10.0.0.1:3128"),
        ("https://host/f?X-Amz-Signature=0a1b&x=1", "https://host/f?X-Amz-Signature=***&x=1"),
        ("Authorization: Bearer abc.def-123", "Authorization: Bearer ***"),
        ("the key AKIAABCDEFGHIJKLMNOP is invalid", "the key *** is invalid"),
        ("hf_abcdefghijklmnopqrstuv", "***"),
        ("{'api_key': 'abcdefghij'}", "{'api_key': '***'}"),
        ("judge(my_api_key=abcdefghij)", "judge(my_api_key=***)"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text: str, hidden: str):
    assert redacted(text, {}) == hidden


@pytest.mark.parametrize(
    "text",
    [
        "hdfs://user@namenode/runs, s3://bucket/runs?region=eu and http://127.0.0.1:8265",
        "the key is 3: 2 + 1; token 17 of 20; sk-1",
        "step_token=<|step|>, pad_token_id=128001, max_tokens=1024",
        "at 12:30 mail a:b@example.com",
    ],
)
def test_other_texts_stay(text: str):
    environment = {
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_AUTH_MODE": "token",  # a word of many messages
        "GOOGLE_APPLICATION_CREDENTIALS": "/dev/null",  # a path is no secret
        "SHORT_TOKEN": "17",
    }
    assert redacted(text, environment) == text


def test_a_long_response_is_searched_in_linear_time():
    """A pattern with a quadratic search would need minutes for these."""
    began = time.process_time()
    for unit in ("a", "a.", "?", "&x", "://", "api_key ", "sk-", "hf_", "Bearer "):
        redacted(unit * (400_000 // len(unit)), {})
    assert time.process_time() - began < 60


def config_with(**fields: object) -> RunConfig:
    return RunConfig.model_validate(fields)


@pytest.mark.parametrize(
    ("fields", "name", "secret"),
    [
        (
            {"reward": {"functions": [{"name": "math", "parameters": {"api_key": "abc-123"}}]}},
            "reward.functions.0.parameters.api_key",
            "abc-123",
        ),
        ({"data": {"train": "https://me:abc-123@host/a.jsonl"}}, "data.train", "abc-123"),
        ({"run": {"note": "use planted-hub-token"}}, "run.note", "planted-hub-token"),
    ],
)
def test_a_configuration_with_a_secret_is_refused_without_its_value(
    fields: dict, name: str, secret: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", PLANTED["HF_TOKEN"])
    with pytest.raises(ConfigError) as refused:
        refuse_secrets(config_with(**fields))
    assert str(refused.value).startswith(f"{name}: ")
    assert "environment variable" in str(refused.value)
    assert secret not in str(refused.value)


def test_the_command_line_refuses_a_secret():
    with pytest.raises(ConfigError, match=r"model\.path: its value"):
        parse(RunConfig(), ["--model.path", "https://me:secret@host/model"])


def test_parameters_that_name_where_a_secret_is_are_accepted():
    parameters = {"api_key_env": "JUDGE_KEY", "api_key": None, "step_token": "<|step|>"}
    functions = [{"name": "math", "parameters": parameters}]
    refuse_secrets(config_with(reward={"functions": functions}))
