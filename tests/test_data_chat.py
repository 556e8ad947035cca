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
        (INSTRUCTION, ["  yes\n<|im_end|>", " e<|im_end|>"]),
        (MARKED, [" yes\n<|im_end|>", "e<|im_end|>"]),
        (MARKED_APART, [" yes\n<|im_end|>", "e<|im_end|>"]),
    ],
    ids=["chatml", "trimmed", "last turn thinks", "no generation prompt", "tags", "end tagged apart"],
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
