"""Chat templates: rendering as Hugging Face's environment does, and tokens without a second BOS."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from batchcore.chat import render
from batchcore.errors import InvalidRequestError

if TYPE_CHECKING:
    from batchcore.model import Model

CHAT = [{"role": "user", "content": "Hi <b>&'\""}]


@pytest.mark.model
def test_smollm2(smollm2: Model) -> None:
    assert smollm2.apply_chat_template(CHAT) == (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n"
        "Hi <b>&'\"<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3"},
    ]
    assert smollm2.apply_chat_template(messages, add_generation_prompt=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n1<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\n3<|im_end|>\n"
    )


@pytest.mark.model
def test_smollm2_tokens(smollm2: Model) -> None:
    tokens = smollm2.tokenize_chat([{"role": "system", "content": "a"}])
    assert tokens == [1, 9690, 198, 81, 2, 198, 1, 520, 9531, 198]


@pytest.mark.model
@pytest.mark.parametrize("template", ["{{ bos_token }}Hello", "Hello"])
def test_exactly_one_bos(gemma3: Model, template: str) -> None:
    assert gemma3.tokenize_chat(CHAT, template=template) == [2, 9259]


@pytest.mark.model
def test_a_base_model_has_no_template(gemma3: Model) -> None:
    assert gemma3.chat_template is None
    assert gemma3.named_chat_template("tool_use") is None
    with pytest.raises(InvalidRequestError, match="no chat template"):
        gemma3.apply_chat_template(CHAT)


def test_blocks_are_trimmed() -> None:
    template = "{% for m in messages %}\n  {% if m %}\n{{ m.role }};\n  {% endif %}\n{% endfor %}\n"
    assert render(template, CHAT * 2) == "user;\nuser;\n"


def test_loop_controls() -> None:
    template = "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}x{% endfor %}"
    assert render(template, CHAT * 3) == "x"


def test_tojson_is_not_for_html() -> None:
    assert render("{{ messages[0].content | tojson }}", CHAT) == '"Hi <b>&\'\\""'
    assert render("{{ {'b': 1, 'a': 'é'} | tojson(indent=1) }}", CHAT) == (
        '{\n "b": 1,\n "a": "é"\n}'
    )


def test_generation_blocks_are_transparent() -> None:
    template = "{% set x = 1 %}{% generation %}{{ x }}{% set x = 2 %}{% endgeneration %}{{ x }}"
    assert render(template, CHAT) == "12"


def test_tools_and_own_variables() -> None:
    template = "{{ tools[0].name }} {{ mood }} {{ bos_token }}{{ eos_token }}"
    text = render(template, CHAT, tools=[{"name": "f"}], mood="calm", bos_token="<", eos_token=">")
    assert text == "f calm <>"
    assert render("{{ tools is none }} {{ tools is defined }}", CHAT) == "True True"


def test_strftime_now() -> None:
    assert len(render("{{ strftime_now('%Y-%m-%d') }}", CHAT)) == 10


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "not valid Jinja"),
        ("{{ messages[0].content + 1 }}", "failed"),
        ("{{ missing.attribute }}", "undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "immutable|unsafe|not safely callable"),
        ("{% for i in range(999999999) %}{% endfor %}", "range"),
    ],
)
def test_errors_are_the_request_s(template: str, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        render(template, CHAT)


@pytest.mark.parametrize("messages", ["Hi", ["Hi"], [1], None, {"role": "user"}])
def test_messages_are_a_list_of_dicts(messages: object) -> None:
    with pytest.raises(InvalidRequestError, match="list of dicts"):
        render("{{ messages }}", messages)  # type: ignore[arg-type]


def test_jinja_is_imported_late() -> None:
    code = "import sys, batchcore.model; sys.exit('jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
