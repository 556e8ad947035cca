"""Packed rows: what stands in them, and that a document computes there what it computes alone."""

import numpy as np
import pytest
import torch
from training_fixtures import LLAMA, halo_train, metrics, write_run
from transformers import AutoConfig, AutoModelForCausalLM

from halo_train.training.data import IGNORE, FixedBatches, Split
from halo_train.training.errors import UserError
from halo_train.training.loop import evaluate
from halo_train.training.loss import TokenLoss
from halo_train.training.packing import one_a_row, pack, require_isolation
from halo_train.training.store import Documents, Example, make_chunk

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
KEEP_APART = {
    "llama": {},
    "qwen2": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "mistral": {"sliding_window": 8},  # shorter than the documents
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},  # learned positions
}
LET_THROUGH = {
    "bloom": {"n_head": 4, "n_layer": 2},  # takes no positions
    "falcon": {},  # takes positions, but its mask does not
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "mamba": {},  # a state that runs through the row
}


def _model(family: str, **settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | (KEEP_APART | LET_THROUGH)[family]))
    return AutoModelForCausalLM.from_config(config, **settings)


def _split(lengths: list[int], packing: bool, seq_len: int = 32) -> Split:
    generator = torch.Generator().manual_seed(1)
    examples = [
        Example(torch.randint(97, (n,), generator=generator).tolist(), [(n // 2, n)], i)
        for i, n in enumerate(lengths)
    ]
    documents, rows = Documents(make_chunk(examples, len(lengths))), np.arange(len(lengths))
    return Split(documents, rows, "data.train", seq_len=seq_len, packing=packing)


LENGTHS = [17, 3, 2, 30, 9, 9, 5, 16, 32, 8]


@pytest.mark.parametrize("seq_len", [64, 100])
def test_every_document_is_in_one_row_and_rows_are_full(seq_len: int) -> None:
    lengths = np.random.default_rng(0).integers(2, seq_len + 1, 2000)
    documents = np.arange(5000, 7000)
    rows = pack(documents, lengths, seq_len, seed=0)
    assert sorted(np.concatenate([rows[i] for i in range(len(rows))]).tolist()) == documents.tolist()
    assert rows.lengths.tolist() == [lengths[rows[i] - 5000].sum() for i in range(len(rows))]
    assert rows.lengths.max() <= seq_len
    assert rows.lengths.mean() > 0.98 * seq_len
    again, other = (pack(documents, lengths, seq_len, seed) for seed in (0, 1))
    assert np.array_equal(again.documents, rows.documents)
    assert not np.array_equal(other.documents, rows.documents)


def test_one_document_a_row() -> None:
    rows = one_a_row(np.array([4, 7]), np.array([2, 3]))
    assert [rows[0].tolist(), rows[1].tolist(), len(rows)] == [[4], [7], 2]


def test_a_packed_batch_at_the_borders_of_its_documents() -> None:
    split = _split(LENGTHS, packing=True, seq_len=24 + 9)
    batch = split.batch(range(len(split.rows)), pad_id=96)
    assert batch.positions is not None
    assert batch.ids.shape == batch.labels.shape == batch.positions.shape == (len(split.rows), 48)
    assert batch.ids.numel() % 16 == 0
    assert (batch.tokens, batch.trained) == (sum(LENGTHS), int((batch.labels != IGNORE).sum()))
    for row in range(len(split.rows)):
        start = 0
        for number in split.rows[row]:
            document = torch.from_numpy(split.store.document(number).astype(np.int64))
            end, masked = start + len(document), document < 0
            assert batch.ids[row, start:end].tolist() == torch.where(masked, ~document, document).tolist()
            assert batch.labels[row, start:end].tolist() == document.masked_fill(masked, IGNORE).tolist()
            assert batch.positions[row, start:end].tolist() == [*range(len(document))]
            # The last token of a document predicts nothing of the next one.
            assert batch.labels[row, start] == IGNORE
            start = end
        assert bool((batch.ids[row, start:] == 96).all())
        assert bool((batch.labels[row, start:] == IGNORE).all())
        assert batch.positions[row, start:].tolist() == [*range(48 - start)]


@pytest.mark.parametrize("family", KEEP_APART)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_document_has_the_logits_of_the_document_alone(family: str, attention: str) -> None:
    # No grouped product of experts in float64.
    dtype, atol = (torch.float32, 1e-6) if "moe" in family else (torch.float64, 1e-12)
    model = _model(family, dtype=dtype, attn_implementation=attention).eval()
    require_isolation(model, family)
    split = _split(LENGTHS, packing=True)
    batch = split.batch(range(len(split.rows)), pad_id=0)
    with torch.no_grad():
        packed = model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits
        for row in range(len(split.rows)):
            start = 0
            for number in split.rows[row]:
                length = split.store.lengths()[number]
                alone = model(input_ids=batch.ids[row : row + 1, start : start + length]).logits
                assert torch.allclose(packed[row, start : start + length], alone[0], rtol=1e-4, atol=atol)
                start += length


def test_the_loss_and_its_gradients_are_those_without_packing() -> None:
    grads, losses = [], []
    for packing in (False, True):
        loss_of = TokenLoss(_model("llama", dtype=torch.float32))
        batches = FixedBatches(_split(LENGTHS, packing), 4, pad_id=0)
        losses.append(evaluate(loss_of, batches, torch.device("cpu")))
        for batch in batches:
            loss_of(**batch.inputs(torch.device("cpu"))).backward()
        grads.append(torch.cat([p.grad.flatten() for p in loss_of.parameters()]))
    assert len(FixedBatches(_split(LENGTHS, True), 4, 0)) < len(FixedBatches(_split(LENGTHS, False), 4, 0))
    # Forward under bfloat16 autocast: other shapes round in another order.
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert (grads[0] - grads[1]).norm() < 0.02 * grads[0].norm()


@pytest.mark.parametrize("family", KEEP_APART)
def test_rounding_in_bfloat16_is_not_taken_for_a_leak(family: str) -> None:
    model = _model(family, dtype=torch.bfloat16)
    model.train()
    require_isolation(model, family)
    assert model.training


@pytest.mark.parametrize("family", LET_THROUGH)
def test_a_model_that_mixes_documents_is_refused(family: str) -> None:
    with pytest.raises(
        UserError, match=r"data\.packing=true: .*(keep packed documents apart|no position_ids)"
    ):
        require_isolation(_model(family), family)


def test_one_layer_that_leaks_is_enough_to_be_refused() -> None:
    """Qwen3-Next has linear attention, whose state runs through the row, between layers that keep documents apart."""
    heads = {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_next",
        **(SIZES | heads | experts),
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    )
    with pytest.raises(UserError, match="does not keep packed documents apart"):
        require_isolation(AutoModelForCausalLM.from_config(config), "qwen3_next")


def test_a_packed_run_shows_its_rows_and_resumes_bit_for_bit(
    tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(write_run(tmp_path, rows=60))
    packed = ["data.packing=true", "train.micro_batch=2", "train.grad_accum=1"]
    assert halo_train("preprocess", file, *packed, "--show", "1") == 0
    out = capsys.readouterr().out
    assert "of 48 tokens" in out
    assert "document 2" in out
    assert halo_train("run", file, *packed) == 0
    assert halo_train("run", file, *packed, "run.name=split") == 0
    run, split = tmp_path / "runs" / "tiny", tmp_path / "runs" / "split"
    (split / "checkpoints" / "step-6").rename(tmp_path / "lost")
    assert halo_train("run", file, *packed, "run.name=split") == 0
    assert metrics(split) == metrics(run)
    assert sum(line["tokens"] for line in metrics(run) if "tokens" in line) > 6 * 2 * 30


def test_a_run_of_a_model_that_mixes_documents_does_not_start(
    tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    falcon = LLAMA | {"model_type": "falcon"}
    assert halo_train("run", str(write_run(tmp_path, model=falcon)), "data.packing=true") == 2
    assert "does not keep packed documents apart" in capsys.readouterr().err
