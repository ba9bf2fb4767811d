"""MinED wired to the cache: both vocabularies aligned when it is built, token strings in each batch.

Shape legend: see batch.py; D is the teacher's width, V a vocabulary.
"""

import importlib
import importlib.util
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from xkd_schemas.errors import UsageError
from xkd_schemas.teacher import Signal
from xkd_trainer.batch import Batch, gather_rows
from xkd_trainer.losses.head import LazyLogits
from xkd_trainer.losses.mined import MinedSettings, carried_head, inverted, mined_divergence, usable_positions
from xkd_trainer.losses.term import LossTerm, term
from xkd_trainer.methods.declaration import Context, Declaration, StudentPass, constant_head


def needs(settings: MinedSettings, levels: tuple[tuple[int, str], ...]) -> tuple[Signal, ...]:
    """Last states; the head is always in the cache."""
    return (Signal("hidden_last"),)


class Mined(nn.Module):
    """Term `mined`, a mean over the student's predictions, and `matched`, which only shows how many have a partner.

    `matched` has weight 0: the other positions learn their gold token, and how many they are should be seen.
    """

    layers: tuple[int, ...] = ()
    attention = False

    def __init__(self, settings: MinedSettings, context: Context) -> None:
        super().__init__()
        if importlib.util.find_spec("rapidfuzz") is None:
            raise UsageError("mined needs rapidfuzz, which is not installed", next="pip install rapidfuzz")
        self._alignment = importlib.import_module("xkd_trainer.losses.mined_alignment")
        self.settings = settings
        student, teacher = context.student_vocab, context.teacher_vocab
        self._student_texts = self._alignment.token_texts(student)
        self._teacher_texts = self._alignment.token_texts(teacher)
        mode = "exact" if settings.vocabulary == "exact" else "nearest"
        to_student_V = self._alignment.vocabulary_map(teacher, student, mode)
        if settings.vocabulary == "inverse":
            to_teacher_V = inverted(to_student_V, max(student.values()) + 1)
        else:
            to_teacher_V = self._alignment.vocabulary_map(student, teacher, mode)
        head = constant_head(context.teacher_head(), "mined")
        size = context.student_head().weight_VD.shape[0]
        head_VD, logit_V = carried_head(head.weight_VD, head.bias_V, to_teacher_V.to(head.weight_VD.device), size)
        self.to_student_V: Tensor
        self.head_VD: Tensor
        self.logit_V: Tensor
        self.register_buffer("to_student_V", to_student_V, persistent=False)
        self.register_buffer("head_VD", head_VD, persistent=False)
        self.register_buffer("logit_V", logit_V, persistent=False)

    def weights(self, step: int) -> Mapping[str, float]:
        """Factor 1; `matched` is there to be read."""
        return {"mined": 1.0, "matched": 0.0}

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Student predictions."""
        return dict.fromkeys(("mined", "matched"), batch.num_predictions)

    def forward(self, batch: Batch, student: StudentPass, step: int) -> Mapping[str, LossTerm]:
        """Align, carry over, compare."""
        assert batch.teacher_hidden_BRD is not None
        valid_BN = batch.predict_valid_BN
        partner_BN, usable_BN = self.aligned(batch)
        rows_BN = batch.teacher_predict_BM.gather(1, partner_BN.clamp_min(0))
        teacher = LazyLogits(
            hidden=gather_rows(batch.teacher_hidden_BRD, rows_BN), weight=self.head_VD, bias=self.logit_V
        )
        target_BN, tau = batch.target_BN, self.settings.temperature
        return {
            "mined": mined_divergence(student.logits, teacher, target_BN, usable_BN, valid_BN, tau),
            "matched": term(usable_BN.sum().float(), valid_BN.sum()),
        }

    @torch.no_grad()
    def aligned(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Partner of each prediction by the tokens both models read there, and whether it is usable, [B, N]."""
        input_BN = batch.student_ids_BS.gather(1, batch.predict_BN)
        partner_BN: Tensor = self._alignment.partners(
            (self._student_texts, input_BN, batch.predict_valid_BN),
            (self._teacher_texts, batch.teacher_input_BM, batch.teacher_predict_valid_BM),
        )
        return partner_BN, usable_positions(partner_BN, input_BN, batch.teacher_input_BM, self.to_student_V)


MINED = Declaration(
    name="mined",
    source="MinED of FuseLLM, arXiv 2401.10491, as a baseline of DSKD, arXiv 2406.17328",
    settings=MinedSettings,
    needs=needs,
    build=Mined,
    default_weight=0.5,
    ce_weight=0.5,
)
