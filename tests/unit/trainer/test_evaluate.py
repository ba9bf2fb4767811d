"""Bits per byte, agreement and ROUGE-L against plain loops over tokens."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import small_cache
import tiny_models as tiny
from fake_hardware import hardware_is
from four_tokenizers import tokenizer_of
from xkd_schemas.config import GenerationSection
from xkd_schemas.corpus.sources import held_out_documents
from xkd_schemas.documents import Document, document_of
from xkd_schemas.errors import BadData, UsageError
from xkd_schemas.text.encode import Encoder
from xkd_schemas.tokens import CONTENT, Tokens
from xkd_trainer import evaluation as evaluate
from xkd_trainer.data.cache import Cache
from xkd_trainer.evaluation import Request, evaluate_student, generate, rouge_l
from xkd_trainer.losses.ops.vocabulary import shared_vocabulary
from xkd_trainer.models import generation
from xkd_trainer.models.bits_per_byte import bits_per_byte
from xkd_trainer.models.generation import _Draw, repeats
from xkd_trainer.training import held_out
from xkd_trainer.training.held_out import Agreement

HELD = (
    ("Who lit the lamp?", "A fisherman lit it."),
    ("Is it late?", "Yes."),
    ("What is on the table?", "The naïve café 🇩🇪 has a long wall, 東京."),
    ("", "Nobody knew."),
)

KIND = "sentencepiece"
ENDS = [tiny.tokenizer_of(KIND).eos_token_id]

Pairs = list[tuple[Document, Tokens]]


def encoded(tokenizer: Any, folder: Path) -> Pairs:
    documents, *_ = held_out_documents(tiny.corpus_file(folder, HELD))
    encoder = Encoder(tokenizer=tokenizer, template="none", max_tokens=512)
    return list(zip(documents, encoder.encode_batch(documents), strict=True))


@torch.no_grad()
def slow_bits(model: PreTrainedModel, pairs: Pairs) -> float:
    """One document at a time, one token at a time, from the model's own logits."""
    bits, texts = [], []
    for document, tokens in pairs:
        logits_LV = model(input_ids=torch.tensor(tokens.ids.tolist())[None]).logits[0].double()
        for t in range(1, len(tokens.ids)):
            if tokens.targets[t] and tokens.kinds[t] == CONTENT:
                odds = [math.exp(score) for score in logits_LV[t - 1].tolist()]
                bits.append(-math.log2(odds[tokens.ids[t]] / math.fsum(odds)))
        texts += [document.text[s.start : s.end] for s in document.segments if s.target]
    return math.fsum(bits) / len("".join(texts).encode("utf-8"))


@pytest.mark.parametrize(("family", "kind"), [(tiny.llama, "sentencepiece"), (tiny.gpt2, "unigram")])
def test_bits_per_byte_equal_a_loop_over_tokens_with_the_models_own_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: Any, kind: str
) -> None:
    model = family(kind)
    pairs = encoded(tokenizer_of(kind), tmp_path)
    expected = slow_bits(model, pairs)
    for size in (1, 2, 3, 16):
        monkeypatch.setattr("xkd_trainer.models.bits_per_byte.BATCH", size)

        found = bits_per_byte(model, pairs[:: 1 if size > 1 else -1])

        assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
        assert found["bytes"] == sum(len(response.encode()) for _, response in HELD)


def test_losses_and_responses_are_counted_as_they_come(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("xkd_schemas.progress.EVERY", -1.0)  # every tick is shown
    monkeypatch.setattr("xkd_trainer.models.bits_per_byte.BATCH", 2)
    model, tokenizer = tiny.llama("sentencepiece"), tokenizer_of("sentencepiece")
    pairs = encoded(tokenizer, tmp_path)

    bits_per_byte(model, pairs)
    rouge_l(model, tokenizer, pairs, Request(student="", data=tmp_path, seeds=(1,), max_new_tokens=2), {})
    said = [line.partition(", 0:0")[0] for line in capsys.readouterr().err.splitlines()]

    assert said == [
        "bits per byte: 2 of 4 rows", "bits per byte: 4 of 4 rows",
        "generate, seed 1 of 1: 2 of 4 responses", "generate, seed 1 of 1: 4 of 4 responses",
    ]  # fmt: skip


def test_a_text_cut_to_the_models_length_counts_only_the_bytes_that_were_read() -> None:
    segments = [("prompt", "Why? ", False), ("response", "The old lamp and the old lamp on the harbour wall.", True)]
    documents = [document_of(segments, source="here", line=1)]
    encoder = Encoder(tokenizer=tokenizer_of("sentencepiece"), template="none", max_tokens=14)
    pairs = list(zip(documents, encoder.encode_batch(documents), strict=True))
    end = pairs[0][1].num_chars

    found = bits_per_byte(tiny.llama("sentencepiece"), pairs)

    assert 5 < end < len(documents[0].text)
    assert found["bytes"] == len(documents[0].text[5:end].encode())


@torch.no_grad()
def slow_agreement(model: PreTrainedModel, cache: Cache, translated: dict[int, int]) -> tuple[int, int]:
    same = total = 0
    for row in cache.usable.tolist():
        student, teacher = cache.students[row], cache.teachers[row]
        logits_LV = model(input_ids=torch.tensor(student["token_ids"].tolist())[None]).logits[0]
        predicted = [t for t in range(1, len(teacher["targets"])) if teacher["targets"][t]]
        both = zip(student["student_spans"].tolist(), student["teacher_spans"].tolist(), strict=True)
        for (s, s_end), (t, t_end) in both:
            if s_end - s == 1 and t_end - t == 1 and s and t and student["targets"][s] and teacher["targets"][t]:
                total += 1
                said = int(teacher["argmax"][predicted.index(t)])
                same += translated.get(said) == int(logits_LV[s - 1].argmax())
    return same, total


def test_agreement_equals_a_loop_over_the_exact_pairs() -> None:
    made = tiny.tiny_cache()
    cache = Cache(made.cache, student="student")
    tokenizer = tokenizer_of(tiny.STUDENT_TOKENIZER)
    ours, theirs = shared_vocabulary(tokenizer.get_vocab(), tokenizer_of(tiny.TEACHER_TOKENIZER).get_vocab(), "mapped")
    translated = dict(zip(theirs.tolist(), ours.tolist(), strict=True))
    said = Counter(int(i) for row in cache.usable.tolist() for i in cache.teachers[row]["argmax"])
    often = next(i for i, _ in said.most_common() if i in translated)
    model = tiny.llama(tiny.STUDENT_TOKENIZER, seed=2)
    with torch.no_grad():  # a student that says the teacher's most frequent word at every other place
        model.get_output_embeddings().weight[translated[often]] *= 40

    found = Agreement(tokenizer, made.cache, {row["doc_id"] for row in cache.documents}).measure(model)

    same, total = slow_agreement(model, cache, translated)
    assert 0 < same < total
    assert found == {"agreement": pytest.approx(100 * same / total), "agreement_pairs": total}


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    """Argmax after argmax, without padding and without a cache of keys."""
    ids = [*prompt]
    while len(ids) < len(prompt) + count and ids[-1] not in ENDS:
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_padding_on_the_left_changes_no_response() -> None:
    tokenizer, model = tokenizer_of("sentencepiece"), tiny.gpt2("sentencepiece")
    prompts = [np.array(tokenizer(text)["input_ids"], np.int32) for text in ("On the long river", "Who?", "The")]
    assert len({len(prompt) for prompt in prompts}) == 3

    said = generate(model, tokenizer, prompts, seed=None, ends=ENDS, max_new_tokens=8)

    ids = [greedy(model, prompt.tolist(), 8) for prompt in prompts]
    assert said == [tokenizer.decode(answer, skip_special_tokens=True) for answer in ids]
    assert len(set(said)) == 3


def test_rouge_l_is_the_mean_deviation_and_best_over_seeds_and_of_several_references_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = encoded(tokenizer_of("sentencepiece"), tmp_path)
    references = [response for _, response in HELD]
    said = {1: references, 2: ["…"] * len(HELD), 3: references[:2] + ["…"] * 2}
    monkeypatch.setattr(evaluate, "generate", lambda *_, seed, **__: said[seed])
    request = Request(student="x", data=Path("x"), seeds=(1, 2, 3))

    several = {pairs[3][0].line: ["other words", references[3], "no"]}

    found = rouge_l(tiny.llama("sentencepiece"), tokenizer_of("sentencepiece"), pairs, request, several)

    assert found["rouge_l"] == pytest.approx(50.0)
    assert found["rouge_l_std"] == pytest.approx(math.sqrt((50**2 + 50**2) / 3))
    assert found["rouge_l_max"] == pytest.approx(100.0)


def test_a_folder_is_measured_from_rows_to_numbers_also_without_prompts(tmp_path: Path) -> None:
    folder = tiny.saved(tiny.llama("byte_level"), "byte_level", tmp_path / "model")
    request = Request(student=folder, data=tiny.corpus_file(tmp_path, HELD), seeds=(1, 2), max_new_tokens=4)

    found = evaluate_student(request)

    assert (found["documents"], found["unusable"], found["template"]) == (4, 0, "none")
    assert found["bits_per_byte"] > 0
    assert 0 <= found["rouge_l"] <= found["rouge_l_max"] <= 100
    assert "agreement" not in found


def test_a_foreign_student_is_read_with_its_own_chat_template_and_refused_before_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.saved(tiny.llama("byte_level"), "byte_level", tmp_path / "model")
    tokenizer = tiny.fresh("byte_level")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    assert (
        evaluate_student(Request(student=folder, data=tiny.corpus_file(tmp_path, HELD), rouge=False))["template"]
        == "chat"
    )
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(evaluate, "speaker_of", None)

    with pytest.raises(UsageError, match="the chat template refuses the turns user, assistant: no"):
        evaluate_student(Request(student=folder, data=tiny.corpus_file(tmp_path, HELD), rouge=False))


def test_rows_that_cannot_be_used_are_counted_and_only_unusable_rows_are_an_error(tmp_path: Path) -> None:
    folder = tiny.saved(tiny.llama("sentencepiece"), "sentencepiece", tmp_path / "model")
    data = tiny.corpus_file(tmp_path, [*HELD[:2], ("What?", "")])
    request = Request(student=folder, data=data, rouge=False)
    found = evaluate_student(request)
    assert (found["documents"], found["unusable"]) == (2, 1)

    tiny.corpus_file(tmp_path, [("Yes?", "No."), ("The old lamp on the harbour wall. " * 4, "Yes.")])
    found = evaluate_student(Request(student=folder, data=data, rouge=False, max_tokens=20))  # the prompt fills it
    assert (found["documents"], found["unusable"]) == (1, 1)

    tiny.corpus_file(tmp_path, [("What?", "")])
    with pytest.raises(BadData, match=r"corpus\.jsonl: no row can be used|no row"):
        evaluate_student(request)


def test_a_cache_without_the_teachers_choices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny.tiny_cache()
    cache = Cache(made.cache, student="student")
    cache.__dict__["signals"] = tuple(s for s in cache.signals if s.name != "argmax")
    monkeypatch.setattr(held_out, "Cache", lambda *_, **__: cache)

    with pytest.raises(UsageError, match="holds no argmax of the teacher"):
        Agreement(tokenizer_of("sentencepiece"), made.cache, set())


def test_the_model_runs_in_what_is_fast_here_and_a_slow_dtype_is_obeyed_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def dtype_of(asked: str) -> object:
        student = small_cache.made() / "teacher"
        return evaluate_student(
            Request(student=student, data=tiny.corpus_file(tmp_path, HELD), rouge=False, dtype=asked)
        )["dtype"]

    hardware_is(monkeypatch, has_bfloat16=False, factor=63.4)
    assert dtype_of("auto") == "float32"
    assert "warning" not in capsys.readouterr().err
    assert dtype_of("bf16") == "bfloat16"
    assert capsys.readouterr().err.count("warning: bfloat16 products take 63 times") == 1


# One answer is a draw of its own: from its own scores and seed, by the settings and nothing else


def say_ids(texts: list[str], seeds: list[int], model: Any = None, **how: Any) -> list[list[int]]:
    prompts = [np.array(tiny.tokenizer_of(KIND)(text)["input_ids"], np.int32) for text in texts]
    settings = GenerationSection(max_new_tokens=6, **how)
    return generation.generate(
        model or tiny.llama(KIND), tiny.tokenizer_of(KIND), prompts, settings, seeds=seeds, ends=ENDS
    )


def test_an_answer_depends_on_its_own_seed_and_not_on_its_neighbours() -> None:
    asked = ["Who lit the lamp?"] * 3

    together = say_ids(asked, [5, 6, 7])

    assert [say_ids(asked[:1], [seed])[0] for seed in (5, 6, 7)] == together == say_ids(asked, [7, 6, 5])[::-1]
    assert len(set(map(tuple, together))) == 3


@pytest.mark.parametrize("how", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}, {"temperature": 0.0}])
def test_settings_that_leave_one_token_give_the_likeliest(how: dict[str, float]) -> None:
    model = tiny.llama(KIND)

    assert say_ids(["Who?"], [3], model, **how)[0] == greedy(model, tiny.tokenizer_of(KIND)("Who?")["input_ids"], 6)


def test_draws_come_as_often_as_their_probability() -> None:
    odds = torch.tensor([0.5, 0.3, 0.2, 0.0])

    drawn = _Draw(range(4000), torch.device("cpu"))(torch.zeros(4000, 1), odds.log().expand(4000, 4)).argmax(-1)

    torch.testing.assert_close(torch.bincount(drawn, minlength=4) / 4000, odds, atol=0.03, rtol=0)
    assert int((drawn == 3).sum()) == 0


def test_the_models_own_generation_config_has_no_say_and_is_left_as_it_was() -> None:
    model = tiny.llama(KIND)
    plain = say_ids(["Who?", "Where did he go?"], [1, 2], model)
    own = model.generation_config
    own.suppress_tokens, own.temperature, own.do_sample, own.max_new_tokens = [plain[0][0]], 0.1, True, 2

    assert say_ids(["Who?", "Where did he go?"], [1, 2], model) == plain
    assert model.generation_config is own
    assert own.suppress_tokens == [plain[0][0]]


@pytest.mark.parametrize(
    ("ids", "most", "expected"),
    [
        ([1, 2, 3] * 3, 9, True), ([7, *[1, 2, 3] * 3], 9, True), ([1, 2, 3] * 3, 10, False), ([5] * 32, 32, True),
        ([1, 2, 3, 1, 2, 3], 6, False), ([*[5] * 32, 6], 32, False), ([3, *[1, 2, 3] * 3], 10, True), ([], 1, False),
    ],
)  # fmt: skip
def test_an_answer_repeats_itself_where_its_end_is_one_piece_three_times(
    ids: list[int], most: int, expected: bool
) -> None:
    assert repeats(ids, most) is expected
