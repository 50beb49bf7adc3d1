"""What configuration keys mean, from the words below them in the source."""

import pytest

from megatron_sdpo.cli import main
from megatron_sdpo.config import fields_by_name, meanings

PLAIN = (
    *("layout.tensor_parallel", "layout.pipeline_parallel", "engine.tensor_parallel", "engine.max_running_requests"),
    *("engine.start_timeout_s", "engine.request_timeout_s"),
)
"""Keys whose name says it."""


def test_every_key_has_words() -> None:
    said = meanings()
    assert {key for key in fields_by_name() if not said[key]} <= set(PLAIN)
    assert all(said[key.rpartition(".")[0]] for key in fields_by_name() if "." in key)  # sections too
    assert said["objective.alpha"] == "0: KL(teacher||student), 1: KL(student||teacher), between: generalised JSD."
    assert said["sandbox.limits.cpu_s"] and said["optim"] == "AdamW."


def test_the_command_that_says_what_keys_mean(capsys: pytest.CaptureFixture[str]) -> None:
    main(["keys"])
    shown = capsys.readouterr().out
    keys = {line.split()[0] for line in shown.splitlines() if line.startswith("  ") and line[2] != " "}
    assert keys == set(fields_by_name())
    main(["keys", "TEACHER.", "rate"])
    shown = capsys.readouterr().out
    assert "  teacher.update_rate " in shown and "new = (1 - rate) * teacher + rate * student, fp32." in shown
    assert "teacher.mixture" not in shown and "optim." not in shown
    with pytest.raises(SystemExit):
        main(["keys", "xyzzy"])
    assert "no configuration key has xyzzy in its name or meaning" in capsys.readouterr().err
