"""A run goes on with the model's files that it was begun with, or not at all."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from keel.engines.identity import IdentityError
from keel.engines.process import EngineProcess
from keel.loop import resume, train


def test_changed_tokenizer_files_are_refused_on_resuming(tmp_path, make_config):
    config = make_config(
        tmp_path / "run", "qwen3", steps=1, warm_start={"steps": 1}, rollout={"group_size": 2}, checkpoint={"every": 1}
    )
    train(config)
    status = tmp_path / "run" / "status.json"
    status.write_text(json.dumps({**json.loads(status.read_text()), "state": "running"}))  # as if it had been killed
    settings = tmp_path / "run" / "model" / "tokenizer_config.json"
    template = settings.with_name("chat_template.jinja")
    if template.is_file():
        whole = template.read_text()
        template.write_text(f"{whole} ")
    else:
        whole = settings.read_text()
        settings.write_text(json.dumps({**json.loads(whole), "chat_template": "another"}))
    with pytest.raises(IdentityError, match=r"chat template .*put the files back as they were"):
        resume(tmp_path / "run")
    (template if template.is_file() else settings).write_text(whole)
    resume(tmp_path / "run")
    assert json.loads(status.read_text())["state"] == "completed"


def test_an_engine_in_another_process_that_loads_another_model_is_refused(tmp_path, make_config, monkeypatch):
    """The process says which model it loaded; here somebody exchanged its template on the way."""
    config = make_config(tmp_path / "run", "qwen3", steps=1, engine={"process": "separate"})
    start = EngineProcess.__init__

    def elsewhere(self, model, *arguments, **options):
        copy = Path(shutil.copytree(model.path, tmp_path / "copy"))
        (copy / "chat_template.jinja").write_text("another")
        start(self, model.model_copy(update={"path": str(copy)}), *arguments, **options)
        assert dataclasses.asdict(self.capabilities())["identity"]["source"] == str(copy)

    monkeypatch.setattr(EngineProcess, "__init__", elsewhere)
    with pytest.raises(IdentityError, match=r"engine 'embedded' .*differ in the chat template"):
        train(config)
