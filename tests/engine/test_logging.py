import json

from ncfast.engine.logging import RunLog


def test_rewind_drops_unsaved_epochs_and_a_torn_line(tmp_path):
    with RunLog(tmp_path) as log:
        for stage, epoch in ((1, 1), (1, 2), (2, 1), (2, 2), (2, 3)):
            log.write(stage, epoch, epoch, {"loss": 0.5})
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"stage": 2, "ep')
    with RunLog(tmp_path) as log:
        log.rewind(2, 2)
        log.write(2, 3, 3, {"loss": 0.25})
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["epoch"], r["loss"]) for r in records] == [
        (1, 1, 0.5),
        (1, 2, 0.5),
        (2, 1, 0.5),
        (2, 2, 0.5),
        (2, 3, 0.25),
    ]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunLog(None) as log:
        log.rewind(1, 0)
        log.write(1, 1, 1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())
