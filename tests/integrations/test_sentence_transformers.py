"""Every loss through SentenceTransformerTrainer: ten real steps, the loss falls."""

import pytest
import torch

from leafkern.errors import InputError
from leafkern.nn import losses

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

WORDS = ["the leaf kernel", "search a vector", "how to list a file", "python is a kernel", "of the file", "a list"]
TEXTS = [f"{WORDS[i % 6]} {WORDS[(i * 5 + 1) % 6]} {i}" for i in range(16)]
DIMS = {"dims": [32, 8]}
CASES = {
    "alignment": (losses.AlignmentLoss(), 1, (32,)),
    "similarity": (losses.SimilarityLoss(**DIMS), 1, (20,)),
    "relative": (losses.RelativeSimilarityLoss(margin=0.2, **DIMS), 1, (20,)),
    "distill": (losses.DistillLoss(**DIMS), 1, (32,)),
    "info_nce": (losses.InfoNCELoss(temperature=0.05, gamma=0.5, listwise=1, pairwise=None, **DIMS), 4, None),
    "info_nce pairs": (losses.InfoNCELoss(temperature=0.05), 2, None),
    "soft_label": (losses.SoftLabelLoss(**DIMS), 4, (3,)),
}


def dataset(columns, label):
    from datasets import Dataset

    table = {f"text_{c}": [f"{text} {WORDS[c]}" for text in TEXTS] for c in range(columns)}
    if label is not None:
        # What can be learned: unit vectors that go with the first words; the first candidate is the best.
        generator = torch.Generator().manual_seed(3)
        kinds = torch.nn.functional.normalize(torch.randn(6, *label, generator=generator), dim=1)
        labels = torch.tensor([1.0, 0.5, 0.0]).expand(16, 3) if label == (3,) else kinds[torch.arange(16) % 6]
        table["label"] = labels.tolist()
    return Dataset.from_dict(table)


@pytest.mark.parametrize("name", CASES)
def test_ten_steps(name, tiny_bert, tmp_path):
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )

    from leafkern.integrations.sentence_transformers import TrainerLoss

    loss, columns, label = CASES[name]
    model = SentenceTransformer(str(tiny_bert), device="cpu")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=10,
            per_device_train_batch_size=len(TEXTS),  # every step sees the same rows: the loss may only fall
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=5,
        ),
        train_dataset=dataset(columns, label),
        loss=TrainerLoss(model, loss),
    )
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 10
    assert history[-1] < 0.9 * history[0], history


def test_misuse_is_named(tiny_bert):
    from sentence_transformers import SentenceTransformer

    from leafkern.integrations.sentence_transformers import TrainerLoss

    model = SentenceTransformer(str(tiny_bert), device="cpu")
    features = [model.tokenize(TEXTS[:3]), model.tokenize(TEXTS[3:6])]
    with pytest.raises(InputError, match="loss: MSELoss; expected one of leafkern"):
        TrainerLoss(model, torch.nn.MSELoss())
    with pytest.raises(InputError, match="AlignmentLoss: 2 text columns; expected one"):
        TrainerLoss(model, losses.AlignmentLoss())(features, torch.ones(3, 32))
    with pytest.raises(InputError, match="AlignmentLoss: the dataset has no label column"):
        TrainerLoss(model, losses.AlignmentLoss())(features[:1], None)
    with pytest.raises(InputError, match="InfoNCELoss: 1 text column"):
        TrainerLoss(model, losses.InfoNCELoss())(features[:1])
    with pytest.raises(InputError, match="SoftLabelLoss: 1 text column"):
        TrainerLoss(model, losses.SoftLabelLoss())(features[:1], torch.ones(3, 1))
    assert TrainerLoss(model, losses.AlignmentLoss(kind="l2")).get_config_dict()["kind"] == "l2"
    assert TrainerLoss(model, losses.InfoNCELoss(listwise=2)).get_config_dict()["mixing"]["listwise"] == 2
