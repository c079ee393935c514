"""Chat templates: those known by their text against Jinja, and what templates are given."""

import pytest

from lorax_np.errors import FormatError
from lorax_np.text.chat import Chat

TURNS = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
PLAIN = "{% for message in messages %}" + TURNS + PROMPT
SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nGO<|im_end|>\n' }}{% endif %}" + TURNS + PROMPT
)
TALK = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": " b \n"}]
FORMS = {
    "plain": PLAIN,
    "lines end behind it": PLAIN + "\n\n",
    "spaces before it": "\t " + PLAIN,
    "a line before it": "\n" + PLAIN,
    "spaces behind it": PLAIN + " ",
    "three lines end behind it": PLAIN + "\n\n\n",
    "an empty system turn": SYSTEM.replace("GO", ""),
    "a system turn of two lines": SYSTEM.replace("GO", "Go.\nOn <&>."),
    "a system turn of two lines, as another system ends them": SYSTEM.replace("GO", "Go.\r\nOn."),
}


@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_without_jinja_is_what_jinja_writes(form, generation):
    ours, theirs = (Chat("model", FORMS[form], {}, ("<|im_end|>",)) for _ in range(2))
    theirs.__dict__["chatml"] = None  # not known by its text
    assert written(ours, generation) == written(theirs, generation)


def written(chat, generation):
    """What it renders, or why it does not: behind a text's end, no more turns could be written."""
    try:
        return chat.render(TALK, generation=generation)
    except FormatError as error:
        return str(error)


def test_common_templates_need_no_jinja():
    known = "plain", "lines end behind it", "spaces before it", "a system turn of two lines"
    assert all(Chat("model", FORMS[form]).chatml is not None for form in known)


@pytest.mark.parametrize("name", ["tools", "documents"])
def test_templates_are_told_that_there_are_no_tools_and_no_documents(name):
    """Some templates ask `tools is not none`, of a name that is always there where they were written."""
    template = f"{{% if {name} is not none %}}some{{% endif %}}{{{{ messages[0].content }}}}"
    assert Chat("model", template).render(TALK[:1]).text == "a?"


def test_json_is_written_as_templates_ask():
    template = "{{ messages[0] | tojson(%s) }}"
    talk = [{"role": "user", "content": "é<"}]
    for how, wanted in {
        "": '{"role": "user", "content": "é<"}',
        "ensure_ascii=True": '{"role": "user", "content": "\\u00e9<"}',
        "separators=(',', ':'), sort_keys=True": '{"content":"é<","role":"user"}',
        "indent=1": '{\n "role": "user",\n "content": "é<"\n}',
    }.items():
        assert Chat("model", template % how).render(talk).text == wanted
