"""The loss mask of conversations: which templates give one, and that the others are refused."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from training_fixtures import CHATML, chat_tokenizer
from transformers import PreTrainedTokenizerFast

from halo_train.training.encode import Encoder, decode_pieces
from halo_train.training.errors import UserError
from halo_train.training.formats import Conversation
from halo_train.training.store import Documents, make_chunk

LAST_THINKS = CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
)
TRIMMED = CHATML.replace("m.content", "m.content | trim")
STARTS_A_THOUGHT = CHATML.replace(
    "<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif"
)
INSTRUCTION = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}<|im_end|>"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
MARKED_APART = MARKED.replace(
    "{{ m.content }}<|im_end|>{% endg", "{{ m.content }}{% endgeneration %}{% generation %}<|im_end|>{% endg"
)


def _row(*turns: str) -> Conversation:
    """Turns of system, user, assistant, user, assistant, ..."""
    roles = ["system", *["user", "assistant"] * len(turns)]
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    return Conversation(messages, "rows.jsonl, line 7")


ROW = _row("Be brief.", "hi ", " yes\n", "t 🙂", "e")


def _encode(rows: list[Conversation], tokenizer: object, seq_len: int = 512) -> Documents:
    return Documents(make_chunk(Encoder(tokenizer, seq_len)(rows), len(rows)))


def _trained(template: str, row: Conversation = ROW, seq_len: int = 512) -> list[str]:
    tokenizer = chat_tokenizer(template)
    document = _encode([row], tokenizer, seq_len).document(0)
    return [text for text, trained in decode_pieces(document, tokenizer) if trained]


@pytest.mark.parametrize(
    ("template", "trained"),
    [
        (CHATML, [" yes\n<|im_end|>\n", "e<|im_end|>\n"]),
        (TRIMMED, ["yes<|im_end|>\n", "e<|im_end|>\n"]),
        # As Qwen3's: what only the last turn has is trained there.
        (LAST_THINKS, [" yes\n<|im_end|>\n", "<think>\n\n</think>\n\ne<|im_end|>\n"]),
        (STARTS_A_THOUGHT, [" yes\n<|im_end|>\n", "e<|im_end|>\n"]),
        (
            CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
            [" yes\n<|im_end|>\n", "e<|im_end|>\n<|endoftext|>"],
        ),
        (INSTRUCTION, ["  yes\n<|im_end|>", " e<|im_end|>"]),
        (MARKED, [" yes\n<|im_end|>", "e<|im_end|>"]),
        (MARKED_APART, [" yes\n<|im_end|>", "e<|im_end|>"]),
    ],
    ids=[
        "chatml",
        "trimmed",
        "last turn thinks",
        "prompt thinks",
        "eos at the end of all",
        "no generation prompt",
        "tags",
        "end tagged apart",
    ],
)
def test_the_assistants_turns_and_their_end_are_trained(template: str, trained: list[str]) -> None:
    assert _trained(template) == trained


def test_the_ids_are_those_of_the_template() -> None:
    tokenizer = chat_tokenizer(CHATML)
    (example,) = Encoder(tokenizer, 512)([ROW])
    assert example.ids == tokenizer.apply_chat_template(ROW.messages, return_dict=True)["input_ids"]


def test_a_token_across_the_start_of_a_turn_is_trained() -> None:
    """Byte-level tokenizers join a space with the word after it; the word must not get lost with the space."""
    tokenizer = chat_tokenizer(
        "{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    )
    row = _row("", "user", "user user")
    pieces = decode_pieces(_encode([row], tokenizer).document(0), tokenizer)
    assert [text.strip() for text, trained in pieces if trained] == ["user user <|im_end|>"]


def test_a_long_conversation_is_cut_and_one_without_an_answer_left_is_dropped() -> None:
    tokenizer = chat_tokenizer(CHATML)
    rows = [_row("s", "u", "a" * 5, "v", "b" * 300), _row("s", "u" * 300, "a"), _row("s", "u", "a")]
    examples = Encoder(tokenizer, 64)(rows)
    assert [(example.row, example.cut) for example in examples] == [(0, True), (2, False)]
    assert len(examples[0].ids) == examples[0].trained[-1][1] == 64


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML.partition("{% if add_generation_prompt")[0], "does not tell reliably .* message 3 does not follow"),
        (CHATML.replace("<|im_end|>", "{{ '<|im_end|>' if loop.last else '' }}"), "does not tell reliably"),
        (CHATML.replace("<|im_end|>", ""), "ends the assistant's turn without a special token"),
        (MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"), "leaves it out of"),
        (MARKED.replace("== 'assistant'", "== 'assistant' and loop.last"), "marks 1 turns .* but the assistant has 2"),
        (CHATML.replace("messages %}", "messages if m.role != 'system' %}"), "leaves out .* the system says, 'Be brief"),
        ("{{ raise_exception('roles must alternate') }}", "refuses the messages: roles must alternate"),
        ("{% for m in messages %}", "refuses the messages: .*end of template"),
    ],
)  # fmt: skip
def test_a_template_without_a_reliable_mask_is_refused(template: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 7: .*{message}") as error:
        _trained(template)
    assert "use rows with prompt and completion" in str(error.value)


def test_a_tokenizer_without_a_template_is_refused() -> None:
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"has no chat template.*put a chat_template\.jinja beside"):
        _encode([ROW], tokenizer)
    tokenizer.chat_template = {"rag": CHATML, "tools": CHATML}
    with pytest.raises(UserError, match="multiple chat templates with no default"):
        _encode([ROW], tokenizer)


def test_a_tokenizer_that_knows_no_offsets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = chat_tokenizer(CHATML)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(UserError, match=r"cannot be masked; give it a tokenizer\.json"):
        _encode([ROW], tokenizer)


def test_tokens_that_hold_the_space_before_a_word() -> None:
    """SentencePiece's way, as in Llama 2."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["</s>", "<|im_end|>"]
    bpe.train_from_iterator(["[INST] a [/INST] c d"], trainers.BpeTrainer(special_tokens=special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", chat_template=INSTRUCTION)
    (example,) = Encoder(tokenizer, 512)([_row("a", "a", "c d")])
    ((start, end),) = example.trained
    assert "".join(tokenizer.convert_ids_to_tokens(example.ids[start:end])) == "▁c▁d<|im_end|>"


# As Qwen2.5 writes tools and calls: one block for all answers of tools, calls after the content.
QWEN = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}{% if loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}\n{{ m.content }}"
    "{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = QWEN.replace(
    "{{ m.content }}{% for c",
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}{% for c",
)
# As Mistral writes them: no generation prompt, calls in place of the content.
MISTRAL = (
    "{% if tools %}[TOOLS]{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}[CALLS]{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"
    "<|im_end|>{% elif m.role == 'assistant' %} {{ m.content }}<|im_end|>"
    "{% elif m.role == 'tool' %}[RESULT]{{ m.content | tojson }}{% else %}[INST] {{ m.content }} [/INST]{% endif %}"
    "{% endfor %}"
)
QWEN_MARKED = QWEN.replace("{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}", (
    "{% elif m.role != 'assistant' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% else %}<|im_start|>assistant\n{% generation %}{{ m.content }}"
)).replace("{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add", "{% endfor %}<|im_end|>\n{% endgeneration %}{% endif %}{% endfor %}{% if add")  # fmt: skip

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def _call(name: str, **arguments: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TOOL_ROW = Conversation(
    [
        {"role": "user", "content": "1 plus 2?"},
        {"role": "assistant", "content": "", "tool_calls": [_call("add", a=1, b="zwei\n")]},
        {"role": "tool", "content": '{"sum": 3}'},
        {"role": "tool", "content": "done"},
        {"role": "assistant", "content": "3."},
    ],
    "rows.jsonl, line 7",
    TOOLS,
)


@pytest.mark.parametrize(
    ("template", "trained"),
    [
        (QWEN, ['<tool_call>add {"a": 1, "b": "zwei\\n"}</tool_call><|im_end|>\n', "3.<|im_end|>\n"]),
        (QWEN_MARKED, ['<tool_call>add {"a": 1, "b": "zwei\\n"}</tool_call><|im_end|>\n', "3.<|im_end|>\n"]),
        (
            QWEN3,
            [
                '<tool_call>add {"a": 1, "b": "zwei\\n"}</tool_call><|im_end|>\n',
                "<think>\n\n</think>\n\n3.<|im_end|>\n",
            ],
        ),
        (
            MISTRAL,
            ['[CALLS]{"name": "add", "arguments": {"a": 1, "b": "zwei\\n"}}<|im_end|>', " 3.<|im_end|>"],
        ),
    ],
    ids=["qwen2.5", "qwen2.5 with tags", "qwen3", "mistral"],
)
def test_tool_calls_are_trained_and_their_answers_are_not(template: str, trained: list[str]) -> None:
    assert _trained(template, TOOL_ROW) == trained


def test_a_call_beside_words_and_several_calls() -> None:
    messages = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [_call("add", a=1), _call("add", a=2)]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "", "tool_calls": [_call("add", a=3)]},
    ]
    assert _trained(QWEN3, Conversation(messages, "rows.jsonl, line 7", TOOLS)) == [
        'Let me see.<tool_call>add {"a": 1}</tool_call><tool_call>add {"a": 2}</tool_call><|im_end|>\n',
        '<think>\n\n</think>\n\n<tool_call>add {"a": 3}</tool_call><|im_end|>\n',
    ]


def test_a_second_template_for_tools_is_taken_for_rows_with_tools() -> None:
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.chat_template = {"default": MISTRAL, "tool_use": QWEN}
    for row, start in ((TOOL_ROW, "<tool_call>"), (_row("s", "u", "a"), " a")):
        pieces = decode_pieces(_encode([row], tokenizer).document(0), tokenizer)
        assert next(text for text, trained in pieces if trained).startswith(start)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML, "does not write the tool 'add'; take one that supports tools"),
        (QWEN.replace("m.tool_calls or []", "[]"), "does not write the tool call 'add' of message 2 into the"),
        (QWEN.replace("c.function.arguments | tojson", "''"), "does not write the tool call 'add' .*changes its 'zwei"),
        (QWEN.replace("\n{{ m.content }}{% if loop.last", "{% if loop.last"), "leaves out .*the tool says, '{\"sum\": 3}'"),
        # The call outside of what is marked.
        (QWEN_MARKED.replace("{% for c in", "{% endgeneration %}{% for c in").replace("\n{% endgen", "{% generation %}\n{% endgen"), "marks 4 turns"),
        # A header for calls alone, without a generation prompt: it would be trained.
        (MISTRAL.replace("[CALLS]", "assistant: ").replace(" {{ m.content }}<", "assistant: {{ m.content }}<"), "does not tell reliably .* message 2"),
        (QWEN.replace("c.function.arguments | tojson", "c.function.arguments + ''"), "refuses the messages: .*dict"),
    ],
)  # fmt: skip
def test_a_template_that_loses_tools_or_calls_is_refused(template: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 7: .*{message}"):
        _trained(template, TOOL_ROW)
