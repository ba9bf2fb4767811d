"""Random-sampling distillation wired to the cache: forward KL from a few drawn classes of each prediction.

For a student with the teacher's tokenizer, at temperature 1. The cache holds some dozens of bytes a prediction instead
of the teacher's last state; training needs no head of the teacher.

Shape legend: see batch.py; K here is the number of drawn classes.
"""

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from xkd_schemas.errors import BadData
from xkd_schemas.teacher import Signal
from xkd_trainer.batch import Batch
from xkd_trainer.losses.sampled import head_sampled_kl
from xkd_trainer.losses.term import LossTerm, term
from xkd_trainer.methods.declaration import Context, Declaration, StudentPass
from xkd_trainer.methods.one_tokenizer import first_classes, refuse_other_predictions, refuse_two_tokenizers


class RskdSettings(BaseModel):
    """There is nothing to set: how many classes are drawn, and that of temperature 1, was settled at capture."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Rskd(nn.Module):
    """One term, `sampled_kl`: an unbiased estimate of the forward KL, nats per prediction of the student."""

    layers: tuple[int, ...] = ()
    attention = False

    def __init__(self, settings: RskdSettings, context: Context) -> None:
        super().__init__()
        refuse_two_tokenizers("rskd", context)
        self.classes = max(context.student_vocab.values()) + 1
        """Ids of the tokenizer; the draws are from these, and heads may have rows beyond them."""

    def weights(self, step: int) -> Mapping[str, float]:
        """Factor 1."""
        return {"sampled_kl": 1.0}

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Predictions.

        Raises:
            BadData: A document has not the same number of predictions in both models, or a drawn class is no id of
                the tokenizer.
        """
        refuse_other_predictions("rskd", batch)
        assert batch.teacher_sampled_ids_BMK is not None
        highest = int(batch.teacher_sampled_ids_BMK.max())
        if highest >= self.classes:
            raise BadData(
                f"loss rskd: class {highest} is drawn in one of the rows {', '.join(map(str, batch.rows))}, the "
                f"tokenizer has ids below {self.classes}",
                next="xkd-cache verify CACHE --level deep",
            )
        return {"sampled_kl": batch.num_predictions}

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Forward KL at every valid prediction, over the tokenizer's ids."""
        assert batch.teacher_sampled_ids_BMK is not None
        assert batch.teacher_sampled_weights_BMK is not None
        assert batch.teacher_entropy_BM is not None
        valid_BN = batch.predict_valid_BN
        total = head_sampled_kl(
            first_classes(student.logits, self.classes).at(valid_BN), batch.teacher_sampled_ids_BMK[valid_BN],
            batch.teacher_sampled_weights_BMK[valid_BN], batch.teacher_entropy_BM[valid_BN],
        )  # fmt: skip
        return {"sampled_kl": term(total, batch.num_predictions)}


RSKD = Declaration(
    name="rskd",
    source="random-sampling KD, arXiv 2503.16870, classes drawn by threshold (arXiv 0803.0473)",
    settings=RskdSettings,
    needs=lambda _settings, _levels: (Signal("sampled"), Signal("entropy")),
    build=Rskd,
    one_tokenizer=True,
    ce_weight=0,
)
