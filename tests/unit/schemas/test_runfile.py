"""The run file: what stands in it is what runs, and a slip of the pen is named."""

from pathlib import Path

import pytest

from xkd_schemas.config import RunConfig, change_values, load_run
from xkd_schemas.errors import InputMissing, UsageError


def test_a_byte_order_mark_in_front_of_the_file_is_none_of_its_text(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('cache = "c"', encoding="utf-8-sig")

    assert load_run(path).cache == "c"


def test_overrides_go_over_the_file_and_later_ones_over_earlier_ones(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('[teacher]\nword_layers = [3, 4]\n[losses.mta]\nhid = "off"\n')
    sets = ["teacher.word_layers=[7]", "workers=1", "workers=2", "losses.sra.p=0.5", "teacher.model=a b/c"]
    run = load_run(tmp_path / "run.toml", [*sets, "train.lr=1e-3"])

    assert (run.teacher.word_layers, run.workers, run.teacher.model, run.train.lr) == ((7,), 2, "a b/c", 1e-3)
    assert run.losses == {"mta": {"hid": "off"}, "sra": {"p": 0.5}}


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("teacher.modell=x", "--set: 'teacher.modell' is not a key. Next: did you mean 'model'?"),
        ("techer.model=x", "--set: 'techer' is not a key. Next: did you mean 'teacher'?"),
        ("zzz=1", "--set: 'zzz' is not a key. Next: use one of: cache, workers, gpus_per_worker, ray_address"),
        ("documents.qqqq=1", "--set: 'documents.qqqq' is not a key. Next: use one of: corpus, form, columns"),
        ("workers", "--set workers: no '='. Next: write --set section.key=value"),
        ("cache.x=1", "cache: Input should be a valid string, found {'x': 1}"),
        ("teacher.dtype=int8", "teacher.dtype: Input should be 'auto', 'bfloat16', 'float16' or 'float32', found"),
        ("documents.max_reject=2", "documents.max_reject: Input should be less than or equal to 1, found 2"),
        (f"train.seed={2**63}", f"train.seed: Input should be less than {2**63}, found {2**63}"),
        ('train.shards=["a", ""]', "train.shards.1: String should have at least 1 character, found ''"),
        ("workers=-1", "workers: Input should be greater than or equal to 0, found -1"),
        ("workers=two", "workers: Input should be a valid integer, unable to parse string as an integer, found 'two'"),
        ("=1", "'' is not a key"),
        ("teacher.codec=zip", "--set: teacher.codec: Input should be bf16 or bf16-planes or int8, found 'zip'"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_to_type(override: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_run(None, [override])
    assert sentence in str(caught.value)
    assert caught.value.fix


def test_what_nobody_named_is_not_named_by_a_change_of_something_else() -> None:
    run = RunConfig.load(None, train={"loss": "sra"})

    changed = change_values(run, {"train.lr": 0.5}, "--vary")

    assert (changed.train.lr, changed.train.loss) == (0.5, run.train.loss)
    assert changed.train.model_fields_set == {"loss", "lr"}
    assert changed.model_fields_set == {"train"}


def test_a_list_may_be_one_text_with_commas() -> None:
    run = load_run(None, ["teacher.losses=mta, sra,"], [("--word-layers", "teacher.word_layers", "3,4")])

    assert (run.teacher.losses, run.teacher.word_layers) == (("mta", "sra"), (3, 4))


def test_a_value_cannot_be_a_section_of_another_override() -> None:
    with pytest.raises(UsageError, match=r"--set workers.x=1: workers is not a section. Next: write"):
        load_run(None, ["workers=1", "workers.x=1"])


def test_what_is_not_there_or_not_toml_is_unreadable_input(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match=r"run.toml: No such file or directory. Next: give the path of a .toml"):
        load_run(tmp_path / "run.toml")
    for content in (b"a = ", b"\xff", b"[x\n", b"a = 1\na = 2"):
        (tmp_path / "run.toml").write_bytes(content)
        with pytest.raises(InputMissing, match=r"run.toml is not TOML"):
            load_run(tmp_path / "run.toml")
