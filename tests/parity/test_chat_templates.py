"""Messages by templates of several makers, against what transformers makes of them."""

import pytest

from lorax_np.text.chat import Chat
from tests.parity.llama_oracle import T

pytestmark = pytest.mark.peft

WORDS = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {
    "one line": """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}
{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}""",
    "many lines": """{% for m in messages %}
{% if m['role'] == 'user' %}
{{ '<|user|>\\n' + m['content'] + eos_token }}
{% elif m['role'] == 'assistant' %}
{{ '<|assistant|>\\n' + m['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "trimmed, marked": """{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
{%- generation -%}
 {{ m.content | trim + eos_token }}
 {%- endgeneration -%}
{%- else -%} {{ m.content }}
{%- endif -%} {%- endfor -%}""",
    "tools, documents": """{% for m in messages %}{% if tools is not none and loop.last %}{{ tools | tojson }}
{% endif %}{% if documents is none %}{{ m | tojson(sort_keys=True) }}{% endif %}{% endfor %}{{ pad_token }}""",
    "a line behind": "{% for m in messages %}{{ m.role + m.content }}{% endfor %}\n\n\n",
}
TALK = [
    {"role": role, "content": content}
    for role, content in (
        ("user", " <é> {{ 7 }} "),
        ("assistant", ""),
        ("user", "'\\n\n\""),
        ("assistant", " b "),
    )
]


@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_messages_are_written_as_transformers_writes_them(name, generation):
    talk = TALK[: 3 if generation or name == "a line behind" else 4]
    (want,), _ = T.utils.chat_template_utils.render_jinja_template(
        conversations=[talk], chat_template=TEMPLATES[name], add_generation_prompt=generation, **WORDS
    )
    assert Chat("model", TEMPLATES[name], WORDS)._jinja(talk, generation) == want
