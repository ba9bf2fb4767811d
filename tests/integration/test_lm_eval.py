"""A finished student is opened by lm-evaluation-harness (`pip install lm_eval`, which is no part of the project)."""

import json
from pathlib import Path

import pytest

import tiny_models as tiny
from xkd_trainer.training.loop import train

TASK = """task: tiny_task
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["Yes.", "Nobody answered."]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lm_eval_scores_a_finished_student_on_a_local_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    train(tiny.tiny_cache().run(out=str(tmp_path / "out"), loss="sra", steps=1), quiet=True)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"question": asked}) + "\n" for asked, _ in tiny.PAIRS[:4]))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny_task.yaml").write_text(TASK.format(data=data))

    found = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(tmp_path / "out"), "device": "cpu", "dtype": "float32"},
        tasks=["tiny_task"], bootstrap_iters=0,
        task_manager=tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
    )  # fmt: skip

    assert 0 <= found["results"]["tiny_task"]["acc,none"] <= 1
    assert len(found["samples"]["tiny_task"]) == 4
