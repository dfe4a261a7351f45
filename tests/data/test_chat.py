"""Chat templates: the text of a conversation, and which part of it is an answer."""

import pytest

from remoe.data.chat import EOD_MARK, ChatTemplate, encode, encode_messages, load_template, messages_of, saved_template
from remoe.data.tokenizer import BytesTokenizer
from remoe.errors import ConfigError, DataError

TALK = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2+2?"},
    {"role": "assistant", "content": "4"},
]
ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n{}### Response:\n"
)


def test_alpaca_rows_become_the_prompts_of_stanford_alpaca():
    template = load_template("alpaca")
    plain = messages_of({"instruction": "Add.", "input": "", "output": "2"})
    assert template.render(plain) == ALPACA.format("", "") + "2" + EOD_MARK
    assert template.render(plain[:1], add_generation_prompt=True) == ALPACA.format("", "")
    more = messages_of({"instruction": "Add.", "input": "1 and 1", "output": "2"})
    context = ", paired with an input that provides further context"
    assert template.render(more[:1], True) == ALPACA.format(context, "### Input:\n1 and 1\n\n")


@pytest.mark.parametrize("name", ["alpaca", "chat", "plain"])
def test_pieces_join_to_the_rendered_text_and_the_answers_are_the_assistant_s(name):
    template = load_template(name)
    pieces = list(template.pieces(TALK))
    assert template.render(TALK).startswith("".join(piece.text for piece in pieces))
    assert [piece.text for piece in pieces if piece.is_answer] == [f"2{EOD_MARK}", f"4{EOD_MARK}"]


def test_what_is_learned_is_what_would_be_generated_after_the_prompt():
    tokenizer, template = BytesTokenizer(), load_template("chat")
    ids, is_answer = encode_messages(tokenizer, template, TALK)
    assert tokenizer.decode(ids[is_answer]) == "24"
    assert ids[is_answer].tolist() == [ord("2"), tokenizer.eod, ord("4"), tokenizer.eod]
    prompt = encode(tokenizer, template.render(TALK[:3], add_generation_prompt=True))
    assert ids[: len(prompt)].tolist() == prompt.tolist()
    assert is_answer[len(prompt)]


def test_a_template_of_transformers_can_be_given_as_a_file(tmp_path):
    path = tmp_path / "chatml.jinja"
    path.write_text(
        "{% for message in messages %}\n{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
        "<|im_end|>\n{% endfor %}\n{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    pieces = list(load_template(str(path)).pieces(TALK[:2]))
    question, answer = (piece.text for piece in pieces)
    assert question == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert answer == "2<|im_end|>\n"


def test_a_template_that_rewrites_earlier_turns_is_refused():
    template = ChatTemplate("{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(DataError, match="renders a turn in another way once others follow"):
        list(template.pieces(TALK))


def test_a_template_that_there_is_not_or_that_is_broken_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.template is 'alpacca', .*; did you mean 'alpaca'\?"):
        load_template("alpacca")
    (tmp_path / "broken.jinja").write_text("{% for %}")
    with pytest.raises(ConfigError, match="is no Jinja template"):
        load_template(str(tmp_path / "broken.jinja"))


@pytest.mark.parametrize("content", [b"{% for %}", b"\xff\xfe"])
def test_a_damaged_template_beside_a_tokenizer_is_one_error(tmp_path, content):
    (tmp_path / "chat_template.jinja").write_bytes(content)
    with pytest.raises(DataError, match=r"chat_template\.jinja is no Jinja template"):
        saved_template(tmp_path)


def test_templates_cannot_reach_python():
    with pytest.raises(DataError, match="cannot be rendered"):
        ChatTemplate("{{ messages.__class__.__mro__ }}").render(TALK)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "is no JSON object"),
        ({"text": "a"}, "must have instruction and output, prompt and response, or messages; its keys are 'text'"),
        ({"instruction": "a", "output": 3}, "holds a turn that has no text"),
        ({"messages": []}, "must be a list of objects"),
        ({"messages": ["a"]}, "holds a turn that has no text"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "has the role 'usr', .*did you mean 'user'"),
        ({"messages": TALK[1:]}, "must begin with a question and end with an answer"),
        ({"messages": TALK[:3]}, "must begin with a question and end with an answer"),
        ({"prompt": "a", "response": EOD_MARK}, "holds U\\+FDD0"),
    ],
)
def test_a_row_that_is_no_conversation_says_why(row, message):
    with pytest.raises(ValueError, match=message):
        messages_of(row)
